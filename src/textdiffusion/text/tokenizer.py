"""Text to token ids and back: characters, bytes, byte-level BPE, or any Hugging Face tokenizer.

Every tokenizer has an end-of-text token. In the three kinds built here it is an id that no text can reach, so text
containing the literal string "<|endoftext|>" is encoded as the ordinary characters it is made of. On disk each
tokenizer is a standard ``tokenizer.json``.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from textdiffusion.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
KINDS = "char, byte, bpe:N (such as bpe:512) or hf:NAME_OR_FOLDER (such as hf:gpt2)"

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_USUAL_ENDS = (END_OF_TEXT, "</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|im_end|>")
_CHUNK = 1 << 14  # characters; short enough to spread over threads, long enough that calls cost nothing
# The GPT-2 pattern always starts a new word at a space or newline that follows a visible character, so text cut there
# gets the same tokens as text left whole.
_SAFE_CUT = re.compile(r"(?<=\S)[ \n]")


class Tokenizer:
    """A `tokenizers.Tokenizer` with an end-of-text token and the facts a language model needs about its vocabulary.

    Attributes:
        kind: "char", "byte", "bpe:N" or "hf:NAME".
        vocabulary: V, the number of ids, with end-of-text and (for char) the unknown token.
        end_token, end_of_text: the end-of-text token as a string, and its id.
        unknown: id that unseen symbols become; None for every kind but char.
    """

    def __init__(self, backend: tokenizers.Tokenizer, kind: str, end_token: str = END_OF_TEXT) -> None:
        """Wrap `backend`, whose vocabulary must hold `end_token` (KeyError otherwise)."""
        # Settings such as BERT's truncation at 512 tokens would silently lose training text.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.backend = backend
        self.kind = kind
        self.vocabulary: int = max(vocabulary.values()) + 1
        self.end_token = end_token
        self.end_of_text: int = vocabulary[end_token]
        self.unknown: int | None = vocabulary[UNKNOWN] if kind == "char" else None

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest integer type that holds every id and one more (a mask token) above them."""
        return np.uint16 if self.vocabulary <= 65535 else np.uint32

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without an end-of-text token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """The token ids of every text, encoded in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as `encode`, as an array [n] of `dtype`, fast enough for texts of many megabytes."""
        if self.kind == "char":
            return self._id_of_code_point[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        chunks = list(_chunks(text)) if self.kind.startswith("bpe:") else [text]
        batches = (self.encode_documents(chunks[start : start + 256]) for start in range(0, len(chunks), 256))
        return np.concatenate([np.array(ids, self.dtype) for batch in batches for ids in batch])

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        table = np.full(0x110000, self.unknown, self.dtype)
        for piece, index in self.backend.get_vocab().items():
            if len(piece) == 1:
                table[ord(piece)] = index
        return table

    def unseen(self, text: str) -> str:
        """The distinct symbols of `text` that have no token of their own, in order of appearance (char only)."""
        if self.unknown is None:
            return ""
        return "".join(symbol for symbol in dict.fromkeys(text) if self.backend.token_to_id(symbol) is None)

    def decode(self, ids: Iterable[Any], end_of_text: str = "\n\n") -> str:
        """The text of `ids`, a one-dimensional sequence of integers (list, numpy array or torch tensor).

        The end-of-text token is shown as the string `end_of_text`; the unknown token, ids outside the vocabulary
        (such as a mask) and bytes that are not valid UTF-8 are shown as U+FFFD.
        """
        shown: list[str] = []
        run: list[int] = []
        for index in map(int, ids.tolist() if hasattr(ids, "tolist") else ids):
            if 0 <= index < self.vocabulary and index not in (self.end_of_text, self.unknown):
                run.append(index)
            else:
                shown += [self._decode_run(run), end_of_text if index == self.end_of_text else _REPLACEMENT]
                run = []
        return "".join([*shown, self._decode_run(run)])

    @property
    def spells(self) -> bool:
        """Whether a text is the bytes of its tokens, joined: so for all but WordPiece and SentencePiece tokenizers."""
        return self.kind == "char" or self._byte_level

    def _decode_run(self, ids: list[int]) -> str:
        if self.spells:
            return b"".join(self._token_bytes[index] for index in ids).decode("utf-8", "replace")
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for, [V]; b"" for end-of-text, U+FFFD for unknown.

        Exact for char, byte, BPE and byte-level Hugging Face tokenizers. The others (WordPiece, SentencePiece) may
        normalise the text; for them, the bytes of the piece with its word-start mark read as a space.
        """
        return list(self._token_bytes)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        known = [b""] * self.vocabulary  # some Hugging Face vocabularies skip ids
        for piece, index in self.backend.get_vocab(with_added_tokens=False).items():
            known[index] = self._piece_bytes(piece)
        for index, added in self.backend.get_added_tokens_decoder().items():
            known[index] = added.content.encode()
        if self.unknown is not None:
            known[self.unknown] = _REPLACEMENT.encode()
        known[self.end_of_text] = b""
        return known

    def _piece_bytes(self, piece: str) -> bytes:
        if self.kind == "char":
            return piece.encode()
        if self._byte_level and _BYTE_OF_SYMBOL.keys() >= set(piece):
            return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in piece)
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(fallback[1])
        if isinstance(self.backend.model, models.WordPiece):
            prefix = self.backend.model.continuing_subword_prefix
            return (piece[len(prefix) :] if piece.startswith(prefix) else " " + piece).encode()
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)

    @cached_property
    def characters(self) -> np.ndarray:
        """How many Unicode characters each token stands for, int64 [V], for bits per character.

        Bytes that continue a UTF-8 character (10xxxxxx) count zero, so the sum over a text's tokens is its length.
        End-of-text and the unknown token count one each.
        """
        counts = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self._token_bytes], np.int64)
        counts[self.end_of_text] = 1
        return counts

    @property
    def spelling(self) -> np.ndarray:
        """Nats that it takes to spell out what an id leaves unsaid, float64 [V]; 0 for all but the unknown token.

        An unseen symbol is any of the rest of Unicode, each as likely as another; with this price a likelihood of the
        tokens is one of the text.
        """
        nats = np.zeros(self.vocabulary)
        if self.unknown is not None:
            nats[self.unknown] = np.log(0x110000 - 0x800 - (self.vocabulary - 2))  # no surrogates, no known symbols
        return nats

    def pieces(self) -> list[str]:
        """A string to show for every id, [V]; bytes that are not a whole character look like \\xe2."""
        return list(self._pieces)

    @cached_property
    def _pieces(self) -> list[str]:
        shown = [piece.decode("utf-8", "backslashreplace") for piece in self._token_bytes]
        shown[self.end_of_text] = self.end_token
        return shown

    def describe(self) -> str:
        """One line: the kind, the vocabulary size, and what happens to symbols never seen in the training text."""
        size = f"{self.kind} tokenizer, {self.vocabulary} tokens"
        if self.kind == "char":
            fate = f"become {UNKNOWN}, shown as {_REPLACEMENT}; use byte or bpe:N for exact text"
            return f"{size}; symbols never seen in the training text {fate}"
        if self.kind.startswith("hf:"):
            return f"{size}; the end of a text is {self.end_token}"
        return f"{size}; every text is encoded exactly"

    def to_json(self) -> str:
        """The contents of a standard tokenizer.json."""
        return self.backend.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, and a tokenizer_config.json beside it, into folder `path` (or to a .json path)."""
        file = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_token,
            **({} if self.unknown is None else {"unk_token": UNKNOWN}),
            "clean_up_tokenization_spaces": False,
            "textdiffusion_kind": self.kind,
        }
        beside = file.with_name("tokenizer_config.json")
        for place, body in ((beside, json.dumps(settings, indent=2) + "\n"), (file, self.to_json())):
            # Renamed into place: never half written.
            temporary = place.with_name(f".{place.name}.{os.getpid()}")
            temporary.write_text(body, encoding="utf-8")
            os.replace(temporary, place)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in folder `path`, written by `save` or by any other Hugging Face tool.

        Raises UserError if there is none or it cannot be read.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"there is no tokenizer file {file}; give a tokenizer.json or a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
            beside = file.with_name("tokenizer_config.json")
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            kind = settings.get("textdiffusion_kind") or _infer_kind(backend) or f"hf:{path}"
            return cls(backend, kind, _end_token(backend, settings.get("eos_token")))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file} cannot be read as a tokenizer: {_first_line(error)}") from error


def check_kind(kind: str) -> None:
    """Refuse what names no tokenizer.

    Raises:
        UserError: an unknown kind, or a BPE vocabulary too small for the 256 bytes.
    """
    name, _, argument = kind.partition(":")
    if name == "bpe" and argument.isdecimal() and len(argument) < 8:
        if int(argument) <= 257:
            raise UserError(f"{kind} is too small: the 256 bytes and end-of-text need 257 tokens; use bpe:258 or more")
    elif kind not in ("char", "byte") and not (name == "hf" and argument):
        raise UserError(f"unknown tokenizer {kind!r}; use {KINDS}")


def build(kind: str, documents: Iterable[str]) -> Tokenizer:
    """Make the tokenizer called `kind`, from the text of `documents` where the kind learns from text.

    Raises UserError for an unknown kind, a BPE vocabulary too small for the 256 bytes, no text to learn from, or a
    Hugging Face tokenizer that cannot be found or downloaded.
    """
    check_kind(kind)
    name, _, argument = kind.partition(":")
    if kind == "char":
        return _build_char(documents)
    if kind == "byte":
        return _byte_level_bpe("byte", _SYMBOLS, [])
    return _build_bpe(int(argument), documents) if name == "bpe" else _find_hugging_face(argument)


def _build_char(documents: Iterable[str]) -> Tokenizer:
    symbols = sorted(set().union(*documents))
    if not symbols:
        raise UserError("a char tokenizer learns its symbols from text, and there is no text; use byte instead")
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, UNKNOWN, END_OF_TEXT])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, "char")


def _build_bpe(size: int, documents: Iterable[str]) -> Tokenizer:
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((chunk for text in documents for chunk in _chunks(text)), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    return _byte_level_bpe(f"bpe:{size}", [*_SYMBOLS, *("".join(merge) for merge in merges)], merges)


def _byte_level_bpe(kind: str, pieces: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), END_OF_TEXT])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, kind)


def _find_hugging_face(name: str) -> Tokenizer:
    if Path(name).expanduser().exists():
        return Tokenizer.load(Path(name).expanduser())
    try:
        backend = tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # whatever the network or the hub's client raises
        message = f"tokenizer hf:{name} is not a file or folder here and cannot be fetched: {_first_line(error)}"
        raise UserError(message) from error
    return Tokenizer(backend, f"hf:{name}", _end_token(backend, None))


def _end_token(backend: tokenizers.Tokenizer, named: Any) -> str:
    """The end-of-text token: the one a config names, else the first usual one, else a new one."""
    content = named.get("content") if isinstance(named, dict) else named
    for token in (content, *_USUAL_ENDS):
        if token and backend.token_to_id(token) is not None:
            return token
    backend.add_special_tokens([END_OF_TEXT])
    return END_OF_TEXT


def _infer_kind(backend: tokenizers.Tokenizer) -> str | None:
    """The kind of a tokenizer.json that `save` wrote but whose tokenizer_config.json is lost; None if not ours."""
    facts = json.loads(backend.to_str())
    vocabulary = facts["model"].get("vocab", {})
    if facts["added_tokens"] or END_OF_TEXT not in vocabulary:
        return None
    if facts["model"]["type"] == "WordLevel" and UNKNOWN in vocabulary:
        return "char"
    if facts["model"]["type"] == "BPE" and set(_SYMBOLS) <= set(vocabulary):
        return f"bpe:{len(vocabulary)}" if facts["model"]["merges"] else "byte"
    return None


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about _CHUNK characters that join to `text`."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + _CHUNK):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, [256]."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_SYMBOLS = _byte_symbols()
_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(_SYMBOLS)}
