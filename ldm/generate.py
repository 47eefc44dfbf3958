"""From prompt to picture: encode the prompt, draw noise, denoise step by step, decode.

Read `paint_batch` first; the functions above it are its steps. What may be asked of a model is checked in ldm.request,
what comes out is in ldm.results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.deepcache import DeepCache
from ldm.adapters.tome import TokenMerging
from ldm.adapters.use import begun, described, text_scope, unet_attachments, vae_scope
from ldm.devices import dtype_name
from ldm.errors import (
    NumericError,
)
from ldm.helpers import living_in
from ldm.hires import LATENT, enlarge_latents, enlarge_pictures, middle
from ldm.models.diffusion.conditions import ScheduledCondition
from ldm.models.diffusion.samplers import (
    SAMPLERS,
    Noise,
    Step,
    sample_steps,
)
from ldm.models.introspect import downsampling, dtype_of, is_inpainting
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.seams import GuidanceTerm, Scope, StepInfo
from ldm.noise import (
    CompVisNoise,  # noqa: F401 (this and the next three are imported from here by other people's code)
    ImageNoise,  # noqa: F401
    NvNoise,  # noqa: F401
    SeedOptions,
    Source,
    noise_sources,
    seed_everything,  # noqa: F401
)
from ldm.options import told
from ldm.prompting import encode_batch, reads_languages
from ldm.request import ImageSpec, Pass, Request, Start
from ldm.results import GenerationParameters, GenerationResult, Progress, painted, versions

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

# --- its steps ------------------------------------------------------------------------------------


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
    model: LatentDiffusion, request: Request, one: Pass, batch: Sequence[ImageSpec], shared: dict[str, Any]
) -> tuple[Tensor, Tensor | None, list[list[str]]]:
    """Encode prompts and, if guidance needs them, negative prompts; list the words that did not fit.

    Args:
        one, batch: a pass, and the images that are painted at once, as it paints them.
        shared: what the batches of a request use again: features of their prompts, and the text encoder's adapters.

    Returns:
        context and unconditional context, (b, n, d) each (None where nothing is guided), and dropped words.
    """
    guided = one.guidance_scale != 1.0 or SAMPLERS[one.sampler].needs_unconditional
    if request.embeds is not None:
        rows = [spec.row for spec in batch]
        context = request.embeds[rows].to(model.device)
        unconditional = request.negative_embeds[rows].to(model.device) if guided else None
        return context, unconditional, [[] for _ in batch]
    known: dict[str, Tensor] = shared.setdefault("features", {})
    wanted = {text for spec in batch for text in (spec.prompt, spec.negative_prompt)}
    for text in known.keys() - wanted:  # a list of many prompts must not fill the memory
        del known[text]
    negatives = [spec.negative_prompt for spec in batch]
    if "text_scope" not in shared:
        shared["text_scope"] = text_scope(model, request.adapters)
    with shared["text_scope"]:
        context = encode_prompt(model, [spec.prompt for spec in batch], known)
        unconditional = encode_prompt(model, negatives, known) if guided else None
        dropped_words = getattr(model.cond_stage_model, "dropped_words", lambda text: [])
        dropped = [
            dropped_words(spec.prompt) + (dropped_words(spec.negative_prompt) if guided else [])
            for spec in batch
        ]
    return context, unconditional, dropped


def initial_latents(model: LatentDiffusion, count: int, height: int, width: int, noise: Source) -> Tensor:
    """Draw x_T, (count, c, height / f, width / f), on the model's device."""
    f = downsampling(model)
    like = torch.empty(count, model.channels, height // f, width // f, device=model.device)
    return noise.begin(like)


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
    with vae_scope(model, request.attachments):
        if request.rng != "compvis":
            return encode_image(model, image, b, noise)
        if key not in shared:
            count = min(request.batch_size, len(request.images))
            shared[key] = encode_image(model, image, count, noise)
        return shared[key][:b]


def masked_picture(
    model: LatentDiffusion, request: Request, one: Pass, b: int, noise: Noise, shared: dict[str, Any]
) -> Tensor:
    """Make what a 9-channel UNet sees beside its latents, (b, 1 + c, h, w): mask, then masked picture.

    Without a mask everything is to be repainted and the picture is grey, as its training had it.
    """
    f = downsampling(model)
    size = (one.height, one.width)
    mask = torch.ones(1, 1, *size) if one.start.mask is None else one.start.mask
    image = torch.zeros(1, 3, *size) if one.start.image is None else one.start.image
    z = encode_source(model, request, image * (mask < 0.5), b, noise, shared, "masked")
    return torch.cat([pictures.shrink_mask(mask, f, any_pixel=False).to(z).expand(b, -1, -1, -1), z], dim=1)


def _beside(concat: Tensor, context: Any) -> Any:
    """Put what a 9-channel UNet sees beside its latents into a condition; None stays None."""
    if isinstance(context, ScheduledCondition):
        return ScheduledCondition(context.rows_at, concat)
    return None if context is None else {"c_concat": [concat], "c_crossattn": [context]}


def starting_noise(
    model: LatentDiffusion, request: Request, one: Pass, b: int, noise: Source, shared: dict[str, Any]
) -> Tensor:
    """Draw x_T (b, c, h, w) for a batch; fixed_code in CompVis's order of draws takes that of the first batch again."""
    if not (request.fixed_code and request.rng == "compvis"):
        return initial_latents(model, b, one.height, one.width, noise)
    if "x_T" not in shared:
        shared["x_T"] = initial_latents(model, request.batch_size, one.height, one.width, noise)
    return shared["x_T"][:b]


def denoise(
    model: LatentDiffusion,
    x_T: Tensor,
    conditioning: Any,
    *,
    sampler: str,
    steps: int,
    autocast: torch.dtype | None = None,
    adapters: Sequence[Any] = (),
    cache_interval: int = 1,
    cache_depth: int = 1,
    merge_ratio: float = 0.0,
    merge_seed: int | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Step from noise to clean latents, one Step at a time; latents stay float32 whatever the UNet computes in.

    Args:
        x_T: (b, c, h, w) noise, or noised latents with run_last.
        adapters: what is attached to the UNet at each of its calls (ldm.modules.seams.Attachment), of ldm.adapters.
        cache_interval, cache_depth: see ldm.adapters.deepcache.DeepCache; 1 = everything at every level.
        merge_ratio, merge_seed: see ldm.adapters.tome.TokenMerging; 0 = every token.
        options: those of ldm.models.diffusion.samplers.sample_steps.

    Raises:
        NumericError: latents that are not finite; checked at the first and last step, on a CPU at each.
    """
    attachments = [*adapters, DeepCache(cache_interval, cache_depth), TokenMerging(merge_ratio, merge_seed)]
    total = steps if options.get("run_last") is None else options["run_last"]
    unconditional = options.get("unconditional_conditioning")
    seen = WithAttachments(model, autocast, attachments, total, len(x_T), unconditional)
    for step in sample_steps(sampler, seen, x_T, conditioning, steps=steps, **options):
        seen.step = StepInfo(step.index + 1, step.total)
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


class WithAttachments:
    """A model as samplers see it: with autocast, and what is attached to its UNet, around every call of that.

    Dtypes are DiffusionWrapper's matter: it casts to those of the UNet's weights, and the answer back to float32.

    Args:
        autocast: dtype of torch.autocast; None = none.
        attachments: attached to the UNet during each call and only then: between two steps the model may be used for
            anything else. Each has a run of its own (`begin`), so that two streams do not see each other.
        total: how many steps the sampler takes.
        batch: how many images there are.
        unconditional: the condition of calls that are without one; None = nothing is guided.

    Attributes:
        step: where the sampler is.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        autocast: torch.dtype | None,
        attachments: Sequence[Any],
        total: int,
        batch: int,
        unconditional: Any,
    ):
        self._model = model
        self._autocast = autocast
        self._attachments = [begun(one) for one in attachments]
        self._terms = [one for one in self._attachments if isinstance(one, GuidanceTerm)]
        self._batch, self._unconditional = batch, unconditional
        self._scopes: dict[tuple[int, ...], Scope] = {}
        self.step = StepInfo(0, total)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Predict as the model does."""
        on = self._autocast is not None
        # A model that keeps a moving average paints with it, as CompVis's scripts do.
        averages = [self._model.model_ema] if self._model.use_ema else []
        for attachment in self._attachments:
            attachment.at(
                replace(self.step, t=t, unconditional=self._rows_without(x, cond), images=self._batch)
            )
        with (
            self._scope(self._model.model, averages),
            self._scope(self._model.model.diffusion_model, self._attachments),
            torch.autocast(x.device.type, dtype=self._autocast, enabled=on),
        ):
            return self._model.apply_model(x, t, cond, *args, **kwargs)

    def _rows_without(self, x: Tensor, cond: Any) -> int:
        """Tell how many rows are without the condition: of a call that joins both, the first images' worth."""
        if self._unconditional is None:
            return 0
        # Of a scheduled condition, what it is at this call.
        if cond is getattr(self._unconditional, "current", self._unconditional):
            return len(x)
        own = sum(one.rows is not None for one in self._terms)  # of guidance terms, which have the condition
        return self._batch if len(x) == (2 + own) * self._batch else 0

    def guidance_terms(self) -> list[GuidanceTerm]:
        """List what adds to the guidance of the next call."""
        return [one for one in self._terms if one.guides(self.step)]

    def _scope(self, network: torch.nn.Module, attachments: Sequence[Any]) -> Scope:
        """Give the scope of the call before, which knows already what becomes of the weights, or a new one."""
        key = tuple(map(id, (network, *attachments)))
        if key not in self._scopes:
            self._scopes[key] = Scope(network, attachments)
        return self._scopes[key]


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
    """Paint one batch, pass by pass: encode the prompts, draw noise, denoise step by step; then decode.

    Args:
        batch: those of request.images that are painted at once.
        shared: what the batches of a request use again; empty at first.
        progress: makes the Progress of a step.
        name, file: of the model, for the pictures' metadata.
        autocast: see denoise.
    """
    done, latents = 0, None
    dropped: list[list[str]] = [[] for _ in batch]
    for place, one in enumerate(request.passes):
        own = shared.setdefault(place, {})
        keywords, words = begin_pass(model, request, place, batch, own, latents)
        dropped = [[*dict.fromkeys((*old, *new))] for old, new in zip(dropped, words, strict=True)]
        if one.gives_its_picture:
            latents = None
            continue
        to_come = sum(later.count for later in request.passes[place + 1 :])
        before = done
        for step in denoise(model, **keywords, autocast=autocast):
            latents = step.x_t
            done = before + step.index + 1
            yield progress(done, before + step.total + to_come, x_t=latents, pred_x0=step.pred_x0)
        # The samplers' last step does not blend again.
        if "mask" in keywords:
            latents = pictures.paste(keywords["x0"], latents, keywords["mask"])
    result = finish_batch(model, request, batch, latents, dropped, name, file, autocast)
    yield progress(done, done, x_t=result.latents, pred_x0=result.latents, result=result)


def begin_pass(
    model: LatentDiffusion,
    request: Request,
    place: int,
    batch: Sequence[ImageSpec],
    shared: dict[str, Any],
    before: Tensor | None,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Encode the prompts of a pass, and what it starts from, and draw its noise: all that denoise needs.

    Args:
        place: of the pass, counted from 0.
        shared: as in paint_batch, of this pass alone.
        before: (b, c, h, w) latents that the pass before gave; None is the picture that it started from.

    Returns:
        keywords of denoise, nothing where the picture to start from is the answer; and each prompt's dropped words.
    """
    one = request.passes[place]
    batch = one.images(batch)
    b = len(batch)
    f = downsampling(model)
    resize_from = request.seed_resize_from and tuple(side // f for side in reversed(request.seed_resize_from))
    extra = SeedOptions(
        [spec.variation_seed for spec in batch],
        request.variation_strength,
        resize_from,
        request.eta_noise_seed_delta,
    )
    noise, encoder_noise = noise_sources(request.rng, [spec.seed for spec in batch], extra)
    if request.embeds is None and reads_languages(request):
        context, unconditional = encode_batch(model, request, one, batch, shared)
        dropped = [[] for _ in batch]
    else:
        context, unconditional, dropped = encode_prompts(model, request, one, batch, shared)
    if one.gives_its_picture:
        return {}, dropped
    keywords: dict[str, Any] = {"noise": noise, **vars(one.sampling), **vars(one.guidance)}

    # Where to start: pure noise, or a picture noised to the level of its strength.
    start, z = one.start, None
    if start.kind == "picture":
        z = encode_source(model, request, start.image, b, encoder_noise, shared, "picture")
    elif start.kind == "before":
        z = enlarge(model, request, place, before, b, encoder_noise)
    if z is not None:
        keywords |= {"run_last": start.run_last, "start_from": z}  # (b, c, h, w)
    if is_inpainting(model):
        concat = masked_picture(model, request, one, b, encoder_noise, shared)
        context, unconditional = (_beside(concat, condition) for condition in (context, unconditional))
    elif start.mask is not None:
        keep = 1.0 - pictures.shrink_mask(start.mask, f, any_pixel=True)
        # CompVis's samplers mean the opposite of a user's mask: 1 keeps x0.
        keywords |= {"mask": keep.to(z).expand(b, -1, -1, -1), "x0": z}
    return keywords | {
        "x_T": starting_noise(model, request, one, b, noise, shared),
        "conditioning": context,
        "unconditional_conditioning": unconditional,
        "adapters": unet_attachments(request.attachments),
    }, dropped


def picture_of(
    model: LatentDiffusion, request: Request, start: Start, latents: Tensor | None, b: int
) -> Tensor:
    """Give the pictures (b, 3, height, width) in [0, 1] of what a pass gave, on the CPU; what is kept is pasted in.

    Args:
        start: of the pass.
        latents: (b, c, h, w); None stands for the picture that it started from.
    """
    if latents is None:
        return start.original.repeat(b, 1, 1, 1)
    with vae_scope(model, request.attachments):
        unit = pictures.to_unit(decode(model, latents)).cpu()
    return unit if start.mask is None else pictures.paste(unit, start.original, start.mask)


def latents_of(
    model: LatentDiffusion, request: Request, start: Start, latents: Tensor | None, b: int
) -> Tensor:
    """Give the latents (b, c, h, w) of what a pass gave, where that is the picture that it started from, too."""
    if latents is not None:
        return latents
    with vae_scope(model, request.attachments):
        return encode_image(model, start.image, b, torch.zeros_like)


def enlarge(
    model: LatentDiffusion, request: Request, place: int, before: Tensor | None, b: int, noise: Noise
) -> Tensor:
    """Enlarge what the pass before gave, (b, c, h, w), to the latents that a pass begins with.

    Where pictures are enlarged, each is encoded as one to start from is, noise drawn before x_T.

    Args:
        place, before: as in begin_pass.
    """
    f = downsampling(model)
    one, gave = request.passes[place], request.passes[place - 1].start
    width, height = one.start.enlarged
    if one.start.upscaler in LATENT:
        cells = enlarge_latents(
            latents_of(model, request, gave, before, b), (height // f, width // f), one.start.upscaler
        )
        return middle(cells, (one.height // f, one.width // f))
    larger = enlarge_pictures(
        picture_of(model, request, gave, before, b), one.start.enlarged, one.start.upscaler
    )
    larger = middle(larger, (one.height, one.width))
    draws = noise(torch.empty(b, model.channels, one.height // f, one.width // f))
    with vae_scope(model, request.attachments):
        return torch.cat(
            [
                encode_image(model, picture[None], 1, lambda like, draw=draw: draw[None])
                for picture, draw in zip(larger, draws, strict=True)
            ]
        )


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
    b, start = len(batch), request.passes[-1].start
    if request.output_type != "latent":
        unit = picture_of(model, request, start, latents, b)
    latents = latents_of(model, request, start, latents, b).float().cpu()
    shared = {
        **{one.name: one.kind.plain(getattr(request, one.name)) for one in told() if not one.each},
        "mode": request.mode,
        "init_image_hash": request.image_hash,
        "adapters": described(request.adapters),
        "batch_size": b,
        "model": name,
        **computed_with(model, autocast),
    }
    parameters = [
        GenerationParameters(
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            seed=spec.seed,
            variation_seed=spec.variation_seed,
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
    mixed = f", autocast {dtype_name(autocast)}" if autocast else ""
    return {
        "device": str(model.device),
        "dtype": dtype_name(dtype_of(model)) + mixed,
        "vae_dtype": dtype_name(dtype_of(model.first_stage_model)),
        **versions(),
    }


# Where these are defined is above this module.
__getattr__ = living_in("ldm.pipeline", "GenerationResult", "StableDiffusion", of=__name__)
