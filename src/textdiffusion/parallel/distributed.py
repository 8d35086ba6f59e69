"""The processes that train or write together: torch.distributed, behind the few acts that the library needs of it.

One process is a group of one, for which every act is nothing at all. Several are started by ``torchrun``, which tells
each its number; on CPUs they speak by gloo, on GPUs by NCCL. Nothing is ever pickled between them: numbers travel as
float64, and text as UTF-8.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from textdiffusion.errors import ElsewhereError, UserError
from textdiffusion.parallel.launching import launched

PATIENCE = timedelta(minutes=30)  # that one process waits for another, which may be compiling or reading a corpus


@final
@dataclass(frozen=True)
class Group:
    """This process among those that work together.

    rank: its number, from 0; size: how many there are; device: where it computes.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this is the process that prints, decides and writes files."""
        return self.rank == 0

    def part(self, total: int) -> np.ndarray:
        """The numbers of 0 .. total - 1 that are this process's, contiguous, int64."""
        return np.array_split(np.arange(total, dtype=np.int64), self.size)[self.rank]

    def most(self, total: int) -> int:
        """How many the process with most has."""
        return -(-total // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Put the sum over all processes in place of a tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Sums over all processes of some numbers, float64."""
        array = np.array(values, dtype=np.float64)
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(array))  # by gloo, also beside NCCL
        return array

    def decided(self, *values: float) -> list[float]:
        """The numbers that the main process passes: what depends on a clock is decided by one."""
        if self.size == 1:
            return list(values)
        array = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(array, 0)
        return [float(value) for value in array.tolist()]

    def told(self, text: str = "", by: int = 0) -> str:
        """The text that a process passes, the main one unless said otherwise."""
        if self.size == 1:
            return text
        raw = np.frombuffer(text.encode(), np.uint8)
        length = torch.tensor([len(raw)])
        dist.broadcast(length, by)
        out = torch.from_numpy(raw.copy()) if self.rank == by else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(out, by)
        return out.numpy().tobytes().decode()

    def each(self, text: str) -> list[str]:
        """The texts that all processes pass, by rank."""
        return [self.told(text, rank) for rank in range(self.size)]

    def in_turn(self, mine: Sequence[Any], size: int, total: int) -> list[Any]:
        """All of ``total`` results (what JSON can say), of which the processes made batches of ``size`` in turn."""
        by_rank = [deque(json.loads(part)) for part in self.each(json.dumps(list(mine)))]
        out = []
        for number, first in enumerate(range(0, total, size)):
            batch = by_rank[number % self.size]
            out += [batch.popleft() for _ in range(min(size, total - first, len(batch)))]
        return out

    def take(self, queue: str, total: int) -> Iterator[int]:
        """Numbers of 0 .. total - 1, each of which goes to the process that asks for it first.

        Args:
            queue: what they are numbers of; another name for every queue.
        """
        if self.size == 1:
            yield from range(total)
            return
        store = dist.distributed_c10d._get_default_store()  # where the processes have found each other; counts exactly
        while (number := store.add(f"queue {queue}", 1) - 1) < total:
            yield number

    def together(self, failure: str | None) -> None:
        """Go on if no process has failed.

        Raises:
            UserError: on every process, with the line of one that has; elsewhere than there an ElsewhereError.
        """
        if self.size == 1:
            if failure is not None:
                raise UserError(failure)
            return
        failed = self.total([float(failure is not None and self.rank == r) for r in range(self.size)])
        if failed.any():
            first = int(failed.argmax())
            raw = np.zeros(1000)
            if failure is not None and self.rank == first:
                mine = np.frombuffer(failure.encode()[: len(raw)], np.uint8)
                raw[: len(mine)] = mine
            line = self.total(raw).astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="ignore")
            raise UserError(line) if self.rank == first else ElsewhereError(line)


ALONE = Group()


@contextmanager
def joined(device: str = "cpu", patience: timedelta = PATIENCE) -> Iterator[Group]:
    """The group of the processes that torchrun has started, on a GPU each where ``device`` is "cuda"; a group of one
    without it.

    Args:
        patience: for how long one waits for another that is at work; one that has ended is not waited for.
    Raises:
        UserError: fewer GPUs here than processes, or the processes cannot find each other.
    """
    if launched() == 1:
        yield Group(0, 1, device)
        return
    if dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size(), device)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    options: dict[str, Any] = {"backend": "gloo"}
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "lower torchrun's --nproc_per_node, or train with --device cpu"
            )
        torch.cuda.set_device(local)
        # Decisions travel between CPUs, so that no GPU is waited for.
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", local)}
    try:
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        # torchrun keeps one store over restarts: where the processes of a former start listened is still in it.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(timeout=patience, store=store, rank=rank, world_size=size, **options)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the processes cannot find each other ({reason}); start them with torchrun") from None
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
