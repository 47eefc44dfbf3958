"""Variants for folders beyond captions: masks, and classes of latent models, from the files that ship."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import DDCONFIG, figures, run

from ldm import StableDiffusion
from ldm.checkpoints import read_tensors
from ldm.errors import MismatchError, UsageError
from ldm.paths import CHECKOUT
from ldm.training.folder import ImageFolder
from ldm.training.masks import draw_mask
from ldm.training.merging import merge_configs
from ldm.training.trainer import Run, RunOptions


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cat", "cat", "dog", "dog", "dog")):
        path = tmp_path / "in" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (50, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text("a red circle")
    return tmp_path / "in"


@pytest.mark.parametrize("size", [8, 37])
def test_a_quarter_of_the_masks_is_everything_and_the_others_are_parts(size):
    masks = [draw_mask(size, np.random.default_rng(seed)) for seed in range(400)]
    shares = np.array([mask.mean() for mask in masks])
    assert all(mask.shape == (size, size) and set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    # Of 400 draws a quarter, within four standard deviations.
    assert 65 < (shares == 1).sum() < 135 + 10 * (size == 8) and shares.min() > 0
    assert 0.1 < np.median(shares[shares < 1]) < 0.6


def test_a_masked_picture_is_the_picture_where_nothing_is_to_be_repainted(folder):
    plain, masked = (ImageFolder(folder, image_size=24, masks=on) for on in (False, True))
    rng = np.random.default_rng
    one, again, other = (masked.item(1, rng(seed), 0) for seed in (3, 3, 5))
    assert one["mask"].shape == (24, 24, 1) and one["masked_image"].shape == (24, 24, 3)
    assert one["mask"].dtype == one["masked_image"].dtype == np.float32
    assert np.array_equal(one["mask"], again["mask"]) and not np.array_equal(one["mask"], other["mask"])
    kept = np.broadcast_to(one["mask"] == 0, one["image"].shape)
    assert 0 < kept.mean() < 1 and np.array_equal(one["masked_image"][kept], one["image"][kept])
    assert not one["masked_image"][~kept].any()
    assert np.array_equal(one["image"], plain.item(1, rng(3), 0)["image"])  # masks change no crop
    assert "mask" not in plain.item(1, rng(3), 0)


def test_a_small_picture_is_the_means_of_the_large_one(folder):
    made = ImageFolder(folder, image_size=24, low_resolution=6).item(1, np.random.default_rng(3), 0)
    assert made["LR_image"].shape == (6, 6, 3) and made["LR_image"].dtype == np.float32
    np.testing.assert_allclose(
        made["LR_image"][2, 5], made["image"][8:12, 20:24].mean(axis=(0, 1)), atol=1e-6
    )
    for size in (0, 7, 25, -1):
        with pytest.raises(UsageError, match=f"low_resolution should .*got {size}"):
            ImageFolder(folder, image_size=24, low_resolution=size)


def small(files, words, folder):
    """What ships, with networks of a test's size, two steps, and a grid after the second."""
    config = merge_configs([CHECKOUT / "configs" / f"{name}.yaml" for name in files], words)
    params = config.model.params
    params.pop("ckpt_path", None)
    params.image_size = 8
    params.unet_config.params.update(
        image_size=8, model_channels=32, channel_mult=[1, 2], attention_resolutions=[2], num_res_blocks=1
    )
    stage = params.first_stage_config.params
    stage.pop("ckpt_path", None)
    stage.ddconfig = {**DDCONFIG, "z_channels": 4}
    if "num_heads" in params.unet_config.params:
        params.unet_config.params.update(num_heads=2, context_dim=128, use_checkpoint=False)
        params.cond_stage_config.params = {"version": "model_data/shapes/text", "max_length": 32}
    if "finetune_keys" in params:
        params.finetune_keys = None
    if "low_resolution" in config.data.params.train.params:
        config.data.params.train.params.low_resolution = 8
    config.data.params.batch_size = 2
    config.data.params.pop("validation", None)
    config.data.params.train.params.update(folder=str(folder), image_size=16)
    config.lightning.trainer.update(max_steps=2, precision="32-true", accelerator="cpu")
    config.lightning.callbacks.image_logger.params.batch_frequency = 2
    config.training.update(image_steps=2)
    return config


VARIANTS = {
    "classes": (["shapes-diffusion", "own-pictures", "own-pictures-latent-classes"], "conditioning"),
    "super-resolution": (
        ["shapes-diffusion", "own-pictures", "own-pictures-superresolution"],
        "conditioning",
    ),
    "inpainting": (["v1-inpainting", "own-pictures", "own-pictures-inpainting"], "masked_image"),
    "box inpainting": (["own-pictures", "own-pictures-box-inpainting"], "masked_image"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "super-resolution" else pytest.mark.slow) for name in VARIANTS],
)
def test_a_variant_trains_and_shows_its_conditions(tmp_path, folder, name):
    files, shown = VARIANTS[name]
    made = run(small(files, [], folder), tmp_path / "run")
    assert made.code == 0 and all(np.isfinite(list(figures(tmp_path / "run").values())))
    pictures = {path.name.split("_gs-")[0] for path in (tmp_path / "run" / "images" / "train").iterdir()}
    assert {"inputs", "samples", shown} <= pictures
    if name == "classes":  # the classes are learned along with the network
        embedding = made.model.cond_stage_model.embedding.weight
        assert any(p is embedding for group in made.module.made[0].param_groups for p in group["params"])


def test_more_folders_than_classes_are_said_before_the_first_step(tmp_path, folder):
    config = small(VARIANTS["classes"][0], ["model.params.cond_stage_config.params.n_classes=1"], folder)
    with pytest.raises(
        MismatchError, match="has 2 classes, the model 1; set .*cond_stage_config.params.n_classes=2"
    ):
        run(config, tmp_path / "run")


def test_a_cache_that_would_lose_conditions_is_refused(tmp_path, folder):
    config = small(VARIANTS["classes"][0], ["data.params.cache_latents=-1"], folder)
    with pytest.raises(MismatchError, match="has other conditions .cond_stage_key 'class_label'") as caught:
        run(config, tmp_path / "run")
    assert len(str(caught.value)) <= 400


@pytest.mark.slow
def test_the_box_becomes_an_inpainting_model_that_begins_where_the_box_is(tmp_path, folder):
    """Widened with zeros, the first step's network paints what the box paints, whatever the mask."""
    files = [
        CHECKOUT / "configs" / f"{name}.yaml" for name in ("own-pictures", "own-pictures-box-inpainting")
    ]
    words = [
        f"data.params.train.params.folder={folder}",
        "lightning.trainer.max_steps=2",
        "data.params.batch_size=2",
    ]
    config = merge_configs(files, [*words, "lightning.trainer.accelerator=cpu"])
    model = Run(RunOptions(config=config, folder=tmp_path / "look")).model
    box = StableDiffusion.default().model
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([7, 500])
    c = box.get_learned_conditioning(["a red circle", ""])
    with torch.no_grad():
        wanted = box.apply_model(x, t, c)
        got = model.apply_model(x, t, {"c_concat": [torch.ones(2, 5, 16, 16)], "c_crossattn": [c]})
    assert torch.allclose(got, wanted, atol=1e-5)
    assert run(config, tmp_path / "run").code == 0
    tensors, _ = read_tensors(tmp_path / "run" / "weights.safetensors")
    weight = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert weight.shape[1] == 9 and weight[:, 4:].abs().max() > 0  # the new channels have begun to learn
