"""What OpenAI's chains sample and measure: OpenAI's pixel models, latent models of ours, and their conditions.

Both kinds of model have the same attributes and methods, so that ldm.guided_diffusion.sampling and likelihood need not
know which it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.advice import SEED_BITS
from ldm.checkpoints import Weights, load_latent_diffusion, open_weights
from ldm.checkpoints.families import family_of
from ldm.checkpoints.folders import is_diffusers_folder
from ldm.errors import MismatchError, UsageError, escaped
from ldm.generate import decode, encode_image, encode_prompt
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.gaussian_bridge import GuidedNetwork, as_gaussian_diffusion
from ldm.guided_diffusion.script_util import COLOURS, diffusion_from_flags
from ldm.images import preview, to_pil, to_uint8
from ldm.kernels import optimize
from ldm.models.introspect import downsampling, dtype_of, is_inpainting
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, SuperResModel
from ldm.modules.diffusionmodules.util import check_label_range
from ldm.noise import ImageNoise
from ldm.paths import shipped
from ldm.pipeline import StableDiffusion
from ldm.request import check_size, list_texts

if TYPE_CHECKING:
    from PIL import Image

CLASS_STREAM = 1  # keeps the draw of sample i's class apart from the draws of its noise
PIXEL_UNIT = "bits per dimension of pictures in 8 bits: of a code that names them exactly, never negative"
LATENT_UNIT = (
    "bits per dimension of latents in scaled units, of a density: no bits of pixels, possibly negative, comparable "
    "only between models of one first stage"
)


@dataclass(frozen=True)
class Conditions:
    """Conditions of all samples of a run; None where the model has no such condition.

    labels: (n,) classes. low_res: (m, h, w, 3) uint8, small pictures for an upsampler, used over and over. prompts: n
    texts. guidance_scale: how strictly the prompts are followed; 1 = no guidance.
    """

    labels: Tensor | None = None
    low_res: np.ndarray | None = None
    prompts: Sequence[str] | None = None
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class ConditionedNetwork:
    """A network and the conditions of one batch, as GaussianDiffusion takes them: network(x, t, **kwargs)."""

    network: Callable[..., Tensor]
    kwargs: dict[str, Tensor]


class PixelModel:
    """A model or upsampler of OpenAI's family.

    Attributes:
        network, diffusion: the UNet, and the SpacedDiffusion that it denoises by.
        device, dtype: where the UNet is, and what its blocks compute in.
        flags: all of them, those of the file included.
        file, name: what pictures say about the model.
        shape: of a sample, (3, size, size). size: side of the pictures in pixels.
        upscales: it makes large pictures from small ones.
        num_classes: of the labels that it takes, or None.
        takes_prompts: no model of this kind does.

    Args:
        path, device, source, given: as load_openai_model takes them; timestep_respacing shortens the chain.

    Raises:
        As load_openai_model, and MismatchError for a classifier.
    """

    unit = PIXEL_UNIT
    takes_prompts = False

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        source: Weights | None = None,
        **given: Any,
    ):
        self.network, self.flags, self.report = load_openai_model(path, device=device, source=source, **given)
        if isinstance(self.network, EncoderUNetModel):
            raise MismatchError(
                f"'{escaped(path)}' is a classifier, which paints nothing; give a model, and this as --classifier_path"
            )
        self.file = Path(path)
        self.name = self.file.stem
        self.device, self.dtype = torch.device(device), self.network.dtype
        self.upscales = isinstance(self.network, SuperResModel)
        self.size = self.flags["large_size" if self.upscales else "image_size"]
        self.shape = (COLOURS, self.size, self.size)
        self.num_classes = self.network.num_classes
        self.respace(self.flags["timestep_respacing"])

    def respace(self, respacing: str) -> None:
        """Choose the levels of the chain, as space_timesteps takes them; "" = all.

        Raises:
            UsageError: an impossible respacing.
        """
        self.flags["timestep_respacing"] = self.respacing = respacing
        self.diffusion = diffusion_from_flags(self.flags)

    def condition(self, conditions: Conditions, rows: Sequence[int]) -> ConditionedNetwork:
        """Condition the network for these of the samples, on labels and small pictures.

        Labels that only a classifier is guided by are kept from a network that takes none.
        """
        kwargs = {}
        if conditions.labels is not None:
            kwargs["y"] = conditions.labels[list(rows)].to(self.device)
        if conditions.low_res is not None:
            small = conditions.low_res[[i % len(conditions.low_res) for i in rows]]
            kwargs["low_res"] = (torch.from_numpy(small).permute(0, 3, 1, 2) / 127.5 - 1).to(self.device)
        network = self.network if self.num_classes is not None else _without_labels(self.network)
        return ConditionedNetwork(network, kwargs)

    def encode(self, pictures: Tensor, noise: ImageNoise) -> Tensor:
        """Give what is noised: the pictures."""
        return pictures.to(self.device)

    def to_pictures(self, x: Tensor) -> np.ndarray:
        """Turn samples (b, 3, size, size) into (b, size, size, 3) uint8."""
        return to_uint8(x)

    def preview(self, pred_x0: Tensor) -> list[Image.Image]:
        """Turn predicted clean samples (b, 3, size, size) into pictures."""
        return to_pil(pred_x0)

    def optimize(self) -> None:
        """Compute faster, with the same numbers up to rounding: ldm.kernels.optimize."""
        optimize(self.network)

    def averages(self) -> AbstractContextManager[None]:
        """Sample with the moving average: OpenAI's files hold either it or the plain weights."""
        return nullcontext()


def _without_labels(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, y=None, **kwargs: network(x, t, **kwargs)


class LatentModel:
    """A latent diffusion model by OpenAI's chains.

    Attributes:
        model, diffusion: the LatentDiffusion, and the SpacedDiffusion that it denoises by.
        device, dtype: where the UNet is, and what it computes in.
        file, name: what pictures say about the model.
        shape: of its latents, (c, h, w). size: height of the pictures in pixels.
        takes_prompts: it is conditioned on text.
        upscales, num_classes: no model of this kind does, or takes labels.

    Args:
        path, config, device, source: as load_latent_diffusion takes them.
        respacing: levels of the chain, as space_timesteps takes them; "" = all. respace() changes it.
        image_size: side of the pictures in pixels; None = the model's own.

    Raises:
        As load_latent_diffusion; UsageError: an impossible size or respacing; MismatchError: an inpainting model.
    """

    unit = LATENT_UNIT
    upscales, num_classes = False, None

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        config: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        source: Weights | None = None,
        respacing: str = "",
        image_size: int | None = None,
    ):
        self.model, self.report = load_latent_diffusion(path, config=config, device=device, source=source)
        if is_inpainting(self.model):
            raise MismatchError(
                f"'{escaped(path)}' is an inpainting model, which needs pictures; use inpaint.py"
            )
        self._pipeline = StableDiffusion(self.model, file=path, report=self.report)
        self.file, self.name = self._pipeline.file, self._pipeline.name
        self.device, self.dtype = self.model.device, dtype_of(self.model)
        f = downsampling(self.model)
        sides = self._pipeline.defaults.size if image_size is None else (image_size, image_size)
        height, width = (check_size("image_size", side, f) for side in sides)
        self.shape = (self.model.channels, height // f, width // f)
        self.size = height
        self.takes_prompts = self.model.cond_stage_model is not None
        self.respace(respacing)
        self._features: dict[str, Tensor] = {}  # of the last batch's prompts

    def respace(self, respacing: str) -> None:
        """Choose the levels of the chain, as space_timesteps takes them; "" = all.

        Raises:
            UsageError: an impossible respacing.
        """
        _, self.diffusion = as_gaussian_diffusion(self.model, timestep_respacing=respacing)
        self.respacing = respacing

    def condition(self, conditions: Conditions, rows: Sequence[int]) -> ConditionedNetwork:
        """Condition the network for these of the samples, on prompts; guidance is against the empty prompt."""
        context = unconditional = None
        if conditions.prompts is not None:
            prompts = [conditions.prompts[i] for i in rows]
            # Of many captions only those of one batch are kept.
            self._features = {text: self._features[text] for text in {*prompts, ""} & self._features.keys()}
            context = encode_prompt(self.model, prompts, self._features)
            if conditions.guidance_scale != 1:
                unconditional = encode_prompt(self.model, [""] * len(prompts), self._features)
        network = GuidedNetwork(
            self.model,
            context,
            unconditional_conditioning=unconditional,
            guidance_scale=conditions.guidance_scale,
        )
        return ConditionedNetwork(network, {})

    def encode(self, pictures: Tensor, noise: ImageNoise) -> Tensor:
        """Draw latents of pictures (b, 3, height, width), in scaled units, each with its own generator."""
        latents = [
            encode_image(self.model, picture[None], 1, lambda like, g=g: torch.randn(like.shape, generator=g))
            for picture, g in zip(pictures, noise.generators, strict=True)
        ]
        return torch.cat(latents)

    def to_pictures(self, x: Tensor) -> np.ndarray:
        """Decode latents into (b, height, width, 3) uint8."""
        return to_uint8(decode(self.model, x))

    def preview(self, pred_x0: Tensor) -> list[Image.Image]:
        """Turn predicted clean latents into small pictures by a linear approximation of the decoder."""
        return preview(pred_x0, *self._pipeline.latent_rgb)

    def optimize(self) -> None:
        """Compute faster, with the same numbers up to rounding: ldm.kernels.optimize."""
        self._pipeline.optimize()

    def averages(self) -> AbstractContextManager[None]:
        """Sample with the moving average where the model keeps one, as CompVis's scripts do."""
        return self.model.ema_scope()


Model = PixelModel | LatentModel


def open_model(
    path: str | os.PathLike | None = None,
    *,
    config: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    flags: Mapping[str, Any] | None = None,
) -> Model:
    """Load a pixel checkpoint of OpenAI's family or a latent model of ours, whichever the file is; it is read once.

    Args:
        path: the file; for a latent model also a diffusers folder, or CompVis's, with model.ckpt and config.yaml;
            None takes the model in the box.
        config: of a latent model; None takes a config.yaml beside the file, or reads it off the weights.
        flags: the caller's, by OpenAI's names. A latent model takes timestep_respacing and image_size.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: another kind of file, or flags that contradict it.
        UsageError: an impossible flag, or one that this kind of model does not take.
    """
    path = Path(shipped("model_data/shapes/shapes.safetensors") if path is None else path)
    flags = dict(flags or {})
    if is_diffusers_folder(path):
        return _open_latent(path, config, device, None, flags)
    path = path / "model.ckpt" if path.is_dir() else path
    with closing(open_weights(path)) as source:
        if family_of(source.infos).startswith("v1"):
            return _open_latent(path, config, device, source, flags)
        if config is not None:
            raise UsageError(
                f"'{escaped(path)}' is no latent model; leave --config out, flags say how it is built"
            )
        return PixelModel(path, device=device, source=source, **flags)  # judges whatever else it may be


def _open_latent(
    path: Path,
    config: str | os.PathLike | None,
    device: str | torch.device,
    source: Weights | None,
    flags: dict[str, Any],
) -> LatentModel:
    """Load a latent model; of OpenAI's flags it takes two."""
    respacing, image_size = flags.pop("timestep_respacing", ""), flags.pop("image_size", None)
    if flags:
        raise UsageError(
            f"--{next(iter(flags))} is for OpenAI's pixel models; '{escaped(path)}' is a latent model"
        )
    return LatentModel(
        path, config=config, device=device, source=source, respacing=respacing, image_size=image_size
    )


class Classifier:
    """A classifier of noisy pictures, as the guide of a chain (arXiv:2105.05233, section 4).

    Attributes:
        name: what pictures say about it.
        num_classes: of which it gives the probabilities.

    Args:
        path, device, flags: as load_openai_model takes them.
        model: that it is to guide.
        scale: of the gradient.

    Raises:
        As load_openai_model; MismatchError: no classifier, or one that does not fit the model.
    """

    def __init__(self, path: str | os.PathLike, model: Model, *, scale: float = 1.0, **flags: Any):
        if not isinstance(model, PixelModel):
            raise MismatchError(
                "a classifier of pixels cannot guide a latent model; leave --classifier_path out"
            )
        network, _, self.report = load_openai_model(path, device=model.device, image_size=model.size, **flags)
        if not isinstance(network, EncoderUNetModel):
            raise MismatchError(
                f"'{escaped(path)}' is no classifier but a {self.report.family}; it has no classes"
            )
        if model.num_classes not in (None, network.out_channels):
            raise MismatchError(
                f"the classifier has {network.out_channels} classes, the model has {model.num_classes}"
            )
        self.network, self.scale = network.requires_grad_(False), scale
        self.num_classes = network.out_channels
        self.name = Path(path).stem

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **others: Tensor) -> Tensor:
        """Give scale times the gradient of log p(y | x_t) by x_t, shaped like x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = self.network(x, t).float().log_softmax(dim=-1).gather(1, y[:, None])  # (b, 1)
            return self.scale * torch.autograd.grad(chosen.sum(), x)[0]


def choose_labels(num_classes: int | None, given: Sequence[int], seeds: Sequence[int]) -> Tensor | None:
    """Choose a label for each sample, (n,): those given, over and over, or else one drawn from its seed.

    Labels have generators of their own, so that a label that is given leaves the sample's noise as it was.

    Args:
        num_classes: of the model or its classifier; None for neither.

    Raises:
        UsageError: labels for a model without classes, or out of range.
    """
    if num_classes is None:
        if given:
            raise UsageError(f"--class {given[0]} needs a model with classes or a classifier, got neither")
        return None
    if given:
        check_label_range(torch.tensor(given), num_classes)
        return torch.tensor([given[i % len(given)] for i in range(len(seeds))])
    # Of a seed as many bits count as for the noise.
    draws = [
        np.random.default_rng((CLASS_STREAM, seed % 2**SEED_BITS)).integers(num_classes) for seed in seeds
    ]
    return torch.tensor(np.array(draws))


def choose_conditions(
    model: Model,
    seeds: Sequence[int],
    *,
    classes: Sequence[int] = (),
    guide: Classifier | None = None,
    base: tuple[np.ndarray, np.ndarray | None] | None = None,
    prompt: str | None = None,
    guidance_scale: float | None = None,
) -> Conditions:
    """Choose the conditions of a run's samples, one for each seed.

    Args:
        classes, guide: see choose_labels.
        base: small pictures and their labels, as read_samples gives them; used over and over.
        prompt, guidance_scale: for a latent model; without a prompt it is the empty one. Without a scale it is
            guided as its configuration advises, or else not at all.

    Raises:
        UsageError: a condition that this kind of model does not take, or lacks.
    """
    if isinstance(model, LatentModel):
        wrong = "--class" if classes else "--base_samples" if base is not None else None
        if wrong is not None:
            raise UsageError(f"{wrong} is for OpenAI's pixel models, the model is a latent one; leave it out")
        if not model.takes_prompts:
            if prompt is not None or guidance_scale not in (None, 1):
                raise UsageError("this model is unconditional; leave --prompt and --scale out")
            return Conditions()
        if guidance_scale is None:  # the empty prompt against itself is no guidance
            guidance_scale = (model.report.sampling.guidance_scale or 1.0) if prompt else 1.0
        prompts = list_texts("prompt", prompt or "") * len(seeds)
        return Conditions(prompts=prompts, guidance_scale=guidance_scale)
    if prompt is not None or guidance_scale not in (None, 1):
        raise UsageError(
            "--prompt and --scale are for latent models, the model is one of pixels; use --class"
        )
    if model.upscales and base is None:
        raise UsageError("this model enlarges pictures; give them as --base_samples samples.npz")
    if base is not None and not model.upscales:
        raise UsageError("--base_samples is for models that enlarge pictures, this is none; leave it out")
    if base is not None and model.num_classes is not None and not classes:
        if base[1] is None:
            raise UsageError("--base_samples hold no labels (arr_1), which this model needs; give --class")
        classes = base[1].tolist()
    num_classes = guide.num_classes if model.num_classes is None and guide is not None else model.num_classes
    low_res = None if base is None else base[0]
    return Conditions(labels=choose_labels(num_classes, classes, seeds), low_res=low_res)
