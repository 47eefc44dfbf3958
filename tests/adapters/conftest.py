"""What the adapters of pictures are tried on."""

import pytest
from tiny import tiny_model

from ldm.pipeline import StableDiffusion


@pytest.fixture(scope="session")
def painter():
    """One tiny model for all of them: it is as it was after each run, which they check."""
    return StableDiffusion(tiny_model())
