"""The command `python -m dlmone_fast.evaluate`: score a model or files of generations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from dlmone_fast.cli import (
    OptionalFloat,
    OptionalInt,
    OptionalStr,
    OptionalStrs,
    parse,
    require_output,
    run_command,
)
from dlmone_fast.errors import UsageError
from dlmone_fast.sources import calibration_prompts

if TYPE_CHECKING:
    from dlmone_fast.evaluation.run import ExactMetrics

DESCRIPTION = """Score a model on a data split, or DiffuSeq's generation files.

Give either MODEL with --data-dir, or --generations. Prints two tables with the copy-the-source
and reference rows, or, for the task g2p, one of word and phoneme error rates; --json prints one
object instead. Exit codes: 0 done, 2 usage, 3 data, 4 model files.
"""


# Options of generating, which files of generations have behind them.
_OF_A_MODEL = (
    "split", "num_candidates", "steps", "sampler", "temperature", "batch_size", "device", "dtype",
    "backend", "calibration", "joint_truncation", "generations_dir",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateArgs:
    """Options of the command."""

    model: Annotated[OptionalStr, Positional] = None
    """Model folder to generate with."""
    data_dir: OptionalStr = None
    """Folder with {train,valid,test}.jsonl[.gz]."""
    generations: Annotated[OptionalStrs, arg(metavar="FILE...")] = None
    """Generation files to score instead of a model: one jsonl a seed, the same rows in each."""
    split: str = "test"
    """Split to evaluate on: train, valid or test."""
    num_candidates: int = 1
    """Texts per source; scores are means over them."""
    mbr: bool = False
    """Also score the candidate that agrees most with the others (2 or more candidates)."""
    steps: OptionalInt = None
    """Network calls per text; default: the model's own."""
    sampler: OptionalStr = None
    """Sampler name; default: the model's own."""
    temperature: OptionalFloat = None
    """Factor of all noise: below 1 texts are likelier and less diverse; default: the model's."""
    seed: int = 0
    """Seed of generation and of the bootstrap."""
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
    max_rows: int = 0
    """Use the first rows only; 0: all."""
    bootstrap: int = 1000
    """Resamples of the 95 % intervals; 0: none."""
    joint_truncation: bool = False
    """Cut source and reference together, as DiffuSeq does, not the source to the model's limit."""
    task: OptionalStr = None
    """Adds the task's own rows or exact metrics; default: the model's task, or the data folder's
    name."""
    bertscore_model: OptionalStr = None
    """Local model folder for BERTScore."""
    bertscore_layer: OptionalInt = None
    """Hidden layer for BERTScore; default: the last."""
    generations_dir: OptionalStr = None
    """Also write the generated texts there, one DiffuSeq file per candidate."""
    json: bool = False
    """Print one JSON object instead of tables."""
    output: OptionalStr = None
    """Also write the JSON object to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code or raises a `DlmOneError` that carries it."""
    args = parse(
        EvaluateArgs, prog="python -m dlmone_fast.evaluate", description=DESCRIPTION, args=argv
    )
    _check(args)
    if args.output:
        from dlmone_fast.evaluation.generations import check_writable

        check_writable(args.output)
    else:
        require_output("name a file with --output")
    task = _task(args)
    if args.generations:
        result = _from_files(args, task)
    else:
        task, result = _from_model(args, task)
    document = json.dumps(result, indent=2, allow_nan=False)
    if args.output:
        from dlmone_fast.evaluation.generations import write_text

        # Before anything is printed: where that fails, the result is kept.
        write_text(args.output, document + "\n")
    if args.json:
        print(document)
    else:
        from dlmone_fast.evaluation.report import format_report

        name = Path(args.model).name if args.model else "generations"
        print(format_report(result, name=name, task=task))
    return 0


def _check(args: EvaluateArgs) -> None:
    if bool(args.model) == bool(args.generations):
        raise UsageError(
            "expected either MODEL with --data-dir, or --generations FILE..., got "
            f"{'both' if args.model else 'neither'}; see --help."
        )
    if args.model and not args.data_dir:
        raise UsageError("--data-dir: MODEL needs a folder with {train,valid,test}.jsonl.")
    if args.generations and args.data_dir:
        raise UsageError(
            "--data-dir: generation files hold their own sources and references; leave it out."
        )
    if args.generations:
        _check_of_a_model(args)
    if args.bertscore_layer is not None and args.bertscore_model is None:
        raise UsageError("--bertscore-layer: belongs to --bertscore-model DIR; leave it out.")
    candidates = len(args.generations) if args.generations else args.num_candidates
    if args.mbr and candidates < 2:
        way = "name several --generations files" if args.generations else "add --num-candidates 10"
        raise UsageError(f"--mbr: needs candidates to choose from; {way}.")


def _check_of_a_model(args: EvaluateArgs) -> None:
    for item in fields(args):
        if item.name in _OF_A_MODEL and getattr(args, item.name) != item.default:
            flag = item.name.replace("_", "-")
            raise UsageError(
                f"--{flag}: belongs to MODEL, and --generations files are scored as they are; "
                "leave it out."
            )


def _task(args: EvaluateArgs) -> str:
    """The named task, or the data folder's name where that is a task with tables of its own."""
    from dlmone_fast.tasks.paper import TASK_TITLES

    exact = ("grammar", "grammar-templates", "g2p")
    if args.task is not None:
        if args.task not in (*TASK_TITLES, *exact):
            names = ", ".join((*TASK_TITLES, *exact))
            raise UsageError(f"--task: expected one of {names}, got {args.task!r}.")
        return args.task
    folder = Path(args.data_dir or "").name.replace("_", "-")
    return folder if folder in (*TASK_TITLES, "g2p") else ""


def _from_files(args: EvaluateArgs, task: str) -> dict[str, Any]:
    from dlmone_fast.evaluation.run import evaluate_generations

    return evaluate_generations(
        args.generations or (),
        mbr=args.mbr,
        max_rows=args.max_rows,
        bootstrap=args.bootstrap,
        seed=args.seed,
        bertscore_model=args.bertscore_model,
        bertscore_layer=args.bertscore_layer,
        exact=_exact_metrics(task),
        task=task,
    )


def _from_model(args: EvaluateArgs, task: str) -> tuple[str, dict[str, Any]]:
    calibration = calibration_prompts(args.calibration, args.dtype)
    # The first import of torch: usage errors above must not wait for it.
    from dlmone_fast.evaluation.run import evaluate_model
    from dlmone_fast.runtime import load_model

    model = load_model(
        str(args.model), args.device, args.dtype,
        backend=args.backend, calibration=calibration,
    )  # fmt: skip
    task = task or model.task
    return task, evaluate_model(
        model,
        args.data_dir,
        split=args.split,
        num_candidates=args.num_candidates,
        mbr=args.mbr,
        steps=args.steps,
        sampler=args.sampler,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size,
        max_rows=args.max_rows,
        bootstrap=args.bootstrap,
        bertscore_model=args.bertscore_model,
        bertscore_layer=args.bertscore_layer,
        joint_truncation=args.joint_truncation,
        exact=_exact_metrics(task),
        task=task,
        generations_dir=args.generations_dir,
    )


def _exact_metrics(task: str) -> ExactMetrics | None:
    """Metrics that a task can decide exactly; only the generated grammars have any."""
    if not task.startswith("grammar"):
        return None
    from dlmone_fast.tasks.grammar import score

    def summary(sources: list[str], candidates: list[list[str]]) -> dict[str, Any]:
        # Without the lists per sample, which are for code and not for a report.
        scores = score(sources, candidates)
        return {key: value for key, value in scores.items() if isinstance(value, int | float)}

    return summary


if __name__ == "__main__":
    run_command(main)
