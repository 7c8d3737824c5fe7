"""The command `python -m dlmone_fast.generate_bulk`: many rows, many workers, each row once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional

from dlmone_fast.cli import OptionalFloat, OptionalInt, OptionalStr, parse, run_command
from dlmone_fast.errors import DataError, UsageError
from dlmone_fast.files import real_path

if TYPE_CHECKING:
    from dlmone_fast.bulk.job import Job
    from dlmone_fast.bulk.resources import Machine
    from dlmone_fast.bulk.shards import Shard

DESCRIPTION = """Generate a text for each row of a .jsonl, .jsonl.gz or .parquet file, or a folder
of them, on the workers of Ray (pip install 'dlmone_fast[ray]'; RAY_ADDRESS names a cluster).

The output folder gets a jsonl file a shard: the row's own fields, row_id, generated (or candidates)
and truncated; --field-prefix names them otherwise for rows that have such fields. Rows that cannot
be used are in part-N.rejects.jsonl with their reason; if all are, the exit code is 3. The same
command again makes the shards that are missing, on the same kind of device: a job that began on
CPUs is refused on GPUs. A row's text depends on its id and --seed, not on workers or batches. Exit
codes: 0 done, 2 usage, 3 data, 4 model files.
"""


@dataclass(frozen=True)
class BulkArgs:
    """Options of the command."""

    input: Annotated[str, Positional]
    """A .jsonl, .jsonl.gz or .parquet file, or a folder of them."""
    output: Annotated[str, Positional]
    """A new folder, or one that the same command began."""
    model: str
    """Model folder, which every worker sees."""
    column: str = "src"
    """The field that holds the source."""
    id_column: str = ""
    """The field that names a row; default: file name and row number."""
    rows_per_shard: int = 10_000
    """Rows of one output file. A .gz file is one shard, for none can begin within it."""
    workers: int = 0
    """Workers at once; 0: one a GPU, or one for each 4 CPU cores."""
    num_candidates: int = 1
    """Texts per source, each from its own noise."""
    steps: OptionalInt = None
    """Network calls per text; default: the model's own."""
    sampler: OptionalStr = None
    """Sampler of a teacher; default: the model's own."""
    temperature: OptionalFloat = None
    """Factor of all noise: below 1 texts are likelier and less diverse; default: the model's."""
    field_prefix: str = ""
    """Goes before the names of the fields that are added."""
    seed: int = 0
    """Of all texts."""
    batch_size: int = 64
    """Texts per network call."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if there are any, here or in the cluster."""
    dtype: str = "auto"
    """auto (fp32 on a CPU, bf16 on a GPU), fp32, bf16 or fp16."""
    backend: str = "auto"
    """What runs the network: auto, eager, compile, graph (CUDA) or openvino (CPU)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code or raises a `DlmOneError` that carries it."""
    args = parse(
        BulkArgs, prog="python -m dlmone_fast.generate_bulk", description=DESCRIPTION, args=argv
    )
    _check(args)
    from tqdm import tqdm

    from dlmone_fast.bulk.columns import check_columns
    from dlmone_fast.bulk.on_ray import run_on_ray
    from dlmone_fast.bulk.resources import device_kind, share
    from dlmone_fast.bulk.shards import plan_shards
    from dlmone_fast.bulk.worker import total

    started = time.perf_counter()
    source = real_path(args.input)
    shards = plan_shards(source, args.rows_per_shard)
    with _machines(args.device) as (machines, here):
        device = device_kind(machines, args.device, args.workers)
        job = _job(args, source, device, here)
        check_columns(source, args.column, args.id_column, job.options.added)
        job.open()
        missing = job.missing(shards)
        left = {shard.index for shard in missing}
        before = total(job.done(shard) for shard in shards if shard.index not in left)
        with tqdm(total=len(shards), initial=len(shards) - len(missing), unit="shard") as bar:
            if missing:
                workers, threads = share(machines, device, args.workers, len(missing))
                for _ in run_on_ray(
                    job, missing, workers=workers, threads=threads, batch_size=args.batch_size
                ):
                    bar.update(1)
    now = total(job.done(shard) for shard in shards)
    rate = (now.rows - before.rows) / (time.perf_counter() - started)
    print(
        f"{now.rows:,} rows written, {now.rejected:,} rejected, {now.truncated:,} sources cut, "
        f"{len(shards):,} shards ({len(missing):,} made now, {rate:,.0f} rows/s)",
        file=sys.stderr,
    )
    if now.rejected and not now.rows:
        raise _nothing_written(job, shards)
    return 0


def _nothing_written(job: Job, shards: list[Shard]) -> DataError:
    shard = next(shard for shard in shards if job.done(shard).rejected)
    rejects = job.rejects_file(shard)
    try:
        with rejects.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        reason = f"{first['id']}: {first['reason']}"
    except (OSError, ValueError, KeyError) as error:
        reason = f"its reason cannot be read ({error})"
    return DataError(
        f"{job.source}: every row was rejected, the first one because of {reason}; {rejects} has "
        "the others: correct the rows or name another --column, with a new output folder"
    )


def _check(args: BulkArgs) -> None:
    for name, low, high in (
        ("workers", 0, 4096), ("rows_per_shard", 1, 10**9), ("batch_size", 1, 4096),
    ):  # fmt: skip
        value = getattr(args, name)
        if not low <= value <= high:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: expected {low} to {high}, got {value}")


@contextmanager
def _machines(device: str) -> Iterator[tuple[list[Machine], bool]]:
    """The machines that workers run on, and whether that is this one."""
    from dlmone_fast.bulk.on_ray import connected, import_ray
    from dlmone_fast.bulk.resources import cluster_machines, this_machine

    with connected() as to_cluster:
        if to_cluster:
            yield cluster_machines(import_ray()), False
        else:
            yield this_machine(device), True


def _job(args: BulkArgs, source: Path, device: str, here: bool) -> Job:
    from dlmone_fast.bulk.job import Job, Options
    from dlmone_fast.bulk.resolve import resolved

    options = Options(
        model=str(real_path(args.model)), column=args.column, id_column=args.id_column,
        rows_per_shard=args.rows_per_shard, num_candidates=args.num_candidates, steps=args.steps,
        sampler=args.sampler, temperature=args.temperature, seed=args.seed,
        field_prefix=args.field_prefix,
    )  # fmt: skip
    return Job(
        source,
        real_path(args.output),
        resolved(options, device, args.dtype, args.backend, here=here),
    )


if __name__ == "__main__":
    run_command(main)
