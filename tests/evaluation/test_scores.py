from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation.bleu import sentence_bleu
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.scores import METRICS, score_generations

SOURCES = ["how do plants drink water", "where is the nearest bank", "can fish sleep"]
REFERENCES = ["how do plants take up water", "where can i find a bank", "do fish ever sleep"]
CANDIDATES = [
    ["how do plants take water", "Where is  the nearest bank", "do do fish sleep"],
    ["how do plants drink up water", "where is a bank", ""],
    ["how do plants take water", "where can i find the bank", "do fish sleep"],
]


def golden() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("DLMONE_GOLDEN_DIR", root.parent / "shared" / "golden"))
    path = folder / "metrics-sample.json"
    if not path.is_file():
        pytest.skip(f"golden numbers are not at {folder} (DLMONE_GOLDEN_DIR)")
    return json.loads(path.read_text())


def test_golden_numbers() -> None:
    data = golden()
    rows, expected = data["rows"], data["expected"]
    sources = [row["source"] for row in rows]
    references = [row["reference"] for row in rows]
    candidates = [[row["candidates"][index] for row in rows] for index in range(3)]
    assert [row["candidates"][select_mbr(row["candidates"])] for row in rows] == [
        row["mbr"] for row in rows
    ]
    for index in range(3):
        scores = score_generations(sources, references, [candidates[index]], bootstrap=0)
        for metric, value in expected[f"candidate_{index}"].items():
            assert scores[metric] == pytest.approx(value, abs=1e-6), metric
    scores = score_generations(sources, references, candidates, mbr=True, bootstrap=0)
    assert scores["self_bleu"] == pytest.approx(expected["self_bleu"], abs=1e-6)
    assert scores["div_4"] == pytest.approx(expected["div_4"], abs=1e-6)
    for metric, value in expected["mbr"].items():
        assert scores["mbr"][metric] == pytest.approx(value, abs=1e-6), metric


def test_keys_are_the_documented_ones() -> None:
    scores = score_generations(SOURCES, REFERENCES, CANDIDATES, mbr=True, bootstrap=20)
    keys = {*METRICS, "sacrebleu_signature", "intervals"}
    assert scores.keys() == keys | {"mbr"}
    assert scores["mbr"].keys() == keys
    assert scores["intervals"].keys() == {*METRICS} - {"bertscore"}
    assert scores["bertscore"] is None
    for metric, (low, high) in scores["intervals"].items():
        assert low <= high, metric
    json.dumps(scores, allow_nan=False)


def test_several_candidates_average_their_scores() -> None:
    together = score_generations(SOURCES, REFERENCES, CANDIDATES, bootstrap=0)
    alone = [score_generations(SOURCES, REFERENCES, [texts], bootstrap=0) for texts in CANDIDATES]
    for metric in ("bleu", "rouge_l", "dist_1", "avg_len", "source_bleu", "ibleu", "sacrebleu"):
        mean = sum(scores[metric] for scores in alone) / 3
        assert together[metric] == pytest.approx(mean), metric


def test_definitions_on_one_candidate() -> None:
    scores = score_generations(SOURCES, REFERENCES, CANDIDATES[:1], mbr=True, bootstrap=0)
    bleu = sum(map(sentence_bleu, CANDIDATES[0], REFERENCES)) / 3
    source_bleu = sum(map(sentence_bleu, CANDIDATES[0], SOURCES)) / 3
    assert scores["bleu"] == pytest.approx(bleu)
    assert scores["source_bleu"] == pytest.approx(source_bleu)
    assert scores["ibleu"] == pytest.approx(0.8 * bleu - 0.2 * source_bleu)
    # "Where is  the nearest bank" is the second source but for case and white space.
    assert scores["exact_copy"] == pytest.approx(1 / 3)
    assert scores["empty"] == 0.0
    # "do do" is one of 4 + 4 + 3 neighbouring pairs.
    assert scores["repeat"] == pytest.approx(1 / 11)
    assert scores["length_ratio"] == pytest.approx(14 / 16)
    # The doubled space counts as a word of its own, as in DiffuSeq.
    assert scores["avg_len"] == pytest.approx(15 / 3)
    assert scores["self_bleu"] is None
    assert scores["div_4"] == pytest.approx(1.0)
    assert scores["mbr"] is None
    assert scores["intervals"] == {}


def test_mbr_scores_are_those_of_the_chosen_texts() -> None:
    scores = score_generations(SOURCES, REFERENCES, CANDIDATES, mbr=True, bootstrap=50, seed=3)
    rows = list(zip(*CANDIDATES, strict=True))
    chosen = [row[select_mbr(row)] for row in rows]
    alone = score_generations(SOURCES, REFERENCES, [chosen], bootstrap=50, seed=3)
    assert scores["mbr"] == {key: value for key, value in alone.items() if key != "mbr"}


def test_only_empty_texts_score_zero_everywhere() -> None:
    scores = score_generations(SOURCES, REFERENCES, [["", " ", ""]], bootstrap=20)
    assert scores["empty"] == 1.0
    zero = ("bleu", "rouge_l", "dist_1", "div_4", "repeat", "length_ratio", "sacrebleu", "ibleu")
    assert [scores[metric] for metric in zero] == [0.0] * len(zero)


@pytest.mark.parametrize(
    ("sources", "references", "candidates"),
    [([], [], [[]]), (["a"], ["a"], []), (["a"], ["a", "b"], [["a"]]), (["a"], ["a"], [["a"], []])],
)
def test_lists_that_do_not_fit_are_refused(sources: Any, references: Any, candidates: Any) -> None:
    with pytest.raises(UsageError, match="expected n >= 1 sources"):
        score_generations(sources, references, candidates)


def test_bootstrap_is_bounded() -> None:
    with pytest.raises(UsageError, match="bootstrap"):
        score_generations(SOURCES, REFERENCES, CANDIDATES, bootstrap=-1)
