"""What long use leaves behind: run as a process of its own, whose memory nothing else touches.

`python long_use.py BACKEND PROMPTS CYCLES` generates from so many prompts through one model, then
loads another one, uses it and unloads it so many times. Prints what it measured as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import psutil
import tiny
import torch
from resident import resident_bytes

import dlmone_fast
from dlmone_fast.config import to_dict
from dlmone_fast.models.folder import save_folder

_QUARTERS = 4
_LARGEST = 64
# Libraries keep what they made for the last some hundred shapes. A short soak has few shapes, so
# that a short warm-up sees them all.
_FEW_SIZES = (1, 2, 4, 8, 16, 32)
_SHORT = 10_000
# Cycles before the first reading: what libraries keep for good is there afterwards.
_FIRST_CYCLES = 3
_SIZES = {"hidden_size": 256, "ffn_size": 1024, "num_layers": 2, "num_heads": 4}
_LETTERS = "abcdefghijklmnopqrstuvwxyzäßøжшλω中文字अ۳.,-'"


def prompt_of(source: Random) -> str:
    """No or some dozen words, hardly one of which ever comes again."""
    words = source.choices(tiny.WORDS, k=source.randint(0, 6))
    words += [
        "".join(source.choices(_LETTERS, k=source.randint(1, 12)))
        for _ in range(source.randint(0, 12))
    ]
    source.shuffle(words)
    return " ".join(words)[:200]


def soak(backend: str, count: int) -> dict[str, Any]:
    """Bytes held after a warm-up with every shape of a batch, and after each quarter of `count`."""
    generator, source = tiny.generator(backend=backend), Random(0)
    sizes = _FEW_SIZES if count < _SHORT else range(1, _LARGEST + 1)
    prompts = calls = 0

    def use(until: int) -> None:
        nonlocal prompts, calls
        while prompts < until:
            size = source.choice([1, source.choice(sizes), source.choice(sizes)])
            generator.generate(
                [prompt_of(source) for _ in range(size)],
                batch_size=source.choice(sizes),
                seed=[source.getrandbits(64) for _ in range(size)],
                num_candidates=source.choice([1, 1, 1, 1, 2]),
                steps=source.choice([*[1] * 9, source.randint(2, 12)]),
                batch_invariant=source.random() < 0.05,
                return_dict=source.random() < 0.5,
                on_overflow="truncate",
                progress=False,
            )
            prompts, calls = prompts + size, calls + 1

    for size in sizes:
        # Sources of every length: what is computed of a sequence depends on it.
        for words in range(tiny.MAX_SOURCE_TOKENS - 1):
            generator.generate([" ".join(tiny.WORDS[:words])] * size, steps=2, progress=False)
    use(count // 10)
    prompts = calls = 0
    readings = [resident_bytes()]
    for quarter in range(1, _QUARTERS + 1):
        use(count * quarter // _QUARTERS)
        readings.append(resident_bytes())
    return {"prompts": prompts, "calls": calls, "bytes": readings}


def model_folder(path: Path) -> int:
    """Write a model large enough to be missed in memory; the bytes of its weights."""
    network = tiny.denoiser(**_SIZES)
    generation = dataclasses.asdict(tiny.settings())
    del generation["kind"]
    tensors = dict(network.lm.state_dict())
    save_folder(
        path,
        config={
            "kind": "student",
            "model": to_dict(network.config),
            "diffusion": to_dict(network.schedule.config),
        },
        tensors=tensors,
        tokenizer_json=tiny.tokenizer().to_json(),
        generation_config=generation,
    )
    return sum(tensor.nbytes for tensor in tensors.values())


def cycles(backend: str, count: int) -> dict[str, Any]:
    """Bytes held, threads and open files before and after each of `count` loads and unloads."""
    process, prompts = psutil.Process(), tiny.prompts(3)
    found: dict[str, Any] = {"bytes": [], "threads": [], "files": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        found["weights"] = model_folder(path)
        for number in range(-_FIRST_CYCLES, count):
            generator = dlmone_fast.load(path, backend=backend)
            texts = generator.generate(prompts)
            assert found.setdefault("texts", texts) == texts
            dlmone_fast.unload()
            # Somebody may still hold the model when memory is read: its weights must be gone.
            if number >= -1:
                found["bytes"].append(resident_bytes())
                found["threads"].append(process.num_threads())
                found["files"].append(process.num_fds())
    return found


def main() -> None:
    backend, prompts, loads = sys.argv[1:]
    torch.set_num_threads(1)
    measured = {"soak": soak(backend, int(prompts))}
    # Two, so that there are threads to be left behind.
    torch.set_num_threads(2)
    measured["cycles"] = cycles(backend, int(loads))
    json.dump({"library": dlmone_fast.__file__, **measured}, sys.stdout)


if __name__ == "__main__":
    main()
