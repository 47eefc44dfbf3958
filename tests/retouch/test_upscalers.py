"""Upscalers from weight files: found by name, refused in one line, and as spandrel computes them."""

import sys

import numpy as np
import pytest
import torch
from esrgan import esrgan
from PIL import Image
from safetensors.torch import save_file

from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UsageError
from ldm.retouch.upscalers import FileUpscaler, find_upscaler

NAMES = ("latent", "lanczos", "nearest")


def picture(width=23, height=17):
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("upscalers")
    torch.save({"params_ema": esrgan(), "params": {"x": torch.ones(1)}}, path / "4x-Sharp.pth")
    save_file(esrgan(), path / "plain.safetensors")
    save_file({"a.weight": torch.ones(2, 3)}, path / "other.safetensors")
    (path / "notes.txt").write_text("no upscaler")
    return path


def test_a_name_is_a_path_or_a_file_of_the_folder(folder):
    assert find_upscaler("upscaler", folder / "4x-Sharp.pth", None, NAMES) == folder / "4x-Sharp.pth"
    for name in ("4x-Sharp", "4x-Sharp.pth", "somewhere/else/4x-Sharp.pth"):
        assert find_upscaler("upscaler", name, folder, NAMES) == folder / "4x-Sharp.pth", name


@pytest.mark.parametrize(
    ("name", "has_folder", "kind", "says"),
    [
        ("4x-Sharpp", True, UsageError, "did you mean '4x-Sharp'"),
        ("lanczoss", False, UsageError, "did you mean 'lanczos'"),
        ("4x-Sharp.pth", False, AbsentError, "is not there; give the path"),
        ("4x-Sharpp.pth", True, AbsentError, "did you mean '4x-Sharp.pth'"),
        ("notes.txt", True, UsageError, "a weight file or a name in upscaler_dir"),
        ("", True, UsageError, "a weight file"),
    ],
)
def test_a_name_of_nothing_is_refused_with_the_nearest(folder, name, has_folder, kind, says):
    with pytest.raises(kind, match=f"^hires_upscaler.*{says}") as caught:
        find_upscaler("hires_upscaler", name, folder if has_folder else None, NAMES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


def test_a_folder_that_is_none_is_refused(folder):
    with pytest.raises(AbsentError, match="is no folder"):
        find_upscaler("upscaler", "4x-Sharp", folder / "plain.safetensors", NAMES)


def test_without_spandrel_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    with pytest.raises(UsageError, match=r"pip install 'faithful-ldm\[upscale\]'"):
        FileUpscaler(folder / "4x-Sharp.pth")


def test_a_spandrel_that_does_not_load_is_one_line(folder, tmp_path, monkeypatch):
    """As beside a torchvision of another build than torch's."""
    (tmp_path / "spandrel.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match=r"does not load \(operator torchvision::nms does not exist\); install the"
    ):
        FileUpscaler(folder / "4x-Sharp.pth")


def test_what_is_no_upscaler_is_refused(folder, tmp_path):
    pytest.importorskip("spandrel")
    broken = esrgan()
    broken["conv_last.weight"] = torch.ones(3, 5, 3, 3)
    save_file(broken, tmp_path / "broken.safetensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    for path, kind in (
        (folder / "other.safetensors", MismatchError),
        (tmp_path / "broken.safetensors", MismatchError),
        (tmp_path / "empty.pth", FormatError),
        (folder / "notes.txt", FormatError),
    ):
        with pytest.raises(kind) as caught:
            FileUpscaler(path)
        assert isinstance(caught.value, LdmError) and "\n" not in str(caught.value), path
        assert len(str(caught.value)) <= 400


def test_it_enlarges_as_the_network_does_and_in_tiles_alike(folder, monkeypatch):
    spandrel = pytest.importorskip("spandrel")
    found = FileUpscaler(folder / "4x-Sharp.pth")
    assert (found.name, found.scale) == ("4x-Sharp", 2)
    source = picture()
    network = spandrel.ModelLoader().load_from_state_dict(esrgan())
    unit = torch.from_numpy(np.array(source, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    wanted = (255 * network(unit)[0]).round().byte().permute(1, 2, 0).numpy()
    assert wanted.std() > 5
    assert (np.asarray(found.enlarge(source, (46, 34))) == wanted).all()
    assert FileUpscaler(folder / "plain.safetensors").enlarge(source, (46, 34)).tobytes() == wanted.tobytes()
    # Beyond its own scale it goes through twice, and Lanczos brings what came to the size.
    assert found.enlarge(source, (60, 40)).size == (60, 40)
    twice = found.enlarge(found.enlarge(source, (46, 34)), (92, 68)).resize(
        (60, 40), Image.Resampling.LANCZOS
    )
    assert found.enlarge(source, (60, 40)).tobytes() == twice.tobytes()
    assert found.enlarge(source, source.size).tobytes() == source.tobytes()
    # Tiles differ at their seams alone, by what a network of this reach sees.
    monkeypatch.setattr("ldm.retouch.upscalers.TILE", 20)
    parts = np.asarray(found.enlarge(source, (46, 34))).astype(int)
    assert (parts[:10, :6] == wanted[:10, :6]).all() and np.abs(parts - wanted).mean() < 8
