"""diffusers' words over our model, beside diffusers itself on the same weights; and the DDIM notebook in them."""

import copy
import json
import logging
import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image
from tiny import TEXT, tiny_config, tiny_model, write_tiny

import ldm
from ldm.checkpoints import save_safetensors
from ldm.diffusers_style import DDIMScheduler, StableDiffusionPipeline, load_image
from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.kernels.vae_tiling import SlicedForward, TiledForward
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.paths import shipped

diffusers = pytest.importorskip("diffusers")

PROMPT, NEGATIVE = "a large red circle on a white background", "a small blue square"
V1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(scope="module")
def ours():
    """The tiny model (eps, Stable Diffusion v1's schedule and scale) as a pipeline."""
    pipe = StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(ours):
    """diffusers' own pipeline, networks and tokenizer with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel.from_config(dict(ours.unet.config))
    vae = diffusers.AutoencoderKL.from_config(dict(ours.vae.config))
    unet.load_state_dict(ours.unet.state_dict())
    vae.load_state_dict(ours.vae.state_dict())
    text = CLIPTextModel(CLIPTextConfig(**json.loads((shipped(TEXT) / "config.json").read_text())))
    prefixed = next(iter(text.state_dict())).startswith("text_model.")
    weights = ours.text_encoder.state_dict()
    text.load_state_dict(
        weights if prefixed else {k.removeprefix("text_model."): v for k, v in weights.items()}
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=ours.sd.model.cond_stage_model.tokenizer._tokenizer,
        unet=unet.eval(), scheduler=diffusers.DDIMScheduler.from_config(dict(ours.scheduler.config)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(got, want, atol=1e-4):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=0, atol=atol)


# --- the scheduler, number by number ---


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 100])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_schedulers_steps_are_diffusers(spacing, steps, kind):
    if (spacing, steps) == ("linspace", 1):
        pytest.skip("a single step of theirs begins at the cleanest level, ours at the noisiest")
    settings = {
        **V1,
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": kind,
    }
    a, b = DDIMScheduler(**settings), diffusers.DDIMScheduler(**settings)
    a.set_timesteps(steps)
    b.set_timesteps(steps)
    assert a.timesteps.tolist() == b.timesteps.tolist()
    x, output = keyed_input("ds.x", (2, 4, 5, 3)), keyed_input("ds.o", (2, 4, 5, 3))
    for t in (a.timesteps[0], a.timesteps[len(a.timesteps) // 2], a.timesteps[-1]):
        got, want = a.step(output, t, x), b.step(output, t, x)
        size = 1 + want.pred_original_sample.abs().max().item()
        close(got.prev_sample, want.prev_sample, 2e-5 * size)
        close(got.pred_original_sample, want.pred_original_sample, 2e-5 * size)
        assert got[0] is got.prev_sample


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_sample": False, "set_alpha_to_one": False},
        {"clip_sample_range": 0.5},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 * (i + 1) for i in range(40)], "num_train_timesteps": 40},
        {"num_train_timesteps": 200},
    ],
)
@pytest.mark.parametrize("options", [{}, {"eta": 0.6}, {"eta": 1.0, "use_clipped_model_output": True}])
def test_defaults_and_options_of_schedulers_are_diffusers(changes, options):
    a, b = DDIMScheduler(**changes), diffusers.DDIMScheduler(**changes)
    torch.testing.assert_close(a.alphas_cumprod, b.alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert a.init_noise_sigma == b.init_noise_sigma and len(a) == b.config.num_train_timesteps
    x, output, noise = (keyed_input(f"dd.{name}", (2, 4, 5, 3)) for name in "xon")
    for one in (a, b):
        one.set_timesteps(10)
    assert a.timesteps.tolist() == b.timesteps.tolist()
    t = int(a.timesteps[4])
    extra = {**options, "variance_noise": noise} if options else {}
    got, want = a.step(output, t, x, **extra), b.step(output, t, x, **extra)
    close(got.prev_sample, want.prev_sample, 2e-5)
    close(got.pred_original_sample, want.pred_original_sample, 2e-5)
    if options:  # noise from a generator
        got, want = (
            one.step(output, t, x, generator=torch.Generator().manual_seed(4), **options).prev_sample
            for one in (a, b)
        )
        close(got, want, 2e-5)
    levels = torch.tensor([3, 31])
    close(a.add_noise(x, noise, levels), b.add_noise(x, noise, levels), 2e-5)
    assert a.scale_model_input(x, t) is x


def test_schedulers_are_made_from_each_others_settings(caplog, tmp_path):
    pndm = diffusers.PNDMScheduler(
        **{k: v for k, v in V1.items() if k != "clip_sample"}, steps_offset=1, skip_prk_steps=True
    )
    with caplog.at_level(logging.INFO):
        mine = DDIMScheduler.from_config(pndm.config, clip_sample=False)
    assert (
        "skip_prk_steps" in caplog.text and mine.config.steps_offset == 1 and mine.config["beta_end"] == 0.012
    )
    back = diffusers.PNDMScheduler.from_config(mine.config)
    close(back.alphas_cumprod, mine.alphas_cumprod, 1e-6)
    pndm.save_pretrained(tmp_path / "scheduler")
    assert (
        DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.beta_schedule == "scaled_linear"
    )
    assert DDIMScheduler.from_pretrained(tmp_path / "scheduler", steps_offset=0).config.steps_offset == 0
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert twin.config == mine.config and twin.config.beta_start == 0.00085


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: DDIMScheduler(beta_schedule="sigmoid"),
            "beta_schedule must be one of scaled_linear, linear, squared",
        ),
        (lambda: DDIMScheduler(prediction_type="eps"), "prediction_type must be one of epsilon"),
        (lambda: DDIMScheduler(timestep_spacing="karras"), "timestep_spacing must be one of leading"),
        (lambda: DDIMScheduler(thresholding=True), "thresholding=True is not supported"),
        (lambda: DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True is not supported"),
        (lambda: DDIMScheduler(num_train_timesteps=0), "num_train_timesteps must be a whole number"),
        (lambda: DDIMScheduler(steps_offset=1000), "steps_offset must be from 0 to 999"),
        (
            lambda: DDIMScheduler.from_config({}, clip_samples=False),
            "no option 'clip_samples'; did you mean 'clip_sample'",
        ),
        (lambda: DDIMScheduler.from_config(3), "takes the settings of a scheduler .* got int"),
        (lambda: DDIMScheduler().step(torch.ones(1), 1, torch.ones(1)), "call set_timesteps"),
        (
            lambda: DDIMScheduler().set_timesteps(1001),
            "num_inference_steps must be a whole number from 1 to 1000",
        ),
        (
            lambda: DDIMScheduler(steps_offset=30).set_timesteps(100),
            "steps_offset=30 moves 100 steps past level 999",
        ),
    ],
)
def test_what_a_scheduler_cannot_do_is_said(act, words):
    with pytest.raises(UsageError, match=words):
        act()


@pytest.mark.parametrize(("t", "eta"), [(1000, 0.0), (-1, 0.0), (2.5, 0.0), (1, 1.5), (1, -0.1)])
def test_steps_from_no_level_are_refused(t, eta):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(UsageError, match="is no level of this schedule|eta must be a number from 0 to 1"):
        scheduler.step(torch.ones(1, 1), t, torch.ones(1, 1), eta=eta)


# --- the pipeline, beside diffusers' own ---


@pytest.mark.thinned(2)
def test_networks_answer_as_diffusers_do(ours, theirs):
    x, t, text = (
        keyed_input("p.x", (3, 4, 8, 6)),
        torch.tensor([3, 501, 999]),
        keyed_input("p.c", (3, 32, 128)),
    )
    with torch.no_grad():
        for times in (t, 41, torch.tensor(7)):
            got, want = (pipe.unet(x, times, encoder_hidden_states=text).sample for pipe in (ours, theirs))
            close(got, want, 2e-5)
        close(ours.vae.decode(x).sample, theirs.vae.decode(x).sample, 2e-5)
        picture = keyed_input("p.i", (2, 3, 48, 40)).clamp(-1, 1)
        got, want = (pipe.vae.encode(picture).latent_dist for pipe in (ours, theirs))
        close(got.mean, want.mean, 2e-5)
        close(got.mode(), want.mode(), 2e-5)
        close(*(one.sample(torch.Generator().manual_seed(2)) for one in (got, want)), 2e-5)
        torch.manual_seed(5)
        drawn = got.sample()
        torch.manual_seed(5)
        close(drawn, want.sample(), 2e-5)
        ids = ours.tokenizer([PROMPT], padding="max_length", max_length=32, return_tensors="pt").input_ids
        close(ours.text_encoder(ids)[0], theirs.text_encoder(ids)[0], 2e-5)
    for name in (
        "in_channels",
        "sample_size",
        "cross_attention_dim",
        "block_out_channels",
        "attention_head_dim",
    ):
        assert ours.unet.config[name] == getattr(ours.unet.config, name) == theirs.unet.config[name]
    assert ours.vae.config.scaling_factor == theirs.vae.config.scaling_factor == 0.18215
    assert ours.vae_scale_factor == theirs.vae_scale_factor == 8


@pytest.mark.parametrize(
    ("prompt", "negative", "count", "guided"),
    [
        (PROMPT, NEGATIVE, 1, True),
        (PROMPT, None, 3, True),
        ([PROMPT, "a ring"], NEGATIVE, 2, True),
        (PROMPT, "", 2, False),
    ],
)
def test_prompts_are_encoded_in_diffusers_order(ours, theirs, prompt, negative, count, guided):
    if isinstance(prompt, list):
        negative = [negative, "a cross"]
    with torch.no_grad():
        got, want = (pipe.encode_prompt(prompt, "cpu", count, guided, negative) for pipe in (ours, theirs))
        close(got[0], want[0], 2e-5)
        if not guided:
            assert got[1] is None
            close(ours._encode_prompt(prompt, "cpu", count, guided, negative), want[0], 2e-5)
            return
        close(got[1], want[1], 2e-5)
        both = [pipe._encode_prompt(prompt, "cpu", count, guided, negative) for pipe in (ours, theirs)]
        close(*both, 2e-5)
        close(both[0][: len(got[1])], got[1], 0)  # the negative half first


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 4, "guidance_scale": 7.5},
        {"num_inference_steps": 3, "guidance_scale": 1.0, "negative_prompt": None},
        {"num_inference_steps": 3, "guidance_scale": 4.0, "eta": 0.7, "guidance_rescale": 0.6},
        {"num_inference_steps": 2, "num_images_per_prompt": 2, "height": 64, "width": 72},
        {
            "num_inference_steps": 2,
            "prompt": [PROMPT, "a ring"],
            "negative_prompt": ["", NEGATIVE],
            "seeds": [8, 9],
        },
    ],
)
@pytest.mark.thinned(5)
def test_pictures_are_diffusers(ours, theirs, options):
    """Same weights, words and generators: latents, pixels and PIL's bytes."""
    options = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **options}
    seeds = options.pop("seeds", None)

    def paint(pipe, kind):
        generator = (
            [torch.Generator().manual_seed(s) for s in seeds] if seeds else torch.Generator().manual_seed(3)
        )
        return pipe(**options, generator=generator, output_type=kind).images

    latents = paint(ours, "latent")
    close(latents, paint(theirs, "latent"))
    pixels = paint(ours, "np")
    close(pixels, paint(theirs, "np"))
    if options["num_inference_steps"] == 4:
        close(paint(ours, "pt"), paint(theirs, "pt"))
        pictures, wanted = paint(ours, "pil"), paint(theirs, "pil")
        assert np.abs(np.asarray(pictures[0], int) - np.asarray(wanted[0], int)).max() <= 1
        np.testing.assert_array_equal(np.asarray(ours.numpy_to_pil(pixels)[0]), np.asarray(pictures[0]))
        np.testing.assert_array_equal(np.asarray(theirs.numpy_to_pil(pixels)[0]), np.asarray(pictures[0]))
        with torch.no_grad():
            close(ours.decode_latents(latents), theirs.decode_latents(latents))


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_of_diffusers_can_be_put_in(ours, theirs, name):
    before = ours.scheduler, theirs.scheduler
    kind = getattr(diffusers, name)
    latents = keyed_input("p.start", (1, 4, 8, 8))
    try:
        for pipe in (ours, theirs):
            options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
        got, want = (
            pipe(PROMPT, num_inference_steps=4, latents=latents, output_type="latent").images
            for pipe in (ours, theirs)
        )
        close(got, want, 1e-4 * (1 + want.abs().max().item()))
        with pytest.raises(UsageError, match=f"eta is DDIM's, {name} takes none; got eta=0.5"):
            ours(PROMPT, num_inference_steps=2, eta=0.5)
    finally:
        ours.scheduler, theirs.scheduler = before


def test_callbacks_see_and_change_a_run(ours):
    latents, seen = keyed_input("p.start", (1, 4, 8, 8)), []

    def at_end(pipe, step, t, given):
        seen.append((step, int(t), sorted(given)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(given["latents"])}

    done = ours(
        PROMPT, num_inference_steps=4, latents=latents, output_type="latent", callback_on_step_end=at_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    assert seen == [(0, 751, ["latents", "prompt_embeds"]), (1, 501, ["latents", "prompt_embeds"])]
    assert (done.images == 0).all() and done[0] is done.images and done.nsfw_content_detected is None
    old = []
    ours(PROMPT, num_inference_steps=5, latents=latents, output_type="latent", callback_steps=2,
         callback=lambda step, t, x: old.append((step, int(t), tuple(x.shape))))  # fmt: skip
    assert old == [(0, 801, (1, 4, 8, 8)), (2, 401, (1, 4, 8, 8)), (4, 1, (1, 4, 8, 8))]


def test_features_replace_prompts_and_sizes_follow_latents(ours):
    latents = keyed_input("p.wide", (1, 4, 8, 12))
    plain = ours(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=2, latents=latents, output_type="np"
    ).images
    assert plain.shape == (1, 64, 96, 3)
    embeds, negative = ours.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    again = ours(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        num_inference_steps=2,
        latents=latents,
        output_type="np",
    ).images
    np.testing.assert_array_equal(again, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 3}, "no option 'steps'; diffusers' is num_inference_steps"),
        ({"seed": 3}, r"diffusers' is generator=torch.Generator\(\).manual_seed\(seed\)"),
        ({"negative_promt": "x"}, "did you mean 'negative_prompt'"),
        ({"clip_skip": 2}, "clip_skip is not supported"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs is not supported"),
        ({"ip_adapter_image": 1}, "ip_adapter_image is not supported"),
        ({"timesteps": [3, 2]}, "timesteps is not supported"),
        ({"height": 60}, "height must be a multiple of 8 from 64 to 2048, got 60"),
        ({"latents": torch.zeros(1, 4, 7)}, "latents must be"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must be \(1, 4, 8, 8\)"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent"),
        ({"eta": 2.0}, "eta must be"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one, or one for each of 1 prompts"),
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 32, 128)}, "give prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": None, "prompt_embeds": torch.zeros(32, 128)}, "prompt_embeds must be"),
        ({"generator": [torch.Generator()] * 2}, "a list of generators needs one for each of 1, got 2"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]}, "no option 'noise'"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_kept_are_refused(ours, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        ours(**{"prompt": PROMPT, "num_inference_steps": 1, "output_type": "latent", **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize("name", ["attention_slicing", "xformers_memory_efficient_attention"])
def test_switches_of_attention_change_nothing_and_say_so(ours, caplog, name):
    getattr(ours, f"enable_{name}")()
    getattr(ours, f"disable_{name}")()
    assert [record.message for record in caplog.records] == [
        "attention takes little memory here as it is, so nothing was changed"
    ] * 2


def test_memory_switches_add_up_and_come_off():
    pipe = StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()))
    own = vars(pipe.sd.model.first_stage_model.decoder)  # what stands in for the class's forward is here
    latents = keyed_input("latents", (2, 4, 6, 8))
    plain = pipe.vae.decode(latents).sample
    pipe.enable_vae_slicing()
    assert isinstance(own["forward"], SlicedForward) and not isinstance(own["forward"].inner, TiledForward)
    pipe.enable_vae_tiling()
    assert isinstance(own["forward"], SlicedForward) and isinstance(own["forward"].inner, TiledForward)
    close(pipe.vae.decode(latents).sample, plain)
    with pytest.raises(UsageError, match="low_vram is for a GPU"):
        pipe.enable_model_cpu_offload(device="cpu")
    assert isinstance(own["forward"], SlicedForward)
    pipe.disable_vae_slicing()
    assert isinstance(own["forward"], TiledForward)
    pipe.disable_vae_tiling()
    pipe.disable_vae_tiling()
    assert "forward" not in own


@pytest.mark.slow
def test_a_pipeline_is_saved_as_a_folder_that_loads_again(ours, tmp_path):
    ours.save_pretrained(tmp_path / "saved.d")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved.d")
    for key, value in ours.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[key], value), key
    with pytest.raises(UsageError, match="safetensors files only"):
        ours.save_pretrained(tmp_path / "other", safe_serialization=False)


def test_freeu_is_enabled_and_disabled_by_diffusers_words(ours):
    def predict():
        return ours.unet(keyed_input("fu.x", (1, 4, 8, 6)), 300, encoder_hidden_states=context).sample

    context = ours.encode_prompt("a large red circle")[0]
    plain = predict()
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    enabled = predict()
    ours.enable_freeu(s1=1, s2=1, b1=1, b2=1)  # in place of the first
    assert torch.equal(predict(), plain) and len(ours.sd.adapters) == 1
    ours.disable_freeu()
    assert torch.equal(predict(), plain) and not torch.equal(enabled, plain) and not ours.sd.adapters
    with pytest.raises(UsageError, match="b1 should be a number from 0 to 10"):
        ours.enable_freeu(s1=0.9, s2=0.2, b1=-1, b2=1.6)


def test_what_the_facade_has_not_is_said_with_what_to_use(ours):
    with pytest.raises(AttributeError, match="load_ip_adapter.*; use diffusers itself"):
        ours.load_ip_adapter("x")
    with pytest.raises(AttributeError, match=r"no 'disable_lora'; use set_adapters\(\[\]\)"):
        ours.disable_lora()
    with pytest.raises(AttributeError, match="has no 'schedular'"):
        ours.schedular  # noqa: B018
    with pytest.raises(AttributeError, match="no 'in_chanels'; did you mean 'in_channels'"):
        ours.unet.config.in_chanels  # noqa: B018
    with pytest.raises(TypeError, match="cannot be changed"):
        ours.scheduler.config["clip_sample"] = True
    with pytest.raises(UsageError, match="this UNet takes no down_block_additional_residuals"):
        ours.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 32, 128), down_block_additional_residuals=[1])
    assert set(ours.components) >= {"vae", "unet", "tokenizer"} and ours.config.unet == "UNet"


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (3, "scheduler must have set_timesteps, timesteps and step"),
        (DDIMScheduler(**V1, prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(ours, scheduler, words):
    before = ours.scheduler
    with pytest.raises(UsageError, match=words):
        ours.scheduler = scheduler
    assert ours.scheduler is before


def test_a_scheduler_with_other_noise_levels_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()), DDIMScheduler(**V1))
        assert caplog.text == ""
        StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()), DDIMScheduler())
    assert "noise levels are not the model's" in caplog.text


# --- loading ---


@pytest.mark.slow
def test_files_and_folders_of_this_machine_are_loaded(tmp_path, ours):
    checkpoint, config = write_tiny(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "config.yaml")
    latents = keyed_input("p.start", (1, 4, 8, 8))
    want = ours(PROMPT, num_inference_steps=2, latents=latents, output_type="latent").images
    for pipe in (
        StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False),
        StableDiffusionPipeline.from_single_file(checkpoint, original_config=tmp_path / "config.yaml").to(
            "cpu"
        ),
        StableDiffusionPipeline.from_pretrained(
            str(checkpoint), original_config_file=str(tmp_path / "config.yaml"), torch_dtype=torch.float32
        ),
    ):
        assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
        close(pipe(PROMPT, num_inference_steps=2, latents=latents, output_type="latent").images, want, 0)


@pytest.mark.slow
def test_dtypes_are_asked_for_as_diffusers_do(tmp_path, ours):
    """bfloat16 computes in it; float16, which a CPU has not, waits for a GPU; the VAE stays in float32."""
    checkpoint, config = write_tiny(tmp_path)
    options = {
        "num_inference_steps": 2,
        "latents": keyed_input("p.start", (1, 4, 8, 8)),
        "output_type": "latent",
    }
    pipe = StableDiffusionPipeline.from_single_file(
        checkpoint, original_config=config, torch_dtype=torch.bfloat16
    )
    assert pipe.dtype == pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    want = ours(PROMPT, **options).images
    assert (pipe(PROMPT, **options).images - want).abs().max() < 0.1 * want.abs().max()
    assert pipe.to(torch.float32).dtype == torch.float32
    half = StableDiffusionPipeline.from_single_file(
        checkpoint, original_config=config, torch_dtype=torch.float16
    ).to("cpu")
    close(half(PROMPT, **options).images, want, 0)
    with pytest.raises(UsageError, match="to has no option 'devise'; did you mean 'device'"):
        half.to(devise="cpu")


def test_a_folder_of_diffusers_is_loaded(tmp_path, ours, theirs, caplog):
    theirs.save_pretrained(tmp_path / "pipe")
    settings = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    with caplog.at_level(logging.INFO):
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", use_safetensors=True)
    assert "names PNDMScheduler; this pipeline steps with DDIM" in caplog.text
    latents = keyed_input("p.start", (1, 4, 8, 8))
    got, want = (
        one(PROMPT, num_inference_steps=2, latents=latents, output_type="latent").images
        for one in (pipe, ours)
    )
    close(got, want, 1e-5)
    assert pipe.scheduler.config == ours.scheduler.config


@pytest.mark.parametrize(
    ("path", "options", "kind", "words"),
    [
        ("runwayml/stable-diffusion-v1-5", {}, AbsentError, "nothing is downloaded"),
        (".", {}, FormatError, "is a folder and no diffusers model; name a file in it: 'tiny.safetensors'"),
        ("tiny.safetensors", {"torch_dtpye": torch.float32}, UsageError, "did you mean 'torch_dtype'"),
        ("tiny.safetensors", {"safety_checker": 3}, UsageError, "safety_checker is not supported"),
        ("tiny.safetensors", {}, MismatchError, "give the configuration that belongs to it"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch, path, options, kind, words):
    write_tiny(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "other.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=words) as caught:
        StableDiffusionPipeline.from_pretrained(path, **options)
    assert isinstance(caught.value, kind) or path == "."


def test_an_inpainting_model_is_sent_elsewhere():
    with pytest.raises(MismatchError, match="use StableDiffusion.inpaint"):
        StableDiffusionPipeline(ldm.StableDiffusion(tiny_model(in_channels=9)))


@pytest.mark.slow
def test_the_model_in_the_box_answers_with_noise():
    """It was trained to predict velocities; loops written by hand take an answer as noise, and DDIMSampler agrees."""
    pipe = (
        StableDiffusionPipeline.from_pretrained("model_data/shapes")
        if shipped("model_data/shapes").is_dir()
        else None
    )
    pipe.set_progress_bar_config(disable=True)
    model, latents = pipe.sd.model, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert model.parameterization == "v" and pipe.scheduler.config.prediction_type == "epsilon"
    got = pipe(PROMPT, num_inference_steps=5, guidance_scale=4, latents=latents, output_type="latent").images
    with torch.no_grad():
        want, _ = DDIMSampler(model).sample(
            5, 1, (4, 16, 16), model.get_learned_conditioning([PROMPT]), x_T=latents, verbose=False,
            unconditional_guidance_scale=4, unconditional_conditioning=model.get_learned_conditioning([""]),
        )  # fmt: skip
    close(got, want, 1e-4)
    t, text = torch.tensor([1, 500]), pipe._encode_prompt(PROMPT)
    with pytest.raises(UsageError, match="predicts v, which is noise at whole levels alone"):
        pipe.unet(torch.cat([latents] * 2), t + 0.5, encoder_hidden_states=text)


def test_averages_paint_where_a_model_keeps_some():
    settings = tiny_config()["model"]["params"]
    from keyed import fill

    from ldm.models.diffusion.ddpm import LatentDiffusion

    model = fill(
        LatentDiffusion(**{**settings, "use_ema": True}),
        only=("model.", "first_stage_model.", "cond_stage_model."),
    )
    for name in model.model_ema.m_name2s_name.values():
        getattr(model.model_ema, name).mul_(0.5)
    pipe = StableDiffusionPipeline(ldm.StableDiffusion(model))
    for name, value in model.model.named_parameters():
        close(value, getattr(model.model_ema, model.model_ema.m_name2s_name[name]), 0)
    assert pipe.sd.model is model


# --- the DDIM notebook ---


def notebook(pipe, device="cpu"):
    """The notebook's functions, by their names, signatures and arithmetic, over whichever pipe there is."""

    def guided(text_embeddings, latents, t, guidance_scale, do_classifier_free_guidance):
        latent_model_input = torch.cat([latents] * 2) if do_classifier_free_guidance else latents
        latent_model_input = pipe.scheduler.scale_model_input(latent_model_input, t)
        noise_pred = pipe.unet(latent_model_input, t, encoder_hidden_states=text_embeddings).sample
        if not do_classifier_free_guidance:
            return noise_pred
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
        return noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)

    @torch.no_grad()
    def sample(
        prompt, start_step=0, start_latents=None, guidance_scale=3.5, num_inference_steps=30,
        num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="", device=device,
    ):  # fmt: skip
        text_embeddings = pipe._encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
        )
        pipe.scheduler.set_timesteps(num_inference_steps, device=device)
        if start_latents is None:
            start_latents = torch.randn(1, 4, 8, 8, device=device)
            start_latents *= pipe.scheduler.init_noise_sigma
        latents = start_latents.clone()
        for i in range(start_step, num_inference_steps):
            t = pipe.scheduler.timesteps[i]
            noise_pred = guided(text_embeddings, latents, t, guidance_scale, do_classifier_free_guidance)
            prev_t = max(1, t.item() - (1000 // num_inference_steps))
            alpha_t = pipe.scheduler.alphas_cumprod[t.item()]
            alpha_t_prev = pipe.scheduler.alphas_cumprod[prev_t]
            predicted_x0 = (latents - (1 - alpha_t).sqrt() * noise_pred) / alpha_t.sqrt()
            latents = alpha_t_prev.sqrt() * predicted_x0 + (1 - alpha_t_prev).sqrt() * noise_pred
        images = pipe.decode_latents(latents)
        return pipe.numpy_to_pil(images)

    @torch.no_grad()
    def invert(
        start_latents, prompt, guidance_scale=3.5, num_inference_steps=80, num_images_per_prompt=1,
        do_classifier_free_guidance=True, negative_prompt="", device=device,
    ):  # fmt: skip
        text_embeddings = pipe._encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
        )
        latents = start_latents.clone()
        intermediate_latents = []
        pipe.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = list(reversed(pipe.scheduler.timesteps))
        for i in range(1, num_inference_steps):
            if i >= num_inference_steps - 1:
                continue
            t = timesteps[i]
            noise_pred = guided(text_embeddings, latents, t, guidance_scale, do_classifier_free_guidance)
            current_t = max(0, t.item() - (1000 // num_inference_steps))
            alpha_t = pipe.scheduler.alphas_cumprod[current_t]
            alpha_t_next = pipe.scheduler.alphas_cumprod[t]
            clean = latents - (1 - alpha_t).sqrt() * noise_pred
            latents = clean * (alpha_t_next.sqrt() / alpha_t.sqrt()) + (1 - alpha_t_next).sqrt() * noise_pred
            intermediate_latents.append(latents)
        return torch.cat(intermediate_latents)

    def encoded(image):
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
        with torch.no_grad():
            latent = pipe.vae.encode(pixels.unsqueeze(0).to(device) * 2 - 1)
        return 0.18215 * latent.latent_dist.sample()

    def edit(input_image, input_image_prompt, edit_prompt, num_steps=100, start_step=30, guidance_scale=3.5):
        inverted = invert(encoded(input_image), input_image_prompt, num_inference_steps=num_steps)
        return sample(
            edit_prompt, start_latents=inverted[-(start_step + 1)][None], start_step=start_step,
            num_inference_steps=num_steps, guidance_scale=guidance_scale,
        )[0]  # fmt: skip

    return SimpleNamespace(sample=sample, invert=invert, encoded=encoded, edit=edit)


def as_ints(picture):
    return np.asarray(picture, dtype=int)


@pytest.mark.slow
def test_the_ddim_notebook_runs_with_diffusers_numbers(ours, theirs, tmp_path):
    """Every step of it, on both pipes: a picture from a file, inversion, both ways back, a noised start and an edit."""
    path = tmp_path / "dog.png"
    Image.linear_gradient("L").rotate(30).convert("RGB").save(path)
    image, n = load_image(path, size=(64, 64)), 8
    results = []
    for pipe in (ours, theirs):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        book = notebook(pipe)
        torch.manual_seed(7)
        start = book.encoded(image)
        inverted = book.invert(start, PROMPT, num_inference_steps=n)
        assert inverted.shape == (n - 2, 4, 8, 8)
        whole = pipe(PROMPT, latents=inverted[-1][None], num_inference_steps=n, guidance_scale=3.5).images[0]
        part = book.sample(PROMPT, start_latents=inverted[-3][None], start_step=2, num_inference_steps=n)[0]
        pipe.scheduler.set_timesteps(n)
        noisy = pipe.scheduler.add_noise(start, torch.randn_like(start), pipe.scheduler.timesteps[3])
        noised = book.sample(PROMPT, start_latents=noisy, start_step=3, num_inference_steps=n)[0]
        free = book.sample(PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3)[0]
        edited = book.edit(image, PROMPT, "a ring", num_steps=7, start_step=3)
        with torch.no_grad():
            seen = pipe.numpy_to_pil(pipe.decode_latents(inverted[-1].unsqueeze(0)))[0]
        results.append((start, inverted, noisy, [whole, part, noised, free, edited, seen]))
    (start, inverted, noisy, pictures), (start2, inverted2, noisy2, pictures2) = results
    close(start, start2)
    close(inverted, inverted2)
    close(noisy, noisy2)
    for a, b in zip(pictures, pictures2, strict=True):
        assert a.size == b.size == (64, 64) and np.abs(as_ints(a) - as_ints(b)).max() <= 1


def test_the_notebooks_fifty_steps_give_48_latents(ours):
    start = keyed_input("p.start", (1, 4, 8, 8))
    inverted = notebook(ours).invert(start, PROMPT, num_inference_steps=50, do_classifier_free_guidance=False)
    assert inverted.shape == (48, 4, 8, 8)
    assert ours.scheduler.timesteps[[0, 1, -1]].tolist() == [981, 961, 1]
    alphas = ours.scheduler.alphas_cumprod[ours.scheduler.timesteps]
    assert alphas.shape == (50,) and (alphas.diff() > 0).all()


@pytest.mark.slow
def test_inverting_without_guidance_comes_back_on_the_model_in_the_box():
    """The way up and down returns to a picture that the model painted, the nearer the more steps it takes."""
    pipe = StableDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    start = pipe(
        PROMPT, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    want, errors = pipe.decode_latents(start)[0], []
    for n in (4, 16):
        book = notebook(pipe)
        inverted = book.invert(start, PROMPT, num_inference_steps=n, do_classifier_free_guidance=False)
        back = book.sample(
            PROMPT,
            start_step=1,
            start_latents=inverted[-2][None],
            num_inference_steps=n,
            do_classifier_free_guidance=False,
        )[0]
        errors.append(np.abs(as_ints(back) / 255 - want).mean())
    assert errors[1] < 0.05 and errors[1] < errors[0], errors


# --- adapters ---


def write_peft(path, pipe, only="", scale=0.3):
    """Write a LoRA of rank 2 in the names of diffusers and PEFT, for a pipeline's attentions."""
    tensors = {}
    for part, net in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for key, value in net.state_dict().items():
            module = f"{part}.{key.removesuffix('.weight')}"
            if only in module and re.search(r"\.(to_[qkv]|to_out\.0|[qv]_proj)\.weight$", key):
                tensors[f"{module}.lora_B.weight"] = scale * keyed_input(f"{module}.B", (len(value), 2))
                tensors[f"{module}.lora_A.weight"] = scale * keyed_input(f"{module}.A", (2, value.shape[1]))
    save_safetensors(path, tensors, {})
    return path


@pytest.fixture(scope="module")
def shelf(ours, tmp_path_factory):
    """Two LoRAs in a folder, and an embedding."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "trained").mkdir()
    write_peft(folder / "trained/pytorch_lora_weights.safetensors", ours)
    write_peft(folder / "trained/other.safetensors", ours, "attn2", -0.2)
    (folder / "learned").mkdir()
    save_safetensors(
        folder / "learned/learned_embeds.safetensors", {"<birb>": keyed_input("birb", (1, 128))}, {}
    )
    return folder


def paint(pipe, prompt=PROMPT, seed=3, steps=3):
    return pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        height=64,
        width=64,
        output_type="latent",
    ).images


@pytest.fixture
def fresh():
    """A pipeline for one test, whose adapters it may change."""
    pipe = StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_loras_and_embeddings_paint_as_in_diffusers_with_peft(theirs, fresh, shelf):
    pytest.importorskip("peft")
    theirs = copy.deepcopy(theirs)
    before = {key: value.clone() for key, value in fresh.unet.state_dict().items()}
    plain = paint(fresh)
    pictures = []
    for pipe in (theirs, fresh):
        pipe.load_lora_weights(shelf / "trained", weight_name="pytorch_lora_weights.safetensors")
        pictures.append([paint(pipe)])
        pipe.load_lora_weights(shelf / "trained", weight_name="other.safetensors", adapter_name="x")
        assert pipe.get_active_adapters() == ["default_0"]
        assert pipe.get_list_adapters() == {"unet": ["default_0", "x"], "text_encoder": ["default_0"]}
        pipe.set_adapters(["x", "default_0"], [0.7, 0.4])
        assert pipe.get_active_adapters() == ["x", "default_0"]
        pictures[-1].append(paint(pipe))
        pipe.set_adapters("x")
        pictures[-1].append(paint(pipe))
        pipe.unload_lora_weights()
        pictures[-1].append(paint(pipe))
    for got, want in zip(*pictures[::-1], strict=True):
        close(got, want)
    assert torch.equal(pictures[1][-1], plain)
    assert all(not torch.allclose(a, plain, atol=1e-2) for a in pictures[1][:-1])
    assert all(torch.equal(value, before[key]) for key, value in fresh.unet.state_dict().items())


def test_set_adapters_says_which_are_active_and_how_strong(ours, shelf, caplog):
    pipe = StableDiffusionPipeline(ours.sd)
    pipe.load_lora_weights(shelf / "trained")
    pipe.load_lora_weights(shelf / "trained", weight_name="other.safetensors", adapter_name="x")
    assert (
        "which LoRAs are active, set_adapters says: pipe.set_adapters(['default_0', 'x'])"
        in caplog.messages[-1]
    )
    assert pipe.get_active_adapters() == ["default_0"]
    assert pipe.get_list_adapters() == {"unet": ["default_0", "x"], "text_encoder": ["default_0"]}

    def strengths():
        return [(one.file.name, one.weight, one.text_weight) for one in pipe.sd.adapters]

    first, other = "pytorch_lora_weights", "other"
    pipe.set_adapters(["x", "default_0"], [0.7, {"unet": 0.4}])
    assert strengths() == [(other, 0.7, None), (first, 0.4, 1.0)]
    pipe.set_adapters(["default_0", "x"], 0.5)
    assert strengths() == [(first, 0.5, None), (other, 0.5, None)]
    pipe.set_adapters("x")
    assert strengths() == [(other, 1.0, None)] and pipe.get_active_adapters() == ["x"]
    pipe.set_adapters([])
    assert strengths() == []
    pipe.set_adapters(["x", "default_0"])
    pipe.delete_adapters("x")
    assert strengths() == [(first, 1.0, None)] and pipe.get_list_adapters()["unet"] == ["default_0"]
    pipe.unload_lora_weights()
    assert strengths() == [] and pipe.get_list_adapters() == {}


def test_an_embedding_stands_in_prompts_as_in_diffusers(theirs, fresh, shelf, tmp_path):
    theirs = copy.deepcopy(theirs)
    prompt = "a <birb>, (<birb>) red<birb>."
    plain = fresh.encode_prompt(prompt)[0]
    found = []
    for pipe in (theirs, fresh):
        pipe.load_textual_inversion(shelf / "learned/learned_embeds.safetensors", token="<birb>")
        found.append(pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)[0])  # fmt: skip
    close(found[1], found[0], 1e-5)
    assert not torch.equal(found[1], plain)
    with pytest.raises(UsageError, match="both go by '<birb>'"):
        fresh.load_textual_inversion(shelf / "learned", weight_name="learned_embeds.safetensors")
    fresh.unload_textual_inversion("<birb>")
    assert torch.equal(fresh.encode_prompt(prompt)[0], plain) and fresh.sd.adapters == []
    fresh.load_textual_inversion([shelf / "learned"], token=["<b>"])
    assert [one.token for one in fresh.sd.adapters] == ["<b>"]


def test_networks_called_by_hand_and_start_and_end_are_with_adapters(fresh, shelf):
    x, features = keyed_input("x", (1, 4, 8, 8)), keyed_input("c", (1, 5, 128))
    plain = fresh.unet(x, 500, features).sample
    ids = torch.arange(9)[None]
    text = fresh.text_encoder(ids)[0]
    lora = fresh.sd.load_lora(shelf / "trained/pytorch_lora_weights.safetensors")
    assert not torch.equal(fresh.unet(x, 500, features).sample, plain)
    assert not torch.equal(fresh.text_encoder(ids)[0], text)
    whole = paint(fresh, steps=4)
    fresh.sd.adapters[:] = [replace(lora, end=0.5)]
    half = paint(fresh, steps=4)
    fresh.sd.adapters.clear()
    assert not torch.equal(half, whole) and not torch.equal(half, paint(fresh, steps=4))
    assert torch.equal(fresh.unet(x, 500, features).sample, plain)


def test_fusing_is_said_to_be_needless_and_keeps_what_tutorials_unload_after_it(fresh, shelf, caplog):
    plain = paint(fresh)
    fresh.load_lora_weights(shelf / "trained")
    with_lora = paint(fresh)
    fresh.fuse_lora()
    assert (
        caplog.messages[-1] == "nothing needs fusing here: an active LoRA costs no time after the first step"
    )
    fresh.unload_lora_weights()
    assert torch.equal(paint(fresh), with_lora)
    fresh.unfuse_lora()
    assert torch.equal(paint(fresh), plain)


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (lambda p, f: p.load_lora_weights(f / "nowhere.safetensors"), AbsentError, "nowhere.safetensors"),
        (lambda p, f: p.load_lora_weights(f), AbsentError, "has no 'pytorch_lora_weights.safetensors'; name the file"),
        (lambda p, f: p.load_lora_weights("owner/lora"), AbsentError, "nothing is downloaded here"),
        (lambda p, f: p.load_lora_weights({"a": 1}), UsageError, "is loaded from a file or folder here"),
        (lambda p, f: p.load_lora_weights(f / "trained", hotswap=True), UsageError, "no option 'hotswap'"),
        (lambda p, f: [p.load_lora_weights(f / "trained", adapter_name="a") for _ in "ab"],
         UsageError, "that no LoRA has yet"),
        (lambda p, f: p.load_lora_weights(f / "learned"), MismatchError, "a LoRA was wanted"),
        (lambda p, f: p.set_adapters("y"), UsageError, "no LoRA is called 'y'; there are none"),
        (lambda p, f: p.set_adapters([], [1.0]), UsageError, "or one for each of 0 adapters, got 1"),
        (lambda p, f: (p.load_lora_weights(f / "trained", adapter_name="a"), p.set_adapters("a", {"unet_2": 1})),
         UsageError, "strengths are for 'unet' and 'text_encoder' here, got 'unet_2'"),
        (lambda p, f: p.fuse_lora(lora_scale=0.5), UsageError, "lora_scale 1 here, got 0.5"),
        (lambda p, f: p.load_textual_inversion(f / "trained", weight_name="other.safetensors"),
         MismatchError, "an embedding was wanted"),
        (lambda p, f: p.load_textual_inversion([f / "learned"], token=["a", "b"]), UsageError, "for each of 1 files"),
        (lambda p, f: p.unload_textual_inversion("<x>"), UsageError, "no embedding is called '<x>'; there are none"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_are_refused_and_change_nothing(ours, shelf, act, kind, words):
    pipe = StableDiffusionPipeline(ours.sd)
    with pytest.raises(kind, match=words) as error:
        act(pipe, shelf)
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value)
    ours.sd.adapters.clear()
