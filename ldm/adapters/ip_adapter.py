"""IP-Adapter (arXiv:2308.06721): a picture as a prompt, beside the text.

    look = IPAdapter("ip-adapter_sd15.safetensors", "portrait.png", encoder="models/image_encoder", scale=0.6)
    sd.txt2img("a woman in a garden", adapters=[look])

CLIP's features of the picture become tokens behind the text's, and each attention to the context answers to both, by
layers of its own for the picture's.
"""

import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ldm import images
from ldm.adapters.controls import CONTEXTS, ControlFile, check_span, filled, is_within, put
from ldm.adapters.deepcache import check_unet
from ldm.checkpoints import TensorInfo
from ldm.checkpoints.report import first_few
from ldm.errors import AbsentError, FormatError, MismatchError, UsageError, escaped, shown
from ldm.modules.encoders.image_tokens import HEAD, ImageProjection, ImageResampler, ImageTokenMLP
from ldm.modules.processors import IPAttnProcessor, named_attentions
from ldm.modules.seams import Rank, StepInfo, Undo, fill, wrap
from ldm.values import check_value

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
MAX_IMAGES = 16
# CLIP's mean and deviation of each colour, by which its pixels are normalised.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FACE_ID = "one of FaceID, which reads features of a face recognition; those are not supported"


class IPAdapterFile(ControlFile):
    """An IP-Adapter's file for Stable Diffusion v1: the plain kind, plus, or full-face; see ControlFile.

    Attributes:
        projection: from CLIP's features to tokens.
        context_dim: of a token.
        reads: what the projection takes: "embeds" (n, width), CLIP's projected embeddings; or "states"
            (n, tokens, width), the hidden states before its last layer.
    """

    family = "IP-Adapter"
    wanted = "an IP-Adapter"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        found = {name: one for name, one in self.tensors.items() if name.startswith(LAYERS)}
        layers = {name.removeprefix(LAYERS): one for name, one in found.items()}
        odd = [name for name in layers if not re.fullmatch(r"\d+\.to_[kv]_ip\.weight", name)]
        if odd or not layers:
            raise self.misfit(f"one with other layers ({first_few(odd or self.tensors, 2)})")
        self.layers = layers
        self.context_dim = next(iter(layers.values())).shape[-1]
        given = {
            name.removeprefix(PROJECTION): one.float()
            for name, one in self.tensors.items()
            if name.startswith(PROJECTION)
        }
        try:
            self.projection = projection_of(given, self.context_dim)
        except (KeyError, IndexError, ValueError, RuntimeError):
            raise self.misfit(f"one whose image projection is not known ({first_few(given, 2)})") from None
        self.reads = "embeds" if isinstance(self.projection, ImageProjection) else "states"
        self._processors: WeakKeyDictionary[nn.Module, dict[nn.Module, IPAttnProcessor]] = WeakKeyDictionary()

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        found = super().own(infos)
        if any("_lora." in name or "perceiver_resampler." in name for name in found) or (
            f"{PROJECTION}proj.0.weight" in found and f"{PROJECTION}norm.weight" in found
        ):
            raise self.misfit(FACE_ID)
        odd = [name for name in found if not name.startswith((PROJECTION, LAYERS))]
        if odd:
            raise self.misfit(f"one with other names than {PROJECTION}* and {LAYERS}* ({first_few(odd, 2)})")
        return found

    def processors(self, unet: nn.Module) -> dict[nn.Module, IPAttnProcessor]:
        """Give what answers in each of a UNet's attentions to the context, the same ones each time.

        Raises:
            UsageError: not a UNetModel, or a compiled one.
            MismatchError: it is for another UNet.
        """
        check_unet(unet, "an IP-Adapter")
        if unet not in self._processors:
            self._processors[unet] = self._build(unet)
        return self._processors[unet]

    def _build(self, unet: nn.Module) -> dict[nn.Module, IPAttnProcessor]:
        """Layers are numbered as diffusers numbers a UNet's attentions; those to the context are the odd ones."""
        attentions = list(named_attentions(unet).values())
        wanted = {
            f"{i}.to_{part}_ip.weight": (attentions[i].to_k.out_features, attentions[i].to_k.in_features)
            for i in range(1, len(attentions), 2)
            for part in "kv"
        }
        width = attentions[1].to_k.in_features if len(attentions) > 1 else None
        if width != self.context_dim:
            whose = f" of {CONTEXTS[self.context_dim]}" if self.context_dim in CONTEXTS else ""
            raise self.misfit(
                f"one for a context{whose} {self.context_dim} wide; the model's is {width} wide"
            )
        given = {name: tuple(one.shape) for name, one in self.layers.items()}
        if odd := sorted({name for name, _ in wanted.items() ^ given.items()}):
            raise self.misfit(f"one for another UNet: {len(odd)} of its tensors differ ({first_few(odd, 2)})")
        return {
            attentions[i]: filled(
                partial(IPAttnProcessor, attentions[i].to_k.out_features, width),
                {f"to_{part}_ip.weight": self.layers[f"{i}.to_{part}_ip.weight"] for part in "kv"},
            )
            for i in range(1, len(attentions), 2)
        }


def projection_of(tensors: Mapping[str, Tensor], context_dim: int, head: int = HEAD) -> nn.Module:
    """Build the projection that holds these tensors, told by their names: plain, full-face or plus.

    Args:
        head: features of a head of the plus kind, which its tensors do not say.

    Raises:
        KeyError, IndexError, ValueError, RuntimeError: they are none of these.
    """
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    if "latents" in shapes:
        inner, dim = shapes["layers.0.0.to_q.weight"]
        build = partial(
            ImageResampler,
            shapes["proj_in.weight"][1],
            dim,
            inner,
            inner // head,
            len({name.split(".")[1] for name in shapes if name.startswith("layers.")}),
            shapes["layers.0.1.1.weight"][0],
            context_dim,
            shapes["latents"][1],
        )
    elif "proj.3.weight" in shapes:
        hidden, width = shapes["proj.0.weight"]
        build = partial(ImageTokenMLP, width, hidden, context_dim)
    else:
        rows, width = shapes["proj.weight"]
        build = partial(ImageProjection, width, context_dim, rows // context_dim)
    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in build().state_dict().items()}
    if wanted != shapes:
        raise ValueError("other tensors")
    return filled(build, tensors)


# --- pictures ---------------------------------------------------------------------------------------


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


def _open(given: Any) -> Any:
    if isinstance(given, str | os.PathLike):
        return images.open_image(given)
    if hasattr(given, "convert") and hasattr(given, "getbands"):
        return images.upright(given)
    raise UsageError(f"image should be a picture, the path of one, or a list of these, got {shown(given)}")


@torch.no_grad()
def encode_images(folder: str | os.PathLike, given: list[Any], reads: str) -> tuple[Tensor, Tensor]:
    """Encode pictures by CLIP's vision model in a local folder of transformers.

    Args:
        reads: as IPAdapterFile has it.

    Returns:
        the features of all pictures, and those (of a batch of 1) that stand for none.

    Raises:
        AbsentError, FormatError: there is no such folder, or no such model in it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise AbsentError(
            f"there is no config.json in '{escaped(folder)}'; encoder should be the folder of CLIP's vision model "
            "(CLIPVisionModelWithProjection), as IP-Adapter's models/image_encoder"
        )
    from transformers import CLIPVisionModelWithProjection

    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
    except (
        Exception
    ) as error:  # transformers raises nearly every kind on folders that are not as it wants them
        raise FormatError(
            f"CLIP's vision model in '{escaped(folder)}' cannot be read: {escaped(error, 160)}"
        ) from None
    encoder = encoder.float().eval()
    side = encoder.config.image_size
    pixels = torch.cat([clip_pixels(_open(one), side) for one in given])
    if reads == "embeds":
        embeds = encoder(pixels).image_embeds
        return embeds, torch.zeros_like(embeds[:1])
    both = torch.cat([pixels, torch.zeros_like(pixels[:1])])  # a picture of zeros stands for none
    states = encoder(both, output_hidden_states=True).hidden_states[-2]
    return states[:-1], states[-1:]


# --- the adapter ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """An IP-Adapter with its pictures, for some of the steps. One at a time, beside any number of other adapters.

    Args:
        file: path or IPAdapterFile; an IPAdapterFile from then on, which serves any number of them.
        image: a picture of PIL, the path of one, or a list of these, whose tokens stand side by side.
        encoder: the folder of CLIP's vision model, for `image`: for the published files ViT-H/14, IP-Adapter's
            models/image_encoder. It is read, and let go again.
        embeds: CLIP's features instead of image: see IPAdapterFile.reads.
        negative_embeds: what stands for no picture, a batch of 1: None = zeros for "embeds"; for "states" the states
            of a picture of zeros, which only the encoder knows.
        scale: of the picture's answer; 0 = none.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.

    Attributes:
        tokens, negative_tokens: (1, n, context_dim), float32.

    Raises:
        UsageError: neither image nor embeds, or both, no encoder, or a number out of range.
        MismatchError: features of another width.
        Others: as IPAdapterFile and encode_images.
    """

    file: IPAdapterFile | str | os.PathLike
    image: Any = None
    encoder: str | os.PathLike | None = None
    embeds: Tensor | None = None
    negative_embeds: Tensor | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    rank: ClassVar[Rank] = Rank.ATTENTION

    def __post_init__(self) -> None:
        start, end = check_span(self.start, self.end)
        scale = float(check_value(self.scale, float, "scale"))
        if (self.image is None) == (self.embeds is None):
            came = "neither" if self.image is None else "both"
            raise UsageError(f"an IPAdapter wants image= (with encoder=) or embeds=, got {came}")
        if self.image is not None and self.encoder is None:
            raise UsageError(
                "an IPAdapter with image= wants encoder=, the folder of CLIP's vision model "
                "(CLIPVisionModelWithProjection; IP-Adapter's models/image_encoder); or give embeds="
            )
        file = self.file if isinstance(self.file, IPAdapterFile) else IPAdapterFile(self.file)
        embeds, negative = self._features(file)
        with torch.no_grad():
            tokens, negative_tokens = (
                file.projection(one).flatten(0, 1)[None] for one in (embeds, negative.expand_as(embeds))
            )
        digest = hashlib.sha256(embeds.contiguous().numpy().tobytes()).hexdigest()[:12]
        checked = {"file": file, "scale": scale, "start": start, "end": end, "image": None, "encoder": None}
        checked |= {"embeds": embeds, "negative_embeds": negative, "tokens": tokens, "_hash": digest}
        checked |= {"negative_tokens": negative_tokens, "_step": None}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _features(self, file: IPAdapterFile) -> tuple[Tensor, Tensor]:
        """Give CLIP's features (n, ...) and those of no picture (1, ...), float32, checked."""
        if self.image is not None:
            several = list(self.image) if isinstance(self.image, list | tuple) else [self.image]
            if not 0 < len(several) <= MAX_IMAGES:
                raise UsageError(f"image should be 1 to {MAX_IMAGES} pictures, got {len(several)}")
            check_value(self.encoder, str | os.PathLike, "encoder")
            embeds, negative = encode_images(self.encoder, several, file.reads)
            _check_features(file, embeds, "the encoder's features")
            return embeds, negative
        embeds = _check_features(file, self.embeds, "embeds")
        if self.negative_embeds is not None:
            negative = _check_features(file, self.negative_embeds, "negative_embeds")
            if negative.shape[1:] != embeds.shape[1:] or len(negative) != 1:
                raise UsageError(
                    f"negative_embeds should be of shape {(1, *embeds.shape[1:])}, got {tuple(negative.shape)}"
                )
            return embeds, negative
        if file.reads == "states":
            raise UsageError(
                f"'{escaped(file.path)}' reads hidden states, so embeds= wants negative_embeds= beside it: those of a "
                "picture of zeros"
            )
        return embeds, torch.zeros_like(embeds[:1])

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata: name, scale, image (a hash of its features), hash, sha256, ..."""
        found: dict[str, Any] = {"name": self.file.name, "scale": self.scale, "image": self._hash}
        usual = {"start": 0.0, "end": 1.0}
        found |= {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        whole = self.file.hashes[0]
        return {**found, "hash": whole[:10], "sha256": whole}

    def begin(self) -> "IPAdapter":
        """Return one for one run of a sampler, which stands at a step of its own."""
        return copy.copy(self)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError or MismatchError if it cannot be attached to a network."""
        for attention in self.file.processors(unet):
            if attention.processor is not None:
                raise UsageError(
                    "an IP-Adapter sets attention processors, and this UNet has some already; take the others off"
                )

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_step", step)

    def attach(self, network: nn.Module) -> Undo:
        """Put the picture's tokens behind the text's; outside of its part of the steps, and at scale 0, nothing."""
        self.check(network)
        if self.scale == 0 or not is_within(self._step, self.start, self.end):
            return lambda: None
        first = network.input_blocks[0][0].weight
        undo = [wrap(network, _WithImage(self))]
        for attention, processor in self.file.processors(network).items():
            put(processor, first.device, first.dtype)
            mine = copy.copy(processor)  # with the same weights
            mine.scale, mine.num_tokens = self.scale, self.tokens.shape[1]
            undo.append(fill(attention, "processor", mine))
        return lambda: [one() for one in reversed(undo)] and None

    def join(self, context: Tensor) -> Tensor:
        """Put tokens behind a context (b, n, d), those of no picture in the rows without the condition."""
        without = 0 if self._step is None else self._step.unconditional
        rows = [
            tokens.to(context).expand(count, -1, -1)
            for tokens, count in ((self.negative_tokens, without), (self.tokens, len(context) - without))
        ]
        return torch.cat([context, torch.cat(rows)], dim=1)


def _check_features(file: IPAdapterFile, given: Any, name: str) -> Tensor:
    """Return features of pictures as float32 on the CPU, or say what was wanted."""
    width, sides = file.projection.width, 2 if file.reads == "embeds" else 3
    words = f"(n, {width})" if sides == 2 else f"(n, tokens, {width})"
    if not isinstance(given, Tensor):
        raise UsageError(f"{name} should be a tensor {words}, got {shown(given)}")
    given = given.detach().float().cpu()
    if given.dim() != sides or given.shape[-1] != width or not 0 < len(given) <= MAX_IMAGES:
        raise MismatchError(
            f"{name} for '{escaped(file.path)}' should be of shape {words}, got {tuple(given.shape)}; the published "
            "files read CLIP ViT-H/14's"
        )
    if not torch.isfinite(given).all():
        raise UsageError(f"{name} should be finite, got NaN or infinity")
    return given


class _WithImage:
    """A UNet's call with a picture's tokens in its context."""

    def __init__(self, adapter: IPAdapter):
        self._adapter = adapter

    def __call__(
        self,
        proceed: Callable[..., Any],
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return proceed(x, timesteps, self._adapter.join(context), *args, **kwargs)

    def state(self) -> tuple[str]:
        """Say what a captured graph depends on beside the context, which is an argument: nothing."""
        return ("IPAdapter",)
