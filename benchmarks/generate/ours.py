"""This package's own whole calls: one for each backend and precision that can run here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.generate import targets as names
from benchmarks.generate.cases import TUNED_BATCHES, Inputs, Model, inputs, noised
from benchmarks.generate.peers import NO_BF16, cpu_has_bf16
from benchmarks.harness.timing import Call
from dlmone_fast.data.batches import source_batch
from dlmone_fast.kernels.nearest_token import nearest_token, nearest_token_with_margin
from dlmone_fast.runtime import GenerationOutput, Generator
from dlmone_fast.runtime.engines import EngineRequest, why_unavailable

# Those that "auto" takes first come first.
_TRIED = {
    "cpu": (
        ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"), ("compile", "fp32"),
        ("eager", "fp32"), ("eager", "bf16"),
    ),
    "cuda": (
        ("graph", "bf16"), ("graph", "fp16"), ("graph", "fp32"), ("compile", "bf16"),
        ("eager", "bf16"), ("eager", "fp32"),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Own:
    """A model on one backend in one precision, loaded at its first call."""

    model: Model
    backend: str
    precision: str

    @property
    def name(self) -> str:
        return names.whole(self.backend, self.precision)

    @property
    def absent(self) -> str:
        """The reason why it cannot run here; "": it can, or its first call tells."""
        on_cpu = self.model.device.type == "cpu"
        if on_cpu and self.precision == "bf16" and not cpu_has_bf16():
            return NO_BF16
        given = inputs(self.model, 1)
        request = EngineRequest(self.model.denoiser, self.precision, lambda: (given.x_t, given.t))
        return why_unavailable(self.backend, request) or ""

    @property
    def batches(self) -> tuple[int, ...]:
        """The sizes that it is timed at; empty: all."""
        tuned = self.backend == "compile" and self.model.device.type == "cuda"
        return TUNED_BATCHES if tuned else ()

    @functools.cached_property
    def generator(self) -> Generator:
        """The loaded model.

        Raises:
            BackendUnavailableError: the backend cannot run it here.
        """
        model = self.model
        return Generator(
            model.denoiser, model.tokenizer, model.settings, self.precision, backend=self.backend,
            calibration=model.calibration() if self.precision == "int8" else None,
        )  # fmt: skip

    def __call__(self, batch: Sequence[str]) -> GenerationOutput:
        """Text in, text out, in one network batch; prompt i has the seed i."""
        return self.generator.generate(
            batch, seed=list(range(len(batch))), batch_size=len(batch), on_overflow="truncate",
            return_dict=True,
        )  # fmt: skip

    def network(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂0 [B, L, d] by the same engine."""
        with torch.inference_mode(), self.generator._executor.pool.runner() as runner:
            return runner.predict(x_t, t)


def owns(model: Model) -> list[Own]:
    """Ours to try on the model's device, the one that "auto" prefers first.

    Loaded once a session for a number of threads, which engines take when they are made.
    """
    return _owns(model, torch.get_num_threads())


@functools.lru_cache(maxsize=3)
def _owns(model: Model, threads: int) -> list[Own]:
    return [Own(model, *choice) for choice in _TRIED[model.device.type]]


def phases(
    model: Model, given: Inputs, x0: Tensor, ids: Sequence[Sequence[int]]
) -> dict[str, Call]:
    """The parts of a call besides its network, each by itself.

    Args:
        given: the network's inputs of the model's first prompts.
        x0: its outputs [B, L, d].
        ids: the target ids of the answers.
    """
    batch, tokenizer, device = model.texts(len(ids)), model.tokenizer, model.device
    rounding = nearest_token if len(batch) == 1 else nearest_token_with_margin
    target = given.mask.to(device) != 0

    def tokenise() -> object:
        encoded, sizes = tokenizer.encode(batch), model.denoiser.config
        limit = model.settings.max_source_tokens
        return source_batch(
            encoded, sizes.seq_len, tokenizer, limit, "truncate", sizes.source_positions
        )

    def noise_and_embed() -> Tensor:
        return noised(model, given.ids.to(device), given.mask.to(device), given.draws)

    return {
        "tokenising": tokenise,
        "noise and embedding": _inference(noise_and_embed),
        "rounding": _inference(lambda: rounding(x0[target], model.vocabulary)),
        "detokenising": lambda: [tokenizer.decode_clean(row) for row in ids],
    }


def _inference(call: Callable[[], object]) -> Call:
    def run() -> object:
        with torch.inference_mode():
            return call()

    return run
