"""Weights that stay in the machine's memory and visit a GPU part by part, for cards that a model does not fit on.

A part is a block of the UNet, one half of the autoencoder, or the text encoder. Its weights come when it is called and
go when it is done; those of the part that came after it the last time are fetched meanwhile. So two parts are there at
most, a fifth of Stable Diffusion's weights, and each step moves the whole UNet through the bus.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.helpers import pinned
from ldm.kernels.fused_module import WeightCache
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import AbstractEncoder

WHOLE = (Decoder, Encoder, AbstractEncoder, nn.Sequential)  # called as a whole; others are taken apart


def offloaded_parts(root: nn.Module) -> Iterator[nn.Module]:
    """Take a tree apart into modules that are called; what weights it has besides are its larger modules' own."""
    if isinstance(root, WHOLE) or not any(True for _ in root.children()):
        if any(True for _ in root.parameters()):
            yield root
        return
    for child in root.children():
        yield from offloaded_parts(child)


class _Part:
    """Weights of one part, and copies of them on the device while it works."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module, device
        self._copies = WeightCache()
        self.ready: torch.cuda.Event | None = None
        self._home: list[tuple[dict[str, Any], str, Tensor]] = []
        if device.type == "cuda":  # from such memory copies are made beside all else
            for p in self.weights:
                p.data = pinned(p.data)

    @property
    def weights(self) -> list[Tensor]:
        """The weights of all modules in it, each once."""
        return list(dict.fromkeys(self.module.parameters()))

    @property
    def copies(self) -> dict[Tensor, Tensor] | None:
        """Copies by weight; None if there are none."""
        return self._copies.value

    def copy(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to copy the weights, beside what the device does if there is a stream for that.

        Copies that are there are enough while they are of these weights as they are.
        """
        weights = self.weights

        def copy() -> dict[Tensor, Tensor]:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                copies = {p: p.detach().to(self.device, non_blocking=True, copy=True) for p in weights}
                self.ready = None if stream is None else stream.record_event()
            return copies

        self._copies.get(copy, *weights)

    def onload(self) -> None:
        """Put the copies where the weights were."""
        if self.ready is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(self.ready)
            for x in self.copies.values():
                x.record_stream(here)
        for module in self.module.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    self._home.append((module._parameters, name, p))
        for place, name, p in self._home:
            place[name] = self.copies[p]

    def offload(self) -> None:
        """Put the weights back and let the copies go."""
        for place, name, p in self._home:
            place[name] = p
        self._home = []
        self.drop_copies()

    def drop_copies(self) -> None:
        """Let copies go that nobody works with."""
        self._copies, self.ready = WeightCache(), None


class SequentialOffload:
    """Hooks that let the parts of a model visit a device in turn.

    Attributes:
        parts: in the order of the tree.
        device: that they visit.

    Args:
        root: the model, whose weights are in the machine's memory.
        device: to visit.
        ahead: fetch the part that is likely to follow while one works; None = on CUDA, where copies take no turns.
    """

    def __init__(self, root: nn.Module, device: torch.device, ahead: bool | None = None):
        self.device = device
        self.parts = [_Part(module, device) for module in offloaded_parts(root)]
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._followers: dict[_Part, _Part] = {}
        self._inside: list[_Part] = []
        self._left: torch.cuda.Event | None = None
        self._last: _Part | None = None
        self._moved = self._move(root)
        self._handles = []
        for part in self.parts:
            self._handles += (
                part.module.register_forward_pre_hook(self._entrance(part), prepend=True),
                part.module.register_forward_hook(self._exit(part), always_call=True),
            )

    def _move(self, root: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Move what is small and in nobody's part: the noise schedule, positions of words, a weight here or there."""
        visiting = {p for part in self.parts for p in part.weights}
        moved = []
        for module in root.modules():
            if isinstance(module, LitEma):  # as large as the UNet, and never computed with
                continue
            for place in (module._parameters, module._buffers):
                for name, x in place.items():
                    if x is not None and x not in visiting:
                        moved.append((place, name, x))
                        copied = x.detach().to(self.device)
                        is_weight = isinstance(x, nn.Parameter)
                        place[name] = nn.Parameter(copied, x.requires_grad) if is_weight else copied
        return moved

    def _entrance(self, part: _Part) -> Any:
        def enter(*_: Any) -> None:
            self._inside.append(part)
            if self._inside.count(part) > 1:  # a part that calls itself is there already
                return
            if self._last is not None:
                self._followers[self._last] = part
            self._last = part
            for other in self.parts:  # a guess that was wrong
                if other not in self._inside:
                    other.drop_copies()
            # A part's memory is free when the GPU has done with it; it would fall behind, and parts would pile up.
            if self._left is not None:
                self._left.synchronize()
            part.copy()
            part.onload()
            follower = self._followers.get(part)
            if self._ahead and follower is not None and follower not in self._inside:
                follower.copy(self._stream)

        return enter

    def _exit(self, part: _Part) -> Any:
        def leave(*_: Any) -> None:
            if part in self._inside:
                self._inside.remove(part)
                if part not in self._inside:
                    part.offload()
                    if self._stream is not None:
                        self._left = torch.cuda.current_stream(self.device).record_event()

        return leave

    def end(self) -> None:
        """Take the hooks off and bring back what was moved."""
        for handle in self._handles:
            handle.remove()
        for part in self.parts:
            part.offload()
        for place, name, x in self._moved:
            place[name] = x


_offloads: weakref.WeakKeyDictionary[nn.Module, SequentialOffload] = weakref.WeakKeyDictionary()


def attach(root: nn.Module, device: torch.device) -> SequentialOffload:
    """Let the parts of a model visit a device; what is in no part moves there."""
    detach(root)
    _offloads[root] = SequentialOffload(root, device)
    return _offloads[root]


def detach(root: nn.Module) -> bool:
    """End the visits; return whether there were any."""
    offload_ = _offloads.pop(root, None)
    if offload_ is not None:
        offload_.end()
    return offload_ is not None
