"""Frames that can be read, and shown: text appearing out of noise, in a terminal, a notebook or over a pipe."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from textdiffusion.sampling import Frame
from textdiffusion.tokenizer import Tokenizer

if TYPE_CHECKING:
    # At run time where something is shown: samples that are only printed need not wait for it.
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

BLANK = "░"  # a position where nothing is written yet
NEWLINE = "⏎"
# Confidence by lightness first and hue second, so that it reads without colour vision: dark blue is unsure, pale
# yellow sure (three stops of the cividis map).
CONFIDENCE = ((0.25, "#8c9fdc"), (0.6, "#b9b48c"), (1.01, "#f5e56b"))


@dataclass(frozen=True)
class TextFrame:
    """A frame of the reverse process (sampling.Frame) that can be read.

    given: bool [B L], which tokens were fixed; stop: texts end where their first document does.
    """

    frame: Frame
    given: torch.Tensor
    tokenizer: Tokenizer
    stop: bool = False

    @property
    def pieces(self) -> list[list[str]]:
        """For each text, the string of each token, BLANK where nothing is written."""
        names = self.tokenizer.pieces()
        rows = map(self._to_its_end, self.frame.tokens.tolist())
        return [[BLANK if t < 0 else names[t] for t in row] for row in rows]

    @property
    def texts(self) -> list[str]:
        """The texts, with BLANK where nothing is written yet."""
        return [self._text(self._to_its_end(row)) for row in self.frame.tokens.tolist()]

    def _to_its_end(self, row: list[int]) -> list[int]:
        """A text without its end-of-text token and the nothing behind it, once it has ended."""
        last = next((i for i in range(len(row) - 1, -1, -1) if row[i] >= 0), 0)
        ended = self.stop and row[last] == self.tokenizer.end_of_text and -1 not in row[:last]
        return row[:last] if ended else row

    def _text(self, row: list[int]) -> str:
        """Decode runs of written tokens, so that characters of several bytes come out whole."""
        out, run = [], list[int]()
        for token in [*row, -1]:
            if token >= 0:
                run.append(token)
                continue
            out.append(self.tokenizer.decode(run) if run else "")
            out.append(BLANK)
            run = []
        return "".join(out[:-1])


def one_line(text: str) -> str:
    """Line ends made visible, so that a sample is one line."""
    return text.replace("\n", NEWLINE)


def painted(frame: TextFrame, row: int, breaks: bool = True) -> Text:
    """A text in its present state: noise dim, given tokens underlined, written ones by confidence.

    Line ends are shown by a symbol, and broken at if ``breaks``.
    """
    from rich.text import Text

    text = Text()
    for i, piece in enumerate(frame.pieces[row]):
        if piece == BLANK:
            text.append(BLANK, style="dim")
            continue
        confidence = float(frame.frame.confidence[row, i])
        colour = next(colour for limit, colour in CONFIDENCE if confidence < limit)
        style = "bold underline" if bool(frame.given[row, i]) else colour
        text.append(piece.replace("\n", NEWLINE + "\n" * breaks), style=style)
    return text


def watch(frames: Iterable[TextFrame], console: Console | None = None, seconds: float = 4.0) -> list[str]:
    """Show texts appear; returns them.

    In a terminal or a notebook the panel is redrawn in place, slowed down to about ``seconds`` in all; over a pipe
    about eight frames are printed as plain lines.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    last: TextFrame | None = None
    if console.is_jupyter:
        # rich's own live view of a notebook needs widgets, and shows nothing where there are none.
        from IPython.display import HTML, display

        shown_at = None
        for frame in frames:
            last = frame
            if shown_at is None:
                shown_at = display(HTML(_html(frame)), display_id=True)
            else:
                shown_at.update(HTML(_html(frame)))
            time.sleep(seconds / max(frame.frame.of, 1))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames:
                last = frame
                live.update(_panel(frame), refresh=True)
                time.sleep(seconds / max(frame.frame.of, 1))
    else:
        shown = None
        for frame in frames:
            last = frame
            if frame.frame.step % max(1, frame.frame.of // 8) == 0:
                shown = _print_lines(frame)
        if last is not None and shown is not last:
            _print_lines(last)
    return last.texts if last else []


def _html(frame: TextFrame) -> str:
    """The panel for a notebook."""
    from rich.console import Console

    page = Console(record=True, file=io.StringIO(), width=100, force_terminal=True, force_jupyter=False,
                   color_system="truecolor")  # fmt: skip
    page.print(_panel(frame))
    style = "background:#1e1e1e; color:#cccccc; padding:0.5em; font-family:monospace; line-height:1.2"
    return page.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')


def _print_lines(frame: TextFrame) -> TextFrame:
    for text in frame.texts:
        print(f"{frame.frame.step:>4}/{frame.frame.of} t={frame.frame.t:.2f}  {one_line(text)}", flush=True)
    return frame


def _panel(frame: TextFrame) -> Panel:
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    now = frame.frame
    title = f"step {now.step}/{now.of} · noise {now.t:.2f} · {int(now.calls.max())} calls"
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
