"""Pictures inverted and edited, with a word on how well they come back: `StableDiffusion.invert` and `.edit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ldm
from ldm import editing
from ldm import images as pictures
from ldm.adapters.use import told_of, vae_scope
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
from ldm.errors import UsageError, shown
from ldm.generate import decode
from ldm.labels import labelled, plain
from ldm.limits import GUIDANCE_SCALE, real, whole
from ldm.models.diffusion.inversion import (
    Context,
    Inversion,
    Method,
    Network,
    plan_of,
    resolve_method,
    spelt,
    walk_up,
)
from ldm.models.introspect import downsampling
from ldm.request import list_texts, read_pictures

if TYPE_CHECKING:
    from PIL import Image

# What the two are told beside a method's options, for the hint to whoever misspells it.
OF_INVERT = ("prompt", "steps", "guidance_scale", "negative_prompt", "spacing", "adapters", "measure")
OF_EDIT = (
    *("image_prompt", "edit_prompt", "start_step", "editor", "mask", "feather", "inversion_scale", "method"),
    *("steps", "guidance_scale", "negative_prompt", "spacing", "adapters"),
)
KEPT_STEPS = 0.3  # of an edit's: the tutorial leaves 30 of 100 out


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
    negative_prompt: str | None = "",
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
    chosen = _chosen(method, OF_INVERT, options)
    whole("steps", steps, 1, sd.model.num_timesteps)
    one_text("prompt", prompt)
    scale = sd.defaults.guidance_scale if guidance_scale is None else guidance_scale
    z, _ = encode_picture(sd, image, adapters=adapters)
    network = network_of(sd, adapters)
    context = context_of(sd, prompt, scale, negative_prompt, adapters=adapters)
    z = check_latents(sd.model, z, len(context.conditioning))
    levels = plan_of(chosen, sd.model, steps, spacing)
    return walk_up(network, chosen, z, context, levels, measure=measure)


def edit_picture(
    sd: ldm.StableDiffusion,
    image: Any,
    image_prompt: str,
    edit_prompt: str | Sequence[str],
    *,
    method: str | Method = "edit_friendly",
    steps: int = 50,
    start_step: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = "",
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
        method: of inversion. By edit_friendly most edits hold, whatever the editor (bench/results/editing.md), and its
            way up is exact; plain DDIM is "ddim".
        start_step: steps that are left out: the more, the less is changed. None = three in ten.
        editor: what else happens on the way down, a name of ldm.editing.EDITORS, as "prompt_to_prompt", or a control of
            attention of ldm.adapters.
        mask: as of inpaint: white is changed, black stays as it is, pixel by pixel.
        feather: pixels over which the mask fades to each side, 0 to 256.
        inversion_scale: of guidance on the way up, under image_prompt. None = 1, so that the noise is
            like that which the model was trained on; guidance_scale by methods whose noise is so under any guidance.
        the rest: as of `invert_picture`.

    Raises:
        As invert_picture; also a start_step outside the run.
    """
    whole("steps", steps, 1, sd.model.num_timesteps)
    start_step = int(KEPT_STEPS * steps) if start_step is None else start_step
    whole("start_step", start_step, 0, steps - 1)
    scale = sd.defaults.guidance_scale if guidance_scale is None else guidance_scale
    real("guidance_scale", scale, *GUIDANCE_SCALE)
    way, chosen = editing.resolve_editor(editor), _chosen(method, OF_EDIT, options)
    image_prompt = one_text("image_prompt", image_prompt)
    negative_prompt = one_text("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if inversion_scale is not None:
        real("inversion_scale", inversion_scale, *GUIDANCE_SCALE)
    edits = list_texts("edit_prompt", edit_prompt)
    controls = [way.control] if isinstance(way, editing.Controlled) else []
    told_of(sd.model, [*joined(sd, adapters), *controls], [image_prompt, *edits], [0] * (1 + len(edits)))
    image, mask = (load_image(one) if isinstance(one, bytes | bytearray) else one for one in (image, mask))
    _, unit, marks = read_pictures(image, mask, (None, None), downsampling(sd.model))
    if feather and marks is None:
        raise UsageError(f"feather is of a mask, and none is given; got feather={shown(feather)}")
    marks = None if marks is None else editing.feathered(marks, feather)
    how = {"negative_prompt": negative_prompt, "spacing": spacing, "adapters": adapters, "steps": steps}
    if inversion_scale is None:
        inversion_scale = scale if chosen.guided_up else 1.0
    inversion = invert_picture(sd, image, image_prompt, method=chosen, guidance_scale=inversion_scale, **how)
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
    negative_prompt: str | None = "",
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


def _chosen(method: str | Method, of_call: Sequence[str], options: dict[str, Any]) -> Method:
    """Make the inversion that a call names."""
    if spelt(method) == TUTORIAL:
        raise UsageError(
            f"'{TUTORIAL}' is a method of the functions in ldm.edit; here 'ddim' is the aligned form"
        )
    return resolve_method(method, of_call, **options)


def psnr(a: Any, b: Any) -> float:
    """Measure the peak signal-to-noise ratio of two pictures of bytes, in dB; infinite for equal ones."""
    mse = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))
