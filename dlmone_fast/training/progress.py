"""What a run tells while it goes: a progress bar, metrics.jsonl, and TensorBoard if installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dlmone_fast.training.owned import read_record, writing


class Progress:
    """Progress of one phase.

    Each record is one line of `metrics.jsonl`: phase, step, and what was measured. After a
    resume from a checkpoint, or going back to one, the steps since then are logged again; the last
    line of a step holds.
    A record that cannot be written raises CheckpointError.

    Args:
        root: the run folder.
        phase: the phase's name.
        start: steps that are done.
        steps: steps of the phase.
        log_every: steps between two records.
        writes: False for a rank that is not the first: it writes and says nothing.
    """

    def __init__(
        self, root: Path, phase: str, start: int, steps: int, log_every: int, writes: bool = True
    ) -> None:
        self.phase = phase
        self.log_every = log_every
        self.writes = writes
        self._path = root / "metrics.jsonl" if writes else Path(os.devnull)
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
            self._end_torn_line()
        self._bar = tqdm(
            total=steps, initial=start, desc=phase, unit="step", dynamic_ncols=True, smoothing=0.05,
            file=_Screen(), disable=not writes,
        )  # fmt: skip
        with writing(root / "tensorboard"):
            self._board = _tensorboard(root) if writes else None
        self._steps = steps
        self._step, self._samples, self._since = start, 0, time.perf_counter()
        self._latest: dict[str, float] = {}

    def advance(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Note a finished step (counted from 0) of `samples` rows; log it when it is due.

        A record holds the latest value of everything noted since the one before, so that what is
        measured rarely is not lost between two records.
        """
        self._step = step + 1
        self._samples += samples
        self._latest.update(values)
        self._bar.update(1)
        if (step + 1) % self.log_every and step + 1 != self._steps:
            return
        cost = self._cost()
        rate = cost["rows"] / max(cost["seconds"], 1e-9)
        shown = ", ".join(f"{k}={v:.4g}" for k, v in list(self._latest.items())[:3])
        self._bar.set_postfix_str(f"{shown}, {rate:.0f} samples/s")
        self.record(step + 1, {**self._latest, "samples_per_second": rate, **cost})
        self._latest = {}

    def go_back(self, step: int, to: int) -> None:
        """Note that the steps between two are made again."""
        self.record(step, {**self._latest, "gone_back_to": to})
        self._latest = {}
        self._step = to
        self._bar.n = to
        self._bar.refresh()

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one record of metrics.jsonl, and its numbers to TensorBoard."""
        line = {"phase": self.phase, "step": step, **{k: _json(v) for k, v in values.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{self.phase}/{name}", value, step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.writes:
            tqdm.write(text, file=_Screen())

    def close(self) -> None:
        """Record what was done since the last record; end the bar and the files."""
        self._bar.close()
        try:
            self.record(self._step, {**self._latest, **self._cost()})
        finally:
            with writing(self._path):
                self._file.close()
        if self._board is not None:
            with writing(self._path.with_name("tensorboard")):
                self._board.close()

    def _cost(self) -> dict[str, float]:
        """Rows and seconds since the last call."""
        now = time.perf_counter()
        cost = {"rows": self._samples, "seconds": now - self._since}
        self._samples, self._since = 0, now
        return cost

    def _end_torn_line(self) -> None:
        # A process that was killed may have written half a line; the next is not glued to it.
        if self._path.stat().st_size:
            with self._path.open("rb") as written:
                written.seek(-1, os.SEEK_END)
                if written.read() != b"\n":
                    self._file.write("\n")


class _Screen:
    """stderr as far as it can be written: neither a log on a full disk nor a terminal that has
    gone ends a training."""

    def write(self, text: str) -> None:
        # A stream that was closed is None.
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _json(value: Any) -> Any:
    # JSON has no NaN and no infinity: a loss that was not finite is recorded as "nan" or "inf".
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(root: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(_board_folder(root)))


def _board_folder(root: Path) -> Path:
    """The folder of this start's curves: nothing proves those of earlier ones a run's, so that
    they stay beside them."""
    record = read_record(root)
    board = root / "tensorboard"
    return board if record is None or record.starts == 1 else board / f"start-{record.starts}"
