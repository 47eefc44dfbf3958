"""Write checkpoints in the layout of Stable Diffusion v1 with made-up weights, full-size or tiny.

    python tests/make_synthetic.py v1-5.safetensors                  # 1131 tensors, fp16, 2.13 GB, in seconds
    python tests/make_synthetic.py tiny.safetensors --tiny [--ema] [--inpainting] [--dtype float32]

The tensors' names and shapes come from the package's own model on the meta device, which other tests hold against
the recorded list of the original.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.checkpoints import save_safetensors
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.configs import read_settings
from ldm.checkpoints.key_mapping import EMA, ema_name
from ldm.paths import shipped
from ldm.process.schedule import SCHEDULE_BUFFERS

POOL = (
    1 << 20
) + 7  # values of the random pool; odd, so that tensors of round sizes do not repeat each other
SMALL_TEXT = "model_data/shapes/text"  # the small vocabulary that ships


def tiny_config(folder: str | Path, *, inpainting: bool = False, use_ema: bool = False) -> dict[str, Any]:
    """Configure a v1 model of 1.6 M parameters with CompVis's keys; its tiny text encoder is written into folder."""
    text = Path(folder) / "text"
    text.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((shipped(SMALL_TEXT) / "vocab.json").read_text(encoding="utf-8"))
    for name in ("vocab.json", "merges.txt"):
        (text / name).write_bytes((shipped(SMALL_TEXT) / name).read_bytes())
    fields = {
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 11,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 24,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    (text / "config.json").write_text(json.dumps(fields), encoding="utf-8")

    settings = read_settings(
        shipped("configs/v1-inpainting.yaml" if inpainting else "configs/v1-inference.yaml")
    )
    params = settings["model"]["params"]
    params["use_ema"] = use_ema
    params["image_size"] = 8
    params["unet_config"]["params"].update(
        model_channels=32,
        num_res_blocks=1,
        channel_mult=[1, 2],
        attention_resolutions=[1],
        num_heads=4,
        context_dim=fields["hidden_size"],
        use_checkpoint=False,
    )
    params["first_stage_config"]["params"]["ddconfig"].update(
        ch=32, ch_mult=[1, 2], num_res_blocks=1, resolution=16
    )
    params["cond_stage_config"]["params"] = {
        "version": str(text),
        "max_length": fields["max_position_embeddings"],
    }
    return settings


def make_tensors(
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    ema: bool = False,
    schedule: bool = False,
    position_ids: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Make up a checkpoint for a configured model; cheap values with the spread of an initialised network.

    Args:
        settings: of the model.
        dtype: of the weights.
        ema: with a moving average, which differs from the plain weights.
        schedule: with the twelve tables that CompVis's files carry.
        position_ids: with the constant that files of old transformers carry.
    """
    settings = copy.deepcopy(settings)
    settings["model"]["params"]["use_ema"] = False
    model = build_empty(settings)
    pool = torch.rand(POOL, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, value in model.state_dict().items():
        if name in SCHEDULE_BUFFERS:
            if schedule:
                tensors[name] = value.clone()
        elif value.is_meta:
            tensors[name] = _draw(name, pool, start, value.shape, dtype)
            start = (start + value.numel() + 1) % POOL
    if position_ids:
        embedder = model.cond_stage_model
        length = embedder.transformer.text_model.embeddings.position_embedding.weight.shape[0]
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(length)[
            None
        ]
    if ema:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[ema_name(name)] = tensors[name] * 0.5
        tensors[f"{EMA}decay"] = torch.tensor(0.9999)
        tensors[f"{EMA}num_updates"] = torch.tensor(7, dtype=torch.int32)
    return tensors


def _draw(name: str, pool: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Cut values out of the pool, scaled like an initialised layer's."""
    count = math.prod(shape)
    turns = -(-(start + count) // POOL)
    values = (pool.repeat(turns) if turns > 1 else pool)[start : start + count]
    if len(shape) > 1:
        values = values * math.sqrt(3 / math.prod(shape[1:]))
    else:
        values = values * 0.1 + float(name.endswith("weight"))  # the weight of a norm lies about one
    return values.to(dtype).reshape(shape)


def make_full(path: str | Path) -> None:
    """Write a file like v1-5-pruned-emaonly.safetensors: 1131 tensors, fp16, 2.13 GB."""
    settings = read_settings(shipped("configs/v1-inference.yaml"))
    save_safetensors(path, make_tensors(settings, position_ids=True), {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="a model of 1.6 M parameters; its text folder beside it"
    )
    parser.add_argument("--inpainting", action="store_true", help="nine input channels")
    parser.add_argument("--ema", action="store_true", help="with a moving average")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    options = parser.parse_args()
    if options.tiny:
        settings = tiny_config(options.path.parent, inpainting=options.inpainting)
    else:
        name = "v1-inpainting" if options.inpainting else "v1-inference"
        settings = read_settings(shipped(f"configs/{name}.yaml"))
    dtype = getattr(torch, options.dtype)
    tensors = make_tensors(settings, dtype=dtype, ema=options.ema, position_ids=True)
    save_safetensors(options.path, tensors, {"format": "pt"})
    print(f"{options.path}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
