"""float16 training: the scale of the loss, steps that overflow, and runs that go on."""

import math

import pytest
import torch
from tiny_training import figures, first_stage, run

from ldm.errors import MismatchError, NumericError, UsageError
from ldm.training.callbacks import AfterSteps
from ldm.training.checkpointing import read_state
from ldm.training.module import LossScale
from ldm.training.optimizers import chosen_precision


class Layers(torch.nn.Module):
    """Two linear layers in a UNet's place: convolutions in float16 take a second a step on a CPU."""

    def __init__(self, width: int = 24):
        super().__init__()
        sides = (3 * 16 * 16, width)
        self.narrow, self.widen = torch.nn.Linear(*sides), torch.nn.Linear(*sides[::-1])

    def forward(self, x, timesteps, context=None):
        return self.widen(torch.nn.functional.silu(self.narrow(x.flatten(1)))).view_as(x)


class ScaleAt(AfterSteps):
    """Sets the loss's scale after a step; the next one then overflows where it is too large."""

    def __init__(self, step, scale):
        self.step, self.scale = step, scale

    def after_step(self, trainer, module, batch):
        if module.step == self.step:
            module.loss_scale.scale = self.scale


def small(**params):
    config = first_stage()
    config["model"] = {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.diffusion.ddpm.DDPM",
        "params": {
            "timesteps": 40,
            "image_size": 16,
            "channels": 3,
            "first_stage_key": "image",
            "use_ema": True,
            "unet_config": {"target": f"{__name__}.Layers", "params": {}},
        },
    }
    config["data"]["params"]["train"] = {
        "target": "tiny_training.Finite",
        "params": {"image_size": 16} | params,
    }
    config["data"]["params"]["train"]["params"].setdefault("length", 11)
    return config


def half(config, steps, scale_at=None, **trainer):
    config["lightning"]["trainer"] |= {"precision": "16-mixed", "max_steps": steps, **trainer}
    config["lightning"]["callbacks"] = {
        "images": {"target": "main.ImageLogger", "params": {"disabled": True}}
    }
    if scale_at is not None:
        params = dict(zip(("step", "scale"), scale_at, strict=True))
        config["lightning"]["callbacks"]["s"] = {"target": f"{__name__}.ScaleAt", "params": params}
    return config


def state(folder):
    return read_state(folder / "checkpoints" / "last.ckpt")


def steps_taken(saved):
    return [optimizer["state"][min(optimizer["state"])]["step"] for optimizer in saved["optimizer_states"]]


@pytest.fixture(scope="module")
def overflown(tmp_path_factory):
    """A run of 5 steps of 2 batches whose third overflows; its checkpoints after 2 and 4 are overwritten."""
    folder = tmp_path_factory.mktemp("overflown")
    run(half(small(), 5, (2, 2.0**31), accumulate_grad_batches=2), folder)
    return folder


def test_a_float16_run_has_the_losses_of_a_float32_run(tmp_path):
    run(half(small(), 4), tmp_path / "half")
    run(half(small(), 4, precision="32-true"), tmp_path / "exact")
    for name in ("train/loss", "grad_norm"):
        rough, exact = (figures(tmp_path / folder, name) for folder in ("half", "exact"))
        assert exact != rough and rough == pytest.approx(exact, rel=5e-3)
    assert all(
        t.dtype == torch.float32 for t in state(tmp_path / "half")["state_dict"].values() if t.dim() > 1
    )


def test_a_step_whose_gradients_overflow_is_skipped_and_halves_the_scale(overflown):
    scales, norms = figures(overflown, "loss_scale"), figures(overflown, "grad_norm")
    saved = state(overflown)
    skipped = [step for step in norms if not math.isfinite(norms[step])]
    assert [scales[step] for step in (0, 1, 2)] == [2.0**16, 2.0**16, 2.0**31]
    assert skipped[0] == 2 and saved["run"]["loss_scale"]["scale"] == 2.0 ** (31 - len(skipped))
    assert saved["run"]["guard"] == {"total": 0, "row": 0, "recent": []}  # none is the run's fault
    assert steps_taken(saved) == [5 - len(skipped)]
    assert int(saved["state_dict"]["model_ema.num_updates"]) == 5 - len(skipped)


def test_the_scale_changes_no_step(tmp_path):
    """Powers of two change no digit, before clipping as after it."""
    for name, scale in (("a", 2.0**10), ("b", 2.0**14)):
        run(half(small(), 3, (1, scale), gradient_clip_val=0.01), tmp_path / name)
    a, b = (figures(tmp_path / name, "grad_norm") for name in "ab")
    assert all(0.01 < norm for norm in a.values()) and a == pytest.approx(b, rel=1e-4)
    a, b = (state(tmp_path / name)["state_dict"] for name in "ab")
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-6) for name in a)


def test_a_resumed_float16_run_is_the_uninterrupted_one(tmp_path, overflown):
    for steps in (3, 5):  # cut right after the overflow
        run(half(small(), steps, (2, 2.0**31), accumulate_grad_batches=2), tmp_path, resume=True)
    for name in ("train/loss", "grad_norm", "loss_scale"):
        assert str(figures(tmp_path, name)) == str(figures(overflown, name))  # as text, for inf and nan
    whole, cut = state(overflown), state(tmp_path)
    assert whole["run"]["loss_scale"] == cut["run"]["loss_scale"]
    assert all(
        torch.equal(whole["state_dict"][name], cut["state_dict"][name]) for name in whole["state_dict"]
    )


@pytest.mark.slow
def test_both_networks_of_a_gan_rest_at_a_step_that_overflows(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**8)  # the loss is a sum over pixels
    config = first_stage(disc_factor=1.0, disc_start=1, disc_ndf=8, disc_num_layers=1)
    run(half(config, 6, (3, 2.0**31)), tmp_path)
    norms = figures(tmp_path, "grad_norm")
    real = sum(map(math.isfinite, norms.values()))
    assert not math.isfinite(norms[3]) and real >= 3 and steps_taken(state(tmp_path)) == [real, real]


def test_a_run_whose_first_steps_all_overflow_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 2.0**32)
    for steps in (1, 2):
        made = run(half(small(), steps), tmp_path, resume=True)
    assert made.module.loss_scale.scale == 2.0**30 and state(tmp_path)["run"]["moments"] == [0]


def test_another_precision_is_taken_over_and_named(tmp_path, capsys):
    run(half(small(), 1), tmp_path)
    run(half(small(), 2, precision="fp16"), tmp_path, resume=True)
    assert "resuming with" not in capsys.readouterr().out
    run(half(small(), 3, precision="bf16"), tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "resuming with lightning.trainer.precision bf16-mixed instead of 16-mixed" in said.replace("'", "")
    assert state(tmp_path)["run"]["loss_scale"] is None


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(tmp_path):
    config = half(small(), 3)
    params = {"image_size": 16, "steps": [1]}
    config["data"]["params"]["train"] = {"target": "tiny_training.NotFinite", "params": params}
    run(config, tmp_path)
    assert state(tmp_path)["run"]["guard"]["recent"] == [1]
    assert state(tmp_path)["run"]["loss_scale"] == {"scale": 2.0**16, "sound": 2}


def test_the_scale_doubles_after_sound_steps_and_ends_a_run_below_one():
    scale = LossScale()
    for step in range(1999):
        scale.record(step, True)
    scale.record(1999, False)
    assert scale.state_dict() == {"scale": 2.0**15, "sound": 0}
    for step in range(2000):
        assert scale.scale == 2.0**15
        scale.record(step, True)
    assert scale.scale == 2.0**16
    for step in range(16):
        scale.record(step, False)
    assert scale.scale == 1.0
    with pytest.raises(
        NumericError, match=r"stopped at step 7: gradients overflow float16 at every loss scale"
    ):
        scale.record(7, False)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (16, "16-mixed"),
        ("16", "16-mixed"),
        ("fp16", "16-mixed"),
        ("fp16-mixed", "16-mixed"),
        ("16-mixed", "16-mixed"),
        ("bf16", "bf16-mixed"),
        (32, "32-true"),
        ("32-true", "32-true"),
    ],
)
def test_a_precision_has_several_spellings(given, wanted):
    assert chosen_precision(given) == wanted


@pytest.mark.parametrize("given", ["16-true", "bf16-true", "64-true", 64, "half", "", "x" * 9000])
def test_another_precision_is_refused_with_all_that_there_are(given):
    with pytest.raises(UsageError, match="should be one of '32-true'/.*'bf16-mixed'/.*'16-mixed'") as caught:
        chosen_precision(given)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("scale", [3, {"scale": 1.0}, {"scale": 0.0, "sound": 1}, {"scale": "x", "sound": 1}])
def test_a_damaged_scale_is_refused(tmp_path, scale, overflown):
    saved = state(overflown)
    saved["run"]["loss_scale"] = scale
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError, match="run.loss_scale that is no scale and count"):
        read_state(tmp_path / "a.ckpt")
