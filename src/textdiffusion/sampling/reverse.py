"""The only reverse loop: from noise to text, as an iterator of frames that everything else reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from textdiffusion.diffusion.drafts import HasDraft, Mixture
from textdiffusion.diffusion.guidance import Guidance, told
from textdiffusion.errors import UserError
from textdiffusion.mathematics.categorical import draw, reshape_law
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Normal, Process, Reshape, State, Step
from textdiffusion.sampling.constraints import Hold, reshape_uncut
from textdiffusion.sampling.editing import Edit
from textdiffusion.sampling.particles import Particles, several
from textdiffusion.sampling.steering import Steer, foreseen_text


@dataclass(frozen=True)
class Frame:
    """What there is to see after a step.

    step: 0 is the initial noise; of: steps in all; t: noise level reached; tokens: int64 [B L], -1 where nothing is
    written; confidence: float64 [B L], the probability that the model gave each token when it was drawn (1 for
    given ones, 0 where nothing is written); calls: network evaluations made for each row so far, int64 [B].
    """

    step: int
    of: int
    t: float
    tokens: Tensor
    confidence: Tensor
    calls: Tensor


class Counted:
    """A network that counts its evaluations; all else it hands on."""

    def __init__(self, network: Callable[..., Tensor]):
        self.network, self.evaluations = network, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.evaluations += 1
        return self.network(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


# Probabilities worked out together: a step has some ten tables of them in float64 at a time, about what a cache holds.
TOGETHER = 2**19


class _Once:
    """A network that is evaluated once, at the ``asked`` positions [B L], and answers from that for some of them."""

    def __init__(self, network: Callable[..., Tensor], asked: Tensor):
        self.network, self.asked = network, asked
        self.read: tuple[Any, ...] = ()
        self.out: Tensor | None = None

    def __call__(self, *args: Any, positions: Tensor, **kwargs: Any) -> Tensor:
        if self.out is None:
            self.read, self.out = args, self.network(*args, positions=self.asked, **kwargs)
        elif not all(a is b or torch.equal(a, b) for a, b in zip(args, self.read, strict=True)):
            raise ValueError("a step whose family calls the network twice must not say apart = True")
        return self.out[positions[self.asked]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@torch.inference_mode()
def sample(
    process: Process,
    noise: Noise,
    length: int,
    calls: int,
    *,
    sampler: str | None = None,
    tokens: Tensor | None = None,
    given: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    condition: Tensor | None = None,
    guidance: Guidance | None = None,
    until: int | None = None,
    hold: Hold | None = None,
    steer: Steer | None = None,
    edit: Edit | None = None,
) -> Iterator[Frame]:
    """Denoise as many texts as ``noise`` has rows.

    Args:
        process: any family.
        noise: keyed rows; row r gets the same draws in any batch.
        length: L.
        calls: network calls wished for; a family that must takes another number, and steps that would change nothing
            are left out. Frames say how many were made.
        sampler: a name in ``process.steps``; None takes the first.
        tokens, given: a template, int64 [B L] and bool [B L]: positions that are fixed.
        temperature, top_p, top_k: applied to the law of each token that its step starts from, the leave-one-out
            posterior where noise replaces tokens; anything but 1 and None is no longer the model's law.
        condition: class labels int64 [B], -1 for none.
        guidance: by the labels (guidance.py); a step takes two calls, so that there are half as many steps.
        until: a token that ends a text: nothing is written behind the first one that is drawn. Only for families that
            write from left to right.
        hold: holds the texts to a pattern (constraints.py). steer: by a reward (steering.py). Of their particles, whose
            rows are denoised for each of the noise's rows, frames show one; calls are those of all of them.
        edit: texts to rewrite (editing.py), in the place of noise alone.
    Raises:
        UserError: an unknown sampler, or something that the family cannot do.
    """
    if until is not None and process.infills:
        raise UserError("only families that write from left to right can stop at the end of a text; leave out --stop")
    name = next(iter(process.steps)) if sampler is None else sampler
    if name not in process.steps:
        raise UserError(f"this family has no sampler {name!r}; it has: {', '.join(process.steps)}")
    network = Counted(process.network)
    reshape = partial(reshape_law if hold is None else reshape_uncut, temperature=temperature, top_p=top_p, top_k=top_k)
    process = process.over(network).by(name)
    step = process.steps[name]
    if condition is None or (guidance is not None and guidance.weight == 0):
        guidance = None
    calls = calls if guidance is None else max(1, calls // 2)
    particles, crowd = 1, None
    if hold is not None or steer is not None:
        if until is not None:
            raise UserError("a pattern or a reward is of texts of a given length; leave out --stop")
        if edit is not None:
            raise UserError("patterns and rewards act from pure noise on; leave out --edit")
        (particles,) = {part.particles for part in (hold, steer) if part is not None}
        crowd = Particles(len(noise.rows) * particles, particles)
        noise = several(noise, particles)
        if tokens is not None and given is not None:
            tokens, given = (x.repeat_interleave(particles, 0) for x in (tokens, given))
        condition = None if condition is None else condition.repeat_interleave(particles, 0)

    rows = len(noise.rows)
    start = noise.at(0)
    if edit is not None:
        state = edit.begin(process, start)
    elif tokens is None or given is None:
        state = process.prior_sample(rows, length, start)
    else:
        state = process.template(tokens, given, start)
    written = process.decode(state)
    fixed = torch.zeros_like(written, dtype=torch.bool) if state.given is None else state.given
    confidence = fixed.double()
    made = torch.zeros(rows, dtype=torch.long)
    # Every row goes by the plan for its own free positions, whatever rows it shares a batch with; one that comes to the
    # end of its plan stands still there.
    plans: dict[bytes, list[float]] = {}
    patterns = [free.numpy().tobytes() for free in ~fixed.cpu()]
    for pattern, free in zip(patterns, ~fixed.cpu(), strict=True):
        if pattern not in plans:
            if not bool(free.any()):
                plans[pattern] = [1.0, 0.0]
            elif edit is not None:
                plans[pattern] = edit.plan(process, free, calls, name)
            else:
                plans[pattern] = list(process.plan(free, calls, name))
    longest = max(map(len, plans.values()))
    times = torch.tensor(
        [plans[pattern] + [0.0] * (longest - len(plans[pattern])) for pattern in patterns], dtype=torch.float64
    ).to(written.device)

    def frame(k: int, t: float) -> Frame:
        if crowd is None or particles == 1:
            return Frame(k, longest - 1, t, written.clone(), confidence.clone(), made.clone())
        shown = crowd.shown(start if k == longest - 1 else None)
        return Frame(k, longest - 1, t, written[shown], confidence[shown], made.view(-1, particles).sum(-1))

    if crowd is not None and hold is not None:
        hold.begin(process, step, written, fixed, crowd)
    if crowd is not None and steer is not None:
        steer.begin(crowd)
    yield frame(0, float(times[:, 0].max()))

    # Rows with nothing to write leave before the start.
    active = (~fixed).any(-1).nonzero().squeeze(-1)
    if len(active) < rows:
        state = state.select(active)
    for k in range(1, longest):
        now = noise.select(active).at(k)
        s = times[active, k]
        asked = step.ask(state, s, now) & (s < state.t).unsqueeze(-1)
        asking = asked.any(-1)
        if process.remembers:
            # Finished rows leave for good; all others are evaluated in every step, also where they ask nothing, so that
            # what a row remembers does not depend on the rows that share its batch.
            unfinished = asking | (process.decode(state) < 0).any(-1)
            if not bool(unfinished.all()):
                keep = unfinished.nonzero().squeeze(-1)
                state, active, asked, s, now = state.select(keep), active[keep], asked[keep], s[keep], now.select(keep)
            asking = torch.ones_like(unfinished[unfinished])
        before = network.evaluations
        if bool(asking.any()):
            some = asking.nonzero().squeeze(-1)
            speaker = process
            if condition is not None:
                speaker = told(process, condition[active[some]], guidance, state.t[some])
            if len(some) == len(asking):
                state, probability = _in_parts(speaker, step, state, asked, s, now, reshape, active, hold, steer)
            else:
                # Rows for which nothing would change are not evaluated.
                part, chance = _in_parts(
                    speaker, step, state.select(some), asked[some], s[some], now.select(some),
                    reshape, active[some], hold, steer,
                )  # fmt: skip
                x = state.x.clone()
                x[some] = part.x
                state = replace(state, x=x)
                probability = torch.zeros_like(confidence[active])
                probability[some] = chance
            made[active[some].cpu()] += network.evaluations - before
            drawn = probability > 0
            confidence[active] = torch.where(drawn, probability, confidence[active])
        state = replace(state, t=s)
        written[active] = process.decode(state)
        if until is not None:
            ended = _cut(written, fixed, until)
            confidence.masked_fill_(written < 0, 0.0)
            if bool(ended[active].any()):
                keep = (~ended[active]).nonzero().squeeze(-1)
                state, active = state.select(keep), active[keep]
        if k == longest - 1 and steer is not None:
            steer.weigh(written, torch.arange(rows, device=written.device))  # as they came out
        if crowd is not None and (parents := crowd.resample(noise.at(k), times[:, k] > 0)) is not None:
            # The particles of a text go by the same plan: all of them are active, or none is.
            parents = parents.to(written.device)
            written, confidence = written[parents], confidence[parents]
            place = torch.zeros(rows, dtype=torch.long, device=written.device)
            place[active] = torch.arange(len(active), device=written.device)
            state = state.select(place[parents[active]])
        if crowd is not None and k == longest - 1:
            crowd.finish()
        yield frame(k, float(times[:, k].max()))
        if not len(active):
            return  # all texts have ended early


def _cut(written: Tensor, fixed: Tensor, until: int) -> Tensor:
    """Take back what is written [B L] behind the first token ``until`` of each text, if all before it is written; which
    texts have ended there, bool [B]."""
    ends = (written == until) & ~fixed
    before = (written >= 0).long().cumprod(-1).bool()
    first = (ends & before).long().argmax(-1)
    ended = (ends & before).any(-1)
    behind = torch.arange(written.shape[1], device=written.device) > first.unsqueeze(-1)
    written.masked_fill_(behind & ended.unsqueeze(-1), -1)
    return ended


def _in_parts(
    process: Process,
    step: Step,
    state: State,
    asked: Tensor,
    s: Tensor,
    noise: Noise,
    reshape: Reshape,
    rows: Tensor,
    hold: Hold | None = None,
    steer: Steer | None = None,
) -> tuple[State, Tensor]:
    """``_advance``, a few positions at a time where the laws of all would be large and each stands by itself; the
    network is called once, and every number is the same."""
    size = max(1, TOGETHER // process.vocabulary)
    parts = asked.flatten().nonzero().squeeze(-1).split(size)
    # A text that is held to a pattern is drawn as a whole, and one that is weighed foreseen as a whole.
    if hold is not None or steer is not None or len(parts) <= 1 or not step.apart or process.remembers:
        return _advance(process, step, state, asked, s, noise, reshape, rows, hold, steer)
    process = process.over(_Once(process.network, asked))
    x, probability = state.x.clone(), torch.zeros(asked.shape, dtype=torch.float64, device=state.x.device)
    for part in parts:
        chosen = torch.zeros_like(asked).view(-1).index_fill_(0, part, True).view(asked.shape)
        after, chance = _advance(process, step, state, chosen, s, noise, reshape, rows)
        x[chosen], probability[chosen] = after.x[chosen], chance[chosen]
    return replace(state, x=x, t=s), probability


def _advance(
    process: Process,
    step: Step,
    state: State,
    asked: Tensor,
    s: Tensor,
    noise: Noise,
    reshape: Reshape,
    rows: Tensor,
    hold: Hold | None = None,
    steer: Steer | None = None,
) -> tuple[State, Tensor]:
    """One network call and one step; also the probability [B L] of each token drawn in it, 0 elsewhere."""
    held = step if (hold is not None or steer is not None) and isinstance(step, HasDraft) else None
    foreseen = asked if held is None else held.foreseen(state)
    prediction = process.predict(state, foreseen)
    if prediction.memory is not None and not process.remembers:
        raise ValueError(f"{type(process).__name__} carries a memory from step to step: it must say remembers = True")
    draft = None
    if hold is None or held is None:
        spoken = prediction
        if held is not None and not torch.equal(asked, foreseen):
            spoken = replace(prediction, log_p=prediction.log_p[asked[foreseen]])
        law = step.law(state, asked, spoken, s, reshape)
    else:
        draft = held.draft(state, asked, prediction, s, reshape)
        law = draft.given(hold.text(draft, process.decode(state), noise, rows))
    x = state.x.clone()
    if isinstance(law, Mixture):
        law = law.given(draw(law.log_p, noise.uniform("token", x.shape[1])[law.positions]))
    if isinstance(law, Normal):
        x[law.positions] = law.mean.to(x.dtype)
        if bool((law.deviation > 0).any()):
            x[law.positions] += law.deviation.to(x.dtype) * noise.normal("reals", *x.shape[1:])[law.positions]
    else:
        x[law.positions] = process.embed(draw(law.log_p, noise.uniform("token", x.shape[1])[law.positions]))
    if hold is not None and draft is not None:
        hold.weigh(draft, x, rows)
    after = replace(state, x=x, t=s, memory=prediction.memory)
    if steer is not None and bool((s > 0).any()):
        steer.weigh(foreseen_text(process, step, state, asked, prediction, s, reshape, after, noise), rows)
    probability = torch.zeros(asked.shape, dtype=torch.float64, device=x.device)
    new = process.decode(after)[foreseen]
    chance = prediction.log_p.gather(-1, new.clamp(min=0).unsqueeze(-1)).squeeze(-1).exp().double()
    probability[foreseen] = torch.where(new >= 0, chance, torch.zeros_like(chance))
    return after, probability
