"""What is seen of texts that appear: in a terminal, over a pipe, in a file that plays it again."""

from __future__ import annotations

import html
import io
import json
import re

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from small_runs import small_run
from textdiffusion.commands.cli import main
from textdiffusion.display.frames import BLANK, TextFrame
from textdiffusion.display.replay.recording import replayed
from textdiffusion.display.watching import drawn, painted, watch
from textdiffusion.sampling.reverse import Frame
from textdiffusion.text.tokenizer import build

WIDE = "日本語のテキスト"


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "masked", "masked", 24)


def frame_of(texts, tentative=False, t=0.5) -> TextFrame:
    tokenizer = build("char", ["".join(texts)])
    tokens = torch.tensor([tokenizer.encode(text) for text in texts])
    frame = Frame(1, 2, t, tokens, torch.full(tokens.shape, 0.9), torch.tensor([1] * len(texts)))
    return TextFrame(frame, torch.zeros(tokens.shape, dtype=torch.bool), tokenizer, tentative=tentative)


def screen(frame, width) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(drawn(frame, "step 1 of 2", width))
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()


@pytest.mark.parametrize(("texts", "width", "columns"), [(4, 160, 4), (4, 130, 2), (3, 130, 3), (2, 80, 2), (2, 60, 1)])
def test_texts_standside_by_side_as_far_as_there_is_room(texts, width, columns):
    lines = screen(frame_of([f"text{i} " for i in range(texts)]), width)
    counts = [sum(f"text{i}" in line for i in range(texts)) for line in lines]
    assert max(counts) == columns and sum(counts) == texts


def test_wide_and_combining_characters_take_the_cells_that_they_take():
    texts = [WIDE * 6, "e\u0301a\u0308" * 24, "plain text " * 5]
    texts = [text[:48] for text in texts]
    for width in (40, 90, 130):
        lines = screen(frame_of(texts), width)
        assert {cell_len(line) for line in lines} == {width}  # the frame's right side is straight
        seen = "".join(lines)
        assert "e\u0301" in seen and all(seen.count(sign) >= texts[0].count(sign) for sign in WIDE)
    styles = [span.style for span in painted(frame_of(["e\u0301"]), 0).spans]
    assert styles == ["#f5e56b", "#f5e56b"]


def test_a_text_gives_no_orders_to_the_terminal():
    lines = screen(frame_of(["a\x1b[2Jb\x07c\x9b"]), 60)
    assert any("a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}" in x for x in lines)
    assert not any("\x1b" in line or "\x07" in line or "\x9b" in line for line in lines)


def test_what_may_still_change_is_slanted():
    assert "italic" in str(painted(frame_of(["abc"], tentative=True), 0).spans[0].style)
    assert "italic" not in str(painted(frame_of(["abc"], tentative=True, t=0.0), 0).spans[0].style)
    assert "may still change" in "".join(screen(frame_of(["abc"], tentative=True), 90))
    assert "may still change" not in "".join(screen(frame_of(["abc"]), 90))


def test_the_frame_is_redrawn_at_one_height(masked):
    """Else what stands above it in the terminal would jump."""
    heights = set()
    for frame in masked.model.stream(2, calls=6, infill="It was a ______ day"):
        heights.add(len(screen(frame, 100)))
    assert len(heights) == 1


def recording_in(page: str) -> dict:
    return json.loads(html.unescape(re.search(r'class="td-recording">(.*?)</div>', page, re.DOTALL)[1]))


def test_a_replay_holds_what_was_watched_and_asks_nobody(masked, tmp_path, capsys):
    path = tmp_path / "replay.html"
    run = [str(masked.path), "--device", "cpu", "--precision", "fp32", "-n", "2", "--infill", "It was a ____ day"]
    *_, last = masked.model.stream(2, infill="It was a ____ day")
    pages = []
    for extra in (["--watch"], ["--json"], []):
        assert main(["sample", *run, *extra, "--save-replay", str(path)]) == 0
        out = capsys.readouterr().out
        assert last.texts[0] in out and ("\x1b" not in out)
        if "--json" in extra:
            body = json.loads(out)
            assert [s["text"] for s in body["samples"]] == last.texts and body["samples"][0]["calls"] == 4
        pages.append(path.read_text(encoding="utf-8"))
        path.unlink()
    for page in pages:
        panel = recording_in(page)["panels"][0]
        assert panel["texts"] == last.texts and panel["title"] == f"masked · {masked.model.used[0]}"
        rows = replayed(panel["steps"])
        assert "".join(text for _, text in rows[0][0]) == f"It was a {BLANK * 4} day"
        assert [tuple(cell) for cell in rows[-1][1]] == last.cells[1]
        assert "src=" not in page and "@import" not in page and "://" not in page  # nothing from elsewhere
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--save-replay", "replay.txt"], "ends in .html"),
        (["--save-replay", "nowhere/replay.html"], "a folder that is there"),
        (["--save-replay", "r.html", "-n", "33"], "at most 32 texts"),
        (["--save-replay", "r.html", "--reproducible"], "leave out --reproducible, or --save-replay"),
        (["--save-replay", "r.html", "--proofread", "abc"], "leave out --save-replay"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_it_is_written(arguments, says, masked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(masked.path), "--device", "cpu", *arguments]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_watching_returns_the_texts_and_can_be_played_again(masked, tmp_path):
    texts = masked.model.watch(1, calls=2, save_replay=tmp_path / "r.html")
    assert recording_in((tmp_path / "r.html").read_text())["panels"][0]["texts"] == texts
    assert watch(iter([])) == []
