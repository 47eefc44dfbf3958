"""From prompt to picture: laws of seeds, sizes, masks and strength, the recorded chain, and every refusal."""

import contextlib
import copy
import hashlib
import inspect
import io
import logging
import math
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from tiny_diffusion import latent_model

import ldm
from ldm import generate, kernels, other_words
from ldm.checkpoints.report import LoadReport
from ldm.checkpoints.sampling import read_sampling
from ldm.devices import pick_device, pick_dtype
from ldm.errors import AbsentError, MismatchError, NumericError, ResourceError, UsageError
from ldm.images import to_tensor
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.introspect import downsampling, dtype_of, native_size
from ldm.noise import ImageNoise, NvNoise
from ldm.pipeline import StableDiffusion
from ldm.process.philox import cuda_normal
from ldm.results import file_hash

ALL = ("ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m")
SIGMA = ("euler_a", "heun", "lms", "DPM++ 2S a Karras")  # of k-diffusion's
PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def sd9():
    return StableDiffusion(tiny_model(in_channels=9), name="tiny9")


@pytest.fixture
def own(sd):
    """A model that a test may break."""
    return StableDiffusion(copy.deepcopy(sd.model), name="own")


def picture(width=72, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(width=72, height=64):
    """White on the right, from the middle of a latent cell on."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (36, 0, width, height))
    return mask


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- what the caller leaves to the model ---


def advised(model, **values):
    return StableDiffusion(model, report=LoadReport("x", "v1", sampling=read_sampling(values)))


def test_a_model_that_says_nothing_has_the_defaults_of_v1(sd):
    assert (sd.defaults.guidance_scale, sd.defaults.steps, sd.defaults.size) == (7.5, 50, (64, 64))
    job = sd.plan(PROMPT)
    assert (job.guidance_scale, job.steps, job.height, job.width) == (7.5, 50, 64, 64)


def test_what_the_caller_leaves_open_is_the_models(sd):
    own = advised(
        sd.model, guidance_scale=3, steps=11, size=[80, 72], least_steps={"plms": 17, "DPM++ 2M": 5}
    )
    job = own.plan(PROMPT)
    assert (job.guidance_scale, job.steps, job.height, job.width) == (3.0, 11, 80, 72)
    assert own.plan(PROMPT, sampler="plms").steps == 17 and own.plan(PROMPT, sampler="dpmpp_2m").steps == 11
    job = own.plan(PROMPT, guidance_scale=7.5, steps=50, width=64, sampler="plms")
    assert (job.guidance_scale, job.steps, job.height, job.width) == (7.5, 50, 80, 64)
    job = own.plan(PROMPT, image=picture())
    assert (job.guidance_scale, job.steps, job.height, job.width) == (
        3.0,
        11,
        64,
        72,
    )  # a picture has its own size
    done = own.txt2img(PROMPT, seed=1)
    assert done.parameters[0].guidance_scale == 3.0 and done.parameters[0].steps == 11
    assert done.images[0].size == (72, 80)


def test_a_model_of_few_levels_has_no_more_steps(own):
    own.model.num_timesteps = 20
    assert StableDiffusion(own.model).defaults.steps == 20


def test_a_size_that_the_model_cannot_paint_is_not_its_size(sd):
    with pytest.raises(UsageError, match="height must be a multiple of 8 from 64 to 2048, got 16"):
        advised(sd.model, size=16).plan(PROMPT)


def test_the_box_paints_with_what_it_says_and_everything_else_is_quiet(caplog):
    box = StableDiffusion.default()
    assert (box.defaults.guidance_scale, box.defaults.steps, box.defaults.size) == (3.0, 20, (128, 128))
    caplog.clear()
    job = box.plan("a large red circle above a small blue square on a white background")
    box.advise([job])
    assert (job.guidance_scale, job.steps, job.sampler, job.height) == (3.0, 20, "ddim", 128)
    assert caplog.messages == []
    box.advise([box.plan("a photograph of an astronaut", width=512, height=512, sampler="plms", steps=10)])
    assert [line.split(":")[0] for line in caplog.messages] == [
        "the model has never seen these words and paints something of its own for them",
        "the model knows pictures of 128 x 128 pixels only; at 512 x 512 expect noise or repetition",
        "plms with 10 steps paints badly on this model",
    ]
    assert "for them: photograph, an, astronaut; it knows: a above" in caplog.messages[0]
    assert caplog.messages[2].endswith("give it 30 or more, or ddim, which paints well with 10")


def test_trouble_is_told_once_a_call_and_foreign_syntax_once(sd, caplog):
    own = advised(sd.model, known_words="a red circle")
    for _ in range(2):
        list(own.stream(["a (red:1.3) cat", "a dog"], steps=1, negative_prompt="fog", seed=2**32 + 5))
    words = "the model has never seen these words and paints something of its own for them: cat, dog, fog"
    seed = "seed 4294967301 paints what seed 5 paints: the generator on the CPU keeps 32 bits"
    assert [line.split("; it knows")[0] for line in caplog.messages] == [
        words,
        seed,
        "'(red:1.3)' is a weight to other programs; here it is read as plain text: "
        "ldm.prompt reads it, give prompt_syntax='a1111' (--syntax a1111)",
        words,
        seed,
    ]
    caplog.clear()
    list(own.stream("a red circle", steps=1, negative_prompt="fog", guidance_scale=1, seed=5))
    assert caplog.messages == []  # at scale 1 nobody reads the negative prompt


@pytest.mark.parametrize(
    ("strength", "steps", "line"),
    [
        (0.01, 20, "strength 0.01 of 20 steps is less than one step, so the picture comes back unchanged; give "
         "strength 0.05 or more, or more steps"),
        (0.04, 20, "strength 0.04 of 20"),
        (0.05, 20, None),
        (0.0, 20, None),  # asks for the picture
        (0.3, 3, "give strength 0.334 or more"),
        (1.0, 1, None),
        (0.99, 1, "give strength 1 or more"),
    ],
)  # fmt: skip
def test_a_strength_of_less_than_one_step_is_told(sd, caplog, strength, steps, line):
    options = {"image": picture(), "strength": strength, "steps": steps, "seed": 1}
    for more in ({}, {"mask": half_mask()}):
        caplog.clear()
        sd.advise([sd.plan(PROMPT, **options, **more)])
        assert [line in got for got in caplog.messages] == ([] if line is None else [True])


def test_a_strength_that_is_advised_runs_a_step(sd):
    for steps in range(1, 1001):
        strength = math.ceil(1000 / steps) / 1000
        assert int(strength * steps) >= 1, steps


# --- seeds ---


@pytest.mark.parametrize("wide", [2**32 + 5, 2**63 + 5, 2**64 - 2**32 + 5])
def test_the_generator_on_the_cpu_keeps_32_bits_of_a_seed(sd, wide):
    draws = [ImageNoise([seed])(torch.empty(1, 4, 8, 9)) for seed in (5, wide, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    a, b = (sd.txt2img(PROMPT, seed=seed, steps=1, output_type="latent") for seed in (5, wide))
    assert torch.equal(a.latents, b.latents) and b.seeds == [wide]


@pytest.mark.parametrize("rng", ["image", "nv", "compvis"])
def test_a_seed_of_more_bits_is_told_with_the_smaller_one(sd, caplog, rng):
    sd.advise([sd.plan(PROMPT, seed=2**32 - 1, num_images=2, rng=rng), sd.plan(PROMPT, seed=2**32 - 1)])
    told = ["seed 4294967296 paints what seed 0 paints: the generator on the CPU keeps 32 bits"]
    assert caplog.messages == (told if rng == "image" else [])  # compvis's pictures have one seed together
    caplog.clear()
    sd.advise([sd.plan(PROMPT, seed=2**64 - 1, rng=rng)])
    told = ["seed 18446744073709551615 paints what seed 4294967295 paints"]
    assert [line.split(":")[0] for line in caplog.messages] == (
        [] if rng == "nv" else told
    )  # it keeps 64 bits


@pytest.mark.parametrize("seed", [None, -1, "random", np.int64(-1)])
def test_a_seed_can_be_drawn_by_every_usual_name(sd, seed):
    drawn = [sd.plan(PROMPT, seed=seed, num_images=2).images for _ in range(2)]
    assert drawn[0][1].seed == drawn[0][0].seed + 1 and drawn[0][0].seed != drawn[1][0].seed
    assert all(0 <= spec.seed <= 2**31 for images in drawn for spec in images)
    mixed = sd.plan(PROMPT, seed=[7, seed], num_images=2).images
    assert mixed[0].seed == 7 and mixed[1].seed not in (-1, 7, 8)


@pytest.mark.parametrize(
    ("height", "width", "batch"),
    [
        (64, 64, 16),
        (128, 128, 16),
        (256, 128, 8),
        (256, 320, 3),
        (512, 512, 1),
        (520, 512, 1),
        (2048, 2048, 1),
    ],
)
def test_a_batch_that_is_chosen_fills_the_latents_of_one_large_picture(sd, height, width, batch):
    request = sd.plan([PROMPT, "b"], height=height, width=width, num_images=9, batch_size="auto", seed=5)
    assert request.batch_size == batch
    assert [spec.seed for spec in request.images] == list(range(5, 23))


def test_numbers_of_numpy_are_numbers(sd):
    job = sd.plan(
        PROMPT,
        steps=np.int64(2),
        width=np.int32(72),
        seed=np.uint64(9),
        guidance_scale=np.float32(3),
        eta=np.int8(1),
    )
    assert (job.steps, job.width, job.images[0].seed, job.guidance_scale, job.eta) == (2, 72, 9, 3.0, 1.0)
    assert [s.seed for s in sd.plan(PROMPT, seed=np.array([4, 8]), num_images=2).images] == [4, 8]
    assert sd.plan(PROMPT, negative_prompt=None).images[0].negative_prompt == ""


def test_a_sampler_is_named_with_its_spacing_and_has_an_eta_of_its_own(sd):
    def asked(sampler, **options):
        request = sd.plan(PROMPT, sampler=sampler, **options)
        return request.sampler, request.spacing, request.eta

    assert asked("DPM++ 2M Karras") == ("dpmpp_2m", "karras", 0.0)
    assert asked("Euler a") == ("euler_a", None, 1.0)
    assert asked("euler_a", spacing="SGM Uniform", eta=0.0) == ("euler_a", "sgm_uniform", 0.0)
    assert asked("ddim", spacing="ays", eta=0.5) == ("ddim", "align_your_steps", 0.5)
    request = sd.plan(PROMPT, sampler="euler", spacing=np.array([9.0, 3.0, 0.5, 0.0]))
    assert (request.steps, request.spacing) == (3, [9.0, 3.0, 0.5, 0.0])
    out = sd.txt2img(PROMPT, sampler="Heun Karras", steps=3, seed=1)
    assert (out.parameters[0].sampler, out.parameters[0].spacing) == ("heun", "karras")
    assert "Sampler: Heun, Schedule type: Karras, " in out.infotexts[0]


def test_noise_of_seed_42_is_the_one_on_record():
    noise = ImageNoise([42])(torch.empty(1, 4, 64, 64))
    assert hashlib.sha256(noise.numpy().tobytes()).hexdigest().startswith("e97f3de04c7c")


@pytest.mark.parametrize("source", [ImageNoise, NvNoise])
@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 65, 65), (4, 9, 9), (4, 8, 13)])
def test_noise_of_an_image_does_not_know_its_batch(shape, source):
    """At sizes, too, where torch.randn of a batch has no such prefix."""
    batch = source([5, 6, 7])
    first, second = (batch(torch.empty(3, *shape)) for _ in range(2))
    assert (first - second).abs().max() > 1
    for i in range(3):
        alone = source([5 + i])
        assert torch.equal(alone(torch.empty(1, *shape))[0], first[i])
        assert torch.equal(alone(torch.empty(1, *shape))[0], second[i])


def test_nv_draws_what_a_gpu_draws_draw_by_draw():
    noise = NvNoise([2**33 + 5, 9])
    for draw in range(2):
        made = noise(torch.empty(2, 4, 3, 5, dtype=torch.float64))
        want = np.stack([cuda_normal(seed, draw, 60) for seed in (2**33 + 5, 9)])
        assert made.dtype == torch.float64 and np.array_equal(made.numpy().reshape(2, 60), want)
    assert noise(torch.empty(1, 4, 3, 5)).shape == (2, 4, 3, 5)  # as ImageNoise: one for each seed


def test_nv_begins_with_the_first_draw_also_where_a_picture_was_encoded_before(sd):
    """As in the web UIs. At strength 1 nothing is left of the picture, so that it shows."""
    options = {"rng": "nv", "seed": 2**33 + 5, "steps": 3, "output_type": "latent"}
    out = sd.txt2img(PROMPT, width=72, height=64, num_images=2, **options)
    assert out.parameters[0].rng == "nv" and out.seeds == [2**33 + 5, 2**33 + 6]
    over = sd.img2img(PROMPT, picture(), strength=1.0, num_images=2, **options)
    assert torch.equal(over.latents, out.latents)
    alone = sd.txt2img(PROMPT, width=72, height=64, **options | {"seed": 2**33 + 6})
    assert far(out.latents[1], alone.latents[0]) <= 5e-6
    other = sd.txt2img(PROMPT, width=72, height=64, **options | {"rng": "image"})
    assert far(out.latents[0], other.latents[0]) > 0.1


def test_noise_takes_dtype_and_device_after_the_draw():
    drawn = ImageNoise([3])(torch.empty(1, 4, 8, 9, dtype=torch.float16))
    assert drawn.dtype == torch.float16
    assert torch.equal(drawn, ImageNoise([3])(torch.empty(1, 4, 8, 9)).half())


@pytest.mark.parametrize(
    ("batch_size", "sampler"),
    [
        *((2, sampler) for sampler in (*ALL, *SIGMA)),  # a full batch and one that is not
        *((3, sampler) for sampler in ALL),
    ],
)
@pytest.mark.thinned(9)
def test_an_image_of_a_batch_is_the_image_alone(sd, sampler, batch_size):
    eta = 0.7 if sampler == "ddim" else None
    options = {"steps": 4, "sampler": sampler, "eta": eta, "output_type": "latent"}
    together = sd.txt2img(PROMPT, seed=11, num_images=3, batch_size=batch_size, **options)
    assert together.seeds == [11, 12, 13] and together.latents.shape == (3, 4, 8, 8)
    for i in range(3):
        alone = sd.txt2img(PROMPT, seed=11 + i, **options)
        assert far(together.latents[i], alone.latents[0]) <= 5e-6


@pytest.mark.slow
def test_img2img_and_inpaint_do_not_depend_on_the_batch_either(sd, sd9):
    for painter, options in ((sd, {}), (sd, {"mask": half_mask()}), (sd9, {"mask": half_mask()})):
        options |= {"image": picture(), "strength": 0.6, "steps": 5, "eta": 1.0, "output_type": "latent"}
        together = list(painter.stream([PROMPT] * 2, seed=3, batch_size=2, **options))[-1].result
        alone = list(painter.stream(PROMPT, seed=4, **options))[-1].result
        assert far(together.latents[1], alone.latents[0]) <= 5e-6


def test_five_prompts_come_out_in_order_for_every_batch_size(sd):
    prompts = [f"a {colour} circle" for colour in ("red", "green", "blue", "white", "black")]
    runs = [sd.txt2img(prompts, seed=1, steps=2, batch_size=size, output_type="latent") for size in (2, 3, 7)]
    for run in runs:
        assert [one.prompt for one in run.parameters] == prompts and run.seeds == [1, 2, 3, 4, 5]
        assert far(run.latents, runs[0].latents) <= 5e-6


def test_the_order_of_prompts_does_not_matter_where_seeds_go_with_them(sd):
    a = sd.txt2img(["red", "blue"], seed=[8, 3], steps=2, output_type="latent")
    b = sd.txt2img(["blue", "red"], seed=[3, 8], steps=2, output_type="latent")
    assert far(a.latents, b.latents.flip(0)) <= 5e-6


def test_num_images_repeats_each_prompt(sd):
    out = sd.txt2img(["red", "blue"], negative_prompt=["x", "y"], num_images=2, seed=0, steps=1)
    assert [(p.prompt, p.negative_prompt, p.seed) for p in out.parameters] == [
        ("red", "x", 0), ("red", "x", 1), ("blue", "y", 2), ("blue", "y", 3)
    ]  # fmt: skip


def test_a_seed_that_was_drawn_is_told_and_paints_the_same_again(sd):
    first = sd.txt2img(PROMPT, steps=2, num_images=2)
    again = sd.txt2img(PROMPT, steps=2, num_images=2, seed=first.seeds[0])
    assert first.seeds == again.seeds and torch.equal(first.latents, again.latents)
    assert sd.txt2img(PROMPT, steps=1).seeds != first.seeds[:1]


def test_global_generators_are_left_alone(sd):
    torch.manual_seed(0)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    sd.inpaint(PROMPT, picture(), half_mask(), steps=2, eta=1.0)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_fixed_code_begins_every_batch_alike(sd):
    out = sd.txt2img(PROMPT, steps=2, num_images=5, batch_size=2, seed=7, fixed_code=True)
    assert out.seeds == [7, 8, 7, 8, 7]
    assert far(out.latents[2], out.latents[0]) <= 5e-6 and far(out.latents[1], out.latents[0]) > 0.01


# --- knobs ---

KNOBS = {
    "guidance_interval": [0.2, 0.8],
    "cache_interval": 2,
    "cache_depth": 3,
    "merge_ratio": 0.4,
    "merge_seed": 11,
}


@contextlib.contextmanager
def rows_asked(sd):
    """How many rows the UNet is asked about, call by call."""
    rows = []
    unet = sd.model.model.diffusion_model
    handle = unet.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    yield rows
    handle.remove()


@pytest.mark.parametrize(
    ("interval", "rows"),
    [
        ((0.0, 1.0), [4, 4, 4, 4, 4]),
        ((0.3, 0.7), [2, 4, 4, 2, 2]),
        ((0.0, 0.3), [2, 2, 2, 4, 4]),
        ((0.5, 0.5), [2, 2, 2, 2, 2]),
    ],
)
def test_the_negative_prompt_is_asked_for_within_the_interval_only(sd, interval, rows):
    """DDIM's five levels lie at 0.8, 0.6, 0.4, 0.2 and 0 of the schedule."""
    options = {"steps": 5, "num_images": 2, "seed": 4, "output_type": "latent"}
    with rows_asked(sd) as seen:
        out = sd.txt2img(PROMPT, negative_prompt="blue", guidance_interval=interval, **options)
    assert seen == rows
    if interval == (0.0, 1.0):
        assert torch.equal(out.latents, sd.txt2img(PROMPT, negative_prompt="blue", **options).latents)
    if interval == (0.5, 0.5):
        assert torch.equal(out.latents, sd.txt2img(PROMPT, guidance_scale=1.0, **options).latents)


def test_every_door_takes_the_knobs_and_the_picture_tells_them_and_repeats_itself(sd, sd9, tmp_path):
    doors = {
        "txt2img": lambda **options: sd.txt2img(PROMPT, **options),
        "img2img": lambda **options: sd.img2img(PROMPT, picture(), strength=0.7, **options),
        "inpaint": lambda **options: sd.inpaint(PROMPT, picture(), half_mask(), **options),
        "inpaint9": lambda **options: sd9.inpaint(PROMPT, picture(), half_mask(), **options),
    }
    for name, paint in doors.items():
        out, plain = paint(seed=1, steps=3, **KNOBS), paint(seed=1, steps=3)
        told = ldm.read_metadata(out.save(tmp_path / name)[0])
        assert {knob: told[knob] for knob in KNOBS} == KNOBS
        again = paint(**{option: told[option] for option in ("seed", "steps", *KNOBS)})
        assert torch.equal(again.latents, out.latents) and far(out.latents, plain.latents) > 1e-4
        told = plain.parameters[0]
        off = (told.guidance_interval, told.cache_interval, told.cache_depth, told.merge_ratio)
        assert off == ([0.0, 1.0], 1, 1, 0.0) and told.merge_seed is None


# --- the original's draws ---


@pytest.fixture(scope="module")
def recorded():
    """The recorded latent model: f = 4, its text stage the identity, so that features are given."""
    return StableDiffusion(latent_model())


def chain(recorded, **options):
    embeds = {
        "prompt_embeds": keyed_input("c", (2, 7, 24)),
        "negative_prompt_embeds": keyed_input("uc", (2, 7, 24)),
    }
    return recorded.txt2img(None, steps=10, guidance_scale=3.0, output_type="latent", **embeds, **options)


def test_compvis_draws_reproduce_the_recorded_chain(recorded, golden):
    """The whole way of CompVis's script after seeding: x_T, then noise at each step, drawn for the batch."""
    want = load_file(golden / "diffusion.safetensors")["sample.ddim10_seeded"]
    got = chain(recorded, seed=123, rng="compvis")
    assert got.seeds == [123, 123] and [p.batch_index for p in got.parameters] == [0, 1]
    assert far(got.latents, want) <= 1e-5
    assert far(chain(recorded, seed=123).latents, want) > 0.1  # our own draws are others


@pytest.mark.slow
def test_compvis_fixed_code_draws_x_T_once(recorded):
    free = chain(recorded, seed=5, rng="compvis", num_images=2, batch_size=2)
    fixed = chain(recorded, seed=5, rng="compvis", num_images=2, batch_size=2, fixed_code=True)
    torch.testing.assert_close(fixed.latents[:2], free.latents[:2], rtol=0, atol=1e-6)
    assert far(fixed.latents[2:], free.latents[2:]) > 0.1


def test_compvis_rng_encodes_a_picture_once_for_all_batches(sd):
    """CompVis draws the encoder's noise before its first batch, so a second batch shares it."""
    options = {"image": picture(), "strength": 0.5, "steps": 4, "seed": 9, "rng": "compvis"}
    torch.manual_seed(1)
    out = sd.img2img(PROMPT, num_images=3, batch_size=2, output_type="latent", **options)
    torch.manual_seed(2)
    again = sd.img2img(PROMPT, num_images=3, batch_size=2, output_type="latent", **options)
    assert torch.equal(out.latents, again.latents) and out.latents.shape == (3, 4, 8, 9)


# --- sizes ---


@pytest.mark.parametrize("size", [(64, 72), (88, 64), (104, 120)])
def test_every_multiple_of_eight_works(sd, size):
    height, width = size
    assert sd.txt2img(PROMPT, height=height, width=width, steps=1)[0].size == (width, height)


def test_the_models_own_size_is_the_default(sd):
    out = sd.txt2img(PROMPT, steps=1)
    assert out[0].size == (64, 64) and (out.parameters[0].width, out.parameters[0].height) == (64, 64)
    assert native_size(sd.model) == (64, 64) and downsampling(sd.model) == 8


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"width": 500}, "width must be a multiple of 8, got 500; the nearest two that work are 496 and 504"),
        (
            {"height": 100},
            "height must be a multiple of 8, got 100; the nearest two that work are 96 and 104",
        ),
        ({"width": 56}, "width must be a multiple of 8 from 64 to 2048, got 56"),
        ({"width": 0}, "got 0"),
        ({"height": -8}, "got -8"),
        ({"height": 2056}, "from 64 to 2048, got 2056"),
        ({"width": 512.5}, "got 512.5"),
        ({"width": "512"}, "got '512'"),
        ({"width": True}, "got True"),
    ],
)
def test_other_sizes_are_refused(sd, size, words):
    with pytest.raises(UsageError, match="must be") as caught:
        sd.stream(PROMPT, **size)
    assert words in str(caught.value)


def test_a_picture_gives_the_size_rounded_down(sd):
    out = sd.img2img(PROMPT, picture(77, 66), steps=2)
    assert out[0].size == (72, 64)
    assert sd.img2img(PROMPT, picture(200, 200), steps=2, width=64, height=80)[0].size == (64, 80)


# --- refusals, all at the call and before any work ---


def both(embeds):
    return {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 1001}, "got 1001"),
        ({"steps": 2.5}, "got 2.5"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a number from 0 to 100, got nan"),
        ({"guidance_scale": -1}, "got -1"),
        ({"guidance_scale": 1e30}, "got 1e+30"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be a number from 0 to 1, got 1.5"),
        ({"guidance_interval": (0.9, 0.2)}, "0 <= low <= high <= 1, got (0.9, 0.2)"),
        ({"guidance_interval": 0.5}, "guidance_interval must be (low, high)"),
        ({"cache_interval": 0}, "cache_interval must be a whole number from 1 to 1000, got 0"),
        ({"cache_depth": 5}, "cache_depth must be a whole number from 1 to 4, got 5"),
        ({"merge_ratio": 0.9}, "merge_ratio must be a number from 0 to 0.75, got 0.9"),
        (
            {"merge_seed": -3},
            "merge_seed must be a whole number from 0 to 18446744073709551615 or None, got -3",
        ),
        ({"eta": -1}, "eta must be a number from 0 to 1, got -1"),
        ({"eta": 0.5, "sampler": "plms"}, "eta of plms must be 0"),
        (
            {"sampler": "magic"},
            "the sampler must be one of ddim, plms, ddpm, dpm_solver, ",
        ),
        ({"spacing": "magic"}, "magic"),
        ({"seed": -2}, "seed must be a whole number from 0 to 18446744073709551615, or -1, 'random' or None"),
        (
            {"seed": 2**64 - 1, "num_images": 2},
            "after 1 none is left; take a smaller seed, got 18446744073709551615",
        ),
        ({"seed": 2**64 - 2, "num_images": 4, "batch_size": 3, "fixed_code": True}, "after 2 none is left"),
        (
            {"variation_seed": 2**64 - 1, "num_images": 2, "variation_strength": 0.5},
            "picture i has variation_seed + i",
        ),
        ({"seed": [1]} | {"num_images": 2}, "one for each image, wanted 2, got 1"),
        ({"seed": "abc"}, "got 'abc'"),
        ({"num_images": 0}, "num_images must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": "Auto"}, "batch_size must be"),
        ({"rng": "gpu"}, "rng must be one of image, nv, compvis, diffusers, comfyui; got 'gpu'"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent; got 'jpg'"),
        ({"negative_prompt": ["a", "b"]}, "one for each of 1 prompts, got 2"),
        ({"strength": 0.5}, "strength is for a picture"),
        ({"mask": half_mask()}, "a mask needs a picture"),
        ({"image": picture(), "strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
        ({"image": picture(), "strength": -0.1}, "got -0.1"),
        ({"image": picture(), "strength": math.nan}, "got nan"),
        ({"image": picture(), "mask": Image.new("L", (72, 64))}, "the mask marks nothing"),
        ({"image": 3}, "image must be a PIL picture, a path or a tensor, got int"),
        ({"image": torch.zeros(1, 4, 64, 64)}, "image must be a finite (1, 3, height, width) tensor"),
        ({"image": torch.full((1, 3, 64, 64), math.nan)}, "must be a finite"),
        ({"image": torch.zeros(1, 3, 64, 60)}, "width must be"),
        ({"image": torch.zeros(1, 3, 64, 64), "width": 72}, "keeps its size"),
        (
            {"image": picture(), "mask": torch.ones(1, 1, 64, 64)},
            "mask must have the picture's size (72, 64)",
        ),
        ({"image": picture(40, 90)}, "width of the picture must be a multiple of 8 from 64 to 2048, got 40"),
        ({"image": "https://example.org/a.png"}, "got the URL"),
        (
            {"prompt_embeds": torch.zeros(1, 7, 24)},
            "negative_prompt_embeds must be (n, tokens, d), both alike, got None",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 7, 24)},
            "negative_prompt_embeds goes with prompt_embeds, got prompt_embeds=None",
        ),
        ({"prompt_embeds": torch.zeros(7, 24)}, "prompt_embeds must be (n, tokens, d)"),
        # Other kinds of values, and numbers that Python itself refuses to print or to turn into a float.
        ({"steps": "20"}, "steps must be a whole number from 1 to 1000, got '20'"),
        ({"steps": 10**5000}, "steps must be a whole number from 1 to 1000, got a int that cannot be shown"),
        ({"steps": True}, "got True"),
        ({"steps": math.nan}, "got nan"),
        ({"width": 512.0}, "width must be a multiple of 8 from 64 to 2048, got 512.0"),
        ({"width": "512"}, "got '512'"),
        (
            {"height": 10**5000},
            "height must be a multiple of 8 from 64 to 2048, got a int that cannot be shown",
        ),
        ({"height": [64]}, "got [64]"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": "5"}, "got '5'"),
        ({"seed": True}, "got True"),
        ({"seed": 10**5000}, "got a int that cannot be shown"),
        ({"seed": [1, -2], "num_images": 2}, "got -2"),
        ({"seed": np.array([[1]])}, "got [1]"),
        ({"seed": b"5"}, "got b'5'"),
        ({"seed": torch.Generator()}, "got <torch._C.Generator"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number from 0 to 100, got '7'"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number from 0 to 100, got 1000"),
        ({"guidance_scale": 1 + 1j}, "got (1+1j)"),
        ({"guidance_rescale": None}, "guidance_rescale must be a number from 0 to 1, got None"),
        ({"guidance_interval": ("0", "1")}, "guidance_interval must be (low, high)"),
        ({"guidance_interval": (0, math.nan)}, "guidance_interval must be (low, high)"),
        ({"cache_interval": "2"}, "cache_interval must be a whole number from 1 to 1000, got '2'"),
        ({"cache_depth": 1.0}, "cache_depth must be"),
        ({"merge_ratio": "0.5"}, "merge_ratio must be a number from 0 to 0.75"),
        ({"merge_seed": 1.5}, "merge_seed must be a whole number"),
        ({"eta": "1"}, "eta must be a number from 0 to 1, got '1'"),
        ({"sampler": None}, "the sampler must be one of"),
        ({"sampler": 3}, "the sampler must be one of"),
        ({"spacing": 3}, "spacing must be a name, or a list of sigmas, got 3"),
        ({"spacing": "karas"}, "the spacing must be one of uniform, quad"),
        ({"spacing": [3.0, 1.0], "steps": 2}, "2 steps need 3 sigmas, the end included; got 2"),
        ({"spacing": [1.0, 3.0]}, "a list of sigmas must hold two at least, each below the last, got"),
        ({"sampler": "DPM++ 2M Karras", "spacing": "simple"}, "name two spacings; give one"),
        ({"num_images": 2.0}, "num_images must be a whole number from 1 to 100000, got 2.0"),
        ({"batch_size": "4"}, "batch_size must be a whole number from 1 to 1024, or 'auto'; got '4'"),
        ({"rng": ["image"]}, "rng must be one of image, nv, compvis, diffusers, comfyui; got ['image']"),
        ({"output_type": None}, "output_type must be one of pil, np, pt, latent; got None"),
        (
            {"negative_prompt": 5},
            "negative_prompt must be a text or a list of texts with one at least, got 5",
        ),
        ({"image": picture(), "strength": "0.5"}, "strength must be a number from 0 to 1, got '0.5'"),
        ({"prompt_embeds": [[1.0]]}, "prompt_embeds must be (n, tokens, d)"),
        ({"prompt_embeds": 3}, "prompt_embeds must be (n, tokens, d)"),
        (both(torch.zeros(1, 7, 24)), "prompt_embeds must have 128 features a token, got (1, 7, 24)"),
        (
            both(torch.zeros(1, 7, 128, dtype=torch.int64)),
            "must be finite floating-point numbers, got torch.int64",
        ),
        (both(torch.full((1, 7, 128), math.nan)), "must be finite floating-point numbers"),
        (both(torch.zeros(1, 7, 128, device="meta")), "must be finite floating-point numbers"),
        ({"prompt_embeds": 10**5000}, "got a int that cannot be shown"),
        (
            {"merge_ratio": 10**5000},
            "merge_ratio must be a number from 0 to 0.75, got a int that cannot be shown",
        ),
        ({"merge_seed": 10**5000}, "got a int that cannot be shown"),
        ({"cache_interval": "x" * 9000}, "cache_interval must be a whole number from 1 to 1000, got 'xxx"),
        ({"sampler": "x" * 9000}, "got 'xxx"),
        ({"spacing": "x" * 9000}, "got 'xxx"),
        ({"guidance_interval": torch.zeros(3, 3)}, "guidance_interval must be (low, high)"),
        ({"fixed_code": "no"}, "fixed_code must be True or False, got 'no'"),
    ],
)
def test_values_out_of_range_are_refused(sd, options, words):
    with pytest.raises(UsageError) as caught:
        sd.stream(PROMPT, **options)
    assert words in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "prompt must be a text or a list of texts"),
        ([], "with one at least, got []"),
        ([3], "got [3]"),
        (b"red", "got b'red'"),
        (5, "with one at least, got 5"),
        ({"a": 1}, "got {'a': 1}"),
        (["a", None], "got ['a', None]"),
        ("a\ud800b", "lone surrogates"),
        ("x" * 100_001, "at most 100000 characters, got 100001"),
    ],
)
def test_what_is_no_text_is_refused(sd, prompt, words):
    with pytest.raises(UsageError) as caught:
        sd.stream(prompt)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["", "   ", "<|endoftext|>", "\x00\x1b[31m", "日本\U0001f600\u202e", "((((" * 500]
)
def test_odd_prompts_paint(sd, prompt):
    assert len(sd.txt2img(prompt, steps=1)) == 1


def test_pictures_and_masks_are_wanted_where_the_name_says_so(sd):
    with pytest.raises(UsageError, match="img2img needs a picture"):
        sd.img2img(PROMPT, None)
    with pytest.raises(UsageError, match="inpaint needs a mask"):
        sd.inpaint(PROMPT, picture(), None)


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta", 99, 1.5, [], b"cpu", "x" * 9000])
def test_devices_that_are_not_there(device):
    with pytest.raises(
        UsageError, match=rf"device {re.escape(repr(str(device))[:40])}.* is not available; have: .*cpu"
    ):
        pick_device(device)


def test_devices_and_dtypes_that_are(sd, caplog):
    assert pick_device("cpu") == torch.device("cpu") and pick_device("auto").type
    assert pick_dtype(torch.device("cpu"), None) == torch.float32
    assert pick_dtype(torch.device("cuda"), None) == torch.float16
    assert pick_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    assert pick_dtype(torch.device("cpu"), torch.float16) == torch.float32
    assert "float32 is used instead" in caplog.text
    with pytest.raises(UsageError, match="must be torch.float32, .* or torch.bfloat16, got torch.int8"):
        pick_dtype(torch.device("cpu"), torch.int8)
    with pytest.raises(UsageError, match="must be torch.float32, .* got 'float16'"):
        pick_dtype(torch.device("cpu"), "float16")


def test_a_unet_of_another_kind_is_refused(own):
    own.model.channels = 3
    with pytest.raises(MismatchError, match="the UNet takes 4 channels; wanted 3 .* or 7"):
        own.stream(PROMPT)


def test_from_pretrained_wants_a_folder(tmp_path):
    with pytest.raises(UsageError, match="wants a folder in diffusers' layout"):
        StableDiffusion.from_pretrained(tmp_path / "none")
    with pytest.raises(AbsentError):
        StableDiffusion.from_single_file(tmp_path / "none.safetensors")


# --- numbers that are not finite ---


def test_nan_from_the_unet_is_named_with_its_step(own):
    own.model.model.diffusion_model.out[2].bias.data.fill_(math.nan)
    with pytest.raises(
        NumericError, match="the UNet gave values that are not finite at step 1 of 3, in float32"
    ):
        own.txt2img(PROMPT, steps=3)


def test_nan_from_the_decoder_is_named(own):
    own.model.first_stage_model.decoder.conv_out.bias.data.fill_(math.inf)
    with pytest.raises(NumericError, match="the VAE's decoder gave values that are not finite, in float32"):
        own.txt2img(PROMPT, steps=1)


def test_nan_from_the_encoder_is_named(own):
    own.model.first_stage_model.encoder.conv_out.bias.data.fill_(math.nan)
    with pytest.raises(NumericError, match="the VAE's encoder"):
        own.img2img(PROMPT, picture(), steps=2)


def test_a_decoder_that_overflows_in_half_is_put_into_float32(own, caplog):
    """Groups of equal weights make activations beyond 65504, which the norms after them bring back."""
    decoder = own.model.first_stage_model.decoder
    decoder.conv_in.weight.data.mul_(3e4)
    want = own.txt2img(PROMPT, seed=0, steps=1, output_type="pt").images
    own.model.first_stage_model.half()
    with caplog.at_level(logging.WARNING):
        out = own.txt2img(PROMPT, seed=0, steps=1, output_type="pt")
    assert "the VAE's decoder overflowed in float16 and was put into float32" in caplog.text
    assert out.parameters[0].vae_dtype == "float32"
    assert (out.images - want).abs().max() < 0.05  # the weights were rounded to half on the way


# --- precision ---


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.thinned(2)
def test_half_precision_is_the_unets_only(sd, own, how):
    want = sd.txt2img(PROMPT, seed=1, steps=4, output_type="pt")
    if how == "autocast":
        own.autocast = torch.bfloat16
    else:
        own.to(torch.bfloat16)
    got = own.txt2img(PROMPT, seed=1, steps=4, output_type="pt")
    assert got.latents.dtype == torch.float32 and got.parameters[0].vae_dtype == "float32"
    assert got.parameters[0].dtype == {"bfloat16": "bfloat16", "autocast": "float32, autocast bfloat16"}[how]
    assert own.model.alphas_cumprod.dtype == torch.float32
    error = (got.images - want.images).square().mean().sqrt().item()
    assert 0 < error < 0.05  # at least 26 dB, and not the same computation


def test_a_half_model_gets_a_float32_vae(own):
    sd = StableDiffusion(own.model.to(torch.bfloat16))
    assert sd.dtype == torch.bfloat16 and dtype_of(sd.model.first_stage_model) == torch.float32
    assert sd.to("cpu", torch.float32).dtype == torch.float32
    assert repr(sd) == "StableDiffusion(unnamed, cpu, float32)"


# --- memory ---


def test_a_batch_that_does_not_fit_is_halved(sd, own, caplog):
    """A device that holds three images, guidance doubling them, as torch reports its end."""
    whole = own.model.apply_model

    def small(x, *args):
        if len(x) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(x, *args)

    own.model.apply_model = small
    out = own.txt2img(PROMPT, steps=2, seed=4, num_images=5, batch_size=5)
    want = sd.txt2img(PROMPT, steps=2, seed=4, num_images=5, batch_size=5)
    assert out.seeds == want.seeds and far(out.latents, want.latents) <= 5e-6
    assert "out of memory with 5 images at once; trying 3" in caplog.text
    with pytest.raises(ResourceError, match="out of memory at 64 x 64, 5 at once, in float32; use a smaller"):
        own.txt2img(PROMPT, steps=2, num_images=5, batch_size=5, rng="compvis")


def test_one_image_that_does_not_fit_is_an_error(own):
    def none(x, *args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    own.model.apply_model = none
    with pytest.raises(ResourceError, match="64 x 64, 1 at once"):
        own.txt2img(PROMPT, steps=2)


def test_other_errors_of_a_model_are_not_hidden(own):
    def broken(x, *args):
        raise RuntimeError("shape")

    own.model.apply_model = broken
    with pytest.raises(RuntimeError, match="^shape$"):
        own.txt2img(PROMPT, steps=2)


# --- guidance ---


def test_scale_one_does_not_see_the_negative_prompt_and_others_do(sd):
    def paint(scale, negative):
        return sd.txt2img(PROMPT, negative_prompt=negative, guidance_scale=scale, seed=0, steps=2).latents

    assert torch.equal(paint(1.0, "blue"), paint(1.0, "green"))
    assert far(paint(3.0, "blue"), paint(3.0, "green")) > 1e-4
    assert torch.equal(paint(0.0, PROMPT), paint(1.0, "")) or far(paint(0.0, PROMPT), paint(1.0, "")) < 1e-5


def test_a_prompt_against_itself_is_no_guidance(sd):
    """eps_u + s (eps_c - eps_u) with eps_u = eps_c, for any s."""
    guided = sd.txt2img(PROMPT, negative_prompt=PROMPT, guidance_scale=9.0, seed=0, steps=3)
    plain = sd.txt2img(PROMPT, guidance_scale=1.0, seed=0, steps=3)
    assert far(guided.latents, plain.latents) < 1e-4


def test_words_that_do_not_fit_are_warned_of_and_recorded(sd, caplog):
    long = "red circle " * 20 + "omega"
    out = sd.txt2img([long, PROMPT], steps=1)
    assert out.parameters[0].dropped_words and not out.parameters[1].dropped_words
    assert "dropped" in caplog.text


# --- img2img ---


def test_strength_zero_returns_the_picture_itself(sd):
    image = picture()
    for strength in (0, 0.05):  # less than one of ten steps
        out = sd.img2img(PROMPT, image, strength, steps=10)
        assert np.array_equal(np.asarray(image), np.asarray(out[0]))
    assert out.parameters[0].mode == "img2img" and out.latents.shape == (1, 4, 8, 9)


@pytest.mark.parametrize("sampler", (*ALL, *SIGMA[:2]))
@pytest.mark.thinned(3)
def test_strength_one_forgets_the_picture(sd, sampler):
    a, b = (sd.img2img(PROMPT, picture(seed=s), 1.0, seed=1, steps=3, sampler=sampler) for s in (1, 2))
    assert torch.equal(a.latents, b.latents)


def test_strength_in_between_runs_its_share_and_nears_the_picture(sd):
    image = picture()
    z = generate.encode_image(sd.model, to_tensor(image), 1, torch.zeros_like)
    steps, gaps = [], []
    for strength in (0.2, 0.5, 0.9):
        stream = list(
            sd.stream(PROMPT, image=image, strength=strength, steps=10, seed=0, output_type="latent")
        )
        steps.append(len(stream) - 1)
        gaps.append((stream[-1].result.latents - z).square().mean().item())
    assert steps == [2, 5, 9] and gaps == sorted(gaps)


def test_the_start_is_the_sampled_latents_noised_to_the_level_above(own):
    """sqrt(a) z + sqrt(1 - a) n, z drawn from the encoder's Gaussian first, n second, level 13 of 20 (CompVis)."""
    seen = []
    whole = own.model.apply_model
    own.model.apply_model = lambda x, *args: seen.append(x) or whole(x, *args)
    own.img2img(PROMPT, picture(), 0.6, seed=3, steps=20, guidance_scale=1.0)
    noise, like = ImageNoise([3]), torch.empty(1, 4, 8, 9)
    posterior = own.model.encode_first_stage(to_tensor(picture()))
    z = 0.18215 * (posterior.mean + posterior.std * noise(like))
    level = own.model.alphas_cumprod[12 * 50 + 1]
    assert len(seen) == 12
    torch.testing.assert_close(
        seen[0], level.sqrt() * z + (1 - level).sqrt() * noise(like), rtol=0, atol=1e-5
    )


def test_pictures_come_as_paths_tensors_and_pil(sd, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    runs = [
        sd.img2img(PROMPT, one, 0.5, seed=0, steps=2)
        for one in (image, str(tmp_path / "a.png"), to_tensor(image))
    ]
    assert torch.equal(runs[0].latents, runs[1].latents) and torch.equal(runs[0].latents, runs[2].latents)
    assert len({run.parameters[0].init_image_hash for run in runs}) == 1


# --- inpaint ---


@pytest.mark.parametrize("kind", [4, 9])
def test_black_is_kept_to_the_pixel_and_white_is_painted(sd, sd9, kind):
    painter, image = {4: sd, 9: sd9}[kind], picture()
    out = painter.inpaint(PROMPT, image, half_mask(), seed=0, steps=3, output_type="pt")
    want = (to_tensor(image) + 1) / 2
    torch.testing.assert_close(out.images[..., :36], want[..., :36], rtol=0, atol=1e-6)
    assert (out.images[..., 36:] - want[..., 36:]).abs().mean() > 0.01
    assert out.parameters[0].mode == "inpaint" and out.parameters[0].strength == 1.0


def test_kept_latents_are_the_pictures(sd):
    """The cell that the mask's edge crosses is repainted, those left of it are the picture's own."""
    generators = ImageNoise([0])
    z = generate.encode_image(sd.model, to_tensor(picture()), 1, generators)
    out = sd.inpaint(PROMPT, picture(), half_mask(), seed=0, steps=3, output_type="latent")
    torch.testing.assert_close(out.latents[..., :4], z[..., :4], rtol=0, atol=1e-6)
    assert (out.latents[..., 4] - z[..., 4]).abs().max() > 0.01


def test_an_all_white_mask_forgets_the_picture(sd, sd9):
    white = Image.new("L", (72, 64), 255)
    for painter in (sd, sd9):
        a, b = (painter.inpaint(PROMPT, picture(seed=s), white, seed=1, steps=2) for s in (1, 2))
        # The encoder's noise is drawn per picture, but nine channels see a grey one both times.
        assert torch.equal(a.latents, b.latents)


def test_masks_come_as_tensors_too_and_are_resized(sd):
    mask = torch.zeros(1, 1, 64, 72)
    mask[..., 36:] = 1
    a = sd.inpaint(PROMPT, picture(), mask, seed=1, steps=2)
    b = sd.inpaint(PROMPT, picture(), half_mask().resize((144, 128)), seed=1, steps=2)
    assert torch.equal(a.latents, b.latents)


def test_nine_channels_see_latents_mask_and_masked_picture(sd9):
    """The order of v1-inpainting: mask nearest-shrunk, then the picture with white parts grey."""
    seen = []
    model = sd9.model
    hook = model.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["c_concat"]), with_kwargs=True
    )
    try:
        sd9.inpaint(PROMPT, picture(), half_mask(), seed=0, steps=1, guidance_scale=2.0)
        sd9.txt2img(PROMPT, height=64, width=72, seed=0, steps=1, guidance_scale=1.0)
    finally:
        hook.remove()
    (concat,) = seen[0]
    assert concat.shape == (2, 5, 8, 9)  # unconditional and conditional see the same
    assert torch.equal(concat[0], concat[1])
    assert concat[0, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]  # pixel 32 of the cell 32..39 is black
    noise = ImageNoise([0])
    noise(torch.empty(1, 4, 8, 9))  # the picture itself is encoded first
    grey = to_tensor(picture()).clone()
    grey[..., 36:] = 0
    want = generate.encode_image(model, grey, 1, noise)
    torch.testing.assert_close(concat[:1, 1:], want, rtol=0, atol=1e-6)
    assert seen[1][0][:, 0].min() == 1  # without a mask everything is repainted


# --- the stream ---


def test_a_stream_tells_every_step_and_every_finished_batch(sd):
    events = list(sd.stream(PROMPT, num_images=3, batch_size=2, steps=3, seed=0))
    assert [(e.batch, e.batches, e.step, e.steps, e.result is not None) for e in events] == [
        (0, 2, 1, 3, False), (0, 2, 2, 3, False), (0, 2, 3, 3, False), (0, 2, 3, 3, True),
        (1, 2, 1, 3, False), (1, 2, 2, 3, False), (1, 2, 3, 3, False), (1, 2, 3, 3, True),
    ]  # fmt: skip
    assert [len(e.result) for e in events if e.result] == [2, 1]
    assert [p.size for p in events[0].preview()] == [(64, 64)] * 2
    assert not torch.is_grad_enabled() or events[0].x_t.requires_grad is False


def test_a_callback_that_says_false_ends_the_run_with_what_is_finished(sd):
    out = sd.txt2img(PROMPT, num_images=3, batch_size=1, steps=2, seed=5, callback=lambda e: e.batch < 2)
    assert out.interrupted and out.seeds == [5, 6] and len(out.images) == 2
    none = sd.txt2img(PROMPT, steps=2, callback=lambda e: False)
    assert none.interrupted and len(none) == 0 and none._repr_png_() is None
    seen = []
    whole = sd.txt2img(PROMPT, steps=2, callback=seen.append)
    assert not whole.interrupted and len(seen) == 3


def test_what_a_callback_raises_comes_out_as_it_is(sd):
    class Mine(Exception):
        pass

    def callback(progress):
        raise Mine("stop")

    with pytest.raises(Mine, match="stop"):
        sd.txt2img(PROMPT, steps=2, callback=callback)
    assert len(sd.txt2img(PROMPT, steps=1)) == 1  # and the model is as it was


@pytest.mark.parametrize("callback", [5, "print", [print]])
def test_a_callback_that_is_no_function_is_refused_at_once(sd, callback):
    with pytest.raises(UsageError, match="callback must be a function of one Progress, got"):
        sd.txt2img(PROMPT, steps=2, callback=callback)


DOORS = {"txt2img": (PROMPT,), "img2img": (PROMPT, None), "inpaint": (PROMPT, None, None)}
DOORS |= {"stream": (PROMPT,), "plan": (PROMPT,), "__call__": (PROMPT,)}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_shows_every_option_with_its_default(sd, door):
    shown = inspect.signature(sd if door == "__call__" else getattr(sd, door)).parameters
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in shown.values()}
    wanted = {
        "negative_prompt": "",
        "steps": None,
        "sampler": "ddim",
        "seed": None,
        "num_images": 1,
        "eta": None,
    }
    wanted |= {"guidance_interval": (0.0, 1.0), "output_type": "pil", "height": None, "prompt_embeds": None}
    assert wanted.items() <= {name: p.default for name, p in shown.items()}.items()
    collects = door not in ("stream", "plan")
    assert ("callback" in shown) == ("progress" in shown) == collects
    takes = {name for name, p in shown.items() if p.default is p.empty}
    assert takes == {"prompt", "image", "mask"} & set(["prompt", "image", "mask"][: len(DOORS[door])])
    assert "multiples of the model's f" in getattr(StableDiffusion, door).__doc__
    # What is shown is what is taken: each option, at its default, passes the check of names.
    assert set(shown) - {"callback", "progress"} >= set(inspect.signature(sd.plan).parameters)


def test_loaders_show_their_options():
    single = inspect.signature(StableDiffusion.from_single_file).parameters
    folder = inspect.signature(StableDiffusion.from_pretrained).parameters
    box = inspect.signature(StableDiffusion.default).parameters
    assert next(iter(single)) == "path" and "vae_dtype" in single
    assert list(folder) == ["folder", *list(single)[1:]]
    assert set(box) == set(single) - {"path", "config"} and box["device"].default == "cpu"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_inference_steps", "here it is steps"),
        ("ddim_steps", "here it is steps"),
        ("num_steps", "here it is steps"),
        ("stepz", "did you mean steps?"),
        ("generator", "here it is seed (a number, or a list"),
        ("latents", "here it is seed"),
        ("cfg_scale", "here it is guidance_scale"),
        ("cfg", "here it is guidance_scale"),
        ("scale", "here it is guidance_scale"),
        ("guidance", "here it is guidance_scale"),
        ("batch_count", "here it is num_images"),
        ("n_iter", "here it is num_images"),
        ("num_images_per_prompt", "here it is num_images"),
        ("n_samples", "here it is batch_size"),
        ("mask_image", "here it is mask"),
        ("init_image", "here it is image"),
        ("denoising_strength", "here it is strength"),
        ("sampler_name", "here it is sampler (by name"),
        ("scheduler", "here it is sampler"),
        ("ddim_eta", "here it is eta"),
        ("H", "here it is height"),
        ("W", "here it is width"),
        ("negativ_prompt", "did you mean negative_prompt?"),
        ("return_dict", "a GenerationResult comes"),
        ("qqqq", "lists what there is"),
    ],
)
def test_an_unknown_option_is_answered_with_ours(sd, door, theirs, ours):
    with pytest.raises(UsageError, match=f"got an unexpected keyword argument '{theirs}'") as caught:
        getattr(sd, door)(*DOORS[door], **{theirs: 3})
    # A mistake in a name is Python's TypeError to those who catch that.
    assert isinstance(caught.value, TypeError) and ours in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("torch_dtype", "here it is dtype"),
        ("original_config_file", "here it is config"),
        ("safety_checker", "no picture is filtered"),
        ("requires_safety_checker", "no picture is filtered"),
        ("variant", "name the file"),
        ("local_files_only", "nothing is downloaded"),
        ("use_safetensors", "leave it out"),
        ("lowvram", "here it is low_vram"),
        ("vae_dtyp", "did you mean vae_dtype?"),
    ],
)
@pytest.mark.parametrize("door", ["from_single_file", "from_pretrained"])
def test_loaders_answer_others_words_before_they_look_at_the_file(door, theirs, ours):
    with pytest.raises(UsageError, match=theirs) as caught:
        getattr(StableDiffusion, door)("nowhere", **{theirs: None})
    assert ours in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("scheduler", "sampler='plms'"),
        ("unet", "sd.model.model.diffusion_model"),
        ("vae", "from_single_file(path, vae=file)"),
        ("text_encoder", "cond_stage_model.transformer"),
        ("tokenizer", "cond_stage_model.tokenizer"),
        ("safety_checker", "leave this line out"),
        ("components", "first_stage_model"),
        ("enable_xformers_memory_efficient_attention", "sd.optimize()"),
        ("enable_attention_slicing", "sd.optimize()"),
        ("disable_attention_slicing", "sd.optimize()"),
        ("enable_model_cpu_offload", "low_vram"),
        ("enable_vae_tiling", "tiled_vae=True"),
        ("enable_vae_slicing", "sliced_vae=True"),
        ("set_progress_bar_config", "progress=False"),
        ("load_lora_weights", "sd.load_lora(file, weight)"),
        ("load_textual_inversion", "Embedding(file)"),
        ("cuda", "sd.to('cuda')"),
        ("half", "sd.to(torch.float16)"),
        ("eval", "leave this line out"),
    ],
)
def test_an_attribute_of_other_libraries_is_answered_read_and_set(sd, theirs, ours):
    before = dict(vars(sd))
    with pytest.raises(AttributeError, match=theirs) as read:
        getattr(sd, theirs)
    with pytest.raises(AttributeError, match=theirs) as put:
        setattr(sd, theirs, 3)
    for caught in (read, put):
        told = str(caught.value)
        assert ours in told and "ldm.diffusers_style.StableDiffusionPipeline" in told and len(told) <= 400
    assert not hasattr(sd, theirs) and vars(sd) == before


def test_what_an_answer_names_is_there(sd):
    parts = [
        sd.model.model.diffusion_model,
        sd.model.first_stage_model,
        sd.model.cond_stage_model.transformer,
    ]
    assert all(isinstance(part, torch.nn.Module) for part in parts) and sd.model.cond_stage_model.tokenizer
    for name, advice in other_words.ATTRIBUTES.items():
        for called in re.findall(r"(?:sd|StableDiffusion)\.(\w+)", advice):
            assert hasattr(sd, called), f"{name}: {called}"
    known = set(inspect.signature(sd.txt2img).parameters) | {"image", "mask", "strength"}
    known |= set(inspect.signature(StableDiffusion.from_single_file).parameters)
    assert set(other_words.KEYWORDS.values()) <= known


def test_a_misspelt_attribute_is_answered_and_a_persons_own_is_kept(sd, own):
    for name, hint in (("txt2imgs", "; did you mean txt2img"), ("__array__", "$"), ("qqqq", "$")):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'{hint}"):
            getattr(sd, name)
    own.note = "mine"
    assert own.note == "mine"

    class Mine(StableDiffusion):
        scheduler = None

    mine = Mine(own.model)
    mine.scheduler = 5
    assert mine.scheduler == 5


def test_reprs_are_short(sd):
    job = sd.plan([PROMPT] * 3, steps=2, seed=1)
    steps = list(sd.stream(PROMPT, steps=2, seed=1))
    assert repr(sd) == "StableDiffusion(tiny, cpu, float32)"
    assert repr(job) == "Request(txt2img, 3 of 64 x 64, ddim, 2 steps, guidance_scale 7.5)"
    assert repr(steps[0]) == "Progress(step 1 of 2, batch 1 of 1, (1, 4, 8, 8))"
    assert repr(steps[-1]).endswith(", GenerationResult(1 images, seeds=[1]))")
    assert repr(sd.model).startswith("LatentDiffusion(") and "first_stage_model: AutoencoderKL 0." in repr(
        sd.model
    )
    box = StableDiffusion.default()
    for thing in (sd.model, box.report, box.defaults):
        assert len(repr(thing)) < 300, repr(thing)


PAINT_IN_A_CHILD = """
import hashlib, multiprocessing, sys
import ldm, torch

def child(sd, model, put):
    torch.set_num_threads(1)
    told = [hashlib.sha256(sd.txt2img("a red circle", steps=1, seed=5)[0].tobytes()).hexdigest()]
    put.put(told + [str(sd.file), repr(sd), str(next(model.parameters()).sum().item())])

if __name__ == "__main__":
    torch.set_num_threads(1)
    sd = ldm.StableDiffusion.default()
    here = hashlib.sha256(sd.txt2img("a red circle", steps=1, seed=5)[0].tobytes()).hexdigest()
    total = str(next(sd.model.parameters()).sum().item())
    context = multiprocessing.get_context("spawn")
    put = context.Queue()
    process = context.Process(target=child, args=(sd, sd.model, put))
    process.start()
    assert put.get(timeout=100) == [here, str(sd.file), repr(sd), total]
    process.join()
"""


@pytest.mark.slow
def test_a_spawned_process_paints_the_same(tmp_path):
    (tmp_path / "paint.py").write_text(PAINT_IN_A_CHILD)
    done = subprocess.run(
        [sys.executable, "paint.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["plain", "optimized", "restored", "averaged"])
@pytest.mark.thinned(4)
def test_a_pickled_model_paints_the_same(own, way):
    if way in ("optimized", "restored"):
        own.optimize()
    if way == "restored":
        kernels.restore(own.model)
    if way == "averaged":
        own = StableDiffusion(averaged(own), name="own")
    wanted = own.txt2img(PROMPT, steps=2, seed=3)
    again = pickle.loads(pickle.dumps(own))
    got = again.txt2img(PROMPT, steps=2, seed=3)
    assert far(got.latents, wanted.latents) < 1e-5 and again.name == "own"
    assert got.parameters[0].optimize == wanted.parameters[0].optimize == ["fused"] * (way == "optimized")
    # What was frozen stays frozen, each copy for itself.
    model = pickle.loads(pickle.dumps(own.model)).train()
    assert model.training and not model.first_stage_model.training
    assert model.first_stage_model.train() is model.first_stage_model


class Screen(io.StringIO):
    """What a person would see on standard error."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize("door", ["txt2img", "img2img", "inpaint", "__call__"])
@pytest.mark.parametrize(
    ("is_terminal", "options", "shows"),
    [
        (True, {}, True),
        (True, {"progress": None}, True),
        (True, {"progress": False}, False),
        (False, {}, False),
        (False, {"progress": True}, True),
        (False, {"progress": False}, False),
    ],
)
@pytest.mark.thinned(4)
def test_a_bar_is_shown_where_somebody_sees_it(sd, monkeypatch, door, is_terminal, options, shows):
    screen = Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    takes = {"img2img": {"image": picture(), "strength": 1.0}}
    takes["inpaint"] = takes["img2img"] | {"mask": half_mask()}
    getattr(sd, door)(PROMPT, steps=1, num_images=2, batch_size=1, seed=1, **takes.get(door, {}), **options)
    assert ("2/2" in screen.getvalue()) == shows == bool(screen.getvalue())


def test_a_notebook_without_a_terminal_shows_the_bar(sd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    sd.txt2img(PROMPT, steps=2, seed=1)
    assert "2/2" in sys.stderr.getvalue()


def test_a_bar_is_put_down_when_a_run_ends_early_or_never_begins(sd, monkeypatch):
    screen = Screen(True)
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(UsageError, match="steps"):
        sd.txt2img(PROMPT, steps=0)
    with pytest.raises(UsageError, match="progress must be True, False or None, got 'no'"):
        sd.txt2img(PROMPT, progress="no")
    assert screen.getvalue() == ""
    assert sd.txt2img(PROMPT, steps=3, callback=lambda step: False).interrupted
    assert "1/3" in screen.getvalue() and screen.getvalue().endswith("\n")
    assert len(sd.txt2img(PROMPT, steps=1)) == 1  # the model is free


def test_many_unknown_options_are_one_short_line(sd):
    words = {f"{name}_{'x' * 200}": 1 for name in "abcdef"} | {"cfg": 3}
    with pytest.raises(UsageError, match="and 4 more") as caught:
        sd.txt2img(PROMPT, **words)
    assert len(str(caught.value)) <= 400
    with pytest.raises(UsageError, match="config"):
        StableDiffusion.default(config="x")


def test_gradients_stay_off_inside_and_on_outside(sd):
    stream = sd.stream(PROMPT, steps=2)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert torch.is_grad_enabled()


def averaged(sd):
    """A model whose moving average is sd's weights, while its present ones have gone elsewhere."""
    model = LatentDiffusion(**tiny_config()["model"]["params"] | {"use_ema": True})
    model.load_state_dict(sd.model.state_dict(), strict=False)
    model.model_ema.copy_from(model.model)
    with torch.no_grad():
        model.model.diffusion_model.out[2].bias.add_(5.0)
    return model


def test_the_moving_average_paints_where_a_model_keeps_one(sd):
    model = averaged(sd)
    out = StableDiffusion(model).txt2img(PROMPT, seed=0, steps=2)
    assert far(out.latents, sd.txt2img(PROMPT, seed=0, steps=2).latents) < 1e-6
    assert model.model.diffusion_model.out[2].bias.mean() > 4  # and is back in its place


def test_streams_of_a_model_with_an_average_may_take_turns(sd):
    painter = StableDiffusion(averaged(sd))
    weights = dict(painter.model.model.named_parameters())
    alone = [painter.txt2img(PROMPT, steps=3, seed=seed, output_type="latent").latents for seed in (1, 2)]
    streams = [painter.stream(PROMPT, steps=3, seed=seed, output_type="latent") for seed in (1, 2)]
    ends: list = [None, None]
    for _ in range(4):
        for i, stream in enumerate(streams):
            ends[i] = next(stream)
            assert all(p is weights[name] for name, p in painter.model.model.named_parameters())
    for end, want in zip(ends, alone, strict=True):
        assert torch.equal(end.result.latents, want)


# --- results ---


def test_output_types_are_the_same_picture(sd):
    pil, array, tensor = (sd.txt2img(PROMPT, seed=0, steps=2, output_type=t) for t in ("pil", "np", "pt"))
    assert array.images.shape == (1, 64, 64, 3) and tensor.images.shape == (1, 3, 64, 64)
    assert np.array_equal(array.images[0], tensor.images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil[0]), (255 * array.images[0]).astype(np.uint8))
    for out in (array, tensor):
        assert np.array_equal(np.asarray(out.grid()), np.asarray(pil[0]))
    latent = sd.txt2img(PROMPT, seed=0, steps=2, output_type="latent")
    assert torch.equal(latent.images, pil.latents)
    with pytest.raises(UsageError, match="these are latents"):
        latent.grid()


def test_several_batches_join_in_every_output_type(sd):
    for kind in ("pil", "np", "pt", "latent"):
        assert len(sd.txt2img(PROMPT, num_images=3, batch_size=2, steps=1, output_type=kind).images) == 3


def test_results_save_and_tell_how_they_were_made(sd, tmp_path):
    out = sd('say "hi",\nSteps: 3, a: b, c: d', negative_prompt="ugly", num_images=2, seed=2**64 - 2, steps=2)
    assert repr(out) == f"GenerationResult(2 images, seeds=[{2**64 - 2}, {2**64 - 1}])"
    paths = out.save(tmp_path / "new")
    assert [path.name for path in paths] == ["00000.png", "00001.png"]
    for path, image, parameters in zip(paths, out, out.parameters, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
        back = ldm.read_metadata(path)
        assert back.pop("source") == "ldm" and back.pop("model_hash") is None
        assert back == parameters.__dict__
    assert str(tmp_path) not in str(back) and out.infotexts[0] == Image.open(paths[0]).info["parameters"]
    assert out.save(tmp_path / "new", metadata=False)[0].name == "00002.png"
    assert ldm.read_metadata(tmp_path / "new" / "00002.png") == {}
    assert out._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n" and out.grid(1).size == (64 + 4, 2 * 66 + 2)


def test_a_files_hash_is_a1111s_and_follows_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"weights")
    assert file_hash(path) == hashlib.sha256(b"weights").hexdigest()[:10]
    path.write_bytes(b"other weights")
    assert file_hash(path) == hashlib.sha256(b"other weights").hexdigest()[:10]
    assert file_hash(tmp_path) is None and file_hash(None) is None
