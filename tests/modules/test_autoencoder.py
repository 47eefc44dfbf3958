"""First stages against the recorded originals, and laws that hold for any weights."""

import json

import pytest
import torch
from keyed import fill, keyed_input
from safetensors.torch import load_file

from ldm.errors import MismatchError, UsageError
from ldm.models.autoencoder import (
    AutoencoderKL,
    IdentityFirstStage,
    VectorQuantizer,
    VQModel,
    VQModelInterface,
)
from ldm.modules.attention import Normalize
from ldm.modules.diffusionmodules.model import Encoder, Model, ResnetBlock, get_timestep_embedding, make_attn
from ldm.modules.distributions.distributions import (
    DiagonalGaussianDistribution,
    DiracDistribution,
    normal_kl,
)

CONFIGS = json.load(open(__file__.rsplit("/", 2)[0] + "/golden/modules.json"))
NO_LOSS = {"target": "torch.nn.Identity"}
DDCONFIG = {
    "double_z": True,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("vae.")])
@torch.no_grad()
def test_autoencoder_gives_the_recorded_numbers(name, golden):
    recorded, case = load_file(golden / "modules.safetensors"), CONFIGS[name]
    vae = fill(AutoencoderKL(case["ddconfig"], NO_LOSS, case["embed_dim"]), name + ".")
    assert {k: list(v.shape) for k, v in vae.state_dict().items()} == case["keys"]
    posterior = vae.encode(keyed_input(name + ".x", (2, 3, 16, 24)))
    z = keyed_input(name + ".z", tuple(posterior.mean.shape))
    results = {"mean": posterior.mean, "logvar": posterior.logvar, "kl": posterior.kl()}
    results |= {"dec": vae.decode(z), "nll": posterior.nll(z)}
    for part, got in results.items():
        torch.testing.assert_close(got, recorded[f"{name}.{part}"], rtol=1e-5, atol=1e-5)


def test_posterior_noise_comes_from_the_cpu_generator():
    posterior = DiagonalGaussianDistribution(keyed_input("moments", (2, 6, 4, 5)))
    torch.manual_seed(7)
    sample = posterior.sample()
    torch.manual_seed(7)
    noise = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(sample, posterior.mean + posterior.std * noise, rtol=0, atol=0)
    seeded = posterior.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(seeded, sample, rtol=0, atol=0)


def test_log_variance_is_clamped():
    posterior = DiagonalGaussianDistribution(
        torch.tensor([-100.0, 50.0]).reshape(1, 2, 1, 1).repeat(1, 2, 1, 1)
    )
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_divergence_of_a_posterior_from_itself_is_zero_and_matches_torch():
    first = DiagonalGaussianDistribution(keyed_input("a", (2, 6, 4, 5)).double())
    second = DiagonalGaussianDistribution(keyed_input("b", (2, 6, 4, 5)).double())
    assert first.kl(first).abs().max() == 0
    as_torch = [torch.distributions.Normal(p.mean, p.std) for p in (first, second)]
    want = torch.distributions.kl_divergence(*as_torch).sum(dim=(1, 2, 3))
    torch.testing.assert_close(first.kl(second), want, rtol=0, atol=1e-10)
    per_value = normal_kl(first.mean, first.logvar, second.mean, second.logvar)
    torch.testing.assert_close(per_value.sum(dim=(1, 2, 3)), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        second.nll(first.mean), -as_torch[1].log_prob(first.mean).sum(dim=(1, 2, 3)), rtol=0, atol=1e-10
    )


def test_normal_kl_takes_plain_numbers_beside_a_tensor():
    mean = torch.tensor([0.0, 2.0])
    assert normal_kl(mean, 0.0, 0.0, 0.0).tolist() == [0.0, 2.0]
    with pytest.raises(TypeError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_deterministic_posteriors_are_points():
    moments = keyed_input("moments", (2, 6, 4, 5))
    posterior = DiagonalGaussianDistribution(moments, deterministic=True)
    assert torch.equal(posterior.sample(), moments[:, :3])
    assert posterior.kl().item() == 0
    assert posterior.nll(moments[:, :3]).item() == 0
    point = DiracDistribution(moments)
    assert point.sample() is moments
    assert point.mode() is moments


def test_the_first_stage_trains_with_one_or_two_optimizers():
    vae = AutoencoderKL(DDCONFIG, NO_LOSS, 5)
    vae.learning_rate = 0.25
    (optimizer,), schedulers = vae.configure_optimizers()
    assert schedulers == []
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert len(optimizer.param_groups[0]["params"]) == len(list(vae.parameters()))
    batch = {"image": keyed_input("picture", (2, 16, 24, 3))}
    pictures = vae.log_images(batch)
    assert {k: tuple(v.shape) for k, v in pictures.items()} == dict.fromkeys(
        ("inputs", "samples", "reconstructions"), (2, 3, 16, 24)
    )


def test_double_z_is_needed():
    with pytest.raises(MismatchError, match="double_z: True"):
        AutoencoderKL({**DDCONFIG, "double_z": False}, NO_LOSS, 5)


def test_misspelt_ddconfig_is_an_error():
    with pytest.raises(TypeError, match="z_chanels"):
        Encoder(**{**DDCONFIG, "z_chanels": 3})


def test_quantiser_snaps_to_the_nearest_entry_and_passes_gradients_through():
    quantiser = fill(VectorQuantizer(11, 3), "vq.")
    z = keyed_input("z", (2, 3, 4, 5)).requires_grad_()
    quantised, loss, (_, _, indices) = quantiser(z)
    cells = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(cells, quantiser.embedding.weight).argmin(1)
    assert torch.equal(indices, nearest)
    want = quantiser.embedding.weight[nearest].view(2, 4, 5, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantised, want, rtol=0, atol=1e-6)
    weights = keyed_input("w", (2, 3, 4, 5))
    (gradient,) = torch.autograd.grad((quantised * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weights, rtol=0, atol=0)
    squared = (want - z).square().mean().item()
    assert loss.item() == pytest.approx(1.25 * squared, rel=1e-5)
    # The published weights were trained with beta on the term that moves the codebook.
    (codes,) = torch.autograd.grad(loss, quantiser.embedding.weight)
    plain = VectorQuantizer(11, 3, legacy=False)
    plain.load_state_dict(quantiser.state_dict())
    (plain_codes,) = torch.autograd.grad(plain(z)[1], plain.embedding.weight)
    torch.testing.assert_close(codes, 0.25 * plain_codes, rtol=1e-5, atol=1e-7)
    entries = quantiser.get_codebook_entry(indices, (2, 4, 5, 3))
    torch.testing.assert_close(entries, want, rtol=0, atol=1e-6)
    with pytest.raises(MismatchError, match="remap='table.npy'"):
        VectorQuantizer(11, 3, remap="table.npy")


@torch.no_grad()
def test_vq_interface_quantises_on_decoding_only():
    config = {**DDCONFIG, "double_z": False}
    plain = fill(VQModel(config, NO_LOSS, n_embed=13, embed_dim=5, sane_index_shape=True), "vq.")
    interface = fill(VQModelInterface(5, config, NO_LOSS, n_embed=13), "vq.")
    assert plain.state_dict().keys() == interface.state_dict().keys()
    x = keyed_input("x", (2, 3, 16, 24))
    h = interface.encode(x)
    assert h.shape == (2, 5, 8, 12)
    quantised, _, (_, _, indices) = plain.encode(x)
    torch.testing.assert_close(interface.decode(h), plain.decode(quantised), rtol=0, atol=1e-6)
    # The straight-through sum z + (q - z) rounds where the entry itself does not.
    torch.testing.assert_close(plain.decode_code(indices), plain.decode(quantised), rtol=0, atol=1e-5)
    assert (interface.decode(h, force_not_quantize=True) - interface.decode(h)).abs().max() > 1e-3
    torch.testing.assert_close(plain(x)[0], plain.decode(quantised), rtol=0, atol=1e-6)


def test_vq_average_follows_the_weights_and_steps_aside():
    model = VQModel({**DDCONFIG, "double_z": False}, NO_LOSS, n_embed=13, embed_dim=5, use_ema=True)
    before = model.quant_conv.weight.detach().clone()
    with torch.no_grad():
        model.quant_conv.weight.add_(1.0)
    model.on_train_batch_end()
    with model.ema_scope():
        averaged = model.quant_conv.weight.detach().clone()
    # The first update keeps 2/11 of the old average.
    torch.testing.assert_close(averaged, before + 9 / 11, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.quant_conv.weight.detach(), before + 1.0, rtol=0, atol=1e-6)


def test_batches_can_be_resized_while_training():
    config = {**DDCONFIG, "double_z": False}
    model = VQModel(config, NO_LOSS, n_embed=13, embed_dim=5, batch_resize_range=(32, 64))
    batch = {"image": torch.zeros(2, 48, 48, 3)}
    assert model.get_input(batch, "image").shape == (2, 3, 64, 64)
    model.global_step = 5
    torch.manual_seed(0)
    sides = {model.get_input(batch, "image").shape[-1] for _ in range(24)}
    assert sides == {32, 48, 64}


def test_identity_first_stage_returns_what_it_gets():
    x = torch.ones(1)
    assert IdentityFirstStage().encode(x) is x
    assert IdentityFirstStage().decode(x) is x
    assert IdentityFirstStage()(x) is x
    assert IdentityFirstStage().quantize(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


@pytest.mark.parametrize("kind", ["vanilla", "linear", "none"])
def test_every_kind_of_middle_attention_builds_and_runs(kind):
    vae = AutoencoderKL({**DDCONFIG, "attn_type": kind}, NO_LOSS, 5)
    assert vae.decode(vae.encode(torch.zeros(1, 3, 16, 24)).mode()).shape == (1, 3, 16, 24)
    with pytest.raises(UsageError, match="'vanilla', 'linear' or 'none', got 'flash'"):
        make_attn(32, "flash")


@torch.no_grad()
def test_tanh_bounds_pictures_and_features_can_be_had_instead():
    z = 30 * keyed_input("z", (1, 3, 8, 12))
    squashed = fill(AutoencoderKL({**DDCONFIG, "tanh_out": True}, NO_LOSS, 3), "v.")
    free = fill(AutoencoderKL(DDCONFIG, NO_LOSS, 3), "v.")
    torch.testing.assert_close(squashed.decode(z), free.decode(z).tanh(), rtol=0, atol=1e-5)
    features = fill(AutoencoderKL({**DDCONFIG, "give_pre_end": True}, NO_LOSS, 3), "v.")
    assert features.decode(z).shape == (1, 32, 16, 24)


def test_ddpm_embedding_is_sine_then_cosine_and_ends_at_a_ten_thousandth():
    embedded = get_timestep_embedding(torch.tensor([0, 3]), 9)
    assert embedded.shape == (2, 9)
    assert embedded[0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0]
    frequencies = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 3)
    torch.testing.assert_close(embedded[1, :4].double(), (3 * frequencies).sin(), rtol=0, atol=1e-6)


def test_pixel_unet_uses_level_and_context():
    config = {k: v for k, v in DDCONFIG.items() if k not in ("double_z", "z_channels")}
    model = fill(Model(**{**config, "in_channels": 5, "attn_resolutions": [8]}), "m.")
    x, context = keyed_input("x", (2, 3, 16, 24)), keyed_input("c", (2, 2, 16, 24))
    early, late = (model(x, torch.tensor([t, t]), context) for t in (5, 900))
    assert early.shape == (2, 3, 16, 24)
    assert (early - late).abs().max() > 1e-3
    assert model.get_last_layer().shape == (3, 32, 3, 3)
    with pytest.raises(UsageError, match="needs t, the levels"):
        model(x, None, context)


def test_a_shortcut_may_be_wide():
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=True, dropout=0.0, temb_channels=0)
    assert block.conv_shortcut.kernel_size == (3, 3)
    assert block(torch.zeros(1, 32, 5, 6), None).shape == (1, 64, 5, 6)


def test_maps_with_many_labels_are_shown_in_colour():
    vae = AutoencoderKL({**DDCONFIG, "in_channels": 7, "out_ch": 7}, NO_LOSS, 5, colorize_nlabels=7)
    pictures = vae.log_images({"image": keyed_input("map", (2, 16, 24, 7))})
    assert pictures["inputs"].shape == (2, 3, 16, 24)
    assert pictures["inputs"].min() == -1
    assert pictures["inputs"].max() == 1
    assert AutoencoderKL(DDCONFIG, NO_LOSS, 5).get_input({"g": torch.zeros(2, 4, 6)}, "g").shape == (
        2,
        1,
        4,
        6,
    )


@torch.no_grad()
def test_32_groups_of_one_channel_wipe_out_a_plain_colour_and_fewer_keep_it():
    """Why num_groups exists: a norm with one channel to a group maps every constant map to its bias."""
    colours = keyed_input("colours", (2, 32, 1, 1)).expand(2, 32, 5, 6)
    wiped, kept = (Normalize(32, groups)(colours) for groups in (32, 8))
    assert (wiped[0] - wiped[1]).abs().max() < 1e-3
    assert (kept[0] - kept[1]).abs().max() > 1
    vae = AutoencoderKL({**DDCONFIG, "num_groups": 8}, NO_LOSS, 3)
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert vae.state_dict().keys() == AutoencoderKL(DDCONFIG, NO_LOSS, 3).state_dict().keys()
