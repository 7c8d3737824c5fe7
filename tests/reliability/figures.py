"""What a test of the campaign says that it has measured."""

from __future__ import annotations

from typing import Protocol


class Figure(Protocol):
    """Takes number, subject, target and what was measured."""

    def __call__(
        self, number: str, subject: str, target: str, measured: str, *, in_part: bool = False
    ) -> None:
        """`in_part`: what the number asks for is still to be measured elsewhere, as on a GPU."""
