"""Evaluating a model, or files of generations, against a test split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dlmone_fast.arguments import refuse_one
from dlmone_fast.checks import is_whole
from dlmone_fast.data.rows import Row, find_split, load_rows
from dlmone_fast.errors import DataError, PromptError, UsageError
from dlmone_fast.evaluation.bertscore import refuse_layer_alone
from dlmone_fast.evaluation.bootstrap import DEFAULT_RESAMPLES, check_resamples
from dlmone_fast.evaluation.generations import check_writable, read_generations, write_generations
from dlmone_fast.evaluation.pronunciation import score_pronunciations
from dlmone_fast.evaluation.protocol import CandidateBatch, CandidateModel
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.evaluation.seeds import MAX_SEED, row_seeds
from dlmone_fast.tasks import g2p

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
    task: str | None = None,
    generations_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Generate for the rows of a split (or the given `rows`) and score the texts.

    Sources and references are scored in the model's spelling (`model.normalize_text`): its case,
    spaces and punctuation, which it cannot write otherwise, and the texts' own words and accents.
    Rows with `refs` are scored against all of their references.

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
            as it does, from the decoder's arg-max without a cut at the first [SEP]. References are
            then what their ids decode to, as in the original's files.
        exact: task metrics that get the sources and each source's candidates; what they return
            becomes the entry `exact`.
        task: "g2p" scores phonemes against all references of a word, instead of text; None: the
            task that the model was trained on, where it says so.
        generations_dir: also write one file per candidate there, in DiffuSeq's format.

    Returns:
        The dictionary of `score_generations`, with `baselines` (`copy` and `reference`: the same
        scores of the source and of the reference as output; `vocabulary`, where the model's
        vocabulary cannot write all references: what it makes of them) and `run` (settings, row
        count, truncated sources, seconds; device, precision and backend of a model that tells
        them). For the task g2p that of `score_pronunciations`, with `run`.

    Raises:
        UsageError: an argument out of range, or one that the task has no use for.
        DataError: rows that cannot be read, by us or by the model.
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
    task = str(getattr(model, "task", "")) if task is None else task
    if task == g2p.TASK:
        _refuse_text_options(mbr, joint_truncation, bertscore_model, exact)
    refuse_layer_alone(bertscore_model, bertscore_layer)
    _check_mbr(mbr, num_candidates, "pass num_candidates=10")
    pairs = _rows(data_dir, rows, split, max_rows)
    where = "rows" if data_dir is None else str(find_split(Path(data_dir), split))
    files = _generation_files(generations_dir, seed, num_candidates)
    for file in files:
        check_writable(file)
    encoded = None
    if joint_truncation:
        encoded, sources, references = _cut_jointly(model, pairs)
    else:
        with _naming_the_row(model, pairs, where, on_overflow):
            sources = [model.normalize_text(row.src) for row in pairs]
        # The phonemes of a word are compared as they are, whatever letters the model reads.
        spoken = task == g2p.TASK
        references = [
            list(row.references) if spoken else [model.normalize_text(t) for t in row.references]
            for row in pairs
        ]
    with _naming_the_row(model, pairs, where, on_overflow):
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
    for file, texts in zip(files, candidates, strict=False):
        write_generations(file, sources, references, texts)
    options = _ScoreOptions(mbr, int(bootstrap), int(seed), bertscore_model, bertscore_layer, exact)
    settings = {
        "split": split if rows is None else None, "steps": steps, "sampler": sampler,
        "temperature": temperature, **_how_it_runs(model),
    }  # fmt: skip
    run = {**settings, **_cost(batch)}
    if task == g2p.TASK:
        return _pronounced(references, batch.texts, options, run)
    written = None if joint_truncation else _through_vocabulary(model, pairs)
    return _scored(sources, references, candidates, options, run, written)


def _cut_jointly(
    model: CandidateModel, pairs: Sequence[Row]
) -> tuple[list[list[int]], list[str], list[list[str]]]:
    """Ids and text of each source, and each row's references, cut with the source as DiffuSeq cuts
    a pair; the source is the one that is cut with the target."""
    cut = [[model.encode_jointly(row.src, text) for text in row.references] for row in pairs]
    encoded = [known[0][0] for known in cut]
    references = [[model.decode_text(ids) for _, ids in known] for known in cut]
    return encoded, [model.decode_text(ids) for ids in encoded], references


def _through_vocabulary(model: CandidateModel, pairs: Sequence[Row]) -> list[str] | None:
    """The targets as the model's vocabulary writes them; None of a model that does not tell."""
    write = getattr(model, "through_vocabulary", None)
    return None if write is None else [write(row.trg) for row in pairs]


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
    task: str = "",
) -> dict[str, Any]:
    """Score DiffuSeq's generation files, one a seed; returns what `evaluate_model` does.

    A row of these files has one reference, also for the task g2p.

    Raises `DataError` for files that are malformed or do not hold the same rows.
    """
    if task == g2p.TASK:
        _refuse_text_options(mbr, False, bertscore_model, exact)
    _check_range("max_rows", max_rows, 0, MAX_SEED)
    _check_range("seed", seed, 0, MAX_SEED)
    check_resamples(bootstrap)
    refuse_layer_alone(bertscore_model, bertscore_layer)
    refuse_one("generations", paths)
    _check_mbr(mbr, len(paths), "name several files")
    texts = read_generations(paths)
    first = slice(max_rows or None)
    references = texts.refs[first]
    candidates = [column[first] for column in texts.candidates]
    options = _ScoreOptions(mbr, int(bootstrap), int(seed), bertscore_model, bertscore_layer, exact)
    run = {"files": [os.fspath(path) for path in paths]}
    if task == g2p.TASK:
        of_words = [list(row) for row in zip(*candidates, strict=True)]
        return _pronounced(references, of_words, options, run)
    return _scored(texts.sources[first], references, candidates, options, run)


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
    references: list[list[str]],
    candidates: list[list[str]],
    options: _ScoreOptions,
    run: dict[str, Any],
    written: list[str] | None = None,
) -> dict[str, Any]:
    """Scores of the candidates, and of the texts that need no model.

    `written` holds the references as the model's vocabulary gives them back.
    """
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
    first = [known[0] for known in references]
    result["baselines"] = {"copy": score([sources]), "reference": score([first])}
    if written is not None and any(map(_differs, written, references)):
        result["baselines"]["vocabulary"] = score([written])
    if options.exact is not None:
        result["exact"] = options.exact(
            sources, [list(row) for row in zip(*candidates, strict=True)]
        )
    result["run"] = _run_entry(len(sources), len(candidates), options, run)
    return result


def _pronounced(
    references: Sequence[Sequence[str]],
    candidates: list[list[str]],
    options: _ScoreOptions,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Scores of the candidates [n][m] of n words."""
    result = score_pronunciations(
        references, candidates, bootstrap=options.bootstrap, seed=options.seed
    )
    result["run"] = _run_entry(len(candidates), len(candidates[0]), options, run)
    return result


def _run_entry(
    rows: int, candidates: int, options: _ScoreOptions, run: dict[str, Any]
) -> dict[str, Any]:
    return {
        "rows": rows,
        "num_candidates": candidates,
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        **run,
    }


def _refuse_text_options(
    mbr: bool, joint_truncation: bool, bertscore_model: str | None, exact: ExactMetrics | None
) -> None:
    """Refuse what phonemes have no use for."""
    for name, given in (
        ("mbr", mbr),
        ("joint_truncation", joint_truncation),
        ("bertscore_model", bertscore_model),
        ("exact", exact),
    ):
        if given:
            raise UsageError(
                f"{name}: is for tasks whose targets are text; leave it out for the task "
                f"{g2p.TASK!r}, or name another --task"
            )


@contextmanager
def _naming_the_row(
    model: CandidateModel, rows: Sequence[Row], where: str, on_overflow: str
) -> Iterator[None]:
    """Turn the refusal of a source into a DataError that names its line."""
    try:
        yield
    except PromptError:
        for row in rows:
            try:
                model.check_prompt(row.src, on_overflow, f"{where}, line {row.line}")
            except PromptError as error:
                raise DataError(str(error)) from error
        raise


def _generation_files(
    folder: str | os.PathLike[str] | None, seed: int, candidates: int
) -> list[Path]:
    """The file of each candidate's texts; none without a folder."""
    if folder is None:
        return []
    return [Path(folder) / f"seed{seed}-candidate{index}.jsonl" for index in range(candidates)]


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


def _differs(text: str, references: Sequence[str]) -> bool:
    return text not in references


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
    if not is_whole(value, low, high):
        raise UsageError(f"{name}: expected {low} to {high}, got {value!r}.")
