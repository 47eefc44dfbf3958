"""Learning-rate factors: the published numbers of the shipped configuration, the corners of each curve."""

import math

import pytest
import torch

from ldm.errors import UsageError
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2

CYCLES = {
    "warm_up_steps": [10, 4],
    "f_min": [0.2, 0.1],
    "f_max": [1.0, 0.5],
    "f_start": [0.0, 0.3],
    "cycle_lengths": [50, 20],
}


def test_the_shipped_schedule_warms_up_and_stays():
    schedule = LambdaLinearScheduler(
        warm_up_steps=[10000], cycle_lengths=[10000000000000], f_start=[1.0e-6], f_max=[1.0], f_min=[1.0]
    )
    assert schedule(0) == 1e-6
    assert math.isclose(schedule.schedule(5000), 0.5000005, abs_tol=1e-12)
    assert schedule(10000) == schedule(470000) == 1.0


def test_a_line_falls_over_its_whole_cycle():
    schedule = LambdaLinearScheduler(**CYCLES)
    assert math.isclose(schedule(10), 0.2 + 0.8 * 40 / 50, abs_tol=1e-15)
    assert math.isclose(schedule(30), 0.2 + 0.8 * 20 / 50, abs_tol=1e-15)
    assert math.isclose(schedule(50), 0.2, abs_tol=1e-15)
    assert math.isclose(schedule(52), 0.3 + 0.2 * 2 / 4, abs_tol=1e-15)
    assert math.isclose(schedule(60), 0.1 + 0.4 * 10 / 20, abs_tol=1e-15)


def test_the_last_cycle_stays_at_its_end():
    assert LambdaLinearScheduler(**CYCLES)(1000) == LambdaLinearScheduler(**CYCLES)(70) == 0.1
    assert math.isclose(LambdaWarmUpCosineScheduler2(**CYCLES)(1000), 0.1, abs_tol=1e-15)


def test_cycles_of_cosines():
    schedule = LambdaWarmUpCosineScheduler2(**CYCLES)
    assert schedule(0) == 0.0 and math.isclose(schedule(5), 0.5, abs_tol=1e-15)
    assert math.isclose(schedule(10), 1.0, abs_tol=1e-15)
    assert math.isclose(schedule(20), 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), abs_tol=1e-15)
    assert math.isclose(schedule(30), 0.6, abs_tol=1e-15)
    assert math.isclose(schedule(50), 0.2, abs_tol=1e-15)
    assert math.isclose(schedule(51), 0.3 + 0.2 / 4, abs_tol=1e-15)


def test_one_cosine():
    schedule = LambdaWarmUpCosineScheduler(
        warm_up_steps=8, lr_min=0.1, lr_max=0.9, lr_start=0.5, max_decay_steps=48
    )
    assert schedule(0) == 0.5 and math.isclose(schedule(4), 0.7, abs_tol=1e-15)
    assert math.isclose(schedule(8), 0.9, abs_tol=1e-15)
    assert math.isclose(schedule(28), 0.5, abs_tol=1e-15)
    assert math.isclose(schedule(18), 0.1 + 0.4 * (1 + math.cos(math.pi / 4)), abs_tol=1e-15)
    assert math.isclose(schedule(48), 0.1, abs_tol=1e-15) and schedule(99) == schedule(48)


def test_without_warm_up_the_curve_begins_at_once():
    assert LambdaWarmUpCosineScheduler(0, 0.1, 0.9, 0.5, 10)(0) == 0.9


def test_torch_takes_the_factors():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lr_lambda=LambdaLinearScheduler(**CYCLES).schedule
    )
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 0.05, 0.1], abs=1e-12)


def test_a_warm_up_longer_than_its_cycle_is_refused():
    with pytest.raises(UsageError, match=r"a cycle of 20 steps cannot hold a warm-up of 20"):
        LambdaLinearScheduler(**{**CYCLES, "warm_up_steps": [10, 20]})
    with pytest.raises(
        UsageError, match=r"warm_up_steps should lie in \[0, max_decay_steps\), got 48 and 48"
    ):
        LambdaWarmUpCosineScheduler(48, 0.1, 0.9, 0.5, 48)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(UsageError, match="need one number a cycle, got 2, 2, 2, 2, 1"):
        LambdaWarmUpCosineScheduler2(**{**CYCLES, "cycle_lengths": [50]})
