"""What every command shares: parsing, exit codes, and errors as one message on stderr.

Option types for `Args` dataclasses are spelled here as `Optional[...]`, because tyro imports
typeguard (0.1 s, half of what `--help` may take) to check the default of an `X | None` field.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, Optional, TypeVar, Union

from dlmone_fast.errors import EXIT_INTERRUPTED, EXIT_OK, DlmOneError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionalInt = Optional[int]  # noqa: UP045
OptionalFloat = Optional[float]  # noqa: UP045
OptionalStr = Optional[str]  # noqa: UP045
# None comes first: it is the default, and the first match ends tyro's check.
OptionalStrs = Union[None, tuple[str, ...]]  # noqa: UP007

# What a shell reports for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141

ArgsType = TypeVar("ArgsType", bound="DataclassInstance")


def parse(
    args_type: type[ArgsType],
    *,
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
    default: ArgsType | None = None,
) -> ArgsType:
    """Read a command line into the dataclass `args_type`; exits 0 after --help, 2 on bad usage.

    Field names become options, their docstrings the help. `args` defaults to sys.argv[1:],
    `default` to the dataclass's own defaults.
    Wrap a field in `Annotated[..., tyro.conf.Positional]` to take it without an option name.
    """
    import tyro

    return tyro.cli(
        args_type,
        prog=prog,
        description=description,
        args=args,
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with the documented exit code.

    An error of this package is printed as its message alone; any other exception is a defect
    and keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()
    except DlmOneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`... | head`); the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    sys.exit(EXIT_OK if code is None else code)
