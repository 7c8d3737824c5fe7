from __future__ import annotations

from typing import Any

import pytest

from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.report import format_report
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.evaluation.table import Table
from dlmone_fast.tasks.paper import TABLE_1, TABLE_2, TABLE_6, paper_rows

SOURCES = ["who wrote this old song", "when does the shop open"]
REFERENCES = ["who is the author of this song", "what time does the shop open"]
CANDIDATES = [
    ["who wrote the song", "when will it open"],
    ["who made this song", "when is it open"],
]


def result(mbr: bool = True) -> dict[str, Any]:
    scored = score_generations(SOURCES, REFERENCES, CANDIDATES, mbr=mbr, bootstrap=20)
    baselines = {
        name: score_generations(SOURCES, REFERENCES, [texts], bootstrap=20)
        for name, texts in (("copy", SOURCES), ("reference", REFERENCES))
    }
    run = {"rows": 2, "num_candidates": 2, "seed": 0, "bootstrap": 20, "files": ["a", "b"]}
    return {**scored, "baselines": baselines, "run": run}


def row_of(report: str, name: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_table_is_aligned_markdown() -> None:
    table = Table(["system", "x"])
    table.add("a|b", 10)
    table.add("c\nd", None)
    assert table.markdown().splitlines() == [
        "| system |   x |",
        "| ------ | --: |",
        "| a\\|b   |  10 |",
        "| c d    |   - |",
    ]


def test_table_refuses_rows_and_alignments_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="expected 2 cells, got 1"):
        Table(["a", "b"]).add(1)
    for align in ("l", "lx", "lll"):
        with pytest.raises(UsageError, match="align"):
            Table(["a", "b"], align)


def test_report_has_every_row() -> None:
    scored = result()
    report = format_report(scored, name="ours", task="qqp")
    low, high = scored["intervals"]["bleu"]
    assert row_of(report, "ours")[1] == f"{scored['bleu']:.4f} ± {(high - low) / 2:.4f}"
    assert row_of(report, "ours, MBR-2")[1].startswith(f"{scored['mbr']['bleu']:.4f} ±")
    copied = scored["baselines"]["copy"]["bleu"]
    assert row_of(report, "copy of the source")[1].startswith(f"{copied:.4f}")
    assert row_of(report, "reference")[1].startswith("1.0000")
    assert row_of(report, "paper: DLM-One, 1 NFE")[1:] == [
        "0.1788", "0.5265", "0.7851", "0.9671", "0.3418", "0.6256", "-",
    ]  # fmt: skip
    assert row_of(report, "paper: DiffuSeq, 2000 NFE, MBR-10")[1] == "0.2413"
    assert scored["sacrebleu_signature"] in report
    assert "BERTScore: skipped" in report
    assert "Copying the source scores BLEU" in report


def test_report_without_task_or_mbr_has_no_rows_for_them() -> None:
    report = format_report(result(mbr=False), name="ours")
    assert "paper:" not in report
    assert "MBR" not in report


def test_exact_metrics_have_their_own_table() -> None:
    report = format_report({**result(), "exact": {"valid": 0.5, "samples": 4}}, name="ours")
    assert row_of(report, "valid") == ["valid", "0.5000"]
    assert row_of(report, "samples") == ["samples", "4"]


def test_paper_tables_are_consistent() -> None:
    assert [row.nfe for row in TABLE_1] == [2000, 1] * 3
    # The paper's abstract claims about 500 times fewer seconds.
    assert TABLE_2[2000] / TABLE_2[1] == pytest.approx(498)
    for single, best in zip(TABLE_1, TABLE_6, strict=True):
        assert (single.task, single.system) == (best.task, best.system)
        assert best.bleu >= single.bleu
    assert len(paper_rows("wiki-auto")) == 2
    assert len(paper_rows("wiki-auto", mbr=True)) == 4
    assert paper_rows("grammar") == ()
