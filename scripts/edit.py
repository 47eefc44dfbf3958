"""Change a picture by its prompt: invert it, and sample it under another one.

python scripts/edit.py --image photo.png --prompt "a cat on a mat" --edit-prompt "a dog on a mat"
python scripts/edit.py --like outputs/edits/00000.png --image photo.png --edit-prompt "a fox on a mat"

Each edit is saved with all that makes it again, beside a contact sheet of source, reconstruction, edit and difference.
"""

import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.cli import run
from ldm.cli.editing import edit
from ldm.cli.editing_options import edit_parser


def main(argv: list[str] | None = None) -> None:
    """Parse, edit, save."""
    edit(edit_parser().parse_args(argv))


if __name__ == "__main__":
    run(main)
