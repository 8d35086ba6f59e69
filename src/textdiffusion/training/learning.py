"""Learning: optimisers, learning-rate schedule, weight averaging and one optimiser step. Knows Process, no family."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.clock import Clock
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.parallel.sharding import Spread, full, local
from textdiffusion.process import Process
from textdiffusion.settings import TrainingConfig
from textdiffusion.training.muon import Muon

T = TypeVar("T")
PATIENCE = 10  # steps in a row without a number for a loss, after which no step will bring one


def learning_rate_factor(progress: float, config: TrainingConfig) -> float:
    """Trapezoid over progress in [0, 1]: up, flat, down to zero."""
    up = progress / config.warmup if config.warmup else 1.0
    down = (1 - progress) / config.cooldown if config.cooldown else 1.0
    return max(0.0, min(1.0, up, down))


def side_by_side(workers: int) -> ThreadPoolExecutor:
    """Threads that share torch's threads out among them: with all of them each, they would wait for one another."""
    threads, started = torch.get_num_threads(), Barrier(workers)

    def share() -> None:
        torch.get_num_threads()  # a thread that has not asked yet is given all of them at its first operation
        torch.set_num_threads(max(1, threads // workers))
        started.wait()

    pool = ThreadPoolExecutor(workers)
    list(pool.map(lambda _: share(), range(workers)))
    torch.set_num_threads(threads)  # what the last of them set holds for threads to come
    return pool


class Learner:
    """A network under training: weights, their average, optimisers and counters, with one flat state to save.

    The average is an exponential one whose horizon grows with the step number (the power-function profile of
    EDM2, 2312.02696): it always spans the same share of the training, however long that is.
    """

    def __init__(self, network: nn.Module, config: TrainingConfig, group: Group = ALONE, *, shard: bool = False):
        if config.batch < group.size:
            raise UserError(f"{group.size} processes cannot share a batch of {config.batch}; raise training.batch")
        self.network, self.config, self.group = network, config, group
        self.average = AveragedModel(network, multi_avg_fn=self._mix)  # type: ignore[arg-type]
        self.spread = Spread(network, group, shard=shard)
        self.spread_average = Spread(self.average.module, group, shard=shard, learns=False)
        self.clocks = [module for module in network.modules() if isinstance(module, Clock)]
        matrices = [p for p in network.hidden_matrices() if p.requires_grad]  # type: ignore[operator]
        chosen = {id(p) for p in matrices}
        rest = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
        self.adamw = torch.optim.AdamW(
            rest, lr=config.rate, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        # One Muon a matrix, so that they can be stepped side by side: each is a chain of products too small to fill a
        # processor, and in turn they take a quarter of a step.
        products = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.muons = [
            Muon(
                [matrix], config.matrix_rate, momentum=config.momentum, weight_decay=config.weight_decay, dtype=products
            )
            for matrix in matrices
        ]
        on_cpu = bool(matrices) and matrices[0].device.type == "cpu"
        # Shards are put together for each product: all processes in the same order.
        workers = min(torch.get_num_threads(), 4) if on_cpu and not self.spread.shard else 1
        self.pool = side_by_side(workers) if workers > 1 else None
        self.step = 0
        self.seconds = 0.0
        self.astray = 0  # steps in a row that were skipped, for want of a number

    def _mix(self, averaged: list[Tensor], current: list[Tensor], number: Tensor | int) -> None:
        del number
        power = 1 / self.config.average - 1
        decay = (1 - 1 / max(self.step, 2)) ** power
        torch._foreach_lerp_([local(a) for a in averaged], [local(c) for c in current], 1 - decay)

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * (self.config.minutes or 1.0)))

    def _parts(self, own: int, total: int) -> list[slice]:
        """Micro-batches of this process's ``own`` rows of ``total``; equally many on every process."""
        size = self.config.micro_batch or own
        if self.group.size == 1:
            return [slice(begin, begin + size) for begin in range(0, own, size)]
        number = min(-(-self.group.most(total) // size), total // self.group.size)
        cuts = [round(i * own / number) for i in range(number + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def learn(self, process: Process, x_0: Tensor, noise: Noise, condition: Tensor | None = None) -> float:
        """One optimiser step on windows x_0 [B L]; with several processes, on this one's part of the batch, whose rows
        ``noise`` names. Returns the mean loss over the batch, nats per token.

        Where that, or its gradient, is not a number (nan is returned), the step changes no weight.

        Raises:
            UserError: it has not been one for many steps in a row.
        """
        self.network.train()
        progress, parts = self.progress, self._parts(len(x_0), noise.total)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for part in parts:
            label = None if condition is None else condition[part]
            # Dropout draws from torch's own generator: it is seeded by what the draws are for, and put back.
            devices = [x_0.device] if x_0.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(zlib.crc32(f"{noise.seed} {noise.step} {noise.rows[part.start]}".encode()))
                nats = self.spread.within(process.loss, x_0[part], noise.select(part), label, last=part is parts[-1])
                loss = nats.sum() / noise.total
            # Gradients are averaged over the processes, and the loss is a sum over them.
            (loss if self.group.size == 1 else loss * self.group.size).backward()
            loss_sum += loss.detach().double().cpu()
        for clock in self.clocks:
            self.group.sum_(clock.pending)
        mean = float(self.group.total([loss_sum.item()])[0])
        norm = self.spread.clip(self.network.parameters(), self.config.clip)
        if not math.isfinite(mean) or not bool(torch.isfinite(norm)):
            self._skip()
            return math.nan
        self.astray = 0
        factor = learning_rate_factor(progress, self.config)
        for optimizer, rate in [(self.adamw, self.config.rate)] + [(m, self.config.matrix_rate) for m in self.muons]:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        self.adamw.step()
        if self.pool is None:
            for muon in self.muons:
                muon.step()
        else:
            list(self.pool.map(lambda muon: muon.step(), self.muons))
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update_parameters(self.network)
        return mean

    def _skip(self) -> None:
        """Count a step that changes nothing; the next one has other texts and other draws."""
        self.network.zero_grad(set_to_none=True)
        for clock in self.clocks:
            clock.forget()
        self.step += 1
        self.astray += 1
        if self.astray >= PATIENCE:
            raise UserError(
                f"the loss or its gradient was no number in {PATIENCE} steps in a row, up to step {self.step}; "
                "--resume goes on from the last checkpoint; if that leads here again, start anew with a lower "
                "--set training.rate and training.matrix_rate, or with --set training.precision=fp32"
            )

    def averaged(self, act: Callable[..., T], *arguments: Any) -> T:
        """``act(*arguments)``, which uses the averaged weights; all processes do it together."""
        return self.spread_average.within(act, *arguments)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.adamw, *self.muons]

    # -- state ----------------------------------------------------------------------------------------------------
    def _shared(self) -> set[str]:
        """What the average has from the network as it is, for it is not learnt (the table of counts): kept once."""
        averaged = dict(self.average.module.named_buffers())
        return {name for name, buffer in self.network.named_buffers() if averaged[name] is buffer}

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by flat name, shards of it where weights are; counters are in ``numbers``."""
        flat = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        shared = self._shared()
        flat |= {f"average.{k}": v for k, v in self.average.module.state_dict().items() if k not in shared}
        for i, optimizer in enumerate(self.optimizers):
            for j, entries in optimizer.state_dict()["state"].items():
                flat |= {f"optimizer.{i}.{j}.{k}": torch.as_tensor(v) for k, v in entries.items()}
        return {k: v.detach() if self.spread.shard else v.detach().cpu().contiguous() for k, v in flat.items()}

    def whole_average(self) -> dict[str, Tensor]:
        """The averaged weights, whole; all processes must ask."""
        return {k: full(v.detach()).cpu().contiguous() for k, v in self.average.module.state_dict().items()}

    def numbers(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Take up where ``tensors`` and ``numbers`` left off."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            head, tail = name.split(".", 1)
            parts[head][tail] = value
        self.network.load_state_dict(parts["network"])
        shared = {name: parts["network"][name] for name in self._shared()}
        self.average.module.load_state_dict(shared | parts["average"])
        # AveragedModel copies on its first update unless it has been updated before.
        self.average.n_averaged.fill_(int(numbers["step"]))
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in parts["optimizer"].items():
            i, j, key = name.split(".", 2)
            states[int(i)].setdefault(int(j), {})[key] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])


@dataclass(frozen=True)
class Progress:
    """What the training loop says after each step."""

    step: int
    progress: float  # share of the training done
    loss: float  # nats per token, this batch; nan where the step was skipped
    tokens: int  # tokens in this batch
    seconds: float  # since the training began, other sessions included


def train(
    process: Process,
    batch_of: Callable[[np.ndarray], np.ndarray],
    learner: Learner,
    device: torch.device | str = "cpu",
    labels_of: Callable[[np.ndarray], np.ndarray | None] | None = None,
) -> Iterator[Progress]:
    """Train until done, yielding after every step; what the caller does between two steps counts as training time.

    Args:
        process: its network must be ``learner.network``.
        batch_of: global example numbers int64 [B] to windows int64 [B L] (``windows.Windows.rows``); with several
            processes each asks for its part of the batch.
        learner: where to start from; changed in place.
        labels_of: the same to their labels int64 [B], or None (``windows.Windows.labels``); a share of them is kept
            from the network, ``training.unlabelled``.
    """
    config, clock, group = learner.config, time.perf_counter(), learner.group
    before = learner.seconds
    rows = group.part(config.batch)
    while learner.progress < 1:
        examples = learner.step * config.batch + rows
        x_0 = torch.from_numpy(batch_of(examples)).to(device)
        noise = Noise(config.seed, rows, config.batch, learner.step, device)
        labels = None if labels_of is None else labels_of(examples)
        condition = None
        if labels is not None:
            kept = noise.uniform("unlabelled") >= config.unlabelled
            condition = torch.where(kept, torch.from_numpy(labels).to(device), -1)
        loss = learner.learn(process, x_0, noise, condition)
        (learner.seconds,) = group.decided(before + time.perf_counter() - clock)
        tokens = config.batch * x_0.shape[1]
        yield Progress(learner.step, learner.progress, loss, tokens, learner.seconds)
        (learner.seconds,) = group.decided(before + time.perf_counter() - clock)
