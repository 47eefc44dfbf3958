"""Perturbed-attention and self-attention guidance: their formulas by hand, diffusers' pipelines beside them, laws."""

import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from keyed import keyed_input

from ldm.adapters import PAG, SAG, AttentionSlicing, DeepCache, TokenMerging
from ldm.adapters.guidance import attention_mask, gaussian_blur
from ldm.checkpoints.key_mapping import unet_to_diffusers
from ldm.errors import UsageError
from ldm.generate import denoise
from ldm.kernels import restore
from ldm.metadata import read_metadata
from ldm.models.diffusion.denoiser import Denoiser
from ldm.modules import seams
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import AttnProcessor, named_attentions
from ldm.modules.seams import StepInfo, attached
from ldm.process.guidance import guide, rescale

X = keyed_input("g.x", (1, 4, 8, 6))
C, U = keyed_input("g.c", (1, 7, 128)), keyed_input("g.u", (1, 7, 128))
ALPHA_BAR, ONLY = torch.tensor(0.4), StepInfo(0, 1)


@pytest.fixture(scope="module")
def model(painter):
    return painter.model


@pytest.fixture(scope="module")
def unet(model):
    return model.model.diffusion_model


def middle(unet):
    return unet.middle_block[1].transformer_blocks[0].attn1


class Guided:
    """A model as `denoise` hands it to samplers, at one step."""

    def __init__(self, model, *terms, step=ONLY):
        self.model, self.step = model, step
        self.terms, self.calls = [one.begin() for one in terms], []
        self.num_timesteps, self.parameterization = model.num_timesteps, "eps"

    def guidance_terms(self):
        return [one for one in self.terms if one.guides(self.step)]

    def apply_model(self, x, t, cond):
        for one in self.terms:
            one.at(self.step)
        self.calls.append(x)
        with attached(self.model.model.diffusion_model, *self.terms):
            return self.model.apply_model(x, t, cond)


def ask(model, *terms, x=X, step=ONLY, **options):
    guided = Guided(model, *terms, step=step)
    options = {"unconditional_conditioning": U, "guidance_scale": 5.0, **options}
    with torch.no_grad():
        eps, _ = Denoiser(guided, C, **options)(x, 400, ALPHA_BAR)
    return eps, guided.calls


def by_hand(model, t=400):
    """The three answers to X: without condition, with it, and with it where the middle attends to nothing else."""
    unet, attn, t = model.model.diffusion_model, middle(model.model.diffusion_model), torch.tensor([t])
    with torch.no_grad():
        uncond, cond = unet(X, t, U), unet(X, t, C)
        handle = attn.register_forward_hook(lambda m, given, out: m.to_out(m.to_v(given[0])))
        perturbed = unet(X, t, C)
        handle.remove()
    return uncond, cond, perturbed


def close(got, want, rel=2e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


# --- perturbed attention ---


@pytest.mark.parametrize("separate", [False, True])
def test_pag_is_the_papers_sum_beside_guidance_and_alone(model, separate):
    uncond, cond, perturbed = by_hand(model)
    options = {"separate_passes": separate}
    got, calls = ask(model, PAG(3), **options)
    close(got, guide(uncond, cond, 5.0) + 3 * (cond - perturbed))
    assert [len(x) for x in calls] == ([1, 1, 1] if separate else [3])
    close(ask(model, PAG(3), guidance_scale=1.0, **options)[0], cond + 3 * (cond - perturbed))
    close(ask(model, PAG(3), unconditional_conditioning=None, **options)[0], cond + 3 * (cond - perturbed))
    restored = ask(model, PAG(3), guidance_rescale=0.7, **options)[0]
    close(restored, rescale(guide(uncond, cond, 5.0) + 3 * (cond - perturbed), cond, 0.7))
    falling = ask(model, PAG(3, adaptive_scale=0.004), **options)[0]
    close(falling, guide(uncond, cond, 5.0) + (3 - 0.004 * 600) * (cond - perturbed))
    fallen = ask(model, PAG(3, adaptive_scale=0.006), **options)[0]
    assert torch.equal(fallen, ask(model, PAG(3, adaptive_scale=1), **options)[0])


def test_pag_outside_of_a_guidance_interval_guides_alone(model):
    _, cond, perturbed = by_hand(model)
    got, calls = ask(model, PAG(3), guidance_interval=(0.5, 1.0))  # level 400 of 1000 lies below
    close(got, cond + 3 * (cond - perturbed))
    assert [len(x) for x in calls] == [2]


LAYERS = [
    ("mid", ["mid_block"]),
    ("up", ["up_blocks.0", "up_blocks.0", "up_blocks.1", "up_blocks.1"]),
    (["mid", "down_blocks.1"], ["down_blocks.1", "mid_block"]),
    ("blocks.1", ["down_blocks.1", "up_blocks.1", "up_blocks.1"]),
    ("up_blocks.1.attentions.0", ["up_blocks.1"]),
    ("attn1", ["down_blocks.0", "down_blocks.1", *["up_blocks.0"] * 2, *["up_blocks.1"] * 2, "mid_block"]),
]


def test_layers_are_parts_of_diffusers_names(unet):
    places = {id(one): name for name, one in named_attentions(unet).items()}
    for layers, want in LAYERS:
        found = [places[id(one)] for one in PAG(3, layers).attentions(unet)]
        assert all(name.endswith("attn1") for name in found), layers
        assert sorted(name.partition(".attentions")[0] for name in found) == sorted(want), layers
    for layer in ("attn2", "mi", "down_blocks.7"):
        with pytest.raises(
            UsageError, match="no self-attention in layer .*has down_blocks.0, down_blocks.1, up"
        ):
            PAG(3, layer).check(unet)


# --- self-attention guidance ---


@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sag_is_the_papers_sum_beside_guidance_and_alone(model, unet, separate):
    uncond, cond, _ = by_hand(model)
    attn, t, kept = middle(unet), torch.tensor([400]), {}

    def term(base, context):
        handle = attn.register_forward_pre_hook(lambda m, given: kept.update(h=given[0]))
        with torch.no_grad():
            unet(X, t, context)
            handle.remove()
            q, k = (
                layer(kept["h"]).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                for layer in (attn.to_q, attn.to_k)
            )
            received = (q @ k.transpose(2, 3) * attn.scale).softmax(-1).mean(1).sum(1).reshape(1, 1, 4, 3)
            mask = (received > 1).float().repeat_interleave(2, 2).repeat_interleave(2, 3)
            assert 0 < mask.mean() < 1
            x0 = (X - (1 - ALPHA_BAR).sqrt() * base) / ALPHA_BAR.sqrt()
            worse = gaussian_blur(x0, 1.3) * mask + x0 * (1 - mask)
            return base - unet(ALPHA_BAR.sqrt() * worse + (1 - ALPHA_BAR).sqrt() * base, t, context)

    sag, options = SAG(0.75, blur_sigma=1.3), {"separate_passes": separate}
    got, calls = ask(model, sag, **options)
    close(got, guide(uncond, cond, 5.0) + 0.75 * term(uncond, U))
    assert [len(x) for x in calls] == ([1, 1, 1] if separate else [2, 1])
    close(ask(model, sag, guidance_scale=1.0, **options)[0], cond + 0.75 * term(cond, C))
    perturbed = by_hand(model)[2]
    for terms in ((sag, PAG(3)), (PAG(3), sag)):
        both = guide(uncond, cond, 5.0) + 0.75 * term(uncond, U) + 3 * (cond - perturbed)
        close(ask(model, *terms, **options)[0], both)
        alone = cond + 0.75 * term(cond, C) + 3 * (cond - perturbed)
        close(ask(model, *terms, guidance_scale=1.0, **options)[0], alone)


def test_two_sags_of_half_a_scale_are_one(model):
    # The call about the first one's blurred sample does not tell the second one where the network looks.
    one, _ = ask(model, SAG(0.8).begin())
    two, calls = ask(model, SAG(0.4).begin(), SAG(0.4).begin())
    close(two, one)
    assert len(calls) == 3


def test_a_sag_that_starts_where_deep_features_are_cached_goes_by_the_last_whole_call(painter):
    both = paint(painter, SAG(2, start=0.3), DeepCache(3), steps=4)
    assert not torch.equal(both, paint(painter, DeepCache(3), steps=4))


def test_a_blur_keeps_constants_and_weighs_by_the_gaussian():
    assert torch.allclose(gaussian_blur(torch.full((1, 2, 3, 1), 0.7), 1.0), torch.tensor(0.7))
    point = torch.zeros(1, 3, 19, 15)
    point[..., 9, 7] = 1.0
    blurred = gaussian_blur(point, 1.0)[0, 1]
    weights = torch.exp(-0.5 * torch.arange(-4.0, 5) ** 2)
    weights = weights / weights.sum()
    want = torch.zeros(19, 15)
    want[5:14, 3:12] = weights[:, None] * weights
    torch.testing.assert_close(blurred, want)


def test_a_mask_of_tokens_is_enlarged_also_where_sides_are_odd():
    looked_at = torch.arange(2 * 6).reshape(2, 6) % 4 == 0
    mask = attention_mask(looked_at, torch.zeros(2, 5, 7, 12))  # 7 x 12, 4 x 6, 2 x 3
    assert mask.shape == (2, 1, 7, 12) and torch.equal(mask[:, 0, ::4, ::4].flatten(1), looked_at)
    with pytest.raises(
        UsageError, match="tokens one by one, and got 5 of latents 7 x 12; merge no tokens there"
    ):
        attention_mask(looked_at[:, :5], torch.zeros(2, 5, 7, 12))


# --- laws of both ---


def paint(sd, *adapters, **options):
    options = {"seed": 3, "steps": 3, "output_type": "latent", "height": 64, "width": 72, **options}
    return sd.txt2img("a large red circle", adapters=adapters, **options).latents


def trace(unet):
    return {name: {k: id(v) for k, v in vars(m).items()} for name, m in unet.named_modules()}


@pytest.mark.parametrize("make", [pytest.param(PAG, marks=pytest.mark.slow), SAG])
def test_scale_0_and_steps_outside_change_nothing_bit_for_bit_and_no_trace_stays(painter, unet, make):
    plain, before = paint(painter), trace(unet)
    assert torch.equal(paint(painter, make(0)), plain)
    assert torch.equal(paint(painter, make(1, end=0.3)), plain)  # the first step ends behind it
    whole = paint(painter, make(1))
    assert not torch.equal(whole, plain) and not torch.equal(paint(painter, make(1, end=0.4)), whole)
    assert torch.equal(paint(painter, make(1)), whole)  # one object or two, the numbers are the run's
    assert torch.equal(paint(painter), plain) and trace(unet) == before


@pytest.mark.slow
@pytest.mark.parametrize("make", [PAG, SAG])
def test_an_optimized_model_and_other_adapters_beside_it(painter, make):
    want = paint(painter, make(2))
    close(paint(painter, make(2), AttentionSlicing(3)), want, 1e-4)
    close(paint(painter, AttentionSlicing("max"), make(2)), want, 1e-4)
    for other in (DeepCache(2), TokenMerging(0.5)):
        both = paint(painter, make(2), other)
        assert torch.isfinite(both).all() and not torch.equal(both, want)
        assert not torch.equal(both, paint(painter, other))
    painter.optimize()
    try:
        close(paint(painter, make(2)), want, 1e-4)
    finally:
        restore(painter.model)


@pytest.mark.slow
def test_a_batch_is_guided_picture_by_picture(painter):
    for term in (PAG(3), SAG(0.75)):
        batch = paint(painter, term, num_images=2, batch_size=2)
        close(batch[1:], paint(painter, term, seed=4), 1e-4)


def test_a_captured_graph_is_kept_under_the_rows_that_are_perturbed(unet):
    attn, kept = middle(unet), {}
    for rows in (slice(2, 3), slice(1, 2), slice(2, 3)):
        pag = PAG(3).begin()
        pag.rows = rows
        with attached(unet, pag):
            kept.setdefault(rows.start, []).append(seams.on(attn).state)
    assert kept[2][0] == kept[2][1] != kept[1][0] and None not in (kept[1] + kept[2])
    sag = SAG(0.75).begin()
    sag.at(StepInfo(0, 1))
    with attached(unet, sag):
        assert seams.on(attn).state is None  # what it tells would not be told by a replay


def test_what_another_processor_answers_is_kept_beside_them(unet):
    class Theirs(AttnProcessor):
        def forward(self, attn, hidden_states, **kwargs):
            return 1.5 * super().forward(attn, hidden_states, **kwargs)

    attn, h = middle(unet), keyed_input("g.h", (3, 5, 64))
    attn.set_processor(Theirs())
    pag, sag = PAG(3).begin(), SAG(0.75).begin()
    pag.rows = slice(2, 3)
    sag.at(StepInfo(0, 1))
    with torch.no_grad():
        want = attn(h)
        with attached(unet, pag, sag):
            got = attn(h)
        identity = attn.to_out(attn.to_v(h[2:]))
    attn.set_processor(None)
    close(got, torch.cat([want[:2], identity]))


@pytest.mark.parametrize("make", [PAG, SAG])
def test_metadata_say_what_is_not_usual(make):
    assert json.dumps(make(2, start=0.25).describe()) and make(2, start=0.25).describe()["start"] == 0.25
    assert PAG(2).describe() == {"scale": 2.0} and SAG(0.5).describe() == {"scale": 0.5, "blur_sigma": 1.0}
    assert PAG(2, ["up", "mid"], adaptive_scale=0.1).describe() == {
        "scale": 2.0, "layers": ["up", "mid"], "adaptive_scale": 0.1,
    }  # fmt: skip


REFUSED = [
    (lambda: PAG(float("inf")), "scale should be a number"),
    (lambda: PAG("strong"), "scale should be a number"),
    (lambda: PAG(3, []), "layers should name self-attentions, such as 'mid'"),
    (lambda: PAG(3, ["mid", ""]), "layers should name self-attentions"),
    (lambda: PAG(3, 7), "layers should be"),
    (lambda: PAG(3, adaptive_scale=-1), "adaptive_scale should be a number from 0"),
    (lambda: PAG(3, start=0.5, end=0.5), "start should be below end"),
    (lambda: SAG(0.75, 0), "blur_sigma should be a number from 0.05 to 8"),
    (lambda: SAG(None), "scale should be a number"),
    (lambda: SAG(1).check(torch.nn.Linear(2, 3)), "SAG needs a UNetModel, got Linear"),
    (lambda: PAG(1).check(torch.nn.Linear(2, 3)), "PAG needs a UNetModel, got Linear"),
]


def test_refusals(unet):
    for make, words in REFUSED:
        with pytest.raises(UsageError, match=words):
            make()
    plain = UNetModel(8, 4, 32, 4, 1, [2], channel_mult=[1, 2], num_heads=2)  # AttentionBlocks
    with pytest.raises(
        UsageError, match="SAG is for a UNet whose middle block attends to itself by a transformer"
    ):
        SAG(1).check(plain)
    with pytest.raises(UsageError, match="PAG is for a UNet with spatial transformers"):
        PAG(1).check(plain)
    for term in (PAG(1), SAG(1)):
        with (
            pytest.raises(
                UsageError, match="adds to guidance, which a UNet alone does not know; give it to adapters="
            ),
            attached(unet, term),
        ):
            pass
    assert middle(unet).processor is None


# --- diffusers ---


def pipelines(unet):
    """Diffusers' two pipelines around a UNet with our weights."""
    from diffusers import DDIMScheduler, StableDiffusionPAGPipeline, UNet2DConditionModel
    from diffusers.pipelines.deprecated import StableDiffusionSAGPipeline

    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, sample_size=8,
    ).eval()  # fmt: skip
    state = unet.state_dict()
    names = unet_to_diffusers(state)
    theirs.load_state_dict({names[key]: value for key, value in state.items()})
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip
    parts = {
        "vae": None, "text_encoder": None, "tokenizer": None, "unet": theirs, "scheduler": scheduler,
        "safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False,
    }  # fmt: skip
    return [cls(**parts) for cls in (StableDiffusionPAGPipeline, StableDiffusionSAGPipeline)]


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_pipelines_walk_the_same_chains(model, unet):
    pytest.importorskip("diffusers")
    pag, sag = pipelines(unet)
    x = keyed_input("g.x_T", (2, 4, 12, 8))
    c, u = C.expand(2, -1, -1), U.expand(2, -1, -1)
    same = {
        "prompt_embeds": c, "negative_prompt_embeds": u, "latents": x, "height": 96, "width": 64,
        "num_inference_steps": 20, "output_type": "latent",
    }  # fmt: skip

    def ours(*terms, scale=5.0):
        guided = {"unconditional_conditioning": u, "guidance_scale": scale}
        steps = denoise(model, x, c, sampler="ddim", steps=20, spacing="leading", adapters=terms, **guided)
        return [step.x_t for step in steps][-1]

    for term, theirs, options in (
        (PAG(3), pag, {"pag_scale": 3.0}),
        (PAG(3, adaptive_scale=0.002), pag, {"pag_scale": 3.0, "pag_adaptive_scale": 0.002}),
        (SAG(0.75), sag, {"sag_scale": 0.75}),
    ):
        for scale in (5.0, 1.0):
            theirs.set_progress_bar_config(disable=True)
            want = theirs(guidance_scale=scale, **options, **same).images
            got = ours(term, scale=scale)
            assert (got - want).abs().max() < 1e-4 * (1 + want.abs().max()), (term, scale)


# --- the page ---

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "guidance.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.slow
def test_blocks_of_the_page_run(tmp_path, monkeypatch):
    (_, python), (_, command) = BLOCKS
    names = {}
    exec(compile(python, "docs/guidance.md", "exec"), names)
    painted = [names[one][0].tobytes() for one in ("plain", "free", "sharp", "unguided", "tile")]
    assert len(set(painted)) == 5 and names["same"][0].tobytes() == painted[-1]
    assert (names["sliced"].latents - names["plain"].latents).abs().max() < 1e-4
    for name in ("scripts", "model_data"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, path, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [path, *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    told = read_metadata("outputs/txt2img-samples/samples/00000.png")
    assert stop.value.code == 0 and told["freeu"] == [1.1, 1.2, 0.9, 0.7] and told["tiling"]
    assert (told["pag_scale"], told["sag_scale"]) == (2, 0.5)
