"""One pure function per published update: from a level and a prediction to the next level.

Levels are alpha_bar, the fraction of signal variance, as numbers or 0-d tensors, or (b,), one level per image. Best
are numbers or 0-d float64 tensors on the CPU: factors are worked out in the levels' precision, multiply latents of any
dtype on any device, and no step waits for an accelerator.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from torch import Tensor

from ldm.process.gaussian import posterior, posterior_mean
from ldm.process.prediction import to_x0
from ldm.process.scalars import Scalar, above_0, expm1, log, scalar, sqrt

SOLVER_TYPES = ("midpoint", "taylor")


def ddim_std(alpha_bar_t: Scalar, alpha_bar_prev: Scalar, eta: float) -> Scalar:
    """Work out how much fresh noise a DDIM step adds: sigma_t of Eq. 16 (arXiv:2010.02502).

    Args:
        alpha_bar_t, alpha_bar_prev: levels stepped from and to, numbers or any one shape, which the answer has.
        eta: 0 = none, 1 = the standard deviation of DDPM's posterior.
    """
    return eta * sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))


def ddim_step(
    x_t: Tensor,
    eps: Tensor,
    *,
    alpha_bar_t: Scalar,
    alpha_bar_prev: Scalar,
    std: Scalar | None = None,
    noise: Tensor | None = None,
    pred_x0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step to a cleaner level through the predicted clean sample: Eq. 12 of DDIM (arXiv:2010.02502).

    Args:
        x_t: (b, ...) noisy sample.
        eps: predicted noise, after guidance, shaped like x_t.
        alpha_bar_t: level of x_t, in (0, 1).
        alpha_bar_prev: level stepped to, not below alpha_bar_t; 1 is clean.
        std: standard deviation of the fresh noise, from `ddim_std`; None = deterministic.
        noise: unit normal, shaped like x_t. Needed with std; the caller owns the generator.
        pred_x0: predicted clean sample, where the caller has a better one than x_t and eps give: quantised,
            or from a velocity (which stays finite at alpha_bar_t = 0).

    Returns:
        (x_prev, pred_x0), shaped like x_t.

    Raises:
        ValueError: std without noise, or levels in the wrong order (checked for levels on the CPU, where
            reading them waits for no device).
    """
    if std is not None and noise is None:
        raise ValueError("ddim_step needs noise when std is given, got noise=None")
    alpha_bar_t, alpha_bar_prev = scalar(alpha_bar_t), scalar(alpha_bar_prev)
    if _any(alpha_bar_prev < alpha_bar_t):
        raise ValueError(
            "ddim_step goes from noisy to clean, so alpha_bar_prev must be >= alpha_bar_t; "
            f"got {_shown(alpha_bar_prev)} < {_shown(alpha_bar_t)}. To add noise, see ddim_inverse_step."
        )
    if pred_x0 is None:
        pred_x0 = _clean(x_t, eps, alpha_bar_t)
    variance = 1 - alpha_bar_prev
    if std is None:
        return _mix(pred_x0, eps, sqrt(alpha_bar_prev), sqrt(variance)), pred_x0
    # From alpha_bar_t = 0 at eta 1 all noise is fresh, and what is left of the old may round below 0.
    std = scalar(std)
    x_prev = _mix(pred_x0, eps, sqrt(alpha_bar_prev), sqrt(above_0(variance - std * std)))
    return x_prev + _factor(std, x_t) * noise, pred_x0


def ddim_inverse_step(
    x_t: Tensor,
    eps: Tensor,
    *,
    alpha_bar_t: Scalar,
    alpha_bar_next: Scalar,
    pred_x0: Tensor | None = None,
) -> Tensor:
    """Step to a noisier level along the deterministic path: DDIM's Eq. 13 read backwards.

    Undoes `ddim_step` exactly when both are given the same eps. In practice eps is the network's answer at
    the cleaner end, so encoding a sample and decoding it returns to it only up to the step size.

    Args:
        x_t: (b, ...) sample at alpha_bar_t, in (0, 1].
        eps: predicted noise, shaped like x_t.
        alpha_bar_next: level stepped to, in [0, 1), not above alpha_bar_t.
        pred_x0: predicted clean sample, as for `ddim_step`.

    Raises:
        ValueError: levels in the wrong order (checked for levels on the CPU).
    """
    alpha_bar_t, alpha_bar_next = scalar(alpha_bar_t), scalar(alpha_bar_next)
    if _any(alpha_bar_next > alpha_bar_t):
        raise ValueError(
            "ddim_inverse_step goes from clean to noisy, so alpha_bar_next must be <= alpha_bar_t; "
            f"got {_shown(alpha_bar_next)} > {_shown(alpha_bar_t)}. To remove noise, see ddim_step."
        )
    if pred_x0 is None:
        pred_x0 = _clean(x_t, eps, alpha_bar_t)
    return _mix(pred_x0, eps, sqrt(alpha_bar_next), sqrt(1 - alpha_bar_next))


def ddpm_step(
    x_t: Tensor,
    pred_x0: Tensor,
    *,
    alpha_bar_t: Scalar,
    alpha_bar_prev: Scalar,
    noise: Tensor,
    v_posterior: float = 0.0,
) -> Tensor:
    """Draw x_prev from q(x_prev | x_t, pred_x0): algorithm 2 of DDPM (arXiv:2006.11239).

    Args:
        x_t: (b, ...) noisy sample.
        pred_x0: predicted clean sample, shaped like x_t.
        alpha_bar_t: level of x_t, in (0, 1).
        alpha_bar_prev: level stepped to, not below alpha_bar_t. At 1 the mean is returned, as published.
        noise: unit normal, shaped like x_t.
        v_posterior: 0 = the posterior's variance, 1 = beta, or between.
    """
    alpha_bar_t, alpha_bar_prev = scalar(alpha_bar_t), scalar(alpha_bar_prev)
    q = posterior(alpha_bar_t, alpha_bar_prev, v_posterior=v_posterior)
    mean = posterior_mean(pred_x0, x_t, coef_x0=_factor(q.coef_x0, x_t), coef_x_t=_factor(q.coef_x_t, x_t))
    return mean + _factor(sqrt(q.variance) * (alpha_bar_prev < 1), x_t) * noise


def plms_eps(eps: Tensor, old_eps: Sequence[Tensor]) -> Tensor:
    """Extrapolate the noise over the coming step from its past: Adams-Bashforth, orders 1 to 4.

    Eq. 9 and 12 of pseudo numerical methods (PNDM, arXiv:2202.09778); the order is what the history allows.

    Args:
        eps: predicted noise at the present level.
        old_eps: those of earlier, evenly spaced levels, oldest first; all but the last three are ignored.
    """
    past = list(old_eps)[::-1]
    if not past:
        return eps
    if len(past) == 1:
        return (3 * eps - past[0]) / 2
    if len(past) == 2:
        return (23 * eps - 16 * past[0] + 5 * past[1]) / 12
    return (55 * eps - 59 * past[0] + 37 * past[1] - 9 * past[2]) / 24


def dpm_solver_step(
    x_t: Tensor,
    eps: Sequence[Tensor],
    *,
    alpha_bars: Sequence[Scalar],
    alpha_bar_next: Scalar,
    solver_type: str = "midpoint",
) -> Tensor:
    """Step by DPM-Solver, multistep: the exact linear part, noise extrapolated in log-SNR.

    Eq. 3.7 of DPM-Solver (arXiv:2206.00927) and its multistep forms. The order is the number of predictions. Those
    of a singlestep solver lie between here and the next level, to which the same formulas apply.

    Args:
        x_t: (b, ...) sample at alpha_bars[0].
        eps: one to three noise predictions, the one at x_t first, then older ones or ones from within the step.
        alpha_bars: their levels, in the same order, each in (0, 1).
        alpha_bar_next: level stepped to, in (0, 1).
        solver_type: weight of the first difference at order 2: "midpoint" (half the value's, the original's
            "dpm_solver") or "taylor" (exact for noise linear in log-SNR).

    Raises:
        ValueError: another number of predictions, or an unknown solver_type.
    """
    alpha_bars, alpha_bar_next = [scalar(level) for level in alpha_bars], scalar(alpha_bar_next)
    first, second, h = _differences(eps, alpha_bars, alpha_bar_next, solver_type)
    phi_1 = expm1(h)
    noise = _sigma(alpha_bar_next)
    x_next = _mix(x_t, eps[0], sqrt(alpha_bar_next / alpha_bars[0]), -noise * phi_1)
    if len(eps) == 2 and solver_type == "midpoint":
        return x_next - _factor(0.5 * noise * phi_1, x_t) * first
    phi_2 = phi_1 / h - 1
    if len(eps) > 1:
        x_next = x_next - _factor(noise * phi_2, x_t) * first
    if len(eps) > 2:
        x_next = x_next - _factor(noise * (phi_2 / h - 0.5), x_t) * second
    return x_next


def dpm_solver_pp_step(
    x_t: Tensor,
    pred_x0: Sequence[Tensor],
    *,
    alpha_bars: Sequence[Scalar],
    alpha_bar_next: Scalar,
    solver_type: str = "midpoint",
) -> Tensor:
    """Step by DPM-Solver++, multistep: as `dpm_solver_step`, with the clean sample extrapolated.

    Eq. 9 and algorithm 2 of DPM-Solver++ (arXiv:2211.01095). The order is the number of predictions.

    Args:
        x_t: (b, ...) sample at alpha_bars[0].
        pred_x0: one to three predicted clean samples, in the order of `dpm_solver_step`'s eps.
        alpha_bars: their levels, in the same order, each in (0, 1).
        alpha_bar_next: level stepped to, in (0, 1]; 1 (clean) only with a single prediction, which is then
            the answer.
        solver_type: as for `dpm_solver_step`.

    Raises:
        ValueError: another number of predictions, an unknown solver_type, or more than one prediction for
            the step to the clean level.
    """
    alpha_bars, alpha_bar_next = [scalar(level) for level in alpha_bars], scalar(alpha_bar_next)
    first, second, h = _differences(pred_x0, alpha_bars, alpha_bar_next, solver_type)
    if len(pred_x0) > 1 and _any(alpha_bar_next == 1):
        raise ValueError(
            f"the step to the clean level (alpha_bar_next = 1) takes one prediction, got {len(pred_x0)}"
        )
    signal = sqrt(alpha_bar_next)
    phi_1 = expm1(-h)
    x_next = _mix(x_t, pred_x0[0], _sigma(alpha_bar_next) / _sigma(alpha_bars[0]), -signal * phi_1)
    if len(pred_x0) == 2 and solver_type == "midpoint":
        return x_next - _factor(0.5 * signal * phi_1, x_t) * first
    phi_2 = phi_1 / h + 1
    if len(pred_x0) > 1:
        x_next = x_next + _factor(signal * phi_2, x_t) * first
    if len(pred_x0) > 2:
        x_next = x_next - _factor(signal * (phi_2 / h - 0.5), x_t) * second
    return x_next


def euler_step(x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
    """Step along the straight line from x to the clean sample: line 8 of algorithm 2 of arXiv:2206.00364.

    In sigma's units (x = x0 + sigma * noise), as all that follow, and with numbers for sigmas. The same as DDIM's step
    without fresh noise, and as the first order of DPM-Solver++.

    Args:
        x: (b, ...) sample at sigma.
        denoised: (b, ...) predicted clean sample.
        sigma, sigma_to: above 0 and not above sigma.
    """
    return denoised + (sigma_to / sigma) * (x - denoised)


def heun_step(
    x: Tensor, denoised: Tensor, x_to: Tensor, denoised_to: Tensor, sigma: float, sigma_to: float
) -> Tensor:
    """Step by the mean of the slopes at both ends: line 11 of algorithm 2 of arXiv:2206.00364.

    Args:
        x_to: (b, ...) where `euler_step` leads; denoised_to: what is predicted there.
        sigma_to: above 0.
    """
    slope = ((x - denoised) / sigma + (x_to - denoised_to) / sigma_to) / 2
    return x + slope * (sigma_to - sigma)


def midpoint_step(
    x: Tensor, x_mid: Tensor, denoised_mid: Tensor, sigma: float, sigma_mid: float, sigma_to: float
) -> Tensor:
    """Step by the slope at a level between: k-diffusion's DPM2, after DPM-Solver-2 (arXiv:2206.00927)."""
    return x + (x_mid - denoised_mid) / sigma_mid * (sigma_to - sigma)


def multistep_weights(sigmas: Sequence[float], sigma_to: float) -> np.ndarray:
    """Weigh the slopes at several levels for the step from the first of them: linear multistep, k-diffusion's LMS.

    The integral from sigmas[0] to sigma_to of the polynomial through them (Adams-Bashforth on uneven levels), by a
    Gaussian rule that is exact for it.

    Args:
        sigmas: of the slopes, the newest first, all different.

    Returns:
        (len(sigmas),) float64.
    """
    nodes, weights = _gauss(len(sigmas))
    half = (sigma_to - sigmas[0]) / 2
    at = sigmas[0] + half * (nodes + 1)
    bases = [
        np.prod([(at - other) / (one - other) for other in sigmas if other != one], axis=0) for one in sigmas
    ]
    return np.array([half * (weights * basis).sum() for basis in bases])


@cache
def _gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(points)


def sde_dpm_solver_pp_step(
    x: Tensor,
    denoised: Sequence[Tensor],
    *,
    sigmas: Sequence[float],
    sigma_to: float,
    eta: float,
    solver_type: str = "heun",
) -> Tensor:
    """Step by SDE-DPM-Solver++, multistep, without its fresh noise: k-diffusion's DPM++ 2M SDE and 3M SDE.

    In sigma's units. Eq. 18 of DPM-Solver++ (arXiv:2211.01095) with eta as a weight of the noise: where the solver for
    the flow has h, this has (1 + eta) h. At eta = 0 it is that solver.

    Args:
        x: (b, ...) sample at sigmas[0].
        denoised: one to three predicted clean samples, the newest first.
        sigmas: their levels.
        sigma_to: above 0.
        eta: weight of the noise that `sde_std` measures.
        solver_type: weight of the difference at order 2: "midpoint", or "heun" (exact for a prediction linear in
            log sigma).
    """
    times = [-math.log(sigma) for sigma in sigmas]
    h = -math.log(sigma_to) - times[0]
    h_eta = (1 + eta) * h
    phi_1 = math.expm1(-h_eta)
    x_to = math.exp(-h_eta) * x - phi_1 * denoised[0]
    if len(denoised) == 1:
        return x_to
    r_0 = (times[0] - times[1]) / h
    slope = (denoised[0] - denoised[1]) / r_0
    if len(denoised) == 2 and solver_type == "midpoint":
        return x_to - 0.5 * phi_1 * slope
    phi_2 = phi_1 / h_eta + 1
    if len(denoised) == 2:
        return x_to + phi_2 * slope
    r_1 = (times[1] - times[2]) / h
    older = (denoised[1] - denoised[2]) / r_1
    second = (slope - older) / (r_0 + r_1)
    return x_to + phi_2 * (slope + r_0 * second) - (phi_2 / h_eta - 0.5) * second


def sde_std(sigma: float, sigma_to: float, eta: float) -> float:
    """Tell how much noise a step of `sde_dpm_solver_pp_step` adds: sigma_to sqrt(1 - (sigma_to / sigma)^(2 eta))."""
    return sigma_to * math.sqrt(max(1 - (sigma_to / sigma) ** (2 * eta), 0.0))


def ancestral_split(sigma: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """Part a step to sigma_to into a longer one down and noise back up: k-diffusion's get_ancestral_step.

    The same as `ddim_std` in sigma's units.

    Returns:
        (down, up) with down^2 + up^2 = sigma_to^2.
    """
    square, square_to = sigma * sigma, sigma_to * sigma_to
    up = min(eta * math.sqrt(max(square_to * (square - square_to) / square, 0.0)), sigma_to)
    return math.sqrt(square_to - up * up), up


def dpm_solver_singlestep(
    x: Tensor,
    predict: Callable[[Tensor, float], Tensor],
    sigma: float,
    sigma_to: float,
    order: int,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by DPM-Solver-1, -2 or -3 (algorithms 1 and 2 of arXiv:2206.00927) in sigma's units.

    Args:
        x: (b, ...) sample at sigma.
        predict: from a sample and its sigma to the predicted clean sample; called `order` times, once less with eps.
        sigma, sigma_to: above 0; where they are the same, x is the answer.
        order: 1 to 3.
        eps: noise predicted at x, where the caller has it.

    Returns:
        (x_to, by a lower order), which the step size of an adaptive solver is judged by: order 2 less 1, or 3 less 2.
    """
    h = math.log(sigma / sigma_to)
    if h == 0:
        return x, x

    def noise(x: Tensor, sigma: float) -> Tensor:
        return (x - predict(x, sigma)) / sigma

    eps = noise(x, sigma) if eps is None else eps
    phi_1 = math.expm1(h)
    first = x - sigma_to * phi_1 * eps
    if order == 1:
        return first, first
    r_1 = 1 / 2 if order == 2 else 1 / 3
    sigma_1 = sigma * math.exp(-r_1 * h)
    change = noise(x - sigma_1 * math.expm1(r_1 * h) * eps, sigma_1) - eps
    second = first - sigma_to / (2 * r_1) * phi_1 * change
    if order == 2:
        return second, first
    r_2 = 2 / 3
    sigma_2 = sigma * math.exp(-r_2 * h)
    phi = math.expm1(r_2 * h)
    x_2 = x - sigma_2 * phi * eps - sigma_2 * (r_2 / r_1) * (phi / (r_2 * h) - 1) * change
    return first - sigma_to / r_2 * (phi_1 / h - 1) * (noise(x_2, sigma_2) - eps), second


def _factor(value: Scalar, like: Tensor) -> Scalar:
    """Shape (b,) factors to multiply (b, ...); one for all multiplies any tensor on any device as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.reshape(-1, *(1 for _ in like.shape[1:])).to(like)


def _mix(one: Tensor, other: Tensor, part: Scalar, other_part: Scalar) -> Tensor:
    return _factor(part, one) * one + _factor(other_part, one) * other


def _clean(x_t: Tensor, eps: Tensor, alpha_bar: Scalar) -> Tensor:
    # 1 - alpha_bar is taken in the level's own precision, before a half-precision x_t can round it.
    return to_x0("eps", eps, x_t, _factor(alpha_bar, x_t), _factor(_sigma(alpha_bar), x_t))


def _sigma(alpha_bar: Scalar) -> Scalar:
    return sqrt(1 - alpha_bar)


def _log_snr_half(alpha_bar: Scalar) -> Scalar:
    """lambda = log(alpha / sigma), the clock of DPM-Solver."""
    return 0.5 * (log(alpha_bar) - log(1 - alpha_bar))


def _any(found: bool | Tensor) -> bool:
    """Tell whether something is so for any image; on an accelerator, which would be waited for, it is for none."""
    return found.is_cpu and bool(found.any()) if isinstance(found, Tensor) else found


def _shown(level: Scalar) -> object:
    return level.tolist() if isinstance(level, Tensor) else level


def _differences(
    outputs: Sequence[Tensor], alpha_bars: Sequence[Scalar], alpha_bar_next: Scalar, solver_type: str
) -> tuple[Tensor | None, Tensor | None, Scalar]:
    """Estimate f' h and f'' h^2 at the newest level by Newton's differences: (first, second, h).

    The solvers' published code returns half of f'' h^2, which leaves its third order at second; the factor
    here is the one that the derivation gives.
    """
    if not 1 <= len(outputs) <= 3 or len(outputs) != len(alpha_bars):
        raise ValueError(
            "a multistep DPM-Solver step takes 1 to 3 predictions with as many levels, "
            f"got {len(outputs)} and {len(alpha_bars)}"
        )
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVER_TYPES)}; got {solver_type!r}")
    times = [_log_snr_half(level) for level in alpha_bars]
    h = _log_snr_half(alpha_bar_next) - times[0]
    if len(outputs) == 1:
        return None, None, h
    r0 = (times[0] - times[1]) / h
    newest = (outputs[0] - outputs[1]) / _factor(r0, outputs[0])
    if len(outputs) == 2:
        return newest, None, h
    r1 = (times[1] - times[2]) / h
    older = (outputs[1] - outputs[2]) / _factor(r1, outputs[0])
    bend = newest - older
    return newest + _factor(r0 / (r0 + r1), bend) * bend, 2 * bend / _factor(r0 + r1, bend), h
