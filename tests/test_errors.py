"""What an error's line says of a name that is not there."""

import pytest

from ldm.errors import nearest, nearest_file


@pytest.mark.parametrize(
    ("name", "names", "cutoff", "found"),
    [
        ("stpes", ("steps", "strength"), 0.6, "steps"),
        ("stpes", ("height", "width"), 0.6, None),
        ("", ("steps",), 0.6, None),
        ("stps", ("steps",), 0.95, None),
        (7, ("6", "71"), 0.6, "71"),
    ],
)
def test_the_nearest_name_is_the_one_spelt_most_like_it(name, names, cutoff, found):
    assert nearest(name, iter(names), cutoff) == found


def test_of_a_long_name_only_the_beginning_counts():
    assert nearest("s" * 70 + "x" * 10**6, ["s" * 80]) == "s" * 80


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("modle.ckpt", "model.ckpt"),
        ("modle.ckpt/", "model.ckpt"),
        ("picture.png", None),
        ("nowhere/model.ckpt", None),
        ("model.ckpt/inner", None),
        ("a\0b", None),
    ],
)
def test_the_nearest_file_lies_in_the_same_folder(tmp_path, path, found):
    (tmp_path / "model.ckpt").touch()
    assert nearest_file(f"{tmp_path}/{path}") == found


def test_a_path_without_a_folder_is_looked_for_where_we_are(tmp_path, monkeypatch):
    (tmp_path / "vae.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert nearest_file("vea.pt") == "vae.pt"
