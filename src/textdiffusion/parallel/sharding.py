"""A network over several processes: whole on each (DDP), or each keeping a shard of it (FSDP2).

Both act on modules that are called, and a loss does more with a network than call it: it reads embeddings and clocks,
or calls it twice. So the module that they are given is one whose forward does whatever it is asked to do.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from textdiffusion.parallel.distributed import Group

Parallel = Literal["auto", "ddp", "fsdp"]
T = TypeVar("T")


@final
class Whole(nn.Module):
    """A network inside whose forward it is whole: ``forward(act, *arguments)`` is ``act(*arguments)``."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """What the act returns."""
        return act(*arguments)


@final
class Spread:
    """A network spread over the processes of a group.

    Args:
        network: its parts become shards of their own; changed in place if ``shard``.
        shard: each process keeps a share of every weight (FSDP2), not all of them (DDP).
        learns: whether gradients are to be added up over the processes.
    """

    def __init__(self, network: nn.Module, group: Group, *, shard: bool = False, learns: bool = True):
        self.group, self.shard = group, shard and group.size > 1
        self.inner = Whole(network)
        self.outer: Any = None
        if self.shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(group.device, (group.size,))
            for part in getattr(network, "parts", ()):  # networks made elsewhere are one shard
                fully_shard(part, mesh=mesh)
            # Also the outermost gives its weights back after its forward: an average changes between two calls.
            self.outer = fully_shard(self.inner, mesh=mesh, reshard_after_forward=not learns)
        elif group.size > 1 and learns:
            from torch.nn.parallel import DistributedDataParallel

            ids = [torch.cuda.current_device()] if group.device == "cuda" else None
            # Buffers are the same on all processes without being sent: clocks are summed by whoever trains.
            known = inspect.signature(DistributedDataParallel).parameters
            sent: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self.outer = DistributedDataParallel(self.inner, device_ids=ids, **sent)

    def within(self, act: Callable[..., T], *arguments: Any, last: bool = True) -> T:
        """``act(*arguments)`` with the network whole. All processes must do the same; ``last`` says whether the
        gradients of this pass are the last of a step, and are to be added up over the processes."""
        if self.outer is None:
            return act(*arguments)
        if self.shard:
            self.outer.set_requires_gradient_sync(last)
            result: T = self.outer(act, *arguments)
            return result
        with contextlib.nullcontext() if last else self.outer.no_sync():
            result = self.outer(act, *arguments)
            return result

    def clip(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        """Scale gradients down to a norm of ``most`` over all processes; returns the norm they had."""
        parameters = list(parameters)
        if not self.shard:
            return nn.utils.clip_grad_norm_(parameters, most)
        shards = [local(p.grad) for p in parameters if p.grad is not None]
        own = torch.stack(torch._foreach_norm(shards)).square().sum()
        norm = self.group.sum_(own).sqrt()
        torch._foreach_mul_(shards, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def sharded(parallel: Parallel, group: Group, parameters: int) -> bool:
    """Whether each process keeps only a shard of the network: if asked to, or where a GPU cannot hold all of it."""
    if group.size == 1:
        return False
    if parallel != "auto" or group.device != "cuda":
        return parallel == "fsdp"
    # Weights, gradients, averages and two moments in float32 should leave a third of the memory for activations.
    return 20 * parameters > torch.cuda.get_device_properties(group.device).total_memory * 2 / 3


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or all of one that is not sharded."""
    # Asked by name: to import the class of sharded tensors takes a second, which one process need not wait.
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them must ask."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
