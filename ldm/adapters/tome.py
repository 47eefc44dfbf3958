"""Fewer tokens for self-attention: token merging for Stable Diffusion (ToMe, arXiv:2303.17604).

Before self-attention at the UNet's highest resolution the most redundant tokens are averaged into ones that they
resemble; afterwards each takes the answer of the one that it went into. The numbers are others: this way is
lossy.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.deepcache import check_compiled, check_unet
from ldm.errors import UsageError, shown
from ldm.helpers import upload
from ldm.limits import MERGE_RATIO, SEED, about_whole, is_whole, real
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all


def destinations(height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token of each cell of 2 x 2 as a destination that others may be merged into.

    Args:
        height, width: of the map; cells at the far edges of odd ones hold only one or two tokens.
        generator: a CPU one draws the token of each cell; None takes the top left one.

    Returns:
        (ceil(height / 2) * ceil(width / 2),) int64 places in the map, row by row.
    """
    rows, columns = torch.arange(0, height, 2)[:, None], torch.arange(0, width, 2)[None]
    if generator is not None:
        drawn = torch.randint(4, (rows.shape[0], columns.shape[1]), generator=generator)
        rows = (rows + drawn // 2).clamp(max=height - 1)
        columns = (columns + drawn % 2).clamp(max=width - 1)
    return (rows * width + columns).flatten()


def other_places(n: int, into: Tensor) -> Tensor:
    """List the places among n that are no destinations, (n - d,) int64."""
    return torch.ones(n, dtype=torch.bool).index_fill_(0, into, False).nonzero().flatten()


def match(tokens: Tensor, into: Tensor, others: Tensor, count: int) -> Tensor:
    """Decide which tokens go where: bipartite soft matching.

    Every token that is no destination is paired with the destination of the nearest direction (greatest cosine);
    the `count` closest pairs are merged.

    Args:
        tokens: (b, n, c) features to compare.
        into: (d,) int64, the destinations; others: (n - d,), all other places; on the tokens' device.
        count: how many are merged, 0 to n - d.

    Returns:
        (b, n) int64: the place of every token among the n - count that are left. The tokens that are not
        merged come first, then the destinations in their order.
    """
    b, n, _ = tokens.shape
    d, s = len(into), len(others)
    unit = F.normalize(tokens, dim=-1)
    similarity, nearest = (unit[:, others] @ unit[:, into].transpose(1, 2)).max(dim=-1)  # (b, s) each
    ranking = similarity.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(s, device=tokens.device)
    first = s - count  # where the destinations begin among those left
    place_of_ranked = torch.where(rank < count, first + nearest.gather(1, ranking), rank - count)
    place = torch.empty(b, n, dtype=torch.int64, device=tokens.device)
    place[:, others] = torch.empty_like(ranking).scatter_(1, ranking, place_of_ranked)
    place[:, into] = torch.arange(first, first + d, device=tokens.device)
    return place


def merge(tokens: Tensor, place: Tensor, count: int) -> Tensor:
    """Average the tokens (b, n, c) that share a place into (b, n - count, c)."""
    b, n, c = tokens.shape
    total = tokens.new_zeros(b, n - count, c).scatter_add_(1, place[..., None].expand(-1, -1, c), tokens)
    size = tokens.new_zeros(b, n - count).scatter_add_(1, place, tokens.new_ones(b, n))
    return total / size[..., None]


def unmerge(tokens: Tensor, place: Tensor) -> Tensor:
    """Give every one of n tokens the features (b, n - count, c) of its place: (b, n, c)."""
    return tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))


def finest_transformers(unet: UNetModel) -> list[SpatialTransformer]:
    """List the spatial transformers of the highest resolution that has any, on the way down and up."""
    found: dict[int, list[SpatialTransformer]] = {}
    halvings = 0
    for block in [*unet.input_blocks, unet.middle_block, *unet.output_blocks]:
        for layer in block:
            if isinstance(layer, SpatialTransformer):
                found.setdefault(halvings, []).append(layer)
            elif isinstance(layer, Downsample | Upsample) or (isinstance(layer, ResBlock) and layer.updown):
                rises = isinstance(layer, Upsample) or getattr(layer, "up", False)
                halvings += -1 if rises else 1
    return found[min(found)] if found else []


def mergeable_blocks(unet: nn.Module) -> list[tuple[SpatialTransformer, list[BasicTransformerBlock]]]:
    """List the finest transformers that attend to themselves, each with its blocks that do.

    Raises:
        UsageError: another network or a compiled one, or there are none.
    """
    check_unet(unet, "merge_ratio > 0")
    found = []
    for transformer in finest_transformers(unet):
        blocks = [block for block in transformer.transformer_blocks if not block.disable_self_attn]
        for block in blocks:
            check_compiled(block, "merge_ratio > 0")
        found += [(transformer, blocks)] if blocks else []
    if not found:
        raise UsageError(
            "merge_ratio > 0 needs a UNet whose finest spatial transformers attend to themselves, and none of this "
            "one do; leave it off"
        )
    return found


def check_merging(unet: nn.Module, merge_ratio: float, merge_seed: int | None) -> tuple[float, int | None]:
    """Return what TokenMerging takes for this UNet.

    Raises:
        UsageError: as TokenMerging.
    """
    ratio, seed = check_ratio(merge_ratio, merge_seed)
    if ratio > 0:
        mergeable_blocks(unet)
    return ratio, seed


def check_ratio(merge_ratio: float, merge_seed: int | None) -> tuple[float, int | None]:
    """Return what TokenMerging takes for some UNet, or raise UsageError."""
    ratio = real("merge_ratio", merge_ratio, *MERGE_RATIO)
    if merge_seed is not None and not is_whole(merge_seed, *SEED):
        raise UsageError(f"merge_seed must be {about_whole(*SEED)} or None, got {shown(merge_seed)}")
    return ratio, None if merge_seed is None else int(merge_seed)


class TokenMerging:
    """Merged tokens in a UNet's finest self-attentions.

    Attach it with ldm.modules.seams.attached, or give it to `adapters=`. The tokens of each
    BasicTransformerBlock at the highest resolution that has any are merged before its self-attention and
    unmerged behind it.

    Attributes:
        ratio, seed: as given.

    Args:
        merge_ratio: share of the tokens that are merged, 0 to 0.75; 0 = none, and nothing is attached.
        merge_seed: draws the destinations, anew for every block of every step; None = the top left token of
            each cell of 2 x 2, always.

    Raises:
        UsageError: a number out of range; when attached, another network or a compiled one, or none of its finest
            transformers attends to itself, where merge_ratio > 0.
    """

    rank = Rank.ATTENTION

    def __init__(self, merge_ratio: float, merge_seed: int | None = None):
        self.ratio, self.seed = check_ratio(merge_ratio, merge_seed)
        self._generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self._places: dict[Any, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"TokenMerging({self.ratio:g}, {self.seed})"

    def begin(self) -> "TokenMerging":
        """Return one for one run of a sampler, whose draws begin anew."""
        return TokenMerging(self.ratio, self.seed)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        if self.ratio > 0:
            mergeable_blocks(unet)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata."""
        return {"merge_ratio": self.ratio, "merge_seed": self.seed}

    def attach(self, network: nn.Module) -> Undo:
        """Let a UNet merge tokens."""
        undo: list[Undo] = []
        for transformer, blocks in mergeable_blocks(network) if self.ratio > 0 else []:
            merge = _Merge(self)
            undo.append(fill(transformer, "entering", merge.entering))
            undo += [fill(block, "around", merge.around) for block in blocks]
        return undo_all(undo)

    def at(self, step: StepInfo) -> None:
        """Do nothing: tokens are merged at every step."""

    def state(self) -> Hashable | None:
        """Say what a captured graph depends on; None with a seed, whose draws a replay would not make."""
        return ("TokenMerging", self.ratio) if self.seed is None else None

    def places(self, size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the destinations of a map and its other places, on a device."""
        known = self._places.get((size, device))
        if known is None or self._generator is not None:
            into = destinations(*size, self._generator)
            both = (into, other_places(math.prod(size), into))
            known = self._places[size, device] = tuple(upload(places, device) for places in both)
        return known


class _Merge:
    """Merging in one spatial transformer: it learns the map's size there, and merges in its blocks."""

    def __init__(self, merging: TokenMerging):
        self._merging = merging
        self._size: tuple[int, ...] = ()

    def entering(self, x: Tensor) -> None:
        self._size = tuple(x.shape[2:])

    def around(self, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        # The paper compares the tokens as they come into the block, before its first norm.
        into, others = self._merging.places(self._size, tokens.device)
        count = min(int(self._merging.ratio * math.prod(self._size)), len(others))
        if not count:
            return (lambda y: y), (lambda y: y)
        place = match(tokens, into, others, count)
        return (lambda y: merge(y, place, count)), (lambda y: unmerge(y, place))

    def state(self) -> Hashable | None:
        return self._merging.state()
