"""pnginfo.py: what pictures say, as text and as JSON, and a line for what cannot be read."""

import importlib
import json

import pytest
from PIL import Image

from ldm.cli import run
from ldm.images import save_png
from ldm.metadata import PngInfo, png_info

OURS = {
    "prompt": "a cat",
    "seed": 7,
    "steps": 3,
    "sampler": "ddim",
    "adapters": [{"kind": "LoRA", "name": "ink", "weight": 0.5}],
}
THEIRS = "a dog\nSteps: 20, Sampler: Euler a, Seed: 5, Refiner: 5, Version: v1.10.1"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a1111, cut = PngInfo(), PngInfo()
    a1111.add_text("parameters", THEIRS)
    a1111.add_text("ldm", "{cut")
    cut.add_text("prompt", '{"3": {"class_type"')
    for name, info in (("ours", png_info(OURS)), ("theirs", a1111), ("plain", None), ("cut", cut)):
        save_png(Image.new("RGB", (16, 8)), f"{name}.png", info)
    (tmp_path / "text.png").write_text("none")


def ending(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(importlib.import_module("scripts.pnginfo").main, list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out.splitlines(), err


def test_a_line_for_each_thing(pictures, capsys):
    code, lines, err = ending(capsys, "ours.png", "theirs.png")
    assert (code, err) == (0, "")
    assert lines[:3] == ["ours.png: ldm", "  prompt: a cat", "  seed: 7"]
    assert "  LoRA ink: weight 0.5" in lines and "theirs.png: a1111" in lines
    assert {"  sampler: euler_a", "  not an option here: Refiner: 5"} <= set(lines)
    assert lines[-1] == "  not read: its text 'ldm' cannot be read, it says '{cut'"


def test_json_is_what_read_parameters_gives(pictures, capsys):
    code, lines, _ = ending(capsys, "ours.png", "theirs.png", "--json")
    ours, theirs = map(json.loads, lines)
    assert code == 0 and ours == {"file": "ours.png", "source": "ldm", **OURS}
    assert (theirs["steps"], theirs["extra"], len(theirs["unread"])) == (20, {"Refiner": "5"}, 1)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("plain.png", 3, "does not say how it was made"),
        ("cut.png", 3, "its text 'prompt' cannot be read"),
        ("text.png", 3, "is no picture"),
        ("none.png", 9, "does not exist"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_one_that_cannot_be_read_is_a_line_and_the_others_are_told(
    pictures, capsys, name, code, words, flags
):
    got, lines, err = ending(capsys, name, "ours.png", *flags)
    assert got == code and words in lines[0] and "a cat" in " ".join(lines[1:])
    assert words in err and err.count("\n") == 1
