"""What counts as following a hint in the table of the ControlNet on outlines, and what its hints are."""

from dataclasses import replace

import numpy as np

from bench.control import follows, outlines, sheet
from ldm.shapes.checker import see
from ldm.shapes.scenes import Item, Scene, render

CIRCLE, SQUARE = (
    Item("red", "circle", "large", 0.3, 0.5, 0.43),
    Item("blue", "square", "small", 0.75, 0.5, 0.23),
)
SCENE = Scene("white", (CIRCLE, SQUARE), "to the left of")


def test_a_picture_follows_where_every_object_is_there_and_no_other():
    def moved(**changes):
        return replace(SCENE, items=(replace(SCENE.items[0], **changes), SCENE.items[1]))

    seen = see(render(SCENE))
    for other, wanted in (
        (SCENE, True),
        (moved(colour="green"), True),  # an outline has no colour
        (moved(x=0.3 + 1.5 / 128), True),
        (moved(x=0.3 + 5 / 128), False),
        (moved(extent=0.43 * 1.2), False),
        (moved(shape="cross"), False),
        (replace(SCENE, items=SCENE.items[:1]), False),
        (replace(SCENE, items=(*SCENE.items, SCENE.items[0])), False),
    ):
        assert follows(seen, other) == wanted, other


def test_outlines_are_white_where_colours_change_and_black_elsewhere():
    drawn = outlines(render(SCENE))
    assert drawn.shape == (128, 128, 3) and set(np.unique(drawn)) == {0, 255}
    left, right = round(128 * (0.3 - 0.215)), round(128 * (0.3 + 0.215))
    assert drawn[64, left - 2 : left + 3].any() and drawn[64, right - 2 : right + 3].any()
    assert not drawn[64, left + 5 : right - 5].any() and not drawn[:5].any()
    assert sheet([[drawn, drawn]])[:4] == b"\x89PNG"
