"""`python -m dlmone_fast.train`: train or take a teacher, distil it in two stages, evaluate."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dlmone_fast.cli import parse, require_output, run_command
from dlmone_fast.config import (
    PRESETS,
    Config,
    from_dict,
    layered,
    load_toml,
    resolve,
    to_dict,
    unchecked,
)
from dlmone_fast.config.unread import refuse_unread
from dlmone_fast.errors import UsageError

if TYPE_CHECKING:
    from dlmone_fast.text_tokenizer import TextTokenizer

PROG = "python -m dlmone_fast.train"
# The short spelling of one key.
_START = re.compile(r"^--start[-_]from(?==|$)")


@dataclass(frozen=True)
class Arguments:
    """What to run; below, every key of the configuration as a flag."""

    config_file: Annotated[str, tyro.conf.arg(name="config")] = ""
    """TOML file with keys of the configuration; it overrides the preset, flags override it."""
    phase: Literal["teacher", "pairs", "stage1", "stage2", "all"] = "all"
    """Which phase to run; all skips the ones that are finished. pairs (the teacher's paired
    endpoints) exists where distill.pairs.count is set."""
    teacher_folder: Annotated[str, tyro.conf.arg(name="teacher")] = ""
    """Model folder of a teacher to distil, instead of training one; name its preset or config."""
    resume: str = "auto"
    """auto: continue from the newest intact checkpoint; never: start over; or a checkpoint."""
    dry_run: bool = False
    """Print parameters, FLOPs per step, memory and steps, then exit."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    started = time.monotonic()
    args = [
        _START.sub("--model.start-from", arg) for arg in (sys.argv[1:] if args is None else args)
    ]
    arguments = _arguments(args)
    config = _configuration(arguments, args)
    refuse_unread(config)
    teacher = arguments.teacher_folder
    if teacher:
        if not (_value(args, "--preset") or _value(args, "--config")):
            _check_teacher_speaks(config, teacher)
        _say_whose_sizes(config, teacher)
    if arguments.dry_run:
        require_output("open it, or leave out --dry-run")
        print(_plan(config, teacher))
        return
    from dlmone_fast.comparison import compare_run
    from dlmone_fast.training import run

    with _stoppable():
        keep = [arguments.config_file] if arguments.config_file else []
        result = run(config, arguments.phase, teacher, arguments.resume, started, keep)
        if not result.workspace.ranks.writes:
            return
        if arguments.phase in ("all", "stage2") and result.student is not None:
            result.workspace.limit.check("the comparison")
            print(compare_run(result, say=lambda line: print(line, file=sys.stderr)))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the command at once, with 75: the training loop has its own way to stop, and
    around it everything can be made again. Ranks are left to torchrun, which ends them all."""
    from dlmone_fast.training.ranks import of_several
    from dlmone_fast.training.signals import StopRequest

    if of_several():
        yield
        return
    with StopRequest() as stop, stop.cutting():
        yield


def _plan(config: Config, teacher: str) -> str:
    from dlmone_fast.training.cuts import planned_cuts
    from dlmone_fast.training.plan import describe

    tokenizer = None
    if teacher:
        from dlmone_fast.models.folder import load_folder
        from dlmone_fast.training import teacher_tokenizer, with_teacher

        folder = load_folder(teacher)
        config = with_teacher(config, folder)
        if config.data_dir or config.is_grammar:
            tokenizer = teacher_tokenizer(config, folder)
    config, cuts = planned_cuts(config, tokenizer)
    lines = _fidelity_lines(config, tokenizer)
    return "\n".join([describe(config), "", *cuts, *lines])


def _fidelity_lines(config: Config, tokenizer: TextTokenizer | None) -> list[str]:
    """A line a split that counts what the tokenizer loses, where there is data to read."""
    if config.is_grammar or not config.data_dir:
        return []
    from dlmone_fast.data.fidelity import split_fidelity
    from dlmone_fast.data.rows import SPLITS
    from dlmone_fast.tokenizer import Tokenizer
    from dlmone_fast.training.workspace import make_tokenizer

    tokenizer = tokenizer or make_tokenizer(config, Path(config.data_dir))
    # Words and their labels lose nothing: what cannot be written is refused or left out.
    if not isinstance(tokenizer, Tokenizer):
        return []
    return [split_fidelity(config.data_dir, split, tokenizer).line(split) for split in SPLITS]


def _check_teacher_speaks(config: Config, teacher: str) -> None:
    """Refuse to distil a teacher of other text on the grammar that nobody named."""
    from dlmone_fast.aligned_tokenizer import read_tokenizer
    from dlmone_fast.models.folder import TOKENIZER_NAME
    from dlmone_fast.tasks.grammar import vocabulary
    from dlmone_fast.tokenizer import Tokenizer

    file = Path(teacher, TOKENIZER_NAME)
    # What is missing is told where the folder is read.
    if not config.is_grammar or not os.path.isfile(file):
        return
    if read_tokenizer(file).hash != Tokenizer.from_words(vocabulary(config.data.task)).hash:
        raise UsageError(
            f"--teacher {teacher}: has another vocabulary than the preset grammar, which a run "
            "without --preset and --config distils on; name the teacher's own, such as --preset "
            "qqp with --data-dir, or --preset grammar if that is meant"
        )


def _say_whose_sizes(config: Config, teacher: str) -> None:
    preset = resolve(config.preset)
    if (config.model, config.diffusion) != (preset.model, preset.diffusion):
        print(
            f"--teacher {teacher}: its own model and diffusion are used, not those that the flags "
            "or the --config file set",
            file=sys.stderr,
        )


def _arguments(args: list[str]) -> Arguments:
    # tyro warns of a default of the wrong type; our own check names the key and ends the run.
    with unchecked(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        default = Arguments(settings=_base(args))
        return parse(Arguments, prog=PROG, description=__doc__ or "", args=args, default=default)


def _configuration(arguments: Arguments, args: list[str]) -> Config:
    """Preset, file and flags, with the sizes that follow from what the file and the flags set."""
    file, settings = arguments.config_file, to_dict(arguments.settings)
    flags = _set_by_flags(settings, args)
    return from_dict(layered(settings["preset"], load_toml(file) if file else {}, flags))


def _set_by_flags(settings: dict[str, Any], args: list[str], path: str = "") -> dict[str, Any]:
    """The settings that the command line names, even where they are those of the preset."""
    named = {arg[2:].split("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    chosen = {}
    for key, value in settings.items():
        *sections, name = f"{path}{key}".split(".")
        if isinstance(value, dict):
            chosen[key] = _set_by_flags(value, args, f"{path}{key}.")
        elif not named.isdisjoint(
            {".".join([*sections, name]), ".".join([*sections, f"no_{name}"])}
        ):
            chosen[key] = value
    return chosen


def _base(args: list[str]) -> Config:
    """Preset and file, read ahead of the flags, whose defaults they are."""
    preset, file = _value(args, "--preset"), _value(args, "--config")
    if not {"-h", "--help"}.isdisjoint(args) and preset not in PRESETS:
        preset = ""
    return resolve(preset, file)


def _value(args: list[str], flag: str) -> str:
    value = ""
    # As for every other flag the last one counts.
    for here, following in zip(["", *args], [*args, ""], strict=True):
        if here == flag:
            value = following
        elif here.startswith(f"{flag}="):
            value = here.removeprefix(f"{flag}=")
    return value


if __name__ == "__main__":
    run_command(main)
