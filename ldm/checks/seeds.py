"""A request's seeds, checked, and the images that they make."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.errors import UsageError, shown
from ldm.limits import CELLS, MAX_SEED, SEED, SHARED_RNGS, about_whole, is_whole
from ldm.passes import ImageSpec

RANDOM_SEEDS = (None, -1, "random")  # what stands for "draw one"


def draw_seed() -> int:
    """Draw a seed; below 2^31, so that seed + i stays within the 32 bits that the generator on the CPU keeps."""
    return secrets.randbelow(2**31)


def is_list(value: Any) -> bool:
    """Tell whether a value is a list of values, and no text."""
    return isinstance(value, np.ndarray | Sequence) and not isinstance(value, str | bytes)


def seeds_from(first: int, name: str = "seed") -> Iterator[int]:
    """Give first, first + 1, first + 2 and on: one for each picture that shares a count of seeds.

    Raises:
        UsageError: there is none left, which is said when it is asked for.
    """
    yield from range(first, MAX_SEED + 1)
    raise UsageError(
        f"picture i has {name} + i, at most {MAX_SEED}, and after {MAX_SEED - first + 1} none is left; take a "
        f"smaller {name}, got {first}"
    )


def list_seeds(seed: Any, count: int, name: str = "seed") -> list[int]:
    """List one seed for each of count images: seed + i, or a list as given.

    None, -1 and "random" draw one, also within a list.

    Args:
        name: what errors call it.

    Raises:
        UsageError: no such seed, or a list of another length.
    """

    def one(value: Any) -> int:
        if value is None or (isinstance(value, str | int | np.integer) and value in RANDOM_SEEDS):
            return draw_seed()
        if not is_whole(value, *SEED):
            raise UsageError(
                f"{name} must be {about_whole(*SEED)}, or -1, 'random' or None to draw one; got {shown(value)}"
            )
        return int(value)

    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if is_list(seed):
        if len(seed) != count:
            raise UsageError(
                f"a list of {name}s must name one for each image, wanted {count}, got {len(seed)}"
            )
        return [one(value) for value in seed]
    return list(itertools.islice(seeds_from(one(seed), name), count))


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
    pictures = len(prompts) * count
    varies, is_shared = checked["variation_strength"] > 0, checked["rng"] in SHARED_RNGS
    if is_list(seed):
        seeds = list_seeds(seed, pictures)
    else:  # one for variations of one picture, A1111's rule, and for all noise of a call
        different = 1 if varies or is_shared else checked["batch_size"] if checked["fixed_code"] else pictures
        seeds = list_seeds(seed, min(different, pictures))
        seeds = [seeds[i % len(seeds)] for i in range(pictures)]
    variations = [None] * pictures
    if varies:
        variations = list_seeds(variation_seed, pictures, "variation_seed")
    elif variation_seed is not None:
        raise UsageError("variation_seed needs a variation_strength above 0, got none; add one, up to 1")
    if is_shared:
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
