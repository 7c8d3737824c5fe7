"""R10: 16 threads get the answers that one alone gets, while models come and go beside them."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import tiny
from crowd import STANDSTILL, ask_from_threads
from installed import skip_without

import dlmone_fast
from dlmone_fast.errors import ModelNotLoadedError
from dlmone_fast.runtime import default

THREADS = 16


@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_threads_get_the_serial_answers(tmp_path: Path, monkeypatch, campaign, figure, backend):  # type: ignore[no-untyped-def]
    if backend == "openvino":
        skip_without("openvino")
    monkeypatch.setattr(default, "_last", [])
    monkeypatch.setattr(default, "_loaded", {})
    folders = [tiny.save(tmp_path / str(seed), seed=seed) for seed in range(3)]
    calls = 500 if campaign else 25
    prompts = tiny.prompts(calls)
    generator = default.load_model(folders[0], backend=backend)
    expected = dict(enumerate(generator.generate(prompts, seed=range(calls))))
    others = [default.load_model(folder, backend=backend) for folder in folders]
    texts = [other.generate(prompts[0]) for other in others]
    numbers = count()

    def load_and_unload() -> None:
        # By turns the model that is being used, under another object, and two others.
        which = next(numbers) % len(folders)
        other = dlmone_fast.load(folders[which], backend=backend)
        assert other.generate(prompts[0]) == texts[which]
        assert dlmone_fast.generate(prompts[0], model=folders[which]) == texts[which]
        dlmone_fast.unload()
        with pytest.raises(ModelNotLoadedError):
            other.generate(prompts[0])

    crowd = ask_from_threads(
        generator, prompts, threads=THREADS, calls=calls, beside=load_and_unload
    )
    assert not crowd.errors
    assert all(answers == expected for answers in crowd.answers)
    assert crowd.beside > 0
    figure(
        "R10",
        backend,
        "16 threads x 500 calls equal serial while models load and unload",
        f"{THREADS} threads x {calls} calls: {THREADS * calls:,} answers equal the serial ones, "
        f"{2 * crowd.beside} models loaded and unloaded meanwhile, never {STANDSTILL:.0f} s "
        "without an answer",
    )
