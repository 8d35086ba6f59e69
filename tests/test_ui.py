"""The page without a browser: what is shown of frames, how fast, for how long, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import textdiffusion as td
from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.display.frames import BLANK, TextFrame, degree, revises, visible
from textdiffusion.display.replay.canvas import canvas, error, head, legend, player, replay_page, row_html, style
from textdiffusion.display.replay.recording import Panel, Recording, difference, replayed
from textdiffusion.errors import UserError
from textdiffusion.process import as_network
from textdiffusion.sampling.reverse import Frame
from textdiffusion.ui import acts, inside
from textdiffusion.ui.acts import Wish, calls_of, chosen_words, marked
from textdiffusion.ui.door import READY, Door
from textdiffusion.ui.loaded import MOST_TEXTS, Loaded, load_runs
from textdiffusion.ui.streaming import LONGEST, OVERHEAD, Jobs, Pace, in_words, show, told

FAMILIES = ("masked", "uniform", "block", "autoregressive")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Loaded]:
    """A small run of each kind: hides, replaces, writes from left to right in blocks, or token by token."""
    folder = tmp_path_factory.mktemp("runs")
    return {family: small_run(folder / family, family, 24) for family in FAMILIES}


def recording_in(page: str) -> dict:
    """What a player carries with it."""
    import html

    return json.loads(html.unescape(re.search(r'class="td-recording">(.*?)</div>', page, re.DOTALL)[1]))


def said(page: str) -> str:
    """The one line of an error."""
    line = re.search(r'class="td-error" role="alert">(.*?)</p>', page, re.DOTALL)[1]
    assert "\n" not in line and "Traceback" not in line
    return line


def frame_of(tokenizer, tokens, confidence, given, t, stop=False) -> TextFrame:
    row = lambda values, dtype: torch.tensor([values], dtype=dtype)  # noqa: E731
    frame = Frame(3, 10, t, row(tokens, torch.long), row(confidence, torch.float64), torch.tensor([3]))
    return TextFrame(frame, row(given, torch.bool), tokenizer, stop)


# -- cells --------------------------------------------------------------------------------------------------------


def test_every_state_of_a_character_has_its_code(runs):
    tokenizer = runs["masked"].model.tokenizer
    a = tokenizer.encode("a")[0]
    # Nothing there, a symbol of the noise, given, and three degrees of confidence.
    frame = frame_of(tokenizer, [-1, a, a, a, a, a], [0, 0, 1, 0.1, 0.5, 0.9], [0, 0, 1, 0, 0, 0], 0.5)
    assert frame.cells == [[("n", BLANK), ("n", "a"), ("g", "a"), ("c0", "a"), ("c1", "a"), ("c2", "a")]]
    codes = lambda frame: [code for code, _ in frame.cells[0]]  # noqa: E731
    revised = replace(frame, tentative=True)
    assert codes(revised) == ["n", "n", "g", "t0", "t1", "t2"]
    last = replace(revised, frame=replace(frame.frame, t=0.0))
    assert codes(last) == ["n", "n", "g", "c0", "c1", "c2"]  # nothing changes after t = 0
    assert [degree(p) for p in (0, 0.2499, 0.25, 0.5999, 0.6, 1)] == [0, 0, 1, 1, 2, 2]


def test_only_noise_that_replaces_leaves_tokens_tentative(runs):
    assert {family: revises(run.model.process) for family, run in runs.items()} == {
        "masked": False, "uniform": True, "block": False, "autoregressive": False,
    }  # fmt: skip


def test_a_row_of_html_says_what_the_cells_say():
    row = [("g", "<b>"), ("g", "&\"'"), ("n", BLANK), ("c0", "x\n")]
    assert row_html(row) == f'<span class="g">&lt;b&gt;&amp;&quot;&#x27;</span><span class="n">{BLANK}</span>' + (
        '<span class="c0">x\n</span>'
    )
    assert visible("a\nb\x00\x1b") == "a⏎\nb\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert visible("日本\té🙂\u00a0\n") == "日本\té🙂\u00a0⏎\n"


def test_characters_of_several_bytes_and_marks_come_out_whole():
    from textdiffusion.text.tokenizer import build

    tokenizer = build("byte", ["abc"])
    ids = tokenizer.encode("é日b")
    row = lambda tokens: frame_of(tokenizer, tokens, [0.9] * len(tokens), [0] * len(tokens), 0.0).cells[0]  # noqa: E731
    assert [text for _, text in row(ids)] == ["é", "", "日", "", "", "b"]
    # A byte is missing: nothing is made up.
    assert [text for _, text in row([ids[0], -1, *ids[2:4], ids[5]])] == ["\\xc3", BLANK, "\\xe6", "\\x97", "b"]
    assert [text for _, text in row([tokenizer.end_of_text, ids[5]])] == [tokenizer.end_token, "b"]
    # A combining mark never stands on what is not written yet.
    letters = build("char", ["e\u0301"])
    e, accent = letters.encode("e\u0301")
    shown = frame_of(letters, [-1, accent, e, accent], [0, 0.9, 0.9, 0.9], [0] * 4, 0.5).cells[0]
    assert [text for _, text in shown] == [BLANK, "◌\u0301", "e", "\u0301"]


def test_differences_are_marked_in_the_new_text():
    row = difference("It wes a dey", "It was a day!")
    assert "".join(text for _, text in row) == "It was a day!"
    assert [text for code, text in row if code == "e"] == ["a", "a", "!"]
    assert difference("same", "same") == [("g", "same")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_gives_every_frame_back(runs, family):
    run = runs[family]
    panel, seen = Panel("p"), []
    stop = {"stop": True} if run.stops else {}
    for frame in run.model.stream(3, prompt="It", calls=8, seed=3, **stop):
        panel.add(frame, 0.01)
        seen.append(frame.cells)
    body = json.loads(Recording([panel]).to_json())["panels"][0]
    again = replayed(body["steps"])
    assert [[[tuple(cell) for cell in row] for row in rows] for rows in again] == seen
    assert body["texts"] == frame.texts and body["steps"][-1]["calls"] == frame.frame.calls.tolist()
    assert body["seconds"] == pytest.approx(0.01 * len(seen))
    # What hides and stays once written is told in one change a token.
    if family == "masked":
        changes = sum(len(row) - 1 for step in body["steps"] for row in step["rows"])
        assert changes == 3 * (24 + 22)


def test_what_is_sent_stands_for_itself(runs):
    """No address in anything that is sent: neither a font nor a script is fetched."""
    panel = Panel("a title with </script> and <b>")
    for frame in runs["masked"].model.stream(1, prompt="It", calls=2):
        panel.add(frame, 0.0)
    body = player(Recording([panel], {"text": "</div><script>alert(1)</script>"}))
    for page in (body, replay_page(body), head(), canvas([panel])):
        assert not re.search(r"(https?:)?//[a-z0-9]", re.sub(r"(?m)^\s*//.*$", "", page)), "an address"
        assert "@import" not in page and "url(" not in page
    assert "<script>alert" not in body and "<b>" not in body and body.count("</div>") == body.count("<div")
    assert recording_in(body)["settings"]["text"] == "</div><script>alert(1)</script>"
    assert (
        replay_page(body).count("<script>") == 1
        and "</script" not in head().split("window.tdShell")[1].split("\n(() =>")[0]
    )


# -- colours ------------------------------------------------------------------------------------------------------


def palettes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r"^(\.td|\.dark \.td) \{(.*?)\}", style(), re.DOTALL | re.MULTILINE)
    return {name: dict(re.findall(r"--td-([a-z-]+): (#[0-9a-f]{6})", body)) for name, body in blocks}


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(rgb: np.ndarray) -> float:
    return float(np.clip(rgb, 0, 1) @ [0.2126, 0.7152, 0.0722])


# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),  # noqa: E501
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),  # noqa: E501
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("mode", [".td", ".dark .td"])
@pytest.mark.parametrize("eyes", BLIND)
def test_colours_can_be_read_and_told_apart_by_all(mode, eyes):
    colours = {name: luminance(BLIND[eyes] @ linear(value)) for name, value in palettes()[mode].items()}

    def contrast(a: str, b: str) -> float:
        low, high = sorted((colours[a], colours[b]))
        return (high + 0.05) / (low + 0.05)

    for name in ("unsure", "likely", "sure", "mended"):
        assert contrast(f"{name}-back", f"{name}-ink") >= 4.5, name  # WCAG AA
    assert contrast("page", "ink") >= 7 and contrast("page", "soft") >= 4.5
    # The more sure, the lighter: by the ground in light mode, by the letters in dark mode.
    part = "back" if mode == ".td" else "ink"
    assert contrast(f"unsure-{part}", f"likely-{part}") >= 1.25 and contrast(f"likely-{part}", f"sure-{part}") >= 1.25
    assert colours[f"unsure-{part}"] < colours[f"likely-{part}"] < colours[f"sure-{part}"]


def test_every_state_has_a_style_and_the_legend_names_those_that_occur():
    for code in ("n", "g", "c0", "c1", "c2", "t0", "t1", "t2", "e"):
        assert re.search(rf"\.td \.{code}[ ,]", style()), code
    assert "tentative" in legend(["t0"]) and "sure" in legend(["t0"]) and "tentative" not in legend(["c1", "g"])
    assert "given" not in legend(["n"])


# -- streaming ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("making, showing, size", [(0.001, 0.002, 5_000), (0.01, 0.3, 9_000), (0.005, 0.001, 100_000)])
def test_showing_takes_a_bounded_share_of_the_time_and_of_the_link(making, showing, size):
    """A slow machine (300 ms a frame) and a slow link (100 kB a frame) are shown fewer frames, not made to wait."""
    clock, shown = Clock(), 0
    pace = Pace(clock=clock)
    while clock.now < 20:
        clock.now += making
        if pace.due():
            before = clock.now
            clock.now += showing
            pace.shown(before, size)
            shown += 1
    assert pace.spent == pytest.approx(shown * showing)
    assert pace.spent / clock.now <= OVERHEAD + 0.02
    assert shown * size / clock.now <= 260_000 and shown / clock.now <= 1 / pace.interval + 1
    assert shown >= 5  # and something is to be seen


def test_stopping_stops_the_network(runs):
    run, flag, made = runs["block"], threading.Event(), []

    def counted():
        for frame in run.model.stream(1, 200, seed=1):
            made.append(frame)
            if len(made) == 20:
                flag.set()
            yield frame

    pages = list(show(Recording([Panel("p")]), [counted()], flag))
    assert len(made) == 20  # of 201
    body = recording_in(pages[-1])
    assert body["note"].startswith("Stopped:") and len(body["panels"][0]["steps"]) == len(made)
    assert BLANK in body["panels"][0]["texts"][0]


def test_a_job_has_its_time_and_then_it_is_the_next_ones_turn(runs, monkeypatch):
    assert 10 <= LONGEST <= 600
    monkeypatch.setattr("textdiffusion.ui.streaming.LONGEST", 0.2)
    endless = (frame for _ in itertools.count() for frame in runs["block"].model.stream(1, 4))
    *_, last = show(Recording([Panel("p")]), [endless], threading.Event())
    assert recording_in(last)["note"].startswith("Stopped after 0 s, so that others have a turn")


def test_panels_of_different_length_end_together(runs):
    run, order = runs["masked"], []

    def noted(name, calls):
        for frame in run.model.stream(1, calls=calls):
            order.append((name, frame.frame.step / frame.frame.of))
            yield frame

    recording = Recording([Panel("few"), Panel("many")])
    list(show(recording, [noted("few", 3), noted("many", 24)], threading.Event()))
    done = {"few": 0.0, "many": 0.0}
    for name, share in order:
        done[name] = share
        assert abs(done["few"] - done["many"]) <= 1 / 3 + 1e-9
    assert [len(panel.steps) for panel in recording.panels] == [4, 25]


def test_jobs_are_their_visitors_own():
    jobs = Jobs()
    one, other = jobs.begin("one"), jobs.begin("other")
    jobs.stop("one")
    assert one.is_set() and not other.is_set()
    again = jobs.begin("one")  # the first one has not ended yet
    jobs.end("one", one)
    jobs.halt("nobody")
    assert len(jobs) == 2 and not again.is_set()
    jobs.end("one", again)
    jobs.end("other", other)
    assert len(jobs) == 0


def test_whatever_goes_wrong_is_one_line_on_the_page(caplog):
    def fails(reason):
        def pages(stop):
            yield "a page"
            raise reason

        return list(told(pages, threading.Event()))

    first, last = fails(UserError("--length must be from 1 to 10;\nuse --prompt <b>"))
    assert first == "a page" and said(last) == "length must be from 1 to 10; use prompt &lt;b&gt;"
    assert "memory" in said(fails(MemoryError())[-1])
    assert "ZeroDivisionError" in said(fails(ZeroDivisionError("secret path"))[-1])
    assert "secret path" not in fails(ZeroDivisionError("secret path"))[-1] and "secret path" in caplog.text
    assert in_words("-n must be 1, not -2; give --top-p (or leave out --stop).") == (
        "the number of texts must be 1, not -2; give top p (or leave out stop)."
    )
    assert said(error("a\nb")) == "a b"


# -- acts ---------------------------------------------------------------------------------------------------------


def written(pages) -> dict:
    *_, last = pages
    return recording_in(last)


def test_writing_is_what_the_library_writes(runs):
    run = runs["masked"]
    wish = Wish("It was a ____ day", n=2, sampler="margin", temperature=0.7, top_p=0.9, seed=5)
    body = written(acts.write(run, wish, threading.Event()))
    assert body["panels"][0]["texts"] == run.model.sample(
        2, infill="It was a ____ day", sampler="margin", temperature=0.7, top_p=0.9, seed=5
    )
    begun = written(acts.write(run, Wish("a\\_b", length=10, seed=2), threading.Event()))
    sampler, _ = run.model.recommended(7, 7)  # one call for each token that is not given
    assert begun["panels"][0]["texts"][0].startswith("a_b") and begun["panels"][0]["title"] == f"masked · {sampler}"
    free = written(acts.write(runs["block"], Wish("", length=30, calls="6", seed=2), threading.Event()))
    assert free["panels"][0]["texts"] == runs["block"].model.sample(1, 30, 6, seed=2)


def test_comparing_has_the_same_draws_and_names_the_panels(runs):
    columns = [(runs["masked"], "random"), (runs["uniform"], "bridge"), (runs["masked"], "margin")]
    body = written(acts.compare(columns, Wish("It ____ was", n=1, seed=4), threading.Event()))
    assert [panel["title"] for panel in body["panels"]] == ["masked · random", "uniform · bridge", "masked · margin"]
    for panel, (run, sampler) in zip(body["panels"], columns):
        assert panel["texts"] == run.model.sample(1, infill="It ____ was", sampler=sampler, seed=4)
    with pytest.raises(UserError, match="twice"):
        list(acts.compare([columns[0], columns[0]], Wish(length=24), threading.Event()))


def test_marks_and_random_words_say_what_is_rewritten():
    assert marked("A [[bright]] [[cold]] day") == [
        ("A ", False), ("bright", True), (" ", False), ("cold", True), (" day", False),
    ]  # fmt: skip
    with pytest.raises(UserError, match="marked"):
        marked("A [bright] day")
    text = "Prince Andrew looked at her with  a smile.\nHe was silent."
    for share, seed in ((0.05, 0), (0.4, 1), (0.8, 2), (1.0, 3)):
        parts = chosen_words(text, share, seed)
        assert "".join(piece for piece, _ in parts) == text and parts == chosen_words(text, share, seed)
        taken, letters = sum(len(p) for p, chosen in parts if chosen), sum(not c.isspace() for c in text)
        assert share * letters <= taken < share * letters + len("silent.") + 1 or (share == 1 and taken == letters)
        assert not any(c.isspace() for piece, chosen in parts if chosen for c in piece)
    for text, share in (("  ", 0.5), ("a b", 0.0)):
        with pytest.raises(UserError):
            chosen_words(text, share, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewriting_keeps_what_is_not_marked(runs, family):
    text = "It was a_[[bright]] day"
    body = written(acts.rewrite(runs[family], marked(text), Wish(text, n=2, seed=1), threading.Event()))
    rows = replayed(body["panels"][0]["steps"])[-1]
    for row in rows:
        assert [code == "g" for code, _ in row] == [True] * 9 + [False] * 6 + [True] * 4
        assert "".join(piece for code, piece in row if code == "g") == "It was a_ day"
    new = ["".join(piece for code, piece in row if code != "g") for row in rows]
    assert body["note"] == "Rewritten: " + "; ".join(f"bright → {part}" for part in new)
    with pytest.raises(UserError, match="backslash"):
        list(acts.rewrite(runs["masked"], marked("a\\[[b]]"), Wish(), threading.Event()))
    # Marks that touch are told apart.
    body = written(acts.rewrite(runs[family], marked("It [[wa]][[s]] a"), Wish(seed=1), threading.Event()))
    new = body["panels"][0]["texts"][0]
    assert body["note"] == f"Rewritten: wa → {visible(new[3:5])}, s → {visible(new[5:6])}" and new[:3] == "It "


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_text_is_renoised_as_by_the_library(runs, family):
    run, text = runs[family], "It was a bright day"
    wish = Wish(text, n=2, length=1, seed=3)
    body = written(acts.renoise(run, wish, 0.3, threading.Event()))
    texts = body["panels"][0]["texts"]
    assert texts == run.model.sample(2, edit=text, strength=0.3, seed=3)
    assert body["note"].startswith("Kept of the characters: ")
    assert all(new[:9] == text[:9] for new in texts) == (not run.model.process.infills)  # from its end
    for text, strength, reason in (("", 0.3, "paste some"), ("It", 2.0, "0 to 1"), ("a" * 20_001, 0.3, "at most")):
        with pytest.raises(UserError, match=reason):
            list(acts.renoise(run, Wish(text), strength, threading.Event()))


def test_labels_and_guidance_are_handed_on(runs, monkeypatch):
    run, asked = runs["masked"], []
    stream = type(run.model).stream

    def noted(self, label=None, guidance=0.0, **how):
        asked.append({"label": label, "guidance": guidance})
        return stream(self, **how)

    monkeypatch.setattr(type(run.model), "stream", noted)
    for wish in (Wish(length=24, label="war", guidance=2.0), Wish(length=24, guidance=2.0)):
        list(acts.write(run, wish, threading.Event()))
    assert [(how["label"], how["guidance"]) for how in asked] == [("war", 2.0), (None, 0.0)]


def test_proofreading_is_the_librarys_and_refused_with_a_reason(runs):
    text = "The first day of it"
    body = written(acts.proofread(runs["uniform"], text, 0.3))
    assert body["panels"][0]["texts"] == [runs["uniform"].model.proofread(text, 0.3)]
    with pytest.raises(UserError, match="only hides"):
        list(acts.proofread(runs["masked"], text, 0.3))
    with pytest.raises(UserError, match="no text"):
        list(acts.proofread(runs["uniform"], " ", 0.3))


@pytest.mark.parametrize(
    "wish, reason",
    [
        ({"n": MOST_TEXTS + 1}, "1 to 8 texts"),
        ({"n": 0}, "1 to 8 texts"),
        ({"length": 25}, "24 tokens"),
        ({"text": "_" * 30_000}, "at most 20,000"),
        ({"text": "_" * 9_000}, "more than the 8,192"),
        ({"text": "It was \N{SNOWMAN}"}, "never seen"),
        ({"calls": "1e9"}, "calls are"),
        ({"calls": "0"}, "calls are"),
        ({"sampler": "nonsense"}, "no sampler"),
        ({"temperature": -1.0}, "temperature must"),
    ],
)
def test_what_would_take_the_machine_down_is_refused(runs, wish, reason):
    wish = Wish(**{"length": 24} | wish)
    pages = list(told(lambda stop: acts.write(runs["masked"], wish, stop), threading.Event()))
    assert len(pages) == 1 and reason in said(pages[0])


def test_particles_count_in_what_is_refused(runs):
    wish = Wish("a" + "_" * 500 + "b", n=8)
    pages = list(told(lambda stop: acts.write(runs["block"], wish, stop), threading.Event()))
    assert "by 16 particles each" in said(pages[0])


def test_a_pattern_is_kept_and_one_too_large_is_refused_in_time(runs):
    for family in ("masked", "block"):
        body = written(acts.write(runs[family], Wish(n=2, length=24, calls="8", regex="[a-z ]+!"), threading.Event()))
        assert all(re.fullmatch("[a-z ]+!", text) for text in body["panels"][0]["texts"]), family
    for regex, reason in (
        ("(a|b)*a(a|b){30}", "too many states"),
        ("[", "not a regular expression"),
        ("x" * 201, "at most 200"),
    ):
        act = partial(acts.write, runs["masked"], Wish(length=24, regex=regex))
        pages = list(told(act, threading.Event()))
        assert len(pages) == 1 and reason in said(pages[0]), regex


def test_calls_are_a_number_or_one_a_token():
    assert calls_of("one a token") is None and calls_of("") is None and calls_of(" 16 ") == 16


# -- what a run can do --------------------------------------------------------------------------------------------


def test_a_run_says_what_it_can_do_and_why_not(runs):
    masked, uniform, block, left_to_right = (runs[family] for family in FAMILIES)
    assert uniform.no_proofreading == "" and "--family uniform" in masked.no_proofreading
    assert (masked.longest, block.longest) == (24, 1024) and block.stops and not masked.stops
    assert masked.takes_calls and uniform.takes_calls and block.takes_calls and not left_to_right.takes_calls
    assert masked.samplers[0] == "random" and "Window of 24" in masked.describe()
    assert any("____" in text for text in masked.examples()) and any("____" in text for text in block.examples())
    assert "1 to 24 tokens" in masked.count("", 25) and "1 to 1,024 tokens" in block.count("abc", 10**12)
    assert masked.count("", 20) == "Nothing given: 20 tokens to write."
    assert masked.count("a____", 20).startswith("1 token given, 4 to write.")
    assert "at most 24" in masked.count("_" * 30, 20) and "never seen" in masked.count("\N{SNOWMAN}", 20)
    assert masked.count("abc", 20) == "3 tokens given, 17 to write."


def test_the_card_and_the_curve_are_the_runs_own(runs, tmp_path):
    run = runs["masked"]
    assert run.card().startswith("# masked") and "library_name" not in run.card()
    assert run.metrics() == [
        {"step": 1.0, "minutes": 1.0, "bits_per_char": 6.0}, {"step": 2.0, "minutes": 2.0, "bits_per_char": 5.0},
    ]  # fmt: skip
    torn = replace(run, path=tmp_path)
    assert torn.metrics() == [] and "no card" in torn.card()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 60, "bits_per_char": 3.5}\nnull\n{"step": 2, "sec')
    assert torn.metrics() == [{"step": 1.0, "minutes": 1.0, "bits_per_char": 3.5}]


def test_runs_are_named_shortly_where_that_tells_them_apart(runs, tmp_path):
    import shutil

    path = runs["masked"].path
    shutil.copytree(path, tmp_path / "masked")
    assert [run.name for run in load_runs([path, runs["block"].path], "cpu")] == ["masked", "block"]
    two = load_runs([path, tmp_path / "masked"], "cpu")
    assert [run.name for run in two] == [str(path), str(tmp_path / "masked")]
    with pytest.raises(UserError, match="twice"):
        load_runs([path, path / "."], "cpu")


# -- look inside --------------------------------------------------------------------------------------------------


def test_noising_runs_from_the_text_to_nothing_and_a_flat_network_is_as_unsure_as_can_be(runs):
    run, text = runs["masked"], "It was a day"
    vocabulary = run.model.tokenizer.vocabulary
    flat = as_network(lambda x, t: torch.zeros(*x.shape, vocabulary))
    model = td.Model(run.model.process.over(flat), run.model.tokenizer, run.model.config)
    body = written(inside.forward(replace(run, model=model), text))
    steps = replayed(body["panels"][0]["steps"])
    shown = ["".join(piece for _, piece in rows[0]) for rows in steps]
    assert shown[0] == text and shown[-1] == BLANK * len(text)
    hidden = [{i for i, c in enumerate(row) if c == BLANK} for row in shown]
    assert all(a <= b for a, b in itertools.pairwise(hidden))  # the same draws at every level
    for rows, gone, step in zip(steps, hidden, body["panels"][0]["steps"]):
        bars = [piece for _, piece in rows[2]]
        assert bars == ["█" if i in gone else " " for i in range(len(text))]
        assert [code for code, _ in rows[1]] == ["c0" if i in gone else "p" for i in range(len(text))]
        if gone:
            assert f"{np.log2(vocabulary):.2f} bits" in step["status"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_looked_into(runs, family):
    run = runs[family]
    body = written(inside.forward(run, "It was a day"))
    steps = replayed(body["panels"][0]["steps"])
    assert "".join(piece for _, piece in steps[0][0]) == "It was a day"
    assert all(code == "n" for code, _ in steps[-1][0]) or family == "uniform"  # a replaced token may be the same
    assert len(steps[0]) == (3 if run.model.process.infills else 1)
    assert "nan" not in json.dumps(body).lower()
    for text in ("", "x" * 2000, "\N{SNOWMAN}"):
        with pytest.raises(UserError):
            list(inside.forward(run, text))


def test_the_noise_curve_is_the_schedule(runs):
    curves = {family: inside.noise_curve(runs[family]) for family in FAMILIES}
    t = np.array([row["t"] for row in curves["masked"]])
    changed = {family: np.array([row["changed"] for row in curves[family]]) for family in FAMILIES}
    vocabulary = runs["uniform"].model.tokenizer.vocabulary
    spread = 4 * 0.5 / np.sqrt(inside.PROBE)
    assert np.abs(changed["masked"] - t).max() < spread
    assert np.abs(changed["uniform"] - t * (1 - 1 / vocabulary)).max() < spread
    assert np.abs(changed["block"] - t).max() < spread  # the blocks from the last one on
    assert np.abs(changed["autoregressive"] - np.ceil(t * inside.PROBE) / inside.PROBE).max() < 1e-9


# -- the app ------------------------------------------------------------------------------------------------------


def test_the_app_answers_over_the_wire(runs):
    pytest.importorskip("gradio")
    from gradio_client import Client

    from textdiffusion.ui.page import Page
    from textdiffusion.ui.serving import mounted

    door = Door(None, None)
    door.hand_over(mounted(Page([runs["masked"], runs["block"], runs["uniform"]]).build()))
    try:
        assert door.address.startswith("http://127.0.0.1:")
        client = Client(door.address, verbose=False, analytics_enabled=False)
        common = ["random", "one a token", 1, 1, 3]
        job = client.submit("masked", "It was a ____ day", 24, 2, *common, False, "", "", 0, api_name="/write")
        pages = [page for page in job]  # noqa: C416
        assert recording_in(pages[-1])["panels"][0]["texts"] == runs["masked"].model.sample(
            2, infill="It was a ____ day", sampler="random", seed=3
        )
        for name, arguments, reason in (
            (
                "/write",
                ["masked", "It was a ____ day", 24, 2, "random", "one a token", 1, 0.05, None, False, "", "", 0],
                "number",
            ),
            ("/rewrite", ["block", "a [b]", "what is marked", 0.4, 1, *common], "nothing is marked"),
            ("/proofread", ["masked", "It was", 0.05], "only hides"),
            ("/compare", [[], "", 24, 1, "one a token", 0], "choose 1 to 4"),
            ("/forward", ["masked", ""], "1 to 24 tokens"),
        ):
            answer = client.submit(*arguments, api_name=name)
            assert reason in said(answer.result()), name
        # Out of a slider's bounds, typed or sent: a sentence, not a fault.
        for length, n, reason in ((5000, 1, "1 to 24 tokens"), (24, 99, "1 to 8 texts")):
            answer = client.submit("masked", "", length, n, *common, False, "", "", 0, api_name="/write")
            assert reason in said(answer.result())
    finally:
        door.close()


def test_the_door_is_open_before_the_page_is_there_and_turns_nobody_away():
    pytest.importorskip("uvicorn")
    door = Door(None, None)
    try:
        door.doing = "loading torch"
        with urllib.request.urlopen(door.address) as answer:
            page = answer.read().decode()
        assert "textdiffusion" in page and READY in page and "://" not in page  # nothing from elsewhere
        with urllib.request.urlopen(door.address + READY[1:]) as answer:
            assert json.loads(answer.read()) == {"ready": False, "doing": "loading torch"}
        with pytest.raises(UserError, match=f"127.0.0.1:{door.port}.*--port"):
            Door(None, door.port)

        async def app(scope, receive, send):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"the page itself"})

        answers, end = [], threading.Event()

        def visitor():
            while not end.is_set():
                with urllib.request.urlopen(door.address) as answer:  # raises if it is turned away
                    answers.append(answer.read())

        visiting = threading.Thread(target=visitor)
        visiting.start()
        while not answers:
            time.sleep(0.01)
        door.hand_over(app)
        with urllib.request.urlopen(door.address + READY[1:]) as answer:
            assert json.loads(answer.read()) == {"ready": True}
        time.sleep(0.2)
        end.set()
        visiting.join(30)
        assert answers[-1] == b"the page itself" and b"<html" in answers[0]
        assert set(answers) == {answers[0], answers[-1]}
    finally:
        door.close()


def test_the_door_needs_neither_torch_nor_gradio():
    code = "import sys, textdiffusion.ui.serving, textdiffusion.ui.door as d; d.waiting_page(); "
    code += "sys.exit(', '.join({'torch', 'gradio', 'pandas'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_without_gradio_one_line_says_how_to_install_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else real(name, *a))
    assert main(["ui"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "pip install 'textdiffusion[ui]'" in out.err


def test_a_port_or_run_that_is_not_there_is_one_line(runs, capsys, tmp_path):
    pytest.importorskip("gradio")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, reason in (
            ([str(runs["masked"].path), "--port", str(port)], "--port"),
            ([str(runs["masked"].path), "--port", "0"], "from 1 to 65535"),
            ([str(tmp_path)], "no run"),
        ):
            assert main(["ui", "--device", "cpu", *arguments]) == 2
            out = capsys.readouterr()
            assert out.out == "" and out.err.count("\n") == 1 and reason in out.err
