"""Guidance within an interval of levels: what is asked where, that the whole interval changes nothing, refusals."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, Wavy, normals

from ldm.errors import UsageError
from ldm.models.diffusion.samplers import Denoiser, DPMSolverPP2M, alpha_bar_table, sample_steps

ALL = ("ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m")
SHAPE = (2, 4, 5, 3)
COND, UNCOND = torch.tensor([0.6, -0.4]), torch.tensor([0.1, 0.2])


def run(name, model, x_T, *, steps=10, guided=True, **options):
    """The last sample; the noise of every draw is its own constant, so that runs compare."""
    guidance = {"guidance_scale": 3.0, "unconditional_conditioning": UNCOND} if guided else {}
    drawn = iter(range(1, 1000))

    def noise(like):
        return torch.full_like(like, 0.01 * next(drawn))

    *_, last = sample_steps(name, model, x_T, COND, steps=steps, noise=noise, **guidance, **options)
    return last.x_t


def asked(model):
    """(level, rows of the batch) of every question."""
    return [(float(t[0]), shape[0]) for shape, t in model.asked]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_whole_interval_is_guidance_bit_for_bit(name, separate):
    (x_T,) = normals(*SHAPE, dtype=torch.float32)
    plain = run(name, LinearGaussian(), x_T, separate_passes=separate)
    assert torch.equal(
        run(name, LinearGaussian(), x_T, separate_passes=separate, guidance_interval=(0, 1)), plain
    )
    # Just short of the whole, so that every level is looked at, and still holds every level of the ten.
    almost = run(name, LinearGaussian(), x_T, separate_passes=separate, guidance_interval=(0.0, 0.9999))
    assert torch.equal(almost, plain)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_an_empty_interval_is_no_guidance_bit_for_bit_at_half_the_cost(name, separate):
    (x_T,) = normals(*SHAPE, dtype=torch.float32)
    model, bare = LinearGaussian(), LinearGaussian()
    empty = run(name, model, x_T, separate_passes=separate, guidance_interval=[0.4, 0.4])
    assert torch.equal(empty, run(name, bare, x_T, guided=False))
    assert asked(model) == asked(bare) and {rows for _, rows in asked(model)} == {2}


@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.3, 0.8), (0.8, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("name", ALL)
def test_the_unconditional_half_is_asked_for_within_the_interval_only(name, interval):
    model, (x_T,) = LinearGaussian(), normals(*SHAPE)
    run(name, model, x_T, guidance_interval=interval)
    low, high = interval
    assert asked(model) == [(t, 4 if low <= t / 1000 < high else 2) for t, _ in asked(model)]
    assert {rows for _, rows in asked(model)} == {2, 4}


@pytest.mark.parametrize("name", ALL)
def test_separate_passes_ask_the_same_and_answer_the_same(name):
    joint, apart, (x_T,) = LinearGaussian(), LinearGaussian(), normals(*SHAPE)
    one = run(name, joint, x_T, guidance_interval=(0.3, 0.8))
    two = run(name, apart, x_T, guidance_interval=(0.3, 0.8), separate_passes=True)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    assert {rows for _, rows in asked(apart)} == {2}
    assert sum(rows for _, rows in asked(apart)) == sum(rows for _, rows in asked(joint))


def test_two_intervals_that_meet_guide_every_level_once():
    """Half-open: the level on the border belongs to the upper of the two."""
    model = LinearGaussian()
    denoise = {
        interval: Denoiser(
            model,
            COND,
            unconditional_conditioning=UNCOND,
            guidance_scale=3.0,
            guidance_interval=interval,
        )
        for interval in ((0.0, 0.2), (0.2, 0.7), (0.7, 1.0))
    }
    for t in range(1000):
        assert [d.is_guided(t) for d in denoise.values()] == [t < 200, 200 <= t < 700, t >= 700]
        # Levels in a tensor are divided in float32 and fall on the same sides.
        assert [d.is_guided(torch.tensor([t, t])) for d in denoise.values()] == [
            d.is_guided(t) for d in denoise.values()
        ]


def test_guidance_without_an_unconditional_condition_or_at_scale_one_stays_off():
    model = LinearGaussian()
    for options in ({"guidance_scale": 3.0}, {"unconditional_conditioning": UNCOND}):
        assert Denoiser(model, COND, guidance_interval=(0.0, 0.5), **options).is_guided(10) is False


def test_rows_of_a_batch_are_guided_by_their_own_level():
    """The rows of a batch at two levels answer as each does alone at its own."""
    model, (x,) = LinearGaussian(), normals(*SHAPE, dtype=torch.float32)
    denoise = Denoiser(
        model,
        COND,
        unconditional_conditioning=UNCOND,
        guidance_scale=3.0,
        guidance_rescale=0.7,
        guidance_interval=(0.2, 0.7),
    )
    t = torch.tensor([100, 500])
    a = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    both = denoise(x, t, a)[0]
    for row, level in enumerate((100, 500)):
        alone = denoise(x, level, model.alphas_cumprod[level])[0]
        torch.testing.assert_close(both[row], alone[row], rtol=0, atol=1e-6)
    assert denoise.is_guided(t).tolist() == [False, True]


def test_a_multistep_sampler_remembers_what_it_was_told_guided_or_not():
    """DPM-Solver++(2M) by hand over a network whose answer differs between the two: past answers stay as they were."""
    model, (x_T,) = LinearGaussian("x0"), normals(*SHAPE)
    steps, interval = 6, (0.0, 0.6)
    plan = DPMSolverPP2M.plan(alpha_bar_table(model), steps)
    x, past = x_T.double(), None
    for i, (level, to) in enumerate(itertools.pairwise(plan)):
        inside = level.t / 1000 < interval[1]
        mean = UNCOND + 3.0 * (COND - UNCOND) if inside else COND
        a = model.alpha_bar(torch.tensor([level.t]))
        eps = model.noise(x, a, mean)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()

        lambdas = [
            0.5 * math.log(float(b) / (1 - float(b))) if b < 1 else math.inf
            for b in (level.alpha_bar, to.alpha_bar)
        ]
        guess = x0
        if past is not None and i < steps - 1:
            h, h_last = lambdas[1] - lambdas[0], lambdas[0] - past[1]
            guess = x0 + h / (2 * h_last) * (x0 - past[0])
        past = (x0, lambdas[0])
        alpha, alpha_next = float(level.alpha_bar), float(to.alpha_bar)
        ratio = math.sqrt((1 - alpha_next) / (1 - alpha))
        x = ratio * x + (math.sqrt(alpha_next) - math.sqrt(alpha) * ratio) * guess
    got = run("dpmpp_2m", LinearGaussian("x0"), x_T, steps=steps, guidance_interval=interval)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)
    assert not np.allclose(run("dpmpp_2m", LinearGaussian("x0"), x_T, steps=steps), x, atol=1e-2)


@pytest.mark.parametrize(
    "interval",
    [
        (0.9, 0.2),
        (-0.1, 0.5),
        (0.5, 1.5),
        (math.nan, 0.5),
        (0.1,),
        (0.1, 0.2, 0.3),
        0.5,
        None,
        "ab",
        (True, 1.0),
        ("0", "1"),
    ],
)
def test_what_is_no_interval_is_refused_with_what_came(interval):
    words = re.escape(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {interval!r}")
    with pytest.raises(UsageError, match=words):
        sample_steps("ddim", Wavy(), normals(*SHAPE)[0], None, steps=3, guidance_interval=interval)
