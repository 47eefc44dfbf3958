"""Merging: A1111's formulas in float64 against ours, blocks, what is kept and refused; nothing is half-written."""

import errno
import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from keyed import keyed_input

from ldm import merging
from ldm.adapters import LoRA
from ldm.adapters.extracting import extract_lora
from ldm.adapters.lora import BLOCKS
from ldm.checkpoints import read_tensors, save_safetensors
from ldm.checkpoints.compvis import sha256_of
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE, ema_name
from ldm.cli import run
from ldm.errors import (
    AbsentError,
    FormatError,
    MismatchError,
    NumericError,
    OutputError,
    UsageError,
)
from ldm.merging import alphas_of_blocks, block_of_tensor, merge

ROOT = Path(__file__).resolve().parents[1]
BODY = f"{TEXT}transformer.text_model."
IDS = f"{BODY}embeddings.position_ids"
ATTENTION = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
STEM = f"{UNET}input_blocks.0.0.weight"
Q = f"{BODY}encoder.layers.0.self_attn.q_proj.weight"
# A few tensors of each network, of sizes with no two equal.
SHAPES = {
    f"{UNET}time_embed.0.weight": (24, 16),
    STEM: (16, 4, 3, 3),
    f"{UNET}input_blocks.1.0.in_layers.2.weight": (16, 17, 3, 3),
    ATTENTION: (18, 21),
    f"{UNET}input_blocks.11.0.in_layers.0.bias": (19,),
    f"{UNET}middle_block.1.proj_in.weight": (20, 22, 1, 1),
    f"{UNET}output_blocks.0.0.emb_layers.1.bias": (23,),
    f"{UNET}output_blocks.11.0.out_layers.0.weight": (25,),
    f"{UNET}out.2.bias": (4,),
    f"{VAE}encoder.mid.attn_1.q.weight": (26, 26, 1, 1),
    f"{VAE}decoder.conv_in.weight": (27, 4, 3, 3),
    f"{VAE}quant_conv.bias": (8,),
    f"{BODY}embeddings.token_embedding.weight": (28, 21),
    Q: (21, 21),
    f"{BODY}final_layer_norm.bias": (21,),
}


@functools.cache
def values(seed, name, shape):
    return 0.3 * keyed_input(f"{seed}.{name}", shape)


def model(seed, dtype=torch.float32, **changed):
    shapes = {**SHAPES, **changed}
    return {name: values(seed, name, shape).to(dtype, copy=True) for name, shape in shapes.items()}


def without(tensors, prefix):
    return {name: one for name, one in tensors.items() if not name.startswith(prefix)}


@pytest.fixture
def put(tmp_path):
    """Write tensors under a name and give its path."""

    def write(name, tensors, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        save_safetensors(path, tensors, metadata or {})
        return path

    return write


@pytest.fixture
def merged(tmp_path, put):
    """Merge dicts of tensors; gives (tensors, reports)."""

    def do(*models, **options):
        paths = [put(name, one) for name, one in zip("abc", models, strict=False)]
        reports = merge(tmp_path / "out.safetensors", *paths, overwrite=True, **options)
        for report, one in zip(reports, models, strict=False):
            assert report.assigned.keys() | report.ignored.keys() == one.keys()
            assert not report.assigned.keys() & report.ignored.keys()
        return read_tensors(tmp_path / "out.safetensors")[0], reports

    return do


def a1111(theta_0, theta_1, theta_2, multiplier):
    """A1111's formulas as they stand there, for tensors of whatever dtype."""
    if theta_2 is None:
        return ((1 - multiplier) * theta_0) + (multiplier * theta_1)
    return theta_0 + (multiplier * (theta_1 - theta_2))


@pytest.mark.parametrize("count", [2, 3])
def test_a1111s_formulas_in_float64_rounded_once(merged, monkeypatch, count):
    """Ours is the float64 result to the bit; A1111's own arithmetic in half precision is off by more."""
    monkeypatch.setattr(merging, "PIECE", 101)  # several pieces of a tensor, and a last one that is shorter
    whole, half, brain = torch.float32, torch.float16, torch.bfloat16
    for kept, wanted in (
        (whole, whole),
        (whole, half),
        (half, half),
        (half, None),
        (brain, brain),
        (brain, whole),
    ):
        models = [model(seed, kept) for seed in "abc"[:count]]
        got, _ = merged(*models, alpha=0.37, dtype=wanted)
        dtype = wanted or kept
        ours, theirs = 0.0, 0.0
        for name in SHAPES:
            three = [one[name] for one in models] + [None] * (3 - count)
            wide = a1111(*(x if x is None else x.double() for x in three), 0.37)
            assert got[name].dtype == dtype and torch.equal(got[name], wide.to(dtype)), (kept, wanted, name)
            # The distance to the next number of this dtype, of which a single rounding is off by half at most.
            step = torch.finfo(dtype).eps * wide.abs().clamp_min(1e-4)
            ours = max(ours, ((got[name].double() - wide).abs() / step).max().item())
            own = a1111(*three, 0.37).to(dtype).double()
            theirs = max(theirs, ((own - wide).abs() / step).max().item())
        assert ours <= 0.5001 and (ours < theirs or kept is not dtype), (kept, wanted)


def test_alpha_of_0_and_1_are_the_models(merged):
    a, b = model("a"), model("b")
    for alpha, wanted in ((0, a), (1, b)):
        got, _ = merged(a, b, alpha=alpha)
        assert all(torch.equal(got[name], wanted[name]) for name in SHAPES)
    got, _ = merged(a, b, a, alpha=1)
    assert all(torch.allclose(got[name], b[name], atol=1e-7) for name in SHAPES)


def test_blocks_have_the_alphas_of_the_extension(merged):
    """Weights for what lies before the first and behind the last block, and BASE for the rest, as it has them."""
    numbers = [round(0.03 * (1 + n), 2) for n in range(26)]
    a, b = model("a"), model("b")
    rows = (
        (numbers, 0.9, dict(zip(BLOCKS, numbers, strict=True))),
        (numbers[1:], 0.9, dict(zip(BLOCKS, [0.9, *numbers[1:]], strict=True))),
        ({"in01": 0.2, "M00": 1}, 0.9, {**dict.fromkeys(BLOCKS, 0.9), "IN01": 0.2, "M00": 1.0}),
    )
    places = ["IN00", "IN00", "IN01", "IN01", "IN11", "M00", "OUT00", "OUT11", "OUT11"] + ["BASE"] * 6
    assert [block_of_tensor(name) for name in SHAPES] == places
    for blocks, alpha, wanted in rows:
        assert alphas_of_blocks(blocks, alpha) == wanted
        got, _ = merged(a, b, alpha=alpha, blocks=blocks)
        for name, place in zip(SHAPES, places, strict=True):
            wide = a1111(a[name].double(), b[name].double(), None, wanted[place])
            assert torch.equal(got[name], wide.float()), (name, place)


def test_what_is_no_weight_is_the_firsts_or_dropped_with_a_reason(merged):
    extra = {
        IDS: torch.arange(9)[None],
        "betas": torch.linspace(1e-3, 1e-2, 7),
        "v_pred": torch.zeros(0),
        "model_ema.decay": torch.tensor(0.9),
        "first_stage_model.loss.logvar": torch.ones(3),
        "cond_stage_model.transformer.text_projection.weight": torch.ones(5, 6),
        "own.thing": torch.ones(2),
    }
    other = {
        **model("b"),
        IDS: torch.arange(9)[None].float(),
        "betas": torch.ones(7),
        "other.thing": torch.ones(2),
    }
    got, (first, second) = merged({**model("a"), **extra}, other, alpha=0.5, dtype=torch.float16)
    assert got.keys() == SHAPES.keys() | {IDS, "betas", "v_pred", "own.thing"}
    for name in (IDS, "betas", "v_pred", "own.thing"):
        assert torch.equal(got[name], extra[name]) and got[name].dtype == extra[name].dtype, name
    assert first.ignored.keys() == extra.keys() - got.keys()
    assert "'own.thing'" in first.notes[0] and "says v_pred" in first.notes[1]
    assert second.ignored.keys() == {IDS, "betas", "other.thing"}


@pytest.mark.parametrize("count", [2, 3])
def test_an_inpainting_model_keeps_the_channels_that_the_others_have_not(merged, count):
    first, *others = model("a", **{STEM: (16, 9, 3, 3)}), model("b"), model("c")
    others = others[: count - 1]
    got, _ = merged(first, *others, alpha=0.25)
    assert torch.equal(got[STEM][:, 4:], first[STEM][:, 4:])
    three = [first[STEM][:, :4], *(one[STEM] for one in others)]
    wide = a1111(*(one.double() for one in three), *[None] * (3 - count), 0.25)
    assert torch.equal(got[STEM][:, :4], wide.float())


def test_a_network_that_one_model_lacks_is_the_others(merged):
    a, b, c = model("a"), model("b"), model("c")
    rows = (
        ((a, without(b, VAE)), a, "the VAE is as it was"),
        ((without(a, VAE), b), b, "its VAE was taken"),
        ((a, b, without(c, VAE)), a, "the VAE is as it was"),
        ((without(a, VAE), b, c), b, "its VAE was taken"),
        ((a, without(without(b, VAE), TEXT)), a, "the text encoder is as it was"),
    )
    for models, whose, note in rows:
        got, reports = merged(*models, alpha=0.5)
        assert got.keys() == SHAPES.keys() and any(note in one for r in reports for one in r.notes), note
        assert all(torch.equal(got[name], whose[name]) for name in SHAPES if name.startswith(VAE))
        assert not torch.equal(got[ATTENTION], models[0][ATTENTION])


def test_moving_averages_are_dropped_or_used(merged):
    a, b = model("a"), model("b")
    averages = {ema_name(name): one * 0.5 for name, one in a.items() if name.startswith(UNET)}
    full = {**a, **averages, "model_ema.decay": torch.tensor(0.9)}
    for options, factor in (({}, 1.0), ({"ema": "use"}, 0.5)):
        got, (report,) = merged(full, **options)
        assert got.keys() == SHAPES.keys() and len(report.ignored) == len(averages) + 1
        for name in SHAPES:
            assert torch.equal(got[name], a[name] * (factor if name.startswith(UNET) else 1)), name
    got, _ = merged(full, b, alpha=0.5, ema="use")  # b has none, and counts as it is
    assert torch.allclose(got[ATTENTION], 0.25 * a[ATTENTION] + 0.5 * b[ATTENTION], atol=1e-7)
    lacking = {name: one for name, one in full.items() if name != ema_name(ATTENTION)}
    for wrong, words in ((a, "has no EMA weights"), (lacking, "tensors of a moving average, without")):
        with pytest.raises(MismatchError, match=words):
            merged(wrong, ema="use")


def test_a_vae_is_put_in_whatever_its_file_calls_it(merged, put):
    vae = {
        name.removeprefix(VAE): one for name, one in model("v", torch.float16).items() if name.startswith(VAE)
    }
    theirs = {
        "encoder.mid_block.attentions.0.to_q.weight": vae["encoder.mid.attn_1.q.weight"][..., 0, 0],
        "decoder.conv_in.weight": vae["decoder.conv_in.weight"],
        "quant_conv.bias": vae["quant_conv.bias"],
    }
    for name, tensors in (("bare", vae), ("diffusers", theirs), ("model", model("v", torch.float16))):
        got, reports = merged(model("a"), model("b"), alpha=0.5, vae=put(name, tensors))
        for part, one in vae.items():
            assert torch.equal(got[VAE + part], one) and got[VAE + part].dtype == one.dtype, (name, part)
        assert reports[-1].assigned.keys() | reports[-1].ignored.keys() == tensors.keys(), name
        assert sum("replaced by the VAE" in why for why in reports[0].ignored.values()) == 3
    got, _ = merged(model("a"), vae=put("again", vae), dtype=torch.bfloat16)
    assert {one.dtype for one in got.values()} == {torch.bfloat16}
    for name, tensors in (
        ("short", {k: vae[k] for k in list(vae)[:2]}),
        ("odd", {**vae, "decoder.x.y": vae["quant_conv.bias"]}),
    ):
        with pytest.raises(MismatchError, match="does not fit: its VAE lacks"):
            merged(model("a"), vae=put(name, tensors))


def lora_tensors():
    """A LoRA of the attention and the text encoder, and a LoHa of the middle block."""
    sizes = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (18, 3),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (3, 21),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (21, 2),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (2, 21),
        "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (20, 2),
        "lora_unet_mid_block_attentions_0_proj_in.hada_w1_b": (2, 22),
        "lora_unet_mid_block_attentions_0_proj_in.hada_w2_a": (20, 2),
        "lora_unet_mid_block_attentions_0_proj_in.hada_w2_b": (2, 22),
    }
    tensors = {name: keyed_input(name, shape) for name, shape in sizes.items()}
    tensors["lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.alpha"] = torch.tensor(1.5)
    return tensors


def test_loras_are_baked_in_after_merging_and_rounded_once(merged, put):
    own = lora_tensors()
    file = put("lora", own)
    loras = [LoRA(file, 0.8, text_weight=0.3), LoRA(file, -0.5, blocks={"M00": 0.5})]
    a, b = model("a", torch.float16), model("b", torch.float16)
    got, reports = merged(a, b, alpha=0.25, loras=loras)
    assert all(report.assigned.keys() == own.keys() for report in reports[2:]) and len(reports) == 4

    def part(end):
        return next(one.double() for name, one in own.items() if name.endswith(end))

    key = part("to_k.lora_up.weight") @ part("to_k.lora_down.weight") * 0.5
    text = part("q_proj.lora_up.weight") @ part("q_proj.lora_down.weight")
    middle = (part("w1_a") @ part("w1_b") * (part("w2_a") @ part("w2_b")))[..., None, None]
    for name, delta in (
        (ATTENTION, (0.8 - 0.5) * key),
        (Q, (0.3 - 0.5) * text),
        (f"{UNET}middle_block.1.proj_in.weight", (0.8 - 0.25) * middle),
    ):
        wide = a1111(a[name].double(), b[name].double(), None, 0.25) + delta
        step = torch.finfo(torch.float16).eps * wide.abs().clamp_min(1e-2)
        assert ((got[name].double() - wide).abs() / step).max() < 0.51, name
    plain, _ = merged(a, b, alpha=0.25)
    assert all(
        torch.equal(got[n], plain[n])
        for n in SHAPES.keys() - {ATTENTION, Q, f"{UNET}middle_block.1.proj_in.weight"}
    )


def test_weights_in_8_bits_are_multiplied_by_their_scales(merged):
    a = model("a", torch.float16)
    a[ATTENTION] = a[ATTENTION].to(torch.float8_e4m3fn)
    a[ATTENTION.replace(".weight", ".scale_weight")] = torch.tensor(2.0)
    a[Q] = a[Q].to(torch.float8_e4m3fn)
    got, _ = merged(a)
    assert torch.equal(got[ATTENTION], (a[ATTENTION].float() * 2).half()) and got[Q].dtype is torch.float16
    assert torch.equal(got[Q], a[Q].half()) and got.keys() == SHAPES.keys()


def test_the_result_says_from_what_and_how(tmp_path, put):
    paths = [put(name, model(name), {"v_pred": "1", "sd_merge_recipe": f"of {name}"}) for name in "abc"]
    lora = LoRA(put("lora", lora_tensors()), 0.5)
    out = tmp_path / "out.safetensors"
    merge(out, *paths, alpha=0.5, blocks={"IN00": 0.1}, loras=[lora], vae=paths[2], dtype=torch.float16)
    metadata = read_tensors(out)[1]
    recipe, models = json.loads(metadata["sd_merge_recipe"]), json.loads(metadata["sd_merge_models"])
    hashes = [sha256_of(path) for path in paths]
    assert [recipe[f"{one}_model_hash"] for one in ("primary", "secondary", "tertiary")] == hashes
    assert recipe["interp_method"] == "Add difference" and recipe["multiplier"] == 0.5
    assert recipe["block_weights"]["IN00"] == 0.1 and recipe["block_weights"]["OUT11"] == 0.5
    assert recipe["dtype"] == "float16" and recipe["bake_in_vae"] == "c.safetensors"
    assert recipe["loras"][0]["sha256"] == sha256_of(tmp_path / "lora.safetensors")
    assert models[hashes[0]] == {"name": "a.safetensors", "sd_merge_recipe": "of a"}
    assert metadata["v_pred"] == "1" and metadata["format"] == "pt"  # what the first says of itself stays


# (what is given, the error, its words); "a" is a sound model, "out" the output.
LACKING = {name: one for name, one in model("b").items() if name != ATTENTION}
BAD = [
    (dict(a="a", b="b"), UsageError, "alpha is wanted"),
    (dict(a="a", alpha=0.5), UsageError, "need a second one"),
    (dict(a="a", c="b", alpha=0.5), UsageError, "need a second one"),
    (dict(a="a", b="b", alpha=float("nan")), UsageError, "alpha"),
    (dict(a="a", b="b", alpha=float("inf")), UsageError, "alpha"),
    (dict(a="a", b="b", alpha="0.5"), UsageError, "alpha"),
    (dict(a="a", b="b", alpha=True), UsageError, "alpha"),
    (dict(a="a", b="b", alpha=0.5, blocks=[0.1] * 24), UsageError, "25 numbers .* got 24"),
    (dict(a="a", b="b", alpha=0.5, blocks=[0.1] * 17), UsageError, "25 numbers .* got 17"),
    (dict(a="a", b="b", alpha=0.5, blocks={"IN12": 1}), UsageError, "IN00 to IN11.* got 'IN12'"),
    (dict(a="a", b="b", alpha=0.5, blocks={"IN00": 1, "in00": 0}), UsageError, "name each block once"),
    (
        dict(a="a", b="b", alpha=0.5, blocks=[0.1] * 24 + [float("nan")]),
        UsageError,
        "blocks should be a list",
    ),
    (dict(a="a", b="b", alpha=0.5, blocks="0.1"), UsageError, "blocks"),
    (dict(a="a", ema="keep"), UsageError, "ema should be one of drop, use"),
    (dict(a="a", dtype=torch.int8), UsageError, "dtype should be one of"),
    (dict(a="a", dtype="float16"), UsageError, "dtype should be one of"),
    (dict(a="a", loras="lora"), UsageError, "loras should be a list of ldm.adapters.LoRA, got 'lora'"),
    (dict(a="a", loras=["lora"]), UsageError, "got 'lora' in it"),
    (dict(a="a", loras=None), UsageError, "loras should be a list"),
    (dict(a=5), UsageError, "a file should be"),
    (dict(a="a", b=["b"], alpha=1), UsageError, "a file should be"),
    (dict(a="a", vae=5), UsageError, "a file should be"),
    (dict(a="a", output="a"), UsageError, "is, or lies in, the input"),
    (dict(a="a", b="b", alpha=1, output="b"), UsageError, "is, or lies in, the input"),
    (dict(a="a", vae="b", output="b"), UsageError, "is, or lies in, the input"),
    (dict(a="a", output="out.ckpt"), UsageError, "should be 'name.safetensors'"),
    (dict(a="a", output="there"), OutputError, "is there already"),
    (dict(a="a", output="x" * 300), OutputError, "File name too long"),
    (dict(a="a", output="a.safetensors/x.safetensors"), OutputError, "cannot write"),
    (dict(a="a", output="a\0.safetensors"), UsageError, "is no name of a file"),
    (dict(a="a\0b"), FormatError, "cannot be opened"),
    (dict(a="a", b="absent", alpha=1), AbsentError, "is not there"),
    (dict(a="a", b="https://x.y/b.safetensors", alpha=1), UsageError, "is an address"),
    (dict(a="a", b="cut", alpha=1), FormatError, "incomplete"),
    (dict(a="a", b="lora", alpha=1), MismatchError, "is a LoRA; a Stable Diffusion v1 model"),
    (dict(a="a", b="vae", alpha=1), MismatchError, "is a VAE only; a Stable Diffusion v1 model"),
    (dict(a="vae"), MismatchError, "is a VAE only"),
    (dict(a="a", b="v2", alpha=1), MismatchError, "is Stable Diffusion v2"),
    (dict(a="a", b="bare", alpha=1), MismatchError, "is a UNet only"),
    (dict(a="a", vae="lora"), MismatchError, "is a LoRA; a Stable Diffusion v1 VAE"),
    (
        dict(a="a", b="lacking", alpha=1),
        MismatchError,
        "1 tensors missing .'model.diffusion_model.input_blocks.1.1",
    ),
    (dict(a="lacking", b="a", alpha=1), MismatchError, "1 that the first model has not"),
    (dict(a="a", b="wide", alpha=1), MismatchError, r"1 of another shape .*\[18, 33\] instead of \[18, 21\]"),
    (
        dict(a="a", b="nine", alpha=1),
        MismatchError,
        "9 input channels, .* of 4; give the inpainting model first",
    ),
    (dict(a="a", b="five", alpha=1), MismatchError, "5 input channels|depth"),
    (dict(a="nan"), NumericError, "of the result is not finite in float32"),
    (dict(a="large", dtype=torch.float16), NumericError, "of the result is not finite in float16"),
]


def test_bad_input_is_one_line_and_leaves_everything_as_it_was(tmp_path, put):
    width = {ATTENTION.replace("attn2", "attn1"): (18, 18), ATTENTION: (18, 1024)}
    broken = model("a")
    broken[Q][3, 4] = torch.nan
    for name, tensors in {
        "a": model("a"),
        "b": model("b"),
        "there": model("b"),
        "lacking": LACKING,
        "wide": model("w", **{ATTENTION: (18, 33)}),
        "nine": model("n", **{STEM: (16, 9, 3, 3)}),
        "five": model("n", **{STEM: (16, 5, 3, 3)}),
        "v2": without(model("n", **width), TEXT) | {f"{TEXT}model.ln_final.weight": torch.ones(3)},
        "bare": {name.removeprefix(UNET): one for name, one in model("u").items() if name.startswith(UNET)},
        "vae": {name: one for name, one in model("v").items() if name.startswith(VAE)},
        "lora": lora_tensors(),
        "nan": broken,
        "large": {**model("a"), Q: model("a")[Q] * 1e6},
    }.items():
        put(name, tensors)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def place(word):
        return str(tmp_path / f"{word}.safetensors") if isinstance(word, str) and word.isalnum() else word

    for given, kind, words in BAD:
        arguments = {
            key: place(one) if key in ("a", "b", "c", "vae") and isinstance(one, str) else one
            for key, one in given.items()
        }
        output = given.get("output", "out")
        arguments["output"] = tmp_path / (output if "." in output else f"{output}.safetensors")
        with pytest.raises(kind, match=words) as caught:
            merge(**arguments, **({"overwrite": True} if output in "ab" else {}))
        assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value), given
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, given


def test_a_model_that_changes_meanwhile_is_said_before_the_result_has_its_name(tmp_path, put, monkeypatch):
    a, b = put("a", model("a")), put("b", model("b"))
    blend = merging.blend

    def touch(*arguments):
        os.utime(b, ns=(1, 1))
        return blend(*arguments)

    monkeypatch.setattr(merging, "blend", touch)
    with pytest.raises(FormatError, match="changed while it was read"):
        merge(tmp_path / "out.safetensors", a, b, alpha=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_pickled_checkpoint_is_merged_as_well(tmp_path, put):
    tensors = model("a")
    path = tmp_path / "old.ckpt"
    old = {name.replace("text_model.", ""): one for name, one in tensors.items()}  # as A1111 once merged
    torch.save({"state_dict": {**old, IDS: torch.arange(9)[None]}, "global_step": 5, "epoch": 1}, path)
    merge(tmp_path / "out.safetensors", path, put("b", model("b")), alpha=0.25)
    got = read_tensors(tmp_path / "out.safetensors")[0]
    for name in SHAPES:
        wide = a1111(tensors[name].double(), model("b")[name].double(), None, 0.25)
        assert torch.equal(got[name], wide.float()), name


def test_a_full_disk_leaves_nothing_and_the_old_file(tmp_path, put, monkeypatch):
    paths = [put("a", model("a")), put("b", model("b"))]
    out = put("out", model("c"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        merge(out, *paths, alpha=0.5, overwrite=True)
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))  # in the middle of the tensors
    try:
        with pytest.raises(OutputError, match="File too large"):
            merge(out, *paths, alpha=0.5, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- a LoRA out of two models ---------------------------------------------------------------------------------------


def test_an_extracted_lora_of_full_rank_makes_the_one_model_of_the_other(tmp_path, put, merged):
    a, b = model("a"), model("b")
    paths = [put("a", a), put("b", b)]
    found = extract_lora(tmp_path / "lora.safetensors", *paths, rank=100)
    tensors, metadata = read_tensors(tmp_path / "lora.safetensors")
    # Names of kohya's layout; the convolution and the embeddings are none of its attentions.
    assert found.ranks == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": 18,
        "lora_unet_mid_block_attentions_0_proj_in": 20,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 21,
    }
    assert len(found.left) == 9 and all(network not in VAE for network in found.left)
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert json.loads(metadata["ldm_recipe"])["tuned"] == [
        {"name": "b.safetensors", "sha256": sha256_of(paths[1])}
    ]
    got, _ = merged(a, loras=[LoRA(tmp_path / "lora.safetensors")])
    for name in (ATTENTION, Q, f"{UNET}middle_block.1.proj_in.weight"):
        assert (got[name] - b[name]).abs().max() < 1e-5 < (a[name] - b[name]).abs().max(), name


def test_the_rank_is_the_best_and_the_smallest_that_keeps_the_error(tmp_path, put):
    """Eckart and Young: what is missing of rank r are the singular values behind the r-th."""
    a, b = model("a"), model("b")
    paths = [put("a", a), put("b", b)]
    body = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    values = torch.linalg.svdvals(b[Q].double() - a[Q].double())
    tails = [(values[r:].square().sum().sqrt() / values.square().sum().sqrt()).item() for r in range(22)]
    for options, rank in (
        ({"rank": 5}, 5),
        ({"error": 0.4}, next(r for r in range(22) if tails[r] <= 0.4)),
        ({"error": 0.4, "rank": 3}, 3),
        ({"error": 1.0}, 1),
        ({"error": 0.0}, 21),
    ):
        out = tmp_path / "lora.safetensors"
        found = extract_lora(out, *paths, **options, overwrite=True, dtype=torch.float32)
        assert found.ranks[body] == rank and abs(found.errors[body] - tails[rank]) < 1e-5, options
        up, down = (read_tensors(out)[0][f"{body}.lora_{one}.weight"].double() for one in ("up", "down"))
        missing = (b[Q].double() - a[Q].double() - up @ down).norm() / values.norm()
        assert abs(missing - tails[rank]) < 1e-5 and up.shape == (21, rank), options


def test_convolutions_are_extracted_on_demand_and_equal_models_are_refused(tmp_path, put):
    a = model("a", torch.float16)
    conv = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    b = {**a, conv: a[conv] + 0.1, f"{UNET}out.2.bias": a[f"{UNET}out.2.bias"] + 1}
    paths = [put("a", a), put("b", b)]
    out = tmp_path / "lora.safetensors"
    with pytest.raises(MismatchError, match=r"do not differ .*2 other tensors differ.*--conv"):
        extract_lora(out, *paths)
    found = extract_lora(out, *paths, conv=True, rank=2)
    body = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = read_tensors(out)[0]
    assert found.ranks == {body: 2} and tensors[f"{body}.lora_down.weight"].shape == (2, 17, 3, 3)
    assert (
        tensors[f"{body}.lora_up.weight"].shape == (16, 2, 1, 1)
        and tensors[f"{body}.alpha"].dtype is torch.float16
    )
    assert found.left == [f"{UNET}out.2.bias"]
    for options, words in (
        ({"rank": 0}, "rank"),
        ({"error": 1.5}, "error"),
        ({"error": float("nan")}, "error"),
    ):
        with pytest.raises(UsageError, match=words):
            extract_lora(out, *paths, conv=True, overwrite=True, **options)


# --- the script -----------------------------------------------------------------------------------------------------


def load_script():
    spec = importlib.util.spec_from_file_location("merge_script", ROOT / "scripts" / "merge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def test_the_script_merges_extracts_and_ends_with_the_errors_code(tmp_path, put, capsys):
    a, b = put("a", model("a")), put("b", model("b"))
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    same = tmp_path / "same.safetensors"
    assert script.main([str(a), str(b), "-o", str(lora), "--extract_lora", "--rank", "40"]) == 0
    assert "3 modules differ; rank 18 x 1, 20 x 1, 21 x 1" in capsys.readouterr().out
    assert script.main([str(a), "-o", str(out), "--lora", f"{lora}:0.5:0", "--dtype", "float16"]) == 0
    assert f"'{out}' is written" in capsys.readouterr().out
    merge(same, a, loras=[LoRA(lora, 0.5, text_weight=0)], dtype=torch.float16)
    assert all(torch.equal(one, read_tensors(same)[0][name]) for name, one in read_tensors(out)[0].items())
    blocks = ",".join(["0.25"] * 25)
    assert (
        script.main([str(a), str(b), "-o", str(out), "--overwrite", "--alpha", "0.5", "--blocks", blocks])
        == 0
    )
    recipe = json.loads(read_tensors(out)[1]["sd_merge_recipe"])
    assert recipe["block_weights"]["BASE"] == 0.5 and recipe["block_weights"]["M00"] == 0.25
    for words, code, line in (
        ([a, b], 2, "alpha is wanted"),
        ([a, b, "--alpha", "nan"], 2, "--alpha"),
        ([a, b, "--alpha", "1", "--blocks", "0.1,x"], 2, "wanted 25 or 26 numbers"),
        ([a, b, "--alpha", "1", "--blocks", "0.1,0.2"], 2, "got 2"),
        (
            [a, b, "--alpha", "1", "--blocks", "IN00=1,M00=0,in00=0"],
            2,
            "wanted each block once, got 'IN00' twice",
        ),
        ([a, b, a, b, "--alpha", "1"], 2, "one to three models"),
        ([a, "--rank", "4"], 2, "--rank does nothing without --extract_lora"),
        ([a, b, "--extract_lora", "--alpha", "1"], 2, "--alpha does nothing with --extract_lora"),
        ([a, "--extract_lora"], 2, "takes two models"),
        ([a, "--lora", tmp_path / "none.safetensors"], 9, "is not there"),
        ([a, lora, "--alpha", "1"], 5, "is a LoRA"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(script.main, [*map(str, words), "-o", str(tmp_path / "new.safetensors")])
        error = capsys.readouterr().err
        assert stop.value.code == code and line in error and error.count("\n") == 1, (words, error)
        assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.slow
def test_no_more_than_a_few_tensors_are_in_memory(tmp_path):
    """Two models of 150 MB in tensors of 5 MB, of which at most a few are held at a time."""
    sizes = {
        f"{UNET}input_blocks.{n}.0.x.weight": (512, 2560)
        for n in range(30)  # more blocks than v1 has
    }
    sizes[ATTENTION], sizes[Q] = (18, 768), (21, 21)
    for word in "ab":
        one = torch.full((512, 2560), 0.5 if word == "a" else 0.25)
        tensors = {name: one if one.shape == size else torch.ones(size) for name, size in sizes.items()}
        save_safetensors(tmp_path / f"{word}.safetensors", tensors)
    code = """
import resource, sys, torch
from ldm.merging import merge
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
merge(sys.argv[1] + "/small.safetensors", sys.argv[1] + "/a.safetensors", dtype=torch.float16)
before = peak()
merge(sys.argv[1] + "/out.safetensors", sys.argv[1] + "/a.safetensors", sys.argv[1] + "/b.safetensors", alpha=0.5)
print(before, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    before, more = map(float, done.stdout.split())
    assert more < 80, done.stdout  # MB; the models have 300
    got, _ = read_tensors(tmp_path / "out.safetensors")
    assert got[f"{UNET}input_blocks.7.0.x.weight"][3, 5] == 0.375
