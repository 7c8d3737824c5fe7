"""WordPiece: what users' text may and may not become, and DiffuSeq's decoding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmone_fast import tokenizer as module
from dlmone_fast.boundaries import ALONE, BLANK
from dlmone_fast.errors import ModelFileError, PromptError, UsageError
from dlmone_fast.tokenizer import SPECIAL_TOKENS, Tokenizer
from dlmone_fast.wordpiece import learn_pieces

TEXTS = [
    "The kettle was boiling, wasn't it?",
    "She's counting boiled kettles; they've counted more!",
    "A cat sat. The cats sit, sitting is what cats do.",
    "Zoë's café opens at nine.",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pieces = [*LETTERS, *(f"##{c}" for c in LETTERS), *"[](){}.,?!'#;:", "cat", "##s", "sep"]
    return Tokenizer([*SPECIAL_TOKENS, *dict.fromkeys(pieces)])


def test_encode_wraps_each_text_and_splits_into_pieces(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode(["Cats.", "cat"])
    tokens = [tokenizer.vocabulary[i] for i in first]
    assert tokens == ["[CLS]", "cat", "##s", ".", "[SEP]"]
    assert second == [tokenizer.cls_id, tokenizer.vocabulary.index("cat"), tokenizer.sep_id]
    assert tokenizer.encode([]) == []


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("form", ["{}", "a{}b", " {} {} ", "[{}]", "{}.", "##{}"])
def test_special_tokens_typed_by_a_user_stay_text(
    tokenizer: Tokenizer, special: str, form: str
) -> None:
    for text in (form.format(special, special), form.format(special.lower(), special.lower())):
        inner = tokenizer.encode([text])[0][1:-1]
        assert not {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id} & set(inner)
        assert tokenizer.mask_id not in inner


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*SPECIAL_TOKENS, "[", "]", "SEP", "##", " ", "\u200b", "\x00"]),
            st.text(max_size=4),
        ),
        max_size=8,
    ).map("".join)
)
def test_any_text_encodes_without_special_ids_or_is_refused(
    tokenizer: Tokenizer, text: str
) -> None:
    try:
        ids = tokenizer.encode([text])[0]
    except PromptError:
        assert any("\ud800" <= c <= "\udfff" for c in text)
        return
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id
    assert set(ids[1:-1]).isdisjoint(
        {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=12), max_size=12))
def test_plain_words_survive_the_round_trip(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    assert tokenizer.decode_clean(tokenizer.encode([text])[0]) == text


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("stop . now , go ! why ?", "stop. now, go! why?"),
        ("the cat ' s tail", "the cat's tail"),
        ("a ' b", "a'b"),
        ("cats", "cats"),
    ],
)
def test_decode_joins_pieces_and_cleans_up_spaces(
    tokenizer: Tokenizer, text: str, spoken: str
) -> None:
    assert tokenizer.decode_clean(tokenizer.encode([text])[0]) == spoken


def test_decode_joins_contractions_that_are_tokens() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "do", "n't", "i", "'m", "he", "'s", "we", "'ve", "'re"])
    ids = [
        tokenizer.vocabulary.index(t)
        for t in ["do", "n't", "i", "'m", "he", "'s", "we", "'ve", "'re"]
    ]
    assert tokenizer.decode(ids) == "don't i'm he's we've're"


def test_decode_keeps_special_tokens_and_strips_only_trailing_padding(
    tokenizer: Tokenizer,
) -> None:
    cat, pad = tokenizer.vocabulary.index("cat"), tokenizer.pad_id
    ids = [tokenizer.cls_id, cat, pad, tokenizer.sep_id, cat, pad, pad]
    assert tokenizer.decode(ids) == "[CLS] cat [PAD] [SEP] cat"
    assert tokenizer.decode([pad, pad]) == ""


def test_decode_clean_cuts_at_the_first_separator_and_keeps_unknown_words(
    tokenizer: Tokenizer,
) -> None:
    cat, sep = tokenizer.vocabulary.index("cat"), tokenizer.sep_id
    ids = [tokenizer.cls_id, cat, tokenizer.unk_id, tokenizer.mask_id, sep, cat]
    assert tokenizer.decode_clean(ids) == "cat [UNK]"
    assert tokenizer.decode_clean(ids[1:]) == "cat [UNK]"
    assert tokenizer.decode_clean([tokenizer.cls_id, sep, cat]) == ""
    assert tokenizer.decode_clean([]) == ""


@pytest.mark.parametrize("ids", [[-1], [10**6], [0, 2**40], ["a"], [1.5], [None]])
def test_ids_outside_the_vocabulary_raise(tokenizer: Tokenizer, ids: list[int]) -> None:
    for decode in (tokenizer.decode, tokenizer.decode_clean):
        with pytest.raises(UsageError, match="ids"):
            decode(ids)


@pytest.mark.parametrize("prompt", [None, 3, b"cat", ["cat"], 1.0])
def test_prompts_that_are_not_text_raise(tokenizer: Tokenizer, prompt: object) -> None:
    with pytest.raises(PromptError, match=r"texts\[1\]: expected str"):
        tokenizer.encode(["cat", prompt])  # type: ignore[list-item]


def test_a_lone_string_is_not_taken_for_a_list_of_characters(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="wrap it in a list"):
        tokenizer.encode("cat")


def test_lone_surrogates_raise_with_their_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"surrogate.*character 4"):
        tokenizer.encode(["cat \udc80"])


def test_long_texts_are_refused_before_they_are_tokenised(tokenizer: Tokenizer) -> None:
    started = time.perf_counter()
    with pytest.raises(PromptError, match=r"10000000 characters, the limit is 20000"):
        tokenizer.encode(["a" * 10_000_000])
    assert time.perf_counter() - started < 0.5
    assert len(tokenizer.encode(["a " * 10_000])[0]) == 10_002


EVERY = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
def test_boundaries_are_where_the_splitter_parts_words(
    lowercase: bool, strip_accents: bool | None
) -> None:
    """Every character of the two classes, by the tokenizer itself; and no boundary is missing."""
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "q"], lowercase=lowercase, strip_accents=strip_accents)
    found = tokenizer.encode([f"q{c}q" for c in EVERY])
    counts = {c: len(ids) - 2 for c, ids in zip(EVERY, found, strict=True)}
    alone, blank = re.compile(f"[{ALONE}]"), re.compile(f"[{BLANK}]")
    expected = {c: 3 if alone.match(c) else 2 if blank.match(c) else 1 for c in EVERY}
    wrong = {c: count for c, count in counts.items() if count != expected[c]}
    # Without its accents a symbol may be an ASCII one: \u2260 is = then.
    decomposed = {c for c in wrong if wrong[c] == 3 and unicodedata.normalize("NFD", c) != c}
    assert wrong.keys() == decomposed
    assert len(wrong) < 70


def test_what_counts_as_a_token_for_sure_is_one(tokenizer: Tokenizer) -> None:
    sure = [c for c in EVERY if module._SURE_TOKEN.match(c)]
    assert len(sure) > 100_000
    assert [c for c, ids in zip(sure, tokenizer.encode(sure), strict=True) if len(ids) < 3] == []


PIECES_OF_TEXT = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=6),
        st.sampled_from(["a", " ", "\x1c", "\x85", "\u2028", "\u00a0", "\u3000", "\u0301", "_",
                         "\u200d", "😀", "。", "؟", "।", "𠀀", "中", "각", "ﷺ", "€", "[SEP]", "\n",
                         "\u0903", "\u0323", "x" * 99, "x" * 101, "\r\n", "\u2260"]),
    ),
    max_size=30,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(PIECES_OF_TEXT)
def test_no_text_is_called_longer_than_it_is(tokenizer: Tokenizer, text: str) -> None:
    sure = sum(1 for _ in module._SURE_TOKEN.finditer(text))
    try:
        ids = tokenizer.encode([text])[0]
    except PromptError:
        return
    assert sure <= len(ids) - 2


@settings(max_examples=300, deadline=None)
@given(
    text=PIECES_OF_TEXT, repeats=st.integers(1, 40), limit=st.integers(0, 200),
    lowercase=st.booleans(), strip_accents=st.sampled_from([None, True, False]),
)  # fmt: skip
def test_the_quick_verdict_on_a_long_text_is_the_plain_one(
    tokenizer: Tokenizer, text: str, repeats: int, limit: int, lowercase: bool,
    strip_accents: bool | None,
) -> None:  # fmt: skip
    chosen = Tokenizer(
        tokenizer.vocabulary, lowercase=lowercase, strip_accents=strip_accents, max_chars=10**6
    )
    text = (text + " a") * repeats
    try:
        ids = chosen.encode([text])[0]
    except PromptError:
        return
    around = {max(2, len(ids) + by) for by in (-1, 0, 1)}
    for most in {limit, *around}:
        is_long = len(text) > module._QUICK_CHARS and len(ids) > most
        assert chosen.is_surely_longer(text, most) == is_long
    parts = list(module._parts(text))
    assert "".join(parts) in ("", text)
    if parts:
        assert sum(map(chosen._count, parts)) == len(ids) - 2


def quickest(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_long_texts_are_known_to_be_long_in_microseconds(tokenizer: Tokenizer) -> None:
    for text in ("cat " * 5000, "中" * 20_000, "." * 20_000, "😀 " * 10_000, "да " * 6000,
                 "؟" * 20_000, "।" * 20_000, "𠀀" * 20_000):  # fmt: skip
        assert tokenizer.is_surely_longer(text, 130)
        assert quickest(lambda text=text: tokenizer.is_surely_longer(text, 130)) < 1e-3
    words = "cat " * 500
    assert tokenizer.is_surely_longer(words, 501)
    assert not tokenizer.is_surely_longer(words, 502)
    # Short ones are soon tokenised; what is too long for that says so itself.
    assert not tokenizer.is_surely_longer("cat " * 100, 10)
    assert not tokenizer.is_surely_longer("cat " * 10_000, 10)
    # And what is no text is `encode`'s to refuse.
    assert not tokenizer.is_surely_longer("a" * 90 + "\udc80" + "\0" * 2000 + "a.", 10)


HOSTILE_UNITS = [
    # Arabic, Devanagari, Hebrew
    "؟", "؟ ", "\u0627", "\u0627 ", "ﷺ ", "।", "क ", "\u0903 ", "कि ", "\u05be", "א ",
    # ideographs, Hangul, emoji
    "𠀀", "豈", "中 ", "각", "각 ", "각" * 101 + " ", "😀", "😀 ", "👩\u200d👧 ",
    # combining marks, control characters, white space, symbols
    "\u0301", "\u0301 ", "a\u0301 ", "\u0489 ", "\x00", "\x00a ", "\u200d", "\u200db ", "\ue000",
    " ", "\n", "\u2003", "\u2003a", "\u3000,", "€ ", "¬ ", "_",
    # few words of many pieces
    "a" * 100 + " ", "a" * 100 + "\u2003", "a" * 101 + " ", "a" * 100 + "\x00" * 222 + " ",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE_UNITS)
@pytest.mark.parametrize("lowercase", [True, False])
def test_no_long_text_takes_long_to_be_refused(
    tokenizer: Tokenizer, unit: str, lowercase: bool
) -> None:
    chosen = Tokenizer(tokenizer.vocabulary, lowercase=lowercase)
    text = (unit * chosen.max_chars)[: chosen.max_chars]
    too_long = len(chosen.encode([text])[0]) > 64
    assert chosen.is_surely_longer(text, 64) == too_long
    if too_long:
        assert quickest(lambda: chosen.is_surely_longer(text, 64)) < 5e-3


def test_save_and_load_agree_on_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.from_file(path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert loaded.encode(["[SEP]"])[0].count(loaded.sep_id) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_hash_depends_on_vocabulary_order_and_case_rule() -> None:
    hashes = {
        Tokenizer([*SPECIAL_TOKENS, "a", "b"]).hash,
        Tokenizer([*SPECIAL_TOKENS, "b", "a"]).hash,
        Tokenizer([*SPECIAL_TOKENS, "a", "b"], lowercase=False).hash,
    }
    assert len(hashes) == 3


def _hostile(tokenizer: Tokenizer, **changes: object) -> str:
    return json.dumps(json.loads(tokenizer.to_json()) | changes)


def test_a_loaded_file_cannot_bring_added_tokens_or_a_decoder(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cat = tokenizer.vocabulary.index("cat")
    added = {"id": tokenizer.sep_id, "content": "cat", "single_word": False, "lstrip": False}
    added |= {"rstrip": False, "normalized": False, "special": False}
    path = tmp_path / "tokenizer.json"
    path.write_text(_hostile(tokenizer, added_tokens=[added], decoder=None, truncation=None))
    loaded = Tokenizer.from_file(path)
    assert loaded.encode(["cat [SEP]"])[0][1] == cat
    assert loaded.encode(["cat [SEP]"])[0].count(loaded.sep_id) == 1
    assert loaded.decode_clean(loaded.encode(["cats"])[0]) == "cats"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"model": {"type": "WordPiece", "vocab": {}}}',
        '{"model": {"type": "BPE", "vocab": {}}}',
    ],
)
def test_malformed_tokenizer_files_raise_and_name_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_files_with_another_splitter_or_a_gap_in_the_ids_raise(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads(tokenizer.to_json())
    gap = dict(content["model"], vocab={**content["model"]["vocab"], "dog": 10_000})
    doubled = dict(content["model"], vocab={**content["model"]["vocab"], "dog": 3})
    path = tmp_path / "tokenizer.json"
    for changes in (
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "[SEP]"}},
        {"model": gap},
        {"model": doubled},
        {"model": dict(content["model"], unk_token="[SEP]")},
    ):
        path.write_text(_hostile(tokenizer, **changes))
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            Tokenizer.from_file(path)


def test_vocab_files_number_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(["[PAD]", "cat", *SPECIAL_TOKENS[1:], "##s"]).encode() + b"\r\n")
    tokenizer = Tokenizer.from_vocab_file(path)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.sep_id) == (7, 0, 4)
    assert tokenizer.encode(["CATS"])[0] == [3, 1, 6, 4]
    cased = Tokenizer.from_vocab_file(path, lowercase=False)
    assert cased.encode(["CATS"])[0] == [3, 2, 4]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\ncat\n", r"lacks \[SEP\], \[MASK\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\ncat\n", "'cat' stands at both 5 and 6"),
        (b"[PAD]\n\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "token 1"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_wrong_vocab_files_raise(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"vocab\.txt: .*{reason}"):
        Tokenizer.from_vocab_file(path)


def test_a_missing_tokenizer_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none\.json"):
        Tokenizer.from_file(tmp_path / "none.json")


def test_a_failed_save_is_a_model_file_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot write"):
        tokenizer.save(tmp_path / "missing" / "tokenizer.json")


def test_learned_vocabulary_has_specials_first_and_reads_its_own_texts() -> None:
    tokenizer = Tokenizer.learn(TEXTS, 120)
    assert tokenizer.vocabulary[:5] == SPECIAL_TOKENS
    assert 60 < tokenizer.vocab_size <= 120
    ids = tokenizer.encode(TEXTS)
    assert all(tokenizer.unk_id not in row for row in ids)
    assert tokenizer.decode_clean(ids[2]) == "a cat sat. the cats sit, sitting is what cats do."
    assert Tokenizer.learn(TEXTS, 60).vocab_size <= 60


def test_learning_is_the_same_in_every_process() -> None:
    code = (
        f"from dlmone_fast.tokenizer import Tokenizer\nprint(Tokenizer.learn({TEXTS!r}, 100).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert hashes == {Tokenizer.learn(TEXTS, 100).hash + "\n"}


def test_merges_follow_counts_and_break_ties_by_text() -> None:
    alphabet = ["a", "b", "c", "##a", "##b", "##c"]
    counts = {"ab": 3, "bc": 3, "ca": 5, "cb": 1}
    assert learn_pieces(counts, 40) == [*alphabet, "ca", "ab", "bc"]
    overlapping = {"aaaa": 4, "b": 1}
    assert learn_pieces(overlapping, 40) == ["a", "b", "##a", "##aa", "##aaa", "aaaa"]


@pytest.mark.parametrize("size", [0, 9, 10**7, 100.0])
def test_impossible_vocabulary_sizes_raise(size: int) -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        Tokenizer.learn(TEXTS, size)


def test_learning_from_nothing_raises() -> None:
    with pytest.raises(UsageError, match="at least one word"):
        Tokenizer.learn(["", "  "], 100)


@pytest.mark.parametrize("word", ["Two", "two words", "it's", "", "[SEP]x"])
def test_word_vocabularies_refuse_what_is_not_one_word(word: str) -> None:
    with pytest.raises((UsageError, ModelFileError)):
        Tokenizer.from_words(["one", word])


def test_word_vocabularies_know_whole_words_only() -> None:
    tokenizer = Tokenizer.from_words(["one", "two", "."])
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode(["One two."])[0] == [2, 5, 6, 7, 3]
    assert tokenizer.encode(["ones"])[0] == [2, tokenizer.unk_id, 3]
