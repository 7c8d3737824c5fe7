"""Several ranks train what one does: equal sums, one writer, one verdict, no hang."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import EXIT_INTERRUPTED_SAVED, EXIT_RANK_LOST, UsageError
from dlmone_fast.models.checkpoint import list_checkpoints
from dlmone_fast.training import ranks
from dlmone_fast.training.ranks import Ranks, open_ranks

pytestmark = pytest.mark.loopback
PROCESS = Path(__file__).with_name("rank_process.py")
ROOT = PROCESS.parents[2]
TIMEOUT = 120
PHASES = ("teacher", "stage1", "stage2")

Weights = Callable[[Path], dict[str, Tensor]]


Start = Callable[[str, Path, int], list[tuple[int, str]]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs a scenario on some ranks; exit code and stderr of each."""
    logs = tmp_path_factory.mktemp("logs")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    server = subprocess.Popen(
        [sys.executable, str(PROCESS)], text=True, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(scenario: str, folder: Path, size: int) -> list[tuple[int, str]]:
        files = [logs / f"{scenario}-{folder.name}-{n}" for n in range(size)]
        request = {
            "scenario": scenario, "folder": str(folder), "variables": variables(size),
            "logs": [str(file) for file in files],
        }  # fmt: skip
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        assert select.select([stdout], [], [], TIMEOUT)[0], "the ranks do not end"
        codes = json.loads(stdout.readline())
        return [(code, file.read_text()) for code, file in zip(codes, files, strict=True)]

    yield run
    # With all ranks that still run.
    os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


def variables(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of some ranks; a single one is told nothing."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(size)]


def measured(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What metrics.jsonl says of each step, without times; each line stands once."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        at = found.setdefault((record.pop("phase"), record.pop("step")), {})
        values = {k: v for k, v in record.items() if k not in ("seconds", "samples_per_second")}
        assert not (at.keys() & values.keys()) - {"rows"}, "logged twice"
        at.update(values)
    return found


@pytest.fixture(scope="module")
def one(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, whose batches of 8 are accumulated in threes."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    assert start("whole", folder, 1)[0][0] == 0
    return folder


def test_two_ranks_train_what_one_does(
    start: Start, one: Path, tmp_path: Path, weights: Weights
) -> None:
    # Micro-batches of 3 rows: one rank makes 3, 3 and 2, each of two ranks 3 and 1.
    folder = tmp_path / "two"
    assert [code for code, _ in start("whole", folder, 2)] == [0, 0]
    expected, found = measured(one), measured(folder)
    assert found.keys() == expected.keys()
    for at, values in expected.items():
        for name, value in values.items():
            # A median of the first micro-batch, and of others: those differ.
            if isinstance(value, float) and name != "weight_max_over_median":
                assert found[at][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (at, name)
            elif isinstance(value, list):
                assert found[at][name] == value, (at, name)
    for phase in PHASES:
        a, b = weights(one / phase), weights(folder / phase)
        # Adam divides by a gradient's own size, so that rounding of tiny ones shows.
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5, phase


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert [code for code, _ in start("not_finite", folder, 2)] == [0, 0]
    found = measured(folder)
    # The third of seven updates; the count stays.
    assert "skipped" not in found["teacher", 2]
    assert "gradient_norm" not in found["teacher", 3]
    assert found["teacher", 7]["skipped"] == 1
    assert found["teacher", 7]["gradient_norm"] > 0
    assert found["stage1", 7]["skipped"] == 1


def test_a_rank_that_dies_ends_the_others_with_a_reason(start: Start, tmp_path: Path) -> None:
    (first, text), (second, _) = start("killed", tmp_path / "run", 2)
    assert second == -9
    assert first == EXIT_RANK_LOST
    assert "another rank of this run has ended or does not answer" in text
    assert "start torchrun again with the same command" in text
    # Steps 1 to 3 were made, of which 2 is a checkpoint's.
    assert list_checkpoints(tmp_path / "run" / "checkpoints" / "teacher")[-1][0] == 2


def test_sigterm_to_one_rank_saves_and_ends_all_and_another_number_of_ranks_goes_on(
    start: Start, one: Path, tmp_path: Path, weights: Weights
) -> None:
    folder = tmp_path / "run"
    ended = start("terminated", folder, 2)
    assert [code for code, _ in ended] == [EXIT_INTERRUPTED_SAVED] * 2
    assert "after 4 of 7 steps of teacher; saved" in ended[0][1]
    assert list_checkpoints(folder / "checkpoints" / "teacher")[-1][0] == 4
    assert [code for code, _ in start("whole", folder, 3)] == [0, 0, 0]
    a, b = weights(one / "stage2"), weights(folder / "stage2")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


def test_a_batch_smaller_than_the_ranks_is_refused_by_all(start: Start, tmp_path: Path) -> None:
    for code, text in start("small_batch", tmp_path / "run", 2):
        assert code == UsageError.exit_code
        assert "batch_size is 1, and the run has 2 ranks" in text


def test_the_parts_of_all_ranks_are_everything_once() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 2, 6, 7, 8, 29):
            parts = [list(range(count))[Ranks(rank, size).part(count)] for rank in range(size)]
            assert [item for part in parts for item in part] == list(range(count))
            lengths = [len(part) for part in parts]
            assert max(lengths) - min(lengths) <= 1


def test_alone_everything_is_as_it_was() -> None:
    alone = Ranks()
    value = torch.tensor([1.5])
    assert alone.sum(value) is value
    assert alone.gather({"a": float("nan")}) is not None
    assert alone.gather_rows(value) is value
    assert alone.any(True, False) == [True, False]
    assert alone.largest(2.5) == 2.5
    assert alone.micro_batch(3) == 3
    assert alone.writes


def test_incomplete_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UsageError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        open_ranks("cpu", 1.0),
    ):
        pass


def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(ranks, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(5, 8).device("cuda") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(UsageError, match="'cuda:0' is one GPU, and the run has 8 ranks"):
        Ranks(5, 8).device("cuda:0")
    assert Ranks(5, 8).device("cpu") == torch.device("cpu")
