"""CUDA graphs of whole networks: what a call launches is recorded once for each shape and played back afterwards.

One step of a UNet is some 700 launches, and a fast GPU is done with each before Python has prepared the next. A
recording knows nothing of Python: it reads weights and inputs where they lay when it was made. So it is used only while
everything that it was made of is as it was, and nobody wants to be called on the way.
"""

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.kernels.stand_ins import STAND_INS, Around, Derived, StandIn, state_of
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel, check_labels

log = logging.getLogger(__name__)

RECORDED = (UNetModel, Decoder, Encoder)
MOST = 8  # recordings that a network keeps, of the shapes seen last
WARM_UP = 2  # calls beforehand: libraries choose their algorithms, Triton and torch.compile compile
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


def fingerprint(root: nn.Module) -> tuple[list[Any], list[Tensor | None]] | None:
    """All that a recording of a module depends on, or None if somebody hooked a part of it or replaced its code.

    Returns:
        what is to be compared, and the tensors that it names: while they are kept, no others can come to lie there.
    """
    found: list[Any] = []
    tensors: list[Tensor | None] = []
    for module in root.modules():
        own = vars(module).get("forward")
        if module._forward_hooks or module._forward_pre_hooks or not isinstance(own, StandIn | None):
            return None
        kind = type(module)
        found += (kind, kind.forward, getattr(kind, "_forward", None), module.training, own)
        tensors += (*module._parameters.values(), *module._buffers.values())
    return found + [(id(x), *state_of(x)) for x in tensors], tensors


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


class Graphed(Around):
    """Calls a network the first time and plays recordings of it from then on.

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
        # By the arguments' form: what it depends on, what has to stay in memory for it, and what plays it.
        self._recordings: OrderedDict[Any, tuple[list[Any], list[Any], Run | None]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:  # copies begin with nothing
        return {**vars(self), "_recordings": OrderedDict()}

    def fast(self, *args: Any, **kwargs: Any) -> Tensor:
        names = (*range(len(args)), *kwargs)
        values = (*args, *kwargs.values())
        given = [value for value in values if type(value) is Tensor]
        key = tuple(zip(names, map(_form, values), strict=True))
        made_of = fingerprint(self.module) if given and self._can_record(given[0].device) else None
        try:
            hash(key)
        except TypeError:
            made_of = None
        if made_of is None:
            return self.plainly(*args, **kwargs)

        def run(tensors: list[Tensor]) -> Tensor:
            left = iter(tensors)
            new = [next(left) if type(value) is Tensor else value for value in values]
            return self.plainly(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

        with _lock:
            # What was made of other weights goes first, and its memory with it.
            for other in [k for k, (earlier, *_) in self._recordings.items() if earlier != made_of[0]]:
                del self._recordings[other]
            if key not in self._recordings:
                called = run(given)
                play = self._recorded(run, given, called)
                self._recordings[key] = (made_of[0], [made_of[1], derived_of(self.module)], play)
                while len(self._recordings) > MOST:
                    self._recordings.popitem(last=False)
                return called
            self._recordings.move_to_end(key)
            play = self._recordings[key][2]
            if play is None:
                return run(given)
            # What its code does besides, for a playback does not.
            if isinstance(self.module, Decoder):
                self.module.last_z_shape = given[0].shape
            y = kwargs.get("y", args[3] if len(args) > 3 else None)
            if y is not None:
                check_labels(y, len(y), self.module.num_classes)
            return play(given)

    def _can_record(self, device: torch.device) -> bool:
        if self.record is not record_cuda:
            return True
        if device.type != "cuda":
            self._recordings.clear()  # the model has left the GPU; so should they
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
        except RuntimeError as error:
            # What broke a recording off says more than its end does.
            reason = error.__context__ or error
            log.warning("no recording of %s is used: %s", name, str(reason).splitlines()[0])
            return None
        difference = (played - called).abs().nan_to_num(0.0).max() / called.abs().nan_to_num(0.0).max()
        if not torch.equal(played.isnan(), called.isnan()):
            difference = torch.inf
        if difference > MOST_DIFFERENT:
            log.warning("no recording of %s is used: it differs by %.2g", name, float(difference))
            return None
        return play


def attach(root: nn.Module, record: Callable[[Run, list[Tensor]], Run] = record_cuda) -> int:
    """Let every UNet, encoder and decoder of a tree be recorded, unless it works in strips; return how many."""
    count = 0
    for module in root.modules():
        own = vars(module).get("forward")
        if type(module) in RECORDED and (own is None or type(own) is STAND_INS.get(type(module))):
            module.forward = Graphed(module, own, record)
            count += 1
    return count
