"""Writing weights: as others read them, and never half a file under its final name."""

import errno
import os
import resource
import signal

import pytest
import safetensors.torch
import torch

from ldm.checkpoints import read_object, read_tensors, replacing, save_object, save_safetensors
from ldm.checkpoints.safe import DTYPES
from ldm.errors import OutputError, UsageError

STATE = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([0.5, -1.5, 7.0]).half(),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "scalar": torch.tensor(3),
    "none": torch.zeros(0, 5),
}


def left_over(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def test_the_library_and_we_read_back_what_was_written(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE, {"format": "pt", "word": "größer"})
    theirs, (ours, metadata) = safetensors.torch.load_file(path), read_tensors(path)
    assert metadata == {"format": "pt", "word": "größer"}
    assert theirs.keys() == ours.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(theirs[name], value) and torch.equal(ours[name], value), name
        assert theirs[name].dtype == ours[name].dtype == value.dtype
    assert left_over(tmp_path) == []


def test_the_file_is_the_one_that_the_library_writes(tmp_path):
    """Byte for byte, so that a hash of a file does not depend on who wrote it."""
    state = {name: value.contiguous() for name, value in STATE.items()}
    save_safetensors(tmp_path / "ours", state)
    safetensors.torch.save_file(state, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_can_be_written(tmp_path, dtype):
    value = torch.tensor([0, 1, 1]).to(DTYPES[dtype])
    save_safetensors(tmp_path / "a", {"x": value})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["x"], value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"x": torch.ones(2, dtype=torch.complex64)}, {}, "'x' cannot be saved: .*torch.complex64"),
        ({"x": torch.eye(2).to_sparse()}, {}, "sparse"),
        ({"x": torch.ones(2, device="meta")}, {}, "on 'meta'"),
        ({"x": torch.ones(2)}, {"steps": 3}, "metadata should be text to text, got 'steps': int"),
    ],
)
def test_what_the_format_does_not_take_is_named(tmp_path, tensors, metadata, words):
    with pytest.raises(UsageError, match=words):
        save_safetensors(tmp_path / "a", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and left_over(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_call_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, call, number):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, STATE)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="cannot write .*a.safetensors': " + os.strerror(number)):
        save_safetensors(path, {"x": torch.ones(3)})
    assert path.read_bytes() == before and left_over(tmp_path) == []


@pytest.mark.parametrize("save", [save_safetensors, save_object])
@pytest.mark.parametrize("size", [0, 1, 4096, 30_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, save, size):
    path = tmp_path / "a"
    save(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            save(path, {"x": torch.ones(20_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)
    assert path.read_bytes() == before and left_over(tmp_path) == []


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "a[1].safetensors"
    child = os.fork()
    if child == 0:
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(left_over(tmp_path)) == 1 and not path.exists()
    with replacing(tmp_path / "another") as file:
        file.write(b"whole")
    assert len(left_over(tmp_path)) == 1
    save_safetensors(path, STATE)
    assert left_over(tmp_path) == [] and path.exists()


def test_a_writer_at_work_is_not_disturbed(tmp_path):
    with replacing(tmp_path / "a") as first:
        first.write(b"first")
        with replacing(tmp_path / "a") as second:
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "a").read_bytes() == b"first"


def test_the_mode_is_the_usual_or_that_of_the_old_file(tmp_path):
    old = os.umask(0o027)
    try:
        save_safetensors(tmp_path / "new", STATE)
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o600)
    save_safetensors(tmp_path / "new", STATE)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_folder_in_the_way_and_a_file_for_a_folder_are_refused(tmp_path):
    with pytest.raises(OutputError, match="it is a folder; give a file name"):
        save_safetensors(tmp_path, STATE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        save_safetensors(tmp_path / "file" / "a", STATE)


def test_an_object_comes_back_as_it_was(tmp_path):
    save_object(tmp_path / "a.ckpt", {"step": 3, "state_dict": {"x": torch.ones(2)}})
    found = read_object(tmp_path / "a.ckpt")
    assert found["step"] == 3 and torch.equal(found["state_dict"]["x"], torch.ones(2))
