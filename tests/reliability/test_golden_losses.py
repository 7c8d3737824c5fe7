"""Losses of 50 steps of every network against the recorded ones.

Record them again, after a change that is meant to change the numbers, with
`python -m pytest tests/reliability/test_golden_losses.py --record-golden`, and say in the commit
what changed them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from pathlib import Path

import pytest
import torch
from figures import Figure
from tiny_training import tiny_config
from trainings import PHASES, curve_of, start_command, write_config

from dlmone_fast.config import Config
from dlmone_fast.training import run

Losses = dict[str, dict[str, list[float]]]

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 50
NAMES = {
    "teacher": ("loss",),
    "stage1": ("score_matching", "discriminator", "sid", "adversarial"),
    "stage2": ("score_matching", "discriminator", "sid", "adversarial"),
}
TOLERANCE = 1e-5


def golden_config(folder: Path) -> Config:
    """50 steps a phase. No dropout: its random numbers are those of torch's build."""
    warmup = 5
    stage = {
        "steps": STEPS - warmup, "score_warmup_steps": warmup, "adversarial_warmup_steps": 5,
        "validate_every": STEPS, "save_every": STEPS,
    }  # fmt: skip
    return tiny_config(
        folder,
        model={"dropout": 0.0},
        teacher={"steps": STEPS, "validate_every": STEPS, "save_every": STEPS},
        distill={"stage1": stage, "stage2": stage},
    )


def losses_of(root: Path) -> Losses:
    """The loss curves of a finished run."""
    curve = curve_of(root)
    found: Losses = {}
    for phase, names in NAMES.items():
        for name in names:
            values = [curve[PHASES.index(phase), s + 1].get(name) for s in range(STEPS)]
            # θ is trained after ψ's warm-up.
            found.setdefault(phase, {})[name] = [value for value in values if value is not None]
    return found


def processor() -> str:
    """The CPU's name: the same instructions are summed in another order on another one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def build() -> dict[str, str]:
    """What the last bits of a sum depend on; the number of threads is one here."""
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
    }


def compare(found: Losses, exactly: bool) -> tuple[int, float]:
    """Hold losses against the recorded ones; how many, and the largest relative difference."""
    expected: Losses = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    worst, count = 0.0, 0
    for phase, names in NAMES.items():
        for name in names:
            pairs = zip(found[phase][name], expected[phase][name], strict=True)
            for step, (a, b) in enumerate(pairs):
                assert a == b or not exactly, (phase, name, step, a, b)
                assert math.isclose(a, b, rel_tol=TOLERANCE), (phase, name, step, a, b)
                worst, count = max(worst, abs(a - b) / max(abs(b), 1e-30)), count + 1
    return count, worst


def test_the_losses_are_the_recorded_ones(
    tmp_path: Path, figure: Figure, request: pytest.FixtureRequest
) -> None:
    losses = losses_of(run(golden_config(tmp_path / "run")).root)
    if request.config.getoption("record_golden"):
        write(losses)
    same_build = json.loads(GOLDEN.read_text(encoding="utf-8"))["build"] == build()
    count, worst = compare(losses, exactly=same_build)
    how = "bit-identical on the recorded build" if same_build else f"at most {worst:.1g} relative"
    figure(
        "R8",
        f"losses of {STEPS} steps of teacher, stage 1, stage 2",
        "equal at the recorded torch and CPU, ≤ 1e-5 relative elsewhere",
        f"{count} losses {how} ({', '.join(build().values())})",
    )


@pytest.mark.parametrize(
    "instructions",
    [
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    ],
)
def test_other_instructions_give_the_same_losses_up_to_rounding(
    tmp_path: Path, campaign: bool, figure: Figure, instructions: dict[str, str]
) -> None:
    if not campaign:
        pytest.skip("is a part of the campaign alone")
    config = golden_config(tmp_path / "run")
    evaluation = dataclasses.replace(config.evaluation, rows=4, teacher_steps="")
    file = write_config(dataclasses.replace(config, evaluation=evaluation), tmp_path / "c.toml")
    training = start_command(file, tmp_path / "log", tmp_path, **instructions)
    assert training.wait() == 0, (tmp_path / "log").read_text()
    count, worst = compare(losses_of(tmp_path / "run"), exactly=False)
    figure(
        "R8",
        f"the same on a CPU as {' '.join(f'{k}={v}' for k, v in instructions.items())}",
        "≤ 1e-5 relative",
        f"{count} losses, at most {worst:.1g} relative",
    )


def write(losses: Losses) -> None:
    """The file, a line a curve."""
    curves = ",\n".join(
        f"  {json.dumps(phase)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(values)}" for name, values in of.items())
        + "\n  }"
        for phase, of in losses.items()
    )
    text = f'{{\n "build": {json.dumps(build())},\n "losses": {{\n{curves}\n }}\n}}\n'
    GOLDEN.write_text(text, encoding="utf-8")


def test_the_recorded_losses_say_something() -> None:
    golden: Losses = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    assert {phase: tuple(of) for phase, of in golden.items()} == NAMES
    for phase, of in golden.items():
        for name, values in of.items():
            assert len(values) >= STEPS - 10, (phase, name)
            assert len(set(values)) > 0.7 * len(values), (phase, name)
    assert sum(golden["teacher"]["loss"][-10:]) < sum(golden["teacher"]["loss"][:10])
