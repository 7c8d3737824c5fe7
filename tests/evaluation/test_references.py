"""Rows with several references: every score uses all of them, and says how many there were."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from test_evaluate_model import EchoModel

from dlmone_fast.data.rows import Row, read_rows
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.evaluation import rows as scored_rows
from dlmone_fast.evaluation.bleu import (
    bleu_from_matches,
    clipped_matches,
    merged_profile,
    nearest_length,
    profile_tokens,
)
from dlmone_fast.evaluation.corpus_bleu import corpus_bleu_signature
from dlmone_fast.evaluation.generations import read_generations, write_generations
from dlmone_fast.evaluation.rouge import rouge_l
from dlmone_fast.evaluation.run import evaluate_generations, evaluate_model
from dlmone_fast.evaluation.scores import score_generations

SOURCES = ["the small cat sat on the old mat", "rain falls"]
REFERENCES = [
    ["a cat was sitting on a mat", "the small cat sat on the rug", "there was a cat"],
    ["it rains", "rain is falling now", "rain falls"],
]
TEXTS = ["the small cat sat on a mat", "rain is falling"]


def bleu(text: str, references: list[str]) -> float:
    profiles = [profile_tokens(reference.split()) for reference in references]
    profile = profile_tokens(text.split())
    length = nearest_length([p.length for p in profiles], profile.length)
    matches = clipped_matches(profile, merged_profile(profiles))
    return bleu_from_matches(matches, profile.length, length)


def test_bleu_of_several_references_by_hand() -> None:
    # "on a mat" is of the first reference, all before it of the second.
    merged = merged_profile([profile_tokens(text.split()) for text in REFERENCES[0]])
    assert clipped_matches(profile_tokens(TEXTS[0].split()), merged) == [7, 6, 4, 2]
    # A word counts as often as in the reference that has it most, not in all together.
    twice = merged_profile([profile_tokens(["go", "go"]), profile_tokens(["go", "stop", "go"])])
    assert clipped_matches(profile_tokens(["go"] * 4), twice)[0] == 2
    assert nearest_length([3, 5, 9], 4) == 3
    assert nearest_length([5, 9], 8) == 9


def test_bleu_agrees_with_nltk_on_several_references() -> None:
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is not installed")
    smooth = nltk.SmoothingFunction().method4
    draw = random.Random(5)
    words = ["tea", "cup", "the", "a", "warm", "very", "mug"]
    for _ in range(500):
        references = [draw.choices(words, k=draw.randint(1, 12)) for _ in range(draw.randint(1, 4))]
        text = draw.choices(words, k=draw.randint(1, 12))
        expected = nltk.sentence_bleu(references, text, smoothing_function=smooth)
        assert bleu(" ".join(text), [" ".join(words) for words in references]) == expected


def test_every_score_takes_the_best_of_the_references() -> None:
    scores = score_generations(SOURCES, REFERENCES, [TEXTS], bootstrap=0)
    assert scores["bleu"] == pytest.approx(sum(map(bleu, TEXTS, REFERENCES)) / 2)
    best = [max(rouge_l(t, r) for r in known) for t, known in zip(TEXTS, REFERENCES, strict=True)]
    assert scores["rouge_l"] == pytest.approx(sum(best) / 2)
    first = score_generations(SOURCES, [known[0] for known in REFERENCES], [TEXTS], bootstrap=0)
    for metric in ("bleu", "rouge_l", "sacrebleu"):
        assert scores[metric] > first[metric], metric
    match = score_generations(SOURCES, REFERENCES, [["There  was a cat", "no"]], bootstrap=0)
    assert match["exact_match"] == 0.5
    # A copy is a match where the source is a reference.
    copies = score_generations(SOURCES, REFERENCES, [SOURCES], bootstrap=0)
    assert (copies["exact_match"], copies["exact_copy"]) == (0.5, 1.0)


def test_sacrebleu_is_its_own_score_of_all_references() -> None:
    import sacrebleu

    streams = [list(stream) for stream in zip(*REFERENCES, strict=True)]
    expected = sacrebleu.corpus_bleu(TEXTS, streams)
    scores = score_generations(SOURCES, REFERENCES, [TEXTS], mbr=True, bootstrap=0)
    assert scores["sacrebleu"] == pytest.approx(expected.score)
    assert "nrefs:3|" in scores["sacrebleu_signature"]
    assert "nrefs:1|" in corpus_bleu_signature()
    uneven = score_generations(SOURCES, [REFERENCES[0], "it rains"], [TEXTS], bootstrap=0)
    assert "nrefs:var|" in uneven["sacrebleu_signature"]


def test_mbr_choices_are_scored_against_all_references() -> None:
    candidates = [TEXTS, TEXTS, ["nothing", "else"]]
    scores = score_generations(SOURCES, REFERENCES, candidates, mbr=True, bootstrap=0)
    alone = score_generations(SOURCES, REFERENCES, [TEXTS], bootstrap=0)
    assert scores["mbr"] == {key: value for key, value in alone.items() if key != "mbr"}


def test_bertscore_is_that_of_the_best_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    def lengths(texts: list[str], references: list[str], model: str, **_: object) -> object:
        assert "[UNK]" not in " ".join(texts)
        return np.array([float(len(reference)) for reference in references])

    monkeypatch.setattr(scored_rows, "bertscore_f1", lengths)
    scores = score_generations(
        SOURCES, [REFERENCES[0], "it rains"], [["[UNK] a", "b"]], bootstrap=0, bertscore_model="m"
    )
    assert scores["bertscore"] == pytest.approx((len(REFERENCES[0][1]) + len("it rains")) / 2)


def test_one_reference_scores_as_before() -> None:
    single = [known[0] for known in REFERENCES]
    assert score_generations(SOURCES, single, [TEXTS], bootstrap=20) == score_generations(
        SOURCES, [[text] for text in single], [TEXTS], bootstrap=20
    )


@pytest.mark.parametrize(
    ("references", "message"),
    [([[], ["a"]], r"references\[0\]: expected at least 1"), ("ab", "got one str")],
)
def test_what_are_no_references(references: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score_generations(SOURCES, references, [TEXTS])  # type: ignore[arg-type]


def test_the_target_is_the_first_reference() -> None:
    assert Row("a", "b", 1).references == ("b",)
    assert Row("a", "b", 1, ("c", "d")).references == ("b", "c", "d")
    assert Row("a", "b", 1, ("c", "b", "b")).references == ("b", "c", "b")


@pytest.mark.parametrize("joint_truncation", [False, True])
def test_a_model_is_scored_against_refs_and_its_files_hold_them(
    tmp_path: Path, joint_truncation: bool
) -> None:
    rows = [Row("One Two three", "four", 1, ("FIVE", "one two three")), Row("a b", "c", 2)]
    result = evaluate_model(
        EchoModel(),
        rows=rows,
        bootstrap=0,
        generations_dir=tmp_path,
        joint_truncation=joint_truncation,
    )
    assert "nrefs:var" in result["sacrebleu_signature"]
    if not joint_truncation:
        assert result["exact_match"] == 0.5
    (file,) = tmp_path.iterdir()
    assert len(read_generations([file]).refs[0]) == 3
    again = evaluate_generations([file], bootstrap=0)
    for key in result.keys() - {"run"}:
        assert again[key] == result[key], key


def test_references_of_generation_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "seed0.jsonl"
    write_generations(path, ["a"], [["b", "c"]], ["d"])
    assert json.loads(path.read_text())["refs"] == ["b", "c"]
    row = {"source": "a", "reference": "b", "recover": "c"}
    for refs, reason in ((["x", None], r"'refs\[1\]'.*it is null"), ("x", "expected a list")):
        path.write_text(json.dumps({**row, "refs": refs}))
        with pytest.raises(DataError, match=reason):
            read_generations([path])


def test_real_rows_with_eight_references(data_dir: Path) -> None:
    path = data_dir / "turkcorpus" / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    rows = list(read_rows(path))
    assert {len(row.references) for row in rows} == {8}
    sources, references = [row.src for row in rows], [row.references for row in rows]
    copies = score_generations(sources, references, [sources], bootstrap=0)
    single = score_generations(sources, [row["trg"] for row in raw], [sources], bootstrap=0)
    assert "nrefs:8|" in copies["sacrebleu_signature"]
    assert copies["sacrebleu"] > single["sacrebleu"] + 10
