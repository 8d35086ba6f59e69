"""How far long work has come. Who does it tells; nothing is shown unless somebody watches, so that calls are quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WATCHER: ContextVar[Callable[[str, float], None] | None] = ContextVar("watcher", default=None)
MEMORY = 600.0  # seconds back that the time left is reckoned from: a network call may take many


def tell(what: str, share: float) -> None:
    """Say that such a share of ``what``, from 0 to 1, is done."""
    if (watcher := _WATCHER.get()) is not None:
        watcher(what, share)


@contextmanager
def watched(watcher: Callable[[str, float], None]) -> Iterator[None]:
    """Have ``watcher`` called with all that is told meanwhile."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Show what is told meanwhile as a bar with the time left, which goes when all is done; only in a terminal."""
    if quiet or not sys.stderr.isatty():  # what is asked for goes to the other stream
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, speed_estimate_period=MEMORY) as bar:
        tasks: dict[str, TaskID] = {}

        def watcher(what: str, share: float) -> None:
            if what not in tasks:
                for done in tasks.values():
                    bar.update(done, visible=False)
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share, visible=True)

        with watched(watcher):
            yield
