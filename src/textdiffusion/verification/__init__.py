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
from functools import partial
from pathlib import Path
from typing import Any

from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import Discrete, HasKernel, HasSignal, Process
from textdiffusion.verification.bounds import bounds
from textdiffusion.verification.contract import contract, real_network, units
from textdiffusion.verification.forward import kernel, signal
from textdiffusion.verification.reals import reals_infilling, reals_sampler
from textdiffusion.verification.reverse import infilling, sampler
from textdiffusion.verification.subject import Check, L, Subject, V

__all__ = ["Check", "Subject", "parts", "verify"]


def verify(family: type[Process], config: Any = None) -> Iterator[Check]:
    """Every check that fits the family, one by one. A family whose code fails fails a check that says where."""
    try:
        every = parts(Subject(family, config))
    except (Exception, SystemExit) as error:
        yield _broken(family, "building it", error)
        return
    for what, checks in every.items():
        try:
            yield from checks()
        except (Exception, SystemExit) as error:
            yield _broken(family, what, error)


def parts(subject: Subject) -> dict[str, Callable[[], Iterator[Check]]]:
    """What ``verify`` goes through, by what it is about, in its order; each can be made without the others."""
    process = subject.ideal(random_table(V, L))
    found: dict[str, Callable[[], Iterator[Check]]] = {"the contract": partial(contract, subject)}
    if isinstance(process, HasKernel):
        found["the kernel"] = partial(kernel, process)
    if isinstance(process, HasSignal):
        found["the signal"] = partial(signal, process)
    discrete = isinstance(process.space, Discrete)
    if process.steps:
        found["a real network"] = partial(real_network, subject)
    found["the units"] = partial(units, subject)
    found["the bound"] = partial(bounds, subject)
    for name in process.steps:
        found[f"the sampler {name}"] = partial(sampler if discrete else reals_sampler, subject, name)
        found[f"infilling by {name}"] = partial(infilling if discrete else reals_infilling, subject, name)
    return found


def _broken(family: type[Process], what: str, error: BaseException) -> Check:
    """The check that fails when code does, naming the last line of the family's own file, if the fault went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getfile(family)] or frames
    said = f"{type(error).__name__}: {error} (line {own[-1].lineno} of {Path(own[-1].filename).name})"
    return Check(f"checking {what} gets through", math.inf, 0, " ".join(said.split()))
