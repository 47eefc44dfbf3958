"""What a person may ask of a model, checked before any work is done."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures

# Some of these are for those who import them from here, or from ldm.wish as this module was called.
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype  # noqa: F401
from ldm.errors import UsageError, shown
from ldm.limits import MAX_SEED, choice, real, whole  # noqa: F401
from ldm.models.introspect import context_width, downsampling, dtype_of, is_inpainting, native_size  # noqa: F401

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

RANDOM_SEEDS = (None, -1, "random")  # what stands for "draw one"
MAX_PROMPT = 100_000  # characters; the tokenizer would read on for seconds and keep 75 tokens
CELLS = (8, 256)  # latent cells a side: 64 to 2048 pixels at 8 pixels a cell


def check_embeds(model: LatentDiffusion, *embeds: Any) -> None:
    """Raise UsageError for text features that the UNet cannot read: of another width, whole numbers, or not finite."""
    width = context_width(model)
    for one in embeds:
        if not isinstance(one, Tensor):
            continue
        if width is not None and one.shape[-1] != width:
            raise UsageError(f"prompt_embeds must have {width} features a token, got {tuple(one.shape)}")
        if not one.is_floating_point() or one.is_meta or not torch.isfinite(one).all():
            raise UsageError(
                f"prompt_embeds must be finite floating-point numbers, got {one.dtype}: {shown(one)}"
            )


# --- wishes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """One image that is wanted."""

    prompt: str
    negative: str
    seed: int
    row: int | None = None  # into prompt_embeds, where those were given


@dataclass(frozen=True)
class Job:
    """A wish whose every part was checked."""

    mode: Literal["txt2img", "img2img", "inpaint"]
    shots: list[Shot]
    batch_size: int
    height: int
    width: int
    image: Tensor | None  # (1, 3, height, width) in [-1, 1], for the encoder
    kept: Tensor | None  # the same in [0, 1], as it comes back where nothing is painted
    image_hash: str | None
    mask: Tensor | None  # (1, 1, height, width), 1 = repaint
    strength: float | None
    run_last: int  # of the steps, with a picture to start from
    steps: int
    sampler: str
    spacing: str | None
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    cache_interval: int
    cache_depth: int
    merge_ratio: float
    merge_seed: int | None
    eta: float
    rng: Literal["image", "compvis"]
    fixed_code: bool
    output_type: Literal["pil", "np", "pt", "latent"]
    embeds: Tensor | None
    negative_embeds: Tensor | None

    def __repr__(self) -> str:
        how = f"{self.sampler}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"Job({self.mode}, {len(self.shots)} of {self.width} x {self.height}, {how})"


def check_size(name: str, value: int, f: int) -> int:
    """Return a side in pixels if the model can paint it.

    Raises:
        UsageError: it is no multiple of f, or out of range; the nearest two sides that work are named.
    """
    low, high = (cells * f for cells in CELLS)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UsageError(f"{name} must be a multiple of {f} from {low} to {high}, got {shown(value)}")
    if value % f:
        below = value - value % f
        raise UsageError(
            f"{name} must be a multiple of {f}, got {value}; the nearest two that work are {below} and {below + f}"
        )
    return int(value)


def list_texts(name: str, value: Any) -> list[str]:
    """List one text, or several, that the tokenizer can read, or raise UsageError."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} must be a text or a list of texts with one at least, got {shown(value)}")
    for text in texts:
        if len(text) > MAX_PROMPT:
            raise UsageError(f"{name} must have at most {MAX_PROMPT} characters, got {len(text)}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name} holds characters that are no text (lone surrogates): {shown(text)}"
            ) from None
    return texts


def draw_seed() -> int:
    """Draw a seed; below 2^31, so that seed + i stays within the 32 bits that the generator on the CPU keeps."""
    return secrets.randbelow(2**31)


def list_seeds(seed: Any, count: int) -> list[int]:
    """List one seed for each of count images: seed + i, or a list as given.

    None, -1 and "random" draw one, also within a list.

    Raises:
        UsageError: no such seed, or a list of another length.
    """

    def one(value: Any, high: int) -> int:
        if value is None or (isinstance(value, str | int | np.integer) and value in RANDOM_SEEDS):
            return draw_seed()
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= high:
            raise UsageError(
                f"seed must be a whole number from 0 to {high}, or -1, 'random' or None to draw one; got {shown(value)}"
            )
        return int(value)

    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise UsageError(f"a list of seeds must name one for each image, wanted {count}, got {len(seed)}")
        return [one(value, MAX_SEED) for value in seed]
    first = one(seed, MAX_SEED - count + 1)
    return [first + i for i in range(count)]


def list_prompts(
    prompt: Any, negative: Any, embeds: Any, negative_embeds: Any
) -> tuple[list[str], list[str]]:
    """List as many negative prompts as prompts; features given in their place are checked."""
    if embeds is None:
        prompts = list_texts("prompt", prompt)
    else:
        for name, one in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)):
            if not isinstance(one, Tensor) or one.dim() != 3 or one.shape != embeds.shape:
                got = tuple(one.shape) if isinstance(one, Tensor) else shown(one)
                raise UsageError(f"{name} must be (n, tokens, d), both alike, got {got}")
        prompts = list_texts("prompt", "" if prompt is None else prompt)
        prompts = prompts * len(embeds) if len(prompts) == 1 else prompts
        if len(prompts) != len(embeds):
            raise UsageError(
                f"prompt_embeds holds {len(embeds)} prompts, but {len(prompts)} prompts were given"
            )
    negatives = list_texts("negative_prompt", "" if negative is None else negative)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(
            f"negative_prompt must be one text, or one for each of {len(prompts)} prompts, got {len(negatives)}"
        )
    return prompts, negatives


def read_pictures(
    image: Any, mask: Any, size: tuple[int | None, int | None], f: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, str | None]:
    """Read a picture, in [-1, 1] and as it is given back in [0, 1], and a mask, of one size; and the picture's hash."""
    if image is None:
        if mask is not None:
            raise UsageError("a mask needs a picture to repaint, got mask and image=None")
        return None, None, None, None
    if isinstance(image, Tensor):
        pixels = _as_picture("image", image, 3)
        for name, side in zip(("width", "height"), (pixels.shape[3], pixels.shape[2]), strict=True):
            check_size(name, side, f)
        if size[0] not in (None, pixels.shape[3]) or size[1] not in (None, pixels.shape[2]):
            raise UsageError(
                f"an image given as a tensor keeps its size, got {tuple(pixels.shape)} and {size}"
            )
        most = pixels.float().abs().max().item()
        if not pixels.is_floating_point() or most > 2:
            raise UsageError(
                "an image given as a tensor must be floating point from -1 (black) to 1 (white), "
                f"got {dtype_name(pixels.dtype)} up to {most:g}; bytes x are 2 * (x / 255) - 1"
            )
        kept = pictures.given_unit(pixels.cpu())
        pixels = pixels.float().cpu()
    else:
        image = _open("image", image)
        sides = [side or own - own % f for side, own in zip(size, image.size, strict=True)]
        for name, side in zip(("width of the picture", "height of the picture"), sides, strict=True):
            check_size(name, side, f)
        if tuple(sides) != image.size:
            log.info("the picture was resized from %s to %s", image.size, tuple(sides))
        pixels = pictures.to_tensor(pictures.fit_size(pictures.to_rgb(image), f, tuple(sides)))
        kept = pictures.given_unit(pixels)
    marks = None
    if mask is not None:
        at = (pixels.shape[3], pixels.shape[2])
        if isinstance(mask, Tensor):
            marks = (_as_picture("mask", mask, 1).float().cpu() >= 0.5).float()
            if marks.shape[2:] != pixels.shape[2:]:
                raise UsageError(f"mask must have the picture's size {at}, got {tuple(marks.shape)}")
        else:
            mask = _open("mask", mask)
            if mask.size != at:
                log.info("the mask was resized from %s to %s", mask.size, at)
            marks = pictures.to_mask(mask, at)
        if not marks.any():
            raise UsageError("the mask marks nothing; paint white what is to be repainted")
    return pixels, kept, marks, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:10]


def _as_picture(name: str, value: Tensor, channels: int) -> Tensor:
    if value.dim() != 4 or value.shape[:2] != (1, channels) or not torch.isfinite(value).all():
        raise UsageError(
            f"{name} must be a finite (1, {channels}, height, width) tensor, got {tuple(value.shape)}"
        )
    return value


def _open(name: str, value: Any) -> Image.Image:
    from PIL import Image

    if isinstance(value, str | os.PathLike):
        return pictures.open_image(value)
    if isinstance(value, Image.Image):
        return pictures.upright(value)
    raise UsageError(f"{name} must be a PIL picture, a path or a tensor, got {type(value).__name__}")
