"""What is known to go wrong with a request, said in one line each before the first step; nothing here is refused."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm import options
from ldm.checkpoints.sampling import SamplingDefaults
from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.samplers import SAMPLERS, resolve_sampler
from ldm.process.sigmas import WITH_OWN_ENDS
from ldm.prompt.a1111 import without_comments

if TYPE_CHECKING:
    from ldm.request import Request

NAMED_WORDS = 12  # unseen words spelt out; the rest are counted
SHOWN_WORDS = 60  # of a vocabulary small enough to be shown
SHOWN_FOUND = 40  # characters of a piece of foreign syntax
SEED_BITS = 32  # that torch's CPU generator keeps

# --- words ----------------------------------------------------------------------------------------

_MARKS = re.compile(r"<\|(?:start|end)oftext\|>")
# Letters and digits with apostrophes inside; or one sign beyond ASCII's punctuation, such as a smiley.
_WORD = re.compile(rf"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s{re.escape(string.punctuation)}]")


def unseen_words(known: frozenset[str], texts: Iterable[str]) -> list[str]:
    """List the words of texts that are not among the known ones, each once, in their order.

    Figures and names that are other programs' syntax are left to `about_syntax`: the 1.3 of "(red:1.3)" is no word.
    """
    found: dict[str, None] = {}
    for text in dict.fromkeys(texts):
        plain = unicodedata.normalize("NFKC", _MARKS.sub(" ", _words_alone(text))).lower()
        for word in _WORD.findall(plain):
            # Curly quotes, dashes and invisible marks part words and are none.
            if word not in known and unicodedata.category(word[0])[0] not in "PCMZ":
                found[word] = None
    return list(found)


def about_words(known: frozenset[str], texts: Iterable[str]) -> str | None:
    """Say which words of texts a model of few words has never seen, or None."""
    unseen = unseen_words(known, texts) if known else []
    if not unseen:
        return None
    more = f" and {len(unseen) - NAMED_WORDS} more" if len(unseen) > NAMED_WORDS else ""
    knows = f"; it knows: {' '.join(sorted(known))}" if len(known) <= SHOWN_WORDS else ""
    named = ", ".join(word[:SHOWN_FOUND] for word in unseen[:NAMED_WORDS])
    return (
        f"the model has never seen these words and paints something of its own for them: {named}{more}{knows}"
    )


# --- other programs' prompt syntax ------------------------------------------------------------------

_NUMBER = r"[+-]?(?:\d{1,2}(?:\.\d{0,6})?|\.\d{1,6})"
# Kind -> what it looks like, each found in time linear in the text. What stands in ordinary English has to pass:
# (a cat), [sic], (16:9), (Genesis 1:3), [12:30:45], Disney+, C++, a dash--like this, <3.
_SYNTAX: dict[str, re.Pattern[str]] = {
    "a weight": re.compile(
        rf"\([^()]*(?:[^\d\s():]:{_NUMBER}|[^\d\s():]:\s{{1,9}}[01]\.\d{{1,6}}|[^\W\d_]\d{{1,9}}:[01]?\.\d{{1,6}})\s{{0,9}}\)"
        rf"|\)\s?:{_NUMBER}\s{{0,9}}\)"
    ),
    # Not the sad face :((
    "emphasis by doubled brackets": re.compile(
        r"(?<![:;='])\(\([^()]+[()]|\[\[[^\[\]]+[\[\]]|\{\{[^{}]+[{}]"
    ),
    "a change of the prompt while painting": re.compile(
        r"\[[^\[\]]*(?:[^\d\s\[\]:]:\d{1,4}|:[^\[\]:]*[^\d\s\[\]:]\s{0,9}:\s{0,9}\d{1,4}(?:\.\d{1,6})?"
        r"|::\s{0,9}\d{1,4}(?:\.\d{1,6})?|:\s{0,9}0?\.\d{1,6})\s{0,9}\]"
    ),
    "alternatives": re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"),
    "a choice of texts": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "a network to load": re.compile(r"<(?:lora|lyco|hypernet)\w{0,20}\s{0,9}:[^<>]+>", re.IGNORECASE),
    "an embedding": re.compile(r"\bembedding:[^\s:,]{1,80}|<[A-Za-z][\w-]{1,60}>", re.IGNORECASE),
    "a wildcard": re.compile(r"(?<![\w/*.-])__[\w/*.-]{1,80}__(?!\w)"),
    "a weight in compel's manner": re.compile(
        r"(?<=[^\W\d_]{2})\+{2,9}(?![\w+])|\)(?:\+{1,9}(?![\w+])|-{1,9}(?=[\s,.]|$))"
        r"|(?<=[^\W\d_]{2})-{2,9}(?=[,.]|$)|\)[01]?\.\d{1,6}|\)\.(?:swap|blend|and)\((?:[\d\s.,+-]{1,80}\))?"
    ),
    "an option": re.compile(
        r"(?<!\S)--(?:ar|aspect|no|v|stylize|chaos|niji|iw|tile|weird|seed|steps|prompt|negative[_-]prompt|width|height"
        r"|cfg[_-]scale|sampler(?:[_-]name)?)(?!\S)(?:\s{1,9}[\d.:]{1,9}(?!\S))?|(?<=[^\W_])::-?[\d.]{1,9}(?!\S)"
    ),
    "an escaped bracket": re.compile(r"\\[()\[\]{}]"),
}
_PARTS = "a joint between prompts"
FOREIGN_SYNTAX = frozenset({*_SYNTAX, _PARTS})  # the kinds
_BETWEEN = re.compile(r"\b(?:AND|BREAK)\b")
# Kinds of which nothing is a word, and what is none in the others: weights, places, counts.
_NO_WORDS = frozenset(
    {"a network to load", "an embedding", "a wildcard", "a weight in compel's manner", "an option"}
)
_FIGURES = re.compile(rf":\s{{0,9}}{_NUMBER}(?![^\W_])|{_NUMBER}(?=::)|\d{{1,9}}(?:-\d{{1,9}})?\$\$")
_WEIGHT_OF_PART = re.compile(rf":\s?{_NUMBER}(?=\s{{1,9}}(?:AND|BREAK)\b|\s{{0,9}}\Z)")


def foreign_syntax(text: str) -> dict[str, str]:
    """Find what other programs read as more than words: kind -> the first piece of it."""
    found = {kind: match[0] for kind, pattern in _SYNTAX.items() if (match := pattern.search(text))}
    for match in _BETWEEN.finditer(text):
        before = text[max(match.start() - 80, 0) : match.start()].split()[-1:]
        after = text[match.end() : match.end() + 80].split()[:1]
        # Between words in capitals it is one of them; alone it is a prompt of one word.
        if any(letter.isalpha() and not letter.isupper() for letter in "".join(before + after)):
            found[_PARTS] = match[0]
            break
    return found


def _words_alone(text: str) -> str:
    """Take what no word is out of foreign syntax; the words in it stay, for they are painted."""
    if _PARTS in foreign_syntax(text):
        text = _WEIGHT_OF_PART.sub(" ", text)
    for kind, pattern in _SYNTAX.items():
        text = pattern.sub(" " if kind in _NO_WORDS else lambda piece: _FIGURES.sub(" ", piece[0]), text)
    return text


def _without_joints(text: str) -> str:
    """Take the joints between a prompt's parts, and the parts' weights, out of it: they are read as such."""
    return _BETWEEN.sub(" ", _WEIGHT_OF_PART.sub(" ", text))


# Kind -> what there is here for it; the others are said in words.
_HERE = {
    "a network to load": "give --lora FILE:weight, in Python adapters=[LoRA(file, weight)] of ldm.adapters",
    "an embedding": "give --embedding FILE, in Python adapters=[Embedding(file)] of ldm.adapters",
    "a choice of texts": "give variants=True (--variants), and one is drawn",
    "a wildcard": "give wildcards=FOLDER (--wildcards FOLDER), and a line of its file is drawn",
}


# Kind -> the language of ldm.prompt that has it.
_LANGUAGE_OF = {
    "a weight": "a1111",
    "emphasis by doubled brackets": "a1111",
    "a change of the prompt while painting": "a1111",
    "alternatives": "a1111",
    "an escaped bracket": "a1111",
    _PARTS: "a1111",
    "a weight in compel's manner": "compel",
}


def about_syntax(texts: Iterable[str]) -> dict[str, str]:
    """Say of each kind of foreign syntax in texts, kind -> a line, that it is painted as plain text."""
    lines: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        for kind, piece in foreign_syntax(text).items():
            shown = piece if len(piece) <= SHOWN_FOUND else f"{piece[: SHOWN_FOUND - 3]}..."
            instead = _HERE.get(kind, "say it in words")
            if kind in _LANGUAGE_OF:
                name = _LANGUAGE_OF[kind]
                instead = f"ldm.prompt reads it, give prompt_syntax='{name}' (--syntax {name})"
            lines.setdefault(
                kind, f"'{shown}' is {kind} to other programs; here it is read as plain text: {instead}"
            )
    return lines


def without_names(texts: Iterable[str], adapters: Iterable[Any]) -> list[str]:
    """Take the names of embeddings that are given out of texts: they are known, and no other program's syntax."""
    names = [name for one in adapters for name in getattr(one, "names", ())]
    if not names:
        return list(texts)
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)", re.IGNORECASE)
    return [pattern.sub(" ", text) for text in texts]


# --- sizes, steps, strengths, seeds -----------------------------------------------------------------


def about_size(known: tuple[int, int] | None, width: int, height: int) -> str | None:
    """Say that a picture is smaller or larger than what the model was made for, or None."""
    if known is None or all(known[0] <= side <= known[1] for side in (width, height)):
        return None
    if known[0] == known[1]:
        sizes = f"pictures of {known[0]} x {known[0]} pixels only"
    else:
        sizes = f"sides from {known[0]} to {known[1]} pixels"
    return f"the model knows {sizes}; at {width} x {height} expect noise or repetition: choose such a size"


def about_steps(least: Mapping[str, int], sampler: str, steps: int) -> str | None:
    """Say that a sampler needs more steps on this model, and what does with as many; or None."""
    wanted = least.get(sampler, 0)
    if steps >= wanted:
        return None
    others = [name for name in sorted(least, key=least.__getitem__) if least[name] <= steps]
    instead = f", or {others[0]}, which paints well with {steps}" if others else ""
    return f"{sampler} with {steps} steps paints badly on this model: give it {wanted} or more{instead}"


def about_strength(strength: float | None, steps: int, run: int) -> str | None:
    """Say that a strength is too small for a single step, so that the picture comes back; 0 asks for just that."""
    if not strength or run:
        return None
    return (
        f"strength {strength:g} of {steps} steps is less than one step, so the picture comes back unchanged; "
        f"give strength {math.ceil(1000 / steps) / 1000:g} or more, or more steps"
    )


def about_ends(sampler: str, spacing: Any, ends: Mapping[str, float | None]) -> str | None:
    """Say that sigma_min or sigma_max does nothing to a spacing that has ends of its own, as in A1111; or None."""
    spacing = SAMPLERS[sampler].spacing if spacing is None else spacing
    given = [name for name, value in ends.items() if value is not None]
    if not given or not isinstance(spacing, str) or spacing not in WITH_OWN_ENDS:
        return None
    verb = "do" if len(given) > 1 else "does"
    return (
        f"{' and '.join(given)} {verb} nothing to the spacing {spacing}, which has ends of its own: leave that out, or "
        "take another spacing, as karras"
    )


def about_seeds(seeds: Iterable[int]) -> str | None:
    """Say which smaller seed paints the same as the first one that has more bits than the generator keeps."""
    wide = next((seed for seed in seeds if seed >= 2**SEED_BITS), None)
    if wide is None:
        return None
    return f"seed {wide} paints what seed {wide % 2**SEED_BITS} paints: the generator on the CPU keeps {SEED_BITS} bits"


def about_unread(requests: Sequence[Request]) -> dict[str, str]:
    """Say which options do nothing because they are of other prompt languages than those of these requests."""
    lines = {}
    for one in options.options():
        asked = [request for request in requests if getattr(request, one.name, one.default) != one.default]
        read = dict.fromkeys(request.prompt_syntax for request in asked)
        if one.syntaxes and asked and not read.keys() & set(one.syntaxes):
            lines[one.name] = (
                f"{one.name} is of prompts in {' or '.join(one.syntaxes)}, and does nothing to {', '.join(read)} ones: "
                f"give prompt_syntax='{one.syntaxes[0]}' (--syntax {one.syntaxes[0]}), or leave it out"
            )
    return lines


def by_sampler(least_steps: Mapping[str, int]) -> dict[str, int]:
    """Give a configuration's fewest steps by the samplers' own names.

    Raises:
        MismatchError: there is no such sampler.
    """
    try:
        return {resolve_sampler(name): steps for name, steps in least_steps.items()}
    except UsageError as error:
        raise MismatchError(f"the configuration's 'sampling.least_steps': {error}") from None


def advice(requests: Sequence[Request], defaults: SamplingDefaults, *, on_cpu: bool = True) -> dict[str, str]:
    """Say what is known to go wrong with the parts of one run: kind of trouble -> line.

    Args:
        on_cpu: the model is there, so that rng="compvis" draws there, too; a GPU's own generator keeps 64 bits.
    """
    texts: dict[str, None] = {}
    plain: dict[str, None] = {}
    lines: dict[str, str | None] = {}
    for request in requests:
        if request.embeds is None:
            images = [spec for one in request.passes for spec in one.images(request.images)]
            own = dict.fromkeys([*(spec.prompt for spec in images), *(one.prompt for one in request.regions)])
            if request.guidance_scale != 1:
                own |= dict.fromkeys(spec.negative_prompt for spec in images)
            own = dict.fromkeys(without_names(own, request.adapters))
            is_plain = request.prompt_syntax == "plain"
            if request.prompt_syntax == "a1111":
                own = dict.fromkeys(map(without_comments, own))
            texts |= own if is_plain else dict.fromkeys(map(_without_joints, own))
            plain |= own if is_plain else {}
        keeps_32_bits = request.rng == "image" or (request.rng == "compvis" and on_cpu)
        seeds = [spec.seed for spec in request.images] if keeps_32_bits else []
        ends = {name: getattr(request, name) for name in ("sigma_min", "sigma_max")}
        for kind, line in (
            ("size", about_size(defaults.known_sizes, request.width, request.height)),
            ("steps", about_steps(defaults.least_steps, request.sampler, request.steps)),
            ("strength", about_strength(request.strength, request.steps, request.run_last)),
            ("ends", about_ends(request.sampler, request.spacing, ends)),
            ("seed", about_seeds(seeds)),
        ):
            lines[kind] = lines.get(kind) or line
    lines = {"words": about_words(defaults.known_words, texts), **lines, **about_syntax(plain)}
    lines |= about_unread(requests)
    return {kind: line for kind, line in lines.items() if line is not None}
