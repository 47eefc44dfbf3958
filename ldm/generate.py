"""The story from prompt to picture: encode the prompt, draw noise, denoise step by step, decode.

Read `StableDiffusion._paint_batch` first; the functions above it are the words of that story. What may be asked
is judged in ldm.request, what comes out is in ldm.results.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.deepcache import DeepCache
from ldm.adapters.tome import TokenMerging
from ldm.advice import FOREIGN_SYNTAX, advice, by_sampler
from ldm.batches import in_batches
from ldm.checkpoints.sampling import SamplingDefaults
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype
from ldm.errors import (
    NumericError,
    UsageError,
    refuse_elsewhere,
    shown,
)
from ldm.helpers import upload
from ldm.models.diffusion.samplers import (
    Noise,
    Step,
    sample_steps,
    start_level,
)
from ldm.models.introspect import downsampling, dtype_of, is_inpainting, native_size
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.other_words import PIPELINE, attribute_advice, near, taking_options_of
from ldm.paths import shipped
from ldm.request import ImageSpec, Request, check_request
from ldm.results import GenerationParameters, GenerationResult, Progress, join, painted, with_bar

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

# What CompVis's txt2img.py has, for models that say nothing of their own.
V1_GUIDANCE, V1_STEPS = 7.5, 50
# Fields of a Request that denoise() takes, and further ones that a picture's metadata hold as they are.
DENOISE_OPTIONS = (
    "sampler",
    "steps",
    "spacing",
    "eta",
    "guidance_scale",
    "guidance_rescale",
    "guidance_interval",
    "cache_interval",
    "cache_depth",
    "merge_ratio",
    "merge_seed",
)
SHARED_OPTIONS = ("mode", "width", "height", "strength", "rng")

# --- the words of the story -----------------------------------------------------------------------


def encode_prompt(
    model: LatentDiffusion, prompts: Sequence[str], known: dict[str, Tensor] | None = None
) -> Tensor:
    """Turn prompts into text features, (b, n, d).

    Each distinct prompt is encoded once and alone, so that its features do not depend on its neighbours.

    Args:
        known: features of earlier prompts; new ones are added.
    """
    known = {} if known is None else known
    for prompt in prompts:
        if prompt not in known:
            known[prompt] = model.get_learned_conditioning([prompt])
    return torch.cat([known[prompt] for prompt in prompts])


def encode_prompts(
    model: LatentDiffusion, request: Request, batch: Sequence[ImageSpec], known: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, list[list[str]]]:
    """Encode prompts and, if guidance needs them, negative prompts; list the words that did not fit.

    Returns:
        context and unconditional context, (b, n, d) each (None where nothing is guided), and dropped words.
    """
    guided = request.guidance_scale != 1.0
    if request.embeds is not None:
        rows = [spec.row for spec in batch]
        context = request.embeds[rows].to(model.device)
        unconditional = request.negative_embeds[rows].to(model.device) if guided else None
        return context, unconditional, [[] for _ in batch]
    wanted = {text for spec in batch for text in (spec.prompt, spec.negative_prompt)}
    for text in known.keys() - wanted:  # a list of many prompts must not fill the memory
        del known[text]
    context = encode_prompt(model, [spec.prompt for spec in batch], known)
    unconditional = encode_prompt(model, [spec.negative_prompt for spec in batch], known) if guided else None
    dropped_words = getattr(model.cond_stage_model, "dropped_words", lambda text: [])
    dropped = [
        dropped_words(spec.prompt) + (dropped_words(spec.negative_prompt) if guided else []) for spec in batch
    ]
    return context, unconditional, dropped


class ImageNoise:
    """One CPU generator for each image, float32: what image i draws depends on its seed alone.

    Not on the batch it is in, nor on the device. (torch.randn of a batch has no such law: row i is not what
    seed + i gives, and row 0 only if the image holds a multiple of 16 numbers.)
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of this shape, its first dimension being the images."""
        draws = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        noise = torch.stack(draws).to(like.dtype)
        return upload(noise, like.device)


class CompVisNoise:
    """The global generator of the device, a whole batch at once, in the order in which CompVis's scripts draw."""

    def __call__(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of this shape."""
        return torch.randn(like.shape, device=like.device).to(like)


def seed_everything(seed: int) -> None:
    """Seed the global generators of random, numpy and torch, as CompVis's scripts do (rng="compvis")."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def initial_latents(model: LatentDiffusion, count: int, height: int, width: int, noise: Noise) -> Tensor:
    """Draw x_T, (count, c, height / f, width / f), on the model's device."""
    f = downsampling(model)
    like = torch.empty(count, model.channels, height // f, width // f, device=model.device)
    return noise(like)


def encode_image(model: LatentDiffusion, image: Tensor, count: int, noise: Noise) -> Tensor:
    """Turn one picture (1, 3, height, width) into `count` samples of its latents, scaled units.

    The sampling noise is drawn on the CPU, as CompVis's DiagonalGaussianDistribution does on every device.
    """

    def encode() -> Tensor:
        posterior = model.encode_first_stage(image.to(model.device))
        if not isinstance(posterior, DiagonalGaussianDistribution):
            return posterior.float().expand(count, -1, -1, -1)
        mean, std = posterior.mean.float(), posterior.std.float()  # (1, c, h, w)
        return mean + std * draw.to(mean.device)

    f = downsampling(model)
    draw = noise(torch.empty(count, model.channels, image.shape[2] // f, image.shape[3] // f))
    return model.scale_factor * _in_finite_precision(model, "the VAE's encoder", encode)


def encode_source(
    model: LatentDiffusion,
    request: Request,
    image: Tensor,
    b: int,
    noise: Noise,
    shared: dict[str, Any],
    key: str,
) -> Tensor:
    """Encode a picture (1, 3, height, width) for b images; CompVis encodes it once, before its first batch.

    Args:
        shared, key: where its latents are kept from one batch to the next, and under which name.
    """
    if request.rng == "image":
        return encode_image(model, image, b, noise)
    if key not in shared:
        count = min(request.batch_size, len(request.images))
        shared[key] = encode_image(model, image, count, noise)
    return shared[key][:b]


def masked_picture(
    model: LatentDiffusion, request: Request, b: int, noise: Noise, shared: dict[str, Any]
) -> Tensor:
    """Make what a 9-channel UNet sees beside its latents, (b, 1 + c, h, w): mask, then masked picture.

    Without a mask everything is to be repainted and the picture is grey, as its training had it.
    """
    f = downsampling(model)
    size = (request.height, request.width)
    mask = torch.ones(1, 1, *size) if request.mask is None else request.mask
    image = torch.zeros(1, 3, *size) if request.image is None else request.image
    z = encode_source(model, request, image * (mask < 0.5), b, noise, shared, "masked")
    return torch.cat([pictures.shrink_mask(mask, f, any_pixel=False).to(z).expand(b, -1, -1, -1), z], dim=1)


def starting_noise(
    model: LatentDiffusion, request: Request, b: int, noise: Noise, shared: dict[str, Any]
) -> Tensor:
    """Draw x_T (b, c, h, w) for a batch; fixed_code in CompVis's order of draws takes that of the first batch again."""
    if not (request.fixed_code and request.rng == "compvis"):
        return initial_latents(model, b, request.height, request.width, noise)
    if "x_T" not in shared:
        shared["x_T"] = initial_latents(model, request.batch_size, request.height, request.width, noise)
    return shared["x_T"][:b]


def denoise(
    model: LatentDiffusion,
    x_T: Tensor,
    conditioning: Any,
    *,
    sampler: str,
    steps: int,
    autocast: torch.dtype | None = None,
    cache_interval: int = 1,
    cache_depth: int = 1,
    merge_ratio: float = 0.0,
    merge_seed: int | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Step from noise to clean latents, one Step at a time; latents stay float32 whatever the UNet computes in.

    Args:
        x_T: (b, c, h, w) noise, or noised latents with run_last.
        cache_interval, cache_depth: see ldm.adapters.deepcache.DeepCache; 1 = everything at every level.
        merge_ratio, merge_seed: see ldm.adapters.tome.TokenMerging; 0 = every token.
        options: those of ldm.models.diffusion.samplers.sample_steps.

    Raises:
        NumericError: latents that are not finite; checked at the first and last step, on a CPU at each.
    """
    unet = model.model.diffusion_model
    cache = DeepCache(unet, cache_interval, cache_depth)
    merging = TokenMerging(unet, merge_ratio, merge_seed)
    seen = _WithAttachments(model, autocast, cache, merging)
    for step in sample_steps(sampler, seen, x_T, conditioning, steps=steps, **options):
        cache.next_level()
        # On a GPU a check waits for the work that is queued, so only the first and last step are looked at.
        on_show = step.index in (0, step.total - 1) or step.x_t.device.type == "cpu"
        if on_show and not torch.isfinite(step.x_t).all():
            raise NumericError(
                f"the UNet gave values that are not finite at step {step.index + 1} of {step.total}, in "
                f"{dtype_name(dtype_of(model))}; nothing was saved; use float32 or another model file"
            )
        yield step


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Turn latents (b, c, h, w), scaled units, on any device, into pictures (b, 3, f h, f w), float32, about [-1, 1].

    One picture at a time: memory stays that of one, and a picture does not depend on its neighbours. A
    decoder in half precision that overflows is put into float32 and stays there.

    Raises:
        NumericError: pictures that are not finite in float32 either.
    """

    def one_by_one() -> Tensor:
        return torch.cat([model.decode_first_stage(z[None].float().to(model.device)) for z in latents])

    return _in_finite_precision(model, "the VAE's decoder", one_by_one)


def _in_finite_precision(model: LatentDiffusion, stage: str, work: Callable[[], Tensor]) -> Tensor:
    """Let the VAE work, and once more in float32 if what comes out is not finite."""
    vae = model.first_stage_model
    dtype = dtype_of(vae)
    result = work()
    if not torch.isfinite(result).all() and dtype != torch.float32:
        log.warning("%s overflowed in %s and was put into float32", stage, dtype_name(dtype))
        vae.float()
        dtype = torch.float32
        result = work()
    if not torch.isfinite(result).all():
        raise NumericError(
            f"{stage} gave values that are not finite, in {dtype_name(dtype)}; nothing was saved; check the model file"
        )
    return result


class _WithAttachments:
    """A model as samplers see it: with autocast, and what is attached to its UNet, around every call of that.

    Dtypes are DiffusionWrapper's matter: it casts to those of the UNet's weights, and the answer back to float32.

    Args:
        autocast: dtype of torch.autocast; None = none.
        attachments: attached to the UNet during each call and only then: between two steps the model may be used for
            anything else.
    """

    def __init__(
        self, model: LatentDiffusion, autocast: torch.dtype | None, *attachments: DeepCache | TokenMerging
    ):
        self._model = model
        self._autocast = autocast
        self._attachments = attachments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Predict as the model does."""
        on = self._autocast is not None
        with contextlib.ExitStack() as stack:
            for attachment in self._attachments:
                stack.enter_context(attachment.attached())
            stack.enter_context(torch.autocast(x.device.type, dtype=self._autocast, enabled=on))
            return self._model.apply_model(x, t, cond, *args, **kwargs)


# --- from prompt to picture -----------------------------------------------------------------------


def paint_batch(
    model: LatentDiffusion,
    request: Request,
    batch: Sequence[ImageSpec],
    shared: dict[str, Any],
    progress: Callable[..., Progress],
    name: str | None = None,
    file: Path | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[Progress]:
    """Paint one batch: encode the prompts, draw noise, denoise step by step, decode.

    Args:
        batch: those of request.images that are painted at once.
        shared: what the batches of a request use again; empty at first.
        progress: makes the Progress of a step.
        name, file: of the model, for the pictures' metadata.
        autocast: see denoise.
    """
    b = len(batch)
    noise = ImageNoise([spec.seed for spec in batch]) if request.rng == "image" else CompVisNoise()
    context, unconditional, dropped = encode_prompts(model, request, batch, shared.setdefault("features", {}))
    options: dict[str, Any] = {"noise": noise}

    def finished(latents: Tensor | None) -> Progress:
        result = finish_batch(model, request, batch, latents, dropped, name, file, autocast)
        x_0 = result.latents
        return progress(request.steps, request.steps, x_t=x_0, pred_x0=x_0, result=result)

    # Where to start: pure noise, or the picture noised to the level of its strength.
    level, z = None, None
    if request.strength is not None:
        run_last, level = start_level(
            request.sampler, model, request.steps, request.strength, spacing=request.spacing
        )
        if run_last == 0:
            yield finished(None)
            return
        z = encode_source(model, request, request.image, b, noise, shared, "picture")  # (b, c, h, w)
        options["run_last"] = run_last
    if is_inpainting(model):
        concat = masked_picture(model, request, b, noise, shared)
        context = {"c_concat": [concat], "c_crossattn": [context]}
        if unconditional is not None:
            unconditional = {"c_concat": [concat], "c_crossattn": [unconditional]}
    elif request.mask is not None:
        keep = 1.0 - pictures.shrink_mask(request.mask, downsampling(model), any_pixel=True)
        # CompVis's samplers mean the opposite of a user's mask: 1 keeps x0.
        options |= {"mask": keep.to(z).expand(b, -1, -1, -1), "x0": z}
    x_T = starting_noise(model, request, b, noise, shared)
    if level is not None:
        x_T = math.sqrt(level) * z + math.sqrt(1.0 - level) * x_T

    # From noise to latents.
    options |= {option: getattr(request, option) for option in DENOISE_OPTIONS}
    for step in denoise(
        model, x_T, context, unconditional_conditioning=unconditional, autocast=autocast, **options
    ):
        latents = step.x_t
        yield progress(step.index + 1, step.total, x_t=latents, pred_x0=step.pred_x0)

    # The samplers' last step does not blend again.
    if "mask" in options:
        latents = pictures.paste(z, latents, options["mask"])
    yield finished(latents)


def finish_batch(
    model: LatentDiffusion,
    request: Request,
    batch: Sequence[ImageSpec],
    latents: Tensor | None,
    dropped: Sequence[list[str]],
    name: str | None,
    file: Path | None,
    autocast: torch.dtype | None,
) -> GenerationResult:
    """Turn the latents of a batch into what was asked for; None stands for the picture itself (strength 0)."""
    b = len(batch)
    if latents is None:
        latents = encode_image(model, request.image, b, torch.zeros_like)
        unit = request.original.repeat(b, 1, 1, 1)
    elif request.output_type != "latent":
        unit = pictures.to_unit(decode(model, latents)).cpu()
        if request.mask is not None:
            unit = pictures.paste(unit, request.original, request.mask)
    latents = latents.float().cpu()
    shared = {
        **{option: getattr(request, option) for option in (*SHARED_OPTIONS, *DENOISE_OPTIONS)},
        "guidance_interval": list(request.guidance_interval),
        "init_image_hash": request.image_hash,
        "batch_size": b,
        "model": name,
        **computed_with(model, autocast),
    }
    parameters = [
        GenerationParameters(
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            seed=spec.seed,
            batch_index=i,
            dropped_words=dropped[i],
            **shared,
        )
        for i, spec in enumerate(batch)
    ]
    if request.output_type == "pil":
        images = painted(pictures.unit_to_pil(unit), parameters, file)
    elif request.output_type == "latent":
        images = latents
    else:
        images = unit if request.output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()
    return GenerationResult(images, [spec.seed for spec in batch], parameters, latents, file)


def computed_with(model: LatentDiffusion, autocast: torch.dtype | None) -> dict[str, Any]:
    """Say what a picture was computed with: device, dtypes, threads, torch's version and ours."""
    from ldm import __version__

    mixed = f", autocast {dtype_name(autocast)}" if autocast else ""
    return {
        "device": str(model.device),
        "dtype": dtype_name(dtype_of(model)) + mixed,
        "vae_dtype": dtype_name(dtype_of(model.first_stage_model)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
    }


# --- the model and its doors ----------------------------------------------------------------------


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
        self._averaged = False
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
            low_vram: leave the weights in the machine's memory and let them visit the device part by part.
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

        Weights that visit a device in turn (low_vram) stay where they are moved to; call `optimize` again.
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
            tiled_vae: encode and decode large pictures in strips, in a fraction of the memory and without seams.
            sliced_vae: encode and decode the pictures of a batch one after the other.
            low_vram: a device that the weights, which stay where they are, visit part by part.
            vae_graphs: record the VAE as CUDA graphs, too; each keeps gigabytes.

        Raises:
            UsageError: low_vram is no GPU, or not there; ways that do not go together.
        """
        from ldm.kernels import optimize

        if low_vram is not None:
            low_vram = check_low_vram(pick_device(low_vram))
        vae = {"tiled_vae": tiled_vae, "sliced_vae": sliced_vae, "vae_graphs": vae_graphs}
        optimize(self.model, compile=compile, low_vram=low_vram, **vae)
        return self

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
            found = None if name.startswith("_") else near(name, [*dir(type(self)), *vars(self)], 0.75)
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

    # --- doors ---

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
        strength: float = 0.75,
        *,
        callback: Callable[[Progress], Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Repaint a picture: strength 0 returns it, 1 forgets it. The rest as in txt2img."""
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
        return check_request(self.model, self.defaults, prompt, **options)

    # --- painting ---

    @torch.no_grad()
    def paint(self, request: Request) -> Iterator[Progress]:
        """Paint what plan() checked, batch by batch; a batch that does not fit into memory is halved. See stream()."""
        if self._averaged:
            raise UsageError(
                "this model's moving average paints another stream; finish or close that one first"
            )
        if request.rng == "compvis":
            seed_everything(request.images[0].seed)
        shared: dict[str, Any] = {}  # what later batches use again

        def work(batch: Sequence[ImageSpec], index: int, count: int) -> Iterator[Progress]:
            progress = partial(Progress, batch=index, batches=count, preview_of=self._preview)
            with self._averages():
                yield from paint_batch(
                    self.model, request, batch, shared, progress, self.name, self.file, self.autocast
                )

        def refusal(count: int) -> str:
            return (
                f"out of memory at {request.width} x {request.height}, {count} at once, in {dtype_name(self.dtype)}; "
                "use a smaller size or batch, or half precision"
            )

        # The one generator of rng="compvis" draws for a whole batch at once.
        yield from in_batches(
            request.images, request.batch_size, work, refusal=refusal, may_halve=request.rng != "compvis"
        )

    @contextlib.contextmanager
    def _averages(self) -> Iterator[None]:
        """Paint with the moving average where a model keeps one, as CompVis's scripts do.

        The scope has one place for the present weights, so that a second stream within it would lose them.
        """
        self._averaged = self.model.use_ema
        try:
            with self.model.ema_scope():
                yield
        finally:
            self._averaged = False


# These methods take check_request's options: they are written down once, and help() and completion show them at each.
for _name in ("stream", "txt2img", "img2img", "inpaint"):
    setattr(StableDiffusion, _name, taking_options_of(check_request)(getattr(StableDiffusion, _name)))
StableDiffusion.__call__ = StableDiffusion.txt2img
