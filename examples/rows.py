"""Experiments as rows on disk, for the scripts beside this one: a row that is there is not measured again, so a script
may be stopped and started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import textdiffusion as td


class Rows:
    """A file of rows, each of a key, which says what it is of, and figures."""

    def __init__(self, path: Path, options: dict[str, Any] | None = None, in_keys: tuple[str, ...] = ()):
        """``options`` of the command line are those of all rows, and are kept beside them; but for where, which, and
        what the keys of rows say.

        Raises:
            UserError: the rows that are there are of other options.
        """
        self.path, place = path, path.with_name("options.json")
        if options is not None:
            said = {k: v for k, v in options.items() if k not in ("out", "only", *in_keys)}
            before = json.loads(place.read_text(encoding="utf-8")) if place.exists() else said
            if other := [k for k in said if said[k] != before.get(k)]:
                raise td.UserError(f"{path.parent} has rows of another --{other[0]}; choose another folder")
            place.write_text(json.dumps(said), encoding="utf-8")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def of(self, **key: Any) -> list[dict[str, Any]]:
        """The rows that have all of this."""
        return [row for row in self.found if all(row.get(k) == v for k, v in key.items())]

    def row(self, key: dict[str, Any], measure: Callable[..., dict[str, Any]], *args: Any) -> None:
        """Measure a row that is not there."""
        if self.of(**key):
            return
        print(", ".join(str(v) for v in key.values()), file=sys.stderr, flush=True)
        self.found.append(key | measure(*args))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.found[-1]) + "\n")


def markdown(rows: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a table."""

    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", "⏎")

    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(head + ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]) + "\n"


def verb(*words: str) -> dict[str, Any]:
    """Run a command of textdiffusion and read the last line of its --json."""
    done = subprocess.run(
        [sys.executable, "-m", "textdiffusion", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise td.UserError((done.stderr.strip().splitlines() or [f"textdiffusion {words[0]} stopped"])[-1])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def trained(run: Path, *how: str) -> Path:
    """A run, trained if it is not there, gone on with if it was stopped; a finished one stays as it is."""
    if (run / "config.json").exists():
        verb("train", "--resume", "--out", str(run))
    else:
        verb("train", "--out", str(run), *how)
    return run
