"""What keeps the part of an image that is not repainted: four programs' rules."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.diffusion.levels import Noise

# Rules by which the sample is blended before a step, and by which the predicted clean sample is.
OF_SAMPLES = ("compvis", "diffusers", "comfyui")
OF_PREDICTIONS = ("a1111", "comfyui")

# (z, noise) -> z noised to a level.
Noised = Callable[[Tensor, Tensor], Tensor]


def keeping(
    rule: str, mask: Tensor, x0: Tensor, draw: Noise, x_T: Tensor
) -> Callable[[Tensor, Noised, bool], Tensor] | None:
    """Make what blends the known image into a sample before each step; None where the rule blends no sample.

    Args:
        rule: "compvis": x0 noised afresh, before every step. "diffusers": noised by x_T, before every step but the
            first. "comfyui": noised by x_T, before every step.
        mask, x0: 1 keeps the clean x0.
        draw: of fresh noise.
        x_T: (b, ...) the unit noise that the run begins with.

    Returns:
        a function of the sample (b, ...), what noises a clean one to its level, and whether the step is the first.
    """

    def blended(x: Tensor, noised: Noised, is_first: bool) -> Tensor:
        if rule == "diffusers" and is_first:
            return x
        noise = draw(x0) if rule == "compvis" else x_T
        return mask * noised(x0, noise) + (1 - mask) * x

    mask = mask.contiguous()
    return blended if rule in OF_SAMPLES else None


def kept_at_last(rule: str, mask: Tensor, x0: Tensor, x: Tensor) -> Tensor:
    """Keep the known image in what a run gave (b, ...): no rule's last step has blended it, but ComfyUI's.

    Its masks may be shares; for a mask of 0 and 1 all are the same numbers. diffusers' sum has its layout in memory.
    """
    if rule == "comfyui":
        return x
    if rule == "diffusers":
        mask = mask.contiguous()
        return mask * x0 + (1 - mask) * x
    return torch.where(mask >= 0.5, x0, x)
