"""Bounds of several models beside one another: a table and a plot of what scripts/image_nll.py measured.

    python scripts/image_nll.py --model_path a.safetensors --shapes 200 --outdir a
    python scripts/image_nll.py --model_path b.safetensors --shapes 200 --outdir b
    python bench/likelihood.py "first model=a/nll.json" "second model=b/nll.json"

Bounds are compared picture by picture, so the files have to be of the same pictures, seeds and levels.
"""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench.quality import save_results, write  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import FormatError, MismatchError, UsageError  # noqa: E402
from scripts.image_nll import need_matplotlib, scale_terms  # noqa: E402

SAME = ("unit", "data", "pictures", "seed", "dimensions", "levels")  # what makes two bounds comparable
# Where the bits are: the first levels, at which single bits of pixels are told, and the rest.
FINE = 10  # of 1000


def read_measure(path: Path) -> dict[str, Any]:
    """Read one file of image_nll.py.

    Raises:
        FormatError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [
            name for name in (*SAME, "total_bpd", "prior_bpd", "vb", "mse", "each") if name not in found
        ]
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"'{path}' is no result of image_nll.py: {error}") from None
    if missing:
        raise FormatError(f"'{path}' is no result of image_nll.py: it has no {', '.join(missing)}")
    return found


def read_all(words: list[str]) -> dict[str, dict[str, Any]]:
    """Read "name=path" words.

    Raises:
        UsageError: a word of another form, or a name that comes twice.
        MismatchError: bounds of different pictures or chains.
    """
    measures: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path) or name in measures:
            raise UsageError(f"results are given as NAME=nll.json, each name once, got '{word}'")
        measures[name] = read_measure(Path(path))
    first, *others = measures
    for other in others:
        for key in SAME:
            if measures[other][key] != measures[first][key]:
                raise MismatchError(
                    f"'{first}' and '{other}' differ in '{key}', so their bits cannot be compared"
                )
    return measures


def compare(measures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum up each bound; all but the first also by the difference to the first, picture by picture."""
    first = next(iter(measures.values()))
    rows = {}
    for name, found in measures.items():
        gaps = [
            ours - its
            for ours, its in zip(found["each"]["total_bpd"], first["each"]["total_bpd"], strict=True)
        ]
        mean = sum(gaps) / len(gaps)
        spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1) / len(gaps))
        fine = sum(vb for level, vb in zip(found["levels"], found["vb"], strict=True) if level < FINE)
        rows[name] = {
            "total_bpd": found["total_bpd"],
            "total_bpd_error": found["total_bpd_error"],
            "difference": mean,
            "difference_error": spread,
            "prior_bpd": found["prior_bpd"],
            "decoder_bpd": found["vb"][-1],
            "fine_bpd": fine,
            "mse": sum(found["mse"]) / len(found["mse"]),
        }
    return {**{key: first[key] for key in SAME}, "rows": rows}


def make_table(results: dict[str, Any]) -> str:
    """Lay the bounds out as Markdown."""
    lines = [
        "# Variational bounds",
        "",
        f"{results['unit']}; {results['pictures']} pictures of {results['data']}, {len(results['levels'])} levels. "
        "± is the standard error over",
        "the pictures; the difference is taken picture by picture. Made by `python bench/likelihood.py`.",
        "",
        f"| | bits per dimension | more than the first | prior | level 0 | levels below {FINE} | error of the noise |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["rows"].items():
        error = "" if row["total_bpd_error"] is None else f" ± {row['total_bpd_error']:.3f}"
        lines.append(
            f"| {name} | {row['total_bpd']:.3f}{error} | {row['difference']:+.3f} ± {row['difference_error']:.3f} | "
            f"{row['prior_bpd']:.1e} | {row['decoder_bpd']:.3f} | {row['fine_bpd']:.3f} | {row['mse']:.4f} |"
        )
    return "\n".join([*lines, ""])


def draw_plot(measures: dict[str, dict[str, Any]]) -> bytes:
    """Plot terms and errors over the levels, one line for each model, as a PNG."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (key, words) in zip(
        figure.subplots(1, 2), {"vb": "bits per dimension", "mse": "error of the noise"}.items(), strict=True
    ):
        for name, found in measures.items():
            axes.plot(found["levels"], found[key], linewidth=1, label=f"{name} ({found['total_bpd']:.2f})")
        scale_terms(axes, [value for found in measures.values() for value in found[key]])
        axes.set(xscale="symlog", xlabel="level t", ylabel=words)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Read, compare, save."""
    parser = cli.Parser(description="Compare variational bounds that scripts/image_nll.py measured.")
    parser.add_argument(
        "measures", nargs="+", metavar="NAME=nll.json", help="the first is what others are held to"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "bench" / "results" / "likelihood.json",
        help="JSON file; .md and .png go beside it",
    )
    args = parser.parse_args(argv)
    measures = read_all(args.measures)
    results = compare(measures)
    plot = draw_plot(measures)
    save_results(args.results, results)
    write(args.results.with_suffix(".md"), make_table(results).encode())
    write(args.results.with_suffix(".png"), plot)
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
