"""Hostile files of a given size, and what reading each of them costs, measured in a process of its own.

    python tests/hostile.py FOLDER BYTES

writes them all into a folder, reads one after the other in a forked process under limits, and prints a line of JSON
for each: what was raised, what was run, seconds of processor time, and memory beyond that of a process which does
nothing.
"""

import gc
import gzip
import io
import json
import os
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

HUGE = 100 << 30
COLLIDING = 2**61 - 1  # Python's hashes of whole numbers are modulo this
# What a reader has no business with. Modules that reading needs were imported before.
BANNED = (
    *(
        "exec",
        "compile",
        "import",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.remove",
        "os.rename",
    ),
    *("os.mkdir", "os.truncate", "os.putenv", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
    *(
        "pickle.find_class",
        "marshal.loads",
        "ctypes.dlopen",
        "urllib.Request",
        "shutil.rmtree",
        "code.__new__",
    ),
)


Table = dict[str, tuple[str, Callable[[int], bytes]]]
Row = tuple[str, str, str, Callable[[int], tuple[bytes, int, bytes]]]


# --- pickles: pieces --------------------------------------------------------------------------------------------


def text(word: str) -> bytes:
    body = word.encode()
    return b"X" + struct.pack("<I", len(body)) + body


def long1(value: int) -> bytes:
    body = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(body)]) + body


def zipped(pickle: bytes, values: bytes = b"\0" * 16, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + pickle + b".")
        file.writestr("archive/data/0", values)
    return out.getvalue()


def packed(pickle: bytes) -> bytes:
    return zipped(pickle, method=zipfile.ZIP_DEFLATED)


def storage(count: int) -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + long1(count) + b"tQ"


def tensor(shape: bytes, stride: bytes, count: int = 4) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(count)
        + b"K\0"
        + shape
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


TENSOR = tensor(b"K\x04\x85", b"K\x01\x85")


def repeat(piece: bytes, n: int) -> bytes:
    return piece * max(1, n // len(piece))


def kept(value: bytes, use: bytes, n: int) -> bytes:
    """A list of what is made again and again of one kept value of half the size."""
    return value + b"q\x000](" + repeat(use, n - len(value)) + b"e"


def laughs(open_level: bytes, close_level: bytes, levels: int, leaf: bytes = b"]") -> bytes:
    """Each level shows the one below it many times."""
    body = leaf + b"q\0"
    for _ in range(levels):
        body += open_level + close_level + b"q\0"
    return body


def wide_dicts(n: int) -> bytes:
    """A dict of many plain entries and a tensor, shown by many names."""
    entries = b"".join(text(f"{i:x}") + b"N" for i in range(n // 20))
    names = b"".join(text(f"n{i:x}") + b"h\0" for i in range(n // 20))
    return b"}(" + entries + text("t") + TENSOR + b"uq\0" + b"0}(" + names + b"u"


def deep_dicts(n: int) -> bytes:
    """Fifteen levels of fifty names each, around one tensor."""
    body = b"}" + text("t") + TENSOR + b"sq\0"
    for _ in range(13):
        body += b"0}(" + b"".join(text(f"{i}") + b"h\0" for i in range(50)) + b"uq\0"
    return body


def views(n: int) -> bytes:
    """As many names of one tensor as a file may have, of values that unpack to 16 MB."""
    count = 3_900_000
    one = tensor(b"K\x04\x85", b"K\x01\x85", count)
    names = b"".join(text(f"n{i}") + b"h\1" for i in range(min(n // 12, 19_000)))
    return zipped(b"}(" + text("t") + one + b"q\1" + names + b"u", b"\0" * (4 * count), zipfile.ZIP_DEFLATED)


def names_of_memo(n: int) -> bytes:
    words = n // 40
    keep = b"".join(
        text(f"lightning.{i}") + b"r" + struct.pack("<I", 2 * i) + b"0" for i in range(words // 16)
    )
    keep += b"".join(text(f"A{i}") + b"r" + struct.pack("<I", 2 * i + 1) + b"0" for i in range(words // 16))
    pairs = range(n // 2 // 13)
    side = words // 16
    use = [(2 * (k % side), 2 * (k // side % side) + 1) for k in pairs]
    return keep + b"".join(
        b"j" + struct.pack("<I", a) + b"j" + struct.pack("<I", b) + b"\x93" for a, b in use
    )


REFUSED, BROKEN, OTHER, MEMORY, FINE = (
    "UnsafeFileError",
    "FormatError",
    "MismatchError",
    "ResourceError",
    "none",
)
ENCODE = b"c_codecs\nencode\n"

# name -> (exception that comes, the pickle for n bytes)
PICKLES: Table = {
    **{
        f"codec {codec}": (
            REFUSED,
            lambda n, c=codec: ENCODE + text("\u4e00\u0430" * (n // 5)) + text(c) + b"\x86R",
        )
        for codec in (
            "punycode",
            "idna",
            "utf-7",
            "unicode_escape",
            "utf-8",
            "rot13",
            "hex",
            "Latin1",
            "zlib",
        )
    },
    "codec unsaid": (REFUSED, lambda n: ENCODE + text("a" * n) + b"\x85R"),
    "one text encoded often": (
        REFUSED,
        lambda n: kept(text("a" * 100_000), ENCODE + b"h\0" + text("latin1") + b"\x86R", n + 100_000),
    ),
    "a bytearray of a terabyte": (REFUSED, lambda n: b"cbuiltins\nbytearray\n" + long1(1 << 40) + b"\x85R"),
    "bytes of a terabyte": (BROKEN, lambda n: b"cbuiltins\nbytes\n" + long1(1 << 40) + b"\x85R"),
    "lists that hold lists twice": (REFUSED, lambda n: laughs(b"](", b"h\0h\0e", 60)),
    "tuples that hold tuples twice": (REFUSED, lambda n: laughs(b"", b"h\0\x86", 60)),
    "dicts that hold dicts twice": (REFUSED, lambda n: laughs(b"}(", b"K\1h\0K\2h\0u", 60, b"}")),
    "a key of tuples that hold tuples twice": (
        BROKEN,
        lambda n: b"}" + laughs(b"", b"h\0\x86", 60, b")") + b"Ns",
    ),
    "a tuple as long as the file, nested": (REFUSED, lambda n: b"N" + b"\x85" * n),
    "a list as deep as the file": (REFUSED, lambda n: repeat(b"](", n // 2) + repeat(b"e", n // 4)),
    "a dict that holds itself": (BROKEN, lambda n: b"}q\0" + text("a") + b"h\0s"),
    "a state dict that holds itself": (BROKEN, lambda n: b"}q\0" + text("state_dict") + b"h\0s"),
    "a dict that holds itself in a list": (BROKEN, lambda n: b"}q\0" + text("a") + b"]h\0as"),
    "a list that holds itself": (BROKEN, lambda n: b"]q\0h\0a"),
    "dicts of fifty to the thirteenth": (REFUSED, deep_dicts),
    "a wide dict under many names": (REFUSED, wide_dicts),
    "a long name before many": (
        BROKEN,
        lambda n: (
            b"}"
            + text("a" * (n // 2))
            + b"}("
            + b"".join(text(f"{i:x}") + TENSOR for i in range(n // 600))
            + b"us"
        ),
    ),
    "a long text under many names": (
        OTHER,
        lambda n: (
            text("\u00e9" * (n // 4))
            + b"q\0"
            + b"0}("
            + b"".join(text(f"{i:x}") + b"h\0" for i in range(n // 24))
            + b"u"
        ),
    ),
    "a number of a million digits": (BROKEN, lambda n: b"\x8b" + struct.pack("<i", n) + b"\1" * n),
    "a number of a million digits, spelt": (BROKEN, lambda n: b"I" + b"9" * n + b"\n"),
    "a long number of a million digits, spelt": (BROKEN, lambda n: b"L" + b"9" * n + b"L\n"),
    "a float of a million digits": (OTHER, lambda n: b"F" + b"9" * 200 + b"." + b"9" * n + b"\n"),
    "a negative length": (BROKEN, lambda n: b"\x8b" + struct.pack("<i", -5) + b"\1" * n),
    "numbers that collide in a dict": (
        BROKEN,
        lambda n: b"}(" + b"".join(long1(i * COLLIDING) + b"N" for i in range(1, n // 12)) + b"u",
    ),
    "numbers that collide in a set": (
        BROKEN,
        lambda n: b"\x8f(" + b"".join(long1(i * COLLIDING) for i in range(1, n // 12)) + b"\x90",
    ),
    "numbers that collide in a set that is called": (
        BROKEN,
        lambda n: (
            b"cbuiltins\nset\n](" + b"".join(long1(i * COLLIDING) for i in range(1, n // 12)) + b"e\x85R"
        ),
    ),
    "numbers that collide in a Counter": (
        BROKEN,
        lambda n: (
            b"ccollections\nCounter\n}("
            + b"".join(long1(i * COLLIDING) + b"N" for i in range(1, n // 12))
            + b"u\x85R"
        ),
    ),
    "places of the memo that collide": (
        BROKEN,
        lambda n: b"N" + b"".join(b"p%d\n" % (i * COLLIDING) for i in range(1, n // 24)),
    ),
    "numbers in a dict without end": (
        REFUSED,
        lambda n: b"}(" + b"".join(b"J" + struct.pack("<i", i << 12) + b"N" for i in range(200_000)) + b"u",
    ),
    "tuples in a set without end": (
        REFUSED,
        lambda n: (
            b"\x8f("
            + b"".join(b"M" + struct.pack("<H", i) + b"\x85" for i in range(min(n // 4, 60_000)))
            + b"\x90"
        ),
    ),
    "the last place of the memo": (BROKEN, lambda n: b"Nr\xff\xff\xff\xff"),
    "the last signed place of the memo": (BROKEN, lambda n: b"Nr\xff\xff\xff\x7f"),
    "a text without end": (BROKEN, lambda n: b"X\xff\xff\xff\x7fa"),
    "a long text without end": (BROKEN, lambda n: b"\x8d" + struct.pack("<Q", 1 << 62) + b"a"),
    "bytes without end": (BROKEN, lambda n: b"\x8e" + struct.pack("<Q", 1 << 40) + b"a"),
    "a bytearray without end": (BROKEN, lambda n: b"\x96" + struct.pack("<Q", 1 << 40) + b"a"),
    "a frame without end": (OTHER, lambda n: b"\x95" + struct.pack("<Q", 1 << 62) + b"N"),
    "marks": (OTHER, lambda n: b"N" + b"(" * (n // 2) + b"0" * (n // 2)),
    "lists": (OTHER, lambda n: b"]" * min(n, 400_000)),
    "more lists": (REFUSED, lambda n: b"]" * 950_000),
    "lists with something in them": (OTHER, lambda n: repeat(b"]Na", min(n, 600_000))),
    "dicts": (OTHER, lambda n: b"}" * min(n, 400_000)),
    "dicts with something in them": (OTHER, lambda n: repeat(b"}K\0Ns", n // 10)),
    "sets": (REFUSED, lambda n: b"\x8f" * 950_000),
    "what is kept": (OTHER, lambda n: b"N" + b"\x94" * n),
    "copies": (OTHER, lambda n: b"]" + b"2" * n),
    "floats": (OTHER, lambda n: repeat(b"G@\x09\x21\xfb\x54\x44\x2d\x18", n)),
    "texts": (OTHER, lambda n: repeat(b"\x8c\x03\xf0\x9f\x98"[:2] + b"abc", n)),
    "a dict made from pairs often": (
        REFUSED,
        lambda n: kept(
            b"](" + repeat(b"N\x85" + b"N\x86", n // 2) + b"e", b"ccollections\nOrderedDict\nh\0\x85R", n
        ),
    ),
    "a size made often": (
        REFUSED,
        lambda n: kept(b"](" + b"N" * (n // 2) + b"e", b"ctorch\nSize\nh\0\x85R", n),
    ),
    "a set made often": (
        REFUSED,
        lambda n: kept(b"](" + b"N" * (n // 2) + b"e", b"cbuiltins\nset\nh\0\x85R", n),
    ),
    "many arguments often": (
        BROKEN,
        lambda n: kept(b"(" + b"N" * (n // 2) + b"t", b"ctorch\ndevice\nh\0R", n),
    ),
    "many arguments to a placeholder often": (
        OTHER,
        lambda n: kept(b"(" + b"N" * (n // 2) + b"t", b"ctyping\nAny\nh\0R", n),
    ),
    "a placeholder filled often": (
        OTHER,
        lambda n: kept(b"ctyping\nAny\n)R", b"h\0]a", n),
    ),
    "a tensor of negative size": (BROKEN, lambda n: tensor(b"J\xff\xff\xff\xff\x85", b"K\1\x85")),
    "a tensor of negative stride": (BROKEN, lambda n: tensor(b"K\4\x85", b"J\xff\xff\xff\xff\x85")),
    "a tensor of huge size": (BROKEN, lambda n: tensor(long1(1 << 62) + b"\x85", b"K\1\x85")),
    "a tensor of huge size and no stride": (REFUSED, lambda n: tensor(long1(1 << 40) + b"\x85", b"K\0\x85")),
    "a tensor of a million dimensions": (
        BROKEN,
        lambda n: tensor(b"(" + repeat(b"K\1", n // 2) + b"t", b"(" + repeat(b"K\1", n // 2) + b"t"),
    ),
    "a storage of negative size": (BROKEN, lambda n: storage(-4)),
    "a storage of huge size": (BROKEN, lambda n: storage(1 << 62)),
    "a storage named often": (OTHER, lambda n: repeat(storage(4), n)),
    "a long name of a module often": (
        REFUSED,
        lambda n: kept(text("lightning." + "a." * (n // 4) + "A"), b"h\0" + text("B") + b"\x93", n),
    ),
    "many names": (OTHER, names_of_memo),
    "a name that a search goes back and forth on": (
        REFUSED,
        lambda n: b"clightning." + b"a" * 250 + b".\n" + b"_" * 30 + b"\n",
    ),
    "an extension": (REFUSED, lambda n: b"\x82\1"),
    "INST of code": (REFUSED, lambda n: b"(ios\nsystem\n"),
    "code behind a megabyte": (
        REFUSED,
        lambda n: b"](" + b"N" * n + b"ecposix\nsystem\n" + text("true") + b"\x85R",
    ),
}
PACKED: Table = {
    "lists that unpack": (REFUSED, lambda n: b"]" * 8_000_000),
    "a text that unpacks": (OTHER, lambda n: text("\U0001f600" + "a" * 16_000_000)),
    "more than may unpack": (REFUSED, lambda n: text("a" * 30_000_000)),
}


# --- the containers ---------------------------------------------------------------------------------------------


def legacy(*pickles: bytes, body: bytes = b"") -> bytes:
    head = (long1(0x1950A86A20F9469CFC6C), b"M\xe9\x03", b"}" + text("little_endian") + b"\x88s")
    return b"".join(b"\x80\x02" + pickle + b"." for pickle in (*head, *pickles)) + body


def entries(n: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for i in range(min(20_001, n // 90)):
            file.writestr(f"{i:x}", b"")
    return out.getvalue()


def zip64(where: int) -> bytes:
    """A zip whose table, of a hundred gigabytes, is said to begin at its start."""
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, where - 4, 4)
    return (
        end
        + struct.pack("<4sLQL", b"PK\6\7", 0, where, 1)
        + struct.pack("<4s4H2LH", b"PK\5\6", *(0xFFFF,) * 4, *(0xFFFFFFFF,) * 2, 0)
    )


def safe(header: str, body: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + body


def described(dtype: str = '"F32"', shape: str = "[2]", end: int = 8) -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":[0,{end}]}}'


ENTRY = described()
# What JSON can be made to hold, for a value of it.
JSON: dict[str, Callable[[int], str]] = {
    "a number": lambda n: "9" * n,
    "a negative number": lambda n: "-" + "9" * n,
    "an exponent": lambda n: "1e" + "9" * n,
    "brackets": lambda n: "[" * n,
    "braces": lambda n: '{"a":' * (n // 5),
    "lists": lambda n: "[" + "[]," * (n // 3) + "[]]",
    "dicts": lambda n: "[" + "{}," * (n // 3) + "{}]",
    "a text": lambda n: '"' + "\\ud83d\\ude00" * (n // 12) + '"',
    "texts": lambda n: "[" + '"\u00e9\u00e8",' * (n // 7) + "0]",
    "names": lambda n: "{" + ",".join(f'"{i:x}":0' for i in range(n // 10)) + "}",
}
SAFE: Table = {
    **{
        f"header with {k}": (BROKEN, lambda n, v=v: safe('{"x":' + v(n) + "}"))
        for k, v in JSON.items()
        if k != "dicts"
    },
    "header with dicts": (REFUSED, lambda n: safe('{"x":' + JSON["dicts"](max(n, 100_000)) + "}")),
    "a shape of a million sizes": (
        BROKEN,
        lambda n: safe(f'{{"x":{described(shape="[" + "1," * (n // 2) + "1]")}}}'),
    ),
    "a long dtype": (
        OTHER,
        lambda n: safe(f'{{"x":{described(json.dumps("F" * n))}}}'),
    ),
    "a dtype that is a list": (
        OTHER,
        lambda n: safe(f'{{"x":{described(JSON["lists"](n))}}}'),
    ),
    "a long name": (BROKEN, lambda n: safe(f'{{"{"a" * n}":{ENTRY}}}')),
    "many names": (REFUSED, lambda n: safe("{" + ",".join(f'"{i}":{ENTRY}' for i in range(20_001)) + "}")),
    "a header of all memory": (BROKEN, lambda n: struct.pack("<Q", 1 << 63) + b"{}"),
}


def vocabulary(value: str, merges: str = "[]") -> bytes:
    return f'{{"model":{{"vocab":{value},"merges":{merges}}}}}'.encode()


VOCABULARIES: Table = {
    **{f"vocab with {k}": (BROKEN, lambda n, v=v: vocabulary(v(n))) for k, v in JSON.items()},
    **{f"merges with {k}": (BROKEN, lambda n, v=v: vocabulary("{}", v(n))) for k, v in JSON.items()},
    "merges with spaces": (BROKEN, lambda n: vocabulary("{}", '["' + " " * n + '"]')),
}
MERGES: Table = {
    "spaces": (BROKEN, lambda n: b" " * n),
    "lines": (BROKEN, lambda n: b"\n" * n),
    "one line": (BROKEN, lambda n: b"a" * n),
    "lines that unpack": (BROKEN, lambda n: gzip.compress(b"\n" * 30_000_000)),
    "a few lines that unpack": (BROKEN, lambda n: gzip.compress("\U0001f600".encode() + b"\n" * 7_900_000)),
    "pairs that unpack": (FINE, lambda n: gzip.compress(b"a b\n" * 1_900_000)),
}
FOLDERS: Table = {
    f"JSON with {k}": (BROKEN, lambda n, v=v: ('{"in_channels":' + v(n) + "}").encode())
    for k, v in JSON.items()
}


def as_legacy(name: str) -> Row:
    wanted, make = PICKLES[name]
    return wanted, "both", "a.pt", lambda n: (legacy(make(n), b"]"), 0, b"")


def sparse(wanted: str, reader: str, file: str, body: bytes, size: int = HUGE, end: bytes = b"") -> Row:
    return wanted, reader, file, lambda n: (body, size, end)


BYTES = b"(" + text("storage") + b"ctorch\nByteStorage\n" + text("0") + text("cpu") + long1(HUGE) + b"tQ"
WHOLE = b"ctorch._utils\n_rebuild_tensor\n(" + BYTES + b"K\0" + long1(HUGE) + b"\x85K\1\x85tR"
LEGACY_HEAD = legacy(b"}" + text("a") + WHOLE + b"s", b"]" + text("0") + b"a", body=struct.pack("<Q", HUGE))
SAFE_HEAD = safe(f'{{"x":{described(json.dumps("U8"), f"[{HUGE}]", HUGE)}}}', b"")
ENDLESS = legacy(storage(1 << 40), b"]" + text("0") + b"a", body=struct.pack("<Q", 1 << 40))

# name -> (exception that comes, reader, file, what to write for n bytes: body, size of a sparse file, its end)
OTHERS: dict[str, Row] = {
    "legacy: codec punycode": as_legacy("codec punycode"),
    "legacy: lists that hold lists twice": as_legacy("lists that hold lists twice"),
    "legacy: a dict that holds itself": as_legacy("a dict that holds itself"),
    "legacy: numbers that collide in a dict": as_legacy("numbers that collide in a dict"),
    "legacy: keys without end": (
        *(BROKEN, "both", "a.pt"),
        lambda n: (legacy(b"N", b"](" + repeat(text("a"), n) + b"e"), 0, b""),
    ),
    "legacy: values without end": (BROKEN, "both", "a.pt", lambda n: (ENDLESS, 0, b"")),
    "zip: entries without end": (BROKEN, "both", "a.ckpt", lambda n: (entries(n), 0, b"")),
    "zip: many views of what unpacks": (FINE, "both", "a.ckpt", lambda n: (views(n), 0, b"")),
    "sparse: zip": sparse(BROKEN, "both", "a.ckpt", zipped(b"N")),
    "sparse: zip with a table of all of it": sparse(
        REFUSED, "both", "a.ckpt", b"PK\3\4", HUGE, zip64(HUGE - 98)
    ),
    "sparse: zip under another name": sparse(BROKEN, "both", "a.safetensors", zipped(b"N")),
    "sparse: pickle": sparse(BROKEN, "both", "a.pt", b"\x80\x02"),
    "sparse: text in a pickle": sparse(BROKEN, "both", "a.pt", b"\x80\x02X\xff\xff\xff\xff"),
    "sparse: tensor in a pickle": sparse(MEMORY, "both", "a.pt", LEGACY_HEAD, len(LEGACY_HEAD) + HUGE),
    "sparse: zeros": sparse(BROKEN, "both", "a.ckpt", b""),
    "sparse: safetensors": sparse(MEMORY, "tensors", "a.safetensors", SAFE_HEAD, len(SAFE_HEAD) + HUGE),
    "sparse: header of safetensors": sparse(
        REFUSED, "tensors", "a.safetensors", struct.pack("<Q", 99_000_000) + b"{"
    ),
    "sparse: merges": sparse(BROKEN, "vocabulary", "a.txt", b"a b\n"),
    "sparse: tokenizer.json": sparse(BROKEN, "vocabulary", "tokenizer.json", b"{"),
    "sparse: folder": sparse(BROKEN, "folder", "unet/config.json", b"{"),
}


def all_rows() -> dict[str, Row]:
    """Every hostile file, by name."""

    def plain(
        table: Table, kind: str, reader: str, file: str, wrap: Callable[[bytes], bytes]
    ) -> dict[str, Row]:
        return {
            f"{kind}: {name}": (wanted, reader, file, lambda n, make=make: (wrap(make(n)), 0, b""))
            for name, (wanted, make) in table.items()
        }

    gz = {name: row for name, row in MERGES.items() if "unpack" in name}
    return {
        **plain(PICKLES, "pickle", "both", "a.ckpt", zipped),
        **plain(PACKED, "packed pickle", "both", "a.ckpt", packed),
        **plain(SAFE, "safetensors", "tensors", "a.safetensors", bytes),
        **plain(VOCABULARIES, "tokenizer.json", "vocabulary", "tokenizer.json", bytes),
        **plain(MERGES, "merges", "vocabulary", "a.txt", bytes),
        **plain(gz, "merges", "vocabulary", "a.txt.gz", bytes),
        **plain(FOLDERS, "folder", "folder", "unet/config.json", bytes),
        **OTHERS,
    }


# These are as large whatever size is asked for, and cost a third of all: read with the files of a megabyte alone.
SAME_SIZE = {
    "packed pickle: lists that unpack",
    "pickle: more lists",
    "pickle: sets",
    "pickle: numbers in a dict without end",
    "packed pickle: more than may unpack",
    "merges: a few lines that unpack",
}


def write(folder: Path, row: Row, n: int) -> Path:
    """Write one of them."""
    _, _, file, make = row
    body, size, end = make(n)
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_bytes(body)
    if size:
        with path.open("r+b") as out:
            out.truncate(size - len(end))
            out.seek(0, os.SEEK_END)
            out.write(end)
    return path


def read(reader: str, path: Path) -> dict:
    """Read a file in every way that there is; say what was raised and how long the longest took."""
    from ldm.checkpoints import read_object, read_tensors
    from ldm.checkpoints.folders import folder_settings
    from ldm.modules.encoders.tokenizer import read_vocabulary

    ways: dict[str, list[Callable[[Path], object]]] = {
        "both": [read_object, read_tensors],
        "tensors": [read_tensors],
        "vocabulary": [read_vocabulary],
        "folder": [lambda path: folder_settings(path.parent.parent)],
    }
    found = {"raised": FINE, "message": "", "seconds": 0.0}
    for way in ways[reader]:
        before = time.process_time()
        try:
            way(path)
        except BaseException as error:
            found |= {"raised": type(error).__name__, "message": str(error)}
        found["seconds"] = max(found["seconds"], time.process_time() - before)
    return found


def measured(reader: str, path: Path | None) -> dict:
    """Read a file in a forked process; say what came of it and what it cost."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30),) * 2)
        events: list[str] = []

        def watch(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if event in BANNED or writes:
                events.append(f"{event} {str(arguments)[:80]}")

        sys.addaudithook(watch)
        found = read(reader, path) if path else {}
        os.write(into, json.dumps({**found, "events": events}).encode()[:60_000])
        os._exit(0)
    os.close(into)
    _, status, usage = os.wait4(child, 0)
    with os.fdopen(out, "rb") as pipe:
        told = pipe.read()
    killed = {"raised": f"killed ({status})", "message": "", "events": [], "seconds": usage.ru_utime}
    return {**(json.loads(told) if told else killed), "kilobytes": usage.ru_maxrss}


def main(folder: Path, n: int) -> None:
    wanted_rows = {name: row for name, row in all_rows().items() if n > 900_000 or name not in SAME_SIZE}
    rows = {name: (row, write(folder / str(i), row, n)) for i, (name, row) in enumerate(wanted_rows.items())}
    sound = folder / "sound"
    sound.mkdir()
    (sound / "a.ckpt").write_bytes(packed(b"}" + text("a") + TENSOR + b"s"))
    (sound / "a.safetensors").write_bytes(safe('{"x":' + ENTRY + "}"))
    (sound / "a.txt").write_bytes(b"i n")
    for reader, name in (("both", "a.ckpt"), ("tensors", "a.safetensors"), ("vocabulary", "a.txt")):
        assert read(reader, sound / name)["raised"] == FINE  # and what is imported late is there now
    gc.collect()
    gc.freeze()  # else each child's collector goes over, and so copies, what its parent imported
    nothing = measured("none", None)
    for name, ((wanted, reader, *_), path) in rows.items():
        found = measured(reader, path)
        found["kilobytes"] -= nothing["kilobytes"]
        print(json.dumps({"name": name, "wanted": wanted, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
