"""Samples from OpenAI's pixel models, and from latent models of ours by the same chains.

What guided-diffusion's image_sample.py, classifier_sample.py and super_res_sample.py do, and CompVis's
sample_diffusion.py. Sample i draws from a generator of its own, seed + i, so that the batch size changes no draw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.advice import about_seeds, about_size, about_steps, about_syntax, about_words
from ldm.errors import AbsentError, FormatError, escaped
from ldm.generate import ImageNoise
from ldm.guided_diffusion.models import Asked, Classifier, LatentModel, Model
from ldm.guided_diffusion.script_util import COLOURS
from ldm.images import grid, save_file, save_png
from ldm.models.introspect import downsampling

MAX_IN_GRID = 64
MAX_BASE_BYTES = 4 * 2**30  # 10,000 pictures of 256 pixels are half of it


@dataclass(frozen=True)
class Recipe:
    """How a chain is walked.

    use_ddim: by DDIM instead of DDPM. eta: DDIM's fresh noise, 0 to 1. clip_denoised: keep predicted clean samples in
    [-1, 1]; None for what the data are, pixels or latents.
    """

    use_ddim: bool = False
    eta: float = 0.0
    clip_denoised: bool | None = None


def sample(
    model: Model,
    ask: Callable[[slice], Asked],
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    batch_size: int,
    guide: Classifier | None = None,
) -> Iterator[np.ndarray]:
    """Draw a sample for each seed; yield batches of pictures (b, height, width, 3) uint8.

    Args:
        ask: what the model is told for these of the samples.
        guide: moves samples towards the labels that they are told.

    Raises:
        NumericError: samples that are not finite.
        UsageError: eta out of range.
    """
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, min(start + batch_size, len(seeds)))
        shape = (rows.stop - start, *model.shape)
        noise = ImageNoise(seeds[rows])
        x_T = noise(torch.empty(shape, device=model.device))
        with torch.no_grad(), model.averages():
            asked = ask(rows)
            diffusion = asked.diffusion.drawing(noise)
            walk, options = diffusion.p_sample_loop, {}
            if recipe.use_ddim:
                walk, options = diffusion.ddim_sample_loop, {"eta": recipe.eta}
            x = walk(
                asked.network,
                shape,
                noise=x_T,
                clip_denoised=recipe.clip_denoised,
                cond_fn=guide,
                model_kwargs=asked.kwargs,
                **options,
            )
            yield model.paint(x)


def save_samples(folder: Path, pictures: np.ndarray, labels: Tensor | None) -> tuple[Path, Path]:
    """Save samples_{shape}.npz (arr_0 pictures, arr_1 labels) and a PNG of the first of them; nothing is overwritten.

    Raises:
        OutputError: the folder cannot be written.
    """
    from PIL import Image

    arrays = [pictures] if labels is None else [pictures, labels.numpy()]
    shape = "x".join(map(str, pictures.shape))
    npz = save_file(lambda file: np.savez(file, *arrays), folder / f"samples_{shape}.npz", rename=True)
    first = [Image.fromarray(one) for one in pictures[:MAX_IN_GRID]]
    return npz, save_png(grid(first), npz.with_suffix(".png"), rename=True)


def advice(model: Model, recipe: Recipe, seeds: Sequence[int], prompt: str | None = None) -> list[str]:
    """Say in a line each what is known to go wrong: seeds of many bits and, with a latent model, words, size, steps."""
    lines = [about_seeds(seeds)]
    if isinstance(model, LatentModel):
        advised, f = model.report.sampling, downsampling(model.model)
        _, height, width = model.shape
        lines += [
            about_words(advised.known_words, [prompt or ""]),
            about_size(advised.known_sizes, width * f, height * f),
            about_steps(advised.least_steps, "ddim" if recipe.use_ddim else "ddpm", model.steps),
            *about_syntax([prompt or ""]).values(),
        ]
    return [line for line in lines if line is not None]


def read_samples(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Read what `save_samples` or OpenAI's scripts wrote: pictures (n, h, w, 3) uint8, and labels (n,) or None.

    Raises:
        AbsentError: no such file.
        FormatError: no sound .npz of pictures.
    """
    name, wanted = escaped(path), "wanted an .npz with arr_0, pictures (n, h, w, 3) of type uint8"
    if not Path(path).is_file():
        raise AbsentError(f"samples file '{name}' does not exist; check the path")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            unpacked = sum(member.file_size for member in arrays.zip.infolist())
            if unpacked > MAX_BASE_BYTES:
                raise ValueError(f"{unpacked} bytes unpacked, at most {MAX_BASE_BYTES} are read")
            pictures = arrays["arr_0"]
            labels = arrays["arr_1"] if "arr_1" in arrays else None
    except Exception as error:  # numpy and zipfile raise nearly every kind of error on damaged files
        raise FormatError(f"samples file '{name}' cannot be read ({escaped(error)}); {wanted}") from None
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != COLOURS or not pictures.size:
        raise FormatError(f"samples file '{name}' holds {pictures.dtype} of shape {pictures.shape}; {wanted}")
    if labels is not None and (labels.shape != pictures.shape[:1] or labels.dtype.kind not in "iu"):
        raise FormatError(
            f"samples file '{name}' holds labels of {labels.dtype} and shape {labels.shape}; "
            f"wanted a whole number for each of {len(pictures)} pictures"
        )
    return pictures, labels
