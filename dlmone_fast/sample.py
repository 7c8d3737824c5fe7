"""The command `python -m dlmone_fast.sample`: texts in, generated texts out, as a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from dlmone_fast.cli import (
    OptionalFloat,
    OptionalInt,
    OptionalStr,
    parse,
    require_output,
    run_command,
)
from dlmone_fast.errors import DataError, PromptError, UsageError
from dlmone_fast.sources import (
    Source,
    calibration_prompts,
    is_jsonl,
    numbered_lines,
    source_of,
    taken,
)
from dlmone_fast.tasks.arpabet import to_ipa

if TYPE_CHECKING:
    from dlmone_fast.runtime import Generator

WINDOW = 1024

DESCRIPTION = """Generate a text for each source of a file or of standard input.

Text: one source a line in, one text a line out, in order; line breaks inside a text become
spaces, and a blank line is an empty source that gets its line like any other. jsonl: objects with
`src` in, the same objects with `generated` (or `candidates`, if several), `truncated` and, with
--ipa, `ipa` out; an object that has one of these already is refused, not written over
(--field-prefix). Sources beyond the model's limit are cut and counted on stderr. A source that the
model cannot read (for a model of words: an empty line, a digit) ends the command with its line's
number. Exit codes: 0 done, 2 usage, 3 data, 4 model files, 130 interrupted; with --output nothing
is written unless all is done.
"""


@dataclass(frozen=True)
class SampleArgs:
    """Options of the command."""

    model: Annotated[str, Positional]
    """Model folder."""
    input: Annotated[OptionalStr, arg(aliases=("-i",), metavar="FILE")] = None
    """Read this file (.gz is unpacked); default: standard input."""
    output: Annotated[OptionalStr, arg(aliases=("-o",), metavar="FILE")] = None
    """Write this file, whole or not at all; default: standard output."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """auto: jsonl for input files named so and where the first line is an object."""
    field_prefix: str = ""
    """jsonl: goes before the names of the fields that are added, for rows that have such fields."""
    steps: OptionalInt = None
    """Network calls per text; default: the model's own."""
    sampler: OptionalStr = None
    """Sampler of a teacher; default: the model's own."""
    temperature: OptionalFloat = None
    """Factor of all noise: below 1 texts are likelier and less diverse; default: the model's."""
    num_candidates: int = 1
    """Texts per source, each from its own noise; several need --mbr or jsonl."""
    mbr: bool = False
    """Keep the candidate that agrees most with the others (2 or more candidates)."""
    ipa: bool = False
    """Write pronunciations in IPA; jsonl gets them beside the phonemes, as `ipa`."""
    seed: int = 0
    """Row i has a seed of its own, derived from this one and i, as in evaluation; generate(seed=…)
    uses its seed as it is, and so gives other texts."""
    batch_size: int = 64
    """Texts per network call."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto (fp32 on a CPU, bf16 on a GPU), fp32, bf16, fp16, or int8 with --calibration."""
    backend: str = "auto"
    """What runs the network: auto, eager, compile, graph (CUDA) or openvino (CPU)."""
    calibration: Annotated[OptionalStr, arg(metavar="FILE")] = None
    """Prompts, some hundred like those to come, that int8 measures its scales on: one a line, or
    jsonl with src."""


@dataclass
class Count:
    """Rows so far."""

    rows: int = 0
    truncated: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code or raises a `DlmOneError` that carries it."""
    args = parse(
        SampleArgs, prog="python -m dlmone_fast.sample", description=DESCRIPTION, args=argv
    )
    if args.output is None:
        require_output("name a file with --output")
    lines = numbered_lines(args.input)
    jsonl, lines = is_jsonl(args.input, args.format, lines)
    _check(args, jsonl)
    calibration = calibration_prompts(args.calibration, args.dtype)
    # The first import of torch: usage errors above must not wait for it.
    from dlmone_fast.runtime import load_model

    generator = load_model(
        args.model, args.device, args.dtype, backend=args.backend, calibration=calibration
    )
    if args.ipa and generator.task != "g2p":
        raise UsageError(
            f"--ipa: {args.model} writes no phonemes (its task: {generator.task or 'unknown'}); "
            "leave it out, or name a model of the task g2p"
        )
    count = Count()
    sources = _sources(args, lines, jsonl)
    _write(args.output, _generated(args, generator, sources, jsonl, count))
    if count.truncated:
        limit = generator.settings.max_source_tokens
        print(
            f"{count.truncated} of {count.rows} sources were cut to {limit} tokens",
            file=sys.stderr,
        )
    return 0


def _check(args: SampleArgs, jsonl: bool) -> None:
    from dlmone_fast.evaluation.seeds import MAX_SEED

    if not 0 <= args.seed <= MAX_SEED:
        raise UsageError(f"--seed: expected 0 to {MAX_SEED}, got {args.seed}")
    if args.mbr and args.num_candidates < 2:
        raise UsageError("--mbr: needs candidates to choose from; add --num-candidates 10")
    if args.field_prefix and not jsonl:
        raise UsageError("--field-prefix: belongs to jsonl, and the output is text; leave it out")
    if args.num_candidates > 1 and not (args.mbr or jsonl):
        raise UsageError(
            f"--num-candidates {args.num_candidates}: text output has one line a source; add --mbr "
            "to keep the best one, or use --format jsonl"
        )


def _added(args: SampleArgs) -> list[str]:
    """Names of the fields that a row gets: its texts, how they sound, and whether it was cut."""
    texts = "candidates" if args.num_candidates > 1 and not args.mbr else "generated"
    names = [texts, *(["ipa"] if args.ipa else []), "truncated"]
    return [args.field_prefix + name for name in names]


def _sources(args: SampleArgs, lines: Iterator[tuple[int, bytes]], jsonl: bool) -> Iterator[Source]:
    added = _added(args)
    for number, line in lines:
        source = source_of(args.input, number, line, jsonl)
        if clash := taken(source.row, added):
            raise DataError(f"{_place(args, number)}: {clash}")
        yield source


def _place(args: SampleArgs, number: int) -> str:
    return f"{args.input or 'standard input'}, line {number}"


def _generated(
    args: SampleArgs, generator: Generator, sources: Iterator[Source], jsonl: bool, count: Count
) -> Iterator[bytes]:
    """Output bytes, one chunk a window of rows: memory does not grow with the input."""
    from tqdm import tqdm

    from dlmone_fast.evaluation.mbr import select_mbr
    from dlmone_fast.evaluation.seeds import row_seeds

    # tqdm's own None hides the bar when stderr is no terminal.
    with tqdm(desc="sample", unit="text", disable=None) as bar:
        while window := list(islice(sources, WINDOW)):
            longest = generator.tokenizer.max_chars
            places = [_place(args, count.rows + i) for i in range(1, len(window) + 1)]
            try:
                batch = generator.generate_candidates(
                    [source.text[:longest] for source in window],
                    num_candidates=args.num_candidates,
                    steps=args.steps,
                    seeds=row_seeds(args.seed, len(window), count.rows),
                    batch_size=args.batch_size,
                    sampler=args.sampler,
                    temperature=args.temperature,
                    on_overflow="truncate",
                    progress=False,
                    named=places.__getitem__,
                )
            except PromptError as error:
                raise DataError(
                    f"{error}; or use python -m dlmone_fast.generate_bulk, which sets such rows "
                    "aside"
                ) from error
            written = []
            for source, texts, cut in zip(window, batch.texts, batch.truncated, strict=True):
                truncated = cut or len(source.text) > longest
                count.truncated += truncated
                kept = [texts[select_mbr(texts)]] if args.mbr else texts
                written.append(
                    _jsonl(args, source, kept, truncated) if jsonl else _text(args, kept)
                )
            count.rows += len(window)
            bar.update(len(window))
            yield "".join(written).encode()


def _jsonl(args: SampleArgs, source: Source, texts: list[str], truncated: bool) -> str:
    columns = [texts, list(map(_spoken, texts))] if args.ipa else [texts]
    values = [column[0] if len(column) == 1 else column for column in columns]
    row = {**source.row, **dict(zip(_added(args), [*values, truncated], strict=True))}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _text(args: SampleArgs, texts: list[str]) -> str:
    return _line(_spoken(texts[0]) if args.ipa else texts[0])


def _spoken(text: str) -> str:
    return to_ipa(text, keep_unknown=True)


def _line(text: str) -> str:
    return " ".join(text.splitlines()) + "\n"


def _write(path: str | None, chunks: Iterator[bytes]) -> None:
    if path is None:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        return
    from dlmone_fast.files import write_atomically

    try:
        write_atomically(Path(path), chunks)
    except OSError as error:
        raise DataError(
            f"--output {path}: cannot be written ({error.strerror or error}); what was there is "
            "unchanged: free space or name another place"
        ) from error


if __name__ == "__main__":
    run_command(main)
