"""CMUdict's 39 phonemes in ARPAbet, and the same in the International Phonetic Alphabet.

Without stress, AH is both the vowel of "cut" and the one that begins "about"; it is written ʌ.
ER is written ɝ wherever it stands.
"""

from __future__ import annotations

import re

from dlmone_fast.errors import UsageError

IPA = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "tʃ",
    "D": "d", "DH": "ð", "EH": "ɛ", "ER": "ɝ", "EY": "eɪ", "F": "f", "G": "ɡ", "HH": "h",
    "IH": "ɪ", "IY": "i", "JH": "dʒ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ",
    "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ", "T": "t", "TH": "θ",
    "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip
"""ARPAbet → IPA."""

_PHONEMES = {ipa: phoneme for phoneme, ipa in IPA.items()} | {
    # What others write for the same.
    "ə": "AH", "ɚ": "ER", "ɜ": "ER", "r": "R", "g": "G",
}  # fmt: skip
_ONE_IPA = re.compile("|".join(sorted(_PHONEMES, key=lambda ipa: (-len(ipa), ipa))))


def to_ipa(phonemes: str, *, keep_unknown: bool = False) -> str:
    """The IPA of ARPAbet phonemes: `to_ipa("JH IY AA")` is "dʒiɑ".

    Args:
        phonemes: separated by spaces, in any case, without stress digits.
        keep_unknown: leave what is no phoneme as it is, instead of refusing it.

    Raises:
        UsageError: there is something else among them.
    """
    spoken = []
    for phoneme in phonemes.split():
        ipa = IPA.get(phoneme.upper(), phoneme if keep_unknown else "")
        if not ipa:
            raise UsageError(
                f"phonemes: {phoneme!r:.40} is none of CMUdict's 39, {' '.join(IPA)}; separate "
                "them by spaces and leave out stress digits"
            )
        spoken.append(ipa)
    return "".join(spoken)


def from_ipa(ipa: str) -> str:
    """The ARPAbet phonemes of IPA, separated by spaces; undoes `to_ipa` but where two meet as one.

    The longest symbol wins: "tʃ" is CH, never T SH. White space, stress marks and length marks are
    left out.

    Raises:
        UsageError: a character belongs to none of the 39 phonemes.
    """
    spoken, at = [], 0
    while at < len(ipa):
        symbol = _ONE_IPA.match(ipa, at)
        if symbol is not None:
            spoken.append(_PHONEMES[symbol.group()])
            at = symbol.end()
        elif ipa[at].isspace() or ipa[at] in "ˈˌː":
            at += 1
        else:
            raise UsageError(
                f"ipa: {ipa[at]!r}, character {at + 1} of {ipa!r:.60}, is in none of "
                f"{' '.join(IPA.values())}; remove or replace it"
            )
    return " ".join(spoken)
