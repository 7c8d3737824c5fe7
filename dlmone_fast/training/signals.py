"""SIGTERM asks for a checkpoint and an orderly end; a second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context in which SIGTERM sets `requested` instead of ending the process.

    The training loop reads it between steps. Outside the main thread signals cannot be
    received; then it never becomes true.
    """

    def __init__(self) -> None:
        self.requested = False
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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
