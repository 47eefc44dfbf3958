"""docs/editing.md and docs/editing.ipynb: what stands there is run as it stands, on the model in the box."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora_for
from PIL import Image

from ldm.metadata import read_metadata
from ldm.shapes.checker import check

PAGE = (Path(__file__).parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    for code in blocks:
        exec(compile(code, "docs/editing.md", "exec"), names)
    for before, after in (("red", "blue"), ("photo", "edited")):
        red, blue = (np.asarray(names[name], float) for name in (before, after))
        inside = red[..., 2] < 128  # the red circle
        assert np.abs(red - blue)[~inside].mean() < 8 and np.abs(red - blue)[inside].mean() > 40, after

    names["photo"].save("photo.png")
    write_lora_for("style.safetensors", names["sd"].model)
    for line in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        program, path, *argv = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [path, *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        assert program == "python" and stop.value.code == 0
    by_script = np.asarray(Image.open("outputs/edits/00000.png"))
    assert np.abs(by_script.astype(int) - np.asarray(names["edited"])).max() <= 1
    assert Path("outputs/edits/sheet-0000.png").exists()
    told = [read_metadata(f"outputs/edits/0000{i}.png") for i in range(2)]
    assert told[1]["edit"] == told[0]["edit"] | {"steps": 4, "psnr": told[1]["edit"]["psnr"]}
    assert [one["name"] for one in told[1]["adapters"]] == ["style"]


@pytest.mark.slow
def test_cells_of_the_notebook_run_and_say_what_happens(capsys):
    notebook = json.loads((ROOT / "docs" / "editing.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"docs/editing.ipynb, cell {number}", "exec"), names)
    plain, guided, exact = (float(names[name].error[0]) for name in ("plain", "guided", "exact"))
    assert exact < 1e-4 < plain < guided
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(names["inverted"]) == names["STEPS"] - 2
    for picture, claim in (
        (names["done"].images[0], names["blue"]),
        (names["kept"].images[0], names["blue"]),
        (names["kept"].images[1], names["square"]),
        (names["moved"].images[0], names["right"]),
        (names["noised"].images[0], names["blue"]),
        (names["ground"].images[0], names["black"]),
        (names["as_written"], names["blue"]),
    ):
        assert check(picture, claim).holds, claim
    assert names["seen"].words == ["red", "circle", "white"]
