"""CUDA graphs of whole networks: what a call launches is recorded once for each shape and played back afterwards.

One step of a UNet is some 700 launches, and a fast GPU is done with each before Python has prepared the next. A
recording knows nothing of Python: it reads weights and inputs where they lay when it was made. So it is used only while
everything that it was made of is as it was, and nobody wants to be called on the way.
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

from ldm.kernels.fused import STAND_INS, Around, Derived, StandIn, code_of
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel, check_labels

log = logging.getLogger(__name__)

VAE = (Encoder, Decoder)
MOST = 8  # shapes that a network remembers, those seen last
# A recording costs three calls and memory, so a shape is recorded when it comes for the third time. The calls before
# let libraries choose their algorithms and Triton compile.
SIGHTS = 3
WARM_UP = 1  # a call outside inference mode: torch.compile makes other code for that
# A recording that differs more from the call that it recorded, relative to the largest number, is not used.
MOST_DIFFERENT = 0.05

Run = Callable[[list[Tensor]], Tensor]

_lock = threading.RLock()


class _Card:
    """What the recordings of one GPU share.

    That is the memory for what lies between, too: nothing in it is wanted after a playback, for results are copied out.
    So there is one playback at a time, and one begins on its stream when the one before it has ended.
    """

    def __init__(self, device: torch.device):
        # Libraries keep a workspace for each stream, so there are not two streams for each recording; and it is not one
        # for both, for what is recorded has to take its workspace from the recordings' memory.
        self.warming, self.recording = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.turn: torch.cuda.Event | None = None


_cards: dict[torch.device, _Card] = {}


def record_cuda(run: Run, inputs: list[Tensor]) -> Run:
    """Record a function of tensors; return one that plays it back on others of the same shapes.

    Raises:
        RuntimeError: something in it cannot be recorded, or there is no memory for it.
    """
    device = inputs[0].device
    with _lock, torch.cuda.device(device):
        if device not in _cards:
            _cards[device] = _Card(device)
        card = _cards[device]
        held = [x.clone() for x in inputs]
        card.warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(card.warming):
            for _ in range(WARM_UP):
                run(held)
        torch.cuda.current_stream().wait_stream(card.warming)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in card.graphs), None)
        if pool is None:
            # cuBLAS keeps the workspace that it got on this stream. It came from the memory of recordings that are
            # gone or broke off; this one has to get one from its own.
            torch._C._cuda_clearCublasWorkspaces()
        stream = card.recording
        # Only what this thread does has to be fit for recording; others may copy pictures meanwhile.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        try:
            with (
                torch.cuda.stream(stream),
                recording,
            ):  # a recording that fails does not leave the stream by itself
                out = run(held)
        except BaseException:
            card.graphs.clear()  # their memory may still be taken for being recorded into
            raise
        card.graphs.add(graph)
        out.fill_(float("nan"))  # so that a playback that writes nothing is seen

    def play(inputs: list[Tensor]) -> Tensor:
        with _lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if card.turn is not None:
                stream.wait_event(card.turn)
            for mine, given in zip(held, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            copied = out.clone()
            card.turn = stream.record_event()
        return copied

    return play


_chained = itertools.chain.from_iterable
_hooks_of = operator.itemgetter("_forward_hooks")
_pre_hooks_of = operator.itemgetter("_forward_pre_hooks")
_training_of = operator.itemgetter("training")
_dtype_of = operator.attrgetter("dtype")
_version_of = operator.attrgetter("_version")


class Fingerprint:
    """All that a recording of a module depends on.

    A playback is preceded by a look at each of a UNet's 865 modules and 686 weights, while a fast GPU is done in a few
    milliseconds. So they are found once, and a look is a few loops over flat lists that run in C.

    Args:
        root: the module.
    """

    def __init__(self, root: nn.Module):
        self._modules = list(root.modules())
        self._own = [vars(module) for module in self._modules]
        self._kinds = tuple(dict.fromkeys(map(type, self._modules)))
        self._tables = [
            own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers")
        ]  # the dictionaries in which a module keeps its parts
        self._full = list(filter(None, self._tables))
        weights = (x for own in self._own for x in (*own["_parameters"].values(), *own["_buffers"].values()))
        # While they are kept, no others can come to lie there or have their ids.
        self._tensors = [x for x in weights if x is not None]
        self._counting = [x for x in self._tensors if not x.is_inference()]  # others have no version
        self._then = self._look()

    def is_watched(self) -> bool:
        """Whether somebody hooked a part of the module or replaced its code: then it has to be called."""
        if any(map(_hooks_of, self._own)) or any(map(_pre_hooks_of, self._own)):
            return True
        return not all(issubclass(kind, StandIn | None) for kind in set(map(type, self._forwards())))

    def is_past(self) -> bool:
        """Whether a part, class, stand-in or weight is not what or where it was, or was written to."""
        return self._look() != self._then

    def _forwards(self) -> list[Any]:
        return [own.get("forward") for own in self._own]

    def _look(self) -> tuple[list[Any], ...]:
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


def derived_of(root: nn.Module) -> list[Any]:
    """What the stand-ins of a tree have made of its weights; a recording reads it where it lies."""
    made: list[Any] = []
    for module in root.modules():
        own = vars(module).get("forward")
        while isinstance(own, StandIn):
            made += (value.kept for value in vars(own).values() if isinstance(value, Derived))
            own = getattr(own, "inner", None)
    return made


def _form(value: Any) -> Any:
    """What tells one recording from another in an argument; an unhashable thing where that cannot be said."""
    if type(value) is Tensor:
        return (value.shape, value.stride(), value.dtype, value.device)
    return [] if isinstance(value, Tensor) else value


class _Shape:
    """What is known of one form of arguments: how often it came, and from the third time on its recording."""

    def __init__(self) -> None:
        self.sights = 0
        self.read: list[Any] = []  # by the recording, so it has to stay in memory
        self.play: Run | None = None


class Graphed(Around):
    """Calls a network twice and plays a recording from then on, for each form of its arguments.

    Args:
        module: the network.
        inner: as for Around; its work is what is recorded.
        record: makes a recording, as `record_cuda` does.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: StandIn | None = None,
        record: Callable[[Run, list[Tensor]], Run] = record_cuda,
    ):
        super().__init__(module, inner)
        self.record = record
        self._forget()

    def _forget(self) -> None:
        self._made_of: Fingerprint | None = None
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # copies begin with nothing
        return {"module": self.module, "inner": self.inner, "record": self.record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def fast(self, *args: Any, **kwargs: Any) -> Tensor:
        names = (*range(len(args)), *kwargs)
        values = (*args, *kwargs.values())
        given = [value for value in values if type(value) is Tensor]
        key = tuple(zip(names, map(_form, values), strict=True))

        def run(tensors: list[Tensor]) -> Tensor:
            left = iter(tensors)
            new = [next(left) if type(value) is Tensor else value for value in values]
            return self.plainly(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

        with _lock:
            shape = self._shape_of(key) if given and self._can_record(given[0].device) else None
            if shape is None:
                return self.plainly(*args, **kwargs)
            shape.sights += 1
            if shape.sights == SIGHTS:
                called = run(given)
                shape.play = self._recorded(run, given, called)
                shape.read = derived_of(self.module)
                return called
            if shape.play is None:
                return run(given)
            # What its code does besides, for a playback does not.
            if isinstance(self.module, Decoder):
                self.module.last_z_shape = given[0].shape
            y = kwargs.get("y", args[3] if len(args) > 3 else None)
            if y is not None:
                check_labels(y, len(y), self.module.num_classes)
            return shape.play(given)

    def _shape_of(self, key: Any) -> _Shape | None:
        """Find what is known of a form of arguments; None where no recording may be made or played."""
        made_of = self._made_of or Fingerprint(self.module)
        if made_of.is_watched():
            return None
        if made_of.is_past():
            made_of = Fingerprint(self.module)
            if made_of.is_watched():
                return None
            self._forget()  # what was made of other weights, and its memory with it
        try:
            shape = self._shapes.setdefault(key, _Shape())
        except TypeError:  # an argument without a form
            return None
        self._made_of = made_of
        self._shapes.move_to_end(key)
        while len(self._shapes) > MOST:
            self._shapes.popitem(last=False)
        return shape

    def _can_record(self, device: torch.device) -> bool:
        if self.record is not record_cuda:
            return True
        if device.type != "cuda":
            self._forget()  # the model has left the GPU; so should they
            return False
        return not torch.cuda.is_current_stream_capturing()  # by somebody who records us

    def _recorded(self, run: Run, given: list[Tensor], called: Tensor) -> Run | None:
        """Record and check; None, with a warning in the log, if that fails: then calls of this shape go on without."""
        name = type(self.module).__name__
        try:
            # Tensors of inference mode, which a recording might hold, could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                play = self.record(run, given)
            played = play(given)
        except Exception as error:  # Triton's are of no common kind
            # What broke a recording off says more than its end does.
            reason = error.__context__ or error
            words = str(reason).strip() or type(reason).__name__
            log.warning("no recording of %s is used: %s", name, words.splitlines()[0])
            return None
        difference = (played - called).abs().nan_to_num(0.0).max() / called.abs().nan_to_num(0.0).max()
        if not torch.equal(played.isnan(), called.isnan()):
            difference = torch.inf
        if difference > MOST_DIFFERENT:
            log.warning("no recording of %s is used: it differs by %.2g", name, float(difference))
            return None
        return play


def attach(
    root: nn.Module,
    record: Callable[[Run, list[Tensor]], Run] = record_cuda,
    *,
    vae: bool = False,
) -> int:
    """Let every UNet of a tree be recorded, with `vae` every encoder and decoder too; return how many.

    Not those that work in strips.
    """
    kinds = (UNetModel, *VAE) if vae else (UNetModel,)
    count = 0
    for module in root.modules():
        own = vars(module).get("forward")
        if type(module) in kinds and (own is None or type(own) is STAND_INS.get(type(module))):
            module.forward = Graphed(module, own, record)
            count += 1
    return count
