"""Real pictures: invert one to its noise, sample it back, and sample it under another prompt.

`invert`, `sample` and `edit` have the names and arguments of the tutorials that write them out. With method="tutorial"
they do what those do, step for step; every other method goes over the same levels up and down, keeps as many latents as
there are steps, and says how well it comes back. `StableDiffusion.invert` and `.edit` take pictures and say more.

A further method is a class of ldm.models.diffusion.inversion_base; a further way to edit is a context, adapters
or an `after` for `Inversion.sample`, with `context_of` and `network_of` to make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ldm
from ldm import images as pictures
from ldm.adapters.use import vae_scope
from ldm.edit_parts import (
    TUTORIAL,
    check_latents,
    context_of,
    encode_picture,
    joined,
    load_image,
    network_of,
    one_text,
)
from ldm.edit_pictures import Edited, edit_picture, invert_picture, psnr, scene_of
from ldm.errors import UsageError, shown
from ldm.generate import decode
from ldm.limits import whole
from ldm.models.diffusion.inversion import Inversion, Method, Run, plan_of, resolve_method, spelt, walk_up
from ldm.models.diffusion.inversion_base import DDIM, finite, rise, walk_down
from ldm.models.diffusion.levels import Level, alpha_bar_table, choose_levels, make_plan, run_levels
from ldm.models.introspect import downsampling, native_size

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

__all__ = [
    "Edited",
    "context_of",
    "edit",
    "edit_picture",
    "encode_picture",
    "invert",
    "invert_picture",
    "load_image",
    "network_of",
    "psnr",
    "sample",
    "scene_of",
]
_DEFAULT_STEPS = 30  # of sample, in the tutorial
# What the two are told beside a method's options, for the hint to whoever misspells it.
_OF_INVERT = (
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "spacing",
    "adapters",
    "measure",
    "device",
)
_OF_SAMPLE = (*_OF_INVERT[:-2], "start_step", "start_latents", "generator", "device")


@torch.no_grad()
def invert(
    start_latents: Tensor,
    prompt: str | Sequence[str],
    guidance_scale: float = 3.5,
    num_inference_steps: int = 80,
    num_images_per_prompt: int = 1,
    do_classifier_free_guidance: bool = True,
    negative_prompt: str | Sequence[str] = "",
    device: str | torch.device | None = None,
    *,
    sd: ldm.StableDiffusion | None = None,
    method: str | Method = "ddim",
    spacing: str | Sequence[float] | None = None,
    adapters: Sequence[Any] = (),
    measure: bool = True,
    **options: Any,
) -> Inversion | Tensor:
    """Walk clean latents up to the noise that leads back to them.

    Args:
        start_latents: (b, c, h, w) in scaled units, of `encode_picture`; one for each prompt and image of it.
        do_classifier_free_guidance: False is guidance_scale 1.
        device: where the model is already; another is refused.
        sd: None takes the model in the box.
        method: a name of ldm.models.diffusion.inversion.METHODS, an object of these, or "tutorial".
        spacing: which levels, see ldm.models.diffusion.levels.visited_levels; None = the method's own.
        adapters: of ldm.adapters.
        measure: walk down again as well, so that `Inversion.error` is known.
        options: of the method's class.

    Returns:
        an Inversion: as many latents as steps, `inversion[-(s + 1)]` those from which start_step s begins. By
        "tutorial" its tensor, (steps - 2) * b latents one after the other: the picture counts as one at level 1, the
        first step and the last are left out, and so `inverted[-(s + 1)]` lies a level below the one where start_step s
        begins.

    Raises:
        UsageError: a value out of range, latents of another shape, an unknown method or option.
        NumericError: latents that are not finite.
    """
    sd = _model(sd, device)
    scale = guidance_scale if do_classifier_free_guidance else 1.0
    shared = {"copies": num_images_per_prompt, "adapters": adapters}
    T = sd.model.num_timesteps
    _check_words("invert", "num_inference_steps", options)
    by_tutorial = _by_tutorial(method, spacing=spacing, **options)
    whole("num_inference_steps", num_inference_steps, *((3, T - 1) if by_tutorial else (1, T)))
    chosen = DDIM() if by_tutorial else resolve_method(method, _OF_INVERT, [TUTORIAL], **options)
    network = network_of(sd, adapters)
    context = context_of(sd, prompt, scale, negative_prompt, **shared)
    z = check_latents(sd.model, start_latents, len(context.conditioning))
    if not by_tutorial:
        levels = plan_of(chosen, sd.model, num_inference_steps, spacing)
        return walk_up(network, chosen, z, context, levels, measure=measure)
    run = Run(network, context, (), z.dtype)
    levels = _tutorial_levels(sd.model, num_inference_steps)[-2:0:-1]

    def step(x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        x = rise(x, run.eps(x, to), here, to)
        return x, x

    return torch.cat([finite(done.x_t, "the inversion") for done in run_levels(levels, z, step)])


@torch.no_grad()
def sample(
    prompt: str | Sequence[str],
    start_step: int = 0,
    start_latents: Tensor | Inversion | None = None,
    guidance_scale: float = 3.5,
    num_inference_steps: int = _DEFAULT_STEPS,
    num_images_per_prompt: int = 1,
    do_classifier_free_guidance: bool = True,
    negative_prompt: str | Sequence[str] = "",
    device: str | torch.device | None = None,
    *,
    sd: ldm.StableDiffusion | None = None,
    method: str | Method = "ddim",
    spacing: str | Sequence[float] | None = None,
    adapters: Sequence[Any] = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Sample from latents of a step on, or from noise: pictures, one for each prompt and image of it.

    Args:
        start_step: how many steps are left out.
        start_latents: what `invert` gave, an Inversion whole, which knows its method, levels and number of steps; or
            latents (b, c, h, w), of one level, or (1, b, c, h, w) for code that writes inverted[-(s + 1)][None];
            None draws noise from `generator`, on the CPU, of the model's own size.
        method: of latents: "ddim", "tutorial", or a sampler's name. "tutorial" goes over diffusers' "leading" levels
            981, 961, ..., 1 (of 50 steps) and stays at level 1 in its last step.
        the rest: as of `invert`.

    Raises:
        As invert; also a start_step outside the run.
    """
    sd = _model(sd, device)
    of_cpu = isinstance(generator, torch.Generator) and generator.device.type == "cpu"
    if generator is not None and (start_latents is not None or not of_cpu):
        raise UsageError(
            "generator must be a torch.Generator on the CPU, and draws the noise of start_latents=None; got "
            f"{shown(generator)} and start_latents {'absent' if start_latents is None else 'given'}"
        )
    _check_words("sample", "num_inference_steps", options)
    scale = guidance_scale if do_classifier_free_guidance else 1.0
    network = network_of(sd, adapters)
    context = context_of(sd, prompt, scale, negative_prompt, copies=num_images_per_prompt, adapters=adapters)
    rows = len(context.conditioning)
    if isinstance(start_latents, Inversion):
        _check_left_out(start_latents, num_inference_steps, method, spacing, options)
        x = start_latents.sample(context, start_step, network=network)
    else:
        by_tutorial = _by_tutorial(method, spacing=spacing, **options)
        T = sd.model.num_timesteps - by_tutorial
        steps = whole("num_inference_steps", num_inference_steps, 1, T)
        whole("start_step", start_step, 0, steps - 1)
        chosen = DDIM() if by_tutorial else resolve_method(method, _OF_SAMPLE, [TUTORIAL], **options)
        if not chosen.from_latents:
            raise UsageError(
                f"{chosen.name} needs what its way up remembered: give start_latents the Inversion, not its latents"
            )
        if by_tutorial:
            levels = _tutorial_levels(sd.model, steps)
        else:
            levels = plan_of(chosen, sd.model, steps, spacing)
        x = _noise(sd.model, rows, generator) if start_latents is None else start_latents
        if isinstance(x, Tensor) and x.dim() == 5 and len(x) == 1:
            x = x[0]
        x = check_latents(sd.model, x, rows)
        run = Run(network, context, levels, x.dtype)
        x = walk_down(run, chosen, chosen.resume(run, x), start_step)
    with vae_scope(sd.model, joined(sd, adapters)):
        return pictures.to_pil(decode(sd.model, x))


def edit(
    input_image: Any,
    input_image_prompt: str,
    edit_prompt: str,
    num_steps: int = 100,
    start_step: int = 30,
    guidance_scale: float = 3.5,
    *,
    sd: ldm.StableDiffusion | None = None,
    method: str | Method = "ddim",
    **options: Any,
) -> Image.Image:
    """Change a picture: invert it under its own prompt, and sample under another from start_step on.

    Args:
        input_image: see `encode_picture`.
        method: "tutorial" draws the picture's latents, inverts with guidance 3.5 whatever guidance_scale is, and
            samples from `inverted[-(start_step + 1)]`.
        options: of `StableDiffusion.edit`, which takes several edit prompts as well; of "tutorial" none but adapters
            and negative_prompt.

    Raises:
        As invert and sample.
    """
    sd = _model(sd, None)
    _check_words("edit", "num_steps", options)
    edit_prompt = one_text("edit_prompt", edit_prompt)
    of_tutorial = {name: options[name] for name in ("adapters", "negative_prompt") if name in options}
    if not _by_tutorial(method, **{name: options[name] for name in options.keys() - of_tutorial.keys()}):
        how = {
            "steps": num_steps,
            "start_step": start_step,
            "guidance_scale": guidance_scale,
            "method": method,
        }
        return edit_picture(sd, input_image, input_image_prompt, edit_prompt, **how, **options).images[0]
    shared = {"num_inference_steps": num_steps, "sd": sd, "method": method, **of_tutorial}
    whole("num_steps", num_steps, 3, sd.model.num_timesteps - 1)
    whole(f"start_step of {num_steps} steps by '{TUTORIAL}'", start_step, 0, num_steps - 3)
    z, _ = encode_picture(sd, input_image, draw=True, adapters=options.get("adapters", ()))
    inverted = invert(z, input_image_prompt, **shared)
    how = {"start_latents": inverted[-(start_step + 1)][None], "start_step": start_step}
    return sample(edit_prompt, guidance_scale=guidance_scale, **how, **shared)[0]


def _model(sd: ldm.StableDiffusion | None, device: str | torch.device | None) -> ldm.StableDiffusion:
    """Give the pipeline, that of the model in the box for None, if it is where it is said to be."""
    sd = ldm.StableDiffusion.default() if sd is None else sd
    if not isinstance(sd, ldm.StableDiffusion):
        raise UsageError(
            "sd must be a StableDiffusion (of a pipeline with diffusers' words: pipe.sd), or None for that of the "
            f"model in the box, got {shown(sd)}"
        )
    try:
        elsewhere = device is not None and torch.device(device).type != sd.device.type
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be one such as 'cpu' or 'cuda', got {shown(device)}") from None
    if elsewhere:
        raise UsageError(f"the model is on {sd.device}, got device={shown(device)}; move it by sd.to(...)")
    return sd


def _check_words(function: str, word: str, options: dict[str, Any]) -> None:
    """Raise UsageError where the number of steps is given in our word instead of the tutorial's."""
    if "steps" in options:
        raise UsageError(
            f"{function} takes the number of steps as {word}, got steps={shown(options['steps'])}"
        )


def _by_tutorial(method: Any, **given: Any) -> bool:
    """Tell whether a method is the tutorial's; raise UsageError if something is given that it has no choice of."""
    if spelt(method) != TUTORIAL:
        return False
    if extra := sorted(name for name, value in given.items() if value is not None):
        raise UsageError(
            f"the method '{TUTORIAL}' has its own levels and no options; leave {', '.join(extra):.100} out"
        )
    return True


def _check_left_out(
    inversion: Inversion, steps: Any, method: Any, spacing: Any, options: dict[str, Any]
) -> None:
    """Raise UsageError where something is asked for that an Inversion has its own of."""
    if steps not in (_DEFAULT_STEPS, len(inversion)):
        raise UsageError(
            f"the Inversion has {len(inversion)} steps, got num_inference_steps={shown(steps)}; leave it out"
        )
    if method != "ddim" and (
        spelt(method) == TUTORIAL
        or resolve_method(method, _OF_SAMPLE, [TUTORIAL], **options).name != inversion.method.name
    ):
        raise UsageError(f"the Inversion is of {inversion.method.name}, got {shown(method)}; leave it out")
    if spacing is not None or options:
        raise UsageError("an Inversion knows its levels and options; leave spacing and options out")


def _tutorial_levels(model: LatentDiffusion, steps: int) -> list[Level]:
    """List the tutorial's levels, noisiest first: i * (T // steps) + 1, and the end, its clamp to level 1."""
    alpha_bar = alpha_bar_table(model)
    t = choose_levels("leading", steps, len(alpha_bar))
    return make_plan(t, alpha_bar[t], alpha_bar[1])


def _noise(model: LatentDiffusion, rows: int, generator: torch.Generator | None) -> Tensor:
    f = downsampling(model)
    return torch.randn(rows, model.channels, *(side // f for side in native_size(model)), generator=generator)
