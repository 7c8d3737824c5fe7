"""Cross-entropy of a linear decoder, without all logits in memory."""

from dlmone_fast.kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
