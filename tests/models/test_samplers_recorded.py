"""The recorded results of the originals: CompVis's samplers, A1111's, and ControlNet's v-prediction and inversion."""

import json
from itertools import count

import pytest
import torch
from keyed import fill, keyed_input
from linear_gaussian import Scheduled
from mixture import Mixture
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers import sample_steps

SHAPE = (2, 4, 8, 8)
X_T, C, UC = keyed_input("xT", SHAPE), keyed_input("c", (2, 7, 24)), keyed_input("uc", (2, 7, 24))
X0, NOISE = keyed_input("x0", SHAPE), keyed_input("noise", SHAPE)
MASK = (keyed_input("mask", (2, 1, 8, 8)) > 0).float()
MASKED = {"mask": MASK, "x0": X0}


@pytest.fixture(scope="module")
def golden_dir(request):
    return request.path.parents[1] / "golden"


@pytest.fixture(scope="module")
def recorded(golden_dir):
    return load_file(golden_dir / "diffusion.safetensors")


@pytest.fixture(scope="module")
def build(golden_dir):
    config = json.loads((golden_dir / "diffusion.json").read_text())["config"]

    def build(**changes):
        model = LatentDiffusion(**OmegaConf.create({**config, **changes}))
        return fill(model, only=("model.", "first_stage"))

    return build


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.fixture(scope="module")
def control(golden_dir):
    """Results recorded from ControlNet's code, and its UNet's configuration."""
    unet = json.loads((golden_dir / "sd2_and_control.json").read_text())["control"]["unet"]
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return load_file(golden_dir / "sd2_and_control.safetensors"), {"target": target, "params": unet}


def close(got, want, rel=1e-5):
    assert got.shape == want.shape
    atol = rel * (1 + want.abs().max().item())
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


CHAINS = {
    "ddim10": (DDIMSampler, {}),
    "ddim10_g1": (DDIMSampler, {"unconditional_guidance_scale": 1.0}),
    "ddim10_eta05": (DDIMSampler, {"eta": 0.5, "seed": 7}),
    "ddim10_eta1_temp": (DDIMSampler, {"eta": 1.0, "temperature": 0.8, "seed": 7}),
    "ddim10_mask": (DDIMSampler, {**MASKED, "seed": 5}),
    "ddim10_seeded": (DDIMSampler, {"x_T": None, "seed": 123}),
    "ddim50": (DDIMSampler, {"S": 50}),
    "plms1": (PLMSSampler, {"S": 1}),
    "plms10": (PLMSSampler, {}),
    "plms50": (PLMSSampler, {"S": 50}),
    "dpm10": (DPMSolverSampler, {}),
    "dpm20": (DPMSolverSampler, {"S": 20}),
}


LONG = ("ddim50", "plms50", "dpm20")  # of samplers whose chains of 10 steps are quick


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CHAINS]
)
def test_chains_through_compvis_doors(model, recorded, name):
    door, options = CHAINS[name]
    options = {"S": 10, "x_T": X_T, "unconditional_guidance_scale": 3.0, **options}
    torch.manual_seed(options.pop("seed", 0))
    samples, _ = door(model).sample(
        batch_size=2,
        shape=[4, 8, 8],
        conditioning=C,
        verbose=False,
        unconditional_conditioning=UC,
        **options,
    )
    # Wherever seconds allow it, tighter than the 1e-4 that a chain of 50 steps is owed.
    close(samples, recorded["sample." + name], rel=1e-4 if options["S"] == 50 else 2e-5)


@pytest.mark.parametrize("name", ["ddim10", "ddim10_eta05", "ddim10_mask", "plms10", "dpm10"])
def test_the_same_chains_through_the_loop_itself(model, recorded, name):
    door, options = CHAINS[name]
    torch.manual_seed(options.get("seed", 0))
    *_, last = sample_steps(
        {DDIMSampler: "ddim", PLMSSampler: "plms", DPMSolverSampler: "dpm_solver"}[door],
        model,
        X_T,
        C,
        steps=10,
        guidance_scale=3.0,
        unconditional_conditioning=UC,
        **{key: value for key, value in options.items() if key != "seed"},
    )
    close(last.x_t, recorded["sample." + name], rel=2e-5)


@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_put_together_as_compvis_does(model, recorded, steps):
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
    model_fn = model_wrapper(
        lambda x, t, c: model.apply_model(x, t, c),
        schedule,
        model_type="noise",
        guidance_type="classifier-free",
        condition=C,
        unconditional_condition=UC,
        guidance_scale=3.0,
    )
    solver = DPM_Solver(model_fn, schedule, predict_x0=True, thresholding=False)
    options = {"skip_type": "time_uniform", "method": "multistep", "order": 2, "lower_order_final": True}
    samples = solver.sample(X_T, steps=steps, **options)
    close(samples, recorded[f"sample.dpm{steps}"], rel=2e-5)


def test_img2img(model, recorded):
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=20, ddim_eta=0.0, verbose=False)
    noised = sampler.stochastic_encode(X0, torch.tensor([12, 12]), noise=NOISE)
    close(noised, recorded["img2img.enc"])
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": UC}
    close(sampler.decode(noised, C, 12, **guidance), recorded["img2img.dec"], rel=2e-5)


def test_ancestral_sampling_over_all_levels(build, recorded):
    model = build(timesteps=20)  # first: building draws from the generator
    torch.manual_seed(3)
    *_, last = sample_steps("ddpm", model, X_T, C, steps=20)
    close(last.x_t, recorded["ddpm20"], rel=2e-5)


class TimedMixture(Scheduled):
    """The noise in a mixture of Gaussians, as A1111's samplers were recorded on it: sigma log-linear in t."""

    def apply_model(self, x, t, cond):
        self.asked.append(t[0].item())
        bars = self.alphas_cumprod.double()
        logs, low = ((1 - bars) / bars).log() / 2, t[0].double().floor().clamp(max=self.num_timesteps - 2)
        sigma = torch.lerp(logs[low.long()], logs[low.long() + 1], t[0].double() - low).exp()
        scaled = x.double()[..., 0] * (1 + sigma**2).sqrt()
        return ((scaled - Mixture().at_sigma(scaled, sigma)) / sigma)[..., None].to(x.dtype)


A1111_UNIPC = {"order": 3, "solver_type": "bh1", "spacing": "time_uniform"}
A1111 = [  # (recorded run, sampler, steps, options)
    *((f"ddim.{n}", "ddim", n, {"spacing": "compvis"}) for n in (4, 10, 15)),
    *((f"ddim_eta1.{n}", "ddim", n, {"spacing": "compvis", "eta": 1.0}) for n in (4, 10, 15)),
    *((f"plms.{n}", "plms", n, {"spacing": "compvis"}) for n in (4, 10, 15)),
    ("unipc.4", "unipc", 4, A1111_UNIPC),
    ("unipc.10", "unipc", 10, A1111_UNIPC),
    ("unipc.15", "unipc", 16, A1111_UNIPC),  # as many as CompVis's list has for 15
    ("unipc_bh2.10", "unipc", 10, {**A1111_UNIPC, "solver_type": "bh2"}),
    ("unipc_time_quadratic.10", "unipc", 10, {**A1111_UNIPC, "spacing": "time_quadratic"}),
    ("unipc_logSNR.10", "unipc", 10, {**A1111_UNIPC, "spacing": "logSNR"}),
]


def test_a1111s_runs_over_time_steps(golden_dir):
    """Its DDIM and PLMS end a step earlier than CompVis's, at the lowest level that is visited."""
    recorded = load_file(golden_dir / "samplers_a1111.safetensors")
    told = {
        case["name"]: case for case in json.loads((golden_dir / "samplers_a1111.json").read_text())["cases"]
    }
    for run, name, steps, options in A1111:
        model, want = TimedMixture(), recorded[run]
        drawn = (keyed_input(f"noise.{i}", want.shape).to(want.dtype) for i in count())
        x_T = keyed_input("xt", want.shape).to(want.dtype)
        noise = lambda like, drawn=drawn: next(drawn)  # noqa: E731
        done = list(sample_steps(name, model, x_T, None, steps=steps, noise=noise, **options))
        done = done if name == "unipc" else done[:-1]
        error = (done[-1].x_t - want).abs().max() / (1 + want.abs().max())
        # Theirs have the levels of "logSNR" in float32, whose lowest is off by 0.04 of a level.
        assert error < (5e-5 if "logSNR" in run else 5e-6), f"{run}: {error}"
        assert len(done) == told[run]["callbacks"], run
        # bh2 was recorded without its levels, which are unipc.10's.
        times = told[run].get("model_times", told["unipc.10"]["model_times"])
        assert model.asked[: len(times)] == pytest.approx(times, rel=2e-3, abs=0.04), run


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.slow
def test_velocity_with_dicts_of_lists(build, control, separate):
    """Recorded with two separate passes; one batch gives the same but for rounding."""
    recorded, unet = control
    sampler = DDIMSampler(build(unet_config=unet, parameterization="v"), separate_passes=separate)
    torch.manual_seed(0)
    samples, _ = sampler.sample(
        10,
        2,
        (4, 8, 8),
        {"c_crossattn": [keyed_input("v.c", (2, 7, 24))]},
        verbose=False,
        eta=0.0,
        x_T=keyed_input("v.xT", SHAPE),
        unconditional_guidance_scale=3.0,
        unconditional_conditioning={"c_crossattn": [keyed_input("v.uc", (2, 7, 24))]},
    )
    close(samples, recorded["v.ddim10"], rel=2e-5)


def test_inversion(build, control):
    recorded, unet = control
    sampler = DDIMSampler(build(unet_config=unet))
    sampler.make_schedule(20, ddim_eta=0.0, verbose=False)
    x, _ = sampler.encode(keyed_input("inv.x0", SHAPE), keyed_input("v.c", (2, 7, 24)), 15)
    close(x, recorded["invert.encode15"], rel=2e-5)
