"""UniPC, DEIS, iPNDM, SA-Solver, ER-SDE, RES, LCM, TCD and others: recorded runs, diffusers' schedulers, and laws."""

import json
import math
from itertools import count

import numpy as np
import pytest
import torch
from keyed import keyed_input
from linear_gaussian import LinearGaussian, normals
from mixture import Mixture, sigmas_of
from safetensors.torch import load_file

from bench.order import FLOWS, flow_error, slope
from ldm.errors import NumericError, UsageError
from ldm.metadata import from_infotext, to_infotext
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import Level, alpha_bar_table, make_plan, run_levels
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps, sampler_options
from ldm.options import options as every_option
from ldm.process.multistep import (
    deis_weights,
    er_sde_weights,
    exponential_weights,
    ipndm_v_weights,
    sa_std,
    sa_weights,
    unipc_step,
)
from ldm.process.sigmas import alpha_bar_of_sigma
from ldm.process.steps import multistep_weights

OURS = (  # those of this file, and how often they call the network in S steps
    ("dpm_solver_singlestep", lambda s: s),
    ("dpmpp_2m_v2", lambda s: s),
    ("unipc", lambda s: s),
    ("deis", lambda s: s),
    ("ipndm", lambda s: s),
    ("ipndm_v", lambda s: s),
    ("sa_solver", lambda s: s),
    ("er_sde", lambda s: s),
    ("res_multistep", lambda s: s),
    ("res_multistep_a", lambda s: s),
    ("res_2s", lambda s: 2 * s - 1),
    ("heunpp2", lambda s: max(3 * s - 3, 1)),
    ("gradient_estimation", lambda s: s),
    ("lcm", lambda s: s),
    ("tcd", lambda s: s),
)
NAMES = [name for name, _ in OURS]
NOISY = ("sa_solver", "er_sde", "res_multistep_a", "lcm", "tcd")
WITHOUT_NOISE = {
    "sa_solver": {"eta": 0.0},
    "er_sde": {"eta": 0.0},
    "res_multistep_a": {"eta": 0.0},
    "tcd": {"gamma": 0},
}


def run(sampler, sigmas, x):
    """Take x, in sigma's units, along sigmas: where it ends, in the same units."""
    bars = alpha_bar_of_sigma(sigmas[::-1].copy())
    sampler.levels = make_plan(np.zeros(len(bars) - 1), bars[1:], bars[0])
    *_, last = run_levels(sampler.levels, x * math.sqrt(bars[-1]), sampler.step)
    return last.x_t / math.sqrt(bars[0])


# --- ComfyUI's recorded runs ------------------------------------------------------------------------

RECORDED = [  # (run, sampler, options, tolerance)
    ("ipndm.0", "ipndm", {}, 1e-9),
    ("ipndm_v.0", "ipndm_v", {}, 1e-9),
    # Their integral is a sum of 10,000 terms in float32.
    ("deis.0", "deis", {"order": 3, "clock": "t"}, 1e-4),
    ("deis.1", "deis", {"order": 2, "clock": "t"}, 1e-4),
    ("deis.steps1", "deis", {"order": 3, "clock": "t"}, 1e-9),
    ("deis.steps2", "deis", {"order": 3, "clock": "t"}, 1e-9),
    ("gradient_estimation.0", "gradient_estimation", {}, 1e-9),
    ("res_multistep.0", "res_multistep", {}, 1e-9),
    ("res_multistep.steps1", "res_multistep", {}, 1e-9),
    ("res_multistep.steps2", "res_multistep", {}, 1e-9),
    ("res_multistep_ancestral.0", "res_multistep_a", {}, 1e-9),
    ("er_sde.0", "er_sde", {}, 1e-8),  # their sums of 200 points are in float32
    ("heunpp2.0", "heunpp2", {}, 1e-9),
    ("lcm.0", "lcm", {"timestep_scaling": None}, 1e-9),
    ("lcm.steps1", "lcm", {"timestep_scaling": None}, 1e-9),
    ("lcm.steps2", "lcm", {"timestep_scaling": None}, 1e-9),
    # Theirs looks at the sigma stepped to, which leaves the same three steps.
    (
        "sa_solver.0",
        "sa_solver",
        {
            "order": 3,
            "corrector_order": 4,
            "simple_order_2": False,
            "final_orders": "comfyui",
            "s_tmin": 1.7,
            "s_tmax": 5.5,
        },
        1e-9,
    ),
    ("sample_unipc.10", "unipc", {"order": 3, "solver_type": "bh1"}, 2e-5),  # theirs is in float32
    ("sample_unipc_bh2.10", "unipc", {"order": 3, "solver_type": "bh2"}, 2e-5),
    ("sample_unipc.nozero", "unipc", {"order": 3, "solver_type": "bh1"}, 2e-6),
    ("sample_unipc_bh2.nozero", "unipc", {"order": 3, "solver_type": "bh2"}, 2e-6),
    # Where three steps lead down to 0.001, float32 leaves theirs four digits; worked out in float64 they are ours.
    ("sample_unipc.3", "unipc", {"order": 3, "solver_type": "bh1"}, 2e-4),
    ("sample_unipc_bh2.3", "unipc", {"order": 3, "solver_type": "bh2"}, 5e-5),
]


def test_every_recorded_run_of_comfyui(request):
    folder = request.path.parents[1] / "golden"
    told = json.loads((folder / "samplers_comfyui.json").read_text())["samplers_run"]
    cases = {case["name"]: case for case in told}
    # Both were recorded over the same sigmas.
    kdiffusion = json.loads((folder / "samplers_kdiffusion.json").read_text())["cases"]
    kdiffusion = {case["name"]: case for case in kdiffusion}
    recorded = load_file(folder / "samplers_comfyui.safetensors")
    for name, ours, options, tolerance in RECORDED:
        kind = name.split(".")[1]
        run_of = "steps3" if ours == "unipc" and kind == "3" else kind
        sigmas = sigmas_of(kdiffusion, run_of if run_of.startswith("steps") else "0")
        if kind == "nozero":  # eight, where k-diffusion's were six
            sigmas = np.linspace(sigmas[0] ** (1 / 7), sigmas[-2] ** (1 / 7), 8) ** 7
        elif ours == "unipc":
            sigmas[-1] = 0.001  # as in ComfyUI, in place of 0
        drawn = (keyed_input(f"noise.{i}", (2, 2, 3)).double() for i in count())
        model = Mixture()
        sampler = SAMPLERS[ours](model, lambda like, drawn=drawn: next(drawn), **options)
        got = run(sampler, sigmas, keyed_input("x", (2, 2, 3)).double() * sigmas[0])
        error = (got - recorded[name]).abs().max() / (1 + recorded[name].abs().max())
        assert error < tolerance, f"{name}: {error}"
        assert model.calls == cases[name]["model_calls"], name


def test_one_step_of_unipc_denoises_though_comfyuis_does_not(request):
    """Theirs takes the order min(3, steps - 1) = 0, by which nothing is done: it gives its noise back."""
    folder = request.path.parents[1] / "golden"
    recorded = load_file(folder / "samplers_comfyui.safetensors")
    high = 14.6146317
    x = keyed_input("x", (2, 2, 3)).double() * high
    for name in ("sample_unipc.1", "sample_unipc_bh2.1"):
        torch.testing.assert_close(recorded[name].double(), x / (1 + high**2) ** 0.5, rtol=1e-6, atol=1e-6)
    got = run(SAMPLERS["unipc"](Mixture(), order=3), np.array([high, 0.0]), x)
    want = Mixture().at_sigma(x, torch.tensor(high, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


SHAPE = (2, 2, 3, 1)

# --- formulas ---------------------------------------------------------------------------------------


def test_weights_integrate_polynomials_in_their_clock():
    """What each formula says it is exact for: a polynomial of one degree less than there are values."""
    sigmas, to = [3.2, 5.5, 9.1, 14.6], 1.7
    clocks = {"log_sigma": np.log, "sigma": np.asarray, "t": None}
    for k in (1, 2, 3, 4):
        some = sigmas[:k]
        for clock, at in clocks.items():
            weights = deis_weights(some, to, clock)
            assert weights.sum() == pytest.approx(to - sigmas[0], rel=1e-12), clock
            if at is not None:  # the integral of at(sigma)^(k - 1) over sigma, by a fine rule of our own
                fine = np.linspace(sigmas[0], to, 20_001)
                mean = (at(fine[1:]) + at(fine[:-1])) / 2
                want = (mean ** (k - 1)).sum() * (fine[1] - fine[0])
                assert weights @ at(some) ** (k - 1) == pytest.approx(want, rel=1e-7), clock
        np.testing.assert_allclose(deis_weights(some, to, "sigma"), multistep_weights(some, to), rtol=1e-9)
        for tau in (0.0, 0.5, 1.0):
            weights, h = sa_weights(some, sigmas[0], to, tau), math.log(sigmas[0] / to)
            assert weights.sum() == pytest.approx(-math.expm1(-(1 + tau**2) * h), rel=1e-12)
    np.testing.assert_allclose(ipndm_v_weights([4, 5, 6], 3), multistep_weights([4, 5, 6], 3), rtol=1e-12)
    # Adams-Moulton's: exact for a line in lambda whatever the type, which for two samples is "simple" too.
    assert sa_weights([to, 3.2], 3.2, to, 0.7, simple=True).sum() == pytest.approx(
        sa_weights([to, 3.2], 3.2, to, 0.7).sum(), rel=1e-12
    )


def test_the_predicted_clean_sample_stays_where_it_never_changes():
    """With one clean sample from first to last, every solver ends a step on the line to it."""
    x, clean = normals(2, 3, count=2)
    want = clean + (x - clean) * (1.7 / 3.2)
    sigmas = [3.2, 5.5, 9.1]
    for kind in ("bh1", "bh2"):
        for order in (1, 2, 3):
            got = unipc_step(x, [clean] * order, sigmas, 1.7, solver_type=kind)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            noise = [(x - clean) / 3.2] * order
            got = unipc_step(x, noise, sigmas, 1.7, output_to=noise[0], solver_type=kind, predict_x0=False)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    decay, weights, std = er_sde_weights(sigmas, 1.7, noisy=False)
    assert decay + weights.sum() == pytest.approx(1, abs=1e-12) and std == 0
    assert exponential_weights([0, -0.4], 0.6).sum() == pytest.approx(-math.expm1(-0.6), rel=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_noise_of_the_reverse_sde_fills_up_what_a_step_takes(tau):
    """Of a sample without data, sigma * noise, each step leaves sigma_to * noise: variances add up."""
    sigma, to = 3.2, 1.7
    kept = (to / sigma) ** (1 + tau**2) * sigma
    assert math.hypot(kept, sa_std(sigma, to, tau)) == pytest.approx(to, rel=1e-12)
    decay, _, std = er_sde_weights([sigma], to)
    assert math.hypot(decay * sigma, std) == pytest.approx(to, rel=1e-12)


class Counter(Denoiser):
    """A network that costs nothing, and counts its calls."""

    def __init__(self, model):
        super().__init__(model, None)
        self.calls = 0

    def at_sigma(self, x, sigma):
        self.calls += 1
        return 0.5 * x

    def __call__(self, x, t, alpha_bar):
        self.calls += 1
        return x, 0.5 * x


# --- laws -------------------------------------------------------------------------------------------

MEANS = torch.tensor([0.8, -0.3])


def test_the_network_is_called_as_often_as_the_docs_say():
    x, shrunk = torch.zeros(1, 1), LinearGaussian()
    for name, calls in OURS:
        for steps in (*range(1, 9), 21, 100):
            model = Counter(shrunk)
            sampler = SAMPLERS[name](model, torch.zeros_like)
            run(sampler, np.append(np.geomspace(14, 0.03, steps), 0.0), x)
            assert model.calls == calls(steps), f"{name}, {steps} steps"


@pytest.mark.slow
def test_they_converge_with_their_papers_orders():
    """At least, on Gaussian data, over steps of which no two are of one length."""
    for name, options, claim in FLOWS:
        claim = 2 if name == "dpmpp_3m_sde" else claim  # k-diffusion's weights, which do not have its paper's
        if claim is not None:
            errors = [flow_error(name, options, steps)[0] for steps in (192, 384)]
            assert slope([192, 384], errors) > claim - 0.2, (name, options)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_do_not_depend_on_their_batch(name):
    """Each image of a batch is what it is alone, from its own generator."""
    model, (x_T,) = LinearGaussian(), normals(*SHAPE)

    def last(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]

        def noise(like):
            draws = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
            return torch.stack(draws)

        *_, done = sample_steps(name, model, x_T[rows], MEANS[rows], steps=7, noise=noise)
        return done.x_t

    together = last([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(last([row]), together[[row]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_without_noise_draw_none_and_keep_what_stands_still(name):
    def none(like):
        raise AssertionError("drew noise")

    model, (x_T,) = LinearGaussian(), normals(*SHAPE)
    if name not in ("lcm",):
        list(sample_steps(name, model, x_T, MEANS, steps=6, noise=none, **WITHOUT_NOISE.get(name, {})))
        here = Level(500.0, torch.tensor(0.2, dtype=torch.float64), 2, 3)
        sampler = SAMPLERS[name](Mixture(), none, **WITHOUT_NOISE.get(name, {}))
        sampler.levels = (here, here)
        x = normals(2, 2, 3)[0]
        torch.testing.assert_close(sampler.step(x, here, here)[0], x, rtol=1e-12, atol=1e-12)
    if name in NOISY:
        with pytest.raises(AssertionError, match="drew noise"):
            list(sample_steps(name, model, x_T, MEANS, steps=6, noise=none))


@pytest.mark.parametrize("name", ["unipc", "sa_solver"])
def test_correctors_leave_what_a_mask_has_put_in(name):
    """A value that was changed between two steps is not taken back to where the step before had led."""
    model, (x_T, other) = LinearGaussian(), normals(*SHAPE, count=2)
    plan = SAMPLERS[name].plan(alpha_bar_table(model), 6)

    def second(changed):
        sampler = SAMPLERS[name](Denoiser(model, MEANS), torch.zeros_like)
        sampler.levels = plan
        x, _ = sampler.step(x_T, *plan[:2])
        x = torch.where(changed, other, x)
        return sampler.step(x, *plan[1:3])[0], sampler.last[0] * plan[1].alpha_bar.sqrt()

    changed = torch.zeros(SHAPE, dtype=torch.bool)
    changed[:, 0] = True
    after, before = second(changed)
    torch.testing.assert_close(before[changed], other[changed], rtol=1e-12, atol=1e-12)
    untouched, corrected = second(torch.zeros_like(changed))
    torch.testing.assert_close(after[~changed], untouched[~changed], rtol=1e-12, atol=1e-12)
    assert (corrected - x_T)[~changed].abs().min() > 0


REFUSED = [
    ("unipc", {"order": 4}, "order of unipc must be one of 1, 2, 3; got 4"),
    ("unipc", {"order": True}, "order of unipc must be a whole number, got True"),
    ("unipc", {"solver_type": "bh3"}, "solver_type of unipc must be one of bh1, bh2; got 'bh3'"),
    ("unipc", {"eta": 1.0}, "eta of unipc must be 0: this sampler adds no noise; got 1.0"),
    ("deis", {"clock": "time"}, "clock of deis must be one of log_sigma, t, sigma; got 'time'"),
    ("ipndm", {"order": 0}, "order of ipndm must be one of 1, 2, 3, 4; got 0"),
    ("sa_solver", {"corrector_order": 5}, "corrector_order of sa_solver must be one of 0, 1, 2, 3, 4; got 5"),
    (
        "sa_solver",
        {"final_orders": "lower"},
        "final_orders of sa_solver must be one of diffusers, comfyui, none",
    ),
    ("sa_solver", {"eta": 1.2}, "eta of sa_solver must be from 0 to 1; got 1.2"),
    ("er_sde", {"eta": 0.5}, "eta of er_sde must be 0 or 1; got 0.5"),
    ("er_sde", {"order": 4}, "order of er_sde must be one of 1, 2, 3; got 4"),
    ("tcd", {"gamma": 1.5}, "gamma of tcd must be from 0 to 1, got 1.5"),
    ("tcd", {"gamma": "half"}, "gamma of tcd must be a finite number, got 'half'"),
    (
        "tcd",
        {"eta": 0.3},
        r"eta of tcd must be 0 \(unset\): gamma says how much of its noise is fresh; got 0.3",
    ),
    ("res_2s", {"c2": 0}, "c2 of res_2s must be above 0 and at most 1, got 0"),
    (
        "gradient_estimation",
        {"gamma": math.nan},
        "gamma of gradient_estimation must be a finite number, got nan",
    ),
    ("lcm", {"timestep_scaling": 0}, "timestep_scaling of lcm must be above 0, or None, got 0"),
    ("lcm", {"gamma": 0.3}, "lcm has no option gamma"),
    ("res_multistep", {"last_down": 1.0}, "res_multistep has no option last_down"),
    # The kind of each option is that of its default.
    ("ddim", {"eta": "1"}, "eta of ddim must be from 0 to 1; got '1'"),
    ("euler_a", {"eta": True}, "eta of euler_a must be from 0 to 1; got True"),
    ("ddim", {"temperature": math.nan}, "temperature of ddim must be a finite number, got nan"),
    ("ddim", {"noise_dropout": 2}, "noise_dropout of ddim must be a number from 0 to 1, got 2"),
    ("ddim", {"repeat_noise": "no"}, "repeat_noise of ddim must be True or False, got 'no'"),
    ("ddim", {"dynamic_threshold": math.inf}, "dynamic_threshold of ddim must be a finite number, got inf"),
    ("ddpm", {"v_posterior": -1}, "v_posterior of ddpm must be a number from 0 to 1, got -1"),
    ("dpm_solver", {"predict_x0": 2}, "predict_x0 of dpm_solver must be True or False, got 2"),
    ("dpm_solver", {"order": 2.0}, "order of dpm_solver must be a whole number, got 2.0"),
    ("dpm_solver", {"solver_type": 3}, "solver_type of dpm_solver must be a text, got 3"),
    ("euler", {"s_churn": -1}, "s_churn of euler must be 0 or above, got -1"),
    ("euler", {"s_churn": math.inf}, "s_churn of euler must be a finite number, got inf"),
    ("heunpp2", {"s_tmin": math.nan}, "s_tmin of heunpp2 must be a finite number, got nan"),
    ("sa_solver", {"s_tmax": "high"}, "s_tmax of sa_solver must be a finite number, got 'high'"),
    ("dpmpp_sde", {"r": [0.5]}, "r of dpmpp_sde must be a finite number, got"),
    ("dpmpp_2m_sde", {"s_noise": 10**400}, "s_noise of dpmpp_2m_sde must be a finite number, got"),
    ("dpmpp_2m_sde", {"brownian": "x"}, "brownian of dpmpp_2m_sde must be True or False, got 'x'"),
    ("dpm_adaptive", {"accept_safety": 2}, "accept_safety must be a number from 0 to 1, got 2"),
    ("dpm_adaptive", {"icoeff": -1}, "icoeff must be a number from 0 to 1, got -1"),
    ("dpm_adaptive", {"rtol": 0}, "rtol must be a number above 0, got 0"),
]


def test_options_out_of_range_are_refused():
    for name, options, message in REFUSED:
        with pytest.raises(UsageError, match=message) as told:
            sample_steps(name, LinearGaussian(), normals(*SHAPE)[0], MEANS, steps=3, **options)
        assert len(str(told.value)) <= 400 and "\n" not in str(told.value)


def test_none_is_a_value_only_of_options_that_have_it():
    model, (x_T,) = LinearGaussian(), normals(*SHAPE)

    def last(name, **options):
        *_, done = sample_steps(name, model, x_T, MEANS, steps=3, noise=torch.zeros_like, **options)
        return done.x_t

    without = last("lcm", timestep_scaling=None)
    assert (without != last("lcm")).any()  # the boundary condition is left out, not the option
    torch.testing.assert_close(without, last("lcm", timestep_scaling=1e9), rtol=1e-12, atol=1e-12)
    assert (last("tcd", gamma=None) == last("tcd")).all() and (last("lms", order=None) == last("lms")).all()


class Broken(LinearGaussian):
    def apply_model(self, x, t, cond):
        return x * math.nan


def test_dpm_adaptive_ends_where_no_step_can_count():
    (x_T,) = normals(*SHAPE)
    for error, model, options, message in (
        (NumericError, Broken(), {}, "not finite near sigma 3, and dpm_adaptive"),
        (
            UsageError,
            LinearGaussian(),
            {"rtol": 1e-30, "atol": 1e-30},
            "no step within rtol 1e-30 and atol 1e-30",
        ),
    ):
        sampler = SAMPLERS["dpm_adaptive"](Denoiser(model, MEANS), torch.zeros_like, **options)
        with pytest.raises(error, match=message):
            run(sampler, np.array([3.0, 0.5]), x_T)


def test_gamma_can_be_asked_for_and_is_said():
    (option,) = (one for one in every_option() if one.name == "gamma")
    takers = {name for name, cls in SAMPLERS.items() if "gamma" in sampler_options(cls)}
    assert option.part == "sampler" and takers == {"tcd", "gradient_estimation"}
    text = to_infotext({"sampler": "tcd", "gamma": 0.5, "seed": 1, "steps": 3, "prompt": "a"})
    assert "Sampler gamma: 0.5" in text and from_infotext(text)["gamma"] == 0.5
