"""Safetensors files: read as the library reads them, and refused where its reader is lax."""

import contextlib
import errno
import json
import os
import re
import struct

import pytest
import safetensors.torch
import torch

from ldm.checkpoints import open_weights, read_tensors, safe
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError, escaped

STATE = {
    "layer.weight": torch.arange(6.0).reshape(2, 3),
    "layer.bias": torch.tensor([0.5, -1.5, 7.0, 2.0]).half(),
    "steps": torch.tensor(41),
}


def build(entries: dict, body: bytes = b"", text: str | bytes | None = None) -> bytes:
    header = (
        json.dumps(entries).encode() if text is None else text if isinstance(text, bytes) else text.encode()
    )
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.fixture
def put(tmp_path):
    def write(body: bytes, name: str = "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(body)
        return path

    return write


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "sound.safetensors"
    safetensors.torch.save_file(STATE, path, {"format": "pt"})
    return path.read_bytes()


@pytest.mark.parametrize("dtype", sorted(safe.DTYPES))
def test_every_dtype_reads_as_the_library_reads_it(put, dtype):
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(safe.DTYPES[dtype])
    path = put(
        safetensors.torch.save({"x": values, "scalar": values[0, 1].clone(), "none": values[:, :0].clone()})
    )
    ours, theirs = read_tensors(path)[0], safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype == safe.DTYPES[dtype]
        assert ours[name].shape == theirs[name].shape
        assert torch.equal(
            ours[name].double(), theirs[name].double()
        )  # eight bits cannot be compared as they are


def test_metadata_and_infos_are_known_before_values(put, sound):
    weights = open_weights(put(sound))
    assert weights.metadata == {"format": "pt"} and weights.kind == "safetensors"
    assert weights.infos["layer.bias"].shape == (4,) and weights.infos["layer.bias"].dtype == torch.float16
    assert weights.infos["layer.weight"].nbytes == 24
    weights.close()


@pytest.mark.parametrize("first", [0x80, 0x3C, 0x42, 0x37])
def test_a_header_length_that_begins_like_another_format_is_no_hindrance(put, first):
    header = json.dumps({"x": entry()}).encode().ljust(256 + first)
    found, _ = read_tensors(put(struct.pack("<Q", len(header)) + header + b"\0\0\x80?\0\0\0@"))
    assert found["x"].tolist() == [1.0, 2.0]


def test_values_live_in_memory_of_their_own(put, sound):
    """A mapped file that is cut later would kill the process."""
    path = put(sound)
    found, _ = read_tensors(path)
    os.truncate(path, 0)
    assert torch.equal(found["layer.weight"], STATE["layer.weight"])


def test_scratch_memory_is_used_and_reused(put, sound):
    weights = open_weights(put(sound))
    scratch = torch.empty(64, dtype=torch.uint8)
    first = weights.read("layer.weight", scratch)
    assert torch.equal(first, STATE["layer.weight"]) and first.data_ptr() == scratch.data_ptr()
    assert torch.equal(weights.read("layer.bias", scratch), STATE["layer.bias"])
    weights.close()


def test_every_cut_is_incomplete(put, sound):
    """B01: each sixty-fourth, and each byte of the header."""
    for size in sorted({len(sound) * part // 64 for part in range(1, 64)} | set(range(1, len(sound) - 40))):
        with pytest.raises(FormatError, match="incomplete|is not a safetensors file"):
            read_tensors(put(sound[:size]))


def test_a_cut_body_is_counted(put, sound):
    with pytest.raises(FormatError, match=f"is incomplete: {len(sound) - 3} of {len(sound)} bytes"):
        read_tensors(put(sound[:-3]))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001])
def test_an_impossible_header_length_is_refused(put, length):
    """B02."""
    with pytest.raises(FormatError, match=f"a header of {length} bytes is impossible"):
        read_tensors(put(struct.pack("<Q", length) + b"{}" + b" " * 100))


def test_no_flipped_header_bit_gives_other_tensors_under_the_right_names(put, sound):
    """B03: refused, or a name that the account of a load does not know, or other metadata."""
    (length,) = struct.unpack("<Q", sound[:8])
    path = put(sound)
    refused = renamed = harmless = 0
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * (8 + length)):
            byte = sound[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            try:
                found, _ = read_tensors(path)
                if found.keys() != STATE.keys():
                    renamed += 1
                else:
                    assert all(
                        torch.equal(found[k], STATE[k]) and found[k].dtype == STATE[k].dtype for k in STATE
                    ), bit
                    harmless += 1
            except LdmError:
                refused += 1
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)
    assert refused + renamed + harmless == 8 * (8 + length) and refused > renamed > 0 and harmless > 0


@pytest.mark.parametrize(
    ("entries", "body", "words"),
    [
        ({"x": entry()}, b"\0" * 9, "1 bytes after the last tensor"),
        ({"x": entry(span=(4, 12))}, b"\0" * 12, "a hole or overlap"),
        ({"x": entry(), "y": entry(span=(4, 12))}, b"\0" * 12, "a hole or overlap"),
        ({"x": entry(), "y": entry(span=(12, 20))}, b"\0" * 20, "a hole or overlap"),
        ({"x": entry(span=(8, 0))}, b"\0" * 8, "does not fill -8 bytes"),
        ({"x": entry(shape=(3,))}, b"\0" * 8, "does not fill 8 bytes"),
        ({"x": entry(shape=(2**62, 2**62))}, b"\0" * 8, "does not fill 8 bytes"),
        ({"x": entry(shape=(0, 2**62), span=(0, 0))}, b"", "does not fill 0 bytes"),
        ({"x": entry(shape=(-2, -1))}, b"\0" * 8, "no usable shape"),
        ({"x": entry(shape=(2.0,))}, b"\0" * 8, "no usable shape"),
        ({"x": entry(shape=(True, 2))}, b"\0" * 8, "no usable shape"),
        ({"x": entry(span=(0, 8, 8))}, b"\0" * 8, "no usable shape or offsets"),
        ({"x": entry(shape=(1,) * 8 + (2,))}, b"\0" * 8, "has 9 dimensions, more than 8"),
        ({"x": entry(shape=(1,) * 100_000)}, b"\0" * 8, "has 100000 dimensions"),
        ({"x": {**entry(), "more": 1}}, b"\0" * 8, "dtype, shape and data_offsets only"),
        ({"x": [1]}, b"", "dtype, shape and data_offsets only"),
        ({"__metadata__": {"a": 1}, "x": entry()}, b"\0" * 8, "its metadata should be text"),
        ({"__metadata__": "a", "x": entry()}, b"\0" * 8, "its metadata should be text"),
        ({"../../x": entry()}, b"\0" * 8, "illegal tensor name"),
        ({"a\0b": entry()}, b"\0" * 8, "illegal tensor name"),
        ({"\x1b[2J": entry()}, b"\0" * 8, "illegal tensor name"),
        ({"n" * 1_000_000: entry()}, b"\0" * 8, "illegal tensor name"),
    ],
)
def test_malformed_headers_are_named(put, entries, body, words):
    """B06, B07, B10, B13; the message stays one short printable line."""
    with pytest.raises(FormatError, match=words) as caught:
        read_tensors(put(build(entries, body)))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"x": %s, "x": %s}' % ((json.dumps(entry()),) * 2), "a name stands twice"),
        (
            '{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            "a name stands twice",
        ),
        ('{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN in the header"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "the header is not JSON"),
        (b'{"\xff\xfe": 1}', "the header is not JSON"),
        ('{"x": 1', "the header is not JSON"),
        ('{"x": %s}' % ("9" * 5000), "the header is not JSON"),
        ('{"x": {"dtype": "F32", "shape": [-%s], "data_offsets": [0, 8]}}' % ("9" * 100_000), "is not JSON"),
        ('{"x": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % ("9" * 4300), "does not fill 8"),
        (
            '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}' % ("9" * 4300),
            "does not fill 99999",
        ),
        ('{"x": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', "no usable shape"),
        (" {}", "is not a safetensors file"),
        ("[1, 2]", "is not a safetensors file"),
    ],
)
def test_headers_that_are_no_json_object_are_malformed(put, text, words):
    """B08, B12."""
    with pytest.raises(FormatError, match=words):
        read_tensors(put(build({}, b"\0" * 8, text=text)))


@pytest.mark.parametrize("size", [5 << 20, 17 << 20])
def test_a_header_may_be_as_long_as_the_library_writes_it(put, size):
    """What makes headers long is metadata: trainers keep their captions there."""
    tags = '{"a \\"tag\\" \\\\": 3, [x], ' * (size // 30)
    header = {"__metadata__": {"ss_tag_frequency": tags, "none": ""}, "x": entry()}
    found, metadata = read_tensors(put(build(header, b"\0\0\x80?\0\0\0@")))
    assert metadata["ss_tag_frequency"] == tags and found["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("part", "size", "words"),
    [
        ("[],", 5_000_000, "is not text for the most part"),
        ("1,", 5_000_000, "is not text for the most part"),
        ('"",', 5_000_000, "is not text for the most part"),
        ('"\\"",', 5_000_000, "is not text for the most part"),
        ('{"a":1},', 1_000_000, "lists more than 20000 tensors"),
    ],
)
def test_a_long_header_of_small_parts_is_refused(put, part, size, words):
    """Each of them would take many times its bytes in memory."""
    text = '{"x": [' + part * (size // len(part)) + "1]}"
    with pytest.raises(UnsafeFileError, match=words):
        open_weights(put(build({}, text=text)))


def test_too_many_tensors_are_refused(put):
    """B09."""
    with pytest.raises(UnsafeFileError, match="lists 20001 tensors; more than 20000"):
        read_tensors(put(build({f"t{i}": entry(shape=(0,), span=(0, 0)) for i in range(20_001)})))


@pytest.mark.parametrize(
    "dtype",
    ["F4", "F8_E8M0", "U16", "C64", "X99", "f32", "", 7, None, True, 1.5, ["F32"], [[]], {"F32": 1}, {}],
)
def test_unsupported_dtypes_are_named(put, dtype):
    """B11."""
    with pytest.raises(MismatchError, match=re.escape(f"'x' has the unsupported dtype {escaped(dtype, 20)}")):
        read_tensors(put(build({"x": entry(dtype=dtype)}, b"\0" * 8)))


def test_a_file_that_is_also_a_zip_is_refused(put):
    """B20."""
    end = b"PK\x05\x06" + b"\0" * 18
    with pytest.raises(UnsafeFileError, match="two formats at once"):
        read_tensors(put(build({"x": entry("U8", (len(end),), (0, len(end)))}, end)))


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_noticed(put, sound, change):
    """B17."""
    path = put(sound)
    weights = open_weights(path)
    if change == "cut":
        os.truncate(path, len(sound) - 20)
        with pytest.raises(FormatError, match="was cut while it was read"):
            for name in weights.infos:
                weights.read(name)
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(FormatError, match="changed while it was read"):
        weights.close()


def test_a_read_error_of_the_disk_is_said(put, sound, monkeypatch):
    """B18."""

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    path = put(sound)
    with contextlib.closing(open_weights(path)) as weights, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(FormatError, match="cannot be read: .*Input/output error"):
            weights.read("layer.weight")
    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(FormatError, match="cannot be read: .*Input/output error"):
        open_weights(path)


def test_a_system_without_preadv_reads_the_same(put, sound, monkeypatch):
    """Windows has none."""
    path = put(sound)
    wanted = read_tensors(path)[0]
    monkeypatch.delattr(os, "preadv")
    found = read_tensors(path)[0]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_empty_header_holds_no_tensors(put):
    """B14: refused when a model is wanted, see test_load; the file itself is sound."""
    assert read_tensors(put(build({"__metadata__": {"a": "b"}}))) == ({}, {"a": "b"})
