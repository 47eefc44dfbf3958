"""Error against steps for every sampler, on Gaussian data, whose probability flow is known in closed form.

The flow of each sampler without fresh noise is compared with the exact one, from sigma 1000, where nothing has begun
yet, to 0.1. Samplers with fresh noise are compared by the spread of what they end with: for Gaussian data each step
is affine in the sample and in its noise, so one run of a batch, a unit of one draw in each row, gives it exactly, and
there is nothing to average. Levels are Karras', so that no two steps are of one length. A slope is the order: that of
the last two numbers of steps whose errors are above rounding.

    python bench/order.py              # into bench/results/order.{json,md,png}, in about two minutes
"""

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench.quality import save_results, write  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.models.diffusion.levels import Level, LevelTable, make_plan, run_levels  # noqa: E402
from ldm.models.diffusion.samplers import SAMPLERS  # noqa: E402
from ldm.process.schedule import NoiseSchedule  # noqa: E402
from ldm.process.sigmas import alpha_bar_of_sigma  # noqa: E402
from scripts.image_nll import need_matplotlib  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "order.json"
STEPS = (6, 12, 24, 48, 96, 192, 384)
SIGMA_MAX, SIGMA_MIN = 1000.0, 0.1
SPREADS = (0.3, 0.6, 1.0, 1.5)  # of the data's dimensions
FLOOR = 1e-11  # errors below it are rounding
LATER = (768, 1536, 3072)  # steps after which slopes that differ from the paper's are looked at again

# (sampler, options, order of its paper over uneven steps; None where there is no claim). Without fresh noise.
FLOWS: tuple[tuple[str, dict[str, Any], int | None], ...] = (
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("heunpp2", {}, None),
    ("dpm2", {}, 2),
    ("dpmpp_2s_a", {"eta": 0.0}, 2),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {"order": 4}, 4),
    ("plms", {}, None),
    ("ipndm", {}, None),
    ("ipndm_v", {"order": 2}, 2),
    ("ipndm_v", {}, None),
    ("dpm_solver", {"order": 1, "lower_order_final": False}, 1),
    ("dpm_solver", {"order": 2, "lower_order_final": False}, 2),
    ("dpm_solver", {"order": 3, "lower_order_final": False}, 3),
    ("dpm_solver", {"order": 2, "predict_x0": False, "lower_order_final": False}, 2),
    ("dpm_solver", {"order": 3, "predict_x0": False, "lower_order_final": False}, 3),
    ("dpm_solver_singlestep", {"order": 2, "lower_order_final": False}, 2),
    ("dpm_solver_singlestep", {"order": 3, "lower_order_final": False}, 3),
    ("dpm_solver_singlestep", {"order": 3, "predict_x0": False, "lower_order_final": False}, 3),
    ("dpmpp_2m", {"lower_order_final": False}, 2),
    ("dpmpp_2m_v2", {}, None),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    ("dpm_fast", {}, 3),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
    ("deis", {"order": 3, "clock": "t"}, 3),
    ("unipc", {"order": 1, "lower_order_final": False}, 2),
    ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ("unipc", {"order": 2, "solver_type": "bh1", "lower_order_final": False}, 3),
    ("unipc", {"order": 2, "corrector": False, "lower_order_final": False}, 2),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("sa_solver", {"eta": 0.0, "final_orders": "none"}, 2),
    ("sa_solver", {"eta": 0.0, "order": 3, "corrector_order": 3, "final_orders": "none"}, 3),
    ("er_sde", {"eta": 0.0}, None),
    ("res_multistep", {}, 2),
    ("res_2s", {}, 2),
    ("gradient_estimation", {}, None),
    ("tcd", {"gamma": 0.0}, 1),
)
# The same with fresh noise, by the spread they end with.
NOISY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("euler_a", {}),
    ("dpm2_a", {}),
    ("dpmpp_2s_a", {}),
    ("dpmpp_sde", {"brownian": False}),
    ("dpmpp_2m_sde", {"brownian": False}),
    ("dpmpp_3m_sde", {"brownian": False}),
    ("sa_solver", {"s_tmin": 0.0, "s_tmax": math.inf, "final_orders": "none"}),
    ("er_sde", {}),
    ("res_multistep_a", {}),
    ("res_2s", {"eta": 1.0}),
)

# Rows whose slope is not their paper's: what finer steps and changed formulas tell of it.
REASONS: dict[str, str] = {
    "dpm_solver order=3": "The claim holds: the slope falls to 3, and what is seen before is a higher term.",
    "dpmpp_3m_sde eta=0.0": (
        "The name's claim fails: k-diffusion's weights, which its recorded steps hold these to, take half of the "
        "second difference; with the whole one the errors are those of `dpm_solver order=3`."
    ),
    "sa_solver eta=0.0": "The claim holds: the slope falls to 2; the simple weight's error is a higher term.",
    "sa_solver eta=0.0 order=3 corrector_order=3": (
        "The claim holds: the slope falls towards 3, which it has between sigma 20 and 0.5 from 96 steps on."
    ),
    "er_sde eta=0.0": (
        "Falls to 1: the integrals are sums of 200 points, as its authors and ComfyUI have them, and keep a "
        "two-hundredth of a first-order error; of 20,000 points the slope is 2."
    ),
    "ipndm_v": "Rises to 2 on this flow, as `ipndm`; its weights of order 4 do not add up to an uneven step.",
}


class Gaussian:
    """The best denoiser of data ~ N(0, spread^2), and the flow it has."""

    def __init__(self) -> None:
        self.variance = torch.tensor(SPREADS, dtype=torch.float64) ** 2
        self.calls = 0
        schedule = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
        self.levels = LevelTable(schedule.alpha_bar)

    def at_sigma(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.variance / (self.variance + sigma**2) * x

    def __call__(self, x: Tensor, t: float, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        x = x / alpha_bar.sqrt()
        x0 = self.at_sigma(x, sigma)
        return (x - x0) / sigma, x0

    def flow(self, x: Tensor, sigma: float, sigma_to: float) -> Tensor:
        return x * ((self.variance + sigma_to**2) / (self.variance + sigma**2)).sqrt()


def karras_plan(steps: int) -> list[Level]:
    """Make a plan over Karras' sigmas that ends above 0, so that the last step is like the others."""
    sigmas = np.linspace(SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7), steps + 1) ** 7
    bars = alpha_bar_of_sigma(sigmas[::-1].copy())
    return make_plan(np.arange(steps, dtype=np.float64), bars[1:], float(bars[0]))


def run(name: str, options: dict[str, Any], steps: int, x: Tensor, noise: Any) -> tuple[Tensor, int]:
    """Take x, in sigma's units at SIGMA_MAX, to SIGMA_MIN: (x there, calls of the network)."""
    model, plan = Gaussian(), karras_plan(steps)
    sampler = SAMPLERS[name](model, noise, **options)
    sampler.levels = plan
    *_, last = run_levels(plan, x * plan[0].alpha_bar.sqrt(), sampler.step)
    return last.x_t / plan[-1].alpha_bar.sqrt(), model.calls


def flow_error(name: str, options: dict[str, Any], steps: int) -> tuple[float, int]:
    """Measure how far a sampler ends from the exact flow, relative to it: (largest error, calls)."""
    x = SIGMA_MAX * torch.ones(1, len(SPREADS), dtype=torch.float64)
    end, calls = run(name, options, steps, x, torch.zeros_like)
    exact = Gaussian().flow(x, SIGMA_MAX, SIGMA_MIN)
    return float((end / exact - 1).abs().max()), calls


def spread_error(name: str, options: dict[str, Any], steps: int) -> tuple[float, int]:
    """Measure how far the spread at the end is from the data's and the noise's there: (largest error, calls)."""
    rows = 4 * steps + 1  # the start and every draw have a row of their own
    model = Gaussian()
    x = torch.zeros(rows, len(SPREADS), dtype=torch.float64)
    x[0] = (model.variance + SIGMA_MAX**2).sqrt()

    def draws() -> Iterator[Tensor]:
        for row in range(1, rows):
            unit = torch.zeros_like(x)
            unit[row] = 1
            yield unit

    coming = draws()
    end, calls = run(name, options, steps, x, lambda like: next(coming))
    exact = (model.variance + SIGMA_MIN**2).sqrt()
    return float((end.square().sum(0).sqrt() / exact - 1).abs().max()), calls


def slope(steps: list[int], errors: list[float]) -> float:
    """Read the order off the last two errors that are above rounding."""
    seen = [(n, e) for n, e in zip(steps, errors, strict=True) if e > FLOOR]
    if len(seen) < 2:
        return math.nan
    (n, error), (more, less) = seen[-2:]
    return math.log(error / less) / math.log(more / n)


def label(name: str, options: dict[str, Any]) -> str:
    words = [
        f"{key}={value}" for key, value in options.items() if key not in ("lower_order_final", "final_orders")
    ]
    return f"{name} {' '.join(words)}".strip()


def measure_all() -> dict[str, Any]:
    """Measure every row."""
    rows: dict[str, Any] = {}
    for kind, table, measure in (("flow", FLOWS, flow_error), ("spread", NOISY, spread_error)):
        for name, options, *claim in table:
            found = [measure(name, options, steps) for steps in STEPS]
            errors, calls = [error for error, _ in found], [calls for _, calls in found]
            rows[f"{kind}/{label(name, options)}"] = {
                "steps": list(STEPS),
                "calls": calls,
                "errors": [float(f"{error:.4g}") for error in errors],
                "slope": round(slope(list(STEPS), errors), 2),
                "claim": claim[0] if claim else None,
            }
            if kind == "flow" and label(name, options) in REASONS:
                later = [measure(name, options, more)[0] for more in LATER]
                both = [*STEPS[-2:], *LATER], [*errors[-2:], *later]
                rows[f"{kind}/{label(name, options)}"]["later"] = [
                    round(slope(list(both[0][i : i + 2]), both[1][i : i + 2]), 2)
                    for i in range(len(LATER) + 1)
                ]
    return {"spreads": SPREADS, "sigmas": [SIGMA_MAX, SIGMA_MIN], "rows": rows}


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown."""
    few, many = STEPS[1], STEPS[-3]
    lines = ["# Order of convergence", ""]
    lines += [
        "Largest relative error at the end of a run on Gaussian data, Karras' levels from sigma "
        f"{SIGMA_MAX:g} to {SIGMA_MIN:g}.",
        f"A slope is that from {STEPS[-2]} to {STEPS[-1]} steps. Made by `python bench/order.py`.",
        "",
    ]
    titles = {"flow": "Without fresh noise: the sample", "spread": "With fresh noise: the spread"}
    for kind, title in titles.items():
        head = f"| sampler | slope | its paper's | {few} steps | {many} steps | calls for {few} |"
        lines += [f"### {title}", "", head]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for key, row in results["rows"].items():
            if key.startswith(f"{kind}/"):
                at = dict(zip(row["steps"], row["errors"], strict=True))
                calls = row["calls"][1]
                lines.append(
                    f"| `{key.removeprefix(kind + '/')}` | {row['slope']:.2f} | {row['claim'] or ''} | {at[few]:.1e} | "
                    f"{at[many]:.1e} | {calls} |"
                )
        lines.append("")
    finer = [*STEPS[-1:], *LATER]
    lines += ["### Slopes that are not the paper's, over finer steps", ""]
    lines += [
        f"| sampler | {' | '.join(f'to {steps}' for steps in finer)} | |",
        "|---|" + "---:|" * len(finer) + "---|",
    ]
    for key, row in results["rows"].items():
        if "later" in row:
            name = key.removeprefix("flow/")
            slopes = " | ".join(f"{one:.2f}" for one in row["later"])
            lines.append(f"| `{name}` | {slopes} | {REASONS[name]} |")
    lines.append("")
    return "\n".join(lines)


def draw_plot(results: dict[str, Any]) -> bytes:
    """Plot error against calls of the network, a panel for each order, as a PNG."""
    need_matplotlib()
    from matplotlib.figure import Figure

    rows = results["rows"].items()
    panels = [
        (
            f"order {order}",
            [(key, row) for key, row in rows if key.startswith("flow/") and row["claim"] == order],
        )
        for order in (1, 2, 3, 4)
    ]
    panels.append(
        ("no order is claimed", [(k, r) for k, r in rows if k.startswith("flow/") and r["claim"] is None])
    )
    panels.append(("spread, with fresh noise", [(k, r) for k, r in rows if k.startswith("spread/")]))
    figure = Figure(figsize=(15, 10), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(2, 3, sharey=True).flat, panels, strict=True):
        for number, (key, row) in enumerate(lines):
            style = ("-", "--", ":")[number // 10]
            name = key.split("/", 1)[1]
            axes.loglog(row["calls"], row["errors"], style, marker=".", label=f"{name}: {row['slope']:.2f}")
        axes.set(title=title, xlabel="calls of the network", ylabel="relative error", ylim=(1e-9, 10))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Measure, lay out, save."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md and .png go beside it")
    args = parser.parse_args(argv)
    results = measure_all()
    plot = draw_plot(results)
    save_results(args.results, results)
    write(args.results.with_suffix(".md"), make_table(results).encode())
    write(args.results.with_suffix(".png"), plot)
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
