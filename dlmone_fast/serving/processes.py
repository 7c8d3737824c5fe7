"""LitServe's server, and what it does not look after: its HTTP process and its socket."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from litserve import LitServer

from dlmone_fast.serving.front import Front
from dlmone_fast.serving.gate import Gate
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.routes import add_routes
from dlmone_fast.serving.worker import Worker
from dlmone_fast.serving.workers import Workers

_TICK_SECONDS = 0.2
# What LitServe logs, with a traceback, of the thread that starts workers again.
_MONITOR_CRASHED = "Monitoring worker crashed"
# Beyond a request's own time, for its answer to be written.
_GRACE_SECONDS = 2
# For the HTTP process to stop listening by itself.
_CLOSING_SECONDS = 0.5


def make_server(
    options: ServeOptions, workers: Workers, stopping: Callable[[], bool]
) -> WatchedServer:
    """A server that is ready to run.

    Args:
        options: model and limits.
        workers: which workers live.
        stopping: whether it was asked to end.
    """
    front = Front(options, workers)
    server = WatchedServer(
        Worker(options, workers, front), accelerator=_accelerator(options),
        timeout=options.timeout_s, restart_workers=True, middlewares=[(Gate, {"front": front})],
    )  # fmt: skip
    front.server = server
    server.stopping = stopping

    def told(record: logging.LogRecord) -> bool:
        return not (stopping() and record.getMessage() == _MONITOR_CRASHED)

    # The thread asks a process that ends with the others whether it is to end.
    logging.getLogger("litserve.server").addFilter(told)
    server.monitor_internal = _TICK_SECONDS
    server.uvicorn_graceful_timeout = options.timeout_s + _GRACE_SECONDS
    add_routes(server.app, front)
    return server


class WatchedServer(LitServer):
    """Ends when its HTTP process does, and refuses connections once it is to stop.

    Attributes:
        lost_http: the HTTP process ended by itself.
        listening: bound sockets, which requests come from: LitServe knows three addresses.
    """

    lost_http = False
    stopping: Callable[[], bool]
    listening: list[socket.socket]

    def end_queues(self) -> None:
        """End the process that holds the queues, in the place of a main process that is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.transport_config.manager._process.pid, signal.SIGTERM)

    def _start_server(
        self, port: int, count: int, log_level: str, sockets: list[socket.socket],
        kind: str, **options: Any,
    ) -> Any:  # fmt: skip
        # Those that LitServe has made are another name of the first one here.
        for made in sockets:
            made.close()
        started = super()._start_server(port, count, log_level, self.listening, kind, **options)
        threading.Thread(
            target=self._watch, args=(list(started.values()), self.listening), daemon=True
        ).start()
        return started

    def _watch(self, processes: list[Any], sockets: list[socket.socket]) -> None:
        while not self.stopping():
            if not all(process.is_alive() for process in processes):
                # It may have ended with the signal that is about to arrive here.
                time.sleep(_TICK_SECONDS)
                if not self.stopping():
                    self.lost_http = True
                    self._shutdown_event.set()
                return
            time.sleep(_TICK_SECONDS)
        # Other processes inherited the socket: clients would be let in and not served.
        time.sleep(_CLOSING_SECONDS)
        for listening in sockets:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)


def _accelerator(options: ServeOptions) -> str:
    if options.device != "auto":
        return options.device
    from dlmone_fast.models.devices import pick_device

    return pick_device("auto").type
