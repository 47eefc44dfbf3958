"""Modules that moved are found where they were: the very modules, for imports, YAML targets and pickles."""

import importlib
import pickle
import sys

import pytest

import ldm
from ldm.config import get_obj_from_str


@pytest.mark.parametrize(("old", "new"), ldm._MOVED.items())
def test_a_former_name_is_the_module_itself(old, new):
    module = importlib.import_module(new)
    spec = module.__spec__
    former = importlib.import_module(old)
    assert former is module and sys.modules[old] is module
    assert module.__name__ == new and module.__spec__ is spec and spec.name == new


def test_the_ways_in_which_a_former_name_is_written():
    from ldm.training.shapes import ShapesDataset

    from ldm.guided_diffusion import script_util as own
    from ldm.models.diffusion import script_util
    from ldm.shapes import scenes

    assert script_util is own and ShapesDataset is scenes.ShapesDataset
    found = get_obj_from_str("ldm.models.diffusion.pixel_diffusion.PixelDiffusion")
    assert found.__module__ == "ldm.guided_diffusion.pixel_diffusion"
    assert pickle.loads(b"cldm.models.diffusion.pixel_diffusion\nPixelDiffusion\n.") is found


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="ldm.training.shape"):
        importlib.import_module("ldm.training.shape")


@pytest.mark.parametrize(
    ("former", "home"),
    [
        ("ldm.generate.StableDiffusion", "ldm.pipeline.StableDiffusion"),
        ("ldm.generate.GenerationResult", "ldm.results.GenerationResult"),
        ("ldm.wish.Job", "ldm.request.Request"),
        ("ldm.wish.Shot", "ldm.request.ImageSpec"),
        ("ldm.wish.check_size", "ldm.request.check_size"),
        ("ldm.wish.pick_device", "ldm.devices.pick_device"),
        ("ldm.wish.dtype_name", "ldm.devices.dtype_name"),
        ("ldm.wish.downsampling", "ldm.models.introspect.downsampling"),
        ("ldm.wish.dtype_of", "ldm.models.introspect.dtype_of"),
        ("ldm.wish.whole", "ldm.limits.whole"),
        ("ldm.wish.MAX_SEED", "ldm.limits.MAX_SEED"),
    ],
)
def test_a_name_that_moved_to_another_module_is_found_where_it_was(former, home):
    found = [getattr(importlib.import_module(m), n) for m, n in (x.rsplit(".", 1) for x in (former, home))]
    assert found[0] is found[1]
