"""The phases of a run, from configuration to model folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from dlmone_fast.aligned_tokenizer import read_tokenizer
from dlmone_fast.config import Config
from dlmone_fast.data.check import check_splits
from dlmone_fast.errors import ConfigError, ModelFileError, UsageError
from dlmone_fast.files import real_path
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import ModelFolder, load_folder
from dlmone_fast.models.manifest import MANIFEST_NAME
from dlmone_fast.text_tokenizer import TextTokenizer
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.lock import only_training_in
from dlmone_fast.training.loop import run_phase
from dlmone_fast.training.owned import MODEL_FOLDERS
from dlmone_fast.training.pairs_phase import Pairs, PairsPhase, load_pairs
from dlmone_fast.training.publish import publish
from dlmone_fast.training.ranks import Ranks, open_ranks
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.workspace import (
    PHASES,
    Workspace,
    open_workspace,
    run_folder,
    tokenizer_of_file,
)

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class RunResult:
    """What a run has produced: its folder, and the model folders of finished phases."""

    root: Path
    workspace: Workspace
    teacher: Path | None
    student: Path | None


def train_teacher(config: Config, resume: StrPath = "auto") -> Path:
    """Train a teacher; returns its model folder. A finished one is returned as it is.

    Args:
        config: see `dlmone_fast.resolve`.
        resume: "auto" continues from the newest intact checkpoint, "never" starts over (and
            removes what an earlier run wrote into the folder), a path continues from that
            checkpoint.
    """
    result = run(config, "teacher", resume=resume)
    assert result.teacher is not None
    return result.teacher


def distill(config: Config, teacher: StrPath = "", resume: StrPath = "auto") -> Path:
    """Distil a teacher in two stages; returns the student's model folder.

    Args:
        config: see `dlmone_fast.resolve`.
        teacher: a model folder; empty: the run's own teacher, which must be trained.
        resume: as for `train_teacher`; "never" keeps the run's own teacher.
    """
    _check_data(config, ("train", "valid"))
    with _alone_in_the_folder(config) as ranks:
        return _distill_in_two_stages(config, teacher, resume, ranks)


def _distill_in_two_stages(config: Config, teacher: StrPath, resume: StrPath, ranks: Ranks) -> Path:
    workspace, folder = _open_with_teacher(config, teacher, "auto", None, ranks)
    phases = _after_the_teacher(workspace.config)
    _check_pairs_are_read(workspace.config)
    if resume == "never":
        workspace.clear(*phases)
    for phase in phases:
        unfinished = not workspace.finished(phase)
        _distill(workspace, phase, folder, resume)
        # A given checkpoint belongs to the first unfinished phase.
        resume = "auto" if unfinished else resume
    return workspace.model("stage2")


def run(
    config: Config,
    phase: str = "all",
    teacher: StrPath = "",
    resume: StrPath = "auto",
    started: float | None = None,
    keep: Sequence[StrPath] = (),
) -> RunResult:
    """Run one phase or all of them in a run folder; finished phases are not run again.

    Args:
        config: see `dlmone_fast.resolve`.
        phase: teacher, pairs, stage1, stage2, or all (pairs only if the configuration has any).
        teacher: a model folder to distil instead of training a teacher.
        resume: "auto", "never" (start over), or the path of a checkpoint of `phase`.
        started: since when `max_minutes` counts, by `time.monotonic()`; None: now.
        keep: files and folders of the caller's, beside `data_dir`, that are never removed or
            replaced, though they lie in the run folder.

    Raises:
        UsageError: arguments that contradict each other, another training in the run folder, or
            files there that no run wrote.
        DataError: data files are missing or malformed.
        DlmOneError: whatever stops a phase; see `training.loop.run_phase`.
    """
    if phase not in (*PHASES, "all"):
        raise UsageError(f"phase must be one of {', '.join(PHASES)}, all; got {phase!r}")
    if phase == "all" and resume not in ("auto", "never"):
        raise UsageError("a checkpoint to resume from needs its --phase; got --phase all")
    if teacher and phase == "teacher":
        raise UsageError("--teacher names a teacher to distil; it cannot go with --phase teacher")
    if phase == "pairs" and not config.distill.pairs.count:
        raise UsageError("--phase pairs has nothing to make: set --distill.pairs.count")
    if phase == "all":
        _check_pairs_are_read(config)
    tested = ("test",) if phase in ("stage2", "all") else ()
    _check_data(config, ("train", "valid", *tested))
    with _alone_in_the_folder(config) as ranks:
        return _run_phases(config, phase, teacher, resume, started, ranks, keep)


@contextmanager
def _alone_in_the_folder(config: Config) -> Iterator[Ranks]:
    """The run's processes, while no other training is in its folder."""
    with (
        open_ranks(config.device, config.rank_minutes) as ranks,
        only_training_in(run_folder(config)) if ranks.writes else nullcontext(),
    ):
        yield ranks


def _run_phases(
    config: Config,
    phase: str,
    teacher: StrPath,
    resume: StrPath,
    started: float | None,
    ranks: Ranks,
    keep: Sequence[StrPath],
) -> RunResult:
    start_over = "never" if resume == "never" else "auto"
    if phase in ("teacher", "all") and not teacher:
        workspace = open_workspace(config, None, start_over, started, ranks, keep)
        _train_teacher(workspace, "auto" if resume == "never" else resume)
        folder = workspace.model("teacher")
    else:
        workspace, folder = _open_with_teacher(
            config, teacher, start_over if phase == "all" else "auto", started, ranks, keep
        )
    for name in _after_the_teacher(workspace.config):
        if phase in (name, "all"):
            if resume == "never":
                workspace.clear(name)
            _distill(workspace, name, folder, "auto" if resume == "never" else resume)
    students = [workspace.model(p) for p in ("stage2", "stage1") if workspace.finished(p)]
    return RunResult(
        workspace.root,
        workspace,
        folder if os.path.exists(folder / MANIFEST_NAME) else None,
        students[0] if students else None,
    )


def with_teacher(config: Config, folder: ModelFolder) -> Config:
    """The configuration with the model and diffusion of a teacher to distil.

    Raises:
        UsageError: the folder's model is a student.
    """
    if folder.config["kind"] != "teacher":
        raise UsageError(
            f"teacher {folder.path}: holds a {folder.config['kind']}, which is distilled already; "
            "name the model folder of a teacher, as RUN/teacher of a training run is"
        )
    denoiser = denoiser_from_folder(folder)
    return replace(config, model=denoiser.config, diffusion=denoiser.schedule.config)


def _check_data(config: Config, required: tuple[str, ...]) -> None:
    # The comparison that ends a run reads the test split: found now rather than after all training.
    # A grammar is yet to be written, and a missing data_dir is open_workspace's to tell.
    if config.data_dir and not config.is_grammar:
        check_splits(config.data_dir, config.data.max_chars, required)


def _check_pairs_are_read(config: Config) -> None:
    c = config.distill
    if c.pairs.count and not (c.stage1.anchored or c.stage2.anchored):
        raise ConfigError(
            f"distill.pairs.count is {c.pairs.count}, and neither stage reads the pairs: set "
            "anchor_steps, or anchor_weight and anchor_decay_steps, of a stage; or count to 0"
        )


def _train_teacher(workspace: Workspace, resume: StrPath) -> None:
    inputs = workspace.inputs()
    if workspace.finished("teacher", inputs):
        return
    workspace.check_time("the teacher")
    phase = TeacherPhase(workspace, inputs)
    run_phase(phase, workspace, resume)
    publish(workspace, phase, phase.averaged(), f"EMA at step {phase.steps}")


def _after_the_teacher(config: Config) -> tuple[str, ...]:
    return ("pairs", "stage1", "stage2") if config.distill.pairs.count else ("stage1", "stage2")


def _make_pairs(workspace: Workspace, teacher_folder: Path, resume: StrPath) -> None:
    inputs = workspace.inputs(teacher=teacher_folder)
    if not workspace.finished("pairs", inputs):
        workspace.check_time("the pairs")
        teacher = denoiser_from_folder(load_folder(teacher_folder)).to(workspace.device)
        run_phase(PairsPhase(workspace, teacher, inputs), workspace, resume)


def _distill(workspace: Workspace, name: str, teacher_folder: Path, resume: StrPath) -> None:
    if name == "pairs":
        _make_pairs(workspace, teacher_folder, resume)
        return
    start_folder = teacher_folder if name == "stage1" else workspace.model("stage1")
    if name == "stage2" and not workspace.finished("stage1"):
        raise UsageError(
            f"--phase stage2 starts from the best student of stage 1, and {start_folder} is not "
            "there; run --phase stage1 first"
        )
    inputs = workspace.inputs(teacher=teacher_folder, start=start_folder)
    pairs = None
    if getattr(workspace.config.distill, name).anchored:
        pairs, inputs["pairs"] = _pairs_of(workspace, name, teacher_folder)
    if workspace.finished(name, inputs):
        return
    workspace.check_time(name)
    teacher, start = (
        denoiser_from_folder(load_folder(folder)).to(workspace.device)
        for folder in (teacher_folder, start_folder)
    )
    phase = DistillPhase(workspace, int(name[-1]), teacher, start.lm.backbone, inputs, pairs)
    run_phase(phase, workspace, resume)
    publish(workspace, phase, phase.student(phase.best), phase.best_of)


def _pairs_of(workspace: Workspace, name: str, teacher_folder: Path) -> tuple[Pairs, str]:
    if not workspace.finished("pairs", workspace.inputs(teacher=teacher_folder)):
        raise UsageError(
            f"--phase {name} is anchored to the teacher's paired endpoints, and "
            f"{workspace.checkpoints('pairs')} does not hold all of them; run --phase pairs first"
        )
    return load_pairs(workspace)


def _open_with_teacher(
    config: Config,
    teacher: StrPath,
    resume: str,
    started: float | None = None,
    ranks: Ranks | None = None,
    keep: Sequence[StrPath] = (),
) -> tuple[Workspace, Path]:
    if not teacher:
        workspace = open_workspace(config, started=started, ranks=ranks, keep=keep)
        folder = workspace.model("teacher")
        if not workspace.finished("teacher"):
            raise UsageError(
                f"{folder} is not there: train it with --phase teacher, or name a teacher's "
                "model folder with --teacher"
            )
        return workspace, folder
    folder = Path(teacher)
    root = run_folder(config)
    if resume == "never" and _is_of_the_run(folder, root):
        raise UsageError(
            f"--resume never would remove the teacher {folder}, which lies in the run folder; "
            "use another --output-dir, or --phase stage1 and then --phase stage2"
        )
    loaded = load_folder(folder)
    config = with_teacher(config, loaded)
    tokenizer = teacher_tokenizer(config, loaded)
    keep = (*keep, folder)
    return open_workspace(config, tokenizer, resume, started, ranks, keep), folder


def _is_of_the_run(folder: Path, root: Path) -> bool:
    return real_path(folder) in [real_path(root / name) for name in MODEL_FOLDERS]


def teacher_tokenizer(config: Config, folder: ModelFolder) -> TextTokenizer:
    """The tokenizer of a teacher to distil: its folder's, else the configured vocabulary.

    Raises:
        ModelFileError: there is neither.
    """
    saved = folder.tokenizer_path
    tokenizer: TextTokenizer
    if saved is not None:
        tokenizer = read_tokenizer(saved, folder.files[saved.name].sha256)
    elif config.data.vocab_file:
        tokenizer = tokenizer_of_file(config, Path(config.data_dir))
    else:
        raise ModelFileError(
            f"{folder.path} has no tokenizer.json; import the checkpoint again with --vocab, or "
            "name its vocabulary with --data.vocab-file"
        )
    return tokenizer
