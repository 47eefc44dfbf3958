"""Attention in portions of queries, where torch would hold all scores: the same answers, and few scores at a time."""

import pytest
import torch
import torch.nn.functional as F
from keyed import fill, keyed_input
from meter import peak_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules import attention
from ldm.modules.attention import CrossAttention, attend
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock

B, HEADS, N, M, D = 2, 3, 23, 17, 5


@pytest.fixture
def portions(monkeypatch):
    """No kernel that never holds the scores, and memory for those of four queries in float32."""
    monkeypatch.setattr(attention, "_is_fused", lambda *args: False)
    monkeypatch.setattr(attention, "MOST_SCORES", 4 * B * HEADS * M * 4)


def questions(dtype=torch.float32):
    sizes = ((B, HEADS, N, D), (B, HEADS, M, D), (B, HEADS, M, D))
    return [keyed_input(f"attend.{i}", size).to(dtype) for i, size in enumerate(sizes)]


MASKS = {
    "none": None,
    "of keys": (B, 1, 1, M),
    "of queries and keys": (N, M),
    "of each head": (B, HEADS, N, M),
    "one row": (1, M),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_portions_give_the_whole_answer(portions, mask, scale):
    q, k, v = questions(torch.float64)
    mask = None if mask is None else keyed_input("attend.mask", mask) > -0.5
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(attend(q, k, v, mask, scale), want, rtol=1e-12, atol=1e-12)


def test_no_more_scores_live_than_allowed(portions):
    q, k, v = questions()
    with sdpa_kernel(SDPBackend.MATH):
        _, largest = peak_of(lambda: attend(q, k, v))
        _, whole = peak_of(lambda: F.scaled_dot_product_attention(q, k, v))
    scores = B * HEADS * N * M * 4
    assert whole == scores and largest == max(attention.MOST_SCORES, B * HEADS * N * D * 4) < scores


def test_one_query_at_a_time_is_the_least(portions, monkeypatch):
    monkeypatch.setattr(attention, "MOST_SCORES", 1)
    q, k, v = questions(torch.float64)
    torch.testing.assert_close(
        attend(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12
    )


def test_gradients_are_the_whole_answer_s(portions):
    found = []
    for way in (attend, F.scaled_dot_product_attention):
        tensors = [x.requires_grad_() for x in questions(torch.float64)]
        (way(*tensors) ** 2).sum().backward()
        found.append([x.grad for x in tensors])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_where_a_kernel_serves_it_is_called_once(monkeypatch):
    monkeypatch.setattr(attention, "MOST_SCORES", 1)
    calls, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    attend(*questions())
    assert calls == [1]  # a CPU has one
    attend(*(x.to("meta") for x in questions()))
    assert len(calls) == 1 + N  # of others it is not known


@pytest.mark.parametrize(
    "module, shape",
    [
        (lambda: CrossAttention(12, heads=2, dim_head=6), (2, 30, 12)),
        (lambda: AttnBlock(32), (1, 32, 5, 7)),
        (lambda: AttentionBlock(32, num_heads=2), (1, 32, 5, 7)),
        (lambda: attention.SpatialSelfAttention(32), (1, 32, 5, 7)),
    ],
    ids=["CrossAttention", "AttnBlock", "AttentionBlock", "SpatialSelfAttention"],
)
@torch.no_grad()
def test_every_attention_of_ours_is_portioned(monkeypatch, module, shape):
    module, x = fill(module(), "attend."), keyed_input("attend.x", shape)
    want = module(x)
    monkeypatch.setattr(attention, "_is_fused", lambda *args: False)
    monkeypatch.setattr(attention, "MOST_SCORES", 1000)
    calls, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or own(*a, **k))
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
    assert len(calls) > 4
