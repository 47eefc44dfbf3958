"""Sequential CPU offload: weights stay in CPU memory and are copied to a GPU part by part, to save its memory.

A part is a block of the UNet, one half of the autoencoder, or the text encoder. Its weights are onloaded when it is
called and offloaded when it returns; meanwhile those of the part that followed it the last time are prefetched. So two
parts are on the GPU at most, a fifth of Stable Diffusion's weights, and each step copies the whole UNet over the bus.
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
from ldm.modules.seams import Undo, swap

WHOLE = (Decoder, Encoder, AbstractEncoder, nn.Sequential)  # one part each; others are divided further


def offloaded_parts(root: nn.Module) -> Iterator[nn.Module]:
    """Divide a tree into the modules that are called. Parameters of the modules above them are in no part."""
    if isinstance(root, WHOLE) or not any(True for _ in root.children()):
        if any(True for _ in root.parameters()):
            yield root
        return
    for child in root.children():
        yield from offloaded_parts(child)


class _Part:
    """One part's weights, and their copies on the device while it runs."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device = module, device
        self._copies = WeightCache()
        self.ready: torch.cuda.Event | None = None
        self._undo: list[Undo] = []
        if device.type == "cuda":  # copies from pinned memory are asynchronous
            for p in self.weights:
                p.data = pinned(p.data)

    @property
    def weights(self) -> list[Tensor]:
        """The weights of all its modules, each once."""
        return list(dict.fromkeys(self.module.parameters()))

    @property
    def copies(self) -> dict[Tensor, Tensor] | None:
        """Copies by weight; None if there are none."""
        return self._copies.value

    def copy(self, stream: torch.cuda.Stream | None = None) -> None:
        """Start copying the weights to the device, on a stream of its own if one is given.

        Copies that exist are reused unless the weights have changed.
        """
        weights = self.weights

        def copy() -> dict[Tensor, Tensor]:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                copies = {p: p.detach().to(self.device, non_blocking=True, copy=True) for p in weights}
                self.ready = None if stream is None else stream.record_event()
            return copies

        self._copies.get(copy, *weights)

    def onload(self) -> None:
        """Put the copies in the place of the weights."""
        if self.ready is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(self.ready)
            for x in self.copies.values():
                x.record_stream(here)
        for module in self.module.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    self._undo.append(swap(module, name, self.copies[p]))

    def offload(self) -> None:
        """Put the weights back and free the copies."""
        while self._undo:
            self._undo.pop()()
        self.drop_copies()

    def drop_copies(self) -> None:
        """Free the copies of a part that is not running."""
        self._copies, self.ready = WeightCache(), None


class SequentialOffload:
    """Hooks that onload a model's parts to a device in turn.

    Attributes:
        parts: in the order of the tree.
        device: that they are onloaded to.

    Args:
        root: the model, whose weights are in CPU memory.
        device: to onload to.
        prefetch: copy the part that is likely to follow while one runs; None = on CUDA, where copies are asynchronous.
    """

    def __init__(self, root: nn.Module, device: torch.device, prefetch: bool | None = None):
        self.device = device
        self.parts = [_Part(module, device) for module in offloaded_parts(root)]
        self._prefetch = device.type == "cuda" if prefetch is None else prefetch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next_parts: dict[_Part, _Part] = {}
        self._running: list[_Part] = []
        self._offloaded: torch.cuda.Event | None = None
        self._last: _Part | None = None
        self._resident = self._move_rest(root)
        self._handles = []
        for part in self.parts:
            self._handles += (
                part.module.register_forward_pre_hook(self._pre_hook(part), prepend=True),
                part.module.register_forward_hook(self._post_hook(part), always_call=True),
            )

    def _move_rest(self, root: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Move what is in no part to the device: the noise schedule, position ids, a few parameters."""
        in_parts = {p for part in self.parts for p in part.weights}
        moved = []
        for module in root.modules():
            if isinstance(module, LitEma):  # as large as the UNet, and not part of its forward
                continue
            for place in (module._parameters, module._buffers):
                for name, x in place.items():
                    if x is not None and x not in in_parts:
                        moved.append((place, name, x))
                        copied = x.detach().to(self.device)
                        is_weight = isinstance(x, nn.Parameter)
                        place[name] = nn.Parameter(copied, x.requires_grad) if is_weight else copied
        return moved

    def _pre_hook(self, part: _Part) -> Any:
        def onload(*_: Any) -> None:
            self._running.append(part)
            if self._running.count(part) > 1:  # a part that calls itself is onloaded already
                return
            if self._last is not None:
                self._next_parts[self._last] = part
            self._last = part
            for other in self.parts:  # a wrong prefetch
                if other not in self._running:
                    other.drop_copies()
            # A part's memory is free only when the GPU has finished it; without waiting, copies would pile up.
            if self._offloaded is not None:
                self._offloaded.synchronize()
            part.copy()
            part.onload()
            following = self._next_parts.get(part)
            if self._prefetch and following is not None and following not in self._running:
                following.copy(self._stream)

        return onload

    def _post_hook(self, part: _Part) -> Any:
        def offload(*_: Any) -> None:
            if part in self._running:
                self._running.remove(part)
                if part not in self._running:
                    part.offload()
                    if self._stream is not None:
                        self._offloaded = torch.cuda.current_stream(self.device).record_event()

        return offload

    def end(self) -> None:
        """Remove the hooks and put everything back."""
        for handle in self._handles:
            handle.remove()
        for part in self.parts:
            part.offload()
        for place, name, x in self._resident:
            place[name] = x


_offloads: weakref.WeakKeyDictionary[nn.Module, SequentialOffload] = weakref.WeakKeyDictionary()


def attach(root: nn.Module, device: torch.device) -> SequentialOffload:
    """Onload the parts of a model to a device in turn; what is in no part moves there for good."""
    detach(root)
    _offloads[root] = SequentialOffload(root, device)
    return _offloads[root]


def detach(root: nn.Module) -> bool:
    """End the offload of a model; return whether there was one."""
    sequential = _offloads.pop(root, None)
    if sequential is not None:
        sequential.end()
    return sequential is not None
