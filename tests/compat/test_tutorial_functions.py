"""The functions that tutorials write out: ldm_text_to_image with its scheduler, and load_image."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from ldm.errors import AbsentError, FormatError, UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.scheduler import DDIMScheduler
from ldm.tutorials import ldm_text_to_image, load_image

TEXT = "a red star"


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def samplers(model, x_T, texts, steps, eta=0.0, scale=1.0):
    """The same by DDIMSampler, and decoded."""
    with torch.no_grad():
        c = model.get_learned_conditioning(texts)
        uc = model.get_learned_conditioning([""] * len(texts)) if scale != 1 else None
        latents, _ = DDIMSampler(model).sample(
            steps, len(texts), x_T.shape[1:], c, x_T=x_T, eta=eta, verbose=False,
            unconditional_guidance_scale=scale, unconditional_conditioning=uc,
        )  # fmt: skip
        return model.decode_first_stage(latents)


@pytest.mark.parametrize(
    "image_shape", [(64, 80), (3, 64, 80), (1, 3, 64, 80), (1, 4, 8, 10), torch.Size([1, 4, 8, 10])]
)
def test_it_paints_what_the_sampler_paints(model, image_shape):
    """image_shape is a picture's, or the noise's as in the sketch; the level list is DDIMSampler's."""
    torch.manual_seed(3)
    got = ldm_text_to_image(image_shape, TEXT, 4, model=model)
    torch.manual_seed(3)
    want = samplers(model, torch.randn(1, 4, 8, 10), [TEXT], 4)
    assert got.shape == (1, 3, 64, 80)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_eta_adds_noise_and_guidance_weighs_the_text(model):
    torch.manual_seed(3)
    got = ldm_text_to_image(
        (2, 4, 8, 8), [TEXT, "a ring"], ddim_steps=3, eta=0.8, model=model, guidance_scale=4
    )
    torch.manual_seed(3)
    want = samplers(model, torch.randn(2, 4, 8, 8), [TEXT, "a ring"], 3, eta=0.8, scale=4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_the_list_that_counts_from_one_is_trailing(model):
    """1000, 950, ..., 50 is 999, 949, ..., 49 here; the function takes it by name."""
    scheduler = DDIMScheduler(model.alphas_cumprod, spacing="trailing")
    assert [int(t) + 1 for t in scheduler.get_timesteps(1000, ddim_steps=20)] == list(range(1000, 0, -50))
    asked = []
    watch = model.model.diffusion_model.register_forward_pre_hook(
        lambda m, args: asked.append(int(args[1][0]))
    )
    try:
        ldm_text_to_image((64, 64), TEXT, ddim_steps=20, model=model, spacing="trailing")
    finally:
        watch.remove()
    assert asked == list(range(999, 0, -50))


def test_the_listing_runs_as_sketched(model):
    """The tutorial's own lines, over any network that tells noise."""
    image_shape, ddim_steps, eta, T = (1, 4, 8, 8), 5, 0.5, 1000
    generator = torch.Generator().manual_seed(2)
    ddim_scheduler = DDIMScheduler()
    zt = torch.randn(image_shape, generator=generator)
    timesteps = ddim_scheduler.get_timesteps(T, ddim_steps)
    c = model.get_learned_conditioning([TEXT])
    torch.manual_seed(5)
    with torch.no_grad():
        for t in timesteps:
            eps = model.apply_model(zt, t.expand(1), c)
            std = ddim_scheduler.get_std(t, eta)
            zt = ddim_scheduler.get_xt_prev(zt, t, eps, std)
        got = model.decode_first_stage(zt)
    generator = torch.Generator().manual_seed(2)
    x_T = torch.randn(image_shape, generator=generator)
    torch.manual_seed(5)
    torch.testing.assert_close(got, samplers(model, x_T, [TEXT], 5, eta=eta), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_without_a_model_the_one_in_the_box_paints():
    """In the right colour, though it predicts velocities; asked for with guidance, the sketch has none."""
    picture = ldm_text_to_image(
        (128, 128), "a large red circle in the center on a white background", ddim_steps=8, guidance_scale=5,
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    red, green, blue = picture[0, :, 56:72, 56:72].mean(dim=(1, 2)).tolist()
    assert picture.shape == (1, 3, 128, 128) and red > 0.2 and green < -0.1 and blue < -0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_shape": 64}, "image_shape must be"),
        ({"image_shape": "64"}, "image_shape must be"),
        ({"image_shape": (64,)}, "image_shape must be"),
        ({"image_shape": (5, 64, 64)}, "image_shape must be"),
        ({"image_shape": (1, 1, 3, 64, 64)}, "image_shape must be"),
        ({"image_shape": (64, 60)}, "width must be a multiple of 8"),
        ({"image_shape": (0, 3, 64, 64)}, "the number of pictures"),
        ({"image_shape": (64.0, 64)}, "height must be"),
        ({"ddim_steps": 0}, "ddim_steps must be a whole number from 1 to 1000, got 0"),
        ({"ddim_steps": 1001}, "ddim_steps must be"),
        ({"eta": 1.5}, "eta must be a number from 0 to 1"),
        ({"eta": float("nan")}, "eta must be"),
        ({"guidance_scale": -1}, "guidance_scale must be"),
        ({"text": None}, "text must be a text"),
        ({"text": ["a", "b"], "image_shape": (3, 3, 64, 64)}, "one for each of 3 pictures, got 2"),
        ({"spacing": "karras"}, "spacing must be one of"),
    ],
)
def test_what_cannot_be_painted_is_refused(model, changes, words):
    with pytest.raises(UsageError, match=words):
        ldm_text_to_image(
            **{"image_shape": (64, 64), "text": TEXT, "ddim_steps": 1, "model": model, **changes}
        )


DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (DOCS / "tutorials.md").read_text(encoding="utf-8"), re.M | re.S
)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.slow
def test_the_page_of_tutorials_runs(code, tmp_path, monkeypatch):
    os.symlink(DOCS.parent / "model_data", tmp_path / "model_data")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "docs/tutorials.md", "exec"), names)
    for saved in re.findall(r"save\(\"(.+?)\"\)", code):
        assert Image.open(tmp_path / saved).size == (128, 128)
    assert len(BLOCKS) == 3


# --- load_image ---


def picture_bytes(kind="PNG"):
    held = io.BytesIO()
    Image.linear_gradient("L").resize((30, 20)).convert("RGB").save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [None, (24, 16), [24, 16]])
def test_pictures_are_read_from_files_and_bytes(tmp_path, kind, size):
    path = tmp_path / "picture.bin"
    path.write_bytes(picture_bytes(kind))
    for source in (path, str(path), picture_bytes(kind)):
        picture = load_image(source, size=size)
        assert picture.mode == "RGB" and picture.size == ((30, 20) if size is None else (24, 16))
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(load_image(path, size)))


def test_transparency_is_laid_on_white_and_a_number_is_both_sides(tmp_path):
    Image.new("RGBA", (16, 12), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = load_image(tmp_path / "clear.png", 10)
    assert picture.size == (10, 10) and np.asarray(picture).min() == 255


@pytest.mark.parametrize(
    ("source", "size", "kind", "words"),
    [
        ("https://images.pexels.com/photos/8306128.jpeg", (512, 512), UsageError, "download it first"),
        ("ftp://host/a.png", None, UsageError, "download it first"),
        ("missing.png", None, AbsentError, "does not exist"),
        (b"", None, FormatError, "0 bytes"),
        (b"<html>", None, FormatError, "the picture in these bytes is no picture"),
        (picture_bytes()[:90], None, FormatError, "the picture in these bytes is"),
        (picture_bytes(), (0, 3), UsageError, "size must be a whole number"),
        (picture_bytes(), (4.5, 3), UsageError, "size must be a whole number"),
        (picture_bytes(), (1, 2, 3), UsageError, r"size must be \(width, height\)"),
        (picture_bytes(), "big", UsageError, "size must be a whole number"),
    ],
)
def test_what_is_no_picture_is_refused(source, size, kind, words):
    with pytest.raises(kind, match=words):
        load_image(source, size)
