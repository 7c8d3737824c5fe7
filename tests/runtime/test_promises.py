"""What a caller may rely on: answers that no companion changes, odd inputs answered at once."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import tiny
import torch
from installed import skip_without

import dlmone_fast
from dlmone_fast.errors import (
    BackendUnavailableError,
    ModelNotLoadedError,
    PromptError,
    UsageError,
)
from dlmone_fast.runtime import default


def token_ids(generator: Any, prompts: list[str], **call: Any) -> list[list[int]]:
    return generator.generate(prompts, return_dict=True, progress=False, **call).token_ids


def test_batch_invariance_runs_every_row_alone():
    generator = tiny.generator()
    sizes: list[int] = []
    ids = generator._executor.ids

    def watched(rows, *rest):  # type: ignore[no-untyped-def]
        sizes.append(len(rows))
        return ids(rows, *rest)

    generator._executor.ids = watched  # type: ignore[method-assign]
    prompts = tiny.prompts(5)
    together = token_ids(generator, prompts, num_candidates=2, batch_invariant=True)
    assert sizes == [1] * 10
    assert together == token_ids(generator, prompts, num_candidates=2)


def test_bf16_rows_are_the_same_in_any_company_when_asked_for():
    generator = tiny.generator(precision="bf16")
    prompts = tiny.prompts(64)
    seeds = list(range(64))
    expected = token_ids(generator, prompts, seed=seeds, batch_invariant=True)
    order = seeds[::-1]
    found = token_ids(
        generator, [prompts[i] for i in order], seed=order, batch_size=7, batch_invariant=True
    )
    assert found == [expected[i] for i in order]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [([], []), ("", str), ("   \t\n", str), ("x" * 1_000_000, PromptError)],
)
def test_odd_prompts_are_answered_or_refused_within_5_ms(batch: Any, expected: Any):
    torch.set_num_threads(1)
    generator = tiny.generator()
    generator.warmup()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        if expected is PromptError:
            with pytest.raises(PromptError, match="characters"):
                generator.generate(batch)
        elif expected is str:
            assert isinstance(generator.generate(batch), str)
        else:
            assert generator.generate(batch) == expected
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 5e-3


def test_a_blank_prompt_is_an_empty_source():
    generator = tiny.generator()
    assert generator.generate("") == generator.generate(" \n ")


def test_backends_are_named_and_refused_with_the_reason(tmp_path):  # type: ignore[no-untyped-def]
    folder = tiny.save(tmp_path / "model")
    assert default.load_model(folder, backend="eager").backend == "eager"
    with pytest.raises(UsageError, match="backend must be one of auto, eager"):
        default.load_model(folder, backend="tensorrt")
    with pytest.raises(BackendUnavailableError, match=r"'eager'.*int8"):
        default.load_model(folder, dtype="int8", backend="eager")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match=r"'graph' was asked for and cannot run"):
            default.load_model(folder, backend="graph")


def test_auto_that_finds_nothing_tells_every_reason(tmp_path):  # type: ignore[no-untyped-def]
    folder = tiny.save(tmp_path / "model")
    with pytest.raises(
        BackendUnavailableError, match=r"no backend can run int8.*eager:.*openvino:"
    ):
        default.load_model(folder, dtype="int8")


@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_unloading_gives_the_weights_back(tmp_path, monkeypatch, backend):  # type: ignore[no-untyped-def]
    if backend == "openvino":
        skip_without("openvino")
    monkeypatch.setattr(default, "_last", [])
    generator = dlmone_fast.load(tiny.save(tmp_path / "model"), backend=backend)
    generator.generate("ba")
    weights = [weakref.ref(generator.denoiser), weakref.ref(generator.denoiser.lm.backbone)]
    generator.unload()
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    # The one that was loaded last is none any more: the search goes on.
    with pytest.raises(ModelNotLoadedError, match="no model is loaded"):
        dlmone_fast.generate("ba")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate("ba"),
        lambda model: model.generate(["ba", 3]),
        lambda model: model.generate_iter(["ba"]),
        lambda model: model.generate_candidates(["ba"], seeds=[0]),
        lambda model: model.check_prompt("ba"),
        lambda model: model.check_prompt("ba " * 100, "truncate"),
        lambda model: model.encode_jointly("ba", "ce"),
        lambda model: model.warmup(),
        lambda model: model.warmup((2,), [3]),
        lambda model: model.denoiser,
    ],
)
def test_an_unloaded_model_says_so(call):  # type: ignore[no-untyped-def]
    generator = tiny.generator()
    begun = generator.generate_iter(["ba"] * 2000, batch_size=1)
    next(begun)
    generator.unload()
    with pytest.raises(ModelNotLoadedError, match="unloaded"):
        call(generator)
    with pytest.raises(ModelNotLoadedError, match="unloaded"):
        list(begun)


def test_what_an_unloaded_model_needs_no_network_for_still_works(tmp_path):  # type: ignore[no-untyped-def]
    generator = default.load_model(tiny.save(tmp_path / "model"))
    ids = generator.tokenizer.encode(["ba ce"])[0]
    expected = (generator.backend, generator.precision, generator.device, generator.task)
    generator.unload()
    generator.unload()
    assert generator.unloaded
    assert (generator.backend, generator.precision, generator.device, generator.task) == expected
    assert generator.normalize_text("BA ce") == generator.decode_text(ids) == "ba ce"
    assert generator.save_pretrained(tmp_path / "copy").is_dir()


def test_calls_on_one_model_do_not_wait_for_another_to_load(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(default, "_loaded", {})
    monkeypatch.setattr(default, "_last", [])
    ready, slow = (tiny.save(tmp_path / name) for name in ("ready", "slow"))
    loaded = dlmone_fast.load(ready)
    entered, leave = threading.Event(), threading.Event()

    def load_slowly(path):  # type: ignore[no-untyped-def]
        entered.set()
        assert leave.wait(30)
        return tiny.generator()

    monkeypatch.setattr(default, "load_model", load_slowly)
    loading = threading.Thread(target=lambda: dlmone_fast.generate("ba", model=slow))
    loading.start()
    assert entered.wait(10)
    assert dlmone_fast.generate("ba") == loaded.generate("ba")
    leave.set()
    loading.join(30)


def test_few_models_named_by_folder_are_kept(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(default, "_loaded", {})
    monkeypatch.setattr(default, "load_model", lambda path: tiny.generator())
    for number in range(default._MOST_KEPT + 3):
        dlmone_fast.generate("ba", model=tmp_path / str(number))
    kept = [path.name for path in default._loaded]
    assert kept == [str(n) for n in range(3, default._MOST_KEPT + 3)]


def test_unloading_forgets_every_model(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(default, "_last", [])
    monkeypatch.setattr(default, "_loaded", {})
    folder = tiny.save(tmp_path / "model")
    first = dlmone_fast.load(folder)
    text = dlmone_fast.generate("ba ce", model=folder)
    dlmone_fast.unload()
    assert (default._last, default._loaded) == ([], {})
    with pytest.raises(ModelNotLoadedError, match="unloaded"):
        first.generate("ba ce")
    assert dlmone_fast.generate("ba ce", model=folder) == text
