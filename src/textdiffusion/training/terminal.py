"""What a person sees of a training: a line that moves in a terminal, plain lines over a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from textdiffusion.config import SHIPPED, RunConfig
from textdiffusion.display import plots
from textdiffusion.display.frames import one_line
from textdiffusion.parallel.distributed import Group
from textdiffusion.parallel.sharding import Parallel
from textdiffusion.training.fit import Event, Started, Stepped, Stopped, Validated, Warned, fit
from textdiffusion.training.tracking import tracked

PLAIN_EVERY = 10.0  # seconds between two progress lines over a pipe


def clock(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingView:
    """Prints the events of a training: a line that moves in a terminal, a line now and then over a pipe."""

    def __init__(self, console: Console, quiet: bool = False):
        self.console, self.quiet = console, quiet
        self.last = -PLAIN_EVERY
        self.line = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and not quiet else None
        )

    def __enter__(self) -> TrainingView:
        if self.line:
            self.line.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.line:
            self.line.stop()

    def show(self, event: Event) -> None:
        if self.quiet:
            return
        if isinstance(event, Started):
            self._say(
                f"{event.family}: {event.parameters / 1e6:.2f} M parameters in {event.precision}, "
                f"{event.training_tokens:,} tokens to learn from, {event.validation_tokens:,} held out"
            )
            self._say(event.tokenizer)
            if event.resumed_at:
                self._say(f"going on from step {event.resumed_at:,}")
        elif isinstance(event, Stepped):
            self._progress(event)
        elif isinstance(event, Validated):
            mark = "" if event.best else "  not better than before"
            self._say(f"step {event.step:>7,}  held out {event.figure}{mark}")
            if event.risen_since is not None:
                self._say(
                    f"  the held-out figure has risen since step {event.risen_since:,}: over-fitting; "
                    "the weights of that step are kept"
                )
            if event.sample is not None:
                self.console.print(Text("  " + one_line(event.sample), style="italic"), soft_wrap=True)
        elif isinstance(event, Warned):
            self._say(f"warning: {event.line}")
        elif isinstance(event, Stopped) and event.signal is not None:
            self._say(
                f"stopped at step {event.step:,} and saved; go on with: textdiffusion train --out {event.run} --resume"
            )

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _progress(self, event: Stepped) -> None:
        line = (
            f"step {event.step:>7,} {event.progress:>4.0%}  objective {event.objective:.3f}  "
            f"{event.tokens_per_second:,.0f} tokens/s  {clock(event.left)} left"
        )
        now = time.monotonic()
        if self.line:
            self.line.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self.last >= PLAIN_EVERY:
            self.last = now
            self._say(line)


def follow(
    config: RunConfig,
    path: Path,
    resume: bool,
    device: str,
    console: Console,
    quiet: bool = False,
    track: str | None = None,
    parallel: Parallel = "auto",
    group: Group | None = None,
) -> Stopped:
    """Train, or go on with, a run, and show it; ``group`` as in fit."""
    last = None
    with TrainingView(console, quiet) as view:
        events = fit(config, path, resume=resume, device=device, parallel=parallel, group=group)
        for event in tracked(events, track, config, path):
            view.show(event)
            if isinstance(event, Stopped):
                last = event
    assert last is not None
    return last


def changes(before: str, after: str) -> list[tuple[str, str]]:
    """What differs between two texts, as (old, new) pieces in order."""
    return [
        (before[a:b], after[c:d])
        for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        if kind != "equal"
    ]


def leave_plot(run: Path, save: Callable[[ModuleType], Path | None], quiet: bool = False) -> None:
    """Leave a plot in a run's folder by a function of `plots`, and say so in a line; a run that cannot be written to is
    left as it is."""
    if not plots.can_plot():
        said: str | None = plots.MISSING
    elif run == SHIPPED or not os.access(run, os.W_OK):
        return
    else:
        try:
            file = save(plots)
            said = "no plot: a curve takes two points" if file is None else f"plot: {file}"
        except OSError as error:  # what was trained or measured is there all the same
            said = f"no plot: {error.filename or run}: {error.strerror or error}"
    if said is not None and not quiet:
        print(said, file=sys.stderr)
