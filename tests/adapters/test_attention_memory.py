"""What controls of attention hold: the same numbers in parts, so much and no more from call to call and within one."""

import math
from dataclasses import replace

import pytest
import torch
from keyed import keyed_input
from meter import peak_of
from tiny import tiny_model

from bench.full_size_edits import bytes_of_maps
from ldm.adapters import (
    LocalBlend,
    MutualSelfAttention,
    PlugAndPlay,
    PromptToPrompt,
    WordMaps,
    attention_control,
)
from ldm.adapters.attention_control import MOST_MAPS, AttentionControl, Opened, places_of
from ldm.modules.seams import StepInfo
from ldm.pipeline import StableDiffusion

SOURCE, EDIT = "a red circle", "a blue circle"
MB = 2**20


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


def masked(side=8):
    mask = (keyed_input("memory.mask", (1, 1, side, side)) > 0).float()
    return MutualSelfAttention(0.0, 0, mask)


def blending(**options):
    return PromptToPrompt(local_blend=LocalBlend("circle", start=0.0, **options), equalizer={"blue": 2.0})


def begun(sd, control, latents, prompts=(SOURCE, EDIT)):
    """A control in a guided batch, at its second step of five."""
    if hasattr(control, "for_batch"):
        control = control.for_batch(sd.model.cond_stage_model, list(prompts), [1] * len(prompts))
    mine = control.begin()
    mine.at(StepInfo(1, 5, unconditional=len(prompts), images=len(prompts)))
    mine._latents = latents
    if isinstance(mine, PromptToPrompt) and mine._blending is not None:
        mine._blending.halvings = frozenset({0, 1, 2, 3})
    return mine


def place_in(sd, is_cross, halvings=0):
    found = (one for one in places_of(sd.model.model.diffusion_model) if one.is_cross == is_cross)
    return replace(next(one for one in found if one.part == "up"), halvings=halvings, count=2, number=1)


@pytest.mark.parametrize("most", [1, 4 * 5 * 4 * 30 * 20])  # a head or a query; some heads, some queries
@pytest.mark.parametrize(
    ("make", "is_cross"),
    [(WordMaps, True), (blending, True), (masked, False)],
    ids=["words", "blend", "mask"],
)
def test_in_parts_the_numbers_are_the_same(sd, monkeypatch, make, is_cross, most):
    q = keyed_input("memory.q", (4, 4, 30, 6))
    k, v = (keyed_input(f"memory.{name}", (4, 4, 32 if is_cross else 30, 6)) for name in "kv")
    bias = keyed_input("memory.bias", (4, 4, 30, k.shape[2]))  # of each head and query its own

    def seen(mask):
        control = begun(sd, make(), (6, 5))
        out = Opened(None, place_in(sd, is_cross), (control,)).attending(q, k, v, mask, 0.5)
        kept = {WordMaps: lambda: control.average, PromptToPrompt: lambda: control._blending.seen}
        return out, kept.get(type(control), lambda: out)()

    for mask in (None, bias, bias[:, :1, :1]):
        with monkeypatch.context() as patch:
            whole = seen(mask)
            patch.setattr(attention_control, "MOST_MAPS", most)
            for got, want in zip(seen(mask), whole, strict=True):
                assert torch.allclose(got, want, atol=1e-6)


def test_what_is_kept_does_not_grow_with_the_steps(sd, monkeypatch):
    """Bytes of attention that each keeps, of b pictures with latents of n cells, whose text has 32 tokens."""
    kept = [
        (WordMaps(), lambda b, n: 4 * 32 * n * b),
        (
            blending(),
            lambda b, n: 4 * n * b,
        ),  # the maps nearest to 16 x 16 are as large as these latents, 8 x 9
        (blending(keep="a"), lambda b, n: 2 * 4 * n * b),
        (PromptToPrompt(), lambda b, n: 0),
        (masked(), lambda b, n: 0),
        (PlugAndPlay(), lambda b, n: 0),
    ]
    runs = []
    begin = AttentionControl.begin
    monkeypatch.setattr(AttentionControl, "begin", lambda one: runs.append(begin(one)) or runs[-1])
    how = {"sampler": "ddim", "width": 72, "height": 64, "output_type": "latent", "guidance_scale": 3.0}
    for steps, prompts in ((1, [SOURCE, EDIT]), (2, [SOURCE, EDIT]), (1, [SOURCE, EDIT, EDIT])):
        sd.txt2img(
            prompts, seed=[3] * len(prompts), steps=steps, adapters=[control for control, _ in kept], **how
        )
        found = [bytes_of_maps(one) for one in runs]
        assert found == [formula(len(prompts), 72) for _, formula in kept], (steps, prompts)
        runs.clear()


@pytest.mark.parametrize("side", [64, 96])  # 512 and 768 pixels
@pytest.mark.parametrize("pictures", [2, 9])
def test_within_an_attention_of_v1_s_shapes_maps_are_bounded(sd, side, pictures):
    """Four times MOST_MAPS, or one head's maps where these are larger, beside what an attention gives and its parts;
    on the meta device, so that nothing is computed."""
    rows, n = 2 * pictures, side * side
    q = torch.empty(rows, 8, n, 40, device="meta")
    k, v = (torch.empty(rows, 8, 32, 40, device="meta") for _ in "kv")
    prompts = [SOURCE] + [EDIT] * (pictures - 1)
    for control in (WordMaps(), blending()):
        control = begun(sd, control, (side, side), prompts)
        place = place_in(sd, True)
        monitored = Opened(None, place, (control,))
        peak, _ = peak_of(lambda one=monitored: one.attending(q, k, v, None, 0.2))
        assert peak <= 4 * max(MOST_MAPS, rows * n * 32 * 4) + 2 * q.nbytes, (type(control), peak / MB)


def test_self_attention_is_replaced_without_its_maps(sd):
    """Queries, keys and values in the source's manner; a mask is of some queries at a time."""
    n = 24 * 24
    q, k, v = (torch.zeros(4, 4, n, 2) for _ in "qkv")
    scores = 4 * 4 * n * n * 4
    for make in (PromptToPrompt, MutualSelfAttention, PlugAndPlay):
        control = begun(sd, make(), (24, 24))
        peak, _ = peak_of(lambda one=control: Opened(None, place_in(sd, False), (one,)).attending(q, k, v))
        assert peak < scores / 10, make


def test_what_is_kept_holds_no_graph_of_a_gradient(sd):
    """Null-text inversion differentiates while words are watched."""
    q, k, v = (keyed_input(f"memory.{name}", (4, 4, 32, 6)) for name in "qkv")
    k.requires_grad_()
    for control in (begun(sd, WordMaps(), (6, 5)), begun(sd, blending(), (6, 5))):
        k.grad = None
        Opened(None, place_in(sd, True), (control,)).attending(q[:, :, :30], k, v, None, 0.5).sum().backward()
        assert k.grad.abs().sum() > 0
        kept = control.average if isinstance(control, WordMaps) else control._blending.seen
        assert not kept.requires_grad and math.isfinite(kept.sum())
