"""diffusers' words for a model of ours: change `from diffusers import ...` to `from ldm.diffusers_style import ...`.

A thin facade: networks, formulas and checks are those of the rest of ldm. What runs on it, and what it leaves to
diffusers, is in docs/tutorials.md.
"""

from ldm.diffusers_style.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput
from ldm.diffusers_style.scheduler import DDIMScheduler, DDIMSchedulerOutput
from ldm.tutorials import load_image

__all__ = [
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "load_image",
]
