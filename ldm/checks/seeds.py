"""A request's seeds, checked, and the images that they make."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.errors import UsageError, shown
from ldm.limits import CELLS, MAX_SEED, SHARED_RNGS, about_whole, is_whole
from ldm.passes import ImageSpec

RANDOM_SEEDS = (None, -1, "random")  # what stands for "draw one"


def draw_seed() -> int:
    """Draw a seed; below 2^31, so that seed + i stays within the 32 bits that the generator on the CPU keeps."""
    return secrets.randbelow(2**31)


def is_list(value: Any) -> bool:
    """Tell whether a value is a list of values, and no text."""
    return isinstance(value, np.ndarray | Sequence) and not isinstance(value, str | bytes)


def list_seeds(seed: Any, count: int, name: str = "seed") -> list[int]:
    """List one seed for each of count images: seed + i, or a list as given.

    None, -1 and "random" draw one, also within a list.

    Args:
        name: what errors call it.

    Raises:
        UsageError: no such seed, or a list of another length.
    """

    def one(value: Any, high: int) -> int:
        if value is None or (isinstance(value, str | int | np.integer) and value in RANDOM_SEEDS):
            return draw_seed()
        if not is_whole(value, 0, high):
            raise UsageError(
                f"{name} must be {about_whole(0, high)}, or -1, 'random' or None to draw one; got {shown(value)}"
            )
        return int(value)

    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if is_list(seed):
        if len(seed) != count:
            raise UsageError(
                f"a list of {name}s must name one for each image, wanted {count}, got {len(seed)}"
            )
        return [one(value, MAX_SEED) for value in seed]
    first = one(seed, MAX_SEED - count + 1)
    return [first + i for i in range(count)]


def list_images(
    prompts: Sequence[str],
    negatives: Sequence[str],
    seed: Any,
    variation_seed: Any,
    has_embeds: bool,
    checked: Mapping[str, Any],
) -> list[ImageSpec]:
    """List the images of a request: each prompt num_images times, each with its seed."""
    count = checked["num_images"]
    seeds, variations = list_seeds(seed, len(prompts) * count), [None] * (len(prompts) * count)
    if checked["variation_strength"] > 0:
        variations = list_seeds(variation_seed, len(seeds), "variation_seed")
        if not is_list(seed):  # A1111's rule: variations of one picture
            seeds = [seeds[0]] * len(seeds)
    elif variation_seed is not None:
        raise UsageError("variation_seed needs a variation_strength above 0, got none; add one, up to 1")
    if checked["rng"] in SHARED_RNGS:
        if is_list(seed) and seeds not in (
            [seeds[0]] * len(seeds),
            [seeds[0] + i for i in range(len(seeds))],
        ):
            raise UsageError(
                f'rng="{checked["rng"]}" draws for all pictures of a call by one seed, got {shown(seed)}; give one '
                'seed, calls of their own, or rng="image" or "nv"'
            )
        seeds = [seeds[0]] * len(seeds)
    elif checked["fixed_code"]:
        seeds = [seeds[i % checked["batch_size"]] for i in range(len(seeds))]
    return [
        ImageSpec(
            prompts[i],
            negatives[i],
            seeds[i * count + j],
            i if has_embeds else None,
            variations[i * count + j],
            i * count + j,
        )
        for i in range(len(prompts))
        for j in range(count)
    ]


def check_extra_seeds(checked: Mapping[str, Any], f: int) -> None:
    """Raise UsageError for what departs from a picture's seed where no picture has a generator of its own."""
    names = ("variation_strength", "seed_resize_from", "eta_noise_seed_delta")
    used = [name for name in names if checked[name]]
    if used and checked["rng"] in SHARED_RNGS:
        raise UsageError(
            f'{used[0]} is of the noise of single pictures, and rng="{checked["rng"]}" draws whole batches; take '
            'rng="image" or "nv"'
        )
    size = checked["seed_resize_from"]
    most = CELLS[1] * f
    if size is not None and not f <= min(size) <= max(size) <= most:
        raise UsageError(
            f"seed_resize_from must be from {f} x {f} pixels, a latent cell, to {most} x {most}, "
            f"got {size[0]} x {size[1]}"
        )
