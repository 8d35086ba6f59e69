import pytest
import torch

from textdiffusion.errors import UserError
from textdiffusion.networks.attention import rotate
from textdiffusion.networks.convolution import Convolution
from textdiffusion.networks.ngrams import ROWS, Ngrams
from textdiffusion.networks.preceding import preceding
from textdiffusion.networks.transformer import Transformer, TransformerConfig

VARIANTS = [
    {},
    {"positions": "learned"},
    {"positions": "rotary"},
    {"convolution": 0},
    {"convolution": 3, "bias": True},
    {"classes": 3},
    {"time": True},
    {"ngrams": 4},
]


def make(**fields) -> Transformer:
    torch.manual_seed(0)
    config = {"inputs": 7, "outputs": 5, "window": 12, "depth": 2, "width": 16, "heads": 2} | fields
    network = Transformer(TransformerConfig(**config)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return network


def inputs(network: Transformer, rows: int = 3, length: int = 12) -> dict:
    more = {}
    if network.config.time:
        more["t"] = torch.rand(rows)
    if network.config.classes:
        more["condition"] = torch.tensor([0, 2, -1])
    return {"x": torch.randint(0, 7, (rows, length))} | more


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "block"])
def test_who_sees_whom(attention, fields):
    """The output at i changes with the input at j exactly where the attention says so."""
    network = make(attention=attention, block_length=4, **fields)
    given = inputs(network, rows=3)
    base = network(**given)
    for j in range(12):
        changed = given["x"].clone()
        changed[:, j] = (changed[:, j] + 1) % 7
        moved = (network(**given | {"x": changed}) - base).abs().amax((0, 2)) > 1e-7
        sees = {
            "bidirectional": lambda i: True,
            "causal": lambda i, j=j: i >= j,
            "block": lambda i, j=j: i // 4 >= j // 4,
        }
        assert moved.tolist() == [sees[attention](i) for i in range(12)]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_the_cache_changes_nothing(fields):
    network = make(attention="causal", **fields)
    given = inputs(network)
    whole = network(**given)
    x, more = given["x"], {k: v for k, v in given.items() if k != "x"}
    cache = network.empty_cache(3)
    at = torch.arange(5).expand(3, -1)
    out = [network(x[:, :5], cache=cache, at=at, **more)]
    for i in range(5, 12):
        out.append(network(x[:, i : i + 1], cache=cache, at=torch.full((3, 1), i), **more))
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5)
    rows = torch.tensor([2, 0])
    kept = cache.select(rows)
    assert torch.equal(kept.keys[1], cache.keys[1][rows])


def test_rows_at_different_positions_share_a_cache():
    network = make(attention="causal")
    x = torch.randint(0, 7, (2, 12))
    whole = network(x)
    cache = network.empty_cache(2)
    network(x[:, :8], cache=cache, at=torch.arange(8).expand(2, -1))
    # The second row goes back to position 5 and overwrites what was read ahead.
    at = torch.tensor([[8], [5]])
    out = network(x.gather(1, at), cache=cache, at=at)
    assert torch.allclose(out[0, 0], whole[0, 8], atol=1e-5)
    assert torch.allclose(out[1, 0], whole[1, 5], atol=1e-5)


def test_asked_positions_only():
    network = make()
    x = torch.randint(0, 7, (3, 12))
    asked = torch.rand(3, 12) < 0.4
    assert torch.allclose(network(x, positions=asked), network(x)[asked], atol=1e-6)


def test_an_untaught_network_says_nothing():
    torch.manual_seed(0)
    network = Transformer(TransformerConfig(inputs=7, outputs=5, window=12, width=16, heads=2))
    assert network(torch.randint(0, 7, (3, 12))).abs().max() == 0


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_bfloat16_is_near_float32(attention):
    network = make(attention=attention, width=64, heads=2)
    x = torch.randint(0, 7, (3, 12))
    exact = network(x)
    network.compute_dtype = torch.bfloat16
    assert network(x).dtype == torch.bfloat16
    assert (network(x).float() - exact).abs().max() < 0.06 * exact.abs().max()


def test_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = lambda i, j: (rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum()  # noqa: E731
    assert torch.allclose(at(3, 7), at(10, 14), atol=1e-5)
    assert not torch.allclose(at(3, 7), at(3, 8), atol=1e-3)


def test_refusals():
    with pytest.raises(UserError, match="no multiple"):
        TransformerConfig(inputs=2, outputs=2, width=30, heads=4)
    with pytest.raises(UserError, match="odd number"):
        TransformerConfig(inputs=2, outputs=2, convolution=4)
    with pytest.raises(UserError, match="at most 12 tokens"):
        make()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_the_convolution_and_its_written_out_gradient(causal, taps):
    convolution = Convolution(4, taps, 1 if causal else None).double()
    start = torch.randn(2, 7, 4, dtype=torch.float64)
    assert torch.equal(convolution(start), start)
    with torch.no_grad():
        convolution.weight.normal_()
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.functional.pad(x, (0, 0, convolution.left, taps - 1 - convolution.left))
    kernel = convolution.weight.T.unsqueeze(1)
    plain = torch.nn.functional.conv1d(padded.transpose(1, 2), kernel, groups=4).transpose(1, 2)
    assert torch.allclose(convolution(x), plain)
    assert torch.autograd.gradcheck(convolution, (x,))
    weight = convolution.weight.detach().clone().requires_grad_()
    both = [
        torch.autograd.grad(torch.func.functional_call(convolution, {"weight": weight}, x).sin().sum(), weight)[0],
        torch.autograd.grad(
            torch.nn.functional.conv1d(padded.transpose(1, 2), weight.T.unsqueeze(1), groups=4).transpose(1, 2)
            .sin().sum(), weight,
        )[0],
    ]  # fmt: skip
    assert torch.allclose(*both)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_gradients_add_up_in_bfloat16(attention):
    """Thousands of places of few symbols: each parameter's gradient is near that of float32."""
    torch.manual_seed(0)
    config = TransformerConfig(inputs=6, outputs=5, window=128, depth=2, width=64, heads=2, attention=attention)
    network = Transformer(config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = (torch.rand(32, 128) ** 4 * 6).long()
    target = torch.randint(0, 5, (32 * 128,))
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        network.compute_dtype = dtype
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(x).float().flatten(0, 1), target).backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for name, exact in grads[0].items():
        off = float((grads[1][name] - exact).norm() / exact.norm())
        assert off < 0.05, (name, off)


def test_times_by_position_mark_what_has_no_noise():
    network = make(time=True, clean=True)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, t = torch.randint(0, 5, (3, 8)), torch.tensor([0.3, 0.6, 0.9])
    everywhere = t.unsqueeze(-1).expand(3, 8)
    assert torch.allclose(network(x, t), network(x, everywhere))
    some = everywhere.clone()
    some[:, :4] = 0.0
    assert (network(x, t) - network(x, some)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [{}, {"convolution": 0, "ngrams": 3}, {"convolution": 0, "depth": 1}, {"convolution": 3}, {"classes": 3}],
    ids=str,
)
@pytest.mark.parametrize(("size", "length"), [(1, 12), (3, 12), (4, 12), (5, 12), (4, 10), (12, 12), (8, 5)])
def test_a_noisy_position_sees_its_block_and_the_clean_ones_before_it(fields, size, length):
    network = make(attention="block", block_length=size, positions="rotary", **fields)
    given = inputs(network, length=2 * length)
    base = network(**given, halves=True)
    for j in range(2 * length):
        changed = given["x"].clone()
        changed[:, j] = (changed[:, j] + 1) % 7
        moved = (network(**given | {"x": changed}, halves=True) - base).abs().amax((0, 2)) > 1e-7
        block = j % length // size
        noisy = [block == i // size if j < length else block < i // size for i in range(length)]
        clean = [j >= length and block <= i // size for i in range(length)]
        assert moved.tolist() == noisy + clean


def test_one_block_of_all_is_bidirectional():
    one = make(attention="block", block_length=12, positions="rotary")
    other = make(attention="bidirectional", positions="rotary")
    other.load_state_dict(one.state_dict())
    x = torch.randint(0, 7, (3, 24))
    assert torch.allclose(one(x, halves=True)[:, :12], other(x[:, :12]), atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"convolution": 0}, {"ngrams": 4}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_blocks_past_the_window_are_read_from_the_cache_exactly(fields, size):
    """Of 40 positions with a window of 12, block by block: as all in one pass, by a network whose window is longer but
    that sees as far."""
    network = make(attention="block", block_length=size, positions="rotary", **fields)
    longer = make(attention="block", block_length=size, positions="rotary", window=40, **fields)
    longer.load_state_dict(network.state_dict())
    x = torch.randint(0, 7, (2, 40))
    seen = longer._view

    def near(at, other, halves):
        longer.config.window = 12
        try:
            return seen(at, other, halves)
        finally:
            longer.config.window = 40

    longer._view = near
    whole = longer(x)
    assert network.span < 40 - size  # something is forgotten
    cache, out = network.empty_cache(2), []
    for begin in range(0, 40, size):
        # The block behind is read ahead, and read again when it is what it is.
        at = torch.arange(begin, min(begin + 2 * size, 40)).expand(2, -1)
        symbols = x.gather(1, at)
        symbols[:, size:] = 0
        out.append(network(symbols, cache=cache, at=at)[:, : min(size, 40 - begin)])
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5)


def test_ngrams_tell_what_stands_before():
    """Two places have the same embedding exactly where their last symbols are the same; tables hardly collide."""
    torch.manual_seed(0)
    ngrams = Ngrams(3, 16)
    x = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 2, 3]])
    e = ngrams(x, preceding(x, 2), torch.float32)[0]
    assert torch.equal(e[2], e[6]) and not torch.allclose(e[2], e[8]) and not torch.allclose(e[0], e[4])
    # Of 10,000 pairs about as many rows are used as if they were thrown at random.
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100)).unsqueeze(1)
    used = ngrams.rows(pairs[..., 1], pairs)[..., 0].unique().numel()
    assert used > 0.97 * ROWS * (1 - 2.71828 ** (-10_000 / ROWS))
    assert ngrams.rows(pairs[..., 1], pairs).max() < 2 * ROWS
