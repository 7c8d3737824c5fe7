"""Starting and stopping: one HTTP process, worker processes, and who looks after them."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
from types import FrameType

from dlmone_fast.errors import BackendUnavailableError, ServerLostError, UsageError
from dlmone_fast.serving.options import ServeOptions

_NEEDED = ("litserve", "prometheus_client")
_END_SECONDS = 2


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        BackendUnavailableError: LitServe is not installed.
        UsageError: the port is taken.
        DlmOneError: the model cannot be loaded; whatever `load_model` raises.
        ServerLostError: the HTTP process or the one that holds the queues ended by itself.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"serving needs {' and '.join(missing)}, not installed: "
            "pip install 'dlmone_fast[serve]'"
        )
    _check_port(options)
    stop = _Stop(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        _run(options, stop)
    finally:
        _end_children()


def _run(options: ServeOptions, stop: _Stop) -> None:
    from dlmone_fast.serving.processes import make_server
    from dlmone_fast.serving.workers import Workers

    workers = Workers()
    server = make_server(options, workers, lambda: stop.asked)
    try:
        # LitServe would write a client.py into the current folder.
        server.run(
            host=options.host, port=options.port, num_api_servers=1, log_level="warning",
            generate_client_file=False, access_log=False,
        )  # fmt: skip
    except KeyboardInterrupt:
        # Asked to stop before it was up.
        return
    except (EOFError, OSError) as error:
        raise ServerLostError(
            f"the process that holds the queues ended ({error!r}); start the server again"
        ) from error
    except RuntimeError:
        failure = workers.failure()
        if failure is None:
            raise
        raise failure from None
    if server.lost_http:
        raise ServerLostError("the HTTP process ended by itself; start the server again")


class _Stop:
    """Signal handler: ends the main process as Ctrl-C does, and what was forked from it quietly."""

    def __init__(self, main: int) -> None:
        self.main, self.asked = main, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.main:
            sys.exit(0)
        self.asked = True
        raise KeyboardInterrupt


def _check_port(options: ServeOptions) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise UsageError(
                f"--port {options.port}: {options.host} cannot be listened at "
                f"({error.strerror}); name another port"
            ) from error


def _end_children() -> None:
    """End what LitServe left: Python would wait for it for ever."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(_END_SECONDS)
        if child.is_alive():
            child.kill()
