"""Refuses and records every use of the network, in a process and the Python ones that it starts.

With this folder in PYTHONPATH each Python process is blocked from its start (sitecustomize.py);
`-p network_block` makes it a plugin of pytest, which tells at the end what was tried. Attempts are
appended to the file that NETWORK_ATTEMPTS names. Sockets of the Unix kind stay: they lead nowhere.
Python's own sockets alone are seen here; for native code `unshare --net` takes the network away.
"""

from __future__ import annotations

import os
import sys
from typing import Any

RECORD = "NETWORK_ATTEMPTS"
_REFUSED = frozenset(
    {
        "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr",
        "socket.gethostbyname", "socket.getnameinfo", "socket.sendmsg", "socket.sendto",
    }
)  # fmt: skip


class NetworkError(OSError):
    """The network was used where there is none."""


def install() -> None:
    """Block this process, for good."""
    if not getattr(sys, "_network_is_blocked", False):
        sys._network_is_blocked = True  # type: ignore[attr-defined]
        sys.addaudithook(_refuse)


def attempts() -> list[str]:
    """What was tried so far, by all processes that share the record."""
    try:
        with open(os.environ.get(RECORD, ""), encoding="utf-8") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _REFUSED or _leads_nowhere(event, arguments):
        return
    attempt = f"{event} {arguments[-1 if event.startswith('socket.get') else 1]!r:.200}"
    if event == "socket.getaddrinfo":
        attempt = f"{event} {arguments[0]!r:.200}"
    record = os.environ.get(RECORD)
    if record:
        with open(record, "a", encoding="utf-8") as stream:
            stream.write(f"{attempt}\n")
    raise NetworkError(f"the network is blocked: {attempt}")


def _leads_nowhere(event: str, arguments: tuple[Any, ...]) -> bool:
    # The address of a Unix socket is a path.
    return event in ("socket.bind", "socket.connect") and isinstance(arguments[1], (str, bytes))


def pytest_configure() -> None:
    install()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = attempts()
    terminalreporter.write_line(f"network attempts: {len(found)}")
    for attempt in found[:20]:
        terminalreporter.write_line(f"  {attempt}")
