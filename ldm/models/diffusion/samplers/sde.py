"""k-diffusion's solvers of the reverse SDE: DPM++ SDE, 2M SDE and 3M SDE, with Brownian noise."""

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.helpers import upload
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import SigmaSampler, VariableEta
from ldm.process.brownian import BrownianPaths, TorchsdePaths, need_torchsde
from ldm.process.steps import ancestral_split, euler_step, sde_dpm_solver_pp_step, sde_std


@dataclass
class SDESampler(VariableEta, SigmaSampler):
    """A sampler whose noise is that of one Brownian path an image, so that runs of other steps meet the same.

    Options:
        s_noise: factor on the noise.
        brownian: False draws the noise of each step afresh; "torchsde" takes k-diffusion's paths, from the images'
            seeds where `noise` has `seeds`, and else from its first draw, as ours are.
    """

    own_eta = 1.0

    _: KW_ONLY
    s_noise: float = 1.0
    brownian: bool | str = field(default=True, metadata={"also": ("torchsde",)})
    paths: BrownianPaths | TorchsdePaths | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.brownian == "torchsde":
            need_torchsde()

    def draw_between(self, x: Tensor, sigma: float, sigma_to: float) -> Tensor:
        """Draw unit normal noise shaped like x for the interval between two sigmas."""
        if not self.brownian:
            return self.noise(x)
        if self.paths is None:
            self.paths = self.begin_paths(x)
        return upload(self.paths.between(sigma, sigma_to).to(x.dtype), x.device)

    def begin_paths(self, x: Tensor) -> BrownianPaths | TorchsdePaths:
        """Begin the paths of a batch."""
        is_ours, seeds = self.brownian != "torchsde", getattr(self.noise, "seeds", None)
        if is_ours or seeds is None:
            # An image's seed is its own first draw, on the CPU, where reading it waits for no device.
            firsts = self.noise(torch.empty(len(x), 4)).flatten(1)[:, :4].contiguous().view(torch.int32)
            seeds = [hash(tuple(row)) for row in firsts.tolist()]
        if is_ours:
            return BrownianPaths(seeds, x.shape[1:])
        # Of a run that begins with a picture too, as A1111 and diffusers have it, the ends are those of the whole plan.
        levels = self.plan_levels or self.levels
        sigmas = [float(level.sigma) for level in levels if level.sigma > 0] or self.denoise.levels.sigmas
        return TorchsdePaths([seed % 2**64 for seed in seeds], x.shape[1:], min(sigmas), max(sigmas))


@dataclass
class DPMSolverPPSDE(SDESampler):
    """DPM-Solver++ of one step, with the noise of the SDE: k-diffusion's "DPM++ SDE". Two calls of the network a step.

    Options, beside `SDESampler`'s:
        r: where between the levels the network is called again, in log sigma, from above 0 to 1.
    """

    name = "dpmpp_sde"

    _: KW_ONLY
    r: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.r <= 1:
            raise UsageError(f"r must be above 0 and at most 1, got {shown(self.r)}")

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        sigma, sigma_to = float(here.sigma), float(to.sigma)
        denoised = self.predict(x, sigma)
        if sigma_to == 0:
            return denoised, denoised
        if sigma_to == sigma:  # torchsde has no noise of an interval without length
            return x, denoised
        middle = sigma ** (1 - self.r) * sigma_to**self.r
        predicted = self.predict(self.move(x, denoised, sigma, middle), middle)
        share = 1 / (2 * self.r)
        return self.move(x, (1 - share) * denoised + share * predicted, sigma, sigma_to), denoised

    def move(self, x: Tensor, denoised: Tensor, sigma: float, sigma_to: float) -> Tensor:
        down, up = ancestral_split(sigma, sigma_to, self.eta)
        x_to = euler_step(x, denoised, sigma, down)
        if self.eta == 0:
            return x_to
        return x_to + self.s_noise * up * self.draw_between(x, sigma, sigma_to)


@dataclass
class DPMSolverPP2MSDE(SDESampler):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095): "DPM++ 2M SDE".

    Options, beside `SDESampler`'s:
        solver_type: "midpoint" or "heun", see ldm.process.steps.sde_dpm_solver_pp_step.
    """

    name = "dpmpp_2m_sde"

    _: KW_ONLY
    solver_type: str = "midpoint"
    past: list[tuple[Tensor, float]] = field(default_factory=list, init=False, repr=False)

    order = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_type not in ("midpoint", "heun"):
            raise UsageError(f"solver_type must be midpoint or heun, got {shown(self.solver_type)}")

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        sigma, sigma_to = float(here.sigma), float(to.sigma)
        denoised = self.predict(x, sigma)
        self.past = [(denoised, sigma), *self.past][: self.order]
        if sigma_to == 0:
            return denoised, denoised
        if sigma_to == sigma:
            return x, denoised
        outputs, sigmas = zip(*self.past, strict=True)
        x = sde_dpm_solver_pp_step(
            x, outputs, sigmas=sigmas, sigma_to=sigma_to, eta=self.eta, solver_type=self.solver_type
        )
        if self.eta == 0:
            return x, denoised
        noise = self.draw_between(x, sigma, sigma_to)
        return x + self.s_noise * sde_std(sigma, sigma_to, self.eta) * noise, denoised


@dataclass
class DPMSolverPP2MSDEHeun(DPMSolverPP2MSDE):
    """`DPMSolverPP2MSDE` with the difference weighed as its own solver does: "DPM++ 2M SDE Heun"."""

    name = "dpmpp_2m_sde_heun"

    _: KW_ONLY
    solver_type: str = "heun"


@dataclass
class DPMSolverPP3MSDE(DPMSolverPP2MSDE):
    """Three predictions instead of two: "DPM++ 3M SDE". The last sigma of a table is left out, as in A1111.

    k-diffusion's weights, whose second difference is half of what a third order needs, so that it is of the second.
    """

    name = "dpmpp_3m_sde"
    order = 3
    discard_next_to_last = True

    _: KW_ONLY
    solver_type: str = "heun"
