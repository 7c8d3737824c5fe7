"""Token embedding and backbone together: what a model folder stores."""

from __future__ import annotations

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

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """x̂0 [B, L, d] of x_t [B, L, d] at network time [B]."""
        return self.backbone(x_t, time)
