"""Optimisers, schedule, weight average, and resuming bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from textdiffusion.errors import UserError
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.machine import fastest_precision, micro_batch_for, tune_allocator
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.transformer import Transformer, TransformerConfig
from textdiffusion.presets import configure
from textdiffusion.text.preparing import prepare_corpus
from textdiffusion.text.shards import open_prepared
from textdiffusion.training import fit as fit_module
from textdiffusion.training.learning import (
    PATIENCE,
    Learner,
    TrainingConfig,
    learning_rate_factor,
    side_by_side,
    train,
)
from textdiffusion.training.muon import Muon, orthogonalised
from textdiffusion.training.preparation import _passes, prepare, to_learn


def test_threads_side_by_side_have_their_share():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        pool = side_by_side(2)
        assert list(pool.map(lambda _: torch.get_num_threads(), range(8))) == [2] * 8
        pool.submit(lambda: torch.ones(1000, 1000) @ torch.ones(1000, 1000)).result()
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {2} and torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
def test_muon_in_bfloat16_is_that_of_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    how = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    steppers = Muon([ours], dtype=torch.bfloat16, **how), torch.optim.Muon([theirs], **how)
    for _ in range(4):
        gradient = torch.randn(shape)
        for matrix, stepper in zip((ours, theirs), steppers, strict=True):
            matrix.grad = gradient.clone()
            stepper.step()
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_has_the_directions_of_a_matrix_and_none_of_its_sizes(shape, dtype):
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    sizes = torch.linspace(0.1, 1, len(v))
    found = u.T @ orthogonalised(u * sizes @ v, dtype).float() @ v.T
    assert float((found - found.diagonal().diag()).abs().max()) < (1e-5 if dtype == torch.float32 else 0.05)
    # The iteration's own band: it overshoots, so that few steps of it do.
    assert 0.65 < float(found.diagonal().min()) <= float(found.diagonal().max()) < 1.25


def test_muon_multiplies_as_the_training_does():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        learner = Learner(make()[1], TrainingConfig(steps=1, precision=precision))
        assert {muon.dtype for muon in learner.muons} == {dtype}


def make(**network) -> tuple[Masked, Transformer]:
    torch.manual_seed(0)
    fields = {"inputs": 12, "outputs": 11, "window": 8, "depth": 1, "width": 16, "heads": 2} | network
    net = Transformer(TransformerConfig(**fields))
    return Masked(net, MaskedConfig(), 11), net


def batch_of(rows: np.ndarray) -> np.ndarray:
    return np.stack([np.random.default_rng(int(r)).integers(0, 11, 8) for r in rows])


def test_the_rates_rise_stay_and_fall_to_zero():
    config = TrainingConfig(steps=100, warmup=0.1, cooldown=0.4)
    factors = [learning_rate_factor(p / 100, config) for p in range(101)]
    assert factors[0] == 0 and factors[5] == pytest.approx(0.5)
    assert all(f == 1 for f in factors[10:61]) and factors[80] == pytest.approx(0.5) and factors[100] == 0


def test_the_average_spans_a_fixed_share_of_the_training():
    """EDM2's power-function profile, against the weights written out."""
    _, net = make()
    learner = Learner(net, TrainingConfig(steps=200, average=0.1))
    parameter = next(net.parameters())
    values, n = [], 120
    with torch.no_grad():
        for step in range(1, n + 1):
            parameter.fill_(math.sin(step))
            values.append(math.sin(step))
            learner.step = step
            learner.average.update_parameters(net)
    power = 1 / 0.1 - 1
    weight = np.ones(n)
    for step in range(2, n + 1):
        decay = (1 - 1 / step) ** power
        weight[: step - 1] *= decay
        weight[step - 1] *= 1 - decay
    assert weight.sum() == pytest.approx(1)
    expected = float(weight @ np.array(values))
    assert next(learner.average.module.parameters()).flatten()[0].item() == pytest.approx(expected, abs=1e-5)
    steps = np.arange(1, n + 1)
    assert 0.8 * n < float(weight @ steps) < 0.95 * n


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resuming_gives_the_same_weights_bit_for_bit(dropout):
    config = TrainingConfig(steps=30, batch=6, micro_batch=4)

    def run(stop: int | None) -> dict[str, torch.Tensor]:
        process, net = make(dropout=dropout)
        learner = Learner(net, config)
        for now in train(process, batch_of, learner):
            if now.step == stop:
                saved = ({k: v.clone() for k, v in learner.tensors().items()}, learner.numbers())
                torch.manual_seed(12345)  # whatever state the next process starts in
                process, net = make(dropout=dropout)
                learner = Learner(net, config)
                learner.restore(*saved)
                for _ in train(process, batch_of, learner):
                    pass
                break
        return learner.tensors()

    whole = run(None)
    for stop in (1, 13, 29):
        part = run(stop)
        assert whole.keys() == part.keys()
        assert all(torch.equal(whole[k], part[k]) for k in whole)


def test_micro_batches_add_up_to_the_batch():
    results = []
    for micro in (8, 3):
        process, net = make()
        learner = Learner(net, TrainingConfig(steps=5, batch=8, micro_batch=micro, warmup=0))
        losses = [now.loss for now in train(process, batch_of, learner)]
        results.append((losses, net.head.weight.detach().clone()))
    assert np.allclose(results[0][0], results[1][0], atol=1e-5)
    # Muon works in bfloat16, so weights agree to its digits only.
    assert (results[0][1] - results[1][1]).abs().max() < 2e-2 * results[0][1].abs().max()


def test_a_training_that_goes_astray_says_so():
    process, net = make()
    learner = Learner(net, TrainingConfig(steps=50, batch=4))
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    seen = []
    with pytest.raises(UserError, match=f"no number in {PATIENCE} steps in a row, up to step {PATIENCE};"):
        seen += [now.loss for now in train(process, batch_of, learner)]
    assert learner.step == PATIENCE


def test_a_step_without_a_number_changes_nothing():
    """One batch whose loss is no number: weights and moments are as if it had not been, and the next steps learn."""
    process, net = make()
    learner = Learner(net, TrainingConfig(steps=8, batch=4, warmup=0))
    loss = process.loss

    def broken(x_0, noise, condition=None):
        return loss(x_0, noise, condition) * (math.nan if noise.step in (2, 3) else 1.0)

    process.loss = broken
    before, seen = {}, []
    for now in train(process, batch_of, learner):
        seen.append(now.loss)
        assert learner.astray == {3: 1, 4: 2}.get(now.step, 0)
        if now.step == 2:
            before = {k: v.clone() for k, v in learner.tensors().items()}
        if now.step == 4:
            assert all(torch.equal(v, before[k]) for k, v in learner.tensors().items())
    assert [math.isnan(x) for x in seen] == [False, False, True, True, False, False, False, False]
    assert not all(torch.equal(v, before[k]) for k, v in learner.tensors().items())


def test_minutes_end_a_training():
    process, net = make()
    learner = Learner(net, TrainingConfig(minutes=0.01, batch=4))
    seen = list(train(process, batch_of, learner))
    assert seen[-1].seconds >= 0.6 and learner.progress == 1.0
    assert len(seen) > 1 and all(now.seconds < 0.6 for now in seen[:-1])


def test_the_precision_is_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTDIFFUSION_CACHE", str(tmp_path))
    first = fastest_precision(torch.device("cpu"))
    assert first in ("bf16", "fp32")
    file = tmp_path / "precision.json"
    other = {"bf16": "fp32", "fp32": "bf16"}[first]
    file.write_text(file.read_text().replace(first, other))
    assert fastest_precision(torch.device("cpu")) == other
    file.write_text("not json")
    assert fastest_precision(torch.device("cpu")) in ("bf16", "fp32")


def test_tuning_the_allocator_does_no_harm():
    tune_allocator()
    assert torch.zeros(1 << 20).sum() == 0


@pytest.mark.parametrize(
    "fields", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}, {"steps": 1, "precision": "half"}]
)
def test_refusals(fields):
    with pytest.raises(UserError):
        TrainingConfig(**fields)


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="one core")
def test_bfloat16_learns_as_well_as_float32():
    """300 steps, three seeds: the mean losses at the end agree within the spread of the seeds."""
    from textdiffusion.mathematics.worlds import chain

    world = chain(10, 8, seed=3)
    finals: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for dtype, out in finals.items():
        for seed in range(3):
            process, net = make(width=64, depth=2)
            net.compute_dtype = dtype
            learner = Learner(net, TrainingConfig(steps=300, batch=64, seed=seed))
            losses = []
            for step in range(300):
                x_0 = world.draw(64, seed=1000 * seed + step)
                losses.append(learner.learn(process, x_0, Noise.of(seed, 64, step=step)))
            out.append(float(np.mean(losses[-50:])))
    spread = max(np.ptp(finals[torch.float32]), 0.02)
    assert abs(np.mean(finals[torch.float32]) - np.mean(finals[torch.bfloat16])) < spread


def test_micro_batches_fit_the_cache_and_the_memory():
    assert micro_batch_for(64, 100, 256, cache=2**24) == 32
    assert micro_batch_for(4096, 100, 256, cache=2**24) == 1  # never none
    assert micro_batch_for(256, 50_257, 256, cache=2**30) * 256 * 50_257 <= 2**26
    assert micro_batch_for(256, 100, 256) >= 1


MEMORY = """
import resource, sys, torch
from textdiffusion.mathematics.noise import Noise
from textdiffusion.run import RunConfig, build
from textdiffusion.sampling.reverse import sample
from textdiffusion.machine import micro_batch_for
from textdiffusion.training.learning import Learner, TrainingConfig
family, what = sys.argv[1:]
process = build(RunConfig(family=family, network={"depth": 1, "width": 32, "heads": 1, "window": 256},
                          vocabulary=50_257, training=TrainingConfig(steps=9)))
x = torch.randint(0, 50_257, (16, 256))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if what == "train":
    process.network.compute_dtype = torch.bfloat16
    config = TrainingConfig(steps=9, micro_batch=micro_batch_for(256, 50_257, 32))
    Learner(process.network, config).learn(process, x, Noise.of(0, 16))
else:
    for frame in sample(process, Noise.of(0, 16), 256, 32, tokens=x, given=torch.arange(256).expand(16, -1) < 192):
        if frame.step == 3 or family == "autoregressive" and frame.step == 8:
            break
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("family", "what", "most"), [
    ("masked", "train", 800), ("autoregressive", "train", 1100),
    ("masked", "sample", 200), ("autoregressive", "sample", 200),
])  # fmt: skip
def test_memory_with_a_large_vocabulary(family, what, most):
    """16 windows of 256 tokens, 50,257 symbols: B L V numbers in float32 alone would be 785 MB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, family, what], capture_output=True, text=True, check=True)
    assert float(run.stdout) < most, run.stdout


@pytest.mark.parametrize(
    "family, tokenizer, steps, set_, longest",
    [
        ("autoregressive", "char", 3, (), 5),  # 3 x 4 x 8 of about 700 characters
        ("autoregressive", "char", 60, (), 0),
        ("autoregressive", "bpe:300", 15, (), 0),  # a few characters a token: as many steps are more passes
        ("autoregressive", "char", 15, (), 5),
        ("autoregressive", "char", 60, ("network.ngrams=3",), 3),
        ("block", "char", 60, (), 0),
        ("masked", "char", 3, (), None),
    ],
)
def test_few_passes_over_a_text_have_ngrams_and_many_have_none(tmp_path, family, tokenizer, steps, set_, longest):
    (tmp_path / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 10)
    config = configure(family=family, data=str(tmp_path / "my.txt"), tokenizer=tokenizer, length=8, steps=steps,
                       settings=["training.batch=4", *set_])  # fmt: skip
    full = prepare(config)[2]
    assert full.network.get("ngrams") == longest
    # What a run has it keeps, and so does one that was stored without a word of it.
    without = {name: value for name, value in full.network.items() if name != "ngrams"}
    for network in (full.network, without):
        assert prepare(dataclasses.replace(full, network=network))[2].network == network


def test_passes_are_reckoned_by_the_device_and_by_the_text_whole(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "ab"}\n' + '{"text": "abcdefghij abcdefghij"}\n' * 400)
    config = configure(
        family="autoregressive", data=str(tmp_path / "my.jsonl"), tokenizer="bpe:260", length=8, minutes=0.01
    )
    corpus, tokenizer, full = prepare(config)
    reckoned = 6000 / _passes(config, corpus, tokenizer, "cpu")
    assert reckoned == pytest.approx(to_learn(full, corpus, tokenizer).training_tokens, rel=0.25)
    assert _passes(config, corpus, tokenizer, "cuda") == pytest.approx(50 * _passes(config, corpus, tokenizer, "cpu"))


def test_of_a_mixture_the_part_that_is_read_oftenest_counts(tmp_path):
    for name, times in (("small", 100), ("large", 10_000)):
        (tmp_path / f"{name}.txt").write_text("ab " * times)
        prepare_corpus(str(tmp_path / f"{name}.txt"), tmp_path / name, tokenizer="byte", workers=1)
    source = f"mix:{tmp_path / 'small'}=0.25,{tmp_path / 'large'}=0.75"
    config = configure(family="autoregressive", data=source, tokenizer="byte", length=8, steps=10)
    corpus, tokenizer, full = prepare(config)
    length = len(open_prepared(tmp_path / "small").parts["train"].tokens)
    assert _passes(config, corpus, tokenizer, "cpu") == pytest.approx(0.25 * 10 * 32 * 8 / length)
    assert full.network["ngrams"] == 0  # of the large one alone it is less than a pass


def test_a_short_training_makes_no_validation_that_it_cannot_afford(tmp_path, monkeypatch):
    """By the clock: how many are made before the last, if one is taken to cost next to nothing, and very much."""
    settings = ["training.batch=2", "network.width=16", "network.heads=1"]
    for steps, some in ((0, True), (10**9, False)):
        monkeypatch.setattr(fit_module, "STEPS_A_VALIDATION", steps)
        config = configure(depth=1, length=8, minutes=0.1, settings=settings)
        made = [event for event in fit_module.fit(config, tmp_path / str(steps)) if type(event).__name__ == "Validated"]
        assert made and (len(made) > 1) == some
