"""The world of shapes: scenes, their captions and their pictures; what the model in the box is trained on.

A scene is one object somewhere, or two objects in a relation, on a plain background. The caption says all
that matters, so a program can tell whether a picture keeps its caption's promise (`ldm.shapes.checker`).
Everything is deterministic: a seed and an index give a scene, a scene gives one caption and one picture.
Six colour-shape pairs (`HELD_OUT`) never occur in training; they test composition.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from ldm.errors import UsageError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 85, 220),
    "yellow": (245, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 40),
    "cyan": (60, 200, 220),
    "pink": (245, 130, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "beige": (225, 210, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLACES = ("on the left", "in the center", "on the right", "at the top", "at the bottom")
RELATIONS = ("above", "below", "to the left of", "to the right of")
CONVERSE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}

# One pair per shape, six different colours: every colour keeps five shapes and every shape seven colours.
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("orange", "square"),
    }
)

# The longer side of an object's bounding box as a fraction of the picture; medium is the size not named.
# Neighbouring ranges are a factor of 1.24 or more apart.
SIZES: dict[str, tuple[float, float]] = {"small": (0.22, 0.24), "medium": (0.31, 0.34), "large": (0.42, 0.45)}
MARGIN = 0.025  # fraction of the picture between any object and the border
GAP = 0.05  # least distance between the bounding boxes of two objects
JITTER = 0.05  # how far an object may stray from where its caption puts it
PLACE_OFFSET = (0.20, 0.30)  # from the centre of the picture to that of an object "on the left" and so on
RING_HOLE = 0.52  # inner over outer diameter
CROSS_ARM = 0.34  # width of a cross's arm over the cross's width
STAR_WAIST = 0.42  # inner over outer radius of a star
SUPERSAMPLE = 4
MIN_PIXELS = 16

SYNONYMS = {
    "grey": "gray",
    "big": "large",
    "little": "small",
    "centre": "center",
    "middle": "center",
    "under": "below",
    "beneath": "below",
    "over": "above",
    "disc": "circle",
    "plus": "cross",
    "violet": "purple",
    "backdrop": "background",
    "one": "a",
    "an": "a",
}
VOCABULARY = tuple(
    sorted(
        {*COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *SYNONYMS, "background", "a", "side", "with"}
        | {word for phrase in (*PLACES, *RELATIONS) for word in phrase.split()}
    )
)


@dataclass(frozen=True)
class ClaimedObject:
    """What a caption says of one object; size is "medium" where the caption names none."""

    colour: str
    shape: str
    size: str = "medium"

    @property
    def caption(self) -> str:
        named = "" if self.size == "medium" else f"{self.size} "
        return f"a {named}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Claim:
    """All that a caption says: one object and its place (None: not said), or two and their relation."""

    background: str
    objects: tuple[ClaimedObject, ...]
    where: str | None

    @property
    def caption(self) -> str:
        """The claim in the grammar's own words."""
        parts = [self.objects[0].caption, self.where, *(o.caption for o in self.objects[1:])]
        return " ".join(p for p in (*parts, f"on a {self.background} background") if p)

    @property
    def canonical(self) -> "Claim":
        """The same meaning with the relation turned to "above" or "to the left of", equal if meanings are."""
        if self.where in ("below", "to the right of"):
            return Claim(self.background, self.objects[::-1], CONVERSE[self.where])
        return self


@dataclass(frozen=True)
class Item:
    """One object as drawn: centre (x, y) of its bounding box and the box's longer side, in pictures."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """What is in a picture, exactly; `where`: the item's place, or the first's relation to the second."""

    background: str
    items: tuple[Item, ...]
    where: str

    @property
    def claim(self) -> Claim:
        return Claim(
            self.background, tuple(ClaimedObject(i.colour, i.shape, i.size) for i in self.items), self.where
        )

    @property
    def caption(self) -> str:
        return self.claim.caption

    @property
    def is_held_out(self) -> bool:
        """Whether any object is one of the pairs that training never shows."""
        return any((i.colour, i.shape) in HELD_OUT for i in self.items)


@cache
def outline(shape: str) -> np.ndarray:
    """Vertices (n, 2) of a shape, x right and y down, in a bounding box around 0 whose longer side is 1.

    A ring's outline is its outer circle; the hole is `RING_HOLE` times as wide.
    """
    if shape in ("circle", "ring"):
        turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "square":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    elif shape == "triangle":
        points = np.array([[0, 0], [0.5, math.sqrt(0.75)], [-0.5, math.sqrt(0.75)]])
    elif shape == "star":
        turn = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.0, STAR_WAIST)
        points = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "cross":
        a = CROSS_ARM
        arm = [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a]]
        points = np.array(arm + [[-x, -y] for x, y in arm], float)
    else:
        raise UsageError(f"a shape must be one of {', '.join(SHAPES)}; got '{shape}'")
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (high - low).max()


def box(shape: str, extent: float) -> tuple[float, float]:
    """Width and height of a shape's bounding box whose longer side is `extent`."""
    width, height = np.ptp(outline(shape), axis=0)
    return float(width * extent), float(height * extent)


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draw a scene: 40 % one object in a place, 60 % two in a relation.

    Args:
        split: "train" has no held-out pair, "test" at least one, "any" whatever comes.

    Raises:
        UsageError: another split.
    """
    if split not in ("train", "test", "any"):
        raise UsageError(f"split must be train, test or any; got '{split}'")
    count = 1 if rng.random() < 0.4 else 2
    pairs = _draw_pairs(rng, count, split)
    background = _choice(rng, tuple(BACKGROUNDS))
    if count == 1:
        return _place_one(rng, background, pairs[0])
    return _place_two(rng, background, pairs)


def _choice(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _draw_pairs(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str]]:
    """Draw different colour-shape pairs that fit the split."""
    forced = int(rng.integers(count)) if split == "test" else None
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        if len(pairs) == forced:
            pair = _choice(rng, tuple(sorted(HELD_OUT)))
        else:
            pair = (_choice(rng, tuple(COLOURS)), _choice(rng, SHAPES))
        if pair not in pairs and not (split == "train" and pair in HELD_OUT):
            pairs.append(pair)
    return pairs


def _place_one(rng: np.random.Generator, background: str, pair: tuple[str, str]) -> Scene:
    size = _choice(rng, ("small", "large"))  # the one-object caption always names the size
    extent = rng.uniform(*SIZES[size])
    where = _choice(rng, PLACES)
    near, far = PLACE_OFFSET
    far = min(far, 0.5 - MARGIN - extent / 2)
    along, x, y = rng.uniform(near, far), *rng.uniform(-JITTER, JITTER, 2)
    if where == "on the left":
        x = -along
    elif where == "on the right":
        x = along
    elif where == "at the top":
        y = -along
    elif where == "at the bottom":
        y = along
    return Scene(background, (Item(*pair, size, 0.5 + x, 0.5 + y, extent),), where)


def _place_two(rng: np.random.Generator, background: str, pairs: list[tuple[str, str]]) -> Scene:
    sizes = [_choice(rng, tuple(SIZES)) for _ in pairs]
    extents = [rng.uniform(*SIZES[size]) for size in sizes]
    where = _choice(rng, RELATIONS)
    axis = 1 if where in ("above", "below") else 0
    order = (
        [0, 1] if where in ("above", "to the left of") else [1, 0]
    )  # which object has the lower coordinate
    spans = [box(pairs[i][1], extents[i])[axis] for i in order]
    free = 1 - 2 * MARGIN - sum(spans) - GAP
    gap = GAP + rng.uniform(0, min(free, 0.12))
    slack = (free + GAP - gap) / 2
    start = 0.5 - (sum(spans) + gap) / 2 + rng.uniform(-1, 1) * min(slack, JITTER)
    centres = np.empty((2, 2))
    centres[order[0], axis] = start + spans[0] / 2
    centres[order[1], axis] = start + spans[0] + gap + spans[1] / 2
    centres[:, 1 - axis] = 0.5 + rng.uniform(-JITTER, JITTER, 2)
    items = (
        Item(*pair, size, float(x), float(y), extent)
        for pair, size, (x, y), extent in zip(pairs, sizes, centres, extents, strict=True)
    )
    return Scene(background, tuple(items), where)


def render(scene: Scene, size: int = 128) -> Image.Image:
    """Draw a scene as a square RGB picture of `size` pixels, four times supersampled.

    Raises:
        UsageError: fewer than 16 pixels.
    """
    if size < MIN_PIXELS:
        raise UsageError(f"a picture of shapes needs at least {MIN_PIXELS} pixels a side; got {size}")
    picture = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    for item in scene.items:
        mask, corner = coverage(item, size)
        picture.paste(COLOURS[item.colour], corner, mask)
    return picture


def render_crowd(rng: np.random.Generator, size: int, scale: int = 128) -> Image.Image:
    """Draw many overlapping objects in all colours, backgrounds' included, cut off by the border.

    No caption describes it. Every cell of it holds an edge or a colour to learn from, where most of a scene is
    background: a first stage learns several times as fast from such pictures.

    Args:
        size: pixels a side of the piece.
        scale: pixels a side of the whole picture that the piece belongs to; sets how large objects are.
    """
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    picture = Image.new("RGB", (size, size), palette[len(COLOURS) + int(rng.integers(len(BACKGROUNDS)))])
    for _ in range(int(rng.integers(3, 9))):
        shape, colour = SHAPES[int(rng.integers(len(SHAPES)))], palette[int(rng.integers(len(palette)))]
        x, y, extent = rng.uniform((0, 0, 0.15), (1, 1, 0.6))
        mask, corner = coverage(Item("", shape, "", x, y, extent * scale / size), size)
        picture.paste(colour, corner, mask)
    return picture


def coverage(item: Item, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Draw how much of each pixel an object covers (mode L), in a box around it; also the box's corner."""
    width, height = (side * size for side in box(item.shape, item.extent))
    left = math.floor(item.x * size - width / 2)
    top = math.floor(item.y * size - height / 2)
    cells = (math.ceil(width) + 1, math.ceil(height) + 1)
    s = SUPERSAMPLE
    mask = Image.new("L", (cells[0] * s, cells[1] * s), 0)
    draw = ImageDraw.Draw(mask)
    middle = np.array([item.x * size - left, item.y * size - top])
    # Pillow's coordinates name pixel centres, ours the edges between pixels: half a subpixel apart.
    points = (outline(item.shape) * item.extent * size + middle) * s - 0.5
    draw.polygon(points.ravel().tolist(), fill=255)
    if item.shape == "ring":
        hole = (outline(item.shape) * RING_HOLE * item.extent * size + middle) * s - 0.5
        draw.polygon(hole.ravel().tolist(), fill=0)
    return mask.reduce(s), (left, top)


def _any_of(words) -> str:
    return "(" + "|".join(words) + ")"


_THING = rf"(?:a )?(?:{_any_of(SIZES)} )?{_any_of(COLOURS)} {_any_of(SHAPES)}"
_PLACE = r"(?:(?:on|in|at|to) )?(?:the )?(left|center|right|top|bottom)(?: side)?"
_RELATION = r"(above|below|(?:(?:to|on) )?(?:the )?(?:left|right) of)"
_GROUND = rf"(?:a )?{_any_of(BACKGROUNDS)} background"
_ORDERS = tuple(
    re.compile(pattern)
    for what in (rf"(?P<one>{_THING}(?: {_PLACE})?)", rf"(?P<two>{_THING} {_RELATION} {_THING})")
    for pattern in (
        rf"{what} (?:(?:on|with) )?(?P<ground>{_GROUND})",
        rf"(?:on )?(?P<ground>{_GROUND}) (?:with )?{what}",
    )
)
_PLACE_NAMES = dict(zip(("left", "center", "right", "top", "bottom"), PLACES, strict=True))


def parse_caption(text: str) -> Claim:
    """Understand a caption: the grammar's own form, or a paraphrase of it.

    Understood beside the grammar: `an`, `one` or no article, capitals, commas and full stops, the words of
    `SYNONYMS`, "left side", "left of", and the background named first.

    Raises:
        UsageError: a word that the world of shapes has not, or words in an order that says nothing.
    """
    words = re.findall(r"[^\s,.;:]+", text.lower())
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise UsageError(f"a caption of shapes has no word '{unknown[0]}'; got '{text}', write {_EXAMPLE}")
    plain = " ".join(SYNONYMS.get(word, word) for word in words)
    for order in _ORDERS:
        if match := order.fullmatch(plain):
            break
    else:
        raise UsageError(
            f"a caption of shapes has its words in another order; got '{text}', write {_EXAMPLE}"
        )
    found = match.groupdict()
    background = re.fullmatch(_GROUND, found["ground"])[1]
    if "one" in found:
        size, colour, shape, place = re.fullmatch(rf"{_THING}(?: {_PLACE})?", found["one"]).groups()
        return Claim(background, (ClaimedObject(colour, shape, size or "medium"),), _PLACE_NAMES.get(place))
    said = re.fullmatch(rf"{_THING} {_RELATION} {_THING}", found["two"]).groups()
    size, colour, shape, relation, size2, colour2, shape2 = said
    if relation.endswith(" of"):
        relation = f"to the {relation.split()[-2]} of"
    first = ClaimedObject(colour, shape, size or "medium")
    return Claim(background, (first, ClaimedObject(colour2, shape2, size2 or "medium")), relation)


_EXAMPLE = (
    "for example 'a small red circle on the left on a white background' "
    "or 'a red circle above a blue square on a white background'"
)


def paraphrase(claim: Claim, rng: np.random.Generator) -> str:
    """Say a claim in other words: other names, background first, relation turned round, articles left out."""
    if claim.where in CONVERSE and rng.random() < 0.3:
        claim = Claim(claim.background, claim.objects[::-1], CONVERSE[claim.where])
    core = " ".join(
        p for p in (claim.objects[0].caption, claim.where, *(o.caption for o in claim.objects[1:])) if p
    )
    ground = f"a {claim.background} background"
    orders = (f"{core} on {ground}", f"{core}, {ground}", f"on {ground}, {core}", f"{ground} with {core}")
    words = []
    for word in _choice(rng, orders).split():
        others = tuple(other for other, plain in SYNONYMS.items() if plain == word != "a")
        words.append(_choice(rng, others) if others and rng.random() < 0.4 else word)
    if rng.random() < 0.2:
        words = [word for word in words if word != "a"]
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(words)) if rng.random() < 0.5 else " ".join(words)


def as_array(picture: Image.Image) -> np.ndarray:
    """Turn a picture into (h, w, 3) float32 in [-1, 1]."""
    return np.asarray(picture, np.float32) / 127.5 - 1


class ShapesDataset:
    """`length` scenes with captions, made when asked for; item i depends on seed, split and i alone.

    An item is {"image": (h, w, 3) float32 in [-1, 1], "caption": str, "txt": the same str}. Works with
    a torch DataLoader (any number of workers) as it is.

    Args:
        size: pixels a side of the picture (`image_size` is the same thing and wins).
        paraphrase: share of captions in other words than the grammar's, 0 to 1.

    Raises:
        UsageError: paraphrase outside [0, 1], or an unknown split.
        IndexError: an index outside the length.
    """

    def __init__(
        self,
        size: int = 128,
        length: int = 100_000,
        seed: int = 0,
        split: str = "train",
        image_size: int | None = None,
        paraphrase: float = 0.0,
    ):
        if not 0 <= paraphrase <= 1:
            raise UsageError(f"paraphrase is a share between 0 and 1; got {paraphrase}")
        if split not in _SPLITS:
            raise UsageError(f"split must be train, test or any; got '{split}'")
        self.size = size if image_size is None else image_size
        self.length, self.seed, self.split, self.paraphrase = length, seed, split, paraphrase

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        return sample_scene(self._rng(index), self.split)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"an index must be in 0..{self.length - 1}, the dataset's length; got {index}")
        rng = self._rng(index)
        scene = sample_scene(rng, self.split)
        caption = paraphrase(scene.claim, rng) if rng.random() < self.paraphrase else scene.caption
        return {"image": as_array(render(scene, self.size)), "caption": caption, "txt": caption}

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, _SPLITS.index(self.split), index))


_SPLITS = ("train", "test", "any")


def batches(dataset: ShapesDataset, batch_size: int, start: int = 0) -> Iterator[dict]:
    """Yield batches for ever, in order and beginning again after the last item; `start` counts batches.

    A batch is {"image": (b, h, w, 3) float32 tensor, "caption": list[str], "txt": the same list}.
    """
    import torch

    while True:
        items = [dataset[(start * batch_size + i) % len(dataset)] for i in range(batch_size)]
        captions = [item["caption"] for item in items]
        images = torch.from_numpy(np.stack([item["image"] for item in items]))
        yield {"image": images, "caption": captions, "txt": captions}
        start += 1


def evaluation_scenes(count: int = 500, seed: int = 0, split: str = "train") -> list[Scene]:
    """The fixed scenes that models are judged by: `count` different captions of one split."""
    rng = np.random.default_rng((2010_02502, seed, _SPLITS.index(split)))
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, split)
        scenes.setdefault(scene.caption, scene)
    return list(scenes.values())


def shapes_prompts(count: int = 500, seed: int = 0, split: str = "train") -> list[str]:
    """The captions of `evaluation_scenes`."""
    return [scene.caption for scene in evaluation_scenes(count, seed, split)]
