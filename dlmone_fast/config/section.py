"""What every section of the configuration is: a frozen dataclass that checks itself."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
from collections.abc import Callable, Iterator

from dlmone_fast.checks import as_real, as_whole
from dlmone_fast.errors import ConfigError

# Characters of a value that a message repeats.
_SHOWN = 80

_checks_enabled = contextvars.ContextVar("config_checks_enabled", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Build configuration objects without checking them, to check the merged result once."""
    token = _checks_enabled.set(False)
    try:
        yield
    finally:
        _checks_enabled.reset(token)


class Section:
    """A part of the configuration that checks its own fields when it is built."""

    def __post_init__(self) -> None:
        if _checks_enabled.get():
            _check_types(self)
            self.check()

    def check(self) -> None:
        """Raise ConfigError, starting with the field's name, for a value that cannot be used."""


def _check_types(section: Section) -> None:
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value, kind = getattr(section, item.name), item.type
        plain = _CONVERT[kind](value) if kind in _CONVERT else None
        if plain is not None:
            # The comparison also refuses NaN, and whole numbers beyond a float's range.
            if kind is float and not abs(plain) <= sys.float_info.max:
                raise ConfigError(f"{item.name} must be finite, got {shown(value)}")
            object.__setattr__(section, item.name, plain)
        elif kind in _KINDS and type(value) is not kind:
            raise ConfigError(f"{item.name} must be {_KINDS[kind]}, got {shown(value)}")
        if isinstance(value, str) and not _is_text(value):
            raise ConfigError(
                f"{item.name} must be text that a path and a UTF-8 file can hold, without NUL and "
                f"lone surrogates, got {shown(value)}"
            )


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


_KINDS: dict[object, str] = {
    int: "a whole number", float: "a number", str: "a string", bool: "a boolean",
}  # fmt: skip
# A number of any library becomes Python's own, which TOML and JSON can hold.
_CONVERT: dict[object, Callable[[object], float | None]] = {int: as_whole, float: as_real}


def shown(value: object) -> str:
    """A value for a message, cut to a line; files may hold values of any length."""
    try:
        text = repr(value)
    except RecursionError:
        return "a value that is nested too deeply"
    except ValueError:
        # Python prints no integer of more than some thousand digits.
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def within(section: Section, low: float, high: float, *names: str) -> None:
    """Raise ConfigError unless the named fields lie between `low` and `high`, both included."""
    for name in names:
        value = getattr(section, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} must be between {low:g} and {high:g}, got {shown(value)}")


def one_of(section: Section, choices: tuple[str, ...], *names: str) -> None:
    """Raise ConfigError unless each of the named fields is one of `choices`."""
    for name in names:
        value = getattr(section, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
