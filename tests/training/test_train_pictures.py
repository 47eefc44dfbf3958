"""Every kind of model through the trainer for two steps, with its grids of pictures after each and a validation."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from tiny_diffusion import pixel_model
from tiny_training import TEXT, diffusion, figures, put, run
from torch import nn

from ldm.errors import UsageError
from ldm.models.diffusion.ddpm import DDPM
from ldm.training.callbacks import Validation, as_colours, spelled
from ldm.training.data import Shapes

DDPM_ = "ldm.models.diffusion.ddpm."
HERE = __name__
FROZEN_TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"version": TEXT, "max_length": 32},
}
IDENTITY = {"target": "torch.nn.Identity"}
LOW = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"timesteps": 50}, "max_noise_level": 30},
}


class Everything(Shapes):
    """Shapes with everything that any model is conditioned on."""

    def item(self, index: int, rng: np.random.Generator, step: int) -> dict[str, Any]:
        made = super().item(index, rng, step)
        image = made["image"]
        hole = np.zeros((16, 16, 1), np.float32)
        hole[4:11, 3:9] = 1
        made["LR"], made["mask"], made["masked_image"] = image[::2, ::2], hole, image * (1 - hole)
        made["midas_in"] = image.transpose(2, 0, 1)
        made["coordinates_bbox"] = np.array([1, 5, 3])
        return made


class Depth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1, keepdim=True)


class Boxes(nn.Module):
    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, 128).float()


class FewerOptions(DDPM):
    """Somebody's model, whose log_images knows little and gives back a mask and a map beside pictures."""

    def log_images(self, batch: Any, N: int = 8) -> dict[str, torch.Tensor]:
        x = self.get_input(batch, "image")[:N]
        return {"mask": x[:, :1], "two": x[:, :2], "map": torch.cat([x, x], dim=1), "grid": x[0]}


def latent(target: str, joined: int = 0, unet: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    config = diffusion(cond_stage_trainable=False, ucg_training=None, cond_stage_config=FROZEN_TEXT)
    model = config["model"]
    model["target"] = target if "." in target else DDPM_ + target
    model["params"].update({"timesteps": 50, **params})
    model["params"]["unet_config"]["params"].update({"in_channels": 3 + joined, **(unet or {})})
    return config


def pixels(target: str) -> dict[str, Any]:
    config = latent(target)
    unet = config["model"]["params"]["unet_config"]
    unet["params"].update(use_spatial_transformer=False, context_dim=None, image_size=16)
    config["model"]["params"] = {
        "timesteps": 50,
        "image_size": 16,
        "channels": 3,
        "first_stage_key": "image",
        "unet_config": unet,
    }
    return config


def classes() -> dict[str, Any]:
    stage = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 128, "n_classes": 7, "key": "class_label"},
    }
    return latent(
        "LatentDiffusion",
        cond_stage_key="class_label",
        cond_stage_config=stage,
        cond_stage_trainable=True,
        ucg_training={"class_label": {"p": 0.5, "val": 6}},
    )


PLAIN_UNET = {"use_spatial_transformer": False, "context_dim": None}
HYBRID = {"conditioning_key": "hybrid", "finetune_keys": None}
SHRUNK = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": {}}
LATENT_ROWS = {"inputs", "reconstruction", "diffusion_row", "samples"}
# what is trained, and which grids it shows
KINDS = {
    "captions": (lambda: latent("LatentDiffusion"), {"inputs", "conditioning", "samples"}),
    "unconditional": (
        lambda: latent(
            "LatentDiffusion",
            unet=PLAIN_UNET,
            conditioning_key=None,
            cond_stage_config="__is_unconditional__",
        ),
        {"inputs", "samples"},
    ),
    "class labels": (classes, LATENT_ROWS | {"conditioning"}),
    "concat": (
        lambda: latent(
            "LatentDiffusion",
            3,
            unet=PLAIN_UNET,
            conditioning_key="concat",
            cond_stage_key="LR",
            cond_stage_config=IDENTITY,
        ),
        LATENT_ROWS | {"conditioning"},
    ),
    "concat, shrunk": (
        lambda: latent(
            "LatentDiffusion",
            3,
            unet=PLAIN_UNET,
            conditioning_key="concat",
            cond_stage_key="masked_image",
            cond_stage_config=SHRUNK,
        ),
        LATENT_ROWS | {"conditioning"},
    ),
    "layout": (
        lambda: latent(
            "Layout2ImgDiffusion",
            cond_stage_key="coordinates_bbox",
            cond_stage_config={"target": f"{HERE}.Boxes"},
        ),
        LATENT_ROWS,
    ),
    "inpainting": (
        lambda: latent("LatentInpaintDiffusion", 4, **HYBRID),
        LATENT_ROWS | {"conditioning", "masked_image"},
    ),
    "depth": (
        lambda: latent(
            "LatentDepth2ImageDiffusion", 1, depth_stage_config={"target": f"{HERE}.Depth"}, **HYBRID
        ),
        LATENT_ROWS | {"conditioning", "depth"},
    ),
    "upscaling": (
        lambda: latent(
            "LatentUpscaleDiffusion",
            3,
            {"num_classes": 50},
            conditioning_key="hybrid-adm",
            low_scale_config=LOW,
        ),
        LATENT_ROWS | {"conditioning", "x_lr"},
    ),
    "upscaling, fine-tuned": (
        lambda: latent(
            "LatentUpscaleFinetuneDiffusion", 12, concat_keys=["image"], reshuffle_patch_size=2, **HYBRID
        ),
        LATENT_ROWS | {"conditioning", "lr"},
    ),
    "pixels": (lambda: pixels("DDPM"), {"inputs", "samples"}),
    "somebody's own": (lambda: pixels(f"{HERE}.FewerOptions"), {"mask", "two", "map", "grid"}),
}


SLOW = ("captions", "unconditional", "concat, shrunk", "layout", "depth", "upscaling, fine-tuned")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
@pytest.mark.thinned(4)
def test_every_kind_of_model_trains_and_shows_its_pictures(tmp_path, kind):
    """By default the first grid comes at step 1; a validation set of 1 is measured with batches of 2."""
    make, grids = KINDS[kind]
    config = make()
    put(
        config,
        "data.params.train",
        {"target": f"{HERE}.Everything", "params": {"image_size": 16, "label": "shape"}},
    )
    held_out = {"image_size": 16, "label": "shape", "length": 1}
    put(config, "data.params.validation", {"target": f"{HERE}.Everything", "params": held_out})
    put(config, "lightning.trainer.max_steps", 2)
    put(config, "training.image_steps", 2)
    put(config, "training.validate_every", 2)
    made = run(config, tmp_path)
    assert made.code == 0 and sorted(figures(tmp_path)) == [0, 1]
    names = {path.name.split("_gs-")[0] for path in (tmp_path / "images" / "train").glob("*_gs-000001_*.png")}
    assert {name for name in names if "@" not in name} == grids
    assert list(figures(tmp_path, "val/loss_simple")) == [1]


def test_grids_have_three_channels():
    x = torch.arange(2 * 5 * 3 * 7).reshape(2, 5, 3, 7).float()
    assert torch.equal(as_colours(x), x[:, :3]) and torch.equal(as_colours(x[0]), x[:1, :3])
    assert torch.equal(as_colours(x[:, 1:2]), x[:, [1, 1, 1]])
    assert torch.equal(as_colours(x[:, :2]), x[:, [0, 1, 0]])


def test_class_numbers_are_dropped_for_the_one_that_stands_for_none():
    model = pixel_model(ucg_training={"y": {"p": 0.5, "val": 9}})
    torch.manual_seed(0)
    labels = torch.arange(8)
    kept = model._drop_conditions({"y": labels})["y"]
    assert kept.dtype == labels.dtype and 0 < (kept == 9).sum() < 8
    assert torch.equal(kept[kept != 9], labels[kept != 9])
    with pytest.raises(UsageError, match="ucg_training.y.val should be the number that stands for no y"):
        pixel_model(ucg_training={"y": {"p": 0.5, "val": ""}})._drop_conditions({"y": labels})


def test_no_validation_set_is_too_small_or_empty_to_go_on(capsys):
    """Of fewer samples than a batch all are measured, and of none nothing; both are said or harmless."""
    for length, batches in ((0, 0), (1, 1), (2, 1), (5, 2)):
        validation = Validation(range(length), None, every=1, batches=7, batch_size=2)
        assert validation.batches == batches and (validation.stream is not None) == bool(batches)
        said = capsys.readouterr().out
        assert ("fewer than batch_size (2)" in said) == (length < 2), length


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (101, "2 min"),
        (5_900, "98 min"),
        (6_000, "1 h 40 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_are_spelled(seconds, text):
    assert spelled(seconds) == text


def test_the_first_and_the_third_step_say_what_a_run_will_take(tmp_path, capsys):
    config = pixels("DDPM")
    config["lightning"]["callbacks"] = {
        "images": {"target": "main.ImageLogger", "params": {"disabled": True}}
    }
    put(config, "lightning.trainer.max_steps", 4)
    put(config, "training.print_every", 1e6)
    run(config, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "3/4"]
    assert all(re.search(r" [\d.]+ s/step, \d+ s left, peak [\d.]+ GiB$", line) for line in lines), lines
