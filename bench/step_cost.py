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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench.quality import save_results, write  # noqa: E402
from bench.speedlib.report import machine_name  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps  # noqa: E402
from ldm.process.brownian import TorchsdePaths  # noqa: E402
from ldm.process.schedule import NoiseSchedule  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
HIGH, LOW = 10.0, 0.1  # sigmas
WITHOUT_LOOP = ("ddim",)


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


# Samplers as k-diffusion writes them: each a loop over 0-d sigmas, around a wrapped network.
Ask = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def ancestral(here: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    up = min(to, (to**2 * (here**2 - to**2) / here**2) ** 0.5)
    return (to**2 - up**2) ** 0.5, up


def euler(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        x = x + (x - ask(x, here)) / here * (to - here)
    return x


def euler_a(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        down, up = ancestral(here, to)
        x = x + (x - ask(x, here)) / here * (down - here)
        x = x + draw(x, here, to) * up if to > 0 else x
    return x


def heun(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        slope = (x - ask(x, here)) / here
        x_to = x + slope * (to - here)
        if to > 0:
            x_to = x + (slope + (x_to - ask(x_to, to)) / to) / 2 * (to - here)
        x = x_to
    return x


def dpm2(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw, noisy: bool = False) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        slope = (x - ask(x, here)) / here
        down, up = ancestral(here, to) if noisy else (to, None)
        if down == 0:
            x = x + slope * (down - here)
        else:
            middle = here.log().lerp(down.log(), 0.5).exp()
            x_mid = x + slope * (middle - here)
            x = x + (x_mid - ask(x_mid, middle)) / middle * (down - here)
            x = x + draw(x, here, to) * up if noisy else x
    return x


def lms(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    from scipy.integrate import quad

    slopes: list[Tensor] = []
    for i, here in enumerate(sigmas[:-1]):
        slopes = [(x - ask(x, here)) / here, *slopes][:4]
        before = sigmas[i + 1 - len(slopes) : i + 1].flip(0).numpy()

        def basis(at: float, j: int, before: np.ndarray = before) -> float:
            return math.prod((at - b) / (before[j] - b) for k, b in enumerate(before) if k != j)

        ends = float(here), float(sigmas[i + 1])
        weights = [quad(basis, *ends, args=(j,), epsrel=1e-4)[0] for j in range(len(slopes))]
        x = x + sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    return x


def dpmpp_2s_a(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        x_0 = ask(x, here)
        down, up = ancestral(here, to)
        if down == 0:
            x = x + (x - x_0) / here * (down - here)
        else:
            t = -here.log()
            h = -down.log() - t
            middle = (-(t + 0.5 * h)).exp()
            x_mid = (middle / here) * x - (-h * 0.5).expm1() * x_0
            x = (down / here) * x - (-h).expm1() * ask(x_mid, middle)
        x = x + draw(x, here, to) * up if to > 0 else x
    return x


def dpmpp_sde(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    for here, to in itertools.pairwise(sigmas):
        x_0 = ask(x, here)
        if to == 0:
            x = x + (x - x_0) / here * (to - here)
            continue
        t, h = -here.log(), -to.log() + here.log()
        middle = (-(t + 0.5 * h)).exp()
        down, up = ancestral(here, middle)
        x_mid = (down / here) * x - (t + down.log()).expm1() * x_0 + draw(x, here, middle) * up
        down, up = ancestral(here, to)
        x = (down / here) * x - (t + down.log()).expm1() * ask(x_mid, middle) + draw(x, here, to) * up
    return x


def dpmpp_2m(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    old = None
    for here, to in itertools.pairwise(sigmas):
        x_0, t = ask(x, here), -here.log()
        h, guess = -to.log() - t, x_0
        if old is not None and to > 0:
            share = h / (2 * (t - old[1]))
            guess = (1 + share) * x_0 - share * old[0]
        x, old = (to / here) * x - (-h).expm1() * guess, (x_0, t)
    return x


def dpmpp_2m_sde(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    old = None
    for here, to in itertools.pairwise(sigmas):
        x_0 = ask(x, here)
        if to == 0:
            return x_0
        h = -to.log() + here.log()
        x = to / here * (-h).exp() * x - (-2 * h).expm1() * x_0
        if old is not None:
            x = x - 0.5 * (-2 * h).expm1() * (h / old[1]) * (x_0 - old[0])
        x = x + draw(x, here, to) * to * (-2 * h).expm1().neg().sqrt()
        old = x_0, h
    return x


def dpmpp_3m_sde(ask: Ask, x: Tensor, sigmas: Tensor, draw: Draw) -> Tensor:
    past: list[tuple[Tensor, Tensor]] = []
    for here, to in itertools.pairwise(sigmas):
        x_0 = ask(x, here)
        if to == 0:
            return x_0
        h = -to.log() + here.log()
        h_eta = 2 * h
        x = (-h_eta).exp() * x - (-h_eta).expm1() * x_0
        if past:
            phi_2, r_0 = (-h_eta).expm1() / h_eta + 1, past[0][1] / h
            first = (x_0 - past[0][0]) / r_0
            if len(past) == 1:
                x = x + phi_2 * first
            else:
                r_1 = past[1][1] / h
                older = (past[0][0] - past[1][0]) / r_1
                x = x + phi_2 * (first + (first - older) * r_0 / (r_0 + r_1))
                x = x - (phi_2 / h_eta - 0.5) * ((first - older) / (r_0 + r_1))
        x = x + draw(x, here, to) * to * (-2 * h).expm1().neg().sqrt()
        past = [(x_0, h), *past][:2]
    return x


LOOPS: dict[str, Callable[..., Tensor]] = {
    loop.__name__: loop
    for loop in (euler, euler_a, heun, dpm2, lms, dpmpp_2s_a, dpmpp_sde, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde)
} | {"dpm2_a": functools.partial(dpm2, noisy=True)}


def loop_of(method: str, model: Free, draw: Draw | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Give a loop of k-diffusion's kind around a model, from a sample in sigma's units and sigmas to where it ends.

    Args:
        draw: makes unit noise like x for the step between two sigmas; None = `torch.randn_like`.
    """
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
        ones = x.new_ones(len(x))
        noise = (lambda x, here, to: torch.randn_like(x)) if draw is None else draw
        return LOOPS[method](lambda x, sigma: denoised(x, sigma * ones), x, sigmas, noise)

    return run


def measure_all(repeats: int, steps: int = 50) -> dict[str, dict[str, Any]]:
    """Time a step of (1, 4, 64, 64) latents without a network: ours and a loop of k-diffusion's kind, in turn.

    Both draw the noise of each step afresh; in rows of "paths" ours take it from Brownian paths, and the loop from
    torchsde's, where that is installed.
    """
    x = torch.randn(1, 4, 64, 64)
    model, sigmas = Free(x), np.exp(np.linspace(math.log(HIGH), math.log(LOW), steps + 1))
    at, rows = torch.from_numpy(sigmas).float(), {}
    cases = [(name, name, hasattr(SAMPLERS[name], "brownian")) for name in (*LOOPS, *WITHOUT_LOOP)]
    cases += [(f"{name}, paths", name, False) for name in LOOPS if hasattr(SAMPLERS[name], "brownian")]
    for label, name, afresh in cases:
        options = {"brownian": False} if afresh else {}

        def ours(name: str = name, options: dict[str, Any] = options) -> None:
            for _ in sample_steps(name, model, x, None, steps=steps, spacing=sigmas, **options):
                pass

        contestants = {"ours": ours}
        if label in LOOPS:
            contestants["loop"] = functools.partial(loop_of(name, model), x, at)
        elif name in LOOPS and find_spec("torchsde"):

            def loop(name: str = name) -> None:
                paths = TorchsdePaths([0], x.shape[1:], float(at[-1]), float(at[0]))
                draw = lambda x, here, to: paths.between(float(here), float(to))  # noqa: E731
                loop_of(name, model, draw)(x, at)

            contestants["loop"] = loop
        timed: dict[str, list[float]] = {who: [] for who in contestants}
        for _ in range(repeats):
            for who, work in contestants.items():
                start = time.process_time()
                with torch.no_grad():
                    work()
                timed[who].append(1e6 * (time.process_time() - start) / steps)
        rows[label] = {who: float(np.median(t)) for who, t in timed.items()}
        if "loop" in timed:
            shares = np.divide(timed["ours"], timed["loop"])
            rows[label]["share"] = [float(np.quantile(shares, q)) for q in (0.25, 0.5, 0.75)]
    return rows


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown."""
    lines = [
        "# A step without the network\n\nProcessor time in microseconds a step of (1, 4, 64, 64) latents, one thread, "
        "beside a loop of k-diffusion's kind where one is written out: medians of runs in turn. The share is of ours "
        f"in the loop's, run by run: median and quartiles.\n\n{results['machine']}, torch {results['torch']}.\n",
        "| sampler | ours | loop | share |",
        "|---|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        loop, share = "", ""
        if "loop" in row:
            low, middle, high = row["share"]
            loop, share = f"{row['loop']:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {row['ours']:.0f} | {loop} | {share} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, lay out, save."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=21, help="runs of 50 steps, of which the median is taken"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure_all(args.repeats)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = machine_name(torch.device("cpu"))
    results = {"machine": machine, "torch": torch.__version__, "load": load, "rows": rows}
    save_results(args.results, results)
    write(args.results.with_suffix(".md"), make_table(results).encode())
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
