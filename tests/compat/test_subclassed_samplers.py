"""Subclasses that override a sampler's methods by the published signatures are called as the originals call them."""

import inspect

import numpy as np
import pytest
import torch
from keyed import keyed_input
from tiny_diffusion import latent_model
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_util import append_dims, norm_thresholding, spatial_norm_thresholding
from ldm.modules.diffusionmodules.util import extract_into_tensor, noise_like

SHAPE = (2, 4, 8, 8)
X, C, UC = keyed_input("v.xT", SHAPE), keyed_input("v.c", (2, 7, 24)), keyed_input("v.uc", (2, 7, 24))
GUIDED = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": UC}


@pytest.fixture(scope="module")
def model():
    return latent_model()


class OwnLoop(DDIMSampler):
    """The whole of DDIM as a subclass, in the originals' signatures and none but their arguments."""

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        self.seen = ["make_schedule"]
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def register_buffer(self, name, attr):
        setattr(self, name, attr.to(torch.float32) if type(attr) is torch.Tensor else attr)

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond,
        shape,
        x_T=None,
        ddim_use_original_steps=False,
        callback=None,
        timesteps=None,
        quantize_denoised=False,
        mask=None,
        x0=None,
        img_callback=None,
        log_every_t=100,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
    ):
        self.seen.append("ddim_sampling")
        assert timesteps is None and not ddim_use_original_steps
        device = self.model.betas.device
        img = torch.randn(shape, device=device) if x_T is None else x_T
        kept = {"x_inter": [img], "pred_x0": [img]}
        total = self.ddim_timesteps.shape[0]
        for i, step in enumerate(np.flip(self.ddim_timesteps)):
            index = total - i - 1
            ts = torch.full((shape[0],), step, device=device, dtype=torch.long)
            if mask is not None:
                img = self.model.q_sample(x0, ts) * mask + (1.0 - mask) * img
            img, pred_x0 = self.p_sample_ddim(
                img,
                cond,
                ts,
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
        return img, kept

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x,
        c,
        t,
        index,
        repeat_noise=False,
        use_original_steps=False,
        quantize_denoised=False,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
    ):
        self.seen.append(f"p_sample_ddim {index}")
        b, device = x.shape[0], x.device
        both = torch.cat([unconditional_conditioning, c])
        uncond, cond = self.model.apply_model(torch.cat([x] * 2), torch.cat([t] * 2), both).chunk(2)
        e_t = uncond + unconditional_guidance_scale * (cond - uncond)
        a_t = torch.full((b, 1, 1, 1), self.ddim_alphas[index], device=device)
        a_prev = torch.full((b, 1, 1, 1), self.ddim_alphas_prev[index], device=device)
        sigma_t = torch.full((b, 1, 1, 1), self.ddim_sigmas[index], device=device)
        sqrt_one_minus_at = torch.full((b, 1, 1, 1), self.ddim_sqrt_one_minus_alphas[index], device=device)
        pred_x0 = (x - sqrt_one_minus_at * e_t) / a_t.sqrt()
        noise = sigma_t * noise_like(x.shape, device, repeat_noise) * temperature
        return a_prev.sqrt() * pred_x0 + (1.0 - a_prev - sigma_t**2).sqrt() * e_t + noise, pred_x0

    @torch.no_grad()
    def stochastic_encode(self, x0, t, use_original_steps=False, noise=None):
        a, s = torch.sqrt(self.ddim_alphas), self.ddim_sqrt_one_minus_alphas
        return extract_into_tensor(a, t, x0.shape) * x0 + extract_into_tensor(s, t, x0.shape) * noise


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_sampler_written_anew_on_ours_has_our_numbers(model, eta):
    """Its own loop, step and tables' use; only sample, the tables and decode are inherited."""
    answers = []
    for cls in (DDIMSampler, OwnLoop):
        torch.manual_seed(3)
        sampler = cls(model, schedule="linear")
        calls = []
        out = sampler.sample(
            4,
            2,
            SHAPE[1:],
            C,
            eta=eta,
            x_T=X,
            verbose=False,
            callback=calls.append,
            img_callback=lambda pred_x0, i, calls=calls: calls.append((i, pred_x0.shape)),
            mask=torch.ones(2, 1, 8, 8).tril(),
            x0=X.flip(0),
            **GUIDED,
        )[0]
        noised = sampler.stochastic_encode(X, torch.tensor([2, 2]), noise=X.flip(1))
        decoded = sampler.decode(noised, C, 2, **GUIDED)
        answers.append((out, noised, decoded, calls))
    seen = ["make_schedule", "ddim_sampling", *(f"p_sample_ddim {i}" for i in (3, 2, 1, 0, 1, 0))]
    assert sampler.seen == seen
    for ours, theirs in zip(answers[0][:3], answers[1][:3], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
    assert answers[0][3] == answers[1][3] and len(answers[0][3]) == 8


class OwnPLMS(PLMSSampler):
    """PLMS with the originals' signatures; what it is given goes on as it came."""

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        self.seen = [(ddim_num_steps, ddim_eta, verbose)]
        super().make_schedule(
            ddim_num_steps, ddim_discretize=ddim_discretize, ddim_eta=ddim_eta, verbose=verbose
        )

    def plms_sampling(
        self,
        cond,
        shape,
        x_T=None,
        ddim_use_original_steps=False,
        callback=None,
        timesteps=None,
        quantize_denoised=False,
        mask=None,
        x0=None,
        img_callback=None,
        log_every_t=100,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
    ):
        self.seen.append(tuple(shape))
        return super().plms_sampling(
            cond,
            shape,
            x_T,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )

    def p_sample_plms(
        self,
        x,
        c,
        t,
        index,
        repeat_noise=False,
        use_original_steps=False,
        quantize_denoised=False,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        old_eps=None,
        t_next=None,
    ):
        self.seen.append((index, len(old_eps), t.tolist(), t_next.tolist()))
        return super().p_sample_plms(
            x,
            c,
            t,
            index,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            old_eps=old_eps,
            t_next=t_next,
        )


def test_plms_calls_its_overrides(model):
    sampler = OwnPLMS(model)
    got = sampler.sample(S=5, batch_size=2, shape=SHAPE[1:], conditioning=C, verbose=False, x_T=X, **GUIDED)
    want = PLMSSampler(model).sample(
        S=5, batch_size=2, shape=SHAPE[1:], conditioning=C, verbose=False, x_T=X, **GUIDED
    )
    assert torch.equal(got[0], want[0])
    steps = [(4, 0, 801, 601), (3, 1, 601, 401), (2, 2, 401, 201), (1, 3, 201, 1), (0, 3, 1, 1)]
    assert sampler.seen == [
        (5, 0.0, False),
        SHAPE,
        *((i, n, [t, t], [to, to]) for i, n, t, to in steps),
    ]


class OwnSample(DDIMSampler):
    """Signatures of the second generation (Stable Diffusion 2), with what it added set."""

    def __init__(self, model, schedule="linear", device=torch.device("cpu"), **kwargs):  # noqa: B008
        super().__init__(model, schedule, device=device, **kwargs)
        self.seen = {}

    def sample(self, S, batch_size, shape, conditioning=None, callback=None, *args, eta=0.0, **kwargs):
        self.seen["sample"] = sorted(kwargs)
        return super().sample(S, batch_size, shape, conditioning, callback, *args, eta=eta, **kwargs)

    def ddim_sampling(self, cond, shape, *args, dynamic_threshold=None, ucg_schedule=None, **kwargs):
        self.seen["ddim_sampling"] = (dynamic_threshold, ucg_schedule, sorted(kwargs))
        return super().ddim_sampling(
            cond, shape, *args, dynamic_threshold=dynamic_threshold, ucg_schedule=ucg_schedule, **kwargs
        )


PUBLISHED = sorted(
    """callback corrector_kwargs ddim_use_original_steps img_callback log_every_t mask noise_dropout quantize_denoised
    score_corrector temperature unconditional_conditioning unconditional_guidance_scale x0 x_T""".split()
)


@pytest.mark.parametrize(
    ("given", "comes"),
    [
        ({}, (None, None)),
        ({"ucg_schedule": [3.0, 2.0, 1.0]}, (None, [3.0, 2.0, 1.0])),
        ({"dynamic_threshold": 0.5}, (0.5, None)),
    ],
)
def test_later_arguments_are_handed_on_only_where_they_are_set(model, given, comes):
    sampler = OwnSample(model)
    out = sampler.sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED, **given)[0]
    threshold, schedule, names = sampler.seen["ddim_sampling"]
    assert (threshold, schedule) == comes and names == PUBLISHED
    plain = DDIMSampler(model).sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED)[0]
    assert torch.equal(out, plain) == (not given)


@pytest.mark.parametrize("cls", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_threshold_bounds_the_predicted_samples(model, cls):
    """Root mean square at most 0.5 where it would be about 1; the published second-generation order of arguments."""
    seen = []
    cls(model).sample(
        4, 2, SHAPE[1:], C, x_T=X, img_callback=lambda x0, i: seen.append(x0), dynamic_threshold=0.5
    )
    sizes = torch.stack(seen).square().mean(dim=(2, 3, 4)).sqrt()
    assert sizes.shape == (4, 2) and (sizes <= 0.5 + 1e-5).all() and (sizes > 0.4).any()


def test_the_order_of_the_second_generations_arguments():
    names = list(inspect.signature(DDIMSampler.sample).parameters)
    at = names.index("unconditional_conditioning")
    assert names[at + 1 : at + 3] == ["dynamic_threshold", "ucg_schedule"]
    assert list(inspect.signature(DDIMSampler.p_sample_ddim).parameters)[-1] == "dynamic_threshold"


class Bare(DDIMSampler):
    """A subclass that makes its attributes itself, as some do."""

    def __init__(self, model):
        self.model, self.ddpm_num_timesteps, self.schedule = model, model.num_timesteps, "linear"


def test_a_subclass_without_our_constructor_samples(model):
    got = Bare(model).sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED)[0]
    assert torch.equal(got, DDIMSampler(model).sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED)[0])


class OwnSolver(DPMSolverSampler):
    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        self.register_buffer("twice", 2 * model.alphas_cumprod)

    def sample(self, S, batch_size, shape, conditioning=None, **kwargs):
        self.seen = sorted(kwargs)
        return super().sample(S, batch_size, shape, conditioning, **kwargs)


def test_the_solvers_door_keeps_tables_and_takes_a_device(model):
    sampler = OwnSolver(model, device=torch.device("cpu"))
    assert torch.equal(sampler.alphas_cumprod, model.alphas_cumprod)
    assert torch.equal(sampler.twice, 2 * sampler.alphas_cumprod)
    got = sampler.sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED)[0]
    assert torch.equal(got, DPMSolverSampler(model).sample(3, 2, SHAPE[1:], C, x_T=X, **GUIDED)[0])
    assert sampler.seen == sorted([*GUIDED, "x_T"])


def test_thresholds_by_hand():
    x = torch.tensor([[[[3.0]], [[4.0]]], [[[0.3]], [[0.4]]]])  # (2, 2, 1, 1)
    rms = (12.5**0.5, 0.125**0.5)
    want = torch.stack([x[0] / rms[0], x[1]])
    torch.testing.assert_close(norm_thresholding(x, 1.0), want)
    torch.testing.assert_close(spatial_norm_thresholding(x, 1.0), want)
    wide = torch.cat([x, x / 5], dim=3)  # cells of their own: only those of the first are above
    got = spatial_norm_thresholding(wide, 2.0)
    torch.testing.assert_close(got[0, :, 0, 0], 2 * x[0, :, 0, 0] / rms[0])
    assert torch.equal(got[0, :, 0, 1], wide[0, :, 0, 1]) and torch.equal(got[1], wide[1])
    assert append_dims(Tensor([1, 2]), 3).shape == (2, 1, 1)
    with pytest.raises(UsageError, match="has 4 dimensions"):
        append_dims(x, 3)
    with pytest.raises(UsageError, match="above 0, got 0"):
        norm_thresholding(x, 0)
