"""Samples from OpenAI's pixel models, and from latent models of ours by the same chains.

What guided-diffusion's image_sample.py, classifier_sample.py and super_res_sample.py do, and CompVis's
sample_diffusion.py. Sample i draws from a generator of its own, seed + i, so that the batch size changes no draw.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.advice import about_seeds, about_size, about_steps, about_syntax, about_words
from ldm.batches import in_batches
from ldm.devices import dtype_name
from ldm.errors import AbsentError, FormatError, escaped
from ldm.guided_diffusion.models import Classifier, Conditions, LatentModel, Model
from ldm.guided_diffusion.script_util import COLOURS
from ldm.images import grid, save_file, save_png
from ldm.metadata import png_info
from ldm.models.introspect import downsampling
from ldm.noise import ImageNoise
from ldm.results import GenerationResult, Progress, painted, versions

MAX_IN_GRID = 64
MAX_BASE_BYTES = 4 * 2**30  # 10,000 pictures of 256 pixels are half of it


@dataclass(frozen=True)
class SamplingOptions:
    """How a chain is sampled.

    use_ddim: by DDIM instead of DDPM. eta: DDIM's fresh noise, 0 to 1. clip_denoised: keep predicted clean samples in
    [-1, 1]; None for what the data are, pixels or latents.
    """

    use_ddim: bool = False
    eta: float = 0.0
    clip_denoised: bool | None = None

    @property
    def sampler(self) -> Literal["ddim", "ddpm"]:
        """The sampler's name in metadata and advice."""
        return "ddim" if self.use_ddim else "ddpm"


@dataclass(frozen=True)
class SampleParameters:
    """How one sample was made: all that is needed to make it again, as it is written into its PNG.

    What a model or a run has not (a prompt, a class, a classifier) is None, a prompt "".
    """

    prompt: str
    guidance_scale: float | None
    class_label: int | None
    classifier: str | None
    classifier_scale: float | None
    base_sample: int | None  # number of the small picture that was enlarged
    seed: int
    steps: int
    sampler: Literal["ddim", "ddpm"]
    timestep_respacing: str
    eta: float | None
    clip_denoised: bool | None
    width: int
    height: int
    batch_size: int
    batch_index: int
    model: str
    device: str
    dtype: str
    threads: int
    torch: str
    version: str
    mode: Literal["sample_diffusion"] = "sample_diffusion"
    rng: Literal["image"] = "image"


@torch.no_grad()
def sample(
    model: Model,
    conditions: Conditions,
    options: SamplingOptions,
    *,
    seeds: Sequence[int],
    batch_size: int,
    guide: Classifier | None = None,
) -> Iterator[Progress]:
    """Draw a sample for each seed, batch by batch; a batch that does not fit into memory is halved.

    Args:
        guide: moves samples towards the labels of `conditions`.

    Yields:
        A Progress for every step, with samples (b, *model.shape); in each batch's last one `result` has its pictures,
        which carry SampleParameters.

    Raises:
        NumericError: samples that are not finite.
        ResourceError: out of memory with a single sample.
        UsageError: eta out of range.
    """
    steps = model.diffusion.num_timesteps

    def work(rows: range, index: int, count: int) -> Iterator[Progress]:
        place = {"batch": index, "batches": count, "preview_of": model.preview}
        noise = ImageNoise([seeds[i] for i in rows])
        shape = (len(rows), *model.shape)
        x_T = noise(torch.empty(shape, device=model.device))
        with model.averages():
            conditioned = model.condition(conditions, rows)
            diffusion = model.diffusion.drawing(noise)
            loop, more = diffusion.p_sample_loop_progressive, {}
            if options.use_ddim:
                loop, more = diffusion.ddim_sample_loop_progressive, {"eta": options.eta}
            chain = loop(
                conditioned.network,
                shape,
                noise=x_T,
                clip_denoised=options.clip_denoised,
                cond_fn=guide,
                model_kwargs=conditioned.kwargs,
                **more,
            )
            for step, out in enumerate(chain, start=1):
                x = out["sample"]
                yield Progress(step, steps, x_t=x, pred_x0=out["pred_xstart"], **place)
            pictures = [Image.fromarray(pixels) for pixels in model.to_pictures(x)]
        made = _parameters(model, conditions, options, guide, seeds, rows)
        result = GenerationResult(
            painted(pictures, made, model.file), [one.seed for one in made], made, x.float().cpu(), model.file
        )
        yield Progress(steps, steps, x_t=x, pred_x0=x, result=result, **place)

    def refusal(count: int) -> str:
        return (
            f"out of memory with {count} samples of {' x '.join(map(str, model.shape))} at once; "
            "use a smaller size or batch"
        )

    yield from in_batches(range(len(seeds)), batch_size, work, refusal=refusal)


def _parameters(
    model: Model,
    conditions: Conditions,
    options: SamplingOptions,
    guide: Classifier | None,
    seeds: Sequence[int],
    rows: range,
) -> list[SampleParameters]:
    """Collect how the samples of a batch were made."""
    labels, low_res, prompts = conditions.labels, conditions.low_res, conditions.prompts
    _, height, width = model.shape
    shared = {
        "guidance_scale": None if prompts is None else conditions.guidance_scale,
        "classifier": None if guide is None else guide.name,
        "classifier_scale": None if guide is None else guide.scale,
        "steps": model.diffusion.num_timesteps,
        "sampler": options.sampler,
        "timestep_respacing": model.respacing,
        "eta": options.eta if options.use_ddim else None,
        "clip_denoised": options.clip_denoised,
        "width": model.size * width // height,
        "height": model.size,
        "batch_size": len(rows),
        "model": model.name,
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        **versions(),
    }
    return [
        SampleParameters(
            prompt="" if prompts is None else prompts[i],
            class_label=None if labels is None else int(labels[i]),
            base_sample=None if low_res is None else i % len(low_res),
            seed=seeds[i],
            batch_index=index,
            **shared,
        )
        for index, i in enumerate(rows)
    ]


def save_samples(
    folder: Path, pictures: np.ndarray, labels: Tensor | None, metadata: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Save samples_{shape}.npz (arr_0 pictures, arr_1 labels) and a PNG of the first of them; nothing is overwritten.

    Args:
        pictures: (n, height, width, 3) uint8. labels: (n,).
        metadata: what the PNG says about its making, that of the first picture; None = nothing.

    Raises:
        OutputError: the folder cannot be written.
    """
    arrays = [pictures] if labels is None else [pictures, labels.numpy()]
    shape = "x".join(map(str, pictures.shape))
    npz = save_file(lambda file: np.savez(file, *arrays), folder / f"samples_{shape}.npz", rename=True)
    first = grid([Image.fromarray(one) for one in pictures[:MAX_IN_GRID]])
    info = None if metadata is None else png_info(metadata)
    return npz, save_png(first, npz.with_suffix(".png"), info, rename=True)


def advice(
    model: Model, options: SamplingOptions, seeds: Sequence[int], prompt: str | None = None
) -> list[str]:
    """Say in a line each what is known to go wrong: seeds of many bits and, with a latent model, words, size, steps."""
    lines = [about_seeds(seeds)]
    if isinstance(model, LatentModel):
        advised, f = model.report.sampling, downsampling(model.model)
        _, height, width = model.shape
        lines += [
            about_words(advised.known_words, [prompt or ""]),
            about_size(advised.known_sizes, width * f, height * f),
            about_steps(advised.least_steps, options.sampler, model.diffusion.num_timesteps),
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
