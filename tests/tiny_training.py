"""Training configurations of a size for tests: pictures of 16 pixels, networks of 32 channels."""

import copy
import errno
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from ldm.training.callbacks import AfterSteps
from ldm.training.data import Shapes

DDCONFIG = {
    "double_z": True,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
TEXT = "model_data/shapes/text"


class Layer(torch.nn.Module):
    """The least that is a network."""

    def __init__(self):
        super().__init__()
        self.colours = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, timesteps, context=None):
        return self.colours(x)


def first_stage(**loss: Any) -> dict[str, Any]:
    """Make the configuration of a first-stage run of 6 steps."""
    params = {"disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.0, "kl_weight": 1e-6}
    params |= {"disc_ndf": 8, "disc_num_layers": 1, **loss}
    return copy.deepcopy(
        {
            "model": {
                "base_learning_rate": 1e-3,
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 3,
                    "ddconfig": DDCONFIG,
                    "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params},
                },
            },
            "data": shapes_data(batch_size=2),
            "training": {"checkpoint_every": 2, "validate_every": 100, "curve_every": 0, "image_steps": 2},
            "lightning": {"trainer": {"max_steps": 6, "accelerator": "cpu"}},
        }
    )


def diffusion(first_stage_weights: str | None = None, **params: Any) -> dict[str, Any]:
    """Make the configuration of a diffusion run of 6 steps on 8 x 8 latents."""
    config = first_stage()
    config["training"]["checkpoint_every"] = 100
    stage = {"embed_dim": 3, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}}
    if first_stage_weights is not None:
        stage["ckpt_path"] = first_stage_weights
    config["model"] = {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "timesteps": 50,
            "first_stage_key": "image",
            "cond_stage_key": "caption",
            "image_size": 8,
            "channels": 3,
            "conditioning_key": "crossattn",
            "cond_stage_trainable": True,
            "scale_by_std": True,
            "ucg_training": {"caption": {"p": 0.3, "val": ""}},
            "scheduler_config": {
                "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                "params": {
                    "warm_up_steps": [2],
                    "cycle_lengths": [6],
                    "f_start": [0.1],
                    "f_max": [1.0],
                    "f_min": [0.0],
                },
            },
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 8,
                    "in_channels": 3,
                    "out_channels": 3,
                    "model_channels": 32,
                    "channel_mult": [1, 2],
                    "num_res_blocks": 1,
                    "attention_resolutions": [2],
                    "num_heads": 2,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 128,
                    "use_checkpoint": False,
                    "legacy": False,
                },
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": stage},
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {"version": TEXT, "max_length": 32, "freeze": False},
            },
            **params,
        },
    }
    return config


def shapes_data(**params: Any) -> dict[str, Any]:
    return {
        "target": "main.DataModuleFromConfig",
        "params": {
            "train": {"target": "ldm.training.data.Shapes", "params": {"image_size": 16}},
            **params,
        },
    }


def run(config: dict[str, Any], folder: Path, **options: Any) -> Any:
    """Build a run, quiet, and take it to its end; returns it, with the exit code as `code`."""
    from ldm.training.trainer import Run, RunOptions

    made = Run(RunOptions(config=OmegaConf.create(config), folder=folder, **{"seed": 5, **options}))
    made.code = made.fit()
    return made


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set a value of a configuration by its place, such as "model.params.embed_dim"."""
    *way, last = path.split(".")
    for name in way:
        config = config.setdefault(name, {})
    config[last] = value


def figures(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """Read one figure of every step from a run's log; no step may be there twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line[name]) for line in lines if name in line]
    assert len(dict(points)) == len(points), points
    return dict(points)


class NotFinite(Shapes):
    """Shapes whose samples of some optimizer steps are NaN."""

    def __init__(self, steps: list[int] | None = None, **params: Any):
        super().__init__(**params)
        self.steps = steps

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        made = super().item(index, rng, step)
        if self.steps is None or step in self.steps:
            made["image"] = made["image"] * np.float32("nan")
        return made


class Finite(Shapes):
    """Shapes that come round and so are shuffled."""

    is_endless = False


class DiesAt(Shapes):
    """Shapes whose loader process is killed at an optimizer step."""

    def __init__(self, step: int, **params: Any):
        super().__init__(**params)
        self.step = step

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().item(index, rng, step)


class BrokenHandover:
    """Part of a batch whose maker is killed as soon as anyone unpacks it."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return break_handover, (os.getpid(),)


def break_handover(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class DiesHandingOver(Shapes):
    """Shapes whose loader process is killed between announcing a batch and handing it over."""

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        made = super().item(index, rng, step)
        return {**made, "extra": BrokenHandover()} if step == 4 else made


class Raises(Shapes):
    """Shapes that raise in their loader process."""

    def __init__(self, error: str, **params: Any):
        super().__init__(**params)
        self.error = {"RuntimeError": RuntimeError, "ConnectionResetError": ConnectionResetError}[error]

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        raise self.error("the source's own trouble")


class Odd(Shapes):
    """Shapes that divide by zero in their loader process."""

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        return {"image": 1 // 0}


class SignalAt(AfterSteps):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: int, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def after_step(self, trainer: Any, module: Any, batch: Any) -> None:
        if module.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def in_child(act: Callable[[], Any]) -> int:
    """Run act in a forked process; returns its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
