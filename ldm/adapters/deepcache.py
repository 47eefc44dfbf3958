"""DeepCache (arXiv:2312.00858): a UNet's deep features are cached from one sampling step to the next.

From step to step the outermost blocks' features change most, and the deep ones' hardly. So all blocks run at every few
levels only, and the shallow ones with the cached deep features in between. The numbers change: it is lossy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.limits import CACHE_INTERVAL, whole
from ldm.modules.diffusionmodules.openaimodel import SuperResModel, UNetModel
from ldm.modules.seams import Execution, Rank, StepInfo, Undo, Wrapped, own_forward, wrap


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
    forward = vars(unet).get("forward")
    while isinstance(forward, Wrapped):
        if isinstance(getattr(forward.around, "__self__", None), DeepCache):
            raise UsageError("this UNet has a DeepCache already; leave one of the two off")
        forward = forward.inner
    check_own_forward(unet, "cache_interval > 1")


def check_own_forward(unet: nn.Module, knob: str) -> None:
    """Raise UsageError unless a network is a UNetModel that runs its blocks by its own forward, and not compiled."""
    check_unet(unet, knob)
    forward = own_forward(unet)
    # What `ldm.kernels.optimize` puts there gives the plain code's numbers and takes its arguments.
    if type(unet).forward not in (UNetModel.forward, SuperResModel.forward) or not isinstance(
        forward, Execution | None
    ):
        raise UsageError(
            f"{knob} needs the UNet's own forward, but this {type(unet).__name__} has another one; "
            "leave it off"
        )


class _Cached(NamedTuple):
    level: int
    call: tuple[torch.Size, torch.dtype, torch.device]
    features: Tensor


class DeepCache:
    """Cached deep features of a UNet.

    Attach it with ldm.modules.seams.attached, or give it to `adapters=`. A level's calls are distinguished by
    their order, so that separate passes and tiles each get their own features, and features are used only for a
    call of the same shape, dtype and device as theirs.

    Attributes:
        interval, depth: as given.

    Args:
        cache_interval: all blocks run at every so many-th level; 1 = always, and nothing is attached.
        cache_depth: how many input blocks from the first on, and as many output blocks from the last
            backwards, are computed at the levels between: 1 to all of them.

    Raises:
        UsageError: a number out of range; when attached, another network, one with a forward of its own (ControlNet's
            calls the blocks itself), or a compiled one, where cache_interval > 1.
    """

    rank = Rank.SHORTCUTS

    def __init__(self, cache_interval: int, cache_depth: int = 1):
        self.interval = whole("cache_interval", cache_interval, *CACHE_INTERVAL)
        self.depth = whole("cache_depth", cache_depth, 1, 1000)
        self._level, self._calls, self._index = 0, 0, None
        self._cached: dict[int, _Cached] = {}

    def __repr__(self) -> str:
        return f"DeepCache({self.interval}, {self.depth})"

    def begin(self) -> "DeepCache":
        """Return one for one run of a sampler, without features."""
        return DeepCache(self.interval, self.depth)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        check_cache(unet, self.interval, self.depth)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"cache_interval": self.interval, "cache_depth": self.depth}

    def attach(self, network: nn.Module) -> Undo:
        """Let a UNet use cached features where it can."""
        self.check(network)
        return wrap(network, self._answer) if self.interval > 1 else lambda: None

    def at(self, step: StepInfo) -> None:
        """Go on to the next level where the sampler has."""
        if self._index is not None and step.index != self._index:
            self.next_level()
        self._index = step.index

    def next_level(self) -> None:
        """Go on to the next level: for callers of samplers that call no `at`, after each step."""
        self._level, self._calls = self._level + 1, 0
        self._cached = {i: one for i, one in self._cached.items() if self._level - one.level < self.interval}

    def _answer(self, unet: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place, self._calls = self._calls, self._calls + 1
        call = (x.shape, x.dtype, x.device)
        cached = self._cached.get(place)
        if cached is not None and cached.call == call:
            return unet(x, *args, depth=self.depth, deep=cached.features, **kwargs)
        answer, deep = unet(x, *args, depth=self.depth, **kwargs)
        self._cached[place] = _Cached(self._level, call, deep.detach())
        return answer
