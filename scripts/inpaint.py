"""Repaint the white parts of a mask: one picture by a prompt, or a folder of pairs as CompVis's inpaint.py.

python scripts/inpaint.py --init-img a.png --mask m.png --prompt "a small green triangle"
python scripts/inpaint.py --indir pairs --outdir filled       # x.png with x_mask.png
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import FORMATS, paint, painting_parser, run
from ldm.errors import AbsentError, UsageError

SUFFIX = "_mask.png"


def pairs_in(folder: str) -> list[tuple[Path, Path]]:
    """List (picture, mask) of a folder that holds x.png and x_mask.png."""
    if not Path(folder).is_dir():
        raise AbsentError(f"--indir '{folder}' is no folder; give one with x.png and x_mask.png")
    masks = sorted(Path(folder).glob(f"*{SUFFIX}"))
    if not masks:
        raise AbsentError(f"--indir '{folder}' holds no *{SUFFIX}; name the mask of x.png x{SUFFIX}")
    return [(mask.with_name(mask.name.removesuffix(SUFFIX) + ".png"), mask) for mask in masks]


def main(argv: list[str] | None = None) -> None:
    """Parse, paint, save."""
    parser = painting_parser(
        "inpaint.py",
        "Repaint the white parts of a mask.",
        outdir="outputs/inpaint-samples",
        scale=7.5,
        strength=1.0,
    )
    parser.add_argument("--init-img", "--init_img", help="the picture to repaint")
    parser.add_argument("--mask", help="its mask: white is repainted, black is kept")
    parser.add_argument("--indir", help="a folder with x.png and x_mask.png; results keep the names")
    args = parser.parse_args(argv)
    is_pair = (
        args.mask is not None or args.outpaint is not None
    )  # a canvas that grows is masked where it is new
    if (args.indir is None) == (args.init_img is None) or (args.init_img is not None) != is_pair:
        raise UsageError(
            "give --init-img and --mask, or --indir; --outpaint needs no mask; see inpaint.py --help"
        )
    if args.prompt is None and args.from_file is None:
        args.prompt = ""  # as CompVis's, which knows no prompts: fill in what fits

    pairs = pairs_in(args.indir) if args.indir is not None else [(args.init_img, args.mask)]
    sources = [{"image": image} | ({} if mask is None else {"mask": mask}) for image, mask in pairs]
    if args.indir is None:
        paint(args, *sources)
        return

    def save(result, source: int) -> list[Path]:
        from ldm.images import save_png
        from ldm.metadata import png_info

        name = (Path(args.outdir) / pairs[source][0].name).with_suffix(FORMATS[args.format])
        infos = [None if args.no_metadata else png_info(result.metadata(i)) for i in range(len(result))]
        return [save_png(image, name, info, rename=True) for image, info in zip(result, infos, strict=True)]

    args.skip_grid = True
    paint(args, *sources, save=save)


if __name__ == "__main__":
    run(main)
