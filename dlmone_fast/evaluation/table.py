"""A small table that reads well as plain text and is valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dlmone_fast.errors import UsageError


class Table:
    """Rows of cells under named columns; `align` has one of "l" and "r" per column.

    Without `align` the first column is aligned left and the others right, as names beside
    numbers are. Floats must come formatted: the table does not guess digits.
    """

    def __init__(self, columns: Sequence[str], align: str = "") -> None:
        self.columns = [str(name) for name in columns]
        self.align = align or "l" + "r" * (len(self.columns) - 1)
        if not self.columns or len(self.align) != len(self.columns) or set(self.align) - {*"lr"}:
            raise UsageError(
                f"align: expected one of 'l' and 'r' for each of {len(self.columns)} columns, "
                f"got {align!r}."
            )
        self.rows: list[list[str]] = []

    def add(self, *cells: object) -> None:
        """Append a row; None becomes a dash."""
        if len(cells) != len(self.columns):
            raise UsageError(f"row: expected {len(self.columns)} cells, got {len(cells)}.")
        self.rows.append(["-" if cell is None else _one_line(cell) for cell in cells])

    def markdown(self) -> str:
        """The table as lines of aligned Markdown, without a final newline."""
        lines = [self.columns, *self.rows]
        # Three characters at least: Markdown's ruler needs a dash beside the colon.
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        ruler = [
            "-" * (width - 1) + ":" if side == "r" else "-" * width
            for width, side in zip(widths, self.align, strict=True)
        ]
        padded = [
            [
                cell.rjust(width) if side == "r" else cell.ljust(width)
                for cell, width, side in zip(line, widths, self.align, strict=True)
            ]
            for line in lines
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], ruler, *padded[1:]])


def _one_line(cell: object) -> str:
    return " ".join(str(cell).replace("|", "\\|").split())
