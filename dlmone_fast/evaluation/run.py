"""Evaluating a model, or files of generations, against a test split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dlmone_fast.arguments import refuse_one
from dlmone_fast.data.rows import Row, load_rows
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bertscore import refuse_layer_alone
from dlmone_fast.evaluation.bootstrap import DEFAULT_RESAMPLES, check_resamples
from dlmone_fast.evaluation.generations import read_generations, write_generations
from dlmone_fast.evaluation.protocol import CandidateBatch, CandidateModel
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.evaluation.seeds import MAX_SEED, row_seeds

# (sources, candidates of each source) -> the entry `exact` of the result.
ExactMetrics = Callable[[list[str], list[list[str]]], dict[str, Any]]

# What a loaded model takes (`runtime.options`): refused here before the data is read.
MAX_CANDIDATES = 64
MAX_BATCH_SIZE = 4096


def evaluate_model(
    model: CandidateModel,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    rows: Sequence[Row] | None = None,
    split: str = "test",
    num_candidates: int = 1,
    mbr: bool = False,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    max_rows: int = 0,
    bootstrap: int = DEFAULT_RESAMPLES,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    on_overflow: str = "truncate",
    joint_truncation: bool = False,
    exact: ExactMetrics | None = None,
    generations_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Generate for the rows of a split (or the given `rows`) and score the texts.

    Sources and references are scored as the model's tokenizer writes them
    (`model.normalize_text`), as DiffuSeq compares decoded word pieces and not raw text; without
    it, casing and spacing that the vocabulary cannot express would count as errors.

    Args:
        model: a loaded model (`dlmone_fast.load`); see `CandidateModel` for what is asked of it.
        data_dir, split: folder and split to read; or `rows` instead of both.
        num_candidates: texts per source; sentence scores are means over them.
        mbr: also score the candidate of each source that agrees most with the others.
        steps, sampler, temperature: passed to the model; None: its defaults.
        max_rows: use the first rows only; 0: all.
        bootstrap: resamples of the 95 % intervals; 0: none.
        seed: of the texts (each row has its own noise, see `row_seeds`) and of the bootstrap.
        joint_truncation: cut source and reference together to the sequence length, as DiffuSeq
            does with its test rows, instead of the source alone to the model's limit; and decode
            as it does, from the decoder's arg-max without a cut at the first [SEP].
        exact: task metrics that get the sources and each source's candidates; what they return
            becomes the entry `exact`.
        generations_dir: also write one file per candidate there, in DiffuSeq's format.

    Returns:
        The dictionary of `score_generations`, with `baselines` (`copy` and `reference`: the same
        scores of the source and of the reference as output) and `run` (settings, row count,
        truncated sources, seconds; device, precision and backend of a model that tells them).

    Raises:
        UsageError: an argument out of range; DataError: rows that cannot be read.
    """
    if not hasattr(model, "generate_candidates"):
        raise UsageError(
            f"model: expected a loaded model, got {type(model).__name__}; "
            "load the folder first: evaluate_model(dlmone_fast.load(path), ...)."
        )
    _check_range("num_candidates", num_candidates, 1, MAX_CANDIDATES)
    _check_range("batch_size", batch_size, 1, MAX_BATCH_SIZE)
    _check_range("max_rows", max_rows, 0, MAX_SEED)
    check_resamples(bootstrap)
    _check_range("seed", seed, 0, MAX_SEED)
    refuse_layer_alone(bertscore_model, bertscore_layer)
    _check_mbr(mbr, num_candidates, "pass num_candidates=10")
    pairs = _rows(data_dir, rows, split, max_rows)
    encoded = None
    if joint_truncation:
        cut = [model.encode_jointly(row.src, row.trg) for row in pairs]
        encoded = [source for source, _ in cut]
        sources, references = (
            [model.decode_text(ids) for ids in side] for side in zip(*cut, strict=True)
        )
    else:
        sources = [model.normalize_text(row.src) for row in pairs]
        references = [model.normalize_text(row.trg) for row in pairs]
    batch = model.generate_candidates(
        [row.src for row in pairs],
        num_candidates=num_candidates,
        steps=steps,
        seeds=row_seeds(seed, len(pairs)),
        batch_size=batch_size,
        sampler=sampler,
        temperature=temperature,
        on_overflow=on_overflow,
        progress=progress,
        encoded=encoded,
        decode="diffuseq" if joint_truncation else "clean",
    )
    candidates = [list(column) for column in zip(*batch.texts, strict=True)]
    if generations_dir is not None:
        for index, texts in enumerate(candidates):
            path = Path(generations_dir) / f"seed{seed}-candidate{index}.jsonl"
            write_generations(path, sources, references, texts)
    options = _ScoreOptions(mbr, bootstrap, seed, bertscore_model, bertscore_layer, exact)
    settings = {
        "split": split if rows is None else None, "steps": steps, "sampler": sampler,
        "temperature": temperature, **_how_it_runs(model),
    }  # fmt: skip
    return _scored(sources, references, candidates, options, {**settings, **_cost(batch)})


def evaluate_generations(
    paths: Sequence[str | os.PathLike[str]],
    *,
    mbr: bool = False,
    max_rows: int = 0,
    bootstrap: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    exact: ExactMetrics | None = None,
) -> dict[str, Any]:
    """Score DiffuSeq's generation files, one a seed; returns what `evaluate_model` does.

    Raises `DataError` for files that are malformed or do not hold the same rows.
    """
    _check_range("max_rows", max_rows, 0, MAX_SEED)
    _check_range("seed", seed, 0, MAX_SEED)
    check_resamples(bootstrap)
    refuse_layer_alone(bertscore_model, bertscore_layer)
    refuse_one("generations", paths)
    _check_mbr(mbr, len(paths), "name several files")
    texts = read_generations(paths)
    first = slice(max_rows or None)
    return _scored(
        texts.sources[first],
        texts.references[first],
        [column[first] for column in texts.candidates],
        _ScoreOptions(mbr, bootstrap, seed, bertscore_model, bertscore_layer, exact),
        {"files": [os.fspath(path) for path in paths]},
    )


@dataclass(frozen=True)
class _ScoreOptions:
    mbr: bool
    bootstrap: int
    seed: int
    bertscore_model: str | None
    bertscore_layer: int | None
    exact: ExactMetrics | None


def _scored(
    sources: list[str],
    references: list[str],
    candidates: list[list[str]],
    options: _ScoreOptions,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Scores of the candidates, and of the two texts that need no model."""
    score = partial(
        score_generations,
        sources,
        references,
        bootstrap=options.bootstrap,
        seed=options.seed,
        bertscore_model=options.bertscore_model,
        bertscore_layer=options.bertscore_layer,
    )
    result = score(candidates, mbr=options.mbr)
    result["baselines"] = {"copy": score([sources]), "reference": score([references])}
    if options.exact is not None:
        result["exact"] = options.exact(
            sources, [list(row) for row in zip(*candidates, strict=True)]
        )
    result["run"] = {
        "rows": len(sources),
        "num_candidates": len(candidates),
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        **run,
    }
    return result


def _rows(
    data_dir: str | os.PathLike[str] | None, rows: Sequence[Row] | None, split: str, max_rows: int
) -> Sequence[Row]:
    if (data_dir is None) == (rows is None):
        raise UsageError("evaluate_model: expected one of data_dir and rows, got both or neither.")
    if rows is not None and split != "test":
        raise UsageError(f"split: {split!r} belongs to data_dir, and rows are given; leave it out.")
    if data_dir is not None:
        return load_rows(Path(data_dir), split, max_rows or None)
    refuse_one("rows", rows)
    chosen = list(rows or ())[: max_rows or None]
    if not chosen:
        raise UsageError("rows: expected at least 1 row, got 0.")
    return chosen


def _how_it_runs(model: CandidateModel) -> dict[str, str]:
    """Device, precision and backend, which a timing means nothing without, where it tells them."""
    names = ("device", "precision", "backend")
    return {name: str(getattr(model, name)) for name in names if hasattr(model, name)}


def _cost(batch: CandidateBatch) -> dict[str, float | int]:
    return {
        "truncated": sum(batch.truncated),
        "seconds": batch.seconds,
        "seconds_per_text": batch.seconds / sum(map(len, batch.texts)),
    }


def _check_mbr(mbr: bool, candidates: int, way: str) -> None:
    if mbr and candidates < 2:
        raise UsageError(
            f"mbr: needs candidates to choose from, and there is {candidates}; {way}, or leave it "
            "out."
        )


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name}: expected {low} to {high}, got {value!r}.")
