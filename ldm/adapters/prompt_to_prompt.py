"""Prompt-to-prompt (arXiv:2208.01626): edit a picture by its prompt alone, with the attention of the picture itself.

    sd.txt2img(["a cat on a mat", "a dog on a mat"], seed=[5, 5], adapters=[PromptToPrompt()])

The first picture of a batch is the source; the others begin with the same noise, and for a part of the steps look at
their words where the source looked. Numbers and defaults are those of google/prompt-to-prompt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.attention_control import AttentionControl, Place, check_batch, halved, places_of
from ldm.errors import UsageError, shown
from ldm.limits import BATCH_SIZE
from ldm.modules.seams import StepInfo, Undo
from ldm.prompt.alignment import (
    ReadsPrompts,
    check_share,
    expect_word,
    refinement,
    replaced_steps,
    replacement,
    weights_of_words,
)
from ldm.values import Range, check_value

BLEND_CELLS = 16  # a side of the maps that a local blend reads, or the nearest that the UNet has
Words = str | Sequence[str]


@dataclass(frozen=True)
class LocalBlend:
    """Keep an edited picture as its source is where neither looks at certain words.

    Args:
        words: of each prompt of the batch, the source's first, one or several; or one word of all of them.
        keep: words whose place stays as it is, likewise; None = none.
        threshold: from where on a place belongs to the words, as a share of their map's largest value.
        start: share of the steps that are taken before, 0 to 1.

    Raises:
        UsageError: a number out of range, or no words.
    """

    words: Words | Sequence[Words]
    keep: Words | Sequence[Words] | None = None
    threshold: float = 0.3
    start: float = 0.2

    def __post_init__(self) -> None:
        for name in ("threshold", "start"):
            object.__setattr__(self, name, float(check_value(getattr(self, name), float, name, Range(0, 1))))
        for name in ("words", "keep"):
            given = getattr(self, name)
            if given is not None or name == "words":
                _expect_words(given, name)

    def chosen(self, encoder: ReadsPrompts, prompts: Sequence[str], name: str) -> Tensor | None:
        """Give (prompts, max_length), 1 at the tokens of the words; None where there are none to keep.

        Raises:
            UsageError: another number of words than prompts, or one that is not in its prompt.
        """
        given = getattr(self, name)
        if given is None:
            return None
        rows = [given] * len(prompts) if isinstance(given, str) else list(given)
        if len(rows) != len(prompts):
            raise UsageError(
                f"{name} of a LocalBlend should be of each of {len(prompts)} prompts, the source's first, "
                f"got {len(rows)}"
            )
        table = torch.zeros(len(prompts), encoder.max_length)
        for i, (prompt, words) in enumerate(zip(prompts, rows, strict=True)):
            for word in [words] if isinstance(words, str) else words:
                table[i, expect_word(encoder, [prompt], word, f"{name} of a LocalBlend")[0]] = 1
        return table

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        plain = {"words": _listed(self.words), "threshold": self.threshold, "start": self.start}
        return plain if self.keep is None else plain | {"keep": _listed(self.keep)}


def _expect_words(given: Any, name: str) -> None:
    rows = [given] if isinstance(given, str) else given
    if isinstance(rows, list | tuple) and 0 < len(rows) <= BATCH_SIZE[1]:
        words = [word for row in rows for word in ([row] if isinstance(row, str) else row)]
        if words and all(isinstance(word, str) and word for word in words):
            return
    raise UsageError(
        f"{name} of a LocalBlend should be a word, or one or several of each prompt, got {shown(given)}"
    )


def _listed(words: Any) -> Any:
    return words if isinstance(words, str) else [_listed(one) for one in words]


def blend_mask(maps: Tensor, sides: tuple[int, int], size: tuple[int, int], threshold: float, pool: bool):
    """Tell where pictures look at words, or their source does.

    Args:
        maps: (b, n) of the words together, the source's first.
        sides: of their map; size: (h, w) of the latents.
        pool: take the largest of 3 x 3 cells before.

    Returns:
        (b, 1, h, w) bool.
    """
    maps = maps.reshape(len(maps), 1, *sides)
    if pool:
        maps = F.max_pool2d(maps, 3, stride=1, padding=1)
    mask = F.interpolate(maps, size=size)
    mask = mask / mask.amax(dim=(2, 3), keepdim=True) > threshold
    return mask[:1] | mask


class PromptToPrompt(AttentionControl):
    """Prompt-to-prompt in a batch whose first picture is the source.

    Of attention nothing is kept from one call to the next but what a local blend reads: a map of about 16 x 16 cells
    for each picture, 4 bytes a cell, and another one with words to keep. Maps between cells are never made.

    Args:
        kind: "replace" words by others, as many; "refine" a prompt by words added or left out, which keep their own
            maps; None = replace where a prompt has as many words as the source's, else refine.
        cross_replace_steps: share of the steps, from the first on, in which an edited picture looks at words where its
            source does; or (begin, end); or {"default_": share, word: share, ...}.
        self_replace_steps: likewise, in which its cells look at each other as the source's do: keeps the layout.
        equalizer: {word: factor} of an edited prompt, by which it is looked at more, or less: 1 = as it is.
        local_blend: a LocalBlend: where the picture stays as the source is.
        self_cells: self-attention is replaced on maps of up to so many cells a side; the paper's notebook has 16, a
            later one 32.

    Raises:
        UsageError: a value out of range; when prompts come, fewer than two, of different seeds, of different structure,
            or without a word that is named.
    """

    def __init__(
        self,
        kind: Literal["replace", "refine"] | None = None,
        *,
        cross_replace_steps: float | Sequence[float] | Mapping[str, Any] = 0.8,
        self_replace_steps: float | Sequence[float] = 0.4,
        equalizer: Mapping[str, float] | None = None,
        local_blend: LocalBlend | None = None,
        self_cells: int = 32,
    ):
        super().__init__()
        if kind not in (None, "replace", "refine"):
            raise UsageError(f"kind should be 'replace', 'refine' or None, got {shown(kind)}")
        self.kind = kind
        self.of_words = {}
        default = cross_replace_steps
        if isinstance(cross_replace_steps, Mapping):
            self.of_words = {
                word: check_share(share, f"cross_replace_steps of {shown(word)}")
                for word, share in cross_replace_steps.items()
                if word != "default_"
            }
            default = cross_replace_steps.get("default_", 1.0)
        self.cross_steps = check_share(default, "cross_replace_steps")
        self.self_steps = check_share(self_replace_steps, "self_replace_steps")
        if not isinstance(equalizer, Mapping | None):
            raise UsageError(
                f"equalizer should be a dictionary such as {{'red': 2.0}}, got {shown(equalizer)}"
            )
        self.equalizer = {
            word: float(check_value(factor, float, f"equalizer of {shown(word)}", Range(-1000, 1000)))
            for word, factor in (equalizer or {}).items()
        }
        if not isinstance(local_blend, LocalBlend | None):
            raise UsageError(f"local_blend should be a LocalBlend of words, got {shown(local_blend)}")
        self.local_blend = local_blend
        self.self_cells = int(check_value(self_cells, int, "self_cells", Range(0, 1024)))
        self._of_batch: _Tables | None = None
        self._blending: _Blending | None = None

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "cross_replace_steps": list(self.cross_steps),
            "self_replace_steps": list(self.self_steps),
        }
        if self.of_words:
            found["cross_replace_steps"] = {
                "default_": list(self.cross_steps),
                **{word: list(share) for word, share in self.of_words.items()},
            }
        if self.equalizer:
            found["equalizer"] = dict(self.equalizer)
        if self.local_blend is not None:
            found["local_blend"] = self.local_blend.describe()
        return found | ({"self_cells": self.self_cells} if self.self_cells != 32 else {})

    # --- for one batch, and one run ---

    def for_batch(self, encoder: ReadsPrompts, prompts: Sequence[str], seeds: Sequence[int]) -> Self:
        """Return one for a batch: its prompts, the source's first, and the seeds of its pictures.

        Raises:
            UsageError: see the class.
        """
        check_batch("prompt-to-prompt", prompts, seeds)
        mine = copy.copy(self)
        mine._of_batch = _Tables.of(self, encoder, prompts)
        return mine

    def begin(self) -> Self:
        mine = super().begin()
        mine._blending = None if self._of_batch is None else _Blending.of(mine)
        return mine

    @property
    def tables(self) -> _Tables:
        """What it does with the batch that it is for."""
        if self._of_batch is None:
            raise UsageError(
                "PromptToPrompt works in a batch of pictures, which a UNet alone does not know; give it to adapters= "
                "of txt2img, img2img, inpaint or stream, or as editor= of edit"
            )
        return self._of_batch

    # --- in an attention ---

    def looks_at(self, place: Place) -> bool:
        self.tables  # noqa: B018 (raises where it has none)
        if not place.is_cross:
            return self._replaces_self()
        return self.tables.replaces(self._step) or self._may_blend(place)

    def _may_blend(self, place: Place) -> bool:
        return self._blending is not None and place.is_cross and place.part != "mid"

    def _blends(self, place: Place) -> bool:
        return self._may_blend(place) and self._blending.reads(place.halvings, self._latents)

    def _replaces_self(self) -> bool:
        begin, end = (int(self._step.total * one) for one in self.self_steps)
        return begin <= self._step.index < end

    def tokens(self, place: Place, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Let edited pictures have the source's map in a self-attention: that of its queries and keys."""
        if place.is_cross or not self._replaces_self() or q.shape[2] > self.self_cells**2:
            return q, k, v
        self.expect_whole(place, q.shape[2])
        q, k = q.clone(), k.clone()
        for rows in self.groups(len(q)):
            q[rows], k[rows] = q[rows.start : rows.start + 1], k[rows.start : rows.start + 1]
        return q, k, v

    def wants_maps(self, place: Place) -> bool:
        return place.is_cross and (self.tables.replaces(self._step) or self._blends(place))

    def maps(self, place: Place, maps: Tensor) -> Tensor:
        """Let edited pictures look at words where the source does, and note where a local blend's words are."""
        groups = self.groups(len(maps))
        if self.tables.replaces(self._step):
            maps = maps.clone()
            for rows in groups:
                self.tables.replace(maps[rows], self._step)
        if groups and self._blends(place):
            self._blending.note(maps[groups[0]], place.cells(self._latents))
        return maps

    def check(self, unet: nn.Module) -> None:
        super().check(unet)
        if self.local_blend is not None:
            halvings_to_blend(unet)

    def attach(self, network: nn.Module) -> Undo:
        if self._blending is not None:
            self._blending.halvings = halvings_to_blend(network)
        return super().attach(network)

    def change_samples(self, x: Tensor) -> Tensor:
        """Change samples (b, ...) behind a step: the local blend, where there is one."""
        return x if self._blending is None else self._blending.blend(x, self._step)


def halvings_to_blend(unet: nn.Module) -> frozenset[int]:
    """List how often sides are halved at the attentions to words on the way down and up, of which a local blend reads.

    Raises:
        UsageError: there are none.
    """
    found = frozenset(place.halvings for place in places_of(unet) if place.is_cross and place.part != "mid")
    if not found:
        raise UsageError(
            "a local blend reads attention to words on the way down or up, and this UNet has none"
        )
    return found


class _Tables:
    """What becomes of the maps of one batch.

    Args:
        mapper: (edits, tokens, tokens) from the source's tokens to an edit's.
        has_pair: (edits, tokens), 1 where a token takes the source's map.
        factors: (edits, tokens) of the maps.
        steps_of: of a total, (total + 1, edits, tokens), 1 at the steps where a token's map is changed.
        chosen, kept: (prompts, tokens) of the local blend, or None.
    """

    def __init__(
        self, mapper: Tensor, has_pair: Tensor, factors: Tensor, steps_of: Any, chosen: Any, kept: Any
    ):
        self.mapper, self.has_pair, self.factors = mapper, has_pair, factors
        self.chosen, self.kept = chosen, kept
        self._steps_of, self._steps = steps_of, {}

    @classmethod
    def of(cls, given: PromptToPrompt, encoder: ReadsPrompts, prompts: Sequence[str]) -> _Tables:
        """Make those of a batch's prompts, the source's first."""
        source, *edits = prompts
        for what, words in (("equalizer", given.equalizer), ("cross_replace_steps", given.of_words)):
            for word in words:
                expect_word(encoder, edits, word, what)
        mappers, pairs = [], []
        for edit in edits:
            kind = given.kind or ("replace" if len(source.split()) == len(edit.split()) else "refine")
            if kind == "replace":
                mapper, has_pair = replacement(encoder, source, edit), torch.ones(encoder.max_length)
            else:
                mapper, has_pair = refinement(encoder, source, edit)
            mappers.append(mapper)
            pairs.append(has_pair)
        blend = given.local_blend
        return cls(
            torch.stack(mappers),
            torch.stack(pairs),
            weights_of_words(encoder, edits, given.equalizer),
            lambda total: replaced_steps(encoder, edits, given.cross_steps, given.of_words, total),
            None if blend is None else blend.chosen(encoder, prompts, "words"),
            None if blend is None else blend.chosen(encoder, prompts, "keep"),
        )

    def _now(self, step: StepInfo) -> Tensor:
        if step.total not in self._steps:
            self._steps[step.total] = self._steps_of(step.total)
        return self._steps[step.total][step.index]

    def replaces(self, step: StepInfo) -> bool:
        """Tell whether any map is changed at a step."""
        return bool(self._now(step).any())

    def replace(self, maps: Tensor, step: StepInfo) -> None:
        """Change maps (prompts, heads, n, m) of a batch in place; tokens behind the text's keep their own."""
        length = self.mapper.shape[1]
        mapper, has_pair, factors, now = (
            one.to(maps) for one in (self.mapper, self.has_pair, self.factors, self._now(step))
        )
        has_pair, factors, now = (one[:, None, None] for one in (has_pair, factors, now))
        source, own = maps[0, ..., :length], maps[1:, ..., :length]
        new = torch.einsum("hpw,bwn->bhpn", source, mapper)
        new = (new * has_pair + own * (1 - has_pair)) * factors
        own.copy_(new * now + own * (1 - now))


class _Blending:
    """A local blend in one run: where its words were looked at so far, a map for each picture.

    Attributes:
        halvings: those of the attentions that it may read, of which it reads the nearest to 16 x 16 cells.
    """

    def __init__(self, blend: LocalBlend, chosen: Tensor, kept: Tensor | None):
        self.blend_of, self.chosen, self.kept = blend, chosen, kept
        self.halvings: frozenset[int] = frozenset()
        self.seen: Tensor | None = (
            None  # (words or words to keep, prompts, n), summed over attentions and steps
        )
        self.sides = (0, 0)

    @classmethod
    def of(cls, given: PromptToPrompt) -> _Blending | None:
        tables = given.tables
        return None if tables.chosen is None else cls(given.local_blend, tables.chosen, tables.kept)

    def reads(self, halvings: int, latents: tuple[int, int]) -> bool:
        def away(times: int) -> float:
            side = math.prod(halved(latents, times)) ** 0.5
            return max(side / BLEND_CELLS, BLEND_CELLS / side)

        return halvings == min(self.halvings, key=away)

    def note(self, maps: Tensor, sides: tuple[int, int]) -> None:
        """Add maps (prompts, heads, n, m) of an attention."""
        both = self.chosen[None] if self.kept is None else torch.stack([self.chosen, self.kept])
        own = torch.einsum("bhpn,kbn->kbp", maps.detach()[..., : both.shape[-1]], both.to(maps))
        self.seen = own if self.seen is None else self.seen + own
        self.sides = sides

    def blend(self, x: Tensor, step: StepInfo) -> Tensor:
        """Give samples (b, c, h, w) that are the source's where the words are not."""
        if self.seen is None or step.index < int(self.blend_of.start * step.total):
            return x
        size, threshold = tuple(x.shape[2:]), self.blend_of.threshold
        mask = blend_mask(self.seen[0], self.sides, size, threshold, pool=True)
        if self.kept is not None:
            mask = mask & ~blend_mask(self.seen[1], self.sides, size, threshold, pool=False)
        return x[:1] + mask.to(x) * (x - x[:1])
