"""The temperature of a release's systems, chosen on the validation split and kept in the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.files import write_atomically
from dlmone_fast.runtime import Generator

TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MAX_SELF_BLEU = 0.4
"""Above it the texts of one source are too much alike: a student's are to differ."""

_CANDIDATES = 4


def chosen_temperature(
    file: Path,
    model: Generator,
    rows: Sequence[Row],
    *,
    steps: int,
    sampler: str | None,
    seed: int,
    diverse: bool,
    say: Callable[[str], None],
) -> float:
    """The temperature with the highest iBLEU; each one's scores are kept in `file`.

    Args:
        file: JSON of scores by temperature; what it holds is not measured again.
        model: the model.
        rows: of the validation split.
        steps, sampler: how the model is called.
        seed: of the texts.
        diverse: only temperatures whose self-BLEU is at most `MAX_SELF_BLEU`, or the highest one.
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
        t for t in TEMPERATURES if not diverse or found[str(t)]["self_bleu"] <= MAX_SELF_BLEU
    ] or [TEMPERATURES[-1]]
    return max(allowed, key=lambda t: found[str(t)]["ibleu"])
