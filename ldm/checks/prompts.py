"""A request's prompts, checked: texts, features in their place, and other programs' languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.adapters.use import adapters_of, check_adapters, is_of_places, text_scope
from ldm.errors import UsageError, shown
from ldm.limits import CELLS, MAX_PROMPT
from ldm.models.diffusion.conditions import area_of
from ldm.prompt.encode import Rows
from ldm.prompt.language import Prompt
from ldm.prompting import find_loras, is_composed, read_all, refuse_terms, terms_at_work, warn_of_prompts

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


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
        first = [(given.sampler, given.steps)]
        found = read_all(model, given, first, prompts, negatives)
        read_ = list(found.values())
        regional = read_all(model, given, first, [one.prompt for one in given.regions], ())
        refuse_in_regions(regional.values(), given.emphasis)
        read_ += regional.values()
        further = []
        for one in others:
            own = [[] if text is None else [text] for text in (one["own_prompt"], one["own_negative_prompt"])]
            again = read_all(model, given, one["schedule"] or first, *own)
            read_ += again.values()
            further += [prompt for (_, is_negative), prompt in again.items() if not is_negative]
        warn_of_prompts(model.cond_stage_model, read_)
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


def check_regions(
    checked: Mapping[str, Any],
    passes: Sequence[Mapping[str, Any]],
    adapters: Any,
    embeds: Tensor | None,
    f: int,
) -> None:
    """Raise UsageError for regions that cannot be painted: too small, or beside what is about the whole picture.

    Args:
        passes: width and height of each pass.
    """
    regions = checked["regions"]
    if not regions:
        return
    if embeds is not None:
        raise UsageError("regions have prompts of their own, and prompt_embeds were given; leave one out")
    if checked["frame"] is not None and checked["frame"].box is not None:
        raise UsageError(
            "regions are shares of the whole picture, and inpaint_full_res paints a part of it; leave one out"
        )
    for i, region in enumerate(regions):
        for one in passes:
            area = area_of(region.box, one["width"] // f, one["height"] // f)
            if min(area[2:]) < CELLS[0]:
                raise UsageError(
                    f"regions[{i}] must be at least {CELLS[0] * f} pixels wide and high, got {area[2] * f} x "
                    f"{area[3] * f} of {one['width']} x {one['height']}; give it a larger share, or the picture "
                    "more pixels"
                )
    attached = [*(adapters if isinstance(adapters, list | tuple) else ()), *adapters_of(checked)]
    for one in terms_at_work(attached):
        raise UsageError(f"{type(one).__name__} does not go together with regions; leave one out")
    for one in attached:
        if is_of_places(one):
            raise UsageError(
                f"{type(one).__name__} is of places of the whole picture, and regions are answered in cuttings of it; "
                "leave one out"
            )


def refuse_in_regions(prompts: Iterable[Prompt], emphasis: str | None) -> None:
    """Raise UsageError for prompts of regions that are of several parts, or that name LoRAs."""
    for prompt in prompts:
        if is_composed(prompt, emphasis):
            raise UsageError(
                "a region's prompt of several parts or with a weight for the whole (AND) is not defined; give each "
                "part a region of its own, or the region the weight"
            )
        if prompt.tags:
            raise UsageError(
                "a region's prompt has <lora:...> tags, and a LoRA is attached for the whole picture; write them into "
                "the prompt"
            )
