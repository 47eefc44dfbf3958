"""ControlNet-shaped subclasses of ours build, load strictly, run, and give the numbers of the original."""

import copy
import json

import pytest
import torch
from compat.control import ControlledUnetModel, HackedDDIMSampler
from keyed import fill, keyed_input
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.errors import UsageError
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import get_obj_from_str, instantiate_from_config

SHAPE = (2, 4, 8, 8)
X, T, C, UC = (
    keyed_input("v.xT", SHAPE),
    torch.tensor([5, 700]),
    keyed_input("v.c", (2, 7, 24)),
    keyed_input("v.uc", (2, 7, 24)),
)
HINT = (0.3 * keyed_input("control.hint", (2, 3, 64, 64)) + 0.5).clamp(0, 1)
KEYED = ("model.", "first_stage", "control_model.", "cond_stage_model.")
TEXT_STAGE = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"version": "model_data/shapes/text", "max_length": 7},
}


@pytest.fixture(scope="module")
def golden(request):
    return request.path.parents[1] / "golden"


@pytest.fixture(scope="module")
def recorded(golden):
    return load_file(golden / "sd2_and_control.safetensors")


@pytest.fixture(scope="module")
def parts(golden):
    return json.loads((golden / "sd2_and_control.json").read_text())["control"]


@pytest.fixture(scope="module")
def config(golden, parts):
    """A configuration as ControlNet's YAML files have it, at the recorded size."""
    params = json.loads((golden / "diffusion.json").read_text())["config"]
    return {
        "target": "compat.control.ControlLDM",
        "params": {
            **params,
            "control_key": "hint",
            "only_mid_control": False,
            "control_stage_config": {"target": "compat.control.ControlNet", "params": parts["control"]},
            "unet_config": {"target": "compat.control.ControlledUnetModel", "params": parts["unet"]},
        },
    }


def build(config, **changes):
    config = copy.deepcopy(config)
    config["params"].update(changes)
    return instantiate_from_config(OmegaConf.create(config))


@pytest.fixture(scope="module")
def recorded_model(config):
    return fill(build(config), only=KEYED)


@pytest.fixture(scope="module")
def speaking_config(config, parts):
    """The same with a text encoder (128 features, 7 tokens) and a first stage of f = 8."""
    params = copy.deepcopy(config["params"])
    params["cond_stage_config"] = TEXT_STAGE
    params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 1, 1]
    for part in ("unet_config", "control_stage_config"):
        params[part]["params"]["context_dim"] = 128
    return {**config, "params": params}


@pytest.fixture(scope="module")
def speaking(speaking_config):
    return fill(build(speaking_config), only=KEYED)


def close(got, want, rel=1e-5):
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=rel * (1 + want.abs().max().item()))


def batch():
    pictures = keyed_input("picture", (2, 64, 64, 3)).clamp(-1, 1)
    return {"image": pictures, "txt": ["a red circle", "a blue star"], "hint": HINT.permute(0, 2, 3, 1)}


def test_the_state_dict_is_the_originals(recorded_model, parts):
    assert {key: list(value.shape) for key, value in recorded_model.state_dict().items()} == parts["keys"]


@torch.no_grad()
def test_the_answers_are_the_recorded_ones(recorded_model, recorded, monkeypatch):
    cond = {"c_crossattn": [C], "c_concat": [HINT]}
    close(recorded_model.apply_model(X, T, cond), recorded["control.eps"])
    without = {"c_crossattn": [C], "c_concat": None}
    close(recorded_model.apply_model(X, T, without), recorded["control.none"])
    monkeypatch.setattr(recorded_model, "control_scales", [0.825 ** (12 - i) for i in range(13)])
    close(recorded_model.apply_model(X, T, cond), recorded["control.eps_guess"])


@torch.no_grad()
@pytest.mark.slow
def test_a_new_control_changes_nothing_and_a_middle_one_less_than_all(config):
    model = build(config)
    fill(model, only=("model.",))
    cond, without = {"c_crossattn": [C], "c_concat": [HINT]}, {"c_crossattn": [C], "c_concat": None}
    plain = model.apply_model(X, T, without)
    assert torch.equal(model.apply_model(X, T, cond), plain)
    fill(model, only=("model.", "control_model."))
    full = model.apply_model(X, T, cond)
    model.only_mid_control = True
    middle = model.apply_model(X, T, cond)
    assert 0 < (middle - plain).abs().max() < (full - plain).abs().max()


def test_a_file_of_the_original_loads_strictly(speaking_config, tmp_path):
    """ControlNet's gradio scripts: load_state_dict(file), strict, with logvar and position_ids among the keys."""
    model = build(speaking_config)
    state = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    assert "logvar" in state and any(key.startswith("control_model.zero_convs.5.0.") for key in state)
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    state[position_ids] = torch.arange(32)[None]
    save_file(state, tmp_path / "control.safetensors")
    loaded = load_file(tmp_path / "control.safetensors")
    result = model.load_state_dict(loaded, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all((value == 0.5).all() for value in model.state_dict().values())
    del state["logvar"]
    model.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Missing key.*control_model.middle_block_out.0.bias"):
        model.load_state_dict(
            {k: v for k, v in state.items() if k != "control_model.middle_block_out.0.bias"}
        )


def test_a_control_is_added_to_a_plain_models_file(config, parts):
    """ControlNet's tool_add_control: every control_X begins as model.diffusion_X where that exists."""
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": parts["unet"]}
    plain = {k: v for k, v in config["params"].items() if not k.startswith(("control_", "only_mid"))}
    pretrained = fill(LatentDiffusion(**{**plain, "unet_config": unet}), only=KEYED).state_dict()
    model = build(config)
    target, new = {}, []
    for key, value in model.state_dict().items():
        source = "model.diffusion_" + key.removeprefix("control_") if key.startswith("control_") else key
        target[key] = pretrained.get(source, value).clone()
        new += [] if source in pretrained else [key]
    model.load_state_dict(target, strict=True)
    assert {key.split(".")[1] for key in new} == {"zero_convs", "input_hint_block", "middle_block_out"}
    with torch.no_grad():
        got = model.eval().apply_model(X, T, {"c_crossattn": [C], "c_concat": [HINT]})
        close(got, fill(LatentDiffusion(**{**plain, "unet_config": unet}), only=KEYED).apply_model(X, T, C))


def test_a_batch_gives_latents_and_both_conditions(speaking):
    torch.manual_seed(2)
    x, cond = speaking.get_input(batch(), speaking.first_stage_key)
    assert x.shape == SHAPE and cond["c_crossattn"][0].shape == (2, 7, 128)
    assert torch.equal(cond["c_concat"][0], HINT)
    torch.testing.assert_close(cond["c_crossattn"][0], speaking.get_learned_conditioning(batch()["txt"]))
    assert speaking.get_unconditional_conditioning(3).shape == (3, 7, 128)


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.thinned(2)
def test_training_reaches_the_control_and_only_what_is_unlocked(speaking_config, locked):
    model = fill(build(speaking_config), only=KEYED).train()
    model.sd_locked, model.learning_rate = locked, 1e-3
    optimizer = model.configure_optimizers()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(4)
    loss, log = model.training_step(batch(), 0)
    loss.backward()
    optimizer.step()
    assert log["train/loss"] == loss
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    roots = {".".join(key.split(".")[: 1 if key.startswith("control") else 3]) for key in changed}
    unlocked = {"model.diffusion_model.output_blocks", "model.diffusion_model.out"}
    assert roots == {"control_model"} | (set() if locked else unlocked)
    lost = [key for key, p in model.control_model.named_parameters() if p.grad is None]
    assert lost == []


@pytest.mark.slow
def test_pictures_to_look_at(speaking):
    log = speaking.log_images(batch(), N=2, sample=True, ddim_steps=2, plot_diffusion_rows=True)
    assert {key: tuple(value.shape) for key, value in log.items()} == {
        "reconstruction": (2, 3, 64, 64),
        "control": (2, 3, 64, 64),
        "conditioning": (2, 3, 512, 512),
        # levels 0, 200, ..., 800 and 999, two pixels between pictures
        "diffusion_row": (3, 2 * 66 + 2, 6 * 66 + 2),
        "samples": (2, 3, 64, 64),
        "samples_cfg_scale_9.00": (2, 3, 64, 64),
    }
    assert all(value.isfinite().all() for value in log.values())


def test_parts_move_while_the_model_stays_where_it_is(speaking):
    """low_vram_shift moves parts; the model's device is where its tables are."""
    cond = {"c_crossattn": [speaking.get_unconditional_conditioning(2)], "c_concat": [HINT]}
    with torch.no_grad():
        before = speaking.apply_model(X, T, cond)
        speaking.low_vram_shift(is_diffusing=False, idle="meta")
        assert speaking.model.diffusion_model.out[2].weight.is_meta
        assert speaking.device.type == "cpu"
        assert speaking.decode_first_stage(X).shape == (2, 3, 64, 64)
    for part in (speaking.model, speaking.control_model):
        part.to_empty(device="cpu")
    fill(speaking, only=KEYED)
    speaking.low_vram_shift(is_diffusing=True)
    with torch.no_grad():
        assert torch.equal(speaking.apply_model(X, T, cond), before)


def without_control(config, parts, **changes):
    """Plain latent diffusion on the controlled UNet."""
    plain = {k: v for k, v in config["params"].items() if not k.startswith(("control_", "only_mid"))}
    unet = {"target": "compat.control.ControlledUnetModel", "params": parts["unet"]}
    return fill(LatentDiffusion(**{**plain, "unet_config": unet, **changes}), only=KEYED)


def test_a_sampler_of_its_own_gives_the_recorded_chains(config, parts, recorded):
    model = without_control(config, parts, parameterization="v")
    assert isinstance(model.model.diffusion_model, ControlledUnetModel)
    got, _ = HackedDDIMSampler(model).sample(
        10,
        2,
        (4, 8, 8),
        {"c_crossattn": [C]},
        verbose=False,
        x_T=X,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning={"c_crossattn": [UC]},
    )
    close(got, recorded["v.ddim10"], rel=2e-5)
    sampler = HackedDDIMSampler(without_control(config, parts))
    sampler.make_schedule(20, ddim_eta=0.0, verbose=False)
    close(sampler.encode(keyed_input("inv.x0", SHAPE), C, 15), recorded["invert.encode15"], rel=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.thinned(2)
def test_a_sampler_of_its_own_agrees_with_ours(recorded_model, eta):
    """Guess mode: the unconditional pass has no hint, so that the two conditions cannot join into one batch."""
    options = {
        "conditioning": {"c_concat": [HINT], "c_crossattn": [C]},
        "unconditional_conditioning": {"c_concat": None, "c_crossattn": [UC]},
        "unconditional_guidance_scale": 4.0,
        "mask": (keyed_input("mask", (2, 1, 8, 8)) > 0).float(),
        "x0": keyed_input("x0", SHAPE),
        "x_T": X,
        "eta": eta,
        "verbose": False,
    }
    torch.manual_seed(6)
    want, _ = HackedDDIMSampler(recorded_model).sample(5, 2, (4, 8, 8), **options)
    torch.manual_seed(6)
    got, _ = DDIMSampler(recorded_model, separate_passes=True).sample(5, 2, (4, 8, 8), **options)
    close(got, want)


def test_the_rest_of_what_such_a_sampler_touches(recorded_model):
    sampler, ours = HackedDDIMSampler(recorded_model), DDIMSampler(recorded_model)
    for one in (sampler, ours):
        one.make_schedule(ddim_num_steps=20, ddim_eta=0.0, verbose=False)
    noise, rows = keyed_input("noise", SHAPE), torch.tensor([12, 3])
    for original in (False, True):
        got = sampler.stochastic_encode(X, rows, use_original_steps=original, noise=noise)
        close(got, ours.stochastic_encode(X, rows, use_original_steps=original, noise=noise))
    cond = {"c_crossattn": [C], "c_concat": None}
    stage = recorded_model.first_stage_model
    try:
        recorded_model.first_stage_model = IdentityFirstStage(vq_interface=True)
        close(
            sampler.sample(4, 2, (4, 8, 8), cond, x_T=X, quantize_denoised=True)[0],
            sampler.sample(4, 2, (4, 8, 8), cond, x_T=X)[0],
        )
    finally:
        recorded_model.first_stage_model = stage


# --- our own classes, by cldm's names ---


@pytest.fixture(scope="module")
def own_config(config):
    """ControlNet's YAML as published: cldm's own names, which are ours where no cldm was imported."""
    params = copy.deepcopy(config["params"])
    params["control_stage_config"]["target"] = "cldm.cldm.ControlNet"
    params["unet_config"]["target"] = "cldm.cldm.ControlledUnetModel"
    return {"target": "cldm.cldm.ControlLDM", "params": params}


@pytest.fixture(scope="module")
def own(own_config):
    return fill(build(own_config), only=KEYED)


@torch.no_grad()
def test_our_own_classes_have_the_originals_keys_and_answers(
    own, parts, recorded, recorded_model, monkeypatch
):
    assert type(own).__module__ == "ldm.models.diffusion.control"
    assert {key: list(value.shape) for key, value in own.state_dict().items()} == parts["keys"]
    own.load_state_dict(recorded_model.state_dict(), strict=True)
    recorded_model.load_state_dict(own.state_dict(), strict=True)
    cond, without = {"c_crossattn": [C], "c_concat": [HINT]}, {"c_crossattn": [C], "c_concat": None}
    close(own.apply_model(X, T, cond), recorded["control.eps"])
    close(own.apply_model(X, T, without), recorded["control.none"])
    monkeypatch.setattr(own, "control_scales", [0.825 ** (12 - i) for i in range(13)])
    close(own.apply_model(X, T, cond), recorded["control.eps_guess"])
    monkeypatch.setattr(own, "only_mid_control", True)
    assert not torch.allclose(own.apply_model(X, T, cond), recorded["control.eps_guess"], atol=1e-4)


@torch.no_grad()
def test_all_is_cast_to_the_weights_that_it_meets_and_the_answer_to_what_came(own, recorded):
    """UNet's dtype, ControlNet's, what comes, and how far from float32 its numbers are at most."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    want = recorded["control.eps"]
    for unet, control, given, at_most in (
        (single, half, single, 0.05),
        (half, half, single, 0.1),
        (double, single, single, 1e-4),
        (half, single, single, 0.1),
        (single, double, single, 1e-4),
    ):
        model = copy.deepcopy(own)
        model.model.to(unet), model.control_model.to(control)
        got = model.apply_model(X.to(given), T, {"c_crossattn": [C.to(given)], "c_concat": [HINT]})
        assert got.dtype == given and (got.float() - want).abs().max() <= at_most
    without = model.apply_model(X, T, {"c_crossattn": [C], "c_concat": None})
    close(without, recorded["control.none"])
    assert without.dtype == single and (want - without).abs().max() > 0.2


@torch.no_grad()
def test_our_own_model_samples_as_one_of_anothers_classes_does(own, recorded_model):
    cond, empty = {"c_crossattn": [C], "c_concat": [HINT]}, {"c_crossattn": [UC], "c_concat": [HINT]}
    options = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": empty,
        "verbose": False,
        "x_T": X,
    }
    got, want = (
        DDIMSampler(one).sample(3, 2, SHAPE[1:], cond, **options)[0] for one in (own, recorded_model)
    )
    close(got, want)


@pytest.mark.slow
def test_our_own_model_trains_its_control_alone(speaking_config, own_config):
    config = copy.deepcopy(speaking_config)
    config["target"] = own_config["target"]
    for part in ("control_stage_config", "unet_config"):
        config["params"][part]["target"] = own_config["params"][part]["target"]
    model = fill(build(config), only=KEYED)
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    before = {name: one.clone() for name, one in model.named_parameters()}
    torch.manual_seed(0)
    x, c = model.get_input(batch(), "image", bs=1)
    assert (
        len(x) == 1 and c["c_concat"][0].shape == (1, 3, 64, 64) and c["c_crossattn"][0].shape == (1, 7, 128)
    )
    loss, _ = model.shared_step(batch())
    loss.backward()
    optimizer.step()
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved == {name for name in before if name.startswith("control_model.")}
    model.sd_locked = False
    more = {id(one) for one in model.configure_optimizers().param_groups[0]["params"]}
    assert {
        name.split(".")[2]
        for name, one in model.named_parameters()
        if id(one) in more and name.startswith("model.")
    } == {"output_blocks", "out"}
    with pytest.raises(UsageError, match="a batch needs the key 'hint'"):
        model.get_input({"image": batch()["image"], "txt": ["a"]}, "image")
    with pytest.raises(UsageError, match="condition is a dict of c_crossattn and c_concat"):
        model.apply_model(X, T, C)


def test_a_cldm_that_was_imported_goes_before_ours(monkeypatch):
    import sys
    import types

    module = types.ModuleType("cldm.cldm")
    module.ControlLDM = type("ControlLDM", (LatentDiffusion,), {"__module__": "cldm.cldm"})
    package = types.ModuleType("cldm")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "cldm", package)
    monkeypatch.setitem(sys.modules, "cldm.cldm", module)
    assert get_obj_from_str("cldm.cldm.ControlLDM") is module.ControlLDM
