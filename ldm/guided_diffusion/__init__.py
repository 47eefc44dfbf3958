"""OpenAI's guided diffusion: pixel models, their files, flags, sampling, likelihoods and training loop.

The names are those of OpenAI's package, so that in its scripts `guided_diffusion` becomes `ldm.guided_diffusion`. Some
of its modules are ldm's own under a second name: the very modules, not copies of their names, so that rebinding a
global takes effect.
"""

import sys

from ldm.guided_diffusion import script_util
from ldm.models.diffusion import gaussian_diffusion, resample, respace
from ldm.modules.diffusionmodules import openaimodel as unet

for _name in ("gaussian_diffusion", "resample", "respace", "unet"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]

__all__ = ["gaussian_diffusion", "resample", "respace", "script_util", "unet"]
