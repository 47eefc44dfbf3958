"""What adapters read of pictures: CLIP's vision model, its pixels and features, and masks of regions."""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import images
from ldm.checkpoints import read_tensors
from ldm.checkpoints.folders import read_json
from ldm.checkpoints.report import first_few
from ldm.errors import AbsentError, FormatError, MismatchError, UsageError, escaped, shown

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

# CLIP's mean and deviation of each colour, by which its pixels are normalised.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Width of a published vision model -> its heads and activation, which tensors do not say: ViT-B, L (OpenAI's), H, bigG.
KNOWN = {768: (12, "quick_gelu"), 1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
OURS = re.compile(r"^(?:clip_vision_model\.|image_encoder\.)?((?:vision_model|visual_projection)\..*)$")
WANTED = (
    "image_encoder should be CLIP's vision model (CLIPVisionModelWithProjection): its folder, one file of it"
)


# --- CLIP's vision model ----------------------------------------------------------------------------


def load_encoder(given: Any) -> nn.Module:
    """Read CLIP's vision model, float32; one that is read already is given back as it is.

    Args:
        given: a folder of transformers, as IP-Adapter's models/image_encoder; one file of weights under transformers'
            names, whose configuration is a config.json beside it, or follows from its width; or the model.

    Raises:
        UsageError: another kind. AbsentError: it is not there.
        FormatError, UnsafeFileError, MismatchError: it cannot be read, or is something else.
    """
    if isinstance(given, nn.Module):
        if not hasattr(given, "visual_projection") or not hasattr(
            getattr(given, "config", None), "image_size"
        ):
            raise UsageError(f"{WANTED}, or the model itself, got a {type(given).__name__}")
        return given
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"{WANTED}, or the model itself, got {shown(given)}")
    path = Path(given)
    if not path.is_file() and not (path / "config.json").is_file():
        what = "there is no config.json in" if path.is_dir() else "there is no"
        raise AbsentError(f"{what} '{escaped(path)}'; {WANTED}, as IP-Adapter's models/image_encoder")
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    options: dict[str, Any] = {}
    if path.is_file():
        options["state_dict"] = _vision_tensors(path)
        options["config"] = _config_beside(path) or CLIPVisionConfig(
            **_config_of(path, options["state_dict"])
        )
    try:
        with _quietly():
            encoder, found = CLIPVisionModelWithProjection.from_pretrained(
                None if options else path, local_files_only=True, output_loading_info=True, **options
            )
    except Exception as error:  # transformers raises nearly every kind on what is not as it wants it
        raise FormatError(
            f"CLIP's vision model in '{escaped(path)}' cannot be read: {escaped(error, 160)}"
        ) from None
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise MismatchError(
            f"'{escaped(path)}' has no tensors for {len(lacking)} of CLIP's vision model ({first_few(lacking, 2)})"
        )
    return encoder.float().eval()


def _vision_tensors(path: Path) -> dict[str, Tensor]:
    tensors, _ = read_tensors(path)
    found = {match[1]: x for name, x in tensors.items() if (match := OURS.match(name))}
    found = {
        name: x for name, x in found.items() if not name.endswith("position_ids")
    }  # counted by the model
    if "visual_projection.weight" not in found:
        raise MismatchError(
            f"'{escaped(path)}' is no vision model of CLIP under transformers' names with its projection "
            f"({first_few(tensors, 2)})"
        )
    return found


def _config_beside(path: Path) -> "CLIPVisionConfig | None":
    beside = path.parent / "config.json"
    if not beside.is_file() or read_json(beside).get("model_type") not in ("clip_vision_model", "clip"):
        return None
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig.from_pretrained(path.parent, local_files_only=True)


def _config_of(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Read a configuration off the shapes of a published model's tensors."""
    try:
        patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        positions = len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1
        heads, activation = KNOWN[patch[0]]
        return {
            "hidden_size": patch[0],
            "intermediate_size": len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]),
            "projection_dim": len(tensors["visual_projection.weight"]),
            "num_hidden_layers": len({name.split(".")[3] for name in tensors if ".layers." in name}),
            "num_attention_heads": heads,
            "hidden_act": activation,
            "patch_size": patch[-1],
            "image_size": math.isqrt(positions) * patch[-1],
        }
    except (KeyError, IndexError):
        raise MismatchError(
            f"'{escaped(path)}' is no published vision model of CLIP (ViT-B, L, H, bigG); put its config.json beside it"
        ) from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from drawing a bar and a table while it reads: what lacks is an error of ours."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()


def clip_pixels(image: Any, side: int) -> Tensor:
    """Bring a picture into CLIP's form: its shorter edge `side` long, its middle, normalised; (1, 3, side, side)."""
    from PIL import Image

    image = images.to_rgb(image)
    width, height = image.size
    # The longer edge is truncated, as transformers' and CLIP's own preparation do.
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).permute(2, 0, 1)
    mean, deviation = (torch.tensor(one).reshape(3, 1, 1) for one in (MEAN, DEVIATION))
    return ((pixels - mean) / deviation)[None]


def open_picture(given: Any, name: str = "image") -> Any:
    """Give a picture of PIL, upright, from one or a path."""
    if isinstance(given, str | os.PathLike):
        return images.open_image(given)
    if hasattr(given, "convert") and hasattr(given, "getbands"):
        return images.upright(given)
    raise UsageError(f"{name} should be a picture, the path of one, or a list of these, got {shown(given)}")


@torch.no_grad()
def encode_images(image_encoder: Any, given: Sequence[Any], reads: str) -> tuple[Tensor, Tensor]:
    """Encode pictures by CLIP's vision model.

    Args:
        image_encoder: as load_encoder takes it.
        given: pictures of PIL, or paths.
        reads: what of them: "embeds" (n, width), projected; "states" (n, tokens, width), of the layer before the last;
            or "last", of the last one, transformers' last_hidden_state.

    Returns:
        the features of all pictures, and those (of a batch of 1) that stand for none; float32 on the CPU.

    Raises: as load_encoder.
    """
    opened = [open_picture(one) for one in given]
    encoder = load_encoder(image_encoder)
    first = next(encoder.parameters())
    pixels = torch.cat([clip_pixels(one, encoder.config.image_size) for one in opened]).to(first)
    if reads == "embeds":
        embeds = encoder(pixels).image_embeds.float().cpu()
        return embeds, torch.zeros_like(embeds[:1])
    both = torch.cat([pixels, torch.zeros_like(pixels[:1])])  # a picture of zeros stands for none
    layer = {"states": -2, "last": -1}[reads]
    states = encoder(both, output_hidden_states=True).hidden_states[layer].float().cpu()
    return states[:-1], states[-1:]


# --- masks ------------------------------------------------------------------------------------------


class RegionMask:
    """Where in what is painted a picture has a say: white = there, black = not.

    Attributes:
        values: (height, width) float32 in [0, 1].
        hash: the first 12 digits of SHA-256 of size and values.

    Args:
        given: a picture of PIL or the path of one, of which the lighter half is white and transparency black; or a
            tensor (height, width) in [0, 1], also with ones before it, whose values between weigh.

    Raises:
        UsageError: another kind, or a tensor of another shape or range.
        Others: as images.open_image.
    """

    def __init__(self, given: Any):
        if isinstance(given, Tensor):
            self.values = _checked_mask(given)
        else:
            self.values = images.to_mask(open_picture(given, "mask"))[0, 0]
        digest = hashlib.sha256(f"{tuple(self.values.shape)}".encode())
        digest.update(self.values.contiguous().numpy().tobytes())
        self.hash = digest.hexdigest()[:12]
        self._sized: dict[tuple[Any, ...], Tensor] = {}

    def check_aspect(self, size: tuple[int, int]) -> None:
        """Raise MismatchError if what is painted, latents (height, width), has another aspect, by more than a cell."""
        (h, w), (height, width) = self.values.shape, size
        if abs(w * height / h - width) > 1 and abs(h * width / w - height) > 1:
            raise MismatchError(
                f"a mask should have the aspect of what is painted, latents of {width} x {height}, got a mask of {w} x "
                f"{h}; crop it or resize it"
            )

    def at(self, size: tuple[int, int], tokens: int, like: Tensor) -> Tensor:
        """Bring it to the cells of an attention, (1, 1, tokens, 1), by bicubic interpolation as diffusers does.

        Args:
            size: of the latents, height and width, which the UNet halves to those of this attention.
        """
        height, width = size
        while height * width > tokens and height * width > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != tokens:
            raise UsageError(
                f"a mask is for attentions of a UNet over {size[0]} x {size[1]}, got {tokens} tokens"
            )
        key = (height, width, like.dtype, like.device)
        if key not in self._sized:
            sized = F.interpolate(self.values[None, None], size=(height, width), mode="bicubic")
            self._sized[key] = sized.reshape(1, 1, -1, 1).to(like)
        return self._sized[key]


def _checked_mask(given: Tensor) -> Tensor:
    shape = tuple(given.shape)
    is_kind = given.is_floating_point() or given.dtype == torch.bool
    if len(shape) < 2 or math.prod(shape[:-2]) != 1 or 0 in shape or not is_kind:
        raise UsageError(
            "a mask's tensor should be floating point or bool, (height, width) or (1, height, width), got "
            f"{str(given.dtype).removeprefix('torch.')} of shape {shape}"
        )
    values = given.detach().float().cpu().reshape(shape[-2:])
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= 1):
        raise UsageError(f"a mask's values should be from 0 to 1, got {low:g} to {high:g}")
    return values.clone()
