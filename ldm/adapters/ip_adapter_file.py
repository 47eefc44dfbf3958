"""Files of IP-Adapter (arXiv:2308.06721): which projection and which layers they hold, told by names and shapes."""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.adapters.controls import CONTEXTS, ControlFile, filled
from ldm.adapters.deepcache import check_unet
from ldm.checkpoints import TensorInfo
from ldm.checkpoints.report import first_few
from ldm.modules.encoders.image_tokens import (
    HEAD,
    FaceProjection,
    FaceResampler,
    ImageProjection,
    ImageResampler,
    ImageTokenMLP,
)
from ldm.modules.processors import IPAttnProcessor, named_attentions
from ldm.modules.seams import Change

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
LAYER = re.compile(r"\d+\.to_[kv]_ip\.weight")
FACTOR = re.compile(r"(\d+\.to_(?:q|k|v|out))_lora\.(down|up)\.weight")
FOREIGN = {2048: "Stable Diffusion XL (or Kolors)", 4096: "Flux or Stable Diffusion 3"}


class Place(NamedTuple):
    """One attention of a UNet to its context, and the layers that read a picture's tokens there.

    Attributes:
        name: as diffusers names it, "down_blocks.0.attentions.0.transformer_blocks.0.attn2".
    """

    name: str
    attention: nn.Module
    layers: IPAttnProcessor


class IPAdapterFile(ControlFile):
    """An IP-Adapter's file for Stable Diffusion v1: plain, light, plus, full-face, or FaceID; see ControlFile.

    Attributes:
        projection: from features to tokens.
        context_dim: of a token.
        reads: what of CLIP the projection takes: "embeds" (n, width), its projected embeddings; "states"
            (n, tokens, width), the hidden states before its last layer; None = nothing.
        reads_face: whether it takes embeddings of a face recognition, (n, embed_dim).
        factors: of FaceID's LoRA, (up, down) by "number of the attention.layer".
    """

    family = "IP-Adapter"
    wanted = "an IP-Adapter"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        found = {name.removeprefix(LAYERS): x for name, x in self.tensors.items() if name.startswith(LAYERS)}
        self.layers = {name: one for name, one in found.items() if LAYER.fullmatch(name)}
        halves = {name: match for name in found if (match := FACTOR.fullmatch(name))}
        odd = [name for name in found if name not in self.layers and name not in halves]
        if odd or not self.layers:
            raise self.misfit(f"one with other layers ({first_few(odd or self.tensors, 2)})")
        self.context_dim = next(iter(self.layers.values())).shape[-1]
        if self.context_dim in FOREIGN:
            raise self.misfit(f"one for {FOREIGN[self.context_dim]}: its context is {self.context_dim} wide")
        self.factors = self._paired({(match[1], match[2]): found[name] for name, match in halves.items()})
        given = {
            name.removeprefix(PROJECTION): one.float()
            for name, one in self.tensors.items()
            if name.startswith(PROJECTION)
        }
        try:
            self.projection = projection_of(given, self.context_dim)
        except (KeyError, IndexError, ValueError, RuntimeError):
            raise self.misfit(f"one whose image projection is not known ({first_few(given, 2)})") from None
        self.reads: str | None = self.projection.reads
        self.reads_face = isinstance(self.projection, FaceProjection)
        self._places: WeakKeyDictionary[nn.Module, list[Place]] = WeakKeyDictionary()

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """As ControlFile.own; files with further tensors are refused."""
        found = super().own(infos)
        odd = [name for name in found if not name.startswith((PROJECTION, LAYERS))]
        if odd:
            raise self.misfit(f"one with other names than {PROJECTION}* and {LAYERS}* ({first_few(odd, 2)})")
        return found

    def _paired(self, halves: Mapping[tuple[str, str], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Pair the factors of a LoRA, (out, rank) and (rank, in)."""
        pairs = {}
        for layer in dict.fromkeys(layer for layer, _ in halves):
            up, down = halves.get((layer, "up")), halves.get((layer, "down"))
            if up is None or down is None or up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
                raise self.misfit(f"one whose LoRA has no two factors that fit at {layer}_lora")
            pairs[layer] = (up, down)
        return pairs

    def places(self, unet: nn.Module) -> list[Place]:
        """List a UNet's attentions to the context with the layers for each, the same ones each time.

        Raises:
            UsageError: not a UNetModel, or a compiled one.
            MismatchError: it is for another UNet.
        """
        check_unet(unet, "an IP-Adapter")
        if unet not in self._places:
            self._places[unet] = self._build(unet)
        return self._places[unet]

    def _build(self, unet: nn.Module) -> list[Place]:
        """Layers are numbered as diffusers numbers a UNet's attentions; those to the context are the odd ones."""
        attentions = list(named_attentions(unet).items())
        wanted = {
            f"{i}.to_{part}_ip.weight": (one.to_k.out_features, one.to_k.in_features)
            for i, (_, one) in enumerate(attentions)
            if i % 2
            for part in "kv"
        }
        width = attentions[1][1].to_k.in_features if len(attentions) > 1 else None
        if width != self.context_dim:
            whose = f" of {CONTEXTS[self.context_dim]}" if self.context_dim in CONTEXTS else ""
            raise self.misfit(
                f"one for a context{whose} {self.context_dim} wide; the model's is {width} wide"
            )
        given = {name: tuple(one.shape) for name, one in self.layers.items()}
        odd = {name for name, _ in wanted.items() ^ given.items()}
        layers = {
            f"{i}.{part}": tuple(module.weight.shape)
            for i, (_, one) in enumerate(attentions)
            for part, module in _linear_layers(one).items()
        }
        odd |= {
            f"{n}_lora" for n, (up, down) in self.factors.items() if layers.get(n) != (len(up), down.shape[1])
        }
        if odd:
            raise self.misfit(
                f"one for another UNet: {len(odd)} of its tensors differ ({first_few(sorted(odd), 2)})"
            )
        return [
            Place(
                name,
                one,
                filled(
                    partial(IPAttnProcessor, one.to_k.out_features, width),
                    {f"to_{part}_ip.weight": self.layers[f"{i}.to_{part}_ip.weight"] for part in "kv"},
                ),
            )
            for i, (name, one) in enumerate(attentions)
            if i % 2
        ]

    def lora_changes(self, unet: nn.Module, strength: float) -> dict[str, Change]:
        """Say what FaceID's LoRA makes of a UNet's weights: W + strength * up @ down, by their names there."""
        self.places(unet)  # it fits
        names = {module: name for name, module in unet.named_modules()}
        found = {}
        for i, attention in enumerate(named_attentions(unet).values()):
            for part, module in _linear_layers(attention).items():
                if f"{i}.{part}" in self.factors:
                    change = partial(_with_factors, *self.factors[f"{i}.{part}"], strength)
                    found[f"{names[module]}.weight"] = Change(change)
        return found


def _linear_layers(attention: nn.Module) -> dict[str, nn.Module]:
    return {
        **{f"to_{part}": getattr(attention, f"to_{part}") for part in "qkv"},
        "to_out": attention.to_out[0],
    }


def _with_factors(up: Tensor, down: Tensor, strength: float, weight: Tensor) -> Tensor:
    up, down = (one.to(weight.device, torch.float32) for one in (up, down))
    return weight + strength * (up @ down)


def projection_of(tensors: Mapping[str, Tensor], context_dim: int, head: int = HEAD) -> nn.Module:
    """Build the projection that holds these tensors, told by their names: plain, full-face, plus, or one of FaceID.

    Args:
        head: features of a head of the kinds that attend, which their tensors do not say.

    Raises:
        KeyError, IndexError, ValueError, RuntimeError: they are none of these.
    """
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    build: Callable[[], nn.Module]
    if "perceiver_resampler.proj_in.weight" in shapes:
        middle, embed_dim = shapes["proj.0.weight"]
        dim = shapes["norm.weight"][0]
        parts = _resampler_sizes(shapes, "perceiver_resampler.", head)
        build = partial(
            FaceResampler, embed_dim, middle, shapes["proj.2.weight"][0] // dim, *parts, context_dim
        )
    elif "latents" in shapes:
        parts = _resampler_sizes(shapes, "", head)
        build = partial(ImageResampler, *parts, context_dim, shapes["latents"][1])
    elif "proj.3.weight" in shapes:
        hidden, width = shapes["proj.0.weight"]
        build = partial(ImageTokenMLP, width, hidden, context_dim)
    elif "proj.2.weight" in shapes:
        hidden, embed_dim = shapes["proj.0.weight"]
        build = partial(
            FaceProjection, embed_dim, hidden, context_dim, shapes["proj.2.weight"][0] // context_dim
        )
    else:
        rows, width = shapes["proj.weight"]
        build = partial(ImageProjection, width, context_dim, rows // context_dim)
    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in build().state_dict().items()}
    if wanted != shapes:
        raise ValueError("other tensors")
    return filled(build, tensors)


def _resampler_sizes(shapes: Mapping[str, tuple[int, ...]], prefix: str, head: int) -> tuple[int, ...]:
    """Read off a resampler's width, dim, inner, heads, depth and hidden features."""
    inner, dim = shapes[f"{prefix}layers.0.0.to_q.weight"]
    own = [name.removeprefix(prefix) for name in shapes if name.startswith(f"{prefix}layers.")]
    depth = len({name.split(".")[1] for name in own})
    width, hidden = shapes[f"{prefix}proj_in.weight"][1], shapes[f"{prefix}layers.0.1.1.weight"][0]
    return width, dim, inner, inner // head, depth, hidden
