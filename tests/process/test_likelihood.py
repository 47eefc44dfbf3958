"""Likelihoods against torch's distributions, against quadrature, and against what must add up to 1."""

import math

import pytest
import torch
from keyed import keyed_input
from safetensors.torch import load_file

from ldm.errors import MismatchError
from ldm.process.likelihood import (
    approx_standard_normal_cdf,
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    gaussian_log_likelihood,
    normal_kl,
    prior_bits_per_dim,
)

BINS = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # 8-bit pixels in [-1, 1]


def four(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(4)]


def test_normal_kl_is_the_divergence_of_two_gaussians():
    mean1, logvar1, mean2, logvar2 = four(2, 3, 5)
    first, second = (
        torch.distributions.Normal(mean, (0.5 * logvar).exp())
        for mean, logvar in ((mean1, logvar1), (mean2, logvar2))
    )
    want = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), want, rtol=0, atol=1e-12)


def test_normal_kl_takes_numbers_and_broadcasts():
    mean = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    want = torch.tensor([[0.0, 2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(normal_kl(mean, 0.0, 0.0, 0.0), want, rtol=0, atol=1e-15)
    got = normal_kl(0.0, torch.zeros(2, 1), mean.float(), 0.0)
    torch.testing.assert_close(got, want.float().expand(2, 3), rtol=0, atol=1e-7)
    with pytest.raises(TypeError, match="at least one tensor, got only numbers"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_the_tanh_is_within_2e_4_of_the_cumulative_normal_and_no_closer():
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    gap = (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-4 < gap < 2e-4
    both = approx_standard_normal_cdf(x) + approx_standard_normal_cdf(-x)
    torch.testing.assert_close(both, torch.ones_like(x), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("mean", "scale"), [(0.3, 0.2), (-1.4, 0.5), (0.9, 0.01), (0.0, 3.0)])
def test_the_bins_of_a_pixel_share_all_probability(mean, scale):
    """Also where most of the Gaussian lies outside of [-1, 1]: the outermost bins take the rest."""
    means, log_scales = (torch.full_like(BINS, v) for v in (mean, math.log(scale)))
    p = discretized_gaussian_log_likelihood(BINS, means=means, log_scales=log_scales).exp()
    # The floor of 1e-12 under each of 256 bins is all that there may be too much.
    assert abs(p.sum().item() - 1) < 256 * 1e-12


def test_a_bin_has_the_area_under_the_density():
    means, log_scales = torch.full_like(BINS, 0.1), torch.full_like(BINS, -1.0)
    got = discretized_gaussian_log_likelihood(BINS, means=means, log_scales=log_scales).exp()[1:-1]
    density = gaussian_log_likelihood(BINS, means=means, log_scales=log_scales).exp()[1:-1]
    torch.testing.assert_close(got, density * 2 / 255, rtol=0, atol=1.2e-5)  # the tanh's error in slope
    assert got.max() > 0.008


def test_a_hopeless_pixel_costs_no_more_than_the_floor():
    x, mean, log_scale = (torch.full((1, 1), v, dtype=torch.float64) for v in (0.0, 5.0, -4.0))
    got = discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
    torch.testing.assert_close(
        got, torch.full((1, 1), math.log(1e-12), dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_density_is_the_gaussian_s():
    x, means, log_scales, _ = four(2, 3, 5, seed=1)
    want = torch.distributions.Normal(means, log_scales.exp()).log_prob(x)
    got = gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_bits_are_nats_over_ln_2_averaged_over_each_image():
    nats = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 6.0]]], dtype=torch.float64) * math.log(2)
    want = torch.tensor([2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(nats), want, rtol=0, atol=1e-15)


def test_the_prior_term_is_the_divergence_from_unit_noise():
    """By torch's own divergence of Gaussians; 0 where x_T is unit noise already."""
    mean, _, log_variance, _ = four(2, 3, 5, seed=2)
    normal = torch.distributions.Normal
    nats = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    got = prior_bits_per_dim(mean, log_variance)
    torch.testing.assert_close(got, nats.mean(dim=(1, 2)) / math.log(2), rtol=0, atol=1e-12)
    assert prior_bits_per_dim(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


@pytest.mark.parametrize("likelihood", [discretized_gaussian_log_likelihood, gaussian_log_likelihood])
def test_shapes_that_differ_are_refused(likelihood):
    x = torch.zeros(2, 3)
    with pytest.raises(MismatchError, match=r"of one shape, got \(2, 3\), \(2, 3\) and \(2, 1\)"):
        likelihood(x, means=x, log_scales=torch.zeros(2, 1))


def test_the_recorded_likelihoods_come_out(golden):
    recorded = load_file(golden / "gaussian.safetensors")
    x0, x_t, noise = (keyed_input(f"gd.{name}", (2, 3, 4, 4)) for name in ("x0", "xt", "noise"))
    x0 = x0.clamp(-1, 1)
    got = {
        "gd.normal_kl": normal_kl(x0, 0.1 * x_t, noise, 0.2 * x_t),
        "gd.dgll": discretized_gaussian_log_likelihood(x0, means=0.5 * x_t, log_scales=0.1 * noise),
    }
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, recorded[name], rtol=1e-5, atol=1e-5)
