"""Models whose last level has no signal (arXiv:2305.08891): every sampler starts there, stays finite and is right."""

import copy

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, Wavy, normals
from tiny import tiny_config

from ldm.errors import UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps
from ldm.process.prediction import to_v
from ldm.process.schedule import LEAST_SIGNAL, NoiseSchedule, named_betas, zero_terminal_snr

SHAPE = (2, 4, 5, 3)
MEAN = 1.5  # far from 0, where an unscaled schedule cannot go


def rescale(model, last=0.0):
    """Give a small model the rescaled schedule."""
    betas = zero_terminal_snr(named_betas("linear", 1000, linear_start=0.00085, linear_end=0.012), last)
    schedule = NoiseSchedule.from_betas(betas, last_is_one=True)
    for name, table in {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bar,
        "alphas_cumprod_prev": schedule.alpha_bar_prev,
    }.items():
        setattr(model, name, torch.from_numpy(table.copy()).float())
    return model


class ZeroSNR(LinearGaussian):
    """LinearGaussian, whose best answer is stated without a division by the signal."""

    def alpha_bar(self, t):
        levels = np.arange(self.num_timesteps)
        table = self.alphas_cumprod.double().numpy()
        logs = np.interp(t.double().numpy(), levels, np.log(np.maximum(table, LEAST_SIGNAL)))
        at = np.where(t.numpy() == levels[-1], table[-1], np.exp(logs))
        return torch.from_numpy(at).reshape(-1, 1, 1, 1)

    def apply_model(self, x, t, cond):
        self.asked.append((tuple(x.shape), t))
        a, x = self.alpha_bar(t), x.double()
        mean = cond.double().reshape(-1, 1, 1, 1)
        x0 = mean + a.sqrt() * self.spread**2 / self.variance(a) * (x - a.sqrt() * mean)
        return x0 if self.parameterization == "x0" else to_v("x0", x0, x, a)


FINAL = {"ddim": None, "plms": None, "dpm_solver": None, "dpmpp_2m": 1.0}  # where a run ends; None = level 0


@pytest.mark.parametrize("kind", ["v", "x0"])
@pytest.mark.parametrize(
    ("name", "atol"), [("ddim", 0.05), ("plms", 5e-3), ("dpm_solver", 0.03), ("dpmpp_2m", 0.03)]
)
def test_every_sampler_follows_the_flow_from_pure_noise(name, atol, kind):
    model = rescale(ZeroSNR(kind))
    x_T = normals(*SHAPE)[0]
    cond = torch.full((2,), MEAN)
    end = model.alphas_cumprod[0].item() if FINAL[name] is None else FINAL[name]
    wanted = model.flow(x_T, MEAN, 0.0, end)
    errors = []
    for steps in (25, 100):
        *_, last = sample_steps(name, model, x_T, cond, steps=steps)
        errors.append((last.x_t - wanted).abs().max().item())
    assert errors[1] < atol and errors[1] < errors[0] / 2.5  # at least first order


def test_ancestral_sampling_has_the_data_s_mean_and_spread():
    model = rescale(ZeroSNR("v"))
    torch.manual_seed(0)
    x_T = torch.randn(2, 4, 50, 50, dtype=torch.float64)
    steps = list(sample_steps("ddpm", model, x_T, torch.full((2,), MEAN), steps=200))
    assert all(torch.isfinite(step.x_t).all() for step in steps)
    assert steps[-1].x_t.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert steps[-1].x_t.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_number_of_steps_begins_at_the_last_level_and_stays_finite(name, steps):
    model = rescale(ZeroSNR("v"))
    x_T = normals(*SHAPE, dtype=torch.float32)[0]
    done = list(sample_steps(name, model, x_T, torch.full((2,), MEAN), steps=steps))
    assert done[0].t == 999 and len(done) == {"dpm_fast": steps // 3 + 1, "dpm_adaptive": len(done)}.get(
        name, steps
    )
    assert all(torch.isfinite(step.x_t).all() and torch.isfinite(step.pred_x0).all() for step in done)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_predicts_eps_keeps_a_little_signal_and_stays_finite(name):
    model = rescale(Wavy("eps"), LEAST_SIGNAL)
    done = list(sample_steps(name, model, normals(*SHAPE, dtype=torch.float32)[0], None, steps=20))
    assert done[0].t == 999 and all(torch.isfinite(step.x_t).all() for step in done)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_beside_diffusers(steps):
    """Trailing levels, every step. At eta 1 theirs is NaN: the root of 0 less a rounding."""
    diffusers = pytest.importorskip("diffusers")
    model = rescale(Wavy("v"))
    x = x_T = normals(*SHAPE, dtype=torch.float32)[0]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(steps)
    done = list(sample_steps("ddim", model, x_T, None, steps=steps))
    assert [int(step.t) for step in done] == scheduler.timesteps.tolist()
    for t, step in zip(scheduler.timesteps, done, strict=True):
        x = scheduler.step(model.raw(x, t.expand(len(x))), t, x).prev_sample
        torch.testing.assert_close(step.x_t, x, rtol=0, atol=2e-5 * (1 + x.abs().max().item()))


@pytest.mark.parametrize("steps", [2, 5, 6, 8, 30])  # at most of these the root is of less than 0
def test_the_first_step_at_eta_one_is_all_fresh_noise(steps):
    """From no signal the posterior forgets x_T: DDPM's draw at the next level."""
    model = rescale(Wavy("v"))
    x_T, noise = normals(*SHAPE, count=2)
    first = next(sample_steps("ddim", model, x_T, None, steps=steps, eta=1.0, noise=lambda _: noise))
    a = model.alphas_cumprod[round(1000 - 1000 / steps) - 1].double()
    wanted = a.sqrt() * first.pred_x0 + (1 - a).sqrt() * noise
    torch.testing.assert_close(first.x_t, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [20, 50])
def test_dpmpp_2m_beside_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    model = rescale(Wavy("v"))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(steps)
    x = x_T = normals(*SHAPE, dtype=torch.float32)[0]
    done = list(sample_steps("dpmpp_2m", model, x_T, None, steps=steps))
    assert [int(step.t) for step in done] == scheduler.timesteps.tolist()
    for t, step in zip(scheduler.timesteps, done, strict=True):
        x = scheduler.step(model.raw(x, t.expand(len(x))), t, x).prev_sample
        torch.testing.assert_close(step.x_t, x, rtol=0, atol=1e-4 * (1 + x.abs().max().item()))


def test_other_spacings_are_visited_where_they_are_asked_for():
    model = rescale(Wavy("v"))
    done = list(
        sample_steps(
            "ddim", model, normals(*SHAPE, dtype=torch.float32)[0], None, steps=20, spacing="uniform"
        )
    )
    assert done[0].t == 951
    plain = list(sample_steps("ddim", Wavy("v"), normals(*SHAPE, dtype=torch.float32)[0], None, steps=20))
    assert plain[0].t == 951  # a schedule with signal at its end keeps CompVis's levels


# --- the model and CompVis's doors ------------------------------------------------------------------------------------


def build(kind, **params):
    config = copy.deepcopy(tiny_config()["model"]["params"])
    return LatentDiffusion(**config, parameterization=kind, rescale_betas_zero_snr=True, **params).eval()


@pytest.fixture(scope="module")
def model():
    return build("v")


def test_the_model_s_tables_are_those_of_the_rescaled_schedule(model):
    wanted = rescale(Wavy("v"))
    assert torch.equal(model.alphas_cumprod, wanted.alphas_cumprod) and model.alphas_cumprod[-1] == 0
    infinite = {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}
    for name, table in model.named_buffers(recurse=False):
        assert not table.isnan().any() and (name in infinite or torch.isfinite(table).all()), name


def test_the_model_s_own_chain_and_losses_are_finite(model):
    torch.manual_seed(0)
    c = torch.randn(2, 32, 128)
    x = torch.randn(2, 4, 8, 8)
    top = torch.full((2,), 999)
    loss, _ = model.p_losses(x, c, top)
    assert torch.isfinite(loss)
    assert torch.equal(model.q_sample(x, top, noise=x * 0 + 3), x * 0 + 3)  # nothing of x is left
    with torch.no_grad():
        assert torch.isfinite(model.p_sample(x, c, top)).all()


def test_a_network_that_predicts_eps_keeps_a_2_to_the_24th():
    model = build("eps")
    assert model.alphas_cumprod[-1] == 2**-24
    assert all(torch.isfinite(table).all() for table in model.buffers())


@pytest.mark.parametrize("door", [DDIMSampler, PLMSSampler])
def test_compvis_s_doors_take_trailing_and_warn_of_uniform(model, door, caplog):
    options = {"batch_size": 2, "shape": (4, 8, 8), "conditioning": torch.randn(2, 32, 128)}
    torch.manual_seed(0)
    x_T = torch.randn(2, 4, 8, 8)
    samples, _ = door(model).sample(4, **options, x_T=x_T, ddim_discretize="trailing")
    assert "no signal" not in caplog.text
    name = "ddim" if door is DDIMSampler else "plms"
    *_, last = sample_steps(name, model, x_T, options["conditioning"], steps=4)
    torch.testing.assert_close(samples, last.x_t, rtol=0, atol=1e-5)
    door(model).sample(4, **options, x_T=x_T)
    assert "'uniform' begins at 751; take ddim_discretize='trailing'" in caplog.text


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_true_or_false(value):
    params = copy.deepcopy(tiny_config()["model"]["params"])
    with pytest.raises(UsageError, match="rescale_betas_zero_snr should be true or false"):
        LatentDiffusion(**params, rescale_betas_zero_snr=value)
