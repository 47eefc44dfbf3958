"""Solvers of the reverse stochastic equation that remember earlier predictions: SA-Solver and ER-SDE-Solver."""

import math
from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from ldm import limits
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import VariableEta
from ldm.models.diffusion.samplers.multistep import MultistepSampler, OrderedSampler, check_order
from ldm.process.multistep import er_sde_weights, sa_std, sa_weights, weighed


@dataclass
class SASolver(VariableEta, MultistepSampler):
    """SA-Solver (arXiv:2309.05019): stochastic Adams, each step corrected by the next prediction, at no further call.

    A value that was changed since the step (a mask's) is not corrected. diffusers' SASolverScheduler as it comes: noise
    between the levels 0.2 T and 0.8 T, and none elsewhere; whole levels linspaced from the top.

    Options:
        eta: the paper's tau within that range: 0 = the probability flow, 1 = the reverse SDE.
        order: 1 to 4 of the predictor; corrector_order: the same of the corrector, 0 leaves it out. ComfyUI's are 3
            and 4.
        s_tmin, s_tmax: the range, in sigma, of levels stepped from.
        s_noise: factor on the fresh noise.
        simple_order_2: order 2 as in the authors' code and diffusers, see `sa_weights`; False: exact, as in ComfyUI.
        final_orders: how orders fall at the end of a run: as in "diffusers", as in "comfyui", whose corrector's falls a
            step earlier, or "none".
    """

    name = "sa_solver"
    spacing = "linspace"
    skips_lowest = True
    own_eta = 1.0

    _: KW_ONLY
    order: int = 2
    corrector_order: int = 2
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float = 1.0
    simple_order_2: bool = True
    final_orders: str = "diffusers"
    last: tuple[Tensor, Tensor, Tensor | float, float, float] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("order of sa_solver", self.order, (1, 2, 3, 4))
        check_order("corrector_order of sa_solver", self.corrector_order, (0, 1, 2, 3, 4))
        limits.choice("final_orders of sa_solver", self.final_orders, ("diffusers", "comfyui", "none"))

    def remaining(self, here: Level) -> int:
        """Count the steps from here on, less one to the clean end, which has no order."""
        ends_clean = len(self.levels) > 0 and bool(self.levels[-1].sigma == 0)
        return here.left - ends_clean

    def tau(self, here: Level) -> float:
        """Tell how stochastic the step from a level is."""
        return self.eta if self.end(self.s_tmin, 0.2) <= here.sigma <= self.end(self.s_tmax, 0.8) else 0.0

    def end(self, sigma: float | None, share: float) -> float:
        """Give an end of the range: a sigma, or where there is none that of a share of the model's levels."""
        if sigma is not None:
            return sigma
        table = self.denoise.levels
        # Whole levels that went through a logarithm and back.
        return float(table.at_t(share * len(table.sigmas)).sigma) * (1 + (share - 0.5) * 1e-9)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        unit, sigma, sigma_to = math.sqrt(here.alpha_bar), float(here.sigma), float(to.sigma)
        denoised = self.predict(x / unit, sigma)
        if sigma == sigma_to:
            return x, denoised
        x = self.corrected(x, denoised, here)
        outputs, sigmas = self.remembered(denoised, here, max(self.order, self.corrector_order - 1))
        if sigma_to == 0:
            return denoised, denoised
        order = self.order if self.final_orders == "none" else min(self.order, self.remaining(here))
        tau, fresh = self.tau(here), 0.0
        if tau > 0:
            fresh = self.s_noise * sa_std(sigma, sigma_to, tau) * self.draw(x, here, to)
        there = self.solved(x / unit, outputs[:order], sigmas[:order], sigma, sigma_to, tau) + fresh
        there = math.sqrt(to.alpha_bar) * there
        self.last = x / unit, there, fresh, tau, sigma
        return there, denoised

    def corrected(self, x: Tensor, denoised: Tensor, here: Level) -> Tensor:
        """Take the last step again, by what is predicted where it led."""
        order = self.corrector_order
        if self.final_orders != "none":
            order = min(order, self.remaining(here) + (2 if self.final_orders == "diffusers" else 1))
        if self.last is None or order == 0:
            return x
        before, predicted, fresh, tau, sigma = self.last
        past = self.past[: order - 1]
        outputs, sigmas = [denoised, *(one for one, _ in past)], [float(here.sigma), *(s for _, s in past)]
        again = self.solved(before, outputs, sigmas, sigma, float(here.sigma), tau) + fresh
        return (math.sqrt(here.alpha_bar) * again).where(x == predicted, x)

    def solved(
        self, x: Tensor, outputs: list[Tensor], sigmas: list[float], sigma: float, sigma_to: float, tau: float
    ) -> Tensor:
        weights = sa_weights(sigmas, sigma, sigma_to, tau, simple=self.simple_order_2)
        return (sigma_to / sigma) ** (1 + tau**2) * x + weighed(weights, outputs)


@dataclass
class ERSDE(OrderedSampler):
    """ER-SDE-Solver (arXiv:2309.06169) with its fifth noise scale, as in ComfyUI.

    Options:
        eta: 1, or 0 for the probability flow.
        order: 1 to 3.
        s_noise: factor on the fresh noise.
    """

    name = "er_sde"
    orders = (1, 2, 3)
    own_eta = 1.0
    etas = "must be 0 or 1"

    _: KW_ONLY
    order: int = 3
    s_noise: float = 1.0

    @classmethod
    def accepts_eta(cls, eta: float) -> bool:
        return eta in (0, 1)

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        outputs, sigmas = self.remembered(denoised, here, self.order)
        decay, weights, std = er_sde_weights(sigmas, float(to.sigma), noisy=self.eta > 0)
        x = decay * x + weighed(weights, outputs)
        return x + self.s_noise * std * self.draw(x, here, to) if std > 0 else x
