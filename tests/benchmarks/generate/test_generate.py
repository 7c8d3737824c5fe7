"""Whole calls are compared with the same model, the same prompts and the same noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_timed import TINY
from torch import Tensor

from benchmarks.generate import cases as generate_cases
from benchmarks.generate import peers as generate_peers
from benchmarks.generate import targets as generate_targets
from benchmarks.generate.cases import CASES, POINTS, Case, Model, inputs
from benchmarks.generate.lineup import Lineup, agreement
from benchmarks.generate.ours import Own, owns, phases
from benchmarks.generate.peers import Network, Output, Peer, PlainCall, peers
from benchmarks.harness import targets
from benchmarks.harness.records import Row
from benchmarks.kernels import targets as kernel_targets
from benchmarks.kernels.peers import expression_argmin
from dlmone_fast.kernels.nearest_token import nearest_token_with_margin
from dlmone_fast.runtime import GenerationOutput

CPU = torch.device("cpu")


def plain(model: Model, network: Network | None = None) -> Peer:
    return Peer("PyTorch fp32", lambda: network or model.denoiser.lm)


def test_a_model_is_a_function_of_its_seed_and_makes_clear_choices(tiny: Model):
    again = generate_cases.model.__wrapped__(TINY, CPU)
    for name, tensor in tiny.denoiser.lm.state_dict().items():
        assert torch.equal(again.denoiser.lm.state_dict()[name], tensor), name
    given = inputs(tiny, 16)
    margins = nearest_token_with_margin(tiny.denoiser(given.x_t, given.t), tiny.vocabulary)[1]
    norm = tiny.vocabulary.table.square().sum(1).mean()
    # Prompts and noise that the last layer was not fitted to, too.
    assert float(margins[given.mask != 0].min()) > 0.1 * float(norm)


@pytest.mark.parametrize("size", [80, 8000, 30_522])
def test_prompts_are_made_of_whole_words(size: int):
    tokenizer = generate_cases.tokenizer(size)
    assert tokenizer.vocab_size == size
    texts = generate_cases.prompts(64)
    assert len(set(texts)) > 40
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.unk_id not in ids
        assert len(ids) == len(text.replace("?", " ?").split()) + 2
        assert 9 <= len(ids) <= 17


@pytest.mark.parametrize("batch", [1, 3])
def test_ours_and_a_plain_call_give_the_same_answers_on_the_same_noise(tiny: Model, batch: int):
    prompts, given = generate_cases.prompts(batch), inputs(tiny, batch)
    eager = Own(tiny, "eager", "fp32")
    ours = eager(prompts)
    theirs = PlainCall(tiny, plain(tiny))(prompts, given.noise)
    assert theirs == Output(ours.texts, ours.token_ids)
    assert all("compare keep new small old" in text for text in ours.texts)
    torch.testing.assert_close(
        eager.network(given.x_t, given.t), tiny.denoiser(given.x_t, given.t), rtol=0, atol=1e-5
    )


def test_a_plain_call_draws_its_own_noise(tiny: Model):
    seen: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append(x_t)
        assert time.tolist() == [tiny.settings.t_init / 2]
        return tiny.denoiser.lm(x_t, time)

    call = PlainCall(tiny, plain(tiny, network))
    for _ in range(2):
        call(generate_cases.prompts(1))
    source = inputs(tiny, 1).mask[0] == 0
    assert torch.equal(seen[0][0, source], seen[1][0, source])
    assert not torch.isclose(seen[0][0, ~source], seen[1][0, ~source]).all(1).any()
    assert float(seen[0][0, ~source].std()) == pytest.approx(0.93, abs=0.1)


@pytest.mark.parametrize(
    "name", ["ONNX Runtime fp32", "ONNX Runtime dynamic int8", "OpenVINO fp32"]
)
def test_exported_networks_are_the_same_network(tiny: Model, tmp_path: Path, name: str):
    peer = next(peer for peer in peers(tiny, tmp_path) if peer.name == name)
    if peer.absent:
        assert peer.absent.endswith("not installed")
        pytest.skip(peer.absent)
    lineup = Lineup(tiny, 3)
    assert lineup.add(peer)
    assert lineup.fields[name]["agreement"] > 0.99
    error = lineup.fields[f"{name}, network"]["error"]
    assert 1e-4 < error < 0.1 if name.endswith("int8") else error < 1e-5


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tiny: Model, tmp_path: Path):
    def find(name: str) -> object | None:
        return None if name.startswith("onnx") else object()

    monkeypatch.setattr(generate_peers.importlib.util, "find_spec", find)
    absent = {peer.name: peer.absent for peer in peers(tiny, tmp_path)}
    assert absent["ONNX Runtime fp32"] == "onnx and onnxruntime not installed"
    assert absent["OpenVINO fp32"] == "onnx not installed"
    assert absent["PyTorch fp32"] == ""
    lineup = Lineup(tiny, 1)
    for peer in peers(tiny, tmp_path):
        if peer.absent:
            assert not lineup.add(peer)
    assert lineup.fields["OpenVINO fp32"]["note"] == "absent: onnx not installed"
    assert not lineup.calls


def test_a_peer_in_bf16_rounds_in_bf16_and_may_be_left_out_of_a_batch(tiny: Model):
    dtypes: list[torch.dtype] = []

    def rounding(x: Tensor, table: Tensor, norms: Tensor) -> Tensor:
        dtypes.extend((x.dtype, table.dtype, norms.dtype))
        return expression_argmin(x, table, norms)

    peer = Peer(
        "PyTorch bf16", lambda: tiny.denoiser.lm, rounding=rounding, dtype=torch.bfloat16,
        batches=(1, 4),
    )  # fmt: skip
    lineup = Lineup(tiny, 4)
    assert lineup.add(peer)
    assert lineup.fields["PyTorch bf16"]["agreement"] > 0.95
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert not (other := Lineup(tiny, 2)).add(peer)
    assert other.fields["PyTorch bf16"]["note"] == "absent: timed at batch 1 and 4 only"


def test_a_wrong_or_failing_peer_is_reported_and_not_timed(tiny: Model):
    def fails(x_t: Tensor, time: Tensor) -> Tensor:
        raise RuntimeError("no such device\nmore")

    lineup = Lineup(tiny, 2)
    for name, network in (("other fp32", lambda x_t, time: -x_t), ("failing", fails)):
        assert not lineup.add(replace(plain(tiny, network), name=name))
    assert re.match(r"wrong, so not timed: \d+ ids differ", lineup.fields["other fp32"]["note"])
    assert lineup.fields["failing"]["note"] == "failed: RuntimeError: no such device"
    assert not lineup.calls


def test_a_backend_of_ours_that_cannot_run_is_named_and_a_wrong_one_fails(tiny: Model):
    lineup = Lineup(tiny, 1)
    assert not lineup.add(Own(tiny, "eager", "int8"))
    assert lineup.fields["dlmone_fast eager int8"]["note"] == "absent: it has no int8"

    class Wrong(Own):
        def __call__(self, batch: Sequence[str]) -> GenerationOutput:
            answer = super().__call__(batch)
            return replace(answer, token_ids=[[0] * len(ids) for ids in answer.token_ids])

    with pytest.raises(pytest.fail.Exception, match=r"eager fp32: \d+ ids differ from fp32's"):
        lineup.add(Wrong(tiny, "eager", "fp32"))


def test_calls_networks_and_phases_are_lined_up(tiny: Model):
    lineup = Lineup(tiny, 2)
    assert lineup.add(Own(tiny, "eager", "fp32"))
    assert lineup.add(plain(tiny))
    lineup.add_phases()
    ours, theirs = "dlmone_fast eager fp32", "PyTorch fp32"
    parts = ("tokenising", "noise and embedding", "rounding", "detokenising")
    assert list(lineup.calls) == [
        ours, theirs, f"{ours}, network", f"{theirs}, network",
        *(f"dlmone_fast, {part}" for part in parts),
    ]  # fmt: skip
    assert lineup.fields[ours]["agreement"] == 1
    assert [lineup.fields[f"dlmone_fast, {part}"]["part"] for part in parts] == list(parts)


def test_phases_are_what_a_call_does(tiny: Model):
    answer, given = Own(tiny, "eager", "fp32")(generate_cases.prompts(3)), inputs(tiny, 3)
    found = phases(tiny, given, tiny.denoiser(given.x_t, given.t), answer.token_ids)
    results: dict[str, Callable[[], object]] = {name: call() for name, call in found.items()}
    assert torch.equal(results["tokenising"][0], given.ids)
    assert torch.equal(results["noise and embedding"], given.x_t)
    assert results["rounding"][0].tolist() == [i for row in answer.token_ids for i in row]
    assert results["detokenising"] == answer.texts


def test_agreement_counts_to_the_end_of_the_text():
    assert agreement([[5, 6, 3, 0]], [[5, 6, 3, 9]], end=3) == 1
    assert agreement([[5, 7, 3, 0], [4, 4]], [[5, 6, 3, 0], [4, 5]], end=3) == pytest.approx(3 / 5)


def test_targets_name_cases_and_implementations_that_are_timed(tiny: Model, tmp_path: Path):
    cases = {device: [str(case) for case in found] for device, found in CASES.items()}
    for target in generate_targets.TARGETS:
        assert target.case in cases[target.device], target
    batches = [point for point in POINTS["cpu"] if point.axis == "batch"]
    assert str(batches[-1]) == "compact, batch 64"
    lengths = [point for point in POINTS["cpu"] if point.axis == "length"]
    assert [point.value for point in lengths] == [16, 64, 128, 256, 512]
    known = {c.name for c in (*owns(tiny), *peers(tiny, tmp_path))}
    for target in generate_targets.TARGETS:
        if target.device == "cpu":
            used = {target.own, target.peer} - {"", targets.FASTEST}
            assert {name.removesuffix(", network") for name in used} <= known


def rows() -> list[Row]:
    def row(case: str, name: str, ms: float | None, **more: object) -> Row:
        own = name.startswith("dlmone_fast")
        return Row("generate", case, name, own, ms, ms, 5, **more)  # type: ignore[arg-type]

    one, small = "BERT-base, batch 1", "compact, batch 1"
    return [
        row(one, "dlmone_fast openvino fp32", 100.0),
        row(one, "dlmone_fast openvino int8", 20.0),
        row(one, "dlmone_fast openvino bf16", None, note="absent: no bf16 on this CPU"),
        row(one, "PyTorch fp32", 150.0),
        row(one, "OpenVINO fp32, network", 95.0, part="network"),
        row(one, "dlmone_fast openvino int8, network", 15.0, part="network"),
        row(small, "dlmone_fast openvino fp32", 5.0),
        row(small, "dlmone_fast openvino int8", 3.0),
        row(small, "dlmone_fast, rounding", 0.1, part="rounding"),
    ]


def test_targets_are_judged_by_the_rows_they_name():
    judged = targets.judge(rows(), "cpu", 1e9, generate_targets.TARGETS)
    assert [(t["outcome"], t["value"]) for t in judged] == [
        ("not measured: no bf16 on this CPU", None),
        ("met", pytest.approx(20 / 150)),
        ("met", pytest.approx(100 / 95)),
        ("not met", pytest.approx(20 / 15)),
        ("met", 3.0),
    ]
    assert targets.judge(rows(), "cpu", 1e9, kernel_targets.TARGETS) == []
    assert targets.judge([], "cpu", 1e9, generate_targets.TARGETS) == []


def test_gpu_targets_count_sequences_and_held_memory():
    most = "BERT-base, batch 512"
    found = [
        Row("generate", most, "dlmone_fast graph bf16", True, 20.0, peak_bytes=1, held_bytes=1000),
        Row("generate", most, "PyTorch fp32", False, 900.0, peak_bytes=4004),
    ]
    value = {
        target.measure: targets.measured(target, found, 1.0)
        for target in generate_targets.TARGETS
        if target.device == "cuda" and target.case == most and target.measure != "time"
    }
    assert value == {"sequences": 25_600.0, "memory": pytest.approx(0.25)}


def test_a_case_names_itself():
    assert str(Case("compact", TINY, 8)) == "compact, batch 8"
    assert generate_targets.whole("graph", "bf16") == "dlmone_fast graph bf16"
