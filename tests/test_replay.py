"""A picture that says how it was made is painted again, to the last bit where it is ours; what is not done is said."""

import copy
import hashlib
import importlib
import json
import random
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_requests import apart, painted
from test_prompting import write_lora_for
from tiny import tiny_model, write_tiny

import ldm
from ldm.adapters import Embedding, LoRA
from ldm.checkpoints import save_safetensors
from ldm.cli import run
from ldm.cli.editing import edit
from ldm.cli.editing_options import edit_parser
from ldm.cli.library import Library
from ldm.cli.replaying import Replayer, compare
from ldm.errors import LdmError
from ldm.images import save_png
from ldm.metadata import PngInfo, png_info
from ldm.pipeline import StableDiffusion

WIDTH = 128  # of the tiny model's words


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a model, a LoRA, an embedding, pictures to begin with and masks."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("models", "loras", "embeddings", "init", "masks"):
        (folder / name).mkdir()
    write_tiny(folder / "models")
    write_lora_for(folder / "loras" / "ink.safetensors", tiny_model())
    torch.save({"wide": torch.zeros(2, WIDTH + 1)}, folder / "embeddings" / "wide.pt")
    torch.save(
        {"birb": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))},
        folder / "embeddings" / "birb.pt",
    )
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (72, 64 + 8 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "init" / f"{i}.png")
        marks = (rng.random((72, 64 + 8 * i)) < 0.4).astype(np.uint8) * 255
        Image.fromarray(marks).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def sd(shelf):
    return StableDiffusion.from_single_file(
        shelf / "models" / "tiny.safetensors", config=shelf / "models" / "tiny.yaml", device="cpu"
    )


@pytest.fixture(scope="module")
def replayer(shelf):
    return Replayer(**places(shelf), device="cpu")


def places(shelf):
    names = {
        "models": "models",
        "loras": "loras",
        "embeddings": "embeddings",
        "inits": "init",
        "masks": "masks",
    }
    return {name: [str(shelf / folder)] for name, folder in names.items()}


def random_picture(sd, shelf, seed, must, folder, modes=None):
    """Paint a picture with options drawn at random; of several of a batch the last. Returns its file and options."""

    def paint(mode, prompt, drawn):
        rng = random.Random(seed)
        pictures = {}
        if mode != "txt2img":
            pictures["image"] = shelf / "init" / f"{rng.randrange(3)}.png"
        if mode == "inpaint":
            pictures["mask"] = shelf / "masks" / f"{rng.randrange(3)}.png"
        adapters = [LoRA(shelf / "loras" / "ink.safetensors", 0.5, start=0.25)] if rng.random() < 0.3 else []
        if "birb" in prompt:
            adapters.append(Embedding(shelf / "embeddings" / "birb.pt", width=WIDTH))
        further = {"num_images": rng.choice((1, 1, 3)), "batch_size": 2, "lora_dir": shelf / "loras"}
        steps = sd.stream(prompt, adapters=adapters, **further, **pictures, **drawn)
        results = [step.result for step in steps if step.result is not None]
        if (
            results[0].parameters[0].rng == "compvis"
        ):  # a later batch hangs on what was drawn for those before
            del results[1:]
        return results[-1].save(folder, f"{seed}-{{}}.png")[-1]

    return painted(seed, must, paint, modes)


def pixels(path):
    return np.asarray(Image.open(path))


PICTURES = 24
NOT_HERE = {"brownian"}  # it needs a package


def check_again(replayer, path, drawn, folder):
    account = replayer.replay(path, folder / "again")
    assert account.lost == [] and account.is_same, (drawn, account)
    assert np.array_equal(pixels(path), pixels(account.saved)), drawn
    assert ldm.read_parameters(path) == ldm.read_parameters(account.saved), drawn


@pytest.mark.parametrize(
    ("mode", "must"),
    [
        ("txt2img", ["hires_scale", "variation_strength"]),
        ("img2img", ["eta_noise_seed_delta", "clip_skip"]),
        ("inpaint", ["guidance_interval", "width"]),
    ],
)
@pytest.mark.thinned(2)
def test_pictures_with_random_options_come_back_to_the_bit(sd, shelf, replayer, tmp_path, mode, must):
    check_again(replayer, *random_picture(sd, shelf, 1, must, tmp_path, [mode]), tmp_path)


@pytest.mark.slow
def test_two_dozen_pictures_with_every_option_drawn_at_random_come_back_to_the_bit(
    sd, shelf, replayer, tmp_path
):
    """Together they have every option that pictures tell; two that do not go together have a picture each."""
    kinds, seen = apart(), set()
    for seed in range(PICTURES):
        together = [name for names in kinds for name in names[seed::PICTURES]]
        for must in (together, *([one] for one in together)):
            if not seen.issuperset(must) and (found := random_picture(sd, shelf, seed, must, tmp_path)):
                check_again(replayer, *found, tmp_path)
                seen |= found[1].keys()
    missed = {name for names in kinds for name in names} - seen - NOT_HERE
    assert len(missed) <= 2 and len(seen) > 40, missed


# --- files that pictures name ---


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three LoRAs, one within a folder; a model of another day's hash; something that is none."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "more").mkdir()
    for name, text in (
        ("ink.safetensors", b"one"),
        ("more/chalk.safetensors", b"two"),
        ("oil.pt", bytes(range(251)) * 6000),
    ):
        head = b'{"__metadata__": {}}'
        start = len(head).to_bytes(8, "little") + head if name.endswith("tensors") else b""
        (folder / name).write_bytes(start + text)
    (folder / "note.txt").write_text("ink")
    return folder


def sha(data, start=0):
    return hashlib.sha256(data[start:]).hexdigest()


# (name, digits of the hash by the file's bytes, the file, whether it is the one, what is said)
FINDS = [
    ("ink", None, "ink.safetensors", True, "found by its name alone"),
    ("INK", lambda data: sha(data)[:10], "ink.safetensors", True, ""),
    ("ink", lambda data: sha(data, 28)[:12], "ink.safetensors", True, ""),
    (
        "pen",
        lambda data: sha(data)[:10].upper(),
        "ink.safetensors",
        True,
        "is here as 'ink.safetensors', by its hash",
    ),
    (None, lambda data: sha(data), "more/chalk.safetensors", True, "LoRA is here as 'chalk.safetensors'"),
    ("oil", lambda data: sha(data[0x100000:0x110000])[:8], "oil.pt", True, ""),
    (
        "ink",
        lambda data: "0" * 10,
        "ink.safetensors",
        False,
        "'ink.safetensors' has another hash than the picture's",
    ),
    ("inc", None, None, False, "LoRA 'inc' is not in --loras; the nearest name is 'ink'"),
    (
        "nothing like it",
        lambda data: "f" * 64,
        None,
        False,
        "(hash ffffffffffff) is not in --loras; there are 3 files",
    ),
    ("ink", lambda data: "12", "ink.safetensors", True, "found by its name alone"),
]


@pytest.mark.parametrize("row", FINDS, ids=lambda row: f"{row[0]} {row[4][:20]}")
def test_a_file_is_found_by_any_of_its_hashes_or_by_its_name(files, row):
    name, digits_of, file, is_same, words = row
    data = (files / (file or "ink.safetensors")).read_bytes()
    found = Library("--loras", [files]).find("LoRA", name, digits_of and digits_of(data))
    assert found.path == (files / file if file else None) and found.is_same == is_same
    assert words in found.note and bool(words) == bool(found.note)


def test_a_library_says_what_is_not_there_and_takes_diffusers_folders(files, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model_index.json").write_text("{}")
    assert (
        Library("--models", [tmp_path], folders=True).find("the model", "m", "0" * 10).path == tmp_path / "m"
    )
    assert "give --loras, the folder" in Library("--loras", []).find("LoRA", "a", None).note
    with pytest.raises(LdmError, match="--loras '.*nowhere' is not there"):
        Library("--loras", [tmp_path / "nowhere"])


# --- other programs' pictures, and what is not as they say ---


def theirs(folder, text, key="parameters"):
    info = PngInfo()
    info.add_text(key, text if isinstance(text, str) else json.dumps(text))
    return save_png(Image.new("RGB", (16, 8)), folder / "theirs.png", info)


GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 2, "cfg": 2.0, "sampler_name": "euler_ancestral",
          "scheduler": "karras", "denoise": 1.0, "positive": ["6", 0], "latent_image": ["5", 0], "model": ["8", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 72}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "(embedding:birb:1.2)"}},
    "7": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4", 0], "lora_name": "ink.safetensors",
          "strength_model": 0.5}},
    "8": {"class_type": "FreeU", "inputs": {"model": ["7", 0]}},
}  # fmt: skip
LINE = "Steps: 2, Sampler: Euler a, CFG scale: 2, Seed: 5, Size: 64x72, Model: tiny"
# (text, its key, what the picture that is painted says, what is said not to be honoured)
THEIRS = {
    "A1111": (f"a (red:1.2) cat\n{LINE}", "parameters",
              {"prompt_syntax": "a1111", "rng": "nv", "sampler": "euler_a", "width": 64, "height": 72}, []),
    "A1111's LoRA and embedding": (
        f'birb <lora:ink:0.5>\n{LINE}, RNG: CPU, TI hashes: "birb: 00112233"', "parameters",
        {"rng": "image", "prompt": "birb <lora:ink:0.5>", "adapters": ["Embedding birb", "LoRA ink"]},
        ["embedding 'birb': 'birb.pt' has another hash than the picture's 00112233"]),
    "tags of what is not here": (
        f"a <lora:inc:0.5> <hypernet:h:1> <lora:../ink:1> b\n{LINE}", "parameters",
        {"prompt": "a    b", "adapters": []},
        ["LoRA 'inc' is not in --loras; the nearest name is 'ink'", "<hypernet:h> is a tag of a kind",
         "<lora:../ink> is a tag of a kind"]),
    "an unknown sampler, and keys of 1.10": (
        f"a\n{LINE.replace('Euler a', 'Warp')}, ADetailer model: x, Refiner: y, Version: v1.10.1", "parameters",
        {"sampler": "dpmpp_2m"},
        ["the sampler must be one of", "ADetailer model: 'x' is no option", "Refiner: 'y' is no"]),
    "ComfyUI": (
        GRAPH, "prompt", {"prompt_syntax": "comfyui", "rng": "comfyui", "sampler": "euler_a", "spacing": "karras",
        "adapters": ["LoRA ink", "Embedding birb"]}, ["ComfyUI's node FreeU (8) is not known here"]),
    "InvokeAI": (
        {"positive_prompt": "a cat++", "steps": 2, "scheduler": "euler_k", "seed": 5, "cfg_scale": 2, "width": 64,
         "height": 72, "model": {"name": "tiny"}, "hrf_method": "ESRGAN"}, "invokeai_metadata",
        {"prompt_syntax": "compel", "spacing": "karras"}, ["hrf_method: 'ESRGAN' is no option here"]),
    "an embedding for another model": (
        f"a wide cat\n{LINE}", "parameters", {"prompt": "a wide cat", "adapters": []}, ["the embedding 'wide': "]),
    "A1111's inpainting": (
        f"a\n{LINE}, Denoising strength: 0.5, Mask blur: 4", "parameters", {"mode": "inpaint", "mask_blur": 4}, []),
    "ours, of words that the reader has for itself": (
        {"schema": 1, "parameters": {"prompt": "a", "seed": 5, "steps": 2, "model": "tiny", "mode": "video",
         "source": ["comfyui"], "unread": 7, "extra": [1], "adapters": ["x"], "threads": 10**6}},
        "ldm", {"mode": "txt2img", "prompt_syntax": "plain"},
        ["its mode 'video' is not known here", "source: ", "unread: ", "extra: ", "adapters: "]),
    "ours, from another day": (
        {"schema": 1, "parameters": {"prompt": "a", "seed": 5, "steps": 2, "model": "tiny", "sigma_max": [1],
         "wobble": 3, "adapters": [{"kind": "ControlNet", "name": "canny", "hash": "00112233aa", "hint": "00"},
                      {"kind": "Spell"}, {"kind": "FreeU", "b1": 1.5, "b2": "x"},
                      {"kind": "LoRA", "name": "ink", "hash": "1" * 12}]}},
        "ldm",
        {"seed": 5}, ["its Schedule max sigma [1] is not known", "ControlNet 'canny'", "kind 'Spell' is not known",
        "FreeU None: ", "LoRA 'ink' is named without a strength", "wobble 3 is no option"]),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.thinned(3)
def test_other_programs_pictures_are_painted_and_what_is_lost_is_said(shelf, replayer, tmp_path, name):
    text, key, told, lost = THEIRS[name]
    replayer = copy.copy(replayer)
    replayer.inits, replayer.masks = [shelf / "init" / "0.png"], [shelf / "masks" / "0.png"]
    account = replayer.replay(theirs(tmp_path, text, key), tmp_path / "again")
    again = ldm.read_parameters(account.saved)
    again["adapters"] = [f"{one['kind']} {one['name']}" for one in again["adapters"]]
    assert {name: again[name] for name in told} == told
    assert len(account.lost) == len(lost), account.lost
    for words in lost:
        assert sum(words in line for line in account.lost) == 1, (words, account.lost)
    assert account.is_same is (False if key == "ldm" else None)


def test_a_picture_that_cannot_be_compared_is_not_painted(sd, replayer, tmp_path):
    """Cut short, of more pixels than are read, or painted from features that no picture holds."""
    whole = theirs(tmp_path, {"schema": 1, "parameters": {"prompt": "a", "seed": 5, "model": "tiny"}}, "ldm")
    data = whole.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: data.index(b"IDAT") + 9])
    head = data[12:16] + (60_000).to_bytes(4, "big") * 2 + data[24:29]
    (tmp_path / "large.png").write_bytes(data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:])
    features = torch.zeros(1, 3, WIDTH)
    given = {"prompt_embeds": features, "negative_prompt_embeds": features.half() + 1}
    own = sd.txt2img("", **given, steps=1, width=64, height=72, progress=False).save(tmp_path / "own")[0]
    assert len(ldm.read_parameters(own)["embeds_hash"]) == 10
    for path, words in (
        (tmp_path / "cut.png", "is damaged or incomplete"),
        (tmp_path / "large.png", "has too many pixels"),
        (own, "painted from prompt_embeds"),
    ):
        with pytest.raises(LdmError, match=words):
            replayer.replay(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_pictures_that_begin_with_one_need_it(sd, shelf, replayer, tmp_path):
    image, mask = shelf / "init" / "1.png", shelf / "masks" / "1.png"
    path = sd.inpaint("a", image, mask, steps=2, seed=3, progress=False).save(tmp_path)[0]
    all_, replayer = replayer, copy.copy(replayer)
    for inits, masks, words in (
        (
            [],
            [],
            "it needs the picture to begin with, hash .*, and the mask, hash .*; 0 pictures and 0 masks",
        ),
        ([shelf / "init" / "0.png"], [mask], "1 pictures and 1 masks were tried"),
        ([image], [shelf / "masks" / "0.png"], "1 pictures and 1 masks were tried"),
    ):
        replayer.inits, replayer.masks = inits, masks
        with pytest.raises(LdmError, match=words):
            replayer.replay(path, tmp_path / "again")
    # The last 3 of 75 steps: with the model's own 50, as many levels as it has not.
    weak = sd.img2img("a", image, 0.04, strength_rule="comfyui", steps=3, seed=3, progress=False)
    replayer.inits, replayer.masks = [image], []
    assert replayer.replay(weak.save(tmp_path)[0], tmp_path / "again").is_same
    text = f"a\n{LINE.replace('64x72', '72x72')}, Denoising strength: 0.5"
    account = replayer.replay(theirs(tmp_path, text), tmp_path / "again")
    assert (account.lost, ldm.read_parameters(account.saved)["mode"]) == ([], "img2img")
    assert "the picture to begin with is not told by a hash; '1.png' is taken" in account.notes
    with pytest.raises(LdmError, match="give the one as --init FILE"):
        all_.replay(tmp_path / "theirs.png", tmp_path / "again")


@pytest.mark.slow
def test_an_edit_comes_back_to_the_bit_with_its_picture_mask_and_adapters(shelf, replayer, tmp_path):
    """Of two that were asked for together the second; what is not there is said, and nothing painted."""
    image, mask = shelf / "init" / "1.png", shelf / "masks" / "1.png"
    model = shelf / "models" / "tiny.safetensors"
    words = f"--image {image} --mask {mask} --prompt ring --edit-prompt 'a blue ring' --edit-prompt 'a birb ring' "
    words += (
        f"--lora {shelf / 'loras' / 'ink.safetensors'}:0.5 --embedding {shelf / 'embeddings' / 'birb.pt'} "
    )
    words += (
        f"--method diffedit --method-option draws=2 --seed 5 --steps 1 --ckpt {model} --device cpu --no-sheet"
    )
    edit(edit_parser().parse_args([*shlex.split(words), "--outdir", str(tmp_path)]))
    path = tmp_path / "00001.png"
    account = replayer.replay(path, tmp_path / "again")
    assert (account.lost, account.is_same) == ([], True), account
    told = ldm.read_parameters(path)
    assert told == ldm.read_parameters(account.saved) and told["edit"]["edit_prompt"] == ["a birb ring"]
    assert [one["kind"] for one in told["adapters"]] == ["LoRA", "Embedding"]
    other, less = copy.copy(replayer), copy.copy(replayer)
    other.inits, less.masks = [shelf / "init" / "0.png", model], []
    for one, words in (
        (
            other,
            f"the picture that was edited, hash '{told['edit']['image_hash']}'; 2 pictures were tried; .* --init",
        ),
        (less, "it needs the mask, hash .*; 0 pictures were tried; give it as --mask FILE"),
    ):
        with pytest.raises(LdmError, match=words):
            one.replay(path, tmp_path / "none")
    broken = {**told["edit"], "method": "diffedits"}, {"prompt": "a"}, {**told["edit"], "weight": 3}, None
    for said, words in zip(
        broken, ("diffedit", "hash None", "it says the weight 3", "how it was edited"), strict=True
    ):
        liar = save_png(Image.open(path), tmp_path / "x.png", png_info({**told, "edit": said}), rename=True)
        with pytest.raises(LdmError, match=words):
            replayer.replay(liar, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_an_optimised_picture_is_painted_optimised_and_the_next_plain(shelf, sd, tmp_path):
    place = {"config": shelf / "models" / "tiny.yaml", "device": "cpu"}
    fast = StableDiffusion.from_single_file(shelf / "models" / "tiny.safetensors", **place)
    fast.optimize(sliced_vae=True)
    paths = [one.txt2img("a", steps=2, seed=3).save(tmp_path)[0] for one in (fast, sd)]
    assert [ldm.read_metadata(path)["optimize"] for path in paths] == [["fused", "sliced_vae"], []]
    replayer = Replayer(models=[str(shelf / "models")])
    for path in paths:
        account = replayer.replay(path, tmp_path / "again")
        assert account.is_same and account.notes == account.lost == []
        assert ldm.read_metadata(account.saved)["optimize"] == ldm.read_metadata(path)["optimize"]


@pytest.mark.slow
def test_a_vae_of_its_own_is_found_by_its_hash(shelf, tmp_path):
    """It is named in the picture, whatever it is called later; without it, what is painted is not called the same."""
    state = {
        name: value * 0.9
        for name, value in tiny_model().state_dict().items()
        if name.startswith("first_stage_model.")
    }
    save_safetensors(tmp_path / "warm.safetensors", state, {})
    own = {"config": shelf / "models" / "tiny.yaml", "device": "cpu", "vae": tmp_path / "warm.safetensors"}
    sd = StableDiffusion.from_single_file(shelf / "models" / "tiny.safetensors", **own)
    path = sd.txt2img("a", steps=1, seed=3, progress=False).save(tmp_path)[0]
    (tmp_path / "warm.safetensors").rename(tmp_path / "renamed.safetensors")
    replayer = Replayer(models=[str(shelf / "models")], vaes=[str(tmp_path)])
    account = replayer.replay(path, tmp_path / "again")
    assert account.is_same and account.lost == [] and "by its hash" in account.notes[0]
    replayer.files.vaes = Library("--vae-dir", [])
    account = replayer.replay(path, tmp_path / "again")
    assert (
        not account.is_same
        and "the VAE 'warm' (hash" in account.lost[0]
        and "give --vae-dir" in account.lost[0]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"a\n{LINE}y", "the model 'tinyy' is not in --models; the nearest name is 'tiny'"),
        (f"a\n{LINE}, Model hash: 0011223344", None),
        (f"a\n{LINE[:-13]}", "it names no model"),
        ("nothing", "the model|it names no model"),
        ({"steps": 2}, "does not say how it was painted; its text 'prompt' cannot be read"),
    ],
)
def test_without_its_model_a_picture_is_not_painted(shelf, replayer, tmp_path, text, words):
    if words is not None and "names no" in words:
        replayer = Replayer()
    path = theirs(tmp_path, text, "parameters" if isinstance(text, str) else "prompt")
    if words is None:
        account = replayer.replay(path, tmp_path / "again")
        assert "'tiny.safetensors' has another hash than the picture's 0011223344" in account.lost[0]
        return
    with pytest.raises(LdmError, match=words):
        replayer.replay(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


# --- the comparison, and the script ---


@pytest.mark.parametrize(
    ("name", "save", "is_same"),
    [
        ("a.png", {}, True),
        ("a.jpg", {"quality": 61}, True),
        ("a.jpg", {"quality": 90, "subsampling": 0}, True),
        ("a.webp", {"lossless": True}, True),
        ("a.webp", {"quality": 95}, True),
        ("a.webp", {"quality": 80}, True),
    ],
)
def test_pixels_are_compared_as_the_file_codes_them(tmp_path, name, save, is_same):
    y, x = np.mgrid[:64, :96]
    image = Image.fromarray(np.stack([x * 2, y * 3, (x + y) + 60], axis=2).astype(np.uint8))
    other = np.asarray(image).copy()
    other[5:30, 7:40] = 255 - other[5:30, 7:40]
    image.save(tmp_path / name, **save)
    words, same = compare(tmp_path / name, image)
    assert same is is_same and ("byte for byte" in words or name == "a.webp")
    words, same = compare(tmp_path / name, Image.fromarray(other))
    assert not same and "of 6144 pixels differ, by at most" in words
    assert compare(tmp_path / name, image.crop((0, 0, 8, 9))) == ("another size, 8 x 9", False)


@pytest.mark.slow
def test_the_script_says_each_picture_and_its_exit_code_whether_all_was_honoured(
    sd, shelf, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = sd.txt2img("a", steps=2, seed=3, num_images=2, width=64, height=72, progress=False)
    for i, path in enumerate(out.save("own") + out.save("own", "{}.jpg")):
        shutil.copy(path, f"{i}.{path.suffix[1:]}")
    theirs(tmp_path, f"a\n{LINE}, Refiner: y")
    Image.open("0.png").save("said.png", pnginfo=png_info(out.metadata(0) | {"seed": 4}))
    Image.new("RGB", (8, 8)).save("plain.png")

    def ending(*argv):
        with pytest.raises(SystemExit) as stop:
            run(importlib.import_module("scripts.replay").main, [*argv, "--models", str(shelf / "models")])
        printed = capsys.readouterr()
        return stop.value.code, printed.out.splitlines(), printed.err

    code, lines, err = ending("0.png", "2.jpg")
    assert (code, err) == (0, "") and len(lines) == 2
    assert lines[0] == "0.png: outputs/replay/0.png: the same pixels, byte for byte, all 4608"
    assert lines[1].endswith("byte for byte after JPEG coding, all 4608")
    code, lines, err = ending("said.png", "theirs.png", "plain.png", "none.png", "1.png", "--outdir", "b")
    assert code == 5 and "4 of 5 pictures could not be painted as they say" in err
    assert "pixels differ, by at most" in lines[0] and lines[-1].startswith("1.png: b/1.png: the same")
    assert lines[1] == "theirs.png: b/theirs.png: of another program, not compared"
    assert "theirs.png: not honoured: Refiner: 'y' is no option here" in lines
    assert "plain.png: not painted: it does not say how it was painted" in lines
    for file, code in (("plain.png", 3), ("none.png", 9)):  # of one picture, one line
        found, lines, err = ending(file)
        assert (found, lines) == (code, []) and len(err.splitlines()) == 1


@pytest.mark.slow
def test_the_page_about_it(tmp_path, monkeypatch, capsys):
    """Its commands give what it shows, and its code runs."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "replay.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert blocks.keys() == {"bash", "text", "python"} and page.count("```") == 6
    for line in blocks["bash"].splitlines():
        _, script, *argv = shlex.split(line)
        with pytest.raises(SystemExit) as stop:
            run(importlib.import_module(script[:-3].replace("/", ".")).main, argv)
        assert stop.value.code == 0
    assert capsys.readouterr().out.endswith(blocks["text"])
    exec(compile(blocks["python"], "docs/replay.md", "exec"), {})
