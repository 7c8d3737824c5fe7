"""The published results that reports print beside a measurement.

All numbers are those of DLM-One, arXiv 2506.00290: Tables 1, 2, 3, 4 and 6. Scores are on the
test split; BERTScore is of microsoft/deberta-xlarge-mnli.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "DLM-One, arXiv 2506.00290"
TASK_TITLES = {
    "qqp": "paraphrase (QQP)",
    "quasar-t": "question generation (Quasar-T)",
    "wiki-auto": "text simplification (Wiki-Auto)",
}


@dataclass(frozen=True)
class PaperRow:
    """One printed row. `nfe` is network calls per sample; `candidates` > 1 means MBR over them."""

    task: str
    system: str
    nfe: int
    candidates: int
    bleu: float
    rouge_l: float
    bertscore: float
    dist_1: float
    self_bleu: float
    div_4: float
    table: int


def _row(table: int, task: str, system: str, nfe: int, candidates: int, scores: str) -> PaperRow:
    """A row of `table`; `scores` in the paper's order, BLEU to Div-4."""
    bleu, rouge_l, bertscore, dist_1, self_bleu, div_4 = map(float, scores.split())
    return PaperRow(
        task, system, nfe, candidates, bleu, rouge_l, bertscore, dist_1, self_bleu, div_4, table
    )


# One sample per source. The QQP and Quasar-T students are of stage 2, Wiki-Auto's of stage 1.
TABLE_1 = (
    _row(1, "qqp", "DiffuSeq", 2000, 1, "0.1829 0.5299 0.7932 0.9747 0.2732 0.8641"),
    _row(1, "qqp", "DLM-One", 1, 1, "0.1788 0.5265 0.7851 0.9671 0.3418 0.6256"),
    _row(1, "quasar-t", "DiffuSeq", 2000, 1, "0.1512 0.3468 0.5871 0.9141 0.2789 0.8103"),
    _row(1, "quasar-t", "DLM-One", 1, 1, "0.1512 0.3257 0.5683 0.9053 0.6166 0.3798"),
    _row(1, "wiki-auto", "DiffuSeq", 2000, 1, "0.2929 0.5313 0.7781 0.9272 0.4642 0.6604"),
    _row(1, "wiki-auto", "DLM-One", 1, 1, "0.2927 0.5299 0.7565 0.8924 0.5456 0.4098"),
)

# Seconds per sample by number of steps: mean of 100 runs on an RTX A5000, batch size not stated.
TABLE_2 = {1: 0.03, 65: 0.51, 286: 2.25, 667: 5.20, 1000: 7.70, 2000: 14.94}

# The two stages of distillation, QQP.
TABLE_3 = (
    _row(3, "qqp", "DLM-One stage 1", 1, 1, "0.1468 0.4829 0.7402 0.9370 0.2195 0.7764"),
    _row(3, "qqp", "DLM-One stage 2", 1, 1, "0.1788 0.5265 0.7851 0.9671 0.3418 0.6256"),
)

# More inference steps with the one-step student, QQP.
TABLE_4 = (
    _row(4, "qqp", "DLM-One, 1 step", 1, 1, "0.1788 0.5265 0.7851 0.9671 0.3418 0.6256"),
    _row(4, "qqp", "DLM-One, 2 steps", 2, 1, "0.1800 0.5287 0.7895 0.9676 0.3455 0.6228"),
    _row(4, "qqp", "DLM-One, 4 steps", 4, 1, "0.1829 0.5329 0.7959 0.9693 0.3549 0.6095"),
)

# MBR over 10 candidates; self-BLEU and Div-4 repeat those of single samples.
TABLE_6 = (
    _row(6, "qqp", "DiffuSeq", 2000, 10, "0.2413 0.5880 0.8365 0.9807 0.2732 0.8641"),
    _row(6, "qqp", "DLM-One", 1, 10, "0.2213 0.5741 0.8297 0.9773 0.3418 0.6256"),
    _row(6, "quasar-t", "DiffuSeq", 2000, 10, "0.1731 0.3665 0.6123 0.9056 0.2789 0.8103"),
    _row(6, "quasar-t", "DLM-One", 1, 10, "0.1522 0.3280 0.5708 0.9026 0.6167 0.3798"),
    _row(6, "wiki-auto", "DiffuSeq", 2000, 10, "0.3622 0.5849 0.8126 0.9264 0.4642 0.6604"),
    _row(6, "wiki-auto", "DLM-One", 1, 10, "0.3630 0.5839 0.8084 0.9068 0.5456 0.4098"),
)


# What the figures show is printed as curves, not as numbers: these are the points of theirs that
# the tables state, and what the text says of the rest.
FIGURE_2 = tuple(row for row in TABLE_1 + TABLE_6 if row.task == "wiki-auto")
FIGURE_4_START = TABLE_3[1]
FIGURE_4 = "a third stage plateaus"


def paper_rows(task: str, *, mbr: bool = False) -> tuple[PaperRow, ...]:
    """The paper's rows for a task: Table 1, and Table 6 with `mbr`; empty for other tasks."""
    rows = TABLE_1 + TABLE_6 if mbr else TABLE_1
    return tuple(row for row in rows if row.task == task)
