"""R16, R17 and R20: what a GPU's tools, poisoned memory and a full device say of the kernels."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from kernel_cases import CASES, launches, runnable

from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.kernels.triton import support
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime import Generator
from dlmone_fast.runtime.engines import EngineRequest, make_engine, why_unavailable
from dlmone_fast.runtime.engines.graph import GraphEngine, GraphRunner
from dlmone_fast.runtime.pipeline import Pipeline

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DIFFERENT = 0.002
"""Share of texts that near ties may change where products round otherwise."""

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

REVIEWED_RACES: frozenset[str] = frozenset()
"""Kernels whose reports by racecheck were read and found to be none; it knows no bulk copies."""


@contextmanager
def poison(filling: bool = True) -> Iterator[None]:
    """What is allocated within the block holds NaN, or the largest integer, before it is written.

    Also where a graph is captured: it then fills its memory at each replay.
    """
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = filling
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was
        torch.use_deterministic_algorithms(False)


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:.*determinis.*:UserWarning")
def test_kernels_write_all_of_their_results_from_poisoned_memory(campaign, figure):  # type: ignore[no-untyped-def]
    interpreted = DEVICE.type == "cpu"
    if interpreted and not campaign:
        pytest.skip("interpreted kernels are part of the full counts; tests/kernels has them, too")
    ran = runnable(DEVICE)
    if not ran:
        pytest.skip(f"no kernel can run here: {support.usable(torch.zeros(1, device=DEVICE))}")
    calls = 2 if interpreted else 1_000 if campaign else 20
    with poison(), launches() as launched:
        for name, backend in ran:
            run = CASES[name][1]
            first = run(DEVICE, backend)
            for found, plain in zip(first, run(torch.device("cpu"), "torch"), strict=True):
                size = float(plain.abs().nan_to_num(posinf=0).max())
                # NaN and the largest integer are far from everything.
                torch.testing.assert_close(found.cpu(), plain, rtol=2e-3, atol=2e-3 * size)
            for number in range(1, calls):
                assert same_bits(run(DEVICE, backend), first), f"{name}, {backend}, call {number}"
    from dlmone_fast.kernels.triton import aot

    shipped = {build.kernel.__name__ for build in aot.shipped_builds(aot.kernel_modules())}
    assert launched == shipped, "a kernel has no case"
    figure(
        "R17",
        "kernels, interpreted on a CPU" if interpreted else "kernels",
        f"outputs and scratch hold NaN before each of {calls:,} calls, results unchanged",
        f"{len(launched)} Triton kernels"
        + (", the CUDA kernels" if any(backend == "cuda" for _, backend in ran) else "")
        + f": {len(ran)} cases, {calls:,} calls each, 0 differ",
        in_part=interpreted,
    )


@torch.inference_mode()
def fill(runner: GraphRunner) -> None:
    """Overwrite the memory that its recordings read their inputs from and leave results in."""
    for recording in runner._recordings.values():
        for memory in vars(recording).values():
            if isinstance(memory, torch.Tensor):
                memory.view(-1).view(torch.uint8).fill_(0xFF)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def graph_runner(denoiser: Denoiser, pipeline: Pipeline, filling: bool) -> GraphRunner:
    """A runner whose graphs were captured, each bucket once."""
    runner = GraphEngine(denoiser, "fp32").runner()
    with poison(filling):
        for rows in (1, 2, 3, 5, 9):
            runner.ids(pipeline, tiny.row_batch(rows))
            runner.predict(*network_inputs(rows))
    return runner


def network_inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(rows)
    x_t = torch.randn(rows, tiny.SEQ_LEN, 16, generator=numbers)
    return x_t.to(DEVICE), torch.randint(0, 40, (rows,), generator=numbers).to(DEVICE)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*determinis.*:UserWarning")
def test_replays_from_poisoned_memory_are_unchanged(campaign, figure):  # type: ignore[no-untyped-def]
    denoiser = tiny.denoiser().to(DEVICE)
    reason = why_unavailable("graph", EngineRequest(denoiser, "fp32"))
    if reason:
        pytest.skip(reason)
    calls = check_replays(denoiser, 1_000 if campaign else 50)
    figure(
        "R17",
        "CUDA graphs",
        f"inputs, results and scratch poisoned before each of {calls:,} replays, results unchanged",
        f"{calls:,} replays of whole generations and as many of network calls, 0 differ",
    )


@torch.inference_mode()
def check_replays(denoiser: Denoiser, calls: int) -> int:
    """The calls, after comparing poisoned replays with those of a plain graph."""
    pipeline = Pipeline(denoiser.schedule, Vocabulary(denoiser.embedding), 30, 3, False)
    plain = graph_runner(denoiser, pipeline, filling=False)
    batches = [tiny.row_batch(1 + number % 9, 3, seed=number) for number in range(27)]
    expected = [plain.ids(pipeline, batch)[0] for batch in batches]
    eager = make_engine("eager", EngineRequest(denoiser, "fp32")).runner()
    found = [eager.ids(pipeline, batch)[0] for batch in batches]
    # A product may round otherwise in another bucket, which a near tie may show.
    assert (torch.cat(found) == torch.cat(expected)).float().mean() > 0.998
    predictions = [plain.predict(*network_inputs(len(batch))) for batch in batches]
    poisoned = graph_runner(denoiser, pipeline, filling=True)
    for number in range(calls):
        place = number % len(batches)
        fill(poisoned)
        ids = poisoned.ids(pipeline, batches[place])[0]
        assert torch.equal(ids, expected[place]), f"replay {number}"
        fill(poisoned)
        predicted = poisoned.predict(*network_inputs(len(batches[place])))
        assert same_bits([predicted], [predictions[place]]), f"network call {number}"
    return calls


def sanitizer() -> str | None:
    """CUDA's compute-sanitizer, on the PATH or in the toolkit."""
    folders = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "") + "/bin"]
    return shutil.which("compute-sanitizer", path=":".join([*folders, "/usr/local/cuda/bin"]))


@functools.cache
def run_cases(*command: str) -> tuple[str, list[str]]:
    """The output of kernel_cases.py, run by a tool, and the Triton kernels that it launched."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    if DEVICE.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    # Each tensor has an allocation of its own, beyond whose end a tool sees every access.
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, sys.executable, str(HERE / "kernel_cases.py"), DEVICE.type],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return done.stdout + done.stderr, json.loads(told)["triton"]


BANNERS = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Warning:")
# A kernel's name and offset, or as older versions of the tool write it.
PLACE = re.compile(r"\bat (\S.*\+0x[0-9a-f]+|0x[0-9a-f]+ in \S.*)")


@dataclass(frozen=True)
class Reports:
    """What a tool reported.

    Attributes:
        errors: how many, by its own summary.
        own: names of this package's kernels that have any.
        of_others: reports that name another kernel.
        unattributed: first lines of those that name none, such as of launches and of the API.
    """

    errors: int
    own: frozenset[str] = frozenset()
    of_others: int = 0
    unattributed: tuple[str, ...] = ()


def reported(log: str, kernels: list[str]) -> Reports:
    """The reports of a tool's log, told apart by the kernels that they name."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    assert summary, f"the tool gave no summary:\n{log[-4000:]}"
    own = re.compile(rf"\b({'|'.join(map(re.escape, kernels))}|dlmone::\w+)\b")
    named: set[str] = set()
    of_others, unattributed = 0, []
    for first, lines in reports_of(log):
        text = "\n".join(line for line in (first, *lines) if "Host Frame" not in line)
        places = PLACE.findall(text)
        names = {name for place in places for name in own.findall(place)}
        named |= names
        if not names and places:
            of_others += 1
        elif not names:
            unattributed.append(first)
    missing = int(summary[1]) > 0 and not (named or of_others or unattributed)
    if missing or "were not printed" in log:
        unattributed.append("reports that were not printed")
    return Reports(int(summary[1]), frozenset(named), of_others, tuple(unattributed))


def reports_of(log: str) -> Iterator[tuple[str, list[str]]]:
    """The first line of each report, and the indented ones below it."""
    first, lines = "", list[str]()
    for line in (*re.findall(r"^========= ?(.*)$", log, re.MULTILINE), "the end"):
        if line.startswith(" "):
            lines.append(line)
        elif line:
            if first:
                yield first, lines
            first, lines = ("" if line.startswith(BANNERS) else line), []


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
@needs_gpu
def test_the_sanitizer_finds_nothing(campaign, figure, tool):  # type: ignore[no-untyped-def]
    found = sanitizer()
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    if tool != "memcheck" and not campaign:
        pytest.skip("part of the full counts")
    # Once by itself: compiling under the tool would take minutes.
    _, kernels = run_cases()
    log, _ = run_cases(found, "--tool", tool, "--print-limit", "0")
    reports = reported(log, kernels)
    reviewed = REVIEWED_RACES if tool == "racecheck" else frozenset()
    assert reports.own <= reviewed, log[-8000:]
    assert reports.unattributed == (), reports.unattributed
    figure(
        "R16",
        tool,
        "0 errors in the package's kernels, and none without a kernel's name",
        f"{len(kernels)} Triton kernels in {len(CASES)} cases: {len(reports.own)} with reports"
        + (f"; {reports.of_others} reports of kernels of others" if reports.of_others else ""),
    )


LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at {kernel}+0x1230 in nearest_token.py:90
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: launch at _search_kernel [0x1]
========= ERROR SUMMARY: 1 error
"""


API = """\
========= COMPUTE-SANITIZER
========= Program hit cudaErrorInvalidValue (error 1) due to "invalid argument" on CUDA API call.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: launch at _search_kernel+0x1230 [0x1]
=========
========= ERROR SUMMARY: 1 error
"""


def test_reports_are_told_apart() -> None:
    names = ["_search_kernel", "distillation_whole"]
    log = LOG.format(kernel="_search_kernel")
    assert reported(log, names) == Reports(1, frozenset({"_search_kernel"}))
    assert reported(LOG.format(kernel="at::native::fill"), names) == Reports(1, of_others=1)
    log = LOG.format(kernel="void dlmone::search<3>(int)")
    assert reported(log, names).own == {"dlmone::search"}
    race = (
        "========= Error: Race reported between Write access at distillation_whole+0x10 in a.py:1\n"
        "=========     and Read access at distillation_whole+0x90 in a.py:2 [4 hazards]\n"
        "=========\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    assert reported(race, names) == Reports(1, frozenset({"distillation_whole"}))
    assert reported("========= ERROR SUMMARY: 0 errors\n", names) == Reports(0)
    with pytest.raises(AssertionError, match="no summary"):
        reported("Segmentation fault", names)


def test_a_report_without_a_kernel_is_not_left_out() -> None:
    (first,) = reported(API, ["_search_kernel"]).unattributed
    assert first.startswith("Program hit cudaErrorInvalidValue")
    both = LOG.format(kernel="at::native::fill").replace("========= ERROR SUMMARY: 1 error\n", API)
    found = reported(both, ["_search_kernel"])
    assert (found.own, found.of_others, len(found.unattributed)) == (frozenset(), 1, 1)
    none, some = "========= ERROR SUMMARY: 0 errors\n", "========= ERROR SUMMARY: 3 errors"
    failed = "========= Internal Sanitizer Error: The tool has failed.\n"
    for log in (f"{some}\n", f"{some}\n{some} were not printed.\n", failed + none):
        assert len(reported(log, []).unattributed) == 1


def wide(backend: str) -> Generator:
    """A model whose batches take far more memory than its weights."""
    sizes = {"hidden_size": 512, "ffn_size": 4096, "num_heads": 8}
    network = tiny.denoiser(**sizes).to(DEVICE)
    return Generator(network, tiny.tokenizer(), tiny.settings(), backend=backend)


def held() -> int:
    """Bytes of the device that torch keeps when all that is free was given back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@contextmanager
def limited_to(size: int) -> Iterator[None]:
    """Within the block torch may hold so many bytes of the device."""
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, size / torch.cuda.get_device_properties(0).total_memory)
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
@pytest.mark.parametrize(("backend", "rows"), [("eager", 2048), ("graph", 512)])
def test_a_batch_beyond_the_memory_is_generated_in_parts(caplog, figure, backend, rows):  # type: ignore[no-untyped-def]
    reason = why_unavailable(backend, EngineRequest(tiny.denoiser().to(DEVICE), "fp32"))
    if reason:
        pytest.skip(reason)
    prompts = tiny.prompts(rows)

    def texts(generator: Generator, count: int = rows) -> list[str]:
        return list(
            generator.generate(prompts[:count], seed=range(count), batch_size=rows, progress=False)
        )

    generator = wide(backend)
    before = held()
    torch.cuda.reset_peak_memory_stats()
    expected = texts(generator)
    needed = torch.cuda.max_memory_reserved() - before
    for share in (0.6, 0.4, 0.25, 0.15):
        generator.unload()
        generator = wide(backend)
        caplog.clear()
        with (
            limited_to(held() + int(share * needed)),
            caplog.at_level(logging.WARNING, "dlmone_fast"),
        ):
            found = texts(generator)
            next_found = texts(generator, 64)
        if "do not fit into the device's memory" in caplog.text:
            break
    else:
        pytest.fail(f"{needed / 2**20:.0f} MiB were needed, and {share:.0%} of them were enough")
    # A product rounds otherwise in parts of another size, which a near tie may show.
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    assert differ <= DIFFERENT * rows
    assert sum(a != b for a, b in zip(next_found, expected[:64], strict=True)) <= 1
    with limited_to(held()):
        try:
            outcome = f"{len(texts(generator))} texts"
        except torch.OutOfMemoryError:
            outcome = "OutOfMemoryError"
    after = texts(generator, 64)
    assert sum(a != b for a, b in zip(after, expected[:64], strict=True)) <= 1
    generator.unload()
    figure(
        "R20",
        f"{backend}, fp32",
        f"completes in parts, at most {DIFFERENT:.1%} of the texts differ; the next call works, at "
        "most one of its 64 texts differs",
        f"{rows} rows in {share:.0%} of the {needed / 2**20:.0f} MiB that they take at once: "
        f"{caplog.text.count('do not fit')} times smaller parts, {differ} texts differ; with no "
        f"memory left {outcome}, and the next call works",
    )
