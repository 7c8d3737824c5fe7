"""The temperature of a release's systems, chosen on the validation split and kept in the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.files import write_atomically
from dlmone_fast.runtime import Generator

OF_TEACHERS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
OF_STUDENTS = (0.3, 0.5, 0.7, 1.0, 1.2, 1.5)
MAX_SOURCE_BLEU = 0.45
"""Above it a text is too much the source's: copying scores a BLEU of its own."""
MAX_SELF_BLEU = 0.4
"""Above it the texts of one source are too much alike: a student's are to differ."""


@dataclass(frozen=True, order=True)
class Chosen:
    """A temperature, its BLEU on the validation split, and whether it is within the bounds.

    The larger one is the better: within the bounds first, then by BLEU.
    """

    within: bool
    bleu: float
    temperature: float = field(compare=False)


def choose_temperature(
    file: Path,
    model: Generator,
    rows: Sequence[Row],
    *,
    steps: int,
    sampler: str | None,
    seed: int,
    temperatures: Sequence[float],
    diverse: bool,
    say: Callable[[str], None],
) -> Chosen:
    """The temperature with the highest BLEU among those whose texts are not too much alike.

    Each one's scores are kept in `file`. Where no temperature is within the bounds, 1.

    Args:
        file: JSON of scores by temperature; what it holds is not measured again.
        model: the model.
        rows: of the validation split.
        steps, sampler: how the model is called.
        seed: of the texts.
        temperatures: to choose from.
        diverse: whether `MAX_SELF_BLEU` bounds the self-BLEU, as `MAX_SOURCE_BLEU` always does the
            source-BLEU.
        say: called with a line for each temperature.
    """
    measured: dict[str, dict[str, float]] = {}
    if file.exists():
        measured = json.loads(file.read_text(encoding="utf-8"))
    # A teacher's texts take as many calls as all of a student's.
    candidates = 4 if steps == 1 else 2
    for temperature in temperatures:
        if str(temperature) in measured:
            continue
        scores = evaluate_model(
            model, rows=rows, num_candidates=candidates, steps=steps, sampler=sampler,
            temperature=temperature, seed=seed, bootstrap=0, progress=False,
        )  # fmt: skip
        kept = {name: float(scores[name]) for name in ("bleu", "ibleu", "source_bleu", "self_bleu")}
        measured[str(temperature)] = kept
        write_atomically(file, [json.dumps(measured, indent=1).encode()])
        say(f"temperature {temperature}: " + ", ".join(f"{k} {v:.4f}" for k, v in kept.items()))
    allowed = [
        t for t in temperatures
        if measured[str(t)]["source_bleu"] <= MAX_SOURCE_BLEU
        and (not diverse or measured[str(t)]["self_bleu"] <= MAX_SELF_BLEU)
    ]  # fmt: skip
    best = max(allowed or [1.0], key=lambda t: measured[str(t)]["bleu"])
    return Chosen(bool(allowed), measured[str(best)]["bleu"], best)
