"""The tables of docs/small-models.md: short teacher runs that differ in one ingredient.

    python -m benchmarks.ablation grammar --seeds 1 2
    python -m benchmarks.ablation qqp --data-dir QQP [--only "batch 32"]

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
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.runtime import load_model
from dlmone_fast.training import train_teacher

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score every case; the exit code."""
    options = _parser().parse_args(arguments)
    cases = GRAMMAR_CASES if options.task == "grammar" else QQP_CASES
    for seed in options.seeds:
        for name in options.only or cases:
            root = Path(options.output_dir) / f"{options.task}-{name.replace(' ', '-')}-{seed}"
            config = _config(options, cases[name], root, seed)
            teacher = train_teacher(config)
            scores = (_grammar if options.task == "grammar" else _qqp)(teacher, config)
            print(json.dumps({"case": name, "seed": seed, **scores}), flush=True)
    return 0


def _config(options: argparse.Namespace, case: Overrides, root: Path, seed: int) -> Config:
    run = {"output_dir": str(root), "data_dir": options.data_dir, "seed": seed}
    if options.task == "qqp":
        return resolve("qqp-small", **merge(_QQP, case, run))
    steps = {"teacher": {"steps": _GRAMMAR_STEPS, "validate_every": _GRAMMAR_STEPS}}
    return resolve("grammar", **merge(steps, case, run))


def _grammar(folder: Path, config: Config) -> dict[str, float]:
    teacher = load_model(folder, "cpu", "fp32", backend="eager")
    rows = load_rows(Path(config.output_dir) / "data", "test", limit=256)
    measuring = Measuring(
        rows, GRAMMAR, teacher.normalize_text, seed=7, batch_size=64, bootstrap=0
    )  # fmt: skip
    return {
        f"{sampler} {calls}": measuring.scores(teacher, calls, sampler, len(rows), 2)["joint"]
        for calls, sampler in _SAMPLED
    }


def _qqp(folder: Path, config: Config) -> dict[str, float]:
    teacher = load_model(folder, "cpu", "fp32", backend="eager")
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
    add("task", choices=("grammar", "qqp"))
    add("--data-dir", default="", help="folder with QQP's {train,valid,test}.jsonl[.gz]")
    add("--output-dir", default="runs/ablation", help="a folder for the runs (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--only", nargs="+", choices=sorted({*GRAMMAR_CASES, *QQP_CASES}), help="these cases")
    return parser


if __name__ == "__main__":
    run_command(main)
