"""Inversion: from a clean sample up to the noise that leads back to it, by the methods of the table METHODS.

    inversion = invert("belm", Network(model), z, Context(c, uc, 3.0), steps=50)
    inversion.error                                  # how well it comes back, (b,)
    edited = inversion.sample(Context(c2, uc, 3.0), start_step=10)

The contract and the walk are in inversion_base.py, where it says how to add a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from ldm.errors import UsageError, nearest, shown
from ldm.models.diffusion.inversion_base import (
    DDIM,
    Context,
    Inversion,
    Method,
    Network,
    Predict,
    Run,
    plan_of,
    walk_up,
)
from ldm.models.diffusion.inversion_exact import BDIA, BELM, EDICT
from ldm.models.diffusion.inversion_guided import EditFriendly, NegativePrompt, NullText, Proximal
from ldm.models.diffusion.inversion_iterated import Anderson, FixedPoint, Sampled
from ldm.models.diffusion.samplers import SAMPLERS, split_sampler
from ldm.other_words import instead_of

# Name -> class; any spelling with blanks or hyphens for the underscores. A sampler that inverts is a method by its nam
METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        DDIM,
        FixedPoint,
        Anderson,
        EDICT,
        BDIA,
        BELM,
        EditFriendly,
        NegativePrompt,
        Proximal,
        NullText,
    )
}

OF_INVERT = ("steps", "spacing", "model", "measure")  # what `invert` is told beside a method's options


def spelt(name: Any) -> str | None:
    """Bring a name into the spelling of our tables; None for what is no text."""
    return "_".join(name.lower().replace("-", " ").split()) if isinstance(name, str) else None


def resolve_method(
    method: str | Method, of_call: Sequence[str] = OF_INVERT, others: Sequence[str] = (), /, **options: Any
) -> Method:
    """Make a method by its name in METHODS, with its options; one that is made already is returned.

    Args:
        of_call: what the call is told beside a method's options, for a hint.
        others: methods that the caller knows beside these, for a hint.

    Raises:
        UsageError: an unknown name or option, or a value out of range.
    """
    if isinstance(method, Method):
        if options:
            raise UsageError(
                f"a method that is made takes no further options, got {', '.join(sorted(options))}"
            )
        return method
    name = spelt(method)
    if name not in METHODS:
        found = _sampler(method)
        if found is None:
            samplers = [name for name, cls in SAMPLERS.items() if cls.inverts]
            names = list(dict.fromkeys([*METHODS, *samplers, *others]))
            near = nearest(method, names)
            hint = f" (did you mean {near}?)" if near else ""
            raise UsageError(f"the inversion must be one of {', '.join(names)}; got {shown(method)}{hint}")
        eta = options.pop("eta", None)
        return Sampled(sampler=method, eta=eta, options=options)
    cls = METHODS[name]
    known = [option.name for option in fields(cls) if option.init]
    if unknown := sorted(options.keys() - set(known)):
        beside = [one for one in of_call if one != unknown[0]]  # of the one call, and given to another
        advice = instead_of(unknown[0], [*known, *beside])
        hint = f" ({advice})" if advice else ""
        raise UsageError(
            f"the inversion {name} has no option {', '.join(unknown)[:100]}{hint}; it has {', '.join(known)}"
        )
    return cls(**options)


def _sampler(name: Any) -> str | None:
    """Find a sampler by any spelling; None where there is none."""
    try:
        return split_sampler(name, None)[0] if isinstance(name, str) else None
    except UsageError:
        return None


def invert(
    method: str | Method,
    network: Network | Predict,
    x0: Tensor,
    context: Context,
    *,
    steps: int = 50,
    spacing: str | Sequence[float] | None = None,
    model: Any = None,
    measure: bool = True,
    **options: Any,
) -> Inversion:
    """Invert clean samples x0 (b, ...), in their dtype: as many latents as steps, over the levels of the way down.

    Args:
        method: a name of METHODS, or an object that holds its options.
        network: see `Network`.
        steps: 1 to the model's number of levels.
        spacing: see ldm.models.diffusion.levels.visited_levels; None = the method's own.
        model: whose levels they are; None = the network's.
        measure: walk down again as well, so that `error` is known.
        options: of the method's class.

    Raises:
        UsageError: an unknown method or option, or a value out of range. NumericError: latents that are not finite.
    """
    chosen = resolve_method(method, **options)
    levels = plan_of(chosen, network.model if model is None else model, steps, spacing)
    return walk_up(network, chosen, x0, context, levels, measure=measure)


__all__ = [
    "METHODS",
    "Context",
    "Inversion",
    "Method",
    "Network",
    "Predict",
    "Run",
    "invert",
    "plan_of",
    "resolve_method",
    "spelt",
    "walk_up",
]
