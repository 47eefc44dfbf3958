"""Paint a grid of pictures that differ in a few options, with labels: A1111's X/Y/Z plot and prompt matrix.

python scripts/grid.py --prompt "a large red circle" --x steps=5,10,20 --y sampler=euler,dpmpp_2m
python scripts/grid.py --prompt "a circle|red|large" --matrix prompt
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import run
from ldm.cli.grids import grid_parser, paint_grid


def main(argv: list[str] | None = None) -> None:
    """Parse, paint, save."""
    paint_grid(grid_parser().parse_args(argv))


if __name__ == "__main__":
    run(main)
