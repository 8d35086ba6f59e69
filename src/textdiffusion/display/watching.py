"""Text appearing out of noise: in a terminal, a notebook or over a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING
from unicodedata import category

from textdiffusion.display.frames import BLANK, NEWLINE, TextFrame, one_line
from textdiffusion.display.replay.canvas import notebook
from textdiffusion.display.replay.recording import Panel, recorded

if TYPE_CHECKING:
    # At run time where something is shown: samples that are only printed need not wait for it.
    from rich.console import Console, RenderableType
    from rich.text import Text

# Confidence by lightness first and hue second, so that it reads without colour vision: dark blue is unsure, pale
# yellow sure (three stops of the cividis map). Every other state has a shape of its own.
UNSURE, LIKELY, SURE = "#8c9fdc", "#b9b48c", "#f5e56b"
STYLES = {
    "n": "dim", "g": "bold underline", "c0": UNSURE, "c1": LIKELY, "c2": SURE,
    "t0": f"italic {UNSURE}", "t1": f"italic {LIKELY}", "t2": f"italic {SURE}",
}  # fmt: skip
LEGEND = (("n", f"{BLANK} noise"), ("c0", "unsure"), ("c1", "likely"), ("c2", "sure"), ("t1", "may still change"),
          ("g", "given"))  # fmt: skip
NARROWEST = 36  # cells of a column: less breaks most lines
PIPED = 8  # frames that are printed over a pipe, about


def painted(frame: TextFrame, row: int, breaks: bool = True) -> Text:
    """A text in its present state: noise dim, given tokens underlined, tentative ones slanted, written ones by
    confidence.

    Line ends are shown by a symbol, and broken at if ``breaks``.
    """
    from rich.text import Text

    text, style = Text(), ""
    for code, piece in frame.cells[row]:
        # A mark is of the colour of what it stands on: a terminal that changes colour between them may draw two.
        if not (style and category(piece[:1] or "x").startswith("M")):
            style = STYLES[code]
        text.append(piece if breaks else piece.replace(NEWLINE + "\n", NEWLINE), style=style)
    return text


def watch(
    frames: Iterable[TextFrame], console: Console | None = None, seconds: float = 4.0, panel: Panel | None = None
) -> list[str]:
    """Show texts appear; returns them.

    In a terminal or a notebook they are redrawn in place, slowed down to about ``seconds`` in all, side by side as far
    as there is room; over a pipe about eight frames are printed as plain lines.

    Args:
        panel: takes in every frame, for a replay.
    """
    from rich.console import Console
    from rich.live import Live

    console, panel = console or Console(), panel or Panel("")
    last: TextFrame | None = None
    frames = recorded(frames, panel)
    if console.is_jupyter:
        # rich's own live view of a notebook needs widgets, and shows nothing where there are none.
        from IPython.display import HTML, display

        shown_at = None
        for last in frames:
            if shown_at is None:
                shown_at = display(HTML(notebook([panel])), display_id=True)
            else:
                shown_at.update(HTML(notebook([panel])))
            time.sleep(seconds / max(last.frame.of, 1))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for last in frames:
                live.update(drawn(last, panel.now.status, console.width), refresh=True)
                time.sleep(seconds / max(last.frame.of, 1))
    else:
        shown = None
        for last in frames:
            if last.frame.step % max(1, last.frame.of // PIPED) == 0:
                shown = _print_lines(last)
        if last is not None and shown is not last:
            _print_lines(last)
    return last.texts if last else []


def _print_lines(frame: TextFrame) -> TextFrame:
    for text in frame.texts:
        print(f"{frame.frame.step:>4}/{frame.frame.of} t={frame.frame.t:.2f}  {one_line(text)}", flush=True)
    return frame


def drawn(frame: TextFrame, status: str, width: int) -> RenderableType:
    """The texts in columns, as many as fit into ``width`` cells, in a frame that says where they stand."""
    from rich.console import Group
    from rich.panel import Panel as Box
    from rich.table import Table
    from rich.text import Text

    rows = len(frame.cells)
    columns = max(1, min(rows, (width - 4) // NARROWEST))
    # As even as can be: four texts where three fit are two and two.
    columns = -(-rows // -(-rows // columns))
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in range(columns):
        table.add_column(ratio=1, overflow="fold")
    for first in range(0, rows, columns):
        if first:
            table.add_row()
        table.add_row(*(painted(frame, row) for row in range(first, min(first + columns, rows))))
    found = {code for row in frame.cells for code, _ in row}
    always = {"n", "c0", "c1", "c2"}  # so that the frame does not change its height while it writes
    legend = Text()
    for code, name in LEGEND:
        if code in always or code in found or (code == "t1" and frame.tentative):
            legend.append(name, style=STYLES[code])
            legend.append("  ")
    title = status.replace("\N{NO-BREAK SPACE}", " ")
    return Box(Group(table, Text(""), legend), title=title, border_style="dim")
