"""What is measured of each run, in parts that are kept one by one, so that an interruption loses one part at most.

Every part is bounded: likelihood by the plan's eval_tokens and draws, sampling by its texts, budgets and temperatures.
`cost` says beforehand how much that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from textdiffusion.compare.gaming import GAMES, held_out, played
from textdiffusion.compare.judging import Judge
from textdiffusion.compare.plan import Plan
from textdiffusion.config import RunConfig
from textdiffusion.errors import UserError
from textdiffusion.evaluation.divergence import divergence
from textdiffusion.evaluation.measures import MOST_COPIES, evaluate, text_statistics
from textdiffusion.mathematics.noise import Noise
from textdiffusion.model import BATCH, Model
from textdiffusion.process import HasCurve, Process
from textdiffusion.report import lossy, without_kind
from textdiffusion.sampling.reverse import Counted, sample
from textdiffusion.text.data import WORD, Corpus, tokenize, word_set
from textdiffusion.text.tokenizer import Tokenizer
from textdiffusion.text.windows import TokenRuns, evaluation_windows
from textdiffusion.training.preparation import prepare

GAP = 3  # tokens of the span that is filled
GAPS = 128  # windows of which a span is filled, at most
CUTS = 4  # of each window, when hidden tokens are guessed
SHOWN = 3  # texts on the page for each budget
TIMED = 3  # texts written one by one for the time that one takes
LEAST_WINDOWS = 16  # of those that a bound for T calls is measured on
REFERENCE = 400_000  # held-out tokens that samples are compared with, at most
SEARCHED = 20_000_000  # characters of the training text in which copies are looked for
LETTERS = 5  # at least, of the word that texts are held to contain


@dataclass(frozen=True)
class Bench:
    """What all runs are measured with."""

    plan: Plan
    corpus: Corpus
    tokenizer: Tokenizer
    windows: list[np.ndarray]  # of held-out text, for likelihood
    shown: list[np.ndarray]  # held-out windows that stand as a row of their own
    reference: list[str]  # the others, which samples are compared with
    training: np.ndarray  # tokens
    words: set[str]  # of the training text
    searched: list[str]  # the training text, or as much of it as copies are looked for in
    word: str | None  # that texts are held to contain
    run_length: int  # characters of a run that counts as copied
    judge: Judge | None

    @staticmethod
    def of(plan: Plan, corpus: Corpus, tokenizer: Tokenizer, judge: Judge | None) -> Bench:
        """Cut the text up.

        Raises:
            UserError: too little held-out text.
        """
        tokens, windows, every = _cut(plan, corpus, tokenizer)
        shown, rest = held_out(every, plan.length, plan.samples)
        words, searched, size = word_set(corpus), list[str](), 0
        for text in corpus.train:
            searched.append(text[: SEARCHED - size])
            if (size := size + len(text)) >= SEARCHED:
                break
        reference = [tokenizer.decode(w.tolist()) for w in rest]
        run_length = min(32, max(8, sum(map(len, reference)) // len(reference) // 2))
        return Bench(
            plan, corpus, tokenizer, windows, shown, reference, np.asarray(tokens["train"].tokens), words,
            searched, _word(searched, tokenizer, plan.length), run_length, judge,
        )  # fmt: skip


def _cut(
    plan: Plan, corpus: Corpus, tokenizer: Tokenizer
) -> tuple[dict[str, TokenRuns], list[np.ndarray], list[np.ndarray]]:
    tokens = tokenize(corpus, tokenizer)
    windows = evaluation_windows(tokens["validation"], plan.length, limit=plan.eval_tokens)
    every = evaluation_windows(tokens["validation"], plan.length, limit=REFERENCE)
    if min(sum(len(w) == plan.length for w in some) for some in (windows, every)) < 4:
        raise UserError(
            f"less than 4 whole windows of {plan.length} tokens are held out of {corpus.name}, or read of that; give "
            "more text, a smaller --length, more --eval-tokens, or --set data.validation_share=0.2"
        )
    return tokens, windows, every


def check_text(plan: Plan, config: RunConfig) -> dict[str, int]:
    """Refuse a text too short to measure anything with, before anything is trained; how many windows are read.

    Raises:
        UserError: saying what to change.
    """
    corpus, tokenizer, _ = prepare(config)
    return {"windows": len(_cut(plan, corpus, tokenizer)[1])}


def _word(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> str | None:
    """The commonest word of some length: what texts can be asked to contain."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in WORD.findall(text):
            if len(word) >= LETTERS and word.islower() and word.isascii():
                counts[word] = counts.get(word, 0) + 1
    for word in sorted(counts, key=lambda w: (-counts[w], w))[:50]:
        if len(tokenizer.encode(word)) <= length // 2:
            return word
    return None


@dataclass(frozen=True)
class Written:
    """Texts with their tokens, the most network calls that one took, the time of all, and what sampler and grid made
    them: those that the family is recommended at so many calls."""

    texts: list[str]
    tokens: list[np.ndarray]
    calls: int
    seconds: float
    sampler: str
    grid: str


def write_texts(model: Model, n: int, calls: int, seed: int, **how: Any) -> Written:
    """Write texts of a window in about ``calls`` network calls; ``how`` as in Model.stream."""
    texts: list[str] = []
    tokens: list[np.ndarray] = []
    made, begin = 0, time.perf_counter()
    size = max(1, min(BATCH, 2**24 // (model.tokenizer.vocabulary * model.window)))
    for first in range(0, n, size):
        *_, last = model.stream(min(size, n - first), calls=calls, seed=seed, first_row=first, **how)
        texts += last.texts
        tokens += [row.cpu().numpy() for row in last.frame.tokens]
        made = max(made, int(last.frame.calls.max()))
    return Written(texts, tokens, made, time.perf_counter() - begin, *model.used)


def describe(bench: Bench, texts: Sequence[str], tokens: Sequence[np.ndarray]) -> dict[str, Any]:
    """All that is said of texts: words, entropy, repetition, copies, n-gram divergence, and the judge's figure."""
    found: dict[str, Any] = asdict(text_statistics(texts, bench.words, bench.searched, bench.run_length))
    for name in ("distinct", "repetition"):
        found[name] = {str(n): value for n, value in found[name].items()}  # as JSON has it
    # Samples are as long as the window, and so are the texts that they are held against.
    found["divergence"] = asdict(divergence(texts, bench.reference))
    found["judged"] = None
    if bench.judge is not None:
        nats, sizes = bench.judge.nats(texts, tokens)
        mean = float(nats.sum() / max(sizes.sum(), 1))
        spread = nats - mean * sizes
        error = float((spread**2).sum() * len(nats) / max(len(nats) - 1, 1)) ** 0.5 / max(float(sizes.sum()), 1.0)
        found["judged"] = {"nats_a_token": mean, "standard_error": error, "perplexity": float(np.exp(mean))}
    return found


# -- parts --------------------------------------------------------------------------------------------------------


def likelihood(model: Model, bench: Bench) -> dict[str, Any]:
    """Bits per character of held-out text, in the limit and for every number of calls.

    The bound of T calls takes one call a window where each step stands by itself, and all T where a step remembers the
    one before. Of such families so many windows are read for it that it takes about the calls that others take; their
    standard errors are the larger for it.
    """
    begin, plan, process = time.perf_counter(), bench.plan, model.process
    how: dict[str, Any] = {"draws": plan.draws, "seed": plan.seed, "device": model.device}
    calls: list[int] = [] if next(iter(process.steps)) == "left-to-right" else plan.ladder
    read, of_calls = bench.windows, bench.windows
    a_window = sum(calls_of_a_bound(process, bench.windows[0], t, model.device) for t in calls)
    if a_window > 2 * len(calls):
        n = max(LEAST_WINDOWS, len(read) * plan.draws * len(calls) // a_window)
        whole = [w for w in read if len(w) == plan.length]
        of_calls = [whole[int(i)] for i in np.linspace(0, len(whole) - 1, min(n, len(whole))).round()]
        first = evaluate(process, read, bench.tokenizer.characters, bench.tokenizer.spelling, **how)
        how["draws"] = 1
    report = evaluate(
        process, of_calls, bench.tokenizer.characters, bench.tokenizer.spelling, calls=calls, **how
    )  # fmt: skip
    if of_calls is not read:
        assert first.influence is not None and report.influence is not None
        influence: list[np.ndarray] = [first.influence[0], *report.influence[1:]]
        report = replace(first, by_calls=report.by_calls)
    else:
        assert report.influence is not None
        influence = list(report.influence)
    if lossy(bench.tokenizer, bench.corpus):
        report = without_kind(report)
    body = report.as_dict()
    body["by_calls"] = [dict(figure) for figure in body["by_calls"]]  # not the report's own
    for figure, parts in zip([body, *body["by_calls"]], influence, strict=True):
        figure["influence"] = [round(part, 7) for part in parts.tolist()]
    body["bits_per_token"] = body["bits_per_char"] * report.characters / report.tokens
    return body | {"windows_for_calls": len(of_calls), "seconds": time.perf_counter() - begin}


@torch.inference_mode()
def calls_of_a_bound(process: Process, window: np.ndarray, calls: int, device: str) -> int:
    """Network calls that one draw of the bound for T ``calls`` takes, counted."""
    if isinstance(process, HasCurve) and not process.remembers:
        return 1  # all bounds come from one curve
    network = Counted(process.network)
    x = torch.from_numpy(window.astype(np.int64)).unsqueeze(0).to(device)
    process.over(network).nll(x, Noise.of(0, 1, device=device), calls)
    return network.evaluations


@torch.inference_mode()
def accuracy(model: Model, bench: Bench) -> dict[str, Any]:
    """How often the likeliest token is the right one, at positions of which the state says nothing.

    Families that infill see a random half of each held-out window and guess the rest, in one call; those from left to
    right see the beginning up to a random place and guess the next token. Where noise happens to put the right token,
    nothing is counted: a state that holds the answer makes any accuracy (docs/evaluation.md).
    """
    begin = time.perf_counter()
    length, process = bench.plan.length, model.process
    whole = [w for w in bench.windows if len(w) == length]
    right, asked = np.zeros(len(whole)), np.zeros(len(whole))
    for first in range(0, len(whole), BATCH):
        rows = np.arange(first, min(first + BATCH, len(whole)))
        x = torch.from_numpy(np.stack([whole[i] for i in rows]).astype(np.int64)).to(model.device)
        for cut in range(CUTS):
            noise = Noise(bench.plan.seed, rows, len(whole), cut, model.device)
            place = torch.arange(length, device=x.device)
            if process.infills:
                given = noise.uniform("given", length) < 0.5
                guessed = ~given
            else:
                at = (noise.uniform("cut", 1) * length).long()
                given, guessed = place < at, place == at
            state = process.template(x, given, noise)
            guessed &= process.decode(state) != x
            if not bool(guessed.any()):
                continue
            if not process.infills and not bool(guessed.any(-1).all()):
                raise AssertionError("a hidden token stands in the state")
            best = process.predict(state, guessed).log_p.argmax(-1)
            hit = torch.zeros_like(given)
            hit[guessed] = best == x[guessed]
            right[rows] += hit.sum(-1).cpu().numpy()
            asked[rows] += guessed.sum(-1).cpu().numpy()
    share = right.sum() / asked.sum()
    spread = right - share * asked
    error = float((spread**2).sum() * len(whole) / max(len(whole) - 1, 1)) ** 0.5 / asked.sum()
    seen = "a random half of the window" if process.infills else "what stands to the left"
    body = {"accuracy": float(share), "standard_error": float(error), "tokens": int(asked.sum()), "seen": seen}
    return body | {"seconds": time.perf_counter() - begin}


def samples(model: Model, bench: Bench) -> dict[str, Any]:
    """Texts at each budget of calls; None where the family needs more."""
    plan = bench.plan
    found: dict[str, Any] = {}
    for budget in plan.calls:
        written = write_texts(model, 1, budget, plan.seed)
        if written.calls > budget:
            found[str(budget)] = None
            continue
        written = write_texts(model, plan.samples, budget, plan.seed)
        body = describe(bench, written.texts, written.tokens) | {"calls": written.calls}
        body |= {"seconds_a_text": written.seconds / plan.samples, "texts": written.texts[:SHOWN]}
        body |= {"sampler": written.sampler, "grid": written.grid}
        if bench.word is not None:
            body["contain_word"] = sum(bench.word in text for text in written.texts) / plan.samples
        found[str(budget)] = body
    needed = write_texts(model, 1, 1, plan.seed).calls
    return {"word": bench.word, "fewest_calls": needed, "by_calls": found}


def temperatures(model: Model, bench: Bench) -> dict[str, Any]:
    """The same texts at several temperatures, and the middle budget or the fewest calls that the family can do with."""
    plan, found = bench.plan, {}
    for temperature in plan.temperatures:
        written = write_texts(model, plan.samples, plan.middle, plan.seed, temperature=temperature)
        body = describe(bench, written.texts, written.tokens)
        found[f"{temperature:g}"] = body | {"calls": written.calls, "seconds_a_text": written.seconds / plan.samples}
    return {"by_temperature": found}


def speed(model: Model, bench: Bench) -> dict[str, Any]:
    """Seconds for one text of 64 tokens, or a window if that is less, one token a call: the median of three."""
    length = min(64, bench.plan.length)
    taken, calls = [], 0
    for i in range(TIMED + 1):  # the first warms up
        begin = time.perf_counter()
        *_, last = model.stream(1, length, length, seed=i)
        taken.append(time.perf_counter() - begin)
        calls = int(last.frame.calls.max())
    return {"tokens": length, "calls": calls, "seconds": float(np.median(taken[1:]))}


def control(model: Model, bench: Bench) -> dict[str, Any]:
    """Gaps filled word for word, and texts that contain what they were asked to."""
    plan, process = bench.plan, model.writer
    whole = [w for w in bench.windows if len(w) == plan.length][:GAPS]
    begin, end = plan.length // 2 - GAP // 2, plan.length // 2 - GAP // 2 + GAP
    right: list[bool] = []
    started = time.perf_counter()
    for first in range(0, len(whole), BATCH):
        x = torch.from_numpy(np.stack(whole[first : first + BATCH]).astype(np.int64)).to(model.device)
        if not process.infills:
            x = x[:, :end]  # the family knows nothing of what comes after the gap
        place = torch.arange(x.shape[1], device=x.device)
        given = ((place < begin) | (place >= end)).expand(len(x), -1)
        noise = Noise(plan.seed, np.arange(first, first + len(x)), len(whole), device=model.device)
        *_, last = sample(process, noise, x.shape[1], GAP, tokens=x, given=given, temperature=0.0)
        right += (last.tokens == x).all(-1).tolist()
    share = sum(right) / len(right)
    filled = {"exact": share, "standard_error": (share * (1 - share) / len(right)) ** 0.5, "gaps": len(right)}
    filled |= {"tokens": GAP, "seen": "both sides" if process.infills else "the left side"}
    held: dict[str, Any] | None = None
    why = None
    if bench.word is not None:
        try:
            written = write_texts(model, plan.samples, plan.middle, plan.seed, must_contain=bench.word)
            held = describe(bench, written.texts, written.tokens) | {"calls": written.calls}
            held["satisfied"] = sum(bench.word in text for text in written.texts) / plan.samples
            held |= {"seconds_a_text": written.seconds / plan.samples, "texts": written.texts[:1]}
        except UserError as error:
            why = str(error)
    return {"infilling": filled, "held": held, "why_not": why, "seconds": time.perf_counter() - started}


PARTS: dict[str, Callable[[Model, Bench], dict[str, Any]]] = {
    "likelihood": likelihood, "accuracy": accuracy, "samples": samples, "temperatures": temperatures, "speed": speed,
    "control": control,
}  # fmt: skip


UNDISTURBED = ("speed",)  # measured by one process, while the others do nothing


def yardsticks(bench: Bench) -> dict[str, Any]:
    """Rows beside the families': held-out text itself, and samplers without a parameter that a judge praises."""
    n = len(bench.shown)
    texts = [bench.tokenizer.decode(w.tolist()) for w in bench.shown]
    found = {"held-out text": describe(bench, texts, bench.shown) | {"what": "what a perfect model writes"}}
    for game, (what, _) in GAMES.items():
        tokens = played(game, bench.training, bench.plan.length, n, bench.plan.seed)
        texts = [bench.tokenizer.decode(t.tolist()) for t in tokens]
        found[game] = describe(bench, texts, tokens) | {"what": what}
    for body in found.values():
        body["texts"] = n
    return found


def cost(plan: Plan) -> dict[str, int]:
    """About the most that measuring one family takes: texts written, and network calls on one window each for samples
    and for likelihood."""
    length, middle = plan.length, max(plan.middle, plan.length)
    texts = plan.samples * (len(plan.calls) + len(plan.temperatures) + 1)
    written = plan.samples * (sum(plan.calls) + (len(plan.temperatures) + 1) * middle)
    tried = sum(max(calls, length) for calls in plan.calls) + length + (TIMED + 1) * min(64, length) + GAPS * GAP
    windows = -(-plan.eval_tokens // length) + 1
    read = windows * max(plan.draws, MOST_COPIES) * (1 + len(plan.ladder)) + LEAST_WINDOWS * sum(plan.ladder)
    return {"texts_written": texts, "sampling_calls": written + tried, "likelihood_calls": read}
