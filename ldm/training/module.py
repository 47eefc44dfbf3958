"""The training loop's inside as a LightningModule: optimizers by hand, gradients averaged once a step, a NaN guard.

The models themselves know nothing of Lightning. One optimizer step is `accumulate` batches; `step` counts
optimizer steps of the whole run, whatever Lightning counts.
"""

import logging
import math
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from ldm.errors import MismatchError, NumericError
from ldm.process.schedule import SCHEDULE_BUFFERS
from ldm.training.attention import MatmulAttention
from ldm.training.draws import Draws
from ldm.training.objectives import Batch, Objective
from ldm.training.resumption import check_moments, go_to_step

logger = logging.getLogger(__name__)


class GradientAverage(DDPStrategy):
    """Lightning's launch and process group, without the wrapper of DistributedDataParallel.

    The module averages its gradients itself, once per optimizer step: that fits several optimizers, accumulation
    and skipped steps alike.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class NonFiniteGuard:
    """Counts skipped steps: too many in a row or in the window end the run.

    Args:
        in_a_row: so many skipped steps one after the other end it.
        window, share: so does a larger share of the last `window` steps.
    """

    def __init__(self, in_a_row: int = 10, window: int = 1000, share: float = 0.01):
        self.in_a_row, self.window, self.share = in_a_row, window, share
        self.total, self.row, self.recent = 0, 0, []

    def record(self, step: int, is_finite: bool) -> None:
        """Note how step `step` went.

        Raises:
            NumericError: that was one too many.
        """
        self.row = 0 if is_finite else self.row + 1
        if is_finite:
            return
        self.total += 1
        self.recent = [s for s in self.recent if s > step - self.window] + [step]
        logger.warning("step %d: loss or gradient is not finite; step skipped (%d so far)", step, self.total)
        if self.row >= self.in_a_row:
            raise NumericError(
                f"training stopped at step {step}: {self.row} steps in a row were not finite; the last good "
                "checkpoint is kept; lower the learning rate or use precision: 32-true"
            )
        if len(self.recent) > self.share * self.window:
            raise NumericError(
                f"training stopped at step {step}: {len(self.recent)} of the last {self.window} steps were not "
                "finite; the last good checkpoint is kept; lower the learning rate or use precision: 32-true"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "row": self.row, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.row, self.recent = state["total"], state["row"], list(state["recent"])


class LossScale:
    """The factor on the loss that keeps float16 gradients within float16's range (arXiv:1710.03740, section 3.2).

    It halves where gradients overflow and doubles after a long run of steps where they did not, with GradScaler's
    numbers. GradScaler itself decides for each optimizer and each process alone; here all of them step or none, and a
    loss that is not finite, which no scale can mend, leaves the scale as it is.

    Attributes:
        scale: a power of two, so that it changes no gradient's digits.
        sound: steps since it last changed.
    """

    START, DOUBLE_AFTER, LEAST = 2.0**16, 2000, 1.0

    def __init__(self):
        self.scale, self.sound = self.START, 0

    def record(self, step: int, is_finite: bool) -> None:
        """Note whether the gradients of step `step` were finite.

        Raises:
            NumericError: they were not, however small the scale.
        """
        self.sound += 1
        if not is_finite:
            self.scale, self.sound = self.scale / 2, 0
            logger.info("step %d: gradients overflow; step skipped, loss scale %g", step, self.scale)
        elif self.sound >= self.DOUBLE_AFTER:
            self.scale, self.sound = min(self.scale * 2, 2.0**32), 0
        if self.scale < self.LEAST:
            raise NumericError(
                f"training stopped at step {step}: gradients overflow float16 at every loss scale down to "
                f"{self.LEAST:g}; the last good checkpoint is kept; lower the learning rate, or use precision: "
                "32-true (bf16-mixed where the card has it)"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "sound": self.sound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.sound = state["scale"], state["sound"]


class TrainingModule(pl.LightningModule):
    """Takes optimizer steps of an objective.

    Args:
        objective: what to minimise (see `ldm.training.objectives`).
        optimizers, schedulers: one scheduler or None for each optimizer.
        seed: of all draws.
        accumulate: batches in one step.
        clip: bound of the gradient's norm, per optimizer; None for none.
        scales_loss: whether gradients pass through float16 (precision 16-mixed).

    Attributes:
        step: optimizer steps done (skipped ones count).
        has_stepped: whether the batch just trained on ended a step.
        is_amid_step: whether weights and averages are being changed: not a state to save.
        figures: of the last step: name to number, averaged over its batches and processes.
    """

    def __init__(
        self,
        objective: Objective,
        optimizers: list[torch.optim.Optimizer],
        schedulers: list[Any],
        *,
        seed: int,
        accumulate: int = 1,
        clip: float | None = None,
        scales_loss: bool = False,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model = objective.model
        self.objective, self.made, self.schedulers = objective, optimizers, schedulers
        self.seed, self.accumulate, self.clip = seed, accumulate, clip
        self.guard = NonFiniteGuard()
        self.loss_scale = LossScale() if scales_loss else None
        self.step, self.has_stepped, self.is_amid_step = 0, False, False
        self.figures: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._trained = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.made

    def on_fit_start(self) -> None:
        """Let the loss weigh its gradients over all processes."""
        loss = getattr(self.model, "loss", None)
        if hasattr(loss, "average"):
            loss.average = self._averaged

    def draws(self, micro: int) -> Draws:
        return Draws(self.seed, micro, rank=self.global_rank, world=self.trainer.world_size)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        micro = batch["micro"]
        draws = self.draws(micro)
        if micro == 0:
            self.objective.prepare(batch, draws, self.gather)
        with MatmulAttention():
            outputs = self.objective.forward(batch, draws)
        for index in range(len(self.made)):
            with self._only(index):
                loss, figures = self.objective.loss(outputs, index, self.step)
                scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
                self.manual_backward(loss.float() * scale / self.accumulate)
            figures["train/loss" if index == 0 else f"train/loss_{index}"] = loss.detach()
            for name, value in figures.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach().float() / self.accumulate
        self.has_stepped = (micro + 1) % self.accumulate == 0
        if self.has_stepped:
            self._take_step()

    def _take_step(self) -> None:
        """Average over processes, then step every optimizer, or none where anything is not finite."""
        names = sorted(self._sums)
        values = self._averaged(torch.stack([self._sums[name].to(self.device) for name in names]))
        self.figures = dict(zip(names, values.tolist(), strict=True))
        self._sums = {}
        for parameters in self._trained:
            self._average_gradients(parameters)
        if self.loss_scale is not None:
            self.figures["loss_scale"] = self.loss_scale.scale
            for parameters in self._trained:
                for gradient in (p.grad for p in parameters if p.grad is not None):
                    gradient.mul_(1 / self.loss_scale.scale)
        norms = [self._norm(parameters) for parameters in self._trained]
        self.figures["lr"] = self.made[0].param_groups[0]["lr"]
        self.figures["grad_norm"] = norms[0]
        # The losses count as well as the gradients: a loss can be infinite where its gradient is not.
        losses = [value for name, value in self.figures.items() if name.startswith("train/")]
        has_losses = all(map(math.isfinite, losses))
        is_finite = has_losses and all(map(math.isfinite, norms))
        self.is_amid_step = True
        if is_finite:
            for parameters, norm in zip(self._trained, norms, strict=True):
                if self.clip is not None and norm > self.clip:
                    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self.clip / norm)
            for optimizer in self.made:
                optimizer.step()
        for optimizer in self.made:
            optimizer.zero_grad(set_to_none=True)
        for scheduler in self.schedulers:
            if scheduler is not None:
                scheduler.step()
        if is_finite:
            self.objective.after_step()
        self.step += 1
        self.is_amid_step = False
        if self.loss_scale is not None and has_losses:
            self.loss_scale.record(self.step - 1, is_finite)
            if not is_finite:  # the scale's doing, and no fault of the run's
                return
        self.guard.record(self.step - 1, is_finite)

    @contextmanager
    def _only(self, index: int):
        """Let gradients flow into the parameters of one optimizer only."""
        others = [p for i, ps in enumerate(self._trained) if i != index for p in ps]
        for p in others:
            p.requires_grad_(False)
        yield
        for p in others:
            p.requires_grad_(True)

    def _norm(self, parameters: list[nn.Parameter]) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def _averaged(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
            values /= self.trainer.world_size
        return values

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.trainer.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self._averaged(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, values: Tensor) -> Tensor:
        """Join every process's rows, in the order of ranks."""
        if self.trainer.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.trainer.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any_process(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        if self.trainer.world_size == 1:
            return number
        values = torch.tensor(number, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def training_state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, with CompVis's key names; random numbers follow from seed and step."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.made],
            "lr_schedulers": [None if s is None else plain(s.state_dict()) for s in self.schedulers],
            "global_step": self.step,
            "guard": self.guard.state_dict(),
            "moments": [len(optimizer.state) for optimizer in self.made],
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over a state of `training_state`: weights, moments and counts.

        The optimizers' options (rate, betas, weight decay) and the schedules' factors stay those of this run.

        Raises:
            MismatchError: it is of another model, of another noise schedule, or of other optimizers or schedulers, or
                it lacks moments.
        """
        mine = self.model.state_dict()
        theirs = state["state_dict"]
        wrong = [k for k in mine if k not in theirs or mine[k].shape != theirs[k].shape]
        wrong += [k for k in theirs if k not in mine]
        if wrong:
            raise MismatchError(
                f"the checkpoint is of another model: {len(wrong)} tensors differ, first '{wrong[0]}'; resume with "
                "the run's own configuration"
            )
        for name in SCHEDULE_BUFFERS:
            if name in mine and not torch.allclose(
                mine[name], theirs[name].to(mine[name]), rtol=1e-4, atol=0
            ):
                raise MismatchError(
                    f"the checkpoint is of another noise schedule: '{name}' differs; resume with the run's own "
                    "timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas and v_posterior"
                )
        lengths = [len(group["params"]) for o in self.made for group in o.state_dict()["param_groups"]]
        saved = [len(group["params"]) for o in state["optimizer_states"] for group in o["param_groups"]]
        if lengths != saved or len(self.schedulers) != len(state["lr_schedulers"]):
            raise MismatchError(
                f"the checkpoint is of other optimizers: parameters per group {saved}, here {lengths}; resume with "
                "the run's own configuration"
            )
        step, guard = state["global_step"], state["run"]["guard"]
        counts = state["run"].get("moments", [None] * len(self.made))
        if len(counts) != len(self.made):
            raise MismatchError(
                f"the checkpoint lacks run.moments: it counts {len(counts)} of {len(self.made)}"
            )
        for number, (optimizer, saved_state) in enumerate(
            zip(self.made, state["optimizer_states"], strict=True)
        ):
            check_moments(optimizer, saved_state, number, counts[number], has_stepped=step > guard["total"])
        for scheduler, saved_state in zip(self.schedulers, state["lr_schedulers"], strict=True):
            if (scheduler is None) != (saved_state is None):
                raise MismatchError(
                    "the checkpoint has another learning-rate schedule; resume with the run's own"
                )
            if scheduler is not None and saved_state["last_epoch"] != step:
                raise MismatchError(
                    f"the checkpoint's learning-rate schedule is at step {saved_state['last_epoch']}, the run at "
                    f"{step}; the checkpoint is not whole, resume from another"
                )
        self.model.load_state_dict(theirs)
        for optimizer, saved_state in zip(self.made, state["optimizer_states"], strict=True):
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved_state)
            for group, own in zip(optimizer.param_groups, options, strict=True):
                group.update(own)
        for scheduler, saved_state in zip(self.schedulers, state["lr_schedulers"], strict=True):
            if scheduler is not None:
                go_to_step(scheduler, saved_state)
        self.guard.load_state_dict(guard)
        scale = state["run"].get("loss_scale")
        if self.loss_scale is not None and scale is not None:
            self.loss_scale.load_state_dict(scale)
        self.step = step


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Keep a scheduler's numbers and lists of numbers; its functions come from the configuration."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(is_plain, value))
        return isinstance(value, int | float | str | bool)

    return {key: value for key, value in state.items() if is_plain(value)}
