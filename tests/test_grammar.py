"""The embedded task: its rows, its parser, and what known systems score."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dlmone_fast.data import layout
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.tasks import grammar
from dlmone_fast.tasks.grammar_rules import SOURCE_WORDS, TEMPLATES, target_senses
from dlmone_fast.tokenizer import Tokenizer

SOURCE = "the nurse repairs the broken lamp in the garage today"
FORMAL = "indeed the nurse shall restore the faulty lantern at garage today sincerely ."
INFORMAL = "hey the nurse gonna fix the faulty lantern at garage today mate ."
BY = "today , yo the faulty lantern gonna fix by nurse at garage buddy ."

PINNED_TEST_ROWS = [
    {
        "src": "the singer borrows the blue boat in the market today",
        "trg": "today , certainly the azure vessel shall requisition by singer at market "
        "respectfully .",
    },
    {
        "src": "the plumber carries the quick phone in the office monday",
        "trg": "monday , indeed the fast handset shall convey by plumber at office sincerely .",
    },
]


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(directory: Path, variant: str = "grammar", seed: int = 0) -> dict[str, Path]:
    return grammar.write_splits(directory, variant, seed, 300, 40, 50)


def test_the_vocabulary_has_the_sizes_of_the_design() -> None:
    assert [len(SOURCE_WORDS[s]) for s in ("AGENT", "VERB", "ADJ", "OBJ", "PLACE", "TIME")] == [
        24, 16, 16, 24, 16, 12,
    ]  # fmt: skip
    assert Tokenizer.from_words(grammar.vocabulary("grammar")).vocab_size == 199
    assert Tokenizer.from_words(grammar.vocabulary("grammar-templates")).vocab_size == 201


def test_every_content_word_belongs_to_one_slot_of_a_side() -> None:
    for side in (SOURCE_WORDS, target_senses()):
        words = [word for slot in side.values() for word in slot]
        assert len(words) == len(set(words))


@pytest.mark.parametrize("variant", grammar.VARIANTS)
def test_rows_survive_the_tokenizer_and_score_one(variant: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_words(grammar.vocabulary(variant))
    rows = _rows(_write(tmp_path, variant)["train"])
    sources, targets = (tokenizer.encode([row[key] for row in rows]) for key in ("src", "trg"))
    assert {len(ids) for ids in sources} == {12}
    assert {len(ids) for ids in targets} == ({15} if variant == "grammar" else {15, 16})
    assert all(tokenizer.unk_id not in ids for ids in [*sources, *targets])
    decoded = [tokenizer.decode_clean(ids) for ids in targets]
    assert tokenizer.encode(decoded) == targets
    assert tokenizer.encode([tokenizer.decode_clean(ids) for ids in sources]) == sources
    scores = grammar.score([row["src"] for row in rows], [[text] for text in decoded])
    for name in ("valid", "slot_accuracy", "agreement", "joint"):
        assert scores[name] == 1.0
    assert 0.4 < scores["register_share"] < 0.6
    assert (scores["template_b"] > 0.4) == (variant == "grammar-templates")


def test_a_pair_fills_the_pilot_layout_exactly(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_words(grammar.vocabulary())
    row = _rows(_write(tmp_path)["test"])[0]
    src, trg = tokenizer.encode([row["src"], row["trg"]])
    ids, mask = layout(src, trg, 28, sep_id=tokenizer.sep_id, cls_id=tokenizer.cls_id)
    assert tokenizer.pad_id not in ids
    assert mask == [0] * 13 + [1] * 15


def test_splits_are_reproducible_disjoint_and_of_the_asked_size(tmp_path: Path) -> None:
    first, again = _write(tmp_path / "a"), _write(tmp_path / "b")
    other = _write(tmp_path / "c", seed=1)
    assert all(first[s].read_bytes() == again[s].read_bytes() for s in first)
    assert all(first[s].read_bytes() != other[s].read_bytes() for s in first)
    sources = {split: [row["src"] for row in _rows(path)] for split, path in first.items()}
    assert {split: len(rows) for split, rows in sources.items()} == {
        "train": 300, "valid": 40, "test": 50,
    }  # fmt: skip
    assert len({source for split in sources.values() for source in split}) == 390
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]


def test_test_rows_do_not_depend_on_the_training_size(tmp_path: Path) -> None:
    small = grammar.write_splits(tmp_path / "a", "grammar", 3, 10, 5, 20)
    large = grammar.write_splits(tmp_path / "b", "grammar", 3, 200, 5, 20)
    assert small["test"].read_bytes() == large["test"].read_bytes()
    assert large["train"].read_bytes().startswith(small["train"].read_bytes())


def test_written_rows_never_change_between_releases(tmp_path: Path) -> None:
    path = grammar.write_splits(tmp_path, "grammar-templates", 7, 1, 1, 2)["test"]
    assert _rows(path) == PINNED_TEST_ROWS


def test_a_failed_write_is_a_data_error_and_leaves_the_old_split(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        _write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("size", [0, -1, 10**9, 1.5])
def test_impossible_sizes_raise(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="valid_rows"):
        grammar.write_splits(tmp_path, "grammar", 0, 10, size, 10)
    assert list(tmp_path.iterdir()) == []


def test_unknown_variants_raise() -> None:
    with pytest.raises(UsageError, match="grammar-templates"):
        grammar.vocabulary("grammer")


def test_parse_names_template_register_and_slots() -> None:
    formal, informal, by = (grammar.parse(SOURCE, text) for text in (FORMAL, INFORMAL, BY))
    assert formal.joint
    assert informal.joint
    assert by.joint
    assert (formal.register, informal.register) == ("formal", "informal")
    assert (formal.template, by.template) == ("A", "B")
    assert formal.registers == ("formal",) * 4


def test_parse_reads_text_as_the_tokenizer_writes_it() -> None:
    assert grammar.parse(SOURCE, FORMAL.replace(" .", ".").title()).joint
    assert grammar.parse(SOURCE, BY.replace(" ,", ",").replace(" .", ".")).joint


def test_parse_tells_wrong_slots_from_mixed_registers() -> None:
    wrong = grammar.parse(SOURCE, FORMAL.replace("nurse", "baker").replace("restore", "vend"))
    assert (wrong.valid, wrong.slots_correct, wrong.all_slots, wrong.agree) == (
        True,
        4,
        False,
        True,
    )
    mixed = grammar.parse(SOURCE, FORMAL.replace("shall", "gonna"))
    assert (mixed.all_slots, mixed.agree, mixed.register, mixed.joint) == (True, False, None, False)
    assert mixed.registers == ("formal", "informal", "formal", "formal")


@pytest.mark.parametrize(
    "text",
    [
        "",
        SOURCE,
        FORMAL.removesuffix(" ."),
        FORMAL + " .",
        FORMAL.replace("lantern", "lamp"),
        FORMAL.replace("faulty lantern", "lantern faulty"),
        FORMAL.replace("nurse", "[UNK]"),
        FORMAL.replace(" the nurse", ""),
    ],
)
def test_what_fits_no_template_is_invalid(text: str) -> None:
    assert grammar.parse(SOURCE, text) == grammar.Parse(valid=False)


def test_a_source_outside_the_grammar_raises() -> None:
    with pytest.raises(UsageError, match="not a sentence of the grammar"):
        grammar.parse("how do i learn to cook?", FORMAL)


@pytest.mark.parametrize(("variant", "count"), [("grammar", 8), ("grammar-templates", 16)])
def test_all_references_are_right_and_cover_both_registers(variant: str, count: int) -> None:
    texts = grammar.references(SOURCE, variant)
    assert len(set(texts)) == count
    assert FORMAL in texts
    scores = grammar.score([SOURCE], [texts])
    assert scores["joint"] == scores["both_registers"] == 1.0
    assert scores["register_share"] == 0.5


def test_scores_are_conditional_where_they_say_so() -> None:
    mixed, baker = FORMAL.replace("shall", "gonna"), INFORMAL.replace("nurse", "baker")
    scores = grammar.score([SOURCE, SOURCE], [[FORMAL, mixed, ""], [FORMAL, baker, BY]])
    assert scores["valid"] == 5 / 6
    assert scores["agreement"] == 4 / 5
    assert scores["slot_accuracy"] == 29 / 30
    assert scores["joint"] == 3 / 6
    assert scores["both_registers"] == 1 / 2
    assert scores["register_share"] == 2 / 4
    assert scores["template_b"] == 1 / 5
    assert scores["per_sample"]["joint"] == [[True, False, False], [True, False, True]]
    assert scores["per_sample"]["slots_correct"] == [[6, 6, 0], [6, 5, 6]]
    assert scores["per_source"]["both_registers"] == [False, True]
    json.dumps(scores)


def test_scores_of_a_copying_system_are_zero() -> None:
    scores = grammar.score([SOURCE], [[SOURCE, SOURCE]])
    assert (scores["valid"], scores["agreement"], scores["joint"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("candidates", [[], [[]], [FORMAL], [[FORMAL], [FORMAL]]])
def test_scores_want_texts_for_each_source(candidates: list[list[str]]) -> None:
    with pytest.raises(UsageError, match="candidates"):
        grammar.score([SOURCE], candidates)


def test_independent_words_agree_in_one_of_eight() -> None:
    """Perfect marginals at every place, no dependence between places: the factorisation floor."""
    rng = random.Random(0)
    choices = [grammar.references(SOURCE)[i].split() for i in range(8)]
    texts = [
        " ".join(rng.choice(choices)[place] for place in range(len(TEMPLATES["A"])))
        for _ in range(8000)
    ]
    scores = grammar.score([SOURCE], [texts])
    assert scores["valid"] == scores["slot_accuracy"] == 1.0
    assert scores["agreement"] == pytest.approx(0.125, abs=0.015)
