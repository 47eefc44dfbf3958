"""From latents to finished pictures with what made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.use import described
from ldm.devices import dtype_name
from ldm.encoding import latents_of, picture_of
from ldm.kernels import ways_of
from ldm.limits import CALL_RNGS
from ldm.models.introspect import dtype_of
from ldm.options import told
from ldm.passes import ImageSpec, Request
from ldm.results import GenerationParameters, GenerationResult, file_hash, painted, tensor_hash, versions
from ldm.sources import join_tiles

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def finish_batch(
    model: LatentDiffusion,
    request: Request,
    batch: Sequence[ImageSpec],
    latents: Tensor | None,
    tiles: Sequence[np.ndarray],
    dropped: Sequence[list[str]],
    name: str | None,
    file: Path | None,
    autocast: torch.dtype | None,
) -> GenerationResult:
    """Turn the latents of a batch into what was asked for; None stands for the picture itself (strength 0).

    Args:
        tiles: (b, height, width, 3) uint8 of each pass, where a request paints in tiles.
    """
    b, start = len(batch), request.passes[-1].start
    if request.tiles is not None:
        unit, pixels = join_tiles(request.tiles, tiles)
    elif request.output_type != "latent":
        unit, pixels = picture_of(model, request, start, latents, b)
    latents = latents_of(model, request, start, latents, b).float().cpu()
    is_shared = request.rng in CALL_RNGS  # the noise, by all pictures of the call
    shared = {
        **{one.name: one.kind.plain(getattr(request, one.name)) for one in told() if not one.each},
        "mode": request.mode,
        "init_image_hash": request.image_hash,
        "mask_hash": None if request.mask is None else tensor_hash(request.mask),
        "adapters": described(request.adapters),
        "batch_size": len(request.images) if is_shared else b,
        "model": name,
        **computed_with(model, autocast),
    }
    parameters = [
        GenerationParameters(
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            seed=spec.seed,
            variation_seed=spec.variation_seed,
            embeds_hash=_embeds_hash(request, spec),
            template=spec.template,
            negative_template=spec.negative_template,
            batch_index=spec.place if is_shared else i,
            dropped_words=dropped[i],
            **shared,
        )
        for i, spec in enumerate(batch)
    ]
    if request.output_type == "pil":
        images = painted(pictures.uint8_to_pil(pixels), parameters, file)
    elif request.output_type == "latent":
        images = latents
    else:
        images = unit if request.output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()
    return GenerationResult(images, [spec.seed for spec in batch], parameters, latents, file)


def _embeds_hash(request: Request, spec: ImageSpec) -> str | None:
    """Hash the features that were given in the place of an image's prompts, so that it is seen that they were."""
    if request.embeds is None:
        return None
    given = [one[spec.row] for one in (request.embeds, request.negative_embeds) if one is not None]
    return tensor_hash(torch.cat([one.float().flatten() for one in given]))


def computed_with(model: LatentDiffusion, autocast: torch.dtype | None) -> dict[str, Any]:
    """Say what a picture was computed with: the VAE, device, dtypes, ways of `optimize`, threads, versions."""
    mixed = f", autocast {dtype_name(autocast)}" if autocast else ""
    vae = getattr(model.first_stage_model, "weights_file", None)  # of one that replaced the model's own
    return {
        "vae": None if vae is None else vae.name if vae.is_dir() else vae.stem,
        "vae_hash": file_hash(vae),
        "device": str(model.device),
        "dtype": dtype_name(dtype_of(model)) + mixed,
        "vae_dtype": dtype_name(dtype_of(model.first_stage_model)),
        "optimize": ways_of(model),
        **versions(),
    }
