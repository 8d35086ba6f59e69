import pytest
import torch

from textdiffusion.mathematics.schedules import SCHEDULES


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ends_monotone_derivative_and_inverse(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert abs(ends[0] - 1) < 1e-15 and ends[1] == 0  # no mass left at t = 1
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert (alpha[1:] < alpha[:-1]).all()
    h = 1e-6
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    assert torch.allclose(schedule.derivative(t), slope, atol=1e-8)
    assert torch.allclose(schedule.inverse(1 - alpha), t, atol=1e-9)
