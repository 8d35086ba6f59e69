"""What a text may have to satisfy: a regular expression, text to contain, a list of words, an acrostic.

Each is compiled to an automaton over bytes (automaton.py), and several to the automaton of the texts that satisfy all.
Regular expressions are read and made deterministic by `interegular`; only the list of words, at which it is slow, and
the spelling of characters in UTF-8, which it does not know, are done here.
"""

from __future__ import annotations

import re
import string
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import interegular
import numpy as np

from textdiffusion.errors import UserError
from textdiffusion.mathematics.automaton import Automaton, ByteAutomaton, minimal
from textdiffusion.text.tokenizer import Tokenizer

# What may stand between the words of a list.
SEPARATORS = string.whitespace + string.digits + string.punctuation + "“”‘’«»–—…"
LARGEST = 100_000  # states; more would take minutes to compile, and gigabytes
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BETWEEN = re.compile(f"[{re.escape(SEPARATORS)}]+")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[\^?[^\]]*\]")


@dataclass(frozen=True)
class Pattern:
    """What texts must satisfy, all of it at once; nothing at all by default.

    regex: the whole text matches it. must_contain: pieces of text that occur in it. words: it is made of these words,
    and of their forms with a capital letter, set apart by SEPARATORS. acrostic: the text has a line for each of its
    letters, and begins it with that letter, small or capital.
    """

    regex: str | None = None
    must_contain: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None
    acrostic: str | None = None

    @classmethod
    def of(
        cls,
        regex: str | None = None,
        must_contain: str | Sequence[str] = (),
        words: str | Path | Iterable[str] | None = None,
        acrostic: str | None = None,
    ) -> Pattern:
        """The same from a single text to contain, or from a file of words.

        Raises:
            UserError: the file cannot be read, or has no words, or none that a text to contain can be part of.
        """
        contained = (must_contain,) if isinstance(must_contain, str) else tuple(must_contain)
        if words is None:
            return cls(regex, contained, None, acrostic)
        listed = tuple(read_words(words))
        known = "\n".join(form for word in listed for form in (word, word[:1].upper() + word[1:]))
        for piece in _BETWEEN.split(" ".join(contained)):
            if piece not in known:
                raise UserError(f"no word of --words has {piece!r} in it, which --must-contain asks for; change either")
        return cls(regex, contained, listed, acrostic)

    @property
    def flags(self) -> str:
        """What was asked for, as on the command line."""
        return " and ".join(
            f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value not in (None, ())
        )

    def automaton(self, tokenizer: Tokenizer) -> Automaton:
        """The automaton over a tokenizer's tokens.

        Raises:
            UserError: an expression that is none or that no automaton can follow, or a tokenizer whose tokens are not
                spelled in bytes.
        """
        parts = [] if self.regex is None else [expression(self.regex)]
        parts += [expression(rf"[\s\S]*{literal(text)}[\s\S]*") for text in self.must_contain]
        parts += [] if self.words is None else [made_of(self.words)]
        parts += [] if self.acrostic is None else [acrostic(self.acrostic)]
        return Automaton(reduce(lambda one, other: one & other, parts), spelling(tokenizer))


def spelling(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of each token as it is shown in a text, [V]; None for those that a constrained text may not have: the
    unknown token, and those that show nothing.

    Raises:
        UserError: a tokenizer whose tokens do not join to the text byte by byte.
    """
    if not tokenizer.spells:
        raise UserError(
            "this run's tokenizer changes texts where it joins its tokens, so that no pattern can be kept; "
            "train with --tokenizer char, byte or bpe:N"
        )
    pieces: list[bytes | None] = [piece or None for piece in tokenizer.token_bytes()]
    pieces[tokenizer.end_of_text] = tokenizer.decode([tokenizer.end_of_text]).encode()
    if tokenizer.unknown is not None:
        pieces[tokenizer.unknown] = None
    return pieces


def literal(text: str) -> str:
    """A regular expression for this text alone; interegular reads no escapes but those of punctuation."""
    if not text:
        raise UserError("there is no text to contain; give --must-contain some, or leave it out")
    return "".join("\\" + c if c in string.punctuation else c for c in text)


def read_words(words: str | Path | Iterable[str]) -> list[str]:
    """The words of a list, or of any text in a file: letters, with single apostrophes and hyphens between them.

    Raises:
        UserError: there is no such file, or no word in it.
    """
    if isinstance(words, str | Path):
        try:
            words = [Path(words).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--words cannot read {words}; give a text whose words are allowed") from error
    found = sorted({word for line in words for word in _WORD.findall(line)})
    if not found:
        raise UserError("--words has no words; give a text whose words are allowed")
    return found


def expression(pattern: str) -> ByteAutomaton:
    """The automaton of a regular expression, in Python's syntax, that the whole text matches.

    \\w, \\d and \\s are those of ASCII, as under re.ASCII. What no finite automaton can follow (references to groups),
    and what the parser takes in another sense than Python does (looking ahead or behind, possessive quantifiers), is
    refused.

    Raises:
        UserError: it is no regular expression, or one of those.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            re.compile(pattern)
    except re.error as error:
        raise UserError(f"--regex {pattern!r} is not a regular expression: {error}") from error
    # The whole text matches anyhow.
    inner = pattern.removeprefix("^")
    if inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2 == 1:  # not an escaped one
        inner = inner[:-1]
    plain = _ESCAPED.sub("_", inner)
    if "[]" in plain or "[^]" in plain:
        raise UserError(f"--regex {pattern!r}: write a bracket within a class as \\]")
    if found := re.search(r"\(\?[=!<>#(]|[*+?}]\+", _CLASS.sub("_", plain)):
        raise UserError(f"--regex {pattern!r}: {found[0]} cannot be kept to here; write it in another way")
    try:
        machine = interegular.parse_pattern(inner).to_fsm()
    except Exception as error:  # its own kinds, and others at what it does not expect
        raise UserError(f"--regex {pattern!r} cannot be kept to here: {str(error) or 'syntax'}; simplify it") from error
    symbols = dict(machine.alphabet)
    if interegular.fsm.anything_else not in symbols:
        raise UserError(f"--regex {pattern!r} matches no text but the empty one; write what the text is to be")
    other = symbols.pop(interegular.fsm.anything_else)
    states = {state: i for i, state in enumerate([machine.initial, *(machine.states - {machine.initial})])}
    table = np.full((len(states) + 1, len(machine.alphabet.by_transition)), len(states))
    for state, row in machine.map.items():
        for key, target in row.items():
            table[states[state], key] = states[target]
    accepts = np.array([state in machine.finals for state in states] + [False])
    return spelled(symbols, other, table, accepts)


def acrostic(word: str) -> ByteAutomaton:
    """The automaton of texts with a line for each letter of a word, which begins with it, small or capital.

    Raises:
        UserError: no letters.
    """
    if not word.isalpha():
        raise UserError(f"--acrostic takes letters alone, not {word!r}")
    return expression("\\n".join(f"({c.lower()}|{c.upper()})[^\\n]*" for c in word))


def made_of(words: Iterable[str]) -> ByteAutomaton:
    """The automaton of texts that are made of some words (as they are, or with a capital letter in front) and of what
    stands between words (SEPARATORS), of which there is at least one between two of them."""
    # 1. A tree of the words; node 0 is where a word may begin.
    tree: list[dict[str, int]] = [{}]
    ends = {0}
    forms = {form for word in words for form in (word, word[:1].upper() + word[1:])}
    for word in sorted(forms):
        node = 0
        for c in word:
            if c not in tree[node]:
                tree[node][c] = len(tree)
                tree.append({})
            node = tree[node][c]
        ends.add(node)
    # 2. Separators may be within words too ("don't"), so that there may be several nodes at a time.
    inside = sorted({c for node in tree for c in node})
    symbols = {c: key for key, c in enumerate(inside)} | dict.fromkeys(set(SEPARATORS) - set(inside), len(inside))
    number, rows = {frozenset({0}): 0}, list[dict[int, int]]()
    waiting = list(number)
    for nodes in waiting:  # grows as it goes
        row, after = {}, dict[int, set[int]]()
        for node in nodes:
            for c, child in tree[node].items():
                after.setdefault(symbols[c], set()).add(child)
        if nodes & ends:
            for key in {symbols[c] for c in SEPARATORS}:
                after.setdefault(key, set()).add(0)
        for key, reached in after.items():
            now = frozenset(reached)
            if now not in number:
                number[now] = len(number)
                waiting.append(now)
            row[key] = number[now]
        rows.append(row)
    table = np.full((len(rows) + 1, len(inside) + 2), len(rows))
    for i, row in enumerate(rows):
        table[i, list(row.keys())] = list(row.values())
    accepts = np.array([bool(nodes & ends) for nodes in number] + [False])
    return spelled(symbols, len(inside) + 1, table, accepts)


# -- UTF-8 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Partial:
    """A character of which some bytes are there: how many are missing, and of the characters that it may become, in
    order: which are valid, from low up to high, and the keys of those that have one of their own."""

    missing: int
    low: int
    high: int
    keys: tuple[tuple[int, int], ...]

    def leads(self, other: int) -> list[int]:
        """The keys of all characters that it may become."""
        own = [key for at, key in self.keys if self.low <= at < self.high]
        return [*set(own), other] if len(own) < self.high - self.low else [*set(own)]

    def after(self, byte: int) -> _Partial | None:
        """With one more byte 0x80 + ``byte``; None where there is no such character."""
        size = 64 ** (self.missing - 1)
        begin = byte * size
        low, high = max(self.low - begin, 0), min(self.high - begin, size)
        if low >= high:
            return None
        inside = self.keys[bisect_left(self.keys, (begin,)) : bisect_left(self.keys, (begin + size,))]
        return _Partial(self.missing - 1, low, high, tuple((at - begin, key) for at, key in inside))


def spelled(symbols: Mapping[str, int], other: int, table: np.ndarray, accepts: np.ndarray) -> ByteAutomaton:
    """The automaton over bytes of UTF-8 of one over characters.

    Args:
        symbols: the key (column of the table) of some characters. other: the key of all others.
        table: next states int64 [Q + 1, keys], Q being dead. accepts: bool [Q + 1].
    Raises:
        UserError: it is too large.
    """
    if len(table) > LARGEST:
        raise UserError(f"the pattern has {len(table):,} states, and at most {LARGEST:,} can be followed; shorten it")
    points = sorted((ord(c), key) for c, key in symbols.items() if key != other)
    table, accepts = minimal(table, accepts)
    states = len(table) - 1
    # 1. What a first byte of several begins; E0, ED, F0 and F4 cannot be followed by every byte.
    first: dict[int, _Partial] = {}
    for byte in range(0xC2, 0xF5):
        missing = 1 + (byte >= 0xE0) + (byte >= 0xF0)
        size = 64**missing
        begin = (byte & (0x1F, 0x0F, 0x07)[missing - 1]) * size
        low = {0xE0: 0x800, 0xF0: 0x10000}.get(byte, 0)
        high = {0xED: 0x800, 0xF4: 0x10000}.get(byte, size)
        inside = points[bisect_left(points, (begin,)) : bisect_left(points, (begin + size,))]
        first[byte] = _Partial(missing, low, high, tuple((at - begin, key) for at, key in inside))
    # 2. All partial characters that differ in what may become of them.
    number: dict[_Partial, int] = {}
    waiting = list(first.values())
    for partial in waiting:
        if partial.missing and partial not in number:
            number[partial] = len(number)
            waiting += [part for byte in range(64) if (part := partial.after(byte)) is not None]
    # 3. A state over bytes is one over characters, or one and a partial character that some character of those that it
    # may become leads on from.
    alive = table[:states] != states  # [Q keys]
    live = [alive[:, partial.leads(other)].any(1) for partial in number]
    size = states + sum(int(some.sum()) for some in live)
    if size > LARGEST:
        raise UserError(f"the pattern has {size:,} states, and at most {LARGEST:,} can be followed; shorten it")
    names, count = [], states
    for some in live:
        names.append(np.where(some, count + some.cumsum() - 1, size))
        count += int(some.sum())
    step = np.full((size + 1, 256), size, dtype=np.int32)
    final = np.where(alive, table[:states], size)
    step[:states, :128] = final[:, [symbols.get(chr(byte), other) for byte in range(128)]]
    for byte, partial in first.items():
        step[:states, byte] = names[number[partial]]
    for partial, some, name in zip(number, live, names, strict=True):
        for byte in range(64):
            part = partial.after(byte)
            if part is not None:
                whole = part.keys[0][1] if part.keys else other
                step[name[some], 0x80 + byte] = (names[number[part]] if part.missing else final[:, whole])[some]
    return ByteAutomaton(*minimal(step, np.append(accepts[:states], np.zeros(size + 1 - states, dtype=bool))))
