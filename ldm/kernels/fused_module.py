"""Fused modules: a forward for plain inference, set on a module, with the module's own forward as the fallback.

It is an attribute `forward` of one module, so hooks fire, keys and classes stay, and deleting the attribute restores
the module. It falls back whenever a call or a part of the module is not what it was written for: other dtypes or
devices, autocast, tracing, gradients, or a part that someone has replaced, patched or hooked. It computes by a backend,
one for each kind of device. The fused forwards themselves are in fused.py.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ldm.kernels import cpu, cuda
from ldm.kernels.backend import Backend

BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda}


# --- values computed from weights -----------------------------------------------------------------


def cache_key(x: Tensor | None) -> tuple[Any, ...]:
    """What changes when a tensor is written to or replaced."""
    if x is None:
        return (None,)
    return (x.data_ptr(), x.device, x.shape, x.dtype, None if x.is_inference() else x._version)


def _nothing() -> None:
    return None


class WeightCache:
    """A value computed from weights (packed, cast or copied ones), until one of them changes. A copy of it is empty.

    Attributes:
        value: the last one; None at first.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        # By reference, too: a new tensor may get the address of one that is gone.
        self._tensors: list[Callable[[], Tensor | None]] = []
        self.value: Any = None

    def get(self, compute: Callable[[], Any], *tensors: Tensor | None) -> Any:
        """Give the value computed from these tensors, computing it if they are others or have changed."""
        key = tuple(map(cache_key, tensors))
        same = key == self._key and all(ref() is x for ref, x in zip(self._tensors, tensors, strict=True))
        if not same:
            self._key, self.value = key, compute()
            self._tensors = [_nothing if x is None else weakref.ref(x) for x in tensors]
        return self.value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


# --- what may be fused ----------------------------------------------------------------------------

# The forwards of classes as they were when fused.py was imported; a class that is patched later is left to its patch.
_ORIGINAL_CODE: dict[type[nn.Module], tuple[Any, Any]] = {}


def code_of(kind: type[nn.Module]) -> tuple[Any, Any]:
    """What a class computes with: CompVis's blocks call a `_forward`, which others patch or override, too."""
    return kind.forward, getattr(kind, "_forward", None)


def register(*kinds: type[nn.Module]) -> None:
    """Know classes by their code as it is now."""
    _ORIGINAL_CODE.update((kind, code_of(kind)) for kind in kinds)


def _has_original_code(kind: type[nn.Module]) -> bool:
    return _ORIGINAL_CODE.get(kind) == code_of(kind)


def is_unmodified(module: nn.Module) -> bool:
    """Whether a module computes by code that is known here, in eval mode and without hooks."""
    own = vars(module).get("forward")
    return (
        (own is None or isinstance(own, FusedModule))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and _has_original_code(type(module))
        and not module.training
    )


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


class FusedModule:
    """A module's forward for plain inference; the module's own forward is the fallback."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not module.training and _has_original_code(type(module)) and _in_plain_inference():
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
    return own if isinstance(own, FusedModule) and is_unmodified(module) else None


def fused_parts(*modules: nn.Module) -> list[Any] | None:
    """Give the fused modules of several parts; None if one is modified."""
    parts = [fused_part(module) for module in modules]
    return None if None in parts else parts
