"""The scores of each row and candidate, as the columns that every summary is a sum of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlmone_fast.evaluation.bertscore import bertscore_f1
from dlmone_fast.evaluation.bleu import (
    UNKNOWN,
    NgramProfile,
    Reference,
    bleu_from_matches,
    clipped_matches,
    distinct_share,
    is_unknown,
    merged_profile,
    nearest_length,
    pairwise_bleu,
    profile_bleu,
    profile_tokens,
    references_of,
)
from dlmone_fast.evaluation.bootstrap import Floats
from dlmone_fast.evaluation.corpus_bleu import corpus_bleu_statistics
from dlmone_fast.evaluation.diversity import adjacent_repeats, upper_triangle_mean
from dlmone_fast.evaluation.mbr import best_agreement
from dlmone_fast.evaluation.rouge import rouge_l_of_tokens, rouge_tokeniser

# Means over sentences.
MEAN_COLUMNS = (
    "bleu", "rouge_l", "dist_1", "avg_len", "source_bleu", "exact_copy", "empty", "exact_match"
)  # fmt: skip
# Numerators and denominators of the ratio scores.
COUNT_COLUMNS = ("repeated_pairs", "pairs", "tokens", "reference_tokens", "unknown_tokens")
COLUMNS = MEAN_COLUMNS + COUNT_COLUMNS


@dataclass(frozen=True)
class ScoredRows:
    """Scores of n rows with m candidates each.

    `sentences` [n, m, len(COLUMNS)]; `corpus` [n, m, 10] sufficient statistics of corpus BLEU;
    `bertscore` [n, m] or None; `self_bleu` [n], or None with one candidate; `div_4` [n];
    `chosen_div_4` [n] is that of the MBR choice alone; `chosen` [n] the index of that choice.
    """

    sentences: Floats
    corpus: Floats
    bertscore: Floats | None
    self_bleu: Floats | None
    div_4: Floats
    chosen_div_4: Floats
    chosen: np.ndarray

    def selected(self) -> ScoredRows:
        """The same scores of the MBR choices alone, as a set with one candidate a row."""
        index = self.chosen[:, None]
        return ScoredRows(
            np.take_along_axis(self.sentences, index[:, :, None], axis=1),
            np.take_along_axis(self.corpus, index[:, :, None], axis=1),
            None if self.bertscore is None else np.take_along_axis(self.bertscore, index, axis=1),
            None,
            self.chosen_div_4,
            self.chosen_div_4,
            np.zeros_like(self.chosen),
        )


class _Pair:
    """A source and its references, tokenised once for all candidates."""

    def __init__(self, source: str, references: Sequence[str]) -> None:
        self.source = profile_tokens(source.split())
        profiles = [profile_tokens(reference.split()) for reference in references]
        self.reference, self.lengths = merged_profile(profiles), [p.length for p in profiles]
        self.rouge_tokens = rouge_tokeniser(references)
        self.reference_rouge = [self.rouge_tokens(reference) for reference in references]
        self.plain_source = _plain(source)
        self.plain_references = {_plain(reference) for reference in references}

    def columns(self, text: str, tokens: list[str], profile: NgramProfile) -> list[float]:
        length, plain = nearest_length(self.lengths, profile.length), _plain(text)
        known, rouge = UNKNOWN not in text, self.rouge_tokens(text)
        matches = clipped_matches(profile, self.reference)
        return [
            bleu_from_matches(matches, profile.length, length),
            max(rouge_l_of_tokens(rouge, reference) for reference in self.reference_rouge),
            distinct_share([tokens], 1),
            # DiffuSeq counts the pieces between single spaces, empty ones included.
            len(text.split(" ")),
            profile_bleu(profile, self.source),
            known and plain == self.plain_source,
            not tokens,
            known and plain in self.plain_references,
            adjacent_repeats(tokens),
            max(0, len(tokens) - 1),
            len(tokens),
            length,
            sum(map(is_unknown, tokens)),
        ]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def score_rows(
    sources: Sequence[str],
    references: Sequence[Reference],
    candidates: Sequence[Sequence[str]],
    *,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
) -> ScoredRows:
    """Score `candidates` [m][n] against `sources` [n] and `references` [n], one or more a row."""
    known = [references_of(reference) for reference in references]
    bertscore = None
    # First, because it is the one that can be refused.
    if bertscore_model is not None:
        bertscore = np.stack(
            [_bertscore(texts, known, bertscore_model, bertscore_layer) for texts in candidates],
            axis=1,
        )
    rows, many = len(sources), len(candidates)
    sentences = np.empty((rows, many, len(COLUMNS)))
    self_bleu, div_4, chosen_div_4 = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    chosen = np.zeros(rows, dtype=np.int64)
    for row, (source, reference) in enumerate(zip(sources, known, strict=True)):
        texts = [column[row] for column in candidates]
        tokens = [text.split() for text in texts]
        profiles = [profile_tokens(words) for words in tokens]
        pair = _Pair(source, reference)
        sentences[row] = [
            pair.columns(*parts) for parts in zip(texts, tokens, profiles, strict=True)
        ]
        div_4[row] = distinct_share(tokens, 4)
        if many > 1:
            agreement = pairwise_bleu(profiles)
            self_bleu[row] = upper_triangle_mean(agreement)
            chosen[row] = best_agreement(agreement)
        chosen_div_4[row] = distinct_share([tokens[chosen[row]]], 4)
    corpus = np.stack([corpus_bleu_statistics(texts, known) for texts in candidates], axis=1)
    return ScoredRows(
        sentences, corpus, bertscore, self_bleu if many > 1 else None, div_4, chosen_div_4, chosen
    )


def _bertscore(
    texts: Sequence[str], references: Sequence[Sequence[str]], model: str, layer: int | None
) -> Floats:
    """BERTScore F1 [n] against each text's best reference; [UNK] is left out of the texts."""
    counts = [len(known) for known in references]
    repeated = [
        text.replace(UNKNOWN, " ")
        for text, count in zip(texts, counts, strict=True)
        for _ in range(count)
    ]
    flat = [reference for known in references for reference in known]
    scores = bertscore_f1(repeated, flat, model, layer=layer)
    return np.maximum.reduceat(scores, np.cumsum([0, *counts[:-1]]))
