"""OpenAI's TrainLoop: its arguments, files and numbers, over the losses, averages and draws of ldm's own trainer."""

import copy
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.checkpoints import save_object
from ldm.errors import MismatchError, UsageError
from ldm.guided_diffusion import dist_util, logger
from ldm.guided_diffusion.image_datasets import needs_training
from ldm.guided_diffusion.pixel_diffusion import parse_ema_rates
from ldm.limits import real, whole
from ldm.models.diffusion.resample import ScheduleSampler, UniformSampler, record_losses
from ldm.modules.ema import LitEma

log = logging.getLogger(__name__)

# Of the loss in half precision, as a power of two; lowered by one where a gradient overflows.
INITIAL_LOG_LOSS_SCALE = 20.0
MODEL_FILE = re.compile(r"model(\d+)\.pt")


class TrainLoop:
    """Train a network by a diffusion's losses, with AdamW and moving averages, until lr_anneal_steps or for ever.

    Files go into logger.get_dir() after step 0, every save_interval steps and at the end, whole or not at all:
    `model000000.pt`, `ema_0.9999_000000.pt` for each rate, `opt000000.pt`, and `loop000000.pt` where there is more to
    remember (a sampler's losses, half precision's scale). Their number is that of the last step that is in them.

    A run that resumes from `model000000.pt` is the uninterrupted one, bit for bit, if its arguments are the same and
    its data can be set to a batch, as load_data's can: step n draws from (seed, n) alone. The original repeats the step
    of the file's number, and draws anew.

    Also different from the original: a microbatch is weighed by its share of the batch, so that the gradient does not
    depend on it; the rate of step n is (1 - n / lr_anneal_steps) lr, without its lag of one step; steps whose gradient
    is not finite are skipped, and too many of them end the run.

    Args:
        model: the network, on its device.
        diffusion: a GaussianDiffusion.
        data: an endless iterator over (batch (b, c, h, w), {"y": (b,)} or {}), such as load_data's.
        batch_size: of this process; counts samples in the log.
        microbatch: so many pictures at once through the network; -1 is the whole batch.
        ema_rate: one rate or several, "0.9999,0.999".
        log_interval, save_interval: in steps.
        resume_checkpoint: "" or a file model000000.pt with the others beside it; another file is begun with at step 0.
        use_fp16: half precision inside the network, float32 in what is trained and saved.
        fp16_scale_growth: added at each step to the exponent of the loss's scale.
        schedule_sampler: of levels; None draws all alike.
        lr_anneal_steps: how many steps the run has, its rate falling to zero; 0 goes on for ever.
        seed: of noise, levels and dropout.

    Raises:
        UsageError: a value out of range. MismatchError: a file of another network or optimizer.
        AbsentError, FormatError, UnsafeFileError: a file that cannot be had, read or trusted.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: str | float | Sequence[float],
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str | os.PathLike,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        seed: int = 0,
    ):
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size = whole("batch_size", batch_size, 1, 1_000_000)
        self.microbatch = (
            batch_size if microbatch in (-1, 0) else whole("microbatch", microbatch, 1, 1_000_000)
        )
        self.lr, self.weight_decay = real("lr", lr, 0, 10), real("weight_decay", weight_decay, 0, 10)
        self.ema_rate = parse_ema_rates(ema_rate)
        self.log_interval = whole("log_interval", log_interval, 1, 1 << 40)
        self.save_interval = whole("save_interval", save_interval, 1, 1 << 40)
        self.lr_anneal_steps = whole("lr_anneal_steps", lr_anneal_steps, 0, 1 << 40)
        self.use_fp16, self.fp16_scale_growth = use_fp16, real("fp16_scale_growth", fp16_scale_growth, 0, 1)
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.seed = whole("seed", seed, 0, (1 << 63) - 1)
        self.rank, self.world = dist_util.place()
        self.global_batch = self.batch_size * self.world
        self.step, self.resume_step, self.saved_step = 0, 0, -1
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE
        self._draws = needs_training("objectives").Draws
        self._guard = needs_training("module").NonFiniteGuard()

        if resume_checkpoint:
            logger.log(f"loading model from checkpoint: {resume_checkpoint}...")
            self._load_weights(model, resume_checkpoint)
        dist_util.sync_params(model.parameters())
        # What is trained: the network itself, or its twin in float32.
        self.master = model
        if use_fp16:
            if not hasattr(model, "convert_to_fp16"):
                raise UsageError(f"use_fp16 needs a network with convert_to_fp16, got {type(model).__name__}")
            self.master = copy.deepcopy(model).float()
            model.convert_to_fp16()
        self.opt = torch.optim.AdamW(self.master.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        self.ema = {rate: LitEma(self.master, rate, use_num_upates=False) for rate in self.ema_rate}
        for average in self.ema.values():
            average.to(next(model.parameters()).device)
        if resume_checkpoint and MODEL_FILE.fullmatch(Path(resume_checkpoint).name):
            self._resume(Path(resume_checkpoint), parse_resume_step_from_filename(resume_checkpoint))

    # --- going on ---

    def _resume(self, path: Path, number: int) -> None:
        """Take over what lies beside a model file, and go on after its step."""
        self.resume_step, self.step, self.saved_step = number, 1, number
        for rate, average in self.ema.items():
            found = path.with_name(f"ema_{rate}_{number:06}.pt")
            if not found.is_file():
                log.warning("'%s' is not there; this average begins at the model's weights", found)
                continue
            held = copy.deepcopy(self.master)
            self._load_weights(held, found)
            average.copy_from(held)
        found = path.with_name(f"opt{number:06}.pt")
        if found.is_file():
            self._load_optimizer(found)
        else:
            log.warning("'%s' is not there; the optimizer begins without its moments", found)
        remembers = bool(self.schedule_sampler.state_dict()) or self.use_fp16
        found = path.with_name(f"loop{number:06}.pt")
        if found.is_file():
            state = dist_util.load_state_dict(found)
            self.schedule_sampler.load_state_dict(state.get("schedule_sampler", {}))
            self.lg_loss_scale = float(state.get("lg_loss_scale", INITIAL_LOG_LOSS_SCALE))
        elif remembers:
            log.warning("'%s' is not there; the sampler and the loss's scale begin anew", found)

    @staticmethod
    def _load_weights(model: nn.Module, path: str | os.PathLike) -> None:
        """Load a file of weights, all of them."""
        held, own = dist_util.load_state_dict(path), model.state_dict()
        wrong = [name for name in own if name not in held or held[name].shape != own[name].shape]
        wrong += [name for name in held if name not in own]
        if wrong:
            raise MismatchError(
                f"'{path}' is of another network: {len(wrong)} tensors differ, first '{wrong[0]:.80}'; give the flags "
                "that it was made with"
            )
        model.load_state_dict(held)

    def _load_optimizer(self, path: Path) -> None:
        """Load the moments; rate and decay stay those of this run."""
        held = dist_util.load_state_dict(path)
        try:
            self.opt.load_state_dict(held)
        except (ValueError, KeyError, TypeError) as error:
            raise MismatchError(
                f"'{path}' is of another optimizer or network ({str(error):.100}); take it away to begin anew"
            ) from error
        for group in self.opt.param_groups:
            group.update(lr=self.lr, weight_decay=self.weight_decay)

    # --- steps ---

    @property
    def total_step(self) -> int:
        """The number of the step that comes, resumed ones counted."""
        return self.step + self.resume_step

    def run_loop(self) -> None:
        """Take steps until lr_anneal_steps, or for ever.

        Raises:
            UsageError: the data came to an end; what was trained by then is saved.
            NumericError: too many steps were not finite.
        """
        if hasattr(self.data, "seek"):
            self.data.seek(self.total_step)
        elif self.total_step:
            log.warning("this data cannot be set to batch %d; it begins anew", self.total_step)
        while not self.lr_anneal_steps or self.total_step < self.lr_anneal_steps:
            try:
                batch, cond = next(self.data)
            except StopIteration:
                self._save_last()
                raise UsageError(
                    f"the data ended before step {self.total_step}; it should go on for ever, as load_data's does"
                ) from None
            self.run_step(batch, cond)
            if self.total_step % self.log_interval == 0:
                logger.dumpkvs()
            if self.total_step % self.save_interval == 0:
                self.save()
            self.step += 1
        self._save_last()

    def _save_last(self) -> None:
        if 0 <= self.total_step - 1 != self.saved_step:
            self.step -= 1
            self.save()
            self.step += 1

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Take one step on a batch (b, c, h, w) and what the network is conditioned on."""
        self._anneal_lr()
        self.forward_backward(batch, cond)
        if self.optimize():
            self._update_ema()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Add a batch's gradients up, microbatch by microbatch."""
        self.model.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device
        draws = self._draws(self.seed, self.total_step, rank=self.rank, world=self.world)
        t, weights = draws.weighted_levels(self.schedule_sampler, batch)
        noise = draws.normal(batch)
        for start in range(0, len(batch), self.microbatch):
            rows = slice(start, start + self.microbatch)
            levels = t[rows].to(device)
            terms = self.diffusion.training_losses(
                self.model,
                batch[rows].to(device),
                levels,
                model_kwargs={name: value[rows].to(device) for name, value in cond.items()},
                noise=noise[rows].to(device),
            )
            record_losses(self.schedule_sampler, levels, terms["loss"])
            terms = {name: term * weights[rows].to(device) for name, term in terms.items()}
            log_loss_dict(self.diffusion, levels, terms)
            loss = terms["loss"].sum() / len(batch)
            (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    @torch.no_grad()
    def optimize(self) -> bool:
        """Step the optimizer, unless a gradient is not finite; return whether it did."""
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
            for mine, theirs in zip(self.master.parameters(), self.model.parameters(), strict=True):
                mine.grad = None if theirs.grad is None else theirs.grad.float() * 2**-self.lg_loss_scale
        gradients = [p.grad for p in self.master.parameters() if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient) / self.world)
        norm = float(nn.utils.get_total_norm(gradients))
        is_sound = math.isfinite(norm)
        if not is_sound and self.use_fp16 and self.lg_loss_scale > 0:
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            return False
        self._guard.record(self.total_step, is_sound)
        if not is_sound:
            return False
        logger.logkv_mean("grad_norm", norm)
        logger.logkv_mean("param_norm", float(nn.utils.get_total_norm(list(self.master.parameters()))))
        self.opt.step()
        if self.use_fp16:
            self.lg_loss_scale += self.fp16_scale_growth
            for mine, theirs in zip(self.master.parameters(), self.model.parameters(), strict=True):
                theirs.copy_(mine)
        return True

    def _update_ema(self) -> None:
        for average in self.ema.values():
            average(self.master)

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            for group in self.opt.param_groups:
                group["lr"] = self.lr * (1 - self.total_step / self.lr_anneal_steps)

    def log_step(self) -> None:
        """Note how far the run is."""
        logger.logkv("step", self.total_step)
        logger.logkv("samples", (self.total_step + 1) * self.global_batch)

    # --- files ---

    def save(self) -> None:
        """Write the files of this step; the model last, so that a model file has its others beside it."""
        if self.rank == 0:
            folder, number = Path(get_blob_logdir()), f"{self.total_step:06}"
            weights = self.master.state_dict()
            for rate, average in self.ema.items():
                logger.log(f"saving model {rate}...")
                averaged = {name: getattr(average, held) for name, held in average.m_name2s_name.items()}
                _write(folder / f"ema_{rate}_{number}.pt", {**weights, **averaged})
            _write(folder / f"opt{number}.pt", self.opt.state_dict())
            state: dict[str, Any] = {"lg_loss_scale": self.lg_loss_scale} if self.use_fp16 else {}
            if remembered := self.schedule_sampler.state_dict():
                state["schedule_sampler"] = remembered
            if state:
                _write(folder / f"loop{number}.pt", state)
            logger.log("saving model 0...")
            _write(folder / f"model{number}.pt", weights)
        self.saved_step = self.total_step
        if self.world > 1:
            dist.barrier()


def _write(path: Path, state: Mapping[str, Any]) -> None:
    save_object(path, dict(state))


def parse_resume_step_from_filename(filename: str | os.PathLike) -> int:
    """Read the number in model000123.pt; 0 for a file of another name."""
    found = MODEL_FILE.fullmatch(Path(filename).name)
    return int(found[1]) if found else 0


def get_blob_logdir() -> str:
    """Tell where files are written: the logger's folder, which is made where there is none."""
    if logger.get_dir() is None:
        logger.configure()
    return logger.get_dir()


def log_loss_dict(diffusion: Any, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Note the means of losses (b,), of all levels ts (b,) and of each quarter of the chain that there are some of."""
    quarters = (4 * ts // diffusion.num_timesteps).tolist()
    for key, values in losses.items():
        numbers = values.detach().float().tolist()
        logger.logkv_mean(key, sum(numbers) / len(numbers))
        for quarter, number in zip(quarters, numbers, strict=True):
            logger.logkv_mean(f"{key}_q{quarter}", number)
