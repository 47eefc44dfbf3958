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

from ldm.kernels.fused import FUSED
from ldm.kernels.fused_module import ForwardWrapper, FusedModule, WeightCache, code_of
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel, check_labels

log = logging.getLogger(__name__)

VAE = (Encoder, Decoder)
MAX_SHAPES = 8  # graphs kept for a network; the least recently used goes first
# A capture costs three calls and memory, so a shape is captured at its third call. The calls before let libraries
# choose their algorithms and Triton compile.
CALLS_TO_CAPTURE = 3
WARM_UP = 1  # a call outside inference mode: torch.compile makes other code for that
# A graph whose replay differs more from the eager call, relative to the largest number, is not used.
MAX_DIFFERENCE = 0.05

Out = Tensor | tuple[Tensor, ...]
Run = Callable[[list[Tensor]], Out]

_lock = threading.RLock()


def _each(function: Callable[[Tensor], Tensor], out: Out) -> Out:
    """Apply a function to a tensor, or to each of a tuple."""
    return tuple(map(function, out)) if isinstance(out, tuple) else function(out)


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
        _each(lambda y: y.fill_(float("nan")), out)  # so that a replay that writes nothing is seen

    def replay(inputs: list[Tensor]) -> Out:
        with _lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if state.last_replay is not None:
                stream.wait_event(state.last_replay)
            for mine, given in zip(static_inputs, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            copied = _each(Tensor.clone, out)
            state.last_replay = stream.record_event()
        return copied

    return replay


_chained = itertools.chain.from_iterable
_hooks_of = operator.itemgetter("_forward_hooks")
_pre_hooks_of = operator.itemgetter("_forward_pre_hooks")
_training_of = operator.itemgetter("training")
_dtype_of = operator.attrgetter("dtype")
_version_of = operator.attrgetter("_version")


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
        # Not the root's: whoever wraps that calls us from it.
        self._inner = self._own[1:]
        self._kinds = tuple(dict.fromkeys(map(type, self._modules)))
        self._tables = [
            own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers")
        ]  # the dictionaries in which a module keeps its parts
        self._full = list(filter(None, self._tables))
        weights = (x for own in self._own for x in (*own["_parameters"].values(), *own["_buffers"].values()))
        # Holding them keeps their addresses and ids from being given to others.
        self._tensors = [x for x in weights if x is not None]
        self._counting = [x for x in self._tensors if not x.is_inference()]  # others have no version
        self._state = self._current()

    def is_hooked(self) -> bool:
        """Whether a part of the module has a hook or a forward that is not of this room, which a replay would skip."""
        if any(map(_hooks_of, self._own)) or any(map(_pre_hooks_of, self._own)):
            return True
        return not all(issubclass(kind, FusedModule | None) for kind in set(map(type, self._forwards())))

    def is_stale(self) -> bool:
        """Whether a part, class, fused module or weight was replaced, moved or written to."""
        return self._current() != self._state

    def _forwards(self) -> list[Any]:
        return [own.get("forward") for own in self._inner]

    def _current(self) -> tuple[list[Any], ...]:
        return (
            list(map(type, self._modules)),
            list(map(code_of, self._kinds)),
            list(map(_training_of, self._own)),
            self._forwards(),
            list(map(len, self._tables)),
            list(map(id, _chained(map(dict.values, self._full)))),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_dtype_of, self._tensors)),
            list(map(_version_of, self._counting)),
        )


def cached_values(root: nn.Module) -> list[Any]:
    """List what the fused modules of a tree computed from its weights; a graph reads it at its address."""
    values: list[Any] = []
    for module in root.modules():
        own = vars(module).get("forward")
        while isinstance(own, FusedModule):
            values += (cache.value for cache in vars(own).values() if isinstance(cache, WeightCache))
            own = getattr(own, "inner", None)
    return values


def _signature(value: Any) -> Any:
    """What an argument contributes to the key of a graph; something unhashable where it cannot be a key."""
    if type(value) is Tensor:
        return (value.shape, value.stride(), value.dtype, value.device)
    return [] if isinstance(value, Tensor) else value


def _difference(replayed: Tensor, called: Tensor) -> float:
    """Measure the largest difference, relative to the largest number; infinite where other values are NaN."""
    if not torch.equal(replayed.isnan(), called.isnan()):
        return torch.inf
    return float((replayed - called).abs().nan_to_num(0.0).max() / called.abs().nan_to_num(0.0).max())


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
        self._fingerprint: Fingerprint | None = None
        self._shapes: OrderedDict[Any, _Entry] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # copies begin without graphs
        return {"module": self.module, "inner": self.inner, "capture": self.capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def try_forward(self, *args: Any, **kwargs: Any) -> Out:
        names = (*range(len(args)), *kwargs)
        values = (*args, *kwargs.values())
        given = [value for value in values if type(value) is Tensor]
        key = tuple(zip(names, map(_signature, values), strict=True))

        def run(tensors: list[Tensor]) -> Out:
            rest = iter(tensors)
            new = [next(rest) if type(value) is Tensor else value for value in values]
            return self.fallback(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

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
        fingerprint = self._fingerprint or Fingerprint(self.module)
        if fingerprint.is_hooked():
            return None
        if fingerprint.is_stale():
            fingerprint = Fingerprint(self.module)
            if fingerprint.is_hooked():
                return None
            self._reset()  # graphs of other weights, and their memory
        try:
            entry = self._shapes.setdefault(key, _Entry())
        except TypeError:  # an argument that cannot be a key
            return None
        self._fingerprint = fingerprint
        self._shapes.move_to_end(key)
        while len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        return entry

    def _can_capture(self, device: torch.device) -> bool:
        if self.capture is not capture_cuda:
            return True
        if device.type != "cuda":
            self._reset()  # the model has left the GPU; so should its graphs
            return False
        return not torch.cuda.is_current_stream_capturing()  # a capture of ours within another one

    def _capture(self, run: Run, given: list[Tensor], called: Out) -> Run | None:
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
        pairs = [(replayed, called)] if isinstance(called, Tensor) else zip(replayed, called, strict=True)
        difference = max(_difference(*pair) for pair in pairs)
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
        own = vars(module).get("forward")
        if type(module) in kinds and (own is None or type(own) is FUSED.get(type(module))):
            module.forward = GraphedModule(module, own, capture)
            count += 1
    return count
