"""What every command shares: parsing, exit codes, and errors as one message on stderr.

Option types for `Args` dataclasses are spelled here as `Optional[...]`, because tyro imports
typeguard (0.1 s, half of what `--help` may take) to check the default of an `X | None` field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, Optional, TextIO, TypeVar, Union

from dlmone_fast.errors import EXIT_INTERRUPTED, EXIT_MODEL, EXIT_OK, DlmOneError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionalInt = Optional[int]  # noqa: UP045
OptionalFloat = Optional[float]  # noqa: UP045
OptionalStr = Optional[str]  # noqa: UP045
# None comes first: it is the default, and the first match ends tyro's check.
OptionalStrs = Union[None, tuple[str, ...]]  # noqa: UP007

# What a shell reports for a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141

_CLASS_OR_FIELD = re.compile(
    r'^class (?P<class_name>\w+)|^    (?P<field>\w+): [^\n]*\n    """(?P<doc>.*?)"""',
    re.MULTILINE | re.DOTALL,
)

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

    _give_help(args_type)
    with _collecting_nothing():
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


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Garbage collection off: among objects that all stay, it is a tenth of what --help takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _give_help(args_type: type) -> None:
    """Tell tyro the docstring below each field of a dataclass and of those nested in it.

    tyro finds them by itself, by tokenising and compiling the source of each class: 0.2 s for the
    configuration, against a millisecond for this.
    """
    queue: list[type] = [args_type]
    documented: dict[str, dict[str, dict[str, str]]] = {}
    while queue:
        kind = queue.pop()
        if kind.__module__ not in documented:
            documented[kind.__module__] = field_docs(sys.modules[kind.__module__])
        texts = documented[kind.__module__].get(kind.__name__, {})
        for item in dataclasses.fields(kind):
            if "help" not in item.metadata:
                text = texts.get(item.name) or item.name.replace("_", " ").capitalize() + "."
                item.metadata = MappingProxyType({**item.metadata, "help": text})
            nested: Any = item.default_factory
            if isinstance(nested, type) and dataclasses.is_dataclass(nested):
                queue.append(nested)


def field_docs(module: ModuleType) -> dict[str, dict[str, str]]:
    """Docstrings of one-line field definitions in a module's source, by class and field name."""
    found: dict[str, dict[str, str]] = {}
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    for match in _CLASS_OR_FIELD.finditer(source):
        if match["class_name"]:
            fields = found.setdefault(match["class_name"], {})
        else:
            fields[match["field"]] = " ".join(match["doc"].split())
    return found


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with the documented exit code.

    An error of this package, and a full disk, is printed as its message alone; any other
    exception is a defect and keeps its traceback.
    """
    _replace_closed_streams()
    _print_in_any_encoding()
    try:
        code = main()
        sys.stdout.flush()
    except DlmOneError as error:
        _tell(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _tell("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`... | head`).
        _discard(sys.stdout)
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard(sys.stdout)
        where = error.filename or "standard output"
        _tell(f"error: {where}: {error.strerror}; free space and run it again")
        sys.exit(EXIT_MODEL)
    sys.exit(EXIT_OK if code is None else code)


class _ClosedOutput(io.TextIOWrapper):
    """In the place of a standard output that was closed: what is printed goes nowhere."""


def require_output(way_out: str) -> None:
    """Refuse a command whose result is what it prints where standard output is closed.

    Raises:
        UsageError: it is; `way_out` says where the result may go instead.
    """
    if sys.stdout is None or isinstance(sys.stdout, _ClosedOutput):
        raise UsageError(f"standard output is closed, and the result goes there; {way_out}")


def _replace_closed_streams() -> None:
    """Give standard streams that were closed (`>&-`) a place.

    Python has None for them, which fails where it is written to; and the next file that is opened
    would get their number, for anybody to print into.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _ClosedOutput(open(os.devnull, "wb"), encoding="utf-8")  # noqa: SIM115


def _print_in_any_encoding() -> None:
    """Print what a terminal's encoding lacks as \\xNN or \\uNNNN: no work is lost for a letter."""
    for stream in (sys.stdout, sys.stderr):
        # What PYTHONIOENCODING asks for, such as ascii:replace, stays.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _tell(message: str) -> None:
    """Print on stderr; the exit code must be right also where that goes to a full disk."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    # The interpreter flushes what is left when it ends, and must not fail at that again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
