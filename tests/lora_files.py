"""Networks that are nothing but the names and shapes of their parameters, and LoRA files in many programs' layouts."""

import json
from pathlib import Path

import torch
from keyed import keyed_input
from torch import nn

from ldm.checkpoints import save_safetensors

GOLDEN = Path(__file__).parent / "golden"
UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."


def skeleton(shapes):
    """A module with parameters of these names and shapes, that have no values."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]
        module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def text_shapes(width=768, layers=12):
    """The names and shapes of CLIP's text encoder."""
    shapes = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
    }
    for n in range(layers):
        linear = {f"self_attn.{one}_proj": (width, width) for one in "qkv"} | {
            "self_attn.out_proj": (width, width)
        }
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            shapes[f"encoder.layers.{n}.{name}.weight"] = shape
            shapes[f"encoder.layers.{n}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{n}.{norm}.{end}": (width,) for end in ("weight", "bias")}
    shapes |= {f"final_layer_norm.{end}": (width,) for end in ("weight", "bias")}
    return {TEXT + name: shape for name, shape in shapes.items()}


def v1_shapes(in_channels=4):
    """The names and shapes of Stable Diffusion v1's UNet and text encoder."""
    recorded = json.loads((GOLDEN / "v1_keys_without_text_encoder.json").read_text())
    recorded = recorded.items() if isinstance(recorded, dict) else recorded
    shapes = {name: tuple(shape) for name, shape in recorded if name.startswith(UNET)}
    shapes[f"{UNET}input_blocks.0.0.weight"] = (320, in_channels, 3, 3)
    return shapes | text_shapes()


def write_lora(path, tensors, metadata=None):
    """Write a file; shapes stand for keyed values, other things for themselves."""
    values = {
        key: 0.3 * keyed_input(f"file.{key}", value) if isinstance(value, tuple) else torch.as_tensor(value)
        for key, value in tensors.items()
    }
    save_safetensors(path, values, metadata or {})
    return path


def write_lora_for(path, model, scale=0.3, only="", metadata=None):
    """Write a LoRA of rank 2 and alpha 1 for the attentions and text encoder of a LatentDiffusion, in kohya's names."""
    tensors = {}
    for name, layer in model.named_modules():
        if only not in name or not isinstance(layer, nn.Linear) or not ("attn" in name or "mlp" in name):
            continue
        short = name.replace(UNET, "lora_unet_")
        if name.startswith("cond_stage_model"):
            short = f"lora_te_text_model_{name[name.index('encoder.layers') :]}"
        short = short.replace(".", "_")
        rows, columns = layer.weight.shape
        tensors[f"{short}.lora_up.weight"] = scale * keyed_input(f"{name}.up", (rows, 2))
        tensors[f"{short}.lora_down.weight"] = scale * keyed_input(f"{name}.down", (2, columns))
        tensors[f"{short}.alpha"] = torch.tensor(1.0)
    save_safetensors(path, tensors, metadata or {})
    return path


# One module that all programs know, as each spells the two factors of its change.
LAYOUTS = {
    "kohya": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_{}.weight",
    "kohya, CompVis's names": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_{}.weight",
    "LyCORIS": "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_{}.weight",
    "diffusers 2023": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{}.weight",
    "the same, of a pipeline": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    ".{}.weight",
    "diffusers 2024": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.{}.weight",
    "PEFT in diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_{AB}.weight",
    "PEFT": "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_{AB}.weight",
    "PEFT, a named adapter": "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ".lora_{AB}.default.weight",
    "ComfyUI": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_{}.weight",
    "CompVis": "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_{}.weight",
    "a converter": "lora_unet_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0_lora_{}.weight",
}
LAYOUT_MODULE = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
TEXT_LAYOUTS = {
    "kohya": "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_{}.weight",
    "kohya's of two encoders": "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_{}.weight",
    "diffusers": "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.{}.weight",
    "PEFT in diffusers": "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_{AB}.weight",
    "PEFT": "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_{AB}.weight",
    "PEFT of transformers 5": "base_model.model.encoder.layers.3.self_attn.q_proj.lora_{AB}.weight",
    "ComfyUI": "clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.lora_{}.weight",
}
TEXT_LAYOUT_MODULE = f"{TEXT}encoder.layers.3.self_attn.q_proj"


def spell(layout, which):
    """Fill in "down" or "up"."""
    return layout.format(which, AB={"down": "A", "up": "B"}[which])
