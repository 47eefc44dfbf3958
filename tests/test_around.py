"""What is done around a picture: loops, masks, canvases and tiles are img2img of what ldm.sources makes of it."""

import math
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from esrgan import esrgan
from keyed import weight
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny import tiny_model

import ldm
from ldm import generate, options
from ldm import images as pictures
from ldm.adapters import ControlNet
from ldm.cli import painting_parser, read_prompts
from ldm.errors import UsageError
from ldm.images import to_tensor
from ldm.metadata import from_infotext, png_info
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.modules.seams import Rank
from ldm.noise import ImageNoise
from ldm.pipeline import StableDiffusion
from ldm.retouch import masks
from ldm.retouch.colour import match_colours
from ldm.retouch.tiles import Grid
from ldm.retouch.upscalers import FileUpscaler

PROMPT = "a red circle"
HOW = {"steps": 2, "seed": 3, "progress": False}
SIZE = (72, 64)


def picture(width=72, height=64):
    pixels = np.random.default_rng(1).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def mask(size=SIZE, box=(20, 12, 39, 30)):
    found = Image.new("L", size)
    found.paste(255, box)
    return found


def bytes_of(image):
    return np.asarray(image)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def nine():
    """One that sees the mask and the masked picture."""
    return StableDiffusion(tiny_model(9), name="nine")


@pytest.fixture(scope="module")
def plain(sd):
    return sd.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW)


def test_what_asks_for_nothing_changes_nothing(sd, plain):
    """A mask softened by 0, a region that is everything, one loop, a size that is the picture's."""
    nothing = {"mask_blur": 0, "loops": 1, "color_match": False, "resize_mode": "just resize"}
    got = sd.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW, **nothing, inpaint_fill="original")
    assert got[0].tobytes() == plain[0].tobytes() and got.infotexts == plain.infotexts
    everything = Image.new("L", SIZE, 255)
    for how in ({}, {"rounding": "round"}):
        whole = sd.inpaint(PROMPT, picture(), everything, strength=0.5, **HOW, **how)
        only = sd.inpaint(PROMPT, picture(), everything, strength=0.5, **HOW, **how, inpaint_full_res=True)
        assert whole[0].tobytes() == only[0].tobytes() and torch.equal(whole.latents, only.latents)
    black = Image.eval(mask(), lambda grey: 255 - grey)
    turned = sd.inpaint(PROMPT, picture(), black, strength=0.5, **HOW, mask_invert=True)
    assert turned[0].tobytes() == plain[0].tobytes()


def test_strength_0_gives_the_picture_back(sd):
    image = picture(80, 64)
    for given, wanted in (
        ({}, image),
        ({"mask": mask((80, 64)), "mask_blur": 4, "inpaint_fill": "latent nothing"}, image),
        ({"mask": mask((80, 64)), "inpaint_full_res": True, "width": 64, "height": 64}, image),
        ({"color_match": True}, image),
        ({"outpaint": (8, 0, 16, 0)}, masks.extended(image, (8, 0, 16, 0), 8)[0]),
        (
            {"upscale_by": 1.5, "upscale_overlap": 8, "width": 64},
            image.resize((120, 96), Image.Resampling.LANCZOS),
        ),
    ):
        got = sd.txt2img(PROMPT, image=image, strength=0, **HOW, **given)[0]
        assert got.size == wanted.size and got.tobytes() == wanted.tobytes(), given


def test_soft_edges_leave_the_latents_and_the_kept_bytes(sd, plain):
    soft = sd.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW, mask_blur=9, mask_blur_y=2)
    assert torch.equal(soft.latents, plain.latents)
    weights = bytes_of(masks.blur(mask(), 9, 2))
    kept, own = weights == 0, weights >= 128
    assert (bytes_of(soft[0])[kept] == bytes_of(picture())[kept]).all()
    inner = own & (bytes_of(mask()) > 0)
    assert (bytes_of(soft[0])[inner] == bytes_of(plain[0])[inner]).all() and inner.sum() > 50
    assert not (bytes_of(soft[0])[~kept] == bytes_of(plain[0])[~kept]).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("fill", ["latent noise", "fill", "latent nothing"])
def test_what_is_under_the_mask_is_where_it_starts(sd, fill):
    """And what is blended."""
    noise = ImageNoise([3])  # of the encoder, then x_T, then each step
    cells = pictures.shrink_mask(pictures.to_mask(mask()), 8, "any")
    with torch.no_grad():
        z = generate.encode_image(sd.model, to_tensor(masks.fill(picture(), mask())), 1, noise)
        x_T = generate.initial_latents(sd.model, 1, 64, 72, noise)
        under = {"fill": z, "latent noise": x_T, "latent nothing": torch.zeros_like(z)}[fill]
        z = torch.where(cells > 0, under, z)
        c, uc = (sd.model.get_learned_conditioning([text]) for text in (PROMPT, ""))
        how = {"steps": 2, "run_last": 1, "noise": noise, "eta": 0.0, "guidance_scale": 7.5}
        *_, last = generate.denoise(
            sd.model, x_T, c, sampler="ddim", start_from=z, unconditional_conditioning=uc,
            mask=1 - cells, x0=z, **how,
        )  # fmt: skip
    got = sd.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW, inpaint_fill=fill)
    assert torch.equal(got.latents, pictures.paste(z, last.x_t, 1 - cells))
    kept = bytes_of(mask()) == 0
    assert (bytes_of(got[0])[kept] == bytes_of(picture())[kept]).all()


@pytest.mark.slow
def test_of_a_model_that_sees_the_masked_picture_too(nine):
    plain = nine.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW)
    found = {plain.latents.numpy().tobytes()}
    for fill in ("fill", "latent noise", "latent nothing"):
        own = nine.inpaint(PROMPT, picture(), mask(), strength=0.5, **HOW, inpaint_fill=fill)
        kept = bytes_of(mask()) == 0
        assert (bytes_of(own[0])[kept] == bytes_of(picture())[kept]).all()
        found.add(own.latents.numpy().tobytes())
    assert len(found) == 4
    canvas, box = masks.extended(picture(), (16, 0, 0, 8), 8)
    got = nine.img2img(PROMPT, picture(), 1.0, **HOW, outpaint=(16, 0, 0, 8))
    want = nine.inpaint(PROMPT, canvas, masks.around(box, canvas.size), **HOW)
    assert got[0].tobytes() == want[0].tobytes()


def test_only_masked_is_inpainting_of_the_region_laid_back(sd):
    image, marks = picture(150, 131), mask((150, 131), (40, 50, 60, 58))
    got = sd.inpaint(
        PROMPT, image, marks, **HOW, width=64, height=64, inpaint_full_res=True, inpaint_full_res_padding=6
    )
    box = (34, 38, 66, 70)
    inner = image.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    inner_mask = marks.crop(box).resize((64, 64), Image.Resampling.NEAREST)
    part = sd.inpaint(PROMPT, inner, inner_mask, **HOW)
    assert torch.equal(got.latents, part.latents) and got[0].size == (150, 131)
    changed = (bytes_of(got[0]) != bytes_of(image)).any(axis=-1)
    assert changed.any() and not changed[bytes_of(marks) == 0].any()


def test_an_adapters_mask_is_of_the_whole_picture(sd):
    class Masked:
        mask, rank = ("left half",), Rank.RESIDUALS

        def attach(self, network):
            return lambda: None

    sd.plan(PROMPT, image=picture(), strength=0.5, steps=2, adapters=[Masked()])
    for option, given in (
        ("upscale_by", {"upscale_by": 2, "upscale_overlap": 16}),
        ("inpaint_full_res", {"mask": mask(), "inpaint_full_res": True}),
    ):
        with pytest.raises(
            UsageError, match=f"^{option} paints a part .* and the mask of Masked is of all of it"
        ):
            sd.plan(PROMPT, image=picture(), steps=2, adapters=[Masked()], **given)


@pytest.mark.slow
def test_a_part_is_painted_along_the_part_of_the_hint_that_lies_there(sd, tmp_path):
    """Tiles, and the region of a mask."""
    with torch.device("meta"):
        network = ControlNetModel.beside(sd.model.model.diffusion_model)
    state = {name: weight(f"control.{name}", tuple(one.shape)) for name, one in network.state_dict().items()}
    save_file(state, tmp_path / "edges.safetensors")
    image, hint = picture(96, 72), picture(72, 96).transpose(Image.Transpose.ROTATE_90)

    def along(picture):
        return [ControlNet(tmp_path / "edges.safetensors", picture, scale=2.0)]

    got = sd.upscale(image, PROMPT, 1, tile=64, overlap=16, strength=0.5, adapters=along(hint), **HOW)
    grid = Grid.over((96, 72), (64, 64), 16)
    parts = [
        sd.img2img(
            PROMPT, image.crop(box), 0.5, steps=2, seed=3 + i, progress=False, adapters=along(hint.crop(box))
        )[0]
        for i, box in enumerate(grid.boxes)
    ]
    assert got[0].tobytes() == grid.join(parts).tobytes()
    marks, box = mask((96, 72), (40, 20, 60, 28)), (34, 8, 66, 40)
    masked = {"width": 64, "height": 64, "inpaint_full_res": True, "inpaint_full_res_padding": 6}
    got = sd.inpaint(PROMPT, image, marks, **HOW, **masked, adapters=along(hint))
    inner = image.crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    inner_mask = marks.crop(box).resize((64, 64), Image.Resampling.NEAREST)
    part = sd.inpaint(PROMPT, inner, inner_mask, **HOW, adapters=along(hint.crop(box)))
    assert torch.equal(got.latents, part.latents)
    assert not torch.equal(got.latents, sd.inpaint(PROMPT, inner, inner_mask, **HOW).latents)


def test_colours_are_the_pictures(sd):
    own = sd.img2img(PROMPT, picture(), 0.5, **HOW)
    got = sd.img2img(PROMPT, picture(), 0.5, **HOW, color_match=True)
    assert torch.equal(own.latents, got.latents)
    assert (bytes_of(got[0]) == match_colours(bytes_of(own[0]), bytes_of(picture()))).all()


@pytest.mark.slow
def test_for_latents_the_picture_is_enlarged_as_latents(sd, nine):
    for one in (sd, nine):
        got = one.img2img(
            PROMPT, picture(80, 64), 0.5, **HOW, width=72, height=64, resize_mode="latent upscale"
        )
        assert got[0].size == SIZE
        if one is sd:
            noise = ImageNoise([3])
            with torch.no_grad():
                z = generate.encode_image(sd.model, to_tensor(picture(80, 64)), 1, noise)
                z = torch.nn.functional.interpolate(z, size=(8, 9), mode="bilinear")
                c, uc = (sd.model.get_learned_conditioning([text]) for text in (PROMPT, ""))
                *_, last = generate.denoise(
                    sd.model, generate.initial_latents(sd.model, 1, 64, 72, noise), c, sampler="ddim", steps=2,
                    run_last=1, noise=noise, eta=0.0, guidance_scale=7.5, start_from=z, unconditional_conditioning=uc,
                )  # fmt: skip
            assert torch.equal(got.latents, last.x_t)


def test_loops_are_img2img_of_what_came_with_the_next_seed(sd):
    """Strength goes from 1 to 0.5; steps are as many as that leaves of 4."""
    run = {"steps": 4, "progress": False, "sampler": "ddim"}
    steps = []
    got = sd.img2img(
        PROMPT, picture(), 1.0, seed=3, **run, loops=3, loop_strength=0.5,
        callback=lambda one: steps.append(one.step),
    )  # fmt: skip
    image = picture()
    for i, strength in enumerate((1.0, 0.75, 0.5)):
        image = sd.img2img(PROMPT, image, strength, seed=3 + i, **run)[0]
    assert got[0].tobytes() == image.tobytes() and got.seeds == [3]
    assert steps == [*range(1, 10), 9]


@pytest.mark.parametrize(
    ("curve", "shares"),
    [
        ("linear", (1 / 3, 2 / 3, 1)),
        ("Aggressive", (0.5, math.sqrt(0.75), 1)),  # the sine of 30, 60 and 90 degrees
        ("lazy", (1 - math.sqrt(0.75), 0.5, 1)),
    ],
)
def test_strength_goes_along_a_curve(sd, curve, shares):
    how = {"image": picture(), "steps": 200, "seed": 2**64 - 2, "loops": 4, "loop_curve": curve.lower()}
    passes = sd.plan(PROMPT, **how, strength=0.9, loop_strength=0.3).passes
    strengths = [one.start.strength for one in passes]
    assert np.allclose(strengths, [0.9, *(0.9 - 0.6 * share for share in shares)], atol=1e-11)
    assert [one.count for one in passes] == [int(200 * strength + 1e-9) for strength in strengths]
    specs = sd.plan(PROMPT, **how, strength=0.9).images
    assert [one.images(specs)[0].seed for one in passes] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert len({one.start.strength for one in sd.plan(PROMPT, **how, strength=0.9).passes}) == 1
    assert len(sd.plan(PROMPT, **how, strength=0.9, loop_strength=0).passes) == 3  # the last has no step left


@pytest.mark.slow
def test_loops_repaint_what_is_under_the_mask_alone(sd, nine):
    around = {"mask_blur": 2, "color_match": True, "inpaint_fill": "fill", "strength": 0.5}
    for one in (sd, nine):
        got = one.inpaint(PROMPT, picture(), mask(), **HOW, **around, loops=2)
        once = one.inpaint(PROMPT, picture(), mask(), **HOW, **around)
        kept = bytes_of(masks.blur(mask(), 2, 2)) == 0
        assert (bytes_of(got[0])[kept] == bytes_of(picture())[kept]).all()
        assert got[0].tobytes() != once[0].tobytes()
    # Without colours and blur the second is inpainting of the first; each begins with its prompt anew.
    how = {"prompt_syntax": "a1111", "strength": 0.5, "steps": 2, "progress": False}
    changes = "a [red:blue:0.6] (circle:1.2)"
    got = sd.inpaint(changes, picture(), mask(), seed=3, **how, loops=2, batch_size=2, num_images=2)
    for i in range(2):
        once = sd.inpaint(changes, picture(), mask(), seed=3 + i, **how)
        twice = sd.inpaint(changes, once[0], mask(), seed=4 + i, **how)
        assert np.abs(bytes_of(got[i]).astype(int) - bytes_of(twice[0])).max() <= 1  # batched


def test_a_canvas_is_inpainting_of_it(sd):
    image = picture()
    canvas, box = masks.extended(image, (16, 0, 0, 8), 8)
    got = sd.img2img(PROMPT, image, 1.0, **HOW, outpaint=(16, 0, 0, 8))
    want = sd.inpaint(PROMPT, canvas, masks.around(box, canvas.size), **HOW)
    assert got[0].size == (88, 72) and got[0].tobytes() == want[0].tobytes()
    assert got[0].crop(box).tobytes() == image.tobytes() and got.parameters[0].mode == "inpaint"


def test_tiles_are_img2img_of_each_mixed_at_the_seams(sd):
    image = picture(64, 48)
    one = sd.upscale(image, PROMPT, 1.5, tile=(96, 72), strength=0.5, **HOW)
    larger = image.resize((96, 72), Image.Resampling.LANCZOS)
    assert one[0].tobytes() == sd.img2img(PROMPT, larger, 0.5, **HOW)[0].tobytes()
    more = sd.upscale(image, PROMPT, 1.5, tile=64, overlap=16, strength=0.5, **HOW)
    grid = Grid.over((96, 72), (64, 64), 16)
    parts = [
        sd.img2img(PROMPT, larger.crop(box), 0.5, steps=2, seed=3 + i, progress=False)[0]
        for i, box in enumerate(grid.boxes)
    ]
    assert len(parts) == 4 and more[0].tobytes() == grid.join(parts).tobytes()
    assert more.seeds == [3] and more[0].size == (96, 72)
    wide = sd.plan(
        PROMPT, image=picture(640, 64), upscale_by=4, width=512, height=128, strength=0.5
    )  # beyond 2048
    assert wide.size == (2560, 256) and {one.size for one in wide.passes} == {(512, 128)}


@pytest.mark.slow
def test_guidance_of_the_second_pass_is_its_own(sd):
    second = {"hires_size": (96, 80), "hires_upscaler": "lanczos", "hires_steps": 1, "hires_strength": 0.5}
    first = sd.txt2img(PROMPT, **HOW, width=72, height=64)
    got = sd.txt2img(PROMPT, **HOW, width=72, height=64, **second, hires_guidance_scale=2.5)
    larger = to_tensor(first[0].resize((96, 85), Image.Resampling.LANCZOS))[:, :, 2:82]
    want = sd.img2img(PROMPT, larger, 0.5, **HOW, guidance_scale=2.5)
    assert torch.equal(got.latents, want.latents)
    assert ", Hires CFG Scale: 2.5" in got.infotexts[0] and "CFG scale: 7.5" in got.infotexts[0]


def test_pictures_say_it_in_a1111s_words_and_repeat_it(sd, tmp_path):
    given = {
        "mask_blur": 3, "mask_invert": True, "inpaint_fill": "latent noise", "inpaint_full_res": True,
        "inpaint_full_res_padding": 8, "resize_mode": "crop and resize", "color_match": True, "loops": 2,
        "loop_strength": 0.25, "loop_curve": "lazy",
    }  # fmt: skip
    out = sd.inpaint(PROMPT, picture(), mask(), **HOW, **given)
    text = out.infotexts[0]
    for words in (
        "Mask blur: 3", "Mask mode: Inpaint not masked", "Masked content: latent noise", "Inpaint area: Only masked",
        "Masked area padding: 8", "Resize mode: Crop and resize", "Color correction: True", "Loops: 2",
        "Final denoising strength: 0.25", "Denoising curve: Lazy",
    ):  # fmt: skip
        assert words in text, words
    read = from_infotext(text)
    assert {name: read[name] for name in given} == given and "extra" not in read
    path = out.save(tmp_path)[0]
    parser = started("inpaint.py", strength=1.0)
    args = parser.parse_args(["--like", str(path), "--mask_blur", "1"])
    assert {name: getattr(args, name) for name in given} == {**given, "mask_blur": 1}
    assert ldm.read_metadata(path)["outpaint"] is None
    tiled = sd.upscale(picture(64, 72), PROMPT, 1, overlap=8, tile=64, **HOW)
    assert "SD upscale factor: 1.0, SD upscale overlap: 8, SD upscale upscaler: Lanczos" in tiled.infotexts[0]
    assert "Size: 64x64" in tiled.infotexts[0]
    wider = sd.img2img(PROMPT, picture(), 0, **HOW, outpaint=(8, 0, 16, 0))
    assert 'Outpaint: "8, 0, 16, 0"' in wider.infotexts[0]
    assert from_infotext(wider.infotexts[0])["outpaint"] == [8, 0, 16, 0]


def test_a_line_of_a_prompt_file_says_it(tmp_path):
    (tmp_path / "p.txt").write_text(
        "--prompt a --mask_blur 4 --inpainting_fill fill --outpaint 8,0,16,0 --resize_mode 'Resize and fill' "
        "--inpaint_full_res --upscale_by 2 --upscaler 'Lanczos'\n"
    )
    assert read_prompts(str(tmp_path / "p.txt"))[0].options == {
        "mask_blur": 4, "inpaint_fill": "fill", "outpaint": (8, 0, 16, 0), "resize_mode": "resize and fill",
        "inpaint_full_res": True, "upscale_by": 2.0, "upscaler": "lanczos",
    }  # fmt: skip


REFUSED = [
    ({"mask_blur": 4}, "mask_blur is of a mask, and none is given"),
    ({"inpaint_full_res": True}, "inpaint_full_res is of a mask"),
    ({"image": None, "loops": 2, "strength": None}, "loops is of a picture to start from, and none is given"),
    ({"image": None, "outpaint": (8, 8, 8, 8), "strength": None}, "outpaint is of a picture"),
    ({"outpaint": (0, 0, 0, 0)}, "outpaint must let the picture grow at one side at least, got 0,0,0,0"),
    ({"loop_strength": 0.5}, "loop_strength is said of loops, which is not asked for"),
    ({"upscale_overlap": 32}, "upscale_overlap is said of upscale_by"),
    ({"mask": mask(), "inpaint_full_res_padding": 4}, "padding is said of inpaint_full_res"),
    ({"mask": mask(), "upscale_by": 2}, "leave mask out"),
    ({"loops": 2, "upscale_by": 2}, "leave loops out"),
    ({"upscale_by": 2, "regions": [("a cat", (0, 0, 0.5, 1))]}, "leave regions out"),
    ({"upscale_by": 2, "output_type": "latent"}, "has no latents"),
    ({"upscale_by": 2, "width": 64, "height": 64, "upscale_overlap": 64}, "less than a tile of 64 x 64, got 64"),
    ({"upscale_by": 8, "image": Image.new("RGB", (900, 800))}, "gives 7200 x 6400 pixels; wanted .* 36 million"),
    (
        {"upscale_by": 8, "width": 64, "height": 64, "upscale_overlap": 63, "image": Image.new("RGB", (512, 512))},
        "63 of tiles of 64 x 64 makes 16265089 tiles .* give less overlap",
    ),
    ({"upscale_by": 9}, "upscale_by must be a number from 1 to 8, got 9"),
    ({"upscale_by": 2, "upscale_overlap": 8, "upscaler": "lanczoz"}, "one of lanczos, .* did you mean 'lanczos'"),
    ({"upscale_by": 2, "upscale_overlap": 8, "upscaler": "up.pth"}, "upscaler 'up.pth' is not there; give the path"),
    ({"mask": mask(), "resize_mode": "latent upscale"}, "with a mask take another"),
    ({"mask": mask(), "outpaint": (8, 0, 0, 0), "inpaint_full_res": True}, "leave inpaint_full_res out"),
    ({"outpaint": (8, 8)}, "outpaint must be 4 whole numbers from 0 to"),
    ({"outpaint": (8, 0.5, 0, 0)}, "outpaint must be a whole number"),
    ({"outpaint": (0, 0, 16384, 0)}, "outpaint gives 16456 x 64 pixels; wanted sides of at most"),
    ({"mask": mask(), "mask_blur": -1}, "mask_blur must be a whole number from 0 to 256, got -1"),
    ({"mask": mask(box=(70, 63, 71, 64)), "mask_blur": 200}, "mask_blur 200 leaves nothing of so small a mask"),
    ({"mask": mask(), "inpaint_fill": "noise"}, "inpaint_fill must be one of|inpaint_fill must be 'original'"),
    ({"mask": Image.new("L", SIZE, 255), "mask_invert": True}, "the mask marks nothing"),
    ({"mask": mask(box=(0, 0, 0, 0)), "inpaint_full_res": True}, "the mask marks nothing"),
    ({"loops": 0}, "loops must be a whole number from 1 to 64"),
    ({"image": picture(72, 64).crop((0, 0, 5, 5)), "color_match": True}, "width of the picture must be"),
    ({"resize_mode": "stretch"}, "resize_mode must be"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_is_one_line(sd, given, says):
    with pytest.raises((UsageError, ldm.errors.LdmError)) as caught:
        sd.plan(PROMPT, **{"image": picture(), "strength": 0.5, **given})
    assert re.search(says, str(caught.value)), str(caught.value)
    assert (
        "\n" not in str(caught.value) and len(str(caught.value)) <= 400 and caught.value.exit_code in (2, 9)
    )


def test_upscale_wants_a_scale(sd):
    with pytest.raises(UsageError, match="scale of upscale must be a number from 1 to 8, got None"):
        sd.upscale(picture(), scale=None)


def test_a_file_enlarges_by_its_name(sd, tmp_path):
    """Hires fix and tiles; pictures say the name, which --like finds in the folder."""
    pytest.importorskip("spandrel")
    torch.save({"params_ema": esrgan()}, tmp_path / "2x-Sharp.pth")
    up = FileUpscaler(tmp_path / "2x-Sharp.pth")
    first = sd.txt2img(PROMPT, **HOW, width=72, height=64)
    how = {"hires_scale": 1.5, "hires_steps": 1, "hires_strength": 0.5, "upscaler_dir": tmp_path}
    got = sd.txt2img(PROMPT, **HOW, width=72, height=64, **how, hires_upscaler="2x-Sharp")
    want = sd.img2img(PROMPT, up.enlarge(first[0], (104, 96)), 0.5, **HOW)
    assert torch.equal(got.latents, want.latents)
    assert "Hires upscaler: 2x-Sharp" in got.infotexts[0]
    tiled = sd.upscale(
        picture(), PROMPT, 1.5, strength=0, overlap=8, **HOW, upscaler=tmp_path / "2x-Sharp.pth"
    )
    assert tiled[0].tobytes() == up.enlarge(picture(), (104, 96)).tobytes()
    assert tiled.parameters[0].upscaler == "2x-Sharp" and str(tmp_path) not in str(tiled.metadata(0))


def started(name, strength):
    """The parser of a script to which a picture to begin with and a mask are given."""
    parser = painting_parser(name, "x", outdir="o", scale=7.5, strength=strength)
    parser.add_argument("--init-img", default="in.png")
    parser.add_argument("--mask", default="mask.png")
    return parser


def test_like_wants_a_folder_for_a_files_name(sd, tmp_path, capsys):
    out = sd.img2img(PROMPT, picture(), 0, **HOW)
    values = {**vars(out.parameters[0]), "upscale_by": 2.0, "upscaler": "2x-Sharp"}
    picture().save(tmp_path / "a.png", pnginfo=png_info(values))
    parser = started("img2img.py", strength=0.75)
    assert parser.parse_args(["--like", str(tmp_path / "a.png")]).upscaler == "lanczos"
    assert "its SD upscale upscaler '2x-Sharp' is not known here; left as it is" in capsys.readouterr().out
    args = parser.parse_args(["--like", str(tmp_path / "a.png"), "--upscaler_dir", str(tmp_path)])
    assert args.upscaler == "2x-Sharp"


def test_like_leaves_out_what_is_said_of_nothing(tmp_path, capsys):
    """A1111's loopback writes a final strength and no number of loops, its SD upscale an overlap and no factor."""
    text = (
        "a\nSteps: 2, Seed: 3, Denoising curve: Lazy, Final denoising strength: 0.5, SD upscale overlap: 32"
    )
    info = PngInfo()
    info.add_text("parameters", f"{text}, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 16")
    picture().save(tmp_path / "a.png", pnginfo=info)
    parser = started("inpaint.py", strength=1.0)
    args = parser.parse_args(["--like", str(tmp_path / "a.png")])
    assert (args.loop_strength, args.loop_curve, args.upscale_overlap) == (None, "linear", 64)
    assert (args.mask_blur, args.inpaint_full_res, args.inpaint_full_res_padding) == (4, True, 16)
    said = capsys.readouterr().out
    assert said.count("which is not asked for; left out") == 3
    assert "its Denoising curve is of loops, which is not asked for" in said
    args = parser.parse_args(["--like", str(tmp_path / "a.png"), "--loops", "3"])
    assert (args.loop_strength, args.loop_curve) == (0.5, "lazy")


# What a picture says -> the script, with what it is given; what is said; the option that stays at its default.
OF_OTHERS = [
    ({"mode": "inpaint", "mask_blur": 4, "inpaint_fill": "fill"}, "img2img", ["--init-img", "in.png"],
     "its mask, Mask blur, Masked content left out: of a mask (inpaint.py --mask), which is not here", "mask_blur"),
    ({"mode": "inpaint", "mask_rule": "a1111"}, "inpaint", ["--init-img", "in.png", "--mask", "m.png"], "", None),
    ({"mode": "inpaint", "mask_blur": 4}, "img2img", ["--init-img", "in.png", "--outpaint", "8,0,0,0"], "", None),
    ({"mode": "inpaint", "kept": "latents"}, "inpaint", ["--indir", "in"], "", None),
    ({"mode": "inpaint"}, "img2img", ["--init-img", "in.png"], "a.png: its mask left out: of a mask (inpaint.py", None),
    ({"mode": "img2img", "strength": 0.5}, "inpaint", ["--init-img", "in.png", "--mask", "m.png"], "", None),
    ({"mode": "txt2img", "hires_scale": 2.0, "hires_steps": 3}, "img2img", ["--init-img", "in.png"],
     "its Hires upscale, Hires steps left out: of hires fix (txt2img.py), which is not here", None),
    ({"strength": 0.5, "mask_blur": 4}, "txt2img", [], "its Denoising strength left out: of a picture to begin", None),
    ({"mode": "img2img"}, "txt2img", [], "use img2img.py and give that one as --init-img", UsageError),
    ({"mode": "inpaint"}, "txt2img", [], "use inpaint.py and give that one as --init-img", UsageError),
    ({"mode": "inpaint"}, "grid", [], "use inpaint.py and give that one as --init-img", UsageError),
    ({"mode": "inpaint", "mask_blur": 4}, "grid", ["--init-img", "in.png"], "its mask, Mask blur left", "mask_blur"),
    ({"mode": "edit"}, "txt2img", [], "use edit.py and give that one as --image", UsageError),
    ({"mode": "edit"}, "img2img", ["--init-img", "in.png"], "use edit.py and give that one as --image", UsageError),
]  # fmt: skip


@pytest.mark.parametrize(("said", "script", "argv", "words", "left"), OF_OTHERS)
def test_like_of_another_scripts_picture_says_what_is_left_out(
    tmp_path, monkeypatch, capsys, said, script, argv, words, left
):
    """Or which script to take, where without another picture it would be no such picture at all."""
    monkeypatch.chdir(tmp_path)
    picture().save("a.png", pnginfo=png_info({"prompt": "a", "steps": 2, "seed": 3, **said}))
    strength = None if script in ("txt2img", "grid") else 0.75
    parser = painting_parser(
        f"{script}.py", "x", outdir="o", scale=7.5, strength=strength, any_start=script == "grid"
    )
    for name in {"img2img": ["init-img"], "txt2img": []}.get(script, ["init-img", "mask", "indir"]):
        parser.add_argument(f"--{name}")
    if left is UsageError:
        with pytest.raises(UsageError, match=re.escape(words)):
            parser.parse_args(["--like", "a.png", *argv])
        return
    args = parser.parse_args(["--like", "a.png", *argv])
    out = capsys.readouterr().out
    assert words in out and bool(words) == bool(out) and args.prompt == "a"
    for name in said.keys() - {"mode"}:
        if hasattr(args, name):
            option = options.option(name)
            assert getattr(args, name) == (option.default if words else said[name]), name
    assert left is None or hasattr(args, left)
    if left is not None:  # given by hand it is not swallowed
        assert getattr(parser.parse_args(["--like", "a.png", *argv, "--mask_blur", "2"]), left) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "size"),
    [
        ("img2img", ("--outpaint", "8,0,0,8"), (72 + 8, 64 + 8)),
        ("inpaint", ("--outpaint", "8,0,0,8", "--mask_blur", "2"), (72 + 8, 64 + 8)),
        ("img2img", ("--upscale_by", "1.5", "--upscale_overlap", "8", "--W", "64", "--H", "64"), (104, 96)),
    ],
)
def test_scripts_paint_it(tmp_path, script, words, size):
    picture().save(tmp_path / "a.png")
    main = runpy.run_path(f"scripts/{script}.py")["main"]
    common = (
        "--prompt",
        "a",
        "--strength",
        "0",
        "--steps",
        "2",
        "--skip_grid",
        "--outdir",
        str(tmp_path / "o"),
    )
    main(["--init-img", str(tmp_path / "a.png"), *words, *common])
    assert Image.open(tmp_path / "o" / "samples" / "00000.png").size == size


@pytest.mark.slow
def test_the_block_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "pictures.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/pictures.md", "exec"), {})
    shown = {
        name
        for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    groups = {one.name for one in options.options() if one.group in (options.START, options.MASK)}
    assert groups - shown == {"strength", "upscale_by", "upscale_overlap", "upscaler"}
    for line in re.findall(r"^python scripts/(.*)", page, re.MULTILINE):
        script, *words = shlex.split(line)
        strength = None if script == "txt2img.py" else 0.75
        parser = painting_parser(script, "x", outdir="o", scale=7.5, strength=strength)
        parser.add_argument("--init-img")
        parser.parse_args(words)
