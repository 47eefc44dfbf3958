"""What scripts/grid.py does: read its axes, load the model, plan every cell, paint, save each picture and the grid."""

from __future__ import annotations

import argparse

from ldm.axes import TEXTS, Axis, read_axis
from ldm.cli.adapters import Embeddings
from ldm.cli.painting import add_embeddings, check, explain, guidance_of, load_model
from ldm.cli.painting_options import FORMATS, painting_parser
from ldm.cli.parser import Parser
from ldm.cli.running import printable, say
from ldm.errors import UsageError

DELIMITERS = {"comma": ", ", "space": " "}


def grid_parser() -> Parser:
    """Make the parser: txt2img.py's options, and those of the grid."""
    parser = painting_parser(
        "grid.py",
        "Paint a grid of pictures that differ in a few options, with labels.",
        outdir="outputs/grids",
        scale=7.5,
        any_start=True,
    )
    group = parser.add_argument_group("the grid (docs/grids.md)")
    for axis, where in (("x", "along a row"), ("y", "down the rows"), ("z", "in grids side by side")):
        group.add_argument(
            f"--{axis}", metavar="OPTION=VALUES", help=f"an option and its values {where}, as steps=10,20"
        )
    group.add_argument("--init-img", "--init_img", help="a picture that each cell begins with")
    group.add_argument("--mask", help="its mask: white is repainted, black is kept")
    group.add_argument(
        "--matrix",
        choices=TEXTS,
        help="instead: this text, written 'a|b|c', with and without each part behind the first",
    )
    group.add_argument("--matrix-at-start", action="store_true", help="put the parts before the first")
    group.add_argument("--matrix-seeds", action="store_true", help="give each picture of it another seed")
    group.add_argument(
        "--matrix-join", choices=tuple(DELIMITERS), default="comma", help="what joins the parts"
    )
    return parser


def paint_grid(args: argparse.Namespace) -> None:
    """Paint the grid that the options ask for, saving each picture as soon as it is finished."""
    axes = read_axes(args)
    if args.mask is not None and args.init_img is None:
        raise UsageError("--mask is of a picture; give it as --init-img")
    source = {"image": args.init_img, "mask": args.mask}
    groups = check(args, {name: path for name, path in source.items() if path is not None})
    if len(groups) != 1 or len(groups[0].prompts) != 1:
        raise UsageError(
            f"a grid is of one prompt, each cell one picture; got {sum(len(group.prompts) for group in groups)} "
            "pictures a cell; go along the seed with --x seed=1-4"
        )
    (group,) = groups
    from ldm.devices import pick_device
    from ldm.grids import plan_grid, plan_matrix, stream_grid
    from ldm.images import prepare_folder
    from ldm.results import with_bar

    outdir = samples = None
    if not args.explain:
        outdir = prepare_folder(args.outdir)
        samples = None if args.skip_save else prepare_folder(outdir / "samples")
    sd = load_model(args, pick_device(args.device))
    options = {"negative_prompt": group.negatives[0], "seed": group.seeds[0]}
    options |= {"variation_seed": group.variation_seeds[0]} if group.variation_seeds else {}
    prompt = group.prompts[0]
    texts = (value for axis in axes.values() if axis.name in (*TEXTS, "prompt_sr") for value in axis.values)
    group.prompts += texts  # which may name embeddings as well
    add_embeddings([group], Embeddings(sd.model))
    options |= {**group.options, **guidance_of(group, args, sd)}
    if args.matrix is None:
        grid = plan_grid(sd, prompt, **axes, **options)
    else:
        form = {"at_start": args.matrix_at_start, "different_seeds": args.matrix_seeds}
        form |= {"in_negative": args.matrix == TEXTS[1], "delimiter": DELIMITERS[args.matrix_join]}
        grid = plan_matrix(sd, prompt, **form, **options)
    if args.explain:
        explain(sd, [cell.request for cell in grid.cells])
        return
    pattern = FORMATS[args.format]
    has_metadata = not args.no_metadata
    for step in with_bar(stream_grid(sd, grid)):
        if step.result is not None and samples is not None:
            (path,) = step.result.save(samples, "{:05}" + pattern, metadata=has_metadata)
            say(f"{path} ({printable('; '.join(grid.cells[step.batch].at.values()))})")
    if not args.skip_grid:
        say(f"{grid.save(outdir, 'grid-{:04}' + pattern, metadata=has_metadata)}")
    say(f"Your samples are ready and waiting for you here: {outdir}")


def read_axes(args: argparse.Namespace) -> dict[str, Axis]:
    """Read the axes, before anything is loaded.

    Raises:
        UsageError: none, or one beside a matrix; one that read_axis refuses.
    """
    given = {where: getattr(args, where) for where in "xyz" if getattr(args, where) is not None}
    if args.matrix is not None:
        if given:
            raise UsageError(f"--{next(iter(given))} and --matrix name two kinds of grid; give one of them")
    elif not given:
        raise UsageError("a grid needs an axis, as --x steps=10,20, or --matrix prompt; got none")
    return {where: read_axis(where, text) for where, text in given.items()}
