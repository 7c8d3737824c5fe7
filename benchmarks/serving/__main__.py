"""Load tests of the server, `python -m benchmarks.serving`, about 6 minutes on 2 idle cores.

A small model takes 20,000 requests, each with a known answer, then more than it accepts; one of
BERT-base's shape is set against the bare `generate()` of the same prompts, by turns.
`--servers litserve ray` compares with Ray Serve instead. Prints the tables, writes a record
to benchmarks/results/serving/ and puts the tables into docs/scaling.md, between their marks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from benchmarks.generate.cases import prompts as questions
from benchmarks.harness import records
from benchmarks.harness.sections import replace_section, where_measured
from benchmarks.serving.client import Load, ask, distinct
from benchmarks.serving.models import save_bert_base, save_small, small_prompts
from benchmarks.serving.setup import BATCH, SERVERS, Served
from benchmarks.serving.tables import comparison_table, load_table, overload_table
from dlmone_fast.cli import run_command
from dlmone_fast.release.environment import environment
from dlmone_fast.runtime import Generator, load_model

PAGE = records.ROOT / "docs" / "scaling.md"
REQUESTS, BASE_REQUESTS, OVERLOAD, ALONE = 20_000, 320, 5_000, 300
CLIENTS, OVERLOAD_CLIENTS, ROUNDS = 2 * BATCH, 128, 5
_REQUIREMENTS = {"litserve": "litserve", "ray": "ray[serve]"}
_LIBRARIES = ("litserve", "ray", "fastapi", "starlette", "uvicorn", "pydantic", "aiohttp")


@dataclass(frozen=True)
class Workload:
    """Requests to a model.

    Attributes:
        threads: of PyTorch, in the bare calls and in the servers.
    """

    name: str
    folder: Path
    prompts: list[str]
    seeds: list[int]
    threads: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if an answer was lost or wrong."""
    options = _options(arguments)
    load, found = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder:
        for work in _workloads(Path(folder), options):
            found += _measured(work, options)
            print(f"{work.name}: done", file=sys.stderr)
    where = environment(torch.device("cpu"), load)
    where["libraries"] |= {name: _version(name) for name in _LIBRARIES}
    record: dict[str, Any] = {"environment": where, "runs": found}
    if len(options.servers) > 1:
        record["packages"] = {server: _installed(server) for server in options.servers}
        name, text = "serving-choice", comparison_table(found, record["packages"]).markdown()
    else:
        name, text = "serving", _tables(found)
    text = f"{_where(where, load)}\n\n{text}"
    if not options.dry_run:
        replace_section(PAGE, name, text)
        print(f"written: {records.save(record, records.RESULTS / 'serving')}", file=sys.stderr)
    print(text)
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
    """A run a server, and what the small model has beside."""
    torch.set_num_threads(work.threads)
    generator = load_model(work.folder, "cpu", "fp32", backend="eager")
    generator.warmup((BATCH,))
    runs: list[dict[str, Any]] = []
    for server in options.servers:
        runs += _loaded(work, server, generator, options)
    return runs


def _loaded(
    work: Workload, server: str, generator: Generator, options: argparse.Namespace
) -> list[dict[str, Any]]:
    with _serving(server, work.folder, work.threads) as served:
        runs, answers = [], _bare(work, generator, 0, BATCH)[0]
        ask(served.url, work.prompts[:BATCH], work.seeds[:BATCH], answers, BATCH)
        run, answers = _by_turns(work, server, generator, served)
        runs.append(run)
        if work.name == "small":
            runs.append(_run("alone", work, server, served, answers[:ALONE], 1))
    if work.name == "small" and server == "litserve" and options.overload:
        with _serving(server, work.folder, work.threads, "--max-queued", "0") as served:
            some = answers[: options.overload]
            runs.append(_run("overload", work, server, served, some, OVERLOAD_CLIENTS))
    return runs


def _by_turns(
    work: Workload, server: str, generator: Generator, served: Served
) -> tuple[dict[str, Any], list[str]]:
    """The bare calls and the server on the same prompts, by turns, part by part.

    Turns are fair to both, since other work on the machine comes and goes.
    """
    load, answers, cpu = Load(), list[str](), 0.0
    bare: dict[str, list[float]] = {"seconds": [], "cpu": [], "overheads": []}
    size = -(-len(work.prompts) // ROUNDS)
    for first in range(0, len(work.prompts), size):
        last = min(first + size, len(work.prompts))
        part, seconds, spent = _bare(work, generator, first, last)
        answers += part
        before = served.cpu()
        more = ask(served.url, work.prompts[first:last], work.seeds[first:last], part, CLIENTS)
        cpu += served.cpu() - before
        load.add(more)
        bare["seconds"].append(seconds)
        bare["cpu"].append(spent)
        bare["overheads"].append(1 - seconds / more.seconds)
        print(
            f"{work.name}, {server}: {last} of {len(work.prompts)}, bare {seconds:.1f} s, served "
            f"{more.seconds:.1f} s", file=sys.stderr,
        )  # fmt: skip
    beside = {"bare": bare, "bare_per_second": len(answers) / sum(bare["seconds"])}
    return _described("load", work, server, served, CLIENTS, answers, load, cpu) | beside, answers


def _bare(
    work: Workload, generator: Generator, first: int, last: int
) -> tuple[list[str], float, float]:
    """`generate()` of a part of the prompts, a call a batch: answers, seconds, CPU seconds."""
    answers: list[str] = []
    started, cpu = time.perf_counter(), time.process_time()
    for begin in range(first, last, BATCH):
        end = min(begin + BATCH, last)
        texts = generator.generate(
            work.prompts[begin:end], seed=work.seeds[begin:end], batch_size=BATCH, progress=False
        )
        answers.extend(map(str, texts))
    return answers, time.perf_counter() - started, time.process_time() - cpu


class _serving:  # noqa: N801
    """A server for the length of a block, stopped by SIGTERM."""

    def __init__(self, *arguments: Any) -> None:
        self.served = Served(*arguments)

    def __enter__(self) -> Served:
        return self.served

    def __exit__(self, *_: object) -> None:
        self.served.stop()


def _run(
    kind: str, work: Workload, server: str, served: Served, answers: list[str], clients: int
) -> dict[str, Any]:
    count, cpu = len(answers), served.cpu()
    print(f"{work.name}, {server}, {kind}: {count}", file=sys.stderr)
    load = ask(served.url, work.prompts[:count], work.seeds[:count], answers, clients)
    return _described(kind, work, server, served, clients, answers, load, served.cpu() - cpu)


def _described(
    kind: str, work: Workload, server: str, served: Served, clients: int, answers: list[str],
    load: Load, cpu: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "kind": kind, "model": work.name, "server": server, "requests": len(answers),
        "clients": clients, "distinct": distinct(answers), "server_cpu": cpu,
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
    beside = "" if load <= environment["cores"] / 2 else f" Load average before it: {load:.1f}."
    return f"{where_measured(environment)} {used}.{beside}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _installed(server: str) -> dict[str, float]:
    """The number of packages installed for a server, itself included, and their MB on disk."""
    found: dict[str, float] = {}
    _walk(Requirement(_REQUIREMENTS[server]), found)
    return {"packages": len(found), "megabytes": sum(found.values()) / 1e6}


def _walk(wanted: Requirement, found: dict[str, float]) -> None:
    name = wanted.name.lower().replace("_", "-")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    if name not in found:
        files = package.files or []
        found[name] = sum(file.size or 0 for file in files)
    elif not wanted.extras:
        return
    for text in package.requires or []:
        needed = Requirement(text)
        extras = wanted.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
            known = needed.name.lower().replace("_", "-") in found
            if not known or needed.extras:
                _walk(needed, found)


if __name__ == "__main__":
    run_command(main)
