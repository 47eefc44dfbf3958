"""T2I-Adapter (arXiv:2302.08453): pictures are painted along a hint, by maps that are added on the UNet's way down.

    sketch = T2IAdapter("t2iadapter_sketch_sd15v2.pth", "sketch.png", scale=0.9)
    sd.txt2img("a cat", adapters=[sketch])

Its maps depend on the hint alone, so that they are computed once for all steps: a hundredth of a ControlNet's work.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.adapters.controls import (
    ControlFile,
    Hinted,
    check_span,
    described,
    filled,
    hint_of,
    images_of,
    is_within,
    put,
)
from ldm.adapters.deepcache import check_unet
from ldm.checkpoints import TensorInfo
from ldm.checkpoints.report import first_few
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock
from ldm.modules.diffusionmodules.t2i_adapter import HINT_FACTOR, T2IAdapterModel
from ldm.modules.seams import Rank, StepInfo, Undo, wrap
from ldm.values import check_value

_BLOCK = r"body\.(\d+)\.(block[12]\..+)"  # of the full kind, all levels' in one row
_LIGHT = r"body\.(\d+)\.body\.(\d+\..+)"
STYLE = ("style_embedding", "transformer_layes.")


class T2IAdapterFile(ControlFile):
    """A T2I-Adapter's file for Stable Diffusion v1, full or light, as TencentARC or diffusers name its tensors."""

    family = "T2I-Adapter"
    wanted = "a T2I-Adapter"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._networks: WeakKeyDictionary[nn.Module, T2IAdapterModel] = WeakKeyDictionary()

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """As ControlFile.own; those of style, or for pixels of another depth, are refused."""
        found = super().own(infos)
        if any(name.startswith(STYLE) for name in found):
            raise self.misfit(
                "one of style, which reads CLIP's features of a picture; use StyleAdapter(file, image=...)"
            )
        first = found.get("conv_in.weight", found.get("adapter.conv_in.weight"))
        first = first or found.get("body.0.in_conv.weight", found.get("adapter.body.0.in_conv.weight"))
        channels = first.shape[1] / HINT_FACTOR**2 if first is not None and len(first.shape) > 1 else 0
        if channels not in (1, 3):
            raise self.misfit(
                "one for Stable Diffusion XL" if channels in (4, 12) else "one without a first convolution"
            )
        return found

    def network(self, unet: nn.Module) -> T2IAdapterModel:
        """Give the network for a UNet, the same one each time.

        Raises:
            UsageError: not a UNetModel, or a compiled one.
            MismatchError: it is for another UNet.
        """
        check_unet(unet, "a T2I-Adapter")
        if unet not in self._networks:
            self._networks[unet] = self._build(unet)
        return self._networks[unet]

    def _build(self, unet: nn.Module) -> T2IAdapterModel:
        try:
            network = assemble(self.tensors, len(unet.channel_mult))
        except ValueError as error:
            raise self.misfit(f"one for another UNet: {error}") from None
        widths = [_width(level) for level in network.body]
        theirs = [unet.input_blocks[place][0].out_channels for place in places(unet)]
        if widths != theirs:
            raise self.misfit(f"one for a UNet {widths} wide; the model's is {theirs} wide")
        return network


def assemble(tensors: Mapping[str, Tensor], levels: int) -> T2IAdapterModel:
    """Build the network that holds these tensors, by TencentARC's or diffusers' names.

    Raises:
        ValueError: they are not those of so many levels, or do not go together; says why.
    """
    names = [name.removeprefix("adapter.") for name in tensors]
    numbers = [int(m[1]) for name in names if (m := re.fullmatch(_BLOCK, name))]
    in_a_row = (max(numbers) + 1) // levels if numbers else 0  # blocks of each level
    tensors = dict(zip((_modern(name, in_a_row) for name in names), tensors.values(), strict=True))
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"body\.0\.resnets\.(\d+)\.", name))}
    shapes = {name: tuple(values.shape) for name, values in tensors.items() if name.endswith("weight")}
    build = partial(T2IAdapterModel, shapes, levels, max(blocks, default=0) + 1)
    try:
        with torch.device("meta"):
            empty = build()
            first = next(empty.parameters()).shape[1] // HINT_FACTOR**2
            empty(torch.zeros(1, first, 8 * HINT_FACTOR, 8 * HINT_FACTOR))
    except (KeyError, ValueError, RuntimeError):
        raise ValueError(f"its tensors are not those of {levels} levels that follow one another") from None
    wanted = {name: tuple(values.shape) for name, values in empty.state_dict().items()}
    given = {name: tuple(values.shape) for name, values in tensors.items()}
    if odd := sorted({name for name, _ in wanted.items() ^ given.items()}):
        raise ValueError(f"{len(odd)} of its tensors differ ({first_few(odd, 2)})")
    return filled(build, tensors)


def _modern(name: str, in_a_row: int) -> str:
    """Give a tensor's name, without "adapter.", as diffusers has it; in_a_row: see _build."""
    if in_a_row and (m := re.fullmatch(_BLOCK, name)):
        level, block = divmod(int(m[1]), in_a_row)
        return f"body.{level}.resnets.{block}.{m[2]}"
    if in_a_row and (m := re.fullmatch(r"body\.(\d+)\.(in_conv\..+)", name)):
        return f"body.{int(m[1]) // in_a_row}.{m[2]}"
    return re.sub(_LIGHT, r"body.\1.resnets.\2", name)


def _width(level: nn.Module) -> int:
    last = level.resnets[-1].block2 if isinstance(level.out_conv, nn.Identity) else level.out_conv
    return last.out_channels


def places(unet: nn.Module) -> list[int]:
    """List the input blocks that an adapter's maps are added behind: each level's last before it is halved."""
    halving = [i for i, block in enumerate(unet.input_blocks) if _halves(block[0])]
    return [i - 1 for i in halving] + [len(unet.input_blocks) - 1]


def _halves(layer: nn.Module) -> bool:
    return isinstance(layer, Downsample) or (isinstance(layer, ResBlock) and layer.updown)


@dataclass(frozen=True, eq=False)
class T2IAdapter(Hinted):
    """A T2I-Adapter with its hint, for some of the steps. Several add up, also to ControlNets.

    Args:
        file: path or T2IAdapterFile; a T2IAdapterFile from then on, which serves any number of them.
        hint: what to paint along: see `controls.Hint`; a Hint from then on.
        scale: of its maps; 0 = none.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.
        fit: of a hint of another aspect: "crop", "pad" or "stretch".

    Raises:
        UsageError: a number that is not finite or out of range, no hint, or one that is no picture.
        Others: as T2IAdapterFile.
    """

    file: T2IAdapterFile | str | os.PathLike
    hint: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    fit: str = "crop"
    rank: ClassVar[Rank] = Rank.RESIDUALS

    def __post_init__(self) -> None:
        start, end = check_span(self.start, self.end)
        checked = {
            "scale": float(check_value(self.scale, float, "scale")),
            "start": start,
            "end": end,
            "hint": hint_of(self.hint, self.fit),
        }
        checked["file"] = self.file if isinstance(self.file, T2IAdapterFile) else T2IAdapterFile(self.file)
        checked["fit"] = checked["hint"].fit
        checked["_step"], checked["_maps"] = None, {}  # where the sampler is, and its maps by size and place
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata, as ControlNet.describe does."""
        return described(self, {"start": 0.0, "end": 1.0})

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError or MismatchError if it cannot be attached to a network."""
        self.file.network(unet)

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_step", step)

    def attach(self, network: nn.Module) -> Undo:
        """Let a UNet add its maps; outside of its part of the steps, and at scale 0, nothing is attached."""
        self.check(network)
        if self.scale == 0 or not is_within(self._step, self.start, self.end):
            return lambda: None
        return wrap(network, _Guided(self, network))

    def maps(self, unet: nn.Module, x: Tensor) -> dict[int, Tensor]:
        """Compute what is added behind a UNet's input blocks, by their numbers, for latents x (b, c, h, w)."""
        count = self.hint.check_rows(images_of(self._step, len(x)))
        network = self.file.network(unet)
        dtype = unet.input_blocks[0][0].weight.dtype
        put(network, x.device, dtype)
        key = (*x.shape[2:], x.device, dtype)
        if key not in self._maps or torch.is_grad_enabled():
            first = next(network.parameters())
            hint = self.hint.sized(*(HINT_FACTOR * side for side in x.shape[2:])).to(first)
            if first.shape[1] == HINT_FACTOR**2:
                hint = hint.mean(1, keepdim=True)
            self._maps.clear()
            self._maps[key] = [self.scale * one for one in network(hint)]
        maps = self._maps[key]
        return {
            place: one if count == 1 else one.repeat(len(x) // count, 1, 1, 1)
            for place, one in zip(places(unet), maps, strict=True)
        }


class _Guided:
    """A UNet's call with the maps of a T2I-Adapter."""

    def __init__(self, adapter: T2IAdapter, unet: nn.Module):
        self._adapter, self._unet = adapter, unet

    def __call__(
        self,
        proceed: Callable[..., Any],
        x: Tensor,
        *args: Any,
        features: Mapping[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        maps = self._adapter.maps(self._unet, x)
        for place, one in (features or {}).items():
            maps[place] = maps[place] + one if place in maps else one
        return proceed(x, *args, features=maps, **kwargs)

    def state(self) -> tuple[str]:
        """Say what a captured graph depends on beside the maps, which are arguments: nothing."""
        return ("T2IAdapter",)
