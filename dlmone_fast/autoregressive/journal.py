"""The log of a training: records in metrics.jsonl, and now and then a line on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlmone_fast.training.workspace import writing

_LINE_SECONDS = 20.0


class Journal:
    """Progress of one training.

    Args:
        root: the run folder.
        step: steps that are done; `steps` of the whole training.
        log_every: steps between two records.
    """

    def __init__(self, root: Path, step: int, steps: int, log_every: int) -> None:
        self.steps, self.log_every = steps, log_every
        self._path = root / "metrics.jsonl"
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
            if self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n"):
                # A process that was killed may have written half a line.
                self._file.write("\n")
        self._started = self._shown = self._recorded = time.monotonic()
        self._first = step
        self._rows = self._rows_shown = 0
        self._losses: list[float] = []

    def advance(self, step: int, rows: int, loss: float, rate: float) -> None:
        """Note a finished step, counted from 1; record and print it when it is due."""
        self._rows += rows
        self._rows_shown += rows
        self._losses.append(loss)
        now = time.monotonic()
        if step % self.log_every == 0 or step == self.steps:
            mean = math.fsum(self._losses) / len(self._losses)
            spent = now - self._recorded
            self.record(
                step,
                {
                    "loss": mean,
                    "learning_rate": rate,
                    "rows": self._rows,
                    "seconds": spent,
                    "rows_per_second": self._rows / max(spent, 1e-9),
                },
            )
            self._losses, self._rows, self._recorded = [], 0, now
        if now - self._shown >= _LINE_SECONDS or step == self.steps:
            spent = now - self._shown
            left = (self.steps - step) * (now - self._started) / max(1, step - self._first)
            self.say(
                f"step {step}/{self.steps}  loss {loss:.3f}  "
                f"{self._rows_shown / max(spent, 1e-9):.0f} rows/s  about {left / 60:.0f} min left"
            )
            self._rows_shown, self._shown = 0, now

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl."""
        line = {"step": step, **{name: _json(value) for name, value in values.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """Print a line; a terminal that has gone ends no training."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the file."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
