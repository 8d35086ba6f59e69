"""`textdiffusion prepare`: any corpus, tokenized by several processes into shards that training maps into memory.

The source is cut into pieces of some megabytes, the same ones however many processes there are and wherever they were
stopped; a piece becomes one training shard and one held-out shard. What has been made is not made again, unless its
checksum does not agree. Memory does not grow with the corpus: a process holds one piece.

Plain text files are long texts: passages of some thousand characters are held out, by a hash of their content. Records
(JSON lines, CSV, Parquet, hub data sets) are documents, each followed by the end-of-text token and held out as a whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from textdiffusion.errors import UserError
from textdiffusion.files import alone_in, checksum, place, write
from textdiffusion.text.data import documents_of, find_files
from textdiffusion.text.shards import Shard
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.tokenizer import build as build_tokenizer

PIECE = 16 << 20  # bytes of text
PASSAGE = 8192  # bytes of a long text that are held out together
SAMPLE = 16 << 20  # bytes of text that a tokenizer is learnt from
CUTTABLE = (".txt", ".jsonl")  # files that can be read from the middle


@dataclass(frozen=True)
class Plan:
    """What is to be prepared: the same plan gives the same shards."""

    source: str
    files: list[list[Any]]  # name and bytes of each
    tokenizer: str
    text_field: str
    validation_share: float
    piece: int


@dataclass(frozen=True)
class Prepared:
    """What was done."""

    folder: str
    tokens: int
    validation_tokens: int
    characters: int
    shards: int
    made: int  # pieces made now; the others were there


@dataclass(frozen=True)
class Piece:
    """Part of a source: spans (file, first byte, last byte) to be read, or documents that have been."""

    number: int
    spans: tuple[tuple[str, int, int], ...] = ()
    documents: tuple[str, ...] = ()


def check_preparing(out: Path, share: float, workers: int, tokenizer: str) -> None:
    """Refuse what cannot be done, before anything is read.

    Raises:
        UserError: naming the flag.
    """
    from textdiffusion.text.tokenizer import check_kind

    check_kind(tokenizer)
    if not 0 < share < 1:
        raise UserError(f"--validation-share must be above 0 and below 1, not {share:g}")
    if not 1 <= workers <= 1024:
        raise UserError(f"--workers must be from 1 to 1,024, not {workers}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose an empty or a new folder")
    if out.is_dir() and not (out / "plan.json").exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise UserError(f"{out} holds other files; choose an empty or a new folder")


def prepare_corpus(
    source: str,
    out: Path,
    *,
    tokenizer: str = "bpe:8192",
    text_field: str = "text",
    validation_share: float = 0.01,
    workers: int = 0,
    piece: int = PIECE,
    progress: Callable[[int, int], None] = lambda done, tokens: None,
) -> Prepared:
    """Tokenize a corpus into a folder; one that was begun is finished, and what is damaged in it is made anew.

    Args:
        source: what `train --data` takes: files, folders, globs, hf:NAME.
        tokenizer: made from the first megabytes of the files, evenly, where its kind is learnt from text.
        workers: processes; 0 for one a core.
        progress: told pieces done and tokens so far.
    Raises:
        UserError: the source cannot be read, or the folder holds something else.
    """
    if not workers:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check_preparing(out, validation_share, workers, tokenizer)
    files = [] if source.startswith("hf:") else find_files(source)
    plan = Plan(
        source, [[name, os.path.getsize(name)] for name in files], tokenizer, text_field, validation_share, piece
    )
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for left in out.glob(".*.[0-9]*"):
            left.unlink(missing_ok=True)
        _agree(plan, out)
        made_of = _tokenizer(plan, out)
        known = _known(out)
        made = done = tokens = 0
        entries: dict[int, dict[str, Any]] = {}
        for number, entry, new in _entries(plan, out, known, workers):
            entries[number] = entry
            made, done = made + new, done + 1
            tokens += entry["train"]["tokens"] + entry["validation"]["tokens"]
            progress(done, tokens)
        if not tokens:
            raise UserError(f"{source} is empty: there is no text in it")
        ordered = [entries[number] for number in sorted(entries)]
        shards = {part: [e[part] for e in ordered if e[part]["tokens"]] for part in ("train", "validation")}
        hashes = "".join(shard["sha256"] for part in shards.values() for shard in part)
        write(
            out / "corpus.json",
            json.dumps(
                {
                    "format": 1, "source": source, "provenance": f"{source} ({max(1, len(files))} files), prepared",
                    "tokenizer": made_of.kind, "vocabulary": made_of.vocabulary,
                    "fingerprint": hashlib.sha256(hashes.encode()).hexdigest()[:16], "pieces": len(ordered),
                    "numbers": sorted(entries), "entries": ordered, "shards": shards,
                }
            )
            + "\n",
        )  # fmt: skip
        for file in out.glob("piece-*.json"):
            file.unlink()
    held = sum(shard["tokens"] for shard in shards["validation"])
    characters = sum(shard["characters"] for part in shards.values() for shard in part)
    return Prepared(str(out), tokens - held, held, characters, sum(map(len, shards.values())), made)


def _agree(plan: Plan, out: Path) -> None:
    """Note the plan, or see that it is the one noted."""
    file, body = out / "plan.json", asdict(plan)
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    # If no text has come of what is noted, as after a mistaken --text-field, the folder is begun anew.
    if before != body and not (out / "corpus.json").exists() and not any(out.glob("*.npy")):
        for left in (out / "tokenizer.json", *out.glob("piece-*.json")):
            left.unlink(missing_ok=True)
        write(file, json.dumps(body, indent=1) + "\n")
    elif before != body:
        differs = [k for k in body if not isinstance(before, dict) or before.get(k) != body[k]]
        raise UserError(
            f"{out} was begun with other settings or from other files ({', '.join(differs)}); choose another folder"
        )


def _tokenizer(plan: Plan, out: Path) -> Tokenizer:
    """The tokenizer of the folder, made from a sample of the text where there is none."""
    if (out / "tokenizer.json").exists():
        return Tokenizer.load(out)
    sample: list[str] = []
    if plan.tokenizer == "char" or plan.tokenizer.startswith("bpe:"):
        room = max(1, SAMPLE // max(1, len(plan.files)))
        size = 0
        for text in _first_texts(plan, room):
            sample.append(text)
            size += len(text)
            if size >= SAMPLE:
                break
    made = build_tokenizer(plan.tokenizer, sample)
    made.save(out)
    return made


def _first_texts(plan: Plan, room: int) -> Iterator[str]:
    """The beginning of every file, about ``room`` bytes of each."""
    if not plan.files:
        yield from documents_of(plan.source, plan.text_field)
    for name, size in plan.files:
        if name.lower().endswith(CUTTABLE):
            end = _line_end(name, min(room, size), size)
            yield from (text for text, _ in _span_texts(name, 0, end, plan.text_field))
            continue
        left = room
        for text in documents_of(name, plan.text_field):
            yield text
            left -= len(text)
            if left <= 0:
                break


def _known(out: Path) -> dict[int, dict[str, Any]]:
    """The pieces that are noted as made."""
    found: dict[int, dict[str, Any]] = {}
    try:
        body = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
        found = dict(zip(body["numbers"], body["entries"], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for file in out.glob("piece-*.json"):
        try:
            found[int(file.stem.split("-")[1])] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _whole(out: Path, entry: dict[str, Any] | None) -> bool:
    """Whether the shards of a piece are there, and what was written."""
    try:
        assert entry is not None
        shards = [Shard(**entry[part]) for part in ("train", "validation")]
        return all(not s.tokens or checksum(out / Path(s.file).name) == s.sha256 for s in shards)
    except (AssertionError, OSError, KeyError, TypeError):
        return False


def _entries(
    plan: Plan, out: Path, known: dict[int, dict[str, Any]], workers: int
) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Every piece with what was made of it, and whether it was made now; several at a time."""
    context = multiprocessing.get_context("spawn")  # threads of tokenizers do not outlive a fork
    waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    with ProcessPoolExecutor(workers, context, _start, (str(out), plan.text_field, plan.validation_share)) as pool:
        try:
            for piece in _pieces(plan):
                if _whole(out, known.get(piece.number)):
                    yield piece.number, known[piece.number], False
                    continue
                waiting.append((piece.number, pool.submit(_make, piece)))
                while len(waiting) > 2 * workers:  # no more than can be worked on are held
                    number, future = waiting.popleft()
                    yield number, future.result(), True
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result(), True
        except BrokenProcessPool:
            raise UserError(
                "a process was killed while it prepared a piece (too little memory?); run the same command again, "
                "with fewer --workers, to go on"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pieces(plan: Plan) -> Iterator[Piece]:
    """The source in pieces, in order."""
    number, spans, held = 0, list[tuple[str, int, int]](), 0
    documents, size = list[str](), 0
    for name, total in plan.files:
        if not name.lower().endswith(CUTTABLE):
            continue
        start = 0
        while start < total:
            end = _line_end(name, min(total, start + plan.piece - held), total)
            spans.append((name, start, end))
            held, start = held + end - start, end
            if held >= plan.piece:
                yield Piece(number, spans=tuple(spans))
                number, spans, held = number + 1, [], 0
    if spans:
        yield Piece(number, spans=tuple(spans))
        number += 1
    streams = [name for name, _ in plan.files if not name.lower().endswith(CUTTABLE)]
    for name in streams if plan.files else [plan.source]:
        for text in documents_of(name, plan.text_field):
            documents.append(text)
            size += len(text)
            if size >= plan.piece:
                yield Piece(number, documents=tuple(documents))
                number, documents, size = number + 1, [], 0
    if documents:
        yield Piece(number, documents=tuple(documents))


def _line_end(name: str, place: int, size: int) -> int:
    """The first end of a line from ``place`` on; the file's end if there is none within a megabyte of plain text."""
    if place >= size:
        return size
    with open(name, "rb") as file:
        file.seek(place)
        line = file.readline() if name.lower().endswith(".jsonl") else file.readline(1 << 20)
        end = place + len(line)
        while not line.endswith(b"\n") and end < size:  # no line ends: between two characters, then
            after = file.read(1)
            if after[0] & 0xC0 != 0x80:
                break
            end += 1
    return end


# -- what a worker does -------------------------------------------------------------------------------------------

_task: dict[str, Any] = {}


def _start(out: str, text_field: str, share: float) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    _task.update(out=Path(out), field=text_field, share=share, tokenizer=Tokenizer.load(out))


def _make(piece: Piece) -> dict[str, Any]:
    """Tokenize a piece, and write its shards."""
    tokenizer: Tokenizer = _task["tokenizer"]
    out, end = _task["out"], np.array([tokenizer.end_of_text], tokenizer.dtype)
    arrays: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    edges: dict[str, list[int]] = {"train": [0], "validation": [0]}
    lengths, characters, last = {"train": 0, "validation": 0}, {"train": 0, "validation": 0}, ""
    ends = {"train": True, "validation": True}  # whether a part ends with a whole document, or with nothing

    def add(part: str, text: str, document: bool) -> None:
        nonlocal last
        # Documents follow each other in a run; passages of a long text only if none between them is held out.
        goes_on = ends[part] if document else last == part
        if not goes_on and lengths[part] > edges[part][-1]:
            edges[part].append(lengths[part])
        last, ends[part] = "" if document else part, document
        found = [tokenizer.encode_array(text), *([end] if document else [])]
        arrays[part] += found
        lengths[part] += sum(map(len, found))
        characters[part] += len(text) + document

    def held(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()[:8]
        return "validation" if int.from_bytes(digest) / 2**64 < _task["share"] else "train"

    for name, first, stop in piece.spans:
        for text, document in _span_texts(name, first, stop, _task["field"]):
            if document:
                add(held(text), text, True)
                continue
            for part, passage in _passages(text, held):
                add(part, passage, False)
        last = ""
    for text in piece.documents:
        add(held(text), text, True)
    entry: dict[str, Any] = {}
    for part, found in arrays.items():
        tokens = np.concatenate(found) if found else np.empty(0, tokenizer.dtype)
        path = out / f"{part}-{piece.number:06d}.npy"
        if len(tokens):
            place(path, lambda temporary, tokens=tokens: _write_array(temporary, tokens))  # type: ignore[misc]
        runs = [edge for edge in edges[part] if edge < len(tokens)] + [len(tokens)]
        digest = checksum(path) if len(tokens) else ""
        entry[part] = asdict(Shard(path.name, len(tokens), runs, characters[part], digest))
    write(out / f"piece-{piece.number:06d}.json", json.dumps(entry) + "\n")
    return entry


def _write_array(path: Path, tokens: np.ndarray) -> None:
    with open(path, "wb") as file:  # a name without .npy, which numpy would add
        np.save(file, tokens, allow_pickle=False)


def _passages(text: str, held: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """A long text in passages that end at line ends, neighbours of the same part joined."""
    pending, part, start = list[str](), "", 0
    while start < len(text):
        cut = text.find("\n", start + PASSAGE)
        cut = cut + 1 if 0 <= cut < start + 4 * PASSAGE else min(len(text), start + 2 * PASSAGE)
        passage, start = text[start:cut], cut
        mine = held(passage)
        if pending and mine != part:
            yield part, "".join(pending)
            pending = []
        part = mine
        pending.append(passage)
    if pending:
        yield part, "".join(pending)


def _span_texts(name: str, first: int, stop: int, text_field: str) -> Iterator[tuple[str, bool]]:
    """The texts of a span of a file, and whether each is a document."""
    with open(name, "rb") as file:
        file.seek(first)
        raw = file.read(stop - first)
    try:
        if (zero := raw.find(b"\0")) >= 0:
            raise ValueError(f"byte {first + zero} is zero")
        text = raw.decode("utf-8-sig" if first == 0 else "utf-8")
    except ValueError as error:
        raise UserError(f"{name} is not UTF-8 text ({error}); leave it out, or convert it") from None
    if not name.lower().endswith(".jsonl"):
        yield text, False
        return
    for line in text.split("\n"):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
            found = record[text_field]
            assert isinstance(found, str | None)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise UserError(
                f"{name}, between bytes {first} and {stop}: a line is no JSON object with a text {text_field!r}; "
                "mend it, or name another --text-field"
            ) from None
        if found:
            # JSON can spell half a surrogate pair, which no encoding can write.
            yield found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), True
