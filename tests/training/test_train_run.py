"""Whole training runs at tiny size: exact resumption, kills, signals, NaN, schedules, exports and errors."""

import os
import shutil
import signal
import zipfile

import pytest
import tiny_training
import torch
from omegaconf import OmegaConf
from tiny_training import diffusion, figures, first_stage, in_child, run

from ldm.checkpoints import read_tensors
from ldm.errors import FormatError, MismatchError, NumericError, OutputError, UsageError
from ldm.training import checkpointing
from ldm.training.checkpointing import RunLock, find_damage, read_newest, read_state
from ldm.training.module import NonFiniteGuard


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a, b, where=""):
    """Compare nested states bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def until(config, steps):
    config["lightning"]["trainer"]["max_steps"] = steps
    return config


@pytest.fixture(scope="module")
def stage_run(tmp_path_factory):
    """An uninterrupted first-stage run of 6 steps."""
    folder = tmp_path_factory.mktemp("stage")
    run(first_stage(), folder)
    return folder


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory, stage_run):
    """An uninterrupted diffusion run of 6 steps on that first stage."""
    folder = tmp_path_factory.mktemp("diffusion")
    made = run(diffusion(str(stage_run / "weights.safetensors")), folder)
    return folder, made


# -- resumption --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_diffusion_run_is_the_uninterrupted_one(tmp_path, stage_run, diffusion_run):
    """Weights, average, optimizer, schedule, guard and data position, bit for bit; loader workers included."""
    whole, _ = diffusion_run
    config = diffusion(str(stage_run / "weights.safetensors"))
    run(until(config, 3), tmp_path)
    config["data"]["params"]["num_workers"] = 2
    run(until(config, 6), tmp_path, resume=True)
    assert_same(state(tmp_path), state(whole))
    assert figures(tmp_path) == figures(whole) and sorted(figures(whole)) == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first stage", "gan", "diffusion"])
def test_a_run_can_be_cut_at_any_step(tmp_path, stage_run, kind):
    def make():
        if kind == "diffusion":
            return diffusion(str(stage_run / "weights.safetensors"))
        loss = (
            {"disc_factor": 1.0, "disc_start": 2, "disc_ndf": 8, "disc_num_layers": 1}
            if kind == "gan"
            else {}
        )
        config = first_stage(**loss)
        config["lightning"]["trainer"]["accumulate_grad_batches"] = 2
        return config

    run(make(), tmp_path / "whole")
    for cut in range(1, 6) if kind == "gan" else (2, 5):  # a GAN's run has all the states of a first stage's
        folder = tmp_path / str(cut)
        run(until(make(), cut), folder)
        run(make(), folder, resume=True)
        assert_same(state(folder), state(tmp_path / "whole"))
        assert figures(folder) == figures(tmp_path / "whole")


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_rename_to(name, call):
    """Kill this process before the call-th time that a file is to take this name."""
    original, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += os.path.basename(target) == name
        if os.path.basename(target) == name and count == call:
            die()
        original(source, target)

    os.replace = replace


def die_amid_write(call, share):
    """Kill this process when this share of the call-th checkpoint is written, or (share 1) before it is synced."""
    original, count = torch.save, 0

    def save(value, file):
        nonlocal count
        count += 1
        original(value, file)
        if count == call and share < 1:
            file.truncate(int(file.tell() * share))
            file.flush()
            die()
        elif count == call:
            os.fsync = die

    torch.save = save


# A checkpoint is due after steps 2, 4 and 6; the second one is hit.
KILLS = {
    "after step 3": lambda: None,
    "begun": lambda: die_amid_write(2, 0.0),
    "half written": lambda: die_amid_write(2, 0.5),
    "before it is synced": lambda: die_amid_write(2, 1.0),
    "before the older takes its second name": lambda: die_before_rename_to("previous.ckpt", 1),
    "between the two names": lambda: die_before_rename_to("last.ckpt", 2),
}


@pytest.mark.parametrize(
    "where", [k if k == "half written" else pytest.param(k, marks=pytest.mark.slow) for k in KILLS]
)
def test_after_kill_9_the_losses_are_those_of_the_uninterrupted_run(tmp_path, stage_run, where):
    config = first_stage()
    if where == "after step 3":
        params = {"step": 3, "number": int(signal.SIGKILL)}
        config["lightning"]["callbacks"] = {"k": {"target": "tiny_training.SignalAt", "params": params}}

    def act():
        KILLS[where]()
        run(config, tmp_path)

    assert in_child(act) == -signal.SIGKILL
    assert not (tmp_path / "weights.safetensors").exists()
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        assert find_damage(path) is None
    found, _ = read_newest(tmp_path / "checkpoints")
    assert found["global_step"] == 2
    run(first_stage(), tmp_path, resume=True)
    assert figures(tmp_path) == figures(stage_run)
    assert_same(state(tmp_path), state(stage_run))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_sigusr1_saves_and_goes_on(tmp_path, stage_run):
    config = first_stage()
    config["training"]["checkpoint_every"] = 100
    signals = {"step": 3, "number": int(signal.SIGUSR1)}
    kill = {"step": 5, "number": int(signal.SIGKILL)}
    config["lightning"]["callbacks"] = {
        "a": {"target": "tiny_training.SignalAt", "params": signals},
        "b": {"target": "tiny_training.SignalAt", "params": kill},
    }
    assert in_child(lambda: run(config, tmp_path)) == -signal.SIGKILL
    assert state(tmp_path)["global_step"] == 3


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path, stage_run, number):
    config = first_stage()
    params = {"step": 3, "number": int(number)}
    config["lightning"]["callbacks"] = {"k": {"target": "tiny_training.SignalAt", "params": params}}
    before = signal.getsignal(number)
    assert run(config, tmp_path).code == 128 + number
    assert signal.getsignal(number) == before
    assert state(tmp_path)["global_step"] == 3
    assert not (tmp_path / "weights.safetensors").exists()
    assert run(first_stage(), tmp_path, resume=True).code == 0
    assert_same(state(tmp_path), state(stage_run))


def test_a_second_signal_ends_at_once(tmp_path):
    config = first_stage()
    params = {"step": 3, "number": int(signal.SIGTERM), "times": 2}
    config["lightning"]["callbacks"] = {"k": {"target": "tiny_training.SignalAt", "params": params}}
    assert in_child(lambda: run(config, tmp_path)) == -signal.SIGTERM
    assert state(tmp_path)["global_step"] == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, stage_run, caplog):
    shutil.copytree(stage_run, tmp_path, dirs_exist_ok=True)
    last, previous = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "previous.ckpt"
    assert read_state(previous)["global_step"] == 4
    last.write_bytes(last.read_bytes()[:-1000])
    run(first_stage(), tmp_path, resume=True)
    assert "last.ckpt' is damaged" in caplog.text and "falling back" in caplog.text
    assert_same(state(tmp_path), state(stage_run))
    last.write_bytes(b"x")
    previous.write_bytes(b"")
    with pytest.raises(FormatError, match=r"no sound checkpoint is left in"):
        run(first_stage(), tmp_path, resume=True)


def test_a_flipped_byte_in_a_checkpoint_is_noticed(tmp_path, stage_run):
    source = stage_run / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(source.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    copy = tmp_path / "flipped.ckpt"
    copy.write_bytes(data)
    with pytest.raises(FormatError, match=r"is damaged: checksum of '.*' is wrong"):
        read_state(copy)


@pytest.mark.parametrize("key", checkpointing.NEEDED)
def test_a_state_that_lacks_something_is_refused(tmp_path, stage_run, key):
    whole = state(stage_run)
    del whole[key]
    torch.save(whole, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError, match=rf"lacks {key}, so the run cannot go on exactly") as caught:
        read_state(tmp_path / "a.ckpt")
    assert caught.value.exit_code == 5


@pytest.mark.slow
def test_states_of_other_runs_are_refused(tmp_path, stage_run, diffusion_run):
    path = stage_run / "checkpoints" / "last.ckpt"
    wider = first_stage()
    wider["model"]["params"]["ddconfig"]["ch_mult"] = [1, 2]
    with pytest.raises(MismatchError, match=r"of another model: \d+ tensors differ"):
        run(wider, tmp_path, resume=path)
    with pytest.raises(MismatchError, match=r"of a run with seed 5, asked for 6"):
        run(first_stage(), tmp_path, resume=path, seed=6)
    batch = first_stage()
    batch["data"]["params"]["batch_size"] = 3
    with pytest.raises(MismatchError, match=r"another order of data: global_batch 2, now 3"):
        run(batch, tmp_path, resume=path)
    gan = first_stage(disc_factor=1.0, disc_ndf=8)
    with pytest.raises(MismatchError, match=r"of a run with optimizers \['Adam'\], now \['Adam', 'Adam'\]"):
        run(gan, tmp_path, resume=path)
    scheduled = first_stage()
    factor = {"warm_up_steps": [1], "cycle_lengths": [6], "f_start": [1], "f_max": [1], "f_min": [0]}
    scheduled["training"]["scheduler"] = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": factor,
    }
    with pytest.raises(MismatchError, match=r"another learning-rate schedule"):
        run(scheduled, tmp_path, resume=path)
    newer = state(stage_run)
    newer["run"]["format"] = 3
    torch.save(newer, tmp_path / "newer.ckpt")
    with pytest.raises(MismatchError, match=r"written by a newer ldm \(format 3, known: 2\)"):
        run(first_stage(), tmp_path, resume=tmp_path / "newer.ckpt")
    with pytest.raises(MismatchError, match=r"no checkpoint in .* to resume from"):
        run(first_stage(), tmp_path, resume=tmp_path / "nowhere")


def test_a_folder_with_a_run_is_not_overwritten_by_accident(stage_run):
    with pytest.raises(UsageError, match=r"already holds a run; add --resume to go on"):
        run(first_stage(), stage_run)


def test_a_run_folder_takes_one_trainer_at_a_time(tmp_path):
    read, write = os.pipe()
    done_read, done_write = os.pipe()

    def hold():
        with RunLock(tmp_path):
            os.write(write, b"x")
            os.read(done_read, 1)

    pid = os.fork()
    if pid == 0:
        hold()
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(OutputError, match=r"is in use by another trainer") as caught:
        run(first_stage(), tmp_path)
    assert caught.value.exit_code == 7
    os.write(done_write, b"x")
    os.waitpid(pid, 0)
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").exists()


# -- what is not finite ------------------------------------------------------------------------------------


def not_finite(steps):
    config = first_stage()
    params = {"image_size": 16, "steps": steps}
    config["data"]["params"]["train"] = {"target": "tiny_training.NotFinite", "params": params}
    return config


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, caplog):
    run(not_finite([2]), tmp_path)
    saved = state(tmp_path)
    assert saved["run"]["guard"] == {"total": 1, "row": 0, "recent": [2]}
    assert all(torch.isfinite(t).all() for t in saved["state_dict"].values())
    assert saved["optimizer_states"][0]["state"][0]["step"] == 5
    assert "step 2: loss or gradient is not finite; step skipped (1 so far)" in caplog.text


@pytest.mark.slow
def test_ten_steps_in_a_row_end_the_run_and_keep_the_last_good_state(tmp_path):
    config = until(not_finite(list(range(4, 40))), 30)
    with pytest.raises(
        NumericError, match=r"stopped at step 13: 10 steps in a row were not finite"
    ) as caught:
        run(config, tmp_path)
    assert caught.value.exit_code == 8
    assert all(torch.isfinite(t).all() for t in state(tmp_path)["state_dict"].values())


def test_the_guard_counts_a_share_of_the_last_thousand_steps():
    guard = NonFiniteGuard()
    for step in range(0, 1000, 100):
        guard.record(step, False)
        guard.record(step + 1, True)
    guard.record(1000, False)  # step 0 has left the window
    with pytest.raises(NumericError, match=r"11 of the last 1000 steps were not finite"):
        guard.record(1050, False)


def test_weights_that_are_not_finite_are_never_written(tmp_path, stage_run):
    spoilt = state(stage_run)
    spoilt["state_dict"]["quant_conv.bias"][1] = float("inf")
    with pytest.raises(
        NumericError, match=r"'quant_conv.bias' is not finite at step 6; no checkpoint is written"
    ):
        checkpointing.save_state(tmp_path, spoilt)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_is_tried_again_and_then_ends_the_run(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OutputError("cannot write: disk full")

    monkeypatch.setattr(checkpointing, "save_object", refuse)
    with pytest.raises(OutputError, match=r"disk full"):
        run(first_stage(), tmp_path)
    assert caplog.text.count("trying again") == 2


# -- rates, optimizers, networks ---------------------------------------------------------------------------


def test_the_rate_follows_the_schedule_and_the_scale(diffusion_run, capsys):
    """LambdaLinearScheduler: warm-up over 2 steps from 0.1, then (6 - n) / 6; base 1e-3 times batch 2."""
    folder, _ = diffusion_run
    wanted = [0.1, 0.55, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    rates = figures(folder, "lr")
    assert [rates[step] for step in range(6)] == pytest.approx([2e-3 * f for f in wanted], rel=1e-12)


@pytest.mark.slow
def test_the_effective_rate_is_printed(tmp_path, capsys):
    config = until(first_stage(), 1)
    config["lightning"]["trainer"]["accumulate_grad_batches"] = 3
    run(config, tmp_path / "a")
    assert (
        "learning rate 6.00e-03 = 3 (accumulate) x 1 (devices) x 2 (batch) x 1.00e-03 (base)"
        in capsys.readouterr().out
    )
    run(config, tmp_path / "b", scale_lr=False)
    assert "learning rate 1.00e-03 (base, not scaled)" in capsys.readouterr().out
    assert figures(tmp_path / "b", "lr") == {0: 1e-3}


@pytest.mark.slow
def test_another_optimizer_takes_the_models_parameters(tmp_path, diffusion_run, stage_run):
    config = until(diffusion(str(stage_run / "weights.safetensors")), 1)
    config["training"]["optimizer"] = {"target": "torch.optim.SGD", "params": {"momentum": 0.5}}
    made = run(config, tmp_path)
    (optimizer,) = made.module.made
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["momentum"] == 0.5
    count = len(list(made.model.model.parameters())) + len(list(made.model.cond_stage_model.parameters()))
    assert len(optimizer.param_groups[0]["params"]) == count
    assert figures(tmp_path, "lr") == {0: pytest.approx(2e-4)}


def test_both_networks_of_a_gan_move_once_the_discriminator_starts(tmp_path):
    config = first_stage(disc_factor=1.0, disc_start=2, disc_ndf=8, disc_num_layers=1)
    torch.manual_seed(0)
    run(until(config, 2), tmp_path)
    before = state(tmp_path)["state_dict"]
    run(until(config, 4), tmp_path, resume=True)
    after = state(tmp_path)["state_dict"]
    for name in ("decoder.conv_out.weight", "encoder.conv_in.weight", "loss.discriminator.main.0.weight"):
        assert not torch.equal(before[name], after[name]), name
    weights = figures(tmp_path, "train/d_weight")
    assert sorted(weights) == [2, 3] and all(w > 0 for w in weights.values())
    judged = figures(tmp_path, "train/disc_loss")
    assert judged[0] == judged[1] == 0 and judged[2] > 0


@pytest.mark.slow
def test_the_discriminator_rests_before_its_start(tmp_path):
    config = first_stage(disc_factor=1.0, disc_start=9, disc_ndf=8, disc_num_layers=1)
    run(until(config, 1), tmp_path)
    first = state(tmp_path)["state_dict"]["loss.discriminator.main.0.weight"]
    run(until(config, 3), tmp_path, resume=True)
    assert torch.equal(first, state(tmp_path)["state_dict"]["loss.discriminator.main.0.weight"])


def test_accumulation_takes_its_batches_before_one_step(tmp_path):
    config = until(first_stage(), 2)
    config["lightning"]["trainer"]["accumulate_grad_batches"] = 3
    made = run(config, tmp_path)
    assert made.data.last_batch == 6
    assert state(tmp_path)["optimizer_states"][0]["state"][0]["step"] == 2
    assert sorted(figures(tmp_path)) == [0, 1]


@pytest.mark.slow
def test_accumulated_gradients_are_averaged(tmp_path):
    """Where every batch is the whole data and the posterior has no width, more batches change nothing."""
    norms = []
    for accumulate in (1, 3):
        config = until(first_stage(), 1)
        config["data"]["params"]["train"]["params"]["length"] = 2
        config["training"]["posterior_logvar_start"] = -30.0
        config["lightning"]["trainer"]["accumulate_grad_batches"] = accumulate
        run(config, tmp_path / str(accumulate))
        norms.append(figures(tmp_path / str(accumulate), "grad_norm")[0])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_clipping_bounds_the_step(tmp_path):
    config = until(first_stage(), 2)
    config["training"]["optimizer"] = {"target": "torch.optim.SGD", "params": {"lr": 1.0}}
    config["lightning"]["trainer"]["gradient_clip_val"] = 1e-3
    run(until(config, 1), tmp_path)
    first = state(tmp_path)["state_dict"]
    run(until(config, 2), tmp_path, resume=True)
    second = state(tmp_path)["state_dict"]
    moved = torch.cat([(second[k] - first[k]).flatten() for k in first if not k.startswith("loss.")]).norm()
    assert figures(tmp_path, "grad_norm")[1] > 1
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(tmp_path, stage_run):
    config = first_stage()
    config["lightning"]["trainer"]["precision"] = "bf16-mixed"
    config["training"]["channels_last"] = True
    run(config, tmp_path)
    exact, rough = figures(stage_run), figures(tmp_path)
    assert exact != rough
    assert all(abs(rough[step] - exact[step]) < 0.05 * exact[step] for step in exact)
    assert all(t.dtype == torch.float32 for t in state(tmp_path)["state_dict"].values())


def test_a_narrow_posterior_start_is_set_once(tmp_path):
    config = until(first_stage(), 1)
    config["training"]["posterior_logvar_start"] = -7.0
    config["model"]["base_learning_rate"] = 1e-12
    run(config, tmp_path)
    saved = state(tmp_path)["state_dict"]
    torch.testing.assert_close(saved["quant_conv.bias"][3:], torch.full((3,), -7.0), rtol=0, atol=1e-6)
    assert saved["quant_conv.weight"][3:].abs().max() < 1e-6 < saved["quant_conv.weight"][:3].abs().max()


@pytest.mark.slow
def test_the_text_encoder_has_a_rate_of_its_own(tmp_path, stage_run):
    """Plain gradient descent moves it by that factor of what it moves otherwise, and the network as before.

    Layers that start at zero keep its gradient at zero for two steps, so the third is its first.
    """
    ends = []
    for factor in (1.0, 0.5, 0.25):
        config = until(diffusion(str(stage_run / "weights.safetensors")), 3)
        config["training"].update(
            optimizer={"target": "torch.optim.SGD", "params": {"lr": 0.5}}, cond_stage_rate=factor
        )
        run(config, tmp_path / str(factor))
        ends.append(state(tmp_path / str(factor))["state_dict"])
    network = "model.diffusion_model.out.2.weight"
    assert torch.equal(ends[0][network], ends[1][network]) and torch.equal(ends[0][network], ends[2][network])
    bias = (
        "cond_stage_model.transformer.text_model.final_layer_norm.bias"  # starts at zero, so small moves show
    )
    assert ends[2][bias].abs().max() > 0
    for end, times in ((ends[0], 4), (ends[1], 2)):
        torch.testing.assert_close(end[bias], times * ends[2][bias], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_resumed_run_with_two_rates_is_the_uninterrupted_one(tmp_path, stage_run):
    config = diffusion(str(stage_run / "weights.safetensors"))
    config["training"]["cond_stage_rate"] = 0.25
    run(until(config, 3), tmp_path / "whole")
    run(until(config, 1), tmp_path / "parts")
    run(until(config, 3), tmp_path / "parts", resume=True)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(torch.equal(whole["state_dict"][k], parts["state_dict"][k]) for k in whole["state_dict"])
    rates = [[g["lr"] for g in s["optimizer_states"][0]["param_groups"]] for s in (whole, parts)]
    assert rates[0] == rates[1] and rates[0][1] == pytest.approx(0.25 * rates[0][0], rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), 1e9])
def test_a_rate_factor_out_of_range_is_refused(tmp_path, factor):
    config = diffusion()
    config["training"]["cond_stage_rate"] = factor
    with pytest.raises(UsageError, match=rf"cond_stage_rate should be .*up to 1000, got {factor}"):
        run(config, tmp_path)


def test_a_rate_for_a_text_encoder_that_is_not_trained_is_refused(tmp_path):
    config = diffusion(cond_stage_trainable=False)
    config["training"]["cond_stage_rate"] = 0.5
    with pytest.raises(UsageError, match="cond_stage_rate is 0.5, but no condition stage is trained"):
        run(config, tmp_path)


@pytest.mark.slow
def test_a_text_encoder_can_start_from_bare_words(tmp_path, stage_run):
    """Then a word's features depend on the word and its place alone."""
    config = until(diffusion(str(stage_run / "weights.safetensors")), 1)
    config["training"]["identity_start"] = True
    config["model"]["base_learning_rate"] = 1e-12
    made = run(config, tmp_path)
    encoder = made.model.cond_stage_model
    table = encoder.transformer.state_dict()
    for name in ("token_embedding.weight", "position_embedding.weight"):
        found = next(v for k, v in table.items() if k.endswith(name))
        assert found.std() == pytest.approx(1.0, rel=0.05)
    with torch.no_grad():
        one, other = encoder(["a red circle above a blue ring"]), encoder(["a red square above a pink ring"])
    torch.testing.assert_close(one[0, [1, 2, 4, 5, 7]], other[0, [1, 2, 4, 5, 7]], rtol=0, atol=1e-5)
    assert (one[0, [3, 6]] - other[0, [3, 6]]).abs().amax(dim=-1).min() > 0.5


def test_bare_words_need_a_text_encoder(tmp_path, stage_run):
    config = until(diffusion(str(stage_run / "weights.safetensors"), cond_stage_trainable=False), 1)
    config["training"]["identity_start"] = True
    config["model"]["params"]["conditioning_key"] = None
    config["model"]["params"]["cond_stage_config"] = "__is_unconditional__"
    with pytest.raises(UsageError, match=r"identity_start wants a CLIP text encoder .*, got NoneType"):
        run(config, tmp_path)


# -- what a run leaves -------------------------------------------------------------------------------------


def test_a_diffusion_run_leaves_averaged_weights_in_the_v1_layout(tmp_path, diffusion_run):
    from ldm.training.export import export_run

    folder, made = diffusion_run
    saved = state(folder)["state_dict"]
    tensors, metadata = read_tensors(folder / "weights.safetensors")
    assert metadata["global_step"] == "6" and metadata["seed"] == "5"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(tensors[name], saved["model_ema.diffusion_modelinput_blocks00weight"])
    assert not torch.equal(tensors[name], saved[name])
    assert saved["model_ema.num_updates"] == 6
    roots = {key.split(".")[0] for key in tensors}
    assert roots == {"model", "first_stage_model", "cond_stage_model", "scale_factor"}
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in tensors
    export_run(folder, tmp_path / "half.safetensors")
    halves, _ = read_tensors(tmp_path / "half.safetensors")
    assert halves.keys() == tensors.keys()
    assert halves[name].dtype == torch.float16 and halves["scale_factor"].dtype == torch.float32
    assert torch.equal(halves[name], tensors[name].half())


def test_an_exported_run_loads_with_an_account_of_every_tensor(tmp_path, diffusion_run):
    from ldm.checkpoints import load_latent_diffusion
    from ldm.training.export import export_run

    folder, made = diffusion_run
    export_run(folder, tmp_path / "a.safetensors", dtype=torch.float32)
    loaded, report = load_latent_diffusion(tmp_path / "a.safetensors")
    assert not loaded.use_ema and any("a.yaml', found beside the file" in note for note in report.notes)
    with made.model.ema_scope():
        for (name, mine), (_, theirs) in zip(
            made.model.model.named_parameters(), loaded.model.named_parameters(), strict=True
        ):
            assert torch.equal(mine, theirs), name
    assert torch.equal(loaded.scale_factor, made.model.scale_factor)


@pytest.mark.slow
def test_an_export_writes_its_configuration_for_use_and_over_nothing_else(
    tmp_path, diffusion_run, monkeypatch
):
    from ldm.training.export import MARK, export_run, settings_for_use

    folder, _ = diffusion_run
    path, beside = tmp_path / "a.safetensors", tmp_path / "a.yaml"
    export_run(folder, path)
    text = beside.read_text()
    assert text.startswith(MARK) and text == (folder / "weights.yaml").read_text()
    params = OmegaConf.to_container(OmegaConf.load(beside))["model"]["params"]
    assert params["use_ema"] is False and "scheduler_config" not in params
    assert "ckpt_path" not in params["first_stage_config"]["params"]
    export_run(folder, path)  # over its own
    beside.write_text("model: {}")
    path.unlink()
    with pytest.raises(OutputError, match="a.yaml' is there and not of an export"):
        export_run(folder, path)
    assert beside.read_text() == "model: {}" and not path.exists()

    # A text encoder of one's own is named from the weights' folder; one that ships by its own name.
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for version, written in (("mine", "../mine"), ("model_data/shapes/text", "model_data/shapes/text")):
        config = diffusion()
        config["model"]["params"]["cond_stage_config"]["params"] = {"version": version}
        made = settings_for_use(config, tmp_path / "out")["model"]["params"]
        assert made["cond_stage_config"]["params"]["version"] == written
    advised = settings_for_use({**diffusion(), "sampling": {"steps": 20}}, tmp_path)
    assert advised["sampling"] == {"steps": 20}  # how to paint goes with the weights


def test_the_scale_factor_is_measured_on_the_first_batch(diffusion_run):
    from ldm.training.data import Shapes, Stream
    from ldm.training.draws import Draws

    _, made = diffusion_run
    batch = Stream(Shapes(image_size=16), 2, seed=5)[0]
    z = made.module.objective.latents(batch, Draws(5, 0))
    assert float(made.model.scale_factor) == pytest.approx(1 / float(z.flatten().std()), rel=1e-6)


@pytest.mark.slow
def test_cached_latents_train_like_pictures(tmp_path, stage_run):
    """The same samples in the same order, up to the cache's half precision."""
    weights = str(stage_run / "weights.safetensors")
    finite = {"target": "tiny_training.Finite", "params": {"image_size": 16, "length": 3}}
    losses = []
    for cached in (0, -1):
        config = until(diffusion(weights), 2)
        config["data"]["params"].update(train=finite, cache_latents=cached)
        run(config, tmp_path / str(cached))
        losses.append(figures(tmp_path / str(cached)))
    assert len(list((tmp_path / "-1" / "latents").glob("*.safetensors"))) == 1
    assert state(tmp_path / "-1")["epoch"] == 1  # 4 samples of 3
    for step in range(2):
        assert losses[1][step] == pytest.approx(losses[0][step], rel=2e-3)


@pytest.mark.slow
def test_grids_curve_validation_and_configuration_are_written_while_it_runs(tmp_path, stage_run, capsys):
    from PIL import Image

    config = until(diffusion(str(stage_run / "weights.safetensors")), 3)
    validation = {"image_size": 16, "length": 5, "seed": 1, "split": "any"}
    config["data"]["params"]["validation"] = {"target": "ldm.training.data.Shapes", "params": validation}
    config["training"].update(
        validate_every=3, validation_batches=2, curve_every=2, print_every=0, image_steps=2
    )
    logger = {"batch_frequency": 2, "max_images": 3, "increase_log_steps": False}
    config["lightning"]["callbacks"] = {"image_logger": {"target": "main.ImageLogger", "params": logger}}
    run(config, tmp_path)
    out = capsys.readouterr().out
    assert "step 2/3 loss" in out and "step 3 val/loss_simple" in out
    assert list(figures(tmp_path, "val/loss_simple")) == [2]
    names = sorted(p.name for p in (tmp_path / "images" / "train").iterdir())
    assert names == [f"{k}_gs-000002_e-000000_b-000001.png" for k in ("conditioning", "inputs", "samples")]
    assert Image.open(tmp_path / "images" / "train" / names[2]).size == (3 * 18 + 2, 20)
    assert Image.open(tmp_path / "loss.png").size[0] == 800
    assert OmegaConf.load(tmp_path / "configs" / "project.yaml").model.params.timesteps == 50


@pytest.mark.slow
def test_validation_and_pictures_do_not_change_a_run(tmp_path, stage_run):
    config = first_stage()
    validation = {"image_size": 16, "length": 5, "seed": 1}
    config["data"]["params"]["validation"] = {"target": "ldm.training.data.Shapes", "params": validation}
    config["training"].update(validate_every=1)
    logger = {"batch_frequency": 1, "max_images": 2}
    config["lightning"]["callbacks"] = {"image_logger": {"target": "main.ImageLogger", "params": logger}}
    run(config, tmp_path)
    assert_same(state(tmp_path), state(stage_run))
    psnr = figures(tmp_path, "val/psnr")
    assert sorted(psnr) == list(range(6)) and all(0 < value < 40 for value in psnr.values())


# -- two processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gan", "diffusion"])
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(tmp_path, stage_run, kind):
    import subprocess
    import sys
    from pathlib import Path

    if kind == "gan":
        # Batch statistics are each process's own, as in any data-parallel training; without them, all is equal.
        config = first_stage(disc_factor=1.0, disc_start=1, disc_ndf=8, disc_num_layers=0)
    else:
        config = diffusion(str(stage_run / "weights.safetensors"))
    config["data"]["params"]["batch_size"] = 4
    run(config, tmp_path / "one")
    config["data"]["params"]["batch_size"] = 2
    config["lightning"]["trainer"]["devices"] = 2
    OmegaConf.save(OmegaConf.create(config), tmp_path / "two.yaml")
    script = Path(tiny_training.__file__).parents[1] / "scripts" / "train.py"
    words = ["--base", tmp_path / "two.yaml", "--logdir", tmp_path / "two", "--seed", "5"]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(6))
    # The gradients are sums in another order: the last digits differ, and grow a little with every step.
    assert all(abs(one[step] - two[step]) <= 1e-5 * abs(one[step]) for step in one), (one, two)


# -- what a caller can get wrong ---------------------------------------------------------------------------


def changed(path, value):
    config = first_stage()
    *way, last = path.split(".")
    node = config
    for name in way:
        node = node.setdefault(name, {})
    node[last] = value
    return config


@pytest.mark.parametrize(
    "path, value, error, message",
    [
        ("model.base_learning_rate", float("nan"), UsageError, "base_learning_rate should be .* got nan"),
        ("model.base_learning_rate", -1.0, UsageError, "model.base_learning_rate should be .* got -1.0"),
        ("model.base_learning_rate", 0.0, UsageError, "above 0 and at most 10, got 0; set model.base_le"),
        ("model.base_learning_rate", 9.0, UsageError, "above 0 and at most 10, got 18; set model.base_le"),
        ("model.base_learning_rate", 1e9, UsageError, "a number from 0 to 10, got 1000000000.0"),
        (
            "lightning.trainer.max_steps",
            0,
            UsageError,
            "max_steps should be a whole number from 1 to .* got 0",
        ),
        ("lightning.trainer.max_steps", None, UsageError, "got None"),
        (
            "lightning.trainer.precision",
            "64",
            UsageError,
            "'32-true'/.*'bf16-mixed'/.*'16-mixed'/.* got '64'",
        ),
        ("lightning.trainer.accumulate_grad_batches", 0, UsageError, "batches should be a whole .* got 0"),
        ("lightning.trainer.max_epoch", 3, UsageError, "'lightning.trainer' has no option 'max_epoch'"),
        (
            "+model.base_learning_rate",
            1.0,
            UsageError,
            "'the configuration' has no option '.model'; did you mean 'model'",
        ),
        ("training.chanels_last", True, UsageError, "no option 'chanels_last'; did you mean 'channels_last'"),
        ("data.params.train.params.length", 1, MismatchError, "holds 1 samples but one batch takes 2"),
        (
            "data.params.cache_latents",
            4,
            MismatchError,
            "cache_latents needs a LatentDiffusion, got AutoencoderKL",
        ),
        ("data.target", "ldm.training.data.Shapes", MismatchError, "has no parameter 'train'"),
        ("training.optimizer", {"target": "torch.optim.Adam", "params": {"lrr": 1}}, MismatchError, "lrr"),
        (
            "lightning.callbacks.a",
            {"target": "torch.nn.Identity"},
            MismatchError,
            "lightning.callbacks.a is no callback but a Identity",
        ),
    ],
)
def test_wrong_values_are_named(tmp_path, path, value, error, message):
    with pytest.raises(error, match=message):
        run(changed(path, value), tmp_path)


def test_configurations_without_a_model_or_with_another_kind_are_refused(tmp_path):
    config = first_stage()
    config["model"] = {"target": "torch.nn.Identity"}
    with pytest.raises(MismatchError, match=r"should be an AutoencoderKL or a diffusion model, got Identity"):
        run(config, tmp_path)
    del config["model"]
    with pytest.raises(FormatError, match=r"needs 'model' and 'data', but 'model' is missing"):
        run(config, tmp_path)


def test_a_text_encoder_to_be_trained_must_not_be_frozen(tmp_path):
    config = diffusion()
    config["model"]["params"]["cond_stage_config"]["params"]["freeze"] = True
    with pytest.raises(UsageError, match=r"set cond_stage_config\.params\.freeze: false"):
        run(config, tmp_path)


@pytest.mark.parametrize("source, params", [("DiesAt", {"step": 4}), ("DiesHandingOver", {})])
@pytest.mark.thinned(2)
def test_a_killed_loader_worker_ends_the_run_saved(tmp_path, source, params):
    from ldm.errors import ResourceError

    config = first_stage()
    config["data"]["params"]["num_workers"] = 1
    config["data"]["params"]["train"] = {
        "target": f"tiny_training.{source}",
        "params": {"image_size": 16, **params},
    }
    # torch's handler of a lost process raises wherever the program is; what it is amid of is not saved.
    ends = r"a loader process died at step \d .*; (the run is saved|its last checkpoint is kept): free memory"

    def act():  # in a process of its own, for the handler may raise after the run as well
        with pytest.raises(ResourceError, match=ends) as caught:
            run(config, tmp_path)
        os._exit(7 if "the run is saved" in str(caught.value) else 8)

    code = in_child(act)
    assert code in (7, 8)
    if code == 7:
        assert state(tmp_path)["global_step"] >= 2
