"""The published updates, held to the laws they were derived from."""

import itertools
import math

import numpy as np
import pytest
import torch

from ldm.process.gaussian import posterior
from ldm.process.steps import (
    ddim_inverse_step,
    ddim_std,
    ddim_step,
    ddpm_step,
    dpm_solver_pp_step,
    dpm_solver_step,
    plms_eps,
)

LOW = torch.tensor([0.2, 0.5], dtype=torch.float64)  # alpha_bar, one level per image
HIGH = torch.tensor([0.6, 0.9], dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def normals(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 5, 3, generator=g, dtype=torch.float64) for _ in range(count)]


def mix(x0, eps, alpha_bar):
    a = alpha_bar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_with_exact_noise_ddim_stays_on_the_line_from_x0_to_eps():
    x0, eps = normals(2)
    x_prev, pred_x0 = ddim_step(mix(x0, eps, LOW), eps, alpha_bar_t=LOW, alpha_bar_prev=HIGH)
    close(x_prev, mix(x0, eps, HIGH))
    close(pred_x0, x0)


def test_ddim_to_the_clean_level_is_the_predicted_clean_sample():
    x_t, eps = normals(2)
    x_prev, pred_x0 = ddim_step(x_t, eps, alpha_bar_t=LOW, alpha_bar_prev=torch.ones_like(LOW))
    close(x_prev, pred_x0, atol=0)


def test_ddim_at_eta_one_is_the_ancestral_step_of_ddpm():
    x_t, eps, noise = normals(3)
    std = ddim_std(LOW, HIGH, 1.0)
    close(std**2, posterior(LOW, HIGH).variance)
    x_prev, pred_x0 = ddim_step(x_t, eps, alpha_bar_t=LOW, alpha_bar_prev=HIGH, std=std, noise=noise)
    close(x_prev, ddpm_step(x_t, pred_x0, alpha_bar_t=LOW, alpha_bar_prev=HIGH, noise=noise))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_marginal_of_the_level(eta):
    """For x0 = 0 and exact eps, x_prev must have variance 1 - alpha_bar_prev whatever eta is."""
    eps, noise = normals(2)
    std = ddim_std(LOW, HIGH, eta)
    x_t = mix(torch.zeros_like(eps), eps, LOW)
    kept, _ = ddim_step(x_t, eps, alpha_bar_t=LOW, alpha_bar_prev=HIGH, std=std, noise=torch.zeros_like(eps))
    moved, _ = ddim_step(x_t, eps, alpha_bar_t=LOW, alpha_bar_prev=HIGH, std=std, noise=noise)
    weight_eps = (kept / eps).flatten(1)[:, 0]
    weight_noise = ((moved - kept) / noise).flatten(1)[:, 0]
    close(weight_eps**2 + weight_noise**2, 1 - HIGH)


def test_a_given_clean_sample_is_used_as_it_is():
    """As a quantised one is; and from a velocity a step from pure noise (alpha_bar = 0) stays finite."""
    x_t, eps, better = normals(3)
    x_prev, pred_x0 = ddim_step(x_t, eps, alpha_bar_t=scalar(0.0), alpha_bar_prev=scalar(0.3), pred_x0=better)
    assert pred_x0 is better
    close(x_prev, math.sqrt(0.3) * better + math.sqrt(0.7) * eps)


def test_inverse_step_undoes_the_step_when_given_the_same_noise():
    x_t, eps = normals(2)
    x_prev, _ = ddim_step(x_t, eps, alpha_bar_t=LOW, alpha_bar_prev=HIGH)
    close(ddim_inverse_step(x_prev, eps, alpha_bar_t=HIGH, alpha_bar_next=LOW), x_t)


def test_one_level_for_all_equals_the_same_level_per_image():
    x_t, eps, noise = normals(3)
    each = torch.full((2,), 0.2, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64)
    for (t, prev), (t_all, prev_all) in [(each, (scalar(0.2), scalar(0.6)))]:
        std, std_all = ddim_std(t, prev, 0.5), ddim_std(t_all, prev_all, 0.5)
        close(
            ddim_step(x_t, eps, alpha_bar_t=t, alpha_bar_prev=prev, std=std, noise=noise)[0],
            ddim_step(x_t, eps, alpha_bar_t=t_all, alpha_bar_prev=prev_all, std=std_all, noise=noise)[0],
        )
        close(
            ddpm_step(x_t, eps, alpha_bar_t=t, alpha_bar_prev=prev, noise=noise),
            ddpm_step(x_t, eps, alpha_bar_t=t_all, alpha_bar_prev=prev_all, noise=noise),
        )


def test_a_number_a_0d_level_and_a_level_per_image_step_alike():
    """To the last bit for the first two; from the clean level and to it, where a logarithm is infinite."""
    x, one, other, noise = normals(4)
    std = ddim_std(0.2, 0.6, 0.5)
    steps = {
        "ddim": lambda low, high: ddim_step(
            x, one, alpha_bar_t=low, alpha_bar_prev=high, std=std, noise=noise
        )[0],
        "back": lambda low, high: ddim_inverse_step(x, one, alpha_bar_t=high, alpha_bar_next=low),
        "ddpm": lambda low, high: ddpm_step(x, one, alpha_bar_t=low, alpha_bar_prev=high, noise=noise),
        "++": lambda low, high: dpm_solver_pp_step(
            x, [one, other], alpha_bars=[low, low / 2], alpha_bar_next=high
        ),
        "eps": lambda low, high: dpm_solver_step(
            x, [one, other], alpha_bars=[low, low / 2], alpha_bar_next=high
        ),
        "clean": lambda low, high: dpm_solver_pp_step(x, [one], alpha_bars=[low], alpha_bar_next=high / high),
    }
    for step in steps.values():
        number, all_, each = (
            step(*levels)
            for levels in ((0.2, 0.6), (scalar(0.2), scalar(0.6)), (scalar([0.2] * 2), scalar([0.6] * 2)))
        )
        close(number, all_, atol=0)
        close(number, each, atol=1e-14)
    for step in (
        "ddim",
        "back",
        "ddpm",
    ):  # between two levels without signal there is no number, and no exception
        assert steps[step](scalar(0.0), scalar(0.0)).shape == x.shape
    assert isinstance(std, float) and ddim_std(scalar(0.2), scalar(0.6), 0.5) == std


def test_a_factor_is_not_rounded_to_half_precision_before_it_multiplies():
    """As a 0-d tensor on the left of a product it would be, and cost up to half a bit more."""
    x0, eps = (n.half() for n in normals(2))
    low, high = scalar(0.2), scalar(0.6)
    got, _ = ddim_step(x0, eps, alpha_bar_t=low, alpha_bar_prev=high, pred_x0=x0)
    want = math.sqrt(0.6) * x0 + math.sqrt(0.4) * eps
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_levels_in_float64_leave_the_latents_their_dtype_and_precision(dtype):
    """Near the clean end 1 - alpha_bar is 8.5e-4; rounded to half precision first, it would be off by 4 %."""
    x0, eps = (n.to(dtype) for n in normals(2))
    for clean in (scalar(0.99915), torch.full((2,), 0.99915, dtype=torch.float64)):
        x_t = mix(x0.double(), eps.double(), clean).to(dtype)
        x_prev, pred_x0 = ddim_step(x_t, eps, alpha_bar_t=clean, alpha_bar_prev=torch.ones_like(clean))
        assert x_prev.dtype == pred_x0.dtype == dtype
        close(pred_x0.double(), x0.double(), atol=4 * torch.finfo(dtype).eps)


def test_levels_in_the_wrong_order_are_named_in_the_message():
    x = torch.zeros(2, 4, 5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must be >= alpha_bar_t; got \[0\.2, 0\.5\] < \[0\.6, 0\.9\]"):
        ddim_step(x, x, alpha_bar_t=HIGH, alpha_bar_prev=LOW)
    with pytest.raises(ValueError, match=r"must be <= alpha_bar_t; got \[0\.6, 0\.9\] > \[0\.2, 0\.5\]"):
        ddim_inverse_step(x, x, alpha_bar_t=LOW, alpha_bar_next=HIGH)


def test_a_stochastic_step_without_noise_is_refused():
    x = torch.zeros(2, 4, 5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs noise when std is given, got noise=None"):
        ddim_step(x, x, alpha_bar_t=LOW, alpha_bar_prev=HIGH, std=ddim_std(LOW, HIGH, 1.0))


def test_ddpm_draws_from_the_posterior_and_adds_nothing_at_the_clean_level():
    x0, x_t, noise = normals(3)
    q = posterior(LOW, HIGH, v_posterior=0.25)
    mean = ddpm_step(x_t, x0, alpha_bar_t=LOW, alpha_bar_prev=HIGH, noise=0 * noise, v_posterior=0.25)
    drawn = ddpm_step(x_t, x0, alpha_bar_t=LOW, alpha_bar_prev=HIGH, noise=noise, v_posterior=0.25)
    close(((drawn - mean) / noise)[:, 0, 0, 0] ** 2, q.variance)
    # With v_posterior = 1 the variance at the clean level would be beta; the published chain adds none.
    one = torch.ones_like(LOW)
    close(ddpm_step(x_t, x0, alpha_bar_t=LOW, alpha_bar_prev=one, noise=noise, v_posterior=1.0), x0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_integrates_polynomials_of_its_order_exactly(order):
    """Adams-Bashforth of order k, from values at 0, -1, ..., is the integral of a degree k-1 polynomial."""
    for degree in range(order):
        values = [scalar(float((-i) ** degree)) for i in range(order)]
        close(plms_eps(values[0], values[:0:-1]), scalar(1 / (degree + 1)), atol=1e-14)
    values = [scalar(float((-i) ** order)) for i in range(order)]
    assert abs(plms_eps(values[0], values[:0:-1]) - 1 / (order + 1)) > 0.1


def test_plms_looks_back_three_levels_and_no_further():
    values = [scalar(v) for v in (9.0, 1.0, 2.0, 4.0, 7.0)]
    close(plms_eps(values[4], values[:4]), plms_eps(values[4], values[1:4]), atol=0)


# --- DPM-Solver: x_next is an integral over lambda = log(alpha / sigma), which is done here by quadrature.


def level(half_log_snr):
    return torch.sigmoid(2 * scalar(half_log_snr))


def exact(x, at, to, function, predict):
    """Integrate the probability flow from log-SNR/2 `at` to `to`, for predictions that depend on it alone."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    points = (to - at) / 2 * nodes + (to + at) / 2
    signal, sigma = (math.sqrt(v) for v in (level(to), 1 - level(to)))
    signal_at, sigma_at = (math.sqrt(v) for v in (level(at), 1 - level(at)))
    if predict == "x0":  # Eq. 8 of DPM-Solver++
        integral = sum(w * math.exp(p) * function(p) for p, w in zip(points, weights, strict=True))
        return sigma / sigma_at * x + sigma * integral * (to - at) / 2
    integral = sum(w * math.exp(-p) * function(p) for p, w in zip(points, weights, strict=True))
    return signal / signal_at * x - signal * integral * (to - at) / 2  # Eq. 3.4 of DPM-Solver


STEPS = {"x0": dpm_solver_pp_step, "eps": dpm_solver_step}
TIMES = [0.1, -0.5, -0.8]  # newest first, unevenly spaced


@pytest.mark.parametrize(("predict", "order"), itertools.product(STEPS, [1, 2, 3]))
def test_dpm_solvers_are_exact_for_polynomials_of_their_order(predict, order):
    def polynomial(point):
        return sum(c * point**k for k, c in enumerate([0.7, -0.4, 0.3][:order]))

    outputs = [scalar(polynomial(t)) for t in TIMES[:order]]
    got = STEPS[predict](
        scalar(1.3),
        outputs,
        alpha_bars=[level(t) for t in TIMES[:order]],
        alpha_bar_next=level(0.6),
        solver_type="taylor",
    )
    close(got, scalar(exact(1.3, TIMES[0], 0.6, polynomial, predict)))


@pytest.mark.parametrize("predict", STEPS)
def test_midpoint_differs_from_taylor_by_the_third_order_of_the_step(predict):
    def gap(h):
        both = [
            STEPS[predict](
                scalar(1.3),
                [scalar(0.7), scalar(0.7 + h)],
                alpha_bars=[level(0.1), level(0.1 - h)],
                alpha_bar_next=level(0.1 + h),
                solver_type=kind,
            )
            for kind in ("midpoint", "taylor")
        ]
        return abs(both[0] - both[1]).item()

    assert 7.5 < gap(0.02) / gap(0.01) < 8.5


def test_first_order_dpm_solvers_are_ddim():
    x_t, eps = normals(2)
    low, high = scalar(0.2), scalar(0.6)
    want, pred_x0 = ddim_step(x_t, eps, alpha_bar_t=low, alpha_bar_prev=high)
    close(dpm_solver_step(x_t, [eps], alpha_bars=[low], alpha_bar_next=high), want)
    close(dpm_solver_pp_step(x_t, [pred_x0], alpha_bars=[low], alpha_bar_next=high), want)
    clean = dpm_solver_pp_step(x_t, [pred_x0], alpha_bars=[low], alpha_bar_next=scalar(1.0))
    close(clean, pred_x0)


@pytest.mark.parametrize("step", STEPS.values())
def test_dpm_solvers_refuse_what_they_cannot_use(step):
    x, low, mid = scalar(1.0), scalar(0.2), scalar(0.6)
    with pytest.raises(ValueError, match="1 to 3 predictions with as many levels, got 0 and 0"):
        step(x, [], alpha_bars=[], alpha_bar_next=mid)
    with pytest.raises(ValueError, match="got 2 and 1"):
        step(x, [x, x], alpha_bars=[low], alpha_bar_next=mid)
    with pytest.raises(ValueError, match="one of midpoint, taylor; got 'heun'"):
        step(x, [x], alpha_bars=[low], alpha_bar_next=mid, solver_type="heun")


def test_only_first_order_reaches_the_clean_level():
    x = scalar(1.0)
    with pytest.raises(ValueError, match=r"\(alpha_bar_next = 1\) takes one prediction, got 2"):
        dpm_solver_pp_step(x, [x, x], alpha_bars=[scalar(0.6), scalar(0.2)], alpha_bar_next=scalar(1.0))
