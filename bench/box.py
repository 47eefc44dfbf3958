"""What a step of the model in the box costs at batch 1, where little of the time is arithmetic.

Steps of a guided picture of 128 x 128 (the UNet sees 2 rows), plain and with optimize(), in float32 and bfloat16, on
one thread and on two, all in turn. A step's time is the difference between a longer and a shorter run over the steps
between them, the least of each: what is done once for a picture is beside it.

    python bench/box.py
    python bench/box.py --steps 5 25 --rounds 30 --results /tmp/box.json
    python bench/box.py --before /tmp/box.json          # beside an earlier run's figures, of another version of ldm
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm import cli  # noqa: E402
from ldm.errors import FormatError, UsageError  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "box.json"
DTYPES = ("float32", "bfloat16")
PROMPT = "a large red circle above a small blue square on a white background"


def make_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure a step of the model in the box at batch 1.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", nargs="+", type=cli.integer(1, 1024), default=[1, 2])
    parser.add_argument(
        "--steps",
        nargs=2,
        type=cli.integer(1, 1000),
        default=[5, 25],
        metavar=("FEW", "MANY"),
        help="of the shorter and the longer run",
    )
    parser.add_argument("--rounds", type=cli.integer(1, 10_000), default=15, help="in which all take turns")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    parser.add_argument(
        "--before", type=Path, help="an earlier results file, for a column beside the new one"
    )
    return parser


def measure(
    dtypes: list[str], threads: list[int], steps: tuple[int, int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Run all ways in turn.

    Returns:
        by "dtype, way, threads": step_ms and once_ms (what a picture costs beside its steps) by the least times, and
        step_ms_median by the medians.
    """
    import torch

    import ldm

    models = {}
    for dtype, way in itertools.product(dtypes, ("plain", "optimized")):
        model = ldm.StableDiffusion.default(dtype=getattr(torch, dtype))
        models[dtype, way] = model.optimize() if way == "optimized" else model
    seconds: dict[tuple[str, str, int], tuple[list[float], list[float]]] = {
        (*key, count): ([], []) for count in threads for key in models
    }
    before = torch.get_num_threads()
    try:
        for number in range(rounds + 1):  # the first one warms up
            for (dtype, way, count), both in seconds.items():
                torch.set_num_threads(count)
                for count_steps, found in zip(steps, both, strict=True):
                    began = time.perf_counter()
                    models[dtype, way].txt2img(PROMPT, steps=count_steps, seed=7, output_type="pt")
                    if number:
                        found.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return {
        f"{dtype}, {way}, {count} thread{'s' * (count > 1)}": step_times(*both, steps)
        for (dtype, way, count), both in seconds.items()
    }


def step_times(few: list[float], many: list[float], steps: tuple[int, int]) -> dict[str, float]:
    """Part the seconds of runs into what a step costs and what a picture costs beside them, in milliseconds."""
    from statistics import median

    def step(least: Any) -> float:
        return 1e3 * (least(many) - least(few)) / (steps[1] - steps[0])

    return {
        "step_ms": step(min),
        "step_ms_median": step(median),
        "once_ms": 1e3 * min(few) - steps[0] * step(min),
    }


def make_table(results: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Lay the figures out as Markdown, an earlier run's beside them."""
    lines = [
        f"# A step of the model in the box at batch 1, on {results['machine']}",
        "",
        f"torch {results['torch']}, {results['rounds']} rounds in turn, pictures of 128 x 128, guided. A step in",
        "milliseconds by the least times and by the medians, and what a picture costs beside its steps. Made by",
        "`python bench/box.py`; "
        + f"load average {results['load_average'][0]} to {results['load_average'][1]}.",
        "",
    ]
    head = ["who", *(["step before"] if before else []), "step", "median", "once a picture"]
    head += ["before / now"] if before else []
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, found in results["rows"].items():
        old = (before or {}).get("rows", {}).get(name)
        earlier = [f"{old['step_ms']:.1f}" if old else "-"] if before else []
        ratio = [f"{old['step_ms'] / found['step_ms']:.2f}" if old else "-"] if before else []
        cells = [name, *earlier, f"{found['step_ms']:.1f}", f"{found['step_ms_median']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{found['once_ms']:.0f}", *ratio]) + " |")
    return "\n".join([*lines, ""])


def read_results(path: Path) -> dict[str, Any]:
    """Read an earlier run's figures.

    Raises:
        FormatError: no results of this script.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for found in results["rows"].values():
            found["step_ms"] + 0.0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"'{path}' is no file of bench/box.py's results; give another --before") from None
    return results


def main(argv: list[str] | None = None) -> None:
    opt = make_parser().parse_args(argv)
    few, many = opt.steps
    if few >= many:
        raise UsageError(f"--steps needs the shorter run first, got {few} {many}")
    before = read_results(opt.before) if opt.before else None
    import logging
    import os

    import torch

    from bench.quality import save_results, write
    from bench.speedlib.report import machine_name

    log = logging.getLogger("ldm")
    level = log.level
    log.setLevel(logging.ERROR)  # runs of few steps are for the clock, not to look at
    busy = os.getloadavg()[0]
    try:
        rows = measure(opt.dtypes, opt.threads, (few, many), opt.rounds)
    finally:
        log.setLevel(level)
    results = {
        "machine": machine_name(torch.device("cpu")),
        "torch": torch.__version__,
        "steps": opt.steps,
        "rounds": opt.rounds,
        "load_average": [round(busy, 2), round(os.getloadavg()[0], 2)],
        "made_by": "python bench/box.py",
        "rows": rows,
    }
    save_results(opt.results, results)
    table = make_table(results, before)
    write(opt.results.with_suffix(".md"), table.encode())
    cli.say(table)


if __name__ == "__main__":
    cli.run(main)
