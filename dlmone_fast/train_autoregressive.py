"""`python -m dlmone_fast.train_autoregressive`: an encoder-decoder that writes token by token."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dlmone_fast.autoregressive.config import TrainingConfig
from dlmone_fast.cli import parse, run_command
from dlmone_fast.config.section import unchecked


@dataclass(frozen=True)
class Arguments:
    """Every key of the training as a flag."""

    settings: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(
        default_factory=TrainingConfig
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    started = time.monotonic()
    # tyro builds sections one by one; the whole is checked once, and by our own messages.
    with unchecked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        arguments = parse(
            Arguments,
            prog="python -m dlmone_fast.train_autoregressive",
            description="Train an autoregressive encoder-decoder on a folder of pairs; the same "
            "command continues a training that was stopped.",
            args=sys.argv[1:] if argv is None else argv,
            default=Arguments(),
        )
    config = _checked(arguments.settings)
    # torch is imported here, after parsing, so that --help stays fast.
    from dlmone_fast.autoregressive.training import train

    print(train(config, started))


def _checked(settings: TrainingConfig) -> TrainingConfig:
    import dataclasses

    from dlmone_fast.errors import ConfigError

    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    try:
        values["model"] = dataclasses.replace(settings.model)
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from error
    return TrainingConfig(**values)


if __name__ == "__main__":
    run_command(main)
