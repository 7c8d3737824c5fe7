"""The one backbone f(x_t, t): DiffuSeq's BERT encoder between two Tanh projections.

DiffuSeq, `transformer_model.py`: time MLP, input projection, learned positions, LayerNorm and
dropout, encoder without attention mask, output projection. The pre-norm variant adds the usual
LayerNorm after the last block. With self-conditioning (Analog Bits, arXiv 2208.04202) a second
projection reads the last prediction of x_0; it starts at zero, and None stands for zeros.

With a source in slots (`model.source`, `data/slots.py`) x_t holds the target's slots first and then
the source. A source position that holds zeros is empty: nothing attends to it. A masked source has
positions counted from its own start and a type of its own, as BERT's second sentence has; an
aligned source is added to the slots that it shares positions with, half the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlmone_fast.config import ModelConfig
from dlmone_fast.networks.embedding import time_features
from dlmone_fast.networks.layers import LAYER_NORM_EPS, Block, projection


class Backbone(nn.Module):
    """f(x_t, t) → x̂0, and the features that the discriminator reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, d = config.hidden_size, config.embedding_dim
        # The time MLP's width is DiffuSeq's: four times the sinusoidal width.
        self.time_mlp = projection(config.time_dim, 4 * config.time_dim, hidden, nn.SiLU())
        self.input_projection = projection(d, hidden, hidden, nn.Tanh())
        self.position = nn.Embedding(config.max_positions, hidden)
        self.input_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.norm == "pre":
            self.output_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.output_projection = projection(hidden, hidden, d, nn.Tanh())
        if config.self_conditioning:
            # Last: the other parameters start where they would without it.
            self.estimate_projection = nn.Linear(d, hidden, bias=False)
            nn.init.zeros_(self.estimate_projection.weight)
        if config.in_slots:
            # Positions of unit variance, DiffuSeq's, would drown the source at first.
            nn.init.normal_(self.position.weight, std=0.1)
        if config.source == "aligned":
            self.source_projection = nn.Linear(config.source_window * d, hidden, bias=False)
            # Each symbol of the window arrives with unit variance.
            nn.init.normal_(self.source_projection.weight, std=d**-0.5)
        elif config.source == "masked":
            self.part = nn.Embedding(2, hidden)
            nn.init.zeros_(self.part.weight)

    def forward(self, x_t: Tensor, time: Tensor, estimate: Tensor | None = None) -> Tensor:
        """x̂0 [B, L, d] of x_t [B, L, d] at network time [B] (already rescaled).

        `estimate` [B, L, d] is an earlier x̂0, for a network with self-conditioning.
        """
        x0 = self.predict(self.features(x_t, time, estimate)[0])
        return at_length(x0, x_t.shape[1])

    def features(
        self, x_t: Tensor, time: Tensor, estimate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The last hidden state [B, L, H], and the residual sum before its LayerNorm.

        With a source in slots, those of the slots alone.
        """
        return self.encode(x_t, self.time_vector(time), estimate)

    def time_vector(self, time: Tensor) -> Tensor:
        """What the network adds to every position for a network time [B]: [B, H]."""
        t_vector: Tensor = self.time_mlp(time_features(time, self.config.time_dim))
        return t_vector

    def encode(
        self, x_t: Tensor, t_vector: Tensor, estimate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`features` of a time that is given as its vector [B, H]."""
        projected, attended = self.enter(x_t, estimate)
        positions = self.positions()[: projected.shape[1]]
        h = projected + positions + t_vector[:, None]
        h = residual = self.dropout(self.input_norm(h))
        for block in self.blocks:
            h, residual = block(h, attended)
        if self.config.source == "masked":
            slots = self.config.target_slots
            h, residual = h[:, :slots], residual[:, :slots]
        return (self.output_norm(h) if self.config.norm == "pre" else h), residual

    def enter(self, x_t: Tensor, estimate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The blocks' input [B, L', H] before positions and time are added, and a mask of the
        positions that are attended to, bool [B, L']; None: all."""
        if self.config.source == "aligned":
            slots = x_t.shape[1] // 2
            source = x_t[:, slots:]
            read = windows(source, self.config.source_window)
            projected = self.input_projection(x_t[:, :slots]) + self.source_projection(read)
            attended: Tensor | None = present(source)
            estimate = None if estimate is None else estimate[:, :slots]
        else:
            projected, attended = self.input_projection(x_t), None
            if self.config.source == "masked":
                attended = present(x_t)
                attended[:, : self.config.target_slots] = True
        if estimate is not None:
            projected = projected + self.estimate_projection(estimate)
        return projected, attended

    def positions(self) -> Tensor:
        """The vector added to each position: [positions, H]."""
        if self.config.source != "masked":
            return self.position.weight
        slots, source = self.config.target_slots, self.config.source_positions
        given, generated = self.part.weight
        return torch.cat(
            [self.position.weight[:slots] + generated, self.position.weight[:source] + given]
        )

    def predict(self, hidden: Tensor) -> Tensor:
        """x̂0 [B, L, d] of a last hidden state [B, L, H], in float32."""
        # Differences of two predictions make the SiD loss: bfloat16 would cancel them away.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output_projection(hidden.to(torch.float32))


def windows(x: Tensor, size: int) -> Tensor:
    """Each position of x [B, L, d] beside its neighbours: [B, L, size · d], zeros at the ends."""
    if size == 1:
        return x
    length, side = x.shape[1], size // 2
    padded = F.pad(x, (0, 0, side, side))
    return torch.cat([padded[:, i : i + length] for i in range(size)], -1)


def present(x: Tensor) -> Tensor:
    """Whether each position of x [B, L, d] holds anything, bool [B, L]."""
    return (x != 0).any(-1)


def at_length(x: Tensor, length: int) -> Tensor:
    """x [B, L', …] with zeros behind it, up to `length` positions."""
    missing = length - x.shape[1]
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
