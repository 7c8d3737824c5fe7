"""The score estimator ψ: a backbone, and the discriminator that shares its features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlmone_fast.networks.backbone import Backbone, at_length


class ScoreEstimator(nn.Module):
    """ψ: x̂0 of the generator's distribution, and per-token logits for real against generated.

    The head is a linear map of the last hidden state, zero at the start. The parameter-free
    alternative, the mean over channels (SiDA), reads the residual before the last LayerNorm: after
    it the mean is zero by construction and carries no signal.
    """

    def __init__(self, backbone: Backbone, discriminator: str = "token_head") -> None:
        super().__init__()
        self.backbone = backbone
        self.discriminator = discriminator
        if discriminator == "token_head":
            self.head = nn.Linear(backbone.config.hidden_size, 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """x̂0 [B, L, d] and discriminator logits [B, L], both float32."""
        hidden, residual = self.backbone.features(x_t, time)
        if self.discriminator == "token_head":
            logits = self.head(hidden).squeeze(-1)
        else:
            logits = residual.mean(-1)
        length = x_t.shape[1]
        x0 = at_length(self.backbone.predict(hidden), length)
        return x0, at_length(logits.to(torch.float32), length)
