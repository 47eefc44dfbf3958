"""The UNet against the recorded originals, and laws that hold for any weights."""

import json

import pytest
import torch
from compat.control import ControlledUnetModel
from keyed import fill, keyed_input
from safetensors.torch import load_file
from tiny_networks import UNET

from ldm.errors import MismatchError, UsageError
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    EncoderUNetModel,
    ResBlock,
    TransposedUpsample,
    UNetModel,
    Upsample,
)

CONFIGS = json.load(open(__file__.rsplit("/", 2)[0] + "/golden/modules.json"))
LATER_CONFIGS = json.load(open(__file__.rsplit("/", 2)[0] + "/golden/sd2_and_control.json"))
SPACES = {1: (8,), 2: (8, 12), 3: (2, 8, 8)}


def agrees(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("unet.")])
@torch.no_grad()
def test_unet_gives_the_recorded_numbers(name, golden):
    config = CONFIGS[name]["config"]
    unet = fill(UNetModel(**config), name + ".")
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == CONFIGS[name]["keys"]
    out = unet(
        keyed_input(name + ".x", (2, config["in_channels"], *SPACES[config.get("dims", 2)])),
        torch.tensor([3, 757]),
        context=keyed_input(name + ".context", (2, 7, 24)) if "context_dim" in config else None,
        y=torch.tensor([1, 9]) if "num_classes" in config else None,
    )
    agrees(out, load_file(golden / "modules.safetensors")[name + ".out"])


@pytest.mark.parametrize("name", [n for n in LATER_CONFIGS if n.startswith("unet2.")])
@torch.no_grad()
def test_options_of_stable_diffusion_2_give_the_recorded_numbers(name, golden):
    unet = fill(UNetModel(**LATER_CONFIGS[name]["config"]), name + ".")
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == LATER_CONFIGS[name]["keys"]
    y = keyed_input("y", (2, 1)) if name.endswith("continuous") else None
    context = keyed_input(name + ".context", (2, 7, 24))
    out = unet(keyed_input(name + ".x", (2, 4, 8, 12)), torch.tensor([3, 757]), context=context, y=y)
    agrees(out, load_file(golden / "sd2_and_control.safetensors")[name + ".out"])


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("enc.")])
@torch.no_grad()
def test_encoder_unet_gives_the_recorded_numbers(name, golden):
    unet = fill(EncoderUNetModel(**CONFIGS[name]["config"]), name + ".")
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == CONFIGS[name]["keys"]
    out = unet(keyed_input(name + ".x", (2, 4, 8, 8)), torch.tensor([3, 757]))
    agrees(out, load_file(golden / "modules.safetensors")[name + ".out"])


def tiny_call(unet, height=6, width=10):
    x, context = keyed_input("x", (2, 4, height, width)), keyed_input("context", (2, 7, 24))
    return unet(x, torch.tensor([3.0, 757.5]), context=context)


@pytest.mark.parametrize("side", [(5, 7), (3, 9), (6, 11), (1, 7), (6, 1), (1, 1), (2, 1)])
@torch.no_grad()
def test_sides_that_do_not_halve_evenly_keep_their_size(side):
    unet = fill(UNetModel(**UNET), "u.")
    assert tiny_call(unet, *side).shape == (2, 5, *side)
    averaging = [
        fill(UNetModel(**UNET, **one), "u.") for one in ({"resblock_updown": True}, {"conv_resample": False})
    ]
    for one in averaging:
        if min(side) > 1:
            assert tiny_call(one, *side).shape == (2, 5, *side)
        else:  # a cell has no half
            with pytest.raises(
                UsageError, match=f"should have sides of 2 or more, got {side[0]} x {side[1]}"
            ):
                tiny_call(one, *side)


@torch.no_grad()
def test_each_picture_of_a_batch_is_computed_by_itself():
    unet = fill(UNetModel(**UNET), "u.")
    x, context, t = keyed_input("x", (3, 4, 6, 10)), keyed_input("c", (3, 7, 24)), torch.tensor([3, 500, 900])
    together = unet(x, t, context=context)
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context=context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("input_blocks",), ("middle_block", "time_embed")])
@pytest.mark.slow
def test_checkpointing_gives_the_same_gradients_even_with_frozen_parts(frozen):
    gradients = []
    for use_checkpoint in (False, True):
        unet = fill(UNetModel(**UNET, use_checkpoint=use_checkpoint), "u.").train()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
        tiny_call(unet).square().sum().backward()
        gradients.append({n: p.grad for n, p in unet.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_new_unet_predicts_zero_because_its_last_layer_starts_there():
    out = tiny_call(UNetModel(**UNET))
    assert out.abs().max() == 0


@torch.no_grad()
def test_fractional_channel_mult_is_rounded_down():
    unet = UNetModel(**{**UNET, "model_channels": 64, "channel_mult": [0.5, 1.5]})
    assert unet.input_blocks[0][0].out_channels == 32
    assert unet.middle_block[0].out_channels == 96
    assert tiny_call(unet).shape == (2, 5, 6, 10)


@torch.no_grad()
def test_half_precision_torso_stays_near_single_precision():
    unet = fill(UNetModel(**UNET), "u.")
    single = tiny_call(unet)
    unet.convert_to_fp16()
    assert unet.input_blocks[0][0].weight.dtype == torch.float16
    assert unet.out[2].weight.dtype == torch.float32
    half = tiny_call(unet)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=0, atol=0.03 * single.abs().max().item())
    unet.convert_to_fp32()
    torch.testing.assert_close(tiny_call(unet), single, rtol=0, atol=0.03 * single.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wholly_converted_unet_runs(dtype):
    unet = fill(UNetModel(**UNET), "u.")
    single = tiny_call(unet)
    unet.to(dtype)
    x, context = keyed_input("x", (2, 4, 6, 10)).to(dtype), keyed_input("context", (2, 7, 24)).to(dtype)
    out = unet(x, torch.tensor([3.0, 757.5]), context=context)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), single, rtol=0, atol=0.06 * single.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [{}, {"n_embed": 11}])
def test_a_wholly_converted_unet_answers_single_precision_in_kind(dtype, change):
    """Samplers keep float32 latents; a network in half precision takes them and gives float32 back."""
    unet = fill(UNetModel(**UNET, **change), "u.")
    single = tiny_call(unet)
    half = tiny_call(unet.to(dtype))
    assert half.dtype == torch.float32 and half.shape == single.shape
    torch.testing.assert_close(half, single, rtol=0, atol=0.06 * single.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("enc.")])
def test_a_half_precision_encoder_unet_answers_single_precision_in_kind(name):
    x, t = keyed_input(name + ".x", (2, 4, 8, 8)), torch.tensor([3, 757])
    unet = fill(EncoderUNetModel(**CONFIGS[name]["config"]), name + ".")
    single, torso = unet(x, t), unet.convert_to_fp16() or unet(x, t)
    whole = unet.half()(x, t)
    for half in (torso, whole):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, single, rtol=0, atol=0.03 * single.abs().max().item())


def test_rebinding_the_timestep_embedding_takes_effect(monkeypatch):
    unet = fill(UNetModel(**UNET), "u.")
    before = tiny_call(unet)
    monkeypatch.setattr(openaimodel, "timestep_embedding", lambda t, dim, **kw: torch.zeros(len(t), dim))
    assert (tiny_call(unet) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": -1}, "one of num_heads and num_head_channels has to be set"),
        ({"context_dim": None}, "use_spatial_transformer=True and context_dim=None"),
        ({"use_spatial_transformer": False}, "use_spatial_transformer=False and context_dim=24"),
        ({"num_res_blocks": [1, 2, 3]}, "num_res_blocks lists 3 values for the 2 levels"),
        ({"disable_self_attentions": [True]}, "disable_self_attentions lists 1 values for the 2 levels"),
        ({"num_attention_blocks": [1]}, "num_attention_blocks lists 1 values for the 2 levels"),
        ({"context_dim": [24, 12]}, "context_dim lists 2 widths for transformer_depth=3"),
    ],
)
def test_options_that_contradict_each_other_are_named(change, message):
    config = {**UNET, **change}
    if "lists 2 widths" in message:
        config["transformer_depth"] = 3
    with pytest.raises(MismatchError, match=message):
        UNetModel(**config)


def test_unknown_kinds_are_refused():
    with pytest.raises(UsageError, match="num_classes should be a number, 'continuous' or None, got 'many'"):
        UNetModel(**UNET, num_classes="many")
    with pytest.raises(UsageError, match="dims should be 1, 2 or 3, got 4"):
        UNetModel(**{**UNET, "use_spatial_transformer": False, "context_dim": None}, dims=4)
    plain = {k: v for k, v in UNET.items() if k not in ("use_spatial_transformer", "context_dim", "legacy")}
    with pytest.raises(UsageError, match="pool should be .* got 'mean'"):
        EncoderUNetModel(**plain, pool="mean")
    with pytest.raises(MismatchError, match="pool='attention' needs num_head_channels, got -1"):
        EncoderUNetModel(**plain, pool="attention")


def test_labels_are_needed_exactly_where_the_model_has_classes():
    x, t, context = torch.zeros(2, 4, 6, 10), torch.tensor([3, 4]), torch.zeros(2, 7, 24)
    with pytest.raises(MismatchError, match="num_classes=None, y was given"):
        UNetModel(**UNET)(x, t, context=context, y=torch.tensor([1, 2]))
    labelled = UNetModel(**UNET, num_classes=3)
    with pytest.raises(MismatchError, match="num_classes=3, y was not given"):
        labelled(x, t, context=context)
    with pytest.raises(MismatchError, match=r"one label for each of 2 maps, got shape \(3,\)"):
        labelled(x, t, context=context, y=torch.tensor([0, 1, 2]))


def test_resampling_layers():
    x = keyed_input("map", (2, 32, 5, 6))
    assert Upsample(32, True, out_channels=7)(x).shape == (2, 7, 10, 12)
    assert Upsample(32, False)(x, torch.Size([9, 12])).shape == (2, 32, 9, 12)
    assert Downsample(32, True, out_channels=7)(x).shape == (2, 7, 3, 3)
    torch.testing.assert_close(Downsample(32, False)(x)[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert TransposedUpsample(32, 7)(x).shape == (2, 7, 13, 15)
    with pytest.raises(MismatchError, match=r"Upsample has 31 channels, got x with shape \(2, 32, 5, 6\)"):
        Upsample(31, False)(x)
    with pytest.raises(MismatchError, match="averaging keeps the 32 channels, but out_channels=7"):
        Downsample(32, False, out_channels=7)


def test_a_residual_block_with_use_conv_has_a_wide_shortcut():
    block = ResBlock(32, 9, 0.0, out_channels=64, use_conv=True)
    assert block.skip_connection.kernel_size == (3, 3)
    assert block(keyed_input("map", (2, 32, 5, 6)), torch.zeros(2, 9)).shape == (2, 64, 5, 6)


def test_attention_block_refuses_heads_that_do_not_divide():
    with pytest.raises(MismatchError, match="96 channels do not divide into heads of num_head_channels=36"):
        AttentionBlock(96, num_head_channels=36)


def test_attention_pool_sees_every_cell():
    pool = fill(AttentionPool2d(3, 32, 8, 5), "pool.")
    x = keyed_input("map", (2, 32, 3, 3)).requires_grad_()
    pool(x).sum().backward()
    assert pool(x).shape == (2, 5)
    assert (x.grad.abs().sum(1) > 0).all()


def test_every_parameter_gets_a_gradient():
    unet = fill(UNetModel(**UNET, num_classes=3), "u.").train()
    x, context = keyed_input("x", (2, 4, 6, 10)), keyed_input("context", (2, 7, 24))
    unet(x, torch.tensor([3, 757]), context=context, y=torch.tensor([0, 2])).square().sum().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None] == []


# --- control ---


@torch.no_grad()
def test_a_control_is_added_where_cldm_adds_it_and_its_parts_sum():
    """Against the loop of ControlNet's own UNet, which the tests' ControlledUnetModel writes out."""

    theirs = fill(ControlledUnetModel(**UNET), "control.")
    ours = fill(UNetModel(**UNET), "control.")
    asked = (
        keyed_input("control.x", (2, 4, 8, 8)),
        torch.tensor([3, 700]),
        keyed_input("control.c", (2, 7, 24)),
    )
    skips: list[torch.Tensor] = []
    ours.run_blocks(
        asked[0],
        ours._embed(*asked[:2], None),
        asked[2],
        skips,
        ours._control(None, False),
        stop=len(ours.input_blocks),
    )
    shapes = [tuple(h.shape) for h in skips] + [tuple(skips[-1].shape)]
    one, two = ([keyed_input(f"control.{n}{i}", s) for i, s in enumerate(shapes)] for n in "ab")
    for options in ({}, {"only_mid_control": True}):
        got = ours(*asked, control=one, **options)
        torch.testing.assert_close(got, theirs(*asked, control=list(one), **options), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(*asked, control=[0 * x for x in one]), ours(*asked))
    # What a shallow step takes of a control is its own blocks' part.
    whole, deep = ours(*asked, control=one, depth=1)
    assert torch.equal(ours(*asked, control=one, depth=1, deep=deep), whole)
    assert not torch.equal(ours(*asked, control=two, depth=1, deep=deep), whole)
    with pytest.raises(MismatchError, match=f"should have {len(one)} maps.* got {len(one) - 1}"):
        ours(*asked, control=one[1:])
