"""docs/files.md: every command is run as it stands, on tiny models under the page's names."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from lora_files import write_lora_for
from tiny import tiny_model, write_tiny

from ldm.checkpoints import inspect, read_tensors, save_safetensors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the files that the page names."""
    weights, settings = write_tiny(tmp_path)
    tensors = read_tensors(weights)[0]
    for n, name in enumerate(("a", "b", "base", "tuned")):
        changed = {key: one * (1 + n / 8) if one.is_floating_point() else one for key, one in tensors.items()}
        save_safetensors(tmp_path / f"{name}.safetensors", changed)
        (tmp_path / f"{name}.yaml").write_bytes(settings.read_bytes())
    write_lora_for(tmp_path / "style.safetensors", tiny_model())
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
    assert inspect("baked.safetensors", check_values=False).problem is None


def test_files_that_the_page_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
