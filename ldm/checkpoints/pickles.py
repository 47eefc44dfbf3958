"""Files of torch.save, taken as hostile: a zip, or the format before torch 1.6, around a pickle and the values.

What the file holds is known from its pickle (see unpickle.py); values are read when `read` is called, and a zip's
are checked against their checksum then. There is no way to switch this off. A file that is refused here has to be
converted elsewhere, by somebody who trusts it.
"""

import contextlib
import io
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.checkpoints import families
from ldm.checkpoints.open_file import OpenFile
from ldm.checkpoints.report import TensorInfo
from ldm.checkpoints.safe import MAX_TENSORS, check_memory, check_name
from ldm.checkpoints.unpickle import Placeholder, Storage, StoredTensor, Unpickler
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError, escaped

MAX_PICKLE = 64 << 20  # bytes of data.pkl; Stable Diffusion v1 with its optimizer needs under 1 MB
MAX_TABLE = 16 << 20  # bytes of a zip's table of contents; 20,000 entries take 2
# A tool that packs a checkpoint anew compresses values by a few per cent, the pickle tenfold; a bomb, a thousandfold.
MAX_UNPACKED = 16  # times the file's size,
FREELY_UNPACKED = 16 << 20  # or these bytes
PIECE = 1 << 20
MAX_DEPTH = 16
MAX_ENTRIES = 50_000  # of the dicts around tensors, counted as often as they are shown
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# What trainers call the one dict that is the model's.
WRAPPERS = {
    *(
        "state_dict",
        "model",
        "model_state_dict",
        "model_state",
        "module",
        "net",
        "network",
        "params",
        "weights",
    ),
    *(
        "ema",
        "ema_state_dict",
        "state_dict_ema",
        "model_ema",
        "ema_model",
        "params_ema",
        "module_ema",
        "g_ema",
    ),
}
TRAINING = re.compile(
    r"(optim|opt_|lr_|sched|callback|loop|amp|grad|rng).*|opt|.*(optimizers?|scheduler|scaler)"
)


class Values(Protocol):
    """Where the values of a pickle's tensors lie."""

    def hold(self, storage: Storage) -> None:
        """Raise FormatError unless the file has these bytes."""

    def read(self, storage: Storage, view: memoryview) -> None:
        """Read a storage's bytes."""


@contextlib.contextmanager
def _damage_named(handle: OpenFile) -> Iterator[None]:
    """zipfile and zlib raise a dozen kinds of errors for a damaged file; give them one."""
    try:
        yield
    except (LdmError, MemoryError):
        raise
    except Exception as error:
        raise FormatError(
            f"'{escaped(handle.path)}' is incomplete or damaged ({handle.size} bytes; {type(error).__name__}); "
            "download it again"
        ) from error


class _Bounded:
    """The file as zipfile sees it: which reads tables of whatever length the file states, here with a bound."""

    def __init__(self, handle: OpenFile):
        self.seek, self.tell, self.handle = handle.file.seek, handle.file.tell, handle

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.handle.size - self.tell())
        count = left if count < 0 else min(count, left)
        if count > MAX_TABLE:
            raise UnsafeFileError(
                f"'{escaped(self.handle.path)}' states a zip table of {count} bytes; more than {MAX_TABLE} are refused"
            )
        return self.handle.file.read(count)


class ZipValues:
    """The zip that torch.save has written since torch 1.6, or that a tool has packed anew."""

    def __init__(self, handle: OpenFile):
        self.handle, self.path = handle, escaped(handle.path)
        with _damage_named(handle):
            try:
                self.archive = zipfile.ZipFile(_Bounded(handle))
            except zipfile.BadZipFile as error:
                raise FormatError(
                    f"'{self.path}' is an incomplete zip of {handle.size} bytes: the table at its end is missing; "
                    "download it again"
                ) from error
            self._check_entries()
            self.entries = {entry.filename: entry for entry in self.archive.infolist()}
            self.pickle = self._find_pickle()
            self.folder = self.pickle.filename.removesuffix("data.pkl")
            self._check_byte_order()

    def _check_entries(self) -> None:
        """Check what zipfile leaves open: plain names, each once, honest sizes."""
        entries = self.archive.infolist()
        if len(entries) > MAX_TENSORS:
            raise UnsafeFileError(
                f"'{self.path}' has {len(entries)} zip entries; more than {MAX_TENSORS} are refused"
            )
        if len({entry.filename.casefold() for entry in entries}) != len(entries):
            raise FormatError(f"'{self.path}' is a malformed zip: an entry stands twice; download it again")
        for entry in entries:
            name = entry.filename
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnsafeFileError(
                    f"'{self.path}': zip entry '{escaped(name, 60)}' is compressed by method {entry.compress_type}, "
                    "which torch.save never does; unpack it and pack it again with `zip -0`"
                )
            folder = name.endswith("/")  # some tools note folders, too
            parts = name.removesuffix("/").split("/")
            if (
                entry.flag_bits & 1  # encrypted
                or (
                    entry.file_size if folder else entry.external_attr & 0x10
                )  # a file that is said to be a folder
                or entry.compress_type == zipfile.ZIP_STORED
                and entry.file_size != entry.compress_size
                or "\\" in name
                or not name.isprintable()
                or any(part in ("", "..") for part in parts)
                or entry.orig_filename != name
            ):
                raise FormatError(
                    f"'{self.path}' is a malformed zip: entry '{escaped(name)}'; download it again"
                )
        packed = sum(entry.compress_size for entry in entries)
        self.nbytes = sum(entry.file_size for entry in entries)
        if packed > self.handle.size:
            raise UnsafeFileError(
                f"'{self.path}': the zip's entries claim more bytes than the file's {self.handle.size}"
            )
        if self.nbytes > max(FREELY_UNPACKED, MAX_UNPACKED * self.handle.size):
            raise UnsafeFileError(
                f"'{self.path}' would unpack to {self.nbytes} bytes, more than {MAX_UNPACKED} times its "
                f"{self.handle.size}; refused"
            )

    def _find_pickle(self) -> zipfile.ZipInfo:
        found = [entry for name, entry in self.entries.items() if name.split("/")[-1] == "data.pkl"]
        if len(found) != 1:
            raise FormatError(
                f"'{self.path}' is a zip with {len(found)} data.pkl; a checkpoint has exactly one"
            )
        if found[0].file_size > MAX_PICKLE:
            raise UnsafeFileError(
                f"'{self.path}': data.pkl of {found[0].file_size} bytes; more than {MAX_PICKLE} are refused"
            )
        return found[0]

    def _check_byte_order(self) -> None:
        entry = self.entries.get(f"{self.folder}byteorder")
        if entry is not None and (entry.file_size != 6 or self.archive.read(entry) != b"little"):
            raise MismatchError(f"'{self.path}' was written on a big-endian machine, which is not supported")

    def load(self) -> Any:
        """Run the pickle; its checksum holds or this raises FormatError."""
        data = bytearray(self.pickle.file_size)
        self._fill(self.pickle, memoryview(data))
        return Unpickler(self.path, self.hold).load(io.BytesIO(data))

    def hold(self, storage: Storage) -> None:
        entry = self.entries.get(f"{self.folder}data/{storage.key}")
        if storage.nbytes != (entry.file_size if entry else 0):
            raise FormatError(
                f"'{self.path}' is incomplete or damaged: the values of '{escaped(storage.key, 40)}' should have "
                f"{storage.nbytes} bytes; download it again"
            )

    def read(self, storage: Storage, view: memoryview) -> None:
        if entry := self.entries.get(f"{self.folder}data/{storage.key}"):
            self._fill(entry, view)

    def _fill(self, entry: zipfile.ZipInfo, view: memoryview) -> None:
        """Unpack an entry; zipfile compares its checksum at the end."""
        filled = 0
        with _damage_named(self.handle), self.archive.open(entry) as body:
            while part := body.read(PIECE):
                view[filled : filled + len(part)] = part
                filled += len(part)
            if filled != len(view):
                raise EOFError


class LegacyValues:
    """The format before torch 1.6: five pickles, then each storage as a count and its values; without checksums."""

    def __init__(self, handle: OpenFile):
        self.handle, self.path, self.nbytes = handle, escaped(handle.path), handle.size
        self.sizes: dict[str, Storage] = {}
        self.starts: dict[str, int] = {}

    def load(self) -> Any:
        """Run the pickles, and find where the values of each storage begin."""
        self.handle.file.seek(0)
        stream = io.BytesIO(self.handle.file.read(min(self.handle.size, MAX_PICKLE)))
        machine = Unpickler(self.path, self.hold)
        if machine.load(stream) != LEGACY_MAGIC:
            raise FormatError(f"'{self.path}' is a pickle, but not one that torch.save wrote")
        with _damage_named(self.handle):
            if machine.load(stream) != LEGACY_PROTOCOL:
                raise ValueError("another format")
            if machine.load(stream)["little_endian"] is not True:
                raise MismatchError(
                    f"'{self.path}' was written on a big-endian machine, which is not supported"
                )
            found = machine.load(stream)
            keys = machine.load(stream)
            position = stream.tell()
            if sorted(keys) != sorted(self.sizes):
                raise ValueError("values for other names")
            for key in keys:
                storage = self.sizes[key]
                self.handle.file.seek(position)
                count = int.from_bytes(self.handle.file.read(8), "little")
                if count * storage.dtype.itemsize != storage.nbytes:
                    raise ValueError("another number of values")
                self.starts[key] = position + 8
                position += 8 + storage.nbytes
        if position > self.handle.size:
            raise FormatError(
                f"'{self.path}' is incomplete: {self.handle.size} of {position} bytes; download it again"
            )
        return found

    def hold(self, storage: Storage) -> None:
        if self.sizes.setdefault(storage.key, storage) != storage:
            raise FormatError(f"'{self.path}' is malformed: '{escaped(storage.key, 40)}' has two sizes")

    def read(self, storage: Storage, view: memoryview) -> None:
        with _damage_named(self.handle):
            self.handle.read_into(view, self.starts[storage.key])


def _open(handle: OpenFile, kind: str) -> tuple[Any, "Values", "_Measured"]:
    values = ZipValues(handle) if kind == "zip" else LegacyValues(handle)
    found = values.load()
    return found, values, _Measured(found, escaped(handle.path), values.nbytes)


class _Measured:
    """How much lies in the tree of what was unpickled, seen before anything walks it path by path.

    A pickle can show one part many times, so that few bytes make a tree of more paths than there are atoms; here
    every part is looked at once.

    Attributes:
        tensors: id of a dict -> how many tensors lie in it and the dicts in it.
        nbytes: of all tensors.

    Raises:
        FormatError: a part holds itself. UnsafeFileError: too deep, or more data than the file can hold.
    """

    def __init__(self, found: Any, path: str, size: int):
        self.tensors: dict[int, int] = {}
        height: dict[int, int] = {}
        open_now: set[int] = set()
        counted: set[int] = set()
        total = 0
        stack = [(part, False) for part in _parts_of([found])]
        while stack:
            value, done = stack.pop()
            if done:
                height[id(value)] = 1 + max((height.get(id(part), 0) for part in _parts_of(value)), default=0)
                open_now.remove(id(value))
                if isinstance(value, dict):
                    self.tensors[id(value)] = sum(map(self.within, value.values()))
            elif isinstance(value, StoredTensor):
                total += value.nbytes if id(value) not in counted else 0
                counted.add(id(value))
            elif id(value) not in height:
                if id(value) in open_now:
                    raise FormatError(f"'{path}' is malformed: something in it holds itself")
                open_now.add(id(value))
                stack.append((value, True))
                stack += [(part, False) for part in _parts_of(value)]
            # The way to here, and the longest one on from here, which may have been seen from a shorter one before.
            if len(open_now) + height.get(id(value), 0) > MAX_DEPTH:
                raise UnsafeFileError(
                    f"'{path}' is nested too deep: more than {MAX_DEPTH} levels are refused"
                )
        self.nbytes = total
        if total > 2 * size:
            raise UnsafeFileError(f"'{path}': tensors of {total} bytes out of a file of {size}; refused")

    def within(self, value: Any) -> int:
        """How many tensors lie in a value, dict in dict."""
        return 1 if isinstance(value, StoredTensor) else self.tensors.get(id(value), 0)


def _parts_of(value: Any) -> list[Any]:
    """What of a container is a container or tensor; keys, and what sets hold, are plain: see Unpickler.key."""
    if isinstance(value, set):
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [part for part in parts if isinstance(part, dict | list | tuple | set | StoredTensor)]


def load_object(handle: OpenFile, kind: str) -> Any:
    """Read an open file of torch.save as it was nested: dicts, lists, tuples, sets, numbers, texts and tensors.

    Args:
        handle: the open file; it is read through this handle only.
        kind: "zip", or "pickle" for the format before torch 1.6.

    Raises:
        FormatError: truncated or damaged; for a zip, every bit is covered by a checksum.
        UnsafeFileError: it names code, or is built to exhaust memory.
        MismatchError: it holds tensors of a kind that is not supported.
    """
    found, values, measured = _open(handle, kind)
    check_memory(handle.path, measured.nbytes)
    made: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        """Replace the descriptions of tensors by tensors; the tree's depth is bounded by now."""
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, StoredTensor):
            done: Any = _tensor(_body(values, value.storage), value)
        elif isinstance(value, dict):
            done = {key: plain(part) for key, part in value.items()}
        elif isinstance(value, list | tuple):
            done = type(value)(plain(part) for part in value)
        else:
            return value
        made[id(value)] = done
        return done

    found = plain(found)
    handle.check_unchanged()
    return found


def _body(values: Values, storage: Storage, scratch: Tensor | None = None) -> Tensor:
    if scratch is None or scratch.numel() < storage.nbytes:
        scratch = torch.empty(storage.nbytes, dtype=torch.uint8)
    body = scratch[: storage.nbytes]
    values.read(storage, memoryview(body.numpy()))
    return body


def _tensor(body: Tensor, stored: StoredTensor) -> Tensor:
    """Cut a tensor out of its storage's bytes; contiguous, in memory of its own unless it is all of them."""
    if not stored.numel:
        return torch.empty(stored.shape, dtype=stored.dtype)
    held = torch.uint8 if stored.dtype is torch.bool else stored.dtype
    values = body.view(held).as_strided(stored.shape, stored.stride, stored.offset)
    if stored.dtype is torch.bool:
        return values.ne(0).contiguous()
    if values.is_contiguous() and values.nbytes == body.nbytes:
        return values
    return values.clone(memory_format=torch.contiguous_format)


class PickleWeights:
    """The tensors of a pickled checkpoint, whatever it wraps them in; the rest is named and left out."""

    def __init__(self, handle: OpenFile, kind: str):
        self.path = handle.path
        self.kind = "zip pickle" if kind == "zip" else "legacy pickle"
        self.notes: list[str] = []
        self.metadata: dict[str, str] = {}
        self._handle = handle
        self._reading = threading.Lock()  # zipfile counts its open entries without one
        found, self._values, self._measured = _open(handle, kind)
        if kind != "zip":
            self.notes.append("a pickle from before torch 1.6 carries no checksums; damage can go unseen")
        self._left_out: list[str] = []
        self._tensors = self._choose(found)
        if not self._tensors and self._measured.nbytes:
            # A hypernetwork has its layers in lists; aesthetic gradients are one tensor.
            self._left_out, self.metadata = [], {}
            whole = {families.ALONE: found} if isinstance(found, StoredTensor) else found
            self._tensors = self._flat(whole, noting=True, lists=True)
        if self._left_out:
            self.notes.append(f"left out, beside the weights: {_listed(self._left_out)}")
        if not self._tensors:
            raise MismatchError(f"'{escaped(self.path)}' holds no weights: {_described(found)}")
        self.infos = {name: TensorInfo(t.shape, t.dtype) for name, t in self._tensors.items()}
        uses = Counter(stored.storage for stored in self._tensors.values())
        self._shared: dict[Storage, Tensor | None] = {key: None for key, count in uses.items() if count > 1}

    def _choose(self, found: Any) -> dict[str, StoredTensor]:
        """Find the one set of weights in what trainers wrap around it, beside it and into it.

        A dict's own tensors, with those of parts under names of their own, are one candidate; what lies under each
        of the usual words for a model is another. The one with at least twice the tensors of the others is taken;
        copies of it do not count; and no guess is made between two that are alike.
        """
        while isinstance(found, dict):
            inner = {key: value for key, value in found.items() if self._wraps(key, value)}
            rest = {key: value for key, value in found.items() if key not in inner}
            counts = {key: self._measured.within(value) for key, value in inner.items()}
            counts[""] = sum(
                self._measured.within(value)
                for key, value in rest.items()
                if isinstance(value, StoredTensor) or not TRAINING.fullmatch(str(key).lower())
            )
            best = max(counts, key=lambda key: (counts[key], not key))
            rivals = [key for key in counts if key != best and 2 * counts[key] > counts[best]]
            for key in rivals:
                if self._flat(inner.get(key, rest)) != self._flat(inner.get(best, rest)):
                    one, other = sorted((best, key), reverse=True)
                    raise MismatchError(
                        f"'{escaped(self.path)}' holds weights twice: {counts[one]} tensors under "
                        f"'{escaped(one, 40)}' and "
                        f"{counts[other]} {_place(other)}; save the set you want as a file of its own"
                    )
            self._note(inner if best == "" else {key: v for key, v in found.items() if key != best})
            if best == "":
                return self._flat(rest, noting=True)
            found = inner[best]
        return {}

    def _wraps(self, key: Any, value: Any) -> bool:
        """Tell a wrapper from a part: CompVis's own names begin with "model.diffusion_model." """
        if not (isinstance(key, str) and key in WRAPPERS and isinstance(value, dict)):
            return False
        return not any(isinstance(name, str) and name.startswith("diffusion_model") for name in value)

    def _note(self, beside: dict[Any, Any], prefix: str = "") -> None:
        """Keep plain values as metadata; name everything else."""
        for key, value in beside.items():
            name = escaped(f"{prefix}{escaped(key, 60)}", 60)
            if isinstance(value, str | int | float | bool):
                self.metadata[name] = escaped(value)
            elif isinstance(value, Placeholder):
                self._left_out.append(f"{name} ({value.name})")
            elif count := self._measured.within(value):
                self._left_out.append(f"{name} ({count} tensors)" if count > 1 else f"{name} (a tensor)")
            elif value is not None:
                self._left_out.append(name)

    def _flat(self, part: Any, noting: bool = False, lists: bool = False) -> dict[str, StoredTensor]:
        """Name the tensors of dicts in dicts with dots; with `lists`, those in lists by their numbers, too."""
        tensors: dict[str, StoredTensor] = {}
        containers = (dict, list, tuple) if lists else (dict,)
        entries = 0

        def walk(part: Any, prefix: str) -> None:
            nonlocal entries
            entries += len(part)
            if entries > MAX_ENTRIES:
                raise UnsafeFileError(
                    f"'{escaped(self.path)}' shows more than {MAX_ENTRIES} entries; refused"
                )
            other = {}
            for key, value in part.items() if isinstance(part, dict) else enumerate(part):
                if not (self._measured.within(value) or (lists and isinstance(value, containers))):
                    other[key] = value
                    continue
                name = f"{prefix}{key}"
                check_name(self.path, name)
                if isinstance(value, containers):
                    walk(value, f"{name}.")
                elif name in tensors:
                    raise FormatError(f"'{escaped(self.path)}' is malformed: '{escaped(name)}' stands twice")
                else:
                    tensors[name] = value
            if len(tensors) > MAX_TENSORS:
                raise UnsafeFileError(
                    f"'{escaped(self.path)}' lists more than {MAX_TENSORS} tensors; refused"
                )
            if noting:
                self._note(other, prefix)

        if isinstance(part, containers):
            walk(part, "")
        return tensors

    def read(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """Read one tensor into memory of its own, or into the scratch buffer given, until the next read into it.

        Raises:
            FormatError: its values are damaged, or the file was cut meanwhile.
        """
        stored = self._tensors[name]
        with self._reading:
            if stored.storage not in self._shared:
                return _tensor(_body(self._values, stored.storage, scratch), stored)
            if (
                self._shared[stored.storage] is None
            ):  # once for all that show it, or many views would mean many readings
                self._shared[stored.storage] = _body(self._values, stored.storage)
            values = _tensor(self._shared[stored.storage], stored)
            return values.clone() if values.nbytes == stored.storage.nbytes else values

    def close(self) -> None:
        """Close the file.

        Raises:
            FormatError: it was rewritten since it was opened.
        """
        self._shared = {}
        if not self._handle.file.closed:
            try:
                self._handle.check_unchanged()
            finally:
                self._handle.file.close()


def _place(key: str) -> str:
    return f"under '{escaped(key, 40)}'" if key else "beside it"


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _described(found: Any) -> str:
    if isinstance(found, dict):
        return "a dict with " + (
            ", ".join(f"'{escaped(key, 30)}'" for key in list(found)[:3]) or "nothing in it"
        )
    return f"it is {found}" if isinstance(found, Placeholder) else f"it is a {type(found).__name__}"
