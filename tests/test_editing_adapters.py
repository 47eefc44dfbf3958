"""Editing with a LoRA, a ControlNet and an IP-Adapter attached: on the way up, on the way down, and together."""

import numpy as np
import pytest
import torch
from keyed import keyed_input
from lora_files import write_lora_for
from tiny import tiny_model
from tiny_adapters import write_control, write_image_adapter

from ldm.adapters import ControlNet, IPAdapter, LoRA
from ldm.edit_parts import network_of
from ldm.editing import DDS, EDITORS, DiffEdit, resolve_editor
from ldm.pipeline import StableDiffusion

SOURCE, EDIT = "a red circle", "a blue circle"
KINDS = ("LoRA", "ControlNet", "IPAdapter")
TOGETHER = [KINDS, *(pytest.param((one,), marks=pytest.mark.slow) for one in KINDS)]
FEW = {"dds": DDS(1), "diffedit": DiffEdit(draws=1)}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


@pytest.fixture(scope="module")
def picture():
    return (0.6 * keyed_input("editing.picture", (1, 3, 64, 72))).clamp(-1, 1)


@pytest.fixture(scope="module")
def made(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_lora_for(folder / "lora.safetensors", sd.model)
    write_control(folder / "control.safetensors")
    write_image_adapter(folder / "image.safetensors")
    return {
        "LoRA": LoRA(folder / "lora.safetensors"),
        "ControlNet": ControlNet(
            folder / "control.safetensors", keyed_input("hint", (3, 64, 72)).clamp(0, 1)
        ),
        "IPAdapter": IPAdapter(folder / "image.safetensors", embeds=keyed_input("embeds", (1, 20))),
    }


@pytest.mark.parametrize("kinds", TOGETHER)
def test_exact_inversions_come_back_with_what_is_attached_and_not_without(sd, picture, made, kinds):
    adapters = [made[kind] for kind in kinds]
    for method in ("belm", "edit_friendly"):
        inversion = sd.invert(picture, SOURCE, method=method, steps=2, guidance_scale=3.0, adapters=adapters)
        assert inversion.error.max() <= 1e-4, method
        without = inversion.sample(network=network_of(sd))
        assert (without - inversion.x0).abs().max() > 1e-2, method


def test_maps_of_words_are_of_what_is_attached(sd, picture, made):
    how = {"steps": 1, "guidance_scale": 3.0}
    maps = [sd.explain(picture, SOURCE, adapters=one, **how).maps for one in ([], list(made.values()))]
    assert torch.isfinite(maps[1]).all() and not torch.allclose(*maps, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("editor", EDITORS)
def test_every_editor_works_with_each_of_them(sd, picture, made, editor):
    way = FEW.get(editor) or resolve_editor(editor)
    how = {"steps": 1, "start_step": 0, "guidance_scale": 3.0, "editor": way}
    plain, *found = (
        np.asarray(sd.edit(picture, SOURCE, EDIT, adapters=adapters, **how).images[0])
        for adapters in ([], *([one] for one in made.values()), list(made.values()))
    )
    for one, kind in zip(found, (*KINDS, "all"), strict=True):
        assert one.shape == plain.shape and not np.array_equal(one, plain), kind
