"""The systems of the frontier: samplers, their numbers of network calls, and their rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.quality.pairs import Pair
from dlmone_fast.runtime import Generator
from dlmone_fast.tasks.paper import TABLE_2

SAMPLERS = ("published-ddim", "ddim", "q-sampling", "dpm-solver++")
TEACHER_CALLS = (2, 5, 10, 20, 50)
STUDENT_CALLS = (1, 2, 4)

# Row-calls of the network that one row of the table may spend on quality: long samplers get fewer
# sources, and at least so many texts.
_ROW_CALLS, _FULL_ROW_CALLS = 7_680, 81_920
_FEWEST_TEXTS = 24


@dataclass(frozen=True)
class System:
    """A model at one number of network calls; `note` says where it is not the one asked for."""

    name: str
    model: Generator
    calls: int
    sampler: str | None = None
    note: str = ""


def systems(pair: Pair, full: bool) -> Iterator[System]:
    """Every system of a pair.

    Args:
        pair: teacher and student.
        full: also the published sampler at the numbers of calls of the paper's Table 2.
    """
    total = pair.teacher.denoiser.schedule.num_timesteps
    for sampler in SAMPLERS:
        asked = list(TEACHER_CALLS)
        if full and sampler == "published-ddim":
            asked += [calls for calls in TABLE_2 if max(TEACHER_CALLS) < calls < total]
        for calls, note in possible_calls(sampler, asked, total):
            yield System(f"teacher, {sampler}", pair.teacher, calls, sampler, note)
    yield System("teacher, ancestral", pair.teacher, total, "ancestral")
    yield System("undistilled (θ = φ)", pair.undistilled, 1)
    for calls in STUDENT_CALLS:
        yield System("student", pair.student, calls)


def possible_calls(sampler: str, asked: list[int], total: int) -> list[tuple[int, str]]:
    """The numbers of network calls nearest to those asked for that a sampler of T = `total` can
    make, each once, with a note where it is another one."""
    found: dict[int, str] = {}
    for calls in asked:
        nearest = min(_possible(sampler, total), key=lambda n: (abs(n - calls), n))
        found.setdefault(nearest, "" if nearest == calls else f"the nearest possible to {calls}")
    return list(found.items())


def _possible(sampler: str, total: int) -> list[int]:
    if sampler != "published-ddim":
        return list(range(1, total + 1))
    # Its gap between two timesteps is a whole number.
    return sorted({-(-total // gap) for gap in range(1, total + 1)})


def affordable(calls: int, rows: int, candidates: int, full: bool) -> int:
    """The number of rows that a system of `calls` is scored on, with all candidates of each."""
    texts = max(_FEWEST_TEXTS, (_FULL_ROW_CALLS if full else _ROW_CALLS) // calls)
    return min(rows, -(-texts // candidates))
