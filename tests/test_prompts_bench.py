"""The bench of A1111's prompts: its prompts have brackets, and each distinct chunk is encoded once."""

import json

import pytest

from bench import prompts as bench
from ldm.prompt import read


def test_a_caption_gets_a_weight_and_a_change_of_its_colour():
    text = bench.with_brackets("a small pink star above a large blue ring on a gray background")
    assert text == "a small ([pink:red:0.5]:1.2) star above a large blue ring on a gray background"
    (part,) = read(text, steps=20).parts
    assert [(one.end, one.segments[1]) for one in part.schedule] == [(10, ("pink", 1.2)), (20, ("red", 1.2))]


@pytest.mark.slow
def test_each_distinct_chunk_is_encoded_once(tmp_path):
    results = tmp_path / "out.json"
    bench.main(["--prompts", "2", "--steps", "2", "--batch", "2", "--rounds", "1", "--results", str(results)])
    cost = json.loads(results.read_text())["cost"]
    # Two texts of each of two prompts, and the empty negative prompt.
    assert [(one["rows"], one["distinct"]) for one in (cost["plain"], cost["a1111"])] == [(3, 3), (5, 5)]
    assert "| a1111 | " in results.with_suffix(".md").read_text()
