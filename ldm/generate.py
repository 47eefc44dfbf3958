"""The story from prompt to picture: encode the prompt, draw noise, denoise step by step, decode.

Read `StableDiffusion._paint` first; everything above it is one word of that story, everything below it
turns a person's wish (prompt, size, strength, seed) into its arguments.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import random
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm import images as pictures
from ldm.errors import LdmError, MismatchError, NumericError, ResourceError, UsageError
from ldm.models.diffusion.samplers import (
    SAMPLERS,
    Step,
    check_eta,
    resolve_sampler,
    sample_steps,
    start_level,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.paths import shipped

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

log = logging.getLogger(__name__)

MAX_SEED = 2**64 - 1
MAX_PROMPT = 100_000  # characters; the tokenizer would read on for seconds and keep 75 tokens
CELLS = (8, 256)  # latent cells a side: 64 to 2048 pixels at 8 pixels a cell

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
        return torch.stack(draws).to(like)


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


def initial_latents(model: LatentDiffusion, count: int, height: int, width: int, noise) -> Tensor:
    """Draw x_T, (count, c, height / f, width / f), on the model's device."""
    f = downsampling(model)
    like = torch.empty(count, model.channels, height // f, width // f, device=model.device)
    return noise(like)


def encode_image(model: LatentDiffusion, image: Tensor, count: int, noise) -> Tensor:
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


def denoise(
    model: LatentDiffusion,
    x_T: Tensor,
    conditioning: Any,
    *,
    sampler: str,
    steps: int,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Step from noise to clean latents, one Step at a time; latents stay float32 whatever the UNet computes in.

    Args:
        x_T: (b, c, h, w) noise, or noised latents with run_last.
        options: those of ldm.models.diffusion.samplers.sample_steps.

    Raises:
        NumericError: latents that are not finite; checked at the first and last step, on a CPU at each.
    """
    seen = _AtUNetPrecision(model, autocast)
    for step in sample_steps(sampler, seen, x_T, conditioning, steps=steps, **options):
        # On a GPU a check waits for the work that is queued, so only the first and last step are looked at.
        on_show = step.index in (0, step.total - 1) or step.x_t.device.type == "cpu"
        if on_show and not torch.isfinite(step.x_t).all():
            raise NumericError(
                f"the UNet gave values that are not finite at step {step.index + 1} of {step.total}, in "
                f"{_name(dtype_of(model))}; nothing was saved; use float32 or another model file"
            )
        yield step


def decode(model: LatentDiffusion, latents: Tensor) -> Tensor:
    """Turn latents (b, c, h, w), scaled units, into pictures (b, 3, f h, f w), float32, about [-1, 1].

    One picture at a time: memory stays that of one, and a picture does not depend on its neighbours. A
    decoder in half precision that overflows is put into float32 and stays there.

    Raises:
        NumericError: pictures that are not finite in float32 either.
    """

    def one_by_one() -> Tensor:
        return torch.cat([model.decode_first_stage(z[None].float()) for z in latents])

    return _in_finite_precision(model, "the VAE's decoder", one_by_one)


def _in_finite_precision(model: LatentDiffusion, stage: str, work: Callable[[], Tensor]) -> Tensor:
    """Let the VAE work, and once more in float32 if what comes out is not finite."""
    vae = model.first_stage_model
    dtype = dtype_of(vae)
    result = work()
    if not torch.isfinite(result).all() and dtype != torch.float32:
        log.warning("%s overflowed in %s and was put into float32", stage, _name(dtype))
        vae.float()
        dtype = torch.float32
        result = work()
    if not torch.isfinite(result).all():
        raise NumericError(
            f"{stage} gave values that are not finite, in {_name(dtype)}; nothing was saved; check the model file"
        )
    return result


class _AtUNetPrecision:
    """A model as samplers see it, that takes and gives float32 and computes in the UNet's own precision."""

    def __init__(self, model: LatentDiffusion, autocast: torch.dtype | None):
        self._model = model
        self._autocast = autocast
        self._dtype = dtype_of(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {key: self._cast(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._cast(one) for one in value]
        return value

    def apply_model(self, x: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Predict as the model does; t keeps its dtype, since half cannot hold every level."""
        on = self._autocast is not None
        with torch.autocast(x.device.type, dtype=self._autocast, enabled=on):
            return self._model.apply_model(self._cast(x), t, self._cast(cond), *args, **kwargs).float()


# --- what a model says about itself ---------------------------------------------------------------


def dtype_of(module: nn.Module) -> torch.dtype:
    """Tell what a module computes in: the dtype of its first floating-point weight; of a model, its UNet's."""
    module = getattr(module, "model", module)
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def downsampling(model: LatentDiffusion) -> int:
    """Tell how many pixels a latent cell is wide: 8 for Stable Diffusion v1."""
    encoder = getattr(model.first_stage_model, "encoder", None)
    return 2 ** (encoder.num_resolutions - 1) if encoder is not None else 1


def is_inpainting(model: LatentDiffusion) -> bool:
    """Tell a 9-channel inpainting UNet (noisy latents, mask, masked picture) from a 4-channel one.

    Raises:
        MismatchError: the UNet takes neither.
    """
    unet = model.model.diffusion_model
    wants = unet.input_blocks[0][0].weight.shape[1]
    if wants == model.channels:
        return False
    if wants == 2 * model.channels + 1:
        return True
    raise MismatchError(
        f"the UNet takes {wants} channels; wanted {model.channels} (a plain model) or "
        f"{2 * model.channels + 1} (an inpainting model)"
    )


def native_size(model: LatentDiffusion) -> tuple[int, int]:
    """Tell the (height, width) in pixels that the model was trained at: 512 x 512 for Stable Diffusion v1."""
    sides = model.image_size
    h, w = (sides, sides) if isinstance(sides, int) else sides
    f = downsampling(model)
    return h * f, w * f


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Choose a device by name, or the best there is for None and "auto": cuda, then mps, then cpu.

    Raises:
        UsageError: a device that this machine or this torch does not have.
    """
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have[:0] = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device is None or device == "auto":
        return torch.device(have[0])
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    names = {name: name for name in have} | {name.split(":")[0]: name for name in reversed(have)}
    if wanted is None or str(wanted) not in names:
        raise UsageError(f"device '{device}' is not available; have: {', '.join(have)}")
    return wanted


def pick_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """Choose what the UNet computes in: float16 on CUDA, else float32; float16 on a CPU is refused gently."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if dtype == torch.float16 and device.type == "cpu":
        log.warning("float16 is slow and overflows on a CPU; float32 is used instead (bfloat16 works)")
        return torch.float32
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what comes out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationParameters:
    """How one image was made: all that is needed to make it again, as it is written into its PNG."""

    mode: Literal["txt2img", "img2img", "inpaint"]
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    sampler: str
    spacing: str | None
    guidance_scale: float
    guidance_rescale: float
    eta: float
    width: int
    height: int
    strength: float | None
    rng: Literal["image", "compvis"]
    batch_size: int
    batch_index: int  # place within its batch; matters for rng="compvis" only
    dropped_words: list[str]  # of the prompt and the negative prompt, beyond what the text encoder reads
    model: str | None
    init_image_hash: str | None
    device: str
    dtype: str
    vae_dtype: str
    threads: int
    torch: str
    version: str


@dataclass
class GenerationResult:
    """Finished pictures with what made them; a notebook shows them as a grid.

    Attributes:
        images: list of PIL pictures, or what output_type asked for.
        seeds: one for each image.
        parameters: one GenerationParameters for each image.
        latents: (n, c, h, w) float32 on the CPU, scaled units.
        interrupted: a callback ended the run; these are the pictures that were finished.
    """

    images: Any
    seeds: list[int]
    parameters: list[GenerationParameters]
    latents: Tensor
    model_file: Path | None = field(default=None, repr=False)
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]

    def __repr__(self) -> str:
        return f"GenerationResult({len(self)} images, seeds={self.seeds})"

    def metadata(self, index: int) -> dict[str, Any]:
        """Collect what goes into the PNG of one image, its model's hash included."""
        return asdict(self.parameters[index]) | {"model_hash": file_hash(self.model_file)}

    @property
    def infotexts(self) -> list[str]:
        """A1111's text for each image."""
        from ldm.metadata import to_infotext

        return [to_infotext(self.metadata(i)) for i in range(len(self))]

    def grid(self, nrow: int | None = None) -> Image.Image:
        """Lay the pictures out as one, nrow in a row (default: near a square)."""
        return pictures.grid(self._pil(), nrow)

    def save(
        self, folder: str | os.PathLike, pattern: str = "{:05}.png", *, metadata: bool = True
    ) -> list[Path]:
        """Save each picture as a PNG with its metadata, numbered on from what the folder holds; returns paths.

        Raises:
            OutputError: the folder cannot be written.
        """
        from ldm.metadata import png_info

        folder = pictures.prepare_folder(folder)
        return [
            pictures.save_numbered(image, folder, pattern, png_info(self.metadata(i)) if metadata else None)
            for i, image in enumerate(self._pil())
        ]

    def _pil(self) -> list[Image.Image]:
        from PIL import Image

        if isinstance(self.images, list):
            return self.images
        if isinstance(self.images, Tensor) and self.images.shape[1] != 3:
            raise UsageError("these are latents, not pictures; decode them, or ask for another output_type")
        array = self.images.permute(0, 2, 3, 1).numpy() if isinstance(self.images, Tensor) else self.images
        return [Image.fromarray((255.0 * one).astype(np.uint8)) for one in array]

    def _repr_png_(self) -> bytes | None:
        if not len(self):
            return None
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()


def _join(results: Sequence[GenerationResult], empty: Any) -> GenerationResult:
    """Put the results of several batches into one."""
    if not results:
        return GenerationResult(empty, [], [], torch.empty(0))
    kinds = [result.images for result in results]
    if isinstance(kinds[0], list):
        images = [image for kind in kinds for image in kind]
    else:
        images = torch.cat(kinds) if isinstance(kinds[0], Tensor) else np.concatenate(kinds)
    return GenerationResult(
        images,
        [seed for result in results for seed in result.seeds],
        [one for result in results for one in result.parameters],
        torch.cat([result.latents for result in results]),
        results[0].model_file,
    )


@dataclass(frozen=True)
class Progress:
    """One step of one batch, or (`result` set) the end of a batch.

    Attributes:
        step, steps: steps done and wanted in this batch.
        batch, batches: this batch (from 0) and how many there are.
        x_t, pred_x0: (b, c, h, w) latents after the step, and what they promise to become.
        result: the finished pictures of this batch, in its last Progress.
    """

    step: int
    steps: int
    batch: int
    batches: int
    x_t: Tensor
    pred_x0: Tensor
    result: GenerationResult | None = None
    _sd: StableDiffusion | None = field(default=None, repr=False)

    def preview(self) -> list[Image.Image]:
        """Paint what is to come, small and at once, by a linear stand-in for the decoder."""
        return pictures.preview(self.pred_x0, *self._sd.latent_rgb)


_HASHES: dict[tuple, str] = {}


def file_hash(path: Path | None) -> str | None:
    """Give the first 10 hex digits of a file's sha256, as A1111 names models; a folder or no file gives None."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns)
    if key not in _HASHES:
        with open(path, "rb") as file:
            _HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()[:10]
    return _HASHES[key]


# --- wishes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shot:
    """One image that is wanted."""

    prompt: str
    negative: str
    seed: int
    row: int | None = None  # into prompt_embeds, where those were given


@dataclass(frozen=True)
class _Job:
    """A wish whose every part was checked."""

    mode: Literal["txt2img", "img2img", "inpaint"]
    shots: list[_Shot]
    batch_size: int
    height: int
    width: int
    image: Tensor | None  # (1, 3, height, width) in [-1, 1]
    image_hash: str | None
    mask: Tensor | None  # (1, 1, height, width), 1 = repaint
    strength: float | None
    steps: int
    sampler: str
    spacing: str | None
    guidance_scale: float
    guidance_rescale: float
    eta: float
    rng: Literal["image", "compvis"]
    fixed_code: bool
    output_type: Literal["pil", "np", "pt", "latent"]
    embeds: Tensor | None
    negative_embeds: Tensor | None


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def _real(name: str, value: Any, low: float, high: float) -> float:
    sound = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    if not sound or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def _choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def check_size(name: str, value: int, f: int) -> int:
    """Return a side in pixels if the model can paint it.

    Raises:
        UsageError: it is no multiple of f, or out of range; the nearest two sides that work are named.
    """
    low, high = (cells * f for cells in CELLS)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise UsageError(f"{name} must be a multiple of {f} from {low} to {high}, got {value!r}")
    if value % f:
        below = value - value % f
        raise UsageError(
            f"{name} must be a multiple of {f}, got {value}; the nearest two that work are {below} and {below + f}"
        )
    return int(value)


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} must be a text or a list of texts with one at least, got {value!r:.80}")
    for text in texts:
        if len(text) > MAX_PROMPT:
            raise UsageError(f"{name} must have at most {MAX_PROMPT} characters, got {len(text)}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name} holds characters that are no text (lone surrogates): {text!r:.80}"
            ) from None
    return texts


def _seeds(seed: Any, count: int) -> list[int]:
    """List one seed for each of count images: seed + i, a list as given, or from a random one for None."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise UsageError(f"a list of seeds must name one for each image, wanted {count}, got {len(seed)}")
        return [_whole("seed", one, 0, MAX_SEED) for one in seed]
    seed = secrets.randbelow(2**32 - count) if seed is None else seed
    first = _whole("seed", seed, 0, MAX_SEED - count + 1)
    return [first + i for i in range(count)]


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# --- the model and its doors ----------------------------------------------------------------------


class StableDiffusion:
    """A model that paints: txt2img, img2img, inpaint.

    Attributes:
        model: the LatentDiffusion; everything that is written for CompVis works on it.
        report: what the loader did with every tensor, or None.
        name, file: what pictures say about the model; the file's hash goes into their metadata.
        autocast: dtype of torch.autocast around the UNet, CompVis's --precision autocast, or None.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        name: str | None = None,
        file: str | os.PathLike | None = None,
        report: Any = None,
        autocast: torch.dtype | None = None,
    ):
        self.model = model.eval()
        self.file = None if file is None else Path(file)
        if name is None and self.file is not None:
            name = self.file.name if self.file.is_dir() else self.file.stem
        self.name = name
        self.report = report
        self.autocast = autocast
        self._latent_rgb: tuple[Tensor, Tensor] | None = None
        if dtype_of(model) != torch.float32:
            # Half-precision decoders overflow into black pictures; the VAE is a tenth of the work.
            model.first_stage_model.float()

    @classmethod
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
    ) -> StableDiffusion:
        """Load a `.safetensors` or `.ckpt` file with CompVis's or diffusers' names inside.

        Args:
            config: a CompVis YAML file (path, dict, OmegaConf); None reads the family off the weights.
            device: "cuda", "mps", "cpu"; None takes the best there is.
            dtype: what UNet and text encoder compute in; None is float16 on CUDA, else float32. The VAE stays
                float32.
            autocast: compute the UNet under torch.autocast with this dtype, weights staying in `dtype`.
            vae: a VAE-only file that replaces the one in `path`.
            use_ema: True gives the UNet the file's moving average, False its plain weights; None does as CompVis:
                plain ones, and the average beside them if the configuration keeps one, which then paints.
            tokenizer: a folder or vocabulary file; None takes the one that ships with ldm.

        Raises:
            AbsentError, FormatError, UnsafeFileError, MismatchError: see ldm.checkpoints.
        """
        from ldm.checkpoints import load_latent_diffusion

        device = pick_device(device)
        dtype = pick_dtype(device, dtype)
        model, report = load_latent_diffusion(
            path, config=config, device="cpu", use_ema=use_ema, tokenizer=tokenizer, vae=vae
        )
        sd = cls(model, file=path, report=report, autocast=autocast)
        return sd.to(dtype=dtype, device=device)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> StableDiffusion:
        """Load a folder in diffusers' layout (unet/, vae/, text_encoder/, ...); options of from_single_file."""
        if not Path(folder).is_dir():
            raise UsageError(
                f"from_pretrained wants a folder in diffusers' layout, got '{folder}'; download it first"
            )
        return cls.from_single_file(folder, **options)

    @classmethod
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
        """Move the model, or change what UNet and text encoder compute in; VAE and noise tables stay float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else pick_device(device)
        if dtype is not None:
            dtype = pick_dtype(device, dtype)
            self.model.model.to(dtype)
            self.model.cond_stage_model.to(dtype)
            self.model.first_stage_model.float()
        self.model.to(device)  # after the cast: half as much to move
        return self

    @property
    def latent_rgb(self) -> tuple[Tensor, Tensor]:
        """Factors (c, 3) and bias (3,) that turn latents into rough colours; fitted to the decoder once."""
        if self._latent_rgb is None:
            self._latent_rgb = pictures.fit_latent_rgb(
                lambda z: decode(self.model, z.to(self.device)), self.model.channels
            )
        return self._latent_rgb

    def __repr__(self) -> str:
        return f"StableDiffusion({self.name or 'unnamed'}, {self.device}, {_name(self.dtype)})"

    # --- doors ---

    def txt2img(self, prompt: str | Sequence[str], **options: Any) -> GenerationResult:
        """Paint from a prompt. Options are those of stream(); `callback` is called with each Progress.

        A callback that returns False ends the run; pictures finished by then are returned.
        """
        return self._collect(prompt, options, "txt2img")

    __call__ = txt2img

    def img2img(
        self, prompt: str | Sequence[str], image: Any, strength: float = 0.75, **options: Any
    ) -> GenerationResult:
        """Repaint a picture: strength 0 returns it, 1 forgets it. Options as in txt2img."""
        return self._collect(prompt, {**options, "image": image, "strength": strength}, "img2img")

    def inpaint(self, prompt: str | Sequence[str], image: Any, mask: Any, **options: Any) -> GenerationResult:
        """Repaint a picture where the mask is white and keep it, pixel by pixel, where it is black.

        Options as in txt2img. 4-channel models blend latents at each step; 9-channel models see mask and
        masked picture. Which one it is, the model says.
        """
        return self._collect(prompt, {**options, "image": image, "mask": mask}, "inpaint")

    def _collect(self, prompt: Any, options: dict[str, Any], mode: str) -> GenerationResult:
        callback = options.pop("callback", None)
        for name, thing in (("image", "a picture"), ("mask", "a mask")):
            if name in options and options[name] is None:
                raise UsageError(f"{mode} needs {thing}, got {name}=None")
        results, interrupted = [], False
        for progress in self.stream(prompt, **options):
            if progress.result is not None:
                results.append(progress.result)
            if callback is not None and callback(progress) is False:
                interrupted = True
                break
        empty = [] if options.get("output_type", "pil") == "pil" else torch.empty(0)
        return replace(_join(results, empty), interrupted=interrupted)

    def stream(
        self,
        prompt: str | Sequence[str] | None,
        *,
        negative_prompt: str | Sequence[str] = "",
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        sampler: str = "ddim",
        spacing: str | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        batch_size: int = 4,
        rng: Literal["image", "compvis"] = "image",
        fixed_code: bool = False,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Iterator[Progress]:
        """Paint step by step: yields a Progress for each step, and one with the pictures for each batch.

        Stop iterating to stop painting. Everything is checked before the first step, at the call.

        Args:
            prompt: a text, or several; each is painted num_images times, in this order.
            negative_prompt: one text for all, or one for each prompt.
            image: PIL picture, path, or (1, 3, height, width) in [-1, 1]: repaint this one.
            mask: PIL picture, path, or (1, 1, height, width): white, or 1, is repainted, the rest kept.
            strength: 0 to 1, how much of the picture is forgotten; default 0.75, with a mask 1.
            height, width: pixels, multiples of the model's f (8); default the picture's or the model's own.
            steps: 1 to the model's number of levels; with strength, that share of them is run.
            sampler: "ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m", in any usual spelling.
            spacing: which levels are visited, a name of ldm.process.spacing; None is the sampler's own.
            guidance_scale: 0 to 100; 1 ignores the negative prompt and takes half the time.
            eta: 0 to 1, fresh noise in each DDIM step.
            seed: image i has seed + i; a list names each; None draws one, which the result tells.
            batch_size: how many are painted at once; no image depends on it (rng="image").
            rng: "image" draws image i from its own CPU generator; "compvis" seeds the global generators
                once, at the call, and draws whole batches in the original's order: picture encoding, x_T,
                then each step. With "compvis" a picture depends on its place in its batch.
            fixed_code: begin every batch with the same noise, CompVis's --fixed_code.
            output_type: "pil"; "np" (n, height, width, 3) and "pt" (n, 3, height, width) in [0, 1]; "latent".
            prompt_embeds, negative_prompt_embeds: (n, tokens, d) text features that replace the prompts'.

        Raises:
            UsageError: a value out of range. NumericError: NaN. ResourceError: out of memory at batch size 1.
        """
        f = downsampling(self.model)
        rng = _choice("rng", rng, ("image", "compvis"))
        num_images = _whole("num_images", num_images, 1, 100_000)
        batch_size = _whole("batch_size", batch_size, 1, 1024)
        prompts, negatives = self._prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        count = len(prompts) * num_images
        seeds = _seeds(seed, count)
        if rng == "compvis":
            seeds = [seeds[0]] * count
        elif fixed_code:
            seeds = [seeds[i % batch_size] for i in range(count)]
        size = (
            None if width is None else check_size("width", width, f),
            None if height is None else check_size("height", height, f),
        )
        pixels, marks, image_hash = self._picture(image, mask, size, f)
        if pixels is not None:
            height, width = pixels.shape[2:]
        else:
            native = native_size(self.model)
            height, width = size[1] or native[0], size[0] or native[1]
            if strength is not None:
                raise UsageError(
                    f"strength is for a picture to start from, got strength={strength} and image=None"
                )
        mode = "txt2img" if pixels is None else "img2img" if marks is None else "inpaint"
        if strength is None and pixels is not None:
            strength = 0.75 if marks is None else 1.0
        job = _Job(
            mode=mode,
            shots=[
                _Shot(
                    prompts[i],
                    negatives[i],
                    seeds[i * num_images + j],
                    i if prompt_embeds is not None else None,
                )
                for i in range(len(prompts))
                for j in range(num_images)
            ],
            batch_size=batch_size,
            height=height,
            width=width,
            image=pixels,
            image_hash=image_hash,
            mask=marks,
            strength=None if strength is None else _real("strength", strength, 0, 1),
            steps=_whole("steps", steps, 1, self.model.num_timesteps),
            sampler=resolve_sampler(sampler),
            spacing=spacing,
            guidance_scale=_real("guidance_scale", guidance_scale, 0, 100),
            guidance_rescale=_real("guidance_rescale", guidance_rescale, 0, 1),
            eta=_real("eta", eta, 0, 1),
            rng=rng,
            fixed_code=fixed_code,
            output_type=_choice("output_type", output_type, ("pil", "np", "pt", "latent")),
            embeds=prompt_embeds,
            negative_embeds=negative_prompt_embeds,
        )
        check_eta(SAMPLERS[job.sampler], job.eta)
        start_level(
            job.sampler, self.model, job.steps, job.strength or 0.0, spacing=spacing
        )  # refuses spacings
        is_inpainting(self.model)  # refuses UNets that are neither
        return self._paint(job)

    # --- the story ---

    @torch.no_grad()
    def _paint(self, job: _Job) -> Iterator[Progress]:
        """Paint a job batch by batch; a batch that does not fit into memory is halved."""
        if job.rng == "compvis":
            seed_everything(job.shots[0].seed)
        shared: dict[str, Any] = {}  # what later batches use again
        pending = deque(job.shots[i : i + job.batch_size] for i in range(0, len(job.shots), job.batch_size))
        done = 0
        while pending:
            batch = pending.popleft()
            place = {"batch": done, "batches": done + 1 + len(pending), "_sd": self}
            try:
                with (
                    self.model.ema_scope()
                ):  # as CompVis's scripts: the average paints where a model keeps one
                    yield from self._paint_batch(job, batch, shared, place)
                done += 1
                continue
            except LdmError:
                raise
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1 or job.rng == "compvis":
                    raise ResourceError(
                        f"out of memory at {job.width} x {job.height}, {len(batch)} at once, in "
                        f"{_name(self.dtype)}; use a smaller size or batch, or half precision"
                    ) from None
            # Outside the except block, so that the failed batch's tensors are free by now.
            half = (len(batch) + 1) // 2
            log.warning("out of memory with %d images at once; trying %d", len(batch), half)
            pending.extendleft([batch[half:], batch[:half]])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _paint_batch(self, job: _Job, batch: list[_Shot], shared: dict, place: dict) -> Iterator[Progress]:
        """Paint one batch: words, noise, steps, pixels."""
        model, b = self.model, len(batch)
        noise = ImageNoise([shot.seed for shot in batch]) if job.rng == "image" else CompVisNoise()
        context, unconditional, dropped = self._contexts(job, batch, shared.setdefault("features", {}))
        options: dict[str, Any] = {"noise": noise, "eta": job.eta, "guidance_rescale": job.guidance_rescale}

        # Where to start: pure noise, or the picture noised to the level of its strength.
        level, z = None, None
        if job.strength is not None:
            run_last, level = start_level(job.sampler, model, job.steps, job.strength, spacing=job.spacing)
            if run_last == 0:
                yield self._finish(job, batch, None, dropped, place)
                return
            z = self._encoded("picture", job, job.image, b, noise, shared)  # (b, c, h, w)
            options["run_last"] = run_last
        if is_inpainting(model):
            concat = self._masked_picture(job, b, noise, shared)
            context = {"c_concat": [concat], "c_crossattn": [context]}
            if unconditional is not None:
                unconditional = {"c_concat": [concat], "c_crossattn": [unconditional]}
        elif job.mask is not None:
            keep = 1.0 - pictures.shrink_mask(job.mask, downsampling(model), any_pixel=True)
            # CompVis's samplers mean the opposite of a user's mask: 1 keeps x0.
            options |= {"mask": keep.to(z).expand(b, -1, -1, -1), "x0": z}
        if job.fixed_code and job.rng == "compvis":
            if "x_T" not in shared:
                shared["x_T"] = initial_latents(model, job.batch_size, job.height, job.width, noise)
            x_T = shared["x_T"][:b]
        else:
            x_T = initial_latents(model, b, job.height, job.width, noise)
        if level is not None:
            x_T = math.sqrt(level) * z + math.sqrt(1.0 - level) * x_T

        # From noise to latents.
        for step in denoise(
            model,
            x_T,
            context,
            sampler=job.sampler,
            spacing=job.spacing,
            steps=job.steps,
            autocast=self.autocast,
            guidance_scale=job.guidance_scale,
            unconditional_conditioning=unconditional,
            **options,
        ):
            latents = step.x_t
            yield Progress(step.index + 1, step.total, x_t=latents, pred_x0=step.pred_x0, **place)

        # The samplers' last step does not blend again.
        if "mask" in options:
            latents = pictures.paste(z, latents, options["mask"])
        yield self._finish(job, batch, latents, dropped, place)

    def _contexts(
        self, job: _Job, batch: list[_Shot], known: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None, list[list[str]]]:
        """Encode prompts and, if guidance needs them, negative prompts; list the words that did not fit."""
        guided = job.guidance_scale != 1.0
        if job.embeds is not None:
            rows = [shot.row for shot in batch]
            where = self.device
            context = job.embeds[rows].to(where)
            unconditional = job.negative_embeds[rows].to(where) if guided else None
            return context, unconditional, [[] for _ in batch]
        wanted = {text for shot in batch for text in (shot.prompt, shot.negative)}
        for text in known.keys() - wanted:  # a list of many prompts must not fill the memory
            del known[text]
        context = encode_prompt(self.model, [shot.prompt for shot in batch], known)
        unconditional = (
            encode_prompt(self.model, [shot.negative for shot in batch], known) if guided else None
        )
        dropped_words = getattr(self.model.cond_stage_model, "dropped_words", lambda text: [])
        dropped = [dropped_words(s.prompt) + (dropped_words(s.negative) if guided else []) for s in batch]
        return context, unconditional, dropped

    def _encoded(self, key: str, job: _Job, image: Tensor, b: int, noise, shared: dict) -> Tensor:
        """Encode a picture for b images; CompVis encodes it once, before its first batch."""
        if job.rng == "image":
            return encode_image(self.model, image, b, noise)
        if key not in shared:
            shared[key] = encode_image(self.model, image, min(job.batch_size, len(job.shots)), noise)
        return shared[key][:b]

    def _masked_picture(self, job: _Job, b: int, noise, shared: dict) -> Tensor:
        """Make what a 9-channel UNet sees beside its latents, (b, 1 + c, h, w): mask, then masked picture.

        Without a mask everything is to be repainted and the picture is grey, as its training had it.
        """
        f = downsampling(self.model)
        mask = torch.ones(1, 1, job.height, job.width) if job.mask is None else job.mask
        image = torch.zeros(1, 3, job.height, job.width) if job.image is None else job.image
        z = self._encoded("masked", job, image * (mask < 0.5), b, noise, shared)
        return torch.cat(
            [pictures.shrink_mask(mask, f, any_pixel=False).to(z).expand(b, -1, -1, -1), z], dim=1
        )

    def _finish(
        self, job: _Job, batch: list[_Shot], latents: Tensor | None, dropped: list[list[str]], place: dict
    ) -> Progress:
        """Turn the latents of a batch into what was asked for; None stands for the picture itself (strength 0)."""
        b = len(batch)
        if latents is None:
            latents = encode_image(self.model, job.image, b, torch.zeros_like)
            x = job.image.expand(b, -1, -1, -1)
        elif job.output_type != "latent":
            x = decode(self.model, latents).cpu()
            if job.mask is not None:
                x = pictures.paste(x, job.image, job.mask)
        latents = latents.float().cpu()
        if job.output_type == "pil":
            images = pictures.to_pil(x)
        elif job.output_type == "latent":
            images = latents
        else:
            unit = pictures.to_unit(x)
            images = unit if job.output_type == "pt" else unit.permute(0, 2, 3, 1).numpy()
        result = GenerationResult(
            images,
            [shot.seed for shot in batch],
            [self._parameters(job, shot, i, b, dropped[i]) for i, shot in enumerate(batch)],
            latents,
            self.file,
        )
        return Progress(job.steps, job.steps, x_t=latents, pred_x0=latents, result=result, **place)

    def _prompts(self, prompt, negative, embeds, negative_embeds) -> tuple[list[str], list[str]]:
        """List as many negative prompts as prompts; features given in their place are checked."""
        if embeds is None:
            prompts = _texts("prompt", prompt)
        else:
            for name, one in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)):
                if not isinstance(one, Tensor) or one.dim() != 3 or one.shape != embeds.shape:
                    got = tuple(one.shape) if isinstance(one, Tensor) else one
                    raise UsageError(f"{name} must be (n, tokens, d), both alike, got {got}")
            prompts = _texts("prompt", "" if prompt is None else prompt)
            prompts = prompts * len(embeds) if len(prompts) == 1 else prompts
            if len(prompts) != len(embeds):
                raise UsageError(
                    f"prompt_embeds holds {len(embeds)} prompts, but {len(prompts)} prompts were given"
                )
        negatives = _texts("negative_prompt", negative)
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        if len(negatives) != len(prompts):
            raise UsageError(
                f"negative_prompt must be one text, or one for each of {len(prompts)} prompts, got {len(negatives)}"
            )
        return prompts, negatives

    def _picture(
        self, image: Any, mask: Any, size: tuple[int | None, int | None], f: int
    ) -> tuple[Tensor | None, Tensor | None, str | None]:
        """Read picture and mask into tensors of one size, with the picture's hash."""
        if image is None:
            if mask is not None:
                raise UsageError("a mask needs a picture to repaint, got mask and image=None")
            return None, None, None
        if isinstance(image, Tensor):
            pixels = _as_picture("image", image, 3)
            for name, side in zip(("width", "height"), (pixels.shape[3], pixels.shape[2]), strict=True):
                check_size(name, side, f)
            if size[0] not in (None, pixels.shape[3]) or size[1] not in (None, pixels.shape[2]):
                raise UsageError(
                    f"an image given as a tensor keeps its size, got {tuple(pixels.shape)} and {size}"
                )
            pixels = pixels.float().cpu()
        else:
            image = _open("image", image)
            sides = [side or own - own % f for side, own in zip(size, image.size, strict=True)]
            for name, side in zip(("width of the picture", "height of the picture"), sides, strict=True):
                check_size(name, side, f)
            if tuple(sides) != image.size:
                log.info("the picture was resized from %s to %s", image.size, tuple(sides))
            pixels = pictures.to_tensor(pictures.fit_size(pictures.to_rgb(image), f, tuple(sides)))
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
        return pixels, marks, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:10]

    def _parameters(
        self, job: _Job, shot: _Shot, index: int, batch_size: int, dropped: list[str]
    ) -> GenerationParameters:
        from ldm import __version__

        return GenerationParameters(
            mode=job.mode,
            prompt=shot.prompt,
            negative_prompt=shot.negative,
            seed=shot.seed,
            steps=job.steps,
            sampler=job.sampler,
            spacing=job.spacing,
            guidance_scale=job.guidance_scale,
            guidance_rescale=job.guidance_rescale,
            eta=job.eta,
            width=job.width,
            height=job.height,
            strength=job.strength,
            rng=job.rng,
            batch_size=batch_size,
            batch_index=index,
            dropped_words=dropped,
            model=self.name,
            init_image_hash=job.image_hash,
            device=str(self.device),
            dtype=_name(self.dtype) + (f", autocast {_name(self.autocast)}" if self.autocast else ""),
            vae_dtype=_name(dtype_of(self.model.first_stage_model)),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            version=__version__,
        )


def _as_picture(name: str, value: Tensor, channels: int) -> Tensor:
    if value.dim() != 4 or value.shape[:2] != (1, channels) or not torch.isfinite(value).all():
        raise UsageError(
            f"{name} must be a finite (1, {channels}, height, width) tensor, got {tuple(value.shape)}"
        )
    return value


def _open(name: str, value: Any) -> Image.Image:
    from PIL import Image, ImageOps

    if isinstance(value, str | os.PathLike):
        return pictures.open_image(value)
    if isinstance(value, Image.Image):
        return ImageOps.exif_transpose(value)
    raise UsageError(f"{name} must be a PIL picture, a path or a tensor, got {type(value).__name__}")
