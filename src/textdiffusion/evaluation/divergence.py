"""How far samples are from text, with no judge: the divergence frontier between their character n-grams.

With p the law of n-grams in held-out text, q that in samples, and r = w p + (1 - w) q, the frontier is the curve of

    ( KL(q || r), KL(p || r) ),   0 < w < 1   (1905.10768):

the first is large where samples hold what text does not, the second where they lack what text holds. A sampler that
repeats itself, or the best of its training text, cannot be near on both. Its summary is the frontier integral
(2106.07898), 0 for equal laws and 1 for laws that have nothing in common:

    2 integral over w of  w KL(p || r) + (1 - w) KL(q || r)
      =  sum_i (p_i + q_i) / 2 - p_i q_i log(p_i / q_i) / (p_i - q_i).

Laws estimated from little text look far from any other: compare figures of as much text, with a row of held-out text
beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NGRAM = 3  # characters
POINTS = 25  # of the curve


@dataclass(frozen=True)
class Divergence:
    """Frontier integral from 0 to 1 with its standard error over texts (None for one text), and the curve, in nats."""

    integral: float
    standard_error: float | None
    invented: list[float]  # KL(q || r), by falling w
    missed: list[float]  # KL(p || r)


def frontier_integral(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The integral for laws p [... S] and q [... S]; [...]."""
    p, q = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64))
    both = (p > 0) & (q > 0)
    a, b = np.where(both, p, 1.0), np.where(both, q, 1.0)
    gap = a - b
    # At p = q the term is p; nearby the quotient loses its digits.
    near = np.abs(gap) <= 1e-6 * (a + b)
    term = np.where(near, (a + b) / 2, a * b * np.log(a / b) / np.where(near, 1.0, gap))
    return np.asarray(((p + q) / 2 - np.where(both, term, 0.0)).sum(-1))


def frontier(p: np.ndarray, q: np.ndarray, points: int = POINTS) -> tuple[list[float], list[float]]:
    """(KL(q || r), KL(p || r)) in nats at ``points`` weights between 0 and 1, p [S] and q [S]."""
    invented, missed = [], []
    for w in np.linspace(1, 0, points + 2)[1:-1]:
        r = w * p + (1 - w) * q
        invented.append(_kl(q, r))
        missed.append(_kl(p, r))
    return invented, missed


def _kl(p: np.ndarray, r: np.ndarray) -> float:
    held = p > 0
    return float((p[held] * np.log(p[held] / r[held])).sum())


def ngrams(text: str, n: int = NGRAM) -> Counter[str]:
    """Character n-grams of a text, with how often each occurs."""
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def divergence(samples: Sequence[str], reference: Sequence[str], n: int = NGRAM) -> Divergence:
    """The divergence frontier of samples from reference texts.

    Raises:
        ValueError: texts shorter than n characters on either side.
    """
    by_sample = [ngrams(text, n) for text in samples]
    theirs: Counter[str] = Counter()
    for text in reference:
        theirs.update(ngrams(text, n))
    place = {gram: i for i, gram in enumerate(sorted(theirs.keys() | set().union(*by_sample)))}
    counts = np.zeros((len(samples), len(place)), dtype=np.float32)
    for row, grams in enumerate(by_sample):
        for gram, times in grams.items():
            counts[row, place[gram]] = times
    p = np.zeros(len(place))
    for gram, times in theirs.items():
        p[place[gram]] = times
    total = counts.sum(0, dtype=np.float64)
    if not p.sum() or not total.sum():
        raise ValueError(f"no text of {n} characters to compare")
    p, q = p / p.sum(), total / total.sum()
    error = None
    if len(samples) > 1:
        error = _spread(counts, p)
    return Divergence(float(frontier_integral(p, q)), error, *frontier(p, q))


def _spread(counts: np.ndarray, p: np.ndarray) -> float:
    """Standard error of the integral over the texts of counts [texts S]: the jackknife, which leaves out one at a time.

    Its square is in expectation not below the variance with one text less (Efron and Stein 1981): it errs to the safe
    side, by some 40% on texts of random letters.
    """
    texts, total = len(counts), counts.sum(0, dtype=np.float64)
    integrals = []
    for row in counts:
        rest = total - row
        if rest.sum():
            integrals.append(float(frontier_integral(p, rest / rest.sum())))
    return float(np.std(integrals) * (texts - 1) ** 0.5)
