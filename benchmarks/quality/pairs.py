"""A teacher, its student and their data, from a run folder or from folders named one by one."""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dlmone_fast.config import Config, from_dict
from dlmone_fast.data.rows import Row, find_split, load_rows
from dlmone_fast.errors import DataError, ModelFileError, UsageError
from dlmone_fast.models.manifest import MANIFEST_NAME
from dlmone_fast.runtime import Generator, load_model

# One backend for every system of a table, so that its ratios are the method's alone.
BACKEND = "eager"


@dataclass(frozen=True)
class Pair:
    """Folders of a teacher, a student and their data; the models are loaded when first used.

    Attributes:
        teacher, student: model folders; None where there is none.
        data_dir: folder with test.jsonl.
        named: the task, where the run folder's configuration says so.
    """

    teacher_folder: Path | None
    student_folder: Path | None
    data_dir: Path
    device: str = "auto"
    precision: str = "fp32"
    named: str = ""

    @cached_property
    def teacher(self) -> Generator:
        """The loaded teacher."""
        return self._load(self.teacher_folder, "teacher")

    @cached_property
    def student(self) -> Generator:
        """The loaded student."""
        return self._load(self.student_folder, "student")

    @cached_property
    def undistilled(self) -> Generator:
        """θ = φ: the teacher called once at t_init, as the student is."""
        settings, tokenizer = self.student.settings, self.student.tokenizer
        return Generator(self.teacher.denoiser, tokenizer, settings, self.precision)

    @property
    def implementation(self) -> str:
        """The implementation's name in rows of records."""
        return f"dlmone_fast {BACKEND} {self.precision}"

    @cached_property
    def task(self) -> str:
        """The task of the run or the models, else the data folder's name."""
        models = (self.student_folder, self.teacher_folder)
        known = [self.named, *(_task(folder) for folder in models if folder)]
        return next(filter(None, known), self.data_dir.resolve().name.replace("_", "-"))

    @property
    def is_grammar(self) -> bool:
        """True if the task's texts can be judged exactly."""
        return self.task.startswith("grammar")

    def rows(self, limit: int) -> list[Row]:
        """The first rows of the test split; 0: all."""
        return load_rows(self.data_dir, "test", limit or None)

    def load(self, folder: Path) -> Generator:
        """A further model of the pair, as the two are loaded."""
        return load_model(folder, self.device, self.precision, backend=BACKEND)

    def check_vocabulary(self) -> None:
        """Refuse a teacher and a student that do not share their tokens."""
        of_teacher, of_student = (
            model.denoiser.config.vocab_size for model in (self.teacher, self.student)
        )
        if of_teacher != of_student:
            raise UsageError(
                f"--teacher {self.teacher_folder} has {of_teacher} tokens and --student "
                f"{self.student_folder} has {of_student}; name a student and its own teacher"
            )

    def _load(self, folder: Path | None, kind: str) -> Generator:
        if folder is None:
            raise UsageError(f"--{kind} is missing: this measurement needs one")
        model = self.load(folder)
        if model.settings.kind != kind:
            raise UsageError(f"--{kind} {folder}: is a {model.settings.kind}, expected a {kind}")
        return model


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """--run, or --teacher, --student and --data-dir; device and precision."""
    add = parser.add_argument
    add("--run", type=Path, metavar="RUN", help="finished run folder: its teacher, last student "
        "and data")  # fmt: skip
    add("--teacher", type=Path, metavar="FOLDER", help="model folder of a teacher")
    add("--student", "--model", type=Path, metavar="FOLDER", help="model folder of a student")
    add("--data-dir", type=Path, metavar="DIR", help="folder with test.jsonl; default: the run's")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"),
        help="of every network alike (default: %(default)s)")  # fmt: skip


def open_pair(options: argparse.Namespace) -> Pair:
    """The pair that the options name.

    Raises:
        UsageError: options that contradict each other, or name nothing.
        DataError, ModelFileError: a folder that does not hold what it should.
    """
    where = {"device": options.device, "precision": options.dtype}
    if options.run is None:
        if options.data_dir is None or not (options.teacher or options.student):
            raise UsageError(
                "name a finished run with --run RUN, or models with --teacher and --student and "
                "their data with --data-dir"
            )
        find_split(options.data_dir, "test")
        return Pair(options.teacher, options.student, options.data_dir, **where)
    if options.teacher or options.student:
        raise UsageError(
            "--run names teacher and student already; give it alone, or --teacher and --student "
            "without it"
        )
    config = run_config(options.run)
    # The paper reports Wiki-Auto's student of stage 1 (Table 1).
    stages = ("stage1", "stage2") if config.data.task == "wiki-auto" else ("stage2", "stage1")
    students = [model for name in stages if (model := model_of(options.run, name))]
    data_dir = options.data_dir or data_of(options.run, config)
    find_split(data_dir, "test")
    teacher, student = model_of(options.run, "teacher"), students[0] if students else None
    return Pair(teacher, student, data_dir, **where, named=config.data.task)


def run_config(root: Path) -> Config:
    """The resolved configuration of a run folder."""
    file = root / "config.toml"
    try:
        return from_dict(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelFileError(
            f"--run {root}: config.toml cannot be read ({error.strerror}); name a run folder of "
            "python -m dlmone_fast.train"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{file}: is not a run's configuration ({error})") from error


def model_of(root: Path, phase: str) -> Path | None:
    """The model folder of a finished phase of a run."""
    return root / phase if (root / phase / MANIFEST_NAME).exists() else None


def data_of(root: Path, config: Config) -> Path:
    """The data folder of a run."""
    if config.is_grammar:
        return root / "data"
    if not config.data_dir:
        raise DataError(f"--run {root}: its configuration names no data; give --data-dir")
    return Path(config.data_dir)


def _task(folder: Path) -> str:
    from dlmone_fast.models.folder import load_folder

    source = load_folder(folder).config.get("source")
    return str(source.get("task", "")) if isinstance(source, dict) else ""
