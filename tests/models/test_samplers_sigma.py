"""The samplers of k-diffusion: their recorded steps, what they share with ours, and each with each spacing."""

import json
import math

import numpy as np
import pytest
import torch
from keyed import fill, keyed_input
from linear_gaussian import LinearGaussian, normals
from mixture import Mixture, sigmas_of
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm import metadata, options
from ldm.errors import UsageError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import visited_levels
from ldm.models.diffusion.samplers import (
    NAMES,
    SAMPLERS,
    DPMAdaptive,
    DPMFast,
    LevelTable,
    alpha_bar_table,
    make_plan,
    run_levels,
    sample_steps,
    split_sampler,
    start_level,
)
from ldm.process.sigmas import SIGMA_TABLES, alpha_bar_of_sigma, sigma_table
from ldm.process.spacing import EXACT_METHODS
from ldm.process.steps import ddim_std, multistep_weights

SHAPE = (2, 4, 5, 3)
MEANS = torch.tensor([0.8, -0.3])
OURS = {
    "sample_euler": "euler",
    "sample_heun": "heun",
    "sample_dpm_2": "dpm2",
    "sample_lms": "lms",
    "sample_dpmpp_2m": "dpmpp_2m",
    "sample_euler_ancestral": "euler_a",
    "sample_dpm_2_ancestral": "dpm2_a",
    "sample_dpmpp_2s_ancestral": "dpmpp_2s_a",
    "sample_dpmpp_sde": "dpmpp_sde",
    "sample_dpmpp_2m_sde": "dpmpp_2m_sde",
    "sample_dpmpp_3m_sde": "dpmpp_3m_sde",
}
THEIRS = {name.removeprefix("sample_"): ours for name, ours in OURS.items()}


def close(got, want, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


# --- the recorded steps -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kdiffusion(request):
    folder = request.path.parents[1] / "golden"
    recorded = load_file(folder / "samplers_kdiffusion.safetensors")
    return json.loads((folder / "samplers_kdiffusion.json").read_text()), recorded


def run(sampler, sigmas, x):
    """Take x, in sigma's units, along sigmas."""
    bars = alpha_bar_of_sigma(sigmas[::-1].copy())
    plan = make_plan(np.zeros(len(bars) - 1), bars[1:], bars[0])
    steps = list(run_levels(plan, x * math.sqrt(bars[-1]), sampler.step))
    return steps[-1].x_t / math.sqrt(bars[0]), torch.stack([step.pred_x0 for step in steps])


def test_every_recorded_step_of_k_diffusion(kdiffusion):
    told, recorded = kdiffusion
    cases = {case["name"]: case for case in told["cases"]}
    held = set()
    for name, case in cases.items():
        ours = OURS.get(case.get("function"))
        if (
            ours is None or name.startswith("float32") or name == "dpmpp_2m.nozero"
        ):  # ours ends short runs at order 1
            continue
        kind = name.split(".")[1]
        sigmas = sigmas_of(cases, kind if kind in ("steps1", "steps2", "steps3", "nozero") else "0")
        model, options = Mixture(), dict(case["args"])
        if hasattr(SAMPLERS[ours], "brownian"):
            options["brownian"] = False  # the recorded noise is one draw after another
        sampler = SAMPLERS[ours](model, recorded_noise(), **options)
        x, denoised = run(sampler, sigmas, keyed_input("x", (2, 2, 3)).double() * sigmas[0])
        close(x, recorded[name])
        close(denoised, recorded[f"{name}.denoised"])
        assert model.calls == case["model_calls"]
        held.add(name)
    assert len(held) == 74


def recorded_noise():
    drawn = (keyed_input(f"noise.{i}", (2, 2, 3)).double() for i in range(20))
    return lambda like: next(drawn)


def test_dpm_fast_takes_the_recorded_steps(kdiffusion):
    """Theirs work their levels out in float32, which shows after six digits."""
    told, recorded = kdiffusion
    for case in told["cases"]:
        if case.get("function") != "sample_dpm_fast":
            continue
        sigmas = [draw[0] for draw in case["noise_at"]] + [case["noise_at"][-1][1]]
        model = Mixture()
        bars = alpha_bar_of_sigma(np.array(sigmas))
        model.levels = LevelTable(np.linspace(bars[-1], bars[0], 1000))
        plan = DPMFast.plan(model.levels.alpha_bar, case["n"])
        assert [float(level.sigma) for level in plan] == pytest.approx(sigmas, rel=1e-6)
        x = keyed_input("x", (2, 2, 3)).double() * 14.6146317 * bars[0] ** 0.5
        *_, last = run_levels(plan, x, DPMFast(model, recorded_noise(), **case["args"]).step)
        close(last.x_t / bars[-1] ** 0.5, recorded[case["name"]], rtol=5e-6)
        assert model.calls == case["model_calls"]


def test_dpm_adaptive_takes_the_recorded_steps(kdiffusion):
    """As many, to nearly the same levels: theirs measure the error in float32, from which the lengths follow."""
    told, recorded = kdiffusion
    for case in told["cases"]:
        if case.get("function") != "sample_dpm_adaptive":
            continue
        ends = np.array([case["noise_at"][0][0], case["noise_at"][-1][1]])
        bars = alpha_bar_of_sigma(ends)
        model, options = Mixture(), dict(case["args"])
        del options["return_info"]
        model.levels = LevelTable(np.linspace(bars[-1], bars[0], 1000))
        sampler = DPMAdaptive(model, recorded_noise(), **options)
        plan, reached = make_plan(np.zeros(1), bars[:1], bars[1]), []

        def step(x, here, to, sampler=sampler, reached=reached):
            x, pred_x0, stop = sampler.step(x, here, to)
            reached.append(float(stop.sigma))
            return x, pred_x0, stop

        x = keyed_input("x", (2, 2, 3)).double() * 14.6146317 * bars[0] ** 0.5
        *_, last = run_levels(plan, x, step)
        assert reached == pytest.approx([to for _, to in case["noise_at"]], rel=2e-3)
        close(last.x_t / bars[1] ** 0.5, recorded[case["name"]], rtol=5e-5)
        # Where a step is tried again, theirs call the network again at its start.
        attempts, order = case["info"]["steps"], options.get("order", 3)
        assert model.calls == len(reached) + attempts * (order - 1)


def test_restart_takes_a1111s_steps(golden):
    recorded = load_file(golden / "samplers_a1111.safetensors")
    table = alpha_bar_of_sigma(np.exp(np.linspace(math.log(0.0291671582), math.log(14.6146317), 1000)))
    told = json.loads((golden / "samplers_a1111.json").read_text())["cases"]
    for case in told:
        name, _, steps = case["name"].partition(".")
        if name != "restart" or steps == "list":
            continue
        model = Mixture()
        plan = SAMPLERS["restart"].plan(table, int(steps))
        x = keyed_input("x", (2, 2, 3)).double() * 14.6146317 * float(plan[0].alpha_bar) ** 0.5
        done = list(run_levels(plan, x, SAMPLERS["restart"](model, recorded_noise()).step))
        close(done[-1].x_t, recorded[case["name"]], rtol=5e-6)  # its sigmas are in float32
        assert len(done) == case["callbacks"] == done[-1].total and model.calls == case["model_calls"]


def test_restart_goes_along_a_list_that_rises(golden):
    """A1111's restart_list: of ten steps, from the sigma nearest to 0.15 up to that nearest to 3, twice, in four."""
    recorded = load_file(golden / "samplers_a1111.safetensors")["restart.list"]
    low, high = 0.0291671582, 14.6146317
    table = alpha_bar_of_sigma(np.exp(np.linspace(math.log(low), math.log(high), 1000)))
    sigmas = np.append(np.linspace(high ** (1 / 7), low ** (1 / 7), 10) ** 7, 0)
    bottom, top = (int(np.abs(sigmas - at).argmin()) for at in (0.15, 3))
    again = np.linspace(sigmas[top] ** (1 / 7), sigmas[bottom] ** (1 / 7), 4) ** 7
    way = [*sigmas[: bottom + 1], *again, *again, *sigmas[bottom + 1 :]]
    plan = SAMPLERS["restart"].plan(table, len(way) - 1, spacing=way)
    model, x = Mixture(), keyed_input("x", (2, 2, 3)).double() * high * float(plan[0].alpha_bar) ** 0.5
    done = list(run_levels(plan, x, SAMPLERS["restart"](model, recorded_noise(), s_noise=1.01).step))
    close(done[-1].x_t, recorded, rtol=5e-6)
    assert len(done) == done[-1].total == 16
    for wrong in (
        [3, 1, 0.5, 0.5, 2, 1, 0],
        [1, 3, 0.5, 0],
        [3, 0, 2, 0],
        [3, 1, 2],
        [3, 1, math.inf, 1, 0],
    ):
        with pytest.raises(UsageError, match="each below the last, and where it restarts above it"):
            SAMPLERS["restart"].plan(table, len(wrong) - 1, spacing=wrong)
    with pytest.raises(UsageError, match="each below the last, got"):
        SAMPLERS["heun"].plan(table, len(way) - 1, spacing=way)


def test_lcm_takes_a1111s_steps(golden):
    """Which asks the network at the nearest of the 50 levels it was distilled on, not at the level of the sigma."""
    recorded = load_file(golden / "samplers_a1111.safetensors")
    known = recorded["lcm.sigmas"].double().log()

    class Nearest(LinearGaussian):
        def apply_model(self, x, t, cond):
            sigma = Denoiser(self, None).levels.at_t(float(t[0])).sigma
            nearest = 19 + 20 * int((known - sigma.log()).abs().argmin())
            self.asked.append(nearest)
            return 0.3 * x + 0.05 * torch.sin(2 * x) + 0.0002 * nearest

    for steps, levels in ((1, [999]), (4, [999, 679, 339, 19])):
        sigmas = recorded[f"lcm.get_sigmas.{steps}"].double().numpy()
        want, model = recorded[f"lcm.sample.{steps}"], Nearest()
        drawn = (keyed_input(f"noise.{i}", want.shape) for i in range(steps))
        x_T = keyed_input("lcm.x", want.shape).double() * sigmas[0] * alpha_bar_of_sigma(sigmas[0]) ** 0.5
        noise = lambda like, drawn=drawn: next(drawn).to(like)  # noqa: E731
        *_, last = sample_steps("lcm", model, x_T, None, steps=steps, spacing=sigmas, noise=noise)
        error = (last.x_t - want).abs().max() / (1 + want.abs().max())
        assert error < 1e-5 and model.asked == levels, f"{steps}: {error}"  # theirs is in float32


def test_comfyuis_steps_where_k_diffusion_has_none(kdiffusion, golden):
    """CFG++, the SDE solvers in one step and two, and churn that draws noise in 7 steps of 10."""
    cases = {case["name"]: case for case in kdiffusion[0]["cases"]}
    recorded = load_file(golden / "samplers_comfyui.safetensors")
    rows = [("euler_cfg_pp.0", "euler_cfg_pp"), ("euler_ancestral_cfg_pp.0", "euler_a_cfg_pp")]
    rows += [(f"{name}.steps{n}", name) for name in ("dpmpp_2m_sde", "dpmpp_3m_sde") for n in (1, 2)]
    rows += [("euler.1", "euler"), ("heun.1", "heun")]
    for row, ours in rows:
        kind = row.split(".")[1]
        sigmas = sigmas_of(cases, kind if kind.startswith("steps") else "0")
        options = {"brownian": False} if "sde" in ours else {}
        if kind == "1":
            options = {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01, "always_draw": False}
        sampler = SAMPLERS[ours](Mixture(), recorded_noise(), **options)
        x, _ = run(sampler, sigmas, keyed_input("x", (2, 2, 3)).double() * sigmas[0])
        close(x, recorded[row])


def test_ancestral_steps_split_as_recorded(kdiffusion):
    for start, end, eta, down, up in kdiffusion[0]["ancestral_step"]:
        if eta > 1:  # which ours refuse
            continue
        bars = alpha_bar_of_sigma(np.array([end, start]))
        here, to = make_plan(np.zeros(1), bars[1:], bars[0])
        drawn = ddim_std(here.alpha_bar, to.alpha_bar, eta) / to.alpha_bar.sqrt()
        assert float(drawn) == pytest.approx(up, rel=1e-9, abs=1e-12)
        assert math.sqrt(max(float(to.sigma**2 - drawn**2), 0)) == pytest.approx(down, abs=1e-6)


def test_multistep_weights_are_the_recorded_ones(kdiffusion):
    told, _ = kdiffusion
    sigmas = sigmas_of({case["name"]: case for case in told["cases"]}, "0").tolist()
    for order, i, j, weight in told["lms_coeff"]:
        got = multistep_weights(sigmas[i - order + 1 : i + 1][::-1], sigmas[i + 1])[j]
        assert got == pytest.approx(weight, rel=1e-6)


def test_multistep_weights_are_exact_for_polynomials():
    """Order k integrates degree k - 1; here cubics between uneven levels, also to 0."""
    sigmas = [3.2, 5.5, 9.1, 14.6]
    for end in (1.7, 0.0):
        for order in (1, 2, 3, 4):
            weights = multistep_weights(sigmas[:order], end)
            for power in range(order):
                want = (end ** (power + 1) - sigmas[0] ** (power + 1)) / (power + 1)
                got = sum(w * s**power for w, s in zip(weights, sigmas, strict=False))
                assert got == pytest.approx(want, rel=1e-10)


@pytest.fixture(scope="module")
def tiny(request):
    folder = request.path.parents[1] / "golden"
    config = json.loads((folder / "diffusion.json").read_text())["config"]
    model = fill(LatentDiffusion(**OmegaConf.create(config)), only=("model.", "first_stage"))
    return model, load_file(folder / "samplers_compvis_denoiser.safetensors")


CHAINS = [("karras", theirs) for theirs in THEIRS]
CHAINS += [("uniform", theirs) for theirs in ("lms", "dpmpp_2m", "euler_ancestral")]


@pytest.mark.parametrize(("table", "theirs"), CHAINS)
@pytest.mark.thinned(5)
def test_chains_over_compvis_unet_are_the_recorded_ones(tiny, table, theirs):
    model, recorded = tiny
    # As a list, for DPM2 leaves one out where it is given a name.
    sigmas = sigma_table("karras" if table == "karras" else "normal", 10, Denoiser(model, None).sigmas)
    drawn = (keyed_input(f"unet.noise.{i}", (2, 4, 8, 8)) for i in range(20))
    x_T = keyed_input("xT", (2, 4, 8, 8))
    if theirs == "dpmpp_2m":  # ours begins with unit noise, as diffusers' does
        x_T = x_T * math.sqrt(1 - alpha_bar_of_sigma(sigmas[0]))
    steps = sample_steps(
        THEIRS[theirs],
        model,
        x_T,
        keyed_input("c", (2, 7, 24)),
        steps=10,
        spacing=sigmas,
        guidance_scale=3.0,
        unconditional_conditioning=keyed_input("uc", (2, 7, 24)),
        noise=lambda like: next(drawn),
        **({"brownian": False} if "sde" in theirs else {}),
    )
    *_, last = steps
    want = recorded[f"unet.{table}10.{theirs}"]
    torch.testing.assert_close(last.x_t, want, rtol=0, atol=1e-4 * (1 + want.abs().max().item()))


# --- laws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["karras", "trailing", [14.0, 6.0, 2.0, 0.5, 0.0]])
@pytest.mark.parametrize(
    ("theirs", "eta"), [("euler", 0.0), ("euler_a", 0.6), ("euler_a", 1.0), ("lms", 0.0)]
)
def test_eulers_steps_are_ddims_on_the_same_levels(spacing, theirs, eta):
    model = LinearGaussian()
    (x_T,) = normals(*SHAPE)
    noises = normals(*SHAPE, count=4, seed=1)
    plan = SAMPLERS["ddim"].plan(alpha_bar_table(model), 4, spacing=spacing)
    scale = float((1 - plan[0].alpha_bar).sqrt())  # theirs begin so much nearer

    def last(name, start, **options):
        coming = iter(noises)
        steps = sample_steps(
            name, model, start, MEANS, steps=4, spacing=spacing, noise=lambda _: next(coming), **options
        )
        return list(steps)[:3][-1].x_t  # DDIM's own last step over whole levels ends elsewhere

    order = {"order": 1} if theirs == "lms" else {}
    # The network is told fractional levels in float32.
    close(last(theirs, x_T, eta=eta, **order), last("ddim", x_T * scale, eta=eta), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "ratio"), [("euler", 2), ("heun", 4), ("dpm2", 4), ("lms", 6), ("dpmpp_2m", 4)]
)
def test_they_converge_to_the_exact_flow_at_their_order(name, ratio):
    model = LinearGaussian()
    (noise,) = normals(*SHAPE)

    def error(steps):
        # Within the model's range and ending above 0, so that the last step is like the others.
        sigmas = np.exp(np.linspace(math.log(10), math.log(0.1), steps + 1))
        start, end = alpha_bar_of_sigma(sigmas[0]), alpha_bar_of_sigma(sigmas[-1])
        x_T = noise if name == "dpmpp_2m" else noise / math.sqrt(1 - start)
        *_, last = sample_steps(name, model, x_T, MEANS[:1].expand(2), steps=steps, spacing=sigmas)
        return (last.x_t - model.flow(noise, 0.8, start, end)).abs().max().item()

    assert error(80) < 1.15 / ratio * error(40)


@pytest.mark.parametrize("name", ["euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_3m_sde"])
@pytest.mark.thinned(2)
def test_ancestral_samplers_keep_mean_and_spread_of_the_data(name):
    model = LinearGaussian()
    (x_T,) = normals(2, 8, 25, 20)
    draws = torch.Generator().manual_seed(1)

    def noise(like):
        return torch.randn(like.shape, generator=draws, dtype=like.dtype)

    *_, last = sample_steps(name, model, x_T, MEANS, steps=100, spacing="karras", noise=noise)
    x = last.x_t.flatten(1)
    torch.testing.assert_close(x.mean(1), MEANS.double(), rtol=0, atol=4 * model.spread / math.sqrt(4000))
    torch.testing.assert_close(x.std(1) / model.spread, torch.ones(2).double(), rtol=0, atol=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.thinned(6)
def test_each_sampler_goes_with_each_spacing(name):
    """Near the data whatever the levels are: one step of another kind would be seen at once."""
    model = LinearGaussian()
    (x_T,) = normals(1, 2, 3, 1)
    for spacing in dict.fromkeys((*EXACT_METHODS, *SIGMA_TABLES)):
        if spacing == "vp":  # begins far above the model's levels
            continue
        if (name, spacing) == ("dpm_fast", "linear_quadratic"):  # its last step is too long for order 2
            continue
        # Of 4 steps over beta_sigma's one is so long that Heun's second slope overshoots; so is one of the 3 that
        # dpm_fast makes of 8 calls, over several spacings. 23 calls are 8 steps.
        options = {"steps": 23 if name == "dpm_fast" else 8, "spacing": spacing, "noise": torch.zeros_like}
        if hasattr(SAMPLERS[name], "brownian"):
            options["brownian"] = False
        if name == "ipndm_v":  # whose weights of order 4 do not add up over levels that are far from even
            options["order"] = 2
        steps = list(sample_steps(name, model, x_T, MEANS[:1], **options))
        assert steps[-1].x_t.isfinite().all() and (steps[-1].x_t - 0.8).abs().max() < 3
        assert [step.t for step in steps] == sorted((step.t for step in steps), reverse=True)
        assert len(steps) == {"dpm_adaptive": len(steps)}.get(name, 8)


def test_dpm2_leaves_out_the_lowest_sigma_of_a_table():
    table = alpha_bar_table(LinearGaussian())
    for name in ("dpm2", "dpm2_a", "heun"):
        plan = SAMPLERS[name].plan(table, 5, spacing="karras")
        longer = SAMPLERS["heun"].plan(table, 6, spacing="karras")
        want = (
            [*longer[:-2], longer[-1]]
            if name != "heun"
            else SAMPLERS["euler"].plan(table, 5, spacing="karras")
        )
        assert [float(level.sigma) for level in plan] == [float(level.sigma) for level in want]
        assert plan[-1].alpha_bar == 1


def test_spacings_of_sigmas_visit_their_levels():
    table = alpha_bar_table(LinearGaussian())
    t, bars, end = visited_levels("simple", 3, table)
    np.testing.assert_allclose(t, [333, 666, 999], atol=1e-6)
    np.testing.assert_allclose(bars, table[[333, 666, 999]], rtol=1e-12)
    assert end == 1.0
    assert visited_levels("kl_optimal_open", 3, table)[2] == pytest.approx(table[0])
    assert visited_levels("trailing", 3, table)[2] is None
    np.testing.assert_allclose(visited_levels([3.0, 1.0, 0.5], 2, table)[1], [0.5, 0.1])


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("karas", r"the spacing must be one of uniform, quad, .*karras.*; got 'karas'"),
        ("karass", r"got 'karass' \(did you mean karras\?\)"),
        ([3.0, 1.0], "3 steps need 4 sigmas, the end included; got 2"),
        ([1.0, 3.0, 5.0, 7.0], "each below the last"),
        (7, "a list of sigmas must"),
    ],
)
def test_spacings_that_are_none_are_named(spacing, message):
    with pytest.raises(UsageError, match=message):
        sample_steps("euler", LinearGaussian(), normals(*SHAPE)[0], MEANS, steps=3, spacing=spacing)


@pytest.mark.parametrize("name", ["euler", "euler_a"])
def test_a_picture_begins_at_the_level_of_its_strength(name):
    """Noised there by sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise, the last steps see z + sigma noise."""
    model = LinearGaussian()
    count, alpha_bar = start_level(name, model, 10, 0.5, spacing="karras")
    plan = SAMPLERS[name].plan(alpha_bar_table(model), 10, spacing="karras")
    assert count == 5 and alpha_bar == plan[5].alpha_bar
    z, noise = normals(*SHAPE, count=2)
    x = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
    options = {"steps": 10, "spacing": "karras", "noise": torch.zeros_like}
    first, *_ = sample_steps(name, model, x, MEANS, run_last=5, **options)
    assert first.total == 5 and first.t == pytest.approx(plan[5].t)
    close(x / alpha_bar.sqrt(), z + plan[5].sigma * noise)


# --- names ------------------------------------------------------------------------------------------

NAMED = [  # (what people write, sampler, spacing)
    ("Euler", "euler", None),
    ("k_euler", "euler", None),
    ("EulerDiscreteScheduler", "euler", None),
    ("Euler a", "euler_a", None),
    ("euler_ancestral", "euler_a", None),
    ("k_euler_a", "euler_a", None),
    ("EulerAncestralDiscreteScheduler", "euler_a", None),
    ("Heun", "heun", None),
    ("LMS", "lms", None),
    ("LMS Karras", "lms", "karras"),
    ("DPM2", "dpm2", None),
    ("dpm_2", "dpm2", None),
    ("DPM2 a Karras", "dpm2_a", "karras"),
    ("dpm_2_ancestral", "dpm2_a", None),
    ("KDPM2AncestralDiscreteScheduler", "dpm2_a", None),
    ("DPM++ 2S a", "dpmpp_2s_a", None),
    ("dpmpp_2s_ancestral", "dpmpp_2s_a", None),
    ("DPM++ 2S a Karras", "dpmpp_2s_a", "karras"),
    ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
    ("k_dpmpp_2m", "dpmpp_2m", None),
    ("dpmpp_2m_sgm_uniform", "dpmpp_2m", "sgm_uniform"),
    ("Euler Align Your Steps", "euler", "align_your_steps"),
    ("dpmpp_2m_k", "dpmpp_2m", "karras"),
    ("DDIM", "ddim", None),
    ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
    ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde_heun", "exponential"),
    ("dpmpp_3m_sde_gpu", "dpmpp_3m_sde", None),
    ("DPM++ 3M SDE Karras", "dpmpp_3m_sde", "karras"),
    ("DPM fast", "dpm_fast", None),
    ("DPM adaptive Karras", "dpm_adaptive", "karras"),
    ("Restart", "restart", None),
    ("euler_ancestral_cfg_pp", "euler_a_cfg_pp", None),
    ("Euler CFG++", "euler_cfg_pp", None),
    ("--dpm_solver", "dpm_solver", None),
]


@pytest.mark.parametrize(("said", "sampler", "spacing"), NAMED)
def test_samplers_are_found_with_their_spacing(said, sampler, spacing):
    assert split_sampler(said) == (sampler, spacing)


@pytest.mark.parametrize(
    ("said", "spacing", "message"),
    [
        ("DPM++ 2M Karras", "exponential", "and spacing='exponential' name two spacings; give one"),
        ("DPM++ 2M Karras", [3.0, 0.0], "name two spacings"),
        ("DPM++ 2M Karas", None, "there is none of; did you mean 'dpmpp_2m karras'"),
        ("lms simpel", None, "did you mean 'lms simple'"),
        ("Karras", None, "the sampler must be one of ddim, .*; got 'Karras'"),
        ("DPM++ 9M Karras", None, "got 'DPM\\+\\+ 9M Karras'"),
        ("", None, "got ''"),
        (None, "karras", "got None"),
    ],
)
def test_names_of_no_sampler_or_of_two_spacings_are_refused(said, spacing, message):
    assert split_sampler("DPM++ 2M Karras", "Karras") == ("dpmpp_2m", "karras")
    with pytest.raises(UsageError, match=message):
        split_sampler(said, spacing)


def test_every_sampler_has_a_name_in_a1111s_text_and_its_own_eta():
    assert options.SAMPLER_WORDS.keys() == SAMPLERS.keys()
    for name, word in options.SAMPLER_WORDS.items():
        assert split_sampler(word) == (name, None)
        assert options.OWN_ETA.get(name, 0) == SAMPLERS[name].own_eta
    for name, word in options.SPACING_WORDS.items():
        assert name in SIGMA_TABLES
        said = {"sampler": "euler_a", "spacing": name, "eta": 1.0, "seed": 1, "steps": 3, "prompt": "a"}
        text = metadata.to_infotext(said)
        assert f"Sampler: Euler a, Schedule type: {word}, " in text and "Eta" not in text
        back = metadata.from_infotext(text)
        assert (back["sampler"], back["spacing"]) == ("euler_a", name)
    assert "Eta: 0.0" in metadata.to_infotext({**said, "eta": 0.0})
    theirs = "a\nSteps: 20, Sampler: DPM++ 2M, Schedule type: {}, CFG scale: 7, Seed: 1"
    assert metadata.from_infotext(theirs.format("Uniform"))["spacing"] == "normal"
    assert "spacing" not in metadata.from_infotext(theirs.format("Automatic"))


def test_every_name_is_in_the_docs(request):
    """And the table of samplers is the one that lookups and pictures use, row by row."""
    page = (request.path.parents[2] / "docs" / "samplers.md").read_text()
    for name in (*EXACT_METHODS, *SIGMA_TABLES, "compvis"):
        assert f"`{name}`" in page
    for names in NAMES:
        cls, words = SAMPLERS[names.name], ", ".join(names.others)
        eta = (
            f"{cls.own_eta:g}, 0 to 1" if cls.accepts_eta(0.5) else "fixed" if cls.accepts_eta(1) else "none"
        )
        assert f"| `{cls.name}` | {words} | {names.calls} | `{cls.spacing}` | {eta} |\n" in page


REFUSED = [
    ("euler", {"eta": 1.0}, "eta of euler must be 0: this sampler adds no noise; got 1.0"),
    ("euler_a", {"eta": 1.5}, "eta of euler_a must be from 0 to 1; got 1.5"),
    ("lms", {"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
    ("lms", {"past": []}, "lms has no option past"),
    ("heun", {"order": 2}, "heun has no option order; it has always_draw, dynamic_threshold, quantize_"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_without_meaning_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        sample_steps(name, LinearGaussian(), normals(*SHAPE)[0], MEANS, steps=3, **options)
