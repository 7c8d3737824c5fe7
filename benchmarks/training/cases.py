"""The training steps that are timed: sizes, recipes, floors and data.

Recipes are the presets', in one micro-batch and without dropout: torch.compile draws other dropout
than eager PyTorch, so that only updates without it can be held against one another. What dropout
costs is timed in cases of its own. Networks are random, a function of the run's seed.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.generate.cases import BERT_BASE, COMPACT, prompts, tokenizer
from benchmarks.harness.floors import Work
from dlmone_fast.config import Config
from dlmone_fast.config.presets import PRESETS
from dlmone_fast.training import plan
from dlmone_fast.training.ranks import Ranks
from dlmone_fast.training.workspace import Workspace, open_workspace

TEACHER, SCORE, GENERATOR = "teacher step", "score estimator step", "generator step"
STEPS = (TEACHER, SCORE, GENERATOR)

_FP32_BYTES = 4
_ROWS = {"train": 512, "valid": 8}
_SIZES = {
    "compact": replace(PRESETS["qqp-small"], model=COMPACT),
    "BERT-base": replace(PRESETS["qqp"], model=replace(BERT_BASE, normalize_embedding=False)),
}
_PRESET_DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """One update of each network on `batch` rows.

    Attributes:
        model: the name of the sizes.
        recipe: sizes, losses, optimisers.
        precision: of forward passes, "fp32" or "bf16".
        dropout: while networks are trained.
    """

    model: str
    recipe: Config
    batch: int
    precision: str = "fp32"
    dropout: float = 0.0

    def __str__(self) -> str:
        more = [] if self.precision == "fp32" else [self.precision]
        more += [f"dropout {self.dropout:g}"] if self.dropout else []
        return ", ".join([self.model, f"batch {self.batch}", *more])

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def dimensions(self) -> str:
        model = self.recipe.model
        return f"{self.batch}×{model.seq_len}, {model.num_layers} layers of {model.hidden_size}"

    def config(self) -> Config:
        """The recipe at this batch; the adversarial term counts from the first update of θ on."""
        recipe, rows = self.recipe, self.batch
        stage = replace(
            recipe.distill.stage1, batch_size=rows, micro_batch_size=rows,
            adversarial_warmup_steps=0,
        )  # fmt: skip
        return replace(
            recipe,
            precision=self.precision,
            model=replace(recipe.model, dropout=self.dropout),
            teacher=replace(recipe.teacher, batch_size=rows, micro_batch_size=rows),
            distill=replace(recipe.distill, stage1=stage),
        )


@dataclass(frozen=True)
class Update:
    """One of the three steps of a case."""

    step: str
    case: Case

    def __str__(self) -> str:
        return f"{self.step}, {self.case}"

    @property
    def operation(self) -> str:
        return f"training: {self.step}"


def _updates(model: str, batches: tuple[int, ...], precision: str = "fp32",
             dropout: float = 0.0, steps: tuple[str, ...] = STEPS) -> list[Update]:  # fmt: skip
    cases = [Case(model, _SIZES[model], batch, precision, dropout) for batch in batches]
    return [Update(step, case) for case in cases for step in steps]


_GPU_BATCHES = (8, 16, 32, 64, 128)

DEFAULT: dict[str, list[Update]] = {
    "cpu": _updates("compact", (8,)) + _updates("compact", (32,), steps=(TEACHER,)),
    "cuda": [
        *_updates("BERT-base", _GPU_BATCHES, "bf16"),
        *_updates("BERT-base", _GPU_BATCHES),
        *_updates("compact", (64,), "bf16"),
        *_updates("BERT-base", (64,), "bf16", _PRESET_DROPOUT),
    ],
}
FULL: dict[str, list[Update]] = {
    "cpu": [
        *_updates("compact", (32,), steps=(SCORE, GENERATOR)),
        *_updates("compact", (128,)),
        *_updates("compact", (8,), dropout=_PRESET_DROPOUT),
        *_updates("BERT-base", (8,)),
    ],
    "cuda": [],
}


def work(update: Update) -> Work:
    """The products of the networks, and the weights that the step uses, read once.

    `training.plan` counts: forward passes and what backward passes need. It takes the teacher's
    decoder on every position, where the step leaves out the source's: for the compact model that
    is at most 8 % of the products. Optimisers, moving averages and activations are left out.
    """
    config = update.case.config()
    counted, stage = plan.count(config), config.distill.stage1
    score = counted.backbone + counted.head
    flops, weights = {
        TEACHER: (plan.teacher_step_flops(config), counted.model),
        SCORE: (plan.score_step_flops(config.model, stage), counted.backbone + score),
        GENERATOR: (plan.generator_step_flops(config.model, stage), 2 * counted.backbone + score),
    }[update.step]
    return Work(_FP32_BYTES * weights, flops, update.case.precision)


def recipe(model: str) -> Config:
    """The recipe of a size by its name."""
    return _SIZES[model]


def workspace(
    case: Case, device: torch.device, compiled: bool, folder: Path, ranks: Ranks | None = None
) -> Workspace:
    """A run folder under `folder` with question pairs in the place of a corpus."""
    ranks = ranks or Ranks()
    name = f"{case.model} {case.batch} {case.dropout:g}".replace(" ", "-")
    data = folder / "training-data"
    with ranks.in_turn():
        if not data.exists():
            _write_pairs(data)
    config = replace(
        case.config(),
        device=device.type,
        compile=compiled,
        data_dir=str(data),
        output_dir=str(folder / name),
    )
    return open_workspace(config, tokenizer(config.model.vocab_size), ranks=ranks)


def _write_pairs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, count in _ROWS.items():
        texts = prompts(count + 1)
        pairs = [{"src": a, "trg": b} for a, b in itertools.pairwise(texts)]
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
