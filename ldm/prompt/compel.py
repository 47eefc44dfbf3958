"""compel's prompt language (2.5.1): `cat++`, `(a cat)1.3`, `("a", "b").blend(1, 0.5)`, `.and()`, `cat.swap(dog)`.

Where its grammar has no reading of a text, the text is words, as in compel. Nothing here recurses but for the two
sides of a swap and the texts of a blend or an `.and()`, which hold none of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ldm.errors import UsageError, shown
from ldm.prompt.chunks import check_text

Segment = tuple[str, float]

PLUS, MINUS = 1.1, 0.9
_SWAP = ".swap("
_OPTIONS = {"s_start": 0.0, "s_end": 0.0, "t_start": 0.2, "t_end": 1.0}

_QUOTED = (
    r'"((?:\\.|[^"\\])*+)"'  # possessive: each backslash has one reading, or time would double with each
)
_BRACKET = re.compile(rf"\\.|{_QUOTED}|[()]", re.DOTALL)
_QUOTE = re.compile(_QUOTED, re.DOTALL)
_SPACE = re.compile(r"\s*")
_RUN = re.compile(r'(?:\\[()"]|[^\s(),"])+')
_RUN_INSIDE = re.compile(r'(?:\\[()"]|[^\s(),."])+')
_FREE = re.compile(r"(?:\\[()]|[^\s(])+")
_FOOT = re.compile(r"\++|-+|\d+\.\d*|\.\d+|\d+")
_SIGNS = re.compile(r'(\++|-+)(?=[\s(),"]|$)')
_LORA = re.compile(r"(?:with|use)Lora\(\s*([^\s,()]+)\s*(?:,\s*([^\s,()]*)\s*)?\)")
_WHOLE = re.compile(rf"\s*\(\s*({_QUOTED}\s*(?:,\s*{_QUOTED}\s*)*)\)\.(blend|and)\(([^()]*)\)\s*", re.DOTALL)
_OPTION = re.compile(r"\s*(\w+)\s*=\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")


@dataclass(frozen=True)
class Swap:
    """`original.swap(edited)`: the first is read while the latent is laid out, the second steers its attention."""

    original: tuple[Segment, ...]
    edited: tuple[Segment, ...]
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Blend:
    """The weighted mean of several texts' embeddings; their weighted sum if not `normalize`."""

    texts: tuple[tuple[Segment | Swap, ...], ...]
    weights: tuple[float, ...]
    normalize: bool = True


@dataclass(frozen=True)
class Conjunction:
    """Texts that each have conditioning of their own, with weights, and the LoRAs (name, strength) named in them."""

    texts: tuple[tuple[Segment | Swap, ...] | Blend, ...]
    weights: tuple[float, ...]
    loras: tuple[tuple[str, float], ...] = ()


def parse(text: str) -> Conjunction:
    """Read a prompt of compel's.

    `cat+` multiplies by 1.1 a sign and `cat-` by 0.9, where the signs end a word; `(a cat)++` and `(a cat)1.3` weigh
    what is in the brackets, nested ones together. A bracket opens at the beginning of a word, or where a weight follows
    it. Words are joined by single spaces; in brackets, commas and points are words. `\\(` is a bracket as text.

    Raises:
        UsageError: a blend or `.and()` that is not the whole prompt, or whose weights do not go with its texts; a swap
            inside of another.
    """
    check_text(text)
    loras = []

    def take(match: re.Match) -> str:
        loras.append((match[1], _number(match[2] or "1", "the strength of a LoRA")))
        return " "

    text = _LORA.sub(take, text)
    whole = _WHOLE.fullmatch(text)
    if whole is None:
        for name in (".blend(", ".and("):
            if f'"){name}' in text:
                raise UsageError(
                    f'("...", "..."){name}...) should be the whole prompt; put other words inside'
                )
        return Conjunction((_Reader(text).read(),), (1.0,), tuple(loras))

    texts = tuple(_Reader(_unescape(quoted[1])).read() for quoted in _QUOTE.finditer(whole[1]))
    kind, arguments = whole[4], [part.strip() for part in whole[5].split(",") if part.strip()]
    normalize = "no_normalize" not in arguments
    weights = tuple(_number(part, f"a weight of .{kind}()") for part in arguments if part != "no_normalize")
    weights = weights or (1.0,) * len(texts)
    if len(weights) != len(texts):
        raise UsageError(
            f".{kind}() should have a weight for each of its {len(texts)} texts, or none; got {len(weights)}"
        )
    if kind == "blend":
        return Conjunction((Blend(texts, weights, normalize),), (1.0,), tuple(loras))
    return Conjunction(texts, weights, tuple(loras))


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{what} in a prompt should be a number, got {shown(text)}") from None


def _unescape(text: str) -> str:
    return text.replace('\\"', '"')


class _Reader:
    """Words and their weights, read from left to right."""

    def __init__(self, text: str, in_swap: bool = False):
        self.text, self.in_swap = text, in_swap
        self.partner: dict[int, int] = {}
        self.found: list[tuple[list[str], float] | Swap] = []
        opened = []
        for match in _BRACKET.finditer(text):
            if match[0] == "(":
                opened.append(match.start())
            elif match[0] == ")" and opened:
                self.partner[opened.pop()] = match.start()

    def read(self) -> tuple[Segment | Swap, ...]:
        self._read(0, len(self.text), inside=False)
        joined = [part if isinstance(part, Swap) else (" ".join(part[0]), part[1]) for part in self.found]
        return tuple(joined) or (("", 1.0),)

    def add(self, word: str, weight: float) -> None:
        # The grammar reads an escaped bracket twice: two backslashes go as well.
        for _ in range(2):
            word = word.replace("\\(", "(").replace("\\)", ")")
        last = self.found[-1] if self.found else None
        if last is not None and not isinstance(last, Swap) and last[1] == weight:
            last[0].append(word)
        else:
            self.found.append(([word], weight))

    def _read(self, place: int, end: int, inside: bool) -> None:
        weight, outer = 1.0, []  # of the brackets around this place: (their end, the weight around them)
        text = self.text
        while True:
            place = _SPACE.match(text, place).end()
            while outer and place >= outer[-1][0]:
                place, weight = max(place, outer[-1][1]), outer[-1][2]
                outer.pop()
                place = _SPACE.match(text, place).end()
            if place >= end:
                return
            is_inside = inside or bool(outer)
            if text[place] == "(" and place in self.partner:
                close = self.partner[place]
                if (after := self._swap(place + 1, close, close + 1, weight)) is not None:
                    place = after
                    continue
                foot = _FOOT.match(text, close + 1)
                outer.append((close, foot.end() if foot else close + 1, weight))
                weight *= _factor(foot[0]) if foot else 1.0
                place += 1
                continue
            place = self._word(place, weight, is_inside)

    def _word(self, place: int, weight: float, inside: bool) -> int:
        """Take the word or the quoted words at a place, and give the place behind it and its signs."""
        text = self.text
        if quoted := _QUOTE.match(text, place):
            if (after := self._swap(*quoted.span(1), quoted.end(), weight)) is not None:
                return after
            signs = _SIGNS.match(text, quoted.end())
            self.add(_unescape(quoted[1]), weight * (_factor(signs[0]) if signs else 1.0))
            return signs.end() if signs else quoted.end()
        run = (_RUN_INSIDE if inside else _RUN).match(text, place)
        if run is None and inside:  # a comma, a point, or half a pair of something
            self.add(text[place], weight)
            return place + 1
        if run is not None:
            end = run.end()
            before = end if inside else end - len(".swap") if run[0].endswith(".swap") else None
            if before is not None and before > place:
                if (after := self._swap(place, before, before, weight)) is not None:
                    return after
            word = run[0].rstrip(run[0][-1]) if run[0][-1] in "+-" else ""
            is_followed = end == len(text) or text[end] in '(),"' or text[end].isspace()
            if word and word[-1] != "\\" and is_followed:
                self.add(word, weight * _factor(run[0][len(word) :]))
                return end
            if inside:
                self.add(run[0], weight)
                return end
        return self._free_word(place, weight)

    def _free_word(self, place: int, weight: float) -> int:
        start = place
        while True:
            piece = _FREE.match(self.text, place)
            place = piece.end() if piece else place
            if self.text[place : place + 1] != "(" or (place > start and self._is_weighed(place)):
                break
            place += 1
        self.add(self.text[start:place], weight)
        return place

    def _is_weighed(self, place: int) -> bool:
        """Whether a bracket in the middle of a word has a weight, or a swap, behind it."""
        close = self.partner.get(place)
        return close is not None and (
            _FOOT.match(self.text, close + 1) is not None or self.text.startswith(_SWAP, close + 1)
        )

    def _swap(self, begin: int, end: int, dot: int, weight: float) -> int | None:
        """Take `original.swap(edited, option=number)`, the original from begin to end; None if it is none."""
        bracket = dot + len(_SWAP) - 1
        if not self.text.startswith(_SWAP, dot) or bracket not in self.partner:
            return None
        close = self.partner[bracket]
        edited, options = self.text[bracket + 1 : close], dict(_OPTIONS)
        while "," in edited:
            before, _, last = edited.rpartition(",")
            option = _OPTION.fullmatch(last)
            if option is None or option[1] not in _OPTIONS:
                break
            options[option[1]] = float(option[2])
            edited = before
        if self.in_swap:
            raise UsageError("a prompt has a .swap() inside of another; write them one after the other")
        sides = []
        for side in (self.text[begin:end], edited.strip()):
            if quoted := _QUOTE.fullmatch(side):
                side = _unescape(quoted[1])
            words = _Reader(side, in_swap=True).read()
            sides.append(tuple((word, own * weight) for word, own in words))
        self.found.append(Swap(*sides, options))
        return close + 1


def _factor(foot: str) -> float:
    if foot[0] in "+-":
        try:
            return (PLUS if foot[0] == "+" else MINUS) ** len(foot)
        except OverflowError:
            raise UsageError(
                f"a word of the prompt has {len(foot)} signs behind it; 20 are a weight of 6.7"
            ) from None
    return float(foot)


def has_swaps(tree: Conjunction) -> bool:
    """Tell whether a prompt exchanges attention anywhere."""
    texts = [text for one in tree.texts for text in (one.texts if isinstance(one, Blend) else (one,))]
    return any(isinstance(part, Swap) for text in texts for part in text)


def before_swaps(text: tuple[Segment | Swap, ...]) -> tuple[Segment, ...]:
    """Give a text's segments with the original side of each swap in its place."""
    return tuple(
        segment for part in text for segment in (part.original if isinstance(part, Swap) else (part,))
    )
