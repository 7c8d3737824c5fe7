"""The grammar of the embedded task: its templates, its paraphrases and its parser.

A source names six things; its paraphrase names them in other words and, besides, speaks in a
register (formal or informal) that nothing in the source tells. Four words must agree on it:

    source      the AGENT VERB the ADJ OBJ in the PLACE TIME
    template A  OPEN_r the AGENT AUX_r VERB_r the ADJ' OBJ' at PLACE TIME CLOSE_r .
    template B  TIME , OPEN_r the ADJ' OBJ' AUX_r VERB_r by AGENT at PLACE CLOSE_r .

A model that picks each word on its own, however well, agrees in 2 of 2^4 cases: 2^-3 = 0.125.
OPEN and CLOSE have two words a register, so a source has 8 paraphrases by template A and 16 by
both. Variant `grammar` uses A alone; `grammar-templates` uses both, which shift every position
against each other (a stress test of mode coverage).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from dlmone_fast.errors import UsageError
from dlmone_fast.tasks import grammar_words as words

VARIANTS = ("grammar", "grammar-templates")
SOURCE = words.listed("the AGENT VERB the ADJ OBJ in the PLACE TIME")
TEMPLATES = {
    "A": words.listed("OPEN the AGENT AUX VERB the ADJ OBJ at PLACE TIME CLOSE ."),
    "B": words.listed("TIME , OPEN the ADJ OBJ AUX VERB by AGENT at PLACE CLOSE ."),
}
SLOTS = ("AGENT", "VERB", "ADJ", "OBJ", "PLACE", "TIME")
REGISTER_SLOTS = ("OPEN", "AUX", "VERB", "CLOSE")

SOURCE_WORDS: dict[str, list[str]] = {
    "AGENT": words.AGENTS,
    "VERB": list(words.VERBS),
    "ADJ": list(words.ADJECTIVES),
    "OBJ": list(words.OBJECTS),
    "PLACE": words.PLACES,
    "TIME": words.TIMES,
}

Register = Literal["formal", "informal"]
REGISTERS: tuple[Register, Register] = ("formal", "informal")

# What a word says: which of its slot's meanings, and which register (None where it has none).
Sense = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class Parse:
    """What one candidate says of its source.

    `valid`: a template fits, with words of the right kind at each place. The rest is empty or
    False unless valid. `slots_correct` counts the six slots that say what the source says;
    `registers` holds the register at OPEN, AUX, VERB and CLOSE, `register` the one that all
    four agree on.
    """

    valid: bool
    slots_correct: int = 0
    all_slots: bool = False
    registers: tuple[Register, ...] = ()
    agree: bool = False
    template: Literal["A", "B"] | None = None
    register: Register | None = None

    @property
    def joint(self) -> bool:
        """Valid, every slot right and the registers agreeing."""
        return self.valid and self.all_slots and self.agree


def parse(source: str, text: str) -> Parse:
    """Judge `text` as a paraphrase of `source`.

    Case and the spacing of "." and "," do not matter. Raise UsageError if `source` is not a
    sentence of the grammar.
    """
    return _judged(_meaning(source), text)


def vocabulary(variant: str = "grammar") -> list[str]:
    """Return the words of a variant, each once, in a fixed order, without special tokens."""
    templates = [TEMPLATES[name] for name in template_names(variant)]
    fixed = [word for template in [SOURCE, *templates] for word in template if not word.isupper()]
    content = [word for slot in SOURCE_WORDS.values() for word in slot]
    spoken = [word for slot in target_senses().values() for word in slot]
    return list(dict.fromkeys([*fixed, *content, *spoken]))


def references(source: str, variant: str = "grammar") -> list[str]:
    """Return every right paraphrase of `source`: 8, or 16 with both templates."""
    meaning = _meaning(source)
    return [
        realised(template, meaning, register, opening, closing)
        for template in template_names(variant)
        for register in (0, 1)
        for opening in (0, 1)
        for closing in (0, 1)
    ]


def template_names(variant: str) -> tuple[str, ...]:
    """Return the names of the templates that a variant uses."""
    if variant not in VARIANTS:
        raise UsageError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    return ("A",) if variant == "grammar" else ("A", "B")


def source_sentence(meaning: tuple[int, ...]) -> str:
    """Return the source that says `meaning`, an index into `SOURCE_WORDS` for each slot."""
    chosen = {slot: SOURCE_WORDS[slot][i] for slot, i in zip(SLOTS, meaning, strict=True)}
    return " ".join(chosen.get(word, word) for word in SOURCE)


def realised(
    template: str, meaning: tuple[int, ...], register: int, opening: int, closing: int
) -> str:
    """Return one paraphrase; `opening` and `closing` choose between a register's two words."""
    senses: dict[str, Sense] = {
        slot: (index, register if slot == "VERB" else None)
        for slot, index in zip(SLOTS, meaning, strict=True)
    }
    senses |= {
        "OPEN": (opening, register),
        "AUX": (0, register),
        "CLOSE": (closing, register),
    }
    spoken = _target_words()
    return " ".join(
        spoken[word, senses[word]] if word in senses else word for word in TEMPLATES[template]
    )


@cache
def target_senses() -> dict[str, dict[str, Sense]]:
    """Return, for each slot of the templates, what its words say."""
    verbs = words.VERBS.values()
    return {
        "AGENT": {word: (i, None) for i, word in enumerate(words.AGENTS)},
        "VERB": {pair[r]: (i, r) for i, pair in enumerate(verbs) for r in (0, 1)},
        "ADJ": {word: (i, None) for i, word in enumerate(words.ADJECTIVES.values())},
        "OBJ": {word: (i, None) for i, word in enumerate(words.OBJECTS.values())},
        "PLACE": {word: (i, None) for i, word in enumerate(words.PLACES)},
        "TIME": {word: (i, None) for i, word in enumerate(words.TIMES)},
        "OPEN": {pair[i]: (i, r) for r, pair in enumerate(words.OPENINGS) for i in (0, 1)},
        "AUX": {word: (0, r) for r, word in enumerate(words.AUXILIARIES)},
        "CLOSE": {pair[i]: (i, r) for r, pair in enumerate(words.CLOSINGS) for i in (0, 1)},
    }


@cache
def _target_words() -> dict[tuple[str, Sense], str]:
    return {
        (slot, sense): word
        for slot, senses in target_senses().items()
        for word, sense in senses.items()
    }


@cache
def _source_senses() -> dict[str, dict[str, Sense]]:
    return {
        slot: {word: (i, None) for i, word in enumerate(kinds)}
        for slot, kinds in SOURCE_WORDS.items()
    }


def _matched(
    template: list[str], spoken: list[str], senses: dict[str, dict[str, Sense]]
) -> dict[str, Sense] | None:
    """Return what each slot says, or None where the template does not fit."""
    if len(template) != len(spoken):
        return None
    found: dict[str, Sense] = {}
    for place, word in zip(template, spoken, strict=True):
        if place in senses:
            if word not in senses[place]:
                return None
            found[place] = senses[place][word]
        elif place != word:
            return None
    return found


def _spoken(text: str) -> list[str]:
    return re.findall(r"[.,]|[^\s.,]+", text.lower())


def _meaning(source: str) -> tuple[int, ...]:
    found = _matched(SOURCE, _spoken(source), _source_senses())
    if found is None:
        raise UsageError(
            f"source: {source[:80]!r} is not a sentence of the grammar; expected "
            f"{' '.join(SOURCE)!r} with its words (dlmone_fast.tasks.grammar_words)"
        )
    return tuple(found[slot][0] for slot in SLOTS)


def _judged(meaning: tuple[int, ...], text: str) -> Parse:
    spoken = _spoken(text)
    names: tuple[Literal["A", "B"], ...] = ("A", "B")
    for name in names:
        found = _matched(TEMPLATES[name], spoken, target_senses())
        if found is None:
            continue
        correct = sum(found[slot][0] == i for slot, i in zip(SLOTS, meaning, strict=True))
        heard = [found[slot][1] for slot in REGISTER_SLOTS]
        registers = tuple(REGISTERS[r] for r in heard if r is not None)
        agree = len(set(registers)) == 1
        return Parse(
            valid=True,
            slots_correct=correct,
            all_slots=correct == len(SLOTS),
            registers=registers,
            agree=agree,
            template=name,
            register=registers[0] if agree else None,
        )
    return Parse(valid=False)
