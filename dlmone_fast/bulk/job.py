"""A bulk job: its folder, which says what it is and which shards are done.

OUT/job.json             input files, options and model that every part of the output comes from
OUT/part-N.jsonl         rows of shard N with their ids and texts, in order
OUT/part-N.rejects.jsonl rows that have none, with the reason, if there are any
OUT/part-N.done.json     counts and time; written last: without it the shard is made again
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlmone_fast.bulk.shards import Shard, input_files
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.files import write_atomically
from dlmone_fast.models.commit import complete_path
from dlmone_fast.models.manifest import MANIFEST_NAME, hash_file, read_manifest

JOB_NAME = "job.json"
_AGAIN = "remove it, and run the same command again"


@dataclass(frozen=True)
class Options:
    """What decides the output: a job is continued only with the same.

    Device, precision and backend are what the workers have, never "auto", whose meaning changes
    from machine to machine: `dlmone_fast.bulk.resolve` names them.
    """

    model: str
    column: str = "src"
    id_column: str = ""
    rows_per_shard: int = 10_000
    num_candidates: int = 1
    steps: int | None = None
    sampler: str | None = None
    temperature: float | None = None
    field_prefix: str = ""
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    backend: str = "eager"

    @property
    def added(self) -> tuple[str, str, str]:
        """Names of the fields that a row gets: its id, its text or texts, whether it was cut."""
        texts = "generated" if self.num_candidates == 1 else "candidates"
        id_name, texts_name, cut_name = (
            self.field_prefix + name for name in ("row_id", texts, "truncated")
        )
        return id_name, texts_name, cut_name


@dataclass(frozen=True)
class Done:
    """What became of a shard."""

    rows: int
    rejected: int
    truncated: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A job's input, output folder and options."""

    source: Path
    output: Path
    options: Options

    def open(self) -> None:
        """Create the folder, or find it made by the same job.

        Raises:
            UsageError: the folder holds another job, or files of something else.
            ModelFileError: there is no model where the options name one.
            DataError: it cannot be written.
        """
        described, file = self._described(), self.output / JOB_NAME
        if os.path.lexists(file):
            self._check_same(_read_object(file), described)
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            if any(self.output.iterdir()):
                raise UsageError(
                    f"{self.output}: holds files and no {JOB_NAME}; name an empty or a new folder"
                )
        except OSError as error:
            raise DataError(
                f"{self.output}: cannot be made ({error.strerror or error}); name another folder"
            ) from error
        self.write(file, [json.dumps(described, indent=1).encode()])

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that are not done."""
        return [shard for shard in shards if not os.path.exists(self.done_file(shard))]

    def done(self, shard: Shard) -> Done:
        """What became of a shard that is done."""
        file = self.done_file(shard)
        try:
            return Done(**_read_object(file))
        except TypeError as error:
            raise DataError(f"{file}: is not what a bulk job wrote ({error}); {_AGAIN}") from error

    def done_file(self, shard: Shard) -> Path:
        """What proves that a shard is done."""
        return self.output / f"{shard.name}.done.json"

    def rejects_file(self, shard: Shard) -> Path:
        """Rows of a shard that have no text, with the reason; not there if there are none."""
        return self.output / f"{shard.name}.rejects.jsonl"

    def write(self, file: Path, chunks: Iterable[bytes]) -> None:
        """Write a file of the job's folder, whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        try:
            write_atomically(file, chunks)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be written ({error.strerror or error}); finished shards are kept: "
                "free space or correct the rights, and run it again"
            ) from error

    def _described(self) -> dict[str, Any]:
        model = complete_path(self.options.model)
        read_manifest(model)
        files = {str(file): _stamp(file) for file in input_files(self.source)}
        options = asdict(self.options) | {"model": hash_file(model / MANIFEST_NAME)}
        return {"input": files, "options": options}

    def _check_same(self, before: Any, now: dict[str, Any]) -> None:
        changed = ["input"] if before.get("input") != now["input"] else []
        # A job of a version without an option had its default.
        had = asdict(Options(model="")) | before.get("options", {})
        has = now["options"]
        differ = [key for key, value in has.items() if had.get(key) != value]
        # What was settled for "auto" nobody typed; a model's hash tells nobody anything.
        shown = [f"{key} {had.get(key)}, not {has[key]}" for key in differ if key != "model"]
        values = f" ({'; '.join(shown)})" if shown else ""
        if changed or differ:
            raise UsageError(
                f"{self.output}: holds a job with another {' and '.join(changed + differ)}"
                f"{values}; give the same to continue it, or name a new folder"
            )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object, got {type(content).__name__}; {_AGAIN}")
    return content


def _stamp(file: Path) -> list[int]:
    """Size and time of the last change."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); correct or remove it"
        ) from error
    return [status.st_size, status.st_mtime_ns]
