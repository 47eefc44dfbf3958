"""Fused modules: a forward for plain inference, set on a module, with the module's own forward as the fallback.

It is an attribute `forward` of one module, so hooks fire, keys and classes stay, and deleting the attribute restores
the module. It falls back whenever a call or a part of the module is not what it was written for: other dtypes or
devices, autocast, tracing, gradients, or a part that someone has replaced, patched or hooked. It computes by a backend,
one for each kind of device. The fused forwards themselves are in fused.py.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ldm.kernels import cpu, cuda
from ldm.kernels.backend import Backend
from ldm.modules.seams import Execution, is_registered, on, say_once, state_of, states_in_use

BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda}


# --- values computed from weights -----------------------------------------------------------------


class WeightCache:
    """Values computed from weights (packed, cast or copied ones), until one of them changes. A copy of it is empty.

    The last few combinations of weights are remembered, so that weights that are swapped in and out again (a LoRA, a
    moving average) are packed once each; where more runs take turns, each with weights of its own, as many as theirs.

    Attributes:
        value: the one given last; None at first.
    """

    MAX_ENTRIES = 3

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[int, ...], _Cached] = OrderedDict()
        self.value: Any = None

    def get(self, compute: Callable[[], Any], *tensors: Tensor | None) -> Any:
        """Give the value computed from these tensors, computing it if they are others or have changed."""
        key = tuple(map(id, tensors))
        states = tuple(map(state_of, tensors))
        entry = self._entries.get(key)
        # By reference, too: a new tensor may get the id and the address of one that is gone.
        if entry is None or entry.states != states or not entry.is_of(tensors):
            for stale in [k for k, other in self._entries.items() if not other.is_alive()]:
                del self._entries[stale]
            refs = tuple(None if x is None else weakref.ref(x) for x in tensors)
            entry = self._entries[key] = _Cached(compute(), states, refs)
            while len(self._entries) > max(self.MAX_ENTRIES, states_in_use()):
                self._entries.popitem(last=False)
        if len(self._entries) > 1:
            self._entries.move_to_end(key)
        self.value = entry.value
        return entry.value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _Cached(NamedTuple):
    value: Any
    states: tuple[Any, ...]
    refs: tuple[weakref.ref[Tensor] | None, ...]

    def is_of(self, tensors: tuple[Tensor | None, ...]) -> bool:
        return all(
            x is None if ref is None else ref() is x for ref, x in zip(self.refs, tensors, strict=True)
        )

    def is_alive(self) -> bool:
        """Whether its tensors are there and as they were; others never come back."""
        present = [None if ref is None else ref() for ref in self.refs]
        return self.is_of(tuple(present)) and all(
            x is None if ref is None else x is not None and state_of(x) == state
            for ref, x, state in zip(self.refs, present, self.states, strict=True)
        )


# --- what may be fused ----------------------------------------------------------------------------


def is_unmodified(module: nn.Module) -> bool:
    """Whether a module computes by code that is known here, in eval mode and without hooks; see ldm.modules.seams."""
    return not module.training and on(module).kind != "foreign"


def _in_plain_inference() -> bool:
    """Whether there are no gradients, no autocast, no tracing and no dispatch mode that watches operations."""
    return not (
        torch.is_grad_enabled()
        or any(map(torch.is_autocast_enabled, BACKENDS))
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
    )


def backend_of(x: Tensor) -> Backend:
    """Give the backend of a tensor's device."""
    return BACKENDS[x.device.type]


def is_supported(x: Any) -> bool:
    """Whether x is a plain tensor on a device with a backend that takes its dtype."""
    return type(x) is Tensor and x.device.type in BACKENDS and x.dtype in backend_of(x).DTYPES


# --- forwards -------------------------------------------------------------------------------------


class FusedModule(Execution):
    """A module's forward for plain inference; the module's own forward is the fallback."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not module.training and is_registered(type(module)) and _in_plain_inference():
            out = self.try_forward(*args, **kwargs)
            if out is not None:
                return out
        return self.fallback(*args, **kwargs)

    def try_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the module's forward takes and give what it gives, or None for a call that is not supported."""
        raise NotImplementedError

    def fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Compute by the module's own code."""
        return type(self.module).forward(self.module, *args, **kwargs)


class ForwardWrapper(FusedModule):
    """Wraps whatever else computes a module's forward.

    Args:
        module: whose forward it is.
        inner: the module's other forward, usually a FusedModule; None = the module's own code.
    """

    def __init__(self, module: nn.Module, inner: Any = None):
        super().__init__(module)
        self.inner = inner

    def fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module did before it was wrapped."""
        return super().fallback(*args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)


def fused_part(module: nn.Module) -> Any:
    """Give the fused module of a part, to be called without the part's own __call__; None if the part is modified."""
    own = vars(module).get("forward")
    if not isinstance(own, FusedModule) or module.training:
        return None
    presence = on(module)
    if presence.kind == "foreign":
        say_once("optimize() leaves a part to the plain code, which costs speed", presence.reason)
        return None
    return own


def fused_parts(*modules: nn.Module) -> list[Any] | None:
    """Give the fused modules of several parts; None if one is modified."""
    parts = [fused_part(module) for module in modules]
    return None if None in parts else parts
