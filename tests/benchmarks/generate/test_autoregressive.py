"""Token by token: the competitors of one step write what a pass without a cache says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_timed import TINY
from torch import Tensor

from benchmarks.generate import alternatives as autoregressive_peers
from benchmarks.generate import cases as generate_cases
from benchmarks.generate import peers as generate_peers
from benchmarks.generate import targets as names
from benchmarks.generate.alternatives import (
    ALTERNATIVES,
    Alternative,
    HuggingFace,
    Setting,
    TextCall,
    comparable,
    line_up,
)
from benchmarks.generate.autoregressive import (
    NEW_TOKENS,
    POSITIONS,
    CachedGreedy,
    Decoder,
    complaint,
    padded,
    same_choices,
)
from benchmarks.generate.cases import Model
from benchmarks.generate.peers import PEERS
from benchmarks.harness.records import Row

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Weights so large that answers depend on their prompts and hardly repeat."""
    found = Decoder(TINY)
    for name, parameter in found.named_parameters():
        if parameter.dim() > 1 and "embedding" not in name:
            parameter.mul_(8)
    return found


def encoded(tiny: Model, count: int = 3) -> list[list[int]]:
    return tiny.tokenizer.encode(generate_cases.prompts(count))


def uncached(decoder: Decoder, prompt: Sequence[int], end_id: int) -> list[int]:
    """Greedy by hand: the whole text anew for each token, one prompt, no padding."""
    ids = torch.tensor([list(prompt)])
    for _ in range(NEW_TOKENS):
        size = ids.shape[1]
        visible = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
        scores = decoder.logits(decoder(ids, torch.arange(size)[None], visible)[:, -1])
        scores[:, end_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def test_with_a_cache_a_batch_of_prompts_is_answered_as_each_without(tiny: Model, decoder: Decoder):
    prompts, end = encoded(tiny), tiny.tokenizer.sep_id
    assert len({len(ids) for ids in prompts}) > 1
    generation = CachedGreedy(decoder, tiny.tokenizer)
    answers = generation(prompts)
    assert answers == [uncached(decoder, ids, end) for ids in prompts]
    assert len({tuple(ids) for ids in answers}) == len(prompts)
    assert all(len(set(ids)) > 5 and end not in ids for ids in answers)
    # The cache of the call before is used again, or another one for another size.
    assert generation(prompts) == answers
    assert generation(prompts[:1]) == answers[:1]
    assert generation(prompts) == answers


def test_each_choice_is_the_best_of_a_pass_without_a_cache(tiny: Model, decoder: Decoder):
    prompts = encoded(tiny)
    generation = CachedGreedy(decoder, tiny.tokenizer)
    answers = generation(prompts)
    exact = generation.exact(prompts, answers)
    assert exact.shape == (3, NEW_TOKENS, 200)
    assert complaint(answers, exact, 1e-3) is None
    assert same_choices(answers, exact) == 1
    wrong = [list(ids) for ids in answers]
    wrong[1][7] = (wrong[1][7] + 1) % 200
    after = generation.exact(prompts, wrong)
    assert "below the best" in str(complaint(wrong, after, 1e-3))
    assert same_choices(wrong, after) < 1
    assert "not 20 tokens" in str(complaint([ids[:-1] for ids in answers], exact, 1.0))


def test_a_cache_that_is_wrong_is_seen(tiny: Model, decoder: Decoder):
    class Forgetful(CachedGreedy):
        def next_tokens(
            self, ids: Tensor, slots: Tensor, places: Tensor, visible: Tensor, *rest: object
        ) -> Tensor:
            # Tokens do not see their own prompt once it has been read.
            if len(slots) == 1:
                visible = visible & torch.eye(visible.shape[-1], dtype=torch.bool)
            return super().next_tokens(ids, slots, places, visible, *rest)  # type: ignore[arg-type]

    prompts, generation = encoded(tiny), Forgetful(decoder, tiny.tokenizer)
    answers = generation(prompts)
    assert complaint(answers, generation.exact(prompts, answers), 1.0) is not None


def test_bf16_is_judged_by_the_same_weights_in_fp32(tiny: Model):
    exact = Decoder(TINY)
    generation = CachedGreedy(Decoder(TINY).bfloat16(), tiny.tokenizer, exact)
    answers = generation(encoded(tiny))
    scores = generation.exact(encoded(tiny), answers)
    assert scores.dtype == torch.float32
    assert complaint(answers, scores, 0.5) is None


def test_prompts_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="expected at most 108 tokens, got 109"):
        padded([[1] * (POSITIONS - NEW_TOKENS + 1)], 0, CPU)


def test_gpt2_with_our_decoders_weights_gives_its_answers(tiny: Model, decoder: Decoder):
    pytest.importorskip("transformers")
    generation, prompts = HuggingFace(tiny), encoded(tiny)
    cached = generation(prompts)
    assert cached == generation(prompts, use_cache=False)
    assert complaint(cached, generation.exact(prompts, cached), 1e-3) is None

    transformer = generation.network.transformer
    pairs = [
        (transformer.wte, decoder.embedding),
        (transformer.wpe, decoder.positions),
        (transformer.ln_f, decoder.norm),
    ]
    for theirs, ours in zip(transformer.h, decoder.blocks, strict=True):
        pairs += [
            (theirs.ln_1, ours.attention_norm), (theirs.ln_2, ours.ffn_norm),
            (theirs.attn.c_attn, ours.qkv), (theirs.attn.c_proj, ours.out),
            (theirs.mlp.c_fc, ours.up), (theirs.mlp.c_proj, ours.down),
        ]  # fmt: skip
    for target, source in pairs:
        turned = isinstance(source, torch.nn.Linear)
        target.weight.copy_(source.weight.T if turned else source.weight)
        if hasattr(source, "bias"):
            target.bias.copy_(source.bias)
    assert generation(prompts) == CachedGreedy(decoder, tiny.tokenizer)(prompts)


@pytest.mark.parametrize(("compute_type", "tolerance"), [("float32", 1e-3), ("int8", 1.0)])
def test_ctranslate2_computes_the_encoder_decoder(
    tiny: Model, tmp_path: Path, compute_type: str, tolerance: float
):
    pytest.importorskip("ctranslate2")
    from benchmarks.generate.ctranslate2_model import EncoderDecoder, Translator, export

    network = EncoderDecoder(replace(TINY, num_layers=4))
    folder = export(network, tiny.tokenizer, tmp_path)
    generation = Translator(network, tiny.tokenizer, folder, compute_type, CPU)
    prompts = encoded(tiny)
    answers = generation(prompts)
    assert answers == generation(prompts)
    assert [len(ids) for ids in answers] == [NEW_TOKENS] * 3
    exact = generation.exact(prompts, answers)
    assert complaint(answers, exact, tolerance) is None
    # Its log-probabilities have the end of the text among the choices, as ours have before it.
    found = generation.library.score_batch(generation.tokens(prompts), generation.tokens(answers))
    theirs = torch.tensor([result.log_probs[:NEW_TOKENS] for result in found])
    ours = exact.gather(-1, torch.tensor(answers)[..., None])[..., 0]
    # Up to the normaliser, which the end's own probability is part of.
    spread = (theirs - ours + exact.logsumexp(-1)).abs().max()
    assert float(spread) < (0.05 if compute_type == "float32" else 0.3)


def test_competitors_are_lined_up_checked_and_named(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(_: Setting) -> CachedGreedy:
        raise RuntimeError("no such device\nmore")

    def wrong(setting: Setting) -> CachedGreedy:
        return CachedGreedy(Decoder(TINY), setting.model.tokenizer, Decoder(TINY, seed=1))

    more = {"failing": Alternative(fails), "wrong": Alternative(wrong)}
    offered = {
        name: entry
        for name, entry in ALTERNATIVES["cpu"].items()
        if not entry.packages or "ctranslate2" in entry.packages
    }
    monkeypatch.setitem(ALTERNATIVES, "cpu", {**offered, **more})
    monkeypatch.setattr(autoregressive_peers, "why_absent", lambda *_: "")
    calls, fields = line_up(Setting(tiny, tmp_path), 2, full=False)
    assert list(fields) == [*offered, *more]
    assert fields["failing"]["note"] == "failed: RuntimeError: no such device"
    assert fields["wrong"]["note"].startswith("wrong, so not timed: a token's score is")
    assert fields["PyTorch decoder, KV cache fp32, compiled"]["note"] == (
        "absent: compiling takes a minute: timed with --full only"
    )
    first = fields["PyTorch decoder, KV cache fp32"]
    assert first["dtype"] == "float32"
    assert first["note"].endswith("M parameters; 100.0% of the tokens are fp32's choice")
    assert list(calls)[:2] == ["PyTorch decoder, KV cache fp32", "PyTorch decoder, KV cache bf16"]
    for name, call in calls.items():
        output = call()
        assert [len(ids) for ids in output.token_ids] == [NEW_TOKENS] * 2, name
        assert output.texts == [tiny.tokenizer.decode_clean(ids) for ids in output.token_ids]


def test_a_missing_package_is_named(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate_peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(generate_peers, "cpu_has_bf16", lambda: False)
    calls, fields = line_up(Setting(tiny, tmp_path), 1, full=False)
    assert list(calls) == ["PyTorch decoder, KV cache fp32"]
    notes = {name: known["note"] for name, known in fields.items()}
    assert notes["transformers GPT-2, KV cache fp32"] == "absent: transformers not installed"
    assert notes["CTranslate2 encoder-decoder int8"] == "absent: ctranslate2 not installed"
    assert notes["PyTorch decoder, KV cache bf16"] == "absent: no bf16 on this CPU"


def test_a_call_is_text_to_text(tiny: Model, decoder: Decoder):
    generation, texts = CachedGreedy(decoder, tiny.tokenizer), generate_cases.prompts(2)
    output = TextCall(tiny, generation)(texts)
    assert output.token_ids == generation(tiny.tokenizer.encode(texts))
    assert output.texts == [tiny.tokenizer.decode_clean(ids) for ids in output.token_ids]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peers_are_keyed_by_the_names_that_targets_use(device: str):
    known = {value for name, value in vars(names).items() if name.isupper()}
    assert set(PEERS[device]) <= known
    wanted = {target.peer for target in names.TARGETS if target.device == device}
    others = {name for name in wanted if name and not name.startswith("dlmone_fast")}
    assert {name.removesuffix(", network") for name in others} <= set(PEERS[device])


def test_our_work_is_not_reckoned_for_others():
    filled = {"gigabytes_per_second": 1.0, "teraflops": 1.0, "fraction_of_floor": 0.5,
              "floor_ms": 1.0, "peak_bytes": 7, "held_bytes": 3}  # fmt: skip
    other = Row("o", "c", "CTranslate2 encoder-decoder fp32", False, 2.0, 2.0, 5, **filled)
    ours = replace(other, implementation="dlmone_fast eager fp32", ours=True)
    assert comparable(ours, CPU) == ours
    on_cpu = comparable(other, CPU)
    assert (on_cpu.median_ms, on_cpu.fraction_of_floor, on_cpu.peak_bytes) == (2.0, None, 7)
    on_gpu = comparable(other, torch.device("cuda"))
    assert (on_gpu.teraflops, on_gpu.peak_bytes, on_gpu.held_bytes) == (None, None, None)
