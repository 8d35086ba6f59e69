import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from textdiffusion.errors import UserError
from textdiffusion.text import tokenizer as tokenizer_module
from textdiffusion.text.tokenizer import END_OF_TEXT, UNKNOWN, Tokenizer, build

DOCUMENTS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "naïve café — “quoted” 日本語 e\u0301\r\n\tthe end of the best of the times",
    "def f(x):\n    return x + 1\n" * 5,
    "the best of wisdom and the worst of naïve times; an age of quoted ends returns to the café",
]
TRICKY = [
    "",
    " ",
    "\n\n",
    "\r\n",
    "\0",
    "e\u0301",
    "👩‍👩‍👧",
    f"a{END_OF_TEXT}b",
    f"{UNKNOWN}{END_OF_TEXT}",
    "  two  spaces ",
    "\ufeff",
]
BUILT = {kind: build(kind, DOCUMENTS) for kind in ("char", "byte", "bpe:300")}
EXACT = ["byte", "bpe:300"]
relaxed = settings(deadline=None, database=None)  # the machine may be busy
texts = st.one_of(st.text(), st.text(alphabet=" \n\tthe.'é日<|endofx>"), st.sampled_from([*TRICKY, *DOCUMENTS]))


@pytest.fixture(params=BUILT)
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILT[request.param]


@pytest.mark.parametrize("kind", EXACT)
@relaxed
@given(text=texts)
@example(text=f"a{END_OF_TEXT}b")
@example(text="\0e\u0301\U0010ffff")
def test_every_text_comes_back_exactly(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == text.encode()


@pytest.mark.parametrize("kind", BUILT)
@relaxed
@given(text=texts)
def test_characters_of_the_tokens_add_up_to_the_length_of_the_text(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    assert tokenizer.characters[np.array(tokenizer.encode(text), int)].sum() == len(text)


@pytest.mark.parametrize("kind", BUILT)
@relaxed
@given(text=texts)
def test_array_batch_and_plain_encoding_agree(kind: str, text: str) -> None:
    tokenizer = BUILT[kind]
    array = tokenizer.encode_array(text)
    assert array.dtype == np.uint16
    assert array.tolist() == tokenizer.encode(text) == tokenizer.encode_documents(["other", text])[1]


@relaxed
@given(text=st.text(alphabet=" \n\t\x1c\u3000aé'.1s", max_size=60))
def test_cutting_long_text_changes_no_tokens(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_CHUNK", 3)
        chunks = list(tokenizer_module._chunks(text))
        ids = BUILT["bpe:300"].encode_array(text).tolist()
    assert "".join(chunks) == text
    assert ids == BUILT["bpe:300"].encode(text)


def test_long_text_is_cut() -> None:
    text = " ".join(DOCUMENTS) * 200
    assert len(list(tokenizer_module._chunks(text))) > 2
    assert BUILT["bpe:300"].encode_array(text).tolist() == BUILT["bpe:300"].encode(text)


def test_vocabulary_sizes() -> None:
    symbols = set("".join(DOCUMENTS))
    assert BUILT["char"].vocabulary == len(symbols) + 2
    assert BUILT["byte"].vocabulary == 257
    assert BUILT["bpe:300"].vocabulary == 300
    assert len(BUILT["bpe:300"].encode(DOCUMENTS[0])) < len(DOCUMENTS[0]) / 1.5
    assert BUILT["byte"].encode("é") == list("é".encode())


def test_the_symbols_of_a_byte_level_vocabulary_are_those_of_the_library() -> None:
    symbols = tokenizer_module._SYMBOLS
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "\0 a~\x7f\xa0\xad":
        assert byte_level.pre_tokenize_str(character)[0][0] == "".join(symbols[b] for b in character.encode())


def test_every_id_has_a_piece_a_size_and_bytes(any_kind: Tokenizer) -> None:
    pieces, sizes, raw = any_kind.pieces(), any_kind.characters, any_kind.token_bytes()
    assert len(pieces) == len(sizes) == len(raw) == any_kind.vocabulary
    assert pieces[any_kind.end_of_text] == END_OF_TEXT
    assert raw[any_kind.end_of_text] == b"" and sizes[any_kind.end_of_text] == 1
    assert all(pieces)


def test_pieces_show_incomplete_characters_as_escapes() -> None:
    assert BUILT["byte"].pieces()[0xE9] == "\\xe9"
    assert BUILT["byte"].characters[0xE9] == 1 and BUILT["byte"].characters[0xA9] == 0
    assert BUILT["byte"].pieces()[ord("a")] == "a"


@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.tensor, lambda ids: iter(map(np.int32, ids))])
def test_decode_takes_any_integers(any_kind: Tokenizer, wrap) -> None:
    ids = any_kind.encode("the end")
    assert any_kind.decode(wrap(ids)) == "the end"


def test_decode_shows_end_of_text_and_what_cannot_be_shown(any_kind: Tokenizer) -> None:
    a, b = any_kind.encode("a"), any_kind.encode("b")
    ids = [*a, any_kind.end_of_text, *b]
    assert any_kind.decode(ids) == "a\n\nb"
    assert any_kind.decode(ids, end_of_text="") == "ab"
    assert any_kind.decode([any_kind.end_of_text] * 2, end_of_text="|") == "||"
    assert any_kind.decode([*a, any_kind.vocabulary, *b, -1]) == "a\ufffdb\ufffd"
    assert any_kind.decode([]) == ""


def test_half_a_character_is_shown_as_a_replacement() -> None:
    byte = BUILT["byte"]
    assert byte.decode([0xC3, byte.end_of_text, 0xA9], end_of_text="") == "\ufffd\ufffd"


def test_char_maps_unseen_symbols_to_unknown() -> None:
    char = BUILT["char"]
    text = "a€b€\U0001f600<"
    unknown = char.unknown
    assert char.encode(text) == [*char.encode("a"), unknown, *char.encode("b"), unknown, unknown, unknown]
    assert char.decode(char.encode(text)) == "a\ufffdb\ufffd\ufffd\ufffd"
    assert char.unseen(text) == "€\U0001f600<"
    assert char.unseen("".join(DOCUMENTS)) == ""
    assert BUILT["byte"].unseen("€") == "" and BUILT["byte"].unknown is None


def test_describe_is_one_line_that_says_what_becomes_of_unseen_symbols(any_kind: Tokenizer) -> None:
    line = any_kind.describe()
    assert "\n" not in line and str(any_kind.vocabulary) in line and any_kind.kind in line
    assert (UNKNOWN in line and "byte or bpe:N" in line) == (any_kind.kind == "char")


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("keep_config", [True, False])
def test_save_and_load(any_kind: Tokenizer, tmp_path: Path, as_file: bool, keep_config: bool) -> None:
    path = tmp_path / "made" / "here"
    path = path / "tokenizer.json" if as_file else path
    any_kind.save(path)
    folder = tmp_path / "made" / "here"
    assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == END_OF_TEXT and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ("unk_token" in config) == (any_kind.kind == "char")
    if not keep_config:
        (folder / "tokenizer_config.json").unlink()
    for again in (Tokenizer.load(path), build(f"hf:{path}", [])):
        assert again.to_json() == any_kind.to_json()
        assert (again.kind, again.vocabulary) == (any_kind.kind, any_kind.vocabulary)
        assert (again.end_of_text, again.unknown) == (any_kind.end_of_text, any_kind.unknown)
        text = f"the end {END_OF_TEXT} é\n"
        assert again.encode_array(text).tolist() == any_kind.encode(text)


def test_the_file_is_readable_by_the_plain_library(any_kind: Tokenizer, tmp_path: Path) -> None:
    any_kind.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("the end").ids == any_kind.encode("the end")
    assert plain.decode(any_kind.encode("the end")) == "the end"


def test_building_twice_gives_the_same_tokenizer() -> None:
    for kind, tokenizer in BUILT.items():
        assert build(kind, iter(DOCUMENTS)).to_json() == tokenizer.to_json()


def test_bpe_of_too_little_text_has_fewer_tokens_and_is_still_exact() -> None:
    tokenizer = build("bpe:1000", ["ab"])
    assert tokenizer.vocabulary == 257
    assert tokenizer.decode(tokenizer.encode("é ab")) == "é ab"


@pytest.mark.parametrize("kind", ["word", "bpe", "bpe:", "bpe:x", "bpe:-5", "hf:", "byte:3", ""])
def test_an_unknown_kind_names_the_kinds(kind: str) -> None:
    with pytest.raises(UserError, match=r"char, byte, bpe:N .* hf:NAME"):
        build(kind, DOCUMENTS)


def test_bpe_must_have_room_for_the_bytes() -> None:
    with pytest.raises(UserError, match="bpe:257 is too small"):
        build("bpe:257", DOCUMENTS)
    assert build("bpe:258", DOCUMENTS).vocabulary == 258


def test_char_needs_text() -> None:
    with pytest.raises(UserError, match="no text"):
        build("char", [""])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json"):
        Tokenizer.load(broken)


def test_a_download_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(tokenizer_module.tokenizers, "Tokenizer", Offline)
    with pytest.raises(UserError) as caught:
        build("hf:somebody/model", [])
    assert "hf:somebody/model" in str(caught.value) and "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_downloaded_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tokenizers.Tokenizer.from_str(BUILT["bpe:300"].to_json())

    class Online:
        @staticmethod
        def from_pretrained(name: str) -> tokenizers.Tokenizer:
            return backend

    monkeypatch.setattr(tokenizer_module.tokenizers, "Tokenizer", Online)
    fetched = build("hf:somebody/model", [])
    assert fetched.kind == "hf:somebody/model" and fetched.end_of_text == 299
    assert fetched.decode(fetched.encode("日本 the")) == "日本 the"


def gpt2_like() -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose end-of-text is a registered special token, with truncation and a template."""
    backend = tokenizers.Tokenizer.from_str(BUILT["bpe:300"].to_json())
    backend.add_special_tokens([END_OF_TEXT, "<｜pad｜>"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, backend.token_to_id(END_OF_TEXT))]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    return backend


def test_hugging_face_byte_level(tmp_path: Path) -> None:
    gpt2_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = build(f"hf:{tmp_path}", [])
    assert tokenizer.kind == f"hf:{tmp_path}" and tokenizer.pieces()[tokenizer.end_of_text] == END_OF_TEXT
    for text in (*TRICKY, *DOCUMENTS):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_array(text).tolist() == ids == tokenizer.encode_documents([text])[0]
        assert tokenizer.characters[np.array(ids, int)].sum() == len(text)
    assert tokenizer.token_bytes()[300] == "<｜pad｜>".encode()
    assert END_OF_TEXT in tokenizer.describe()
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").kind == tokenizer.kind


def test_hugging_face_word_piece(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "he": 2, "##llo": 3, "wörld": 4, "high": 6}  # id 5 is skipped
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.end_of_text) == (7, 1)
    assert tokenizer.token_bytes()[2:7] == [b" he", b"llo", " wörld".encode(), b"", b" high"]
    assert tokenizer.characters.tolist()[1:6] == [1, 3, 3, 6, 0]
    assert tokenizer.decode([2, 3, 4, 1, 6]) == "hello wörld\n\nhigh"


def test_hugging_face_sentence_piece_without_an_end_gets_one(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁a": 2, "▁": 3, "a": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.end_of_text) == (6, 5)
    assert tokenizer.token_bytes() == [b"<unk>", b"\n", b" a", b" ", b"a", b""]
    assert tokenizer.decode([*tokenizer.encode("a aa\na"), 5]) == "a aa\na\n\n"


@pytest.mark.parametrize("named", ["<stop>", {"content": "<stop>"}])
def test_the_end_of_text_named_by_the_config_comes_first(tmp_path: Path, named) -> None:
    backend = gpt2_like()
    backend.add_special_tokens(["<stop>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).pieces()[Tokenizer.load(tmp_path).end_of_text] == END_OF_TEXT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert Tokenizer.load(tmp_path).end_of_text == backend.token_to_id("<stop>")


def test_ids_of_a_large_vocabulary_get_a_wider_type() -> None:
    many = "".join(map(chr, range(0x10000, 0x10000 + 65_600)))
    tokenizer = build("char", [many])
    assert tokenizer.dtype == np.uint32
    assert tokenizer.encode_array(many[-3:]).tolist() == [65_597, 65_598, 65_599]
