from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import UsageError
from dlmone_fast.kernels.noise import (
    Stream,
    normal,
    permutation,
    philox_4x32,
    random_bits,
    uniform_integers,
)
from dlmone_fast.kernels.philox import box_muller

# Known answers published with Random123 (Salmon et al., SC 2011), philox4x32-10:
# counter, key, result.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_by_hand(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's unbounded integers."""
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_known_answers(counter, key, expected):
    assert philox_4x32(key, torch.tensor(counter)).tolist() == list(expected)
    tensors = (torch.tensor(key[0]), torch.tensor(key[1]))
    assert philox_4x32(tensors, torch.tensor([counter, counter]))[1].tolist() == list(expected)
    assert philox_by_hand(key[0] + (key[1] << 32), *counter) == expected


def test_packing_of_seed_stream_sample_step_and_position():
    seed, sample, step = 0xFEDCBA9876543210, 2**32 - 1, 2**32 - 2
    for index in (0, 1, 6, 4 * 2**32 - 1):
        words = philox_by_hand(seed, Stream.TIMESTEP, sample, step, index // 4)
        got = random_bits(seed, Stream.TIMESTEP, sample, step, index)
        assert got.item() == words[index % 4]


def test_bits_broadcast():
    bits = random_bits([1, 2], 3, torch.arange(2), 5, torch.arange(10)[:, None])
    assert bits.shape == (10, 2)
    assert bits[7, 1].item() == philox_by_hand(2, 3, 1, 5, 1)[3]


def box_muller_by_hand(words: tuple[int, ...]) -> list[float]:
    def unit(word: int) -> float:
        return (torch.tensor(word).float() * 2.0**-32 + 2.0**-33).item()

    values = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log(unit(radius_word)))
        angle = 2 * math.pi * unit(angle_word)
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values


@pytest.mark.parametrize("channels", [1, 4, 7, 128])
def test_normals_follow_the_packing(channels: int):
    seeds, samples, steps = [2**64 - 1, 12345], [0, 9], [3, 2**32 - 1]
    noise = normal(seeds, Stream.GENERATION, samples, steps, 5, channels)
    assert noise.shape == (2, 5, channels)
    assert noise.dtype == torch.float32
    blocks = -(-channels // 4)
    for row, position, block in ((0, 0, 0), (1, 4, blocks - 1)):
        c3 = position * blocks + block
        words = philox_by_hand(seeds[row], Stream.GENERATION, samples[row], steps[row], c3)
        expected = torch.tensor(box_muller_by_hand(words))
        got = noise[row, position, 4 * block : 4 * block + 4]
        torch.testing.assert_close(got, expected[: len(got)], rtol=1e-6, atol=1e-7)


def test_the_ends_of_the_word_range_give_finite_normals():
    # Word 0 gives the largest radius, sqrt(66 ln 2); word 2^32 - 1 rounds to u = 1 and gives 0.
    words = torch.tensor([[0, 2**32 - 1], [0, 0], [2**32 - 1, 0], [0, 0]]).unbind(0)
    out = torch.empty(2, 4)
    box_muller(words, out)
    largest = math.sqrt(66 * math.log(2))
    assert out[0].tolist() == pytest.approx([largest, 0, 0, 0], abs=1e-6)
    assert out[1].tolist() == pytest.approx([0, 0, largest, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 30), (64, 128)])
def test_a_row_does_not_depend_on_its_companions(shape: tuple[int, int]):
    samples = torch.arange(37)
    seeds = [7 * i for i in range(37)]
    batch = normal(seeds, Stream.GENERATION, samples, 2, *shape)
    for row in (0, 1, 18, 36):
        alone = normal(seeds[row], Stream.GENERATION, row, 2, *shape)
        assert torch.equal(alone[0], batch[row])
    flipped = normal(seeds[::-1], Stream.GENERATION, samples.flip(0), 2, *shape)
    assert torch.equal(flipped.flip(0), batch)


def test_a_long_batch_is_made_in_passes_without_seams():
    whole = normal(1, 0, list(range(70)), 0, 128, 64)
    assert torch.equal(whole[33:36], normal(1, 0, [33, 34, 35], 0, 128, 64))


def kolmogorov_smirnov(values: Tensor) -> float:
    ordered = values.double().flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (expected - steps).abs().max().item()


def test_normals_are_standard_and_uncorrelated():
    noise = normal(2024, Stream.TEACHER_NOISE, list(range(32)), 0, 64, 128).double()
    count = noise.numel()
    assert abs(noise.mean().item()) < 4 / math.sqrt(count)
    assert abs(noise.var().item() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**4).mean().item() - 3) < 4 * math.sqrt(96 / count)
    assert kolmogorov_smirnov(noise) < 1.95 / math.sqrt(count)
    channels = noise.flatten(0, 1)
    correlation = channels.T @ channels / len(channels) - torch.eye(128)
    assert correlation.abs().max() < 6 / math.sqrt(len(channels))


@pytest.mark.parametrize("change", ["seed", "stream", "sample", "step"])
def test_every_word_of_key_and_counter_matters(change: str):
    arguments = {"seed": 5, "stream": 1, "sample": 2, "step": 3}
    first = normal(**arguments, positions=16, channels=64)
    second = normal(**{**arguments, change: 4}, positions=16, channels=64)
    assert abs((first * second).mean().item()) < 4 / math.sqrt(first.numel())


def test_the_high_half_of_the_seed_matters():
    assert not torch.equal(normal(1, 0, 0, 0, 2, 4), normal(1 + 2**32, 0, 0, 0, 2, 4))


def test_uniform_integers_cover_their_range_evenly():
    draws = uniform_integers(3, Stream.TIMESTEP, torch.arange(70_000), 1, -2, 5)
    counts = torch.bincount(draws + 2, minlength=7)
    assert len(counts) == 7
    chi_squared = ((counts - 10_000.0) ** 2 / 10_000).sum().item()
    assert chi_squared < 27.9  # the 0.9999 quantile for 6 degrees of freedom


def test_uniform_integers_are_the_multiply_shift_of_64_bits():
    for sample in range(20):
        word0, word1 = philox_by_hand(3, Stream.TIMESTEP, sample, 9, 0)[:2]
        expected = 10 + ((word0 + (word1 << 32)) * 2_000_000_011 >> 64)
        assert uniform_integers(3, Stream.TIMESTEP, sample, 9, 10, 2_000_000_021) == expected


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one_and_repeats(n: int):
    order = permutation(11, Stream.DATA_ORDER, 4, n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(11, Stream.DATA_ORDER, 4, n))


def test_permutation_sorts_unsigned_keys():
    keys = []
    for item in range(50):
        word0, word1 = philox_by_hand(11, Stream.DATA_ORDER, item, 4, 0)[:2]
        keys.append((word0 << 32) + word1)
    expected = sorted(range(50), key=lambda item: (keys[item], item))
    assert permutation(11, Stream.DATA_ORDER, 4, 50).tolist() == expected
    assert permutation(11, Stream.DATA_ORDER, 5, 50).tolist() != expected


def test_streams_have_distinct_values():
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must lie in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"seed": [0, 2**64]}, "seed must lie in"),
        ({"seed": 0.5}, "seed must be an int, got float"),
        ({"sample": 2**32}, "sample must lie in"),
        ({"sample": torch.tensor([0, -1])}, "sample must lie in"),
        ({"step": -3}, "step must lie in"),
        ({"seed": [1, 2], "sample": [1, 2, 3]}, "seed has 2, sample has 3"),
        ({"positions": -1}, "positions >= 0"),
        ({"channels": 0}, "channels >= 1"),
        ({"positions": 2**31, "channels": 16}, "one counter word"),
    ],
)
def test_refusals(change: dict, message: str):
    arguments = {"seed": 0, "stream": 0, "sample": 0, "step": 0, "positions": 2, "channels": 3}
    with pytest.raises(UsageError, match=message):
        normal(**{**arguments, **change})


def test_integer_range_refusals():
    with pytest.raises(UsageError, match="high - low"):
        uniform_integers(0, 0, 0, 0, 5, 5)
    with pytest.raises(UsageError, match="high - low"):
        uniform_integers(0, 0, 0, 0, 0, 2**31)
    with pytest.raises(UsageError, match="permutation: n"):
        permutation(0, 0, 0, -1)


def test_empty_shapes():
    assert normal(0, 0, [], 0, 3, 4).shape == (0, 3, 4)
    assert normal(0, 0, [1, 2], 0, 0, 4).shape == (2, 0, 4)
