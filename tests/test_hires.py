"""Hires fix: a second pass is img2img of what the first gave, enlarged; it says so, and refuses what cannot be."""

import copy
import re
from pathlib import Path

import pytest
import torch
from keyed import keyed_input, weight
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_model
from torch.nn import functional as F

from ldm import generate
from ldm.adapters import ControlNet, SeamlessTiling
from ldm.cli import painting_parser, read_prompts
from ldm.errors import OptionError, UsageError
from ldm.hires import middle
from ldm.images import to_tensor
from ldm.metadata import from_infotext
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.noise import ImageNoise
from ldm.pipeline import StableDiffusion

PROMPT = "a red circle"
HOW = {"steps": 2, "seed": 3, "width": 72, "height": 64, "progress": False}
SECOND = {"hires_steps": 1, "hires_strength": 0.5}  # the last of two steps


def picture():
    pixels = (255 * keyed_input("hint", (64, 72, 3)).clamp(0, 1)).byte().numpy()
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def first(sd):
    return sd.txt2img(PROMPT, **HOW)


@pytest.mark.parametrize(
    ("upscaler", "mode", "antialias", "last"),
    [
        ("latent", "bilinear", False, 1),
        ("Latent (bicubic antialiased)", "bicubic", True, 1),
        ("latent nearest-exact", "nearest-exact", False, 2),  # a whole run, which does not forget them either
    ],
)
def test_of_latents_it_is_img2img_of_them_to_the_bit(sd, first, upscaler, mode, antialias, last):
    """At 1.35 times; sides are rounded down, and noise is what the seed draws first at the new size."""
    second = {
        "hires_scale": 1.35,
        "hires_upscaler": upscaler,
        "hires_steps": last,
        "hires_strength": last / 2,
    }
    got = sd.txt2img(PROMPT, **HOW, **second).latents
    z = F.interpolate(first.latents, size=(10, 12), mode=mode, antialias=antialias)
    noise = ImageNoise([3])
    c, uc = (sd.model.get_learned_conditioning([text]) for text in (PROMPT, ""))
    run = {
        "steps": 2,
        "run_last": last,
        "noise": noise,
        "eta": 0.0,
        "guidance_scale": 7.5,
        "keep_start": True,
    }
    with torch.no_grad():
        *_, last = generate.denoise(
            sd.model, noise.begin(z), c, sampler="ddim", start_from=z, unconditional_conditioning=uc, **run
        )
    assert torch.equal(got, last.x_t)


@pytest.mark.parametrize("upscaler", ["lanczos", "nearest"])
def test_of_pictures_it_is_img2img_of_the_enlarged_picture(sd, first, upscaler):
    """To another aspect: the first pass is enlarged to 96 x 85, and its middle painted."""
    got = sd.txt2img(PROMPT, **HOW, hires_size=(96, 80), hires_upscaler=upscaler, **SECOND)
    larger = to_tensor(first[0].resize((96, 85), Image.Resampling[upscaler.upper()]))[:, :, 2:82]
    want = sd.img2img(PROMPT, larger, 0.5, steps=2, seed=3, progress=False)
    assert torch.equal(got.latents, want.latents) and got[0].tobytes() == want[0].tobytes()


@pytest.mark.slow
def test_a_hint_and_tiling_are_at_work_at_both_sizes(sd, tmp_path):
    """The same law with a ControlNet, whose hint is fitted to each size, and edges that meet."""
    with torch.device("meta"):
        network = ControlNetModel.beside(sd.model.model.diffusion_model)
    state = {name: weight(f"control.{name}", tuple(one.shape)) for name, one in network.state_dict().items()}
    save_file(state, tmp_path / "edges.safetensors")
    given = {"adapters": [ControlNet(tmp_path / "edges.safetensors", picture()), SeamlessTiling()]}
    first = sd.txt2img(PROMPT, **HOW, **given)
    got = sd.txt2img(PROMPT, **HOW, **given, hires_size=(96, 0), hires_upscaler="lanczos", **SECOND)
    larger = to_tensor(first[0].resize((96, 85), Image.Resampling.LANCZOS))[:, :, 2:82]
    want = sd.img2img(PROMPT, larger, 0.5, steps=2, seed=3, progress=False, **given)
    assert torch.equal(got.latents, want.latents)
    plain = sd.img2img(PROMPT, larger, 0.5, steps=2, seed=3, progress=False)
    assert not torch.equal(want.latents, plain.latents)


@pytest.mark.slow
def test_schedules_of_prompts_count_on(sd):
    """In A1111's prompts step 3 of 2 + 2 is the first of the second pass, which the first pass never reaches."""
    second = {"hires_scale": 1, "hires_steps": 2, "hires_strength": 0.5, "prompt_syntax": "a1111"}

    def paint(prompt, further=None):
        return sd.txt2img(prompt, **HOW, **second, hires_prompt=further).latents

    assert torch.equal(paint("[a:b:2]", "[a:b:2]"), paint("a", "b"))
    assert not torch.equal(paint("[a:b:2]"), paint("a"))
    with pytest.raises(UsageError, match="hires_prompt has other <lora:...> tags than the prompt"):
        paint("a", "a <lora:ink:1>")


@pytest.mark.slow
def test_a_picture_does_not_depend_on_its_batch_nor_on_how_it_was_halved(sd, caplog):
    own = StableDiffusion(copy.deepcopy(sd.model))
    whole = own.model.apply_model

    def small(x, *args):  # two images of the second pass do not fit, guidance doubling them
        if len(x) > 2 and x.shape[2] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(x, *args)

    own.model.apply_model = small
    second = {**SECOND, "hires_scale": 1.5, "hires_sampler": "euler_a", "hires_upscaler": "lanczos"}
    got = own.txt2img(PROMPT, **HOW, **second, num_images=2, batch_size=2).latents
    assert "trying 1" in caplog.text
    want = [sd.txt2img(PROMPT, **{**HOW, "seed": seed}, **second).latents for seed in (3, 4)]
    assert torch.equal(got, torch.cat(want))


def test_its_prompts_and_adapters_are_the_second_passs(sd):
    """Other prompts are encoded, equal ones change no bit; an adapter works at both sizes."""
    second = {**SECOND, "hires_scale": 1.5}
    plain = sd.txt2img(PROMPT, **HOW, **second).latents
    own = sd.txt2img(PROMPT, **HOW, **second, hires_prompt="a blue square").latents
    assert not torch.equal(own, plain)
    same = sd.txt2img(PROMPT, **HOW, **second, hires_prompt=PROMPT, hires_negative_prompt="").latents
    assert torch.equal(same, plain)
    tiled = sd.txt2img(PROMPT, **HOW, **second, adapters=[SeamlessTiling()]).latents
    assert tiled.shape == plain.shape == (1, 4, 12, 13) and not torch.equal(tiled, plain)


def test_a_picture_says_it_in_a1111s_words_and_repeats_it(sd, tmp_path):
    second = {
        **SECOND, "hires_size": [96, 80], "hires_upscaler": "latent bicubic", "hires_prompt": "a, b: c",
        "hires_negative_prompt": "d", "hires_sampler": "euler", "hires_spacing": "karras",
    }  # fmt: skip
    got = sd.txt2img(PROMPT, **HOW, **second)
    text = got.infotexts[0]
    assert "Size: 72x64" in text and "Denoising strength: 0.5" in text
    assert (
        'Hires resize: 96x80, Hires steps: 1, Hires upscaler: Latent (bicubic), Hires prompt: "a, b: c", '
        "Hires negative prompt: d, Hires sampler: Euler, Hires schedule type: Karras"
    ) in text
    found = from_infotext(text)
    assert {name: found[name] for name in second} == second and "strength" not in found
    path = got.save(tmp_path)[0]
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    said = vars(parser.parse_args(["--like", str(path)]))
    assert {name: said[name] for name in second} == second
    scaled = parser.parse_args(["--like", str(path), "--hires_scale", "2"])
    assert (scaled.hires_scale, scaled.hires_size) == (2.0, None)
    (tmp_path / "p.txt").write_text("--prompt a --hires_size 96x0 --hires_upscaler 'Latent (nearest)'\n")
    line = read_prompts(str(tmp_path / "p.txt"))[0].options
    assert line == {"hires_size": (96, 0), "hires_upscaler": "latent nearest"}
    assert "Hires" not in sd.txt2img(PROMPT, **HOW).infotexts[0]


def test_what_a1111_writes_is_read():
    text = "a\nSteps: 20, Seed: 1, Size: 512x512, Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent"
    found = from_infotext(text)
    assert (found["hires_scale"], found["hires_strength"], found["hires_upscaler"]) == (2.0, 0.4, "latent")


def test_sizes_and_steps(sd):
    """The size that is painted, to what the first pass is enlarged before, steps of the run and how many are left."""
    for given, size, enlarged in (
        ({"hires_scale": 1}, (72, 64), (72, 64)),
        ({"hires_scale": 1.5}, (104, 96), (104, 96)),
        ({"hires_size": (144, 0)}, (144, 128), (144, 128)),
        ({"hires_size": (0, 128)}, (144, 128), (144, 128)),
        ({"hires_size": (128, 128)}, (128, 128), (144, 128)),
        ({"hires_size": (144, 72)}, (144, 72), (144, 128)),
    ):
        request = sd.plan(PROMPT, width=72, height=64, **given)
        assert (request.size, request.passes[1].start.enlarged) == (size, enlarged), given
    second = sd.plan(PROMPT, steps=9, hires_scale=2, hires_strength=0.4, hires_steps=5).passes[1]
    assert (second.steps, second.start.run_last) == (12, 5)
    assert sd.plan(PROMPT, steps=9, hires_scale=2, hires_strength=1).passes[1].start.run_last == 9
    assert middle(torch.arange(7.0).reshape(1, 1, 1, 7), (1, 4)).flatten().tolist() == [1, 2, 3, 4]


REFUSED = (
    ({"hires_scale": 0.5}, "hires_scale must be a number from 1 to 32, got 0.5"),
    ({"hires_scale": 32}, "width of the second pass must be a multiple of 8 from 64 to 2048, got 2304"),
    ({"hires_size": (100, 96)}, "got 100; the nearest two that work are 96 and 104"),
    ({"hires_size": (64, 56)}, "height of the second pass must be a multiple of 8 from 64 to 2048, got 56"),
    ({"hires_size": (64, 0)}, "the second pass must|height of the second pass must"),
    ({"hires_size": (0, 0)}, "hires_size must have a side above 0"),
    ({"hires_size": "96x80"}, "hires_size must be .width, height. in pixels"),
    ({"hires_size": (96, 80), "hires_scale": 2}, "say the same; give one of them"),
    ({"hires_steps": 3}, "hires_steps is of a second pass, and none is asked for"),
    ({"hires_scale": 2, "hires_upscaler": "latnet"}, "got 'latnet'; did you mean 'latent'"),
    ({"hires_scale": 2, "hires_upscaler": "R-ESRGAN 4x+"}, "wanted one of latent, .*got 'R-ESRGAN"),
    ({"hires_scale": 2, "hires_strength": 0}, "hires_strength 0 are the last of more .* 0.05 or more"),
    ({"hires_scale": 2, "hires_sampler": "eulr"}, "did you mean euler"),
    ({"hires_scale": 2, "hires_prompt": "x\ud800"}, "hires_prompt holds characters that are no text"),
    ({"hires_scale": 2, "spacing": [9.0, 3.0, 0.0]}, "a list of sigmas or of t is of one pass"),
    ({"hires_scale": 2, "image": Image.new("RGB", (72, 64))}, "and this is img2img; enlarge the picture"),
)


def test_refusals(sd):
    for given, words in REFUSED:
        with pytest.raises(UsageError, match=words) as caught:
            sd.plan(PROMPT, width=72, height=64, **given)
        assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value), given
    with pytest.raises(OptionError, match="give hires_scale, or hires_size"):
        sd.plan(PROMPT, enable_hr=True)


@pytest.mark.slow
def test_the_block_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "hires.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "docs/hires.md", "exec"), names)
    assert names["out"].parameters[0].hires_scale == 1.5
