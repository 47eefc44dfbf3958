"""The diffusion models: a network, its noise schedule, and for latent diffusion the stages around it.

CompVis calls this file ddpm after the paper (arXiv:2006.11239). Everything here is a plain nn.Module with plain
methods. Sampling through all levels is in ancestral.py, pictures to look at are in image_log.py, the arithmetic
is in ldm.process, a trainer in ldm.training.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints import LoadReport, assign, match_states, read_tensors
from ldm.config import instantiate_from_config
from ldm.errors import MismatchError, UsageError
from ldm.helpers import count_params, default, leaves_others_to_subclasses, living_in, mean_flat
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ancestral import AncestralSampling, LatentAncestralSampling, first_of
from ldm.models.diffusion.image_log import ImageLog, LatentImageLog
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule
from ldm.modules.distributions.distributions import (
    DiagonalGaussianDistribution,
    normal_kl,  # noqa: F401  (CompVis's file has it, which other people's code imports from here)
)
from ldm.modules.ema import LitEma
from ldm.process import gaussian, prediction
from ldm.process.likelihood import prior_bits_per_dim
from ldm.process.schedule import LEAST_SIGNAL, NoiseSchedule, zero_terminal_snr
from ldm.process.tiling import Tiling
from ldm.values import SHARE, check_value

logger = logging.getLogger(__name__)

# The ways a condition can enter the UNet; see DiffusionWrapper.
ROUTES = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")

# Batch keys whose values go to the condition stage as they are, and those where it wants the whole batch.
RAW_KEYS = ("caption", "coordinates_bbox", "txt")
WHOLE_BATCH_KEYS = ("class_label", "cls")

FIRST_STAGE = "__is_first_stage__"
UNCONDITIONAL = "__is_unconditional__"

# Classes that Stability and CompVis have in this file; they build on it, and are imported on first use.
__getattr__ = living_in(
    "ldm.models.diffusion.further_conditions",
    "LatentDepth2ImageDiffusion",
    "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion",
    "Layout2ImgDiffusion",
    of=__name__,
)


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `train` on a frozen stage, so that model.train() leaves its dropout and norms alone."""
    return self


class DiffusionWrapper(nn.Module):
    """The UNet with its conditioning: each kind of condition comes by keyword and enters where conditioning_key says.

    Args:
        diff_model_config: {"target", "params"} of the network; "sequential_crossattn" beside them (default
            False) hands the contexts over as a list, one for each transformer block, instead of joined.
        conditioning_key: one of ROUTES.

            None             network(x, t)
            "concat"         c_concat joined to x on channels
            "crossattn"      c_crossattn joined on tokens, as context
            "hybrid"         both
            "adm"            c_crossattn[0] as y (class labels)
            "hybrid-adm"     both, and c_adm as y
            "crossattn-adm"  context, and c_adm as y

    Raises:
        UsageError: an unknown route.
    """

    def __init__(self, diff_model_config: Any, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in ROUTES:
            known = ", ".join(str(route) for route in ROUTES)
            raise UsageError(f"conditioning_key '{conditioning_key}' is unknown; choose one of {known}")
        config = copy.copy(diff_model_config)
        self.sequential_cross_attn = bool(config.pop("sequential_crossattn", False))
        self.diffusion_model = instantiate_from_config(config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: list[Tensor] | None = None,
        c_crossattn: list[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Run the network on x (b, c, h, w) at levels t (b,) with the conditions that its route takes.

        x and the conditions are cast to the dtype of the network's weights, the answer to x's, so that a
        network in half precision serves samplers that keep float32.

        Raises:
            UsageError: a condition that the route needs is missing.
        """
        route = self.conditioning_key
        dtype = x.dtype
        if route in ("concat", "hybrid", "hybrid-adm"):
            x = torch.cat([x, *self._given("c_concat", c_concat)], dim=1)
        kwargs: dict[str, Any] = {}
        if route == "adm":
            kwargs["y"] = self._given("c_crossattn", c_crossattn)[0]
        elif route not in (None, "concat"):
            contexts = self._given("c_crossattn", c_crossattn)
            kwargs["context"] = list(contexts) if self.sequential_cross_attn else torch.cat(contexts, dim=1)
        if route in ("hybrid-adm", "crossattn-adm"):
            kwargs["y"] = self._given("c_adm", c_adm)
        kwargs = {name: _like_weights(value, self.diffusion_model) for name, value in kwargs.items()}
        out = self.diffusion_model(_like_weights(x, self.diffusion_model), t, **kwargs)
        return out.to(dtype) if isinstance(out, Tensor) else out

    def _given(self, name: str, value: Any) -> Any:
        if value is None:
            raise UsageError(
                f"conditioning_key '{self.conditioning_key}' needs {name}, got none; "
                f"pass a conditioning dict with '{name}'"
            )
        return value


class DDPM(AncestralSampling, ImageLog, nn.Module):
    """Denoising diffusion on pictures themselves: noise schedule, losses and ancestral sampling.

    The constructor takes CompVis's keywords. Levels run from 0 (cleanest) to timesteps - 1.

    Args:
        unet_config: of the network, for DiffusionWrapper.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: the noise schedule
            (ldm.process.schedule); given_betas, (timesteps,), replaces the named one.
        rescale_betas_zero_snr: rescale the schedule so that the last level has no signal (arXiv:2305.08891). A
            network that predicts eps says nothing there, so that it keeps a 2^24th, as in diffusers.
        loss_type: "l1" or "l2".
        ckpt_path, ignore_keys, load_only_unet: a file to load at once, beginnings of keys to leave out, and
            whether only the network's tensors are wanted.
        monitor: the name of the value that decides which training checkpoint is best.
        use_ema: keep a moving average of the network's weights in `model_ema`.
        first_stage_key: of the pictures in a batch.
        image_size, channels: what `sample` makes; (height, width) where they differ.
        log_every_t: how many levels apart intermediate results are kept.
        clip_denoised: clamp predicted clean samples to [-1, 1] while sampling.
        original_elbo_weight, l_simple_weight: of the variational and of the plain loss.
        v_posterior: 0 = the posterior's variance while sampling, 1 = beta.
        conditioning_key: route of DiffusionWrapper.
        parameterization: what the network predicts: "eps", "x0" or "v".
        scheduler_config: of the learning rate (ldm.lr_scheduler).
        use_positional_encodings: False; the original names the option and has no code for it.
        learn_logvar, logvar_init: one log variance a level by which latent losses are weighed.
        ucg_training: {batch key: {"p": probability, "val": replacement, "" by default}}: conditions to drop
            while training, so that guidance has an unconditional model.
        reset_ema, reset_num_ema_updates: after loading, start the average (or only its warm-up) anew.

    Raises:
        UsageError: a value that is none of those above.
    """

    takes_conditions = False
    learning_rate: float | None = None  # set by the trainer; configure_optimizers needs it
    loaded: frozenset[str] = frozenset()  # names of the tensors that init_from_ckpt has read

    @leaves_others_to_subclasses
    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: Literal["linear", "sqrt_linear", "sqrt", "cosine"] = "linear",
        loss_type: Literal["l1", "l2"] = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | tuple[int, int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | np.ndarray | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: Literal["eps", "x0", "v"] = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        rescale_betas_zero_snr: bool = False,
    ):
        super().__init__()
        _check_options(parameterization, loss_type, use_positional_encodings, rescale_betas_zero_snr)
        self.parameterization = parameterization
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.cond_stage_model: nn.Module | None = None
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        count_params(self.model, verbose=True)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
            self.register_load_state_dict_post_hook(_seed_averages)
        self.use_scheduler = scheduler_config is not None
        self.scheduler_config = scheduler_config
        self.v_posterior = v_posterior
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.monitor = monitor
        self.loss_type = loss_type
        self.ucg_training = _dropping_rules(ucg_training or {})
        self.register_schedule(
            given_betas=given_betas,
            beta_schedule=beta_schedule,
            timesteps=timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
        )
        self.learn_logvar = learn_logvar
        self._register_logvar(logvar_init)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys=ignore_keys, only_model=load_only_unet)
        self._reset_average(reset_ema, reset_num_ema_updates)

    def _register_logvar(self, value: float) -> None:
        """Register one log variance a level, (num_timesteps,), as a parameter where it is learned, else as a buffer.

        Files of the later generation (ControlNet's among them) hold it, CompVis's do not; the state dict shows it and
        `_load_from_state_dict` does without.
        """
        logvar = torch.from_numpy(np.full(self.num_timesteps, value, dtype=np.float32))
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar)

    def _reset_average(self, weights: bool, count: bool) -> None:
        """Begin the average anew at the present weights, or only its warm-up, the count of its updates."""
        if self.use_ema and weights:
            self.model_ema.copy_from(self.model)
        if self.use_ema and (weights or count):
            self.model_ema.reset_num_updates()

    @property
    def device(self) -> torch.device:
        """Where the whole model was last moved to, and where samples are made."""
        return self.betas.device

    # -- noise schedule ------------------------------------------------------------------------------------

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the schedule's tables in float64 and keep them as float32 buffers (timesteps,).

        The tables hold real values even where the model is built on the meta device: they are made, not loaded.
        """
        if given_betas is None:
            given_betas = make_beta_schedule(
                beta_schedule, timesteps, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
            )
        if self.rescale_betas_zero_snr:
            last = LEAST_SIGNAL if self.parameterization == "eps" else 0.0
            given_betas = zero_terminal_snr(np.asarray(given_betas, dtype=np.float64), last)
        schedule = NoiseSchedule.from_betas(
            np.asarray(given_betas, dtype=np.float64), last_is_one=self.rescale_betas_zero_snr
        )
        self.num_timesteps = schedule.num_steps
        self.linear_start = linear_start
        self.linear_end = linear_end

        betas, alpha_bar, alpha_bar_prev = (
            torch.from_numpy(table) for table in (schedule.betas, schedule.alpha_bar, schedule.alpha_bar_prev)
        )
        posterior = gaussian.posterior(alpha_bar, alpha_bar_prev, v_posterior=self.v_posterior)
        tables = {
            "betas": betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": alpha_bar_prev,
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
            "posterior_variance": posterior.variance,
            "posterior_log_variance_clipped": gaussian.clipped_log(posterior.variance),
            "posterior_mean_coef1": posterior.coef_x0,
            "posterior_mean_coef2": posterior.coef_x_t,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())
        weights = gaussian.vlb_weights(
            self.parameterization, self.betas, self.alphas_cumprod, self.posterior_variance
        )
        self.register_buffer("lvlb_weights", weights, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "DDPM":
        """Move with the rest, but keep the tables in float32 where the network goes to half precision."""
        tables = {name: table for name, table in self._buffers.items() if table is not None}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            moved = self._buffers[name]
            if moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Keep the constant logvar where a state dict, as CompVis's all, has none."""
        if not self.learn_logvar and prefix + "logvar" not in state_dict:
            state_dict = {**state_dict, prefix + "logvar": self.logvar}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _level(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_bar and sqrt(1 - alpha_bar) at t, shaped to multiply x."""
        return (
            extract_into_tensor(self.alphas_cumprod, t, x.shape),
            extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.shape),
        )

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_t | x_0) (DDPM Eq. 4)."""
        alpha_bar, _ = self._level(t, x_start)
        log_variance = extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return alpha_bar.sqrt() * x_start, log_variance.exp(), log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise clean samples to levels t (b,); the noise is drawn where none is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha_bar, sigma = self._level(t, x_start)
        return gaussian.q_sample(x_start, noise, alpha_bar=alpha_bar, sigma=sigma)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_{t-1} | x_t, x_0) (DDPM Eq. 6, 7)."""
        mean = gaussian.posterior_mean(
            x_start,
            x_t,
            coef_x0=extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape),
            coef_x_t=extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape),
        )
        variance = extract_into_tensor(self.posterior_variance, t, x_t.shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the clean sample that x_t and its noise imply."""
        return prediction.to_x0("eps", noise, x_t, *self._level(t, x_t))

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the clean sample that x_t and its velocity imply."""
        return prediction.to_x0("v", v, x_t, *self._level(t, x_t))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the noise that x_t and its velocity imply."""
        return prediction.to_eps("v", v, x_t, *self._level(t, x_t))

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity between clean samples x and their noise."""
        return prediction.velocity(x, noise, *self._level(t, x))

    # -- training ------------------------------------------------------------------------------------------
    # training_step, validation_step, on_train_batch_*, configure_optimizers and log_images are the hooks of Lightning
    # and of CompVis's logger: cldm and other people's trainers call them by these names. ldm.training calls
    # configure_optimizers and on_train_batch_end, and all but validation_step for models whose random numbers it does
    # not draw itself (see DiffusionObjective).

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Return the elementwise loss, or its mean."""
        loss = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss(pred, target, reduction="mean" if mean else "none")

    def _target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.parameterization == "eps":
            return noise
        return x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)

    @property
    def _split(self) -> str:
        return "train" if self.training else "val"

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict]:
        """Noise pictures to levels t and compare the network's output with its target.

        Returns:
            the loss (), and {"<split>/loss_simple", "<split>/loss_vlb", "<split>/loss"} to log.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        model_out = self.model(self.q_sample(x_start, t, noise=noise), t)
        loss = mean_flat(self.get_loss(model_out, self._target(x_start, noise, t), mean=False))  # (b,)
        simple = loss.mean()
        vlb = (self.lvlb_weights[t] * loss).mean()
        total = simple * self.l_simple_weight + self.original_elbo_weight * vlb
        split = self._split
        return total, {f"{split}/loss_simple": simple, f"{split}/loss_vlb": vlb, f"{split}/loss": total}

    def _random_levels(self, batch_size: int) -> Tensor:
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device).long()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict]:
        """Compute the loss of pictures x (b, c, h, w) at random levels; see p_losses."""
        return self.p_losses(x, self._random_levels(len(x)), *args, **kwargs)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: None = None) -> Tensor:
        """Run the network on x_noisy (b, c, h, w) at levels t (b,), as samplers do.

        Raises:
            UsageError: cond is not None; this model takes no conditions.
        """
        if cond is not None:
            raise UsageError(f"{type(self).__name__} takes no conditions, got some; leave them out")
        return self.model(x_noisy, t)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Take pictures (b, h, w, c) or (b, h, w) out of a batch, as (b, c, h, w) float32.

        Raises:
            UsageError: the batch has no such key.
        """
        if k not in batch:
            raise UsageError(f"a batch needs the key '{k}', got {', '.join(map(repr, batch))}")
        x = batch[k]
        if x.dim() == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict]:
        """Return (loss, values to log) of a batch at random levels."""
        return self(self.get_input(batch, self.first_stage_key).to(self.device))

    def _drop_conditions(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Replace each condition of ucg_training by its empty value, with its probability."""
        batch = dict(batch)
        for key, rule in self.ucg_training.items():
            empty, values = rule.get("val"), batch[key]
            if isinstance(values, Tensor):  # class numbers, one of which stands for no class
                if not isinstance(empty, int | float):
                    raise UsageError(
                        f"ucg_training.{key}.val should be the number that stands for no {key}, got {empty!r}"
                    )
                empty = torch.tensor(empty).to(values)
            empty = "" if empty is None else empty
            kept = [empty if torch.rand(()) < rule["p"] else value for value in values]
            batch[key] = (
                torch.stack([value.expand(values.shape[1:]) for value in kept])
                if isinstance(values, Tensor)
                else kept
            )
        return batch

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> tuple[Tensor, dict]:
        """Return (loss, values to log) of a training batch; conditions are dropped as ucg_training says."""
        return self.shared_step(self._drop_conditions(batch))

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return the values to log, and those of the averaged weights under names that end in _ema."""
        values = self.shared_step(batch)[1]
        with self.ema_scope():
            averaged = self.shared_step(batch)[1]
        return {**values, **{f"{name}_ema": value for name, value in averaged.items()}}

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Do nothing; latent diffusion measures its scale here."""

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the new weights into the average, after an optimizer step."""
        if self.use_ema:
            self.model_ema(self.model)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run with the averaged weights, then put the present ones back; without an average, just run."""
        if not self.use_ema:
            yield
            return
        if context is not None:
            logger.info("%s: switched to averaged weights", context)
        try:
            with self.model_ema.scope(self.model):
                yield
        finally:
            if context is not None:
                logger.info("%s: restored the training weights", context)

    def _trained(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self) -> Any:
        """Make AdamW with torch's defaults, and the learning rate's schedule where one is configured.

        Returns:
            the optimizer, or ([optimizer], [schedule]) as trainers take it.

        Raises:
            UsageError: learning_rate was not set.
        """
        if self.learning_rate is None:
            raise UsageError("configure_optimizers needs model.learning_rate, a number; it is not set")
        optimizer = torch.optim.AdamW(self._trained(), lr=self.learning_rate)
        if not self.use_scheduler:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    # -- loading -------------------------------------------------------------------------------------------

    def init_from_ckpt(
        self, path: str, ignore_keys: Iterable[str] = (), only_model: bool = False
    ) -> LoadReport:
        """Load a file whose keys are those of this model, and account for every tensor.

        The schedule and the constant logvar may be absent, for they are computed; so may the averaged weights,
        which are then seeded from the loaded ones.

        Args:
            path: a .ckpt or .safetensors file.
            ignore_keys: beginnings of keys to leave out; what they would have set stays as it is.
            only_model: take the network alone and leave everything else of the file and of the model.

        Raises:
            MismatchError: a tensor of the file or of the model is left over, or has another shape.
        """
        tensors, _ = read_tensors(path)
        tensors = self._fit(tensors)
        report = match_states(
            path,
            tensors,
            self.state_dict(),
            family=type(self).__name__,
            keeps_average=self.use_ema,
            ignore_keys=ignore_keys,
            only_model=only_model,
        )
        assign(self, tensors, report)
        if self.use_ema and not any(name.startswith("model_ema.") for name in report.assigned):
            self.model_ema.copy_from(self.model)
        self.loaded |= frozenset(report.assigned.values())
        logger.info("%s", report.summary())
        return report

    def _fit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapt a file's tensors to this model before they are accounted for."""
        return tensors


def _seed_averages(model: DDPM, keys: Any) -> None:
    """Begin the averages at the loaded weights where load_state_dict(strict=False) was given none.

    Files for use alone, such as v1-5-pruned-emaonly, hold none; averages left at the initial weights would paint noise
    within every ema_scope.
    """
    no_averages = sum("model_ema." in name for name in keys.missing_keys) >= len(
        model.model_ema.m_name2s_name
    )
    if no_averages and not any("model.diffusion_model." in name for name in keys.missing_keys):
        model.model_ema.copy_from(model.model)
        logger.info("the averages begin at the loaded weights, for the file has none")


class LatentDiffusion(LatentAncestralSampling, LatentImageLog, DDPM):
    """Diffusion on the latents of a first stage, conditioned on a condition stage's encoding of captions.

    Takes CompVis's keywords, and those of DDPM behind them.

    Args:
        first_stage_config: of the autoencoder, which is frozen.
        cond_stage_config: of the encoder of conditions; "__is_first_stage__" uses the autoencoder,
            "__is_unconditional__" none at all.
        num_timesteps_cond: levels that conditions themselves are noised over; 1 = they are not.
        cond_stage_key: of the conditions in a batch.
        cond_stage_trainable: train the condition stage along.
        concat_mode: without a conditioning_key, "concat" rather than "crossattn".
        cond_stage_forward: name of the condition stage's method, instead of `encode`.
        conditioning_key: route of DiffusionWrapper.
        scale_factor: the latents' multiplier, for unit variance (0.18215 for v1).
        scale_by_std: measure the multiplier on the first training batch and keep it as a buffer.
        force_null_conditioning: keep conditioning_key although the model is unconditional.

    Setting `split_input_params` to {"ks", "stride", "vqf", "patch_distributed_vq", "clip_min_weight",
    "clip_max_weight", "tie_braker", "clip_min_tie_weight", "clip_max_tie_weight"} runs the network (and with
    patch_distributed_vq the first stage) on overlapping tiles, for pictures larger than memory.
    """

    takes_conditions = True

    built_from: dict[str, Any]  # its parameters as they were given, which ldm.saving writes down

    def __new__(cls, *args: Any, **kwargs: Any) -> "LatentDiffusion":
        model = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        # Copied here: what builds the parts may take entries out.
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        plain = {
            name: copy.deepcopy(value) for name, value in given.items() if not isinstance(value, nn.Module)
        }
        model.__dict__["built_from"] = plain
        return model

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        *args: Any,
        force_null_conditioning: bool = False,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        load_only_unet: bool = False,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        **kwargs: Any,
    ):
        self.num_timesteps_cond = default(num_timesteps_cond, 1)
        self.scale_by_std = scale_by_std
        timesteps = kwargs.get("timesteps", 1000)
        if kwargs.get("given_betas") is None and self.num_timesteps_cond > timesteps:
            raise UsageError(
                f"num_timesteps_cond should be at most timesteps ({timesteps}), got {num_timesteps_cond}"
            )
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL and not force_null_conditioning:
            conditioning_key = None
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.num_downs = _count_downs(first_stage_config)
        if scale_by_std:
            self.register_buffer("scale_factor", torch.from_numpy(np.array(scale_factor, dtype=np.float32)))
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        # Latents are not bounded by [-1, 1], as pictures are.
        self.clip_denoised = False
        self.restarted_from_ckpt = False
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys=ignore_keys, only_model=load_only_unet)
            self.restarted_from_ckpt = True
        self._reset_average(reset_ema, reset_num_ema_updates)

    def __repr__(self) -> str:
        """Name the parts and their sizes in one line; each part shows its own layers."""
        parts = [
            f"{name}: {type(part).__name__} {sum(p.numel() for p in part.parameters()) / 1e6:.1f}M"
            for name, part in self.named_children()
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """Make the tables of DDPM, and the levels that conditions are noised to."""
        super().register_schedule(*args, **kwargs)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def make_cond_schedule(self) -> None:
        """Spread num_timesteps_cond levels over the first steps; later ones have the noisiest."""
        levels = np.full(self.num_timesteps, self.num_timesteps - 1, dtype=np.int64)
        spread = np.linspace(0, self.num_timesteps - 1, self.num_timesteps_cond)
        levels[: self.num_timesteps_cond] = np.round(spread)
        self.register_buffer("cond_ids", torch.from_numpy(levels), persistent=False)

    # -- the stages around the network ---------------------------------------------------------------------

    def instantiate_first_stage(self, config: Any) -> None:
        """Build and freeze the first stage."""
        self.first_stage_model = frozen(instantiate_from_config(config))

    def instantiate_cond_stage(self, config: Any) -> None:
        """Build the condition stage, frozen unless it is trained along.

        Raises:
            UsageError: a special string that cannot be trained.
        """
        if config in (FIRST_STAGE, UNCONDITIONAL):
            if self.cond_stage_trainable:
                raise UsageError(
                    f"cond_stage_config '{config}' cannot be trained; set cond_stage_trainable: false"
                )
            self.cond_stage_model = self.first_stage_model if config == FIRST_STAGE else None
            return
        model = instantiate_from_config(config)
        self.cond_stage_model = model if self.cond_stage_trainable else frozen(model)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Draw latents (b, c, h, w) from what the first stage says, in scaled units.

        Raises:
            UsageError: neither a distribution nor latents.
        """
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            z = encoder_posterior.sample()
        elif isinstance(encoder_posterior, Tensor):
            z = encoder_posterior
        else:
            raise UsageError(
                f"a first stage should answer with a distribution or latents, got {type(encoder_posterior).__name__}"
            )
        return self.scale_factor * z

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode conditions (captions, say) with the condition stage.

        Raises:
            UsageError: the model is unconditional, or cond_stage_forward names no method.
        """
        stage = self.cond_stage_model
        if stage is None:
            raise UsageError(
                "this model has no condition stage ('__is_unconditional__'), so it cannot encode conditions"
            )
        if self.cond_stage_forward is not None:
            if not callable(getattr(stage, self.cond_stage_forward, None)):
                raise UsageError(
                    f"cond_stage_forward '{self.cond_stage_forward}' is no method of {type(stage).__name__}"
                )
            return getattr(stage, self.cond_stage_forward)(c)
        c = stage.encode(c) if callable(getattr(stage, "encode", None)) else stage(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Encode the empty condition for a batch: null_label, or the class stage's own.

        Raises:
            UsageError: no null_label where the conditions are not classes.
        """
        if null_label is not None:
            c = self.get_learned_conditioning([null_label] if isinstance(null_label, str) else null_label)
        elif self.cond_stage_key in WHOLE_BATCH_KEYS:
            empty = self.cond_stage_model.get_unconditional_conditioning(batch_size, device=self.device)
            return self.get_learned_conditioning(empty)
        else:
            raise UsageError(
                f"conditions '{self.cond_stage_key}' have no empty value of their own; give null_label"
            )
        spread = lambda part: part[:1].expand(batch_size, *part.shape[1:])  # noqa: E731
        return [spread(part) for part in c] if isinstance(c, list) else spread(c)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode pictures (b, 3, height, width) in [-1, 1]; get_first_stage_encoding makes latents of the answer."""
        x = _like_weights(x, self.first_stage_model)
        split = getattr(self, "split_input_params", None)
        if split is None or not split["patch_distributed_vq"]:
            return self.first_stage_model.encode(x)
        tiling = self._tiling(x)
        tiles = [self.first_stage_model.encode(tile) for tile in tiling.split(x)]
        tiles = [t.sample() if isinstance(t, DiagonalGaussianDistribution) else t for t in tiles]
        split["original_image_size"] = tuple(x.shape[-2:])
        return tiling.join(tiles, down=split["vqf"])

    @torch.no_grad()
    def decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """Decode scaled latents z (b, c, h, w) to pictures, about [-1, 1], not clamped, in z's dtype.

        Args:
            predict_cids: z is (b, n, h, w) log probabilities of codebook entries, or their indices (b, h, w).
            force_not_quantize: skip a VQModelInterface's codebook.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """As decode_first_stage, with gradients."""
        dtype = z.dtype if z.is_floating_point() else torch.float32
        if predict_cids:
            indices = z.argmax(dim=1) if z.dim() == 4 else z  # (b, h, w)
            codes = self.first_stage_model.quantize
            z = codes.get_codebook_entry(indices, (*indices.shape, codes.e_dim))  # (b, d, h, w)
        z = _like_weights(1.0 / self.scale_factor * z, self.first_stage_model)
        options = {}
        if isinstance(self.first_stage_model, VQModelInterface):
            options["force_not_quantize"] = predict_cids or force_not_quantize
        decode = partial(self.first_stage_model.decode, **options)
        split = getattr(self, "split_input_params", None)
        if split is None or not split["patch_distributed_vq"]:
            return decode(z).to(dtype)
        tiling = self._tiling(z)
        return tiling.join([decode(tile) for tile in tiling.split(z)], up=split["vqf"]).to(dtype)

    def _tiling(self, x: Tensor) -> Tiling:
        """Lay tiles out over x by split_input_params, none larger than x."""
        split = self.split_input_params
        size = tuple(x.shape[-2:])
        ties = (split.get("clip_min_tie_weight", 0.01), split.get("clip_max_tie_weight", 0.5))
        return Tiling(
            size=size,
            kernel=tuple(map(min, split["ks"], size)),
            stride=tuple(map(min, split["stride"], size)),
            weight_range=(split.get("clip_min_weight", 0.01), split.get("clip_max_weight", 0.5)),
            tie_range=ties if split.get("tie_braker", False) else None,
        )

    # -- batches and losses --------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure scale_factor = 1 / std(latents) on the very first batch, if scale_by_std.

        A factor other than 1 has been measured or given already, in this run or the one it resumes.
        """
        if (
            not self.scale_by_std
            or batch_idx != 0
            or self.restarted_from_ckpt
            or float(self.scale_factor) != 1.0
        ):
            return
        x = super().get_input(batch, self.first_stage_key).to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        self.scale_factor.copy_(1.0 / z.flatten().std())
        logger.info("scale_factor is %.6g, from the first batch", float(self.scale_factor))

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """Encode a batch: its pictures to latents, its conditions with the condition stage.

        Args:
            batch: pictures (b, height, width, c) in [-1, 1] under `k`, conditions under cond_stage_key: a list
                of strings for "caption" and "txt", anything the stage takes for "coordinates_bbox", the whole
                batch for "class_label" and "cls", and else pictures.
            return_first_stage_outputs: append pictures and reconstructions.
            force_c_encode: encode conditions now, even where their stage is trained along.
            cond_key: instead of cond_stage_key.
            return_original_cond: append the conditions as they came.
            bs: keep only the first bs of the batch.
            return_x: append the pictures.

        Returns:
            [z (b, c, h, w), c] and what the flags append; c is None for an unconditional model.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        c = original = None
        if self.model.conditioning_key is not None:
            key = default(cond_key, self.cond_stage_key)
            if key == self.first_stage_key:
                original = x
            elif key in WHOLE_BATCH_KEYS:
                original = batch
            elif key in RAW_KEYS:
                if key not in batch:
                    raise UsageError(f"a batch needs the key '{key}', got {', '.join(map(repr, batch))}")
                original = first_of(batch[key], bs)
            else:
                original = super().get_input(batch, key)[:bs].to(self.device)
            encode_now = not self.cond_stage_trainable or force_c_encode
            c = self.get_learned_conditioning(original) if encode_now else original
            c = first_of(c, bs)
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(original)
        return out

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict]:
        """Return (loss, values to log) of a batch at random levels."""
        x, c = self.get_input(batch, self.first_stage_key)[:2]
        return self(x, c)

    def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict]:
        """Compute the loss of latents x with conditions c at random levels; see p_losses."""
        t = self._random_levels(len(x))
        if self.model.conditioning_key is not None:
            if c is None:
                raise UsageError(
                    f"conditioning_key '{self.model.conditioning_key}' needs conditions, got none"
                )
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self._noise_condition(c, t)
        return self.p_losses(x, c, t, *args, **kwargs)

    def _noise_condition(self, c: Any, t: Tensor) -> Any:
        if not isinstance(c, Tensor):
            raise UsageError(f"num_timesteps_cond > 1 noises a tensor of conditions, got {type(c).__name__}")
        return self.q_sample(c, self.cond_ids[t], noise=torch.randn_like(c.float()))

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, return_ids: bool = False) -> Any:
        """Run the network on x_noisy (b, c, h, w) at levels t (b,) under conditions.

        Args:
            cond: a dict of the lists that DiffusionWrapper takes, or a tensor or list of tensors for the
                model's own route, or None for an unconditional one.
            return_ids: give a network's tuple back whole instead of its first item.
        """
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: cond if isinstance(cond, list) else [cond]}
        if getattr(self, "split_input_params", None) is not None:
            return self._apply_tiled(x_noisy, t, cond, return_ids)
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    def _apply_tiled(self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any], return_ids: bool) -> Tensor:
        """Run the network on every tile; what is joined to x on channels is cut alike, the rest goes whole."""
        if return_ids:
            raise UsageError("return_ids gives one answer for a whole map; take split_input_params off first")
        if self.cond_stage_key == "coordinates_bbox":
            raise UsageError(
                "split_input_params cannot cut 'coordinates_bbox' conditions; sample without tiles"
            )
        tiling = self._tiling(x_noisy)
        parts = [tiling.split(c) for c in cond.get("c_concat") or []]
        outputs = []
        for i, tile in enumerate(tiling.split(x_noisy)):
            if parts:
                cond = {**cond, "c_concat": [part[i] for part in parts]}
            out = self.model(tile, t, **cond)
            outputs.append(out[0] if isinstance(out, tuple) else out)
        return tiling.join(outputs)

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """Noise latents to levels t and compare the network's output with its target.

        Returns:
            the loss (), and {"<split>/loss_simple", "<split>/loss_vlb", "<split>/loss"} to log, with
            "<split>/loss_gamma" and "logvar" where logvar is learned.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        model_out = self.apply_model(self.q_sample(x_start, t, noise=noise), t, cond)
        error = mean_flat(self.get_loss(model_out, self._target(x_start, noise, t), mean=False))  # (b,)
        split = self._split
        log = {f"{split}/loss_simple": error.mean()}
        logvar = self.logvar[t]
        loss = (error / logvar.exp() + logvar).mean()
        if self.learn_logvar:
            log[f"{split}/loss_gamma"] = loss
            log["logvar"] = self.logvar.detach().mean()
        vlb = (self.lvlb_weights[t] * error).mean()
        loss = self.l_simple_weight * loss + self.original_elbo_weight * vlb
        log[f"{split}/loss_vlb"] = vlb
        log[f"{split}/loss"] = loss
        return loss, log

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Return the bound's prior term KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (b,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device, dtype=torch.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return prior_bits_per_dim(mean, log_variance)

    def _trained(self) -> list[nn.Parameter]:
        parameters = list(self.model.parameters())
        if self.cond_stage_trainable:
            parameters += list(self.cond_stage_model.parameters())
        return parameters + ([self.logvar] if self.learn_logvar else [])


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion with further input channels, possibly begun from a model without them.

    Args:
        concat_keys: of the batch, in the order their maps are joined to the latents.
        finetune_keys: weights of a file that may have fewer input channels; the missing ones become zero, so
            that training begins with the file's own behaviour. None refuses such a file.
        keep_finetune_dims: how many of the file's input channels to keep.
        c_concat_log_start, c_concat_log_end: which joined channels are latents worth decoding in log_images.

    Raises:
        UsageError: finetune_keys without a ckpt_path to begin from.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = (
            "model.diffusion_model.input_blocks.0.0.weight",
            "model_ema.diffusion_modelinput_blocks00weight",
        ),
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        if finetune_keys is not None and kwargs.get("ckpt_path") is None:
            raise UsageError(
                "finetune_keys needs a ckpt_path to begin from; without one set finetune_keys: null"
            )
        self.finetune_keys = finetune_keys
        self.keep_dims = keep_finetune_dims
        super().__init__(*args, **kwargs)
        self.concat_keys = tuple(concat_keys)
        self.c_concat_log_start = c_concat_log_start
        self.c_concat_log_end = c_concat_log_end

    def _fit(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Widen the weights of finetune_keys with zeros to this model's input channels."""
        state = self.state_dict()
        widened = dict(tensors)
        for key in self.finetune_keys or ():
            if key not in tensors or key not in state or tensors[key].shape == state[key].shape:
                continue
            old, want, keep = tensors[key], state[key].shape, self.keep_dims
            fits = len(old.shape) == len(want) and old.shape[0] == want[0] and old.shape[2:] == want[2:]
            if not fits or not keep <= old.shape[1] <= want[1]:
                raise MismatchError(
                    f"'{key}' of shape {list(old.shape)} cannot be widened to {list(want)} keeping {keep} channels"
                )
            new = torch.zeros(want, dtype=old.dtype)
            new[:, :keep] = old[:, :keep]
            widened[key] = new
        return widened

    def _concat_maps(self, batch: Mapping[str, Any], z: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say what it joins to the latents")

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = True,
        return_original_cond: bool = True,
    ) -> list[Any]:
        """Encode a batch as LatentDiffusion does, with what is joined to the latents.

        Conditions are always encoded and the originals come with the pictures, so that `force_c_encode` and
        `return_original_cond`, which LatentDiffusion's callers give, change nothing.

        Returns:
            [z, {"c_concat": [(b, n, h, w)], "c_crossattn": [(b, n, d)]}], and with return_first_stage_outputs
            pictures, reconstructions and the conditions as they came.
        """
        if cond_key is not None:
            raise UsageError(
                f"{type(self).__name__} takes its conditions from cond_stage_key, got cond_key={cond_key!r}"
            )
        z, c, x, xrec, original = super().get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=True,
            force_c_encode=True,
            return_original_cond=True,
            bs=bs,
        )
        conditions = {"c_concat": [self._concat_maps(batch, z)], "c_crossattn": [c]}
        return [z, conditions, x, xrec, original] if return_first_stage_outputs else [z, conditions]

    def _log_conditions(self, x: Tensor, c: Any, original: Any) -> dict[str, Tensor]:
        log = super()._log_conditions(x, c, original)
        if self.c_concat_log_start is not None or self.c_concat_log_end is not None:
            latents = c["c_concat"][0][:, self.c_concat_log_start : self.c_concat_log_end]
            log["c_concat_decoded"] = self.decode_first_stage(latents)
        return log


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """The inpainting model: 9 input channels, 4 of noisy latents, 1 of mask, 4 of the masked picture's latents.

    Args:
        concat_keys: of the batch: "mask" (b, height, width, 1), 1 = repaint, which is shrunk to the latents by
            nearest neighbour, and "masked_image" (b, height, width, 3), which is encoded and scaled.
        masked_image_key: which of them is the picture.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        *args: Any,
        **kwargs: Any,
    ):
        if masked_image_key not in concat_keys:
            raise UsageError(
                f"masked_image_key '{masked_image_key}' should be one of {', '.join(concat_keys)}"
            )
        super().__init__(concat_keys, *args, **kwargs)
        self.masked_image_key = masked_image_key

    def _concat_maps(self, batch: Mapping[str, Any], z: Tensor) -> Tensor:
        maps = []
        for key in self.concat_keys:
            x = DDPM.get_input(self, batch, key)[: len(z)].to(z.device)
            if key == self.masked_image_key:
                maps.append(self.get_first_stage_encoding(self.encode_first_stage(x)))
            else:
                maps.append(F.interpolate(x, size=z.shape[-2:]))
        return torch.cat(maps, dim=1)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the pictures of LatentDiffusion, and the masked ones."""
        log = super().log_images(batch, N, *args, **kwargs)
        log["masked_image"] = DDPM.get_input(self, batch, self.masked_image_key)[:N]
        return log


def _check_options(
    parameterization: Any, loss_type: Any, use_positional_encodings: Any, rescale_betas_zero_snr: Any
) -> None:
    """Raise UsageError unless DDPM has an implementation of these of its options."""
    prediction.check_prediction(parameterization)
    if loss_type not in ("l1", "l2"):
        raise UsageError(f"loss_type should be 'l1' or 'l2', got {loss_type!r}")
    if use_positional_encodings:
        raise UsageError(
            "use_positional_encodings has no implementation, in the original neither; leave it out"
        )
    if not isinstance(rescale_betas_zero_snr, bool):
        raise UsageError(f"rescale_betas_zero_snr should be true or false, got {rescale_betas_zero_snr!r}")


def _dropping_rules(rules: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check ucg_training's rules, a {"p": probability, "val": replacement} for each key."""
    read = {}
    for key, rule in rules.items():
        where = f"ucg_training.{key}"
        rule = check_value(rule, Mapping, where)
        if "p" not in rule or set(rule) - {"p", "val"}:
            raise UsageError(f"{where} should have 'p' and 'val', got {', '.join(map(repr, rule)) or 'none'}")
        val = check_value(rule.get("val"), str | int | float | None, f"{where}.val")
        read[key] = {"p": check_value(rule["p"], float, f"{where}.p", SHARE), "val": val}
    return read


def frozen(model: nn.Module) -> nn.Module:
    """Put a stage into evaluation for good, without gradients."""
    model.eval()
    model.train = partial(disabled_train, model)  # a bound function could not be pickled
    return model.requires_grad_(False)


def _like_weights(x: Any, model: nn.Module) -> Any:
    """Cast x, or each of a list, to the dtype of a module's weights, if it has any; labels stay as they are."""
    if isinstance(x, list):
        return [_like_weights(part, model) for part in x]
    weight = next(model.parameters(), None)
    return x if weight is None or not x.is_floating_point() else x.to(weight.dtype)


def _count_downs(first_stage_config: Any) -> int:
    """Count how often a first stage halves its pictures; 0 where its configuration does not say."""
    try:
        return len(first_stage_config["params"]["ddconfig"]["ch_mult"]) - 1
    except (KeyError, TypeError):
        return 0
