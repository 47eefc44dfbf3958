"""Functions that tutorials of latent diffusion write out, under their names.

`load_image`, `invert`, `sample` and `edit` are those of ldm.edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.edit import edit, invert, load_image, sample
from ldm.errors import UsageError
from ldm.generate import decode, encode_prompt
from ldm.limits import real, whole
from ldm.models.diffusion.samplers import Denoiser
from ldm.models.diffusion.scheduler import DDIMScheduler
from ldm.models.introspect import downsampling
from ldm.pipeline import StableDiffusion
from ldm.request import check_size, list_texts

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


__all__ = ["edit", "invert", "ldm_text_to_image", "load_image", "sample"]


@torch.no_grad()
def ldm_text_to_image(
    image_shape: Sequence[int],
    text: str | Sequence[str],
    ddim_steps: int = 20,
    eta: float = 0,
    *,
    model: LatentDiffusion | None = None,
    guidance_scale: float = 1.0,
    negative_text: str = "",
    spacing: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Paint a text: noise, DDIM's steps by hand, the VAE's decoder; the whole of latent diffusion in one screen.

    Levels are counted from 0 to T - 1. The list 1000, 950, ..., 50 of texts that count from one is the spacing
    "trailing" (999, 949, ..., 49); "uniform" is 951, 901, ..., 1, with DDIMSampler's numbers. Sketches hand latents to
    the decoder as they are; here they are divided by the model's scale_factor first, as they have to be.

    Args:
        image_shape: of the pictures: (height, width), (3, height, width) or (b, 3, height, width) in pixels; or of the
            noise, (b, c, h, w) in latent cells with the model's own number of channels, 4.
        text: what to paint; one for all pictures, or one for each.
        ddim_steps: 1 to the model's number of levels.
        eta: 0 to 1, fresh noise in each step.
        model: a LatentDiffusion; None is the model in the box.
        guidance_scale: weight of the text against negative_text; 1, as in the sketches, asks for the text alone.
        spacing: a name of ldm.process.spacing.exact_levels.
        generator: on the CPU; None takes torch's own.

    Returns:
        (b, 3, height, width) float32, about [-1, 1].

    Raises:
        UsageError: a value or shape out of range.
    """
    model = StableDiffusion.default().model if model is None else model
    texts = list_texts("text", text)
    shape = _latent_shape(image_shape, model, len(texts))
    if len(texts) == 1:
        texts = texts * shape[0]
    if len(texts) != shape[0]:
        raise UsageError(f"text must be one, or one for each of {shape[0]} pictures, got {len(texts)}")
    eta, T = real("eta", eta, 0, 1), model.num_timesteps
    whole("ddim_steps", ddim_steps, 1, T)
    scale = real("guidance_scale", guidance_scale, 0, 100)

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    ddim_scheduler = DDIMScheduler(model.alphas_cumprod, spacing=spacing)
    uc = encode_prompt(model, [negative_text] * shape[0]) if scale != 1 else None
    c = encode_prompt(model, texts)
    unet = Denoiser(model, c, unconditional_conditioning=uc, guidance_scale=scale)

    zt = noise()
    with model.ema_scope():
        for t in ddim_scheduler.get_timesteps(T, ddim_steps):
            eps, _ = unet(zt, int(t), model.alphas_cumprod[t])
            std = ddim_scheduler.get_std(t, eta)
            zt = ddim_scheduler.get_xt_prev(zt, t, eps, std, noise=noise() if eta else None)
    return decode(model, zt)


def _latent_shape(image_shape: Any, model: LatentDiffusion, texts: int) -> tuple[int, int, int, int]:
    """Read a picture's shape, or the noise's, as the noise's (b, c, h, w)."""
    sides = list(image_shape) if isinstance(image_shape, Sequence | torch.Size) else []
    c, f = model.channels, downsampling(model)
    batch = {2: texts, 3: texts, 4: sides[0] if sides else 0}.get(len(sides))
    colours = {2: 3, 3: sides[0] if sides else 0, 4: sides[1] if len(sides) > 1 else 0}.get(len(sides))
    if batch is None or isinstance(image_shape, str) or colours not in (3, c):
        raise UsageError(
            "image_shape must be (height, width), (3, height, width), (b, 3, height, width) in pixels, or "
            f"(b, {c}, h, w) in latent cells; got {image_shape!r:.80}"
        )
    whole("the number of pictures in image_shape", batch, 1, 1024)
    pixels = [side * f if colours == c != 3 else side for side in sides[-2:]]
    height, width = check_size("height", pixels[0], f), check_size("width", pixels[1], f)
    return batch, c, height // f, width // f
