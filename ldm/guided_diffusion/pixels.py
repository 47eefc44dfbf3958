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
    Asked,
    Classifier,
    LatentModel,
    Model,
    PixelModel,
    choose_labels,
    find_model,
    open_model,
    what_to_tell,
)
from ldm.guided_diffusion.sampling import Recipe, advice, read_samples, sample, save_samples

__all__ = [
    "SHAPES_SEED",
    "Asked",
    "Classifier",
    "LatentModel",
    "Model",
    "Pictures",
    "PixelModel",
    "Recipe",
    "advice",
    "choose_labels",
    "find_model",
    "folder_to_measure",
    "measure",
    "open_model",
    "read_samples",
    "sample",
    "save_measures",
    "save_samples",
    "shapes_to_measure",
    "what_to_tell",
]
