"""sacreBLEU's corpus BLEU (0 to 100) through per-sentence statistics that can be resampled.

[UNK] counts as one word in lengths and matches nothing: sacreBLEU would take it apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlmone_fast.evaluation.bleu import MAX_ORDER, UNKNOWN, Reference, references_of

if TYPE_CHECKING:
    from dlmone_fast.evaluation.bootstrap import Floats

# In place of [UNK]: code points that Unicode keeps out of all text, another one on either side.
_UNKNOWN_HYPOTHESIS, _UNKNOWN_REFERENCE = "\ufdd0", "\ufdd1"

# Matches and totals of each order, hypothesis length, reference length.
STATISTICS = 2 * MAX_ORDER + 2


def corpus_bleu_statistics(hypotheses: Sequence[str], references: Sequence[Reference]) -> Floats:
    """Sufficient statistics [n, 10] of n texts under sacreBLEU's default tokens (13a).

    `references` holds one or more for each text.
    """
    from sacrebleu.metrics.bleu import BLEU

    # Only the counts are read, so the sentence-level score's own settings do not matter.
    metric = BLEU(effective_order=True)
    rows = np.empty((len(hypotheses), STATISTICS))
    for index, (hypothesis, known) in enumerate(zip(hypotheses, references, strict=True)):
        score = metric.sentence_score(
            hypothesis.replace(UNKNOWN, _UNKNOWN_HYPOTHESIS),
            [reference.replace(UNKNOWN, _UNKNOWN_REFERENCE) for reference in references_of(known)],
        )
        rows[index] = [*score.counts, *score.totals, score.sys_len, score.ref_len]
    return rows


def corpus_bleu_of_sums(sums: Floats) -> Floats:
    """Corpus BLEU [m] of summed statistics [m, 10]."""
    from sacrebleu.metrics.bleu import BLEU

    scores = [
        BLEU.compute_bleu(
            correct=row[:MAX_ORDER],
            total=row[MAX_ORDER : 2 * MAX_ORDER],
            sys_len=row[-2],
            ref_len=row[-1],
            smooth_method="exp",
        ).score
        for row in np.rint(sums).astype(np.int64).tolist()
    ]
    return np.asarray(scores, dtype=np.float64)


def corpus_bleu_signature(reference_counts: Iterable[int] = (1,)) -> str:
    """sacreBLEU's own description of the score, to be printed beside it.

    `reference_counts` are the numbers of references that rows have: nrefs is theirs, or "var".
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    # The signature names the number of references, which is known only after a score.
    counts = sorted(set(reference_counts))
    places = range(counts[-1])
    # None stands for a reference that a row has not; sacreBLEU's own types do not know it.
    streams: Any = [["one" if place < count else None for count in counts] for place in places]
    metric.corpus_score(["one"] * len(counts), streams)
    return str(metric.get_signature())
