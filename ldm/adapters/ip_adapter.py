"""IP-Adapter (arXiv:2308.06721): a picture as a prompt, beside the text.

    look = IPAdapter("ip-adapter_sd15.safetensors", "portrait.png", 0.6, image_encoder="models/image_encoder")
    sd.txt2img("a woman in a garden", adapters=[look])

CLIP's features of the picture become tokens behind the text's, and each attention to the context answers to both, by
layers of its own for the picture's. FaceID reads the embedding of a face recognition instead, and brings a LoRA along.
"""

import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ldm.adapters.controls import check_span, is_within, put, unusual
from ldm.adapters.ip_adapter_attention import (
    ImageAttention,
    ImagePart,
    Painted,
    Scale,
    check_scale,
    scale_at,
    scales_of,
)
from ldm.adapters.ip_adapter_file import IPAdapterFile
from ldm.adapters.ip_adapter_images import RegionMask, encode_images
from ldm.errors import MismatchError, UsageError, escaped, shown
from ldm.modules.processors import SlicedAttnProcessor
from ldm.modules.seams import Change, Rank, StepInfo, Undo, fill, undo_all, wrap
from ldm.values import check_value

MAX_IMAGES = 16
COMBINES = ("concat", "average")
REPLACED = (ImageAttention, SlicedAttnProcessor)  # by what answers as they do, and more
# How people name the second version of FaceID-plus, whose tensors are named and shaped as the first one's.
SECOND_VERSION = re.compile(r"plus[-_ ]?v2", re.IGNORECASE)
Features = dict[str, Tensor]  # "embeds" or "states" of CLIP, "ids" of faces -> (n, ...)


@dataclass(frozen=True, eq=False)
class IPAdapter:
    """An IP-Adapter with its pictures, for some of the steps; any number of them, beside any number of others.

    Args:
        file: path or IPAdapterFile; an IPAdapterFile from then on, which serves any number of them.
        image: a picture of PIL, the path of one, or a list of these.
        scale: of the picture's answer; 0 = none. For blocks, as diffusers has it: {"down": {"block_2": [0, 1]},
            "mid": 0.5, "up": 1}, where what is not named has 0. A list of these is for parts of the steps of the same
            length; a function is given the share of the sampler's way, 0 to below 1, and gives one of these.
        image_encoder: CLIP's vision model, for `image`: its folder, one file, or the model; for most published files
            ViT-H/14, IP-Adapter's models/image_encoder, for those named vit-G its sdxl_models/image_encoder. One
            that is named by its path is read, and let go again.
        embeds: CLIP's features instead of image: see IPAdapterFile.reads.
        id_embeds: for FaceID, embeddings of a face recognition, (n, 512) or (512,), tensor or array; FaceID-plus takes
            as many pictures (or embeds) of the same faces beside them.
        negative_image: what is not wanted: stands in the rows without the condition, as a negative prompt does. One,
            or as many as image has.
        negative_embeds: the same as features. Where neither is given: zeros for "embeds"; for "states" those of a
            picture of zeros, which only the encoder knows.
        mask: where in what is painted the pictures have a say (see ip_adapter_images.RegionMask); one for all, or a
            list of one for each, which then answer one by one.
        combine: of several pictures: "concat" lets their tokens stand side by side, "average" takes the mean of their
            features.
        lora_scale: strength of the LoRA that a FaceID file brings along, in the steps that have the adapter.
        shortcut: for FaceID-plus: None = True if the file's name says "plusv2"; False as the first version was
            trained, True as the second; a number weighs what comes from the picture beside the face.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.
        encoder: the same as image_encoder, its earlier name.

    Attributes:
        tokens, negative_tokens: (1, n, context_dim), float32.

    Raises:
        UsageError: neither image nor embeds, or both, no encoder, or a number out of range.
        MismatchError: features of another width.
        Others: as IPAdapterFile and encode_images.
    """

    file: IPAdapterFile | str | os.PathLike
    image: Any = None
    scale: Scale = 1.0
    image_encoder: Any = None
    embeds: Tensor | None = None
    id_embeds: Any = None
    negative_image: Any = None
    negative_embeds: Tensor | None = None
    mask: Any = None
    combine: str = "concat"
    lora_scale: float = 1.0
    shortcut: bool | float | None = None
    start: float = 0.0
    end: float = 1.0
    encoder: InitVar[Any] = None
    rank: ClassVar[Rank] = Rank.ATTENTION

    def __post_init__(self, encoder: Any) -> None:
        if encoder is not None:
            if self.image_encoder is not None:
                raise UsageError(
                    "image_encoder is given twice, also as encoder, its earlier name; leave one out"
                )
            object.__setattr__(self, "image_encoder", encoder)
        start, end = check_span(self.start, self.end)
        if self.combine not in COMBINES:
            raise UsageError(f"combine should be one of {', '.join(COMBINES)}, got {shown(self.combine)}")
        checked: dict[str, Any] = {"scale": check_scale(self.scale), "start": start, "end": end}
        checked["lora_scale"] = float(check_value(self.lora_scale, float, "lora_scale"))
        file = self.file if isinstance(self.file, IPAdapterFile) else IPAdapterFile(self.file)
        checked |= {"file": file, "shortcut": self._shortcut(file)}
        given, none = self._features(file)
        count = len(next(iter(given.values())))
        checked["mask"] = self._masks(count)
        with torch.no_grad():
            checked["tokens"], checked["negative_tokens"] = (
                _tokens(file, features, count, checked["shortcut"]) for features in (given, none)
            )
        # The features themselves stay; a picture and a model would keep memory.
        checked |= {"image": None, "image_encoder": None, "negative_image": None}
        clip = file.reads
        checked |= {
            "embeds": given.get(clip),
            "negative_embeds": none.get(clip),
            "id_embeds": given.get("ids"),
        }
        checked |= {"_hash": _hash_of(given), "_negative_hash": _hash_of(none), "_step": None}
        checked["_is_usual_negative"] = self.negative_image is None and self.negative_embeds is None
        checked["_lora"] = WeakKeyDictionary()  # network -> changes of its weights
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    # --- what is given ---

    def _shortcut(self, file: IPAdapterFile) -> float:
        if self.shortcut is None:
            return float(bool(SECOND_VERSION.search(file.name)))
        if not (file.reads_face and file.reads):
            raise UsageError(
                f"shortcut= is for FaceID-plus, and '{escaped(file.path)}' is none; leave it out"
            )
        return float(
            self.shortcut
            if isinstance(self.shortcut, bool)
            else check_value(self.shortcut, float, "shortcut")
        )

    def _masks(self, count: int) -> tuple[RegionMask, ...]:
        if self.mask is None:
            return ()
        masks = self.mask if isinstance(self.mask, list | tuple) else [self.mask]
        if len(masks) not in {1, count}:
            raise UsageError(
                f"mask should be one, or a list of one for each of {count} pictures, got {len(masks)}"
            )
        return tuple(one if isinstance(one, RegionMask) else RegionMask(one) for one in masks)

    def _features(self, file: IPAdapterFile) -> tuple[Features, Features]:
        """Give what the projection reads, (n, ...) each, and what stands for none (1 or n, ...), float32, checked."""
        given: Features = {}
        none: Features = {}
        if file.reads_face:
            if self.id_embeds is None:
                raise UsageError(
                    f"'{escaped(file.path)}' is one of FaceID, which wants id_embeds=, embeddings (n, "
                    f"{file.projection.embed_dim}) of a face recognition such as insightface's"
                )
            given["ids"] = _checked_ids(file, self.id_embeds)
            none["ids"] = torch.zeros_like(given["ids"][:1])
        elif self.id_embeds is not None:
            raise UsageError(
                f"id_embeds= is for FaceID, and '{escaped(file.path)}' reads CLIP's features; leave it out"
            )
        clip = {"image", "embeds", "negative_image", "negative_embeds"}
        if file.reads:
            given[file.reads], none[file.reads] = self._clip_features(file)
        elif over := sorted(name for name in clip if getattr(self, name) is not None):
            raise UsageError(
                f"'{escaped(file.path)}' is one of FaceID, which reads id_embeds= alone; leave {over[0]}= out"
            )
        counts = {name: len(one) for name, one in given.items()}
        if len(set(counts.values())) > 1:
            raise UsageError(
                f"FaceID-plus wants as many pictures as faces, got {counts[file.reads]} and {counts['ids']}"
            )
        if self.combine == "average":
            given, none = ({k: x.mean(0, keepdim=True) for k, x in one.items()} for one in (given, none))
        return given, none

    def _clip_features(self, file: IPAdapterFile) -> tuple[Tensor, Tensor]:
        """Give CLIP's features (n, ...) and those that stand for none, (1 or n, ...)."""
        if (self.image is None) == (self.embeds is None):
            came = "neither" if self.image is None else "both"
            raise UsageError(f"an IPAdapter wants image= (with image_encoder=) or embeds=, got {came}")
        if self.negative_image is not None and self.negative_embeds is not None:
            raise UsageError("an IPAdapter takes negative_image= or negative_embeds=, got both")
        pictures, against = (_several(getattr(self, name), name) for name in ("image", "negative_image"))
        if (pictures or against) and self.image_encoder is None:
            raise UsageError(
                "an IPAdapter with image= or negative_image= wants image_encoder=, CLIP's vision model "
                "(CLIPVisionModelWithProjection; IP-Adapter's models/image_encoder); or give embeds="
            )
        embeds = none = negative = None
        if pictures or against:
            features, none = encode_images(self.image_encoder, pictures + against, file.reads)
            _checked_features(file, features, "the encoder's features")
            embeds, negative = features[: len(pictures)], features[len(pictures) :]
        if self.embeds is not None:
            embeds = _checked_features(file, self.embeds, "embeds")
        if self.negative_embeds is not None:
            negative = _checked_features(file, self.negative_embeds, "negative_embeds")
        if negative is None or not len(negative):
            if none is None and file.reads == "states":
                raise UsageError(
                    f"'{escaped(file.path)}' reads hidden states, so embeds= wants negative_embeds= beside it: "
                    "those of a picture of zeros"
                )
            return embeds, torch.zeros_like(embeds[:1]) if none is None else none
        if negative.shape[1:] != embeds.shape[1:] or len(negative) not in {1, len(embeds)}:
            name = "negative_image" if self.negative_embeds is None else "negative_embeds"
            raise UsageError(
                f"{name} should be 1 or {len(embeds)} of shape {tuple(embeds.shape[1:])}, got {len(negative)} of "
                f"{tuple(negative.shape[1:])}"
            )
        return embeds, negative

    # --- on and off ---

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata: name, scale, image (a hash of its features), hash, sha256, ..."""
        scale = getattr(self.scale, "__name__", "a function") if callable(self.scale) else self.scale
        found: dict[str, Any] = {"name": self.file.name, "scale": scale, "image": self._hash}
        if not self._is_usual_negative:
            found["negative_image"] = self._negative_hash
        if self.mask:
            found["mask"] = [one.hash for one in self.mask]
        usual = {"combine": "concat", "start": 0.0, "end": 1.0}
        usual |= {"lora_scale": 1.0} if self.file.factors else {}
        usual |= {"shortcut": 0.0} if self.file.reads_face and self.file.reads else {}
        found |= unusual(self, usual)
        whole = self.file.hashes[0]
        return {**found, "hash": whole[:10], "sha256": whole}

    def begin(self) -> "IPAdapter":
        """Return one for one run of a sampler, which stands at a step of its own."""
        return copy.copy(self)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError or MismatchError if it cannot be attached to a network."""
        names = []
        for place in self.file.places(unet):
            names.append(place.name)
            before = place.attention.processor
            if before is not None and not isinstance(before, REPLACED):
                raise UsageError(
                    "an IP-Adapter sets attention processors, and this UNet has some already; take the others off"
                )
        for one in self.scale if isinstance(self.scale, list) else [self.scale]:
            if not callable(one):
                scales_of(one, names)

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_step", step)

    def _scales(self, network: nn.Module) -> list[float]:
        """Give the scale in each attention at this step, or [] where the adapter has no say at all."""
        if not is_within(self._step, self.start, self.end):
            return []
        progress = 0.0 if self._step is None else self._step.index / max(1, self._step.total)
        scales = scales_of(
            scale_at(self.scale, progress), [place.name for place in self.file.places(network)]
        )
        return scales if any(scales) else []

    def changes(self, network: nn.Module) -> Mapping[str, Change]:
        """Say what FaceID's LoRA changes at this step."""
        if not self.file.factors or not self.lora_scale or not self._scales(network):
            return {}
        if network not in self._lora:
            self._lora[network] = self.file.lora_changes(network, self.lora_scale)
        return self._lora[network]

    def attach(self, network: nn.Module) -> Undo:
        """Put the picture's tokens behind the text's; outside of its part of the steps, and at scale 0, nothing."""
        self.check(network)
        scales = self._scales(network)
        if not scales:
            return lambda: None
        places, painted = self.file.places(network), Painted()
        undo = [wrap(network, _WithImage(self, painted, network))]
        for place, scale in zip(places, scales, strict=True):
            part = ImagePart(place.layers, scale, self.tokens.shape[1], self.mask, painted)
            before = place.attention.processor
            others = before.parts if isinstance(before, ImageAttention) else ()
            undo.append(fill(place.attention, "processor", ImageAttention((*others, part))))
        return undo_all(undo)

    def join(self, context: Tensor) -> Tensor:
        """Put tokens behind a context (b, n, d), those of no picture in the rows without the condition."""
        without = 0 if self._step is None else self._step.unconditional
        rows = [
            tokens.to(context).expand(count, -1, -1)
            for tokens, count in ((self.negative_tokens, without), (self.tokens, len(context) - without))
        ]
        return torch.cat([context, torch.cat(rows)], dim=1)


def _several(given: Any, name: str) -> list[Any]:
    """Give pictures as a list; [] for None."""
    if given is None:
        return []
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not 0 < len(several) <= MAX_IMAGES:
        raise UsageError(f"{name} should be 1 to {MAX_IMAGES} pictures, got {len(several)}")
    return several


def _checked_features(file: IPAdapterFile, given: Any, name: str) -> Tensor:
    """Return CLIP's features of pictures as float32 on the CPU, or say what was wanted."""
    width = file.projection.width
    words, sides = (f"(n, {width})", 2) if file.reads == "embeds" else (f"(n, tokens, {width})", 3)
    if not isinstance(given, Tensor):
        raise UsageError(f"{name} should be a tensor {words}, got {shown(given)}")
    given = given.detach().float().cpu()
    if given.dim() != sides or given.shape[-1] != width or 0 in given.shape or len(given) > 2 * MAX_IMAGES:
        raise MismatchError(
            f"{name} for '{escaped(file.path)}' should be of shape {words}, got {tuple(given.shape)}; the published "
            "files read CLIP ViT-H/14's, those named vit-G bigG's"
        )
    if not torch.isfinite(given).all():
        raise UsageError(f"{name} should be finite, got NaN or infinity")
    return given


def _checked_ids(file: IPAdapterFile, given: Any) -> Tensor:
    """Return embeddings of faces as float32 (n, embed_dim) on the CPU, or say what was wanted."""
    width = file.projection.embed_dim
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        given = torch.from_numpy(given.astype(np.float32))
    if not isinstance(given, Tensor):
        raise UsageError(f"id_embeds should be a tensor or array (n, {width}), got {shown(given)}")
    ids = given.detach().float().cpu()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[1] != width or not 0 < len(ids) <= MAX_IMAGES:
        raise MismatchError(
            f"id_embeds for '{escaped(file.path)}' should be of shape (n, {width}), got {tuple(given.shape)}"
        )
    if not torch.isfinite(ids).all():
        raise UsageError("id_embeds should be finite, got NaN or infinity")
    return ids


def _tokens(file: IPAdapterFile, features: Features, count: int, shortcut: float) -> Tensor:
    """Turn features of 1 or `count` pictures into the tokens of `count`, side by side: (1, n, context_dim)."""
    several = {name: one.expand(count, *one.shape[1:]) for name, one in features.items()}
    if file.reads_face and file.reads:
        tokens = file.projection(several["ids"], several[file.reads], shortcut)
    else:
        tokens = file.projection(next(iter(several.values())))
    return tokens.flatten(0, 1)[None]


def _hash_of(features: Features) -> str:
    digest = hashlib.sha256()
    for _, one in sorted(features.items()):
        digest.update(one.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


class _WithImage:
    """A UNet's call with a picture's tokens in its context."""

    def __init__(self, adapter: IPAdapter, painted: Painted, unet: nn.Module):
        self._adapter, self._painted, self._unet = adapter, painted, unet

    def __call__(
        self,
        proceed: Callable[..., Any],
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._painted.size = tuple(x.shape[2:])
        for mask in self._adapter.mask:
            mask.check_aspect(self._painted.size)
        # Where the call is: under sequential offload the UNet's weights are elsewhere until they are needed.
        for place in self._adapter.file.places(self._unet):
            put(place.layers, x.device, self._unet.input_blocks[0][0].weight.dtype)
        return proceed(x, timesteps, self._adapter.join(context), *args, **kwargs)

    def state(self) -> tuple[str]:
        """Say what a captured graph depends on beside the context, which is an argument: nothing."""
        return ("IPAdapter",)
