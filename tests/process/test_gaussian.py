"""The Gaussians of diffusion against Bayes' rule, against sampling, and against the recorded tables."""

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import UsageError
from ldm.process.gaussian import (
    clipped_log,
    draw,
    draw_prev,
    posterior,
    posterior_mean,
    q_sample,
    vlb_weights,
)
from ldm.process.schedule import NoiseSchedule


def levels(num_steps=13):
    schedule = NoiseSchedule.named("linear", num_steps, linear_start=0.01, linear_end=0.3)
    return (torch.from_numpy(x) for x in (schedule.betas, schedule.alpha_bar, schedule.alpha_bar_prev))


def test_noising_twice_is_noising_once():
    """The closed form of Eq. 4 is the chain x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise."""
    betas, alpha_bar, _ = levels()
    x0 = torch.linspace(-2, 3, 5, dtype=torch.float64)
    mean, variance = x0, torch.zeros((), dtype=torch.float64)
    for beta in betas:
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
    nothing, one = torch.zeros_like(x0), torch.ones_like(x0)
    torch.testing.assert_close(q_sample(x0, nothing, alpha_bar=alpha_bar[-1]), mean, rtol=0, atol=1e-14)
    spread = q_sample(nothing, one, alpha_bar=alpha_bar[-1])
    torch.testing.assert_close(spread, variance.sqrt().expand(5), rtol=0, atol=1e-14)


def test_a_given_sigma_replaces_the_computed_one():
    x0, noise = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 4.0])
    got = q_sample(x0, noise, alpha_bar=torch.tensor(0.25), sigma=torch.tensor(0.1))
    torch.testing.assert_close(got, torch.tensor([1.05, -0.1]), rtol=0, atol=1e-7)


def test_the_posterior_is_the_one_that_bayes_gives():
    """p(x_prev | x_t, x0) ~ q(x_t | x_prev) q(x_prev | x0): precisions add, means weigh by precision."""
    betas, alpha_bar, before = levels()
    betas, alpha_bar, before = betas[1:], alpha_bar[1:], before[1:]
    q = posterior(alpha_bar, before)
    precision = (1 - betas) / betas + 1 / (1 - before)
    torch.testing.assert_close(q.variance, 1 / precision, rtol=0, atol=1e-14)
    x0, x_t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.9, dtype=torch.float64)
    mean = ((1 - betas).sqrt() / betas * x_t + before.sqrt() / (1 - before) * x0) / precision
    got = posterior_mean(x0, x_t, coef_x0=q.coef_x0, coef_x_t=q.coef_x_t)
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-13)


def test_a_posterior_may_leap_over_levels():
    """Stepping 9 -> 4 at once has the spread that a chain through all levels between has."""
    _, alpha_bar, _ = levels()
    alpha = alpha_bar[9] / alpha_bar[4]
    q = posterior(alpha_bar[9], alpha_bar[4])
    precision = alpha / (1 - alpha) + 1 / (1 - alpha_bar[4])
    torch.testing.assert_close(q.variance, 1 / precision, rtol=0, atol=1e-14)
    # On the noiseless line x_t = sqrt(alpha_bar) x0, the mean is on it too.
    on_line = posterior_mean(
        torch.ones(1, dtype=torch.float64), alpha_bar[9].sqrt(), coef_x0=q.coef_x0, coef_x_t=q.coef_x_t
    )
    torch.testing.assert_close(on_line, alpha_bar[4].sqrt().reshape(1), rtol=0, atol=1e-14)


def test_v_posterior_runs_from_the_posterior_to_beta():
    betas, alpha_bar, before = levels()
    least, most, middle = (posterior(alpha_bar, before, v_posterior=v).variance for v in (0.0, 1.0, 0.25))
    torch.testing.assert_close(most, betas, rtol=0, atol=1e-14)
    torch.testing.assert_close(middle, 0.75 * least + 0.25 * most, rtol=0, atol=1e-15)
    assert (least < most).all() and least[0] == 0


def test_the_log_of_no_variance_is_floored():
    got = clipped_log(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        got, torch.tensor([-46.051701859880914, 0.0], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_draw_has_its_mean_and_spread():
    mean, noise = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -2.0])
    got = draw(mean, torch.tensor(0.25).log(), noise)
    torch.testing.assert_close(got, torch.tensor([1.0, 2.5, 2.0]), rtol=0, atol=1e-6)


def test_a_step_back_is_noisy_but_from_the_cleanest_level():
    """Each sample by its own level: only those that leave level 0 are their mean."""
    mean, noise = torch.zeros(3, 2, 1), torch.tensor([1.0, -2.0]).reshape(1, 2, 1).expand(3, 2, 1)
    got = draw_prev(mean, torch.full_like(mean, 0.25).log(), noise, torch.tensor([4, 0, 1]))
    torch.testing.assert_close(got, 0.5 * noise * torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1))


def test_weights_of_the_bound():
    """L_t = beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps error|^2 is the KL of two Gaussians (Eq. 8, 12)."""
    betas, alpha_bar, before = levels()
    q = posterior(alpha_bar, before)
    weights = vlb_weights("eps", betas, alpha_bar, q.variance)
    # One unit of error in eps moves the predicted x0 by -sigma / sqrt(alpha_bar), and with it the mean.
    shift = q.coef_x0 * ((1 - alpha_bar) / alpha_bar).sqrt()
    torch.testing.assert_close(weights[1:], (shift**2 / (2 * q.variance))[1:], rtol=0, atol=1e-12)
    assert weights[0] == weights[1]
    torch.testing.assert_close(vlb_weights("v", betas, alpha_bar, q.variance), torch.ones_like(betas))
    x0 = vlb_weights("x0", betas, alpha_bar, q.variance)
    torch.testing.assert_close(x0[5], 0.5 * alpha_bar[5].sqrt() / (2 - alpha_bar[5]), rtol=0, atol=1e-15)


def test_a_chain_of_one_level_has_its_own_weight():
    half = torch.tensor([0.5])
    assert vlb_weights("eps", half, half, half).tolist() == [1.0]


def test_weights_of_an_unknown_prediction_are_refused():
    one = torch.ones(2)
    with pytest.raises(UsageError, match="prediction 'mean' is unknown"):
        vlb_weights("mean", one, one, one)


def test_the_recorded_posterior_tables_come_out(golden):
    recorded = load_file(golden / "diffusion.safetensors")
    schedule = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
    q = posterior(torch.from_numpy(schedule.alpha_bar), torch.from_numpy(schedule.alpha_bar_prev))
    for name, got in (
        ("posterior_mean_coef1", q.coef_x0),
        ("posterior_mean_coef2", q.coef_x_t),
        ("posterior_variance", q.variance),
        ("posterior_log_variance_clipped", clipped_log(q.variance)),
    ):
        torch.testing.assert_close(got.float(), recorded["buf." + name], rtol=0, atol=1e-7)
