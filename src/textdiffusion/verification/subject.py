"""What is verified: a check's result, and the family over the networks that the checks put in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from textdiffusion.mathematics.worlds import Table
from textdiffusion.process import Network, Process

V, L = 3, 3
DRAWS = 4000
ROUNDING = 1e-9  # of float64
DEVIATIONS = 5.0  # standard errors that a mean of draws may be off
IMPROBABLE = 6.0  # -log10 of the chance of draws this far from their law, were it right


@dataclass(frozen=True)
class Check:
    """One check: a figure that must not exceed its tolerance, and what it means if it does."""

    name: str
    figure: float
    tolerance: float
    meaning: str

    @property
    def passed(self) -> bool:
        return self.figure <= self.tolerance  # not a number fails


def most(*figures: float | Tensor) -> float:
    """The largest figure; not a number if one of them is not, where ``max`` would pass over it."""
    values = [float(figure) for figure in figures]
    return math.nan if any(map(math.isnan, values)) else max(values)


class Subject:
    """The family under test, over the networks that the checks put in."""

    def __init__(self, family: type[Process], config: Any = None):
        self.family, self.config = family, family.small() if config is None else config

    def over(self, network: Network, vocabulary: int) -> Any:
        """The process over any network."""
        return self.family(network, self.config, vocabulary)

    def silent(self, vocabulary: int) -> Any:
        """The process whose network's head is at zero."""
        outputs = self.family.network_fields(self.config, vocabulary).get("outputs", vocabulary)

        def network(x: Tensor, *_: Any, positions: Tensor | None = None, **__: Any) -> Tensor:
            out = torch.zeros(*x.shape[:2], outputs, dtype=torch.float64)
            return out if positions is None else out[positions]

        return self.over(network, vocabulary)

    def ideal(self, world: Table) -> Any:
        """The process whose network knows the world."""
        bare = self.silent(world.vocabulary)
        return bare.over(bare.ideal(world.context))

    def wrong(self, world: Table, seed: int, far: float = 1.0) -> Any:
        """The process whose network is wrong, differently for all that it can read: for every noisy text, every time
        and every estimate that it is handed. Tokens that it is handed beside the noisy text it believes, so that a text
        which is no estimate, but the answer, shows. ``far``: of the way from the exact posterior."""
        bare = self.silent(world.vocabulary)
        generator = torch.Generator().manual_seed(seed)
        size, length = world.vocabulary, world.length
        reading = torch.randn(length, size, length, size, generator=generator, dtype=torch.float64)
        tilt, weights = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (64, 4096))

        def context(evidence: Tensor) -> Tensor:
            n = evidence.shape[1]
            # Nothing is known of positions that are not there yet, as of those that are hidden.
            seen = pad(evidence.double(), (0, 0, 0, length - n)).softmax(-1)
            disturbance = torch.einsum("bjv,jviw->biw", seen, reading)[:, :n]
            return world.context(evidence).clamp(min=-20) + 1.5 * far * torch.sin(3 * disturbance)

        ideal = bare.ideal(context)

        def network(x: Tensor, *args: Any, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
            out = ideal(x, *args, **kwargs)
            for extra in (*args, *kwargs.values()):
                if isinstance(extra, Tensor):
                    # Numbers of any kind: times, estimates as laws or as tokens, labels.
                    read = extra.double().clamp(-20, 20).view(len(x), -1)
                    phase = (read * weights[: read.shape[1]]).sum(-1)
                    out = out + 0.5 * far * torch.sin(3 * phase + seed).view(-1, 1, 1) * tilt[: out.shape[-1]]
                    if extra.dtype == torch.long and extra.shape == out.shape[:2]:
                        out = out + 3 * far * one_hot(extra.clamp(0, out.shape[-1] - 1), out.shape[-1])
                    elif extra.dtype == torch.long and extra.shape[:2] == out.shape[:2]:
                        # Several tokens a position; symbols that are none say nothing.
                        several = one_hot(extra, 1 + max(out.shape[-1], int(extra.max())))
                        out = out + 1.5 * far * several[..., : out.shape[-1]].sum(-2)
            return out if positions is None else out[positions]

        return bare.over(network)
