"""Word error rates against milliseconds: every system of the task `g2p` on the same test words.

    python -m benchmarks.pronunciation --data-dir G2P --run runs/g2p \\
        --control runs/g2p-control --rival runs/ar-0/model --rival runs/ar-1/model

The run's teacher at 20, 5 and 1 calls and its student; the student of a control run (one pass
without z, trained on the same rows); autoregressive models, greedy and with a beam of 4, and the
majority of their greedy answers where there are several; published figures beside them. A system
that draws is scored on one draw a word (WER, PER) and on five (oracle: none of them is right).
Milliseconds are medians of whole calls, one word each; words a second are for batches of 512.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dlmone_fast.autoregressive import Autoregressive, load_autoregressive

from dlmone_fast.cli import run_command
from dlmone_fast.data.rows import Row, load_rows
from dlmone_fast.evaluation.pronunciation import score_pronunciations
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.evaluation.table import Table
from dlmone_fast.files import write_atomically
from dlmone_fast.release.environment import environment
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.tasks.g2p import PUBLISHED

DRAWS = 5
TEACHER_CALLS = (20, 5, 1)
_BATCH = 512
_TIMED_WORDS = 200
_WARM = 20

Answer = Callable[[Sequence[str], int], list[list[str]]]


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: its title.
        calls: network calls a word; None where they depend on the word.
        answer: (words, draws) → that many pronunciations of each word.
        draws: whether it has more than one answer to a word.
    """

    name: str
    calls: int | None
    answer: Answer
    draws: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = load_rows(options.data_dir, options.split, options.rows or None)
    measured = []
    for system in systems(options, rows):
        print(f"measuring {system.name}", file=sys.stderr, flush=True)
        measured.append(measure(system, rows, options.bootstrap))
    print(table(measured).markdown())
    if options.output:
        found = {"environment": environment(torch.device("cpu")), "rows": measured}
        write_atomically(Path(options.output), [json.dumps(found, indent=1).encode()])
    return 0


def systems(options: argparse.Namespace, rows: Sequence[Row]) -> list[System]:
    """The systems that the command line names, in the table's order."""
    result: list[System] = []
    if options.run:
        teacher = load_model(Path(options.run) / "teacher", "cpu", options.dtype, backend="eager")
        for calls in TEACHER_CALLS:
            how = {"steps": calls, "sampler": "q-sampling", "temperature": options.temperature}
            result.append(_drawing(f"teacher, T {options.temperature:g}", calls, teacher, **how))
    students = [("student", options.student or options.run), ("control", options.control)]
    for name, run in students:
        if run:
            folder = Path(run) / "stage2" if (Path(run) / "stage2").exists() else run
            result.append(_drawing(name, 1, load_model(folder, "cpu", options.dtype)))
    rivals = [load_autoregressive(folder) for folder in options.rival]
    for number, rival in enumerate(rivals):
        title = "autoregressive" + (f" {number}" if len(rivals) > 1 else "")
        result += [
            System(f"{title}, greedy", None, partial(_rival, rival, "greedy"), False),
            System(f"{title}, beam 4", None, partial(_rival, rival, "beam"), False),
        ]
    if len(rivals) > 1:
        name = f"majority of {len(rivals)} autoregressive models"
        result.append(System(name, None, partial(_majority, rivals), False))
    return result


def measure(system: System, rows: Sequence[Row], bootstrap: int) -> dict[str, Any]:
    """Scores, intervals, milliseconds a word and words a second of a system."""
    words = [row.src for row in rows]
    references = [row.refs or (row.trg,) for row in rows]
    candidates = system.answer(words, DRAWS if system.draws else 1)
    first = [[texts[0]] for texts in candidates]
    scores = score_pronunciations(references, first, bootstrap=bootstrap)
    if system.draws:
        several = score_pronunciations(references, candidates, bootstrap=0)
        scores |= {name: several[name] for name in ("oracle_wer", "distinct")}
    return {
        "system": system.name, "calls": system.calls, "words": len(words), **scores,
        "ms": 1000 * _seconds_alone(system, words), "words_per_second": _throughput(system, words),
    }  # fmt: skip


def table(measured: Sequence[dict[str, Any]]) -> Table:
    """The measured systems, then the published ones."""
    columns = ["system", "calls", "WER", "PER", f"oracle of {DRAWS}", "distinct", "ms", "words/s"]
    result = Table(columns)
    for row in measured:
        low, high = row["intervals"]["wer"]
        result.add(
            row["system"], row["calls"], f"{row['wer']:.3f} ± {(high - low) / 2:.3f}",
            f"{row['per']:.4f}", _number(row["oracle_wer"], 3), _number(row["distinct"], 2),
            f"{row['ms']:.2f}", f"{row['words_per_second']:,.0f}",
        )  # fmt: skip
    for known in PUBLISHED:
        title = f"{known.system} ({known.source})"
        per = _number(known.per, 3)
        result.add(title, None, f"{known.wer:.3f}", per, None, None, None, None)
    return result


def _drawing(name: str, calls: int, model: Generator, **how: Any) -> System:
    def answer(words: Sequence[str], draws: int) -> list[list[str]]:
        seeds = row_seeds(0, len(words))
        return model.generate_candidates(
            words, num_candidates=draws, seeds=seeds, batch_size=_BATCH, progress=False, **how
        ).texts

    return System(name, calls, answer)


def _rival(model: Autoregressive, method: str, words: Sequence[str], _: int) -> list[list[str]]:
    texts = model.generate(list(words), method=method, batch_size=_BATCH)
    return [[text] for text in texts]


def _majority(
    models: Sequence[Autoregressive], words: Sequence[str], draws: int
) -> list[list[str]]:
    answers = [_rival(model, "greedy", words, draws) for model in models]
    votes = [Counter(texts[0] for texts in of_word) for of_word in zip(*answers, strict=True)]
    # Of equally many votes, those of the model that stands first win: Counter keeps that order.
    return [[count.most_common(1)[0][0]] for count in votes]


def _seconds_alone(system: System, words: Sequence[str]) -> float:
    times = []
    for word in words[: _WARM + _TIMED_WORDS]:
        start = time.perf_counter()
        system.answer([word], 1)
        times.append(time.perf_counter() - start)
    return median(times[_WARM:] or times)


def _throughput(system: System, words: Sequence[str]) -> float:
    batch = list(words[: 8 * _BATCH])
    system.answer(batch[:_BATCH], 1)
    start = time.perf_counter()
    system.answer(batch, 1)
    return len(batch) / (time.perf_counter() - start)


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pronunciation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with the test words")
    add("--run", default="", help="folder of a finished run of the preset g2p")
    add("--student", default="", help="another student than the run's: a model folder")
    add("--control", default="", help="folder of the control run")
    add("--rival", action="append", default=[], help="an autoregressive model folder; repeatable")
    add("--temperature", type=float, default=0.5, help="of the teacher (default: %(default)s)")
    add("--split", default="test", choices=("valid", "test"), help="(default: %(default)s)")
    add("--rows", type=int, default=0, help="first words of the split; 0: all (default)")
    add("--dtype", default="auto", help="precision of teacher and student (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--bootstrap", type=int, default=1000, help="resamples (default: %(default)s)")
    add("--output", default="", help="also write the figures to this JSON file")
    return parser


if __name__ == "__main__":
    run_command(main)
