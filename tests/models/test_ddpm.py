"""The pixel diffusion model and the wrapper around its network."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from keyed import fill, keyed_input, weight
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny_diffusion import network, pixel_model

from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.ddpm import DDPM, ROUTES, DiffusionWrapper
from ldm.process.schedule import SCHEDULE_BUFFERS

SCHEDULER = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [4],
        "cycle_lengths": [100],
        "f_start": [0.5],
        "f_max": [1.0],
        "f_min": [1.0],
    },
}


@pytest.fixture(scope="module")
def pixel():
    return pixel_model().eval()


def batch_of(count=3, seed=0):
    return {"image": torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1}


# -- the wrapper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_recorded_answer(golden, route):
    recorded = load_file(golden / "sd2_and_control.safetensors")
    config = json.loads((golden / "sd2_and_control.json").read_text())[f"wrap.{route}"]
    wrapper = fill(DiffusionWrapper(OmegaConf.create(config), route), f"wrap.{route}.")
    x, t = keyed_input("wrap.x", (2, 4, 8, 8)), torch.tensor([5, 700])
    cat = keyed_input("wrap.cat", (2, 3, 8, 8))
    ctx, ctx2 = keyed_input("wrap.ctx", (2, 7, 24)), keyed_input("wrap.ctx2", (2, 3, 24))
    labels = torch.tensor([1, 3])
    conditions = {
        None: {},
        "concat": {"c_concat": [cat]},
        "crossattn": {"c_crossattn": [ctx, ctx2]},
        "hybrid": {"c_concat": [cat], "c_crossattn": [ctx, ctx2]},
        "adm": {"c_crossattn": [labels]},
        "hybrid-adm": {"c_concat": [cat], "c_crossattn": [ctx], "c_adm": labels},
        "crossattn-adm": {"c_crossattn": [ctx], "c_adm": labels},
    }[route]
    with torch.no_grad():
        got = wrapper(x, t, **conditions)
    want = recorded[f"wrap.{route}"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 + 1e-5 * want.abs().max().item())


def test_sequential_contexts_reach_one_block_each():
    """With two blocks, contexts [a, b] are not what their concatenation is, and the order matters."""
    config = {**network(transformer_depth=2), "sequential_crossattn": True}
    wrapper = fill(DiffusionWrapper(config, "crossattn"), "seq.")
    assert wrapper.sequential_cross_attn and "sequential_crossattn" in config
    joined = DiffusionWrapper(network(transformer_depth=2), "crossattn").eval()
    joined.load_state_dict(wrapper.state_dict())
    x, t = keyed_input("wrap.x", (2, 4, 8, 8)), torch.tensor([5, 700])
    a, b = keyed_input("wrap.ctx", (2, 7, 24)), keyed_input("wrap.ctx2", (2, 7, 24))
    with torch.no_grad():
        ab, ba, aa = (wrapper(x, t, c_crossattn=list(pair)) for pair in ((a, b), (b, a), (a, a)))
        both, one = joined(x, t, c_crossattn=[a, b]), joined(x, t, c_crossattn=[a])
    torch.testing.assert_close(aa, one, rtol=0, atol=1e-6)
    assert min((ab - ba).abs().max(), (ab - both).abs().max(), (ab - aa).abs().max()) > 1e-3


def test_an_unknown_route_is_refused():
    with pytest.raises(
        UsageError, match="'cross' is unknown; choose one of None, concat, crossattn, hybrid, adm"
    ):
        DiffusionWrapper(network(), "cross")


@pytest.mark.parametrize("route, lacks", [("crossattn", "c_crossattn"), ("hybrid", "c_concat")])
def test_a_missing_condition_is_named(route, lacks):
    wrapper = DiffusionWrapper(network(), route)
    with pytest.raises(UsageError, match=f"conditioning_key '{route}' needs {lacks}, got none"):
        wrapper(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]))


def test_labels_are_needed_where_the_route_says_so():
    wrapper = DiffusionWrapper(network(num_classes=3), "crossattn-adm")
    with pytest.raises(UsageError, match="needs c_adm, got none"):
        wrapper(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), c_crossattn=[torch.zeros(2, 7, 24)])


# -- schedule and buffers -----------------------------------------------------------------------------------


def test_the_state_dict_shows_twelve_tables_and_logvar(pixel):
    own = [key for key in pixel.state_dict() if "." not in key]
    assert sorted(own) == sorted([*SCHEDULE_BUFFERS, "logvar"])
    assert pixel.lvlb_weights.shape == (20,) and pixel.logvar.tolist() == [0.0] * 20


def test_files_with_and_without_logvar_load_strictly(pixel):
    state = pixel.state_dict()
    without = {key: value for key, value in state.items() if key != "logvar"}
    model = pixel_model(logvar_init=0.5)
    model.load_state_dict(without)
    assert model.logvar.tolist() == [0.5] * 20 and "logvar" not in without
    model.load_state_dict({**state, "logvar": torch.full((20,), 0.25)})
    assert model.logvar.tolist() == [0.25] * 20
    with pytest.raises(RuntimeError, match="Missing key.*betas"):
        model.load_state_dict({key: value for key, value in state.items() if key != "betas"})
    with pytest.raises(RuntimeError, match="Missing key.*logvar"):
        pixel_model(learn_logvar=True).load_state_dict(without)


def test_given_betas_replace_the_named_schedule():
    betas = np.array([0.1, 0.2, 0.5])
    model = pixel_model(given_betas=betas, timesteps=20)
    assert model.num_timesteps == 3
    torch.testing.assert_close(model.alphas_cumprod, torch.tensor([0.9, 0.72, 0.36]), rtol=0, atol=1e-7)
    torch.testing.assert_close(model.alphas_cumprod_prev, torch.tensor([1.0, 0.9, 0.72]), rtol=0, atol=1e-7)


def test_v_posterior_reaches_the_table():
    model = pixel_model(v_posterior=1.0)
    torch.testing.assert_close(model.posterior_variance, model.betas, rtol=0, atol=1e-7)


def test_the_tables_are_real_on_the_meta_device():
    with torch.device("meta"):
        model = pixel_model()
    assert next(model.model.parameters()).is_meta
    torch.testing.assert_close(model.alphas_cumprod, pixel_model().alphas_cumprod, rtol=0, atol=0)
    assert not any(model.get_buffer(name).is_meta for name in (*SCHEDULE_BUFFERS, "logvar", "lvlb_weights"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_stay_exact_when_the_network_is_halved(dtype):
    model, exact = pixel_model(), pixel_model()
    model.to(dtype)
    assert {p.dtype for p in model.model.parameters()} == {dtype}
    for name in (*SCHEDULE_BUFFERS, "logvar", "lvlb_weights"):
        torch.testing.assert_close(model.get_buffer(name), exact.get_buffer(name), rtol=0, atol=0)


def test_device_is_where_the_model_was_moved():
    model = pixel_model()
    assert model.device == torch.device("cpu")
    assert model.to("meta").device == torch.device("meta")


def test_noise_and_prediction_are_inverse(pixel):
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([2, 19])
    x_t = pixel.q_sample(x0, t, noise)
    v = pixel.get_v(x0, noise, t)
    torch.testing.assert_close(pixel.predict_start_from_noise(x_t, t, noise), x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixel.predict_start_from_z_and_v(x_t, t, v), x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixel.predict_eps_from_z_and_v(x_t, t, v), noise, rtol=0, atol=1e-5)
    mean, variance, log_variance = pixel.q_mean_variance(x0, t)
    torch.testing.assert_close((x_t - mean) / variance.sqrt(), noise, rtol=0, atol=1e-4)
    torch.testing.assert_close(log_variance.exp(), variance, rtol=0, atol=1e-7)


# -- sampling -----------------------------------------------------------------------------------------------


def test_the_recorded_pixel_samples_come_out(golden, pixel):
    model = copy.deepcopy(pixel)
    keyed = {
        key: weight("img." + key, tuple(value.shape)) if key.startswith("model.") else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(keyed)
    torch.manual_seed(4)
    got = model.sample(batch_size=2)
    want = load_file(golden / "diffusion.safetensors")["ddpm_image20"]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * (1 + want.abs().max().item()))


def test_intermediates_are_kept_every_so_many_levels():
    model = pixel_model(log_every_t=8, timesteps=18).eval()
    samples, kept = model.sample(batch_size=2, return_intermediates=True)
    assert len(kept) == 1 + 4  # the noise, then levels 17, 16, 8 and 0
    torch.testing.assert_close(kept[-1], samples, rtol=0, atol=0)


def test_predicted_pictures_are_clamped_only_where_asked(pixel):
    x, t = torch.full((1, 3, 8, 8), 9.0), torch.tensor([0])
    with torch.no_grad():
        clamped, free = (pixel.p_mean_variance(x, t, clip_denoised=clip)[0] for clip in (True, False))
    assert clamped.abs().max() <= 1 < free.abs().max()


def test_a_step_tells_the_clean_picture_it_aimed_at(pixel):
    """The step to level 0 draws no noise and its posterior is a point: it ends on that picture."""
    x, t = torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 0])
    x_prev, pred_x0 = pixel.p_sample(x, t, return_x0=True)
    torch.testing.assert_close(x_prev, pred_x0, rtol=0, atol=1e-5)
    assert pred_x0.abs().max() <= 1
    torch.testing.assert_close(pixel.p_sample(x, t), x_prev, rtol=0, atol=0)


def test_the_cleanest_step_adds_no_noise_and_repeated_noise_is_shared(pixel):
    x = torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        for t, moves in ((torch.tensor([0, 0]), False), (torch.tensor([9, 9]), True)):
            steps = [pixel.p_sample(x, t) for _ in range(2)]
            assert bool((steps[0] != steps[1]).any()) == moves
        shared = pixel.p_sample(x, torch.tensor([9, 9]), repeat_noise=True)
    torch.testing.assert_close(shared[0], shared[1], rtol=0, atol=1e-5)


# -- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("loss_type, power", [("l1", 1), ("l2", 2)])
def test_losses_are_what_their_names_say(parameterization, loss_type, power):
    model = pixel_model(
        parameterization=parameterization, loss_type=loss_type, original_elbo_weight=0.3, l_simple_weight=0.7
    ).eval()
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([3, 17])
    with torch.no_grad():
        loss, log = model.p_losses(x0, t, noise)
        answer = model.model(model.q_sample(x0, t, noise), t)
    target = {"eps": noise, "x0": x0, "v": model.get_v(x0, noise, t)}[parameterization]
    each = (answer - target).abs().pow(power).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log["val/loss_simple"], each.mean(), rtol=0, atol=1e-6)
    vlb = (model.lvlb_weights[t] * each).mean()
    torch.testing.assert_close(log["val/loss_vlb"], vlb, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, 0.7 * each.mean() + 0.3 * vlb, rtol=0, atol=1e-6)
    assert log["val/loss"] is loss


def test_a_training_step_reaches_every_weight():
    model = pixel_model()
    for parameter in model.model.parameters():  # zero-initialised layers hide what is behind them
        torch.nn.init.normal_(parameter, std=0.1)
    loss, log = model.training_step(batch_of(), 0)
    loss.backward()
    assert {"train/loss_simple", "train/loss_vlb", "train/loss"} == set(log)
    assert [n for n, p in model.model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_levels_are_drawn_from_the_whole_chain(pixel):
    torch.manual_seed(0)
    seen = torch.cat([pixel._random_levels(64) for _ in range(20)])
    assert seen.min() == 0 and seen.max() == 19 and seen.dtype == torch.long


def test_validation_reports_the_averaged_weights_too():
    """A new network answers 0, which is right for black pictures; its weights then learn to answer 1."""
    model = pixel_model(use_ema=True, parameterization="x0").eval()
    with torch.no_grad():
        model.model.diffusion_model.out[2].bias.fill_(1.0)
    values = model.validation_step({"image": torch.zeros(3, 8, 8, 3)}, 0)
    names = ["val/loss_simple", "val/loss_vlb", "val/loss"]
    assert sorted(values) == sorted(names + [name + "_ema" for name in names])
    assert values["val/loss"] == pytest.approx(1.0, abs=1e-6) and values["val/loss_ema"] == 0.0
    assert (model.model.diffusion_model.out[2].bias == 1.0).all()


def test_the_average_follows_the_weights_and_is_swapped_in(caplog):
    model = pixel_model(use_ema=True)
    parameter = next(model.model.parameters())
    old = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    model.on_train_batch_end()
    with caplog.at_level(logging.INFO), model.ema_scope("Looking"):
        inside = next(model.model.parameters()).detach().clone()
    # The first update has decay 2 / 11.
    torch.testing.assert_close(inside, old + 9 / 11, rtol=0, atol=1e-6)
    torch.testing.assert_close(parameter.detach(), old + 1.0, rtol=0, atol=0)
    assert "Looking: switched to averaged weights" in caplog.text


def test_without_an_average_the_scope_and_the_update_do_nothing(pixel):
    with pixel.ema_scope():
        assert not any(key.startswith("model_ema") for key in pixel.state_dict())
    pixel.on_train_batch_end()


def test_pictures_without_channels_are_read(pixel):
    assert pixel.get_input({"image": torch.zeros(2, 5, 7)}, "image").shape == (2, 1, 5, 7)
    assert pixel.get_input({"image": torch.zeros(2, 5, 7, 3)}, "image").shape == (2, 3, 5, 7)
    with pytest.raises(UsageError, match="a batch needs the key 'jpg', got 'image', 'txt'"):
        pixel.get_input({"image": 0, "txt": 0}, "jpg")


def test_conditions_are_dropped_as_often_as_asked():
    model = pixel_model(ucg_training={"txt": {"p": 0.25}, "style": {"p": 1.0, "val": "none"}})
    batch = {"txt": ["a"] * 400, "style": ["b", "c"], "other": ["d"]}
    torch.manual_seed(0)
    dropped = model._drop_conditions(batch)
    assert 70 <= dropped["txt"].count("") <= 130 and set(dropped["txt"]) == {"a", ""}
    assert dropped["style"] == ["none", "none"] and dropped["other"] == ["d"]
    assert batch["txt"] == ["a"] * 400


def test_the_optimizer_is_adamw_at_the_rate_that_was_set():
    model = pixel_model(learn_logvar=True)
    with pytest.raises(UsageError, match="needs model.learning_rate, a number; it is not set"):
        model.configure_optimizers()
    model.learning_rate = 3e-4
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 3e-4
    trained = optimizer.param_groups[0]["params"]
    assert len(trained) == len(list(model.model.parameters())) + 1 and trained[-1] is model.logvar


def test_the_learning_rate_follows_its_schedule():
    model = pixel_model(scheduler_config=SCHEDULER)
    model.learning_rate = 1.0
    [optimizer], [schedule] = model.configure_optimizers()
    assert schedule["interval"] == "step" and schedule["frequency"] == 1
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates == pytest.approx([0.5, 0.625, 0.75], abs=1e-12)


def test_images_to_look_at():
    model = pixel_model(log_every_t=9, use_ema=True).eval()
    log = model.log_images(batch_of(3), N=2, n_row=1)
    assert log["inputs"].shape == log["samples"].shape == (2, 3, 8, 8)
    assert log["diffusion_row"].shape == (3, 8 + 4, 4 * 10 + 2)  # levels 0, 9, 18, 19
    assert log["denoise_row"].shape == (3, 2 * 10 + 2, 5 * 10 + 2)
    torch.testing.assert_close(log["denoise_row"][:, 12:20, -10:-2], log["samples"][1], rtol=0, atol=0)
    assert set(model.log_images(batch_of(), sample=False, return_keys=["inputs"])) == {"inputs"}


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, message",
    [
        (
            {"parameterization": "epsilon"},
            "prediction 'epsilon' is unknown; a network predicts one of eps, x0, v",
        ),
        ({"loss_type": "huber"}, "loss_type should be 'l1' or 'l2', got 'huber'"),
        ({"use_positional_encodings": True}, "use_positional_encodings has no implementation"),
        ({"beta_schedule": "quad"}, "beta schedule 'quad' is unknown"),
        ({"timesteps": 0}, "at least 1 step, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, message):
    with pytest.raises(UsageError, match=message):
        pixel_model(**option)


# -- loading ------------------------------------------------------------------------------------------------


def saved(path, model, **changes):
    tensors = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    tensors.update(changes)
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return str(path)


def test_a_file_is_loaded_and_accounted_for(tmp_path, pixel):
    path = saved(tmp_path / "m.safetensors", pixel, betas=None, logvar=None)
    model = pixel_model(use_ema=True, ckpt_path=path)
    for (name, ours), theirs in zip(model.model.named_parameters(), pixel.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(model.model_ema.get_buffer(name.replace(".", "")), theirs), name
    report = model.init_from_ckpt(path)
    assert len(report.assigned) == len(pixel.state_dict()) - 2 and report.ignored == {}
    assert report.initialised["betas"] == report.initialised["logvar"] == "computed from the configuration"
    assert report.initialised["model_ema.decay"] == "seeded from the loaded network"


def test_averages_in_the_file_are_kept_or_left_with_a_reason(tmp_path, pixel):
    averaged = pixel_model(use_ema=True)
    averaged.model_ema.num_updates.fill_(7)
    path = saved(tmp_path / "m.safetensors", averaged)
    again = pixel_model(use_ema=True, ckpt_path=path)
    assert again.model_ema.num_updates == 7
    assert pixel_model(use_ema=True, ckpt_path=path, reset_num_ema_updates=True).model_ema.num_updates == 0
    report = pixel_model().init_from_ckpt(path)
    assert {reason for reason in report.ignored.values()} == {
        "averaged weights; this model keeps none (use_ema is off)"
    }


def test_an_average_is_begun_anew_where_asked(tmp_path):
    averaged = pixel_model(use_ema=True)
    name = next(iter(averaged.model_ema.m_name2s_name.values()))
    averaged.model_ema.get_buffer(name).add_(5.0)
    path = saved(tmp_path / "m.safetensors", averaged)
    kept, reset = (pixel_model(use_ema=True, ckpt_path=path, reset_ema=flag) for flag in (False, True))
    weight = next(reset.model.parameters()).detach()
    assert torch.equal(reset.model_ema.get_buffer(name), weight)
    torch.testing.assert_close(kept.model_ema.get_buffer(name), weight + 5.0, rtol=0, atol=1e-6)


def test_only_the_network_is_loaded_where_asked(tmp_path, pixel):
    path = saved(tmp_path / "m.safetensors", pixel, logvar=torch.ones(20), stray=torch.ones(3))
    model = pixel_model(ckpt_path=path, load_only_unet=True)
    assert model.logvar.tolist() == [0.0] * 20
    assert torch.equal(next(model.model.parameters()), next(pixel.model.parameters()))


def test_ignored_keys_stay_as_they_were(tmp_path, pixel):
    out = "model.diffusion_model.out.2.weight"
    path = saved(tmp_path / "m.safetensors", pixel, **{out: torch.ones_like(pixel.state_dict()[out])})
    model = pixel_model()
    report = model.init_from_ckpt(path, ignore_keys=["model.diffusion_model.out."])
    assert not model.state_dict()[out].any()
    assert report.ignored[out] == report.initialised[out] == "begins with one of ignore_keys"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.diffusion_model.out.2.bias": None}, "missing .'model.diffusion_model.out.2.bias'"),
        ({"extra.weight": torch.zeros(2)}, "not expected .'extra.weight'"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(5)}, r"out.2.bias' \[5\] instead of \[3\]"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, pixel, changes, message):
    path = saved(tmp_path / "m.safetensors", pixel, **changes)
    model = pixel_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match=message):
        model.init_from_ckpt(path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_base_model_is_no_lightning_module():
    assert issubclass(DDPM, torch.nn.Module)
    assert {base.__module__.split(".")[0] for base in DDPM.__mro__} == {"ldm", "torch", "builtins"}
