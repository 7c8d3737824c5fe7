"""From trained networks to a model folder with its card."""

from __future__ import annotations

import dataclasses

import dlmone_fast
from dlmone_fast.config import to_dict
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.folder import save_folder
from dlmone_fast.training.loop import Phase
from dlmone_fast.training.validation import generation_settings
from dlmone_fast.training.workspace import Workspace

_CARD = """\
---
library_name: dlmone_fast
tags: [text-generation, diffusion, {kind}]
---
# {title}

{what} Task: `{task}`; weights: {weights}.

```python
import dlmone_fast

dlmone_fast.generate(["…"], model="path/to/this/folder")
```

- Method: DiffuSeq (arXiv 2210.08933) teacher, DLM-One (arXiv 2506.00290) distillation.
- Networks: {layers} layers of width {hidden}, embedding width {d}, {seq_len} positions, \
{vocab} tokens.
- Training: the resolved configuration is `config.toml` in the run folder; seed {seed}.
- Written by dlmone_fast {version}. `manifest.json` holds the hashes that loading verifies.

Quality has not been judged by people. Measure it on your own data with
`python -m dlmone_fast.evaluate`, beside the copy-the-source and reference rows.
"""


def publish(workspace: Workspace, phase: Phase, denoiser: Denoiser, weights: str) -> None:
    """Write the model folder that a phase ends with; every rank finds it afterwards.

    Args:
        workspace: the run.
        phase: the finished phase; its name is the folder's.
        denoiser: the networks to store.
        weights: which weights these are, for the card.
    """
    if workspace.ranks.writes:
        _write(workspace, phase, denoiser, weights)
    workspace.ranks.wait()


def _write(workspace: Workspace, phase: Phase, denoiser: Denoiser, weights: str) -> None:
    config = workspace.config
    kind = "teacher" if phase.name == "teacher" else "student"
    settings = dataclasses.asdict(generation_settings(config, kind))
    del settings["kind"]
    target = workspace.model(phase.name)
    what = {
        "teacher": "A diffusion language model: one text takes many network calls.",
        "student": "A one-step generator, distilled from a diffusion language model.",
    }[kind]
    model = denoiser.config
    card = _CARD.format(
        kind=kind, title=f"{config.data.task}: {phase.name}", what=what, task=config.data.task,
        weights=weights, layers=model.num_layers, hidden=model.hidden_size,
        d=model.embedding_dim, seq_len=model.seq_len, vocab=model.vocab_size, seed=config.seed,
        version=dlmone_fast.__version__,
    )  # fmt: skip
    save_folder(
        target,
        config={
            "kind": kind,
            "model": to_dict(model),
            "diffusion": to_dict(denoiser.schedule.config),
            "source": {
                "task": config.data.task,
                "phase": phase.name,
                "weights": weights,
                "inputs": phase.inputs,
            },
        },
        tensors={name: t.detach().cpu() for name, t in denoiser.lm.state_dict().items()},
        tokenizer_json=workspace.tokenizer.to_json(),
        generation_config=settings,
        card=card,
    )
