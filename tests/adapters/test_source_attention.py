"""Mutual self-attention and plug-and-play: attention and features by hand, laws in a batch, and refusals."""

import json
import re

import pytest
import torch
from keyed import keyed_input
from tiny import tiny_model

from ldm.adapters import MutualSelfAttention, PlugAndPlay
from ldm.adapters.attention_control import Opened, places_of
from ldm.adapters.source_attention import _SourceFeatures
from ldm.errors import UsageError
from ldm.kernels import optimize, restore
from ldm.modules.attention import attend
from ldm.modules.seams import StepInfo, attached
from ldm.pipeline import StableDiffusion

SOURCE, EDIT = "a red circle", "a blue circle"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def begun(control, step=5, images=3, total=10):
    mine = control.for_batch(None, ["a"] * images, [1] * images).begin()
    mine.at(StepInfo(step, total, unconditional=images, images=images))
    mine._latents = (6, 5)
    return mine


def selfish(model):
    return next(place for place in places_of(model.model.diffusion_model) if not place.is_cross)


def qkv(rows=6):
    return (keyed_input(f"masa.{name}", (rows, 2, 30, 4)) for name in "qkv")


def test_keys_and_values_of_the_source_with_and_without_the_condition(model):
    q, k, v = qkv()
    got = Opened(None, selfish(model), (begun(MutualSelfAttention()),)).attending(q, k, v, None, 0.5)
    for first in (0, 3):
        for row in range(first, first + 3):
            want = attend(q[row][None], k[first][None], v[first][None], None, 0.5)
            assert torch.allclose(got[row], want[0], atol=1e-6), row


def test_objects_look_at_the_source_s_object_and_grounds_at_its_ground(model):
    """What each of the two masks lets be seen, computed apart and put together by the edits' mask."""
    ours = (keyed_input("masa.ours", (1, 1, 6, 5)) > 0).float()
    theirs = (keyed_input("masa.theirs", (1, 1, 6, 5)) > 0).float()
    control = begun(MutualSelfAttention(mask=(ours, theirs)))
    q, k, v = qkv()
    got = Opened(None, selfish(model), (control,)).attending(q, k, v, None, 0.5)
    seen = ours.flatten().bool()
    of_object, of_ground = (
        attend(q[4:5], k[3:4][:, :, s], v[3:4][:, :, s], None, 0.5) for s in (seen, ~seen)
    )
    m = theirs.flatten()[:, None]
    assert torch.allclose(got[4], (of_object * m + of_ground * (1 - m))[0], atol=1e-6)
    assert torch.allclose(
        got[3], attend(q[3:4], k[3:4], v[3:4], None, 0.5)[0], atol=1e-6
    )  # the source itself
    empty = begun(MutualSelfAttention(mask=(torch.zeros(1, 1, 6, 5), theirs)))
    unseen = Opened(None, selfish(model), (empty,)).attending(q, k, v, None, 0.5)
    assert torch.isfinite(unseen).all()  # an object of which the source has none looks at everything


def test_queries_and_keys_of_the_source_and_its_residual(model):
    q, k, v = qkv()
    control = begun(PlugAndPlay(), step=4)
    got = Opened(None, selfish(model), (control,)).attending(q, k, v, None, 0.5)
    assert torch.allclose(got[5], attend(q[3:4], k[3:4], v[5:6], None, 0.5)[0], atol=1e-6)
    unet = model.model.diffusion_model
    block = control._block(unet)
    assert block is unet.output_blocks[len(unet.output_blocks) // 3][0]
    x, emb = keyed_input("pnp.x", (6, block.channels, 4, 5)), keyed_input("pnp.emb", (6, 128))
    with torch.no_grad():
        plain = block(x, emb)
        out = _SourceFeatures(control, block)(block, x, emb)
        skip = block.skip_connection(x)
    assert torch.allclose(out[1] - skip[1], plain[0] - skip[0], atol=1e-5)
    assert torch.allclose(out[5] - skip[5], plain[3] - skip[3], atol=1e-5)
    assert torch.allclose(out[3], plain[3], atol=1e-5)


@pytest.mark.parametrize(
    ("count", "layers"), [(16, [10, 11, 12, 13, 14, 15]), (7, [5, 6]), (1, [])], ids=["v1", "tiny", "one"]
)
def test_the_layers_of_the_paper(count, layers):
    class At:
        is_cross = False

        def __init__(self, number):
            self.number, self.count = number, count

    chosen = [i for i in range(count) if MutualSelfAttention().may_look_at(At(i))]
    assert chosen == layers
    assert [i for i in range(count) if MutualSelfAttention(start_layer=3).may_look_at(At(i))] == [
        *range(3, count)
    ]


# --- in a batch -------------------------------------------------------------------------------------


def paint(model, adapters=(), prompts=(SOURCE, EDIT), **options):
    given = {
        "steps": 3,
        "sampler": "ddim",
        "guidance_scale": 3.0,
        "output_type": "latent",
        "width": 72,
        "height": 64,
    }
    given["seed"] = [7] * len(prompts)
    return StableDiffusion(model).txt2img([*prompts], adapters=list(adapters), **given | options).images


def near(got, want, slack=2e-5):
    return (got - want).abs().max() <= slack * want.abs().max()


@pytest.fixture(scope="module")
def alone(model):
    return paint(model)


@pytest.mark.parametrize(
    ("control", "nothing"),
    [(MutualSelfAttention(0.0), MutualSelfAttention(1.0)), (PlugAndPlay(), PlugAndPlay(0, 0))],
    ids=["mutual", "plug"],
)
def test_the_source_stays_the_edit_is_changed_and_of_no_step_nothing_is(model, alone, control, nothing):
    got = paint(model, [control])
    assert near(got[0], alone[0]) and not near(got[1], alone[1], 1e-3)
    assert torch.equal(paint(model, [nothing]), alone)
    same = paint(model, [control], (SOURCE, SOURCE), steps=1)
    assert near(same[1], same[0])
    if isinstance(control, PlugAndPlay):
        return  # one of the two, optimized
    optimize(model)
    try:
        assert near(paint(model, [control]), got)
    finally:
        restore(model)


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MutualSelfAttention, {"start": 1.5}, "start should be a number from 0 to 1"),
        (MutualSelfAttention, {"start_layer": -1}, "start_layer should be"),
        (
            MutualSelfAttention,
            {"mask": torch.ones(4, 4)},
            "mask should be (1, 1, h, w), 1 = object, or two of them",
        ),
        (MutualSelfAttention, {"mask": (torch.ones(1, 1, 4, 5),) * 3}, "mask should be (1, 1, h, w)"),
        (MutualSelfAttention, {"mask": ()}, "mask should be (1, 1, h, w)"),
        (PlugAndPlay, {"attention_steps": (0.5, 0.1)}, "attention_steps should begin before it ends"),
        (PlugAndPlay, {"feature_block": 1.5}, "feature_block should be"),
    ],
)
def test_what_they_do_not_take(kind, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        kind(**options)


@pytest.mark.parametrize(
    ("control", "options", "message"),
    [
        (
            MutualSelfAttention(),
            {"prompts": [SOURCE]},
            "wants a source and its edits in one batch, got 1 picture",
        ),
        (
            PlugAndPlay(),
            {"seed": [7, 8]},
            "must begin with the same noise, got the seeds [7, 8]; give seed=[7, 7]",
        ),
        (PlugAndPlay(feature_block=4), {}, "feature_block should be an output block with a residual block"),
        (MutualSelfAttention(start_layer=7), {}, "has no self-attention to look at in this UNet"),
        (MutualSelfAttention(0.0), {"merge_ratio": 0.5}, "MutualSelfAttention needs tokens one by one"),
    ],
)
def test_what_is_refused_and_nothing_painted(model, control, options, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        paint(model, [control], **options)
    assert len(str(caught.value)) <= 400


def test_a_unet_alone_does_not_know_what_they_are_about(model):
    for control in (MutualSelfAttention(), PlugAndPlay()):
        with pytest.raises(UsageError, match="give it to"):
            with attached(model.model.diffusion_model, control):
                pass
        assert json.loads(json.dumps(control.describe())) == control.describe()
