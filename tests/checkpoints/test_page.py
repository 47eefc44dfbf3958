"""docs/files.md: every command is run as it stands, on tiny models under the page's names."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from lora_files import write_lora
from tiny_networks import control_shapes

from ldm.checkpoints import inspect, save_object, save_safetensors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tiny, tmp_path, monkeypatch):
    """A folder with the files that the page names."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(tiny.config), tmp_path / "config.yaml")
    for n, name in enumerate(("a", "b", "base", "tuned")):
        changed = {
            key: one * (1 + n / 8) if "attn1.to_q" in key or one.dim() == 1 else one
            for key, one in tiny.tensors.items()
        }
        tiny.save(tmp_path, changed, f"{name}.safetensors")
    body = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    write_lora(
        tmp_path / "style.safetensors",
        {f"{body}.lora_up.weight": (32, 2), f"{body}.lora_down.weight": (2, 32)},
    )
    control = {name: torch.ones(shape) for name, shape in control_shapes().items()}
    save_safetensors(tmp_path / "canny.safetensors", control)
    save_object(
        tmp_path / "birb.pt", {"string_to_param": {"*": torch.ones(2, 768)}, "string_to_token": {"*": 265}}
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_commands_of_the_page_run_and_models_load(home):
    assert {language for language, _ in BLOCKS} == {"bash"}
    written = []
    for line in "".join(code for _, code in BLOCKS).splitlines():
        program, script, *words = shlex.split(line)
        assert program == "python" and load_script(Path(script).stem).main(words) == 0, line
        written.append(words[words.index("-o") + 1])
    assert all((home / name).exists() for name in written) and len(set(written)) == len(written)
    assert inspect("for-web-uis.safetensors", check_values=False).problem is None
    assert inspect("baked.safetensors", check_values=False).problem is None


def test_files_that_the_page_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
