"""Loading models: every tensor accounted for, other families refused by name, values as in the file."""

import copy
import logging
import shutil
from pathlib import Path

import pytest
import torch
from ldm.checkpoints.openai import load_openai_model
from make_synthetic import make_tensors, tiny_config

import ldm
from ldm import checkpoints
from ldm.checkpoints import load_latent_diffusion, load_vae, read_tensors
from ldm.checkpoints.families import family_of
from ldm.checkpoints.key_mapping import EMA, TEXT, UNET, VAE, ema_name
from ldm.config_text import load_config
from ldm.errors import (
    AbsentError,
    MismatchError,
    NumericError,
    ResourceError,
    UnsafeFileError,
    UsageError,
    is_out_of_memory,
)
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.tokenizer import find_tokenizer
from ldm.process.schedule import SCHEDULE_BUFFERS

FIRST = f"{UNET}input_blocks.0.0.weight"
POSITIONS = f"{TEXT}transformer.text_model.embeddings.position_ids"


def changed(tensors, **changes):
    """Copy a state, with None for names to take out."""
    new = {**tensors, **changes}
    return {name: value for name, value in new.items() if value is not None}


def with_ema(config):
    config = copy.deepcopy(config)
    config["model"]["params"]["use_ema"] = True
    return config


@pytest.fixture(scope="module")
def ema_tensors(tiny):
    """Plain weights, and averages half as large."""
    return make_tensors(tiny.config, dtype=torch.float32, ema=True)


# --- values and the account ----------------------------------------------------------------------------------------


def test_every_tensor_is_assigned_and_equal(tiny):
    model, report = load_latent_diffusion(tiny.path, config=tiny.config)
    state = model.state_dict()
    assert report.assigned == {name: name for name in tiny.tensors} and not report.ignored
    assert all(torch.equal(state[name], value) for name, value in tiny.tensors.items())
    assert set(report.initialised) == {*SCHEDULE_BUFFERS, "logvar"} and state.keys() == {
        *report.initialised,
        *tiny.tensors,
    }
    assert report.family == "v1" and not model.training
    assert f"v1, {len(tiny.tensors)} of {len(tiny.tensors)} tensors assigned" in report.summary()
    assert "13 initialised: computed from the configuration" in report.summary()


def test_the_model_works_and_its_tables_are_real(tiny):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(model.betas, betas.float(), rtol=0, atol=1e-9)
    with torch.no_grad():
        context = model.get_learned_conditioning(["a red circle", ""])
        eps = model.apply_model(torch.ones(2, 4, 8, 6), torch.tensor([1, 500]), context)
    assert context.shape == (2, 11, 24) and eps.shape == (2, 4, 8, 6) and torch.isfinite(eps).all()


def test_each_load_owns_its_memory(tiny):
    first, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    second, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    with torch.no_grad():
        first.model.diffusion_model.out[2].weight.zero_()
    assert second.model.diffusion_model.out[2].weight.abs().max() > 0
    assert torch.equal(read_tensors(tiny.path)[0][f"{UNET}out.2.weight"], tiny.tensors[f"{UNET}out.2.weight"])


@pytest.mark.parametrize("nested", [0, 1, 2])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.thinned(6)
def test_pickles_of_every_dtype_bare_and_nested(tiny, tmp_path, nested, stored):
    state = {name: value.to(stored) for name, value in tiny.tensors.items()}
    outer = state
    for _ in range(nested):
        outer = {"state_dict": outer, "global_step": 3}
    torch.save(outer, tmp_path / "a.ckpt")
    model, report = load_latent_diffusion(tmp_path / "a.ckpt", config=tiny.config)
    assert len(report.assigned) == len(state)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())


def test_text_keys_without_text_model_load_too(tiny, tmp_path):
    old = {
        name.replace("transformer.text_model.", "transformer."): value for name, value in tiny.tensors.items()
    }
    model, report = load_latent_diffusion(tiny.save(tmp_path, old), config=tiny.config)
    key = "cond_stage_model.transformer.embeddings.token_embedding.weight"
    wanted = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert report.assigned[key] == wanted
    assert torch.equal(model.state_dict()[wanted], old[key])


def test_text_keys_of_both_spellings_are_given_twice(tiny, tmp_path):
    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    both = changed(tiny.tensors, **{key.replace("text_model.", ""): tiny.tensors[key]})
    with pytest.raises(MismatchError, match="1 given twice"):
        load_latent_diffusion(tiny.save(tmp_path, both), config=tiny.config)


def test_what_sampling_does_not_need_is_ignored_with_a_reason(tiny, tmp_path):
    """C06."""
    extra = {
        POSITIONS: torch.arange(11)[None].float(),
        f"{VAE}loss.logvar": torch.zeros(()),
        f"{VAE}model_ema.decay": torch.zeros(()),
        "cond_stage_model.logit_scale": torch.zeros(()),
        "lvlb_weights": torch.zeros(1000),
        "model_ema.num_updates": torch.tensor(3),
    }
    _, report = load_latent_diffusion(tiny.save(tmp_path, {**tiny.tensors, **extra}), config=tiny.config)
    assert report.ignored == {
        POSITIONS: "a constant, made anew",
        f"{VAE}loss.logvar": "the VAE's training loss",
        f"{VAE}model_ema.decay": "a moving average of the VAE",
        "cond_stage_model.logit_scale": "not used by the text encoder of v1",
        "lvlb_weights": "computed from the configuration",
        "model_ema.num_updates": "bookkeeping of a moving average that this model does not keep",
    }
    assert report.total == len(tiny.tensors) + len(extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_schedule_tables_in_the_file_are_compared(tiny, tmp_path, dtype):
    tables = {
        n: v.to(dtype) for n, v in make_tensors(tiny.config, schedule=True).items() if n in SCHEDULE_BUFFERS
    }
    _, report = load_latent_diffusion(tiny.save(tmp_path, {**tiny.tensors, **tables}), config=tiny.config)
    assert [report.ignored[name] for name in SCHEDULE_BUFFERS] == [
        "computed from the configuration, and equal"
    ] * 12


@pytest.mark.parametrize("factor", [1.01, 0.5])
def test_another_schedule_in_the_file_is_refused(tiny, tmp_path, factor):
    tables = {"betas": make_tensors(tiny.config, schedule=True)["betas"] * factor}
    with pytest.raises(MismatchError, match="another noise schedule or scale: its betas differs"):
        load_latent_diffusion(tiny.save(tmp_path, {**tiny.tensors, **tables}), config=tiny.config)


def test_a_schedule_of_another_length_is_refused(tiny, tmp_path):
    path = tiny.save(tmp_path, {**tiny.tensors, "betas": torch.ones(500) * 1e-3})
    with pytest.raises(
        MismatchError, match="500 instead of 1000|its betas has 500 values, the configuration's 1000"
    ):
        load_latent_diffusion(path, config=tiny.config)


def test_the_scale_factor_of_a_file_must_be_the_configurations(tiny, tmp_path):
    path = tiny.save(tmp_path, {**tiny.tensors, "scale_factor": torch.tensor(0.18215)})
    _, report = load_latent_diffusion(path, config=tiny.config)
    assert report.ignored == {"scale_factor": "fixed by the configuration"}
    path = tiny.save(tmp_path, {**tiny.tensors, "scale_factor": torch.tensor(0.5)})
    with pytest.raises(MismatchError, match="another noise schedule or scale: its scale_factor differs"):
        load_latent_diffusion(path, config=tiny.config)


def test_a_measured_scale_factor_is_loaded(tiny, tmp_path):
    config = copy.deepcopy(tiny.config)
    config["model"]["params"].update(scale_by_std=True, scale_factor=1.0)
    path = tiny.save(tmp_path, {**tiny.tensors, "scale_factor": torch.tensor(0.75).half()})
    model, report = load_latent_diffusion(path, config=config)
    assert report.assigned["scale_factor"] == "scale_factor"
    assert model.scale_factor.item() == 0.75 and model.scale_factor.dtype == torch.float32


# --- what does not pair ----------------------------------------------------------------------------------------------


def test_a_renamed_tensor_is_named_under_both_names(tiny, tmp_path):
    """C05."""
    moved = changed(
        tiny.tensors, **{f"{UNET}out.2.bias": None, f"{UNET}out.2.bios": tiny.tensors[f"{UNET}out.2.bias"]}
    )
    with pytest.raises(
        MismatchError, match=r"1 of the model's \d+ tensors missing \('model.diffusion_model.out.2.bias'\)"
    ) as e:
        load_latent_diffusion(tiny.save(tmp_path, moved), config=tiny.config)
    assert f"1 of the file's {len(moved)} not expected ('model.diffusion_model.out.2.bios')" in str(e.value)


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_a_missing_tensor_of_any_part_is_named(tiny, tmp_path, part):
    key = [name for name in tiny.tensors if name.startswith(part)][7]
    with pytest.raises(MismatchError, match=f"1 of the model's .* missing .'{key}'"):
        load_latent_diffusion(tiny.save(tmp_path, changed(tiny.tensors, **{key: None})), config=tiny.config)


def test_an_extra_tensor_is_named(tiny, tmp_path):
    path = tiny.save(tmp_path, {**tiny.tensors, "w_pred": torch.ones(1)})
    with pytest.raises(MismatchError, match="1 of the file's .* not expected .'w_pred'.*--ignore-keys"):
        load_latent_diffusion(path, config=tiny.config)


def test_another_shape_and_a_transposed_one_are_named_with_both_shapes(tiny, tmp_path):
    key = f"{UNET}time_embed.0.weight"
    assert tiny.tensors[key].shape == (128, 32)
    for other in (torch.ones(128, 31), tiny.tensors[key].T.contiguous()):
        path = tiny.save(tmp_path, changed(tiny.tensors, **{key: other}))
        with pytest.raises(MismatchError) as caught:
            load_latent_diffusion(path, config=tiny.config)
        assert f"1 of another shape ('{key}' {list(other.shape)} instead of [128, 32])" in str(caught.value)


def test_many_mismatches_are_counted_and_three_named(tiny, tmp_path):
    some = [name for name in tiny.tensors if name.startswith(f"{VAE}encoder.")]
    few = {name: value for name, value in tiny.tensors.items() if name not in some}
    with pytest.raises(
        MismatchError, match=rf"{len(some)} of the model's .* and {len(some) - 3} more\)"
    ) as caught:
        load_latent_diffusion(tiny.save(tmp_path, few), config=tiny.config)
    assert len(str(caught.value)) < 400


def test_weights_of_whole_numbers_are_unsupported(tiny, tmp_path):
    """C09."""
    path = tiny.save(tmp_path, changed(tiny.tensors, **{FIRST: tiny.tensors[FIRST].to(torch.int8)}))
    with pytest.raises(MismatchError, match=f"'{FIRST}' is stored as int8; only floating-point"):
        load_latent_diffusion(path, config=tiny.config)


# --- families -------------------------------------------------------------------------------------------------------

FAMILIES = {
    "Stable Diffusion XL": {
        "conditioner.embedders.0.transformer.text_model.x": (2,),
        f"{UNET}label_emb.0.0.weight": (3, 2),
    },
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (6, 2)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (6, 2)},
    "Stable Diffusion v2;": {f"{TEXT}model.token_embedding.weight": (5, 1024), FIRST: (320, 4, 3, 3)},
    "Stable Diffusion v2 ": {FIRST: (320, 5, 3, 3), f"{VAE}quant_conv.bias": (8,)},
    "InstructPix2Pix": {FIRST: (320, 8, 3, 3), f"{VAE}quant_conv.bias": (8,)},
    "a ControlNet": {"control_model.time_embed.0.weight": (4, 2)},
    "a ControlNet;": {"controlnet_cond_embedding.conv_in.weight": (4, 2), "down_blocks.0.x": (2,)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 2)},
    "a LoRA;": {"unet.up_blocks.0.attentions.1.to_q.lora_A.weight": (4, 2)},
    "a textual-inversion embedding": {"emb_params": (3, 768)},
    "a textual-inversion": {"<cat>": (768,)},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 2), "ip_adapter.1.to_k_ip.weight": (4, 2)},
    "a VAE only; give it as vae=": {
        "encoder.down.0.block.0.conv1.weight": (4, 2, 3, 3),
        "quant_conv.bias": (8,),
    },
    "a VAE only": {f"{VAE}quant_conv.bias": (8,)},
    "a diffusers VAE only": {"encoder.down_blocks.0.resnets.0.conv1.weight": (4, 2, 3, 3)},
    "a UNet only": {FIRST: (320, 4, 3, 3)},
    "a UNet only;": {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a diffusers UNet only": {
        "down_blocks.0.resnets.0.conv1.weight": (4, 2, 3, 3),
        "conv_in.weight": (320, 4, 3, 3),
    },
    "a text encoder only": {"text_model.embeddings.token_embedding.weight": (5, 768)},
    "a layout that is not known here": {"fc.weight": (3, 2)},
}


@pytest.mark.parametrize("words", FAMILIES)
def test_other_families_are_refused_by_name_before_anything_is_built(tiny, tmp_path, words):
    """C02, C03, C04."""
    path = tiny.save(tmp_path, {name: torch.zeros(shape) for name, shape in FAMILIES[words].items()})
    for config in (None, tiny.config):
        with pytest.raises(MismatchError, match=f"changed.safetensors' is {words}"):
            load_latent_diffusion(path, config=config)


def test_an_empty_file_is_of_no_family(tiny, tmp_path):
    """B14."""
    with pytest.raises(MismatchError, match="is a layout that is not known here"):
        load_latent_diffusion(tiny.save(tmp_path, {}), config=tiny.config)


def test_v1_and_its_inpainting_model_are_told_apart(tiny, tmp_path):
    assert family_of({n: t for n, t in tiny.tensors.items()}) == "v1"
    nine = changed(tiny.tensors, **{FIRST: torch.ones(32, 9, 3, 3)})
    assert family_of(nine) == "v1-inpainting"
    config = tiny_config(tmp_path, inpainting=True)
    model, report = load_latent_diffusion(tiny.save(tmp_path, nine), config=config)
    assert report.family == "v1-inpainting" and type(model).__name__ == "LatentInpaintDiffusion"
    assert model.model.diffusion_model.input_blocks[0][0].weight.shape == (32, 9, 3, 3)


@pytest.mark.parametrize("inpainting", [False, True])
def test_a_configuration_of_the_other_kind_is_refused(tiny, tmp_path, inpainting):
    """C01."""
    file_channels, asked = (4, 9) if inpainting else (9, 4)
    path = tiny.save(tmp_path, changed(tiny.tensors, **{FIRST: torch.ones(32, file_channels, 3, 3)}))
    with pytest.raises(
        MismatchError,
        match=rf"a {file_channels}-channel .* checkpoint, but the configuration asks for {asked}",
    ):
        load_latent_diffusion(path, config=tiny_config(tmp_path, inpainting=inpainting))


def test_without_a_configuration_only_v1s_own_size_is_chosen(tiny):
    with pytest.raises(
        MismatchError, match="has a UNet of width 32, Stable Diffusion v1's is 320; give the configuration"
    ):
        load_latent_diffusion(tiny.path)


@pytest.mark.parametrize(("channels", "family"), [(4, "v1"), (9, "v1-inpainting")])
def test_the_shapes_choose_the_configuration(tiny, tmp_path, channels, family):
    """A file with v1's first layer is held against the full v1 model of its kind: 1130 tensors and 13 tables."""
    stub = {FIRST: torch.ones(320, channels, 3, 3), f"{VAE}quant_conv.bias": torch.zeros(8)}
    with pytest.raises(MismatchError, match=r"1128 of the model's 1143 tensors missing") as caught:
        load_latent_diffusion(tiny.save(tmp_path, stub))
    assert "another shape" not in str(caught.value) and family_of(stub) == family


def test_a_configuration_without_a_model_is_refused(tiny):
    with pytest.raises(MismatchError, match="needs 'model:' with 'target'"):
        load_latent_diffusion(tiny.path, config={"data": {}})


def test_paths_of_weights_in_a_configuration_are_not_followed(tiny):
    config = copy.deepcopy(tiny.config)
    config["model"]["params"]["ckpt_path"] = "/nowhere/a.ckpt"
    config["model"]["params"]["first_stage_config"]["params"]["ckpt_path"] = "/nowhere/b.ckpt"
    _, report = load_latent_diffusion(tiny.path, config=config)
    assert len(report.assigned) == len(tiny.tensors)


# --- EMA ----------------------------------------------------------------------------------------------------------

PARAMETER = f"{UNET}out.2.weight"


def test_the_plain_weights_are_the_default_and_the_average_a_choice(tiny, tmp_path, ema_tensors):
    path = tiny.save(tmp_path, ema_tensors)
    for use_ema, factor in ((None, 1.0), (False, 1.0), (True, 0.5)):
        model, report = load_latent_diffusion(path, config=tiny.config, use_ema=use_ema)
        assert torch.equal(model.state_dict()[PARAMETER], tiny.tensors[PARAMETER] * factor)
        assert report.total == len(ema_tensors)
        left_out = PARAMETER if use_ema else ema_name(PARAMETER)
        assert report.ignored[left_out] == (
            "the EMA weights were chosen" if use_ema else "EMA weights, the plain ones were chosen"
        )


def test_an_average_that_is_not_there_is_refused(tiny):
    """C07."""
    with pytest.raises(MismatchError, match="has no EMA weights .*; load it with use_ema=False"):
        load_latent_diffusion(tiny.path, config=tiny.config, use_ema=True)


def test_a_model_that_keeps_an_average_gets_both(tiny, tmp_path, ema_tensors):
    model, report = load_latent_diffusion(tiny.save(tmp_path, ema_tensors), config=with_ema(tiny.config))
    assert len(report.assigned) == len(ema_tensors) and not report.ignored
    assert torch.equal(model.state_dict()[PARAMETER], tiny.tensors[PARAMETER])
    with model.ema_scope():
        assert torch.equal(model.state_dict()[PARAMETER], tiny.tensors[PARAMETER] * 0.5)
    assert model.model_ema.num_updates == 7


@pytest.mark.parametrize("use_ema", [None, False])
def test_an_average_is_seeded_from_the_loaded_weights(tiny, use_ema):
    """Otherwise sampling within ema_scope would come from random weights."""
    model, report = load_latent_diffusion(tiny.path, config=with_ema(tiny.config), use_ema=use_ema)
    plain = model.state_dict()[PARAMETER].clone()
    with model.ema_scope():
        assert torch.equal(model.state_dict()[PARAMETER], plain) and torch.equal(
            plain, tiny.tensors[PARAMETER]
        )
    assert report.initialised[ema_name(PARAMETER)] == "seeded from the loaded weights"
    assert report.initialised[f"{EMA}num_updates"] == "computed from the configuration"
    assert "seeded from the loaded weights" in report.notes[0]
    shadow = model.state_dict()[ema_name(PARAMETER)]
    assert shadow.data_ptr() != model.state_dict()[PARAMETER].data_ptr()


@pytest.mark.parametrize(("use_ema", "factor"), [(False, 1.0), (True, 0.5)])
def test_a_choice_holds_inside_and_outside_of_ema_scope(tiny, tmp_path, ema_tensors, use_ema, factor):
    path = tiny.save(tmp_path, ema_tensors)
    model, report = load_latent_diffusion(path, config=with_ema(tiny.config), use_ema=use_ema)
    wanted = tiny.tensors[PARAMETER] * factor
    assert torch.equal(model.state_dict()[PARAMETER], wanted)
    with model.ema_scope():
        assert torch.equal(model.state_dict()[PARAMETER], wanted)
    assert report.total == len(ema_tensors)


def test_averages_stay_float32_in_a_half_model(tiny, tmp_path, ema_tensors):
    path = tiny.save(tmp_path, ema_tensors)
    model, _ = load_latent_diffusion(path, config=with_ema(tiny.config), dtype=torch.float16)
    state = model.state_dict()
    assert state[PARAMETER].dtype == torch.float16 and state[ema_name(PARAMETER)].dtype == torch.float32


def partly(tensors, keep_plain=1.0, keep_average=1.0):
    """Keep only the first share of the UNet's plain weights and of its averages."""
    plain = [name for name in tensors if name.startswith(UNET)]
    average = [name for name in tensors if name.startswith(f"{EMA}diffusion_model")]
    dropped = {*plain[int(keep_plain * len(plain)) :], *average[int(keep_average * len(average)) :]}
    return {name: value for name, value in tensors.items() if name not in dropped}


INCOMPLETE = (
    r"holds 104 of 208 tensors of its moving average \(model_ema\.\*\), without 'model_ema\.diffusion_model"
)
# (share of plain weights, share of averages, does the model keep one, use_ema) -> factor of the weights, or the error
AVERAGES = {
    "half an average, asked for": (1, 0.5, False, True, INCOMPLETE + ".*use_ema=False"),
    "half an average, asked for, kept": (1, 0.5, True, True, INCOMPLETE),
    "half an average, kept by the model": (1, 0.5, True, None, INCOMPLETE),
    "half an average, not needed": (1, 0.5, False, None, 1.0),
    "half an average, not wanted": (1, 0.5, True, False, 1.0),
    "only an average": (0, 1, False, None, 0.5),
    "only an average, asked for": (0, 1, False, True, 0.5),
    "only an average, kept": (0, 1, True, None, 0.5),
    "only an average, kept and asked for": (0, 1, True, True, 0.5),
    "only an average, not wanted": (0, 1, False, False, "as a moving average only .*use_ema=True"),
    "only an average, kept, not wanted": (0, 1, True, False, "as a moving average only .*use_ema=True"),
    "only half an average": (0, 0.5, False, None, INCOMPLETE + ".*get the file again"),
    "only half an average, asked for": (0, 0.5, False, True, INCOMPLETE),
    "half of the plain weights": (0.5, 1, False, None, "104 of the model's .* missing"),
    "half of the plain weights, the average asked for": (0.5, 1, False, True, 0.5),
    "neither": (0, 0, False, None, "a VAE and a text encoder without a UNet"),
}


@pytest.mark.parametrize("case", AVERAGES)
@pytest.mark.thinned(3)
def test_no_weights_are_mixed_of_an_average_and_plain_ones(tiny, tmp_path, ema_tensors, case):
    keep_plain, keep_average, keeps, use_ema, wanted = AVERAGES[case]
    path = tiny.save(tmp_path, partly(ema_tensors, keep_plain, keep_average))
    config = with_ema(tiny.config) if keeps else tiny.config
    if isinstance(wanted, str):
        with pytest.raises(MismatchError, match=wanted) as caught:
            load_latent_diffusion(path, config=config, use_ema=use_ema)
        assert len(str(caught.value).replace(str(tmp_path), "")) <= 360
        return
    model, report = load_latent_diffusion(path, config=config, use_ema=use_ema)
    state = model.state_dict()
    for name, value in tiny.tensors.items():
        factor = wanted if name.startswith(UNET) else 1.0
        assert torch.equal(state[name], value * factor), name
    if keep_plain == 0:
        assert "the UNet is in the file as a moving average only, which was loaded" in report.notes
    if keeps:
        with model.ema_scope():
            assert torch.equal(model.state_dict()[PARAMETER], tiny.tensors[PARAMETER] * wanted)


def vae_average(tiny, share=1.0, prefix=VAE):
    """The VAE as LitEma names its average: half as large."""
    own = [name.removeprefix(VAE) for name in tiny.tensors if name.startswith(VAE)]
    return {
        f"{prefix}model_ema.{name.replace('.', '')}": tiny.tensors[VAE + name] * 0.5
        for name in own[: int(share * len(own))]
    }


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_vae_that_is_only_an_average_is_loaded_and_said(tiny, tmp_path, prefix):
    key = f"{VAE}decoder.conv_in.weight"
    rest = {} if prefix == "" else {n: v for n, v in tiny.tensors.items() if not n.startswith(VAE)}
    path = tiny.save(tmp_path, {**rest, **vae_average(tiny, prefix=prefix)})
    model, report = load_latent_diffusion(tiny.path if prefix == "" else path, config=tiny.config)
    report = load_vae(model, path) if prefix == "" else report
    assert torch.equal(model.state_dict()[key], tiny.tensors[key] * 0.5)
    assert "the VAE is in the file as a moving average only, which was loaded" in report.notes


@pytest.mark.parametrize("prefix", ["", VAE])
def test_half_a_vaes_average_is_refused_where_it_is_all_there_is(tiny, tmp_path, prefix):
    rest = {} if prefix == "" else {n: v for n, v in tiny.tensors.items() if not n.startswith(VAE)}
    path = tiny.save(tmp_path, {**rest, **vae_average(tiny, 0.5, prefix)})
    with pytest.raises(MismatchError, match="holds 62 of 124 tensors of its VAE's moving average"):
        if prefix:
            load_latent_diffusion(path, config=tiny.config)
        else:
            load_latent_diffusion(tiny.path, config=tiny.config, vae=path)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_vaes_average_beside_its_weights_is_left_out(tiny, tmp_path, share):
    path = tiny.save(tmp_path, {**tiny.tensors, **vae_average(tiny, share)})
    model, report = load_latent_diffusion(path, config=tiny.config)
    assert set(report.ignored.values()) == {"a moving average of the VAE"}
    key = f"{VAE}decoder.conv_in.weight"
    assert torch.equal(model.state_dict()[key], tiny.tensors[key])


# --- dtypes, values, devices, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_are_cast_and_tables_are_not(tiny, dtype):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.alphas_cumprod.dtype == torch.float32
    assert torch.equal(model.state_dict()[FIRST], tiny.tensors[FIRST].to(dtype))


def test_the_first_stage_can_have_a_dtype_of_its_own(tiny):
    model, _ = load_latent_diffusion(
        tiny.path, config=tiny.config, dtype=torch.float16, vae_dtype=torch.float32, vae=tiny.path
    )
    assert {p.dtype for p in model.model.parameters()} == {torch.float16}
    assert {p.dtype for p in model.cond_stage_model.parameters()} == {torch.float16}
    assert {p.dtype for p in model.first_stage_model.parameters()} == {torch.float32}
    name = "first_stage_model.quant_conv.weight"
    assert torch.equal(model.state_dict()[name], tiny.tensors[name].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(tiny, tmp_path, value):
    """B15."""
    bad = tiny.tensors[FIRST].clone()
    bad[3, 1, 2, 0] = value
    with pytest.raises(NumericError, match=f"'{FIRST}' holds values that are not finite"):
        load_latent_diffusion(tiny.save(tmp_path, changed(tiny.tensors, **{FIRST: bad})), config=tiny.config)


def test_an_overflow_in_the_cast_is_named(tiny, tmp_path):
    """B16."""
    large = tiny.tensors[FIRST].clone()
    large[0, 0, 0, 0] = -1e6
    path = tiny.save(tmp_path, changed(tiny.tensors, **{FIRST: large}))
    with pytest.raises(
        NumericError,
        match=f"'{FIRST}' reaches 1e[+]06, too large for float16; load it as float32 or bfloat16",
    ):
        load_latent_diffusion(path, config=tiny.config, dtype=torch.float16)
    model, _ = load_latent_diffusion(path, config=tiny.config, dtype=torch.bfloat16)
    assert torch.isfinite(model.state_dict()[FIRST]).all()


def test_the_largest_half_value_is_no_overflow(tiny, tmp_path):
    large = torch.full_like(tiny.tensors[FIRST], 65519.0)  # rounds to 65504, float16's largest
    path = tiny.save(tmp_path, changed(tiny.tensors, **{FIRST: large}))
    model, _ = load_latent_diffusion(path, config=tiny.config, dtype=torch.float16)
    assert model.state_dict()[FIRST].max() == 65504


def test_an_unknown_dtype_or_device_is_refused(tiny):
    """C12."""
    with pytest.raises(UsageError, match="dtype should be one of torch.float32"):
        load_latent_diffusion(tiny.path, config=tiny.config, dtype=torch.int8)
    with pytest.raises(UsageError, match="device 'cuda:99' is not available; have: cpu"):
        load_latent_diffusion(tiny.path, config=tiny.config, device="cuda:99")
    with pytest.raises(UsageError, match="device 'gpu' is not available"):
        load_latent_diffusion(tiny.path, config=tiny.config, device="gpu")


# As each library says it.
NO_MEMORY = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation: std::bad_alloc"),
    RuntimeError("unable to mmap 4265146304 bytes from file: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    OSError(12, "Cannot allocate memory"),
    OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    MemoryError(),
]
SOMETHING_ELSE = [
    RuntimeError("could not create a primitive descriptor for a convolution"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("memory format option is only supported by strided tensors"),
    OSError(28, "No space left on device"),
    ValueError("out of memory"),
    ResourceError("said already: out of memory"),
    KeyError("out of memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_every_library_s_word_for_too_little_memory_is_known(error):
    assert is_out_of_memory(error)


def test_too_little_memory_is_said_with_sizes(tiny, monkeypatch):
    """C13."""

    def no_memory(*args, **kwargs):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr("ldm.checkpoints.safe.SafetensorsWeights.read", no_memory)
    with pytest.raises(ResourceError, match=r"the model takes 0\.01 GiB in float32; load it as float16"):
        load_latent_diffusion(tiny.path, config=tiny.config)


def test_too_little_memory_to_build_or_open_is_said_too(tiny, monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("ldm.checkpoints.build.build_empty", no_memory)
    with pytest.raises(
        ResourceError, match="not enough memory to load '.*tiny.safetensors'; load it as float16"
    ):
        load_latent_diffusion(tiny.path, config=tiny.config)


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=str)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_a_model_keeps_its_weights_whatever_becomes_of_the_file(tiny, tmp_path):
    """A mapped file that is cut would end the process without a word."""
    path = tiny.save(tmp_path, tiny.tensors)
    model, _ = load_latent_diffusion(path, config=tiny.config)
    path.write_bytes(b"nothing")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.tensors.items())


def test_weights_of_zeros_are_said(tiny, tmp_path, caplog):
    """A download that stopped paints grey; a fresh network's zero layers are no reason for a word."""
    keys = [f"{VAE}decoder.conv_in.weight", f"{UNET}out.2.weight", f"{UNET}out.2.bias"]
    path = tiny.save(tmp_path, {n: torch.zeros_like(v) if n in keys else v for n, v in tiny.tensors.items()})
    _, report = load_latent_diffusion(path, config=tiny.config)
    assert f"1 of 368 tensors are all zeros ('{keys[0]}')" in report.notes[-1]
    assert report.notes[-1] in caplog.text
    load_latent_diffusion(tiny.path, config=tiny.config)
    assert caplog.text.count("all zeros") == 1


def test_loading_says_what_it_did_in_the_log(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="ldm.checkpoints"):
        _, report = load_latent_diffusion(tiny.path, config=tiny.config)
    assert report.summary() in caplog.text


# --- VAE files ------------------------------------------------------------------------------------------------------


def vae_state(tiny, factor=2.0):
    return {n.removeprefix(VAE): v * factor for n, v in tiny.tensors.items() if n.startswith(VAE)}


def test_a_vae_of_its_own_replaces_the_files(tiny, tmp_path):
    path = tiny.save(tmp_path, {**vae_state(tiny), "loss.logvar": torch.zeros(())}, "vae.safetensors")
    model, report = load_latent_diffusion(tiny.path, config=tiny.config, vae=path)
    key = f"{VAE}decoder.conv_out.weight"
    assert torch.equal(model.state_dict()[key], tiny.tensors[key] * 2)
    assert torch.equal(model.state_dict()[FIRST], tiny.tensors[FIRST])
    assert (
        report.ignored[key].startswith("replaced by the VAE of")
        and "vae.safetensors" in report.initialised[key]
    )
    assert "VAE, 124 of 125 tensors assigned" in report.notes[0]


@pytest.mark.parametrize("prefix", ["", VAE])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.thinned(3)
def test_a_vae_loads_into_a_model_with_and_without_prefix(tiny, tmp_path, prefix, suffix):
    state = {prefix + name: value for name, value in vae_state(tiny).items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
        path = tmp_path / "vae.ckpt"
    else:
        path = tiny.save(tmp_path, state, "vae.safetensors")
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config, dtype=torch.bfloat16)
    report = load_vae(model, path)
    weight = model.first_stage_model.decoder.conv_out.weight
    assert len(report.assigned) == 124 and report.family == "VAE"
    assert torch.equal(weight, (tiny.tensors[f"{VAE}decoder.conv_out.weight"] * 2).bfloat16())
    assert not weight.requires_grad


def test_a_vae_loads_out_of_a_full_model_into_an_autoencoder(tiny):
    params = tiny.config["model"]["params"]["first_stage_config"]["params"]
    vae = AutoencoderKL(**params)
    report = load_vae(vae, tiny.path)
    assert len(report.assigned) == 124
    assert set(report.ignored.values()) == {"not part of the VAE"}
    assert torch.equal(vae.quant_conv.weight, tiny.tensors[f"{VAE}quant_conv.weight"])
    assert vae.quant_conv.weight.requires_grad


def test_a_vae_that_does_not_fit_changes_nothing(tiny, tmp_path):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    before = model.first_stage_model.quant_conv.weight.clone()
    state = vae_state(tiny)
    state["decoder.conv_out.weight"] = torch.full_like(state["decoder.conv_out.weight"], torch.nan)
    with pytest.raises(NumericError, match="'decoder.conv_out.weight' holds values that are not finite"):
        load_vae(model, tiny.save(tmp_path, state))
    del state["decoder.conv_out.weight"]
    with pytest.raises(MismatchError, match="1 of the model's 124 tensors missing"):
        load_vae(model, tiny.save(tmp_path, state))
    with pytest.raises(MismatchError, match="holds no VAE that fits: it is a UNet only"):
        load_vae(model, tiny.save(tmp_path, {FIRST: torch.ones(2, 3)}))
    assert torch.equal(model.first_stage_model.quant_conv.weight, before)


def test_keys_to_ignore_stay_as_they_are(tiny, tmp_path):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    report = load_vae(model, tiny.save(tmp_path, vae_state(tiny)), ignore_keys=["decoder."])
    assert set(report.ignored.values()) == {"left out by ignore"}
    assert torch.equal(
        model.state_dict()[f"{VAE}decoder.conv_in.bias"], tiny.tensors[f"{VAE}decoder.conv_in.bias"]
    )
    assert torch.equal(
        model.state_dict()[f"{VAE}encoder.conv_in.bias"], tiny.tensors[f"{VAE}encoder.conv_in.bias"] * 2
    )


# --- text encoder ---------------------------------------------------------------------------------------------------


def test_another_tokenizer_can_be_given(tiny, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tiny.folder / "text" / name).read_bytes())
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config, tokenizer=tmp_path)
    assert model.cond_stage_model.tokenizer.origin == str(tmp_path)


def test_a_configuration_with_a_foreign_target_is_refused(tiny):
    config = copy.deepcopy(tiny.config)
    config["model"]["params"]["cond_stage_config"] = {"target": "os.system", "params": {"command": "true"}}
    with pytest.raises(UnsafeFileError, match="os.system"):
        load_latent_diffusion(tiny.path, config=config)


# --- places that are not on this machine ----------------------------------------------------------------------------

DOORS = {
    "from_single_file": lambda path, tiny: ldm.StableDiffusion.from_single_file(path),
    "its config": lambda path, tiny: load_latent_diffusion(tiny.path, config=path),
    "its vae": lambda path, tiny: load_latent_diffusion(tiny.path, config=tiny.config, vae=path),
    "its tokenizer": lambda path, tiny: load_latent_diffusion(tiny.path, config=tiny.config, tokenizer=path),
    "from_pretrained": lambda path, tiny: ldm.StableDiffusion.from_pretrained(path),
    "load_vae": lambda path, tiny: load_vae(torch.nn.Linear(2, 3), path),
    "inspect": lambda path, tiny: checkpoints.inspect(path),
    "open_weights": lambda path, tiny: checkpoints.open_weights(path),
    "read_object": lambda path, tiny: checkpoints.read_object(path),
    "OpenAI's": lambda path, tiny: load_openai_model(path),
    "load_config": lambda path, tiny: load_config(path),
    "find_tokenizer": lambda path, tiny: find_tokenizer(path, vocab_size=9),
}


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        (
            "https://host/a/v1-5.safetensors",
            UsageError,
            "'https://host/a/v1-5.safetensors' is an address: nothing is",
        ),
        (
            Path("http://host/v1.ckpt"),
            UsageError,
            "'http:/host/v1.ckpt' is an address: nothing is downloaded here",
        ),
        ("hf://owner/name", UsageError, "is an address: nothing is downloaded here; fetch it yourself"),
        ("s3://bucket/key.yaml", UsageError, "is an address"),
        ("file:///models/v1.safetensors", UsageError, "is an address"),
        (
            "runwayml/stable-diffusion-v1-5",
            AbsentError,
            "names on a hub are not looked up, and nothing is downloaded",
        ),
        ("stabilityai/sd-vae-ft-mse", AbsentError, "fetch it yourself and give its file or folder"),
        ("owner/name-1.5", AbsentError, "names on a hub are not looked up"),
    ],
)
@pytest.mark.parametrize("door", DOORS)
def test_what_lies_on_a_network_is_not_fetched(tiny, door, path, kind, words):
    with pytest.raises(kind) as caught:
        DOORS[door](path, tiny)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) <= 400


@pytest.mark.parametrize(
    "path",
    ["nowhere/v1.safetensors", "tests/nowhere", "C:/models/v1.ckpt", "a/b/c", "plain", "./x/y", "/x/y"],
)
def test_other_paths_that_are_not_there_are_paths(path):
    with pytest.raises(AbsentError, match=r"is not there; (check the path|did you mean)"):
        checkpoints.open_weights(path)


def test_what_is_there_is_read_whatever_its_name(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    Path("hf:").mkdir()
    shutil.copy(tiny.path, "hf:/name")
    assert checkpoints.open_weights("hf:/name").infos.keys() == tiny.tensors.keys()
