"""Presets: other programs' habits as data, which fill what a caller leaves open."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny import tiny_model

import ldm
from ldm import images, limits, options, presets
from ldm.cli import painting, painting_parser, read_prompts
from ldm.errors import UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers import SAMPLERS, alpha_bar_table, sample_steps, split_sampler
from ldm.models.diffusion.samplers.as_diffusers import RULES, SPACINGS
from ldm.noise import CallNoise, ComfyUINoise, NvNoise, seed_everything
from ldm.pipeline import StableDiffusion
from ldm.process.schedule import NoiseSchedule
from ldm.prompting import encode_batch

PROMPT = "a red circle"
ROOT = Path(__file__).resolve().parents[1]
MODES = ("txt2img", "img2img", "inpaint")
SIGMAS = np.array([14.6, 3.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def picture(width=64, height=64, seed=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- the data ---


def test_every_row_is_an_option_with_values_that_it_takes_and_a_source_for_each():
    assert len({row.option for row in presets.TABLE}) == len(presets.TABLE)
    (arithmetic,) = (row.values["diffusers"] for row in presets.TABLE if row.option == "arithmetic")
    assert {*options.of_samplers()} <= {*arithmetic.without}  # of which diffusers' schedulers have none
    assert arithmetic.allowed["spacing"] == SPACINGS
    assert {*RULES} == {
        name for name in RULES if name in arithmetic.without or arithmetic.allowed[name] == RULES[name]
    }
    for row in presets.TABLE:
        option = options.option(row.option)
        assert option.keyword and option.told, row.option
        assert set(row.values) == set(row.sources) <= set(presets.PRESETS), row.option
        assert all(row.sources.values()), row.option
    for preset in presets.PRESETS:
        for mode in MODES:
            for sampler in SAMPLERS:
                for name, value in presets.values(preset, mode, sampler).items():
                    assert options.option(name).kind.check(name, value) == value, (preset, name)


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    table = re.search("<!-- table -->\n(.*)<!-- end -->", page, re.DOTALL)[1]
    assert table.strip() == presets.page().strip()


@pytest.mark.slow
def test_the_block_of_the_page_runs():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/presets.md", "exec"), {})


def test_the_command_of_the_page_has_the_scripts_flags():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^```bash\npython scripts/txt2img.py (.*?)\n```", page, re.MULTILINE)
    words = re.findall(r'"([^"]*)"|(\S+)', command)
    args = painting_parser("txt2img.py", "x", outdir="o", scale=7.5).parse_args([a or b for a, b in words])
    assert args.preset == "a1111"


# --- filling ---


@pytest.mark.parametrize(
    ("given", "mode", "filled"),
    [
        # (what a caller gave, what is done; some of what comes)
        ({"preset": "compvis"}, "txt2img", {"guidance_scale": 7.5, "steps": 50, "spacing": "compvis"}),
        ({"preset": "compvis"}, "img2img", {"guidance_scale": 5.0, "strength": 0.75}),
        ({"preset": "compvis", "sampler": "dpmpp_2m"}, "txt2img", {"spacing": None}),
        ({"preset": "cldm"}, "txt2img", {"separate_passes": True, "steps": 20, "guidance_scale": 9.0}),
        ({"preset": "diffusers"}, "img2img", {"strength": 0.8, "sampler": "plms", "rng": "diffusers"}),
        ({"preset": "diffusers"}, "inpaint", {"strength": 1.0}),
        ({"preset": "diffusers", "strength": 0.5}, "img2img", {"strength": 0.5}),
        ({"preset": "a1111"}, "txt2img", {"spacing": "karras", "prompt_syntax": "a1111"}),
        ({"preset": "a1111", "sampler": "Euler a"}, "txt2img", {"spacing": "normal", "sampler": "euler_a"}),
        ({"preset": "a1111", "sampler": "DPM++ 2M SDE"}, "txt2img", {"spacing": "exponential"}),
        ({"preset": "a1111", "sampler": "DPM++ 2M Exponential"}, "txt2img", {"spacing": "exponential"}),
        ({"preset": "a1111", "spacing": "simple"}, "txt2img", {"spacing": "simple", "sampler": "dpmpp_2m"}),
        # what contradicts the preset goes before it, also where it is the default without one
        ({"preset": "a1111", "rng": "image"}, "txt2img", {"rng": "image"}),
        ({"preset": "diffusers", "rounding": "truncate"}, "txt2img", {"rounding": "truncate"}),
        ({"preset": "cldm", "separate_passes": False}, "txt2img", {"separate_passes": False}),
        # the second pass of hires fix has its own sampler's levels, and one arithmetic with the first
        (
            {"preset": "a1111", "hires_sampler": "DPM++ 2M SDE"},
            "txt2img",
            {"spacing": "karras", "hires_sampler": "dpmpp_2m_sde", "hires_spacing": "exponential"},
        ),
        (
            {"preset": "a1111", "hires_sampler": "Euler a", "hires_spacing": "simple"},
            "txt2img",
            {"hires_spacing": "simple"},
        ),
        ({"preset": "a1111", "hires_sampler": "DPM++ 2M Karras"}, "txt2img", {"hires_spacing": "karras"}),
        ({"preset": "a1111"}, "txt2img", {"hires_spacing": None}),
        ({"preset": "diffusers", "hires_sampler": "euler"}, "txt2img", {"arithmetic": "diffusers"}),
        (
            {"preset": "diffusers", "hires_sampler": "heun"},
            "txt2img",
            {"arithmetic": None, "hires_spacing": None},
        ),
        ({"preset": "diffusers", "sampler": "euler", "spacing": SIGMAS}, "txt2img", {"arithmetic": None}),
        # A1111's samplers over time steps begin with noise as it is drawn, those of k-diffusion with sigma times it
        ({"preset": "a1111"}, "txt2img", {"first_noise": "sigma"}),
        ({"preset": "a1111", "sampler": "DDIM"}, "txt2img", {"first_noise": None, "final_alpha": "lowest"}),
        (
            {"preset": "a1111", "sampler": "DDIM CFG++"},
            "img2img",
            {"first_noise": None, "spacing": "compvis"},
        ),
        (
            {"preset": "a1111", "sampler": "UniPC"},
            "img2img",
            {"first_noise": None, "strength_rule": "bubbliiiing"},
        ),
        # what is of a picture or a mask is said of nothing else
        ({"preset": "a1111"}, "txt2img", {"strength_rule": None, "mask_rule": None, "kept": None}),
        ({"preset": "a1111"}, "img2img", {"strength_rule": "a1111", "mask_cells": None}),
        (
            {"preset": "a1111"},
            "inpaint",
            {"strength_rule": "a1111", "mask_cells": "bicubic", "kept": "pixels"},
        ),
        # diffusers' arithmetic has no rules of others
        ({"preset": "diffusers", "strength_rule": "a1111"}, "img2img", {"arithmetic": None}),
        ({"preset": "diffusers", "final_alpha": "one"}, "txt2img", {"arithmetic": None}),
        # None is not given
        ({"preset": "comfyui", "steps": None, "guidance_scale": None}, "txt2img", {"steps": 20}),
    ],
)
def test_a_preset_fills_what_is_left_open(given, mode, filled):
    found = presets.filled(given["preset"], given, mode, split_sampler)
    assert {name: found.get(name) for name in filled} == filled


def test_a_request_takes_a_preset_in_every_mode(sd):
    mask = Image.new("L", (64, 64), 255)
    assert sd.plan(PROMPT, preset="diffusers").strength is None
    assert sd.plan(PROMPT, preset="diffusers", image=picture()).strength == 0.8
    assert sd.plan(PROMPT, preset="a1111", image=picture(), mask=mask).strength == 0.75
    request = sd.plan(PROMPT, preset="compvis", image=picture(), steps=7, sampler="plms")
    told = (request.guidance_scale, request.steps, request.sampler, request.rng, request.preset)
    assert told == (5.0, 7, "plms", "compvis", "compvis")
    assert sd.plan(PROMPT).preset is None


def test_loops_and_frames_have_the_rules_of_their_first_pass(sd):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    given = {"image": picture(), "strength": 0.5, "steps": 4, "loops": 2, "seed": 3}
    rules = [
        (one.start.mask_rule, one.start.mask_cells, one.start.kept)
        for one in sd.plan("a (red:1.2) [a|b]", mask=mask, preset="comfyui", **given).passes
    ]
    assert rules == [("comfyui", "bilinear", "latents")] * 2
    # diffusers' PNDM calls the network once more, in every loop.
    counts = [one.start.run_last for one in sd.plan(PROMPT, preset="diffusers", **given).passes]
    assert counts == [3, 3]
    for wrong, words in (
        ({"mask_rule": "a1111", "mask": mask}, "has the mask_rule compvis and diffusers, got 'a1111'"),
        ({"strength_rule": "a1111"}, "has the strength_rule compvis, got 'a1111'"),
        ({"first_noise": "unit"}, "has the first_noise None, got 'unit'"),
        ({"final_alpha": "one"}, "has the final_alpha None, got 'one'"),
    ):
        with pytest.raises(UsageError, match=words):
            sd.plan(PROMPT, arithmetic="diffusers", **wrong, **given)
    for wrong in ("x", None, 3, []):
        with pytest.raises(
            UsageError, match="strength_rule must be one of compvis, bubbliiiing, a1111, comfyui; got"
        ):
            sd.plan(PROMPT, strength_rule=wrong, **given)
    for name, value in {"mask_rule": "a1111", "mask_cells": "nearest", "kept": "latents"}.items():
        with pytest.raises(UsageError, match=f"{name} is of a mask, and none is given"):
            sd.plan(PROMPT, **{name: value}, **given)
    with pytest.raises(UsageError, match="strength_rule is of a picture to start from, and none is given"):
        sd.plan(PROMPT, strength_rule="a1111")
    large = {**given, "loops": 1, "upscale_by": 2, "upscale_overlap": 8}
    assert sd.plan(PROMPT, preset="a1111", **large).passes[1].start.strength_rule == "a1111"
    assert sd.plan(PROMPT, image=picture(), outpaint=(8, 8, 8, 8), preset="diffusers").strength == 1.0
    soft = {"mask": mask, "mask_blur": 2, "strength": 0.5, "steps": 2, "seed": 3}
    for kept in ("pixels", "latents"):
        out = sd.img2img(PROMPT, picture(), kept=kept, **soft)[0]
        is_same = np.array_equal(np.asarray(out)[:, 48:], np.asarray(picture())[:, 48:])
        assert is_same == (kept == "pixels")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("difusers", "preset must be one of compvis, .*; got 'difusers'; did you mean 'diffusers'"),
        ("A1111", "preset must be one of .*; got 'A1111'; did you mean 'a1111'"),
        (3, "preset must be one of .*; got 3$"),
        ("", "preset must be one of .*; got ''$"),
    ],
)
def test_an_unknown_preset_is_refused(sd, name, message):
    with pytest.raises(UsageError, match=message):
        sd.plan(PROMPT, preset=name)


# --- the command line, files, pictures ---


def plans(args, *sources):
    return [group.options for group in painting.check(args, *(sources or ({},)))]


def txt2img(*words):
    return painting_parser("txt2img.py", "x", outdir="o", scale=7.5).parse_args(list(words))


def test_flags_that_are_not_given_leave_room_for_the_preset(tmp_path):
    (found,) = plans(txt2img("--preset", "a1111"))
    assert not {"rng", "sampler", "steps", "prompt_syntax", "rounding"} & found.keys()
    (found,) = plans(txt2img("--preset", "a1111", "--rng", "image", "--plms", "--scale", "3"))
    assert (found["rng"], found["sampler"], found["guidance_scale"]) == ("image", "plms", 3)
    (found,) = plans(txt2img("--preset", "a1111", "--sampler", "DPM++ 2M Karras"))
    assert (found["sampler"], found["spacing"]) == ("dpmpp_2m", "karras")
    (found,) = plans(txt2img())  # without one, as ever
    assert (found["rng"], found["sampler"], found["prompt_syntax"]) == ("image", "ddim", "plain")
    picture().save(tmp_path / "a.png")
    parser = painting_parser("img2img.py", "x", outdir="o", scale=5.0, strength=0.75)
    source = {"image": str(tmp_path / "a.png")}
    for words, strength in (((), None), (("--strength", "0.75"), 0.75)):
        (found,) = plans(parser.parse_args(["--preset", "diffusers", *words]), source)
        assert found.get("strength") == strength


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_of_a_file_may_name_one(tmp_path, name):
    lines = {
        "p.txt": "--prompt a --preset comfyui --steps 3\nb\n",
        "p.jsonl": json.dumps({"prompt": "a", "preset": "comfyui", "steps": 3}) + '\n{"prompt": "b"}\n',
    }
    (tmp_path / name).write_text(lines[name])
    assert read_prompts(str(tmp_path / name))[0].options == {"preset": "comfyui", "steps": 3}
    first, second = plans(txt2img("--from-file", str(tmp_path / name), "--rounding", "round"))
    assert (first["preset"], first["steps"], first["rounding"]) == ("comfyui", 3, "round")
    assert not {"rng", "sampler", "prompt_syntax"} & first.keys()
    assert (second["preset"], second["rng"]) == (None, "image")
    (tmp_path / name).write_text(lines[name].replace("comfyui", "comfui"))
    with pytest.raises(UsageError, match="line 1 of .*preset.*got 'comfui'; did you mean 'comfyui'"):
        read_prompts(str(tmp_path / name))


def test_a_picture_says_the_values_and_like_repeats_them(sd, tmp_path):
    out = sd.txt2img(PROMPT, preset="diffusers", steps=2, sampler="ddim", seed=3, num_images=3, batch_size=2)
    path = out.save(tmp_path)[2]
    told = ldm.read_metadata(path)
    wanted = {
        "preset": "diffusers",
        "rng": "diffusers",
        "rounding": "round",
        "spacing": "leading",
        "steps": 2,
    }
    assert {name: told[name] for name in wanted} == wanted
    assert (told["seed"], told["batch_size"], told["batch_index"]) == (3, 3, 2)
    # The name is not needed: without it the same picture comes.
    again = {name: told[name] for name in wanted if name != "preset"}
    again |= {"sampler": told["sampler"], "guidance_scale": told["guidance_scale"]}
    same = sd.txt2img(PROMPT, seed=3, num_images=3, batch_size=2, **again)
    assert np.array_equal(np.asarray(same[2]), np.asarray(out[2]))
    args = txt2img("--like", str(path))
    assert (args.rng, args.rounding, args.steps, args.preset) == ("diffusers", "round", 2, "diffusers")
    (found,) = plans(args)
    assert (found["rng"], found["spacing"], found["guidance_scale"]) == ("diffusers", "leading", 7.5)
    # Beside --like another preset gives the rules, and the picture what a program only begins with.
    (found,) = plans(txt2img("--like", str(path), "--preset", "a1111"))
    assert (found["steps"], found["guidance_scale"], found["sampler"]) == (2, 7.5, "ddim")
    assert not {"rng", "rounding", "prompt_syntax"} & found.keys()
    # Also those that the other preset leaves as they are: diffusers has no first_noise, and else not its arithmetic.
    first = sd.txt2img(PROMPT, preset="a1111", steps=2, seed=3)
    assert first.parameters[0].first_noise == "sigma"
    (found,) = plans(txt2img("--like", str(first.save(tmp_path)[0]), "--preset", "diffusers"))
    assert found["sampler"] == "dpmpp_2m" and not {"first_noise", "final_alpha", "spacing"} & found.keys()


# --- noise ---


def test_one_generator_draws_for_all_pictures_of_a_call():
    """torch.randn of the whole call: what diffusers' pipelines draw from one generator, whatever a batch holds."""
    like = torch.empty(2, 4, 3, 5)
    ours = CallNoise(7, 5, [1, 4])
    generator = torch.Generator().manual_seed(7)
    encoded, first, second = (torch.randn(n, 4, 3, 5, generator=generator) for n in (1, 5, 5))
    assert torch.equal(ours.once(like), encoded.expand(2, -1, -1, -1))
    assert torch.equal(ours.begin(like), first[[1, 4]]) and torch.equal(ours(like), second[[1, 4]])


def test_comfyui_begins_on_the_cpu_and_goes_on_on_the_gpu():
    like = torch.empty(2, 4, 3, 5)
    ours, gpu = ComfyUINoise(7, 5, [1, 4]), NvNoise([7])
    wanted = torch.randn(5, 4, 3, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(ours.begin(like), wanted[[1, 4]])
    # A GPU's draw of the whole call is not that of its pictures one by one.
    whole = gpu(torch.empty(1, 5, 4, 3, 5))[0]
    assert torch.equal(ours(like), whole[[1, 4]])


@pytest.mark.parametrize("rng", ["diffusers", "comfyui"])
@pytest.mark.thinned(2)
def test_a_picture_depends_on_its_call_and_not_on_its_batch(sd, rng):
    options = {"seed": 5, "steps": 2, "sampler": "euler_a", "rng": rng, "output_type": "latent"}
    whole = sd.txt2img(PROMPT, num_images=3, **options)
    parted = sd.txt2img(PROMPT, num_images=3, batch_size=2, **options)
    torch.testing.assert_close(
        parted.latents, whole.latents, rtol=0, atol=1e-5 * whole.latents.abs().max().item()
    )
    assert whole.seeds == [5, 5, 5] and not torch.allclose(whole.latents[0], whole.latents[1], atol=0.1)
    with pytest.raises(UsageError, match=f'variation_strength .*rng="{rng}" draws whole batches'):
        sd.plan(PROMPT, variation_strength=0.5, rng=rng)


@pytest.mark.parametrize("rng", ["compvis", "diffusers", "comfyui"])
def test_a_call_of_one_seed_has_no_others(sd, rng, tmp_path):
    for seeds in ([5, 5], [5, 6], np.array([5, 6])):
        assert [one.seed for one in sd.plan(["a", "b"], seed=seeds, rng=rng).images] == [5, 5]
    with pytest.raises(
        UsageError, match=f'rng="{rng}" draws for all pictures of a call by one seed, got .5, 9.'
    ):
        sd.plan(["a", "b"], seed=[5, 9], rng=rng)
    (tmp_path / "p.txt").write_text("--prompt a --seed 5\n--prompt b --seed 9\nc\nd\n")
    words = ["--from-file", str(tmp_path / "p.txt"), "--n_iter", "2"]
    groups = [(one.prompts, one.seeds) for one in painting.check(txt2img(*words, "--rng", rng), {})]
    rest = (["c", "d"], [42, 43])
    wanted = [(["a"], [5]), (["b"], [9]), rest, (["a"], [6]), (["b"], [10]), (["c", "d"], [44, 45])]
    assert groups == wanted
    (one,) = painting.check(txt2img(*words), {})
    assert one.seeds == [5, 9, 42, 43, 6, 10, 44, 45]


# --- bytes ---


def test_three_ways_to_bytes():
    x = torch.linspace(-1.2, 1.2, 97).reshape(1, 1, 1, 97).expand(1, 3, 1, 97)
    unit = ((x + 1) / 2).clamp(0, 1)
    got = {how: images.to_uint8(x, how)[0, 0, :, 0].astype(int) for how in limits.ROUNDINGS}
    assert np.array_equal(got["truncate"], (unit * 255)[0, 0, 0].numpy().astype(np.uint8))
    assert np.array_equal(got["round"], (unit * 255).numpy().round()[0, 0, 0].astype(np.uint8))
    wanted = (x * 127.5 + 127.5).numpy().clip(0, 255)[0, 0, 0].astype(np.uint8)
    assert np.array_equal(got["truncate_127.5"], wanted)
    assert (got["round"] - got["truncate"]).max() == 1 and got["truncate"].max() == 255
    # The two that truncate differ where a value is a whole number but for its rounding.
    near = torch.full((1, 3, 1, 1), 2 * (77 / 255) - 1)
    assert images.to_uint8(near)[0, 0, 0, 0] in (76, 77)


def test_pictures_are_rounded_as_asked_and_kept_pixels_are_kept(sd):
    options = {"seed": 5, "steps": 1}
    unit = sd.txt2img(PROMPT, output_type="np", **options)
    for how in ("truncate", "round"):
        out = sd.txt2img(PROMPT, rounding=how, **options)
        wanted = images.unit_to_uint8(torch.from_numpy(unit.images).permute(0, 3, 1, 2), how)
        assert np.array_equal(np.asarray(out[0]), wanted[0])
        assert out.parameters[0].rounding == how
    source, mask = picture(), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    for how in ("truncate_127.5", "round"):
        kept = np.asarray(sd.inpaint(PROMPT, source, mask, rounding=how, **options)[0])
        assert np.array_equal(kept[:, 32:], np.asarray(source)[:, 32:])
        assert np.array_equal(sd.img2img(PROMPT, source, 0, rounding=how, **options)[0], source)


def test_a_mask_comes_to_cells_by_four_rules():
    mask = torch.zeros(1, 1, 24, 40)
    mask[0, 0, 4:20, 5:28] = 1
    image = Image.fromarray((255 * mask[0, 0]).numpy().astype(np.uint8))
    got = {how: images.shrink_mask(mask, 8, how)[0, 0] for how in limits.MASK_CELLS}
    wanted = np.asarray(image.convert("RGB").resize((5, 3)), dtype=np.float32)[:, :, 0] / 255  # A1111's lines
    assert np.array_equal(got["bicubic"], np.around(wanted))
    assert np.array_equal(got["nearest"], mask[0, 0, ::8, ::8])
    assert got["any"].sum() == 3 * 4 and got["nearest"].sum() == 2 * 3
    assert got["bilinear"].unique().tolist() == [0, 0.25, 0.5, 1]


@pytest.mark.parametrize("preset", ["a1111", "comfyui", "diffusers", "compvis"])
@pytest.mark.thinned(2)
def test_a_preset_keeps_pixels_or_latents(sd, preset):
    source, mask = picture(), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    out = sd.inpaint(PROMPT, source, mask, preset=preset, steps=2, seed=4)
    is_same = np.array_equal(np.asarray(out[0])[:, 48:], np.asarray(source)[:, 48:])
    assert is_same == (preset in ("a1111", "compvis")) == (out.parameters[0].kept == "pixels")
    assert out.parameters[0].mask_rule == preset
    assert out.parameters[0].mask_blur == (4 if preset == "a1111" else 0)


# --- how a picture is begun with, and against what the originals recorded ---


GOLDEN = ROOT / "tests" / "golden"


def recorded(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_a1111_runs_as_many_steps_of_a_picture_as_its_program_recorded(sd):
    """Every row of its setup_img2img_steps without "fix steps": the last t_enc + 1 steps of the schedule."""
    image, wrong = picture(), []
    for fixed, steps, strength, of_sampler, t_enc in recorded("sigma_schedules")["a1111.img2img"]["rows"]:
        if fixed:
            continue
        request = sd.plan(
            PROMPT, image=image, preset="a1111", sampler="euler", steps=steps, strength=strength
        )
        if (request.start.run_last, request.planned) != (t_enc + 1, of_sampler):
            wrong.append((steps, strength, request.start.run_last, t_enc + 1))
    assert not wrong


@pytest.mark.parametrize(
    ("rule", "steps", "strength", "planned", "last"),
    [
        ("compvis", 20, 0.75, 20, 15),
        ("compvis", 20, 1.0, 20, 20),
        ("bubbliiiing", 20, 1.0, 20, 19),  # its min(..., steps - 1)
        ("bubbliiiing", 20, 0.5, 20, 10),
        ("comfyui", 20, 0.75, 26, 20),  # all are run, as the last of int(20 / 0.75)
        ("comfyui", 20, 1.0, 20, 20),
        ("comfyui", 20, 0.0, 20, 0),
        ("a1111", 20, 1.0, 20, 20),
    ],
)
def test_strength_leaves_steps_by_rules(sd, rule, steps, strength, planned, last):
    image = picture()
    request = sd.plan(
        PROMPT, image=image, strength_rule=rule, steps=steps, strength=strength, spacing="normal"
    )
    assert (request.planned, request.start.run_last, request.steps) == (planned, last, steps)
    with pytest.raises(UsageError, match="100 steps at strength 0.05 are the last of 2000"):
        sd.plan(PROMPT, image=image, strength_rule="comfyui", steps=100, strength=0.05)
    with pytest.raises(UsageError, match="4 steps at strength 1e-310 are the last of 1000000000"):
        sd.plan(PROMPT, image=image, strength_rule="comfyui", steps=4, strength=1e-310)


@pytest.mark.parametrize("preset", ["a1111", "compvis", "comfyui"])
def test_every_sampler_visits_the_levels_that_the_program_recorded(sd, preset):
    """A1111's choice of a schedule by sampler, CompVis's list of levels, ComfyUI's normal schedule."""
    alpha_bar = alpha_bar_table(sd.model)
    if preset == "a1111":
        options_of = {
            name: one["options"] for name, one in recorded("sigma_schedules")["a1111.samplers"].items()
        }
        for name, wanted in options_of.items():
            ours = presets.filled(preset, {"sampler": name}, "txt2img", split_sampler)
            assert ours["spacing"] == wanted.get("scheduler", "normal"), name
            cls = SAMPLERS[ours["sampler"]]
            assert cls.discard_next_to_last == wanted.get("discard_next_to_last_sigma", False), name
        levels = recorded("samplers_a1111")
        for steps in (1, 4, 10, 15):
            ours = presets.filled(preset, {"sampler": "ddim"}, "txt2img", split_sampler)
            plan = SAMPLERS["ddim"].plan(alpha_bar, steps, spacing=ours["spacing"])
            assert [one.t for one in plan[-2::-1]] == levels[f"timesteps.{steps}"]
    else:
        spacing = presets.filled(preset, {}, "txt2img", split_sampler)["spacing"]
        assert spacing == {"compvis": "compvis", "comfyui": "normal"}[preset]
    if preset == "compvis":
        assert len(SAMPLERS["ddim"].plan(alpha_bar, 30, spacing="compvis")) == 32  # 31 steps, for 30


def test_comfyui_visits_the_sigmas_that_its_ksampler_recorded(sd):
    """With denoise and without, and with the next to last sigma left out, on Stable Diffusion v1's table."""
    levels = load_file(GOLDEN / "samplers_comfyui.safetensors")
    v1 = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012).alpha_bar
    image, count = picture(), 0
    for sampler in ("euler", "dpm_2"):
        for spacing in (None, "karras"):  # None is the preset's
            for strength in (1.0, 0.75, 0.5, 0.1):
                request = sd.plan(
                    PROMPT, image=image, preset="comfyui", sampler=sampler, spacing=spacing, steps=12,
                    strength=strength,
                )  # fmt: skip
                plan = SAMPLERS[request.sampler].plan(v1, request.planned, spacing=request.spacing)
                wanted = levels[f"comfy.ksampler.{sampler}.{spacing or 'normal'}.12.{strength}"]
                ours = [float(one.sigma) for one in plan[-request.start.run_last - 1 :]]
                np.testing.assert_allclose(
                    ours, wanted, rtol=2e-5, atol=1e-12, err_msg=f"{sampler} {strength}"
                )
                count += 1
    assert count == 16


def test_first_noise_and_final_alpha(sd):
    """Noise of sigma's size and of size 1, before a picture at full strength, too; and where the last step goes."""
    alphas = alpha_bar_table(sd.model)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    z = torch.full_like(x_T, 3.0)
    seen = []

    class Model:
        parameterization, num_timesteps = "eps", 1000
        alphas_cumprod = sd.model.alphas_cumprod

        def apply_model(self, x, t, cond):
            seen.append(x)
            return torch.zeros_like(x)

    def first(**more):
        seen.clear()
        list(sample_steps("euler", Model(), x_T, None, steps=2, **more))
        return seen[0]

    noise, signal = (1 - alphas[-1]) ** 0.5, alphas[-1] ** 0.5
    kept = {"start_from": z, "run_last": 2, "keep_start": True}
    for more, wanted in (
        ({}, noise * x_T),
        ({"first_noise": "sigma"}, noise * x_T),
        ({"first_noise": "unit"}, x_T),
        (kept, signal * z + noise * x_T),
        ({**kept, "first_noise": "unit"}, signal * z + x_T),
        ({"start_from": z, "run_last": 2}, noise * x_T),
    ):
        torch.testing.assert_close(first(**more), wanted.float(), rtol=1e-5, atol=1e-5)
    for end, alpha in (("one", 1.0), ("lowest", alphas[0])):
        # A network that sees no noise: the clean sample stays x / signal, whose size where it ends is alpha's root.
        (*_, last) = sample_steps("ddim", Model(), x_T, None, steps=3, final_alpha=end)
        torch.testing.assert_close(last.x_t, (alpha**0.5 * last.pred_x0).float(), rtol=1e-5, atol=1e-5)


# --- beside CompVis's own objects, which tests/models hold to CompVis's recorded chains ---


def compvis_bytes(model, latents, rounding):
    x = model.decode_first_stage(latents)
    if rounding == "truncate":  # scripts/txt2img.py
        x = 255.0 * ((x + 1.0) / 2.0).clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()
    else:  # predict.py and gradio_*.py
        x = (x.permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().clip(0, 255)
    return x.astype(np.uint8)


@pytest.mark.parametrize(
    ("preset", "scale", "rounding"),
    [("compvis", 7.5, "truncate"), ("bubbliiiing", 9.0, "truncate_127.5"), ("cldm", 9.0, "truncate_127.5")],
)
@pytest.mark.thinned(3)
def test_the_scripts_of_compvis_line_by_line(sd, preset, scale, rounding):
    """Seeds, draws, the longer list of levels for 7 steps, guidance and bytes: txt2img, and img2img from a picture."""
    model, options = sd.model, {"negative_prompt": "blue", "seed": 5, "steps": 7, "preset": preset}
    with torch.no_grad():
        c, uc = model.get_learned_conditioning([PROMPT]), model.get_learned_conditioning(["blue"])
        guided = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uc}
        seed_everything(5)
        sampler = DDIMSampler(model)
        samples, _ = sampler.sample(
            S=7,
            batch_size=1,
            shape=(4, 8, 8),
            conditioning=c,
            verbose=False,
            ddim_discretize="compvis",
            **guided,
        )
        out = sd.txt2img(PROMPT, **options)
        atol = 1e-5 * samples.abs().max().item()
        torch.testing.assert_close(out.latents, samples, rtol=0, atol=atol)
        differs = np.asarray(out[0]).astype(int) - compvis_bytes(model, samples, rounding)[0]
        assert abs(differs).max() <= 1 and (differs != 0).mean() < 1e-3
        if preset == "cldm":
            return
        guided["unconditional_guidance_scale"] = 5.0 if preset == "compvis" else scale
        source = picture()
        init = 2.0 * torch.from_numpy(np.asarray(source, np.float32) / 255.0).permute(2, 0, 1)[None] - 1.0
        seed_everything(5)
        z = model.get_first_stage_encoding(model.encode_first_stage(init))
        sampler.make_schedule(7, "compvis", ddim_eta=0.0, verbose=False)
        t_enc = int(0.75 * 7) if preset == "compvis" else min(int(1.0 * 7), 7 - 1)
        z_enc = sampler.stochastic_encode(z, torch.tensor([t_enc]))
        samples = sampler.decode(z_enc, c, t_enc, **guided)
        out = sd.img2img(PROMPT, source, **options)
        torch.testing.assert_close(out.latents, samples, rtol=0, atol=1e-5 * samples.abs().max().item())


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_clip_skip_may_leave_the_negative_prompt_at_the_last_layer(sd, syntax):
    """diffusers' clip_skip=1: the prompt's layer is the last but one, the negative prompt's the last."""

    def both(**options):
        request = sd.plan(PROMPT, negative_prompt="blue", prompt_syntax=syntax, seed=1, **options)
        with torch.no_grad():
            halves = encode_batch(sd.model, request, request.passes[0], request.images, {})
        return [half.at(0)[0].given for half in halves]

    (prompt, negative), (other, last) = both(clip_skip=2), both(clip_skip=1)
    got = both(clip_skip=2, clip_skip_of="prompt")
    assert torch.equal(got[0], prompt) and torch.equal(got[1], last)
    assert not torch.allclose(negative, last, atol=1e-3) and not torch.allclose(prompt, other, atol=1e-3)
    assert sd.plan(PROMPT, preset="diffusers").clip_skip_of == "prompt"
