"""Samplers held to a flow whose solution is known: error against steps, its slope, and what a step itself costs.

    python bench/samplers.py

The data are a Gaussian, so that the best network and its flow have a closed form. Every sampler that can do without
fresh noise goes from sigma 10 to 0.1 over levels even in log sigma, where no step is of another kind than the others.
The slope is that of log error against log steps: the order that a sampler has on this problem. What a step costs beside
the network is measured with a network that costs nothing, beside loops of k-diffusion's kind.
"""

import argparse
import functools
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench.quality import save_results, write  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import LdmError  # noqa: E402
from ldm.models.diffusion.samplers import SAMPLERS, alpha_bar_table, sample_steps  # noqa: E402
from ldm.process.schedule import NoiseSchedule  # noqa: E402
from ldm.process.sigmas import sigma_of_t  # noqa: E402

MEAN, SPREAD = 0.8, 0.5
HIGH, LOW = 10.0, 0.1  # sigmas
STEPS = (5, 10, 20, 40, 80, 160)
FLOOR = 3e-6  # of errors: levels are told to the network in float32
# Further rows: a sampler with an option that changes its order.
VARIANTS = (
    ("dpm_solver", {"order": 1}),
    ("dpm_solver", {"order": 3, "solver_type": "taylor"}),
    ("lms", {"order": 1}),
    ("lms", {"order": 2}),
    ("lms", {"order": 3}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
)


class Gaussian:
    """The best network for data ~ N(MEAN, SPREAD^2), as samplers know a model."""

    parameterization = "eps"

    def __init__(self) -> None:
        schedule = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
        self.num_timesteps = schedule.num_steps
        self.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)
        self.sigmas = schedule.sigma
        self.calls = 0

    def apply_model(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        self.calls += 1
        sigma = float(sigma_of_t(float(t[0]), self.sigmas))
        x = x * math.sqrt(1 + sigma**2)
        return sigma / (SPREAD**2 + sigma**2) * (x - MEAN)


def flow(x: Tensor, start: float, end: float) -> Tensor:
    """Carry x, in sigma's units, along the exact flow from sigma `start` to `end`."""
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))


def error_of(name: str, steps: int, options: dict[str, Any]) -> tuple[float, int]:
    """Run a sampler over so many steps: (largest error relative to the solution's spread, calls of the network)."""
    model = Gaussian()
    x = HIGH * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = np.exp(np.linspace(math.log(HIGH), math.log(LOW), steps + 1))
    plan = SAMPLERS[name].plan(alpha_bar_table(model), steps, spacing=sigmas)
    # What a run makes of unit noise differs by a factor.
    unit = SAMPLERS[name].start(torch.ones((), dtype=torch.float64), plan[0])
    x_T = x * float(plan[0].alpha_bar.sqrt()) / float(unit)
    *_, last = sample_steps(name, model, x_T, None, steps=steps, spacing=sigmas, eta=0.0, **options)
    got = last.x_t / plan[-1].alpha_bar.sqrt()
    return float((got - flow(x, HIGH, LOW)).abs().max() / SPREAD), model.calls


def slope_of(errors: list[float]) -> float | None:
    """Give the order from the last two errors above the floor."""
    pairs = list(zip(itertools.pairwise(errors), itertools.pairwise(STEPS), strict=True))
    sound = [(e, s) for e, s in pairs if e[1] > FLOOR and e[0] > e[1]]
    if not sound:
        return None
    (coarse, fine), (few, many) = sound[-1]
    return math.log(coarse / fine) / math.log(many / few)


def converge() -> list[dict[str, Any]]:
    """Measure each sampler that can do without fresh noise."""
    rows = []
    for name, options in [*((name, {}) for name in SAMPLERS), *VARIANTS]:
        if not SAMPLERS[name].accepts_eta(0) or name in ("ddpm", "dpm_adaptive"):
            continue
        try:
            runs = [error_of(name, steps, options) for steps in STEPS]
        except LdmError as error:  # a sampler that is for levels of its own
            rows.append({"sampler": name, "options": options, "refused": str(error)})
            continue
        errors = [error for error, _ in runs]
        rows.append(
            {
                "sampler": name,
                "options": options,
                "errors": errors,
                "calls": [calls for _, calls in runs],
                "order": slope_of(errors),
            }
        )
    return rows


# --- what a step costs ----------------------------------------------------------------------------


class Free:
    """A network that costs nothing: the same answer always."""

    parameterization = "eps"

    def __init__(self, like: Tensor):
        self.alphas_cumprod, self.num_timesteps = Gaussian().alphas_cumprod, 1000
        self.answer = 0.1 * torch.ones_like(like)

    def apply_model(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        return self.answer


def loop_of(method: str, model: Free) -> Callable[[Tensor, Tensor], Tensor]:
    """Write a sampler as k-diffusion does: a loop over a tensor of sigmas around a wrapped network."""
    log_sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt().log().float()

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        log_sigma = sigma.log()
        distances = log_sigma - log_sigmas[:, None]
        low = distances.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=len(log_sigmas) - 2)
        below, above = log_sigmas[low], log_sigmas[low + 1]
        share = ((below - log_sigma) / (below - above)).clamp(0, 1)
        t = (1 - share) * low + share * (low + 1)
        scale = 1 / (sigma**2 + 1) ** 0.5
        return x + model.apply_model(x * scale[:, None, None, None], t, None) * -sigma[:, None, None, None]

    def run(x: Tensor, sigmas: Tensor) -> Tensor:
        ones, old = x.new_ones(len(x)), None
        for here, to in itertools.pairwise(sigmas):
            x_0 = denoised(x, here * ones)
            if method == "dpmpp_2m":
                times = [-here.log(), -to.log()]
                h, guess = times[1] - times[0], x_0
                if old is not None and to > 0:
                    share = h / (2 * (times[0] - old[1]))
                    guess = (1 + share) * x_0 - share * old[0]
                x, old = (to / here) * x - (-h).expm1() * guess, (x_0, times[0])
                continue
            slope = (x - x_0) / here
            x_to = x + slope * (to - here)
            if method == "heun" and to > 0:
                other = (x_to - denoised(x_to, to * ones)) / to
                x_to = x + (slope + other) / 2 * (to - here)
            x = x_to
        return x

    return run


def overheads(repeats: int, steps: int = 50) -> list[dict[str, Any]]:
    """Time a step of (1, 4, 64, 64) latents without a network: ours and a loop of k-diffusion's kind, in turn."""
    x = torch.randn(1, 4, 64, 64)
    model, sigmas = Free(x), np.exp(np.linspace(math.log(HIGH), math.log(LOW), steps + 1))
    rows = []
    for name in ("euler", "heun", "dpmpp_2m", "ddim", "euler_a", "dpmpp_2m_sde"):
        loop, at = loop_of(name, model), torch.from_numpy(sigmas).float()

        def ours(name: str = name) -> None:
            for _ in sample_steps(name, model, x, None, steps=steps, spacing=sigmas):
                pass

        contestants = {"ours": ours}
        if name in ("euler", "heun", "dpmpp_2m"):
            contestants["loop"] = functools.partial(loop, x, at)
        timed: dict[str, list[float]] = {who: [] for who in contestants}
        for _ in range(repeats):
            for who, work in contestants.items():
                start = time.process_time()
                with torch.no_grad():
                    work()
                timed[who].append(1e6 * (time.process_time() - start) / steps)
        rows.append({"sampler": name, **{who: float(np.median(t)) for who, t in timed.items()}})
    return rows


# --- the table and the plot -----------------------------------------------------------------------


def words_of(row: dict[str, Any]) -> str:
    """Name a row: the sampler with its options."""
    return " ".join([row["sampler"], *(f"{k}={v}" for k, v in row["options"].items())])


def make_table(results: dict[str, Any]) -> str:
    """Write both tables as Markdown."""
    lines = [
        f"# Samplers on a flow of known solution\n\nError after S steps from sigma {HIGH:g} to {LOW:g}, in units of "
        "the data's spread, at eta 0, and the order: the slope of its logarithm. The network is given levels in "
        f"float32, so that errors below {FLOOR:g} say no more.\n",
        "| sampler | " + " | ".join(f"S = {s}" for s in STEPS) + f" | calls, S = {STEPS[-1]} | order |",
        "|---|" + "---:|" * (len(STEPS) + 2),
    ]
    for row in results["rows"].values():
        if "refused" in row:
            lines.append(f"| {words_of(row)} | " + " | " * len(STEPS) + f" | {row['refused']} |")
            continue
        errors = " | ".join(f"{error:.1e}" for error in row["errors"])
        order = "" if row["order"] is None else f"{row['order']:.2f}"
        lines.append(f"| {words_of(row)} | {errors} | {row['calls'][-1]} | {order} |")
    lines += [
        "\n## A step without the network\n\nProcessor time in microseconds a step of (1, 4, 64, 64) latents, one "
        "thread, medians, beside a loop of k-diffusion's kind where one is written out.\n",
        "| sampler | ours | loop |",
        "|---|---:|---:|",
    ]
    for row in results["overhead"]:
        loop = f"{row['loop']:.0f}" if "loop" in row else ""
        lines.append(f"| {row['sampler']} | {row['ours']:.0f} | {loop} |")
    return "\n".join(lines) + "\n"


def draw_plot(rows: list[dict[str, Any]]) -> bytes:
    """Draw error against steps, a line a sampler, in panels by order."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sound = [row for row in rows if row.get("order") is not None]
    panels = [
        ("order up to 1.5", [r for r in sound if r["order"] <= 1.5]),
        ("order 1.5 to 2.5", [r for r in sound if 1.5 < r["order"] <= 2.5]),
        ("order above 2.5", [r for r in sound if r["order"] > 2.5]),
    ]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 7.5), sharey=True)
    for axis, (title, members) in zip(axes, panels, strict=True):
        for i, row in enumerate(members):
            axis.loglog(STEPS, row["errors"], "-o" if i < 10 else "--s", markersize=3, label=words_of(row))
        axis.axhline(FLOOR, color="grey", linewidth=0.5)
        axis.set(title=title, xlabel="steps")
        axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error / spread of the data")
    figure.tight_layout()
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=90)
        return file.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Measure, and save the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="of the overhead's timing")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "samplers.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {"torch": torch.__version__, "overhead": overheads(args.repeats)}
    results["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results["rows"] = {words_of(row): row for row in converge()}
    save_results(args.results, results)
    write(args.results.with_suffix(".md"), make_table(results).encode())
    write(args.results.with_suffix(".png"), draw_plot(list(results["rows"].values())))
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
