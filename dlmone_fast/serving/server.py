"""Starting and stopping: one HTTP process, worker processes, and who looks after them."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

from dlmone_fast.errors import BackendUnavailableError, ServerLostError, UsageError
from dlmone_fast.serving.options import ServeOptions

_NEEDED = ("litserve", "prometheus_client")
_END_SECONDS = 2
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


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
    listening = bound_sockets(options.host, options.port)
    stop = _Stop(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        _run(options, stop, listening)
    finally:
        _end_children()


def _run(options: ServeOptions, stop: _Stop, listening: list[socket.socket]) -> None:
    from dlmone_fast.serving.processes import make_server
    from dlmone_fast.serving.workers import Workers

    workers = Workers()
    server = make_server(options, workers, lambda: stop.asked)
    server.listening = listening
    try:
        # LitServe would write a client.py into the current folder.
        server.run(
            port=options.port, fd=listening[0].fileno(), num_api_servers=1, log_level="warning",
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


def bound_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address that a name stands for: localhost may have two.

    Raises:
        UsageError: the host is not one of this machine's, or the port is taken.
    """
    bound: list[socket.socket] = []
    refusal: OSError | None = None
    for family, address in _addresses(host, port):
        made: socket.socket | None = None
        try:
            made = socket.socket(family)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError as error:
            refusal = error
            if made is not None:
                made.close()
            # A machine without IPv6 has only one of a name's addresses.
            if error.errno in _NOT_HERE:
                continue
            break
        bound.append(made)
    else:
        if bound:
            return bound
    for made in bound:
        made.close()
    reason = refusal.strerror if refusal else "it has no address"
    if refusal is None or refusal.errno in _NOT_HERE:
        raise UsageError(
            f"--host {host}: is no address of this machine ({reason}); name one of its own, or "
            "0.0.0.0 for all"
        ) from refusal
    raise UsageError(
        f"--port {port}: {host} cannot be listened at ({reason}); name another port"
    ) from refusal


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        # Without a name it would be every address, which nobody asked for.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    # A name with an empty or overlong part is refused by its codec.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {host}: expected an address or a name of this machine ({reason}); the default "
            "is 127.0.0.1, and 0.0.0.0 every network of it"
        ) from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _end_children() -> None:
    """End what LitServe left: Python would wait for it for ever."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(_END_SECONDS)
        if child.is_alive():
            child.kill()
