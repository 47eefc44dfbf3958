"""ldm: latent diffusion in the Stable Diffusion v1 manner.

The short public API; everything else is imported from its own module. Names are looked up on first use, so that
`import ldm` costs no more than its parent package torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GenerationResult": "ldm.generate",
    "LdmError": "ldm.errors",
    "StableDiffusion": "ldm.generate",
    "instantiate_from_config": "ldm.util",
    "load_latent_diffusion": "ldm.checkpoints",
    "read_metadata": "ldm.metadata",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
