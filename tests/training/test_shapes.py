"""The world of shapes: what a scene promises, its picture keeps and its caption says."""

import re

import numpy as np
import pytest

from ldm.errors import UsageError
from ldm.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    CONVERSE,
    GAP,
    HELD_OUT,
    JITTER,
    MARGIN,
    PLACES,
    RELATIONS,
    RING_HOLE,
    SHAPES,
    SIZES,
    VOCABULARY,
    Claim,
    ClaimedObject,
    Item,
    Scene,
    ShapesDataset,
    batches,
    box,
    coverage,
    evaluation_scenes,
    outline,
    paraphrase,
    parse_caption,
    render,
    sample_scene,
    shapes_prompts,
)


def scenes(count, split="any", seed=11):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(count)]


def pairs(scene):
    return {(item.colour, item.shape) for item in scene.items}


def test_colours_and_words_are_those_of_the_published_grammar():
    assert COLOURS["red"] == (220, 40, 40) and COLOURS["pink"] == (245, 130, 180) and len(COLOURS) == 8
    assert BACKGROUNDS == {
        "white": (245, 245, 245),
        "black": (20, 20, 20),
        "gray": (128, 128, 128),
        "beige": (225, 210, 180),
    }
    assert SHAPES == ("circle", "square", "triangle", "star", "ring", "cross")
    forms = (
        r"a (small|large) {c} {s} ({p}) on a {b} background",
        r"a ((small|large) )?{c} {s} ({r}) a ((small|large) )?{c} {s} on a {b} background",
    )
    parts = {"c": COLOURS, "s": SHAPES, "p": PLACES, "r": RELATIONS, "b": BACKGROUNDS}
    parts = {name: f"({'|'.join(words)})" for name, words in parts.items()}
    for scene in scenes(200):
        assert re.fullmatch(forms[len(scene.items) - 1].format(**parts), scene.caption), scene.caption


def test_held_out_pairs_leave_every_colour_and_shape_in_training():
    assert len(HELD_OUT) == 6
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    assert len({colour for colour, _ in HELD_OUT}) == 6
    drawn = [pair for scene in scenes(3000, "train") for pair in pairs(scene)]
    seen = set(drawn)
    assert len(seen) == 42 and not seen & HELD_OUT
    for word in (*COLOURS, *SHAPES):
        assert sum(word in pair for pair in drawn) > len(drawn) / 12


def test_test_scenes_always_show_a_held_out_pair_in_either_position():
    drawn = scenes(400, "test")
    assert all(scene.is_held_out and pairs(scene) & HELD_OUT for scene in drawn)
    two = [scene for scene in drawn if len(scene.items) == 2]
    first = [(scene.items[0].colour, scene.items[0].shape) in HELD_OUT for scene in two]
    assert 0.3 < np.mean(first) < 0.8
    assert not any(scene.is_held_out for scene in scenes(400, "train"))


def test_objects_keep_their_margin_their_distance_and_their_size():
    for scene in scenes(1500):
        boxes = []
        for item in scene.items:
            low, high = SIZES[item.size]
            assert low <= item.extent <= high
            half = np.array(box(item.shape, item.extent)) / 2
            centre = np.array([item.x, item.y])
            assert (centre - half >= MARGIN - 1e-9).all() and (centre + half <= 1 - MARGIN + 1e-9).all()
            boxes.append((centre - half, centre + half))
        if len(boxes) == 2:
            assert len(pairs(scene)) == 2
            (low, high), (low2, high2) = boxes
            assert max((low2 - high).max(), (low - high2).max()) >= GAP - 1e-9


def test_positions_are_what_the_caption_says_by_a_clear_margin():
    places = dict(zip(PLACES, [(-1, 0), (0, 0), (1, 0), (0, -1), (0, 1)], strict=True))
    turns = dict(zip(RELATIONS, [(0, -1), (0, 1), (-1, 0), (1, 0)], strict=True))
    for scene in scenes(800):
        first = np.array([scene.items[0].x, scene.items[0].y])
        if len(scene.items) == 1:
            offset, direction, across = first - 0.5, np.array(places[scene.where]), JITTER
            along = 0.2 if direction.any() else 0
        else:
            offset, direction = first - (scene.items[1].x, scene.items[1].y), np.array(turns[scene.where])
            along, across = 0.25, 2 * JITTER
        assert offset @ direction >= along - 1e-9
        assert np.abs(offset - (offset @ direction) * direction).max() <= across + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_the_area_of_its_outline_wherever_it_lies(shape):
    x, y = outline(shape).T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # shoelace
    area *= 1 - RING_HOLE**2 if shape == "ring" else 1
    for centre in ((0.5, 0.5), (0.4137, 0.5291)):
        mask, _ = coverage(Item("red", shape, "large", *centre, 0.43), 150)
        assert np.asarray(mask, float).sum() / 255 == pytest.approx(area * (0.43 * 150) ** 2, rel=0.025)


@pytest.mark.parametrize("size", [64, 97, 320])
def test_a_picture_has_exactly_the_colours_named_where_the_scene_puts_them(size):
    item, other = (
        Item("orange", "square", "large", 0.3, 0.52, 0.43),
        Item("blue", "ring", "medium", 0.77, 0.48, 0.32),
    )
    pixels = np.asarray(render(Scene("beige", (item, other), "to the left of"), size))
    assert pixels.shape == (size, size, 3)

    def at(x, y):
        return tuple(int(v) for v in pixels[int(y * size), int(x * size)])

    assert at(0.3, 0.52) == COLOURS["orange"]
    assert at(0.02, 0.02) == at(0.77, 0.48) == BACKGROUNDS["beige"]  # a ring shows the background in its hole
    assert at(0.77 - 0.16 * (1 + RING_HOLE) / 2, 0.48) == COLOURS["blue"]


def test_a_mirrored_scene_gives_the_mirrored_picture():
    item = Item("green", "star", "large", 0.375, 0.5625, 0.4375)
    mirrored = Item("green", "star", "large", 0.625, 0.5625, 0.4375)
    left, right = (np.asarray(render(Scene("white", (i,), "on the left"), 96), int) for i in (item, mirrored))
    assert np.abs(left[:, ::-1] - right).mean() < 0.5


def test_a_larger_picture_is_the_same_picture():
    for scene in scenes(5):
        small = np.asarray(render(scene, 64), float)
        large = np.asarray(render(scene, 192).reduce(3), float)
        assert np.abs(small - large).mean() < 1.5


def test_too_small_a_picture_is_refused():
    with pytest.raises(UsageError, match="needs at least 16 pixels a side; got 15"):
        render(scenes(1)[0], 15)


def test_an_unknown_split_is_named():
    with pytest.raises(UsageError, match="train, test or any; got 'val'"):
        sample_scene(np.random.default_rng(0), "val")
    with pytest.raises(UsageError, match="train, test or any; got 'val'"):
        ShapesDataset(split="val")


def test_an_unknown_shape_is_named():
    with pytest.raises(UsageError, match="circle, square, triangle, star, ring, cross; got 'heart'"):
        outline("heart")


def test_captions_parse_back_to_the_scene():
    for scene in scenes(500):
        assert parse_caption(scene.caption) == scene.claim
        assert parse_caption(scene.caption).caption == scene.caption


def test_paraphrases_keep_the_meaning_and_use_only_known_words():
    rng = np.random.default_rng(5)
    others = [(scene, paraphrase(scene.claim, rng)) for scene in scenes(1000)]
    for scene, text in others:
        assert parse_caption(text).canonical == scene.claim.canonical, text
        assert set(re.findall(r"\w+", text)) <= set(VOCABULARY)
    used = {word for _, text in others for word in re.findall(r"\w+", text)}
    assert {"grey", "big", "little", "disc", "plus", "under", "an", "middle"} <= used
    assert sum(text != scene.caption for scene, text in others) > 900


RED_CIRCLE = Claim("gray", (ClaimedObject("red", "circle", "large"),), "on the left")


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle on the left on a gray background",
        "A big red disc, on the left side, on a grey background.",
        "on a gray background, a large red circle to the left",
        "one large red circle left grey backdrop",
        "a gray background with a large red circle at the left",
    ],
)
def test_other_words_for_one_object_are_understood(text):
    assert parse_caption(text) == RED_CIRCLE


def test_a_relation_and_its_converse_mean_the_same():
    one = parse_caption("an orange ring under a small cyan cross on a white background")
    two = parse_caption("a small cyan cross above a orange ring on a white background")
    assert one != two and one.canonical == two.canonical == two
    right = parse_caption("a red star right of a pink square on a black background")
    assert right.canonical == parse_caption("a pink square left of a red star on a black background")
    assert all(CONVERSE[CONVERSE[relation]] == relation for relation in RELATIONS)


def test_what_is_not_said_is_not_claimed():
    claim = parse_caption("a red circle on a gray background")
    assert claim.where is None and claim.objects[0].size == "medium"
    assert claim.caption == "a red circle on a gray background"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a small red dog on the left on a white background", "has no word 'dog'; got 'a small red dog"),
        ("a red white circle background", "words in another order; got 'a red white circle background'"),
        ("", "words in another order; got ''"),
        ("a red circle above a white background", "words in another order"),
    ],
)
def test_captions_outside_the_grammar_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_caption(text)


def test_a_dataset_item_depends_on_seed_split_and_index_alone():
    data = ShapesDataset(size=33, length=7, seed=3, paraphrase=0.5)
    backwards = [data[i] for i in reversed(range(7))][::-1]
    for i, item in enumerate(backwards):
        again = ShapesDataset(33, 100, 3, "train", paraphrase=0.5)[i]
        assert item["caption"] == item["txt"] == again["caption"]
        np.testing.assert_array_equal(item["image"], again["image"])
    assert ShapesDataset(seed=4)[0]["caption"] != ShapesDataset(seed=3)[0]["caption"]
    assert data.scene(2).claim.canonical == parse_caption(backwards[2]["caption"]).canonical


def test_a_dataset_item_is_the_picture_in_minus_one_to_one():
    data = ShapesDataset(length=2, seed=1, image_size=40)
    item = data[1]
    assert item["image"].shape == (40, 40, 3) and item["image"].dtype == np.float32
    np.testing.assert_allclose(
        (item["image"] + 1) * 127.5, np.asarray(render(data.scene(1), 40), np.float32), rtol=0, atol=2e-5
    )
    assert item["caption"] == data.scene(1).caption
    assert len(data) == 2


def test_the_share_of_paraphrases_is_the_one_asked_for():
    data = ShapesDataset(16, 600, paraphrase=0.25)
    different = sum(data[i]["caption"] != data.scene(i).caption for i in range(600))
    assert 0.15 < different / 600 < 0.33
    with pytest.raises(UsageError, match="between 0 and 1; got 1.5"):
        ShapesDataset(paraphrase=1.5)


@pytest.mark.parametrize("index", [-1, 7])
def test_an_index_outside_the_dataset_is_refused(index):
    with pytest.raises(IndexError, match=rf"0\.\.6, the dataset's length; got {index}"):
        ShapesDataset(length=7)[index]


def test_batches_go_on_for_ever_and_start_anywhere():
    data = ShapesDataset(16, 5, seed=2)
    stream = batches(data, 3)
    first, second = next(stream), next(stream)
    assert tuple(first["image"].shape) == (3, 16, 16, 3)
    assert second["caption"] == second["txt"] == [data[i]["caption"] for i in (3, 4, 0)]
    later = next(batches(data, 3, start=1))
    assert later["caption"] == second["caption"] and bool((later["image"] == second["image"]).all())


def test_the_evaluation_prompts_are_fixed_different_and_of_their_split():
    seen, unseen = evaluation_scenes(500), evaluation_scenes(500, split="test")
    assert len({scene.caption for scene in seen}) == 500
    assert not any(scene.is_held_out for scene in seen) and all(scene.is_held_out for scene in unseen)
    assert shapes_prompts(20) == shapes_prompts(500)[:20] == [scene.caption for scene in seen[:20]]
    assert shapes_prompts(3, seed=1) != shapes_prompts(3)
