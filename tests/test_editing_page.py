"""docs/editing.md: its blocks are run as they stand, on the model in the box."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    ((program, path, *argv),) = map(shlex.split, re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    monkeypatch.setattr(sys, "argv", [path, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert program == "python" and stop.value.code == 0
    by_script = np.asarray(Image.open("outputs/edits/00000.png"))
    assert np.abs(by_script.astype(int) - np.asarray(names["edited"])).max() <= 1
    assert Path("outputs/edits/sheet-0000.png").exists()
