"""The divergence frontier against closed forms and numerical integration."""

from __future__ import annotations

import numpy as np
import pytest

from textdiffusion.evaluation.divergence import divergence, frontier, frontier_integral, ngrams


def kl(p, r):
    return sum(a * np.log(a / b) for a, b in zip(p, r) if a > 0)


def test_the_integral_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    w, weight = np.polynomial.legendre.leggauss(400)
    w, weight = (w + 1) / 2, weight / 2
    for _ in range(5):
        p, q = generator.dirichlet(np.full(6, 0.4)), generator.dirichlet(np.full(6, 0.4))
        q[0] = 0.0
        q /= q.sum()
        direct = sum(
            2 * h * (a * kl(p, a * p + (1 - a) * q) + (1 - a) * kl(q, a * p + (1 - a) * q)) for a, h in zip(w, weight)
        )
        assert frontier_integral(p, q) == pytest.approx(direct, abs=1e-5)
        assert 0 < frontier_integral(p, q) < 1


def test_its_ends():
    p = np.array([0.25, 0.75, 0.0, 0.0])
    assert frontier_integral(p, p) == pytest.approx(0, abs=1e-12)
    assert frontier_integral(p, p[::-1]) == pytest.approx(1)  # nothing in common
    for gap in (1e-3, 1e-4):  # to second order, gap ** 2 * (1 / p_0 + 1 / p_1) / 6
        close = np.array([0.25 + gap, 0.75 - gap, 0, 0])
        assert frontier_integral(p, close) == pytest.approx(gap**2 * (4 + 4 / 3) / 6, rel=0.01)


def test_the_curve_of_laws_with_nothing_in_common():
    invented, missed = frontier(np.array([1.0, 0.0]), np.array([0.0, 1.0]), points=3)
    assert invented == pytest.approx(-np.log([0.25, 0.5, 0.75]))  # q's share of the mixture is 1 - w
    assert missed == pytest.approx(-np.log([0.75, 0.5, 0.25]))


def test_who_writes_half_of_what_there_is_misses_and_does_not_invent():
    invented, missed = frontier(np.full(4, 0.25), np.array([0.5, 0.5, 0.0, 0.0]))
    assert max(invented) < np.log(2)  # KL(q || p)
    assert missed[-1] > 1 > missed[0]  # without bound towards KL(p || q)


def test_texts_are_told_apart():
    text = [f"the cat sat on mat {i} and the dog ran to the {i}" for i in range(40)]
    like, unlike = text[1::2], ["the the the the the the the"] * 20
    near, far = divergence(like, text[::2]), divergence(unlike, text[::2])
    assert near.integral < 0.45 < 0.5 < far.integral < 1
    assert near.standard_error > 0 and far.standard_error == pytest.approx(0, abs=1e-9)  # one text, again and again
    assert divergence(like, like).integral == pytest.approx(0, abs=1e-9)
    assert divergence(like[:1], text).standard_error is None


def test_the_standard_error_is_that_over_new_texts_or_a_little_more():
    generator = np.random.default_rng(1)
    draw = lambda n: ["".join(generator.choice(list("ab "), 30, p=[0.6, 0.3, 0.1])) for _ in range(n)]  # noqa: E731
    reference = draw(400)
    found = [divergence(draw(12), reference) for _ in range(60)]
    spread = np.std([one.integral for one in found])
    assert 0.9 * spread < np.mean([one.standard_error for one in found]) < 1.8 * spread


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        divergence(["a"], ["abc"])
    assert ngrams("abab", 3) == {"aba": 1, "bab": 1}
