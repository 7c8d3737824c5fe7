"""Costs of distilling at the paper's sizes on 1 to 64 GPUs: calculated, not measured.

Seconds of an update on N GPUs, each with 1/N of the batch:

    FLOPs / (N · S) + 2 · (N - 1) / N · bytes / W + calls · L

S is the rate of a GPU in training, W a GPU's bandwidth in a ring, L what a collective costs however
small. Nothing overlaps: PyTorch sends a bucket while it computes the next, so that this is an upper
bound of the exchange. A GPU with a few rows does not reach S, which is not in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dlmone_fast.config import Config
from dlmone_fast.config.presets import PRESETS
from dlmone_fast.training import plan

GPUS = (1, 2, 4, 8, 16, 32, 64)
TASKS = {"qqp": (1, 2), "quasar-t": (1, 2), "wiki-auto": (1,)}
"""Table 5: the presets, and the stages that the paper gives settings for."""

_FP32 = 4
_A_NODE = 8


@dataclass(frozen=True)
class Machine:
    """Assumptions.

    Attributes:
        flops: S, FLOP/s of a GPU in training.
        inside, between: W in bytes/s, of up to 8 GPUs of a node and of more.
        latency: L, seconds.
    """

    flops: float = 200e12
    inside: float = 200e9
    between: float = 40e9
    latency: float = 50e-6

    def seconds(self, work: Work, gpus: int) -> float:
        """Seconds of one update on `gpus` GPUs."""
        if gpus == 1:
            return work.flops / self.flops
        bandwidth = self.inside if gpus <= _A_NODE else self.between
        sent = 2 * (gpus - 1) / gpus * work.sent
        return work.flops / (gpus * self.flops) + sent / bandwidth + work.calls * self.latency


@dataclass(frozen=True)
class Work:
    """FLOPs of one update of a phase, bytes of its gradients, and how many collectives it makes."""

    phase: str
    updates: int
    rows: int
    flops: int
    sent: int
    calls: int


# Gradients go in buckets of 25 MB; an update also sums losses, counts and verdicts.
_BUCKET = 25 * 2**20
_SUMS = 4


def works(task: str) -> Iterator[Work]:
    """The phases of a preset whose vocabulary is BERT's: the teacher, then its stages."""
    config = _sized(PRESETS[task])
    counted = plan.count(config)
    teacher = config.teacher
    yield _work("teacher", teacher.steps, teacher.batch_size, plan.teacher_step_flops(config),
                [counted.model])  # fmt: skip
    for number in TASKS[task]:
        stage = (config.distill.stage1, config.distill.stage2)[number - 1]
        flops = plan.score_step_flops(config.model, stage)
        flops += plan.generator_step_flops(config.model, stage)
        networks = [counted.backbone + counted.head, counted.backbone]
        yield _work(f"stage {number}", stage.steps, stage.batch_size, flops, networks)


def _sized(config: Config) -> Config:
    size = config.model.vocab_size or _BERT_TOKENS
    return replace(config, model=replace(config.model, vocab_size=size))


_BERT_TOKENS = 30_522


def _work(phase: str, updates: int, rows: int, flops: int, networks: list[int]) -> Work:
    sizes = [_FP32 * parameters for parameters in networks]
    calls = sum(-(-size // _BUCKET) + _SUMS for size in sizes)
    return Work(phase, updates, rows, flops, sum(sizes), calls)
