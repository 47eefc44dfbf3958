"""A request's prompts where they are templates: each image's texts drawn by its seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ldm import options
from ldm.checks.seeds import is_list, list_seeds
from ldm.errors import UsageError, shown
from ldm.passes import ImageSpec
from ldm.prompt.variants import Wildcards, draw, parse

Texts = tuple[list[str], list[str]]  # prompts and negative prompts


def draws_texts(given: Any) -> bool:
    """Tell whether prompts are templates."""
    return bool(given.variants) or given.wildcards is not None


def draw_texts(
    given: Any,
    prompts: Iterable[str],
    negatives: Iterable[str],
    seeds: Iterable[int],
    known: dict[Any, Wildcards] | None = None,
) -> Texts:
    """Draw the texts of each image by its seed, the negative one by numbers of its own.

    Args:
        known: folders that were read before; a new one joins them.

    Raises:
        UsageError: a text that is no template. AbsentError, FormatError: a folder or file that cannot be read.
    """
    known = {} if known is None else known
    if given.wildcards not in known:
        known[given.wildcards] = Wildcards(given.wildcards)
    files = known[given.wildcards]
    drawn = [
        (draw(prompt, seed, files), draw(negative, f"negative {seed}", files))
        for prompt, negative, seed in zip(prompts, negatives, seeds, strict=True)
    ]
    return [one for one, _ in drawn], [other for _, other in drawn]


def list_templates(
    given: SimpleNamespace, prompts: Sequence[str], negatives: Sequence[str], has_embeds: bool
) -> Texts:
    """List the templates of each image, and let `given` say the seed of each, and that each is one image.

    Raises:
        UsageError: beside prompt_embeds, or a template as a prompt that is one for all images: of a later pass, or of
            a region.
    """
    for name in ("variants", "wildcards", "num_images", "variation_strength"):
        value = getattr(given, name)
        if value is not None:
            options.option(name).kind.check(name, value)
    if has_embeds:
        raise UsageError("variants and wildcards draw texts, and prompt_embeds were given; leave one out")
    texts = {name: getattr(given, name) for name in ("hires_prompt", "hires_negative_prompt")}
    regions = options.option("regions").kind.check("regions", given.regions)
    texts |= {f"the prompt of regions[{i}]": region.prompt for i, region in enumerate(regions)}
    for name, text in texts.items():
        if isinstance(text, str) and any(not isinstance(item, str) for item in parse(text)):
            raise UsageError(
                f"{name} is one text for all pictures, and none is drawn of it; got {shown(text)}"
            )
    count = given.num_images
    seeds = list_seeds(given.seed, len(prompts) * count)
    if given.variation_strength and not is_list(given.seed):  # variations of one picture have one text
        seeds = [seeds[0]] * len(seeds)
    given.seed, given.num_images = seeds, 1
    return [one for one in prompts for _ in range(count)], [one for one in negatives for _ in range(count)]


def with_templates(images: Sequence[ImageSpec], templates: Texts) -> list[ImageSpec]:
    """Let images say what their texts were drawn of, where that is another text."""
    return [
        replace(
            image,
            template=None if prompt == image.prompt else prompt,
            negative_template=None if negative == image.negative_prompt else negative,
        )
        for image, prompt, negative in zip(images, *templates, strict=True)
    ]
