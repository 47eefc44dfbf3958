"""The section `sampling:` of a configuration: what is read, what is refused, and where it arrives."""

import pytest
from omegaconf import OmegaConf
from tiny import tiny_config, write_tiny

from ldm import load_latent_diffusion
from ldm.checkpoints.configs import read_settings
from ldm.checkpoints.sampling import SamplingDefaults, read_sampling
from ldm.errors import MismatchError
from ldm.paths import shipped
from ldm.pipeline import StableDiffusion
from ldm.shapes.scenes import shapes_prompts


@pytest.mark.parametrize(
    ("section", "want"),
    [
        (None, {}),
        ({}, {}),
        ({"steps": None, "known_words": None}, {}),
        ({"guidance_scale": 3, "steps": 20}, {"guidance_scale": 3.0, "steps": 20}),
        ({"size": 128}, {"size": (128, 128)}),
        ({"size": [96, 128]}, {"size": (96, 128)}),
        ({"known_sizes": [384, 1000]}, {"known_sizes": (384, 1000)}),
        ({"known_words": "A  red\ncircle"}, {"known_words": frozenset({"a", "red", "circle"})}),
        ({"least_steps": {"PNDMScheduler": 30, "DPM++ 2M": 10}},
         {"least_steps": {"PNDMScheduler": 30, "DPM++ 2M": 10}}),
    ],
)  # fmt: skip
def test_sound_sections_are_read(section, want):
    assert read_sampling(section) == SamplingDefaults(**want)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ([3.0], "'sampling:' should hold names with values, such as 'steps: 20'; got [3.0]"),
        ("steps", "got 'steps'"),
        (False, "got False"),
        ({"guidance": 3}, "unknown name 'guidance' (did you mean 'guidance_scale'?); there are guidance_scale, steps,"),
        ({"xyz": 3}, "unknown name 'xyz'; there are"),
        ({7: 3}, "unknown name 7; there are"),
        ({"x" * 9000: 3}, "unknown name 'xxx"),
        ({"guidance_scale": "3"}, "'sampling.guidance_scale' should be a number from 0 to 100, got '3'"),
        ({"guidance_scale": float("nan")}, "got nan"),
        ({"guidance_scale": float("inf")}, "got inf"),
        ({"guidance_scale": -1}, "got -1"),
        ({"guidance_scale": True}, "got True"),
        ({"guidance_scale": [3]}, "got [3]"),
        ({"guidance_scale": 10**5000}, "got a int that cannot be shown"),
        ({"steps": 0}, "'sampling.steps' should be a whole number from 1 to 1000, got 0"),
        ({"steps": 20.0}, "got 20.0"),
        ({"steps": True}, "got True"),
        ({"steps": 1001}, "got 1001"),
        ({"steps": {"ddim": 20}}, "got {'ddim': 20}"),
        ({"size": 100}, "'sampling.size' should be a multiple of 8 from 8 to 65536, got 100"),
        ({"size": [128]}, "'sampling.size' should be one side in pixels, or [height, width], got [128]"),
        ({"size": "128"}, "got '128'"),
        ({"known_sizes": 128}, "'sampling.known_sizes' should be [smallest, largest] side in pixels, got 128"),
        ({"known_sizes": [256, 128]}, "got [256, 128]"),
        ({"known_sizes": [128, None]}, "got None"),
        ({"known_words": ["a"]}, "'sampling.known_words' should be one text with the words, parted by spaces"),
        ({"known_words": "  "}, "got '  '"),
        ({"known_words": {}}, "got {}"),
        ({"least_steps": 30}, "'sampling.least_steps' should be samplers with numbers of steps"),
        ({"least_steps": {3: 30}}, "'sampling.least_steps' should be samplers with numbers of steps"),
        ({"least_steps": {"plms": 0}}, "'sampling.least_steps.plms' should be a whole number from 1 to 1000, got 0"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) and 10**5000 not in value.values() else "",
)  # fmt: skip
def test_wrong_sections_are_one_mismatch_that_names_the_value(section, words):
    with pytest.raises(MismatchError) as caught:
        read_sampling(section)
    text = str(caught.value)
    assert words in text and len(text) <= 400 and "\n" not in text


def test_the_section_arrives_at_the_report_and_at_the_pipeline(tmp_path):
    checkpoint, config = write_tiny(tmp_path)
    settings = OmegaConf.load(config)
    settings.sampling = {"guidance_scale": 2.5, "steps": 7, "least_steps": {"plms": 9}}
    OmegaConf.save(settings, config)
    assert read_settings(config)["sampling"]["steps"] == 7
    for given in (config, settings, OmegaConf.to_container(settings)):
        _, report = load_latent_diffusion(checkpoint, config=given)
        assert report.sampling == SamplingDefaults(guidance_scale=2.5, steps=7, least_steps={"plms": 9})
    sd = StableDiffusion.from_single_file(checkpoint, config=config, device="cpu")
    assert (sd.defaults.guidance_scale, sd.defaults.steps, sd.defaults.size) == (2.5, 7, (64, 64))


@pytest.mark.slow
def test_samplers_of_the_section_have_all_their_names_and_no_others(tmp_path):
    checkpoint, config = write_tiny(tmp_path)
    settings = OmegaConf.load(config)
    settings.sampling = {"least_steps": {"DPM++ 2M": 9, "PNDMScheduler": 30}}
    sd = StableDiffusion.from_single_file(checkpoint, config=settings, device="cpu")
    assert sd.defaults.least_steps == {"dpmpp_2m": 9, "plms": 30}
    settings.sampling = {"least_steps": {"magic": 30}}
    with pytest.raises(
        MismatchError, match=r"'sampling.least_steps': the sampler must be one of .*; got 'magic'"
    ):
        StableDiffusion.from_single_file(checkpoint, config=settings, device="cpu")


def test_a_wrong_section_is_refused_at_loading_and_none_says_nothing(tmp_path):
    checkpoint, _ = write_tiny(tmp_path)
    _, report = load_latent_diffusion(checkpoint, config=tiny_config())
    assert report.sampling == SamplingDefaults()
    with pytest.raises(MismatchError, match="sampling.steps"):
        load_latent_diffusion(checkpoint, config={**tiny_config(), "sampling": {"steps": "many"}})


@pytest.mark.slow
def test_the_box_says_what_its_training_had():
    sampling = read_sampling(read_settings(shipped("model_data/shapes/config.yaml"))["sampling"])
    seen = {
        word
        for split in ("train", "test")
        for text in shapes_prompts(3000, split=split)
        for word in text.split()
    }
    assert sampling.known_words == seen
    assert (sampling.guidance_scale, sampling.steps, sampling.known_sizes) == (3.0, 20, (128, 128))
    assert set(sampling.least_steps) == {"ddim", "ddpm", "plms", "dpm_solver", "dpmpp_2m"}


@pytest.mark.parametrize("name", ["v1-inference", "v1-inpainting"])
def test_the_configurations_of_v1_know_sizes_and_leave_the_rest_to_compvis(name):
    sampling = read_sampling(read_settings(shipped(f"configs/{name}.yaml"))["sampling"])
    assert sampling == SamplingDefaults(known_sizes=(384, 1024))
