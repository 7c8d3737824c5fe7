"""The model folder of a release: weights in bf16, evaluation and card."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dlmone_fast
from dlmone_fast.config import Config, to_dict
from dlmone_fast.data.rows import load_rows
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.models.folder import load_folder, save_folder
from dlmone_fast.release.evaluation import (
    TEACHER_SAMPLER,
    TEACHER_STEPS,
    table,
    teacher_temperature,
)
from dlmone_fast.runtime import load_model
from dlmone_fast.training import RunResult

TERMS = {
    "qqp": """\
The model was trained on Quora's question pairs, whose terms allow non-commercial use only and no
redistribution of the data. The same terms bound these weights: **non-commercial use only**. The
licence of the code does not cover them."""
}
"""Terms of the data by the task's name in the configuration; the caller gives those of others."""

MAX_SHARD_BYTES = 15_000_000
SHOWN = 20

_CARD = """\
---
library_name: dlmone_fast
tags: [text-generation, diffusion, student]
---
# {title}

A one-step generator: one network call a text. {shape}. BLEU {bleu:.3f} on {rows:,} rows of the test
split, where the source itself scores {copy:.3f}.

```python
import dlmone_fast

dlmone_fast.generate(["…"], model="FOLDER")  # this folder
```

## Data and terms

{terms}

{overlap}

## How it was made

DiffuSeq (arXiv 2210.08933) teacher, DLM-One (arXiv 2506.00290) distillation; the student is that of
{stage}, the better one on the validation split. Seed {seed}; the resolved configuration is
`training.json` beside this card. `python -m dlmone_fast.release --schedule {schedule}`,
dlmone_fast {version}.

{cost}

Processes, evaluation included: {slices}.

## Evaluation

Test split; DiffuSeq's metrics, sentence BLEU from 0 to 1, ± half of the 95 % bootstrap interval
over sources; `texts`: candidates a source, scores are means over them; MBR: one of them is chosen.
The student's rows are those of the weights in this folder. Read BLEU beside the row "copy": it is
what the source itself scores.

{table}

## {shown} outputs, not chosen

Every {every}th row of the test split, from row 0, with the evaluation's seed. The corpus's own
sentences are not reprinted.

{outputs}

## Limits

Texts{case} in the manner of the training data, at most {seq_len} tokens with their source; no
safety filter. They may be ungrammatical, change the meaning of their source, or copy it. Quality
was not judged by people.
"""


def save_candidate(result: RunResult, stage: str, temperature: float) -> Path:
    """Write the student of a stage in bf16 to the run's folder `candidate`, for the evaluation."""
    path = result.root / "candidate"
    return save_student(result, stage, temperature, path, "Not evaluated yet.\n", {})


def save_release(
    result: RunResult,
    stage: str,
    temperature: float,
    schedule: str,
    evaluation: dict[str, Any],
    terms: str,
    say: Callable[[str], None],
) -> Path:
    """Write the candidate's weights to the run's folder `release`, with evaluation and card.

    Args:
        result: the run.
        stage: whose student it is.
        temperature: the student's default.
        schedule: name of the schedule.
        evaluation: content of evaluation.json.
        terms: of the data.
        say: called with a line for each temperature of the teacher that is still to be measured.
    """
    config, rows = result.workspace.config, evaluation["rows"]
    sources = [row.src for row in load_rows(result.workspace.data_dir, "test")]
    every = max(1, len(sources) // SHOWN)
    shown = list(range(0, len(sources), every))[:SHOWN]
    student = next(row for row in rows if row["system"] == "student")
    copy = next(row for row in rows if row["system"] == "copy")
    model = load_folder(result.root / "candidate").config["model"]
    card = _CARD.format(
        title=f"{config.data.task}, one step", stage=stage, seed=config.seed, schedule=schedule,
        shape=f"{model['num_layers']} layers of width {model['hidden_size']}, embedding width "
        f"{model['embedding_dim']}, {model['seq_len']} positions, {model['vocab_size']:,} tokens",
        bleu=student["scores"]["bleu"], rows=student["sources"], copy=copy["scores"]["bleu"],
        terms=terms, overlap=overlap(result.workspace.data_dir), version=dlmone_fast.__version__,
        cost=cost_table(evaluation), slices=time_spent(evaluation), shown=len(shown), every=every,
        table=table(rows, config.data.task).markdown(), seq_len=model["seq_len"],
        outputs=_outputs(result, sources, shown, say),
        case=" in lower case" if config.data.lowercase else "",
    )  # fmt: skip
    extra = {"evaluation.json": evaluation, "training.json": to_dict(portable(config))}
    return save_student(result, stage, temperature, result.root / "release", card, extra)


def save_student(
    result: RunResult,
    stage: str,
    temperature: float,
    path: Path,
    card: str,
    extra: dict[str, Any],
) -> Path:
    """Write a stage's student in bf16 as a model folder, with its card and further JSON files."""
    trained = load_folder(result.workspace.model(stage))
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in trained.tensors.items()
    }
    assert trained.tokenizer_path is not None
    return save_folder(
        path,
        config={k: trained.config[k] for k in ("kind", "model", "diffusion", "source")},
        tensors=tensors,
        tokenizer_json=trained.tokenizer_path.read_text(encoding="utf-8"),
        generation_config={**trained.generation_config, "temperature": temperature},
        card=card,
        extra_json=extra,
        max_shard_bytes=MAX_SHARD_BYTES,
    )


def cost_table(evaluation: dict[str, Any]) -> str:
    """Updates, rows and minutes of each phase, in Markdown."""
    lines = ["| phase | updates | rows | minutes |", "|---|--:|--:|--:|"]
    for cost in evaluation["cost"]:
        lines.append(
            f"| {cost['phase']} | {cost['updates']:,} | {cost['samples']:,} | "
            f"{cost['minutes']:.1f} |"
        )
    return "\n".join(lines)


def time_spent(evaluation: dict[str, Any]) -> str:
    """Minutes on each device, in words."""
    minutes: dict[str, float] = {}
    for part in evaluation["slices"]:
        minutes[part["device"]] = minutes.get(part["device"], 0.0) + part["minutes"]
    parts = [f"{spent:.0f} minutes on {device}" for device, spent in minutes.items()]
    return ", ".join([*parts, f"the last one on {evaluation['device']}"])


def _outputs(
    result: RunResult, sources: Sequence[str], rows: Sequence[int], say: Callable[[str], None]
) -> str:
    seeds = row_seeds(result.workspace.config.seed, len(sources))
    assert result.teacher is not None
    calls, temperature = TEACHER_STEPS[0], teacher_temperature(result, diverse=False, say=say)

    def texts_of(folder: Path, **how: Any) -> list[str]:
        model = load_model(folder, result.workspace.config.device, "fp32", backend="eager")
        generated = model.generate_candidates(
            [sources[row] for row in rows], seeds=[seeds[row] for row in rows],
            on_overflow="truncate", progress=False, **how,
        )  # fmt: skip
        return [texts[0] for texts in generated.texts]

    teachers = texts_of(
        result.teacher, steps=calls, sampler=TEACHER_SAMPLER, temperature=temperature
    )
    students = texts_of(result.root / "candidate", steps=1)
    title = f"teacher, {calls} calls, temperature {temperature:g}"
    lines = [f"| row | {title} | student, one call |", "|--:|---|---|"]
    for row, *texts in zip(rows, teachers, students, strict=True):
        lines.append(" | ".join([f"| {row}", *map(_cell, texts)]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "(empty)"


def portable(config: Config) -> Config:
    """A configuration without the folders of the machine that trained it."""
    return replace(config, data_dir="", output_dir="")


def overlap(data_dir: Path) -> str:
    """The card's sentence on test pairs whose texts occur in the training split.

    Case and punctuation do not count.
    """
    train = [(_plain(row.src), _plain(row.trg)) for row in load_rows(data_dir, "train")]
    test = [(_plain(row.src), _plain(row.trg)) for row in load_rows(data_dir, "test")]
    texts = {text for pair in train for text in pair}
    pairs = {frozenset(pair) for pair in train}
    same = sum(frozenset(pair) in pairs for pair in test)
    shared = sum(not texts.isdisjoint(pair) for pair in test)
    return (
        f"Of {len(test):,} test pairs {same:,} also occur in the training split, in either order; "
        f"{shared:,} share a text with it; in {len(test) - shared:,} both texts are unseen (case "
        "and punctuation aside)."
    )


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())
