"""The picture that a request begins with, framed: what is painted of it, and how that is laid back."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images as pictures
from ldm.errors import UsageError
from ldm.retouch import fit, masks
from ldm.retouch.colour import match_colours
from ldm.sources import FILLED, ORIGINAL, frame_picture

F = 8


def picture(width=72, height=64):
    y, x = np.mgrid[:height, :width]
    waves = [100 + 80 * np.sin(x / 9 + i) + 60 * np.cos(y / (7 + i)) for i in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, axis=-1), 0, 255).astype(np.uint8))


def mask(size=(72, 64), box=(20, 12, 39, 30)):
    found = Image.new("L", size, 0)
    found.paste(255, box)
    return found


def other(size, b=2):
    """b painted pictures of (width, height), in bytes, so that they come back as they are."""
    bytes_ = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (b, 3, size[1], size[0])))
    return bytes_.float() / 255


def laid(frame, unit):
    """What frame.lay gives: bytes, which are those of its other answer where nothing is mixed."""
    got, pixels = frame.lay(unit, pictures.unit_to_uint8(unit))
    assert np.abs(pictures.unit_to_uint8(got).astype(int) - pixels).max() <= 1 and got.dtype == torch.float32
    return pixels


def framed(image, marks, size=(None, None), **options):
    return frame_picture(image, marks, size, F, **options)


def test_without_options_it_is_the_picture_and_its_mask():
    source = framed(picture(), mask())
    assert torch.equal(source.pixels, pictures.to_tensor(picture()))
    assert torch.equal(source.mask, pictures.to_mask(mask()))
    painted = other((72, 64))
    wanted = pictures.paste(painted, source.frame.original, source.mask)
    assert (laid(source.frame, painted) == pictures.unit_to_uint8(wanted)).all()
    assert (laid(framed(picture(), None).frame, painted) == pictures.unit_to_uint8(painted)).all()
    small = framed(picture(75, 70), mask((30, 35), (3, 4, 20, 21)))
    assert small.frame.size == (72, 64) and torch.equal(
        small.mask, pictures.to_mask(mask((30, 35), (3, 4, 20, 21)), (72, 64))
    )


def test_blur_softens_what_is_mixed_and_leaves_what_is_painted():
    source = framed(picture(), mask(), mask_blur=(3, 2))
    assert torch.equal(source.mask, framed(picture(), mask()).mask)
    soft = np.asarray(masks.blur(mask(), 3, 2)).astype(float)
    weights = source.frame.weights[0, 0].numpy()
    assert np.abs(weights - np.minimum(2 * soft / 255, 1)).max() < 0.005
    painted = other((72, 64))
    got = laid(source.frame, painted)
    kept = weights == 0
    assert kept.any() and (got[:, kept] == np.asarray(picture())[kept]).all()  # to the byte
    assert (got[:, weights == 1] == pictures.unit_to_uint8(painted)[:, weights == 1]).all()
    between = (weights > 0) & (weights < 1)
    wanted = weights[..., None] * painted.permute(0, 2, 3, 1).numpy() + (1 - weights[..., None]) * (
        np.asarray(picture()) / 255
    )
    assert between.any() and np.abs(got - 255 * wanted)[:, between].max() <= 1


def test_an_inverted_mask_is_the_mask_of_the_rest():
    rest = Image.eval(mask(), lambda grey: 255 - grey)
    a, b = framed(picture(), mask(), mask_invert=True), framed(picture(), rest)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.frame.weights, b.frame.weights)
    with pytest.raises(UsageError, match="marks nothing"):
        framed(picture(), Image.new("L", (72, 64), 255), mask_invert=True)


def test_only_masked_paints_the_region_at_the_whole_size_and_lays_it_back():
    image = picture(150, 131)
    marks = mask((150, 131), (40, 50, 60, 58))
    source = framed(image, marks, (64, 64), inpaint_full_res=True, inpaint_full_res_padding=6)
    box = (34, 38, 66, 70)  # of 32 x 20 with padding, widened to a square
    assert source.frame.box == box and source.frame.size == (64, 64)
    assert torch.equal(
        source.pixels, pictures.to_tensor(image.crop(box).resize((64, 64), Image.Resampling.LANCZOS))
    )
    inner = marks.crop(box).resize((64, 64), Image.Resampling.NEAREST)
    assert torch.equal(source.mask, pictures.to_mask(inner))
    painted = other((64, 64))
    got = laid(source.frame, painted)
    assert got.shape == (2, 131, 150, 3)
    changed = (got != np.asarray(image)).any(axis=(0, 3))
    assert changed[50:58, 40:60].all() and changed.sum() == 8 * 20
    small = pictures.unit_to_pil(painted)[1].resize((32, 32), Image.Resampling.LANCZOS)
    assert (got[1, 50:58, 40:60] == np.asarray(small)[12:20, 6:26]).all()
    # What is laid is what is cut again, up to two resizings.
    again = source.frame.cut(got)
    assert again.shape == (2, 3, 64, 64)


def test_only_masked_of_everything_is_the_plain_way():
    whole = Image.new("L", (72, 64), 255)
    plain, only = framed(picture(), whole), framed(picture(), whole, inpaint_full_res=True)
    painted = other((72, 64))
    assert torch.equal(plain.pixels, only.pixels) and torch.equal(plain.mask, only.mask)
    assert (laid(plain.frame, painted) == laid(only.frame, painted)).all()
    pixels = pictures.unit_to_uint8(painted)
    assert torch.equal(only.frame.cut(pixels), 2 * painted - 1)


@pytest.mark.parametrize("mode", [fit.JUST, fit.CROP, fit.FILL])
def test_picture_and_mask_are_fitted_alike(mode):
    image, marks = picture(90, 60), mask((90, 60), (30, 20, 60, 40))
    source = framed(image, marks, (64, 72), resize_mode=mode)
    assert torch.equal(source.pixels, pictures.to_tensor(fit.fit(image, (64, 72), mode)))
    assert torch.equal(source.mask, pictures.to_mask(fit.fit(marks, (64, 72), mode, "NEAREST")))
    assert source.frame.original.shape == (1, 3, 72, 64)


def test_for_latents_the_picture_keeps_its_own_size():
    image = picture(93, 60)
    source = framed(image, None, (64, 72), resize_mode=fit.LATENT)
    assert torch.equal(source.pixels, pictures.to_tensor(pictures.fit_size(image, F)))
    assert source.pixels.shape == (1, 3, 56, 88) and source.frame.original.shape == (1, 3, 72, 64)


def test_fill_replaces_what_the_encoder_sees_under_the_mask_alone():
    plain, filled = (
        framed(picture(), mask(), inpaint_fill=ORIGINAL),
        framed(picture(), mask(), inpaint_fill=FILLED),
    )
    assert torch.equal(filled.pixels, pictures.to_tensor(masks.fill(picture(), mask())))
    same = (plain.pixels == filled.pixels).all(dim=1, keepdim=True)
    assert torch.equal(same | (plain.mask > 0), torch.ones_like(same)) and not same.all()
    assert torch.equal(plain.frame.original, filled.frame.original)


def test_colours_are_those_of_what_is_painted_before_it_is_laid():
    source = framed(picture(), mask(), color_match=True)
    painted = other((72, 64), 1)
    (bytes_,) = pictures.unit_to_uint8(painted)
    wanted = match_colours(bytes_, np.asarray(picture()))
    got = laid(source.frame, painted)[0]
    inside = np.asarray(mask()) > 0
    assert (got[inside] == wanted[inside]).all() and (got[~inside] == np.asarray(picture())[~inside]).all()
    itself = pictures.given_unit(source.pixels)
    again = laid(framed(picture(), None, color_match=True).frame, itself)
    assert (again == np.asarray(picture())).all()


def test_a_canvas_is_masked_where_it_is_new_and_keeps_the_picture():
    image = picture()
    source = framed(image, None, outpaint=(16, 0, 0, 8))
    assert source.frame.size == (88, 72)
    assert source.mask.sum() == 88 * 72 - 72 * 64 and not source.mask[:, :, :64, 16:].any()
    got = laid(source.frame, other((88, 72)))
    assert (got[:, :64, 16:] == np.asarray(image)).all()
    # With blur it is mixed further inwards, by A1111's numbers: twice the blur, beginning twice as far inside.
    soft = framed(image, None, outpaint=(16, 0, 0, 8), mask_blur=(3, 3))
    border = masks.blur(masks.around((16, 0, 88, 64), (88, 72), 6), 6, 6)
    weights = np.minimum(2 * np.asarray(border).astype(float), 255) / 255
    assert np.abs(soft.frame.weights[0, 0].numpy() - weights).max() < 1e-6
    assert soft.mask.sum() == 88 * 72 - 71 * 63
    # A mask of the picture's own is painted, too.
    both = framed(image, mask(), outpaint=(16, 0, 0, 8))
    assert both.mask[:, :, :64, 16:].sum() == 19 * 18
