"""Paint pictures from a prompt: CompVis's txt2img.py.

python scripts/txt2img.py --prompt "a large red circle above a small blue square on a white background"
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import paint, painting_parser, run


def main(argv: list[str] | None = None) -> None:
    """Parse, paint, save."""
    parser = painting_parser(
        "txt2img.py", "Paint pictures from a prompt.", outdir="outputs/txt2img-samples", scale=7.5
    )
    parser.add_argument(
        "--laion400m", action="store_true", help="the earlier LAION400M model, where CompVis has it"
    )
    args = parser.parse_args(argv)
    if args.laion400m:
        args.config = "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
        args.ckpt = "models/ldm/text2img-large/model.ckpt"
        args.outdir = "outputs/txt2img-samples-laion400m"
    paint(args)


if __name__ == "__main__":
    run(main)
