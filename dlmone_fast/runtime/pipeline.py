"""From token ids to token ids: noise, network calls, rounding, as one function of tensors.

Nothing in `embeddings` depends on the values of its tensors, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable

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


class Pipeline:
    """A student's generation: DLM-One §3 with counter-based noise.

    Args:
        schedule: the noise schedule.
        vocabulary: the embeddings E [V, d].
        t_init: timestep of the first call.
        steps: network calls; call i > 0 re-noises the output of the one before.
        scale_latent: feed sigma(t_init) z rather than z.
    """

    def __init__(
        self,
        schedule: Schedule,
        vocabulary: Vocabulary,
        t_init: int,
        steps: int,
        scale_latent: bool,
    ) -> None:
        self.vocabulary = vocabulary
        self.times = renoising_times(t_init, steps)
        alpha_bars = [float(schedule.alphas_cumprod[t]) for t in self.times]
        self.sigmas = [(1 - alpha_bar) ** 0.5 for alpha_bar in alpha_bars]
        if not scale_latent:
            self.sigmas[0] = 1.0
        # The first call sees noise alone.
        self.alphas = [0.0, *(alpha_bar**0.5 for alpha_bar in alpha_bars[1:])]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells two pipelines of one model apart."""
        return (*self.times, *self.sigmas)

    def embeddings(self, predict: Predict, ids: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
        """x̂0 [B, L, d] of the last call; source positions hold what the network says there.

        Arguments as in `RowBatch`, all on the model's device.
        """
        table = self.vocabulary.table
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
            x0 = predict(x, torch.full((rows,), t, device=table.device))
        assert x0 is not None
        return x0

    def run(self, predict: Predict, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Ids [B, L] with the sources' own, and each row's smallest margin [B], on the CPU.

        A row alone has no margin to look at: its answer is the canonical one.
        """
        device = self.vocabulary.table.device
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        x0 = self.embeddings(predict, ids, mask, batch.draws.to(device))
        target = mask != 0
        found = ids.clone()
        if len(batch) == 1:
            found[target] = nearest_token(x0[target], self.vocabulary)
            return found.cpu(), torch.full((1,), float("inf"))
        margins = torch.full(target.shape, float("inf"), device=device)
        x0 = x0[target]
        found[target], margins[target] = nearest_token_with_margin(x0, self.vocabulary)
        return found.cpu(), margins.amin(1).cpu()
