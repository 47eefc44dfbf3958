"""Train a first stage or a latent diffusion model: python scripts/train.py --base configs/shapes-first-stage.yaml."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli  # noqa: E402
from ldm.errors import AbsentError, UsageError  # noqa: E402

NEEDED = ("matplotlib", "lightning")  # of the extra [train], and lightning looks for the first


def make_parser() -> cli.Parser:
    from ldm.guided_diffusion.script_util import str2bool

    parser = cli.Parser(prog="train.py", description="Train in the manner of CompVis's main.py.")
    parser.add_argument(
        "words", nargs="*", metavar="a.b=c", help="override a value of the configuration; ~a.b takes one out"
    )
    parser.add_argument("-b", "--base", nargs="+", default=[], help="YAML files, merged from left to right")
    parser.add_argument(
        "-l", "--logdir", default="logs", help="the run folder (with --name: the folder of runs)"
    )
    parser.add_argument("-n", "--name", default="", help="make the run folder LOGDIR/<time>_NAME")
    parser.add_argument(
        "-r",
        "--resume",
        nargs="?",
        const="",
        help="go on with the run in LOGDIR, or with the run or file named here; options that differ from the run's are "
        "taken over or refused, and each is named",
    )
    parser.add_argument("-f", "--postfix", default="", help="end of the run folder's name, with --name")
    parser.add_argument(
        "-t", "--train", nargs="?", const=True, type=str2bool, help="as CompVis; training is all this does"
    )
    parser.add_argument(
        "--no-test", nargs="?", const=True, type=str2bool, help="as CompVis; nothing is tested after"
    )
    parser.add_argument("-s", "--seed", type=cli.integer(0, 2**32 - 1), default=23, help="of everything")
    parser.add_argument(
        "--scale_lr", type=str2bool, default=True, help="rate = accumulate x devices x batch x base"
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the run's weights in half precision, with FILE's .yaml beside, and end",
    )
    parser.add_argument(
        "--ema_rate",
        type=cli.number(0, 1),
        help="with --export: which of a pixel model's averages; default: the one that was named first",
    )
    return parser


def require_packages() -> None:
    """Say what to install where a package is missing, before anything is read.

    Raises:
        UsageError: one is not there.
    """
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f'training needs {name}: pip install "faithful-ldm[train]", or pip install -e ".[train]" in a checkout'
            ) from error


def resumed_folder(path: Path, otherwise: Path) -> Path:
    """Return the run's folder for what --resume names: a folder, or a file in its checkpoints/.

    Raises:
        AbsentError: it is not there.
    """
    if not path.exists():
        raise AbsentError(
            f"--resume '{path}' is not there; name a run folder, or a checkpoint such as {path}/checkpoints/last.ckpt"
        )
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else otherwise


def main(argv: list[str] | None = None) -> int:
    from ldm.training.merging import is_word

    options = make_parser().parse_args(argv)
    # argparse gives `--base a.yaml x.y=1` and `--resume x.y=1` to the option before; a word with '=' is no file.
    words = list(options.words) + [word for word in options.base if is_word(word)]
    files = [word for word in options.base if not is_word(word)]
    resume = options.resume
    if resume is not None and is_word(resume):
        words, resume = [resume, *words], ""
    if options.ema_rate is not None and not options.export:
        raise UsageError("--ema_rate says what --export writes; set model.params.ema_rate=... for a run")
    folder = Path(options.logdir)
    if options.name:
        from datetime import datetime

        folder = folder / f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{options.name}{options.postfix}"
    if resume:
        folder = resumed_folder(Path(resume), folder)
    if options.export:
        from ldm.training.export import export_run

        metadata = export_run(folder, Path(options.export), ema_rate=options.ema_rate)
        beside = Path(options.export).with_suffix(".yaml")
        also = f", their configuration in {beside}" if beside.is_file() else ""
        cli.say(f"{options.export}: weights of step {metadata['global_step']} of {folder}{also}")
        return 0
    if not files:
        saved = folder / "configs" / "project.yaml"
        if resume and Path(resume).is_dir() and not saved.is_file():
            raise AbsentError(
                f"'{folder}' holds no run, there is no configs/project.yaml in it; name a run folder, or --base"
            )
        if resume is None or not saved.is_file():
            raise UsageError("--base is needed: name a configuration such as configs/shapes-first-stage.yaml")
        files = [str(saved)]

    require_packages()
    from ldm.training.merging import merge_configs
    from ldm.training.trainer import Run, RunOptions

    run = Run(
        RunOptions(
            config=merge_configs(files, words),
            folder=folder,
            seed=options.seed,
            resume=Path(resume) if resume else resume is not None,
            scale_lr=options.scale_lr,
        )
    )
    return run.fit()


if __name__ == "__main__":
    cli.run(main)
