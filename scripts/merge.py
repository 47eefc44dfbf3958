"""Merge Stable Diffusion v1 checkpoints, prune one, bake LoRAs or another VAE in; or extract a LoRA from two.

One model is pruned and cast; two give (1 - alpha) A + alpha B; three give A + alpha (B - C).
"""

import argparse
import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import Parser, integer, number, run, say
from ldm.cli.adapters import check_there, lora_flag
from ldm.errors import UsageError


def blocks_flag(text: str) -> dict[str, float] | list[float]:
    """Read numbers with commas between them, or NAME=number, as an argparse type."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if any("=" in part for part in parts):
            named = [(name.strip(), float(one)) for name, one in (part.split("=") for part in parts)]
        else:
            return [float(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted 25 or 26 numbers with commas between them, or NAME=number,NAME=number, got {text[:60]!r}"
        ) from None
    names = [name.upper() for name, _ in named]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise argparse.ArgumentTypeError(f"wanted each block once, got {twice!r} twice")
    return dict(named)


def make_parser() -> Parser:
    parser = Parser(prog="merge.py", description=__doc__)
    parser.add_argument(
        "models", nargs="+", metavar="model", help="one to three files or diffusers folders: A, B, C"
    )
    parser.add_argument("-o", "--output", required=True, help="name.safetensors, of what is made")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the output's name")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the weights; default: as the first model's",
    )
    merging = parser.add_argument_group("merging")
    merging.add_argument("--alpha", type=number(-100, 100), help="share of B, or of the difference B - C")
    merging.add_argument(
        "--blocks",
        type=blocks_flag,
        help="alphas of the UNet's blocks: 25 numbers (IN00 to IN11, M00, OUT00 to OUT11), 26 with BASE before them, "
        "or some as IN05=0.2,M00=1; --alpha is that of the others",
    )
    merging.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_flag,
        metavar="FILE[:weight[:text weight]]",
        help="bake a LoRA in, after merging; may be repeated; default: none",
    )
    merging.add_argument("--vae", help="a file or folder whose VAE is put in the place of A's")
    merging.add_argument(
        "--ema",
        choices=["drop", "use"],
        default="drop",
        help="of files with a moving average: drop it, or use it as the weights",
    )
    extracting = parser.add_argument_group("extracting a LoRA: BASE TUNED --extract_lora")
    extracting.add_argument(
        "--extract_lora",
        action="store_true",
        help="write what TUNED has over BASE as a LoRA in kohya's layout",
    )
    extracting.add_argument("--rank", type=integer(1, 4096), help="at most; default: 32, with --error none")
    extracting.add_argument(
        "--error",
        type=number(0, 1),
        help="the share of each difference that may be missing, as a norm: the smallest rank that keeps it is taken",
    )
    extracting.add_argument("--conv", action="store_true", help="of the ResBlocks' convolutions, too (LoCon)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    given = parser.given(argv)
    if len(options.models) > 3:
        raise UsageError(f"one to three models are merged, got {len(options.models)}")
    others = given & (
        {"alpha", "blocks", "lora", "vae", "ema"} if options.extract_lora else {"rank", "error", "conv"}
    )
    if others:
        raise UsageError(
            f"--{min(others)} does nothing {'with' if options.extract_lora else 'without'} --extract_lora"
        )
    if options.extract_lora and len(options.models) != 2:
        raise UsageError(f"--extract_lora takes two models, BASE and TUNED, got {len(options.models)}")
    check_there(options.lora)

    import torch

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if options.extract_lora:
        from ldm.adapters.extracting import extract_lora

        found = extract_lora(
            options.output,
            *options.models,
            rank=options.rank,
            error=options.error,
            conv=options.conv,
            dtype=dtype,
            overwrite=options.overwrite,
        )
        say(f"{found}\n'{options.output}' is written")
        return 0

    from ldm.adapters import LoRA
    from ldm.merging import merge

    reports = merge(
        options.output,
        *options.models,
        alpha=options.alpha,
        blocks=options.blocks,
        vae=options.vae,
        loras=[
            LoRA(
                flag.file,
                flag.weight,
                **({} if flag.text_weight is None else {"text_weight": flag.text_weight}),
            )
            for flag in options.lora
        ],
        ema=options.ema,
        dtype=dtype,
        overwrite=options.overwrite,
    )
    for report in reports:
        say(report.summary())
    say(f"'{options.output}' is written")
    return 0


if __name__ == "__main__":
    run(main)
