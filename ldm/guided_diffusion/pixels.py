"""The former place of ldm.guided_diffusion's models, sampling and likelihood: their names, for code that has them."""

from ldm.guided_diffusion.likelihood import (
    SHAPES_SEED,
    Pictures,
    folder_to_measure,
    measure,
    save_measures,
    shapes_to_measure,
)
from ldm.guided_diffusion.models import (
    Classifier,
    LatentModel,
    Model,
    PixelModel,
    choose_labels,
    open_model,
)
from ldm.guided_diffusion.sampling import SamplingOptions as Recipe
from ldm.guided_diffusion.sampling import advice, read_samples, sample, save_samples

__all__ = [
    "SHAPES_SEED",
    "Classifier",
    "LatentModel",
    "Model",
    "Pictures",
    "PixelModel",
    "Recipe",
    "advice",
    "choose_labels",
    "folder_to_measure",
    "measure",
    "open_model",
    "read_samples",
    "sample",
    "save_measures",
    "save_samples",
    "shapes_to_measure",
]
