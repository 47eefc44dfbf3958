"""The parser of the scripts: validated numbers, near names for misspelt options, usage with an example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from ldm.errors import UsageError, nearest
from ldm.option_kinds import Number, Seed, Whole


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
    # Names that people try as options, without their dashes -> what to write instead.
    instead: Mapping[str, str] = {}

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
        words = self.instead.get(option.lstrip("-").replace("-", "_"))
        if words is not None:
            self.error(f"unknown option {option!r}; write {words}")
        near = nearest(option, self._option_string_actions)
        self.error(f"unknown option {option!r}" + (f"; did you mean {near!r}?" if near else ""))


def integer(low: int, high: int) -> Callable[[str], int]:
    """Make an argparse type that takes whole numbers from low to high, both included."""
    return Whole(low, high).parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type that takes finite numbers from low to high, both included."""
    return Number(low, high).parse


# An argparse type: 0 to 2^64 - 1; "random", or -1 as A1111 has it, is None.
seed = Seed().parse
