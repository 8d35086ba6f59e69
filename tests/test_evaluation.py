"""The measuring itself: is the figure right, and is its error?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from textdiffusion.evaluation.measures import BITS, evaluate, text_statistics, whole_words
from textdiffusion.families import family
from textdiffusion.families.autoregressive import Autoregressive
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.verification import Subject
from textdiffusion.verification.enumeration import exact_curve

V, L = 3, 3
WORLD = random_table(V, L)
ONE = np.ones(V, dtype=np.int64)


class Steep:
    """A masked process that stands still: windows of symbol 0 cost 3 nats a hidden token, those of symbol 1 cost
    3 n / L, so that order in the text and number hidden must not be mixed up."""

    def __init__(self, length: int):
        self.real = Subject(Masked).ideal(WORLD)
        self.length, self.steps, self.remembers = length, self.real.steps, False

    def curve_point(self, x_0, hidden, noise):
        return torch.where(x_0[:, 0] == 0, torch.tensor(3.0), 3.0 * hidden / self.length).double()

    def curve_weights(self, length, calls, sampler=None):
        return self.real.curve_weights(length, calls, sampler)


@pytest.mark.parametrize("order", ["hard first", "easy first"])
@pytest.mark.parametrize("draws", [1, 2])
def test_the_estimate_does_not_depend_on_the_order_of_the_text(order, draws):
    length, half = 16, 400
    hard = [np.zeros(length, dtype=np.int64)] * half
    easy = [np.ones(length, dtype=np.int64)] * half
    windows = hard + easy if order == "hard first" else easy + hard
    truth = (3 + 3 * (length + 1) / (2 * length)) / 2
    report = evaluate(Steep(length), windows, ONE, draws=draws)
    assert abs(report.figure.bits_per_char / BITS - truth) < 4 * report.figure.standard_error / BITS < 0.3


def test_short_tails_and_few_windows_are_measured_without_bias():
    """Tails, and texts of a window or two, get few draws: their mean over many seeds must be right all the same."""
    length, tail = 16, 9
    process = Steep(length)
    x = [np.ones(length, dtype=np.int64), np.ones(tail, dtype=np.int64)]
    # curve(n) = 3 n / 16 in both.
    truth = (3 * (length + 1) / 2 + 3 * tail * (tail + 1) / 2 / length) / (length + tail)
    for draws in (1, 2, 5):
        figures = [evaluate(process, x, ONE, draws=draws, seed=s).figure.bits_per_char / BITS for s in range(400)]
        assert abs(np.mean(figures) - truth) < 4 * np.std(figures) / 20 + 1e-12


@pytest.mark.parametrize("windows", [10, 60, 200])
def test_the_standard_error_is_that_of_repeated_measurements(windows):
    """Over fresh windows and fresh noise the figures spread as the reported error says."""
    process = Subject(Masked).wrong(WORLD, 1)
    figures, errors = [], []
    for seed in range(150):
        x = list(WORLD.draw(windows, seed).numpy())
        figure = evaluate(process, x, ONE, seed=seed).figure
        figures.append(figure.bits_per_char)
        errors.append(figure.standard_error)
    assert 0.75 < np.mean(errors) / np.std(figures) < 1.35


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_figures_at_t_calls_agree_with_enumeration(calls):
    process = Subject(Masked).ideal(WORLD)
    x = WORLD.draw(3000, 0)
    curve = exact_curve(process, x).mean(0)
    for sampler in ("random", "ancestral"):
        report = evaluate(process, list(x.numpy()), ONE, calls=[calls], sampler=sampler, draws=2)
        exact = curve @ process.curve_weights(L, calls, sampler)[0] / L * BITS
        figure = report.by_calls[0]
        assert figure.calls == calls and figure.kind == "upper"
        assert abs(figure.bits_per_char - exact) < 4 * figure.standard_error


def test_the_exact_family_has_one_figure_and_no_noise():
    process = Subject(Autoregressive).ideal(WORLD)
    x = WORLD.draw(500, 0)
    report = evaluate(process, list(x.numpy()), ONE, calls=[1, 2], draws=3)
    assert report.by_calls == [] and report.figure.kind == "exact" and report.figure.calls == L
    nats = -WORLD.log_prob(x)
    assert abs(report.figure.bits_per_char - float(nats.mean()) / L * BITS) < 1e-9
    assert abs(report.figure.standard_error - float(nats.std()) / L * BITS / math.sqrt(500)) < 1e-9


def test_tails_and_tokens_of_several_characters():
    """A shorter last window counts by its own length, and characters are what is divided by."""

    def silent(x, positions=None, **_):
        out = torch.zeros(*x.shape, 4, dtype=torch.float64)
        return out if positions is None else out[positions]

    characters = np.array([1, 2, 3, 4])
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 4, 8) for _ in range(40)] + [rng.integers(0, 4, 5)]
    expected = 2 * (40 * 8 + 5) / sum(characters[w].sum() for w in windows)
    for cls in (Masked, Autoregressive):
        report = evaluate(cls(silent, cls.Config(), 4), windows, characters)
        assert abs(report.figure.bits_per_char - expected) < 1e-9
        assert report.tokens == 325 and report.windows == 41


def test_one_window_tells_nothing_of_its_error():
    process = Subject(Masked).ideal(WORLD)
    report = evaluate(process, [WORLD.texts[3].numpy()], ONE)
    assert report.figure.standard_error is None


def test_statistics_of_samples():
    assert whole_words("cut one two cut") == ["one", "two"]
    assert whole_words(" whole, don't ") == ["whole", "don't"]
    samples = [" the cat the cat sat. ", " a dog qqq ran. "]
    s = text_statistics(
        samples, {"the", "cat", "sat", "a", "dog", "ran"}, ["... the cat the cat sat. ..."], copy_length=8
    )
    assert s.words == 9 and s.valid_words == pytest.approx(8 / 9)
    assert s.distinct[1] == pytest.approx(7 / 9) and s.distinct[2] == pytest.approx(6 / 7)
    assert s.repetition[1] == pytest.approx(2 / 9) and s.repetition[2] == pytest.approx(1 / 7)
    p = np.array([2, 2, 1, 1, 1, 1, 1]) / 9
    assert s.entropy == pytest.approx(-(p * np.log2(p)).sum())
    whole, other = len(samples[0]) - 7, len(samples[1]) - 7
    assert s.copied == pytest.approx(whole / (whole + other))


def test_unknown_symbols_are_charged_so_that_the_figure_stays_a_likelihood():
    """Over all texts of one symbol the model's probabilities times the spelling price add up to one."""
    from textdiffusion.text.tokenizer import build

    tokenizer = build("char", ["abcab"])

    def model(x, positions=None, **_):
        out = (
            torch.randn(1, 1, tokenizer.vocabulary, generator=torch.Generator().manual_seed(0))
            .double()
            .expand(*x.shape, -1)
        )
        return out if positions is None else out[positions]

    process = Masked(model, MaskedConfig(), tokenizer.vocabulary)

    def nats(symbol: str) -> float:
        windows = [np.array(tokenizer.encode(symbol))] * 2
        figure = evaluate(process, windows, tokenizer.characters, tokenizer.spelling).figure
        return figure.bits_per_char / BITS

    others = 0x110000 - 0x800 - 3
    total = sum(math.exp(-nats(c)) for c in "abc") + others * math.exp(-nats("語"))
    end = float(model(torch.zeros(1, 1)).softmax(-1)[0, 0, tokenizer.end_of_text])
    assert total + end == pytest.approx(1)


def test_the_parts_of_a_drawn_bound_add_up_to_it():
    process = Subject(family("analog_bits")).wrong(WORLD, 0)
    windows, spelling = [WORLD.texts[k].numpy() for k in (3, 7, 20, 5)], np.array([0.0, 0.0, 0.5])
    report = evaluate(process, windows, ONE, spelling, calls=[3])
    x, noise = torch.from_numpy(np.stack(windows)), Noise(0, np.arange(4), 4, 0)
    for figure, calls in zip((report.figure, report.by_calls[0]), (None, 3), strict=True):
        nll = process.nll(x, noise, calls)
        for name in ("diffusion", "prior", "reconstruction"):
            assert figure.parts[name] == pytest.approx(float(getattr(nll, name).sum()) / x.numel() * BITS)
        assert figure.parts["spelling"] == pytest.approx(0.5 * int((x == 2).sum()) / x.numel() * BITS)
        assert sum(figure.parts.values()) == pytest.approx(figure.bits_per_char)
    assert evaluate(Subject(Masked).ideal(WORLD), windows, ONE).figure.parts is None
