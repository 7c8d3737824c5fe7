"""What a call of `generate` may ask for, checked before anything runs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dlmone_fast.checks import as_real, as_whole
from dlmone_fast.config.section import shown
from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.samplers.grids import METHODS
from dlmone_fast.text_tokenizer import TextTokenizer

MAX_CANDIDATES = 64
MAX_BATCH_SIZE = 4096
MAX_PROMPTS = 1_000_000
MAX_SEED = (1 << 64) - 1
SELECTIONS = ("none", "mbr")
OVERFLOWS = ("error", "truncate")
DECODINGS = ("clean", "diffuseq")
Named = Callable[[int], str]
"""A prompt's name by its place, as the caller knows it: errors use it."""


@dataclass(frozen=True)
class GenerationSettings:
    """A model's own defaults, stored as `generation_config.json`.

    Attributes:
        kind: "student" (calls at t_init, re-noising between calls) or "teacher" (a sampler).
        steps: network calls of one generation.
        sampler: sampler of a teacher; "" for a student.
        eta: noise of the ddim sampler, 0 (deterministic) to 1.
        temperature: factor of all noise, the first included: below 1 texts are likelier and less
            diverse.
        t_init: timestep of a student's first call.
        scale_latent: a student is fed sigma(t_init) z rather than z.
        max_source_tokens: longest source in tokens, [CLS] and [SEP] included.
        max_chars: longest prompt in characters, checked before tokenising.
    """

    kind: str = "student"
    steps: int = 1
    sampler: str = ""
    eta: float = 0.0
    temperature: float = 1.0
    t_init: int = 1490
    scale_latent: bool = True
    max_source_tokens: int = 64
    max_chars: int = 20_000

    def __post_init__(self) -> None:
        if self.kind not in ("student", "teacher"):
            raise UsageError(f"kind must be student or teacher, got {self.kind!r}")
        if self.kind == "teacher" and self.sampler not in METHODS:
            raise UsageError(
                f"sampler must be one of {', '.join(METHODS)}; got {shown(self.sampler)}"
            )
        self._set("steps", whole_number("steps", self.steps, 1, 100_000))
        self._set("eta", real_number("eta", self.eta, 0, 1))
        if not isinstance(self.scale_latent, bool):
            raise UsageError(f"scale_latent must be true or false, got {shown(self.scale_latent)}")
        self._set("temperature", real_number("temperature", self.temperature, 0, 10))
        for name, low, high in (
            ("t_init", 1, 100_000), ("max_source_tokens", 2, 4096), ("max_chars", 1, 10_000_000)
        ):  # fmt: skip
            self._set(name, whole_number(name, getattr(self, name), low, high))

    def _set(self, name: str, value: float) -> None:
        # Plain numbers: settings are stored as JSON, which knows none of numpy's.
        object.__setattr__(self, name, value)

    def with_call(
        self,
        steps: int | None,
        sampler: str | None,
        eta: float | None,
        temperature: float | None,
    ) -> GenerationSettings:
        """These settings with a call's own steps, sampler, eta and temperature."""
        if self.kind == "student" and (sampler is not None or eta is not None):
            raise UsageError(
                f"sampler={sampler!r} and eta={eta!r} need a teacher: this model is a one-step "
                "student, whose choices are steps and temperature"
            )
        steps = self.steps if steps is None else whole_number("steps", steps, 1, 100_000)
        return replace(
            self,
            steps=steps,
            sampler=self.sampler if sampler is None else sampler,
            eta=self.eta if eta is None else eta,
            temperature=self.temperature if temperature is None else temperature,
        )


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate(..., return_dict=True)` returns; every list has one entry a prompt.

    Attributes:
        texts: the answers; with several candidates and no selection, the first candidates.
        candidates: all candidates of each prompt.
        token_ids: token ids of each text's target positions, special tokens included.
        truncated: whether the prompt was cut to the longest source.
        seeds: the seed of each prompt: passing it again gives the same text.
        steps: network calls of each generation.
        seconds: wall-clock time of the call.
    """

    texts: list[str]
    candidates: list[list[str]]
    token_ids: list[list[int]]
    truncated: list[bool]
    seeds: list[int]
    steps: int
    seconds: float


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """The value as an int, if it is a whole number within bounds."""
    number = as_whole(value)
    if number is None or not low <= number <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return number


def real_number(name: str, value: Any, low: float, high: float) -> float:
    """The value as a float, if it is a number within bounds."""
    number = as_real(value)
    if number is None or not low <= number <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    return number


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
    return str(value)


def prompts_of(batch: str | Sequence[str]) -> list[str]:
    """The prompts of a call as a list; the tokenizer checks each one's text."""
    if isinstance(batch, str):
        return [batch]
    given: object = batch
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Sequence):
        raise PromptError(
            f"batch must be a str or a list of str, got {type(batch).__name__}; "
            "turn other iterables into a list"
        )
    if len(batch) > MAX_PROMPTS:
        raise PromptError(f"batch must hold at most {MAX_PROMPTS} prompts, got {len(batch)}")
    for index, prompt in enumerate(batch):
        if not isinstance(prompt, str):
            raise PromptError(f"batch[{index}] must be a str, got {type(prompt).__name__}")
    return list(batch)


def refuse_calibration(precision: str) -> None:
    """Refuse calibration prompts for a precision that measures nothing."""
    if precision != "int8":
        raise UsageError(
            f"calibration: belongs to int8, and the precision is {precision}; pass dtype='int8', "
            "or leave calibration out"
        )


def refuse_longest(
    texts: Sequence[str], tokenizer: TextTokenizer, limit: int, named: Named
) -> None:
    """Refuse sources of more than `limit` ids that would take long to be tokenised first."""
    for place, text in enumerate(texts):
        if isinstance(text, str) and tokenizer.is_surely_longer(text, limit):
            raise PromptError(
                f"{named(place)}: more than {limit} tokens with [CLS] and [SEP], which is the "
                "limit; shorten it or pass on_overflow='truncate'"
            )


def seeds_of(seed: int | Sequence[int] | None, prompts: int) -> list[int]:
    """One 64-bit seed a prompt: the same for all, the ones given, or fresh ones for None."""
    if seed is None:
        return [secrets.randbits(64) for _ in range(prompts)]
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        if len(seed) != prompts:
            raise UsageError(f"seed must hold one seed a prompt ({prompts}), got {len(seed)}")
        return [whole_number(f"seed[{i}]", value, 0, MAX_SEED) for i, value in enumerate(seed)]
    return [whole_number("seed", seed, 0, MAX_SEED)] * prompts
