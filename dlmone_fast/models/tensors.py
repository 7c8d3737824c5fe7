"""Named tensors in safetensors files: writing, reading, and checking against what is expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlmone_fast.errors import DlmOneError, ModelFileError
from dlmone_fast.models.plainfiles import StrPath, regular_file, unreadable

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)

# What this package stores anywhere. Of 8-bit floats torch cannot even tell whether they are finite.
_STORED_DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
    }
)  # fmt: skip

# Names shown in an error before "and N more", and characters of each: a file may hold any.
_SHOWN = 3
_SHOWN_CHARS = 200
# Unexpected names among which the nearest one is looked for, so that it never takes long.
_COMPARED = 1000


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, from any device, dtypes kept.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(_plain(tensors), path, metadata={"format": "pt"})
    except SafetensorError as reason:
        # safetensors reports the operating system's error in its text alone.
        number = re.search(r"os error (\d+)", str(reason))
        raise OSError(int(number[1]) if number else 0, str(reason)) from reason


def read_tensors(folder: Path, name: str, error: type[DlmOneError]) -> dict[str, Tensor]:
    """Read a safetensors file of a folder into memory of its own, on the CPU, dtypes kept.

    Memory is bounded by the file's size: safetensors checks that the tensors fill the file exactly.

    Raises:
        error: the file cannot be read, is not a valid safetensors file, or holds a dtype that
            this package never stores.
    """
    path = regular_file(folder, name, error)
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            # A clone, because the tensors of safe_open are a map of the file: cutting the file
            # short later would end the process.
            tensors = {key: stream.get_tensor(key).clone() for key in stream.keys()}  # noqa: SIM118
    except OSError as reason:
        raise error(unreadable(path, reason)) from reason
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise error(
            f"{path}: is not a valid safetensors file ({e}); copy it again from its source"
        ) from e
    for key, tensor in tensors.items():
        if tensor.dtype not in _STORED_DTYPES:
            raise error(
                f"{path}: {key!r:.80} is {_name(tensor.dtype)}, which no dlmone_fast writes; "
                "convert the file to float32"
            )
    return tensors


def check_tensors(
    expected: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    where: StrPath,
    *,
    error: type[DlmOneError] = ModelFileError,
    dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES,
) -> None:
    """Check that tensors have exactly the expected names and shapes, a dtype allowed, and no NaN.

    Args:
        expected: shape by name.
        tensors: what was read.
        where: file or folder, for the message.

    Raises:
        error: listing the first few missing, unexpected, misshapen, wrongly typed or non-finite
            tensors by name, with counts, and the nearest unexpected name of a missing one.
    """
    problems = [
        *_name_problems(set(expected), set(tensors)),
        *_listing(
            "with the wrong shape",
            [
                f"{name} (expected {list(shape)}, found {list(tensors[name].shape)})"
                for name, shape in expected.items()
                if name in tensors and tuple(tensors[name].shape) != tuple(shape)
            ],
        ),
        *_listing(
            f"of another dtype than {', '.join(map(_name, dtypes))}",
            [
                f"{name} ({_name(tensor.dtype)})"
                for name, tensor in tensors.items()
                if name in expected and tensor.dtype not in dtypes
            ],
        ),
    ]
    if not problems:
        problems = finite_problems(tensors)
    if problems:
        raise error(f"{where}: " + "; ".join(problems) + "; use a file written for this model")


def check_like(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    where: StrPath,
    *,
    error: type[DlmOneError] = ModelFileError,
) -> None:
    """Check that tensors have exactly the names, shapes and dtypes of `expected`.

    Raises:
        error: listing the first few that are missing, unexpected or different, with counts.
    """
    found = {name: tensors[name] for name in expected if name in tensors}
    problems = [
        *_name_problems(set(expected), set(tensors)),
        *_listing(
            "of another shape or dtype",
            [
                f"{name} (expected {_described(expected[name])}, found {_described(tensor)})"
                for name, tensor in found.items()
                if _described(tensor) != _described(expected[name])
            ],
        ),
    ]
    if problems:
        raise error(
            f"{where}: " + "; ".join(problems) + "; use what a run of this configuration wrote"
        )


def check_finite(tensors: Mapping[str, Tensor], where: StrPath, error: type[DlmOneError]) -> None:
    """Raise `error` naming the tensors that hold NaN or Infinity."""
    problems = finite_problems(tensors)
    if problems:
        raise error(
            f"{where}: {problems[0]}; training has diverged or the file is damaged: go back to an "
            "earlier checkpoint"
        )


def check_names(
    expected: Iterable[str],
    found: Iterable[str],
    where: StrPath,
    *,
    error: type[DlmOneError] = ModelFileError,
) -> None:
    """Raise `error` listing missing and unexpected tensor names, if there are any."""
    problems = _name_problems(set(expected), set(found))
    if problems:
        raise error(f"{where}: " + "; ".join(problems) + "; use a file written for this model")


def _name_problems(expected: set[str], found: set[str]) -> list[str]:
    missing, extra = sorted(expected - found), sorted(found - expected)
    hints: list[str] = []
    compared = extra[:_COMPARED]
    for name in missing:
        near = difflib.get_close_matches(name, compared, n=1) if len(hints) < _SHOWN else []
        hints.append(f"{name} (nearest found: {near[0]})" if near else name)
    return [*_listing("missing", hints), *_listing("unexpected", extra)]


def finite_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """What to say of tensors that hold NaN or Infinity; empty if none does."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    return _listing("with NaN or Infinity", bad)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {_name(tensor.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listing(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    shown = ", ".join(item[:_SHOWN_CHARS] for item in items[:_SHOWN])
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return [f"{len(items)} tensor{'s' if len(items) > 1 else ''} {what}: {shown}{more}"]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own, as the file format needs them."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if not whole or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        plain[name] = value
    return plain
