"""Formulas of solvers that remember earlier steps, of exponential ones and of distilled models, one function each.

All are in sigma's units, x = x0 + sigma * noise, with lambda = -log(sigma), half the log-SNR. `slopes` are
(x - x0) / sigma, which is the predicted noise. Histories are newest first; sigmas are numbers above 0, and 0 as the end
of a step where it is allowed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

UNIPC_TYPES = ("bh1", "bh2")
DEIS_CLOCKS = ("log_sigma", "t", "sigma")

# The VP process of DEIS's t: sigma 0.002 at t = 0.001, 80 at t = 1, as its port for EDM has it (zju-pi/diff-sampler).
_LOG_HIGH, _LOG_LOW = math.log1p(80.0**2), math.log1p(0.002**2)
_BETA_D = 2 * (_LOG_LOW / 1e-3 - _LOG_HIGH) / (1e-3 - 1)
_BETA_MIN = _LOG_HIGH - _BETA_D / 2

_POINTS, _SHARES = np.polynomial.legendre.leggauss(32)


def polynomial_weights(
    nodes: Sequence[float], start: float, end: float, density: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Weigh values at nodes so that their sum is the integral of density * polynomial through them.

    A Gaussian rule of 32 points, exact to rounding for the exponentials of these solvers.

    Args:
        nodes: (k,) all different; the polynomial has degree k - 1.

    Returns:
        (k,) float64.
    """
    half = (end - start) / 2
    at = start + half * (_POINTS + 1)
    rule = half * _SHARES * density(at)
    return np.array(
        [
            rule @ np.prod([(at - other) / (one - other) for other in nodes if other != one], axis=0)
            if len(nodes) > 1
            else rule.sum()
            for one in nodes
        ]
    )


def weighed(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Add values (k of any one shape) up, each times its weight."""
    first, *others = (float(weight) * value for weight, value in zip(weights, values, strict=True))
    return sum(others, first)


def deis_weights(sigmas: Sequence[float], sigma_to: float, clock: str = "log_sigma") -> np.ndarray:
    """Weigh slopes for the step from sigmas[0] to sigma_to > 0: DEIS, Eq. 15 of arXiv:2204.13902.

    The integral over sigma of the polynomial through the slopes, which is one in `clock`: "log_sigma" (diffusers'
    "logrho"), "t" of the VP process (the paper's tAB), or "sigma" (its rho-AB, which is k-diffusion's LMS).

    Returns:
        weights w with x_to = x + sum w * slope.
    """
    if clock == "log_sigma":
        times, end, density = np.log(sigmas), math.log(sigma_to), np.exp
    elif clock == "sigma":
        times, end, density = np.asarray(sigmas), sigma_to, np.ones_like
    else:

        def density(t: np.ndarray) -> np.ndarray:  # d sigma / d t
            growth = _BETA_D * t**2 / 2 + _BETA_MIN * t
            return (_BETA_D * t + _BETA_MIN) * np.exp(growth) / (2 * np.sqrt(np.expm1(growth)))

        *times, end = (
            (math.sqrt(_BETA_MIN**2 + 2 * _BETA_D * math.log1p(sigma**2)) - _BETA_MIN) / _BETA_D
            for sigma in (*sigmas, sigma_to)
        )
    return polynomial_weights(list(times), times[0], end, density)


def ipndm_v_weights(sigmas: Sequence[float], sigma_to: float) -> np.ndarray:
    """Weigh one to four slopes for a step over uneven sigmas: "ipndm_v" of zju-pi/diff-sampler and ComfyUI.

    Orders 1 and 2 are Adams-Bashforth's, and so is 3 over even steps. The weights of order 4 do not add up to the step
    over uneven ones (a gap stands where an older one belongs), so that a run converges with second order at best. Kept,
    for it is what the name means elsewhere; the exact weights are `multistep_weights`, which is k-diffusion's LMS.
    """
    h, *gaps = -np.diff([sigma_to, *sigmas])
    differences = np.zeros((4, 4))  # of the slopes, times powers of the last gap, as weights of them
    shares = [1.0]
    differences[0, 0] = 1
    if len(gaps) > 0:
        shares.append(h / gaps[0] / 2)
        differences[1, :2] = 1, -1
    if len(gaps) > 1:
        one = h + gaps[0]
        ratio, before = h * one / (gaps[0] * (gaps[0] + gaps[1])), gaps[0] / gaps[1]
        shares.append((1 - h / (3 * one) * ratio) / 2)
        differences[2, :3] = 1, -1 - before, before
    if len(gaps) > 2:
        two, last = one + gaps[1], gaps[1] + gaps[2]
        part = (1 - h / (3 * one)) / 2 + (1 - h / (2 * one)) * h / (6 * two)
        shares.append(part * ratio * two / (gaps[0] + last))
        bend = gaps[0] * (gaps[0] + gaps[1]) / (gaps[1] * last)
        differences[3] = 1, -1 - before - bend, before + bend * (1 + gaps[1] / gaps[2]), -bend * before
    return h * (np.array(shares) @ differences[: len(shares), : len(shares)])


def unipc_step(
    x: Tensor,
    outputs: Sequence[Tensor],
    sigmas: Sequence[float],
    sigma_to: float,
    *,
    output_to: Tensor | None = None,
    solver_type: str = "bh2",
    predict_x0: bool = True,
) -> Tensor:
    """Step by UniP, or correct a step by UniC: Eq. 3 and 9 of UniPC (arXiv:2302.04867), data or noise predicted.

    Args:
        x: (b, ...) at sigmas[0].
        outputs: predicted clean samples (or noise), newest first: as many as the order of UniP, or one less than the
            order that UniC reaches.
        sigma_to: above 0; 0 only by UniP of one clean sample, which is then the answer.
        output_to: what was predicted at sigma_to: makes it UniC.
        solver_type: B(h) is h ("bh1") or e^h - 1 ("bh2").
    """
    if sigma_to == 0:
        return outputs[0]
    h = math.log(sigmas[0] / sigma_to)
    h = -h if predict_x0 else h
    growth = math.expm1(h)
    scale = growth if solver_type == "bh2" else h
    times = [math.log(sigmas[0] / sigma) / abs(h) for sigma in sigmas[1 : len(outputs)]]
    answers = list(outputs[1:])
    if output_to is not None:
        times, answers = [*times, 1.0], [*answers, output_to]
    if len(times) == 1:  # the same with both types: half of the difference
        rhos = np.array([0.5])
    else:  # sum_m rho_m r_m^(k - 1) = k! h phi_(k + 1)(h) / B(h) for each k
        phi, wanted = growth / h - 1, []
        for k in range(1, len(times) + 1):
            wanted.append(phi * math.factorial(k) / scale)
            phi = phi / h - 1 / math.factorial(k + 1)
        rhos = np.linalg.solve(np.vander(times, increasing=True).T, wanted)
    decay, unit = (sigma_to / sigmas[0], 1.0) if predict_x0 else (1.0, sigma_to)
    x_to = decay * x - unit * growth * outputs[0]
    for rho, time, answer in zip(rhos, times, answers, strict=True):
        x_to = x_to - unit * scale * float(rho) / time * (answer - outputs[0])
    return x_to


def sa_weights(
    sigmas: Sequence[float], sigma_from: float, sigma_to: float, tau: float, *, simple: bool = False
) -> np.ndarray:
    """Weigh predicted clean samples for a step of SA-Solver: Eq. 14 and 17 of arXiv:2309.05019.

    x_to = sigma_to / sigma_from * exp(-tau^2 h) * x + sum w * x0 + `sa_std` * noise.

    Args:
        sigmas: of the samples; from sigma_from on (predictor) or from sigma_to on (corrector).
        tau: how stochastic: 0 = the probability flow, 1 = the reverse SDE.
        simple: with two samples h^2 / 2 in place of the exact integral, as the authors' code, which differs at third
            order.
    """
    h = math.log(sigma_from / sigma_to)
    rate = 1 + tau**2
    if len(sigmas) == 2 and simple:
        whole = -math.expm1(-rate * h)
        part = rate * h**2 / 2 / math.log(sigmas[1] / sigmas[0])
        # From the value at sigma_from, along the slope between both samples.
        return np.array([part, whole - part] if sigmas[0] == sigma_to else [whole + part, -part])
    times, end = [-math.log(sigma) for sigma in sigmas], -math.log(sigma_to)
    return polynomial_weights(times, end - h, end, lambda u: rate * np.exp(rate * (u - end)))


def sa_std(sigma_from: float, sigma_to: float, tau: float) -> float:
    """The standard deviation of SA-Solver's fresh noise."""
    return sigma_to * math.sqrt(-math.expm1(-2 * tau**2 * math.log(sigma_from / sigma_to)))


def exponential_weights(shares: Sequence[float], h: float) -> np.ndarray:
    """Weigh one or two predicted clean samples over a step h of lambda: exponential Runge-Kutta or Adams, order 2.

    Eq. 11 of RES (arXiv:2308.02157): x_to = exp(-h) x + sum w * x0, exact where x0 is linear in lambda.

    Args:
        shares: where in the step they are, from 0 (here) to 1 (the end); an older one is below 0.
    """
    return polynomial_weights(list(shares), 0.0, 1.0, lambda u: h * np.exp(h * (u - 1)))


def res_multistep_weights(sigmas: Sequence[float], sigma_to: float, last_to: float) -> np.ndarray:
    """Weigh the last two predicted clean samples over a step: ComfyUI's res_multistep.

    Args:
        sigmas: of the samples, newest first.
        last_to: where the last step went before fresh noise was added, sigmas[0] where none was: what ComfyUI
            counts the older sample's distance from.
    """
    h = math.log(sigmas[0] / sigma_to)
    return exponential_weights([0.0, math.log(last_to / sigmas[1]) / h], h)


def er_sde_weights(
    sigmas: Sequence[float], sigma_to: float, *, noisy: bool = True
) -> tuple[float, np.ndarray, float]:
    """Work out a step of ER-SDE-Solver, order 1 to 3: algorithm 2 of arXiv:2309.06169.

    Its integrals are sums over 200 points, as the authors and ComfyUI have them.

    Args:
        sigmas: of the predicted clean samples, newest first.
        sigma_to: above 0.
        noisy: the noise scale sigma (exp(sigma^0.3) + 10), its fifth; False: sigma, which is the probability flow.

    Returns:
        (a, w, std): x_to = a * x + sum w * x0 + std * noise.
    """

    def scaled(sigma: float | np.ndarray) -> float | np.ndarray:
        return sigma * (np.exp(sigma**0.3) + 10) if noisy else sigma

    sigma, step = sigmas[0], sigma_to - sigmas[0]
    ratio = float(scaled(sigma_to) / scaled(sigma))
    weights = np.zeros(len(sigmas))
    weights[0] = 1 - ratio
    at = sigma_to - step / 200 * np.arange(200)
    rule = -step / 200 * scaled(sigma_to) / scaled(at)
    if len(sigmas) > 1:
        slope = np.zeros(len(sigmas))  # of the clean samples over sigma, as weights of them
        slope[:2] = np.array([1, -1]) / (sigma - sigmas[1])
        weights += (step + rule.sum()) * slope
    if len(sigmas) > 2:
        older = np.array([0, 1, -1]) / (sigmas[1] - sigmas[2])
        weights += (step**2 / 2 + rule @ (at - sigma)) * (slope - older) / ((sigma - sigmas[2]) / 2)
    return ratio, weights, math.sqrt(max(sigma_to**2 - (sigma * ratio) ** 2, 0.0))


def dpmpp_2m_v2_weights(sigmas: Sequence[float], sigma_to: float) -> tuple[float, np.ndarray]:
    """Work out a step of "DPM++ 2M v2", a change of DPM-Solver++(2M), as stable-diffusion.cpp has it.

    The mean of this step and the last, in lambda, is in the place of this one.

    Args:
        sigmas: of one or two clean samples, newest first.
        sigma_to: above 0.

    Returns:
        (a, w): x_to = a * x + sum w * x0.
    """
    h = math.log(sigmas[0] / sigma_to)
    if len(sigmas) == 1:
        return sigma_to / sigmas[0], np.array([-math.expm1(-h)])
    last = math.log(sigmas[1] / sigmas[0])
    share = min(h, last) / max(h, last) / 2
    return sigma_to / sigmas[0], -math.expm1(-(h + last) / 2) * np.array([1 + share, -share])


def heun_pp_weights(sigmas: Sequence[float], sigma_max: float) -> np.ndarray:
    """Weigh the slopes at one to three following levels for the step from the first: "Heun++" (Carzit's).

    Args:
        sigmas: here, at the end of the step, and one level on.
        sigma_max: of the run's first level.
    """
    later = np.asarray(sigmas[1:]) / (len(sigmas) * sigma_max)
    return np.append(1 - later.sum(), later)


def lcm_boundary(t: float, timestep_scaling: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """Mix x_t into the predicted clean sample, so that it is x_t at t = 0: (c_skip, c_out) of arXiv:2310.04378."""
    scaled = timestep_scaling * t
    norm = scaled**2 + sigma_data**2
    return sigma_data**2 / norm, scaled / math.sqrt(norm)
