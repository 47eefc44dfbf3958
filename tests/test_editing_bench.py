"""bench/editing.py without a network: what is changed, how an edit is judged, and the table."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ldm.shapes.scenes import HELD_OUT, render

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("editing_bench", ROOT / "bench" / "editing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_fifty_edits_of_each_kind_change_one_thing_to_what_the_model_has_seen(bench):
    edits = bench.plan(200)
    assert Counter(kind for kind, *_ in edits) == dict.fromkeys(bench.KINDS, 50)
    for _, before, after in edits:
        a, b = before.caption.split(), after.caption.split()
        assert before.caption != after.caption and before.items[1:] == after.items[1:]
        assert not {(one.colour, one.shape) for one in after.items} & HELD_OUT
        assert (after.where, after.background) == (before.where, before.background) or a[1:3] == b[1:3]


@pytest.mark.slow
def test_an_edit_holds_where_the_picture_shows_it_and_what_else_changed_is_measured(bench):
    edits = bench.plan(8)
    for kind, before, after in [one for one in edits if one[0] != "place"]:
        source = np.asarray(render(before, 128), float)
        done, undone = (
            bench.judged(render(one, 128), kind, before, after, source) for one in (after, before)
        )
        assert done["holds"] and not undone["holds"] and done["moved"] < 2, after.caption
        assert undone["off"] in (0, None) and (done["off"] is None or done["off"] < 0.1)
    kind, before, after = next(one for one in edits if one[0] == "place")
    assert not bench.judged(render(before, 128), kind, before, after, source)["holds"]


def test_the_table_is_of_the_results_that_lie_beside_it(bench):
    path = bench.RESULTS
    assert path.with_suffix(".md").read_text() == bench.table(json.loads(path.read_text()))
