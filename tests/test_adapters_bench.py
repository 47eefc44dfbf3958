"""The table of what LoRAs cost: who is timed paints what the others paint, and a row is there once it is finished."""

import importlib.util
import json

import pytest
import torch

from bench import adapters
from bench.speedlib import models
from ldm.adapters import LoRA
from ldm.checkpoints.build import build_empty

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_loras_fit_every_product_of_the_transformers(tmp_path):
    shape = models.geometry("tiny")
    (path,) = adapters.make_loras(shape, tmp_path, 1)
    changed = LoRA(path).deltas(build_empty(shape.settings))
    kinds = ("attn", "ff.net", "proj_in", "proj_out")
    unet = build_empty(shape.settings).model.diffusion_model
    wanted = {n for n, p in unet.named_parameters() if p.dim() > 1 and any(kind in n for kind in kinds)}
    assert {name.removeprefix("model.diffusion_model.") for name in changed} == wanted


@pytest.mark.slow
def test_ours_alone_is_measured_and_diffusers_is_said_to_be_left_out(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    path = tmp_path / "r.json"
    words = ["--model", "tiny", "--device", "cpu", "--dtypes", "float32", "--counts", "2", "--repeats", "1"]
    adapters.main([*words, "--results", str(path)])
    row = json.loads(path.read_text())["rows"]["float32/64/2"]
    assert list(row["contestants"]) == ["ldm, none", "ldm, 2", "ldm optimized, none", "ldm optimized, 2"]
    assert row["left_out"] == {"diffusers": "no peft: pip install peft"}
    assert all(one["max_error"] < 1e-5 and one["seconds"]["n"] == 1 for one in row["contestants"].values())
    assert "| `float32/64/2` | ldm optimized, 2 |" in path.with_suffix(".md").read_text()
    assert "no peft; pip install peft" in capsys.readouterr().out
    before = path.read_text()
    adapters.main([*words, "--results", str(path)])
    assert path.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", adapters.LIMITS)
def test_diffusers_and_peft_paint_the_same_with_the_same_files(dtype):
    pytest.importorskip("peft", reason="there is no peft")
    row = adapters.measure(models.geometry("tiny"), dtype, 2, 64, CPU, repeats=1)
    assert (
        list(row["contestants"])[-2:] == ["diffusers, 2 beside", "diffusers, 2 fused"] and not row["left_out"]
    )
    near = 2e-5 if dtype == "float32" else 0.05
    assert all(one["max_error"] < near for one in row["contestants"].values())


@pytest.mark.slow
def test_a_set_of_three_is_measured_beside_diffusers(tmp_path):
    pytest.importorskip("peft", reason="there is no peft")
    path = tmp_path / "r.json"
    words = ["--model", "tiny", "--device", "cpu", "--dtypes", "float32", "--set", "--repeats", "1"]
    adapters.main([*words, "--results", str(path)])
    row = json.loads(path.read_text())["rows"]["float32/64/set"]
    assert list(row["contestants"]) == ["diffusers, set", "ldm, set", "ldm optimized, set"]
    assert all(one["max_error"] < 2e-5 and one["seconds"]["n"] == 1 for one in row["contestants"].values())
    assert "| `float32/64/set` | ldm, set |" in path.with_suffix(".md").read_text()
