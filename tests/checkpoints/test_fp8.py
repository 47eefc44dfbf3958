"""Weights in 8 bits: loaded into the wanted dtype, with their scales, and looked at like any others."""

import pytest
import torch

from ldm.checkpoints import inspect, load_latent_diffusion, load_vae
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE
from ldm.errors import MismatchError, NumericError

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FIRST = f"{UNET}input_blocks.0.0.weight"
LINEAR = f"{UNET}time_embed.0.weight"
QUERY = f"{TEXT}transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"


def in_8_bits(tensors, dtype, which=lambda name, value: value.dim() > 1):
    return {name: value.to(dtype) if which(name, value) else value for name, value in tensors.items()}


@pytest.mark.parametrize("stored", FP8)
@pytest.mark.parametrize("wanted", [None, torch.float16, torch.bfloat16])
@pytest.mark.thinned(3)
def test_all_in_8_bits_become_the_wanted_dtype(tiny, tmp_path, stored, wanted):
    tables = {"betas": torch.ones(1000) * 0.005, "alphas_cumprod": torch.ones(1000) * 0.5}
    everything = in_8_bits({**tiny.tensors, **tables}, stored, lambda *_: True)
    tensors = {name: value for name, value in everything.items() if name not in tables}
    path = tiny.save(tmp_path, everything)
    model, report = load_latent_diffusion(path, config=tiny.config, dtype=wanted)
    state = model.state_dict()
    assert len(report.assigned) == len(tensors)
    for name, value in tensors.items():
        assert state[name].dtype == (wanted or torch.float32)
        assert torch.equal(state[name].float(), value.to(wanted or torch.float32).float()), name


@pytest.mark.parametrize("stored", FP8)
@pytest.mark.thinned(2)
def test_some_in_8_bits_and_the_rest_in_half_precision(tiny, tmp_path, stored):
    """As people save them: matrices in 8 bits, biases and norms in 16."""
    tensors = in_8_bits({n: v.half() for n, v in tiny.tensors.items()}, stored)
    path = tiny.save(tmp_path, tensors)
    torch.save({"state_dict": tensors}, tmp_path / "changed.ckpt")
    for file in (path, tmp_path / "changed.ckpt"):
        state = load_latent_diffusion(file, config=tiny.config)[0].state_dict()
        assert all(torch.equal(state[name], value.float()) for name, value in tensors.items())
    summary = inspect(path, config=tiny.config)
    assert summary.problem is None and str(stored).removeprefix("torch.") + " x " in str(summary)
    assert {str(stored).removeprefix("torch."), "float16"} == summary.parts["UNet"].dtypes.keys()


@pytest.mark.parametrize("stored", FP8)
def test_a_vae_in_8_bits_loads_too(tiny, tmp_path, stored):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    own = {n.removeprefix(VAE): v.to(stored) for n, v in tiny.tensors.items() if n.startswith(VAE)}
    load_vae(model, tiny.save(tmp_path, own))
    state = model.first_stage_model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in own.items())


@pytest.mark.parametrize(
    ("stored", "pattern"),
    [
        (torch.float8_e4m3fn, 0x7F),  # its two NaN; it has no infinity
        (torch.float8_e4m3fn, 0xFF),
        (torch.float8_e5m2, 0x7C),  # infinity
        (torch.float8_e5m2, 0xFC),
        (torch.float8_e5m2, 0x7D),  # NaN
        (torch.float8_e5m2, 0xFF),
    ],
)
@pytest.mark.thinned(3)
def test_what_is_not_finite_in_8_bits_is_named(tiny, tmp_path, stored, pattern):
    bad = tiny.tensors[FIRST].to(stored)
    bad.view(torch.uint8)[3, 1, 2, 0] = pattern
    path = tiny.save(tmp_path, {**tiny.tensors, FIRST: bad})
    with pytest.raises(NumericError, match=f"'{FIRST}' holds values that are not finite"):
        load_latent_diffusion(path, config=tiny.config)
    assert isinstance(inspect(path, config=tiny.config).problem, NumericError)


# --- ComfyUI's scales -------------------------------------------------------------------------------------------------


def scaled(tensors, names, end=".scale_weight", shape=()):
    """Store weights as 8-bit values of full range and the factors that bring them back."""
    out, wanted = dict(tensors), {}
    for name in names:
        rows = tensors[name].flatten(1).abs().amax(1) if shape else tensors[name].abs().max()
        scale = (rows / 448).float()
        values = (tensors[name] / scale.reshape(-1, *[1] * (tensors[name].dim() - 1))).to(torch.float8_e4m3fn)
        out[name] = values
        out[name.removesuffix(".weight") + end] = scale.reshape(-1, 1).contiguous() if shape else scale
        wanted[name] = values.float() * scale.reshape(-1, *[1] * (tensors[name].dim() - 1))
    return out, wanted


@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("shape", [(), "a row"])
def test_scaled_weights_are_multiplied_by_their_scales(tiny, tmp_path, end, shape):
    tensors, wanted = scaled(tiny.tensors, [LINEAR, QUERY, FIRST], end, shape)
    extra = {
        "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        LINEAR.replace(".weight", ".scale_input"): torch.ones(()),
        QUERY.replace(".weight", ".comfy_quant"): torch.zeros(5, dtype=torch.uint8),
    }
    path = tiny.save(tmp_path, {**tensors, **extra})
    model, report = load_latent_diffusion(path, config=tiny.config)
    state = model.state_dict()
    for name, value in tiny.tensors.items():
        assert torch.equal(state[name], wanted.get(name, value)), name
        assert name not in wanted or (state[name] - value).abs().max() < 0.05 * value.abs().max()
    assert report.ignored[LINEAR.replace(".weight", end)] == "a scale, multiplied into its weight"
    assert report.ignored.keys() == {*extra, *(n.replace(".weight", end) for n in wanted)}


def test_scales_follow_their_weights_names(tiny, tmp_path):
    """Under ComfyUI's own prefixes and diffusers' names."""
    from ldm.checkpoints.key_mapping import unet_to_diffusers

    tensors, wanted = scaled(tiny.tensors, [LINEAR, QUERY])
    table = unet_to_diffusers([n.removeprefix(UNET) for n in tiny.tensors if n.startswith(UNET)])

    def spell(name):
        inner = name.removeprefix(UNET)
        if name == LINEAR.replace(".weight", ".scale_weight"):
            return "unet." + table["time_embed.0.weight"].replace(".weight", ".scale_weight")
        if name.startswith(UNET):
            return f"unet.{table[inner]}"
        return name.replace(f"{TEXT}transformer.", "text_encoders.clip_l.transformer.")

    path = tiny.save(tmp_path, {spell(name): value for name, value in tensors.items()})
    state = load_latent_diffusion(path, config=tiny.config)[0].state_dict()
    assert all(torch.equal(state[name], wanted.get(name, value)) for name, value in tiny.tensors.items())


@pytest.mark.parametrize(
    ("scale", "kind", "words"),
    [
        (
            torch.ones(3),
            MismatchError,
            r"the scale of '.*' has the shape \[3\]; wanted one value, or one for each of 128",
        ),
        (torch.tensor(float("nan")), NumericError, "holds values that are not finite"),
        (torch.tensor(float("inf")), NumericError, "holds values that are not finite"),
    ],
)
def test_a_scale_that_is_none_is_refused(tiny, tmp_path, scale, kind, words):
    tensors, _ = scaled(tiny.tensors, [LINEAR])
    tensors[LINEAR.replace(".weight", ".scale_weight")] = scale
    with pytest.raises(kind, match=words):
        load_latent_diffusion(tiny.save(tmp_path, tensors), config=tiny.config)


def test_a_scale_that_carries_a_weight_beyond_half_precision_is_named(tiny, tmp_path):
    tensors, _ = scaled(tiny.tensors, [LINEAR])
    tensors[LINEAR.replace(".weight", ".scale_weight")] = torch.tensor(1e6)
    path = tiny.save(tmp_path, tensors)
    with pytest.raises(NumericError, match="too large for float16"):
        load_latent_diffusion(path, config=tiny.config, dtype=torch.float16)


def test_a_scale_without_its_weight_is_not_expected(tiny, tmp_path):
    path = tiny.save(tmp_path, {**tiny.tensors, "model.diffusion_model.nothing.scale_weight": torch.ones(())})
    with pytest.raises(
        MismatchError, match="1 of the file's .* not expected .'model.diffusion_model.nothing.scale"
    ):
        load_latent_diffusion(path, config=tiny.config)
