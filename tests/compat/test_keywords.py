"""Keywords that nobody knows are refused by name; those that CompVis's published callers give are known."""

import inspect
import logging

import pytest
import torch
from tiny import tiny_model

from ldm.models import autoencoder
from ldm.models.diffusion import ddpm, image_log
from ldm.modules.diffusionmodules import openaimodel

X = torch.zeros(1, 4, 8, 8)
T = torch.zeros(1)
CONTEXT = torch.zeros(1, 5, 128)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


UNKNOWN = [
    (lambda m: m.model.diffusion_model(X, T, CONTEXT, controls=[X]), "controls"),
    (lambda m: m.model.diffusion_model(X, T, CONTEXT, hint=X), "hint"),
    (lambda m: m.model.diffusion_model(X, timestep=T), "timestep"),
    (lambda m: m.model(X, T, c_crossattn=[CONTEXT], c_control=[X]), "c_control"),
    (lambda m: m.apply_model(X, T, CONTEXT, control=[X]), "control"),
    (lambda m: m.first_stage_model(X, sample_posteriors=False), "sample_posteriors"),
    (lambda m: m.first_stage_model.encode(X, tiled=True), "tiled"),
    (lambda m: m.first_stage_model.decode(X, tiled=True), "tiled"),
    (lambda m: m.decode_first_stage(X, force_quantize=True), "force_quantize"),
    (lambda m: m.encode_first_stage(X, tiled=True), "tiled"),
    (lambda m: m.shared_step({}, optimizer_idx=0), "optimizer_idx"),
    (lambda m: m(X, CONTEXT, noises=X), "noises"),
    (lambda m: m.log_images({}, ddim_step=3), "ddim_step"),
    (lambda m: m.sample(CONTEXT, start=3), "start"),
    (lambda m: autoencoder.IdentityFirstStage().encode(X, tiled=True), "tiled"),
    (lambda m: autoencoder.IdentityFirstStage()(X, tiled=True), "tiled"),
    (lambda m: m.first_stage_model.log_images({}, only_input=True), "only_input"),
]


@pytest.mark.parametrize(("call", "name"), UNKNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_an_unknown_keyword_is_a_type_error_that_names_it(model, call, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        call(model)


def test_an_upsampler_hands_its_keywords_to_the_unet_which_refuses_them():
    network = openaimodel.SuperResModel(
        16, 3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=[], num_heads=1
    )
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'controls'"):
        network(x, T, low_res=x, controls=[x])


# (callable, the keywords that CompVis's scripts, its ImageLogger and its own methods give)
KNOWN = [
    (autoencoder.AutoencoderKL.log_images, {"split", "only_inputs"}),
    (autoencoder.VQModel.log_images, {"split", "only_inputs", "plot_ema"}),
    (image_log.ImageLog.log_images, {"split", "N", "n_row", "sample", "return_keys"}),
    (image_log.LatentImageLog.log_images, {"split", "N", "n_row", "ddim_steps", "ddim_eta", "inpaint"}),
    (ddpm.LatentDiffusion.apply_model, {"return_ids"}),
    (
        ddpm.LatentFinetuneDiffusion.get_input,
        {"cond_key", "bs", "return_first_stage_outputs", "force_c_encode", "return_original_cond"},
    ),
    (autoencoder.IdentityFirstStage.decode, {"force_not_quantize"}),
]


@pytest.mark.parametrize(("method", "names"), KNOWN, ids=lambda v: getattr(v, "__qualname__", ""))
def test_the_keywords_of_published_callers_are_known(method, names):
    assert names <= set(inspect.signature(method).parameters)


def test_a_first_stage_without_parts_names_the_parameters_that_it_has_no_use_for(caplog):
    with caplog.at_level(logging.WARNING):
        autoencoder.IdentityFirstStage(3, embed_dim=4, vq_interface=True)
    assert caplog.messages == ["IdentityFirstStage has no parts; without effect: 3, embed_dim"]
    caplog.clear()
    autoencoder.IdentityFirstStage(vq_interface=True)
    assert caplog.messages == []
