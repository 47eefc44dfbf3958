"""DDIM under diffusers' names and with its numbers, over the formulas of ldm.process."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints import folders
from ldm.errors import UsageError, nearest
from ldm.limits import SHARE, real
from ldm.models.diffusion import scheduler
from ldm.process.prediction import to_eps, to_x0
from ldm.process.schedule import NoiseSchedule
from ldm.process.spacing import check_steps, exact_levels
from ldm.process.steps import ddim_std, ddim_step

log = logging.getLogger(__name__)

# diffusers' words for schedules -> those of ldm.process.schedule.
SCHEDULES = {**folders.SCHEDULES, "squaredcos_cap_v2": "openai-cosine"}
SPACINGS = ("leading", "trailing", "linspace")


class Config(dict):
    """Settings that can be read as entries and as attributes, and changed as neither."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            near = nearest(name, self)
            hint = f"; did you mean '{near}'?" if near else ""
            raise AttributeError(f"this config has no '{name}'{hint}")
        return self[name]

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a config cannot be changed; make a new object with from_config(config, name=value)")

    __setattr__ = __setitem__ = __delitem__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple:  # pickling and copying would else set entries one by one
        return type(self), (dict(self),)


class DDIMSchedulerOutput(NamedTuple):
    """A finished step: the sample one level cleaner, and the clean sample as predicted."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def draw_noise(
    shape: Sequence[int], generator: Any, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw unit normals where the generator is and bring them to the device; a list has one generator for each row.

    Raises:
        UsageError: a list of another length.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != shape[0]:
            raise UsageError(f"a list of generators needs one for each of {shape[0]}, got {len(generator)}")
        return torch.cat([draw_noise((1, *shape[1:]), one, device, dtype) for one in generator])
    place = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=place, dtype=dtype).to(device)


class DDIMScheduler(scheduler.DDIMScheduler):
    """diffusers' DDIMScheduler: its keywords and their defaults, its levels, and the level that each step goes to.

    A step from level t goes to t - T // n, as theirs; get_xt_prev goes to the next of the timesteps. The two differ
    for "linspace", and for "trailing" where n does not divide T. A single step of "linspace" begins at the noisiest
    level, where theirs begins at the cleanest.

    Attributes:
        config: all settings, as entries and attributes.
        final_alpha_cumprod: where the last step goes.
        num_inference_steps: n of set_timesteps; None before.

    Raises:
        UsageError: a name or number out of range, or what is not supported: thresholding, rescale_betas_zero_snr.
    """

    order = 1

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.config = Config(settings, _class_name="DDIMScheduler")
        for name, known in (
            ("beta_schedule", SCHEDULES),
            ("prediction_type", folders.PREDICTIONS),
            ("timestep_spacing", SPACINGS),
        ):
            if settings[name] not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}; got {settings[name]!r:.80}")
        for name in ("thresholding", "rescale_betas_zero_snr"):
            if settings[name]:
                raise UsageError(f"{name}=True is not supported by this DDIMScheduler; leave it out")
        if trained_betas is not None:
            table = NoiseSchedule.from_betas(np.asarray(trained_betas, dtype=np.float64))
        else:
            check_steps(num_train_timesteps, 1_000_000, name="num_train_timesteps")
            ends = {"linear_start": beta_start, "linear_end": beta_end}
            table = NoiseSchedule.named(SCHEDULES[beta_schedule], num_train_timesteps, **ends)
        super().__init__(table.alpha_bar, spacing=timestep_spacing, set_alpha_to_one=set_alpha_to_one)
        if not isinstance(steps_offset, int) or not 0 <= steps_offset < len(self):
            raise UsageError(f"steps_offset must be from 0 to {len(self) - 1}, got {steps_offset!r}")
        self.betas = torch.from_numpy(table.betas).float()
        self.final_alpha_cumprod = self._final.float()
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> DDIMScheduler:
        """Make a scheduler with the settings of another one, of ours or of diffusers, some changed.

        Settings that only the other one has, such as PNDM's skip_prk_steps, are left out, which is logged.

        Raises:
            UsageError: a change that this scheduler does not know; no mapping.
        """
        if not isinstance(config, Mapping):
            raise UsageError(
                f"from_config takes the settings of a scheduler (scheduler.config), got {type(config).__name__}"
            )
        known = list(inspect.signature(cls).parameters)
        refuse_unknown(cls.__name__, changes, known)
        others = [name for name in config if name not in known and not name.startswith("_")]
        if others:
            log.info("settings of another scheduler are left out: %s", ", ".join(others))
        return cls(**{**{name: config[name] for name in known if name in config}, **changes})

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, subfolder: str | None = None, **changes: Any
    ) -> DDIMScheduler:
        """Read scheduler_config.json of a local folder, in `subfolder` ("scheduler") of it if one is named.

        Raises:
            AbsentError, FormatError: it is not there, or not JSON. UsageError: see from_config.
        """
        path = Path(folder, subfolder) if subfolder else Path(folder)
        return cls.from_config(folders.read_json(path / "scheduler_config.json"), **changes)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the levels of a run, noisiest first.

        Raises:
            UsageError: a number of steps outside 1..T, or levels that steps_offset moves past T - 1.
        """
        count = check_steps(num_inference_steps, len(self), name="num_inference_steps")
        levels = exact_levels(self.spacing, count, len(self))
        if self.spacing == "leading":
            levels = levels - levels[0] + (self.config.steps_offset if count < len(self) else 0)
        if levels[-1] >= len(self):
            raise UsageError(
                f"steps_offset={self.config.steps_offset} moves {count} steps past level {len(self) - 1}; lower it"
            )
        self.num_inference_steps = count
        self.timesteps = torch.from_numpy(levels[::-1].copy()).to(device or "cpu")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput:
        """Step a sample (b, ...) from a level to the one T // n below it, given the network's answer.

        Args:
            model_output: what config.prediction_type says.
            eta: 0 to 1; above 0, fresh noise is drawn from `generator`, or is `variance_noise`.
            use_clipped_model_output: take the noise that belongs to the clipped clean sample.
            return_dict: without effect, for the answer is a tuple whose entries have names.

        Raises:
            UsageError: set_timesteps was not called, or a level or eta out of range.
        """
        if self.num_inference_steps is None:
            raise UsageError("step needs to know how many steps there are; call set_timesteps(n) first")
        real("eta", eta, *SHARE)
        level = timestep.item() if isinstance(timestep, Tensor) else timestep  # one wait for a GPU, not three
        t = int(level)
        if t != level or not 0 <= t < len(self):
            raise UsageError(f"level {level:g} is no level of this schedule, 0 to {len(self) - 1}")
        lower = t - len(self) // self.num_inference_steps
        alpha_bar, below = self._alpha_bar[t], self._alpha_bar[lower] if lower >= 0 else self._final
        kind = folders.PREDICTIONS[self.config.prediction_type]
        eps = to_eps(kind, model_output, sample, alpha_bar)
        pred_x0 = to_x0(kind, model_output, sample, alpha_bar)
        if self.config.clip_sample:
            pred_x0 = pred_x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = to_eps("x0", pred_x0, sample, alpha_bar)
        std, noise = None, None
        if eta > 0:
            std, noise = ddim_std(alpha_bar, below, eta), variance_noise
            if noise is None:
                noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        levels = {"alpha_bar_t": alpha_bar, "alpha_bar_prev": below}
        return DDIMSchedulerOutput(*ddim_step(sample, eps, **levels, std=std, noise=noise, pred_x0=pred_x0))

    def __repr__(self) -> str:
        own = {name: value for name, value in self.config.items() if name != "trained_betas"}
        return f"DDIMScheduler({', '.join(f'{k}={v!r}' for k, v in own.items() if not k.startswith('_'))})"


def refuse_unknown(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise UsageError for the first keyword that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(known)}"
            raise UsageError(f"{what} has no option '{name:.60}'; {hint:.280}")


def schedule_config(model: Any) -> dict[str, Any]:
    """Describe a model's noise schedule as diffusers does, with Stable Diffusion v1's settings of DDIM beside."""
    settings: dict[str, Any] = {
        "num_train_timesteps": model.num_timesteps,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    own = model.alphas_cumprod.detach().cpu().float()
    for name in folders.SCHEDULES:
        ends = {"beta_start": model.linear_start, "beta_end": model.linear_end, "beta_schedule": name}
        made = DDIMScheduler(num_train_timesteps=model.num_timesteps, **ends)
        if torch.allclose(made.alphas_cumprod, own, rtol=1e-6, atol=1e-9):
            return {**settings, **ends}
    return {**settings, "trained_betas": model.betas.detach().cpu().double().tolist()}
