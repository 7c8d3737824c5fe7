"""Changes that lower precision and batching make in a trained model's texts.

    python -m benchmarks.agreement runs/demo/stage2 runs/demo/data

One row for each backend and precision that runs here. Over prompts of the training split: tokens
equal to fp32's among those that are not [PAD], texts that change with the batch around them, and
what running every row alone costs. Over the test split: quality.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from dlmone_fast.cli import run_command
from dlmone_fast.comparison.quality import GRAMMAR, TEXT
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.evaluation.table import Table
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.runtime.calibration import PROMPTS
from dlmone_fast.runtime.engines import BACKENDS

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("model", help="model folder of a student")
    parser.add_argument("data_dir", help="its data")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backends", nargs="+", default=BACKENDS[1:], choices=BACKENDS[1:])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args(arguments)
    rows = load_rows(options.data_dir, "train", limit=options.prompts)
    prompts = [row.src for row in rows]
    calibration = [row.src for row in load_rows(options.data_dir, "valid", limit=PROMPTS)]
    scored = load_rows(options.data_dir, "test", limit=1000)
    reference = load_model(options.model, backend="eager", dtype="fp32")
    expected = _ids(reference, prompts, options.batch_size)
    measures = ["tokens as fp32", "texts changed by the batch", "ms a prompt", "alone", "quality"]
    table = Table(["backend", "precision", *measures], "ll" + "r" * len(measures))
    for backend, precision in itertools.product(options.backends, options.precisions):
        try:
            model = load_model(
                options.model,
                backend=backend,
                dtype=precision,
                calibration=calibration if precision == "int8" else None,
            )
        except BackendUnavailableError as error:
            print(error, file=sys.stderr)
            continue
        cells = _measured(model, reference, prompts, expected, options.batch_size)
        table.add(backend, precision, *cells, _quality(model, scored))
        print(f"{backend} {precision} done", file=sys.stderr)
        model.unload()
    print(f"{len(prompts)} prompts, batches of {options.batch_size}\n\n{table.markdown()}")
    return 0


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _ids(model: Generator, prompts: list[str], size: int, alone: bool = False) -> list[list[int]]:
    output = model.generate(
        prompts,
        seed=range(len(prompts)),
        batch_size=size,
        batch_invariant=alone,
        on_overflow="truncate",
        return_dict=True,
    )
    return output.token_ids


def _measured(
    model: Generator,
    reference: Generator,
    prompts: list[str],
    expected: list[list[int]],
    size: int,
) -> list[str]:
    _ids(model, prompts[:size], size)
    seconds = []
    found = []
    for alone in (False, True):
        started = time.perf_counter()
        found.append(_ids(model, prompts, size, alone))
        seconds.append((time.perf_counter() - started) / len(prompts))
    changed = sum(a != b for a, b in zip(*found, strict=True))
    agreement = _agreement(found[0], expected, reference.tokenizer.pad_id)
    times = [f"{1e3 * value:.2f}" for value in seconds]
    return [f"{agreement:.3%}", f"{changed} of {len(prompts)}", *times]


def _agreement(found: list[list[int]], expected: list[list[int]], pad: int) -> float:
    """Share of positions with the same id, among those where either has one that is not [PAD]."""
    pairs = [
        pair
        for ids, wanted in zip(found, expected, strict=True)
        for pair in zip(ids, wanted, strict=True)
        if pair != (pad, pad)
    ]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def _quality(model: Generator, rows: Sequence[Any]) -> str:
    quality, name = (GRAMMAR, "joint") if model.task.startswith("grammar") else (TEXT, "bleu")
    sources = [model.normalize_text(row.src) for row in rows]
    references = [[model.normalize_text(text) for text in row.references] for row in rows]
    texts = model.generate(
        [row.src for row in rows], seed=range(len(rows)), on_overflow="truncate", progress=False
    )
    scores = quality.score(sources, references, [[str(text)] for text in texts], 0)
    return f"{name} {scores[name]:.3f}"


if __name__ == "__main__":
    run_command(main)
