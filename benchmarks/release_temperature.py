"""The temperature of a release's systems, chosen on the validation split and kept in the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.files import write_atomically
from dlmone_fast.runtime import Generator

TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MAX_SOURCE_BLEU = 0.45
"""Above it a text is too much the source's: copying scores a BLEU of its own."""
MAX_SELF_BLEU = 0.4
"""Above it the texts of one source are too much alike: a student's are to differ."""

_CANDIDATES = 4


@dataclass(frozen=True)
class Chosen:
    """A temperature and its BLEU on the validation split."""

    temperature: float
    bleu: float


def choose_temperature(
    file: Path,
    model: Generator,
    rows: Sequence[Row],
    *,
    steps: int,
    sampler: str | None,
    seed: int,
    diverse: bool,
    say: Callable[[str], None],
) -> Chosen:
    """The temperature with the highest BLEU among those whose texts are not too much alike.

    Each one's scores are kept in `file`. Where no temperature is within the bounds, the highest.

    Args:
        file: JSON of scores by temperature; what it holds is not measured again.
        model: the model.
        rows: of the validation split.
        steps, sampler: how the model is called.
        seed: of the texts.
        diverse: `MAX_SELF_BLEU` bounds the self-BLEU, as `MAX_SOURCE_BLEU` always does the
            source-BLEU.
        say: called with a line for each temperature.
    """
    found: dict[str, dict[str, float]] = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    for temperature in TEMPERATURES:
        if str(temperature) in found:
            continue
        scores = evaluate_model(
            model, rows=rows, num_candidates=_CANDIDATES, steps=steps, sampler=sampler,
            temperature=temperature, seed=seed, bootstrap=0, progress=False,
        )  # fmt: skip
        kept = {name: float(scores[name]) for name in ("bleu", "ibleu", "source_bleu", "self_bleu")}
        found[str(temperature)] = kept
        write_atomically(file, [json.dumps(found, indent=1).encode()])
        say(f"temperature {temperature}: " + ", ".join(f"{k} {v:.4f}" for k, v in kept.items()))
    allowed = [
        t for t in TEMPERATURES
        if found[str(t)]["source_bleu"] <= MAX_SOURCE_BLEU
        and (not diverse or found[str(t)]["self_bleu"] <= MAX_SELF_BLEU)
    ] or [TEMPERATURES[-1]]  # fmt: skip
    best = max(allowed, key=lambda t: found[str(t)]["bleu"])
    return Chosen(best, found[str(best)]["bleu"])
