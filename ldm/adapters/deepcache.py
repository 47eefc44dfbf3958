"""The UNet's deep features, kept from one step to the next: DeepCache (arXiv:2312.00858).

What changes from step to step is mostly what the outermost blocks compute; what the deep ones pass up to them hardly
does. So the whole UNet is asked at every few levels only, and in between its shallow part with the deep features
of the last whole answer. The numbers are others: this way is lossy.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.kernels.fused_module import FusedModule
from ldm.limits import CACHE_INTERVAL, whole
from ldm.modules.diffusionmodules.openaimodel import SuperResModel, UNetModel


def check_unet(unet: nn.Module, knob: str) -> None:
    """Raise UsageError unless a network is a UNetModel, and not compiled."""
    if not isinstance(unet, UNetModel):
        raise UsageError(f"{knob} needs a UNetModel, got {type(unet).__name__}; leave it off")
    check_compiled(unet, knob)


def check_compiled(module: nn.Module, knob: str) -> None:
    """Raise UsageError if a module was compiled: what is attached to it afterwards would not be noticed."""
    if module._compiled_call_impl is not None:
        raise UsageError(
            f"{knob} needs the plain {type(module).__name__}, but this one was compiled; leave one of the two off"
        )


def check_cache(unet: nn.Module, cache_interval: int, cache_depth: int) -> tuple[int, int]:
    """Return what DeepCache takes for this UNet.

    Raises:
        UsageError: as DeepCache.
    """
    interval = whole("cache_interval", cache_interval, *CACHE_INTERVAL)
    depth = whole("cache_depth", cache_depth, 1, len(getattr(unet, "output_blocks", [None])))
    if interval > 1:
        _check_forward(unet)
    return interval, depth


def _check_forward(unet: nn.Module) -> None:
    check_unet(unet, "cache_interval > 1")
    own = type(unet).forward in (UNetModel.forward, SuperResModel.forward)
    # What `ldm.kernels.optimize` puts there gives the plain code's numbers and calls the blocks as they are.
    if not own or not isinstance(vars(unet).get("forward"), FusedModule | None):
        raise UsageError(
            f"cache_interval > 1 needs the UNet's own forward, but this {type(unet).__name__} has another one; "
            "leave it off"
        )


class _Kept(NamedTuple):
    level: int
    asked_with: tuple[torch.Size, torch.dtype, torch.device]
    features: Tensor


class _Recollection(nn.Module):
    """Stands where a UNet's middle block was and answers with features of an earlier call, whatever it is asked."""

    features: Tensor | None = None

    def forward(self, h: Tensor, emb: Tensor, context: Any = None) -> Tensor:
        return self.features


class DeepCache:
    """Deep features of a UNet for one run of a sampler; a run needs a fresh object.

    Within `attached()` the UNet answers from kept features where it can; outside it is as it ever was. A
    level's questions are told apart by their order, so that separate passes and tiles each meet their own
    features again, and features are used only for a question of the same shape, dtype and device as theirs.

    Attributes:
        interval, depth: as given.

    Args:
        unet: any UNetModel or SuperResModel.
        cache_interval: the whole UNet is asked at every so many-th level; 1 = always, and nothing is attached.
        cache_depth: how many input blocks from the first on, and as many output blocks from the last
            backwards, are computed at the levels between: 1 to all of them.

    Raises:
        UsageError: a number out of range; another network, one with a forward of its own (ControlNet's calls
            the blocks itself), or a compiled one, where cache_interval > 1.
    """

    def __init__(self, unet: nn.Module, cache_interval: int = 1, cache_depth: int = 1):
        self.unet = unet
        self.interval, self.depth = check_cache(unet, cache_interval, cache_depth)
        self._level, self._asked = 0, 0
        self._kept: dict[int, _Kept] = {}
        if self.interval > 1:
            self._build_shallow()

    def _build_shallow(self) -> None:
        """Make a UNet of the outermost blocks, sharing their weights, whose middle remembers all the others."""
        unet, depth = self.unet, self.depth
        inner = len(unet.output_blocks) - depth
        self._deepest = unet.output_blocks[inner - 1] if inner else unet.middle_block
        self._recollection = _Recollection()
        self._shallow = copy.copy(unet)
        vars(self._shallow).pop("forward", None)  # it would ask the whole UNet
        self._shallow._modules = {
            **unet._modules,
            "input_blocks": unet.input_blocks[:depth],
            "middle_block": self._recollection,
            "output_blocks": unet.output_blocks[inner:],
        }

    def next_level(self) -> None:
        """Tell that the sampler has finished a level: to be called after each of its steps."""
        self._level, self._asked = self._level + 1, 0
        self._kept = {i: kept for i, kept in self._kept.items() if self._level - kept.level < self.interval}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let the UNet answer from kept features, on this object only and until the end of the block."""
        if self.interval == 1:
            yield
            return
        _check_forward(self.unet)
        before, whole = vars(self.unet).get("forward"), self.unet.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._answer(whole, x, *args, **kwargs)

        self.unet.forward = forward
        try:
            yield
        finally:
            del self.unet.forward
            if before is not None:
                self.unet.forward = before

    def _answer(self, whole: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place, self._asked = self._asked, self._asked + 1
        asked_with = (x.shape, x.dtype, x.device)
        kept = self._kept.get(place)
        if kept is not None and kept.asked_with == asked_with:
            self._recollection.features = kept.features
            try:
                return self._shallow.forward(x, *args, **kwargs)
            finally:
                self._recollection.features = None
        caught: list[Tensor] = []
        hook = self._deepest.register_forward_hook(lambda module, given, output: caught.append(output))
        try:
            answer = whole(x, *args, **kwargs)
        finally:
            hook.remove()
        self._kept[place] = _Kept(self._level, asked_with, caught[-1].detach())
        return answer
