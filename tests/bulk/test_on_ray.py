"""The command on a local Ray: a worker that is killed costs nothing but time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
from installed import skip_without

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.generate_bulk import main

skip_without("ray")
TIMEOUT = 300


def command(source: Path, output: Path, model: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "dlmone_fast.generate_bulk", str(source), str(output),
        "--model", str(model), "--rows-per-shard", "200", "--backend", "eager", *options,
    ]  # fmt: skip


def texts(output: Path) -> dict[str, str]:
    """Text by row id, each once."""
    found: dict[str, str] = {}
    for part in output.glob("part-??????.jsonl"):
        for line in part.read_text().splitlines():
            row = json.loads(line)
            assert row["row_id"] not in found
            found[row["row_id"]] = row["generated"]
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    # Ray writes into the home folder.
    return {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}


@pytest.mark.loopback
def test_a_killed_worker_loses_and_doubles_no_row(tmp_path: Path, environment: dict[str, str]):
    source, model = tmp_path / "in.jsonl", tiny.save(tmp_path / "model")
    rows = [json.dumps({"src": text}) for text in tiny.prompts(3000)]
    rows[1234] = "no row"
    source.write_text("\n".join(rows))
    output, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(source, output, model, "--workers", "2", "--batch-size", "4"),
            env=environment, stderr=stderr,
        )  # fmt: skip
    try:
        until = time.monotonic() + TIMEOUT
        while len(list(output.glob("*.done.json"))) < 2 and process.poll() is None:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "MapWorker" in " ".join(child.cmdline())
        ]
        assert workers, "no worker found to kill"
        workers[0].send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT) == 0, log.read_text()
    finally:
        process.kill()
    assert "2,999 rows written, 1 rejected" in log.read_text()
    found = texts(output)
    assert len(found) == 2999
    # One process without Ray's workers would write the same.
    generator = tiny.generator()
    from dlmone_fast.bulk.worker import id_seed

    some = [f"in.jsonl:{n}" for n in (0, 777, 2999)]
    for name in some:
        text = json.loads(rows[int(name.split(":")[1])])["src"]
        batch = generator.generate_candidates(
            [text], seeds=[id_seed(0, name)], on_overflow="truncate", progress=False
        )
        assert found[name] == batch.texts[0][0]


def test_without_ray_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, model = tmp_path / "in.jsonl", tiny.save(tmp_path / "model")
    source.write_text('{"src": "ba"}\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'dlmone_fast\[ray\]'"):
        main([str(source), str(tmp_path / "out"), "--model", str(model)])
