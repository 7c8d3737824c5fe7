"""`from_pretrained`, `save_pretrained`, hub ids and DiffuSeq's joint truncation."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import dlmone_fast
from dlmone_fast.data import layout
from dlmone_fast.errors import BackendUnavailableError, ModelFileError, UsageError
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.manifest import write_manifest
from dlmone_fast.runtime import Generator, hub, loading
from dlmone_fast.tokenizer import Tokenizer


def test_a_saved_model_is_the_same_model(tmp_path: Path):
    model = dlmone_fast.from_pretrained(tiny.save(tmp_path / "a"))
    copy = dlmone_fast.from_pretrained(model.save_pretrained(tmp_path / "b"))
    prompts = tiny.prompts(5)
    assert copy.generate(prompts) == model.generate(prompts)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (
        tmp_path / "b" / "manifest.json"
    ).read_bytes()


def test_a_model_built_in_memory_has_no_folder_to_save():
    with pytest.raises(UsageError, match="built in memory"):
        tiny.generator().save_pretrained("anywhere")


def test_a_folder_that_changed_since_loading_is_not_copied(tmp_path: Path):
    model = dlmone_fast.from_pretrained(tiny.save(tmp_path / "a"))
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"generation_config\.json"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_hub_id_touches_no_network_unless_asked():
    with pytest.raises(UsageError, match="download=True"):
        dlmone_fast.from_pretrained("owner/name")


def test_a_hub_id_is_fetched_as_real_files_of_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def snapshot_download(repository: str, **options: object) -> None:
        asked.update(options, repository=repository)
        tiny.save(Path(str(options["local_dir"])))

    monkeypatch.setenv("DLMONE_FAST_CACHE", str(tmp_path))
    library = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    model = dlmone_fast.from_pretrained("owner/name", revision="v1", download=True)
    assert isinstance(model.generate("ba"), str)
    assert asked["repository"] == "owner/name"
    assert asked["revision"] == "v1"
    assert not any("pt" in str(pattern) for pattern in asked["allow_patterns"])


def test_a_hub_that_fails_says_what_to_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def snapshot_download(repository: str, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("DLMONE_FAST_CACHE", str(tmp_path))
    library = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    with pytest.raises(ModelFileError, match="no route to host"):
        hub.download("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"dlmone_fast\[hub\]"):
        hub.download("owner/name")


@pytest.mark.parametrize(
    ("words_of_source", "words_of_target"), [(3, 4), (16, 2), (2, 16), (14, 14)]
)
@pytest.mark.parametrize("source_positions", [0, 9])
def test_pairs_are_cut_as_the_training_layout_cuts_them(
    words_of_source: int, words_of_target: int, source_positions: int
):
    denoiser = tiny.denoiser(source_positions=source_positions)
    model = Generator(denoiser, tiny.tokenizer(), tiny.settings())
    source = " ".join(tiny.WORDS[:words_of_source])
    target = " ".join(tiny.WORDS[:words_of_target])
    src, trg = model.encode_jointly(source, target)
    whole = model.tokenizer.encode([source, target])
    special = {
        "sep_id": model.tokenizer.sep_id,
        "pad_id": model.tokenizer.pad_id,
        "cls_id": model.tokenizer.cls_id,
    }
    expected, mask = layout(*whole, tiny.SEQ_LEN, **special, source_positions=source_positions)
    given = expected[: mask.index(1)]
    padding = [model.tokenizer.pad_id] * (len(given) - len(src) - 1)
    assert [*src, model.tokenizer.sep_id, *padding] == given
    assert trg == expected[mask.index(1) :][: len(trg)]
    found = model.generate_candidates(["ignored"], seeds=[0], encoded=[src])
    assert len(found.token_ids[0][0]) == sum(mask)


@pytest.mark.parametrize("missing", ["t_init", "scale_latent"])
def test_no_default_stands_for_what_a_student_was_trained_with(tmp_path: Path, missing: str):
    folder = tiny.save(tmp_path / "a")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    del settings[missing]
    path.write_text(json.dumps(settings))
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=rf"generation_config\.json: .* must hold {missing};"):
        dlmone_fast.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": "0"}, "eta must be a number from 0 to 1, got '0'"),
        ({"eta": 2}, "eta must be a number from 0 to 1, got 2"),
        ({"t_init": 40}, "t_init must be at most 39"),
        ({"steps": 10**400}, "steps must be a whole number"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    tmp_path: Path, change: dict[str, object], message: str
):
    folder = tiny.save(tmp_path / "a")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    write_manifest(folder)
    with pytest.raises(ModelFileError, match=rf"generation_config\.json: {message}"):
        dlmone_fast.from_pretrained(folder)


def test_a_tokenizer_that_changes_behind_the_manifest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny.save(tmp_path / "a")
    other = Tokenizer.from_words(reversed(tiny.WORDS)).to_json()

    def changed_after(path: Path) -> object:
        loaded = load_folder(path)
        (folder / "tokenizer.json").write_text(other)
        return loaded

    monkeypatch.setattr(loading, "load_folder", changed_after)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: was changed while it was read"):
        dlmone_fast.from_pretrained(folder)


def test_the_folder_of_a_run_names_the_models_in_it(tmp_path: Path):
    for name in ("teacher", "stage1"):
        tiny.save(tmp_path / "demo" / name)
    expected = r"demo: is the folder of a training run.*demo/stage1 \(or its teacher\)"
    for load in (dlmone_fast.load, dlmone_fast.load_teacher, load_folder):
        with pytest.raises(ModelFileError, match=expected):
            load(tmp_path / "demo")
    tiny.save(tmp_path / "demo" / "stage2")
    with pytest.raises(ModelFileError, match="demo/stage2"):
        dlmone_fast.generate("ba", model=tmp_path / "demo")


def test_a_hub_id_that_is_loaded_names_the_way_to_it(tmp_path: Path):
    with pytest.raises(ModelFileError, match=r"from_pretrained\('user/model', download=True\)"):
        dlmone_fast.load("user/model")
    with pytest.raises(ModelFileError, match="no such folder") as caught:
        dlmone_fast.load(tmp_path / "none")
    assert "from_pretrained" not in str(caught.value)


def test_int8_without_prompts_names_the_argument(tmp_path: Path):
    with pytest.raises(BackendUnavailableError, match="calibration="):
        dlmone_fast.load(tiny.save(tmp_path / "model"), dtype="int8")


def test_a_loaded_model_is_not_sent_to_another_process(tmp_path: Path):
    generator = dlmone_fast.load(tiny.save(tmp_path / "model"), backend="eager")
    expected = r"cannot be sent to another process.*dlmone_fast\.load\('.*/model'\)"
    context = multiprocessing.get_context("spawn")
    for send in (
        lambda: pickle.dumps(generator),
        lambda: copy.deepcopy(generator),
        lambda: context.Process(target=print, args=(generator,)).start(),
    ):
        with pytest.raises(UsageError, match=expected):
            send()
