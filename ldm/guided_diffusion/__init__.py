"""OpenAI's guided-diffusion by its module names: in its scripts, `guided_diffusion` becomes `ldm.guided_diffusion`.

dist_util, logger, image_datasets and train_util live here. The others are ldm's own modules under a second name: the
very modules, not copies of their names, so that rebinding a global such as script_util.NUM_CLASSES takes effect.
"""

import sys

from ldm.models.diffusion import gaussian_diffusion, resample, respace, script_util
from ldm.modules.diffusionmodules import openaimodel as unet

for _name in ("gaussian_diffusion", "resample", "respace", "script_util", "unet"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]

__all__ = ["gaussian_diffusion", "resample", "respace", "script_util", "unet"]
