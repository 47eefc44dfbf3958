"""Small helpers that modules and models share; CompVis's are found in ldm.util as well."""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import nearest

logger = logging.getLogger(__name__)


def exists(x: object) -> bool:
    """Tell whether x is anything but None."""
    return x is not None


def default(value: Any, fallback: Any) -> Any:
    """Return value, or the fallback (called first if it is a plain function) where value is None."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def pinned(x: Tensor) -> Tensor:
    """Copy a tensor into page-locked memory, from which copies to a GPU are asynchronous.

    Where the system has none left, it is given as it is, and the log says so once.
    """
    global _can_pin
    if _can_pin:
        try:
            return x.pin_memory()
        except RuntimeError as error:  # of a limit that is set, or of a driver: the next would fail as well
            _can_pin = False
            reason = str(error).splitlines()[0]
            logger.warning("copies to the GPU are waited for, no memory can be page-locked: %s", reason)
    return x


_can_pin = True


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the machine's memory to a device; to CUDA from pinned memory, asynchronously."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return pinned(x).to(device, non_blocking=True)


def ismap(x: object) -> bool:
    """Tell whether x is a batch of feature maps: (b, c, h, w) with more than 3 channels."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] > 3


def isimage(x: object) -> bool:
    """Tell whether x is a batch of pictures: (b, c, h, w) with 1 or 3 channels."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Average over every axis but the first."""
    return tensor.mean(dim=tuple(range(1, tensor.dim()))) if tensor.dim() > 1 else tensor


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Count a module's parameters; verbose logs the number."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def leaves_others_to_subclasses(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor ignore keywords that it does not know, where a subclass from outside of ldm passes them on.

    Other people's subclasses take `**kwargs`, read a keyword of their own from it, and hand all of it on. What is
    passed over is said in a warning. The classes of ldm, and subclasses that name all of their keywords, get Python's
    TypeError, as ever.
    """
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        others = [name for name in kwargs if name not in known]
        if others and _hands_on_anything(type(self)):
            constructors = [base.__init__ for base in type(self).__mro__ if "__init__" in base.__dict__]
            names = {name for one in constructors for name in inspect.signature(one).parameters}
            near = {name: nearest(name, names, 0.8) for name in others}
            hints = (f"{name} (did you mean '{hit}'?)" if hit else name for name, hit in near.items())
            logger.warning(
                "left to %s, for ldm does not know these parameters: %s",
                type(self).__name__,
                ", ".join(hints),
            )
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        init(self, *args, **kwargs)

    return construct


def living_in(home: str, *names: str, of: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module `of` which other people's code imports names from that live in `home`."""

    def find(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(home), name)
        raise AttributeError(f"module {of!r} has no attribute {name!r}")

    return find


def _hands_on_anything(cls: type) -> bool:
    """Tell whether a class is from outside of ldm and its constructor, one that is not ldm's, takes any keyword."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "ldm":
            return False
        if "__init__" in base.__dict__:
            parameters = inspect.signature(base.__init__).parameters.values()
            return any(p.kind is p.VAR_KEYWORD for p in parameters)
    return False
