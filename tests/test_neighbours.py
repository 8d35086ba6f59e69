"""Our samplers beside those of diffusers: the same law, the same moves, the same greedy text."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra diffusers is not installed")
pytest.importorskip("transformers")

import diffusers
from transformers import AutoModelForMaskedLM

from test_hub import drawn
from textdiffusion.diffusion.denoising import denoising_steps
from textdiffusion.exchange import hub
from textdiffusion.families.uniform import Uniform, UniformConfig
from textdiffusion.mathematics.gaussian import deterministic
from textdiffusion.mathematics.noise import Noise
from textdiffusion.process import State, as_network
from textdiffusion.sampling.reverse import sample

assert hub.register  # the Auto classes know runs
pytestmark = pytest.mark.slow  # importing them takes longer than all that is compared


def test_uniform_noise_is_reversed_as_by_their_discrete_ddim():
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    process = Uniform(as_network(lambda x, t: table[x]), UniformConfig(), 4)
    scheduler, x, many = diffusers.DiscreteDDIMScheduler(num_inference_steps=5), torch.tensor([[0, 3, 1]]), 40_000
    for k in (1, 3):
        t, s = (torch.tensor([1 - j / 5], dtype=torch.float64) for j in (k, k + 1))
        state, asked = State(x, t), torch.ones_like(x, dtype=torch.bool)
        prediction = process.predict(state, asked)
        ours = next(iter(process.steps.values())).law(state, asked, prediction, s, lambda log_p: log_p).log_p.exp()
        theirs = scheduler.step(
            prediction.log_p.expand(many, 3, 4), k, x.expand(many, 3), temperature=1.0,
            generator=torch.Generator().manual_seed(7),
        ).prev_sample  # fmt: skip
        seen = torch.stack([(theirs == v).double().mean(0) for v in range(4)], -1)
        assert float((seen - ours).abs().sum(-1).max()) / 2 < 0.01


def test_ddim_moves_as_theirs():
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    z, x_0 = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    for now, then in zip(scheduler.timesteps[:4].tolist(), scheduler.timesteps[1:5].tolist()):
        wanted = scheduler.step(x_0, now, z).prev_sample
        level = [torch.logit(scheduler.alphas_cumprod[i].double()).expand(3, 1) for i in (now, then)]
        assert torch.allclose(deterministic(z, x_0, *level), wanted, atol=1e-6)


class Guess:
    """A network's answer: a mean for each real, whatever the tokens."""

    def __init__(self, mean):
        self.value = mean

    def posterior(self, reshape=None):
        return torch.zeros(len(self.value), 1)

    def mean(self, log_p, codes):
        return self.value


def test_the_second_order_solver_moves_as_theirs():
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="sample", solver_order=2, lower_order_final=False)
    scheduler.set_timesteps(8)
    levels = -2 * scheduler.sigmas.double().log()  # log-SNR

    class Clock:
        def free(self, state):
            return torch.ones(state.x.shape[:2], dtype=torch.bool)

        def log_snr(self, t):
            return levels[(t * 8).round().long()]  # grid point k of 8 stands at time k / 8

        def codes(self):
            return torch.zeros(1, 2)

    from types import SimpleNamespace

    from textdiffusion.process import Prediction

    step = denoising_steps(Clock(), 0.0, 0.0)["dpm"]
    z, memory = torch.randn(1, 3, 2).double(), None
    for k, timestep in enumerate(scheduler.timesteps[:5]):
        said = torch.tanh(z * (k + 1))  # what a network says at this point
        wanted = scheduler.step(said, timestep, z).prev_sample
        time = torch.tensor([k / 8], dtype=torch.float64)
        state = State(z, time, None, memory)
        prediction = Prediction(torch.zeros(3, 1), Guess(said[0]))
        law = step.law(state, Clock().free(state), prediction, time + 1 / 8, lambda x: x)
        assert torch.allclose(law.mean, wanted[0].double(), atol=1e-5), k
        z, memory = wanted.double(), SimpleNamespace(mean=said, t=time)


@torch.no_grad()
def test_a_run_writes_in_their_pipeline_what_it_writes_here(tmp_path):
    model = drawn(tmp_path / "run", "masked")
    there = AutoModelForMaskedLM.from_pretrained(tmp_path / "run").eval()
    pipeline = diffusers.LLaDA2Pipeline(model=there, scheduler=diffusers.BlockRefinementScheduler(), tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.randint(0, model.tokenizer.vocabulary, (1, 8))
    theirs = pipeline(
        input_ids=prompt, gen_length=8, block_length=8, num_inference_steps=8, temperature=0.0, threshold=1.0,
        editing_threshold=None, eos_early_stop=False, mask_token_id=there.config.mask_token_id, output_type="seq",
    ).sequences  # fmt: skip
    tokens = torch.cat((prompt, torch.zeros_like(prompt)), 1)
    given = torch.arange(16).unsqueeze(0) < 8
    *_, last = sample(
        model.process, Noise.of(0, 1), 16, 8, sampler="confidence", tokens=tokens, given=given, temperature=0.0
    )
    assert torch.equal(last.tokens[0, 8:], theirs[0, -8:])
