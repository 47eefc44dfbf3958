"""Which tokens of a prompt a word is, and which tokens of two prompts stand for each other: prompt-to-prompt's tables.

arXiv:2208.01626, as google/prompt-to-prompt computes them (ptp_utils.py, seq_aligner.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.errors import UsageError, nearest, shown
from ldm.values import Range, check_value

Share = float | Sequence[float]


class ReadsPrompts(Protocol):
    """A text encoder as far as this module looks at it.

    Attributes:
        max_length: tokens of a context, the two marks included.
    """

    max_length: int

    def word_ids(self, text: str) -> list[int]:
        """Turn a prompt into the token numbers of its words, without marks."""


def tokens_of_words(encoder: ReadsPrompts, prompt: str) -> list[tuple[str, list[int]]]:
    """List the words of a prompt, which are parted by spaces, each with the places of its tokens in the context.

    Punctuation belongs to the word that it is glued to. A name of several words that stands for vectors of its own
    (textual inversion) gives all of them to each of its words. What is cut off has no places.
    """
    ids, words = encoder.word_ids(prompt), prompt.split()
    found: list[tuple[str, list[int]]] = []
    first = place = 0
    for last in range(len(words)):
        own = encoder.word_ids(" ".join(words[first : last + 1]))
        if ids[place : place + len(own)] != own and last + 1 < len(words):
            continue  # only together with the next one
        end = place + len(own) if last + 1 < len(words) else len(ids)
        places = [1 + i for i in range(place, end) if i < encoder.max_length - 2]
        found += [(word, places) for word in words[first : last + 1]]
        first, place = last + 1, end
    return found


def tokens_of_word(encoder: ReadsPrompts, prompt: str, word: str | int) -> list[int]:
    """List the places in the context of a word, wherever it stands in a prompt.

    Args:
        word: as it is written there, or its number among the words, from 0. One that is none of the words is looked
            for by its tokens: "cat" in "a cat, sitting", "black cat" in "a black cat".
    """
    words = tokens_of_words(encoder, prompt)
    if isinstance(word, int):
        return words[word][1] if 0 <= word < len(words) else []
    places = [place for one, own in words if one == word for place in own]
    if places:
        return places
    ids, wanted = encoder.word_ids(prompt), encoder.word_ids(word)
    for i in range(len(ids) - len(wanted) + 1 if wanted else 0):
        if ids[i : i + len(wanted)] == wanted:
            places += [1 + j for j in range(i, i + len(wanted)) if j < encoder.max_length - 2]
    return places


def expect_word(encoder: ReadsPrompts, prompts: Sequence[str], word: str | int, what: str) -> list[list[int]]:
    """List the places of a word in each of several prompts.

    Args:
        what: the argument that names it, for the message.

    Raises:
        UsageError: it is in none of them, or behind what is read of them.
    """
    found = [tokens_of_word(encoder, prompt, word) for prompt in prompts]
    if not any(found):
        words = [one for prompt in prompts for one in prompt.split()]
        if word in words:
            raise UsageError(
                f"{what} names {shown(word)}, which stands behind the {encoder.max_length - 2} tokens of a prompt that "
                "the model reads; shorten the prompt, or move the word to the front"
            )
        near = nearest(word, words, 0.5)
        hint = f"; did you mean {shown(near)}?" if near else "; its words are those between spaces"
        where = shown(prompts[0]) if len(prompts) == 1 else f"none of {len(prompts)} prompts"
        is_there = "is not in" if len(prompts) == 1 else "is in"
        raise UsageError(f"{what} names {shown(word)}, which {is_there} {where}{hint}")
    return found


# --- two prompts ------------------------------------------------------------------------------------


def replacement(encoder: ReadsPrompts, source: str, edit: str) -> Tensor:
    """Say which token of an edited prompt takes how much of each token's map of its source: words replaced.

    Both have as many words. A word of another number of tokens shares its maps out evenly. Behind the last replaced
    word each token takes that of its own place, though the places may have shifted: as the authors' program does.

    Returns:
        (max_length, max_length): from tokens of the source (rows) to those of the edit.

    Raises:
        UsageError: another number of words.
    """
    ours, theirs = tokens_of_words(encoder, source), tokens_of_words(encoder, edit)
    if len(ours) != len(theirs):
        raise UsageError(
            f"to replace, prompts must have as many words: {len(ours)} in {shown(source)}, {len(theirs)} in "
            f"{shown(edit)}, without a pair: {_unpaired(source, edit)}; change the prompt, or take kind='refine'"
        )
    length = encoder.max_length
    mapper = torch.zeros(length, length)
    pairs = [(a, b) for (one, a), (other, b) in zip(ours, theirs, strict=True) if one != other and a and b]
    i = j = 0
    for a, b in pairs:
        while i < a[0] and j < length:
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        here, there = range(i, min(i + len(a), length)), range(j, min(j + len(b), length))
        if len(a) == len(b):
            mapper[list(here), list(there)] = 1
        else:
            mapper[here.start : here.stop, there.start : there.stop] = 1 / len(b)
        i, j = i + len(a), j + len(b)
    while i < length and j < length:
        mapper[j, j] = 1
        i, j = i + 1, j + 1
    return mapper


def _unpaired(source: str, edit: str) -> str:
    """Name the words of two prompts that have no pair, when their common ones stand for each other."""
    a, b = source.split(), edit.split()
    left: list[str] = []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal" and j - i != n - k:
            several = a[i:j] if j - i > n - k else b[k:n]
            left += several if len(several) < 5 else [*several[:4], "..."]
    return shown(" ".join(left))


def refinement(encoder: ReadsPrompts, source: str, edit: str) -> tuple[Tensor, Tensor]:
    """Say which token of an edited prompt takes the map of which token of its source: words added or left out.

    Tokens are aligned as wholes (Needleman and Wunsch: 1 for equal ones, -1 for others, 0 for a gap); one without a
    pair keeps its own map.

    Returns:
        (max_length, max_length), one 1 in each column or none, as `replacement`; and (max_length,), 1 where a token
        has a pair, 0 where it is new.
    """
    most, length = encoder.max_length - 2, encoder.max_length
    start, end = -1, -2  # marks, which only equal each other
    x, y = ([start, *encoder.word_ids(prompt)[:most], end] for prompt in (source, edit))
    pairs = _aligned(x, y)
    pairs += range(len(y), length)  # padding keeps its place
    mapper = torch.zeros(length, length)
    for place, pair in enumerate(pairs):
        if pair is not None:
            mapper[pair, place] = 1
    has_pair = torch.tensor([float(pair is not None) for pair in pairs])
    return mapper, has_pair


def _aligned(x: Sequence[int], y: Sequence[int]) -> list[int | None]:
    """Give the place in x that each of y is aligned with; of equally good ways a gap in x, then one in y goes first."""
    score = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, one in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            both = score[i - 1][j - 1] + (1 if one == other else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], both)
    pairs: list[int | None] = []
    i, j = len(x), len(y)
    while j > 0:
        if i == 0 or score[i][j] == score[i][j - 1]:
            pairs.append(None)
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append(i)
    return pairs[::-1]


# --- over the steps ---------------------------------------------------------------------------------


def check_share(given: Any, name: str) -> tuple[float, float]:
    """Return a part of the steps, 0 (the first) to 1 (behind the last); one number is where it ends.

    Raises:
        UsageError: not from 0 to 1, or it ends before it begins.
    """
    several = given if isinstance(given, list | tuple) else (0.0, given)
    if len(several) != 2:
        raise UsageError(
            f"{name} should be a number from 0 to 1, or where it begins and ends, got {shown(given)}"
        )
    low, high = (float(check_value(one, float, name, Range(0, 1))) for one in several)
    if low > high:
        raise UsageError(f"{name} should begin before it ends, got {shown(given)}")
    return low, high


def replaced_steps(
    encoder: ReadsPrompts,
    edits: Sequence[str],
    share: tuple[float, float],
    of_words: Mapping[str, tuple[float, float]],
    total: int,
) -> Tensor:
    """Say at which steps which tokens of edited prompts take maps of the source.

    Args:
        share: part of the steps, for all tokens.
        of_words: other ones, for some words.
        total: number of steps.

    Returns:
        (total + 1, edits, max_length) of 0 and 1; the shares count one step more than there are, as the authors'.
    """
    table = torch.zeros(total + 1, len(edits), encoder.max_length)

    def put(bounds: tuple[float, float], edit: int, places: Any) -> None:
        begin, end = (int(one * (total + 1)) for one in bounds)
        steps = torch.arange(total + 1)
        table[:, edit, places] = ((begin <= steps) & (steps < end)).float()[:, None]

    for edit, prompt in enumerate(edits):
        put(share, edit, list(range(encoder.max_length)))
        for word, bounds in of_words.items():
            put(bounds, edit, tokens_of_word(encoder, prompt, word))
    return table


def weights_of_words(encoder: ReadsPrompts, edits: Sequence[str], equalizer: Mapping[str, float]) -> Tensor:
    """Give factors of the maps of tokens, (edits, max_length): those that a word has, 1 for all others."""
    factors = torch.ones(len(edits), encoder.max_length)
    for word, factor in equalizer.items():
        for edit, prompt in enumerate(edits):
            factors[edit, tokens_of_word(encoder, prompt, word)] = factor
    return factors
