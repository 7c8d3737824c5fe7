"""Sizes that nobody set follow those that somebody did: a preset's belong to its own others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Values = Mapping[str, Any]
_SMALLEST_SOURCE = 3


def followed(preset: Values, chosen: Values, merged: dict[str, Any]) -> dict[str, Any]:
    """A merged configuration with its preset's dependent sizes fitted to the chosen ones.

    | set | follows, unless set itself |
    |---|---|
    | model.seq_len | max_positions holds it at least; source_positions keeps its share of it |
    | data.max_source_tokens | source_positions holds it at least |
    | data.vocab_size of a learnt vocabulary | model.vocab_size is taken from the tokenizer |
    | model.vocab_size | data.vocab_size of a learnt vocabulary is the same |
    | diffusion.num_timesteps | t_init, t_min, t_max keep their share; evaluation.teacher_steps stay
      within it |
    | steps of the teacher or a stage | a warm-up that would take all of them keeps its share |

    Args:
        preset: the preset's values, nested.
        chosen: what a file, flags or arguments set, nested.
        merged: all values; not changed.

    Values of another type than the configuration's are left for its own checks.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value
              for key, value in merged.items()}  # fmt: skip
    for path, value in _rules(preset, chosen, merged):
        *sections, key = path.split(".")
        if _value(chosen, path) is None:
            inner = result
            for section in sections:
                inner[section] = dict(inner[section])
                inner = inner[section]
            inner[key] = value
    return result


def _rules(preset: Values, chosen: Values, merged: Values) -> Iterator[tuple[str, Any]]:
    yield from _lengths(preset, chosen, merged)
    yield from _vocabulary(chosen, merged)
    yield from _timesteps(preset, chosen, merged)
    for section, warmup in (
        ("teacher", "warmup_steps"),
        ("distill.stage1", "adversarial_warmup_steps"),
        ("distill.stage2", "adversarial_warmup_steps"),
    ):
        steps, before = _value(chosen, f"{section}.steps"), _value(preset, f"{section}.steps")
        length = _value(preset, f"{section}.{warmup}")
        if _is_count(steps) and length >= steps and length <= before:
            yield f"{section}.{warmup}", length * steps // before


def _lengths(preset: Values, chosen: Values, merged: Values) -> Iterator[tuple[str, Any]]:
    length, before = _value(chosen, "model.seq_len"), preset["model"]
    if _is_count(length):
        yield "model.max_positions", max(length, before["max_positions"])
    source, longest = before["source_positions"], _value(chosen, "data.max_source_tokens")
    if not source:
        return
    if _is_count(length):
        share = round(source * length / before["seq_len"])
        source = max(_SMALLEST_SOURCE, min(share, length - 2))
    if _is_count(longest):
        source = max(source, longest + 1)
    yield "model.source_positions", source


def _vocabulary(chosen: Values, merged: Values) -> Iterator[tuple[str, Any]]:
    if _value(merged, "data.vocab_file"):
        return
    if {"vocab_file", "vocab_size"} & set(chosen.get("data", ())):
        yield "model.vocab_size", 0
    size = _value(chosen, "model.vocab_size")
    if _is_count(size):
        yield "data.vocab_size", size


def _timesteps(preset: Values, chosen: Values, merged: Values) -> Iterator[tuple[str, Any]]:
    total, before = _value(chosen, "diffusion.num_timesteps"), preset["diffusion"]["num_timesteps"]
    if not _is_count(total):
        return
    for name in ("t_init", "t_min", "t_max"):
        yield f"distill.{name}", preset["distill"][name] * total // before
    steps = preset["evaluation"]["teacher_steps"].split()
    fitting = dict.fromkeys(str(min(int(step), total)) for step in steps)
    yield "evaluation.teacher_steps", " ".join(fitting)


def _value(values: Values, path: str) -> Any:
    """The value at a key path; None: nothing is set there."""
    found: Any = values
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
