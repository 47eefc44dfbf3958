"""A UNet's shallow blocks on deep features of an earlier call: of the same input, the same answer at each depth."""

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET

from ldm.errors import UsageError
from ldm.modules.diffusionmodules.openaimodel import UNetModel

BLOCKS = 4  # input blocks of UNET


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET), "depth.")


def given(size=(6, 10)):
    return {
        "x": keyed_input("depth.x", (3, 4, *size)),
        "timesteps": torch.tensor([1, 500, 999]),
        "context": keyed_input("depth.context", (3, 7, 24)),
    }


@pytest.mark.parametrize("size", [(6, 10), (5, 9)], ids=str)
@torch.no_grad()
def test_deep_features_of_the_same_input_give_the_same_answer(unet, size):
    whole = unet(**given(size))
    shapes = []
    for depth in range(1, BLOCKS + 1):
        answer, deep = unet(**given(size), depth=depth)
        assert torch.equal(answer, whole)
        assert torch.equal(unet(**given(size), depth=depth, deep=deep), whole)
        assert not torch.equal(unet(**given(size), depth=depth, deep=deep + 1), whole)
        shapes.append(tuple(deep.shape[1:]))
    # What the last output block but one gives, the one before it, and so on back to the middle block.
    half = tuple(-(-side // 2) for side in size)
    assert shapes == [(32, *size), (64, *size), (64, *half), (64, *half)]


@torch.no_grad()
def test_the_deep_blocks_do_not_run_where_their_features_are_given(unet):
    ran = []
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    _, deep = unet(**given(), depth=2)
    assert ran == list(range(2 * BLOCKS + 1))
    ran.clear()
    unet(**given(), depth=2, deep=deep)
    assert ran == [0, 1, 7, 8]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": -1}, "from 0 to 4 for this UNet, got -1"),
        ({"depth": BLOCKS + 1}, "from 0 to 4 for this UNet, got 5"),
        ({"depth": 0, "deep": torch.zeros(3, 32, 6, 10)}, "from 1 to 4 for this UNet, got 0"),
    ],
)
def test_a_depth_that_the_unet_does_not_have_is_refused(unet, options, words):
    with pytest.raises(UsageError, match=words):
        unet(**given(), **options)
