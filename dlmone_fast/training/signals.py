"""What ends a run early, in order: SIGTERM (a second one ends the process at once), or the time
that it was given."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType, TracebackType

from dlmone_fast.errors import InterruptedAndSavedError


class TimeLimit:
    """The wall time of a run, over all its phases.

    It ends nothing before the first training step of a process: a run that is started again and
    again gets on, however short its time.

    Args:
        minutes: the limit; 0: none.
        started: `time.monotonic()` when the run began; None: now.
    """

    def __init__(self, minutes: float = 0.0, started: float | None = None) -> None:
        self.minutes = minutes
        self.started = monotonic() if started is None else started
        self._trained = False

    def reached(self) -> bool:
        """Whether the time is up, after a training step."""
        self._trained = True
        return self._is_up()

    def check(self, before: str) -> None:
        """Do not let the next part of a run begin when the time is up.

        Raises:
            InterruptedAndSavedError: it is, and everything so far is saved.
        """
        if self.ends_here():
            raise self.stopped(before)

    def ends_here(self) -> bool:
        """Whether the time is up, between two parts of a run."""
        return self._trained and self._is_up()

    def stopped(self, before: str) -> InterruptedAndSavedError:
        """The error that ends a run before its next part."""
        return InterruptedAndSavedError(
            f"stopped by {self} before {before}; all is saved; the same command continues"
        )

    def _is_up(self) -> bool:
        return self.minutes > 0 and monotonic() - self.started >= 60 * self.minutes

    def __str__(self) -> str:
        return f"--max-minutes {self.minutes:g}"


class _CutOffError(BaseException):
    """Raised by the signal; no `except Exception` on the way keeps it."""


class StopRequest:
    """Context in which SIGTERM sets `requested` instead of ending the process.

    The training loop reads it between steps; what need not be finished runs within `cutting`. The
    second signal ends the process. Outside the main thread signals cannot be received; then
    nothing is ever requested.

    Args:
        cuts: False: `cutting` changes nothing.
    """

    def __init__(self, cuts: bool = True) -> None:
        self.requested = False
        self._may_cut = cuts
        self._cuts = False
        self._before: signal._HANDLER = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Context that the signal ends at once, for what can be made again or is saved anyway.

        Raises:
            InterruptedAndSavedError: SIGTERM came in it, or before.
        """
        try:
            self._cuts = self._may_cut
            if self.requested and self._cuts:
                raise _CutOffError
            yield
        except _CutOffError:
            raise InterruptedAndSavedError(
                "stopped by SIGTERM; all finished steps are saved; the same command continues"
            ) from None
        finally:
            self._cuts = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._cuts:
            raise _CutOffError
