"""What a file holds, and whether and why not it would load; nothing is built with memory."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoints import families, key_mapping
from ldm.checkpoints.build import follow_hub, match_file, open_file
from ldm.checkpoints.files import Weights
from ldm.checkpoints.folders import FolderWeights, is_diffusers_folder
from ldm.checkpoints.matching import check_patterns, without
from ldm.checkpoints.report import LoadReport, TensorInfo, first_few
from ldm.checkpoints.tensors import all_zeros, is_empty, is_finite
from ldm.errors import FormatError, LdmError, MismatchError, NumericError, escaped, refuse_elsewhere

FOLDER_PARTS = {"UNet": "unet/", "VAE": "vae/"}  # diffusers' names, in a folder or a file
REST = "other"
VAE_FAMILIES = ("VAE", "VAE (diffusers)")


@dataclass
class Part:
    """The share of one network in a file."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)


@dataclass
class FileSummary:
    """What a file holds.

    family: "v1", "v1-inpainting", or another family's name. parts: network -> its share. ema: whether a moving
    average is there. report: the account of a load, if a full model would load. problem: why it would not. damage:
    what is wrong with its values, in words, or "".
    """

    path: str
    kind: str
    size: int
    family: str
    parts: dict[str, Part]
    ema: bool
    metadata: dict[str, str]
    notes: list[str]
    report: LoadReport | None = None
    problem: LdmError | None = None
    damage: str = ""

    @property
    def tensors(self) -> int:
        return sum(part.tensors for part in self.parts.values())

    def __str__(self) -> str:
        lines = [
            f"{self.path}",
            f"  format    {self.kind}, {self.size / 1e6:.1f} MB",
            f"  family    {families.REFUSED.get(self.family, self.family)}",
            f"  tensors   {self.tensors}",
        ]
        for name, part in self.parts.items():
            dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in part.dtypes.most_common())
            lines.append(
                f"    {name:<13} {part.tensors:>5} tensors {part.parameters / 1e6:>9.2f} M values "
                f"{part.nbytes / 1e6:>8.1f} MB  {dtypes}"
            )
        lines.append(f"  EMA       {'yes' if self.ema else 'no'}")
        lines += [
            f"  metadata  {escaped(key, 60)}: {escaped(value, 200)}" for key, value in self.metadata.items()
        ]
        lines += [f"  note      {note}" for note in self.notes]
        if self.report is not None:
            lines.append("  would load")
            lines += [f"    {line.strip()}" for line in self.report.summary().splitlines()]
        elif self.problem is not None:
            lines.append(f"  would not load as a full model: {self.problem}")
        if self.damage and self.damage != str(self.problem):
            lines.append(f"  values    {self.damage}")
        return "\n".join(lines)


def inspect(
    path: str | os.PathLike,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    check_values: bool = True,
    ignore: str | Iterable[str] = (),
) -> FileSummary:
    """Say what a weight file or diffusers folder holds and whether it would load as a full model.

    Args:
        path: the file or folder.
        config: as for load_latent_diffusion.
        use_ema: as for load_latent_diffusion.
        check_values: read every tensor and look for values that are not finite, and for weights of zeros only.
        ignore: as for load_latent_diffusion.

    Raises:
        AbsentError, FormatError, UnsafeFileError: it cannot be read at all. That it can be read but does not
        load is no error here; it is the summary's `problem`.
    """
    patterns = check_patterns(ignore)
    refuse_elsewhere("weight file", path)
    path = follow_hub(Path(path))
    with contextlib.closing(FolderWeights(path) if is_diffusers_folder(path) else open_file(path)) as source:
        family = families.family_of(without(source.infos, patterns))
        folder = isinstance(source, FolderWeights)
        spelling = key_mapping.canonical(source.infos)
        summary = FileSummary(
            path=escaped(path, 300),
            kind=source.kind,
            size=source.nbytes if folder else path.stat().st_size,
            family="diffusers folder" if folder else family,
            parts=_parts(source.infos, spelling),
            ema=any(name.startswith(key_mapping.EMA) for name in spelling.values()),
            metadata=source.metadata,
            notes=source.notes,
        )
        try:
            if not folder and family in VAE_FAMILIES:
                summary.notes.append("a VAE: use it with --vae, or load_vae")
            elif not folder and family in families.REFUSED:
                raise MismatchError(
                    f"'{summary.path}' is {families.REFUSED[family]}; {families.ADVICE[family]}"
                )
            else:
                with contextlib.ExitStack() as opened:
                    _, summary.report, _ = match_file(
                        path, config, opened, use_ema=use_ema, ignore=patterns, source=source
                    )
                summary.family = summary.report.family
        except LdmError as error:
            summary.problem = error
        if check_values and (damage := _damage(source, without(source.infos, patterns), summary.path)):
            summary.damage = str(damage)
            summary.problem = summary.problem or damage
        if summary.problem is not None:
            summary.report = None
    return summary


def _damage(source: Weights, infos: Mapping[str, TensorInfo], path: str) -> LdmError | None:
    """Read every value and say which tensors hold NaN or infinity, or zeros where a trained network has none."""
    broken, empty, count = [], [], 0
    for name, info in infos.items():
        if not info.dtype.is_floating_point:
            continue
        count += 1
        values = source.read(name)
        if not is_finite(values):
            broken.append(name)
        elif is_empty(name, values):
            empty.append(name)
    zeros = all_zeros(empty, count)
    if broken:
        return NumericError(
            f"'{path}' is damaged: {len(broken)} of {count} tensors hold values that are not finite "
            f"({first_few(broken)})" + (f"; {zeros}" if empty else "") + "; get the file again"
        )
    return FormatError(f"'{path}' is damaged: {zeros}; get the file again") if empty else None


def _parts(infos: Mapping[str, TensorInfo], spelling: Mapping[str, str]) -> dict[str, Part]:
    prefixes = {
        label: (prefix, FOLDER_PARTS.get(label, prefix)) for label, prefix in key_mapping.PARTS.items()
    }
    parts: dict[str, Part] = {}
    for name, info in infos.items():
        label = next((label for label, prefix in prefixes.items() if spelling[name].startswith(prefix)), REST)
        part = parts.setdefault(label, Part())
        part.tensors += 1
        part.parameters += info.numel
        part.nbytes += info.nbytes
        part.dtypes[str(info.dtype).removeprefix("torch.")] += 1
    return dict(sorted(parts.items(), key=lambda item: item[0] == REST))
