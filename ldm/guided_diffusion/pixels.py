"""The former place of what models, sampling and likelihood hold, for code that imports it from here."""

from ldm.guided_diffusion.likelihood import (  # noqa: F401
    SHAPES_SEED,
    Pictures,
    folder_to_measure,
    measure,
    save_measures,
    shapes_to_measure,
)
from ldm.guided_diffusion.models import (  # noqa: F401
    Classifier,
    LatentModel,
    Model,
    PixelModel,
    choose_labels,
    open_model,
)
from ldm.guided_diffusion.sampling import SamplingOptions as Recipe  # noqa: F401
from ldm.guided_diffusion.sampling import advice, read_samples, sample, save_samples  # noqa: F401
