"""Short runs that differ in one ingredient: the tables of docs/small-models.md.

    python -m benchmarks.ablation grammar --seeds 1 2
    python -m benchmarks.ablation qqp --data-dir QQP [--only "batch 32"]
    python -m benchmarks.ablation student --seeds 1 2

`grammar` and `qqp` vary a teacher, `student` the distillation of one teacher a seed on the grammar.

One JSON line a run. The published figures are those of one CPU thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmone_fast.cli import run_command
from dlmone_fast.comparison.measure import Measuring
from dlmone_fast.comparison.quality import GRAMMAR
from dlmone_fast.config import Config, merge, resolve
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.runtime import load_model
from dlmone_fast.training import distill, train_teacher

Overrides = Mapping[str, Any]

LOG_SNR: Overrides = {"teacher": {"timestep_sampler": "log-snr"}}
SELF_CONDITIONING: Overrides = {"model": {"self_conditioning": True}}
FIXED_PLACE: Overrides = {"model": {"source_positions": 24}}
BOTH_DIRECTIONS: Overrides = {"data": {"both_directions": True}}
PAD_WEIGHT: Overrides = {"teacher": {"pad_weight": 0.1}}

_GRAMMAR_STEPS = 200
GRAMMAR_CASES: dict[str, Overrides] = {
    "preset": {},
    "log-SNR": LOG_SNR,
    "self-conditioning": SELF_CONDITIONING,
    "condition dropout 0.1": {"teacher": {"condition_dropout": 0.1}},
    "EMA 0.995": {"teacher": {"ema_decay": 0.995}},
    "EMA 0.995, warm-up": {"teacher": {"ema_decay": 0.995, "ema_warmup": True}},
}
# Calls and sampler of the teacher.
_SAMPLED = ((1, "ddim"), (5, "ddim"), (20, "ddim"), (5, "q-sampling"))

_QQP_ROWS, _QQP_SCORED = 51_200, 400
_QQP: Overrides = {
    "precision": "fp32",
    "model": {
        "seq_len": 48, "max_positions": 48, "source_positions": 0, "hidden_size": 192,
        "num_layers": 4, "num_heads": 6, "ffn_size": 768, "embedding_dim": 64, "time_dim": 64,
        "noise_scale": 1.5, "dropout": 0.0,
    },
    "data": {"vocab_size": 4000, "both_directions": False},
    "teacher": {"timestep_sampler": "uniform", "ema_decay": 0.99, "ema_warmup": False},
}  # fmt: skip


def _batch(rows: int, learning_rate: float, warmup: int) -> Overrides:
    steps = _QQP_ROWS // rows
    return {
        "teacher": {
            "batch_size": rows, "micro_batch_size": rows, "steps": steps,
            "learning_rate": learning_rate, "warmup_steps": warmup,
            "validate_every": steps, "save_every": steps // 2,
        }
    }  # fmt: skip


_SMALL = _batch(32, 8e-4, 150)
_BEST = merge(_SMALL, LOG_SNR, FIXED_PLACE)
QQP_CASES: dict[str, Overrides] = {
    "batch 128": _batch(128, 1.5e-3, 80),
    "batch 64": _batch(64, 1e-3, 120),
    "batch 32": _SMALL,
    "batch 32, self-conditioning": merge(_SMALL, SELF_CONDITIONING),
    "batch 32, log-SNR": merge(_SMALL, LOG_SNR),
    "batch 32, fixed place": merge(_SMALL, FIXED_PLACE),
    "batch 32, log-SNR, fixed place": _BEST,
    "batch 32, log-SNR, fixed place, both directions": merge(_BEST, BOTH_DIRECTIONS),
    "batch 32, log-SNR, fixed place, pad weight 0.1": merge(_BEST, PAD_WEIGHT),
}

# The warm start of docs/distillation.md: θ first learns the teacher's endpoints of its own noise.
WARM_START: Overrides = {
    "distill": {
        "pairs": {"count": 8192, "per_source": 2, "steps": 10, "sampler": "dpm-solver++"},
        "stage1": {"anchor_steps": 400, "anchor_weight": 0.1, "anchor_decay_steps": 90},
    }
}
FEW_STEPS: Overrides = {"distill": {"stage1": {"few_steps": 4}, "stage2": {"few_steps": 4}}}
STUDENT_CASES: dict[str, Overrides] = {
    "preset": {},
    "warm start": WARM_START,
    "few steps": FEW_STEPS,
    "warm start, few steps": merge(WARM_START, FEW_STEPS),
}
_STUDENT_CALLS = (1, 2, 4)

CASES: dict[str, dict[str, Overrides]] = {
    "grammar": GRAMMAR_CASES, "qqp": QQP_CASES, "student": STUDENT_CASES,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score every case; the exit code."""
    options = _parser().parse_args(arguments)
    measure = {"grammar": _grammar, "qqp": _qqp, "student": _student}[options.task]
    cases = CASES[options.task]
    names = options.only or list(cases)
    if not cases.keys() >= set(names):
        raise UsageError(f"--only: expected cases of {options.task}: {', '.join(cases)}")
    for seed in options.seeds:
        for name in names:
            root = Path(options.output_dir) / f"{options.task}-{name.replace(' ', '-')}-{seed}"
            config = _config(options, cases[name], root, seed)
            print(json.dumps({"case": name, "seed": seed, **measure(config)}), flush=True)
    return 0


def _config(options: argparse.Namespace, case: Overrides, root: Path, seed: int) -> Config:
    run = {"output_dir": str(root), "seed": seed}
    if options.task == "qqp":
        return resolve("qqp-small", **merge(_QQP, case, {**run, "data_dir": options.data_dir}))
    if options.task == "student":
        return resolve("grammar", **merge(case, run))
    steps = {"teacher": {"steps": _GRAMMAR_STEPS, "validate_every": _GRAMMAR_STEPS}}
    return resolve("grammar", **merge(steps, case, run))


def _grammar(config: Config) -> dict[str, float]:
    return _joint(train_teacher(config), config, _SAMPLED)


def _student(config: Config) -> dict[str, float]:
    """A student of the seed's one teacher, which the first case trains."""
    folder = Path(config.output_dir).parent / f"student-teacher-{config.seed}"
    teacher = train_teacher(resolve("grammar", output_dir=str(folder), seed=config.seed))
    student = distill(config, teacher)
    calls: list[tuple[int, str | None]] = [(count, None) for count in _STUDENT_CALLS]
    return _joint(student, config, calls)


def _joint(
    folder: Path, config: Config, calls: Sequence[tuple[int, str | None]]
) -> dict[str, float]:
    model = load_model(folder, "cpu", "fp32", backend="eager")
    rows = load_rows(Path(config.output_dir) / "data", "test", limit=256)
    measuring = Measuring(rows, GRAMMAR, model.normalize_text, seed=7, batch_size=64, bootstrap=0)
    return {
        f"{sampler or 'calls'} {count}": measuring.scores(model, count, sampler, 256, 2)["joint"]
        for count, sampler in calls
    }


def _qqp(config: Config) -> dict[str, float]:
    teacher = load_model(train_teacher(config), "cpu", "fp32", backend="eager")
    found = evaluate_model(
        teacher, config.data_dir, split="valid", max_rows=_QQP_SCORED, steps=20, sampler="ddim"
    )
    return {name: found[name] for name in ("bleu", "source_bleu", "rouge_l", "length_ratio")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("task", choices=sorted(CASES))
    add("--data-dir", default="", help="folder with QQP's {train,valid,test}.jsonl[.gz]")
    add("--output-dir", default="runs/ablation", help="a folder for the runs (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--only", nargs="+", help="these cases of the task (default: all)")
    return parser


if __name__ == "__main__":
    run_command(main)
