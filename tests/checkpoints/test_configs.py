"""Which configuration a file gets: the caller's, one beside it, or v1's; and what of it is heeded."""

import contextlib
import copy
import logging
import shutil

import pytest
import torch
from make_synthetic import tiny_config
from omegaconf import OmegaConf

from ldm.checkpoints import inspect, load_latent_diffusion, load_vae, open_weights, save_safetensors
from ldm.checkpoints.build import follow_hub
from ldm.checkpoints.configs import (
    CONFIGS,
    TRAINING_ONLY,
    candidates,
    config_beside,
    find_config,
    read_settings,
)
from ldm.checkpoints.key_mapping import UNET, VAE
from ldm.errors import AbsentError, FormatError, LdmError, MismatchError
from ldm.paths import shipped
from ldm.pipeline import StableDiffusion

FIRST = f"{UNET}input_blocks.0.0.weight"


def write(path, config):
    OmegaConf.save(OmegaConf.create(config), path)
    return path


@pytest.fixture
def laid(tiny, tmp_path):
    """The tiny model's file, alone in a folder."""
    shutil.copy(tiny.path, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("name", ["m.yaml", "m.yml", "config.yaml", "config.yml"])
@pytest.mark.thinned(2)
def test_a_yaml_beside_the_file_is_used_by_every_door_and_said(tiny, laid, name, caplog):
    beside = write(laid.with_name(name), tiny.config)
    note = f"configuration '{beside}', found beside the file"
    with caplog.at_level(logging.INFO, logger="ldm"):
        _, report = load_latent_diffusion(laid)
    assert note in report.notes and note in caplog.text
    assert note in inspect(laid).report.notes
    assert note in StableDiffusion.from_single_file(laid).report.notes


def test_a_file_s_own_yaml_goes_before_the_folder_s_and_the_caller_s_before_both(tiny, laid):
    other = copy.deepcopy(tiny.config)
    other["model"]["params"]["linear_end"] = 0.02
    write(laid.with_name("config.yaml"), other)
    write(laid.with_suffix(".yaml"), tiny.config)
    assert config_beside(laid) == laid.with_suffix(".yaml")
    assert load_latent_diffusion(laid)[0].linear_end == 0.012
    model, report = load_latent_diffusion(laid, config=other)
    assert model.linear_end == 0.02 and not report.notes


def test_the_box_loads_without_a_word():
    model, report = load_latent_diffusion(shipped("model_data/shapes/shapes.safetensors"))
    assert model.parameterization == "v" and len(report.assigned) == 577


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.yaml", "with 'm.yaml', found beside it: "),
        ("config.yaml", "with 'config.yaml', found beside it: "),
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        "data: {}\n",
        "model: {target: os.system, params: {command: 'true'}}\n",
        "- a\n",
        "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: [1]}\n",
    ],
)
def test_a_yaml_that_is_no_model_s_is_an_error_that_names_it(laid, name, words, content):
    laid.with_name(name).write_text(content)
    with pytest.raises(LdmError) as caught:
        load_latent_diffusion(laid)
    assert words in str(caught.value) and len(str(caught.value).replace(str(laid.parent), "")) <= 360


def test_a_yaml_of_the_file_s_name_that_does_not_fit_is_an_error(tiny, laid):
    other = copy.deepcopy(tiny.config)
    other["model"]["params"]["unet_config"]["params"]["model_channels"] = 64
    write(laid.with_suffix(".yaml"), other)
    with pytest.raises(MismatchError, match="with 'm.yaml', found beside it: .*of another shape"):
        load_latent_diffusion(laid)


def of_v1(tmp_path, channels=4):
    """The beginning of a v1 file: enough to be judged by."""
    tensors = {FIRST: torch.ones(320, channels, 3, 3), f"{VAE}quant_conv.bias": torch.zeros(8)}
    save_safetensors(tmp_path / "v1.safetensors", tensors)
    return tmp_path / "v1.safetensors"


@pytest.mark.parametrize(
    ("content", "count", "words"),
    [
        (None, 1, None),
        ("box", 2, None),  # the box's: it fits no v1 file, and v1's own comes after it
        ("library_name: diffusers\n", 1, "is no configuration of a model and was left alone"),
        ("model: {target: os.system}\n", 2, None),
        ("'", 1, "was left alone"),
    ],
)
def test_a_v1_file_beside_another_model_s_config_yaml_keeps_v1_s(tmp_path, content, count, words):
    path = of_v1(tmp_path)
    if content == "box":
        shutil.copy(shipped("model_data/shapes/config.yaml"), tmp_path / "config.yaml")
    elif content:
        (tmp_path / "config.yaml").write_text(content)
    with contextlib.closing(open_weights(path)) as source:
        found = candidates(path, source, "v1", None)
    assert len(found) == count
    assert found[-1].settings == read_settings(shipped(CONFIGS["v1"])) and found[-1].origin is None
    assert not words or words in found[-1].notes[0]


def test_the_fallback_to_v1_is_said(tiny, tmp_path, monkeypatch):
    """With v1 as small as the tiny model, for a full one has 860 million weights."""
    monkeypatch.setattr("ldm.checkpoints.configs.V1_WIDTH", 32)
    monkeypatch.setitem(CONFIGS, "v1", str(write(tmp_path / "v1.yaml", tiny.config)))
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny.path, folder / "m.safetensors")
    shutil.copy(shipped("model_data/shapes/config.yaml"), folder / "config.yaml")
    _, report = load_latent_diffusion(folder / "m.safetensors")
    assert (
        "config.yaml' beside the file is another model's; Stable Diffusion v1's was used" in report.notes[0]
    )
    broken = tiny.save(
        folder, {n: v for n, v in tiny.tensors.items() if n != FIRST.replace("weight", "bias")}
    )
    with pytest.raises(
        MismatchError, match="with 'config.yaml', found beside it"
    ):  # the first that was tried
        load_latent_diffusion(broken)


def test_a_text_encoder_s_folder_beside_the_yaml_is_found_from_everywhere(tiny, laid, monkeypatch, tmp_path):
    shutil.copytree(tiny.folder / "text", laid.parent / "words")
    config = copy.deepcopy(tiny.config)
    config["model"]["params"]["cond_stage_config"]["params"]["version"] = "words"
    write(laid.with_suffix(".yaml"), config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _ = load_latent_diffusion(laid)
    assert model.cond_stage_model.tokenizer.origin.startswith(str(laid.parent / "words"))


# --- where configurations are found -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("configs/v1-inference.yaml", "configs/v1-inference.yaml"),
        ("configs/stable-diffusion/v1-inference.yaml", "configs/v1-inference.yaml"),
        ("stable-diffusion/configs/stable-diffusion/v1-inference.yaml", "configs/v1-inference.yaml"),
        ("v1-inference.yaml", "configs/v1-inference.yaml"),
        ("configs/stable-diffusion/v1-inpainting-inference.yaml", "configs/v1-inpainting.yaml"),
    ],
)
def test_compvis_s_paths_mean_our_files(asked, found, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config(asked) == shipped(found)


@pytest.mark.parametrize(
    "asked", ["none.yaml", "configs/stable-diffusion/v2-inference-v.yaml", "configs/x\0.yaml", "a" * 5000]
)
def test_a_configuration_that_is_nowhere_is_absent_with_a_hint(tiny, asked):
    with pytest.raises(AbsentError, match="does not exist; check the path, or leave it out") as caught:
        load_latent_diffusion(tiny.path, config=asked)
    assert len(str(caught.value)) <= 400


# --- what only trainings need -----------------------------------------------------------------------------------------


def test_parameters_of_a_training_are_named_and_left_out(tiny, caplog):
    config = copy.deepcopy(tiny.config)
    extra = {
        "personalization_config": {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": {}},
        "embedding_reg_weight": 0.0,
        "unfreeze_model": True,
        "model_lr": 1e-6,
    }
    assert extra.keys() <= TRAINING_ONLY
    config["model"]["params"] |= extra
    model, report = load_latent_diffusion(tiny.path, config=config)
    words = "for training only, left out of the configuration: " + ", ".join(sorted(extra))
    assert words in report.notes and words in caplog.text and len(report.assigned) == len(tiny.tensors)
    config["model"]["params"]["personalisation"] = 1
    with pytest.raises(MismatchError, match="has no parameter 'personalisation'"):
        load_latent_diffusion(tiny.path, config=config)


# --- markers ----------------------------------------------------------------------------------------------------------

ZERO = "rescale_betas_zero_snr"
# (tensors, metadata, what the configuration says) -> what is built
MARKERS = {
    "none": (set(), {}, {}, ("eps", False)),
    "v_pred": ({"v_pred"}, {}, {}, ("v", False)),
    "v_pred and ztsnr": ({"v_pred", "ztsnr"}, {}, {}, ("v", True)),
    "ztsnr alone": ({"ztsnr"}, {}, {}, ("eps", True)),
    "both in metadata": (set(), {"v_pred": "", "ztsnr": ""}, {}, ("v", True)),
    "both in metadata, true": (set(), {"v_pred": "true", "ztsnr": "1"}, {}, ("v", True)),
    "denied in metadata": (set(), {"v_pred": "false", "ztsnr": "0"}, {}, ("eps", False)),
    "kohya's": (set(), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, {}, ("v", True)),
    "kohya's, off": (
        set(),
        {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"},
        {},
        ("eps", False),
    ),
    "modelspec": (set(), {"modelspec.prediction_type": "v"}, {}, ("v", False)),
    "modelspec, eps": (set(), {"modelspec.prediction_type": "epsilon"}, {}, ("eps", False)),
    "the configuration": (set(), {}, {"parameterization": "v", ZERO: True}, ("v", True)),
    "a fork's configuration": (set(), {}, {"parameterization": "v", "zero_terminal_snr": True}, ("v", True)),
    "both say it": ({"v_pred", "ztsnr"}, {}, {"parameterization": "v", ZERO: True}, ("v", True)),
    "the configuration says otherwise": (
        {"v_pred", "ztsnr"},
        {},
        {"parameterization": "eps", ZERO: False},
        ("eps", False),
    ),
}


@pytest.mark.parametrize("case", MARKERS)
@pytest.mark.thinned(3)
def test_what_a_file_says_of_itself_is_heeded_where_the_configuration_is_silent(tiny, tmp_path, case, caplog):
    keys, metadata, params, wanted = MARKERS[case]
    config = copy.deepcopy(tiny.config)
    config["model"]["params"] |= params
    path = tmp_path / "m.safetensors"
    save_safetensors(path, {**tiny.tensors, **dict.fromkeys(keys, torch.zeros(0))}, metadata)
    model, report = load_latent_diffusion(path, config=config)
    assert (model.parameterization, model.rescale_betas_zero_snr) == wanted
    assert {report.ignored[key] for key in keys} <= {"a marker"} and report.ignored.keys() == keys
    heeded = sum("so it is used" in note for note in report.notes)
    kept = [note for note in report.notes if "was kept" in note]
    if "otherwise" in case:
        assert heeded == 0 and len(kept) == 2 and all(note in caplog.text for note in kept)
    else:
        assert heeded == (0 if params else (wanted[0] == "v") + wanted[1]) and not kept


# --- the hub's cache --------------------------------------------------------------------------------------------------


def cached(tmp_path, tiny, hashes=("abc",), main=None):
    root = tmp_path / "models--org--name"
    for name in hashes:
        folder = root / "snapshots" / name
        folder.mkdir(parents=True)
        shutil.copy(tiny.path, folder / "m.safetensors")
        write(folder / "m.yaml", tiny.config)
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize("inside", ["", "snapshots"])
@pytest.mark.parametrize(
    ("hashes", "main", "found"), [(("abc",), None, "abc"), (("abc", "def"), "def", "def")]
)
def test_a_model_s_folder_in_the_cache_leads_to_its_snapshot(tmp_path, tiny, inside, hashes, main, found):
    root = cached(tmp_path, tiny, hashes, main)
    assert follow_hub(root / inside) == root / "snapshots" / found


@pytest.mark.parametrize(
    ("hashes", "main", "words"),
    [
        (("abc", "def"), None, "has 2 snapshots; name one"),
        (("abc", "def"), "../../etc", "has 2 snapshots"),
        ((), None, "has 0 snapshots; download"),
    ],
)
def test_no_snapshot_is_guessed(tmp_path, tiny, hashes, main, words):
    root = cached(tmp_path, tiny, hashes, main)
    (root / "snapshots").mkdir(exist_ok=True, parents=True)
    for door in (load_latent_diffusion, inspect, StableDiffusion.from_single_file):
        with pytest.raises(AbsentError, match=words):
            door(root)


def test_folders_say_what_in_them_could_be_meant(tmp_path, tiny):
    root = cached(tmp_path, tiny)
    for door in (load_latent_diffusion, inspect):
        with pytest.raises(
            FormatError, match="is a cache of the hub; name a model in it: 'models--org--name'"
        ):
            door(tmp_path)
        with pytest.raises(FormatError, match="no diffusers model; name a file in it: 'm.safetensors'"):
            door(root)
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    with pytest.raises(FormatError, match="name a file in it: 'm.safetensors'"):
        load_vae(model, root)


def test_an_inpainting_file_keeps_its_own_configuration(tmp_path):
    path = of_v1(tmp_path, channels=9)
    with contextlib.closing(open_weights(path)) as source:
        (found,) = candidates(path, source, "v1-inpainting", None)
    assert found.settings == read_settings(shipped(CONFIGS["v1-inpainting"]))
    config = tiny_config(tmp_path)
    with pytest.raises(MismatchError, match="a 9-channel"):
        load_latent_diffusion(path, config=config)
