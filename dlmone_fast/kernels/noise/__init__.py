"""Counter-based noise: random numbers as pure functions of (seed, stream, sample, step)."""

from dlmone_fast.kernels.noise.draws import LIMIT, PerRow, Stream, draws_of
from dlmone_fast.kernels.noise.op import (
    normal,
    normal_of_draws,
    permutation,
    philox_4x32,
    random_bits,
    uniform_integers,
    words_of_draws,
)

__all__ = [
    "LIMIT",
    "PerRow",
    "Stream",
    "draws_of",
    "normal",
    "normal_of_draws",
    "permutation",
    "philox_4x32",
    "random_bits",
    "uniform_integers",
    "words_of_draws",
]
