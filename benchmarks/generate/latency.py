"""Seconds per sample against network calls: the systems of the latency study (DLM-One, Table 2).

One prompt, text in to text out. The reference is DiffuSeq's sampling in its original formulation:
a network call, rounding of x̂0 to the nearest embeddings and an update at every step, then the
decoder's arg-max. The same samplers with this package's rounding and noise stand beside it, and
the one-step student on every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.generate.cases import BERT_BASE, COMPACT, Model, prompts
from benchmarks.harness.race import OURS
from benchmarks.harness.records import Row
from benchmarks.harness.targets import Target
from benchmarks.kernels.peers import expanded_square
from dlmone_fast.config import ModelConfig
from dlmone_fast.data.batches import source_batch
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.runtime import GenerationSettings, Generator
from dlmone_fast.samplers import sample
from dlmone_fast.samplers.loop import Noise, SamplerOptions
from dlmone_fast.tasks.paper import TABLE_2

OPERATION = "latency"
PUBLISHED = "DiffuSeq as published"
SAMPLER = f"{OURS} sampler"
STEPS = tuple(TABLE_2)
_CHECKED_STEPS = 5
_NEAR = 0.1


@dataclass(frozen=True)
class Study:
    """A model at one number of network calls.

    Attributes:
        full: measured under --full only; the time follows from fewer calls otherwise.
        derive: numbers of calls whose time follows from this one's; those of the largest one that
            was measured count.
    """

    model: str
    config: ModelConfig
    steps: int
    full: bool = False
    derive: tuple[int, ...] = ()

    @property
    def case(self) -> str:
        """The record's name of the case: one for all numbers of calls."""
        return f"{self.model}, batch 1"

    def __str__(self) -> str:
        return f"{self.model}, {steps_of(self.steps)}"


def _whole(model: str, config: ModelConfig) -> list[Study]:
    return [Study(model, config, steps) for steps in STEPS]


_FEW, _MOST = STEPS[1], STEPS[-1]
CASES = {
    "cpu": [
        Study("BERT-base", BERT_BASE, 1),
        Study("BERT-base", BERT_BASE, _FEW, derive=STEPS[2:]),
        Study("BERT-base", BERT_BASE, _MOST, full=True, derive=STEPS[2:-1]),
        *_whole("compact", COMPACT),
    ],
    "cuda": [*_whole("BERT-base", BERT_BASE), *_whole("compact", COMPACT)],
}
"""At BERT-base's size a CPU takes minutes for a sample of all steps."""


TARGETS = tuple(
    Target(device, OPERATION, "BERT-base, batch 1", "time", 1 / 500, f"{PUBLISHED}, {_MOST} steps",
           own=f"{OURS} eager fp32, 1 step")
    for device in CASES
)  # fmt: skip
"""The paper's own ratio, on one engine and precision, so that it is the method's alone."""


def steps_of(steps: int) -> str:
    """ "1 step", "65 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"


def named(system: str, steps: int) -> str:
    """The implementation's name in a record."""
    return f"{system}, {steps_of(steps)}"


def method_of(steps: int, all_steps: int) -> str:
    """DiffuSeq's own choice: its full chain, or its strided loop for fewer calls."""
    return "ancestral" if steps == all_steps else "published-ddim"


@dataclass(frozen=True, eq=False)
class Published:
    """DiffuSeq's sampling in PyTorch, fp32, as the original writes it."""

    model: Model

    @torch.inference_mode()
    def __call__(self, prompt: str, steps: int, noise: Noise | None = None) -> list[int]:
        """The target ids of the sample, after its text was made; `noise` replaces torch's own."""
        denoiser, table = self.model.denoiser, self.model.vocabulary.table
        tokenizer, schedule = self.model.tokenizer, denoiser.schedule
        ids, mask, _ = source_batch(
            tokenizer.encode([prompt]), denoiser.config.seq_len, tokenizer,
            self.model.settings.max_source_tokens, "truncate", denoiser.config.source_positions,
        )  # fmt: skip
        source = table[ids.to(table.device)]
        draw: Callable[[int], Tensor] = lambda _: torch.randn_like(source)  # noqa: E731
        x = sample(
            denoiser, schedule,
            SamplerOptions(method_of(steps, schedule.num_timesteps), steps),
            source, mask.to(table.device), noise or draw, self.rounded,
        )  # fmt: skip
        found = denoiser.logits(x).argmax(-1).cpu()
        target: list[int] = found[mask != 0].tolist()
        tokenizer.decode_clean(target)
        return target

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest embeddings to x [B, L, d], by squares that are written out."""
        table = self.model.vocabulary.table
        return table[expanded_square(x.flatten(0, 1), table)].view_as(x)


@dataclass(frozen=True, eq=False)
class Sampler:
    """This package's samplers, with its noise and its rounding; the network in PyTorch."""

    model: Model
    precision: str = "fp32"

    def generator(self) -> Generator:
        """A teacher of the model's weights."""
        limit = self.model.settings.max_source_tokens
        settings = GenerationSettings("teacher", sampler="ddim", max_source_tokens=limit)
        return Generator(self.model.denoiser, self.model.tokenizer, settings, self.precision)

    @property
    def name(self) -> str:
        """As in the record."""
        return f"{SAMPLER} eager {self.precision}"

    def __call__(self, generator: Generator, prompt: str, steps: int) -> list[int]:
        """The target ids of the sample of seed 0, after its text was made."""
        method = method_of(steps, self.model.denoiser.schedule.num_timesteps)
        output = generator.generate(
            [prompt], seed=0, steps=steps, sampler=method, on_overflow="truncate",
            progress=False, return_dict=True,
        )  # fmt: skip
        return output.token_ids[0]


@functools.lru_cache(maxsize=2)
def disagreement(model: Model) -> str | None:
    """The fault of our sampler beside the published one, on the same noise; None: there is none.

    A few strided steps, whose samples stay near the noise that they start from; and the rounding,
    which hardly shows in those, by itself.
    """
    config, device, prompt = model.denoiser.config, model.device, prompts(1)[0]

    def noise(step: int) -> Tensor:
        shape = (config.seq_len, config.embedding_dim)
        return normal([0], Stream.GENERATION, [0], step, *shape, device=device)

    ours, published = Sampler(model), Published(model)
    found = ours(ours.generator(), prompt, _CHECKED_STEPS)
    expected = published(prompt, _CHECKED_STEPS, noise)
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    if wrong:
        return f"{wrong} of {len(expected)} ids differ from the published sampler's"
    table = model.vocabulary.table
    x = (table[: config.seq_len] + _NEAR * noise(0)[0, : len(table)])[None]
    if not torch.equal(published.rounded(x), table[nearest_token(x, model.vocabulary)]):
        return "embeddings with noise are rounded to others than the published sampler's"
    return None


def cost_per_step(few: Row, one: Row | None) -> float:
    """Milliseconds that one more network call costs, from the mean of a run of few and of one."""
    steps, milliseconds = _measured(few)
    if one is None:
        return milliseconds / steps
    return (milliseconds - _measured(one)[1]) / (steps - 1)


def derived(few: Row, one: Row | None, steps: int, system: str) -> Row:
    """The row of `steps` calls that follows from the cost of a step."""
    measured, milliseconds = _measured(few)
    cost = cost_per_step(few, one)
    milliseconds += (steps - measured) * cost
    return replace(
        few,
        implementation=named(system, steps),
        at=steps,
        median_ms=milliseconds, mean_ms=milliseconds,
        min_ms=None, p20_ms=None, p80_ms=None, p99_ms=None, samples=0, warmup=0,
        gigabytes_per_second=None, teraflops=None, floor_ms=None, fraction_of_floor=None,
        derived=f"from {few.samples} of {steps_of(measured)}: {cost:.4g} ms a step",
    )  # fmt: skip


def expected_seconds(known: Mapping[str, Row], systems: Mapping[str, str], steps: int
                     ) -> dict[str, float]:  # fmt: skip
    """Seconds that runs will take, where the case's rows so far tell.

    Args:
        known: rows by implementation.
        systems: systems by the implementation's name of the runs to come.
    """
    found = {}
    for name, system in systems.items():
        of_system = [row for key, row in known.items() if key.startswith(f"{system}, ")]
        if of_system:
            measured, milliseconds = max(map(_measured, of_system))
            found[name] = 1e-3 * milliseconds * steps / measured
    return found


def _measured(row: Row) -> tuple[int, float]:
    """Network calls and mean milliseconds of a row that was timed."""
    if row.at is None or row.mean_ms is None:
        raise ValueError(f"{row.implementation} was not timed")
    return int(row.at), row.mean_ms
