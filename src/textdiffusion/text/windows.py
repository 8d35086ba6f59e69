"""Windows of tokens: what a model sees of a text in training, and in evaluation."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from textdiffusion.errors import UserError


@dataclass
class TokenRuns:
    """Token ids in contiguous runs: run r is `tokens[runs[r]:runs[r + 1]]`, and windows never cross its edges."""

    tokens: np.ndarray  # [n] uint16 or uint32, possibly a read-only memory map
    runs: np.ndarray  # [R + 1] int64, from 0 to n
    characters: int = 0  # Unicode characters the tokens stand for, one for each end-of-text; 0 if not known
    labels: np.ndarray | None = None  # int64 [R], the label of each run, numbered in alphabetical order


class Windows:
    """Training windows of `length` tokens, in an order fixed by `seed`.

    Example g belongs to epoch g // per_epoch. Each epoch shifts the tiling of every run by a random amount below
    `length` and visits the windows in a random order. The batch of B at step s is examples s B to s B + B - 1, so
    resuming is arithmetic and the share of one rank is a slice. Raises UserError if the text is too short for two.
    """

    def __init__(self, runs: TokenRuns, length: int, seed: int) -> None:
        sizes = np.diff(runs.runs)
        total, longest = sizes.sum(), max(sizes.max(initial=0), 1)
        if longest < length or total < 2 * length:
            characters = runs.characters or total
            needed = int(max(2 * length, total * length / longest) * max(characters, 1) / max(total, 1)) + 1
            advice = f"windows of {length} tokens need about {needed}; give more text or a smaller window length"
            raise UserError(f"the training text has only {characters} characters; {advice}")
        self.length, self.seed, self.tokens = length, seed, runs.tokens
        self._starts, self._sizes = runs.runs[:-1][sizes >= length], sizes[sizes >= length]
        self._labels = None if runs.labels is None else runs.labels[sizes >= length]
        rare = np.setdiff1d(runs.labels, self._labels) if runs.labels is not None and self._labels is not None else ()
        if len(rare):
            raise UserError(
                f"{len(rare)} of the labels have less text than a window of {length} tokens; leave them out, or "
                "choose a smaller --length"
            )
        self._shifts = np.minimum(length, self._sizes - length + 1)  # every run keeps a window whatever its shift
        self.per_epoch = int(((self._sizes - self._shifts + 1) // length).sum())
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows with these global example numbers, int64 [n, length]; `indices` is an integer array [n]."""
        return self.tokens[self._begins(indices)[:, None] + np.arange(self.length)].astype(np.int64)

    def labels(self, indices: np.ndarray) -> np.ndarray | None:
        """The labels of the same windows, int64 [n]; None for text without labels."""
        if self._labels is None:
            return None
        return self._labels[np.searchsorted(self._starts, self._begins(indices), side="right") - 1]

    def _begins(self, indices: np.ndarray) -> np.ndarray:
        """Where these windows begin among all tokens, int64 [n]."""
        epochs, places = np.divmod(indices, self.per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            starts[epochs == epoch] = self._epoch(int(epoch))[places[epochs == epoch]]
        return starts

    def _epoch(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts, in order; the latest epoch is kept."""
        if self._order[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            first = self._starts + random.integers(self._shifts)
            last = self._starts + self._sizes - self.length
            tiles = [np.arange(start, stop + 1, self.length) for start, stop in zip(first, last)]
            self._order = (epoch, random.permutation(np.concatenate(tiles)))
        return self._order[1]


def evaluation_windows(runs: TokenRuns, length: int, limit: int | None = None, seed: int = 0) -> list[np.ndarray]:
    """Windows (int64, at most `length` long) that hold every token exactly once; only the last of a run is shorter.

    With `limit`, about that many tokens: evenly spaced windows, from an offset that `seed` decides.
    """
    return [runs.tokens[a:b].astype(np.int64) for a, b in _evaluation_spans(runs, length, limit, seed)]


def evaluation_labels(runs: TokenRuns, length: int, limit: int | None = None, seed: int = 0) -> np.ndarray | None:
    """The labels of the same windows, int64 [windows]; None for text without labels."""
    if runs.labels is None:
        return None
    begins = [a for a, _ in _evaluation_spans(runs, length, limit, seed)]
    return runs.labels[np.searchsorted(runs.runs, begins, side="right") - 1]


def _evaluation_spans(runs: TokenRuns, length: int, limit: int | None, seed: int) -> list[tuple[int, int]]:
    spans = pairwise(runs.runs.tolist())
    windows = [(start, min(start + length, end)) for begin, end in spans for start in range(begin, end, length)]
    if limit is not None and limit // length < len(windows):
        count = max(1, limit // length)
        offset = np.random.default_rng(seed).random()
        windows = [windows[int((place + offset) * len(windows) / count)] for place in range(count)]
    return windows
