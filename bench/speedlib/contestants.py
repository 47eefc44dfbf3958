"""What every contestant is: an answer for the gate and a run for the clock, with its switches and its memory."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.speedlib import process
from bench.speedlib.rows import PLAIN, Row
from bench.speedlib.timing import Figures, clocked
from ldm.errors import ResourceError


@dataclass(frozen=True)
class Contestant:
    """One who runs.

    Attributes:
        answer: gives what the gate compares, float32 on the CPU; None where a part has no gate.
        measure: runs once and gives the figures.
        call: what `measure` times, for counting launches; None where it is not in this process.
        notes: what else is worth keeping of the run that answered.
    """

    answer: Callable[[], Tensor] | None
    measure: Callable[[], Figures]
    call: Callable[[], Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def in_process(
    call: Callable[[], Tensor],
    name: str,
    row: Row,
    device: torch.device,
    answer: Callable[[], Tensor] | None = None,
) -> Contestant:
    """Make a contestant of a call in this process, without gradients and with the switches that are its own.

    Args:
        answer: what the gate asks instead of `call`.
    """

    def under_switches(what: Callable[[], Any]) -> Any:
        with torch.no_grad(), switches(name, row, device):
            return what()

    return Contestant(
        lambda: under_switches(answer or call).detach().float().cpu().clone(),
        lambda: under_switches(lambda: clocked(call, device)),
        lambda: under_switches(call),
    )


@contextlib.contextmanager
def switches(name: str, row: Row, device: torch.device) -> Iterator[None]:
    """Set the process-wide switches that a contestant runs with: torch's own, or the fastest honest ones."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = name not in PLAIN
    freezes = name == "diffusers-frozen" or (
        name == "diffusers-best" and row.compiled and row.part != "train"
    )
    try:
        with process.inductor_switches(device) if freezes else contextlib.nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = before


# --- memory -----------------------------------------------------------------------------------------


class Room:
    """The memory that was free when a row opened, given out before it is used.

    A process that asks for more than there is gets killed, and with it all rows to come.
    """

    SPARE = 2 << 30  # for activations, and for others

    def __init__(self, device: torch.device):
        self.free = free_memory(device)
        self.taken = 0

    def take(self, nbytes: int, what: str) -> None:
        """Promise memory to somebody.

        Raises:
            ResourceError: there is not so much left.
        """
        if self.taken + nbytes + self.SPARE > self.free:
            left = max(0, self.free - self.taken - self.SPARE)
            raise ResourceError(f"{what} needs {nbytes / 1e9:.1f} GB, {left / 1e9:.1f} GB are free")
        self.taken += nbytes


def free_memory(device: torch.device) -> int:
    """Tell how many bytes can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def tidy() -> None:
    """Free what a row left: cycles, compiled graphs and the GPU's cached blocks."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
