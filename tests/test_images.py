"""Pictures in and out: exact numbers, hostile files, and names that are never taken twice."""

import io
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.errors import AbsentError, FormatError, NumericError, OutputError, UsageError
from ldm.results import GenerationResult


def picture(width=13, height=9, seed=0, mode="RGB"):
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


# --- pixels ---


def test_every_byte_survives_the_way_through_tensors():
    """All 256 levels: 2 * (x / 255) - 1 and truncation are inverse to each other in float32 or one lower."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    back = images.to_uint8(images.to_tensor(levels))[0]
    assert images.to_tensor(levels).shape == (1, 3, 16, 16)
    difference = np.asarray(levels).astype(int) - back
    assert difference.min() >= 0 and difference.max() <= 1  # truncation never goes up


def test_uint8_truncates_as_compvis_and_clamps():
    x = torch.tensor([-2.0, -1.0, -0.001, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert images.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 127, 127, 254, 255, 255]


def test_half_precision_pixels_are_computed_in_float32():
    x = torch.linspace(-1, 1, 4099).reshape(1, 1, 1, -1).expand(1, 3, 1, -1).half()
    assert (images.to_uint8(x) == images.to_uint8(x.float())).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_becomes_a_pixel(bad):
    x = torch.zeros(1, 3, 4, 5)
    x[0, 1, 2, 3] = bad
    with pytest.raises(NumericError, match="must be finite"):
        images.to_uint8(x)


def test_axes_keep_their_places():
    image = picture(13, 9)
    x = images.to_tensor(image)
    assert x.shape == (1, 3, 9, 13)
    r, g, b = image.getpixel((5, 2))
    torch.testing.assert_close(x[0, :, 2, 5], torch.tensor([r, g, b]) / 127.5 - 1, rtol=0, atol=1e-6)
    assert images.to_pil(x)[0].size == (13, 9)


def test_transparency_is_white_in_pictures_and_keep_in_masks():
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert images.to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert images.to_mask(clear).sum() == 0


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [images.to_rgb(grey).getpixel((i, 0))[0] for i in range(3)] == [0, 100, 255]


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "CMYK", "I", "F", "RGB"])
def test_every_mode_becomes_rgb(mode):
    assert images.to_rgb(picture(11, 8).convert(mode)).mode == "RGB"


def test_masks_split_at_half_and_resize_to_the_nearest_pixel():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert images.to_mask(grey)[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert images.to_mask(grey, (8, 2))[0, 0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_a_single_marked_pixel_marks_its_cell_only_when_asked():
    mask = torch.zeros(1, 1, 16, 24)
    mask[0, 0, 5, 19] = 1
    assert images.shrink_mask(mask, 8, "any")[0, 0].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert images.shrink_mask(mask, 8, "nearest").sum() == 0


def test_fit_size_goes_down_to_the_multiple_and_refuses_nothing_left():
    assert images.fit_size(picture(30, 17), 8).size == (24, 16)
    assert images.fit_size(picture(30, 17), 8, (40, 8)).size == (40, 8)
    same = picture(32, 16)
    assert images.fit_size(same, 8) is same
    with pytest.raises(UsageError, match="at least 8 x 8 pixels, got 30 x 7"):
        images.fit_size(picture(30, 7), 8)


# --- grids ---


def test_grid_is_torchvisions_layout():
    """Border left and top of each, around the whole: 5 pictures of 2 x 3, 3 in a row, by hand."""
    cells = torch.arange(1, 6).reshape(5, 1, 1, 1).expand(5, 1, 2, 3).float()
    row = lambda *v: [x for n in v for x in (0, *[n] * 3)] + [0]  # noqa: E731
    want = [[0] * 13, row(1, 2, 3), row(1, 2, 3), [0] * 13, row(4, 5, 0), row(4, 5, 0), [0] * 13]
    assert images.make_grid(cells, nrow=3, padding=1)[0].tolist() == want
    assert images.make_grid(cells, nrow=3).shape == (1, 2 * 4 + 2, 3 * 5 + 2)
    assert images.make_grid(cells, nrow=8).shape == (1, 6, 5 * 5 + 2)  # never wider than the pictures


def test_one_picture_is_its_own_grid_and_none_is_refused():
    image = picture()
    assert (np.asarray(images.grid([image])) == np.asarray(image)).all()
    with pytest.raises(UsageError, match="at least one picture"):
        images.grid([])
    with pytest.raises(UsageError, match="nrow=0"):
        images.make_grid(torch.zeros(2, 3, 4, 5), nrow=0)


def test_pictures_of_two_sizes_share_a_grid():
    assert images.grid([picture(13, 9), picture(8, 10), picture(9, 9)]).size == (2 * 15 + 2, 2 * 12 + 2)


# --- reading ---


def png_with(width, height):
    """A PNG header that promises this size, and nothing behind it."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(kind, **options):
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 bytes"),
        (b"<!DOCTYPE html><html>404</html>", "no picture that can be read"),
        (png_with(8_000, 7_000), "too many pixels, 8000 x 7000; wanted at most 36 million"),
        (png_with(12_000, 12_000), "too many pixels (Image size (144000000"),
        (png_with(20_000, 20_000), "too many pixels (Image size (400000000"),
        (png_with(60_000, 10), "32767 a side"),
        (png_with(9_999, 1), "too small, 9999 x 1"),
        (encoded("GIF"), "no picture that can be read"),
        (encoded("TIFF"), "no picture that can be read"),
        (encoded("EPS"), "no picture that can be read"),
    ],
)
def test_bad_files_are_format_errors_in_one_line(tmp_path, data, words):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        images.open_image(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    data, path = encoded(kind), tmp_path / "cut"
    for i in range(1, 64):
        path.write_bytes(data[: len(data) * i // 64])
        with pytest.raises(FormatError):
            images.open_image(path)
    path.write_bytes(data)
    assert images.open_image(path).size == (40, 30)


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(AbsentError, match="does not exist"):
        images.open_image(tmp_path / "none.png")
    with pytest.raises(FormatError, match="not a regular file"):
        images.open_image(tmp_path)
    with pytest.raises(UsageError, match="got the URL"):
        images.open_image("https://example.org/a.png")
    with pytest.raises(FormatError, match="cannot read"):
        images.open_image("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        images.open_image(tmp_path / "pipe")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (24, 16))
    upright.paste((255, 0, 0), (0, 0, 8, 8))  # red at the top left, whichever way the camera was held
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    seen = images.open_image(tmp_path / "a.png")
    assert (
        seen.size == (24, 16) and seen.getpixel((2, 2)) == (255, 0, 0) and seen.getpixel((20, 2)) == (0, 0, 0)
    )


# --- writing ---


def test_numbers_go_on_after_the_highest_and_gaps_stay(tmp_path):
    for name in ("00000.png", "00007.png", "00099.jpg", "x00050.png"):
        (tmp_path / name).touch()
    (tmp_path / "00012.png").mkdir()
    assert images.save_numbered(picture(), tmp_path).name == "00013.png"
    assert images.save_numbered(picture(), tmp_path, "grid-{:04}.png").name == "grid-0000.png"
    (tmp_path / "99999.png").touch()
    assert images.save_numbered(picture(), tmp_path).name == "100000.png"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{}", "7"), ("{:05}.png", "00007.png"), ("{:d}.png", "7.png"), ("{:04d}.png", "0007.png"),
        ("{:}.png", "7.png"), ("grid-{:04}.png", "grid-0007.png"), ("a b é 日.{:03}", "a b é 日.007"),
        ("{:020}.png", "0" * 19 + "7.png"),
        (".{}.png", ".7.png"), ("..{}", "..7"), ("100%{:02}$(x).png", "100%07$(x).png"), ("{:01}_", "7_"),
    ],
)  # fmt: skip
def test_a_pattern_is_a_file_name_with_one_number(tmp_path, pattern, name):
    (tmp_path / name.replace("7", "6")).touch()
    assert images.save_numbered(picture(), tmp_path, pattern) == tmp_path / name


@pytest.mark.parametrize(
    "pattern",
    [
        "../x{:05}.png", "/tmp/x{:05}.png", "sub/{:05}.png", "{:05}/x.png", "..\\x{}.png", "C:x{}.png", "C:\\x{}.png",
        "\\\\host\\x{}.png", "~/x{}.png", "./x{}.png", "x{}/../y.png",
        "{:>999999999}", "{:0999999999}", "{:021}.png", "{:5}.png", "{:>5}.png", "{:,}.png", "{:.3f}.png", "{:x}.png",
        "{!r}.png", "{0}.png", "{0:05}.png", "{n}.png", "{:{}}.png", "{0.__class__}.png", "{:00}.png", "{:05s}.png",
        "", "x.png", "{}{}.png", "{{}}.png", "{{{}}}.png", "{", "}", "x{.png", "x}.png", "{:05}{", "%05d.png",
        "a\0{}.png", "a\n{}.png", "\x1b[31m{}.png", "\ud800{}.png",
        None, 5, b"{}.png", Path("{}.png"), ["{}.png"],
    ],
)  # fmt: skip
def test_any_other_pattern_is_refused_before_a_folder_is_made(tmp_path, pattern):
    result = GenerationResult([picture()], [1], [], torch.zeros(1))
    calls = (
        lambda: images.save_numbered(picture(), tmp_path / "in", pattern),
        lambda: result.save(tmp_path / "in", pattern, metadata=False),
    )
    for call in calls:
        with pytest.raises(
            UsageError, match="a pattern must be a file name, without folders, with one number"
        ) as caught:
            call()
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_link_at_the_name_is_not_followed(tmp_path):
    outside = tmp_path / "outside.png"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(outside)
    with pytest.raises(OutputError, match="exists already and is not overwritten"):
        images.save_png(picture(), tmp_path / "in" / "a.png")
    assert not outside.exists() and [p.name for p in (tmp_path / "in").iterdir()] == ["a.png"]


def test_a_taken_name_is_numbered_when_asked(tmp_path):
    names = [images.save_png(picture(seed=i), tmp_path / "a.png", rename=True).name for i in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]


def test_file_mode_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = images.save_numbered(picture(), tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_without_hard_links_names_are_still_never_taken_twice(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    first, second = (images.save_numbered(picture(seed=i), tmp_path) for i in range(2))
    assert (first.name, second.name) == ("00000.png", "00001.png")
    assert (np.asarray(Image.open(second)) == np.asarray(picture(seed=1))).all()
    with pytest.raises(OutputError, match="exists already"):
        images.save_png(picture(), first)


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
@pytest.mark.parametrize("number", [28, 5, 122, 30, 13])
def test_a_failing_call_leaves_no_file(tmp_path, monkeypatch, call, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=os.strerror(number)):
        images.save_numbered(picture(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_disk_full_leaves_no_file(tmp_path):
    """A real limit on file size, in a process of its own."""
    code = (
        "import resource, signal, sys; from PIL import Image; from ldm import images, errors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: images.save_numbered(Image.effect_noise((64, 64), 50), sys.argv[1])\n"
        "except errors.OutputError as e: print(e); raise SystemExit(e.exit_code)"
    )
    root = Path(images.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True)
    assert done.returncode == 7 and "File too large" in done.stdout, done
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "-", "\0", "x" * 300])
def test_names_that_are_no_folder_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="cannot write to folder"):
        images.prepare_folder(name)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(OutputError, match="cannot write to folder"):
            images.prepare_folder(path)


def test_stale_parts_go_and_live_ones_stay(tmp_path):
    old, new = tmp_path / ".ldm-1-aa.part", tmp_path / ".ldm-2-bb.part"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    images.prepare_folder(tmp_path)
    assert not old.exists() and new.exists()


def test_two_processes_in_one_folder_lose_nothing(tmp_path):
    def save(red):
        for i in range(40):
            images.save_numbered(Image.new("RGB", (9, 8), (red, i, 0)), tmp_path)

    child = os.fork()
    if child == 0:
        try:
            save(0)
            os._exit(0)
        finally:
            os._exit(1)
    save(1)
    assert os.waitpid(child, 0)[1] == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"{i:05}.png" for i in range(80)]
    assert len({Image.open(tmp_path / name).getpixel((0, 0)) for name in names}) == 80


# --- previews ---


def test_a_linear_decoder_is_recovered_exactly():
    factors = torch.tensor([[0.3, 0.2, 0.1], [-0.1, 0.4, 0.2], [0.0, -0.3, 0.1], [0.2, 0.1, -0.4]])
    bias = torch.tensor([0.1, -0.21, 0.05])

    def decode(z):
        x = torch.einsum("bchw,cd->bdhw", z, factors) + bias[:, None, None]
        return x.repeat_interleave(4, 2).repeat_interleave(4, 3)

    got_factors, got_bias = images.fit_latent_rgb(decode, 4, cells=6, samples=5)
    torch.testing.assert_close(got_factors, factors, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_bias, bias, rtol=0, atol=1e-5)
    z = torch.zeros(2, 4, 3, 5)
    small = images.preview(z, got_factors, got_bias, scale=2)
    assert [p.size for p in small] == [(10, 6)] * 2
    assert small[0].getpixel((0, 0)) == tuple(int(255 * (b + 1) / 2) for b in bias.tolist())
