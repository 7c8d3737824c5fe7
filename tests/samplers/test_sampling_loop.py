"""The sampling loop: calls, memory, clean sources, rounding; and the grids it runs on."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import Tensor

from dlmone_fast.config import DiffusionConfig
from dlmone_fast.diffusion import Schedule
from dlmone_fast.errors import UsageError
from dlmone_fast.samplers.grids import METHODS, published_gap, timestep_grid
from dlmone_fast.samplers.loop import SamplerOptions, sample

SCHEDULE = Schedule(DiffusionConfig())
SHORT = Schedule(DiffusionConfig(num_timesteps=60))
SOURCE = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
FEW = [(method, 60 if method == "ancestral" else 12) for method in METHODS]


def noise(k: int) -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(k))


class Recorder:
    """A network that notes what it is called with and how many of its outputs are alive."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.times: list[int] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        self.inputs.append(x)
        self.times.append(int(t[0]))
        x0 = torch.tanh(0.5 * x)
        self.outputs.append(weakref.ref(x0))
        alive = sum(output() is not None for output in self.outputs)
        self.most_alive = max(self.most_alive, alive)
        return x0


def run(method: str, steps: int, network: Recorder, schedule: Schedule = SHORT) -> Tensor:
    options = SamplerOptions(method, steps, clamp=False)
    return sample(network, schedule, options, SOURCE, MASK, noise, lambda x: x)


@pytest.mark.parametrize(("method", "steps"), FEW)
def test_steps_are_network_calls(method: str, steps: int) -> None:
    network = Recorder()
    run(method, steps, network)
    assert len(network.times) == steps
    assert network.times == timestep_grid(method, steps, 60)
    assert network.times[0] == 59
    assert all(a > b for a, b in zip(network.times, network.times[1:], strict=False))
    assert network.times[-1] >= 0


@pytest.mark.parametrize(("method", "steps"), FEW)
def test_the_source_is_clean_in_every_call_and_in_the_result(method: str, steps: int) -> None:
    network = Recorder()
    for x in (run(method, steps, network), *network.inputs):
        assert torch.equal(x[MASK == 0], SOURCE[MASK == 0])
        assert not torch.isclose(x[MASK == 1], SOURCE[MASK == 1]).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_target_part_of_the_source_is_not_read(method: str) -> None:
    steps = dict(FEW)[method]
    other = torch.where((MASK == 1).unsqueeze(-1), SOURCE + 3, SOURCE)
    options = SamplerOptions(method, steps, clamp=False)
    found = [
        sample(Recorder(), SHORT, options, s, MASK, noise, lambda x: x) for s in (SOURCE, other)
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_steps(method: str) -> None:
    class Forgetful(Recorder):
        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            x0 = super().__call__(x, t)
            self.inputs.clear()
            return x0

    network = Forgetful()
    states: list[weakref.ref[Tensor]] = []
    most_states = 0

    def watch(k: int, t: int, x: Tensor) -> None:
        nonlocal most_states
        states.append(weakref.ref(x))
        most_states = max(most_states, sum(state() is not None for state in states))

    options = SamplerOptions(method, dict(FEW)[method], clamp=False)
    sample(network, SHORT, options, SOURCE, MASK, noise, lambda x: x, watch)
    # The newest output, and the one before it (kept for the multistep solver, still bound).
    assert network.most_alive <= 3
    assert most_states <= 2


def test_no_gradient_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    options = SamplerOptions("ddim", 3)
    x = sample(lambda x, t: x * weight, SHORT, options, SOURCE, MASK, noise, lambda x: x)
    assert not x.requires_grad


@pytest.mark.parametrize(("method", "rounds"), [(m, i < 2) for i, m in enumerate(METHODS)])
def test_rounding_is_as_each_method_was_published(method: str, rounds: bool) -> None:
    calls = 0

    def rounding(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.round()

    steps = dict(FEW)[method]
    for clamp, expected in ((None, rounds), (True, True), (False, False)):
        calls = 0
        options = SamplerOptions(method, steps, clamp=clamp)
        x = sample(Recorder(), SHORT, options, SOURCE, MASK, noise, rounding)
        assert calls == (steps if expected else 0)
        if expected and method != "published-ddim":
            # The last step returns the rounded prediction itself.
            assert torch.equal(x[MASK == 1], x[MASK == 1].round())


def test_q_sampling_forgets_the_state_and_ends_at_the_prediction() -> None:
    network = Recorder()
    x = run("q-sampling", 12, network)
    target = MASK == 1
    torch.testing.assert_close(x[target], torch.tanh(0.5 * network.inputs[-1])[target])
    for k in range(1, 12):
        x0 = torch.tanh(0.5 * network.inputs[k - 1])
        t = torch.full((2,), network.times[k])
        expected = SHORT.q_sample(x0, t, noise(k), MASK)
        torch.testing.assert_close(network.inputs[k][target], expected[target])


@pytest.mark.parametrize("method", ["ddim", "dpm-solver++"])
def test_deterministic_samplers_read_only_the_first_noise(method: str) -> None:
    asked: list[int] = []

    def counting(k: int) -> Tensor:
        asked.append(k)
        return noise(k)

    options = SamplerOptions(method, 12)
    sample(Recorder(), SHORT, options, SOURCE, MASK, counting, lambda x: x)
    assert asked == [0]


@pytest.mark.parametrize(
    ("steps", "gap"), [(65, 31), (200, 10), (286, 7), (667, 3), (1000, 2), (2000, 1)]
)
def test_the_published_grid_has_the_papers_calls(steps: int, gap: int) -> None:
    assert published_gap(steps, 2000) == gap
    grid = timestep_grid("published-ddim", steps, 2000)
    assert len(grid) == steps
    assert grid[0] == 1999
    assert {a - b for a, b in itertools.pairwise(grid)} == {gap}


def test_every_possible_published_number_of_calls_is_found_and_no_other() -> None:
    possible = {-(-2000 // gap) for gap in range(1, 2001)}
    for steps in range(1, 2001):
        if steps in possible:
            assert len(timestep_grid("published-ddim", steps, 2000)) == steps
        else:
            below = max(p for p in possible if p < steps)
            above = min(p for p in possible if p > steps)
            with pytest.raises(UsageError, match=f"nearest possible are {below} and {above}$"):
                published_gap(steps, 2000)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999, 1999, 2000])
@pytest.mark.parametrize("method", ["ddim", "dpm-solver++", "q-sampling"])
def test_every_number_of_calls_has_an_even_grid(method: str, steps: int) -> None:
    grid = timestep_grid(method, steps, 2000)
    assert len(grid) == steps
    assert grid[0] == 1999
    gaps = [a - b for a, b in itertools.pairwise(grid)]
    assert all(abs(gap - 2000 / steps) < 1 for gap in gaps)
    assert grid[-1] == round(2000 / steps) - 1


def test_impossible_numbers_of_calls_are_refused() -> None:
    with pytest.raises(UsageError, match="between 1 and 2000, got 2001"):
        timestep_grid("ddim", 2001, 2000)
    with pytest.raises(UsageError, match="between 1 and 2000, got 0"):
        timestep_grid("q-sampling", 0, 2000)
    with pytest.raises(UsageError, match="makes 2000 network calls, got steps=20; use ddim"):
        timestep_grid("ancestral", 20, 2000)
    with pytest.raises(UsageError, match=r"sampler must be one of ancestral.*got 'euler'"):
        timestep_grid("euler", 20, 2000)


@pytest.mark.parametrize(("method", "steps"), FEW)
@pytest.mark.parametrize("clamp", [False, True])
def test_self_conditioned_calls_see_the_last_prediction(
    method: str, steps: int, clamp: bool
) -> None:
    given: list[Tensor | None] = []
    predicted: list[Tensor] = []

    def network(x: Tensor, t: Tensor, estimate: Tensor | None) -> Tensor:
        given.append(estimate)
        predicted.append(torch.tanh(0.5 * x + (0 if estimate is None else 0.1 * estimate)))
        return predicted[-1]

    options = SamplerOptions(method, steps, clamp=clamp)
    sample(network, SHORT, options, SOURCE, MASK, noise, torch.round, self_conditioning=True)
    assert given[0] is None
    assert len(given) == steps
    for before, estimate in zip(predicted, given[1:], strict=False):
        # Not rounded, and with the clean source, as in training.
        assert estimate is not None
        assert torch.equal(estimate[MASK == 1], before[MASK == 1])
        assert torch.equal(estimate[MASK == 0], SOURCE[MASK == 0])
