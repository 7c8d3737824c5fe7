"""Systems of the task `g2p` on the same test words: word error rates, draws and milliseconds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from dlmone_fast.autoregressive import Autoregressive
from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.pronunciation import score_pronunciations
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.evaluation.table import Table
from dlmone_fast.runtime import Generator
from dlmone_fast.tasks.g2p import PUBLISHED

DRAWS = 5
"""Pronunciations a word of the oracle."""

TEACHER_CALLS = (20, 5, 1)
TEACHER_SAMPLER = "q-sampling"
TEACHER_TEMPERATURE = 0.5
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


def of_teacher(teacher: Generator, temperature: float = TEACHER_TEMPERATURE) -> list[System]:
    """The teacher at each of `TEACHER_CALLS`."""
    name = f"teacher, temperature {temperature:g}"
    return [
        drawing(name, calls, teacher, steps=calls, sampler=TEACHER_SAMPLER, temperature=temperature)
        for calls in TEACHER_CALLS
    ]


def of_rivals(rivals: Sequence[Autoregressive]) -> list[System]:
    """Each autoregressive model, greedy and with a beam, and the majority of several."""
    systems = []
    for number, rival in enumerate(rivals):
        title = "autoregressive" + (f" {number}" if len(rivals) > 1 else "")
        for method, name in (("greedy", "greedy"), ("beam", "beam of 4")):
            systems.append(System(f"{title}, {name}", None, partial(_rival, rival, method), False))
    if len(rivals) > 1:
        name = f"majority of {len(rivals)} autoregressive models"
        systems.append(System(name, None, partial(_majority, rivals), False))
    return systems


def drawing(name: str, calls: int, model: Generator, **how: Any) -> System:
    """A diffusion model in one way of calling it."""

    def answer(words: Sequence[str], draws: int) -> list[list[str]]:
        seeds = row_seeds(0, len(words))
        return model.generate_candidates(
            words, num_candidates=draws, seeds=seeds, batch_size=_BATCH, progress=False, **how
        ).texts

    return System(name, calls, answer)


def measure(system: System, rows: Sequence[Row], bootstrap: int = 1000) -> dict[str, Any]:
    """Scores and their intervals, milliseconds of a word alone, and words a second.

    WER and PER are those of the first draw, `oracle_wer` and `distinct` those of `DRAWS`.
    """
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
        low, high = row["intervals"].get("wer", (row["wer"], row["wer"]))
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
