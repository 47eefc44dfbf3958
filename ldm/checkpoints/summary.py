"""What a file holds, and whether and why not it would load; nothing is built with memory."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoints import names
from ldm.checkpoints.account import LoadReport, TensorInfo, shown
from ldm.checkpoints.build import build_empty, open_model
from ldm.checkpoints.files import Weights, open_weights
from ldm.checkpoints.folders import FolderWeights, is_diffusers_folder
from ldm.checkpoints.load import check_finite
from ldm.checkpoints.pair import account_model
from ldm.errors import LdmError, MismatchError

FOLDER_PARTS = {"UNet": "unet/", "VAE": "vae/", "text encoder": "text_encoder/"}
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
    average is there. report: the account of a load, if a full model would load. problem: why it would not.
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

    @property
    def tensors(self) -> int:
        return sum(part.tensors for part in self.parts.values())

    def __str__(self) -> str:
        lines = [
            f"{self.path}",
            f"  format    {self.kind}, {self.size / 1e6:.1f} MB",
            f"  family    {names.REFUSED.get(self.family, self.family)}",
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
            f"  metadata  {shown(key, 60)}: {shown(value, 200)}" for key, value in self.metadata.items()
        ]
        lines += [f"  note      {note}" for note in self.notes]
        if self.report is not None:
            lines.append("  would load")
            lines += [f"    {line.strip()}" for line in self.report.summary().splitlines()]
        elif self.problem is not None:
            lines.append(f"  would not load as a full model: {self.problem}")
        return "\n".join(lines)


def inspect(
    path: str | os.PathLike,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    use_ema: bool | None = None,
    check_values: bool = True,
) -> FileSummary:
    """Say what a weight file or diffusers folder holds and whether it would load as a full model.

    Args:
        path: the file or folder.
        config: as for load_latent_diffusion.
        use_ema: as for load_latent_diffusion.
        check_values: read every tensor and look for values that are not finite.

    Raises:
        AbsentError, FormatError, UnsafeFileError: it cannot be read at all. That it can be read but does not
        load is no error here; it is the summary's `problem`.
    """
    path = Path(path)
    with contextlib.closing(
        FolderWeights(path) if is_diffusers_folder(path) else open_weights(path)
    ) as source:
        family = names.family_of(source.infos)
        folder = isinstance(source, FolderWeights)
        summary = FileSummary(
            path=shown(path, 300),
            kind=source.kind,
            size=source.nbytes if folder else path.stat().st_size,
            family="diffusers folder" if folder else family,
            parts=_parts(source.infos, FOLDER_PARTS if folder else names.PARTS),
            ema=any(name.startswith(names.EMA) for name in source.infos),
            metadata=source.metadata,
            notes=source.notes,
        )
        try:
            if not folder and family in VAE_FAMILIES:
                summary.notes.append("a VAE: use it with --vae, or load_vae")
            elif not folder and family in names.REFUSED:
                raise MismatchError(f"'{summary.path}' is {names.REFUSED[family]}")
            else:
                summary.report = _would_load(path, config, use_ema)
                summary.family = summary.report.family
            if check_values:
                _check_values(source)
        except LdmError as error:
            summary.report, summary.problem = None, error
    return summary


def _would_load(path: Path, config: Any, use_ema: bool | None) -> LoadReport:
    with contextlib.ExitStack() as opened:
        source, family, settings = open_model(path, config, opened)
        return account_model(build_empty(settings), source, family, use_ema)


def _check_values(source: Weights) -> None:
    for name, info in source.infos.items():
        if info.dtype.is_floating_point:
            check_finite(source.path, name, source.read(name))


def _parts(infos: Mapping[str, TensorInfo], prefixes: Mapping[str, str]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, info in infos.items():
        label = next((label for label, prefix in prefixes.items() if name.startswith(prefix)), REST)
        part = parts.setdefault(label, Part())
        part.tensors += 1
        part.parameters += info.numel
        part.nbytes += info.nbytes
        part.dtypes[str(info.dtype).removeprefix("torch.")] += 1
    return dict(sorted(parts.items(), key=lambda item: item[0] == REST))
