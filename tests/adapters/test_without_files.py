"""FreeU, PAG, SAG, seamless tiling and sliced attention beside a LoRA, each other, and what leaves work out."""

import copy
import itertools

import pytest
import torch
from lora_files import write_lora_for

from ldm.adapters import PAG, SAG, AttentionSlicing, DeepCache, FreeU, LoRA, SeamlessTiling, TokenMerging
from ldm.kernels import restore
from ldm.pipeline import StableDiffusion

KINDS = {
    "FreeU": lambda: FreeU(1.5, 1.6, 0.9, 0.2),
    "PAG": lambda: PAG(2, "up"),
    "SAG": lambda: SAG(0.75),
    "SeamlessTiling": SeamlessTiling,
    "AttentionSlicing": lambda: AttentionSlicing("max"),
}


@pytest.fixture(scope="module")
def lora(painter, tmp_path_factory):
    return LoRA(write_lora_for(tmp_path_factory.mktemp("w") / "style.safetensors", painter.model), 0.8)


@pytest.fixture(scope="module")
def by_hand(painter, lora):
    """A model that has the LoRA's changes in its weights for good."""
    model = copy.deepcopy(painter.model)
    with torch.no_grad():
        for name, change in lora.deltas(model).items():
            weight = model.get_parameter(name)
            weight.copy_(change(weight))
    return StableDiffusion(model)


def paint(sd, *adapters):
    how = {"seed": 3, "steps": 2, "output_type": "pt", "height": 64, "width": 72, "guidance_scale": 3.0}
    return sd.txt2img("a large red circle", adapters=adapters, **how).images


def near(got, want, slack=1e-4):
    return bool((got - want).abs().max() <= slack)


@pytest.mark.slow
def test_each_beside_a_lora_is_each_on_a_model_with_its_changes(painter, by_hand, lora):
    plain = paint(painter)
    for name, make in KINDS.items():
        got = paint(painter, make(), lora)
        assert torch.equal(got, paint(painter, lora, make())), name
        assert near(got, paint(by_hand, make())) and not near(got, paint(painter, make())), name
        assert torch.equal(paint(painter), plain), name


@pytest.mark.slow
def test_two_at_once_are_painted_in_either_order_plain_and_optimized(painter):
    plain = paint(painter)
    want = {}
    for one, other in itertools.combinations(KINDS, 2):
        want[one, other] = paint(painter, KINDS[one](), KINDS[other]())
        assert near(want[one, other], paint(painter, KINDS[other](), KINDS[one]())), (one, other)
        assert not near(want[one, other], plain), (one, other)
    for name, make in KINDS.items():
        for left_out in (DeepCache(2), TokenMerging(0.5)):
            both = paint(painter, make(), left_out)
            assert torch.isfinite(both).all() and not near(both, plain), (name, left_out)
    assert torch.equal(paint(painter), plain)
    painter.optimize()
    try:
        for (one, other), wanted in list(want.items())[::3]:
            assert near(paint(painter, KINDS[one](), KINDS[other]()), wanted, 1e-3), (one, other)
    finally:
        restore(painter.model)
    assert torch.equal(paint(painter), plain)
