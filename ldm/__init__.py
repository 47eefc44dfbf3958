"""ldm: latent diffusion in the Stable Diffusion v1 manner.

The short public API; everything else is imported from its own module. Names are looked up on first use, so that
`import ldm` costs no more than its parent package torch.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GenerationResult": "ldm.results",
    "LdmError": "ldm.errors",
    "StableDiffusion": "ldm.pipeline",
    "instantiate_from_config": "ldm.util",
    "load_latent_diffusion": "ldm.checkpoints",
    "read_metadata": "ldm.metadata",
    "read_parameters": "ldm.metadata",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# Where modules were -> where they are, for code and YAML files that name the old places.
_MOVED = {
    "ldm.checkpoints.openai": "ldm.guided_diffusion.files",
    "ldm.kernels.deepcache": "ldm.adapters.deepcache",
    "ldm.kernels.tome": "ldm.adapters.tome",
    "ldm.models.diffusion.gaussian_bridge": "ldm.guided_diffusion.gaussian_bridge",
    "ldm.models.diffusion.pixel_diffusion": "ldm.guided_diffusion.pixel_diffusion",
    "ldm.models.diffusion.script_util": "ldm.guided_diffusion.script_util",
    "ldm.pixels": "ldm.guided_diffusion.pixels",
    "ldm.training.bpe": "ldm.shapes.bpe",
    "ldm.training.checker": "ldm.shapes.checker",
    "ldm.training.gaussian": "ldm.guided_diffusion.objective",
    "ldm.training.shapes": "ldm.shapes.scenes",
    "ldm.wish": "ldm.request",
}


class _Moved(MetaPathFinder, Loader):
    """Imports a module by its former name: the very module, so that rebinding its globals takes effect."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__  # the import system is about to put `spec` in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _Moved())
