"""The loss of the KL first stages: pixels, perceptual distance, KL and an adversarial part."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.modules.losses.discriminator import (
    NLayerDiscriminator,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
    weights_init,
)
from ldm.modules.losses.lpips import LPIPS

MAX_ADAPTIVE_WEIGHT = 1e4  # CompVis's bound of d_weight


class DummyLoss(nn.Module):
    """No loss: CompVis's shipped configurations name it where a first stage is only read."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return 0."""
        return torch.zeros(())


class LPIPSWithDiscriminator(nn.Module):
    """CompVis's loss of AutoencoderKL, Section G of arXiv:2112.10752.

    All parts are summed over a picture's pixels and averaged over the batch. Differences from the original: with
    `disc_factor` 0 there is no discriminator, and with `perceptual_weight` 0 no LPIPS network, instead of unused
    ones; `pixel_loss` offers "l2".

    Args:
        disc_start: first optimizer step at which the adversarial parts count.
        logvar_init: log variance of the pixels' distribution; a parameter that CompVis never trains.
        kl_weight: of the posterior's KL to N(0, 1).
        pixelloss_weight: kept for CompVis's files, which give it without effect.
        disc_num_layers, disc_in_channels: of the discriminator.
        disc_factor: of both adversarial losses; 0 builds no discriminator.
        disc_weight: multiplies the adaptive weight of the first stage's adversarial loss.
        perceptual_weight: of LPIPS; needs its weights (see `ldm.modules.losses.lpips`).
        use_actnorm: False; the other normalisation is not offered.
        disc_conditional: join the condition to the discriminator's input.
        disc_loss: "hinge" or "vanilla".
        pixel_loss: "l1" as CompVis, or "l2" (squared error).
        disc_ndf: width of the discriminator.

    Raises:
        UsageError: an unknown disc_loss or pixel_loss, or use_actnorm.
        AbsentError: perceptual_weight > 0 without the weights of LPIPS.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        pixel_loss: str = "l1",
        disc_ndf: int = 64,
    ):
        super().__init__()
        if disc_loss not in ("hinge", "vanilla"):
            raise UsageError(f"disc_loss should be 'hinge' or 'vanilla', got {disc_loss!r}")
        if pixel_loss not in ("l1", "l2"):
            raise UsageError(f"pixel_loss should be 'l1' or 'l2', got {pixel_loss!r}")
        if use_actnorm:
            raise UsageError("use_actnorm=True is not offered; leave it False (batch normalisation)")
        self.kl_weight, self.pixel_loss, self.pixel_weight = kl_weight, pixel_loss, pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS().eval() if perceptual_weight > 0 else None
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)))
        self.discriminator = None
        if disc_factor > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers)
            self.discriminator.apply(weights_init)
        self.discriminator_iter_start = disc_start
        self.disc_loss = hinge_d_loss if disc_loss == "hinge" else vanilla_d_loss
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_conditional = disc_conditional
        # Averages a gradient over processes that share a batch; a trainer with several sets it.
        self.average: Callable[[Tensor], Tensor] = lambda gradient: gradient

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
        """Weigh the adversarial loss so that both losses pull the last layer equally hard (times disc_weight)."""
        nll_grads = self.average(torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0])
        g_grads = self.average(torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0])
        weight = nll_grads.norm() / (g_grads.norm() + 1e-4)
        return weight.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach() * self.discriminator_weight

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: Any,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the first stage's loss (optimizer_idx 0) or the discriminator's (1).

        Args:
            inputs, reconstructions: (b, 3, height, width) in [-1, 1].
            posteriors: has `kl()` -> (b,).
            last_layer: the decoder's last weight, for the adaptive weight.
            cond: (b, c, height, width), with disc_conditional.
            weights: multiplies the pixels' loss.

        Returns:
            (loss, figures by CompVis's names, such as "train/rec_loss").

        Raises:
            UsageError: optimizer_idx 1 without a discriminator.
        """
        if optimizer_idx == 1:
            return self._judge(inputs, reconstructions, global_step, cond, split)
        b = inputs.shape[0]
        difference = inputs - reconstructions
        rec_loss = (
            difference.abs() if self.pixel_loss == "l1" else difference.square()
        )  # (b, 3, height, width)
        if self.perceptual_loss is not None:
            rec_loss = rec_loss + self.perceptual_weight * self.perceptual_loss(inputs, reconstructions)
        nll_loss = rec_loss / self.logvar.exp() + self.logvar
        weighted_nll_loss = (nll_loss if weights is None else weights * nll_loss).sum() / b
        nll_loss = nll_loss.sum() / b
        kl_loss = posteriors.kl().sum() / b
        loss = weighted_nll_loss + self.kl_weight * kl_loss
        figures = {
            f"{split}/kl_loss": kl_loss.detach(),
            f"{split}/nll_loss": nll_loss.detach(),
            f"{split}/rec_loss": rec_loss.detach().mean(),
            f"{split}/logvar": self.logvar.detach(),
        }
        disc_factor = adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start)
        if self.discriminator is not None and disc_factor > 0:
            g_loss = -self._logits(reconstructions, cond).mean()
            # In validation there is no graph to weigh by; CompVis then counts the adversarial part as nothing.
            d_weight = torch.zeros(())
            if torch.is_grad_enabled() and last_layer is not None:
                d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
            loss = loss + d_weight * disc_factor * g_loss
            figures[f"{split}/d_weight"] = d_weight.detach()
            figures[f"{split}/disc_factor"] = torch.tensor(float(disc_factor))
            figures[f"{split}/g_loss"] = g_loss.detach()
        figures[f"{split}/total_loss"] = loss.detach()
        return loss, figures

    def _logits(self, pictures: Tensor, cond: Tensor | None) -> Tensor:
        if not self.disc_conditional:
            return self.discriminator(pictures)
        if cond is None:
            raise UsageError("disc_conditional=True needs cond, got None")
        return self.discriminator(torch.cat([pictures, cond], dim=1))

    def _judge(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss; nothing flows back into the first stage."""
        if self.discriminator is None:
            raise UsageError(
                "optimizer_idx=1 asks for the discriminator's loss, but disc_factor=0 built none"
            )
        logits_real = self._logits(inputs.detach().contiguous(), cond)
        logits_fake = self._logits(reconstructions.detach().contiguous(), cond)
        disc_factor = adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start)
        loss = disc_factor * self.disc_loss(logits_real, logits_fake)
        return loss, {
            f"{split}/disc_loss": loss.detach(),
            f"{split}/logits_real": logits_real.detach().mean(),
            f"{split}/logits_fake": logits_fake.detach().mean(),
        }
