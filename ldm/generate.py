"""From prompt to picture: encode the prompt, draw noise, denoise step by step, decode.

Read `paint_batch` first. Its steps are here and in ldm.encoding, denoising and finishing. What may be asked of a
model is checked in ldm.request, what is painted of it is in ldm.passes, what comes out in ldm.results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.use import for_batch, for_part, unet_attachments
from ldm.denoising import WithAttachments, denoise  # noqa: F401
from ldm.encoding import (
    beside,
    decode,  # noqa: F401 (this and others so marked are imported from here by other people's code)
    encode_each,
    encode_image,  # noqa: F401
    encode_prompt,  # noqa: F401
    encode_prompts,
    encode_source,
    latents_of,
    masked_picture,
    picture_of,
)
from ldm.finishing import finish_batch
from ldm.helpers import living_in
from ldm.hires import LATENT, enlarge_latents, enlarge_pictures, middle
from ldm.limits import STRETCHED_RULES
from ldm.models.diffusion.samplers.masks import kept_at_last
from ldm.models.introspect import downsampling, is_inpainting
from ldm.noise import (
    CompVisNoise,  # noqa: F401 (this and the next three are imported from here by other people's code)
    ImageNoise,  # noqa: F401
    NvNoise,  # noqa: F401
    SeedOptions,
    Source,
    noise_sources,
    seed_everything,  # noqa: F401
)
from ldm.passes import ImageSpec, Pass, Request
from ldm.prompting import encode_batch, reads_languages
from ldm.results import Progress
from ldm.sources import FILLED_LATENTS, NOISE

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def initial_latents(model: LatentDiffusion, count: int, height: int, width: int, noise: Source) -> Tensor:
    """Draw x_T, (count, c, height / f, width / f), on the model's device."""
    f = downsampling(model)
    like = torch.empty(count, model.channels, height // f, width // f, device=model.device)
    return noise.begin(like)


def starting_noise(
    model: LatentDiffusion, request: Request, one: Pass, b: int, noise: Source, shared: dict[str, Any]
) -> Tensor:
    """Draw x_T (b, c, h, w) for a batch; fixed_code in CompVis's order of draws takes that of the first batch again."""
    if not (request.fixed_code and request.rng == "compvis"):
        return initial_latents(model, b, one.height, one.width, noise)
    if "x_T" not in shared:
        shared["x_T"] = initial_latents(model, request.batch_size, one.height, one.width, noise)
    return shared["x_T"][:b]


# --- from prompt to picture -----------------------------------------------------------------------


def paint_batch(
    model: LatentDiffusion,
    request: Request,
    batch: Sequence[ImageSpec],
    shared: dict[str, Any],
    progress: Callable[..., Progress],
    name: str | None = None,
    file: Path | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[Progress]:
    """Paint one batch, pass by pass: encode the prompts, draw noise, denoise step by step; then decode.

    Args:
        batch: those of request.images that are painted at once.
        shared: what the batches and passes of a request use again; empty at first.
        progress: makes the Progress of a step.
        name, file: of the model, for the pictures' metadata.
        autocast: see denoise.
    """
    done, latents = 0, None
    tiles: list[np.ndarray] = []
    dropped: list[list[str]] = [[] for _ in batch]
    for place, one in enumerate(request.passes):
        keywords, words = begin_pass(model, request, place, batch, shared, latents)
        dropped = [[*dict.fromkeys((*old, *new))] for old, new in zip(dropped, words, strict=True)]
        if one.gives_its_picture:
            latents = None
        else:
            to_come = sum(later.count for later in request.passes[place + 1 :])
            before = done
            for step in denoise(model, **keywords, autocast=autocast):
                latents = step.x_t
                done = before + step.index + 1
                yield progress(done, before + step.total + to_come, x_t=latents, pred_x0=step.pred_x0)
            if "mask" in keywords:
                latents = kept_at_last(one.start.mask_rule, keywords["mask"], keywords["x0"], latents)
        if request.tiles is not None:
            tiles.append(picture_of(model, request, one.start, latents, len(batch))[1])
    result = finish_batch(model, request, batch, latents, tiles, dropped, name, file, autocast)
    yield progress(done, done, x_t=result.latents, pred_x0=result.latents, result=result)


def begin_pass(
    model: LatentDiffusion,
    request: Request,
    place: int,
    batch: Sequence[ImageSpec],
    shared: dict[str, Any],
    before: Tensor | None,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Encode the prompts of a pass, and what it starts from, and draw its noise: all that denoise needs.

    Args:
        place: of the pass, counted from 0.
        shared: as in paint_batch.
        before: (b, c, h, w) latents that the pass before gave; None is the picture that it started from.

    Returns:
        keywords of denoise, nothing where the picture to start from is the answer; and each prompt's dropped words.
    """
    texts, shared = shared.setdefault("texts", {}), shared.setdefault(place, {})
    one = request.passes[place]
    batch = one.images(batch)
    b = len(batch)
    f = downsampling(model)
    resize_from = request.seed_resize_from and tuple(side // f for side in reversed(request.seed_resize_from))
    extra = SeedOptions(
        [spec.variation_seed for spec in batch],
        request.variation_strength,
        resize_from,
        request.eta_noise_seed_delta,
    )
    places = [spec.place for spec in batch]
    noise, encoder_noise = noise_sources(
        request.rng, [spec.seed for spec in batch], extra, len(request.images), places
    )
    if request.embeds is None and reads_languages(request):
        context, unconditional = encode_batch(model, request, one, batch, texts)
        dropped = [[] for _ in batch]
    else:
        context, unconditional, dropped = encode_prompts(model, request, one, batch, texts)
    if one.gives_its_picture:
        return {}, dropped
    keywords: dict[str, Any] = {"noise": noise, **vars(one.sampling), **vars(one.guidance)}

    # Where to start: pure noise, or a picture noised to the level of its strength.
    start, z, images = one.start, None, one.start.image
    is_whole = start.mask is not None and start.strength == 1
    is_early = request.rng == "diffusers"  # x_T is drawn before the masked picture's noise
    if start.kind == "picture" and not (is_early and is_whole and is_inpainting(model)):
        z = encode_source(model, request, images, b, encoder_noise, shared, "picture")
        z = in_cells(z, one, f)
    elif start.kind == "before" and start.upscaler in LATENT:
        z = enlarge(model, request, place, before, b)
    elif start.kind == "before":
        images = pictures_before(model, request, place, before, b)
        z = encode_each(model, request, images, encoder_noise)
    if request.arithmetic == "diffusers" and start.mask is not None and z is not None:
        z = z.contiguous()  # their layout in memory, by which convolutions run
    x_T = starting_noise(model, request, one, b, noise, shared) if is_early else None
    if is_inpainting(model):
        concat = masked_picture(model, request, one, images, b, encoder_noise, shared)
        context, unconditional = (beside(concat, condition) for condition in (context, unconditional))
    x_T = starting_noise(model, request, one, b, noise, shared) if x_T is None else x_T
    if start.mask is not None and z is not None:
        cells = pictures.shrink_mask(start.mask, f, start.mask_cells).to(z)
        if start.inpaint_fill in FILLED_LATENTS:
            z = pictures.paste(x_T if start.inpaint_fill == NOISE else torch.zeros_like(z), z, cells)
        if not is_inpainting(model):
            # CompVis's samplers mean the opposite of a user's mask: 1 keeps x0.
            mask = (1.0 - cells).expand(b, -1, -1, -1)
            keywords |= {"mask": mask, "x0": z, "mask_rule": start.mask_rule}
            if is_early:  # diffusers encodes a masked picture that a 4-channel model does not see
                encoder_noise(torch.empty(1, *z.shape[1:]))
    if z is not None:
        is_forgotten = request.arithmetic == "diffusers" and is_whole  # theirs begins with noise alone
        keywords |= {"run_last": start.run_last, "start_from": None if is_forgotten else z}  # (b, c, h, w)
        if start.strength_rule in STRETCHED_RULES:
            keywords |= {"steps": one.planned, "keep_start": True}
        elif (
            start.kind == "before" and request.mode == "txt2img"
        ):  # hires fix, at full strength too as A1111's
            keywords["keep_start"] = True
    adapters, part = unet_attachments(for_batch(model, request, batch)), request.part_of(place)
    return keywords | {
        "x_T": x_T,
        "conditioning": context,
        "unconditional_conditioning": unconditional,
        "adapters": adapters if part is None else for_part(adapters, *part),
    }, dropped


def in_cells(z: Tensor, one: Pass, f: int) -> Tensor:
    """Bring the latents (b, c, h, w) of a picture that kept its own size to that of the pass."""
    cells = one.height // f, one.width // f
    return z if z.shape[2:] == cells else enlarge_latents(z, cells, "latent")


def enlarge(model: LatentDiffusion, request: Request, place: int, before: Tensor | None, b: int) -> Tensor:
    """Enlarge what the pass before gave, (b, c, h, w), as latents; those of the middle are what a pass begins with.

    Args:
        place, before: as in begin_pass.
    """
    f = downsampling(model)
    one, gave = request.passes[place], request.passes[place - 1].start
    width, height = one.start.enlarged
    latents = latents_of(model, request, gave, before, b)
    cells = enlarge_latents(latents, (height // f, width // f), one.start.upscaler)
    return middle(cells, (one.height // f, one.width // f))


def pictures_before(
    model: LatentDiffusion, request: Request, place: int, before: Tensor | None, b: int
) -> Tensor:
    """Give the pictures (b, 3, height, width) in [-1, 1] of the pass before that one begins with: enlarged, or cut out.

    Args:
        place, before: as in begin_pass.
    """
    one, gave = request.passes[place], request.passes[place - 1].start
    unit, pixels = picture_of(model, request, gave, before, b)
    if one.start.frame is not None:
        return one.start.frame.cut(pixels)
    larger = enlarge_pictures(unit, one.start.enlarged, one.start.upscaler)
    return middle(larger, (one.height, one.width))


# Where these are defined is above this module.
__getattr__ = living_in("ldm.pipeline", "GenerationResult", "StableDiffusion", of=__name__)
