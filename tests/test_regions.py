"""Regions: parts of a picture with prompts of their own, by every door, and what cannot be painted with them."""

import json
import re
from pathlib import Path

import pytest
import torch
from keyed import weight
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_model

from ldm import generate, options
from ldm.adapters import ControlNet, PromptToPrompt
from ldm.cli import painting_parser, read_prompts
from ldm.errors import UsageError
from ldm.metadata import from_infotext, read_metadata
from ldm.models.diffusion.conditions import Condition, ScheduledCondition, area_of
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.noise import ImageNoise
from ldm.pipeline import StableDiffusion

PROMPT, RING = "a red circle", "a blue ring"
HOW = {"steps": 2, "seed": 3, "width": 136, "height": 64, "progress": False}  # 17 x 8 cells
LEFT = (0, 0, 0.5, 1)
PICTURE, MASK = Image.new("RGB", (136, 64)), Image.new("L", (136, 64), 255)
EMBEDS = torch.zeros(1, 77, 128)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def plain(sd):
    return sd.txt2img(PROMPT, **HOW)


@pytest.fixture(scope="module")
def split(sd):
    return sd.txt2img(PROMPT, **HOW, regions=[(RING, LEFT), (RING, (0.5, 0, 0.5, 1), 0.5)])


def test_a_region_of_the_whole_picture_with_the_same_prompt_is_the_plain_picture(sd, plain):
    got = sd.txt2img(PROMPT, **HOW, regions=[(PROMPT, (0, 0, 1, 1), 2.5)]).latents
    torch.testing.assert_close(got, plain.latents, rtol=0, atol=2e-5)


def test_regions_are_conditions_of_their_cells(sd, split):
    """To the bit: the same run by hand. 17 cells are parted in 8 and 8, as ComfyUI rounds."""
    assert [area_of(box, 17, 8) for box in (LEFT, (0.5, 0, 0.5, 1), (0.9, 0.5, 0.1, 0.5))] == [
        (0, 0, 8, 8),
        (8, 0, 8, 8),
        (15, 4, 2, 4),
    ]
    model = sd.model
    own, ring, none = (model.get_learned_conditioning([text])[0] for text in (PROMPT, RING, ""))
    further = [Condition(ring, 1.0, area=(0, 0, 8, 8)), Condition(ring, 0.5, area=(8, 0, 8, 8))]
    noise = ImageNoise([3])
    run = {"steps": 2, "noise": noise, "eta": 0.0, "guidance_scale": 7.5, "sampler": "ddim"}
    with torch.no_grad():
        *_, last = generate.denoise(
            model,
            noise.begin(torch.empty(1, 4, 8, 17)),
            ScheduledCondition([[Condition(own), *further]]),
            unconditional_conditioning=ScheduledCondition([[Condition(none)]]),
            **run,
        )
    assert torch.equal(split.latents, last.x_t)


def test_prompts_of_other_languages_and_texts_mean_the_same(sd, split, plain):
    texts = ["0,0,.5,1:a blue ring", f"0.5,0,0.5,1,0.5: {RING}"]
    got = sd.txt2img(PROMPT, **HOW, prompt_syntax="a1111", regions=texts).latents
    torch.testing.assert_close(got, split.latents, rtol=0, atol=2e-4)
    assert (got - plain.latents).abs().max() > 0.01
    later = sd.txt2img(PROMPT, **HOW, prompt_syntax="a1111", regions=[("[a:b:1] (ring:1.3)", LEFT)]).latents
    assert (later - got).abs().max() > 0.01
    two = sd.txt2img([RING, PROMPT], **{**HOW, "seed": [9, 3]}, regions=split.parameters[0].regions).latents
    torch.testing.assert_close(two[1:], split.latents, rtol=0, atol=2e-5)


def test_both_passes_of_hires_fix_have_them_at_their_sizes(sd, monkeypatch):
    seen = []
    whole = type(sd.model).apply_model

    def watch(self, x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return whole(self, x, *args, **kwargs)

    monkeypatch.setattr(type(sd.model), "apply_model", watch)
    second = {"hires_scale": 1.25, "hires_steps": 1, "hires_strength": 0.5}
    sd.txt2img(PROMPT, **{**HOW, "steps": 1}, **second, regions=[(RING, LEFT)])
    assert seen == [(2, 4, 8, 17), (2, 4, 8, 8), (2, 4, 10, 21), (2, 4, 10, 10)]


def test_a_picture_says_its_regions_and_every_door_takes_them(split, tmp_path):
    wanted = [[RING, [0.0, 0.0, 0.5, 1.0], 1.0], [RING, [0.5, 0.0, 0.5, 1.0], 0.5]]
    path = split.save(tmp_path)[0]
    assert split.parameters[0].regions == read_metadata(path)["regions"] == wanted
    assert from_infotext(split.infotexts[0])["regions"] == wanted
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    assert parser.parse_args(["--like", str(path)]).regions == wanted
    flags = ["--region", f"0,0,0.5,1:{RING}", "--region", f"0.5,0,0.5,1,0.5:{RING}"]
    (tmp_path / "p.txt").write_text("--prompt a " + " ".join(f'"{x}"' if "," in x else x for x in flags))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "regions": flags[1::2]}))
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "a", "regions": [flags[1], *wanted[1:]]}))
    for found in (
        parser.parse_args(flags).regions,
        *(
            read_prompts(str(tmp_path / name))[0].options["regions"]
            for name in ("p.txt", "p.jsonl", "q.jsonl")
        ),
    ):
        assert [[one.prompt, list(one.box), one.weight] for one in found] == wanted


REFUSED = (
    ({"regions": "0,0,1,1:a"}, "regions must be a list of .prompt, .x, y, width, height.. .* got '0,0,1,1:a'"),
    ({"regions": [(RING, (0, 0, 1))]}, r"regions\[0\]: wanted \(prompt, \(x, y, width, height\)\)"),
    ({"regions": [(RING, LEFT), (LEFT, RING)]}, r"regions\[1\]: wanted \(prompt"),
    ({"regions": [(RING, (0, 0, 68, 64))]}, "from 0 to 1, shares of the picture, got"),
    ({"regions": [(RING, (0, 0, float("nan"), 1))]}, "from 0 to 1, shares of the picture, got"),
    ({"regions": [(RING, (0.6, 0, 0.5, 1))]}, r"x \+ width and y \+ height at most 1, got"),
    ({"regions": [(RING, (0.5, 0, 0, 1))]}, "a width and height above 0"),
    ({"regions": [(RING, LEFT, -1)]}, "wanted a weight from 0 to 10"),
    ({"regions": ["a blue ring"]}, r"regions\[0\]: wanted x,y,width,height:prompt .* got 'a blue ring'"),
    ({"regions": ["0,0,x,1:a"]}, "wanted x,y,width,height:prompt"),
    ({"regions": [("x\ud800", LEFT)]}, "characters that are none"),
    ({"regions": [(RING, LEFT)] * 17}, "at most 16 work together, got 17"),
    ({"regions": [(RING, (0, 0, 0.4, 1))]}, r"regions\[0\] must be at least 64 pixels .* got 56 x 64 of 136 x 64"),
    ({"regions": [(RING, LEFT)], "pag_scale": 2.0}, "PAG does not go together with regions"),
    (
        {"regions": [(RING, LEFT)], "adapters": "hint"},
        "ControlNet is of places of the whole picture, and regions are answered in cuttings",
    ),
    ({"regions": [(RING, LEFT)], "adapters": [PromptToPrompt()]}, "PromptToPrompt is of places of the whole"),
    (
        {"regions": [(RING, LEFT)], "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS},
        "regions have prompts of their own",
    ),
    (
        {"regions": [(RING, LEFT)], "image": PICTURE, "mask": MASK, "inpaint_full_res": True},
        "regions are shares of the whole picture, and inpaint_full_res paints a part of it",
    ),
    ({"regions": [("a AND b", LEFT)], "prompt_syntax": "a1111"}, "a region's prompt of several parts"),
    ({"regions": [("a <lora:x:1>", LEFT)], "prompt_syntax": "a1111"}, "a region's prompt has <lora:...> tags"),
)  # fmt: skip


def test_refusals(sd, tmp_path):
    with torch.device("meta"):
        network = ControlNetModel.beside(sd.model.model.diffusion_model)
    state = {name: weight(f"control.{name}", tuple(one.shape)) for name, one in network.state_dict().items()}
    save_file(state, tmp_path / "edges.safetensors")
    hint = ControlNet(tmp_path / "edges.safetensors", Image.new("RGB", (136, 64)))
    for given, words in REFUSED:
        given = {**given, "adapters": [hint]} if given.get("adapters") == "hint" else given
        with pytest.raises(UsageError, match=words) as caught:
            sd.plan(PROMPT, width=136, height=64, **given)
        assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value), given
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "regions": [["a", [0, 0, 2, 1]]]}')
    with pytest.raises(
        UsageError, match=r"line 1 of .*: regions\[0\]: wanted x, y, width and height from 0 to 1"
    ):
        read_prompts(str(tmp_path / "p.jsonl"))
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    for text in ("0,0,1:a", "0,0,1,1", "0,0,2,1:a", "0,0,1,1,11:a"):
        with pytest.raises(UsageError, match="argument --region: wanted .* got '") as caught:
            parser.parse_args(["--region", text])
        assert len(str(caught.value)) <= 400, text


def test_anybodys_text_is_read_or_left():
    kind = options.option("regions").kind
    for value in (
        None,
        "x",
        3,
        [3],
        [["a"]],
        [["a", [0, 0, 1]]],
        [["a", [0, 0, 2, 1]]],
        {"a": 1},
        [["a", LEFT, 99]],
    ):
        assert kind.take(value) is None and kind.read(json.dumps(value)) is None, value
    assert kind.read("[" * 100_000) is None and kind.read("{") is None
    assert kind.take([]) == []


@pytest.mark.slow
def test_the_block_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "regions.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "docs/regions.md", "exec"), names)
    assert names["out"].parameters[0].regions == [
        ["a large yellow star on a white background", [0, 0.5, 1, 0.5], 3.0]
    ]
    flags = re.findall(r"--region \"([^\"]*)\"", page)
    assert options.option("regions").kind.check("regions", flags)
