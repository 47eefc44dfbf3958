"""Tiles: cutting and joining changes nothing, seams weigh little, and windows must cover the map."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.process.tiling import Tiling, border_distance

X = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ties", [None, (0.01, 0.5)])
def test_joining_what_was_cut_gives_it_back(ties):
    tiling = Tiling((7, 10), (3, 4), (2, 3), tie_range=ties)
    assert tiling.counts == (3, 3)
    tiles = tiling.split(X)
    assert len(tiles) == 9 and tiles[0].shape == (2, 3, 3, 4)
    torch.testing.assert_close(tiles[5], X[:, :, 2:5, 6:10])
    torch.testing.assert_close(tiling.join(tiles), X, rtol=0, atol=1e-6)


def test_joining_follows_a_network_that_enlarges_or_shrinks():
    tiling = Tiling((8, 12), (4, 8), (2, 4))
    x = torch.rand(1, 2, 8, 12)
    enlarged = [tile.repeat_interleave(2, 2).repeat_interleave(2, 3) for tile in tiling.split(x)]
    torch.testing.assert_close(
        tiling.join(enlarged, up=2), x.repeat_interleave(2, 2).repeat_interleave(2, 3), rtol=0, atol=1e-6
    )
    shrunk = [tile[:, :, ::2, ::2] for tile in tiling.split(x)]
    torch.testing.assert_close(tiling.join(shrunk, down=2), x[:, :, ::2, ::2], rtol=0, atol=1e-6)


def test_where_two_tiles_disagree_the_one_further_from_its_border_wins():
    tiling = Tiling((1, 7), (1, 5), (1, 2), weight_range=(0.01, 0.5))
    joined = tiling.join([torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 5)])[0, 0, 0]
    assert joined[:2].tolist() == [0, 0] and joined[-2:].tolist() == [1, 1]
    assert (joined.diff() >= 0).all()


def test_ties_favour_the_middle_windows():
    """Of three windows in a row the middle one counts more where they overlap, by the tie weights' ratio."""
    tiles = [torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)]
    flat = {"weight_range": (0.5, 0.5)}
    plain = Tiling((1, 8), (1, 4), (1, 2), **flat).join(tiles)[0, 0, 0]
    assert plain.tolist() == pytest.approx([0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0])
    # A single row of windows is on the map's border throughout, so two rows more are needed to tell.
    tall = Tiling((8, 8), (4, 4), (2, 2), tie_range=(0.1, 0.5), **flat)
    middle = [torch.full((1, 1, 4, 4), float(i == 4)) for i in range(9)]
    joined = tall.join(middle)[0, 0]
    assert joined[2, 2] == pytest.approx(0.5 / (0.5 + 3 * 0.1))


def test_border_distance_is_zero_on_the_border_and_half_in_the_middle():
    distance = border_distance(3, 5)
    expected = torch.tensor([[0, 0, 0, 0, 0], [0, 0.25, 0.5, 0.25, 0], [0, 0, 0, 0, 0]])
    torch.testing.assert_close(distance, expected)


def test_tiles_that_leave_a_rim_are_refused():
    with pytest.raises(UsageError, match="tiles of 4 cells every 3 do not cover a width of 9 cells"):
        Tiling((7, 9), (3, 4), (2, 3))
    with pytest.raises(UsageError, match="tiles of 3 cells every 4 do not cover a height of 7 cells"):
        Tiling((7, 9), (3, 3), (4, 3))


def test_other_sizes_are_refused():
    tiling = Tiling((7, 10), (3, 4), (2, 3))
    with pytest.raises(UsageError, match=r"laid out for \(7, 10\) cells, got a map of \(10, 7\)"):
        tiling.split(torch.zeros(1, 1, 10, 7))
    with pytest.raises(UsageError, match=r"tiles to join should be \(6, 8\) cells each, got \(3, 4\)"):
        tiling.join(tiling.split(X), up=2)
