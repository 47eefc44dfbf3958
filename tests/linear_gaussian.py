"""Small models for samplers, as real modules, whose right answers are known in closed form."""

import math

import torch
from torch import Tensor, nn

from ldm.process.schedule import NoiseSchedule


class Scheduled(nn.Module):
    """What samplers need of a model, with Stable Diffusion v1's schedule at any length."""

    def __init__(self, kind: str = "eps", num_timesteps: int = 1000):
        super().__init__()
        schedule = NoiseSchedule.named("linear", num_timesteps, linear_start=0.00085, linear_end=0.012)
        self.parameterization = kind
        self.num_timesteps = num_timesteps
        for name, table in {
            "betas": schedule.betas,
            "alphas_cumprod": schedule.alpha_bar,
            "alphas_cumprod_prev": schedule.alpha_bar_prev,
        }.items():
            self.register_buffer(name, torch.from_numpy(table.copy()).float())
        self.asked: list[tuple[tuple[int, ...], Tensor]] = []

    @property
    def device(self) -> torch.device:
        return self.betas.device

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Look alpha_bar up, (b, 1, 1, 1) float64; log-linear between levels."""
        logs = self.alphas_cumprod.double().log()
        low = t.double().floor().clamp(0, self.num_timesteps - 1)
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        part = t.double() - low
        value = (1 - part) * logs[low.long()] + part * logs[high.long()]
        return value.exp().reshape(-1, 1, 1, 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        a = self.alpha_bar(t)
        return (a.sqrt() * x_start + (1 - a).sqrt() * noise).to(x_start.dtype)

    def output(self, x: Tensor, eps: Tensor, a: Tensor) -> Tensor:
        """State a known noise in the words of this model's kind."""
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        wanted = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.parameterization]
        return wanted.to(x.dtype)

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.asked.append((tuple(x.shape), t))
        a = self.alpha_bar(t)
        return self.output(x, self.noise(x.double(), a, cond), a)


class LinearGaussian(Scheduled):
    """The best possible network for data ~ N(mean, spread^2): the condition (b,) is the mean.

    Its probability flow is known: (x - alpha mean) / sqrt(alpha^2 spread^2 + sigma^2) never changes.
    """

    spread = 0.5

    def noise(self, x: Tensor, a: Tensor, cond: object) -> Tensor:
        while not isinstance(cond, Tensor):
            cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
        mean = cond.double().reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / self.variance(a)

    def variance(self, a: Tensor) -> Tensor:
        return a * self.spread**2 + 1 - a

    def flow(self, x: Tensor, mean: float, start: float, end: float) -> Tensor:
        """Carry x along the exact probability flow from alpha_bar `start` to `end`."""
        start, end = (torch.tensor(v, dtype=torch.float64) for v in (start, end))
        z = (x - start.sqrt() * mean) / self.variance(start).sqrt()
        return end.sqrt() * mean + self.variance(end).sqrt() * z


class Line(Scheduled):
    """A network that knows the noise: whatever it is shown lies on the line from x0 to eps."""

    def __init__(self, eps: Tensor, kind: str = "eps", num_timesteps: int = 1000):
        super().__init__(kind, num_timesteps)
        self.eps = eps

    def noise(self, x: Tensor, a: Tensor, cond: object) -> Tensor:
        return self.eps


class Wavy(Scheduled):
    """A smooth network without a closed form, for holding two programs side by side."""

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.6 * x + 0.2 * torch.sin(3 * x) + 0.1 * torch.cos(t.to(x.dtype) / 300).reshape(-1, 1, 1, 1)

    def apply_model(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        self.asked.append((tuple(x.shape), t))
        return self.raw(x, t)


def normals(*shape: int, count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=dtype) for _ in range(count)]


def mix(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    a = float(alpha_bar)
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * eps


__all__ = ["Line", "LinearGaussian", "Scheduled", "Wavy", "mix", "normals"]
