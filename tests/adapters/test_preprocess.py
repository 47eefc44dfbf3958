"""Hints from pictures by rules: each rule's law, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image

from ldm.adapters.controls import Hint
from ldm.adapters.preprocessors import KINDS, preprocess
from ldm.errors import AbsentError, LdmError, UsageError

PIXELS = (255 * keyed_input("pixels", (11, 14, 3)).clamp(0, 1)).numpy().astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)
UNIT = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
DARKEST = PIXELS.min(2)


def grey(values):
    return torch.from_numpy(np.asarray(values, np.float32)).expand(3, -1, -1)


def test_each_rule_by_its_law(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    for picture in (PICTURE, tmp_path / "a.png", UNIT):
        assert torch.equal(preprocess(picture, "threshold"), grey(DARKEST > 127))
    assert torch.equal(preprocess(PICTURE, "threshold", level=40), grey(DARKEST > 40))
    assert torch.equal(preprocess(PICTURE, "scribble"), grey(DARKEST < 127))
    ramp = (torch.arange(256) / 255).expand(3, 2, 256)
    for kind, first, last in (("threshold", 128, 255), ("scribble", 0, 126)):
        white = preprocess(ramp, kind)[0, 0].nonzero()
        assert (white.min(), white.max(), len(white)) == (first, last, last - first + 1)
    assert torch.equal(preprocess(PICTURE, " Invert "), 1 - UNIT)
    assert torch.equal(preprocess(PICTURE, "tile"), UNIT)
    plain = torch.full((3, 12, 16), 0.25)
    torch.testing.assert_close(preprocess(plain, "tile", rate=4), plain)
    coarse = preprocess(keyed_input("tile", (3, 32, 24)).clamp(0, 1), "tile", rate=8)
    assert coarse.diff(dim=1).abs().max() < 0.2 and coarse.shape == (3, 32, 24)
    for kind in set(KINDS) - {"canny", "inpaint"}:
        hint = Hint(preprocess(PICTURE, kind))
        assert hint.pictures[0].shape == (3, 11, 14)


def test_inpaint_marks_what_is_white_in_a_mask(tmp_path):
    mask = np.zeros((22, 28), np.uint8)
    mask[4:12, 6:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for given in (Image.fromarray(mask), tmp_path / "mask.png", str(tmp_path / "mask.png")):
        got = preprocess(PICTURE, "inpaint", mask=given)
        want = UNIT.clone()
        want[:, 2:6, 3:10] = -1
        assert torch.equal(got, want) and torch.equal(Hint(got).sized(11, 14)[0], want)


def test_shuffle_moves_colours_and_makes_none():
    picture = torch.zeros(3, 40, 56)
    picture[0, :, :28], picture[1, :, 28:] = 1, 0.5
    one, same, other = (preprocess(picture, "shuffle", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.testing.assert_close(one.amax((1, 2)), torch.tensor([1, 0.5, 0]))
    # Every pixel is a mixture of the two colours there are.
    torch.testing.assert_close(one[0] + 2 * one[1], torch.ones(40, 56))
    torch.testing.assert_close(preprocess(torch.full((3, 9, 7), 0.5), "shuffle"), torch.full((3, 9, 7), 0.5))


def test_canny_draws_edges_where_opencv_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        AbsentError, match=r"canny needs OpenCV: pip install 'faithful-ldm\[hints\]'"
    ) as error:
        preprocess(PICTURE, "canny")
    assert error.value.exit_code > 1
    monkeypatch.undo()
    pytest.importorskip("cv2")
    square = torch.zeros(3, 40, 48)
    square[:, 10:30, 12:36] = 1
    edges = preprocess(square, "canny")
    assert set(edges.unique().tolist()) == {0, 1} and not edges[:, 14:26, 16:32].any()
    assert edges[0, 9:11, 14:34].any(0).all() and edges[0, 29:31, 14:34].any(0).all()
    assert (
        not preprocess(0.1 * square, "canny").any()
        and preprocess(0.1 * square, "canny", low=5, high=10).any()
    )


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("depth", {}, "'depth' is drawn by a network of its own, which is not here: give a ready map"),
        ("Depth_MiDaS", {}, "give a ready map"),
        ("openpose_full", {}, "give a ready map"),
        ("scribble_hed", {}, "give a ready map"),
        ("lineart_anime", {}, "give a ready map"),
        ("softedge", {}, "give a ready map"),
        ("cany", {}, "did you mean 'canny'"),
        ("", {}, "should be one of canny, inpaint, invert, scribble, shuffle, threshold, tile, got ''"),
        (None, {}, "a kind of hint should be one of"),
        ("tile", {"level": 3}, "'tile' has rate, got 'level'"),
        ("invert", {"level": 3}, "'invert' has no options, got 'level'"),
        ("threshold", {"level": 256}, "level should be a number from 0 to 255, got 256"),
        ("scribble", {"level": "dark"}, "level should be a number"),
        ("canny", {"low": 200, "high": 100}, "low should not be above high, got low=200 and high=100"),
        ("canny", {"high": -1}, "high should be a number from 0 to 255"),
        ("tile", {"rate": 0.5}, "rate should be a number from 1 to 64"),
        ("shuffle", {"seed": -1}, "seed must be a whole number"),
        ("inpaint", {}, "'inpaint' wants mask=, a picture whose white is made up, got none"),
        ("inpaint", {"mask": 5}, "got 5"),
        ("inpaint", {"mask": "absent.png"}, "absent.png"),
    ],
)
def test_what_is_refused_in_one_line(kind, options, words):
    with pytest.raises(LdmError, match=words) as error:
        preprocess(PICTURE, kind, **options)
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value)


def test_one_picture_at_a_time():
    with pytest.raises(UsageError, match="one picture at a time is preprocessed, got 2"):
        preprocess(UNIT[None].repeat(2, 1, 1, 1), "invert")
