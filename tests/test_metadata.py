"""What is written into a picture comes back, and what others wrote never does harm."""

import json
import math
import random
import re
import struct

import numpy as np
import pytest
from hostile_texts import HOSTILE
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import metadata
from ldm.containers import read_exif, write_comment
from ldm.errors import AbsentError, UsageError
from ldm.images import save_png
from ldm.limits import MAX_PROMPT

FULL = {
    "prompt": "a large red circle",
    "negative_prompt": "blurry",
    "steps": 20,
    "sampler": "dpmpp_2m",
    "guidance_scale": 7.5,
    "seed": 965400086,
    "width": 512,
    "height": 768,
    "model_hash": "6ce0161689",
    "model": "v1-5-pruned-emaonly",
    "strength": 0.75,
    "eta": 0.0,
    "rng": "image",
    "version": "0.1.0",
}


def test_infotext_is_a1111s_to_the_letter():
    assert metadata.to_infotext(FULL) == (
        "a large red circle\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 965400086, Size: 512x768, "
        "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.75, "
        "RNG: CPU, Version: ldm 0.1.0"
    )


@pytest.mark.parametrize(("rng", "word"), [("image", "CPU"), ("nv", "NV"), ("compvis", "CompVis")])
def test_where_noise_was_drawn_is_said_in_a1111s_words(rng, word):
    assert f", RNG: {word}, " in metadata.to_infotext({**FULL, "rng": rng})


KNOBS = {
    "guidance_interval": [0.125, 0.8],
    "cache_interval": 3,
    "cache_depth": 2,
    "merge_ratio": 0.5,
    "merge_seed": 2**64 - 1,
}


def test_knobs_that_are_turned_are_told_and_come_back():
    text = metadata.to_infotext({**FULL, **KNOBS})
    assert (
        "Guidance interval: 0.125 to 0.8, Cache interval: 3, Cache depth: 2, Token merging ratio: 0.5, "
        "Token merging seed: 18446744073709551615, RNG: CPU"
    ) in text
    back = metadata.from_infotext(text)
    assert {name: back[name] for name in KNOBS} == KNOBS


def test_knobs_that_are_off_are_not_told():
    off = {"guidance_interval": [0.0, 1.0], "cache_interval": 1, "cache_depth": 2, "merge_ratio": 0.0}
    assert metadata.to_infotext({**FULL, **off, "merge_seed": 3}) == metadata.to_infotext(FULL)


@pytest.mark.parametrize(
    "line",
    [
        "Guidance interval: 0.2, Token merging ratio: nan, Cache interval: x",
        "Guidance interval: 0.1 to inf, Token merging ratio: 1e999, Cache interval: -1",
        "Guidance interval: 0.1 to 0.2 to 0.3, Token merging ratio: 0.5 to 0.6, Cache interval: 1.5",
    ],
)
def test_unsound_knobs_are_left_out(line):
    said = dict(pair.split(": ") for pair in line.split(", "))
    assert metadata.from_infotext("p\n" + line) == {"prompt": "p", "extra": said}


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        "two\nlines, with: commas",
        'she said "hi", then \\ left',
        "Steps: 20, Sampler: DDIM, Seed: 3\nand more",
        "a\n\nb",
        "日本語 \U0001f600 é",
        "Steps: 1, Steps: 2, Steps: 3",
    ],
)
@pytest.mark.parametrize("negative", ["", "ugly", 'many\nlines: "x", y'])
def test_a1111_text_comes_back(prompt, negative):
    back = metadata.from_infotext(
        metadata.to_infotext({**FULL, "prompt": prompt, "negative_prompt": negative})
    )
    assert back["prompt"] == prompt and back.get("negative_prompt", "") == negative
    for name in ("steps", "sampler", "guidance_scale", "seed", "width", "height", "model_hash", "strength"):
        assert back[name] == FULL[name], name


def test_model_names_with_commas_and_quotes_are_quoted():
    name = 'my "best", model: v2\nnew'
    assert metadata.from_infotext(metadata.to_infotext({**FULL, "model": name}))["model"] == name


def test_a_foreign_text_is_read_and_unknown_keys_are_kept_as_text():
    text = (
        "a dog\nSteps: 28, Sampler: Euler a, Schedule type: Karras, CFG scale: 6, Seed: 1, Size: 640x512, "
        'Lora hashes: "a: 0123, b: 4567", Version: v1.9.3'
    )
    back = metadata.from_infotext(text)
    assert (back["sampler"], back["spacing"]) == ("euler_a", "karras")
    assert back["steps"] == 28 and back["height"] == 512
    assert back["extra"] == {"Lora hashes": "a: 0123, b: 4567"}


def test_fewer_than_three_pairs_is_a_prompt():
    assert metadata.from_infotext("a cat\nSteps: 3, Seed: 4") == {"prompt": "a cat\nSteps: 3, Seed: 4"}


@pytest.mark.parametrize(
    "line",
    [
        "Steps: nan, CFG scale: nan, Seed: -1",
        "Steps: 1e999, CFG scale: 1e999, Size: 5x",
        "Steps: , CFG scale: , Seed: ",
    ],
)
def test_unsound_numbers_are_left_out(line):
    assert not {"steps", "guidance_scale", "seed", "width"} & set(metadata.from_infotext("p\n" + line))


LETTERS = 'Steps: Seed Size Negative prompt:\n"\\,x1{}[]\x00\x1b\ud800é'
JSON = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "1e999",
    "NaN",
    "-Infinity",
    "true",
    "null",
    "0",
    "9" * 5000,
    "\\ud800",
    " ",
]
JSON += [
    '"schema": 1',
    '"parameters": ',
    '"inputs": ',
    '"class_type": ',
    '"latent_image": ["1", 0]',
    '"positive": ["2", 0]',
]
JSON += ['"seed": ', '"steps": 3', '"text": "t"', '"1": ', '"2": ', '{"inputs": {', "}}"]
JSON += [
    '"image": {',
    '"uc": "n"',
    '"scale": ',
    '"c": "p"',
    '"lora": [',
    '"model": {',
    '"nodes": [{',
    '"links": [',
    "-s 5",
]
INFOTEXT = list(LETTERS) + ["Steps: 3, ", "Seed: 4", "Size: 5x", "CFG scale: 1e999", '{"seed": 3', "}"]
DREAM = [
    '"a cat" ',
    "-s 5",
    " -S",
    "-C 1e999",
    " --x y",
    "[",
    "]",
    '"',
    "'",
    "-",
    " ",
    "9" * 30,
    "-W",
    "-A k_lms",
]
READERS = {
    key: (reader, INFOTEXT if source == "a1111" else JSON if key != "Dream" else DREAM)
    for key, (source, reader) in metadata.READERS.items()
    if key != "UserComment"  # read as parameters are
}


@pytest.mark.parametrize("name", READERS)
def test_reading_never_raises(name):
    reader, pieces = READERS[name]
    rng = random.Random(name)
    for _ in range(1200):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(60)))
        found = reader(text)
        assert isinstance(found, dict)
        json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", [name for name in READERS if name != "Dream"])
def test_reading_sound_json_of_any_shape_never_raises(name):
    """Trees whose keys are the ones that are looked for, and whose leaves are everything JSON can say."""
    rng = random.Random(name)
    keys = [
        "schema",
        "parameters",
        "inputs",
        "class_type",
        "latent_image",
        "positive",
        "guider",
        "text",
        "string_a",
    ]
    keys += [
        "string_b",
        "seed",
        "steps",
        "cfg",
        "1",
        "2",
        "positive_prompt",
        "width",
        "height",
        "sigmas",
        "delimiter",
        *(
            "nodes",
            "links",
            "id",
            "type",
            "widgets_values",
            "upscale_method",
            "lora_name",
            "model",
            "uc",
            "c",
        ),
        *("image", "loras", "lora", "weight", "scale", "sui_image_params", "hash", "name", "mode", "size"),
    ]
    leaves = [
        1,
        0,
        -5,
        1.5,
        10**400,
        -(10**30),
        math.nan,
        math.inf,
        "t",
        "",
        "\ud800\x1b",
        True,
        None,
        ["1", 0],
        ["2", 0],
    ]

    def tree(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(leaves)
        if rng.random() < 0.15:
            return [tree(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(keys): tree(depth - 1) for _ in range(rng.randrange(8))}

    for _ in range(200):
        found = READERS[name][0](json.dumps(tree(4)).replace(str(10**400), "9" * 5000))
        json.dumps(found, allow_nan=False)


def test_exif_of_any_bytes_never_raises():
    rng = random.Random(3)
    sound = write_comment("p\nSteps: 3, Seed: 4, Size: 5x6")
    for _ in range(3000):
        exif = bytearray(sound[: rng.randrange(len(sound) + 1)])
        for _ in range(rng.randrange(4)):
            if exif:
                exif[rng.randrange(len(exif))] = rng.randrange(256)
        texts, orientation = read_exif(bytes(exif))
        assert all(isinstance(text, str) for text in texts.values()) and (
            orientation is None or orientation >= 0
        )


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.thinned(3)
def test_hostile_texts_do_not_raise(name):
    """What they cost is measured in test_sound_pictures.py."""
    for reader, _ in READERS.values():
        json.dumps(reader(HOSTILE[name]), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("900 lists", "ldm", {"prompt": "p"}),
        ("an integer of 100,000 digits", "ldm", {"prompt": "p"}),
        ("an integer of 400 digits", "invokeai", {"prompt": "p"}),
        ("escapes", "invokeai", {"prompt": "A" * 50_000}),
        ("one key many times", "invokeai", {"seed": 2}),
    ],
)
def test_what_is_sound_beside_hostile_values_is_read(tmp_path, name, source, found):
    key = {"ldm": "ldm", "invokeai": "invokeai_metadata"}[source]
    back = metadata.read_metadata(saved(tmp_path, **{key: HOSTILE[name]}))
    extra = back.pop("extra", {})
    assert back == {"source": source, **found} and bool(extra) == ("integer" in name or "lists" in name)
    assert all(isinstance(one, str) and len(one) <= 200 for one in extra.values())


@pytest.mark.parametrize("line", LINES := [
    "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model: a b/c-d_e",
    'Lora hashes: "a: 0123, b: 4567", Version: v1.9.3, Hires upscale: 2, TI hashes: "x\\"y: 1"',
    "http://a: b, a:bc: 5, é日: 1, _a: 2, 9b : 3, -c: 4, /d: 5,, ,e e:,f f: ",
    'ab: "cd" ef, gh: "", ij: "k, lm: "n", op: ""q"',
    "  ab:\t1 ,cd:2,ef :3", "ab: 1,cd", "ab", ":", "a: 1", "", ", , ,", 'ab: "\\', "ab: \\,cd: 1",
])  # fmt: skip
def test_pairs_are_those_of_a1111s_pattern(line):
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    want = [(key, value.strip()) for key, value in pattern.findall(line)]
    assert [(key, value.strip()) for key, value in metadata._pairs(line)] == want


def test_pairs_of_random_lines_are_those_of_a1111s_pattern():
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    rng = random.Random(1)
    for _ in range(5000):
        line = "".join(rng.choice('aB1_ -/::,,"\\é') for _ in range(rng.randrange(24)))
        want = [(key, value.strip()) for key, value in pattern.findall(line)]
        assert [(key, value.strip()) for key, value in metadata._pairs(line)] == want, line


@pytest.mark.parametrize("count", [20_000, MAX_PROMPT])
@pytest.mark.parametrize("letters", ["red ", "é, ", "日本", "\U0001f600", '"\\', "\x01"])
def test_our_longest_prompts_come_back(tmp_path, count, letters):
    """Both prompts as long as they may be, and each told once more as the words that were dropped."""
    prompt = (letters * count)[:count]
    ours = {
        **FULL,
        "prompt": prompt,
        "negative_prompt": prompt[::-1],
        "dropped_words": [prompt, prompt[::-1]],
    }
    path = save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", metadata.png_info(ours))
    assert metadata.read_metadata(path) == {"source": "ldm", **ours}


def test_odd_names_of_files_come_back_from_our_chunk():
    name = b"\xff.safetensors".decode("utf-8", "surrogateescape")
    assert metadata._from_ours(metadata.to_chunk({"model": name})) == {"model": name}


# --- JPEG and WebP ---

TEXT = "a cat, é 日本 \U0001f600\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7.0, Seed: 3, Size: 8x9"
COMMENTS = {
    "A1111's": b"UNICODE\0" + TEXT.encode("utf-16-be"),
    "the other order": b"UNICODE\0" + TEXT.encode("utf-16-le"),
    "with a mark of order": b"UNICODE\0" + TEXT.encode("utf-16"),
    "with zeros at the end": b"UNICODE\0" + TEXT.encode("utf-16-be") + bytes(8),
    "ASCII": b"ASCII\0\0\0" + TEXT.encode(),
    "no code": bytes(8) + TEXT.encode(),
    "UTF-8 that is called UNICODE": b"UNICODE\0" + TEXT.encode(),
    "nothing in front": TEXT.encode(),
}


def exif_with(comment, order):
    """EXIF whose comment lies behind other fields."""
    entries = [(0x010F, 2, 6, 100), (0x8769, 4, 1, 50)]
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    table = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    block = (head + table + bytes(4)).ljust(50, b"\0")
    block += struct.pack(f"{order}HHHII", 1, 0x9286, 7, len(comment), 120) + bytes(4)
    return (b"Exif\0\0" + block).ljust(106, b"\0") + b"Canon\0".ljust(20, b"\0") + comment


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("name", COMMENTS)
def test_a1111s_text_in_an_exif_comment(tmp_path, name, kind, order):
    Image.new("RGB", (16, 8)).save(tmp_path / "a", kind, exif=exif_with(COMMENTS[name], order))
    for back in (metadata.read_metadata(tmp_path / "a"), metadata.read_metadata(Image.open(tmp_path / "a"))):
        assert back["source"] == "a1111" and back["prompt"] == TEXT.split("\n")[0]
        assert (back["seed"], back["width"], back["negative_prompt"]) == (3, 8, "dog")


@pytest.mark.parametrize(
    "comment", [b"", b"ASCII\0\0\0my holiday", b"UNICODE\0\xd8\x00", bytes(99), b"\xff" * 40]
)
def test_comments_of_cameras_say_nothing(tmp_path, comment):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif_with(comment, ">"))
    assert metadata.read_metadata(tmp_path / "a.jpg") == {}


def test_comfyuis_graph_in_exif(tmp_path):
    graph = {"1": {"class_type": "KSampler", "inputs": {"seed": 5, "positive": [], "latent_image": []}}}
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph)
    Image.new("RGB", (16, 8)).save(tmp_path / "a.webp", exif=exif)
    assert metadata.read_metadata(tmp_path / "a.webp") == {"source": "comfyui", "seed": 5}


@pytest.mark.parametrize("given", [None, 3, b"png", np.zeros((3, 4))])
def test_what_is_neither_path_nor_picture_is_refused(given):
    with pytest.raises(UsageError, match="read_parameters wants a path or a PIL picture, got"):
        metadata.read_metadata(given)


# --- what is in a PNG ---


def info_of(**texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def saved(tmp_path, **texts):
    return save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", info_of(**texts))


def test_our_chunk_is_lossless_where_a1111s_is_not(tmp_path):
    ours = {
        **FULL,
        "prompt": "  a\nNegative prompt: b ",
        "dropped_words": ["x"],
        "rng": "compvis",
        "eta": None,
    }
    path = save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", metadata.png_info(ours))
    assert metadata.read_metadata(path) == {"source": "ldm", **ours}
    assert metadata.read_metadata(Image.open(path))["source"] == "ldm"
    assert "parameters" in Image.open(path).info


def test_a1111_only(tmp_path):
    assert metadata.read_metadata(saved(tmp_path, parameters=metadata.to_infotext(FULL)))["source"] == "a1111"


def test_no_metadata_and_no_file(tmp_path):
    assert metadata.read_metadata(saved(tmp_path)) == {}
    with pytest.raises(AbsentError):
        metadata.read_metadata(tmp_path / "none.png")


@pytest.mark.parametrize(
    "chunk",
    ["", "{", "[1]", "null", '{"schema": 2, "parameters": {"seed": 1}}', '{"schema": 1, "parameters": []}']
    + ['{"schema": 1, "parameters": {"seed": NaN}}', "[" * 50_000, "x" * 70_000]
    + ['{"schema": 1, "parameters": {"seed": 1e999}}', '{"schema": 1, "parameters": {"a": [{"b": 1e999}]}}'],
)
def test_hostile_chunks_say_nothing_and_that_is_said(tmp_path, chunk):
    back = metadata.read_metadata(saved(tmp_path, ldm=chunk))
    assert not back.keys() - {"unread"} and len(back.get("unread", ())) == bool(chunk)
    text = metadata.to_infotext(FULL)
    path = save_png(Image.new("RGB", (16, 8)), tmp_path / "b.png", info_of(ldm=chunk, parameters=text))
    back = metadata.read_metadata(path)
    assert (back["source"], back["seed"], len(back.get("unread", ()))) == ("a1111", FULL["seed"], bool(chunk))


def test_invokeai_and_comfyui_are_read(tmp_path):
    raw = {"positive_prompt": "p", "seed": 3, "steps": "x", "cfg_scale": 6, "width": True, "extra": {}}
    assert metadata.read_metadata(saved(tmp_path, invokeai_metadata=json.dumps(raw))) == {
        "source": "invokeai",
        "prompt": "p",
        "seed": 3,
        "guidance_scale": 6,
        "extra": {"steps": "x", "width": "True"},
    }
    graph = {
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "ddim", "denoise": 1.0}
            | {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
        },
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "good"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad"}},
    }
    (tmp_path / "a.png").unlink()
    back = metadata.read_metadata(saved(tmp_path, prompt=json.dumps(graph)))
    assert (back["prompt"], back["negative_prompt"], back["height"], back["seed"]) == ("good", "bad", 640, 5)


def test_control_characters_are_not_written():
    assert metadata.to_infotext({**FULL, "prompt": "a\x1b[31m\x00b\r\nc"}).startswith("a[31mb\nc\n")
