"""optimize() against the plain code: the same numbers, and the plain code again wherever something differs."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from keyed import fill, keyed_input
from tiny import tiny_config
from tiny_networks import UNET, VAE, replace_weights_in_place
from torch import nn

from ldm.config import instantiate_from_config
from ldm.kernels import fused, malloc, native, optimize, restore
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules import attention
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel
from ldm.modules.seams import state_of

DTYPES = (torch.float32, torch.bfloat16)
KINDS = {
    "v1": {},
    "deeper": {"transformer_depth": 2, "num_res_blocks": 2},
    "scale and shift": {"use_scale_shift_norm": True},
    "linear projections": {"use_linear_in_transformer": True},
    "resampling blocks": {"resblock_updown": True},
    "pooled": {"conv_resample": False},
    "no self-attention": {"disable_self_attentions": [True, False]},
    "no context": {"use_spatial_transformer": False, "context_dim": None},
    "late attention": {"attention_resolutions": [2]},
    "three-dimensional": {"dims": 3, "use_spatial_transformer": False, "context_dim": None},
}


def make_unet(name="v1", dtype=torch.float32):
    return fill(UNetModel(**{**UNET, **KINDS[name]}), f"fast.{name}.").to(dtype)


def inputs(unet, dtype=torch.float32, batch=2, size=(8, 12), alike=False):
    space = (2, *size) if unet.out[2].weight.dim() == 5 else size
    x = keyed_input("fast.x", (batch, 4, *space))
    t = torch.arange(3, 3 + batch) * 100
    if alike:
        half = batch // 2
        x, t = torch.cat([x[:half]] * 2), torch.cat([t[:half]] * 2)
    has_context = isinstance(unet.input_blocks[1][-1], attention.SpatialTransformer) or any(
        isinstance(m, attention.SpatialTransformer) for m in unet.modules()
    )
    context = keyed_input("fast.context", (batch, 7, 24)).to(dtype) if has_context else None
    return {"x": x.to(dtype), "timesteps": t, "context": context}


def close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).norm() < 2e-5 * want.norm()


def as_right(got, plain, exact):
    """Rounded numbers are as far from the exact ones as the plain code's are, or nearer."""
    assert got.dtype == plain.dtype and got.shape == plain.shape
    assert (got - exact).norm() < 1.1 * (plain - exact).norm() < 0.1 * exact.norm()


def compare(module, *args, **kwargs):
    """Hold an optimized module to the plain one: in float32 closely, in bfloat16 by its distance to float32."""
    plain = module(*args, **kwargs)
    if plain.dtype == torch.float32:
        return close(optimize(module)(*args, **kwargs), plain)

    def exactly(value):
        return value.float() if torch.is_tensor(value) and value.is_floating_point() else value

    exact = copy.deepcopy(module).float()
    exact = exact(*map(exactly, args), **{name: exactly(value) for name, value in kwargs.items()})
    as_right(optimize(module)(*args, **kwargs), plain, exact)


@pytest.fixture
def watch(monkeypatch):
    """Names of the fused modules that computed, in order."""
    fused_names = []

    def noting(kind):
        plain = kind.try_forward

        def try_forward(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            if out is not None:
                fused_names.append(kind.__name__)
            return out

        return try_forward

    for kind in set(fused.FUSED.values()):
        monkeypatch.setattr(kind, "try_forward", noting(kind))
    return fused_names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(KINDS))
@torch.no_grad()
@pytest.mark.thinned(3)
def test_a_unet_gives_the_plain_numbers(name, dtype):
    unet = make_unet(name, dtype)
    compare(unet, **inputs(unet, dtype))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "three-dimensional"])
@pytest.mark.parametrize("size", [(8, 12), (7, 10)], ids=str)
@torch.no_grad()
@pytest.mark.thinned(6)
def test_halves_that_are_alike_are_done_once(name, size, watch):
    """Under guidance; also where sides do not halve evenly."""
    unet = make_unet(name)
    given = inputs(unet, batch=4, size=size, alike=True)
    want = unet(**given)
    rows = []
    unet.input_blocks[0].register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    got = optimize(unet)(**given)
    close(got, want)
    # A hook on what is shared means that somebody looks: all rows are done then.
    assert rows == [4] and "FusedUNet" not in watch
    unet.input_blocks[0]._forward_hooks.clear()
    close(unet(**given), want)
    shares = name in ("v1", "deeper", "scale and shift", "pooled", "late attention", "resampling blocks")
    assert ("FusedUNet" in watch) == shares
    given["x"][3] += 1
    watch.clear()
    close(unet(**given), restore(unet)(**given))
    assert "FusedUNet" not in watch


@pytest.mark.skipif(native.library() is None, reason="the kernels cannot be built here")
@torch.no_grad()
def test_every_kind_of_part_is_fused(watch):
    unet = optimize(make_unet())
    unet(**inputs(unet))
    unet(**inputs(unet, alike=True))
    assert set(watch) == {
        "FusedCrossAttention",
        "FusedConv",
        "FusedFeedForward",
        "FusedLinear",
        "FusedGroupNorm",
        "FusedResBlock",
        "FusedSpatialTransformer",
        "FusedUNet",
        "FusedUpsample",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attn_resolutions": (8, 16)},
        {"attn_type": "linear"},
        {"resamp_with_conv": False},
        {"num_groups": 8},
        {"tanh_out": True},
        {"give_pre_end": True},
    ],
    ids=str,
)
@torch.no_grad()
@pytest.mark.thinned(3)
def test_an_autoencoder_gives_the_plain_numbers(changed, dtype):
    config = {**VAE, **changed}
    encoder, decoder = (fill(kind(**config), "fast.vae.").to(dtype) for kind in (Encoder, Decoder))
    x, z = keyed_input("fast.pixels", (2, 3, 12, 20)).to(dtype), keyed_input("fast.z", (1, 4, 5, 7)).to(dtype)
    compare(encoder, x)
    compare(decoder, z)


@pytest.mark.skipif(native.library() is None, reason="the kernels cannot be built here")
@torch.no_grad()
def test_a_decoder_ends_in_one_pass_unless_its_end_was_changed(watch):
    decoder = optimize(fill(Decoder(**VAE), "fast.vae."))
    z = keyed_input("fast.z", (1, 4, 5, 7))
    expected = decoder(z)
    assert "FusedDecoder" in watch
    seen = []
    decoder.norm_out.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    watch.clear()
    close(decoder(z), expected)
    assert seen == [VAE["ch"]] and "FusedDecoder" not in watch


@torch.no_grad()
def test_a_whole_model_gives_the_plain_numbers():
    model = instantiate_from_config(tiny_config()["model"])
    fill(model)
    c = model.get_learned_conditioning(["a red star", ""])
    x, t = keyed_input("fast.whole", (2, 4, 8, 8)), torch.tensor([10, 900])
    eps, picture = model.apply_model(x, t, c), model.decode_first_stage(x[:1])
    optimize(model)
    close(model.get_learned_conditioning(["a red star", ""]), c)
    close(model.apply_model(x, t, c), eps)
    close(model.decode_first_stage(x[:1]), picture)


@torch.no_grad()
def test_restoring_gives_the_plain_numbers_bit_for_bit():
    unet = make_unet()
    given, keys = inputs(unet), list(unet.state_dict())
    want = unet(**given)
    optimize(unet)
    assert list(unet.state_dict()) == keys and type(unet) is UNetModel
    unet(**given)
    assert torch.equal(restore(unet)(**given), want)
    assert not any("forward" in vars(module) for module in unet.modules())


@torch.no_grad()
def test_weights_that_change_are_noticed():
    unet = optimize(make_unet())
    given = inputs(unet)
    before = unet(**given)
    for weight in unet.parameters():
        weight.mul_(1.1)
    changed = unet(**given)
    assert not torch.equal(before, changed)
    close(changed, restore(unet)(**given))
    optimize(unet)
    unet.load_state_dict(make_unet().state_dict())
    close(unet(**given), before)


@torch.no_grad()
def test_another_weight_where_one_lay_is_noticed():
    """As when one is deleted and the next gets its memory: same place, shape and count of writes."""
    unet = optimize(make_unet())
    given = inputs(unet)
    unet(**given)
    before = dict(unet.named_parameters())
    replace_weights_in_place(unet, 1.1)
    for name, weight in unet.named_parameters():
        assert weight is not before[name] and state_of(weight) == state_of(before[name])
    changed = unet(**given)
    close(changed, restore(unet)(**given))


@torch.no_grad()
def test_another_context_of_the_same_shape_is_noticed():
    unet = optimize(make_unet())
    given = inputs(unet)
    first = unet(**given)
    given["context"].mul_(-1)  # in place: the tensor is the same, what it says is not
    second = unet(**given)
    assert not torch.allclose(first, second, atol=1e-3)
    close(second, restore(unet)(**given))


def test_gradients_go_the_plain_way(watch):
    unet = optimize(make_unet())
    given = inputs(unet)
    unet(**given).sum().backward()
    assert watch == [] and all(p.grad is not None for p in unet.parameters())


@torch.no_grad()
def test_training_mode_and_autocast_go_the_plain_way(watch):
    unet = optimize(make_unet())
    given = inputs(unet)
    unet.train()
    unet(**given)
    unet.eval()
    with torch.autocast("cpu", torch.bfloat16):
        unet(**given)
    assert watch == []


@torch.no_grad()
def test_a_patched_class_keeps_its_patch(monkeypatch):
    """Attention maps are often read by replacing CrossAttention.forward."""
    unet = optimize(make_unet())
    given = inputs(unet)
    seen = []
    plain = CrossAttention.forward

    def forward(self, x, context=None, mask=None):
        seen.append(x.shape)
        return plain(self, x, context, mask)

    want = unet(**given)
    monkeypatch.setattr(CrossAttention, "forward", forward)
    close(unet(**given), want)
    assert len(seen) == sum(isinstance(module, CrossAttention) for module in unet.modules())


@torch.no_grad()
def test_a_patched_inner_forward_is_used(monkeypatch):
    """CompVis's blocks compute in `_forward`, and that is what others replace, or override in a subclass."""
    unet = optimize(make_unet())
    given = inputs(unet)
    want, block = unet(**given), attention.BasicTransformerBlock
    blocks, seen = [m for m in unet.modules() if isinstance(m, block)], []

    class Merging(block):
        def _forward(self, x, context=None):
            seen.append(x.shape)
            return block._forward(self, x, context)

    for part in blocks:
        part.__class__ = Merging
    close(unet(**given), want)
    assert len(seen) == len(blocks)
    for part in blocks:
        part.__class__ = block
    plain = block._forward
    monkeypatch.setattr(block, "_forward", lambda self, *args: seen.append(1) or plain(self, *args))
    close(unet(**given), want)
    assert len(seen) == 2 * len(blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"use_new_attention_order": True}, {"num_head_channels": 32}], ids=str
)
@torch.no_grad()
def test_attention_of_openai_s_blocks_gives_the_plain_numbers(options, dtype, watch):
    block = fill(AttentionBlock(96, **{"num_heads": 2, **options}), "fast.block.").to(dtype).eval()
    x = keyed_input("fast.block", (3, 96, 5, 7)).to(dtype)
    compare(block, x)
    assert watch == ([] if native.library() is None else ["FusedAttentionBlock"])
    for weight in (block.qkv.weight, block.proj_out.weight):  # new ones are noticed
        weight.mul_(1.5)
        want = restore(copy.deepcopy(block))(x)
        assert (block(x) - want).norm() < (2e-5 if dtype == torch.float32 else 2e-2) * want.norm()


@torch.no_grad()
def test_hooks_on_any_part_fire():
    unet = make_unet()
    given = inputs(unet)
    kinds = (
        CrossAttention,
        nn.Conv2d,
        nn.Linear,
        nn.GroupNorm,
        nn.SiLU,
        attention.GEGLU,
        attention.FeedForward,
    )
    parts = [m for m in unet.modules() if isinstance(m, kinds)]
    fired = []
    for part in parts:
        part.register_forward_hook(lambda module, args, out: fired.append(id(module)))
    want = unet(**given)
    times = sorted(fired)
    fired.clear()
    close(optimize(unet)(**given), want)
    assert sorted(fired) == times


@torch.no_grad()
def test_a_part_that_somebody_hooked_is_said_once(caplog):
    unet = fill(UNetModel(**UNET), "hooked.")
    optimize(unet)
    asked = keyed_input("hooked.x", (2, 4, 8, 8)), torch.tensor([3, 700]), keyed_input("hooked.c", (2, 7, 24))
    unet(*asked)
    assert not caplog.messages
    for block in unet.output_blocks:
        block[1].transformer_blocks[0].attn2.register_forward_hook(lambda *_: None)
    for _ in range(2):
        unet(*asked)
    assert len(caplog.messages) == 1 and "a hook on a CrossAttention" in caplog.messages[0]


class Added(nn.Module):
    """A low-rank adapter in the place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.extra = fill(nn.Linear(layer.in_features, layer.out_features), "fast.extra.")

    def forward(self, x):
        return self.layer(x) + self.extra(x)


@torch.no_grad()
def test_replaced_layers_are_used():
    unet = optimize(make_unet())
    given = inputs(unet)
    block = unet.middle_block[1].transformer_blocks[0]
    for attn in (block.attn1, block.attn2):
        attn.to_k, attn.to_out[0] = Added(attn.to_k), Added(attn.to_out[0])
    block.ff.net[2] = Added(block.ff.net[2])
    got = unet(**given)
    close(got, restore(unet)(**given))


@torch.no_grad()
def test_a_layer_whose_forward_was_replaced_is_used():
    """As adapters do that keep the layer and take its forward."""
    unet = optimize(make_unet())
    given = inputs(unet)
    for layer in (unet.middle_block[0].in_layers[2], unet.middle_block[1].proj_in):
        before = layer.forward
        layer.forward = lambda x, before=before: before(x) * 1.5
    got = unet(**given)
    plain = make_unet()
    for layer in (plain.middle_block[0].in_layers[2], plain.middle_block[1].proj_in):
        layer.weight.mul_(1.5), layer.bias.mul_(1.5)
    close(got, plain(**given))


@torch.no_grad()
def test_copies_and_pickles_stand_on_their_own():
    unet = optimize(make_unet())
    given = inputs(unet)
    want = unet(**given)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        close(other(**given), want)
        for weight in other.parameters():
            weight.zero_()
        assert not other(**given).any()
    close(unet(**given), want)


@torch.no_grad()
def test_those_who_count_operations_see_the_plain_ones():
    from torch.utils.flop_counter import FlopCounterMode

    unet = make_unet()
    given = inputs(unet)
    counts = []
    for model in (unet, optimize(unet)):
        with FlopCounterMode(display=False) as counter:
            model(**given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_one_part_alone_can_be_optimized():
    model = AutoencoderKL(
        ddconfig={**VAE, "double_z": True}, lossconfig={"target": "torch.nn.Identity"}, embed_dim=4
    )
    fill(model, "fast.part.")
    z = keyed_input("fast.part.z", (1, 4, 5, 6))
    want = model.decode(z)
    optimize(model.decoder)
    assert "forward" not in vars(model.encoder.conv_in) and "forward" in vars(model.decoder.conv_in)
    close(model.decode(z), want)


@torch.no_grad()
def test_without_kernels_the_rest_is_still_fused(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    unet = make_unet()
    given = inputs(unet)
    want = unet(**given)
    close(optimize(unet)(**given), want)


def test_memory_is_kept_as_long_as_a_model_wants_it(monkeypatch):
    """glibc's thresholds, as they are asked for."""
    asked = []
    monkeypatch.setattr(malloc, "_set", lambda *given: asked.append(given))
    monkeypatch.setattr(malloc, "_users", type(malloc._users)())
    kept = (malloc.MAX_BLOCK, 2**31 - 1)
    one, other = (nn.Sequential(nn.Conv2d(3, 8, 3)).eval() for _ in range(2))
    optimize(one), optimize(other)
    restore(one)
    assert asked == [kept, kept]
    restore(other), restore(other)
    assert asked == [kept, kept, (malloc.DEFAULT_MMAP, malloc.DEFAULT_TRIM)]


def test_memory_is_given_back_by_a_model_of_which_no_part_is_fused(monkeypatch):
    asked = []
    monkeypatch.setattr(malloc, "_set", lambda *given: asked.append(given))
    monkeypatch.setattr(malloc, "_users", type(malloc._users)())
    restore(optimize(nn.Embedding(3, 5)))
    assert asked == [(malloc.MAX_BLOCK, 2**31 - 1), (malloc.DEFAULT_MMAP, malloc.DEFAULT_TRIM)]


def test_memory_can_be_used_after_it_was_given_back():
    model = optimize(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
    x = torch.ones(20_000_000)
    restore(model)
    assert x.sum() == 20_000_000


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_give_the_plain_numbers():
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    block = make_unet().middle_block
    h, emb = keyed_input("fast.h", (2, 64, 4, 6)), keyed_input("fast.emb", (2, 128))
    context = keyed_input("fast.context", (2, 7, 24))
    want = block(h, emb, context)
    close(optimize(block, compile=True)(h, emb, context), want)
    assert torch.equal(restore(block)(h, emb, context), want)


@pytest.mark.slow
def test_the_page_s_example_paints_what_it_says():
    from ldm.shapes.checker import check

    page = (Path(__file__).parents[2] / "docs" / "fast.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "docs/fast.md", "exec"), names)
    [prompt] = re.findall(r'txt2img\(\s*"(.+?)"', code)
    assert check(names["picture"], prompt).holds
    restore(names["sd"].model)


@pytest.mark.slow
def test_the_script_s_flags_give_the_plain_picture(tmp_path):
    import numpy as np
    from PIL import Image

    from scripts import txt2img

    pictures = []
    ways = {
        "plain": [],
        "fast": ["--optimize"],
        "tiled": ["--tiled_vae"],
        "slices": ["--sliced_vae", "--n_samples", "1"],
        "half": ["--vae_precision", "bfloat16"],
    }
    for name, flag in ways.items():
        txt2img.main(
            [
                "--prompt",
                "a blue star",
                "--steps",
                "3",
                "--outdir",
                str(tmp_path / name),
                "--skip_grid",
                *flag,
            ]
        )
        [path] = (tmp_path / name).rglob("*.png")
        pictures.append(np.asarray(Image.open(path)).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert abs(pictures[0] - pictures[2]).max() <= 1
    assert abs(pictures[0] - pictures[3]).max() <= 1
    assert 0 < abs(pictures[0] - pictures[4]).max() and abs(pictures[0] - pictures[4]).mean() < 1
