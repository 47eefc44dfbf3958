"""ControlNet (arXiv:2302.05543): pictures are painted along the edges, depths or poses of a hint.

    edges = ControlNet("control_v11p_sd15_canny.pth", "edges.png", scale=0.8, end=0.6)
    sd.txt2img("a house", adapters=[edges])

The hint is what the network was trained on (edges, depths, poses, ...), at any size; programs that make one from a
photograph are others' business.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm import kernels
from ldm.adapters.controls import (
    CONTEXTS,
    ControlFile,
    Hinted,
    add_maps,
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
from ldm.checkpoints.key_mapping import CONTROL, control_to_diffusers
from ldm.checkpoints.matching import match
from ldm.errors import MismatchError, UsageError, shown
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.controlnet import HINT_FACTOR, ControlNetModel, soft_weights
from ldm.modules.seams import Rank, StepInfo, Undo, execution_of, state_of, states_of, wrap
from ldm.values import check_value

BESIDE = "the model that it was saved with"
# Tensors that say what a file is, whatever their values -> what it is built on.
_MARKERS = {"lora_controlnet": "lora", "difference": "difference"}
_XL = re.compile(r"(^|\.)(add_embedding|label_emb|control_type_embedding|class_embedding)\.")
_STEM = "input_blocks.0.0"


class ControlNetFile(ControlFile):
    """A ControlNet's file for Stable Diffusion v1, as cldm or diffusers name its tensors; see ControlFile.

    A whole model that holds one, as the first ones were published, is read for its ControlNet alone. The file of a
    network's name that holds "shuffle" is of one whose maps are averaged, which no tensor says.

    A Control-LoRA (Stability's) and a difference file hold what is added to the weights that the UNet itself has on
    its way down, and whole layers where it has none. They are put together with the UNet that they are used on.

    Attributes:
        built_on: "lora" or "difference" if the UNet's weights are needed; None for a whole ControlNet.
    """

    family = "ControlNet"
    wanted = "a ControlNet"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._networks: WeakKeyDictionary[nn.Module, tuple[Any, ControlNetModel]] = WeakKeyDictionary()

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """As ControlFile.own; of a whole model, the ControlNet's part. Those of Stable Diffusion XL are refused."""
        found = super().own(infos)
        if any(name.startswith(CONTROL) for name in found):
            self.ignored = {name: BESIDE for name in found if not name.startswith(CONTROL)}
        if any(_XL.search(name) for name in found):
            raise self.misfit("one for Stable Diffusion XL")
        marks = {name for name in found if name.removeprefix(CONTROL) in _MARKERS}
        self.built_on = next((_MARKERS[name.removeprefix(CONTROL)] for name in sorted(marks)), None)
        if self.built_on is None and any(name.endswith((".up", ".down")) for name in found):
            self.built_on = "lora"  # whose marker an export left out
        self.ignored |= dict.fromkeys(marks, "a marker")
        return {name: info for name, info in found.items() if name not in self.ignored}

    def network(self, unet: nn.Module, renew: bool = False) -> ControlNetModel:
        """Give the network for a UNet, the same one each time.

        Args:
            renew: put one that is built on the UNet's weights together again if these were changed since, also by a
                LoRA that is attached.

        Raises:
            UsageError: not a UNetModel, one without transformers, or a compiled one.
            MismatchError: it is for another UNet.
        """
        check_unet(unet, "a ControlNet")
        state, network = self._networks.get(unet, (None, None))
        if network is None or (renew and self.built_on is not None):
            now = states_of(list(unet.parameters())) if self.built_on is not None else None
            if network is None or now != state:
                network = self._build(unet)
                self._networks[unet] = (now, network)
        return network

    def _build(self, unet: nn.Module) -> ControlNetModel:
        tensors = {name.removeprefix(CONTROL): values for name, values in self.tensors.items()}
        transformers = [part for part in unet.modules() if isinstance(part, SpatialTransformer)]
        if not transformers:
            raise UsageError("a ControlNet needs a UNet with spatial transformers, and this one has none")
        width = transformers[0].transformer_blocks[0].attn2.to_k.in_features
        widths = {
            values.shape[1]
            for name, values in tensors.items()
            if name.endswith(("attn2.to_k.weight", "attn2.to_k.down")) and values.ndim > 1
        }
        if widths - {width}:
            other = max(widths)
            whose = f" of {CONTEXTS[other]}" if other in CONTEXTS else ""
            raise self.misfit(f"one for a context{whose} {other} wide; the model's is {width} wide")
        is_diffusers = "controlnet_mid_block.weight" in tensors
        if is_diffusers and self.built_on is not None:
            raise self.misfit(
                "one that is built on a UNet's weights, by diffusers' names; cldm's are known here"
            )
        stem = tensors.get("conv_in.weight" if is_diffusers else f"{_STEM}.weight")
        pixels = tensors.get(
            "controlnet_cond_embedding.conv_in.weight" if is_diffusers else "input_hint_block.0.weight"
        )
        channels = unet.in_channels if stem is None else stem.shape[1]
        if stem is None and f"{_STEM}.down" in tensors:
            channels = tensors[f"{_STEM}.down"].flatten(1).shape[1] // 9

        def build() -> ControlNetModel:
            return ControlNetModel.beside(unet, channels, 3 if pixels is None else pixels.shape[1])

        with torch.device("meta"):
            wanted = {name: tuple(values.shape) for name, values in build().state_dict().items()}
        if self.built_on is not None:
            own = {name: x for name, x in unet.state_dict().items() if name in wanted}
            own[f"{_STEM}.weight"] = own[f"{_STEM}.weight"][:, :channels]
            try:
                tensors = together(tensors, own, self.built_on)
            except ValueError as error:
                raise self.misfit(f"one for another UNet: {error}") from None
        theirs = control_to_diffusers(wanted) if is_diffusers else {}
        try:
            places = match(
                self.path,
                infos={name: TensorInfo(tuple(one.shape), one.dtype) for name, one in tensors.items()},
                wanted=wanted,
                rename={name: ours for ours, name in theirs.items()},
                ignored={},
                initialised={},
            )
        except MismatchError as error:
            reason = str(error).partition("does not fit the model: ")[2].partition("; ")[0]
            raise self.misfit(f"one for another UNet: {reason}") from None
        return filled(build, {ours: tensors[name] for name, ours in places.items()})


def together(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], built_on: str) -> dict[str, Tensor]:
    """Put a Control-LoRA or a difference file together with the weights of a UNet.

    Args:
        tensors: of the file, by cldm's names. A LoRA's: "<layer>.up" (out, rank, ...) and "<layer>.down" (rank, in,
            ...), whose product is added to the layer's weight; any other tensor takes the place of the UNet's.
        own: the UNet's weights on its way down. Those that nothing changes are used as they are, not copied.
        built_on: "lora" or "difference".

    Raises:
        ValueError: something in the file is for a layer that the UNet does not have, or has in another shape.
    """
    dtype = next(iter(own.values())).dtype
    found = {name: x.detach() for name, x in own.items()}

    def add(name: str, change: Tensor) -> None:
        if name not in own or own[name].numel() != change.numel():
            raise ValueError(f"it changes {shown(name)}, which is not there, or of another shape")
        wide = own[name].detach().float()
        found[name] = (wide + change.to(wide.device).reshape(wide.shape)).to(dtype)

    for name, values in tensors.items():
        layer, _, last = name.rpartition(".")
        if built_on == "lora" and last in ("up", "down"):
            up, down = (tensors.get(f"{layer}.{one}") for one in ("up", "down"))
            if up is None or down is None or up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
                raise ValueError(f"{shown(layer)} has no up and down that go together")
            if last == "up":
                add(f"{layer}.weight", up.float().flatten(1) @ down.float().flatten(1))
        elif built_on == "difference" and name in own:
            add(name, values.float())
        else:
            found[name] = values.to(dtype)
    return found


@dataclass(frozen=True, eq=False)
class ControlNet(Hinted):
    """A ControlNet with its hint, for some of the steps: maps that are added to the UNet's skips. Several add up.

    Args:
        file: path or ControlNetFile; a ControlNetFile from then on, which serves any number of them.
        hint: what to paint along: see `controls.Hint`; a Hint from then on.
        scale: of its maps; 0 = none.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.
        guess: ControlNet's guess mode: rows without the prompt's condition are left alone, and the maps weigh
            0.825 ** (12 - i), so that a picture follows the hint without a prompt.
            A1111 calls it "ControlNet is more important".
        weights: factors of the maps, one for each input block and one for the middle (13 for Stable Diffusion v1), or
            "soft" for those of guess mode alone, A1111's "My prompt is more important". None = 1 each.
        fit: of a hint of another aspect: "crop", "pad" or "stretch".
        pooled: the maps are averaged over their space, as the "shuffle" ControlNet was trained, and rows without the
            condition are left alone; None = where the file's name holds "shuffle".
        only_mid_control: add the middle block's map alone, as cldm's option of that name.

    Raises:
        UsageError: a number that is not finite or out of range, no hint, or one that is no picture.
        Others: as ControlNetFile.
    """

    file: ControlNetFile | str | os.PathLike
    hint: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    weights: Sequence[float] | str | None = None
    fit: str = "crop"
    pooled: bool | None = None
    only_mid_control: bool = False
    rank: ClassVar[Rank] = Rank.RESIDUALS

    def __post_init__(self) -> None:
        start, end = check_span(self.start, self.end)
        weights = self.weights
        if isinstance(weights, str):
            if weights != "soft":
                raise UsageError(f"weights should be numbers, 'soft' or None, got {shown(weights)}")
        elif weights is not None:
            weights = tuple(float(one) for one in check_value(weights, Sequence[float], "weights"))
        checked = {
            "scale": float(check_value(self.scale, float, "scale")),
            "start": start,
            "end": end,
            "guess": bool(check_value(self.guess, bool, "guess")),
            "weights": weights,
            "hint": hint_of(self.hint, self.fit),
            "only_mid_control": bool(check_value(self.only_mid_control, bool, "only_mid_control")),
            "pooled": None if self.pooled is None else bool(check_value(self.pooled, bool, "pooled")),
        }
        checked["file"] = self.file if isinstance(self.file, ControlNetFile) else ControlNetFile(self.file)
        if checked["pooled"] is None:
            checked["pooled"] = "shuffle" in checked["file"].name.lower()
        # Where the sampler is; and the hint as the network reads it, which is the same at every step.
        checked["fit"], checked["_step"], checked["_embedded"] = checked["hint"].fit, None, {}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata.

        Returns:
            name, scale, hint (a hash of it), hash (10 digits of the file's SHA-256, as A1111 writes it), sha256; and
            start, end, guess, weights, fit, pooled and only_mid_control where they are not the usual ones.
        """
        usual = {"start": 0.0, "end": 1.0, "guess": False, "weights": None, "pooled": False}
        usual |= {"only_mid_control": False}
        return described(self, usual)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError or MismatchError if it cannot be attached to a network."""
        self._check_weights(len(self.file.network(unet).zero_convs) + 1)

    def _check_weights(self, maps: int) -> None:
        if isinstance(self.weights, tuple) and len(self.weights) != maps:
            raise UsageError(
                f"weights should be {maps} numbers for this UNet, one for each input block and one for the middle, "
                f"got {len(self.weights)}"
            )

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_step", step)

    def attach(self, network: nn.Module) -> Undo:
        """Let a UNet add its maps; outside of its part of the steps, and at scale 0, nothing is attached."""
        check_unet(network, "a ControlNet")
        if self.scale == 0 or not is_within(self._step, self.start, self.end):
            return lambda: None
        self.file.network(network, renew=True)  # LoRAs come before it, and reach what it takes from the UNet
        return wrap(network, _Controlled(self, network))

    def factors(self, maps: int) -> list[float]:
        """List what the maps are multiplied by.

        Raises:
            UsageError: another number of weights.
        """
        self._check_weights(maps)
        factors = list(self.weights) if isinstance(self.weights, tuple) else [1.0] * maps
        if self.only_mid_control:
            factors = [0.0] * (maps - 1) + factors[-1:]
        if self.guess or self.weights == "soft":
            factors = [a * b for a, b in zip(factors, soft_weights(maps), strict=True)]
        return [self.scale * factor for factor in factors]

    def maps(self, unet: nn.Module, x: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor | None]:
        """Compute what is added to a UNet's call, from its arguments; None = nothing."""
        network = self.file.network(unet)
        put(network, x.device, unet.input_blocks[0][0].weight.dtype)
        _optimize_like(network, unet)
        leave = self._step.unconditional if self._step is not None and (self.guess or self.pooled) else 0
        rows = len(x)
        if leave == rows:
            return [None] * (len(network.zero_convs) + 1)
        embedded = self._rows_of_hint(network, x)[leave:]
        maps = network(
            x[leave:, : network.in_channels], None, timesteps[leave:], context[leave:], embedded=embedded
        )
        if self.pooled:
            maps = [one.mean((2, 3), keepdim=True) for one in maps]
        factors = self.factors(len(maps))
        if leave:
            maps = [torch.cat([one.new_zeros(leave, *one.shape[1:]), one]) for one in maps]
        return [one * factor if factor else None for one, factor in zip(maps, factors, strict=True)]

    def _rows_of_hint(self, network: ControlNetModel, x: Tensor) -> Tensor:
        """Give what the network makes of the hints, a row for each of x."""
        count = self.hint.check_rows(images_of(self._step, len(x)))
        height, width = (HINT_FACTOR * side for side in x.shape[2:])
        first = network.input_hint_block[0].weight
        key = (height, width, x.device, first.dtype, state_of(first))
        if key not in self._embedded or torch.is_grad_enabled():
            self._embedded.clear()
            self._embedded[key] = network.embed_hint(self.hint.sized(height, width).to(first))
        embedded = self._embedded[key]
        return (
            embedded.expand(len(x), -1, -1, -1) if count == 1 else embedded.repeat(len(x) // count, 1, 1, 1)
        )


def _optimize_like(network: nn.Module, unet: nn.Module) -> None:
    """Fuse the modules of a network where those of the UNet are, and only there."""
    wanted = execution_of(unet) is not None
    if wanted != (execution_of(network.input_hint_block[0]) is not None):
        (kernels.optimize if wanted else kernels.restore)(network)


class _Controlled:
    """A UNet's call with the maps of a ControlNet."""

    def __init__(self, control: ControlNet, unet: nn.Module):
        self._control, self._unet = control, unet

    def __call__(
        self,
        proceed: Callable[..., Any],
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Any = None,
        *args: Any,
        control: Sequence[Tensor | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        maps = self._control.maps(self._unet, x, timesteps, context)
        return proceed(x, timesteps, context, *args, control=add_maps(control, maps), **kwargs)

    def state(self) -> tuple[str]:
        """Say what a captured graph depends on beside the maps, which are arguments: nothing."""
        return ("ControlNet",)
