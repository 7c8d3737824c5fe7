"""The aligned tokenizer: ids of words and their labels, what it refuses, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from words import pairs

from dlmone_fast.aligned_tokenizer import AlignedTokenizer, read_tokenizer
from dlmone_fast.errors import ModelFileError, PromptError, UsageError
from dlmone_fast.text_tokenizer import SPECIAL_TOKENS
from dlmone_fast.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> AlignedTokenizer:
    return AlignedTokenizer.learn(pairs(), output_case="upper")


def test_special_tokens_then_letters_then_labels(tokenizer: AlignedTokenizer) -> None:
    assert tokenizer.vocabulary[:5] == SPECIAL_TOKENS
    letters = tokenizer.vocabulary[5:15]
    assert "".join(letters) == "abehimostx"
    assert all(token[0] == token[-1] == "/" for token in tokenizer.vocabulary[15:])
    assert tokenizer.vocab_size == len(set(tokenizer.vocabulary))


def test_a_word_has_one_id_a_letter_whatever_its_case(tokenizer: AlignedTokenizer) -> None:
    first, second = tokenizer.encode(["shabo", "  ShaBO\n"])
    assert first == second
    assert (first[0], first[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert "".join(tokenizer.vocabulary[i] for i in first[1:-1]) == "shabo"
    assert tokenizer.decode_clean(first) == "shabo"


def test_a_target_has_as_many_labels_as_its_word_has_letters(tokenizer: AlignedTokenizer) -> None:
    sources, targets = (list(side) for side in zip(*pairs(), strict=True))
    labels = tokenizer.encode_targets(sources, targets)
    for source, target, ids in zip(sources, targets, labels, strict=True):
        assert ids is not None
        assert (len(ids), ids[0], ids[-1]) == (
            len(source) + 2, tokenizer.cls_id, tokenizer.sep_id,
        )  # fmt: skip
        assert tokenizer.decode_clean(ids) == target.upper()


def test_pairs_that_cannot_be_aligned_have_no_ids(tokenizer: AlignedTokenizer) -> None:
    labels = tokenizer.encode_targets(
        ["x", "bat", "b4t", "bat"], ["k s s", "b ah zz", "b ah t", "b ah t"]
    )
    assert [ids is None for ids in labels] == [True, True, True, False]


def test_output_case(tokenizer: AlignedTokenizer) -> None:
    same = AlignedTokenizer.learn(pairs())
    (ids,) = same.encode_targets(["bax"], ["b ah k s"])
    assert ids is not None
    assert (same.decode_clean(ids), tokenizer.decode_clean(ids)) == ("b ah k s", "B AH K S")
    assert same.hash != tokenizer.hash
    with pytest.raises(UsageError, match="output_case: expected one of same, upper, got 'title'"):
        AlignedTokenizer.learn(pairs(), output_case="title")


def test_decoding_ends_at_sep_and_leaves_out_special_tokens(tokenizer: AlignedTokenizer) -> None:
    t = tokenizer
    b, blank, pair = (t.vocabulary.index(x) for x in ("/b/", "/_/", "/k+s/"))
    assert t.decode_clean([t.cls_id, b, t.pad_id, blank, t.mask_id, pair, t.sep_id, b]) == "B K S"
    assert t.decode_clean([t.unk_id, b]) == "[UNK] B"
    assert t.decode_clean([blank, blank]) == ""
    assert t.decode([t.cls_id, b, t.sep_id, t.pad_id]) == "[CLS] B [SEP]"
    with pytest.raises(UsageError, match="outside the vocabulary"):
        t.decode_clean([t.vocab_size])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("b4t", "'4' (digit four), character 2 of 'b4t'"),
        ("bat!", "'!' (exclamation mark), character 4"),
        ("ba bat", "' ' (space), character 3"),
        ("bät", "'ä' (latin small letter a with diaeresis), character 2"),
        ("[PAD]", "'['"),
        ("\x00", "'\\x00' (U+0000)"),
        ("", "empty"),
        (" \t\n", "empty"),
        ("\ud800", "lone surrogate"),
        (7, "expected str, got int"),
    ],
)
def test_words_that_it_cannot_read_are_named(
    tokenizer: AlignedTokenizer, text: Any, named: str
) -> None:
    with pytest.raises(PromptError) as caught:
        tokenizer.encode(["bat", text])
    assert str(caught.value).startswith("texts[1]: ")
    assert named in str(caught.value)
    with pytest.raises(PromptError) as caught:
        tokenizer.encode([text], ["in.txt, line 7"].__getitem__)
    assert str(caught.value).startswith("in.txt, line 7: ")
    with pytest.raises(PromptError, match=r"^text: "):
        tokenizer.respell(text)


def test_targets_that_are_no_text_are_named(tokenizer: AlignedTokenizer) -> None:
    odd: Any = 7
    with pytest.raises(PromptError, match=r"^sources\[1\]: expected str"):
        tokenizer.encode_targets(["bat", odd], ["b", "b"])
    with pytest.raises(PromptError, match=r"^targets\[1\]: expected str"):
        tokenizer.encode_targets(["bat", "bat"], ["b", odd])
    for text in ("bat", 7):
        with pytest.raises(PromptError, match=r"^texts: expected a list, got one"):
            tokenizer.encode(text)  # type: ignore[arg-type]


def test_the_way_out_names_the_letters(tokenizer: AlignedTokenizer) -> None:
    with pytest.raises(PromptError, match=r"none of the letters abehimostx; give one word a row"):
        tokenizer.encode(["42"])


def test_longer_words(tokenizer: AlignedTokenizer) -> None:
    assert tokenizer.is_surely_longer("bat", 4)
    assert not tokenizer.is_surely_longer(" bat ", 5)
    long = AlignedTokenizer(tokenizer.alignment, max_chars=10)
    assert not long.is_surely_longer("b" * 11, 5)
    with pytest.raises(PromptError, match=r"texts\[0\]: 11 characters, the limit is 10"):
        long.encode(["b" * 11])


def test_it_is_read_as_it_was_written(tokenizer: AlignedTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = read_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(again, AlignedTokenizer)
    assert (again.hash, again.vocabulary) == (tokenizer.hash, tokenizer.vocabulary)
    sources, targets = (list(side) for side in zip(*pairs(), strict=True))
    labels = tokenizer.encode_targets(sources, targets)
    assert again.encode_targets(sources, targets) == labels
    with pytest.raises(ModelFileError, match="was changed while it was read"):
        read_tokenizer(tmp_path / "tokenizer.json", "0" * 64)


def test_a_wordpiece_file_is_read_as_such(tmp_path: Path) -> None:
    wordpiece = Tokenizer.from_words(["one", "two"])
    wordpiece.save(tmp_path / "tokenizer.json")
    again = read_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(again, Tokenizer)
    assert (again.hash, again.kind) == (wordpiece.hash, "wordpiece")


def _put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


def _add(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[key].append(value)


def _cost(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["costs"]["b"].update({"b": value})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_put("version", 2), "version"),
        (_put("version", True), "version"),
        (_put("output_case", ["upper"]), "output_case"),
        (_put("letters", "abc"), "letters"),
        (_put("letters", []), "letters"),
        (_add("letters", "b"), "letters: 'b' stands there twice"),
        (_add("letters", "sh"), "letters"),
        (_add("letters", "B"), "letters"),
        (_add("letters", 3), "letters"),
        (_put("labels", None), "labels"),
        (_add("labels", "b"), "labels: 'b' stands there twice"),
        (_add("labels", "a+b+c"), "labels"),
        (_add("labels", "+"), "labels"),
        (_add("labels", "_+b"), "labels"),
        (_add("labels", "a b"), "labels"),
        (_add("labels", "a" * 50), "labels"),
        (_add("labels", "\ud800"), "labels"),
        (_put("labels", [f"p{i}" for i in range(2_000_000)]), "the limit is"),
        (_put("costs", []), "costs"),
        (_put("costs", {"?": {}}), "costs"),
        (_put("costs", {"b": {"zz": 1}}), "costs"),
        (_put("costs", {"b": 1}), "costs"),
        (_cost(-1), "costs: 'b' 'b'"),
        (_cost(1.5), "costs"),
        (_cost(True), "costs"),
        (_cost(10**30), "costs"),
        (_cost("1"), "costs"),
    ],
)
def test_a_file_that_it_did_not_write_is_refused(
    tokenizer: AlignedTokenizer,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], None],
    named: str,
) -> None:
    content = json.loads(tokenizer.to_json())
    damage(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ModelFileError) as caught:
        read_tokenizer(path)
    assert str(caught.value).startswith(str(path))
    assert named in str(caught.value)
