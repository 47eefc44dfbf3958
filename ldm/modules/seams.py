"""What is attached to a network: the six slots, the order in which things go on and off, and who may ask about it.

An attachment (a LoRA, an attention processor, a ControlNet, a cache of deep features) changes what a network answers,
for as long as it is attached, and leaves no trace behind. There are six slots, in the order in which they are filled:

    weights     Parameter objects, replaced: `attached` folds the changes of all attachments in order and swaps
    attention   CrossAttention.processor, BasicTransformerBlock.around, SpatialTransformer.entering: `fill`
    maps        CrossAttention.processor once more, around what was put there before: what looks into attention: `fill`
    tokens      behind those of the text, in the context of a UNet's call: `wrap`
    residuals   maps that a UNet adds to its skips, middle and way down, the arguments `control` and `features` of its
                call: `wrap`; UNetModel.joining, what becomes of a skip and of what it is joined to; the `edges` of a
                UNet, an encoder or a decoder, what its convolutions see beyond a map: `fill`
    shortcuts   which part of a UNet's loop is computed, the argument `deep` of its call: `wrap`

How all of that is computed is the business of `ldm.kernels.optimize`, which asks `on` about every module.
"""

from __future__ import annotations

import enum
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.errors import UsageError, shown

log = logging.getLogger(__name__)

Undo = Callable[[], None]


class Rank(enum.IntEnum):
    """The slot of an attachment; lower ones are filled first, and emptied last."""

    WEIGHTS = 0
    ATTENTION = 1
    MAPS = 2
    TOKENS = 3
    RESIDUALS = 4
    SHORTCUTS = 5


@dataclass(frozen=True)
class StepInfo:
    """Where a sampler is.

    Attributes:
        index, total: this step, from 0, of how many.
        t: levels that the network is called with, (b,), fractional ones allowed.
        unconditional: how many rows of the call, from the first on, are without the condition (of a guided batch its
            first half).
        images: how many images the call is for, each with one row or more; None = as many as rows.
    """

    index: int
    total: int
    t: Tensor | None = None
    unconditional: int = 0
    images: int | None = None


@runtime_checkable
class Attachment(Protocol):
    """Something that can be attached to a network.

    Attributes:
        rank: the slot that it fills.
    """

    rank: Rank

    def attach(self, network: nn.Module) -> Undo:
        """Fill the slot, by `swap`, `fill` or `wrap`; return what empties it again."""

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is; called before each call of the network."""


class WeightChange(Protocol):
    """An attachment of rank WEIGHTS, or one of another rank that has a LoRA of its own, as IP-Adapter's FaceID: it says
    what becomes of weights, and `attached` folds and swaps."""

    rank: Rank

    def changes(self, network: nn.Module) -> Mapping[str, Change]:
        """List the change of each parameter by its name in the network; the same Change objects as long as they do
        the same."""

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""


@runtime_checkable
class GuidanceTerm(Protocol):
    """An attachment that adds a term to the guided answer of a model, such as perturbed-attention guidance.

    Attributes:
        joins_batch: it wants the rows of the condition once more in the batch, and computes them otherwise.
        rows: which rows of the next call are those; None = none. Whoever calls the network sets it.
    """

    joins_batch: bool
    rows: slice | None

    def guides(self, step: StepInfo) -> bool:
        """Tell whether it adds something at a step."""

    def term(self, call: Any) -> Tensor:
        """Give what is added, of the answer's shape; `call` is an ldm.models.diffusion.denoiser.GuidedCall."""


@runtime_checkable
class SampleChange(Protocol):
    """An attachment that changes the samples behind each step, such as the local blend of prompt-to-prompt."""

    def change_samples(self, x: Tensor) -> Tensor:
        """Give the samples (b, c, h, w) that the next step takes."""


class Change:
    """What becomes of one weight.

    Args:
        apply: takes the weight in float32 and gives the new one, of the same shape (a vocabulary may grow).
        whole: what apply gives, whatever it takes; used as it is where nothing is to be done before or behind.
    """

    __slots__ = ("__weakref__", "apply", "whole")

    def __init__(self, apply: Callable[[Tensor], Tensor], whole: nn.Parameter | None = None):
        self.apply, self.whole = apply, whole


# --- slots ------------------------------------------------------------------------------------------

_ABSENT = object()


def _put_back(table: dict[str, Any], name: str, mine: Any, before: Any, what: str) -> None:
    """Undo one entry of a dictionary, if it still is what was put there."""
    if table.get(name, _ABSENT) is not mine:
        raise _replaced(what)
    if before is _ABSENT:
        del table[name]
    else:
        table[name] = before


def _replaced(what: str) -> UsageError:
    return UsageError(
        f"{what} was replaced while something was attached to it, and stays as it is now; "
        "replace it before or after"
    )


def swap(module: nn.Module, name: str, parameter: nn.Parameter) -> Undo:
    """Put another Parameter object in the place of a module's own; undone, the old object is there again."""
    table = module._parameters
    before, table[name] = table[name], parameter
    return lambda: _put_back(table, name, parameter, before, f"the {name} of a {type(module).__name__}")


def fill(module: nn.Module, slot: str, value: Any) -> Undo:
    """Set a slot of a module, an attribute that it has; no submodule and no key comes of it."""
    if not hasattr(module, slot):
        raise UsageError(f"a {type(module).__name__} has no slot {slot!r}")
    table = vars(module)
    before, table[slot] = table.get(slot, _ABSENT), value
    return lambda: _put_back(table, slot, value, before, f"the {slot} of a {type(module).__name__}")


def undo_all(undo: Sequence[Undo]) -> Undo:
    """Make one of several, which undoes the last first, each of them also where another one fails."""

    def all_of_them() -> None:
        failed = None
        for one in reversed(undo):
            try:
                one()
            except UsageError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    return all_of_them


class Execution:
    """How a module's forward is computed: what `ldm.kernels.optimize` sets as its attribute `forward`."""


class Wrapped:
    """A module's forward within something that takes its calls.

    Args:
        module: whose forward it is.
        around: takes a function that calls what is within, and the call's arguments.
        inner: the attribute `forward` that the module had; None = its class's.
    """

    def __init__(self, module: nn.Module, around: Callable[..., Any], inner: Any = None):
        self.module, self.around, self.inner = module, around, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.proceed, *args, **kwargs)

    def proceed(self, *args: Any, **kwargs: Any) -> Any:
        """Call what is within."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def wrap(module: nn.Module, around: Callable[..., Any]) -> Undo:
    """Let a function take the calls of a module's forward: around(proceed, *args, **kwargs)."""
    table = vars(module)
    mine = Wrapped(module, around, table.get("forward"))
    table["forward"] = mine

    def unwrap() -> None:
        within = _ABSENT if mine.inner is None else mine.inner  # which optimize() may have changed meanwhile
        _put_back(table, "forward", mine, within, f"the forward of a {type(module).__name__}")

    return unwrap


def execution_of(module: nn.Module) -> Execution | None:
    """Give how a module's forward is computed, beneath whatever is wrapped around it; None = its class's forward."""
    own = own_forward(module)
    return own if isinstance(own, Execution) else None


def own_forward(module: nn.Module) -> Any:
    """Give a module's attribute `forward`, beneath whatever is wrapped around it; None = its class's."""
    own = vars(module).get("forward")
    while isinstance(own, Wrapped):
        own = own.inner
    return own


def set_execution(module: nn.Module, execution: Execution | None) -> None:
    """Set how a module's forward is computed, beneath whatever is wrapped around it; None = by its class's forward."""
    own = vars(module).get("forward")
    if not isinstance(own, Wrapped):
        if execution is not None:
            vars(module)["forward"] = execution
        else:
            vars(module).pop("forward", None)
        return
    while isinstance(own.inner, Wrapped):
        own = own.inner
    own.inner = execution


# --- on and off -------------------------------------------------------------------------------------

# Weights that changes were folded into. They live as long as the last of their changes does.
_folded: WeakKeyDictionary[Change, WeakTensorKeyDictionary] = WeakKeyDictionary()
MOST_FOLDED = 2  # of one weight and one last change, or as many as are in use
_plans: WeakSet[_Plan] = WeakSet()


def states_in_use() -> int:
    """Tell how many states the weights of runs that go on may be in: each plan of one, and the weights as they are."""
    return len(_plans) + 1


def state_of(x: Tensor | None) -> tuple[Any, ...]:
    """What changes when a tensor is written to or replaced."""
    if x is None:
        return (None,)
    return (x.data_ptr(), x.device, x.shape, x.dtype, None if x.is_inference() else x._version)


def _fold(weight: nn.Parameter, changes: tuple[Change, ...]) -> nn.Parameter:
    """Apply changes in order, in float32 or better, rounding once; what was made before is given again."""
    whole = changes[-1].whole
    if (
        whole is not None
        and len(changes) == 1
        and whole.dtype == weight.dtype
        and whole.device == weight.device
    ):
        return whole
    by_weight = _folded.setdefault(changes[-1], WeakTensorKeyDictionary())
    made: OrderedDict[Any, nn.Parameter] = by_weight.setdefault(weight, OrderedDict())
    key = (state_of(weight), tuple(map(ref, changes)))
    known = made.get(key)
    if (
        known is None or known.dtype != weight.dtype or known.device != weight.device
    ):  # cast while it was attached
        with torch.no_grad():
            wide = weight.detach()
            wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
            for change in changes:
                wide = change.apply(wide)
            if wide.shape == weight.shape:  # with the layout that the old one has
                new = torch.empty_like(weight.detach()).copy_(wide)
            else:
                new = wide.to(weight.dtype)
            made[key] = nn.Parameter(new, requires_grad=False)
    made.move_to_end(key)
    while len(made) > max(MOST_FOLDED, states_in_use()):
        made.popitem(last=False)
    return made[key]


_dtype_of = operator.attrgetter("dtype")
_version_of = operator.attrgetter("_version")


def states_of(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """What changes when one of many tensors is written to or replaced: addresses, dtypes, versions.

    Loops in C fill and compare these columns: before each call of a UNet there are hundreds of weights to look at.
    """
    try:
        versions = list(map(_version_of, tensors))
    except RuntimeError:  # one that was made in inference mode has no version
        versions = [None if x.is_inference() else x._version for x in tensors]
    return list(map(Tensor.data_ptr, tensors)), list(map(_dtype_of, tensors)), versions


class _Plan:
    """What the changes of attachments come to: which Parameter goes where. It serves while all is as it was found.

    Args:
        network: whose weights change.
        changes: of each attachment, in order.

    Raises:
        UsageError: a change of a parameter that the network does not have.
    """

    def __init__(self, network: nn.Module, changes: list[Mapping[str, Change]]):
        self._changes = [dict(one) for one in changes]
        folds: dict[str, tuple[Change, ...]] = {}
        for one in changes:
            for name, change in one.items():
                folds[name] = (*folds.get(name, ()), change)
        # The way to each weight: (a module's parts, a name among them, the part there).
        self._ways: list[tuple[dict[str, Any], str, nn.Module]] = []
        modules: dict[str, nn.Module] = {"": network}
        self._swaps: list[tuple[dict[str, Any], str, nn.Parameter, nn.Parameter]] = []
        self._owners: list[nn.Module] = []
        for name, several in folds.items():
            path, _, last = name.rpartition(".")
            owner = self._module(modules, path, name)
            before = owner._parameters.get(last)
            if before is None:
                raise _no_parameter(network, name)
            self._swaps.append((owner._parameters, last, before, _fold(before, several)))
            self._owners.append(owner)
        # What was folded depends on their values; what is used as it is, on the dtype alone.
        wholes = {one.whole for several in folds.values() for one in several if one.whole is not None}
        self._folded = [before for _, _, before, mine in self._swaps if mine not in wholes]
        self._before = [before for _, _, before, _ in self._swaps]
        self._replaced = [before for _, _, before, mine in self._swaps if mine in wholes]
        self._states = self._current()
        self._mine = [mine for _, _, _, mine in self._swaps]
        self._addresses = list(map(Tensor.data_ptr, self._mine))
        _plans.add(self)

    def _module(self, modules: dict[str, nn.Module], path: str, name: str) -> nn.Module:
        if path not in modules:
            parent, _, last = path.rpartition(".")
            parts = self._module(modules, parent, name)._modules
            if parts.get(last) is None:
                raise _no_parameter(modules[""], name)
            modules[path] = parts[last]
            self._ways.append((parts, last, parts[last]))
        return modules[path]

    def holds(self, changes: list[Mapping[str, Change]]) -> bool:
        """Whether it is for these changes, and the network's modules and weights are those that it was made for."""
        return (
            self._changes == changes
            and all(parts.get(name) is part for parts, name, part in self._ways)
            and all(table.get(name) is before for table, name, before, _ in self._swaps)
            and self._current() == self._states
        )

    def _current(self) -> tuple[Any, ...]:
        return states_of(self._folded), list(map(_dtype_of, self._replaced))

    def swap(self) -> Undo:
        """Put the Parameters in their places."""
        for table, name, _, mine in self._swaps:
            table[name] = mine
        return self._swap_back

    def _swap_back(self) -> None:
        failed = None
        for (table, name, before, mine), owner in zip(self._swaps, self._owners, strict=True):
            if table.get(name) is not mine:
                failed = failed or _replaced(f"the {name} of a {type(owner).__name__}")
                continue
            table[name] = before
        if list(map(Tensor.data_ptr, self._mine)) != self._addresses:
            # The network was moved or cast meanwhile, and its own weights were not there to be.
            for before, mine in zip(self._before, self._mine, strict=True):
                before.data = before.data.to(mine.device, mine.dtype)
        if failed is not None:
            raise failed


def _no_parameter(network: nn.Module, name: str) -> UsageError:
    return UsageError(
        f"an attachment changes {shown(name)}, and a {type(network).__name__} has no such parameter"
    )


class Scope:
    """Attachments of a network, on within its `with` block, as often as that is entered.

    What becomes of the weights is planned when it is first entered and again when something has changed; entering it
    otherwise takes a fraction of a millisecond, whatever is attached.

    Attributes:
        network: that they are attached to.
        attachments: in the order in which they are attached.
    """

    MAX_PLANS = 2  # two LoRAs' schedules change places; more would keep more copies of weights

    def __init__(self, network: nn.Module, attachments: Sequence[Attachment | WeightChange]):
        self.network = network
        self.attachments = sorted(attachments, key=lambda one: one.rank)
        self._plans: list[_Plan] = []  # the one used last comes last
        self._undo: list[list[Undo]] = []

    def _plan(self) -> _Plan:
        changes = [one.changes(self.network) for one in self.attachments if hasattr(one, "changes")]
        plan = next((one for one in self._plans if one.holds(changes)), None)
        if plan is None:
            plan = _Plan(self.network, changes)
        else:
            self._plans.remove(plan)
        self._plans = [*self._plans, plan][-self.MAX_PLANS :]
        return plan

    def __enter__(self) -> None:
        undo: list[Undo] = []
        try:
            if any(hasattr(one, "changes") for one in self.attachments):
                undo.append(self._plan().swap())
            for one in self.attachments:
                if one.rank != Rank.WEIGHTS:
                    undo.append(one.attach(self.network))
        except BaseException:
            undo_all(undo)()
            raise
        self._undo.append(undo)

    def __exit__(self, *error: Any) -> None:
        undo_all(self._undo.pop())()


def attached(network: nn.Module, *attachments: Attachment | WeightChange) -> Scope:
    """Attach to a network until the end of the block.

    The order is that of their ranks, and as given within a rank. Each attachment is taken off in the reverse order,
    also where another one fails. A network that is moved or cast within the block stays so, with all its weights; a
    copy that is made of it there is one of what it is there, for good.

    Raises:
        UsageError: something that an attachment replaced was replaced again meanwhile; all else is taken off.
    """
    return Scope(network, attachments)


# --- who is on a module -----------------------------------------------------------------------------


class Presence(NamedTuple):
    """What is on a module.

    Attributes:
        kind: "plain"; "known", attached through a slot; "foreign", a hook or a patch of somebody.
        state: of what is known: all that a captured graph of it depends on beside weights and arguments; None where
            there is more.
        reason: what is foreign, in words, or why there is no state.
    """

    kind: str
    state: tuple[Hashable, ...] | None = ()
    reason: str = ""


PLAIN = Presence("plain")
SLOTS = ("processor", "around", "entering", "joining", "edges")
_code: dict[type[nn.Module], tuple[Any, Any]] = {}


def code_of(kind: type[nn.Module]) -> tuple[Any, Any]:
    """What a class computes with: CompVis's blocks call a `_forward`, which others patch or override, too."""
    return kind.forward, getattr(kind, "_forward", None)


def register(*kinds: type[nn.Module]) -> None:
    """Know classes as they are now; one that is patched later is foreign."""
    for kind in kinds:
        _code.setdefault(kind, code_of(kind))


def is_registered(kind: type[nn.Module]) -> bool:
    """Whether a class is known, and computes as it did then."""
    return _code.get(kind) == code_of(kind)


def on(module: nn.Module) -> Presence:
    """Tell what is on a module itself, not on its parts. The one predicate: who computes otherwise asks it first."""
    own = vars(module)
    forward = own.get("forward")
    if (
        (forward is None or isinstance(forward, Execution))
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and own.get("processor") is own.get("around") is own.get("entering") is None
        and own.get("joining") is own.get("edges") is None
        and "processor" not in own["_modules"]
        and is_registered(type(module))
    ):
        return PLAIN  # the usual case, some thousand times a step of a UNet
    state: tuple[Hashable, ...] | None = ()
    reason = ""
    while isinstance(forward, Wrapped):
        forward, around = forward.inner, forward.around
        state, reason = _with_state(state, reason, around)
    kind = type(module)
    if forward is not None and not isinstance(forward, Execution):
        return Presence("foreign", None, f"a forward of its own on a {kind.__name__}")
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        hook = next(iter((own["_forward_hooks"] or own["_forward_pre_hooks"]).values()))
        return Presence("foreign", None, f"a hook on a {kind.__name__}, {_name_of(hook)}")
    if not is_registered(kind):
        return Presence(
            "foreign", None, f"{kind.__module__}.{kind.__qualname__}, another class or a patched one"
        )
    is_known = own.get("forward") is not forward
    for slot in SLOTS:
        for value in _entries(own.get(slot) or own["_modules"].get(slot)):
            is_known = True
            state, reason = _with_state(state, reason, value)
    return Presence("known", state, reason) if is_known else PLAIN


def _entries(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _with_state(state: Any, reason: str, value: Any) -> tuple[Any, str]:
    """Join the state of something attached, which its `state()` gives; a method answers for its object."""
    ask = getattr(getattr(value, "__self__", value), "state", None)
    mine = ask() if callable(ask) else None
    if state is None:
        return None, reason
    if mine is None:
        return None, f"{_name_of(value)} says no state() that a captured graph could be kept under"
    return (*state, mine), reason


_said: set[tuple[str, str]] = set()


def say_once(loss: str, reason: str) -> None:
    """Write into the log, once for each reason, what speed is lost and why; until forget_said."""
    if (loss, reason) not in _said:
        _said.add((loss, reason))
        log.warning("%s: %s", loss, reason)


def forget_said() -> None:
    """Let every reason be written once more: for a model that is optimized anew."""
    _said.clear()
