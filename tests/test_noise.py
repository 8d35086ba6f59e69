import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from textdiffusion.mathematics.noise import Noise


def test_a_row_gets_the_same_draws_in_any_batch():
    whole = Noise.of(7, 64, step=3)
    parts = [Noise(7, np.arange(a, b), 64, 3) for a, b in ((0, 5), (5, 40), (40, 64))]
    for kind in ("uniform", "normal"):
        together = getattr(whole, kind)("x", 9, 2)
        assert torch.equal(together, torch.cat([getattr(p, kind)("x", 9, 2) for p in parts]))
    assert torch.equal(whole.stratified("t"), torch.cat([p.stratified("t") for p in parts]))
    picked = torch.tensor([3, 60, 17])
    assert torch.equal(whole.select(picked).uniform("x", 4), whole.uniform("x", 4)[picked])


def test_a_stream_is_the_one_of_its_key_and_counter():
    """Against generators made anew, whatever was drawn before, by any thread."""
    noise = Noise(-3, np.array([0, 5, 2**40]), 9, 7)

    def fresh(tag, row):
        key = np.array([2**64 - 3, zlib.crc32(tag.encode())], dtype=np.uint64)
        counter = np.array([0, row, 7, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def check(_):
        Noise.of(1, 2).stratified("t")  # leaves half a word behind
        for tag in ("a", "b"):
            assert noise.uniform(tag, 5).tolist() == [fresh(tag, row).random(5).tolist() for row in noise.rows]
            normal = [fresh(tag, row).standard_normal(5).tolist() for row in noise.rows]
            assert noise.normal(tag, 5).tolist() == normal
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(200)))


def test_a_longer_draw_extends_a_shorter_one():
    noise = Noise.of(1, 3)
    assert torch.equal(noise.uniform("x", 100)[:, :7], noise.uniform("x", 7))


@pytest.mark.parametrize("change", ["seed", "step", "tag", "row"])
def test_every_part_of_the_key_matters(change):
    a = Noise(1, np.array([4]), 8, 2).uniform("x", 1000)
    b = Noise(1 + (change == "seed"), np.array([4 + (change == "row")]), 8, 2 + (change == "step")).uniform(
        "y" if change == "tag" else "x", 1000
    )
    assert abs(np.corrcoef(a[0], b[0])[0, 1]) < 0.12
    assert not torch.equal(a, b)


def test_laws():
    noise = Noise.of(0, 200)
    u = noise.uniform("u", 500).flatten()
    assert u.min() >= 0 and u.max() < 1
    observed = torch.histc(u, 100, 0, 1)
    chi_square = float(((observed - 1000) ** 2 / 1000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom
    z = noise.normal("z", 500).flatten()
    assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.015 and abs((z**4).mean() - 3) < 0.15


@pytest.mark.parametrize("total", [1, 2, 7, 64, 100])
def test_stratified_times_put_one_row_in_each_stratum(total):
    for step in range(5):
        t = Noise.of(3, total, step=step).stratified("t")
        assert sorted((t * total).long().tolist()) == list(range(total))


def test_stratified_times_are_uniform_for_each_row():
    t = torch.stack([Noise.of(3, 16, step=s).stratified("t") for s in range(4000)])
    assert (t.mean(0) - 0.5).abs().max() < 0.025
    # Neighbouring rows must not sit in neighbouring strata: a micro-batch has to see all noise levels.
    first = torch.stack([Noise(3, np.arange(8), 64, s).stratified("t") for s in range(50)])
    assert (first.max(-1).values - first.min(-1).values).min() > 0.6
