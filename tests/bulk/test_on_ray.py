"""The command on a local Ray: a worker that is killed costs nothing but time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from installed import skip_without

from dlmone_fast.bulk import on_ray
from dlmone_fast.bulk.job import JOB_NAME, Done, Job
from dlmone_fast.bulk.shards import Shard
from dlmone_fast.errors import BackendUnavailableError, DlmOneError, UsageError
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


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--model", "missing"), 4),
        (("--num-candidates", "0"), 2),
        (("--steps", "31"), 2),
        (("--sampler", "dddim"), 2),
        (("--temperature", "-1"), 2),
        (("--dtype", "fp23"), 2),
        (("--backend", "eagre"), 2),
        (("--batch-size", "4097"), 2),
        (("--device", "cuda", "--workers", "1"), 2),
    ],
)
def test_a_slip_leaves_no_output_folder(tmp_path: Path, options: tuple[str, ...], code: int):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source, model = tmp_path / "in.jsonl", tiny.save(tmp_path / "model")
    source.write_text('{"src": "ba"}\n')
    command = [str(source), str(tmp_path / "out"), "--model", str(model), *options]
    with pytest.raises(DlmOneError) as caught:
        main(command)
    assert caught.value.exit_code == code, caught.value
    assert not (tmp_path / "out").exists()


class Cluster:
    """Ray on a machine with four GPUs, as far as the driver looks."""

    def __init__(self) -> None:
        self.connected = False

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **options: object) -> None:
        assert options == {"log_to_driver": False}
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_cluster_says_what_workers_there_are(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, model = tmp_path / "in.jsonl", tiny.save(tmp_path / "model")
    source.write_text('{"src": "ba"}\n' * 100)
    cluster, asked = Cluster(), []

    def make(job: Job, shards: list[Shard], **options: int) -> Iterator[int]:
        assert cluster.connected
        asked.append(options)
        for shard in shards:
            job.write(job.done_file(shard), [json.dumps(asdict(Done(10, 0, 0, 0.0))).encode()])
            yield shard.index

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(on_ray, "import_ray", lambda: cluster)
    monkeypatch.setattr(on_ray, "run_on_ray", make)
    out = tmp_path / "out"
    command = [str(source), str(out), "--model", str(model), "--rows-per-shard", "10"]
    assert main([*command, "--device", device]) == 0
    assert asked == [{"workers": 4, "threads": 4, "batch_size": 64}]
    assert not cluster.connected
    options = json.loads((out / JOB_NAME).read_text())["options"]
    assert (options["device"], options["dtype"], options["backend"]) == ("cuda", "bf16", "eager")
    # The same job on CPUs would write other texts.
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UsageError, match="holds a job with another device and dtype"):
        main([*command, "--device", "cpu"])
