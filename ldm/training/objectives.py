"""What a training step minimises, for each kind of model, with every random number drawn by sample (draws.py)."""

import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.errors import MismatchError, UsageError, shown
from ldm.modules.diffusionmodules.model import Encoder
from ldm.training.draws import Draws
from ldm.training.initial_weights import start_as_identity, start_as_words

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Figures = dict[str, Tensor]


class Objective(Protocol):
    """What a run minimises, measures and shows, for one kind of model.

    A model of a kind that is not known here brings its own: `make_objective(memory_format=, sample_steps=)`.
    """

    model: nn.Module

    def prepare(self, batch: Batch, draws: Draws, gather: Callable[[Tensor], Tensor]) -> None:
        """Initialise what needs a batch, before the very first step; `gather` joins (b, ...) of all processes."""

    def forward(self, batch: Batch, draws: Draws) -> Any:
        """Compute what every optimizer's loss shares."""

    def loss(self, outputs: Any, index: int, step: int) -> tuple[Tensor, Figures]:
        """Compute the loss () of optimizer `index` from forward's outputs, and the figures to log."""

    def after_step(self) -> None:
        """Called after each optimizer step, to update moving averages."""

    def validate(self, batch: Batch, draws: Draws, step: int) -> dict[str, float]:
        """Measure a batch."""

    def pictures(self, batch: Batch, count: int) -> dict[str, Tensor]:
        """Make pictures for the log: name -> (n, 3, height, width) in [-1, 1]."""


def pictures_of(batch: Batch, key: str, first_stage: nn.Module | None = None) -> Tensor:
    """Take a batch's pictures (b, h, w, c) as (b, c, h, w), without moving them in memory.

    Args:
        first_stage: what is to encode them, if anything; other channels or sides than it takes are refused.

    Raises:
        MismatchError: there are none under this key, or they are no pictures, or not of that kind.
    """
    found = batch.get(key)
    if found is None:
        names = ", ".join(repr(name) for name in batch if name != "micro") or "nothing"
        raise MismatchError(
            f"a batch has no '{key}', only {names:.150}; set model.params.image_key (first_stage_key) to what the data "
            "calls its pictures"
        )
    if not isinstance(found, Tensor) or found.dim() != 4 or not found.is_floating_point():
        came = (
            f"{found.dtype} of shape {list(found.shape)}"
            if isinstance(found, Tensor)
            else type(found).__name__
        )
        raise MismatchError(
            f"a batch's '{key}' should be pictures (b, height, width, 3) in [-1, 1], got {came}"
        )
    encoder = getattr(first_stage, "encoder", None)
    if isinstance(encoder, Encoder):
        factor = 2 ** (encoder.num_resolutions - 1)
        _, height, width, channels = found.shape
        if channels != encoder.in_channels or height % factor or width % factor:
            raise MismatchError(
                f"the first stage takes pictures of {encoder.in_channels} channels whose sides are multiples of "
                f"{factor}, a batch's '{key}' are {height} x {width} x {channels}; set the data's size or the model's"
            )
    return found.permute(0, 3, 1, 2)


def taken_by(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that a function has parameters for: other people's log_images have fewer than ours."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return options
    return {name: value for name, value in options.items() if name in {p.name for p in parameters}}


def say_left_out(name: str, what: str) -> None:
    logger.warning(
        "training.%s is left out: %s were loaded from a file, and what is loaded stays", name, what
    )


class AutoencoderObjective:
    """Trains a first stage with a KL posterior: the model's `loss`, and its discriminator's if it has one.

    Args:
        model: an AutoencoderKL.
        memory_format: of the pictures.
        posterior_logvar_start: log variance of every posterior at the start; None leaves it at random, about 0:
            noise of standard deviation 1, larger than the latents until the encoder has learned to make them larger.
        identity_start: begin with every block passing its input on, so that the network starts as a plain
            chain of resamplings and learns colours in a hundred steps instead of thousands.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        posterior_logvar_start: float | None = None,
        identity_start: bool = False,
    ):
        self.model, self.memory_format = model, memory_format
        self.posterior_logvar_start, self.identity_start = posterior_logvar_start, identity_start

    @torch.no_grad()
    def prepare(self, batch: Batch, draws: Draws, gather: Any) -> None:
        """Prepare the weights before the very first step: start as a chain of identities, with a narrow posterior.

        Weights that were loaded are not drawn anew.
        """
        if self.model.loaded:
            options = {
                "identity_start": self.identity_start,
                "posterior_logvar_start": self.posterior_logvar_start,
            }
            for name, value in options.items():
                if value not in (None, False):
                    say_left_out(name, "the first stage's weights")
            return
        if self.identity_start:
            start_as_identity(self.model, draws.generator)
        if self.posterior_logvar_start is not None:
            self.model.quant_conv.weight[self.model.embed_dim :] = 0
            self.model.quant_conv.bias[self.model.embed_dim :] = self.posterior_logvar_start

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Any]:
        """Reconstruct a batch; returns (inputs, reconstructions, posterior)."""
        image = pictures_of(batch, self.model.image_key, self.model).to(memory_format=self.memory_format)
        posterior = self.posterior(image)
        z = posterior.mean + posterior.std * draws.normal(posterior.mean)
        return image, self.model.decode(z), posterior

    def posterior(self, image: Tensor) -> Any:
        """Encode pictures; the posterior is in float32 under autocast too, for its KL's sake."""
        encoded = self.model.encode(image)
        return type(encoded)(encoded.parameters.float())

    def loss(
        self, outputs: tuple[Tensor, Tensor, Any], index: int, step: int, split: str = "train"
    ) -> tuple[Tensor, Figures]:
        """Compute the loss of optimizer `index` and CompVis's figures."""
        image, reconstruction, posterior = outputs
        # The sums over pixels lose digits in half precision, and the KL's exponential its range.
        with torch.autocast(image.device.type, enabled=False):
            return self.model.loss(
                image,
                reconstruction.float(),
                posterior,
                index,
                step,
                last_layer=self.model.get_last_layer() if torch.is_grad_enabled() else None,
                split=split,
            )

    def after_step(self) -> None:
        """Do nothing; there is no moving average."""

    @torch.no_grad()
    def validate(self, batch: Batch, draws: Draws, step: int) -> dict[str, float]:
        """Measure a batch: mean absolute error, KL, and PSNR of the posterior's mode (pictures in [-1, 1], peak 2)."""
        image = pictures_of(batch, self.model.image_key, self.model).to(memory_format=self.memory_format)
        posterior = self.posterior(image)
        error = self.model.decode(posterior.mode()).float().clamp(-1, 1) - image
        mse = error.square().flatten(1).mean(dim=1)  # (b,)
        return {
            "val/l1": error.abs().mean().item(),
            "val/psnr": (10 * torch.log10(4.0 / mse.clamp(min=1e-10))).mean().item(),
            "val/kl_loss": posterior.kl().mean().item(),
            "val/z_std": posterior.mean.float().std().item(),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int) -> dict[str, Tensor]:
        """Make pictures for the log: inputs and reconstructions, (n, 3, height, width) in [-1, 1]."""
        image = pictures_of(batch, self.model.image_key, self.model)[:count].to(
            memory_format=self.memory_format
        )
        return {
            "inputs": image,
            "reconstructions": self.model.decode(self.model.encode(image).mode()).float(),
        }


class DiffusionObjective:
    """Trains a latent diffusion model (its network, and its condition stage where that is trained along).

    Batches hold pictures under the model's first_stage_key, or "moments" (b, 2c, h, w) of the first stage made
    before. For models with conditions other than captions the model's own `training_step` is used; its draws are
    repeatable, but differ with the number of processes.

    Args:
        model: a LatentDiffusion, or a DDPM on pixels.
        memory_format: of the latents.
        identity_start: begin with a text encoder that passes on each word and its place and mixes nothing; see
            `start_as_words`.
        guidance_scale, sample_steps: of the pictures that are made while training (DDIM).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        identity_start: bool = False,
        guidance_scale: float = 3.0,
        sample_steps: int = 20,
    ):
        from ldm.models.diffusion.ddpm import LatentDiffusion

        self.model, self.memory_format = model, memory_format
        self.identity_start = identity_start
        self.guidance_scale, self.sample_steps = guidance_scale, sample_steps
        stage = model.cond_stage_model
        self.has_captions = stage is not None and model.cond_stage_key in ("caption", "txt")
        self.draws_itself = (
            type(model) is LatentDiffusion
            and (self.has_captions or stage is None)
            and not model.shorten_cond_schedule
        )
        is_trainable = getattr(model, "cond_stage_trainable", False)
        if is_trainable and not any(p.requires_grad for p in stage.parameters()):
            raise UsageError(
                "cond_stage_trainable is set but every weight of the condition stage is frozen; set "
                "cond_stage_config.params.freeze: false"
            )

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Draw (b, c, h, w) latents from the first stage's posterior, not yet scaled."""
        from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

        with torch.no_grad():
            if "moments" in batch:
                posterior = DiagonalGaussianDistribution(batch["moments"].float())
            else:
                image = pictures_of(batch, self.model.first_stage_key, self.model.first_stage_model).to(
                    memory_format=self.memory_format
                )
                posterior = self.model.encode_first_stage(image)
                if isinstance(posterior, Tensor):  # a codebook's first stage has nothing to draw
                    return posterior.float()
            mean, std = posterior.mean.float(), posterior.std.float()
            return (mean + std * draws.normal(mean)).contiguous(memory_format=self.memory_format)

    def captions(self, batch: Batch, draws: Draws, like: Tensor) -> list[str]:
        """Take the batch's captions and drop some as the model's ucg_training says.

        Raises:
            MismatchError: there are none, or they are no texts.
        """
        key = self.model.cond_stage_key
        texts = batch.get(key)
        wrong = [text for text in texts if not isinstance(text, str)] if isinstance(texts, list) else [texts]
        if wrong:
            raise MismatchError(
                f"a batch's '{key}' should be captions, one text for each picture, got {shown(wrong[0])}; "
                "set model.params.cond_stage_key, or mend the data"
            )
        rule = self.model.ucg_training.get(key)
        if rule is None:
            return texts
        empty = rule.get("val") or ""
        dropped = (draws.uniform(like) < rule["p"]).tolist()
        return [empty if drop else text for drop, text in zip(dropped, texts, strict=True)]

    @torch.no_grad()
    def prepare(self, batch: Batch, draws: Draws, gather: Any) -> None:
        """Initialise what needs a batch, before the very first step.

        Start the text encoder as identity_start says, and measure scale_factor = 1 / std of the batch of all processes,
        if the model has scale_by_std. Weights that were loaded are not drawn anew, and a factor that came with them is
        kept.
        """
        model, stage = self.model, self.model.cond_stage_model
        if self.identity_start:
            of_the_model = any(name.startswith("cond_stage_model.") for name in model.loaded)
            if of_the_model or getattr(stage, "loaded", ()):
                say_left_out("identity_start", "the condition stage's weights")
            else:
                start_as_words(stage, draws.generator)
        scales = getattr(model, "scale_by_std", False)  # a pixel model has no scale
        if scales and model.restarted_from_ckpt and "scale_factor" not in model.loaded:
            logger.warning(
                "scale_by_std is left out: weights were loaded from a checkpoint that gave no scale_factor, so it "
                "stays %g; set model.params.scale_factor to the one that they were trained with",
                float(model.scale_factor),
            )
        if not self.draws_itself:
            model.on_train_batch_start(batch, 0)
        elif scales and not model.restarted_from_ckpt and float(model.scale_factor) == 1.0:
            model.scale_factor.copy_(1.0 / gather(self.latents(batch, draws)).flatten().std())

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """Compute the loss of a batch at random levels; returns (loss, figures)."""
        model = self.model
        if not self.draws_itself:
            return model.training_step(batch, 0)
        z = model.scale_factor * self.latents(batch, draws)
        t = draws.levels(model.num_timesteps, z)
        noise = draws.normal(z)
        context = None
        if self.has_captions:
            context = model.get_learned_conditioning(self.captions(batch, draws, z))
        return model.p_losses(z, context, t, noise=noise)

    def loss(self, outputs: tuple[Tensor, Figures], index: int, step: int) -> tuple[Tensor, Figures]:
        """Hand on what `forward` computed; there is one optimizer."""
        return outputs

    def after_step(self) -> None:
        """Take the new weights into the moving average."""
        self.model.on_train_batch_end()

    @torch.no_grad()
    def validate(self, batch: Batch, draws: Draws, step: int) -> dict[str, float]:
        """Measure the averaged weights' loss at levels spread evenly, with the same noise each time."""
        model = self.model
        with model.ema_scope():
            if not self.draws_itself:
                return {"val/loss_simple": float(model.shared_step(batch)[1]["val/loss_simple"])}
            z = model.scale_factor * self.latents(batch, draws)
            b = z.shape[0]
            t = ((torch.arange(b, device=z.device) + 0.5) / b * model.num_timesteps).long()
            context = (
                model.get_learned_conditioning(batch[model.cond_stage_key]) if self.has_captions else None
            )
            _, figures = model.p_losses(z, context, t, noise=draws.normal(z))
        return {"val/loss_simple": float(figures["val/loss_simple"])}

    def shown_steps(self) -> int:
        """Return sample_steps, or the model's number of levels where that is smaller."""
        return min(self.sample_steps, self.model.num_timesteps)

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int) -> dict[str, Tensor]:
        """Make pictures for the log: the batch's pictures, their captions, and guided samples for those.

        Models that are not conditioned on captions say by their `log_images` what that is.
        """
        from ldm.models.diffusion.ddpm import DDPM
        from ldm.models.diffusion.samplers import sample_steps
        from ldm.util import log_txt_as_img

        model, draws = self.model, Draws(0, 0)
        if type(model).log_images is DDPM.log_images:  # which walks the whole chain
            inputs = model.get_input(batch, model.first_stage_key)[:count].to(model.device)
            with model.ema_scope():
                *_, last = sample_steps("ddim", model, draws.normal(inputs), None, steps=self.shown_steps())
            return {"inputs": inputs, "samples": last.x_t}
        if not self.draws_itself:
            # The row of progressive denoising calls the network once for every level there is.
            options = {
                "N": count,
                "ddim_steps": self.shown_steps(),
                "inpaint": False,
                "plot_progressive_rows": False,
            }
            return model.log_images(batch, **taken_by(model.log_images, options))
        taken = {key: value[:count] for key, value in batch.items() if key != "micro"}
        z = model.scale_factor * self.latents(taken, draws)
        shown = {"inputs": taken[model.first_stage_key].permute(0, 3, 1, 2)} if "moments" not in taken else {}
        shown = shown or {"inputs": model.decode_first_stage(z)}
        options: dict[str, Any] = {}
        context = None
        if self.has_captions:
            texts = taken[model.cond_stage_key]
            shown["conditioning"] = log_txt_as_img(tuple(shown["inputs"].shape[:1:-1]), texts)
            context = model.get_learned_conditioning(texts)
            empty = model.get_learned_conditioning([""] * len(texts))
            options = {"guidance_scale": self.guidance_scale, "unconditional_conditioning": empty}
        with model.ema_scope():
            *_, last = sample_steps(
                "ddim", model, draws.normal(z), context, steps=self.shown_steps(), **options
            )
        shown["samples"] = model.decode_first_stage(last.x_t)
        return shown
