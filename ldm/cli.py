"""What the command-line scripts share: the parser, validated numbers, errors and exit codes, and painting.

torch is imported only when painting begins, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import errno
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm.errors import (
    AbsentError,
    FormatError,
    LdmError,
    OutputError,
    ResourceError,
    UsageError,
    is_out_of_memory,
    refuse_elsewhere,
    told,
)

if TYPE_CHECKING:
    from PIL import Image

    from ldm.generate import StableDiffusion
    from ldm.results import GenerationResult
    from ldm.wish import Job

MAX_LINE = 400  # characters of an error line, so that it stays readable in a log
MAX_SEED = 2**64 - 1  # what torch.Generator takes
# Words for what is computed in; torch's names for them.
PRECISIONS = {"full": "float32", "half": "float16", "bfloat16": "bfloat16"}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no `except Exception` on the way can swallow it."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "") or "default:" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parse options as argparse does, but raise UsageError in one line and refuse what is ambiguous.

    Differences: no abbreviations, an option given twice is refused, an unknown one is answered with the
    nearest known one; `--debug` is always there.
    """

    # Other programs' names of options, without their dashes -> ours; --help lists ours only.
    also: Mapping[str, str] = {}

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", or one that begins with a dash, as --name=-value"
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        args = self._in_our_words(sys.argv[1:] if args is None else args)
        self._refuse_repeats(args)
        # Intermixed: words without an option may stand anywhere, also parted by options.
        found, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            self._refuse_unknown(unknown)
        return found

    def given(self, args: Sequence[str] | None = None) -> set[str]:
        """Name the destinations that these arguments set, as opposed to those left at their default."""
        words = self._in_our_words(sys.argv[1:] if args is None else args)
        return {action.dest for action in self._named(words)}

    def _in_our_words(self, args: Sequence[str]) -> list[str]:
        """Put our names in the place of others', and - for _ or _ for - where only that is spelt otherwise."""
        words, known = list(args), self._option_string_actions
        for i, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in known:
                continue
            bare = name[2:].replace("-", "_")
            ours = self.also.get(bare, bare)
            found = next((one for one in (f"--{ours}", f"--{ours.replace('_', '-')}") if one in known), name)
            words[i] = found + equals + value
        return words

    def _named(self, args: Sequence[str]) -> Iterator[argparse.Action]:
        for word in args:
            if word == "--":
                return
            action = self._option_string_actions.get(word.split("=", 1)[0])
            if action is not None:
                yield action

    def _refuse_repeats(self, args: Sequence[str]) -> None:
        seen: dict[str, str] = {}
        for action in self._named(args):
            if isinstance(action, argparse._AppendAction | argparse._CountAction):
                continue
            name = action.option_strings[0]
            if action.dest in seen and not isinstance(action, argparse._StoreConstAction):
                self.error(f"option {name} was given twice; give it once")
            seen[action.dest] = name

    def _refuse_unknown(self, words: list[str]) -> NoReturn:
        option = next((word.split("=", 1)[0] for word in words if word.startswith("-")), None)
        if option is None:
            self.error(f"unexpected word {words[0]!r}; put quotes around a value with spaces")
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"unknown option {option!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def integer(low: int, high: int) -> Callable[[str], int]:
    """Make an argparse type that takes whole numbers from low to high, both included."""

    def parse(text: str) -> int:
        wanted = f"wanted a whole number from {low} to {high}, got {told(text)}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(wanted)
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type that takes finite numbers from low to high, both included."""

    def parse(text: str) -> float:
        wanted = f"wanted a number from {low:g} to {high:g}, got {told(text)}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(wanted) from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(wanted)
        return value

    return parse


def seed(text: str) -> int | None:
    """Read a seed as an argparse type: 0 to 2^64 - 1; "random", or -1 as A1111 has it, is None."""
    if text.strip() in ("random", "-1"):
        return None
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"wanted a seed from 0 to 2^64-1, or -1 or 'random' to draw one, got {told(text)}"
        )
    return value


def printable(text: str, limit: int = MAX_LINE) -> str:
    """Put text into one line without control, format or surrogate characters; cut its middle beyond limit."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    if len(line) <= limit:
        return line
    tail = limit // 3  # the end says what to do
    return f"{line[: limit - tail - 5]} ... {line[-tail:]}"


def say(text: str) -> None:
    """Print a line for the user; a reader that went away (`| head`) is no error."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(text, flush=True)


def run(main: Callable[[list[str] | None], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's main and end the process with its exit code.

    0 ok; an LdmError ends with its own code (2 usage, 3 file, 4 unsafe, 5 mismatch, 6 resources, 7 output,
    8 not finite, 9 absent); 130 after Ctrl-C, 143 after SIGTERM; 1 for anything unexpected. Errors are one
    line on stderr, `ldm: error: ...`, with a traceback above it only under --debug.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A prompt in any script must not fail on a terminal that cannot show it.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    with _warnings_on_stderr(), _terminable():
        try:
            code = main(argv) or 0
        except SystemExit as stop:  # argparse's --help
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            if "--debug" in argv:
                traceback.print_exc()
            code, line = _verdict(error)
            with contextlib.suppress(BrokenPipeError, ValueError):
                print(printable(f"ldm: error: {line}"), file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError, ValueError, OSError, AttributeError):
        sys.stdout.flush()
    sys.exit(code)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Say with which exit code and line an exception ends the process."""
    text = str(error)
    if isinstance(error, LdmError):
        return error.exit_code, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; finished images and files are kept"
    if isinstance(error, Terminated):
        return 143, "terminated; finished images and files are kept"
    if is_out_of_memory(error):
        return ResourceError.exit_code, f"out of memory: {text}; use a smaller size or batch"
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return OutputError.exit_code, f"cannot write: {text}; free some space or choose another folder"
    if isinstance(error, FileNotFoundError):
        return AbsentError.exit_code, f"not found: {text}"
    return 1, f"unexpected {type(error).__name__}: {text}; this is a bug, --debug shows where"


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show what the library logs at WARNING and above, one line each."""

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(f"ldm: {record.levelname.lower()}: {record.getMessage()}", limit=2000)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logger = logging.getLogger("ldm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into Terminated, where signals can be had (the main thread)."""

    def stop(number, frame):
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- prompts from a file ---------------------------------------------------------------------------

MAX_PROMPT_BYTES = 10 * 2**20
MAX_PROMPT_LINES = 100_000
MAX_PROMPT = 100_000  # characters of one
MAX_DIGITS = 100  # of a number in a .jsonl file
RNGS = ("image", "compvis")


def prompt_text(text: str) -> str:
    """Read a prompt as an argparse type: any text that can be encoded, of at most MAX_PROMPT characters."""
    if len(text) > MAX_PROMPT:
        raise argparse.ArgumentTypeError(
            f"wanted at most {MAX_PROMPT} characters, got {len(text)}; shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"wanted text, got characters that are none (lone surrogates): {told(text)}"
        ) from None
    return text


def _interval(text: str) -> tuple[float, ...]:
    ends = text.replace(",", " ").split()
    if len(ends) != 2:
        raise argparse.ArgumentTypeError(f"wanted two numbers from 0 to 1, got {told(text)}")
    return tuple(map(number(0, 1), ends))


def _rng(text: str) -> str:
    if text not in RNGS:
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(RNGS)}; got {told(text)}")
    return text


def _switch(text: str) -> bool:
    if text.lower() not in ("", "true", "false"):
        raise argparse.ArgumentTypeError(f"wanted nothing, true or false after it, got {told(text)}")
    return text.lower() != "false"


# What a line may set beside its prompt, with its type, by the name that StableDiffusion.plan has for it (n_iter and
# batch_size multiply to a number of pictures; plms and dpm_solver name samplers), and behind it other names: the
# flags', A1111's, diffusers'.
_LINE: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "prompt": (prompt_text, ()),
    "negative_prompt": (prompt_text, ("negative", "n_prompt")),
    "seed": (seed, ()),
    "sampler": (str, ("sampler_name", "scheduler")),
    "steps": (integer(1, 1000), ("ddim_steps", "num_inference_steps", "num_steps")),
    "guidance_scale": (number(0, 100), ("cfg_scale", "scale", "cfg", "guidance")),
    "width": (integer(1, 1_000_000), ("W",)),
    "height": (integer(1, 1_000_000), ("H",)),
    "n_iter": (integer(1, 10_000), ("num_images", "num_images_per_prompt", "batch_count")),
    "batch_size": (integer(1, 1024), ("n_samples",)),
    "strength": (number(0, 1), ("denoising_strength", "denoise")),
    "eta": (number(0, 1), ("ddim_eta",)),
    "guidance_interval": (_interval, ()),
    "cache_interval": (integer(1, 1000), ()),
    "cache_depth": (integer(1, 1000), ()),
    "merge_ratio": (number(0, 0.75), ()),
    "merge_seed": (integer(0, MAX_SEED), ()),
    "rng": (_rng, ()),
    "fixed_code": (_switch, ()),
    "plms": (_switch, ()),
    "dpm_solver": (_switch, ()),
}
LINE_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    name: (ours, kind) for ours, (kind, others) in _LINE.items() for name in (ours, *others)
}


@dataclass(frozen=True)
class Line:
    """One prompt of a file with the options that its line sets, in the words of StableDiffusion.plan."""

    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)  # for errors that only the model can find


def read_prompts(path: str) -> list[Line]:
    """Read prompts from a file, one a line; empty lines, and those that begin with #, are skipped.

    A line that begins with an option (`--prompt a cat --steps 20 --seed 5`, A1111's) is read as options: a value goes
    up to the next ` --name` (switches, such as --plms, need none), and quotes around it, or around a part of it, are
    taken off (\\" stands for a quote within double ones). Any other line is a prompt as it stands. A prompt that begins
    with # or with an option's name is written `--prompt #1 fan`. In a `.jsonl` file each line is a JSON object with
    the same names; null is "not given".

    Raises:
        AbsentError: no such file. FormatError: no text, too large, or without any prompt.
        UsageError: a line with an unknown option or a value out of range; the line's number is named.
    """
    lines = _text_of(path).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if len(lines) > MAX_PROMPT_LINES:
        raise FormatError(
            f"prompt file '{path}' has {len(lines)} lines, at most {MAX_PROMPT_LINES} are read; split it"
        )
    read = _from_json if path.lower().endswith((".jsonl", ".ndjson")) else _from_words
    found, comments = [], 0
    for i, line in enumerate(lines, start=1):
        place, line = f"line {i} of '{path}'", line.strip()
        if line.startswith("#"):
            comments += 1
        elif line:
            try:
                found.append(replace(read(line), place=place))
            except (UsageError, argparse.ArgumentTypeError) as error:
                raise UsageError(f"{place}: {error}") from None
    if not found:
        raise FormatError(
            f"prompt file '{path}' holds no prompt; write one a line"
            + (" (lines that begin with # are comments)" if comments else "")
        )
    if comments:
        say(f"{path}: {len(found)} prompts; {comments} lines that begin with # are comments")
    return found


def _text_of(path: str) -> str:
    """Read a file of text: UTF-8, or UTF-16 that says so in its first two bytes, as Windows' editors write it."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise AbsentError(f"prompt file '{path}' does not exist; check the path") from None
    except IsADirectoryError:
        raise FormatError(f"prompt file '{path}' is a folder; name the file in it") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read prompt file '{path}': {error}; give a file of text") from None
    if len(data) > MAX_PROMPT_BYTES:
        raise FormatError(
            f"prompt file '{path}' is no list of prompts; wanted text of at most {MAX_PROMPT_BYTES} bytes"
        )
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig").lstrip("\ufeff")  # some have two marks
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"cannot read prompt file '{path}' as {'UTF-16' if wide else 'UTF-8'}: {error.reason} in line {line}; "
            "save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise FormatError(
            f"prompt file '{path}' is no list of prompts: it holds a NUL character in line {line}; save it as UTF-8"
        )
    return text


_OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:=|(?!\S))")
# A quote closes where a space or the end follows, so that the apostrophe of "it's" is a letter.
_QUOTED = {
    '"': re.compile(r'"((?:\\.|[^\\])*?)"(?!\S)', re.DOTALL),
    "'": re.compile(r"'(.*?)'(?!\S)", re.DOTALL),
}
_WORD, _SPACE = re.compile(r"\S+"), re.compile(r"\s*")


def _from_words(line: str) -> Line:
    first = _OPTION.match(line)
    name = first[1].replace("-", "_") if first else ""
    # A line that begins with one letter, "--H 9 ...", has always been a text.
    if len(name) < 2 or not (
        name in LINE_OPTIONS or difflib.get_close_matches(name, LINE_OPTIONS, n=1, cutoff=0.75)
    ):
        return Line(prompt_text(line))
    values: dict[str, list[str]] = {}
    parts: list[str] = []
    never_closed: set[str] = set()  # so that each kind of quote is looked for in vain only once
    at = 0
    while at < len(line):
        option, quote = _OPTION.match(line, at), line[at]
        if option:
            name = option[1].replace("-", "_")
            if name in values:
                raise UsageError(f"option --{name} was given twice; give it once")
            parts = values[name] = []
            found = option
        else:
            found = _QUOTED[quote].match(line, at) if quote in _QUOTED and quote not in never_closed else None
            if found:
                parts.append(re.sub(r'\\(["\\])', r"\1", found[1]) if quote == '"' else found[1])
            else:
                never_closed.add(quote)
                found = _WORD.match(line, at)
                parts.append(found[0])
        at = _SPACE.match(line, found.end()).end()
    for name, found in values.items():
        if not found and LINE_OPTIONS.get(name, ("", None))[1] is not _switch:
            raise UsageError(f"wanted a value after --{name}, got none")
    return _line({name: " ".join(parts) for name, parts in values.items()})


def _from_json(line: str) -> Line:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise UsageError(f"{told(name)} was given twice; give it once")
            values[name] = value
        return values

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise UsageError(f"wanted a number of at most {MAX_DIGITS} digits, got {len(digits)}")
        return int(digits)

    def refuse(name: str) -> NoReturn:
        raise UsageError(f"wanted a number, got {name}")

    try:
        values = json.loads(line, object_pairs_hook=distinct, parse_int=whole, parse_constant=refuse)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f'wanted a JSON object, such as {{"prompt": "a cat"}}; {error}') from None
    if not isinstance(values, dict):
        raise UsageError(f"wanted a JSON object with a prompt, got {told(values)}")
    texts = {}
    for name, value in values.items():
        is_text = name.replace("-", "_") in ("prompt", "negative_prompt")
        if name.replace("-", "_") == "guidance_interval" and isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 20.0 is what some programs write for 20
        if value is None:
            continue
        if isinstance(value, bool) and LINE_OPTIONS.get(name.replace("-", "_"), ("", None))[1] is _switch:
            value = str(value)
        if isinstance(value, bool) or not isinstance(value, str if is_text else str | int | float):
            raise UsageError(f"{name}: wanted a text{'' if is_text else ' or a number'}, got {told(value)}")
        texts[name.replace("-", "_")] = str(value)
    return _line(texts)


def _line(values: dict[str, str]) -> Line:
    """Check the options of a line as those of the command line are checked."""
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name not in LINE_OPTIONS:
            near = difflib.get_close_matches(name, LINE_OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(_LINE)}"
            raise UsageError(f"unknown option {told(name)}{hint}")
        option, kind = LINE_OPTIONS[name]
        if option in options:
            raise UsageError(f"{name}: {option} was given twice, by two names; give one")
        try:
            options[option] = kind(value)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {error}") from None
    if "prompt" not in options:
        raise UsageError("no prompt")
    flags = [name for name in ("dpm_solver", "plms") if options.pop(name, False)]
    if flags and "sampler" in options:
        raise UsageError(f"sampler and {flags[0]} name two samplers; give one")
    if flags:  # dpm_solver goes before plms, as on the command line
        options["sampler"] = flags[0]
    return Line(options.pop("prompt"), options)


# --- painting --------------------------------------------------------------------------------------

DEFAULT_PROMPT = "a large red circle above a small blue square on a white background"
COMPVIS_PROMPT = "a painting of a virus monster playing guitar"
GRID_AT_MOST = 64  # pictures in one grid
SEED_HELP = "picture i has seed + i; -1 or 'random' draws one; 32 bits count: 2^32 + 5 paints what 5 paints"
# What trades a little fidelity for time, in the words of StableDiffusion.plan: docs/knobs.md.
KNOBS = ("guidance_interval", "cache_interval", "cache_depth", "merge_ratio", "merge_seed")


# What a script needs beside a prompt.
EXAMPLES = {"img2img.py": "--init-img a.png ", "inpaint.py": "--init-img a.png --mask m.png "}
# Other programs' names of options -> ours; "_" stands for "-" as well.
OTHER_FLAGS = {
    "cfg": "scale",
    "guidance": "scale",
    "model": "ckpt",
    "weights": "ckpt",
    "checkpoint": "ckpt",
    "ckpt_path": "ckpt",
    "model_path": "ckpt",
    "num_images": "n_iter",
    "num_images_per_prompt": "n_iter",
    "batch_count": "n_iter",
    "num_inference_steps": "ddim_steps",
    "num_steps": "ddim_steps",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "n_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "image": "init_img",
    "init_image": "init_img",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "denoise": "strength",
    "prompts_file": "from_file",
    "prompt_file": "from_file",
    "output": "outdir",
    "output_dir": "outdir",
    "out_dir": "outdir",
    "low_vram": "lowvram",
}
FORMATS = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp"}


def _add_optimize(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimize", action="store_true", help="compute faster on this machine, same numbers up to rounding"
    )


def painting_parser(name: str, about: str, *, outdir: str, scale: float) -> Parser:
    """Make the parser of a painting script: CompVis's options by their names, others' names beside them.

    Args:
        scale: the guidance that CompVis's script has for Stable Diffusion v1: where neither options nor model say one.
    """
    beside = EXAMPLES.get(name, "")
    usage = (
        f"{name} {beside}--prompt TEXT [options]\n       {name} {beside}--prompt 'a red circle' --steps 20"
    )
    p = _PaintingParser(prog=name, description=about, usage=usage)
    p.also = OTHER_FLAGS
    p.set_defaults(v1_scale=scale)
    words = p.add_argument_group("what to paint")
    words.add_argument(
        "--prompt",
        help="what to paint (default: one that suits the model); one that begins with - as --prompt=-x",
    )
    words.add_argument("--negative_prompt", "--negative-prompt", default="", help="what to keep away from")
    words.add_argument(
        "--from-file", "--from_file", metavar="FILE",
        help="prompts, one a line, also with options (--prompt a cat --steps 20), or .jsonl; # begins a comment",
    )  # fmt: skip
    words.add_argument(
        "--like", metavar="PICTURE",
        help="paint as this picture says it was painted; options given beside it go before",
    )  # fmt: skip
    words.add_argument("--H", "--height", type=integer(1, 10**6), help="pixels (default: the model's)")
    words.add_argument("--W", "--width", type=integer(1, 10**6), help="pixels (default: the model's)")
    words.add_argument(
        "--n_samples", "--batch_size", type=integer(1, 1024), default=1, help="pictures painted at once"
    )
    words.add_argument("--n_iter", type=integer(1, 10_000), default=1, help="how often to paint n_samples")
    words.add_argument("--seed", type=seed, default=42, help=SEED_HELP)

    how = p.add_argument_group("how")
    how.add_argument(
        "--ddim_steps", "--steps", type=integer(1, 1000),
        help="denoising steps (default: the model's; for Stable Diffusion v1: 50)",
    )  # fmt: skip
    how.add_argument(
        "--scale", "--cfg-scale", "--cfg_scale", "--guidance_scale", type=number(0, 100),
        help="guidance: how strictly to follow the prompt (default: the model's; for Stable Diffusion v1: "
        f"{scale:g})",
    )  # fmt: skip
    how.add_argument("--sampler", help="ddim, plms, ddpm, dpm_solver or dpmpp_2m (default: ddim)")
    how.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    how.add_argument("--dpm_solver", action="store_true", help="goes before --plms")
    how.add_argument(
        "--ddim_eta", "--eta", type=number(0, 1), default=0.0, help="fresh noise in each DDIM step"
    )
    how.add_argument("--fixed_code", action="store_true", help="begin every batch with the same noise")
    how.add_argument(
        "--rng", choices=RNGS, default="image",
        help="a generator for each picture, or one for all in the order of CompVis's scripts",
    )  # fmt: skip

    knobs = p.add_argument_group("faster, for a little fidelity (docs/knobs.md)")
    knobs.add_argument(
        "--guidance_interval", nargs=2, metavar=("LOW", "HIGH"), type=number(0, 1), default=(0.0, 1.0),
        help="guide only levels of this part of the noise schedule; 0 is its clean end",
    )  # fmt: skip
    knobs.add_argument(
        "--cache_interval", type=integer(1, 1000), default=1, help="steps from one whole UNet to the next"
    )
    knobs.add_argument(
        "--cache_depth", type=integer(1, 1000), default=1, help="blocks computed at the steps between"
    )
    knobs.add_argument(
        "--merge_ratio", type=number(0, 0.75), default=0.0, help="share of tokens merged where most are"
    )
    knobs.add_argument(
        "--merge_seed", type=integer(0, MAX_SEED), help="draws the tokens that others are merged into"
    )

    model = p.add_argument_group("with what")
    model.add_argument("--ckpt", help="model file or diffusers folder (default: the model in the box)")
    model.add_argument("--config", help="its YAML file (default: the one beside it, or read off the weights)")
    model.add_argument(
        "--ignore-keys", "--ignore_keys", action="append", default=[], metavar="PATTERN",
        help="leave out of --ckpt the tensors with this name, beginning or shell pattern; may be repeated",
    )  # fmt: skip
    model.add_argument("--vae", help="file whose VAE replaces the model's")
    model.add_argument("--tokenizer", help="folder or file of the tokenizer (default: the one in ldm)")
    model.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    model.add_argument(
        "--precision", choices=("autocast", *PRECISIONS), default="autocast",
        help="of the UNet; autocast is full where there is no CUDA",
    )  # fmt: skip
    _add_optimize(model)
    model.add_argument(
        "--compile", action="store_true", help="the same by torch.compile, which takes minutes at first"
    )
    model.add_argument(
        "--tiled_vae",
        action="store_true",
        help="--optimize, and large pictures through the VAE in strips, exactly",
    )
    model.add_argument(
        "--sliced_vae", action="store_true", help="--optimize, and a batch through the VAE picture by picture"
    )
    model.add_argument(
        "--lowvram",
        action="store_true",
        help="leave the weights in the machine's memory; they visit the GPU part by part (slow)",
    )
    model.add_argument(
        "--vae_precision",
        choices=tuple(PRECISIONS),
        default="full",
        help="what the VAE computes in; one that overflows goes on in full precision",
    )
    model.add_argument("--C", type=integer(1, 64), help="latent channels; checked against the model")
    model.add_argument("--f", type=integer(1, 64), help="pixels a latent cell; checked against the model")

    out = p.add_argument_group("where to")
    out.add_argument("--outdir", default=outdir, help="folder for pictures and grids")
    out.add_argument("--format", choices=tuple(FORMATS), default="png", help="of the pictures and grids")
    out.add_argument("--skip_grid", action="store_true", help="save no grid of all pictures")
    out.add_argument("--skip_save", action="store_true", help="save no single pictures")
    out.add_argument(
        "--n_rows", type=integer(0, 1024), default=0, help="pictures in a grid row; 0 = n_samples"
    )
    out.add_argument("--no_metadata", action="store_true", help="pictures tell nothing about their making")
    return p


# What a picture tells of its making -> the option that says it. What no option says goes to the plan as it is.
LIKE = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "ddim_steps",
    "sampler": "sampler",
    "guidance_scale": "scale",
    "eta": "ddim_eta",
    "height": "H",
    "width": "W",
    "rng": "rng",
    "strength": "strength",
    **{name: name for name in KNOBS},
}
LIKE_ALSO = ("spacing", "guidance_rescale")


class _PaintingParser(Parser):
    """A parser whose --like fills in what the command line leaves open."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        found.like_also = {}
        if found.like is not None:
            self._repeat(found, self.given(args))
        return found

    def _repeat(self, found: argparse.Namespace, given: set[str]) -> None:
        from ldm.metadata import read_metadata

        told_by = read_metadata(found.like)
        if not told_by.get("prompt") and "seed" not in told_by:
            raise FormatError(
                f"--like '{found.like}' does not say how it was painted; give a picture that does"
            )
        if told_by.get("mode") in ("img2img", "inpaint") and not hasattr(found, "strength"):
            script = told_by["mode"]
            raise UsageError(
                f"--like '{found.like}' was painted from another picture; use {script}.py and give that one "
                "as --init-img"
            )
        if "from_file" in given:
            given = given | {"prompt"}
        if given & {"plms", "dpm_solver"}:
            given = given | {"sampler"}
        for name, option in LIKE.items():
            value = told_by.get(name)
            if option in given or value is None or not hasattr(found, option):
                continue
            if name == "rng" and value not in RNGS:  # A1111's word for where it draws
                continue
            setattr(found, option, value)
        found.like_also = {name: told_by[name] for name in LIKE_ALSO if told_by.get(name) is not None}
        if told_by.get("rng") == "compvis" and told_by.get("batch_index"):
            say(
                f"{found.like}: was number {told_by['batch_index'] + 1} of its batch, and depends on that place; what "
                "is painted here is the first"
            )


def check(args: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen to be wrong, before the seconds or minutes that loading one takes."""
    for name in ("config", "ignore_keys"):
        if args.ckpt is None and getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {getattr(args, name)} needs --ckpt, the file with the weights")
    for name in ("ckpt", "config", "vae", "tokenizer", "from_file"):  # open_image says so of pictures
        refuse_elsewhere(f"--{name}", getattr(args, name, None), hub=name in ("ckpt", "vae", "tokenizer"))
    if args.config is not None:
        from ldm.checkpoints.configs import find_config

        find_config(args.config)
    for name in ("ckpt", "vae", "tokenizer"):
        given = getattr(args, name)
        if given and not os.path.lexists(given):
            near = difflib.get_close_matches(Path(given).name, _names_in(Path(given).parent), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the path; nothing is downloaded here"
            raise AbsentError(f"--{name} {told(given)} is not there; {hint}")
    if args.lowvram and args.compile:
        raise UsageError(
            "--lowvram moves weights that --compile's code expects to stay; leave one of the two out"
        )
    from ldm.models.diffusion.samplers import SAMPLERS, check_eta, check_interval

    check_eta(SAMPLERS[sampler_of(args)], args.ddim_eta)
    check_interval(args.guidance_interval)
    if args.ckpt is None:  # of another model the cell is known when it is loaded
        from ldm.wish import check_size

        for name, side in (("height", args.H), ("width", args.W)):
            if side is not None:
                check_size(name, side, 8)


def _names_in(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def load_model(args: argparse.Namespace) -> StableDiffusion:
    """Load the model that the options name, or the one in the box."""
    say(f"loading {args.ckpt or 'the model in the box'} ...")
    import torch

    from ldm.generate import StableDiffusion
    from ldm.wish import downsampling, pick_device

    device = pick_device(args.device)
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    options |= {"vae": args.vae, "tokenizer": args.tokenizer, "low_vram": args.lowvram}
    options["vae_dtype"] = getattr(torch, PRECISIONS[args.vae_precision])
    if args.precision == "autocast" and device.type == "cuda":
        options["autocast"] = torch.float16
    elif args.precision in ("half", "bfloat16"):
        options["dtype"] = getattr(torch, PRECISIONS[args.precision])
    if args.ckpt is None:
        sd = StableDiffusion.default(**options)
    else:
        options["ignore"] = args.ignore_keys
        sd = StableDiffusion.from_single_file(args.ckpt, config=args.config, **options)
    for name, given, own in (("C", args.C, sd.model.channels), ("f", args.f, downsampling(sd.model))):
        if given not in (None, own):
            raise UsageError(f"--{name} {given} does not fit this model, whose {name} is {own}; leave it out")
    ways = {name: getattr(args, name) for name in ("compile", "tiled_vae", "sliced_vae")}
    if any(ways.values()) or (args.optimize and not args.lowvram):  # low_vram alone is the loader's work
        sd.optimize(**ways, low_vram=device if args.lowvram else None)
    return sd


def sampler_of(args: argparse.Namespace) -> str:
    """Choose the sampler as CompVis does: dpm_solver before plms before ddim; --sampler says it by name."""
    flag = "dpm_solver" if args.dpm_solver else "plms" if args.plms else None
    if args.sampler is None:
        return flag or "ddim"
    if flag is not None:
        raise UsageError(f"--sampler {args.sampler} and --{flag} name two samplers; give one")
    from ldm.models.diffusion.samplers import resolve_sampler

    return resolve_sampler(args.sampler)


def lines_of(args: argparse.Namespace) -> list[Line]:
    """List what is to be painted: the lines of the file, or the one prompt."""
    if args.from_file is not None:
        if args.prompt is not None:
            raise UsageError("--prompt and --from-file name two sources of prompts; give one")
        return read_prompts(args.from_file)
    prompt = args.prompt
    if prompt is None:
        prompt = DEFAULT_PROMPT if args.ckpt is None else COMPVIS_PROMPT
    return [Line(prompt, {"batch_size": args.n_samples})]


@dataclass
class _Group:
    """Pictures that differ in prompt, negative prompt and seed only, and so may share batches."""

    options: dict[str, Any]
    prompts: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    place: str = ""  # of its first line


def _groups(args: argparse.Namespace, lines: list[Line]) -> list[_Group]:
    """Lay out the whole run, picture by picture, in CompVis's order: all prompts, then all again, n_iter times."""

    from ldm.wish import draw_seed

    def start(seed: int | None) -> int:
        return draw_seed() if seed is None else seed

    shared = itertools.count(start(args.seed))  # lines without a seed of their own share one count
    seeds = [
        itertools.count(start(line.options["seed"])) if "seed" in line.options else shared for line in lines
    ]
    groups: list[_Group] = []
    for _ in range(args.n_iter):
        for line, numbers in zip(lines, seeds, strict=True):
            options = {name: value for name, value in line.options.items() if name != "seed"}
            count = options.pop("n_iter", 1) * options.pop("batch_size", 1)
            negative = options.pop("negative_prompt", args.negative_prompt)
            if not groups or groups[-1].options != options:
                groups.append(_Group(options, place=line.place))
            groups[-1].prompts += [line.prompt] * count
            groups[-1].negatives += [negative] * count
            groups[-1].seeds += itertools.islice(numbers, count)
    return groups


def paint(
    args: argparse.Namespace,
    *wishes: dict[str, Any],
    save: Callable[[GenerationResult, int], list[Path]] | None = None,
) -> None:
    """Paint all that the options ask for, saving every batch as soon as it is finished.

    Args:
        wishes: options of StableDiffusion.plan beyond the common ones (picture, mask, strength); the whole
            run is painted for each.
        save: saves a batch of the i-th wish; default: `outdir/samples/00000.png` and on.
    """
    from ldm.images import prepare_folder
    from ldm.results import with_bar

    check(args)
    lines, sampler = lines_of(args), sampler_of(args)
    outdir = prepare_folder(args.outdir)
    if save is None:
        samples = prepare_folder(outdir / "samples")

        def save(result: GenerationResult, wish: int) -> list[Path]:
            pattern = "{:05}" + FORMATS[args.format]
            return result.save(samples, pattern, metadata=not args.no_metadata)

    sd = load_model(args)
    scale = args.scale
    if scale is None and (sd.report is None or sd.report.sampling.guidance_scale is None):
        scale = args.v1_scale
    jobs: list[tuple[int, Job]] = []
    for i, wish in enumerate(wishes or ({},)):
        for group in _groups(args, lines):
            options = {"steps": args.ddim_steps, "guidance_scale": scale, "sampler": sampler}
            options |= {"height": args.H, "width": args.W, "eta": args.ddim_eta, "rng": args.rng}
            options |= {name: getattr(args, name) for name in KNOBS}
            options |= {"batch_size": args.n_samples, "fixed_code": args.fixed_code, **args.like_also}
            options |= wish | group.options
            # All is checked here, before the first picture is begun.
            try:
                job = sd.plan(group.prompts, negative_prompt=group.negatives, seed=group.seeds, **options)
            except UsageError as error:
                if any(name in str(error) for name in group.options):
                    raise UsageError(f"{group.place}: {error}") from None
                raise
            jobs.append((i, job))
    sd.advise([job for _, job in jobs])
    finished: list[tuple[Image.Image, dict[str, Any]]] = []
    for i, job in jobs:
        for result in (step.result for step in with_bar(sd.paint(job)) if step.result is not None):
            if not args.skip_save:
                for path, number in zip(save(result, i), result.seeds, strict=True):
                    say(f"{path} (seed {number})")
            if not args.skip_grid:
                finished += [(image, result.metadata(j)) for j, image in enumerate(result)]
    if len(finished) > 1 or (finished and args.skip_save):  # a grid of one is the picture once more
        _save_grids(args, finished, outdir)
    say(f"Your samples are ready and waiting for you here: {outdir}")


def _save_grids(
    args: argparse.Namespace, finished: list[tuple[Image.Image, dict[str, Any]]], outdir: Path
) -> None:
    """Save grids of all pictures, each with the metadata of its first."""
    from ldm.images import grid, save_numbered
    from ldm.metadata import Painted, png_info

    nrow = args.n_rows or args.n_samples
    at_most = max(nrow, GRID_AT_MOST // nrow * nrow)
    for start in range(0, len(finished), at_most):
        part = finished[start : start + at_most]
        told_first = part[0][1]
        info = None if args.no_metadata else png_info(told_first)
        whole = Painted.of(grid([image for image, _ in part], nrow), lambda told=told_first: told)
        say(str(save_numbered(whole, outdir, "grid-{:04}" + FORMATS[args.format], info)))


# --- OpenAI's chains ---------------------------------------------------------------------------------


def diffusion_parser(name: str, about: str, *, outdir: str, classifies: bool) -> Parser:
    """Make the parser of a script that walks OpenAI's chains, with every flag that describes a network.

    Args:
        classifies: offer a classifier's flags as well.
    """
    from ldm.guided_diffusion.script_util import add_dict_to_argparser

    p = Parser(prog=name, description=about)
    model = p.add_argument_group("with what")
    model.add_argument(
        "--model_path", "-r", "--resume", "--ckpt", metavar="FILE",
        help="OpenAI's model*.pt or ema*.pt, a latent model, or a folder with model.ckpt and config.yaml "
        "(default: the model in the box)",
    )  # fmt: skip
    model.add_argument("--config", help="a latent model's YAML file (default: config.yaml beside it)")
    model.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    _add_optimize(model)
    p.add_argument("--batch_size", type=integer(1, 1024), default=16, help="at once; changes nothing else")
    p.add_argument("--seed", type=seed, default=42, help=SEED_HELP)
    p.add_argument("--outdir", "-l", "--logdir", default=outdir, help="folder for what is written")
    flags = p.add_argument_group(
        "how the network was built (default: read off the file; see docs/openai-models.md)"
    )
    add_dict_to_argparser(flags, _network_flags(classifies))
    return p


def _network_flags(classifies: bool) -> dict[str, Any]:
    from ldm.guided_diffusion import script_util

    return {
        **(script_util.classifier_defaults() if classifies else {}),
        **script_util.sr_model_and_diffusion_defaults(),
        **script_util.model_and_diffusion_defaults(),
        "num_classes": script_util.NUM_CLASSES,
        "sigma_small": False,
    }


def given_flags(parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """Pick those of diffusion_parser's flags that these arguments set."""
    return {name: getattr(args, name) for name in _network_flags(True) if name in parser.given(argv)}
