"""What an encoder says about its latents: a diagonal Gaussian, or a single point."""

import math

import torch
from torch import Tensor

from ldm.process.likelihood import normal_kl

__all__ = ["AbstractDistribution", "DiagonalGaussianDistribution", "DiracDistribution", "normal_kl"]


class AbstractDistribution:
    """Something to draw latents from."""

    def sample(self) -> Tensor:
        """Draw a sample."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to sample")

    def mode(self) -> Tensor:
        """Return the most likely value."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its mode is")


class DiracDistribution(AbstractDistribution):
    """All weight on one value."""

    def __init__(self, value: Tensor):
        self.value = value

    def sample(self) -> Tensor:
        """Return the value."""
        return self.value

    def mode(self) -> Tensor:
        """Return the value."""
        return self.value


class DiagonalGaussianDistribution:
    """An independent Gaussian for every latent, read off an encoder's output.

    Args:
        parameters: (b, 2c, h, w), means first, then log variances (clamped to [-30, 20]).
        deterministic: sampling returns the mean; KL and NLL are 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (b, c, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw (b, c, h, w) latents.

        The noise is drawn on the CPU, in the default dtype, whatever the device, as the original does: its
        seeds give its latents on a GPU too.
        """
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Tensor:
        """Return the means."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Return the KL divergence to `other`, or to a unit normal, in nats: (b,), summed over c, h, w."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            per_value = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            per_value = (
                (self.mean - other.mean).square() / other.var
                + self.var / other.var
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * per_value.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] | list[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log likelihood of a sample in nats: (b,), summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1)
        per_value = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * per_value.sum(dim=tuple(dims))
