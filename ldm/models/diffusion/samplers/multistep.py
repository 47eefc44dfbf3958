"""Solvers that remember earlier predictions, or look ahead: UniPC, DEIS, iPNDM, RES and others."""

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

from torch import Tensor

from ldm import limits
from ldm.errors import UsageError, shown
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import Sampler, SigmaSampler, VariableEta
from ldm.models.diffusion.samplers.kdiffusion import Euler, split_of
from ldm.process.multistep import (
    DEIS_CLOCKS,
    UNIPC_TYPES,
    deis_weights,
    dpmpp_2m_v2_weights,
    exponential_weights,
    heun_pp_weights,
    ipndm_v_weights,
    res_multistep_weights,
    unipc_step,
    weighed,
)
from ldm.process.steps import euler_step, plms_eps


def check_order(option: str, value: object, orders: tuple[int, ...]) -> None:
    """Raise UsageError unless an order is one of those that there are."""
    if value not in orders:
        raise UsageError(f"{option} must be one of {', '.join(map(str, orders))}; got {shown(value)}")


@dataclass
class MultistepSampler(SigmaSampler):
    """A sampler that goes by the newest prediction and earlier ones, and begins with unit noise, as in diffusers.

    Its first steps are of lower order, and the one to the clean end is the predicted clean sample.
    """

    past: list[tuple[Tensor, float]] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def start(cls, noise: Tensor, level: Level, z: Tensor | None = None) -> Tensor:
        return Sampler.start(noise, level, z)

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        denoised = self.predict(x, here.sigma)
        sigma_to = float(to.sigma)
        if sigma_to == float(here.sigma):
            return x, denoised
        return denoised if sigma_to == 0 else self.move(x, denoised, here, to), denoised

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        """Go to another sigma above 0."""
        raise NotImplementedError

    def remembered(self, value: Tensor, here: Level, count: int) -> tuple[list[Tensor], list[float]]:
        """Remember a prediction, and give the newest `count` there are, newest first, with their sigmas."""
        self.past = [(value, float(here.sigma)), *self.past][:count]
        values, sigmas = zip(*self.past, strict=True)
        return list(values), list(sigmas)


@dataclass
class OrderedSampler(MultistepSampler):
    """A multistep sampler whose order can be chosen.

    Options:
        order: how many predictions a step goes by.
    """

    orders: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    _: KW_ONLY
    order: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(f"order of {self.name}", self.order, self.orders)


class IPNDM(OrderedSampler):
    """Improved PNDM: Adams-Bashforth's weights of even steps over any steps, with a first step of order 1 in place of
    PNDM's own (arXiv:2202.09778; arXiv:2204.13902, Sec. 4). Options as `OrderedSampler`."""

    name = "ipndm"

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        slopes, sigmas = self.remembered((x - denoised) / float(here.sigma), here, self.order)
        return x + (float(to.sigma) - sigmas[0]) * plms_eps(slopes[0], slopes[:0:-1])


class IPNDMV(OrderedSampler):
    """The same with the weights of uneven steps: "ipndm_v" of ComfyUI. Options as `OrderedSampler`."""

    name = "ipndm_v"

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        slopes, sigmas = self.remembered((x - denoised) / float(here.sigma), here, self.order)
        return x + weighed(ipndm_v_weights(sigmas, float(to.sigma)), slopes)


@dataclass
class DEIS(OrderedSampler):
    """DEIS (arXiv:2204.13902): the predicted noise as a polynomial, integrated with its exact factor.

    Options:
        order: 1 to 4; diffusers has 2, ComfyUI 3.
        clock: of what the polynomial is one: "log_sigma" (diffusers), "t" of the VP process (ComfyUI's "tab", the
            paper's tAB) or "sigma" (the paper's rho-AB).
    """

    name = "deis"
    spacing = "linspace"
    skips_lowest = True

    _: KW_ONLY
    order: int = 2
    clock: str = "log_sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        limits.choice("clock of deis", self.clock, DEIS_CLOCKS)

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        slopes, sigmas = self.remembered((x - denoised) / float(here.sigma), here, self.order)
        return x + weighed(deis_weights(sigmas, float(to.sigma), self.clock), slopes)


@dataclass
class UniPC(OrderedSampler):
    """UniPC (arXiv:2302.04867): each new prediction corrects the step that led to it, at no further call.

    A value that was changed since the step (a mask's) is not corrected. Its own levels are linspaced from the top, as
    diffusers' UniPCMultistepScheduler; A1111's are "time_uniform", with order 3 and "bh1".

    Options:
        order: 1 to 3 of the predictor; the corrector's is one more.
        solver_type: "bh1" or "bh2", see `unipc_step`.
        predict_x0: extrapolate the clean sample, or else the noise.
        corrector: False leaves it out.
        lower_order_final: lower orders at the end.
    """

    name = "unipc"
    spacing = "linspace"
    skips_lowest = True
    orders = (1, 2, 3)

    _: KW_ONLY
    order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    corrector: bool = True
    lower_order_final: bool = True
    last: tuple[Tensor, Tensor, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        limits.choice("solver_type of unipc", self.solver_type, UNIPC_TYPES)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        unit, sigma, sigma_to = math.sqrt(here.alpha_bar), float(here.sigma), float(to.sigma)
        denoised = self.predict(x / unit, sigma)
        if sigma == sigma_to:
            return x, denoised
        output = denoised if self.predict_x0 else (x / unit - denoised) / sigma
        options = {"solver_type": self.solver_type, "predict_x0": self.predict_x0}
        if self.last is not None and self.corrector:
            before, predicted, order = self.last
            outputs, sigmas = zip(*self.past[:order], strict=True)
            corrected = unipc_step(before, outputs, sigmas, sigma, output_to=output, **options)
            x = (unit * corrected).where(x == predicted, x)
        outputs, sigmas = self.remembered(output, here, self.order)
        if sigma_to == 0:  # which order 1 takes to the predicted clean sample, whatever is extrapolated
            return denoised, denoised
        order = min(self.order, here.left) if self.lower_order_final else self.order
        outputs, sigmas = outputs[:order], sigmas[:order]
        there = math.sqrt(to.alpha_bar) * unipc_step(x / unit, outputs, sigmas, sigma_to, **options)
        self.last = x / unit, there, len(outputs)
        return there, denoised


@dataclass
class GradientEstimation(MultistepSampler):
    """Gradient estimation (arXiv:2306.04848): Euler's method whose slope goes beyond the last one.

    Options:
        gamma: how far, 1 = Euler's; the paper's and ComfyUI's is 2.
    """

    name = "gradient_estimation"

    _: KW_ONLY
    gamma: float = 2.0

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        slopes, sigmas = self.remembered((x - denoised) / float(here.sigma), here, 2)
        slope = slopes[0] + (self.gamma - 1) * (slopes[0] - slopes[1]) if len(slopes) > 1 else slopes[0]
        return x + (float(to.sigma) - sigmas[0]) * slope


class DPMSolverPP2Mv2(MultistepSampler):
    """ "DPM++ 2M v2": DPM-Solver++(2M) with the mean of this step and the last, from A1111's discussion 8457."""

    name = "dpmpp_2m_v2"

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        outputs, sigmas = self.remembered(denoised, here, 2)
        decay, weights = dpmpp_2m_v2_weights(sigmas, float(to.sigma))
        return decay * x + weighed(weights, outputs)


@dataclass
class RESMultistep(VariableEta, MultistepSampler):
    """RES, multistep of order 2 (arXiv:2308.02157): ComfyUI's res_multistep, and with eta 1 its ancestral form.

    Options:
        eta: 0 to 1, as `EulerAncestral`'s.
        s_noise: factor on the fresh noise.
    """

    name = "res_multistep"

    _: KW_ONLY
    s_noise: float = 1.0
    last_down: float = field(default=0.0, init=False, repr=False)

    def move(self, x: Tensor, denoised: Tensor, here: Level, to: Level) -> Tensor:
        down, up = split_of(here, to, self.eta)
        x = self.descend(x, denoised, here, down)
        return x + self.s_noise * up * self.draw(x, here, to) if self.eta > 0 else x

    def descend(self, x: Tensor, denoised: Tensor, here: Level, down: float) -> Tensor:
        """Go along the probability flow to a lower sigma."""
        outputs, sigmas = self.remembered(denoised, here, 2)
        if len(outputs) == 1 or down == 0:
            x = euler_step(x, denoised, sigmas[0], down)
        else:
            weights = res_multistep_weights(sigmas, down, self.last_down)
            x = down / sigmas[0] * x + weighed(weights, outputs)
        self.last_down = down
        return x


class RESMultistepAncestral(RESMultistep):
    """RES, multistep, with fresh noise: eta is 1 where none is given. Options as `RESMultistep`."""

    name = "res_multistep_a"
    own_eta = 1.0


@dataclass
class RES2S(RESMultistep):
    """RES of order 2 within a step (arXiv:2308.02157, Eq. 11): "res_2s". Two calls of the network a step.

    Options:
        eta, s_noise: as `RESMultistep`.
        c2: where in the step, in lambda, the second prediction is made.
    """

    name = "res_2s"

    _: KW_ONLY
    c2: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.c2 <= 1:
            raise UsageError(f"c2 of res_2s must be above 0 and at most 1, got {shown(self.c2)}")

    def descend(self, x: Tensor, denoised: Tensor, here: Level, down: float) -> Tensor:
        if down == 0:
            return denoised
        sigma = float(here.sigma)
        middle = sigma * (down / sigma) ** self.c2
        second = self.predict(euler_step(x, denoised, sigma, middle), middle)
        weights = exponential_weights([0.0, self.c2], math.log(sigma / down))
        return down / sigma * x + weighed(weights, [denoised, second])


class HeunPP2(Euler):
    """ "Heun++ 2" (Carzit's, in ComfyUI): the slopes here, a level on and two levels on, weighed by their sigmas.

    Three calls of the network a step, two in the last but one and one in the last. Options as `Euler`.
    """

    name = "heunpp2"
    inverts = False

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        x, sigma = self.churned(x, here, to)
        denoised = self.predict(x, sigma)
        ahead_of = self.levels[self.levels.index(to) :] if to in self.levels else [to]
        slopes, sigmas, ahead = [(x - denoised) / sigma], [sigma], x
        for level in ahead_of[:2]:
            further = float(level.sigma)
            if further == 0 or level.left == 0:
                break
            ahead = ahead + (further - sigmas[-1]) * slopes[-1]
            slopes.append((ahead - self.predict(ahead, further)) / further)
            sigmas.append(further)
        top = self.levels[0] if self.levels else here
        weights = heun_pp_weights(sigmas, float(top.sigma))
        return x + (float(to.sigma) - sigma) * weighed(weights, slopes), denoised
