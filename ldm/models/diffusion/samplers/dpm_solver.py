"""DPM-Solver and DPM-Solver++ in their multistep forms: CompVis's --dpm_solver, and "DPM++ 2M"."""

from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.base import Sampler
from ldm.process.scalars import Scalar, scalar
from ldm.process.steps import SOLVER_TYPES, dpm_solver_pp_step, dpm_solver_step


@dataclass
class DPMSolver(Sampler):
    """DPM-Solver, multistep, between levels: CompVis's --dpm_solver.

    Its own levels divide the whole range, so the network gets fractional levels: 999, 949.05, ... for 20 steps. The
    step to a clean end is first order, for log-SNR is infinite there.

    Options:
        predict_x0: extrapolate the clean sample (DPM-Solver++, arXiv:2211.01095; CompVis's choice) or the
            noise (DPM-Solver, arXiv:2206.00927).
        order: 1 to 3.
        lower_order_final: end a run of fewer than 15 steps on lower orders.
        solver_type: "midpoint" or "taylor", see ldm.process.steps.
    """

    name = "dpm_solver"
    spacing = "time_uniform"
    needs_signal = True
    inverts = True

    _: KW_ONLY
    predict_x0: bool = True
    order: int = 2
    lower_order_final: bool = True
    solver_type: str = "midpoint"
    past: list[tuple[Tensor, Scalar]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise UsageError(f"order must be 1, 2 or 3, got {shown(self.order)}")
        if self.solver_type not in SOLVER_TYPES:
            raise UsageError(
                f"solver_type must be one of {', '.join(SOLVER_TYPES)}; got {shown(self.solver_type)}"
            )

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        alpha_bar, alpha_bar_to = scalar(here.alpha_bar), scalar(to.alpha_bar)
        if alpha_bar == 1:
            return self.rise(x, here, to)
        eps, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        if alpha_bar == alpha_bar_to:
            return x, pred_x0
        pred_x0 = self.quantize(pred_x0)
        self.past = [(pred_x0 if self.predict_x0 else eps, alpha_bar), *self.past][: self.order]
        outputs, alpha_bars = zip(*self.past[: self.order_at(here)], strict=True)
        if alpha_bar_to == 1:  # the one step that both solvers take alike
            return pred_x0, pred_x0
        solve = dpm_solver_pp_step if self.predict_x0 else dpm_solver_step
        x_prev = solve(
            x,
            outputs,
            alpha_bars=alpha_bars,
            alpha_bar_next=alpha_bar_to,
            solver_type=self.solver_type,
        )
        return x_prev, pred_x0

    def order_at(self, here: Level) -> int:
        # A way up begins at 0 left.
        lower = self.lower_order_final and here.total < 15
        return min(self.order, max(1, here.left)) if lower else self.order


@dataclass
class DPMSolverPP2M(DPMSolver):
    """DPM-Solver++(2M) over whole levels down to the clean end: "DPM++ 2M" elsewhere.

    The numbers of diffusers' DPMSolverMultistepScheduler as it comes: order 2, levels linspaced from the top,
    the last step first order to noise 0. Options as `DPMSolver`, less predict_x0.
    """

    name = "dpmpp_2m"
    spacing = "linspace"
    skips_lowest = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predict_x0:
            raise UsageError("dpmpp_2m extrapolates the clean sample; for predict_x0=False take dpm_solver")
