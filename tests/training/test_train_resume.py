"""Going on with a run, option by option and part by part; and which start a loaded weight keeps."""

import copy
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from tiny_training import diffusion, figures, first_stage, put, run

from ldm.checkpoints import read_tensors, save_safetensors
from ldm.errors import FormatError, MismatchError, UsageError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.paths import shipped
from ldm.training.checkpointing import read_state
from ldm.training.data import Stream
from ldm.training.draws import Draws
from ldm.training.resumption import compare
from ldm.training.trainer import Run, RunOptions

FACTOR = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [2],
        "cycle_lengths": [6],
        "f_start": [0.1],
        "f_max": [1.0],
        "f_min": [0.0],
    },
}
ADAM = {"target": "torch.optim.AdamW", "params": {"betas": [0.8, 0.95], "weight_decay": 0.125}}


def until(config, steps):
    config["lightning"]["trainer"]["max_steps"] = steps
    return config


def planned():
    """A first-stage run whose optimizer and schedule are written out."""
    config = first_stage()
    config["training"] |= {"optimizer": copy.deepcopy(ADAM), "scheduler": copy.deepcopy(FACTOR)}
    return config


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Two steps of it."""
    folder = tmp_path_factory.mktemp("begun")
    run(until(planned(), 2), folder)
    return folder


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory):
    """A diffusion run of one step."""
    return run(until(diffusion(), 1), tmp_path_factory.mktemp("begun-diffusion"))


@pytest.fixture(scope="module")
def begun_diffusion(diffusion_run):
    return diffusion_run.options.folder


# -- options that a resumed run takes: what it then really does, read off the optimizer and the run -----------------

# Option, new value, what is read of the run (an option of the optimizer's group by its name), what it then is after one
# more step. The factor of the schedule at that step is 4/6; the options are independent, so one run takes them all.
TAKEN = (
    ("model.base_learning_rate", 5e-4, "initial_lr", 1e-3),
    ("training.optimizer.params.weight_decay", 0.5, "weight_decay", 0.5),
    ("training.optimizer.params.betas", [0.5, 0.75], "betas", [0.5, 0.75]),
    ("training.optimizer.params.eps", 0.0625, "eps", 0.0625),
    (
        "training.scheduler.params.f_max",
        [3.0],
        lambda made: figures(made.options.folder, "lr")[2],
        1e-3 * 3 * 4 / 6,
    ),
    ("lightning.trainer.gradient_clip_val", 0.375, lambda made: made.module.clip, 0.375),
    ("lightning.trainer.precision", "bf16-mixed", lambda made: made.precision, "bf16-mixed"),
    ("training.channels_last", True, lambda made: made.module.objective.memory_format, torch.channels_last),
    ("model.params.lossconfig.params.kl_weight", 0.125, lambda made: made.model.loss.kl_weight, 0.125),
    ("model.params.ddconfig.dropout", 0.25, lambda made: made.model.encoder.mid.block_1.dropout.p, 0.25),
    ("data.params.train.params.paraphrase", 0.5, lambda made: made.data.train_source.scenes.paraphrase, 0.5),
)


@pytest.fixture(scope="module")
def changed(tmp_path_factory, begun):
    """The run gone on with another value of every one of them, and what it printed."""
    import contextlib
    import io

    config = until(planned(), 3)
    for option, value, *_ in TAKEN:
        put(config, option, value)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        made = run(config, tmp_path_factory.mktemp("changed"), resume=begun / "checkpoints" / "last.ckpt")
    return made, printed.getvalue().splitlines()


@pytest.mark.parametrize("option, value, read, wanted", TAKEN, ids=[row[0] for row in TAKEN])
def test_an_option_that_a_resumed_run_takes(changed, option, value, read, wanted):
    made, printed = changed
    found = made.module.made[0].param_groups[0][read] if isinstance(read, str) else read(made)
    found = list(found) if isinstance(wanted, list) else found
    assert found == (pytest.approx(wanted, rel=1e-12) if isinstance(wanted, float) else wanted)
    name = "learning_rate" if option == "model.base_learning_rate" else option
    assert len([line for line in printed if line.startswith(f"resuming with {name} ")]) == 1


def test_every_option_that_changed_is_said_and_no_other(changed):
    assert len([line for line in changed[1] if line.startswith("resuming with ")]) == len(TAKEN)


@pytest.mark.parametrize(
    "option, value, rate",
    [
        ("training.optimizer.params.lr", 0.25, 0.25 * 4 / 6),
        ("training.scheduler.target", "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2", 2e-3),
    ],
)
@pytest.mark.thinned(2)
def test_a_rate_or_schedule_of_its_own_is_taken(tmp_path, begun, option, value, rate):
    config = until(planned(), 3)
    put(config, option, value)
    run(config, tmp_path, resume=begun / "checkpoints" / "last.ckpt")
    assert figures(tmp_path, "lr")[2] == pytest.approx(rate, rel=1e-12)


def test_an_option_of_the_command_line_alone_is_taken(tmp_path, begun, capsys):
    made = run(until(planned(), 3), tmp_path, resume=begun / "checkpoints" / "last.ckpt", scale_lr=False)
    assert made.module.made[0].param_groups[0]["initial_lr"] == 1e-3
    assert "resuming with learning_rate 0.001 instead of 0.002" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_schedule_a_new_rate_holds_from_the_first_step_on(tmp_path, capsys):
    run(until(first_stage(), 2), tmp_path)
    config = until(first_stage(), 4)
    config["model"]["base_learning_rate"] = 4e-3
    run(config, tmp_path, resume=True)
    assert figures(tmp_path, "lr") == {0: 2e-3, 1: 2e-3, 2: 8e-3, 3: 8e-3}


@pytest.mark.slow
def test_a_part_s_own_rate_is_taken(tmp_path):
    for steps, factor in ((1, 0.25), (2, 0.5)):
        config = until(diffusion(), steps)
        config["training"]["cond_stage_rate"] = factor
        made = run(config, tmp_path, resume=True)
    assert [group["initial_lr"] for group in made.module.made[0].param_groups] == [2e-3, 1e-3]


def test_an_unchanged_option_is_not_spoken_of(tmp_path, begun, capsys):
    run(until(planned(), 3), tmp_path, resume=begun / "checkpoints" / "last.ckpt")
    assert "resuming with" not in capsys.readouterr().out


def test_a_run_that_has_all_its_steps_says_so(tmp_path, begun, capsys):
    with pytest.raises(
        UsageError, match="is at step 2 and lightning.trainer.max_steps is 1, so nothing is left"
    ):
        run(until(planned(), 1), tmp_path, resume=begun / "checkpoints" / "last.ckpt")
    run(until(planned(), 2), begun, resume=True)
    assert "nothing is left to do: step 2 of 2 is done" in capsys.readouterr().out


# -- options that are refused ---------------------------------------------------------------------------------------

REFUSED = [
    ("training.optimizer", {"target": "torch.optim.SGD"}, "optimizers .*'AdamW'.* now .*'SGD'"),
    ("training.optimizer.target", "torch.optim.Adam", "optimizers .*'AdamW'.* now .*'Adam'"),
    ("training.optimizer", None, "optimizers .*'AdamW'.* now .*'Adam'"),
    ("training.optimizer.params.amsgrad", True, "lacks max_exp_avg_sq in optimizer_states.0..state.0."),
    ("training.scheduler", None, "another learning-rate schedule"),
    ("data.params.batch_size", 3, "another order of data: global_batch 2, now 3"),
    ("lightning.trainer.accumulate_grad_batches", 2, "another order of data: accumulate 1, now 2"),
    ("data.params.shuffle", False, "another order of data: shuffle True, now False"),
    ("data.params.train.params.length", 50, "another order of data: length"),
    (
        "data.params.train.target",
        "tiny_training.NotFinite",
        "data.params.train.target .* now 'tiny_training.NotF",
    ),
    ("model.params.ddconfig.ch_mult", [1, 2], "of another model"),
]


@pytest.mark.parametrize("option, value, message", REFUSED, ids=str)
@pytest.mark.thinned(3)
def test_an_option_that_a_resumed_run_refuses(tmp_path, begun, option, value, message):
    config = until(planned(), 3)
    put(config, option, value)
    path = begun / "checkpoints" / "last.ckpt"
    with pytest.raises(MismatchError, match=message) as caught:
        run(config, tmp_path, resume=path)
    assert caught.value.exit_code == 5 and len(str(caught.value)) < 500 and "\n" not in str(caught.value)


MEANING = (
    "timesteps 60, linear_end 0.02, linear_start 0.001, beta_schedule cosine, given_betas 0.5, parameterization v, "
    "v_posterior 0.5, logvar_init 0.5, learn_logvar 1, use_ema 0, scale_factor 0.5, scale_by_std 0, ema_rate 0.5, "
    "diffusion_steps 60, noise_schedule cosine, predict_xstart 1, learn_sigma 1, target x.Y, cosine_s 0.5"
)


@pytest.mark.parametrize("name, value", [pair.split() for pair in MEANING.split(", ")])
def test_what_the_weights_mean_cannot_change_within_a_run(tmp_path, name, value):
    place = {
        "model": {"target" if name == "target" else "params": value if name == "target" else {name: value}}
    }
    with pytest.raises(
        MismatchError, match=rf"of a run with model.(params.)?{name} .* cannot change within a run"
    ):
        compare({"model": {"params": {}}}, place, tmp_path)


@pytest.mark.slow
def test_another_noise_schedule_is_refused(tmp_path, begun_diffusion):
    path = begun_diffusion / "checkpoints" / "last.ckpt"
    with pytest.raises(MismatchError, match="linear_end 0.012, now 0.02; that cannot change within a run"):
        run(until(diffusion(linear_end=0.02), 2), tmp_path, resume=path)


@pytest.mark.parametrize(
    "place",
    ["model.params.ckpt_path", "model.params.first_stage_config.params.ckpt_path", "model.params.ignore_keys"]
    + ["model.params.load_only_unet", "model.params.finetune_keys", "training.identity_start"]
    + ["training.posterior_logvar_start", "model.params.reset_ema"],
)
def test_what_acts_before_the_first_step_is_said_to_have_no_effect(tmp_path, caplog, place):
    new = {}
    put(new, place, "x")
    old = {}
    put(old, place, None)
    assert compare(old, new, tmp_path) == []
    assert f"{place} is now 'x' instead of None, which has no effect on a resumed run" in caplog.text


def test_another_seed_is_refused(tmp_path, begun):
    with pytest.raises(MismatchError, match="of a run with seed 5, asked for 6"):
        run(until(planned(), 3), tmp_path, resume=begun / "checkpoints" / "last.ckpt", seed=6)


# -- states that are not whole --------------------------------------------------------------------------------------


def older(state):
    """Make a state of what the format before this one held."""
    state["run"]["format"] = 1
    del state["run"]["moments"], state["run"]["options"]


def first(state):
    return state["optimizer_states"][0]


FLAWS = {
    "no optimizer": (lambda s: s.update(optimizer_states=[]), "of other optimizers"),
    "optimizers are a dict": (
        lambda s: s.update(optimizer_states={}),
        "'optimizer_states' that is no list but a dict",
    ),
    "an optimizer is a list": (
        lambda s: s.update(optimizer_states=[[]]),
        "has no mapping in optimizer_states.0.",
    ),
    "no moments at all": (
        lambda s: first(s).update(state={}),
        "lacks all moments .step, exp_avg, exp_avg_sq.",
    ),
    "no moments in an older state": (
        lambda s: (older(s), first(s).update(state={})),
        "lacks all moments .step, exp_avg, exp_avg_sq. in optimizer_states.0.",
    ),
    "one parameter's moments": (
        lambda s: first(s)["state"].pop(3),
        r"lacks moments in optimizer_states\[0\]: \d+ of",
    ),
    "one moment": (
        lambda s: first(s)["state"][3].pop("exp_avg_sq"),
        r"lacks exp_avg_sq in optimizer_states\[0\].stat",
    ),
    "a step count": (
        lambda s: first(s)["state"][3].pop("step"),
        r"lacks step in optimizer_states\[0\].state\[3\]",
    ),
    "a moment is None": (lambda s: first(s)["state"][3].update(exp_avg=None), "lacks exp_avg in"),
    "a moment misshapen": (
        lambda s: first(s)["state"][3].update(exp_avg=torch.zeros(5, 7)),
        r"'exp_avg' in optimizer_states\[0\].state\[3\] is of shape \[5, 7\], wanted finite numbers of shape",
    ),
    "a moment not finite": (
        lambda s: first(s)["state"][3]["exp_avg"].fill_(float("nan")),
        "'exp_avg' .* not finite",
    ),
    "a foreign moment": (
        lambda s: first(s)["state"][3].update(more=torch.zeros(1)),
        "has more, of another kind",
    ),
    "moments of nothing": (lambda s: first(s)["state"].update({999: {}}), "has moments of a parameter 999"),
    "an entry is a list": (
        lambda s: first(s)["state"].update({3: []}),
        "'state' that is no mapping of moments",
    ),
    "state is a list": (lambda s: first(s).update(state=[]), "'state' that is no mapping of moments"),
    "no state": (lambda s: first(s).pop("state"), "lacks 'state' in optimizer_states.0."),
    "no groups": (lambda s: first(s).pop("param_groups"), "lacks 'param_groups' in optimizer_states.0."),
    "groups without params": (
        lambda s: first(s)["param_groups"][0].pop("params"),
        "without lists of 'params'",
    ),
    "fewer params": (
        lambda s: first(s)["param_groups"][0]["params"].pop(),
        "of other optimizers|does not list",
    ),
    "no schedule": (lambda s: s.update(lr_schedulers=[]), "of other optimizers"),
    "schedule None": (lambda s: s.update(lr_schedulers=[None]), "another learning-rate schedule"),
    "schedule without its step": (
        lambda s: s["lr_schedulers"][0].pop("last_epoch"),
        "lacks the step count 'last_epo",
    ),
    "schedule at another step": (
        lambda s: s["lr_schedulers"][0].update(last_epoch=9),
        "is at step 9, the run at 2",
    ),
    "schedule with a text": (
        lambda s: s["lr_schedulers"][0].update(last_epoch="2"),
        "lacks the step count 'last_epoc",
    ),
    "global_step a text": (lambda s: s.update(global_step="2"), "has a 'global_step' that is no step count"),
    "global_step negative": (lambda s: s.update(global_step=-1), "has a 'global_step' that is no step count"),
    "epoch None": (lambda s: s.update(epoch=None), "has a 'epoch' that is no step count"),
    "run a list": (lambda s: s.update(run=[]), "'run' that is no dict but a list"),
    "guard empty": (lambda s: s["run"].update(guard={}), "lacks run.guard.total"),
    "guard a list": (lambda s: s["run"].update(guard=[]), "'guard' that is no dict"),
    "guard of texts": (lambda s: s["run"]["guard"].update(recent=["x"]), "run.guard that is no count"),
    "seed a text": (lambda s: s["run"].update(seed="x"), "'run.seed' that is no whole number"),
    "data a list": (lambda s: s["run"].update(data=[]), "'data' that is no dict"),
    "data without length": (lambda s: s["run"]["data"].pop("length"), "another order of data: length None"),
    "no seed": (lambda s: s["run"].pop("seed"), "lacks run.seed"),
    "no options": (lambda s: s["run"].pop("options"), "lacks run.options"),
    "no count of moments": (lambda s: s["run"].pop("moments"), "lacks run.moments"),
    "too few counts": (lambda s: s["run"].update(moments=[]), "lacks run.moments|of other optimizers"),
    "no format": (lambda s: s["run"].pop("format"), "lacks run.format"),
    "weights a list": (lambda s: s.update(state_dict=[]), "'state_dict' that is no dict but a list"),
    "a weight is a number": (
        lambda s: s["state_dict"].update({"quant_conv.bias": 1}),
        "'quant_conv.bias' .* no tensor",
    ),
    "a weight not finite": (
        lambda s: s["state_dict"]["quant_conv.bias"].fill_(float("inf")),
        "'quant_conv.bias' in state_dict that is not finite",
    ),
    "a weight missing": (
        lambda s: s["state_dict"].pop("quant_conv.bias"),
        "of another model: 1 tensors differ",
    ),
    "a weight misshapen": (
        lambda s: s["state_dict"].update({"quant_conv.bias": torch.zeros(2)}),
        "of another model: 1 tensors differ, first 'quant_conv.bias'",
    ),
}


@pytest.fixture(scope="module")
def sound(begun):
    """The state that `begun` left."""
    return torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory, begun):
    """A run that has gone on from the sound state, to be given others."""
    return run(until(planned(), 3), tmp_path_factory.mktemp("to"), resume=begun / "checkpoints" / "last.ckpt")


# One more place or kind of a flaw that another row has.
MORE_FLAWS = {
    "optimizers are a dict", "no moments in an older state", "a step count", "a moment is None", "a foreign moment",
    "moments of nothing", "an entry is a list", "state is a list", "no groups", "groups without params",
    "schedule None", "schedule with a text", "global_step a text", "epoch None", "guard a list", "guard of texts",
    "seed a text", "data a list", "no options", "no count of moments", "too few counts", "no format",
    "weights a list", "a weight misshapen",
}  # fmt: skip


@pytest.mark.parametrize(
    "flaw", [pytest.param(flaw, marks=[pytest.mark.slow] * (flaw in MORE_FLAWS)) for flaw in FLAWS]
)
@pytest.mark.thinned(3)
def test_a_state_that_is_not_whole_ends_with_one_line_and_changes_nothing(tmp_path, sound, receiver, flaw):
    change, message = FLAWS[flaw]
    state = copy.deepcopy(sound)
    change(state)
    torch.save(state, tmp_path / "a.ckpt")
    before = [tensor.clone() for tensor in receiver.model.state_dict().values()]
    with pytest.raises(MismatchError, match=message) as caught:
        read = read_state(tmp_path / "a.ckpt")
        receiver._check(read, tmp_path / "a.ckpt")
        receiver.module.load_training_state(read)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    after = receiver.model.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_flaw_ends_the_run_itself(tmp_path, begun):
    state = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    first(state)["state"].clear()
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError, match="lacks all moments"):
        run(until(planned(), 3), tmp_path / "run", resume=tmp_path / "a.ckpt")


@pytest.mark.thinned(2)
def test_a_diffusion_state_without_a_counter_or_table_is_refused(diffusion_run, begun_diffusion):
    state = torch.load(begun_diffusion / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("model_ema.num_updates", "model_ema.decay", "scale_factor", "betas"):
        spoilt = {**state, "state_dict": {k: v for k, v in state["state_dict"].items() if k != name}}
        with pytest.raises(MismatchError, match=f"1 tensors differ, first '{name}'"):
            diffusion_run.module.load_training_state(spoilt)


@pytest.mark.slow
def test_a_state_of_the_format_before_goes_on(tmp_path, begun):
    state = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    older(state)
    torch.save(state, tmp_path / "a.ckpt")
    assert run(until(planned(), 3), tmp_path / "run", resume=tmp_path / "a.ckpt").module.step == 3
    assert read_state(tmp_path / "run" / "checkpoints" / "last.ckpt")["run"]["format"] == 2


@pytest.mark.slow
def test_a_noise_schedule_is_known_by_its_tables_where_no_options_were_saved(tmp_path, begun_diffusion):
    state = torch.load(begun_diffusion / "checkpoints" / "last.ckpt", weights_only=True)
    older(state)
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(MismatchError, match="of another noise schedule: 'betas' differs"):
        run(until(diffusion(linear_end=0.02), 2), tmp_path / "run", resume=tmp_path / "a.ckpt")


def test_a_state_that_cannot_be_read_stays_a_matter_of_its_file(tmp_path, begun):
    (tmp_path / "a.ckpt").write_bytes((begun / "checkpoints" / "last.ckpt").read_bytes()[:-100])
    with pytest.raises(FormatError):
        run(until(planned(), 3), tmp_path / "run", resume=tmp_path / "a.ckpt")


# -- a checkpoint that is set wins over a start that was asked for --------------------------------------------------


@pytest.fixture(scope="module")
def stage_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage-file")
    run(until(first_stage(), 1), folder)
    return str(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def diffusion_file(begun_diffusion):
    """A whole model as a run leaves it, with a scale factor of its own."""
    return str(begun_diffusion / "weights.safetensors")


def started(config, folder):
    """A model as it is before its first step."""
    made = Run(RunOptions(config=OmegaConf.create(config), folder=folder, seed=5))
    batch = Stream(made.data.train_source, 2, seed=5)[0]
    made._objective().prepare(batch, Draws(5, 0), lambda values: values)
    return made.model


@pytest.mark.parametrize("start", [{"identity_start": True}, {"posterior_logvar_start": -6.0}, {}])
def test_a_first_stage_that_was_loaded_is_not_drawn_anew(tmp_path, stage_file, caplog, start):
    config = first_stage()
    config["model"]["params"]["ckpt_path"] = stage_file
    config["training"] |= start
    mine = started(config, tmp_path).state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in read_tensors(stage_file)[0].items())
    for name in start:
        assert f"training.{name} is left out: the first stage's weights were loaded" in caplog.text
    assert bool(start) == ("is left out" in caplog.text)


def test_a_whole_run_begins_with_what_was_loaded(tmp_path, stage_file):
    config = until(first_stage(), 1)
    config["model"] |= {
        "base_learning_rate": 1e-12,
        "params": {**config["model"]["params"], "ckpt_path": stage_file},
    }
    config["training"] |= {"identity_start": True, "posterior_logvar_start": -6.0}
    mine = run(config, tmp_path).model.state_dict()
    for name, tensor in read_tensors(stage_file)[0].items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-6)


def test_a_fresh_first_stage_starts_as_asked(tmp_path, caplog):
    config = first_stage()
    config["training"] |= {"identity_start": True, "posterior_logvar_start": -6.0}
    model = started(config, tmp_path)
    assert not model.decoder.mid.block_1.conv2.weight.any()
    assert torch.equal(model.quant_conv.bias[3:], torch.full((3,), -6.0))
    assert "left out" not in caplog.text


def embedding(tensors):
    return next(tensors[name] for name in tensors if name.endswith("token_embedding.weight"))


# What is loaded, and whether the condition stage and the scale factor are then kept.
LOADED = {
    "nothing": ({}, False, False),
    "the first stage alone": ({"first_stage": True}, False, False),
    "the whole model": ({"ckpt_path": True}, True, True),
    "the network alone": ({"ckpt_path": True, "load_only_unet": True}, False, False),
    "all but the condition stage": ({"ckpt_path": True, "ignore_keys": ["cond_stage_model"]}, False, True),
}


@pytest.mark.parametrize("case", LOADED)
@pytest.mark.thinned(2)
def test_only_what_was_loaded_is_kept_from_a_start(tmp_path, stage_file, diffusion_file, caplog, case):
    given, keeps_words, keeps_scale = LOADED[case]
    given = dict(given)
    config = diffusion(stage_file if given.pop("first_stage", False) else None, **given)
    if "ckpt_path" in given:
        config["model"]["params"]["ckpt_path"] = diffusion_file
    config["training"]["identity_start"] = True
    theirs, mine = read_tensors(diffusion_file)[0], started(config, tmp_path).state_dict()
    same = torch.equal(embedding(mine), embedding(theirs))
    assert same == keeps_words == ("identity_start is left out" in caplog.text)
    if not keeps_words:
        assert embedding(mine).std() == pytest.approx(1.0, rel=0.05)
    assert (float(mine["scale_factor"]) == float(theirs["scale_factor"])) == keeps_scale
    network = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(mine[network], theirs[network]) == ("ckpt_path" in given)
    assert ("scale_by_std is left out" in caplog.text) == ("load_only_unet" in given)


def test_a_text_encoder_that_found_its_weights_keeps_them(tmp_path, caplog):
    """`version` may be a folder with weights of its own."""
    folder = tmp_path / "text"
    shutil.copytree(shipped("model_data/shapes/text/config.json").parent, folder)
    source = FrozenCLIPEmbedder(str(folder), max_length=32).transformer.state_dict()
    save_safetensors(folder / "model.safetensors", source)
    config = diffusion()
    config["model"]["params"]["cond_stage_config"]["params"]["version"] = str(folder)
    config["training"]["identity_start"] = True
    mine = started(config, tmp_path / "run").cond_stage_model.transformer.state_dict()
    assert torch.equal(embedding(mine), embedding(source))
    assert "identity_start is left out: the condition stage's weights were loaded" in caplog.text


def test_a_resumed_run_keeps_its_weights_whatever_start_is_asked_for(tmp_path):
    config = first_stage()
    config["training"]["identity_start"] = True
    run(until(config, 2), tmp_path)
    before = read_state(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    made = run(until(config, 2), tmp_path, resume=True)
    assert made.module.step == 2
    after = made.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_written_configuration_is_that_of_the_resumed_run(tmp_path):
    run(until(first_stage(), 1), tmp_path)
    config = until(first_stage(), 2)
    config["model"]["base_learning_rate"] = 4e-3
    run(config, tmp_path, resume=True)
    assert OmegaConf.load(tmp_path / "configs" / "project.yaml").model.base_learning_rate == 4e-3
