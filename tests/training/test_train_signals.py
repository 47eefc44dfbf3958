"""Ctrl-C and SIGTERM, sent to the run and its loader processes at once as a terminal or a system does."""

import os
import random
import signal
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_training import figures, first_stage, in_child, run

from ldm.errors import ResourceError
from ldm.paths import CHECKOUT
from ldm.training.callbacks import AfterSteps
from ldm.training.checkpointing import read_state
from ldm.training.data import Shapes, Stream

NUMBERS = [signal.SIGINT, signal.SIGTERM]


class GroupSignalAt(AfterSteps):
    """Sends a signal to this process and its loader processes after a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def after_step(self, trainer, module, batch):
        if module.step == self.step:
            os.killpg(0, self.number)


class GroupSignalBefore(pl.Callback):
    """Sends a signal before the first step, where a handler of Lightning's stands before ours."""

    def __init__(self, number):
        self.number = number

    def on_fit_start(self, trainer, module):
        os.killpg(0, self.number)


class Signals(Shapes):
    """Shapes of which an item sends the signal, from wherever it is made."""

    def __init__(self, number, place, **params):
        super().__init__(**params)
        self.number, self.place = number, place

    def item(self, index, rng, step):
        if index == self.place:
            os.killpg(0, self.number)
        return super().item(index, rng, step)


def config_of(train, workers=2):
    config = first_stage()
    params = {"timesteps": 7, "image_size": 16, "first_stage_key": "image"}
    params["unet_config"] = {"target": "tiny_training.Layer", "params": {}}
    config["model"]["target"], config["model"]["params"] = "ldm.models.diffusion.ddpm.DDPM", params
    config["data"]["params"] |= {"train": train, "num_workers": workers}
    config["training"]["checkpoint_every"] = 1000
    config["lightning"]["trainer"]["max_steps"] = 1000
    config["lightning"]["callbacks"] = {"i": {"target": "main.ImageLogger", "params": {"disabled": True}}}
    return config


def in_a_group(config, folder):
    """Run it in a process group of its own; returns the exit code."""

    def act():
        os.setsid()
        os._exit(run(config, folder).code)

    return in_child(act)


QUICK = {
    ("after a step", signal.SIGTERM),
    ("in a loader", signal.SIGINT),
    ("before the first step", signal.SIGTERM),
}
PLACES = [
    pytest.param(where, number, marks=() if (where, number) in QUICK else pytest.mark.slow)
    for where in (
        "before the first step",
        "after a step",
        "in a loader",
        "at the validation",
        "without loaders",
    )
    for number in NUMBERS
]


@pytest.mark.parametrize(("where", "number"), PLACES)
def test_a_signal_to_the_whole_group_saves_and_ends(tmp_path, where, number):
    shapes = {"target": "ldm.training.data.Shapes", "params": {"image_size": 16, "length": 50}}
    signals = {"target": f"{__name__}.Signals", "params": {"image_size": 16, "number": int(number)}}
    # Two loader processes make four batches of two ahead: this one is made when there were steps.
    signals["params"]["place"] = 16 if where == "in a loader" else 2
    config = config_of(signals if where == "in a loader" else shapes, 0 if "without" in where else 2)
    if where == "before the first step":
        params = {"number": int(number)}
        config["lightning"]["callbacks"]["k"] = {"target": f"{__name__}.GroupSignalBefore", "params": params}
    elif where == "at the validation":
        config["data"]["params"]["validation"] = signals
        config["training"]["validate_every"] = 3
    elif where != "in a loader":
        params = {"step": 3, "number": int(number)}
        config["lightning"]["callbacks"]["k"] = {"target": f"{__name__}.GroupSignalAt", "params": params}
    assert in_a_group(config, tmp_path) == 128 + number
    saved = read_state(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
    assert len(figures(tmp_path)) == saved and (saved >= 1 or where == "before the first step")


class Struck(torch.utils.data.Dataset):
    """Items whose loader process is sent a signal amid each."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 1 or (index > 1 and self.number == signal.SIGINT):
            os.kill(os.getpid(), self.number)
        return {"index": index}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_loader_process_outlives_a_signal_that_the_run_must_save_at(number):
    batches = list(Stream(Struck(number), 1, shuffle=False).loader(0, 5, num_workers=1))
    assert [batch["index"] for batch in batches] == [[0], [1], [2], [3], [4]]


def test_a_state_amid_a_step_is_not_saved(tmp_path, monkeypatch):
    """torch raises in this process where a loader process dies, and that may be between two weights."""
    step = torch.optim.AdamW.step

    def lose_a_loader(optimizer):
        step(optimizer)
        if next(iter(optimizer.state.values()))["step"] == 3:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch.optim.AdamW, "step", lose_a_loader)
    config = config_of({"target": "ldm.training.data.Shapes", "params": {"image_size": 16}}, 0)
    config["training"]["checkpoint_every"] = 2
    with pytest.raises(
        ResourceError, match="a loader process died at step 2 .*; its last checkpoint is kept"
    ):
        run(config, tmp_path)
    saved = read_state(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 2 and saved["optimizer_states"][0]["state"][0]["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_the_script_saves_and_ends_whenever_a_signal_comes(tmp_path, number):
    (tmp_path / "in").mkdir()
    for i in range(20):
        Image.new("RGB", (30, 20 + i), (9 * i, 99, 7)).save(tmp_path / "in" / f"{i}.png")
    params = {"folder": str(tmp_path / "in"), "image_size": 16, "caption": "a"}
    config = config_of({"target": "ldm.training.folder.ImageFolder", "params": params})
    del config["model"]["params"]["unet_config"]
    config["model"] = first_stage()["model"]
    config["training"] |= {"print_every": 1e-4}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "a.yaml")
    script = [sys.executable, CHECKOUT / "scripts" / "train.py", "--base", tmp_path / "a.yaml", "--logdir"]
    rng = random.Random(int(number))
    for attempt in range(2):
        folder = tmp_path / f"run{attempt}"
        process = subprocess.Popen(
            [*script, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        lines = rng.randrange(1, 9)
        while lines and (line := process.stdout.readline()):
            lines -= line.startswith("step ")
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (128 + number, "")
        saved = read_state(folder / "checkpoints" / "last.ckpt")["global_step"]
        assert len(figures(folder)) == saved >= 1
