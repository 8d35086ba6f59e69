"""How good a model is: bits per character of held-out text, and what its samples are like. Knows Process, no family.

Protocol, the same for every family: held-out text is cut into windows that do not overlap, no context is carried from
one to the next, every held-out character counts once, and a left-to-right model starts each window from the same
end-of-text token. An end-of-text token counts as one character.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textdiffusion.diffusion.guidance import told
from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.parallel.distributed import ALONE, Group
from textdiffusion.process import HasCurve, Kind, Process
from textdiffusion.progress import tell
from textdiffusion.sampling.deterministic_order import order_nll
from textdiffusion.text.data import WORD

BITS = 1 / math.log(2)
ORDERS = (1, 2, 3, 4)  # of the runs of words whose repetition is counted
TERMS = ("diffusion", "prior", "reconstruction")  # of process.Nll
MOST_COPIES = 8  # of a window, made of one's own accord to measure the whole curve


@dataclass(frozen=True)
class Figure:
    """Bits per character with their standard error over windows, and what kind of figure they are."""

    bits_per_char: float
    standard_error: float | None  # None where a single window tells nothing of it
    kind: Kind
    sampler: str
    calls: int | None  # of the sampler that the figure belongs to; None is the limit of many
    # The terms of a bound that was drawn, which add up to it; none of what follows from a curve or an order.
    parts: dict[str, float] | None = None

    def __str__(self) -> str:
        sign = {"exact": "", "upper": "<= ", "none": "~ "}[self.kind]
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3f}"
        return f"{sign}{self.bits_per_char:.3f}{error} bits/char"


@dataclass(frozen=True)
class Report:
    """Likelihood of held-out text."""

    figure: Figure
    by_calls: list[Figure] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # nats of a hidden token when 0..L-1 others are shown
    windows: int = 0
    tokens: int = 0
    characters: int = 0
    # What each window adds to the error of each figure, bits/char [1 + by_calls, windows]: the squares' sum is the
    # standard error's square, and that of two models' difference on the same windows is their difference's.
    influence: np.ndarray | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        body = dict(vars(self.figure))
        body |= {"windows": self.windows, "tokens": self.tokens, "characters": self.characters}
        return body | {"by_calls": [vars(f) for f in self.by_calls], "curve": self.curve}


@dataclass
class _Sums:
    """What one budget adds up to: nats in all, and each window's part in the error of that sum."""

    nats: float
    spread: np.ndarray  # [windows]
    kind: Kind
    sampler: str
    calls: int | None
    parts: np.ndarray | None = None  # nats of each of TERMS


@torch.inference_mode()
def evaluate(
    process: Process,
    windows: Sequence[np.ndarray],
    characters: np.ndarray,
    spelling: np.ndarray | None = None,
    *,
    calls: Sequence[int] = (),
    sampler: str | None = None,
    draws: int = 1,
    seed: int = 0,
    batch: int | None = None,
    labels: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    what: str = "held-out text",
) -> Report:
    """Bits per character of held-out windows.

    Args:
        process: any family.
        windows: token arrays; most of one length L, tails shorter.
        characters: characters a token, int [V].
        spelling: nats, float [V], that a token costs beyond the model's: what it takes to say which unseen symbol an
            unknown token stands for (``Tokenizer.spelling``).
        calls: budgets for which the figure of the sampler of exactly that many calls is wanted too. A family whose
            likelihood is exact has one figure only.
        sampler: whose T-call bound, or exact likelihood if it chooses positions by a rule (deterministic_order.py,
            which follows each window once, in as many calls as writing it takes); None takes the family's first.
        draws: noisy copies of each window, for families whose bound is estimated.
        seed: of the noise; a part of the protocol.
        batch: windows in a network call; None: up to 128, and at most 2^24 logits.
        labels: int64 [windows], -1 for none: what each window costs given its label.
        group: processes that share the work, all with these same arguments; each gets all figures.
        what: the windows are, for who watches (progress.py).
    Raises:
        UserError: a sampler that is not there, or without a known bound.
    """
    if sampler is not None and sampler not in process.steps:
        raise UserError(f"this family has no sampler {sampler!r}; it has: {', '.join(process.steps)}")
    process = process if sampler is None else process.by(sampler)
    followed: list[int] = []
    ruled = ""
    if sampler is not None and sampler != next(iter(process.steps)) and process.steps[sampler].deterministic:
        followed, calls, ruled, sampler = list(calls), (), sampler, None
    budgets: list[int | None] = [None, *calls]
    sizes = np.array([characters[w].sum() for w in windows], dtype=np.float64)
    longest, remembers = max(len(w) for w in windows), process.remembers  # what is remembered has no curve
    totals, spread = np.zeros(len(budgets) + len(followed)), np.zeros((len(budgets) + len(followed), len(windows)))
    kinds: list[tuple[Kind, str, int | None]] = []
    terms = np.zeros((len(budgets) + len(followed), len(TERMS)))
    curve: list[float] = []
    read, orders = 0, len(followed) + 1

    def advance(share: float, order: int = 0) -> None:
        tell(f"reading {what}", (read + len(chosen) * (order + share) / orders) / len(windows))

    for length in sorted({len(w) for w in windows}):
        chosen = np.array([i for i, w in enumerate(windows) if len(w) == length])
        x = torch.from_numpy(np.stack([windows[i] for i in chosen]).astype(np.int64)).to(device)
        marks = None if labels is None else torch.from_numpy(labels[chosen]).to(device)
        size = batch or max(1, min(128, 2**24 // (length * len(characters)), group.most(len(x))))
        if isinstance(process, HasCurve) and not remembers:
            copies = draws
            if length == longest and len(chosen) > 1:
                # At least two examples at every point of the curve, if that does not cost too much: with fewer the
                # figures are as unbiased, but there is no curve, and they are less sharp.
                needed = -(-2 * length // len(chosen))
                copies = max(draws, needed if needed <= max(draws, MOST_COPIES) else draws)
            curve, sums = _by_curve(
                process, x, marks, sizes[chosen], budgets, sampler, copies, seed, size, group, advance
            )
        else:
            if calls and sampler not in (None, next(iter(process.steps))):
                raise UserError(
                    f"no bound is known for the sampler {sampler!r}; there is one for {next(iter(process.steps))}"
                )
            sums = _by_draws(process, x, marks, sizes[chosen], budgets, draws, seed, size, group, advance)
        for order, budget in enumerate(followed, 1):
            sums.append(_by_order(process, x, marks, sizes[chosen], budget, ruled, size, partial(advance, order=order)))
        for j, part in enumerate(sums):
            totals[j] += part.nats
            terms[j] += np.nan if part.parts is None else part.parts
            spread[j, chosen] = part.spread
        read += len(chosen)
        kinds = [(part.kind, part.sampler, part.calls) for part in sums]  # of the longest windows in the end
    spelt = 0.0
    if spelling is not None:
        unsaid = np.array([spelling[w].sum() for w in windows])
        spelt = float(unsaid.sum())
        totals += spelt
        spread += unsaid - unsaid.mean() * sizes / sizes.mean()
    figures, influence = [], None
    if len(windows) > 1:
        influence = spread[: len(kinds)] * (len(windows) / (len(windows) - 1)) ** 0.5 / sizes.sum() * BITS
    for j, kind in enumerate(kinds):
        error = None if influence is None else float((influence[j] ** 2).sum()) ** 0.5
        parts = dict(zip(TERMS, terms[j], strict=True)) | ({"spelling": spelt} if spelt else {})
        parts = {name: float(nats / sizes.sum() * BITS) for name, nats in parts.items()}
        drawn = kind[0] == "upper" and not np.isnan(terms[j]).any()
        figures.append(Figure(float(totals[j] / sizes.sum() * BITS), error, *kind, parts if drawn else None))
    tokens = int(sum(len(w) for w in windows))
    return Report(figures[0], figures[1:], curve, len(windows), tokens, int(sizes.sum()), influence)


def _by_draws(
    process: Process,
    x: Tensor,
    labels: Tensor | None,
    sizes: np.ndarray,
    budgets: Sequence[int | None],
    draws: int,
    seed: int,
    batch: int,
    group: Group,
    advance: Callable[[float], None],
) -> list[_Sums]:
    """Each budget by itself, from draws of ``process.nll``; a family with an exact likelihood has the first alone."""
    out: list[_Sums] = []
    # Network calls of a draw, about: all of a sampler's where each call hands something on to the next.
    costs = [(budget or 2) if process.remembers else 1 for budget in budgets]
    for number, budget in enumerate(budgets):
        if out and out[0].kind == "exact":
            break
        terms, draw = np.zeros((len(TERMS), len(x))), 0
        while True:
            for begin, own in _turns(len(x), batch, group):
                part = slice(begin, begin + batch)
                model = process if labels is None else told(process, labels[part])
                nll = model.nll(x[part], Noise(seed, np.arange(len(x))[part], len(x), draw, x.device), budget)
                if own:
                    terms[:, part] += np.stack([getattr(nll, name).double().cpu().numpy() for name in TERMS])
                done = (draw + min(begin + batch, len(x)) / len(x)) / draws
                spent = (sum(costs[:number]) + done * costs[number]) / sum(costs)
                advance(done * draws if nll.kind == "exact" else spent)
            draw += 1
            if nll.kind == "exact" or draw == draws:
                break
        terms = group.total(terms) / draw
        nats = terms.sum(0)
        spread = nats - nats.sum() / sizes.sum() * sizes
        out.append(_Sums(float(nats.sum()), spread, nll.kind, nll.sampler, nll.calls, terms.sum(-1)))
    return out


def _by_order(
    process: Process, x: Tensor, labels: Tensor | None, sizes: np.ndarray, calls: int, sampler: str, batch: int,
    advance: Callable[[float], None],
) -> _Sums:  # fmt: skip
    """The exact likelihood of a sampler that chooses positions by a rule."""
    parts = [slice(begin, begin + batch) for begin in range(0, len(x), batch)]
    models = [process if labels is None else told(process, labels[part]) for part in parts]
    found = []
    for model, part in zip(models, parts, strict=True):
        found.append(order_nll(model, x[part], calls, sampler))
        advance(len(found) / len(parts))
    nats = torch.cat([nll.total for nll in found]).double().cpu().numpy()
    made = max(nll.calls or 0 for nll in found)
    return _Sums(float(nats.sum()), nats - nats.sum() / sizes.sum() * sizes, "exact", sampler, made)


def _by_curve(
    process: Any,
    x: Tensor,
    labels: Tensor | None,
    sizes: np.ndarray,
    budgets: Sequence[int | None],
    sampler: str | None,
    copies: int,
    seed: int,
    batch: int,
    group: Group,
    advance: Callable[[float], None],
) -> tuple[list[float], list[_Sums]]:
    """Curve in nats by number shown (empty if too few examples for all its points), and the sums of every budget.

    Copy c of all windows fills the c-th of ``copies`` ranges of the number hidden, in a random order of its own. With
    at least two examples a number each window is equally likely at each number; with fewer, an example stands at a
    random place of its stratum. Either way any weighted sum is unbiased.
    """
    windows, length = x.shape
    examples = windows * copies
    keyed = Noise.of(seed, copies)
    order = keyed.uniform("order", windows).argsort(-1).argsort(-1).numpy()
    window = np.tile(np.arange(windows), copies)
    place = (np.arange(copies)[:, None] * windows + order).ravel().astype(float)
    whole = examples >= 2 * length
    if not whole:
        place += keyed.uniform("place", windows).numpy().ravel()
    n = 1 + np.minimum((place * length / examples + 1e-9).astype(np.int64), length - 1)
    hidden = torch.from_numpy(n).to(x.device)
    values = np.zeros(examples)
    for begin, own in _turns(examples, batch, group):
        part = np.arange(begin, min(begin + batch, examples))
        noise = Noise(seed, part, examples, 1, x.device)
        model: Any = process if labels is None else told(process, labels[window[part]])
        points = model.curve_point(x[window[part]], hidden[part], noise).double().cpu().numpy()
        if own:
            values[part] = points
        advance(float(part[-1] + 1) / examples)
    values = group.total(values)
    count = np.bincount(n, minlength=length + 1).astype(float)
    # A window of more characters is expected to hold more nats.
    share = (sizes / max(sizes.mean(), 1e-9))[window]
    if whole:
        mean = np.bincount(n, weights=values, minlength=length + 1) / np.maximum(count, 1)
        # m / (m - 1): the spread is about the point's own mean.
        factor = np.sqrt(count / np.maximum(count - 1, 1))
        residual = (values - mean[n] * share) * factor[n] / count[n]
    out = []
    for budget in budgets:
        weight, made = process.curve_weights(length, budget, sampler)
        if whole:
            nats, parts = windows * float(weight @ mean), windows * weight[n] * residual
        else:
            # Numbers are drawn uniformly, by strata: each example stands for length / copies of them.
            single = weight[n] * values * length / copies
            nats, parts = float(single.sum()), single - single.mean() * share
        spread = np.bincount(window, weights=parts, minlength=windows)
        out.append(_Sums(nats, spread, "upper", sampler or next(iter(process.steps)), made))
    return mean[:0:-1].tolist() if whole else [], out


def _turns(total: int, batch: int, group: Group) -> Iterator[tuple[int, bool]]:
    """Where this process's batches begin, and whether each is its own: all processes make equally many calls, which
    they must where they share a network, and what one makes only to keep step is not counted."""
    begins = range(0, total, batch)
    for turn in range(0, len(begins), group.size):
        place = turn + group.rank
        yield begins[min(place, len(begins) - 1)], place < len(begins)


# -- samples ------------------------------------------------------------------------------------------------------


def whole_words(text: str) -> list[str]:
    """Lower-cased words of a sample; without a first or last that its ends may have cut."""
    found = list(WORD.finditer(text.lower()))
    if found and found[0].start() == 0:
        found = found[1:]
    if found and found[-1].end() == len(text):
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
    for n in ORDERS:
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
