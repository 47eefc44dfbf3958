"""How a narrow first stage is helped to start: identities, and crowded pictures."""

import numpy as np
import torch
from keyed import keyed_input

from ldm.models.autoencoder import AutoencoderKL
from ldm.shapes.scenes import BACKGROUNDS, COLOURS, render_crowd
from ldm.training.data import Shapes
from ldm.training.initial_weights import start_as_identity

DDCONFIG = {
    "double_z": True,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
}


@torch.no_grad()
def test_blocks_that_start_as_identities_pass_their_input_on():
    vae = AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, 3)
    start_as_identity(vae, torch.Generator().manual_seed(0))
    h = keyed_input("h", (2, 32, 5, 6))
    for block in (vae.encoder.down[0].block[0], vae.encoder.mid.block_1, vae.decoder.up[0].block[1]):
        assert torch.equal(block(h, None), h)
    assert torch.equal(vae.encoder.mid.attn_1(h), h)
    assert torch.equal(vae.encoder.down[1].attn[0](h), h)
    # A convolution between them keeps the variance of what it sees.
    wide = keyed_input("wide", (2, 32, 40, 50))
    assert 0.9 < vae.decoder.up[1].upsample.conv(wide).std() < 1.1


def test_crowds_are_repeatable_and_full_of_edges():
    first, again, other = (np.asarray(render_crowd(np.random.default_rng(s), 48)) for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (48, 48, 3)
    edges, colours = [], set()
    for seed in range(40):
        pixels = np.asarray(render_crowd(np.random.default_rng(seed), 48)).astype(int)
        edges.append((np.abs(np.diff(pixels, axis=1)).sum(-1) > 30).mean())
        colours |= set(map(tuple, pixels.reshape(-1, 3)))
    assert set(COLOURS.values()) | set(BACKGROUNDS.values()) <= colours
    scenes = Shapes(image_size=128, crop_size=48)
    plain = [scenes.item(i, np.random.default_rng(i), 0)["image"] * 127.5 for i in range(40)]
    plain_edges = [(np.abs(np.diff(p, axis=1)).sum(-1) > 30).mean() for p in plain]
    assert np.mean(edges) > 2 * np.mean(plain_edges)


def test_crowds_give_way_to_scenes_at_their_step():
    data = Shapes(image_size=64, crop_size=24, crop_until_step=7, crowd_until_step=5)
    rng = np.random.default_rng
    crowd, crop, whole = (data.item(0, rng(1), step) for step in (4, 5, 7))
    assert crowd["image"].shape == crop["image"].shape == (24, 24, 3)
    assert crowd["txt"] == "" and crop["txt"] == whole["txt"] != ""
    assert whole["image"].shape == (64, 64, 3)
    assert not np.array_equal(crowd["image"], crop["image"])
    assert crowd["image"].min() >= -1 and crowd["image"].max() <= 1
