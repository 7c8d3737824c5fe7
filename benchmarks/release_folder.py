"""The model folder of a release: weights in bf16, evaluation and card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dlmone_fast
from dlmone_fast.config import Config, to_dict
from dlmone_fast.data.rows import load_rows
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.models.folder import ModelFolder, load_folder, save_folder
from dlmone_fast.runtime import Generator, load_model
from dlmone_fast.training import RunResult

MAX_SHARD_BYTES = 15_000_000
SHOWN = 20

_NON_COMMERCIAL = """\
The model was trained on Quora's question pairs, whose terms allow non-commercial use only and no
redistribution of the data. The same terms bound these weights: **non-commercial use only**. The
licence of the code does not cover them."""
_TERMS = {"qqp": _NON_COMMERCIAL}
_OVERLAP = {
    "qqp": """\
- 28 pairs of the test split also occur in the training split, in one of the two orders; 1,668 of
  2,500 share a question with it; in 1,149 both questions are unseen."""
}

_CARD = """\
---
library_name: dlmone_fast
tags: [text-generation, diffusion, student]
---
# {title}

A one-step generator: one network call a text. {shape}. {verdict}

```python
import dlmone_fast

dlmone_fast.generate(["how can i be a good geologist?"])
```

## Data and terms

{terms}

{overlap}

## How it was made

- DiffuSeq (arXiv 2210.08933) teacher, DLM-One (arXiv 2506.00290) distillation; the student is that
  of {stage}, the better one on the validation split. Seed {seed}. The resolved configuration is
  `training.json` beside this card.
- `python -m benchmarks.train_release --schedule {schedule}`, dlmone_fast {version}, on {device}:
{cost}

## Evaluation

Test split; DiffuSeq's metrics, sentence BLEU from 0 to 1, ± half of the 95 % bootstrap interval
over sources; `texts`: candidates a source, scores are means over them; MBR: one of them is chosen.
The student's rows are those of the weights in this folder. Read BLEU beside the row "copy": it is
what the source itself scores.

{table}

## {shown} outputs, not chosen

Every {every}th row of the test split, from row 0, with the seed of the evaluation. The corpus's own
sentences are not reprinted.

{outputs}

## Limits

Lower-case English in the manner of its training data, short texts, no safety filter. Texts may be
ungrammatical, change the meaning of their source, or copy it. Quality was not judged by people.
"""


def save_weights(result: RunResult, stage: str) -> Path:
    """The student of a stage in bf16, in the run's folder `release`, without a card yet."""
    return _save(result, stage, card="", extra={})


def add_card(
    result: RunResult, stage: str, schedule: str, evaluation: dict[str, Any], table: str
) -> Path:
    """The same folder with its card, evaluation and configuration.

    Args:
        result: the run.
        stage: whose student it is.
        schedule: name of the schedule.
        evaluation: content of evaluation.json.
        table: its rows in Markdown.
    """
    workspace = result.workspace
    config, task = workspace.config, workspace.config.data.task
    folder = load_folder(result.root / "release")
    sources = [row.src for row in load_rows(workspace.data_dir, "test")]
    every = max(1, len(sources) // SHOWN)
    model = folder.config["model"]
    student = next(r for r in evaluation["rows"] if r["system"] == "student" and r["calls"] == 1)
    card = _CARD.format(
        title=f"{task}: one step", stage=stage, seed=config.seed, schedule=schedule,
        shape=f"{model['num_layers']} layers of width {model['hidden_size']}, embedding width "
        f"{model['embedding_dim']}, {model['seq_len']} positions, {model['vocab_size']} tokens",
        verdict=f"BLEU {student['scores']['bleu']:.3f} on the test split of `{task}`.",
        terms=_TERMS.get(task, "See the terms of the data that it was trained on."),
        overlap=_OVERLAP.get(task, ""), version=dlmone_fast.__version__,
        device=evaluation["device"], table=table, shown=SHOWN, every=every,
        cost="\n".join(
            f"  {c['phase']}: {c['updates']:,} updates, {c['samples']:,} rows, "
            f"{c['minutes']:.0f} min;" for c in evaluation["cost"]
        ),
        outputs=_outputs(result, sources, every),
    )  # fmt: skip
    extra = {"evaluation.json": evaluation, "training.json": to_dict(_portable(config))}
    return _save(result, stage, card, extra)


def _save(result: RunResult, stage: str, card: str, extra: dict[str, Any]) -> Path:
    trained: ModelFolder = load_folder(result.workspace.model(stage))
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in trained.tensors.items()
    }
    assert trained.tokenizer_path is not None
    return save_folder(
        result.root / "release",
        config={k: trained.config[k] for k in ("kind", "model", "diffusion", "source")},
        tensors=tensors,
        tokenizer_json=trained.tokenizer_path.read_text(encoding="utf-8"),
        generation_config=trained.generation_config,
        card=card,
        extra_json=extra,
        max_shard_bytes=MAX_SHARD_BYTES,
    )


def _outputs(result: RunResult, sources: list[str], every: int) -> str:
    rows = list(range(0, len(sources), every))[:SHOWN]
    seeds = row_seeds(result.workspace.config.seed, len(sources))
    lines = ["| row | teacher, 20 calls | student, one call |", "|---|---|---|"]
    assert result.teacher is not None
    device = result.workspace.config.device
    models = [
        (load_model(result.teacher, device, "fp32"), 20),
        (load_model(result.root / "release", device, "fp32"), 1),
    ]
    columns = [_texts(model, steps, sources, seeds, rows) for model, steps in models]
    for row, teacher, student in zip(rows, *columns, strict=True):
        lines.append(f"| {row} | {_cell(teacher)} | {_cell(student)} |")
    return "\n".join(lines)


def _texts(
    model: Generator, steps: int, sources: list[str], seeds: list[int], rows: list[int]
) -> list[str]:
    with torch.inference_mode():
        found = model.generate_candidates(
            [sources[row] for row in rows], steps=steps, seeds=[seeds[row] for row in rows],
            on_overflow="truncate", progress=False,
        )  # fmt: skip
    return [texts[0] for texts in found.texts]


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "(empty)"


def _portable(config: Config) -> Config:
    # Where it was trained says nothing to anyone else.
    return replace(config, data_dir="", output_dir="")
