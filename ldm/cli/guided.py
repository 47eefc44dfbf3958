"""Options of the scripts for OpenAI's diffusion models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm.cli.painting_options import SEED_HELP, add_optimize
from ldm.cli.parser import Parser, integer, seed
from ldm.limits import BATCH_SIZE


def diffusion_parser(name: str, about: str, *, outdir: str, classifies: bool) -> Parser:
    """Make the parser of a script that samples or measures by OpenAI's chains, with every flag of a network.

    Args:
        classifies: offer a classifier's flags as well.
    """
    from ldm.guided_diffusion.script_util import add_dict_to_argparser

    p = Parser(prog=name, description=about)
    model = p.add_argument_group("with what")
    model.add_argument(
        "--model_path", "-r", "--resume", "--ckpt", metavar="FILE",
        help="OpenAI's model*.pt or ema*.pt, a latent model, or a folder with model.ckpt and config.yaml "
        "(default: the model in the box)",
    )  # fmt: skip
    model.add_argument("--config", help="a latent model's YAML file (default: config.yaml beside it)")
    model.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    add_optimize(model)
    p.add_argument(
        "--batch_size", type=integer(*BATCH_SIZE), default=16, help="at once; changes nothing else"
    )
    p.add_argument("--seed", type=seed, default=42, help=SEED_HELP)
    p.add_argument("--outdir", "-l", "--logdir", default=outdir, help="folder for what is written")
    flags = p.add_argument_group(
        "how the network was built (default: read off the file; see docs/openai-models.md)"
    )
    add_dict_to_argparser(flags, _network_flags(classifies))
    return p


def _network_flags(classifies: bool) -> dict[str, Any]:
    from ldm.guided_diffusion import script_util

    return {
        **(script_util.classifier_defaults() if classifies else {}),
        **script_util.sr_model_and_diffusion_defaults(),
        **script_util.model_and_diffusion_defaults(),
        "num_classes": script_util.NUM_CLASSES,
        "sigma_small": False,
    }


def given_flags(parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """Pick those of diffusion_parser's flags that these arguments set."""
    return {name: getattr(args, name) for name in _network_flags(True) if name in parser.given(argv)}
