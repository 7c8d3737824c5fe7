"""Every score of a set of generations, with its bootstrap interval.

Definitions (BLEU is the mean sentence BLEU of `evaluation.bleu` throughout):

bleu, rouge_l   against the references of a row, mean over sentences and candidates
exact_match     share of texts equal to one of their references, case and white space aside
dist_1          distinct over total words of a sentence, mean
avg_len         pieces between single spaces (DiffuSeq's count), mean
self_bleu       BLEU of candidate i against candidate j, i < j; mean over pairs, then sources;
                None with one candidate
div_4           distinct over total 4-grams pooled over a source's candidates, mean over sources
source_bleu     BLEU against the source: how much is copied
ibleu           0.8 bleu - 0.2 source_bleu (Sun and Zhou, ACL 2012)
exact_copy      share of texts equal to their source, case and white space aside
empty           share of texts without a word
repeat          share of neighbouring word pairs with twice the same word, over the whole corpus
length_ratio    words of the texts over words of the references (of several, the one nearest in
                length), over the whole corpus
unknown         share of words with [UNK], over the whole corpus
sacrebleu       corpus BLEU, 0 to 100, mean over candidates; signature beside it
bertscore       F1, mean; None without a local model

[UNK] stands for any word that a vocabulary lacks: it counts in lengths and equals no word of
another text, [UNK] itself included. Within one text it counts as one word (Dist-1, Div-4, repeats).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlmone_fast.arguments import refuse_one
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bertscore import refuse_layer_alone
from dlmone_fast.evaluation.bleu import Reference, references_of
from dlmone_fast.evaluation.bootstrap import (
    DEFAULT_RESAMPLES,
    Floats,
    check_resamples,
    percentile_interval,
    resampled_sums,
)
from dlmone_fast.evaluation.corpus_bleu import (
    STATISTICS,
    corpus_bleu_of_sums,
    corpus_bleu_signature,
)
from dlmone_fast.evaluation.rows import (
    COLUMNS,
    COUNT_COLUMNS,
    ScoredRows,
    score_rows,
)

SOURCE_BLEU_WEIGHT = 0.2
METRICS = (
    "bleu",
    "rouge_l",
    "dist_1",
    "avg_len",
    "self_bleu",
    "div_4",
    "source_bleu",
    "ibleu",
    "exact_copy",
    "empty",
    "repeat",
    "length_ratio",
    "sacrebleu",
    "bertscore",
    "exact_match",
    "unknown",
)


def score_generations(
    sources: Sequence[str],
    references: Sequence[Reference],
    candidates: Sequence[Sequence[str]],
    *,
    mbr: bool = False,
    bootstrap: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
) -> dict[str, Any]:
    """Score m candidates for each of n sources.

    `sources` holds n texts, `references` one text or a list of texts for each, `candidates` m lists
    of n texts (one list a seed or file). The result has the keys of `METRICS`,
    `sacrebleu_signature`, `intervals` (metric -> [low, high], 95 % paired bootstrap over sources
    with `bootstrap` resamples; empty for 0) and `mbr`: the same scores of the MBR choices, or None
    when not asked for or with one candidate.
    Raises `UsageError` for lists that do not fit together.
    """
    _check(sources, references, candidates)
    check_resamples(bootstrap)
    refuse_layer_alone(bertscore_model, bertscore_layer)
    known = [references_of(reference) for reference in references]
    rows = score_rows(
        sources,
        known,
        candidates,
        bertscore_model=bertscore_model,
        bertscore_layer=bertscore_layer,
    )
    signature = corpus_bleu_signature(map(len, known))
    result = _summary(rows, bootstrap, seed, signature)
    chosen = rows.selected() if mbr and len(candidates) > 1 else None
    result["mbr"] = _summary(chosen, bootstrap, seed, signature) if chosen else None
    return result


def _check(
    sources: Sequence[str], references: Sequence[Reference], candidates: Sequence[Sequence[str]]
) -> None:
    refuse_one("sources", sources)
    refuse_one("references", references)
    refuse_one("candidates", candidates)
    for place, texts in enumerate(candidates):
        refuse_one(f"candidates[{place}]", texts)
    counts = [len(texts) for texts in candidates]
    if not sources or not candidates or {len(references), *counts} != {len(sources)}:
        raise UsageError(
            "score_generations: expected n >= 1 sources, n references and one or more lists of "
            f"n candidates, got {len(sources)}, {len(references)} and {counts}."
        )
    for row, reference in enumerate(references):
        if not isinstance(reference, str) and not reference:
            raise UsageError(f"references[{row}]: expected at least 1 reference, got 0.")


def _summary(rows: ScoredRows, bootstrap: int, seed: int, signature: str) -> dict[str, Any]:
    count, many = rows.corpus.shape[:2]
    columns = _columns(rows)
    names = list(columns)
    table = np.stack([columns[name] for name in names], axis=1)
    corpus = rows.corpus.reshape(count, many * STATISTICS)
    table = np.concatenate([table, corpus], axis=1)
    exact_sums = np.array([[math.fsum(column) for column in table.T]])
    point = _metrics(exact_sums, names, count)
    resamples = _metrics(resampled_sums(table, bootstrap, seed), names, count) if bootstrap else {}
    result: dict[str, Any] = {
        metric: float(point[metric][0]) if metric in point else None for metric in METRICS
    }
    result["sacrebleu_signature"] = signature
    result["intervals"] = {
        metric: list(percentile_interval(resamples[metric]))
        for metric in METRICS
        if metric in resamples
    }
    return result


def _columns(rows: ScoredRows) -> dict[str, Floats]:
    """Per-source columns [n]: sentence scores are means over the candidates."""
    columns = dict(zip(COLUMNS, rows.sentences.mean(axis=1).T, strict=True))
    columns["div_4"] = rows.div_4
    if rows.self_bleu is not None:
        columns["self_bleu"] = rows.self_bleu
    if rows.bertscore is not None:
        columns["bertscore"] = rows.bertscore.mean(axis=1)
    return columns


def _metrics(sums: Floats, names: list[str], count: int) -> dict[str, Floats]:
    """Scores [k] of k sets of column sums over `count` sources."""
    total = dict(zip(names, sums.T, strict=False))
    metrics = {name: total[name] / count for name in names if name not in COUNT_COLUMNS}
    metrics["ibleu"] = (1 - SOURCE_BLEU_WEIGHT) * metrics["bleu"] - (
        SOURCE_BLEU_WEIGHT * metrics["source_bleu"]
    )
    metrics["repeat"] = _ratio(total["repeated_pairs"], total["pairs"])
    metrics["length_ratio"] = _ratio(total["tokens"], total["reference_tokens"])
    metrics["unknown"] = _ratio(total["unknown_tokens"], total["tokens"])
    corpus = sums[:, len(names) :].reshape(len(sums), -1, STATISTICS)
    metrics["sacrebleu"] = np.mean(
        [corpus_bleu_of_sums(corpus[:, index]) for index in range(corpus.shape[1])], axis=0
    )
    return metrics


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, 0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
