"""The Python API, prompts and templates, and texts longer than the window."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import textdiffusion as td
from textdiffusion.commands.cli import main
from textdiffusion.display.frames import BLANK, TextFrame
from textdiffusion.display.watching import painted, watch
from textdiffusion.families.uniform import Uniform, UniformConfig
from textdiffusion.mathematics.worlds import copy
from textdiffusion.report import report
from textdiffusion.sampling.reverse import Frame, sample
from textdiffusion.training.fit import Started, Stepped, Stopped, Validated
from textdiffusion.training.terminal import TrainingView, clock

ROOT = Path(__file__).parents[1]
SETTINGS = ["training.batch=8", "network.width=32", "network.heads=2"]


def example_of(name):
    """A file of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def masked(folder) -> td.Model:
    return td.train(folder / "masked", depth=1, steps=20, length=24, settings=SETTINGS)


@pytest.fixture(scope="module")
def pieces(folder) -> td.Model:
    return td.train(folder / "pieces", depth=1, steps=5, length=16, tokenizer="bpe:300", settings=SETTINGS)


@pytest.fixture(scope="module")
def autoregressive(folder) -> td.Model:
    return td.train(folder / "ar", family="autoregressive", depth=2, steps=60, length=16, settings=SETTINGS)


def test_saved_and_loaded_it_writes_the_same(masked, autoregressive, pieces, folder):
    for model, name in ((masked, "masked"), (autoregressive, "ar"), (pieces, "pieces")):
        again = td.load(folder / name)
        assert again.sample(n=3, seed=5) == model.sample(n=3, seed=5)
        x = torch.randint(0, 20, (2, 16))
        assert torch.equal(again.process.network(x), model.process.network(x))


def test_proofreading_mends_what_the_rest_of_the_text_contradicts(folder):
    """With the exact posterior of texts that repeat one token: the odd one out is put right, wherever it is."""
    text = folder / "letters.txt"
    text.write_text("".join("aeio"[i * i % 7 % 4] for i in range(2000)))
    model = td.train(
        folder / "uniform", family="uniform", data=str(text), depth=1, steps=1, length=4, settings=SETTINGS
    )
    size = model.tokenizer.vocabulary
    assert size < 8  # all texts of four are listed
    small = Uniform(None, UniformConfig(), size)
    ideal = td.Model(small.over(small.ideal(copy(size, 4).context)), model.tokenizer, model.config)
    ideal.writer = ideal.process
    assert ideal.proofread("aaea", strength=0.2) == "aaaa"
    assert ideal.proofread("eeee", strength=0.2) == "eeee"
    with pytest.raises(td.UserError, match="--strength"):
        ideal.proofread("aaaa", strength=0.0)
    # What the example counts, against this oracle: a single slip among four is mended, others are a matter of chance.
    example = example_of("proofreading")
    untouched = example.measure(ideal, 1e-9)
    assert untouched["wrong before"] == 0 and untouched["restored"] == 0
    figures = example.measure(ideal, 0.3)
    before, after = figures["wrong before"], figures["wrong after"]
    assert after == pytest.approx(before * (1 - figures["restored"]) + (1 - before) * figures["broken"])
    # The share of wrong ones among the tokens, whatever share of the noise is [MASK].
    for share in (0.0, 0.5):
        process = Uniform(None, UniformConfig(mask_share=share), size)
        kernel = process.kernel(0.0, process.time_of(0.3))[0, :size]
        assert 1 - kernel[0] / kernel.sum() == pytest.approx(0.3)
    assert Uniform(None, UniformConfig(mask_share=1.0), size).time_of(0.3) is None


def test_the_rate_penalty_is_a_part_of_what_eval_says(folder):
    """The example's bound is that of `eval`; that less the penalty is masked diffusion's: tests/test_truth.py."""
    how = {"data": None, "split": "validation", "calls": [], "sampler": None, "tokens": None, "draws": 1, "samples": 0}
    model = td.train(folder / "ratios", family="score_entropy", depth=1, length=16, steps=30, settings=SETTINGS)
    bound, penalty = example_of("rate_penalty").measure(model, draws=2)
    figure = report(model, **how, seed=1).likelihood.figure
    assert 0 < penalty < bound and abs(bound - figure.bits_per_char) < 6 * figure.standard_error


def test_loading_leaves_the_callers_randomness_alone(folder, masked):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    td.load(folder / "masked")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["masked", "autoregressive"])
def test_a_text_does_not_depend_on_how_many_are_written(name, request):
    model = request.getfixturevalue(name)
    many = model.sample(n=40, seed=3, calls=16, reproducible=True)  # more than are denoised together
    for n in (1, 2, 11):
        assert model.sample(n=n, seed=3, calls=16, reproducible=True) == many[:n]
    assert len(set(many)) > 30
    # Also where rows of a batch pause, and leave it, at moments of their own.
    how = {"seed": 3, "calls": 6, "reproducible": True} | ({"sampler": "ancestral"} if name == "masked" else {})
    assert model.sample(n=2, **how, prompt="The ") == model.sample(n=9, **how, prompt="The ")[:2]


def test_samples_are_made_in_the_precision_asked_for(folder, masked):
    exact, fast = (td.load(folder / "masked", precision=precision) for precision in ("fp32", "bf16"))
    assert exact.writer is exact.process
    assert {p.dtype for p in fast.writer.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fast.process.network.parameters()} == {torch.float32}  # for likelihoods
    x = torch.randint(0, 20, (2, 16))
    coarse, fine = fast.writer.network(x), exact.writer.network(x)
    assert coarse.dtype == torch.bfloat16
    assert 0 < (coarse - fine).abs().max() < 0.02 * fine.abs().max() + 0.02
    assert all(len(text) == 24 for text in fast.sample(n=3))
    with pytest.raises(td.UserError, match="--precision"):
        td.load(folder / "masked", precision="fp8")


def test_unasked_samples_are_made_in_the_precision_that_was_measured(folder, monkeypatch):
    for answer, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        asked = []
        monkeypatch.setattr("textdiffusion.model.fastest_precision", lambda on, a=answer, q=asked: q.append(on) or a)
        model = td.load(folder / "masked", device="cpu")
        assert not asked  # not before something is written
        model.sample(n=1, calls=2)
        assert {p.dtype for p in model.writer.network.parameters()} == {dtype}
        assert model.process.network.compute_dtype == torch.float32
        model.sample(n=2, calls=2)
        assert asked == [torch.device("cpu")]
    # What must not depend on the batch is in float32, whatever is faster.
    monkeypatch.setattr("textdiffusion.model.fastest_precision", lambda on: pytest.fail("measured for nothing"))
    assert td.load(folder / "masked", device="cpu").sample(n=1, calls=2, reproducible=True)


def test_what_samplers_go_by_can_be_set_when_sampling(folder, capsys):
    run = folder / "moved"
    td.train(run, family="analog_bits", depth=1, steps=5, length=16, settings=SETTINGS)
    how = {"n": 2, "calls": 6, "sampler": "ddim", "seed": 1}
    plain, same, moved = (
        td.load(run, settings=settings).sample(**how) for settings in ((), ["process.delta=0"], ["process.delta=3"])
    )
    assert plain == same != moved
    assert td.load(run, settings=["process.delta=3"]).process.grid == td.load(run).process.grid
    words = ["sample", str(run), "-n", "2", "--calls", "6", "--sampler", "ddim", "--seed", "1", "--json"]
    capsys.readouterr()
    assert main([*words, "--set", "process.delta=3"]) == 0
    assert [s["text"] for s in json.loads(capsys.readouterr().out)["samples"]] == moved
    for setting, line in (
        ("process.book=gray", "what can: process.churn, process.delta"),
        ("process.delta=-1", "process.delta must be from 0"),
        ("network.depth=2", "network.depth of a run of analog_bits cannot be changed"),
    ):
        assert main([*words, "--set", setting]) == 2 and line in capsys.readouterr().err
    # Nor is a setting left out without a word by another sampler.
    for sampler in ([], ["--sampler", "dpm"]):
        assert main(["sample", str(run), *sampler, "--set", "process.delta=3"]) == 2
        assert "process.delta is of the sampler ddim alone; add --sampler ddim" in capsys.readouterr().err


def test_infilling(masked, pieces):
    for text in masked.infill("a = ____\n__ b", n=3):
        assert text.startswith("a = ") and text[8] == "\n" and text.endswith(" b") and len(text) == 13
    for text in pieces.infill("The ____ is", n=2):
        assert text.startswith("The ") and text.endswith(" is")
    with pytest.raises(td.UserError, match="there is no gap"):
        masked.infill("nothing to do")
    with pytest.raises(td.UserError, match="never seen"):
        masked.infill("語 ____")
    with pytest.raises(td.UserError, match="cannot write 25"):
        masked.infill("_" * 25)


def test_prompts(masked, autoregressive):
    for model in (masked, autoregressive):
        assert all(t.startswith("The ") and len(t) == 16 for t in model.sample(n=2, length=16, prompt="The "))
        with pytest.raises(td.UserError, match="leaves none"):
            model.sample(n=1, length=4, prompt="The ")
    assert autoregressive.infill("The ____", n=1)[0].startswith("The ")  # a gap at the end is a prompt


def test_the_cache_is_used_and_changes_no_text(autoregressive):
    """A callable without a cache reads the whole prefix each time; the texts are the same up to rounding."""
    from textdiffusion.mathematics.noise import Noise

    network, reads = autoregressive.process.network, []

    class Watched:
        config = network.config
        empty_cache = staticmethod(network.empty_cache)

        def __call__(self, x, **how):
            reads.append(x.shape[1])
            return network(x, **how)

    def plain(x, positions=None, condition=None):
        return network(x, positions=positions)

    *_, cached = sample(autoregressive.process.over(Watched()), Noise.of(1, 5), 16, 16)
    assert reads == [1] * 16
    *_, uncached = sample(autoregressive.process.over(plain), Noise.of(1, 5), 16, 16)
    assert torch.equal(cached.tokens, uncached.tokens)


def test_texts_longer_than_the_window_forget_the_oldest_half(autoregressive):
    from textdiffusion.mathematics.noise import Noise

    process = autoregressive.process
    *_, last = sample(process, Noise.of(2, 3), 41, 41)
    assert (last.tokens >= 0).all() and (last.calls == 41).all()
    # Each token's confidence is the network's probability given what was kept: checked by reading the text anew.
    tokens = last.tokens
    start = 0
    for i in range(41):
        if i - start >= 16:
            start = i - 8
        window = tokens[:, start : i + 1]
        inputs = torch.cat((torch.full((3, 1), process.start), window[:, :-1]), 1)
        with torch.no_grad():
            p = process.network(inputs)[:, -1].softmax(-1).gather(-1, tokens[:, i : i + 1]).squeeze(-1)
        assert torch.allclose(p.double(), last.confidence[:, i], atol=1e-5)


def test_rows_with_different_prompts(autoregressive, masked):
    """Prompts of other lengths, and one row with nothing to write, share a batch and change nothing for the others."""
    from textdiffusion.mathematics.noise import Noise

    for model in (autoregressive, masked):
        tokens = torch.randint(0, 30, (4, 12))
        given = torch.arange(12) < torch.tensor([[0], [3], [7], [12]])
        for sampler in model.process.steps:
            *_, together = sample(model.process, Noise.of(4, 4), 12, 12, sampler=sampler, tokens=tokens, given=given)
            assert torch.equal(together.tokens[given], tokens[given])
            most = torch.tensor([12, 9, 5, 0])
            # Steps that change nothing in a row are not evaluated for it; some may be needed to mend what is shown.
            few = sampler in ("ancestral", "remask", "psi")
            assert (together.calls <= 12).all() if few else torch.equal(together.calls, most)
            for row in range(3):
                noise = Noise.of(4, 4).select([row])
                *_, alone = sample(
                    model.process,
                    noise,
                    12,
                    12,
                    sampler=sampler,
                    tokens=tokens[row : row + 1],
                    given=given[row : row + 1],
                )
                if model is masked or row == 0:  # left to right, the draw at a position is keyed by the call
                    assert alone.calls[0] == together.calls[row]
                assert torch.equal(alone.tokens[0][given[row]], tokens[row][given[row]])


def test_scores(masked, autoregressive):
    text = "The value of the object is returned."
    for model in (masked, autoregressive):
        bits = model.score(text)
        assert 1 < bits < 10
        assert bits < model.score("qzj xkv wqp zzk qqx jjv kkz wxq vvj")
    with pytest.raises(td.UserError, match="never seen"):
        masked.score("語")
    with pytest.raises(td.UserError, match="no text"):
        masked.score("")


def test_temperature_and_top_p(masked):
    assert len(set(masked.sample(n=6, calls=24, temperature=0.0, sampler="confidence"))) == 1
    assert len(set(masked.sample(n=6, calls=24))) == 6
    assert masked.sample(n=2, temperature=1e-45) == masked.sample(n=2, temperature=0.0)
    cold, warm = (
        sum(f.frame.confidence.mean() for f in masked.stream(8, temperature=t) if f.frame.step == f.frame.of)
        for t in (0.3, 1.0)
    )
    assert cold > warm
    assert masked.sample(n=1, top_p=0.5)


def test_frames_can_be_read(masked, pieces):
    for model in (masked, pieces):
        frames = list(model.stream(2, calls=4))
        assert frames[0].texts[0] == BLANK * model.window and BLANK not in frames[-1].texts[0]
        assert [f.frame.step for f in frames] == [0, 1, 2, 3, 4]
        assert len(frames[2].pieces[0]) == model.window


def test_watching_in_a_terminal_and_over_a_pipe(masked, capsys):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    how = {"calls": 3, "sampler": "random", "infill": "a ____ b"}
    texts = watch(masked.stream(2, **how), console, seconds=0.01)
    assert texts == masked.sample(2, **how)
    assert "noise 0.50 · 2 calls" in out.getvalue()
    assert masked.watch(1, calls=3) == masked.sample(1, calls=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and BLANK in lines[0] and BLANK not in lines[-1]
    last = list(masked.stream(1, infill="a ____ b"))[-1]
    styles = {str(span.style) for span in painted(last, 0).spans}
    assert "bold underline" in styles and len(styles) >= 2


def test_a_text_is_shown_to_its_end_once_it_has_ended(masked, capsys):
    end, (a, b) = masked.tokenizer.end_of_text, masked.tokenizer.encode("ab")
    tokens = torch.tensor([[a, b, end, -1], [a, -1, end, -1], [end, a, b, -1], [a, b, a, end]])
    frame = Frame(3, 8, 0.5, tokens, torch.ones(4, 4), torch.full((4,), 3))
    stopping = TextFrame(frame, torch.zeros(4, 4, dtype=torch.bool), masked.tokenizer, stop=True)
    assert stopping.texts == ["ab", f"a{BLANK}\n\n{BLANK}", f"\n\nab{BLANK}", "aba"]
    assert stopping.pieces[0] == ["a", "b"]
    going_on = replace(stopping, stop=False)
    assert going_on.texts[0] == f"ab\n\n{BLANK}"
    # Over a pipe the last frame is printed, wherever it stops.
    assert watch(iter([stopping]))[0] == "ab"
    assert capsys.readouterr().out.splitlines()[0].endswith("  ab")


def test_a_notebook_shows_one_panel_that_changes(masked, monkeypatch):
    """Needs no widgets: one display, updated in place, and nothing beside it."""
    shown = []

    class Handle:
        def update(self, page):
            shown.append(page)

    def display(page, display_id=None):
        assert display_id and not shown
        shown.append(page)
        return Handle()

    stand_in = types.ModuleType("IPython.display")
    stand_in.HTML, stand_in.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    texts = watch(masked.stream(1, infill="a ____ b", calls=3), Console(force_jupyter=True), seconds=0)
    assert len(shown) == 4 and "noise\u00a01.00" in shown[0] and "░" in shown[0] and "noise\u00a00.00" in shown[-1]
    assert texts == masked.infill("a ____ b", calls=3)


def test_the_training_view_in_a_terminal():
    from textdiffusion.evaluation.measures import Figure

    out = io.StringIO()
    figure = Figure(2.5, 0.01, "upper", "random", None)
    with TrainingView(Console(file=out, force_terminal=True, width=100)) as view:
        view.show(Started("runs/x", "masked", 10**6, 50, 10**6, 10**5, "bf16", "char tokenizer", resumed_at=7))
        view.show(Stepped(8, 0.5, 1.25, 1000.0, 3.0, 65.0))
        view.show(Validated(8, figure, True, "a\nb", None))
        view.show(Validated(9, figure, False, None, 8))
        view.show(Stopped("runs/x", 9, 3.0, 2.5, signal=2))
    text = out.getvalue()
    for part in (
        "1.00 M",
        "step 7",
        "objective 1.250",
        "1:05 left",
        "<= 2.500 +- 0.010",
        "a⏎b",
        "over-fitting",
        "--resume",
    ):
        assert part in text, part
    assert clock(3725) == "1:02:05"


def test_over_fitting_is_seen_and_the_best_weights_kept(folder, tmp_path):
    """A tiny text, learnt by heart: the held-out figure rises, which is said, and the run keeps its best weights."""
    from textdiffusion.presets import configure
    from textdiffusion.training.fit import fit

    text = tmp_path / "small.txt"
    once = "the quick brown fox jumps over the lazy dog while seven wizards vex a big jolly queen. "
    text.write_text(once + "pack my box with five dozen liquor jugs, and how daft zebras jump at night! " * 2)
    config = configure(
        data=str(text), family="autoregressive", length=12, depth=2, steps=300,
        settings=["training.batch=16", "network.width=64", "network.heads=2"],
    )  # fmt: skip
    events = [e for e in fit(config, tmp_path / "r") if isinstance(e, Validated)]
    figures = [e.figure.bits_per_char for e in events]
    best = min(figures)
    assert figures[-1] > best
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert min(line["bits_per_char"] for line in lines) == best
    assert [e.best for e in events].count(True) >= 1 and not events[-1].best


def test_training_refuses_a_text_that_changed(tmp_path):
    from textdiffusion.run import Run
    from textdiffusion.training.fit import fit

    text = tmp_path / "t.txt"
    text.write_text("one two three four five six seven " * 200)
    td.train(tmp_path / "r", data=str(text), depth=1, steps=2, length=16, settings=SETTINGS)
    text.write_text("something else altogether, of the same author " * 200)
    with pytest.raises(td.UserError, match="is not the one this run was trained on"):
        list(fit(Run.open(tmp_path / "r").config, tmp_path / "r", resume=True))


def test_devices():
    from textdiffusion.loading import pick_device

    assert pick_device("auto") in ("cpu", "cuda")
    with pytest.raises(td.UserError):
        pick_device("mps")
    if not torch.cuda.is_available():
        with pytest.raises(td.UserError, match="no CUDA GPU"):
            pick_device("cuda")


def test_the_demo(tmp_path, monkeypatch, capsys):
    """What `make demo` runs, with a second to learn in."""

    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--minutes", "0.03"]) == 0
    out = capsys.readouterr().out
    assert "what this is, and is not" in out and "runs/demo" in out and "░" in out
    assert (tmp_path / "runs" / "demo" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_wheel_installs_and_runs_the_demo_elsewhere(tmp_path):
    """Built, installed without this checkout in a clean environment, and run from another folder."""
    import os
    import subprocess

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, cwd=None):
        return subprocess.run(
            [*map(str, arguments)], check=True, capture_output=True, text=True, cwd=cwd, env=clean
        )  # fmt: skip

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    out = run(tmp_path / "venv" / "bin" / "textdiffusion", "demo", "--minutes", "0.1", cwd=tmp_path).stdout
    assert "runs/demo" in out
    where = run(python, "-c", "import textdiffusion; print(textdiffusion.__file__)", cwd=tmp_path).stdout
    assert str(tmp_path) in where
