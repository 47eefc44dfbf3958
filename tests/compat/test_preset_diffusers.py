"""preset="diffusers" beside diffusers' own pipelines on the same weights: every byte of every picture is the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from ldm.errors import UsageError
from ldm.models.diffusion.samplers.as_diffusers import SCHEDULES, alphas_in_float32
from ldm.pipeline import StableDiffusion

diffusers = pytest.importorskip("diffusers")

V1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
PROMPT, NEGATIVE = "a large red circle on a white background", "blue"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our tiny model and diffusers' parts, loaded from the folder that ours is saved in; by the UNet's channels."""
    diffusers.logging.set_verbosity_error()
    made = {}

    def get(channels):
        if channels not in made:
            folder = tmp_path_factory.mktemp("tiny") / "model"
            sd = StableDiffusion(tiny_model(channels), name="tiny")
            sd.save(f"{folder}/")
            made[channels] = sd, diffusers.StableDiffusionPipeline.from_pretrained(folder).components
        return made[channels]

    return get


def theirs(parts, kind, sampler, spacing=None, **options):
    scheduler, settings = SCHEDULERS[sampler]
    settings = settings if spacing is None else {**settings, "timestep_spacing": spacing}
    scheduler = scheduler(**V1, **settings)
    kind = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    pipe = kind(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(options.pop("seed"))
    return [np.asarray(one) for one in pipe(generator=generator, **options).images]


def source(width, height):
    random = np.random.default_rng(0)
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (11, 5, 50, 41))
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)), mask


# (what is done, channels of the UNet, sampler, how many pictures, strength, steps, further options)
QUICK = [
    ("txt2img", 4, "plms", 2, None, 2, {}),
    ("img2img", 4, "dpmpp_2m", 1, 0.7, 3, {}),
    ("inpaint", 4, "euler", 2, 1.0, 2, {}),
]
SLOW = [
    *(("txt2img", 4, sampler, 2, None, 3, {}) for sampler in ("ddim", "euler", "euler_a")),
    *(("img2img", 4, sampler, 2, 0.6, 5, {}) for sampler in SCHEDULERS),
    *(("img2img", 4, sampler, 1, 1.0, 2, {}) for sampler in ("plms", "euler")),
    *(("inpaint", 4, sampler, 2, 0.6, 5, {}) for sampler in SCHEDULERS),
    *(("inpaint", 4, sampler, 1, 1.0, 2, {}) for sampler in ("plms", "euler_a")),
    *(("inpaint", 9, "euler_a", 2, strength, 4, {}) for strength in (0.6, 1.0)),
    ("inpaint", 9, "plms", 1, 0.6, 4, {}),
    # without guidance, which theirs leaves out up to a scale of 1
    ("txt2img", 4, "plms", 1, None, 3, {"guidance_scale": 1.0}),
    ("img2img", 4, "euler_a", 2, 0.5, 4, {"guidance_scale": 0.5}),
    # other sizes, an eta, fewer steps than any solver's order, more than 15, and the default of 50
    ("txt2img", 4, "ddim", 1, None, 3, {"width": 72, "height": 64, "eta": 0.7}),
    ("inpaint", 4, "plms", 1, 0.8, 3, {"width": 72, "height": 64}),
    ("txt2img", 4, "plms", 1, None, 1, {}),
    ("txt2img", 4, "dpmpp_2m", 1, None, 18, {}),
    ("txt2img", 4, "plms", 1, None, 50, {}),
    # the other spacings
    *(("txt2img", 4, sampler, 1, None, 3, {"spacing": "trailing"}) for sampler in SCHEDULERS),
    *(("txt2img", 4, sampler, 1, None, 3, {"spacing": "leading"}) for sampler in ("euler", "dpmpp_2m")),
    ("txt2img", 4, "plms", 1, None, 3, {"spacing": "linspace"}),
]


def check(models, cases):
    differ = {}
    for mode, channels, sampler, count, strength, steps, options in cases:
        sd, parts = models(channels)
        options = dict(options)
        spacing = options.pop("spacing", None)
        size = {name: options.pop(name, 64) for name in ("width", "height")}
        image, mask = source(**size)
        ours_ = {
            "steps": steps,
            "sampler": sampler,
            "num_images": count,
            "spacing": spacing,
            "seed": 5,
            **options,
        }
        theirs_ = {"num_inference_steps": steps, "num_images_per_prompt": count, "seed": 5, **options}
        ours_ |= {"negative_prompt": NEGATIVE, "preset": "diffusers"}
        if mode == "txt2img":
            ours_ |= size
            theirs_ |= size
            kind = ""
        else:
            given = {"image": image} | ({"mask": mask} if mode == "inpaint" else {})
            ours_ |= given | {"strength": strength}
            theirs_ |= {"image": image, "strength": strength}
            theirs_ |= {"mask_image": mask, **size} if mode == "inpaint" else {}
            kind = {"img2img": "Img2Img", "inpaint": "Inpaint"}[mode]
        out = getattr(sd, mode)(PROMPT, **ours_)
        told = (out.parameters[0].arithmetic, out.parameters[0].rounding, out.parameters[0].rng)
        assert told == ("diffusers", "round", "diffusers")
        wanted = theirs(parts, kind, sampler, spacing, prompt=PROMPT, negative_prompt=NEGATIVE, **theirs_)
        for i, (got, want) in enumerate(zip(out.images, wanted, strict=True)):
            count_ = int((np.asarray(got) != want).sum())
            if count_:
                differ[mode, channels, sampler, strength, steps, str(options), spacing, i] = count_
    assert not differ


def test_pictures_are_diffusers_to_the_last_byte(models):
    check(models, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["txt2img", "img2img", "inpaint"])
def test_more_pictures_are_diffusers_to_the_last_byte(models, mode):
    check(models, [case for case in SLOW if case[0] == mode])


# --- what is refused, and what falls back by saying so ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": "heun"},
            "arithmetic 'diffusers' is of ddim, plms, .*, got sampler 'heun'; take arithmetic 'own'",
        ),
        ({"spacing": "karras"}, "has the spacings leading, trailing, linspace, got 'karras'"),
        ({"sampler": "euler", "s_churn": 2.0}, "has no option s_churn"),
        ({"sampler": "dpmpp_2m", "order": 3}, "has no option order"),
        ({"steps": 1000}, "at most 999 steps, got 1000"),
    ],
)
def test_what_their_arithmetic_does_not_have_is_refused(models, options, message):
    with pytest.raises(UsageError, match=message):
        models(4)[0].plan(PROMPT, arithmetic="diffusers", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "heun"},
        {"spacing": "karras"},
        {"sampler": "euler", "s_churn": 2.0},
        {"mask_rule": "a1111"},
    ],
)
def test_the_preset_leaves_arithmetic_to_what_it_goes_with(models, options):
    image, mask = source(64, 64)
    request = models(4)[0].plan(PROMPT, image=image, mask=mask, preset="diffusers", **options)
    assert (request.arithmetic, request.rounding) == ("own", "round")


def test_a_mask_rule_of_predictions_is_refused_with_it(models):
    image, mask = source(64, 64)
    with pytest.raises(UsageError, match="has the mask_rule compvis and diffusers, got 'a1111'"):
        models(4)[0].inpaint(PROMPT, image, mask, arithmetic="diffusers", mask_rule="a1111", steps=2)


@pytest.mark.parametrize("steps", [1, 2, 6, 30, 64])
def test_levels_and_tables_are_their_schedulers(models, steps):
    """Number by number, also where a run has fewer or more levels than asked for."""
    model = models(4)[0].model
    alphas = alphas_in_float32(model)
    for sampler, (scheduler, settings) in SCHEDULERS.items():
        for spacing in ("leading", "trailing", "linspace"):
            if steps == 1 and spacing == "linspace" and sampler in ("ddim", "plms"):
                continue  # theirs is the cleanest level alone, from which nothing comes
            one = scheduler(**V1, **{**settings, "timestep_spacing": spacing})
            one.set_timesteps(steps)
            own = SCHEDULES[sampler](alphas, steps, spacing)
            assert torch.equal(alphas, one.alphas_cumprod)
            assert own.times == one.timesteps.tolist(), (sampler, spacing)
            if hasattr(own, "sigmas"):
                assert torch.equal(own.sigmas, one.sigmas), (sampler, spacing)
            noise = torch.ones(1)
            assert own.pure(noise).item() == float(one.init_noise_sigma), (sampler, spacing)
