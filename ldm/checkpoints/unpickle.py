"""The one reader of pickles: a stack machine that imports nothing, calls nothing of a file, and makes plain data.

A pickle is a program. Python's own unpickler imports the names that it says and calls what it found; torch's does so
from a list. Here a name stays a word. What may be "called" is a table of a few functions below that give plain dicts,
tuples, bytes and descriptions of tensors; some other names are known to be harmless, and whatever is made of them is
an empty placeholder. Every other name is refused before anything is made of it. So there is nothing to switch off.

The work is bounded in steps, for a file can ask for much in few bytes: see `Unpickler.spend`.
"""

import gc
import io
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ldm.checkpoints.report import TensorInfo
from ldm.checkpoints.safe import MAX_RANK
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError, escaped

MAX_STEPS = 1_000_000  # about a second; Stable Diffusion v1 with its optimizer needs under 200,000
MAX_BITS = 1024  # of a whole number; random generators keep 128
MAX_NAME = 300  # characters
MAX_ARGUMENTS = 8
MAX_KEY = 2**61 - 1  # Python's hash of whole numbers is modulo this: from here on they can be made to collide
# What a step may cost beyond itself. A list is 56 bytes, a set 216; numbers, and tuples all the more, can be chosen
# so that they meet in a dict, which takes time with the square of their number.
LIST_STEPS, SET_STEPS, NUMBER_STEPS, TUPLE_STEPS = 1, 3, 30, 1000
BYTES_A_STEP = 32

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
DENSE = {*STORAGES.values(), *EIGHT_BITS}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# Names that are words in a pickle of tensors, but nothing that may be called.
WORDS = {*STORAGES, "torch.Tensor", "torch.storage.TypedStorage"}
# Tensors of other kinds, and what they are made of.
UNSUPPORTED = re.compile(r"torch\._utils\._rebuild_\w+|torch\.(Complex|Q)\w+Storage|builtins\.complex")
# Names of data that checkpoints carry beside their weights. Nothing is imported for them and nothing is kept, so
# neither Lightning nor NumPy is needed, or run. Of whole packages only what is spelt like a class.
HARMLESS = re.compile(
    r"""(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf|typing)\.(\w+\.)*_*[A-Z]\w*
    |numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|_?core\.numeric\._frombuffer|dtype|ndarray
        |(bool|u?int|float|complex|str|bytes|void|datetime|timedelta)\d*_?|dtypes\.\w+DType
        |random\._pickle\.__\w+_ctor|random\.(_\w+\.)?(Generator|RandomState|MT19937|PCG64|PCG64DXSM|Philox|SFC64)
        |random\.bit_generator\.(SeedSequence|__pyx_unpickle_SeedSequence))
    |builtins\.(object|dict|list|int|float|str|bool|tuple|slice|range)|copyreg\._reconstructor
    |argparse\.Namespace|types\.SimpleNamespace|collections\.deque|time\.struct_time
    |pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    |datetime\.(datetime|date|time|timedelta|timezone)|zoneinfo\.ZoneInfo(\._unpickle)?
    |decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)|enum\.(Enum|IntEnum|StrEnum|Flag|IntFlag)""",
    re.VERBOSE,
)


class Name:
    """A name that a pickle says: a word, never what it stands for elsewhere."""

    __slots__ = ("text",)

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


class Placeholder:
    """What an object that a checkpoint carries beside its weights becomes: its name, nothing else."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return f"a {self.name}"


class ParameterDict(dict):
    """What a torch.nn.ParameterDict is here: its entries, which its pickle has as the state of an object."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in the file, and what a tensor takes it for."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorInfo):
    """Where a tensor's values lie: offset and stride count values of dtype."""

    storage: Storage
    offset: int
    stride: tuple[int, ...]


class Unpickler:
    """Read the pickles of one file.

    Args:
        path: of the file, as it stands in messages.
        hold: called with each storage that is named; raises an error if the file has no such bytes.
    """

    def __init__(self, path: str, hold: Callable[[Storage], None]):
        self.path = path
        self.hold = hold
        self.steps = 0
        self.names: dict[str, Name] = {}

    def load(self, stream: io.BytesIO) -> Any:
        """Read one pickle from where the stream stands; tensors come as StoredTensor.

        Raises:
            FormatError: it is incomplete or malformed.
            UnsafeFileError: it names code, or asks for too much.
            MismatchError: it holds tensors of a kind that is not supported.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        collecting = gc.isenabled()
        gc.disable()  # it would go over all that was made again and again, for more time than the making takes
        try:
            for op, argument, _ in pickletools.genops(stream):
                self.steps += 1
                if self.steps > MAX_STEPS:
                    self.spend(0)
                OPS[op.name](self, argument)
            return self.stack.pop()
        except (LdmError, MemoryError):
            raise
        except Exception as error:  # a malformed program breaks off in a dozen ways
            raise FormatError(
                f"'{self.path}' is incomplete or damaged: its pickle breaks off; download it again"
            ) from error
        finally:
            if collecting:
                gc.enable()

    def spend(self, steps: int) -> None:
        """Count work against the budget."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise UnsafeFileError(f"'{self.path}' holds a pickle of more than {MAX_STEPS} steps; refused")

    def push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > MAX_BITS:
            raise FormatError(
                f"'{self.path}' is malformed: a whole number of {value.bit_length()} bits in its pickle"
            )
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Pop what was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def put(self, index: int) -> None:
        if not 0 <= index <= self.steps:  # pickles number what they keep one after the other
            raise ValueError("a memo out of order")
        self.memo[index] = self.stack[-1]

    # --- names and calls ---

    def name(self, module: Any, name: Any) -> None:
        """Push a name, under the spelling of today, or refuse it."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
            raise self.code(f"{escaped(module, 40)}.{escaped(name, 40)}")
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        text = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if text not in self.names:
            if text in DTYPES:
                self.stack.append(DTYPES[text])
                return
            if text not in CALLS and text not in WORDS and not HARMLESS.fullmatch(text):
                if UNSUPPORTED.fullmatch(text):
                    raise self.unsupported(text)
                raise self.code(text)
            self.names[text] = Name(text)
        self.stack.append(self.names[text])

    def call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """Push what a name stands for when called with arguments: plain data, or a placeholder."""
        if type(function) is not Name or type(arguments) is not tuple:
            raise TypeError("no call")
        if function.text in CALLS:
            if len(arguments) > MAX_ARGUMENTS:  # each call copies them
                raise TypeError("too many arguments")
            self.stack.append(CALLS[function.text](self, *arguments))
        elif HARMLESS.fullmatch(function.text):
            self.stack.append(Placeholder(function.text))
        else:
            raise self.code(function.text)

    def code(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"'{self.path}' is refused: it contains code, '{escaped(what, 80)}'; weights alone need none, "
            "get a .safetensors version"
        )

    def unsupported(self, what: str) -> MismatchError:
        return MismatchError(
            f"'{self.path}' holds tensors of an unsupported kind ({escaped(what, 60)}); only plain dense ones load"
        )

    # --- containers ---

    def set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is Placeholder:
            return
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def append(self, target: Any, items: list[Any]) -> None:
        if type(target) is Placeholder:
            return
        if type(target) is not list:
            raise TypeError("items for what is no list")
        target.extend(items)

    def add(self, target: Any, items: list[Any]) -> None:
        if type(target) is Placeholder:
            return
        if type(target) is not set:
            raise TypeError("items for what is no set")
        target.update(map(self.key, items))

    def build(self) -> None:
        """Drop an object's state, for what is kept of objects has none; but a ParameterDict's is its entries."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is ParameterDict and type(state) is dict:
            entries = state.get("_parameters")
            if type(entries) is dict:
                self.spend(len(entries))
                target.update(entries)
        elif type(target) not in (Placeholder, dict, StoredTensor):
            raise TypeError("a state for what has none")

    def key(self, value: Any) -> Any:
        """Check a key of a dict or a value of a set: nothing whose hash could be made to cost much."""
        kind = type(value)
        if kind is tuple:
            self.spend(TUPLE_STEPS)
            for part in value:
                if type(part) is tuple:
                    raise TypeError("a nested key")
                self.key(part)
        elif kind in (int, float):
            self.spend(NUMBER_STEPS)
            if kind is int and abs(value) >= MAX_KEY:
                raise ValueError("a huge key")
        elif kind not in (str, bytes, bool, type(None), Name, Placeholder, torch.dtype):
            raise TypeError("an odd key")
        return value

    # --- what may be called ---

    def ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        self.spend(len(pairs))
        found: dict[Any, Any] = {}
        self.set_items(found, [part for key, value in pairs for part in (key, value)])
        return found

    def counter(self, counts: Any = ()) -> dict[Any, Any]:
        return self.ordered_dict(counts.items() if type(counts) is dict else counts)

    def set(self, items: Any = ()) -> set[Any]:
        self.spend(len(items) + SET_STEPS)
        return {self.key(item) for item in items}

    def new(self, value: Any, steps: int) -> None:
        """Push an empty container."""
        self.spend(steps)
        self.stack.append(value)

    def encode(self, text: str, codec: str = "utf-8") -> bytes:
        """Give the bytes that a pickle of protocol 2 spells as text; honest ones do so in Latin-1 alone."""
        if codec not in ("latin1", "latin-1"):
            raise self.code(f"_codecs.encode in {escaped(codec, 30)}")
        self.spend(len(text) // BYTES_A_STEP)
        return text.encode("latin-1")

    def bytes(self, value: Any = b"", codec: Any = None) -> bytes:
        """Give the bytes of a bytearray, never one of a size that the file asks for."""
        if type(value) is str:
            return self.encode(value, codec)
        if type(value) is not bytes:
            raise self.code("builtins.bytearray")
        return value

    def storage(self, identity: Any) -> Storage:
        """Understand the name of a storage: ("storage", kind, key, location, values[, view])."""
        word, kind, key, _location, count, *view = identity[:MAX_ARGUMENTS]
        if word != "storage" or type(kind) is not Name or type(key) is not str or type(count) is not int:
            raise TypeError("no storage")
        if any(part is not None for part in view):
            raise self.unsupported("a view of a storage, from before torch 0.4")
        if kind.text not in STORAGES or count < 0:
            raise TypeError("no storage")
        dtype = STORAGES[kind.text]
        found = Storage(key, dtype, count * dtype.itemsize)
        self.hold(found)
        return found

    def tensor(
        self,
        storage: Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        _requires_grad: Any = False,
        _hooks: Any = None,
        metadata: Any = None,
        dtype: torch.dtype | None = None,
    ) -> StoredTensor:
        """Describe a tensor, checked against its storage: it may neither leave nor repeat it."""
        dtype = dtype or storage.dtype
        if dtype not in DENSE:
            raise self.unsupported(dtype)
        if metadata:
            raise self.unsupported("with a flag for conjugate or negative")
        if len(shape) > MAX_RANK:
            raise FormatError(
                f"'{self.path}' is malformed: a tensor of {len(shape)} dimensions, more than {MAX_RANK}"
            )
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError("no shape")
        found = StoredTensor(tuple(shape), dtype, storage, offset, tuple(stride))
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if found.numel and (last + 1) * dtype.itemsize > storage.nbytes:
            raise ValueError("a tensor beyond its storage")
        if found.nbytes > storage.nbytes:  # it repeats it
            raise UnsafeFileError(
                f"'{self.path}': a tensor {list(shape)} is larger than its {storage.nbytes} bytes of data"
            )
        return found

    def tensor_v3(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        *more: Any,
    ) -> StoredTensor:
        return self.tensor(storage, offset, shape, stride, grad, hooks, *more, dtype=dtype)

    def parameter(self, data: StoredTensor, *_: Any) -> StoredTensor:
        if type(data) is not StoredTensor:
            raise TypeError("a parameter without values")
        return data

    def from_type(self, function: Name, kind: Name, arguments: tuple[Any, ...], _state: Any) -> Any:
        """A plain tensor, or a parameter, that carries Python attributes; other classes have code of their own."""
        if kind.text not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            raise self.unsupported(kind)
        if not function.text.startswith("torch._utils._rebuild_"):
            raise self.code(function.text)
        self.call(function, arguments)
        return self.stack.pop()

    def size(self, sizes: Any = ()) -> tuple[Any, ...]:
        self.spend(len(sizes))
        return tuple(sizes)

    def device(self, kind: str, *index: int) -> str:
        return ":".join(escaped(part, 20) for part in (kind, *index))

    def text(self, value: str) -> str:
        return value


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Unpickler.ordered_dict,
    "collections.Counter": Unpickler.counter,
    "collections.defaultdict": lambda self, *_: {},
    "torch.nn.modules.container.ParameterDict": lambda self, *_: ParameterDict(),
    "builtins.bytes": lambda self: b"",
    "builtins.bytearray": Unpickler.bytes,
    "builtins.set": Unpickler.set,
    "builtins.frozenset": Unpickler.set,
    "_codecs.encode": Unpickler.encode,
    "torch._utils._rebuild_tensor": Unpickler.tensor,
    "torch._utils._rebuild_tensor_v2": Unpickler.tensor,
    "torch._utils._rebuild_tensor_v3": Unpickler.tensor_v3,
    "torch._utils._rebuild_parameter": Unpickler.parameter,
    "torch._utils._rebuild_parameter_with_state": Unpickler.parameter,
    "torch._tensor._rebuild_from_type_v2": Unpickler.from_type,
    "torch.nn.parameter.Parameter": Unpickler.parameter,
    "torch.Size": Unpickler.size,
    "torch.device": Unpickler.device,
    "torch.torch_version.TorchVersion": Unpickler.text,
    # Lightning's dict of hyper parameters.
    "pytorch_lightning.utilities.parsing.AttributeDict": lambda self, *_: {},
    "lightning.pytorch.utilities.parsing.AttributeDict": lambda self, *_: {},
}


def _extension(machine: Unpickler, number: Any) -> None:
    raise machine.code(f"extension {number}")


def _outside(machine: Unpickler, _: Any) -> None:
    raise TypeError("a part that lies outside of the pickle")


def _dict(machine: Unpickler, _: Any) -> None:
    items, found = machine.marked(), {}
    machine.set_items(found, items)
    machine.stack.append(found)


def _set_item(machine: Unpickler, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _append(machine: Unpickler, _: Any) -> None:
    value = machine.stack.pop()
    machine.append(machine.stack[-1], [value])


def _append_all(machine: Unpickler, _: Any) -> None:
    items = machine.marked()
    machine.append(machine.stack[-1], items)


def _set_all(machine: Unpickler, _: Any) -> None:
    items = machine.marked()
    machine.set_items(machine.stack[-1], items)


def _add_all(machine: Unpickler, _: Any) -> None:
    items = machine.marked()
    machine.add(machine.stack[-1], items)


def _stack_name(machine: Unpickler, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


def _reduce(machine: Unpickler, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.call(function, arguments)


def _new_with_keywords(machine: Unpickler, _: Any) -> None:
    keywords, arguments, kind = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    if type(kind) is not Name or kind.text in CALLS and keywords:
        raise TypeError("no keywords")
    machine.call(kind, arguments)


def _object(machine: Unpickler, _: Any) -> None:
    kind, *arguments = machine.marked()
    machine.call(kind, tuple(arguments))


def _instance(machine: Unpickler, argument: str) -> None:
    arguments = machine.marked()
    machine.name(*argument.split(" ", 1))
    machine.call(machine.stack.pop(), tuple(arguments))


# What each operation does with its argument, which pickletools has read and checked for length.
OPS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
        "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split(),
        Unpickler.push,
    ),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
    **dict.fromkeys(("PERSID", "NEXT_BUFFER", "READONLY_BUFFER"), _outside),
    "BYTEARRAY8": lambda machine, argument: machine.push(bytes(argument)),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_LIST": lambda machine, _: machine.new([], LIST_STEPS),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.new({}, LIST_STEPS),
    "EMPTY_SET": lambda machine, _: machine.new(set(), SET_STEPS),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.marked() and None,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Unpickler.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])
    ),
    "TUPLE1": lambda machine, _: machine.stack.append((machine.stack.pop(),)),
    "TUPLE2": lambda machine, _: machine.stack.append((machine.stack.pop(), machine.stack.pop())[::-1]),
    "TUPLE3": lambda machine, _: machine.stack.append(
        (machine.stack.pop(), machine.stack.pop(), machine.stack.pop())[::-1]
    ),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.marked())),
    "LIST": lambda machine, _: machine.stack.append(machine.marked()),
    "DICT": _dict,
    "FROZENSET": lambda machine, _: machine.stack.append(machine.set(machine.marked())),
    "APPEND": _append,
    "APPENDS": _append_all,
    "SETITEM": _set_item,
    "SETITEMS": _set_all,
    "ADDITEMS": _add_all,
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "OBJ": _object,
    "INST": _instance,
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.storage(machine.stack.pop())),
}
