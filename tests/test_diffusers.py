"""Our steps beside those of diffusers: one schedule, one network, one start, and the same trajectory to 1e-5.

Where both exist: DDIM, the ancestral move (DDIM with eta = 1), DPM-Solver++ of first and second order; with a network
that says x_0, eps or v. Their last step is to a state without noise, where ours draws tokens: all before it is
compared.
"""

from __future__ import annotations

import pytest
import torch

from textdiffusion.families.analog_bits import AnalogBits, AnalogBitsConfig
from textdiffusion.mathematics.gaussian import alpha_sigma, from_x_0
from textdiffusion.mathematics.noise import Noise
from textdiffusion.mathematics.worlds import random_table
from textdiffusion.process import State
from textdiffusion.verification import Subject

diffusers = pytest.importorskip(
    "diffusers", reason="parity with diffusers is NOT tested: pip install -c constraints.txt 'textdiffusion[dev]'"
)

F64, TRAINING, CALLS, ROWS = torch.float64, 1000, 20, 16
TARGETS = {"sample": "x_0", "epsilon": "eps", "v_prediction": "v"}
# Our sampler, their scheduler, its settings, what its step takes.
PAIRS = {
    "ddim": ("ddim", "DDIMScheduler", {}, {}),
    "ancestral": ("ancestral", "DDIMScheduler", {}, {"eta": 1.0}),
    "ddim as first order": ("ddim", "DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    "dpm": ("dpm", "DPMSolverMultistepScheduler", {"solver_order": 2}, {}),
}


def ours(schedule: str, times: int = 0) -> AnalogBits:
    """An exact posterior of two bits in the network's place."""
    config = AnalogBitsConfig(schedule=schedule, self_conditioning=0.0, times=times)
    return Subject(AnalogBits, config).ideal(random_table(2, 2))


def our_way(process: AnalogBits, sampler: str, start: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
    """The states after each move of a run of CALLS calls, [CALLS - 1, rows, 2, 1]."""
    asked = torch.ones(ROWS, 2, dtype=torch.bool)
    times, way = process.plan(asked[0], CALLS, sampler), []
    state = State(start, torch.ones(ROWS, dtype=F64))
    for s, noise in zip(times[1:-1], noises, strict=True):
        said, then = process.predict(state, asked), torch.full((ROWS,), s, dtype=F64)
        law = process.steps[sampler].law(state, asked, said, then, lambda log_p: log_p)
        x = (law.mean + law.deviation * noise.flatten(0, 1)).view(start.shape)
        state = State(x, then, memory=said.memory)
        way.append(x)
    return torch.stack(way)


def their_way(
    process: AnalogBits, scheduler, said_as: str, start: torch.Tensor, noises: torch.Tensor, **how
) -> torch.Tensor:
    """The same by a scheduler of diffusers, asked at its own timesteps."""
    asked, way, x = torch.ones(ROWS, 2, dtype=torch.bool), [], start
    for timestep, noise in zip(scheduler.timesteps[:-1], noises, strict=True):
        t = torch.full((ROWS,), (int(timestep) + 1) / TRAINING, dtype=F64)
        guess = process.predict(State(x, t), asked).native
        x_0 = guess.mean(guess.posterior(), process.codes()).view(x.shape)
        said = from_x_0(x_0, x, process.log_snr(t).view(-1, 1, 1), TARGETS[said_as])
        more = how | ({"variance_noise": noise} if how.get("eta") else {})
        x = scheduler.step(said, int(timestep), x, **more).prev_sample
        way.append(x)
    return torch.stack(way)


def difference(schedule: str, name: str, said_as: str, moved: float = 0.0) -> float:
    """Largest distance of the two trajectories; ``moved`` shifts their schedule by so many timesteps."""
    sampler, theirs, settings, how = PAIRS[name]
    process = ours(schedule)
    scheduler = getattr(diffusers, theirs)(
        num_train_timesteps=TRAINING, prediction_type=said_as, timestep_spacing="trailing",
        **{"clip_sample": False} if theirs == "DDIMScheduler" else settings,
    )  # fmt: skip
    levels = process.log_snr((torch.arange(1, TRAINING + 1, dtype=F64) - moved) / TRAINING)
    scheduler.alphas_cumprod = torch.sigmoid(levels)
    alpha, sigma = alpha_sigma(levels)
    if theirs != "DDIMScheduler":
        scheduler.lambda_t = alpha.log() - sigma.log()
    scheduler.set_timesteps(CALLS)
    assert len(scheduler.timesteps) == CALLS and int(scheduler.timesteps[0]) == TRAINING - 1
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(ROWS, 2, 1, generator=generator, dtype=F64)
    noises = torch.randn(CALLS - 1, ROWS, 2, 1, generator=generator, dtype=F64)
    way = our_way(process, sampler, start, noises)
    assert float((way[-1] - way[0]).abs().max()) > 0.5  # a trajectory that goes somewhere
    return float((way - their_way(process, scheduler, said_as, start, noises, **how)).abs().max())


@pytest.mark.parametrize("said_as", TARGETS)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_trajectory_is_that_of_diffusers(schedule, name, said_as):
    assert difference(schedule, name, said_as) < 1e-5


@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_moved_by_one_timestep_shows(name):
    assert difference("cosine", name, "sample", moved=1.0) > 1e-4


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_times_of_ddpm_are_those_of_diffusers(name):
    """Training at 1,000 noise levels, sampling at 20: the calls fall on levels that were trained at."""
    process = ours("linear", TRAINING)
    times = process.plan(torch.ones(2, dtype=torch.bool), CALLS, name)[:-1]
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=TRAINING, timestep_spacing="trailing")
    scheduler.set_timesteps(CALLS)
    assert [round(t * TRAINING) - 1 for t in times] == scheduler.timesteps.tolist()
    drawn = torch.floor(Noise.of(0, 4000).stratified("time") * TRAINING + 1) / TRAINING
    assert all(float((drawn - t).abs().min()) < 1e-9 for t in times)
