"""What a person sees: training as it goes, and text appearing out of noise; plain lines when no terminal is there."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from textdiffusion.fit import Event, Started, Stepped, Stopped, Validated
from textdiffusion.model import BLANK, TextFrame

# Confidence by lightness first and hue second, so that it reads without colour vision: dark blue is unsure, pale
# yellow sure (three stops of the cividis map).
CONFIDENCE = ((0.25, "#5a6b9a"), (0.6, "#a5a07a"), (1.01, "#f5e56b"))
PLAIN_EVERY = 10.0  # seconds between two progress lines over a pipe
NEWLINE = "⏎"


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
            mark = "  best so far" if event.best else ""
            self._say(f"step {event.step:>7,}  held out {event.figure}{mark}")
            if event.risen_since is not None:
                self._say(
                    f"  the held-out figure has risen since step {event.risen_since:,}: over-fitting; "
                    "the weights of that step are kept"
                )
            if event.sample is not None:
                self.console.print(Text("  " + one_line(event.sample), style="italic"), soft_wrap=True)
        elif isinstance(event, Stopped) and event.signal is not None:
            self._say(
                f"stopped at step {event.step:,} and saved; go on with: textdiffusion train --out {event.run} --resume"
            )

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _progress(self, event: Stepped) -> None:
        line = (
            f"step {event.step:>7,} {event.progress:>4.0%}  learning {event.bits_per_char:.3f} bits/char  "
            f"{event.tokens_per_second:,.0f} tokens/s  {clock(event.left)} left"
        )
        now = time.monotonic()
        if self.line:
            self.line.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now - self.last >= PLAIN_EVERY:
            self.last = now
            self._say(line)


def one_line(text: str) -> str:
    """Line ends made visible, so that a sample is one line."""
    return text.replace("\n", NEWLINE)


def painted(frame: TextFrame, row: int) -> Text:
    """A text in its present state: noise dim, given tokens underlined, written ones by confidence."""
    text = Text()
    for i, piece in enumerate(frame.pieces[row]):
        if piece == BLANK:
            text.append(BLANK, style="dim")
            continue
        confidence = float(frame.frame.confidence[row, i])
        colour = next(colour for limit, colour in CONFIDENCE if confidence < limit)
        style = "bold underline" if bool(frame.given[row, i]) else colour
        text.append(piece.replace("\n", NEWLINE + "\n"), style=style)
    return text


def watch(frames: Iterable[TextFrame], console: Console | None = None, seconds: float = 4.0) -> list[str]:
    """Show texts appear; returns them.

    In a terminal or a notebook the panel is redrawn in place, slowed down to about ``seconds`` in all; over a pipe
    about eight frames are printed as plain lines.
    """
    console = console or Console()
    last: TextFrame | None = None
    if console.is_terminal or console.is_jupyter:
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames:
                last = frame
                live.update(_panel(frame), refresh=True)
                time.sleep(seconds / max(frame.frame.of, 1))
    else:
        for frame in frames:
            last = frame
            step, of = frame.frame.step, frame.frame.of
            if step == of or step % max(1, of // 8) == 0:
                for text in frame.texts:
                    print(f"{step:>4}/{of} t={frame.frame.t:.2f}  {one_line(text)}", flush=True)
    return last.texts if last else []


def _panel(frame: TextFrame) -> Panel:
    now = frame.frame
    title = f"step {now.step} of {now.of} · noise {now.t:.2f} · {int(now.calls.max())} network calls"
    texts: list[Text] = []
    for row in range(len(frame.pieces)):
        texts += [painted(frame, row), Text("")]
    legend = Text()
    legend.append("░ noise  ", style="dim")
    for name, (_, colour) in zip(("unsure  ", "likely  ", "sure  "), CONFIDENCE):
        legend.append(name, style=colour)
    if bool(frame.given.any()):
        legend.append("given", style="bold underline")
    return Panel(Group(*texts, legend), title=title, border_style="dim")
