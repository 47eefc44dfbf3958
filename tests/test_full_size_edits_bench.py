"""bench/full_size_edits.py on a tiny model: which rows there are, what they measure, and that a second run goes on."""

import json
import sys

import pytest
import torch
from tiny import tiny_model

from bench import full_size_edits as bench
from ldm.editing import EDITORS
from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.inversion import METHODS
from ldm.pipeline import StableDiffusion

EXACT = ("edict", "bdia", "belm", "edit_friendly")
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def test_rows_are_every_inversion_and_every_editor():
    assert {key.removeprefix("invert/") for key in bench.ROWS if key.startswith("invert/")} == {
        *METHODS,
        "dpmpp_2m",
    }
    editors = {key.removeprefix("edit/").split(",")[0] for key in bench.ROWS if key.startswith("edit/")}
    assert editors == set(EDITORS)
    assert bench.choose_rows(["explain/*", "tutorial"]) == ["tutorial", "explain/prompt", "explain/picture"]
    with pytest.raises(UsageError, match="--rows 'bell' matches no row; they are tutorial, invert/ddim"):
        bench.choose_rows(["bell"])


def test_bytes_are_counted_once_of_lists_dictionaries_and_our_own_objects():
    from ldm.adapters import WordMaps

    one, two = torch.zeros(3, 5), torch.zeros(7, dtype=torch.float64)
    assert bench.bytes_in([one, (two, one), {"a": one[1:]}, None, 3]) == 60 + 56
    assert bench.bytes_in({"a": one, "b": {"b": two, "c": two}}, but=["b"]) == 60
    maps = WordMaps()
    assert bench.bytes_of_maps(maps) == 0
    maps._last[0].add(torch.zeros(2, 3, 4, 5), 1.0)
    assert bench.bytes_of_maps(maps) == 2 * 3 * 4 * 5 * 4


@linux
def test_a_peak_is_of_what_came_after_the_last_was_forgotten():
    bench.forget_peak()
    before = bench.memory("VmHWM")
    torch.ones(30_000_000)
    assert 110e6 < bench.memory("VmHWM") - before < 150e6
    bench.forget_peak()
    assert bench.memory("VmHWM") - before < 50e6


def test_the_table_is_of_the_results_that_lie_beside_it_and_exact_inversions_are_exact():
    """Maps are those of docs/editing.md at 512 pixels: 64 x 64 cells for 77 tokens, and 16 x 16 of two pictures."""
    results = json.loads(bench.RESULTS.read_text())
    assert bench.RESULTS.with_suffix(".md").read_text() == bench.make_table(results)
    assert results["pixels"] == "512 x 512" and results["steps"] == 4
    for key, row in results["rows"].items():
        way, _, name = key.partition("/")
        # edit_friendly walks in float32: a rounding there moves what a bfloat16 network sees by a step of its own.
        exact = EXACT if row["networks"].startswith("float32") else EXACT[:3]
        assert name not in exact or row["error"] < 1e-4, key
        blends = 4 * 16 * 16 * 2 if name == "prompt_to_prompt" else 0
        assert row["maps"] in (None, 4 * 77 * 64 * 64 if way == "explain" else blends), key


@linux
@pytest.mark.slow
def test_a_second_run_goes_on_and_rows_say_what_they_took(tmp_path):
    """Calls by hand: of 4 steps, guided ones twice; the start steps are left out."""
    sd, path = StableDiffusion(tiny_model(), name="tiny"), tmp_path / "f.json"
    few = ["invert/ddim", "invert/belm", "edit/swap", "edit/prompt_to_prompt"]
    first = bench.run(sd, few, path, 4, "float32")["rows"]
    some = [
        "tutorial",
        *(f"invert/{name}" for name in (*EXACT, "null_text")),
        "edit/swap, masked and feathered",
    ]
    some += ["edit/plug_and_play", "edit/mutual_self_attention, masked", "explain/prompt", "explain/picture"]
    rows = bench.run(sd, [*few, *some], path, 4, "float32")["rows"]
    assert list(rows) == [*few, *(key for key in some if key not in few)]
    assert [rows[key] for key in few] == [first[key] for key in few] and json.loads(path.read_text())
    asked = {key: row["asked"] for key, row in rows.items()}
    assert (asked["invert/ddim"], asked["invert/edit_friendly"], asked["edit/swap"]) == (8, 16, 6)
    assert (asked["edit/prompt_to_prompt"], asked["explain/picture"]) == (12, 4)
    for key in EXACT:
        assert rows[f"invert/{key}"]["error"] < 1e-4 < rows["invert/ddim"]["error"], key
    kept = {key.split("/")[1]: row["maps"] for key, row in rows.items() if row["maps"] is not None}
    # 8 x 8 cells, 32 tokens; a source and an edit, one picture.
    assert (kept["prompt_to_prompt"], kept["prompt"], kept["picture"]) == (2 * 64 * 4, 32 * 256, 32 * 256)
    assert kept["plug_and_play"] == kept["mutual_self_attention, masked"] == 0
    assert all(row["peak"] > 0 and row["pictures"] for row in rows.values())
    assert "| `edit/prompt_to_prompt` | 3 | float32 | 12 |" in path.with_suffix(".md").read_text()
    with pytest.raises(MismatchError, match="has results for steps 4"):
        bench.run(sd, few, path, 5, "float32")
