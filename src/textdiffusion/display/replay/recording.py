"""All that happened to some texts while they were written, so that it can be played again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from textdiffusion.display.frames import Cell, TextFrame, visible


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
        self.put(frame.cells, status, at.step / max(at.of, 1), {"step": at.step, "t": at.t, "calls": at.calls.tolist()})
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


def recorded(frames: Iterable[TextFrame], panel: Panel) -> Iterator[TextFrame]:
    """The same frames, each taken into ``panel`` with the seconds that making it took."""
    begin = time.perf_counter()
    for frame in frames:
        panel.add(frame, time.perf_counter() - begin)
        yield frame
        begin = time.perf_counter()


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
