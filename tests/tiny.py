"""A latent diffusion model small enough for every test, with the parts and key names of a real one."""

import copy
import functools
from pathlib import Path

import torch
from keyed import fill

from ldm.models.diffusion.ddpm import LatentDiffusion, LatentInpaintDiffusion

TEXT = "model_data/shapes/text"


def tiny_config(in_channels: int = 4) -> dict:
    """CompVis's keys: f = 8, 64 x 64 pixels, latents 4 x 8 x 8, 32 tokens of width 128; 9 channels inpaint."""
    inpaints = in_channels == 9
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm."
            + ("LatentInpaintDiffusion" if inpaints else "LatentDiffusion"),
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.012,
                "timesteps": 1000,
                "first_stage_key": "image",
                "cond_stage_key": "txt",
                "image_size": 8,
                "channels": 4,
                "conditioning_key": "hybrid" if inpaints else "crossattn",
                "scale_factor": 0.18215,
                "use_ema": False,
                **({"finetune_keys": None} if inpaints else {}),
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": 8,
                        "in_channels": in_channels,
                        "out_channels": 4,
                        "model_channels": 32,
                        "num_res_blocks": 1,
                        "channel_mult": [1, 2],
                        "attention_resolutions": [1, 2],
                        "num_heads": 4,
                        "use_spatial_transformer": True,
                        "transformer_depth": 1,
                        "context_dim": 128,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.AutoencoderKL",
                    "params": {
                        "embed_dim": 4,
                        "lossconfig": {"target": "torch.nn.Identity"},
                        "ddconfig": {
                            "double_z": True,
                            "z_channels": 4,
                            "resolution": 64,
                            "in_channels": 3,
                            "out_ch": 3,
                            "ch": 32,
                            "ch_mult": [1, 1, 1, 1],
                            "num_res_blocks": 1,
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                    },
                },
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"version": TEXT, "max_length": 32},
                },
            },
        }
    }


def tiny_model(in_channels: int = 4) -> LatentDiffusion:
    """Give a model of the caller's own, with weights from its key names."""
    return copy.deepcopy(_built_once(in_channels))  # half the time that building takes


def build_tiny(in_channels: int = 4) -> LatentDiffusion:
    """Build that model anew, of whatever its classes are now."""
    cls = LatentInpaintDiffusion if in_channels == 9 else LatentDiffusion
    params = tiny_config(in_channels)["model"]["params"]
    return fill(cls(**params), only=("model.", "first_stage_model.", "cond_stage_model."))


_built_once = functools.cache(build_tiny)


def write_tiny(
    folder: Path, in_channels: int = 4, poison: str | None = None, value: float = float("nan")
) -> tuple[Path, Path]:
    """Write the model as a checkpoint and its config.yaml; returns (checkpoint, config).

    Args:
        poison: a key whose weights all become `value`.
    """
    from omegaconf import OmegaConf

    from ldm.checkpoints import save_safetensors

    tensors = {key: value.contiguous() for key, value in tiny_model(in_channels).state_dict().items()}
    if poison is not None:
        tensors[poison] = torch.full_like(tensors[poison], value)
    checkpoint, config = folder / "tiny.safetensors", folder / "tiny.yaml"
    save_safetensors(checkpoint, tensors, {})
    OmegaConf.save(OmegaConf.create(tiny_config(in_channels)), config)
    return checkpoint, config
