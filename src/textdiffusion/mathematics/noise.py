"""Randomness keyed per row: the same row gets the same draws in any batch.

Every random number in the library is a function of (seed, step, tag, row, index):

- ``seed``  the run's or the user's seed,
- ``step``  optimiser step in training, network-call number in sampling,
- ``tag``   what the draw is for ("mask", "token", ...), so that adding a draw moves no other,
- ``row``   the row's number in the *global* batch, whatever rank or micro-batch holds it,
- ``index`` the position of the number in that row's own stream.

So neither batch size, micro-batch, world size nor resuming changes a draw. The generator
is numpy's Philox, which is counter based: a stream starts anywhere at no cost. Draws are
made on the host, in float64, and moved to the device.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
# A row number that no batch can hold: the stream that all rows of a step share.
_SHARED = _MASK64
_kept = threading.local()


def _this_threads_generator() -> np.random.Generator:
    """Made once: a new one gathers entropy from the system, which takes longer than the draws of a row."""
    if not hasattr(_kept, "generator"):
        _kept.generator = np.random.Generator(np.random.Philox(0))
    generator: np.random.Generator = _kept.generator
    return generator


@dataclass(frozen=True)
class Noise:
    """The draws of some rows of a global batch at one step.

    Args:
        seed: any integer; its low 64 bits count.
        rows: global row numbers of the B rows at hand, int64 [B].
        total: rows in the global batch; what stratified times divide [0, 1) by.
        step: optimiser step or call number.
        device: where draws are put.
    """

    seed: int
    rows: np.ndarray
    total: int
    step: int = 0
    device: torch.device | str = "cpu"

    @staticmethod
    def of(seed: int, rows: int, *, step: int = 0, device: torch.device | str = "cpu") -> Noise:
        """The noise of a whole batch of ``rows`` rows."""
        return Noise(seed, np.arange(rows, dtype=np.int64), rows, step, device)

    def at(self, step: int) -> Noise:
        """The same rows at another step."""
        return replace(self, step=step)

    def select(self, index: Tensor | np.ndarray | slice | Sequence[int]) -> Noise:
        """Some of the rows (an index, a slice or a bool mask over the B rows); their draws stay theirs."""
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        return replace(self, rows=self.rows[index])

    def _streams(self, tag: str, rows: Iterable[int]) -> Iterator[np.random.Generator]:
        """A generator at the start of each row's stream; one object, to be used before the next is asked for."""
        generator = _this_threads_generator()
        # Philox has a 128-bit key and a 256-bit counter whose lowest word counts the stream itself.
        counter = np.array([0, 0, self.step & _MASK64, 0], dtype=np.uint64)
        key = np.array([self.seed & _MASK64, zlib.crc32(tag.encode())], dtype=np.uint64)
        nothing_kept = {"buffer": np.zeros(4, np.uint64), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        start = {"bit_generator": "Philox", "state": {"counter": counter, "key": key}} | nothing_kept
        for row in rows:
            counter[1] = int(row) & _MASK64
            generator.bit_generator.state = start
            yield generator

    def uniform(self, tag: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), float64 [B, *shape]."""
        out = np.empty((len(self.rows), *shape))
        for i, stream in enumerate(self._streams(tag, self.rows)):
            out[i] = stream.random(shape)
        return torch.from_numpy(out).to(self.device)

    def normal(self, tag: str, *shape: int) -> Tensor:
        """Standard normal draws, float64 [B, *shape]."""
        out = np.empty((len(self.rows), *shape))
        for i, stream in enumerate(self._streams(tag, self.rows)):
            out[i] = stream.standard_normal(shape)
        return torch.from_numpy(out).to(self.device)

    def stratified(self, tag: str) -> Tensor:
        """One uniform draw a row, float64 [B], with exactly one row of the global batch in each of ``total`` strata.

        Row r is put in stratum (r * p + shift) mod total, p coprime to total and shift drawn once a step, so that
        neighbouring rows (a micro-batch, a rank) are spread over [0, 1) and every row's marginal law is uniform.
        """
        total = self.total
        stride = max(1, round(total * 0.6180339887498949))
        while np.gcd(stride, total) != 1:
            stride += 1
        (shift,) = (int(stream.integers(total)) for stream in self._streams(tag, (_SHARED,)))
        stratum = (self.rows % total * stride + shift) % total
        jitter = np.array([stream.random() for stream in self._streams(tag, self.rows)])
        # A jitter just under one could round the quotient up to 1.
        times = np.minimum((stratum + jitter) / total, np.nextafter(1.0, 0.0))
        return torch.from_numpy(times).to(self.device)
