"""What evaluation asks of a model, so that it depends on no particular runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CandidateBatch:
    """Candidates of n texts: `texts` and `token_ids` are [n][candidates].

    `truncated` [n] says whether a source was cut; `seconds` is wall time.
    """

    texts: list[list[str]]
    token_ids: list[list[list[int]]]
    truncated: list[bool]
    seconds: float


class CandidateModel(Protocol):
    """A model that generates candidates for texts."""

    def generate_candidates(
        self,
        texts: Sequence[str],
        *,
        num_candidates: int,
        steps: int | None,
        seeds: Sequence[int],
        batch_size: int,
        sampler: str | None,
        temperature: float | None,
        on_overflow: str,
        progress: bool | None,
        encoded: Sequence[Sequence[int]] | None = None,
        decode: str = "clean",
    ) -> CandidateBatch:
        """Generate `num_candidates` texts for each of `texts`, with one seed a text.

        `encoded` holds the texts' ids where they were cut by `encode_jointly`; `decode`
        "diffuseq" asks for the original's decoding.

        None for `steps`, `sampler` and `temperature` means the model's default; for `progress`, a
        bar on a terminal.
        """
        ...

    def check_prompt(self, prompt: str, on_overflow: str = "error", name: str = "prompt") -> None:
        """Raise PromptError, which calls it `name`, for a text that `generate_candidates` would
        refuse."""
        ...

    def encode_jointly(self, source: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of a pair, cut together to the sequence length as DiffuSeq does."""
        ...

    def decode_text(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        ...

    def normalize_text(self, text: str) -> str:
        """The text in the model's spelling (case, spaces, punctuation), with all of its words.

        A model that also has `through_vocabulary(text)`, which encodes and decodes, gets a row that
        tells what its vocabulary cannot write.
        """
        ...
