"""The laws of Brownian motion, and that a path belongs to its seed alone."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from linear_gaussian import Wavy
from safetensors.torch import load_file

from ldm.errors import AbsentError
from ldm.models.diffusion.levels import make_plan
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps
from ldm.noise import ImageNoise
from ldm.process.brownian import BrownianPaths
from ldm.process.sigmas import alpha_bar_of_sigma

SEEDS = [5, -3, 2**63]
PAIRS = [(14.6, 9.1), (9.1, 5.5), (5.5, 1.3), (1.3, 0.2), (0.2, 0.029), (0.029, 0.0), (4096.0, 150.0)]


@pytest.fixture(scope="module")
def paths():
    return BrownianPaths(SEEDS, (41, 31))


def test_increments_have_the_variance_of_their_interval_and_are_independent(paths):
    """Of 3813 values each: means, variances and correlations within 5 standard errors."""
    error = 5 / math.sqrt(3 * 41 * 31)
    drawn = [paths.between(*pair).flatten() for pair in PAIRS]
    for (high, low), noise in zip(PAIRS, drawn, strict=True):
        assert abs(noise.mean()) < error and abs(noise.var() - 1) < 1.5 * error
        increment = (paths.at(low) - paths.at(high)).flatten()
        assert increment.var() == pytest.approx(high - low, rel=0.15, abs=1e-4)
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < error


def test_an_interval_is_the_sum_of_its_parts_and_correlates_with_them(paths):
    a, b, c = 9.25, 4.5, 1.75  # on the grid
    whole, first, second = paths.between(a, c), paths.between(a, b), paths.between(b, c)
    torch.testing.assert_close(
        whole * math.sqrt(a - c), first * math.sqrt(a - b) + second * math.sqrt(b - c), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(paths.between(c, a), -whole, rtol=0, atol=0)
    correlation = float((whole * first).mean())
    assert correlation == pytest.approx(math.sqrt((a - b) / (a - c)), abs=0.08)


def test_a_path_does_not_depend_on_its_neighbours_or_on_what_was_asked_before():
    shape, pairs = (2, 3), [(0.4, 0.03), (14.6, 3.2), (0.4, 0.03), (7.7, 7.6), (0.0, 8191.0)]
    together = BrownianPaths(SEEDS, shape)
    for high, low in pairs:
        noise = together.between(high, low)
        for row, seed in enumerate(SEEDS):
            alone = BrownianPaths([seed], shape).between(high, low)[0]
            assert torch.equal(alone, noise[row])
    assert not torch.equal(together.at(3.0)[0], together.at(3.0)[1])


def test_intervals_shorter_than_the_grid_are_still_unit_noise(paths):
    for low in (1.0 + 1e-9, 1.0):
        noise = paths.between(1.0 + 1e-9, low)
        assert noise.var() == pytest.approx(1, abs=0.05)
    assert torch.equal(paths.at(0.0), torch.zeros_like(paths.at(0.0)))


def test_torchsdes_paths_are_those_of_k_diffusions_noise_sampler(request):
    """Each image's from its own seed, over the run's sigmas above 0; bit for bit as recorded."""
    pytest.importorskip("torchsde")
    recorded = load_file(request.path.parents[1] / "golden" / "samplers_kdiffusion.safetensors")
    names = sorted(name for name in recorded if name.startswith("brownian.0."))
    assert len(names) == 5
    bars = alpha_bar_of_sigma(np.array([0.0, 0.0291671582, 14.6146317]))
    sampler = SAMPLERS["dpmpp_sde"](None, ImageNoise([12345, 0]), brownian="torchsde")
    sampler.levels = make_plan(np.zeros(2), bars[1:], bars[0])
    for name in names:
        sigma, sigma_to = map(float, name.removeprefix("brownian.0.").split("-"))
        got = sampler.draw_between(torch.zeros(2, 2, 3), sigma, sigma_to)
        want = torch.cat([recorded[name.replace(".0.", ".12345.", 1)], recorded[name]])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("part", [{}, {"run_last": 2, "start_from": torch.ones(2, 2, 3, 5)}])
def test_torchsdes_paths_lie_between_the_ends_of_the_whole_run(monkeypatch, part):
    """Also those of a run that begins with a picture, as in A1111 and diffusers."""
    ends = []

    class Tree:
        def __init__(self, w0, t0, t1, entropy):
            self.w0 = w0
            ends.append((float(t0), float(t1), entropy))

        def __call__(self, low, high):
            return self.w0

    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianTree=Tree))
    sigmas = [9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0]
    options = {"steps": 6, "spacing": sigmas, "brownian": "torchsde", "noise": ImageNoise([7, 9])}
    for _ in sample_steps("dpmpp_2m_sde", Wavy(), torch.ones(2, 2, 3, 5), None, **options, **part):
        pass
    assert [entropy for _, _, entropy in ends] == [7, 9]
    for low, high, _ in ends:
        assert (low, high) == pytest.approx((0.5, 9.0))


def test_torchsde_is_asked_for_before_anything_is_painted(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(
        AbsentError, match=r"needs torchsde: pip install 'faithful-ldm\[torchsde\]', or leave"
    ):
        SAMPLERS["dpmpp_2m_sde"](None, brownian="torchsde")
