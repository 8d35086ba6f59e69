"""The U-Net: exact at every length, skips that carry, what it costs, and runs that write any length."""

from __future__ import annotations

import json

import pytest
import torch

import textdiffusion as td
from textdiffusion.errors import UserError
from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig
from textdiffusion.networks.bodies import network_of
from textdiffusion.networks.shape import TransformerConfig
from textdiffusion.networks.unet import Convolve, UNet
from textdiffusion.presets import configure, shape
from textdiffusion.verification.reals import signal_call_bound, signal_law


def make(**fields) -> UNet:
    """A network with nothing at zero, in float64."""
    sizes = {
        "inputs": 3,
        "outputs": 5,
        "reals": True,
        "body": "unet",
        "window": 12,
        "depth": 2,
        "width": 16,
        "heads": 2,
    }
    torch.manual_seed(0)
    network = network_of(TransformerConfig(**sizes | fields)).eval().double()
    network.compute_dtype = torch.float64
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert isinstance(network, UNet)
    return network


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8, 9, 13])
def test_a_text_is_run_at_the_next_multiple_and_cut(length, levels, monkeypatch):
    """As with the text padded with anything to a length that can be halved, where no convolution sees the padding."""
    network, multiple = make(levels=levels, depth=4), 2**levels
    whole = -(-length // multiple) * multiple
    x = torch.randn(2, whole, 3, dtype=torch.float64)
    out, convolve = network(x[:, :length]), Convolve.forward

    def held(self, h):
        there = -(-length * h.shape[1] // whole)
        return convolve(self, torch.where((torch.arange(h.shape[1]) < there).view(1, -1, 1), h, torch.zeros_like(h)))

    monkeypatch.setattr(Convolve, "forward", held)
    assert torch.allclose(network(x)[:, :length], out, atol=1e-10)
    assert out.shape == (2, length, 5)


def test_convolutions_are_the_library_s():
    for taps, stride in ((3, 1), (4, 2)):
        convolve = Convolve(3, 4, taps, stride).double()
        x = torch.randn(2, 8, 3, dtype=torch.float64)
        kernel = convolve.map.weight.view(4, taps, 3).transpose(1, 2)
        plain = torch.nn.functional.conv1d(x.transpose(1, 2), kernel, stride=stride, padding=1)
        assert torch.allclose(convolve(x), plain.transpose(1, 2))


def test_a_shift_by_a_multiple_shifts_what_is_said():
    """Inside a long text, attention aside: by 4 exactly, and not by 1, which falls between pairs that are halved."""
    network = make()
    with torch.no_grad():
        network.blocks.whole.mix.weight.zero_()
    word = torch.randn(1, 6, 3, dtype=torch.float64)

    def said(at):
        x = torch.full((1, 160, 3), 0.3, dtype=torch.float64)
        x[:, at : at + 6] = word
        return network(x)[0]

    base = said(76).detach()
    assert torch.allclose(said(80)[54:114], base[50:110], atol=1e-10)
    assert not torch.allclose(said(77)[51:111], base[50:110], atol=1e-3)
    # The text's ends are out of reach of what is compared, and the word is not.
    assert float((base[50:110] - base[50]).abs().max()) > 0.1


def test_every_position_sees_all_and_asked_ones_are_as_all():
    network = make()
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    base = network(x)
    for j in range(11):
        changed = x.clone()
        changed[:, j] += 1
        assert bool(((network(changed) - base).abs().amax((0, 2)) > 1e-9).all())
    asked = torch.rand(2, 11) < 0.5
    assert torch.equal(network(x, positions=asked), base[asked])


def test_skips_carry_what_the_bottleneck_cannot():
    """With nothing coming up from below, each position is still told by its neighbourhood, and a gradient reaches the
    whole way down: by the skips, since none reaches what halves the text."""
    network = make(levels=1, depth=2)
    with torch.no_grad():
        network.blocks.grow[-1].map.weight.zero_()
    x = torch.randn(1, 24, 3, dtype=torch.float64, requires_grad=True)
    network(x)[0, 12].square().sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [8 <= i <= 16 for i in range(24)]  # two convolutions down, two up, one to each side
    assert all(bool((p.grad != 0).any()) for p in network.blocks.down.parameters())
    assert all(p.grad is None or not bool(p.grad.any()) for p in network.blocks.shrink.parameters())


@torch.no_grad()
def test_a_shape_costs_what_a_transformer_of_that_shape_costs():
    costs, products = {}, {"transformer": [], "unet": []}
    for body, seen in products.items():
        network = network_of(TransformerConfig(inputs=100, outputs=100, reals=True, body=body, **shape(3)))
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, x, out, to=seen: to.append(m.weight.numel() * out.shape[1]))
        network(torch.randn(2, 64, 100))
        costs[body] = sum(seen) / 64
        assert 0.98 < costs[body] / network.products <= 1, body  # what is told of a shape before it is trained
    assert 0.8 < costs["unet"] / costs["transformer"] < 1.25, costs


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("block", [], "needs network.body=transformer"),
        ("autoregressive", [], "needs network.body=transformer"),
        ("sparse_distribution", [], "needs network.body=transformer"),
        ("analog_bits", ["network.convolution=3"], "network.convolution is of the transformer"),
        ("analog_bits", ["network.positions=rotary"], "network.positions is of the transformer"),
        ("analog_bits", ["network.levels=0"], "network.levels must be from 1 to 8"),
        ("masked", ["network.ngrams=3"], "network.ngrams is of the transformer"),
    ],
)
def test_what_only_a_transformer_can_do_is_refused(family, settings, says):
    with pytest.raises(UserError, match=says):
        configure(family=family, steps=1, settings=["network.body=unet", *settings])


@pytest.mark.parametrize(("length", "calls"), [(1, 1), (1, 3), (2, 2)])
def test_the_bound_is_one_at_lengths_that_are_no_multiple(length, calls):
    """Texts of one and of two bits, enumerated: the law of what is sampled adds up to one, and the bound holds."""
    config = AnalogBitsConfig(schedule="cosine", self_conditioning=0.0)
    network = make(**AnalogBits.network_fields(config, 2), depth=1)
    with torch.no_grad():
        network.head.weight.mul_(3)
    process = AnalogBits(network, config, 2)
    texts = torch.cartesian_prod(*[torch.arange(2)] * length).view(-1, length)
    with torch.no_grad():
        bound = signal_call_bound(process, texts, calls, "ancestral")
        law = signal_law(process, length, calls, "ancestral")
    assert float(law.sum()) == pytest.approx(1, abs=1e-3) and float(law.std()) > 0.01
    assert float((-law.log() - bound).max()) < 2e-3


def test_a_run_writes_and_scores_texts_of_any_length(tmp_path):
    (tmp_path / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    td.train(
        tmp_path / "run", data=str(tmp_path / "my.txt"), family="analog_bits", length=10, steps=3, depth=1,
        settings=["network.body=unet", "network.width=16", "training.batch=2"],
    )  # fmt: skip
    assert json.loads((tmp_path / "run/config.json").read_text())["network"]["body"] == "unet"
    model = td.load(tmp_path / "run", "cpu", "fp32")
    assert isinstance(model.process.network, UNet) and not model.bounded
    for length in (1, 7, 10, 23):
        *_, last = model.stream(1, length, 2, seed=1)
        assert last.frame.tokens.shape == (1, length)
        assert model.score("It was a bright cold day"[:length], draws=2) > 0
    assert td.load(tmp_path / "run", "cpu", "fp32").sample(n=1, length=23, calls=2, seed=1) == last.texts
    assert model.infill("It was a ____ day in April, and the clocks", calls=2)[0].startswith("It was a ")
