"""The report of a load: every tensor of the file and of the model is listed under exactly one heading."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ldm.checkpoints.sampling import SamplingDefaults
from ldm.errors import escaped

NAMED = 3  # how many names an error spells out before it only counts


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says about a tensor before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class LoadReport:
    """What became of every tensor.

    assigned: name in the file -> name in the model. ignored: name in the file -> why. initialised: name in
    the model -> where its value came from instead. scales: name in the model -> name in the file of the tensor
    that its weight is multiplied by. Names in a diffusers folder begin with "unet/", "vae/" or "text_encoder/".
    sampling: what the configuration advises for painting with the model.
    """

    path: str
    family: str
    assigned: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __repr__(self) -> str:
        return f"LoadReport({escaped(self.path)}: {self.family}, {len(self.assigned)} of {self.total} tensors assigned)"

    @property
    def total(self) -> int:
        """How many tensors the file holds."""
        return len(self.assigned) + len(self.ignored)

    def summary(self) -> str:
        """Say in a few lines what was loaded, what was ignored and what was initialised, by reason."""
        lines = [f"{self.path}: {self.family}, {len(self.assigned)} of {self.total} tensors assigned"]
        for heading, reasons in (("ignored", self.ignored), ("initialised", self.initialised)):
            for reason, count in sorted(Counter(reasons.values()).items()):
                lines.append(f"  {count} {heading}: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def first_few(names: Iterable[str], most: int = NAMED) -> str:
    """Spell out the first names and count the rest."""
    ordered = list(names)
    tail = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"'{escaped(name)}'" for name in ordered[:most]) + tail
