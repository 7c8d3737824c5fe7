"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from served import Server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers and ends them."""
    servers: list[Server] = []

    def starting(*options: str) -> Server:
        servers.append(Server(tmp_path / f"log{len(servers)}", *options))
        return servers[-1]

    yield starting
    for server in servers:
        server.end()
