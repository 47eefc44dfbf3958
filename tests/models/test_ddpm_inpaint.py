"""The nine-channel inpainting model: what is joined to the latents, and how a smaller model becomes one."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_diffusion import TextStage, Zero, config, latent_model, network

from ldm.config import instantiate_from_config
from ldm.config_text import load_config
from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.ddpm import LatentFinetuneDiffusion, LatentInpaintDiffusion
from ldm.paths import shipped

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def inpaint_model(**changes):
    settings = config(unet_config=network(in_channels=9), conditioning_key="hybrid", timesteps=20)
    made = LatentInpaintDiffusion(**{**settings, "finetune_keys": None, **changes}).eval()
    made.cond_stage_model = TextStage()
    return made


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    image = torch.rand(3, 32, 32, 3, generator=g) * 2 - 1
    mask = torch.zeros(3, 32, 32, 1)
    mask[:, 3:17, 9:30] = 1.0
    return {"image": image, "txt": ["a", "bb", "ccc"], "mask": mask, "masked_image": image * (mask < 0.5)}


def test_mask_and_masked_picture_are_joined_in_their_order(batch):
    made = inpaint_model()
    torch.manual_seed(0)
    z, c = made.get_input(batch, "image")
    assert z.shape == (3, 4, 8, 8) and list(c) == ["c_concat", "c_crossattn"]
    joined = c["c_concat"][0]
    assert joined.shape == (3, 5, 8, 8)
    assert torch.equal(
        joined[:, :1], F.interpolate(batch["mask"].permute(0, 3, 1, 2), size=(8, 8), mode="nearest")
    )
    assert set(joined[:, 0].unique().tolist()) == {0.0, 1.0}
    # The first stage's spread is small; its mean, scaled, says where the masked picture's latents must be.
    posterior = made.encode_first_stage(batch["masked_image"].permute(0, 3, 1, 2).contiguous())
    error = (joined[:, 1:] / 0.18215 - posterior.mean) / posterior.std
    assert error.std() == pytest.approx(1.0, abs=0.15) and error.mean() == pytest.approx(0.0, abs=0.15)
    assert c["c_crossattn"][0].shape == (3, 7, 24)


def test_what_else_get_input_returns(batch):
    made = inpaint_model()
    z, c, x, xrec, captions = made.get_input(batch, "image", return_first_stage_outputs=True, bs=2)
    assert len(z) == len(x) == len(xrec) == 2 and captions == ["a", "bb"]
    assert c["c_concat"][0].shape == (2, 5, 8, 8) and c["c_crossattn"][0].shape == (2, 7, 24)
    with pytest.raises(UsageError, match="takes its conditions from cond_stage_key, got cond_key='caption'"):
        made.get_input(batch, "image", cond_key="caption")
    with pytest.raises(UsageError, match="a batch needs the key 'masked_image', got 'image', 'txt', 'mask'"):
        made.get_input({key: batch[key] for key in ("image", "txt", "mask")}, "image")


def test_the_network_sees_nine_channels(batch):
    made = inpaint_model()
    made.model.diffusion_model = net = Zero()
    loss, _ = made.shared_step(batch)
    assert net.asked[0]["x"].shape == (3, 9, 8, 8) and torch.isfinite(loss)
    c = made.get_input(batch, "image")[1]
    assert made.sample(c, batch_size=2, verbose=False, timesteps=2).shape == (2, 4, 8, 8)
    assert torch.equal(net.asked[-1]["x"][:, 4:], c["c_concat"][0][:2])


@pytest.mark.slow
def test_images_to_look_at(batch):
    log = inpaint_model(c_concat_log_start=1, c_concat_log_end=5).log_images(
        batch,
        N=2,
        n_row=1,
        ddim_steps=2,
        unconditional_guidance_scale=2.0,
        unconditional_guidance_label="",
        inpaint=False,
    )
    picture = (2, 3, 32, 32)
    for name in (
        "inputs",
        "conditioning",
        "c_concat_decoded",
        "masked_image",
        "samples",
        "samples_cfg_scale_2.00",
    ):
        assert log[name].shape == picture, name


def saved(path, model):
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    return str(path)


def test_a_smaller_model_is_widened_with_zeros(tmp_path):
    """The new channels are not seen at first, so the widened model begins as the one it came from."""
    small = latent_model(timesteps=20, use_ema=True)
    small.model_ema.copy_from(small.model)
    path = saved(tmp_path / "m.safetensors", small)
    wide = LatentInpaintDiffusion(
        **config(
            unet_config=network(in_channels=9),
            conditioning_key="hybrid",
            timesteps=20,
            use_ema=True,
            ckpt_path=path,
        )
    ).eval()
    weight = wide.state_dict()[FIRST]
    assert torch.equal(weight[:, :4], small.state_dict()[FIRST]) and not weight[:, 4:].any()
    average = wide.model_ema.get_buffer("diffusion_modelinput_blocks00weight")
    assert torch.equal(average, weight) and wide.restarted_from_ckpt
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    extra, t = torch.randn(2, 5, 8, 8, generator=g), torch.tensor([3, 17])
    with torch.no_grad():
        got = wide.apply_model(x, t, {"c_concat": [extra], "c_crossattn": [c]})
        torch.testing.assert_close(got, small.apply_model(x, t, c), rtol=0, atol=1e-5)


def test_a_wide_file_is_taken_as_it_is(tmp_path):
    path = saved(
        tmp_path / "m.safetensors",
        first := inpaint_model(use_ema=False, cond_stage_config="__is_first_stage__"),
    )
    settings = config(unet_config=network(in_channels=9), conditioning_key="hybrid", timesteps=20)
    again = LatentInpaintDiffusion(**settings, ckpt_path=path, ignore_keys=["cond_stage_model"])
    assert torch.equal(again.state_dict()[FIRST], first.state_dict()[FIRST])


def test_finetuning_needs_a_file():
    with pytest.raises(
        UsageError, match="finetune_keys needs a ckpt_path to begin from; without one set finetune"
    ):
        inpaint_model(finetune_keys=[FIRST])


def test_a_file_that_cannot_be_widened_is_refused(tmp_path):
    path = saved(tmp_path / "m.safetensors", latent_model(timesteps=20))
    settings = config(
        unet_config=network(in_channels=9), conditioning_key="hybrid", timesteps=20, ckpt_path=path
    )
    with pytest.raises(
        MismatchError, match=r"of shape \[32, 4, 3, 3\] cannot be widened to \[32, 9, 3, 3\] keeping 5"
    ):
        LatentInpaintDiffusion(**settings, keep_finetune_dims=5)
    with pytest.raises(
        MismatchError, match=r"input_blocks.0.0.weight' \[32, 4, 3, 3\] instead of \[32, 9, 3, 3\]"
    ):
        LatentInpaintDiffusion(**settings, finetune_keys=None)


def test_the_masked_picture_must_be_among_the_maps():
    with pytest.raises(UsageError, match="masked_image_key 'picture' should be one of mask, masked_image"):
        inpaint_model(masked_image_key="picture")


def test_a_base_that_joins_nothing_says_so(batch):
    made = LatentFinetuneDiffusion(concat_keys=["mask"], **config(), finetune_keys=None)
    made.cond_stage_model = TextStage()
    with pytest.raises(NotImplementedError, match="LatentFinetuneDiffusion does not say what it joins"):
        made.get_input(batch, "image")


def test_the_shipped_configuration_builds():
    settings = load_config(shipped("configs/v1-inpainting.yaml"))
    with torch.device("meta"):
        made = instantiate_from_config(settings.model)
    assert isinstance(made, LatentInpaintDiffusion) and made.model.conditioning_key == "hybrid"
    assert sum(p.numel() for p in made.model.parameters()) == 859_535_364
    assert made.state_dict()[FIRST].shape == (320, 9, 3, 3)
    assert made.concat_keys == ("mask", "masked_image") and not made.use_ema
