"""OpenAI's files: their layouts read back into flags, every tensor accounted for, and the published sizes."""

import random
import re
from pathlib import Path

import pytest
import torch
from keyed import fill, keyed_input

from ldm.checkpoints import save_safetensors
from ldm.checkpoints.report import TensorInfo
from ldm.errors import MismatchError, NumericError, UnsafeFileError, UsageError
from ldm.guided_diffusion import script_util
from ldm.guided_diffusion.files import (
    CLASSIFIER,
    MODEL,
    PUBLISHED,
    SUPER_RESOLUTION,
    infer_flags,
    load_openai_model,
    settle_flags,
)
from ldm.guided_diffusion.script_util import diffusion_from_flags, flags_for
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, SuperResModel, UNetModel

GUIDE = Path(__file__).parents[2] / "docs" / "openai-models.md"
KINDS = {"model": MODEL, "upsampler": SUPER_RESOLUTION, "classifier": CLASSIFIER}
# Tiny networks in the layouts of what OpenAI published: kind, flags beyond the defaults.
LAYOUTS = {
    "improved": ("model", {"num_channels": 32, "num_res_blocks": 1}),
    "improved-cifar": (
        "model",
        {"image_size": 32, "num_channels": 32, "num_res_blocks": 3, "learn_sigma": True, "num_heads": 2},
    ),
    "improved-lsun": (
        "model",
        {
            "image_size": 64,
            "num_channels": 32,
            "num_heads": 1,
            "use_scale_shift_norm": False,
            "attention_resolutions": "16",
        },
    ),
    "adm": (
        "model",
        {
            "attention_resolutions": "32,16,8",
            "class_cond": True,
            "learn_sigma": True,
            "num_channels": 32,
            "num_head_channels": 16,
            "num_res_blocks": 2,
            "resblock_updown": True,
            "use_new_attention_order": True,
        },
    ),
    "adm-fractional": (
        "model",
        {
            "image_size": 24,
            "channel_mult": "0.5,1,1.5",
            "attention_resolutions": "12",
            "class_cond": True,
            "num_classes": 7,
            "learn_sigma": True,
            "num_channels": 64,
            "num_head_channels": 32,
            "num_res_blocks": 1,
            "resblock_updown": True,
        },
    ),
    "upsampler": (
        "upsampler",
        {
            "large_size": 64,
            "small_size": 16,
            "class_cond": True,
            "learn_sigma": True,
            "num_channels": 32,
            "num_res_blocks": 1,
            "resblock_updown": True,
        },
    ),
    "classifier-attention": (
        "classifier",
        {
            "image_size": 32,
            "classifier_width": 64,
            "classifier_depth": 2,
            "classifier_attention_resolutions": "16,4",
        },
    ),
    "classifier-spatial": (
        "classifier",
        {
            "classifier_width": 64,
            "classifier_depth": 1,
            "classifier_pool": "spatial_v2",
            "classifier_resblock_updown": False,
            "num_classes": 5,
        },
    ),
}


def full(kind, flags):
    return {**KINDS[kind].defaults(), **flags}


def build(kind, flags):
    return KINDS[kind].create(**flags_for(KINDS[kind].create, full(kind, flags)))


def infos_of(model):
    return {name: TensorInfo(tuple(v.shape), v.dtype) for name, v in model.state_dict().items()}


def build_empty(kind, flags):
    with torch.device("meta"):
        return build(kind, flags)


def call(model, height=32):
    x, t = keyed_input("x", (2, 3, height, 32)), torch.tensor([7, 811])
    if isinstance(model, EncoderUNetModel):
        return model(x, t)
    more = {"y": torch.tensor([1, 4])} if model.num_classes else {}
    if isinstance(model, SuperResModel):
        more["low_res"] = keyed_input("low", (2, 3, 5, 7))
    return model(x, t, **more)


@pytest.fixture(scope="module")
def improved(tmp_path_factory):
    """A tiny model of improved-diffusion's layout, and the file of its weights."""
    model = fill(build(*LAYOUTS["improved"]), "o.")
    path = tmp_path_factory.mktemp("improved") / "model000007.pt"
    torch.save(model.state_dict(), path)
    return model, path


def saved(folder, tensors, name="model.pt"):
    torch.save(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
@pytest.mark.thinned(2)
def test_a_file_gives_the_flags_and_the_model_that_it_was_saved_from(name, tmp_path):
    kind, flags = LAYOUTS[name]
    model = fill(build(kind, flags), "o.")
    path = saved(tmp_path, model.state_dict())
    unseen = {
        k: v for k, v in flags.items() if k in ("num_heads", "num_head_channels", "use_new_attention_order")
    }
    unseen |= {k: flags[k] for k in ("small_size",) if k in flags}
    if name == "adm-fractional":
        unseen["image_size"] = 24  # its widths are no size's own
    loaded, found, report = load_openai_model(path, **unseen)
    assert found == full(kind, flags)
    assert type(loaded) is type(model) and not loaded.training
    assert report.family == KINDS[kind].name
    assert report.assigned == {key: key for key in model.state_dict()} and report.ignored == {}
    assert torch.equal(call(loaded), call(model))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def random_flags(draw):
    """Draw flags that OpenAI's scripts would accept, and what no tensor of theirs shows."""
    kind = draw.choice([*KINDS])
    size = draw.choice([64, 256] if kind == "upsampler" else [32, 64, 128])
    sides = [str(size // 2**i) for i in range(4) if draw.random() < 0.5]
    updown, norm, depth = draw.random() < 0.5, draw.random() < 0.5, draw.randint(1, 3)
    if kind == "classifier":
        flags = {
            "image_size": size,
            "classifier_width": 64,
            "classifier_depth": depth,
            "classifier_attention_resolutions": ",".join(sides),
            "classifier_use_scale_shift_norm": norm,
            "classifier_resblock_updown": updown,
            "classifier_pool": draw.choice(["attention", "adaptive", "spatial", "spatial_v2"]),
        }
        return kind, flags, {}
    flags = {
        "large_size" if kind == "upsampler" else "image_size": size,
        "num_channels": draw.choice([32, 64]),
        "num_res_blocks": depth,
        "attention_resolutions": ",".join(sides),
        "use_scale_shift_norm": norm,
        "resblock_updown": updown,
        "class_cond": draw.random() < 0.5,
        "learn_sigma": draw.random() < 0.5,
    }
    if draw.random() < 0.3:
        flags["channel_mult"] = draw.choice(
            ["1,2", "1,3,2", "2"] + ["0.5,1.5"] * (flags["num_channels"] == 64)
        )
        flags["attention_resolutions"] = ",".join(sides[:1])
        if flags["channel_mult"] == "2":
            flags["resblock_updown"] = False  # there is nothing to resample
        return kind, flags, {"large_size" if kind == "upsampler" else "image_size": size}
    return kind, flags, {"large_size": size} if kind == "upsampler" else {}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.thinned(5)
def test_flags_come_back_from_the_shapes_that_they_make(seed):
    kind, flags, given = random_flags(random.Random(seed))
    model = build_empty(kind, flags)
    found_kind, found, _ = settle_flags("a file", infos_of(model), given)
    assert found_kind is KINDS[kind]
    again = build_empty(kind, found)
    assert infos_of(again) == infos_of(model)
    factors = [w for w in ("attention_resolutions", "classifier_attention_resolutions") if w in found]
    want = {**full(kind, flags)}
    for name in factors:  # a side that no level has makes no difference
        reached = [side for side in want[name].split(",") if side in found[name].split(",")]
        want[name] = ",".join(reached) if found[name] else ""
    assert {k: v for k, v in found.items() if want[k] != v} == {}


@pytest.mark.slow
def test_published_models_have_their_sizes_and_are_known_by_their_shapes():
    """Parameters as computed from the flags of OpenAI's READMEs; the rounded ones in its files' names agree."""
    parameters = {
        "64x64_diffusion": 295_904_454,
        "128x128_diffusion": 421_529_606,
        "256x256_diffusion": 553_838_086,
        "256x256_diffusion_uncond": 552_814_086,
        "512x512_diffusion": 558_997_638,
        "lsun_bedroom": 552_814_086,
        "64_256_upsampler": 311_795_910,
        "128_512_upsampler": 308_835_270,
        "imagenet64_uncond_100M_1500K": 121_063_942,
        "imagenet64_uncond_vlb_100M_1500K": 121_063_942,
        "imagenet64_cond_270M_250K": 273_049_350,
        "cifar10_uncond_50M_500K": 52_546_438,
        "cifar10_uncond_vlb_50M_500K": 52_546_438,
        "upsample_cond_500K": 279_792_390,
        "lsun_uncond_100M": 113_676_678,
    }
    guide = GUIDE.read_text(encoding="utf-8")
    only_for_training = ("dropout", "use_kl", "rescale_learned_sigmas")
    for name, own in PUBLISHED.items():
        kind = "upsampler" if "large_size" in own else "model"
        model = build_empty(kind, own)
        assert sum(p.numel() for p in model.parameters()) == parameters[name], name
        assert f"| {parameters[name]:,} |" in guide
        found_kind, found, notes = settle_flags(name, infos_of(model), {})
        want = full(kind, own)
        assert {
            k: (v, want[k]) for k, v in found.items() if v != want[k] and k not in only_for_training
        } == {}
        assert found_kind is KINDS[kind] and found.keys() == want.keys()
        assert len(notes) == 1 and name in notes[0]
    assert parameters.keys() == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("size", "depth", "parameters"),
    [(64, 4, 65_438_568), (128, 2, 42_568_040), (256, 2, 54_096_360), (512, 2, 54_448_360)],
)
def test_published_classifiers_show_all_their_flags(size, depth, parameters):
    flags = {"image_size": size, "classifier_depth": depth}
    model = build_empty("classifier", flags)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert settle_flags("c", infos_of(model), {}) == (CLASSIFIER, full("classifier", flags), [])


def test_the_256_pixel_model_has_the_published_names():
    """Written down from the original's construction: 18 blocks down, 3 in the middle, 18 up."""
    shapes = {
        n: list(i.shape) for n, i in infos_of(build_empty("model", PUBLISHED["256x256_diffusion"])).items()
    }
    modules = {name.rpartition(".")[0] for name in shapes}
    attention = {f"input_blocks.{i}.1" for i in (10, 11, 13, 14, 16, 17)} | {"middle_block.1"}
    attention |= {f"output_blocks.{i}.1" for i in range(9)}
    halving = {f"input_blocks.{i}.0" for i in (3, 6, 9, 12, 15)}
    doubling = {f"output_blocks.{i}.2" for i in (2, 5, 8)} | {f"output_blocks.{i}.1" for i in (11, 14)}
    ordinary = {f"input_blocks.{i}.0" for i in range(1, 18)} - halving
    ordinary |= {f"output_blocks.{i}.0" for i in range(18)} | {"middle_block.0", "middle_block.2"}
    widening = {f"input_blocks.{i}.0" for i in (7, 13)} | {f"output_blocks.{i}.0" for i in range(18)}
    want = {"time_embed.0", "time_embed.2", "label_emb", "input_blocks.0.0", "out.0", "out.2"}
    want |= {f"{block}.{part}" for block in attention for part in ("norm", "qkv", "proj_out")}
    for block in ordinary | halving | doubling:
        want |= {f"{block}.{part}" for part in ("in_layers.0", "in_layers.2", "emb_layers.1")}
        want |= {f"{block}.{part}" for part in ("out_layers.0", "out_layers.3")}
    want |= {f"{block}.skip_connection" for block in widening}
    assert modules == want
    assert len(shapes) == 567
    assert shapes["label_emb.weight"] == [1000, 1024]
    assert shapes["time_embed.0.weight"] == [1024, 256]
    assert shapes["input_blocks.7.0.skip_connection.weight"] == [512, 256, 1, 1]
    assert shapes["input_blocks.10.1.qkv.weight"] == [1536, 512, 1]
    assert shapes["middle_block.1.proj_out.weight"] == [1024, 1024, 1]
    assert shapes["output_blocks.8.2.emb_layers.1.weight"] == [1024, 1024]
    assert shapes["output_blocks.17.0.in_layers.2.weight"] == [256, 512, 3, 3]
    assert shapes["out.2.weight"] == [6, 256, 3, 3]


# Files


@torch.no_grad()
@pytest.mark.thinned(2)
def test_every_kind_of_file_gives_the_same_weights(improved, tmp_path):
    model, path = improved
    tensors = model.state_dict()
    save_safetensors(tmp_path / "a.safetensors", {n: v.contiguous() for n, v in tensors.items()})
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": tensors, "step": 7}, tmp_path / "wrapped.pt")
    for other in (path, tmp_path / "a.safetensors", tmp_path / "legacy.pt", tmp_path / "wrapped.pt"):
        loaded, _, report = load_openai_model(other)
        assert len(report.assigned) == report.total == len(tensors)
        assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())


@torch.no_grad()
@pytest.mark.slow
def test_half_precision_files_become_single_and_single_ones_half_as_asked(improved, tmp_path):
    model, path = improved
    halves = {name: value.half() for name, value in model.state_dict().items()}
    loaded, _, _ = load_openai_model(saved(tmp_path, halves))
    assert all(torch.equal(v, halves[n].float()) for n, v in loaded.state_dict().items())
    assert loaded.input_blocks[0][0].weight.dtype == torch.float32
    brain, _, _ = load_openai_model(path, dtype=torch.bfloat16)
    assert {value.dtype for value in brain.state_dict().values()} == {torch.bfloat16}

    mixed, flags, _ = load_openai_model(path, use_fp16=True)
    assert flags["use_fp16"] is True and mixed.dtype == torch.float16
    assert mixed.output_blocks[0][0].in_layers[2].weight.dtype == torch.float16
    assert mixed.time_embed[0].weight.dtype == mixed.out[2].weight.dtype == torch.float32
    single = call(model)
    assert call(mixed).dtype == torch.float32
    torch.testing.assert_close(call(mixed), single, rtol=0, atol=0.03 * single.abs().max().item())


def test_weights_that_are_not_numbers_or_too_large_are_named(improved, tmp_path):
    tensors = dict(improved[0].state_dict())
    tensors["middle_block.0.in_layers.2.bias"] = tensors["middle_block.0.in_layers.2.bias"] + 7e4
    path = saved(tmp_path, tensors)
    load_openai_model(path)
    with pytest.raises(
        NumericError, match=r"'middle_block.0.in_layers.2.bias' reaches 7e\+04, too large for float16"
    ):
        load_openai_model(path, use_fp16=True)
    tensors["middle_block.0.in_layers.2.bias"] = torch.full_like(
        tensors["middle_block.0.in_layers.2.bias"], torch.nan
    )
    with pytest.raises(
        NumericError, match="'middle_block.0.in_layers.2.bias' holds values that are not finite"
    ):
        load_openai_model(saved(tmp_path, tensors))


def test_a_profilers_counts_are_left_out_and_everything_else_is_an_error(improved, tmp_path):
    tensors = dict(improved[0].state_dict())
    counts = {f"{part}total_ops": torch.zeros(1) for part in ("", "out.", "input_blocks.1.0.")}
    _, _, report = load_openai_model(saved(tmp_path, {**tensors, **counts}))
    assert report.ignored == {name: "a profiler's count of operations" for name in counts}
    assert len(report.assigned) == len(tensors)

    more = {**tensors, "out.5.weight": torch.zeros(2)}
    with pytest.raises(MismatchError, match="1 of the file's .* not expected .'out.5.weight'"):
        load_openai_model(saved(tmp_path, more))
    fewer = {n: v for n, v in tensors.items() if not n.startswith("middle_block.1.")}
    with pytest.raises(
        MismatchError, match="6 of the model's .* missing .'middle_block.1.norm.weight', .* and 3 more"
    ):
        load_openai_model(saved(tmp_path, fewer))
    other = {**tensors, "out.0.weight": torch.zeros(31)}
    with pytest.raises(MismatchError, match=r"'out.0.weight' \[31\] instead of \[32\]"):
        load_openai_model(saved(tmp_path, other))


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    with pytest.raises(UnsafeFileError, match="builtins.exec"):
        load_openai_model(saved(tmp_path, {"input_blocks.0.0.weight": Evil()}))


# Flags beside a file


def test_what_no_tensor_shows_is_the_callers_or_said_in_the_notes(improved):
    _, path = improved
    model, flags, report = load_openai_model(path)
    assert flags["num_heads"] == 4 and model.middle_block[1].num_heads == 4
    assert report.notes == [
        "num_heads=4: the original's default; no tensor shows it, so give it if the model was trained otherwise"
    ]
    assert report.notes[0] in report.summary()
    model, flags, report = load_openai_model(path, num_head_channels=16, dropout=0.2, noise_schedule="cosine")
    assert model.middle_block[1].num_heads == 8 and report.notes == []
    assert (flags["dropout"], flags["num_res_blocks"]) == (0.2, 1)
    cosine = diffusion_from_flags({**flags, "diffusion_steps": 20})
    assert cosine.betas[-1] == 0.999 and cosine.num_timesteps == 20


def test_flags_of_a_published_model_yield_to_the_callers():
    infos = infos_of(build_empty("model", PUBLISHED["64x64_diffusion"]))
    _, flags, notes = settle_flags("f", infos, {"num_heads": 2, "noise_schedule": "linear"})
    assert (flags["num_heads"], flags["num_head_channels"]) == (2, -1)
    assert (flags["noise_schedule"], flags["use_new_attention_order"]) == ("linear", True)
    assert notes == [
        "use_new_attention_order=True: taken from OpenAI's 64x64_diffusion, which has this layout; no tensor shows it"
    ]


def test_an_upsamplers_flags_are_not_those_of_a_model_with_its_widths():
    """The layout of upsample_cond_500K, but for 64 pixels and three channels in."""
    infos = infos_of(build_empty("model", {"num_channels": 192, "class_cond": True, "learn_sigma": True}))
    _, flags, notes = settle_flags("f", infos, {})
    assert flags["diffusion_steps"] == 1000 and flags["image_size"] == 64
    assert notes[0].startswith("num_heads=4: the original's default")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_channels": 64}, "contradicts the flags: num_channels is 32 there, not 64; leave out"),
        ({"num_res_blocks": 2}, "num_res_blocks is 1 there, not 2"),
        ({"channel_mult": "1,2,4,8"}, "channel_mult is '1,2,3,4' there, not '1,2,4,8'"),
        ({"image_size": 128, "channel_mult": ""}, "channel_mult is '1,2,3,4' there, not '1,1,2,3,4'"),
        ({"attention_resolutions": "32,16"}, "attention_resolutions is '16,8' there, not '32,16'"),
        ({"image_size": 32, "attention_resolutions": "16"}, "attention_resolutions is '8,4' there, not '16'"),
        ({"class_cond": True}, "num_classes is None there, not 1000; class_cond is False there, not True"),
        ({"learn_sigma": True}, "learn_sigma is False there, not True"),
        (
            {"use_scale_shift_norm": False, "resblock_updown": True},
            "norm is True .* False; resblock_updown is False",
        ),
    ],
)
def test_flags_that_contradict_the_file_are_told_with_both_values(improved, given, message):
    with pytest.raises(MismatchError, match=message):
        load_openai_model(improved[1], **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_head": 2}, "an OpenAI pixel model has no flag 'num_head'; did you mean 'num_heads'"),
        ({"large_size": 64}, "an OpenAI pixel model has no flag 'large_size'; did you mean 'image_size'"),
        ({"class_cond": "no"}, "class_cond should be true or false, got 'no'"),
        ({"num_heads": 5}, "96 channels do not divide into num_heads=5 heads"),
        ({"image_size": 0}, "image_size should be a whole number from 1 to .* got 0"),
        ({"dtype": torch.int8}, "dtype should be one of .* got torch.int8"),
        ({"device": "cuda:93"}, "device 'cuda:93' is not available; have: cpu"),
    ],
)
def test_impossible_flags_are_refused(improved, given, message):
    with pytest.raises((UsageError, MismatchError), match=message):
        load_openai_model(improved[1], **given)


def test_repeating_what_the_file_shows_is_fine(improved):
    flags = infer_flags(improved[1])
    assert infer_flags(improved[1], **flags) == flags == full(*LAYOUTS["improved"])
    assert infer_flags(improved[1], image_size=256)["attention_resolutions"] == "64,32"
    assert infer_flags(improved[1], image_size=256)["channel_mult"] == "1,2,3,4"


def test_a_rebound_number_of_classes_is_the_usual_one(monkeypatch):
    infos = infos_of(build_empty("model", {"num_channels": 32, "class_cond": True, "num_classes": 10}))
    assert settle_flags("f", infos, {})[1]["num_classes"] == 10
    with pytest.raises(MismatchError, match="num_classes is 10 there, not 1000"):
        settle_flags("f", infos, {"num_classes": None})
    monkeypatch.setattr(script_util, "NUM_CLASSES", 10)
    assert "num_classes" not in settle_flags("f", infos, {})[1]


def test_sizes_that_the_shapes_leave_open_are_asked_for_or_told():
    infos = infos_of(
        build_empty(
            "model",
            {"image_size": 20, "channel_mult": "1,3,2", "num_channels": 32, "attention_resolutions": "5"},
        )
    )
    with pytest.raises(
        MismatchError, match="levels of 32, 96, 64 channels, which are no size's usual ones; give image_size"
    ):
        settle_flags("f", infos, {})
    assert settle_flags("f", infos, {"image_size": 20})[1]["attention_resolutions"] == "5"
    with pytest.raises(
        MismatchError, match="attention where sides are divided by 4, and image_size=18 is not"
    ):
        settle_flags("f", infos, {"image_size": 18})
    upsampler = infos_of(build_empty("upsampler", {"num_channels": 32}))
    _, flags, notes = settle_flags("f", upsampler, {})
    assert flags["large_size"] == 256
    assert notes[-1] == "large_size=256 was assumed; the tensors allow 256 or 512"
    assert len(settle_flags("f", upsampler, {"large_size": 512})[2]) == 1


def test_a_classifier_whose_depth_the_shapes_leave_open_asks_for_it():
    """Blocks of one width that halve look like those that do not: six are 2 levels of 2 or 3 of 1."""
    flags = {
        "image_size": 24,
        "classifier_width": 64,
        "classifier_depth": 2,
        "classifier_pool": "adaptive",
        "classifier_attention_resolutions": "",
        "channel_mult": "1,1",
    }
    infos = infos_of(build_empty("classifier", flags))
    with pytest.raises(
        MismatchError, match="may have 1 or 2 or 5 residual blocks per level.*give classifier_depth"
    ):
        settle_flags("f", infos, {"image_size": 24})
    for depth in (1, 2, 5):
        given = {"image_size": 24, "classifier_depth": depth}
        assert infos_of(build_empty("classifier", settle_flags("f", infos, given)[1])) == infos


@pytest.mark.parametrize("pool", ["adaptive", "attention"])
def test_of_two_readings_the_usual_one_is_taken(pool):
    """Without attention, 18 blocks in pairs of levels of one width may be 6 levels of 2 or 3 of 5."""
    flags = {
        "image_size": 256,
        "classifier_width": 64,
        "classifier_depth": 2,
        "classifier_pool": pool,
        "classifier_attention_resolutions": "",
    }
    infos = infos_of(build_empty("classifier", flags))
    assert settle_flags("f", infos, {})[1] == full("classifier", flags)
    other = {"classifier_depth": 5, "image_size": 256}
    if pool == "adaptive":
        assert settle_flags("f", infos, other)[1]["channel_mult"] == "1,2,4"
    else:  # whose pool has a place for each of 8 x 8 cells, and two halvings before that begin at 32
        with pytest.raises(MismatchError, match="image_size is 32 there, not 256"):
            settle_flags("f", infos, other)


def test_blocks_of_one_width_are_told_apart_by_attention_or_by_the_way_up():
    classifier = {
        "image_size": 24,
        "classifier_width": 64,
        "classifier_depth": 2,
        "classifier_pool": "adaptive",
        "classifier_attention_resolutions": "12",
        "channel_mult": "1,1",
    }
    infos = infos_of(build_empty("classifier", classifier))
    assert settle_flags("f", infos, {"image_size": 24})[1] == full("classifier", classifier)
    model = {
        "image_size": 24,
        "num_channels": 32,
        "channel_mult": "1,1",
        "attention_resolutions": "",
        "resblock_updown": True,
    }
    infos = infos_of(build_empty("model", model))
    assert settle_flags("f", infos, {"image_size": 24})[1] == full("model", model)


# Other files


def test_other_families_are_called_by_their_names(tiny, tmp_path):
    with pytest.raises(
        MismatchError, match="is a full Stable Diffusion model; load_latent_diffusion reads it"
    ):
        load_openai_model(tiny.path)
    vae = {
        n.removeprefix("first_stage_model."): v
        for n, v in tiny.tensors.items()
        if n.startswith("first_stage_model.")
    }
    with pytest.raises(MismatchError, match="is a VAE only; a bare state dict of OpenAI's UNet is needed"):
        load_openai_model(tiny.save(tmp_path, vae))
    prefix = "model.diffusion_model."
    unet = {n.removeprefix(prefix): v for n, v in tiny.tensors.items() if n.startswith(prefix)}
    with pytest.raises(MismatchError, match="is the UNet of a latent diffusion model"):
        load_openai_model(tiny.save(tmp_path, unet))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    with pytest.raises(MismatchError, match=r"is the state of an optimizer; .* \(model\*.pt or ema_\*.pt\)"):
        load_openai_model(saved(tmp_path, optimizer, "opt000007.pt"))


def test_networks_that_the_flags_cannot_describe_are_told_with_their_numbers(improved, tmp_path):
    def refused(model, message):
        with pytest.raises(MismatchError, match=message):
            settle_flags("f", infos_of(model), {})

    common = {
        "image_size": 8,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "num_heads": 1,
    }
    refused(
        UNetModel(in_channels=1, out_channels=2, channel_mult=(1, 2), **common),
        "1 input and 2 output channels",
    )
    refused(
        EncoderUNetModel(in_channels=4, out_channels=2, channel_mult=(1, 2), **common),
        "a classifier of 4 channels",
    )
    uneven = UNetModel(
        in_channels=3, out_channels=3, channel_mult=(1, 2), **{**common, "num_res_blocks": [1, 2]}
    )
    refused(uneven, "holds 5 input blocks in an order that no flags")
    plain = UNetModel(in_channels=3, out_channels=3, channel_mult=(1, 2), conv_resample=False, **common)
    refused(plain, "no whole OpenAI model: 'input_blocks.2' is missing")

    tensors = dict(improved[0].state_dict())
    del tensors["time_embed.0.weight"]
    with pytest.raises(MismatchError, match="no whole OpenAI model: 'time_embed.0.weight' is missing"):
        load_openai_model(saved(tmp_path, tensors))
    tensors["time_embed.0.weight"] = torch.zeros(3)
    with pytest.raises(MismatchError, match=r"'time_embed.0.weight' has the shape \[3\]"):
        load_openai_model(saved(tmp_path, tensors))


@pytest.mark.slow
def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *_: None)
    names: dict = {}
    for code in blocks:  # each goes on from the one before
        exec(compile(code, "openai-models.md", "exec"), names)
    assert names["samples"].shape == names["small"].shape == (2, 3, 64, 64)
    assert names["large"].shape == (1, 3, 256, 256)
    assert names["small"].abs().max() <= 1
