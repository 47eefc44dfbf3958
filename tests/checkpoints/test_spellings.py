"""The same v1 model as different programs spell it: every tensor arrives at its place with its values."""

import contextlib
import re

import pytest
import torch
from make_synthetic import make_tensors

from ldm.checkpoints import inspect, load_latent_diffusion, load_vae, open_weights
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.families import family_of
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE, canonical, unet_to_diffusers, vae_to_diffusers
from ldm.checkpoints.matching import match_model
from ldm.checkpoints.report import TensorInfo
from ldm.errors import MismatchError

CLIP = f"{TEXT}transformer.text_model."
ATTENTION = re.compile(r"((?:.*\.)?mid\.attn_1\.)(norm|q|k|v|proj_out)(\.\w+)")
NEW = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def renamed(old, new):
    """Replace a beginning of names."""
    return lambda name, value: (new + name.removeprefix(old) if name.startswith(old) else name, value)


def attention(words, shape):
    """Rename the VAE's attention and give its weights, and with them its biases, another number of dimensions."""

    def spell(name, value):
        if m := ATTENTION.fullmatch(name):
            return m[1] + (words or {m[2]: m[2]})[m[2]] + m[3], shape(value)
        return name, value

    return spell


def linear(value):
    return value[..., 0, 0].clone() if value.dim() == 4 else value


def with_ones(value):
    return value[:, None, None].clone() if value.dim() == 1 else value


def unet_as_diffusers(name, value):
    return (f"unet.{UNET_NAMES[name]}", value) if name in UNET_NAMES else (name, value)


def vae_as_diffusers(name, value):
    value = linear(value) if ATTENTION.fullmatch(name) else value
    return (f"vae.{VAE_NAMES[name]}", value) if name in VAE_NAMES else (name, value)


UNET_NAMES: dict[str, str] = {}
VAE_NAMES: dict[str, str] = {}

SPELLINGS = {
    "diffusers' export, linear attention": [attention(None, linear)],
    "diffusers' export, biases as (c, 1, 1)": [attention(None, with_ones)],
    "diffusers' export, weights as (c, c), biases as (c, 1, 1)": [
        attention(None, lambda v: linear(with_ones(v)))
    ],
    "diffusers' export, new names": [attention(NEW, lambda v: v)],
    "diffusers' export, new names and linear": [attention(NEW, linear)],
    "diffusers' export, old names": [attention(OLD, linear)],
    "CLIP without text_model": [renamed(CLIP, f"{TEXT}transformer.")],
    "CLIP without transformer": [renamed(CLIP, f"{TEXT}text_model.")],
    "CLIP without either": [renamed(CLIP, TEXT)],
    "CLIP under cond_stage_model.te": [renamed(CLIP, f"{TEXT}te.text_model.")],
    "CLIP under te": [renamed(CLIP, "te.text_model.")],
    "CLIP under te, without text_model": [renamed(CLIP, "te.")],
    "CLIP under te1": [renamed(CLIP, "te1.text_model.")],
    "CLIP under text_encoder": [renamed(CLIP, "text_encoder.text_model.")],
    "CLIP under text_encoder, transformers 5": [renamed(CLIP, "text_encoder.")],
    "CLIP under clip_l": [renamed(CLIP, "clip_l.transformer.text_model.")],
    "CLIP under clip_l, without transformer": [renamed(CLIP, "clip_l.text_model.")],
    "CLIP as ComfyUI writes it": [renamed(CLIP, "text_encoders.clip_l.transformer.text_model.")],
    "CLIP at the top": [renamed(CLIP, "text_model.")],
    "CLIP at the top, with transformer": [renamed(CLIP, "transformer.text_model.")],
    "CLIP in SDXL's place": [renamed(CLIP, "conditioner.embedders.0.transformer.text_model.")],
    "UNet under diffusion_model": [renamed(UNET, "diffusion_model.")],
    "UNet under unet": [renamed(UNET, "unet.")],
    "VAE under vae": [renamed(VAE, "vae.")],
    "all of ComfyUI's": [
        renamed(VAE, "vae."),
        renamed(CLIP, "text_encoders.clip_l.transformer.text_model."),
    ],
    "diffusers' UNet": [unet_as_diffusers],
    "diffusers' VAE": [vae_as_diffusers],
    "all of diffusers'": [unet_as_diffusers, vae_as_diffusers, renamed(CLIP, "text_encoder.text_model.")],
    "data-parallel training": [renamed("", "module.")],
    "torch.compile": [renamed(UNET, "model.diffusion_model._orig_mod.")],
}


@pytest.fixture(scope="module", autouse=True)
def tables(tiny):
    unet = [name.removeprefix(UNET) for name in tiny.tensors if name.startswith(UNET)]
    vae = [name.removeprefix(VAE) for name in tiny.tensors if name.startswith(VAE)]
    UNET_NAMES.update({UNET + ours: theirs for ours, theirs in unet_to_diffusers(unet).items()})
    VAE_NAMES.update({VAE + ours: theirs for ours, theirs in vae_to_diffusers(vae).items()})


def spelled(tensors, steps):
    out = {}
    for name, value in tensors.items():
        for step in steps:
            name, value = step(name, value)
        out[name] = value.contiguous()
    return out


@pytest.fixture(scope="module")
def empty(tiny):
    return build_empty(tiny.config)


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.thinned(3)
def test_every_spelling_is_of_v1_and_finds_its_place(tiny, tmp_path, empty, case):
    written = spelled(tiny.tensors, SPELLINGS[case])
    shapes = {name: value.shape for name, value in tiny.tensors.items()}
    assert {name: value.shape for name, value in written.items()} != shapes  # the case does spell otherwise
    with contextlib.closing(open_weights(tiny.save(tmp_path, written))) as source:
        assert family_of(source.infos) == "v1"
        report = match_model(empty, source, "v1")
        assert report.assigned.keys() == written.keys() and not report.ignored
        assert sorted(report.assigned.values()) == sorted(tiny.tensors)
        for name, target in report.assigned.items():
            wanted = tiny.tensors[target]
            assert torch.equal(source.read(name).reshape(wanted.shape), wanted), name


@pytest.mark.parametrize(
    "case", ["all of diffusers'", "diffusers' export, weights as (c, c), biases as (c, 1, 1)"]
)
def test_a_spelled_model_loads_with_its_values(tiny, tmp_path, case):
    path = tiny.save(tmp_path, spelled(tiny.tensors, SPELLINGS[case]))
    model, report = load_latent_diffusion(path, config=tiny.config)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tiny.tensors.items())
    assert any("sizes of 1 too many or too few" in note for note in report.notes)


VAE_CASES = [case for case, steps in SPELLINGS.items() if "export" in case or steps == [vae_as_diffusers]]


@pytest.mark.parametrize("prefix", ["", VAE, "vae."])
@pytest.mark.parametrize("case", VAE_CASES)
@pytest.mark.thinned(4)
def test_vae_files_load_in_every_spelling_with_and_without_prefix(tiny, tmp_path, vae_model, case, prefix):
    own = {name: value * 2 for name, value in tiny.tensors.items() if name.startswith(VAE)}
    written = {
        re.sub(r"^(first_stage_model|vae)\.", prefix, name): value
        for name, value in spelled(own, SPELLINGS[case]).items()
    }
    path = tiny.save(tmp_path, written)
    report = load_vae(vae_model, path)
    state = vae_model.state_dict()
    assert all(torch.equal(state[name.removeprefix(VAE)], value) for name, value in own.items())
    assert len(report.assigned) == len(written) and not report.ignored
    summary = inspect(path)
    assert summary.problem is None and summary.family.startswith("VAE")


@pytest.fixture(scope="module")
def vae_model(tiny):
    from ldm.models.autoencoder import AutoencoderKL

    return AutoencoderKL(**tiny.config["model"]["params"]["first_stage_config"]["params"])


@pytest.mark.parametrize("other", ["te.", "clip_l."])
def test_two_spellings_of_one_tensor_are_named_both(tiny, tmp_path, other):
    key = f"{CLIP}final_layer_norm.bias"
    both = {**tiny.tensors, other + "final_layer_norm.bias": tiny.tensors[key]}
    with pytest.raises(MismatchError, match="1 given twice") as caught:
        load_latent_diffusion(tiny.save(tmp_path, both), config=tiny.config)
    assert key in str(caught.value) and f"{other}final_layer_norm.bias" in str(caught.value)


def test_another_shape_is_none_of_these_spellings(tiny, tmp_path):
    key = f"{VAE}encoder.mid.attn_1.q.weight"
    wrong = tiny.tensors[key][:, :-1, :, :].contiguous()
    with pytest.raises(MismatchError, match="1 of another shape"):
        load_latent_diffusion(tiny.save(tmp_path, {**tiny.tensors, key: wrong}), config=tiny.config)


def test_attached_names_are_no_spelling_of_a_model():
    """A LoRA of the text encoder beside a UNet must not come to lie on its weights."""
    lora = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"
    assert "lora_linear_layer" in canonical([f"{UNET}out.2.bias", lora])[lora]


def test_an_inpainting_file_of_diffusers_names_is_one(tmp_path):
    from make_synthetic import tiny_config

    tensors = make_tensors(tiny_config(tmp_path, inpainting=True), dtype=torch.float32)
    names = unet_to_diffusers([n.removeprefix(UNET) for n in tensors if n.startswith(UNET)])
    spelled_so = {
        f"unet.{names[n.removeprefix(UNET)]}" if n.startswith(UNET) else n: v for n, v in tensors.items()
    }
    assert (
        family_of({n: TensorInfo(tuple(v.shape), v.dtype) for n, v in spelled_so.items()}) == "v1-inpainting"
    )
