"""What a caller asks of a model: a request, every part of it checked before any work is done."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.deepcache import DeepCache, check_cache
from ldm.adapters.tome import TokenMerging, check_merging
from ldm.adapters.use import PromptWords, check_adapters

# Some of these are for those who import them from here, or from ldm.wish as this module was called.
from ldm.devices import check_low_vram, dtype_name, pick_device, pick_dtype  # noqa: F401
from ldm.errors import UsageError, shown
from ldm.limits import (
    AUTO,
    AUTO_AT_MOST,
    AUTO_CELLS,
    BATCH_SIZE,
    CELLS,
    GUIDANCE_SCALE,
    MAX_PROMPT,
    MAX_SEED,
    NUM_IMAGES,
    RNGS,
    SHARE,
    about_whole,
    choice,
    is_whole,
    real,
    whole,
)
from ldm.models.diffusion.samplers import (
    SAMPLERS,
    WHOLE_INTERVAL,
    check_eta,
    check_interval,
    split_sampler,
    start_level,
)
from ldm.models.introspect import context_width, downsampling, dtype_of, is_inpainting, native_size  # noqa: F401
from ldm.process.sigmas import check_sigmas

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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks of a model, every part of it checked; check_request makes them."""

    mode: Literal["txt2img", "img2img", "inpaint"]
    images: list[ImageSpec]
    batch_size: int
    height: int
    width: int
    image: Tensor | None  # (1, 3, height, width) in [-1, 1], for the encoder
    original: Tensor | None  # the same in [0, 1], as it comes back where nothing is painted
    image_hash: str | None
    mask: Tensor | None  # (1, 1, height, width), 1 = repaint
    strength: float | None
    run_last: int  # of the steps, with a picture to start from
    steps: int
    sampler: str
    spacing: str | list[float] | None
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    cache_interval: int
    cache_depth: int
    merge_ratio: float
    merge_seed: int | None
    eta: float
    rng: Literal["image", "nv", "compvis"]
    fixed_code: bool
    output_type: Literal["pil", "np", "pt", "latent"]
    embeds: Tensor | None
    negative_embeds: Tensor | None
    adapters: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        how = f"{self.sampler}, {self.steps} steps, guidance_scale {self.guidance_scale:g}"
        return f"Request({self.mode}, {len(self.images)} of {self.width} x {self.height}, {how})"


Job, Shot = Request, ImageSpec  # as they were called in ldm.wish


def check_request(
    model: LatentDiffusion,
    defaults: SamplingDefaults,
    prompt: str | Sequence[str] | None,
    *,
    negative_prompt: str | Sequence[str] = "",
    image: Any = None,
    mask: Any = None,
    strength: float | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
    spacing: str | Sequence[float] | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] = WHOLE_INTERVAL,
    cache_interval: int = 1,
    cache_depth: int = 1,
    merge_ratio: float = 0.0,
    merge_seed: int | None = None,
    eta: float | None = None,
    seed: int | str | Sequence[int] | None = None,
    num_images: int = 1,
    batch_size: int | Literal["auto"] = 4,
    rng: Literal["image", "nv", "compvis"] = "image",
    fixed_code: bool = False,
    output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    adapters: Sequence[Any] = (),
) -> Request:
    """Check every part of a request against a model, without painting.

    Args:
        prompt: a text, or several; each is painted num_images times, in this order.
        negative_prompt: one text for all, or one for each prompt; None is the empty one.
        image: PIL picture, path, or (1, 3, height, width) in [-1, 1]: repaint this one.
        mask: PIL picture, path, or (1, 1, height, width): white, or 1, is repainted, the rest kept.
        strength: 0 to 1, how much of the picture is forgotten; default 0.75, with a mask 1.
        height, width: pixels, multiples of the model's f (8); default the picture's or the model's own.
        steps: 1 to the model's number of levels; with strength, that share of them is run. None is the model's
            (`defaults`), or the fewest that it advises for this sampler if those are more.
        sampler: "ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m", "euler", "euler_a", "heun", "dpm2", "dpm2_a",
            "lms", "dpmpp_2s_a", in any usual spelling, also with its spacing: "DPM++ 2M Karras".
        spacing: which levels are visited: "karras", "trailing" and others of docs/samplers.md, or steps + 1 sigmas;
            None is the sampler's own.
        guidance_scale: 0 to 100; 1 ignores the negative prompt and takes half the time; None is the model's.
        guidance_interval: (low, high): only levels t of T with low <= t / T < high are guided, the others
            take half the time; 0 is the cleanest.
        cache_interval: ask the whole UNet at every so many-th step only, and at the steps between its
            outermost `cache_depth` blocks on either way.
        merge_ratio: 0 to 0.75, the share of tokens that are merged before the finest self-attentions;
            merge_seed draws which ones may be merged into. All five: docs/knobs.md.
        eta: 0 to 1, fresh noise in each step of DDIM and of the ancestral samplers; None is the sampler's own, 0 for
            DDIM and 1 for "euler_a" and its like.
        seed: image i has seed + i; a list names each; None, -1 and "random" draw one, which is in the result's seeds.
            0 to 2^64 - 1, of which the generator on the CPU keeps 32 bits: 2^32 + 5 paints what 5 paints (not with
            rng="nv", which keeps all).
        batch_size: how many are painted at once; no image depends on it but for rounding (not rng="compvis"). "auto" is
            fast for many small pictures: as many as have together the latent cells of one of 512 x 512, 16 at most.
        rng: "image" draws image i from its own CPU generator; "nv" draws it as an NVIDIA GPU does, on any
            device, A1111's "NV" and what its seeds mean on such a GPU; "compvis" seeds the global generators
            once, at the call, and draws whole batches in the original's order: picture encoding, x_T,
            then each step. With "compvis" a picture depends on its place in its batch.
        fixed_code: begin every batch with the same noise, CompVis's --fixed_code.
        output_type: "pil"; "np" (n, height, width, 3) and "pt" (n, 3, height, width) in [0, 1]; "latent".
        prompt_embeds, negative_prompt_embeds: (n, tokens, d) text features that replace the prompts'.
        adapters: of ldm.adapters: LoRA, Embedding, ControlNet, T2IAdapter, IPAdapter, TokenMerging, DeepCache, any
            number; docs/adapters.md, docs/controls.md.

    Raises:
        UsageError: a value out of range, or of another kind.
        MismatchError: an adapter that is for another model.
    """
    rng = choice("rng", rng, RNGS)
    if not isinstance(fixed_code, bool | np.bool_):
        raise UsageError(f"fixed_code must be True or False, got {shown(fixed_code)}")
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale
    is_inpainting(model)  # refuses UNets of other kinds
    f = downsampling(model)
    picture = check_picture(image, mask, strength, width, height, f, defaults)
    if isinstance(batch_size, str) and batch_size == AUTO:
        batch_size = auto_batch_size(picture["height"] // f, picture["width"] // f)
    batch_size = whole("batch_size", batch_size, *BATCH_SIZE)
    prompts, negatives = list_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
    check_embeds(prompt_embeds, negative_prompt_embeds, context_width(model))
    num_images = whole("num_images", num_images, *NUM_IMAGES)
    seeds = list_seeds(seed, len(prompts) * num_images)
    if rng == "compvis":
        seeds = [seeds[0]] * len(seeds)
    elif fixed_code:
        seeds = [seeds[i % batch_size] for i in range(len(seeds))]
    words = [*prompts, *negatives] if prompt_embeds is None else []
    adapting = check_adapting(model, words, adapters, cache_interval, cache_depth, merge_ratio, merge_seed)
    return Request(
        images=[
            ImageSpec(
                prompts[i],
                negatives[i],
                seeds[i * num_images + j],
                i if prompt_embeds is not None else None,
            )
            for i in range(len(prompts))
            for j in range(num_images)
        ],
        batch_size=batch_size,
        **picture,
        **check_sampling(model, defaults, sampler, steps, spacing, eta, picture["strength"]),
        guidance_scale=real("guidance_scale", guidance_scale, *GUIDANCE_SCALE),
        guidance_rescale=real("guidance_rescale", guidance_rescale, *SHARE),
        guidance_interval=check_interval(guidance_interval),
        **adapting,
        rng=rng,
        fixed_code=fixed_code,
        output_type=choice("output_type", output_type, ("pil", "np", "pt", "latent")),
        embeds=prompt_embeds,
        negative_embeds=negative_prompt_embeds,
    )


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
) -> dict[str, Any]:
    """Check the sampler and its steps, and how many of them a picture's strength leaves to be run."""
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
    run_last, _ = start_level(sampler, model, steps, strength or 0.0, spacing=spacing)
    eta = SAMPLERS[sampler].own_eta if eta is None else real("eta", eta, *SHARE)
    check_eta(SAMPLERS[sampler], eta)
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


def list_seeds(seed: Any, count: int) -> list[int]:
    """List one seed for each of count images: seed + i, or a list as given.

    None, -1 and "random" draw one, also within a list.

    Raises:
        UsageError: no such seed, or a list of another length.
    """

    def one(value: Any, high: int) -> int:
        if value is None or (isinstance(value, str | int | np.integer) and value in RANDOM_SEEDS):
            return draw_seed()
        if not is_whole(value, 0, high):
            raise UsageError(
                f"seed must be {about_whole(0, high)}, or -1, 'random' or None to draw one; got {shown(value)}"
            )
        return int(value)

    seed = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise UsageError(f"a list of seeds must name one for each image, wanted {count}, got {len(seed)}")
        return [one(value, MAX_SEED) for value in seed]
    first = one(seed, MAX_SEED - count + 1)
    return [first + i for i in range(count)]
