"""Sample from a pixel model of OpenAI's family or from a latent model: OpenAI's image_sample.py, CompVis's own script.

python scripts/sample_diffusion.py -n 4 -c 20 --prompt "a large red circle on the left on a white background"
python scripts/sample_diffusion.py --model_path 64x64_diffusion.pt --timestep_respacing 250 --class 207
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import Parser, diffusion_parser, given_flags, integer, number, run, say
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.guided_diffusion.models import Model
    from ldm.guided_diffusion.sampling import SamplingOptions

log = logging.getLogger("ldm.sample_diffusion")
CUSTOM_STEPS = 50  # of a latent model, where neither options nor its configuration say any: CompVis's


def make_parser() -> Parser:
    from ldm.guided_diffusion.script_util import str2bool

    p = diffusion_parser(
        "sample_diffusion.py", "Sample from a diffusion model.", outdir="outputs/samples", classifies=True
    )
    what = p.add_argument_group("what to sample")
    what.add_argument(
        "--num_samples", "-n", "--n_samples", type=integer(1, 10**6),
        help="how many (default: 16, or as many as base samples)",
    )  # fmt: skip
    what.add_argument(
        "--class", dest="classes", type=integer(0, 10**6), nargs="+", default=[], metavar="LABEL",
        help="labels, over and over; without it each is drawn from its sample's seed",
    )  # fmt: skip
    what.add_argument("--base_samples", metavar="NPZ", help="small pictures to enlarge, samples_*.npz")
    what.add_argument("--classifier_path", metavar="FILE", help="a classifier that guides towards the labels")
    what.add_argument("--classifier_scale", type=number(-1000, 1000), help="how strongly (default: 1)")
    what.add_argument("--prompt", help="what a latent model is to paint")
    what.add_argument(
        "--scale", type=number(0, 100), help="how strictly to follow the prompt (default: the model's, or 1)"
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--use_ddim", type=str2bool, metavar="BOOL", help="DDIM, not DDPM (default: for latent models)"
    )
    how.add_argument(
        "-e", "--eta", type=number(0, 1), help="fresh noise in DDIM (default: 0; latent models: 1)"
    )
    how.add_argument("-v", "--vanilla_sample", action="store_true", help="DDPM over all levels")
    how.add_argument("-c", "--custom_steps", type=integer(1, 10**6), help="DDIM over so many levels")
    how.add_argument(
        "--clip_denoised", type=str2bool, metavar="BOOL",
        help="keep predicted clean samples in [-1, 1] (default: for pixels)",
    )  # fmt: skip
    return p


def check_steps(args: argparse.Namespace, flags: dict) -> None:
    """Refuse options of the chain that contradict one another, whatever the model."""
    respacing = "timestep_respacing" in flags
    if args.vanilla_sample and (args.custom_steps or respacing or args.use_ddim):
        raise UsageError("-v is DDPM over all levels; leave -c, --timestep_respacing and --use_ddim out")
    if args.custom_steps and (respacing or args.use_ddim is False):
        raise UsageError(
            f"-c {args.custom_steps} is short for --use_ddim True --timestep_respacing ddim{args.custom_steps}; "
            "give one of the two"
        )


def settle_options(args: argparse.Namespace, flags: dict, model: Model) -> SamplingOptions:
    """Choose DDPM or DDIM with its eta, and the model's levels where --timestep_respacing has not."""
    from ldm.guided_diffusion.models import LatentModel
    from ldm.guided_diffusion.sampling import SamplingOptions

    is_latent = isinstance(model, LatentModel)
    use_ddim = bool(args.custom_steps) or (is_latent if args.use_ddim is None else args.use_ddim)
    use_ddim = use_ddim and not args.vanilla_sample
    if args.eta is not None and not use_ddim:
        raise UsageError(f"--eta {args.eta} is DDIM's; give --use_ddim True or -c as well")
    if args.custom_steps:
        model.respace(f"ddim{args.custom_steps}")
    elif is_latent and use_ddim and "timestep_respacing" not in flags:
        model.respace(f"ddim{model.report.sampling.steps or CUSTOM_STEPS}")
    eta = float(is_latent) if args.eta is None else args.eta
    return SamplingOptions(use_ddim=use_ddim, eta=eta, clip_denoised=args.clip_denoised)


def main(argv: list[str] | None = None) -> None:
    """Parse, sample, save."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.classifier_scale is not None and args.classifier_path is None:
        raise UsageError(
            f"--classifier_scale {args.classifier_scale} needs --classifier_path, the classifier's file"
        )

    import numpy as np

    from ldm.devices import pick_device
    from ldm.guided_diffusion import models, sampling
    from ldm.images import prepare_folder
    from ldm.request import list_seeds
    from ldm.results import with_bar

    flags = given_flags(parser, args, argv)
    check_steps(args, flags)
    guide_flags = {name: flags.pop(name) for name in list(flags) if name.startswith("classifier_")}
    device, outdir = pick_device(args.device), prepare_folder(args.outdir)
    base = None if args.base_samples is None else sampling.read_samples(args.base_samples)
    count = args.num_samples or (16 if base is None else len(base[0]))
    seeds = list_seeds(args.seed, count)
    model = models.open_model(args.model_path, config=args.config, device=device, flags=flags)
    options = settle_options(args, flags, model)
    if args.optimize:
        model.optimize()
    guide = None
    if args.classifier_path is not None:
        scale = 1.0 if args.classifier_scale is None else args.classifier_scale
        guide = models.Classifier(args.classifier_path, model, scale=scale, **guide_flags)
    for note in [*model.report.notes, *(guide.report.notes if guide else [])]:
        say(f"note: {note}")

    conditions = models.choose_conditions(
        model,
        seeds,
        classes=args.classes,
        guide=guide,
        base=base,
        prompt=args.prompt,
        guidance_scale=args.scale,
    )
    for line in sampling.advice(model, options, seeds, args.prompt):
        log.warning("%s", line)
    pictures: list[np.ndarray] = []
    metadata = None
    steps = sampling.sample(model, conditions, options, seeds=seeds, batch_size=args.batch_size, guide=guide)
    for result in (step.result for step in with_bar(steps) if step.result is not None):
        metadata = metadata or result.metadata(0)
        pictures += map(np.asarray, result)
        say(f"{len(pictures)} of {count} samples (seed {seeds[0]} and on)")
    for path in sampling.save_samples(outdir, np.stack(pictures), conditions.labels, metadata):
        say(str(path))


if __name__ == "__main__":
    run(main)
