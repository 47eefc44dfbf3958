"""Libraries built from C++: once, for what they depend on, in a folder that nobody else writes to."""

import ctypes
import os

import pytest

from ldm import compiled
from ldm.errors import ResourceError

FLAGS = ("-O1", "-fPIC")


@pytest.fixture
def source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "five.cpp"
    source.write_text('extern "C" int five() { return 5; }\n')
    return source


def test_a_source_is_built_once_and_again_when_it_changed(source, monkeypatch):
    paths = compiled.build(source, FLAGS, {"": (), "-m": ("-lm",)}, for_processor=False)
    assert [ctypes.CDLL(str(path)).five() for path in paths] == [5, 5]
    assert [path.name[24:] for path in paths] == [".so", "-m.so"]
    monkeypatch.setenv("CXX", "no-such-compiler")  # it is not asked for what is there
    assert compiled.build(source, FLAGS, {"": ()}, for_processor=False) == paths[:1]
    source.write_text('extern "C" int five() { return 6; }\n')
    with pytest.raises(ResourceError, match="there is no C"):
        compiled.build(source, FLAGS, {"": ()}, for_processor=False)
    monkeypatch.delenv("CXX")
    (anew,) = compiled.build(source, FLAGS, {"": ()}, for_processor=False)
    assert anew not in paths and ctypes.CDLL(str(anew)).five() == 6


def test_code_for_this_processor_has_another_name(source):
    (plain,) = compiled.build(source, FLAGS, {"": ()}, for_processor=False)
    (native,) = compiled.build(source, FLAGS, {"": ()}, for_processor=True)
    assert plain != native and plain.parent == native.parent


def test_a_failed_build_leaves_nothing(source):
    source.write_text("int main( { }")
    with pytest.raises(ResourceError, match="failed: .*error"):
        compiled.build(source, FLAGS, {"": ()}, for_processor=False)
    assert os.listdir(compiled.cache_folder()) == []


def test_a_cache_that_others_may_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = compiled.cache_folder()
    assert mine == tmp_path / "ldm" / "kernels"
    mine.chmod(0o777)
    assert compiled.cache_folder() != mine
