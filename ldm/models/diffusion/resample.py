"""Which levels a training batch is noised to: all alike, or those with large losses more often.

Improved DDPM (arXiv:2102.09672), section 3.3. Levels are drawn from numpy's global generator, as in OpenAI's code,
or from one that a trainer gives, so that a resumed run draws the same levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.errors import MismatchError, NumericError, UsageError
from ldm.helpers import upload


def create_named_schedule_sampler(name: str, diffusion: Any) -> "ScheduleSampler":
    """Make the sampler of a name for the levels of a diffusion.

    Raises:
        UsageError: an unknown name.
    """
    if name not in SAMPLERS:
        raise UsageError(f"schedule sampler '{name}' is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over levels. Losses times the drawn weights have the mean that uniform levels give."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Return how often each level is wanted, (num_timesteps,) positive, in any unit."""

    def sample(
        self, batch_size: int, device: torch.device | str, *, rng: np.random.RandomState | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw levels for a batch, from numpy's global generator or from `rng`.

        Returns:
            (levels (b,) int64, what to multiply their losses by (b,) float32), on the device.
        """
        weights = self.weights()
        p = weights / weights.sum()
        levels = (rng or np.random).choice(len(p), size=(batch_size,), p=p)
        factors = 1 / (len(p) * p[levels])
        drawn = torch.from_numpy(levels).long(), torch.from_numpy(factors).float()
        return tuple(upload(x, torch.device(device)) for x in drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict`.

        Raises:
            MismatchError: it is of another sampler.
        """
        if state:
            raise MismatchError(f"{type(self).__name__} keeps no state, got {', '.join(state)}")


def record_losses(sampler: ScheduleSampler, t: Tensor, losses: Tensor) -> None:
    """Update a sampler that learns from losses with finite losses (b,) at levels t (b,); drop the others.

    The training step that such a loss belongs to is skipped.
    """
    if isinstance(sampler, LossAwareSampler):
        losses = losses.detach()
        is_sound = losses.isfinite()
        sampler.update_with_local_losses(t[is_sound], losses[is_sound])


class UniformSampler(ScheduleSampler):
    """All levels alike."""

    def __init__(self, diffusion: Any):
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        """Return ones."""
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all processes, and so is the same in each."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learn from one batch; with torch.distributed every process calls this, with a batch of its own size.

        Args:
            local_ts: (b,) levels.
            local_losses: (b,) losses, not yet multiplied by anything.

        Raises:
            UsageError: not one loss for each level.
        """
        if local_ts.dim() != 1 or local_ts.shape != local_losses.shape:
            raise UsageError(
                "update_with_local_losses takes (b,) levels and as many losses, got shapes "
                f"{tuple(local_ts.shape)} and {tuple(local_losses.shape)}"
            )
        local_losses = local_losses.detach()
        if dist.is_available() and dist.is_initialized():
            local_ts, local_losses = _gather(local_ts), _gather(local_losses)
        self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the levels and losses of all processes, which come in the order of ranks."""


class LossSecondMomentResampler(LossAwareSampler):
    """Levels by the root mean square of their last losses: Improved DDPM, Eq. 18.

    Until every level has a full history, all levels are alike.

    Args:
        diffusion: whose levels are drawn, known by num_timesteps.
        history_per_term: how many losses of each level are kept.
        uniform_prob: share of draws that are uniform all the same, so that no level is forgotten.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros((diffusion.num_timesteps, history_per_term))
        self._loss_counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        """Return the probabilities of the levels, or ones while histories are not full."""
        size = np.sqrt((self._loss_history**2).mean(axis=-1))
        if not self._warmed_up() or not size.any():
            return np.ones(len(size))
        return (1 - self.uniform_prob) * size / size.sum() + self.uniform_prob / len(size)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Append losses to the histories of their levels; the oldest fall out.

        Raises:
            UsageError: a level that the chain has not.
            NumericError: a loss that is not finite, which would spoil all later draws.
        """
        last = len(self._loss_counts) - 1
        for t, loss in zip(ts, losses, strict=True):
            if not 0 <= t <= last:
                raise UsageError(f"levels should be from 0 to {last}, got {t}")
            if not np.isfinite(loss):
                raise NumericError(f"the history of losses takes finite numbers, got {loss} at level {t}")
            if self._loss_counts[t] < self.history_per_term:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1
            else:
                self._loss_history[t] = np.append(self._loss_history[t, 1:], loss)

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self) -> dict[str, Tensor]:
        """Return {"loss_history": (num_timesteps, history_per_term), "loss_counts": (num_timesteps,)}."""
        tables = {"loss_history": self._loss_history, "loss_counts": self._loss_counts}
        return {name: torch.from_numpy(table.copy()) for name, table in tables.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of `state_dict`.

        Raises:
            MismatchError: it is of another sampler, number of levels or length of history.
        """
        wanted = {name: tuple(table.shape) for name, table in self.state_dict().items()}
        given = {name: tuple(getattr(table, "shape", ())) for name, table in state.items()}
        if given != wanted:
            raise MismatchError(f"{type(self).__name__} keeps {wanted}, got a state of {given}")
        self._loss_history = state["loss_history"].cpu().numpy().copy()
        self._loss_counts = state["loss_counts"].cpu().numpy().copy()


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def _gather(values: Tensor) -> Tensor:
    """Join the rows of all processes in the order of ranks, however many each has."""
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = torch.nn.functional.pad(values, (0, longest - len(values)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
