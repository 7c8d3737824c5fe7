"""The processes of one training run, as torchrun starts them: who computes what, and agreement.

Everything that an update reads is a function of (seed, step, slot), so a rank takes a part of the
slots of each batch, and a sum over the ranks is the sum over the batch. Networks, optimisers and
averages are the same on every rank; the first one writes.

Annotations are types and not strings, for DistributedDataParallel reads those of its hook.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dlmone_fast.errors import RankLostError, UsageError
from dlmone_fast.models.devices import pick_device

Told = TypeVar("Told")

_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# gloo's errors are RuntimeErrors like any other.
_LOST = re.compile(r"gloo|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
# Dropout of a rank's micro-batches: beyond those of the rank before.
_MICRO_BATCHES_A_RANK = 1 << 24


@dataclass(frozen=True)
class Ranks:
    """A process's place among the processes of a run; alone it is rank 0 of 1.

    Every method that speaks of all ranks is collective: all ranks call it, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's contiguous part of `count` things; the parts of all ranks are all of them."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def slots(self, batch_size: int) -> Tensor:
        """This rank's places in a batch, int64.

        Raises:
            UsageError: the batch has fewer rows than the run has ranks.
        """
        if batch_size < self.size:
            raise UsageError(
                f"batch_size is {batch_size}, and the run has {self.size} ranks, each of which "
                "takes a row at least; use a larger batch or fewer ranks"
            )
        return torch.arange(batch_size)[self.part(batch_size)]

    def device(self, name: str) -> torch.device:
        """The device of this rank: on GPUs, the one of its number on this machine.

        Raises:
            UsageError: the device is not there, or one GPU is named for all ranks.
        """
        device = pick_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if ":" in name:
            raise UsageError(
                f"device {name!r} is one GPU, and the run has {self.size} ranks; use device='cuda'"
            )
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
        return device

    def micro_batch(self, index: int) -> int:
        """The number of a rank's index-th micro-batch among those of all ranks."""
        return self.rank * _MICRO_BATCHES_A_RANK + index

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks; alone, the tensor itself."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """The sum of each value over all ranks, which have the same names in the same order."""
        if self.size == 1:
            return values
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        found = self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX)
        return float(found)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any rank."""
        return [bool(flag) for flag in self._reduced(torch.tensor(flags).int(), dist.ReduceOp.MAX)]

    def gather(self, part: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, in order of ranks."""
        if self.size == 1:
            return [part]
        content = torch.frombuffer(bytearray(json.dumps(part).encode()), dtype=torch.uint8)
        return [json.loads(bytes(found.numpy())) for found in self._gathered(content)]

    def shared_path(self, path: Path | None) -> Path | None:
        """The first rank's path, or None."""
        found = self.gather(None if path is None else str(path))[0]
        return None if found is None else Path(found)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks' CPU tensors [n_rank, ...], in order of ranks."""
        if self.size == 1:
            return rows
        content = rows.contiguous().flatten().view(torch.uint8)
        joined = torch.cat(self._gathered(content)).view(rows.dtype)
        return joined.reshape(-1, *rows.shape[1:])

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.any(False)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            value = value.clone()
            with _peers():
                dist.all_reduce(value, how)
        return value

    def _gathered(self, content: Tensor) -> list[Tensor]:
        """Every rank's bytes, uint8 [n_rank] on the CPU."""
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(content)
        sizes = self.sum(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _peers():
            dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The block on the first rank, then on all others: what it writes, they find."""
        if not self.writes:
            self.wait()
        yield
        if self.writes:
            self.wait()

    def loss_of(self, network: nn.Module, all_used: bool = True) -> "SharedLoss":
        """Backward passes of a network's losses, the same on every rank afterwards.

        `all_used`: whether each pass reaches every parameter; if not, they are looked for.
        """
        return SharedLoss(network, self.size > 1, all_used)


class SharedLoss:
    """Backward passes of losses of one network, gradients summed over the ranks.

    An update makes any number of passes; the last one sends what they all have added up. Each
    rank's loss is its rows' share of the batch's, so that sums and not means are right.
    """

    def __init__(self, network: nn.Module, shared: bool, all_used: bool = True) -> None:
        self._parallel: DistributedDataParallel | None = None
        if shared:
            with _peers():
                self._parallel = DistributedDataParallel(
                    _Losses(network), find_unused_parameters=not all_used
                )
            self._parallel.register_comm_hook(None, _summed)

    def backward(self, loss: Callable[[], tuple[Tensor, Told]], last: bool) -> Told:
        """Compute a loss and add its gradients; share them in the `last` pass of an update.

        Args:
            loss: gives the loss, a scalar, and anything detached that is to be returned.
            last: whether this is the update's last pass.
        """
        if self._parallel is None:
            value, told = loss()
            value.backward()
            return told
        told_here: list[Told] = []
        with contextlib.nullcontext() if last else self._parallel.no_sync(), _peers():
            self._parallel(loss, told_here).backward()
        return told_here[0]


class _Losses(nn.Module):
    """A network whose forward pass is a loss of it: what DistributedDataParallel looks through for
    the parameters in use is one scalar, however often the loss calls the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Callable[[], tuple[Tensor, Told]], told: list[Told]) -> Tensor:
        value, here = loss()
        told.append(here)
        return value


def _summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's exchange of a bucket, without its division by the ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def of_several() -> bool:
    """Whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def open_ranks(device: str, minutes: float) -> Iterator[Ranks]:
    """The run's processes, joined; a process that torchrun did not start is alone.

    Args:
        device: the configured device, whose kind decides how ranks talk.
        minutes: how long a rank waits for another before it gives up.

    Raises:
        UsageError: torchrun's variables are incomplete.
        RankLostError: the others cannot be reached.
    """
    if dist.is_initialized():
        # A program's own processes, or a call within another.
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if not of_several():
        yield Ranks()
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {', '.join(missing)} not set: start "
            "with `torchrun --nproc-per-node=N -m dlmone_fast.train …`, or unset WORLD_SIZE"
        )
    on_gpus = pick_device(device).type == "cuda"
    with _peers():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(minutes=minutes)
        )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turn what torch raises when another rank is gone into an error with a way out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RankLostError(
            f"another rank of this run has ended or does not answer ({reason:.200}); its own "
            "message says why. Checkpoints are intact: start torchrun again with the same command"
        ) from error
