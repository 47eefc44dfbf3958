"""Prompts of a request in other programs' languages: read and checked, their tags found as files, and encoded."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.adapters.lora import LoRA
from ldm.adapters.use import text_scope
from ldm.errors import AbsentError, UsageError, nearest, refuse_elsewhere, shown
from ldm.models.diffusion.conditions import Condition, ScheduledCondition
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.introspect import downsampling
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.seams import GuidanceTerm
from ldm.prompt import a1111, comfyui, compel
from ldm.prompt.encode import Rows, check_weights, encode
from ldm.prompt.language import Explanation, Prompt, read
from ldm.sampler_names import NAMES

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
MOST_ROWS = 1024  # chunks whose features are kept from one batch or pass to the next


def reads_languages(request: Any) -> bool:
    """Tell whether prompts go through ldm.prompt: plain ones do not, unless a layer before the last is asked for."""
    return request.prompt_syntax != "plain" or request.clip_skip != 1


def read_all(
    model: LatentDiffusion,
    request: Any,
    schedule: Sequence[tuple[str, int]],
    prompts: Iterable[str],
    negatives: Iterable[str],
) -> dict[tuple[str, bool], Prompt]:
    """Read prompts and negative prompts: (text, whether it is a negative one) -> what it says.

    Embeddings count that are attached to the text encoder at the time.

    Args:
        request: has prompt_syntax, emphasis and old_schedule.
        schedule: sampler and steps of the passes over which a schedule in a prompt counts its steps, this one last.

    Raises:
        UsageError: a prompt that its language cannot read, or a model whose text encoder is not CLIP's.
    """
    encoder = model.cond_stage_model
    if not isinstance(encoder, FrozenCLIPEmbedder):
        raise UsageError(
            f"prompt_syntax and clip_skip are for CLIP's text encoder, and this model has {type(encoder).__name__}; "
            "leave them out"
        )
    # The web UI counts calls of the network, of which some samplers make two a step.
    calls = {names.name: names.calls for names in NAMES}

    def called(sampler: str, steps: int) -> int:
        return steps * (2 if calls.get(sampler, "S").startswith("2 S") else 1)

    options = {"encoder": encoder, "steps": called(*schedule[0])}
    if len(schedule) > 1:  # in the second pass of hires fix steps count on from the first
        options["hires_steps"] = called(*schedule[-1])
    if request.emphasis == "none":
        if request.prompt_syntax not in ("a1111", "plain"):
            raise UsageError(
                "emphasis 'none' (brackets are text) is A1111's, and prompt_syntax is "
                f"{shown(request.prompt_syntax)}; take 'ignore', or prompt_syntax='a1111'"
            )
        options["weighted"] = False
    options["old_schedule"] = request.old_schedule
    wanted = dict.fromkeys([*((one, False) for one in prompts), *((one, True) for one in negatives)])
    # The web UI does not look for AND in negative prompts.
    found = {
        (text, is_negative): read(text, request.prompt_syntax, joined=not is_negative, **options)
        for text, is_negative in wanted
    }
    for prompt in found.values():
        check_weights(chunk for part in prompt.parts for one in part.schedule for chunk in one.chunks)
    return found


def is_composed(prompt: Prompt, emphasis: str | None) -> bool:
    """Tell whether guidance adds up several parts of a prompt, or weighs its only one: A1111's AND.

    Args:
        emphasis: of the request; with any, the texts of compel's `.and()` and `.blend()` are parts, too.
    """
    is_one = prompt.tree is not None and emphasis is None
    return not is_one and (len(prompt.parts) > 1 or prompt.parts[0].weight != 1)


def terms_at_work(attachments: Iterable[Any]) -> list[Any]:
    """List what adds to guidance: PAG, SAG."""
    return [one for one in attachments if isinstance(one, GuidanceTerm) and getattr(one, "scale", 1)]


def refuse_terms(prompts: Iterable[Prompt], emphasis: str | None, attachments: Iterable[Any]) -> None:
    """Raise UsageError for guidance terms (PAG, SAG) beside a prompt of several parts: of which is not defined."""
    terms = terms_at_work(attachments)
    if terms and any(is_composed(one, emphasis) for one in prompts):
        raise UsageError(
            f"{type(terms[0]).__name__} does not go together with a prompt of several parts or with a weight for the "
            "whole (AND); leave one out"
        )


def warn_of_prompts(encoder: FrozenCLIPEmbedder, prompts: Iterable[Prompt]) -> None:
    """Say what prompts ask for that is not painted: embeddings of ComfyUI's that are not there, swaps of compel's.

    Call it while the embeddings that are there are attached to the text encoder, as `read_all`.
    """
    prompts = list(prompts)
    names = [] if encoder.extra_tokens is None else encoder.extra_tokens.names
    read_ = [one for one in prompts if one.syntax == "comfyui"]
    absent = [comfyui.absent(one.parts[0].schedule[0].segments, one.vocabulary.embedding) for one in read_]
    for name in dict.fromkeys(name for names in absent for name in names):
        near = nearest(re.split(r"[/\\]", name)[-1], names)
        hint = "give --embedding FILE, in Python adapters=[Embedding(file)]"
        hint = f"did you mean {near!r}?" if near else hint
        log.warning("no embedding goes by %s, it is painted without; %s", shown(name), hint)
    if any(one.tree is not None and compel.has_swaps(one.tree) for one in prompts):
        log.warning(
            "a .swap() exchanges attention while denoising, which is not done here: its first side is painted; "
            "ldm.adapters.PromptToPrompt paints both prompts with one layout (docs/editing.md)"
        )


def tags_of(text: str, syntax: str) -> tuple[Any, ...]:
    """List the tags of a prompt, such as <lora:name:0.8> or withLora(name, 0.8), without encoding it."""
    if syntax == "compel":
        with contextlib.suppress(UsageError):  # which `read_all` raises, too
            return tuple(compel.parse(text).loras)
    return tuple(a1111.split_tags(a1111.without_comments(text))[1]) if syntax == "a1111" else ()


def find_loras(prompts: Sequence[Prompt], folder: str | os.PathLike | None) -> list[LoRA]:
    """Find the LoRAs that the tags of prompts name, in a folder and those in it.

    What is not found is painted without, as in the web UI, and said.

    Raises:
        UsageError: prompts whose tags differ: what is attached to a model is attached for all. AbsentError: no folder.
        LdmError: a file that is no LoRA.
    """
    tags = [[tag for tag in prompt.tags] for prompt in prompts]
    if any(one != tags[0] for one in tags):
        raise UsageError(
            "the prompts of one call have different <lora:...> tags, and a LoRA is attached for all of them; "
            "paint these prompts in calls of their own"
        )
    files = list_loras(folder)
    found = []
    for tag in tags[0] if tags else ():
        if tag.kind not in ("lora", "lyco"):
            log.warning("<%s:%s> is a tag of a kind that is not here; it is left out", tag.kind, tag.name)
        elif tag.name in files:
            text_weight, weight = tag.weights()
            found.append(LoRA(files[tag.name], weight, text_weight))
        else:
            near = nearest(tag.name, files)
            hint = f"did you mean {near!r}?" if near else f"there are {len(files)} files in lora_dir"
            hint = hint if folder is not None else "give lora_dir (--lora-dir), the folder that it is in"
            log.warning("no LoRA goes by %s, it is painted without; %s", shown(tag.name), hint)
    return found


def list_loras(folder: str | os.PathLike | None) -> dict[str, Path]:
    """List the files of a folder, and of those in it, that may be LoRAs, by their names without an ending.

    Raises:
        AbsentError: it is no folder.
    """
    if folder is None:
        return {}
    refuse_elsewhere("lora_dir", folder)
    if not Path(folder).is_dir():
        raise AbsentError(f"lora_dir '{folder}' is no folder; give the one with the LoRAs that prompts name")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)
    return {path.stem: path for path in reversed(files)}


def encode_batch(
    model: LatentDiffusion, request: Any, one: Any, batch: Sequence[Any], shared: dict[str, Any]
) -> tuple[ScheduledCondition, ScheduledCondition | None]:
    """Encode the prompts of a batch and, if guidance needs them, the negative ones.

    Args:
        request, one, batch: a Request of ldm.request, one of its passes, and its images that are painted together.
        shared: keeps the text encoder's adapters, and the features of chunks, from one batch or pass to the next.
    """
    encoder = model.cond_stage_model
    if "text_scope" not in shared:
        shared["text_scope"] = text_scope(model, request.adapters)
    with shared["text_scope"]:
        read_ = read_all(
            model,
            request,
            one.counted,
            [*(spec.prompt for spec in batch), *(region.prompt for region in request.regions)],
            (spec.negative_prompt for spec in batch),
        )
        # diffusers reads the negative prompt at the last layer.
        layers = [request.clip_skip, 1 if request.clip_skip_of == "prompt" else request.clip_skip]
        halves: list[Rows] = shared.setdefault("rows", [Rows(encoder, layer) for layer in layers])
        for rows in halves:
            if len(rows.known) > MOST_ROWS:
                rows.known.clear()
        has_parts = any(
            is_composed(prompt, request.emphasis)
            for (_, is_negative), prompt in read_.items()
            if not is_negative
        )
        by_text = {}
        for half, rows in zip((False, True), halves, strict=True):
            names = [name for name in read_ if name[1] is half]
            found = encode(encoder, [read_[name] for name in names], emphasis=request.emphasis, rows=rows)
            by_text |= zip(names, found, strict=True)

    def conditions(text: str, is_negative: bool = False, **changes: Any) -> list[Condition]:
        own = by_text[text, is_negative].conditions()
        return [replace(part, context=part.context.to(model.device), **changes) for part in own]

    regional = [
        part
        for region in request.regions
        for part in conditions(
            region.prompt, weight=region.weight, area=one.area_of(region, downsampling(model))
        )
    ]
    context = ScheduledCondition([[*conditions(spec.prompt), *regional] for spec in batch])
    is_guided = one.guidance_scale != 1 or SAMPLERS[one.sampler].needs_unconditional
    if not is_guided and not has_parts:
        return context, None
    return context, ScheduledCondition([conditions(spec.negative_prompt, True) for spec in batch])


def explanations(model: LatentDiffusion, request: Any) -> list[str]:
    """Say how each distinct prompt of a request is read, pass by pass where that is not the same."""
    regional = [region.prompt for region in request.regions]
    passes = []
    with text_scope(model, request.adapters):
        for one in request.passes:
            batch = one.images(request.images)
            prompts = [spec.prompt for spec in batch]
            negatives = [spec.negative_prompt for spec in batch]
            read_ = read_all(model, request, one.counted, [*prompts, *regional], negatives)
            lines = []
            for (text, is_negative), prompt in read_.items():
                whose = "negative " if is_negative else "" if text in prompts else "region "
                if text or not is_negative:
                    lines.append(f"{whose}{Explanation(prompt)}")
            passes.append(lines)
    if all(lines == passes[0] for lines in passes):
        return passes[0]
    return [f"pass {number}: {line}" for number, lines in enumerate(passes, start=1) for line in lines]
