"""`python -m dlmone_fast.import_diffuseq`: an original DiffuSeq checkpoint to a model folder."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from dlmone_fast.cli import OptionalStr, parse, run_command
from dlmone_fast.errors import UsageError

if TYPE_CHECKING:
    from dlmone_fast.models.diffuseq import ImportReport


@dataclass(frozen=True)
class Args:
    checkpoint_dir: Annotated[str, Positional]
    """Folder with ema_*_<step>.pt and training_args.json."""
    out: Annotated[str, Positional]
    """Model folder to write."""
    embedding: Literal["raw", "ema"] = "raw"
    """Embedding matrix: raw, as the official sampler uses it, or ema."""
    checkpoint: OptionalStr = None
    """The .pt file; default: the highest step in the folder."""
    vocab: OptionalStr = None
    """The checkpoint's vocab.txt; without it the model folder has no tokenizer."""
    cased: bool = False
    """The vocabulary is a cased one: keep capitals."""
    uncased: bool = False
    """The vocabulary is an uncased one: lower-case, and strip accents as BERT does. Default of
    both: what training_args.json names (config_name), or else what the vocabulary's words are."""
    overwrite: bool = False
    """Replace a model folder at OUT."""


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one checkpoint; see `dlmone_fast.models.diffuseq.import_teacher`."""
    args = parse(
        Args,
        prog="python -m dlmone_fast.import_diffuseq",
        description="Convert an original DiffuSeq checkpoint into a model folder.",
        args=argv,
    )
    if args.cased and args.uncased:
        raise UsageError("--cased and --uncased: a vocabulary is one of them; leave one out")
    # torch is imported here, after parsing, so that --help stays fast.
    from dlmone_fast.models.diffuseq import import_teacher

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        report = import_teacher(
            args.checkpoint_dir,
            args.out,
            embedding=args.embedding,
            checkpoint=args.checkpoint,
            vocab=args.vocab,
            lowercase=not args.cased if args.cased or args.uncased else None,
            overwrite=args.overwrite,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(_summary(report))


def _summary(report: ImportReport) -> str:
    model, diffusion = report.model, report.diffusion
    lines = [
        f"read       {report.checkpoint}",
        f"model      {report.num_parameters:,} parameters: {model.num_layers} layers, width "
        f"{model.hidden_size}, {model.num_heads} heads, vocabulary {model.vocab_size:,}, length "
        f"{model.seq_len}",
        f"diffusion  {diffusion.num_timesteps} steps, {diffusion.schedule} schedule",
        f"embedding  {report.embedding}",
        f"wrote      {report.path}",
    ]
    if report.has_tokenizer:
        text = "lower-cased, accents stripped" if report.lowercase else "with capitals and accents"
        lines.insert(-1, f"tokenizer  {text}")
        lines.append(f"next       python -m dlmone_fast.sample {report.path} < in.txt > out.txt")
    else:
        lines.append(
            "next       dlmone_fast.load_teacher(folder); for text, import again with "
            "--vocab vocab.txt --overwrite"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
