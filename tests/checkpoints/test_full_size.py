"""The full Stable Diffusion v1-5 layout: 1131 tensors in, each accounted for, values equal."""

import json
from pathlib import Path

import pytest
import torch
from make_synthetic import make_full

from ldm.checkpoints import inspect, load_latent_diffusion, open_weights
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.configs import read_settings
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE, unet_to_diffusers, vae_to_diffusers
from ldm.paths import shipped
from ldm.process.schedule import SCHEDULE_BUFFERS

RECORDED = Path(__file__).parents[1] / "golden" / "v1_keys_without_text_encoder.json"
POSITIONS = f"{TEXT}transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def empty():
    """Stable Diffusion v1 on the meta device."""
    return build_empty(read_settings(shipped("configs/v1-inference.yaml")))


def test_the_model_has_the_recorded_names_and_shapes(empty):
    recorded = json.loads(RECORDED.read_text())
    ours = {name: list(v.shape) for name, v in empty.state_dict().items() if not name.startswith(TEXT)}
    assert ours.pop("logvar") == [1000]  # cldm wants it; CompVis keeps it as a plain attribute
    assert ours == recorded
    text = [name for name in empty.state_dict() if name.startswith(f"{TEXT}transformer.text_model.")]
    assert len(text) == 196 and len(ours) + len(text) == 946 + 196


def test_building_takes_no_memory_for_weights(empty):
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("part", [UNET, VAE])
def test_every_name_has_its_place_in_diffusers(empty, part):
    from diffusers import AutoencoderKL, UNet2DConditionModel  # seconds, for this test alone

    ours = {n.removeprefix(part): tuple(v.shape) for n, v in empty.state_dict().items() if n.startswith(part)}
    with torch.device("meta"):
        if part == UNET:
            theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        else:
            theirs = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    table = (unet_to_diffusers if part == UNET else vae_to_diffusers)(ours)
    assert set(table) == set(ours) and sorted(table.values()) == sorted(wanted)
    for name, shape in ours.items():
        assert shape == wanted[table[name]] or shape == (*wanted[table[name]], 1, 1)


@pytest.mark.slow
def test_all_1131_tensors_of_a_full_file_are_accounted_for(tmp_path, full_size):
    path = tmp_path / "v1-5-pruned-emaonly.safetensors"
    make_full(path)
    summary = inspect(path, check_values=False)
    assert {name: part.tensors for name, part in summary.parts.items()} == {
        "UNet": 686,
        "VAE": 248,
        "text encoder": 197,
    }
    assert sum(part.parameters for part in summary.parts.values()) == 1_066_235_307 + 77

    model, report = load_latent_diffusion(path, dtype=torch.float16)
    assert report.family == "v1" and report.total == 1131
    assert len(report.assigned) == 1130 and report.ignored == {POSITIONS: "a constant, made anew"}
    assert set(report.initialised) == {*SCHEDULE_BUFFERS, "logvar"}
    assert sum(name.startswith(f"{TEXT}transformer.text_model.") for name in report.assigned.values()) == 196
    state = model.state_dict()
    weights = open_weights(path)
    for name, target in report.assigned.items():
        assert torch.equal(state[target], weights.read(name)), name
    weights.close()
    path.unlink()
