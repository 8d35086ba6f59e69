import json
import re
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textdiffusion.errors import UserError
from textdiffusion.text import data
from textdiffusion.text.data import (
    Corpus,
    DataConfig,
    load_corpus,
    tokenize,
    word_set,
)
from textdiffusion.text.tokenizer import Tokenizer, build
from textdiffusion.text.windows import TokenRuns, Windows, evaluation_windows

DOCUMENTS = [f"Document number {i}: " + "ab cd é " * (i % 7 + 1) for i in range(200)]
relaxed = settings(deadline=None, database=None)  # the machine may be busy


def load(source: object, **settings: object) -> Corpus:
    return load_corpus(DataConfig(source=str(source), **settings))


def refusal(source: object, **settings: object) -> str:
    """The message of the UserError that loading raises; always one line."""
    with pytest.raises(UserError) as caught:
        load(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interleaved(corpus: Corpus) -> str:
    """The text a split by position was made from: training pieces with the held-out blocks between them."""
    assert len(corpus.train) == len(corpus.validation) + 1
    return "".join(t + v for t, v in zip(corpus.train, [*corpus.validation, ""]))


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def write_csv(path: Path, documents: list[str]) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([1, text] for text in documents)])
    return path


def write_parquet(path: Path, documents: list[str | None]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": list(range(len(documents))), "text": documents}), path)
    return path


def runs_of(*sizes: int) -> TokenRuns:
    """Runs of these sizes whose tokens are their own positions, so that a window shows where it is from."""
    edges = np.cumsum([0, *sizes])
    return TokenRuns(np.arange(edges[-1], dtype=np.uint32), edges, int(edges[-1]))


# Sources


def test_the_built_in_corpus() -> None:
    corpus = load("pydoc")
    assert corpus.has_documents and corpus.test == [] and "PSF" in corpus.provenance
    size = sum(map(len, corpus.train + corpus.validation))
    assert size > 200_000 and len(corpus.validation) >= 3
    assert load("pydoc") == corpus


def test_the_built_in_corpus_holds_no_paragraph_twice() -> None:
    corpus = load("pydoc")
    paragraphs = [p for text in corpus.train + corpus.validation for p in re.split(r"\n{2,}", text)]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_a_text_file_is_one_text_without_documents(tmp_path: Path) -> None:
    text = "".join(DOCUMENTS)
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = load(path)
    assert not corpus.has_documents and interleaved(corpus) == text


@pytest.mark.parametrize(
    ("name", "write"), [("a.jsonl", write_jsonl), ("a.csv", write_csv), ("a.parquet", write_parquet)]
)
def test_each_record_is_a_document(tmp_path: Path, name: str, write) -> None:
    awkward = ['quotes " and, commas', "line\nbreak \u2028 and\r\nmore", "x" * 200_000]
    corpus = load(write(tmp_path / name, [*DOCUMENTS, *awkward]))
    assert corpus.has_documents
    assert sorted(corpus.train + corpus.validation) == sorted([*DOCUMENTS, *awkward])


def test_blank_lines_nulls_and_empty_texts_are_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "", " \n"])
    path.write_text(path.read_text() + '\n\n{"text": null}\n')
    corpus = load(path)
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)
    corpus = load(write_parquet(tmp_path / "a.parquet", [*DOCUMENTS, None]))
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "%s \\ud800! \\ud83d\\ude00"}' % ("word " * 50))
    assert interleaved(load(path)) == "word " * 50 + " \ufffd! \U0001f600"


def test_another_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, field="body")
    assert len(load(path, text_field="body").train) > 100


def test_a_folder_and_a_glob_read_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS[:30]):
        (tmp_path / ("deep/er" if number % 2 else "") / f"{number}.TXT").write_text(text, encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "empty.txt").write_text("")
    write_jsonl(tmp_path / "more.jsonl", DOCUMENTS[30:40])
    corpus = load(tmp_path)
    assert corpus.has_documents
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS[:40])
    deep = load(tmp_path / "**" / "*[13579].TXT")
    assert not deep.has_documents
    in_order = sorted(range(1, 30, 2), key=lambda number: f"{number}.TXT")
    assert interleaved(deep) == "\n\n".join(DOCUMENTS[number] for number in in_order)


def test_whitespace_is_normalised_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\ttwo\u3000three  four\n" * 20)
    assert interleaved(load(path)) == "one\n\n\ttwo\u3000three  four\n" * 20
    assert interleaved(load(path, normalise_whitespace=True)) == "one two three four " * 20


@pytest.mark.parametrize("name", ["text8", "enwik8.txt"])
def test_the_standard_files_get_their_standard_split(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(data, "STANDARD_BYTES", 1000)
    text = "a" * 899 + "é" + "b" * 48 + "日" + "c" * 48
    (tmp_path / name).write_bytes(text.encode())
    corpus = load(tmp_path / name)
    assert (corpus.train, corpus.validation, corpus.test) == (["a" * 899], ["é" + "b" * 48], ["日" + "c" * 48])
    assert not corpus.has_documents
    (tmp_path / name).write_bytes(text.encode() + b".")
    assert load(tmp_path / name).test == []
    (tmp_path / "other.txt").write_bytes(text.encode())
    assert load(tmp_path / "other.txt").test == []


def test_the_hub(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, split, streaming))
        return [{"text": text} for text in DOCUMENTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load("hf:some/stories").train) > 100
    assert load("hf:some/stories:test").has_documents
    assert asked == [("some/stories", "train", True), ("some/stories", "test", True)]
    assert "no text_field 'body'; its fields are: text" in refusal("hf:some/stories", text_field="body")


def test_the_hub_without_its_package_or_network(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'textdiffusion[data]'" in refusal("hf:some/stories")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    message = refusal("hf:some/stories")
    assert "hf:some/stories" in message and "no route to host" in message


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("header.csv", b"id,text\n", "is empty"),
        ("zero.txt", b"abc\0def", "byte 3"),
        ("latin.txt", "caf\u00e9 au lait".encode("latin-1"), "position 3"),
        ("utf16.txt", "abc".encode("utf-16-le"), "byte 1"),
        ("latin.csv", "text\ncaf\u00e9".encode("latin-1"), "position 8"),
        ("not.jsonl", b'{"text": "a"}\n{"text": \n', "record 2"),
        ("list.jsonl", b"[1, 2]\n", "its fields are: none"),
        ("other.jsonl", b'{"body": "a", "title": "b"}\n', "its fields are: body, title"),
        ("other.csv", b"body,title\na,b,c\n", "its fields are: body, title"),
        ("number.jsonl", b'{"text": 3}\n', "is a int, not text"),
        ("not.parquet", b"PAR1 but not really", "cannot be read"),
        ("x.txt", b"x", "has only 1 characters"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message and expected in message
    (tmp_path / "good.txt").write_text("some text " * 100)
    if "empty" not in expected and "characters" not in expected:
        assert name in refusal(tmp_path)


def test_a_parquet_file_without_the_field_names_its_fields(tmp_path: Path) -> None:
    message = refusal(write_parquet(tmp_path / "a.parquet", ["x"]), text_field="body")
    assert "a.parquet" in message and "its fields are: id, text" in message


def test_a_missing_path_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("text")
    message = refusal(tmp_path / "shakespere.txt")
    assert str(tmp_path / "shakespere.txt") in message and "did you mean shakespeare.txt?" in message
    assert "did you mean" not in refusal(tmp_path / "zzz")
    assert str(tmp_path / "no" / "such.txt") in refusal(tmp_path / "no" / "such.txt")
    assert "did you mean pydoc?" in refusal("pydocs")


def test_folders_and_globs_without_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    assert str(tmp_path) in refusal(tmp_path) and ".parquet" in refusal(tmp_path)
    assert "*.txt matches no file" in refusal(tmp_path / "*.txt")


def test_pyarrow_missing(tmp_path: Path, monkeypatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'textdiffusion[data]'" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_the_validation_share_must_be_a_share(share: float) -> None:
    assert str(share) in refusal("pydoc", validation_share=share)


# Splits


@relaxed
@given(st.text(min_size=3, max_size=20_000), st.floats(0.001, 0.999))
def test_a_split_by_position_loses_nothing(text: str, share: float) -> None:
    train, validation = data._split_by_position(text, share)
    assert all(validation)
    assert sorted("".join(train + validation)) == sorted(text)


@pytest.mark.parametrize(("size", "share", "blocks"), [(100_000, 0.1, 10), (300, 0.1, 1), (40_000, 0.05, 4)])
def test_held_out_blocks_are_evenly_spaced(tmp_path: Path, size: int, share: float, blocks: int) -> None:
    text = np.random.default_rng(0).integers(97, 123, size, np.uint8).tobytes().decode()
    (tmp_path / "a.txt").write_text(text)
    corpus = load(tmp_path / "a.txt", validation_share=share)
    assert interleaved(corpus) == text
    assert len(corpus.validation) == blocks
    assert sum(map(len, corpus.validation)) == pytest.approx(size * share, rel=0.01)
    inner = [len(piece) for piece in corpus.train[1:-1]]
    assert not inner or max(inner) - min(inner) <= 2


def test_a_split_by_document_is_complete_and_stable(tmp_path: Path) -> None:
    corpus = load(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), validation_share=0.2)
    assert sorted(corpus.train + corpus.validation) == sorted(DOCUMENTS)
    assert 0.1 < len(corpus.validation) / len(DOCUMENTS) < 0.3
    changed = [*DOCUMENTS[::-1], "a new one", *DOCUMENTS[:50]]
    again = load(write_jsonl(tmp_path / "b.jsonl", changed), validation_share=0.2)
    assert set(again.train) - {"a new one"} == set(corpus.train)
    assert set(again.validation) - {"a new one"} == set(corpus.validation)
    assert len(again.train + again.validation) == len(changed)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_by_document_is_empty(tmp_path: Path, share: float) -> None:
    corpus = load(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:20]), validation_share=share)
    assert corpus.has_documents
    assert sorted([len(corpus.train), len(corpus.validation)]) == [1, 19]


def test_few_different_documents_are_split_by_position(tmp_path: Path) -> None:
    documents = DOCUMENTS[:19] * 3
    corpus = load(write_jsonl(tmp_path / "a.jsonl", documents))
    assert not corpus.has_documents and interleaved(corpus) == "\n\n".join(documents)


def test_words_are_those_of_the_training_text() -> None:
    corpus = Corpus("x", ["Don't STOP, élan 42 x_y", "stop"], ["unseen"])
    assert word_set(corpus) == {"don't", "stop", "élan", "x", "y"}


# Tokens


@pytest.fixture(params=["char", "byte", "bpe:300"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return build(request.param, DOCUMENTS)


def test_documents_become_one_run_each_followed_by_end_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runs = tokenize(Corpus("x", DOCUMENTS[:5], DOCUMENTS[5:7], [], True), tokenizer, tmp_path)
    assert list(runs) == ["train", "validation"]
    train = runs["train"]
    expected = [i for text in DOCUMENTS[:5] for i in (*tokenizer.encode(text), tokenizer.end_of_text)]
    assert train.tokens.tolist() == expected and train.runs.tolist() == [0, len(expected)]
    assert train.tokens.dtype == np.uint16
    assert train.characters == tokenizer.characters[train.tokens].sum()


def test_pieces_of_a_text_are_a_run_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runs = tokenize(Corpus("x", DOCUMENTS[:5], DOCUMENTS[5:7], DOCUMENTS[8:9]), tokenizer, tmp_path)
    assert list(runs) == ["train", "validation", "test"]
    for name, texts in (("train", DOCUMENTS[:5]), ("validation", DOCUMENTS[5:7]), ("test", DOCUMENTS[8:9])):
        part = runs[name]
        assert [tokenizer.decode(part.tokens[a:b]) for a, b in pairwise(part.runs)] == texts
        assert tokenizer.end_of_text not in part.tokens
        assert part.characters == sum(map(len, texts)) == tokenizer.characters[part.tokens].sum()


def same(one: TokenRuns, other: TokenRuns) -> bool:
    return (
        np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.runs, other.runs)
        and one.characters == other.characters
    )


def test_the_second_time_tokens_come_from_disk(tmp_path: Path, monkeypatch) -> None:
    corpus, byte = Corpus("x", DOCUMENTS[:5], DOCUMENTS[5:7]), build("byte", [])
    first = tokenize(corpus, byte, tmp_path)
    monkeypatch.setattr(data, "_encode", None)  # calling it would raise TypeError
    second = tokenize(corpus, byte, tmp_path)
    assert isinstance(second["train"].tokens, np.memmap)
    assert all(same(first[name], second[name]) for name in first)
    assert len(list(tmp_path.iterdir())) == 4  # tokens and runs of two splits, nothing left over


def test_other_text_or_another_tokenizer_gets_other_files(tmp_path: Path) -> None:
    byte, char = build("byte", []), build("char", ["abc"])
    variants = [
        (["ab", "c"], False, byte),
        (["a", "bc"], False, byte),
        (["ab", "c"], True, byte),
        (["ab", "c"], False, char),
        (["ab", "c"], False, build("char", ["abcd"])),
    ]
    assert len({data._cache_name(*variant) for variant in variants}) == len(variants)
    assert data._cache_name(["a"], False, byte) == data._cache_name(["a"], False, build("byte", []))


@pytest.mark.parametrize("runs_file", [False, True])
@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "flip", "delete"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str, runs_file: bool) -> None:
    corpus, byte = Corpus("x", DOCUMENTS[:5], []), build("byte", [])
    good = tokenize(corpus, byte, tmp_path)["train"]
    (file,) = (path for path in tmp_path.iterdir() if path.name.endswith(".runs.npy") == runs_file)
    content = file.read_bytes()
    position = len(content) - 12  # in the last run's edge or among the last tokens
    bad = {
        "truncate": content[:-3],
        "empty": b"",
        "garbage": b"not an array at all",
        "flip": content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :],
    }
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(bad[damage])
    assert same(tokenize(corpus, byte, tmp_path)["train"], good)
    assert file.read_bytes() == content


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEXTDIFFUSION_CACHE", str(tmp_path / "made"))
    tokenize(Corpus("x", ["abc"], []), build("byte", []))
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file.*TEXTDIFFUSION_CACHE"):
        tokenize(Corpus("x", ["abc"], []), build("byte", []), tmp_path / "file")


# Windows

sizes = st.lists(st.integers(0, 60), min_size=1, max_size=6)
lengths = st.integers(1, 12)


@relaxed
@given(sizes, lengths, st.integers(0, 5))
def test_windows_of_an_epoch_tile_the_runs(sizes: list[int], length: int, epoch: int) -> None:
    runs = runs_of(*sizes)
    if max(sizes) < length or sum(sizes) < 2 * length:
        with pytest.raises(UserError, match=f"only {sum(sizes)} characters; windows of {length} tokens"):
            Windows(runs, length, seed=0)
        return
    windows = Windows(runs, length, seed=0)
    rows = windows.rows(epoch * windows.per_epoch + np.arange(windows.per_epoch))
    assert rows.shape == (windows.per_epoch, length) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    assert len(np.unique(rows)) == rows.size
    run_of = np.searchsorted(runs.runs, rows, side="right")
    assert (run_of == run_of[:, :1]).all()
    # What an epoch leaves out is less than two windows a run.
    assert windows.per_epoch >= sum(max(size // length - 1, size >= length) for size in sizes)


def test_epochs_differ_in_tiling_and_order() -> None:
    windows = Windows(runs_of(1000), 10, seed=3)
    epochs = [windows.rows(e * windows.per_epoch + np.arange(windows.per_epoch)) for e in range(30)]
    assert len({rows[0, 0] % 10 for rows in epochs}) > 5
    assert all(rows[:, 0].tolist() != sorted(rows[:, 0]) for rows in epochs)
    assert len(np.unique(np.concatenate(epochs))) > 990
    assert not np.array_equal(Windows(runs_of(1000), 10, seed=4).rows(np.arange(99)), epochs[0])


def test_resuming_and_sharding_are_arithmetic() -> None:
    runs = runs_of(300, 5, 170)
    together = Windows(runs, 10, seed=1).rows(np.arange(1000, 1064))
    resumed = Windows(runs, 10, seed=1)
    assert resumed.per_epoch < 64  # so that the batch holds examples of several epochs
    for width in (1, 7, 16):
        slices = [resumed.rows(np.arange(start, min(start + width, 1064))) for start in range(1000, 1064, width)]
        assert np.array_equal(np.concatenate(slices), together)
    one_by_one = [Windows(runs, 10, seed=1).rows(np.array([example])) for example in range(1000, 1064)]
    assert np.array_equal(np.concatenate(one_by_one), together)
    backwards = resumed.rows(np.arange(1063, 999, -1))
    assert np.array_equal(backwards[::-1], together)
    assert resumed.rows(np.arange(0)).shape == (0, 10)


def test_windows_of_a_tokenized_corpus_are_read_from_disk(tmp_path: Path) -> None:
    byte = build("byte", [])
    for _ in range(2):
        runs = tokenize(Corpus("x", DOCUMENTS, [], [], True), byte, tmp_path)["train"]
    rows = Windows(runs, 32, seed=0).rows(np.arange(8))
    text = "\n\n".join(DOCUMENTS).encode() + b"\n\n"
    assert isinstance(runs.tokens, np.memmap)
    assert all(byte.decode(row).encode().strip(b"\xef\xbf\xbd") in text for row in rows)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed() -> None:
    tokens = np.zeros(100, np.uint16)
    with pytest.raises(UserError, match=r"only 250 characters; windows of 64 tokens need about 321;"):
        Windows(TokenRuns(tokens, np.array([0, 100]), 250), 64, seed=0)
    with pytest.raises(UserError, match=r"only 100 characters; windows of 60 tokens need about 121;"):
        Windows(TokenRuns(tokens, np.array([0, 50, 100])), 60, seed=0)
    assert Windows(TokenRuns(tokens, np.array([0, 100])), 50, seed=0).per_epoch == 1


@relaxed
@given(sizes, lengths)
def test_evaluation_windows_hold_every_token_once(sizes: list[int], length: int) -> None:
    runs = runs_of(*sizes)
    windows = evaluation_windows(runs, length)
    assert [token for window in windows for token in window] == list(range(sum(sizes)))
    assert all(window.dtype == np.int64 and 0 < len(window) <= length for window in windows)
    ends = set(runs.runs.tolist())
    assert all(len(window) == length or window[-1] + 1 in ends for window in windows)
    run_of = [set(np.searchsorted(runs.runs, window, side="right")) for window in windows]
    assert all(len(run) == 1 for run in run_of)


@relaxed
@given(sizes, lengths, st.integers(1, 200), st.integers(0, 3))
def test_a_limit_takes_some_of_the_windows(sizes: list[int], length: int, limit: int, seed: int) -> None:
    runs = runs_of(*sizes)
    every = [tuple(window) for window in evaluation_windows(runs, length)]
    some = [tuple(window) for window in evaluation_windows(runs, length, limit, seed)]
    assert some == [tuple(window) for window in evaluation_windows(runs, length, limit, seed)]
    assert set(some) <= set(every)
    assert len(some) == len(set(some)) == min(len(every), max(1, limit // length))


def test_a_limit_spreads_the_windows_evenly() -> None:
    starts = np.array([window[0] for window in evaluation_windows(runs_of(1000), 10, limit=100)])
    assert len(starts) == 10
    assert set(np.diff(starts)) == {100}
