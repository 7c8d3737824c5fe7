"""Nothing needs the network, and nothing tries it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import Figure

TESTS = Path(__file__).resolve().parents[1]
BLOCK = TESTS / "reliability" / "no_network"
# As many are skipped with a network on a machine without a GPU, data sets and optional libraries.
MOST_SKIPPED = 120

PROBES = """
import multiprocessing, os, socket, subprocess, sys, urllib.request
import network_block

def refused(action):
    try:
        action()
    except OSError as error:
        return "blocked" in str(error)
    return False

assert refused(lambda: socket.create_connection(("127.0.0.1", 9)))
assert refused(lambda: socket.create_connection(("::1", 9)))
assert refused(lambda: socket.getaddrinfo("example.org", 80))
assert refused(lambda: socket.gethostbyname("example.org"))
assert refused(lambda: urllib.request.urlopen("https://example.org"))
assert refused(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)))
here, there = socket.socketpair()
here.send(b"x")
assert there.recv(1) == b"x"
child = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
assert "network is blocked" in done.stderr, done.stderr
print(len(network_block.attempts()))
"""

USE = """
import sys
from pathlib import Path
import tiny
from tiny_training import tiny_config
import dlmone_fast
from dlmone_fast import doctor, import_diffuseq
from dlmone_fast.training import run

folder = Path(sys.argv[1])
result = run(tiny_config(folder / "run"), "teacher")
assert result.teacher is not None
student = tiny.save(folder / "student")
model = dlmone_fast.load(student)
assert len(model.generate(tiny.prompts(20))) == 20
assert doctor.main(["--model", str(student)]) == 0
import_diffuseq.main([sys.argv[2], str(folder / "imported")])
assert dlmone_fast.load_teacher(folder / "imported").config.num_layers == 2
print("done", model.backend)
"""


def blocked(command: Sequence[str], record: Path) -> subprocess.CompletedProcess[str]:
    """Run Python without a network: none in the kernel's view, where that may be taken away."""
    paths = [str(BLOCK), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "NETWORK_ATTEMPTS": str(record), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [*without_interfaces(), sys.executable, *command],
        capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False,
    )  # fmt: skip


def without_interfaces() -> list[str]:
    """A command that runs another one in a network namespace of its own; empty: not possible."""
    unshare = shutil.which("unshare")
    for options in (["--net"], ["--net", "--map-root-user"]):
        command = [unshare or "unshare", *options]
        if unshare and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def how() -> str:
    return "no interfaces, sockets refused" if without_interfaces() else "sockets refused"


def test_the_block_refuses_and_records(tmp_path: Path) -> None:
    done = blocked(["-c", PROBES], tmp_path / "attempts")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 7


def test_training_generation_and_import_need_no_network(tmp_path: Path, figure: Figure) -> None:
    record = tmp_path / "attempts"
    done = blocked(["-c", USE, str(tmp_path), str(TESTS / "data" / "diffuseq-tiny")], record)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done ")
    assert not record.exists(), record.read_text()
    figure("R23", f"training, generation, doctor and import ({how()})", "pass",
           "passed, 0 attempts to use it")  # fmt: skip


def test_the_suite_passes_without_a_network(campaign: bool, figure: Figure, tmp_path: Path) -> None:
    """All tests but this campaign, and those of servers and ranks, which need sockets of this
    machine; without --campaign a few. None may be skipped for the want of a network."""
    record = tmp_path / "attempts"
    suite = ["tests", "--ignore=tests/reliability", "-m", "not loopback"]
    suite += ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
    which = suite if campaign else ["tests/models/test_manifest.py"]
    done = blocked(
        ["-m", "pytest", "-q", "-rs", "-p", "network_block", "-p", "no:cacheprovider", *which],
        record,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed, skipped = (
        sum(map(int, re.findall(rf"(\d+) {word}", done.stdout.splitlines()[-1])))
        for word in ("passed", "skipped")
    )
    assert passed > 0
    assert not record.exists(), record.read_text()
    assert "network attempts: 0" in done.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.MULTILINE)
    of_network = re.compile("network|socket|connect|download|offline", re.IGNORECASE)
    assert [reason for reason in reasons if of_network.search(reason)] == []
    assert skipped <= MOST_SKIPPED, reasons
    if campaign:
        figure(
            "R23",
            f"the default suite but for this campaign, servers and ranks ({how()})",
            f"passes, 0 attempts, at most {MOST_SKIPPED} skipped, none for want of a network",
            f"{passed:,} tests passed, {skipped} skipped, 0 attempts",
        )
