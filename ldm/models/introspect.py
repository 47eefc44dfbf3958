"""What a latent diffusion model says about itself: its dtype, its sizes, what its UNet reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm.errors import MismatchError

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def dtype_of(module: nn.Module) -> torch.dtype:
    """Tell what a module computes in: the dtype of its first floating-point weight; of a model, its UNet's."""
    module = getattr(module, "model", module)
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def downsampling(model: LatentDiffusion) -> int:
    """Tell how many pixels a latent cell is wide: 8 for Stable Diffusion v1."""
    encoder = getattr(model.first_stage_model, "encoder", None)
    return 2 ** (encoder.num_resolutions - 1) if encoder is not None else 1


def is_inpainting(model: LatentDiffusion) -> bool:
    """Tell a 9-channel inpainting UNet (noisy latents, mask, masked picture) from a 4-channel one.

    Raises:
        MismatchError: the UNet takes neither.
    """
    unet = model.model.diffusion_model
    wants = unet.input_blocks[0][0].weight.shape[1]
    if wants == model.channels:
        return False
    if wants == 2 * model.channels + 1:
        return True
    raise MismatchError(
        f"the UNet takes {wants} channels; wanted {model.channels} (a plain model) or "
        f"{2 * model.channels + 1} (an inpainting model)"
    )


def native_size(model: LatentDiffusion) -> tuple[int, int]:
    """Tell the (height, width) in pixels that the model was trained at: 512 x 512 for Stable Diffusion v1."""
    sides = model.image_size
    h, w = (sides, sides) if isinstance(sides, int) else sides
    f = downsampling(model)
    return h * f, w * f


def context_width(model: LatentDiffusion) -> int | None:
    """Tell how many features a token of the prompt has for the UNet's cross-attentions: 768 for v1."""
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith("attn2") and isinstance(getattr(module, "to_k", None), nn.Linear):
            return module.to_k.in_features
    return None
