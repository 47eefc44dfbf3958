"""StableDiffusionPipeline: prompts to pictures in diffusers' words, over ldm.StableDiffusion's model."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm import images as pictures
from ldm.adapters.use import text_scope, vae_scope
from ldm.checkpoints import folders
from ldm.diffusers_style.adapters import Adapters
from ldm.diffusers_style.parts import VAE, TextEncoder, UNet
from ldm.diffusers_style.scheduler import Config, DDIMScheduler, draw_noise, refuse_unknown, schedule_config
from ldm.errors import AbsentError, MismatchError, UsageError
from ldm.generate import decode, encode_prompt
from ldm.kernels import restore
from ldm.limits import GUIDANCE_SCALE, SHARE, STEPS, choice, real, whole
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.introspect import downsampling, is_inpainting, native_size
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.seams import StepInfo
from ldm.pipeline import StableDiffusion
from ldm.process.guidance import guide
from ldm.request import check_size, list_texts

log = logging.getLogger(__name__)

# Options of diffusers' loaders that say what is so here anyway.
ALWAYS_SO = ("local_files_only", "low_cpu_mem_usage", "requires_safety_checker", "use_safetensors", "variant")
# diffusers' keywords of a call that nothing here stands for, and ldm's that are called otherwise there.
UNSUPPORTED = (
    "clip_skip",
    "cross_attention_kwargs",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "sigmas",
    "timesteps",
)
LDM_WORDS = {
    "num_images": "num_images_per_prompt",
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "steps": "num_inference_steps",
}
# Beginnings of names that diffusers' pipelines have -> what to use here.
ELSEWHERE = {
    "load_ip_adapter": "diffusers itself; IP-Adapters are not here",
    "load_": "load_lora_weights or load_textual_inversion",
    "disable_lora": "set_adapters([])",
    "enable_lora": "set_adapters(names)",
    "enable_": "pipe.sd.optimize()",
    "disable_": "ldm.kernels.restore(pipe.sd.model)",
}
# How attention is computed: ldm's takes little memory as it is, so these switches of diffusers change nothing here.
ATTENTION_SWITCHES = (
    "enable_attention_slicing",
    "disable_attention_slicing",
    "enable_xformers_memory_efficient_attention",
    "disable_xformers_memory_efficient_attention",
)


class StableDiffusionPipelineOutput(NamedTuple):
    """Pictures, and None for diffusers' safety checker, which is not here."""

    images: Any
    nsfw_content_detected: None = None


class StableDiffusionPipeline(Adapters):
    """A model that paints, by the names of diffusers' StableDiffusionPipeline.

    Attributes:
        sd: the StableDiffusion beneath: its model, optimize(), device and dtype.
        unet, vae, text_encoder, tokenizer: the model's networks by diffusers' signatures.
        scheduler: a DDIMScheduler at first; any of diffusers' that takes predicted noise may be put in its place.

    Args:
        sd: what paints. If its model keeps a moving average, the average is put into its UNet for good.
        scheduler: None is DDIM on the model's noise schedule, with Stable Diffusion v1's settings.

    Raises:
        MismatchError: an inpainting model, or one without a KL autoencoder or CLIP's text encoder.
    """

    safety_checker = feature_extractor = image_encoder = None

    def __init__(self, sd: StableDiffusion, scheduler: Any = None):
        model = sd.model
        if is_inpainting(model):
            raise MismatchError(
                "this pipeline paints from prompts, the model is an inpainting one; use StableDiffusion.inpaint"
            )
        for part, kind in (
            (model.first_stage_model, AutoencoderKL),
            (model.cond_stage_model, FrozenCLIPEmbedder),
        ):
            if not isinstance(part, kind):
                raise MismatchError(
                    f"this pipeline needs an {kind.__name__}, the model has {type(part).__name__}"
                )
        if model.use_ema:
            model.model_ema.copy_to(model.model)
        super().__init__()
        self.sd = sd
        adapters = partial(getattr, sd, "adapters")
        self.unet, self.vae = UNet(model, adapters), VAE(model)
        self.text_encoder = TextEncoder(model, adapters)
        self.tokenizer = model.cond_stage_model.tokenizer
        self.vae_scale_factor = downsampling(model)
        self._asked_dtype: torch.dtype | None = None
        self._interrupt = False
        self._memory_options: dict[str, Any] = {}
        self._bar_options: dict[str, Any] = {
            "disable": None
        }  # None: shown on terminals and in notebooks alone
        self.scheduler = DDIMScheduler.from_config(schedule_config(model)) if scheduler is None else scheduler

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike | None = None, **options: Any
    ) -> StableDiffusionPipeline:
        """Load what is on this machine; nothing is downloaded.

        Args:
            path: a folder in diffusers' layout, a folder with one .safetensors file and its config.yaml
                ("model_data/shapes"), or a model file; None is the model in the box.
            options: torch_dtype, scheduler, and original_config (a CompVis YAML) for a file; further ones of
                StableDiffusion.from_single_file. safety_checker and feature_extractor may only be None.

        Raises:
            AbsentError: there is nothing of that name. UsageError: an unknown option. As from_single_file otherwise.
        """
        if path is None:
            return cls._loaded(StableDiffusion.default, (), options)
        if not os.path.exists(path):
            raise AbsentError(
                f"'{str(path):.120}' is no folder or file on this machine, and nothing is downloaded; download the "
                "model and name its folder, or its .safetensors file"
            )
        path = Path(path)
        if path.is_file():
            return cls.from_single_file(path, **options)
        if not folders.is_diffusers_folder(path) and (path / "config.yaml").is_file():
            files = sorted(path.glob("*.safetensors"))
            if len(files) != 1:
                raise UsageError(
                    f"'{path}' has {len(files)} .safetensors files beside config.yaml; name one of them"
                )
            return cls.from_single_file(files[0], **{"original_config": path / "config.yaml", **options})
        index = path / "scheduler" / "scheduler_config.json"
        named = folders.read_json(index).get("_class_name") if index.is_file() else None
        if named not in (None, "DDIMScheduler") and options.get("scheduler") is None:
            log.info("'%s' names %s; this pipeline steps with DDIM until you set pipe.scheduler", path, named)
        return cls._loaded(StableDiffusion.from_pretrained, (path,), options)

    @classmethod
    def from_single_file(cls, path: str | os.PathLike, **options: Any) -> StableDiffusionPipeline:
        """Load a .safetensors or .ckpt file; options as in from_pretrained."""
        for name in ("original_config", "original_config_file"):
            if name in options:
                options = {**options, "config": options[name]}
                del options[name]
        return cls._loaded(StableDiffusion.from_single_file, (path,), options)

    @classmethod
    def _loaded(cls, load: Callable, what: tuple, options: dict[str, Any]) -> StableDiffusionPipeline:
        """Load on the CPU as diffusers does, in the dtype asked for as far as a CPU has it."""
        options = {name: value for name, value in options.items() if name not in ALWAYS_SO}
        for name in ("safety_checker", "feature_extractor"):
            if options.pop(name, None) is not None:
                raise UsageError(f"{name} is not supported; pass {name}=None, or leave it out")
        scheduler = options.pop("scheduler", None)
        dtype = options.pop("torch_dtype", options.pop("dtype", None))
        known = [
            name for name in inspect.signature(StableDiffusion.from_single_file).parameters if name != "path"
        ]
        shown = ("torch_dtype", "scheduler", "safety_checker", "original_config", *ALWAYS_SO)
        refuse_unknown(cls.__name__, options, [*shown, *known])
        on_cpu = torch.float32 if dtype in (None, torch.float16) else dtype
        pipe = cls(load(*what, **{"device": "cpu", "dtype": on_cpu, **options}), scheduler)
        pipe._asked_dtype = dtype
        return pipe

    # --- what it is ---

    @property
    def scheduler(self) -> Any:
        """How a step is taken; assignable."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "timesteps")):
            raise UsageError(
                "scheduler must have set_timesteps, timesteps and step, such as "
                f"DDIMScheduler.from_config(pipe.scheduler.config); got {type(scheduler).__name__}"
            )
        config = getattr(scheduler, "config", {})
        prediction = config.get("prediction_type", "epsilon") if isinstance(config, dict) else "epsilon"
        if prediction != "epsilon":
            raise UsageError(
                f"this pipeline's UNet answers with noise, whatever it was trained for, but the scheduler's "
                f"prediction_type is {prediction!r:.40}; make it with from_config(pipe.scheduler.config)"
            )
        table, own = getattr(scheduler, "alphas_cumprod", None), self.sd.model.alphas_cumprod.cpu()
        if isinstance(table, Tensor) and (
            table.shape != own.shape or not torch.allclose(table.cpu().float(), own, rtol=1e-3, atol=1e-5)
        ):
            log.warning(
                "this scheduler's noise levels are not the model's, which paints badly so; "
                "make it with from_config(pipe.scheduler.config)"
            )
        self._scheduler = scheduler

    @property
    def device(self) -> torch.device:
        return self.sd.device

    _execution_device = device

    @property
    def dtype(self) -> torch.dtype:
        return self.sd.dtype

    @property
    def components(self) -> dict[str, Any]:
        """All parts by name."""
        names = (
            "vae",
            "text_encoder",
            "tokenizer",
            "unet",
            "scheduler",
            "safety_checker",
            "feature_extractor",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Config:
        """The parts' class names."""
        parts = {name: type(part).__name__ for name, part in self.components.items() if part is not None}
        return Config(parts, _class_name=type(self).__name__, requires_safety_checker=False)

    def to(self, *where: Any, **options: Any) -> StableDiffusionPipeline:
        """Move to a device, change the dtype, or both, in any order; what torch_dtype asked for holds on a GPU."""
        for value in where:
            options["dtype" if isinstance(value, torch.dtype) else "device"] = value
        options.pop("silence_dtype_warnings", None)
        refuse_unknown("to", options, ["device", "dtype"])
        device, dtype = options.get("device"), options.get("dtype")
        if dtype is None and device is not None and torch.device(device).type != "cpu":
            dtype = self._asked_dtype
        self.sd.to(device, dtype)
        return self

    # --- memory ---

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures tile by tile, exactly and without seams."""
        self._set_memory(tiled_vae=True)

    def disable_vae_tiling(self) -> None:
        """Encode and decode pictures whole."""
        self._set_memory(tiled_vae=False)

    def enable_vae_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other."""
        self._set_memory(sliced_vae=True)

    def disable_vae_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self._set_memory(sliced_vae=False)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device = "cuda"
    ) -> None:
        """Keep the weights where they are and take them to a GPU part by part.

        Raises:
            UsageError: there is no such GPU.
        """
        self._set_memory(low_vram=torch.device(device) if gpu_id is None else torch.device(device, gpu_id))

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def _set_memory(self, **options: Any) -> None:
        """Change the options of optimize() that this pipeline's switches set; with all of them off, undo it."""
        wanted = {name: value for name, value in {**self._memory_options, **options}.items() if value}
        if wanted:
            self.sd.optimize(**wanted)
        elif self._memory_options:
            restore(self.sd.model)
        self._memory_options = wanted

    def save_pretrained(self, save_directory: str | os.PathLike, safe_serialization: bool = True) -> None:
        """Write a folder in diffusers' layout; see StableDiffusion.save.

        Raises:
            UsageError: a model that a folder cannot describe, or safe_serialization=False. OutputError.
        """
        if not safe_serialization:
            raise UsageError("save_pretrained writes .safetensors files only; leave safe_serialization out")
        self.sd.save(os.path.join(save_directory, ""))

    def _leave_attention_as_it_is(self, *args: Any, **options: Any) -> None:
        log.warning("attention takes little memory here as it is, so nothing was changed")

    def __getattr__(self, name: str) -> Any:
        if name in ATTENTION_SWITCHES:
            return self._leave_attention_as_it_is
        for beginning, instead in ELSEWHERE.items():
            if name.startswith(beginning):
                raise AttributeError(f"this StableDiffusionPipeline has no '{name}'; use {instead}")
        raise AttributeError(
            f"this StableDiffusionPipeline has no '{name}'; docs/tutorials.md lists what it has"
        )

    def __repr__(self) -> str:
        return f"StableDiffusionPipeline({self.sd!r}, {type(self.scheduler).__name__})"

    # --- the words of a run ---

    def set_progress_bar_config(self, **options: Any) -> None:
        """Give options to tqdm's bar, such as disable=True."""
        self._bar_options = {"disable": None, **options}

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Make a tqdm bar over an iterable, or for a total."""
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._bar_options)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts: (features, features of the negative prompts), each (b * num_images_per_prompt, tokens, d).

        The images of a prompt follow each other. Without guidance the second is None.

        Raises:
            UsageError: not as many negative prompts as prompts, misshapen features, lora_scale or clip_skip.
        """
        for name, value in (("lora_scale", lora_scale), ("clip_skip", clip_skip)):
            if value is not None:
                raise UsageError(f"{name} is not supported by this pipeline; leave it out")
        count = whole("num_images_per_prompt", num_images_per_prompt, 1, 1024)
        if (prompt is None) == (prompt_embeds is None):
            raise UsageError("give prompt or prompt_embeds, one of the two")
        positive = self._features("prompt", prompt, prompt_embeds, None)
        negative = None
        if do_classifier_free_guidance:
            given = None if negative_prompt_embeds is not None else negative_prompt or ""
            negative = self._features("negative_prompt", given, negative_prompt_embeds, len(positive))
            if negative.shape != positive.shape:
                raise UsageError(
                    f"negative_prompt must be one, or one for each of {len(positive)} prompts, with features alike; "
                    f"got {tuple(negative.shape)} and {tuple(positive.shape)}"
                )
            negative = negative.repeat_interleave(count, dim=0).to(device or self.device)
        return positive.repeat_interleave(count, dim=0).to(device or self.device), negative

    def _features(self, name: str, texts: Any, embeds: Tensor | None, wanted: int | None) -> Tensor:
        if embeds is None:
            listed = list_texts(name, texts)
            with text_scope(self.sd.model, self.sd.adapters):
                return encode_prompt(self.sd.model, listed * (wanted or 1) if len(listed) == 1 else listed)
        if not isinstance(embeds, Tensor) or embeds.dim() != 3:
            raise UsageError(
                f"{name}_embeds must be (b, tokens, d) features, got {getattr(embeds, 'shape', embeds)!r}"
            )
        return embeds

    def _encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Tensor:
        """Encode prompts as older tutorials do: one tensor, the negative prompts' features first."""
        positive, negative = self.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **options
        )
        return positive if negative is None else torch.cat([negative, positive])

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Decode latents (b, c, h, w), scaled units, into (b, height, width, 3) float32 in [0, 1]."""
        with vae_scope(self.sd.model, self.sd.adapters):
            unit = pictures.to_unit(decode(self.sd.model, latents.to(self.device)))
        return unit.permute(0, 2, 3, 1).cpu().numpy()

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Any]:
        """Turn pictures (b, height, width, 3), or one, in [0, 1] into PIL's, rounding as diffusers does."""
        from PIL import Image

        images = images[None] if images.ndim == 3 else images
        return [Image.fromarray(pixels.squeeze()) for pixels in (images * 255).round().astype("uint8")]

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Any = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Draw initial noise (b, c, height / f, width / f) scaled for the scheduler, or take the latents given.

        Raises:
            UsageError: latents of another shape, or not one generator for each image.
        """
        f = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // f, width // f)
        if latents is None:
            latents = draw_noise(shape, generator, device, dtype)
        elif tuple(latents.shape) != shape:
            raise UsageError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """Give those of `eta` and `generator` that the scheduler's step takes.

        Raises:
            UsageError: eta is not 0 and the scheduler knows none.
        """
        taken = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in taken:
            raise UsageError(f"eta is DDIM's, {type(self.scheduler).__name__} takes none; got eta={eta}")
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}

    # --- a run ---

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback: Callable[[int, Tensor, Tensor], Any] | None = None,
        callback_steps: int = 1,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Any,
    ) -> StableDiffusionPipelineOutput:
        """Paint prompts; keywords are diffusers', `.images` is what comes.

        Args:
            height, width: pixels, multiples of 8; default those of the latents given, or the model's own.
            guidance_scale: 1 or less ignores the negative prompt and takes half the time.
            generator: of the initial noise and of the steps'; a list has one for each image. None is torch's own.
            latents: (b, c, h, w) initial noise, or inverted latents.
            output_type: "pil"; "np" (b, height, width, 3) and "pt" (b, 3, height, width) in [0, 1]; "latent".
            return_dict: without effect, for the answer is a tuple whose entries have names.
            callback: called as (step, t, latents) after every `callback_steps` steps.
            callback_on_step_end: called as (pipe, step, t, {name: tensor}); may return changed "latents" and
                "prompt_embeds". Setting pipe._interrupt in it ends the run.
            others: diffusers' further keywords; only None can be given.

        Raises:
            UsageError: a keyword or value that does not fit. NumericError: NaN.
        """
        self._refuse_others(others)
        height, width = self._size(height, width, latents)
        steps = whole("num_inference_steps", num_inference_steps, 1, self.sd.model.num_timesteps)
        scale = real("guidance_scale", guidance_scale, *GUIDANCE_SCALE)
        mix = real("guidance_rescale", guidance_rescale, *SHARE)
        choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        whole("callback_steps", callback_steps, *STEPS)
        refuse_unknown(
            "callback_on_step_end_tensor_inputs",
            dict.fromkeys(callback_on_step_end_tensor_inputs),
            ["latents", "prompt_embeds", "negative_prompt_embeds"],
        )
        guided, device = scale > 1, self.device

        embeds, negative = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        shape = (len(embeds), self.sd.model.channels, height, width)
        embeds = torch.cat([negative, embeds]) if guided else embeds
        self.scheduler.set_timesteps(steps, device=device)
        latents = self.prepare_latents(*shape, torch.float32, device, generator, latents)
        options = self.prepare_extra_step_kwargs(generator, real("eta", eta, *SHARE))

        self._interrupt = False
        count = len(self.scheduler.timesteps)
        with self._bar(count) as advance, self.unet.running() as at:
            for i, t in enumerate(self.scheduler.timesteps):
                rows = len(latents) * (2 if guided else 1)
                without = len(latents) if guided else 0
                at(StepInfo(i, count, torch.as_tensor(t).expand(rows), without, len(latents)))
                eps = self._predict(latents, t, embeds, scale, mix)
                latents = self.scheduler.step(eps, t, latents, **options)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, given) or {}
                    latents, embeds = changed.get("latents", latents), changed.get("prompt_embeds", embeds)
                if callback is not None and i % callback_steps == 0:
                    callback(i, t, latents)
                advance()
                if self._interrupt:
                    break
        return StableDiffusionPipelineOutput(self._shown(latents, output_type))

    def _size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Check a size in pixels; the default is that of the latents given, or the model's own."""
        f = self.vae_scale_factor
        if isinstance(latents, Tensor) and latents.dim() == 4:
            own = latents.shape[2] * f, latents.shape[3] * f
        else:
            own = native_size(self.sd.model)
        return check_size("height", height or own[0], f), check_size("width", width or own[1], f)

    def _predict(self, latents: Tensor, t: Tensor, embeds: Tensor, scale: float, mix: float) -> Tensor:
        """Predict the noise in latents (b, c, h, w), guided where scale is above 1; embeds are then (2 b, n, d)."""
        guided = scale > 1
        x = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        eps = self.unet(x, t, encoder_hidden_states=embeds).sample
        if not guided:
            return eps
        uncond, cond = eps.chunk(2)
        return guide(uncond, cond, scale, mix)

    def _refuse_others(self, others: dict[str, Any]) -> None:
        own = [name for name in inspect.signature(self.__call__).parameters if name != "others"]
        for name, value in others.items():
            if name in LDM_WORDS:
                raise UsageError(
                    f"StableDiffusionPipeline has no option '{name}'; diffusers' is {LDM_WORDS[name]}"
                )
            if name not in UNSUPPORTED:
                refuse_unknown("StableDiffusionPipeline", others, [*own, *UNSUPPORTED])
            if value is not None:
                raise UsageError(f"{name} is not supported by this pipeline; leave it out")

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[], Any]]:
        with self.progress_bar(total=total) as bar:
            yield bar.update

    def _shown(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        unit = self.decode_latents(latents)
        if output_type == "pt":
            return torch.from_numpy(unit).permute(0, 3, 1, 2)
        return self.numpy_to_pil(unit) if output_type == "pil" else unit
