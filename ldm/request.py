"""What a caller asks of a model: a request, every part of it checked before any work is done."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm import options, presets
from ldm.adapters.use import adapters_of, check_adapters, check_hints, check_parts, for_batch

# Some of these are for those who import them from here, or from ldm.wish as this module was called.
from ldm.checks.further import check_loops, check_second, check_second_size, tile_passes
from ldm.checks.picture import check_picture, check_size, read_pictures  # noqa: F401
from ldm.checks.prompts import check_embeds, check_language, check_regions, list_prompts, list_texts  # noqa: F401
from ldm.checks.sampling import auto_batch_size, check_adapting, check_sampling
from ldm.checks.seeds import check_extra_seeds, draw_seed, list_images, list_seeds  # noqa: F401
from ldm.checks.templates import draw_texts, draws_texts, list_templates, with_templates
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype  # noqa: F401
from ldm.limits import AUTO, MAX_SEED, is_whole, real, whole  # noqa: F401
from ldm.models.diffusion.samplers import check_rules, split_sampler
from ldm.models.diffusion.samplers.as_diffusers import RULES
from ldm.models.introspect import context_width, downsampling, dtype_of, is_inpainting, native_size  # noqa: F401
from ldm.options import PRESET, Values
from ldm.other_words import check_keywords
from ldm.passes import ImageSpec, Pass, Request, Start, first_pass, start_from_before  # noqa: F401
from ldm.prompting import reads_languages

if TYPE_CHECKING:
    from ldm.checkpoints.sampling import SamplingDefaults
    from ldm.models.diffusion.ddpm import LatentDiffusion

# Checked with the UNet that they work in.
_ADAPTING = ("cache_interval", "cache_depth", "merge_ratio", "merge_seed")

Job, Shot = Request, ImageSpec  # as they were called in ldm.wish


def _with_options(function: Callable[..., Request]) -> Callable[..., Request]:
    """Show every keyword of ldm.options in a function's signature and docstring."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in options.keywords().items()
    ]
    function.__signature__ = signature.replace(parameters=own + further)
    function.further_keywords = options.keywords  # asked at each call
    function.__doc__ = function.__doc__.replace(
        "        OPTIONS", textwrap.indent(options.describe(), " " * 8)
    )
    return function


def with_preset(given: dict[str, Any], mode: str) -> dict[str, Any]:
    """Fill the options that a caller gave up with those of the preset among them.

    Raises:
        UsageError: an unknown preset, or a sampler or spacing that is none.
    """
    if given.get(PRESET) is None:
        return given
    preset = options.option(PRESET).kind.check(PRESET, given[PRESET])
    return presets.filled(preset, given, mode, split_sampler)


@_with_options
def check_request(
    model: LatentDiffusion,
    defaults: SamplingDefaults,
    prompt: str | Sequence[str] | None,
    *,
    image: Any = None,
    mask: Any = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    adapters: Sequence[Any] = (),
    **given: Any,
) -> Request:
    """Check every part of a request against a model, without painting.

    Args:
        prompt: a text, or several; each is painted num_images times, in this order.
        image: PIL picture, path, or (1, 3, height, width) in [-1, 1]: repaint this one.
        mask: PIL picture, path, or (1, 1, height, width): white, or 1, is repainted, the rest kept.
        prompt_embeds, negative_prompt_embeds: (n, tokens, d) text features that replace the prompts'.
        adapters: of ldm.adapters: LoRA, Embedding, ControlNet, T2IAdapter, IPAdapter, TokenMerging, DeepCache, any
            number; docs/adapters.md, docs/controls.md.
        OPTIONS

    Raises:
        UsageError: a value out of range, or of another kind.
        MismatchError: an adapter that is for another model.
    """
    keywords = options.keywords()
    check_keywords("check_request", given, keywords)
    is_masked = mask is not None or given.get("outpaint") is not None
    given = with_preset(given, "txt2img" if image is None else "inpaint" if is_masked else "img2img")
    given = SimpleNamespace(**{**keywords, **given})
    # What needs the model, or several options together; the others are checked by their kinds.
    is_inpainting(model)  # refuses UNets of other kinds
    f = downsampling(model)
    checked = check_picture(image, mask, given, f, defaults, model.device)
    sizes = check_second_size(given, checked, f)
    if isinstance(given.batch_size, str) and given.batch_size == AUTO:
        width, height = (checked["width"], checked["height"]) if sizes is None else sizes[1]
        given.batch_size = auto_batch_size(height // f, width // f)
    if given.guidance_scale is None:
        given.guidance_scale = defaults.guidance_scale
    prompts, negatives = list_prompts(prompt, given.negative_prompt, prompt_embeds, negative_prompt_embeds)
    check_embeds(prompt_embeds, negative_prompt_embeds, context_width(model))
    templates = None
    if draws_texts(given):
        templates = list_templates(given, prompts, negatives, prompt_embeds is not None)
        prompts, negatives = draw_texts(given, *templates, given.seed)
    for name in options.of_samplers():
        value = getattr(given, name)
        checked[name] = None if value is None else options.option(name).kind.check(name, value)
    of_sampler = {name: checked[name] for name in options.of_samplers()}
    asked = (given.sampler, given.steps, given.spacing, given.eta)
    checked |= check_sampling(
        model, defaults, *asked, checked["strength"], of_sampler, given.arithmetic, given.strength_rule
    )
    words = [*prompts, *negatives] if prompt_embeds is None else []
    checked |= check_kinds(given, checked)
    if checked["arithmetic"] == "diffusers":
        check_rules(**{name: checked[name] for name in RULES})
    # Of hires fix and loops: what is otherwise in each pass after the first.
    others = [] if sizes is None else [check_second(model, defaults, checked, sizes, prompt_embeds)]
    others += check_loops(model, defaults, checked)
    check_regions(checked, [checked, *others], adapters, prompt_embeds, f)
    words += [region.prompt for region in checked["regions"]]
    if words and reads_languages(SimpleNamespace(**checked)):
        adapters = check_language(model, SimpleNamespace(**checked), prompts, negatives, adapters, others)
    own_texts = (one[name] for one in others for name in ("own_prompt", "own_negative_prompt"))
    words += [text for text in own_texts if text is not None]
    checked |= check_adapting(
        model, words, adapters, given.cache_interval, given.cache_depth, given.merge_ratio, given.merge_seed
    )
    check_extra_seeds(checked, f)
    check_adapters(model, [*checked["adapters"], *adapters_of(checked)])
    specs = list_images(
        prompts, negatives, given.seed, given.variation_seed, prompt_embeds is not None, checked
    )
    if templates is not None:
        specs = with_templates(specs, templates)
    check_hints(checked["adapters"], len(specs))
    first = first_pass(checked)
    request = Request(
        images=specs,
        passes=tile_passes(first, checked["tiles"][1]) or (first, *(first.replace(**one) for one in others)),
        tiles=checked["tiles"][0],
        **{name: Values.of(name, checked) for name in ("language", "draw", "network", "further", "output")},
        adapters=checked["adapters"],
        embeds=prompt_embeds,
        negative_embeds=negative_prompt_embeds,
    )
    check_parts(request)
    for start in range(0, len(specs), request.batch_size):
        for one in request.passes:
            for_batch(model, request, one.images(specs[start : start + request.batch_size]))
    return request


def check_kinds(given: SimpleNamespace, checked: Mapping[str, Any]) -> dict[str, Any]:
    """Check by their kinds the options that nothing else has looked at."""
    found = {}
    for option in options.options():
        if option.keyword and not option.each and option.name not in (*checked, *_ADAPTING):
            value = getattr(given, option.name)
            is_left = value is None and option.default is None
            found[option.name] = None if is_left else option.kind.check(option.name, value)
    return found
