"""The small scheduler, for loops written by hand."""

import math

import pytest
import torch
from linear_gaussian import LinearGaussian, Wavy, mix, normals

from ldm.errors import UsageError
from ldm.models.diffusion.samplers import sample_steps
from ldm.models.diffusion.scheduler import DDIMScheduler

SHAPE = (2, 4, 5, 3)
MEANS = torch.tensor([0.8, -0.3])


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_loop_by_hand_makes_the_samplers_numbers(eta):
    model = LinearGaussian()
    x_T, *noises = normals(*SHAPE, count=21)
    scheduler = DDIMScheduler()
    zt = x_T
    for t, noise in zip(scheduler.get_timesteps(1000, 20), noises, strict=True):
        eps = model.apply_model(zt, t.expand(len(zt)), MEANS)
        zt = scheduler.get_xt_prev(zt, t, eps, scheduler.get_std(t, eta), noise=noise)
    coming = iter(noises)
    *_, last = sample_steps("ddim", model, x_T, MEANS, steps=20, eta=eta, noise=lambda _: next(coming))
    torch.testing.assert_close(zt, last.x_t, rtol=0, atol=1e-12)


def test_levels_are_counted_from_zero():
    """What texts that count from one write as 1000, 950, ..., 50 is the spacing 'trailing'."""
    assert DDIMScheduler().get_timesteps(1000, 20).tolist() == list(range(951, 0, -50))
    trailing = DDIMScheduler(spacing="trailing").get_timesteps(1000, 20)
    assert (trailing + 1).tolist() == list(range(1000, 0, -50))
    assert len(DDIMScheduler(spacing="compvis").get_timesteps(1000, 30)) == 31
    assert DDIMScheduler().timesteps.tolist() == list(range(999, -1, -1))


def test_the_schedule_is_stable_diffusions_unless_given():
    table = DDIMScheduler().alphas_cumprod
    assert table.shape == (1000,) and table.dtype == torch.float32
    assert table[0].item() == pytest.approx(0.99915) and table[999].item() == pytest.approx(0.0046600985)
    own = Wavy(num_timesteps=30).alphas_cumprod
    torch.testing.assert_close(DDIMScheduler(own).alphas_cumprod, own, rtol=0, atol=0)


def test_std_is_zero_without_eta_and_the_posteriors_at_one():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    a, b = (scheduler.alphas_cumprod[t].item() for t in (501, 401))
    assert scheduler.get_std(501, 0.0) == 0
    want = math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    assert scheduler.get_std(torch.tensor(501), 1.0).item() == pytest.approx(want, abs=1e-12)
    assert scheduler.get_std(501, 0.5).item() == pytest.approx(want / 2, abs=1e-12)


@pytest.mark.parametrize("to_one", [False, True])
def test_the_last_step_ends_at_level_zero_or_clean(to_one):
    x0, eps = normals(*SHAPE, count=2)
    scheduler = DDIMScheduler(set_alpha_to_one=to_one)
    scheduler.set_timesteps(10)
    end = 1.0 if to_one else scheduler.alphas_cumprod[0].item()
    got = scheduler.get_xt_prev(scheduler.add_noise(x0, eps, 1), 1, eps)
    torch.testing.assert_close(got, mix(x0, eps, end), rtol=0, atol=1e-12)


def test_noise_is_added_at_one_level_or_one_each():
    x0, noise = normals(*SHAPE, count=2)
    scheduler = DDIMScheduler()
    levels = torch.tensor([3, 981])
    each = scheduler.add_noise(x0, noise, levels)
    for row, level in enumerate(levels.tolist()):
        torch.testing.assert_close(
            each[row], mix(x0, noise, scheduler.alphas_cumprod[level])[row], rtol=0, atol=1e-12
        )
        torch.testing.assert_close(scheduler.add_noise(x0, noise, level)[row], each[row], rtol=0, atol=1e-12)
    assert scheduler.add_noise(x0.half(), noise.half(), levels).dtype == torch.float16


def test_undrawn_noise_comes_from_the_global_generator():
    x, eps = normals(*SHAPE, count=2)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    std = scheduler.get_std(901, 1.0)
    torch.manual_seed(4)
    drawn = scheduler.get_xt_prev(x, 901, eps, std)
    torch.manual_seed(4)
    given = scheduler.get_xt_prev(x, 901, eps, std, noise=torch.randn(SHAPE, dtype=torch.float64))
    torch.testing.assert_close(drawn, given, rtol=0, atol=0)


def test_input_and_initial_noise_are_unscaled():
    x = normals(*SHAPE)[0]
    assert DDIMScheduler().scale_model_input(x, 981) is x
    assert DDIMScheduler().init_noise_sigma == 1.0


def test_what_does_not_fit_is_named():
    scheduler = DDIMScheduler()
    with pytest.raises(UsageError, match="this schedule has 1000 levels, got T=500"):
        scheduler.get_timesteps(500, 20)
    with pytest.raises(UsageError, match="steps must be a whole number from 1 to 1000, got 0"):
        scheduler.get_timesteps(1000, 0)
    scheduler.set_timesteps(10)
    with pytest.raises(UsageError, match="level 950 is not among the 10 timesteps"):
        scheduler.get_std(950, 0.0)
    for eta in (-1.0, math.nan):
        with pytest.raises(UsageError, match=f"eta must be from 0 to 1, got {eta}"):
            scheduler.get_std(901, eta)
