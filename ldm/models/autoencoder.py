"""First stages: pictures to latents and back, by a Gaussian (KL) or by a codebook (VQ)."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints import load_vae
from ldm.config import handed_on, instantiate_from_config
from ldm.errors import MismatchError
from ldm.helpers import leaves_others_to_subclasses
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma

logger = logging.getLogger(__name__)


class _FirstStage(nn.Module):
    """What both kinds share: the two networks, reading batches, loading, and optimizers for a trainer.

    training_step, validation_step, on_train_batch_end and log_images of both kinds are the hooks of Lightning and of
    CompVis's logger, for other people's trainers; ldm.training calls the loss itself, and of them configure_optimizers.
    """

    PARAMS_OF = {"ddconfig": Encoder}  # which class the values inside of a parameter belong to
    learning_rate: float = 4.5e-6
    global_step: int = 0
    loaded: frozenset[str] = frozenset()  # names of the tensors that init_from_ckpt has read

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str,
        colorize_nlabels: int | None,
        monitor: str | None,
    ):
        super().__init__()
        ddconfig = handed_on(ddconfig, Encoder, "ddconfig")
        self.image_key = image_key
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def init_from_ckpt(self, path: str, ignore_keys: Iterable[str] = ()) -> None:
        """Load a first stage's own file; keys that begin with one of ignore_keys stay as they are.

        Raises:
            MismatchError: a tensor of the file or of the model is left over.
        """
        report = load_vae(self, path, ignore_keys=tuple(ignore_keys))
        self.loaded |= frozenset(report.assigned.values())
        logger.info("%s: %s", path, report.summary())

    def get_input(self, batch: dict[str, Any], k: str) -> Tensor:
        """Take pictures (b, h, w, c) or (b, h, w) out of a batch, as (b, c, h, w) float32 where the weights are."""
        x = batch[k].to(self.device)
        if x.dim() == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    def get_last_layer(self) -> Tensor:
        """Return the weight that adversarial losses balance their gradients on."""
        return self.decoder.conv_out.weight

    def _generator_parameters(self) -> list[nn.Parameter]:
        learned = getattr(self.loss, "learned_parameters", list)
        parts = [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]
        return [p for part in parts for p in part.parameters()] + list(learned())

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list]:
        """Make Adam with betas (0.5, 0.9) for the autoencoder, and a second for a discriminator if there is one."""
        settings = {"lr": self.learning_rate, "betas": (0.5, 0.9)}
        optimizers = [torch.optim.Adam(self._generator_parameters(), **settings)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(torch.optim.Adam(discriminator.parameters(), **settings))
        return optimizers, []

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show a segmentation map with many channels as colours in [-1, 1], by fixed random weights."""
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        x = F.conv2d(x, weight=self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


class AutoencoderKL(_FirstStage):
    """The first stage of Stable Diffusion: latents drawn from a Gaussian that the encoder describes.

    Args:
        ddconfig: for Encoder and Decoder; double_z must be set.
        lossconfig: {"target", "params"} of the training loss; torch.nn.Identity where none is needed.
        embed_dim: channels of the latents.
        ckpt_path, ignore_keys: a file to load at once, and keys in it to leave out.
        image_key: of the pictures in a batch.
        colorize_nlabels: makes fixed random weights to show maps with so many channels.
        monitor: the name of the value that decides which checkpoint is best.
    """

    @leaves_others_to_subclasses
    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ):
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        if not ddconfig.get("double_z", True):
            raise MismatchError(
                "AutoencoderKL needs double_z: True in its ddconfig (means and log variances)"
            )
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Describe the latents of pictures x (b, 3, h, w) in [-1, 1]; sides must halve evenly at every level."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Turn unscaled latents (b, embed_dim, h, w) into pictures, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, input: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def training_step(
        self, batch: dict[str, Any], batch_idx: int, optimizer_idx: int = 0
    ) -> tuple[Tensor, dict]:
        """Return (loss, values to log) for the autoencoder (optimizer_idx 0) or the discriminator (1)."""
        return self._step(batch, optimizer_idx, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict:
        """Return the values to log, of the discriminator too where there is one."""
        values = self._step(batch, 0, "val")[1]
        if getattr(self.loss, "discriminator", None) is not None:
            values.update(self._step(batch, 1, "val")[1])
        return values

    def _step(self, batch: dict[str, Any], optimizer_idx: int, split: str) -> tuple[Tensor, dict]:
        inputs = self.get_input(batch, self.image_key)
        reconstructions, posterior = self(inputs)
        return self.loss(
            inputs,
            reconstructions,
            posterior,
            optimizer_idx,
            self.global_step,
            last_layer=self.get_last_layer(),
            split=split,
        )

    @torch.no_grad()
    def log_images(
        self, batch: dict[str, Any], only_inputs: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """Return pictures to look at: inputs, their reconstructions, and decoded unit normal noise.

        `split` is what CompVis's ImageLogger says; it changes nothing.
        """
        x = self.get_input(batch, self.image_key)
        pictures = {"inputs": x}
        if not only_inputs:
            decoded, posterior = self(x)
            pictures["samples"] = self.decode(torch.randn_like(posterior.sample()))
            pictures["reconstructions"] = decoded
            if x.shape[1] > 3:
                pictures = {name: self.to_rgb(value) for name, value in pictures.items()}
        return pictures


class VectorQuantizer(nn.Module):
    """Replace every latent vector by the nearest entry of a learned codebook (arXiv:1711.00937).

    Gradients pass straight through. The loss weighs the two terms as the published first stages were trained:
    `beta` on the term that moves the codebook (`legacy`), not on the one that commits the encoder.

    Args:
        n_e: entries.
        e_dim: features of each.
        beta: weight of the second term.
        remap: accepted as None only.
        sane_index_shape: indices come as (b, h, w) instead of flat.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: None = None,
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        if remap is not None:
            raise MismatchError(
                f"remapped codebook indices are not supported, got remap={remap!r}; leave it out"
            )
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise z (b, e_dim, h, w); return (quantised, loss, (None, None, indices))."""
        cells = z.permute(0, 2, 3, 1)  # (b, h, w, d)
        flat = cells.reshape(-1, self.e_dim)
        codes = self.embedding.weight
        distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
        indices = distances.argmin(dim=1)
        quantised = self.embedding(indices).view(cells.shape)
        to_encoder = F.mse_loss(quantised.detach(), cells)
        to_codebook = F.mse_loss(quantised, cells.detach())
        if self.legacy:
            loss = to_encoder + self.beta * to_codebook
        else:
            loss = self.beta * to_encoder + to_codebook
        quantised = cells + (quantised - cells).detach()
        if self.sane_index_shape:
            indices = indices.view(cells.shape[:3])
        return quantised.permute(0, 3, 1, 2).contiguous(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Look indices up; shape (b, h, w, d) gives the result as (b, d, h, w)."""
        entries = self.embedding(indices.reshape(-1))
        return entries if shape is None else entries.view(shape).permute(0, 3, 1, 2).contiguous()


class VQModel(_FirstStage):
    """A first stage whose latents are entries of a codebook.

    Args: as AutoencoderKL, and
        n_embed: entries of the codebook, of embed_dim features each.
        batch_resize_range, scheduler_config, lr_g_factor: CompVis's training options.
        remap, sane_index_shape: of the codebook's indices.
        use_ema: keep a moving average of the weights.
    """

    @leaves_others_to_subclasses
    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ):
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.quantize = VectorQuantizer(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.batch_resize_range = batch_resize_range
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run with the averaged weights, then put the present ones back."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.scope(self):
            yield

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the new weights into the average, after an optimizer step."""
        if self.use_ema:
            self.model_ema(self)

    def _generator_parameters(self) -> list[nn.Parameter]:
        return super()._generator_parameters() + list(self.quantize.parameters())

    def get_input(self, batch: dict[str, Any], k: str) -> Tensor:
        """Take pictures out of a batch, resized to a random multiple of 16 if batch_resize_range is set."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None:
            return x
        low, high = self.batch_resize_range
        # The first four batches have the largest size, so that running out of memory shows at once.
        sizes = range(low, high + 16, 16)
        side = high if self.global_step <= 4 else sizes[int(torch.randint(len(sizes), ()))]
        return x if side == x.shape[2] else F.interpolate(x, size=side, mode="bicubic").detach()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Return (quantised latents, codebook loss, (None, None, indices)) of pictures (b, 3, h, w)."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Return the latents before they are quantised."""
        return self.quant_conv(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Turn quantised latents into pictures."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Turn codebook indices (b, h, w) into pictures."""
        return self.decode(self.quantize.get_codebook_entry(code_b, (*code_b.shape, self.embed_dim)))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        quantised, loss, (_, _, indices) = self.encode(input)
        decoded = self.decode(quantised)
        return (decoded, loss, indices) if return_pred_indices else (decoded, loss)

    def training_step(
        self, batch: dict[str, Any], batch_idx: int, optimizer_idx: int = 0
    ) -> tuple[Tensor, dict]:
        """Return (loss, values to log) for the autoencoder (optimizer_idx 0) or the discriminator (1)."""
        return self._step(batch, optimizer_idx, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict:
        """Return the values to log, with the averaged weights as well under names that end in _ema."""
        values = self._step(batch, 0, "val")[1]
        if self.use_ema:
            with self.ema_scope():
                values.update({k + "_ema": v for k, v in self._step(batch, 0, "val")[1].items()})
        return values

    def _step(self, batch: dict[str, Any], optimizer_idx: int, split: str) -> tuple[Tensor, dict]:
        inputs = self.get_input(batch, self.image_key)
        decoded, codebook_loss, indices = self(inputs, return_pred_indices=True)
        return self.loss(
            codebook_loss,
            inputs,
            decoded,
            optimizer_idx,
            self.global_step,
            last_layer=self.get_last_layer(),
            split=split,
            predicted_indices=indices,
        )

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list]:
        """Make the two optimizers, the autoencoder's rate multiplied by lr_g_factor, and their schedulers."""
        optimizers, _ = super().configure_optimizers()
        for group in optimizers[0].param_groups:
            group["lr"] *= self.lr_g_factor
        if self.scheduler_config is None:
            return optimizers, []
        schedule = instantiate_from_config(self.scheduler_config).schedule
        return optimizers, [
            {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(o, lr_lambda=schedule),
                "interval": "step",
                "frequency": 1,
            }
            for o in optimizers
        ]

    @torch.no_grad()
    def log_images(
        self, batch: dict[str, Any], only_inputs: bool = False, plot_ema: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """Return pictures to look at: inputs and their reconstructions.

        `split` is what CompVis's ImageLogger says; it changes nothing.
        """
        x = self.get_input(batch, self.image_key)
        pictures = {"inputs": x}
        if not only_inputs:
            pictures["reconstructions"] = self(x)[0]
            if plot_ema:
                with self.ema_scope():
                    pictures["reconstructions_ema"] = self(x)[0]
        return {name: self.to_rgb(value) if value.shape[1] > 3 else value for name, value in pictures.items()}


class VQModelInterface(VQModel):
    """A VQModel as a first stage of diffusion: latents are taken before the codebook, and quantised on decoding."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents (b, embed_dim, h, w) before they are quantised."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Quantise latents, except with force_not_quantize, and decode them to pictures."""
        quantised = h if force_not_quantize else self.quantize(h)[0]
        return super().decode(quantised)


class IdentityFirstStage(nn.Module):
    """No first stage: the pictures are the latents."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any):
        super().__init__()
        if args or kwargs:  # the parameters of the first stage whose place it takes, as CompVis allows
            named = ", ".join([*map(repr, args), *kwargs])
            logger.warning("IdentityFirstStage has no parts; without effect: %.200s", named)
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def decode(self, x: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return x."""
        return x

    def quantize(self, x: Tensor) -> Any:
        """Return x, with vq_interface in the form of a codebook's answer."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, sample_posterior: bool = True) -> Tensor:
        """Return x."""
        return x
