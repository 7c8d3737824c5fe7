"""Load tests of the server, `python -m benchmarks.serving`, about 15 minutes on 2 idle cores.

A small model takes 20,000 requests, each with a known answer, then more than it accepts; one of
BERT-base's shape is set against the bare `generate()` of the same prompts, half before and half
after. `--servers litserve ray` compares with Ray Serve instead. Prints the tables, writes a record
to benchmarks/results/serving/ and puts the tables into docs/scaling.md, between their marks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.generate_cases import prompts as questions
from benchmarks.pages import replace_section, where_measured
from benchmarks.serving_client import Load, ask, distinct
from benchmarks.serving_models import save_bert_base, save_small, small_prompts
from benchmarks.serving_packages import installed
from benchmarks.serving_setup import BATCH, SERVERS, Served
from benchmarks.serving_tables import comparison_table, load_table, overload_table
from dlmone_fast.cli import run_command
from dlmone_fast.errors import DlmOneError
from dlmone_fast.runtime import Generator, load_model

PAGE = records.ROOT / "docs" / "scaling.md"
REQUESTS, BASE_REQUESTS, OVERLOAD, ALONE = 20_000, 320, 5_000, 300
CLIENTS, OVERLOAD_CLIENTS = 2 * BATCH, 128
_LIBRARIES = ("litserve", "ray", "fastapi", "starlette", "uvicorn", "pydantic", "aiohttp")


@dataclass(frozen=True)
class Workload:
    """Requests to a model, with their known answers.

    Attributes:
        threads: of PyTorch, in the bare calls and in the servers.
        bare: seconds of the bare `generate()` for all prompts, half of it before the servers ran
            and half after; bare_cpu: its processor seconds.
    """

    name: str
    folder: Path
    prompts: list[str]
    seeds: list[int]
    threads: int
    answers: list[str] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)

    @property
    def bare_per_second(self) -> float:
        """Prompts a second of the bare `generate()`."""
        return len(self.prompts) / sum(self.bare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an answer was lost or wrong."""
    options = _options(arguments)
    load, found = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        for work in _workloads(Path(folder), options):
            found += _measured(work, options)
            print(f"{work.name}: done", file=sys.stderr)
    environment = records.environment(torch.device("cpu"), load)
    environment["libraries"] |= {name: _version(name) for name in _LIBRARIES}
    record: dict[str, Any] = {"environment": environment, "runs": found}
    if len(options.servers) > 1:
        record["packages"] = {server: installed(server) for server in options.servers}
        name, text = "serving-choice", comparison_table(found, record["packages"]).markdown()
    else:
        name, text = "serving", _tables(found)
    text = f"{_where(environment, load)}\n\n{text}"
    print(text)
    if not options.dry_run:
        replace_section(PAGE, name, text)
        print(f"written: {records.save(record, records.RESULTS / 'serving')}", file=sys.stderr)
    return int(any(run["wrong"] or run["lost"] for run in found))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--requests", type=int, default=REQUESTS, help="to the small model")
    add("--base-requests", type=int, default=BASE_REQUESTS, help="to BERT-base's shape; 0: none")
    add("--overload", type=int, default=OVERLOAD, help="requests of the overload")
    add("--servers", nargs="+", default=SERVERS[:1], choices=SERVERS)
    add("--dry-run", action="store_true", help="print, and write nothing")
    return parser.parse_args(arguments)


def _workloads(folder: Path, options: argparse.Namespace) -> list[Workload]:
    small, base = folder / "small", folder / "base"
    texts = small_prompts(save_small(small), options.requests)
    # Waiting for each other costs threads more than so small a network.
    found = [Workload("small", small, texts, list(range(options.requests)), threads=1)]
    if options.base_requests:
        save_bert_base(base)
        count = options.base_requests
        threads = torch.get_num_threads()
        found.append(Workload("BERT-base", base, questions(count), list(range(count)), threads))
    return found


def _measured(work: Workload, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A run a server between two halves of the bare calls, and what the small model has beside."""
    torch.set_num_threads(work.threads)
    generator = load_model(work.folder, "cpu", "fp32", backend="eager")
    half = len(work.prompts) // 2
    generator.warmup((BATCH,))
    runs: list[dict[str, Any]] = []
    _bare(work, generator, 0, half)
    # The answers of the second half are needed before they are timed.
    answers = _known(work, generator, half)
    for server in options.servers:
        runs += _loaded(work, server, answers, options)
    _bare(work, generator, half, len(work.prompts))
    if work.answers != answers:
        raise DlmOneError(f"{work.name}: the bare generate() did not repeat its own answers")
    for run in runs:
        run |= {"bare_per_second": work.bare_per_second, "bare_cpu": sum(work.bare_cpu),
                "bare_seconds": work.bare}  # fmt: skip
    return runs


def _known(work: Workload, generator: Generator, done: int) -> list[str]:
    rest = generator.generate(
        work.prompts[done:], seed=work.seeds[done:], batch_size=BATCH, progress=False,
        on_overflow="truncate",
    )  # fmt: skip
    return [*work.answers, *map(str, rest)]


def _bare(work: Workload, generator: Generator, first: int, last: int) -> None:
    """`generate()` of a part of the prompts, a call a batch."""
    started, cpu = time.perf_counter(), time.process_time()
    for begin in range(first, last, BATCH):
        end = min(begin + BATCH, last)
        texts = generator.generate(
            work.prompts[begin:end], seed=work.seeds[begin:end], batch_size=BATCH, progress=False
        )
        work.answers.extend(map(str, texts))
    work.bare.append(time.perf_counter() - started)
    work.bare_cpu.append(time.process_time() - cpu)


def _loaded(
    work: Workload, server: str, answers: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    with _serving(server, work.folder, work.threads) as served:
        ask(served.url, work.prompts[:BATCH], work.seeds[:BATCH], answers[:BATCH], BATCH)
        runs = [_run("load", work, server, served, answers, len(work.prompts), CLIENTS)]
        if work.name == "small":
            runs.append(_run("alone", work, server, served, answers, ALONE, 1))
    if work.name == "small" and server == "litserve" and options.overload:
        with _serving(server, work.folder, work.threads, "--max-queued", "0") as served:
            count = min(options.overload, len(work.prompts))
            runs.append(_run("overload", work, server, served, answers, count, OVERLOAD_CLIENTS))
    return runs


class _serving:  # noqa: N801
    """A server for the length of a block, stopped by SIGTERM."""

    def __init__(self, *arguments: Any) -> None:
        self.served = Served(*arguments)

    def __enter__(self) -> Served:
        return self.served

    def __exit__(self, *_: object) -> None:
        self.served.stop()


def _run(
    kind: str, work: Workload, server: str, served: Served, answers: list[str], count: int,
    clients: int,
) -> dict[str, Any]:  # fmt: skip
    print(f"{work.name}, {server}, {kind}: {count} requests", file=sys.stderr)
    cpu = served.cpu()
    load = ask(served.url, work.prompts[:count], work.seeds[:count], answers[:count], clients)
    return {
        "kind": kind, "model": work.name, "server": server, "requests": count, "clients": clients,
        "distinct": distinct(answers[:count]), "server_cpu": served.cpu() - cpu,
        "processes": served.processes(), "megabytes": served.megabytes(),
        "start_seconds": served.start_seconds, **_figures(load),
    }  # fmt: skip


def _figures(load: Load) -> dict[str, Any]:
    kept = {k: v for k, v in asdict(load).items() if k != "latencies"}
    milliseconds = {
        str(status): {"p50": load.quantile(0.5, status), "p99": load.quantile(0.99, status),
                      "max": load.quantile(1, status)}
        for status in load.latencies
    }  # fmt: skip
    return {
        **kept, "statuses": {str(s): n for s, n in load.statuses.items()},
        "per_second": load.per_second, "ms": milliseconds,
    }  # fmt: skip


def _tables(found: list[dict[str, Any]]) -> str:
    tables = [load_table(found)]
    if any(run["kind"] == "overload" for run in found):
        tables.append(overload_table(found))
    return "\n\n".join(table.markdown() for table in tables)


def _where(environment: dict[str, Any], load: float) -> str:
    libraries = environment["libraries"]
    used = ", ".join(f"{name} {libraries[name]}" for name in _LIBRARIES if libraries[name])
    beside = "" if load <= environment["cores"] / 2 else f" Beside other work: load {load:.1f}."
    return f"{where_measured(environment)} {used}.{beside}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_command(main)
