"""CUDA graphs of whole networks: the launches of a call are captured once for each input shape, and replayed.

One step of a UNet is some 700 kernel launches, and a fast GPU finishes each before Python has prepared the next. A
captured graph runs no Python: it reads weights and inputs at the addresses of the capture. So it is replayed only while
every weight, module and class is as it was, and no part of the network is hooked.
"""

import itertools
import logging
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ldm.kernels.fused import FUSED
from ldm.kernels.fused_module import ForwardWrapper, FusedModule, WeightCache
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel, check_labels
from ldm.modules.seams import (
    PLAIN,
    SLOTS,
    Execution,
    Presence,
    code_of,
    execution_of,
    on,
    own_forward,
    say_once,
    set_execution,
    states_of,
)

log = logging.getLogger(__name__)

VAE = (Encoder, Decoder)
MAX_SHAPES = 8  # graphs kept for a network and its weights; the least recently used goes first
MAX_STATES = (
    3  # combinations of weights whose graphs are kept, so that a LoRA that goes on and off is captured once
)
# A capture costs three calls and memory, so a shape is captured at its third call. The calls before let libraries
# choose their algorithms and Triton compile.
CALLS_TO_CAPTURE = 3
WARM_UP = 1  # a call outside inference mode: torch.compile makes other code for that
# A graph whose replay differs more from the eager call, relative to the largest number, is not used.
MAX_DIFFERENCE = 0.05

Run = Callable[[list[Tensor]], Any]  # gives a tensor, or a tuple of them

_lock = threading.RLock()


class _DeviceState:
    """What the captured graphs of one GPU share: streams, the memory pool, and the order of replays.

    They may share a pool because results are copied out of it: one replay at a time, each beginning on its stream when
    the one before it has ended.
    """

    def __init__(self, device: torch.device):
        # Libraries keep a workspace for each stream, so all graphs share these two. Warm-up has its own, as a captured
        # workspace has to come from the graphs' pool.
        self.warmup_stream, self.capture_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.last_replay: torch.cuda.Event | None = None


_devices: dict[torch.device, _DeviceState] = {}


def capture_cuda(run: Run, inputs: list[Tensor]) -> Run:
    """Capture a function of tensors as a CUDA graph; return one that replays it on other tensors of the same shapes.

    Raises:
        RuntimeError: something in it cannot be captured, or there is no memory for it.
    """
    device = inputs[0].device
    with _lock, torch.cuda.device(device):
        if device not in _devices:
            _devices[device] = _DeviceState(device)
        state = _devices[device]
        static_inputs = [x.clone() for x in inputs]
        state.warmup_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(state.warmup_stream):
            for _ in range(WARM_UP):
                run(static_inputs)
        torch.cuda.current_stream().wait_stream(state.warmup_stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in state.graphs), None)
        if pool is None:
            # cuBLAS keeps the workspace that it got on this stream. It came from the pool of graphs that are gone or
            # whose capture failed; this one has to get one from its own pool.
            torch._C._cuda_clearCublasWorkspaces()
        stream = state.capture_stream
        # Only this thread's calls have to be capturable; other threads may copy images meanwhile.
        capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            with (
                torch.cuda.stream(stream),
                capturing,
            ):  # a capture that fails does not leave the stream by itself
                out = run(static_inputs)
        except BaseException:
            state.graphs.clear()  # their pool may still count as being captured into
            raise
        state.graphs.add(graph)
        for made in tree_leaves(out):
            made.fill_(float("nan"))  # so that a replay that writes nothing is seen

    def replay(inputs: list[Tensor]) -> Tensor:
        with _lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if state.last_replay is not None:
                stream.wait_event(state.last_replay)
            for mine, given in zip(static_inputs, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            copied = tree_map(torch.clone, out)
            state.last_replay = stream.record_event()
        return copied

    return replay


_chained = itertools.chain.from_iterable
_hooks_of = operator.itemgetter("_forward_hooks")
_pre_hooks_of = operator.itemgetter("_forward_pre_hooks")
_training_of = operator.itemgetter("training")


class Fingerprint:
    """Everything that a captured graph of a module depends on.

    Each replay is preceded by a comparison of a UNet's 865 modules and 686 weights, while a fast GPU needs a few
    milliseconds for the replay itself. So they are collected once into flat lists, which are compared by loops in C.

    Args:
        root: the module.
    """

    def __init__(self, root: nn.Module):
        self._modules = list(root.modules())
        self._own = [vars(module) for module in self._modules]
        self._inner = self._own[1:]  # whoever hooks or wraps the root calls us from there
        self._kinds = tuple(dict.fromkeys(map(type, self._modules)))
        slotted = (any(hasattr(module, slot) for slot in SLOTS) for module in self._modules)
        self._with_slots = list(itertools.compress(zip(self._modules, self._own, strict=True), slotted))
        self._tables = [
            own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers")
        ]  # the dictionaries in which a module keeps its parts
        self._full = list(filter(None, self._tables))
        weights = (x for own in self._own for x in (*own["_parameters"].values(), *own["_buffers"].values()))
        # Holding them keeps their addresses and ids from being given to others.
        self._tensors = [x for x in weights if x is not None]
        self._state = self._current()

    def attached(self) -> Presence:
        """What is attached to the module and its parts: foreign, or all that is known with its state.

        A hook on the module itself is no matter: it is called around a replay as around a call.
        """
        if any(map(_hooks_of, self._inner)) or any(map(_pre_hooks_of, self._inner)):
            return self._find_foreign()
        if not all(issubclass(kind, FusedModule | None) for kind in set(map(type, self._forwards()))):
            return self._find_foreign()
        state: tuple[Any, ...] = ()
        for module, own in self._with_slots:
            if any(map(own.get, SLOTS)) or own["_modules"].get("processor") is not None:
                presence = on(module)
                if presence.state is None:
                    return presence
                state += presence.state
        return Presence("known", state) if state else PLAIN

    def _find_foreign(self) -> Presence:
        """Name the first part with a hook or a forward that is not of this room, which a replay would skip."""
        for module, own in zip(self._modules[1:], self._inner, strict=True):
            ours = isinstance(own.get("forward"), Execution | None)
            if not ours or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return on(module)
        return PLAIN

    def is_stale(self) -> bool:
        """Whether a part, class, fused module or weight was replaced, moved or written to."""
        return self._current() != self._state

    def is_past(self) -> bool:
        """Whether one of the weights themselves was moved or written to: what they were does not come back."""
        return states_of(self._tensors) != self._state[-1]

    def _forwards(self) -> list[Any]:
        return [own.get("forward") for own in self._inner]

    def _current(self) -> tuple[Any, ...]:
        return (
            list(map(type, self._modules)),
            list(map(code_of, self._kinds)),
            list(map(_training_of, self._own)),
            self._forwards(),
            list(map(len, self._tables)),
            list(map(id, _chained(map(dict.values, self._full)))),
            states_of(self._tensors),
        )


def cached_values(root: nn.Module) -> list[Any]:
    """List what the fused modules of a tree computed from its weights; a graph reads it at its address."""
    values: list[Any] = []
    for module in root.modules():
        own = execution_of(module)
        while isinstance(own, FusedModule):
            values += (cache.value for cache in vars(own).values() if isinstance(cache, WeightCache))
            own = getattr(own, "inner", None)
    return values


def _signature(value: Any) -> Any:
    """What an argument contributes to the key of a graph; something unhashable where it cannot be a key."""
    if type(value) is Tensor:
        return (value.shape, value.stride(), value.dtype, value.device)
    return [] if isinstance(value, Tensor) else value


def _difference(got: Tensor, want: Tensor) -> float:
    """Measure how far numbers are apart, relative to the largest; infinite where others are NaN."""
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return float((got - want).abs().nan_to_num(0.0).max() / want.abs().nan_to_num(0.0).max())


class _Entry:
    """One signature of arguments: how often it was called, and from the third call on its captured graph."""

    def __init__(self) -> None:
        self.calls = 0
        self.read: list[Any] = []  # by the graph, so it has to stay in memory
        self.replay: Run | None = None


class GraphedModule(ForwardWrapper):
    """Calls a network twice, captures it at the third call and replays from then on, for each signature of arguments.

    Args:
        module: the network.
        inner: as for ForwardWrapper; its work is what is captured.
        capture: captures a function of tensors, as `capture_cuda` does.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: FusedModule | None = None,
        capture: Callable[[Run, list[Tensor]], Run] = capture_cuda,
    ):
        super().__init__(module, inner)
        self.capture = capture
        self._reset()

    def _reset(self) -> None:
        self._states: list[tuple[Fingerprint, OrderedDict[Any, _Entry]]] = []  # the one used last comes first

    def __getstate__(self) -> dict[str, Any]:  # copies begin without graphs
        return {"module": self.module, "inner": self.inner, "capture": self.capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    @property
    def captured(self) -> list[bool]:
        """Whether each signature of a call of the network, as it is now, has a graph; that of the last call is last."""
        return [entry.replay is not None for _, shapes in self._states[:1] for entry in shapes.values()]

    def try_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take and give what the module does: by its graph, or by the module's own call where there is none (yet).

        What the module raises, it raises.
        """
        values, form = tree_flatten((args, kwargs))
        given = [value for value in values if type(value) is Tensor]
        key = (form, *map(_signature, values))

        def run(tensors: list[Tensor]) -> Any:
            rest = iter(tensors)
            new = [next(rest) if type(value) is Tensor else value for value in values]
            args, kwargs = tree_unflatten(new, form)
            return self.fallback(*args, **kwargs)

        with _lock:
            entry = self._entry_of(key) if given and self._can_capture(given[0].device) else None
            if entry is None:
                return self.fallback(*args, **kwargs)
            entry.calls += 1
            if entry.calls == CALLS_TO_CAPTURE:
                called = run(given)
                entry.replay = self._capture(run, given, called)
                entry.read = cached_values(self.module)
                return called
            if entry.replay is None:
                return run(given)
            # The side effects of its code, which a replay does not have.
            if isinstance(self.module, Decoder):
                self.module.last_z_shape = given[0].shape
            y = kwargs.get("y", args[3] if len(args) > 3 else None)
            if y is not None:
                check_labels(y, len(y), self.module.num_classes)
            return entry.replay(given)

    def _entry_of(self, key: Any) -> _Entry | None:
        """Find the entry of a signature; None where nothing may be captured or replayed."""
        self._states = [(known, shapes) for known, shapes in self._states if not known.is_past()]
        place = next((i for i, (known, _) in enumerate(self._states) if not known.is_stale()), None)
        if place is None:
            self._states.insert(0, (Fingerprint(self.module), OrderedDict()))
            del self._states[MAX_STATES:]
        elif place:
            self._states.insert(0, self._states.pop(place))
        fingerprint, shapes = self._states[0]
        presence = fingerprint.attached()
        if presence.state is None:
            say_once("no CUDA graph is used, which costs speed", presence.reason)
            return None
        try:
            entry = shapes.setdefault((*key, presence.state), _Entry())
        except TypeError:  # an argument that cannot be a key
            return None
        shapes.move_to_end((*key, presence.state))
        while len(shapes) > MAX_SHAPES:
            shapes.popitem(last=False)
        return entry

    def _can_capture(self, device: torch.device) -> bool:
        if self.capture is not capture_cuda:
            return True
        if device.type != "cuda":
            self._reset()  # the model has left the GPU; so should its graphs
            return False
        return not torch.cuda.is_current_stream_capturing()  # a capture of ours within another one

    def _capture(self, run: Run, given: list[Tensor], called: Tensor) -> Run | None:
        """Capture and check; None, with a warning in the log, if that fails: then calls of this shape stay eager."""
        name = type(self.module).__name__
        try:
            # Tensors made in inference mode, which a graph might hold, could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                replay = self.capture(run, given)
            replayed = replay(given)
        except Exception as error:  # Triton's are of no common kind
            # The error within the capture says more than the one that ends it.
            reason = error.__context__ or error
            words = str(reason).strip() or type(reason).__name__
            log.warning("no CUDA graph of %s is used: %s", name, words.splitlines()[0])
            return None
        difference = max(map(_difference, tree_leaves(replayed), tree_leaves(called)))
        if difference > MAX_DIFFERENCE:
            log.warning("no CUDA graph of %s is used: its replay differs by %.2g", name, difference)
            return None
        return replay


def attach(
    root: nn.Module,
    capture: Callable[[Run, list[Tensor]], Run] = capture_cuda,
    *,
    vae: bool = False,
) -> int:
    """Let every UNet of a tree be captured, with `vae` every encoder and decoder too; return how many.

    Not those with VAE tiling.
    """
    kinds = (UNetModel, *VAE) if vae else (UNetModel,)
    count = 0
    for module in root.modules():
        own = own_forward(module)
        if type(module) in kinds and (own is None or type(own) is FUSED.get(type(module))):
            set_execution(module, GraphedModule(module, own, capture))
            count += 1
    return count
