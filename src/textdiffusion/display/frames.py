"""Frames that can be read: texts, and the state of each of their tokens.

A cell is one token on show, (code, text). The code is what is known of it:

    n         noise: nothing is written yet, or a symbol that came with the noise
    g         given by the user
    c0 c1 c2  committed: it stays as it is; the model was unsure, likely or sure of it
    t0 t1 t2  tentative: later steps may change it; in the same three degrees
    e         mended: another token than in the user's text

Terminal, notebook, page and replay all show cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from unicodedata import category

import torch

from textdiffusion.errors import UserError
from textdiffusion.process import Gaussian, Process
from textdiffusion.progress import tell
from textdiffusion.sampling.reverse import Frame
from textdiffusion.text.tokenizer import Tokenizer

Cell = tuple[str, str]
BLANK = "░"  # a position where nothing is written yet
NEWLINE = "⏎"
NOTHING = "◌"  # what a combining character stands on where the one before it is not written yet
LONGEST_CHARACTER = 4  # bytes, in UTF-8
UNSURE_BELOW, SURE_FROM = 0.25, 0.6  # probabilities


@dataclass(frozen=True)
class TextFrame:
    """A frame of the reverse process (sampling.reverse.Frame) that can be read.

    given: bool [B L], which tokens were fixed; stop: texts end where their first document does; tentative: written
    tokens may still change until t = 0.
    """

    frame: Frame
    given: torch.Tensor
    tokenizer: Tokenizer
    stop: bool = False
    tentative: bool = False

    @cached_property
    def pieces(self) -> list[list[str]]:
        """For each text, the string of each token, BLANK where nothing is written."""
        names, raw = self.tokenizer.pieces(), self.tokenizer.token_bytes()
        return [pieces_of(self._to_its_end(row), names, raw) for row in self.frame.tokens.tolist()]

    @property
    def texts(self) -> list[str]:
        """The texts, with BLANK where nothing is written yet."""
        return [self._text(self._to_its_end(row)) for row in self.frame.tokens.tolist()]

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """The texts as cells, one a token."""
        now = self.frame
        letter = "t" if self.tentative and now.t > 0 else "c"
        rows = zip(self.pieces, now.tokens.tolist(), now.confidence.tolist(), self.given.tolist(), strict=True)
        return [
            # Pieces end where the text does.
            list(
                based(
                    (_code(t, p, known, letter), visible(s)) for s, t, p, known in zip(pieces, tokens, chances, given)
                )
            )
            for pieces, tokens, chances, given in rows
        ]

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


def written(frames: Iterable[TextFrame], begin: float, end: float) -> TextFrame:
    """The last of the frames, which bring what is written from a share of all, ``begin``, to another: who watches is
    told (progress.py)."""
    for frame in frames:
        tell("writing", begin + (end - begin) * frame.frame.step / max(frame.frame.of, 1))
    return frame


def pieces_of(tokens: Sequence[int], names: Sequence[str], raw: Sequence[bytes]) -> list[str]:
    """The string of each token, BLANK for -1. A character whose bytes are spread over neighbours stands at the first of
    them, once all are written; until then each looks like \\xe2.

    Args:
        names, raw: of each id, as from `Tokenizer.pieces` and `Tokenizer.token_bytes`.
    """
    found = [BLANK if token < 0 else names[token] for token in tokens]
    for i, token in enumerate(tokens):
        if token < 0 or found[i] == "" or not raw[token] or _text_of(raw[token]):
            continue
        for end in range(i + 2, min(i + LONGEST_CHARACTER, len(tokens)) + 1):
            if tokens[end - 1] < 0:
                break
            if whole := _text_of(b"".join(raw[part] for part in tokens[i:end])):
                found[i:end] = [whole, *[""] * (end - i - 1)]
                break
    return found


def _text_of(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def revises(process: Process) -> bool:
    """Whether a reverse step may change a token that is written already: where noise replaces tokens, and does not only
    hide them, until t = 0."""
    if isinstance(process.space, Gaussian):
        return True
    try:
        return process.time_of(0.05) is not None
    except UserError:  # it replaces tokens, but never so many
        return True


def degree(confidence: float) -> int:
    """0 unsure, 1 likely, 2 sure, from a probability."""
    return (confidence >= UNSURE_BELOW) + (confidence >= SURE_FROM)


def _code(token: int, confidence: float, given: bool, letter: str) -> str:
    if given:
        return "g"
    return "n" if token < 0 or confidence == 0 else f"{letter}{degree(confidence)}"


@lru_cache(maxsize=1 << 16)
def visible(piece: str) -> str:
    """A token's string with a sign for line ends, which stay, and for control characters, which do not: a terminal or a
    page would take them for orders."""
    shown = piece.replace("\n", NEWLINE + "\n")
    if shown.isprintable():
        return shown
    return "".join(c if category(c) != "Cc" or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown)


def based(cells: Iterable[Cell]) -> Iterable[Cell]:
    """Cells whose combining characters stand on what they belong to, or on NOTHING: never on a blank, which they would
    seem to change."""
    before = "n"
    for code, text in cells:
        alone = before == "n" and text[:1] > "\u02ff" and category(text[0]).startswith("M")
        yield code, NOTHING + text if alone else text
        before = code


def one_line(text: str) -> str:
    """Line ends made visible, so that a sample is one line."""
    return text.replace("\n", NEWLINE)
