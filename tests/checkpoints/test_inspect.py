"""The look into a file: what is said, and with which exit code the script ends."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import inspect, save_safetensors
from ldm.cli import run
from ldm.errors import LdmError, MismatchError, NumericError, UsageError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "inspect_checkpoint.py"


@pytest.fixture
def config(tiny, tmp_path):
    """The tiny configuration as a YAML file."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(tiny.config), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def load_script():
    spec = importlib.util.spec_from_file_location("inspect_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def run_script(*words, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


def test_parts_dtypes_and_account_of_a_model(tiny):
    summary = inspect(tiny.path, config=tiny.config)
    assert summary.problem is None and len(summary.report.assigned) == summary.tensors == len(tiny.tensors)
    assert summary.kind == "safetensors" and summary.family == "v1" and not summary.ema
    assert summary.size == tiny.path.stat().st_size and summary.metadata == {"format": "pt"}
    assert summary.parts["VAE"].tensors == 124 and summary.parts["VAE"].dtypes == {"float32": 124}
    total = sum(value.numel() for value in tiny.tensors.values())
    assert sum(part.parameters for part in summary.parts.values()) == total
    assert sum(part.nbytes for part in summary.parts.values()) == 4 * total
    for words in (
        "format    safetensors",
        "family    v1",
        "VAE             124 tensors",
        "would load",
        "EMA       no",
    ):
        assert words in str(summary)


def test_a_model_that_does_not_fit_says_why(tiny):
    summary = inspect(tiny.path)
    assert isinstance(summary.problem, MismatchError) and summary.report is None
    assert "would not load as a full model: " in str(summary) and "width 32" in str(summary)


def test_values_are_looked_at_unless_quick(tiny, tmp_path):
    bad = {**tiny.tensors, "model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}
    path = tiny.save(tmp_path, bad)
    assert isinstance(inspect(path, config=tiny.config).problem, NumericError)
    assert inspect(path, config=tiny.config, check_values=False).problem is None


@pytest.mark.parametrize(
    "name", ["encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"]
)
def test_a_vae_is_no_problem(tmp_path, name):
    save_safetensors(tmp_path / "vae.safetensors", {name: torch.ones(2, 3)})
    summary = inspect(tmp_path / "vae.safetensors")
    assert summary.problem is None and "use it with --vae" in str(summary)


def test_a_lora_is_named(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"lora_unet_a.lora_up.weight": torch.ones(2, 3)})
    summary = inspect(tmp_path / "a.safetensors")
    assert summary.family == "LoRA" and "is a LoRA" in str(summary.problem)


def test_metadata_cannot_write_to_the_terminal(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"\x1b[2J": "\x1b]0;title\x07" * 500})
    text = str(inspect(tmp_path / "a.safetensors"))
    assert "\x1b" not in text and "\x07" not in text and len(text) < 1000


def test_the_script_runs_without_installation_and_ends_with_0(tiny, config, tmp_path):
    done = run_script(tiny.path, "--config", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "would load" in done.stdout and done.stderr == ""


def test_the_script_ends_with_the_code_of_the_error_in_one_line(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"<html>")
    done = run_script(tmp_path / "a.ckpt")
    assert done.returncode == 3 and "is a web page, not weights" in done.stderr
    assert done.stderr.startswith("ldm: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", 3, "is empty"),
        (b"\x80\x02cposix\nsystem\n(X\x04\0\0\0truetR.", 4, r"contains code, 'posix\.system'"),
        (None, 9, "is not there"),
    ],
)
def test_what_cannot_be_read_has_its_exit_code(tmp_path, body, code, words):
    if body is not None:
        (tmp_path / "a.ckpt").write_bytes(body)
    with pytest.raises(LdmError, match=words) as caught:
        script.main([str(tmp_path / "a.ckpt")])
    assert caught.value.exit_code == code


def test_the_script_goes_through_all_files_and_ends_with_the_first_problem(tiny, config, tmp_path, capsys):
    lora = tmp_path / "lora.safetensors"
    save_safetensors(lora, {"lora_unet_a.lora_up.weight": torch.ones(2, 3)})
    with pytest.raises(MismatchError, match="is a LoRA"):
        script.main([str(lora), str(tiny.path), "--config", str(config), "--quick"])
    assert "would load" in capsys.readouterr().out


def test_the_average_can_be_asked_for(tiny, config):
    with pytest.raises(MismatchError, match="has no EMA weights"):
        script.main([str(tiny.path), "--config", str(config), "--ema"])


def test_debug_shows_the_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(script.main, [str(tmp_path / "a.ckpt"), "--debug"])
    assert caught.value.code == 9 and "Traceback" in capsys.readouterr().err


def test_the_script_needs_a_path():
    with pytest.raises(UsageError, match="path"):
        script.main([])
