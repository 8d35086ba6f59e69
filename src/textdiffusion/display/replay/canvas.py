"""HTML of what is on show: pure functions of cells, with no server and no browser in them."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from textdiffusion.display.frames import BLANK, Cell
from textdiffusion.display.replay.recording import Panel, Recording
from textdiffusion.files import write

QUICK = 2.0  # seconds; what was written faster is played back over SLOWLY
SLOWLY = 3.0
REPLAYED = 6.0  # what a file of its own takes
PLAYER = "<!--player-->"  # where a replay's player goes
_STATES = {
    "n": ("noise", BLANK * 2),
    "g": ("given", "abc"),
    "c0": ("unsure", "abc"),
    "c1": ("likely", "abc"),
    "c2": ("sure", "abc"),
    "t1": ("tentative: may still change", "abc"),
    "e": ("mended", "abc"),
}


@cache
def style() -> str:
    """The canvas's style sheet."""
    return files(__package__).joinpath("canvas.css").read_text(encoding="utf-8")


@cache
def script() -> str:
    """The player's JavaScript."""
    return files(__package__).joinpath("player.js").read_text(encoding="utf-8")


def row_html(cells: Iterable[Cell]) -> str:
    """One text: neighbours of one state share a span."""
    runs = groupby(cells, key=lambda cell: cell[0])
    return "".join(f'<span class="{code}">{html.escape("".join(t for _, t in run))}</span>' for code, run in runs)


def panel_html(panel: Panel) -> str:
    """A panel as it stands: title, status, share of the steps made, and its texts."""
    rows = []
    for i, row in enumerate(panel.now.rows):
        if i < len(panel.labels):
            rows.append(f'<p class="td-label">{html.escape(panel.labels[i])}</p>')
        rows.append(f'<div class="td-row" translate="no">{row_html(row)}</div>')
    return (
        f'<section class="td-panel"><h3 class="td-title">{html.escape(panel.title)}</h3>'
        f'<p class="td-status">{html.escape(panel.now.status)}</p>'
        f'<div class="td-bar"><span style="width:{panel.now.done:.0%}"></span></div>{"".join(rows)}</section>'
    )


def legend(codes: Iterable[str]) -> str:
    """What the states look like: those that occur, and all three degrees of confidence where one does."""
    found = set(codes)
    if found & {"t0", "t1", "t2"}:
        found |= {"t1", "c0", "c1", "c2"}
    if found & {"c0", "c1", "c2"}:
        found |= {"c0", "c1", "c2"}
    items = [
        f'<span><span class="{code}">{sign}</span> {name}</span>'
        for code, (name, sign) in _STATES.items()
        if code in found
    ]
    return f'<div class="td-legend" role="note" aria-label="legend">{"".join(items)}</div>'


def canvas(panels: Sequence[Panel], note: str = "") -> str:
    """Panels as they stand now, with a legend: what the page shows while it writes."""
    return f'<div class="td">{_body(panels, note)}</div>'


def notebook(panels: Sequence[Panel]) -> str:
    """The same for a notebook, which has no style of the page's."""
    return f"<style>{style()}</style>{canvas(panels)}"


def _body(panels: Sequence[Panel], note: str, codes: Iterable[str] = ()) -> str:
    now = {code for panel in panels for row in panel.now.rows for code, _ in row}
    said = f'<p class="td-note" role="status">{html.escape(note)}</p>' if note else ""
    return f'<div class="td-panels">{"".join(map(panel_html, panels))}</div>{legend({*now, *codes})}{said}'


def player(recording: Recording, begin: float = 1.0, downloads: bool = True, plays: float = 0.0) -> str:
    """The same in the end, with all that happened: a scrubber, and downloads.

    Args:
        begin: share of the steps at which the scrubber stands first.
        downloads: offer copy, text, JSON and replay.
        plays: seconds in which it is played once, as soon as it is seen; 0: only what was written in less than QUICK.
    """
    codes = {
        cell[1] for p in recording.panels for step in p.steps for row in step["rows"] for cell in row[1:]
    }  # of every step
    seconds = max(panel.seconds for panel in recording.panels)
    slowly = plays or (SLOWLY if begin == 1.0 and seconds < QUICK else 0.0)
    buttons = [("td-copy", "Copy"), ("td-save-text", "Text"), ("td-save-json", "JSON"), ("td-save-html", "Replay")]
    saves = "".join(
        f'<button type="button" class="{name}" title="{title}">{label}</button>'
        for (name, label), title in zip(
            buttons,
            ("copy the text", "download the text", "download every step as JSON", "download a page that plays this"),
        )
    )
    return (
        f'<div class="td td-player" data-begin="{begin:g}" data-play="{slowly:g}">'
        f"{_body(recording.panels, recording.note, codes)}"
        '<div class="td-controls"><button type="button" class="td-play">▶ Play</button>'
        '<input type="range" min="0" value="0" step="1" aria-label="step"><span class="td-where"></span>'
        f"{saves if downloads else ''}</div>"
        f'<div hidden class="td-recording">{html.escape(recording.to_json(), quote=False)}</div></div>'
    )


def error(line: str) -> str:
    """A mistake of the user's, as one line."""
    return f'<div class="td"><p class="td-error" role="alert">{html.escape(" ".join(line.split()))}</p></div>'


def hint(line: str) -> str:
    """What stands on the canvas before anything is written."""
    return f'<div class="td"><p class="td-hint">{html.escape(line)}</p></div>'


def replay_page(body: str = PLAYER, title: str = "textdiffusion: a replay") -> str:
    """A page of its own that plays a `player`, offline: style and script are in it, and nothing else is asked for."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style()}\n"
        "body { margin: 0; padding: 16px; background: #fff; } .dark body { background: #0d1117; }"
        ".td { max-width: 1100px; margin: 0 auto; }</style></head><body>\n"
        f'{body}\n<script>document.documentElement.classList.toggle("dark", '
        'matchMedia("(prefers-color-scheme: dark)").matches);\n'
        f"{script()}</script></body></html>\n"
    )


def save_replay(recording: Recording, path: Path) -> None:
    """Write a page of its own that plays a recording; a file of that name is replaced.

    Raises:
        OSError: it cannot be written.
    """
    write(path, replay_page(player(recording, plays=REPLAYED), recording.panels[0].title))


def head() -> str:
    """What the page needs in its head: the style, the script, and an empty replay for the download to fill."""
    shell = json.dumps(replay_page()).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    return f"<style>{style()}</style>\n<script>window.tdShell = {shell};\n{script()}</script>"
