"""Every block of the README, run as it stands, with the model in the box standing in for Stable Diffusion v1-5."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_gaussian import LinearGaussian, normals
from lora_files import write_lora_for

import ldm
from ldm.models.diffusion.samplers import SAMPLERS, alpha_bar_table, sample_steps

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    command.strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    for command in line.split("&&")
]
FIRST = next(command for command in COMMANDS if command.startswith("python "))
# Stable Diffusion's weights cannot be had in a test: the same calls run on the model in the box.
STAND_INS = {
    'device="cuda", dtype=torch.float16': 'config="model_data/shapes/config.yaml", device="cpu"',
    "model_data/v1-5-pruned-emaonly.safetensors": "model_data/shapes/shapes.safetensors",
    "configs/v1-inference.yaml": "model_data/shapes/config.yaml",
}


def stand_in(text: str) -> str:
    for wanted, given in STAND_INS.items():
        text = text.replace(wanted, given)
    return text


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder that looks like the checkout, where pictures may be left behind."""
    for name in ("scripts", "configs", "model_data", "ldm"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_only_blocks_that_are_run_here():
    assert {language for language, _ in BLOCKS} == {"python", "bash", "text"}
    assert len(PYTHON) >= 5
    for wanted in STAND_INS:
        assert wanted in TEXT, f"{wanted!r} is no longer in the README; its stand-in should go, too"


# Four pictures of 30 steps, and three of 20: what they call is tested quickly elsewhere.
LONG = (1, 2)


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=str(i), marks=[pytest.mark.slow] * (i in LONG)) for i, code in enumerate(PYTHON)],
)
@pytest.mark.slow
def test_python_block_runs(code, newcomer):
    names: dict = {}
    if "style.safetensors" in code:  # no LoRA is in the box
        write_lora_for("style.safetensors", ldm.StableDiffusion.default().model)
    exec(compile(stand_in(code), "README.md", "exec"), names)
    assert names["ldm"].__version__
    for saved in re.findall(r"save\(\"(.+?)\"\)", code):
        told = names["ldm"].read_metadata(newcomer / saved)
        assert told["source"] == "ldm" and told["prompt"]


@pytest.mark.slow
def test_the_own_sampler_of_the_docs_runs_and_is_nearer_than_ddim(newcomer, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "ddim_heun", None)  # the block registers its own
    page = (ROOT / "docs" / "own-sampler.md").read_text(encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(code, "own-sampler.md", "exec"), names)
    assert names["ldm"].read_metadata(newcomer / "ddim_heun.png")["sampler"] == "ddim_heun"
    # On the network whose flow is known, the second order is nearer to it.
    model, (x_T,) = LinearGaussian(), normals(2, 4, 5, 3)
    end = alpha_bar_table(model)[0]
    off = {}
    for name in ("ddim", "ddim_heun"):
        start = float(SAMPLERS["ddim"].plan(alpha_bar_table(model), 20)[0].alpha_bar)
        *_, step = sample_steps(name, model, x_T, torch.tensor([0.8, 0.8]), steps=20)
        off[name] = (step.x_t - model.flow(x_T, 0.8, start, end)).norm()
    assert off["ddim_heun"] < 0.3 * off["ddim"]
    sd = names["sd"]
    for name in ("img2img", "inpaint"):
        more = {"mask": names["picture"].convert("L")} if name == "inpaint" else {}
        done = getattr(sd, name)("a", names["picture"], sampler="ddim_heun", steps=2, seed=1, **more)
        assert done.parameters[0].sampler == "ddim_heun"


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.slow] * (one == FIRST)) for one in COMMANDS]
)
def test_command_runs(command, newcomer, monkeypatch):
    if command.startswith(("pip ", "pytest")):
        # The guard of the main line installs and tests with these words, and the first line's are part of them.
        guard = (ROOT / ".ci" / "run").read_text().replace(" -q", "")
        assert f"-m {command}" in guard or command == "pip install -e ."
        return
    program, *arguments = shlex.split(stand_in(command))
    assert program == "python"
    if command == FIRST:  # in a process of its own
        done = subprocess.run(
            [sys.executable, *arguments], cwd=newcomer, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(arguments[0], run_name="__main__")
        assert stop.value.code == 0
    assert list(newcomer.glob("outputs/txt2img-samples/samples/*.png"))


def test_files_that_the_readme_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
