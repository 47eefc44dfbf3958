"""Tiny diffusion models with keyed weights, built as the recorded ones were (tests/golden/diffusion.json)."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from keyed import fill
from torch import nn

from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion

GOLDEN = Path(__file__).parent / "golden"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
KEYED = ("model.", "first_stage")


def config(**changes: Any) -> dict[str, Any]:
    """The recorded model's constructor keywords, some changed."""
    return {**json.loads((GOLDEN / "diffusion.json").read_text())["config"], **changes}


def latent_model(**changes: Any) -> LatentDiffusion:
    """The recorded latent model: 4-channel latents of 8 cells, pictures of 32 pixels, an identity text stage."""
    return fill(LatentDiffusion(**config(**changes)), only=KEYED)


def network(**changes: Any) -> dict[str, Any]:
    """The configuration of the recorded latent model's UNet, some parameters changed."""
    unet = copy.deepcopy(config()["unet_config"])
    unet["params"].update(changes)
    return unet


def pixel_unet() -> dict[str, Any]:
    """The configuration of the recorded pixel model's UNet."""
    return {
        "target": UNET,
        "params": {
            "image_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": [1, 2],
            "attention_resolutions": [2],
            "num_heads": 4,
            "legacy": False,
        },
    }


def pixel_model(**changes: Any) -> DDPM:
    """A pixel model of 8 x 8 pictures and 20 levels, with torch's own initial weights."""
    options = {"timesteps": 20, "use_ema": False, "image_size": 8, "channels": 3, **changes}
    return DDPM(unet_config=pixel_unet(), **options)


class Zero(nn.Module):
    """A network that answers with `value` everywhere, and remembers what it was asked."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.asked: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, **conditions: Any) -> torch.Tensor:
        self.asked.append({"x": x, "t": t, **conditions})
        return self.value.expand_as(x[:, :4])


class TextStage(nn.Module):
    """A text stage that answers every caption with its length, over 7 tokens of 24 features."""

    def __init__(self, scale: float = 0.1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def encode(self, captions: list[str]) -> torch.Tensor:
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return (self.scale * lengths)[:, None, None].expand(-1, 7, 24)


class ClassStage(nn.Module):
    """A class stage: takes the whole batch, answers with one token a label; 9 stands for no class."""

    def encode(self, batch: dict[str, Any]) -> torch.Tensor:
        return batch["cls"].float()[:, None, None].expand(-1, 1, 24)

    def get_unconditional_conditioning(self, batch_size: int, device: Any = "cpu") -> dict[str, Any]:
        return {"cls": torch.full((batch_size,), 9, device=device)}
