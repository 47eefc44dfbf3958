"""Libraries built from C++: once, for what they depend on, in a folder that nobody else writes to."""

import ctypes
import os

import pytest

from ldm.errors import ResourceError
from ldm.kernels import build as compiled

FLAGS = ("-O1", "-fPIC")


@pytest.fixture
def sources(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "common.h").write_text("constexpr int five = 5;\n")
    (folder / "one.cpp").write_text('#include "common.h"\nextern "C" int one() { return five; }\n')
    (folder / "two.cpp").write_text('#include "common.h"\nextern "C" int two() { return 2 * five; }\n')
    return folder


def test_sources_are_built_once_and_again_when_one_or_a_header_changed(sources):
    paths = compiled.build(sources, FLAGS, {"": (), "-m": ("-lm",)})
    for path in paths:
        library = ctypes.CDLL(str(path))
        assert (library.one(), library.two()) == (5, 10)
    assert [path.name[24:] for path in paths] == [".so", "-m.so"]
    times = [path.stat().st_mtime_ns for path in paths]
    assert compiled.build(sources, FLAGS, {"": ()}) == paths[:1]
    assert [path.stat().st_mtime_ns for path in paths] == times
    (sources / "common.h").write_text("constexpr int five = 6;\n")
    (anew,) = compiled.build(sources, FLAGS, {"": ()})
    assert anew not in paths and ctypes.CDLL(str(anew)).two() == 12
    (other,) = compiled.build(sources, (*FLAGS, "-g"), {"": ()})
    assert other not in (anew, *paths) and other.parent == anew.parent


def test_without_a_compiler_it_is_said(sources, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="there is no C"):
        compiled.build(sources, FLAGS, {"": ()})


def test_a_failed_build_leaves_nothing(sources):
    (sources / "two.cpp").write_text("int main( { }")
    with pytest.raises(ResourceError, match="failed: .*error"):
        compiled.build(sources, FLAGS, {"": ()})
    assert os.listdir(compiled.cache_folder()) == []


def test_a_cache_that_others_may_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = compiled.cache_folder()
    assert mine == tmp_path / "ldm" / "kernels"
    mine.chmod(0o777)
    assert compiled.cache_folder() != mine
