"""Preset < TOML file < flags, merged into one checked configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from dlmone_fast.config.presets import PRESETS
from dlmone_fast.config.schema import Config
from dlmone_fast.config.section import Section, shown
from dlmone_fast.errors import ConfigError
from dlmone_fast.textfiles import decoded

_MAX_FILE_BYTES = 1 << 20
# Longest text in which the place of an error is looked for, at the cost of parsing it again.
_MAX_SEARCHED = 20_000
# Names that TOML takes without quotes, of a length that fits a message.
_SECTION = re.compile(r"\s*\[+\s*([A-Za-z0-9_.-]{1,80})")
_KEY = re.compile(r"\s*([A-Za-z0-9_.-]{1,80})")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


def resolve(preset: str = "", file: str | os.PathLike[str] = "", **overrides: Any) -> Config:
    """The configuration of a preset, changed by a TOML file, changed by keyword arguments.

    Args:
        preset: a name from `PRESETS`; empty: the file's `preset` key, else "grammar".
        file: a TOML file with the sections and keys of `Config`; empty: none.
        overrides: the same keys as nested mappings, e.g. `teacher={"steps": 100}`.

    Raises:
        ConfigError: an unknown preset, key or value; the message gives the key path.
    """
    values = load_toml(file) if file else {}
    name = preset or values.get("preset", "grammar")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(_unknown("preset", str(name), list(PRESETS)))
    merged = merge(to_dict(PRESETS[name]), values, overrides)
    return from_dict({**merged, "preset": name})


def from_dict(values: Mapping[str, Any]) -> Config:
    """A checked configuration from nested mappings; missing keys take the class's defaults."""
    return _build(Config, values, "")


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as nested dictionaries of plain values."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def to_toml(config: Config) -> str:
    """The configuration as TOML text; `from_dict(tomllib.loads(...))` gives an equal object."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def load_toml(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The nested values of a TOML file, checked against the keys of `Config`.

    Raises:
        ConfigError: the file cannot be read, is larger than 1 MiB or not TOML, or has a key that
            is unknown or no section; the message gives the line or the key path.
    """
    text = _read(file)
    try:
        values = tomllib.loads(text)
    # Not TOMLDecodeError alone: a number of thousands of digits is a ValueError of int().
    except ValueError as error:
        raise ConfigError(
            f"--config {file}: is not valid TOML: {error}{_near(text, error)}"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"--config {file}: is nested too deeply; expected sections of keys"
        ) from error
    _check_keys(Config, values, "")
    return values


def _read(file: str | os.PathLike[str]) -> str:
    try:
        with Path(file).open("rb") as stream:
            content = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"--config {file}: cannot be read ({error.strerror}); name the TOML file of a run"
        ) from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"--config {file}: is larger than the {_MAX_FILE_BYTES:,} bytes that a configuration "
            "may have; name the TOML file of a run"
        )
    try:
        return decoded(content)
    except UnicodeDecodeError as error:
        before = decoded(error.object[: error.start])
        raise ConfigError(
            f"--config {file}: is not UTF-8 text ({error.reason}){_near_line(before, -1)}"
        ) from error


def _near(text: str, error: ValueError) -> str:
    """Where a parser's error is, for its message: the key path and line, as far as known."""
    lines = text.split("\n")
    named = re.search(r"at line (\d+)", str(error))
    last = int(named[1]) - 1 if named else len(lines) - 1
    # A parser notices late what was never closed: the fault is behind the last line up to which
    # the text is whole.
    for end in range(last, -1, -1) if len(text) < _MAX_SEARCHED else ():
        with contextlib.suppress(ValueError, RecursionError):
            tomllib.loads("\n".join(lines[:end]))
            return _near_line(text, end)
    return _near_line(text, last) if named else ""


def _near_line(text: str, index: int) -> str:
    lines = text.split("\n")
    number = index % len(lines)
    sections = (_SECTION.match(line) for line in reversed(lines[: number + 1]))
    section = next((match[1] for match in sections if match), "")
    key = _KEY.match(lines[number])
    path = ".".join(part for part in (section, key[1] if key else "") if part)
    return f"; see {path or 'the top'}, line {number + 1}"


def merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the last one on top."""
    merged = dict(base)
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                merged[key] = merge(below, value)
            else:
                merged[key] = value
    return merged


@functools.cache
def _sections(kind: type) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {
        key: hint
        for key, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def _check_keys(kind: type, values: Mapping[str, Any], path: str) -> None:
    names = [item.name for item in dataclasses.fields(kind)]
    sections = _sections(kind)
    for key, value in values.items():
        if key not in names:
            raise ConfigError(_unknown("key", key, names, path))
        if key in sections:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}{key} must be a section of keys, got {shown(value)}")
            _check_keys(sections[key], value, f"{path}{key}.")


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    _check_keys(kind, values, path)
    sections = _sections(kind)
    arguments = {
        key: _build(sections[key], value, f"{path}{key}.") if key in sections else value
        for key, value in values.items()
    }
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _unknown(what: str, name: str, known: list[str], path: str = "") -> str:
    nearest = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    hint = f"did you mean {path}{nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    bare = what == "key" and _BARE_KEY.fullmatch(name)
    return f"unknown {what} {path}{name if bare else shown(name)}; {hint}"
