"""Side by side with diffusers' schedulers, on one network: whole chains, step by step."""

import itertools

import pytest
import torch
from linear_gaussian import Wavy, normals

from ldm.models.diffusion.samplers import sample_steps

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
SHAPE = (2, 4, 5, 3)
KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def theirs(scheduler, model, x, steps, noise=None):
    """Every sample of diffusers' own loop, and the level of each step."""
    scheduler.set_timesteps(steps)
    samples = []
    for t in scheduler.timesteps:
        output = model.raw(x, t.expand(len(x)))
        if noise is None:
            x = scheduler.step(output, t, x).prev_sample
        else:
            x = scheduler.step(output, t, x, eta=1.0, variance_noise=next(noise)).prev_sample
        samples.append(x)
    return samples, scheduler.timesteps.tolist()


def ours(name, model, x, steps, **options):
    done = list(sample_steps(name, model, x, None, steps=steps, **options))
    return [step.x_t for step in done], [step.t for step in done]


def agree(got, want, atol):
    """Chains agree at every step, to atol of their own size."""
    (samples, times), (their_samples, their_times) = got, want
    assert times == their_times
    for a, b in zip(samples, their_samples, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol * (1 + b.abs().max().item()))


@pytest.fixture
def x_T():
    return normals(*SHAPE, dtype=torch.float32)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim(x_T, kind, steps):
    model = Wavy(kind)
    scheduler = diffusers.DDIMScheduler(**BETAS, **LEADING, clip_sample=False, prediction_type=KINDS[kind])
    agree(ours("ddim", model, x_T, steps), theirs(scheduler, model, x_T, steps), atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_over_other_spacings(x_T, spacing):
    """Where the count does not divide 1000, diffusers steps to t - 1000 // S; ours, to the next level visited."""
    model = Wavy()
    options = {**LEADING, "timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    scheduler = diffusers.DDIMScheduler(**BETAS, **options, clip_sample=False)
    ours_ = ours("ddim", model, x_T, 20, spacing=spacing)
    assert ours_[1] == theirs(scheduler, model, x_T, 20)[1]
    if spacing == "leading":
        agree(ours_, theirs(scheduler, model, x_T, 20), atol=2e-5)


def test_ddim_at_eta_one(x_T):
    model, noises = Wavy(), normals(*SHAPE, count=20, seed=1, dtype=torch.float32)
    scheduler = diffusers.DDIMScheduler(**BETAS, **LEADING, clip_sample=False)
    coming = iter(noises)
    got = ours("ddim", model, x_T, 20, eta=1.0, noise=lambda _: next(coming))
    agree(got, theirs(scheduler, model, x_T, 20, noise=iter(noises)), atol=2e-5)


@pytest.mark.parametrize("steps", [10, 50])
def test_plms(x_T, steps):
    """Theirs visits the second level twice, where ours looks ahead within its first step."""
    model = Wavy()
    scheduler = diffusers.PNDMScheduler(**BETAS, **LEADING, skip_prk_steps=True)
    samples, times = theirs(scheduler, model, x_T, steps)
    assert len(times) == steps + 1 and times[1] == times[2]
    agree(ours("plms", model, x_T, steps), (samples[1:], [times[0], *times[2:]]), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, 14, 15, 30])
def test_dpm_solver_pp(x_T, kind, steps):
    model = Wavy(kind)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, prediction_type=KINDS[kind]
    )
    agree(ours("dpmpp_2m", model, x_T, steps), theirs(scheduler, model, x_T, steps), atol=2e-5)


def test_dpm_solver_pp_over_trailing_levels(x_T):
    model = Wavy()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )
    got = ours("dpmpp_2m", model, x_T, 30, spacing="trailing")
    agree(got, theirs(scheduler, model, x_T, 30), atol=2e-5)


@pytest.mark.parametrize(("ours_", "theirs_"), [("midpoint", "midpoint"), ("taylor", "heun")])
def test_dpm_solver_that_predicts_noise(x_T, ours_, theirs_):
    """Their levels are whole and ours lie between, so the solver's arithmetic is compared on one step's history."""
    from ldm.models.diffusion.samplers import Denoiser, DPMSolver, DPMSolverPP2M, alpha_bar_table

    model = Wavy()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver",
        solver_order=2,
        solver_type=theirs_,
        final_sigmas_type="sigma_min",
    )
    plan = DPMSolverPP2M.plan(alpha_bar_table(model), 20)
    solver = DPMSolver(Denoiser(model, None), predict_x0=False, solver_type=ours_)
    x, samples = x_T, []
    for here, to in itertools.pairwise(plan[:-1]):  # all but the last step, which goes to another end
        x, _ = solver.step(x, here, to)
        samples.append(x)
    want, _ = theirs(scheduler, model, x_T, 20)
    agree((samples, []), (want[:-1], []), atol=5e-5)


def test_ancestral_sampling_over_all_levels(x_T):
    model = Wavy(num_timesteps=40)
    scheduler = diffusers.DDPMScheduler(**BETAS, num_train_timesteps=40, clip_sample=False)
    torch.manual_seed(2)
    want = theirs(scheduler, model, x_T, 40)
    torch.manual_seed(2)
    got = ours("ddpm", model, x_T, 40)
    agree(got, want, atol=2e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_singlestep_dpm_solver(x_T, order, predict_x0):
    """Their looks within a step are steps of their own, over whole levels; the last step goes elsewhere."""
    from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper

    model = Wavy()
    ns = NoiseScheduleVP(alphas_cumprod=model.alphas_cumprod)
    solver = DPM_Solver(model_wrapper(model.raw, ns), ns, predict_x0=predict_x0)
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++" if predict_x0 else "dpmsolver",
        solver_order=order,
        solver_type="heun",
        lower_order_final=False,
        final_sigmas_type="zero" if predict_x0 else "sigma_min",
    )
    samples, levels = theirs(scheduler, model, x_T, 4 * order)
    times = (torch.tensor(levels, dtype=torch.float64) + 1) / 1000
    x = x_T
    for i in range(0, 3 * order, order):
        clock = ns.marginal_lambda(times[i : i + order + 1])
        shares = ((clock[1:-1] - clock[0]) / (clock[-1] - clock[0])).tolist()
        r1, r2 = [*shares, None, None][:2]
        s, t = times[i].expand(2), times[i + order].expand(2)
        x = solver.singlestep_dpm_solver_update(x, s, t, order, solver_type="taylor", r1=r1, r2=r2)
        want = samples[i + order - 1]
        torch.testing.assert_close(x, want, rtol=0, atol=2e-5 * (1 + want.abs().max().item()))
