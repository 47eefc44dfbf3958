"""diffusers folders: written by diffusers at tiny size, loaded here, the same outputs from both."""

import json
import re
import shutil

import pytest
import torch
from keyed import keyed_input, weight
from omegaconf import OmegaConf

from ldm.checkpoints import inspect, load_latent_diffusion, load_vae
from ldm.checkpoints.folders import folder_settings
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE
from ldm.errors import AbsentError, FormatError, MismatchError, UnsafeFileError
from ldm.paths import shipped


def keyed(module, prefix):
    """Fill a foreign module with weights made from its own names."""
    state = {name: weight(prefix + name, tuple(value.shape)) for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval()


@pytest.fixture(scope="module")
def pipeline(tiny):
    """The three networks of a tiny pipeline, as diffusers and transformers build them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.25,
    )
    text = CLIPTextModel(CLIPTextConfig(**json.loads((tiny.folder / "text" / "config.json").read_text())))
    return {"unet": keyed(unet, "u."), "vae": keyed(vae, "v."), "text_encoder": keyed(text, "t.")}


@pytest.fixture
def folder(pipeline, tiny, tmp_path):
    """A diffusers folder that a test may change."""
    path = tmp_path / "pipe"
    for name, module in pipeline.items():
        module.save_pretrained(path / name)
    (path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny.folder / "text" / name, path / "tokenizer" / name)
    (path / "scheduler").mkdir()
    scheduler = {
        "beta_start": 0.001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 500,
    }
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return path


def edit(path, **changes):
    """Change entries of a JSON file; None takes one out."""
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def as_pickle(folder, old, new):
    from safetensors.torch import load_file

    torch.save(load_file(folder / old), folder / new)
    (folder / old).unlink()


def test_the_networks_give_diffusers_outputs(folder, pipeline):
    model, report = load_latent_diffusion(folder)
    assert len(report.assigned) == report.total == sum(len(m.state_dict()) for m in pipeline.values())
    x, t = keyed_input("folder.x", (2, 4, 8, 12)), torch.tensor([3, 401])
    picture, ids = keyed_input("folder.picture", (2, 3, 16, 24)).clamp(-1, 1), torch.arange(22).reshape(2, 11)
    with torch.no_grad():
        context = pipeline["text_encoder"](input_ids=ids).last_hidden_state
        ours = model.cond_stage_model.transformer(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, context, rtol=0, atol=1e-6)
        eps = pipeline["unet"](x, t, encoder_hidden_states=context).sample
        torch.testing.assert_close(model.apply_model(x, t, context), eps, rtol=0, atol=1e-5)
        posterior = pipeline["vae"].encode(picture).latent_dist
        ours = model.encode_first_stage(picture)
        torch.testing.assert_close(ours.mean, posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.logvar, posterior.logvar, rtol=0, atol=1e-5)
        decoded = pipeline["vae"].decode(x / 0.25).sample
        torch.testing.assert_close(model.decode_first_stage(x), decoded, rtol=0, atol=1e-5)


def test_the_schedule_and_scale_are_the_folders(folder):
    model, _ = load_latent_diffusion(folder)
    assert model.num_timesteps == 500 and model.scale_factor == 0.25 and model.parameterization == "eps"
    torch.testing.assert_close(model.betas[[0, -1]], torch.tensor([0.001, 0.02]), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("words", "changes", "wanted"),
    [
        ("v_prediction", {"prediction_type": "v_prediction"}, ("v", 0.001)),
        ("sample", {"prediction_type": "sample"}, ("x0", 0.001)),
        ("linear", {"beta_schedule": "linear"}, ("eps", 0.001)),
        ("nothing", {"beta_start": None, "beta_end": None, "beta_schedule": None}, ("eps", 0.00085)),
        ("zero SNR", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", 0.001)),
        ("trained", {"trained_betas": [0.003] * 500}, ("eps", 0.003)),
    ],
)
@pytest.mark.thinned(3)
def test_schedulers_are_translated(folder, words, changes, wanted):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    model, _ = load_latent_diffusion(folder)
    assert (model.parameterization, round(model.betas[0].item(), 6)) == wanted
    assert (model.alphas_cumprod[-1] == 0) == (words == "zero SNR")
    if words == "linear":
        steps = model.betas.diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 0.019 / 499), rtol=0, atol=1e-8)


def test_a_folder_without_scheduler_or_scale_has_v1s(folder):
    shutil.rmtree(folder / "scheduler")
    edit(folder / "vae" / "config.json", scaling_factor=None)
    model, _ = load_latent_diffusion(folder)
    assert model.num_timesteps == 1000 and model.scale_factor == 0.18215


def test_stable_diffusions_own_folder_gives_compvis_configuration(folder):
    """The JSON files of the published v1-5 folder lead to the parameters of v1-inference.yaml."""
    edit(
        folder / "unet" / "config.json",
        sample_size=64,
        block_out_channels=[320, 640, 1280, 1280],
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    edit(
        folder / "vae" / "config.json",
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=512,
        scaling_factor=None,
    )
    edit(folder / "text_encoder" / "config.json", hidden_size=768, max_position_embeddings=77)
    shutil.rmtree(folder / "scheduler")
    _, settings = folder_settings(folder)
    ours = settings["model"]["params"]
    theirs = OmegaConf.to_container(OmegaConf.load(shipped("configs/v1-inference.yaml")))["model"]["params"]
    for key in (
        "linear_start",
        "linear_end",
        "timesteps",
        "channels",
        "scale_factor",
        "conditioning_key",
        "image_size",
    ):
        assert ours[key] == theirs[key], key
    unet = dict(theirs["unet_config"]["params"], attention_resolutions=[1, 2, 4])
    for key in unet.keys() - {"image_size", "use_checkpoint"}:
        assert ours["unet_config"]["params"][key] == unet[key], key
    ours, theirs = (p["first_stage_config"]["params"]["ddconfig"] for p in (ours, theirs))
    assert {**ours, "resolution": 256} == theirs


@pytest.mark.slow
def test_variants_pickles_and_old_spellings_load_the_same(folder):
    plain, _ = load_latent_diffusion(folder)
    name = "diffusion_pytorch_model"
    (folder / "unet" / f"{name}.safetensors").rename(folder / "unet" / f"{name}.fp16.safetensors")
    as_pickle(folder / "vae", f"{name}.safetensors", f"{name}.bin")
    as_pickle(folder / "text_encoder", "model.safetensors", "pytorch_model.bin")
    weights = torch.load(folder / "vae" / f"{name}.bin", weights_only=True)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new_name, old_name in old.items():
        for key in [key for key in weights if f".attentions.0.{new_name}." in key]:
            weights[key.replace(new_name, old_name)] = weights.pop(key)
    assert any(".attentions.0.query." in key for key in weights)
    torch.save(weights, folder / "vae" / f"{name}.bin")
    text = torch.load(folder / "text_encoder" / "pytorch_model.bin", weights_only=True)
    text = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(11)[None]
    torch.save(text, folder / "text_encoder" / "pytorch_model.bin")
    model, report = load_latent_diffusion(folder)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    assert report.ignored == {"text_encoder/text_model.embeddings.position_ids": "a constant, made anew"}


@pytest.mark.slow
def test_sharded_weights_load_the_same(folder, pipeline):
    plain, _ = load_latent_diffusion(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline["unet"].save_pretrained(folder / "unet", max_shard_size="400KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    model, _ = load_latent_diffusion(folder)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", "a\\b"])
def test_a_shard_outside_the_folder_is_refused(folder, name):
    """B19."""
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(UnsafeFileError, match="outside its folder; refused"):
        load_latent_diffusion(folder)


def test_an_index_without_a_map_is_malformed(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(FormatError, match="should map tensors to files under 'weight_map'"):
        load_latent_diffusion(folder)


def test_an_inpainting_folder_becomes_the_inpainting_model(folder, pipeline):
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in pipeline["unet"].config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    keyed(unet, "u9.").save_pretrained(folder / "unet")
    model, report = load_latent_diffusion(folder)
    assert report.family == "v1-inpainting" and type(model).__name__ == "LatentInpaintDiffusion"
    x, t, context = keyed_input("nine", (1, 9, 8, 8)), torch.tensor([5]), keyed_input("nine.c", (1, 11, 24))
    with torch.no_grad():
        eps = model.apply_model(x[:, :4], t, {"c_concat": [x[:, 4:]], "c_crossattn": [context]})
        torch.testing.assert_close(eps, unet(x, t, encoder_hidden_states=context).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["folder", "vae", "renamed"])
@pytest.mark.thinned(3)
def test_a_vae_loads_from_a_folder(folder, tiny, where, tmp_path):
    settings = folder_settings(folder)[1]
    model, _ = load_latent_diffusion(folder)
    wanted = {name: value.clone() for name, value in model.first_stage_model.state_dict().items()}
    for parameter in model.first_stage_model.parameters():
        parameter.data.zero_()
    path = {"folder": folder, "vae": folder / "vae", "renamed": tmp_path / "mine"}[where]
    if where == "renamed":
        shutil.copytree(folder / "vae", path)
    report = load_vae(model, path)
    assert len(report.assigned) == len(wanted)
    assert all(torch.equal(v, wanted[k]) for k, v in model.first_stage_model.state_dict().items())
    again, _ = load_latent_diffusion(folder, config=settings, vae=path)
    assert torch.equal(again.first_stage_model.quant_conv.weight, wanted["quant_conv.weight"])


def test_a_diffusers_vae_file_loads_by_its_names(folder):
    model, _ = load_latent_diffusion(folder)
    wanted = model.first_stage_model.decoder.mid.attn_1.q.weight.clone()
    model.first_stage_model.decoder.mid.attn_1.q.weight.data.zero_()
    report = load_vae(model, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert report.assigned["decoder.mid_block.attentions.0.to_q.weight"] == "decoder.mid.attn_1.q.weight"
    assert torch.equal(model.first_stage_model.decoder.mid.attn_1.q.weight, wanted)


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index", {"_class_name": "StableDiffusionXLPipeline"}, "is Stable Diffusion XL"),
        ("model_index", {"_class_name": "StableDiffusion3Pipeline"}, "is Stable Diffusion 3"),
        (
            "model_index",
            {"_class_name": "FluxPipeline"},
            "is a FluxPipeline, not a Stable Diffusion v1 pipeline",
        ),
        (
            "unet/config",
            {"attention_head_dim": [5, 10, 20]},
            "heads per level .* belong to Stable Diffusion v2",
        ),
        ("unet/config", {"norm_num_groups": 16}, "norm_num_groups is 16, but .* have 32"),
        ("unet/config", {"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types .* are not those"),
        ("unet/config", {"block_out_channels": [32, 48, 64]}, "no multiples of the first"),
        ("unet/config", {"in_channels": 5}, "a UNet of 5 input channels is not v1's"),
        ("unet/config", {"cross_attention_dim": 40}, "wants text of width 40, the text encoder gives 24"),
        ("vae/config", {"use_quant_conv": False}, "use_quant_conv is False"),
        ("vae/config", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae/config", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "not those of a KL autoencoder"),
        ("scheduler/scheduler_config", {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid; known are"),
        ("scheduler/scheduler_config", {"prediction_type": "flow"}, "prediction_type flow"),
    ],
)
def test_what_v1_does_not_have_is_named(folder, file, changes, words):
    edit(folder / f"{file}.json", **changes)
    with pytest.raises(MismatchError, match=words):
        load_latent_diffusion(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_broken_json_is_malformed(folder, text):
    (folder / "unet" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="unet/config.json' (is not JSON|should be a JSON object)"):
        load_latent_diffusion(folder)


@pytest.mark.parametrize(
    "key", ["block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"]
)
def test_a_missing_entry_is_named(folder, key):
    edit(folder / "unet" / "config.json", **{key: None})
    with pytest.raises(FormatError, match=f"{key} should be a"):
        load_latent_diffusion(folder)


COUNTS = ["text", 32.5, 0, -32, True, [32], {"a": 1}, 10**9, 10**40, float("nan")]
FOLDER_VALUES = [
    *(("unet", key, value) for key in ("in_channels", "out_channels", "sample_size") for value in COUNTS),
    *(("unet", key, value) for key in ("layers_per_block", "cross_attention_dim") for value in COUNTS),
    *(("unet", "transformer_layers_per_block", value) for value in COUNTS),
    *(("unet", "attention_head_dim", value) for value in COUNTS if not isinstance(value, list)),
    *(("unet", "num_attention_heads", value) for value in COUNTS if not isinstance(value, list)),
    *(("vae", key, value) for key in ("in_channels", "out_channels", "latent_channels") for value in COUNTS),
    *(("vae", key, value) for key in ("sample_size", "layers_per_block") for value in COUNTS),
    *(("vae", "scaling_factor", value) for value in ("x", -1, 0, True, [1], {}, float("inf"), float("nan"))),
    *(
        (part, "block_out_channels", value)
        for part in ("unet", "vae")
        for value in (
            32,
            "32",
            [],
            {},
            [32, "64"],
            [32.0],
            [0],
            [-32],
            [True],
            [[32]],
            [10**9],
            [32] * 17,
            [None],
        )
    ),
    *(
        (part, key, value)
        for part, key in (
            ("unet", "down_block_types"),
            ("vae", "down_block_types"),
            ("vae", "up_block_types"),
        )
        for value in (
            "DownBlock2D",
            3,
            [],
            [3],
            [None],
            [["DownBlock2D"]],
            [{}],
            {"a": "b"},
            ["DownBlock2D"] * 17,
        )
    ),
    *(("unet", "use_linear_projection", value) for value in ("false", 1, [], {})),
    *(
        ("scheduler", key, value)
        for key in ("beta_start", "beta_end")
        for value in ("x", 0, -1, 1.5, True, [1])
    ),
    *(("scheduler", "num_train_timesteps", value) for value in COUNTS),
    *(
        ("scheduler", key, v)
        for key in ("prediction_type", "beta_schedule")
        for v in (1, True, [], ["eps"], {})
    ),
    *(("scheduler", "trained_betas", value) for value in ("x", 1, [], {}, ["x"], [True], [0.1], [2.0] * 500)),
    *(("text_encoder", key, v) for key in ("hidden_size", "max_position_embeddings") for v in COUNTS),
    *(("model_index", "_class_name", value) for value in (1, True, [], ["a"], {})),
]


@pytest.fixture(scope="module")
def json_files(tmp_path_factory):
    """The JSON files of a folder alone: all that its settings are read from."""
    root = tmp_path_factory.mktemp("json")
    kinds = {"unet": "CrossAttnDownBlock2D", "vae": "DownEncoderBlock2D"}
    networks = {
        part: {
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "in_channels": 4,
            "out_channels": 3,
            "latent_channels": 4,
            "cross_attention_dim": 24,
            "down_block_types": [kind] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        }
        for part, kind in kinds.items()
    }
    files = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": {"num_train_timesteps": 500},
        "text_encoder/config.json": {"hidden_size": 24, "max_position_embeddings": 11},
        **{f"{part}/config.json": config for part, config in networks.items()},
    }
    for name, value in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(value))
    return root


@pytest.mark.parametrize(("part", "key", "value"), FOLDER_VALUES)
def test_a_wrong_value_is_named_with_its_file_and_key(json_files, part, key, value):
    assert folder_settings(json_files)[0] == "v1"
    name = {"scheduler": "scheduler/scheduler_config", "model_index": part}.get(part, f"{part}/config")
    file = json_files / f"{name}.json"
    before = file.read_text()
    try:
        edit(file, **{key: value})
        with pytest.raises(FormatError, match=re.escape(f"{file}': {key} should be ")) as caught:
            folder_settings(json_files)
    finally:
        file.write_text(before)
    assert len(str(caught.value)) <= 400 and str(caught.value).isprintable() and ", got " in str(caught.value)


@pytest.mark.parametrize("key", ["block_out_channels", "down_block_types", "layers_per_block", "in_channels"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_null_is_no_value(json_files, part, key):
    file = json_files / part / "config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(before), key: None}))
        with pytest.raises(FormatError, match=f"{key} should be .*, got null"):
            folder_settings(json_files)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in ("x", -1, True, [1], 10**9, 1.5, None)),
        *(("intermediate_size", value) for value in ("x", 0, {}, 10**9)),
        *(("hidden_act", value) for value in (1, None, ["gelu"], "relu", "x" * 10_000)),
        *(("num_attention_heads", value) for value in (0, "x", [4])),
        *(("vocab_size", value) for value in (0, "x", 2**70)),
    ],
)
@pytest.mark.thinned(3)
def test_a_wrong_value_of_the_text_encoder_is_named(folder, name, value):
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(
        FormatError, match=r"text_encoder/config.json' describes no text encoder: .*\b"
    ) as caught:
        load_latent_diffusion(folder)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("value", [3, None, ["a"], {"a": 1}])
def test_a_shard_that_is_no_name_is_malformed(folder, value):
    stem = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / stem).rename(folder / "unet" / "a.safetensors")
    (folder / "unet" / f"{stem}.index.json").write_text(json.dumps({"weight_map": {"x": value}}))
    with pytest.raises(FormatError, match="should map tensors to files"):
        load_latent_diffusion(folder)


@pytest.mark.parametrize("text", ['{"a": %s}' % ("9" * 100_000), "[" * 100_000, '{"a": ' * 5000, "\0", "nul"])
def test_json_without_end_is_malformed(folder, text):
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(FormatError, match="unet/config.json' is not JSON"):
        load_latent_diffusion(folder)


def test_missing_files_and_folders_are_named(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(AbsentError, match="vae' has no diffusion_pytorch_model.safetensors or .bin"):
        load_latent_diffusion(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(AbsentError, match="vae/config.json' is not there"):
        load_latent_diffusion(folder)


def test_a_missing_tensor_of_a_folder_is_named(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["mid_block.extra.weight"] = state.pop("conv_in.weight")
    save_file(state, path)
    with pytest.raises(
        MismatchError, match=f"missing .'{UNET}input_blocks.0.0.weight'.*'unet/mid_block.extra.weight'"
    ):
        load_latent_diffusion(folder)


def test_a_summary_of_a_folder_counts_its_parts(folder, pipeline):
    summary = inspect(folder)
    assert summary.kind == "diffusers folder" and summary.family == "v1" and summary.problem is None
    counts = {"UNet": "unet", "VAE": "vae", "text encoder": "text_encoder"}
    assert {k: p.tensors for k, p in summary.parts.items()} == {
        label: len(pipeline[name].state_dict()) for label, name in counts.items()
    }
    assert len(summary.report.assigned) == summary.tensors
    targets = summary.report.assigned.values()
    assert all(target.startswith((UNET, VAE, TEXT)) for target in targets)
