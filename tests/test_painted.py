"""Pictures say how they were made wherever PIL saves them, and nowhere else."""

import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

import ldm
from ldm.metadata import Painted, png_info, read_metadata
from ldm.pipeline import StableDiffusion
from ldm.results import file_hash

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    file.write_bytes(b"weights")
    return StableDiffusion(tiny_model(), file=file)


@pytest.fixture(scope="module")
def out(sd):
    return sd.txt2img(
        [PROMPT, 'say "hi", é, 日本 \U0001f600\nbut: ü'], negative_prompt="ugly", seed=7, steps=2
    )


def shown(out, i):
    return {"source": "ldm", **out.metadata(i)}


def by_pil(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return Image.open(buffer)


WAYS = {
    "images": lambda out: out.images[1],
    "index": lambda out: out[1],
    "slice": lambda out: out[1:][0],
    "iteration": lambda out: list(out)[1],
    "copy": lambda out: out[1].copy(),
    "copy.copy": lambda out: copy.copy(out[1]),
    "copy of a copy": lambda out: out[1].copy().copy(),
    "deepcopy": lambda out: copy.deepcopy(out[1]),
    "pickle": lambda out: pickle.loads(pickle.dumps(out[1])),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_png_that_pil_saves_tells_all(out, way, tmp_path):
    image = WAYS[way](out)
    image.save(tmp_path / "star.png")
    assert read_metadata(tmp_path / "star.png") == shown(out, 1)
    info = Image.open(tmp_path / "star.png").info
    assert info["parameters"] == out.infotexts[1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "star.png")), np.asarray(out[1]))
    assert read_metadata(image) == shown(out, 1)  # and so does the one in memory


@pytest.mark.parametrize(
    ("target", "format"),
    [
        ("a.png", None), ("a.PNG", None), ("a.png", "png"), ("a.png", "PNG"), ("a", "PNG"), ("a.jpg", "PNG"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["str", "path", "bytes", "file"])
def test_every_way_to_name_a_png(out, tmp_path, target, format, kind):
    path = tmp_path / target
    if kind == "file":
        with open(path, "wb") as file:
            out[0].save(file, format)
    else:
        name = {"str": str, "path": lambda p: p, "bytes": lambda p: str(p).encode()}[kind](path)
        out[0].save(name, format or ("PNG" if kind == "bytes" else None))  # PIL 10 knows no suffix of bytes
    assert read_metadata(path) == shown(out, 0)


def test_grids_tell_of_their_first(out, tmp_path):
    out.grid().save(tmp_path / "grid.png")
    assert read_metadata(tmp_path / "grid.png") == shown(out, 0) == read_metadata(out.grid(1))
    assert read_metadata(Image.open(io.BytesIO(out._repr_png_()))) == shown(out, 0)


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_grids_of_arrays_do_too(sd, kind):
    result = sd.txt2img(PROMPT, steps=1, output_type=kind)
    assert read_metadata(by_pil(result.grid())) == shown(result, 0)


def test_every_batch_of_a_stream_and_every_door(sd):
    image = Image.new("RGB", (64, 72), (9, 99, 200))
    mask = Image.new("L", (64, 72), 255)
    doors = [
        list(sd.stream(PROMPT, num_images=3, batch_size=2, steps=1, seed=1)),
        list(sd.stream(PROMPT, image=image, strength=0, steps=1)),
        list(sd.stream(PROMPT, image=image, mask=mask, steps=1)),
    ]
    seen = [one.result for events in doors for one in events if one.result]
    assert [len(result) for result in seen] == [2, 1, 1, 1]
    for result in seen:
        for i, one in enumerate(result):
            assert read_metadata(by_pil(one)) == shown(result, i)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_jpeg_and_webp_tell_what_a1111_would(out, kind):
    for i in range(2):
        back = read_metadata(by_pil(out[i], kind))
        assert back["source"] == "a1111" and back["prompt"] == out.parameters[i].prompt
        assert (back["seed"], back["steps"], back["negative_prompt"]) == (7 + i, 2, "ugly")
    assert by_pil(out[0], kind).getexif().get_ifd(0x8769)[0x9286].startswith(b"UNICODE\0\0a\0 \0l")


def test_a_prompt_that_no_jpeg_can_hold_is_said_and_saved(sd, caplog):
    result = sd.txt2img("red " * 20_000, steps=1)
    assert read_metadata(by_pil(result[0], "JPEG")) == {} and "holds texts up to 32,000" in caplog.text
    assert len(read_metadata(by_pil(result[0], "WEBP"))["prompt"]) == 79_999


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_saved_as_ever(out, kind):
    assert by_pil(out[0], kind).size == out[0].size


def test_what_the_caller_gives_replaces_it(out):
    assert read_metadata(by_pil(out[0], pnginfo=None)) == {}
    assert read_metadata(by_pil(out[0], pnginfo=png_info({"seed": 3})))["seed"] == 3
    assert (
        read_metadata(by_pil(out[0], "JPEG", exif=b""))
        == {}
        == read_metadata(by_pil(out[0], "WEBP", exif=b""))
    )
    assert by_pil(out[0], "JPEG", quality=30, comment=b"x").info["comment"] == b"x"


def test_no_metadata_is_none(out, tmp_path):
    for path in out.save(tmp_path, metadata=False):
        assert Image.open(path).info == {} and read_metadata(path) == {}


def test_another_picture_made_of_it_says_nothing(sd, out):
    image = out[0]
    others = [
        image.crop((0, 0, 64, 56)),
        image.resize((72, 72)),
        image.convert("L"),
        image.rotate(90),
        image.copy(),
    ]
    for other in others[:4]:
        assert type(other) is Image.Image and read_metadata(other) == {} == read_metadata(by_pil(other))
    again = sd.img2img("blue", others[4], 0, seed=99, steps=1)
    assert np.array_equal(np.asarray(again[0]), np.asarray(image))
    back = read_metadata(by_pil(again[0]))
    assert (back["prompt"], back["seed"], back["mode"]) == ("blue", 99, "img2img")


def test_a_painted_picture_is_still_a_picture_of_pil(out):
    image, plain = out[0], Image.fromarray(np.asarray(out[0]))
    assert isinstance(image, Image.Image) and image == plain and plain == image and image == image.copy()
    assert image != out[1] and image != 3
    assert image._repr_png_()[:4] == b"\x89PNG"
    assert str(image).startswith("<") and Painted.__hash__ is None is Image.Image.__hash__


def test_the_model_file_is_hashed_when_something_is_saved_not_before(sd, tmp_path):
    """A hash of 4 GB takes seconds; who only looks at pictures does not wait for it."""
    model = StableDiffusion(sd.model, file=tmp_path / "later.safetensors")
    result = model.txt2img(PROMPT, steps=1)
    (tmp_path / "later.safetensors").write_bytes(b"other weights")
    back = ldm.read_metadata(by_pil(result[0]))
    assert back["model_hash"] == file_hash(tmp_path / "later.safetensors") is not None
