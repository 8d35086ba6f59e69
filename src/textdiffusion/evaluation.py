"""How good a model is: bits per character of held-out text, and what its samples are like. Knows Process, no family.

Protocol, the same for every family: held-out text is cut into windows that do not overlap, no context is carried from
one to the next, every held-out character counts once, and a left-to-right model starts each window from the same
end-of-text token. An end-of-text token counts as one character.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textdiffusion.noise import Noise
from textdiffusion.process import HasCurve, Kind, Process

BITS = 1 / math.log(2)
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class Figure:
    """Bits per character with their standard error over windows, and what kind of figure they are."""

    bits_per_char: float
    standard_error: float
    kind: Kind
    sampler: str
    calls: int | None  # of the sampler that the figure belongs to; None is the limit of many

    def __str__(self) -> str:
        sign = {"exact": "", "upper": "<= ", "none": "~ "}[self.kind]
        return f"{sign}{self.bits_per_char:.3f} +- {self.standard_error:.3f} bits/char"


@dataclass(frozen=True)
class Report:
    """Likelihood of held-out text."""

    figure: Figure
    by_calls: list[Figure] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # nats of a hidden token when 0..L-1 others are shown
    windows: int = 0
    tokens: int = 0
    characters: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        body = dict(vars(self.figure))
        body |= {"windows": self.windows, "tokens": self.tokens, "characters": self.characters}
        return body | {"by_calls": [vars(f) for f in self.by_calls], "curve": self.curve}


@torch.inference_mode()
def evaluate(
    process: Process,
    windows: Sequence[np.ndarray],
    characters: np.ndarray,
    *,
    calls: Sequence[int] = (),
    draws: int = 1,
    seed: int = 0,
    batch: int = 128,
    device: torch.device | str = "cpu",
) -> Report:
    """Bits per character of held-out windows.

    Args:
        process: any family.
        windows: token arrays; most of one length L, tails shorter.
        characters: characters a token, int [V].
        calls: budgets for which the figure of the sampler of exactly that many calls is wanted too. A family whose
            likelihood is exact has one figure only.
        draws: noisy copies of each window, for families whose bound is estimated.
        seed: of the noise; a part of the protocol.
        batch: windows in a network call.
    """
    budgets: list[int | None] = [None, *calls]
    sizes = np.array([characters[w].sum() for w in windows], dtype=np.float64)
    longest = max(len(w) for w in windows)
    # nats[budget][window]: estimates whose sum over windows is unbiased; their spread gives the standard error.
    nats = np.zeros((len(budgets), len(windows)))
    kinds: list[Any] = [None] * len(budgets)
    curve: list[float] = []
    for length in sorted({len(w) for w in windows}):
        chosen = [i for i, w in enumerate(windows) if len(w) == length]
        x = torch.from_numpy(np.stack([windows[i] for i in chosen]).astype(np.int64)).to(device)
        if isinstance(process, HasCurve):
            # A short tail gets every point of the curve, so that it is as well measured as the many full windows.
            copies = draws if length == longest and len(chosen) >= 2 * length else length
            points, sums = _by_curve(process, x, budgets, copies, seed, batch)
            nats[:, chosen] = sums
            if length == longest:
                curve = points
            for j, budget in enumerate(budgets):
                kinds[j] = ("upper", next(iter(process.steps)), budget)
        else:
            for j, budget in enumerate(budgets):
                if budget is not None and kinds[0] is not None and kinds[0][0] == "exact":
                    continue
                for draw in range(draws if kinds[0] is None or kinds[0][0] != "exact" else 1):
                    for begin in range(0, len(chosen), batch):
                        part = slice(begin, begin + batch)
                        noise = Noise(seed, np.arange(len(chosen))[part], len(chosen), draw, device)
                        nll = process.nll(x[part], noise, budget)
                        nats[j, chosen[part]] += nll.total.double().cpu().numpy() / draws
                        kinds[j] = (nll.kind, nll.sampler, nll.calls)
                    if nll.kind == "exact":
                        nats[j, chosen] *= draws
                        break
    figures = [_figure(nats[j], sizes, kinds[j]) for j in range(len(budgets)) if kinds[j] is not None]
    if figures[0].kind == "exact":
        figures = figures[:1]
    tokens = int(sum(len(w) for w in windows))
    return Report(figures[0], figures[1:], curve, len(windows), tokens, int(sizes.sum()))


def _by_curve(
    process: Any, x: Tensor, budgets: Sequence[int | None], copies: int, seed: int, batch: int
) -> tuple[list[float], np.ndarray]:
    """Curve in nats by number shown, and for each budget the estimate of each window, [budgets, windows].

    Copy c of window w is one example, its number hidden stratified over all examples. The estimate of a budget is
    sum_n weight(n) mean(curve at n), unbiased whatever the strata; a window's part in it is its own examples', scaled
    so that the parts of all windows add up to the whole times the number of windows.
    """
    windows, length = x.shape
    examples = windows * copies
    number = np.arange(examples)
    # Consecutive examples of a window fall on far apart strata.
    order = (number % copies) * windows + number // copies
    hidden = torch.from_numpy(1 + order * length // examples).to(x.device)
    values = np.zeros(examples)
    for begin in range(0, examples, batch):
        part = np.arange(begin, min(begin + batch, examples))
        noise = Noise(seed, part, examples, 0, x.device)
        value = process.curve_point(x[part // copies], hidden[part], noise)
        values[part] = value.double().cpu().numpy()
    n = hidden.cpu().numpy()
    count = np.bincount(n, minlength=length + 1).astype(float)
    mean = np.bincount(n, weights=values, minlength=length + 1) / np.maximum(count, 1)
    # Too few examples for every stratum: points between measured ones are interpolated.
    mean[1:] = np.interp(np.arange(1, length + 1), np.nonzero(count)[0], mean[count > 0])
    sums = np.zeros((len(budgets), windows))
    for j, budget in enumerate(budgets):
        weight = process.curve_weights(length, budget)
        total = float(weight @ mean)
        # Spread about the curve, gathered by window, so that copies of one window do not count as independent.
        spread = np.where(count[n] > 0, weight[n] / np.maximum(count[n], 1), 0.0) * (values - mean[n])
        sums[j] = total + windows * np.bincount(number // copies, weights=spread, minlength=windows)
    return mean[:0:-1].tolist(), sums


def _figure(nats: np.ndarray, sizes: np.ndarray, kind: tuple[Kind, str, int | None]) -> Figure:
    ratio = nats.sum() / sizes.sum()
    # Standard error of a ratio of sums over windows.
    residual = nats - ratio * sizes
    error = math.sqrt(float((residual**2).sum()) * len(nats) / max(len(nats) - 1, 1)) / sizes.sum()
    return Figure(float(ratio * BITS), float(error * BITS), *kind)


# -- samples ------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-cased words of a text."""
    return WORD.findall(text.lower())


def whole_words(text: str, edges: bool = True) -> list[str]:
    """Words of a sample; without its first and last, which its ends may have cut."""
    found = list(WORD.finditer(text.lower()))
    if edges and found and found[0].start() == 0:
        found = found[1:]
    if edges and found and found[-1].end() == len(text):
        found = found[:-1]
    return [m.group() for m in found]


@dataclass(frozen=True)
class TextStatistics:
    """What samples are like, with no judge.

    valid_words: share of whole words that occur in the training text. entropy: of the words over all samples, bits.
    distinct: share of distinct word n-grams among all, by n. repetition: share of word n-grams that occurred earlier in
    the same sample, by n. copied: share of ``copy_length``-character substrings that occur in the training text.
    """

    valid_words: float
    entropy: float
    distinct: dict[int, float]
    repetition: dict[int, float]
    copied: float
    copy_length: int
    words: int


def text_statistics(
    samples: Sequence[str], vocabulary: set[str], training: Iterable[str] = (), copy_length: int = 32
) -> TextStatistics:
    """Statistics of samples against the words, and the text, that the model was trained on."""
    by_sample = [whole_words(s) for s in samples]
    every = [w for ws in by_sample for w in ws]
    counts = Counter(every)
    total = max(len(every), 1)
    entropy = -sum(c / total * math.log2(c / total) for c in counts.values())
    distinct, repetition = {}, {}
    for n in (1, 2, 3):
        grams = [[tuple(ws[i : i + n]) for i in range(len(ws) - n + 1)] for ws in by_sample]
        size = max(sum(map(len, grams)), 1)
        distinct[n] = len({g for gs in grams for g in gs}) / size
        repetition[n] = sum(len(gs) - len(set(gs)) for gs in grams) / size
    pieces = [s[i : i + copy_length] for s in samples for i in range(len(s) - copy_length + 1)]
    seen: set[str] = set()
    wanted = set(pieces)
    for text in training:
        seen.update(p for i in range(len(text) - copy_length + 1) if (p := text[i : i + copy_length]) in wanted)
    return TextStatistics(
        valid_words=sum(w in vocabulary for w in every) / total,
        entropy=entropy,
        distinct=distinct,
        repetition=repetition,
        copied=sum(p in seen for p in pieces) / max(len(pieces), 1),
        copy_length=copy_length,
        words=len(every),
    )
