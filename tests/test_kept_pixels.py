"""What is not painted comes back byte for byte: outside a mask, at strength 0, however a picture was given."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from ldm import images
from ldm.errors import FormatError, UsageError
from ldm.images import to_tensor
from ldm.pipeline import StableDiffusion

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def painters():
    return {4: StableDiffusion(tiny_model()), 9: StableDiffusion(tiny_model(in_channels=9))}


def all_levels(mode="RGB", width=72, height=64):
    """A picture with all 256 values on both sides of its middle, in each channel and in another order."""
    levels = np.arange(256, dtype=np.uint8)
    side = np.stack([np.roll(levels, shift) for shift in (0, 91, 170)], axis=-1).reshape(32, 8, 3)
    tiled = np.tile(side, (height // 32, width // 8, 1))
    return Image.fromarray(tiled).convert(mode)


def edge_mask(width=72, height=64):
    """White in a shape whose edge crosses cells of the latents at every offset, and single pixels."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for y in range(height):
        mask[y, 30 + y % 9 : 58] = 255
    mask[3, 5] = mask[60, 70] = 128
    return Image.fromarray(mask)


def bytes_of(result, kind):
    """The bytes of the first picture: as it is, by PIL's saving or ours, or by CompVis's own line."""
    if kind == "pil":
        return np.asarray(result.images[0])
    unit = result.images[0] if kind == "np" else result.images[0].permute(1, 2, 0).numpy()
    by_hand = (255.0 * unit).astype(np.uint8)
    at = (0, 0) if len(result) == 1 else (2, 2)  # a grid of several has borders
    first = result.grid().crop((*at, at[0] + unit.shape[1], at[1] + unit.shape[0]))
    assert np.array_equal(by_hand, np.asarray(first))
    return by_hand


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_bytes_come_back_from_a_tensor_of_any_precision(dtype):
    x = to_tensor(all_levels()).to(dtype)
    unit = images.given_unit(x)
    want = np.asarray(all_levels())
    assert unit.dtype == torch.float32
    assert np.array_equal(images.unit_to_uint8(unit)[0], want)
    assert np.array_equal(unit[0].permute(1, 2, 0).numpy(), want.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x / 127.5 - 1,
        lambda x: (x / 255 - 0.5) / 0.5,
        lambda x: x / 255 * 2 - 1,
        lambda x: (x - 127.5) / 127.5,
    ],
    ids=["x/127.5-1", "torchvision", "CompVis", "centred"],
)
def test_all_bytes_come_back_from_every_usual_way_into_tensors(make):
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(
        images.unit_to_uint8(images.given_unit(make(levels)))[0, :, :, 0].ravel(), np.arange(256)
    )


def test_what_lies_between_bytes_stays_there_and_what_lies_outside_is_clamped():
    x = torch.tensor([-1.5, -0.70001, 0.1234567, 0.99, 1.5]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    want = torch.tensor([0.0, 0.149995, 0.56172835, 0.995, 1.0])
    torch.testing.assert_close(images.given_unit(x)[0, 0, 0], want, rtol=0, atol=6e-8)


def test_what_is_painted_is_truncated_as_ever():
    """CompVis's arithmetic, by which 63 of 256 bytes lose a level on the way through its tensors."""
    lost = np.asarray(all_levels()).astype(int) - images.to_uint8(to_tensor(all_levels()))[0]
    assert set(np.unique(lost)) == {0, 1} and len(np.unique(np.asarray(all_levels())[lost == 1])) == 63


# --- inpaint ---


@pytest.mark.parametrize("rng", ["image", "compvis"])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.thinned(5)
def test_inpaint_keeps_each_pixel_outside_the_mask(painters, channels, kind, rng):
    image, mask = all_levels(), edge_mask()
    out = painters[channels].inpaint(PROMPT, image, mask, seed=0, steps=2, output_type=kind, rng=rng)
    black = np.asarray(mask) < 128
    assert np.array_equal(bytes_of(out, kind)[black], np.asarray(image)[black])
    assert (bytes_of(out, kind)[~black] != np.asarray(image)[~black]).mean() > 0.5
    if kind != "pil":
        unit = out.images[0] if kind == "np" else out.images[0].permute(1, 2, 0).numpy()
        assert np.array_equal(unit[black], np.asarray(image)[black].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.thinned(3)
def test_five_inpaints_in_a_row_change_nothing_outside(painters, kind):
    image, mask = all_levels(), edge_mask()
    given = image
    for seed in range(5):
        out = painters[4].inpaint(PROMPT, given, mask, seed=seed, steps=1, output_type=kind)
        given = out.images[0] if kind == "pil" else torch.from_numpy(np.array(out.images[0]))
        if kind == "np":
            given = given.permute(2, 0, 1)
        given = given if kind == "pil" else 2 * given[None] - 1
    black = np.asarray(mask) < 128
    assert np.array_equal(bytes_of(out, kind)[black], np.asarray(image)[black])


def test_a_batch_and_what_is_saved_keep_them_too(painters, tmp_path):
    image, mask = all_levels(), edge_mask()
    black = np.asarray(mask) < 128
    for kind in ("pil", "np", "pt"):
        out = painters[4].inpaint(PROMPT, image, mask, num_images=3, batch_size=2, steps=1, output_type=kind)
        for path in out.save(tmp_path / kind):
            assert np.array_equal(np.asarray(Image.open(path))[black], np.asarray(image)[black])


GREY16 = Image.fromarray(np.asarray(all_levels("L")).astype(np.uint16) * 257)
CLEAR = all_levels("RGBA")
CLEAR.putalpha(Image.fromarray(np.arange(64 * 72, dtype=np.uint16).astype(np.uint8).reshape(64, 72)))
KEYED = all_levels("P")
KEYED.info["transparency"] = 7


@pytest.mark.parametrize(
    "image",
    [
        all_levels("L"),
        GREY16,
        CLEAR,
        all_levels("LA"),
        KEYED,
        all_levels("CMYK"),
        all_levels("1"),
        all_levels("YCbCr"),
    ],
    ids=["grey", "16 bits", "alpha", "grey alpha", "keyed palette", "CMYK", "1 bit", "YCbCr"],
)
def test_pictures_of_every_mode_come_back_as_to_rgb_makes_them(painters, image):
    black, want = np.asarray(edge_mask()) < 128, np.asarray(images.to_rgb(image))
    out = painters[4].inpaint(PROMPT, image, edge_mask(), seed=0, steps=1)
    assert np.array_equal(np.asarray(out[0])[black], want[black])
    assert np.array_equal(np.asarray(painters[4].img2img(PROMPT, image, 0, steps=2)[0]), want)


def test_pictures_that_are_resized_come_back_as_lanczos_makes_them(painters):
    image = all_levels(width=80, height=96).crop((0, 0, 79, 91))
    fitted = image.resize((72, 88), Image.Resampling.LANCZOS)
    mask = edge_mask(72, 88)
    out = painters[4].inpaint(PROMPT, image, mask, seed=0, steps=1)
    black = np.asarray(mask) < 128
    assert np.array_equal(np.asarray(out[0])[black], np.asarray(fitted)[black])
    smaller = image.resize((64, 72), Image.Resampling.LANCZOS)
    same = painters[4].img2img(PROMPT, image, 0, steps=2, width=64, height=72)
    assert np.array_equal(np.asarray(same[0]), np.asarray(smaller))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_type", [torch.float32, torch.bool, torch.uint8, torch.float16])
@pytest.mark.thinned(5)
def test_pictures_and_masks_that_are_tensors(painters, dtype, mask_type):
    black = np.asarray(edge_mask()) < 128
    mask = torch.from_numpy(~black)[None, None].to(mask_type)
    out = painters[4].inpaint(PROMPT, to_tensor(all_levels()).to(dtype), mask, seed=0, steps=1)
    assert np.array_equal(np.asarray(out[0])[black], np.asarray(all_levels())[black])


def test_a_tensor_between_bytes_comes_back_as_it_is(painters):
    x = torch.rand(1, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    black = torch.from_numpy(np.asarray(edge_mask()) < 128)
    out = painters[4].inpaint(PROMPT, x, edge_mask(), seed=0, steps=1, output_type="pt")
    torch.testing.assert_close(out.images[0][:, black], ((x + 1) / 2)[0][:, black], rtol=0, atol=1.3e-7)


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 3, 64, 72), 200, dtype=torch.uint8),
        torch.full((1, 3, 64, 72), 7, dtype=torch.int64),
        torch.full((1, 3, 64, 72), 255.0),
        torch.ones((1, 3, 64, 72), dtype=torch.bool),
    ],
)
def test_tensors_of_bytes_are_refused_not_clamped(painters, image):
    with pytest.raises(UsageError, match=r"must be floating point from -1 \(black\) to 1 \(white\), got"):
        painters[4].img2img(PROMPT, image, steps=1)


# --- strength 0 ---


@pytest.mark.parametrize("options", [{}, {"rng": "compvis"}, {"mask": edge_mask()}, {"sampler": "plms"}])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0, 0.2])
@pytest.mark.thinned(5)
def test_strength_zero_is_the_picture(painters, channels, kind, options, strength):
    """Less than one of four steps is none, too."""
    options = {"image": all_levels(), "strength": strength, "steps": 4, "output_type": kind, **options}
    out = list(painters[channels].stream([PROMPT] * 2, batch_size=2, **options))[-1].result
    assert np.array_equal(bytes_of(out, kind), np.asarray(all_levels()))
    assert out.latents.shape == (2, 4, 8, 9)
    if kind != "pil":
        out.images[0][:] = 0  # each picture is its own
        assert out.images[1].max() == 1


# --- pictures that PIL opened ---


def test_a_picture_that_breaks_off_is_named_not_a_foreign_error(painters, tmp_path):
    all_levels(width=640, height=640).save(tmp_path / "a.png", compress_level=0)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-300])
    with pytest.raises(FormatError, match="the picture given is damaged or incomplete"):
        painters[4].img2img(PROMPT, Image.open(tmp_path / "a.png"), steps=1)


def test_a_mode_that_has_no_way_to_rgb_is_named(painters):
    odd = Image.new("La", (72, 64))
    for image, mask in ((odd, edge_mask()), (all_levels(), odd)):
        with pytest.raises(UsageError, match="can convert to RGB, got mode La"):
            painters[4].inpaint(PROMPT, image, mask, steps=1)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", (64, 72)),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06", (72, 64)),  # cut
        (b"Exif\0\0II*\0\xff\xff\xff\xff", (72, 64)),
        (b"Exif\0\0nonsense", (72, 64)),
        (b"", (72, 64)),
    ],
    ids=["turned", "cut", "past the end", "no EXIF", "empty"],
)
def test_exif_of_a_picture_that_pil_opened_turns_it_or_says_nothing(painters, exif, size):
    image = all_levels()
    image.info["exif"] = exif
    assert painters[4].img2img(PROMPT, image, 0, steps=1)[0].size == size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_that_pil_opened_is_turned_once(painters, tmp_path, kind):
    """Also one of a format that only PIL reads, and one whose EXIF was changed after it was opened."""
    exif = Image.Exif()
    exif[0x0112] = 6
    all_levels().save(tmp_path / "a", kind, exif=exif)
    image = Image.open(tmp_path / "a")
    assert painters[4].img2img(PROMPT, image, 0, steps=1)[0].size == (64, 72)
    changed = all_levels()
    changed.getexif()[0x0112] = 6
    assert images.upright(changed).size == (64, 72) == images.upright(images.upright(changed)).size
