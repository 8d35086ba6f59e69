"""The page in a real browser: chromium, driven by playwright; skipped, with the reason, where they are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from small_runs import small_run
from textdiffusion.display.frames import BLANK
from textdiffusion.display.replay.canvas import row_html
from textdiffusion.families import names

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 120_000  # milliseconds; the machine may be busy
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'textdiffusion[ui]'")
    if CHROMIUM is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the path (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    """(page, address): a small run of every family, served by this process."""
    from textdiffusion.ui.door import Door
    from textdiffusion.ui.page import Page
    from textdiffusion.ui.serving import mounted

    folder = tmp_path_factory.mktemp("runs")
    kinds = dict.fromkeys(["masked", *(name for name in names() if name != "masked")], "char") | {"uniform": "byte"}
    runs = [small_run(folder / family, family, 48, tokenizer) for family, tokenizer in kinds.items()]
    page = Page(runs)
    door = Door(None, None)
    door.hand_over(mounted(page.build()))
    yield page, door.address
    door.close()


@pytest.fixture
def visit(browser, served):
    """Opens the page as a new visitor; in the end there was no error in the console, and no request to elsewhere."""
    wrong, contexts = [], []

    def opened(size="desktop", scheme="light", **how):
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, **how)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith((served[1], "data:", "blob:")) else wrong.append(r.url))
        tab.goto(served[1])
        tab.wait_for_selector("#td-write")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def done(tab, name="write"):
    """The canvas of a tab, once it can be played and stands still."""
    canvas = tab.locator(f"#td-{name}-canvas")
    canvas.locator(".td-player[data-ready]").wait_for()
    tab.wait_for_function(
        f"""() => document.querySelector("#td-{name}-canvas .td-play").textContent.includes("Play")"""
    )
    return canvas


def rows(canvas) -> list[str]:
    return canvas.locator(".td-row").all_inner_texts()


def choose(tab, label: str, value: str) -> None:
    tab.get_by_label(label, exact=True).locator("visible=true").first.click()
    tab.get_by_role("option", name=value).locator("visible=true").first.click()


def test_write_infill_scrub_and_download(visit, served, browser, tmp_path):
    model = served[0].runs["masked"].model
    tab = visit()
    tab.fill("#td-template textarea", "It was a ____ day")
    tab.wait_for_function("""() => document.querySelector("#td-count").innerText.includes("4 to write")""")
    tab.click("#td-write")
    canvas = done(tab)
    *_, last = model.stream(2, infill="It was a ____ day")
    # What the script draws is what the pure function draws.
    drawn = canvas.locator(".td-row").evaluate_all("(rows) => rows.map((row) => row.innerHTML)")
    parsed = tab.evaluate(
        """(rows) => rows.map((row) => {
          const parsed = document.createElement("div");
          parsed.innerHTML = row;
          return parsed.innerHTML;
        })""",
        [row_html(last.cells[row]) for row in range(2)],
    )
    assert drawn == parsed
    # The scrubber, by keyboard alone.
    scrubber = canvas.locator("input[type=range]")
    scrubber.focus()
    tab.keyboard.press("Home")
    assert rows(canvas) == [f"It was a {BLANK * 4} day"] * 2
    assert "step\u00a00" in canvas.locator(".td-status").inner_text()
    tab.keyboard.press("ArrowRight")
    assert all(row.count(BLANK) == 3 for row in rows(canvas))
    tab.keyboard.press("End")
    assert rows(canvas) == last.texts
    files = {}
    for button, name in (("save-text", "txt"), ("save-json", "json"), ("save-html", "html")):
        with tab.expect_download() as download:
            canvas.locator(f".td-{button}").click()
        files[name] = tmp_path / f"replay.{name}"
        download.value.save_as(files[name])
    assert files["txt"].read_text() == "\n\n---\n\n".join(last.texts) + "\n"
    body = json.loads(files["json"].read_text())
    assert body["panels"][0]["texts"] == last.texts and len(body["panels"][0]["steps"]) == 5
    # The replay is a page of its own, and works where there is no network.
    offline = browser.new_context(offline=True, reduced_motion="reduce")
    alone, wrong = offline.new_page(), []
    alone.on("pageerror", lambda error: wrong.append(str(error)))
    alone.on("request", lambda r: None if r.url.startswith("file:") else wrong.append(r.url))
    alone.goto(files["html"].as_uri())
    assert rows(done_alone(alone)) == last.texts
    alone.locator("input[type=range]").focus()
    alone.keyboard.press("Home")
    assert alone.locator(".td-row").all_inner_texts() == [f"It was a {BLANK * 4} day"] * 2
    offline.close()
    assert wrong == []


def done_alone(page):
    page.wait_for_selector(".td-player[data-ready]")
    return page.locator(".td-player")


def test_stop_stops_and_leaves_what_there_is(visit, served):
    tab, calls = visit(), counted(served, "block")
    begin_long_job(tab)
    tab.locator("#td-stop-write").click()
    canvas = done(tab)
    assert "Stopped" in canvas.locator(".td-note").inner_text() and BLANK in rows(canvas)[0]
    assert stands_still(calls) < 1000 and len(served[0].jobs) == 0


def test_leaving_stops_too(visit, served):
    tab, calls = visit(), counted(served, "block")
    begin_long_job(tab)
    tab.close()
    end = time.monotonic() + 30
    while len(served[0].jobs) and time.monotonic() < end:
        time.sleep(0.1)
    assert stands_still(calls) < 1000 and len(served[0].jobs) == 0


def begin_long_job(tab) -> None:
    """Two texts of 1,024 tokens, one call a token."""
    choose(tab, "Run", "block")
    tab.wait_for_function("""() => document.querySelector("#td-about").innerText.startsWith("block")""")
    tab.get_by_label("number input for Length").locator("visible=true").fill("1024")
    tab.keyboard.press("Tab")
    tab.wait_for_function("""() => document.querySelector("#td-count").innerText.includes("1024 tokens to write")""")
    tab.click("#td-write")
    tab.locator("#td-write-canvas .td-row").first.wait_for()


def counted(served, name: str) -> list[int]:
    """Counts the network calls of a run, from now on."""
    process, calls = served[0].runs[name].model.writer, [0]
    network = getattr(process.network, "counted", process.network)

    class Counting:
        counted = network

        def __call__(self, *args, **kwargs):
            calls[0] += 1
            return network(*args, **kwargs)

        def __getattr__(self, key):
            return getattr(network, key)

    process.network = Counting()
    return calls


def stands_still(calls: list[int]) -> int:
    before = calls[0]
    time.sleep(1.0)
    assert calls[0] == before > 0, "the network is still called"
    return before


def test_two_visitors_have_their_turns(visit):
    tabs = [visit(), visit(size="phone", scheme="dark")]
    for tab, beginning in zip(tabs, ("It was ", "The day ")):
        tab.fill("#td-template textarea", beginning)
    for tab in tabs:
        tab.click("#td-write")
    assert all(row.startswith("It was ") for row in rows(done(tabs[0])))
    assert all(row.startswith("The day ") for row in rows(done(tabs[1])))


def test_a_mistake_is_a_sentence(visit):
    tab = visit()
    tab.fill("#td-template textarea", "It was a ____ day \N{SNOWMAN}")
    tab.click("#td-write")
    error = tab.locator("#td-write-canvas [role=alert]")
    error.wait_for()
    assert "never seen" in error.inner_text() and "Traceback" not in tab.content()
    tab.fill("#td-template textarea", "")
    tab.click("#td-write")
    assert len(rows(done(tab))) == 2


def test_edit_marks_rewrites_and_proofreads(visit):
    tab = visit()
    tab.get_by_role("tab", name="Edit").click()
    tab.fill("#td-edit-text textarea", "It was a bright day")
    tab.evaluate("() => document.querySelector('#td-edit-text textarea').setSelectionRange(9, 15)")
    tab.click("#td-mark")
    tab.wait_for_function("() => document.querySelector('#td-edit-text textarea').value === 'It was a [[bright]] day'")
    tab.click("#td-rewrite")
    assert all(row.startswith("It was a ") and row.endswith(" day") for row in rows(done(tab, "edit")))
    assert "bright →" in tab.locator("#td-edit-canvas .td-note").inner_text()
    tab.get_by_label("all of it, from some noise").check()
    tab.fill("#td-edit-text textarea", "It was a bright day")
    tab.click("#td-rewrite")
    tab.locator("#td-edit-canvas .td-note", has_text="Kept of the characters").wait_for()
    assert len(rows(done(tab, "edit"))) == 2
    choose(tab, "Run", "block")
    tab.wait_for_function("() => document.querySelector('#td-cannot').innerText.includes('block')")
    assert not tab.locator("#td-proofread").is_visible()
    choose(tab, "Run", "uniform")
    tab.locator("#td-proofread").wait_for()
    # Markup, and what a template language would take for its own, is text like any other.
    odd = "<img src=x onerror=alert(1)> ${1+1} {{x}} &amp;"
    tab.fill("#td-edit-text textarea", odd[:40])
    tab.click("#td-proofread")
    tab.locator("#td-edit-canvas .td-title", has_text="proofread").wait_for()
    assert tab.locator("#td-edit-canvas img").count() == 0


def test_markup_in_a_text_is_shown_as_it_is(visit):
    tab = visit()
    tab.get_by_role("tab", name="Look inside").click()
    choose(tab, "Run", "uniform")
    odd = "<img src=x onerror=alert(1)> ${1+1} {{x}} &lt;"
    tab.get_by_label("Your text").fill(odd)
    tab.get_by_role("button", name="Add noise").click()
    canvas = done(tab, "inside")
    canvas.locator("input[type=range]").focus()
    tab.keyboard.press("Home")
    assert rows(canvas)[0] == odd and canvas.locator("img").count() == 0


def test_every_family_writes_and_can_be_looked_into(visit, served):
    tab = visit()
    for name, run in served[0].runs.items():
        tab.get_by_role("tab", name="Write").click()
        if name != "masked":
            choose(tab, "Run", name)
        tab.wait_for_function(f"""() => document.querySelector("#td-about").innerText.startsWith("{name}:")""")
        tab.fill("#td-template textarea", "It was ")
        tab.click("#td-write")
        shown = tab.locator("#td-write-canvas .td-player[data-ready] .td-title", has_text=f"{name} · ")
        shown.wait_for()
        written = rows(done(tab))
        *_, last = run.model.stream(2, prompt="It was ", length=48)
        shown = ["".join(text for _, text in row) for row in last.cells]
        assert [row.rstrip("\n") for row in written] == [row.rstrip("\n") for row in shown], name
        tab.get_by_role("tab", name="Look inside").click()
        if name != "masked":
            choose(tab, "Run", name)
        tab.click("#td-noise")
        tab.locator("#td-inside-canvas .td-player[data-ready] .td-title", has_text=f"{name} · ").wait_for()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_and_is_drawn(visit, size, scheme, tmp_path):
    tab = visit(size, scheme)
    tab.locator(".td").first.wait_for(state="attached")
    ground = tab.evaluate("() => getComputedStyle(document.querySelector('.td')).getPropertyValue('--td-page').trim()")
    assert ground == ("#ffffff" if scheme == "light" else "#161b22")
    for name, button, canvas in (
        ("Write", "#td-write", "write"), ("Compare", "#td-compare", "compare"), ("Look inside", "#td-noise", "inside"),
    ):  # fmt: skip
        tab.get_by_role("tab", name=name).click()
        tab.locator(button).click()
        shown = done(tab, canvas)
        assert shown.locator(".td-legend").is_visible() and rows(shown)
        wide = tab.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} is {wide} pixels too wide"
        tab.screenshot(path=tmp_path / f"{canvas}.png")
    tab.locator(".vega-embed, svg.marks, canvas.marks").first.wait_for()  # the curves


def test_first_paint_and_first_frame(browser, served, tmp_path):
    """Seconds from the command to something on the screen, to the page itself, and from Write to the first frame."""
    if os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        pytest.skip(f"the machine is busy (load {os.getloadavg()[0]:.1f}): seconds by the clock would say nothing")
    command = [sys.executable, "-m", "textdiffusion", "ui", str(served[0].runs["masked"].path), "--device", "cpu"]
    begin = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[4]
        tab = browser.new_page(viewport=SIZES["desktop"])
        tab.set_default_timeout(PATIENCE)
        tab.goto(address)
        painted = time.perf_counter() - begin
        assert tab.get_by_text("textdiffusion").first.is_visible()
        tab.wait_for_selector("#td-write")
        ready = time.perf_counter() - begin
        # In the page's own clock, so that the driver's waiting is not in it.
        first = tab.evaluate(
            """() => new Promise((resolve) => {
              const begin = performance.now();
              new MutationObserver((_, observer) => {
                if (document.querySelector("#td-write-canvas .td-row")) {
                  observer.disconnect();
                  resolve((performance.now() - begin) / 1000);
                }
              }).observe(document.body, { childList: true, subtree: true });
              document.querySelector("#td-write").click();
            })"""
        )
        print(f"first paint {painted:.2f} s, page {ready:.2f} s, first frame {first:.2f} s")
        tab.close()
        assert painted < 5 and first < 1
    finally:
        server.kill()
        server.wait()
