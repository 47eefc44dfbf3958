"""The full-size UNet and autoencoder of Stable Diffusion v1, against the recorded originals.

Built on the meta device and given keyed weights in place of random ones, so that memory holds them once: 3.9 GB at
the peak, of which the UNet's 860 M weights are 3.4.
"""

import json

import pytest
import torch
from keyed import keyed_input, weight
from safetensors.torch import load_file

from ldm.config import get_obj_from_str
from ldm.config_text import load_config
from ldm.paths import shipped

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("full_size")]
PREFIXES = {"unet_config": "model.diffusion_model.", "first_stage_config": "first_stage_model."}


def full_size(part, golden):
    """Build a part of configs/v1-inference.yaml with keyed weights, its keys being exactly the recorded ones."""
    config = load_config(shipped("configs/v1-inference.yaml"))["model"]["params"][part]
    with torch.device("meta"):
        model = get_obj_from_str(config["target"])(**config["params"])
    prefix = PREFIXES[part]
    keys = json.loads((golden / "v1_keys_without_text_encoder.json").read_text())
    recorded = {key: shape for key, shape in keys.items() if key.startswith(prefix)}
    assert {prefix + key: list(value.shape) for key, value in model.state_dict().items()} == recorded
    state = {key.removeprefix(prefix): weight(key, tuple(shape)) for key, shape in recorded.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def agrees(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_unet_of_860_million_weights(golden):
    recorded = load_file(golden / "full.safetensors")
    unet = full_size("unet_config", golden)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    out = unet(
        keyed_input("full.x", (1, 4, 32, 32)), torch.tensor([501]), keyed_input("full.c", (1, 77, 768))
    )
    agrees(out, recorded["unet.32"])
    x, context = keyed_input("full.x2", (2, 4, 24, 40)), keyed_input("full.c2", (2, 77, 768))
    agrees(unet(x, torch.tensor([1, 981]), context=context), recorded["unet.24x40b2"])


@torch.no_grad()
def test_autoencoder_of_84_million_weights(golden):
    recorded = load_file(golden / "full.safetensors")
    vae = full_size("first_stage_config", golden)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    agrees(vae.decode(keyed_input("full.z", (1, 4, 16, 16))), recorded["vae.dec"])
    posterior = vae.encode(keyed_input("full.img", (1, 3, 128, 128)).clamp(-1, 1))
    agrees(posterior.mean, recorded["vae.mean"])
    agrees(posterior.logvar, recorded["vae.logvar"])
