"""A picture is sound if its pixels are: whatever lies beside them is passed over, at a bounded price."""

import io
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_texts import HOSTILE
from PIL import Image

from ldm import containers, images
from ldm.errors import FormatError
from ldm.metadata import read_metadata

WIDTH, HEIGHT = 40, 24


def scene(mode="RGB"):
    """Smooth, so that a JPEG of it is near it; no two corners alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([6 * x, 9 * y, 5 * x + 2 * y], -1).astype(np.uint8)).convert(mode)


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    scene(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body, crc=None):
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(*extra, before=b"IDAT", mode="RGB", **options):
    """A PNG with chunks put in before the first of this kind."""
    data = encoded("PNG", mode, **options)
    at = data.index(before) - 4
    return data[:at] + b"".join(extra) + data[at:]


def segment(marker, body):
    return struct.pack(">HH", marker, len(body) + 2) + body


def jpeg(*extra, mode="RGB", **options):
    """A JPEG with segments put in after its start."""
    data = encoded("JPEG", mode, quality=95, **options)
    return data[:2] + b"".join(extra) + data[2:]


def webp(*extra, **options):
    """A WebP in the extended layout, with RIFF blocks (kind, body) put in."""
    data = encoded("WEBP", lossless=True, **options)
    size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    blocks = [(b"VP8X", b"\x0c\0\0\0" + size), *extra]
    body = b"".join(k + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for k, b in blocks) + data[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff(*entries, order=">", next_table=0, tail=b""):
    """An EXIF block of one table: entries (tag, type, count, four bytes)."""
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}I", 8)
    table = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        table += struct.pack(f"{order}HHI", tag, kind, count) + value
    return b"Exif\0\0" + head + table + struct.pack(f"{order}I", next_table) + tail


TURN = (0x0112, 3, 1, b"\0\x01\0\0")
ODD_EXIF = {
    "cut": tiff(TURN)[:20],
    "cut in the head": b"Exif\0\0MM",
    "no TIFF": b"Exif\0\0nonsense and more",
    "a table past the end": b"Exif\0\0MM\0*\xff\xff\xff\xf0",
    "a tag past the end": tiff(TURN, (0x010F, 2, 400, b"\0\0\xff\0")),
    "a count of four billion": tiff(TURN, (0x010F, 2, 2**32 - 1, b"\0\0\0\0")),
    "a type that is none": tiff(TURN, (0x010F, 99, 3, b"\0\0\0\0")),
    "an orientation of 0": tiff((0x0112, 3, 1, b"\0\0\0\0")),
    "an orientation of 77": tiff((0x0112, 3, 1, b"\0\x4d\0\0")),
    "an orientation that is text": tiff((0x0112, 2, 4, b"abc\0")),
    "two orientations in one": tiff((0x0112, 3, 2, b"\0\x06\0\x06")),
    "a resolution of 1/0": tiff(TURN, (0x011A, 5, 1, struct.pack(">I", 38)), tail=struct.pack(">II", 1, 0)),
    "a directory that holds itself": tiff(TURN, (0x8769, 4, 1, struct.pack(">I", 8)), next_table=8),
    "65,535 entries": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + struct.pack(">HHI", 0x010F, 2, 9) * 40,
    "empty": b"Exif\0\0",
}

PNGS = {f"EXIF: {name}": png(chunk(b"eXIf", exif[6:])) for name, exif in ODD_EXIF.items()} | {
    "2 MB of workflow": png(chunk(b"tEXt", b"workflow\0" + b"{}" * 2**20)),
    "2 MB, compressed": png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 2**20))),
    "2 MB, international": png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"{}" * 2**20))),
    "an ICC profile of 3 MB": png(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 * 2**20)))),
    "an ICC profile that is none": png(chunk(b"iCCP", b"x\0\0" + b"junk")),
    "an ICC profile of unknown method": png(chunk(b"iCCP", b"x\0\7" + zlib.compress(b"x"))),
    "an empty ICC profile": png(chunk(b"iCCP", b"")),
    "a text without a key": png(chunk(b"tEXt", b"\0x"), chunk(b"zTXt", b""), chunk(b"iTXt", b"k\0")),
    "a text that is no UTF-8": png(chunk(b"iTXt", b"parameters\0\0\0\0\0\xff\xfe")),
    "a compressed text that breaks off": png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(99))[:-5])),
    "a text with a wrong checksum": png(chunk(b"tEXt", b"k\0v", crc=7)),
    "a private chunk with a wrong checksum": png(chunk(b"prVt", b"x", crc=7)),
    "short colour chunks": png(*(chunk(k, b"\0") for k in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"cICP"))),
    "a short time and background": png(chunk(b"tIME", b"\0"), chunk(b"bKGD", b"\0")),
    "an animation that breaks off": png(chunk(b"acTL", b"\0\0")),
    "an animation of no frames": png(chunk(b"acTL", bytes(8)), chunk(b"fcTL", bytes(26))),
    "frames out of order": png(chunk(b"acTL", struct.pack(">II", 9, 0)), chunk(b"fdAT", struct.pack(">I", 7))),
    "junk behind the end": png() + b"PK\3\4 and more" * 99,
    "an end that is missing": png()[:-12],
    "half an end": png()[:-7],
    "texts behind the pixels": png(chunk(b"tEXt", b"k\0v", crc=3), chunk(b"tEXt", b"y\0z"), before=b"IEND"),
    "200 chunks": png(*[chunk(b"tEXt", b"k\0v")] * 200),
}  # fmt: skip

MPF = {
    "no directory": b"MPF\0",
    "a directory past the end": b"MPF\0MM\0*\xff\xff\xff\xff",
    "no number of pictures": b"MPF\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0xB000, 7, 4, 0) + bytes(4),
    "a number that is text": b"MPF\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4s", 0xB001, 2, 2, b"x\0") + bytes(4),
    "nine pictures, none there": b"MPF\0MM\0*\0\0\0\x08\0\x02"
    + struct.pack(">HHII", 0xB001, 4, 1, 9) + struct.pack(">HHII", 0xB002, 7, 16, 8) + bytes(4),
    "zero pictures": b"MPF\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0xB001, 4, 1, 0) + bytes(4),
}  # fmt: skip
ICC = b"ICC_PROFILE\0"
JPEGS = (
    {f"EXIF: {name}": jpeg(segment(0xFFE1, exif)) for name, exif in ODD_EXIF.items()}
    | {f"MPO: {name}": jpeg(segment(0xFFE2, body)) for name, body in MPF.items()}
    | {
        "EXIF in two halves": jpeg(segment(0xFFE1, tiff(TURN)[:20]), segment(0xFFE1, b"Exif\0\0" + tiff(TURN)[20:])),
        "an odd Photoshop block": jpeg(segment(0xFFED, b"Photoshop 3.0\x008BIM\4")),
        "another odd Photoshop block": jpeg(segment(0xFFED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\2x")),
        "a short JFIF": jpeg(segment(0xFFE0, b"JFIF\0")),
        "a short Adobe": jpeg(segment(0xFFEE, b"Adobe")),
        "an odd ICC profile": jpeg(segment(0xFFE2, ICC)),
        "an ICC profile with a piece too few": jpeg(segment(0xFFE2, ICC + b"\1\2" + bytes(99))),
        "an ICC profile of 2 MB": jpeg(*(segment(0xFFE2, ICC + bytes((i, 32)) + bytes(65_000)) for i in range(1, 33))),
        "a comment": jpeg(segment(0xFFFE, b"\xff\xd9\xff\xda")),
        "an application's segment of nothing": jpeg(segment(0xFFEB, b"")),
        "fill bytes": jpeg(b"\xff\xff\xff"),
        "junk between segments": jpeg(segment(0xFFEC, b"x") + b"junk"),
        "a film behind the end": jpeg() + bytes(np.random.default_rng(0).integers(0, 256, 2**20, dtype=np.uint8)),
        "another picture behind the end": jpeg() + jpeg(),
        "scans between which segments lie": jpeg(progressive=True),
        "restarts": jpeg(restart_marker_rows=1),
    }
)  # fmt: skip
WEBPS = {f"EXIF: {name}": webp((b"EXIF", exif)) for name, exif in ODD_EXIF.items()} | {
    "an ICC profile that is none": webp((b"ICCP", b"junk")),
    "XMP that is none": webp((b"XMP ", b"<x")),
    "unknown blocks": webp((b"zzzz", b"abc")),
    "junk behind the end": webp() + b"junk" * 40,
}


ODD = {
    f"{kind}: {name}": (data, near)
    for kind, table, near in (("PNG", PNGS, 0), ("JPEG", JPEGS, 9), ("WebP", WEBPS, 0))
    for name, data in table.items()
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_beside_the_pixels_is_passed_over(tmp_path, name):
    data, near = ODD[name]
    (tmp_path / "a").write_bytes(data)
    difference = np.asarray(images.open_image(tmp_path / "a")).astype(int) - np.asarray(scene())
    assert np.abs(difference).max() <= near
    assert read_metadata(tmp_path / "a").keys() <= {"unread"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_decoder_sees_the_same_pixels_with_and_without_the_rest(tmp_path, kind):
    """On files that Pillow takes as they are, of every mode: nothing that pixels need was left out."""
    modes = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
    for mode in modes.get(kind, ("RGB", "RGBA")):
        source = scene("I").convert("I;16") if mode == "I;16" else scene(mode)
        buffer = io.BytesIO()
        source.save(buffer, kind, exif=tiff(TURN), **({"transparency": 0} if mode == "P" else {}))
        (tmp_path / "a").write_bytes(buffer.getvalue())
        want, got = Image.open(buffer), images.open_image(tmp_path / "a")
        assert (got.mode, got.tobytes()) == (want.mode, want.tobytes())
        assert got.has_transparency_data == want.has_transparency_data


@pytest.mark.parametrize("transform", [0, 1])
def test_the_segment_that_says_how_colours_are_coded_is_kept(tmp_path, transform):
    """Adobe's: 0 is RGB, 1 is YCbCr; JFIF's, which would say YCbCr, is taken out."""
    data = jpeg()
    assert data[2:4] == b"\xff\xe0"
    adobe = segment(0xFFEE, b"Adobe\0\x64" + bytes(4) + bytes([transform]))
    (tmp_path / "a.jpg").write_bytes(data[:2] + adobe + data[4 + int.from_bytes(data[4:6], "big") :])
    got = np.asarray(images.open_image(tmp_path / "a.jpg")).astype(int)
    assert np.array_equal(got, np.asarray(Image.open(tmp_path / "a.jpg")))
    assert (np.abs(got - np.asarray(scene())).max() <= 9) == bool(transform)


def test_the_first_frame_of_an_animation_is_the_picture(tmp_path):
    frames = [scene(), Image.new("RGB", (WIDTH, HEIGHT), (9, 200, 3))]
    for kind in ("PNG", "WEBP"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(
            np.asarray(images.to_rgb(images.open_image(tmp_path / "a"))), np.asarray(scene())
        )


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_found_wherever_it_is_written(tmp_path, orientation, order):
    """In EXIF of all three formats, in ImageMagick's hexadecimal text, in XMP: as Pillow would turn it."""
    exif = tiff((0x0112, 3, 1, struct.pack(f"{order}HH", orientation, 0)), order=order)
    xmp = b'<x:xmpmeta tiff:Orientation="%d"/>' % orientation
    lines = "\n".join(["", "exif", f"{len(exif):8}", *re.findall(".{1,72}", exif.hex()), ""])
    sources = [
        png(chunk(b"eXIf", exif[6:])),
        png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines.encode()))),
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        jpeg(segment(0xFFE1, exif)),
        jpeg(segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        jpeg(segment(0xFFE1, exif), segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0tiff:Orientation>3<")),
        webp((b"EXIF", exif)),
        webp((b"EXIF", exif[6:])),
        webp((b"XMP ", xmp)),
    ]
    names = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    want = scene() if orientation == 1 else scene().transpose(Image.Transpose[names[orientation - 2]])
    for data in sources:
        (tmp_path / "a").write_bytes(data)
        image = images.open_image(tmp_path / "a")
        assert image.size == want.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(want)).max() <= 9
        assert images.upright(image).size == want.size  # and is not turned again


def test_texts_are_in_the_info_of_what_was_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(chunk(b"tEXt", b"parameters\0p\nSteps: 3, Seed: 5, CFG scale: 2")))
    assert (
        read_metadata(images.open_image(tmp_path / "a.png"))["seed"]
        == 5
        == read_metadata(tmp_path / "a.png")["seed"]
    )


# --- what stays an error ---


def scans(count):
    """A progressive JPEG whose last scan is repeated."""
    data = encoded("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


LARGE, MEGABYTE = zlib.compress(bytes(7 * 10**7), 1), zlib.compress(bytes(2**20), 1)
BOMBS = {
    "a text of 70 MB": (png(chunk(b"zTXt", b"k\0\0" + LARGE)), "texts unpack to more than 64 MiB"),
    "a known text of 70 MB": (png(chunk(b"zTXt", b"ldm\0\0" + LARGE)), "more than 64 MiB"),
    "a profile of 70 MB": (png(chunk(b"iCCP", b"k\0\0" + LARGE)), "more than 64 MiB"),
    "80 texts of 1 MB": (png(*[chunk(b"iTXt", b"k\0\1\0\0\0" + MEGABYTE)] * 80), "more than 64 MiB"),
    "2,000 scans": (scans(2000), "more than 100 scans"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(tmp_path, name):
    data, words = BOMBS[name]
    assert len(data) < 10**6
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        images.open_image(tmp_path / "a")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=words):
        read_metadata(tmp_path / "a")


def test_small_files_may_not_make_a_decoder_large(tmp_path):
    """A WebP of 12.5 million pixels takes 200 MB; as a file of a megabyte or more it may."""
    (tmp_path / "a.webp").write_bytes(data := flat("WEBP", 4000, lossless=True, method=0))
    with pytest.raises(
        FormatError, match="4000 x 4000, for a WEBP file of .* at most 12.5 million; convert it to PNG"
    ):
        images.open_image(tmp_path / "a.webp")
    (tmp_path / "b.webp").write_bytes(data + bytes(2**20))
    assert images.open_image(tmp_path / "b.webp").size == (4000, 4000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_pixels_that_break_off_stay_an_error_and_texts_before_them_are_read(tmp_path, kind, share):
    text = b"p\nSteps: 3, Seed: 5, CFG scale: 2"
    exif = containers.write_comment(text.decode())
    data = {
        "PNG": lambda: png(chunk(b"tEXt", b"parameters\0" + text), compress_level=0),
        "JPEG": lambda: jpeg(segment(0xFFE1, exif)),
        "WEBP": lambda: webp((b"EXIF", exif)),
    }[kind]()
    at = {"PNG": b"IDAT", "JPEG": b"\xff\xda", "WEBP": b"VP8L"}[kind]
    begin = data.index(at) + 20
    (tmp_path / "a").write_bytes(data[: begin + int(share * (len(data) - begin))])
    with pytest.raises(FormatError, match="damaged or incomplete|no picture that can be read"):
        images.open_image(tmp_path / "a")
    assert read_metadata(tmp_path / "a")["seed"] == 5


@pytest.mark.parametrize("byte", [3, 14, 18, 26, 30])
def test_a_header_that_was_changed_is_refused(tmp_path, byte):
    data = bytearray(png())
    data[byte] ^= 0x55
    (tmp_path / "a").write_bytes(bytes(data))
    with pytest.raises(FormatError):
        images.open_image(tmp_path / "a")


# --- the price of hostile files ---

# The files of each folder are read in a process of its own, whose parent has imported everything.
READER = """
import os, sys
from ldm import errors, images
from ldm.metadata import read_metadata
from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin
for folder in sys.argv[1:]:
    if (child := os.fork()) == 0:
        for name in os.listdir(folder):
            for read in (images.open_image, read_metadata):
                try:
                    read(os.path.join(folder, name))
                except errors.LdmError:
                    pass
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    print(status, used.ru_maxrss * 1024 // 10**6, used.ru_utime + used.ru_stime)
"""


def flat(kind, side, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def hungry_exif():
    """5,000 fields that each are the whole block."""
    size = 800_000
    entry = struct.pack(">HII", 2, size - 8, 8)
    table = b"".join(struct.pack(">H", 0x100 + i) + entry for i in range(5000))
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + table
    return block + bytes(size - len(block))


def zipped(key, text):
    assert len(text) <= containers.MAX_TEXT
    return png(chunk(b"zTXt", key.encode() + b"\0\0" + zlib.compress(text.encode())))


SAMPLER = {"inputs": {"latent_image": ["0", 0], "positive": ["0", 0], "seed": ["0", 0]}}
WIDE = {"0": {"inputs": {f"text_{i}": ["0", 0] for i in range(99)}}} | {i: SAMPLER for i in range(1, 19_000)}


@pytest.mark.slow
def test_hostile_files_cost_little(tmp_path):
    """Each under 1 MB, read whole and for its texts: 2 s, and 200 MB more than a picture. Texts: 0.1 s for 16 kB."""
    files = {
        "a picture": png(),
        **{name: data for name, (data, _) in BOMBS.items()},
        "36 million pixels of PNG": flat("PNG", 6000, compress_level=1),
        "16 million pixels of WebP": flat("WEBP", 4000, lossless=True, method=0),
        "36 million pixels of JPEG": flat("JPEG", 6000),
        "25 million pixels of progressive JPEG": flat("JPEG", 5000, progressive=True, quality=10),
        "fields that hold all": png(chunk(b"eXIf", hungry_exif())),
        "fields that hold all, JPEG": jpeg(
            *(segment(0xFFE1, b"Exif\0\0" + hungry_exif()[i : i + 65_000]) for i in range(0, 800_000, 65_000))
        ),
        "60,000 chunks": png(*[chunk(b"tEXt", b"k\0")] * 60_000),
        "60,000 segments": jpeg(*[segment(0xFFE5, b"")] * 200_000),
        "lists of lists": zipped("ldm", '{"schema": 1, "parameters": {"a": [' + "[]," * 850_000 + "[]]}}"),
        "a graph of empty nodes": zipped("prompt", json.dumps({i: {} for i in range(190_000)})),
        "a graph of wide nodes": zipped("prompt", json.dumps(WIDE)),
    }
    files, limits = {name: [data] for name, data in files.items()}, dict.fromkeys(files, 2.0)
    for name, text in HOSTILE.items():
        keys = [key.encode() for key in ("parameters", "ldm", "invokeai_metadata", "prompt")]
        files[name] = [png(chunk(b"tEXt", key + b"\0" + text.encode())) for key in keys]
        limits[name] = len(keys) * 0.1 * max(1, len(text) / 16_384)
    for i, several in enumerate(files.values()):
        (tmp_path / str(i)).mkdir()
        for j, data in enumerate(several):
            assert len(data) < 10**6
            (tmp_path / str(i) / str(j)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / str(i)) for i in range(len(files)))],
        cwd=Path(images.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    costs = dict(zip(files, (map(float, line.split()) for line in done.stdout.splitlines()), strict=True))
    _, nothing, _ = costs.pop("a picture")
    for name, (status, memory, seconds) in costs.items():
        assert status == 0 and memory - nothing < 200 and seconds < limits[name], (
            name,
            memory - nothing,
            seconds,
        )
