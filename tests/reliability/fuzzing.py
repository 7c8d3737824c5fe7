"""Runs the targets of fuzz_targets.py: with atheris, or by plain random mutation.

`python fuzzing.py NAME FOLDER [libFuzzer's options]` fuzzes one target with atheris, whose
coverage guides it through this package and the parsers in Python; `python fuzzing.py NAME FOLDER
--plain COUNT` by mutation alone.
"""

from __future__ import annotations

import importlib.util
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path

# What a mutation may insert: the syntax of the formats, and numbers beside the usual bounds.
WORDS = (
    b'"', b"'", b"{", b"}", b"[", b"]", b"[[a]]\n", b"=", b":", b",", b"\n", b"#", b"\\u0000",
    b"\\ud800", "²".encode(), "é\u0301\u200d".encode(), b"\0", b"\xff", b"null", b"true", b"NaN",
    b"nan", b"inf", b"-1", b"1e999", b"0x" + b"f" * 300, b"9" * 20, b"9" * 5000,
    b"1979-05-27T07:32:00Z", b'"""', b"__metadata__", b"shape", b"##", b"[UNK]\n", b"\x85R",
    b"h\x00",
)  # fmt: skip


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the seeds after one to four random changes, or, of edits, random instructions."""
    data = bytearray(rng.choice(seeds))
    if data[:1] == b"\1" and rng.random() < 0.8:
        return b"\1" + rng.randbytes(rng.randint(1, 30))
    for _ in range(rng.randint(1, 4)):
        place, kind = rng.randint(0, len(data)), rng.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del data[place : place + rng.randint(1, 20)]
        elif kind == 3:
            data[place:place] = data[place : place + rng.randint(1, 60)]
        elif kind == 4:
            data[place:place] = rng.choice(WORDS)
        else:
            other = rng.choice(seeds)
            start = rng.randint(0, len(other))
            data[place : place + 8] = other[start : start + rng.randint(1, 60)]
    return bytes(data)


def run_plain(target: Callable[[bytes], bool], seeds: list[bytes], seed: str, count: int) -> int:
    """Call the target with mutated seeds; how many it accepted. A finding shows its input."""
    rng, accepted = random.Random(seed), 0
    for index in range(count):
        data = mutated(rng, seeds)
        try:
            accepted += target(data)
        except Exception as error:
            raise AssertionError(
                f"seed {seed!r}, execution {index}, input {data!r:.2000}"
            ) from error
    return accepted


def has_atheris() -> bool:
    """Whether coverage-guided fuzzing is installed (`pip install atheris`)."""
    return importlib.util.find_spec("atheris") is not None


def main(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz one target until its options end it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options[:1] == ["--plain"]:
        from fuzz_targets import TARGETS, seeds

        run_plain(TARGETS[name](folder / "target"), seeds(name), name, int(options[1]))
        # As libFuzzer's statistics say it.
        print(f"stat::number_of_executed_units: {options[1]}")
        print(f"stat::peak_rss_mb: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}")
        return
    import atheris

    parsers = ["dlmone_fast.config", "dlmone_fast.models", "dlmone_fast.tokenizer", "tomllib"]
    with atheris.instrument_imports(include=[*parsers, "json", "pickletools", "zipfile"]):
        from fuzz_targets import TARGETS, seeds

    corpus = folder / "corpus"
    corpus.mkdir()
    for index, content in enumerate(seeds(name)):
        (corpus / str(index)).write_bytes(content)
    dictionary = folder / "words"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS if len(word) < 60)
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    target = TARGETS[name](folder / "target")

    def call(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], f"-dict={dictionary}", *options, str(corpus)], call)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
