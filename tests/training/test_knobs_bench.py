"""The table of lossy knobs, on a tiny model: its columns say what they promise."""

import json

import numpy as np
import pytest
from tiny import write_tiny

from bench import knobs, quality


@pytest.mark.parametrize("error, decibels", [(0.1, 20.0), (1.0, 0.0)])
def test_nearness_is_the_spread_over_the_difference(error, decibels):
    rng = np.random.default_rng(5)
    full = rng.standard_normal((3, 4, 50, 70))
    off = full + error * full.std() * np.where(rng.random(full.shape) < 0.5, -1, 1)
    assert abs(knobs.nearness(off, full) - decibels) < 1e-6
    assert knobs.nearness(full, full) == float("inf")


@pytest.mark.slow
def test_the_table_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(knobs, "STEPS", 5)
    monkeypatch.setattr(quality, "REFERENCE", 12)
    some = ("full", "guidance in (0.2, 0.8)", "deep features every 2nd step")
    monkeypatch.setattr(knobs, "SETTINGS", {name: knobs.SETTINGS[name] for name in some})
    results = tmp_path / "k.json"
    checkpoint, config = write_tiny(tmp_path)
    tiny = ["--ckpt", str(checkpoint), "--config", str(config), "--device", "cpu"]
    base = [*tiny, "--prompts", "3", "--results", str(results)]
    knobs.main(base)
    told = json.loads(results.read_text())
    found = told["rows"]
    assert told["guidance"] == 7.5  # what the model advises, or else Stable Diffusion v1's
    assert list(found) == list(some)
    assert found["full"]["decibels"] is None and 0 < found[some[1]]["decibels"] < 80
    assert all(row[split]["prompts"] == 3 for row in found.values() for split in quality.SPLITS)
    text = results.with_suffix(".md").read_text()
    assert "| full | 0.0 % | 0.0 % |" in text and text.count(" | - |\n") == 1
    # A second run does what is missing, against the same full latents.
    monkeypatch.setattr(knobs, "SETTINGS", {**knobs.SETTINGS, "merged": {"merge_ratio": 0.5}})
    capsys.readouterr()
    knobs.main(base)
    assert "[1/2] full" in capsys.readouterr().out
    again = json.loads(results.read_text())["rows"]
    assert list(again) == [*some, "merged"] and again[some[2]] == found[some[2]]


def test_every_setting_is_one_that_the_library_takes():
    import ldm

    sd = ldm.StableDiffusion.default()
    for setting in knobs.SETTINGS.values():
        sd.stream("a red star", steps=2, **setting)
