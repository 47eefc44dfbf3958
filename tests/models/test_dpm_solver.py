"""NoiseScheduleVP, model_wrapper and DPM_Solver: laws on models whose right answers are known, and our own sampler."""

import itertools

import pytest
import torch
from linear_gaussian import Wavy, normals

from ldm.errors import NumericError, UsageError
from ldm.models.diffusion.dpm_solver.dpm_solver import (
    DPM_Solver,
    NoiseScheduleVP,
    expand_dims,
    interpolate_fn,
    model_wrapper,
)
from ldm.models.diffusion.samplers import sample_steps
from ldm.process.schedule import NoiseSchedule

SHAPE = (2, 4, 5, 3)
ALPHA_BAR = torch.from_numpy(
    NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012).alpha_bar
)
SCHEDULES = {
    "discrete": NoiseScheduleVP("discrete", alphas_cumprod=ALPHA_BAR),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
}
MEAN, SPREAD = 0.8, 0.5


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def at(ns, t, dims=4):
    """alpha and sigma at times (b,), shaped to multiply samples."""
    t = t.double()
    return expand_dims(ns.marginal_alpha(t), dims), expand_dims(ns.marginal_std(t), dims)


def best(ns):
    """The best possible noise prediction for data ~ N(MEAN, SPREAD^2), as a function of x and t."""

    def noise(x, t):
        alpha, sigma = at(ns, t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)

    return noise


def flow(ns, x, start, end):
    """Carry x along its exact probability flow: (x - alpha mean) / sqrt(alpha^2 spread^2 + sigma^2) never changes."""
    (a, s), (b, r) = (at(ns, torch.tensor([t])) for t in (start, end))
    z = (x - a * MEAN) / (a**2 * SPREAD**2 + s**2).sqrt()
    return b * MEAN + (b**2 * SPREAD**2 + r**2).sqrt() * z


# --- the schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_the_variance_and_its_clock_can_be_turned_back(name):
    ns = SCHEDULES[name]
    t = torch.linspace(1 / ns.total_N, ns.T, 37, dtype=torch.float64)
    close(ns.marginal_alpha(t) ** 2 + ns.marginal_std(t) ** 2, torch.ones_like(t))
    close(ns.marginal_lambda(t), (ns.marginal_alpha(t) / ns.marginal_std(t)).log(), atol=1e-9)
    assert (ns.marginal_lambda(t).diff() < 0).all()
    close(ns.inverse_lambda(ns.marginal_lambda(t)), t, atol=1e-9)
    assert ns.marginal_lambda(t.float()).dtype == torch.float32


def test_the_schedules_are_those_of_their_names():
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(SCHEDULES["linear"].marginal_log_mean_coeff(t).sum(), t)
    close(slope, (-0.5 * (0.1 + 19.9 * t)).detach())  # d log alpha = -1/2 beta dt
    share = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) / torch.cos(
        torch.tensor(0.008 / 1.008 * torch.pi / 2)
    )
    close(SCHEDULES["cosine"].marginal_alpha(t), share, atol=1e-7)
    levels = torch.tensor([0, 1, 499, 999])
    close(SCHEDULES["discrete"].marginal_alpha((levels + 1.0) / 1000).double() ** 2, ALPHA_BAR[levels], 1e-6)
    between = SCHEDULES["discrete"].marginal_log_mean_coeff(torch.tensor(0.5005, dtype=torch.float64))
    close(between, 0.25 * (ALPHA_BAR[499].log() + ALPHA_BAR[500].log()))
    by_betas = NoiseScheduleVP(betas=1 - ALPHA_BAR / torch.cat([ALPHA_BAR.new_ones(1), ALPHA_BAR[:-1]]))
    close(by_betas.log_alpha_array, SCHEDULES["discrete"].log_alpha_array, atol=1e-9)


def test_a_last_level_without_signal_counts_as_one_with_a_little():
    ns = NoiseScheduleVP(alphas_cumprod=torch.tensor([0.9, 0.4, 0.0]))
    assert ns.marginal_lambda(torch.tensor([1.0])).isfinite().all()
    close(ns.marginal_alpha(torch.tensor([1.0], dtype=torch.float64)) ** 2, torch.tensor([2.0**-24]).double())


def test_lines_go_through_their_points_and_on():
    xp, yp = (
        torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 4.0]]),
        torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 8.0]]),
    )
    x = torch.tensor([[-1.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    close(interpolate_fn(x, xp, yp), torch.tensor([[0.0, 1.0], [1.0, 5.0], [-1.0, 11.0]]))


# --- the network


@pytest.mark.parametrize("kind", ["noise", "x_start", "v", "score"])
def test_whatever_the_network_predicts_becomes_noise(kind):
    ns, (x, eps) = SCHEDULES["linear"], normals(*SHAPE, count=2)
    t = torch.tensor([0.3, 0.8])
    alpha, sigma = at(ns, t)
    x0 = (x - sigma * eps) / alpha
    said = {"noise": eps, "x_start": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}[kind]
    close(model_wrapper(lambda x, t: said, ns, model_type=kind)(x, t), eps, atol=1e-5)
    half = model_wrapper(lambda x, t: said.half(), ns, model_type=kind)(x.half(), t)
    assert half.dtype == torch.float16


@pytest.mark.parametrize(("name", "want"), [("discrete", [249.0, 249.0]), ("linear", [0.25, 0.25])])
def test_a_chain_is_told_levels_and_other_networks_times(name, want):
    told = []
    model = model_wrapper(
        lambda x, t, extra: told.append((t, extra)) or x, SCHEDULES[name], model_kwargs={"extra": 5}
    )
    model(torch.zeros(SHAPE), torch.tensor(0.25))
    close(told[0][0], torch.tensor(want), atol=1e-4)
    assert told[0][1] == 5


def test_a_classifier_pushes_along_its_gradient():
    ns, (x,) = SCHEDULES["linear"], normals(*SHAPE)
    t = torch.tensor([0.4])

    def log_p(x, t, wanted, sharpness):
        return -0.5 * sharpness * ((x - wanted) ** 2).flatten(1).sum(1)

    model = model_wrapper(
        lambda x, t: 0.5 * x,
        ns,
        guidance_type="classifier",
        condition=2.0,
        guidance_scale=3.0,
        classifier_fn=log_p,
        classifier_kwargs={"sharpness": 0.7},
    )
    with torch.no_grad():
        got = model(x, t)
    close(got, 0.5 * x - 3.0 * at(ns, t)[1] * 0.7 * (2.0 - x), atol=1e-6)


def test_guidance_asks_for_both_answers_in_one_batch():
    (x,) = normals(*SHAPE)
    asked = []

    def network(x, t, c):
        asked.append((len(x), c["c"][0][:, 0].tolist()))
        return x * c["c"][0].reshape(-1, 1, 1, 1)

    c, uc = ({"c": [torch.full((2, 1), v).double()]} for v in (5.0, 3.0))
    options = {"guidance_type": "classifier-free", "condition": c}
    ns = SCHEDULES["discrete"]
    guided = model_wrapper(network, ns, **options, unconditional_condition=uc, guidance_scale=2.0)
    close(guided(x, torch.tensor([0.5])), (3 + 2 * (5 - 3)) * x)
    for plain in ({"guidance_scale": 2.0}, {"unconditional_condition": uc}):  # nothing to be guided by
        close(model_wrapper(network, ns, **options, **plain)(x, torch.tensor([0.5])), 5 * x)
    assert asked == [(4, [3, 3, 5, 5]), (2, [5, 5]), (2, [5, 5])]


# --- the solver


@pytest.mark.parametrize(("order", "predict_x0"), itertools.product([1, 2, 3], [True, False]))
@pytest.mark.parametrize(("kind", "skip"), [("dpm_solver", "time_uniform"), ("taylor", "time_quadratic")])
@pytest.mark.parametrize("steps", [2, 16])
def test_multistep_is_our_own_sampler(order, predict_x0, kind, skip, steps):
    network, (x_T,) = Wavy(), normals(*SHAPE)
    ns = NoiseScheduleVP(alphas_cumprod=network.alphas_cumprod)
    solver = DPM_Solver(model_wrapper(network.raw, ns), ns, predict_x0=predict_x0)
    got = solver.sample(x_T, steps, order=order, skip_type=skip, method="multistep", solver_type=kind)
    options = {"order": order, "predict_x0": predict_x0, "spacing": skip}
    options["solver_type"] = {"dpm_solver": "midpoint"}.get(kind, kind)
    *_, ours = sample_steps("dpm_solver", network, x_T, None, steps=steps, **options)
    close(got, ours.x_t, atol=1e-5 * (1 + got.abs().max().item()))


@pytest.mark.parametrize(
    ("schedule", "method", "order", "predict_x0", "kind"),
    [
        ("discrete", "singlestep_fixed", 1, False, "dpm_solver"),
        ("discrete", "singlestep_fixed", 2, False, "dpm_solver"),
        ("discrete", "singlestep_fixed", 2, True, "taylor"),
        ("linear", "singlestep_fixed", 2, True, "dpm_solver"),
        ("linear", "singlestep_fixed", 3, False, "dpm_solver"),
        ("discrete", "singlestep_fixed", 3, True, "dpm_solver"),
        ("cosine", "singlestep_fixed", 3, False, "taylor"),
        ("cosine", "singlestep_fixed", 3, True, "taylor"),
        ("cosine", "multistep", 1, True, "dpm_solver"),
        ("cosine", "multistep", 2, False, "taylor"),
        ("linear", "multistep", 3, True, "taylor"),
        ("linear", "multistep", 3, False, "dpm_solver"),
    ],
)
def test_solvers_converge_to_the_exact_flow_at_their_order(schedule, method, order, predict_x0, kind):
    """Twice the steps leave 1 / 2^order of the error; between levels of a chain the noise itself has corners."""
    ns, (x,) = SCHEDULES[schedule], normals(*SHAPE)
    solver = DPM_Solver(best(ns), ns, predict_x0=predict_x0)
    start, end = 0.9, 0.05
    want = flow(ns, x, start, end)

    def error(steps):
        options = {"order": order, "method": method, "skip_type": "logSNR", "solver_type": kind}
        return (solver.sample(x, steps, start, end, **options) - want).abs().max().item()

    coarse = 48 if (order, predict_x0, kind) == (3, True, "dpm_solver") else 24
    assert error(2 * coarse) < 1.2 / 2**order * error(coarse)


@pytest.mark.parametrize("method", ["singlestep", "multistep", "singlestep_fixed"])
@pytest.mark.parametrize(
    ("skip", "order"), [("time_uniform", 1), ("time_quadratic", 2), ("logSNR", 3), ("logSNR", 1)]
)
def test_every_way_of_a_method_uses_its_evaluations_and_arrives(method, skip, order):
    ns, (x,) = SCHEDULES["discrete"], normals(*SHAPE)
    noise, asked = best(ns), []

    def model(x, t):
        asked.append(t[0].item())
        return noise(x, t)

    x_0 = DPM_Solver(model, ns, predict_x0=True).sample(x, 24, order=order, skip_type=skip, method=method)
    assert len(asked) == 24
    assert asked[0] == pytest.approx(1.0) and asked == sorted(asked, reverse=True) and asked[-1] > 1e-3
    assert (x_0 - flow(ns, x, 1.0, 1e-3)).abs().max() < (0.2 if order == 1 else 0.03)


@pytest.mark.parametrize(
    ("steps", "order", "orders"),
    [
        (1, 3, [1]),
        (2, 3, [2]),
        (3, 3, [2, 1]),
        (4, 3, [3, 1]),
        (5, 3, [3, 2]),
        (6, 3, [3, 2, 1]),
        (20, 3, [3, 3, 3, 3, 3, 3, 2]),
        (4, 2, [2, 2]),
        (5, 2, [2, 2, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("skip", ["logSNR", "time_uniform"])
def test_orders_of_the_singlestep_solver_use_up_all_evaluations(steps, order, orders, skip):
    """The table of DPM-Solver's appendix D.3."""
    solver = DPM_Solver(None, SCHEDULES["linear"])
    times, got = solver.get_orders_and_timesteps_for_singlestep_solver(steps, order, skip, 1.0, 0.1, "cpu")
    assert got == orders and len(times) == len(orders) + 1
    close(times[[0, -1]], torch.tensor([1.0, 0.1]), atol=1e-5)
    if skip == "time_uniform":  # in proportion to the evaluations
        close(times.diff(), torch.tensor(orders) * (-0.9 / steps), atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_the_adaptive_solver_keeps_to_its_tolerance(order, predict_x0):
    ns, (x,) = SCHEDULES["linear"], normals(*SHAPE)
    noise, asked = best(ns), []

    def model(x, t):
        asked.append(t)
        return noise(x, t)

    solver, want, done = DPM_Solver(model, ns, predict_x0=predict_x0), flow(ns, x, 1.0, 1e-3), []
    for scale in (1, 1 / 64):
        asked.clear()
        options = {"method": "adaptive", "order": order, "atol": 0.0078 * scale, "rtol": 0.05 * scale}
        error = (solver.sample(x, **options) - want).abs().max().item()
        done.append((error, len(asked)))
    (loose, few), (tight, many) = done
    assert loose < 0.2 and tight < loose / 4 and few < many < 400


def test_the_adaptive_solver_gives_up_on_what_is_not_finite():
    ns, (x,) = SCHEDULES["linear"], normals(*SHAPE)
    with pytest.raises(NumericError, match="at time 1 orders 1 and 2 differ by more than"):
        DPM_Solver(lambda x, t: x * torch.nan, ns).sample(x, method="adaptive", order=2)


def test_from_sample_to_noise_and_back():
    ns, (x,) = SCHEDULES["discrete"], normals(*SHAPE)
    solver = DPM_Solver(best(ns), ns)
    options = {"order": 2, "method": "multistep", "skip_type": "logSNR"}
    there = solver.sample(x, 60, t_start=1e-3, t_end=1.0, **options)
    close(there, flow(ns, x, 1e-3, 1.0), atol=0.01)
    close(solver.sample(there, 60, t_start=1.0, t_end=1e-3, **options), x, atol=0.02)


def test_images_at_times_of_their_own_step_as_they_do_alone():
    ns, (x,) = SCHEDULES["cosine"], normals(*SHAPE)
    s, t = torch.tensor([0.9, 0.7]), torch.tensor([0.6, 0.65])
    for predict_x0, order in itertools.product([True, False], [1, 2, 3]):
        solver = DPM_Solver(best(ns), ns, predict_x0=predict_x0)
        both = solver.singlestep_dpm_solver_update(x, s, t, order, solver_type="taylor")
        alone = [
            solver.singlestep_dpm_solver_update(
                x[i : i + 1], s[i : i + 1], t[i : i + 1], order, solver_type="taylor"
            )
            for i in (0, 1)
        ]
        close(both, torch.cat(alone), atol=1e-6)
        plain = DPM_Solver(lambda x, t: x / 2, ns, predict_x0=predict_x0)
        half = plain.singlestep_dpm_solver_update(x.half(), s, t, order)
        assert half.dtype == torch.float16
        close(half.double(), plain.singlestep_dpm_solver_update(x, s, t, order), atol=0.01)


def test_a_step_says_what_it_used_and_takes_what_is_known():
    ns, (x,) = SCHEDULES["linear"], normals(*SHAPE)
    s, t = torch.tensor([0.9, 0.9]), torch.tensor([0.6, 0.6])
    asked = []

    def model(x, t):
        asked.append(t[0].item())
        return best(ns)(x, t)

    solver = DPM_Solver(model, ns)
    for order in (1, 2, 3):
        x_t, used = solver.singlestep_dpm_solver_update(x, s, t, order, return_intermediate=True)
        assert list(used) == ["model_s", "model_s1", "model_s2"][:order]
        asked.clear()
        known = {name: used[name] for name in ("model_s", "model_s1")[: max(1, order - 1)]}
        update = [
            solver.dpm_solver_first_update,
            solver.singlestep_dpm_solver_second_update,
            solver.singlestep_dpm_solver_third_update,
        ][order - 1]
        close(update(x, s, t, **known), x_t)
        assert len(asked) == order - len(known)


def test_thresholding_bounds_each_clean_sample_by_its_own_percentile(caplog):
    ns = SCHEDULES["linear"]
    t = torch.tensor([0.4, 0.4])
    alpha, sigma = at(ns, t)
    x0 = torch.stack([torch.linspace(-0.5, 0.5, 201), torch.linspace(-4, 4, 201)]).double()[:, None, :, None]
    eps = torch.ones_like(x0)
    solver = DPM_Solver(lambda x, t: eps, ns, predict_x0=True, thresholding=True)
    got = solver.denoise_to_zero_fn(alpha * x0 + sigma * eps, t)
    close(got[0], x0[0], atol=1e-6)
    bound = x0[1].abs().quantile(0.995)
    close(got[1], x0[1].clamp(-bound, bound) / bound, atol=1e-6)
    assert not caplog.records
    DPM_Solver(solver.model, ns, thresholding=True)
    assert "without predict_x0=True" in caplog.text


def test_one_more_evaluation_goes_to_the_clean_end():
    ns, (x,) = SCHEDULES["discrete"], normals(*SHAPE)
    solver = DPM_Solver(best(ns), ns)
    x_0 = solver.sample(x, 9)
    close(solver.sample(x, 9, denoise_to_zero=True), solver.data_prediction_fn(x_0, torch.tensor([1e-3])))


SOLVER = DPM_Solver(best(SCHEDULES["discrete"]), SCHEDULES["discrete"])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda x: NoiseScheduleVP("quadratic"),
            "schedule must be one of discrete, linear, cosine; got 'quad",
        ),
        (lambda x: NoiseScheduleVP(), "needs either betas or alphas_cumprod"),
        (lambda x: NoiseScheduleVP(betas=ALPHA_BAR, alphas_cumprod=ALPHA_BAR), "one of the two"),
        (
            lambda x: NoiseScheduleVP(alphas_cumprod=ALPHA_BAR[None]),
            r"a row of at least 2, got shape \(1, 1000\)",
        ),
        (lambda x: NoiseScheduleVP(alphas_cumprod=ALPHA_BAR.flip(0)), "should fall from level to level"),
        (lambda x: NoiseScheduleVP(betas=torch.zeros(5)), "should fall from level to level"),
        (lambda x: NoiseScheduleVP("linear", continuous_beta_0=3, continuous_beta_1=2), "got 3 and 2"),
        (lambda x: model_wrapper(None, None, model_type="eps"), "noise, x_start, v, score; got 'eps'"),
        (lambda x: model_wrapper(None, None, guidance_type="cfg"), "classifier-free; got 'cfg'"),
        (lambda x: model_wrapper(None, None, guidance_type="classifier"), "needs a classifier_fn"),
        (
            lambda x: model_wrapper(None, None, guidance_scale=float("nan")),
            "guidance_scale should be a number",
        ),
        (
            lambda x: model_wrapper(lambda x, t: x.repeat(1, 2, 1, 1), SCHEDULES["linear"])(
                x, torch.tensor([0.5])
            ),
            r"x's shape \(2, 4, 5, 3\), got \(2, 8, 5, 3\); where it also predicts a variance",
        ),
        (lambda x: DPM_Solver(None, None, max_val=0), "max_val should be a number above 0"),
        (lambda x: SOLVER.sample(x, 0), "steps should be a whole number from 1"),
        (lambda x: SOLVER.sample(x, order=4), "order should be a whole number from 1 to 3, got 4"),
        (lambda x: SOLVER.sample(x, order=True), "order should be a whole number from 1 to 3, got True"),
        (lambda x: SOLVER.sample(x, method="fast"), "singlestep_fixed, adaptive; got 'fast'"),
        (lambda x: SOLVER.sample(x, skip_type="karras"), "skip_type must be one of time_uniform, .*'karras'"),
        (lambda x: SOLVER.sample(x, solver_type="heun"), "dpm_solver, taylor; got 'heun'"),
        (lambda x: SOLVER.sample(x, t_end=0.0), "t_end should be a number from 0.001 to 1, got 0"),
        (lambda x: SOLVER.sample(x, t_start=1000), "t_start should be a number from 0.001 to 1, got 1000"),
        (lambda x: SOLVER.sample(x, t_start=0.5, t_end=0.5), "should differ, got 0.5 for both"),
        (
            lambda x: SOLVER.sample(x, 2, method="singlestep_fixed"),
            "of order 3 needs at least 3 steps, got 2",
        ),
        (lambda x: SOLVER.sample(x, method="adaptive", order=1), "order must be 2 or 3, got 1"),
        (lambda x: SOLVER.sample(x, method="adaptive", atol=0), "atol should be a number above 0"),
        (lambda x: SOLVER.sample(x, t_start=0.1, t_end=1.0, method="adaptive"), "goes down"),
        (
            lambda x: SOLVER.multistep_dpm_solver_update(x, [x], [torch.ones(2)], torch.ones(2) / 2, 2),
            "order 2 needs its last 2 answers and their times, got 1 and 1",
        ),
    ],
)
def test_mistakes_are_said(call, match):
    with pytest.raises(UsageError, match=match) as told:
        call(torch.zeros(SHAPE))
    assert len(str(told.value)) <= 400
