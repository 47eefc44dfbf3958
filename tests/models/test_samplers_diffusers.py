"""Side by side with diffusers' schedulers, on one network: whole chains, step by step."""

import itertools
import math

import pytest
import torch
from linear_gaussian import Wavy, normals

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import Level, alpha_bar_table, run_levels
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps
from ldm.noise import ImageNoise

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


# --- multistep, stochastic and distilled --------------------------------------------------------------------------

SCHEDULERS = [  # (scheduler, its options, sampler, options)
    *(
        (
            "UniPCMultistep",
            {"solver_order": order, "solver_type": kind, "predict_x0": x0},
            "unipc",
            {"order": order, "solver_type": kind, "predict_x0": x0},
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        for x0 in (True, False)
    ),
    # Karras' sigmas have their levels rounded there.
    ("UniPCMultistep", {"use_karras_sigmas": True}, "unipc", {"spacing": "karras"}),
    *(("DEISMultistep", {"solver_order": order}, "deis", {"order": order}) for order in (1, 2, 3)),
    *(
        (
            "SASolver",
            {"predictor_order": order, "corrector_order": corrector},
            "sa_solver",
            {"order": order, "corrector_order": corrector},
        )
        for order, corrector in ((1, 1), (2, 1), (2, 2), (3, 3), (3, 4))
    ),
    *(
        (
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "solver_type": kind},
            "dpmpp_2m_sde",
            {"solver_type": kind, "brownian": False},
        )
        for kind in ("midpoint", "heun")
    ),
    *(
        ("DPMSolverMultistep", {f"use_{table}_sigmas": True}, "dpmpp_2m", {"spacing": ours_})
        for table, ours_ in (("karras", "karras"), ("exponential", "exponential"), ("beta", "beta_sigma"))
    ),
    ("LCM", {"clip_sample": False}, "lcm", {}),
    *(("TCD", {"clip_sample": False, "eta": gamma}, "tcd", {"gamma": gamma}) for gamma in (0.0, 0.3, 1.0)),
    *(
        (
            "DPMSolverSinglestep",
            {
                "solver_order": order,
                "solver_type": kind,
                "algorithm_type": "dpmsolver++" if x0 else "dpmsolver",
                "lower_order_final": x0,
                "final_sigmas_type": "zero" if x0 else "sigma_min",
            },
            "dpm_solver_singlestep",
            {
                "order": order,
                "solver_type": {"heun": "taylor"}.get(kind, kind),
                "predict_x0": x0,
                "lower_order_final": x0,
            },
        )
        for order in (1, 2, 3)
        for kind in ("midpoint", "heun")
        for x0 in (True, False)
    ),
]
# Theirs end at the level 0, and ours of these names at the clean end.
LOW = ("DEISMultistep", "SASolver", "TCD")


def theirs_in_double(scheduler, model, x, steps, noises, monkeypatch, options):
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    coming = iter(noises)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(coming))
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    samples = []
    for t in scheduler.timesteps:
        x = scheduler.step(model.raw(x, t.expand(len(x))), t, x, return_dict=False, **options)[0]
        samples.append(x)
    return samples


@pytest.mark.parametrize(("theirs_", "settings", "name", "options"), SCHEDULERS)
@pytest.mark.thinned(6)
def test_every_step_is_diffusers(monkeypatch, theirs_, settings, name, options):
    model = Wavy()
    (x_T, *noises), table = normals(2, 2, 3, 1, count=40), alpha_bar_table(model)
    steps = 21 if settings.get("solver_order") == 3 else 20  # whole groups of the single-step solver
    settings, options = dict(settings), dict(options)
    eta = {"eta": settings.pop("eta")} if "eta" in settings else {}
    scheduler = getattr(diffusers, f"{theirs_}Scheduler")(**BETAS, **settings)
    want = theirs_in_double(scheduler, model, x_T, steps, noises, monkeypatch, eta)
    planned = SAMPLERS[
        "dpmpp_2m" if name == "dpmpp_2m_sde" else name
    ]  # of the SDE, ours has other levels by itself
    plan = planned.plan(table, steps, spacing=options.pop("spacing", None))
    if theirs_ in LOW or settings.get("final_sigmas_type") == "sigma_min":
        plan = [*plan[:-1], Level(0.0, torch.tensor(table[0]), 0, steps)]
    if theirs_ == "DPMSolverMultistep":  # theirs calls the network with whole levels where sigmas lie between
        whole = round if "use_karras_sigmas" in settings else int
        plan = [Level(float(whole(one.t)), one.alpha_bar, one.left, one.total) for one in plan]
    # SASolver draws at every step there, and here where its noise counts.
    coming = iter(
        [n for n, at in zip(noises, plan, strict=False) if theirs_ != "SASolver" or 200 <= at.t <= 800]
    )
    sampler = SAMPLERS[name](Denoiser(model, None), lambda like: next(coming), **options)
    sampler.levels = plan
    got = [step.x_t for step in run_levels(plan, x_T, sampler.step)]
    assert len(got) == len(want) == steps
    # Two of theirs are not a number where they go to the clean end, order 1 with an infinite B(h).
    if "bh1" in settings.values() or (name == "unipc" and not settings.get("predict_x0", True)):
        assert want.pop().isnan().all() and got.pop().isfinite().all()
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        error = float((a - b).abs().max() / (1 + b.abs().max()))
        assert error < 1e-4, f"{theirs_} {settings}, step {step}: {error}"


KARRAS = {"use_karras_sigmas": True}
SIGMA_SCHEDULERS = [  # (scheduler, its options, sampler, options): they step in sigma's units; the table of sigmas
    ("EulerDiscrete", KARRAS, "euler", {}, "karras"),
    ("EulerDiscrete", {"use_exponential_sigmas": True}, "euler", {}, "exponential"),
    ("EulerDiscrete", {"use_beta_sigmas": True}, "euler", {}, "beta_sigma"),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}, "euler_a", {}, "trailing"),
    ("HeunDiscrete", KARRAS, "heun", {}, "karras"),
    ("LMSDiscrete", KARRAS, "lms", {}, "karras"),
    ("KDPM2Discrete", KARRAS, "dpm2", {}, "karras"),
    ("KDPM2AncestralDiscrete", KARRAS, "dpm2_a", {}, "karras"),
]


@pytest.mark.parametrize(("theirs_", "settings", "name", "options", "table"), SIGMA_SCHEDULERS)
@pytest.mark.thinned(4)
def test_runs_in_units_of_sigma_end_as_diffusers(monkeypatch, theirs_, settings, name, options, table):
    model, steps = Wavy(), 20
    x_T, *noises = normals(2, 2, 3, 1, count=40)
    scheduler = getattr(diffusers, f"{theirs_}Scheduler")(**BETAS, **settings)
    coming = iter(noises)
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(coming), raising=False)
    scheduler.set_timesteps(steps)
    sigmas = [float(s) for s in dict.fromkeys(scheduler.sigmas.double().tolist())]
    x = x_T * sigmas[0]
    for t in scheduler.timesteps:
        x = scheduler.step(model.raw(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
    plan = SAMPLERS[name].plan(alpha_bar_table(model), steps, spacing=table)
    if name.startswith("dpm2"):  # ours leaves the last sigma of a table out, as A1111 and ComfyUI do
        plan = SAMPLERS["euler"].plan(alpha_bar_table(model), steps, spacing=table)
    coming = iter(noises)
    sampler = SAMPLERS[name](Denoiser(model, None), lambda like: next(coming), **options)
    sampler.levels = plan
    *_, last = run_levels(plan, sampler.start(x_T, plan[0]), sampler.step)
    assert float((last.x_t - x).abs().max() / (1 + x.abs().max())) < 1e-4


def test_parallel_schedulers_are_the_others(x_T):
    model = Wavy()
    scheduler = diffusers.DDIMParallelScheduler(**BETAS, **LEADING, clip_sample=False)
    agree(ours("ddim", model, x_T, 20), theirs(scheduler, model, x_T, 20), atol=2e-5)
    scheduler = diffusers.DDPMParallelScheduler(**BETAS, num_train_timesteps=20, clip_sample=False)
    model = Wavy(num_timesteps=20)
    chains = []
    for chain in (theirs, lambda _, *run: ours("ddpm", *run)):
        torch.manual_seed(2)
        chains.append(chain(scheduler, model, x_T, 20))
    agree(chains[1], chains[0], atol=2e-5)


def test_inverse_schedulers_go_up_as_ours(x_T):
    """DDIM's asks the network at the level that a step goes to, DPM-Solver's at the one that it comes from."""
    model = Wavy()
    scheduler = diffusers.DDIMInverseScheduler(**BETAS, **LEADING, clip_sample=False)
    up = list(sample_steps("ddim", model, x_T, None, steps=20, spacing="uniform", invert=True))
    agree(([step.x_t for step in up], []), (theirs(scheduler, model, x_T, 20)[0], []), atol=2e-5)

    scheduler = diffusers.DPMSolverMultistepInverseScheduler(**BETAS)
    want, times = theirs(scheduler, model, x_T, 20)
    table = torch.tensor(alpha_bar_table(model))
    levels = [Level(t, table[t], i, 20) for i, t in enumerate([*times, 999])]
    sampler = SAMPLERS["dpmpp_2m"](Denoiser(model, None))
    got = [step.x_t for step in run_levels(levels, x_T, sampler.step)]
    agree((got, []), (want, []), atol=1e-4)


def test_dpm_solver_sde_takes_the_same_steps():
    """By the same draws; and by torchsde's paths of the same seeds, between sigmas that theirs round to float32.

    A path moves by the root of such a difference, which is more than the formulas differ by.
    """
    pytest.importorskip("torchsde")
    model, (x_T, *noises) = Wavy(), normals(2, 2, 3, 1, count=40)
    for tolerance, brownian in ((1e-4, False), (1e-3, "torchsde")):
        settings = {"use_karras_sigmas": True, "noise_sampler_seed": [5, 12345]}
        scheduler = diffusers.DPMSolverSDEScheduler(**BETAS, **settings)
        scheduler.set_timesteps(20)
        coming, x = iter(noises), x_T * scheduler.sigmas[0]
        if not brownian:
            scheduler.noise_sampler = lambda sigma, sigma_to, coming=coming: next(coming)
        for t in scheduler.timesteps:
            x = scheduler.step(model.raw(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
        again = iter(noises)
        noise = ImageNoise([5, 12345]) if brownian else lambda like, again=again: next(again)
        options = {"spacing": "karras", "brownian": brownian, "noise": noise}
        *_, last = sample_steps("dpmpp_sde", model, x_T, None, steps=20, **options)
        error = float((last.x_t - x).abs().max() / (1 + x.abs().max()))
        assert error < tolerance, (brownian, error)


def test_ipndm_over_the_schedule_it_brings():
    """A cosine of its own, and a network that predicts v at a share of it.

    It begins where there is no signal, and there theirs takes 0 for the clean sample, which is -v: ours goes on from
    the second level, with the noise of the first in mind.
    """
    (x_T,), model = normals(2, 2, 3, 1), Wavy()

    class Velocity:
        def at_sigma(self, x, sigma):
            angle = torch.atan(sigma)
            share = (angle / math.pi * 2).expand(len(x))
            return angle.cos() * angle.cos() * x - angle.sin() * model.raw(angle.cos() * x, share)

    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(20)
    scheduler.betas, scheduler.alphas = scheduler.betas.double(), (1 - scheduler.betas.double() ** 2).sqrt()
    scheduler.timesteps = (torch.atan2(scheduler.betas, scheduler.alphas) / math.pi * 2)[:-1]
    x, want = x_T, []
    for t in scheduler.timesteps:
        x = scheduler.step(model.raw(x, t.expand(2)), t, x).prev_sample
        want.append(x)
    signal = (scheduler.alphas**2)[1:]
    plan = [Level(0.0, alpha_bar, 19 - i, 19) for i, alpha_bar in enumerate(signal)]
    sampler = SAMPLERS["ipndm"](Velocity())
    sampler.past = [(x_T, math.inf)]
    got = [step.x_t for step in run_levels(plan, want[0], sampler.step)]
    agree((got, []), (want[1:], []), atol=1e-4)
