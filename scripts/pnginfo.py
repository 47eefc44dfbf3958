"""Say how pictures were made: PNG, JPEG or WebP, of ours or of another program, in the names of our options.

python scripts/pnginfo.py a.png b.jpg            # as text
python scripts/pnginfo.py a.png --json           # an object a picture
"""

import json
import sys
from pathlib import Path

try:
    import ldm  # noqa: F401
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import Parser, printable, run, say
from ldm.errors import FormatError, LdmError


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="pnginfo.py", description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="picture", help="PNG, JPEG or WebP")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with its file's name")
    args = parser.parse_args(argv)

    from ldm.metadata import read_parameters

    problem: LdmError | None = None
    for path in args.pictures:
        try:
            found = read_parameters(path)
            if found.keys() <= {"unread"}:
                raise FormatError(f"'{path}' does not say how it was made" + "".join(
                    f"; {line}" for line in found.get("unread", ())
                ))  # fmt: skip
        except LdmError as error:  # the others are told
            problem = problem or error
            say(
                json.dumps({"file": path, "error": str(error)})
                if args.json
                else printable(f"{path}: {error}")
            )
            continue
        for line in [json.dumps({"file": path, **found})] if args.json else told(path, found):
            say(line)
    if problem is not None:
        raise problem


def told(path: str, found: dict) -> list[str]:
    """Write what a picture says, a line for each thing."""
    extra, unread = found.pop("extra", {}), found.pop("unread", [])
    lines = [f"{path}: {found.pop('source')}"]
    lines += [f"  {name}: {shown(value)}" for name, value in found.items() if name != "adapters"]
    for one in found.get("adapters", ()):
        more = ", ".join(f"{key} {shown(value)}" for key, value in one.items() if key not in ("kind", "name"))
        lines.append(f"  {one.get('kind')} {shown(one.get('name'))}: {more}")
    lines += [f"  not an option here: {name}: {shown(value)}" for name, value in extra.items()]
    lines += [f"  not read: {line}" for line in unread]
    return [line[: len(line) - len(line.lstrip())] + printable(line, 2000) for line in lines]


def shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    run(main)
