"""CFG++ (arXiv:2406.08070): step to the guided clean sample by the noise that is predicted without the condition."""

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import SigmaSampler, VariableEta
from ldm.models.diffusion.samplers.compvis import DDIM
from ldm.process.steps import ancestral_split


class DDIMCFGPP(DDIM):
    """DDIM with CFG++: algorithm 2 of the paper. Scales from 0 to about 2 are its range.

    At guidance_scale 1 it is not DDIM: the noise is still the one without the condition. Where nothing is guided, for
    want of an unconditional condition or outside the guidance interval, it is.
    """

    name = "ddim_cfg_pp"
    inverts = False
    needs_unconditional = True

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        (_, pred_x0), (eps, _) = self.denoise.both(x, here.t, here.alpha_bar)
        return self.move(x, eps, self.quantize(pred_x0), here, to)


@dataclass
class EulerCFGPP(SigmaSampler):
    """The same in k-diffusion's units: ComfyUI's euler_cfg_pp."""

    name = "euler_cfg_pp"
    etas = "must be 0: take euler_a_cfg_pp for fresh noise"
    needs_unconditional = True

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        return self.descend(x, here, float(to.sigma))

    def descend(self, x: Tensor, here: Level, down: float) -> tuple[Tensor, Tensor]:
        """Go to a lower sigma: (x there, predicted clean sample)."""
        denoised, unconditional = map(self.quantize, self.denoise.both_at_sigma(x, here.sigma))
        return denoised + down * (x - unconditional) / float(here.sigma), denoised


@dataclass
class EulerAncestralCFGPP(VariableEta, EulerCFGPP):
    """The same with fresh noise: ComfyUI's euler_ancestral_cfg_pp.

    Options:
        s_noise: factor on the noise.
    """

    name = "euler_a_cfg_pp"
    own_eta = 1.0

    _: KW_ONLY
    s_noise: float = 1.0

    def step_sigma(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        sigma_to = float(to.sigma)
        down, up = ancestral_split(float(here.sigma), sigma_to, self.eta)
        x_to, denoised = self.descend(x, here, down)
        if self.eta == 0 or sigma_to == 0:
            return x_to, denoised
        return x_to + self.s_noise * up * self.draw(x, here, to), denoised
