"""What a sampler's step costs beside the network, and beside a loop of k-diffusion's kind.

    python bench/step_cost.py          # into bench/results/step_cost.{json,md}

Timed with a network that costs nothing. Of which order the samplers are is measured in bench/order.py.
"""

import functools
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
from ldm.models.diffusion.samplers import sample_steps  # noqa: E402
from ldm.process.schedule import NoiseSchedule  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
HIGH, LOW = 10.0, 0.1  # sigmas
SAMPLERS = ("euler", "heun", "dpmpp_2m", "ddim", "euler_a", "dpmpp_2m_sde")
WITH_LOOP = ("euler", "heun", "dpmpp_2m")


class Free:
    """A network that costs nothing: the same answer always."""

    parameterization = "eps"

    def __init__(self, like: Tensor):
        schedule = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
        self.num_timesteps = schedule.num_steps
        self.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)
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


def measure_all(repeats: int, steps: int = 50) -> dict[str, dict[str, float]]:
    """Time a step of (1, 4, 64, 64) latents without a network: ours and a loop of k-diffusion's kind, in turn."""
    x = torch.randn(1, 4, 64, 64)
    model, sigmas = Free(x), np.exp(np.linspace(math.log(HIGH), math.log(LOW), steps + 1))
    rows = {}
    for name in SAMPLERS:
        loop, at = loop_of(name, model), torch.from_numpy(sigmas).float()

        def ours(name: str = name) -> None:
            for _ in sample_steps(name, model, x, None, steps=steps, spacing=sigmas):
                pass

        contestants = {"ours": ours}
        if name in WITH_LOOP:
            contestants["loop"] = functools.partial(loop, x, at)
        timed: dict[str, list[float]] = {who: [] for who in contestants}
        for _ in range(repeats):
            for who, work in contestants.items():
                start = time.process_time()
                with torch.no_grad():
                    work()
                timed[who].append(1e6 * (time.process_time() - start) / steps)
        rows[name] = {who: float(np.median(t)) for who, t in timed.items()}
    return rows


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown."""
    lines = [
        "# A step without the network\n\nProcessor time in microseconds a step of (1, 4, 64, 64) latents, one thread, "
        "medians, beside a loop of k-diffusion's kind where one is written out.\n",
        "| sampler | ours | loop |",
        "|---|---:|---:|",
    ]
    for name, row in results["rows"].items():
        loop = f"{row['loop']:.0f}" if "loop" in row else ""
        lines.append(f"| {name} | {row['ours']:.0f} | {loop} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, lay out, save."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=15, help="runs of 50 steps, of which the median is taken"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure_all(args.repeats)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results = {"torch": torch.__version__, "load": load, "rows": rows}
    save_results(args.results, results)
    write(args.results.with_suffix(".md"), make_table(results).encode())
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
