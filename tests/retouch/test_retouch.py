"""What is done to pictures and masks around a painting: laws, and AUTOMATIC1111's rules computed another way."""

import math

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UsageError
from ldm.retouch import colour, fit, masks
from ldm.retouch.tiles import Grid


def picture(width=61, height=47):
    """A smooth picture without two equal sides, columns or rows."""
    y, x = np.mgrid[:height, :width]
    waves = [90 + 80 * np.sin(x / 9 + i) + 70 * np.cos(y / (7 + i)) for i in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, axis=-1), 0, 255).astype(np.uint8))


def mask(size=(61, 47), box=(20, 12, 39, 30)):
    found = Image.new("L", size, 0)
    found.paste(255, box)
    return found


def same(a, b):
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


# --- masks ---


def test_a_blurred_edge_is_the_integral_of_the_cut_off_gaussian():
    edge = mask(box=(30, 0, 61, 47))
    for sigma in (1, 2.5, 6):
        reach = int(2.5 * sigma + 0.5)
        bells = [math.exp(-(d**2) / 2 / sigma**2) for d in range(-reach, reach + 1)]
        got = np.asarray(masks.blur(edge, sigma, 0)).astype(float)
        assert (got == got[:1]).all()  # sideways alone
        for x in range(20, 41):
            share = sum(bell for d, bell in zip(range(-reach, reach + 1), bells, strict=True) if x + d >= 30)
            assert abs(got[0, x] - 255 * share / sum(bells)) <= 0.5, (sigma, x)


def test_blur_keeps_what_is_all_of_one_grey_turns_with_the_mask_and_is_nothing_at_0():
    plain = mask()
    assert same(masks.blur(plain, 0, 0), plain)
    for grey in (0, 255):
        assert same(masks.blur(Image.new("L", (61, 47), grey), 30, 4), Image.new("L", (61, 47), grey))
    turned = masks.blur(plain.transpose(Image.Transpose.TRANSPOSE), 2, 5)
    back = masks.blur(masks.blur(plain, 0, 2), 5, 0)  # down first, as the turned mask had it across first
    assert same(turned.transpose(Image.Transpose.TRANSPOSE), back)


@pytest.mark.parametrize(
    ("box", "padding", "wanted"),
    [
        ((20, 12, 39, 30), 0, (20, 12, 39, 30)),
        ((20, 12, 39, 30), 7, (13, 5, 46, 37)),
        ((20, 12, 39, 30), 40, (0, 0, 61, 47)),
        ((60, 46, 61, 47), 3, (57, 43, 61, 47)),
    ],
)
def test_the_region_is_the_box_of_what_is_marked_with_padding_inside_the_picture(box, padding, wanted):
    assert masks.region_of(mask(box=box), padding) == wanted


def test_a_mask_that_marks_nothing_has_no_region():
    with pytest.raises(UsageError, match="marks nothing"):
        masks.region_of(Image.new("L", (9, 8)), 3)


# Computed by A1111's expand_crop_region (modules/masking.py of 1.10.1).
WIDENED = [
    ((50, 60, 70, 65), (64, 64), (200, 100), (50, 53, 70, 73)),
    ((50, 60, 55, 90), (64, 64), (200, 100), (38, 60, 68, 90)),
    ((0, 0, 40, 10), (64, 64), (200, 100), (0, 0, 40, 40)),
    ((160, 80, 200, 100), (64, 64), (200, 100), (160, 60, 200, 100)),
    ((10, 20, 190, 40), (64, 64), (200, 100), (10, 0, 190, 100)),
    ((5, 5, 6, 95), (128, 64), (200, 100), (0, 5, 180, 95)),
    ((195, 5, 200, 95), (64, 128), (200, 100), (155, 5, 200, 95)),
    ((0, 0, 200, 100), (64, 64), (200, 100), (0, 0, 200, 100)),
]


def test_a_region_is_widened_to_the_aspect_as_a1111_does():
    for box, aspect, size, wanted in WIDENED:
        assert masks.widened(box, aspect, size) == wanted, (box, aspect)


def test_fill_keeps_what_is_not_marked_and_takes_its_colours_from_there():
    source, marked = picture(), mask()
    got = np.asarray(masks.fill(source, marked)).astype(int)
    keeps = np.asarray(marked) == 0
    assert (got[keeps] == np.asarray(source)[keeps]).all()
    inside = got[~keeps].reshape(-1, 3)
    assert (inside.std(axis=0) > 1).all()  # not one grey
    # What lies under the mask does not count.
    other = source.copy()
    other.paste((255, 0, 255), (20, 12, 39, 30))
    assert (np.asarray(masks.fill(other, marked)) == got).all()
    whole = Image.new("RGB", (61, 47), (200, 100, 50))
    spread = np.abs(np.asarray(masks.fill(whole, marked)).astype(int) - (200, 100, 50))
    assert spread.max() <= 6  # of one colour there is only that


@pytest.mark.parametrize(
    ("sides", "size", "at"),
    [
        ((8, 0, 0, 0), (72, 48), (8, 0)),
        ((0, 16, 0, 8), (64, 72), (0, 16)),
        ((3, 0, 9, 5), (80, 56), (4, 0)),  # 4 and 12 on the width, 8 below
        ((1, 1, 1, 1), (72, 56), (4, 4)),
        ((0, 0, 0, 0), (64, 48), (0, 0)),
    ],
)
def test_a_canvas_grows_to_a_multiple_of_8_and_is_masked_where_it_is_new(sides, size, at):
    source = picture(64, 48)
    canvas, box = masks.extended(source, sides, 8)
    assert canvas.size == size and box == (*at, at[0] + 64, at[1] + 48) and same(canvas.crop(box), source)
    new = np.asarray(masks.around(box, size))
    assert new.sum() == 255 * (size[0] * size[1] - 64 * 48)
    assert (np.asarray(canvas).max(axis=-1)[new > 0] > 0).all()  # filled with colours


def test_the_mask_of_a_canvas_reaches_inwards_where_it_grows():
    kept = np.asarray(masks.around((8, 0, 72, 48), (72, 64), 6)) == 0
    assert kept[:42, 14:].all() and kept.sum() == 42 * 58
    assert not (np.asarray(masks.around((8, 8, 16, 16), (24, 24), 5)) == 0).any()  # nothing is left


# --- fitting ---


def test_fitting_keeps_aspects_where_it_says_so():
    source = picture(60, 40)
    for mode in (fit.JUST, fit.CROP, fit.FILL):
        assert same(fit.fit(source, (60, 40), mode), source)  # nothing to do
    just = source.resize((36, 36), Image.Resampling.LANCZOS)
    assert same(fit.fit(source, (36, 36)), just) and same(fit.fit(source, (36, 36), fit.LATENT), just)
    cut = source.resize((54, 36), Image.Resampling.LANCZOS).crop((9, 0, 45, 36))
    assert same(fit.fit(source, (36, 36), fit.CROP), cut)
    inner = source.resize((36, 24), Image.Resampling.LANCZOS)
    filled = fit.fit(source, (36, 36), fit.FILL)
    assert same(filled.crop((0, 6, 36, 30)), inner)
    rows = np.asarray(filled)
    assert (rows[:6] == rows[:1]).all() and (rows[30:] == rows[-1:]).all()  # edges, continued
    assert not (rows[:1] == rows[-1:]).all()
    # An odd rest leaves no line black.
    assert np.asarray(fit.fit(Image.new("L", (60, 41), 50), (36, 37), fit.FILL)).min() == 50
    turned = source.transpose(Image.Transpose.TRANSPOSE)
    for mode in (fit.CROP, fit.FILL):
        back = fit.fit(turned, (36, 48), mode).transpose(Image.Transpose.TRANSPOSE)
        assert (
            np.abs(np.asarray(back).astype(int) - np.asarray(fit.fit(source, (48, 36), mode))).max() <= 2
        )  # rounded twice


def test_a_grey_mask_is_fitted_as_a_picture_is():
    grey = mask((60, 40), (0, 0, 30, 40))
    assert fit.fit(grey, (36, 36), fit.FILL).mode == "L"
    assert same(
        fit.fit(grey, (36, 36), fit.CROP), fit.fit(grey.convert("RGB"), (36, 36), fit.CROP).convert("L")
    )


# --- tiles ---


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "columns", "rows"),
    [
        ((61, 47), (61, 47), 8, (0,), (0,)),
        ((61, 47), (80, 90), 8, (0,), (0,)),  # a tile larger than the picture is the picture
        ((128, 96), (64, 64), 16, (0, 32, 64), (0, 32)),
        ((131, 93), (64, 48), 16, (0, 33, 67), (0, 22, 45)),
        ((100, 50), (50, 50), 0, (0, 50), (0,)),
    ],
)
def test_tiles_cover_a_picture_evenly_as_a1111_cuts_it(size, tile, overlap, columns, rows):
    grid = Grid.over(size, tile, overlap)
    assert (grid.columns, grid.rows) == (columns, rows)
    source = picture(*size)
    assert same(grid.join([source.crop(box) for box in grid.boxes]), source)


def test_neighbouring_tiles_fade_into_one_another():
    grid = Grid.over((112, 64), (64, 64), 16)
    grey = [Image.new("RGB", (64, 64), (value,) * 3) for value in (40, 200)]
    row = np.asarray(grid.join(grey))[5, :, 0].astype(float)
    assert grid.columns == (0, 48) and (row[:48] == 40).all() and (row[64:] == 200).all()
    assert np.abs(row[48:64] - (40 + 160 * np.arange(16) / 16)).max() <= 1.5
    down = Grid.over((64, 112), (64, 64), 16).join(grey)
    assert (np.asarray(down)[:, 5, 0] == row).all()


# --- colours ---


def test_colours_of_a_picture_itself_are_left_byte_for_byte():
    noise = np.random.default_rng(3).integers(0, 256, (47, 61, 3), dtype=np.uint8)
    for pixels in (np.asarray(picture()), noise):
        assert (colour.match_colours(pixels, pixels) == pixels).all()


def test_a_picture_gets_the_colours_and_keeps_its_lightness():
    source = np.asarray(picture())
    pale = (source * (0.5, 0.8, 0.6) + (60, 10, 40)).astype(np.uint8)
    got = colour.match_colours(pale, source)
    light = np.array([0.3, 0.59, 0.11])
    inside = (got > 0).all(axis=-1) & (got < 255).all(axis=-1)
    assert np.abs(got @ light - pale @ light)[inside].max() < 1

    def chroma(pixels):
        return colour._to_lab(pixels)[..., 1:].reshape(-1, 2)

    def apart(a, b):
        return np.abs(np.sort(chroma(a), axis=0) - np.sort(chroma(b), axis=0)).mean()

    assert apart(got, source) < apart(pale, source) / 2
    assert colour.match_colours(pale, source[:20, :31]).shape == pale.shape  # of another size


def test_lab_is_cies():
    rows = {  # sRGB -> L*a*b* for D65, of CIE 15
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (119, 119, 119): (50.03, 0, 0),
    }
    pixels = np.array(list(rows), dtype=np.uint8)[:, None]
    assert np.abs(colour._to_lab(pixels)[:, 0] - np.array(list(rows.values()))).max() < 0.05
    assert np.abs(colour._to_rgb(colour._to_lab(pixels)) * 255 - pixels).max() < 1e-9
