"""How many bytes live while something runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, from their birth to their death.

    What a kernel takes for itself and gives back is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.meet(tensor.untyped_storage())
        return out

    def meet(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.part, key, size)
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def part(self, key, size):
        self.known.remove(key)
        self.live -= size


def peak_of(work):
    """Return the most bytes alive at once while `work` runs, and the largest single storage."""
    with torch.no_grad(), Meter() as meter:
        work()
    return meter.peak, meter.largest
