"""Training of OpenAI's pixel models: laws of the objective, several averages, exact resumption, files that load."""

import numpy as np
import pytest
import tiny_training
import torch
from omegaconf import OmegaConf
from tiny_training import figures, run, shapes_data

from ldm.checkpoints import read_tensors
from ldm.errors import MismatchError, UsageError
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.objective import GaussianObjective
from ldm.guided_diffusion.pixel_diffusion import PixelDiffusion
from ldm.models.diffusion.gaussian_diffusion import LossType, ModelVarType
from ldm.paths import shipped
from ldm.shapes.scenes import COLOURS, SHAPES, parse_caption
from ldm.training.checkpointing import read_state
from ldm.training.data import Shapes, Stream
from ldm.training.draws import Draws
from ldm.training.export import export_run
from ldm.training.merging import merge_configs
from ldm.training.trainer import Run, RunOptions
from scripts import train

LEVELS = 3  # so few that a run of 6 steps fills every level's history
FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 2,
    "learn_sigma": True,
    "diffusion_steps": LEVELS,
    "noise_schedule": "cosine",
}
HYBRID, BOUND = {"rescale_learned_sigmas": True}, {"use_kl": True}
LABELLED = {"class_cond": True, "num_classes": 6}


def pixels(max_steps=6, **params):
    """Make the configuration of a run whose steps are of 2 batches of 4."""
    return {
        "model": {
            "base_learning_rate": 1e-4,
            "target": "ldm.guided_diffusion.pixel_diffusion.PixelDiffusion",
            "params": {
                **FLAGS,
                **HYBRID,
                **LABELLED,
                "schedule_sampler": "loss-second-moment",
                "ema_rate": "0.9,0.5",
                "lr_anneal_steps": 6,
                **params,
            },
        },
        "data": shapes_data(
            batch_size=4,
            train={"target": "ldm.training.data.Shapes", "params": {"image_size": 16, "label": "shape"}},
        ),
        "training": {"checkpoint_every": 2, "validate_every": 100, "curve_every": 0, "image_steps": 2},
        "lightning": {
            "trainer": {"max_steps": max_steps, "accelerator": "cpu", "accumulate_grad_batches": 2}
        },
    }


def state(folder):
    return read_state(folder / "checkpoints" / "last.ckpt")


def assert_same(a, b):
    """Compare tensors by name, bit for bit."""
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("pixels")
    return folder, run(pixels(), folder)


def make(seed=0, **params):
    """A model whose last layers are not zero, as they are at the start."""
    torch.manual_seed(seed)
    model = PixelDiffusion(**{**FLAGS, **params})
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prefer_last_level(model):
    """Fill the sampler's history so that the last level is drawn more often than the others."""
    losses = np.repeat([1.0, 2.0, 5.0], 10)
    model.levels.sampler.update_with_all_losses(np.repeat(range(LEVELS), 10), losses)


def batch_of(count, label="shape"):
    return Stream(Shapes(image_size=16, label=label), count, seed=3)[0]


# -- the objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [HYBRID, BOUND, {"learn_sigma": False, **LABELLED}], ids=str)
def test_the_loss_is_that_of_the_process_on_the_same_draws_weighed_by_the_sampler(flags):
    model = make(schedule_sampler="loss-second-moment", **flags)
    prefer_last_level(model)
    sampler = model.levels.sampler
    p = sampler.weights()
    assert p[2] > 2 * p[1] > 0
    batch = batch_of(5)
    loss, shown = GaussianObjective(model).forward(batch, Draws(5, 7))

    draws = Draws(5, 7)
    history = sampler.state_dict()["loss_history"]
    model.levels.sampler = type(sampler)(model.diffusion)
    prefer_last_level(model)
    image = batch["image"].permute(0, 3, 1, 2)
    t, weights = draws.weighted_levels(model.levels.sampler, image)
    assert len(set(t.tolist())) > 1
    np.testing.assert_allclose(weights.numpy(), 1 / (LEVELS * p[t.numpy()]), rtol=1e-6)
    kwargs = {"y": batch["class_label"]} if "class_cond" in flags else {}
    noise = draws.normal(image)
    terms = model.diffusion.training_losses(model.model, image, t, kwargs, noise=noise)
    torch.testing.assert_close(loss, (weights * terms["loss"]).mean(), rtol=0, atol=0)
    assert shown.keys() == {f"train/{name}" for name in terms} - {"train/loss"}
    assert "train/vb" in shown or "learn_sigma" in flags or "use_kl" in flags
    # The sampler is told the losses themselves.
    sampler = model.levels.sampler
    sampler.update_with_all_losses(t.tolist(), terms["loss"].tolist())
    torch.testing.assert_close(sampler.state_dict()["loss_history"], history, rtol=0, atol=0)


def test_two_processes_draw_the_levels_of_one():
    model = make(schedule_sampler="loss-second-moment")
    prefer_last_level(model)
    image = torch.zeros(6, 3, 16, 16)
    whole = Draws(5, 7).weighted_levels(model.levels.sampler, image)
    parts = []
    for rank in range(2):
        draws = Draws(5, 7, rank=rank, world=2)
        before = np.random.get_state()[1].copy()
        parts.append(draws.weighted_levels(model.levels.sampler, image[:3]))
        assert (np.random.get_state()[1] == before).all()
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


@pytest.mark.parametrize("flags", [HYBRID, BOUND], ids=str)
@pytest.mark.thinned(2)
def test_steps_along_the_gradient_lower_the_loss(flags):
    model = make(**flags)
    objective, batch = GaussianObjective(model), batch_of(3)
    optimizer = torch.optim.Adam(model.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss, _ = objective.forward(batch, Draws(5, 0))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_losses_that_are_not_finite_are_kept_from_the_sampler():
    model = make(schedule_sampler="loss-second-moment")
    batch = batch_of(5)
    batch["image"][[1, 3]] = float("nan")
    loss, _ = GaussianObjective(model).forward(batch, Draws(5, 0))
    assert not loss.isfinite()
    saved = model.levels.sampler.state_dict()
    assert saved["loss_counts"].sum() == 3 and saved["loss_history"].isfinite().all()


def test_in_bfloat16_the_loss_is_close_and_in_float32():
    model, batch = make(**HYBRID), batch_of(5)
    exact, _ = GaussianObjective(model).forward(batch, Draws(5, 0))
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = GaussianObjective(model, memory_format=torch.channels_last).forward(batch, Draws(5, 0))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().item() < 0.02 * exact.item()


def test_validation_asks_every_level_alike_and_the_first_average():
    """With as many pictures as levels each level is asked once, whatever the sampler prefers."""
    model = make(schedule_sampler="loss-second-moment", ema_rate="0.75,0.5", **HYBRID)
    prefer_last_level(model)
    objective, batch = GaussianObjective(model), batch_of(LEVELS)
    measured = objective.validate(batch, Draws(8, 0), 0)
    draws = Draws(8, 0)
    image = batch["image"].permute(0, 3, 1, 2)
    draws.uniform(image)
    with torch.no_grad(), model.ema_scope(0.75):
        terms = model.diffusion.training_losses(
            model.model, image, torch.arange(LEVELS), noise=draws.normal(image)
        )
    assert measured == {f"val/{name}": pytest.approx(float(v.mean())) for name, v in terms.items()}
    assert measured.keys() == {"val/loss", "val/mse", "val/vb"}
    assert objective.validate(batch, Draws(8, 0), 9) == measured


def test_pictures_are_samples_of_the_first_average_for_the_batchs_labels():
    model = make(diffusion_steps=9, ema_rate="0.75,0.5", **LABELLED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = GaussianObjective(model, sample_steps=4)
    batch = batch_of(5)
    shown = objective.pictures(batch, 2)
    assert shown["samples"].shape == (2, 3, 16, 16) and shown["samples"].abs().max() <= 1
    assert torch.equal(shown["inputs"], batch["image"][:2].permute(0, 3, 1, 2))
    chain = model.shorter(4)
    assert chain.num_timesteps == 4 and chain.original_num_steps == 9
    assert model.shorter(50).num_timesteps == 9
    noise = Draws(0, 0).normal(shown["inputs"])
    with torch.no_grad(), model.ema_scope(0.75):
        kwargs = {"y": batch["class_label"][:2]}
        samples = chain.ddim_sample_loop(model.model, noise.shape, noise=noise, model_kwargs=kwargs)
    assert torch.equal(samples, shown["samples"])
    assert_same(model.state_dict(), before)


# -- averages ----------------------------------------------------------------------------------------------


def test_each_average_follows_its_closed_form():
    """After weights w_1, w_2, w_3: r^3 w_0 + (1 - r) (r^2 w_1 + r w_2 + w_3)."""
    model = make(ema_rate=[0.75, 0.5])
    weight = model.model.time_embed[0].bias
    start = model.averages["0_5"].time_embed0bias.clone()
    assert start.abs().min() > 0
    w = [start] + [torch.full_like(weight, value) for value in (4.0, -2.0, 7.0)]
    with torch.no_grad():
        for value in w[1:]:
            weight.copy_(value)
            model.update_averages()
    for rate in (0.75, 0.5):
        wanted = rate**3 * w[0] + (1 - rate) * (rate**2 * w[1] + rate * w[2] + w[3])
        with model.ema_scope(rate):
            torch.testing.assert_close(weight.detach(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(weight, w[3])


@pytest.mark.parametrize(
    ("given", "rates"), [("0.9999,0.999", [0.9999, 0.999]), (0.5, [0.5]), ([0.9, 0], [0.9, 0.0])]
)
def test_rates_are_read_from_text_number_or_list(given, rates):
    assert make(ema_rate=given).ema_rates == rates


# -- whole runs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, pixel_run):
    """Weights, both averages, the sampler's history, optimizer and rate, bit for bit; two batches a step."""
    whole, made = pixel_run
    run(pixels(max_steps=2), tmp_path)
    run(pixels(), tmp_path, resume=True)
    resumed, uncut = state(tmp_path), state(whole)
    for found in (resumed, uncut):
        (optimizer,) = found["optimizer_states"]
        found["moments"] = optimizer.pop("state")
    for tensors in ("state_dict", "moments"):
        assert_same(resumed.pop(tensors), uncut.pop(tensors))
    assert resumed == uncut
    assert figures(tmp_path) == figures(whole) and sorted(figures(whole)) == list(range(6))
    saved = state(whole)["state_dict"]
    assert saved["levels.loss_counts"].tolist() == [10] * LEVELS
    p = made.model.levels.sampler.weights()
    assert max(p) > 1.1 * min(p)  # the history is full, so the last steps' levels depended on it
    assert not torch.equal(saved["averages.0_9.out2bias"], saved["averages.0_5.out2bias"])


@pytest.mark.slow
def test_the_rate_falls_along_a_line_to_zero(pixel_run):
    rates = figures(pixel_run[0], "lr")
    # 1e-4 times 4 pictures times 2 batches
    assert [rates[n] for n in range(6)] == pytest.approx([8e-4 * (1 - n / 6) for n in range(6)], rel=1e-12)
    model = make(lr_anneal_steps=6)
    model.learning_rate = 1.0
    [optimizer], [schedule] = model.configure_optimizers()
    assert [schedule["scheduler"].lr_lambdas[0](n) for n in (0, 3, 6, 7)] == [1.0, 0.5, 0.0, 0.0]


def test_a_run_leaves_every_average_under_openais_names(tmp_path, pixel_run):
    folder, made = pixel_run
    for name, rate in (("weights.safetensors", 0.9), ("weights-ema_0.5.safetensors", 0.5)):
        loaded, flags, report = load_openai_model(folder / name, **made.model.flags)
        assert not report.notes and flags["num_classes"] == 6
        with made.model.ema_scope(rate):
            assert_same(loaded.state_dict(), made.model.model.state_dict())
    _, metadata = read_tensors(folder / "weights.safetensors")
    assert metadata["global_step"] == "6"
    export_run(folder, tmp_path / "half.safetensors", ema_rate=0.5)
    halves, _ = read_tensors(tmp_path / "half.safetensors")
    saved = state(folder)["state_dict"]
    assert torch.equal(halves["out.2.bias"], saved["averages.0_5.out2bias"].half())
    with pytest.raises(MismatchError, match=r"averages of rate 0\.9, 0\.5, but not of 0\.7"):
        export_run(folder, tmp_path / "none.safetensors", ema_rate=0.7)
    train.main(
        ["--logdir", str(folder), "--export", str(tmp_path / "by_script.safetensors"), "--ema_rate", "0.5"]
    )
    assert_same(read_tensors(tmp_path / "by_script.safetensors")[0], halves)


def test_a_rate_without_an_export_is_refused():
    with pytest.raises(UsageError, match="--ema_rate says what --export writes"):
        train.main(["--base", "a.yaml", "--ema_rate", "0.5"])


def test_a_run_can_begin_with_the_weights_of_another(pixel_run):
    folder, _ = pixel_run
    path = folder / "weights.safetensors"
    begun = PixelDiffusion(ckpt_path=str(path), ema_rate=0.25, **FLAGS, **LABELLED)
    tensors, _ = read_tensors(path)
    assert_same(begun.model.state_dict(), tensors)
    assert torch.equal(begun.averages["0_25"].out2bias, tensors["out.2.bias"])
    with pytest.raises(MismatchError, match="class_cond"):
        PixelDiffusion(ckpt_path=str(path), **FLAGS)


def test_a_state_of_other_averages_or_another_sampler_is_refused(tmp_path, pixel_run):
    path = pixel_run[0] / "checkpoints" / "last.ckpt"
    for other, key in (
        ({"ema_rate": "0.9,0.4"}, r"ema_rate '0.9,0.5', now '0.9,0.4'"),
        ({"schedule_sampler": "uniform"}, "schedule_sampler 'loss-second-moment', now 'uniform'"),
    ):
        with pytest.raises(MismatchError, match=rf"of a run with model.params.{key}; that cannot change"):
            run(pixels(**other), tmp_path, resume=path)


def test_a_history_is_loaded_whole_or_not_at_all():
    model = make(schedule_sampler="loss-second-moment")
    prefer_last_level(model)
    saved = model.state_dict()
    other = make(seed=1, schedule_sampler="loss-second-moment")
    other.load_state_dict(saved)
    assert (other.levels.sampler.weights() == model.levels.sampler.weights()).all()
    del saved["levels.loss_counts"]
    saved["levels.more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"levels.loss_counts".*Unexpected.*"levels.more"'):
        make(seed=1, schedule_sampler="loss-second-moment").load_state_dict(saved)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    run(pixels(), tmp_path / "one")
    config = pixels()
    config["data"]["params"]["batch_size"] = 2
    config["lightning"]["trainer"]["devices"] = 2
    OmegaConf.save(OmegaConf.create(config), tmp_path / "two.yaml")
    script = Path(tiny_training.__file__).parents[1] / "scripts" / "train.py"
    words = ["--base", tmp_path / "two.yaml", "--logdir", tmp_path / "two", "--seed", "5"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(6))
    # The gradients are sums in another order: the last digits differ, and grow a little with every step.
    assert all(abs(one[step] - two[step]) <= 1e-5 * abs(one[step]) for step in one), (one, two)
    histories = [state(tmp_path / name)["state_dict"]["levels.loss_history"] for name in ("one", "two")]
    torch.testing.assert_close(*histories, rtol=1e-4, atol=0)


# -- labels, the shipped configuration, and what a caller can get wrong ------------------------------------


@pytest.mark.parametrize(("label", "names"), [("shape", SHAPES), ("colour", tuple(COLOURS))])
def test_a_label_is_the_number_of_what_the_caption_names_first(label, names):
    batch = batch_of(9, label)
    labels = batch["class_label"]
    assert labels.dtype == torch.int64 and labels.shape == (9,) and len(set(labels.tolist())) > 2
    for number, caption in zip(labels.tolist(), batch["caption"], strict=True):
        assert names[number] == getattr(parse_caption(caption).objects[0], label)
    assert "class_label" not in batch_of(2, None)


def test_the_shipped_configuration_is_a_run(tmp_path):
    made = Run(RunOptions(config=merge_configs([shipped("configs/shapes-pixels.yaml")], []), folder=tmp_path))
    model = made.model
    assert 3e6 < sum(p.numel() for p in model.model.parameters()) < 4e6
    assert model.diffusion.model_var_type == ModelVarType.LEARNED_RANGE
    assert model.diffusion.loss_type == LossType.RESCALED_MSE and model.diffusion.num_timesteps == 1000
    assert model.lr_anneal_steps == made.max_steps
    for source in (made.data.train_source, made.data.validation_source):
        image, told = GaussianObjective(model).samples(Stream(source, 3)[0])
        assert image.shape == (3, 3, 32, 32) and told["y"].max() < model.flags["num_classes"] == len(SHAPES)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_chanels": 32}, r"has no flag 'num_chanels'; did you mean 'num_channels'"),
        ({"schedule_sampler": "second"}, r"schedule sampler 'second' is unknown"),
        ({"ema_rate": "0.9,1.2"}, r"rates in \[0, 1\), each once, such as .*; got '0\.9,1\.2'"),
        ({"ema_rate": [0.9, 0.9]}, r"each once.*; got \[0\.9, 0\.9\]"),
        ({"ema_rate": ""}, r"one or more rates.*; got ''"),
        ({"ema_rate": None}, r"one or more rates.*; got None"),
        ({"use_fp16": True}, r"use_fp16 is for sampling.*precision: bf16-mixed"),
        ({"weight_decay": -0.5}, r"weight_decay should be at least 0, got -0\.5"),
        ({"lr_anneal_steps": -3}, r"lr_anneal_steps should be at least 0 \(0: none\), got -3"),
        ({"num_channels": 33}, r"33 channels"),
    ],
)
def test_bad_values_are_named(params, message):
    with pytest.raises(UsageError, match=message):
        PixelDiffusion(**{**FLAGS, **params})


def test_data_that_do_not_fit_the_model_are_named():
    batch = batch_of(2, None)
    with pytest.raises(MismatchError, match=r"a batch has no 'class_label', only image, caption, txt; set"):
        GaussianObjective(make(**LABELLED)).samples(batch)
    with pytest.raises(MismatchError, match=r"pictures of 16 x 16 x 3, the data's are 8 x 16 x 3; set"):
        GaussianObjective(make()).samples({"image": batch["image"][:, :8]})
    with pytest.raises(UsageError, match=r"label should be shape or colour, or left out; got 'size'"):
        Shapes(image_size=16, label="size")
    with pytest.raises(UsageError, match=r"got label='shape' and crowd_until_step=7"):
        Shapes(image_size=16, label="shape", crowd_until_step=7)


def test_settings_of_other_models_are_refused(tmp_path):
    for name, value in (("identity_start", True), ("posterior_logvar_start", -7.0)):
        config = pixels()
        config["training"][name] = value
        with pytest.raises(UsageError, match=rf"training\.{name} is not for pixel models, got {value}"):
            run(config, tmp_path)
    model = make()
    with pytest.raises(UsageError, match="needs model.learning_rate"):
        model.configure_optimizers()
