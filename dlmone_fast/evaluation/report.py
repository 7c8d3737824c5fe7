"""The report of an evaluation: two tables and the notes that make them readable alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmone_fast.evaluation.table import Table
from dlmone_fast.tasks import g2p
from dlmone_fast.tasks.paper import PAPER, TASK_TITLES, PaperRow, paper_rows

# Column title, metric, digits after the point.
_REFERENCE_COLUMNS = (
    ("BLEU", "bleu", 4),
    ("ROUGE-L", "rouge_l", 4),
    ("BERTScore", "bertscore", 4),
    ("Dist-1", "dist_1", 4),
    ("self-BLEU", "self_bleu", 4),
    ("Div-4", "div_4", 4),
    ("sacreBLEU", "sacrebleu", 2),
)
VOCABULARY_ROW = "reference in the model's vocabulary"
_SOURCE_COLUMNS = (
    ("source-BLEU", "source_bleu", 4),
    ("iBLEU", "ibleu", 4),
    ("exact copies", "exact_copy", 4),
    ("exact match", "exact_match", 4),
    ("empty", "empty", 4),
    ("repeats", "repeat", 4),
    ("length ratio", "length_ratio", 3),
    ("words", "avg_len", 2),
    ("[UNK]", "unknown", 4),
)


def format_report(result: Mapping[str, Any], *, name: str, task: str = "") -> str:
    """Text of the result of `evaluate_model` or `evaluate_generations`.

    `name` labels the system's row; `task` ("qqp", "quasar-t", "wiki-auto") adds the paper's rows.
    Every value has its 95 % interval's half-width behind it. Scores of pronunciations have one
    table, with published systems.
    """
    if "wer" in result:
        return _pronunciation_report(result, name)
    systems = _systems(result, name)
    published = paper_rows(task, mbr=result["mbr"] is not None)
    references = _table(_REFERENCE_COLUMNS, systems)
    for row in published:
        references.add(_paper_name(row), *_paper_cells(row))
    parts = [
        "Against the references",
        references.markdown(),
        "Against the sources, and form",
        _table(_SOURCE_COLUMNS, systems).markdown(),
    ]
    extra = _extra_table(result)
    if extra.rows:
        parts += ["Exact metrics of the task", extra.markdown()]
    return "\n\n".join([*parts, "\n".join(_notes(result, name, task))])


def _pronunciation_report(result: Mapping[str, Any], name: str) -> str:
    run = result["run"]
    draws = run["num_candidates"]
    columns = (("WER", "wer", 4), ("PER", "per", 4), (f"oracle WER of {draws}", "oracle_wer", 4))
    table = Table(["system", *(title for title, _, _ in columns), "distinct", "ms per word"])
    # A batch's time is that of all candidates of its words.
    took = f"{1000 * run['seconds'] / run['rows']:.3f}" if "seconds" in run else None
    table.add(
        name, *(_cell(result, metric, digits) for _, metric, digits in columns),
        _cell(result, "distinct", 2), took,
    )  # fmt: skip
    for row in g2p.PUBLISHED:
        per = None if row.per is None else f"{row.per:.3f}"
        table.add(f"{row.system} ({row.source})", f"{row.wer:.3f}", per, None, None, None)
    notes = [
        _size_note(run),
        *_run_notes(run),
        _interval_note(run),
        "WER: share of candidates that equal no reference; PER: edits to the closest reference; "
        "oracle WER: words of which no candidate is right; distinct: different candidates of a "
        "word. Definitions: dlmone_fast/tasks/g2p.py.",
    ]
    return "\n\n".join(["Pronunciations", table.markdown(), "\n".join(notes)])


def _size_note(run: Mapping[str, Any]) -> str:
    candidates = _count(run["num_candidates"], "candidate")
    return f"{run['rows']} rows, {candidates} per source, seed {run['seed']}."


def _systems(result: Mapping[str, Any], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    rows = [(name, result)]
    if result["mbr"] is not None:
        rows.append((f"{name}, MBR-{result['run']['num_candidates']}", result["mbr"]))
    baselines = result["baselines"]
    rows += [("copy of the source", baselines["copy"]), ("reference", baselines["reference"])]
    if "vocabulary" in baselines:
        rows.append((VOCABULARY_ROW, baselines["vocabulary"]))
    return rows


def _table(
    columns: tuple[tuple[str, str, int], ...], systems: list[tuple[str, Mapping[str, Any]]]
) -> Table:
    table = Table(["system", *(title for title, _, _ in columns)])
    for name, scores in systems:
        table.add(name, *(_cell(scores, metric, digits) for _, metric, digits in columns))
    return table


def _cell(scores: Mapping[str, Any], metric: str, digits: int) -> str | None:
    value = scores[metric]
    if value is None:
        return None
    text = f"{value:.{digits}f}"
    if metric not in scores["intervals"]:
        return text
    low, high = scores["intervals"][metric]
    return f"{text} ± {(high - low) / 2:.{digits}f}"


def _paper_name(row: PaperRow) -> str:
    mbr = f", MBR-{row.candidates}" if row.candidates > 1 else ""
    return f"paper: {row.system}, {row.nfe} NFE{mbr}"


def _paper_cells(row: PaperRow) -> list[str | None]:
    return [
        f"{getattr(row, metric):.{digits}f}" if hasattr(row, metric) else None
        for _, metric, digits in _REFERENCE_COLUMNS
    ]


def _extra_table(result: Mapping[str, Any]) -> Table:
    table = Table(["metric", "value"])
    for key, value in result.get("exact", {}).items():
        if isinstance(value, int | float):
            table.add(key, f"{value:.4f}" if isinstance(value, float) else value)
    return table


def _notes(result: Mapping[str, Any], name: str, task: str) -> list[str]:
    run = result["run"]
    notes = [
        _size_note(run),
        *_run_notes(run),
        _interval_note(run),
        f"sacreBLEU: {result['sacrebleu_signature']}.",
        "BLEU, ROUGE-L, Dist-1, self-BLEU and Div-4 are DiffuSeq's definitions; those and all "
        "others stand at the top of dlmone_fast/evaluation/scores.py.",
    ]
    if result["bertscore"] is None:
        notes.append("BERTScore: skipped, no local model given (--bertscore-model DIR).")
    if "vocabulary" in result["baselines"]:
        notes.append(
            f"{VOCABULARY_ROW}: what the tokenizer gives back of the references, and so the most "
            "that any model with it can score; accents that it strips and words that it writes as "
            "[UNK] match nothing."
        )
    if result["self_bleu"] is None:
        notes.append("self-BLEU: undefined with one candidate per source.")
    return notes + _copy_notes(result, name, task)


def _run_notes(run: Mapping[str, Any]) -> list[str]:
    if "files" in run:
        return [f"Read from {', '.join(run['files'])}."]
    steps = f"{run['steps']} steps" if run["steps"] else "the model's default steps"
    sampler = f", sampler {run['sampler']}" if run["sampler"] else ""
    cut = _count(run["truncated"], "source")
    on = f" on {run['device']} in {run['precision']} ({run['backend']})" if "device" in run else ""
    return [
        f"Generated{on} with {steps}{sampler}: {run['seconds']:.2f} s, "
        f"{run['seconds_per_text']:.2e} s per text; {cut} truncated."
    ]


def _interval_note(run: Mapping[str, Any]) -> str:
    if not run["bootstrap"]:
        return "Intervals: none (--bootstrap 0)."
    return (
        f"± is half of the 95 % interval of {run['bootstrap']} bootstrap resamples of the sources, "
        "the same ones for every row."
    )


def _copy_notes(result: Mapping[str, Any], name: str, task: str) -> list[str]:
    copied, scored = result["baselines"]["copy"]["bleu"], result["bleu"]
    notes = []
    if copied >= scored:
        notes.append(
            f"Copying the source scores BLEU {copied:.4f}, not below {name} ({scored:.4f}): BLEU "
            "alone does not measure this task; read it with source-BLEU and iBLEU."
        )
    published = paper_rows(task)
    if published:
        notes.append(f"Paper rows ({TASK_TITLES[task]}): {PAPER}, as printed, test split.")
    if task == "qqp":
        best = max(row.bleu for row in published)
        notes.append(
            "QQP: on DiffuSeq's full test split a copy of the source scores BLEU near 0.23, above "
            f"the best published single sample here ({best:.4f}); most test pairs share a question "
            "with the training split."
        )
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
