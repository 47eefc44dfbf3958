"""Laws of the samplers with Brownian noise, of CFG++, and of the samplers that make their own steps."""

import math
from dataclasses import replace

import pytest
import torch
from linear_gaussian import Line, LinearGaussian, Wavy, mix, normals

from ldm.errors import UsageError
from ldm.models.diffusion.samplers import SAMPLERS, Denoiser, alpha_bar_table, sample_steps, sampler_options
from ldm.process.steps import dpm_solver_singlestep

SHAPE = (2, 4, 5, 3)
MEANS = torch.tensor([0.8, -0.3])
UNCOND = torch.tensor([0.1, 0.2])
SDE = [name for name, cls in SAMPLERS.items() if hasattr(cls, "brownian")]


def last(name, model=None, x_T=None, cond=MEANS, **options):
    x_T = normals(*SHAPE)[0] if x_T is None else x_T
    *_, step = sample_steps(name, model or LinearGaussian(), x_T, cond, **options)
    return step.x_t


def images(seeds):
    """Noise of one generator an image, as a request draws it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(like):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)

    return noise


def noisy(name):
    """Options by which a sampler draws noise, if it can at all."""
    cls, options = SAMPLERS[name], sampler_options(SAMPLERS[name])
    if "s_churn" in options:
        return {"s_churn": 5.0}
    return {"eta": 0.7} if cls.own_eta == 0 and cls.accepts_eta(0.7) else {}


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
@pytest.mark.thinned(5)
def test_an_image_does_not_depend_on_its_batch_nor_on_its_place_in_it(name):
    """Of all that draw noise and of all that do not, but for dpm_adaptive, whose steps are those of the batch."""

    def run(*seeds):
        noise = images(seeds)
        x_T = noise(torch.empty(len(seeds), 2, 3, 1, dtype=torch.float64))
        options = {"steps": 20 if name == "restart" else 4, "spacing": "karras", **noisy(name)}
        return last(name, Wavy(), x_T, None, noise=noise, **options)

    three = run(7, 8, 9)
    assert (three[0] - three[1]).abs().max() > 1e-3
    torch.testing.assert_close(run(8), three[1:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(run(9, 7), three[[2, 0]], rtol=0, atol=1e-12)


def test_longer_runs_meet_the_same_noise_and_come_near():
    """Twice the steps over one Brownian path end nearer than over another path, and than with noise drawn afresh."""

    def end(steps, seed, **options):
        noise = images([seed, seed + 1])
        return last("dpmpp_2m_sde", steps=steps, spacing="karras", noise=noise, **options)

    near, other = ((end(30, 1) - end(60, seed)).pow(2).mean().sqrt() for seed in (1, 5))
    fresh = (end(30, 1, brownian=False) - end(60, 1, brownian=False)).pow(2).mean().sqrt()
    assert near < 0.5 * other and near < 0.5 * fresh


@pytest.mark.parametrize("name", SDE)
def test_without_eta_or_noise_they_are_deterministic(name):
    ends = [last(name, steps=4, noise=images(seeds), eta=0.0) for seeds in ([1, 2], [3, 4])]
    assert torch.equal(*ends)
    silent = [last(name, steps=4, noise=images(seeds), s_noise=0.0) for seeds in ([1, 2], [3, 4])]
    assert torch.equal(*silent) and not torch.equal(silent[0], ends[0])


def test_singlestep_solvers_have_their_order():
    """Over one step of the exact flow of N(0.8, 0.5^2): halving it divides the error by 2^(order + 1)."""
    (x,) = normals(*SHAPE)

    def predict(x, sigma):
        return 0.8 + 0.25 / (0.25 + sigma**2) * (x - 0.8)

    def error(order, h):
        start, end = (torch.tensor(s, dtype=torch.float64) for s in (2.0, 2.0 * math.exp(-h)))
        got, lower = dpm_solver_singlestep(x, predict, start, end, order)
        want = 0.8 + (x - 0.8) * ((0.25 + end**2) / (0.25 + start**2)).sqrt()
        return (got - want).abs().max(), (lower - want).abs().max()

    for order in (1, 2, 3):
        (coarse, coarse_low), (fine, fine_low) = error(order, 0.1), error(order, 0.05)
        assert coarse / fine == pytest.approx(2 ** (order + 1), rel=0.1)
        assert coarse_low / fine_low == pytest.approx(2 ** max(order, 2), rel=0.1)


def test_tighter_tolerance_is_nearer_and_calls_more_often():
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    want = model.flow((1 - alpha_bar_table(model)[-1]) ** 0.5 * x_T, 0.8, *alpha_bar_table(model)[[-1, 0]])
    errors, calls = [], []
    for rtol in (0.1, 0.001, 0.0001):
        model.asked.clear()
        got = last("dpm_adaptive", model, x_T, MEANS[:1].expand(2), steps=5, rtol=rtol, atol=rtol / 10)
        errors.append((got - want).abs().max().item())
        calls.append(len(model.asked))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and calls[0] < calls[1] < calls[2]


def test_adaptive_runs_of_a_part_begin_at_their_level():
    model, (z, noise) = LinearGaussian(), normals(*SHAPE, count=2)
    done = list(sample_steps("dpm_adaptive", model, noise, MEANS, steps=10, run_last=4, start_from=z))
    plan = SAMPLERS["dpm_adaptive"].plan(alpha_bar_table(model), 10)
    assert done[0].t == pytest.approx(plan[-5].t) and done[-1].total == len(done) > 1
    assert [step.total for step in done[:-1]] == [step.index + 2 for step in done[:-1]]


@pytest.mark.parametrize("name", ["euler_cfg_pp", "euler_a_cfg_pp", "ddim_cfg_pp"])
def test_cfg_pp_steps_to_the_guided_sample_by_the_unconditional_noise(name):
    """By hand, over one step; without an unconditional condition it is the sampler of that name without CFG++."""
    model, (x,) = LinearGaussian(), normals(*SHAPE)
    options = {"steps": 2, "spacing": "trailing", "eta": 0.0} if name != "euler_cfg_pp" else {"steps": 2}
    options |= {"spacing": "trailing"}
    plain = {"euler_cfg_pp": "euler", "euler_a_cfg_pp": "euler_a", "ddim_cfg_pp": "ddim"}[name]
    torch.testing.assert_close(last(name, x_T=x, **options), last(plain, x_T=x, **options))
    here, to, _ = SAMPLERS[name].plan(alpha_bar_table(model), 2, spacing="trailing")
    x_0 = SAMPLERS[name].start(x, here)
    for scale in (0.6, 1.0, 1.5):
        eps, _ = Denoiser(model, UNCOND)(x_0, here.t, here.alpha_bar)
        _, x0 = Denoiser(model, UNCOND + scale * (MEANS - UNCOND))(x_0, here.t, here.alpha_bar)
        want = to.alpha_bar.sqrt() * x0 + (1 - to.alpha_bar).sqrt() * eps
        guided = {"guidance_scale": scale, "unconditional_conditioning": UNCOND}
        step = next(sample_steps(name, model, x, MEANS, **options, **guided))
        torch.testing.assert_close(step.x_t, want, rtol=0, atol=1e-5)
        outside = {**guided, "guidance_interval": (0.0, 0.2)}
        step = next(sample_steps(name, model, x, MEANS, **options, **outside))
        first = next(sample_steps(plain, model, x, MEANS, **options))
        torch.testing.assert_close(step.x_t, first.x_t, rtol=0, atol=1e-5)


def test_restart_keeps_mean_and_spread_of_the_data():
    model = LinearGaussian()
    (x_T,) = normals(2, 8, 25, 20)
    draws = torch.Generator().manual_seed(1)

    def noise(like):
        return torch.randn(like.shape, generator=draws, dtype=like.dtype)

    x = last("restart", model, x_T, steps=40, noise=noise).flatten(1)
    torch.testing.assert_close(x.mean(1), MEANS.double(), rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(1) / model.spread, torch.ones(2).double(), rtol=0, atol=0.06)


INVERTS = ("ddim", "dpm_solver", "dpmpp_2m", "euler", "heun", "dpm2", "lms")


def test_an_inversion_leads_to_the_noise_that_leads_back():
    """Exactly where the noise is one along the way, also a part of it; nearer with more steps where it is not."""
    z, eps = normals(*SHAPE, count=2)
    model = LinearGaussian()
    assert tuple(sorted(INVERTS)) == tuple(sorted(name for name, cls in SAMPLERS.items() if cls.inverts))
    for name in INVERTS:
        spacing = "trailing" if name in ("ddim", "dpmpp_2m") else "exponential"
        for count in (None, 4):
            options = {"steps": 9, "spacing": spacing, "run_last": count}
            up = list(sample_steps(name, Line(eps), z, None, invert=True, **options))
            plan = SAMPLERS[name].plan(alpha_bar_table(model), 9, spacing=spacing)
            top, end = plan[-1 - (count or 9)], float(plan[-1].alpha_bar)
            x0 = (z - math.sqrt(1 - end) * eps) / math.sqrt(end)  # z itself, but for DDIM
            torch.testing.assert_close(up[-1].x_t, mix(x0, eps, top.alpha_bar), rtol=0, atol=1e-6)
            assert len(up) == (count or 9)
        errors = []
        for steps in (20, 80) if name in ("ddim", "euler") else (10, 40):  # of order 1, and higher
            options = {"steps": steps, "spacing": spacing}
            noise = last(name, model, z, invert=True, **options)
            top = SAMPLERS[name].plan(alpha_bar_table(model), steps, spacing=spacing)[0]
            start = (
                noise if name in ("ddim", "dpm_solver", "dpmpp_2m") else noise / (1 - top.alpha_bar).sqrt()
            )
            errors.append((last(name, model, start, **options) - z).abs().max())
        assert errors[1] < 0.5 * errors[0] and errors[1] < 0.2, name


def test_what_cannot_be_inverted_is_refused():
    z = normals(*SHAPE)[0]
    for name in SAMPLERS.keys() - set(INVERTS):
        with pytest.raises(
            UsageError, match=f"{name} does not invert at all; these do, .*: ddim, "
        ) as caught:
            sample_steps(name, Wavy(), z, None, steps=3, invert=True)
        assert len(str(caught.value)) <= 400
    for name, options in (("ddim", {"eta": 0.5}), ("heun", {"s_churn": 1.0})):
        with pytest.raises(UsageError, match=f"{name} does not invert with fresh noise"):
            sample_steps(name, Wavy(), z, None, steps=3, invert=True, **options)
    with pytest.raises(UsageError, match="leave mask and start_from out"):
        sample_steps("ddim", Wavy(), z, None, steps=3, invert=True, mask=torch.ones(1, 1, 5, 3), x0=z)


def test_a_step_to_the_same_level_changes_nothing():
    """The first step of each, and one that remembers another before it."""
    (x,) = normals(*SHAPE)
    for name, cls in SAMPLERS.items():
        sampler = cls(Denoiser(Wavy(), None), eta=0.0) if cls.accepts_eta(0) else cls(Denoiser(Wavy(), None))
        here, to, *_ = cls.plan(alpha_bar_table(Wavy()), 8, spacing="karras")
        same = replace(here)
        torch.testing.assert_close(sampler.step(x, here, same)[0], x, rtol=0, atol=1e-9, msg=name)
        sampler = cls(Denoiser(Wavy(), None), eta=0.0)
        x_to, *_ = sampler.step(x, here, to)
        if name != "dpm_adaptive":
            again = sampler.step(x_to, to, replace(to))[0]
            torch.testing.assert_close(again, x_to, rtol=0, atol=1e-9, msg=name)


def test_without_fresh_noise_all_are_deterministic():
    """At eta 0, or where noise has no weight, whatever is drawn; DDPM's alone has no such setting."""
    for name in SAMPLERS.keys() - {"ddpm"}:
        silent = {"restart": {"s_noise": 0.0}, "lcm": {"s_noise": 0.0}, "tcd": {"gamma": 0.0}}
        silent = silent.get(name, {"eta": 0.0})
        steps = 20 if name == "restart" else 4
        ends = [last(name, steps=steps, noise=images(seeds), **silent) for seeds in ([1, 2], [3, 4])]
        assert torch.equal(*ends), name


@pytest.mark.parametrize("name", [n for n, cls in SAMPLERS.items() if "s_noise" in sampler_options(cls)])
@pytest.mark.thinned(5)
def test_with_noise_of_no_weight_they_are_deterministic(name):
    """At s_noise 0, with churn where there is some; and not at 1."""
    options = {"steps": 20 if name == "restart" else 4, **noisy(name)}
    for s_noise in (0.0, 1.0):
        ends = [last(name, noise=images(seeds), s_noise=s_noise, **options) for seeds in ([1, 2], [3, 4])]
        assert torch.equal(*ends) == (s_noise == 0)


def test_a_mask_keeps_what_is_kept_at_the_last_level_that_is_blended():
    """Where it is 1, the sample before the last step is x0 noised; a network that gives it back is told so there."""
    x_T, x0 = normals(*SHAPE, count=2)
    mask = torch.zeros(1, 1, 5, 3, dtype=torch.float64)
    mask[..., 1:] = 1
    for name in SAMPLERS:
        seen = []

        class Seen(Wavy):
            def apply_model(self, x, t, cond, seen=seen):
                seen.append(x)
                return self.raw(x, t)

        options = {"steps": 3, "noise": torch.zeros_like, "mask": mask, "x0": x0, "spacing": "karras"}
        last(name, Seen(), x_T, None, **options)
        kept = seen[0][..., 1:] / x0[..., 1:]  # sqrt(alpha_bar), for the noise is 0
        torch.testing.assert_close(kept, torch.full_like(kept, float(kept.median())), rtol=1e-9, atol=0)


REFUSED = [
    ("dpmpp_sde", {"r": 0.0}, "r must be above 0 and at most 1, got 0.0"),
    ("dpmpp_sde", {"eta": 1.5}, "eta of dpmpp_sde must be from 0 to 1; got 1.5"),
    ("dpmpp_2m_sde", {"solver_type": "taylor"}, "solver_type must be midpoint or heun, got 'taylor'"),
    ("dpmpp_2m_sde", {"order": 3}, "dpmpp_2m_sde has no option order"),
    ("dpm_adaptive", {"order": 1}, "order must be 2 or 3, got 1"),
    ("dpm_adaptive", {"rtol": 0.0}, "rtol must be a number above 0, got 0.0"),
    ("dpm_adaptive", {"h_init": math.nan}, "h_init of dpm_adaptive must be a finite number, got nan"),
    ("dpm_fast", {"eta": -0.1}, "eta of dpm_fast must be from 0 to 1; got -0.1"),
    (
        "euler_cfg_pp",
        {"eta": 1.0},
        "eta of euler_cfg_pp must be 0: take euler_a_cfg_pp for fresh noise; got 1.0",
    ),
    ("restart", {"brownian": True}, "restart has no option brownian"),
    (
        "euler",
        {"spacing": "trailing", "rho": 5.0},
        "the spacing 'trailing' has no option rho; tables of sigmas",
    ),
    (
        "euler",
        {"spacing": "exponential", "rho": 5.0},
        "the sigmas 'exponential' have no option rho; it has none",
    ),
    (
        "euler",
        {"spacing": [3.0, 1.0, 0.5, 0.0], "sigma_min": 1.0},
        "a list of sigmas or of t has no option sigma_min",
    ),
    (
        "euler",
        {"spacing": "karras", "sigma_min": 20.0},
        "sigmas must go from 1e-06 or above up to at most 1000000, got 20.0",
    ),
    (
        "euler",
        {"spacing": "karras", "rho": 0.0},
        "rho of the sigmas 'karras' must be from 0.01 to 100, got 0.0",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_without_meaning_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        sample_steps(name, LinearGaussian(), normals(*SHAPE)[0], MEANS, steps=3, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


def test_options_of_a_spacing_reach_it():
    table = alpha_bar_table(LinearGaussian())
    ends = {"spacing": "karras", "sigma_min": 0.1, "sigma_max": 5.0, "rho": 3.0}
    sigmas = [float(level.sigma) for level in SAMPLERS["euler"].plan(table, 3, **ends)]
    middle = ((5 ** (1 / 3) + 0.1 ** (1 / 3)) / 2) ** 3
    assert sigmas == pytest.approx([5.0, middle, 0.1, 0.0])
    kept = SAMPLERS["dpm2"].plan(table, 3, discard_next_to_last=False, **ends)
    assert [float(level.sigma) for level in kept] == pytest.approx(sigmas)
    dropped = SAMPLERS["euler"].plan(table, 3, discard_next_to_last=True, **ends)
    assert len(dropped) == 4 and float(dropped[2].sigma) > 0.1
    assert float(SAMPLERS["dpm_fast"].plan(table, 5, sigma_min=0.5)[-1].sigma) == pytest.approx(0.5)
