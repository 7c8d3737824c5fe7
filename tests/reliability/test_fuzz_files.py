"""Files of any content: only documented errors come out, within bounded time and memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from figures import Figure
from fuzz_targets import TARGETS, accepts, seeds
from fuzzing import has_atheris, run_plain

from dlmone_fast.errors import CheckpointError, ConfigError, ModelFileError

HERE = Path(__file__).resolve().parent
MEGABYTES = 1024
# Executions of a whole campaign, a minute or two of most; a hundredth of them otherwise.
EXECUTIONS = {
    "manifest": 130_000,
    "weights": 140_000,
    "config": 20_000,
    "generation": 200_000,
    "tokenizer": 50_000,
    "vocabulary": 130_000,
    "toml": 120_000,
    "state": 20_000,
    "optimizer": 180_000,
    "training_args": 20_000,
    "archive": 40_000,
}
LEAST = 20_000


def test_every_kind_of_file_has_its_share() -> None:
    assert EXECUTIONS.keys() == TARGETS.keys()
    assert sum(EXECUTIONS.values()) >= 1_000_000
    assert min(EXECUTIONS.values()) >= LEAST


# Python's own reader of opcodes, at text of protocol 0.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_bring_documented_errors_alone(name: str, tmp_path: Path) -> None:
    count = EXECUTIONS[name] // 100
    accepted = run_plain(TARGETS[name](tmp_path / "target"), seeds(name), name, count)
    # Mutations reach both ends: some files are still good, most are not.
    assert 0 < accepted < count


def test_a_finding_is_told_with_its_input() -> None:
    def target(data: bytes) -> bool:
        if b"NaN" in data:
            raise KeyError("missing")
        return True

    with pytest.raises(AssertionError, match=r"seed 'x', execution \d+, input b'.*NaN"):
        run_plain(target, [b"{}"], "x", 10_000)


@pytest.mark.parametrize(
    "error", [CheckpointError("here"), ConfigError("here"), ModelFileError("here" + "x" * 5000)]
)
def test_another_class_or_an_endless_message_is_a_finding(error: Exception) -> None:
    def action() -> None:
        raise error

    with pytest.raises(AssertionError, match="expected a ModelFileError that names here"):
        accepts(ModelFileError, "here", action)


def _fuzz(name: str, folder: Path) -> tuple[int, int]:
    """Executions and peak memory in MB of a fuzzer in a process of its own."""
    limits = [f"-rss_limit_mb={MEGABYTES}", "-timeout=60", "-max_len=8192", "-seed=1"]
    options = [f"-runs={EXECUTIONS[name]}", *limits, "-print_final_stats=1", "-verbosity=0"]
    if not has_atheris():
        options = ["--plain", str(EXECUTIONS[name])]
    folder.mkdir()
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzzing.py"), name, str(folder), *options],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{name}:\n{output[-6000:]}"
    executions, peak = (
        int(re.findall(rf"stat::{key}: *(\d+)", output)[-1])
        for key in ("number_of_executed_units", "peak_rss_mb")
    )
    return executions, peak


def test_a_campaign_of_fuzzing(campaign: bool, figure: Figure, tmp_path: Path) -> None:
    if not campaign:
        pytest.skip("a campaign of minutes: --campaign")
    with ThreadPoolExecutor(2) as pool:
        # The longest first.
        long = ["tokenizer", "generation", "vocabulary", "optimizer"]
        names = [*long, *sorted(TARGETS.keys() - set(long))]
        results = list(pool.map(lambda name: _fuzz(name, tmp_path / name), names))
    executions, peak = sum(count for count, _ in results), max(rss for _, rss in results)
    least = min(count for count, _ in results)
    assert executions >= 1_000_000
    assert least >= LEAST
    assert peak < MEGABYTES
    how = "atheris" if has_atheris() else "random mutation, atheris is not installed"
    figure(
        "R14", f"{len(results)} kinds of files, {how}",
        f"≥ 1,000,000 executions, ≥ {LEAST:,} of each kind, documented errors alone, memory < 1 GB",
        f"{executions:,} executions, at least {least:,} of a kind, 0 findings, at most {peak:,} MB",
    )  # fmt: skip
