"""Calls in the manner of improved-diffusion: its orders of arguments where guided-diffusion has others."""

import functools
import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch

from ldm.errors import UsageError

# The arguments of improved-diffusion's UNet in its order, which is the declared one without image_size and two more.
_IMPROVED_ORDER = (
    "in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult conv_resample "
    "dims num_classes use_checkpoint num_heads num_heads_upsample use_scale_shift_norm"
).split()
_REQUIRED = ["image_size", *_IMPROVED_ORDER[:5]]

# What can stand in each place that the two orders of arguments share.
_FITS: dict[str, Callable[[Any], bool]] = {
    "cond_fn": lambda value: value is None or (callable(value) and not isinstance(value, Mapping)),
    "model_kwargs": lambda value: value is None or isinstance(value, Mapping),
    "device": lambda value: (
        value is None
        or isinstance(value, str | torch.device)
        or (isinstance(value, int) and not isinstance(value, bool))
    ),
    "progress": lambda value: isinstance(value, bool),
    "eta": lambda value: isinstance(value, Real) and not isinstance(value, bool),
}


def takes_improved_diffusions_call(init: Callable[..., None]) -> Callable[..., None]:
    """Let a UNet be built as improved-diffusion builds it: without image_size, and with one head by default.

    A call is improved-diffusion's where it gives all that is required but image_size, or where the arguments by
    position have a number, its dropout, in the place of attention_resolutions. Every other call is as declared.
    """

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        def gives(names: list[str]) -> bool:
            """Whether the arguments by position and by name give each of the names once."""
            return all((i < len(args)) != (name in kwargs) for i, name in enumerate(names))

        is_whole = gives(_REQUIRED) and not (len(args) > 5 and isinstance(args[5], Real))
        resolutions = args[4] if len(args) > 4 else kwargs.get("attention_resolutions")
        may_be_improved = gives(_IMPROVED_ORDER[:5]) and not isinstance(resolutions, Real)
        if not is_whole and may_be_improved and "image_size" not in kwargs:
            if len(args) > len(_IMPROVED_ORDER):
                raise TypeError(
                    f"improved-diffusion's {type(self).__name__} takes {len(_IMPROVED_ORDER)} arguments"
                )
            given = dict(zip(_IMPROVED_ORDER, args, strict=False))
            if twice := given.keys() & kwargs.keys():
                raise TypeError(f"{type(self).__name__} got several values for {', '.join(sorted(twice))}")
            heads = {} if {"num_heads", "num_head_channels"} & {*given, *kwargs} else {"num_heads": 1}
            args, kwargs = (None,), {**given, **heads, **kwargs}
        init(self, *args, **kwargs)

    return construct


def in_either_order(method: Callable) -> Callable:
    """Take the arguments of a method by position in guided-diffusion's order or in improved-diffusion's.

    The latter has no cond_fn, so what follows denoised_fn tells them apart by kind.

    Raises:
        UsageError: arguments by position that are in neither order.
    """
    names = list(inspect.signature(method).parameters)[1:]
    place = names.index("cond_fn")
    orders = (names, names[:place] + names[place + 1 :])

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            fits = [
                order
                for order in orders
                if len(args) <= len(order)
                and not {*order[place : len(args)]} & kwargs.keys()
                and all(_FITS[name](value) for name, value in zip(order[place:], args[place:], strict=False))
            ]
            if not fits:
                came = ", ".join(type(value).__name__ for value in args[place:])
                raise UsageError(
                    f"{method.__name__} takes {', '.join(names[place:])} after denoised_fn, or (improved-diffusion) "
                    f"the same without cond_fn, each once; got {came}. Give them by name"
                )
            kwargs = {**dict(zip(fits[0][place:], args[place:], strict=False)), **kwargs}
            args = args[:place]
        return method(self, *args, **kwargs)

    return call
