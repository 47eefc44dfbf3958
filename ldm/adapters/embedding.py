"""Textual inversion (Gal et al. 2022): vectors that stand in a prompt where words would be, and the names they go by.

    cat = Embedding("birb.bin")      # .token "<birb-style>", .vectors (1, 768), .names ("<birb-style>", "birb", ...)

Files hold the vectors in many forms; all of them are read, or refused by name. How a prompt's words become vectors is
the text encoder's business.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.file_hash import hashes_of, stamp_of
from ldm.checkpoints import TensorInfo, open_weights, read_object
from ldm.checkpoints.families import ALONE, REFUSED, family_of
from ldm.checkpoints.files import require_float, sniff
from ldm.checkpoints.open_file import OpenFile
from ldm.checkpoints.report import first_few
from ldm.checkpoints.tensors import check_finite
from ldm.errors import AbsentError, LdmError, MismatchError, UsageError, escaped, shown
from ldm.values import Range, check_value

CLIP_WIDTH = 768  # of the text encoder of Stable Diffusion v1
MAX_BYTES = 32 << 20  # of a file; 1,000 vectors with the states of an optimizer are under 10 MB
MAX_TOKEN = 100  # characters
SUFFIXES = (".pt", ".bin", ".safetensors")
# What files call an embedding that they have no name for.
NAMELESS = ("*", "emb_params", "clip_l", ALONE)
XL_PARTS = {"clip_l", "clip_g"}
# Which encoder's vectors have a width -> what to call it.
WIDTHS = {
    768: "Stable Diffusion v1",
    1024: "Stable Diffusion v2",
    1280: "Stable Diffusion XL's second encoder",
}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A file of textual inversion.

    Forms: A1111's (and the authors') `string_to_param`, in a dict or a ParameterDict; diffusers' {token: vector};
    `emb_params` and `clip_l` of safetensors; a tensor alone; a list with one dict. A vector (width,) is one, a matrix
    (n, width) n of them.

    Attributes:
        vectors: (n, width), float32.
        dtype: that the file has them in.
        names: what stands for it in a prompt: its token, the file's name without suffix (A1111), and
            `embedding:NAME` of that (ComfyUI).

    Args:
        file: path of a safetensors file or one of torch.save; nothing in it can run code.
        token: of several embeddings in a file, which; of one, another name for it. After construction the token: as
            given, else the file's, else the file's name.
        width: of the text encoder's vectors.

    Raises:
        UsageError: an option of another kind.
        AbsentError, FormatError, UnsafeFileError: the file cannot be read; see `open_weights`.
        MismatchError: no embedding, one of another width, or several and no token says which.
        NumericError: values that are not finite.
    """

    file: str | os.PathLike
    token: str | None = None
    width: int = CLIP_WIDTH
    vectors: Tensor = field(init=False, repr=False)
    dtype: torch.dtype = field(init=False, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = os.fspath(check_value(self.file, str | os.PathLike, "an embedding's file"))
        token = self.token
        if token is not None and (not isinstance(token, str) or not _is_token(token)):
            raise UsageError(
                f"token should be a printable text of up to {MAX_TOKEN} characters, got {shown(token)}"
            )
        check_value(self.width, int, "width", Range(1, 1 << 16))
        stamp = stamp_of(path)
        found, is_safetensors = _read(path)
        name, vectors = _choose(path, found, token)
        stem = Path(path).stem
        own = name if name not in NAMELESS and _is_token(name) else None
        called = token or own or stem
        values = {
            "file": path,
            "token": called,
            "vectors": _vectors(path, name, vectors, self.width),
            "dtype": vectors.dtype,
            "names": tuple(dict.fromkeys((called, stem, f"embedding:{stem}"))),
            "_stamp": stamp,
            "_is_safetensors": is_safetensors,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal.

        Raises:
            FormatError: the file changed since it was read.
        """
        return hashes_of(self.file, self._stamp, self._is_safetensors)[0]

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata.

        Returns:
            name (the file's), token, vectors (how many), hash (the first 12 digits of SHA-256, which A1111 writes as
            "TI hashes"), sha256.
        """
        return {
            "name": Path(self.file).stem,
            "token": self.token,
            "vectors": len(self.vectors),
            "hash": self.sha256[:12],
            "sha256": self.sha256,
        }


def _is_token(text: str) -> bool:
    return 0 < len(text) <= MAX_TOKEN and text.isprintable() and not text.isspace()


def _read(path: str) -> tuple[dict[str, Tensor], bool]:
    """Read what a file holds, by name, and whether it is safetensors; what can be no embedding is refused unread."""
    with OpenFile(path) as handle:
        is_safetensors = sniff(handle) == "safetensors"
        size = handle.size
    if is_safetensors or size > MAX_BYTES:
        weights = open_weights(path)
        try:
            _refuse_others(path, weights.infos)
            if size > MAX_BYTES:
                raise MismatchError(
                    f"'{escaped(path)}' has {size} bytes; an embedding, with up to {MAX_BYTES}, was wanted"
                )
            found = {name.removeprefix("string_to_param."): weights.read(name) for name in weights.infos}
            return found, is_safetensors
        finally:
            weights.close()
    found = _flat(path, read_object(path))
    if ALONE not in found:
        _refuse_others(path, {name: TensorInfo(tuple(one.shape), one.dtype) for name, one in found.items()})
    return found, False


def _flat(path: str, found: Any) -> dict[str, Tensor]:
    """Name the tensors of what torch.save wrote: of A1111's form, diffusers', a list of one of them, or a tensor."""
    if isinstance(found, Tensor):
        return {ALONE: found}
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, dict) and isinstance(found.get("string_to_param"), dict):
        found = found["string_to_param"]
    if not isinstance(found, dict):
        raise MismatchError(
            f"'{escaped(path)}' holds a {type(found).__name__}; an embedding has vectors by name, or alone"
        )
    # A dict of dicts is some other program's, and named by what lies in it.
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        inner = value.items() if isinstance(value, dict) else ()
        tensors |= {f"{name}.{key}": one for key, one in inner if isinstance(one, Tensor)}
        if isinstance(value, Tensor):
            tensors[str(name)] = value
    return tensors


def _refuse_others(path: str, infos: Mapping[str, TensorInfo]) -> None:
    """Raise MismatchError for a file of another kind, by its name."""
    if XL_PARTS <= set(infos):
        raise MismatchError(
            f"'{escaped(path)}' is an embedding for Stable Diffusion XL ({' and '.join(sorted(XL_PARTS))}); one for "
            "Stable Diffusion v1 was wanted"
        )
    family = family_of(infos)
    if family not in ("textual inversion", "unknown", "aesthetic gradients"):
        words = REFUSED.get(family, "a full Stable Diffusion v1 model")
        raise MismatchError(f"'{escaped(path)}': an embedding was wanted, and this is {words}")


def _choose(path: str, found: dict[str, Tensor], token: str | None) -> tuple[str, Tensor]:
    """Take the one embedding of a file, or the one that the token names."""
    if len(found) == 1:
        return next(iter(found.items()))
    if not found:
        raise MismatchError(f"'{escaped(path)}' holds no tensors; an embedding was wanted")
    if token in found:
        return token, found[token]
    wanted = "say with token= which one is wanted" if token is None else f"none is {shown(token)}"
    raise MismatchError(f"'{escaped(path)}' holds {len(found)} tensors ({first_few(found, 2)}); {wanted}")


def _vectors(path: str, name: str, values: Tensor, width: int) -> Tensor:
    """Bring (width,) or (n, width) into (n, width) of float32, or say what is wrong with it."""
    require_float(path, name, values.dtype)
    if values.dim() not in (1, 2) or not values.numel():
        raise MismatchError(
            f"'{escaped(path)}': '{escaped(name)}' has shape {list(values.shape)}; an embedding has (n, {width})"
        )
    if values.shape[-1] != width:
        whose = WIDTHS.get(values.shape[-1])
        raise MismatchError(
            f"'{escaped(path)}' has vectors of width {values.shape[-1]}{f', for {whose}' if whose else ''}; the text "
            f"encoder's have width {width}"
        )
    check_finite(path, name, values)
    return values.float().reshape(-1, width)


def read_folder(
    folder: str | os.PathLike, width: int = CLIP_WIDTH
) -> tuple[dict[str, Embedding], dict[str, str]]:
    """Read the embeddings of a folder and those in it.

    Args:
        folder: where they lie; files of other suffixes than .pt, .bin and .safetensors are passed over.
        width: of the text encoder's vectors.

    Returns:
        Name in a prompt -> embedding, each under all of its names; path -> why it was left out. A name that two
        files want is that of the first, by the order of their paths, and the second says so.

    Raises:
        AbsentError: there is no such folder.
    """
    root = Path(check_value(folder, str | os.PathLike, "a folder of embeddings"))
    if not root.is_dir():
        raise AbsentError(f"'{escaped(root)}' is no folder; a folder of embeddings was wanted")
    names: dict[str, Embedding] = {}
    refused: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        try:
            embedding = Embedding(path, width=width)
        except LdmError as error:
            refused[str(path)] = str(error)
            continue
        for name in embedding.names:
            first = names.setdefault(name, embedding)
            if first is not embedding:
                refused[str(path)] = f"'{escaped(name)}' is a name of '{escaped(first.file)}' already"
    return names, refused
