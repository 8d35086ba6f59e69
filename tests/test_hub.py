"""A run directory is a model folder of transformers: the Auto classes read it, save it, and are read back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from small_runs import TEXT, small_run

pytest.importorskip("transformers", reason="the extra hf is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TextDiffusionStreamer

import textdiffusion as td
from textdiffusion.exchange import hub
from textdiffusion.process import State

TOKEN_FAMILIES = ("masked", "uniform", "score_entropy", "sparse_distribution", "block")


def drawn(path, family, **how):
    """A run whose weights are all drawn: as they begin, every output would be zero."""
    small_run(path, family, 16, **how)
    model = td.load(path, precision="fp32")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.process.network.parameters():
            p.normal_(std=0.2)
    from textdiffusion.run import Run

    Run.open(path).save_weights(model.process.network.state_dict())
    return td.load(path, precision="fp32")


def noisy(model):
    x = torch.randint(0, model.tokenizer.vocabulary, (2, 16))
    if model.process.space.size > model.tokenizer.vocabulary:
        x[torch.rand(2, 16) < 0.5] = model.tokenizer.vocabulary
    return x


@pytest.mark.parametrize("family", TOKEN_FAMILIES)
@torch.no_grad()
def test_a_run_goes_to_transformers_and_comes_back(tmp_path, family):
    model = drawn(tmp_path / "run", family)
    there = AutoModelForMaskedLM.from_pretrained(tmp_path / "run").eval()
    x, t = noisy(model), torch.tensor([0.3, 0.8])
    wanted = model.process.predict(State(x, t.double())).log_p
    assert wanted[wanted.isfinite()].std() > 0

    def same(found):  # but for the last digits, which on some processors follow from where in memory the weights lie
        return torch.allclose(found, wanted, rtol=0, atol=1e-5)

    assert same(there(x, times=t).logits)
    there.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    assert same(again(x, times=t).logits)
    back = td.load(tmp_path / "saved", precision="fp32")  # a run again, with samples and all
    assert same(back.process.predict(State(x, t.double())).log_p)
    assert back.sample(n=2, seed=5) == model.sample(n=2, seed=5)
    assert AutoConfig.from_pretrained(tmp_path / "saved").vocab_size == model.tokenizer.vocabulary


@torch.no_grad()
def test_an_autoregressive_run_is_a_causal_language_model(tmp_path):
    model = drawn(tmp_path / "run", "autoregressive")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    start = there.config.bos_token_id
    x = torch.randint(0, model.tokenizer.vocabulary, (2, 15))
    ids = torch.cat((torch.full((2, 1), start), x), 1)
    out = there(ids, labels=ids)
    nll = model.process.nll(x, noise=None).total
    assert torch.allclose(out.loss.double(), nll.sum() / x.numel(), atol=1e-5)
    # Greedy, by their loop and by ours.
    written = there.generate(torch.full((1, 1), start), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert model.tokenizer.decode(written[0, 1:].tolist()) == model.sample(n=1, length=10, temperature=0.0)[0]
    with pytest.raises(td.UserError, match="AutoModelForMaskedLM"):
        small_run(tmp_path / "other", "masked", 16)
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:280"])
def test_the_tokenizer_is_one_of_transformers(tmp_path, kind):
    model = small_run(tmp_path / "run", "masked", 16, tokenizer=kind).model
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(TEXT)
    assert theirs.eos_token_id == model.tokenizer.end_of_text
    assert theirs.decode(model.tokenizer.encode(TEXT)) == TEXT


def test_the_loss_of_labels_is_their_cross_entropy_and_teaches(tmp_path):
    drawn(tmp_path / "run", "masked")
    there = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    clean = torch.randint(0, there.config.vocab_size, (2, 16))
    hidden = torch.rand(2, 16) < 0.5
    labels = clean.masked_fill(~hidden, -100)
    out = there(clean.masked_fill(hidden, there.config.mask_token_id), labels=labels)
    wanted = -out.logits[hidden].gather(-1, clean[hidden].unsqueeze(-1)).mean()
    assert torch.allclose(out.loss, wanted)
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in there.parameters())


def test_a_family_among_reals_is_no_masked_language_model(tmp_path):
    small_run(tmp_path / "run", "analog_bits", 16)
    with pytest.raises(td.UserError, match=r"use td\.load"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "run")


def test_a_run_is_put_on_the_hub_with_its_card_and_without_checkpoints(tmp_path, monkeypatch):
    import huggingface_hub

    small_run(tmp_path / "run", "masked", 16)
    (tmp_path / "run/checkpoints").mkdir()
    done = {}

    class Hub:
        def create_repo(self, name, **how):
            done["name"], done["private"] = name, how["private"]

        def upload_folder(self, **how):
            done.update(how)
            return f"https://hub/{how['repo_id']}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert hub.push(tmp_path / "run", "me/mine", licence="apache-2.0").endswith("me/mine")
    assert done["private"] and "checkpoints/*" in done["ignore_patterns"]
    card = (tmp_path / "run/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: textdiffusion\n")
    assert "bits per character" in card and "trained on" in card
    hub.push(tmp_path / "run", "me/mine", licence="mit")
    assert (tmp_path / "run/README.md").read_text().count("license:") == 1
    monkeypatch.setattr(Hub, "create_repo", lambda *a, **k: 1 / 0)
    with pytest.raises(td.UserError, match="cannot be put on the hub"):
        hub.push(tmp_path / "run", "me/mine")


def test_a_model_is_loaded_from_the_hub_by_its_name(tmp_path, monkeypatch):
    import huggingface_hub

    small_run(tmp_path / "run", "masked", 16)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or tmp_path / "run"
    )
    assert td.load("someone/model").sample(n=1, seed=2) == td.load(tmp_path / "run").sample(n=1, seed=2)
    assert asked[0][0] == "someone/model" and "*.py" not in asked[0][1]["allow_patterns"]
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nat all"))
    )
    with pytest.raises(td.UserError, match=r"cannot be fetched from the hub: no network$"):
        td.load("someone/model")
    with pytest.raises(td.UserError, match="is no run"):
        td.load("runs/not-there")  # a run that is missing is not looked for elsewhere


class Watcher:
    """What a streamer is told."""

    def __init__(self):
        self.drafts, self.puts, self.ended = [], [], False

    def put(self, tokens):
        self.puts.append(tokens.tolist())

    def put_draft(self, tokens):
        self.drafts.append(tokens.tolist())

    def end(self):
        self.ended = True


def test_streamers_see_drafts_and_then_the_text(tmp_path, capsys):
    model = small_run(tmp_path / "run", "masked", 16).model
    watcher = Watcher()
    text = hub.stream(model, watcher, prompt="It was", seed=4)
    given, rest = watcher.puts
    assert (
        watcher.ended
        and model.tokenizer.decode([*given, *rest]) == text == model.sample(n=1, prompt="It was", seed=4)[0]
    )
    assert watcher.drafts[-1] == rest and len(watcher.drafts) == 11
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    hub.stream(model, watcher, seed=4)
    hub.stream(model, TextDiffusionStreamer(theirs), seed=4)
    assert capsys.readouterr().out.rstrip().endswith(theirs.decode(watcher.puts[-1]).rstrip())


def test_nothing_of_this_is_imported_unless_asked():
    code = "import sys, textdiffusion as td; td.load; from textdiffusion.commands.cli import main; "
    code += "assert not {'transformers', 'peft', 'huggingface_hub', 'lm_eval', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_config_is_read_by_both(tmp_path):
    small_run(tmp_path / "run", "masked", 16)
    ours = json.loads((tmp_path / "run/config.json").read_text())
    AutoConfig.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    theirs = json.loads((tmp_path / "saved/config.json").read_text())
    assert {k: theirs[k] for k in ours} == ours
