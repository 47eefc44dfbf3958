"""Files of a ControlNet, a T2I-Adapter and an IP-Adapter for the tiny model, with weights from their key names."""

from pathlib import Path

import torch
from keyed import fill, weight
from tiny import tiny_model

from ldm.checkpoints import save_safetensors
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.modules.processors import named_attentions


def write_control(path):
    with torch.device("meta"):
        network = ControlNetModel.beside(tiny_model().model.diffusion_model)
    state = {name: weight(f"control.{name}", tuple(one.shape)) for name, one in network.state_dict().items()}
    save_safetensors(path, state, {})


def write_sketch(path):
    unet = tiny_model().model.diffusion_model
    width = [unet.model_channels * mult for mult in unet.channel_mult]
    shapes = {"conv_in.weight": (width[0], 192, 3, 3), "conv_in.bias": (width[0],)}
    before = width[0]
    for i, one in enumerate(width):
        if one != before:
            shapes |= {f"body.{i}.in_conv.weight": (one, before, 1, 1), f"body.{i}.in_conv.bias": (one,)}
        shapes |= {f"body.{i}.block1.weight": (one, one, 3, 3), f"body.{i}.block1.bias": (one,)}
        shapes |= {f"body.{i}.block2.weight": (one, one, 1, 1), f"body.{i}.block2.bias": (one,)}
        before = one
    save_safetensors(path, {k: weight(f"t2i.{k}", s) for k, s in shapes.items()}, {})


def write_look(folder="."):
    """Write an IP-Adapter, look.safetensors, and the vision model that it reads, clip/."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=36, projection_dim=20, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    fill(CLIPVisionModelWithProjection(config), "clip.").save_pretrained(Path(folder) / "clip")
    write_image_adapter(Path(folder) / "look.safetensors")


def write_image_adapter(path):
    """Write an IP-Adapter of features of width 20."""
    shapes = {"proj.weight": (384, 20), "proj.bias": (384,), "norm.weight": (128,), "norm.bias": (128,)}
    tensors = {f"image_proj.{name}": weight(f"look.{name}", shape) for name, shape in shapes.items()}
    for i, one in enumerate(named_attentions(tiny_model().model.diffusion_model).values()):
        for part in "kv" if i % 2 else "":
            name = f"ip_adapter.{i}.to_{part}_ip.weight"
            tensors[name] = weight(f"look.{name}", tuple(one.to_k.weight.shape))
    save_safetensors(path, tensors, {})
