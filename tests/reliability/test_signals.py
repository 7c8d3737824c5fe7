"""SIGTERM and SIGINT, once and twice, at every place of a training command and at random."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from figures import Figure
from signal_hooks import REACHED
from trainings import (
    PATIENCE,
    PHASES,
    Training,
    TrainingServer,
    assert_models_are_whole,
    assert_no_other_value,
    assert_same_run,
    copy_up_to,
    curve_of,
    everything_on,
    lines_of,
    position_of,
    saved_steps,
    write_config,
)

SEED = 50
# Longer than any test waits, and shorter than a step of those that are let end.
LONG, SHORT = 600.0, 0.2
TARGET_SECONDS = 10.0
IMMEDIATE_SECONDS = 1.0
# In the order in which a run meets them: place, phase, step, and how long it would stay there.
PLACES = (
    ("data", "", 0, LONG),
    ("update", "teacher", 1, SHORT),
    ("validate", "teacher", 5, LONG),
    ("save", "teacher", 9, SHORT),
    ("publish", "teacher", 0, LONG),
    ("update", "pairs", 1, SHORT),
    ("validate", "stage1", 0, LONG),
    ("update", "stage1", 1, SHORT),
    ("update", "stage1", 5, SHORT),
    ("validate", "stage1", 8, LONG),
    ("save", "stage1", 9, SHORT),
    ("update", "stage2", 1, SHORT),
    ("validate", "stage2", 4, LONG),
    ("save", "stage2", 5, SHORT),
    ("compare", "", 0, LONG),
)
FEW = (0, 1, 2, 8, 12, 14)


class Signalled:
    """A run whose process gets signals, and is started again."""

    def __init__(self, folder: Path, uninterrupted: Path, server: TrainingServer) -> None:
        self.root, self.log, self.folder = folder / "run", folder / "log", folder
        self.uninterrupted, self.server = uninterrupted, server
        self.config = write_config(everything_on(self.root), folder / "config.toml")
        self.seconds: list[float] = []

    def start_at(self, place: str, phase: str, step: int, seconds: float) -> Training:
        """A training that has come to a place and stays there for a while."""
        reached = self.folder / REACHED
        reached.unlink(missing_ok=True)
        stay = ("signal_hooks", "stay", place, phase, step, seconds)
        training = self.server.start(self.config, self.log, prepare=stay)
        began = time.monotonic()
        while not reached.exists():
            assert not training.ended(0.005), self.log.read_text()
            assert time.monotonic() - began < PATIENCE
        return training

    def end(self, training: Training, number: int) -> int:
        """Send a signal and take the time until the process has ended."""
        began = time.monotonic()
        training.signal(number)
        status = training.wait()
        self.seconds.append(time.monotonic() - began)
        assert "Traceback" not in self.log.read_text()
        assert_models_are_whole(self.root)
        return status

    def nothing_to_make_again(self) -> None:
        """The last step that was recorded is the last one that was saved."""
        index, step = position_of(self.root)
        if step > 0:
            assert saved_steps(self.root)[PHASES[index]] == step

    def finish(self) -> None:
        assert self.server.run(self.config, self.log) == 0, self.log.read_text()
        assert_no_other_value(self.root, curve_of(self.uninterrupted))
        assert_same_run(self.root, self.uninterrupted)
        shutil.rmtree(self.root)


@pytest.fixture
def signalled(server: TrainingServer, uninterrupted: Path, tmp_path: Path) -> Signalled:
    return Signalled(tmp_path, uninterrupted, server)


def test_sigterm_saves_and_ends_with_75_wherever_it_comes(
    signalled: Signalled, campaign: bool, figure: Figure
) -> None:
    places = PLACES if campaign else [PLACES[i] for i in FEW]
    for place in places:
        assert signalled.end(signalled.start_at(*place), signal.SIGTERM) == 75, place
        signalled.nothing_to_make_again()
        assert "the same command continues" in signalled.log.read_text().splitlines()[-1]
    assert max(signalled.seconds) < TARGET_SECONDS, signalled.seconds
    signalled.finish()
    figure(
        "R5",
        "SIGTERM in data, update, validation, save, publishing, comparison",
        "saved and exit 75 in < 10 s or one step",
        f"{len(places)} of {len(places)}, at most {max(signalled.seconds):.1f} s; 0 steps made "
        "again; resumed: bit-identical",
    )


def test_sigterm_at_random_moments(signalled: Signalled, campaign: bool, figure: Figure) -> None:
    if not campaign:
        pytest.skip("is a part of the campaign alone")
    rng, ends, wanted = random.Random(SEED), Counter[int](), 30
    while ends[75] < wanted:
        records, began = len(list(lines_of(signalled.root))), time.monotonic()
        training = signalled.server.start(signalled.config, signalled.log)
        # The command has its own way to stop once it has begun.
        while len(list(lines_of(signalled.root))) == records and not training.ended(0.005):
            pass
        training.ended(rng.uniform(0, 0.2 * (time.monotonic() - began)))
        ended = training.ended()
        status = training.wait() if ended else signalled.end(training, signal.SIGTERM)
        ends[status] += 1
        assert status in (0, 75), signalled.log.read_text()
        if status == 75:
            signalled.nothing_to_make_again()
        else:
            signalled.finish()
    print(f"seed {SEED}: {ends}")
    assert max(signalled.seconds) < TARGET_SECONDS
    signalled.finish()
    figure(
        "R5",
        "SIGTERM at random moments",
        "saved and exit 75 in < 10 s or one step",
        f"{ends[75]} of {ends[75]}, at most {max(signalled.seconds):.1f} s; 0 steps made again; "
        "resumed: bit-identical",
    )


def test_sigint_ends_with_130_and_a_second_sigterm_at_once(
    signalled: Signalled, campaign: bool, figure: Figure
) -> None:
    phases = ("teacher", "stage1", "stage2") if campaign else ("stage2",)
    interrupted, killed, second = 0, 0, []
    for phase in phases:
        copy_up_to(phase, signalled.uninterrupted, signalled.root)
        # The update after the third one lies behind a save in every phase.
        training = signalled.start_at("update", phase, 3, LONG)
        saved = saved_steps(signalled.root)
        assert saved[phase] == 3
        assert signalled.end(training, signal.SIGINT) == 130
        assert saved_steps(signalled.root) == saved
        assert signalled.log.read_text().splitlines()[-1] == "interrupted"
        interrupted += 1
        for place in ("update", "save"):
            training = signalled.start_at(place, phase, 3 if place == "update" else 4, LONG)
            training.signal(signal.SIGTERM)
            assert not training.ended(0.5)
            assert signalled.end(training, signal.SIGTERM) == -signal.SIGTERM
            second.append(signalled.seconds[-1])
            assert saved_steps(signalled.root) == saved
            killed += 1
        signalled.finish()
    assert max(second) < IMMEDIATE_SECONDS, second
    figure(
        "R5",
        "SIGINT; a second SIGTERM in a long step and in a save",
        f"130; the second ends it within {IMMEDIATE_SECONDS:.0f} s",
        f"{interrupted} × 130, {killed} × ended by the second signal after at most "
        f"{max(second):.2f} s; nothing saved was lost, resumed: bit-identical",
    )
