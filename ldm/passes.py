"""A request as it is painted: its images, and its passes, whose values lie in the sections of ldm.options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ldm.adapters.as_diffusers import AsDiffusers
from ldm.adapters.use import adapters_of
from ldm.limits import MAX_SEED
from ldm.models.diffusion.conditions import Area, area_of
from ldm.option_kinds import Region
from ldm.options import Values, defaults_of
from ldm.retouch.tiles import Grid
from ldm.sources import Frame


def planned_steps(rule: str, steps: int, strength: float) -> int:
    """Tell how many steps the whole run has of which strength leaves the last: more than `steps` by ComfyUI's rule."""
    if rule != "comfyui" or not 0 < strength <= 0.9999:
        return steps
    return int(min(steps / strength, 1e9))  # more than any model's levels, and finite


@dataclass(frozen=True)
class ImageSpec:
    """What one image is made of beside the options that the whole request shares."""

    prompt: str
    negative_prompt: str
    seed: int
    row: int | None = None  # into prompt_embeds, where those were given
    variation_seed: int | None = None  # with variation_strength
    place: int = 0  # among the images of the request
    # What prompt and negative prompt were drawn of.
    template: str | None = None
    negative_template: str | None = None


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
    frame: Frame | None  # what is around that which is painted, and how it is laid back
    upscaler: Any  # with "before": by which that is enlarged, of ldm.options.UPSCALERS or a FileUpscaler
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
        seed_offset: is added to each image's seed.
    """

    width: int
    height: int
    sampling: Values
    guidance: Values
    start: Start
    own_prompt: str | None = None
    own_negative_prompt: str | None = None
    schedule: tuple[tuple[str, int], ...] = ()
    seed_offset: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def area_of(self, region: Region, f: int) -> Area:
        """Give the latent cells, of f pixels a side, of a region of the picture."""
        return area_of(region.box, self.width // f, self.height // f)

    @property
    def planned(self) -> int:
        """How many steps the whole run has of which the last are run."""
        strength = 1.0 if self.start.strength is None else self.start.strength
        return planned_steps(self.start.strength_rule, self.sampling.steps, strength)

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
        return [replace(spec, seed=(spec.seed + self.seed_offset) % (MAX_SEED + 1), **own) for spec in batch]

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
        tiles: where the tiles lie that the passes paint, one each; None is one picture, the last pass's.
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
    tiles: Grid | None = None

    @property
    def mode(self) -> Literal["txt2img", "img2img", "inpaint"]:
        """What the first pass begins with."""
        start = self.passes[0].start
        return "txt2img" if start.kind == "noise" else "img2img" if start.mask is None else "inpaint"

    @property
    def attachments(self) -> list[Any]:
        """The adapters, and those that options stand for."""
        own = [AsDiffusers()] if self.arithmetic == "diffusers" else []
        return [*self.adapters, *adapters_of(vars(self.network)), *own]

    def part_of(self, place: int) -> tuple[tuple[int, int], tuple[int, int, int, int]] | None:
        """Give which part the pass at a place (from 0) paints: (width, height) of the whole, and the box in it.

        None is all of it.
        """
        if self.tiles is not None:
            return self.tiles.size, self.tiles.boxes[place]
        frame = self.passes[place].start.frame
        if frame is None or frame.box is None:
            return None
        height, width = frame.original.shape[2:]
        return (width, height), frame.box

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what comes out."""
        return self.passes[-1].size if self.tiles is None else self.tiles.size

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


def first_pass(checked: Mapping[str, Any]) -> Pass:
    """Make the first pass out of checked values by name."""
    names = ("image", "original", "image_hash", "mask", "frame", "run_last")
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
    strength: float, run_last: int, upscaler: Any, enlarged: tuple[int, int], **options: Any
) -> Start:
    """Let a pass begin with what the one before gave: see Start.

    Args:
        options: of the section "start", which are at their defaults otherwise, and what else a Start has.
    """
    others = {
        "kind": "before",
        "strength": strength,
        "run_last": run_last,
        "upscaler": upscaler,
        "enlarged": enlarged,
    }
    none = dict.fromkeys(("image", "original", "image_hash", "mask", "frame"))
    return Start(**{**defaults_of("start"), **none, **options, **others})
