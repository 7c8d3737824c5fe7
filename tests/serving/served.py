"""A server in processes of its own, and a client that knows nothing but HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 300


class Server:
    """The command in a process, with a log.

    Args:
        log: where its output goes.
        options: of the command.
    """

    def __init__(self, log: Path, *options: str) -> None:
        self.log, self.port = log, free_port()
        command = [sys.executable, "-m", "dlmone_fast.serve", "--port", str(self.port), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--backend", "eager", "--device", "cpu"],
                stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait(self) -> Server:
        """Until it is up."""

        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.get("/health")[0] == 200
            except OSError:
                return False

        until(up, START_SECONDS)
        return self

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        status, _, body = self.send("GET", path)
        return status, body

    def ask(self, prompts: Any, **fields: Any) -> tuple[int, Any]:
        """Status and JSON of POST /generate."""
        status, _, body = self.post(json.dumps({"prompts": prompts, **fields}).encode())
        return status, json.loads(body)

    def post(self, body: Any, **options: Any) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""
        headers = {"Content-Type": "application/json"}
        return self.send("POST", "/generate", body, headers, **options)

    def send(
        self, method: str, path: str, body: Any = None, headers: Any = None, **options: Any
    ) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            # A server that refuses what is still being sent closes; its answer can be read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers or {}, **options)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of a line of /metrics; 0 where there is none yet."""
        for line in self.get("/metrics")[1].splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        return 0.0

    def child(self, which: str) -> psutil.Process:
        """Its worker, its HTTP process ("http"), or the one that holds the queues ("queues")."""
        main = psutil.Process(self.process.pid)
        children = sorted(main.children(), key=lambda child: child.create_time())
        spawned = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        queues, http = (child for child in children if child.cmdline() == main.cmdline())
        return {"worker": spawned[-1], "queues": queues, "http": http}[which]

    def end(self) -> None:
        """Whatever became of it, leave nothing."""
        if self.process.poll() is None:
            left = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in left:
                child.kill()
        self.process.wait()


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; an orphan may wait for ever for somebody to take note."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait, but not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
