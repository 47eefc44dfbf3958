"""The ends of painting: prompts to features, pictures to latents, and latents to pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.use import text_scope, vae_scope
from ldm.devices import dtype_name
from ldm.errors import NumericError
from ldm.models.diffusion.conditions import Condition, ScheduledCondition
from ldm.models.diffusion.samplers import SAMPLERS, Noise
from ldm.models.introspect import downsampling, dtype_of
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.passes import ImageSpec, Pass, Request, Start

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

MOST_TEXTS = 256  # whose features are kept from one batch or pass to the next


def encode_prompt(
    model: LatentDiffusion, prompts: Sequence[str], known: dict[str, Tensor] | None = None
) -> Tensor:
    """Turn prompts into text features, (b, n, d).

    Each distinct prompt is encoded once and alone, so that its features do not depend on its neighbours.

    Args:
        known: features of earlier prompts; new ones are added.
    """
    known = {} if known is None else known
    for prompt in prompts:
        if prompt not in known:
            known[prompt] = model.get_learned_conditioning([prompt])
    return torch.cat([known[prompt] for prompt in prompts])


def encode_prompts(
    model: LatentDiffusion, request: Request, one: Pass, batch: Sequence[ImageSpec], shared: dict[str, Any]
) -> tuple[Tensor | ScheduledCondition, Tensor | ScheduledCondition | None, list[list[str]]]:
    """Encode prompts and, if guidance needs them, negative prompts; list the words that did not fit.

    Args:
        one, batch: a pass, and the images that are painted at once, as it paints them.
        shared: what the batches and passes of a request use again: features of their prompts, and the text encoder's
            adapters.

    Returns:
        context and unconditional context, (b, n, d) each (None where nothing is guided), with regions as
        ScheduledCondition; and dropped words.
    """
    guided = one.guidance_scale != 1.0 or SAMPLERS[one.sampler].needs_unconditional
    if request.embeds is not None:
        rows = [spec.row for spec in batch]
        context = request.embeds[rows].to(model.device)
        unconditional = request.negative_embeds[rows].to(model.device) if guided else None
        return context, unconditional, [[] for _ in batch]
    known: dict[str, Tensor] = shared.setdefault("features", {})
    regional = [region.prompt for region in request.regions]
    if len(known) > MOST_TEXTS:
        known.clear()
    negatives = [spec.negative_prompt for spec in batch]
    if "text_scope" not in shared:
        shared["text_scope"] = text_scope(model, request.adapters)
    with shared["text_scope"]:
        context = encode_prompt(model, [spec.prompt for spec in batch], known)
        unconditional = encode_prompt(model, negatives, known) if guided else None
        if regional:
            rows = encode_prompt(model, regional, known)
            further = [
                Condition(row, region.weight, area=one.area_of(region, downsampling(model)))
                for row, region in zip(rows, request.regions, strict=True)
            ]
            context = ScheduledCondition([[Condition(row), *further] for row in context])
            if guided:
                unconditional = ScheduledCondition([[Condition(row)] for row in unconditional])
        dropped_words = getattr(model.cond_stage_model, "dropped_words", lambda text: [])
        dropped = [
            [word for text in (spec.prompt, *regional) for word in dropped_words(text)]
            + (dropped_words(spec.negative_prompt) if guided else [])
            for spec in batch
        ]
    return context, unconditional, dropped


def encode_image(model: LatentDiffusion, image: Tensor, count: int, noise: Noise) -> Tensor:
    """Turn one picture (1, 3, height, width) into `count` samples of its latents, scaled units.

    The sampling noise is drawn on the CPU, as CompVis's DiagonalGaussianDistribution does on every device.
    """

    def encode() -> Tensor:
        posterior = model.encode_first_stage(image.to(model.device))
        if not isinstance(posterior, DiagonalGaussianDistribution):
            return posterior.float().expand(count, -1, -1, -1)
        mean, std = posterior.mean.float(), posterior.std.float()  # (1, c, h, w)
        return mean + std * draw.to(mean.device)

    f = downsampling(model)
    draw = noise(torch.empty(count, model.channels, image.shape[2] // f, image.shape[3] // f))
    return model.scale_factor * _in_finite_precision(model, "the VAE's encoder", encode)


def encode_source(
    model: LatentDiffusion,
    request: Request,
    image: Tensor,
    b: int,
    noise: Noise,
    shared: dict[str, Any],
    key: str,
) -> Tensor:
    """Encode a picture (1, 3, height, width) for b images; CompVis encodes it once, before its first batch.

    Args:
        shared, key: where its latents are kept from one batch to the next, and under which name.
    """
    if request.arithmetic == "diffusers":  # which has pictures so in memory, and convolutions run by that
        image = image.clone(memory_format=torch.channels_last)
    with vae_scope(model, request.attachments):
        if request.rng != "compvis":
            return encode_image(model, image, b, noise)
        if key not in shared:
            count = min(request.batch_size, len(request.images))
            shared[key] = encode_image(model, image, count, noise)
        return shared[key][:b]


def encode_each(model: LatentDiffusion, request: Request, images: Tensor, noise: Noise) -> Tensor:
    """Encode pictures (b, 3, height, width) in [-1, 1], each as one to start from is: (b, c, h, w)."""
    b, _, height, width = images.shape
    f = downsampling(model)
    draws = noise(torch.empty(b, model.channels, height // f, width // f))
    with vae_scope(model, request.attachments):
        return torch.cat(
            [
                encode_image(model, picture[None], 1, lambda like, draw=draw: draw[None])
                for picture, draw in zip(images, draws, strict=True)
            ]
        )


def masked_picture(
    model: LatentDiffusion,
    request: Request,
    one: Pass,
    images: Tensor | None,
    b: int,
    noise: Noise,
    shared: dict[str, Any],
) -> Tensor:
    """Make what a 9-channel UNet sees beside its latents, (b, 1 + c, h, w): mask, then masked picture.

    Without a mask everything is to be repainted and the picture is grey, as its training had it.

    Args:
        images: (1 or b, 3, height, width) that the pass begins with, where it has a mask.
    """
    f = downsampling(model)
    size = (one.height, one.width)
    mask = torch.ones(1, 1, *size) if one.start.mask is None else one.start.mask
    seen = torch.zeros(1, 3, *size) if one.start.mask is None else images * (mask < 0.5)
    if len(seen) == 1:
        z = encode_source(model, request, seen, b, noise, shared, "masked")
    else:
        z = encode_each(model, request, seen, noise)
    return torch.cat([pictures.shrink_mask(mask, f, "nearest").to(z).expand(b, -1, -1, -1), z], dim=1)


def beside(concat: Tensor, context: Any) -> Any:
    """Put what a 9-channel UNet sees beside its latents into a condition; None stays None."""
    if isinstance(context, ScheduledCondition):
        return ScheduledCondition(context.pictures, concat)
    return None if context is None else {"c_concat": [concat], "c_crossattn": [context]}


def decode(model: LatentDiffusion, latents: Tensor, at_once: bool = False) -> Tensor:
    """Turn latents (b, c, h, w), scaled units, on any device, into pictures (b, 3, f h, f w), float32, about [-1, 1].

    One picture at a time: memory stays that of one, and a picture does not depend on its neighbours. A
    decoder in half precision that overflows is put into float32 and stays there.

    Args:
        at_once: the whole batch in one, its latents divided by the scale and not multiplied by its reciprocal: digit
            by digit as diffusers does.

    Raises:
        NumericError: pictures that are not finite in float32 either.
    """

    def one_by_one() -> Tensor:
        return torch.cat([model.decode_first_stage(z[None].float().to(model.device)) for z in latents])

    def whole() -> Tensor:
        z = latents.float().to(model.device) / model.scale_factor
        return model.first_stage_model.decode(z.to(dtype_of(model.first_stage_model))).float()

    return _in_finite_precision(model, "the VAE's decoder", whole if at_once else one_by_one)


def _in_finite_precision(model: LatentDiffusion, stage: str, work: Callable[[], Tensor]) -> Tensor:
    """Let the VAE work, and once more in float32 if what comes out is not finite."""
    vae = model.first_stage_model
    dtype = dtype_of(vae)
    result = work()
    if not torch.isfinite(result).all() and dtype != torch.float32:
        log.warning("%s overflowed in %s and was put into float32", stage, dtype_name(dtype))
        vae.float()
        dtype = torch.float32
        result = work()
    if not torch.isfinite(result).all():
        raise NumericError(
            f"{stage} gave values that are not finite, in {dtype_name(dtype)}; nothing was saved; check the model file"
        )
    return result


def picture_of(
    model: LatentDiffusion, request: Request, start: Start, latents: Tensor | None, b: int
) -> tuple[Tensor, np.ndarray]:
    """Give the pictures of what a pass gave, on the CPU; what is kept is pasted in.

    Args:
        start: of the pass.
        latents: (b, c, h, w); None stands for the picture that it started from.

    Returns:
        (b, 3, height, width) in [0, 1], and (b, height, width, 3) uint8, rounded as the request says.
    """
    if latents is None:
        unit = start.original.repeat(b, 1, 1, 1)
        return unit, pictures.unit_to_uint8(unit)
    with vae_scope(model, request.attachments):
        x = decode(model, latents, at_once=request.arithmetic == "diffusers")
    unit, pixels = pictures.to_unit(x).cpu(), pictures.to_uint8(x, request.rounding)
    if start.frame is not None:
        frame = start.frame if start.kept == "pixels" else replace(start.frame, weights=None)
        return frame.lay(unit, pixels)
    if start.mask is None or start.kept == "latents":
        return unit, pixels
    is_painted = start.mask[0, 0, :, :, None].numpy() >= 0.5
    kept = pictures.unit_to_uint8(start.original)  # whose bytes are exact
    return pictures.paste(unit, start.original, start.mask), np.where(is_painted, pixels, kept)


def latents_of(
    model: LatentDiffusion, request: Request, start: Start, latents: Tensor | None, b: int
) -> Tensor:
    """Give the latents (b, c, h, w) of what a pass gave, where that is the picture that it started from, too."""
    if latents is not None:
        return latents
    with vae_scope(model, request.attachments):
        return encode_image(model, start.image, b, torch.zeros_like)
