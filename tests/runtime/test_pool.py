"""Calls are bounded, runners are never shared, and what was closed or forked says so."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from crowd import ask_from_threads

from dlmone_fast.errors import ForkedProcessError, ModelNotLoadedError, QueueFullError, UsageError
from dlmone_fast.runtime import Generator
from dlmone_fast.runtime.engines import Engine, Runner
from dlmone_fast.runtime.pool import RunnerPool


class CountingEngine(Engine):
    name = "counting"
    precision = "fp32"
    runners = 2

    def __init__(self) -> None:
        self.made: list[Runner] = []
        self.closed = 0
        self.fails = False

    def runner(self) -> Runner:
        if self.fails:
            raise RuntimeError("no memory")
        self.made.append(CountingRunner())
        return self.made[-1]

    def close(self) -> None:
        self.closed += 1


class CountingRunner(Runner):
    def __init__(self) -> None:
        self.users = 0

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x_t


def test_a_runner_has_one_user_and_no_more_are_made_than_the_engine_wants():
    engine = CountingEngine()
    pool = RunnerPool(engine)

    def use(_: int) -> int:
        with pool.call(), pool.runner() as runner:
            runner.users += 1
            time.sleep(1e-4)
            users = runner.users
            runner.users -= 1
        return users

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(use, range(200))) == {1}
    assert len(engine.made) == 2


def test_calls_beyond_the_bound_are_refused_at_once_and_served_later():
    pool = RunnerPool(CountingEngine(), max_queued=1)
    with pool.call(), pool.call(), pool.call():
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            with pytest.raises(QueueFullError, match="max_queued"), pool.call():
                pass
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1e-3
    with pool.call(), pool.runner():
        pass


def test_a_full_queue_refuses_a_batch_without_reading_it():
    class Unread(list):
        def __len__(self) -> int:
            raise AssertionError("it was read")

        __iter__ = __getitem__ = __len__  # type: ignore[assignment]

    generator = tiny.generator(max_queued=0)
    with generator._executor.pool.call():
        for call in ({}, {"seed": Unread()}):
            with pytest.raises(QueueFullError):
                generator.generate(Unread(), **call)
        with pytest.raises(QueueFullError):
            generator.generate_candidates(Unread(), seeds=Unread())
    with pytest.raises(AssertionError, match="it was read"):
        generator.generate(Unread())


def test_a_runner_that_cannot_be_made_leaves_room_for_the_next_try():
    engine = CountingEngine()
    pool = RunnerPool(engine)
    engine.fails = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory"), pool.runner():
            pass
    engine.fails = False
    with pool.runner(), pool.runner():
        pass


def test_closing_waits_for_calls_and_refuses_later_ones():
    engine = CountingEngine()
    pool = RunnerPool(engine)
    entered, leave, order = threading.Event(), threading.Event(), []

    def serve() -> None:
        with pool.call(), pool.runner():
            entered.set()
            leave.wait(10)
            order.append("served")

    server = threading.Thread(target=serve)
    server.start()
    assert entered.wait(10)
    closer = threading.Thread(target=lambda: (pool.close(), order.append("closed")))
    closer.start()

    def call_until_refused() -> None:
        while True:
            with pool.call():
                time.sleep(1e-3)

    with pytest.raises(ModelNotLoadedError, match=r"dlmone_fast\.load"):
        call_until_refused()
    assert engine.closed == 0
    leave.set()
    server.join(10)
    closer.join(10)
    assert order == ["served", "closed"]
    pool.close()
    assert engine.closed == 1


def _generate_in_child(generator: Generator, results: multiprocessing.SimpleQueue) -> None:
    try:
        results.put(generator.generate("ba ce"))
    except ForkedProcessError as error:
        results.put(f"refused: {error}")


def in_a_fork(generator: Generator) -> str:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_generate_in_child, args=(generator, results))
    child.start()
    child.join(60)
    return str(results.get())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_model_that_ran_is_refused_in_a_fork_and_one_that_did_not_is_not():
    torch.set_num_threads(1)
    ran, fresh = tiny.generator(), tiny.generator()
    expected = ran.generate("ba ce")
    assert "load the model in each process" in in_a_fork(ran)
    assert in_a_fork(fresh) == expected


def test_threads_get_the_serial_answers_while_others_load_and_unload():
    generator, prompts = tiny.generator(), tiny.prompts(200)
    expected = generator.generate(prompts, seed=range(200))

    def load_and_unload() -> None:
        other = tiny.generator(seed=1)
        other.generate(prompts[0])
        other.unload()
        with pytest.raises(ModelNotLoadedError):
            other.generate(prompts[0])

    crowd = ask_from_threads(generator, prompts, threads=16, calls=200, beside=load_and_unload)
    assert not crowd.errors
    assert crowd.beside > 0
    assert all(answers == dict(enumerate(expected)) for answers in crowd.answers)


def test_warmup_makes_every_runner_and_checks_its_arguments():
    generator = tiny.generator()
    engine = CountingEngine()
    own = generator._executor.pool.engine

    def made() -> Runner:
        engine.made.append(own.runner())
        return engine.made[-1]

    engine.runner = made  # type: ignore[method-assign]
    generator._executor.pool.engine = engine
    generator.warmup(batch_sizes=[1, 3], lengths=[tiny.SEQ_LEN])
    assert len(engine.made) == 2
    with pytest.raises(UsageError, match=r"lengths must be \[20\]"):
        generator.warmup(lengths=[16])
    with pytest.raises(UsageError, match="batch_sizes"):
        generator.warmup(batch_sizes=[0])


def test_warm_ups_side_by_side_do_not_wait_for_each_other():
    generator = tiny.generator()
    engine = CountingEngine()
    own = generator._executor.pool.engine
    engine.runner = lambda: (time.sleep(0.01), own.runner())[1]  # type: ignore[method-assign]
    generator._executor.pool.engine = engine
    with ThreadPoolExecutor(4) as threads:
        waits = [threads.submit(generator.warmup) for _ in range(4)]
        assert [wait.result(timeout=60) for wait in waits] == [None] * 4
    assert isinstance(generator.generate("ba"), str)


def test_an_interrupted_or_failed_closing_is_finished_by_the_next():
    engine = CountingEngine()
    pool = RunnerPool(engine)
    engine.close = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ZeroDivisionError):
        pool.close()
    del engine.close
    pool.close()
    assert engine.closed == 1


def test_everyone_who_closes_waits_for_calls_under_way():
    pool = RunnerPool(CountingEngine())
    done: list[str] = []
    closers = [threading.Thread(target=lambda: (pool.close(), done.append("closed")))
               for _ in range(2)]  # fmt: skip
    with pool.call():
        for closer in closers:
            closer.start()
        time.sleep(0.05)
        done.append("call")
    for closer in closers:
        closer.join(10)
    assert done == ["call", "closed", "closed"]
