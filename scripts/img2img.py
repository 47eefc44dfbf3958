"""Repaint a picture by a prompt: CompVis's img2img.py.

python scripts/img2img.py --init-img a.png --prompt "a small green triangle" --strength 0.6
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
        "img2img.py",
        "Repaint a picture by a prompt.",
        outdir="outputs/img2img-samples",
        scale=5.0,
        strength=0.75,
    )
    parser.add_argument("--init-img", "--init_img", required=True, help="the picture to begin with")
    args = parser.parse_args(argv)
    paint(args, {"image": args.init_img})


if __name__ == "__main__":
    run(main)
