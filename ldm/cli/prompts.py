"""Prompts from a file: plain lines, A1111's lines of options, or JSON."""

from __future__ import annotations

import argparse
import codecs
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ldm import limits
from ldm.cli.running import say
from ldm.errors import AbsentError, FormatError, UsageError, nearest, shown
from ldm.option_kinds import Files, Interval, Part, Prompt, Regions
from ldm.options import line_names

MAX_PROMPT_BYTES = 10 * 2**20
MAX_PROMPT_LINES = 100_000
MAX_DIGITS = 100  # of a number in a .jsonl file
NAMED = 12  # options that an error lists


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
    if len(name) < 2 or not (name in line_names() or nearest(name, line_names(), 0.75)):
        return Line(Prompt().parse(line))
    said: list[
        tuple[str, list[str]]
    ] = []  # in their order, which counts where flags are said of the one before
    parts: list[str] = []
    never_closed: set[str] = set()  # so that each kind of quote is looked for in vain only once
    at = 0
    while at < len(line):
        option, quote = _OPTION.match(line, at), line[at]
        if option:
            name = option[1].replace("-", "_")
            if any(name == other for other, _ in said) and not _is(name, "is_repeated"):
                raise UsageError(f"option --{name} was given twice; give it once")
            parts = []
            said.append((name, parts))
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
    for name, parts in said:
        if not parts and not _is(name, "is_switch"):
            raise UsageError(f"wanted a value after --{name}, got none")
    return _line([(name, " ".join(parts)) for name, parts in said])


def _is(name: str, what: str) -> bool:
    option = line_names().get(name)
    return option is not None and getattr(option.kind, what)


def _from_json(line: str) -> Line:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise UsageError(f"{shown(name)} was given twice; give it once")
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
        raise UsageError(f"wanted a JSON object with a prompt, got {shown(values)}")
    texts: list[tuple[str, str]] = []
    lists: dict[str, list[Any]] = {}  # of options that are said of others
    for name, value in values.items():
        ours = name.replace("-", "_")
        kind = line_names()[ours].kind if ours in line_names() else None
        if value is None:
            continue
        if isinstance(kind, Part):
            lists[ours] = value if isinstance(value, list) else [value]
            continue
        if isinstance(kind, Regions):  # as texts, or as the API has them
            listed = value if isinstance(value, list) else [value]
            texts += [(ours, kind.word(one)) for one in kind.check(name, listed)]
            continue
        if _is(ours, "is_repeated"):
            listed = value if isinstance(value, list) else [value]
            if not all(isinstance(one, str) for one in listed):
                raise UsageError(f"{name}: wanted a text or a list of texts, got {shown(value)}")
            texts += [(ours, one) for one in listed]
            continue
        is_text = isinstance(kind, Prompt)
        if isinstance(kind, Interval) and isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 20.0 is what some programs write for 20
        if isinstance(value, bool) and _is(ours, "is_switch"):
            value = str(value)
        if isinstance(value, bool) or not isinstance(value, str if is_text else str | int | float):
            raise UsageError(f"{name}: wanted a text{'' if is_text else ' or a number'}, got {shown(value)}")
        texts.append((ours, str(value)))
    return _line(texts + _in_turn(lists))


def _in_turn(lists: dict[str, list[Any]]) -> list[tuple[str, str]]:
    """Bring lists of what is said of adapters into the order of flags: each adapter, and what is said of it.

    Raises:
        UsageError: a list that is neither as long as there are adapters nor a single value for their only one.
    """
    for name, values in lists.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, str | int | float | None):
                raise UsageError(f"{name}: wanted a text, a number or a list of these, got {shown(value)}")
    kinds = {name: line_names()[name].kind for name in lists}
    firsts = [(name, value) for name, values in lists.items() if kinds[name].begins for value in values]
    others = {name: values for name, values in lists.items() if not kinds[name].begins}
    if len(firsts) < 2:  # several hints are a batch's
        return [(name, str(value)) for name, value in firsts] + [
            (name, str(value)) for name, values in others.items() for value in values
        ]
    said: list[tuple[str, str]] = []
    for i, (first, file) in enumerate(firsts):
        said.append((first, str(file)))
        for name, values in others.items():
            if len(values) != len(firsts):
                raise UsageError(
                    f"{name}: wanted {len(firsts)} values, one for each of {len(firsts)} adapters (null = not given), "
                    f"got {len(values)}"
                )
            if values[i] is not None:
                said.append((name, str(values[i])))
    return said


def _line(said: list[tuple[str, str]]) -> Line:
    """Check the options of a line, names and texts in their order, as those of the command line are checked."""
    options: dict[str, Any] = {}
    values: dict[str, list[str]] = {}
    for name, text in said:
        values.setdefault(name, []).append(text)
    for name, texts in values.items():
        option = line_names().get(name)
        if option is None:
            near = nearest(name, line_names())
            ours = list(dict.fromkeys(one.name for one in line_names().values()))
            some = f"{', '.join(ours[:NAMED])} and {len(ours) - NAMED} more, which --help lists"
            raise UsageError(
                f"unknown option {shown(name)}"
                + (f"; did you mean {near!r}?" if near else f"; there are {some}")
            )
        if isinstance(option.kind, Part):
            continue  # below, in their order
        if option.name in options:
            raise UsageError(f"{name}: {option.name} was given twice, by two names; give one")
        if len(texts) > limits.ADAPTERS[1] and isinstance(option.kind, Files):
            raise UsageError(f"{name}: at most {limits.ADAPTERS[1]} adapters work together, got {len(texts)}")
        try:
            found = tuple(map(option.line_kind.parse, texts))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {error}") from None
        options[option.name] = found if option.kind.is_repeated else found[0]
    for name, text in said:
        option = line_names()[name]
        if isinstance(option.kind, Part):
            try:
                options[option.dest] = (*options.get(option.dest, ()), option.kind.parse(text))
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
