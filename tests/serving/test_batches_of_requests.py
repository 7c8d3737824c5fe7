"""Jobs that share a batch get what each would get alone."""

from __future__ import annotations

import itertools
import queue
import time
from typing import Any

import pytest
import tiny
import words
from litserve.utils import LitAPIStatus

from dlmone_fast.aligned_tokenizer import AlignedTokenizer
from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.runtime import Generator
from dlmone_fast.serve import main
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.serving.spec import PROBE
from dlmone_fast.serving.worker import BatchLoop, Worker
from dlmone_fast.serving.workers import Workers

DEFAULTS = {
    "seed": 0, "steps": None, "temperature": None, "num_candidates": 1, "select": "none",
    "on_overflow": "error",
}  # fmt: skip


@pytest.fixture
def worker() -> Worker:
    """With its model, in this process."""
    made = Worker(ServeOptions("", max_batch_size=8, batch_timeout_ms=1), Workers(), None)
    made.generator = tiny.generator()
    return made


def jobs(count: int) -> list[dict[str, Any]]:
    """All kinds of settings, in turns, over different prompts."""
    kinds = itertools.cycle(
        itertools.product(
            (None, 2), (None, 0.5), ((1, "none"), (3, "none"), (3, "mbr")), ("error", "truncate")
        )
    )
    texts, found = iter(tiny.prompts(3 * count)), []
    for i, (steps, temperature, (candidates, select), overflow) in zip(
        range(count), kinds, strict=False
    ):
        prompts = [next(texts) for _ in range(i % 3 + 1)]
        seed = i if i % 2 else [1000 * i + n for n in range(len(prompts))]
        found.append({
            "prompts": prompts, "seed": seed, "steps": steps,
            "temperature": temperature, "num_candidates": candidates, "select": select,
            "on_overflow": overflow,
        })  # fmt: skip
    return found


def test_each_job_gets_what_generate_alone_gives(worker: Worker):
    asked, alone = jobs(48), tiny.generator()
    answers = worker.predict(asked)
    for job, answer in zip(asked, answers, strict=True):
        settings = {name: value for name, value in job.items() if name != "prompts"}
        expected = alone.generate(job["prompts"], **settings)
        assert (answer["status"], answer["texts"]) == (200, expected)
    rows = sum(len(job["prompts"]) * job["num_candidates"] for job in asked)
    assert sum(answer["rows"] for answer in answers) == rows


def test_a_bad_prompt_is_its_own_job_s_trouble(worker: Worker):
    asked = [{**DEFAULTS, "prompts": ["ba"]}, {**DEFAULTS, "prompts": ["ba", "ba " * 30]}]
    good, bad = worker.predict(asked)
    assert good["texts"] == [tiny.generator().generate("ba")]
    assert bad["status"] == 422
    assert bad["detail"].startswith("prompts[1]: 32 tokens")


def test_a_probe_is_in_no_count_of_rows(worker: Worker):
    asked = [{**DEFAULTS, "prompts": prompts} for prompts in (["ba", "be"], ["bi"])]
    answers = worker.predict([PROBE, *asked])
    assert [answer["status"] for answer in answers] == [200, 200, 200]
    assert [answer["rows"] for answer in answers] == [0, 3, 0]
    assert worker.predict([PROBE])[0]["rows"] == 0


def test_a_model_of_words_answers_probes_and_names_bad_words(worker: Worker):
    tokenizer = AlignedTokenizer.learn(words.pairs())
    network = tiny.denoiser(vocab_size=tokenizer.vocab_size)
    worker.generator = Generator(network, tokenizer, tiny.settings())
    worker.generator.warmup((1, 2))
    bad = {**DEFAULTS, "prompts": ["bat", "b4t"]}
    probed, good, refused = worker.predict([PROBE, {**DEFAULTS, "prompts": ["bat"]}, bad])
    assert (probed["status"], good["status"], refused["status"]) == (200, 200, 422)
    assert refused["detail"].startswith("prompts[1]: '4' (digit four)")


def test_settings_that_the_model_refuses_are_no_defect(worker: Worker):
    (answer,) = worker.predict([{**DEFAULTS, "prompts": ["ba"], "steps": 99_999}])
    assert answer["status"] == 422, answer
    assert "steps" in answer["detail"]


def test_a_defect_is_told_to_its_jobs_and_logged(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(worker.generator, "generate", fail)
    answers = worker.predict([{**DEFAULTS, "prompts": ["ba"]}] * 2)
    assert [answer["status"] for answer in answers] == [500, 500]
    assert "out of paper" in caplog.text


class Transport:
    """What is put is kept."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any, LitAPIStatus]] = []

    def send(self, item: Any, consumer_id: int) -> None:
        uid, (data, status, *_) = item
        self.sent.append((uid, data, status))


def test_a_batch_is_what_waits_up_to_its_size_without_what_is_too_late(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LITSERVE_WORKER_ID", "0")
    waiting: queue.Queue[Any] = queue.Queue()
    loop, transport, now = BatchLoop(), Transport(), time.monotonic()
    loop._restart_workers = True
    for i in range(7):
        since = now - 1000 if i == 1 else now
        waiting.put((0, f"r{i}", since, {**DEFAULTS, "prompts": ["ba", "be"], "seed": i}))
    for _ in range(2):
        loop.run(worker, "cpu", 0, waiting, transport, {}, None)
    done = [uid for uid, _, status in transport.sent if status == LitAPIStatus.OK]
    begun = [uid for uid, _, status in transport.sent if status == LitAPIStatus.START]
    assert done == begun == ["r0", "r2", "r3", "r4", "r5", "r6"]
    # Four jobs of two prompts fill a batch of eight rows.
    assert [data["rows"] for _, data, status in transport.sent if status == LitAPIStatus.OK] == [
        8, 0, 0, 0, 4, 0,
    ]  # fmt: skip


def test_without_litserve_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'dlmone_fast\[serve\]'"):
        main(["--model", "model"])
