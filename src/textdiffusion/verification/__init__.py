"""Prove a family right on worlds small enough to enumerate: its noise, its bound, its samplers.

The exact posterior of a world takes the network's place (``Process.ideal``); then the bound must be -log p(x) for every
text and samples must have the enumerated law. For networks that are wrong, the bound of the T-call sampler must not be
below -log of that sampler's enumerated law for any text. The checks are the same for a family in families/ and for one
in a user's own file: what a family gives (a kernel, a signal, a curve, steps) decides which of them apply.

What cannot be enumerated is drawn, and judged by its own standard error; draws are keyed, so a verdict does not change
from run to run.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from textdiffusion.process import Discrete, HasKernel, HasSignal, Process
from textdiffusion.verification.bounds import bounds
from textdiffusion.verification.contract import contract, real_network, units
from textdiffusion.verification.forward import kernel, signal
from textdiffusion.verification.reverse import infilling, sampler
from textdiffusion.verification.subject import Check, L, Subject, V
from textdiffusion.worlds import random_table

__all__ = ["Check", "Subject", "verify"]


def verify(family: type[Process], config: Any = None) -> Iterator[Check]:
    """Every check that fits the family, one by one. A family whose code fails fails a check that says where."""
    try:
        subject = Subject(family, config)
        process = subject.ideal(random_table(V, L))
        discrete, samplers = isinstance(process.space, Discrete), list(process.steps)
    except (Exception, SystemExit) as error:
        yield _broken(family, "building it", error)
        return
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [("the contract", lambda: contract(subject))]
    if isinstance(process, HasKernel):
        parts.append(("the kernel", lambda: kernel(process)))
    if isinstance(process, HasSignal):
        parts.append(("the signal", lambda: signal(process)))
    if discrete:
        parts.append(("a real network", lambda: real_network(subject)))
    parts.append(("the units", lambda: units(subject)))
    parts.append(("the bound", lambda: bounds(subject)))
    if discrete:
        for name in samplers:
            parts.append((f"the sampler {name}", lambda name=name: sampler(subject, name)))  # type: ignore[misc]
            parts.append((f"infilling by {name}", lambda name=name: infilling(subject, name)))  # type: ignore[misc]
    for what, checks in parts:
        try:
            yield from checks()
        except (Exception, SystemExit) as error:
            yield _broken(family, what, error)


def _broken(family: type[Process], what: str, error: BaseException) -> Check:
    """The check that fails when code does, naming the last line of the family's own file, if the fault went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getfile(family)] or frames
    said = f"{type(error).__name__}: {error} (line {own[-1].lineno} of {Path(own[-1].filename).name})"
    return Check(f"checking {what} gets through", math.inf, 0, " ".join(said.split()))
