"""What a caller asks of a model: a request, every part of it checked before any work is done."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import os
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm import options
from ldm.adapters.deepcache import DeepCache, check_cache
from ldm.adapters.tome import TokenMerging, check_merging
from ldm.adapters.use import PromptWords, adapters_of, check_adapters, check_batches, text_scope

# Some of these are for those who import them from here, or from ldm.wish as this module was called.
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype  # noqa: F401
from ldm.errors import UsageError, shown
from ldm.limits import (
    AUTO,
    AUTO_AT_MOST,
    AUTO_CELLS,
    CELLS,
    MAX_PROMPT,
    MAX_SEED,
    SHARE,
    about_whole,
    is_whole,
    real,
    whole,
)
from ldm.models.diffusion.samplers import (
    SAMPLERS,
    split_options,
    split_sampler,
    start_level,
)
from ldm.models.introspect import context_width, downsampling, dtype_of, is_inpainting, native_size  # noqa: F401
from ldm.options import Values, defaults_of
from ldm.other_words import check_keywords
from ldm.process.sigmas import check_sigmas
from ldm.prompt.encode import Rows
from ldm.prompting import find_loras, read_all, reads_languages, refuse_terms, warn_of_embeddings

if TYPE_CHECKING:
    from PIL import Image

    from ldm.checkpoints.sampling import SamplingDefaults
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

RANDOM_SEEDS = (None, -1, "random")  # what stands for "draw one"


# --- the request ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSpec:
    """What one image is made of beside the options that the whole request shares."""

    prompt: str
    negative_prompt: str
    seed: int
    row: int | None = None  # into prompt_embeds, where those were given
    variation_seed: int | None = None  # with variation_strength


class _InSections:
    """A dataclass some of whose fields are sections (Values), whose values are its attributes as well."""

    def _field_of(self, name: str) -> str | None:
        """Name the field that is, or whose section has, a value."""
        if name in vars(self):
            return name
        sections = (field for field, one in vars(self).items() if isinstance(one, Values))
        return next((field for field in sections if name in vars(vars(self)[field])), None)

    def __getattr__(self, name: str) -> Any:
        field = self._field_of(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no {name}", name=name, obj=self)
        return vars(vars(self)[field])[name]

    def replace(self, **changes: Any) -> Any:
        """Make another one, of which these values differ, each a field or of a section."""
        fields: dict[str, Any] = {}
        for name, value in changes.items():
            field = self._field_of(name)
            if field is None:
                raise TypeError(f"{type(self).__name__} has no {name}")
            within = fields.get(field, vars(self)[field])
            fields[field] = value if field == name else within.replace(**{name: value})
        return replace(self, **fields)


class Start(Values):
    """What a pass begins with: the options of the section "start", and these."""

    kind: Literal["noise", "picture", "before"]  # the last: what the pass before gave
    strength: float | None  # how much of that is forgotten; None with noise
    run_last: int  # of the steps, where strength is set
    image: Tensor | None  # (1, 3, height, width) in [-1, 1], for the encoder
    original: Tensor | None  # the same in [0, 1], as it comes back where nothing is painted
    image_hash: str | None
    mask: Tensor | None  # (1, 1, height, width), 1 = repaint
    upscaler: str | None  # with "before": by which that is enlarged, of ldm.options.UPSCALERS
    enlarged: tuple[int, int] | None  # to which width and height, of which the middle is painted


@dataclass(frozen=True, eq=False, repr=False)
class Pass(_InSections):
    """One run from noise, or a noised picture, to latents; a request has one or several, each with a size of its own.

    Values of its sections are its attributes, too: `one.steps` is `one.sampling.steps`.

    Args:
        width, height: in pixels.
        sampling, guidance: the options of these sections, which ldm.generate.denoise takes.
        own_prompt, own_negative_prompt: of all images in this pass; None is each image's.
        schedule: sampler and steps of the passes over which schedules in prompts count their steps, this one last;
            nothing is this pass alone.
    """

    width: int
    height: int
    sampling: Values
    guidance: Values
    start: Start
    own_prompt: str | None = None
    own_negative_prompt: str | None = None
    schedule: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def count(self) -> int:
        """How many steps are run, as far as that is known before: some samplers visit a level more."""
        return self.sampling.steps if self.start.strength is None else self.start.run_last

    @property
    def gives_its_picture(self) -> bool:
        """Whether no step is run, so that the picture to start from comes back as it is."""
        return self.start.kind == "picture" and self.start.run_last == 0

    @property
    def counted(self) -> tuple[tuple[str, int], ...]:
        """The schedule, which is this pass's own where none is given."""
        return self.schedule or ((self.sampling.sampler, self.sampling.steps),)

    def images(self, batch: Sequence[ImageSpec]) -> list[ImageSpec]:
        """Give the images of a batch as this pass paints them."""
        texts = {"prompt": self.own_prompt, "negative_prompt": self.own_negative_prompt}
        own = {name: text for name, text in texts.items() if text is not None}
        return [replace(spec, **own) for spec in batch]

    def __repr__(self) -> str:
        how = f"{self.sampler}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"Pass({self.start.kind}, {self.width} x {self.height}, {how})"


@dataclass(frozen=True, eq=False, repr=False)
class Request(_InSections):
    """What a caller asks of a model, every part of it checked; check_request makes them.

    Values of its sections and of its first pass are its attributes, too: `request.steps` is
    `request.passes[0].sampling.steps`.

    Args:
        images: what each image is made of.
        passes: painted one after the other; all but the first may begin with what the one before gave.
        language, draw, network, further, output: the options of these sections, see ldm.options.SECTIONS.
        adapters: those that were given.
        embeds, negative_embeds: (n, tokens, d) features in the place of prompts.
    """

    images: list[ImageSpec]
    passes: tuple[Pass, ...]
    language: Values
    draw: Values
    network: Values
    further: Values
    output: Values
    adapters: tuple[Any, ...] = ()
    embeds: Tensor | None = None
    negative_embeds: Tensor | None = None

    @property
    def mode(self) -> Literal["txt2img", "img2img", "inpaint"]:
        """What the first pass begins with."""
        start = self.passes[0].start
        return "txt2img" if start.kind == "noise" else "img2img" if start.mask is None else "inpaint"

    @property
    def attachments(self) -> list[Any]:
        """The adapters, and those that options stand for."""
        return [*self.adapters, *adapters_of(vars(self.network))]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what comes out."""
        return self.passes[-1].size

    def __getattr__(self, name: str) -> Any:
        first = vars(self).get("passes", ())[:1]
        if self._field_of(name) is None and first and hasattr(first[0], name):
            return getattr(first[0], name)
        return super().__getattr__(name)

    def replace(self, **changes: Any) -> Request:
        """Make another one, of which these values differ, each a field, of a section or of the first pass."""
        first, *others = self.passes
        of_first = {
            name: changes.pop(name)
            for name in list(changes)
            if self._field_of(name) is None and hasattr(first, name)
        }
        if of_first:
            changes["passes"] = (first.replace(**of_first), *others)
        return super().replace(**changes)

    def __repr__(self) -> str:
        how = f"{self.sampler}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"Request({self.mode}, {len(self.images)} of {self.width} x {self.height}, {how})"


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
    given = SimpleNamespace(**{**keywords, **given})
    # What needs the model, or several options together; the others are checked by their kinds.
    is_inpainting(model)  # refuses UNets of other kinds
    f = downsampling(model)
    checked = check_picture(image, mask, given.strength, given.width, given.height, f, defaults)
    sizes = check_second_size(given, checked, f)
    if isinstance(given.batch_size, str) and given.batch_size == AUTO:
        width, height = (checked["width"], checked["height"]) if sizes is None else sizes[1]
        given.batch_size = auto_batch_size(height // f, width // f)
    if given.guidance_scale is None:
        given.guidance_scale = defaults.guidance_scale
    prompts, negatives = list_prompts(prompt, given.negative_prompt, prompt_embeds, negative_prompt_embeds)
    check_embeds(prompt_embeds, negative_prompt_embeds, context_width(model))
    for name in options.of_samplers():
        value = getattr(given, name)
        checked[name] = None if value is None else options.option(name).kind.check(name, value)
    of_sampler = {name: checked[name] for name in options.of_samplers()}
    checked |= check_sampling(
        model, defaults, given.sampler, given.steps, given.spacing, given.eta, checked["strength"], of_sampler
    )
    words = [*prompts, *negatives] if prompt_embeds is None else []
    checked |= check_kinds(given, checked)
    # Of hires fix: what is otherwise in each pass after the first.
    others = [] if sizes is None else [check_second(model, defaults, checked, sizes, prompt_embeds)]
    if words and reads_languages(SimpleNamespace(**checked)):
        adapters = check_language(model, SimpleNamespace(**checked), prompts, negatives, adapters, others)
    own_texts = (one[name] for one in others for name in ("own_prompt", "own_negative_prompt"))
    words += [text for text in own_texts if text is not None]
    checked |= check_adapting(
        model, words, adapters, given.cache_interval, given.cache_depth, given.merge_ratio, given.merge_seed
    )
    check_extra_seeds(checked, f)
    check_adapters(model, adapters_of(checked))
    specs = list_images(
        prompts, negatives, given.seed, given.variation_seed, prompt_embeds is not None, checked
    )
    check_batches(checked["adapters"], len(specs), checked["batch_size"])
    first = first_pass(checked)
    return Request(
        images=specs,
        passes=(first, *(first.replace(**one) for one in others)),
        **{name: Values.of(name, checked) for name in ("language", "draw", "network", "further", "output")},
        adapters=checked["adapters"],
        embeds=prompt_embeds,
        negative_embeds=negative_prompt_embeds,
    )


def first_pass(checked: Mapping[str, Any]) -> Pass:
    """Make the first pass out of checked values by name."""
    names = ("image", "original", "image_hash", "mask", "run_last")
    start = Start.of(
        "start",
        checked,
        kind="noise" if checked["image"] is None else "picture",
        upscaler=None,
        enlarged=None,
        **{name: checked[name] for name in names},
    )
    how = {name: Values.of(name, checked) for name in ("sampling", "guidance")}
    return Pass(checked["width"], checked["height"], **how, start=start)


def start_from_before(
    strength: float, run_last: int, upscaler: str, enlarged: tuple[int, int], **options: Any
) -> Start:
    """Let a pass begin with what the one before gave: see Start.

    Args:
        options: of the section "start"; the others are at their defaults.
    """
    others = {
        "kind": "before",
        "strength": strength,
        "run_last": run_last,
        "upscaler": upscaler,
        "enlarged": enlarged,
    }
    none = dict.fromkeys(("image", "original", "image_hash", "mask"))
    return Start(**{**defaults_of("start"), **none, **options, **others})


def check_second_size(
    given: SimpleNamespace, checked: Mapping[str, Any], f: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Work out how large the second pass of hires fix is; None where none is asked for.

    Returns:
        (width, height) of the enlarged first pass, and of its middle that is painted, by A1111's rules.

    Raises:
        UsageError: beside a picture to start from, both of scale and size, or a size that cannot be painted.
    """
    first = checked["width"], checked["height"]
    if given.hires_scale is None and given.hires_size is None:
        of_it = [one.name for one in options.options() if one.group == options.HIRES]
        for name in of_it:
            if getattr(given, name) != options.option(name).default:
                raise UsageError(
                    f"{name} is of a second pass, and none is asked for; give hires_scale or hires_size"
                )
        return None
    if checked["mode"] != "txt2img":
        raise UsageError(
            f"hires_scale and hires_size are for pictures that begin with noise, and this is {checked['mode']}; "
            "enlarge the picture itself"
        )
    if given.hires_size is None:
        scale = options.option("hires_scale").kind.check("hires_scale", given.hires_scale)
        width, height = enlarged = tuple(int(side * scale) // f * f for side in first)
    elif given.hires_scale is not None:
        raise UsageError("hires_scale and hires_size say the same; give one of them")
    else:
        width, height = options.option("hires_size").kind.check("hires_size", given.hires_size)
        if not width and not height:
            raise UsageError("hires_size must have a side above 0, got 0 x 0")
        # Of another aspect it is covered, and the middle painted.
        by_width = not height or (width and first[0] * height < width * first[1])
        wide = (width, width * first[1] // first[0])
        enlarged = wide if by_width else (height * first[0] // first[1], height)
        width, height = width or enlarged[0] // f * f, height or enlarged[1] // f * f
    for side, pixels in (("width", width), ("height", height)):
        check_size(f"{side} of the second pass", pixels, f)
    most = CELLS[1] * f
    if max(enlarged) > most or enlarged[0] < first[0] // f * f or enlarged[1] < first[1] // f * f:
        raise UsageError(
            f"the second pass must enlarge the first of {first[0]} x {first[1]} to sides of at most {most} "
            f"before its middle is cut out, got {enlarged[0]} x {enlarged[1]}; give another hires_size"
        )
    return enlarged, (width, height)


def check_second(
    model: LatentDiffusion,
    defaults: SamplingDefaults,
    checked: Mapping[str, Any],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    embeds: Tensor | None,
) -> dict[str, Any]:
    """Check how the second pass of hires fix is sampled, and give what is otherwise in it than in the first.

    Steps are A1111's: so many are run, the last of a run of steps / strength.

    Raises:
        UsageError: a sampler or spacing that is none, or a strength so small that the model has not the levels.
    """
    enlarged, (width, height) = sizes
    strength, is_own = checked["hires_strength"], checked["hires_sampler"] is not None
    count, most = checked["hires_steps"] or checked["steps"], model.num_timesteps
    if strength * most < count:
        raise UsageError(
            f"{count} steps at hires_strength {strength:g} are the last of more than the model's {most} levels; "
            f"give hires_strength {math.ceil(1000 * count / most) / 1000:g} or more, or fewer hires_steps"
            if count <= most
            else f"hires_steps must be {about_whole(0, most)}, got {count}"
        )
    steps = int(count / strength)
    spacing = checked["hires_spacing"] or (None if is_own else checked["spacing"])
    if spacing is not None and not isinstance(spacing, str):
        raise UsageError("a list of sigmas is of one pass; name hires_spacing for the second")
    of_sampler = {name: None if is_own else checked[name] for name in options.of_samplers()}
    found = check_sampling(
        model,
        defaults,
        checked["hires_sampler"] if is_own else checked["sampler"],
        steps,
        spacing,
        None if is_own else checked["eta"],
        1.0,
        of_sampler,
    )
    # Of all levels that the sampler visits, which may be more than its steps.
    run_last = max(1, found.pop("run_last") * count // steps)
    return {
        "width": width,
        "height": height,
        **of_sampler,
        **found,
        **second_texts(checked, embeds),
        "start": start_from_before(strength, run_last, checked["hires_upscaler"], enlarged),
        "schedule": ((checked["sampler"], checked["steps"]), (found["sampler"], count)),
    }


def second_texts(checked: Mapping[str, Any], embeds: Tensor | None) -> dict[str, str | None]:
    """Check the prompt and the negative prompt of the second pass, where they are others than the first's."""
    for name in ("hires_prompt", "hires_negative_prompt"):
        if checked[name] is not None:
            list_texts(name, checked[name])
            if embeds is not None:
                raise UsageError(f"{name} is a text, and prompt_embeds were given; leave one out")
    return {
        "own_prompt": checked["hires_prompt"],
        "own_negative_prompt": checked["hires_negative_prompt"],
    }


def check_extra_seeds(checked: Mapping[str, Any], f: int) -> None:
    """Raise UsageError for what departs from a picture's seed where no picture has a generator of its own."""
    names = ("variation_strength", "seed_resize_from", "eta_noise_seed_delta")
    used = [name for name in names if checked[name]]
    if used and checked["rng"] == "compvis":
        raise UsageError(
            f'{used[0]} is of the noise of single pictures, and rng="compvis" draws whole batches; take rng="image" '
            'or "nv"'
        )
    size = checked["seed_resize_from"]
    most = CELLS[1] * f
    if size is not None and not f <= min(size) <= max(size) <= most:
        raise UsageError(
            f"seed_resize_from must be from {f} x {f} pixels, a latent cell, to {most} x {most}, "
            f"got {size[0]} x {size[1]}"
        )


def check_kinds(given: SimpleNamespace, checked: Mapping[str, Any]) -> dict[str, Any]:
    """Check by their kinds the options that nothing else has looked at."""
    found = {}
    for option in options.options():
        if option.keyword and not option.each and option.name not in (*checked, *_ADAPTING):
            value = getattr(given, option.name)
            is_left = value is None and option.default is None
            found[option.name] = None if is_left else option.kind.check(option.name, value)
    return found


def check_language(
    model: LatentDiffusion,
    given: SimpleNamespace,
    prompts: Sequence[str],
    negatives: Sequence[str],
    adapters: Any,
    others: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Read prompts in their language, and add the LoRAs that their tags name to the adapters.

    Args:
        others: what is otherwise in each pass after the first.

    Raises:
        UsageError: a prompt that its language cannot read, a clip_skip that the text encoder has not, PAG or SAG beside
            a prompt of several parts.
    """
    attached = adapters if isinstance(adapters, list | tuple) else ()  # another kind is refused later
    with text_scope(model, check_adapters(model, attached)):
        found = read_all(model, given, [(given.sampler, given.steps)], prompts, negatives)
        read_ = list(found.values())
        further = []
        for one in others:
            own = [[] if text is None else [text] for text in (one["own_prompt"], one["own_negative_prompt"])]
            again = read_all(model, given, one["schedule"], *own)
            read_ += again.values()
            further += [prompt for (_, is_negative), prompt in again.items() if not is_negative]
        warn_of_embeddings(read_)
    if any(one.tags and one.tags != found[text, False].tags for one in further for text in prompts):
        raise UsageError(
            "hires_prompt has other <lora:...> tags than the prompt, and a LoRA is attached for both passes; "
            "leave its tags out"
        )
    Rows(model.cond_stage_model, given.clip_skip)
    own = [found[text, False] for text in prompts]
    refuse_terms([*own, *further], given.emphasis, [*attached, *adapters_of(vars(given))])
    loras = find_loras(own, given.lora_dir)
    return [*attached, *loras] if loras else adapters


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
    if checked["rng"] == "compvis":
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
        )
        for i in range(len(prompts))
        for j in range(count)
    ]


# --- adapters -------------------------------------------------------------------------------------


def check_adapting(
    model: LatentDiffusion,
    prompts: Sequence[str],
    adapters: Any,
    cache_interval: Any,
    cache_depth: Any,
    merge_ratio: Any,
    merge_seed: Any,
) -> dict[str, Any]:
    """Check what is attached to the model, and warn of embeddings that none of the prompts names: they do nothing.

    TokenMerging and DeepCache among the adapters become the options that they stand for.

    Raises:
        UsageError: one of these twice, or beside its option.
    """
    unet = model.model.diffusion_model
    others: list[Any] = []
    knobs: dict[str, tuple[Any, Any]] = {}
    for one in check_adapters(model, adapters):
        if isinstance(one, TokenMerging):
            name, values, option, is_off = "merge", (one.ratio, one.seed), "merge_ratio", merge_ratio == 0
        elif isinstance(one, DeepCache):
            name, values, option, is_off = (
                "cache",
                (one.interval, one.depth),
                "cache_interval",
                cache_interval == 1,
            )
        else:
            others.append(one)
            continue
        if name in knobs or not is_off:
            raise UsageError(
                f"{type(one).__name__} is given twice, in adapters or as {option}; leave one out"
            )
        knobs[name] = values
    merge_ratio, merge_seed = check_merging(unet, *knobs.get("merge", (merge_ratio, merge_seed)))
    cache_interval, cache_depth = check_cache(unet, *knobs.get("cache", (cache_interval, cache_depth)))
    words = PromptWords.of(model, others) if prompts else None
    for embedding in [] if words is None else words.unnamed(model.cond_stage_model, prompts):
        log.warning(
            "no prompt names the embedding %s; write %s", embedding.file, " or ".join(embedding.names)
        )
    return {
        "adapters": tuple(others),
        "cache_interval": cache_interval,
        "cache_depth": cache_depth,
        "merge_ratio": merge_ratio,
        "merge_seed": merge_seed,
    }


def auto_batch_size(height: int, width: int) -> int:
    """Choose how many pictures of (height, width) latent cells are painted at once, the same on every machine.

    So a picture that is painted again meets the same neighbours, whose number its last bits depend on.
    """
    return max(1, min(AUTO_AT_MOST, AUTO_CELLS // (height * width)))


def check_sampling(
    model: LatentDiffusion,
    defaults: SamplingDefaults,
    sampler: Any,
    steps: Any,
    spacing: Any,
    eta: Any,
    strength: float | None,
    of_sampler: dict[str, Any],
) -> dict[str, Any]:
    """Check the sampler and its steps, and how many of them a picture's strength leaves to be run.

    Args:
        of_sampler: options that only some samplers or spacings have; None is not set.
    """
    sampler, spacing = split_sampler(sampler, spacing)
    if isinstance(spacing, Sequence | np.ndarray) and not isinstance(spacing, str):
        spacing = check_sigmas(spacing).tolist()
        steps = len(spacing) - 1 if steps is None else steps
    elif spacing is not None and not isinstance(spacing, str):
        raise UsageError(f"spacing must be a name, or a list of sigmas, got {shown(spacing)}")
    if steps is None:
        fewest = defaults.least_steps.get(sampler, 1)
        steps = min(max(defaults.steps, fewest), model.num_timesteps)
    steps = whole("steps", steps, 1, model.num_timesteps)
    # Refuses what no spacing has the name of.
    run_last, _ = start_level(sampler, model, steps, strength or 0.0, spacing=spacing, **of_sampler)
    eta = SAMPLERS[sampler].own_eta if eta is None else real("eta", eta, *SHARE)
    own, _ = split_options(SAMPLERS[sampler], of_sampler)
    SAMPLERS[sampler](None, eta=eta, **own)  # refuses values that it does not take
    return {"sampler": sampler, "steps": steps, "spacing": spacing, "eta": eta, "run_last": run_last}


# --- the picture: its size, and what is repainted -------------------------------------------------


def check_picture(
    image: Any, mask: Any, strength: Any, width: Any, height: Any, f: int, defaults: SamplingDefaults
) -> dict[str, Any]:
    """Check the size of what is painted, and the picture, mask and strength that it starts from."""
    size = (
        None if width is None else check_size("width", width, f),
        None if height is None else check_size("height", height, f),
    )
    pixels, original, marks, image_hash = read_pictures(image, mask, size, f)
    if pixels is None:
        if strength is not None:
            raise UsageError(
                f"strength is for a picture to start from, got strength={strength} and image=None"
            )
        height = size[1] or check_size("height", defaults.size[0], f)
        width = size[0] or check_size("width", defaults.size[1], f)
        mode = "txt2img"
    else:
        height, width = pixels.shape[2:]
        mode = "img2img" if marks is None else "inpaint"
        if strength is None:
            strength = 0.75 if marks is None else 1.0
        strength = real("strength", strength, *SHARE)
    return {
        "mode": mode,
        "height": height,
        "width": width,
        "image": pixels,
        "original": original,
        "image_hash": image_hash,
        "mask": marks,
        "strength": strength,
    }


def check_size(name: str, value: int, f: int) -> int:
    """Return a side in pixels if the model can paint it.

    Raises:
        UsageError: it is no multiple of f, or out of range; the nearest two sides that work are named.
    """
    low, high = (cells * f for cells in CELLS)
    if not is_whole(value, low, high):
        raise UsageError(f"{name} must be a multiple of {f} from {low} to {high}, got {shown(value)}")
    if value % f:
        below = value - value % f
        raise UsageError(
            f"{name} must be a multiple of {f}, got {value}; the nearest two that work are {below} and {below + f}"
        )
    return int(value)


def read_pictures(
    image: Any, mask: Any, size: tuple[int | None, int | None], f: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, str | None]:
    """Read a picture, in [-1, 1] and as it is given back in [0, 1], and a mask, of one size; and the picture's hash."""
    if image is None:
        if mask is not None:
            raise UsageError("a mask needs a picture to repaint, got mask and image=None")
        return None, None, None, None
    if isinstance(image, Tensor):
        pixels = _as_picture("image", image, 3)
        for name, side in zip(("width", "height"), (pixels.shape[3], pixels.shape[2]), strict=True):
            check_size(name, side, f)
        if size[0] not in (None, pixels.shape[3]) or size[1] not in (None, pixels.shape[2]):
            raise UsageError(
                f"an image given as a tensor keeps its size, got {tuple(pixels.shape)} and {size}"
            )
        most = pixels.float().abs().max().item()
        if not pixels.is_floating_point() or most > 2:
            raise UsageError(
                "an image given as a tensor must be floating point from -1 (black) to 1 (white), "
                f"got {dtype_name(pixels.dtype)} up to {most:g}; bytes x are 2 * (x / 255) - 1"
            )
        original = pictures.given_unit(pixels.cpu())
        pixels = pixels.float().cpu()
    else:
        image = _open("image", image)
        sides = [side or own - own % f for side, own in zip(size, image.size, strict=True)]
        for name, side in zip(("width of the picture", "height of the picture"), sides, strict=True):
            check_size(name, side, f)
        if tuple(sides) != image.size:
            log.info("the picture was resized from %s to %s", image.size, tuple(sides))
        pixels = pictures.to_tensor(pictures.fit_size(pictures.to_rgb(image), f, tuple(sides)))
        original = pictures.given_unit(pixels)
    marks = None
    if mask is not None:
        at = (pixels.shape[3], pixels.shape[2])
        if isinstance(mask, Tensor):
            marks = (_as_picture("mask", mask, 1).float().cpu() >= 0.5).float()
            if marks.shape[2:] != pixels.shape[2:]:
                raise UsageError(f"mask must have the picture's size {at}, got {tuple(marks.shape)}")
        else:
            mask = _open("mask", mask)
            if mask.size != at:
                log.info("the mask was resized from %s to %s", mask.size, at)
            marks = pictures.to_mask(mask, at)
        if not marks.any():
            raise UsageError("the mask marks nothing; paint white what is to be repainted")
    return pixels, original, marks, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:10]


def _as_picture(name: str, value: Tensor, channels: int) -> Tensor:
    if value.dim() != 4 or value.shape[:2] != (1, channels) or not torch.isfinite(value).all():
        raise UsageError(
            f"{name} must be a finite (1, {channels}, height, width) tensor, got {tuple(value.shape)}"
        )
    return value


def _open(name: str, value: Any) -> Image.Image:
    from PIL import Image

    if isinstance(value, str | os.PathLike):
        return pictures.open_image(value)
    if isinstance(value, Image.Image):
        return pictures.upright(value)
    raise UsageError(f"{name} must be a PIL picture, a path or a tensor, got {type(value).__name__}")


# --- prompts and seeds ----------------------------------------------------------------------------


def list_prompts(
    prompt: Any, negative: Any, embeds: Any, negative_embeds: Any
) -> tuple[list[str], list[str]]:
    """List as many negative prompts as prompts; features given in their place are checked."""
    if embeds is None:
        if negative_embeds is not None:
            raise UsageError("negative_prompt_embeds goes with prompt_embeds, got prompt_embeds=None")
        prompts = list_texts("prompt", prompt)
    else:
        for name, one in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)):
            if not isinstance(one, Tensor) or one.dim() != 3 or one.shape != embeds.shape:
                got = tuple(one.shape) if isinstance(one, Tensor) else shown(one)
                raise UsageError(f"{name} must be (n, tokens, d), both alike, got {got}")
        prompts = list_texts("prompt", "" if prompt is None else prompt)
        prompts = prompts * len(embeds) if len(prompts) == 1 else prompts
        if len(prompts) != len(embeds):
            raise UsageError(
                f"prompt_embeds holds {len(embeds)} prompts, but {len(prompts)} prompts were given"
            )
    negatives = list_texts("negative_prompt", "" if negative is None else negative)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(
            f"negative_prompt must be one text, or one for each of {len(prompts)} prompts, got {len(negatives)}"
        )
    return prompts, negatives


def list_texts(name: str, value: Any) -> list[str]:
    """List one text, or several, that the tokenizer can read, or raise UsageError."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} must be a text or a list of texts with one at least, got {shown(value)}")
    for text in texts:
        if len(text) > MAX_PROMPT:
            raise UsageError(f"{name} must have at most {MAX_PROMPT} characters, got {len(text)}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name} holds characters that are no text (lone surrogates): {shown(text)}"
            ) from None
    return texts


def check_embeds(embeds: Any, negative_embeds: Any, width: int | None) -> None:
    """Raise UsageError for text features that the UNet cannot read: of another width, whole numbers, or not finite.

    Args:
        width: features of a token that the UNet's cross-attentions read; None where that is not known.
    """
    for one in (embeds, negative_embeds):
        if not isinstance(one, Tensor):
            continue
        if width is not None and one.shape[-1] != width:
            raise UsageError(f"prompt_embeds must have {width} features a token, got {tuple(one.shape)}")
        if not one.is_floating_point() or one.is_meta or not torch.isfinite(one).all():
            raise UsageError(
                f"prompt_embeds must be finite floating-point numbers, got {one.dtype}: {shown(one)}"
            )


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
