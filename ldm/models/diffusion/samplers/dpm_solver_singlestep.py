"""DPM-Solver and DPM-Solver++ in their single-step forms, over the levels of any plan."""

from dataclasses import dataclass, field

from torch import Tensor

from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers.dpm_solver import DPMSolver
from ldm.process.steps import dpm_solver_pp_step, dpm_solver_step


@dataclass
class DPMSolverSinglestep(DPMSolver):
    """DPM-Solver, single step: diffusers' DPMSolverSinglestepScheduler.

    Steps come in groups of `order`. The k-th of a group starts again where the group does, and is of order k. Over
    levels evenly spread in log-SNR that is DPM-Solver-2 and -3 (arXiv:2206.00927, algorithms 1 and 2; order 3 is theirs
    with solver_type "midpoint") and DPM-Solver++(2S) (arXiv:2211.01095).

    Options:
        lower_order_final: the last step of a run is of order 1.
        predict_x0, order, solver_type: as `DPMSolver`.
    """

    name = "dpm_solver_singlestep"
    spacing = "linspace"
    skips_lowest = True
    inverts = False

    begun: Tensor | None = field(default=None, init=False, repr=False)
    done: int = field(default=0, init=False, repr=False)

    def step(self, x: Tensor, here: Level, to: Level) -> tuple[Tensor, Tensor]:
        eps, pred_x0 = self.denoise(x, here.t, here.alpha_bar)
        pred_x0 = self.quantize(pred_x0)
        if to.alpha_bar == here.alpha_bar:
            return x, pred_x0
        if self.done % self.order == 0 or (self.lower_order_final and to.left == 0):
            self.begun, self.past = x, []
        self.done += 1
        self.past = [*self.past, (pred_x0 if self.predict_x0 else eps, here.alpha_bar)]
        if to.alpha_bar == 1:
            return pred_x0, pred_x0
        # The paper's third order goes by the first and the last of its predictions alone.
        paper = len(self.past) == 3 and self.solver_type == "midpoint"
        outputs, alpha_bars = zip(*(self.past[::2] if paper else self.past), strict=True)
        solve = dpm_solver_pp_step if self.predict_x0 else dpm_solver_step
        x_to = solve(
            self.begun,
            outputs,
            alpha_bars=alpha_bars,
            alpha_bar_next=to.alpha_bar,
            solver_type="taylor" if paper else self.solver_type,
        )
        return x_to, pred_x0
