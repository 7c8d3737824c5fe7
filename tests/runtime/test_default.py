from __future__ import annotations

from pathlib import Path

import pytest
import tiny

import dlmone_fast
from dlmone_fast.errors import ModelFileError, ModelNotLoadedError, UsageError
from dlmone_fast.runtime import default


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("named", "loaded", "environment")
    return {name: tiny.save(root / name, seed=i) for i, name in enumerate(names)}


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_last", [])
    monkeypatch.setattr(default, "_loaded", {})
    monkeypatch.delenv(default.ENVIRONMENT_VARIABLE, raising=False)


def text_of(folder: Path) -> str:
    return str(default.load_model(folder).generate("ba ce"))


def test_without_any_model_the_error_names_every_way_out():
    with pytest.raises(
        ModelNotLoadedError, match=r"model=FOLDER.*load\(FOLDER\).*DLMONE_FAST_MODEL.*train"
    ):
        dlmone_fast.generate("ba")


def test_order_of_resolution(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    texts = {name: text_of(folder) for name, folder in folders.items()}
    assert len(set(texts.values())) == 3, "the models must differ to tell which one answered"
    monkeypatch.setenv(default.ENVIRONMENT_VARIABLE, str(folders["environment"]))
    assert dlmone_fast.generate("ba ce") == texts["environment"]
    dlmone_fast.load(folders["loaded"])
    assert dlmone_fast.generate("ba ce") == texts["loaded"]
    assert dlmone_fast.generate("ba ce", model=folders["named"]) == texts["named"]
    generator = default.load_model(folders["environment"])
    assert dlmone_fast.generate("ba ce", model=generator) == texts["environment"]
    monkeypatch.chdir(folders["named"].parent)
    assert dlmone_fast.generate("ba ce", model="named") == texts["named"]


def test_a_folder_is_loaded_once_and_again_when_it_changed(tmp_path: Path):
    folder = tiny.save(tmp_path / "model", seed=0)
    before = dlmone_fast.generate("ba ce", model=folder)
    assert default._resolve(folder) is default._resolve(folder)
    tiny.save(folder, seed=1)
    assert dlmone_fast.generate("ba ce", model=folder) != before
    assert len(default._loaded) == 1


def test_load_names_what_is_wrong(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ModelFileError, match="no such folder"):
        dlmone_fast.load(tmp_path / "none")
    with pytest.raises(UsageError, match="device must be"):
        dlmone_fast.load(folders["named"], device="abacus")
    with pytest.raises(UsageError, match="dtype must be one of"):
        dlmone_fast.load(folders["named"], dtype="fp64")


def test_a_teacher_folder_generates_with_its_own_sampler(tmp_path: Path):
    folder = tiny.save(tmp_path / "teacher", "teacher")
    own = dlmone_fast.generate("ba ce", model=folder)
    assert own == dlmone_fast.generate("ba ce", model=folder, sampler="ddim", steps=3)
