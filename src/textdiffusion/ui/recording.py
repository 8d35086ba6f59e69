"""What a page shows of frames: each token's state and confidence, and all that happened, to be played again.

A cell is one token on show, (code, text). The code is what is known of it:

    n         noise: nothing is written yet, or a symbol that came with the noise
    g         given by the user
    c0 c1 c2  committed: it stays as it is; the model was unsure, likely or sure of it
    t0 t1 t2  tentative: later steps may change it; in the same three degrees
    e         mended: another token than in the user's text
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any
from unicodedata import category

from textdiffusion.process import Gaussian, Process
from textdiffusion.watching import CONFIDENCE, NEWLINE, TextFrame

Cell = tuple[str, str]
LIMITS = [limit for limit, _ in CONFIDENCE]  # the same three degrees as in the terminal


def revises(process: Process) -> bool:
    """Whether a reverse step may change a token that is written already: where noise replaces tokens, and does not only
    hide them, until t = 0."""
    return isinstance(process.space, Gaussian) or process.time_of(0.05) is not None


def degree(confidence: float) -> int:
    """0 unsure, 1 likely, 2 sure, from a probability."""
    return sum(confidence >= limit for limit in LIMITS[:-1])


def cells(frame: TextFrame, row: int, tentative: bool = False) -> list[Cell]:
    """One text of a frame as cells, one a token.

    Args:
        tentative: written tokens may still change; none does once t = 0.
    """
    pieces = frame.pieces[row]
    tokens, confidence = frame.frame.tokens[row].tolist(), frame.frame.confidence[row].tolist()
    given = frame.given[row].tolist()
    letter = "t" if tentative and frame.frame.t > 0 else "c"
    return [
        (_code(token, known, chance, letter), visible(piece))
        for piece, token, chance, known in zip(pieces, tokens, confidence, given)  # pieces end where the text does
    ]


def _code(token: int, given: bool, confidence: float, letter: str) -> str:
    if given:
        return "g"
    return "n" if token < 0 or confidence == 0 else f"{letter}{degree(confidence)}"


@lru_cache(maxsize=1 << 16)
def visible(piece: str) -> str:
    """A token's string with a sign for line ends, which stay, and for control characters, which do not."""
    shown = piece.replace("\n", NEWLINE + "\n")
    if shown.isprintable():
        return shown
    return "".join(c if category(c) != "Cc" or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)


def difference(before: str, after: str) -> list[Cell]:
    """``after`` as cells: what stands in ``before`` too is given, the rest is mended."""
    found: list[Cell] = []
    for kind, _, _, begin, end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if end > begin:
            found.append(("g" if kind == "equal" else "e", visible(after[begin:end])))
    return found


@dataclass
class Moment:
    """Where a panel stands: rows of cells, and a line that says so."""

    rows: list[list[Cell]]
    status: str
    done: float  # share of the steps made


@dataclass
class Panel:
    """A stream of frames: its first one, and what each later one changed.

    title: what writes; labels: one a row, or none; texts: the rows as plain text, in the end.
    """

    title: str
    tentative: bool = False
    labels: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    now: Moment = field(default_factory=lambda: Moment([], "", 0.0))

    def add(self, frame: TextFrame, seconds: float) -> None:
        """Take in a frame; ``seconds``: of computing, since the one before."""
        at = frame.frame
        self.seconds += seconds
        calls = int(at.calls.max())
        parts = [f"step {at.step} of {at.of}", f"noise {at.t:.2f}", f"{calls} call{'s' * (calls != 1)}"]
        status = " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in [*parts, f"{self.seconds:.2f} s"])
        rows = [cells(frame, row, self.tentative) for row in range(len(at.tokens))]
        self.put(rows, status, at.step / max(at.of, 1), {"step": at.step, "t": at.t, "calls": at.calls.tolist()})
        self.texts = frame.texts

    def put(self, rows: list[list[Cell]], status: str, done: float, facts: dict[str, Any]) -> None:
        """Take in cells made elsewhere."""
        before = self.now.rows or [[] for _ in rows]
        # Each row: its length, then what is new in it.
        changed = [
            [len(row), *([i, *cell] for i, cell in enumerate(row) if i >= len(old) or old[i] != cell)]
            for old, row in zip(before, rows, strict=True)
        ]
        self.steps.append(facts | {"status": status, "seconds": round(self.seconds, 4), "rows": changed})
        self.now = Moment(rows, status, done)


@dataclass
class Recording:
    """Panels that were made together; what a page plays, and a file keeps."""

    panels: list[Panel]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``steps[k]["rows"]``: for each text its length in tokens, then [position, code, token] for each
        that differs from the step before."""
        panels = [
            {"title": p.title, "labels": p.labels, "texts": p.texts, "seconds": round(p.seconds, 4), "steps": p.steps}
            for p in self.panels
        ]
        return {"format": 1, "settings": self.settings, "note": self.note, "panels": panels}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), ensure_ascii=False, separators=(",", ":"))


def replayed(steps: Iterable[dict[str, Any]]) -> list[list[list[Cell]]]:
    """The rows of cells at every step, from what the steps changed: what the page's script does, said once more so that
    it can be tested."""
    rows: list[list[Cell]] = []
    every = []
    for step in steps:
        rows = [_changed(rows[i] if i < len(rows) else [], change) for i, change in enumerate(step["rows"])]
        every.append(rows)
    return every


def _changed(row: list[Cell], change: Sequence[Any]) -> list[Cell]:
    length, *new = change
    row = row[:length] + [("n", "")] * (length - len(row))
    for i, code, text in new:
        row[i] = (code, text)
    return row
