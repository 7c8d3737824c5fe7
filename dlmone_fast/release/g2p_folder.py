"""The release of a pronunciation model: its temperature, figures, card and model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dlmone_fast
from dlmone_fast.autoregressive import Autoregressive
from dlmone_fast.config import to_dict
from dlmone_fast.data.rows import load_rows
from dlmone_fast.evaluation.pronunciation import score_pronunciations
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.files import write_atomically
from dlmone_fast.networks.layers import count_parameters
from dlmone_fast.release.environment import environment
from dlmone_fast.release.evaluation import phase_costs, slices
from dlmone_fast.release.folder import cost_table, portable, save_student, time_spent
from dlmone_fast.release.pronunciation import (
    System,
    drawing,
    measure,
    of_rivals,
    of_teacher,
    table,
)
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.training import RunResult

TEMPERATURES = (0.0, 0.2, 0.3, 0.5, 0.7, 1.0)
SLACK = 0.01
"""Word error rate that a release gives away for pronunciations that differ."""

TERMS = (
    "CMUdict 0.7b, Copyright (C) 1993-2015 Carnegie Mellon University, BSD licence: the notice is "
    "in the folder `assets/cmudict` of the package."
)

_CARD = """\
---
library_name: dlmone_fast
tags: [grapheme-to-phoneme, g2p, diffusion, student]
language: en
---
# {name}: English pronunciation in one pass

The phonemes of an English word, in one network call. {parameters:,} parameters. Of {words:,} test
words that were not trained on, one draw is right for {right:.1%} (word error rate {wer:.3f},
phoneme error rate {per:.4f}); of five draws one is right for {oracle:.1%}.

```python
import dlmone_fast

model = dlmone_fast.load("{name}")
model.generate(["geologist", "tacotron"])
model.generate("either", num_candidates=5)  # different pronunciations, where it knows them
dlmone_fast.to_ipa(model.generate("geologist"))
```

## What it is not

It writes the 39 phonemes of CMUdict without stress, for American English, a word at a time: it
does not see the sentence ("read", "live"), does not expand numbers or abbreviations, and reads the
letters a to z and the apostrophe. Words that a dictionary has are better looked up. Names and
foreign words are what it gets wrong most often.

## Figures

Test split of CMUdict (CNTK's example), all pronunciations of a word count as right; ± half of the
95 % bootstrap interval over words. WER and PER of one draw; oracle: none of five is right;
`distinct`: different ones among five. Milliseconds: median of whole calls, one word each; words a
second in batches of 512; {device}, {threads} threads.

{table}

## {shown} words, not chosen

Every {every}th word of the test split, from the first.

{outputs}

## How it was made

Letters aligned to phonemes by EM; a diffusion teacher; its paired endpoints; distillation in two
stages (DLM-One, arXiv 2506.00290); the student is that of {stage}, the better one on the
validation words, at the temperature {temperature:g}: the highest one that costs at most {slack:.0%}
of the words. Seed {seed}; the resolved configuration is `training.json` beside this card.
`python -m dlmone_fast.release --schedule {schedule}`, dlmone_fast {version}.

{cost}

Processes, evaluation included: {slices}.

## Data and terms

{terms}
"""


def release(
    result: RunResult,
    schedule: str,
    rivals: Sequence[Autoregressive],
    rows: int,
    say: Callable[[str], None],
) -> tuple[Path, str]:
    """Measure a finished run of the task `g2p` and write its folder `release`.

    Args:
        result: the run.
        schedule: its name; also that of the packaged model.
        rivals: autoregressive models that stand in the table.
        rows: test words; 0: all.
        say: called with a line of progress.

    Returns:
        The folder, and the table in Markdown.
    """
    stage, temperature = better_student(result, say)
    candidate = save_student(
        result, stage, temperature, result.root / "candidate", "Not evaluated yet.\n", {}
    )
    words = load_rows(result.workspace.data_dir, "test", rows or None)
    measured = []
    for system in _systems(result, candidate, rivals):
        measured.append(measure(system, words))
        say(f"{system.name}, {system.calls} calls: WER {measured[-1]['wer']:.4f}")
    evaluation = {
        **environment(result.workspace.device),
        "seed": result.workspace.config.seed,
        "slices": slices(result.root),
        "cost": [asdict(cost) for cost in phase_costs(result.root)],
        "rows": measured,
    }
    card = _card(result, candidate, stage, temperature, schedule, evaluation)
    student = next(row for row in measured if row["system"] == "student")
    extra = {
        "evaluation.json": evaluation,
        "training.json": to_dict(portable(result.workspace.config)),
        "packaged.json": {
            "task": "English words to phonemes (ARPAbet)",
            "scores": {name: round(student[name], 4) for name in ("wer", "per", "oracle_wer")},
            "terms": TERMS,
        },
    }
    folder = save_student(result, stage, temperature, result.root / "release", card, extra)
    return folder, table(measured).markdown()


def better_student(result: RunResult, say: Callable[[str], None]) -> tuple[str, float]:
    """The stage whose student is right more often on the validation words, and its temperature."""
    chosen: dict[str, tuple[float, float]] = {}
    for stage in ("stage2", "stage1"):
        wers = _word_error_rates(result, stage, say)
        best = min(wers.values())
        chosen[stage] = best, max(t for t, wer in wers.items() if wer <= best + SLACK)
    stage = min(chosen, key=lambda name: chosen[name][0])
    return stage, chosen[stage][1]


def _word_error_rates(
    result: RunResult, stage: str, say: Callable[[str], None]
) -> dict[float, float]:
    """Word error rate of one draw on the validation split, by temperature."""
    file = result.root / f"temperature-{stage}.json"
    if file.exists():
        kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return {float(t): wer for t, wer in kept.items()}
    rows = load_rows(result.workspace.data_dir, "valid")
    model = load_model(result.workspace.model(stage), result.workspace.config.device)
    words, seeds = [row.src for row in rows], row_seeds(result.workspace.config.seed, len(rows))
    wers = {}
    for temperature in TEMPERATURES:
        texts = model.generate_candidates(
            words, seeds=seeds, temperature=temperature, batch_size=512, progress=False
        ).texts
        references = [row.refs or (row.trg,) for row in rows]
        wers[temperature] = score_pronunciations(references, texts, bootstrap=0)["wer"]
        say(f"{stage}, temperature {temperature:g}: WER {wers[temperature]:.4f}")
    write_atomically(file, [json.dumps({str(t): wer for t, wer in wers.items()}).encode()])
    return wers


def _systems(result: RunResult, candidate: Path, rivals: Sequence[Autoregressive]) -> list[System]:
    assert result.teacher is not None
    device = result.workspace.config.device
    teacher = load_model(result.teacher, device, backend="eager")
    student = load_model(candidate, device)
    once = Generator(teacher.denoiser, student.tokenizer, student.settings, "fp32")
    return [
        *of_teacher(teacher),
        drawing("undistilled (θ = φ)", 1, once),
        drawing("student", 1, student),
        *of_rivals(rivals),
    ]


def _card(
    result: RunResult,
    candidate: Path,
    stage: str,
    temperature: float,
    schedule: str,
    evaluation: dict[str, Any],
) -> str:
    rows = evaluation["rows"]
    student = next(row for row in rows if row["system"] == "student")
    words = load_rows(result.workspace.data_dir, "test")
    every = len(words) // 20
    model = load_model(candidate, result.workspace.config.device)
    shown = words[::every][:20]
    outputs = ["| word | one draw | references |", "|---|---|---|"]
    texts = model.generate([row.src for row in shown], progress=False)
    for row, text in zip(shown, texts, strict=True):
        outputs.append(f"| {row.src} | {text} | {' / '.join(row.refs or (row.trg,)).upper()} |")
    return _CARD.format(
        name=schedule, parameters=count_parameters(model.denoiser.lm), words=student["words"],
        right=1 - student["wer"], wer=student["wer"], per=student["per"],
        oracle=1 - student["oracle_wer"], device=evaluation["device"],
        threads=evaluation["threads"], table=table(rows).markdown(), shown=len(shown),
        every=every, outputs="\n".join(outputs), stage=stage, temperature=temperature,
        slack=SLACK, seed=evaluation["seed"], schedule=schedule,
        version=dlmone_fast.__version__, cost=cost_table(evaluation),
        slices=time_spent(evaluation), terms=TERMS,
    )  # fmt: skip
