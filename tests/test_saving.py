"""Saving a model: what is read back has equal bits, by us and by diffusers, and nothing half-written is left."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny import tiny_config, tiny_model

import ldm
from ldm import saving
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.configs import read_settings
from ldm.checkpoints.sampling import SamplingDefaults
from ldm.errors import OutputError, UsageError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.paths import shipped
from ldm.pipeline import StableDiffusion

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


NAMES = ["own.safetensors", "folder", "deep/er/own.safetensors", "v1.5/", "OWN.SAFETENSORS"]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def same_bits(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if "alphas" not in name and "posterior" not in name and not name.startswith("lvlb"):
            assert torch.equal(tensor, theirs[name]), name
    words = {"steps": 2, "seed": 5, "output_type": "latent"}
    assert torch.equal(one.txt2img(PROMPT, **words).latents, other.txt2img(PROMPT, **words).latents)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        *((name, 4) for name in NAMES),
        *((name, 9) for name in NAMES[:2]),
        *(pytest.param(name, 9, marks=pytest.mark.slow) for name in NAMES[2:]),
    ],
)
@pytest.mark.thinned(5)
def test_what_is_saved_is_read_back_with_equal_bits(sd, tmp_path, name, channels):
    sd = sd if channels == 4 else StableDiffusion(tiny_model(9))
    path = f"{tmp_path}/{name}"
    written = sd.save(path)
    assert all(one.exists() for one in written)
    same_bits(sd, StableDiffusion.from_single_file(path, device="cpu"))
    assert not [one for one in files(tmp_path) if ".part" in one]


def test_a_file_has_compviss_keys_and_a_folder_diffusers_parts(sd, tmp_path):
    from safetensors import safe_open

    assert [p.name for p in sd.save(tmp_path / "own.safetensors")] == ["own.safetensors", "own.yaml"]
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        heads = {".".join(key.split(".")[:2]) for key in file.keys()}  # noqa: SIM118
    assert {"model.diffusion_model", "first_stage_model.decoder", "cond_stage_model.transformer"} <= heads
    params = OmegaConf.load(tmp_path / "own.yaml").model.params
    assert params.unet_config.params.channel_mult == [1, 2] and params.use_ema is False
    assert sd.save(tmp_path / "folder") == [tmp_path / "folder"]
    have = files(tmp_path / "folder")
    for part in ("unet", "vae"):
        assert {f"{part}/config.json", f"{part}/diffusion_pytorch_model.safetensors"} <= set(have)
    wanted = {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"}
    assert wanted | {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(have)


@pytest.mark.slow
def test_the_box_is_saved_with_its_advice(tmp_path):
    box = StableDiffusion.default()
    box.save(tmp_path / "box.safetensors")
    again = StableDiffusion.from_single_file(tmp_path / "box.safetensors", device="cpu")
    assert again.defaults == box.defaults
    same_bits(box, again)
    with pytest.raises(
        UsageError, match=r"cannot describe this model \('unet/config.json': .*; save 'name.safetensors'"
    ):
        box.save(tmp_path / "box")  # other norms and heads than diffusers' v1 has
    assert files(tmp_path) == ["box.safetensors", "box.yaml"]


def test_diffusers_reads_the_folder_and_paints_the_same(sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    sd.save(tmp_path / "folder")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    theirs = pipe(
        PROMPT, height=64, width=64, num_inference_steps=4, guidance_scale=3.0, latents=x_T, output_type="np"
    ).images
    ours = sd.txt2img(PROMPT, steps=4, seed=7, guidance_scale=3.0, output_type="np").images
    assert np.abs(ours - theirs).max() < 1e-3 < ours.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.thinned(3)
def test_weights_keep_their_dtypes(tmp_path, dtype):
    from safetensors.torch import load_file

    sd = StableDiffusion(tiny_model())
    sd.model.model.to(dtype)
    sd.save(tmp_path / "half.safetensors")
    held = load_file(tmp_path / "half.safetensors")
    assert held["model.diffusion_model.out.2.weight"].dtype == dtype
    assert held["first_stage_model.decoder.conv_in.weight"].dtype == torch.float32
    again = StableDiffusion.from_single_file(tmp_path / "half.safetensors", device="cpu")
    unet = again.model.model.diffusion_model.state_dict()["out.2.weight"]
    assert torch.equal(unet, sd.model.model.diffusion_model.out[2].weight.float())


@pytest.mark.parametrize("name", ["own.safetensors", "folder"])
@pytest.mark.slow
def test_the_average_that_paints_is_what_is_saved(sd, tmp_path, name):
    model = LatentDiffusion(**tiny_config()["model"]["params"] | {"use_ema": True})
    model.load_state_dict(sd.model.state_dict(), strict=False)
    model.model_ema.copy_from(model.model)
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.add_(1)
    StableDiffusion(model).save(tmp_path / name)
    same_bits(sd, StableDiffusion.from_single_file(tmp_path / name, device="cpu"))
    assert (
        model.model.diffusion_model.out[2].weight - sd.model.model.diffusion_model.out[2].weight
    ).min() > 0.9


@pytest.mark.parametrize("name", ["own.ckpt", "own.safetensor", "a.png", "own.pt", "model.yaml", "v1.5"])
def test_another_ending_is_refused_before_anything_is_written(sd, tmp_path, name):
    with pytest.raises(UsageError, match="save writes 'name.safetensors' or a folder"):
        sd.save(tmp_path / name)
    assert files(tmp_path) == []


def test_a_folder_that_holds_something_and_a_file_in_the_way_are_left_alone(sd, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "file/below"):
        with pytest.raises(OutputError, match="cannot"):
            sd.save(tmp_path / name)
    assert files(tmp_path) == ["file", "full/mine.txt"]
    (tmp_path / "empty").mkdir()
    sd.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_an_interrupted_save_leaves_the_earlier_file_and_no_part(sd, tmp_path, monkeypatch):
    sd.save(tmp_path / "own.safetensors")
    before = (tmp_path / "own.safetensors").read_bytes()

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    for name in ("own.safetensors", "folder"):
        with pytest.raises(OutputError, match="No space left"):
            sd.save(tmp_path / name)
    assert files(tmp_path) == ["own.safetensors", "own.yaml"] == sorted(os.listdir(tmp_path))
    assert (tmp_path / "own.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "is_plain"),
    [
        ({}, True),
        ({"parameterization": "v"}, False),
        pytest.param({"linear_end": 0.02}, False, marks=pytest.mark.slow),  # each builds the whole of v1
        pytest.param({"scale_factor": 0.2}, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_plain_v1_needs_no_yaml(change, is_plain):
    settings = copy.deepcopy(read_settings(shipped("configs/v1-inference.yaml")))
    settings["model"]["params"].update(change)
    model = build_empty(settings)
    assert saving._difference(model, settings) is None
    assert saving._is_plain_v1(model, SamplingDefaults()) == is_plain


@pytest.mark.slow
def test_the_folders_index_names_classes_that_there_are(sd, tmp_path):
    import diffusers
    import transformers

    sd.save(tmp_path / "folder")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    for name, (library, cls) in ((n, v) for n, v in index.items() if isinstance(v, list) and v[0]):
        assert hasattr({"diffusers": diffusers, "transformers": transformers}[library], cls), name
    assert ldm.StableDiffusion.from_pretrained(tmp_path / "folder", device="cpu").defaults.steps == 50
