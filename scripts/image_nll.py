"""Measure how well a diffusion model knows pictures, in bits per dimension: OpenAI's image_nll.py.

python scripts/image_nll.py --model_path model.pt --data_dir pictures --timestep_respacing 250
python scripts/image_nll.py --shapes 16 --timestep_respacing 50
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import diffusion_parser, given_flags, integer, run, say
from ldm.errors import UsageError


def need_matplotlib() -> None:
    """Raise UsageError if plots cannot be drawn; called before hours of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(
            "the plot needs matplotlib: pip install faithful-ldm[train], or leave it out by --skip_plot"
        ) from None


def scale_terms(axes: Any, values: Sequence[float]) -> None:
    """Give axes a scale on which terms that differ a thousandfold are seen, those of a density's last level too."""
    above = [value for value in values if value > 0]
    if len(above) == len(values):
        axes.set_yscale("log")
    elif above:
        axes.set_yscale("symlog", linthresh=min(above))


def draw_terms(result: Mapping[str, Any]) -> Any:
    """Plot the terms of the bound and the two errors over the levels, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    names = {
        "vb": "bits per dimension",
        "mse": "error of the noise",
        "xstart_mse": "error of the clean sample",
    }
    for axis, (name, words) in zip(figure.subplots(len(names), 1, sharex=True), names.items(), strict=True):
        axis.plot(
            result["levels"], result[name], linewidth=1, marker="." if len(result["levels"]) < 60 else None
        )
        scale_terms(axis, result[name])
        axis.set_ylabel(words)
        axis.grid(alpha=0.3)
    axis.set_xlabel("level t")
    figure.suptitle(
        f"{result['total_bpd']:.4f} bits per dimension, of them {result['prior_bpd']:.4g} in the prior "
        f"({result['pictures']} pictures)"
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, save."""
    parser = diffusion_parser(
        "image_nll.py",
        "Measure a model's variational bound on pictures, in bits per dimension; of a latent model, on their latents, "
        "as a density, which is no number of bits of likelihood.",
        outdir="outputs/nll",
        classifies=False,
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--data_dir", metavar="FOLDER", help="pictures, with captions as scripts/train.py reads them"
    )
    what.add_argument("--shapes", type=integer(1, 10**6), metavar="N", help="N scenes that no training saw")
    what.add_argument("--num_samples", type=integer(1, 10**6), default=1000, help="of the folder, at most")
    parser.add_argument("--skip_plot", action="store_true", help="save no plot of the terms over the levels")
    args = parser.parse_args(argv)
    if (args.data_dir is None) == (args.shapes is None):
        raise UsageError("pictures come from --data_dir FOLDER or from --shapes N; give one of the two")

    from ldm.devices import pick_device
    from ldm.guided_diffusion import likelihood, models
    from ldm.images import prepare_folder, save_file
    from ldm.request import list_seeds

    if not args.skip_plot:
        need_matplotlib()
    device, outdir = pick_device(args.device), prepare_folder(args.outdir)
    flags = given_flags(parser, args, argv)
    seeds = list_seeds(args.seed, args.num_samples if args.shapes is None else args.shapes)
    model = models.open_model(args.model_path, config=args.config, device=device, flags=flags)
    if args.optimize:
        model.optimize()
    for note in model.report.notes:
        say(f"note: {note}")
    if args.shapes is not None:
        pictures = likelihood.shapes_to_measure(model, args.shapes)
    else:
        pictures = likelihood.folder_to_measure(model, args.data_dir, args.num_samples)
    seeds = seeds[: len(pictures)]
    say(f"picture i draws from seed {seeds[0]} + i")
    result = likelihood.measure(model, pictures, seeds=seeds, batch_size=args.batch_size, say=say)
    result = {"model": str(model.file), "data": args.data_dir or "shapes", **result}
    say(f"total {result['total_bpd']:.4f}, of them prior {result['prior_bpd']:.4g}; {result['unit']}")
    path = likelihood.save_measures(outdir, result)
    say(str(path))
    if not args.skip_plot:
        figure = draw_terms(result)
        plot = save_file(
            lambda file: figure.savefig(file, format="png", dpi=100), path.with_suffix(".png"), rename=True
        )
        say(str(plot))


if __name__ == "__main__":
    run(main)
