"""torch.compile and bf16 on several ranks, by the command that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import tiny_config

from dlmone_fast.config import to_toml

pytestmark = pytest.mark.loopback
ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path, ranks: int) -> dict[tuple[str, int, str], float]:
    """Every loss of a compiled run in bf16, by phase, step and name."""
    stage = {"steps": 3, "score_warmup_steps": 1, "validate_every": 10}
    config = tiny_config(
        folder / f"{ranks}-ranks", precision="bf16", compile=True, device="cpu",
        model={"dropout": 0.0}, teacher={"steps": 3, "micro_batch_size": 4, "validate_every": 10},
        distill={"stage1": stage, "stage2": stage},
    )  # fmt: skip
    file = folder / f"{ranks}.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "dlmone_fast.train", "--config", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for line in (folder / f"{ranks}-ranks" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("loss", "denoising", "score_matching", "score_distillation", "discriminator"):
            if name in record:
                found[record["phase"], record["step"], name] = record[name]
    return found


def test_compiled_bf16_losses_are_those_of_one_process(tmp_path: Path, campaign: bool):
    if not campaign:
        pytest.skip("compiles three networks twice, some minutes: --campaign")
    one, two = losses(tmp_path, 1), losses(tmp_path, 2)
    assert {phase for phase, _, _ in one} == {"teacher", "stage1", "stage2"}
    assert two.keys() == one.keys()
    for at, value in one.items():
        # bf16 keeps eight bits, and micro-batches of other sizes round elsewhere.
        assert two[at] == pytest.approx(value, rel=0.02, abs=1e-3), at
