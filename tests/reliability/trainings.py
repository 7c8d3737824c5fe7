"""Real training commands of a tiny run, started, stopped, and compared with each other."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from tiny_training import tiny_config
from torch import Tensor

import dlmone_fast
from dlmone_fast.config import Config, merge, to_toml
from dlmone_fast.models.checkpoint import find_latest, list_checkpoints, load_checkpoint
from dlmone_fast.models.commit import complete_path
from dlmone_fast.models.folder import load_folder

HERE = Path(__file__).resolve().parent
PHASES = ("teacher", "pairs", "stage1", "stage2")
# A machine that does other work; a hanging training is ended by then.
PATIENCE = 300.0
# What depends on when a run was interrupted.
TIMES = {"rows", "seconds", "samples_per_second"}

Position = tuple[int, int]
Curve = dict[Position, dict[str, Any]]


def everything_on(folder: Path | str, **overrides: Any) -> Config:
    """A tiny run of all phases with every option whose state a resume must restore."""
    stage = {"ema_warmup": True, "batch_size": 4, "micro_batch_size": 4}
    everything = {
        "model": {"self_conditioning": True},
        "data": {"both_directions": True},
        "teacher": {
            "steps": 12, "validate_every": 5, "save_every": 3, "condition_dropout": 0.2,
        },
        "distill": {
            "validation_rows": 3,
            "pairs": {
                "count": 16, "per_source": 2, "steps": 3, "batch_size": 4, "save_every": 1,
            },
            "decodable_margin": 2.0,
            "pad_weight": 0.4,
            "stage1": {
                **stage, "steps": 6, "few_steps": 3, "anchor_steps": 3, "anchor_weight": 0.5,
                "anchor_decay_steps": 3, "score_warmup_steps": 2, "validate_every": 4,
                "save_every": 3, "micro_batch_size": 2,
            },
            "stage2": {
                **stage, "steps": 5, "few_steps": 2, "score_warmup_steps": 1, "validate_every": 4,
                "save_every": 1,
            },
        },
        "evaluation": {"rows": 2, "teacher_steps": "", "student_steps": "1", "bootstrap": 10},
    }  # fmt: skip
    return tiny_config(folder, **merge(everything, overrides))


def write_config(config: Config, path: Path) -> Path:
    """A file for `--config`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config), encoding="utf-8")
    return path


class Training:
    """A running training command."""

    pid: int

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, within: float = 0.0) -> bool:
        """Whether it has ended, or does so within some seconds."""
        raise NotImplementedError

    def wait(self) -> int:
        """Its exit code; of a signal, minus its number."""
        raise NotImplementedError


class _Forked(Training):
    def __init__(self, server: TrainingServer) -> None:
        self._server = server
        self.pid = int(server.answer(PATIENCE)["pid"])
        self._status: int | None = None

    def ended(self, within: float = 0.0) -> bool:
        if self._status is None and self._server.has_answer(within):
            self._status = int(self._server.answer(PATIENCE)["status"])
        return self._status is not None

    def wait(self) -> int:
        if not self.ended(PATIENCE):
            self.signal(signal.SIGKILL)
            self.ended(PATIENCE)
            raise AssertionError("the training did not end by itself")
        assert self._status is not None
        return self._status


class _Started(Training):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid

    def ended(self, within: float = 0.0) -> bool:
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> int:
        try:
            return self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs this package, one thread, whatever its working folder."""
    package = str(Path(dlmone_fast.__file__).resolve().parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start_command(config: Path, log: Path, folder: Path, **more: str) -> Training:
    """`python -m dlmone_fast.train --config CONFIG --resume auto`, as a user starts it."""
    command = [sys.executable, "-m", "dlmone_fast.train", "--config", str(config)]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, "--resume", "auto"],
            stdout=stream, stderr=stream, cwd=folder, env=environment(**more),
        )  # fmt: skip
    return _Started(process)


class TrainingServer:
    """Starts training commands without the seconds that importing takes."""

    def __init__(self, folder: Path, faults: Path | None) -> None:
        more = {"LD_PRELOAD": str(faults)} if faults else {}
        self.faults = faults
        self._errors = (folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "training_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=environment(**more), bufsize=0,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._answers: IO[bytes] = self._process.stdout
        self._requests: IO[bytes] = self._process.stdin
        self._pending = b""
        package = Path(self.answer(PATIENCE)["package"])
        assert package == Path(dlmone_fast.__file__).parent

    def start(self, config: Path, log: Path, **request: Any) -> Training:
        """One training; for the keys of a request see training_server.py."""
        line = {
            "arguments": ["--config", str(config), "--resume", "auto"],
            "log": str(log), "folder": str(log.parent), **request,
        }  # fmt: skip
        self._requests.write(json.dumps(line).encode() + b"\n")
        return _Forked(self)

    def run(self, config: Path, log: Path, **request: Any) -> int:
        """One training to its end."""
        return self.start(config, log, **request).wait()

    def has_answer(self, within: float) -> bool:
        if b"\n" in self._pending:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            return bool(selector.select(within))

    def answer(self, within: float) -> dict[str, Any]:
        deadline = time.monotonic() + within
        while b"\n" not in self._pending:
            assert self.has_answer(max(0.0, deadline - time.monotonic())), "no answer"
            part = os.read(self._answers.fileno(), 4096)
            assert part, "the server has ended: " + Path(self._errors.name).read_text()
            self._pending += part
        line, self._pending = self._pending.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._requests.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            self._answers.close()
            self._errors.close()


def build_faults(folder: Path) -> Path | None:
    """faults.c as a library to preload; None where there is no compiler or no such loading."""
    compiler = shutil.which("cc") or shutil.which(str(sysconfig.get_config_var("CC")).split()[0])
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(HERE / "faults.c"), "-ldl"], check=True)
    return library


def lines_of(root: Path) -> Iterator[tuple[Position, dict[str, Any]]]:
    """The records of metrics.jsonl; half a line, of a killed process, is left out."""
    file = root / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield (PHASES.index(record.pop("phase")), record.pop("step")), record


def position_of(root: Path) -> Position:
    """Phase and step of the last record."""
    found = list(lines_of(root))
    return found[-1][0] if found else (0, -1)


def curve_of(root: Path) -> Curve:
    """What was recorded of each step, times left out; the last record of a value holds."""
    curve: Curve = {}
    for position, record in lines_of(root):
        kept = {name: value for name, value in record.items() if name not in TIMES}
        curve.setdefault(position, {}).update(kept)
    return {position: values for position, values in curve.items() if values}


def assert_no_other_value(root: Path, expected: Curve) -> int:
    """Every value ever recorded, of steps made again too, is the expected one; how many."""
    compared = 0
    for position, record in lines_of(root):
        for name, value in record.items():
            if name not in TIMES:
                assert expected[position][name] == value, (position, name)
                compared += 1
    return compared


def saved_steps(root: Path) -> dict[str, int]:
    """Step of the newest checkpoint of each phase; nothing that bears the name is damaged."""
    steps = {}
    for phase in PHASES:
        newest, skipped = find_latest(root / "checkpoints" / phase)
        assert not skipped, skipped
        if newest is not None:
            steps[phase] = load_checkpoint(newest).step
    return steps


def assert_models_are_whole(root: Path) -> None:
    """What bears a model folder's name is one."""
    for phase in ("teacher", "stage1", "stage2"):
        folder = complete_path(root / phase)
        if folder.exists():
            load_folder(folder)


def tensors_of(root: Path) -> dict[str, Tensor]:
    """Every tensor of every phase's last checkpoint and of the model folders."""
    found: dict[str, Tensor] = {}
    for phase in PHASES:
        checkpoint = load_checkpoint(list_checkpoints(root / "checkpoints" / phase)[-1][1])
        assert checkpoint.state["phase"] == phase
        for group, tensors in checkpoint.tensors.items():
            found.update({f"{phase}/{checkpoint.step}/{group}/{k}": v for k, v in tensors.items()})
        if phase != "pairs":
            weights = load_folder(root / phase).tensors
            found.update({f"{phase}/{name}": value for name, value in weights.items()})
    return found


def quality_of(root: Path) -> list[Any]:
    """The table that ends a run, without its times."""
    rows = json.loads((root / "comparison.json").read_text(encoding="utf-8"))["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_run(root: Path, expected: Path) -> None:
    """Two finished runs have the same curves, tensors and scores, bit for bit."""
    assert curve_of(root) == curve_of(expected)
    found, wanted = tensors_of(root), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert quality_of(root) == quality_of(expected)


def copy_up_to(phase: str, run: Path, to: Path) -> Path:
    """A finished run as it was when a phase began."""
    shutil.copytree(run, to)
    later = PHASES[PHASES.index(phase) :]
    for name in later:
        shutil.rmtree(to / "checkpoints" / name, ignore_errors=True)
        shutil.rmtree(to / name, ignore_errors=True)
    (to / "comparison.json").unlink()
    lines = (to / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["phase"] not in later]
    (to / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    return to
