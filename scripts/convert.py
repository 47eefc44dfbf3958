"""Convert a model, ControlNet, LoRA or textual inversion from one program's layout to another's; bits are kept.

Models and ControlNets: a file with CompVis's names, or a folder for diffusers. LoRAs: kohya's names, those
of diffusers, or a folder for PEFT. Embeddings: A1111's .pt, diffusers' {token: vectors}, or kohya's emb_params.
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import Parser, run, say


def make_parser() -> Parser:
    parser = Parser(prog="convert.py", description=__doc__)
    parser.add_argument("path", help="a file, or a folder of diffusers or PEFT")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="name.safetensors, a folder, or an embedding's name.pt or name.bin",
    )
    parser.add_argument(
        "--to",
        choices=["compvis", "diffusers", "kohya", "peft", "a1111"],
        help="the layout; default: of models and ControlNets, by the output's name",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of a model's weights; default: as they are",
    )
    parser.add_argument("--token", help="what stands for an embedding in a prompt; default: the file's own")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of the output's name")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    import torch

    from ldm.converting import convert

    report = convert(
        options.output,
        options.path,
        options.to,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        token=options.token,
        overwrite=options.overwrite,
    )
    say(f"{report.summary()}\n'{options.output}' is written")
    return 0


if __name__ == "__main__":
    run(main)
