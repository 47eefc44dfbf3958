"""Real pictures: invert one to its noise, sample it back, and sample it under another prompt.

`invert`, `sample` and `edit` have the names and arguments of the tutorials that write them out. With method="tutorial"
they do what those do, step for step; every other method goes over the same levels up and down, keeps as many latents as
there are steps, and says how well it comes back. `StableDiffusion.invert` and `.edit` take pictures and say more.

A further method is a class of ldm.models.diffusion.inversion_base; a further way to edit is a context, adapters
or an `after` for `Inversion.sample`, with `context_of` and `network_of` to make them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm import editing
from ldm import images as pictures
from ldm.adapters.deepcache import DeepCache
from ldm.adapters.use import check_adapters, text_scope, told_of, unet_attachments, vae_scope
from ldm.containers import MAX_BYTES
from ldm.errors import FormatError, MismatchError, UsageError, shown
from ldm.generate import WithAttachments, decode, encode_image, encode_prompt
from ldm.labels import labelled, plain
from ldm.limits import GUIDANCE_SCALE, real, whole
from ldm.models.diffusion.inversion import (
    Context,
    Inversion,
    Method,
    Network,
    Run,
    plan_of,
    resolve_method,
    walk_up,
)
from ldm.models.diffusion.inversion_base import DDIM, finite, rise, walk_down
from ldm.models.diffusion.levels import (
    Level,
    alpha_bar_table,
    choose_levels,
    make_plan,
    run_levels,
    unit_noise,
)
from ldm.models.introspect import downsampling, is_inpainting, native_size
from ldm.modules.seams import StepInfo
from ldm.request import list_texts, read_pictures

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

TUTORIAL = "tutorial"
_DEFAULT_STEPS = 30  # of sample, in the tutorial
KEPT_STEPS = 0.3  # of an edit's: the tutorial leaves 30 of 100 out


def load_image(path: str | os.PathLike | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture as RGB, upright by its EXIF orientation, resized to (width, height) if a size is given.

    Args:
        path: a file's, or the bytes of one. An address is refused: nothing is downloaded here, so that a picture is the
            same tomorrow and a program works without a network; download it, and give the file.
        size: in pixels; a number is both sides.

    Raises:
        AbsentError: no such file. UsageError: an address, or a size that is none. FormatError: no sound picture, or one
            of too many pixels.
    """
    if size is not None:
        sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
        if len(sides) != 2:
            raise UsageError(f"size must be (width, height) in pixels, got {size!r:.80}")
        sides = tuple(whole("size", side, 1, pictures.MAX_SIDE) for side in sides)
    from_bytes = isinstance(path, bytes | bytearray)
    if not from_bytes and not isinstance(path, str | os.PathLike):
        raise UsageError(f"load_image reads a file, by its path or its bytes, got {shown(path)}")
    picture = pictures.to_rgb(_from_bytes(path) if from_bytes else pictures.open_image(path))
    return picture if size is None else picture.resize(sides)


def _from_bytes(content: bytes) -> Image.Image:
    """Read a file that is in memory by the one reader of pictures, which takes files."""
    if len(content) > MAX_BYTES:
        raise FormatError(f"the picture has {len(content)} bytes; wanted at most {MAX_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")
        path.write_bytes(content)
        try:
            return pictures.open_image(path)
        except FormatError as error:
            raise FormatError(
                str(error).replace(f"picture '{path}'", "the picture in these bytes")
            ) from error


# --- a model, its prompts and its pictures ----------------------------------------------------------


class _Told(WithAttachments):
    """A model with what is attached to it, which an inversion tells where it is."""

    def at_level(self, level: Level, context: Context, images: int) -> None:
        self.step = StepInfo(level.total - level.left, level.total)
        self._unconditional, self._batch = context.unconditional, images


def joined(sd: ldm.StableDiffusion, adapters: Sequence[Any]) -> list[Any]:
    """Give those of a pipeline and those of a call together.

    Raises:
        UsageError: adapters that are no list.
    """
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        raise UsageError(
            f"adapters must be a list such as [LoRA('style.safetensors')], got {shown(adapters)}"
        )
    return [*sd.adapters, *adapters]


def network_of(sd: ldm.StableDiffusion, adapters: Sequence[Any] = (), **options: Any) -> Network:
    """Make a model into the network of an inversion; one for each walk up or down, for adapters may keep a state.

    Args:
        adapters: of ldm.adapters, attached at each call of the UNet, beside those of `sd.adapters`.
        options: of Denoiser, as guidance_rescale.

    Raises:
        UsageError: adapters that do not fit, or DeepCache. MismatchError: an inpainting model.
    """
    model = sd.model
    if is_inpainting(model):
        raise MismatchError(
            "inversion needs a UNet that sees nothing but the latents, got an inpainting model of 9 channels; "
            "take a plain one"
        )
    parts = check_adapters(model, joined(sd, adapters))
    if any(isinstance(one, DeepCache) for one in parts):
        raise UsageError("DeepCache keeps features from one step to the next cleaner one; leave it out here")
    return Network(_Told(model, sd.autocast, unet_attachments(parts), 0, 1, None), **options)


def context_of(
    sd: ldm.StableDiffusion,
    prompt: str | Sequence[str],
    guidance_scale: float = 1.0,
    negative_prompt: str | Sequence[str] = "",
    *,
    copies: int = 1,
    adapters: Sequence[Any] = (),
) -> Context:
    """Encode prompts into what a network is asked under: a row for each, `copies` times one after the other.

    Args:
        negative_prompt: one for all, or one for each.
        adapters: those of them that are for the text encoder are attached while it works.

    Raises:
        UsageError: prompts that are none, another number of negative ones, a guidance_scale out of range.
    """
    scale = real("guidance_scale", guidance_scale, *GUIDANCE_SCALE)
    whole("num_images_per_prompt", copies, 1, 1024)
    texts = [text for text in list_texts("prompt", prompt) for _ in range(copies)]
    negatives = [text for text in list_texts("negative_prompt", negative_prompt) for _ in range(copies)]
    negatives = negatives[:1] * len(texts) if len(negatives) == copies else negatives
    if len(negatives) != len(texts):
        raise UsageError(
            f"negative_prompt must be one, or one for each of {len(texts)} prompts, got {len(negatives)}"
        )
    with torch.no_grad(), text_scope(sd.model, check_adapters(sd.model, joined(sd, adapters))):
        c = encode_prompt(sd.model, texts)
        return Context(c, encode_prompt(sd.model, negatives) if scale != 1 else None, scale)


@torch.no_grad()
def encode_picture(
    sd: ldm.StableDiffusion, image: Any, *, draw: bool = False, adapters: Sequence[Any] = ()
) -> tuple[Tensor, Tensor]:
    """Turn a picture into latents (1, c, h, w), and give it as it is held against what comes back.

    Args:
        image: a path, the bytes of a file, a PIL picture, or a tensor (1, 3, height, width) in [-1, 1]. Files and PIL
            pictures are brought down to multiples of the model's cell, 8 pixels.
        draw: sample the first stage's distribution, as tutorials do, from torch's generator; else take its mean.

    Returns:
        latents in scaled units, float32, and the picture (1, 3, height, width) in [0, 1].

    Raises:
        UsageError, FormatError, AbsentError: no picture, or of a size that the model cannot take.
    """
    if isinstance(image, bytes | bytearray):
        image = load_image(image)
    pixels, unit, _ = read_pictures(image, None, (None, None), downsampling(sd.model))
    if pixels is None:
        raise UsageError("image must be a picture to invert, got None")
    with vae_scope(sd.model, joined(sd, adapters)):
        return encode_image(sd.model, pixels, 1, unit_noise if draw else torch.zeros_like), unit


def check_latents(model: LatentDiffusion, latents: Any, rows: int | None = None) -> Tensor:
    """Return latents (b, c, h, w) as float32 on the model's device, or raise UsageError if they are none of its own."""
    c = model.channels
    fits = isinstance(latents, Tensor) and latents.dim() == 4 and latents.is_floating_point()
    if not fits or latents.shape[1] != c or min(latents.shape) < 1 or rows not in (None, len(latents)):
        what = tuple(latents.shape) if isinstance(latents, Tensor) else shown(latents)
        raise UsageError(
            f"latents must be a floating-point tensor ({'b' if rows is None else rows}, {c}, h, w), got {what}; a "
            "picture becomes one by ldm.edit.encode_picture, and num_images_per_prompt says how many there are"
        )
    if not torch.isfinite(latents).all():
        raise UsageError("latents must be finite, got NaN or infinity")
    return latents.float().to(model.device)


# --- the tutorial's three functions -----------------------------------------------------------------


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
    by_tutorial = isinstance(method, str) and method == TUTORIAL
    whole("num_inference_steps", num_inference_steps, *((3, T - 1) if by_tutorial else (1, T)))
    if by_tutorial and (spacing is not None or options):
        raise UsageError(
            f"the method '{TUTORIAL}' has its own levels and no options; leave spacing and options out"
        )
    chosen = DDIM() if by_tutorial else resolve_method(method, **options)
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
            latents (b, c, h, w), of one level; None draws noise from `generator`, on the CPU, of the model's own size.
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
    scale = guidance_scale if do_classifier_free_guidance else 1.0
    network = network_of(sd, adapters)
    context = context_of(sd, prompt, scale, negative_prompt, copies=num_images_per_prompt, adapters=adapters)
    rows = len(context.conditioning)
    if isinstance(start_latents, Inversion):
        _check_left_out(start_latents, num_inference_steps, method, spacing, options)
        x = start_latents.sample(context, start_step, network=network)
    else:
        by_tutorial = isinstance(method, str) and method == TUTORIAL
        T = sd.model.num_timesteps - by_tutorial
        steps = whole("num_inference_steps", num_inference_steps, 1, T)
        whole("start_step", start_step, 0, steps - 1)
        if by_tutorial and (spacing is not None or options):
            raise UsageError(
                f"the method '{TUTORIAL}' has its own levels and no options; leave spacing and options out"
            )
        chosen = DDIM() if by_tutorial else resolve_method(method, **options)
        if not chosen.from_latents:
            raise UsageError(
                f"{chosen.name} needs what its way up remembered: give start_latents the Inversion, not its latents"
            )
        if by_tutorial:
            levels = _tutorial_levels(sd.model, steps)
        else:
            levels = plan_of(chosen, sd.model, steps, spacing)
        x = _noise(sd.model, rows, generator) if start_latents is None else start_latents
        x = check_latents(sd.model, x, rows)
        run = Run(network, context, levels, x.dtype)
        x = walk_down(run, chosen, chosen.resume(run, x), start_step)
    with vae_scope(sd.model, joined(sd, adapters)):
        return pictures.to_pil(decode(sd.model, x))


def edit(
    input_image: Any,
    input_image_prompt: str,
    edit_prompt: str | Sequence[str],
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
        options: of `StableDiffusion.edit`; of "tutorial" none but adapters and negative_prompt.

    Raises:
        As invert and sample.
    """
    sd = _model(sd, None)
    if "steps" in options:
        raise UsageError(f"edit takes the number of steps as num_steps, got steps={shown(options['steps'])}")
    if not (isinstance(method, str) and method == TUTORIAL):
        how = {
            "steps": num_steps,
            "start_step": start_step,
            "guidance_scale": guidance_scale,
            "method": method,
        }
        return edit_picture(sd, input_image, input_image_prompt, edit_prompt, **how, **options).images[0]
    shared = {"num_inference_steps": num_steps, "sd": sd, "method": method, **options}
    whole("num_steps", num_steps, 3, sd.model.num_timesteps - 1)
    whole(f"start_step of {num_steps} steps by '{TUTORIAL}'", start_step, 0, num_steps - 3)
    z, _ = encode_picture(sd, input_image, draw=True, adapters=options.get("adapters", ()))
    inverted = invert(z, input_image_prompt, **shared)
    how = {"start_latents": inverted[-(start_step + 1)][None], "start_step": start_step}
    return sample(edit_prompt, guidance_scale=guidance_scale, **how, **shared)[0]


# --- for people: pictures in, pictures out ----------------------------------------------------------


@dataclass(eq=False)
class Edited:
    """Edits of a picture with what they were made from; a notebook shows the first.

    Attributes:
        images: one for each edit prompt.
        source: the picture as the model saw it.
        reconstruction: the inversion sampled under its own prompt: what no edit can be better than.
        psnr: of the reconstruction against the source, in dB.
        ceiling: of the source through the first stage alone, in dB: the most that an inversion can reach.
        inversion: with its latents, error and cost.
    """

    images: list[Image.Image]
    source: Image.Image
    reconstruction: Image.Image
    psnr: float
    ceiling: float
    inversion: Inversion = field(repr=False)

    def sheet(self) -> Image.Image:
        """Lay source, reconstruction, edit and the difference of these two out in a row for each edit, with labels."""
        from PIL import ImageChops

        names = ["source", f"comes back at {self.psnr:.1f} of {self.ceiling:.1f} dB", "edit", "difference"]
        source = self.source.convert("RGB")
        rows = [
            [source, self.reconstruction, one, ImageChops.difference(source, one.convert("RGB"))]
            for one in self.images
        ]
        return labelled([one for row in rows for one in row], plain(names), plain([""] * len(rows)))

    def _repr_png_(self) -> bytes | None:
        return self.images[0]._repr_png_()


def invert_picture(
    sd: ldm.StableDiffusion,
    image: Any,
    prompt: str,
    *,
    method: str | Method = "ddim",
    steps: int = 50,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    spacing: str | Sequence[float] | None = None,
    adapters: Sequence[Any] = (),
    measure: bool = True,
    **options: Any,
) -> Inversion:
    """Invert a picture to the noise that the model makes it of: `StableDiffusion.invert`.

    Args:
        image: see `encode_picture`.
        prompt: what the picture shows.
        guidance_scale: None = the model's own.
        the rest: as of `invert`.

    Raises:
        As invert and encode_picture.
    """
    if isinstance(method, str) and method == TUTORIAL:
        raise UsageError(
            f"'{TUTORIAL}' is a method of the functions in ldm.edit; here 'ddim' is the aligned form"
        )
    chosen = resolve_method(method, **options)
    whole("steps", steps, 1, sd.model.num_timesteps)
    _one_text("prompt", prompt)
    scale = sd.defaults.guidance_scale if guidance_scale is None else guidance_scale
    z, _ = encode_picture(sd, image, adapters=adapters)
    how = {"negative_prompt": negative_prompt, "spacing": spacing, "adapters": adapters, "measure": measure}
    return invert(z, prompt, scale, steps, sd=sd, method=chosen, **how)


def edit_picture(
    sd: ldm.StableDiffusion,
    image: Any,
    image_prompt: str,
    edit_prompt: str | Sequence[str],
    *,
    method: str | Method = "ddim",
    steps: int = 50,
    start_step: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    spacing: str | Sequence[float] | None = None,
    adapters: Sequence[Any] = (),
    editor: Any = "swap",
    mask: Any = None,
    feather: float = 0.0,
    inversion_scale: float | None = None,
    **options: Any,
) -> Edited:
    """Change a picture by its prompt: `StableDiffusion.edit`.

    Args:
        image_prompt: what the picture shows.
        edit_prompt: what it is to show; several give several pictures.
        start_step: steps that are left out: the more, the less is changed. None = three in ten.
        editor: what else happens on the way down, a name of ldm.editing.EDITORS, as "prompt_to_prompt", or a control of
            attention of ldm.adapters.
        mask: as of inpaint: white is changed, black stays as it is, pixel by pixel.
        feather: pixels over which the mask fades to each side, 0 to 256.
        inversion_scale: of guidance on the way up, under image_prompt. None = 1 where latents are all that is kept of
            it, so that the noise holds little of that prompt; guidance_scale by the methods that come back from more.
        the rest: as of `invert_picture`.

    Raises:
        As invert_picture; also a start_step outside the run.
    """
    whole("steps", steps, 1, sd.model.num_timesteps)
    start_step = int(KEPT_STEPS * steps) if start_step is None else start_step
    whole("start_step", start_step, 0, steps - 1)
    scale = sd.defaults.guidance_scale if guidance_scale is None else guidance_scale
    way = editing.resolve_editor(editor)
    image_prompt = _one_text("image_prompt", image_prompt)
    edits = list_texts("edit_prompt", edit_prompt)
    controls = [way.control] if isinstance(way, editing.Controlled) else []
    told_of(sd.model, [*joined(sd, adapters), *controls], [image_prompt, *edits], [0] * (1 + len(edits)))
    _, unit, marks = read_pictures(
        load_image(image) if isinstance(image, bytes | bytearray) else image,
        mask,
        (None, None),
        downsampling(sd.model),
    )
    if feather and marks is None:
        raise UsageError(f"feather is of a mask, and none is given; got feather={shown(feather)}")
    marks = None if marks is None else editing.feathered(marks, feather)
    how = {"negative_prompt": negative_prompt, "spacing": spacing, "adapters": adapters, "steps": steps}
    if inversion_scale is None and not (isinstance(method, str) and method == TUTORIAL):
        inversion_scale = 1.0 if resolve_method(method, **options).from_latents else scale
    inversion = invert_picture(
        sd, image, image_prompt, method=method, guidance_scale=inversion_scale, **how, **options
    )
    inversion.measure()
    scene = scene_of(
        sd,
        inversion,
        image_prompt,
        edits,
        start_step,
        scale,
        negative_prompt=negative_prompt,
        adapters=adapters,
    )
    if marks is not None:
        scene = replace(scene, region=editing.region_of(marks, downsampling(sd.model)))
    # One by one: an edit is the same, bit for bit, whichever others are asked for.
    found = [way(replace(scene, edits=[one])) for one in edits]
    x = torch.cat([check_latents(sd.model, one, 1) for one in found])
    with torch.no_grad(), vae_scope(sd.model, joined(sd, adapters)):
        painted = pictures.to_unit(decode(sd.model, x)).cpu()
        again, best = pictures.to_pil(decode(sd.model, torch.cat([inversion.reconstruction, inversion.x0])))
    images = pictures.unit_to_pil(painted if marks is None else unit + marks * (painted - unit))
    source = pictures.unit_to_pil(unit)[0]
    return Edited(images, source, again, psnr(again, source), psnr(best, source), inversion)


def scene_of(
    sd: ldm.StableDiffusion,
    inversion: Inversion,
    image_prompt: str,
    edit_prompt: str | Sequence[str],
    start_step: int = 0,
    guidance_scale: float = 1.0,
    *,
    negative_prompt: str = "",
    adapters: Sequence[Any] = (),
) -> editing.Scene:
    """Put together what a way to edit (ldm.editing) works on, for an inversion of one picture; see `edit_picture`."""

    def context(prompts: Sequence[str]) -> Context:
        return context_of(sd, list(prompts), guidance_scale, negative_prompt, adapters=adapters)

    def network(*further: Any) -> Network:
        return network_of(sd, [*adapters, *further])

    edits = list_texts("edit_prompt", edit_prompt)
    return editing.Scene(
        sd.model, inversion, image_prompt, edits, start_step, context, network, joined(sd, adapters)
    )


def psnr(a: Any, b: Any) -> float:
    """Measure the peak signal-to-noise ratio of two pictures of bytes, in dB; infinite for equal ones."""
    mse = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


# --- parts --------------------------------------------------------------------------------------------


def _model(sd: ldm.StableDiffusion | None, device: str | torch.device | None) -> ldm.StableDiffusion:
    """Give the pipeline, that of the model in the box for None, if it is where it is said to be."""
    sd = ldm.StableDiffusion.default() if sd is None else sd
    if not isinstance(sd, ldm.StableDiffusion):
        raise UsageError(
            f"sd must be a StableDiffusion, or None for that of the model in the box, got {shown(sd)}"
        )
    try:
        elsewhere = device is not None and torch.device(device).type != sd.device.type
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be one such as 'cpu' or 'cuda', got {shown(device)}") from None
    if elsewhere:
        raise UsageError(f"the model is on {sd.device}, got device={shown(device)}; move it by sd.to(...)")
    return sd


def _one_text(name: str, given: Any) -> str:
    """Give the one text of what is one, or a list of one."""
    texts = list_texts(name, given)
    if len(texts) != 1:
        raise UsageError(f"{name} must be one text, of the one picture, got {len(texts)}")
    return texts[0]


def _check_left_out(
    inversion: Inversion, steps: Any, method: Any, spacing: Any, options: dict[str, Any]
) -> None:
    """Raise UsageError where something is asked for that an Inversion has its own of."""
    if steps not in (_DEFAULT_STEPS, len(inversion)):
        raise UsageError(
            f"the Inversion has {len(inversion)} steps, got num_inference_steps={shown(steps)}; leave it out"
        )
    if method != "ddim" and (
        method == TUTORIAL or resolve_method(method, **options).name != inversion.method.name
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
