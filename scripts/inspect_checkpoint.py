"""Say what a checkpoint or an adapter (LoRA, embedding, ControlNet, ...) holds, and what of it would not load and why.

Ends with 0 if every file given would load, as a full model, a VAE or an adapter; else with the code of the first error.
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import Parser, run, say
from ldm.errors import LdmError


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="inspect_checkpoint.py", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="path", help=".safetensors, .ckpt, .pt, .bin, or a diffusers folder"
    )
    parser.add_argument(
        "--config",
        help="the YAML configuration that the file should fit; default: the one beside it, or by its shapes",
    )
    parser.add_argument(
        "--ignore-keys",
        "--ignore_keys",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out the tensors with this name, beginning or shell pattern; may be repeated",
    )
    parser.add_argument("--ema", action="store_true", help="ask for the EMA weights")
    parser.add_argument(
        "--quick", action="store_true", help="do not read the values in search of NaN and zeros"
    )
    options = parser.parse_args(argv)

    from ldm.adapters.summary import inspect_adapter
    from ldm.checkpoints import inspect

    problem: LdmError | None = None
    for path in options.paths:
        summary = inspect(
            path,
            config=options.config,
            use_ema=True if options.ema else None,
            check_values=not options.quick,
            ignore=options.ignore_keys,
        )
        # What loads as a model is none, and is not read once more.
        is_model = summary.problem is None or Path(path).is_dir()
        adapter = None if is_model else inspect_adapter(path, options.ignore_keys)
        if adapter is not None:  # which says itself what is wrong with it
            summary.problem, summary.damage = None, ""
        say(str(summary) if adapter is None else f"{summary}\n{adapter}")
        problem = problem or (summary if adapter is None else adapter).problem
    if problem is not None:
        raise problem
    return 0


if __name__ == "__main__":
    run(main)
