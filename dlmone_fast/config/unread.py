"""Keys that were set and that nothing reads, because another key leads past them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from dlmone_fast.config.presets import PRESETS
from dlmone_fast.config.schema import Config
from dlmone_fast.config.section import shown
from dlmone_fast.errors import ConfigError

# Keys of distill.pairs that say how the teacher makes them.
_OF_TEACHER = ("sampler", "steps", "temperature", "rounded")
# Keys, whether they are read, and what would read them.
_READ: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        ("data.vocab_file", "data.lowercase", "data.strip_accents"),
        lambda c: not c.is_grammar,
        "text of your own: a grammar has its own words; name data.task = 'custom' with --data-dir",
    ),
    (
        ("data.vocab_size",),
        lambda c: not (c.is_grammar or c.data.vocab_file or c.model.start_from),
        "a vocabulary that is learnt: name data.task = 'custom', no data.vocab_file and no "
        "model.start_from",
    ),
    (
        ("data.vocab_size", "data.strip_accents"),
        lambda c: c.data.tokenizer == "wordpiece",
        "data.tokenizer = 'wordpiece': an aligned one learns its letters and labels",
    ),
    (
        ("data.lowercase", "data.strip_accents"),
        lambda c: not c.model.start_from,
        "a vocabulary of the run's own: a start's is used as it was made",
    ),
    (
        ("data.prune_below",),
        lambda c: bool(c.model.start_from),
        "model.start_from",
    ),
    (
        ("data.train_rows",),
        lambda c: c.is_grammar,
        "the generated grammars: shorten train.jsonl instead",
    ),
    (
        (
            "teacher.log_snr_offset",
            "teacher.log_snr_scale",
            "teacher.log_snr_uniform_share",
            "teacher.pure_noise_share",
        ),
        lambda c: c.teacher.timestep_sampler == "log-snr",
        "teacher.timestep_sampler = 'log-snr'",
    ),
    (
        ("teacher.self_conditioning_share",),
        lambda c: c.model.self_conditioning,
        "model.self_conditioning = true",
    ),
    (
        tuple(
            f"distill.pairs.{name}"
            for name in ("targets", "per_source", "batch_size", *_OF_TEACHER)
        ),
        lambda c: c.distill.pairs.count > 0,
        "distill.pairs.count above 0",
    ),
    (
        tuple(f"distill.pairs.{name}" for name in _OF_TEACHER),
        lambda c: c.distill.pairs.targets == "teacher",
        "distill.pairs.targets = 'teacher'",
    ),
)


def refuse_unread(config: Config) -> None:
    """Refuse a key that was set, differently from its preset and its default, for nothing.

    Raises:
        ConfigError: with the key, its value, and what would read it.
    """
    preset, plain = PRESETS[config.preset], Config()
    for keys, is_read, reader in _READ:
        if is_read(config):
            continue
        for key in keys:
            get = attrgetter(key)
            value = get(config)
            if value not in (get(preset), get(plain)):
                raise ConfigError(
                    f"{key} is {shown(value)}, and nothing reads it here: it belongs to {reader}; "
                    "or leave it out"
                )
