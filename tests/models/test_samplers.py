"""The one loop and its samplers, held to laws on models whose right answers are known."""

import itertools
import math
import re

import pytest
import torch
from linear_gaussian import Line, LinearGaussian, Wavy, mix, normals

from ldm.errors import UsageError
from ldm.models.diffusion.conditions import Condition, ScheduledCondition
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.samplers import (
    DDIM,
    NAMES,
    SAMPLERS,
    Level,
    LevelTable,
    Step,
    alpha_bar_table,
    resolve_sampler,
    sample_steps,
    start_level,
)
from ldm.process.gaussian import posterior

SHAPE = (2, 4, 5, 3)
CALLS = {names.name: names.calls for names in NAMES}
TWICE = "2 S - 1"  # the network is called at two levels in each step, but for the last
MEANS = torch.tensor([0.8, -0.3])


def last(steps):
    *_, step = steps
    return step.x_t


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def plan_of(name, model, steps, **options):
    return SAMPLERS[name].plan(alpha_bar_table(model), steps, **options)


def counted(calls, steps):
    """Count the calls of the network by the words of the table."""
    return eval(re.sub(r"(\d) S", r"\1 * S", calls), {"S": steps})


def of_each_step(name, calls):
    """Keep the first call of each step; PLMS looks at both ends of its first."""
    if name == "heunpp2":  # at three levels, then two, then one
        return [*calls[:-3:3], *calls[-3::2]] if len(calls) > 1 else calls
    return calls[::2] if CALLS[name] == TWICE else calls if name != "plms" else [calls[0], *calls[2:]]


def afresh(name):
    """Options of the cheapest noise."""
    return {"brownian": False} if hasattr(SAMPLERS[name], "brownian") else {}


def quiet(like):
    return torch.zeros_like(like)


# --- the answers are right


@pytest.mark.parametrize(
    ("name", "kind"), itertools.product(["ddim", "plms", "dpm_solver", "dpmpp_2m"], ["eps", "x0", "v"])
)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_with_exact_predictions_deterministic_samplers_stay_on_the_line(name, kind, steps):
    """A network that knows the noise takes them along x0 and eps, in any number of steps."""
    x0, eps = normals(*SHAPE, count=2)
    model = Line(eps, kind)
    plan = plan_of(name, model, steps)
    # dpm_solver tells fractions in float32, where a level is 3e-5 off; the others tell whole levels.
    atol = 1e-5 if name == "dpm_solver" else 1e-9
    x_T = mix(x0, eps, plan[0].alpha_bar)
    for step in sample_steps(name, model, x_T, None, steps=steps):
        close(step.pred_x0, x0, atol=atol)
        close(step.x_t, mix(x0, eps, plan[step.index + 1].alpha_bar), atol=atol)


@pytest.mark.parametrize("steps", [1, 7])
def test_ddpm_ends_at_the_clean_sample_that_its_network_knows(steps):
    x0, x_T = normals(*SHAPE, count=2)
    model = Wavy("x0")
    model.raw = lambda x, t: x0
    done = list(sample_steps("ddpm", model, x_T, None, steps=steps))
    close(done[-1].x_t, x0)
    assert steps == 1 or (done[-2].x_t - x0).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "coarse", "ratio"),
    [
        ("ddim", {}, 50, 2),
        ("dpm_solver", {"spacing": "logSNR", "order": 1}, 20, 2),
        ("dpm_solver", {"spacing": "logSNR"}, 20, 4),
        ("dpm_solver", {"spacing": "logSNR", "solver_type": "taylor"}, 20, 4),
        ("dpm_solver", {"spacing": "logSNR", "predict_x0": False}, 20, 4),
        ("dpm_solver", {"spacing": "logSNR", "order": 3, "solver_type": "taylor"}, 20, 8),
        ("dpm_solver", {"spacing": "logSNR", "order": 3, "predict_x0": False}, 20, 8),
    ],
)
def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order(name, options, coarse, ratio):
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)

    def error(steps):
        plan = plan_of(name, model, steps, spacing=options.get("spacing"))
        want = model.flow(x_T, 0.8, plan[0].alpha_bar.item(), plan[-1].alpha_bar.item())
        got = last(sample_steps(name, model, x_T, MEANS[:1].expand(2), steps=steps, **options))
        return (got - want).abs().max().item()

    assert error(2 * coarse) < 1.15 / ratio * error(coarse)


def test_plms_beats_ddim_by_far_on_the_same_levels():
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    plan = plan_of("ddim", model, 50)
    want = model.flow(x_T, 0.8, plan[0].alpha_bar.item(), plan[-1].alpha_bar.item())
    ddim, plms = (
        (last(sample_steps(name, model, x_T, MEANS[:1].expand(2), steps=50)) - want).abs().max()
        for name in ("ddim", "plms")
    )
    assert plms < ddim / 10 and plms < 0.01


@pytest.mark.parametrize(
    ("name", "eta", "steps"), [("ddim", 1.0, 400), ("ddim", 0.5, 200), ("ddpm", 0.0, 800)]
)
def test_stochastic_samplers_keep_mean_and_spread_of_the_data(name, eta, steps):
    """Means within 4 standard errors of 4000 values; the spread within 4 % (its own discretisation included)."""
    model = LinearGaussian()
    (x_T,) = normals(2, 8, 25, 20)
    draws = torch.Generator().manual_seed(1)

    def noise(like):
        return torch.randn(like.shape, generator=draws, dtype=like.dtype)

    x = last(sample_steps(name, model, x_T, MEANS, steps=steps, eta=eta, noise=noise)).flatten(1)
    close(x.mean(dim=1), MEANS.double(), atol=4 * model.spread / math.sqrt(4000))
    close(x.std(dim=1), torch.full((2,), model.spread, dtype=torch.float64), atol=0.04 * model.spread)


def test_ddim_at_eta_one_has_the_variance_of_ddpms_posterior():
    model = Wavy()
    for here, to in itertools.pairwise(plan_of("ddim", model, 20)):
        std = DDIM(None, eta=1.0).std(here, to)
        close(std**2, posterior(here.alpha_bar, to.alpha_bar).variance)


def test_ancestral_steps_over_all_levels_are_ddims_at_eta_one():
    """On one plan (all levels to the clean end) the two are one process; DDIM's own plan ends at level 0."""
    model = LinearGaussian(num_timesteps=30)
    (x_T,) = normals(*SHAPE)
    noises = normals(*SHAPE, count=30, seed=1)

    def run(name):
        coming = iter(noises)
        return list(sample_steps(name, model, x_T, MEANS, steps=30, eta=1.0, noise=lambda _: next(coming)))

    ancestral, ddim = run("ddpm"), run("ddim")
    for a, b in zip(ancestral[:-1], ddim[:-1], strict=True):
        close(a.x_t, b.x_t)
    close(ancestral[-1].x_t, ancestral[-1].pred_x0)


# --- as many steps as were asked for


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_count_gives_a_plan_of_that_length(name):
    model = Wavy()
    table = alpha_bar_table(model)
    for steps in sorted({*range(1, 1001, 111), 2, 3, 9, 27, 300, 501, 999, 1000}):
        if name == "dpm_adaptive" and steps == 1000:  # ends at the 1000th level, one step less
            continue
        plan = SAMPLERS[name].plan(table, steps)
        count = steps // 3 + 1 if name == "dpm_fast" else steps
        assert [level.left for level in plan] == sorted((level.left for level in plan), reverse=True)
        assert {level.left for level in plan} == set(range(count + 1)) and plan[0].total == count
        t = [level.t for level in plan[:-1]]
        assert min(t) >= 0 and t[0] == max(t) <= 999
        falls = [here.alpha_bar <= to.alpha_bar for here, to in itertools.pairwise(plan)]
        assert sum(falls) == count and (all(falls) or name == "restart")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 9, 30])
def test_a_run_takes_exactly_the_steps_asked_for_and_counts_them(name, steps):
    model = Wavy()
    (x_T,) = normals(*SHAPE)
    done = list(sample_steps(name, model, x_T, None, steps=steps))
    count = steps // 3 + 1 if name == "dpm_fast" else len(done) if name == "dpm_adaptive" else steps
    assert [step.index for step in done] == list(range(count))
    assert done[-1].total == count
    if CALLS[name] != "by tolerance":
        assert len(model.asked) == counted(CALLS[name], steps)
    times = [step.t for step in done]
    assert times == sorted(times, reverse=True) or name == "restart"
    told = [t[0].item() for _, t in model.asked]
    firsts = of_each_step(name, told)
    if name not in ("dpm_fast", "dpm_adaptive"):
        assert times == pytest.approx(firsts, abs=1e-4)


@pytest.mark.parametrize(
    "counts", [(2, 5, 6, 22, 37), pytest.param(range(1, 101), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_number_of_steps_calls_the_network_as_often_as_the_docs_say(counts):
    """PLMS's "S + 1", Heun's "2 S - 1" and so on are the words of the docs' own table."""
    (x_T,), model = normals(1, 1, 1, 1), Wavy()
    model.raw = lambda x, t: x
    for name, calls in CALLS.items():
        if calls == "by tolerance":
            continue
        for steps in counts:
            model.asked.clear()
            last(sample_steps(name, model, x_T, None, steps=steps, **afresh(name)))
            assert len(model.asked) == counted(calls, steps), (name, steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.thinned(12)
def test_the_longest_run_ends_with_finite_numbers(name):
    (x_T,) = normals(1, 2, 3, 1)
    steps = sample_steps(name, LinearGaussian(), x_T, MEANS[:1], steps=1000, **afresh(name))
    assert last(steps).isfinite().all()


def test_whole_levels_are_told_as_integers_and_fractions_as_floats():
    model = Wavy()
    (x_T,) = normals(*SHAPE)
    for name in SAMPLERS:
        last(sample_steps(name, model, x_T, None, steps=2))
        whole = name in ("ddim", "ddim_cfg_pp", "plms", "ddpm", "dpmpp_2m", "dpm_solver_singlestep")
        assert model.asked[-1][1].dtype == (torch.int64 if whole else torch.float32)


def test_dpm_solver_tells_the_levels_of_the_original():
    told = [level.t for level in plan_of("dpm_solver", Wavy(), 20)][:-1]
    assert told[0] == 999 and told[1] == pytest.approx(949.05) and told[-1] == pytest.approx(49.95)


def test_the_historic_spacing_is_there_by_name():
    (x_T,) = normals(*SHAPE)
    done = list(sample_steps("ddim", Wavy(), x_T, None, steps=30, spacing="compvis"))
    assert len(done) == 31 and done[0].t == 991
    with pytest.raises(UsageError, match="wants level 1000 of a model whose highest is 999"):
        sample_steps("ddim", Wavy(), x_T, None, steps=300, spacing="compvis")


# --- parts of a run


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_last_steps_alone_end_where_the_whole_run_does(name):
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    whole = list(sample_steps(name, model, x_T, MEANS, steps=10, noise=quiet))
    part = list(sample_steps(name, model, whole[5].x_t, MEANS, steps=10, noise=quiet, run_last=4))
    assert [(s.index, s.total) for s in part] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for a, b in zip(whole[6:], part, strict=True):
        assert a.t == b.t
        close(a.x_t, b.x_t, atol=0)


def test_no_last_steps_are_no_steps():
    assert list(sample_steps("ddim", Wavy(), normals(*SHAPE)[0], None, steps=10, run_last=0)) == []


def test_start_levels_follow_the_original():
    model = Wavy()
    for name in SAMPLERS:
        if name in ("dpm_fast", "restart"):  # whose plans are of another length
            continue
        assert start_level(name, model, 20, 0) == (0, None)
        assert start_level(name, model, 20, 0.04) == (0, None)
        assert start_level(name, model, 20, 1.0) == (20, None)
        count, alpha_bar = start_level(name, model, 20, 0.6)
        plan = plan_of(name, model, 20)
        # CompVis noises to the level above the first one that DDIM denoises; the others meet it exactly.
        left = 13 if name in ("ddim", "ddim_cfg_pp", "plms") else 12
        assert count == 12 and alpha_bar == plan[20 - left].alpha_bar
    assert start_level("ddim", model, 50, 0.58)[0] == 28  # int(0.58 * 50) = int(28.999...), as CompVis has it


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_strengths_out_of_range_are_named(strength):
    with pytest.raises(UsageError, match="strength must be from 0 to 1, got") as caught:
        start_level("ddim", Wavy(), 20, strength)
    assert repr(strength) in str(caught.value)


# --- guidance


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}])
def test_guidance_on_gaussians_moves_the_mean(wrap, separate):
    """The best eps is linear in the mean, so guiding between two means is sampling at u + s (c - u)."""
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    u, c = torch.tensor([0.1, 0.2]), torch.tensor([0.6, -0.4])
    guided = sample_steps(
        "ddim",
        model,
        x_T,
        wrap(c),
        steps=7,
        guidance_scale=3.0,
        unconditional_conditioning=wrap(u),
        separate_passes=separate,
    )
    close(last(guided), last(sample_steps("ddim", model, x_T, u + 3 * (c - u), steps=7)), atol=1e-6)


def test_one_batch_has_the_unconditional_half_first_and_two_passes_the_conditional():
    class Echo(Wavy):
        def apply_model(self, x, t, cond):
            seen.append((len(x), len(t), cond.tolist()))
            return x

    u, c, (x_T,) = torch.tensor([1, 2]), torch.tensor([3, 4]), normals(*SHAPE)
    options = {"steps": 1, "guidance_scale": 2.0, "unconditional_conditioning": u}
    seen = []
    last(sample_steps("ddim", Echo(), x_T, c, **options))
    assert seen == [(4, 4, [1, 2, 3, 4])]
    seen = []
    last(sample_steps("ddim", Echo(), x_T, c, **options, separate_passes=True))
    assert seen == [(2, 2, [3, 4]), (2, 2, [1, 2])]


@pytest.mark.parametrize(("scale", "uncond"), [(1.0, MEANS), (7.5, None)])
def test_the_unconditional_pass_is_skipped_where_it_changes_nothing(scale, uncond):
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    options = {"guidance_scale": scale, "unconditional_conditioning": uncond}
    last(sample_steps("ddim", model, x_T, MEANS, steps=3, **options))
    assert [shape[0] for shape, _ in model.asked] == [2, 2, 2]


def test_scale_zero_is_the_unconditional_answer():
    model, (x_T,) = LinearGaussian(), normals(*SHAPE)
    got = sample_steps(
        "ddim", model, x_T, -MEANS, steps=3, guidance_scale=0.0, unconditional_conditioning=MEANS
    )
    close(last(got), last(sample_steps("ddim", model, x_T, MEANS, steps=3)), atol=0)


def test_rescaled_guidance_has_the_conditional_spread():
    class Scaled(Wavy):
        def apply_model(self, x, t, cond):
            return cond.reshape(-1, 1, 1, 1).to(x.dtype) * x

    (x_T,) = normals(*SHAPE)
    u, c = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])

    def first(**options):
        return next(sample_steps("ddim", Scaled(), x_T, c, steps=1, **options)).pred_x0

    guided = {"guidance_scale": 9.0, "unconditional_conditioning": u}
    close(first(**guided, guidance_rescale=1.0), first(), atol=1e-9)
    assert (first(**guided) - first()).abs().max() > 1


def test_several_conditions_need_an_unconditional_one():
    (x,) = normals(2, 4, 5, 3)
    several = ScheduledCondition([[Condition(torch.zeros(7, 6))] * 2] * 2)
    denoise = Denoiser(LinearGaussian(), several, guidance_scale=3.0)
    with pytest.raises(UsageError, match=r"\(AND\) need an unconditional one; got none"):
        denoise(x, 500, torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_guidance_scales_that_are_no_numbers_are_refused(value):
    with pytest.raises(UsageError, match=f"guidance_scale must be a finite number, got {value}"):
        sample_steps("ddim", Wavy(), normals(*SHAPE)[0], None, steps=3, guidance_scale=value)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_guidance_rescale_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match=f"guidance_rescale must be from 0 to 1, got {value}"):
        sample_steps("ddim", Wavy(), normals(*SHAPE)[0], None, steps=3, guidance_rescale=value)


# --- noise


def test_noise_is_asked_for_in_the_originals_order_even_where_its_weight_is_zero():
    asked = []

    def noise(like):
        asked.append(tuple(like.shape))
        return torch.zeros_like(like)

    x_T, x0, mask = *normals(*SHAPE, count=2), torch.ones(2, 1, 5, 3, dtype=torch.float64)
    image = x0[:1]  # another shape than the sample's, to tell the draws apart
    expected = {"ddim": 1, "ddpm": 1, "dpm_solver": 0, "dpmpp_2m": 0}
    for name, own in expected.items():
        asked.clear()
        last(sample_steps(name, Wavy(), x_T, None, steps=3, noise=noise, mask=mask, x0=image))
        assert asked == [(1, 4, 5, 3), *[SHAPE] * own] * 3
    asked.clear()
    last(sample_steps("plms", Wavy(), x_T, None, steps=3, noise=noise))
    assert asked == [SHAPE] * 4  # two at the first step, whose guess draws as well


def test_by_default_noise_comes_from_the_global_generator_as_the_originals():
    (x_T,) = normals(*SHAPE, dtype=torch.float32)
    torch.manual_seed(3)
    default = last(sample_steps("ddim", Wavy(), x_T, None, steps=3, eta=1.0))
    after = torch.randn(1)
    torch.manual_seed(3)
    drawn = iter([torch.randn(*SHAPE) for _ in range(3)])
    given = last(sample_steps("ddim", Wavy(), x_T, None, steps=3, eta=1.0, noise=lambda _: next(drawn)))
    close(default, given, atol=0)
    close(after, torch.randn(1), atol=0)


@pytest.mark.parametrize(("name", "eta"), [("ddim", 1.0), ("ddpm", 0.0)])
def test_with_noise_of_its_own_an_image_does_not_depend_on_its_batch(name, eta):
    def sampled(rows):
        generators = [torch.Generator().manual_seed(40 + row) for row in rows]

        def noise(like):
            each = [torch.randn(1, *like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
            return torch.cat(each)

        x_T = noise(torch.empty(len(rows), 4, 5, 3, dtype=torch.float64))
        return last(sample_steps(name, Wavy(), x_T, None, steps=4, eta=eta, noise=noise))

    together = sampled([0, 1, 2])
    for row in range(3):
        close(sampled([row])[0], together[row], atol=1e-12)


def test_noise_options_do_what_their_names_say():
    (x_T,) = normals(*SHAPE)

    def moved(**options):
        """The noise that the first step adds, in units of its standard deviation."""
        torch.manual_seed(5)
        noisy = next(sample_steps("ddim", Wavy(), x_T, None, steps=4, eta=1.0, **options)).x_t
        calm = next(sample_steps("ddim", Wavy(), x_T, None, steps=4, eta=1.0, noise=quiet)).x_t
        return (noisy - calm) / DDIM(None, eta=1.0).std(*plan_of("ddim", Wavy(), 4)[:2])

    plain = moved()
    close(moved(temperature=0.25), 0.25 * plain)
    same = moved(repeat_noise=True)
    close(same[0], same[1])
    assert not torch.allclose(plain[0], plain[1])
    dropped = moved(noise_dropout=0.5)
    gone = dropped.abs() < 1e-9
    assert 0.3 < gone.double().mean() < 0.7
    close(dropped[~gone], 2 * plain[~gone])


# --- keeping part of an image


@pytest.mark.parametrize("name", SAMPLERS)
def test_where_the_mask_is_one_the_image_is_noised_afresh_before_every_step(name):
    model = Wavy()
    x_T, x0 = normals(*SHAPE, count=2)
    mask = torch.zeros(2, 1, 5, 3, dtype=torch.float64)
    mask[:, :, 2:] = 1
    seen, noises, blended = [], [], []

    def noise(like):
        noises.append(normals(*like.shape, seed=len(noises))[0])
        if like is x0:
            blended.append(noises[-1])
        return noises[-1]

    model.apply_model = lambda x, t, c: (seen.append(x), 0.1 * x)[1]
    last(sample_steps(name, model, x_T, None, steps=3, noise=noise, mask=mask, x0=x0))
    plan = plan_of(name, model, 3)[:-1]
    close(seen[0][:, :, :2], SAMPLERS[name].start(x_T, plan[0])[:, :, :2])
    # PLMS calls a second time within its first step, with its own guess and without blending; others in each.
    if name == "dpm_adaptive":  # at levels of its own
        return
    steps_seen = of_each_step(name, seen)
    if name == "dpm_fast":  # of orders 2 and 1
        steps_seen = [seen[0], seen[2]]
    for x, level, drawn in zip(steps_seen, plan, blended, strict=True):
        close(x[:, :, 2:], mix(x0, drawn, level.alpha_bar)[:, :, 2:])


def test_an_empty_mask_changes_nothing():
    x_T, x0 = normals(*SHAPE, count=2)
    options = {"steps": 5, "noise": quiet}
    masked = last(sample_steps("ddim", Wavy(), x_T, None, **options, mask=torch.zeros(1, 1, 5, 3), x0=x0))
    close(masked, last(sample_steps("ddim", Wavy(), x_T, None, **options)), atol=0)


def test_mask_and_image_come_together_and_fit():
    x_T, x0 = normals(*SHAPE, count=2)

    def run(**options):
        return sample_steps("ddim", Wavy(), x_T, None, steps=3, **options)

    with pytest.raises(UsageError, match="x0 was given without mask"):
        run(x0=x0)
    with pytest.raises(UsageError, match="mask was given without x0"):
        run(mask=torch.ones(2, 1, 5, 3))
    for mask, image in [(torch.ones(2, 1, 6, 3), x0), (torch.ones(2, 1, 5, 3), x0[:, :, :, :2])]:
        with pytest.raises(UsageError, match=r"must fit the sample \(2, 4, 5, 3\), got \(2, 1, \d, 3\) and"):
            run(mask=mask, x0=image)


# --- the generator


def test_arguments_are_checked_at_once_and_the_work_is_done_as_steps_are_taken():
    model = Wavy()
    steps = sample_steps("ddim", model, normals(*SHAPE)[0], None, steps=5)
    assert model.asked == []
    assert isinstance(next(steps), Step) and len(model.asked) == 1
    steps.close()
    assert len(model.asked) == 1


def test_no_gradients_inside_and_the_callers_choice_outside():
    class Asks(Wavy):
        def apply_model(self, x, t, cond):
            inside.append(torch.is_grad_enabled())
            return x

    inside = []
    (x_T,) = normals(*SHAPE)
    for step in sample_steps("plms", Asks(), x_T.requires_grad_(), None, steps=2):
        assert torch.is_grad_enabled() and not step.x_t.requires_grad
    assert inside == [False] * 3


def test_the_samples_dtype_is_kept():
    for name, dtype in itertools.product(SAMPLERS, [torch.float16, torch.bfloat16, torch.float32]):
        x_T = normals(*SHAPE, dtype=torch.float32)[0].to(dtype)
        step = next(sample_steps(name, LinearGaussian(), x_T, MEANS, steps=3))
        assert step.x_t.dtype == step.pred_x0.dtype == dtype


def test_the_callers_start_is_left_alone():
    (x_T,) = normals(*SHAPE)
    before = x_T.clone()
    last(sample_steps("plms", Wavy(), x_T, None, steps=4))
    close(x_T, before, atol=0)


# --- options


def test_quantised_samples_pass_through_the_codebook():
    class FirstStage(torch.nn.Module):
        def quantize(self, z):
            return z.round(), None, None

    model = Wavy()
    model.first_stage_model = FirstStage()
    (x_T,) = normals(*SHAPE)
    for name in SAMPLERS:
        plain = next(sample_steps(name, model, x_T, None, steps=4, noise=quiet))
        snapped = next(sample_steps(name, model, x_T, None, steps=4, noise=quiet, quantize_denoised=True))
        close(snapped.pred_x0, snapped.pred_x0.round(), atol=0)
        if name != "plms":  # whose first prediction averages over a guess that was itself quantised
            close(snapped.pred_x0, plain.pred_x0.round(), atol=0)
        assert not torch.equal(snapped.x_t, plain.x_t)


def test_the_score_corrector_sees_the_guided_noise_and_replaces_it():
    class Corrector:
        def modify_score(self, model, e_t, x, t, c, weight):
            seen.append((e_t, t, c))
            return weight * e_t

    seen, model, (x_T,) = [], LinearGaussian(), normals(*SHAPE)
    options = {"score_corrector": Corrector(), "corrector_kwargs": {"weight": 0.0}}
    step = next(sample_steps("ddim", model, x_T, MEANS, steps=2, **options))
    assert seen[0][1].tolist() == [501, 501] and seen[0][2] is MEANS
    close(step.pred_x0, x_T / plan_of("ddim", model, 2)[0].alpha_bar.sqrt())
    with pytest.raises(
        UsageError, match="score_corrector corrects predicted noise, but the model predicts v"
    ):
        sample_steps("ddim", LinearGaussian("v"), x_T, MEANS, steps=2, **options)


def test_clipping_keeps_predicted_pixels_in_range():
    (x_T,) = normals(*SHAPE)

    def run(**options):
        return next(sample_steps("ddpm", Wavy(), 3 * x_T, None, steps=5, **options))

    assert run().pred_x0.abs().max() > 1
    assert run(clip_denoised=True).pred_x0.abs().max() == 1


def test_lower_orders_end_short_runs_only():
    """Below 15 steps the last one is first order (the predicted clean sample's line); from 15 on it is not."""
    model, (x_T,) = LinearGaussian(), normals(*SHAPE)
    for steps, differ in [(14, True), (15, False)]:
        ends = [
            last(sample_steps("dpm_solver", model, x_T, MEANS, steps=steps, lower_order_final=lower))
            for lower in (True, False)
        ]
        assert torch.equal(*ends) != differ


# --- what a caller can get wrong


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9, 2.5])
def test_steps_out_of_range_are_named(name, steps):
    with pytest.raises(UsageError, match=f"^steps must be a whole number from 1 to 1000, got {steps}$"):
        sample_steps(name, Wavy(), normals(*SHAPE)[0], None, steps=steps)


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("ddim", -1.0, "eta of ddim must be from 0 to 1; got -1.0"),
        ("ddim", 1.5, "eta of ddim must be from 0 to 1; got 1.5"),
        ("ddim", math.nan, "eta of ddim must be from 0 to 1; got nan"),
        ("plms", 0.5, "eta of plms must be 0: PLMS adds no noise; got 0.5"),
        ("ddpm", 0.5, "eta of ddpm must be 0 .unset. or 1: DDPM's noise is fixed; got 0.5"),
        ("dpm_solver", 1.0, "eta of dpm_solver must be 0: this sampler adds no noise; got 1.0"),
        ("dpmpp_2m", math.nan, "eta of dpmpp_2m must be 0: this sampler adds no noise; got nan"),
    ],
)
def test_etas_without_meaning_are_refused(name, eta, message):
    with pytest.raises(UsageError, match=message):
        sample_steps(name, Wavy(), normals(*SHAPE)[0], None, steps=3, eta=eta)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ddim",
            {"order": 2},
            "ddim has no option order; it has dynamic_threshold, noise_dropout, quantize_",
        ),
        (
            "dpm_solver",
            {"temperature": 1.0},
            "dpm_solver has no option temperature; it has dynamic_threshold, lower_",
        ),
        ("ddim", {"old_eps": []}, "ddim has no option old_eps"),
        ("ddim", {"run_last": 4}, "run_last must be from 0 to 3, the number of steps; got 4"),
        ("ddim", {"run_last": -1}, "run_last must be from 0 to 3, the number of steps; got -1"),
        ("ddim", {"run_last": 1.5}, "run_last must be from 0 to 3, the number of steps; got 1.5"),
        ("ddim", {"run_last": "1"}, "the number of steps; got '1'"),
        (
            "ddim",
            {"mask_rule": "a111"},
            "mask_rule must be one of compvis, .*; got 'a111'; did you mean 'a1111'",
        ),
        ("ddim", {"mask_rule": None}, "mask_rule must be one of compvis, .*; got None"),
        ("euler", {"first_noise": "sigmas"}, "first_noise must be one of sigma, unit; got 'sigmas'"),
        ("euler", {"final_alpha": 1.0}, "final_alpha must be one of lowest, one; got 1.0"),
        ("ddim", {"spacing": "karas"}, "spacing must be one of uniform, quad, .*; got 'karas'"),
        (
            "dpm_solver",
            {"spacing": "unform"},
            "must be one of uniform, .*; got 'unform' .did you mean uniform",
        ),
        ("dpm_solver", {"order": 4}, "order must be 1, 2 or 3, got 4"),
        ("dpm_solver", {"solver_type": "heun"}, "solver_type must be one of midpoint, taylor; got 'heun'"),
        ("dpmpp_2m", {"predict_x0": False}, "for predict_x0=False take dpm_solver"),
    ],
)
def test_options_that_do_not_fit_are_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        sample_steps(name, Wavy(), normals(*SHAPE)[0], None, steps=3, **options)


def test_a_condition_for_another_batch_is_warned_of_and_used(caplog):
    (x_T,) = normals(*SHAPE)
    last(sample_steps("ddim", LinearGaussian(), x_T, {"c_crossattn": [MEANS[:1]]}, steps=1))
    assert [r.getMessage() for r in caplog.records] == ["got 1 conditionings for a batch of 2"]
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (["ddim", "DDIM", "DDIMScheduler"], "ddim"),
        (["plms", "PLMS", "PNDM", "PNDMScheduler"], "plms"),
        (["ddpm", "DDPM", "DDPMScheduler"], "ddpm"),
        (["dpm_solver", "dpm-solver", "DPMSolver", "DPM solver"], "dpm_solver"),
        (
            ["dpmpp_2m", "DPM++ 2M", "dpm++2m", "dpm++_2m", "DPM-Solver++", "DPMSolverMultistep"]
            + ["DPMSolverMultistepScheduler"],
            "dpmpp_2m",
        ),
    ],
)
def test_samplers_answer_to_every_common_spelling(spellings, name):
    assert {resolve_sampler(spelling) for spelling in spellings} == {name}


@pytest.mark.parametrize("name", ["euler b", "DPM++ 9M SDE Karras", "", "ddimm", None, 3])
def test_unknown_samplers_are_answered_with_the_known_ones(name):
    known = "one of ddim, plms, ddpm, dpm_solver, dpmpp_2m, euler, .*; got"
    with pytest.raises(UsageError, match=known) as caught:
        resolve_sampler(name)
    assert repr(name) in str(caught.value) and caught.value.exit_code == 2
    assert ("did you mean ddim?" in str(caught.value)) == (name == "ddimm")


class Mine(DDIM):
    """A sampler of a caller's own, told from DDIM by its halved answer."""

    name = "mine"

    def move(self, x, eps, pred_x0, here, to):
        return super().move(x, eps / 2, pred_x0, here, to)


@pytest.mark.parametrize("spelling", ["My Own++ 2", "my-own++-2", "MyOwn++2Scheduler", "my_ownpp2"])
def test_a_sampler_of_ones_own_answers_to_its_name(monkeypatch, spelling):
    (x_T,) = normals(*SHAPE)
    run = {"model": Wavy(), "x_T": x_T, "conditioning": None, "steps": 4}
    with pytest.raises(UsageError, match="must be one of"):
        sample_steps(spelling, **run)
    monkeypatch.setitem(SAMPLERS, "My Own++ 2", Mine)
    assert resolve_sampler(spelling) == "My Own++ 2"
    own, ddim = (last(sample_steps(name, **run)) for name in (spelling, "ddim"))
    assert (own - ddim).abs().max() > 0.1
    assert start_level(spelling, Wavy(), 4, 0.5) == start_level("ddim", Wavy(), 4, 0.5)
    assert {name: resolve_sampler(name) for name in ("DDIM", "PNDM")} == {"DDIM": "ddim", "PNDM": "plms"}
    with pytest.raises(UsageError, match=r"one of ddim, .*, My Own\+\+ 2; got 'mine'"):
        resolve_sampler("mine")


def test_a_name_of_ones_own_goes_before_an_alias_and_a_taken_out_one_is_unknown(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "pndm", Mine)
    assert resolve_sampler("PNDM") == "pndm" and resolve_sampler("plms") == "plms"
    monkeypatch.delitem(SAMPLERS, "dpmpp_2m")
    with pytest.raises(UsageError, match="must be one of"):
        resolve_sampler("DPM++ 2M")


@pytest.mark.parametrize("thing", [Mine.step, "ddim", None, int, Mine.plan])
def test_what_is_no_sampler_is_refused_by_name(monkeypatch, thing):
    monkeypatch.setitem(SAMPLERS, "mine", thing)
    with pytest.raises(UsageError, match="SAMPLERS\\['mine'\\] must be a subclass of"):
        resolve_sampler("mine")
    assert resolve_sampler("ddim") == "ddim"


def test_a_sampler_written_for_one_level_is_shown_how_it_is_written_now(monkeypatch):
    class Former(DDIM):
        def step(self, x, level):
            return x, x

    monkeypatch.setitem(SAMPLERS, "former", Former)
    message = r"takes \(x, level\), but a step is now step\(x, here, to\): .* to.alpha_bar"
    with pytest.raises(UsageError, match=message) as caught:
        sample_steps("former", Wavy(), normals(*SHAPE)[0], None, steps=3)
    assert len(str(caught.value)) <= 400


def test_a_model_s_table_turns_sigma_into_a_level_and_back():
    """Whole levels and those between, beyond the ends, and the clean end."""
    model = Wavy()
    table = LevelTable(alpha_bar_table(model))
    for t in (0, 1, 17.25, 500, 999):
        level = table.at_t(t)
        assert level.t == pytest.approx(t, abs=1e-9)
        assert float(table.at_sigma(float(level.sigma)).alpha_bar) == pytest.approx(float(level.alpha_bar))
        assert float(level.log_snr) == pytest.approx(-2 * math.log(level.sigma))
        if isinstance(t, int):
            assert float(level.alpha_bar) == pytest.approx(alpha_bar_table(model)[t], rel=1e-12)
    assert table.at_sigma(40.0).t == 999 and float(table.at_sigma(40.0).sigma) == pytest.approx(40)
    clean = table.at_sigma(0.0)
    assert clean.t == 0 and clean.alpha_bar == 1 and clean.sigma == 0 and clean.log_snr == math.inf
    empty = Level(999, torch.tensor(0.0, dtype=torch.float64))
    assert empty.sigma == math.inf and empty.log_snr == -math.inf


def test_an_image_is_noised_to_the_level_where_its_steps_start():
    """`start_from` with unit noise is what a caller noises by hand to `start_level`."""
    model, (z, noise) = Wavy(), normals(*SHAPE, count=2)
    for name in ("ddim", "euler", "dpmpp_2m"):
        count, alpha_bar = start_level(name, model, 10, 0.4)
        options = {"steps": 10, "run_last": count, "noise": quiet}
        by_hand = sample_steps(name, model, mix(z, noise, alpha_bar), None, **options)
        close(last(sample_steps(name, model, noise, None, start_from=z, **options)), last(by_hand))
    assert list(sample_steps("ddim", model, noise, None, start_from=z, steps=10, run_last=0)) == []
