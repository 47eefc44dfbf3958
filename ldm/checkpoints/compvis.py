"""A model's file or folder by CompVis's names, whoever wrote it: one tensor at a time, no model is built."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ldm.checkpoints import families, key_mapping
from ldm.checkpoints.build import follow_hub, match_file, open_file
from ldm.checkpoints.files import Weights, require_float
from ldm.checkpoints.folders import FolderWeights, is_diffusers_folder
from ldm.checkpoints.key_mapping import EMA, TEXT, UNET, VAE
from ldm.checkpoints.load import open_vae
from ldm.checkpoints.matching import SCALES, without_trailing_ones
from ldm.checkpoints.open_file import OpenFile
from ldm.checkpoints.report import NAMED, TensorInfo, first_few
from ldm.checkpoints.tensors import scaled
from ldm.errors import FormatError, MismatchError, OutputError, UsageError, escaped, refuse_elsewhere
from ldm.values import check_value

NETWORKS = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT}
TAKEN = ("v1", "v1-inpainting", "UNet")
OF_VAE = ("VAE", "VAE (diffusers)", "no UNet")
STEM = f"{UNET}input_blocks.0.0.weight"
PLAIN, INPAINTING = 4, 9  # input channels
AVERAGED = "the moving average was taken in its place"
_AS_CONVOLUTION = re.compile(r"(?:encoder|decoder)\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")


def network_of(name: str) -> str | None:
    """Say which network a tensor of CompVis's name is of; None for tables, markers and what else lies in a file."""
    if name.endswith(key_mapping.POSITION_IDS) or families.why_unused(name):
        return None
    return next((network for network, prefix in NETWORKS.items() if name.startswith(prefix)), None)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with OpenFile(path) as handle:
        return hashlib.file_digest(handle.file, "sha256").hexdigest()


class CompVisWeights:
    """A full model, or its UNet alone, of Stable Diffusion v1's layout at any size. Close it after use.

    Attributes:
        path, family: the file or folder; "v1", "v1-inpainting" or "UNet".
        files: the weight files that it consists of.
        names: CompVis's name -> name in the file.
        infos: CompVis's name -> shape, as CompVis has it, and dtype.
        ignored: name in the file -> why it is not used.
        is_averaged: whether the UNet's moving average was taken for its weights.

    Args:
        path: .safetensors, .ckpt, a diffusers folder, or a model's folder in the hub's cache.
        use_ema: take the UNet's moving average, where there is one, in the place of its weights. Of a file that holds
            the UNet as an average only, the average is taken anyway.
        only_vae: take the VAE alone, of a model or of a file or folder that holds nothing else.

    Raises:
        AbsentError, FormatError, UnsafeFileError: it cannot be read.
        MismatchError: it is something else, or an average that is wanted is not whole.
    """

    def __init__(self, path: str | Path, use_ema: bool = False, only_vae: bool = False):
        refuse_elsewhere("weight file", path)
        self.path = str(path)
        place = follow_hub(Path(path))
        is_folder = is_diffusers_folder(place)
        self._source: Weights = (
            FolderWeights(place) if is_folder else (open_vae if only_vae else open_file)(place)
        )
        try:
            self.files = self._source.files if isinstance(self._source, FolderWeights) else [str(place)]
            self.family = families.family_of(self._source.infos)
            names = self._canonical(only_vae)
            wanted, prefixes = ("VAE", VAE) if only_vae else ("model, or a UNet with its names,", (UNET, EMA))
            is_known = self.family in (TAKEN + OF_VAE if only_vae else TAKEN)
            if not is_known or not any(name.startswith(prefixes) for name in names.values()):
                raise MismatchError(
                    f"'{escaped(path)}' is {families.REFUSED.get(self.family, self.family)}; a Stable Diffusion v1 "
                    f"{wanted} is wanted"
                )
            self.ignored: dict[str, str] = {}
            self._scales: dict[str, str] = {}
            self.names: dict[str, str] = {}
            self._take(names)
            if only_vae:
                for name in [name for name in self.names if network_of(name) != "VAE"]:
                    self.ignored[self.names.pop(name)] = "not part of the VAE"
            else:
                self._average(place, use_ema)
            self.infos = {name: self._info(name) for name in self.names}
            self._networks = {network_of(name) for name in self.names} - {None}
        except BaseException:
            with contextlib.suppress(FormatError):
                self._source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return self._source.metadata

    def has(self, network: str) -> bool:
        """Tell whether it holds anything of "UNet", "VAE" or "text encoder"."""
        return network in self._networks

    def _canonical(self, only_vae: bool) -> dict[str, str]:
        """Name in the file -> CompVis's name."""
        names = key_mapping.canonical(self._source.infos)
        if only_vae and not any(known.startswith((VAE, "vae/")) for known in names.values()):
            alone = key_mapping.canonical(VAE + known for known in names.values())
            names = {name: alone[VAE + known] for name, known in names.items()}
        for prefix, part, translate in (
            ("unet/", UNET, key_mapping.unet_from_diffusers),
            ("vae/", VAE, key_mapping.vae_from_diffusers),
        ):
            theirs = [name.removeprefix(prefix) for name in names.values() if name.startswith(prefix)]
            ours = translate(theirs) if theirs else {}
            names |= {
                name: part + ours[known.removeprefix(prefix)]
                for name, known in names.items()
                if known.startswith(prefix) and known.removeprefix(prefix) in ours
            }
        return names

    def _take(self, names: dict[str, str]) -> None:
        weights = {name for name in names.values() if name.endswith(".weight")}
        for name, ours in names.items():
            base, dot, end = ours.rpartition(".")
            if dot + end in SCALES and f"{base}.weight" in weights:
                self.ignored[name] = "a scale, multiplied into its weight"
                self._scales[f"{base}.weight"] = name
            elif ours in self.names:
                raise MismatchError(
                    f"'{escaped(self.path)}': '{escaped(self.names[ours])}' and '{escaped(name)}' are the same tensor"
                )
            else:
                self.names[ours] = name

    def _average(self, place: Path, use_ema: bool) -> None:
        """Take the UNet's moving average, or leave it out."""
        path = escaped(self.path)
        plain = [name for name in self.names if name.startswith(UNET)]
        averages = [name for name in self.names if name.startswith(EMA)]
        shadows = {key_mapping.ema_name(name): name for name in plain}
        if not plain:  # the names of its parts can only be had from a model
            with contextlib.ExitStack() as opened:
                _, report, _ = match_file(place, None, opened, use_ema=True, source=self._source)
            found = {name: ours for name, ours in report.assigned.items() if ours.startswith(UNET)}
            shadows = {ours: found[name] for ours, name in self.names.items() if name in found}
        elif use_ema and averages and (missing := [name for name in shadows if name not in self.names]):
            raise MismatchError(
                f"'{path}' holds {len(averages)} tensors of a moving average, without {first_few(missing, 2)}; leave "
                "ema='use' (--ema use) out"
            )
        self.is_averaged = bool(averages) and (use_ema or not plain)
        for name in averages:
            theirs = self.names.pop(name)
            if name in shadows and self.is_averaged:
                if shadows[name] in self.names:
                    self.ignored[self.names[shadows[name]]] = AVERAGED
                self.names[shadows[name]] = theirs
            else:
                self.ignored[theirs] = "a moving average (model_ema.*), dropped"

    def _info(self, name: str) -> TensorInfo:
        info = self._source.infos[self.names[name]]
        shape = info.shape
        if name.startswith(VAE) and _AS_CONVOLUTION.fullmatch(name.removeprefix(VAE)) and len(shape) == 2:
            shape = (*shape, 1, 1)
        if network_of(name):
            require_float(self.path, self.names[name], info.dtype)
        # Weights in 8 bits are for keeping; what is made of them has the dtype that they are computed with.
        dtype = torch.float16 if info.dtype.is_floating_point and info.dtype.itemsize == 1 else info.dtype
        return TensorInfo(shape, dtype)

    def read(self, name: str) -> Tensor:
        """Read a tensor by CompVis's name, in its own dtype; 8 bits come as float16, or float32 where scaled."""
        values = self._source.read(self.names[name])
        if scale := self._scales.get(name):
            values = scaled(values, self._source.read(scale), self.path, self.names[name])
        elif values.dtype.is_floating_point and values.dtype.itemsize == 1:
            values = values.to(torch.float16)
        return values.reshape(self.infos[name].shape)

    def close(self) -> None:
        """Close the files.

        Raises:
            FormatError: one was rewritten since it was opened.
        """
        self._source.close()


def check_fit(one: CompVisWeights, first: CompVisWeights) -> None:
    """Raise MismatchError unless a model has the same tensors as the first in each network that both have.

    The first may be an inpainting model where the other is not.
    """
    path = escaped(one.path)
    missing, unexpected, misshapen = [], [], []
    for name, info in one.infos.items():
        network = network_of(name)
        if network is None or not first.has(network):
            continue
        if name not in first.infos:
            unexpected.append(name)
        elif name == STEM and first.infos[name].shape[1:2] != info.shape[1:2]:
            _check_channels(one, first)
        elif without_trailing_ones(info.shape) != without_trailing_ones(first.infos[name].shape):
            misshapen.append(
                f"'{escaped(name)}' {list(info.shape)} instead of {list(first.infos[name].shape)}"
            )
    for name in first.infos:
        network = network_of(name)
        if network is not None and one.has(network) and name not in one.infos:
            missing.append(name)
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing ({first_few(missing, 2)})")
    if unexpected:
        faults.append(f"{len(unexpected)} that the first model has not ({first_few(unexpected, 2)})")
    if misshapen:
        more = f" and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        faults.append(f"{len(misshapen)} of another shape ({misshapen[0]}{more})")
    if faults:
        raise MismatchError(
            f"'{path}' cannot be merged with '{escaped(first.path, 80)}': {'; '.join(faults[:NAMED])}; models of the "
            "same layout are wanted"
        )


def _check_channels(one: CompVisWeights, first: CompVisWeights) -> None:
    channels, wanted = one.infos[STEM].shape[1], first.infos[STEM].shape[1]
    if (wanted, channels) == (INPAINTING, PLAIN):
        return
    advice = (
        "give the inpainting model first" if (wanted, channels) == (PLAIN, INPAINTING) else "they do not fit"
    )
    raise MismatchError(
        f"'{escaped(one.path)}' has a UNet of {channels} input channels, '{escaped(first.path)}' of {wanted}; {advice}"
    )


# --- where the result goes ------------------------------------------------------------------------------------------


def check_output(output: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool) -> Path:
    """Give the path of a safetensors file that is to be written.

    Raises:
        UsageError: another kind of file, or one of the inputs.
        OutputError: it is there already, and is not to be replaced.
    """
    for one in (output, *inputs):
        check_value(one, str | os.PathLike, "a file")
    path = Path(output)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"the output should be 'name.safetensors', got '{escaped(path)}'")
    refuse_input(path, inputs)
    refuse_existing(path, overwrite)
    return path


def refuse_input(output: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise UsageError if an output is one of the inputs, or a file in a folder that is one; or no name at all."""
    if "\0" in str(output):
        raise UsageError(f"the output '{escaped(output)}' is no name of a file")
    if not os.path.exists(output):
        return
    places = [output, *output.resolve().parents]
    for one in map(Path, inputs):
        if os.path.exists(one) and any(place.samefile(one) for place in places):
            raise UsageError(
                f"the output '{escaped(output)}' is, or lies in, the input '{escaped(one)}'; give another name"
            )


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise OutputError if a file is there already and is not to be replaced."""
    if os.path.exists(path) and not overwrite:
        raise OutputError(
            f"'{escaped(path)}' is there already; give another name, or overwrite=True (--overwrite)"
        )
