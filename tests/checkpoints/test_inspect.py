"""The look into a file: what is said, and with which exit code the script ends."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import inspect, save_safetensors
from ldm.cli import run
from ldm.errors import FormatError, LdmError, MismatchError, NumericError, UsageError

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


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
EMPTY = ["first_stage_model.decoder.conv_in.weight", "first_stage_model.encoder.mid.attn_1.q.weight"]


def changed(tensors, how, names):
    return {name: how(value) if name in names else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("how", "names", "kind", "words"),
    [
        (torch.zeros_like, EMPTY, FormatError, f"2 of 368 tensors are all zeros ('{EMPTY[0]}'"),
        (torch.zeros_like, [FIRST], FormatError, f"1 of 368 tensors are all zeros ('{FIRST}')"),
        (lambda v: v * torch.nan, EMPTY, NumericError, "2 of 368 tensors hold values that are not finite"),
        (
            lambda v: v / 0,
            [FIRST],
            NumericError,
            f"1 of 368 tensors hold values that are not finite ('{FIRST}')",
        ),
        # What CompVis's networks begin with, and biases, may be zero.
        (
            torch.zeros_like,
            ["model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.bias"],
            None,
            "",
        ),
        (torch.zeros_like, ["model.diffusion_model.input_blocks.1.1.proj_out.weight"], None, ""),
        (torch.zeros_like, ["model.diffusion_model.input_blocks.1.0.out_layers.3.weight"], None, ""),
    ],
)
@pytest.mark.thinned(3)
def test_tensors_of_zeros_or_without_finite_values_are_counted_and_named(
    tiny, tmp_path, how, names, kind, words
):
    path = tiny.save(tmp_path, changed(tiny.tensors, how, names))
    problem = inspect(path, config=tiny.config).problem
    assert (problem is None) if kind is None else (type(problem) is kind and words in str(problem))
    assert inspect(path, config=tiny.config, check_values=False).problem is None


def test_a_sparse_tail_is_a_download_that_stopped(tiny, config, tmp_path):
    """As aria2 and torrents leave it: the size is right, the second half is a hole."""
    path = tiny.save(tmp_path, tiny.tensors)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)
    with pytest.raises(
        FormatError, match="are all zeros .*download that stopped; get the file again"
    ) as caught:
        script.main([str(path), "--config", str(config)])
    assert caught.value.exit_code == 3
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 360


def test_other_families_are_looked_at_too(tmp_path):
    save_safetensors(
        tmp_path / "a.safetensors", {"lora_unet_a.lora_down.weight": torch.full((2, 3), torch.nan)}
    )
    summary = inspect(tmp_path / "a.safetensors")
    assert "is a LoRA" in str(summary.problem) and "hold values that are not finite" in str(summary)


def test_a_fresh_model_of_compvis_is_not_called_damaged(tmp_path):
    """Every tensor that its constructors leave at zero is known, in the UNet as in the VAE and the text encoder."""
    from tiny import tiny_config

    from ldm.models.diffusion.ddpm import LatentDiffusion

    settings = tiny_config()
    settings["model"]["params"]["unet_config"]["params"]["model_channels"] = 64
    model = LatentDiffusion(**settings["model"]["params"])
    zeros = [n for n, p in model.named_parameters() if p.dim() > 1 and not p.any()]
    assert len(zeros) > 10
    save_safetensors(tmp_path / "a.safetensors", {n: v.contiguous() for n, v in model.state_dict().items()})
    assert inspect(tmp_path / "a.safetensors", config=settings).problem is None


def test_keys_can_be_left_out_on_the_command_line(tiny, config, tmp_path, capsys):
    path = tiny.save(
        tmp_path, {**tiny.tensors, "extra.a": torch.ones(2), "extra.b": torch.ones(2), "x": torch.ones(2)}
    )
    with pytest.raises(MismatchError, match="1 of the file's 371 not expected .'x'.*--ignore-keys"):
        script.main([str(path), "--config", str(config), "--ignore-keys", "extra.*"])
    words = ["--ignore-keys", "extra.*", "--ignore-keys", "x", "--ignore-keys", "nothing"]
    assert script.main([str(path), "--config", str(config), *words]) == 0
    out = capsys.readouterr().out
    assert "3 ignored: left out by ignore" in out and "ignore 'nothing' fits no tensor of the file" in out


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


@pytest.mark.slow
def test_the_script_runs_without_installation_and_ends_with_0(tiny, config, tmp_path):
    done = run_script(tiny.path, "--config", config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "would load" in done.stdout and done.stderr == ""


@pytest.mark.slow
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
    with pytest.raises(MismatchError, match="no known way to change"):
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
