"""Block diffusion beyond what the truth suite proves: the cache, long texts, the two ends of the block length."""

import pytest
import torch

from textdiffusion.errors import UserError
from textdiffusion.families.block import BlockConfig, BlockDiffusion
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.sampling.reverse import sample

V = 6


def make(size: int = 4, window: int = 12, ngrams: int = 4) -> BlockDiffusion:
    config = BlockConfig(block_length=size)
    torch.manual_seed(0)
    fields = BlockDiffusion.network_fields(config, V)
    network = (
        Transformer(TransformerConfig(window=window, depth=2, width=16, heads=2, ngrams=ngrams, **fields))
        .eval()
        .double()
    )
    network.compute_dtype = torch.float64
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return BlockDiffusion(network, config, V)


class Uncached:
    """The same network, but with no cache to read from."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *args, **kwargs):
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("sampler", ["random", "margin", "confidence"])
def test_the_cache_changes_no_text(size, sampler):
    process = make(size)
    plain = process.over(Uncached(process.network))
    tokens = torch.randint(0, V, (5, 11))
    # Prompts of all lengths in one batch: rows are in different blocks.
    given = torch.arange(11) < torch.tensor([0, 2, 5, 7, 10]).unsqueeze(-1)
    for calls in (1, 5, 11):
        *_, fast = sample(process, Noise.of(1, 5), 11, calls, sampler=sampler, tokens=tokens, given=given)
        *_, slow = sample(plain, Noise.of(1, 5), 11, calls, sampler=sampler, tokens=tokens, given=given)
        assert torch.equal(fast.tokens, slow.tokens)
        assert torch.allclose(fast.confidence, slow.confidence)
        assert torch.equal(fast.tokens[given], tokens[given])


def test_long_texts_and_long_prompts_see_a_window_back():
    """Past the window, a row's text does not depend on whether its prompt was read at once or written."""
    process = make(4)
    *_, whole = sample(process, Noise.of(2, 3), 50, 50)
    assert bool((whole.tokens >= 0).all())
    # Every call of the run is for one token, so a run from a prompt draws other numbers; likelihoods can be compared.
    state = process.template(whole.tokens, torch.arange(50).expand(3, -1) < 41, Noise.of(0, 3))
    asked = torch.zeros(3, 50, dtype=torch.bool)
    asked[:, 41] = True
    at_once = process.predict(state, asked)
    memory = None
    for end in range(4, 41, 4):
        part = process.template(whole.tokens, torch.arange(50).expand(3, -1) < end, Noise.of(0, 3))
        one = torch.zeros(3, 50, dtype=torch.bool)
        one[:, end] = True
        memory = process.predict(type(state)(part.x, part.t, part.given, memory), one).memory
    step_by_step = process.predict(type(state)(state.x, state.t, state.given, memory), asked)
    assert torch.allclose(at_once.log_p, step_by_step.log_p)


def test_blocks_of_one_token_have_an_exact_likelihood_without_noise():
    process = make(1)
    text = torch.randint(0, V, (4, 9))
    one, other = (process.nll(text, Noise.of(seed, 4)) for seed in (0, 1))
    assert one.kind == "exact"
    assert torch.allclose(one.total, other.total)
    chain = torch.zeros(4, dtype=torch.float64)
    for i in range(9):
        state = process.template(text, torch.arange(9).expand(4, -1) < i, Noise.of(0, 4))
        asked = (torch.arange(9) == i).expand(4, -1)
        chain -= process.predict(state, asked).log_p.gather(-1, text[:, i : i + 1]).squeeze(-1)
    assert torch.allclose(one.total, chain)


def test_one_block_of_all_is_masked_diffusion():
    world = random_table(3, 3)
    block = BlockDiffusion(None, BlockConfig(block_length=3), 3)
    masked = Masked(None, MaskedConfig(), 3)
    block, masked = block.over(block.ideal(world.context)), masked.over(masked.ideal(world.context))
    text = world.texts.repeat(200, 1)
    a, b = (process.nll(text, Noise.of(0, len(text))).total.view(200, -1).mean(0) for process in (block, masked))
    assert torch.allclose(a, b)  # the draws are the same
    for calls in (1, 2, 3):
        weights, made = block._weights(3, calls)
        assert (weights[0].tolist(), made) == (masked.curve_weights(3, calls)[0].tolist(), calls)


@pytest.mark.parametrize(
    ("size", "window", "length"), [(4, 12, 12), (8, 12, 12), (12, 12, 24), (5, 12, 30), (8, 9, 17)]
)
def test_it_makes_as_many_calls_as_its_bound_is_for(size, window, length):
    process = make(size, window)
    for calls in (1, 4, length):
        *_, last = sample(process, Noise.of(0, 3), length, calls)
        if length <= window:
            assert (
                last.calls == process.nll(torch.zeros(3, length, dtype=torch.long), Noise.of(0, 3), calls).calls
            ).all()
        assert (last.calls == len(process.plan(torch.ones(length, dtype=torch.bool), calls, "random")) - 1).all()


@pytest.mark.parametrize("calls", [1, 3, 5, 7, 12, 40])
def test_the_plan_shares_out_the_calls(calls):
    process = make(4)
    times = process.plan(torch.ones(10, dtype=torch.bool), calls, "random")
    hidden = [round(t * 10) for t in times]
    assert hidden[0] == 10 and hidden[-1] == 0 and {6, 2} <= set(hidden)  # ends of blocks
    assert len(times) - 1 == min(max(calls, 3), 10)


def test_what_it_cannot_do_it_says():
    with pytest.raises(UserError, match="block_length"):
        BlockConfig(block_length=0)
    with pytest.raises(UserError, match="window"):
        TransformerConfig(inputs=2, outputs=2, window=4, attention="block", block_length=8)
    with pytest.raises(UserError, match="no bound is known"):
        next(iter(make().patterns(8, 4, "margin")))


@pytest.mark.parametrize("calls", [6, 24])
def test_a_text_stops_where_a_document_ends(calls):
    """What is written up to the first end is what would have been written without stopping; nothing is behind it."""
    process, end = make(4), 2
    tokens, given = torch.full((20, 24), end), torch.arange(24) < torch.tensor([0, 3] * 10).unsqueeze(-1)
    how = {"tokens": tokens, "given": given}
    *_, whole = sample(process, Noise.of(3, 20), 24, calls, **how)
    *_, cut = sample(process, Noise.of(3, 20), 24, calls, until=end, **how)
    for row, free, text, short in zip(range(20), ~given, whole.tokens, cut.tokens, strict=True):
        ends = ((text == end) & free).nonzero().flatten().tolist()
        first = ends[0] if ends else 23
        assert short[: first + 1].tolist() == text[: first + 1].tolist()
        assert (short[first + 1 :] == -1).all()
        assert cut.calls[row] < whole.calls[row] or first // 4 == 5
    assert (cut.confidence[cut.tokens < 0] == 0).all()


def test_stopping_is_for_left_to_right_alone():
    process = Masked(lambda x, **_: torch.zeros(*x.shape, V), MaskedConfig(), V)
    with pytest.raises(UserError, match="left to right"):
        next(sample(process, Noise.of(0, 1), 4, 4, until=1))
