"""What the look into a file says of ControlNets, T2I-Adapters and IP-Adapters: kind, base model, sizes, and use."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_networks import control_shapes

from ldm.adapters.summary import inspect_adapter
from ldm.checkpoints import save_safetensors
from ldm.checkpoints.key_mapping import CONTROL, control_to_diffusers
from ldm.errors import MismatchError
from ldm.modules.encoders.image_tokens import (
    FaceProjection,
    FaceResampler,
    ImageProjection,
    ImageResampler,
    ImageTokenMLP,
)
from ldm.modules.encoders.style_tokens import StyleTokens

ROOT = Path(__file__).resolve().parents[2]
CONTROLS = control_shapes()
WIDE = control_shapes(context_dim=768)
V2 = {name: (shape[0], 1024) if "attn2.to_k" in name else shape for name, shape in CONTROLS.items()}
LOW = {
    "lora_controlnet": (0,),
    "input_blocks.1.0.in_layers.2.up": (4, 5),
    "input_blocks.1.0.in_layers.2.down": (5, 9),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.down": (5, 768),
    "input_hint_block.0.weight": (16, 3, 3, 3),
}


def lists(network, prefix=""):
    return {prefix + name: tuple(one.shape) for name, one in network.state_dict().items()}


def ip(network, width=768, rank=None):
    layers = {f"ip_adapter.{i}.to_{part}_ip.weight": (32, width) for i in (1, 3, 5) for part in "kv"}
    if rank:
        layers |= {
            "ip_adapter.0.to_q_lora.down.weight": (rank, 32),
            "ip_adapter.0.to_q_lora.up.weight": (32, rank),
        }
    return lists(network, "image_proj.") | layers


FULL = {
    "body.0.block1.weight": (32, 32, 3, 3),
    "body.0.block2.weight": (32, 32, 1, 1),
    "conv_in.weight": (32, 192, 3, 3),
}
LIGHT = {
    "body.0.in_conv.weight": (8, 192, 1, 1),
    "body.0.body.0.block1.weight": (8, 8, 3, 3),
    "body.0.out_conv.weight": (32, 8, 1, 1),
}
# (tensors, words of the description, the problem's or None)
with torch.device("meta"):
    ROWS = [
        (
            CONTROLS,
            ("adapter   ControlNet\n", "text has width 24", "cldm's names\n", "picture of 3 channels"),
            None,
        ),
        (
            {**{CONTROL + name: one for name, one in WIDE.items()}, "model.diffusion_model.out.2.bias": (4,)},
            ("for       Stable Diffusion v1\n", "control_model.*", "beside 1 of a whole model"),
            None,
        ),
        (
            {control_to_diffusers(WIDE)[name]: one for name, one in WIDE.items()},
            ("layout    diffusers' names", "use it with --control and --hint, or ldm.adapters.ControlNet"),
            None,
        ),
        (V2, ("for       Stable Diffusion v2",), "it is for Stable Diffusion v2"),
        (
            {**CONTROLS, "label_emb.0.0.weight": (4, 4)},
            ("for       Stable Diffusion XL",),
            "Stable Diffusion XL",
        ),
        (LOW, ("adapter   Control-LoRA", "rank      5", "for       Stable Diffusion v1\n"), None),
        ({**WIDE, "difference": (0,)}, ("adapter   ControlNet as a difference",), None),
        (
            FULL,
            (
                "adapter   T2I-Adapter, full",
                "picture of 3 channels",
                "--t2i-adapter and --hint, or ldm.adapters.T2IAdapter",
            ),
            None,
        ),
        ({f"adapter.{name}": one for name, one in FULL.items()}, ("adapter   T2I-Adapter, full",), None),
        (LIGHT, ("adapter   T2I-Adapter, light", "for       Stable Diffusion v1"), None),
        (
            {**FULL, "conv_in.weight": (32, 768, 3, 3)},
            ("adapter   T2I-Adapter, full", "for       Stable Diffusion XL"),
            "it is for Stable Diffusion XL",
        ),
        (
            lists(StyleTokens(64, 768, 8, 3, 6)),
            (
                "adapter   T2I-Adapter of style",
                "tokens    6, of CLIP's states of width 64",
                "ldm.adapters.StyleAdapter",
            ),
            None,
        ),
        (
            ip(ImageProjection(20, 768, 4)),
            (
                "adapter   IP-Adapter, plain",
                "tokens    4, of CLIP's embeddings of width 20",
                "layers    3 attentions",
            ),
            None,
        ),
        (ip(ImageProjection(20, 2048, 4), 2048), ("for       Stable Diffusion XL",), "Stable Diffusion XL"),
        (
            ip(ImageTokenMLP(20, 20, 768)),
            ("adapter   IP-Adapter, full-face", "tokens    one for each of CLIP's states, of width 20"),
            None,
        ),
        (
            ip(ImageResampler(20, 48, 64, 1, 2, 96, 768, 5)),
            ("adapter   IP-Adapter, plus", "tokens    5, of CLIP's states of width 20"),
            None,
        ),
        (
            ip(FaceProjection(12, 24, 768, 4), rank=7),
            (
                "adapter   IP-Adapter, FaceID\n",
                "tokens    4, of a face's embedding of width 12\n",
                "rank 7, comes along",
            ),
            None,
        ),
        (
            ip(FaceResampler(12, 24, 4, 20, 768, 64, 1, 2, 96, 768)),
            (
                "adapter   IP-Adapter, FaceID plus",
                "tokens    4, of a face's embedding of width 12 and CLIP's states",
            ),
            None,
        ),
        (
            {"image_proj.other": (3, 4), **ip(ImageProjection(20, 768, 4))},
            ("adapter   IP-Adapter, plain",),
            "whose image projection is not known",
        ),
    ]


def test_each_kind_is_described_and_loads_or_says_why_not(tmp_path):
    for n, (shapes, words, problem) in enumerate(ROWS):
        path = tmp_path / "one.safetensors"
        save_safetensors(path, {name: torch.full(shape, 0.5) for name, shape in shapes.items()})
        found = inspect_adapter(path)
        text = f"{found}\n"
        assert [one for one in words if one not in text] == [], (n, text)
        if problem is None:
            assert found.problem is None and "would load: use it with " in text, (n, text)
        else:
            assert isinstance(found.problem, MismatchError) and problem in str(found.problem), (
                n,
                found.problem,
            )
            assert "would not load: " in text, n


def test_the_script_describes_one_and_ends_with_0(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(
        "inspect_networks", ROOT / "scripts" / "inspect_checkpoint.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "style.safetensors"
    save_safetensors(path, {name: torch.full(shape, 0.5) for name, shape in FULL.items()})
    assert script.main([str(path), "--quick"]) == 0
    assert "  adapter   T2I-Adapter, full\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["body.0.x", "image_proj.x", "zero_convs.0.0.x"])
def test_a_file_of_one_odd_tensor_is_no_crash(tmp_path, name):
    for shape in ((), (3,), (0,)):
        save_safetensors(tmp_path / "one.safetensors", {name: torch.ones(shape)})
        str(inspect_adapter(tmp_path / "one.safetensors"))
