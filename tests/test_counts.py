"""Counts of a text as a prior: against counts made with a dictionary, and what a run does with them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from textdiffusion.config import TrainingConfig, read_config
from textdiffusion.errors import UserError
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.counts import DISCOUNT, Counts, slots_for
from textdiffusion.networks.preceding import preceding
from textdiffusion.presets import configure
from textdiffusion.process import Process, State
from textdiffusion.run import Run, build
from textdiffusion.text.data import tokenize
from textdiffusion.text.preparing import prepare_corpus
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.training import preparation
from textdiffusion.training.fit import fit
from textdiffusion.training.learning import Learner
from textdiffusion.training.preparation import prepare

V, K = 6, 3


def text(tokens: int, seed: int = 0) -> np.ndarray:
    """A second-order chain: what follows depends on the last two symbols."""
    random = np.random.default_rng(seed)
    law = random.dirichlet(np.full(V, 0.3), (V, V))
    out = [0, 1]
    for _ in range(tokens - 2):
        out.append(int(random.choice(V, p=law[out[-2], out[-1]])))
    return np.array(out)


def counted(tokens: np.ndarray, slots: int = 2**22) -> Counts:
    counts = Counts(K, V, slots)
    counts.count(tokens)
    return counts


def by_hand(tokens: list[int], context: tuple[int, ...]) -> np.ndarray:
    """p(v | the last symbols, nearest first), by the recursion of the head of counts.py."""
    p = np.full(V, 1 / V)
    for order in range(len(context) + 1):
        before = context[:order][::-1]
        seen = Counter(tokens[i] for i in range(order, len(tokens)) if tuple(tokens[i - order : i]) == tuple(before))
        total = sum(seen.values())
        if total:
            c = np.array([seen[v] for v in range(V)])
            p = (np.maximum(c - DISCOUNT, 0) + DISCOUNT * len(seen) * p) / total
    return p


def test_the_prior_is_that_of_absolute_discounting():
    tokens = text(400)
    counts, some = counted(tokens), torch.from_numpy(text(60, seed=1))
    contexts = preceding(some[None], K)[0]
    log_p, total = counts.law(contexts)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(60), atol=1e-5)
    for i in range(60):
        context = tuple(int(s) for s in contexts[i] if s >= 0)
        assert np.allclose(log_p[i].exp().numpy(), by_hand(tokens.tolist(), context), atol=1e-5), i
        assert total[i, 0] == 400 and bool((total[i, len(context) + 1 :] == 0).all())


def test_what_is_learnt_from_is_left_out():
    """Of each position of the text: the prior of the same text without that occurrence of its symbol."""
    tokens = text(120)
    counts = counted(tokens)
    whole = torch.from_numpy(tokens)
    log_p, _ = counts.law(preceding(whole[None], K)[0], whole)
    for i in range(K, 120, 7):
        c = [Counter(), Counter(), Counter(), Counter()]
        for order in range(K + 1):
            c[order].update(
                tokens[j]
                for j in range(order, 120)
                if j != i and (tokens[j - order : j] == tokens[i - order : i]).all()
            )
        p = np.full(V, 1 / V)
        for seen in c:
            if total := sum(seen.values()):
                p = (np.maximum([seen[v] - DISCOUNT for v in range(V)], 0) + DISCOUNT * len(seen) * p) / total
        assert np.allclose(log_p[i].exp().numpy(), p, atol=1e-5), i


def test_left_out_the_prior_costs_a_text_what_it_costs_another_of_its_kind():
    """In training as where nothing was counted: else a network would learn to trust what it will not have."""
    tokens = text(20_000)
    learnt, new = torch.from_numpy(tokens[:10_000]), torch.from_numpy(tokens[10_000:])
    counts = counted(tokens[:10_000])

    def nats(x, own):
        log_p, _ = counts.law(preceding(x[None], K)[0], own)
        return -float(log_p.gather(-1, x[:, None]).mean())

    told, left_out, fresh = nats(learnt, None), nats(learnt, learnt), nats(new, None)
    assert abs(left_out - fresh) < 0.02 and told < fresh - 0.01


def test_a_full_table_keeps_what_was_seen_most():
    tokens = text(20_000)
    roomy, tight = counted(tokens), counted(tokens, slots=2**8)
    contexts = torch.cartesian_prod(*[torch.arange(V)] * K)
    (_, full), (log_p, kept) = roomy.law(contexts), tight.law(contexts)
    # Not more than there was, but for the odd mark that agrees.
    assert float((kept <= full).double().mean()) > 0.98 and 0.02 < float((kept[:, -1] > 0).float().mean()) < 0.9
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(len(contexts)), atol=1e-5)
    assert float(kept[:, 1].mean()) > 0.5 * float(full[:, 1].mean()) and float(kept[0, 0]) > 0.8 * len(tokens)
    assert int((tight.table != 0).sum()) > 200
    assert slots_for(1) == 2**10 and slots_for(60_000) == 2**18 and slots_for(10**9) == 2**23


def process(counts: int = K, **fields) -> Process:
    config = configure(family="autoregressive", length=12, steps=5, depth=1, settings=[f"network.counts={counts}"])
    return build(replace(config, vocabulary=V, start=V - 1, network=config.network | fields))


def test_what_is_said_is_a_mixture_whose_shares_are_learnt():
    made = process()
    network, x = made.network, torch.from_numpy(text(24, seed=1)).view(2, 12)
    counts, inputs = network.counts, made._inputs(x)
    counts.count(text(2000))
    law = counts.law(preceding(x, K))[0]  # behind the text itself: the start token is none of it
    # An untaught network says nothing, and has half of the word.
    assert torch.allclose(network(inputs).exp(), 0.5 / V + 0.5 * law.exp(), atol=1e-6)
    nll = -network(inputs).gather(-1, x.unsqueeze(-1)).sum((-1, -2))
    assert torch.allclose(made.nll(x, Noise.of(0, 2)).total, nll.double(), atol=1e-4)
    with torch.no_grad():
        network.head.weight.normal_()
        for bias, there in ((50.0, law), (-50.0, network(inputs, alone=True).log_softmax(-1))):
            counts.trust[-1] = bias
            assert torch.allclose(network(inputs), there, atol=1e-4)
            assert torch.allclose(network(inputs).exp().sum(-1), torch.ones(2, 12), atol=1e-5)


def learnt(number: int, x: torch.Tensor, micro_batch: int, leak: bool = False) -> tuple[float, dict]:
    """Loss and gradients of a batch that is read a few texts at a time."""
    made = process(number)
    if number:
        made.network.counts.count(text(240))
        if leak:
            known = made.network.counts.law
            made.network.counts.law = lambda contexts, own=None: known(contexts)
    with torch.no_grad():
        made.network.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    total = 0.0
    for part in torch.arange(len(x)).split(micro_batch):
        loss = made.loss(x[part], Noise.of(0, len(x)).select(part)).sum() / len(x)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in made.network.named_parameters()}


def test_counts_teach_their_share_and_not_the_network_however_a_batch_is_cut():
    x = torch.from_numpy(text(240)).view(20, 12)
    (loss, mine), (other, theirs) = learnt(K, x, 20), learnt(0, x, 20)
    trust = mine.pop("counts.trust")
    assert bool((trust != 0).all()) and loss == other and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for micro_batch in (1, 3, 4, 7):
        assert torch.allclose(learnt(K, x, micro_batch)[1]["counts.trust"], trust, rtol=1e-4, atol=1e-9)
    # By the law of which these texts are left out: one that knows them would be trusted more.
    leaky = learnt(K, x, 20, leak=True)[1]["counts.trust"]
    assert leaky[-1] < 1.01 * trust[-1] < 0


def test_a_training_counts_its_training_text_once(tmp_path):
    (tmp_path / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)
    how = {"data": str(tmp_path / "my.txt"), "length": 12, "steps": 2, "depth": 1, "settings": ["training.batch=4"]}
    list(fit(configure(family="autoregressive", **how), tmp_path / "run"))
    config = read_config(tmp_path / "run")
    corpus, tokenizer, _ = prepare(config, Tokenizer.load(tmp_path / "run"))
    assert config.network["counts"] == 8
    counts = Counts(8, config.vocabulary, config.network["slots"])
    counts.count(tokenize(corpus, tokenizer)["train"].tokens)
    assert torch.equal(Run.open(tmp_path / "run").load().network.counts.table, counts.table) and bool(
        counts.table.any()
    )
    # One that begins with it counts its own text.
    (tmp_path / "other.txt").write_text("Call me Ishmael. Some years ago it was a bright cold day in April. " * 60)
    more = how | {"data": str(tmp_path / "other.txt"), "init_from": str(tmp_path / "run")}
    del more["depth"]
    list(fit(configure(family="autoregressive", **more), tmp_path / "next"))
    assert not torch.equal(Run.open(tmp_path / "next").load().network.counts.table, counts.table)
    # Prepared corpora are not counted, and a run with counts does not begin one on them.
    prepare_corpus(str(tmp_path / "other.txt"), tmp_path / "prepared", tokenizer=f"hf:{tmp_path / 'run'}", workers=1)
    elsewhere = how | {"data": str(tmp_path / "prepared")}
    assert "counts" not in prepare(configure(family="masked", **elsewhere))[2].network
    assert prepare(configure(family="autoregressive", **elsewhere))[2].network["counts"] == 0
    for refused in (elsewhere | {"settings": ["network.counts=3"]}, more | {"data": str(tmp_path / "prepared")}):
        with pytest.raises(UserError, match=r"network\.counts are of a text that is read whole"):
            prepare(configure(family="autoregressive", **refused))


def test_the_average_of_the_weights_reads_the_same_table():
    net = process().network
    other = copy.deepcopy(net)
    net.counts.count(text(2000))
    assert other.counts.table.data_ptr() == net.counts.table.data_ptr() and other.counts.trust is not net.counts.trust
    assert torch.equal(other.state_dict()["counts.table"], net.counts.table) and bool(net.counts.table.any())


def test_a_checkpoint_holds_the_table_once():
    learner = Learner(process().network, TrainingConfig(steps=5, batch=4))
    learner.network.counts.count(text(2000))
    kept = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert [name for name in kept if name.endswith("counts.table")] == ["network.counts.table"]
    assert "average.counts.trust" in kept
    other = Learner(process().network, TrainingConfig(steps=5, batch=4))
    other.restore(kept, learner.numbers())
    for network in (other.network, other.average.module):
        assert torch.equal(network.counts.table, kept["network.counts.table"]) and bool(network.counts.table.any())


def test_texts_are_written_by_the_law_that_is_their_likelihood():
    """Drawn one by one with a cache, and read whole: the probability of each symbol is the same."""
    made = process()
    made.network.counts.count(text(2000))
    with torch.no_grad():
        for name, p in made.network.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        x = torch.from_numpy(text(24, seed=2)).view(2, 12)
        logits = made.network(made._inputs(x))
        memory = None
        for i in range(12):
            shown = torch.where(torch.arange(12) < i, x, made.mask)
            at = (torch.arange(12) == i).expand(2, -1)
            said = made.predict(State(shown, torch.zeros(2), memory=memory), at)
            memory = said.memory
            assert torch.allclose(said.log_p, logits[:, i].log_softmax(-1), atol=1e-5)


def test_who_has_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "MOST_SYMBOLS", 257)
    (tmp_path / "my.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)

    def made(family, tokenizer="char", *settings):
        config = configure(
            family=family,
            data=str(tmp_path / "my.txt"),
            tokenizer=tokenizer,
            length=12,
            steps=5,
            settings=list(settings),
        )
        return prepare(config)[2].network

    assert made("autoregressive")["counts"] == 8 and made("autoregressive")["slots"] == 2**15
    assert made("autoregressive", "char", "network.counts=0")["counts"] == 0
    assert made("autoregressive", "byte")["counts"] == 8 and made("autoregressive", "bpe:300")["counts"] == 0
    assert all("counts" not in made(family) for family in ("masked", "block"))
    with pytest.raises(UserError, match="all but autoregressive"):
        build(replace(configure(family="masked", steps=5, settings=["network.counts=2"]), vocabulary=V))
    for wrong in ("network.counts=9", "network.slots=1000"):
        with pytest.raises(UserError, match=r"network\.(counts|slots) must be"):
            configure(family="autoregressive", steps=5, settings=[wrong])
