"""CUDA graphs of whole networks: what a call launches is recorded once for each shape and played back afterwards.

One step of a UNet is some 700 launches, and a fast GPU is done with each before Python has prepared the next. A
recording knows nothing of Python: it reads weights and inputs where they lay when it was made. So it is used only while
everything that it was made of is as it was, and nobody wants to be called on the way.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.kernels.stand_ins import STAND_INS, Around, StandIn, state_of
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel

log = logging.getLogger(__name__)

RECORDED = (UNetModel, Decoder, Encoder)
MOST = 8  # recordings that a network keeps, of the shapes seen last
WARM_UP = 2  # calls beforehand: libraries choose their algorithms, Triton and torch.compile compile
# A recording that differs more from the call that it recorded, relative to the largest number, is not used.
MOST_DIFFERENT = 0.05

Run = Callable[[list[Tensor]], Tensor]

# Recordings of a device share the memory for what lies between: nothing in it is wanted after a playback, for results
# are copied out. So there is one playback at a time, and one begins on its stream when the one before it has ended.
_lock = threading.RLock()
_pools: dict[torch.device, Any] = {}
_turns: dict[torch.device, torch.cuda.Event] = {}


def record_cuda(run: Run, inputs: list[Tensor]) -> Run:
    """Record a function of tensors; return one that plays it back on others of the same shapes.

    Raises:
        RuntimeError: something in it cannot be recorded, or there is no memory for it.
    """
    device = inputs[0].device
    with _lock, torch.cuda.device(device):
        held = [x.clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run(held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does has to be fit for recording; others may copy pictures meanwhile.
        pool = _pools.setdefault(device, torch.cuda.graph_pool_handle())
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run(held)

    def play(inputs: list[Tensor]) -> Tensor:
        with _lock, torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if device in _turns:
                stream.wait_event(_turns[device])
            for mine, given in zip(held, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            copied = out.clone()
            _turns[device] = stream.record_event()
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
        # By the arguments' form: what it depends on, the tensors of that, and what plays it.
        self._recordings: OrderedDict[Any, tuple[list[Any], list[Tensor | None], Run | None]] = OrderedDict()

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
            earlier, _, play = self._recordings.get(key, (None, None, None))
            if earlier != made_of[0]:
                self._recordings.pop(key, None)  # its memory first
                play = self._recorded(run, given)
                self._recordings[key] = (*made_of, play)
            self._recordings.move_to_end(key)
            while len(self._recordings) > MOST:
                self._recordings.popitem(last=False)
            if play is None:
                return run(given)
            if isinstance(self.module, Decoder):
                self.module.last_z_shape = given[0].shape  # what its code does besides
            return play(given)

    def _can_record(self, device: torch.device) -> bool:
        return self.record is not record_cuda or device.type == "cuda"

    def _recorded(self, run: Run, given: list[Tensor]) -> Run | None:
        """Record and check; None, with a warning in the log, if that fails: then calls of this shape go on without."""
        name = type(self.module).__name__
        try:
            play = self.record(run, given)
            played, called = play(given), run(given)
        except RuntimeError as error:
            log.warning("no recording of %s is used: %s", name, str(error).splitlines()[0])
            return None
        difference = (played - called).abs().max() / called.abs().max()
        if difference > MOST_DIFFERENT:  # never for a number that is none: it is none in both
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
