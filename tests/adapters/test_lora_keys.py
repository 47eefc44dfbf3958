"""Every module of Stable Diffusion v1 is found under every name that programs give it, and nothing else is."""

import json
from types import SimpleNamespace

import pytest
from lora_files import GOLDEN, LAYOUT_MODULE, LAYOUTS, TEXT_LAYOUT_MODULE, TEXT_LAYOUTS, spell, v1_shapes

from ldm.adapters.lora_keys import ModuleNames, foreign_base, split_key
from ldm.checkpoints.key_mapping import unet_to_diffusers

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def names():
    return ModuleNames(v1_shapes())


@pytest.fixture(scope="module")
def recorded():
    return json.loads((GOLDEN / "adapter_keys.json").read_text())


def find(names, name, end=".lora_down.weight"):
    key = split_key(name + end)
    found = names.find(key.network, key.body)
    return found and found[1]


def test_all_modules_that_programs_train_are_found_under_each_of_their_names(names, recorded):
    """kohya's 278 + 72 with diffusers', sgm's and te1's names; the 113 that LyCORIS can name besides."""
    seen = set()
    for entry in recorded["modules"] + recorded["other_modules"]:
        for which in set(entry) - {"compvis"}:
            assert find(names, entry[which]) == entry["compvis"], entry[which]
        assert find(names, entry["compvis"]) == entry["compvis"]
        seen.add(entry["compvis"])
    assert len(seen) == 350 + 113
    # The other way: what has a weight and is not among them is what nobody trains by name.
    weights = {name.removesuffix(".weight") for name in v1_shapes() if name.endswith(".weight")}
    left = {name for name in weights - seen if name.startswith(UNET)}
    assert left == set()
    assert {name.split(".")[-1] for name in weights - seen} == {
        *("layer_norm1", "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding")
    }


def test_no_name_means_two_modules(names):
    """Each weight has its name of CompVis's, of diffusers', and attention's outputs one more: none is another's."""
    unet, text = names._modules["unet"], names._modules["text"]
    modules = {name.rpartition(".")[0] for name in v1_shapes() if name.startswith(UNET)}
    assert set(unet.values()) == modules
    outputs = [name for name in modules if name.endswith("to_out.0")]
    assert len(unet) == 2 * len(modules) + 2 * len(outputs)
    assert len(text) == 12 * 8 + 3


def test_old_names_of_processors_and_all_of_comfyui_s_are_found(names, recorded):
    for name, module in recorded["processor_keys"].items():
        assert find(names, name, "_lora.down.weight") == module
        assert find(names, f"unet.{name}", "_lora.up.weight") == module
    for module, aliases in recorded["comfyui_aliases"].items():
        for alias in aliases:
            assert find(names, alias) == UNET + module, alias


def test_the_map_of_tensors_is_the_recorded_one(recorded):
    ours = unet_to_diffusers([name.removeprefix(UNET) for name in v1_shapes() if name.startswith(UNET)])
    assert {theirs: UNET + name for name, theirs in ours.items()} == recorded["unet_tensor_map"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"text: {name}" for name in TEXT_LAYOUTS)])
def test_layouts_lead_to_one_module(names, layout):
    text = layout.startswith("text: ")
    spelled = TEXT_LAYOUTS[layout.removeprefix("text: ")] if text else LAYOUTS[layout]
    for which in ("down", "up"):
        key = split_key(spell(spelled, which))
        assert key.role == f"lora_{which}"
        found = ("text", TEXT_LAYOUT_MODULE) if text else ("unet", LAYOUT_MODULE)
        assert names.find(key.network, key.body) == found


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lora_unet_x.alpha", "alpha"),
        ("unet.x.to_q_lora.alpha", "alpha"),
        ("lora_unet_x.lora_mid.weight", "lora_mid"),
        ("lora_unet_x.hada_w1_a", "hada_w1_a"),
        ("lora_unet_x.lokr_t2", "lokr_t2"),
        ("lora_unet_x.a1.weight", "a1"),
        ("lora_unet_x.weight", "weight"),
        ("lora_unet_x.diff_b", "diff_b"),
        ("lora_unet_x.w_norm", "w_norm"),
        ("unet.x.lora_magnitude_vector", "magnitude"),
        ("base_model.model.x.lora_magnitude_vector.default.weight", "magnitude"),
        ("lora_unet_x.dora_scale", "dora_scale"),
        ("lora_unet_x.lora_down", None),  # no .weight
        ("lora_unet_x.lora_embedding_A", None),
        ("emb_params", None),
        ("bundle_emb.face.string_to_param.*", None),
        ("unet:0:up", None),  # of cloneofsimo's first files
        ("alpha", None),
    ],
)
def test_roles(name, role):
    key = split_key(name)
    assert (key and key.role) == role


def test_a_network_alone_is_known_by_its_own_names():
    unet = ModuleNames(["input_blocks.0.0.weight", "input_blocks.1.0.op.weight", "out.2.weight"])
    assert unet.has == {"unet"}
    assert unet.find(None, "conv_in") == unet.find("unet", "input_blocks_0_0") == ("unet", "input_blocks.0.0")
    assert unet.find("text", "conv_in") is None
    text = ModuleNames(["transformer.text_model.encoder.layers.0.mlp.fc1.weight"])
    assert text.has == {"text"}
    assert text.find(None, "encoder_layers_0_mlp_fc1") == (
        "text",
        "transformer.text_model.encoder.layers.0.mlp.fc1",
    )


DOWN = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
FOREIGN = [
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", (), "Stable Diffusion XL"),
    ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (4, 8), "Stable Diffusion XL"),
    ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q.alpha", (), "Stable Diffusion XL"),
    (
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_q.lora.up.weight",
        (8, 4),
        "Stable Diffusion XL",
    ),
    (f"lora_unet_{DOWN}.lora_down.weight", (4, 2048), "Stable Diffusion XL"),
    (f"lora_unet_{DOWN}.lora_down.weight", (4, 1024), "Stable Diffusion v2"),
    (f"lora_unet_{DOWN}.hada_w1_b", (4, 1024), "Stable Diffusion v2"),
    (f"lora_unet_{DOWN}.diff", (320, 1024), "Stable Diffusion v2"),
    ("lora_te_text_model_encoder_layers_22_mlp_fc1.alpha", (), "Stable Diffusion v2"),
    ("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", (), "Stable Diffusion 3"),
    ("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", (4, 8), "Stable Diffusion 3"),
    ("lora_unet_double_blocks_0_img_attn_qkv.alpha", (), "Flux"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 8), "Flux"),
    (
        "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora.down.weight",
        (4, 320),
        "AnimateDiff's motion modules",
    ),
    (f"lora_unet_{DOWN}.lora_down.weight", (4, 768), None),
    (f"lora_unet_{DOWN}.lora_up.weight", (1024, 4), None),
    (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight",
        (4, 1024),
        None,
    ),
    ("lora_te_text_model_encoder_layers_11_mlp_fc1.alpha", (), None),
    ("lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha", (), None),
]


@pytest.mark.parametrize(("name", "shape", "base"), FOREIGN)
def test_other_base_models_are_told_by_keys_and_widths(name, shape, base):
    found = foreign_base(
        {"lora_unet_conv_in.alpha": SimpleNamespace(shape=()), name: SimpleNamespace(shape=shape)}
    )
    assert (found and found[0]) == base
