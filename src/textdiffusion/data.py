"""Text to train on: where it comes from, how it is split, and the windows of tokens a model sees of it."""

import csv
import difflib
import glob
import hashlib
import io
import json
import os
import platform
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from textdiffusion.errors import UserError
from textdiffusion.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
STANDARD_BYTES = 100_000_000  # the size of text8 and enwik8
MINIMUM_CHARACTERS = 16  # less cannot be split and cut into windows at all
MINIMUM_DOCUMENTS = 20  # with fewer, whole documents are too coarse a unit to hold out


WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class DataConfig:
    """Which text to train on, and how much of it to hold out."""

    source: str = "pydoc"  # built in; or a .txt, .jsonl, .csv or .parquet file, a folder, a glob, hf:NAME[:SPLIT]
    text_field: str = "text"  # the field or column that holds the text of each record
    normalise_whitespace: bool = False  # replace every run of whitespace by one space
    validation_share: float = 0.05  # the share of the text held out, above 0 and below 1


@dataclass
class Corpus:
    """Text, split. With `has_documents` each string is a whole document, else a contiguous piece of one long text."""

    name: str
    train: list[str]
    validation: list[str]
    test: list[str] = field(default_factory=list)  # empty but for text8 and enwik8
    has_documents: bool = False
    provenance: str = ""  # where the text comes from and, if known, its licence


def load_corpus(config: DataConfig) -> Corpus:
    """Read and split the text that `config` names. Records and files without text are left out.

    - 20 or more different documents are split by document: a hash of its content decides, so a document falls on the
      same side in every corpus and copies of it are never on both. `validation_share` is met only on average.
    - text8 and enwik8 (files so named, of exactly 100,000,000 bytes) are split at 90 and 95% of their bytes.
    - Any other text (fewer documents are joined by an empty line) is split by position: up to 10 evenly spaced
      contiguous blocks, `validation_share` of the text in total, are held out; the pieces between are trained on.

    Raises UserError for a validation share out of range, and for a source that is missing, empty, not UTF-8 text or
    without the text field.
    """
    if not 0 < config.validation_share < 1:
        raise UserError(f"validation_share is {config.validation_share}; it must be above 0 and below 1")
    documents, provenance = _read_source(config.source, config.text_field)
    if config.normalise_whitespace:
        documents = [re.sub(r"\s+", " ", text) for text in documents]
    documents = [text for text in documents if text and not text.isspace()]
    if not documents:
        raise UserError(f"{config.source} is empty: there is no text in it")
    if (size := sum(map(len, documents))) < MINIMUM_CHARACTERS:
        raise UserError(f"{config.source} has only {size} characters; give a text of thousands at least")
    path, test = Path(config.source).expanduser(), list[str]()
    standard = path.stem.lower() in ("text8", "enwik8") and path.is_file() and path.stat().st_size == STANDARD_BYTES
    has_documents = len(set(documents)) >= MINIMUM_DOCUMENTS
    if has_documents:
        train, validation = _split_by_document(documents, config.validation_share)
    elif standard:
        train, validation, test = _split_90_5_5(documents[0])
    else:
        train, validation = _split_by_position("\n\n".join(documents), config.validation_share)
    if not train:
        raise UserError(f"{config.source} has {len(validation[0])} characters; give at least 100, to hold some out")
    return Corpus(config.source, train, validation, test, has_documents, provenance)


def fingerprint(corpus: Corpus) -> str:
    """A hash of the text and of how it is split."""
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.validation, corpus.test):
        for text in part:
            digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def whole_text(config: DataConfig) -> Corpus:
    """The text that `config` names, none of it for training: all of it is held out. Raises as `load_corpus` does."""
    documents, provenance = _read_source(config.source, config.text_field)
    if config.normalise_whitespace:
        documents = [re.sub(r"\s+", " ", text) for text in documents]
    if not any(documents):
        raise UserError(f"{config.source} is empty: there is no text in it")
    return Corpus(config.source, [], documents, has_documents=len(documents) > 1, provenance=provenance)


def word_set(corpus: Corpus) -> set[str]:
    """The distinct words of the training text, in lower case."""
    return {word for text in corpus.train for word in WORD.findall(text.lower())}


def _split_by_document(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    place = {text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 for text in set(documents)}
    # Neither side may be empty, however few the documents and however extreme the share.
    share = min(max(share, sorted(place.values())[1]), max(place.values()))
    return [text for text in documents if place[text] >= share], [text for text in documents if place[text] < share]


def _split_by_position(text: str, share: float) -> tuple[list[str], list[str]]:
    blocks = min(10, max(1, int(len(text) * share) // 500))  # smaller blocks would cut a short text to shreds
    spacing = len(text) / blocks
    half = max(1, spacing * share) / 2
    cuts = [int((block + 0.5) * spacing + offset) for block in range(blocks) for offset in (-half, half)]
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    return [piece for piece in pieces[0::2] if piece], pieces[1::2]


def _split_90_5_5(text: str) -> list[list[str]]:
    raw = text.encode()
    # Where a cut falls inside a UTF-8 character, that character goes to the later part.
    ends = [len(raw[: len(raw) * percent // 100].decode(errors="ignore")) for percent in (90, 95)]
    return [[text[start:end]] for start, end in pairwise([0, *ends, len(text)])]


def _read_source(source: str, text_field: str) -> tuple[list[str], str]:
    """The documents of a source, and where they come from."""
    if source == "pydoc":
        return _pydoc_sections(), f"help topics of Python {platform.python_version()}, PSF License Version 2"
    places = [source] if source.startswith("hf:") else _find_files(source)
    documents = [text for place in places for text in _texts(place, text_field)]
    return documents, source if len(places) == 1 else f"{source} ({len(places)} files)"


def check_source(source: str) -> None:
    """Refuse a text that is not there, before anything is made ready for it.

    Raises:
        UserError: no such file, folder or glob; what is in them is seen when they are read.
    """
    if source != "pydoc" and not source.startswith("hf:"):
        _find_files(source)


def _pydoc_sections() -> list[str]:
    """The sections of Python's built-in help topics, from the shortest topic to the longest.

    Many topics repeat parts of longer ones word for word. Each paragraph is kept only in the shortest topic that has
    it; otherwise most of the validation text would be in the training text as well.
    """
    from pydoc_data.topics import topics

    sections: list[str] = []
    seen: set[str] = set()
    for topic in sorted(topics.values(), key=lambda topic: (len(topic), topic)):
        sections.append("")
        for paragraph in re.split(r"\n{2,}", topic.strip("\n")):
            bare = re.sub(r"\n([=*\-~^\"])\1{2,}$", "", paragraph)  # a heading's underline varies between topics
            if bare not in seen:
                seen.add(bare)
                sections += [paragraph] if bare != paragraph else [sections.pop() + "\n\n" + paragraph]
    return [section.strip("\n") for section in sections]


def _find_files(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir() or glob.has_magic(source):
        every = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        wanted = SUFFIXES if path.is_dir() else ""
        files = sorted(file for file in every if file.name.lower().endswith(wanted) and file.is_file())
        if not files:
            raise UserError(f"{source} matches no file; a folder must hold {', '.join(SUFFIXES)}")
        return [str(file) for file in files]
    similar = difflib.get_close_matches(path.name, ["pydoc", *(entry.name for entry in path.parent.glob("*"))], n=1)
    hint = f"did you mean {similar[0]}?" if similar else "give a file, a folder, a glob, pydoc or hf:NAME"
    raise UserError(f"there is no file or folder {source}; {hint}")


def _records(place: str, text_field: str) -> Iterator[Any]:
    """The records of a hub dataset or a file; a plain text file is a single one."""
    suffix = Path(place).suffix.lower()
    if place.startswith("hf:"):
        from datasets import load_dataset

        _, name, split = [*place.split(":", 2), "train"][:3]
        yield from load_dataset(name, split=split, streaming=True)
    elif suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(place) as file:
            for batch in file.iter_batches(columns=[text_field] if text_field in file.schema_arrow.names else None):
                yield from batch.to_pylist()
    elif suffix == ".jsonl":
        yield from (json.loads(line) for line in _read(place).split("\n") if line and not line.isspace())
    elif suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
        yield from csv.DictReader(io.StringIO(_read(place), newline=""))
    else:
        yield {text_field: _read(place)}


def _read(place: str) -> str:
    raw = Path(place).read_bytes()
    if (zero := raw.find(b"\0")) >= 0:
        raise ValueError(f"it is not UTF-8 text: byte {zero} is zero")
    return raw.decode("utf-8-sig")


def _texts(place: str, text_field: str) -> Iterator[str]:
    """The text of each record in a dataset or file, but for null ones. Any failure to read becomes a UserError."""
    number = 0
    try:
        for number, record in enumerate(_records(place, text_field), 1):
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
                raise UserError(f"{place}, record {number}: no text_field {text_field!r}; its fields are: {fields}")
            text = record[text_field]
            if not isinstance(text, str | None):
                raise UserError(f"{place}, record {number}: field {text_field!r} is a {type(text).__name__}, not text")
            if text:
                # JSON can spell half a surrogate pair, which no encoding can write.
                yield text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{place} needs a package; install it with: pip install 'textdiffusion[data]'") from error
    except Exception as error:  # csv, json, pyarrow, the file system and the hub's client have little in common
        raise UserError(f"{place} cannot be read at record {number + 1}: {' '.join(str(error).split())}") from error


def cache_folder() -> Path:
    """Where derived files are kept: $TEXTDIFFUSION_CACHE, else ~/.cache/textdiffusion."""
    return Path(os.environ.get("TEXTDIFFUSION_CACHE") or "~/.cache/textdiffusion").expanduser()


@dataclass
class TokenRuns:
    """Token ids in contiguous runs: run r is `tokens[runs[r]:runs[r + 1]]`, and windows never cross its edges."""

    tokens: np.ndarray  # [n] uint16 or uint32, possibly a read-only memory map
    runs: np.ndarray  # [R + 1] int64, from 0 to n
    characters: int = 0  # Unicode characters the tokens stand for, one for each end-of-text; 0 if not known


def tokenize(corpus: Corpus, tokenizer: Tokenizer, cache: Path | None = None) -> dict[str, TokenRuns]:
    """The token runs of "train", "validation" and, where there is one, "test".

    Documents are joined into one run, each followed by the end-of-text token, which the model learns like any other.
    Pieces of a longer text are a run each, with no end-of-text.

    The tokens are kept in folder `cache` (default: $TEXTDIFFUSION_CACHE, else ~/.cache/textdiffusion), named by a hash
    of text and tokenizer, and memory-mapped from there the next time; a damaged file is made again. Raises UserError
    if the folder cannot be written.
    """
    folder = cache or cache_folder()
    result = {}
    for name, texts in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        if texts:
            file = folder / _cache_name(texts, corpus.has_documents, tokenizer)
            found = _read_cache(file) or _write_cache(file, *_encode(texts, corpus.has_documents, tokenizer))
            result[name] = TokenRuns(*found, sum(map(len, texts)) + len(texts) * corpus.has_documents)
    return result


def _encode(texts: list[str], has_documents: bool, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    parts = [tokenizer.encode_array(text) for text in texts]
    if has_documents:
        end = np.array([tokenizer.end_of_text], tokenizer.dtype)
        parts = [np.concatenate([array for part in parts for array in (part, end)])]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def _cache_name(texts: list[str], has_documents: bool, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"1 {has_documents} {tokenizer.end_of_text} {tokenizer.to_json()}".encode())
    for raw in map(str.encode, texts):
        digest.update(b"%d:%b" % (len(raw), raw))  # with the length, so that "a", "bc" is not "ab", "c"
    return f"{digest.hexdigest()[:40]}.npy"


def _read_cache(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and runs; None if the file is missing or is not what was written."""
    try:
        tokens = np.load(file, mmap_mode="r")
        runs, (checksum,) = np.split(np.load(file.with_suffix(".runs.npy")), [-1])
        return (tokens, runs) if checksum == zlib.crc32(runs.data, zlib.crc32(tokens.data)) else None
    except (OSError, ValueError, EOFError):
        return None


def _write_cache(file: Path, tokens: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        checked = np.append(runs, zlib.crc32(runs.data, zlib.crc32(tokens.data)))
        for path, array in ((file, tokens), (file.with_suffix(".runs.npy"), checked)):
            temporary = path.with_name(f"{path.stem}.{os.getpid()}.npy")
            np.save(temporary, array)
            os.replace(temporary, path)
        return tokens, runs
    except OSError as error:
        raise UserError(f"cannot write to {file.parent} ({error.strerror}); set TEXTDIFFUSION_CACHE") from error


class Windows:
    """Training windows of `length` tokens, in an order fixed by `seed`.

    Example g belongs to epoch g // per_epoch. Each epoch shifts the tiling of every run by a random amount below
    `length` and visits the windows in a random order. The batch of B at step s is examples s B to s B + B - 1, so
    resuming is arithmetic and the share of one rank is a slice. Raises UserError if the text is too short for two.
    """

    def __init__(self, runs: TokenRuns, length: int, seed: int) -> None:
        sizes = np.diff(runs.runs)
        total, longest = sizes.sum(), max(sizes.max(), 1)
        if longest < length or total < 2 * length:
            characters = runs.characters or total
            needed = int(max(2 * length, total * length / longest) * max(characters, 1) / max(total, 1)) + 1
            advice = f"windows of {length} tokens need about {needed}; give more text or a smaller window length"
            raise UserError(f"the training text has only {characters} characters; {advice}")
        self.length, self.seed, self._tokens = length, seed, runs.tokens
        self._starts, self._sizes = runs.runs[:-1][sizes >= length], sizes[sizes >= length]
        self._shifts = np.minimum(length, self._sizes - length + 1)  # every run keeps a window whatever its shift
        self.per_epoch = int(((self._sizes - self._shifts + 1) // length).sum())
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The windows with these global example numbers, int64 [n, length]; `indices` is an integer array [n]."""
        epochs, places = np.divmod(indices, self.per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            starts[epochs == epoch] = self._epoch(int(epoch))[places[epochs == epoch]]
        return self._tokens[starts[:, None] + np.arange(self.length)].astype(np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts, in order; the latest epoch is kept."""
        if self._order[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            first = self._starts + random.integers(self._shifts)
            last = self._starts + self._sizes - self.length
            tiles = [np.arange(start, stop + 1, self.length) for start, stop in zip(first, last)]
            self._order = (epoch, random.permutation(np.concatenate(tiles)))
        return self._order[1]


def evaluation_windows(runs: TokenRuns, length: int, limit: int | None = None, seed: int = 0) -> list[np.ndarray]:
    """Windows (int64, at most `length` long) that hold every token exactly once; only the last of a run is shorter.

    With `limit`, about that many tokens: evenly spaced windows, from an offset that `seed` decides.
    """
    spans = pairwise(runs.runs.tolist())
    windows = [(start, min(start + length, end)) for begin, end in spans for start in range(begin, end, length)]
    if limit is not None and limit // length < len(windows):
        count = max(1, limit // length)
        offset = np.random.default_rng(seed).random()
        windows = [windows[int((place + offset) * len(windows) / count)] for place in range(count)]
    return [runs.tokens[start:end].astype(np.int64) for start, end in windows]
