"""Nearest-token rounding: the vocabulary row closest to each vector."""

from dlmone_fast.kernels.nearest_token.op import nearest_token, nearest_token_with_margin
from dlmone_fast.kernels.nearest_token.vocabulary import Vocabulary

__all__ = ["Vocabulary", "nearest_token", "nearest_token_with_margin"]
