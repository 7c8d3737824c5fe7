from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dlmone_fast.data.rows import Row
from dlmone_fast.errors import UsageError
from dlmone_fast.evaluation import run as evaluation
from dlmone_fast.evaluation.generations import read_generations
from dlmone_fast.evaluation.protocol import CandidateBatch
from dlmone_fast.evaluation.report import format_report
from dlmone_fast.evaluation.run import evaluate_generations, evaluate_model
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.runtime import options as runtime

ROWS = [
    Row("Is It Late?", "what TIME is it?", 1),
    Row("Who Sings", "who is the singer", 2),
    Row("Why Not", "why not", 3),
]


class EchoModel:
    """Candidate k is the lower-cased source with its last k words dropped."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate_candidates(
        self,
        texts: Sequence[str],
        *,
        num_candidates: int,
        steps: int | None,
        seeds: Sequence[int],
        batch_size: int,
        sampler: str | None,
        temperature: float | None,
        on_overflow: str,
        progress: bool | None,
        encoded: Sequence[Sequence[int]] | None = None,
        decode: str = "clean",
    ) -> CandidateBatch:
        self.calls.append(
            {
                "texts": texts,
                "seeds": seeds,
                "steps": steps,
                "on_overflow": on_overflow,
                "encoded": encoded,
                "decode": decode,
            }
        )
        outputs = [
            [" ".join(text.lower().split()[: -k or None]) for k in range(num_candidates)]
            for text in texts
        ]
        ids = [[[1]] * num_candidates for _ in texts]
        return CandidateBatch(outputs, ids, [len(text) > 10 for text in texts], 3.0)

    def normalize_text(self, text: str) -> str:
        return text.lower()

    def encode_jointly(self, source: str, target: str) -> tuple[list[int], list[int]]:
        return [1, len(source), 2], [1, len(target), 2]

    def decode_text(self, ids: Sequence[int]) -> str:
        return f"cut to {ids[1]}"


def test_sources_and_references_are_compared_as_the_tokenizer_writes_them() -> None:
    model = EchoModel()
    result = evaluate_model(model, rows=ROWS, num_candidates=2, mbr=True, steps=4, bootstrap=10)
    assert model.calls[0]["texts"] == [row.src for row in ROWS]
    assert model.calls[0]["on_overflow"] == "truncate"
    assert result["exact_copy"] == pytest.approx(0.5)
    assert result["mbr"] is not None
    assert result["baselines"]["copy"]["exact_copy"] == 1.0
    assert result["baselines"]["reference"]["rouge_l"] == 1.0
    run = result["run"]
    assert (run["rows"], run["num_candidates"], run["steps"], run["truncated"]) == (3, 2, 4, 1)
    assert run["seconds_per_text"] == pytest.approx(0.5)


def test_each_row_has_its_own_noise() -> None:
    model = EchoModel()
    evaluate_model(model, rows=ROWS, seed=5, bootstrap=0)
    assert model.calls[0]["seeds"] == row_seeds(5, 3)
    assert len({*row_seeds(5, 1000), *row_seeds(6, 1000)}) == 2000
    assert row_seeds(5, 3) == row_seeds(5, 1000)[:3]
    assert all(0 <= seed < 2**64 for seed in row_seeds(0, 100))


def test_exact_metrics_see_each_sources_candidates() -> None:
    def exact(sources: list[str], candidates: list[list[str]]) -> dict[str, Any]:
        return {"first": sources[0], "texts": candidates[1]}

    result = evaluate_model(EchoModel(), rows=ROWS, num_candidates=2, exact=exact, bootstrap=0)
    assert result["exact"] == {"first": "is it late?", "texts": ["who sings", "who"]}


def test_written_generations_give_the_same_scores(tmp_path: Path) -> None:
    result = evaluate_model(
        EchoModel(), rows=ROWS, num_candidates=2, generations_dir=tmp_path, bootstrap=10
    )
    files = sorted(tmp_path.iterdir())
    assert read_generations(files).candidates[0] == ["is it late?", "who sings", "why not"]
    again = evaluate_generations(files, bootstrap=10)
    for key in result.keys() - {"run"}:
        assert again[key] == result[key], key
    assert evaluate_generations(files, max_rows=1, bootstrap=0)["run"]["rows"] == 1


def test_rows_come_from_a_folder(tmp_path: Path) -> None:
    lines = ['{"src": "one two", "trg": "two one"}', '{"src": "three", "trg": "four"}']
    (tmp_path / "valid.jsonl").write_text("\n".join(lines) + "\n")
    result = evaluate_model(EchoModel(), tmp_path, split="valid", max_rows=1, bootstrap=0)
    assert result["run"]["rows"] == 1
    assert result["run"]["split"] == "valid"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": ROWS, "num_candidates": 0}, "num_candidates: expected 1 to"),
        ({"rows": ROWS, "num_candidates": 65}, "num_candidates: expected 1 to 64, got 65"),
        ({"rows": ROWS, "num_candidates": True}, "num_candidates: expected 1 to 64, got True"),
        ({"rows": ROWS, "batch_size": "8"}, "batch_size: expected 1 to 4096, got '8'"),
        ({"rows": ROWS, "batch_size": 0}, "batch_size: expected 1 to"),
        ({"rows": ROWS, "max_rows": -1}, "max_rows: expected 0 to"),
        ({"rows": ROWS, "seed": 2**64}, "seed: expected 0 to"),
        ({"rows": ROWS, "bootstrap": -1}, "bootstrap: expected 0"),
        ({"rows": []}, "expected at least 1 row"),
        ({}, "got both or neither"),
    ],
)
def test_arguments_are_bounded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_model(EchoModel(), **options)


def test_bounds_are_those_of_a_loaded_model() -> None:
    assert evaluation.MAX_CANDIDATES == runtime.MAX_CANDIDATES
    assert evaluation.MAX_BATCH_SIZE == runtime.MAX_BATCH_SIZE


def test_a_path_is_not_a_model() -> None:
    with pytest.raises(UsageError, match=r"dlmone_fast\.load\(path\)"):
        evaluate_model("some/folder", rows=ROWS)  # type: ignore[arg-type]


def test_joint_truncation_cuts_sources_and_references_together() -> None:
    model = EchoModel()
    evaluate_model(model, rows=ROWS, joint_truncation=True, bootstrap=0)
    assert model.calls[0]["encoded"] == [[1, len(row.src), 2] for row in ROWS]
    assert model.calls[0]["decode"] == "diffuseq"


def test_the_run_says_what_it_ran_on() -> None:
    model = EchoModel()
    assert not {"device", "precision", "backend"} & evaluate_model(model, rows=ROWS)["run"].keys()
    model.device, model.precision, model.backend = "cpu", "fp32", "eager"  # type: ignore[attr-defined]
    result = evaluate_model(model, rows=ROWS, bootstrap=0)
    run = result["run"]
    assert (run["device"], run["precision"], run["backend"]) == ("cpu", "fp32", "eager")
    report = format_report(result, name="echo")
    assert "Generated on cpu in fp32 (eager) with the model's default steps: 3.00 s" in report
