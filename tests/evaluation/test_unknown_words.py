"""[UNK] is no word: it matches nothing, in no score and nowhere that scores are made."""

from __future__ import annotations

from typing import Any

import pytest

from dlmone_fast.comparison.measure import Measuring
from dlmone_fast.comparison.quality import TEXT
from dlmone_fast.data.rows import Row
from dlmone_fast.evaluation.bleu import pairwise_bleu, profile_tokens, sentence_bleu
from dlmone_fast.evaluation.corpus_bleu import corpus_bleu_of_sums, corpus_bleu_statistics
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.protocol import CandidateBatch
from dlmone_fast.evaluation.report import VOCABULARY_ROW, format_report
from dlmone_fast.evaluation.rouge import rouge_l
from dlmone_fast.evaluation.run import evaluate_model
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer

UNKNOWN = "[UNK] [UNK] [UNK] [UNK] [UNK]"
MATCHES = ("bleu", "rouge_l", "source_bleu", "exact_copy", "exact_match", "sacrebleu", "ibleu")


def test_texts_of_unknown_words_match_nothing() -> None:
    scores = score_generations([UNKNOWN], [UNKNOWN], [[UNKNOWN], [UNKNOWN]], bootstrap=10)
    assert {metric: scores[metric] for metric in MATCHES} == dict.fromkeys(MATCHES, 0.0)
    assert scores["self_bleu"] == 0.0
    assert scores["unknown"] == 1.0
    assert scores["length_ratio"] == 1.0
    # Within one text it is one word, said again and again.
    assert scores["dist_1"] == pytest.approx(1 / 5)
    assert scores["repeat"] == 1.0


def test_known_words_beside_it_score_as_before() -> None:
    pair = "a b c [UNK]", "a b c [UNK]"
    assert sentence_bleu(*pair) == sentence_bleu("a b c x", "a b c y")
    assert rouge_l(*pair) == rouge_l("a b c x", "a b c y") == pytest.approx(3 / 4)
    statistics = [
        corpus_bleu_statistics([text], [[reference]])
        for text, reference in (pair, ("a b c x", "a b c y"))
    ]
    assert (statistics[0] == statistics[1]).all()
    assert corpus_bleu_of_sums(corpus_bleu_statistics([UNKNOWN], [[UNKNOWN]])) == [0.0]
    # Decoding joins punctuation to it.
    assert sentence_bleu("what is [UNK]?", "what is [UNK]?") == sentence_bleu(
        "what is x", "what is y"
    )
    assert rouge_l("[UNK]? [UNK]'s", "[UNK]? [UNK]'s") == rouge_l("x y s", "v w s")


def test_unknown_words_agree_with_no_candidate() -> None:
    candidates = ["[UNK] [UNK]", "[UNK] [UNK]", "the cat sat", "the cat sits"]
    assert select_mbr(candidates) == 2
    matrix = pairwise_bleu([profile_tokens(text.split()) for text in candidates[:2]])
    assert matrix == [[0.0, 0.0], [0.0, 0.0]]


class Reader:
    """A model that returns its source as its vocabulary gives it back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def generate_candidates(self, texts: list[str], **call: Any) -> CandidateBatch:
        written = [[self.through_vocabulary(text)] * call["num_candidates"] for text in texts]
        return CandidateBatch(written, [[[]]] * len(texts), [False] * len(texts), 1.0)

    def normalize_text(self, text: str) -> str:
        return self.tokenizer.respell(text)

    def through_vocabulary(self, text: str) -> str:
        return self.tokenizer.decode_clean(self.tokenizer.encode([text])[0])

    encode_jointly = decode_text = None


ROWS = [
    Row("Zyx wvu tsr qpo nml", "Zyx wvu tsr qpo nml", 1),
    Row("the cat sat on the mat.", "La forêt, c'est l'été.", 2),
]


def test_references_keep_words_and_accents_that_the_vocabulary_lacks() -> None:
    words = ["the", "cat", "sat", "on", "mat", ".", ",", "'", "la", "foret", "c", "est", "l", "ete"]
    model = Reader(Tokenizer([*SPECIAL_TOKENS, *words]))
    result = evaluate_model(model, rows=ROWS, bootstrap=0)  # type: ignore[arg-type]
    # The first row is written as [UNK] throughout, and is no copy of its source.
    assert result["exact_copy"] == 0.5
    assert result["unknown"] == pytest.approx(5 / 11)
    assert result["baselines"]["reference"]["bleu"] == pytest.approx(1.0)
    written = result["baselines"]["vocabulary"]
    assert written["exact_match"] == 0.0
    assert written["unknown"] == pytest.approx(5 / 9)
    report = format_report(result, name="reader")
    assert VOCABULARY_ROW in report
    assert "[UNK]" in report


def test_a_vocabulary_that_knows_all_words_changes_nothing() -> None:
    tokenizer = Tokenizer.learn([row.src for row in ROWS] + [row.trg for row in ROWS], 300)
    model = Reader(tokenizer)
    for row in ROWS:
        assert tokenizer.respell(row.trg) == model.through_vocabulary(row.trg)
    result = evaluate_model(model, rows=ROWS, bootstrap=0)  # type: ignore[arg-type]
    assert result["baselines"].keys() == {"copy", "reference"}
    assert (result["unknown"], result["exact_copy"]) == (0.0, 1.0)


def test_the_spelling_of_a_text_is_the_decoder_s() -> None:
    texts = ["It's 5,000 — isn't  it?!", "[UNK] [SEP] ##ing", "a . b ' s", "中文, ok\x00 \ufeff"]
    for lowercase in (True, False):
        tokenizer = Tokenizer.learn(texts, 300, lowercase=lowercase)
        for text in texts:
            assert tokenizer.respell(text) == tokenizer.decode_clean(tokenizer.encode([text])[0])
    assert "[UNK]" not in tokenizer.respell("[UNK]")


def test_the_final_table_counts_them_and_matches_none() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "q"])
    measuring = Measuring(ROWS, TEXT, tokenizer.respell, seed=0, batch_size=1, bootstrap=0)
    scores = measuring.score_texts([[UNKNOWN], [UNKNOWN]])
    assert [scores[name] for name in ("bleu", "exact_copy", "rouge_l")] == [0.0, 0.0, 0.0]
    assert scores["unknown"] == 1.0
    assert "[UNK]" in [metric.title for metric in TEXT.metrics]
