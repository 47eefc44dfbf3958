"""What the look into an adapter's file says, family by family, and with which exit code the script ends."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from lora_files import spell, write_lora

from ldm.adapters.summary import family_name, inspect_adapter, says_of
from ldm.checkpoints import save_safetensors
from ldm.cli import run

ROOT = Path(__file__).parents[2]
UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_"
TEXT = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
READS = f"{UNET}attn2_to_k"

# Family -> tensors of one module, 640 x 640 or a convolution.
LINEAR = {"lora_up.weight": (640, 3), "lora_down.weight": (3, 640)}
CONV = {"lora_up.weight": (640, 3, 1, 1), "lora_down.weight": (3, 320, 3, 3)}
FAMILIES = {
    "LoRA": LINEAR | {"alpha": 1.0},
    "LoCon": CONV,
    "DoRA": LINEAR | {"dora_scale": (640, 1)},
    "LoCon with DoRA": CONV | {"dora_scale": (640, 1, 1, 1)},
    "LoHa": {"hada_w1_a": (640, 3), "hada_w1_b": (3, 640), "hada_w2_a": (640, 3), "hada_w2_b": (3, 640)},
    "LoKr": {"lokr_w1": (4, 5), "lokr_w2_a": (160, 3), "lokr_w2_b": (3, 128)},
    "GLoRA": {"a1.weight": (640, 3), "a2.weight": (3, 640), "b1.weight": (640, 3), "b2.weight": (3, 640)},
    "IA3": {"weight": (640,), "on_input": torch.tensor(False)},
    "OFT": {"oft_blocks": (4, 160, 160), "alpha": 1e-4},
    "BOFT": {"oft_blocks": (2, 160, 4, 4), "alpha": 1e-4},
    "full": {"diff": (640, 640)},
    "norm": {"w_norm": (640,), "b_norm": (640,)},
    "bias": {"diff_b": (640,)},
}
RANKED = {"LoRA", "LoCon", "DoRA", "LoCon with DoRA", "LoHa", "LoKr"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_called_by_its_name(tmp_path, family):
    tensors = {f"{UNET}attn1_to_q.{role}": value for role, value in FAMILIES[family].items()}
    found = inspect_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    assert found.families == {family: 1} and found.networks == {"UNet": 1} and found.problem is None
    assert found.ranks == ([3] if family in RANKED else []) and found.kind == "LoRA"
    assert f"adapter   {family} x 1" in str(found) and "for       Stable Diffusion v1, as far as" in str(
        found
    )
    assert "would load: use it with --lora, or ldm.adapters.LoRA" in str(found)


def test_what_is_no_family_is_unknown():
    assert family_name({"lora_up": torch.ones(3, 2)}) == "unknown"


@pytest.mark.parametrize(
    ("tensors", "base", "fits"),
    [
        ({f"{READS}.lora_up.weight": (640, 2), f"{READS}.lora_down.weight": (2, 768)}, "Stable Diffusion v1", True),
        ({f"{READS}.lora_up.weight": (640, 2), f"{READS}.lora_down.weight": (2, 1024)}, "Stable Diffusion v2", False),
        ({f"{READS}.lora_up.weight": (640, 2), f"{READS}.lora_down.weight": (2, 2048)}, "Stable Diffusion XL", False),
        ({f"{READS}.lora_up.weight": (64, 2), f"{READS}.lora_down.weight": (2, 128)},
         "a model of Stable Diffusion v1's layout whose text has width 128", True),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": (64, 2),
          "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 64)}, "Flux", False),
        ({f"lora_te2_{TEXT[8:]}.lora_up.weight": (64, 2), f"lora_te2_{TEXT[8:]}.lora_down.weight": (2, 64)},
         "Stable Diffusion XL", False),
    ],
)  # fmt: skip
def test_the_base_model_is_named_also_where_it_is_another(tmp_path, tensors, base, fits):
    found = inspect_adapter(write_lora(tmp_path / "a.safetensors", tensors))
    assert found.base == base and (found.problem is None) is fits
    if not fits:
        assert f"this is one for {base}" in str(found.problem) and "would not load: " in str(found)


def test_ranks_alphas_networks_and_what_a_file_says_of_itself(tmp_path):
    tensors = {}
    for module, rank, alpha in ((f"{UNET}attn1_to_q", 4, 2.0), (READS, 16, 8.0), (TEXT, 4, None)):
        width = 768 if module in (READS, TEXT) else 640
        rows = 768 if module == TEXT else 640
        tensors |= {spell(f"{module}.lora_{{}}.weight", "up"): (rows, rank),
                    spell(f"{module}.lora_{{}}.weight", "down"): (rank, width)}  # fmt: skip
        tensors |= {} if alpha is None else {f"{module}.alpha": alpha}
    metadata = {
        "ss_output_name": "mossy\nthings",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "ss_tag_frequency": json.dumps({"1_moss": {"moss": 5, " fern": 7}, "2_rock": {"moss": 4}}),
    }
    found = inspect_adapter(write_lora(tmp_path / "a.safetensors", tensors, metadata))
    assert found.ranks == [4, 16] and found.alphas == [2.0, 8.0]
    assert found.networks == {"UNet": 2, "text encoder": 1}
    text = str(found)
    for line in (
        "  rank      4 to 16; alpha 2 to 8",
        "  modules   UNet x 2, text encoder x 1",
        r"  name          mossy\nthings",
        "  network_dim   4",
        "  most tags     moss, fern",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, {}),
        ({"modelspec.trigger_phrase": "m055", "ss_tag_frequency": '{"a": {"b": 1}}'}, {"trigger words": "m055"}),
        ({"modelspec.title": "M", "ss_output_name": ""}, {"name": "M"}),
        ({"ss_tag_frequency": "{"}, {}),
        ({"ss_tag_frequency": "[1]"}, {}),
        ({"ss_tag_frequency": '{"a": 5, "b": {"c": "d"}}'}, {}),
        ({"ss_tag_frequency": "[" * 100_000}, {}),
        ({"ss_tag_frequency": json.dumps({"a": {str(i): i for i in range(100)}})},
         {"most tags": "99, 98, 97, 96, 95, 94, 93, 92"}),
    ],
)  # fmt: skip
def test_whatever_a_file_says_is_read(metadata, words):
    assert says_of(metadata) == words


@pytest.mark.parametrize(
    ("tensors", "base", "vectors", "problem"),
    [
        ({"emb_params": (8, 768)}, "Stable Diffusion v1", {"emb_params": (8, 768)}, None),
        ({"<cat>": (768,)}, "Stable Diffusion v1", {"<cat>": (1, 768)}, None),
        ({"emb_params": (3, 1024)}, "Stable Diffusion v2", {"emb_params": (3, 1024)}, "for Stable Diffusion v2"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "Stable Diffusion XL", {"clip_l": (2, 768), "clip_g": (2, 1280)},
         "is an embedding for Stable Diffusion XL"),
        ({"emb_params": (3, 128)}, "a text encoder of width 128", {"emb_params": (3, 128)}, None),
        ({"<a>": (768,), "<b>": (768,)}, "Stable Diffusion v1", {"<a>": (1, 768), "<b>": (1, 768)}, "say with token="),
    ],
)  # fmt: skip
def test_embeddings_are_described(tmp_path, tensors, base, vectors, problem):
    found = inspect_adapter(write_lora(tmp_path / "birb.safetensors", tensors))
    assert (found.kind, found.base, found.vectors) == ("textual inversion", base, vectors)
    assert problem is None if found.problem is None else problem in str(found.problem)
    assert ("in prompts" in found.says) is (problem is None)


def test_a_full_model_and_others_are_no_adapters(tmp_path):
    for name, key in (("model", "model.diffusion_model.input_blocks.0.0.weight"), ("other", "x.y.z")):
        save_safetensors(tmp_path / f"{name}.safetensors", {key: torch.ones(4, 4, 3, 3)}, {})
        assert inspect_adapter(tmp_path / f"{name}.safetensors") is None


@pytest.mark.parametrize(
    ("tensors", "more", "code", "words"),
    [
        ({f"{READS}.{role}": value for role, value in LINEAR.items()} | {f"{READS}.lora_down.weight": (3, 768)}, [], 0,
         "would load: use it with --lora"),
        ({f"{READS}.{role}": value for role, value in LINEAR.items()} | {"x.y": (2,)}, [], 5, "would not load: "),
        ({f"{UNET}attn1_to_q.{role}": value for role, value in LINEAR.items()} | {"x.y": (2,)},
         ["--ignore-keys", "x."], 0, "would load: use it with --lora"),
        ({f"{UNET}attn1_to_q.lora_up.weight": (640, 3), f"{UNET}attn1_to_q.lora_down.weight": torch.full((3, 640),
         torch.nan)}, [], 8, "would not load: "),
        ({"emb_params": (2, 768)}, [], 0, "would load: use it with --embedding"),
        ({"emb_params": (2, 1024)}, [], 5, "would not load: "),
    ],
)  # fmt: skip
def test_the_script_ends_with_0_for_an_adapter_that_would_load(tmp_path, capsys, tensors, more, code, words):
    spec = importlib.util.spec_from_file_location("inspect", ROOT / "scripts" / "inspect_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as stop:
        run(module.main, [str(write_lora(tmp_path / "a.safetensors", tensors)), *more])
    out, err = capsys.readouterr()
    assert stop.value.code == code and words in out and "full model" not in out
    assert err == "" if code == 0 else err.count("\n") == 1
