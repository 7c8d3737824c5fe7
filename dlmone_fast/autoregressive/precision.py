"""Copies of a model that multiply in bf16, beside fp32 weights that the optimiser moves."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.training.workspace import multiplies_bf16


def is_bf16(precision: str) -> bool:
    """Whether a precision means bf16 on this machine's CPU."""
    if precision == "auto":
        return multiplies_bf16(torch.device("cpu"))
    return precision == "bf16"


def for_inference(model: EncoderDecoder, bf16: bool) -> EncoderDecoder:
    """A copy that generates; in bf16 embeddings are stored in it too."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if bf16:
        _lower(copied)
        for module in copied.modules():
            if isinstance(module, nn.Embedding):
                module.to(torch.bfloat16)
    return copied


class WorkingCopy:
    """The network that forward and backward passes run in.

    In bf16 its linear layers are rounded copies of the weights: nothing is cast within a step, and
    a step's gradients come over in one call. Embeddings and LayerNorm stay in fp32, because many
    rounded gradients are summed in them. In fp32 it is the model itself.
    """

    def __init__(self, model: EncoderDecoder, bf16: bool) -> None:
        self.model = model
        self.network = model
        if bf16:
            self.network = copy.deepcopy(model)
            _lower(self.network)
        self._weights = list(model.parameters())
        self._copies = list(self.network.parameters())

    def take_gradients(self) -> None:
        """Give the model the network's gradients, and clear those."""
        if self.network is self.model:
            return
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._copies]
        torch._foreach_copy_([w.grad for w in self._weights], gradients)
        for p in self._copies:
            p.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights after they moved."""
        if self.network is not self.model:
            torch._foreach_copy_(self._copies, self._weights)


def _lower(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
