"""Text with gaps: "The ____ sat" has four free tokens, and a literal underscore is written \\_ ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiffusion.errors import UserError
from textdiffusion.text.tokenizer import Tokenizer

_PART = re.compile(r"(?P<gap>_+)|(?P<text>(?:\\_|[^_])+)")


@dataclass(frozen=True)
class Template:
    """tokens int64 [L] and which of them are given, bool [L]; the others are to be written."""

    tokens: Tensor
    given: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def gapped(self) -> bool:
        """Whether anything that is given stands behind what is to be written."""
        return bool((self.given[1:] & ~self.given[:-1]).any())


def _join(parts: Sequence[tuple[list[int], bool]]) -> Template:
    tokens = [t for ids, _ in parts for t in ids]
    given = [known for ids, known in parts for _ in ids]
    return Template(torch.tensor(tokens, dtype=torch.long), torch.tensor(given, dtype=torch.bool))


def encode(text: str, tokenizer: Tokenizer) -> Tensor:
    """A text as tokens, int64 [L].

    Raises:
        UserError: it has symbols that the tokenizer cannot express.
    """
    return torch.tensor(_encode(text, tokenizer), dtype=torch.long)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("the text is not valid Unicode; type it again, or check the terminal's encoding")
    ids = tokenizer.encode(text)
    if tokenizer.unknown is not None and tokenizer.unknown in ids:
        raise UserError(
            f"this run's tokenizer has never seen {' '.join(repr(c) for c in tokenizer.unseen(text))}; "
            "leave those symbols out, or train with --tokenizer byte"
        )
    return ids


def gaps(text: str, tokenizer: Tokenizer) -> Template:
    """Parse a text with gaps: a run of n underscores is n free tokens.

    Raises:
        UserError: no gap, nothing at all, or symbols that the tokenizer cannot express.
    """
    parts: list[tuple[list[int], bool]] = []
    for match in _PART.finditer(text):
        if match["gap"]:
            parts.append(([0] * len(match["gap"]), False))
        else:
            parts.append((_encode(match["text"].replace("\\_", "_"), tokenizer), True))
    if all(known for _, known in parts):
        raise UserError('there is no gap to fill: mark it with underscores, one a token, as in --infill "The ____ sat"')
    return _join(parts)


def prompt(text: str, length: int, tokenizer: Tokenizer) -> Template:
    """A given beginning, and free tokens up to ``length``.

    Raises:
        UserError: the prompt leaves no room, or has symbols that the tokenizer cannot express.
    """
    ids = _encode(text, tokenizer)
    if len(ids) >= length:
        raise UserError(
            f"the prompt has {len(ids)} tokens, which leaves none of {length} to write; shorten it or raise --length"
        )
    return _join([(ids, True), ([0] * (length - len(ids)), False)])
