"""Samples and bits per dimension from OpenAI's pixel models, and from latent models of ours by the same chains.

What guided-diffusion's image_sample.py, classifier_sample.py, super_res_sample.py and image_nll.py do, and CompVis's
sample_diffusion.py. Sample i draws from a generator of its own, seed + i, so that the batch size changes no draw.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ldm.advice import SEED_BITS, about_seeds, about_size, about_steps, about_syntax, about_words
from ldm.checkpoints import load_latent_diffusion, open_weights
from ldm.checkpoints.families import family_of
from ldm.checkpoints.folders import is_diffusers_folder
from ldm.errors import AbsentError, FormatError, MismatchError, NumericError, UsageError, escaped
from ldm.generate import ImageNoise, decode, encode_image, encode_prompt
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.gaussian_bridge import as_gaussian_diffusion
from ldm.guided_diffusion.script_util import COLOURS, diffusion_from_flags
from ldm.images import grid, save_file, save_png, to_uint8
from ldm.kernels import optimize
from ldm.models.diffusion.gaussian_diffusion import check_labels
from ldm.models.diffusion.respace import SpacedDiffusion
from ldm.models.introspect import downsampling, is_inpainting, native_size
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, SuperResModel
from ldm.paths import shipped
from ldm.request import check_size, list_texts

MAX_IN_GRID = 64
MAX_BASE_BYTES = 4 * 2**30  # 10,000 pictures of 256 pixels are half of it
SHAPES_SEED = 2_000_003  # of scenes that no configuration here trains or validates on
CLASS_STREAM = 1  # keeps the draw of sample i's class apart from the draws of its noise
PIXEL_UNIT = "bits per dimension of pictures in 8 bits: of a code that names them exactly, never negative"
LATENT_UNIT = (
    "bits per dimension of latents in scaled units, of a density: no bits of pixels, possibly negative, comparable "
    "only between models of one first stage"
)

# --- models and what they are told ----------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A network that knows what a batch is told, the process that it denoises by, and further arguments for both."""

    network: Callable[..., Tensor]
    diffusion: SpacedDiffusion
    kwargs: dict[str, Tensor]


class PixelModel:
    """A model or upsampler of OpenAI's family.

    Attributes:
        flags: all of them, those of the file included.
        shape: of a picture, (3, size, size).
        upscales: it paints large pictures from small ones.
        num_classes: of the labels that it takes, or None.

    Args:
        path, device, given: as load_openai_model takes them; timestep_respacing shortens the chain.

    Raises:
        As load_openai_model, and MismatchError for a classifier.
    """

    unit = PIXEL_UNIT

    def __init__(self, path: str | os.PathLike, *, device: str | torch.device = "cpu", **given: Any):
        self.network, self.flags, self.report = load_openai_model(path, device=device, **given)
        if isinstance(self.network, EncoderUNetModel):
            raise MismatchError(
                f"'{escaped(path)}' is a classifier, which paints nothing; give a model, and this as --classifier_path"
            )
        self.diffusion = diffusion_from_flags(self.flags)
        self.device = torch.device(device)
        self.upscales = isinstance(self.network, SuperResModel)
        size = self.flags["large_size" if self.upscales else "image_size"]
        self.shape = (COLOURS, size, size)
        self.num_classes = self.network.num_classes

    def ask(self, labels: Tensor | None = None, small: Tensor | None = None) -> Asked:
        """Tell the network the labels (b,) and the small pictures (b, 3, h, w) of a batch.

        Labels that only a classifier is guided by go past a network that takes none.
        """
        kwargs = {"y": labels, "low_res": small}
        kwargs = {name: value.to(self.device) for name, value in kwargs.items() if value is not None}
        network = self.network if self.num_classes is not None else _without_labels(self.network)
        return Asked(network, self.diffusion, kwargs)

    def encode(self, pictures: Tensor, noise: ImageNoise) -> Tensor:
        """Give what is noised: the pictures."""
        return pictures.to(self.device)

    def paint(self, x: Tensor) -> np.ndarray:
        """Turn samples (b, 3, size, size) into (b, size, size, 3) uint8."""
        return to_uint8(x)

    def optimize(self) -> None:
        """Compute faster, with the same numbers up to rounding: ldm.kernels.optimize."""
        optimize(self.network)

    def averages(self) -> AbstractContextManager[None]:
        """Sample with the moving average: OpenAI's files hold either it or the plain weights."""
        return nullcontext()


def _without_labels(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def ask(x: Tensor, t: Tensor, y: Tensor | None = None, **kwargs: Tensor) -> Tensor:
        return network(x, t, **kwargs)

    return ask


class LatentModel:
    """A latent diffusion model by OpenAI's chains.

    Attributes:
        model: the LatentDiffusion.
        shape: of its latents, (c, h, w).
        is_conditional: it takes prompts.

    Args:
        path, config, device: as load_latent_diffusion takes them.
        respacing: levels to visit, as space_timesteps takes them; "" = all. respace() changes it.
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
        respacing: str = "",
        image_size: int | None = None,
    ):
        self.model, self.report = load_latent_diffusion(path, config=config, device=device)
        if is_inpainting(self.model):
            raise MismatchError(
                f"'{escaped(path)}' is an inpainting model, which needs pictures; use inpaint.py"
            )
        self.device = self.model.device
        f = downsampling(self.model)
        sides = self.report.sampling.size or native_size(self.model)
        if image_size is not None:
            sides = (image_size, image_size)
        height, width = (check_size("image_size", side, f) for side in sides)
        self.shape = (self.model.channels, height // f, width // f)
        self.size = height
        self.is_conditional = self.model.cond_stage_model is not None
        self.respace(respacing)
        self._features: dict[str, Tensor] = {}

    def respace(self, respacing: str) -> None:
        """Visit other levels, as space_timesteps takes them.

        Raises:
            UsageError: an impossible respacing.
        """
        as_gaussian_diffusion(self.model, timestep_respacing=respacing)
        self.respacing = respacing

    @property
    def steps(self) -> int:
        """How many levels are visited."""
        return as_gaussian_diffusion(self.model, timestep_respacing=self.respacing)[1].num_timesteps

    def ask(self, prompts: Sequence[str] | None = None, guidance_scale: float = 1.0) -> Asked:
        """Tell the network the prompts of a batch; None for an unconditional model."""
        context = unconditional = None
        if prompts is not None:
            context = encode_prompt(self.model, prompts, self._features)
            if guidance_scale != 1:
                unconditional = encode_prompt(self.model, [""] * len(prompts), self._features)
        network, diffusion = as_gaussian_diffusion(
            self.model,
            context,
            unconditional_conditioning=unconditional,
            guidance_scale=guidance_scale,
            timestep_respacing=self.respacing,
        )
        return Asked(network, diffusion, {})

    def encode(self, pictures: Tensor, noise: ImageNoise) -> Tensor:
        """Draw latents of pictures (b, 3, height, width), in scaled units, each with its own generator."""
        latents = [
            encode_image(self.model, picture[None], 1, lambda like, g=g: torch.randn(like.shape, generator=g))
            for picture, g in zip(pictures, noise.generators, strict=True)
        ]
        return torch.cat(latents)

    def paint(self, x: Tensor) -> np.ndarray:
        """Decode latents into (b, height, width, 3) uint8."""
        return to_uint8(decode(self.model, x))

    def optimize(self) -> None:
        """Compute faster, with the same numbers up to rounding: ldm.kernels.optimize."""
        optimize(self.model)

    def averages(self) -> AbstractContextManager[None]:
        """Sample with the moving average where the model keeps one, as CompVis's scripts do."""
        return self.model.ema_scope()


Model = PixelModel | LatentModel


def find_model(path: str | os.PathLike | None) -> tuple[Path, bool]:
    """Find a model's file, and tell whether it is a latent model; whatever else it may be, OpenAI's loader judges.

    Args:
        path: the file; for a latent model also a diffusers folder, or CompVis's, with model.ckpt and config.yaml;
            None takes the model in the box.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
    """
    path = Path(shipped("model_data/shapes/shapes.safetensors") if path is None else path)
    if is_diffusers_folder(path):
        return path, True
    path = path / "model.ckpt" if path.is_dir() else path
    with closing(open_weights(path)) as source:
        return path, family_of(source.infos).startswith("v1")


def open_model(
    path: str | os.PathLike | None,
    *,
    config: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    flags: Mapping[str, Any] | None = None,
) -> Model:
    """Load a pixel checkpoint of OpenAI's family or a latent model of ours, whichever the file is.

    Args:
        path: as find_model takes it.
        config: of a latent model; None takes a config.yaml beside the file, or reads it off the weights.
        flags: the caller's, by OpenAI's names. A latent model takes timestep_respacing and image_size.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: another kind of file, or flags that contradict it.
        UsageError: an impossible flag, or one that this kind of model does not take.
    """
    path, is_latent = find_model(path)
    flags = dict(flags or {})
    if not is_latent:
        if config is not None:
            raise UsageError(
                f"'{escaped(path)}' is no latent model; leave --config out, flags say how it is built"
            )
        return PixelModel(path, device=device, **flags)
    respacing, image_size = flags.pop("timestep_respacing", ""), flags.pop("image_size", None)
    if flags:
        raise UsageError(
            f"--{next(iter(flags))} is for OpenAI's pixel models; '{escaped(path)}' is a latent model"
        )
    return LatentModel(path, config=config, device=device, respacing=respacing, image_size=image_size)


class Classifier:
    """A classifier of noisy pictures, as the guide of a chain (arXiv:2105.05233, section 4).

    Attributes:
        num_classes: that it tells apart.

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
        size = model.shape[1]
        network, _, self.report = load_openai_model(path, device=model.device, image_size=size, **flags)
        if not isinstance(network, EncoderUNetModel):
            raise MismatchError(
                f"'{escaped(path)}' is no classifier but a {self.report.family}; it has no classes to tell"
            )
        if model.num_classes not in (None, network.out_channels):
            raise MismatchError(
                f"the classifier tells {network.out_channels} classes apart, the model has {model.num_classes}"
            )
        self.network, self.scale = network.requires_grad_(False), scale
        self.num_classes = network.out_channels

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
        check_labels(num_classes, torch.tensor(given))
        return torch.tensor([given[i % len(given)] for i in range(len(seeds))])
    # Of a seed as many bits count as for the noise.
    draws = [
        np.random.default_rng((CLASS_STREAM, seed % 2**SEED_BITS)).integers(num_classes) for seed in seeds
    ]
    return torch.tensor(np.array(draws))


def read_samples(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Read what `save_samples` or OpenAI's scripts wrote: pictures (n, h, w, 3) uint8, and labels (n,) or None.

    Raises:
        AbsentError: no such file.
        FormatError: no sound .npz of pictures.
    """
    name, wanted = escaped(path), "wanted an .npz with arr_0, pictures (n, h, w, 3) of type uint8"
    if not Path(path).is_file():
        raise AbsentError(f"samples file '{name}' does not exist; check the path")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            unpacked = sum(member.file_size for member in arrays.zip.infolist())
            if unpacked > MAX_BASE_BYTES:
                raise ValueError(f"{unpacked} bytes unpacked, at most {MAX_BASE_BYTES} are read")
            pictures = arrays["arr_0"]
            labels = arrays["arr_1"] if "arr_1" in arrays else None
    except Exception as error:  # numpy and zipfile raise nearly every kind of error on damaged files
        raise FormatError(f"samples file '{name}' cannot be read ({escaped(error)}); {wanted}") from None
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != COLOURS or not pictures.size:
        raise FormatError(f"samples file '{name}' holds {pictures.dtype} of shape {pictures.shape}; {wanted}")
    if labels is not None and (labels.shape != pictures.shape[:1] or labels.dtype.kind not in "iu"):
        raise FormatError(
            f"samples file '{name}' holds labels of {labels.dtype} and shape {labels.shape}; "
            f"wanted a whole number for each of {len(pictures)} pictures"
        )
    return pictures, labels


def what_to_tell(
    model: Model,
    seeds: Sequence[int],
    *,
    classes: Sequence[int] = (),
    guide: Classifier | None = None,
    base: tuple[np.ndarray, np.ndarray | None] | None = None,
    prompt: str | None = None,
    guidance_scale: float | None = None,
) -> tuple[Callable[[slice], Asked], Tensor | None]:
    """Prepare what the model is told about each of the samples, and list their labels, (n,) or None.

    Args:
        classes, guide: see choose_labels.
        base: small pictures and their labels, as read_samples gives them; used over and over.
        prompt, guidance_scale: for a latent model; without a prompt it is told the empty one. Without a scale it is
            guided as its configuration advises, or else not at all.

    Raises:
        UsageError: something that this kind of model is not told, or not told what it needs.
    """
    if isinstance(model, LatentModel):
        wrong = "--class" if classes else "--base_samples" if base is not None else None
        if wrong is not None:
            raise UsageError(f"{wrong} is for OpenAI's pixel models, the model is a latent one; leave it out")
        if not model.is_conditional and (prompt is not None or guidance_scale not in (None, 1)):
            raise UsageError("this model is unconditional; leave --prompt and --scale out")
        prompts = list_texts("prompt", prompt or "") * len(seeds) if model.is_conditional else None
        if guidance_scale is None:  # the empty prompt against itself is no guidance
            guidance_scale = (model.report.sampling.guidance_scale or 1.0) if prompt else 1.0
        return lambda rows: model.ask(None if prompts is None else prompts[rows], guidance_scale), None
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
    labels = choose_labels(num_classes, classes, seeds)

    def ask(rows: slice) -> Asked:
        small = None
        if base is not None:
            chosen = base[0][[i % len(base[0]) for i in range(rows.start, rows.stop)]]
            small = torch.from_numpy(chosen).permute(0, 3, 1, 2) / 127.5 - 1  # (b, 3, h, w)
        return model.ask(None if labels is None else labels[rows], small)

    return ask, labels


def advice(model: Model, recipe: Recipe, seeds: Sequence[int], prompt: str | None = None) -> list[str]:
    """Say in a line each what is known to go wrong: seeds of many bits and, with a latent model, words, size, steps."""
    lines = [about_seeds(seeds)]
    if isinstance(model, LatentModel):
        advised, f = model.report.sampling, downsampling(model.model)
        _, height, width = model.shape
        lines += [
            about_words(advised.known_words, [prompt or ""]),
            about_size(advised.known_sizes, width * f, height * f),
            about_steps(advised.least_steps, "ddim" if recipe.use_ddim else "ddpm", model.steps),
            *about_syntax([prompt or ""]).values(),
        ]
    return [line for line in lines if line is not None]


# --- sampling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a chain is walked.

    use_ddim: by DDIM instead of DDPM. eta: DDIM's fresh noise, 0 to 1. clip_denoised: keep predicted clean samples in
    [-1, 1]; None for what the data are, pixels or latents.
    """

    use_ddim: bool = False
    eta: float = 0.0
    clip_denoised: bool | None = None


def sample(
    model: Model,
    ask: Callable[[slice], Asked],
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    batch_size: int,
    guide: Classifier | None = None,
) -> Iterator[np.ndarray]:
    """Draw a sample for each seed; yield batches of pictures (b, height, width, 3) uint8.

    Args:
        ask: what the model is told for these of the samples.
        guide: moves samples towards the labels that they are told.

    Raises:
        NumericError: samples that are not finite.
        UsageError: eta out of range.
    """
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, min(start + batch_size, len(seeds)))
        shape = (rows.stop - start, *model.shape)
        noise = ImageNoise(seeds[rows])
        x_T = noise(torch.empty(shape, device=model.device))
        with torch.no_grad(), model.averages():
            asked = ask(rows)
            diffusion = asked.diffusion.drawing(noise)
            walk, options = diffusion.p_sample_loop, {}
            if recipe.use_ddim:
                walk, options = diffusion.ddim_sample_loop, {"eta": recipe.eta}
            x = walk(
                asked.network,
                shape,
                noise=x_T,
                clip_denoised=recipe.clip_denoised,
                cond_fn=guide,
                model_kwargs=asked.kwargs,
                **options,
            )
            yield model.paint(x)


def save_samples(folder: Path, pictures: np.ndarray, labels: Tensor | None) -> tuple[Path, Path]:
    """Save samples_{shape}.npz (arr_0 pictures, arr_1 labels) and a PNG of the first of them; nothing is overwritten.

    Raises:
        OutputError: the folder cannot be written.
    """
    from PIL import Image

    arrays = [pictures] if labels is None else [pictures, labels.numpy()]
    shape = "x".join(map(str, pictures.shape))
    npz = save_file(lambda file: np.savez(file, *arrays), folder / f"samples_{shape}.npz", rename=True)
    first = [Image.fromarray(one) for one in pictures[:MAX_IN_GRID]]
    return npz, save_png(grid(first), npz.with_suffix(".png"), rename=True)


# --- bits per dimension ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Pictures to measure: `read` gives the i-th as (3, height, width) in [-1, 1]."""

    read: Callable[[int], Tensor]
    captions: list[str]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.captions)


def shapes_to_measure(model: Model, count: int) -> Pictures:
    """Take scenes of the world of shapes that no training here has seen; a class is the first object's shape or colour.

    Raises:
        UsageError: the model's classes are neither the shapes nor the colours.
    """
    from ldm.shapes.scenes import COLOURS as HUES
    from ldm.shapes.scenes import SHAPES, ShapesDataset

    scenes = ShapesDataset(size=_side(model), length=count, seed=SHAPES_SEED, split="train")
    items = [scenes.scene(i).items[0] for i in range(count)]
    labels = None
    if model.num_classes is not None:
        known = {
            len(SHAPES): lambda item: SHAPES.index(item.shape),
            len(HUES): lambda item: list(HUES).index(item.colour),
        }
        if model.num_classes not in known:
            raise UsageError(
                f"the model has {model.num_classes} classes; shapes have {' or '.join(map(str, known))}, their shape "
                "or colour; give a folder of pictures"
            )
        labels = torch.tensor([known[model.num_classes](item) for item in items])
    captions = [scenes.scene(i).caption for i in range(count)]
    return Pictures(lambda i: _channels_first(scenes[i]["image"]), captions, labels)


def folder_to_measure(model: Model, folder: str | os.PathLike, at_most: int) -> Pictures:
    """Take the first pictures of a folder, by name, with their captions where they have some.

    For a model with classes the class is the first part of the file's name, up to "_", as guided-diffusion has it;
    classes are numbered in the order of their names.

    Raises:
        AbsentError: no folder, or no pictures in it.
        FormatError: pictures or captions that cannot be read.
        MismatchError: the folder has more classes than the model.
        UsageError: a package is missing.
    """
    if not Path(folder).is_dir():
        raise AbsentError(f"picture folder '{escaped(folder)}' does not exist; check --data_dir")
    try:
        from ldm.training.folder import ImageFolder
    except ImportError as error:
        raise UsageError(f"--data_dir needs {error.name}: pip install faithful-ldm[train]") from None

    pictures = ImageFolder(folder, image_size=_side(model), needs_captions=False)
    count = min(len(pictures), at_most)
    labels = None
    if model.num_classes is not None:
        names = [path.name.split("_")[0] for path, _ in pictures.samples]
        classes = sorted(set(names))
        if len(classes) > model.num_classes:
            raise MismatchError(
                f"'{escaped(folder)}' holds {len(classes)} classes by the names up to '_', the model has "
                f"{model.num_classes}; name the pictures <class>_<anything>"
            )
        labels = torch.tensor([classes.index(name) for name in names[:count]])
    captions = [caption for _, caption in pictures.samples[:count]]
    return Pictures(lambda i: _channels_first(pictures[i]["image"]), captions, labels)


def _side(model: Model) -> int:
    return model.size if isinstance(model, LatentModel) else model.shape[1]


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, height, width)


def measure(
    model: Model,
    pictures: Pictures,
    *,
    seeds: Sequence[int],
    batch_size: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the variational bound of pictures, or of their latents, in bits per dimension (calc_bpd_loop).

    Noise is drawn once for each picture and level, picture i's from seed i.

    Args:
        say: is told how far it is.

    Returns:
        What `save_measures` writes: means over the pictures, of terms per level the noisiest first, and each
        picture's total and prior.

    Raises:
        MismatchError: an upsampler, whose small pictures nobody gives.
        NumericError: bits that are not finite.
    """
    if model.upscales:
        raise MismatchError(
            "an upsampler judges large pictures by small ones, which are not given; give a model"
        )
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(pictures), batch_size):
        rows = slice(start, min(start + batch_size, len(pictures)))
        noise = ImageNoise(seeds[rows])
        with torch.no_grad(), model.averages():
            x = model.encode(torch.stack([pictures.read(i) for i in range(start, rows.stop)]), noise)
            asked = _told(model, pictures, rows)
            diffusion = asked.diffusion.drawing(noise)
            bound = diffusion.calc_bpd_loop(asked.network, x, model_kwargs=asked.kwargs)
        for name, values in bound.items():
            found.setdefault(name, []).append(values.double().cpu())
        say(f"{rows.stop} of {len(pictures)}: {torch.cat(found['total_bpd']).mean():.4f} bits per dimension")
    terms = {name: torch.cat(values) for name, values in found.items()}  # (n,) or (n, levels)
    if not all(values.isfinite().all() for values in terms.values()):
        raise NumericError("bits per dimension are not finite; nothing was saved; check the model file")
    each = {name: terms[name].tolist() for name in ("total_bpd", "prior_bpd")}
    spread = terms["total_bpd"].std().item() / math.sqrt(len(pictures)) if len(pictures) > 1 else None
    result = {
        "unit": model.unit,
        "pictures": len(pictures),
        "seed": seeds[0],
        "dimensions": math.prod(model.shape),
        "total_bpd_error": spread,
        **{name: values.mean(dim=0).tolist() for name, values in terms.items()},
        "levels": asked.diffusion.timestep_map[::-1],
        "each": each,
    }
    if isinstance(model, LatentModel):
        # A density of z / s is s^d times that of z.
        result["total_bpd_unscaled"] = result["total_bpd"] - math.log2(float(model.model.scale_factor))
    return result


def _told(model: Model, pictures: Pictures, rows: slice) -> Asked:
    if isinstance(model, LatentModel):
        return model.ask(pictures.captions[rows] if model.is_conditional else None)
    return model.ask(None if pictures.labels is None else pictures.labels[rows])


def save_measures(folder: Path, result: Mapping[str, Any], figure: Any = None) -> list[Path]:
    """Save nll.json, and a figure of `draw_terms` as a PNG; nothing is overwritten.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    path = save_file(lambda file: file.write(text.encode()), folder / "nll.json", rename=True)
    if figure is None:
        return [path]

    def draw(file: BinaryIO) -> None:
        figure.savefig(file, format="png", dpi=100)

    return [path, save_file(draw, path.with_suffix(".png"), rename=True)]


def need_matplotlib() -> None:
    """Raise UsageError if plots cannot be drawn; called before hours of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(
            "the plot needs matplotlib: pip install faithful-ldm[train], or leave it out by --skip_plot"
        ) from None


def scale_terms(axes: Any, values: Sequence[float]) -> None:
    """Give axes a scale on which terms that differ a thousandfold are seen, those of a density's last level too."""
    above = [value for value in values if value > 0]
    if len(above) == len(values):
        axes.set_yscale("log")
    elif above:
        axes.set_yscale("symlog", linthresh=min(above))


def draw_terms(result: Mapping[str, Any]) -> Any:
    """Plot the terms of the bound and the two errors over the levels, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    names = {
        "vb": "bits per dimension",
        "mse": "error of the noise",
        "xstart_mse": "error of the clean sample",
    }
    for axis, (name, words) in zip(figure.subplots(len(names), 1, sharex=True), names.items(), strict=True):
        axis.plot(
            result["levels"], result[name], linewidth=1, marker="." if len(result["levels"]) < 60 else None
        )
        scale_terms(axis, result[name])
        axis.set_ylabel(words)
        axis.grid(alpha=0.3)
    axis.set_xlabel("level t")
    figure.suptitle(
        f"{result['total_bpd']:.4f} bits per dimension, of them {result['prior_bpd']:.4g} in the prior "
        f"({result['pictures']} pictures)"
    )
    return figure
