"""Models of ours behind OpenAI's interface: the same chains as our own samplers, and bounds in the right unit."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion as tiny
import torch
from linear_gaussian import LinearGaussian, normals

from ldm.errors import MismatchError, UsageError
from ldm.guided_diffusion.gaussian_bridge import GuidedNetwork, as_gaussian_diffusion
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (2, 4, 8, 8)
X_T, X0 = (x.float() for x in normals(*SHAPE, count=2, seed=1))
C, UC = (x.float() for x in normals(2, 7, 24, count=2, seed=2))


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(kind="eps", **changes):
        key = kind, *sorted(changes)
        if key not in made:
            made[key] = tiny.latent_model(parameterization=kind, **changes)
        return made[key]

    return get


def same(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol * (1 + want.abs().max().item()))


def respaced(diffusion, levels):
    return type(diffusion)(
        levels,
        betas=diffusion.betas,
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        decoder_nll=diffusion.decoder_nll,
    )


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.thinned(3)
def test_ddim_is_our_ddim_sampler_s_at_the_same_levels(models, kind, separate):
    """CompVis's run ends at level 0, where one more step of OpenAI's leads to the clean end."""
    model = models(kind)
    sampler = DDIMSampler(model, separate_passes=separate)
    guided = {"unconditional_conditioning": UC}
    want, _ = sampler.sample(5, 2, SHAPE[1:], C, x_T=X_T, unconditional_guidance_scale=3.0, **guided)
    network, diffusion = as_gaussian_diffusion(
        model, C, guidance_scale=3.0, separate_passes=separate, timestep_respacing="", **guided
    )
    levels = [0, *sampler.ddim_timesteps.tolist()]
    assert levels == [0, 1, 201, 401, 601, 801]
    diffusion = respaced(diffusion, levels)
    steps = list(diffusion.ddim_sample_loop_progressive(network, SHAPE, noise=X_T))
    assert len(steps) == 6
    same(steps[4]["sample"], want)
    same(steps[5]["sample"], steps[5]["pred_xstart"])


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_our_ddim_sampler_s(models, eta):
    model = models()
    sampler = DDIMSampler(model)
    torch.manual_seed(4)
    want, _ = sampler.sample(5, 2, SHAPE[1:], C, x_T=X_T, eta=eta)
    network, diffusion = as_gaussian_diffusion(model, C, timestep_respacing=[1000])
    x = X_T
    torch.manual_seed(4)
    spaced = respaced(diffusion, [0, *sampler.ddim_timesteps.tolist()])
    for level in range(5, 0, -1):
        x = spaced.ddim_sample(network, x, torch.full((2,), level), eta=eta)["sample"]
    same(x, want)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.thinned(3)
def test_ddpm_is_our_ancestral_sampling(models, kind):
    model = models(kind, timesteps=7)
    torch.manual_seed(3)
    want = model.p_sample_loop(C, SHAPE, x_T=X_T, verbose=False)
    network, diffusion = as_gaussian_diffusion(model, C)
    torch.manual_seed(3)
    # A chain multiplies the rounding of CompVis's float32 tables.
    same(diffusion.p_sample_loop(network, SHAPE, noise=X_T), want, atol=1e-4)


def test_a_pixel_model_is_clipped_and_has_bins():
    model = tiny.pixel_model(timesteps=7).eval()
    network, diffusion = as_gaussian_diffusion(model)
    assert diffusion.decoder_nll == "discretized"
    torch.manual_seed(3)
    want = model.p_sample_loop((2, 3, 8, 8))
    torch.manual_seed(3)
    got = diffusion.p_sample_loop(network, (2, 3, 8, 8))
    same(got, want)
    assert got.abs().max() <= 1
    x = (normals(2, 3, 8, 8)[0].clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    assert (diffusion.calc_bpd_loop(network, x.float())["vb"] >= 0).all()


def test_losses_are_our_own(models):
    for kind in ("eps", "x0", "v"):
        model = models(kind)
        network, diffusion = as_gaussian_diffusion(model, C)
        t = torch.tensor([10, 900])
        with torch.no_grad():
            got = diffusion.training_losses(network, X0, t, noise=X_T)["loss"]
            _, log = model.p_losses(X0, C, t, noise=X_T)
        split = "train" if model.training else "val"
        same(got.mean(), log[f"{split}/loss_simple"])


def test_respaced_chains_and_bounds_of_latents(models):
    model = models()
    network, diffusion = as_gaussian_diffusion(
        model, C, timestep_respacing="5,3", model_var_type=ModelVarType.FIXED_LARGE
    )
    assert diffusion.num_timesteps == 8 and diffusion.original_num_steps == 1000
    assert diffusion.timestep_map[4:6] == [499, 500]
    assert diffusion.decoder_nll == "gaussian"
    out = diffusion.p_sample_loop(network, SHAPE, noise=5 * X_T)
    assert out.isfinite().all() and out.abs().max() > 1  # latents are not clipped
    bound = diffusion.calc_bpd_loop(network, X0)
    assert bound["vb"].shape == (2, 8)
    same(bound["total_bpd"], bound["prior_bpd"] + bound["vb"].sum(dim=1), atol=1e-6)
    # The prior is what latent diffusion itself reports, over the whole chain's end.
    same(bound["prior_bpd"], model._prior_bpd(X0))


def test_ddim_reverse_encodes_and_ddim_decodes_latents(models):
    network, diffusion = as_gaussian_diffusion(models(), C, timestep_respacing=[9, 0, 0, 0, 0])
    assert diffusion.timestep_map[-1] == 199
    x = X0
    for level in range(8):
        x = diffusion.ddim_reverse_sample(network, x, torch.full((2,), level))["sample"]
    moved = (x - X0).abs().max()
    for level in range(8, 0, -1):
        x = diffusion.ddim_sample(network, x, torch.full((2,), level))["sample"]
    assert moved > 0.2
    assert (x - X0).abs().max() < 0.1 * moved


def test_the_bound_in_latents_is_close_above_the_true_density():
    model = LinearGaussian(num_timesteps=1000)
    mean = torch.tensor([0.3, -0.7])
    network, diffusion = as_gaussian_diffusion(
        model, mean, timestep_respacing="40", decoder_nll="gaussian", model_var_type=ModelVarType.FIXED_LARGE
    )
    unit = normals(2, 3, 64, 64)[0]
    x = mean.double().reshape(-1, 1, 1, 1) + 0.5 * unit
    torch.manual_seed(0)
    total = diffusion.calc_bpd_loop(network, x)["total_bpd"]
    nll = (0.5 * math.log(2 * math.pi * 0.25) + 0.5 * unit.square().mean(dim=(1, 2, 3))) / math.log(2)
    assert (total > nll - 0.03).all() and (total < nll + 0.1).all()  # a hundredth is left to chance
    # Samples two standard deviations off are as unlikely as they should be, roughly: FIXED_LARGE spreads a bit.
    torch.manual_seed(0)
    off = diffusion.calc_bpd_loop(network, x + 1.0)["total_bpd"]
    rise = ((unit + 2).square() - unit.square()).mean(dim=(1, 2, 3)) / 2 / math.log(2)
    torch.testing.assert_close(off - total, rise, rtol=0.1, atol=0)


def test_learned_ranges_come_from_the_conditional_answer(models):
    model = models(unet_config=tiny.network(out_channels=8))
    plain, diffusion = as_gaussian_diffusion(model, C, model_var_type=ModelVarType.LEARNED_RANGE)
    guided = GuidedNetwork(model, C, unconditional_conditioning=UC, guidance_scale=4.0)
    uncond = GuidedNetwork(model, UC)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        answer, c, u = guided(X_T, t), plain(X_T, t), uncond(X_T, t)
    assert answer.shape == (2, 8, 8, 8)
    same(answer[:, :4], u[:, :4] + 4 * (c - u)[:, :4])
    same(answer[:, 4:], c[:, 4:])
    assert (answer[:, 4:] - u[:, 4:]).abs().max() > 1e-3
    with torch.no_grad():
        out = diffusion.p_mean_variance(plain, X_T, t)
    share = (c[:, 4:] + 1) / 2
    least, most = (
        torch.from_numpy(table)[t].float().reshape(-1, 1, 1, 1)
        for table in (diffusion.posterior_log_variance_clipped, np.log(diffusion.betas))
    )
    same(out["log_variance"], share * most + (1 - share) * least)
    loss = as_gaussian_diffusion(
        model, C, model_var_type=ModelVarType.LEARNED_RANGE, loss_type=LossType.RESCALED_MSE
    )[1].training_losses(plain, X0, t)
    assert loss.keys() == {"loss", "mse", "vb"}
    assert diffusion.p_sample(plain, X_T, t)["sample"].shape == SHAPE


def test_tables_are_the_model_s(models):
    model = models()
    for kind, want in (
        ("eps", ModelMeanType.EPSILON),
        ("x0", ModelMeanType.START_X),
        ("v", ModelMeanType.VELOCITY),
    ):
        assert as_gaussian_diffusion(models(kind), C)[1].model_mean_type == want
    diffusion = as_gaussian_diffusion(model, C)[1]
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "posterior_variance",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        got = torch.from_numpy(getattr(diffusion, name))
        torch.testing.assert_close(got, getattr(model, name).double(), rtol=1e-6, atol=1e-9, msg=name)


def test_a_dict_of_conditions_and_a_scale_of_1():
    """Guidance of 1 asks once, with the condition as it is; beyond it, both at once."""
    model = LinearGaussian(num_timesteps=13)
    mean, x = torch.tensor([0.3, -0.7]), normals(2, 3, 5, 4)[0]
    t = torch.tensor([1, 9])
    once = GuidedNetwork(
        model, {"c_crossattn": [mean]}, unconditional_conditioning={"c_crossattn": [0 * mean]}
    )
    once(x, t)
    twice = GuidedNetwork(
        model,
        {"c_crossattn": [mean]},
        unconditional_conditioning={"c_crossattn": [0 * mean]},
        guidance_scale=2.0,
    )
    got = twice(x, t)
    assert [shape[0] for shape, _ in model.asked] == [2, 4]
    # The network is linear in its condition, so twice the guidance is twice the mean.
    torch.testing.assert_close(got, model.apply_model(x, t, 2 * mean), rtol=0, atol=1e-6)
    assert once.device == torch.device("cpu")


def test_what_cannot_be_bridged_is_refused(models):
    model = models()
    with pytest.raises(
        UsageError, match=r"guidance_scale 3\.0 needs an unconditional_conditioning, got none"
    ):
        as_gaussian_diffusion(model, C, guidance_scale=3.0)
    with pytest.raises(UsageError, match="guidance_scale must be a finite number, got nan"):
        as_gaussian_diffusion(model, C, unconditional_conditioning=UC, guidance_scale=math.nan)
    with pytest.raises(UsageError, match="DDPM takes no conditions, got some"):
        as_gaussian_diffusion(tiny.pixel_model(), C)
    with pytest.raises(UsageError, match="section 1 of 1 has 1000 of 1000 levels, .*; got 1001"):
        as_gaussian_diffusion(model, C, timestep_respacing="1001")
    network, diffusion = as_gaussian_diffusion(model, C, model_var_type=ModelVarType.LEARNED_RANGE)
    with pytest.raises(MismatchError, match=r"2 for each of x: \(2, 8, 8, 8\); got \(2, 4, 8, 8\)"):
        diffusion.p_sample(network, X_T, torch.tensor([10, 900]))


def test_tables_that_contradict_each_other_are_refused():
    model = tiny.pixel_model()
    model.alphas_cumprod.mul_(0.98)
    with pytest.raises(
        MismatchError, match=r"\(20,\) and \(20,\), apart by 0\.02, at most 0\.001 is rounding"
    ):
        as_gaussian_diffusion(model)
    model.alphas_cumprod = model.alphas_cumprod[:7]
    with pytest.raises(MismatchError, match=r"\(20,\) and \(7,\), apart by inf"):
        as_gaussian_diffusion(model)


@pytest.mark.parametrize("route", ["adm", "crossattn-adm"])
def test_labels_that_the_network_has_not_are_refused(route):
    network = tiny.network(num_classes=7)
    if route == "adm":
        network["params"].update(use_spatial_transformer=False, context_dim=None)
    model = tiny.latent_model(unet_config=network, conditioning_key=route)

    def condition(*labels):
        labels = torch.tensor(labels)
        return labels if route == "adm" else {"c_crossattn": [C], "c_adm": labels}

    for bad in (condition(3, 7), condition(3, -1)):
        with pytest.raises(UsageError, match=r"labels must be from 0 to 6, got \[3, (7|-1)\]"):
            as_gaussian_diffusion(model, bad)
        with pytest.raises(UsageError, match="labels must be from 0 to 6"):
            as_gaussian_diffusion(model, condition(3, 6), unconditional_conditioning=bad, guidance_scale=2.0)
    network, diffusion = as_gaussian_diffusion(model, condition(3, 6), timestep_respacing="3")
    assert diffusion.ddim_sample_loop(network, SHAPE, noise=X_T).isfinite().all()


TEXT = (ROOT / "docs" / "gaussian.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_page_has_only_blocks_that_are_run_here():
    assert {language for language, _ in BLOCKS} == {"python"} and len(BLOCKS) >= 3


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=range(len(BLOCKS)))
@pytest.mark.slow
def test_blocks_of_the_page_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(code, "docs/gaussian.md", "exec"), names)
    checked = [name for name in names if name.startswith("bits")]
    for name in checked:
        assert torch.as_tensor(names[name]).isfinite().all(), name
