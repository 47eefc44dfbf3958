"""A request of any number of passes is these passes one after the other, each begun with what the one before gave."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from ldm.pipeline import StableDiffusion
from ldm.request import start_from_before

PROMPT, SIZE = "a red circle", (72, 64)
HOW = {"steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask():
    mask = Image.new("L", SIZE)
    mask.paste(255, (36, 0, *SIZE))
    return mask


def again(request, **more):
    """The same request, with its pass once more: half of it, from the picture that came."""
    first = request.passes[0]
    start = start_from_before(0.5, 1, "lanczos", first.size, **more)
    return request.replace(passes=(first, first.replace(start=start)))


@pytest.mark.parametrize(
    ("strength", "masked"), [(0.5, False), (0, False), (1, True)], ids=["picture", "untouched", "mask"]
)
def test_a_pass_from_the_picture_before_is_img2img_of_it(sd, strength, masked):
    """Also where the first pass gives its picture back, and where it is one with a mask."""
    given = {"image": picture(), "strength": strength} | ({"mask": half_mask()} if masked else {})
    request = again(sd.plan(PROMPT, **given, **HOW))
    *steps, last = sd.paint(request)
    once = sd.txt2img(PROMPT, **given, **HOW, progress=False)
    want = sd.img2img(PROMPT, once[0], 0.5, **HOW, progress=False)
    assert torch.equal(last.result.latents, want.latents)
    assert last.result[0].tobytes() == want[0].tobytes() != once[0].tobytes()
    first = round(strength * 2)
    assert [(one.step, one.steps) for one in steps] == [(i + 1, first + 1) for i in range(first + 1)]
    assert (last.step, last.steps) == (first + 1, first + 1)


def test_three_passes_of_two_sizes_are_counted_and_said_once(sd):
    """Latents of the same size are handed on to the bit; texts and sizes of metadata are the first pass's."""
    request = sd.plan(PROMPT, width=72, height=64, **HOW)
    (first,) = request.passes
    same = first.replace(start=start_from_before(0.5, 1, "latent nearest", SIZE))
    wider = first.replace(
        width=80, own_prompt="a blue ring", start=start_from_before(1.0, 2, "latent nearest", (80, 64))
    )
    *steps, last = sd.paint(request.replace(passes=(first, same, wider)))
    assert [(one.step, one.steps) for one in steps] == [(i, 5) for i in range(1, 6)]
    assert [tuple(one.x_t.shape[2:]) for one in steps] == [(8, 9)] * 3 + [(8, 10)] * 2
    assert last.result[0].size == (80, 64) and last.result.parameters[0].prompt == PROMPT
    *_, two = sd.paint(request.replace(passes=(first, same)))
    assert torch.equal(steps[2].x_t, two.result.latents)
    assert not torch.equal(steps[1].x_t, two.result.latents)
