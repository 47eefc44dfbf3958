"""LoRA files of every layout are read whole, or refused in one line; and change a model's weights as they say."""

import copy
import dataclasses
import hashlib
import json
import logging
import math

import pytest
import torch
from keyed import fill, keyed_input
from lora_files import (
    LAYOUT_MODULE,
    LAYOUTS,
    TEXT,
    TEXT_LAYOUT_MODULE,
    TEXT_LAYOUTS,
    UNET,
    skeleton,
    spell,
    v1_shapes,
    write_lora,
)
from tiny_networks import UNET as TINY

from ldm.adapters.lora import ATTENTION_BLOCKS, BLOCKS, LoRA, LoraFile, block_of
from ldm.checkpoints import save_safetensors
from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, NumericError, UsageError
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import StepInfo, attached

# Of v1: three modules of the UNet and two of the text encoder, by kohya's names, with their sizes.
MODULES = {
    "lora_unet_down_blocks_0_attentions_1_proj_in": (f"{UNET}input_blocks.2.1.proj_in", 320, 320),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k",
        1280,
        768,
    ),
    "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2": (
        f"{UNET}output_blocks.11.1.transformer_blocks.0.ff.net.2",
        320,
        1280,
    ),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (f"{TEXT}encoder.layers.0.mlp.fc1", 3072, 768),
    "lora_te_text_model_encoder_layers_11_self_attn_out_proj": (
        f"{TEXT}encoder.layers.11.self_attn.out_proj",
        768,
        768,
    ),
}


@pytest.fixture(scope="module")
def model():
    return skeleton(v1_shapes())


def weight_of(*shape):
    """A weight of any size, for less time than a keyed one takes."""
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)


def kohya(rank=2, alpha=1.0):
    tensors = {}
    for name, (_, rows, columns) in MODULES.items():
        tensors |= {f"{name}.lora_up.weight": (rows, rank), f"{name}.lora_down.weight": (rank, columns)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return LoraFile(write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", kohya()))


PROJ_IN, TO_K, FF, FC1, OUT_PROJ = (module for module, *_ in MODULES.values())


# --- reading -------------------------------------------------------------------------------------------------------


def test_every_tensor_is_accounted_for(file, model):
    report = LoRA(file).report(model)
    assert report.total == len(report.assigned) == 15 and not report.ignored
    assert set(report.assigned.values()) == {f"{module}.weight" for module, *_ in MODULES.values()}
    assert set(LoRA(file).deltas(model)) == set(report.assigned.values())


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"text: {name}" for name in TEXT_LAYOUTS)])
def test_each_layout_changes_the_same_weight_alike(layout, model, tmp_path):
    text = layout.startswith("text: ")
    spelled = TEXT_LAYOUTS[layout.removeprefix("text: ")] if text else LAYOUTS[layout]
    module, size = (TEXT_LAYOUT_MODULE, 768) if text else (LAYOUT_MODULE, 640)
    up, down, weight = keyed_input("u", (size, 3)), keyed_input("d", (3, size)), weight_of(size, size)
    path = write_lora(tmp_path / "one.safetensors", {spell(spelled, "up"): up, spell(spelled, "down"): down})
    changes = LoRA(path, 0.5).deltas(model)
    assert set(changes) == {f"{module}.weight"}
    torch.testing.assert_close(changes[f"{module}.weight"](weight), weight + 0.5 * up @ down)


def test_pickles_and_every_float_are_read(tmp_path, model):
    for n, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)):
        up, down = (keyed_input(one, shape).to(dtype) for one, shape in (("u", (768, 2)), ("d", (2, 768))))
        tensors = {spell(TEXT_LAYOUTS["kohya"], "up"): up, spell(TEXT_LAYOUTS["kohya"], "down"): down}
        torch.save(tensors, tmp_path / f"{n}.pt")
        save_safetensors(tmp_path / f"{n}.safetensors", tensors, {})
        weight = torch.zeros(768, 768)
        for suffix in ("pt", "safetensors") if dtype.itemsize > 1 else ("safetensors",):
            change = LoRA(tmp_path / f"{n}.{suffix}").deltas(model)[f"{TEXT_LAYOUT_MODULE}.weight"]
            assert torch.equal(change(weight), up.float() @ down.float())


PEFT = "base_model.model.down_blocks.0.attentions.0.proj_in.lora_{}.weight"
DIFFUSERS = "unet.down_blocks.0.attentions.0.proj_in.lora_{}.weight"


@pytest.mark.parametrize(
    ("spelled", "metadata", "beside", "factor"),
    [
        (PEFT, None, None, 1),
        (PEFT, None, {"r": 4, "lora_alpha": 6}, 1.5),
        (PEFT, None, {"r": 4, "lora_alpha": 6, "use_rslora": True}, 3),
        (PEFT, None, {"lora_alpha": 6, "alpha_pattern": {"attentions.0.proj_in": 2}}, 0.5),
        (PEFT, None, {"lora_alpha": 6, "alpha_pattern": {"attentions.1.proj_in": 2}}, 1.5),
        (PEFT, None, {"lora_alpha": 0}, 0),
        (DIFFUSERS, {"unet.lora_alpha": 6, "text_encoder.lora_alpha": 2}, None, 1.5),
        (DIFFUSERS, {"text_encoder.lora_alpha": 2}, None, 1),
        (
            DIFFUSERS,
            {"unet.lora_alpha": 6, "unet.alpha_pattern": {"^down_blocks.0.attentions.0.proj_in$": 8}},
            None,
            2,
        ),
        (DIFFUSERS, None, {"lora_alpha": 6}, 1),  # somebody else's configuration
    ],
)
def test_alpha_may_be_in_peft_s_configuration(spelled, metadata, beside, factor, tmp_path, model):
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    up, down = keyed_input("u", (320, 4)), keyed_input("d", (4, 320))
    path = tmp_path / "adapter_model.safetensors"
    written = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    write_lora(path, {spelled.format("B"): up, spelled.format("A"): down}, written)
    weight = torch.zeros(320, 320, 1, 1)
    change = LoRA(path).deltas(model)[f"{UNET}input_blocks.1.1.proj_in.weight"]
    torch.testing.assert_close(change(weight)[:, :, 0, 0], factor * up @ down)


def test_peft_s_lengths_are_those_of_rows_whatever_their_shape(tmp_path, model):
    """Its convolutions keep them as (1, out, 1, 1), where LyCORIS's of that shape are columns'."""
    name = "base_model.model.down_blocks.0.attentions.0.proj_in.lora"
    path = write_lora(
        tmp_path / "dora.safetensors",
        {
            f"{name}_A.weight": (4, 320, 1, 1),
            f"{name}_B.weight": (320, 4, 1, 1),
            f"{name}_magnitude_vector.weight": torch.arange(1.0, 321).reshape(1, 320, 1, 1),
        },
    )
    change = LoRA(path).deltas(model)[f"{UNET}input_blocks.1.1.proj_in.weight"]
    changed = change(weight_of(320, 320, 1, 1))
    torch.testing.assert_close(changed.flatten(1).norm(dim=1), torch.arange(1.0, 321))


def test_an_alpha_of_0_is_said(tmp_path, model, caplog):
    path = write_lora(tmp_path / "still.safetensors", kohya(alpha=0.0))
    with caplog.at_level(logging.WARNING):
        read = LoraFile(path)
    assert "alpha is 0 in 5 of 5 modules" in read.notes[0] and "alpha is 0" in caplog.text
    weight = weight_of(320, 1280)
    assert torch.equal(LoRA(read).deltas(model)[f"{FF}.weight"](weight), weight)


def test_norms_biases_and_whole_differences_change_weights_and_biases(tmp_path, model):
    tensors = {
        "lora_unet_conv_norm_out.w_norm": (320,),
        "lora_unet_conv_norm_out.b_norm": (320,),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": (1280,),
        "lora_unet_time_embedding_linear_1.diff_b": (1280,),
        "lora_unet_conv_out.diff": (4, 320, 3, 3),
        "lora_unet_conv_out.diff_b": (4,),
    }
    path = write_lora(tmp_path / "full.safetensors", tensors)
    lora = LoRA(path, -0.5)
    changes, shapes = lora.deltas(model), v1_shapes()
    assert (
        set(changes)
        == set(lora.report(model).assigned.values())
        == {
            f"{UNET}{name}"
            for name in ("out.0.weight", "out.0.bias", "middle_block.0.in_layers.0.bias", "time_embed.0.bias")
            + ("out.2.weight", "out.2.bias")
        }
    )
    for key, name in 2 * list(
        lora.report(model).assigned.items()
    ):  # twice: the file's tensors stay as they are
        old = weight_of(*shapes[name])
        torch.testing.assert_close(
            changes[name](old), old - 0.5 * 0.3 * keyed_input(f"file.{key}", tensors[key])
        )


def test_an_inpainting_model_s_first_convolution_changes_in_its_first_4_channels(tmp_path, model):
    path = write_lora(tmp_path / "in.safetensors", SOUND)
    name = f"{UNET}input_blocks.0.0.weight"
    wide = weight_of(320, 9, 3, 3)
    changed = LoRA(path, 0.5).deltas(skeleton(v1_shapes(in_channels=9)))[name](wide)
    assert torch.equal(changed[:, 4:], wide[:, 4:])
    torch.testing.assert_close(changed[:, :4], LoRA(path, 0.5).deltas(model)[name](wide[:, :4]))


# --- strengths -----------------------------------------------------------------------------------------------------


def test_strengths_of_unet_and_text_encoder(file, model):
    weight = weight_of(1280, 768)
    text = weight_of(768, 768)
    whole = LoRA(file).deltas(model)
    unit, text_unit = whole[f"{TO_K}.weight"](weight) - weight, whole[f"{OUT_PROJ}.weight"](text) - text
    for lora, strength, text_strength in (
        (LoRA(file, 0.5), 0.5, 0.5),
        (LoRA(file, 2.0, 0.25), 2.0, 0.25),
        (LoRA(file, -1, text_weight=1), -1.0, 1.0),
        (dataclasses.replace(LoRA(file, 0.5), weight=3.0), 3.0, 3.0),
    ):
        changes = lora.deltas(model)
        torch.testing.assert_close(changes[f"{TO_K}.weight"](weight), weight + strength * unit)
        torch.testing.assert_close(changes[f"{OUT_PROJ}.weight"](text), text + text_strength * text_unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_keep_their_dtype_and_are_rounded_once(file, model, dtype):
    weight = weight_of(320, 1280).to(dtype)
    kept = weight.clone()
    changed = LoRA(file, 0.7).deltas(model)[f"{FF}.weight"](weight)
    assert torch.equal(weight, kept)
    assert changed.dtype == dtype and not changed.requires_grad
    delta = LoRA(file).deltas(model)[f"{FF}.weight"](torch.zeros(320, 1280))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert torch.equal(changed, torch.add(weight.to(wide), delta, alpha=0.7).to(dtype))


def test_what_has_no_strength_changes_nothing(file, model):
    """Not even by a function that gives the same: the old Parameter stays."""
    assert LoRA(file, 0).deltas(model) == {}
    assert set(LoRA(file, 0, text_weight=1).deltas(model)) == {f"{FC1}.weight", f"{OUT_PROJ}.weight"}
    assert set(LoRA(file, blocks={"in02": 0, "BASE": 0}).deltas(model)) == {f"{TO_K}.weight", f"{FF}.weight"}


@pytest.mark.parametrize(
    ("blocks", "factors"),
    [
        (None, (1, 1, 1, 1)),
        ({}, (1, 1, 1, 1)),
        ({"IN02": 0.5, "OUT11": -1}, (0.5, 1, -1, 1)),
        ({"base": 0.25, "m00": 3}, (1, 3, 1, 0.25)),
        (range(17), (2, 7, 16, 0)),
        (tuple(range(26)), (3, 13, 25, 0)),
    ],
)
def test_factors_of_blocks(blocks, factors, file):
    lora = LoRA(file, 2.0, blocks=blocks)
    if len(lora.blocks) == 26:
        between = {lora.blocks[one] for one in ("IN00", "IN03", "OUT02")}
        assert between == ({0} if len(blocks) == 17 else {1, 4, 16})
    found = [lora.strength("unet", module) for module in (PROJ_IN, TO_K, FF)] + [lora.strength("text", FC1)]
    assert found == [2.0 * factor for factor in factors]
    assert lora.strength("unet", f"{UNET}time_embed.0") == lora.strength("unet", f"{UNET}out.2") == 2.0


def test_blocks_are_those_of_the_unet():
    assert len(BLOCKS) == 26 and len(ATTENTION_BLOCKS) == 17
    modules = {name.rpartition(".")[0] for name in v1_shapes() if name.startswith(UNET)}
    assert {block_of(name) for name in modules} == {*BLOCKS[1:], None}
    with_attention = {block_of(name) for name in modules if "transformer_blocks" in name}
    assert with_attention == set(ATTENTION_BLOCKS[1:])


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [(0, 1, (True, True, True)), (0.3, 1, (False, True, True)), (0, 0.5, (True, False, False))],
)
def test_a_share_of_the_sampler_s_way(start, end, active, file, model):
    lora = LoRA(file, start=start, end=end)
    assert tuple(lora.is_active(progress) for progress in (0, 0.5, 1)) == active
    for progress, has in zip((0, 0.5, 1), active, strict=True):
        names = set(lora.deltas(model, progress))
        assert {f"{FC1}.weight", f"{OUT_PROJ}.weight"} <= names
        assert (f"{TO_K}.weight" in names) == has


# --- on a network --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**TINY), "unet.").requires_grad_(False)


def tiny_file(path, seed):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = keyed_input(f"{seed}u", (64, 2)), keyed_input(f"{seed}d", (2, 24))
    return write_lora(path, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}), up @ down


def test_loras_fold_in_order_on_a_network_and_come_off_whole(unet, tmp_path):
    (first, one), (second, two) = (tiny_file(tmp_path / f"{n}.safetensors", n) for n in (1, 2))
    module = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2.to_k")
    old = module.weight
    with attached(unet, LoRA(first, 0.5), LoRA(second, -2.0)):
        torch.testing.assert_close(module.weight, old + 0.5 * one - 2.0 * two)
    assert module.weight is old
    with attached(unet, LoRA(first, 0.0)):
        assert module.weight is old


def test_a_network_answers_as_one_whose_weights_were_changed(unet, tmp_path):
    lora = LoRA(tiny_file(tmp_path / "one.safetensors", 1)[0], -1.5)
    merged = copy.deepcopy(unet)
    for name, change in lora.deltas(merged).items():
        merged.get_parameter(name).copy_(change(merged.get_parameter(name)))
    x, t, context = keyed_input("x", (1, 4, 8, 8)), torch.tensor([7]), keyed_input("c", (1, 5, 24))
    before = unet(x, t, context)
    with attached(unet, lora):
        answer = unet(x, t, context)
    assert torch.equal(answer, merged(x, t, context)) and (answer - before).abs().max() > 1e-3
    assert torch.equal(unet(x, t, context), before)


def test_the_same_changes_come_again_until_the_sampler_leaves_its_share(unet, tmp_path):
    lora = LoRA(tiny_file(tmp_path / "one.safetensors", 1)[0], end=0.5)
    before = lora.changes(unet)
    lora.at(StepInfo(2, 8))
    assert lora.changes(unet) is before and len(before) == 1
    lora.at(StepInfo(4, 8))
    assert lora.changes(unet) == {}
    lora.at(StepInfo(0, 8))
    assert lora.changes(unet) is before


def test_two_runs_do_not_see_each_other_s_steps(unet, tmp_path):
    """But they share what was folded."""
    lora = LoRA(tiny_file(tmp_path / "one.safetensors", 1)[0], 0.5, end=0.5, blocks={"M00": 2})
    one, two = lora.begin(), lora.begin()
    one.at(StepInfo(0, 8))
    two.at(StepInfo(7, 8))
    assert one.changes(unet) is lora.changes(unet) and len(one.changes(unet)) == 1
    assert two.changes(unet) == {} and (two.weight, two.blocks, two.file) == (0.5, {"M00": 2.0}, lora.file)


def test_check(unet, file, tmp_path):
    LoRA(tiny_file(tmp_path / "one.safetensors", 1)[0], 0).check(unet)
    with pytest.raises(MismatchError, match="style.safetensors': .* not in the model|does not fit"):
        LoRA(file, 0).check(unet)


def test_the_text_encoder_s_changes_stay_the_same_objects(file, model):
    """For what has been folded lives as long as they do."""
    lora = LoRA(file, end=0.5)
    before = dict(lora.changes(model))
    lora.at(StepInfo(7, 8))
    after = lora.changes(model)
    assert set(before) - set(after) == {f"{one}.weight" for one in (PROJ_IN, TO_K, FF)}
    assert len(after) == 2 and all(after[name] is before[name] for name in after)


def test_a_network_alone_takes_what_is_its_own(file, tmp_path):
    """Files hold changes of both; a UNet alone has no place for those of a text encoder, and that is no mistake."""
    shapes = v1_shapes()
    alone = skeleton(
        {name.removeprefix(UNET): shape for name, shape in shapes.items() if name.startswith(UNET)}
    )
    assert set(LoRA(file).deltas(alone)) == {
        f"{one.removeprefix(UNET)}.weight" for one in (PROJ_IN, TO_K, FF)
    }
    prefix = "cond_stage_model."
    alone = skeleton(
        {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    )
    lora = LoRA(file, 5.0, 2.0, blocks={"BASE": 3})
    assert set(lora.deltas(alone)) == {f"{one.removeprefix(prefix)}.weight" for one in (FC1, OUT_PROJ)}
    assert lora.strength("text", FC1) == 6


# --- what is said of it --------------------------------------------------------------------------------------------


def test_describe(file, tmp_path):
    raw = open(file.path, "rb").read()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    short, whole = hashlib.sha256(body).hexdigest()[:12], hashlib.sha256(raw).hexdigest()
    assert LoRA(file, 0.5).describe() == {"name": "style", "weight": 0.5, "hash": short, "sha256": whole}
    more = LoRA(file, 1, 0.0, 0.1, 0.9, {"M00": 2}).describe()
    assert list(more.items())[1:6] == [
        ("weight", 1.0),
        ("text_weight", 0.0),
        ("start", 0.1),
        ("end", 0.9),
        ("blocks", {"M00": 2.0}),
    ]
    pickle = tmp_path / "x.pt"
    torch.save({f"lora_unet_x.lora_{one}.weight": torch.zeros(2, 2) for one in ("up", "down")}, pickle)
    whole = hashlib.sha256(pickle.read_bytes()).hexdigest()
    assert LoRA(pickle).describe() == {"name": "x", "weight": 1.0, "hash": whole[:12], "sha256": whole}


def test_a_file_that_changed_has_no_hash(tmp_path):
    path = write_lora(tmp_path / "one.safetensors", kohya())
    read = LoraFile(path)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(FormatError, match="changed since it was read"):
        _ = read.hashes


# --- mistakes ------------------------------------------------------------------------------------------------------

UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"
SOUND = {UP: (320, 2), DOWN: (2, 4, 3, 3)}
XL = "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"
FULL = f"{UNET}input_blocks.0.0.weight"
BAD_FILES = [
    ({**SOUND, XL: 1.0}, MismatchError, "this is one for Stable Diffusion XL"),
    (
        {f"lora_unet_{'x_attn2_to_k'}.lora_down.weight": (2, 1024)},
        MismatchError,
        "Stable Diffusion v2 .* 1024",
    ),
    ({"lora_unet_double_blocks_0_img_mod.alpha": 1.0}, MismatchError, "one for Flux"),
    ({"emb_params": (3, 768)}, MismatchError, "this is a textual-inversion embedding"),
    ({FULL: (8, 4, 3, 3), "first_stage_model.quant_conv.weight": (8, 8)}, MismatchError, "and this is a "),
    ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, MismatchError, "this is a ControlNet"),
    (
        {"ip_adapter.1.to_k_ip.weight": (8, 8), "ip_adapter.0.to_q_lora.down.weight": (4, 8)},
        MismatchError,
        "this is an IP-Adapter",
    ),
    (
        {**SOUND, "lora_unet_conv_in.lora_sideways.weight": (2, 2)},
        MismatchError,
        "1 of 3 tensors are nothing .*sideways",
    ),
    ({**SOUND, "step": 7.0}, MismatchError, "1 of 3 tensors are nothing .*'step'"),
    (
        {UP: (320, 2), DOWN: (3, 4, 3, 3)},
        MismatchError,
        "conv_in': its tensors do not fit .* 320 x 2, .* 3 x 4",
    ),
    ({UP: (320, 2)}, MismatchError, "conv_in': it has lora_up, which is no known way"),
    ({**SOUND, "unet.conv_in.lora.up.weight": (320, 2)}, MismatchError, "are the same"),
    (
        {UP: torch.full((320, 2), math.nan), DOWN: (2, 4, 3, 3)},
        NumericError,
        "lora_up.weight' holds values that",
    ),
    ({**SOUND, "lora_unet_conv_in.alpha": torch.tensor(math.inf)}, NumericError, "alpha' holds values that"),
    ({**SOUND, "lora_unet_conv_in.alpha": (2,)}, MismatchError, r"should be one number, and has shape \[2\]"),
    ({UP: torch.ones(320, 2, dtype=torch.int32), DOWN: (2, 4, 3, 3)}, MismatchError, "stored as int32"),
    ({UP: torch.ones(320, 0), DOWN: torch.ones(0, 4, 3, 3)}, MismatchError, "is empty, of shape"),
]


@pytest.mark.parametrize(("tensors", "error", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_files_that_are_refused(tensors, error, words, tmp_path):
    path = write_lora(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(error, match=words) as caught:
        LoRA(path)
    check_line(caught.value, "bad.safetensors")


def check_line(error, name):
    text = str(error)
    assert isinstance(error, LdmError) and name in text and "\n" not in text and len(text) <= 400


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 144\n", "git-lfs pointer"),
        (b"", "is empty"),
        (None, "incomplete"),
    ],
)
def test_files_that_cannot_be_read(written, words, tmp_path):
    path = write_lora(tmp_path / "bad.safetensors", SOUND)
    path.write_bytes(path.read_bytes()[:-9] if written is None else written)
    with pytest.raises(FormatError, match=words) as caught:
        LoRA(path)
    check_line(caught.value, "bad.safetensors")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "should be a JSON object"),
        ('{"unet.lora_alpha": "4"}', "lora_alpha of its configuration should be a number, got '4'"),
        ('{"unet.lora_alpha": NaN}', "should be a number, got nan"),
        (
            '{"unet.alpha_pattern": {"(a+)+": 4}}',
            "alpha_pattern of its configuration should be names of modules",
        ),
    ],
)
def test_configurations_that_are_refused(metadata, words, tmp_path):
    path = tmp_path / "bad.safetensors"
    write_lora(
        path,
        {"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (320, 2)},
        {"lora_adapter_metadata": metadata},
    )
    with pytest.raises(FormatError, match=words) as caught:
        LoRA(path)
    check_line(caught.value, "bad.safetensors")


BAD_FITS = [
    (
        {"lora_unet_attic.diff": (2, 2)},
        r"1 of its 1 modules are not in the model \('lora_unet_attic'\); it is for",
    ),
    ({**SOUND, "lora_unet_attic.diff": (2, 2)}, "1 of its 2 modules are not in the model .*ignore="),
    (
        {UP: (320, 2), DOWN: (2, 5, 3, 3)},
        "conv_in' does not fit .*input_blocks.0.0 .* 320 x 45, not 320 x 36",
    ),
    ({"lora_unet_conv_in.diff": (319, 4, 3, 3)}, "of 319 x 36, not 320 x 36"),
    ({"lora_unet_conv_in.diff_b": (4,)}, "a bias of 4, and there is a bias of 320"),
    (
        {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.diff_b": (1280,)},
        "a bias of 1280, and there is no bias",
    ),
    (
        {"lora_unet_conv_in.diff_b": (320,), "lora_unet_input_blocks_0_0.diff_b": (320,)},
        "are both model.diff",
    ),
    (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(1024, 4096)},
        "of 1024 x 4096, not 3072 x 768",
    ),
]


@pytest.mark.parametrize(("tensors", "words"), BAD_FITS, ids=range(len(BAD_FITS)))
def test_files_that_do_not_fit_the_model(tensors, words, tmp_path, model):
    lora = LoRA(write_lora(tmp_path / "bad.safetensors", tensors))
    with pytest.raises(MismatchError, match=words) as caught:
        lora.deltas(model)
    check_line(caught.value, "bad.safetensors")


def test_a_model_without_clip_has_no_place_for_changes_of_it(file):
    shapes = {name: shape for name, shape in v1_shapes().items() if name.startswith(UNET)}
    with pytest.raises(MismatchError, match="the model has no text encoder of Stable Diffusion v1"):
        LoRA(file).deltas(skeleton(shapes))


def test_keys_are_left_out_only_by_name(tmp_path, model):
    path = write_lora(tmp_path / "odd.safetensors", {**SOUND, "lora_unet_attic.diff": (2, 2), "step": 3.0})
    read = LoraFile(path, ignore=("lora_unet_attic", "st?p", "nothing"))
    report = LoRA(read).report(model)
    assert report.total == 4 and set(report.ignored) == {"lora_unet_attic.diff", "step"}
    assert any("'nothing' fits no tensor" in note for note in report.notes)


BAD_NUMBERS = [
    ({"weight": math.nan}, "weight should be a number, got nan"),
    ({"weight": "1"}, "weight should be a number, got '1'"),
    ({"weight": True}, "weight should be"),
    ({"text_weight": math.inf}, "text_weight should be a number"),
    ({"start": -0.1}, "start should be a number from 0 to 1"),
    ({"end": 1.5}, "end should be a number from 0 to 1"),
    ({"start": 0.5, "end": 0.5}, "start should be below end, got start=0.5 and end=0.5"),
    ({"blocks": [1] * 12}, "17 or 26 numbers, got 12; 12 and 20 are those of Stable Diffusion XL"),
    ({"blocks": [1] * 16}, "17 or 26 numbers, got 16$"),
    ({"blocks": {"IN12": 1}}, "got 'IN12'"),
    ({"blocks": {"IN01": math.nan}}, "blocks IN01 should be a number, got nan"),
    ({"blocks": 0.5}, "blocks should be"),
    ({"blocks": "1,1"}, "blocks should be"),
    ({"file": None}, "a LoRA's file should be"),
    ({"file": 3}, "a LoRA's file should be"),
]


@pytest.mark.parametrize(("options", "words"), BAD_NUMBERS, ids=range(len(BAD_NUMBERS)))
def test_options_that_are_refused(options, words, file):
    with pytest.raises(UsageError, match=words) as caught:
        LoRA(**{"file": file, **options})
    check_line(caught.value, "")


def test_a_file_that_is_not_there():
    with pytest.raises(AbsentError, match="is not there"):
        LoRA("no/such/lora.safetensors")
