"""Which of several texts a model finds likelier: each by its own likelihood, or the bound on it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from textdiffusion.evaluation.measures import Figure, evaluate
from textdiffusion.process import Process


def rank(
    process: Process,
    texts: Tensor,
    characters: np.ndarray,
    window: int,
    *,
    label: int | None = None,
    draws: int = 64,
    seed: int = 0,
) -> list[tuple[int, Figure]]:
    """Texts int64 [n L] (-1 behind their ends) by what they cost in all, given their label if there is one, cheapest
    first: number, and figure in bits a character.

    Where some of their tokens are the same ones, given, this is their order by the rest given those: p(rest | given) is
    p(text) up to a factor that is the same for all. Where only a bound is known, it is the order of the bounds, which
    may lie further from one text's likelihood than from another's. Every text is read under the same noise, ``draws``
    times where its likelihood is bounded by draws, so that what differs is the texts; texts that are nearly as likely
    can still change places. Texts longer than ``window`` are read window by window.
    """
    figures, costs = [], dict[int, float]()
    for number, row in enumerate(texts):
        ids = row[row >= 0].cpu().numpy()
        parts = [ids[i : i + window] for i in range(0, max(len(ids), 1), window)]
        labels = None if label is None else np.full(len(parts), label)
        said = evaluate(
            process, parts, characters, labels=labels, draws=draws, seed=seed, device=texts.device,
            what=f"text {number + 1} of {len(texts)}",
        )  # fmt: skip
        figures.append((number, said.figure))
        costs[number] = said.figure.bits_per_char * float(characters[ids].sum())
    return sorted(figures, key=lambda pair: costs[pair[0]])
