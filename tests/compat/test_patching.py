"""What others change from outside, on a class or in a module's globals, takes effect in a whole model."""

import numpy as np
import pytest
import torch
from einops import rearrange
from keyed import keyed_input
from tiny import build_tiny, tiny_model
from torch import einsum

import ldm.modules.attention
import ldm.modules.encoders.modules
from ldm.models.diffusion import ddim
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.attention import CrossAttention, default
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

X, T = keyed_input("x", (2, 4, 8, 8)), torch.tensor([5, 700])
PROMPTS = ["a large red circle", "a small blue star on a white background"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def ask(model):
    """The whole way from captions to the network's answer."""

    @torch.no_grad()
    def ask():
        return model.apply_model(X, T, model.get_learned_conditioning(PROMPTS))

    return ask


def sliced_attention(self, x, context=None, mask=None):
    """Attention one head at a time, from the attributes that ControlNet's replacement reads."""
    h = self.heads
    q = self.to_q(x)
    context = default(context, x)
    k, v = self.to_k(context), self.to_v(context)
    del context, x
    q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
    parts = []
    for i in range(q.shape[0]):
        sim = einsum("b i d, b j d -> b i j", q[i : i + 1], k[i : i + 1]) * self.scale
        parts.append(einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v[i : i + 1]))
    return self.to_out(rearrange(torch.cat(parts), "(b h) n d -> b n (h d)", h=h))


def test_a_replaced_cross_attention_is_what_every_block_calls(model, ask, monkeypatch):
    before, seen = ask(), []

    def counted(self, x, context=None, mask=None):
        seen.append((self, context is None))
        return sliced_attention(self, x, context, mask)

    monkeypatch.setattr(ldm.modules.attention.CrossAttention, "forward", counted)
    torch.testing.assert_close(ask(), before, rtol=0, atol=1e-5)
    attentions = [m for m in model.model.modules() if isinstance(m, CrossAttention)]
    assert len(attentions) == 14 and {id(m) for m, _ in seen} == {id(m) for m in attentions}
    assert sum(to_itself for _, to_itself in seen) == 7
    monkeypatch.setattr(
        CrossAttention, "forward", lambda self, x, context=None, mask=None: torch.zeros_like(x)
    )
    assert (ask() - before).abs().max() > 1e-3


def test_a_rebound_timestep_embedding_is_what_the_unet_calls(ask, monkeypatch):
    before, real, seen = ask(), openaimodel.timestep_embedding, []

    def later(timesteps, dim, *args, **kwargs):
        seen.append((timesteps.tolist(), dim))
        return real(timesteps + 10, dim, *args, **kwargs)

    monkeypatch.setattr(openaimodel, "timestep_embedding", later)
    assert (ask() - before).abs().max() > 1e-3
    assert seen == [([5, 700], 32)]


def test_rebound_parts_are_what_a_new_unet_is_built_from(monkeypatch):
    built = []

    class Counted(openaimodel.ResBlock):
        def __init__(self, *args, **kwargs):
            built.append(args[0])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(openaimodel, "ResBlock", Counted)
    made = build_tiny()
    assert len(built) == sum(isinstance(m, Counted) for m in made.modules()) == 8


def test_rebound_helpers_are_what_a_sampler_calls(model, monkeypatch):
    """The tables of a run, and the levels of the historic spacings; "uniform" has exactly as many as asked for."""

    def chosen(ddim_discr_method, num_ddim_timesteps, num_ddpm_timesteps, verbose=True):
        return np.array([3, 40, 900])

    def twice(**kwargs):
        sigmas, alphas, alphas_prev = real(**kwargs)
        return 2 * sigmas, alphas, alphas_prev

    real = ddim.make_ddim_sampling_parameters
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=0.5)
    before = sampler.ddim_sigmas
    monkeypatch.setattr(ddim, "make_ddim_sampling_parameters", twice)
    sampler.make_schedule(10, ddim_eta=0.5)
    assert torch.equal(sampler.ddim_sigmas, 2 * before)
    monkeypatch.setattr(ddim, "make_ddim_timesteps", chosen)
    sampler.make_schedule(3, ddim_discretize="quad")
    assert sampler.ddim_timesteps.tolist() == [3, 40, 900]


def long_prompts(self, text):
    """Three windows of tokens instead of one, and hidden layers, as ControlNet's replacement has them."""
    pad, end, start = (getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos"))
    window = self.max_length - 2
    ids = self.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
    rows = []
    for row in ids:
        for i in range(3):
            part = [start, *row[i * window : (i + 1) * window], end]
            rows.append(part + [pad] * (self.max_length - len(part)))
    tokens = torch.tensor(rows).to(self.device)
    outputs = self.transformer(input_ids=tokens, output_hidden_states=True)
    if self.clip_skip > 1:
        z = outputs.hidden_states[-self.clip_skip]
        z = self.transformer.text_model.final_layer_norm(z)
    else:
        z = outputs.last_hidden_state
    return rearrange(z, "(b i) n d -> b (i n) d", i=3)


@pytest.fixture
def hacked(monkeypatch):
    monkeypatch.setattr(ldm.modules.encoders.modules.FrozenCLIPEmbedder, "forward", long_prompts)
    monkeypatch.setattr(ldm.modules.encoders.modules.FrozenCLIPEmbedder, "clip_skip", 1, raising=False)


@torch.no_grad()
def test_a_replaced_text_encoder_reads_long_prompts(model, ask, request):
    short, answer = model.get_learned_conditioning(PROMPTS), ask()
    request.getfixturevalue("hacked")
    windows = model.get_learned_conditioning(PROMPTS)
    assert windows.shape == (2, 3 * 32, 128)
    torch.testing.assert_close(windows[:, :32], short, rtol=0, atol=1e-5)
    assert ask().shape == answer.shape and (ask() - answer).abs().max() > 1e-4
    words = "a large red circle above a small blue square on a white background"
    once, thrice = model.get_learned_conditioning([words, " ".join([words] * 3)])
    known = 1 + len(model.cond_stage_model.tokenizer(words, add_special_tokens=False)["input_ids"])
    # What a token means depends on those before it, and each window is read by itself.
    torch.testing.assert_close(thrice[:known], once[:known], rtol=0, atol=1e-5)
    assert ((thrice - once)[32 : 32 + known].abs().amax(dim=1) > 1e-3).sum() == known - 1


@torch.no_grad()
def test_the_class_attribute_of_a_replacement_chooses_its_layer(model, hacked, monkeypatch):
    last = model.get_learned_conditioning(PROMPTS)
    monkeypatch.setattr(FrozenCLIPEmbedder, "clip_skip", 2)
    skipped = model.get_learned_conditioning(PROMPTS)
    assert (skipped - last).abs().max() > 1e-3
    stage = model.cond_stage_model
    monkeypatch.undo()
    monkeypatch.setattr(stage, "layer", "hidden")
    monkeypatch.setattr(stage, "layer_idx", -2)
    want = stage.transformer.text_model.final_layer_norm(stage(PROMPTS))
    torch.testing.assert_close(skipped[:, :32], want, rtol=0, atol=1e-5)
