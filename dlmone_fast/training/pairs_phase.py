"""Paired endpoints: what the teacher's ODE makes of a source and a noise that θ will get as well.

A pair is a row of the training split, the number of a noise of that row, and the ids at which the
teacher's deterministic sampler ends; the noise itself is drawn again from these numbers. The
phase's last checkpoint is its result: compact enough to move between machines.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dlmone_fast.config import Config, ModelConfig
from dlmone_fast.data.batches import epoch_order, training_batch
from dlmone_fast.data.cache import TokenCache
from dlmone_fast.errors import CheckpointError
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.models.checkpoint import Checkpoint, load_checkpoint
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.networks.backbone import at_length
from dlmone_fast.samplers import sample
from dlmone_fast.samplers.loop import SamplerOptions
from dlmone_fast.training.loop import State, phase_seed
from dlmone_fast.training.progress import Progress
from dlmone_fast.training.teacher_phase import autocast
from dlmone_fast.training.workspace import Workspace

# The teacher and the two stages have 0, 1 and 2.
_SEED_INDEX = 3
_SHOWN = 3
_LARGEST_UINT16 = 0xFFFF
# More noises than any row has: what is added to a number to name those of later calls.
_MOST_SAMPLES = 1 << 24


@dataclass(frozen=True)
class Pairs:
    """Paired endpoints, on the CPU.

    Attributes:
        seed: what the noises are drawn from.
        rows: int32 [n], rows of the training split.
        samples: int32 [n], the number of the noise among those of its row.
        ids: [n, L], uint16 or int32: the source's ids, and the teacher's on target positions. With
            a source in slots [n, slots]: the teacher's alone.
    """

    seed: int
    rows: Tensor
    samples: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def latents(
        self,
        which: slice | Tensor,
        width: int,
        device: torch.device,
        call: int = 0,
        length: int = 0,
    ) -> Tensor:
        """The standard normal noise z [B, length, width] of some of the pairs, or that of a later
        call of the sampler. A position's noise does not depend on the length; 0: that of `ids`."""
        rows = self.rows[which].long()
        samples = self.samples[which].long() + call * _MOST_SAMPLES
        length = length or self.ids.shape[1]
        return normal(self.seed, Stream.PAIR_LATENT, rows, samples, length, width, device)


class PairsPhase:
    """Makes the pairs, a batch an update."""

    name = "pairs"

    def __init__(self, workspace: Workspace, teacher: Denoiser, inputs: dict[str, str]) -> None:
        self.workspace, self.teacher, self.inputs = workspace, teacher, inputs
        c = self.config = workspace.config.distill.pairs
        self.steps, self.batch_size, self.save_every = c.updates, c.batch_size, c.save_every
        self.validate_every = self.steps
        if workspace.config.compile:
            teacher.lm.backbone.compile()
        self.options = SamplerOptions(
            c.sampler, c.steps, clamp=c.rounded, temperature=c.temperature
        )
        self.cache = workspace.cache("train")
        self.vocabulary = Vocabulary(teacher.embedding.detach())
        seed, sizes = pairs_seed(workspace.config), teacher.config
        rows, samples = chosen_pairs(self.cache, seed, c.count, c.per_source)
        ids = torch.zeros(c.count, _stored_positions(sizes), dtype=_id_type(sizes.vocab_size))
        self.pairs = Pairs(seed, torch.from_numpy(rows), torch.from_numpy(samples), ids)
        self.made = 0

    def update(self, step: int) -> dict[str, float]:
        batch = slice(step * self.batch_size, min((step + 1) * self.batch_size, len(self.pairs)))
        ranks = self.workspace.ranks
        part = ranks.part(batch.stop - batch.start)
        which = slice(batch.start + part.start, batch.start + part.stop)
        made = self._made(which) if which.stop > which.start else self.pairs.ids[which]
        self.pairs.ids[batch] = ranks.gather_rows(made)
        self.made = batch.stop
        return {"pairs": float(self.made)}

    def _made(self, which: slice) -> Tensor:
        """The ids [n, L] of some of the pairs."""
        ids, mask = self._conditions(which)
        device = self.workspace.device
        ids, mask = ids.to(device), mask.to(device)
        if self.config.targets == "data":
            return self._stored(ids, mask)
        source = self.teacher.lm.tokens(ids)
        length, width = source.shape[1:]
        x = sample(
            self._predict, self.teacher.schedule, self.options, source, mask,
            lambda call: self.pairs.latents(which, width, device, call, length),
            lambda x: self.vocabulary.table[nearest_token(x, self.vocabulary)],
            self_conditioning=self.teacher.config.self_conditioning,
        )  # fmt: skip
        target = mask != 0
        ids[target] = nearest_token(x[target], self.vocabulary)
        return self._stored(ids, mask)

    def _stored(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids [n, L] as `Pairs` keeps them."""
        if self.teacher.config.in_slots:
            stored = self.pairs.ids.shape[1]
            ids = at_length(ids.masked_fill(mask == 0, 0)[:, :stored], stored)
        return ids.cpu().to(self.pairs.ids.dtype)

    def _predict(self, x: Tensor, t: Tensor, estimate: Tensor | None = None) -> Tensor:
        with autocast(self.workspace):
            x0: Tensor = self.teacher(x, t, estimate)
            return x0

    def _conditions(self, which: slice) -> tuple[Tensor, Tensor]:
        rows, sizes = self.pairs.rows[which].long(), self.teacher.config
        tokenizer = self.workspace.tokenizer
        return training_batch(self.cache, rows, sizes, tokenizer)

    def validate(self, step: int, progress: Progress) -> None:
        if step == 0:
            return
        first = slice(0, min(self.made, self.batch_size))
        _, mask = self._conditions(first)
        decode = self.workspace.tokenizer.decode_clean
        texts = [
            decode(ids[: len(target)][target[: len(ids)]].tolist())
            for ids, target in zip(self.pairs.ids[first].long(), mask != 0, strict=True)
        ]
        progress.record(step, {"empty": sum(not text for text in texts) / len(texts)})
        for text in texts[:_SHOWN]:
            progress.say(f"    → {text}")

    def state(self) -> State:
        pairs, n = self.pairs, self.made
        tensors = {"rows": pairs.rows[:n], "samples": pairs.samples[:n], "ids": pairs.ids[:n]}
        return {"pairs": tensors}, {"made_with": _settings(self.workspace.config)}

    def restore(self, checkpoint: Checkpoint) -> None:
        found = _checked(checkpoint, self.workspace)
        self.made = len(found)
        self.pairs.ids[: self.made] = found.ids


def load_pairs(workspace: Workspace) -> tuple[Pairs, str]:
    """The pairs of a run whose phase `pairs` is finished, and the hash of their file."""
    path = workspace.newest("pairs")
    assert path is not None
    return _checked(load_checkpoint(path), workspace), hash_file(path / "pairs.safetensors")


def pairs_seed(config: Config) -> int:
    """The seed of the pairs' order and noises."""
    return phase_seed(config.seed, _SEED_INDEX)


def chosen_pairs(
    cache: TokenCache, seed: int, count: int, per_source: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Row and number of the noise of each pair, int32 [count].

    Rows come in seeded epochs over the split, each with its next `per_source` noises.
    """
    index = np.arange(count)
    epoch, place = np.divmod(index // per_source, len(cache))
    orders = [epoch_order(seed, e, len(cache), Stream.PAIR_ORDER) for e in range(epoch[-1] + 1)]
    rows = torch.stack(orders).numpy()[epoch, place]
    samples = epoch * per_source + index % per_source
    return rows.astype(np.int32), samples.astype(np.int32)


# Settings that pairs of earlier versions do not name, as they were then.
_LATER_SETTINGS = {"targets": "teacher", "rounded": False}


def _settings(config: Config) -> dict[str, Any]:
    c = config.distill.pairs
    return {
        "seed": config.seed,
        "both_directions": config.data.both_directions,
        **dataclasses.asdict(c),
    }


def _checked(checkpoint: Checkpoint, workspace: Workspace) -> Pairs:
    config = workspace.config
    expected, found = _settings(config), checkpoint.state.get("made_with")
    if isinstance(found, dict):
        found = {**_LATER_SETTINGS, **found}
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.path}: its pairs were made with {found!r:.400}, this run has {expected}; "
            "name the same seed, data.both_directions and distill.pairs, or use another "
            "--output-dir"
        )
    c, sizes = config.distill.pairs, config.model
    checkpoint.check_step(c.updates)
    made = min(checkpoint.step * c.batch_size, c.count)
    tensors = checkpoint.group(
        "pairs",
        {
            "rows": torch.empty(made, dtype=torch.int32),
            "samples": torch.empty(made, dtype=torch.int32),
            "ids": torch.empty(made, _stored_positions(sizes), dtype=_id_type(sizes.vocab_size)),
        },
    )
    limits = {"rows": len(workspace.cache("train")), "samples": 1 << 31, "ids": sizes.vocab_size}
    for name, limit in limits.items():
        values = tensors[name].long()
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise CheckpointError(
                f"{checkpoint.path / 'pairs.safetensors'}: {name} must lie in 0 … {limit - 1}; "
                "resume from another checkpoint, or use another --output-dir"
            )
    return Pairs(pairs_seed(config), tensors["rows"], tensors["samples"], tensors["ids"])


def _stored_positions(sizes: ModelConfig) -> int:
    return sizes.target_slots if sizes.in_slots else sizes.seq_len


def _id_type(vocab_size: int) -> torch.dtype:
    return torch.uint16 if vocab_size <= _LARGEST_UINT16 + 1 else torch.int32
