"""Noise schedules: their laws, the recorded tables of both originals, and what is refused."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import UsageError
from ldm.process.schedule import (
    LEAST_SIGNAL,
    SCHEDULES,
    NoiseSchedule,
    betas_for_alpha_bar,
    named_betas,
    zero_terminal_snr,
)

V1 = {"linear_start": 0.00085, "linear_end": 0.012}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [21, 1000])
def test_every_schedule_only_ever_adds_noise(name, num_steps):
    schedule = NoiseSchedule.named(name, num_steps)
    assert schedule.betas.shape == (num_steps,) and schedule.betas.dtype == np.float64
    assert (schedule.betas > 0).all() and (schedule.betas < 1).all()
    assert (np.diff(schedule.alpha_bar) < 0).all() and (np.diff(schedule.sigma) > 0).all()
    assert (np.diff(schedule.log_snr) < 0).all()
    assert schedule.num_steps == num_steps


def test_a_schedule_is_one_thing_seen_four_ways():
    schedule = NoiseSchedule.named("linear", 37, **V1)
    np.testing.assert_allclose(schedule.alpha_bar / schedule.alpha_bar_prev, 1 - schedule.betas, atol=1e-15)
    np.testing.assert_allclose(schedule.log_snr, -2 * np.log(schedule.sigma), atol=1e-12)
    assert schedule.alpha_bar_prev[0] == 1.0
    np.testing.assert_array_equal(schedule.alpha_bar_prev[1:], schedule.alpha_bar[:-1])


def test_lines_begin_and_end_where_they_were_told_to():
    for name, power in (("linear", 1), ("sqrt_linear", 1), ("sqrt", 0.5)):
        betas = named_betas(name, 11, **V1)
        np.testing.assert_allclose(betas[[0, -1]], [0.00085**power, 0.012**power], rtol=0, atol=1e-15)
    middle = named_betas("linear", 11, **V1)[5]
    assert math.isclose(math.sqrt(middle), (math.sqrt(0.00085) + math.sqrt(0.012)) / 2, abs_tol=1e-12)


def test_openai_linear_adds_about_the_same_noise_for_any_length():
    ends = [NoiseSchedule.named("openai-linear", n).alpha_bar[-1] for n in (500, 1000, 4000)]
    assert all(math.isclose(math.log(end), -10.05, abs_tol=0.3) for end in ends), ends


def test_the_cosine_schedules_follow_a_squared_cosine():
    """Eq. 17 of Improved DDPM, down to where betas are cut off."""
    t = (np.arange(200) + 1) / 200
    curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    for name in ("cosine", "openai-cosine"):
        alpha_bar = NoiseSchedule.named(name, 200).alpha_bar
        np.testing.assert_allclose(alpha_bar[:-1], curve[:-1], rtol=0, atol=1e-12)
        assert named_betas(name, 200)[-1] == 0.999


def test_betas_for_alpha_bar_are_cut_off():
    betas = betas_for_alpha_bar(3, lambda t: 1.0 - t, max_beta=0.6)
    np.testing.assert_allclose(betas, [1 / 3, 0.5, 0.6], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["linear", "sqrt_linear", "sqrt", "cosine"])
def test_compvis_tables_come_out_to_the_last_bit_or_two(golden, name):
    recorded = load_file(golden / "modules.safetensors")["beta." + name]
    np.testing.assert_allclose(named_betas(name, 1000, **V1), recorded, rtol=0, atol=3e-16)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_openai_tables_come_out_to_the_last_bit(golden, name):
    recorded = load_file(golden / "gaussian.safetensors")["gd.betas." + name]
    np.testing.assert_allclose(named_betas("openai-" + name, 50), recorded, rtol=0, atol=1e-16)


def test_stable_diffusion_has_its_published_levels():
    schedule = NoiseSchedule.named("linear", 1000, **V1)
    np.testing.assert_allclose(schedule.alpha_bar[[0, -1]], [0.99915, 0.0046600985], rtol=0, atol=1e-9)
    np.testing.assert_allclose(schedule.sigma[[0, -1]], [0.0291675, 14.61464], rtol=0, atol=1e-5)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"'liner' is unknown; choose one of linear, sqrt_linear, sqrt, cosine, op"
    ):
        named_betas("liner", 10)


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="at least 1 step, got 0"):
        named_betas("linear", 0)


def test_betas_beyond_one_are_refused_with_their_range():
    with pytest.raises(
        UsageError, match=r"'openai-linear' with 10 steps gives betas from 0\.01 to 2, wanted all"
    ):
        named_betas("openai-linear", 10)
    with pytest.raises(UsageError, match=r"betas must lie in \[0, 1\), got 0\.1 to 1\.5"):
        NoiseSchedule.from_betas(np.array([0.1, 1.5]))


def test_betas_of_a_wrong_shape_are_refused():
    with pytest.raises(UsageError, match=r"one non-empty row of numbers, got shape \(2, 3\)"):
        NoiseSchedule.from_betas(np.zeros((2, 3)))
    with pytest.raises(UsageError, match=r"got shape \(0,\)"):
        NoiseSchedule.from_betas(np.zeros(0))


# --- zero terminal SNR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("linear", V1), ("sqrt_linear", {}), ("cosine", {})])
def test_a_rescaled_schedule_ends_without_signal_and_begins_as_before(name, options):
    betas = named_betas(name, 37, **options)
    before = NoiseSchedule.from_betas(betas)
    after = NoiseSchedule.from_betas(zero_terminal_snr(betas), last_is_one=True)
    assert after.alpha_bar[-1] == 0 and after.betas[-1] == 1 and after.sigma[-1] == np.inf
    assert after.alpha_bar[0] == pytest.approx(before.alpha_bar[0], abs=1e-15)
    assert (np.diff(after.alpha_bar) < 0).all() and (after.alpha_bar[1:] < before.alpha_bar[1:]).all()
    # The roots keep their shape: a straight line takes one to the other.
    old, new = np.sqrt(before.alpha_bar), np.sqrt(after.alpha_bar)
    slope = new[0] / (old[0] - old[-1])
    np.testing.assert_allclose(new, slope * (old - old[-1]), rtol=0, atol=1e-12)


def test_rescaling_agrees_with_diffusers():
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    betas = named_betas("linear", 1000, **V1)
    theirs = ddim.rescale_zero_terminal_snr(torch.from_numpy(betas.copy())).numpy()
    np.testing.assert_allclose(zero_terminal_snr(betas), theirs, rtol=0, atol=1e-13)


def test_what_divides_by_the_signal_keeps_a_little():
    betas = zero_terminal_snr(named_betas("linear", 1000, **V1), LEAST_SIGNAL)
    schedule = NoiseSchedule.from_betas(betas)
    assert (
        schedule.alpha_bar[-1] == pytest.approx(2**-24, rel=1e-9) and (np.diff(schedule.alpha_bar) < 0).all()
    )


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.0, 0.0]])
def test_a_schedule_without_growing_noise_cannot_be_rescaled(betas):
    with pytest.raises(UsageError, match="needs at least 2 levels and growing noise"):
        zero_terminal_snr(np.array(betas))


def test_a_beta_of_one_is_for_the_last_level_only():
    for betas in ([0.1, 1.0], [1.0, 0.1], [1.0, 1.0]):
        with pytest.raises(UsageError, match=r"betas must lie in \[0, 1\)"):
            NoiseSchedule.from_betas(np.array(betas), last_is_one=betas != [0.1, 1.0])
