"""StableDiffusion: a model file loaded, moved, made faster, and the methods that paint with it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.lora import LoRA
from ldm.adapters.use import check_adapters, looks_at_batches
from ldm.advice import FOREIGN_SYNTAX, advice, by_sampler
from ldm.batches import in_batches
from ldm.checkpoints.sampling import SamplingDefaults
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype
from ldm.errors import UsageError, nearest, refuse_elsewhere, shown
from ldm.generate import decode, paint_batch
from ldm.models.introspect import dtype_of, native_size
from ldm.noise import seed_everything
from ldm.other_words import PIPELINE, attribute_advice, taking_options_of
from ldm.paths import shipped
from ldm.request import ImageSpec, Request, check_request
from ldm.results import GenerationResult, Progress, join, with_bar

if TYPE_CHECKING:
    from PIL import Image

    from ldm.edit_pictures import Edited
    from ldm.explain import Explained
    from ldm.grids import Grid
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.inversion import Inversion

log = logging.getLogger(__name__)

# What CompVis's txt2img.py has, for models that say nothing of their own.
V1_GUIDANCE, V1_STEPS = 7.5, 50


class StableDiffusion:
    """A model that paints: txt2img, img2img, inpaint.

    Attributes:
        model: the LatentDiffusion; everything that is written for CompVis works on it.
        report: what the loader did with every tensor, or None.
        name, file: what pictures say about the model; the file's hash goes into their metadata.
        autocast: dtype of torch.autocast around the UNet, CompVis's --precision autocast, or None.
        vae_dtype: what the VAE computes in.
        defaults: what is done where the caller says nothing: the model's own advice, which its configuration may
            hold under `sampling:`, filled up with Stable Diffusion v1's guidance 7.5, 50 steps and the model's size.
        adapters: what every picture is painted with, besides those of its call; load_lora adds to it.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        name: str | None = None,
        file: str | os.PathLike | None = None,
        report: Any = None,
        autocast: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
    ):
        self.model = model.eval()
        self.file = None if file is None else Path(file)
        if name is None and self.file is not None:
            name = self.file.name if self.file.is_dir() else self.file.stem
        self.name = name
        self.report = report
        self.autocast = autocast
        self._advised = advised = getattr(report, "sampling", None) or SamplingDefaults()
        self.defaults = replace(
            advised,
            guidance_scale=V1_GUIDANCE if advised.guidance_scale is None else advised.guidance_scale,
            steps=min(advised.steps or V1_STEPS, model.num_timesteps),
            size=advised.size or native_size(model),
            least_steps=by_sampler(advised.least_steps),
        )
        self.adapters: list[Any] = []
        self._warned_of: set[str] = set()  # kinds of foreign prompt syntax that were warned of
        self._latent_rgb: tuple[Tensor, Tensor] | None = None
        # Half-precision decoders overflow into black pictures; the VAE is a tenth of the work.
        self.vae_dtype = vae_dtype
        model.first_stage_model.to(vae_dtype)

    @classmethod
    @taking_options_of()
    def from_single_file(
        cls,
        path: str | os.PathLike,
        *,
        config: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        vae: str | os.PathLike | None = None,
        use_ema: bool | None = None,
        tokenizer: str | os.PathLike | None = None,
        vae_dtype: torch.dtype = torch.float32,
        low_vram: bool = False,
        ignore: str | Sequence[str] = (),
    ) -> StableDiffusion:
        """Load a `.safetensors` or `.ckpt` file with CompVis's or diffusers' names inside.

        Args:
            config: a CompVis YAML file (path, dict, OmegaConf); None takes the one beside the file, of its name or
                called config.yaml, or else reads the family off the weights.
            device: "cuda", "mps", "cpu"; None takes the best there is.
            dtype: what UNet and text encoder compute in; None is float16 on CUDA, else float32.
            autocast: compute the UNet under torch.autocast with this dtype, weights staying in `dtype`.
            vae: a VAE-only file that replaces the one in `path`.
            use_ema: True gives the UNet the file's moving average, False its plain weights; None does as CompVis:
                plain ones, and the average beside them if the configuration keeps one, which then paints.
            tokenizer: a folder or vocabulary file; None takes the one that ships with ldm.
            vae_dtype: what the VAE computes in. A half-precision decoder that overflows is put into float32.
            low_vram: sequential CPU offload: the weights stay in CPU memory and are copied to the device part by part.
            ignore: names, beginnings of names or shell patterns of tensors in the file to leave out.

        Raises:
            AbsentError, FormatError, UnsafeFileError, MismatchError: see ldm.checkpoints.
            UsageError: low_vram without a GPU.
        """
        from ldm.checkpoints import load_latent_diffusion

        device = pick_device(device)
        if low_vram:
            check_low_vram(device)
        dtype, vae_dtype = pick_dtype(device, dtype), pick_dtype(device, vae_dtype)
        model, report = load_latent_diffusion(
            path,
            config=config,
            device="cpu" if low_vram else device,
            dtype=dtype,
            use_ema=use_ema,
            tokenizer=tokenizer,
            vae=vae,
            vae_dtype=vae_dtype,
            ignore=ignore,
        )
        sd = cls(model, file=path, report=report, autocast=autocast, vae_dtype=vae_dtype)
        return sd.optimize(low_vram=device) if low_vram else sd.to(dtype=dtype, device=device)

    @classmethod
    @taking_options_of(from_single_file.__func__)
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> StableDiffusion:
        """Load a folder in diffusers' layout (unet/, vae/, text_encoder/, ...); options of from_single_file."""
        if not Path(folder).is_dir():
            refuse_elsewhere("folder", folder)
            raise UsageError(
                f"from_pretrained wants a folder in diffusers' layout, got '{folder}'; download it first"
            )
        return cls.from_single_file(folder, **options)

    @classmethod
    @taking_options_of(from_single_file.__func__, without=("config",))
    def default(cls, device: str | torch.device | None = "cpu", **options: Any) -> StableDiffusion:
        """Load the model in the box: coloured shapes, 128 x 128 pixels.

        Raises:
            AbsentError: the file did not come with this installation.
        """
        return cls.from_single_file(
            shipped("model_data/shapes/shapes.safetensors"),
            config=shipped("model_data/shapes/config.yaml"),
            device=device,
            **options,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return dtype_of(self.model)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> StableDiffusion:
        """Move the model, or change what UNet and text encoder compute in; the VAE keeps its own precision.

        Sequential CPU offload (low_vram) ends; call `optimize` again.
        """
        from ldm.kernels import offload

        offload.detach(self.model)
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else pick_device(device)
        if dtype is not None:
            dtype = pick_dtype(device, dtype)
            self.model.model.to(dtype)
            self.model.cond_stage_model.to(dtype)
            self.model.first_stage_model.to(self.vae_dtype)
        self.model.to(device)  # after the cast: half as much to move
        return self

    @taking_options_of()
    def optimize(
        self,
        *,
        compile: bool = False,
        tiled_vae: bool = False,
        sliced_vae: bool = False,
        low_vram: str | torch.device | None = None,
        vae_graphs: bool = False,
    ) -> StableDiffusion:
        """Compute faster on this machine, or in less memory, with the same numbers up to rounding.

        See ldm.kernels.optimize. ldm.kernels.restore(sd.model) undoes it. Call it again after moving the model to
        another device.

        Args:
            compile: by torch.compile; the first calls take minutes.
            tiled_vae: VAE tiling: encode and decode in a fraction of the memory, exactly and without seams.
            sliced_vae: VAE slicing: encode and decode the pictures of a batch one after the other.
            low_vram: sequential CPU offload: a device to copy the weights to part by part; they stay in CPU memory.
            vae_graphs: capture the VAE as CUDA graphs, too; each keeps gigabytes.

        Raises:
            UsageError: low_vram is no GPU, or not there; ways that do not go together.
        """
        from ldm.kernels import optimize

        if low_vram is not None:
            low_vram = check_low_vram(pick_device(low_vram))
        vae = {"tiled_vae": tiled_vae, "sliced_vae": sliced_vae, "vae_graphs": vae_graphs}
        optimize(self.model, compile=compile, low_vram=low_vram, **vae)
        return self

    def load_lora(self, file: str | os.PathLike, weight: float = 1.0, **options: Any) -> LoRA:
        """Let every picture from now on be painted with a LoRA; `sd.adapters.clear()` takes all off again.

        For one call, give it to that: txt2img(prompt, adapters=[LoRA(file, weight)]).

        Args:
            file, weight, options: as ldm.adapters.LoRA takes them.

        Returns:
            the LoRA, the last of `adapters`.

        Raises:
            As LoRA; MismatchError: it is for another model.
        """
        lora = LoRA(file, weight, **options)
        check_adapters(self.model, [*self.adapters, lora])
        self.adapters.append(lora)
        return lora

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the model for use: `name.safetensors` as one v1 file, or a name without an ending as a folder.

        A file has CompVis's keys and, unless it is plain Stable Diffusion v1, a `name.yaml` beside it, which the
        loader finds there. A folder has diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/). Weights
        keep their dtypes; a moving average that paints is written in the network's place. Nothing half-written is left
        under the name, and a folder that holds something is not written into.

        Returns:
            the paths that were written.

        Raises:
            UsageError: another ending, or a model that a folder cannot describe. OutputError: it cannot be written.
        """
        from ldm.saving import save

        return save(self.model, path, self._advised)

    def _preview(self, latents: Tensor) -> list[Image.Image]:
        return pictures.preview(latents, *self.latent_rgb)

    @property
    def latent_rgb(self) -> tuple[Tensor, Tensor]:
        """Factors (c, 3) and bias (3,) that turn latents into rough colours; fitted to the decoder once."""
        if self._latent_rgb is None:
            self._latent_rgb = pictures.fit_latent_rgb(
                lambda z: decode(self.model, z.to(self.device)), self.model.channels
            )
        return self._latent_rgb

    def __repr__(self) -> str:
        return f"StableDiffusion({self.name or 'unnamed'}, {self.device}, {dtype_name(self.dtype)})"

    def __getattr__(self, name: str) -> Any:
        # Asked only for what is not here.
        if advice := attribute_advice(name):
            hint = f": {advice}; {PIPELINE}"
        else:
            found = None if name.startswith("_") else nearest(name, [*dir(type(self)), *vars(self)], 0.75)
            hint = f"; did you mean {found}?" if found else ""
        raise AttributeError(f"StableDiffusion has no attribute {shown(name)}{hint}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        # `sd.scheduler = x` would else be kept and change nothing; a subclass may have one of its own.
        if not hasattr(type(self), name) and (advice := attribute_advice(name)):
            raise AttributeError(
                f"StableDiffusion has no attribute {shown(name)} to set: {advice}; {PIPELINE}",
                name=name,
                obj=self,
            )
        super().__setattr__(name, value)

    # --- painting ---

    def txt2img(
        self,
        prompt: str | Sequence[str] | None,
        *,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Paint from a prompt.

        Args:
            callback: is called with each Progress. One that returns False ends the run; pictures finished by then are
                returned. What it raises comes out as it is.
            progress: show a bar; None does so in a notebook and in a terminal.
        """
        return self._collect(prompt, options, "txt2img", callback, progress)

    def img2img(
        self,
        prompt: str | Sequence[str] | None,
        image: Any,
        strength: float | None = None,
        *,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Repaint a picture: strength 0 returns it, 1 forgets it (default: 0.75). The rest as in txt2img."""
        return self._collect(
            prompt, {**options, "image": image, "strength": strength}, "img2img", callback, progress
        )

    def inpaint(
        self,
        prompt: str | Sequence[str] | None,
        image: Any,
        mask: Any,
        *,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Repaint a picture where the mask is white and keep it, pixel by pixel, where it is black.

        The rest as in txt2img. 4-channel models blend latents at each step; 9-channel models see mask and
        masked picture. Which one it is, the model says.
        """
        return self._collect(prompt, {**options, "image": image, "mask": mask}, "inpaint", callback, progress)

    def invert(self, image: Any, prompt: str, **options: Any) -> Inversion:
        """Invert a picture to the noise that the model makes it of, and say how well it comes back.

        Args:
            image, prompt: the picture and what it shows.
            options: of ldm.edit.invert_picture: method, steps, guidance_scale, negative_prompt, ...

        Raises:
            As that.
        """
        from ldm.edit_pictures import invert_picture

        return invert_picture(self, image, prompt, **options)

    def edit(self, image: Any, image_prompt: str, edit_prompt: str | Sequence[str], **options: Any) -> Edited:
        """Change a picture: invert it under the prompt of what it shows, and sample it under another.

        Args:
            options: of ldm.edit.edit_picture: method, steps, start_step, guidance_scale, ...

        Raises:
            As that.
        """
        from ldm.edit_pictures import edit_picture

        return edit_picture(self, image, image_prompt, edit_prompt, **options)

    def explain(self, what: Any, prompt: str | None = None, **options: Any) -> Explained:
        """Show where a picture looks for each word of its prompt.

        Args:
            what: a prompt, which is painted; or a picture, with the prompt of what it shows.
            options: of ldm.explain.explain: words, span, and those of txt2img or of invert.

        Raises:
            As that.
        """
        from ldm.explain import explain

        return explain(self, what, prompt, **options)

    def grid(
        self,
        prompt: str,
        x: Any = None,
        y: Any = None,
        z: Any = None,
        *,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Grid:
        """Paint an X/Y/Z grid: one picture for each combination of a few options' values, with labels.

        All cells are checked before the first is painted, and have one seed.

        Args:
            x, y, z: an option and its values: ("steps", [10, 20]), or as text "steps=10,20", "guidance_scale=1-9 (+2)":
                docs/grids.md.

        Returns:
            a Grid: `.image` with its labels, `.cells`, `.parameters`.
        """
        from ldm.grids import paint_grid, plan_grid

        return paint_grid(self, plan_grid(self, prompt, x, y, z, **options), callback, progress)

    def prompt_matrix(
        self,
        prompt: str,
        *,
        in_negative: bool = False,
        at_start: bool = False,
        delimiter: str = ", ",
        different_seeds: bool = False,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Grid:
        """Paint "a|b|c" with and without each of b and c, in A1111's order and layout.

        Args:
            in_negative: the negative prompt is what has the parts.
            at_start: put them before the first part, and not behind.
            delimiter: between the parts.
            different_seeds: give picture i the seed + i, and not all the same.

        Returns:
            a Grid: `.image` with its labels, `.cells`, `.parameters`.
        """
        from ldm.grids import paint_grid, plan_matrix

        form = {"in_negative": in_negative, "at_start": at_start, "delimiter": delimiter}
        grid = plan_matrix(self, prompt, **form, different_seeds=different_seeds, **options)
        return paint_grid(self, grid, callback, progress)

    def upscale(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = "",
        scale: float = 2.0,
        *,
        strength: float = 0.3,
        tile: int | tuple[int, int] | None = None,
        overlap: int = 64,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Enlarge a picture, and repaint it in tiles whose seams are mixed (A1111's SD upscale).

        Args:
            scale: how many times as large; sides are rounded down to multiples of the model's f (8).
            strength: of the repainting; much of it paints the prompt's subject into every tile.
            tile: of its sides, or (width, height), in pixels; None is the model's size.
            overlap: pixels over which neighbouring tiles are mixed.
            callback, progress: as in txt2img.
        """
        if scale is None:
            raise UsageError("scale of upscale must be a number from 1 to 8, got None")
        width, height = tile if isinstance(tile, tuple | list) and len(tile) == 2 else (tile, tile)
        own = {"image": image, "strength": strength, "upscale_by": scale, "upscale_overlap": overlap}
        own |= {} if tile is None else {"width": width, "height": height}
        return self._collect(prompt, {**options, **own}, "upscale", callback, progress)

    def _collect(
        self, prompt: Any, options: dict[str, Any], mode: str, callback: Any, show: Any
    ) -> GenerationResult:
        if callback is not None and not callable(callback):
            raise UsageError(f"callback must be a function of one Progress, got {shown(callback)}")
        if show is not None and not isinstance(show, bool | np.bool_):
            raise UsageError(f"progress must be True, False or None, got {shown(show)}")
        for name, thing in (("image", "a picture"), ("mask", "a mask")):
            if name in options and options[name] is None:
                raise UsageError(f"{mode} needs {thing}, got {name}=None")
        results, interrupted = [], False
        stream = self.stream(prompt, **options)  # checked before a bar is begun
        with contextlib.closing(with_bar(stream, show)) as steps:
            for step in steps:
                if step.result is not None:
                    results.append(step.result)
                if callback is not None and callback(step) is False:
                    interrupted = True
                    break
        empty = [] if options.get("output_type", "pil") == "pil" else torch.empty(0)
        return replace(join(results, empty), interrupted=interrupted)

    def stream(self, prompt: str | Sequence[str] | None, **options: Any) -> Iterator[Progress]:
        """Paint step by step: yields a Progress for each step, and one with the pictures for each batch.

        Stop iterating to stop painting. Everything is checked before the first step, at the call; what is known to
        go wrong with this model (words it has never seen, other sizes, too few steps) is logged as warnings.

        Args:
            options: those of plan().

        Raises:
            As plan(). NumericError: NaN. ResourceError: out of memory at batch size 1.
        """
        request = self.plan(prompt, **options)
        self.advise([request])
        return self.paint(request)

    def advise(self, requests: Sequence[Request]) -> None:
        """Log what is known to go wrong with these requests, a line for each kind; other programs' syntax once only."""
        for kind, line in advice(requests, self.defaults, on_cpu=self.device.type == "cpu").items():
            if kind not in self._warned_of:
                log.warning("%s", line)
            if kind in FOREIGN_SYNTAX:
                self._warned_of.add(kind)

    @taking_options_of(check_request)
    def plan(self, prompt: str | Sequence[str] | None, **options: Any) -> Request:
        """Check every part of a request, without painting; paint() does that.

        Raises:
            UsageError: a value out of range, or of another kind.
        """
        given = options.pop("adapters", ())
        if self.adapters and isinstance(given, list | tuple):  # another kind is refused below
            given = (*self.adapters, *given)
        return check_request(self.model, self.defaults, prompt, adapters=given, **options)

    @torch.no_grad()
    def paint(self, request: Request) -> Iterator[Progress]:
        """Paint what plan() checked, batch by batch; a batch that does not fit into memory is halved. See stream()."""
        if request.rng == "compvis":
            seed_everything(request.images[0].seed)
        shared: dict[str, Any] = {}  # what later batches use again

        def work(batch: Sequence[ImageSpec], index: int, count: int) -> Iterator[Progress]:
            progress = partial(Progress, batch=index, batches=count, preview_of=self._preview)
            return paint_batch(
                self.model, request, batch, shared, progress, self.name, self.file, self.autocast
            )

        def refusal(count: int) -> str:
            width, height = request.size
            return (
                f"out of memory at {width} x {height}, {count} at once, in {dtype_name(self.dtype)}; "
                "use a smaller size or batch, or half precision"
            )

        # The one generator of rng="compvis" draws for a whole batch at once.
        may_halve = request.rng != "compvis" and not looks_at_batches(request.attachments)
        yield from in_batches(request.images, request.batch_size, work, refusal=refusal, may_halve=may_halve)


# These methods take check_request's options: they are written down once, and help() and completion show them at each.
for _name in ("stream", "txt2img", "img2img", "inpaint", "upscale", "grid", "prompt_matrix"):
    setattr(StableDiffusion, _name, taking_options_of(check_request)(getattr(StableDiffusion, _name)))
StableDiffusion.__call__ = StableDiffusion.txt2img
