"""Masks to train inpainting with, drawn at random."""

import numpy as np
from PIL import Image, ImageDraw

EVERYTHING = 0.25  # how often all is masked, as in Stable Diffusion v1-5-inpainting's training


def draw_mask(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw what is to be repainted: (size, size) float32, 1 there and 0 elsewhere.

    A quarter of the masks cover everything, so that the model goes on to paint whole pictures. The others are one to
    four rectangles and strokes.
    """
    if rng.random() < EVERYTHING:
        return np.ones((size, size), np.float32)
    mask = Image.new("1", (size, size))
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.integers(1, 5)):
        if rng.random() < 0.5:
            width, height = rng.integers(size // 8, size // 2 + 1, 2)
            left, top = rng.integers(0, size - width + 1), rng.integers(0, size - height + 1)
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=1)
        else:
            points = [tuple(point) for point in rng.integers(0, size, (rng.integers(2, 6), 2)).tolist()]
            draw.line(points, fill=1, width=int(rng.integers(size // 16 + 1, size // 6 + 2)), joint="curve")
    return np.asarray(mask, np.float32)
