"""Inversions: what comes back, what each step keeps, and what is refused; over networks known in closed form."""

import math

import pytest
import torch
from linear_gaussian import Line, LinearGaussian, Wavy, normals

from ldm.errors import NumericError, UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.inversion import METHODS, Context, Network, invert, plan_of, resolve_method, walk_up

SHAPE = (2, 4, 5, 3)
MEANS, UNCOND = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.1])
Z, EPS = normals(*SHAPE, count=2)


def guided(scale):
    return Context(MEANS, UNCOND, scale)


def test_plain_ddim_comes_back_exactly_where_the_noise_does_not_change():
    for steps in (1, 7, 50):
        inversion = invert("ddim", Network(Line(EPS)), Z, Context(None), steps=steps)
        assert inversion.error.max() < 1e-12 and inversion.calls == steps == len(inversion)
        top = inversion.levels[0].alpha_bar
        start = inversion.levels[-1].alpha_bar
        x0 = (Z - (1 - start).sqrt() * EPS) / start.sqrt()
        torch.testing.assert_close(
            inversion[-1], top.sqrt() * x0 + (1 - top).sqrt() * EPS, rtol=0, atol=1e-12
        )


def test_plain_ddim_is_compvis_encode():
    """Which holds to the recorded `invert.encode15`; of a part of its levels, guided."""
    sampler = DDIMSampler(LinearGaussian())
    sampler.make_schedule(20, verbose=False)
    want, _ = sampler.encode(
        Z, MEANS, 15, unconditional_guidance_scale=2.0, unconditional_conditioning=UNCOND
    )
    method = METHODS["ddim"]()
    levels = plan_of(method, sampler.model, 20)[-16:]
    got = walk_up(Network(sampler.model), method, Z, guided(2.0), levels)
    torch.testing.assert_close(got[-1], want, rtol=0, atol=2e-6)  # its tables are float32


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_plain_ddim_errs_on_a_linear_score_by_what_its_steps_multiply_to(scale):
    """Each step up and each step down is a factor and a shift; the network is asked at the noisier level both times."""
    model, steps = LinearGaussian(), 10
    inversion = invert("ddim", Network(model), Z, guided(scale), steps=steps)
    mean = UNCOND.double() + scale * (MEANS.double() - UNCOND.double())
    levels = [float(level.alpha_bar) for level in inversion.levels[::-1]]
    parts = []
    for here, to in zip(levels, levels[1:], strict=False):
        a = math.sqrt(to / here)
        b = math.sqrt(1 - to) - a * math.sqrt(1 - here)
        k = b * math.sqrt(1 - to) / (to * model.spread**2 + 1 - to)
        parts.append((a, k, math.sqrt(to) * mean))
    factor, shift = 1.0, 0.0 * mean
    for a, k, centre in parts:
        factor, shift = (a + k) * factor, (a + k) * shift - k * centre
    for a, k, centre in parts[::-1]:
        factor, shift = (1 - k) / a * factor, ((1 - k) * shift + k * centre) / a
    want = factor * Z + shift.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(inversion.reconstruction, want, rtol=0, atol=1e-10)
    assert (inversion.error > 0.2).all()
    assert inversion.calls == steps * (1 if scale == 1 else 2)


def test_an_inversion_keeps_as_many_latents_as_steps_each_at_the_level_of_its_index():
    inversion = invert("ddim", Network(LinearGaussian()), Z, guided(3.0), steps=6)
    assert len(inversion) == len(inversion.latents) == 6 and inversion.latents.shape[1:] == SHAPE
    asked = []

    def after(x, level):
        asked.append((level.left, x.clone()))
        return x + 1 if level.left == 2 else x

    # From step 4 of 6 on, two steps are left, and they begin at inversion[-5].
    x, (first, last) = inversion.sample(start_step=4, after=after), asked
    assert (first[0], last[0]) == (1, 0) and torch.equal(x, last[1])
    again = invert("ddim", Network(LinearGaussian()), Z, guided(3.0), steps=6, measure=False)
    assert again.error is None and again.reconstruction is None
    torch.testing.assert_close(again.measure(), inversion.error)
    assert not torch.equal(inversion.sample(after=after), inversion.reconstruction)  # changed on the way


def test_one_picture_is_sampled_under_several_contexts_at_once():
    inversion = invert("ddim", Network(LinearGaussian()), Z[:1], Context(MEANS[:1]), steps=5)
    both = inversion.sample(Context(MEANS), start_step=1)
    assert both.shape == SHAPE
    for row in range(2):
        alone = inversion.sample(Context(MEANS[row : row + 1]), start_step=1)
        torch.testing.assert_close(both[row : row + 1], alone)
    with pytest.raises(UsageError, match="the context is for 3 pictures, but 2 were inverted"):
        invert("ddim", Network(LinearGaussian()), Z, Context(MEANS), steps=2).sample(Context(torch.zeros(3)))


def test_a_network_may_be_a_plain_function():
    model = Wavy()
    network = Network(model)

    def function(x, level, context):
        return model.raw(x, torch.tensor([level.t]))

    want = invert("ddim", network, Z, Context(None), steps=4)
    got = invert("ddim", function, Z, Context(None), steps=4, model=model)
    assert got.calls == 0 and want.calls == 4
    torch.testing.assert_close(got.latents, want.latents)
    torch.testing.assert_close(got.error, want.error)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dimm", {}, r"the inversion must be one of ddim.*; got 'dimm' \(did you mean ddim\?\)"),
        (3, {}, "the inversion must be one of .*; got 3"),
        (None, {}, "the inversion must be one of .*; got None"),
        ("ddim", {"eta": 0.5}, "eta of the inversion ddim must be 0.*; got 0.5"),
        ("ddim", {"eta": float("nan")}, "eta of the inversion ddim must be 0.*; got nan"),
        ("ddim", {"eta": "0"}, "eta of the inversion ddim must be 0.*; got '0'"),
        ("ddim", {"depth": 3}, "the inversion ddim has no option depth; it has eta"),
        ("ddim", {"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ("ddim", {"steps": 1001}, "steps must be a whole number from 1 to 1000, got 1001"),
        ("ddim", {"spacing": "even"}, "the spacing must be one of .*; got 'even'"),
    ],
)
def test_what_is_no_method_or_option_is_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        invert(name, Network(LinearGaussian()), Z, guided(3.0), **options)
    assert len(str(caught.value)) <= 400 and caught.value.exit_code == 2


@pytest.mark.parametrize("start", [-1, 5, 1.0, True, None])
def test_a_start_outside_the_run_is_refused(start):
    inversion = invert("ddim", Network(Line(EPS)), Z, Context(None), steps=5)
    with pytest.raises(UsageError, match="start_step must be a whole number from 0 to 4, got"):
        inversion.sample(start_step=start)


def test_a_method_is_found_by_any_spelling_and_an_object_is_taken_as_it_is():
    made = resolve_method(" DDIM ")
    assert resolve_method(made) is made and type(made) is METHODS["ddim"]
    with pytest.raises(UsageError, match="a method that is made takes no further options, got eta"):
        resolve_method(made, eta=0)


def test_values_that_are_not_finite_are_said():
    with pytest.raises(NumericError, match="the inversion by ddim gave values that are not finite"):
        invert("ddim", Network(Line(EPS / 0)), Z, Context(None), steps=3)
    inversion = invert("ddim", Network(Line(EPS)), Z, Context(None), steps=3)
    with pytest.raises(NumericError, match="sampling by ddim gave values that are not finite"):
        inversion.sample(network=Network(Line(EPS / 0)))
