"""A pixel diffusion model of OpenAI's family with all that its training remembers, for the one trainer.

Improved DDPM (arXiv:2102.09672) and guided-diffusion keep these in a training loop; here a configuration names the
class, and a training state holds it whole: the network, its moving averages and the schedule sampler's history.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.guided_diffusion.script_util import (
    create_model_and_diffusion,
    diffusion_from_flags,
    model_and_diffusion_defaults,
)
from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.models.diffusion.resample import create_named_schedule_sampler
from ldm.models.diffusion.respace import SpacedDiffusion
from ldm.modules.ema import LitEma, average_key


class SavedSampler(nn.Module):
    """A schedule sampler whose state is saved and loaded with the module that holds it.

    Args:
        name: "uniform" or "loss-second-moment".
        diffusion: whose levels are drawn.
    """

    def __init__(self, name: str, diffusion: Any):
        super().__init__()
        self.sampler = create_named_schedule_sampler(name, diffusion)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: table for name, table in self.sampler.state_dict().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wanted = [prefix + name for name in self.sampler.state_dict()]
        missing = [key for key in wanted if key not in state_dict]
        missing_keys += missing
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in wanted]
        if wanted and not missing:
            self.sampler.load_state_dict({key.removeprefix(prefix): state_dict[key] for key in wanted})


class PixelDiffusion(nn.Module):
    """A UNet and a Gaussian diffusion from OpenAI's flags, trained on pictures (b, 3, size, size) in [-1, 1].

    Attributes:
        model: the UNet; its keys without "model." are those of OpenAI's files.
        diffusion: the chain it is trained on.
        averages: rate -> moving average of the UNet (LitEma), under `average_key` of the rate.
        ema_rates: the rates in the order they were given; samples are shown and measured with the first.
        levels: the schedule sampler, saved along.
        flags: all flags, defaults included.

    Args:
        image_key: where batches have (b, h, w, 3) pictures.
        label_key: where they have (b,) labels; looked at with class_cond only.
        schedule_sampler: "uniform" or "loss-second-moment".
        ema_rate: one rate or several, "0.9999,0.999"; each average starts at the first weights, without warm-up.
        weight_decay: AdamW's.
        lr_anneal_steps: the step at which the rate, falling along a line, is zero; 0 keeps it.
        ckpt_path: a file of OpenAI's kind to begin with, such as the weights of another run.
        flags: those of `script_util.create_model_and_diffusion`, over model_and_diffusion_defaults().

    Raises:
        UsageError: an unknown flag or sampler (the nearest flag is named), or a value out of range.
        MismatchError: flags that do not fit together, or not the file at ckpt_path.
        AbsentError, FormatError, UnsafeFileError: that file cannot be had, read or trusted.
    """

    HANDS_ON_TO = create_model_and_diffusion  # where the flags go
    learning_rate: float | None = None  # set by whoever trains; configure_optimizers needs it

    def __init__(
        self,
        *,
        image_key: str = "image",
        label_key: str = "class_label",
        schedule_sampler: Literal["uniform", "loss-second-moment"] = "uniform",
        ema_rate: str | float | Sequence[float] = "0.9999",
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        ckpt_path: str | None = None,
        **flags: Any,
    ):
        super().__init__()
        self.flags = {**model_and_diffusion_defaults(), **flags}
        if self.flags["use_fp16"]:
            raise UsageError(
                "use_fp16 is for sampling; weights are trained in float32, and computed with in half precision by "
                "lightning.trainer.precision: bf16-mixed or 16-mixed"
            )
        if not math.isfinite(weight_decay) or weight_decay < 0:
            raise UsageError(f"weight_decay should be at least 0, got {weight_decay}")
        if lr_anneal_steps < 0:
            raise UsageError(f"lr_anneal_steps should be at least 0 (0: none), got {lr_anneal_steps}")
        self.image_key, self.label_key = image_key, label_key
        self.weight_decay, self.lr_anneal_steps = weight_decay, lr_anneal_steps
        self.ema_rates = parse_ema_rates(ema_rate)
        self.model, self.diffusion = create_model_and_diffusion(**self.flags)
        if ckpt_path is not None:
            self._load(ckpt_path)
        self.levels = SavedSampler(schedule_sampler, self.diffusion)
        self.averages = nn.ModuleDict(
            {
                average_key(rate): LitEma(self.model, decay=rate, use_num_upates=False)
                for rate in self.ema_rates
            }
        )

    @property
    def num_classes(self) -> int | None:
        """How many classes a label may name; None where it takes none."""
        return self.flags["num_classes"]

    def make_objective(self, *, memory_format: torch.memory_format, sample_steps: int) -> Any:
        """Make what a training run minimises; see ldm.training.objectives.Objective."""
        from ldm.guided_diffusion.objective import GaussianObjective

        return GaussianObjective(self, memory_format=memory_format, sample_steps=sample_steps)

    def _load(self, path: str) -> None:
        from ldm.guided_diffusion.files import load_openai_model

        loaded, _, _ = load_openai_model(path, **self.flags)
        self.model.load_state_dict(loaded.state_dict())

    def configure_optimizers(self) -> Any:
        """Make AdamW, and with lr_anneal_steps the schedule that takes its rate to zero.

        Returns:
            The optimizer, or ([optimizer], [{"scheduler": ...}]).

        Raises:
            UsageError: learning_rate is not set.
        """
        if self.learning_rate is None:
            raise UsageError("configure_optimizers needs model.learning_rate, a number; it is not set")
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if not self.lr_anneal_steps:
            return optimizer
        line = LambdaLinearScheduler(
            warm_up_steps=[0], f_start=[1.0], f_max=[1.0], f_min=[0.0], cycle_lengths=[self.lr_anneal_steps]
        )
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, line.schedule)}]

    def update_averages(self) -> None:
        """Take the present weights into every average."""
        for average in self.averages.values():
            average(self.model)

    @contextmanager
    def ema_scope(self, rate: float | None = None) -> Iterator[None]:
        """Put an average's weights in the network's place; the first rate's where none is named."""
        average = self.averages[average_key(self.ema_rates[0] if rate is None else rate)]
        average.store(self.model.parameters())
        average.copy_to(self.model)
        try:
            yield
        finally:
            average.restore(self.model.parameters())

    def shorter(self, steps: int) -> SpacedDiffusion:
        """Make a chain of so many steps (at most the whole one's) for sampling."""
        steps = min(steps, self.flags["diffusion_steps"])
        return diffusion_from_flags({**self.flags, "timestep_respacing": [steps]})


def parse_ema_rates(rates: str | float | Sequence[float]) -> list[float]:
    """Read "0.9999,0.999", 0.9999 or [0.9999, 0.999].

    Raises:
        UsageError: none, one twice, or one that is no number in [0, 1).
    """
    parts = rates.split(",") if isinstance(rates, str) else rates
    try:
        read = [float(part) for part in (parts if isinstance(parts, Sequence) else [parts])]
    except (TypeError, ValueError):
        read = []
    if not read or len(set(read)) < len(read) or not all(0 <= rate < 1 for rate in read):
        raise UsageError(
            f"ema_rate should be one or more rates in [0, 1), each once, such as '0.9999,0.999'; got {rates!r}"
        )
    return read
