"""Attention, the small layers, and what other people's code does to them."""

import math

import pytest
import torch
from keyed import fill, keyed_input
from safetensors.torch import load_file
from torch import nn

from ldm.errors import MismatchError
from ldm.modules import attention
from ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SpatialSelfAttention,
    SpatialTransformer,
)
from ldm.modules.diffusionmodules import util
from ldm.modules.diffusionmodules.model import AttnBlock


def by_hand(layer, x, context, mask=None):
    """Attention spelt out head by head in float64."""
    x, context = x.double(), context.double()
    layer = layer.double()
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    d = q.shape[-1] // layer.heads
    outs = []
    for h in range(layer.heads):
        s = slice(h * d, (h + 1) * d)
        scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        outs.append(scores.softmax(-1) @ v[..., s])
    return layer.to_out(torch.cat(outs, -1))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cross_attention_is_softmax_of_scaled_products(masked):
    layer = fill(CrossAttention(10, context_dim=6, heads=2, dim_head=4), "ca.")
    x, context = keyed_input("x", (2, 5, 10)), keyed_input("context", (2, 7, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1]]).bool() if masked else None
    got = layer(x, context=context, mask=mask)
    torch.testing.assert_close(got.double(), by_hand(layer, x, context, mask), rtol=0, atol=1e-6)


@torch.no_grad()
def test_attention_without_context_looks_at_itself():
    layer = fill(CrossAttention(10, heads=2, dim_head=4), "ca.")
    x = keyed_input("x", (2, 5, 10))
    torch.testing.assert_close(layer(x), layer(x, context=x), rtol=0, atol=0)


@torch.no_grad()
def test_replacing_forward_on_the_class_reaches_every_attention(monkeypatch):
    transformer = fill(SpatialTransformer(32, 2, 16, depth=2, context_dim=6), "st.")
    x, context = keyed_input("map", (2, 32, 3, 4)), keyed_input("context", (2, 7, 6))
    before, calls, original = transformer(x, context), [], CrossAttention.forward

    def counting(self, x, context=None, mask=None):
        calls.append(None if context is None else tuple(context.shape))
        return original(self, x, context, mask)

    monkeypatch.setattr(CrossAttention, "forward", counting)
    torch.testing.assert_close(transformer(x, context), before, rtol=0, atol=0)
    assert calls == [None, (2, 7, 6)] * 2


@torch.no_grad()
def test_the_first_attention_can_be_turned_to_the_context():
    block = fill(BasicTransformerBlock(10, 2, 5, context_dim=6, disable_self_attn=True), "b.")
    assert block.attn1.to_k.in_features == 6
    x, context = keyed_input("x", (2, 5, 10)), keyed_input("context", (2, 7, 6))
    permuted = x[:, torch.tensor([3, 0, 4, 1, 2])]
    # Without self-attention every token is by itself, so their order does not matter.
    torch.testing.assert_close(
        block(permuted, context), block(x, context)[:, torch.tensor([3, 0, 4, 1, 2])], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_each_block_can_have_a_context_of_its_own():
    transformer = fill(SpatialTransformer(32, 2, 16, depth=2, context_dim=[6, 9]), "st.")
    x = keyed_input("map", (2, 32, 3, 4))
    contexts = [keyed_input("c0", (2, 7, 6)), keyed_input("c1", (2, 5, 9))]
    assert transformer(x, contexts).shape == x.shape
    with pytest.raises(MismatchError, match="lists 2 widths for transformer_depth=3 blocks"):
        SpatialTransformer(32, 2, 16, depth=3, context_dim=[6, 9])


def test_a_new_transformer_changes_nothing():
    x = keyed_input("map", (2, 32, 3, 4))
    for use_linear in (False, True):
        transformer = SpatialTransformer(32, 2, 16, context_dim=6, use_linear=use_linear)
        assert torch.equal(transformer(x, keyed_input("context", (2, 7, 6))), x)


def test_parameters_are_registered_in_the_order_of_saved_optimizers():
    names = [n.split(".")[0] for n, _ in BasicTransformerBlock(10, 2, 5, context_dim=6).named_parameters()]
    assert list(dict.fromkeys(names)) == ["attn1", "ff", "attn2", "norm1", "norm2", "norm3"]


@torch.no_grad()
def test_both_spellings_of_map_attention_agree():
    block = fill(AttnBlock(32), "a.")
    other = SpatialSelfAttention(32)
    other.load_state_dict(block.state_dict())
    x = keyed_input("map", (2, 32, 3, 4))
    torch.testing.assert_close(block(x), other(x), rtol=0, atol=1e-6)
    normed = block.norm(x).double()
    block.double()
    q, k, v = (layer(normed).flatten(2) for layer in (block.q, block.k, block.v))
    weights = (q.transpose(1, 2) @ k / math.sqrt(32)).softmax(-1)
    out = block.proj_out((v @ weights.transpose(1, 2)).reshape(2, 32, 3, 4))
    torch.testing.assert_close(other(x).double(), x.double() + out, rtol=0, atol=1e-5)


@torch.no_grad()
def test_linear_attention_is_a_sum_over_cells_weighted_by_keys():
    layer = fill(LinearAttention(6, heads=2, dim_head=3), "la.").double()
    x = keyed_input("map", (2, 6, 3, 4)).double()
    qkv = layer.to_qkv(x).reshape(2, 3, 2, 3, 12)  # (b, qkv, heads, c, n)
    q, k, v = qkv.unbind(1)
    out = torch.einsum("bkdn,bken,bkdm->bkem", k.softmax(-1), v, q)
    want = layer.to_out(out.reshape(2, 6, 3, 4))
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_feed_forward_gates_with_the_exact_gelu():
    layer = fill(FeedForward(6, dim_out=5, mult=2, glu=True), "ff.").double()
    x = keyed_input("x", (2, 3, 6)).double()
    value, gate = layer.net[0].proj(x).split(12, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    torch.testing.assert_close(layer(x), layer.net[2](value * gelu), rtol=0, atol=1e-12)
    assert FeedForward(6)(torch.zeros(2, 3, 6)).shape == (2, 3, 6)


def test_small_helpers():
    assert attention.uniq([3, 1, 3, 2, 1]) == [3, 1, 2]
    assert attention.max_neg_value(torch.zeros(1, dtype=torch.float16)) == -65504
    filled = attention.init_(torch.empty(50, 4))
    assert 0.45 < filled.abs().max() <= 0.5
    assert attention.exists(0)
    assert attention.default(None, lambda: 5) == 5
    assert attention.default(4, 5) == 4
    assert attention.MemoryEfficientCrossAttention is CrossAttention
    linear = util.scale_module(util.linear(3, 2), 0.0)
    assert linear.weight.abs().max() == 0
    assert util.mean_flat(torch.arange(12.0).reshape(2, 3, 2)).tolist() == [2.5, 8.5]


def test_timestep_embedding_is_the_recorded_one(golden):
    recorded = load_file(golden / "modules.safetensors")["temb"]
    embedded = util.timestep_embedding(torch.tensor([0, 1, 500, 999]), 33)
    torch.testing.assert_close(embedded, recorded, rtol=0, atol=1e-6)
    assert util.timestep_embedding(torch.tensor([2.5, 3.0]), 3, repeat_only=True).tolist() == [
        [2.5] * 3,
        [3.0] * 3,
    ]


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear", "sqrt"])
def test_beta_schedules_are_the_recorded_ones(name, golden):
    recorded = load_file(golden / "modules.safetensors")["beta." + name]
    betas = util.make_beta_schedule(name, 1000, linear_start=0.00085, linear_end=0.012)
    torch.testing.assert_close(torch.as_tensor(betas), recorded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("method", ["uniform", "quad"])
def test_ddim_tables_are_the_recorded_ones(method, steps, golden):
    recorded = load_file(golden / "modules.safetensors")
    alpha_bar = (1 - recorded["beta.linear"]).cumprod(0).numpy()
    levels = util.make_ddim_timesteps(method, steps, 1000, verbose=False)
    tables = util.make_ddim_sampling_parameters(alpha_bar, levels, 0.7, verbose=False)
    for key, got in zip(("sigma", "a", "ap"), tables, strict=True):
        want = recorded[f"ddim.{method}.{steps}.{key}"].double()
        torch.testing.assert_close(torch.as_tensor(got).double(), want, rtol=1e-6, atol=1e-6)
    assert levels.tolist() == recorded[f"ddim.{method}.{steps}.t"].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_computes_in_single_precision_whatever_it_holds(dtype):
    norm = fill(util.normalization(64), "n.")
    x = 50 + keyed_input("map", (2, 64, 3, 4))
    half = x.to(dtype)
    for weights in (torch.float32, dtype):
        norm.to(weights)
        want = nn.functional.group_norm(half.float(), 32, norm.weight.float(), norm.bias.float(), 1e-5)
        assert norm(half).dtype == dtype
        assert torch.equal(norm(half), want.to(dtype))


def test_checkpoint_recomputes_and_accepts_none_and_frozen_parameters():
    calls = []
    frozen = nn.Linear(3, 3).requires_grad_(False)

    def run(x, context):
        calls.append(context)
        return frozen(x)

    x = keyed_input("x", (2, 3)).requires_grad_()
    util.checkpoint(run, (x, None), frozen.parameters(), True).sum().backward()
    assert calls == [None, None]
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(2, 3))


def test_noise_can_be_one_for_all():
    noise = util.noise_like((3, 2, 4, 5), "cpu", repeat=True)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(*util.noise_like((2, 4, 5), "cpu"))


def test_tables_are_looked_up_by_level():
    table = torch.arange(10.0)
    looked_up = util.extract_into_tensor(table, torch.tensor([3, 7]), (2, 4, 5, 6))
    assert looked_up.shape == (2, 1, 1, 1)
    assert looked_up.flatten().tolist() == [3.0, 7.0]
