"""The manifest notices every change and leads nowhere outside its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dlmone_fast.errors import CheckpointError, ModelFileError
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.manifest import (
    check_unchanged,
    identities,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha")
    (folder / "b.bin").write_bytes(bytes(range(256)))
    write_manifest(folder)
    return folder


def edit(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def test_an_intact_folder_verifies_and_lists_its_files(folder: Path) -> None:
    files = verify_manifest(folder)
    assert {name: record.size for name, record in files.items()} == {"a.txt": 5, "b.bin": 256}


def test_a_file_that_is_not_listed_is_left_alone_unless_required(folder: Path) -> None:
    (folder / "note.txt").write_text("mine")
    verify_manifest(folder)
    with pytest.raises(ModelFileError, match=r"note\.txt: is not listed"):
        verify_manifest(folder, required=("note.txt",))


def test_a_link_that_leads_nowhere_is_left_alone_unless_it_is_listed(folder: Path) -> None:
    (folder / ".#a.txt").symlink_to("user@host.1234:5678")
    before = identities(folder)
    files = verify_manifest(folder)
    assert {"a.txt", "b.bin", "manifest.json"} == before.keys()
    check_unchanged(folder, before, files)
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("nowhere")
    with pytest.raises(ModelFileError, match=r"a\.txt: was changed while it was read"):
        check_unchanged(folder, before, files)


@pytest.mark.parametrize("name", ["a\0b", "a\udcffb\ud800", "a" * 5000])
def test_a_folder_of_an_impossible_name_is_named(name: str) -> None:
    with pytest.raises(ModelFileError, match=r"no such folder \(.*\); check the path"):
        load_folder(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["files"].update({"../a.txt": c["files"]["a.txt"]}), "not a plain file name"),
        (lambda c: c["files"].update({"/etc/hosts": c["files"]["a.txt"]}), "not a plain file name"),
        (lambda c: c["files"].update({"": c["files"]["a.txt"]}), "not a plain file name"),
        (lambda c: c["files"].update({"gone.txt": c["files"]["a.txt"]}), r"gone\.txt: .* missing"),
        (lambda c: c["files"]["a.txt"].update(size=10**30), r"size of a\.txt"),
        (lambda c: c["files"]["a.txt"].update(size=-1), r"size of a\.txt"),
        (lambda c: c["files"]["a.txt"].update(size=True), r"size of a\.txt"),
        (lambda c: c["files"]["a.txt"].update(sha256="0" * 63), r"sha256 of a\.txt"),
        (lambda c: c["files"]["a.txt"].update(sha256="0" * 64), r"a\.txt: its sha256"),
        (lambda c: c["files"]["a.txt"].pop("size"), r"entry of a\.txt"),
        (lambda c: c.update(files=[]), "expected the keys"),
        (lambda c: c.update(note=1), "expected the keys"),
        (lambda c: c.update(version=2), "install a newer"),
        (lambda c: c.update(format="other"), "not a dlmone_fast manifest"),
    ],
)
def test_a_malformed_manifest_is_named(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ModelFileError, match=message):
        verify_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_named(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_manifest(folder, CheckpointError)


def test_white_space_in_the_manifest_is_a_change(folder: Path) -> None:
    with (folder / "manifest.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(ModelFileError, match="was changed"):
        verify_manifest(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("alpha")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelFileError, match="symbolic link that leads out"):
        verify_manifest(folder)


def test_a_loop_of_links_and_a_pipe_are_refused(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("a.txt")
    with pytest.raises(ModelFileError, match=r"a\.txt"):
        verify_manifest(folder)
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(ModelFileError, match="regular file"):
        verify_manifest(folder)


def test_a_missing_folder_or_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such folder"):
        verify_manifest(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"manifest\.json: the file is missing"):
        verify_manifest(tmp_path)
