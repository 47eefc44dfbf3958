"""The latent diffusion model against the recorded original, and every option of its own."""

import json

import pytest
import torch
from keyed import keyed_input
from safetensors.torch import load_file
from tiny_diffusion import GOLDEN, UNET, ClassStage, TextStage, Zero, config, latent_model, network
from torch import nn

from ldm.config import instantiate_from_config
from ldm.config_text import load_config
from ldm.errors import UsageError
from ldm.models.autoencoder import IdentityFirstStage, VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.paths import shipped
from ldm.process.schedule import SCHEDULE_BUFFERS

T = torch.tensor([10, 900])
SPLIT = {
    "ks": (4, 4),
    "stride": (2, 4),
    "vqf": 4,
    "patch_distributed_vq": True,
    "tie_braker": False,
    "clip_max_weight": 0.5,
    "clip_min_weight": 0.01,
    "clip_max_tie_weight": 0.5,
    "clip_min_tie_weight": 0.01,
}


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * (1 + want.abs().max().item()))


@pytest.fixture(scope="module")
def model():
    return latent_model()


@pytest.fixture(scope="module")
def short():
    return latent_model(timesteps=20)


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "diffusion.safetensors")


@pytest.fixture(scope="module")
def inputs():
    return {
        "xT": keyed_input("xT", (2, 4, 8, 8)),
        "c": keyed_input("c", (2, 7, 24)),
        "uc": keyed_input("uc", (2, 7, 24)),
        "x0": keyed_input("x0", (2, 4, 8, 8)),
        "noise": keyed_input("noise", (2, 4, 8, 8)),
        "mask": (keyed_input("mask", (2, 1, 8, 8)) > 0).float(),
    }


def bare(network=None, stage=None, **changes):
    """A latent model whose network and stages are replaced by ones that can be looked through."""
    made = LatentDiffusion(
        **config(
            timesteps=20,
            first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
            **changes,
        )
    ).eval()
    if network is not None:
        made.model.diffusion_model = network
    if stage is not None:
        made.cond_stage_model = stage
    return made


def pictures(count=3, size=8, channels=4):
    return torch.rand(count, size, size, channels, generator=torch.Generator().manual_seed(0)) * 2 - 1


# -- against the record -----------------------------------------------------------------------------


def test_the_state_dict_has_the_recorded_keys_and_logvar(golden, model):
    keys = json.loads((golden / "diffusion.json").read_text())["keys"]
    have = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert have == {**keys, "logvar": [1000]}


@pytest.mark.parametrize("name", [*SCHEDULE_BUFFERS, "lvlb_weights"])
def test_every_recorded_buffer_comes_out(recorded, model, name):
    if "buf." + name in recorded:
        torch.testing.assert_close(getattr(model, name), recorded["buf." + name], rtol=0, atol=1e-8)
    else:
        assert name == "sqrt_recipm1_alphas_cumprod"
        want = ((1 - model.alphas_cumprod.double()) / model.alphas_cumprod.double()).sqrt()
        torch.testing.assert_close(getattr(model, name), want.float(), rtol=0, atol=2e-6)


def test_noising_and_posterior_are_the_recorded_ones(recorded, model, inputs):
    close(model.q_sample(inputs["x0"], T, noise=inputs["noise"]), recorded["q_sample"])
    for name, got in zip(
        ("mean", "var", "logvar"), model.q_posterior(inputs["x0"], inputs["noise"], T), strict=True
    ):
        close(got, recorded["q_post." + name])


@torch.no_grad()
def test_one_step_has_the_recorded_mean(recorded, model, inputs):
    close(model.p_mean_variance(inputs["xT"], inputs["c"], T, clip_denoised=False)[0], recorded["p_mean"])


@torch.no_grad()
def test_first_stage_results_are_the_recorded_ones(recorded, model, inputs):
    close(model.decode_first_stage(inputs["x0"]), recorded["decode_first_stage"])
    torch.manual_seed(1)
    posterior = model.encode_first_stage(keyed_input("img", (2, 3, 32, 32)))
    close(model.get_first_stage_encoding(posterior), recorded["encode_first_stage.sample"])


@torch.no_grad()
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_losses_are_the_recorded_ones(recorded, inputs, loss_type, parameterization):
    made = latent_model(
        loss_type=loss_type,
        parameterization=parameterization,
        original_elbo_weight=0.1,
        l_simple_weight=0.9,
        logvar_init=0.3,
    )
    loss, log = made.p_losses(inputs["x0"], inputs["c"], T, noise=inputs["noise"])
    prefix = f"loss.{loss_type}.{parameterization}"
    close(loss, recorded[prefix])
    assert sorted(log) == ["val/loss", "val/loss_simple", "val/loss_vlb"]
    for name, value in log.items():
        close(value, recorded[f"{prefix}.{name.replace('/', '_')}"])


@torch.no_grad()
def test_the_loss_of_a_velocity_is_the_recorded_one(golden):
    unet = json.loads((golden / "sd2_and_control.json").read_text())["control"]["unet"]
    made = latent_model(unet_config={"target": UNET, "params": unet}, parameterization="v")
    loss, _ = made.p_losses(
        keyed_input("v.x0", (2, 4, 8, 8)),
        {"c_crossattn": [keyed_input("v.c", (2, 7, 24))]},
        torch.tensor([5, 700]),
        noise=keyed_input("v.noise", (2, 4, 8, 8)),
    )
    close(loss, load_file(golden / "sd2_and_control.safetensors")["v.loss"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.thinned(2)
def test_ancestral_samples_are_the_recorded_ones(recorded, short, inputs, masked):
    options = {"mask": inputs["mask"], "x0": inputs["x0"]} if masked else {}
    torch.manual_seed(3)
    got = short.p_sample_loop(inputs["c"], (2, 4, 8, 8), x_T=inputs["xT"], verbose=False, **options)
    close(got, recorded["ddpm20_mask" if masked else "ddpm20"], 1e-4)


# -- sampling ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_conditions_may_come_as_tensor_list_or_dict(model, inputs):
    c = inputs["c"]
    forms = [c, [c], {"c_crossattn": [c]}, [c[:, :3], c[:, 3:]], {"c_crossattn": [c[:, :3], c[:, 3:]]}]
    answers = [model.apply_model(inputs["xT"], T, form) for form in forms]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_a_network_in_half_precision_serves_samples_in_single(short, inputs, dtype):
    made = latent_model(timesteps=20).to(dtype)
    t = torch.tensor([3, 17])
    got = made.apply_model(inputs["xT"], t, inputs["c"])
    assert got.dtype == torch.float32
    want = short.apply_model(inputs["xT"], t, inputs["c"])
    close(got, want, 0.03)
    samples = made.sample(inputs["c"], batch_size=2, verbose=False)
    assert samples.dtype == torch.float32 and samples.isfinite().all()


def test_the_route_decides_what_a_bare_tensor_is():
    net = Zero()
    made = bare(net, concat_mode=True, conditioning_key=None)
    assert made.model.conditioning_key == "concat"
    made.apply_model(torch.zeros(2, 4, 8, 8), T, torch.ones(2, 3, 8, 8))
    assert net.asked[0]["x"].shape == (2, 7, 8, 8)
    assert bare(concat_mode=False, conditioning_key=None).model.conditioning_key == "crossattn"


def test_a_networks_tuple_is_opened_unless_asked_for():
    class Pair(Zero):
        def forward(self, x, t, **conditions):
            return super().forward(x, t, **conditions), torch.eye(4)[None, :, :, None].expand(2, 4, 4, 2)

    made = bare(Pair(1.0))
    x, t, c = torch.zeros(2, 4, 8, 8), torch.tensor([3, 7]), torch.zeros(2, 7, 24)
    assert made.apply_model(x, t, c).shape == (2, 4, 8, 8)
    assert len(made.apply_model(x, t, c, return_ids=True)) == 2
    x_prev, ids = made.p_sample(x, c, t, return_codebook_ids=True)
    assert x_prev.shape == x.shape and ids[0, :, 0].tolist() == [0, 1, 2, 3]


def test_a_velocity_network_walks_the_chain_of_its_noise_twin():
    """A network that answers v = a eps - s x0 for its own eps leads to the same step as one that answers eps."""
    g = torch.Generator().manual_seed(0)
    x, answer = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(2))
    t, c = torch.tensor([3, 17]), torch.zeros(2, 7, 24)

    class Fixed(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, x, t, context):
            return self.out

    eps_model = bare(Fixed(answer))
    x0 = eps_model.predict_start_from_noise(x, t, answer)
    v_model = bare(Fixed(eps_model.get_v(x0, answer, t)), parameterization="v")
    x0_model = bare(Fixed(x0), parameterization="x0")
    want = eps_model.p_mean_variance(x, c, t, clip_denoised=False)[0]
    for other in (v_model, x0_model):
        torch.testing.assert_close(
            other.p_mean_variance(x, c, t, clip_denoised=False)[0], want, rtol=0, atol=1e-5
        )


def test_a_score_corrector_changes_the_noise_and_needs_a_noise_network():
    class Corrector:
        def modify_score(self, model, e_t, x, t, c, by):
            return e_t + by

    x, t, c = torch.zeros(2, 4, 8, 8), torch.tensor([3, 7]), torch.zeros(2, 7, 24)
    options = {"clip_denoised": False, "return_x0": True}
    corrected = bare(Zero(0.25)).p_mean_variance(
        x, c, t, score_corrector=Corrector(), corrector_kwargs={"by": 0.5}, **options
    )
    torch.testing.assert_close(
        corrected[3], bare(Zero(0.75)).p_mean_variance(x, c, t, **options)[3], rtol=0, atol=1e-6
    )
    with pytest.raises(UsageError, match="a score_corrector needs a network that predicts eps, not v"):
        bare(Zero(), parameterization="v").p_mean_variance(x, c, t, False, score_corrector=Corrector())


def test_temperature_and_dropout_act_on_the_noise():
    made = bare(Zero())
    x, t, c = torch.zeros(2, 4, 8, 8), torch.tensor([9, 9]), torch.zeros(2, 7, 24)
    draws = {}
    for name, options in {
        "plain": {},
        "half": {"temperature": 0.5},
        "none": {"temperature": 0.0},
        "thin": {"noise_dropout": 0.6},
    }.items():
        torch.manual_seed(0)
        draws[name] = made.p_sample(x, c, t, **options)
    torch.testing.assert_close(draws["half"], draws["plain"] / 2, rtol=0, atol=1e-7)
    assert not draws["none"].any()
    assert 0.5 < (draws["thin"] == 0).float().mean() < 0.7


def test_a_predicted_sample_is_quantised_or_clamped_where_asked():
    made = bare(Zero(1.0))
    made.first_stage_model.quantize = lambda x: (torch.full_like(x, 0.125), None, None)
    x, t, c = torch.full((1, 4, 8, 8), 5.0), torch.tensor([3]), torch.zeros(1, 7, 24)
    assert (made.p_sample(x, c, t, quantize_denoised=True, return_x0=True)[1] == 0.125).all()
    assert made.p_sample(x, c, t, clip_denoised=True, return_x0=True)[1].abs().max() <= 1


def test_both_loops_walk_one_chain(short, inputs):
    """p_sample_loop keeps samples, progressive_denoising the clean samples; the end is the same."""
    seen, levels = [], []
    options = {"x_T": inputs["xT"], "verbose": False, "log_every_t": 7}
    torch.manual_seed(0)
    end, kept = short.p_sample_loop(
        inputs["c"], (2, 4, 8, 8), return_intermediates=True, callback=levels.append, **options
    )
    torch.manual_seed(0)
    again, clean = short.progressive_denoising(
        inputs["c"], (4, 8, 8), batch_size=2, img_callback=lambda x, i: seen.append((x, i)), **options
    )
    torch.testing.assert_close(again, end, rtol=0, atol=0)
    assert levels == list(range(19, -1, -1)) == [i for _, i in seen]
    assert len(kept) == 1 + len(clean) == 5  # levels 19, 14, 7 and 0, and the noise before them
    torch.testing.assert_close(seen[-1][0], end, rtol=0, atol=0)
    torch.testing.assert_close(clean[-1], end, rtol=0, atol=1e-5)


def test_a_chain_may_be_begun_lower():
    made = bare(Zero())
    levels = []
    options = {"x_T": torch.zeros(2, 4, 8, 8), "verbose": False, "callback": levels.append}
    made.p_sample_loop(torch.zeros(2, 7, 24), (2, 4, 8, 8), timesteps=9, start_T=3, **options)
    assert levels == [2, 1, 0]
    made.progressive_denoising(torch.zeros(2, 7, 24), (2, 4, 8, 8), start_T=2, **options)
    assert levels[3:] == [1, 0]
    for wrong in (0, 21):
        with pytest.raises(UsageError, match=rf"timesteps should lie in 1\.\.20, got {wrong}"):
            made.p_sample_loop(torch.zeros(2, 7, 24), (2, 4, 8, 8), timesteps=wrong, verbose=False)


def test_temperature_may_differ_by_level():
    made = bare(Zero())
    options = {"x_T": torch.zeros(1, 4, 8, 8), "verbose": False}
    cold = made.progressive_denoising(torch.zeros(1, 7, 24), (1, 4, 8, 8), temperature=[0.0] * 20, **options)
    assert not cold[0].any()
    warm = [0.0] * 20
    warm[19] = 1.0  # the first level that is visited
    assert made.progressive_denoising(torch.zeros(1, 7, 24), (1, 4, 8, 8), temperature=warm, **options)[
        0
    ].any()


def test_of_more_conditions_than_asked_for_the_first_are_taken():
    net = Zero()
    made = bare(net)
    c = torch.arange(5.0)[:, None, None].expand(5, 7, 24)
    for form in (c, [c], {"c_crossattn": [c]}):
        made.sample(form, batch_size=2, verbose=False, timesteps=1)
        assert net.asked[-1]["context"][:, 0, 0].tolist() == [0.0, 1.0]
    samples = made.sample(c, batch_size=3, verbose=False, timesteps=1, shape=(3, 4, 8, 16))
    assert samples.shape == (3, 4, 8, 16)
    assert made.sample(c, batch_size=3, verbose=False, timesteps=1).shape == (3, 4, 8, 8)


def test_nothing_is_printed_and_progress_is_told(capfd):
    levels = []
    bare(Zero()).sample(torch.zeros(2, 7, 24), batch_size=2, verbose=True, callback=levels.append)
    assert levels == list(range(19, -1, -1))
    assert capfd.readouterr() == ("", "")


@torch.no_grad()
def test_the_mask_has_the_last_word(inputs):
    """It is blended after each step, so the end shows x0 as the cleanest level has it, exactly."""
    made = bare(Zero())
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :3] = 1.0
    torch.manual_seed(5)
    end = made.sample(torch.zeros(2, 7, 24), batch_size=2, mask=mask, x0=inputs["x0"], timesteps=1)
    torch.manual_seed(5)
    torch.randn(2, 4, 8, 8)  # where the chain begins
    torch.randn(2, 4, 8, 8)  # of its only step
    kept = made.q_sample(inputs["x0"], torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(end[:, :, :3], kept[:, :, :3], rtol=0, atol=0)
    assert (end[:, :, 3:] - kept[:, :, 3:]).abs().min() > 1e-6


def test_a_mask_without_its_samples_is_refused():
    with pytest.raises(
        UsageError, match="a mask needs x0, the samples to keep where the mask is 1; got none"
    ):
        bare(Zero()).p_sample_loop(
            torch.zeros(1, 7, 24), (1, 4, 8, 8), verbose=False, mask=torch.ones(1, 1, 8, 8)
        )


def test_logged_samples_come_from_ddim_or_from_the_chain(short, inputs):
    torch.manual_seed(0)
    fast, tables = short.sample_log(inputs["c"], 2, ddim=True, ddim_steps=4, eta=0.0)
    assert fast.shape == (2, 4, 8, 8) and set(tables) == {"x_inter", "pred_x0"}
    slow, kept = short.sample_log(inputs["c"], 2, ddim=False, ddim_steps=4, verbose=False)
    assert slow.shape == (2, 4, 8, 8) and isinstance(kept, list)


# -- the first stage --------------------------------------------------------------------------------


def test_the_first_stage_stays_frozen_and_in_evaluation(model):
    model.train()
    assert not model.first_stage_model.training and not model.first_stage_model.encoder.training
    assert model.model.training
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())
    model.eval()


def test_decoding_with_gradients_is_the_same_decoding(model, inputs):
    z = inputs["x0"].clone().requires_grad_()
    decoded = model.differentiable_decode_first_stage(z)
    decoded.sum().backward()
    assert z.grad.abs().min() > 0
    plain = model.decode_first_stage(z)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, decoded.detach(), rtol=0, atol=1e-6)


def test_latents_are_decoded_by_a_first_stage_of_another_dtype(inputs):
    made = latent_model()
    made.first_stage_model.to(torch.bfloat16)
    decoded = made.decode_first_stage(inputs["x0"])
    assert decoded.dtype == torch.float32
    close(decoded, latent_model().decode_first_stage(inputs["x0"]), 0.05)
    assert made.encode_first_stage(torch.zeros(1, 3, 32, 32)).mean.dtype == torch.bfloat16


def test_an_answer_that_is_no_latent_is_refused(model):
    with pytest.raises(UsageError, match="answer with a distribution or latents, got list"):
        model.get_first_stage_encoding([torch.zeros(1)])


@pytest.fixture(scope="module")
def vq():
    """A latent model over a codebook: 11 entries of 3 features, latents 8 cells for pictures of 32 pixels."""
    stage = config()["first_stage_config"]["params"]["ddconfig"]
    torch.manual_seed(0)
    return LatentDiffusion(
        **config(
            scale_factor=0.5,
            timesteps=20,
            channels=3,
            unet_config=network(in_channels=3, out_channels=3),
            first_stage_config={
                "target": "ldm.models.autoencoder.VQModelInterface",
                "params": {
                    "n_embed": 11,
                    "embed_dim": 3,
                    "ddconfig": {**stage, "double_z": False, "z_channels": 3},
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
        )
    ).eval()


@torch.no_grad()
def test_a_codebook_is_applied_unless_told_not_to(vq):
    assert isinstance(vq.first_stage_model, VQModelInterface)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    stage = vq.first_stage_model
    torch.testing.assert_close(vq.decode_first_stage(z), stage.decode(2 * z), rtol=0, atol=1e-6)
    free = vq.decode_first_stage(z, force_not_quantize=True)
    torch.testing.assert_close(free, stage.decode(2 * z, force_not_quantize=True), rtol=0, atol=1e-6)
    assert (free - vq.decode_first_stage(z)).abs().max() > 1e-4


@torch.no_grad()
def test_predicted_codebook_entries_are_decoded(vq):
    indices = torch.randint(0, 11, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    scores = nn.functional.one_hot(indices, 11).permute(0, 3, 1, 2).float().log()
    entries = vq.first_stage_model.quantize.embedding(indices).permute(0, 3, 1, 2).contiguous()
    want = vq.first_stage_model.decode(2 * entries, force_not_quantize=True)
    for z in (scores, indices):
        torch.testing.assert_close(vq.decode_first_stage(z, predict_cids=True), want, rtol=0, atol=1e-6)


# -- tiles ------------------------------------------------------------------------------------------


def test_a_cellwise_network_does_not_feel_the_tiles():
    class Cellwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x, t):
            self.seen.append(x.shape)
            return x[:, :4] * 2 + x[:, 4:].sum(1, keepdim=True)

    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 4, 8, 12, generator=g), torch.randn(2, 3, 8, 12, generator=g)
    made = bare(Cellwise(), conditioning_key="concat")
    whole = made.apply_model(x, T, c)
    made.split_input_params = SPLIT
    torch.testing.assert_close(made.apply_model(x, T, c), whole, rtol=0, atol=1e-5)
    assert made.model.diffusion_model.seen[1:] == [(2, 7, 4, 4)] * 9


@torch.no_grad()
def test_contexts_go_whole_to_every_tile(model, inputs):
    net = Zero(0.5)
    made = bare(net)
    made.split_input_params = {**SPLIT, "tie_braker": True}
    out = made.apply_model(inputs["xT"], T, inputs["c"])
    torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=0, atol=1e-6)
    assert len(net.asked) == 6 and all(torch.equal(a["context"], inputs["c"]) for a in net.asked)


def test_tiles_larger_than_the_map_are_the_map(inputs):
    net = Zero(0.5)
    made = bare(net)
    made.split_input_params = {**SPLIT, "ks": (128, 128), "stride": (64, 64)}
    made.apply_model(inputs["xT"], T, inputs["c"])
    assert [a["x"].shape for a in net.asked] == [(2, 4, 8, 8)]


def test_the_first_stage_works_on_tiles():
    class Quarter(IdentityFirstStage):
        def encode(self, x):
            return DiagonalGaussianDistribution(
                torch.cat([x[:, :, ::4, ::4], torch.full_like(x[:, :, ::4, ::4], -30.0)], dim=1)
            )

        def decode(self, z):
            return z.repeat_interleave(4, 2).repeat_interleave(4, 3)

    made = bare()
    made.first_stage_model = Quarter()
    made.scale_factor = 0.5
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = made.decode_first_stage(z)
    made.split_input_params = {**SPLIT}
    torch.testing.assert_close(made.decode_first_stage(z), whole, rtol=0, atol=1e-5)
    made.split_input_params = {**SPLIT, "ks": (16, 16), "stride": (8, 16)}
    back = made.get_first_stage_encoding(made.encode_first_stage(whole))
    torch.testing.assert_close(back, z, rtol=0, atol=1e-5)
    assert made.split_input_params["original_image_size"] == (32, 32)
    made.split_input_params = {**SPLIT, "patch_distributed_vq": False}
    torch.testing.assert_close(made.decode_first_stage(z), whole, rtol=0, atol=0)


def test_what_tiles_cannot_do_is_refused():
    made = bare(Zero())
    made.split_input_params = SPLIT
    x, c = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, 24)
    with pytest.raises(UsageError, match="return_ids gives one answer for a whole map"):
        made.apply_model(x, T[:1], c, return_ids=True)
    with pytest.raises(UsageError, match="tiles of 4 cells every 2 do not cover a height of 9 cells"):
        made.apply_model(torch.zeros(1, 4, 9, 8), T[:1], c)
    made.cond_stage_key = "coordinates_bbox"
    with pytest.raises(UsageError, match="split_input_params cannot cut 'coordinates_bbox'"):
        made.apply_model(x, T[:1], c)


# -- conditions and batches -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["txt", "caption"])
def test_captions_reach_the_text_stage_as_they_are(key):
    made = bare(Zero(), TextStage(), cond_stage_key=key)
    batch = {"image": pictures(), key: ["a", "bb", "ccc"]}
    z, c = made.get_input(batch, "image")
    torch.testing.assert_close(z, 0.18215 * batch["image"].permute(0, 3, 1, 2), rtol=0, atol=1e-7)
    assert c.shape == (3, 7, 24) and c[:, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    z, c, original = made.get_input(batch, "image", return_original_cond=True, bs=2)
    assert len(z) == len(c) == 2 and original == ["a", "bb"]
    with pytest.raises(UsageError, match=f"a batch needs the key '{key}', got 'image'"):
        made.get_input({"image": batch["image"]}, "image")


def test_boxes_pass_through_and_classes_take_the_whole_batch():
    boxes = torch.rand(3, 7, 24)
    made = bare(Zero(), nn.Identity(), cond_stage_key="coordinates_bbox")
    assert torch.equal(made.get_input({"image": pictures(), "coordinates_bbox": boxes}, "image")[1], boxes)
    for key in ("cls", "class_label"):
        made = bare(Zero(), ClassStage(), cond_stage_key=key)
        batch = {"image": pictures(), "cls": torch.tensor([4, 5, 6])}
        c, original = made.get_input(batch, "image", bs=2, return_original_cond=True)[1:]
        assert c[:, 0, 0].tolist() == [4.0, 5.0] and original is batch


def test_pictures_can_be_conditions():
    made = bare(Zero(), nn.Identity(), cond_stage_key="segmentation", conditioning_key="concat")
    batch = {"image": pictures(), "segmentation": pictures(channels=2)}
    c = made.get_input(batch, "image")[1]
    assert torch.equal(c, batch["segmentation"].permute(0, 3, 1, 2))
    c = made.get_input({**batch, "edges": batch["segmentation"] + 1}, "image", cond_key="edges")[1]
    assert torch.equal(c, batch["segmentation"].permute(0, 3, 1, 2) + 1)


def test_what_get_input_returns_is_in_the_originals_order():
    made = bare(Zero(), TextStage())
    batch = {"image": pictures(), "txt": ["a", "bb", "ccc"]}
    z, c, x, xrec, again, original = made.get_input(
        batch, "image", return_first_stage_outputs=True, return_x=True, return_original_cond=True
    )
    torch.testing.assert_close(xrec, x, rtol=0, atol=1e-6)
    assert again is x and original == batch["txt"]


def test_the_first_stage_can_be_the_condition_stage():
    made = bare(
        Zero(), cond_stage_config="__is_first_stage__", cond_stage_key="image", conditioning_key="concat"
    )
    assert made.cond_stage_model is made.first_stage_model
    batch = {"image": pictures()}
    z, c = made.get_input(batch, "image")
    torch.testing.assert_close(c, z / 0.18215, rtol=0, atol=1e-6)


def test_an_unconditional_model_has_no_conditions():
    made = bare(Zero(), cond_stage_config="__is_unconditional__")
    assert made.model.conditioning_key is None and made.cond_stage_model is None
    z, c = made.get_input({"image": pictures()}, "image")
    assert c is None
    assert made.sample(None, batch_size=2, verbose=False, timesteps=2).shape == (2, 4, 8, 8)
    loss, _ = made.shared_step({"image": pictures()})
    assert torch.isfinite(loss)
    with pytest.raises(UsageError, match="no condition stage .'__is_unconditional__'., so it cannot encode"):
        made.get_learned_conditioning(["a"])
    kept = bare(cond_stage_config="__is_unconditional__", force_null_conditioning=True)
    assert kept.model.conditioning_key == "crossattn"


@pytest.mark.parametrize("special", ["__is_unconditional__", "__is_first_stage__"])
def test_what_cannot_be_trained_along_is_refused(special):
    with pytest.raises(UsageError, match=f"cond_stage_config '{special}' cannot be trained"):
        bare(cond_stage_config=special, cond_stage_trainable=True)


def test_another_method_of_the_condition_stage_may_be_named():
    stage = TextStage()
    stage.shout = lambda captions: stage.encode([c * 2 for c in captions])
    made = bare(Zero(), stage, cond_stage_forward="shout")
    assert made.get_learned_conditioning(["ab"])[0, 0, 0].item() == pytest.approx(0.4)
    made.cond_stage_forward = "whisper"
    with pytest.raises(UsageError, match="cond_stage_forward 'whisper' is no method of TextStage"):
        made.get_learned_conditioning(["ab"])


def test_a_condition_that_is_a_distribution_gives_its_mode():
    class Uncertain(nn.Module):
        def encode(self, c):
            return DiagonalGaussianDistribution(torch.cat([c, torch.zeros_like(c)], dim=1))

    c = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bare(Zero(), Uncertain()).get_learned_conditioning(c), c)


def test_the_empty_condition_is_spread_over_the_batch():
    made = bare(Zero(), TextStage())
    assert made.get_unconditional_conditioning(3, "")[:, 0, 0].tolist() == [0.0, 0.0, 0.0]
    assert made.get_unconditional_conditioning(2, ["abc"]).shape == (2, 7, 24)
    classes = bare(Zero(), ClassStage(), cond_stage_key="cls")
    assert classes.get_unconditional_conditioning(2)[:, 0, 0].tolist() == [9.0, 9.0]
    embedder = ClassEmbedder(5, n_classes=7, key="cls")
    classes = bare(Zero(), embedder, cond_stage_key="cls").get_unconditional_conditioning(2)
    assert torch.equal(classes, embedder.embedding.weight[6].expand(2, 1, 5))
    with pytest.raises(
        UsageError, match="conditions 'txt' have no empty value of their own; give null_label"
    ):
        made.get_unconditional_conditioning(2)


def test_a_condition_stage_is_trained_along_where_asked():
    made = LatentDiffusion(**config(cond_stage_trainable=True, learn_logvar=True))
    made.cond_stage_model = TextStage()
    for parameter in made.model.parameters():
        nn.init.normal_(parameter, std=0.05)
    made.learning_rate = 1e-3
    trained = made.configure_optimizers().param_groups[0]["params"]
    assert any(p is made.cond_stage_model.scale for p in trained) and trained[-1] is made.logvar
    batch = {"image": pictures(2, 32, 3), "txt": ["a", "bb"]}
    assert made.get_input(batch, "image")[1] == ["a", "bb"]
    loss, log = made.training_step(batch, 0)
    loss.backward()
    assert made.cond_stage_model.scale.grad.abs() > 0 and made.logvar.grad.any()
    assert set(log) == {f"train/{k}" for k in ("loss", "loss_simple", "loss_vlb", "loss_gamma")} | {"logvar"}


def test_losses_are_weighed_by_learned_log_variances(inputs):
    made = latent_model(learn_logvar=True, logvar_init=0.3)
    with torch.no_grad():
        made.logvar[900] = -0.5
        loss, log = made.p_losses(inputs["x0"], inputs["c"], T, noise=inputs["noise"])
        answer = made.apply_model(made.q_sample(inputs["x0"], T, inputs["noise"]), T, inputs["c"])
    error = (answer - inputs["noise"]).square().mean(dim=(1, 2, 3))
    logvar = torch.tensor([0.3, -0.5])
    torch.testing.assert_close(loss, (error / logvar.exp() + logvar).mean(), rtol=0, atol=1e-5)
    assert log["val/loss_gamma"] == loss and log["logvar"] == pytest.approx(
        (0.3 * 999 - 0.5) / 1000, abs=1e-6
    )


def test_training_needs_conditions():
    with pytest.raises(UsageError, match="conditioning_key 'crossattn' needs conditions, got none"):
        bare(Zero())(torch.zeros(2, 4, 8, 8), None)


def test_conditions_can_be_noised_along():
    net = Zero()
    made = bare(net, num_timesteps_cond=5)
    assert made.cond_ids[:6].tolist() == [0, 5, 10, 14, 19, 19] and len(made.cond_ids) == 20
    assert "cond_ids" not in made.state_dict()
    c = torch.full((2, 7, 24), 3.0)
    made.p_sample_loop(c, (2, 4, 8, 8), verbose=False, timesteps=1)
    first = net.asked[-1]["context"]
    assert not torch.equal(first, c)
    torch.testing.assert_close(first, c, rtol=0, atol=0.2)  # level 0 has sigma 0.03
    made(torch.zeros(2, 4, 8, 8), c)
    with pytest.raises(UsageError, match="num_timesteps_cond > 1 noises a tensor of conditions, got dict"):
        made.p_sample_loop({"c_crossattn": [c]}, (2, 4, 8, 8), verbose=False)
    with pytest.raises(UsageError, match=r"num_timesteps_cond should be at most timesteps \(20\), got 21"):
        bare(num_timesteps_cond=21)


# -- scale ------------------------------------------------------------------------------------------


def test_the_scale_is_measured_on_the_very_first_batch():
    made = bare(Zero(), TextStage(), scale_by_std=True, scale_factor=1.0)
    batch = {"image": 4 * pictures(), "txt": ["a", "bb", "ccc"]}
    made.on_train_batch_start(batch, 1)
    assert made.scale_factor == 1.0
    made.on_train_batch_start(batch, 0)
    torch.testing.assert_close(made.scale_factor, 1 / batch["image"].std(), rtol=0, atol=1e-6)
    made.on_train_batch_start({"image": pictures()}, 0)  # the first batch of another epoch
    torch.testing.assert_close(made.scale_factor, 1 / batch["image"].std(), rtol=0, atol=1e-6)
    assert made.get_input(batch, "image")[0].std() == pytest.approx(1.0, abs=1e-5)
    other = bare(Zero(), TextStage(), scale_by_std=True, scale_factor=1.0)
    other.load_state_dict({k: v for k, v in made.state_dict().items() if k == "scale_factor"}, strict=False)
    other.on_train_batch_start({"image": pictures()}, 0)
    assert other.scale_factor == made.scale_factor


def test_a_given_scale_is_a_plain_number():
    made = bare(Zero())
    made.on_train_batch_start({"image": pictures()}, 0)
    assert made.scale_factor == 0.18215 and "scale_factor" not in made.state_dict()


def test_a_measured_scale_keeps_its_digits_in_half_precision():
    made = bare(scale_by_std=True, scale_factor=0.18215).half()
    assert made.scale_factor.dtype == torch.float32 and float(made.scale_factor) == pytest.approx(
        0.18215, abs=1e-8
    )


# -- small things -----------------------------------------------------------------------------------


def test_the_prior_term_of_the_bound_is_its_formula(model, inputs):
    """KL(N(m, s^2) || N(0, 1)) in bits, averaged over dimensions."""
    alpha_bar = model.alphas_cumprod[-1].double()
    mean, variance = alpha_bar.sqrt() * inputs["x0"].double(), 1 - alpha_bar
    want = 0.5 * (mean**2 + variance - 1 - variance.log()) / torch.tensor(2.0).log()
    torch.testing.assert_close(
        model._prior_bpd(inputs["x0"]).double(), want.mean(dim=(1, 2, 3)), rtol=0, atol=1e-6
    )


def test_attributes_that_others_read(model):
    assert (model.channels, model.image_size, model.num_timesteps, model.log_every_t) == (4, 8, 1000, 200)
    assert (model.cond_stage_key, model.first_stage_key, model.num_timesteps_cond) == ("txt", "image", 1)
    assert (model.concat_mode, model.cond_stage_forward, model.num_downs) == (True, None, 2)
    assert model.monitor == "val/loss_simple_ema" and model.clip_denoised is False
    assert model.device == torch.device("cpu") and model.learning_rate is None


def test_rows_of_decoded_latents(model, inputs):
    row = model._get_denoise_row_from_list([inputs["x0"], inputs["xT"], inputs["noise"]])
    assert row.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
    torch.testing.assert_close(
        row[:, 36:68, 36:68], model.decode_first_stage(inputs["xT"])[1], rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_images_to_look_at(short):
    made = latent_model(timesteps=20, use_ema=True, log_every_t=10)
    made.cond_stage_model = TextStage()
    batch = {"image": pictures(3, 32, 3), "txt": ["a red circle", "b", "c"]}
    log = made.log_images(
        batch,
        N=2,
        n_row=1,
        ddim_steps=2,
        plot_denoise_rows=True,
        unconditional_guidance_scale=2.0,
        unconditional_guidance_label="",
    )
    picture = (2, 3, 32, 32)
    shapes = {name: tuple(value.shape) for name, value in log.items()}
    rows = {name: shapes.pop(name)[:2] for name in ("diffusion_row", "denoise_row", "progressive_row")}
    assert rows == {"diffusion_row": (3, 36), "denoise_row": (3, 70), "progressive_row": (3, 70)}
    assert shapes.pop("mask") == (2, 1, 8, 8)
    assert shapes == dict.fromkeys(
        [
            "inputs",
            "reconstruction",
            "conditioning",
            "samples",
            "samples_cfg_scale_2.00",
            "samples_inpainting",
            "samples_outpainting",
        ],
        picture,
    )
    few = made.log_images(
        batch, ddim_steps=None, inpaint=False, plot_progressive_rows=False, return_keys=["samples"]
    )
    assert set(few) == {"samples"}


def test_images_of_a_codebook_model_and_of_class_conditions(vq):
    vq.cond_stage_key, stage = "cls", vq.cond_stage_model
    vq.cond_stage_model = ClassStage()
    batch = {"image": pictures(2, 32, 3), "cls": torch.tensor([4, 5])}
    log = vq.log_images(
        batch, ddim_steps=2, inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False
    )
    assert set(log) == {"inputs", "reconstruction", "conditioning", "samples", "samples_x0_quantized"}
    vq.cond_stage_key, vq.cond_stage_model = "txt", stage


def test_maps_and_pictures_as_conditions_are_shown():
    made = bare(Zero(), nn.Identity(), cond_stage_key="segmentation", conditioning_key="concat")
    few = {"sample": False, "plot_progressive_rows": False, "plot_diffusion_rows": False}
    log = made.log_images({"image": pictures(), "segmentation": pictures(channels=5)}, **few)
    assert log["original_conditioning"].shape == (3, 3, 8, 8)
    assert log["original_conditioning"].min() == -1 and log["original_conditioning"].max() == 1
    log = made.log_images({"image": pictures(), "segmentation": pictures(channels=3)}, **few)
    assert log["conditioning"].shape == (3, 3, 8, 8)


# -- the shipped configuration ----------------------------------------------------------------------


def test_v1_inference_builds_with_the_recorded_keys(golden):
    """On the meta device: the 946 recorded keys, logvar, and 196 of the text encoder."""
    want = json.loads((golden / "v1_keys_without_text_encoder.json").read_text())
    settings = load_config(shipped("configs/v1-inference.yaml"))
    with torch.device("meta"):
        made = instantiate_from_config(settings.model)
    have = {key: list(value.shape) for key, value in made.state_dict().items()}
    text = {key: have.pop(key) for key in list(have) if key.startswith("cond_stage_model.")}
    assert len(want) == 946 and have == {**want, "logvar": [1000]}
    # Parameters have their place in saved optimizer states by this order.
    assert [key for key in have if key != "logvar"] == list(want)
    assert len(text) == 196 and all(
        key.startswith("cond_stage_model.transformer.text_model.") for key in text
    )
    assert sum(p.numel() for p in made.model.parameters()) == 859_520_964
    assert made.use_scheduler and not made.use_ema
