"""Token embedding and backbone together: what a model folder stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dlmone_fast.config import ModelConfig
from dlmone_fast.networks.backbone import Backbone
from dlmone_fast.networks.embedding import TokenEmbedding


class DiffusionLM(nn.Module):
    """A diffusion language model: embedding E, decoder, and f(x_t, t)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TokenEmbedding(config)
        self.backbone = Backbone(config)

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> DiffusionLM:
        """A model around given tensors, which it holds and does not copy.

        Nothing is initialised, so no random number of the caller's is drawn.
        """
        with torch.device("meta"):
            lm = cls(config)
        lm.load_state_dict(tensors, assign=True)
        return lm

    def forward(self, x_t: Tensor, time: Tensor, estimate: Tensor | None = None) -> Tensor:
        """x̂0 [B, L, d] of x_t [B, L, d] at network time [B]; `estimate` as for the backbone."""
        return self.backbone(x_t, time, estimate)
