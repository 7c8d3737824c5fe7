from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from resealing import edit_json, edit_tensors
from tiny_autoregressive import LETTERS, SIZES, words

from dlmone_fast.autoregressive import Autoregressive, load_autoregressive
from dlmone_fast.autoregressive.decode import Marks, Sampling, decode_beams, decode_one_by_one
from dlmone_fast.autoregressive.folder import read_model, save_model
from dlmone_fast.autoregressive.generation import Method
from dlmone_fast.autoregressive.model import EncoderDecoder
from dlmone_fast.autoregressive.vocabulary import Symbols
from dlmone_fast.errors import ModelFileError, PromptError, UsageError

VOCABULARY = Symbols(LETTERS, [letter * 2 for letter in LETTERS[:3]])
CONFIG = dataclasses.replace(
    SIZES,
    source_vocab=VOCABULARY.source_size,
    target_vocab=VOCABULARY.target_size,
    decoder_layers=2,
)
MARKS = Marks(VOCABULARY.start_id, VOCABULARY.end_id, VOCABULARY.never)
SOURCES = words(24)


def network(norm: str = "pre", seed: int = 0) -> EncoderDecoder:
    """Random weights, wide enough that texts differ and end."""
    model = EncoderDecoder(dataclasses.replace(CONFIG, norm=norm), seed).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(2.5)
    return model.requires_grad_(False)


@pytest.fixture
def use() -> Autoregressive:
    return Autoregressive(network(), VOCABULARY, "fp32")


def log_probability(model: EncoderDecoder, source: str, ids: list[int], ended: bool) -> float:
    """Of a text, in one pass without a cache."""
    read = torch.tensor([VOCABULARY.sources([source])[0]])
    # The last token of a text that was cut is never read.
    target = torch.tensor([[MARKS.start_id, *(ids if ended else ids[:-1])]])
    logits = model.logits(model(read, None, target))[0]
    logits[:, list(MARKS.never)] = -torch.inf
    wanted = [*ids, MARKS.end_id] if ended else ids
    log_p = logits.log_softmax(-1)
    return float(sum(log_p[i, token] for i, token in enumerate(wanted)))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_greedy_takes_the_best_token_of_a_pass_without_a_cache(norm: str):
    model = network(norm)
    for source in SOURCES[:6]:
        read = torch.tensor([VOCABULARY.sources([source])[0]])
        (found,) = decode_one_by_one(model, read, None, MARKS, 12)
        ids: list[int] = []
        for _ in range(12):
            logits = model.logits(model(read, None, torch.tensor([[MARKS.start_id, *ids]])))[0, -1]
            logits[list(MARKS.never)] = -torch.inf
            token = int(logits.argmax())
            if token == MARKS.end_id:
                break
            ids.append(token)
        assert found.ids == ids
        assert found.score == pytest.approx(
            log_probability(model, source, ids, found.ended), abs=1e-4
        )


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_a_text_does_not_depend_on_the_rows_beside_it(use: Autoregressive, method: str):
    seeds = list(range(100, 100 + len(SOURCES)))
    whole = use.generate(SOURCES, method=method, seeds=seeds)
    assert len(set(whole)) >= 3
    for row in (0, 5, 17):
        assert use.generate(SOURCES[row], method=method, seeds=[seeds[row]]) == whole[row]
    assert use.generate(SOURCES, method=method, seeds=seeds, batch_size=5) == whole
    assert use.generate(SOURCES[::-1], method=method, seeds=seeds[::-1]) == whole[::-1]


def test_draws_follow_the_models_probabilities():
    model = network()
    read = torch.tensor([VOCABULARY.sources([SOURCES[0]])[0]])
    logits = model.logits(model(read, None, torch.tensor([[MARKS.start_id]])))[0, 0]
    logits[list(MARKS.never)] = -torch.inf
    expected = (logits / 2).softmax(-1)
    count = 3000
    texts = decode_one_by_one(
        model, read.expand(count, -1), None, MARKS, 1, Sampling(temperature=2.0),
        list(range(count)), [0] * count,
    )  # fmt: skip
    first = torch.tensor([text.ids[0] if text.ids else MARKS.end_id for text in texts])
    found = torch.bincount(first, minlength=len(expected)) / count
    assert torch.allclose(found, expected, atol=0.03)


def test_top_p_and_top_k_keep_the_likely(use: Autoregressive):
    greedy = use.generate(SOURCES)
    assert use.generate(SOURCES, method="sample", top_k=1) == greedy
    assert use.generate(SOURCES, method="sample", top_p=1e-6) == greedy
    assert use.generate(SOURCES, method="sample", temperature=3.0) != greedy


def test_candidates_of_a_source_are_different_draws(use: Autoregressive):
    several = Method("sample", num_candidates=8, temperature=2.0)
    result = use.generate_candidates(SOURCES[:2], several, seed=3)
    assert [len(row) for row in result.texts] == [8, 8]
    assert len(set(result.texts[0])) > 2
    assert use.generate_candidates(SOURCES[:2], several, seed=3) == result
    assert use.generate_candidates(SOURCES[:2], several, seed=4) != result


def test_a_wide_beam_finds_the_best_text_of_all():
    model = network()
    symbols = range(3, VOCABULARY.target_size)
    for source in SOURCES[:3]:
        read = torch.tensor([VOCABULARY.sources([source])[0]])
        texts = [
            list(ids) for length in range(4) for ids in itertools.product(symbols, repeat=length)
        ]
        ended = [(log_probability(model, source, ids, True) / (len(ids) + 1), ids) for ids in texts]
        ((best, *_),) = decode_beams(model, read, None, MARKS, 4, beams=81)
        score, ids = max(ended)
        assert best.score / (len(best.ids) + 1) == pytest.approx(score, abs=1e-4)
        assert best.ids == ids


def test_n_best_of_a_beam_are_different_and_sorted(use: Autoregressive):
    result = use.generate_candidates(SOURCES[:4], Method("beam", num_candidates=3, beams=4))
    for texts in result.texts:
        assert len(set(texts)) == len(texts) == 3


def test_bf16_answers_nearly_alike():
    low = Autoregressive(network(), VOCABULARY, "bf16").generate(SOURCES)
    full = Autoregressive(network(), VOCABULARY, "fp32").generate(SOURCES)
    assert sum(a == b for a, b in zip(low, full, strict=True)) > len(SOURCES) / 2


def test_bad_arguments_are_named(use: Autoregressive):
    with pytest.raises(PromptError, match=r"texts\[0\].*'!'"):
        use.generate("a!")
    with pytest.raises(PromptError, match=r"texts\[0\]: 21 tokens, the model reads 12"):
        use.generate("ab" * 10)
    assert use.generate("ab" * 10, on_overflow="truncate") == use.generate("ab" * 5 + "a")
    for arguments, name in (
        ({"method": "best"}, "method"),
        ({"temperature": 0.0, "method": "sample"}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=name):
            use.generate(["ab"], **arguments)
    with pytest.raises(UsageError, match="num_candidates"):
        use.generate_candidates(["ab"], Method("beam", num_candidates=9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = dict(network().named_parameters())
    return save_model(tmp_path / "model", CONFIG, tensors, VOCABULARY, {"seed": 0})


def test_a_model_folder_gives_the_model_back(folder: Path, use: Autoregressive):
    assert load_autoregressive(folder, "fp32").generate(SOURCES) == use.generate(SOURCES)
    assert read_model(folder).source == {"seed": 0}


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ModelFileError, match=r"model\.safetensors.*sha256"):
        load_autoregressive(folder)
    weights.write_bytes(whole)
    edit_tensors(weights, lambda tensors: tensors.pop("bias"))
    with pytest.raises(ModelFileError, match="1 tensor missing: bias"):
        load_autoregressive(folder)
    with pytest.raises(ModelFileError, match="no such folder"):
        load_autoregressive(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format must be"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(tokens="bytes"), "tokens must be"),
        (lambda c: c["model"].update(width=33), "model.heads must divide width"),
        (lambda c: c["model"].pop("ffn"), "model must have the keys"),
        (lambda c: c["model"].update(target_vocab=9), "were mixed up"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, change: object, message: str):
    edit_json(folder / "config.json", change)  # type: ignore[arg-type]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ModelFileError, match=message):
        load_autoregressive(folder)
