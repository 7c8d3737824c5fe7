"""From token ids to token ids: noise, network calls, rounding, as one function of tensors.

Nothing in `embeddings` depends on the values of its tensors, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dlmone_fast.diffusion import Schedule
from dlmone_fast.diffusion.schedule import keep_source
from dlmone_fast.kernels.forward_diffusion import diffuse_of_draws
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token, nearest_token_with_margin
from dlmone_fast.kernels.noise import Stream
from dlmone_fast.runtime.rows import RowBatch
from dlmone_fast.samplers.one_step import renoising_times

Predict = Callable[[Tensor, Tensor], Tensor]
PredictFrom = Callable[[Tensor, Tensor, int], Tensor]


class Pipeline:
    """A student's generation: DLM-One §3 with counter-based noise.

    Args:
        schedule: the noise schedule.
        vocabulary: the embeddings E [V, d], which rounding reads.
        t_init: timestep of the first call.
        steps: network calls; call i > 0 re-noises the output of the one before.
        scale_latent: feed sigma(t_init) z rather than z.
        temperature: factor of the noise of every call.
        lookup: the rows that ids name, where they are more than E (`TokenEmbedding.lookup`).
    """

    def __init__(
        self,
        schedule: Schedule,
        vocabulary: Vocabulary,
        t_init: int,
        steps: int,
        scale_latent: bool,
        temperature: float = 1.0,
        lookup: Tensor | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.lookup = vocabulary.table if lookup is None else lookup
        self.times = renoising_times(t_init, steps)
        alpha_bars = [float(schedule.alphas_cumprod[t]) for t in self.times]
        self.sigmas = [(1 - alpha_bar) ** 0.5 for alpha_bar in alpha_bars]
        if not scale_latent:
            self.sigmas[0] = 1.0
        self.sigmas = [temperature * sigma for sigma in self.sigmas]
        # The first call sees noise alone.
        self.alphas = [0.0, *(alpha_bar**0.5 for alpha_bar in alpha_bars[1:])]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells two pipelines of one model apart."""
        return (*self.times, *self.sigmas)

    def embeddings(
        self,
        predict: Predict,
        ids: Tensor,
        mask: Tensor,
        draws: Tensor,
        last: Predict | None = None,
    ) -> Tensor:
        """x̂0 [B, L, d] of the last call; source positions hold what the network says there.

        Arguments as in `RowBatch`, all on the model's device. `last` makes the last call, and may
        leave out leading positions of its result; None: `predict`.
        """
        table = self.lookup
        rows = len(ids)
        x0: Tensor | None = None
        for i, t in enumerate(self.times):
            alpha = torch.full((rows,), self.alphas[i], device=table.device)
            sigma = torch.full((rows,), self.sigmas[i], device=table.device)
            if x0 is None:
                x = diffuse_of_draws(table, ids, alpha, sigma, mask, draws[i], Stream.GENERATION)
            else:
                clean = keep_source(x0, table[ids], mask)
                x = diffuse_of_draws(clean, None, alpha, sigma, mask, draws[i], Stream.GENERATION)
            call = last if last is not None and i == len(self.times) - 1 else predict
            x0 = call(x, torch.full((rows,), t, device=table.device))
        assert x0 is not None
        return x0

    def run(
        self, predict: Predict, batch: RowBatch, predict_from: PredictFrom | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids [B, L] with the sources' own, and each row's smallest margin [B], on the CPU.

        A row alone has no margin to look at: its answer is the canonical one.

        Args:
            predict: f(x_t, t).
            batch: the rows.
            predict_from: f(x_t, t, first) at the positions from `first` on; None: `predict`'s.
        """
        device = self.vocabulary.table.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        first, last = 0, predict
        if predict_from is not None:
            # Its targets are all that is read of the last call.
            first = first_target(batch.mask)
            last = partial(_predicted_from, predict_from, first)
        x0 = self.embeddings(predict, ids, mask, batch.draws.to(device), last)
        found = ids.clone()
        target = mask[:, first:] != 0
        rounded = found[:, first:]
        if len(batch) == 1:
            rounded[target] = nearest_token(x0[target], self.vocabulary)
            return found.cpu(), torch.full((1,), float("inf"))
        margins = torch.full(target.shape, float("inf"), device=device)
        x0 = x0[target]
        rounded[target], margins[target] = nearest_token_with_margin(x0, self.vocabulary)
        return found.cpu(), margins.amin(1).cpu()


def _predicted_from(predict_from: PredictFrom, first: int, x_t: Tensor, t: Tensor) -> Tensor:
    return predict_from(x_t, t, first)


def first_target(mask: Tensor) -> int:
    """The first position that is a target in some row of mask [B, L] on a CPU; L - 1 at most."""
    some = (mask != 0).any(0)
    return int(some.to(torch.uint8).argmax()) if bool(some.any()) else mask.shape[1] - 1
