"""A run so small that a whole phase takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlmone_fast.config import Config, merge, resolve


def tiny_config(folder: Path | str, **overrides: Any) -> Config:
    """The grammar preset, shrunk; dropout and every option that a resume must restore are on."""
    stage = {
        "steps": 4,
        "batch_size": 8,
        "micro_batch_size": 8,
        "score_warmup_steps": 2,
        "adversarial_warmup_steps": 1,
        "validate_every": 3,
        "save_every": 2,
    }
    small = {
        "output_dir": str(folder),
        "precision": "fp32",
        "log_every": 1,
        "model": {
            "embedding_dim": 16,
            "time_dim": 16,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 2,
            "ffn_size": 64,
            "dropout": 0.1,
        },
        "data": {"train_rows": 300},
        "teacher": {
            "steps": 7,
            "warmup_steps": 2,
            "batch_size": 8,
            "micro_batch_size": 64,
            "timestep_sampler": "loss-aware",
            "validate_every": 4,
            "save_every": 2,
        },
        "distill": {
            "validation_rows": 6,
            "diagnose_every": 2,
            # Unlike the grammar's exact scores it moves within a few steps.
            "selection_metric": "bleu",
            "stage1": stage,
            "stage2": {**stage, "steps": 3},
        },
    }
    return resolve("grammar", **merge(small, overrides))
