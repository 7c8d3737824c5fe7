"""The same run twice is the same run, byte by byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from figures import Figure
from trainings import (
    TrainingServer,
    curve_of,
    everything_on,
    quality_of,
    start_command,
    write_config,
)

# Files with times or process ids. What else the first two hold is compared by itself.
WITH_TIMES = ("metrics.jsonl", "comparison.json", ".lock", "tensorboard")


def test_another_process_makes_the_same_run(
    uninterrupted: Path, tmp_path: Path, figure: Figure
) -> None:
    config = write_config(everything_on("run"), tmp_path / "config.toml")
    # Sets of strings come in another order than in the server's process.
    training = start_command(config, tmp_path / "log", tmp_path, PYTHONHASHSEED="7")
    assert training.wait() == 0, (tmp_path / "log").read_text()
    files, curve = hashes(uninterrupted), curve_of(uninterrupted)
    assert hashes(tmp_path / "run") == files
    assert curve_of(tmp_path / "run") == curve
    assert quality_of(tmp_path / "run") == quality_of(uninterrupted)
    figure(
        "R7",
        "a whole run twice with one seed, in two processes",
        "bit-identical",
        f"{len(files)} files and {sum(map(len, curve.values()))} recorded values identical to the "
        "byte; there are no data-loader workers",
    )


@pytest.mark.parametrize(
    "override",
    [
        {"seed": 1, "model": {"self_conditioning": False}},
        {"seed": 2, "teacher": {"timestep_sampler": "log-snr"}},
        {"seed": 3, "precision": "bf16"},
        {"seed": 4, "data": {"task": "grammar-templates"}},
    ],
    ids=lambda override: f"seed {override['seed']}",
)
def test_other_configurations_repeat_too(
    server: TrainingServer, tmp_path: Path, campaign: bool, figure: Figure, override: dict[str, Any]
) -> None:
    if not campaign:
        pytest.skip("is a part of the campaign alone")
    found = []
    for name in "ab":
        config = write_config(everything_on("run", **override), tmp_path / name / "config.toml")
        assert server.run(config, tmp_path / name / "log") == 0
        found.append((hashes(tmp_path / name / "run"), curve_of(tmp_path / name / "run")))
    assert found[0] == found[1]
    changed = ", ".join(f"{key} {value}" for key, value in override.items())
    figure("R7", f"twice with {changed}", "bit-identical", f"{len(found[0][0])} files identical")


def hashes(root: Path) -> dict[str, str]:
    """Of what a run leaves. Its folder must have one name: config.toml holds it."""
    found = {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part in WITH_TIMES for part in path.relative_to(root).parts)
    }
    assert len([name for name in found if name.endswith(".safetensors")]) > 20
    return found
