"""DPM-Solver as other people's code imports it: NoiseScheduleVP, model_wrapper and DPM_Solver.

Signatures, options and times are those of the solver's published program as CompVis's repository carries it; the
formulas are those of ldm.process, after DPM-Solver (arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095).

Time t is continuous: alpha(t) and sigma(t) are the shares of signal and noise in x_t = alpha x0 + sigma eps, and
lambda(t) = log(alpha / sigma) is half the log-SNR, the clock in which a step of the solver is measured. For a chain
of N trained levels, level n lies at time (n + 1) / N.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import NumericError, UsageError, shown
from ldm.models.diffusion.sampling_util import append_dims
from ldm.process.guidance import classifier_eps, guide, join
from ldm.process.prediction import to_eps, to_x0
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.spacing import CONTINUOUS_METHODS
from ldm.process.steps import dpm_solver_pp_step, dpm_solver_step
from ldm.values import Range, check_value

logger = logging.getLogger(__name__)

SCHEDULES = ("discrete", "linear", "cosine")
# What a network predicts, in the words of `model_wrapper` and in those of ldm.process.prediction.
MODEL_TYPES = {"noise": "eps", "x_start": "x0", "v": "v", "score": "score"}
GUIDANCE_TYPES = ("uncond", "classifier", "classifier-free")
METHODS = ("singlestep", "multistep", "singlestep_fixed", "adaptive")
SOLVER_TYPES = {"dpm_solver": "midpoint", "taylor": "taylor"}  # and their names in ldm.process.steps

COSINE_S = 0.008
COSINE_END = 0.9946  # short of 1, where the cosine schedule has no signal left (DPM-Solver, appendix D.4)
THRESHOLD_QUANTILE = 0.995  # of |x0|; Imagen's dynamic thresholding, arXiv:2205.11487, section 2.3
SHORTEST_STEP = 1e-6  # in lambda, whose whole range is about 10

ModelFn = Callable[[Tensor, Tensor], Tensor]


class NoiseScheduleVP:
    """A noise schedule that keeps the variance, at any time t in [0, T].

    Args:
        schedule: "discrete", a chain of trained levels, log alpha in straight lines between them; "linear",
            beta(t) from continuous_beta_0 to continuous_beta_1; or "cosine", alpha as in Improved DDPM.
        betas, alphas_cumprod: (N,) of a discrete chain, either of the two.
        continuous_beta_0, continuous_beta_1: ends of the linear schedule.

    Attributes:
        T: the last time: 1, or 0.9946 for "cosine".
        total_N: levels of the chain; 1000 where there is none. Sampling ends at time 1 / total_N.

    Raises:
        UsageError: an unknown schedule, or a chain that is missing or whose alphas_cumprod do not fall from below 1.
    """

    def __init__(
        self,
        schedule: str = "discrete",
        betas: Any = None,
        alphas_cumprod: Any = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ):
        _choose("schedule", schedule, SCHEDULES)
        self.schedule = schedule
        self.T = COSINE_END if schedule == "cosine" else 1.0
        self.total_N = 1000
        self.beta_0, self.beta_1 = continuous_beta_0, continuous_beta_1
        self.cosine_s = COSINE_S
        self.cosine_log_alpha_0 = math.log(math.cos(COSINE_S / (1 + COSINE_S) * math.pi / 2))
        if schedule == "linear" and not 0 < continuous_beta_0 < continuous_beta_1 < math.inf:
            raise UsageError(
                "the linear schedule needs 0 < continuous_beta_0 < continuous_beta_1, got "
                f"{shown(continuous_beta_0)} and {shown(continuous_beta_1)}"
            )
        if schedule == "discrete":
            alpha_bar = _chain(betas, alphas_cumprod)
            self.total_N = len(alpha_bar)
            self.t_array = (torch.arange(1, self.total_N + 1, dtype=torch.float64) / self.total_N)[None]
            self.log_alpha_array = 0.5 * alpha_bar.log()[None]

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """Log alpha at times t, of any shape."""
        t = torch.as_tensor(t)
        if self.schedule == "discrete":
            return _along(t, self.t_array, self.log_alpha_array)
        if self.schedule == "linear":  # -1/2 of the integral of beta from 0 to t
            return -0.5 * t * (self.beta_0 + 0.5 * t * (self.beta_1 - self.beta_0))
        angle = (t + COSINE_S) / (1 + COSINE_S) * (math.pi / 2)
        return angle.cos().log() - self.cosine_log_alpha_0

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """Give the share of signal at times t, of any shape."""
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t: Tensor) -> Tensor:
        """Give the share of noise, sigma = sqrt(1 - alpha^2), at times t, of any shape."""
        return _log_sigma(self.marginal_log_mean_coeff(t)).exp()

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """Give log(alpha / sigma) at times t, of any shape."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - _log_sigma(log_alpha)

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """Find the times at which log(alpha / sigma) is lamb, of any shape."""
        lamb = torch.as_tensor(lamb)
        log_alpha = 0.5 * torch.nn.functional.logsigmoid(2 * lamb)
        if self.schedule == "discrete":
            return _along(log_alpha, self.log_alpha_array.flip(1), self.t_array.flip(1))
        if self.schedule == "linear":  # the positive root of a quadratic equation, without cancellation
            slope = self.beta_1 - self.beta_0
            return -4 * log_alpha / (self.beta_0 + (self.beta_0**2 - 4 * slope * log_alpha).sqrt())
        angle = (log_alpha + self.cosine_log_alpha_0).exp().acos()
        return angle * (2 / math.pi) * (1 + COSINE_S) - COSINE_S


def _chain(betas: Any, alphas_cumprod: Any) -> Tensor:
    """The alpha_bar of a chain of levels, (N,) float64, held to what the solver can use."""
    if (betas is None) == (alphas_cumprod is None):
        raise UsageError("the discrete schedule needs either betas or alphas_cumprod, one of the two")
    row = torch.as_tensor(alphas_cumprod if betas is None else betas).detach().cpu().double()
    if row.dim() != 1 or len(row) < 2:
        raise UsageError(
            f"the levels of a discrete schedule should be a row of at least 2, got shape {tuple(row.shape)}"
        )
    alpha_bar = (1 - row).cumprod(0) if alphas_cumprod is None else row
    if not ((alpha_bar[1:] < alpha_bar[:-1]).all() and alpha_bar[0] < 1 and alpha_bar[-1] >= 0):
        raise UsageError(
            "alphas_cumprod should fall from level to level, from below 1 to no less than 0 (and betas lie in "
            f"(0, 1]); got {alpha_bar[0].item():g} to {alpha_bar[-1].item():g}"
        )
    return alpha_bar.clamp(min=LEAST_SIGNAL)


def _log_sigma(log_alpha: Tensor) -> Tensor:
    return 0.5 * (-(2 * log_alpha).expm1()).log()


def _along(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    return interpolate_fn(x.reshape(-1, 1), xp.to(x), yp.to(x)).reshape(x.shape)


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_type: str = "uncond",
    condition: Any = None,
    unconditional_condition: Any = None,
    guidance_scale: float = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: Mapping[str, Any] | None = None,
) -> ModelFn:
    """Make a function (x, t) -> noise of a network, for DPM_Solver.

    The network is called as model(x, t_input, **model_kwargs), or with a condition between as model(x, t_input,
    condition, **model_kwargs). t_input (b,) is the time itself, or for a discrete schedule 1000 (t - 1 / N): the
    level, in thousandths of the chain.

    Args:
        model_type: what the network predicts: "noise", "x_start", "v" or "score".
        guidance_type: "uncond"; "classifier", which adds the gradient of classifier_fn(x, t_input, condition,
            **classifier_kwargs), the log-probabilities (b,), times guidance_scale; or "classifier-free", which
            runs both conditions in one batch, the unconditional one first.
        condition, unconditional_condition: tensors, or dicts or lists of them. Without the second, or at scale 1,
            "classifier-free" takes the conditional answer as it is.

    Raises:
        UsageError: an unknown type, no classifier_fn for "classifier", a scale that is not finite; when called,
            an answer of another shape than x.
    """
    kind = MODEL_TYPES[_choose("model_type", model_type, MODEL_TYPES)]
    _choose("guidance_type", guidance_type, GUIDANCE_TYPES)
    scale = check_value(guidance_scale, float, "guidance_scale")
    if guidance_type == "classifier" and classifier_fn is None:
        raise UsageError("guidance_type 'classifier' needs a classifier_fn(x, t, condition), got None")

    def input_time(t: Tensor) -> Tensor:
        return (t - 1 / noise_schedule.total_N) * 1000 if noise_schedule.schedule == "discrete" else t

    def noise_of(x: Tensor, t: Tensor, given: Any = None) -> Tensor:
        arguments = () if given is None else (given,)
        output = model(x, input_time(t), *arguments, **(model_kwargs or {}))
        if output.shape != x.shape:
            raise UsageError(
                f"the model's answer should have x's shape {tuple(x.shape)}, got {tuple(output.shape)}; where it "
                "also predicts a variance, hand over a function that gives the first half of the channels"
            )
        if kind == "eps":
            return output
        sigma = expand_dims(noise_schedule.marginal_std(t), x.dim())
        if kind == "score":  # of x_t: -eps / sigma
            return (-sigma * output).to(x.dtype)
        alpha_bar = expand_dims(noise_schedule.marginal_alpha(t), x.dim()) ** 2
        return to_eps(kind, output, x, alpha_bar, sigma).to(x.dtype)

    def towards_condition(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier_fn(x, input_time(t), condition, **(classifier_kwargs or {}))
            return torch.autograd.grad(log_p.sum(), x)[0]

    def model_fn(x: Tensor, t_continuous: Tensor) -> Tensor:
        t = torch.as_tensor(t_continuous, device=x.device).reshape(-1).expand(len(x))
        if guidance_type == "uncond":
            return noise_of(x, t)
        if guidance_type == "classifier":
            sigma = expand_dims(noise_schedule.marginal_std(t), x.dim())
            return classifier_eps(noise_of(x, t), scale * towards_condition(x, t), sigma).to(x.dtype)
        if scale == 1 or unconditional_condition is None:
            return noise_of(x, t, condition)
        both = join(unconditional_condition, condition, name="condition")
        uncond, cond = noise_of(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(uncond, cond, scale)

    return model_fn


class DPM_Solver:
    """Solvers of orders 1 to 3 for the probability flow, from noise to sample.

    Multistep steps of the third order take the factor of their derivation, where the published program takes half
    of it and so stays at second order; all else gives its numbers.

    Args:
        model_fn: (x, t) -> noise, as `model_wrapper` makes it; t is (b,).
        noise_schedule: a NoiseScheduleVP, or what has its methods.
        predict_x0: integrate the predicted clean sample (DPM-Solver++) instead of the noise (DPM-Solver).
        thresholding: bound predicted clean samples, each at the 99.5th percentile of its absolute values, but no
            lower than max_val, and divide them by that bound. For pixels in [-1, 1] at high guidance.
        max_val: the lowest bound, above 0.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ):
        self.model = model_fn
        self.noise_schedule = noise_schedule
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.max_val = check_value(max_val, float, "max_val", Range(0, 1e9, above=True))
        if thresholding and not predict_x0:
            logger.warning(
                "thresholding bounds predicted clean samples: without predict_x0=True only denoise_to_zero's is one"
            )

    def noise_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (b, ...) at times t (b,)."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the clean sample of x (b, ...) at times t (b,), bounded if `thresholding`."""
        noise = self.noise_prediction_fn(x, t)
        alpha, sigma = (
            expand_dims(value(t), x.dim())
            for value in (self.noise_schedule.marginal_alpha, self.noise_schedule.marginal_std)
        )
        x0 = to_x0("eps", noise, x, alpha**2, sigma)
        if self.thresholding:
            bound = x0.abs().flatten(1).float().quantile(THRESHOLD_QUANTILE, dim=1).clamp(min=self.max_val)
            bound = expand_dims(bound, x.dim())
            x0 = x0.clamp(-bound, bound) / bound
        return x0.to(x.dtype)

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict what the solver integrates: the clean sample if `predict_x0`, else the noise."""
        return self.data_prediction_fn(x, t) if self.predict_x0 else self.noise_prediction_fn(x, t)

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """Go from times s (b,) to the clean end, by one step of the first order."""
        return self.data_prediction_fn(x, s)

    # --- which times

    def get_time_steps(self, skip_type: str, t_T: float, t_0: float, N: int, device: Any) -> Tensor:
        """Divide the times from t_T to t_0 into N steps.

        Args:
            skip_type: what is divided evenly: "time_uniform" time, "time_quadratic" its square root, "logSNR" the
                log-SNR.

        Returns:
            (N + 1,) on the device, from t_T to t_0.

        Raises:
            UsageError: an unknown skip_type.
        """
        _choose("skip_type", skip_type, CONTINUOUS_METHODS)
        if skip_type == "time_quadratic":
            times = torch.linspace(t_T**0.5, t_0**0.5, N + 1) ** 2
        elif skip_type == "logSNR":
            ends = self.noise_schedule.marginal_lambda(torch.tensor([t_T, t_0], dtype=torch.float64)).tolist()
            times = self.noise_schedule.inverse_lambda(torch.linspace(*ends, N + 1))
        else:
            times = torch.linspace(t_T, t_0, N + 1)
        return times.to(device)

    def get_orders_and_timesteps_for_singlestep_solver(
        self, steps: int, order: int, skip_type: str, t_T: float, t_0: float, device: Any
    ) -> tuple[Tensor, list[int]]:
        """Divide `steps` evaluations into singlestep steps, of `order` as far as they go ("DPM-Solver-fast").

        What is left over is one lower order; where nothing is left over of order 3, the last three evaluations are
        a second-order and a first-order step.

        Returns:
            (times (n + 1,), orders): the ends of the n steps, and the order of each.
        """
        order = _check_order(order)
        whole, rest = divmod(steps, order)
        orders = [order] * whole + [rest] * (rest > 0)
        if order == 3 and rest == 0:
            orders[-1:] = [2, 1]
        if skip_type == "logSNR":
            return self.get_time_steps(skip_type, t_T, t_0, len(orders), device), orders
        times = self.get_time_steps(skip_type, t_T, t_0, steps, device)
        return times[torch.tensor([0, *orders]).cumsum(0).to(device)], orders

    # --- one step

    def dpm_solver_first_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
    ) -> Any:
        """Step from times s to times t, both (b,), by the first order, which is DDIM's.

        Args:
            x: (b, ...) sample at s.
            model_s: `model_fn`'s answer at s, where it is known.
            return_intermediate: also return the answers that were used, as {"model_s": ...}.
        """
        model_s = self.model_fn(x, s) if model_s is None else model_s
        x_t = self._solve(x, [model_s], [self._level(s)], self._level(t))
        return (x_t, {"model_s": model_s}) if return_intermediate else x_t

    def singlestep_dpm_solver_second_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: float | None = 0.5,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Step from s to t by the second order, with one look in between.

        Args:
            r1: where that is, as a share of the step in lambda; None = 1/2.
            solver_type: "dpm_solver" or "taylor", the weight of the difference.

        Others and returns as `dpm_solver_first_update`, with "model_s1" for the look.
        """
        _choose("solver_type", solver_type, SOLVER_TYPES)
        here, there = self._level(s), self._level(t)
        level_1, s1 = self._between(here, there, 0.5 if r1 is None else r1, x)
        model_s = self.model_fn(x, s) if model_s is None else model_s
        model_s1 = self.model_fn(self._solve(x, [model_s], [here], level_1), s1)
        x_t = self._solve(x, [model_s, model_s1], [here, level_1], there, solver_type)
        return (x_t, {"model_s": model_s, "model_s1": model_s1}) if return_intermediate else x_t

    def singlestep_dpm_solver_third_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: float | None = 1 / 3,
        r2: float | None = 2 / 3,
        model_s: Tensor | None = None,
        model_s1: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Step from s to t by the third order, with looks at the shares r1 and r2 of the step in lambda.

        Others and returns as `singlestep_dpm_solver_second_update`, with "model_s1" and "model_s2".
        """
        _choose("solver_type", solver_type, SOLVER_TYPES)
        here, there = self._level(s), self._level(t)
        level_1, s1 = self._between(here, there, 1 / 3 if r1 is None else r1, x)
        level_2, s2 = self._between(here, there, 2 / 3 if r2 is None else r2, x)
        model_s = self.model_fn(x, s) if model_s is None else model_s
        if model_s1 is None:
            model_s1 = self.model_fn(self._solve(x, [model_s], [here], level_1), s1)
        x_s2 = self._solve(x, [model_s, model_s1], [here, level_1], level_2, "taylor")
        model_s2 = self.model_fn(x_s2, s2)
        if solver_type == "taylor":
            answers, levels = [model_s, model_s1, model_s2], [here, level_1, level_2]
        else:  # Eq. 3.8 of DPM-Solver: the look at r1 has done its work in x_s2
            answers, levels = [model_s, model_s2], [here, level_2]
        x_t = self._solve(x, answers, levels, there, "taylor")
        used = {"model_s": model_s, "model_s1": model_s1, "model_s2": model_s2}
        return (x_t, used) if return_intermediate else x_t

    def multistep_dpm_solver_second_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step to times t (b,) by the second order, from the last two answers and their times, oldest first."""
        return self._multistep(x, model_prev_list, t_prev_list, t, 2, solver_type)

    def multistep_dpm_solver_third_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step to times t (b,) by the third order, from the last three answers and their times, oldest first."""
        return self._multistep(x, model_prev_list, t_prev_list, t, 3, solver_type)

    def singlestep_dpm_solver_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        order: int,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
        r1: float | None = None,
        r2: float | None = None,
    ) -> Any:
        """Step from times s to times t by a singlestep solver of this order, 1 to 3."""
        _choose("solver_type", solver_type, SOLVER_TYPES)
        order = _check_order(order)
        if order == 1:
            return self.dpm_solver_first_update(x, s, t, return_intermediate=return_intermediate)
        options: dict[str, Any] = {
            "return_intermediate": return_intermediate,
            "solver_type": solver_type,
            "r1": r1,
        }
        if order == 2:
            return self.singlestep_dpm_solver_second_update(x, s, t, **options)
        return self.singlestep_dpm_solver_third_update(x, s, t, r2=r2, **options)

    def multistep_dpm_solver_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Step to times t by a multistep solver of this order, 1 to 3, from the last answers, oldest first."""
        _choose("solver_type", solver_type, SOLVER_TYPES)
        order = _check_order(order)
        if order == 1:
            return self.dpm_solver_first_update(x, t_prev_list[-1], t, model_s=model_prev_list[-1])
        update = {2: self.multistep_dpm_solver_second_update, 3: self.multistep_dpm_solver_third_update}[
            order
        ]
        return update(x, model_prev_list, t_prev_list, t, solver_type=solver_type)

    def _multistep(
        self,
        x: Tensor,
        answers: Sequence[Tensor],
        times: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str,
    ) -> Tensor:
        _choose("solver_type", solver_type, SOLVER_TYPES)
        if not len(answers) == len(times) >= order:
            raise UsageError(
                f"a multistep step of order {order} needs its last {order} answers and their times, got "
                f"{len(answers)} and {len(times)}"
            )
        newest_first = slice(-1, -order - 1, -1)
        levels = [self._level(time) for time in times[newest_first]]
        return self._solve(x, list(answers[newest_first]), levels, self._level(t), solver_type)

    def _solve(
        self,
        x: Tensor,
        answers: list[Tensor],
        levels: list[Tensor],
        there: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        step = dpm_solver_pp_step if self.predict_x0 else dpm_solver_step
        kind = SOLVER_TYPES[solver_type]
        return step(x, answers, alpha_bars=levels, alpha_bar_next=there, solver_type=kind)

    def _level(self, t: Tensor) -> Tensor:
        """The alpha_bar at times t (b,), float64 on the CPU: (b,), or 0-d where all are one."""
        t = torch.as_tensor(t).detach().cpu().double().reshape(-1)
        alpha_bar = (2 * self.noise_schedule.marginal_log_mean_coeff(t)).exp()
        return alpha_bar[0] if (t == t[0]).all() else alpha_bar

    def _between(self, here: Tensor, there: Tensor, share: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """The level a share of the way in lambda, and its times, (b,) for the model."""
        start, end = here.logit() / 2, there.logit() / 2
        lamb = start + float(share) * (end - start)
        times = self.noise_schedule.inverse_lambda(lamb).reshape(-1).expand(len(x))
        return (2 * lamb).sigmoid(), times.to(x.device, torch.float32)

    # --- all the way

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> Tensor:
        """Carry samples from time t_start to t_end.

        Args:
            x: (b, ...) sample at t_start; unit noise at the schedule's T.
            steps: evaluations of the model.
            t_start, t_end: by default the schedule's T, and 1 / total_N. A chain of levels has no times below the
                latter. With t_end above t_start a sample is carried to noise ("adaptive" cannot).
            order: 1 to 3, the highest that is used.
            skip_type: see `get_time_steps`.
            method: "singlestep", orders mixed so that all evaluations are used; "multistep", which begins with
                lower orders; "singlestep_fixed", steps // order steps; "adaptive", as many as atol and rtol ask
                for (order 2 or 3).
            lower_order_final: end multistep runs of fewer than 15 steps on lower orders.
            denoise_to_zero: one more evaluation, from t_end to the clean end.
            solver_type: "dpm_solver" or "taylor", the weight of differences.

        Returns:
            x at t_end, shaped like x.

        Raises:
            UsageError: an unknown name, or a number out of range.
            NumericError: "adaptive" finds no step that is short enough.
        """
        _choose("method", method, METHODS)
        _choose("skip_type", skip_type, CONTINUOUS_METHODS)
        _choose("solver_type", solver_type, SOLVER_TYPES)
        steps = check_value(steps, int, "steps", Range(1, 1_000_000))
        order = _check_order(order)
        t_T, t_0 = self._check_ends(t_start, t_end)
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol=atol, rtol=rtol, solver_type=solver_type)
        elif method == "multistep":
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)
            x = self._run_multistep(x, times, order, lower_order_final, solver_type)
        else:
            if method == "singlestep":
                ends, orders = self.get_orders_and_timesteps_for_singlestep_solver(
                    steps, order, skip_type, t_T, t_0, x.device
                )
            elif steps < order:
                raise UsageError(
                    f"singlestep_fixed of order {order} needs at least {order} steps, got {steps}"
                )
            else:
                orders = [order] * (steps // order)
                ends = self.get_time_steps(skip_type, t_T, t_0, len(orders), x.device)
            x = self._run_singlestep(x, ends, orders, skip_type, solver_type)
        return (
            self.denoise_to_zero_fn(x, torch.full((len(x),), t_0, device=x.device)) if denoise_to_zero else x
        )

    def _check_ends(self, t_start: float | None, t_end: float | None) -> tuple[float, float]:
        schedule = self.noise_schedule
        least = 1 / schedule.total_N
        # A chain of levels ends at its first; lines drawn on beyond it would leave sigma^2 negative.
        within = Range(least, 1) if schedule.schedule == "discrete" else Range(0, 1, above=True)
        ends = {
            "t_start": schedule.T if t_start is None else t_start,
            "t_end": least if t_end is None else t_end,
        }
        for name, t in ends.items():
            t = t.item() if isinstance(t, Tensor) else t
            if isinstance(t, float) and math.isclose(t, least, rel_tol=1e-6):  # a float32's idea of it
                t = least
            ends[name] = check_value(t, float, name, within)
        if ends["t_start"] == ends["t_end"]:
            raise UsageError(f"t_start and t_end should differ, got {ends['t_start']} for both")
        return ends["t_start"], ends["t_end"]

    def _run_multistep(
        self, x: Tensor, times: Tensor, order: int, lower_order_final: bool, solver_type: str
    ) -> Tensor:
        steps = len(times) - 1
        rows = [time.expand(len(x)) for time in times]
        answers: list[Tensor] = []
        for done in range(steps):
            answers = [*answers, self.model_fn(x, rows[done])][-order:]
            now = min(order, len(answers))
            if lower_order_final and steps < 15:
                now = min(now, steps - done)
            past = rows[done + 1 - len(answers) : done + 1]
            x = self.multistep_dpm_solver_update(
                x, answers, past, rows[done + 1], now, solver_type=solver_type
            )
        return x

    def _run_singlestep(
        self, x: Tensor, ends: Tensor, orders: list[int], skip_type: str, solver_type: str
    ) -> Tensor:
        for i, order in enumerate(orders):
            within = self.get_time_steps(skip_type, ends[i].item(), ends[i + 1].item(), order, "cpu")
            clock = self.noise_schedule.marginal_lambda(within.double())
            shares = ((clock[1:-1] - clock[0]) / (clock[-1] - clock[0])).tolist()
            s, t = ends[i].expand(len(x)), ends[i + 1].expand(len(x))
            x = self.singlestep_dpm_solver_update(
                x, s, t, order, solver_type=solver_type, **dict(zip(("r1", "r2"), shares, strict=False))
            )
        return x

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        order: int,
        t_T: float,
        t_0: float,
        h_init: float = 0.05,
        atol: float = 0.0078,
        rtol: float = 0.05,
        theta: float = 0.9,
        t_err: float = 1e-5,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Carry samples from time t_T down to t_0, in steps as long as two orders agree (DPM-Solver, appendix C).

        Args:
            x: (b, ...) sample at t_T.
            order: of the better solver, 2 or 3; it is compared with the one below.
            h_init: length of the first step, in lambda.
            atol, rtol: by how much the two may differ, as such and as a share of the sample.
            theta: caution, from 0 to 1: the share of the step that the error allows.
            t_err: how near to t_0 is there.

        Raises:
            UsageError: another order, t_0 not below t_T, or a tolerance out of range.
            NumericError: the two do not agree in any step.
        """
        _choose("solver_type", solver_type, SOLVER_TYPES)
        order = _check_order(order)
        if order == 1:
            raise UsageError(
                "the adaptive solver holds two orders against each other; order must be 2 or 3, got 1"
            )
        if not t_0 < t_T:
            raise UsageError(f"the adaptive solver goes down: t_0 should be below t_T, got {t_0} and {t_T}")
        atol = check_value(atol, float, "atol", Range(0, 1e9, above=True))
        rtol = check_value(rtol, float, "rtol", Range(0, 1e9))
        theta = check_value(theta, float, "theta", Range(0, 1, above=True))
        h = check_value(h_init, float, "h_init", Range(0, 1e3, above=True))
        ends = torch.tensor([t_T, t_0], dtype=torch.float64)
        clock, end = self.noise_schedule.marginal_lambda(ends).tolist()
        time, previous, evaluations = t_T, x, 0
        while time - t_0 > t_err:
            if not h > SHORTEST_STEP:
                raise NumericError(
                    f"at time {time:.6g} orders {order - 1} and {order} differ by more than atol {atol:g} and rtol "
                    f"{rtol:g} in any step; loosen them, or look for answers of the model that are not finite"
                )
            h = min(h, end - clock)
            reached = self.noise_schedule.inverse_lambda(
                torch.tensor([clock + h], dtype=torch.float64)
            ).item()
            s, t = (torch.full((len(x),), at, device=x.device) for at in (time, reached))
            lower, used = self.singlestep_dpm_solver_update(
                x, s, t, order - 1, return_intermediate=True, solver_type=solver_type, r1=1 / order
            )
            if order == 2:
                higher = self.singlestep_dpm_solver_second_update(x, s, t, solver_type=solver_type, **used)
            else:
                higher = self.singlestep_dpm_solver_third_update(x, s, t, solver_type=solver_type, **used)
            evaluations += order
            allowed = (rtol * torch.maximum(lower.abs(), previous.abs())).clamp(min=atol)
            error = ((higher - lower) / allowed).flatten(1).square().mean(dim=1).sqrt().max().item()
            if error <= 1:
                x, previous, time, clock = higher, lower, reached, clock + h
            # An error that is not finite leaves no step.
            h = theta * h * max(error, 1e-12) ** (-1 / order) if math.isfinite(error) else 0.0
        logger.info("the adaptive solver took %d evaluations", evaluations)
        return x


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Follow straight lines from point to point, and beyond the outermost two on their line.

    Args:
        x: (n, c) where to look.
        xp, yp: (c, k) the points of each line, xp rising.

    Returns:
        (n, c).
    """
    right = torch.searchsorted(xp.contiguous(), x.T.contiguous()).clamp(1, xp.shape[1] - 1)  # (c, n)
    (x0, x1), (y0, y1) = ((p.gather(1, right - 1), p.gather(1, right)) for p in (xp, yp))
    run = x1 - x0
    slope = torch.where(run == 0, 0.0, (y1 - y0) / run)  # two points of one place: a level without signal
    return (y0 + (x.T - x0) * slope).T


def expand_dims(v: Tensor, dims: int) -> Tensor:
    """Give (b,) axes of length 1 up to `dims` of them, to multiply samples with."""
    return append_dims(v, dims)


def _choose(name: str, value: Any, known: Sequence[str] | Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}; got {shown(value)}")
    return value


def _check_order(order: Any) -> int:
    return check_value(order, int, "order", Range(1, 3))
