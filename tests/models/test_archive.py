"""What a .pt file may be: one plain archive, whose pickle names tensors alone."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dlmone_fast.errors import ModelFileError
from dlmone_fast.models.diffuseq import load_state_dict

TINY = Path(__file__).parents[1] / "data" / "diffuseq-tiny"
FILE = "ema_0.9999_050000.pt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a copy of the tiny checkpoint that may be written to."""
    shutil.copy(TINY / FILE, tmp_path)
    return tmp_path


def names(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


_NUMBER = b"\x8a\x06" + (10**13).to_bytes(6, "little")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (names("builtins", "bytearray") + _NUMBER + b"\x85R", r"asks for 'builtins\.bytearray'"),
        (names("torch", "FloatTensor") + _NUMBER + b"\x85R", r"asks for 'torch\.FloatTensor'"),
        (names("torch.storage", "UntypedStorage") + _NUMBER + b"\x85R", "UntypedStorage"),
        (b"X\x05\0\0\0torchX\x05\0\0\0empty\x93", "uses STACK_GLOBAL"),
        (b")q\x01" + b"h\x01h\x01\x86q\x02h\x02h\x02\x86", "repeats a tuple"),
        (b")q\x01h\x01\x86q\x02q\x03h\x03\x86", "repeats a tuple"),
        (b"X\0\0\0\0q\x01h\x01\x86\x80\x02q\x02h\x02\x86", "repeats a tuple"),
        (b"X\0\0\0\0q\x01h\x01\x86K\x010q\x02h\x02\x86", "repeats a tuple"),
        (b"X\0\0\0\0q\x01h\x01\x86q\x01h\x01\x86", "repeats a tuple"),
        (b"\xff", "its pickle is damaged"),
    ],
)
@pytest.mark.parametrize("record", ["data.pkl", "DATA.PKL"])
def test_a_pickle_that_asks_for_more_than_tensors_is_not_opened(
    source: Path, record: str, content: bytes, message: str
) -> None:
    with zipfile.ZipFile(source / FILE, "w") as archive:
        archive.writestr(f"archive/{record}", b"\x80\x02}X\x01\0\0\0a" + content + b"s.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ModelFileError, match=message):
        load_state_dict(source / FILE)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_what_torch_saves_is_opened_shared_or_not(tmp_path: Path, count: int) -> None:
    values: dict[str, Any] = {str(i): torch.full((3,), float(i)) for i in range(count)}
    values |= {f"again {i}": value for i, value in list(values.items())}
    torch.save(values, tmp_path / FILE)
    loaded = load_state_dict(tmp_path / FILE)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    "at", ["count", "length", "offset", "comment", "locator", "size64", "short"]
)
def test_a_directory_that_is_not_at_the_end_is_not_opened(source: Path, at: str) -> None:
    content = bytearray((source / FILE).read_bytes())
    # Back from the end: fields of the record of 64 bits, of its locator, of the last record.
    place = {"count": -66, "length": -58, "offset": -50, "comment": -2, "locator": -34, "short": -6}
    content[place.get(at, -94)] ^= 1
    (source / FILE).write_bytes(content + b"x" * (at == "comment"))
    with pytest.raises(ModelFileError, match=r"the one directory of all|not a complete file"):
        load_state_dict(source / FILE)


def test_an_archive_that_does_not_begin_with_a_record_is_not_opened(source: Path) -> None:
    (source / FILE).write_bytes(pickle.dumps({}))
    with zipfile.ZipFile(source / FILE, "a") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ModelFileError, match="does not begin with its first record"):
        load_state_dict(source / FILE)


def test_two_records_of_one_name_are_not_opened(source: Path) -> None:
    with zipfile.ZipFile(source / FILE, "w") as archive:
        for name in ("archive/data.pkl", "archive/Data.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    with pytest.raises(ModelFileError, match="two records of one name"):
        load_state_dict(source / FILE)


def test_a_name_with_nul_is_not_opened(source: Path) -> None:
    with zipfile.ZipFile(source / FILE, "w") as archive:
        archive.writestr("aX/data.pkl", b"\x80\x02}.")
    content = (source / FILE).read_bytes()
    (source / FILE).write_bytes(content.replace(b"aX/data.pkl", b"a\0/data.pkl"))
    with pytest.raises(ModelFileError, match="has a name with NUL"):
        load_state_dict(source / FILE)
