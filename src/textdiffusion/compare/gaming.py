"""Samplers without a parameter that a judge praises: why generative perplexity is never shown alone.

log of the generative perplexity is H(q) + KL(q || judge): who writes less variedly wins (2606.08417 shows such samplers
at the level of published models). What gives each away is in the columns beside it: copies, repetition, few words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PIECE = 8  # of a window is one piece of what is stitched or repeated


def copied(tokens: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """A window of the training text, int64 [length]; given away by its copies."""
    start = generator.integers(max(len(tokens) - length, 0) + 1)
    return np.resize(tokens[start : start + length], length).astype(np.int64)


def stitched(tokens: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """Short pieces of the training text, end to end; given away by copies of medium length."""
    piece = max(1, length // PIECE * 2)
    parts = [copied(tokens, piece, generator) for _ in range(-(-length // piece))]
    return np.concatenate(parts)[:length]


def refrain(tokens: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """One short piece of the training text, again and again; given away by repetition."""
    return np.resize(copied(tokens, max(1, length // PIECE), generator), length)


GAMES: dict[str, tuple[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]]] = {
    "copied": ("windows of the training text", copied),
    "stitched": ("short pieces of the training text, end to end", stitched),
    "refrain": ("one short piece of the training text, again and again", refrain),
}


def played(game: str, tokens: np.ndarray, length: int, n: int, seed: int) -> list[np.ndarray]:
    """n texts of one of the samplers."""
    order = list(GAMES).index(game)
    generator = np.random.default_rng([seed, order])
    return [GAMES[game][1](tokens, length, generator) for _ in range(n)]


def held_out(windows: Sequence[np.ndarray], length: int, n: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """n windows of held-out text, evenly spread, as another row; and all others, as what samples are compared with."""
    whole = [w for w in windows if len(w) == length]
    n = max(1, min(n, len(whole) // 2))
    chosen = {int(i) for i in np.linspace(0, len(whole) - 1, n).round()}
    return [w for i, w in enumerate(whole) if i in chosen], [w for i, w in enumerate(whole) if i not in chosen]
