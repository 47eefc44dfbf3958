"""What inversion and editing take of a pipeline: its network, its prompts, its pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ldm
from ldm import images as pictures
from ldm.adapters.deepcache import DeepCache
from ldm.adapters.use import check_adapters, text_scope, unet_attachments, vae_scope
from ldm.containers import MAX_BYTES
from ldm.errors import FormatError, MismatchError, UsageError, shown
from ldm.generate import WithAttachments, encode_image, encode_prompt
from ldm.limits import GUIDANCE_SCALE, real, whole
from ldm.models.diffusion.inversion import Context, Network
from ldm.models.diffusion.levels import Level, unit_noise
from ldm.models.introspect import downsampling, is_inpainting
from ldm.modules.seams import StepInfo
from ldm.request import check_size, list_texts, read_pictures

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

TUTORIAL = "tutorial"  # as a method: the functions of ldm.edit as tutorials write them out


def load_image(path: str | os.PathLike | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture as RGB, upright by its EXIF orientation, resized to (width, height) if a size is given.

    Args:
        path: a file's, or the bytes of one. An address is refused: nothing is downloaded here, so that a picture is the
            same tomorrow and a program works without a network; download it, and give the file.
        size: in pixels; a number is both sides.

    Raises:
        AbsentError: no such file. UsageError: an address, or a size that is none. FormatError: no sound picture, or one
            of too many pixels.
    """
    if size is not None:
        sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
        if len(sides) != 2:
            raise UsageError(f"size must be (width, height) in pixels, got {size!r:.80}")
        sides = tuple(whole("size", side, 1, pictures.MAX_SIDE) for side in sides)
    from_bytes = isinstance(path, bytes | bytearray)
    if not from_bytes and not isinstance(path, str | os.PathLike):
        raise UsageError(f"load_image reads a file, by its path or its bytes, got {shown(path)}")
    picture = pictures.to_rgb(_from_bytes(path) if from_bytes else pictures.open_image(path))
    return picture if size is None else picture.resize(sides)


def _from_bytes(content: bytes) -> Image.Image:
    """Read a file that is in memory by the one reader of pictures, which takes files."""
    if len(content) > MAX_BYTES:
        raise FormatError(f"the picture has {len(content)} bytes; wanted at most {MAX_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        path.write_bytes(content)
        try:
            return pictures.open_image(path)
        except FormatError as error:
            raise FormatError(
                str(error).replace(f"picture '{path}'", "the picture in these bytes")
            ) from error


class _Told(WithAttachments):
    """A model with what is attached to it, which an inversion tells where it is."""

    def at_level(self, level: Level, context: Context, images: int) -> None:
        self.step = StepInfo(level.total - level.left, level.total)
        self._unconditional, self._batch = context.unconditional, images


def joined(sd: ldm.StableDiffusion, adapters: Sequence[Any]) -> list[Any]:
    """Give those of a pipeline and those of a call together.

    Raises:
        UsageError: adapters that are no list.
    """
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        raise UsageError(
            f"adapters must be a list such as [LoRA('style.safetensors')], got {shown(adapters)}"
        )
    return [*sd.adapters, *adapters]


def network_of(sd: ldm.StableDiffusion, adapters: Sequence[Any] = (), **options: Any) -> Network:
    """Make a model into the network of an inversion; one for each walk up or down, for adapters may keep a state.

    Args:
        adapters: of ldm.adapters, attached at each call of the UNet, beside those of `sd.adapters`.
        options: of Denoiser, as guidance_rescale.

    Raises:
        UsageError: adapters that do not fit, or DeepCache. MismatchError: an inpainting model.
    """
    model = sd.model
    if is_inpainting(model):
        raise MismatchError(
            "inversion needs a UNet that sees nothing but the latents, got an inpainting model of 9 channels; "
            "take a plain one"
        )
    parts = check_adapters(model, joined(sd, adapters))
    if any(isinstance(one, DeepCache) for one in parts):
        raise UsageError("DeepCache keeps features from one step to the next cleaner one; leave it out here")
    return Network(_Told(model, sd.autocast, unet_attachments(parts), 1, 1, None), **options)


def context_of(
    sd: ldm.StableDiffusion,
    prompt: str | Sequence[str],
    guidance_scale: float = 1.0,
    negative_prompt: str | Sequence[str] | None = "",
    *,
    copies: int = 1,
    adapters: Sequence[Any] = (),
) -> Context:
    """Encode prompts into what a network is asked under: a row for each, `copies` times one after the other.

    Args:
        negative_prompt: one for all, or one for each; None is an empty one.
        adapters: those of them that are for the text encoder are attached while it works.

    Raises:
        UsageError: prompts that are none, another number of negative ones, a guidance_scale out of range.
    """
    scale = real("guidance_scale", guidance_scale, *GUIDANCE_SCALE)
    whole("num_images_per_prompt", copies, 1, 1024)
    texts = [text for text in list_texts("prompt", prompt) for _ in range(copies)]
    empty = "" if negative_prompt is None else negative_prompt
    negatives = [text for text in list_texts("negative_prompt", empty) for _ in range(copies)]
    negatives = negatives[:1] * len(texts) if len(negatives) == copies else negatives
    if len(negatives) != len(texts):
        raise UsageError(
            f"negative_prompt must be one, or one for each of {len(texts)} prompts, got {len(negatives)}"
        )
    with torch.no_grad(), text_scope(sd.model, check_adapters(sd.model, joined(sd, adapters))):
        c = encode_prompt(sd.model, texts)
        return Context(c, encode_prompt(sd.model, negatives) if scale != 1 else None, scale)


@torch.no_grad()
def encode_picture(
    sd: ldm.StableDiffusion, image: Any, *, draw: bool = False, adapters: Sequence[Any] = ()
) -> tuple[Tensor, Tensor]:
    """Turn a picture into latents (1, c, h, w), and give it as it is held against what comes back.

    Args:
        image: a path, the bytes of a file, a PIL picture, or a tensor (1, 3, height, width) in [-1, 1]. Files and PIL
            pictures are brought down to multiples of the model's cell, 8 pixels.
        draw: sample the first stage's distribution, as tutorials do, from torch's generator; else take its mean.

    Returns:
        latents in scaled units, float32, and the picture (1, 3, height, width) in [0, 1].

    Raises:
        UsageError, FormatError, AbsentError: no picture, or of a size that the model cannot take.
    """
    if isinstance(image, bytes | bytearray):
        image = load_image(image)
    pixels, unit, _ = read_pictures(image, None, (None, None), downsampling(sd.model))
    if pixels is None:
        raise UsageError("image must be a picture to invert, got None")
    with vae_scope(sd.model, joined(sd, adapters)):
        return encode_image(sd.model, pixels, 1, unit_noise if draw else torch.zeros_like), unit


def one_text(name: str, given: Any) -> str:
    """Give the one text of what is one, or a list of one."""
    texts = list_texts(name, given)
    if len(texts) != 1:
        raise UsageError(f"{name} must be one text, of the one picture, got {len(texts)}")
    return texts[0]


def check_latents(model: LatentDiffusion, latents: Any, rows: int | None = None) -> Tensor:
    """Return latents (b, c, h, w) as float32 on the model's device, or raise UsageError if they are none of its own."""
    c = model.channels
    fits = isinstance(latents, Tensor) and latents.dim() == 4 and latents.is_floating_point()
    if not fits or latents.shape[1] != c or min(latents.shape) < 1 or rows not in (None, len(latents)):
        what = tuple(latents.shape) if isinstance(latents, Tensor) else shown(latents)
        raise UsageError(
            f"latents must be a floating-point tensor ({'b' if rows is None else rows}, {c}, h, w), got {what}; a "
            "picture becomes one by ldm.edit.encode_picture, and num_images_per_prompt says how many there are"
        )
    for name, side in zip(("height", "width"), latents.shape[2:], strict=True):
        check_size(f"{name} of the latents' picture", side * downsampling(model), downsampling(model))
    if not torch.isfinite(latents).all():
        raise UsageError("latents must be finite, got NaN or infinity")
    return latents.float().to(model.device)
