"""CompVis's doors: their keywords, tables, callbacks and quirks, and what was broken there."""

import math

import numpy as np
import pytest
import torch
from linear_gaussian import Line, LinearGaussian, Wavy, mix, normals

from ldm.errors import UsageError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers import sample_steps

SHAPE = (2, 4, 5, 3)
DOORS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
MEANS = torch.tensor([0.8, -0.3])


def close(got, want, atol=0.0):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def scheduled(model, steps, door=DDIMSampler, **options):
    sampler = door(model)
    sampler.make_schedule(steps, **options)
    return sampler


def start():
    return normals(*SHAPE, dtype=torch.float32)[0]


# --- schedules


@pytest.mark.parametrize("door", [DDIMSampler, PLMSSampler])
@pytest.mark.thinned(2)
def test_every_number_of_steps_is_given_exactly(door):
    sampler = door(Wavy())
    for steps in range(1, 1001):
        sampler.make_schedule(steps, verbose=False)
        levels = sampler.ddim_timesteps
        assert len(levels) == len(sampler.ddim_alphas) == len(sampler.ddim_sigmas) == steps
        assert levels[0] >= 0 and levels[-1] <= 999 and (np.diff(levels) > 0).all()


def test_both_ends_of_the_range_run():
    for steps in (1, 1000):
        x, _ = DDIMSampler(LinearGaussian()).sample(steps, 2, SHAPE[1:], MEANS, x_T=start())
        assert x.isfinite().all()


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_tables_are_the_recorded_ones(golden, steps):
    from safetensors.torch import load_file

    recorded = load_file(golden / "modules.safetensors")
    for discretize, method in [("uniform", "uniform"), ("compvis", "uniform"), ("quad", "quad")]:
        sampler = scheduled(Wavy(), steps, ddim_discretize=discretize, ddim_eta=0.7)
        key = f"ddim.{method}.{steps}."
        assert sampler.ddim_timesteps.tolist() == recorded[key + "t"].tolist()
        close(sampler.ddim_alphas.double(), recorded[key + "a"].double(), atol=1e-6)
        close(torch.from_numpy(sampler.ddim_alphas_prev), recorded[key + "ap"].double(), atol=1e-6)
        close(sampler.ddim_sigmas.double(), recorded[key + "sigma"].double(), atol=1e-6)


def test_the_historic_list_keeps_its_length_and_is_refused_where_it_failed():
    assert len(scheduled(Wavy(), 30, ddim_discretize="compvis").ddim_timesteps) == 31
    for steps in (3, 300, 1000):
        with pytest.raises(UsageError, match="wants level 1000 of a model whose highest is 999"):
            scheduled(Wavy(), steps, ddim_discretize="compvis")


def test_tables_follow_the_models_device_in_single_precision():
    sampler = DDIMSampler(Wavy().to("meta"))
    sampler.register_buffer("table", torch.arange(3, dtype=torch.float64))
    sampler.register_buffer("whole", torch.arange(3))
    sampler.register_buffer("array", np.arange(3))
    assert sampler.table.device.type == "meta" and sampler.table.dtype == torch.float32
    assert sampler.whole.dtype == torch.int64 and isinstance(sampler.array, np.ndarray)


def test_tables_have_the_originals_names():
    model = Wavy()
    sampler = scheduled(model, 5, ddim_eta=1.0)
    a = model.alphas_cumprod
    close(sampler.sqrt_alphas_cumprod, a.sqrt())
    close(sampler.sqrt_one_minus_alphas_cumprod, (1 - a).sqrt())
    close(sampler.log_one_minus_alphas_cumprod, (1 - a).log())
    close(sampler.sqrt_recip_alphas_cumprod, (1 / a).sqrt())
    close(sampler.sqrt_recipm1_alphas_cumprod, (1 / a - 1).sqrt())
    close(sampler.ddim_sqrt_one_minus_alphas, (1 - a[sampler.ddim_timesteps]).sqrt())
    close(sampler.alphas_cumprod_prev, model.alphas_cumprod_prev)
    sigmas = sampler.ddim_sigmas_for_original_num_steps
    assert sigmas.shape == (1000,) and sigmas[0] == 0
    beta = model.betas.double()
    want = beta[500] * (1 - a[499].double()) / (1 - a[500].double())
    close(sigmas[500].double() ** 2, want, atol=1e-7)


# --- sampling


@pytest.mark.parametrize("name", DOORS)
def test_doors_give_the_loops_numbers(name):
    model, x_T = LinearGaussian(), start()
    options = {"eta": 0.6} if name == "ddim" else {}
    mask, x0 = torch.zeros(2, 1, 5, 3), normals(*SHAPE, seed=3, dtype=torch.float32)[0]
    mask[..., 1:] = 1
    torch.manual_seed(1)
    x, _ = DOORS[name](model).sample(
        6,
        2,
        SHAPE[1:],
        MEANS,
        x_T=x_T,
        mask=mask,
        x0=x0,
        unconditional_guidance_scale=2.0,
        unconditional_conditioning=-MEANS,
        **options,
    )
    torch.manual_seed(1)
    *_, last = sample_steps(
        name,
        model,
        x_T,
        MEANS,
        steps=6,
        mask=mask,
        x0=x0,
        guidance_scale=2.0,
        unconditional_conditioning=-MEANS,
        **options,
    )
    close(x, last.x_t, atol=1e-5)


@pytest.mark.parametrize("name", DOORS)
def test_callbacks_count_up_and_come_in_pairs(name):
    calls = []
    x, intermediates = DOORS[name](LinearGaussian()).sample(
        4,
        2,
        SHAPE[1:],
        MEANS,
        x_T=start(),
        callback=lambda i: calls.append(("callback", i)),
        img_callback=lambda pred_x0, i: calls.append(("img", i, tuple(pred_x0.shape))),
        log_every_t=1,
    )
    assert calls == [call for i in range(4) for call in (("callback", i), ("img", i, SHAPE))]
    close(intermediates["x_inter"][-1], x)


def test_intermediates_are_the_start_the_first_step_and_every_nth_from_the_end():
    model, x_T, seen = LinearGaussian(), start(), []
    options = {"x_T": x_T, "img_callback": lambda pred_x0, i: seen.append(pred_x0)}
    x, kept = DDIMSampler(model).sample(10, 2, SHAPE[1:], MEANS, log_every_t=4, **options)
    assert set(kept) == {"x_inter", "pred_x0"}
    close(kept["x_inter"][0], x_T)
    close(kept["pred_x0"][0], x_T)
    # Steps 0..9 have 9..0 to go: the first, then those with 8, 4 and 0.
    assert len(kept["x_inter"]) == 5
    for got, i in zip(kept["pred_x0"][1:], [0, 1, 5, 9], strict=True):
        close(got, seen[i])
    close(kept["x_inter"][-1], x)


@pytest.mark.parametrize("name", DOORS)
def test_without_a_start_noise_is_drawn_first(name):
    model = LinearGaussian()
    torch.manual_seed(8)
    drawn, _ = DOORS[name](model).sample(3, 2, SHAPE[1:], MEANS)
    torch.manual_seed(8)
    given, _ = DOORS[name](model).sample(3, 2, SHAPE[1:], MEANS, x_T=torch.randn(SHAPE))
    close(drawn, given)


def test_noise_is_drawn_at_eta_zero_for_the_sake_of_later_draws():
    torch.manual_seed(8)
    DDIMSampler(LinearGaussian()).sample(3, 2, SHAPE[1:], MEANS, x_T=start())
    after = torch.randn(1)
    torch.manual_seed(8)
    for _ in range(3):
        torch.randn(SHAPE)
    close(after, torch.randn(1))


def test_a_subset_of_the_tables_is_one_level_short_as_in_the_original():
    model = LinearGaussian()
    sampler = scheduled(model, 10)
    for timesteps, told in [(5, [301, 201, 101, 1]), (1, []), (99, list(range(801, 0, -100)))]:
        model.asked.clear()
        x, _ = sampler.ddim_sampling(MEANS, SHAPE, x_T=start(), timesteps=timesteps)
        assert [t[0].item() for _, t in model.asked] == told
        assert x.shape == SHAPE


@pytest.mark.parametrize("door", [DDIMSampler, PLMSSampler])
def test_the_models_own_levels_can_be_sampled(door):
    """Broken in all originals. All levels, to the clean end; `timesteps` takes the lowest, none short."""
    model = LinearGaussian(num_timesteps=30)
    sampler = scheduled(model, 5, door)
    sampling = sampler.ddim_sampling if door is DDIMSampler else sampler.plms_sampling
    x, kept = sampling(MEANS, SHAPE, x_T=start(), ddim_use_original_steps=True)
    told = [t[0].item() for _, t in model.asked]
    assert sorted(set(told), reverse=True) == list(range(29, -1, -1))
    close(x, kept["pred_x0"][-1], atol=1e-6)
    model.asked.clear()
    sampling(MEANS, SHAPE, x_T=start(), ddim_use_original_steps=True, timesteps=4)
    assert {t[0].item() for _, t in model.asked} == {3, 2, 1, 0}


def test_guidance_may_follow_a_schedule():
    model, x_T = LinearGaussian(), start()
    options = {"x_T": x_T, "unconditional_conditioning": -MEANS}
    same, _ = DDIMSampler(model).sample(3, 2, SHAPE[1:], MEANS, ucg_schedule=[2.0] * 3, **options)
    plain, _ = DDIMSampler(model).sample(3, 2, SHAPE[1:], MEANS, unconditional_guidance_scale=2.0, **options)
    close(same, plain)
    model.asked.clear()
    DDIMSampler(model).sample(3, 2, SHAPE[1:], MEANS, ucg_schedule=[1.0, 2.0, 1.0], **options)
    assert [shape[0] for shape, _ in model.asked] == [2, 4, 2]
    with pytest.raises(UsageError, match="one scale for each of 3 steps, got 2"):
        DDIMSampler(model).sample(3, 2, SHAPE[1:], MEANS, ucg_schedule=[1.0, 2.0], **options)


def test_an_overridden_step_is_the_step_that_runs():
    class Halved(DDIMSampler):
        def p_sample_ddim(self, x, c, t, index, **options):
            x_prev, pred_x0 = super().p_sample_ddim(x, c, t, index, **options)
            return x_prev / 2, pred_x0

    x, _ = Halved(LinearGaussian()).sample(1, 2, SHAPE[1:], MEANS, x_T=start())
    plain, _ = DDIMSampler(LinearGaussian()).sample(1, 2, SHAPE[1:], MEANS, x_T=start())
    close(x, plain / 2)


def test_changed_tables_change_the_run():
    sampler = scheduled(LinearGaussian(), 4)
    torch.manual_seed(0)
    calm, _ = sampler.ddim_sampling(MEANS, SHAPE, x_T=start())
    sampler.ddim_sigmas = sampler.ddim_sigmas + 0.01
    torch.manual_seed(0)
    noisy, _ = sampler.ddim_sampling(MEANS, SHAPE, x_T=start())
    assert 1e-3 < (calm - noisy).abs().max() < 1


def test_one_step_by_hand_is_one_step_of_the_run():
    for door in (DDIMSampler, PLMSSampler):
        sampler = scheduled(LinearGaussian(), 4, door)
        t = torch.full((2,), 751)
        if door is DDIMSampler:
            x_prev, pred_x0 = sampler.p_sample_ddim(start(), MEANS, t, index=3)
        else:
            x_prev, pred_x0, eps = sampler.p_sample_plms(start(), MEANS, t, index=3, t_next=t - 250)
            close(eps, sampler.model.apply_model(start(), t, MEANS))
        _, kept = sampler.sample(4, 2, SHAPE[1:], MEANS, x_T=start(), log_every_t=1)
        close(x_prev, kept["x_inter"][1])
        close(pred_x0, kept["pred_x0"][1])


def test_velocity_and_clean_predictions_give_the_noise_networks_samples():
    want, _ = DDIMSampler(LinearGaussian()).sample(5, 2, SHAPE[1:], MEANS, x_T=start())
    for kind in ("v", "x0"):
        for door in (DDIMSampler, PLMSSampler, DPMSolverSampler):
            eps, _ = door(LinearGaussian()).sample(5, 2, SHAPE[1:], MEANS, x_T=start())
            got, _ = door(LinearGaussian(kind)).sample(5, 2, SHAPE[1:], MEANS, x_T=start())
            close(got, eps, atol=2e-5)
    assert want.isfinite().all()


def test_the_solver_takes_its_options_at_construction():
    model, x_T = LinearGaussian(), start()
    for options in ({"predict_x0": False}, {"order": 3, "solver_type": "taylor"}, {"spacing": "logSNR"}):
        got, _ = DPMSolverSampler(model, **options).sample(6, 2, SHAPE[1:], MEANS, x_T=x_T)
        *_, last = sample_steps("dpm_solver", model, x_T, MEANS, steps=6, **options)
        close(got, last.x_t)
    with pytest.raises(UsageError, match="dpm_solver has no option colour"):
        DPMSolverSampler(model, colour="red").sample(6, 2, SHAPE[1:], MEANS, x_T=x_T)


# --- img2img and inversion


def test_an_image_is_noised_to_the_row_asked_for():
    model = LinearGaussian()
    sampler = scheduled(model, 10)
    x0, noise = normals(*SHAPE, count=2, dtype=torch.float32)
    got = sampler.stochastic_encode(x0, torch.tensor([3, 9]), noise=noise)
    for row, index in [(0, 3), (1, 9)]:
        close(got[row], mix(x0, noise, sampler.ddim_alphas[index])[row], atol=1e-6)
    original = sampler.stochastic_encode(x0, torch.tensor([3, 999]), use_original_steps=True, noise=noise)
    for row, level in [(0, 3), (1, 999)]:
        close(original[row], mix(x0, noise, model.alphas_cumprod[level])[row], atol=1e-6)


def test_full_strength_starts_from_pure_noise():
    """The original failed here: there is no row above the last."""
    model = LinearGaussian()
    sampler = scheduled(model, 10)
    x0, noise = normals(*SHAPE, count=2, dtype=torch.float32)
    for rows, original in [(10, False), (1000, True)]:
        got = sampler.stochastic_encode(
            x0, torch.tensor([rows] * 2), use_original_steps=original, noise=noise
        )
        close(got, noise)
    sampled, _ = sampler.sample(10, 2, SHAPE[1:], MEANS, x_T=noise)
    close(sampler.decode(noise, MEANS, 10), sampled)


def test_decoding_takes_the_lowest_steps_and_counts_them():
    model, calls = LinearGaussian(num_timesteps=40), []
    sampler = scheduled(model, 10)
    sampler.decode(start(), MEANS, 3, callback=calls.append)
    assert [t[0].item() for _, t in model.asked] == [9, 5, 1] and calls == [0, 1, 2]
    model.asked.clear()
    sampler.decode(start(), MEANS, 3, use_original_steps=True)
    assert [t[0].item() for _, t in model.asked] == [2, 1, 0]
    close(sampler.decode(start(), MEANS, 0), start())


def test_encoding_tells_the_network_the_noisier_level():
    model, calls = LinearGaussian(num_timesteps=40), []
    sampler = scheduled(model, 10)
    _, out = sampler.encode(start(), MEANS, 6, return_intermediates=3, callback=calls.append)
    assert [t[0].item() for _, t in model.asked] == [1, 5, 9, 13, 17, 21] and calls == list(range(6))
    assert out["intermediate_steps"] == [0, 2, 4, 5] and len(out["intermediates"]) == 4
    close(out["intermediates"][-1], out["x_encoded"])
    model.asked.clear()
    _, out = sampler.encode(start(), MEANS, 4, use_original_steps=True)
    assert [t[0].item() for _, t in model.asked] == [0, 1, 2, 3] and "intermediates" not in out


@pytest.mark.parametrize(("steps", "error"), [(50, 0.1), (200, 0.025)])
def test_encoding_then_decoding_returns_within_the_step_size(steps, error):
    """First order in the step: four times the steps, a quarter of the error, for data of spread 0.5."""
    model = LinearGaussian()
    x0 = 0.5 * normals(*SHAPE)[0] + MEANS.double().reshape(-1, 1, 1, 1)
    sampler = scheduled(model, steps)
    noised, _ = sampler.encode(x0, MEANS, steps)
    assert 1e-4 < (sampler.decode(noised, MEANS, steps) - x0).abs().max() < error
    # On the way it is where the exact flow leads: to noise about the size of unit noise.
    for i, mean in enumerate(MEANS.tolist()):
        exact = model.flow(x0[i], mean, model.alphas_cumprod[0].item(), sampler.ddim_alphas[-1].item())
        assert (noised[i] - exact).abs().max() < 2 * error


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_encoding_and_decoding_with_exact_predictions_stay_on_the_line(kind):
    x0, eps = normals(*SHAPE, count=2)
    model = Line(eps, kind)
    sampler = scheduled(model, 20)
    clean = mix(x0, eps, model.alphas_cumprod[0])
    noised, _ = sampler.encode(clean, None, 20)
    close(noised, mix(x0, eps, sampler.ddim_alphas[-1]), atol=1e-5)
    close(sampler.decode(noised, None, 20), clean, atol=1e-5)


def test_encoding_is_guided_when_asked():
    model = LinearGaussian()
    sampler = scheduled(model, 10)
    guided, _ = sampler.encode(
        start(), MEANS, 5, unconditional_guidance_scale=3.0, unconditional_conditioning=-MEANS
    )
    close(guided, sampler.encode(start(), 5 * MEANS, 5)[0], atol=1e-5)


# --- what a caller can get wrong


@pytest.mark.parametrize("door", [DDIMSampler, PLMSSampler])
@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9])
def test_steps_out_of_range_are_named(door, steps):
    with pytest.raises(UsageError, match=f"DDIM steps must be a whole number from 1 to 1000, got {steps}$"):
        door(Wavy()).sample(steps, 2, SHAPE[1:], MEANS)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddim", -1.0), ("ddim", math.nan), ("plms", 0.5), ("plms", math.nan), ("dpm_solver", 0.5)],
)
def test_etas_without_meaning_are_refused(name, eta):
    with pytest.raises(UsageError, match=f"eta of {name} must be .*; got {eta}"):
        DOORS[name](Wavy()).sample(5, 2, SHAPE[1:], MEANS, eta=eta)


@pytest.mark.parametrize("name", DOORS)
def test_half_a_mask_is_refused(name):
    with pytest.raises(UsageError, match="x0 was given without mask"):
        DOORS[name](Wavy()).sample(5, 2, SHAPE[1:], MEANS, x0=start())
    with pytest.raises(UsageError, match="mask was given without x0"):
        DOORS[name](Wavy()).sample(5, 2, SHAPE[1:], MEANS, mask=torch.ones(2, 1, 5, 3))


def test_parts_beyond_the_run_are_refused():
    sampler = scheduled(Wavy(), 10)
    with pytest.raises(UsageError, match="t_start must be from 0 to 10, the number of steps; got 11"):
        sampler.decode(start(), MEANS, 11)
    with pytest.raises(UsageError, match="t_enc must be from 0 to 10, the number of steps; got -1"):
        sampler.encode(start(), MEANS, -1)
    with pytest.raises(
        UsageError, match="ddim_discretize must be one of uniform, quad, .*, compvis; got 'karras'"
    ):
        sampler.make_schedule(10, ddim_discretize="karras")


@pytest.mark.parametrize("name", DOORS)
def test_other_batches_and_unused_arguments_are_warned_of(name, caplog, capsys):
    DOORS[name](LinearGaussian()).sample(2, 2, SHAPE[1:], {"c_crossattn": [MEANS[:1]]}, x_T=start(), steps=9)
    messages = [record.getMessage() for record in caplog.records]
    assert "got 1 conditionings for a batch of 2" in messages
    assert "these arguments have no effect on sampling: steps" in messages
    assert capsys.readouterr() == ("", "")
