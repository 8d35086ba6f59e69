"""Text to train on: where it comes from, its labels, how it is split and made tokens."""

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
from textdiffusion.files import cache_folder
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import TokenRuns

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
STANDARD_BYTES = 100_000_000  # the size of text8 and enwik8
MINIMUM_CHARACTERS = 16  # less cannot be split and cut into windows at all
MINIMUM_DOCUMENTS = 20  # with fewer, whole documents are too coarse a unit to hold out
MOST_LABELS = 1000  # more are no labels: a field of names or numbers


WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class DataConfig:
    """Which text to train on, and how much of it to hold out."""

    source: str = "pydoc"  # built in; or a .txt, .jsonl, .csv or .parquet file, a folder, a glob, hf:NAME[:SPLIT]
    text_field: str = "text"  # the field or column that holds the text of each record
    label: str | None = None  # the field of a record's label; or "file" or "folder": the name of what the text is in
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
    labels: dict[str, list[str]] = field(default_factory=dict)  # by part, one for each text; empty if there are none


def load_corpus(config: DataConfig) -> Corpus:
    """Read and split the text that `config` names. Records and files without text are left out.

    - 20 or more different documents are split by document: a hash of its content decides, so a document falls on the
      same side in every corpus and copies of it are never on both. `validation_share` is met only on average.
    - text8 and enwik8 (files so named, of exactly 100,000,000 bytes) are split at 90 and 95% of their bytes.
    - Any other text (fewer documents are joined by an empty line) is split by position: up to 10 evenly spaced
      contiguous blocks, `validation_share` of the text in total, are held out; the pieces between are trained on.
      With labels this is done for the text of each label.

    Raises UserError for a validation share out of range, and for a source that is missing, empty, not UTF-8 text or
    without the text field or the label.
    """
    if not 0 < config.validation_share < 1:
        raise UserError(f"validation_share is {config.validation_share}; it must be above 0 and below 1")
    documents, labels, provenance = _read_source(config.source, config.text_field, config.label)
    if config.normalise_whitespace:
        documents = [re.sub(r"\s+", " ", text) for text in documents]
    labels = [label for text, label in zip(documents, labels) if text and not text.isspace()]
    documents = [text for text in documents if text and not text.isspace()]
    if not documents:
        raise UserError(f"{config.source} is empty: there is no text in it")
    if (size := sum(map(len, documents))) < MINIMUM_CHARACTERS:
        raise UserError(f"{config.source} has only {size} characters; give a text of thousands at least")
    if config.label is not None:
        return _labelled(config, documents, labels, provenance)
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


def _labelled(config: DataConfig, documents: list[str], labels: list[str], provenance: str) -> Corpus:
    """Split documents that have a label each; on both sides every text has the label of what it is a part of."""
    if not 2 <= len(set(labels)) <= MOST_LABELS:
        raise UserError(
            f"--label {config.label} finds {len(set(labels)):,} different labels in {config.source}; "
            f"there must be from 2 to {MOST_LABELS:,}"
        )
    has_documents = len(set(documents)) >= MINIMUM_DOCUMENTS
    corpus = Corpus(config.source, [], [], [], has_documents, provenance, {"train": [], "validation": []})
    held_out = set(_split_by_document(documents, config.validation_share)[1]) if has_documents else set()
    for label in sorted(set(labels)):
        own = [text for text, found in zip(documents, labels) if found == label]
        if has_documents:
            # A label whose texts are all held out could be neither learnt nor measured: it keeps the first of them.
            kept = {own[0]} if held_out.issuperset(own) else set()
            held = held_out - kept
            parts = ([t for t in own if t not in held], [t for t in own if t in held])
        else:
            parts = _split_by_position("\n\n".join(own), config.validation_share)
        for name, texts, part in zip(("train", "validation"), (corpus.train, corpus.validation), parts):
            texts += part
            corpus.labels[name] += [label] * len(part)
    return corpus


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
    documents, _, provenance = _read_source(config.source, config.text_field)
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


def _read_source(source: str, text_field: str, label: str | None = None) -> tuple[list[str], list[str], str]:
    """The documents of a source, their labels ("" where none is asked for), and where they come from."""
    if source == "pydoc":
        if label is not None:
            raise UserError("the built-in text has no labels; give --data with --label")
        sections = _pydoc_sections()
        where = f"help topics of Python {platform.python_version()}, PSF License Version 2"
        return sections, [""] * len(sections), where
    places = [source] if source.startswith("hf:") else find_files(source)
    found = [pair for place in places for pair in _texts(place, text_field, label)]
    where = source if len(places) == 1 else f"{source} ({len(places)} files)"
    return [text for text, _ in found], [label for _, label in found], where


def check_source(source: str) -> None:
    """Refuse a text that is not there, before anything is made ready for it.

    Raises:
        UserError: no such file, folder or glob; what is in them is seen when they are read.
    """
    if source != "pydoc" and not source.startswith("hf:"):
        find_files(source)


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


def find_files(source: str) -> list[str]:
    """The files that a source names, in order.

    Raises:
        UserError: there is none.
    """
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


def _records(place: str, text_field: str, label: str | None = None) -> Iterator[Any]:
    """The records of a hub dataset or a file; a plain text file is a single one."""
    suffix = Path(place).suffix.lower()
    if place.startswith("hf:"):
        from datasets import load_dataset

        _, name, split = [*place.split(":", 2), "train"][:3]
        yield from load_dataset(name, split=split, streaming=True)
    elif suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(place) as file:
            wanted = [name for name in (text_field, label) if name is not None]
            known = all(name in file.schema_arrow.names for name in wanted)
            for batch in file.iter_batches(columns=wanted if known else None):
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


def documents_of(place: str, text_field: str) -> Iterator[str]:
    """The text of each record in a dataset or file, but for null ones. Any failure to read becomes a UserError."""
    return (text for text, _ in _texts(place, text_field))


def _texts(place: str, text_field: str, label: str | None = None) -> Iterator[tuple[str, str]]:
    """The text of each record in a dataset or file, but for null ones, and its label. Any failure to read becomes a
    UserError."""
    number, path = 0, Path(place)
    # Of a file's texts, whatever fields they have; a hub dataset is in no file.
    of_place = {} if place.startswith("hf:") else {"file": path.stem, "folder": path.absolute().parent.name}
    try:
        for number, record in enumerate(_records(place, text_field, None if label in of_place else label), 1):
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
                raise UserError(f"{place}, record {number}: no text_field {text_field!r}; its fields are: {fields}")
            text = record[text_field]
            if not isinstance(text, str | None):
                raise UserError(f"{place}, record {number}: field {text_field!r} is a {type(text).__name__}, not text")
            named = "" if label is None else of_place.get(label, record.get(label))
            if isinstance(named, str | int | float) and (label is None or str(named) != ""):
                named = str(named)
            else:
                fields = ", ".join(map(str, record))
                raise UserError(
                    f"{place}, record {number}: no --label {label}; its fields are: {fields}; "
                    "files have the labels file and folder"
                )
            if text:
                # JSON can spell half a surrogate pair, which no encoding can write.
                yield text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), named
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{place} needs a package; install it with: pip install 'textdiffusion[data]'") from error
    except Exception as error:  # csv, json, pyarrow, the file system and the hub's client have little in common
        raise UserError(f"{place} cannot be read at record {number + 1}: {' '.join(str(error).split())}") from error


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
    if corpus.labels:
        return _tokenize_by_label(corpus, tokenizer, folder)
    for name, texts in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        if texts:
            file = folder / _cache_name(texts, corpus.has_documents, tokenizer)
            found = _read_cache(file) or _write_cache(file, *_encode(texts, corpus.has_documents, tokenizer))
            result[name] = TokenRuns(*found, sum(map(len, texts)) + len(texts) * corpus.has_documents)
    return result


def _tokenize_by_label(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> dict[str, TokenRuns]:
    """The same, texts of each label in runs of their own, so that no window has two labels."""
    result, names = {}, sorted(set(corpus.labels["train"]))
    for part, texts in (("train", corpus.train), ("validation", corpus.validation)):
        tokens, runs, labels, characters = list[np.ndarray](), [np.zeros(1, np.int64)], list[int](), 0
        for number, name in enumerate(names):
            own = [text for text, label in zip(texts, corpus.labels[part]) if label == name]
            if own:
                whole = tokenize(Corpus(name, own, [], [], corpus.has_documents), tokenizer, folder)["train"]
                tokens.append(whole.tokens)
                runs.append(whole.runs[1:] + runs[-1][-1])
                labels += [number] * (len(whole.runs) - 1)
                characters += whole.characters
        result[part] = TokenRuns(
            np.concatenate(tokens), np.concatenate(runs), characters, np.array(labels, dtype=np.int64)
        )
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
