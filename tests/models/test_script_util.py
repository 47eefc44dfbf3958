"""OpenAI's flags: names and defaults as theirs, and the networks and processes that they make."""

import argparse
import inspect

import pytest
import torch
import torch.nn.functional as F
from keyed import fill, keyed_input

from ldm.cli import Parser
from ldm.errors import MismatchError, UsageError
from ldm.guided_diffusion import script_util
from ldm.guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    diffusion_defaults,
    diffusion_from_flags,
    flags_for,
    model_and_diffusion_defaults,
    parse_attention_resolutions,
    parse_channel_mult,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from ldm.models.diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, SuperResModel, UNetModel

# The command lines of guided-diffusion's README, beyond which it leaves the defaults.
LINE_64 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True"
)
TINY = {**model_and_diffusion_defaults(), "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2,3"}
TINY_SR = {
    **sr_model_and_diffusion_defaults(),
    "large_size": 64,
    "small_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
}
TINY_CLASSIFIER = {
    **classifier_and_diffusion_defaults(),
    "image_size": 32,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
}


def small(**changes):
    return create_model(**flags_for(create_model, {**TINY, **changes}))


def test_names_and_defaults_are_guided_diffusions():
    assert script_util.NUM_CLASSES == 1000
    diffusion = {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }
    model = {
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
    }
    classifier = {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }
    alone = {"image_size": 64, "channel_mult": "", "use_new_attention_order": False}
    assert diffusion_defaults() == diffusion
    assert classifier_defaults() == classifier
    assert classifier_and_diffusion_defaults() == classifier | diffusion
    assert model_and_diffusion_defaults() == model | alone | diffusion
    assert sr_model_and_diffusion_defaults() == model | diffusion | {"large_size": 256, "small_size": 64}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (create_model_and_diffusion, model_and_diffusion_defaults),
        (sr_create_model_and_diffusion, sr_model_and_diffusion_defaults),
        (create_classifier_and_diffusion, classifier_and_diffusion_defaults),
    ],
)
def test_the_positional_flags_are_the_defaults_own(function, defaults):
    """Scripts of others ask for them in this way, to know which flags to offer."""
    assert set(inspect.getfullargspec(function)[0]) == set(defaults())


def test_the_order_of_positional_flags_is_guided_diffusions():
    assert (
        inspect.getfullargspec(create_model)[0]
        == (
            "image_size num_channels num_res_blocks channel_mult learn_sigma class_cond use_checkpoint "
            "attention_resolutions num_heads num_head_channels num_heads_upsample use_scale_shift_norm dropout "
            "resblock_updown use_fp16 use_new_attention_order"
        ).split()
    )
    assert inspect.getfullargspec(create_classifier)[0] == [*classifier_defaults()]
    assert (
        inspect.getfullargspec(sr_create_model)[0]
        == (
            "large_size small_size num_channels num_res_blocks learn_sigma class_cond use_checkpoint "
            "attention_resolutions num_heads num_head_channels num_heads_upsample use_scale_shift_norm dropout "
            "resblock_updown use_fp16"
        ).split()
    )
    assert (
        inspect.getfullargspec(create_model_and_diffusion)[0]
        == (
            "image_size class_cond learn_sigma num_channels num_res_blocks channel_mult num_heads num_head_channels "
            "num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing use_kl "
            "predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm "
            "resblock_updown use_fp16 use_new_attention_order"
        ).split()
    )


@pytest.mark.parametrize("new_order", [False, True])
@torch.no_grad()
@pytest.mark.thinned(2)
def test_flags_build_the_unet_that_their_meaning_names(new_order):
    flags = {
        "image_size": 24,
        "num_channels": 64,
        "num_res_blocks": 2,
        "channel_mult": "0.5,1,3",
        "attention_resolutions": "24,6",
        "learn_sigma": True,
        "class_cond": True,
        "num_head_channels": 16,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "dropout": 0.3,
        "use_new_attention_order": new_order,
    }
    direct = UNetModel(
        image_size=24,
        in_channels=3,
        model_channels=64,
        out_channels=6,
        num_res_blocks=2,
        attention_resolutions=(1, 4),
        dropout=0.3,
        channel_mult=(0.5, 1, 3),
        num_classes=1000,
        num_heads=1,
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=new_order,
    )
    built, direct = fill(create_model(**flags), "u."), fill(direct, "u.")
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in direct.state_dict().items()
    }
    x, t, y = keyed_input("x", (2, 3, 12, 20)), torch.tensor([7, 811]), torch.tensor([0, 999])
    out = built(x, t, y=y)
    assert out.shape == (2, 6, 12, 20)
    assert torch.equal(out, direct(x, t, y=y))
    assert built.train().middle_block[0].out_layers[2].p == 0.3


@torch.no_grad()
def test_the_two_attention_orders_are_one_function_of_permuted_weights():
    """Legacy weights lie as (heads, q k v, width), new ones as (q k v, heads, width)."""
    old, new = fill(small(num_heads=4), "u."), small(num_heads=4, use_new_attention_order=True).eval()
    state = {}
    for name, value in old.state_dict().items():
        if ".qkv." in name:
            value = value.reshape(4, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        state[name] = value
    x, t = keyed_input("x", (2, 3, 16, 24)), torch.tensor([7, 811])
    new.load_state_dict(old.state_dict())
    assert (new(x, t) - old(x, t)).abs().max() > 1e-3
    new.load_state_dict(state)
    torch.testing.assert_close(new(x, t), old(x, t), rtol=0, atol=2e-5)


def test_flags_of_the_machine_reach_the_networks():
    with torch.device("meta"):
        model = small(use_checkpoint=True, use_fp16=True)
        classifier = create_classifier(
            **{**flags_for(create_classifier, TINY_CLASSIFIER), "classifier_use_fp16": True}
        )
    assert model.middle_block[0].use_checkpoint and model.middle_block[1].use_checkpoint
    assert model.dtype == classifier.dtype == torch.float16
    assert small().dtype == torch.float32 and not small().middle_block[0].use_checkpoint


def test_heads_follow_their_three_flags():
    def heads(model, part):
        return {
            m.num_heads
            for m in getattr(model, part).modules()
            if hasattr(m, "num_head_channels") or hasattr(m, "qkv")
        }

    model = small(num_heads=2, num_heads_upsample=8)
    assert (heads(model, "input_blocks"), heads(model, "middle_block"), heads(model, "output_blocks")) == (
        {2},
        {2},
        {8},
    )
    model = small(num_heads=2, num_heads_upsample=8, num_head_channels=16, attention_resolutions="64,16")
    assert heads(model, "input_blocks") == heads(model, "output_blocks") == {2, 6}


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (512, [32, 64, 64, 128, 128, 256, 256]),
        (256, [64, 64, 128, 128, 256, 256]),
        (128, [64, 64, 128, 192, 256]),
        (64, [64, 128, 192, 256]),
        (32, [64, 128, 128, 128]),
    ],
)
def test_the_size_chooses_the_widths(size, widths):
    with torch.device("meta"):
        model = create_model(size, 64, 1, attention_resolutions="16")
        classifier = create_classifier(
            **{**classifier_defaults(), "image_size": size, "classifier_width": 64, "classifier_depth": 1}
        )
    for network in (model, classifier):
        blocks = [block[0] for block in network.input_blocks][1::2]
        assert [block.out_channels for block in blocks] == widths
    assert model.input_blocks[0][0].out_channels == model.out[2].in_channels == widths[0]
    attending = [2 ** (i // 2) for i, block in enumerate(model.input_blocks) if len(block) == 2]
    assert attending == [factor for factor in [size // 16] if factor < 2 ** len(widths)]


@pytest.mark.parametrize(
    ("size", "widths"),
    [(512, [32, 32, 64, 64, 128, 128]), (256, [32, 32, 64, 64, 128, 128]), (64, [32, 64, 96, 128])],
)
def test_the_large_size_chooses_the_widths_of_an_upsampler(size, widths):
    with torch.device("meta"):
        model = sr_create_model(**flags_for(sr_create_model, {**TINY_SR, "large_size": size}))
    assert [block[0].out_channels for block in model.input_blocks][1::2] == widths
    assert model.input_blocks[0][0].in_channels == model.in_channels == 6


def test_flags_that_are_texts_are_read():
    assert parse_channel_mult("1,2.0, 0.5,4", 100) == (1, 2, 0.5, 4)
    assert [type(m) for m in parse_channel_mult("2.0,0.5", 100)] == [int, float]
    assert parse_channel_mult("", 512) == (0.5, 1, 1, 2, 2, 4, 4)
    assert parse_attention_resolutions("32,16, 8", 64) == (2, 4, 8)
    assert parse_attention_resolutions("", 64) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_size": 100, "channel_mult": ""},
            "size 100 has no usual channel_mult .32, 64, 128, 256, 512 have",
        ),
        (
            {"channel_mult": "1,zwei"},
            "channel_mult should be numbers above 0, .*such as '1,2,3,4', got '1,zwei'",
        ),
        ({"channel_mult": "1,-2"}, "got '1,-2'"),
        ({"channel_mult": "1,inf"}, "got '1,inf'"),
        ({"attention_resolutions": "16,7"}, "each a divisor of 64, got '16,7'"),
        ({"attention_resolutions": "16;8"}, "got '16;8'"),
        ({"attention_resolutions": "0"}, "got '0'"),
        ({"channel_mult": "1,1e9"}, "numbers above 0, at most 1024 and 16 of them, .* got '1,1e9'"),
        ({"channel_mult": ",".join(["1"] * 17)}, "at most 1024 and 16 of them"),
        ({"attention_resolutions": "1" * 5000}, "got '1111"),
        ({"num_channels": 48}, "48 channels times 1 make a level of 48; every level needs a multiple of 32"),
        ({"channel_mult": "1,0.4"}, "32 channels times 0.4 make a level of 12"),
        ({"num_channels": 0}, "num_channels should be a whole number from 1 to 65536, got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks should be a whole number from 1 to 256, got 0"),
        (
            {"image_size": -64, "attention_resolutions": ""},
            "image_size should be a whole number from 1 to 65536, got -64",
        ),
        ({"num_heads": 5}, "96 channels do not divide into num_heads=5 heads"),
        ({"num_heads": 0}, "num_heads should be at least 1, or -1 for the other to decide; got 0"),
        ({"num_heads_upsample": 0}, "96 channels do not divide into num_heads=0 heads"),
        ({"num_head_channels": 40}, "96 channels do not divide into heads of num_head_channels=40"),
        ({"num_head_channels": 0}, "num_head_channels should be at least 1, .* got 0"),
        ({"num_classes": 10}, "num_classes=10 needs class_cond=True"),
        ({"class_cond": "False"}, "class_cond should be true or false, got 'False'"),
        ({"num_channels": "128"}, "num_channels should be a whole number from 1 to 65536, got '128'"),
        ({"num_res_blocks": 1.5}, "num_res_blocks should be a whole number from 1 to 256, got 1.5"),
        ({"dropout": "0.1"}, "dropout should be a number from 0 to 1, got '0.1'"),
        ({"channel_mult": (1, 2)}, r"channel_mult should be a text, got \(1, 2\)"),
    ],
)
def test_impossible_flags_are_refused_with_their_numbers(change, message):
    with pytest.raises((UsageError, MismatchError), match=message):
        small(**change)


@pytest.mark.parametrize(
    ("function", "flags", "wrong", "right"),
    [
        (create_model, TINY, "num_chanels", "num_channels"),
        (create_model_and_diffusion, TINY, "noise_shedule", "noise_schedule"),
        (sr_create_model, TINY_SR, "large_sise", "large_size"),
        (sr_create_model_and_diffusion, TINY_SR, "learn_sigmas", "learn_sigma"),
        (create_classifier, TINY_CLASSIFIER, "classifier_deepth", "classifier_depth"),
        (create_classifier_and_diffusion, TINY_CLASSIFIER, "classifer_pool", "classifier_pool"),
        (create_gaussian_diffusion, {}, "predict_xstrat", "predict_xstart"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_right_one(function, flags, wrong, right):
    message = f"{function.__name__} has no flag '{wrong}'; did you mean '{right}'"
    with pytest.raises(UsageError, match=message):
        function(**flags_for(function, flags), **{wrong: 1})


def test_an_unknown_flag_is_told_what_there_is_and_a_missing_one_is_named():
    with pytest.raises(
        UsageError, match="create_model has no flag 'xyzzy'; it has image_size, num_channels, "
    ):
        create_model(64, 32, 1, xyzzy=3)
    with pytest.raises(UsageError, match="create_classifier lacks classifier_depth, classifier_attention"):
        create_classifier(64, False, 64, classifier_pool="adaptive")
    with pytest.raises(TypeError, match="multiple values for argument 'image_size'"):
        create_model(64, 32, 1, image_size=64)


def test_the_number_of_classes_is_imagenets_unless_said_or_rebound(monkeypatch):
    def classes():
        return small(class_cond=True).num_classes, create_classifier(
            **flags_for(create_classifier, TINY_CLASSIFIER)
        ).out_channels

    with torch.device("meta"):
        assert classes() == (1000, 1000)
        assert small(class_cond=True, num_classes=7).label_emb.num_embeddings == 7
        assert small(class_cond=False).num_classes is None
        monkeypatch.setattr(script_util, "NUM_CLASSES", 10)
        assert classes() == (10, 10)


def test_a_readmes_command_line_gives_its_model():
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, {**model_and_diffusion_defaults(), "model_path": "", "note": None})
    args = parser.parse_args([*LINE_64.split(), "--note", "x"])
    assert args.note == "x" and args.model_path == ""
    flags = args_to_dict(args, model_and_diffusion_defaults())
    assert flags == {
        **model_and_diffusion_defaults(),
        "attention_resolutions": "32,16,8",
        "class_cond": True,
        "dropout": 0.1,
        "learn_sigma": True,
        "noise_schedule": "cosine",
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "use_fp16": True,
    }
    with torch.device("meta"):
        model, diffusion = create_model_and_diffusion(**flags)
    assert sum(p.numel() for p in model.parameters()) == 295_904_454
    assert model.dtype == torch.float16
    assert diffusion.model_var_type is ModelVarType.LEARNED_RANGE


def test_the_scripts_parser_answers_a_misspelt_option_with_the_right_one():
    parser = Parser(prog="image_sample.py")
    add_dict_to_argparser(parser, model_and_diffusion_defaults())
    with pytest.raises(UsageError, match="unknown option '--num_chanels'; did you mean '--num_channels'"):
        parser.parse_args(["--num_chanels", "64"])
    with pytest.raises(UsageError, match="class_cond: wanted true or false, got 'maybe'"):
        parser.parse_args(["--class_cond", "maybe"])
    args = parser.parse_args(["--class_cond", "yes"])
    assert args.class_cond is True
    with pytest.raises(UsageError, match="no flag 'class_cnd'; did you mean 'class_cond'"):
        args_to_dict(args, ["dropout", "class_cnd"])


@pytest.mark.parametrize(
    ("word", "meaning"),
    [("yes", True), ("TRUE", True), ("t", True), ("Y", True), ("1", True), (True, True)]
    + [("no", False), ("False", False), ("F", False), ("n", False), ("0", False), (False, False)],
)
def test_words_for_true_and_false(word, meaning):
    assert str2bool(word) is meaning


def test_other_words_are_neither_true_nor_false():
    with pytest.raises(argparse.ArgumentTypeError, match="wanted true or false, got 'on'"):
        str2bool("on")


# The networks


@torch.no_grad()
def test_an_upsampler_is_a_unet_that_sees_the_enlarged_small_picture():
    flags = {**TINY_SR, "class_cond": True, "learn_sigma": True}
    upsampler = fill(sr_create_model(**flags_for(sr_create_model, flags)), "u.")
    assert isinstance(upsampler, SuperResModel)
    plain = UNetModel(
        64,
        6,
        32,
        6,
        1,
        (4, 8),
        channel_mult=(1, 2, 3, 4),
        num_classes=1000,
        num_heads=4,
        use_scale_shift_norm=True,
    )
    fill(plain, "u.")
    x, t, y = keyed_input("x", (2, 3, 16, 24)), torch.tensor([7, 811]), torch.tensor([3, 5])
    low = keyed_input("low", (2, 3, 5, 7))
    enlarged = F.interpolate(low, (16, 24), mode="bilinear", align_corners=False)
    out = upsampler(x, t, low_res=low, y=y)
    assert torch.equal(out, plain(torch.cat([x, enlarged], dim=1), t, y=y))
    assert torch.equal(out, upsampler(x, t, low, y=y))


def test_an_upsampler_names_a_small_picture_that_does_not_fit():
    upsampler = SuperResModel(
        64,
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1,),
        num_heads=1,
    )
    x, t = torch.zeros(2, 3, 16, 24), torch.tensor([1, 2])
    with pytest.raises(
        MismatchError, match=r"low_res should be 2 small pictures of 3 channels.*none was given"
    ):
        upsampler(x, t)
    with pytest.raises(MismatchError, match=r"2 small pictures of 3 channels.*got shape \(5, 3, 4, 4\)"):
        upsampler(x, t, low_res=torch.zeros(5, 3, 4, 4))
    with pytest.raises(MismatchError, match=r"the model 6 input channels; got shape \(2, 1, 4, 4\)"):
        upsampler(x, t, low_res=torch.zeros(2, 1, 4, 4))


def test_labels_that_the_model_does_not_have_are_named():
    model, x, t = small(class_cond=True, num_classes=10), torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])
    with pytest.raises(UsageError, match=r"labels must be from 0 to 9, got \[3, 10\]"):
        model(x, t, y=torch.tensor([3, 10]))
    with pytest.raises(UsageError, match=r"from 0 to 9, got \[-1, 12\]"):
        model(x, t, y=torch.tensor([-1, 12]))
    with pytest.raises(UsageError, match="whole numbers from 0 to 9, got torch.float32"):
        model(x, t, y=torch.tensor([1.0, 2.0]))
    with pytest.raises(MismatchError, match=r"one label for each of 2 maps, got shape \(2, 1\)"):
        model(x, t, y=torch.tensor([[1], [2]]))
    with pytest.raises(MismatchError, match="num_classes=10, y was not given"):
        model(x, t)
    assert model(x, t, y=torch.tensor([0, 9])).shape == x.shape


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@torch.no_grad()
@pytest.mark.thinned(2)
def test_a_classifier_is_the_encoder_unet_that_its_flags_name(pool):
    flags = {**TINY_CLASSIFIER, "classifier_pool": pool}
    built = fill(create_classifier(**flags_for(create_classifier, flags)), "c.")
    direct = EncoderUNetModel(
        image_size=32,
        in_channels=3,
        model_channels=64,
        out_channels=1000,
        num_res_blocks=1,
        attention_resolutions=(4,),
        channel_mult=(1, 2, 2, 2),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        pool=pool,
    )
    x, t = keyed_input("x", (2, 3, 32, 32)), torch.tensor([7, 811])
    out = built(x, t)
    assert out.shape == (2, 1000)
    assert torch.equal(out, fill(direct, "c.")(x, t))


def test_a_classifier_with_attention_names_a_picture_of_another_size():
    classifier = create_classifier(**flags_for(create_classifier, TINY_CLASSIFIER))
    with pytest.raises(MismatchError, match="made for 16 cells, got a map of 8 x 4"):
        classifier(torch.zeros(1, 3, 64, 32), torch.tensor([3]))


# The processes


@pytest.mark.parametrize(
    ("flags", "mean", "variance", "loss"),
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"sigma_small": True, "predict_xstart": True}, "START_X", "FIXED_SMALL", "MSE"),
        ({"learn_sigma": True, "sigma_small": True}, "EPSILON", "LEARNED_RANGE", "MSE"),
        ({"rescale_learned_sigmas": True, "learn_sigma": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
        ({"rescale_learned_sigmas": True, "use_kl": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_flags_choose_what_is_predicted_and_trained(flags, mean, variance, loss):
    diffusion = create_gaussian_diffusion(steps=37, **flags)
    assert diffusion.model_mean_type is ModelMeanType[mean]
    assert diffusion.model_var_type is ModelVarType[variance]
    assert diffusion.loss_type is LossType[loss]
    assert diffusion.rescale_timesteps is False
    assert diffusion.num_timesteps == 37


def test_flags_choose_schedule_and_respacing():
    diffusion = create_gaussian_diffusion(steps=50, timestep_respacing="ddim5", rescale_timesteps=True)
    assert diffusion.timestep_map == [0, 10, 20, 30, 40] and diffusion.rescale_timesteps is True
    linear = create_gaussian_diffusion(steps=50)
    cosine = create_gaussian_diffusion(steps=50, noise_schedule="cosine", timestep_respacing=[50])
    assert linear.betas[[0, -1]] == pytest.approx([0.002, 0.4], rel=1e-12)
    assert cosine.betas[-1] == 0.999 and cosine.num_timesteps == 50
    with pytest.raises(UsageError, match="'quadratic'"):
        create_gaussian_diffusion(noise_schedule="quadratic")
    with pytest.raises(UsageError, match="noise_schedule should be a text, got 3"):
        create_gaussian_diffusion(noise_schedule=3)


@pytest.mark.parametrize(
    ("create", "flags", "kind"),
    [
        (create_model_and_diffusion, TINY, UNetModel),
        (sr_create_model_and_diffusion, TINY_SR, SuperResModel),
        (create_classifier_and_diffusion, TINY_CLASSIFIER, EncoderUNetModel),
    ],
)
def test_every_diffusion_flag_reaches_the_process(create, flags, kind):
    flags = {
        **flags,
        "learn_sigma": True,
        "diffusion_steps": 60,
        "noise_schedule": "cosine",
        "timestep_respacing": "4,2",
        "use_kl": True,
        "predict_xstart": True,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
    }
    with torch.device("meta"):
        model, diffusion = create(**flags)
    assert type(model) is kind
    assert diffusion.original_num_steps == 60 and diffusion.num_timesteps == 6
    assert diffusion.timestep_map == [0, 10, 19, 29, 30, 59]
    assert diffusion.model_mean_type is ModelMeanType.START_X
    assert diffusion.model_var_type is ModelVarType.LEARNED_RANGE
    assert diffusion.loss_type is LossType.RESCALED_KL
    assert diffusion.rescale_timesteps is True
    same = diffusion_from_flags(flags)
    assert same.betas.tolist() == diffusion.betas.tolist() and same.timestep_map == diffusion.timestep_map


def test_small_variances_are_a_flag_of_improved_diffusion():
    with torch.device("meta"):
        _, diffusion = create_model_and_diffusion(**TINY, sigma_small=True)
        _, improved = create_model_and_diffusion(**{**TINY, **script_util.IMPROVED_DIFFUSION})
    assert diffusion.model_var_type is ModelVarType.FIXED_SMALL
    assert improved.rescale_timesteps is True and improved.loss_type is LossType.RESCALED_MSE


@torch.no_grad()
def test_a_new_model_and_its_process_only_rescale_the_noise():
    """A new UNet says eps = 0, so that every DDIM step keeps pred_x0 = x_T / sqrt(alpha_bar_T)."""
    model, diffusion = create_model_and_diffusion(
        **{**TINY, "class_cond": True, "timestep_respacing": "ddim5"}
    )
    noise = keyed_input("noise", (2, 3, 8, 12))
    out = diffusion.ddim_sample_loop(
        model.eval(),
        noise.shape,
        noise=noise,
        clip_denoised=False,
        model_kwargs={"y": torch.tensor([1, 999])},
    )
    want = noise / float(diffusion.alphas_cumprod[-1]) ** 0.5
    torch.testing.assert_close(out, want, rtol=1e-5, atol=0)
