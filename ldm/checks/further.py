"""The passes of a request after the first, checked: hires fix, loops, tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm import options
from ldm.checks.picture import check_size
from ldm.checks.prompts import list_texts
from ldm.checks.sampling import check_sampling
from ldm.errors import UsageError
from ldm.hires import load_upscaler
from ldm.limits import CELLS, about_whole
from ldm.models.diffusion.levels import explicit_levels
from ldm.passes import Pass, start_from_before
from ldm.sources import Source

# How much of the way from the first strength to the last is gone after a share of the loops (A1111 1.6).
LOOP_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "aggressive": lambda share: math.sin(share * math.pi / 2),
    "lazy": lambda share: 1 - math.cos(share * math.pi / 2),
}

if TYPE_CHECKING:
    from ldm.checkpoints.sampling import SamplingDefaults
    from ldm.models.diffusion.ddpm import LatentDiffusion


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
        As ldm.hires.load_upscaler.
    """
    enlarged, (width, height) = sizes
    words = (checked["hires_upscaler"], checked["upscaler_dir"], tuple(options.UPSCALERS), model.device)
    upscaler = load_upscaler("hires_upscaler", *words)
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
    if explicit_levels(spacing) is not None:
        raise UsageError("a list of sigmas or of t is of one pass; name hires_spacing for the second")
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
        checked["arithmetic"],
    )
    # Of all levels that the sampler visits, which may be more than its steps.
    run_last = max(1, found.pop("run_last") * count // steps)
    return {
        "width": width,
        "height": height,
        **of_sampler,
        **found,
        **(
            {}
            if checked["hires_guidance_scale"] is None
            else {"guidance_scale": checked["hires_guidance_scale"]}
        ),
        **second_texts(checked, embeds),
        "start": start_from_before(strength, run_last, upscaler, enlarged),
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


def check_loops(
    model: LatentDiffusion, defaults: SamplingDefaults, checked: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Give what is otherwise than in the first pass in those that repaint what the pass before gave, A1111's loopback.

    Strength goes from the first's to that of the last along a curve; each has the next seed; what was filled under a
    mask is now painted. One so weak that no step is left is not run.
    """
    count, first = checked["loops"], checked["strength"]
    last = first if checked["loop_strength"] is None else checked["loop_strength"]
    found = []
    for i in range(1, count):
        share = LOOP_CURVES[checked["loop_curve"]](i / (count - 1))
        strength = round(first + (last - first) * share, 12)  # so that the last is what was asked for
        asked = (checked[name] for name in ("sampler", "steps", "spacing", "eta"))
        how = {name: checked[name] for name in options.of_samplers()}
        rules = checked["arithmetic"], checked["strength_rule"]
        run_last = check_sampling(model, defaults, *asked, strength, how, *rules)["run_last"]
        if run_last > 0:
            same = (
                "original",
                "image_hash",
                "mask",
                "frame",
                "mask_rule",
                "mask_cells",
                "kept",
                "strength_rule",
            )
            around = {name: checked[name] for name in same}
            size = checked["width"], checked["height"]
            start = start_from_before(strength, run_last, "lanczos", size, **around)
            same = {"width": size[0], "height": size[1], "own_prompt": None, "own_negative_prompt": None}
            found.append({**same, "start": start, "schedule": (), "seed_offset": i})
    return found


def tile_passes(first: Pass, tiles: Sequence[Source]) -> tuple[Pass, ...]:
    """Give a pass for each tile of a picture, each with the next seed; see ldm.passes.Request.tiles."""
    return tuple(
        first.replace(image=one.pixels, original=one.frame.original, frame=one.frame, seed_offset=i)
        for i, one in enumerate(tiles)
    )
