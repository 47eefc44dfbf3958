"""What each lossy knob costs: how often the pictures keep their captions' promise, how far they are from the full ones.

The prompts, the pictures' reader and the Frechet distance are those of quality.py (DDIM of 20 steps); beside them stand
the decibels between a setting's latents and the full computation's from the same noise. What each saves is counted in
docs/knobs.md. Each finished setting is saved at once; a second run does what is missing.

    python bench/knobs.py                           # into bench/results/knobs.{json,md}
    python bench/knobs.py --optimize --prompts 100 --results /tmp/k.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "knobs.json"
STEPS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "guidance in (0.1, 0.9)": {"guidance_interval": [0.1, 0.9]},
    "guidance in (0.2, 0.8)": {"guidance_interval": [0.2, 0.8]},
    "deep features every 2nd step": {"cache_interval": 2},
    "deep features every 3rd step": {"cache_interval": 3},
    "deep features every 2nd step, depth 3": {"cache_interval": 2, "cache_depth": 3},
    "a quarter of the tokens merged": {"merge_ratio": 0.25},
    "half of the tokens merged": {"merge_ratio": 0.5},
    "all three": {"guidance_interval": [0.1, 0.9], "cache_interval": 2, "merge_ratio": 0.25},
}


def nearness(latents: np.ndarray, full: np.ndarray) -> float:
    """Decibels of the full latents' spread over the root mean square of the differences; inf where there are none."""
    error = float(np.mean((latents - full) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(np.var(full) / error))


def measure(bench: quality.Bench, guidance: float, full: dict[str, np.ndarray]) -> dict[str, Any]:
    """Paint and judge both splits with the bench's knobs.

    Args:
        full: the full computation's latents (n, c, h, w) by split, to be filled if it is empty.
    """
    found: dict[str, Any] = {}
    painted: dict[str, np.ndarray] = {}
    for split in quality.SPLITS:
        kept: list[np.ndarray] = []
        row = bench.measure(quality.Row("ddim-0", STEPS, guidance, split), kept)
        painted[split] = np.concatenate(kept)
        found[split] = {name: row[name] for name in ("prompts", "right", "frechet", "failing")}
        found["machine"] = row["machine"]
    if not full:
        full.update(painted)
    decibels = [nearness(painted[split], full[split]) for split in quality.SPLITS]
    found["decibels"] = None if np.isinf(decibels).all() else round(float(np.mean(decibels)), 2)
    return found


def make_table(results: dict[str, Any]) -> str:
    """Lay the settings out as Markdown."""
    rows, n = results["rows"], results["prompts"]
    lines = [
        "# What each lossy knob costs",
        "",
        f"{results['model']}, DDIM, {STEPS} steps, guidance {results['guidance']:g}, {n} prompts of each split, "
        f"weights {results['weights'][:10]}{', optimized' if results['optimized'] else ''}. Right: prompts whose every "
        "attribute holds. Decibels: how near the latents are to the full ones. Made by `python bench/knobs.py` on "
        f"{rows['full']['machine']}.",
        "",
        "| knobs | right, seen | right, never-seen | Frechet, seen | never-seen | decibels |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        parts = [row[split] for split in quality.SPLITS]
        right = (f"{100 * part['right'] / part['prompts']:.1f} %" for part in parts)
        distance = (f"{part['frechet']:.3f}" for part in parts)
        near = "-" if row["decibels"] is None else f"{row['decibels']:.1f}"
        cells = (name, *right, *distance, near)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> Any:
    parser = cli.Parser(description="Measure what the lossy knobs cost.")
    parser.add_argument("--ckpt", help="model file; without it, the model in the box")
    parser.add_argument("--config", help="CompVis YAML file for --ckpt")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--optimize", action="store_true", help="by ldm.kernels; same numbers up to rounding")
    parser.add_argument("--prompts", type=cli.integer(2, 100_000), default=500, help="prompts of each split")
    parser.add_argument("--batch", type=cli.integer(1, 10_000), default=50, help="pictures painted at once")
    parser.add_argument("--guidance", type=cli.number(0, 100), help="of all settings (default: the model's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever --results holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    pipeline = quality.load_pipeline(opt.ckpt, opt.config, opt.device)
    if opt.optimize:
        pipeline.optimize()
    guidance = pipeline.defaults.guidance_scale if opt.guidance is None else opt.guidance
    head = {
        "model": pipeline.name,
        "weights": quality.weights_hash(pipeline.file),
        "prompts": opt.prompts,
        "guidance": guidance,
        "optimized": opt.optimize,
    }
    results = {**head, "rows": {}} if opt.fresh else quality.load_results(opt.results, head)
    bench, full = quality.Bench(pipeline, opt.prompts, opt.batch), {}
    todo = [name for name in SETTINGS if name not in results["rows"]]
    if todo and "full" not in todo:
        todo.insert(0, "full")  # its latents are what the others are held to
    for number, name in enumerate(todo, 1):
        bench.knobs = SETTINGS[name]
        results["rows"][name] = measure(bench, guidance, full)
        quality.save_results(opt.results, results)
        cli.say(f"[{number}/{len(todo)}] {name}: {json.dumps(results['rows'][name])}")
    table = make_table(results)
    quality.write(opt.results.with_suffix(".md"), table.encode())
    cli.say(table)


if __name__ == "__main__":
    cli.run(main)
