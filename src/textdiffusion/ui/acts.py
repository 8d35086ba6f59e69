"""What the page does: write, rewrite, proofread, compare. Each is an iterator of HTML, and knows nothing of gradio."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from typing import Any

from textdiffusion.display.frames import TextFrame
from textdiffusion.display.replay.canvas import player
from textdiffusion.display.replay.recording import Panel, Recording, difference
from textdiffusion.errors import UserError
from textdiffusion.text.template import encode
from textdiffusion.ui.loaded import MOST_TEXTS, MOST_TOKENS, Loaded
from textdiffusion.ui.streaming import show
from textdiffusion.ui.trial import check_pattern

EVERY_TOKEN = "one a token"
_MARK = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)
_WORD = re.compile(r"\S+")
LONGEST_INPUT = 20_000  # characters in a box


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for, as the page's controls hand it over."""

    text: str = ""
    n: int = 1
    length: int = 64
    calls: str = EVERY_TOKEN
    sampler: str = "auto"
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: bool = False
    regex: str = ""
    label: str = ""
    guidance: float = 0.0

    def check(self, run: Loaded) -> None:
        """Refuse what would take the machine down; all else is for the library to refuse.

        Raises:
            UserError: too many texts, or too many tokens at once.
        """
        check_text(self.text)
        if not 1 <= self.n <= MOST_TEXTS:
            raise UserError(f"this page writes 1 to {MOST_TEXTS} texts at once, not {self.n}")
        if reason := run.no_such_length(self.text, self.length):
            raise UserError(reason)
        if self.regex:
            check_pattern(self.regex, run.model.tokenizer.vocabulary)
        template = run.template(self.text, self.length)
        length = self.length if template is None else len(template)
        many = run.model.particles_for(template)
        if self.n * length * many > MOST_TOKENS:
            each = f", by {many} particles each," if many > 1 else ""
            raise UserError(
                f"{self.n} texts of {length:,} tokens{each} are more than the {MOST_TOKENS:,} tokens that this page "
                "writes at once; ask for fewer or shorter ones"
            )

    def how(self, run: Loaded) -> dict[str, Any]:
        """Arguments of `Model.stream`.

        Raises:
            UserError: calls that are no number.
        """
        return {
            "n": self.n, "length": self.length, "calls": calls_of(self.calls), "sampler": self.sampler,
            "temperature": self.temperature, "top_p": None if self.top_p >= 1 else self.top_p, "seed": self.seed,
            "stop": self.stop and run.stops, "regex": self.regex or None, "label": self.label or None,
            "guidance": self.guidance if self.label else 0.0, **run.asked(self.text),
        }  # fmt: skip


def check_text(text: str) -> None:
    """Refuse a text that is too long to be read here.

    Raises:
        UserError: saying so.
    """
    if len(text) > LONGEST_INPUT:
        raise UserError(f"the text has {len(text):,} characters; this page takes at most {LONGEST_INPUT:,}")


def calls_of(text: str) -> int | None:
    """Network calls from a control: a number, or None for one a token.

    Raises:
        UserError: neither, or more than the page allows.
    """
    if str(text).strip() in ("", EVERY_TOKEN):
        return None
    if not str(text).strip().isdecimal() or not 1 <= int(text) <= MOST_TOKENS:
        raise UserError(f'calls are a number from 1 to {MOST_TOKENS:,}, or "{EVERY_TOKEN}", not {str(text)[:40]!r}')
    return int(text)


def begun(run: Loaded, how: dict[str, Any]) -> tuple[Panel, Iterator[TextFrame]]:
    """A stream, and a panel under the name of the sampler that it uses, which the first frame, of noise, settles."""
    stream = run.model.stream(**how)
    first = next(stream)
    return Panel(f"{run.name} · {run.model.used[0]}"), chain([first], stream)


def write(run: Loaded, wish: Wish, stop: threading.Event) -> Iterator[str]:
    """Texts out of noise."""
    yield from compare([(run, wish.sampler)], wish, stop)


def compare(columns: Sequence[tuple[Loaded, str]], wish: Wish, stop: threading.Event) -> Iterator[str]:
    """The same wish by several (run, sampler), side by side.

    Raises:
        UserError: what a run cannot do, named after it where there are several.
    """
    panels, streams = [], []
    for run, sampler in columns:
        wish.check(run)
        panel, stream = begun(run, wish.how(run) | {"sampler": sampler})
        panels.append(panel)
        streams.append(stream)
    if len({panel.title for panel in panels}) < len(panels):
        raise UserError("the same run and sampler is chosen twice; choose different ones")
    settings = asdict(wish) | {"panels": [panel.title for panel in panels]}
    yield from show(Recording(panels, settings), streams, stop)


def marked(text: str) -> list[tuple[str, bool]]:
    """A text with [[marks]] as pieces, and which of them are marked.

    Raises:
        UserError: nothing is marked.
    """
    parts = [(part, i % 2 == 1) for i, part in enumerate(_MARK.split(text)) if part]
    if not any(chosen for _, chosen in parts):
        raise UserError("nothing is marked: select what is to be rewritten and press Mark, or type [[ ]] around it")
    return parts


def chosen_words(text: str, share: float, seed: int) -> list[tuple[str, bool]]:
    """A text with about this share of its characters marked, in whole words chosen at random, as in `marked`.

    Raises:
        UserError: no words, or a share that is none.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if not words:
        raise UserError("there is no text to rewrite; paste some")
    if not 0 < share <= 1:
        raise UserError(f"the strength must be above 0 and at most 1, not {share:g}")
    wanted, taken = share * sum(end - begin for begin, end in words), set[int]()
    for i in random.Random(seed).sample(range(len(words)), len(words)):
        if taken and sum(words[k][1] - words[k][0] for k in taken) >= wanted:
            break
        taken.add(i)
    parts, last = [], 0
    for begin, end in (words[i] for i in sorted(taken)):
        parts += [(text[last:begin], False), (text[begin:end], True)]
        last = end
    return [part for part in [*parts, (text[last:], False)] if part[0]]


def rewrite(run: Loaded, parts: Sequence[tuple[str, bool]], wish: Wish, stop: threading.Event) -> Iterator[str]:
    """Write the marked pieces of a text anew, each in as many tokens as it has.

    Raises:
        UserError: a text that is too long.
    """
    tokens = run.model.tokenizer
    if any(one.endswith("\\") and chosen for (one, _), (_, chosen) in pairwise(parts)):
        raise UserError("a backslash right before a mark would make a plain underscore of it; mark the backslash too")
    sizes = [len(tokens.encode(piece)) for piece, _ in parts]
    template = "".join("_" * size if new else p.replace("_", "\\_") for (p, new), size in zip(parts, sizes))
    wish = Wish(**asdict(wish) | {"text": template, "stop": False})
    wish.check(run)
    panel, stream = begun(run, wish.how(run))

    def finish(recording: Recording) -> str:
        lines = []
        for row in recording.panels[0].now.rows:
            cells = iter(row)
            now = ["".join(text for _, text in islice(cells, size)) for size in sizes]
            lines.append(", ".join(f"{old} → {new}" for (old, chosen), new in zip(parts, now) if chosen))
        return "Rewritten: " + "; ".join(lines)

    settings = asdict(wish) | {"original": "".join(p for p, _ in parts), "panels": [panel.title]}
    yield from show(Recording([panel], settings), [stream], stop, finish=finish)


def renoise(run: Loaded, wish: Wish, strength: float, stop: threading.Event) -> Iterator[str]:
    """A whole text made noisy to some degree, and written anew from there (sampling/editing.py).

    Raises:
        UserError: no text, an impossible strength, or a text that is too long.
    """
    if not wish.text:
        raise UserError("there is no text to rewrite; paste some")
    check_text(wish.text)
    free = Wish(**asdict(wish) | {"text": "", "length": len(encode(wish.text, run.model.tokenizer))})
    free.check(run)
    how = free.how(run) | {"length": None, "edit": wish.text, "strength": strength}
    panel, stream = begun(run, how)

    def finish(recording: Recording) -> str:
        old, news = wish.text, recording.panels[0].texts
        kept = [sum(a == b for a, b in zip(old, new)) / max(len(old), 1) for new in news]
        return "Kept of the characters: " + ", ".join(f"{share:.0%}" for share in kept)

    settings = asdict(wish) | {"strength": strength, "panels": [panel.title]}
    yield from show(Recording([panel], settings), [stream], stop, finish=finish)


def proofread(run: Loaded, text: str, share: float) -> Iterator[str]:
    """Mend a text, without being told where it is wrong.

    Raises:
        UserError: a family whose noise only hides tokens, or a text that is too long.
    """
    if run.no_proofreading:
        raise UserError(run.no_proofreading)
    if not text.strip():
        raise UserError("there is no text to proofread; paste some")
    mended = run.model.proofread(text, share)
    row = difference(text, mended)
    panel = Panel(f"{run.name} · proofread", labels=["mended"])
    found = sum(code == "e" for code, _ in row)
    panel.put([row], f"{found} place{'s' * (found != 1)} changed", 1.0, {})
    panel.texts = [mended]
    note = "" if found else "Nothing was changed."
    yield player(Recording([panel], {"original": text, "strength": share, "panels": [panel.title]}, note))
