"""NaN and Infinity put into losses, gradients and weights of every network that is trained."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Figure
from torch import Tensor, nn
from trainings import copy_up_to, everything_on

from dlmone_fast.errors import DivergedError
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint
from dlmone_fast.models.denoiser import load_teacher
from dlmone_fast.models.tensors import finite_problems
from dlmone_fast.training import run
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.pairs_phase import load_pairs
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.workspace import open_workspace

Phase = Any
Injection = Callable[[Phase, float, random.Random], AbstractContextManager[None]]

SEED = 60
VALUES = (math.nan, math.inf, -math.inf)
KINDS = ("loss", "gradient", "weights")
# The step of a stage from which θ, and not its anchor alone, is trained.
STEP = 9


@dataclass(frozen=True)
class Network:
    """A network under training: its module, and the function that computes its loss."""

    name: str
    phase: str
    module: Callable[[Phase], nn.Module]
    losses: Callable[[Phase], tuple[Any, str]]
    with_value: Callable[[Any, float], Any]
    state: tuple[str, ...]
    """Groups of the checkpoint that belong to it."""


NETWORKS = (
    Network(
        "teacher", "teacher", lambda p: p.lm, lambda p: (p, "terms"),
        lambda terms, value: {**terms, "loss": terms["loss"] + value},
        ("model", "optimizer", "ema", "timesteps"),
    ),
    Network(
        "score estimator", "stage1", lambda p: p.stage.score,
        lambda p: (p.stage, "_score_losses"),
        lambda losses, value: (losses[0] + value, losses[1]),
        ("score", "score_optimizer"),
    ),
    Network(
        "generator", "stage1", lambda p: p.stage.generator,
        lambda p: (p.stage, "_generator_losses"),
        lambda terms, value: dataclasses.replace(terms, sid=terms.sid + value),
        ("generator", "generator_optimizer", "ema", "best"),
    ),
)  # fmt: skip


def in_loss(network: Network) -> Injection:
    """The loss is not finite, its gradient is."""

    @contextmanager
    def inject(phase: Phase, value: float, rng: random.Random) -> Iterator[None]:
        owner, name = network.losses(phase)
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments: network.with_value(original(*arguments), value))
        try:
            yield
        finally:
            delattr(owner, name)

    return inject


def in_gradient(network: Network) -> Injection:
    """One element of one parameter's gradient."""

    @contextmanager
    def inject(phase: Phase, value: float, rng: random.Random) -> Iterator[None]:
        parameter = rng.choice(trained(phase, network))
        place = torch.tensor([rng.randrange(parameter.numel())])

        def hook(gradient: Tensor) -> Tensor:
            return gradient.flatten().index_fill(0, place, value).view_as(gradient)

        frozen = not parameter.requires_grad
        handle = parameter.requires_grad_(True).register_hook(hook)
        parameter.requires_grad_(not frozen)
        try:
            yield
        finally:
            handle.remove()

    return inject


def in_weights(network: Network) -> Injection:
    """One weight, of the trained ones or not."""

    @contextmanager
    def inject(phase: Phase, value: float, rng: random.Random) -> Iterator[None]:
        parameter = rng.choice(list(network.module(phase).parameters()))
        place = rng.randrange(parameter.numel())
        good = parameter.data.view(-1)[place].clone()
        parameter.data.view(-1)[place] = value
        try:
            yield
        finally:
            parameter.data.view(-1)[place] = good

    return inject


INJECTIONS = {"loss": in_loss, "gradient": in_gradient, "weights": in_weights}


def trained(phase: Phase, network: Network) -> list[nn.Parameter]:
    """The parameters that have had a gradient."""
    stage = phase if network.phase == "teacher" else phase.stage
    optimizer = {
        "teacher": "optimizer", "score estimator": "score_optimizer",
        "generator": "generator_optimizer",
    }[network.name]  # fmt: skip
    return list(getattr(stage, optimizer).state)


def snapshot(phase: Phase) -> dict[str, Tensor]:
    tensors, _ = phase.state()
    return {f"{group}/{name}": v.clone() for group, of in tensors.items() for name, v in of.items()}


@pytest.fixture(scope="module")
def phases(
    uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TeacherPhase | DistillPhase]:
    """Both kinds of phase, some steps on, with pairs, few steps and every other option."""
    root = copy_up_to("stage1", uninterrupted, tmp_path_factory.mktemp("phases") / "run")
    workspace = open_workspace(everything_on(root, max_bad_steps=1_000_000))
    denoiser = load_teacher(root / "teacher")
    pairs, _ = load_pairs(workspace)
    teacher = TeacherPhase(workspace, {})
    stage = DistillPhase(workspace, 1, denoiser, denoiser.lm.backbone, {}, pairs)
    for step in range(STEP):
        teacher.update(step)
        stage.update(step)
    return {"teacher": teacher, "stage1": stage}


def test_no_bad_value_changes_a_parameter(
    phases: dict[str, Any], campaign: bool, figure: Figure
) -> None:
    rng, count, step = random.Random(SEED), 0, dict.fromkeys(phases, STEP)
    for _ in range(20 if campaign else 1):
        for network in NETWORKS:
            for kind in KINDS:
                for value in VALUES:
                    phase = phases[network.phase]
                    before, skipped = snapshot(phase), phase.state()[1]["skipped"]
                    with INJECTIONS[kind](network)(phase, value, rng):
                        phase.update(step[network.phase])
                    case = (SEED, count, network.name, kind, value)
                    changed = changes(before, snapshot(phase))
                    if kind != "weights":
                        # The step of the other network is its own, and a good one.
                        changed = {name for name in changed if name in network.state}
                    assert changed <= {"accuracy"}, case
                    now = phase.state()[1]["skipped"]
                    assert now > skipped, case
                    # And goes on as if nothing had been.
                    phase.update(step[network.phase] + 1)
                    assert phase.state()[1]["skipped"] == now, case
                    assert all(not finite_problems(of) for of in phase.state()[0].values()), case
                    step[network.phase] += 2
                    count += 1
    figure(
        "R6",
        "NaN, +Inf, -Inf in loss, gradient, weights × teacher, score estimator, generator",
        "0 parameters changed by a bad step",
        f"{count} injections, 0 parameters, moments or averages changed, training goes on",
    )


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Groups of a checkpoint that are not what they were."""
    return {name.split("/")[0] for name in after if not torch.equal(before[name], after[name])}


def test_a_bad_weight_of_the_frozen_teacher_trains_nobody(
    phases: dict[str, Any], campaign: bool, figure: Figure
) -> None:
    frozen = dataclasses.replace(NETWORKS[2], module=lambda phase: phase.stage.teacher)
    rng, phase, count = random.Random(SEED), phases["stage1"], 30 if campaign else 3
    for number in range(count):
        before = snapshot(phase)
        with in_weights(frozen)(phase, VALUES[number % 3], rng):
            phase.update(100 + number)
        assert changes(before, snapshot(phase)) <= {"accuracy"}, (SEED, number)
    figure(
        "R6",
        "NaN and Inf in weights of the frozen teacher while its student is trained",
        "0 parameters changed by a bad step",
        f"{count} injections, 0 parameters changed",
    )


CASES = [(network, kind) for network in NETWORKS for kind in KINDS]


@pytest.mark.parametrize("persists", [False, True])
def test_skip_then_go_back_then_stop(
    uninterrupted: Path,
    tmp_path: Path,
    campaign: bool,
    figure: Figure,
    monkeypatch: pytest.MonkeyPatch,
    persists: bool,
) -> None:
    rng = random.Random(SEED)
    # One kind for each network covers all of them.
    cases = CASES if campaign else CASES[::4]
    for number, (network, kind) in enumerate(cases):
        root = copy_up_to(network.phase, uninterrupted, tmp_path / str(number))
        config = everything_on(root, max_bad_steps=2)
        with monkeypatch.context() as patch:
            made = spoil(patch, network, kind, VALUES[number % 3], rng, persists)
            if persists:
                with pytest.raises(DivergedError, match="again after going back to") as caught:
                    run(config, network.phase)
                assert caught.value.exit_code == 5
            else:
                run(config, network.phase)
        assert made[: STEP + 4] == [*range(STEP + 2), STEP, STEP + 1], (SEED, network.name, kind)
        step, path = list_checkpoints(root / "checkpoints" / network.phase)[-1]
        checkpoint = load_checkpoint(path)
        if persists:
            assert step == STEP
        else:
            expected = load_checkpoint(list_checkpoints(
                uninterrupted / "checkpoints" / network.phase)[-1][1])  # fmt: skip
            assert step == expected.step
            for group, tensors in expected.tensors.items():
                found = checkpoint.tensors[group]
                assert all(torch.equal(v, found[name]) for name, v in tensors.items()), group
    how = "for good" if persists else "for two steps"
    figure(
        "R6",
        f"bad values {how}, 2 in a row allowed",
        "skip → roll back → stop",
        f"{len(cases)} of {len(cases)}: skipped, went back to the last checkpoint, "
        + ("then exit 5, checkpoint intact" if persists else "ended bit-identical"),
    )


def spoil(
    patch: pytest.MonkeyPatch,
    network: Network,
    kind: str,
    value: float,
    rng: random.Random,
    persists: bool,
) -> list[int]:
    """Bad values in steps STEP and STEP + 1, the first time or always; returns the steps made."""
    made: list[int] = []
    phase_class = TeacherPhase if network.phase == "teacher" else DistillPhase
    original = phase_class.update

    def update(self: Any, step: int) -> dict[str, float]:
        made.append(step)
        if step in (STEP, STEP + 1) and (persists or made.count(step) == 1):
            with INJECTIONS[kind](network)(self, value, rng):
                return original(self, step)
        return original(self, step)

    patch.setattr(phase_class, "update", update)
    return made
