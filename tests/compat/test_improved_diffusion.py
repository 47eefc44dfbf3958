"""Improved-diffusion's calls beside those of guided-diffusion and CompVis: its UNet, and the order of p_sample."""

import inspect

import numpy as np
import pytest
import torch
from keyed import fill, keyed_input

from ldm.errors import UsageError
from ldm.models.diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    _extract_into_tensor,
    get_named_beta_schedule,
)
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    EncoderUNetModel,
    QKVAttention,
    QKVAttentionLegacy,
    SiLU,
    SuperResModel,
    UNetModel,
)
from ldm.modules.diffusionmodules.util import SiLU as SiLUOfUtil
from ldm.util import instantiate_from_config

REQUIRED = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
}
OPTIONS = {"dropout": 0.0, "channel_mult": (1, 2)}
# What improved-diffusion's create_model gives, by name.
BY_NAME = {
    **REQUIRED,
    **OPTIONS,
    "num_classes": None,
    "use_checkpoint": False,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
}
# The same by position, in its order: ..., conv_resample, dims, num_classes, use_checkpoint, num_heads, ...
BY_PLACE = (3, 32, 6, 1, (2,), 0.0, (1, 2), True, 2, None, False, 4, -1, True)


@pytest.mark.parametrize(
    ("args", "kwargs", "heads"),
    [
        ((), {**REQUIRED, **OPTIONS}, 1),  # improved-diffusion's default
        ((3, 32, 6, 1, (2,)), OPTIONS, 1),
        ((3, 32, 6, 1, [2], 0.0, (1, 2)), {}, 1),
        ((3, 32, 6, 1, {2}, 0), {"channel_mult": (1, 2)}, 1),
        ((3, 32), {**{k: REQUIRED[k] for k in list(REQUIRED)[2:]}, **OPTIONS}, 1),
        ((), {**REQUIRED, **OPTIONS, "num_heads": 2}, 2),
        ((), {**REQUIRED, **OPTIONS, "num_head_channels": 16}, 4),  # 64 channels in the middle
        ((), BY_NAME, 4),
        (BY_PLACE, {}, 4),
        # CompVis's and guided-diffusion's calls have image_size
        ((), {**REQUIRED, **OPTIONS, "image_size": 8, "num_heads": 2}, 2),
        ((8, 3, 32, 6, 1, (2,)), {**OPTIONS, "num_heads": 2}, 2),
        ((8, 3, 32, 6, [1, 1], (2,), 0.0, (1, 2)), {"num_heads": 2}, 2),
        ((8, 3, 32, 6, [1, 1]), {"attention_resolutions": (2,), **OPTIONS, "num_heads": 2}, 2),
        ((8,), {**REQUIRED, **OPTIONS, "num_heads": 2}, 2),
        ((None,), {**REQUIRED, **OPTIONS, "num_heads": 2}, 2),
    ],
)
@torch.no_grad()
@pytest.mark.thinned(3)
def test_a_unet_with_and_without_image_size(args, kwargs, heads):
    unet = UNetModel(*args, **kwargs)
    assert unet.middle_block[1].num_heads == heads
    want = UNetModel(**{"image_size": 8, **BY_NAME, **kwargs, "num_heads": unet.num_heads})
    same = {k: v.shape for k, v in want.state_dict().items()} == {
        k: v.shape for k, v in unet.state_dict().items()
    }
    assert same == (args == BY_PLACE or "use_scale_shift_norm" in kwargs)
    assert unet(keyed_input("x", (2, 3, 8, 8)), torch.tensor([1, 9])).shape == (2, 6, 8, 8)


@torch.no_grad()
def test_the_two_calls_build_one_network():
    x, t = keyed_input("x", (2, 3, 8, 8)), torch.tensor([1, 9])
    by_name, by_place = UNetModel(**BY_NAME), UNetModel(*BY_PLACE)
    ours = UNetModel(image_size=8, **BY_NAME)
    answers = [fill(unet)(x, t) for unet in (by_name, by_place, ours)]
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[2])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((8, 3, 32, 6, 1), OPTIONS, "missing 1 required positional argument: 'attention_resolutions'"),
        (
            (),
            {k: v for k, v in BY_NAME.items() if k != "in_channels"},
            "missing 2 required positional arguments",
        ),
        (BY_PLACE, {"num_heads": 4}, "several values for num_heads"),
        ((*BY_PLACE, 1), {}, "takes 14 arguments"),
        ((), {**BY_NAME, "in_chanels": 3}, "unexpected keyword argument 'in_chanels'"),
    ],
)
def test_calls_that_are_neither_are_refused(args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        UNetModel(*args, **kwargs)


def test_the_declared_signature_is_compviss_and_a_configuration_may_leave_the_size_out():
    assert list(inspect.signature(UNetModel).parameters)[:3] == [
        "image_size",
        "in_channels",
        "model_channels",
    ]
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    unet = instantiate_from_config({"target": target, "params": BY_NAME})
    assert unet.image_size is None and unet.num_heads == 4


@torch.no_grad()
def test_an_upsampler_without_image_size():
    large, small, t = keyed_input("x", (2, 3, 8, 8)), keyed_input("low", (2, 3, 4, 4)), torch.tensor([1, 9])
    nets = [SuperResModel(**BY_NAME), SuperResModel(*BY_PLACE), SuperResModel(image_size=8, **BY_NAME)]
    answers = [fill(net)(large, t, low_res=small) for net in nets]
    assert nets[0].input_blocks[0][0].weight.shape == (32, 6, 3, 3)
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[2])


def test_what_a_unet_says_of_itself():
    """num_res_blocks as it was given, and the channels of all blocks together."""
    assert UNetModel(**BY_NAME).num_res_blocks == 1
    assert UNetModel(**{**BY_NAME, "num_res_blocks": [1, 2]}).num_res_blocks == [1, 2]
    # Down: first convolution 32, block 32, halving 32, block 64. Middle 64. Up: 64, 64, 32, 32.
    assert UNetModel(**BY_NAME)._feature_size == (32 + 32 + 32 + 64) + 64 + (64 + 64 + 32 + 32)
    encoder = EncoderUNetModel(8, **{**REQUIRED, "out_channels": 5}, channel_mult=(1, 2), num_heads=1)
    assert encoder._feature_size == (32 + 32 + 32 + 64) + 64
    assert encoder.num_res_blocks == 1


@torch.no_grad()
def test_attention_whose_caller_has_put_the_heads_into_the_batch():
    """The headless call on (b heads, 3 c, n) is the heads' own attention."""
    qkv = keyed_input("qkv", (2, 4 * 3 * 5, 7))  # 4 heads of 5 channels over 7 cells
    for cls in (QKVAttention, QKVAttentionLegacy):
        headless = cls()(qkv.reshape(2 * 4, 3 * 5, 7)).reshape(2, 4 * 5, 7)
        torch.testing.assert_close(headless, QKVAttentionLegacy(4)(qkv), rtol=0, atol=1e-6)
    q, k, v = qkv.reshape(8, 15, 7).split(5, dim=1)
    weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / 5**0.5, dim=-1)
    torch.testing.assert_close(
        headless, torch.einsum("bts,bcs->bct", weight, v).reshape(2, 20, 7), rtol=0, atol=1e-6
    )


def test_an_attention_block_by_position():
    """Its third argument is whether activations are recomputed; guided-diffusion's is a width."""
    improved, guided = AttentionBlock(64, 4, True), AttentionBlock(64, 1, 16)
    assert (improved.num_heads, improved.use_checkpoint) == (4, True)
    assert (guided.num_heads, guided.use_checkpoint) == (4, False)


def test_names_of_the_originals():
    assert openaimodel.th is torch
    assert SiLU is SiLUOfUtil and torch.equal(SiLU()(torch.ones(2)), torch.sigmoid(torch.ones(2)))
    table = np.array([0.1, 0.25, 0.7])
    got = _extract_into_tensor(table, torch.tensor([2, 0]), (2, 3, 1))
    assert torch.equal(got, torch.tensor([[[0.7]] * 3, [[0.1]] * 3])) and got.dtype == torch.float32


DIFFUSION = GaussianDiffusion(
    betas=get_named_beta_schedule("cosine", 20),
    model_mean_type=ModelMeanType.EPSILON,
    model_var_type=ModelVarType.FIXED_SMALL,
    loss_type=LossType.MSE,
)
SHAPE = (2, 3, 4, 5)
XT, T = keyed_input("xt", SHAPE), torch.tensor([3, 17])


def network(x, t, y=0.0):
    return torch.tanh(0.3 * x + 0.01 * t.float().reshape(-1, 1, 1, 1) + y)


def push(x, t, y=0.0):
    return 0.1 * x + y


def halve(x):
    return x / 2


KEYS = {"y": 0.2}
FIRST = (False, halve)  # clip_denoised, denoised_fn
CALLS = [
    # rest by position, the same by name
    (({"y": 0.2},), {"model_kwargs": KEYS}),
    ((push,), {"cond_fn": push}),
    ((push, KEYS), {"cond_fn": push, "model_kwargs": KEYS}),
    ((None, KEYS), {"model_kwargs": KEYS}),
    ((None,), {}),
    ((), {}),
]
ONE_STEP_ETA = [
    ((KEYS, 0.5), {"model_kwargs": KEYS, "eta": 0.5}),
    ((push, KEYS, 0.5), {"cond_fn": push, "model_kwargs": KEYS, "eta": 0.5}),
    ((None, 0.5), {"eta": 0.5}),
    ((None, None, 0.5), {"eta": 0.5}),
]
LOOP = [
    ((KEYS, "cpu", False), {"model_kwargs": KEYS}),
    ((KEYS, torch.device("cpu")), {"model_kwargs": KEYS}),
    ((None, "cpu", False), {}),
    ((None, None, False), {}),
    ((None, None, "cpu", False), {}),
    ((push, KEYS, "cpu", False), {"cond_fn": push, "model_kwargs": KEYS}),
]
LOOP_ETA = [
    ((KEYS, "cpu", False, 0.5), {"model_kwargs": KEYS, "eta": 0.5}),
    ((push, KEYS, None, False, 0.5), {"cond_fn": push, "model_kwargs": KEYS, "eta": 0.5}),
]
METHODS = {
    "p_sample": CALLS,
    "ddim_sample": CALLS + ONE_STEP_ETA,
    "p_sample_loop": CALLS + LOOP,
    "p_sample_loop_progressive": CALLS + LOOP,
    "ddim_sample_loop": CALLS + LOOP + LOOP_ETA,
    "ddim_sample_loop_progressive": CALLS + LOOP + LOOP_ETA,
}
BOTH_ORDERS = [(method, *call) for method, calls in METHODS.items() for call in calls]


def ask(method, *args, **kwargs):
    torch.manual_seed(1)
    start = (SHAPE, XT) if "loop" in method else (XT, T)
    out = getattr(DIFFUSION, method)(network, *start, *FIRST, *args, **kwargs)
    out = list(out)[-1] if "progressive" in method else out
    return out["sample"] if isinstance(out, dict) else out


@pytest.mark.parametrize(("method", "by_place", "by_name"), BOTH_ORDERS)
@pytest.mark.thinned(4)
def test_both_orders_by_position(method, by_place, by_name):
    assert torch.equal(ask(method, *by_place), ask(method, **by_name))


def test_what_is_told_apart_matters():
    samples = [ask("p_sample", **by_name) for _, by_name in CALLS[:3]] + [ask("p_sample")]
    for i, one in enumerate(samples):
        assert all((one - other).abs().max() > 1e-3 for other in samples[:i])


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "came"),
    [
        ("p_sample", (3,), {}, "got int"),
        ("p_sample", (KEYS, KEYS), {}, "got dict, dict"),
        ("p_sample", (KEYS, push), {}, "got dict, function"),
        ("p_sample", (push, KEYS, None), {}, "got function, dict, NoneType"),
        ("ddim_sample", (KEYS, True), {}, "got dict, bool"),
        ("p_sample_loop", (KEYS, False, "cpu"), {}, "got dict, bool, str"),
        ("p_sample", (push,), {"cond_fn": push}, "got function"),
        ("p_sample", (KEYS,), {"model_kwargs": KEYS}, "got dict"),
    ],
)
def test_neither_order_is_one_clear_error(method, args, kwargs, came):
    with pytest.raises(UsageError, match=came) as caught:
        ask(method, *args, **kwargs)
    text = str(caught.value)
    assert "cond_fn, model_kwargs" in text and "without cond_fn" in text and len(text) < 400
    assert caught.value.exit_code == 2
