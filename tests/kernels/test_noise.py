from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlmone_fast.errors import BackendUnavailableError, UsageError
from dlmone_fast.kernels import dispatch, native
from dlmone_fast.kernels.noise import (
    Stream,
    draws_of,
    normal,
    normal_of_draws,
    permutation,
    philox_4x32,
    random_bits,
    reference,
    uniform_integers,
    words_of_draws,
)
from dlmone_fast.kernels.noise.native import normal as _cpp
from dlmone_fast.kernels.noise.native import words as _cpp_words
from dlmone_fast.kernels.noise.torch import box_muller

PATHS = ("avx512", "avx2", "portable")
BACKENDS = ("torch", "cpp", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that runs here."""
    return usable_or_skip(request.param)


def usable_or_skip(name: str) -> str:
    if name == "cpp" and not native.is_available():
        pytest.skip(f"native: {native.why_missing()}")
    if name == "triton":
        pytest.importorskip("triton")
    return name


def path_or_skip(path: str) -> str:
    if path not in native.cpu_paths():
        pytest.skip(f"no native path {path} here: {native.why_missing() or 'other CPU'}")
    return path


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


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_known_answers_on_every_backend(backend, device, counter, key, expected):
    draws = torch.tensor([[*key, counter[1], counter[2]]] * 2, device=where(backend, device))
    words = words_of_draws(draws, counter[0], 1, first=counter[3], kernel_backend=backend)
    assert words.tolist() == [[list(expected)]] * 2


def where(backend: str, device: torch.device) -> torch.device:
    return torch.device("cpu") if backend == "cpp" else device


def some_draws(rows: int) -> Tensor:
    draws = torch.randint(2**32, (rows, 4), generator=torch.Generator().manual_seed(rows))
    draws[0] = torch.tensor([0, 2**32 - 1, 2**32 - 1, 2**31])
    return draws


@pytest.mark.parametrize(
    ("stream", "first", "count"), [(0, 0, 700), (2**32 - 1, 2**31 - 3, 7), (1, 2**32 - 65, 65)]
)
def test_words_are_the_same_on_every_backend(backend, device, stream: int, first: int, count: int):
    draws = some_draws(3)
    expected = reference.philox_words(draws, stream, first, count)
    assert expected[2, -1].tolist() == list(
        philox_by_hand(
            int(draws[2, 0]) + (int(draws[2, 1]) << 32),
            stream,
            int(draws[2, 2]),
            int(draws[2, 3]),
            first + count - 1,
        )
    )
    there = draws.to(where(backend, device))
    words = words_of_draws(there, stream, count, first, kernel_backend=backend)
    assert torch.equal(words.cpu(), expected)


@pytest.mark.parametrize("path", PATHS)
def test_words_and_normals_are_the_same_on_every_instruction_set(path: str):
    path_or_skip(path)
    draws = some_draws(5)
    assert torch.equal(
        _cpp_words(draws, 7, 2**32 - 200, 200, path),
        reference.philox_words(draws, 7, 2**32 - 200, 200),
    )
    for positions, channels in ((1, 1), (70, 3), (67, 128), (3, 4098)):
        found = _cpp(draws, 7, positions, channels, path)
        assert same_bits(found, _cpp(draws, 7, positions, channels, "portable"))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells 0 from -0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize(("positions", "channels"), [(1, 1), (5, 7), (33, 128), (2, 131), (9, 32)])
def test_normals_match_the_fp64_reference(backend, device, positions: int, channels: int):
    draws = some_draws(3)
    exact = reference.normal(draws, 3, positions, channels)
    there = draws.to(where(backend, device))
    noise = normal_of_draws(there, 3, positions, channels, kernel_backend=backend).cpu()
    assert noise.shape == (3, positions, channels)
    assert noise.is_contiguous()
    # fp64 rounded once to fp32, or evaluated in fp32: see the docstring of the module.
    relative, absolute = (0.0, 1e-6) if backend == "triton" else (2.0**-24 * 1.000001, 1e-15)
    error = (noise.double() - exact).abs()
    assert bool((error <= relative * exact.abs() + absolute).all()), float(error.max())


def test_the_native_normals_are_torch_s_but_for_the_last_bit_of_a_few():
    usable_or_skip("cpp")
    rows = list(range(20))
    ours = normal(9, Stream.EVALUATION, rows, 0, 1024, 128, kernel_backend="cpp")
    torchs = normal(9, Stream.EVALUATION, rows, 0, 1024, 128, kernel_backend="torch")
    different = ours != torchs
    assert different.sum() <= 1e-5 * ours.numel()
    ulps = (ours.view(torch.int32).long() - torchs.view(torch.int32).long()).abs()
    # At exact quarter turns one of the two is 0 here and the rounding of pi there.
    assert bool(((ulps <= 1) | ((ours - torchs).abs() < 1e-15)).all())


def test_the_number_of_threads_does_not_change_a_bit():
    usable_or_skip("cpp")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(normal(1, 0, [5, 6, 7], 2, 97, 130, kernel_backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


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
def test_normals_follow_the_packing(backend, device, channels: int):
    seeds, samples, steps = [2**64 - 1, 12345], [0, 9], [3, 2**32 - 1]
    noise = normal(
        seeds, Stream.GENERATION, samples, steps, 5, channels,
        device=where(backend, device), kernel_backend=backend,
    ).cpu()  # fmt: skip
    assert noise.shape == (2, 5, channels)
    assert noise.dtype == torch.float32
    blocks = -(-channels // 4)
    for row, position, block in ((0, 0, 0), (1, 4, blocks - 1)):
        c3 = position * blocks + block
        words = philox_by_hand(seeds[row], Stream.GENERATION, samples[row], steps[row], c3)
        expected = torch.tensor(box_muller_by_hand(words))
        got = noise[row, position, 4 * block : 4 * block + 4]
        torch.testing.assert_close(got, expected[: len(got)], rtol=1e-6, atol=1e-6)


def test_the_ends_of_the_word_range_give_finite_normals():
    # Word 0 gives the largest radius, sqrt(66 ln 2); word 2^32 - 1 rounds to u = 1 and gives 0.
    words = torch.tensor([[0, 2**32 - 1], [0, 0], [2**32 - 1, 0], [0, 0]]).unbind(0)
    out = torch.empty(2, 4)
    box_muller(words, out)
    largest = math.sqrt(66 * math.log(2))
    assert out[0].tolist() == pytest.approx([largest, 0, 0, 0], abs=1e-6)
    assert out[1].tolist() == pytest.approx([0, 0, largest, 0], abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 30), (64, 128)])
def test_a_row_does_not_depend_on_its_companions(backend, device, shape: tuple[int, int]):
    # An interpreted program takes a while; rows and tiles differ in nothing but their numbers.
    rows = 3 if backend == "triton" else 37
    shape = (min(shape[0], 9), shape[1]) if backend == "triton" else shape
    samples = torch.arange(rows)
    seeds = [7 * i for i in range(rows)]

    def noise(seed, sample) -> Tensor:
        made = where(backend, device)
        return normal(seed, Stream.GENERATION, sample, 2, *shape, made, kernel_backend=backend)

    batch = noise(seeds, samples)
    for row in {0, rows // 2, rows - 1}:
        assert same_bits(noise(seeds[row], row)[0], batch[row])
    assert same_bits(noise(seeds[::-1], samples.flip(0)).flip(0), batch)


def test_a_long_batch_is_made_in_passes_without_seams():
    whole = normal(1, 0, list(range(70)), 0, 128, 64, kernel_backend="torch")
    part = normal(1, 0, [33, 34, 35], 0, 128, 64, kernel_backend="torch")
    assert torch.equal(whole[33:36], part)


def kolmogorov_smirnov(values: Tensor) -> float:
    ordered = values.double().flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (expected - steps).abs().max().item()


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_normals_are_standard_and_uncorrelated(name: str):
    rows = list(range(32))
    backend = usable_or_skip(name)
    noise = normal(2024, Stream.TEACHER_NOISE, rows, 0, 64, 128, kernel_backend=backend).double()
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
        ({"sample": 1.5}, "sample must be an int, got float"),
        ({"sample": [0, 1.5]}, "sample must be an int, got float"),
        ({"sample": torch.tensor([0.0, 1.5])}, r"sample must hold integers, got torch.float32"),
        ({"step": torch.tensor(1.5)}, r"step must hold integers, got torch.float32.*\.long"),
        ({"step": torch.tensor([True])}, r"step must hold integers, got torch.bool"),
        ({"stream": 2**32}, r"stream must lie in \[0, 2\^32\), got 4294967296"),
        ({"stream": 0.5}, "stream must be an int, got float"),
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


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_streams_out_of_range_are_refused_everywhere(stream: int):
    # They would wrap around into the numbers of another purpose.
    for draw in (
        lambda: random_bits(0, stream, 0, 0, 0),
        lambda: uniform_integers(0, stream, 0, 0, 0, 5),
        lambda: permutation(0, stream, 0, 5),
        lambda: normal(0, stream, 0, 0, 1, 1),
        lambda: words_of_draws(draws_of(0, 0, 0, torch.device("cpu")), stream, 1),
    ):
        with pytest.raises(UsageError, match=r"stream must lie in \[0, 2\^32\)"):
            draw()


def test_random_bits_refuses_an_index_that_is_no_integer():
    with pytest.raises(UsageError, match="index must hold integers"):
        random_bits(0, 0, 0, 0, torch.tensor([0.5]))


def test_low_level_refusals():
    draws = draws_of(1, 2, 3, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"draws must be int64 \[B, 4\].*draws_of"):
        normal_of_draws(draws.int(), 0, 1, 1)
    with pytest.raises(UsageError, match=r"draws must be int64 \[B, 4\]"):
        words_of_draws(draws[0], 0, 1)
    with pytest.raises(UsageError, match=r"stream must lie in \[0, 2\^32\), got -1"):
        normal_of_draws(draws, -1, 1, 1)
    with pytest.raises(UsageError, match="first=4294967295 and count=2"):
        words_of_draws(draws, 0, 2, first=2**32 - 1)
    with pytest.raises(UsageError, match=r"sample must be one number or 1-D, got shape \(2, 2\)"):
        normal(0, 0, torch.zeros(2, 2).long(), 0, 1, 1)


def test_draws_hold_the_halves_of_the_seed_the_sample_and_the_step():
    cpu = torch.device("cpu")
    seed = 0xFEDCBA9876543210
    row = [0x76543210, 0xFEDCBA98, 5, 6]
    assert draws_of(seed, 5, 6, cpu).tolist() == [row]
    assert draws_of([seed, 1], 5, torch.tensor(6), cpu).tolist() == [row, [1, 0, 5, 6]]
    assert draws_of(seed, torch.tensor([5, 9]), 6, cpu).tolist() == [row, [*row[:2], 9, 6]]


def test_forcing_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "why_missing", lambda: "it was left out")
    assert normal(0, 0, 0, 0, 1, 4).shape == (1, 1, 4)
    with (
        dispatch.force_backend("cpp", op="noise"),
        pytest.raises(BackendUnavailableError, match="it was left out"),
    ):
        normal(0, 0, 0, 0, 1, 4)


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
def test_more_threads_than_the_native_code_takes(monkeypatch: pytest.MonkeyPatch):
    expected = normal(0, 0, 0, 0, 3, 4, kernel_backend="torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1025)
    assert torch.equal(normal(0, 0, 0, 0, 3, 4), expected)
    with pytest.raises(BackendUnavailableError, match="at most 1024 threads"):
        normal(0, 0, 0, 0, 3, 4, kernel_backend="cpp")


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": None}, "draws must be a tensor"),
        ({"draws": torch.zeros(1, 4)}, "draws must be int64"),
        ({"draws": torch.zeros(1, 3).long()}, r"draws must be \[1, 4\], got \[1, 3\]"),
        ({"draws": torch.zeros(4, 2).long().t()}, "draws must be"),
        ({"draws": torch.zeros(1, 8).long()[:, ::2]}, "draws must be contiguous"),
        ({"out": torch.zeros(2, 2, 4)}, r"out must be \[1, 2, 4\], got \[2, 2, 4\]"),
        ({"out": torch.zeros(1, 2, 4).double()}, "out must be float32"),
        ({"out": torch.zeros(1, 2, 1).expand(1, 2, 4)}, "out must be contiguous"),
        ({"out": torch.zeros(1, 2, 0)}, "channels must lie in"),
        ({"stream": 2**32}, "stream must lie in"),
        ({"stream": -1}, "stream must lie in"),
        ({"threads": 0}, "threads must lie in"),
        ({"path": "mmx"}, "no path 'mmx'"),
    ],
)
def test_the_native_side_refuses_what_it_cannot_draw(change: dict, message: str):
    draws, out = torch.zeros(1, 4, dtype=torch.int64), torch.empty(1, 2, 4)
    arguments = {"draws": draws, "stream": 0, "out": out, "threads": 1}
    with pytest.raises(ValueError, match=message):
        native.module().normal(**{**arguments, **change})
    inside = draws.view(torch.float32).view(1, 2, 4)
    with pytest.raises(ValueError, match="out must not share memory with draws"):
        native.module().normal(draws, 0, inside, 1)


@pytest.mark.skipif(not native.is_available(), reason=f"native: {native.why_missing()}")
@pytest.mark.parametrize(("first", "count"), [(-1, 1), (2**32, 1), (2**32 - 1, 2), (2**63 - 1, 1)])
def test_the_native_side_refuses_counters_that_do_not_exist(first: int, count: int):
    draws, out = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, count, 4).long()
    with pytest.raises(ValueError, match="first and count must lie in"):
        native.module().philox_words(draws, 0, first, out, 1)
    native.module().philox_words(draws, 0, 2**32 - count, out, 1)
    with pytest.raises(ValueError, match=r"out must be \[1, 3, 4\]"):
        native.module().philox_words(draws, 0, 0, torch.zeros(1, 3, 5).long(), 1)


def test_noise_can_be_compiled_without_a_graph_break():
    def draw(samples: Tensor) -> Tensor:
        return normal(2**63 + 5, Stream.GENERATION, samples, 3, 5, 6)

    samples = torch.arange(4)
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(samples), draw(samples))


def test_empty_shapes(backend, device):
    place = where(backend, device)
    assert normal(0, 0, [], 0, 3, 4, place, backend).shape == (0, 3, 4)
    assert normal(0, 0, [1, 2], 0, 0, 4, place, backend).shape == (2, 0, 4)
    draws = draws_of(0, [1, 2], 0, place)
    assert words_of_draws(draws, 0, 0, kernel_backend=backend).shape == (2, 0, 4)
    assert words_of_draws(draws[:0], 0, 3, kernel_backend=backend).shape == (0, 3, 4)
