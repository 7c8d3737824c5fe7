"""Places of the scaling plots, and candidates with the choice of one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_timed import TINY

from benchmarks.generate import cases as generate_cases
from benchmarks.generate.candidates import candidate_calls, complaint, summed_bleu
from benchmarks.generate.cases import POINTS, threads_up_to
from benchmarks.generate.ours import Own
from benchmarks.generate.peers import Peer

CPU = torch.device("cpu")


def test_scaling_points():
    found = {
        axis: [p for p in POINTS["cpu"] if p.axis == axis] for axis in ("vocabulary", "candidates")
    }
    assert [p.value for p in found["vocabulary"]] == [2_000, 8_000, 30_522, 120_000]
    for point in found["vocabulary"]:
        assert (point.case.config.vocab_size, point.case.batch) == (point.value, 1)
    assert generate_cases.tokenizer(120_000).vocab_size == 120_000
    assert [p.value for p in found["candidates"]] == [1, 2, 4, 8, 16]
    assert all(p.case.batch == p.value for p in found["candidates"])
    assert str(found["candidates"][2]) == "compact, candidates 4"
    assert {p.axis for p in POINTS["cpu"]} - {p.axis for p in POINTS["cuda"]} == {"threads"}
    assert [threads_up_to(cores) for cores in (1, 2, 6)] == [[1], [1, 2], [1, 2, 4, 6]]


def test_candidates_are_those_of_a_plain_call_and_the_chosen_one_agrees_most():
    model = generate_cases.model(TINY, CPU)
    own = Own(model, "eager", "fp32")
    ours, plain = candidate_calls(own, Peer("PyTorch fp32", lambda: model.denoiser.lm), 3)
    answer = ours()
    assert len(answer) == 1
    assert "compare keep new small old" in answer[0]
    assert "compare keep new small old" in plain()
    found = own.generator.generate(
        model.texts(1), num_candidates=3, select="mbr", on_overflow="truncate", return_dict=True
    )
    candidates = found.candidates[0]
    assert complaint(own, found, candidates) == ""
    assert "33%" in complaint(own, found, [candidates[0], "x", "y"])
    assert complaint(own, found, candidates[:2]) == "3 candidates came"
    assert "none of" in complaint(own, replace(found, texts=["x"]), candidates)
    three = ["a b c d e", "a b c d f", "u v w x y"]
    odd = replace(found, candidates=[three], texts=[three[2]])
    assert "summed BLEU" in complaint(own, odd, three)


def test_summed_bleu_prefers_what_the_others_say():
    scores = summed_bleu(["a b c d e", "a b c d f", "u v w x y"])
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] > scores[2] + 10
    assert summed_bleu(["alone"]) == [0]
