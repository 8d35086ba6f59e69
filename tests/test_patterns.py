"""Patterns and their automata: against Python's `re`, and sums over texts against listing them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textdiffusion.errors import UserError
from textdiffusion.mathematics.automaton import Automaton
from textdiffusion.text.patterns import SEPARATORS, Pattern, acrostic, expression, made_of
from textdiffusion.text.tokenizer import build

TEXT = "ab\n. é日don't the Cat12\U0001f600"
TOKENIZERS = {kind: build(kind, [TEXT * 9]) for kind in ("char", "byte", "bpe:280")}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

atoms = st.sampled_from(
    ["a", "b", "é", "日", r"\.", ".", r"\n", "[ab]", "[^a]", r"[^\n]", r"\w", r"\s", "[a-é]", "(ab|日)"]
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(lambda x: f"(?:{x[0]}){x[1]}"),
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
    ),
    max_leaves=6,
)
texts = st.text(alphabet="ab\n. é日\U0001f600", max_size=6)


def accepts(automaton, text: str) -> bool:
    state = 0
    for byte in text.encode():
        state = automaton.step[state, byte]
    return bool(automaton.accepts[state])


@FEW
@given(expressions, st.lists(texts, min_size=1, max_size=20))
def test_an_expression_means_what_it_means_in_python(pattern, some):
    automaton = expression(pattern)
    for text in some:
        assert accepts(automaton, text) == bool(re.fullmatch(pattern, text, re.ASCII)), (pattern, text)
    # What is no UTF-8 is no text.
    for wrong in (b"\xc3", b"\xa9", b"\xe6\x97", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"):
        state = 0
        for byte in wrong:
            state = automaton.step[state, byte]
        assert not automaton.accepts[state]


@FEW
@given(st.data())
def test_tokens_walk_by_their_text_and_lengths_are_those_that_there_are(data):
    pattern = data.draw(expressions)
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(sorted(TOKENIZERS)))]
    automaton = Pattern(regex=pattern).automaton(tokenizer)
    rows = np.array(data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocabulary - 1), min_size=4, max_size=4),
                                       min_size=1, max_size=20)))  # fmt: skip
    for row, found in zip(rows, automaton.matches(rows), strict=True):
        text = tokenizer.decode(row)
        assert found == (tokenizer.unknown not in row and "�" not in text
                         and bool(re.fullmatch(pattern, text, re.ASCII)))  # fmt: skip
    # Lengths by walking sets of states.
    now = {0}
    for n in range(5):
        assert (n in automaton.lengths(5)) == any(automaton.accepts[q] for q in now)
        now = {int(q) for state in now for q in np.unique(automaton.step[state])} - {len(automaton)}


@pytest.mark.parametrize("pattern", ["[ab]*a", "(a|b)*ab.{1,2}", "(ab)*|b+", "[^a]+", "a.*"])
def test_sums_and_draws_are_those_of_the_listed_texts(pattern):
    """Drafted, given and open positions; also far below what float64 holds."""
    pieces = [b"a", b"b", b"c"]
    automaton, length, rng = Automaton(expression(pattern), pieces), 4, np.random.default_rng(0)
    drafted = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    tokens = np.array([[-1, -1, -1, -1], [-1, -1, 1, -1], [-1, -1, 1, -1], [-1, -1, -1, -1]])
    log_p = np.log(rng.dirichlet(np.ones(3), size=drafted.sum()))
    place = np.cumsum(drafted).reshape(drafted.shape) - 1
    for scale in (1.0, 400.0):
        mass = [dict[tuple[int, ...], list[float]]() for _ in drafted]
        for row, text in itertools.product(range(len(drafted)), itertools.product(range(3), repeat=length)):
            agrees = all(t < 0 or v == t for v, t in zip(text, tokens[row], strict=True))
            if agrees and automaton.accepts[automaton.walk(np.array(text))]:
                key = tuple(v for v, yes in zip(text, drafted[row], strict=True) if yes)
                mass[row][key] = scale * sum(log_p[place[row, i], text[i]] for i in range(length) if drafted[row, i])
        want = np.array([np.logaddexp.reduce([*m.values()]) if m else -np.inf for m in mass])
        got = automaton.log_chance(scale * log_p, drafted, tokens)
        assert np.allclose(got, want, atol=1e-9, rtol=1e-9), (scale, got, want)
        # A draw: sets of tokens, within which each position is drawn on its own.
        draws, counts = 600, [dict[tuple[int, ...], float]() for _ in drafted]
        for _ in range(draws if scale == 1 else 20):
            _, sets = automaton.draw(scale * log_p, drafted, tokens, rng.random(drafted.shape))
            for row, m in enumerate(mass):
                allowed = sets[place[row][drafted[row]]]
                inside = {k: x for k, x in m.items() if all(s[v] for s, v in zip(allowed, k, strict=True))}
                assert bool(inside) == bool(m)
                total = np.logaddexp.reduce([*inside.values()]) if inside else 0.0
                for k, x in inside.items():
                    counts[row][k] = counts[row].get(k, 0.0) + np.exp(x - total)
        if scale == 1:
            for m, count, z in zip(mass, counts, want, strict=True):
                for k, x in m.items():
                    p = float(np.exp(x - z))
                    assert abs(count.get(k, 0.0) / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5 + 1e-9, (pattern, k)


def test_what_is_contained_listed_and_begun_with():
    contains = Pattern(must_contain=("a.b", "é")).automaton(TOKENIZERS["char"])
    for text, yes in (("a.b é", True), ("é\na.b", True), ("aab é", False), ("a.b", False)):
        assert bool(contains.matches(np.array([TOKENIZERS["char"].encode(text)]))[0]) is yes, text
    words = made_of(["the", "cat", "don't", "日"])
    for text, yes in (("The cat, don't!", True), ("the  cat\n", True), ("tHe cat", False), ("thecat", False),
                      ("dont", False), ("don", False), ("日 12 the", True), ("", True), ("the'cat", True)):  # fmt: skip
        assert accepts(words, text) is yes, text
    lines = acrostic("ab")
    for text, yes in (("an\nBe", True), ("A\nb", True), ("an\n\nbe", False), ("an be", False), ("ab\nba\n", False)):
        assert accepts(lines, text) is yes, text
    assert " " in SEPARATORS and not any(c.isalpha() for c in SEPARATORS)
    both = expression("[ab]+") & expression(".{3}") & expression(".*bb.*")
    found = ["".join(t) for n in range(5) for t in itertools.product("ab", repeat=n) if accepts(both, "".join(t))]
    assert found == ["abb", "bba", "bbb"] and len(both.step) == 6 + 1
    empty = expression("a+") & expression("b+")
    assert not empty.accepts.any()


def test_anchors_at_the_ends_say_nothing_new():
    for pattern, same in (("^ab*$", "ab*"), (r"a\$", r"a\$"), (r"^a\\$", r"a\\"), ("a[$]", "a[$]")):
        one, other = expression(pattern), expression(same)
        assert np.array_equal(one.step, other.step) and np.array_equal(one.accepts, other.accepts), pattern


@pytest.mark.parametrize(
    "pattern, why",
    [("(a", "not a regular expression"), ("a**", "not a regular expression"), (r"(a)\1", "cannot be kept"),
     ("(?=a)a", "cannot be kept"), ("(?<!a)b", "cannot be kept"), ("a^b", "cannot be kept"),
     (r"\bab", "cannot be kept"), ("a++b", "cannot be kept"), ("[]a]", "within a class"), ("(?>a)", "cannot be kept")],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_in_one_line(pattern, why):
    with pytest.raises(UserError, match=why) as caught:
        expression(pattern)
    assert "\n" not in str(caught.value)


def test_a_pattern_too_large_to_follow_is_refused(monkeypatch):
    monkeypatch.setattr("textdiffusion.text.patterns.LARGEST", 100)
    assert len(expression("a{1,90}").step) == 92
    for pattern in ("a{200}", ".{1,90}"):  # over characters; over their bytes
        with pytest.raises(UserError, match="at most 100"):
            expression(pattern)


def test_bad_words_and_tokenizers_are_refused(tmp_path):
    for words, why in ((tmp_path / "none.txt", "cannot read"), ([], "no words"), (["  "], "no words")):
        with pytest.raises(UserError, match=why):
            Pattern.of(words=words)
    (tmp_path / "words.txt").write_text("the cat, 'sat';\nwell-read 12th don't\n")
    assert Pattern.of(words=tmp_path / "words.txt").words == ("cat", "don't", "sat", "th", "the", "well-read")
    assert Pattern.of(must_contain="ΔΟΣ", words=["ΔΟΣΑ"]) and Pattern.of(
        must_contain="The Don't", words=["the", "don't"]
    )
    with pytest.raises(UserError, match="no word of --words has 'Cats' in it"):
        Pattern.of(must_contain=("the well", "12 Cats!"), words=tmp_path / "words.txt")
    assert Pattern.of(must_contain=("he cat", "don"), words=tmp_path / "words.txt").must_contain == ("he cat", "don")
    with pytest.raises(UserError, match="letters alone"):
        acrostic("a b")
    with pytest.raises(UserError, match="no text to contain"):
        Pattern(must_contain=("",)).automaton(TOKENIZERS["char"])
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    from textdiffusion.text.tokenizer import Tokenizer

    pieces = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "<|endoftext|>": 3}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="changes texts"):
        Pattern(regex="a").automaton(Tokenizer(pieces, "hf:pieces"))
