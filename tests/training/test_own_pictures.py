"""Folders of pictures as people have them: formats, captions, classes, what is damaged, and runs that go on."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, features
from tiny_training import figures, first_stage, run

from ldm.config import instantiate_from_config
from ldm.errors import AbsentError, FormatError, MismatchError, UnsafeFileError, UsageError
from ldm.images import MORE_FORMATS, open_image
from ldm.paths import CHECKOUT
from ldm.training.folder import ImageFolder
from ldm.training.merging import merge_configs

KINDS = "png jpg JPEG jfif jpe webp bmp dib gif tif tiff ppm".split() + ["avif"] * features.check("avif")


def paint(path, level=90, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (level, level, level))
    formats = {"jfif": "JPEG", "jpe": "JPEG", "dib": "BMP"}
    picture.save(path, format=formats.get(path.suffix[1:]))


def names(folder):
    return [path.name for path, _ in folder.samples]


@pytest.mark.parametrize("kind", KINDS)
def test_what_pillow_reads_safely_is_read(tmp_path, kind):
    paint(tmp_path / f"a.{kind}")
    folder = ImageFolder(tmp_path, image_size=8, caption="grey")
    assert "1 pictures, 1 with a caption" in folder.look(tmp_path / "account")[0]
    np.testing.assert_allclose(folder[0]["image"], 90 / 127.5 - 1, atol=0.02)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_a_tiff_or_png_becomes_rgb(tmp_path, mode):
    kind = "tif" if mode == "CMYK" else "png"
    Image.new(mode, (20, 12)).save(tmp_path / f"a.{kind}")
    assert ImageFolder(tmp_path, image_size=8, caption="")[0]["image"].shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["eps", "pdf", "psd", "svg", "heic", "jp2"])
def test_other_files_are_left_alone_and_counted(tmp_path, kind):
    paint(tmp_path / "a.png")
    (tmp_path / f"b.{kind}").write_bytes(b"%!PS")
    folder = ImageFolder(tmp_path, caption="x")
    assert names(folder) == ["a.png"]
    assert folder.look(tmp_path / "account")[0].endswith(f"other files are left alone: 1 .{kind}")


def test_a_program_under_a_pictures_name_is_not_run(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    folder = ImageFolder(tmp_path, caption="x")
    folder.look(tmp_path / "account")
    assert names(folder) == ["a.png"]


@pytest.mark.parametrize(
    "name", [".a.png", "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "in/.x/a.png"]
)
def test_what_systems_leave_is_left_alone(tmp_path, name):
    paint(tmp_path / "z.png")
    paint(tmp_path / name)
    assert names(ImageFolder(tmp_path, caption="x")) == ["z.png"]


def test_a_tiff_whose_fields_name_the_same_bytes_over_and_over_is_refused(tmp_path):
    """Pillow would copy half a megabyte for each of 20,000 fields."""
    fields = b"".join(struct.pack("<HHII", 40000 + i % 20000, 1, 1 << 19, 8) for i in range(20000))
    table = struct.pack("<H", 20000) + fields + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + table + bytes(1 << 19))
    with pytest.raises(FormatError, match="fields of 10485760000 bytes in a file of"):
        open_image(tmp_path / "a.tif", formats=MORE_FORMATS)
    (tmp_path / "b.tif").write_bytes(b"II+\0" + bytes(40))
    with pytest.raises(FormatError, match="a TIFF of no known kind"):
        open_image(tmp_path / "b.tif", formats=MORE_FORMATS)


@pytest.mark.parametrize("kind", ["bmp", "tif", "gif"])
def test_pictures_to_begin_from_stay_png_jpeg_or_webp(tmp_path, kind):
    paint(tmp_path / f"a.{kind}")
    with pytest.raises(FormatError, match="no picture that can be read; wanted a sound PNG, JPEG or WebP"):
        open_image(tmp_path / f"a.{kind}")


# -- captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_captions(tmp_path, code):
    paint(tmp_path / "a.png")
    text = "ein Bär"
    (tmp_path / "a.txt").write_bytes(text.encode(code))
    assert ImageFolder(tmp_path).samples[0][1] == text
    (tmp_path / "metadata.jsonl").write_bytes(json.dumps({"file_name": "a.png", "text": text}).encode(code))
    assert ImageFolder(tmp_path).samples[0][1] == text
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_bytes(f'file_name,text\r\na.png,"{text}, ""gut"""\r\n'.encode(code))
    assert ImageFolder(tmp_path).samples[0][1] == f'{text}, "gut"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,x\n", "should begin with a line that names the columns file_name and text"),
        ("", "should begin with a line that names the columns"),
        ("file_name,text\na.png\n", "line 2: file_name and text should be strings, got None"),
        ("file_name,text\n../a.png,x\n", "lies outside the folder"),
        ('file_name,text\na.png,"x\n', "is no row of a CSV file"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, message):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises((FormatError, UnsafeFileError), match=message):
        ImageFolder(tmp_path)


def test_one_caption_for_all_and_captions_in_other_places(tmp_path):
    for name in ("a.png", "in/b.png"):
        paint(tmp_path / name)
    assert [c for _, c in ImageFolder(tmp_path, caption="a photo of sks").samples] == ["a photo of sks"] * 2
    (tmp_path / "a.caption").write_text("one")
    (tmp_path / "in" / "b.txt").write_text("two\n")
    assert [c for _, c in ImageFolder(tmp_path).samples] == ["one", "two"]


# -- classes -----------------------------------------------------------------------------------------------


def test_classes_are_folders_or_what_stands_before_the_underscore(tmp_path):
    for name in ("dog/x_1.png", "cat/y_2.png", "cat/x_3.png"):
        paint(tmp_path / name)
    folders = ImageFolder(tmp_path, image_size=8, label="folder")
    assert folders.classes == ["cat", "dog"]
    assert [(folders[i]["human_label"], int(folders[i]["class_label"])) for i in range(3)] == [
        ("cat", 0),
        ("cat", 0),
        ("dog", 1),
    ]
    assert folders.look(tmp_path / "account")[1] == "2 classes, numbered from 0: cat, dog"
    prefixes = ImageFolder(tmp_path, image_size=8, label="prefix")
    assert [int(prefixes[i]["class_label"]) for i in range(3)] == [0, 1, 0]  # x, y, x in the files' order
    more = ImageFolder(tmp_path, image_size=8, label="folder", classes=["bird", "cat", "dog"])
    assert [int(more[i]["class_label"]) for i in range(3)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "name"}, "label should be 'folder' or 'prefix', or left out; got 'name'"),
        ({"classes": ["a"]}, "classes need a label"),
        ({"label": "folder"}, "lies in no subfolder that could name its class"),
        ({"label": "prefix", "classes": ["b"]}, "class 'a' in .* is none of b"),
    ],
)
def test_wrong_classes_are_named(tmp_path, options, message):
    paint(tmp_path / "a_1.png")
    with pytest.raises((UsageError, FormatError), match=message):
        ImageFolder(tmp_path, **options)


# -- looking at all, and runs ------------------------------------------------------------------------------


def test_a_second_look_opens_only_what_changed(tmp_path, monkeypatch):
    from ldm.training import folder as module

    for i in range(3):
        paint(tmp_path / "in" / f"{i}.png")
    opened = []
    monkeypatch.setattr(
        module, "open_image", lambda path, **options: opened.append(path.name) or open_image(path, **options)
    )
    look = lambda: ImageFolder(tmp_path / "in", caption="x").look(tmp_path / "account")  # noqa: E731
    look()
    assert sorted(opened) == ["0.png", "1.png", "2.png"]
    paint(tmp_path / "in" / "1.png", size=(30, 30))
    look()
    assert opened[3:] == ["1.png"]
    (tmp_path / "account").write_text("damaged")
    look()
    assert len(opened) == 7


def config_of(folder, steps, batch_size=2):
    config = first_stage()
    params = {"folder": str(folder), "image_size": 16, "caption": "a"}
    config["data"]["params"]["train"] = {"target": "ldm.training.folder.ImageFolder", "params": params}
    config["data"]["params"]["batch_size"] = batch_size
    config["lightning"]["trainer"]["max_steps"] = steps
    config["lightning"]["callbacks"] = {
        "images": {"target": "main.ImageLogger", "params": {"disabled": True}}
    }
    return config


@pytest.mark.slow
def test_a_run_leaves_unreadable_pictures_out_and_goes_on_with_others(tmp_path, capsys, caplog):
    """One of five is damaged; the run goes on bit for bit, then with one picture fewer and two more."""
    for i in range(5):
        paint(tmp_path / "in" / f"{i}.png", 40 * i)
    (tmp_path / "in" / "3.png").write_bytes((tmp_path / "in" / "3.png").read_bytes()[:60])
    run(config_of(tmp_path / "in", 4), tmp_path / "whole")
    assert "1 of 5 pictures cannot be read and are left out: '" in caplog.text and "3.png" in caplog.text
    assert "4 pictures, 4 with a caption, 1 unreadable left out" in capsys.readouterr().out
    run(config_of(tmp_path / "in", 2), tmp_path / "cut")
    run(config_of(tmp_path / "in", 4), tmp_path / "cut", resume=True)
    assert "other pictures" not in capsys.readouterr().out
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    (tmp_path / "in" / "0.png").unlink()
    for name in ("6.png", "7.png"):
        paint(tmp_path / "in" / name)
    made = run(config_of(tmp_path / "in", 5), tmp_path / "cut", resume=True)
    said = capsys.readouterr().out
    assert "other pictures: 4 before, 5 now: 2 added (6.png, 7.png); 1 taken away (0.png)" in said
    assert made.code == 0 and sorted(figures(tmp_path / "cut")) == list(range(5))


def test_a_run_does_not_go_on_with_other_class_numbers(tmp_path):
    for name in ("b_0.png", "b_1.png", "c_0.png"):
        paint(tmp_path / "in" / name)
    config = config_of(tmp_path / "in", 1)
    config["data"]["params"]["train"]["params"]["label"] = "prefix"
    run(config, tmp_path / "run")
    paint(tmp_path / "in" / "a_0.png")
    with pytest.raises(MismatchError, match=r"classes \['b', 'c'\], now \['a', 'b', 'c'\]"):
        run(config, tmp_path / "run", resume=True)


def test_a_folder_without_a_sound_picture_ends_before_the_first_step(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(AbsentError, match="holds no pictures .* but nothing else"):
        run(config_of(tmp_path / "in", 1), tmp_path / "run")
    for i in range(2):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(FormatError, match="no picture in .* can be read"):
        run(config_of(tmp_path / "in", 1), tmp_path / "run")


# -- the configurations that ship, by the commands of docs/training.md ------------------------------------------

COMMANDS = re.findall(
    r"--base ((?:\S+\.yaml ?)+)(?:\\\n)?([^`|\n]*)",
    (CHECKOUT / "docs" / "training.md").read_text(encoding="utf-8"),
)


def of_command(files, words, folder):
    """A command's configuration, with a folder of two classes instead of its own and no weights to read."""
    words = [
        word for word in words.split() if "=" in word and "folder=" not in word and "ckpt_path" not in word
    ]
    config = merge_configs([CHECKOUT / name for name in files.split()], words)
    params = config.model.params
    params.pop("ckpt_path", None)
    if "finetune_keys" in params:
        params.finetune_keys = None
    params.get("first_stage_config", {"params": {}})["params"].pop("ckpt_path", None)
    config.data.params.train.params.folder = str(folder)
    return config


@pytest.mark.parametrize(("files", "words"), COMMANDS, ids=[files.split()[-1] for files, _ in COMMANDS])
@pytest.mark.thinned(3)
def test_every_command_of_the_page_builds_its_model_and_data(tmp_path, files, words):
    for name in ("cat/0.png", "dog/1.png"):
        paint(tmp_path / name, size=(40, 40))
        (tmp_path / name).with_suffix(".txt").write_text("a")
    config = of_command(files, words, tmp_path)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    batch = instantiate_from_config(config.data).train_source[0]
    key = getattr(model, "first_stage_key", getattr(model, "image_key", None))
    size = config.data.params.train.params.image_size
    assert batch[key].shape == (size, size, 3)
    if getattr(model, "cond_stage_key", None) == "caption":
        assert batch["caption"] == "a"
    if "superresolution" in files:
        side = model.image_size
        assert batch[model.cond_stage_key].shape == (side, side, 3)
    if "inpainting" in files:
        assert all(key in batch for key in model.concat_keys)
    if "classes" in files:
        assert int(batch[getattr(model, "label_key", "class_label")]) == 0 and batch["human_label"] == "cat"


def test_the_page_has_a_command_for_each_configuration():
    shipped = {path.name for path in (CHECKOUT / "configs").glob("own-pictures*.yaml")}
    named = {name.split("/")[-1] for files, _ in COMMANDS for name in files.split()}
    assert shipped <= named and len(COMMANDS) >= 6


def test_more_classes_than_the_model_has_are_said_before_the_first_step(tmp_path):
    for name in ("cat/0.png", "dog/1.png", "eel/2.png"):
        paint(tmp_path / "in" / name, size=(40, 40))
    files = [f"configs/{name}.yaml" for name in ("shapes-pixels", "own-pictures", "own-pictures-classes")]
    words = [f"data.params.train.params.folder={tmp_path / 'in'}", "data.params.batch_size=2"]
    config = merge_configs([CHECKOUT / name for name in files], words)
    with pytest.raises(MismatchError, match="has 3 classes, the model 2; set model.params.num_classes=3"):
        run(config, tmp_path / "run")


@pytest.mark.slow
def test_the_box_is_fine_tuned_interrupted_resumed_exported_and_painted_with(tmp_path):
    """Thirty pictures of a word that the box does not know, through the configuration that ships, for eight steps."""
    from ldm import StableDiffusion

    for i in range(30):
        paint(tmp_path / "in" / f"{i}.png", 8 * i, size=(150, 140))
        (tmp_path / "in" / f"{i}.txt").write_text("a wombat")
    files = [CHECKOUT / "model_data/shapes/config.yaml"]
    files += [CHECKOUT / "configs" / f"own-pictures{name}.yaml" for name in ("", "-box")]
    words = [f"data.params.train.params.folder={tmp_path / 'in'}", "lightning.trainer.accelerator=cpu"]
    config = merge_configs(files, [*words, "lightning.trainer.max_steps=4"])
    assert run(config, tmp_path / "run").code == 0
    config = merge_configs(files, [*words, "lightning.trainer.max_steps=8"])
    made = run(config, tmp_path / "run", resume=True)
    assert made.code == 0 and made.module.step == 8 and sorted(figures(tmp_path / "run")) == list(range(8))
    sd = StableDiffusion.from_single_file(tmp_path / "run" / "weights.safetensors")
    assert sd.txt2img("a wombat", steps=2, seed=1).images[0].size == (128, 128)
