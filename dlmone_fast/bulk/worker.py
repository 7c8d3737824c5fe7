"""What makes one shard: read its rows, generate, write."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from dlmone_fast.bulk.job import Done, Job
from dlmone_fast.bulk.shards import InputRow, Shard, read_shard
from dlmone_fast.errors import PromptError, UsageError
from dlmone_fast.runtime import Generator
from dlmone_fast.sources import taken

_WINDOW = 4096
_SHOWN = 1000


class ShardWriter:
    """Generates for shards of a job, one after the other.

    What it writes is a function of the rows, their ids and the job's options; neither the batch
    nor the worker that a row falls to changes it.

    Args:
        job: the job.
        generator: its model.
        batch_size: texts a network call.

    Raises:
        UsageError: the model runs otherwise than the job's options say; texts would not match.
    """

    def __init__(self, job: Job, generator: Generator, batch_size: int) -> None:
        _check_same_engine(job, generator)
        self.job, self.generator, self.batch_size = job, generator, batch_size

    def write(self, shard: Shard) -> Done:
        """Write a shard's files; what proves that it is done comes last.

        Raises:
            DataError: the input cannot be read on, or the output not be written.
        """
        started, job, options = time.perf_counter(), self.job, self.job.options
        rejects: list[bytes] = []
        counts = {"rows": 0, "truncated": 0}
        rows = read_shard(shard, options.column, options.id_column)
        part = job.output / f"{shard.name}.jsonl"
        job.write(part, self._chunks(rows, rejects, counts))
        refused = job.rejects_file(shard)
        if rejects:
            job.write(refused, rejects)
        else:
            # Of an attempt that was killed.
            refused.unlink(missing_ok=True)
        done = Done(
            rows=counts["rows"], rejected=len(rejects), truncated=counts["truncated"],
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        job.write(job.done_file(shard), [json.dumps(asdict(done)).encode()])
        return done

    def _chunks(
        self, rows: Iterator[InputRow], rejects: list[bytes], counts: dict[str, int]
    ) -> Iterator[bytes]:
        """The part's content, a window at a time; notes what is rejected and counts the rest."""
        while window := list(map(self._without_clash, islice(rows, _WINDOW))):
            try:
                chunk = self._generated(window, counts)
            except PromptError:
                # Refused before anything is generated: find out which rows it is for.
                window = [self._checked(row) for row in window]
                chunk = self._generated(window, counts)
            for row in window:
                self._note_rejected(row, rejects)
            if chunk:
                yield chunk

    def _without_clash(self, row: InputRow) -> InputRow:
        """The row, or why it cannot get the fields that the output adds."""
        clash = "" if row.reason else taken(row.fields, self.job.options.added)
        return replace(row, reason=clash) if clash else row

    def _checked(self, row: InputRow) -> InputRow:
        """The row, or why the model cannot read it."""
        if row.reason:
            return row
        try:
            self.generator.check_prompt(self._cut(row), "truncate", repr(self.job.options.column))
        except PromptError as error:
            return replace(row, reason=str(error))
        return row

    def _note_rejected(self, row: InputRow, rejects: list[bytes]) -> None:
        if row.reason:
            shown = _json(row.fields) if row.line is None else row.line
            rejects.append(_line({"id": row.id, "reason": row.reason, "row": shown[:_SHOWN]}))

    def _generated(self, window: list[InputRow], counts: dict[str, int]) -> bytes:
        """The lines of the rows of a window that can be read; empty where there is none."""
        rows = [row for row in window if not row.reason]
        if not rows:
            return b""
        options = self.job.options
        # Rows of like length stand together; the output keeps the input's order.
        order = sorted(range(len(rows)), key=lambda at: len(rows[at].source))
        batch = self.generator.generate_candidates(
            [self._cut(rows[at]) for at in order],
            num_candidates=options.num_candidates,
            steps=options.steps,
            sampler=options.sampler,
            temperature=options.temperature,
            seeds=[id_seed(options.seed, rows[at].id) for at in order],
            batch_size=self.batch_size,
            on_overflow="truncate",
            progress=False,
        )
        lines = [b""] * len(rows)
        for at, texts, cut in zip(order, batch.texts, batch.truncated, strict=True):
            truncated = cut or len(rows[at].source) > self.generator.tokenizer.max_chars
            counts["truncated"] += truncated
            lines[at] = _line(_answer(rows[at], texts, truncated, options.added))
        counts["rows"] += len(rows)
        return b"".join(lines)

    def _cut(self, row: InputRow) -> str:
        return row.source[: self.generator.tokenizer.max_chars]


def id_seed(seed: int, identity: str) -> int:
    """The 64-bit generation seed of a row, a function of the job's seed and the row's id."""
    digest = hashlib.sha256(f"bulk/{seed}/{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def total(done: Iterable[Done]) -> Done:
    """The sum of all shards."""
    found = list(done)
    return Done(
        rows=sum(d.rows for d in found), rejected=sum(d.rejected for d in found),
        truncated=sum(d.truncated for d in found), seconds=sum(d.seconds for d in found),
    )  # fmt: skip


def _answer(
    row: InputRow, texts: list[str], truncated: bool, added: tuple[str, str, str]
) -> dict[str, Any]:
    values = (row.id, texts[0] if len(texts) == 1 else texts, truncated)
    return {**row.fields, **dict(zip(added, values, strict=True))}


def _check_same_engine(job: Job, generator: Generator) -> None:
    wanted = (job.options.device, job.options.dtype, job.options.backend)
    found = (generator.device.type, generator.precision, generator.backend)
    if found != wanted:
        raise UsageError(
            f"{job.output}: expected a worker on {', '.join(wanted)}, as the job began, got one on "
            f"{', '.join(found)}; give its --device, --dtype and --backend, or name a new folder"
        )


def _line(content: dict[str, Any]) -> bytes:
    return (_json(content) + "\n").encode()


def _json(content: dict[str, Any]) -> str:
    # What parquet holds beyond JSON (dates, decimals, bytes) is written as text.
    try:
        return json.dumps(content, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
