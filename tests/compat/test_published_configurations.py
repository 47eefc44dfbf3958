"""Configurations of latent-diffusion and of Stable Diffusion 2: at full size on the meta device, and run when tiny."""

import copy

import pytest
import torch
from keyed import fill, keyed_input
from safetensors.torch import save_file
from tiny import TEXT, tiny_config
from torch import nn

from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion,
    Layout2ImgDiffusion,
)
from ldm.modules.diffusionmodules.upscaling import (
    AbstractLowScaleModel,
    ImageConcatWithNoiseAugmentation,
    SimpleImageConcat,
)
from ldm.util import instantiate_from_config

HERE = __name__
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
KL = "ldm.models.autoencoder.AutoencoderKL"
DDPM = "ldm.models.diffusion.ddpm."
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"freeze": True, "layer": "penultimate"},
}
COMMON = {
    "num_timesteps_cond": 1,
    "log_every_t": 200,
    "timesteps": 1000,
    "channels": 4,
    "monitor": "val/loss_simple_ema",
    "use_ema": False,
}


def first_stage(**ddconfig):
    ddconfig = {**DDCONFIG, **ddconfig}
    loss = {"target": "torch.nn.Identity"}
    return {"target": KL, "params": {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": loss}}


def unet(**params):
    made = {
        "use_checkpoint": True,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "legacy": False,
        **params,
    }
    return {"target": UNET, "params": made}


SD2_UNET = {"image_size": 32, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
SD2 = {
    **COMMON,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "first_stage_key": "jpg",
    "cond_stage_key": "txt",
    "image_size": 64,
    "cond_stage_trainable": False,
    "scale_factor": 0.18215,
    "first_stage_config": first_stage(),
    "cond_stage_config": OPEN_CLIP,
}
X4_LOW = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02}, "max_noise_level": 350},
}
# What the published files say, and how many numbers their UNets have.
PUBLISHED = {
    "latent-diffusion/txt2img-1p4B-eval": (
        "LatentDiffusion",
        {
            **SD2,
            "first_stage_key": "image",
            "cond_stage_key": "caption",
            "image_size": 32,
            "cond_stage_trainable": True,
            "conditioning_key": "crossattn",
            "unet_config": unet(image_size=32, num_heads=8, context_dim=1280),
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.BERTEmbedder",
                "params": {"n_embed": 1280, "n_layer": 32},
            },
        },
        # v1's, and keys and values of 16 attentions to 1280 features instead of 768
        859_520_964 + 2 * (1280 - 768) * (5 * 320 + 5 * 640 + 6 * 1280),
    ),
    "v2-inference-v": (
        "LatentDiffusion",
        {**SD2, "parameterization": "v", "conditioning_key": "crossattn", "unet_config": unet(**SD2_UNET)},
        865_910_724,
    ),
    "v2-inpainting-inference": (
        "LatentInpaintDiffusion",
        {
            **SD2,
            "conditioning_key": "hybrid",
            "finetune_keys": None,
            "unet_config": unet(**SD2_UNET, in_channels=9),
        },
        865_910_724 + 5 * 320 * 9,
    ),
    "v2-midas-inference": (
        "LatentDepth2ImageDiffusion",
        {
            **SD2,
            "conditioning_key": "hybrid",
            "finetune_keys": None,
            "depth_stage_config": {"target": f"{HERE}.Depth"},
            "unet_config": unet(**SD2_UNET, in_channels=5),
        },
        865_910_724 + 320 * 9,
    ),
    "x4-upscaling": (
        "LatentUpscaleDiffusion",
        {
            **SD2,
            "parameterization": "v",
            "low_scale_key": "lr",
            "linear_start": 0.0001,
            "linear_end": 0.02,
            "image_size": 128,
            "conditioning_key": "hybrid-adm",
            "scale_factor": 0.08333,
            "low_scale_config": X4_LOW,
            "unet_config": unet(
                image_size=128,
                num_classes=1000,
                in_channels=7,
                model_channels=256,
                attention_resolutions=[2, 4, 8],
                channel_mult=[1, 2, 2, 4],
                disable_self_attentions=[True, True, True, False],
                disable_middle_self_attn=False,
                num_heads=8,
                context_dim=1024,
                use_linear_in_transformer=True,
            ),
            "first_stage_config": first_stage(ch_mult=[1, 2, 4]),
        },
        None,
    ),
}


class Depth(nn.Module):
    """A depth model: how bright the picture is, at half its size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 2)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.slow
def test_it_builds_at_full_size(name):
    cls, params, count = PUBLISHED[name]
    with torch.device("meta"):
        model = instantiate_from_config({"target": DDPM + cls, "params": copy.deepcopy(params)})
    assert type(model).__name__ == cls
    got = sum(p.numel() for p in model.model.parameters())
    assert count is None or got == count
    keys = model.state_dict()
    if "1p4B" in name:
        own = [key.removeprefix("cond_stage_model.") for key in keys if key.startswith("cond_stage_model.")]
        assert len(own) == 422 and own[0] == "transformer.token_emb.weight"
        assert own[1:8] == [
            "transformer.pos_emb.emb.weight",
            *(f"transformer.attn_layers.layers.0.{rest}" for rest in ("0.weight", "0.bias", "1.to_q.weight")),
            *(
                f"transformer.attn_layers.layers.0.1.{rest}"
                for rest in ("to_k.weight", "to_v.weight", "to_out.weight")
            ),
        ]
        assert own[-4:] == [
            f"transformer.{rest}"
            for rest in ("norm.weight", "norm.bias", "to_logits.weight", "to_logits.bias")
        ]
        shapes = {
            key: tuple(keys[f"cond_stage_model.transformer.{key}"].shape)
            for key in ("attn_layers.layers.62.1.to_q.weight", "attn_layers.layers.63.1.net.0.0.weight")
        }
        assert list(shapes.values()) == [(512, 1280), (5120, 1280)]
    if name == "x4-upscaling":
        assert keys["low_scale_model.alphas_cumprod"].shape == (1000,)
        assert keys["model.diffusion_model.label_emb.weight"].shape == (1000, 1024)
        assert not model.low_scale_model.betas.is_meta


def tiny(cls, in_channels=4, context=128, **params):
    made = tiny_config()["model"]["params"]
    made["unet_config"]["params"]["in_channels"] = in_channels
    made["unet_config"]["params"]["context_dim"] = context
    made["first_stage_config"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 1]  # f = 4
    if params.get("conditioning_key", "").endswith("adm"):
        made["unet_config"]["params"]["num_classes"] = 1000
    return cls(**{**made, **params})


def batch(size=32):
    return {
        "image": keyed_input("picture", (2, size, size, 3)).clamp(-1, 1),
        "lr": keyed_input("small", (2, size // 4, size // 4, 3)).clamp(-1, 1),
        "midas_in": keyed_input("large", (2, 3, 24, 40)),
        "txt": ["a red circle", "a blue star"],
    }


@pytest.fixture(scope="module")
def bert_model():
    """latent-diffusion's txt2img with small parts."""
    embedder = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": 24, "n_layer": 2, "vocab_size": 40, "max_seq_len": 7, "use_tokenizer": False},
    }
    return lambda **more: tiny(
        ddpm.LatentDiffusion, context=24, cond_stage_config=embedder, cond_stage_trainable=True, **more
    )


def test_a_file_of_latent_diffusions_layout_loads_and_samples(bert_model, tmp_path):
    """Every tensor of the file ends where its name says, the BERT's among them."""
    one = fill(bert_model(), only=("model.", "first_stage_model.", "cond_stage_model."))
    assert any(
        key.startswith("cond_stage_model.transformer.attn_layers.layers.3.1.net.2.")
        for key in one.state_dict()
    )
    # CompVis's files have the schedule's tables, and no logvar.
    state = {key: value.contiguous() for key, value in one.state_dict().items() if key != "logvar"}
    save_file(state, tmp_path / "model.safetensors")
    other = bert_model(ckpt_path=str(tmp_path / "model.safetensors"))
    read = other.state_dict()
    for key, value in state.items():
        assert torch.equal(read[key], value), key
    assert bert_model().load_state_dict(state, strict=True).missing_keys == []
    tokens = torch.tensor([[2, 5, 9, 3, 0, 0, 0], [2, 7, 3, 0, 0, 0, 0]])
    with torch.no_grad():
        c = other.get_learned_conditioning(tokens)
        samples, _ = DDIMSampler(other).sample(2, 2, (4, 8, 8), c, verbose=False)
        assert other.decode_first_stage(samples).shape == (2, 3, 32, 32)
    wrong = {**state, "cond_stage_model.transformer.attn_layers.layers.9.0.weight": torch.zeros(24)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(MismatchError, match="layers.9.0.weight"):
        bert_model(ckpt_path=str(tmp_path / "wrong.safetensors"))
    other.train()
    loss, log = other.training_step({**batch(), "txt": tokens}, 0)
    loss.backward()
    assert loss.isfinite() and other.cond_stage_model.transformer.token_emb.weight.grad is not None


UP = {"conditioning_key": "hybrid-adm", "low_scale_key": "lr", "parameterization": "v"}


@pytest.fixture(scope="module")
def upscaler():
    return fill(
        tiny(LatentUpscaleDiffusion, 7, **UP, low_scale_config=X4_LOW), only=("model.", "first_stage_model.")
    )


def test_an_upscaler_trains_samples_and_logs(upscaler):
    torch.manual_seed(0)
    z, c = upscaler.get_input(batch(), "image")
    levels = c["c_adm"]
    assert c["c_concat"][0].shape == (2, 3, 8, 8) and levels.shape == (2,) and (levels < 350).all()
    # v of the tiny file: what is joined is the small picture and noise, by the picture's own schedule
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4**0.5, 2e-2**0.5, 1000, dtype=torch.float64) ** 2, 0)[
        levels
    ]
    small = batch()["lr"].permute(0, 3, 1, 2)
    noise = (c["c_concat"][0] - alpha_bar.sqrt().reshape(2, 1, 1, 1) * small) / (
        1 - alpha_bar
    ).sqrt().reshape(2, 1, 1, 1)
    torch.manual_seed(0)
    again = upscaler.get_input(batch(), "image", log_mode=True)
    assert len(again) == 8 and torch.equal(again[7], levels) and torch.equal(again[5], small)
    assert abs(noise.std().item() - 1) < 0.15 and abs(noise.mean().item()) < 0.15
    loss, _ = upscaler.training_step(batch(), 0)
    loss.backward()
    assert loss.isfinite() and upscaler.model.diffusion_model.label_emb.weight.grad.abs().sum() > 0
    uc = {**c, "c_crossattn": [torch.zeros_like(c["c_crossattn"][0])]}
    with torch.no_grad():
        samples, _ = DDIMSampler(upscaler).sample(
            2, 2, (4, 8, 8), c, unconditional_conditioning=uc, unconditional_guidance_scale=3.0, verbose=False
        )
        assert upscaler.decode_first_stage(samples).shape == (2, 3, 32, 32)
        log = upscaler.log_images(
            batch(),
            N=2,
            ddim_steps=2,
            plot_progressive_rows=False,
            plot_diffusion_rows=False,
            unconditional_guidance_scale=2.0,
            unconditional_guidance_label="",
        )
    name = next(key for key in log if key.startswith("x_lr_rec_@noise_levels"))
    assert log["x_lr"].shape == log[name].shape == (2, 3, 8, 8) and "samples_cfg_scale_2.00" in log
    assert torch.equal(log["x_lr"], small)


def test_the_level_of_the_noise_matters(upscaler):
    x, small = keyed_input("x", (2, 4, 8, 8)), keyed_input("small", (2, 3, 8, 8))
    context, t = keyed_input("c", (2, 32, 128)), torch.tensor([5, 700])
    ask = lambda level: upscaler.apply_model(  # noqa: E731
        x, t, {"c_concat": [small], "c_crossattn": [context], "c_adm": torch.full((2,), level)}
    )
    with torch.no_grad():
        assert (ask(20) - ask(300)).abs().max() > 1e-3


def test_low_scale_models_by_hand():
    x = keyed_input("small", (2, 3, 4, 4))
    assert AbstractLowScaleModel()(x)[1] is None and torch.equal(AbstractLowScaleModel().decode(x), x)
    same, level = SimpleImageConcat()(x)
    assert torch.equal(same, x) and level.tolist() == [0, 0] and level.dtype == torch.long
    model = ImageConcatWithNoiseAugmentation({"timesteps": 10, "beta_schedule": "linear"}, max_noise_level=7)
    betas = torch.linspace(1e-4**0.5, 2e-2**0.5, 10, dtype=torch.float64) ** 2
    torch.testing.assert_close(model.betas, betas.float())
    alpha_bar = torch.cumprod(1 - betas, 0)
    want = {
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": torch.cat([torch.ones(1).double(), alpha_bar[:-1]]),
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": 1 / alpha_bar.sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
    }
    assert {"betas", *want} == set(model.state_dict())
    for name, table in want.items():
        torch.testing.assert_close(model.state_dict()[name], table.float())
    level, noise = torch.tensor([6, 2]), keyed_input("noise", (2, 3, 4, 4))
    a = alpha_bar[level].reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        model.q_sample(x, level, noise), (a.sqrt() * x + (1 - a).sqrt() * noise).float()
    )
    assert all(torch.equal(model(x, level)[1], level) for _ in range(2))
    drawn = torch.cat([model(x)[1] for _ in range(100)])
    assert set(drawn.tolist()) == set(range(7))
    for most in (0, 11):
        with pytest.raises(UsageError, match=f"from 1 to 10, the schedule's number of levels; got {most}"):
            ImageConcatWithNoiseAugmentation({"timesteps": 10}, max_noise_level=most)


HYBRID = {"conditioning_key": "hybrid", "finetune_keys": None}


def test_depth_is_joined_between_minus_one_and_one():
    model = tiny(LatentDepth2ImageDiffusion, 5, **HYBRID, depth_stage_config={"target": f"{HERE}.Depth"})
    z, c = model.get_input(batch(), "image")
    joined = c["c_concat"][0]
    assert z.shape == (2, 4, 8, 8) and joined.shape == (2, 1, 8, 8)
    torch.testing.assert_close(joined.amin(dim=(1, 2, 3)), torch.full((2,), -1.0))
    assert (joined.amax(dim=(1, 2, 3)) > 0.99).all() and not model.depth_model.weight.requires_grad
    raw = nn.functional.interpolate(
        2 * batch()["midas_in"].mean(1, keepdim=True).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)),
        size=(8, 8),
        mode="bicubic",
        align_corners=False,
    )
    low, high = raw.amin((1, 2, 3), True), raw.amax((1, 2, 3), True)
    torch.testing.assert_close(joined, 2 * (raw - low) / (high - low + 0.001) - 1, rtol=0, atol=1e-5)
    with torch.no_grad():
        log = model.log_images(
            batch(), N=2, ddim_steps=2, inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False
        )
    assert log["depth"].shape == (2, 1, 12, 20) and log["samples"].shape == (2, 3, 32, 32)
    model.training_step(batch(), 0)[0].backward()
    with pytest.raises(UsageError, match="a batch needs the key 'midas_in', got 'image', 'lr', 'txt'"):
        model.get_input({k: v for k, v in batch().items() if k != "midas_in"}, "image")


@pytest.mark.slow
def test_an_upscaler_begun_from_another_model(tmp_path):
    """Small pictures laid out by patches, without noise; and noised ones with their level."""
    start = fill(tiny(ddpm.LatentDiffusion), only=("model.", "first_stage_model."))
    save_file({k: v.contiguous() for k, v in start.state_dict().items()}, tmp_path / "start.safetensors")
    options = {"conditioning_key": "hybrid", "ckpt_path": str(tmp_path / "start.safetensors")}
    model = tiny(LatentUpscaleFinetuneDiffusion, 4 + 12, **options, reshuffle_patch_size=2)
    wide = model.state_dict()["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(wide[:, :4], start.state_dict()["model.diffusion_model.input_blocks.0.0.weight"])
    assert (wide[:, 4:] == 0).all()
    given = {**batch(), "lr": keyed_input("small", (2, 16, 16, 3))}
    joined = model.get_input(given, "image")[1]["c_concat"][0]
    pictures = given["lr"].permute(0, 3, 1, 2)
    assert joined.shape == (2, 12, 8, 8)
    quarters = [pictures[:, :, i : i + 8, j : j + 8] for i in (0, 8) for j in (0, 8)]
    assert torch.equal(joined, torch.cat(quarters, dim=1))
    loss, _ = model.training_step(given, 0)
    assert loss.isfinite()
    with pytest.raises(UsageError, match="reshuffle_patch_size 2 should divide the pictures' 15 x 16 pixels"):
        model.get_input({**given, "lr": given["lr"][:, :15]}, "image")

    noised = tiny(
        LatentUpscaleFinetuneDiffusion,
        7,
        **{**HYBRID, "conditioning_key": "hybrid-adm"},
        low_scale_config=X4_LOW,
        low_scale_key="lr",
    )
    z, c = noised.get_input(batch(), "image")
    assert c["c_concat"][0].shape == (2, 3, 8, 8) and c["c_adm"].shape == (2,)
    assert noised.training_step(batch(), 0)[0].isfinite()
    with torch.no_grad():
        log = noised.log_images(
            batch(), N=2, ddim_steps=2, inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False
        )
    assert torch.equal(log["lr"], batch()["lr"].permute(0, 3, 1, 2))


def test_files_of_an_upscaler_with_and_without_its_schedule(upscaler, tmp_path):
    state = {key: value.contiguous() for key, value in upscaler.state_dict().items()}
    for i, left_out in enumerate((("nothing",), ("low_scale_model.",))):
        path = tmp_path / f"{i}.safetensors"
        save_file({key: value for key, value in state.items() if not key.startswith(left_out)}, path)
        made = tiny(LatentUpscaleDiffusion, 7, **UP, low_scale_config=X4_LOW, ckpt_path=str(path))
        read = made.state_dict()
        assert all(torch.equal(read[key], value) for key, value in state.items())
        assert made.restarted_from_ckpt


def test_layouts_are_for_boxes():
    boxes = {"target": "torch.nn.Embedding", "params": {"num_embeddings": 9, "embedding_dim": 24}}
    model = tiny(Layout2ImgDiffusion, context=24, cond_stage_key="coordinates_bbox", cond_stage_config=boxes)
    tokens = torch.tensor([[1, 4, 8], [2, 2, 0]])
    z, c = model.get_input({**batch(), "coordinates_bbox": tokens}, "image")
    assert c.shape == (2, 3, 24)
    assert model.training_step({**batch(), "coordinates_bbox": tokens}, 0)[0].isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(Layout2ImgDiffusion, cond_stage_key="txt"), "'coordinates_bbox', got 'txt'"),
        (
            lambda: tiny(LatentUpscaleDiffusion, 7, **UP, low_scale_config=X4_LOW, noise_level_key="x"),
            "noise_level_key has no implementation",
        ),
        (
            lambda: tiny(
                LatentUpscaleDiffusion,
                7,
                **UP,
                low_scale_config=X4_LOW,
                cond_stage_trainable=True,
                cond_stage_config={
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"version": TEXT, "max_length": 32, "freeze": False},
                },
            ),
            "set cond_stage_trainable: false",
        ),
        (
            lambda: tiny(LatentUpscaleFinetuneDiffusion, 7, **HYBRID, concat_keys=("lr", "mask")),
            "needs one key in concat_keys, got .'lr', 'mask'",
        ),
        (
            lambda: tiny(LatentUpscaleFinetuneDiffusion, 7, **HYBRID, low_scale_config=X4_LOW),
            "needs low_scale_key",
        ),
        (
            lambda: tiny(
                LatentDepth2ImageDiffusion,
                5,
                **HYBRID,
                concat_keys="midas_in",
                depth_stage_config={"target": f"{HERE}.Depth"},
            ),
            "needs one key in concat_keys, got 'midas_in'",
        ),
    ],
)
def test_what_the_classes_refuse(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_they_are_where_stability_has_them():
    from ldm.models.diffusion.ddpm import LatentUpscaleDiffusion as Imported

    assert Imported is LatentUpscaleDiffusion is ddpm.LatentUpscaleDiffusion
    with pytest.raises(AttributeError, match="has no attribute 'LatentSideways'"):
        ddpm.LatentSideways  # noqa: B018
