"""How well pictures come back by each inversion, and what it costs: a table over methods and guidance.

Unseen renders are inverted under their own captions and sampled back by the same context; what the first stage alone
does to them is the ceiling. Each batch is saved at once; a second run does what is missing.

    python bench/reconstruction.py                          # into bench/results/reconstruction.{json,md}
    python bench/reconstruction.py --rows 'belm/*' --pictures 10 --results /tmp/r.json
"""

import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import UsageError  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "reconstruction.json"
STEPS = 50
GUIDANCE = (1.0, 3.0, 7.5)
# Quick ones first.
METHODS = (
    "ddim",
    "belm",
    "bdia",
    "edit_friendly",
    "negative_prompt",
    "dpmpp_2m",
    "edict",
    "proximal",
    "fixed_point",
    "anderson",
    "null_text",
)
CEILING = "first stage"
SEED, SPLIT = 2, "test"  # scenes of pairs that the model has never seen, and that no other bench takes


def all_rows() -> list[str]:
    """List the rows' keys: the ceiling, then each method at each guidance."""
    return [CEILING, *(f"{name}/g{scale:g}" for name in METHODS for scale in GUIDANCE)]


class Bench:
    """The model under test, and the pictures with their captions."""

    def __init__(self, pipeline: Any, pictures: int, batch: int, steps: int):
        from ldm.models.introspect import native_size
        from ldm.shapes.scenes import evaluation_scenes, render

        self.pipeline, self.batch, self.steps = pipeline, batch, steps
        self.scenes = evaluation_scenes(pictures, seed=SEED, split=SPLIT)
        self.size, self.render = native_size(pipeline.model)[0], render

    def measure(self, key: str, row: dict[str, Any]) -> None:
        """Do the next pictures of a row, and add what is found to it."""
        import torch

        from ldm.edit import context_of, network_of
        from ldm.generate import decode
        from ldm.images import to_uint8
        from ldm.models.diffusion.inversion import invert

        began, start = time.monotonic(), len(row["psnr"])
        scenes = self.scenes[start : start + self.batch]
        pixels = [np.asarray(self.render(scene, self.size)) for scene in scenes]
        (z,) = quality.encode_renders(self.pipeline, scenes, len(scenes))
        calls, down, error, x = 0, 0, [0.0] * len(z), z
        if key != CEILING:
            name, scale = key.split("/g")
            network = network_of(self.pipeline)
            context = context_of(self.pipeline, [scene.caption for scene in scenes], float(scale))
            inversion = invert(name, network, z.float(), context, steps=self.steps, measure=False)
            error = inversion.measure().tolist()
            calls, x = inversion.calls, inversion.reconstruction
            down = network.calls - calls
        with torch.no_grad():
            back = to_uint8(decode(self.pipeline.model, x))
        row["psnr"] += [round(quality.psnr(a, b), 3) for a, b in zip(back, pixels, strict=True)]
        row["error"] += [float(f"{value:.4g}") for value in error]
        row["calls_up"] += [calls] * len(z)
        row["calls_down"] += [down] * len(z)
        row["seconds"] = round(row["seconds"] + time.monotonic() - began, 1)
        row["machine"] = quality.machine_name(self.pipeline)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown: PSNR and cost of each method at each guidance, the ceiling first."""
    rows = results["rows"]
    ceiling = rows[CEILING]["psnr"]
    lines = [
        "# How well pictures come back",
        "",
        f"{results['model']}, weights {results['weights'][:10]}: up to {len(ceiling)} renders of never-seen pairs, "
        f"inverted in {results['steps']} steps",
        "under their captions and sampled back. The first stage alone gives "
        f"{mean(ceiling):.2f} dB: the ceiling. In each cell the mean",
        "PSNR in dB, how far it is from the same pictures' ceiling, and the root mean square error of the latents.",
        "Calls are of the network for a picture, up and down, at guidance above 1; null_text's backward passes are not",
        f"counted. Made by `python bench/reconstruction.py` on {rows[CEILING]['machine']}.",
        "",
        "| method | "
        + " | ".join(f"guidance {scale:g}" for scale in GUIDANCE)
        + " | calls up | down | pictures |",
        "|---|" + "---:|" * (len(GUIDANCE) + 3),
    ]
    for name in METHODS:
        found = [rows.get(f"{name}/g{scale:g}") for scale in GUIDANCE]
        found = [row if row and row["psnr"] else None for row in found]
        if not any(found):
            continue
        cells = ["-"] * len(found)
        for i, row in enumerate(found):
            if row:
                loss = mean(row["psnr"]) - mean(ceiling[: len(row["psnr"])])
                cells[i] = f"{mean(row['psnr']):.2f} ({loss:+.2f}), {mean(row['error']):.1e}"
        guided = [row for row in found[1:] if row]
        cost = [
            "-" if not guided else " - ".join(dict.fromkeys(f"{mean(row[way]):.0f}" for row in guided))
            for way in ("calls_up", "calls_down")
        ]
        counts = sorted({len(row["psnr"]) for row in found if row})
        lines.append(f"| `{name}` | {' | '.join((*cells, *cost, ' - '.join(map(str, counts))))} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> Any:
    parser = cli.Parser(description="Measure how well pictures come back by each inversion.")
    parser.add_argument("--ckpt", help="model file; without it, the model in the box")
    parser.add_argument("--config", help="CompVis YAML file for --ckpt")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--optimize", action="store_true", help="by ldm.kernels; same numbers up to rounding")
    parser.add_argument("--pictures", type=cli.integer(1, 10_000), default=100, help="pictures of each row")
    parser.add_argument("--steps", type=cli.integer(1, 1000), default=STEPS)
    parser.add_argument("--batch", type=cli.integer(1, 1000), default=10, help="pictures at once")
    parser.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="shell patterns, such as 'belm/*' or '*/g3'"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever --results holds")
    return parser.parse_args(argv)


def choose_rows(patterns: list[str] | None) -> list[str]:
    """Keep the rows that match one of the patterns, the ceiling always.

    Raises:
        UsageError: a pattern that no row matches.
    """
    keys = all_rows()
    for pattern in patterns or []:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise UsageError(f"--rows '{pattern}' matches no row; they are {CEILING} and METHOD/gGUIDANCE")
    return [
        key for key in keys if not patterns or key == CEILING or any(fnmatchcase(key, p) for p in patterns)
    ]


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    keys = choose_rows(opt.rows)
    pipeline = quality.load_pipeline(opt.ckpt, opt.config, opt.device)
    if opt.optimize:
        pipeline.optimize()
    head = {
        "model": pipeline.name,
        "weights": quality.weights_hash(pipeline.file),
        "steps": opt.steps,
    }
    results = {**head, "rows": {}} if opt.fresh else quality.load_results(opt.results, head)
    bench = Bench(pipeline, opt.pictures, opt.batch, opt.steps)
    for number, key in enumerate(keys, 1):
        lists = ("psnr", "error", "calls_up", "calls_down")
        row = results["rows"].setdefault(key, {**{name: [] for name in lists}, "seconds": 0.0})
        while len(row["psnr"]) < opt.pictures:
            bench.measure(key, row)
            quality.save_results(opt.results, results)
            quality.write(opt.results.with_suffix(".md"), make_table(results).encode())
            cli.say(
                f"[{number}/{len(keys)}] {key}: {len(row['psnr'])} pictures, {mean(row['psnr']):.2f} dB, "
                f"{row['seconds']:.0f} s"
            )
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
