"""Merged tokens: who goes where, that means and constants are kept, which attentions see fewer, and refusals."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from keyed import fill, keyed_input
from tiny import tiny_model
from tiny_networks import UNET
from torch import nn

from ldm.adapters.tome import (
    TokenMerging,
    destinations,
    finest_transformers,
    match,
    merge,
    other_places,
    unmerge,
)
from ldm.errors import UsageError
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import attached
from ldm.pipeline import StableDiffusion

CONFIGS = {
    name: entry["config"]
    for file in ("modules.json", "sd2_and_control.json")
    for name, entry in json.loads((Path(__file__).parents[1] / "golden" / file).read_text()).items()
    if name.startswith("unet")
}
SPACES = {1: (7,), 2: (5, 9), 3: (2, 5, 7)}  # odd sides, that halve unevenly
PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET), "u.")


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


def tokens(b=2, height=5, width=9, c=7):
    return keyed_input("tokens", (b, height * width, c))


def matched(x, into, count):
    return match(x, into, other_places(x.shape[1], into), count)


def cell(place, width):
    return place // width // 2, place % width // 2


def ask(unet, merging=None, height=5, width=9):
    merging = merging or TokenMerging(0.0)
    x, context = keyed_input("x", (2, 4, height, width)), keyed_input("c", (2, 7, 24))
    with torch.no_grad(), attached(unet, merging):
        return unet(x, torch.tensor([3.0, 757.5]), context=context)


class Seen:
    """How many tokens every self-attention of a network sees, in the order of the calls."""

    def __init__(self, unet):
        found = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
        self.tokens = []
        self.handles = [
            block.attn1.to_q.register_forward_hook(
                lambda m, given, out: self.tokens.append(given[0].shape[1])
            )
            for transformer in found
            for block in transformer.transformer_blocks
        ]

    def __enter__(self):
        return self.tokens

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


# --- destinations ---


@pytest.mark.parametrize("size", [(4, 6), (5, 9), (1, 7), (6, 3), (1, 1)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_each_cell_of_the_map_has_one_destination(size, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    into = destinations(*size, generator)
    wanted = [(i, j) for i in range(math.ceil(size[0] / 2)) for j in range(math.ceil(size[1] / 2))]
    assert [cell(place, size[1]) for place in into.tolist()] == wanted
    assert 0 <= min(into) and max(into) < math.prod(size)


def test_without_a_seed_it_is_the_top_left_and_with_one_any_but_the_same_again():
    assert destinations(4, 5).tolist() == [0, 2, 4, 10, 12, 14]
    first, again = (destinations(8, 10, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert {(place // 10 % 2, place % 10 % 2) for place in first.tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}


# --- matching ---


@pytest.mark.parametrize("count", [0, 1, 11, 30])
def test_what_is_merged_is_what_is_most_alike(count):
    """Against the definition, token by token."""
    x, into = tokens(), destinations(5, 9)
    place = matched(x, into, count)
    others = [i for i in range(45) if i not in into]
    for row in range(2):
        unit = torch.nn.functional.normalize(x[row].double(), dim=-1)
        pairs = sorted(
            ((float(unit[i] @ unit[j]), i, k) for i in others for k, j in [max(
                enumerate(into.tolist()), key=lambda kj: float(unit[i] @ unit[kj[1]])
            )]),
            reverse=True,
        )  # fmt: skip
        first = len(others) - count
        assert place[row, into].tolist() == list(range(first, first + len(into)))
        for _, i, k in pairs[:count]:
            assert place[row, i] == first + k
        left = [i for _, i, _ in pairs[count:]]
        assert sorted(place[row, left].tolist()) == list(range(first))


@pytest.mark.parametrize("count", [0, 7, 30])
def test_merging_so_many_tokens_leaves_the_others(count):
    x = tokens()
    place = matched(x, destinations(5, 9), count)
    merged = merge(x, place, count)
    assert merged.shape == (2, 45 - count, 7)
    assert all(set(row.tolist()) == set(range(45 - count)) for row in place)


@pytest.mark.parametrize("count", [1, 17, 30])
def test_the_mean_is_kept_by_weight_and_a_merge_is_a_projection(count):
    x = tokens().double()
    place = matched(x, destinations(5, 9), count)
    merged = merge(x, place, count)
    size = torch.stack([torch.bincount(row, minlength=45 - count) for row in place])
    mean = (merged * size[..., None]).sum(1) / 45
    torch.testing.assert_close(mean, x.mean(1), rtol=0, atol=1e-12)
    spread = unmerge(merged, place)
    torch.testing.assert_close(spread.mean(1), x.mean(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(merge(spread, place, count), merged, rtol=0, atol=1e-12)


def test_tokens_that_are_all_alike_come_back_as_they_were():
    x = keyed_input("one", (2, 1, 7)).expand(2, 45, 7)
    place = matched(x, destinations(5, 9), 30)
    torch.testing.assert_close(unmerge(merge(x, place, 30), place), x, rtol=0, atol=1e-6)


def test_each_row_of_a_batch_is_matched_by_itself():
    x = tokens(b=3)
    into = destinations(5, 9)
    together = matched(x, into, 20)
    assert all(torch.equal(together[i], matched(x[i : i + 1], into, 20)[0]) for i in range(3))
    assert not torch.equal(together[0], together[1])


# --- in the UNet ---


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
@pytest.mark.thinned(4)
def test_the_finest_transformers_of_every_geometry_are_found(name):
    config = CONFIGS[name]
    unet = fill(UNetModel(**config), name + ".")
    sizes, found = {}, [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    handles = [
        m.register_forward_pre_hook(lambda m, given: sizes.__setitem__(m, given[0].shape[2:])) for m in found
    ]
    assert len(handles) == len(found)
    y = keyed_input("y", (2, 1)) if config.get("num_classes") == "continuous" else torch.tensor([1, 9])
    unet(
        keyed_input(name + ".x", (2, config["in_channels"], *SPACES[config.get("dims", 2)])),
        torch.tensor([3, 757]),
        context=keyed_input(name + ".context", (2, 7, 24)) if "context_dim" in config else None,
        y=y if config.get("num_classes") is not None else None,
    )
    largest = max(map(math.prod, sizes.values()), default=0)
    assert finest_transformers(unet) == [m for m in found if math.prod(sizes[m]) == largest]


@pytest.mark.parametrize("name", ["attention only below", "resampling by residual blocks"])
def test_resolutions_are_those_of_the_blocks(name):
    changes = {"attention_resolutions": [2]} if "below" in name else {"resblock_updown": True}
    unet = UNetModel(**{**UNET, **changes})
    width = 64 if "below" in name else 32
    assert [m.in_channels for m in finest_transformers(unet)] == [width] * (4 if "below" in name else 3)


@pytest.mark.parametrize(
    ("ratio", "fine"), [(0.5, 45 - 22), (0.75, 15), (0.02, 45), (1 / 45, 44), (0.3, 45 - 13)]
)
def test_the_finest_self_attentions_alone_see_fewer_tokens(unet, ratio, fine):
    """A map of 5 x 9: of its 45 tokens 15 are destinations, so that at most 30 can go. The next is 3 x 5."""
    with Seen(unet) as seen:
        out = ask(unet, TokenMerging(ratio))
    assert sorted(seen) == sorted([15] * 4 + [fine] * 3) and out.shape == (2, 5, 5, 9)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.02])
def test_where_nothing_is_merged_the_answer_is_the_same_bit_for_bit(unet, ratio):
    plain = ask(unet)
    assert torch.equal(ask(unet, TokenMerging(ratio)), plain)
    difference = (ask(unet, TokenMerging(0.3)) - plain).abs().max() / plain.abs().max()
    assert 1e-3 < difference < 1


@torch.no_grad()
def test_attention_over_equal_groups_loses_nothing(unet):
    """A map that is even within each cell of 2 x 2: merged three to one, every key weighs as its four did."""
    transformer = finest_transformers(unet)[0]
    coarse = keyed_input("coarse", (2, 32, 3, 5))
    x = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (2, 32, 6, 10)
    context = keyed_input("c", (2, 7, 24))
    with Seen(unet) as seen:
        plain = transformer(x, context)
        with attached(unet, TokenMerging(0.75)):
            merged = transformer(x, context)
    assert seen == [60, 15]
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
def test_outside_the_unet_is_as_it_was(unet, seed):
    plain = ask(unet)
    merging = TokenMerging(0.5, seed)
    ask(unet, merging)
    assert torch.equal(ask(unet), plain)
    with pytest.raises(RuntimeError), torch.no_grad(), attached(unet, merging):
        unet(torch.zeros(2, 4, 5, 9), torch.zeros(2), context=torch.zeros(2, 7, 23))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(ask(unet), plain)


def test_blocks_that_only_look_at_the_context_are_left_alone():
    """Their first attention has the context for keys, which are not tokens of the map."""
    unet = fill(UNetModel(**UNET, disable_self_attentions=[True, False]), "u.")
    with pytest.raises(UsageError, match="whose finest spatial transformers attend to themselves, and none"):
        TokenMerging(0.5).check(unet)


# --- runs ---


def paint(sd, **options):
    return sd.txt2img(PROMPT, **{"seed": 3, "steps": 3, "output_type": "latent", **options}).latents


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_a_seed_draws_the_destinations_and_draws_them_again(sd):
    plain, top_left = paint(sd, merge_seed=5), paint(sd, merge_ratio=0.5)
    drawn = [paint(sd, merge_ratio=0.5, merge_seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(plain, paint(sd))
    assert torch.equal(top_left, paint(sd, merge_ratio=0.5))
    pictures = [plain, top_left, drawn[0], drawn[2]]
    assert all(1e-4 < far(a, b) < 1 for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize("seed", [None, 5])
def test_no_image_depends_on_its_batch(sd, seed):
    options = {"merge_ratio": 0.5, "merge_seed": seed, "num_images": 3}
    together, parted = paint(sd, batch_size=3, **options), paint(sd, batch_size=2, **options)
    assert far(parted, together) <= 5e-6


def test_the_three_knobs_turn_together(sd):
    knobs = {"guidance_interval": (0.2, 0.8), "cache_interval": 2, "cache_depth": 2, "merge_ratio": 0.4}
    both = paint(sd, **knobs)
    assert torch.isfinite(both).all() and torch.equal(both, paint(sd, **knobs))
    assert all(far(both, paint(sd, **{**knobs, name: off})) > 1e-4 for name, off in (
        ("guidance_interval", (0, 1)), ("cache_interval", 1), ("cache_depth", 1), ("merge_ratio", 0.0)
    ))  # fmt: skip


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((-0.1,), "merge_ratio must be a number from 0 to 0.75, got -0.1"),
        ((0.8,), "merge_ratio must be a number from 0 to 0.75, got 0.8"),
        ((math.nan,), "got nan"),
        ((True,), "got True"),
        (("0.5",), "got '0.5'"),
        ((0.5, -1), "merge_seed must be a whole number from 0 to 18446744073709551615 or None, got -1"),
        ((0.0, 2**64), "got 18446744073709551616"),
        ((0.5, 1.5), "got 1.5"),
        ((0.5, False), "got False"),
    ],
)
def test_numbers_out_of_range_are_refused(unet, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        TokenMerging(*options)


def test_networks_that_it_cannot_serve_are_refused():
    bare = UNetModel(**{**UNET, "use_spatial_transformer": False, "context_dim": None})
    compiled = UNetModel(**UNET)
    finest_transformers(compiled)[-1].transformer_blocks[0].compile()
    for network, words in (
        (nn.Conv2d(4, 4, 1), "merge_ratio > 0 needs a UNetModel, got Conv2d"),
        (compiled, "merge_ratio > 0 needs the plain BasicTransformerBlock, but this one was compiled"),
        (bare, "attend to themselves, and none of this one do"),
    ):
        with pytest.raises(UsageError, match=words):
            TokenMerging(0.5).check(network)
        TokenMerging(0.0).check(network)
