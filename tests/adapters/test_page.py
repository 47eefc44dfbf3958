"""docs/adapters.md: every block is run as it stands, on the model in the box."""

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm.adapters import lora_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("scripts", "model_data"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_blocks_of_the_page_run(home, monkeypatch):
    python = [code for language, code in BLOCKS if language == "python"]
    (command,) = (code.strip() for language, code in BLOCKS if language == "bash")
    assert {language for language, _ in BLOCKS} == {"python", "bash"} and len(python) == 5
    # The second block writes the files that the first one reads.
    names = {"sd": ldm.StableDiffusion.default()}
    before = {name: value.clone() for name, value in names["sd"].model.state_dict().items()}
    for code in (python[1], python[0], *python[2:]):
        exec(compile(code, "docs/adapters.md", "exec"), names)
    assert all(torch.equal(value, before[name]) for name, value in names["sd"].model.state_dict().items())
    told = ldm.read_metadata("pictures/00000.png")["adapters"]
    assert [one["name"] for one in told] == ["style", "dusk"] and told[0]["weight"] == 0.8
    same = {"seed": 7, "steps": 8}
    red = names["sd"].txt2img("a large red circle on a white background", **same)
    assert all(not np.array_equal(names[one][0], red[0]) for one in ("sharp", "loud"))
    plain = names["sd"].txt2img("a small green ring on a black background", seed=3, steps=8)
    assert not np.array_equal(names["both"][0], plain[0])

    program, path, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [path, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    assert stop.value.code == 0
    painted = Path("outputs/txt2img-samples/samples/00000.png")
    assert painted.read_bytes() == Path("pictures/00000.png").read_bytes()


def test_the_page_names_every_family():
    table = PAGE[PAGE.index("## Families") : PAGE.index("Keys may be")]
    for family in lora_weights.FAMILIES:
        assert re.search(rf"\b{family.name}\b", table), family.name


def test_files_that_the_page_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
