"""Weights that stay in the page cache: there without a copy, and unharmed whatever becomes of their file."""

import gc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints import load_latent_diffusion, load_vae, mapping, open_weights, read_tensors
from ldm.errors import FormatError
from ldm.generate import StableDiffusion

if sys.platform != "linux":
    pytest.skip("files are mapped under Linux only", allow_module_level=True)


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def is_open(path):
    numbers = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return any(number.is_symlink() and os.readlink(number) == str(path) for number in numbers)


@pytest.fixture
def tensors():
    """Sizes in bytes that no page and no other tensor has."""
    draw = torch.Generator().manual_seed(3)
    return {
        "wide": torch.randn(1000, 1031, generator=draw),
        "half": torch.randn(77, 13, generator=draw).half(),
        "yes": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 5),
    }


@pytest.fixture
def path(tensors, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with open_weights(path)._handle as handle:
        if mapping.map_file(handle) is None:
            pytest.skip(f"no leases on the file system of {tmp_path}")
    return path


def test_lent_values_are_the_files_and_lie_in_it(path, tensors):
    weights = open_weights(path)
    lent = {name: weights.lend(name) for name in tensors}
    weights.close()
    assert is_mapped(path) and is_open(path)  # for the lease
    assert torch.equal(lent["wide"], tensors["wide"]) and torch.equal(lent["half"], tensors["half"])
    assert lent["yes"] is None and lent["none"] is None  # bytes that are no bool yet, and no bytes
    del lent
    gc.collect()
    assert not is_mapped(path) and not is_open(path)


def test_what_is_written_to_lent_values_does_not_reach_the_file(path, tensors):
    weights = open_weights(path)
    weights.lend("wide").zero_()
    weights.close()
    assert torch.equal(read_tensors(path)[0]["wide"], tensors["wide"])


def test_a_file_that_somebody_writes_to_is_copied(path):
    with path.open("r+b"):
        assert open_weights(path).lend("wide") is None
    assert open_weights(path).lend("wide") is not None


@pytest.mark.parametrize(("limit", "value"), [("LOCAL", frozenset()), ("SLOWEST_MOVE", 1.0)])
def test_where_it_would_not_be_safe_files_are_copied(path, monkeypatch, limit, value):
    monkeypatch.setattr(mapping, limit, value)
    assert open_weights(path).lend("wide") is None


def test_without_a_compiler_files_are_copied(path, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mapping.library.cache_clear()
    try:
        with caplog.at_level("INFO", logger="ldm"):
            assert open_weights(path).lend("wide") is None
        assert "copied out of their files: there is no C++ compiler; install g++" in caplog.text
    finally:
        mapping.library.cache_clear()


def test_values_that_a_processor_could_not_read_where_they_lie_are_copied(tmp_path):
    values = torch.arange(3.0)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}})
    header += " " * ((1 - len(header)) % 4)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + values.numpy().tobytes())
    weights = open_weights(path)
    assert weights.lend("a") is None and torch.equal(weights.read("a"), values)


def test_a_file_that_changed_before_it_was_mapped_is_refused(path):
    weights = open_weights(path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(FormatError, match="changed while it was read"):
        weights.lend("wide")


def test_a_writer_waits_until_the_values_are_ours(path, tensors):
    """Overwritten by this process, removed, and replaced by name: three ways that a file goes."""
    weights = open_weights(path)
    lent = weights.lend("wide")
    weights.close()
    path.write_bytes(b"nothing")
    assert not is_mapped(path) and torch.equal(lent, tensors["wide"])
    save_file(tensors, path)
    weights = open_weights(path)
    replaced = weights.lend("half")
    weights.close()
    path.with_name("new").write_bytes(b"nothing")
    path.with_name("new").replace(path)
    path.unlink()
    assert torch.equal(replaced, tensors["half"])


SCRIPT = """
import os, subprocess, sys, torch
from ldm.checkpoints import open_weights

torch.set_num_threads(1)
cut, forked, own = sys.argv[1:]


def lend(path):
    weights = open_weights(path)
    lent = weights.lend("long")
    weights.close()
    assert lent is not None and lent.nbytes > 8 << 20  # three of the chunks that are moved at a time
    return lent


lent = lend(cut)
lent[-7:] = 5.0  # on the last page, and in memory of our own from here on
subprocess.run([sys.executable, "-c", f"import os; os.truncate({cut!r}, 100)"], check=True)
assert bool((lent[:-7] == 7).all()) and lent[-7:].tolist() == [5.0] * 7

lent = lend(forked)
child = os.fork()
if child == 0:
    os.truncate(forked, 100)
    os._exit(0 if bool((lent == 7).all()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert bool((lent == 7).all())

lent = lend(own)
torch.save({"a": 1}, own)  # waits for the file inside a call that lets no other Python code run
assert bool((lent == 7).all())
print("alive")
"""


def test_no_way_of_cutting_a_file_kills_who_uses_it(path, tmp_path):
    """In a process of its own, for a mapped file that is cut ends the process without a word (SIGBUS)."""
    files = [tmp_path / name for name in ("cut", "forked", "own")]
    for file in files:
        save_file({"long": torch.full((3_000_001,), 7.0)}, file)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, files)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_model_keeps_its_weights_in_the_file_where_nothing_is_converted(tiny, path):
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    assert is_mapped(tiny.path)
    copied, _ = load_latent_diffusion(tiny.path, config=tiny.config, disable_mmap=True)
    assert StableDiffusion.from_single_file(tiny.path, config=tiny.config, disable_mmap=True).report.assigned
    converted, _ = load_latent_diffusion(tiny.path, config=tiny.config, dtype=torch.bfloat16)
    state, wanted = model.state_dict(), copied.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    del model, state
    gc.collect()
    assert not is_mapped(tiny.path)
    load_vae(converted, tiny.path)
    assert not is_mapped(tiny.path)
