"""Pickles of torch.save, taken as hostile: checked as a zip, scanned for what they name, then unpickled restricted.

There is no way to switch this off. A file that is refused here has to be converted elsewhere, by somebody who
trusts it.
"""

import collections
import io
import os
import pickletools
import re
import struct
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoints.account import TensorInfo, shown
from ldm.checkpoints.safe import MAX_TENSORS, check_name
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError

if TYPE_CHECKING:
    from ldm.checkpoints.files import OpenFile

MAX_PICKLE = 64 << 20  # bytes of data.pkl; Stable Diffusion v1 with its optimizer needs under 1 MB
MAX_OPS = 3_000_000
MAX_DEPTH = 16
MAX_STATE_DICTS = 4  # how deep a state dict may be wrapped in others
LEGACY_PICKLES = 5  # magic number, protocol, system, object, storage keys

STORAGES = {
    f"torch.{name}Storage"
    for name in "Double Float Half BFloat16 Long Int Short Char Byte Bool Untyped".split()
} | {"torch.storage.UntypedStorage", "torch.storage.TypedStorage"}
# What a state dict is made of. Narrower than torch's own list: that has torch.Tensor and bytearray, which a file
# can call with a size to be given uninitialised or endless memory.
HARMLESS = (
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.nn.parameter.Parameter",
        "torch.Size",
        "torch.device",
        "_codecs.encode",
        "builtins.set",
    }
    | STORAGES
    | {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
)
UNSUPPORTED = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.(Complex|Q)\w+Storage|builtins\.complex"
)
LIGHTNING_PACKAGES = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = [
    "callbacks.model_checkpoint.ModelCheckpoint",
    "callbacks.early_stopping.EarlyStopping",
    "callbacks.lr_monitor.LearningRateMonitor",
]
# Names that old v1 checkpoints carry beside their weights; each becomes an inert placeholder, so that neither
# Lightning nor NumPy is needed, or run, to read them.
STUBBED = [f"{package}.{name}" for package in LIGHTNING_PACKAGES for name in LIGHTNING] + [
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.ValueNode",
    "typing.Any",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
]


class Stub:
    """Stand in for an object that a checkpoint carries beside its weights; keeps nothing, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Stub":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*args: object) -> dict:
    """Stand in for the constructor of a foreign mapping: its items are kept, its arguments are not."""
    return {}


# The unpickler fills plain mappings only, so foreign ones become those.
STANDINS = [
    *((Stub, name) for name in STUBBED),
    *(
        (collections.OrderedDict, f"{package}.utilities.parsing.AttributeDict")
        for package in LIGHTNING_PACKAGES
    ),
    (_plain_dict, "collections.defaultdict"),
]


def load_object(handle: "OpenFile", kind: str) -> Any:
    """Unpickle an open file of torch.save, restricted, and check that only data came out.

    Args:
        handle: the open file; it is read through this handle only.
        kind: "zip", or "pickle" for the format before torch 1.6.

    Raises:
        FormatError: truncated or damaged; for a zip, every bit is covered by a checksum.
        UnsafeFileError: it names code, or is built to exhaust memory.
        MismatchError: it holds tensors of a kind that is not supported.
    """
    path = shown(handle.path)
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise UnsafeFileError(
            f"'{path}' is a pickle, unsafe with torch {torch.__version__}; install torch 2.10 or newer"
        )
    with os.fdopen(os.dup(handle.file.fileno()), "rb") as stream:
        try:
            if kind == "zip":
                _check_zip(stream, handle.size, path)
            else:
                stream.seek(0)
                _scan(io.BytesIO(stream.read(MAX_PICKLE)), path, pickles=LEGACY_PICKLES)
            stream.seek(0)
            with warnings.catch_warnings(), torch.serialization.safe_globals(STANDINS):
                warnings.simplefilter("ignore")
                found = torch.load(stream, map_location="cpu", weights_only=True)
        except LdmError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # torch and zipfile raise a dozen kinds for a damaged file
            raise FormatError(
                f"'{path}' is incomplete or damaged ({handle.size} bytes; {type(error).__name__}); download it again"
            ) from error
    handle.check_unchanged()
    _check_tree(found, path, handle.size)
    return found


def _check_zip(stream: BinaryIO, size: int, path: str) -> None:
    """Check what torch does not: stored entries, plain names, sizes, checksums; then scan data.pkl."""
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile as error:
        raise FormatError(
            f"'{path}' is an incomplete zip of {size} bytes: the table at its end is missing; download it again"
        ) from error
    entries = archive.infolist()
    if len(entries) > MAX_TENSORS:
        raise UnsafeFileError(f"'{path}' has {len(entries)} zip entries; more than {MAX_TENSORS} are refused")
    names = [entry.filename for entry in entries]
    if len({name.casefold() for name in names}) != len(names):
        raise FormatError(f"'{path}' is a malformed zip: an entry stands twice; download it again")
    for entry in entries:
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnsafeFileError(
                f"'{path}': zip entry '{shown(name)}' is compressed; torch.save stores, so refused"
            )
        parts = name.split("/")
        if (
            entry.flag_bits & 1  # encrypted
            or entry.external_attr & 0x10  # marked a directory: torch would hand out uninitialised memory
            or entry.file_size != entry.compress_size
            or "\\" in name
            or not name.isprintable()
            or any(part in ("", "..") for part in parts)
            or entry.orig_filename != name
        ):
            raise FormatError(f"'{path}' is a malformed zip: entry '{shown(name)}'; download it again")
    if sum(entry.file_size for entry in entries) > size:
        raise UnsafeFileError(f"'{path}': the zip's entries claim more bytes than the file's {size}")
    pickles = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise FormatError(f"'{path}' is a zip with {len(pickles)} data.pkl; a checkpoint has exactly one")
    if pickles[0].file_size > MAX_PICKLE:
        raise UnsafeFileError(
            f"'{path}': data.pkl of {pickles[0].file_size} bytes; more than {MAX_PICKLE} are refused"
        )
    for entry in entries:
        with archive.open(entry) as body:  # zipfile compares the checksum at the end
            while body.read(1 << 20):
                pass
    _scan(io.BytesIO(archive.read(pickles[0])), path)


def _scan(stream: io.BytesIO, path: str, pickles: int = 1) -> None:
    """Name everything that pickles would import, without running them, and refuse what is not on the lists.

    The restricted unpickler is the boundary; this scan gives the refusal its name and narrows torch's list.
    """
    allowed = HARMLESS.union(name for _, name in STANDINS)
    words: list[str] = []  # text pushed last: what a STACK_GLOBAL takes its name from
    count = 0
    for _ in range(pickles):
        try:
            for op, argument, _ in pickletools.genops(stream):
                count += 1
                if count > MAX_OPS:
                    raise UnsafeFileError(f"'{path}' holds a pickle of more than {MAX_OPS} steps; refused")
                if op.name in ("GLOBAL", "INST"):
                    name = _modern_global(*argument.split(" ", 1))
                elif op.name == "STACK_GLOBAL":
                    name = ".".join(words[-2:])
                else:
                    if isinstance(argument, str):
                        words = [*words[-1:], argument]
                    continue
                if name in allowed:
                    continue
                kind = UNSUPPORTED.fullmatch(name)
                if kind:
                    raise MismatchError(
                        f"'{path}' holds tensors of an unsupported kind ({shown(name, 60)}); only plain dense ones load"
                    )
                raise UnsafeFileError(
                    f"'{path}' is refused: it contains code, '{shown(name, 80)}'; weights alone need none, "
                    "get a .safetensors version"
                )
        except (ValueError, IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
            if isinstance(error, LdmError):
                raise
            raise FormatError(
                f"'{path}' is incomplete or damaged: its pickle breaks off; download it again"
            ) from error


def _modern_global(module: str, name: str) -> str:
    """Read a name as the unpickler will: with Python 2's modules under their names of today."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _check_tree(found: Any, path: str, size: int) -> None:
    """Check that only plain data came out, and no more of it than the file can hold."""
    stack: list[tuple[Any, int]] = [(found, 0)]
    seen: set[int] = set()
    total = 0
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UnsafeFileError(f"'{path}' is nested too deep: more than {MAX_DEPTH} levels are refused")
        if id(value) in seen:
            continue
        if isinstance(value, Tensor):
            seen.add(id(value))
            # torch itself refuses a tensor that reaches beyond its storage, but not one that repeats it.
            storage = value.untyped_storage()
            if value.nbytes > storage.nbytes():
                raise UnsafeFileError(
                    f"'{path}': a tensor {list(value.shape)} is larger than its {storage.nbytes()} bytes of data"
                )
            total += value.nbytes
        elif isinstance(value, dict):
            seen.add(id(value))
            stack += [(item, depth + 1) for item in (*value.values(), *value)]
        elif isinstance(value, list | tuple | set):
            seen.add(id(value))
            stack += [(item, depth + 1) for item in value]
    if total > 2 * size:
        raise UnsafeFileError(f"'{path}': tensors of {total} bytes out of a file of {size}; refused")


class PickleWeights:
    """The tensors of an unpickled checkpoint, whatever it wraps them in; the rest is named and left out."""

    def __init__(self, handle: "OpenFile", found: Any, kind: str):
        self.path = handle.path
        self.kind = "zip pickle" if kind == "zip" else "legacy pickle"
        self.notes: list[str] = []
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        if kind != "zip":
            self.notes.append("a pickle from before torch 1.6 carries no checksums; damage can go unseen")
        state = self._unwrap(found)
        self._flatten(state, "")
        if not self._tensors:
            raise MismatchError(f"'{shown(self.path)}' holds no weights: {_described(found)}")
        if len(self._tensors) > MAX_TENSORS:
            raise UnsafeFileError(
                f"'{shown(self.path)}' lists {len(self._tensors)} tensors; more than {MAX_TENSORS} are refused"
            )
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def _unwrap(self, found: Any) -> Any:
        """Follow "state_dict" inwards, keeping plain values on the way as metadata."""
        for _ in range(MAX_STATE_DICTS):
            if not (isinstance(found, dict) and isinstance(found.get("state_dict"), dict)):
                break
            beside = []
            for key, value in found.items():
                if key == "state_dict":
                    continue
                if isinstance(value, str | int | float | bool):
                    self.metadata[shown(key, 60)] = shown(value)
                else:
                    beside.append(shown(key, 60))
            if beside:
                self.notes.append(f"training state beside the weights is left out: {', '.join(beside[:8])}")
            found = found["state_dict"]
        return found

    def _flatten(self, state: Any, prefix: str) -> None:
        if not isinstance(state, dict):
            return
        for key, value in state.items():
            name = f"{prefix}{key}"
            if isinstance(value, Tensor):
                check_name(self.path, name)
                if name in self._tensors:
                    raise FormatError(f"'{shown(self.path)}' is malformed: '{shown(name)}' stands twice")
                self._tensors[name] = value.detach()
            elif isinstance(value, dict):
                self._flatten(value, f"{name}.")
            elif isinstance(value, str | int | float | bool):
                self.metadata[shown(name, 60)] = shown(value)

    def read(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """Hand over one tensor as memory of its own; two names may share a storage in the file."""
        values = self._tensors[name]
        if values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes:
            return values
        return values.clone(memory_format=torch.contiguous_format)

    def lend(self, name: str) -> Tensor | None:
        """Give None: values are in memory already."""

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors = {}


def _described(found: Any) -> str:
    if isinstance(found, dict):
        return "a dict with " + (
            ", ".join(f"'{shown(key, 30)}'" for key in list(found)[:3]) or "nothing in it"
        )
    return f"it is a {type(found).__name__}"
