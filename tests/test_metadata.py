"""What is written into a picture comes back, and what others wrote never does harm."""

import json
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import metadata
from ldm.errors import AbsentError
from ldm.images import save_png

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
    assert metadata.from_infotext("p\n" + line) == {"prompt": "p"}


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
    assert back["sampler"] == "Euler a" and back["steps"] == 28 and back["height"] == 512
    assert back["extra"] == {"Schedule type": "Karras", "Lora hashes": "a: 0123, b: 4567"}


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


def test_reading_never_raises():
    rng = random.Random(0)
    letters = 'Steps: Seed Size Negative prompt:\n"\\,x1{}[]\x00\x1b\ud800é'
    for _ in range(3000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(60)))
        assert isinstance(metadata.from_infotext(text)["prompt"], str)


def saved(tmp_path, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", info)


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
def test_hostile_chunks_say_nothing(tmp_path, chunk):
    assert metadata.read_metadata(saved(tmp_path, ldm=chunk)) == {}


def test_invokeai_and_comfyui_are_read(tmp_path):
    raw = {"positive_prompt": "p", "seed": 3, "steps": "x", "cfg_scale": 6, "width": True, "extra": {}}
    assert metadata.read_metadata(saved(tmp_path, invokeai_metadata=json.dumps(raw))) == {
        "source": "invokeai",
        "prompt": "p",
        "seed": 3,
        "guidance_scale": 6,
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
