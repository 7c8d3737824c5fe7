"""`python -m dlmone_fast.distil_targets`: a training folder whose targets a model wrote."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dlmone_fast.autoregressive.distil_config import DistillationConfig
from dlmone_fast.cli import parse, run_command
from dlmone_fast.config.section import unchecked


def _unchecked() -> DistillationConfig:
    with unchecked():
        return DistillationConfig()


@dataclass(frozen=True)
class Arguments:
    """Every key of the distillation as a flag."""

    settings: Annotated[DistillationConfig, tyro.conf.arg(name="")] = field(
        default_factory=_unchecked
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    # The folders have no defaults that would pass the check, which is made once at the end.
    with unchecked():
        arguments = parse(
            Arguments,
            prog="python -m dlmone_fast.distil_targets",
            description="Write a training folder whose targets an autoregressive model wrote "
            "(sequence-level distillation); the same command continues one that was stopped.",
            args=sys.argv[1:] if argv is None else argv,
            default=Arguments(),
        )
    config = dataclasses.replace(arguments.settings)
    from dlmone_fast.autoregressive.distillation import distil

    print(distil(config, say=lambda line: print(line, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    run_command(main)
