"""Random calls of every C++ entry point, most of them wrong: a program, as a crash would end it.

    python tests/reliability/native_fuzz.py --seconds 60

A call as it should be must give what the torch implementation gives. One that was made wrong is
refused with ValueError or TypeError, or it stays inside the tensors that it was given: outputs
stand between guards, inputs come back unchanged; what no reader could make sense of, such as
another dtype, must be refused. Prints counts as JSON. Ends with 1 after a finding, which it prints
with the number that `--first` repeats it from. In a build with sanitizers it sees more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from native_cases import ENTRIES, GUARD_BYTES, Case, guarded, guards_hold
from torch import Tensor

from dlmone_fast.kernels import native

_OPTIONAL = {"margins", "packed", "ids", "mask"}
_ODD_NUMBERS = (
    -1,
    0,
    1,
    2,
    1025,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    -(2**63),
    2**64,
    1.5,
    "1",
    None,
)
_ODD_OBJECTS = (None, 0, 1, "x", b"x", [0.0], (), object(), torch.float32, torch.Tensor)
_ODD_PATHS = ("mmx", "\0", "é" * 1000, "portable", "avx2", "avx512_vnni", "", None, 3, b"avx2")
_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64,
           torch.int8, torch.uint8, torch.bool, torch.complex64)  # fmt: skip


class FoundError(Exception):
    """The native code did what it must not do."""


# A change gives the argument's new value and whether the call must be refused with it; None where
# it depends on the other arguments.
Change = Callable[[Random, Tensor], tuple[Any, bool | None]]


def another_dtype(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    dtype = source.choice([d for d in _DTYPES if d != tensor.dtype])
    bytes_alike = {dtype, tensor.dtype} == {torch.bool, torch.uint8}
    return _copied(tensor.to(dtype)), None if bytes_alike else True


def another_shape(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    sizes = list(tensor.shape)
    place = source.randrange(len(sizes))
    sizes[place] = max(0, source.choice([0, 1, sizes[place] - 1, sizes[place] + 1, 300]))
    return _copied(torch.zeros(sizes, dtype=tensor.dtype)), None


def another_rank(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    return source.choice([tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.new_zeros(())]), True


def other_strides(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    place = source.randrange(tensor.dim())
    kind = source.randrange(3)
    if kind == 0:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1), None
    if kind == 1:
        return tensor.repeat_interleave(2, place).narrow(place, 0, tensor.shape[place]), None
    return tensor.narrow(place, 0, min(1, tensor.shape[place])).expand(tensor.shape), None


def misaligned(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    offset, count = source.randrange(1, 64), tensor.numel()
    if not count:
        return tensor, None
    memory = bytearray(count * tensor.element_size() + 128)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset, count=count)
    aligned = moved.data_ptr() % tensor.element_size() == 0
    return moved.view(tensor.shape).copy_(tensor), None if aligned else True


def elsewhere(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    if source.random() < 0.5 and tensor.dtype != torch.bool:
        return tensor.contiguous().to_sparse(), True
    return tensor.to("meta"), True


def odd_values(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    odd = tensor.clone()
    if not odd.numel():
        return odd, None
    # Flipped bytes are any number there is: NaN, infinity, ids of nothing.
    memory = odd.view(-1).view(torch.uint8)
    for _ in range(source.randrange(1, 9)):
        memory[source.randrange(len(memory))] = source.randrange(256)
    return _copied(odd), None


def another_object(source: Random, tensor: Tensor) -> tuple[Any, bool | None]:
    return source.choice([*_ODD_OBJECTS, tensor.numpy() if tensor.is_contiguous() else None]), True


CHANGES: tuple[Change, ...] = (
    another_dtype, another_shape, another_rank, other_strides, misaligned, elsewhere, odd_values,
    another_object,
)  # fmt: skip


def _copied(tensor: Tensor) -> Tensor:
    """The same between guards, as it may be written."""
    return guarded(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def change_one(source: Random, case: Case) -> bool | None:
    """Change one argument; whether the call must now be refused."""
    name = source.choice(list(case.arguments))
    value = case.arguments[name]
    if isinstance(value, Tensor):
        if source.random() < 0.15:
            return overlap(source, case, name)
        found, refused = source.choice(CHANGES)(source, value)
        case.arguments[name] = found
        return None if found is None and name in _OPTIONAL else refused
    if value is None:
        case.arguments[name] = source.choice(_ODD_OBJECTS)
    else:
        case.arguments[name] = source.choice(_ODD_PATHS if name == "path" else _ODD_NUMBERS)
    return None


def overlap(source: Random, case: Case, name: str) -> bool | None:
    """Let an argument lie in another one's memory; only inputs may share theirs."""
    tensors = {k: v for k, v in case.arguments.items() if isinstance(v, Tensor) and k != name}
    other = source.choice(list(tensors))
    mine, theirs = case.arguments[name], tensors[other]
    if not mine.numel() or not theirs.numel() or mine.layout != theirs.layout:
        return None
    shared = guarded((mine.nbytes + theirs.nbytes + 2 * GUARD_BYTES,), torch.uint8)
    for key, tensor, first in (
        (other, theirs, 0),
        (name, mine, source.randrange(0, theirs.nbytes, 8)),
    ):
        part = shared[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        case.arguments[key] = part.copy_(tensor)
    return True if {name, other} & set(case.outputs) else None


def run(source: Random) -> str:
    """Make one call; what came of it: right, refused or accepted."""
    case = source.choice(ENTRIES)(source)
    changes = source.choice([0, 1, 1, 1, 2, 3])
    try:
        found = [change_one(source, case) for _ in range(changes)]
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        # A second change found nothing to work on.
        return "not made"
    inputs = {k: _bytes(v) for k, v in case.arguments.items() if k not in case.outputs}
    try:
        getattr(native.module(), case.entry)(**case.arguments)
    except (ValueError, TypeError):
        if not changes:
            raise
        _check_inside(case, inputs)
        return "refused"
    _check_inside(case, inputs)
    # What a second change makes of a first is not worth knowing.
    if found == [True]:
        raise FoundError(f"{case.entry} accepted {_described(case)}")
    if not changes and not case.is_right():
        raise FoundError(f"{case.entry} is wrong for {_described(case)}")
    return "accepted" if changes else "right"


def _check_inside(case: Case, inputs: dict[str, bytes | None]) -> None:
    for name, before in inputs.items():
        if before is not None and _bytes(case.arguments[name]) != before:
            raise FoundError(f"{case.entry} changed its input {name}: {_described(case)}")
    for name in case.outputs:
        if not guards_hold(case.arguments[name]):
            raise FoundError(f"{case.entry} wrote outside of {name}: {_described(case)}")


def _bytes(value: Any) -> bytes | None:
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.is_sparse:
        return None
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _described(case: Case) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, Tensor) or value.is_sparse:
            return repr(value)[:60]
        return f"{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}"

    return ", ".join(f"{name}: {one(value)}" for name, value in case.arguments.items())


def main() -> int:
    """Call until the time is over; 1 after a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--calls", type=int, default=10**12, help="end after so many")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ends, counts, number = time.monotonic() + options.seconds, Counter[str](), options.first
    while time.monotonic() < ends and number < options.first + options.calls:
        try:
            counts[run(Random(number))] += 1
        except BaseException as error:
            print(f"call {number}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        number += 1
    library = native.module().__file__
    print(json.dumps({"library": library, "calls": number - options.first, **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
