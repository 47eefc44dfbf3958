"""Attention slicing: the same numbers by less memory, by our processor and by diffusers' rules; refusals."""

import pytest
import torch
from keyed import fill, keyed_input
from meter import peak_of
from tiny_networks import UNET
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.adapters import AttentionSlicing
from ldm.errors import UsageError
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import AttnProcessor, SlicedAttnProcessor, named_attentions
from ldm.modules.seams import attached


@pytest.fixture(scope="module")
def attn():
    return fill(CrossAttention(24, 10, heads=3, dim_head=5), "slicing.")


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
@torch.no_grad()
def test_slices_of_every_size_give_the_whole(attn, size):
    x, context = keyed_input("sl.x", (2, 11, 24)), keyed_input("sl.c", (2, 7, 10))
    for mask in (None, keyed_input("sl.m", (2, 1, 7)), keyed_input("sl.m2", (2, 11, 7))):
        want, got = (one(attn, x, context, mask) for one in (AttnProcessor(), SlicedAttnProcessor(size)))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    maps = x.transpose(1, 2)[..., None]
    got = SlicedAttnProcessor(size)(attn, maps, context)
    assert got.shape == maps.shape
    torch.testing.assert_close(got, AttnProcessor()(attn, maps, context), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_unet_gives_the_same_in_less_memory_where_scores_are_held():
    unet = fill(UNetModel(**UNET | {"channel_mult": [1], "attention_resolutions": [1]}), "slicing.u.")
    x, t, c = keyed_input("sl.u", (2, 4, 24, 16)), torch.tensor([5, 700]), keyed_input("sl.uc", (2, 7, 24))
    theirs = list(named_attentions(unet).values())[0]
    with sdpa_kernel(SDPBackend.MATH):  # which holds the scores, as GPUs without a fused kernel do
        plain, peaks = unet(x, t, c), [peak_of(lambda: unet(x, t, c))[0]]
        for size in (2, "auto", "max"):  # of 2 x 2 heads
            with attached(unet, AttentionSlicing(size)):
                torch.testing.assert_close(unet(x, t, c), plain, rtol=1e-5, atol=1e-5)
                peaks.append(peak_of(lambda: unet(x, t, c))[0])
                assert all(
                    isinstance(one.processor, SlicedAttnProcessor) for one in named_attentions(unet).values()
                )
        scores = 24 * 16 * 24 * 16 * 4  # bytes of a head's
        assert peaks[2] == peaks[3] < peaks[1] - scores < peaks[0] - 3 * scores, peaks
        assert torch.equal(unet(x, t, c), plain)
    assert all(one.processor is None for one in named_attentions(unet).values())
    other = AttnProcessor()
    theirs.set_processor(lambda *args, **kwargs: other(*args, **kwargs))
    mine = theirs.processor
    with attached(unet, AttentionSlicing(2)):
        assert theirs.processor is mine


REFUSED = [
    (0, "a whole number from 1"),
    (1.5, "a whole number"),
    ("small", "'auto' or 'max'"),
    (True, "a whole number"),
]


def test_refusals():
    for size, words in REFUSED:
        with pytest.raises(UsageError, match=words):
            AttentionSlicing(size)
    with pytest.raises(UsageError, match="slice_size must be a whole number from 1"):
        SlicedAttnProcessor(0)
    with pytest.raises(UsageError, match="attention slicing needs a UNetModel, got Linear"):
        AttentionSlicing().check(torch.nn.Linear(2, 3))
    with pytest.raises(UsageError, match="for a UNet with spatial transformers, and this one has none"):
        AttentionSlicing().check(UNetModel(8, 4, 32, 4, 1, [2], channel_mult=[1, 2], num_heads=2))
