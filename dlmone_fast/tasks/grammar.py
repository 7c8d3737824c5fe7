"""The embedded default task: a paraphrase grammar whose samples can be judged exactly.

`grammar_rules` says what a sentence is; here are the splits written from it and the scores.
A model that picks each word of a paraphrase on its own, however well it knows the words, scores
an agreement of 0.125.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlmone_fast.arguments import refuse_one
from dlmone_fast.checks import is_whole
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.files import write_atomically
from dlmone_fast.tasks.grammar_rules import (
    SLOTS,
    SOURCE_WORDS,
    VARIANTS,
    Parse,
    parse,
    realised,
    references,
    source_sentence,
    template_names,
    vocabulary,
)

__all__ = [
    "VARIANTS", "Parse", "parse", "references", "score", "split_hashes", "vocabulary",
    "write_splits",
]  # fmt: skip

MAX_ROWS = 10_000_000


def write_splits(
    directory: str | Path,
    variant: str,
    seed: int,
    train_rows: int,
    valid_rows: int,
    test_rows: int,
) -> dict[str, Path]:
    """Write {train,valid,test}.jsonl and return their paths; the same arguments, the same bytes.

    No source occurs twice, within a split or across them. The test split depends on the seed
    and its own size alone, and no split's first rows depend on how many follow. Raise
    UsageError for sizes outside 1 to 10,000,000 and DataError where nothing can be written.
    """
    directory = Path(directory)
    splits = _splits(variant, seed, train_rows, valid_rows, test_rows)
    paths = {split: directory / f"{split}.jsonl" for split in ("train", "valid", "test")}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for split, lines in splits:
            write_atomically(paths[split], lines)
    except OSError as error:
        raise DataError(
            f"{directory}: cannot write the grammar's rows ({error}); free space or choose a "
            "folder that you may write to"
        ) from error
    return paths


def split_hashes(
    variant: str, seed: int, train_rows: int, valid_rows: int, test_rows: int
) -> dict[str, str]:
    """sha256 of each file that `write_splits` writes for the same arguments, by split."""
    hashes = {}
    for split, lines in _splits(variant, seed, train_rows, valid_rows, test_rows):
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line)
        hashes[split] = digest.hexdigest()
    return hashes


def score(sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Score `candidates[i]`, one or more texts, as paraphrases of `sources[i]`.

    Shares, 0 where there is nothing to take a share of:
      valid            of all: a template fits
      slot_accuracy    of the slots of valid texts: say what the source says
      agreement        of valid texts: all four register words agree (independent words: 0.125)
      joint            of all: valid, every slot right, registers agreeing
      both_registers   of sources: both registers occur among their joint candidates
      register_share   of valid and agreeing texts: formal
      template_b       of valid texts: template B
    Counts: `sources`, `samples`, `valid_samples`. Under `per_sample`, lists parallel to
    `candidates` of the booleans `valid`, `all_slots`, `agree` and `joint` and of the ints
    `slots_correct`; under `per_source`, the booleans `both_registers`. They are what a
    bootstrap by source draws from.
    """
    refuse_one("sources", sources)
    refuse_one("candidates", candidates)
    if len(sources) != len(candidates) or not sources:
        raise UsageError(
            f"candidates: expected a list of texts for each of {len(sources)} sources (at least "
            f"one), got {len(candidates)}"
        )
    parses: list[list[Parse]] = []
    for i, (source, texts) in enumerate(zip(sources, candidates, strict=True)):
        if isinstance(texts, str) or not texts:
            raise UsageError(f"candidates[{i}]: expected a non-empty list of texts, got {texts!r}")
        parses.append([parse(source, text) for text in texts])
    everything = [each for group in parses for each in group]
    valid = [each for each in everything if each.valid]
    agreeing = [each for each in valid if each.agree]
    both = [len({each.register for each in group if each.joint}) == 2 for group in parses]
    return {
        "valid": _share(len(valid), len(everything)),
        "slot_accuracy": _share(sum(p.slots_correct for p in valid), len(valid) * len(SLOTS)),
        "agreement": _share(len(agreeing), len(valid)),
        "joint": _share(sum(p.joint for p in everything), len(everything)),
        "both_registers": _share(sum(both), len(both)),
        "register_share": _share(sum(p.register == "formal" for p in agreeing), len(agreeing)),
        "template_b": _share(sum(p.template == "B" for p in valid), len(valid)),
        "sources": len(sources),
        "samples": len(everything),
        "valid_samples": len(valid),
        "per_sample": {
            name: [[getattr(each, name) for each in group] for group in parses]
            for name in ("valid", "all_slots", "agree", "joint", "slots_correct")
        },
        "per_source": {"both_registers": both},
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _splits(
    variant: str, seed: int, train_rows: int, valid_rows: int, test_rows: int
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each split with its lines, to be read in this order: a source of one is in no later one."""
    templates, taken = template_names(variant), set[int]()
    sizes = {"test": test_rows, "valid": valid_rows, "train": train_rows}
    for split, size in sizes.items():
        if not is_whole(size, 1, MAX_ROWS):
            raise UsageError(f"{split}_rows: expected 1 to {MAX_ROWS}, got {size!r}")
    return ((split, _lines(seed, split, size, templates, taken)) for split, size in sizes.items())


def _lines(
    seed: int, split: str, size: int, templates: tuple[str, ...], taken: set[int]
) -> Iterator[bytes]:
    """Yield `size` rows with sources not yet in `taken`, and add these to it."""
    radices = [len(SOURCE_WORDS[slot]) for slot in SLOTS]
    draw, written = 0, 0
    while written < size:
        # A hash of a counter: a stream that no other code, and no library version, can move.
        digest = hashlib.sha256(f"{seed}/{split}/{draw}".encode()).digest()
        draw += 1
        meaning, rest = [], int.from_bytes(digest[:8], "little")
        for radix in radices:
            rest, index = divmod(rest, radix)
            meaning.append(index)
        number = 0
        for radix, index in zip(radices, meaning, strict=True):
            number = number * radix + index
        if number in taken:
            continue
        taken.add(number)
        written += 1
        register, opening, closing, template = (byte & 1 for byte in digest[8:12])
        name = templates[template % len(templates)]
        row = {
            "src": source_sentence(tuple(meaning)),
            "trg": realised(name, tuple(meaning), register, opening, closing),
        }
        yield json.dumps(row).encode() + b"\n"
