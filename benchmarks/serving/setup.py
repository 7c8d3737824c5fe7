"""Options that both servers get, and servers in processes of their own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.harness.records import ROOT
from dlmone_fast.errors import DlmOneError

BATCH, QUEUED = 32, 256
BATCH_TIMEOUT_MS, TIMEOUT_S = 5.0, 120.0
_START_SECONDS = 180
SERVERS = ("litserve", "ray")


class Served:
    """A server, from its start to its end.

    Args:
        kind: one of SERVERS.
        model: the folder.
        threads: of PyTorch.
        options: further ones, of `dlmone_fast.serve`.
    """

    def __init__(self, kind: str, model: Path, threads: int, *options: str) -> None:
        self.port = _free_port()
        if kind == "ray":
            command = ["benchmarks.serving.on_ray", str(model), str(self.port)]
        else:
            command = [
                "dlmone_fast.serve", "--model", str(model), "--port", str(self.port),
                "--max-batch-size", str(BATCH), "--batch-timeout-ms", str(BATCH_TIMEOUT_MS),
                "--max-queued", str(QUEUED), "--timeout-s", str(TIMEOUT_S),
                "--device", "cpu", "--backend", "eager", *options,
            ]  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=self._log, stderr=self._log,
            env={
                **os.environ, "OMP_NUM_THREADS": str(threads),
                "RAY_TMPDIR": "/tmp", "RAY_worker_niceness": "0",
            },
        )  # fmt: skip
        self._wait()
        self.start_seconds = time.perf_counter() - begun

    @property
    def url(self) -> str:
        """The address of POST /generate."""
        return f"http://127.0.0.1:{self.port}/generate"

    def cpu(self) -> float:
        """Processor seconds of all its processes until now."""
        times = [process.cpu_times() for process in self._tree()]
        return sum(t.user + t.system for t in times)

    def megabytes(self) -> float:
        """Memory that its processes do not share, in MB, and what they share once each."""
        return sum(process.memory_full_info().pss for process in self._tree()) / 1e6

    def processes(self) -> int:
        """The number of its processes."""
        return len(self._tree())

    def stop(self) -> None:
        """SIGTERM.

        Raises:
            DlmOneError: it did not end as a server that was asked to.
        """
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        if code:
            raise DlmOneError(f"the server ended with {code}:\n{self._said()}")

    def _tree(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def _wait(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self._process.kill()
                raise DlmOneError(f"the server did not start:\n{self._said()}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
