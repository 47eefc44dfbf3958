"""The account of a load: every tensor of the file and of the model ends under exactly one heading."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ldm.checkpoints.sampling import SamplingDefaults
from ldm.errors import MismatchError, escaped

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


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def match(
    path: str,
    *,
    held: Mapping[str, TensorInfo],
    wanted: Mapping[str, tuple[int, ...]],
    rename: Mapping[str, str],
    ignored: Mapping[str, str],
    initialised: Mapping[str, str],
) -> dict[str, str]:
    """Pair the tensors of a file with those of a model, or say in one error what does not pair.

    Shapes may differ in sizes of 1 at their ends: (c, c) is a linear layer and (c, c, 1, 1) the same as a convolution,
    and diffusers' export writes either, and biases as (c, 1, 1).

    Args:
        path: the file, for the message.
        held: what the file holds.
        wanted: the shape of every tensor of the model's state dict.
        rename: name in the file -> name in the model, for those whose names differ; a name that is absent
            here stands for itself.
        ignored: names of the file that are left out on purpose, with the reason.
        initialised: names of the model that need not be in the file, with the reason.

    Returns:
        name in the file -> name in the model.

    Raises:
        MismatchError: missing, unexpected, misshapen or twice-named tensors; the first few are named.
    """
    pairs: dict[str, str] = {}
    source: dict[str, str] = {}
    unexpected, misshapen, twice = [], [], []
    for name, info in held.items():
        if name in ignored:
            continue
        target = rename.get(name, name)
        if target not in wanted:
            unexpected.append(name)
            continue
        if target in source:
            twice.append(f"{source[target]} and {name}")
            continue
        source[target] = name
        pairs[name] = target
        if _without_trailing_ones(info.shape) != _without_trailing_ones(tuple(wanted[target])):
            misshapen.append(f"'{escaped(name)}' {list(info.shape)} instead of {list(wanted[target])}")
    missing = [name for name in wanted if name not in source and name not in initialised]

    faults = []
    if missing:
        faults.append(f"{len(missing)} of the model's {len(wanted)} tensors missing ({first_few(missing)})")
    foreign = f"{len(unexpected)} of the file's {len(held)} not expected ({first_few(unexpected)})"
    if unexpected:
        faults.append(foreign)
    if misshapen:
        tail = f" and {len(misshapen) - NAMED} more" if len(misshapen) > NAMED else ""
        faults.append(f"{len(misshapen)} of another shape ({', '.join(misshapen[:NAMED])}{tail})")
    if twice:
        faults.append(f"{len(twice)} given twice ({first_few(twice)})")
    if faults:
        advice = "use the file's own configuration"
        if faults[0] == foreign:
            advice = "leave it out with ignore= (--ignore-keys PATTERN) if it is no part of a model"
        raise MismatchError(f"'{escaped(path)}' does not fit the model: {'; '.join(faults)}; {advice}")
    return pairs
