"""What painting gives: finished pictures with what made them, and the steps on the way."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.errors import UsageError
from ldm.options import Values

if TYPE_CHECKING:
    from PIL import Image


class GenerationParameters(Values):
    """How one image was made: all that is needed to make it again, as it is written into its PNG.

    Its attributes are those below and every option of ldm.options that is told.
    """

    mode: Literal["txt2img", "img2img", "inpaint"]
    prompt: str
    negative_prompt: str
    seed: int
    template: str | None  # what the prompt was drawn of
    negative_template: str | None
    batch_size: int  # with rng="diffusers" and "comfyui", of the whole call
    batch_index: int  # place within it; matters for these two and rng="compvis" only
    dropped_words: list[str]  # of the prompt and the negative prompt, beyond what the text encoder reads
    model: str | None
    vae: str | None  # of a file that replaced the model's own
    vae_hash: str | None
    init_image_hash: str | None
    mask_hash: str | None
    embeds_hash: str | None  # of prompt_embeds and the negative ones, which replaced the prompts
    device: str
    dtype: str
    vae_dtype: str
    optimize: list[str]  # which round otherwise: see ldm.kernels.ways_of
    threads: int
    torch: str
    version: str
    adapters: list[dict[str, Any]]  # kind, name, weight, hash ... of each


@dataclass
class GenerationResult:
    """Finished pictures with what made them; a notebook shows them as a grid.

    Attributes:
        images: list of PIL pictures, which carry their metadata when PIL saves them, or what output_type asked for.
        seeds: one for each image.
        parameters: one GenerationParameters for each image.
        latents: (n, c, h, w) float32 on the CPU, scaled units.
        interrupted: a callback ended the run; these are the pictures that were finished.
    """

    images: Any
    seeds: list[int]
    parameters: list[GenerationParameters]
    latents: Tensor
    model_file: Path | None = field(default=None, repr=False)
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]

    def __repr__(self) -> str:
        return f"GenerationResult({len(self)} images, seeds={self.seeds})"

    def metadata(self, index: int) -> dict[str, Any]:
        """Collect what goes into the PNG of one image, its model's hash included."""
        return metadata_of(self.parameters[index], self.model_file)

    @property
    def infotexts(self) -> list[str]:
        """A1111's text for each image."""
        from ldm.metadata import to_infotext

        return [to_infotext(self.metadata(i)) for i in range(len(self))]

    def grid(self, nrow: int | None = None) -> Image.Image:
        """Lay the pictures out as one, nrow in a row (default: near a square), with the metadata of its first."""
        grid = pictures.grid(self._pil(), nrow)
        return painted([grid], self.parameters[:1], self.model_file)[0]

    def save(
        self, folder: str | os.PathLike, pattern: str = "{:05}.png", *, metadata: bool = True
    ) -> list[Path]:
        """Save each picture with its metadata, numbered on from what the folder holds; returns paths.

        Args:
            pattern: file name with one number, `{}` or `{:05}`; see ldm.images.split_pattern. One that ends with .jpg
                or .webp gives such files, which keep A1111's text; any other gives PNGs.

        Raises:
            OutputError: the folder cannot be written. UsageError: the pattern is none.
        """
        from ldm.metadata import png_info

        pictures.split_pattern(pattern)  # before a folder is made
        folder = pictures.prepare_folder(folder)
        return [
            pictures.save_numbered(image, folder, pattern, png_info(self.metadata(i)) if metadata else None)
            for i, image in enumerate(painted(self._pil(), self.parameters, self.model_file))
        ]

    def _pil(self) -> list[Image.Image]:
        if isinstance(self.images, list):
            return self.images
        if isinstance(self.images, Tensor) and self.images.shape[1] != 3:
            raise UsageError("these are latents, not pictures; decode them, or ask for another output_type")
        unit = (
            self.images
            if isinstance(self.images, Tensor)
            else torch.from_numpy(self.images).permute(0, 3, 1, 2)
        )
        rounding = self.parameters[0].rounding if self.parameters else "truncate"
        return pictures.unit_to_pil(unit, rounding)

    def _repr_png_(self) -> bytes | None:
        if not len(self):
            return None
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


def versions() -> dict[str, Any]:
    """Say what else decides a picture's last bits: the number of threads, torch's version and ours."""
    from ldm import __version__

    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "version": __version__}


def metadata_of(parameters: GenerationParameters, model_file: Path | None) -> dict[str, Any]:
    """Collect what goes into the PNG of an image, its model's hash included."""
    return vars(parameters) | {"model_hash": file_hash(model_file)}


def painted(
    images: Sequence[Image.Image], parameters: Sequence[GenerationParameters], model_file: Path | None
) -> list[Image.Image]:
    """Let each picture say how it was made, wherever PIL saves it."""
    from ldm.metadata import Painted

    return [
        Painted.of(image, partial(metadata_of, one, model_file))
        for image, one in zip(images, parameters, strict=True)
    ]


def join(results: Sequence[GenerationResult], empty: Any) -> GenerationResult:
    """Put the results of several batches into one."""
    if not results:
        return GenerationResult(empty, [], [], torch.empty(0))
    kinds = [result.images for result in results]
    if isinstance(kinds[0], list):
        images = [image for kind in kinds for image in kind]
    else:
        images = torch.cat(kinds) if isinstance(kinds[0], Tensor) else np.concatenate(kinds)
    return GenerationResult(
        images,
        [seed for result in results for seed in result.seeds],
        [one for result in results for one in result.parameters],
        torch.cat([result.latents for result in results]),
        results[0].model_file,
    )


@dataclass(frozen=True)
class Progress:
    """One step of one batch, or (`result` set) the end of a batch.

    Attributes:
        step, steps: steps done and wanted in this batch.
        batch, batches: this batch (from 0) and how many there are.
        x_t, pred_x0: (b, c, h, w) latents after the step, and what they promise to become.
        result: the finished pictures of this batch, in its last Progress.
        preview_of: paints latents (b, c, h, w) small and at once.
    """

    step: int
    steps: int
    batch: int
    batches: int
    x_t: Tensor
    pred_x0: Tensor
    result: GenerationResult | None = None
    preview_of: Callable[[Tensor], list[Image.Image]] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        done = "" if self.result is None else f", {self.result}"
        place = f"batch {self.batch + 1} of {self.batches}, {tuple(self.x_t.shape)}"
        return f"Progress(step {self.step} of {self.steps}, {place}{done})"

    def preview(self) -> list[Image.Image]:
        """Paint what is to come, small and at once, by a linear approximation of the decoder."""
        return self.preview_of(self.pred_x0)


def tensor_hash(x: Tensor) -> str:
    """Give the first 10 hex digits of the sha256 of a tensor's bytes, as pictures name what they began with."""
    return hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest()[:10]


_HASHES: dict[tuple, str] = {}


def file_hash(path: Path | None) -> str | None:
    """Give the first 10 hex digits of a file's sha256, as A1111 names models; a folder or no file gives None."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns)
    if key not in _HASHES:
        with open(path, "rb") as file:
            _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()[:10]
    return _HASHES[key]


def with_bar(stream: Iterator[Progress], show: bool | None = None) -> Iterator[Progress]:
    """Hand a stream on behind a progress bar.

    Args:
        show: True and False say so; None shows it in a notebook and in a terminal.
    """
    if show is None and "ipykernel" in sys.modules:
        show = True
    from tqdm.auto import tqdm  # a widget in a notebook

    # Where show is None tqdm asks whether its stream is a terminal.
    with tqdm(desc="steps", unit="step", disable=None if show is None else not show) as bar:
        for progress in stream:
            bar.total = progress.batches * progress.steps
            if progress.result is None:
                bar.update()
            else:
                bar.clear()  # so that what is printed about the pictures has lines of its own
            yield progress
