"""Sequence-level distillation (Kim and Rush, arXiv 1606.07947): targets that a model wrote.

OUTPUT/train.jsonl       sources with a model's texts
OUTPUT/valid.jsonl[.gz]  copies, as test
OUTPUT/made_from.json    models, data, settings, and what was left out
OUTPUT/manifest.json     size and sha256 of each file
OUTPUT.parts/            while it runs: what is done, and plan.json, which says of what
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from dlmone_fast.autoregressive.distil_config import DistillationConfig
from dlmone_fast.autoregressive.distil_sources import Sources, read_sources
from dlmone_fast.autoregressive.generation import (
    Autoregressive,
    Method,
    load_autoregressive,
)
from dlmone_fast.autoregressive.precision import is_bf16
from dlmone_fast.data.rows import find_split
from dlmone_fast.errors import (
    ConfigError,
    DataError,
    InterruptedAndSavedError,
    ModelFileError,
)
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.files import write_atomically
from dlmone_fast.models.commit import commit_directory
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file, verify_manifest
from dlmone_fast.models.plainfiles import dump_json, read_json
from dlmone_fast.training.lock import only_training_in
from dlmone_fast.training.signals import StopRequest
from dlmone_fast.training.workspace import writing

MADE_FROM = "made_from.json"
_PLAN = "plan.json"
# What may differ between two starts of one distillation.
_FREE_KEYS = ("data_dir", "output_dir", "model", "sources", "exclude", "precision")

Say = Callable[[str], None]
Line = dict[str, Any]


def distil(config: DistillationConfig, say: Say = print) -> Path:
    """Write a training folder whose targets are models' texts; the same call continues it.

    Args:
        config: data, models and how texts are found.
        say: takes lines of progress, and at the end what was left out.

    Returns:
        The folder.

    Raises:
        InterruptedAndSavedError: SIGTERM came; what is done is kept.
        ConfigError: the folder was made, or begun, from other models, data or settings.
        DataError, ModelFileError: what is read cannot be used, or no text is left.
    """
    models = [load_autoregressive(folder, config.precision) for folder in config.model]
    if len({model.vocabulary.kind for model in models}) > 1:
        raise ModelFileError(
            "--model: the models have different kinds of tokens; name models of one task"
        )
    sources = read_sources(config)
    plan = _plan(config, models, sources)
    output = Path(config.output_dir)
    if (output / MANIFEST_NAME).exists():
        _check_finished(output, plan)
        say(f"{output}: is complete")
        return output
    parts = output.with_name(f"{output.name}.parts")
    with only_training_in(parts), StopRequest() as stop:
        _check_begun(parts, plan)
        texts, left_out = _readable(models, sources.texts)
        count = -(-len(texts) // config.part_size)
        for index in range(count):
            rows = slice(index * config.part_size, (index + 1) * config.part_size)
            file = parts / f"part-{index:05d}.jsonl"
            if not file.exists():
                seeds = row_seeds(config.seed, len(texts[rows]), rows.start)
                _write_lines(file, _written(models, config, texts[rows], seeds))
                say(f"{min(rows.stop, len(texts)):,} of {len(texts):,} sources")
            if stop.requested and index + 1 < count:
                raise InterruptedAndSavedError(
                    f"stopped by SIGTERM after {index + 1} of {count} parts; the same command "
                    "continues"
                )
        files = [parts / f"part-{index:05d}.jsonl" for index in range(count)]
        made = _assembled(config, models, sources, files, left_out, plan)
    shutil.rmtree(parts, ignore_errors=True)
    say(json.dumps(made, indent=2))
    return output


def _plan(
    config: DistillationConfig, models: Sequence[Autoregressive], sources: Sources
) -> dict[str, Any]:
    """All that decides about the folder's content."""
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE_KEYS}
    return {
        "models": [model.sha256 for model in models],
        "sources": _digest(sources.texts),
        "data": {split: hash_file(path) for split, path in _splits(config.data_dir).items()},
        "settings": settings | {"bf16": is_bf16(config.precision)},
    }


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def _splits(data_dir: str) -> dict[str, Path]:
    """The split files of a folder; test may be missing."""
    found = {split: find_split(data_dir, split) for split in ("train", "valid")}
    try:
        found["test"] = find_split(data_dir, "test")
    except DataError:
        return found
    return found


def _check_finished(output: Path, plan: dict[str, Any]) -> None:
    verify_manifest(output, DataError, required=(MADE_FROM, "train.jsonl"))
    made = read_json(output, MADE_FROM, DataError)
    _check_same(output, made.get("plan"), plan)


def _check_begun(parts: Path, plan: dict[str, Any]) -> None:
    file = parts / _PLAN
    if file.exists():
        _check_same(parts, read_json(parts, _PLAN, DataError), plan)
        return
    with writing(file):
        write_atomically(file, [dump_json(plan).encode()])


def _check_same(where: Path, found: Any, plan: dict[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    changed = [name for name, value in plan.items() if found.get(name) != value]
    if changed:
        raise ConfigError(
            f"{where}: was made from other {' and '.join(changed)}; use another --output-dir, or "
            "remove the folder"
        )


def _readable(
    models: Sequence[Autoregressive], texts: Sequence[str]
) -> tuple[list[str], Counter[str]]:
    """Sources that every model reads whole, and how many are left out why."""
    left_out: Counter[str] = Counter()
    kept = []
    for text, *faults in zip(texts, *(model.faults(texts) for model in models), strict=True):
        reason = next((fault for fault in faults if fault), None)
        if reason:
            left_out[f"sources: {reason}"] += 1
        else:
            kept.append(text)
    if not kept:
        raise DataError(
            f"--data-dir: the model reads none of {len(texts):,} sources ({dict(left_out)}); name "
            "a model of this task"
        )
    return kept, left_out


def _written(
    models: Sequence[Autoregressive],
    config: DistillationConfig,
    texts: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Line]:
    """For each source its texts: a model's samples, or the majority of greedy ones."""
    method = Method()
    if len(models) == 1 and config.temperature:
        method = Method("sample", config.samples, config.temperature, config.top_p, config.top_k)
    results = [
        model.generate_candidates(texts, method, seeds=seeds, batch_size=config.batch_size)
        for model in models
    ]
    for row, source in enumerate(texts):
        if len(models) == 1:
            only = results[0]
            yield {"src": source, "texts": only.texts[row], "ended": only.ended[row]}
            continue
        votes = [(r.texts[row][0], r.scores[row][0], r.ended[row][0]) for r in results]
        text, agreed = majority([(text, score) for text, score, _ in votes])
        ended = next(ended for candidate, _, ended in votes if candidate == text)
        yield {"src": source, "texts": [text], "ended": [ended], "votes": agreed}


def majority(votes: Sequence[tuple[str, float]]) -> tuple[str, int]:
    """The most frequent text and its votes; of equal ones that of the higher summed score."""
    count: Counter[str] = Counter(text for text, _ in votes)
    total: dict[str, float] = {}
    for text, score in votes:
        total[text] = total.get(text, 0.0) + score
    best = max(count, key=lambda text: (count[text], total[text], text))
    return best, count[best]


def _assembled(
    config: DistillationConfig,
    models: Sequence[Autoregressive],
    sources: Sources,
    files: Sequence[Path],
    left_out: Counter[str],
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Filter the parts into the folder; what it was made from."""
    counts: Counter[str] = Counter()
    votes: Counter[int] = Counter()
    drop_repeats = config.drop_repeats == "yes" or (
        config.drop_repeats == "auto" and models[0].vocabulary.kind == "wordpiece"
    )
    made: dict[str, Any] = {}

    def kept() -> Iterator[bytes]:
        for line in _lines(files):
            if "votes" in line:
                votes[line["votes"]] += 1
            own = models[0].vocabulary.normal_source(line["src"])
            for text, ended in zip(line["texts"], line["ended"], strict=True):
                counts["texts"] += 1
                reason = _fault(text, ended, own, drop_repeats)
                if reason:
                    left_out[f"texts: {reason}"] += 1
                    continue
                counts["rows"] += 1
                row = {"src": line["src"], "trg": text}
                yield (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def write(folder: Path) -> None:
        counts.clear()
        write_atomically(folder / "train.jsonl", kept())
        if not counts["rows"]:
            raise DataError(
                f"none of {counts['texts']:,} texts is left ({dict(left_out)}); is the model "
                "trained?"
            )
        for split, path in _splits(config.data_dir).items():
            if split != "train":
                shutil.copyfile(path, folder / path.name)
        made.update(
            {
                "method": "sequence-level distillation",
                "targets": "majority of greedy texts" if len(models) > 1 else "one model's texts",
                "models": [
                    {"folder": Path(folder).name, "sha256": model.sha256}
                    for folder, model in zip(config.model, models, strict=True)
                ],
                "sources": len(sources.texts),
                "texts": counts["texts"],
                "rows": counts["rows"],
                "left_out": dict(sorted(left_out.items())),
                "excluded_sources": {"count": sources.excluded, "by": sources.excluded_by},
                "blank_lines": sources.blank,
                "votes": {str(n): votes[n] for n in sorted(votes)},
                "plan": plan,
            }
        )
        (folder / MADE_FROM).write_text(dump_json(made), encoding="utf-8")

    commit_directory(config.output_dir, write, error=DataError)
    return made


def _fault(text: str, ended: bool, source: str, drop_repeats: bool) -> str:
    """Why a text is left out; empty for one that is kept."""
    words = text.split()
    if not words:
        return "empty"
    if not ended:
        return "cut at the model's last position"
    if " ".join(words) == source:
        return "copy of the source"
    if "[UNK]" in text:
        return "with [UNK]"
    if drop_repeats and any(a == b for a, b in pairwise(words)):
        return "a word twice in a row"
    return ""


def _write_lines(file: Path, lines: Iterator[Line]) -> None:
    with writing(file):
        write_atomically(
            file, ((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        )


def _lines(files: Sequence[Path]) -> Iterator[Line]:
    for file in files:
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)
