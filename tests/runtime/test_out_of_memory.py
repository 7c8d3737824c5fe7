"""A batch that a GPU's memory does not hold is generated in parts, with the same answers."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch

from dlmone_fast.runtime import Generator


class Device:
    """A generator's engine runs out of memory above so many rows."""

    def __init__(self, generator: Generator, rows: int) -> None:
        self.rows = rows
        self.batches: list[int] = []
        engine = generator._executor.pool.engine
        runner = engine.runner()
        for name in ("predict", "predict_from"):
            setattr(runner, name, self._limited(getattr(runner, name)))
        engine.runner = lambda: runner  # type: ignore[method-assign]

    def _limited(self, run):  # type: ignore[no-untyped-def]
        def call(x_t: torch.Tensor, *rest: object) -> torch.Tensor:
            self.batches.append(len(x_t))
            if len(x_t) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return run(x_t, *rest)

        return call


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("room", [1, 3, 10])
def test_parts_that_fit_have_the_same_answers(kind: str, room: int, caplog):  # type: ignore[no-untyped-def]
    prompts, seeds = tiny.prompts(21), list(range(21))
    expected = tiny.generator(kind).generate(prompts, seed=seeds)
    generator = tiny.generator(kind)
    device = Device(generator, room)
    with caplog.at_level(logging.WARNING, logger="dlmone_fast"):
        assert generator.generate(prompts, seed=seeds) == expected
    assert "21 rows do not fit into the device's memory; parts of 10 from now on" in caplog.text
    # What does not fit is not tried again.
    device.batches.clear()
    assert generator.generate(prompts, seed=seeds) == expected
    assert max(device.batches) <= room


def test_one_row_that_does_not_fit_says_so_and_the_next_call_works():
    generator = tiny.generator()
    device = Device(generator, 0)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        generator.generate(["ba", "ce", "di"])
    assert device.batches == [3, 1]
    device.rows = 1
    assert generator.generate(["ba", "ce"]) == tiny.generator().generate(["ba", "ce"])


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    generator = tiny.generator()
    runner = generator._executor.pool.engine.runner()
    calls = []

    def broken(*_: object) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("shapes do not fit")

    runner.predict_from = broken  # type: ignore[method-assign]
    generator._executor.pool.engine.runner = lambda: runner  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        generator.generate(["ba", "ce"])
    assert len(calls) == 1
