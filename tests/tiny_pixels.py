"""Tiny files of OpenAI's kind with weights from their names, and the scripts to run on them."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from keyed import fill

from ldm.guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model,
    flags_for,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_model_and_diffusion_defaults,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2}
MODEL = {**SMALL, "image_size": 16, "attention_resolutions": "8", "learn_sigma": True}
LABELLED = {**MODEL, "class_cond": True, "num_classes": 6}
UPSAMPLER = {**SMALL, "large_size": 24, "small_size": 8, "attention_resolutions": "12"}
CLASSIFIER = {
    "image_size": 16,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "channel_mult": "1,2",
    "num_classes": 6,
}
# What no tensor shows, as flags of a call and as words of a command line.
CHAIN = {"diffusion_steps": 12, "noise_schedule": "cosine", "num_heads": 2}
CHAIN_WORDS = [word for name, value in CHAIN.items() for word in (f"--{name}", str(value))]


def write_network(path: Path, **flags: Any) -> Path:
    """Write a model, upsampler or classifier, whichever the flags describe."""
    if "classifier_width" in flags:
        create, defaults = create_classifier, classifier_defaults()
    elif "large_size" in flags:
        create, defaults = sr_create_model, sr_model_and_diffusion_defaults()
    else:
        create, defaults = create_model, model_and_diffusion_defaults()
    network = fill(create(**flags_for(create, {**defaults, **flags})), "p.")
    torch.save(network.state_dict(), path)
    return path


def script(name: str) -> Any:
    """Load scripts/{name}.py; its `main` runs it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
