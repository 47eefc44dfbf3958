"""k-diffusion's samplers of the probability flow and the ancestral ones: a class is a method of theirs."""

import math
from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import SigmaSampler, VariableEta
from ldm.process.multistep import weighed
from ldm.process.steps import ddim_std, euler_step, heun_step, midpoint_step, multistep_weights


@dataclass
class Euler(SigmaSampler):
    """Euler's method: algorithm 2 of arXiv:2206.00364 without its correction. Without churn it is DDIM's step.

    Options:
        s_churn: how much noise is added before each step, over all steps; 0 = none.
        s_tmin, s_tmax: only at these sigmas, both included.
        s_noise: factor on that noise.
        always_draw: with churn, also at sigmas outside, where the noise is not used: later draws depend on it. False
            as in ComfyUI, True as in k-diffusion.
    """

    name = "euler"
    inverts = True

    _: KW_ONLY
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    always_draw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s_churn < 0:
            raise UsageError(f"s_churn of {self.name} must be 0 or above, got {shown(self.s_churn)}")

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        x, sigma = self.churned(x, here, to)
        denoised = self.predict(x, sigma)
        return self.move(x, denoised, sigma, float(to.sigma)), denoised

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        return euler_step(x, denoised, sigma, sigma_to)

    def churned(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, float]:
        """Add noise up to a higher sigma: lines 4 to 6 of the algorithm."""
        sigma = float(here.sigma)
        within = self.s_tmin <= sigma <= self.s_tmax
        if self.s_churn == 0 or not (within or self.always_draw):
            return x, sigma
        noise = self.draw(x, here, to)
        if not within:
            return x, sigma
        higher = sigma * (1 + min(self.s_churn / here.total, math.sqrt(2) - 1))
        return x + self.s_noise * math.sqrt(higher * higher - sigma * sigma) * noise, higher


class Heun(Euler):
    """Heun's method: algorithm 2 of arXiv:2206.00364. Two calls of the network a step; options as `Euler`."""

    name = "heun"

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        x_to = euler_step(x, denoised, sigma, sigma_to)
        if sigma_to == 0:
            return x_to
        return heun_step(x, denoised, x_to, self.predict(x_to, sigma_to), sigma, sigma_to)


class DPM2(Euler):
    """k-diffusion's DPM2: the slope midway in log sigma. Two calls of the network a step; options as `Euler`.

    The last sigma of a table is left out, as A1111 and ComfyUI do for it.
    """

    name = "dpm2"
    discard_next_to_last = True

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        return _midway(self, x, denoised, sigma, sigma_to)


@dataclass
class EulerAncestral(VariableEta, SigmaSampler):
    """Euler's method down to a lower sigma, and noise back up to the next: "Euler a". DDIM's step with the same eta.

    Options:
        s_noise: factor on the noise.
    """

    name = "euler_a"
    own_eta = 1.0

    _: KW_ONLY
    s_noise: float = 1.0

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        denoised = self.predict(x, here.sigma)
        down, up = split_of(here, to, self.eta)
        x = self.move(x, denoised, float(here.sigma), down)
        return (x + self.s_noise * up * self.draw(x, here, to) if to.sigma > 0 else x), denoised

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        return euler_step(x, denoised, sigma, sigma_to)


class DPM2Ancestral(EulerAncestral):
    """k-diffusion's DPM2 with fresh noise: "DPM2 a". Two calls of the network a step; options as `EulerAncestral`.

    The last sigma of a table is left out, as for DPM2.
    """

    name = "dpm2_a"
    discard_next_to_last = True

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        return _midway(self, x, denoised, sigma, sigma_to)


class DPMSolverPP2SAncestral(EulerAncestral):
    """DPM-Solver++(2S) (arXiv:2211.01095) with fresh noise: "DPM++ 2S a". Two calls of the network a step; options as
    `EulerAncestral`."""

    name = "dpmpp_2s_a"

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        if sigma_to > 0:
            middle = math.sqrt(sigma * sigma_to)
            denoised = self.predict(euler_step(x, denoised, sigma, middle), middle)
        return euler_step(x, denoised, sigma, sigma_to)


def split_of(here: Level, to: Level, eta: float) -> tuple[float, float]:
    """Part a step between two levels as `ancestral_split` does, by DDIM's formula."""
    alpha_bar, sigma_to = float(to.alpha_bar), float(to.sigma)
    up = ddim_std(float(here.alpha_bar), alpha_bar, eta) / math.sqrt(alpha_bar)
    return math.sqrt(max(sigma_to * sigma_to - up * up, 0.0)), up


def _midway(sampler: SigmaSampler, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
    """Step by the slope midway in log sigma; to the clean end by the slope here."""
    if sigma_to == 0:
        return euler_step(x, denoised, sigma, sigma_to)
    middle = math.sqrt(sigma * sigma_to)
    x_mid = euler_step(x, denoised, sigma, middle)
    return midpoint_step(x, x_mid, sampler.predict(x_mid, middle), sigma, middle, sigma_to)


@dataclass
class LMS(SigmaSampler):
    """Linear multistep: the slopes of up to `order` levels, weighed by the polynomial through them. k-diffusion's LMS.

    Options:
        order: 1 to 4.
    """

    name = "lms"
    inverts = True

    _: KW_ONLY
    order: int = 4
    past: list[tuple[Tensor, float]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3, 4):
            raise UsageError(f"order must be 1, 2, 3 or 4, got {shown(self.order)}")

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        denoised, sigma = self.predict(x, here.sigma), float(here.sigma)
        self.past = [((x - denoised) / sigma, sigma), *self.past][: self.order]
        slopes, sigmas = zip(*self.past, strict=True)
        return x + weighed(multistep_weights(sigmas, float(to.sigma)), slopes), denoised
