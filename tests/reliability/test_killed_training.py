"""Training that is killed: at random moments from outside, and at every call inside a save."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from figures import Figure
from trainings import (
    PATIENCE,
    PHASES,
    Curve,
    Position,
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
    start_command,
    write_config,
)

Start = Callable[[], Training]

SEED = 20
SAVE_EVERY = {"teacher": 3, "pairs": 1, "stage1": 3, "stage2": 1}
COUNT, KILL, HALF_THEN_KILL = 1, 2, 3
NEW_FILE = "a new file"


@dataclass
class Toll:
    """What the kills of a run hit, and what they cost."""

    phases: Counter[str] = field(default_factory=Counter)
    starting: int = 0
    saving: int = 0
    commands: int = 0
    made_again: int = 0

    @property
    def kills(self) -> int:
        return sum(self.phases.values())


class Victim:
    """A run that is killed again and again, and looked through after each time."""

    def __init__(self, folder: Path, expected: Path, server: TrainingServer, toll: Toll) -> None:
        self.root, self.log = folder / "run", folder / "log"
        self.expected, self.toll = expected, toll
        self.config = write_config(everything_on(self.root), folder / "config.toml")
        self.server = server
        curve = curve_of(expected)
        self.last = {phase: max(s for p, s in curve if p == i) for i, phase in enumerate(PHASES)}
        self.to_first_record = 0.3

    def forked(self) -> Training:
        return self.server.start(self.config, self.log)

    def command(self) -> Training:
        return start_command(self.config, self.log, self.log.parent)

    def kill(self, start: Start, moment: Callable[[Training], None]) -> bool:
        """Start, kill at the moment, look at what is there; False if the run ended before, which
        is no kill."""
        records, saved = len(list(lines_of(self.root))), saved_steps(self.root)
        training = start()
        moment(training)
        if not training.ended():
            training.signal(signal.SIGKILL)
        status = training.wait()
        assert status in (0, -signal.SIGKILL), self.log.read_text()
        killed = status == -signal.SIGKILL
        self._began_where_it_was_saved(records, saved)
        if killed:
            self._nothing_is_lost(started=len(list(lines_of(self.root))) > records)
            self.toll.commands += start == self.command
        return killed

    def _began_where_it_was_saved(self, records: int, saved: dict[str, int]) -> None:
        new = list(lines_of(self.root))[records:]
        made = [position for position, record in new if record.get("rows")]
        if made:
            assert made[0] == self._next(saved)

    def _next(self, saved: dict[str, int]) -> Position:
        """The first step that no checkpoint holds."""
        index = next(i for i, phase in enumerate(PHASES) if saved.get(phase, 0) < self.last[phase])
        return index, saved.get(PHASES[index], 0) + 1

    def _nothing_is_lost(self, started: bool) -> None:
        saved, (index, step) = saved_steps(self.root), position_of(self.root)
        assert_models_are_whole(self.root)
        phase = PHASES[index]
        unsaved = max(0, step - saved.get(phase, 0))
        assert unsaved <= SAVE_EVERY[phase]
        self.toll.made_again += unsaved if started else 0
        self.toll.phases[phase] += 1
        self.toll.starting += not started
        self.toll.saving += any((self.root / "checkpoints").glob("*/.*step-*"))

    def at(self, target: Position | None, delay: float) -> Callable[[Training], None]:
        """The moment a part of 0.1 s after a step has been recorded, or of the start-up."""

        def wait(training: Training) -> None:
            if target is None:
                training.ended(delay * self.to_first_record)
                return
            began, records = time.monotonic(), len(list(lines_of(self.root)))
            seen = False
            while not training.ended(0.004) and time.monotonic() - began < PATIENCE:
                now = list(lines_of(self.root))
                if not seen and len(now) > records:
                    seen, self.to_first_record = True, time.monotonic() - began
                if seen and now[-1][0] >= target:
                    training.ended(delay / 10)
                    return

        return wait

    def finish(self) -> None:
        """Let the run end, and compare it."""
        assert self.server.run(self.config, self.log) == 0, self.log.read_text()
        assert "damaged" not in self.log.read_text()
        assert_same_run(self.root, self.expected)


def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(
    server: TrainingServer, uninterrupted: Path, tmp_path: Path, campaign: bool, figure: Figure
) -> None:
    rng, toll = random.Random(SEED), Toll()
    wanted, commands, a_life = (60, 5, 20) if campaign else (10, 1, 10)
    curve, compared = curve_of(uninterrupted), 0
    while toll.kills < wanted:
        folder = tmp_path / f"after-{toll.kills}"
        folder.mkdir()
        victim = Victim(folder, uninterrupted, server, toll)
        for target in moments(rng, curve, min(a_life, wanted - toll.kills)):
            whole = target is not None and toll.commands < commands
            start = victim.command if whole else victim.forked
            if not victim.kill(start, victim.at(target, rng.random())):
                break
        victim.finish()
        compared += assert_no_other_value(victim.root, curve)
        print(f"seed {SEED}, {folder.name}: {toll}")
    assert toll.kills >= wanted
    assert {"teacher", "stage1", "stage2"} <= set(toll.phases)
    figure(
        "R1",
        "SIGKILL at random moments, then --resume auto",
        "≥ 50 kills (10 in the fast part), 0 steps lost beyond the last checkpoint, curve and "
        "weights bit-identical, no torn checkpoint",
        f"{toll.kills} kills ({', '.join(f'{n} in {phase}' for phase, n in toll.phases.items())}; "
        f"{toll.starting} before the first step, {toll.saving} inside a save, {toll.commands} of "
        f"whole processes), {toll.made_again} steps made again, 0 lost; {compared} recorded values "
        "and every tensor bit-identical, 0 torn",
    )


def moments(rng: random.Random, curve: Curve, count: int) -> list[Position | None]:
    """Steps after which to kill, in the order in which a run meets them, no network's phase left
    out; a fifth of them None: while a process starts."""
    positions = sorted(curve)
    found = [rng.choice([p for p in positions if p[0] == phase]) for phase in (0, 2, 3)]
    found += rng.choices(positions, k=max(0, count - count // 5 - len(found)))
    ordered: list[Position | None] = [*sorted(found)]
    for _ in range(count // 5):
        ordered.insert(rng.randrange(len(ordered)), None)
    return ordered


@dataclass
class Sweep:
    """Kills at the calls of one phase's saves; each run goes on from what the kill before left."""

    phase: str
    server: TrainingServer
    uninterrupted: Path
    folder: Path
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.root, self.base = self.folder / "run", self.folder / "base"
        self.log, self.trace = self.folder / "log", self.folder / "trace"
        self.config = write_config(everything_on(self.root), self.folder / "config.toml")
        self.curve = curve_of(self.uninterrupted)
        self.calls_of_a_save = self._prepare()

    def run(self, action: int, call: int = 0) -> Training:
        below = str((self.root / "checkpoints" / self.phase).resolve())
        self.trace.unlink(missing_ok=True)
        return self.server.start(
            self.config, self.log, fault=[below, action, call, 0, str(self.trace)]
        )

    def begun(self) -> list[int]:
        """Numbers of the calls that began a save."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        return [i for i, line in enumerate(lines, 1) if " mkdir /.tmp-step" in line]

    def _prepare(self) -> int:
        """The base: two checkpoints, so that the next save deletes one. Counts its calls."""
        copy_up_to(self.phase, self.uninterrupted, self.root)
        training = self.run(COUNT)
        while len(self.begun()) < 4:
            assert not training.ended(0.01), self.log.read_text()
        training.signal(signal.SIGKILL)
        training.wait()
        _, _, third, fourth = self.begun()[:4]
        shutil.rmtree(self.root)
        copy_up_to(self.phase, self.uninterrupted, self.root)
        assert self.run(KILL, third).wait() == -signal.SIGKILL
        shutil.move(self.root, self.base)
        return fourth - third

    def kill(self, action: int, call: int) -> None:
        """Kill at a call; what bears the name of a checkpoint is one, and none is lost."""
        if not self.root.exists():
            shutil.copytree(self.base, self.root)
        before = saved_steps(self.root)
        status = self.run(action, call).wait()
        after = saved_steps(self.root)
        assert all(after.get(phase, 0) >= step for phase, step in before.items()), (before, after)
        if status == 0:
            self._compare()
            return
        assert status == -signal.SIGKILL, self.log.read_text()
        _, name, path = self.trace.read_text().splitlines()[-1].split(" ", 2)
        self.calls[name, kind_of(path)] += 1

    def finish(self) -> None:
        """Let the last run end, and compare it."""
        if self.root.exists():
            assert self.server.run(self.config, self.log) == 0, self.log.read_text()
            self._compare()
        assert "damaged" not in self.log.read_text()

    def _compare(self) -> None:
        assert_no_other_value(self.root, self.curve)
        assert_same_run(self.root, self.uninterrupted)
        shutil.rmtree(self.root)
        self.finished += 1


def kind_of(path: str) -> str:
    """What a path below a phase's checkpoints is: a file's name, or what a folder is for."""
    parts = path.strip("/").split("/")
    if len(parts) > 1:
        # safetensors writes under a random name, and renames.
        return NEW_FILE if parts[-1].startswith(".tmp") else parts[-1]
    return "parent" if not parts[0] else "temporary" if parts[0].startswith(".tmp-") else "step"


def test_a_kill_at_any_call_of_a_save_loses_nothing(
    server: TrainingServer, uninterrupted: Path, tmp_path: Path, campaign: bool, figure: Figure
) -> None:
    if server.faults is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    rng, calls, finished = random.Random(SEED), Counter[tuple[str, str]](), 0
    for phase in PHASES if campaign else ("stage1",):
        sweep = Sweep(phase, server, uninterrupted, tmp_path / phase)
        # A save begins by deleting what the kill before left: at most as many files, and a folder.
        points = list(range(1, sweep.calls_of_a_save + 13))
        actions = (KILL, HALF_THEN_KILL) if phase in ("teacher", "stage1") else (KILL,)
        for action in actions:
            for call in points if campaign else sorted(rng.sample(points, 4)):
                sweep.kill(action, call)
        sweep.finish()
        calls, finished = calls + sweep.calls, finished + sweep.finished
        print(phase, sorted(sweep.calls.items()))
    kinds = {name for name, _ in calls}
    assert calls.total() > 5
    if campaign:
        assert kinds >= {"mkdir", "open", "write", "chmod", "fsync", "rename", "unlink", "rmdir"}
        for file in ("state.json", "config.toml", "manifest.json", "score.safetensors"):
            assert all(calls[name, file] for name in ("chmod", "fsync")), file
            written = NEW_FILE if calls["open", NEW_FILE] and file.endswith("tensors") else file
            assert all(calls[name, written] for name in ("open", "write")), file
    figure(
        "R2",
        "SIGKILL inside a save of each phase, before a call or with half of a write done",
        "at every write, fsync and rename: the newest complete checkpoint loads, the run ends "
        "bit-identical",
        f"{calls.total()} kills at {len(calls)} different calls ({', '.join(sorted(kinds))}); "
        f"0 damaged, {finished} runs to their end, bit-identical",
    )
