"""Prepared corpora: token ids in checksummed files that are mapped into memory, and mixtures of such corpora.

  corpus.json         what was prepared, and the shards: tokens, runs, characters and SHA-256 of each
  tokenizer.json      the tokenizer of all of it
  train-000012.npy    token ids, uint16 or uint32
  validation-...      those held out

preparing.py makes them. A text never runs from one shard into the next, and windows never cross the edges of runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from textdiffusion.errors import UserError
from textdiffusion.files import checksum
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import TokenRuns, Windows, evaluation_windows

OPEN = 512  # shards mapped at a time; systems allow a thousand open files or more
BLOCK = 1000  # examples in which a mixture has its weights exactly


@dataclass
class Shard:
    """A file of tokens, and what it should be."""

    file: str
    tokens: int
    runs: list[int]  # where runs begin, and the end
    characters: int
    sha256: str


@dataclass(eq=False)
class ShardedTokens:
    """The shards of one part of a corpus, read like one array."""

    folder: Path
    shards: list[Shard]
    ends: np.ndarray = field(init=False)
    dtype: np.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.ends = np.cumsum([shard.tokens for shard in self.shards])
        self.dtype = np.dtype(np.uint32)
        self._open = lru_cache(OPEN)(self._map)
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        path = self.folder / shard.file
        again = f"`textdiffusion prepare` with the same settings makes what is damaged anew (see {self.folder})"
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.shape != (shard.tokens,) or tokens.dtype not in (np.uint16, np.uint32):
                raise ValueError("it is not what was written")
            if number not in self._checked and checksum(path) != shard.sha256:
                raise ValueError("its checksum does not agree")
        except (OSError, ValueError, EOFError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"{path} is damaged: {reason}; {again}") from None
        self._checked.add(number)
        return tokens

    def __getitem__(self, index: Any) -> np.ndarray:
        """Tokens at a slice, or at the windows of an array [n L]; neither may cross the edge of a shard."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            if stop <= start:
                return np.empty(0, np.uint32)
            number = int(np.searchsorted(self.ends, start, side="right"))
            begin = int(self.ends[number]) - self.shards[number].tokens
            return self._open(number)[start - begin : stop - begin]
        out = np.empty(index.shape, np.uint32)
        numbers = np.searchsorted(self.ends, index[:, 0], side="right")
        for number in np.unique(numbers):
            begin = int(self.ends[number]) - self.shards[number].tokens
            rows = numbers == number
            out[rows] = self._open(int(number))[index[rows] - begin]
        return out


@dataclass
class Prepared:
    """A prepared corpus."""

    folder: Path
    source: str
    provenance: str
    parts: dict[str, TokenRuns]
    tokenizer: Tokenizer
    fingerprint: str


def is_prepared(source: str) -> bool:
    """Whether a source is a folder that `prepare` made, or a mixture of such."""
    return source.startswith("mix:") or (Path(source).expanduser() / "corpus.json").is_file()


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared corpus; its shards are checked when they are first read.

    Raises:
        UserError: unfinished or damaged.
    """
    file = folder / "corpus.json"
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        parts = {}
        for name in ("train", "validation"):
            shards = [Shard(**entry) for entry in body["shards"][name]]
            for shard in shards:
                if Path(shard.file).name != shard.file or not shard.file.startswith(name):
                    raise ValueError(f"{shard.file!r} is no shard's name")
                if shard.runs[0] != 0 or shard.runs[-1] != shard.tokens or sorted(shard.runs) != shard.runs:
                    raise ValueError(f"the runs of {shard.file} do not fit it")
            tokens = ShardedTokens(folder, shards)
            begins = np.cumsum([0, *(shard.tokens for shard in shards)])
            runs = [np.asarray(s.runs[:-1], np.int64) + b for s, b in zip(shards, begins[:-1], strict=True)]
            edges = np.concatenate([*runs, begins[-1:]]).astype(np.int64)
            characters = sum(shard.characters for shard in shards)
            parts[name] = TokenRuns(tokens, edges, characters)  # type: ignore[arg-type]
        source, provenance, digest = body["source"], body["provenance"], body["fingerprint"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no finished corpus; run `textdiffusion prepare SRC {folder}`, to its end"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); prepare the corpus again in another folder") from None
    return Prepared(folder, str(source), str(provenance), parts, Tokenizer.load(folder), str(digest))


# -- mixtures -----------------------------------------------------------------------------------------------------


def parse_mixture(source: str) -> list[tuple[Path, float]]:
    """The corpora that a source names, with weights that add up to one: a folder, or "mix:FOLDER=WEIGHT,...".

    Raises:
        UserError: it cannot be read so.
    """
    if not source.startswith("mix:"):
        return [(Path(source).expanduser(), 1.0)]
    found: list[tuple[Path, float]] = []
    for part in source.removeprefix("mix:").split(","):
        name, equals, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not (equals and name and 0 < weight < float("inf")):
            raise UserError(f"a mixture is written mix:FOLDER=WEIGHT,FOLDER=WEIGHT, not {part!r}")
        found.append((Path(name).expanduser(), weight))
    total = sum(weight for _, weight in found)
    return [(path, weight / total) for path, weight in found]


class Mixture:
    """Training windows from several corpora, by weight, in an order fixed by ``seed``.

    Of every BLOCK examples each corpus has its share, to the nearest whole example, in a random order; so the place in
    each corpus follows from an example's number, as in ``data.Windows``.
    """

    def __init__(self, windows: Sequence[Windows], weights: Sequence[float], seed: int):
        self.windows, self.seed = windows, seed
        exact = np.array(weights) / np.sum(weights) * BLOCK
        self.counts = np.maximum(1, np.floor(exact).astype(np.int64))
        while self.counts.sum() < BLOCK:  # the largest remainders are rounded up
            self.counts[np.argmax(exact - self.counts)] += 1
        while self.counts.sum() > BLOCK:
            self.counts[np.argmax(self.counts)] -= 1
        self._kept: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows with these global example numbers, int64 [n, length]."""
        out: np.ndarray | None = None
        blocks, places = np.divmod(indices, BLOCK)
        for block in np.unique(blocks):
            chosen, rank = self._block(int(block))
            rows = np.flatnonzero(blocks == block)
            for number, windows in enumerate(self.windows):
                mine = rows[chosen[places[rows]] == number]
                if len(mine):
                    found = windows.rows(block * self.counts[number] + rank[places[mine]])
                    out = np.empty((len(indices), found.shape[1]), np.int64) if out is None else out
                    out[mine] = found
        assert out is not None
        return out

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Which corpus each example of a block is from, and which of the block's examples from there it is."""
        if self._kept[0] != block:
            random = np.random.Generator(np.random.Philox(key=[self.seed, 2**63 + block]))
            chosen = random.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
            rank = np.empty_like(chosen)
            for number in range(len(self.counts)):
                mine = chosen == number
                rank[mine] = np.arange(mine.sum())
            self._kept = (block, chosen, rank)
        return self._kept[1], self._kept[2]


@dataclass
class TrainingText:
    """What a training reads of prepared corpora: windows to learn from, and held-out windows."""

    windows: Windows | Mixture
    held_out: list[np.ndarray]
    training_tokens: int
    validation_tokens: int
    labels: np.ndarray | None = None  # of the held-out windows


def open_mixture(source: str) -> tuple[list[Prepared], list[float]]:
    """The corpora of a source, which must have one tokenizer, and their weights.

    Raises:
        UserError: one is damaged, or they have different tokenizers.
    """
    named = parse_mixture(source)
    corpora = [open_prepared(path) for path, _ in named]
    for corpus in corpora[1:]:
        if corpus.tokenizer.to_json() != corpora[0].tokenizer.to_json():
            raise UserError(
                f"{corpus.folder} and {corpora[0].folder} have different tokenizers; prepare the one with "
                f"--tokenizer hf:{corpora[0].folder}"
            )
    return corpora, [weight for _, weight in named]


def training_text(source: str, length: int, seed: int, limit: int | None) -> TrainingText:
    """Windows of ``length`` tokens of prepared corpora; about ``limit`` held-out tokens, by weight.

    Raises:
        UserError: a corpus is damaged, or too short.
    """
    corpora, weights = open_mixture(source)
    parts = [Windows(corpus.parts["train"], length, seed) for corpus in corpora]
    held_out: list[np.ndarray] = []
    for corpus, weight in zip(corpora, weights, strict=True):
        share = None if limit is None else max(length, int(limit * weight))
        held_out += evaluation_windows(corpus.parts["validation"], length, limit=share)
    if not held_out:
        raise UserError(f"{source} has no held-out text; prepare it in a new folder with a larger --validation-share")
    return TrainingText(
        parts[0] if len(parts) == 1 else Mixture(parts, weights, seed), held_out,
        sum(len(corpus.parts["train"].tokens) for corpus in corpora),
        sum(len(corpus.parts["validation"].tokens) for corpus in corpora),
    )  # fmt: skip
