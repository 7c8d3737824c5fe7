"""Figure 4: a third stage of distillation, measured while it trains.

It has stage 2's configuration, starts θ from stage 2's student and ψ from the teacher, as each
stage does, and draws rows and noise of its own. θ is measured as it stands, not its moving average
and not the best so far. The finished run folder is only read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.records import Score
from benchmarks.paper.figures import SENTENCE_METRICS, Say, sentence_scores
from benchmarks.paper.lines import evaluate, measured_note, require
from benchmarks.quality.curves import Figure, Point
from benchmarks.quality.pairs import Pair, model_of, run_config
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.devices import pick_device
from dlmone_fast.models.folder import load_folder
from dlmone_fast.runtime import Generator
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.workspace import Workspace, writing

_POINTS = 10
_STAGE = 3


def figure_4(pair: Pair, options: argparse.Namespace, say: Say) -> Figure:
    """Quality of the student as it trains on, every `options.every` steps of θ."""
    run: Path = require(options, "run", "Figure 4 trains the student of a finished run on")
    _check_output(run, options.output_dir)
    points: list[Point] = []
    copied: dict[str, Score] = {}
    with _folder(options.output_dir) as output:
        phase = third_stage(run, pair.data_dir, output, options.steps, options.device)
        steps = phase.config.steps
        every = options.every or max(1, steps // _POINTS)
        for step in _trained(phase, every):
            say(f"stage {_STAGE}: {step} of {steps} steps")
            result = evaluate(pair, _student(phase, pair), options, steps=1)
            n = result["run"]["rows"]
            points.append(Point(f"θ, stage {_STAGE}", step, sentence_scores(result), n))
            copied = sentence_scores(result["baselines"]["copy"])
    title = f"{pair.task}: a third stage"
    note = measured_note(options, options.candidates)
    return Figure(title, "training step", SENTENCE_METRICS, points, copied, note=note)


def third_stage(
    run: Path, data_dir: Path, output: Path, steps: int | None, device: str
) -> DistillPhase:  # fmt: skip
    """The stage, ready to train.

    Args:
        run: a finished run folder.
        data_dir: its data.
        output: where caches are written.
        steps: updates of θ; None: as many as stage 2's.
    """
    teacher_folder, start_folder = model_of(run, "teacher"), model_of(run, "stage2")
    if teacher_folder is None or start_folder is None:
        missing = "teacher" if teacher_folder is None else "stage2"
        raise ModelFileError(
            f"{run}: holds no finished {missing}, which a third stage starts from; finish the run"
        )
    config = run_config(run)
    if steps is not None:
        stage = replace(config.distill.stage2, steps=steps)
        config = replace(config, distill=replace(config.distill, stage2=stage))
    tokenizer = Tokenizer.from_file(run / "tokenizer.json")
    tokenizer.max_chars = config.data.max_chars
    target = pick_device(device)
    workspace = Workspace(config, output, data_dir, target, tokenizer)
    teacher, start = (
        denoiser_from_folder(load_folder(folder)).to(target)
        for folder in (teacher_folder, start_folder)
    )
    return DistillPhase(workspace, _STAGE, teacher, start.lm.backbone, inputs={})


def _trained(phase: DistillPhase, every: int) -> Iterator[int]:
    """Train; yields before the first, after every so many, and after the last of θ's updates."""
    warmup, steps = phase.config.score_warmup_steps, phase.config.steps
    device = phase.workspace.device
    yield 0
    # Dropout draws from torch's global generators, which are the caller's.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(phase.steps):
            phase.update(step)
            done = step + 1 - warmup
            if done > 0 and (done % every == 0 or done == steps):
                yield done


def _student(phase: DistillPhase, pair: Pair) -> Generator:
    """The student with the weights of now, generating as stage 2's does."""
    weights = {name: value.detach() for name, value in phase.stage.generator.named_parameters()}
    settings, tokenizer = pair.student.settings, pair.student.tokenizer
    return Generator(phase.student(weights), tokenizer, settings, pair.precision)


def _check_output(run: Path, output: Path | None) -> None:
    if output is not None and output.resolve().is_relative_to(run.resolve()):
        raise UsageError(
            f"--output-dir {output}: lies in the run folder {run}, which is only read; name another"
        )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
