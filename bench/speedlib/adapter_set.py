"""A ControlNet, a LoRA and an IP-Adapter together on one UNet: made-up files for both libraries, and a guided step."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.speedlib import models
from ldm.adapters import ControlNet, IPAdapter, LoRA
from ldm.checkpoints import read_tensors, save_safetensors
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.key_mapping import control_to_diffusers
from ldm.kernels import optimize, restore
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.modules.processors import named_attentions
from ldm.modules.seams import Scope, StepInfo

CONTROL_SCALE, LORA_WEIGHT, IMAGE_SCALE = 0.8, 0.7, 0.6
WIDTH, TOKENS = 1024, 4  # of what the plain IP-Adapter reads, and of what it gives


def make_files(shape: models.Geometry, folder: Path) -> dict[str, Path]:
    """Write a ControlNet and an IP-Adapter for a geometry's UNet, in float16, under their authors' names."""
    unet = build_empty(shape.settings).model.diffusion_model
    generator = torch.Generator().manual_seed(16)

    def made(sizes: tuple[int, ...], spread: float = 1.0) -> Tensor:
        fan = max(1, torch.Size(sizes[1:]).numel())
        return models.exactly(spread * torch.randn(sizes, generator=generator) / fan**0.5).half()

    with torch.device("meta"):
        control = ControlNetModel(
            unet.in_channels, unet.model_channels, 3, unet.num_res_blocks, unet.attention_resolutions,
            channel_mult=unet.channel_mult, num_heads=unet.num_heads, context_dim=shape.width,
        )  # fmt: skip
    # As trained ones do, it answers with small maps.
    zeros = ("zero_convs", "middle_block_out")
    tensors = {}
    for name, one in control.state_dict().items():
        is_norm = one.dim() == 1 and name.endswith("weight")
        tensors[name] = (
            torch.ones(one.shape).half() if is_norm else made(one.shape, 0.1 if name.startswith(zeros) else 1)
        )
    image = {
        "image_proj.proj.weight": made((TOKENS * shape.width, WIDTH)),
        "image_proj.proj.bias": torch.zeros(TOKENS * shape.width).half(),
        "image_proj.norm.weight": torch.ones(shape.width).half(),
        "image_proj.norm.bias": torch.zeros(shape.width).half(),
    }
    for i, one in enumerate(named_attentions(unet).values()):
        if i % 2:
            for part in "kv":
                image[f"ip_adapter.{i}.to_{part}_ip.weight"] = made(tuple(one.to_k.weight.shape))
    paths = {"control": folder / "control.safetensors", "image": folder / "image.safetensors"}
    for name, state in (("control", tensors), ("image", image)):
        save_safetensors(paths[name], state, {})
    return paths


def make_extras(px: int) -> dict[str, Tensor]:
    """Make up a hint and a picture's embedding."""
    generator = torch.Generator().manual_seed(160)
    hint = models.exactly(torch.rand(1, 3, px, px, generator=generator)).float()
    return {"hint": hint, "embeds": models.exactly(torch.randn(1, WIDTH, generator=generator)).float()}


def our_set(
    shape: models.Geometry,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    files: dict[str, Path],
    extras: dict[str, Tensor],
    optimized: bool,
    stack: ExitStack,
) -> Callable[[], Tensor]:
    """Build our model with the set; gives what makes a step, which attaches it and takes it off again."""
    model = models.build_ours(shape, weights, inputs["x"].device)
    if optimized:
        optimize(model)
        stack.callback(restore, model)
    adapters = [
        LoRA(files["lora"], LORA_WEIGHT),
        IPAdapter(files["image"], scale=IMAGE_SCALE, embeds=extras["embeds"]),
        ControlNet(files["control"], extras["hint"], CONTROL_SCALE),
    ]
    for one in adapters:
        one.at(StepInfo(0, 1, unconditional=1))
    scope = Scope(model.model.diffusion_model, adapters)

    def step() -> Tensor:
        with scope:
            return model.apply_model(inputs["x"], inputs["t"], inputs["context"])

    return step


def their_set(
    shape: models.Geometry,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    files: dict[str, Path],
    extras: dict[str, Tensor],
    load_loras: Callable[[Any, list[Path]], None],
) -> Callable[[], Tensor]:
    """Build diffusers' UNet and ControlNet with the set on."""
    from diffusers import ControlNetModel as TheirControlNet

    x, t, context = inputs["x"], inputs["t"], inputs["context"]
    unet = models.build_their_unet(shape, weights, x.device)
    control = TheirControlNet.from_unet(unet, load_weights_from_unet=False)
    tensors, _ = read_tensors(files["control"])
    names = control_to_diffusers(tensors)
    control.load_state_dict({names[name]: one for name, one in tensors.items()})
    control.to(x.device, x.dtype).eval()
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, one in read_tensors(files["image"])[0].items():
        part, _, rest = name.partition(".")
        nested[part][rest] = one
    unet._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [IMAGE_SCALE]
    load_loras(unet, [files["lora"]])
    unet.to(x.device, x.dtype)  # the files are float16
    hint = extras["hint"].to(x).expand(len(x), -1, -1, -1)
    embeds = torch.stack([torch.zeros_like(extras["embeds"]), extras["embeds"]]).to(x)

    def step() -> Tensor:
        down, middle = control(x, t, context, hint, conditioning_scale=CONTROL_SCALE, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return unet(x, t, context, added_cond_kwargs={"image_embeds": [embeds]}, return_dict=False, **more)[0]

    return step
