"""docs/editing.md: its blocks are run as they stand, on the model in the box."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")


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
