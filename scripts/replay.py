"""Paint pictures again from what they say of themselves, and say what could not be done as they say.

python scripts/replay.py a.png b.jpg --models models --loras models/Lora --embeddings embeddings

PNG, JPEG or WebP, ours or A1111's, ComfyUI's, InvokeAI's and others'. Files are found in the folders by the hashes
that pictures name, or by name; pictures of the model in the box need none. Pixels of our own pictures are compared.
Ends with 0 if everything was done as all pictures say.
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import Parser, printable, run, say
from ldm.errors import LdmError, MismatchError

FOLDERS = {
    "models": ("--models", "model files, or diffusers folders"),
    "vaes": ("--vae-dir", "VAEs"),
    "loras": ("--loras", "LoRAs"),
    "embeddings": ("--embeddings", "textual inversions"),
    "inits": ("--init", "pictures to begin with"),
    "masks": ("--mask", "masks"),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="replay.py", description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="picture", help="PNG, JPEG or WebP")
    for dest, (flag, what) in FOLDERS.items():
        parser.add_argument(
            flag, dest=dest, action="append", default=[], metavar="PATH",
            help=f"{what}: a folder or a file; may be repeated",
        )  # fmt: skip
    parser.add_argument("--outdir", default="outputs/replay", help="folder for what is painted")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto: as the picture says")
    args = parser.parse_args(argv)

    from ldm.cli.replaying import Replayer

    replayer = Replayer(device=args.device, **{dest: getattr(args, dest) for dest in FOLDERS})
    problems = 0
    for path in args.pictures:
        try:
            account = replayer.replay(path, args.outdir)
        except LdmError as error:  # the others are painted
            if len(args.pictures) == 1:
                raise
            problems += 1
            say(printable(f"{path}: not painted: {error}"))
            continue
        say(printable(f"{path}: {account.saved}: {account.verdict or 'of another program, not compared'}"))
        for line in account.notes:
            say(printable(f"{path}: {line}"))
        for line in account.lost:
            say(printable(f"{path}: not honoured: {line}"))
        if account.lost or account.is_same is False:
            problems += 1
    if problems:
        raise MismatchError(
            f"{problems} of {len(args.pictures)} pictures could not be painted as they say; see the lines above"
        )


if __name__ == "__main__":
    run(main)
