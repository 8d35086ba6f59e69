"""`textdiffusion compare`: one small comparison made, interrupted twice and made again, and what its page says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from small_runs import small_run
from textdiffusion.commands.cli import ACTS, main
from textdiffusion.commands.flags import parser_of
from textdiffusion.compare import measuring
from textdiffusion.compare.command import _plan
from textdiffusion.compare.differences import differences
from textdiffusion.compare.driving import flops_of_a_step
from textdiffusion.compare.gaming import GAMES, played
from textdiffusion.compare.judging import PUBLIC_TEXTS, PublicJudge
from textdiffusion.compare.measuring import accuracy, calls_of_a_bound, cost
from textdiffusion.compare.plan import Plan
from textdiffusion.compare.verdict import by_likelihood, by_samples, sentence
from textdiffusion.errors import UserError
from textdiffusion.presets import configure
from textdiffusion.process import as_network
from textdiffusion.run import build
from two_processes import said, two

HERE = Path(__file__).parent
FAMILIES = ["masked", "uniform", "autoregressive"]
SMALL = ["network.width=16", "network.heads=1", "training.batch=4", "training.evaluations=2", "training.precision=fp32"]
FLAGS = ["--families", ",".join(FAMILIES), "--steps", "4", "--depth", "1", "--length", "12", "--samples", "4",
         "--eval-tokens", "240", "--calls", "3,12", "--temperatures", "0.5,1"]  # fmt: skip
for _setting in SMALL:
    FLAGS += ["--set", _setting]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, and a comparison on it."""
    home = tmp_path_factory.mktemp("compare")
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("aeioubcdfg"), n)) for n in generator.integers(4, 8, 200)]
    (home / "my.txt").write_text(" ".join(generator.choice(words) for _ in range(1500)) + ".\n")
    assert main(["compare", "--data", str(home / "my.txt"), "--out", str(home / "first"), *FLAGS]) == 0
    return home


@pytest.fixture(scope="module")
def results(home):
    return json.loads((home / "first/results.json").read_text())


def test_results_say_what_they_are_of(results):
    assert list(results["rows"]) == FAMILIES
    protocol = results["protocol"]
    for key in ("tokenizer", "packing", "length", "bounds", "time_sampling", "sampling_precision", "seeds", "machine"):
        assert protocol[key]
    assert protocol["machine"]["torch"] == torch.__version__
    for name, row in results["rows"].items():
        assert row["likelihood"]["kind"] == ("exact" if name == "autoregressive" else "upper")
        assert row["training"]["steps"] == 4 and len(row["training"]["learning"]) == 2
        assert 0 <= row["accuracy"]["accuracy"] <= 1
        made = [body["calls"] for body in row["samples"]["by_calls"].values() if body]
        assert all(calls <= int(budget) for budget, calls in zip(("3", "12")[-len(made) :], made))
        # What was said beforehand holds.
        assert results["plan"]["samples"] * sum(made) < results["cost"]["sampling_calls"]
    assert results["rows"]["autoregressive"]["samples"]["by_calls"]["3"] is None
    assert results["rows"]["autoregressive"]["samples"]["fewest_calls"] == 12
    held = results["rows"]["masked"]["control"]["held"]
    assert held["satisfied"] == 1 and results["rows"]["masked"]["samples"]["word"] in held["texts"][0]


def test_interrupted_twice_and_run_again_is_the_same_report(home, results, monkeypatch, capsys):
    again = ["compare", "--from", str(home / "first/results.json"), "--out", str(home / "second")]

    def stopping(act):
        def steps(process, *arguments):
            for now in act(process, *arguments):
                if now.step == 2 and process.__class__.__name__ == "Uniform":
                    os.kill(os.getpid(), signal.SIGINT)
                yield now

        return steps

    with monkeypatch.context() as patch:
        from textdiffusion.training import fit

        patch.setattr(fit, "train", stopping(fit.train))
        assert main(again) == 130  # in the midst of a training
    assert not (home / "second/results.json").exists()
    measured = {path.stem for path in (home / "second/measured").iterdir()}
    assert measured == {"shared", "masked"}

    def of_the_judge(process, *arguments):
        for now in act(process, *arguments):
            if now.step == 2 and getattr(process.network, "ngrams", None) is not None:
                os.kill(os.getpid(), signal.SIGINT)
            yield now

    with monkeypatch.context() as patch:
        act = fit.train
        patch.setattr(fit, "train", of_the_judge)
        assert main(again) == 130  # in the midst of the judge's training, which alone has n-grams

    def interrupted(model, bench):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(measuring.PARTS, "control", interrupted)
        assert main(again) == 130  # in the midst of measuring
    assert not (home / "second/results.json").exists()

    capsys.readouterr()
    assert main(again) == 0
    said = capsys.readouterr().out
    assert "0 differences from" in said and "masked: likelihood" not in said  # kept, not measured again
    second = json.loads((home / "second/results.json").read_text())
    assert differences(results, second) == []
    for name in FAMILIES:
        curves = [[p["bits_per_char"] for p in r["rows"][name]["training"]["learning"]] for r in (results, second)]
        assert curves[0] == curves[1]
    pages = [(home / where / "index.html").read_text() for where in ("first", "second")]
    texts = [re.findall(r'class="text"[^>]*>([^<]*)<', page) for page in pages]
    assert texts[0] == texts[1] and len(texts[0]) == 2 * (2 + 3)


def same_but_for_processes(results, folder):
    """That two processes found what one did, but for the rounding of sums that more threads added, and say that they
    were two."""
    found = {d.place: d for d in differences(results, json.loads((folder / "results.json").read_text()))}
    for name in FAMILIES:
        assert found.pop(f"rows.{name}.training.processes").after == 2
    found.pop("protocol.machine.processor", None)  # says how many threads
    return all(d.after == pytest.approx(d.before, rel=1e-4) for d in found.values())


def test_two_processes_make_the_same_report(home, results):
    again = ["compare", "--from", home / "first/results.json", "--device", "cpu"]
    with two("-m", "textdiffusion", *again, "--out", home / "both") as processes:
        (code, text, errors), (other, more, others_errors) = said(processes)
    assert code == other == 0, errors + others_errors
    assert same_but_for_processes(results, home / "both") and (home / "both/index.html").exists()
    # Each family is trained once, and said once to be; the second process speaks of its own only.
    begun = re.findall(r"^(?:process 1: )?\[(\d) of 4\] (\w+)$", text + more, re.MULTILINE)
    assert sorted(begun) == [("1", "masked"), ("2", "uniform"), ("3", "autoregressive"), ("4", "judge")]
    assert more and all(line.startswith("process 1: ") for line in more.splitlines())
    assert "each at a family of its own" in (home / "both/index.html").read_text()


@pytest.mark.slow
def test_a_killed_process_holds_up_no_comparison(home, results):
    """SIGKILL of one of two processes in the midst of a training: the other ends, in one line; the same command goes
    on; another comparison in the same folder is refused, by both, in one line of the first's."""
    script, again = HERE / "stopping_train.py", ["compare", "--from", home / "first/results.json", "--device", "cpu"]
    for killed in ("1", "0"):
        command = [script, *again, "--out", home / f"killed-{killed}"]
        with two(*command, KILL_AT="2", KILL_RANK=killed) as processes:
            found = said(processes, 120)
        assert found[int(killed)][0] == -signal.SIGKILL
        code, _, errors = found[1 - int(killed)]
        assert code == 2 and "another process has ended" in errors and len(errors.splitlines()) == 1, errors
        assert not (home / f"killed-{killed}/results.json").exists()
        with two(*command) as processes:
            assert [code for code, _, _ in said(processes)] == [0, 0]
        assert same_but_for_processes(results, home / f"killed-{killed}")
    words = ["compare", "--data", home / "my.txt", "--out", home / "killed-1", *FLAGS, "--seed", "1"]
    with two("-m", "textdiffusion", *words) as processes:
        found = said(processes, 120)
    assert [code for code, _, _ in found] == [2, 2]
    assert [len(errors.splitlines()) for _, _, errors in found] == [1, 0] and "seed is 0 there" in found[0][2]


def test_what_differs_is_said(results):
    other = json.loads(json.dumps(results))
    likelihood = other["rows"]["masked"]["likelihood"]
    likelihood["bits_per_char"] += 3.0
    # Read on the same windows: the error is that of what two of them changed by, and not of what all have in common.
    likelihood["influence"][0] += 0.6
    likelihood["influence"][1] -= 0.8
    other["rows"]["masked"]["speed"]["seconds"] = 1e9
    other["protocol"]["machine"]["torch"] = "1.0"
    found = {d.place: d for d in differences(results, other)}
    assert list(found) == ["protocol.machine.torch", "rows.masked.likelihood.bits_per_char"]
    assert found["rows.masked.likelihood.bits_per_char"].errors == pytest.approx(3.0)
    assert '1.0" now' in str(found["protocol.machine.torch"])
    assert "standard errors" in str(found["rows.masked.likelihood.bits_per_char"])


def test_the_page_answers_and_needs_nothing_else(home, results):
    page = (home / "first/index.html").read_text()
    for budget in (3, 12):
        for ranking in (by_likelihood(results, budget), by_samples(results, budget)):
            assert '<p class="take"><i class="swatch" style="--c: var(--family-' in page
            assert f"{ranking.places[0].figure:.3f}" in page
    assert page.count('class="card panel"') == 2 and "needs 12 calls" in page
    assert "≤" in page and results["protocol"]["command"].split(" --")[1].replace("families ", "") in page
    assert (
        not re.search(r'(src|href|url)\s*[=(]\s*["\']?(https?:)?//', page)
        and "<script" not in page
        and "@import" not in page
    )
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    figures = {path.name for path in (home / "first/figures").iterdir()}
    assert figures == {f"{n}.{kind}" for n in ("calls", "learning", "arithmetic", "seconds", "frontier", "divergence")
                       for kind in ("svg", "png")}  # fmt: skip
    assert "#0102" not in page and "#0102" not in (home / "first/figures/calls.svg").read_text()


def test_too_short_a_text_is_refused_before_anything_is_trained(home, capsys):
    short = home / "short.txt"
    short.write_text((home / "my.txt").read_text()[:700])
    assert main(["compare", "--data", str(short), "--out", str(home / "none"), *FLAGS]) == 2
    assert "less than 4 whole windows" in capsys.readouterr().err
    assert not (home / "none/runs").exists()


def test_its_folder_takes_no_other_comparison(home, capsys):
    words = ["compare", "--data", str(home / "my.txt"), "--out", str(home / "first"), *FLAGS, "--seed", "1"]
    assert main(words) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--families", "masked,nonsense"], "no family 'nonsense'"),
        (["--families", "masked,masked"], "twice"),
        (["--calls", "8,4"], "rising order"),
        (["--calls", "many"], "numbers separated by commas"),
        (["--samples", "1"], "--samples must be"),
        (["--temperatures", "0.5"], "must hold 1"),
        (["--flops", "-1"], "--flops must be"),
        (["--set", "process.nonsense=1"], "none of the families has the field"),
        (["--out", "other"], "no comparison"),
        (["--from", "nowhere.json"], "there is no nowhere.json"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_text("something else")
    out = [] if "--out" in flags else ["--out", "new"]
    assert main(["compare", *flags, *out]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


# -- figures ------------------------------------------------------------------------------------------------------


def bench_of(windows, length, seed=0):
    """As much of a bench as guessing takes."""
    plan = dataclasses.replace(Plan(steps=1), length=length, seed=seed)
    return measuring.Bench(plan, None, None, windows, [], [], np.zeros(0), set(), [], None, 8, None)


def model_of(family, outputs, vocabulary, length):
    """A process around given outputs, as a model."""
    config = configure(family=family, length=length, depth=1, steps=1, settings=["network.width=16", "network.heads=1"])
    process = build(dataclasses.replace(config, vocabulary=vocabulary)).over(as_network(outputs))
    return type("Model", (), {"process": process, "device": "cpu"})()


@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_guesses_of_one_token_are_as_right_as_that_token_is_common(family):
    generator = np.random.default_rng(0)
    windows = [generator.choice(4, 16, p=[0.4, 0.3, 0.2, 0.1]) for _ in range(300)]
    always = torch.tensor([0.0, 9.0, 0.0, 0.0])
    found = accuracy(model_of(family, lambda x, t: always.expand(*x.shape, 4), 4, 16), bench_of(windows, 16))
    assert found["accuracy"] == pytest.approx(0.3, abs=4 * found["standard_error"])
    assert found["tokens"] == (300 * 4 if family == "autoregressive" else pytest.approx(300 * 16 * 2, rel=0.05))


def test_who_copies_the_state_guesses_nothing():
    """Where noise replaces tokens, a right one that stands there by chance is not counted: else copying would score."""
    windows = [np.random.default_rng(i).choice(4, 16) for i in range(60)]
    copy = lambda x, t: 50.0 * torch.nn.functional.one_hot(x, 4).float()  # noqa: E731
    model = model_of("uniform", copy, 4, 16)
    found = accuracy(model, bench_of(windows, 16))
    assert found["accuracy"] < 0.35  # 1/3 is chance among the tokens that are not there
    assert found["tokens"] == pytest.approx(60 * 16 * 2 * 3 / 4, rel=0.1)


def test_a_public_judge_reads_each_text_from_its_start(tmp_path):
    """Its nats are those of the model itself, text by text, whatever they are batched with."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "the", "cat", "sat", "on", "mat", "<unk>"]
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    small = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=7, initializer_range=0.5, **small)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    judge = PublicJudge(str(tmp_path))
    texts = ["the cat sat on the mat", "cat", "", "mat mat the sat on", *["the mat"] * 80]
    nats, sizes = judge.nats(texts, [])
    assert len(nats) == PUBLIC_TEXTS and sizes[:4].tolist() == [6, 1, 0, 5] and nats[2] == 0
    for text, found in zip(texts[:5], nats):
        ids = torch.tensor([[0, *(words.index(word) for word in text.split())]])
        law = model(ids).logits[0, :-1].log_softmax(-1)
        assert found == pytest.approx(-float(law.gather(-1, ids[0, 1:, None]).sum()), abs=1e-4)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        PublicJudge(str(tmp_path))
    with pytest.raises(UserError, match="own, none, smollm2"):
        Plan(minutes=1, judge="nobody")


def test_samplers_that_game_a_judge_are_what_they_say():
    tokens = np.arange(1000)
    for game in GAMES:
        for text in played(game, tokens, 32, 5, seed=0):
            steps = np.diff(text)
            jumps = int((steps != 1).sum())
            assert len(text) == 32 and jumps == {"copied": 0, "stitched": 3, "refrain": 7}[game]
    assert played("copied", tokens, 32, 1, 0)[0].tolist() != played("copied", tokens, 32, 1, 1)[0].tolist()


def test_yardsticks_are_given_away_by_what_stands_beside(results):
    found = results["yardsticks"]
    assert found["copied"]["copied"] == 1 > 0.8 > found["held-out text"]["copied"] >= 0
    assert found["held-out text"]["divergence"]["integral"] < found["refrain"]["divergence"]["integral"]
    for body in found.values():
        assert body["judged"]["perplexity"] == pytest.approx(np.exp(body["judged"]["nats_a_token"]))


def test_a_bound_whose_steps_remember_costs_its_calls():
    def process(family, *settings):
        small = ["network.width=16", "network.heads=1", *settings]
        config = configure(family=family, length=8, depth=1, steps=1, settings=small)
        return build(dataclasses.replace(config, vocabulary=5))

    window = np.zeros(8, dtype=np.int64)
    assert calls_of_a_bound(process("masked"), window, 6, "cpu") == 1
    assert calls_of_a_bound(process("analog_bits", "process.self_conditioning=0.5"), window, 6, "cpu") >= 6


def test_arithmetic_is_counted():
    config = configure(length=16, depth=1, steps=1, settings=["training.batch=4", "network.width=64"])
    config = dataclasses.replace(config, vocabulary=10)
    one = flops_of_a_step(config)
    weights = sum(p.numel() for p in build(config).network.blocks.parameters() if p.dim() == 2)
    attention = 12 * 16 * 64 * 16 * 4  # two products of L x L x D a head, forward, and twice that backward
    # Beside the blocks' matrices there are small ones: embeddings' products, the head on the hidden tokens.
    assert one == pytest.approx(6 * weights * 16 * 4 + attention, rel=0.15)
    twice = dataclasses.replace(config, training=dataclasses.replace(config.training, batch=8))
    assert flops_of_a_step(twice) == pytest.approx(2 * one, rel=0.01)


# -- verdict ------------------------------------------------------------------------------------------------------


def row(exact=None, bounds=(), error=0.01, infills=True, fewest=1):
    """A family's row with what the verdict reads."""
    kind = "upper" if exact is None else "exact"
    calls = None if exact is None else 64
    by_calls = [{"bits_per_char": b, "standard_error": error, "kind": "upper", "calls": t} for t, b in bounds]
    law = lambda b: {"integral": b / 10, "standard_error": error / 10}  # noqa: E731
    samples = {str(t): {"divergence": law(b), "calls": t, "seconds_a_text": 0.1} for t, b in bounds}
    head = {"bits_per_char": exact, "standard_error": error, "kind": kind, "calls": calls}
    return {
        "likelihood": head | {"by_calls": by_calls},
        "samples": {"by_calls": samples, "fewest_calls": fewest},
        "control": {"infilling": {"seen": "both sides" if infills else "the left side"}},
    }  # fmt: skip


def test_the_verdict_is_the_lowest_figure_at_the_budget():
    rows = {
        "masked": row(bounds=[(8, 3.0), (32, 2.5), (64, 2.4)]),
        "uniform": row(bounds=[(8, 2.8), (32, 2.51), (128, 2.6)]),
        "autoregressive": row(exact=2.0, infills=False, fewest=64),
    }
    few, middle, many = (by_likelihood({"rows": rows}, budget) for budget in (8, 32, 128))
    assert [p.family for p in few.places] == ["uniform", "masked"] and few.unable == {
        "autoregressive": "needs 64 calls"
    }
    assert few.lead == (pytest.approx(0.2), pytest.approx(0.01 * 2**0.5))
    assert sentence(few, "bits/char") == "uniform, ahead of masked by 0.200 ± 0.014 bits/char"
    assert [p.family for p in middle.tied] == ["masked", "uniform"]  # 0.01 apart
    assert "masked, level with uniform" in sentence(middle, "bits/char")
    assert [(p.family, p.calls) for p in many.places] == [("autoregressive", 64), ("masked", 64), ("uniform", 128)]
    assert many.best_infilling.family == "masked"
    assert [p.family for p in by_samples({"rows": rows}, 8).places] == ["uniform", "masked"]
    assert "no family can" in sentence(by_likelihood({"rows": {"a": row(exact=1.0)}}, 8), "bits/char")
    assert "the only one" in sentence(by_likelihood({"rows": {"a": row(exact=1.0)}}, 64), "bits/char")


def test_a_rough_figure_further_behind_is_not_called_the_second():
    rows = {"masked": row(bounds=[(8, 3.0)]), "uniform": row(bounds=[(8, 3.2)]), "block": row(bounds=[(8, 4)], error=1)}
    said = sentence(by_likelihood({"rows": rows}, 8), "bits/char")
    assert said == "masked, ahead of uniform by 0.200 ± 0.014 bits/char; the figure of block is too rough to tell"


def test_a_lead_on_the_same_windows_is_judged_window_by_window():
    near, far = row(bounds=[(8, 3.0)], error=0.5), row(bounds=[(8, 3.1)], error=0.5)
    rows = {"masked": near, "uniform": far}
    assert len(by_likelihood({"rows": rows}, 8).tied) == 2
    hard = np.random.default_rng(0).normal(0, 0.05, 100)  # what makes a window hard is the same for both
    near["likelihood"]["by_calls"][0]["influence"] = hard.tolist()
    far["likelihood"]["by_calls"][0]["influence"] = (hard + 0.001).tolist()
    ranking = by_likelihood({"rows": rows}, 8)
    assert ranking.lead == (pytest.approx(0.1), pytest.approx(0.01)) and len(ranking.tied) == 1


def test_the_influence_of_windows_makes_up_the_errors(results):
    for found in results["rows"].values():
        for figure in [found["likelihood"], *found["likelihood"]["by_calls"]]:
            error = float(np.square(figure["influence"]).sum() ** 0.5)
            assert error == pytest.approx(figure["standard_error"], rel=1e-4)


def test_the_cost_grows_with_what_is_asked():
    small, large = Plan(steps=1, samples=2), Plan(steps=1, samples=200)
    assert cost(small)["texts_written"] * 100 == cost(large)["texts_written"]
    assert cost(small)["sampling_calls"] < cost(large)["sampling_calls"]


def test_a_plan_says_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.txt").write_text("a text")
    plan = Plan(families=["masked"], minutes=0.5, calls=[4, 16], data="a b.txt", settings=["training.batch=8"])
    args = parser_of(ACTS).parse_args(shlex.split(plan.command())[1:])
    assert _plan(args) == plan


def test_a_sampler_that_cannot_be_held_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be held"):
        small_run(tmp_path / "bits", "analog_bits", 24).model.sample(1, must_contain="bright", sampler="ddim")


# -- docs/evaluation.md -------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.partition("  #")[0].partition(" # ")[0])[1:]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_the_commands_of_the_page_are_plans(home, monkeypatch):
    monkeypatch.chdir(home)
    assert len(COMMANDS) == 6
    for words in COMMANDS:
        args = parser_of(ACTS).parse_args(words)
        if args.results is None:
            assert _plan(args).families and args.out is not None


@pytest.mark.slow
def test_the_commands_of_the_page_run(home, monkeypatch, capsys):
    """As they stand, but for networks, budgets and what is written, which are small; the hub is not asked."""
    monkeypatch.chdir(home)
    for words in COMMANDS:
        if "hf:roneneldan/TinyStories" in words:
            words[words.index("hf:roneneldan/TinyStories")] = "my.txt"
        if "--from" not in words:
            for flag in ("--minutes", "--steps", "--flops"):
                if flag in words:
                    del words[words.index(flag) : words.index(flag) + 2]
            budget = ["--flops", "1e7"] if "reports/arithmetic" in words else ["--steps", "2"]
            if "--families" not in words and "reports/mine" not in words:
                words += ["--families", "masked,autoregressive"]  # all of them once is enough
            words += [*budget, *FLAGS[4:], "--tokenizer", "bpe:300" if "--tokenizer" in words else "char"]
        assert main(["compare", *words[1:]]) == 0, capsys.readouterr().err
    assert (home / "reports/mine-again/index.html").exists()


@pytest.mark.slow
def test_the_page_in_a_browser(home):
    """It opens offline, without an error, and nothing sticks out at either width, light or dark."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the path (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        grounds, wrong = set(), []
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            viewport = {"width": width, "height": 850}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
            tab = context.new_page()
            tab.on("console", lambda message: wrong.append(message.text))
            tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
            tab.goto(f"file://{home}/first/index.html", timeout=120_000)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            plots = tab.locator("figure svg").all()
            assert len(plots) == 6 and all(plot.bounding_box()["height"] > 150 for plot in plots)
            grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            context.close()
        assert wrong == []
        assert len(grounds) == 2
        browser.close()
