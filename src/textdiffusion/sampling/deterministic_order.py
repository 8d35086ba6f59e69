"""The exact likelihood of samplers that choose positions by a rule (DUEL, 2603.01367).

Where a rule says which positions are written next, as a function of what is written, a text comes about in one way:

    p(x) = product over calls k of the product over i in S_k(x) of p(x_i | what is written before call k)

and its -log is the likelihood of the very texts that the sampler writes in those calls, no bound. Following a text
costs as many network calls as writing it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from textdiffusion.diffusion.absorbing import by_row
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import Categorical, Nll, Process
from textdiffusion.sampling.reverse import Counted


@torch.inference_mode()
def order_nll(process: Process, x_0: Tensor, calls: int, sampler: str) -> Nll:
    """-log p(x_0), nats [B], of the sampler of ``calls`` calls at temperature 1.

    Args:
        process: any family. x_0: texts int64 [B L]. sampler: one of its steps that is ``deterministic``.
    Raises:
        ValueError: a sampler that is not; texts of more than one law then lead to the same one.
    """
    step = process.steps[sampler]
    if not step.deterministic:
        raise ValueError(f"the sampler {sampler!r} chooses positions by chance; its texts have bounds only")
    network = Counted(process.network)
    process = process.over(network).by(sampler)
    noise = Noise.of(0, len(x_0), device=x_0.device)
    state = process.prior_sample(x_0.shape[0], x_0.shape[1], noise)
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    times = process.plan(torch.ones(x_0.shape[1], dtype=torch.bool), calls, sampler)
    for _, time in itertools.pairwise(times):
        s = torch.full_like(state.t, time)
        asked = step.ask(state, s, noise)
        if not bool(asked.any()):
            state = replace(state, t=s)
            continue
        prediction = process.predict(state, asked)
        law = step.law(state, asked, prediction, s, lambda log_p: log_p)
        assert isinstance(law, Categorical)
        told = law.log_p.gather(-1, x_0[law.positions].unsqueeze(-1)).squeeze(-1).double()
        total -= by_row(told, law.positions)
        state = replace(state, x=torch.where(law.positions, x_0, state.x), t=s, memory=prediction.memory)
    zero = torch.zeros_like(total)
    return Nll(total, zero, zero, "exact", sampler, network.evaluations)
