import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textdiffusion.mathematics.categorical import draw, reshape_law


def test_draws_have_the_law():
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
    n = 200_000
    u = torch.from_numpy(np.random.default_rng(0).random(n))
    x = draw(p.log().expand(n, -1), u)
    observed = torch.bincount(x, minlength=6).double()
    assert observed[1] == observed[5] == 0
    live = p > 0
    chi_square = float(((observed - n * p)[live] ** 2 / (n * p[live])).sum())
    assert chi_square < 21  # 3 degrees of freedom, p = 1e-4


def test_the_rare_tail_is_drawn():
    """One state of .995 and 50,000 of 1e-7: float32 Gumbel noise, cut at 16.6, all but never draws the tail."""
    v, n = 50_001, 4000
    p = torch.full((v,), 1e-7, dtype=torch.float64)
    p[0] = 0.995
    u = torch.from_numpy(np.random.default_rng(1).random(n))
    hits = sum(int((draw(p.log().expand(500, -1), part) > 0).sum()) for part in u.split(500))
    assert 8 <= hits <= 36  # binomial mean 20.0, standard deviation 4.5


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_never_an_index_without_mass(seed, u):
    p = torch.from_numpy(np.random.default_rng(seed).random(7) * (np.random.default_rng(seed + 1).random(7) < 0.5))
    p[seed % 7] = 1e-12
    for value in (u, 0.0, np.nextafter(1.0, 0.0)):
        assert p[draw(p.log().unsqueeze(0), torch.tensor([value], dtype=torch.float64))] > 0


def test_reshaped_laws():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    assert torch.allclose(reshape_law(p.log(), temperature=0.5).exp(), p**2 / (p**2).sum())
    assert reshape_law(p.log(), temperature=0.0).exp().tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert torch.allclose(reshape_law(p.log(), top_p=0.75).exp(), torch.tensor([[0.625, 0.375, 0, 0]]).double())
    assert torch.allclose(reshape_law(p.log(), top_p=0.5).exp(), torch.tensor([[1.0, 0, 0, 0]]).double())
    assert torch.allclose(reshape_law(p.log(), top_k=2).exp(), torch.tensor([[0.625, 0.375, 0, 0]]).double())
    assert torch.equal(reshape_law(p.log(), top_p=1.0), p.log())
