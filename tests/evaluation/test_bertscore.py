from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dlmone_fast.errors import BackendUnavailableError, ModelFileError, UsageError
from dlmone_fast.evaluation.bertscore import bertscore_f1, greedy_matching_f1
from dlmone_fast.evaluation.scores import score_generations

torch = pytest.importorskip("torch", reason="torch is not installed")

HYPOTHESES = ["the cat sat on the mat", "a mat", "", "cat"]
REFERENCES = ["the mat", "a cat sat on a mat", "cat", "the dog"]


def test_greedy_matching_hand_computed() -> None:
    # Two words against one: best cosines 1 and 0.6, then 1; specials may be matched, not counted.
    hypothesis = torch.tensor([[[0.0, 9.0], [2.0, 0.0], [0.6, 0.8], [0.0, 0.0]]])
    reference = torch.tensor([[[0.0, -1.0], [5.0, 0.0]]])
    f1 = greedy_matching_f1(
        hypothesis,
        torch.tensor([[True, True, True, False]]),
        torch.tensor([[False, True, True, False]]),
        reference,
        torch.tensor([[True, True]]),
        torch.tensor([[False, True]]),
    )
    precision, recall = 0.8, 1.0
    assert f1.item() == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_name_is_not_a_folder() -> None:
    with pytest.raises(ModelFileError, match=r"config\.json"):
        score_generations(["a"], ["b"], [["c"]], bertscore_model="bert-base-uncased")


def test_without_its_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailableError, match=r"dlmone_fast\[eval\]"):
        bertscore_f1(["a"], ["b"], str(tmp_path))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "sat", "on", "mat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_batches_do_not_mix_pairs(model_dir: str) -> None:
    together = bertscore_f1(HYPOTHESES, REFERENCES, model_dir)
    assert together[2] == 0.0
    assert (together[[0, 1, 3]] > 0).all()
    for index, pair in enumerate(zip(HYPOTHESES, REFERENCES, strict=True)):
        alone = bertscore_f1([pair[0]], [pair[1]], model_dir, batch_size=1)
        assert together[index] == pytest.approx(alone[0], abs=1e-5)
    same = bertscore_f1(HYPOTHESES[:2], HYPOTHESES[:2], model_dir)
    assert same == pytest.approx([1.0, 1.0], abs=1e-5)


def test_layer_is_bounded(model_dir: str) -> None:
    last = bertscore_f1(HYPOTHESES, REFERENCES, model_dir, layer=2)
    assert last == pytest.approx(bertscore_f1(HYPOTHESES, REFERENCES, model_dir))
    assert last != pytest.approx(bertscore_f1(HYPOTHESES, REFERENCES, model_dir, layer=0))
    with pytest.raises(UsageError, match="bertscore_layer: expected 0 to 2"):
        bertscore_f1(HYPOTHESES, REFERENCES, model_dir, layer=3)


def test_scores_carry_it(model_dir: str) -> None:
    scores = score_generations(
        REFERENCES, REFERENCES, [HYPOTHESES], bootstrap=20, bertscore_model=model_dir
    )
    mean = bertscore_f1(HYPOTHESES, REFERENCES, model_dir).mean()
    assert scores["bertscore"] == pytest.approx(mean)
    low, high = scores["intervals"]["bertscore"]
    assert low <= mean <= high
