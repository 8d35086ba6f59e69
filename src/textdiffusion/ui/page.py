"""The page: what stands where, and which control calls which act. All else is in its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import pandas as pd

from textdiffusion.display.replay.canvas import hint
from textdiffusion.errors import UserError
from textdiffusion.ui import acts, inside
from textdiffusion.ui.acts import EVERY_TOKEN, Wish
from textdiffusion.ui.loaded import MOST_TEXTS, Loaded
from textdiffusion.ui.streaming import Jobs, told

WAITING = 64  # visitors in the queue; the next one is asked to come back
CALLS = [EVERY_TOKEN, "1", "2", "4", "8", "16", "32", "64", "128", "256"]
HINT = "underscores mark what is to be written, one a token; a text without any is written on; empty: written freely"
EMPTY = "nothing: write freely"
# What the tab Edit rewrites.
MARKED, WORDS, ALL = "what is marked", "words at random", "all of it, from some noise"
# What a control holds is handed over as it is: gradio would answer a number out of a slider's bounds with a fault, for
# which the acts have a sentence.
AS_IS: dict[str, Any] = {"preprocess": False}
# What costs nothing.
QUIET: dict[str, Any] = AS_IS | {"show_progress": "hidden", "api_visibility": "private", "queue": False}
MOST_PANELS = 4
MOST_COMPARED = 4  # texts in a panel
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
footer { display: none !important; }
.td-head p { margin: 0; }
.td-canvas .html-container { padding: 0 !important; }
@media (max-width: 600px) {
  .gradio-container .main.app { padding: 12px !important; }
  .tab-container button { padding: 0 9px !important; }
}
"""
# On a narrow page the canvas stands below the controls: pressing the button brings it into sight.
SCRIPT = """<script>
document.addEventListener("click", (event) => {
  const canvas = event.target.closest?.(".td-go")?.closest("[role=tabpanel]")?.querySelector(".td-canvas");
  if (canvas && canvas.getBoundingClientRect().top > innerHeight - 160) canvas.scrollIntoView({ block: "center" });
});
</script>"""


class Page:
    """The page of some loaded runs."""

    def __init__(self, runs: Sequence[Loaded]):
        self.runs = {run.name: run for run in runs}
        self.first = runs[0]
        self.jobs = Jobs()
        self.columns = {f"{run.name} · {sampler}": (run, sampler) for run in runs for sampler in run.samplers}

    def build(self) -> gr.Blocks:
        """The gradio app, not launched yet."""
        with gr.Blocks(title="textdiffusion", analytics_enabled=False, fill_width=False) as app:
            gr.Markdown("## textdiffusion\nText out of noise, step by step.", elem_classes="td-head")
            with gr.Tabs():
                with gr.Tab("Write", id="write"):
                    self._write()
                with gr.Tab("Edit", id="edit"):
                    self._edit()
                with gr.Tab("Compare", id="compare"):
                    self._compare()
                with gr.Tab("Look inside", id="inside"):
                    self._inside(app)
            app.unload(self._leave)
        # One job at a time is as fast as the machine gets, and first come is first served.
        return app.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)

    def _leave(self, request: gr.Request) -> None:
        self.jobs.stop(str(request.session_hash))

    # -- controls that tabs share -----------------------------------------------------------------------------------
    def _choose_run(self) -> gr.Dropdown:
        return gr.Dropdown(list(self.runs), value=self.first.name, label="Run", visible=len(self.runs) > 1)

    def _sampling(self, run: Loaded) -> list[Any]:
        """Sampler, calls, temperature, top-p, seed."""
        sampler = gr.Dropdown(**_samplers(run))
        calls = gr.Dropdown(**_calls(run))
        with gr.Row():
            temperature = gr.Slider(0, 2, value=1, step=0.05, label="Temperature", info="1 is the model's own law")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="1 keeps every token")
        seed = gr.Number(0, label="Seed", precision=0, info="the same seed gives the same texts")
        return [sampler, calls, temperature, top_p, seed]

    def _labels(self, run: Loaded) -> list[Any]:
        """Label and guidance, for runs that have learnt with labels."""
        label = gr.Dropdown(**_label(run), elem_id="td-label")
        guidance = gr.Slider(
            0, 5, value=0, step=0.25, label="Guidance", visible=bool(run.model.config.labels),
            info="more of the label than the run has learnt, at two network calls for one",
        )  # fmt: skip
        return [label, guidance]

    def _buttons(self, name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            go = gr.Button(name, variant="primary", elem_id=f"td-{name.lower()}", elem_classes="td-go", min_width=100)
            stop = gr.Button("Stop", elem_id=f"td-stop-{name.lower()}", min_width=100)
        return go, stop

    def _wire(self, go: Any, stop: gr.Button, act: Any, inputs: list[Any], output: gr.HTML, api: str) -> None:
        """A button that starts a job, and one that stops it, running or still queued."""
        event = gr.on(
            go, act, inputs, output, api_name=api, show_progress="minimal", trigger_mode="once",
            concurrency_id="sampling", concurrency_limit=1, **AS_IS,
        )  # fmt: skip
        halted = stop.click(self._halt, None, None, queue=False, api_visibility="private")
        halted.then(None, None, None, cancels=[event], api_visibility="private")

    def _halt(self, request: gr.Request) -> None:
        # The job itself says that it has stopped; what only waits in the queue is cancelled after that.
        self.jobs.halt(str(request.session_hash))

    def _job(self, request: gr.Request, pages: Any) -> Iterator[str]:
        """Run an act (a function of the flag that stops it) as this visitor's job."""
        visitor = str(request.session_hash)
        flag = self.jobs.begin(visitor)
        try:
            yield from told(pages, flag)
        finally:
            flag.set()
            self.jobs.end(visitor, flag)

    # -- Write ------------------------------------------------------------------------------------------------------
    def _write(self) -> None:
        run = self.first
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                chosen = self._choose_run()
                about = gr.Markdown(run.describe(), elem_id="td-about")
                text = gr.Textbox(label="Template", lines=3, max_lines=10, elem_id="td-template", info=HINT)
                count = gr.Markdown(run.count("", run.model.window), elem_id="td-count")
                example = gr.Dropdown(label="Examples", **_examples(run))
                go, stop = self._buttons("Write")
                with gr.Row():
                    length = gr.Slider(**_length(run))
                    n = gr.Slider(1, MOST_TEXTS, value=2, step=1, label="Texts")
                labels = self._labels(run)
                with gr.Accordion("Pattern, sampler, temperature, seed", open=False):
                    regex = gr.Textbox(label="Pattern", info="a regular expression that the whole text matches",
                                       placeholder="[A-Z][a-z ,]+\\.", lines=1, elem_id="td-regex")  # fmt: skip
                    sampling = self._sampling(run)
                    ends = gr.Checkbox(False, label="End where a document ends", visible=run.stops)
            with gr.Column(scale=3, min_width=320):
                output = _canvas("Press Write, and watch the text appear here.", "write")

        def act(name: str, text: str, length: int, n: int, sampler: str, calls: str, temperature: float, top_p: float,
                seed: int, ends: bool, regex: str, label: str, guidance: float,
                request: gr.Request) -> Iterator[str]:  # fmt: skip
            def pages(flag: Any) -> Iterator[str]:
                wish = _wish(text, n, length, calls, sampler, temperature, top_p, seed, ends, regex, label, guidance)
                return acts.write(self._run(name), wish, flag)

            yield from self._job(request, pages)

        inputs = [chosen, text, length, n, *sampling, ends, regex, *labels]
        self._wire([go.click, text.submit], stop, act, inputs, output, "write")
        gr.on([text.change, length.change, chosen.change], self._count, [chosen, text, length], count,
              trigger_mode="always_last", **QUIET)  # fmt: skip
        example.input(lambda value: value, example, text, **QUIET)

        def switch(name: str) -> list[Any]:
            new = self._run(name)
            return [
                new.describe(), gr.update(**_examples(new)), gr.update(**_length(new)),
                gr.update(**_samplers(new)), gr.update(**_calls(new)), gr.update(visible=new.stops),
                gr.update(**_label(new)), gr.update(visible=bool(new.model.config.labels), value=0),
            ]  # fmt: skip

        changed = [about, example, length, sampling[0], sampling[1], ends, *labels]
        chosen.change(switch, chosen, changed, **QUIET)

    def _run(self, name: str) -> Loaded:
        if name not in self.runs:
            raise UserError(f"this page has no run {name!r}; it has: {', '.join(self.runs)}")
        return self.runs[name]

    def _count(self, name: str, text: str, length: int) -> str:
        return self._run(name).count((text or "")[: acts.LONGEST_INPUT], int(length or 0))

    # -- Edit -------------------------------------------------------------------------------------------------------
    def _edit(self) -> None:
        run = self.first
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                chosen = self._choose_run()
                cannot = gr.Markdown(run.no_proofreading, elem_id="td-cannot")
                text = gr.Textbox(
                    label="Text", lines=3, max_lines=10, elem_id="td-edit-text",
                    info="select what is to be rewritten and press Mark; or rewrite words at random",
                )  # fmt: skip
                mark = gr.Button("Mark the selection", size="sm", elem_id="td-mark")
                go, stop = self._buttons("Rewrite")
                how = gr.Radio([MARKED, WORDS, ALL], value=MARKED, label="Rewrite")
                share = gr.Slider(0.05, 1, value=0.4, step=0.05, label="Strength: share of the text", visible=False)
                n = gr.Slider(1, MOST_TEXTS, value=2, step=1, label="Versions")
                with gr.Accordion("Sampler, temperature, seed", open=False):
                    sampling = self._sampling(run)
                with gr.Group(visible=not run.no_proofreading) as proof:
                    wrong = gr.Slider(0.01, 0.5, value=0.05, step=0.01, label="Proofread",
                                      info="share of wrong tokens to expect")  # fmt: skip
                    mend = gr.Button("Proofread", elem_id="td-proofread")
            with gr.Column(scale=3, min_width=320):
                output = _canvas("What is rewritten stands out here; the rest is underlined.", "edit")

        def act(name: str, text: str, how: str, share: float, n: int, sampler: str, calls: str, temperature: float,
                top_p: float, seed: int, request: gr.Request) -> Iterator[str]:  # fmt: skip
            def pages(flag: Any) -> Iterator[str]:
                run, wish = self._run(name), _wish(text, n, 1, calls, sampler, temperature, top_p, seed, False)
                if how == ALL:
                    return acts.renoise(run, wish, _number(share), flag)
                if how == MARKED:
                    parts = acts.marked(wish.text)
                else:
                    parts = acts.chosen_words(wish.text, _number(share), wish.seed)
                return acts.rewrite(run, parts, wish, flag)

            yield from self._job(request, pages)

        def mending(name: str, text: str, wrong: float, request: gr.Request) -> Iterator[str]:
            yield from self._job(request, lambda flag: acts.proofread(self._run(name), text or "", _number(wrong)))

        self._wire([go.click], stop, act, [chosen, text, how, share, n, *sampling], output, "rewrite")
        mend.click(mending, [chosen, text, wrong], output, api_name="proofread", show_progress="minimal",
                   concurrency_id="sampling", concurrency_limit=1, **AS_IS)  # fmt: skip
        # The browser alone knows what is selected.
        mark.click(None, text, text, js=_MARK_JS, api_visibility="private")
        how.change(lambda how: gr.update(visible=how != MARKED), how, share, **QUIET)

        def switch(name: str) -> list[Any]:
            new = self._run(name)
            return [
                new.no_proofreading, gr.update(**_samplers(new)), gr.update(**_calls(new)),
                gr.update(visible=not new.no_proofreading),
            ]  # fmt: skip

        gr.on([chosen.change], switch, chosen, [cannot, sampling[0], sampling[1], proof], **QUIET)

    # -- Compare ----------------------------------------------------------------------------------------------------
    def _compare(self) -> None:
        names = list(self.columns)
        of_each = [f"{run.name} · {run.samplers[0]}" for run in self.runs.values()]
        start = (of_each if len(of_each) > 1 else names)[:2]
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                columns = gr.Dropdown(names, value=start, multiselect=True, max_choices=MOST_PANELS,
                                      label="Runs and samplers", elem_id="td-columns")  # fmt: skip
                text = gr.Textbox(label="Template", lines=2, max_lines=8, placeholder="the same for all; may be empty")
                go, stop = self._buttons("Compare")
                with gr.Row():
                    length = gr.Slider(**_length(min(self.runs.values(), key=lambda run: run.longest)))
                    n = gr.Slider(1, MOST_COMPARED, value=2, step=1, label="Texts each")
                calls = gr.Dropdown(CALLS, value=EVERY_TOKEN, allow_custom_value=True, label="Network calls a text")
                seed = gr.Number(0, label="Seed", precision=0, info="the same for all")
            with gr.Column(scale=4, min_width=320):
                output = _canvas("The same template and seed, side by side.", "compare")

        def act(columns: list[str], text: str, length: int, n: int, calls: str, seed: int,
                request: gr.Request) -> Iterator[str]:  # fmt: skip
            def pages(flag: Any) -> Iterator[str]:
                unknown = [name for name in columns or [] if name not in self.columns]
                if unknown or not 1 <= len(columns or []) <= MOST_PANELS:
                    raise UserError(f"choose 1 to {MOST_PANELS} of the runs and samplers in the list")
                wish = _wish(text, min(int(n), MOST_COMPARED), length, calls, "auto", 1, 1, seed, False)
                return acts.compare([self.columns[name] for name in columns], wish, flag)

            yield from self._job(request, pages)

        self._wire([go.click, text.submit], stop, act, [columns, text, length, n, calls, seed], output, "compare")

    # -- Look inside ------------------------------------------------------------------------------------------------
    def _inside(self, app: gr.Blocks) -> None:
        chosen = self._choose_run()
        with gr.Row():
            text = gr.Textbox("It was a bright cold day in April", label="Your text", scale=4, min_width=320)
            go = gr.Button("Add noise", variant="primary", scale=1, elem_id="td-noise", min_width=120)
        output = _canvas("Move your text from t = 0 to noise, and see what the network makes of it.", "inside")
        with gr.Row():
            noise = gr.LinePlot(x="t", y="changed", title="Noise schedule", x_title="noise level t",
                                y_title="share of tokens changed", y_lim=[0, 1], height=280, min_width=300)  # fmt: skip
            learnt = gr.LinePlot(x="step", y="bits_per_char", title="Training", x_title="step", height=280,
                                 y_title="bits per character, held out", min_width=300)  # fmt: skip
        with gr.Accordion("Model card", open=False):
            card = gr.Markdown()
        with gr.Accordion("Settings", open=False):
            settings = gr.Code(language="json", label="config.json", interactive=False)

        def forward(name: str, text: str, request: gr.Request) -> Iterator[str]:
            yield from self._job(request, lambda flag: inside.forward(self._run(name), text or ""))

        gr.on([go.click, text.submit], forward, [chosen, text], output, api_name="forward", show_progress="minimal",
              concurrency_id="sampling", concurrency_limit=1, **AS_IS)  # fmt: skip

        def facts(name: str) -> list[Any]:
            run = self._run(name)
            curve, metrics = pd.DataFrame(inside.noise_curve(run)), pd.DataFrame(run.metrics())
            return [curve, gr.update(value=metrics, visible=len(metrics) > 1), run.card(), run.model.config.to_json()]

        gr.on([app.load, chosen.change], facts, chosen, [noise, learnt, card, settings],
              show_progress="hidden", api_visibility="private", **AS_IS)  # fmt: skip


_MARK_JS = """(text) => {
  const area = document.querySelector("#td-edit-text textarea");
  const [a, b] = [area.selectionStart, area.selectionEnd];
  return b > a ? text.slice(0, a) + "[[" + text.slice(a, b) + "]]" + text.slice(b) : text;
}"""


def _wish(text: str | None, n: Any, length: Any, calls: Any, sampler: str, temperature: Any, top_p: Any, seed: Any,
          ends: bool, regex: str | None = "", label: str | None = "", guidance: Any = 0) -> Wish:  # fmt: skip
    """Controls as a wish; an emptied number is a mistake of the user's."""
    try:
        return Wish(text or "", int(n), int(length), str(calls or EVERY_TOKEN), sampler or "auto", float(temperature),
                    float(top_p), int(seed), bool(ends), regex or "", label or "", float(guidance))  # fmt: skip
    except (TypeError, ValueError, OverflowError):
        raise UserError("a number is missing among the controls; fill it in") from None


def _number(value: Any) -> float:
    """What a slider holds; an emptied one is a mistake of the user's."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError("a number is missing among the controls; fill it in") from None


def _canvas(first: str, name: str) -> gr.HTML:
    # Without gradio's own styles for what is in it: the canvas brings its own, as in a replay.
    return gr.HTML(hint(first), elem_id=f"td-{name}-canvas", elem_classes="td-canvas", apply_default_css=False)


def _samplers(run: Loaded) -> dict[str, Any]:
    notes = [(f"{name}: {step.note}", name) for name, step in run.model.process.steps.items()]
    best = ("auto: what was measured to write best in so many calls", "auto")
    return {"choices": [best, *notes], "value": "auto", "label": "Sampler", "interactive": len(notes) > 1}


def _label(run: Loaded) -> dict[str, Any]:
    names = run.model.config.labels
    return {"choices": [("any", ""), *((name, name) for name in names)], "value": "", "label": "Label",
            "visible": bool(names)}  # fmt: skip


def _calls(run: Loaded) -> dict[str, Any]:
    why = "fewer is faster and rougher" if run.takes_calls else "this family always takes one a token"
    return {"choices": CALLS, "value": EVERY_TOKEN, "label": "Network calls a text", "info": why,
            "allow_custom_value": True, "interactive": run.takes_calls}  # fmt: skip


def _length(run: Loaded) -> dict[str, Any]:
    return {"minimum": 1, "maximum": run.longest, "value": run.model.window, "step": 1, "label": "Length"}


def _examples(run: Loaded) -> dict[str, Any]:
    return {"choices": [(text or EMPTY, text) for text in run.examples()], "value": ""}
