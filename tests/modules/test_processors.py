"""Attention processors: diffusers' names and contract on our attentions, and the recorded numbers of IP-Adapter."""

import json
from pathlib import Path

import pytest
import torch
from keyed import fill, keyed_input
from safetensors.torch import load_file
from tiny_networks import UNET
from torch import nn

from ldm.errors import UsageError
from ldm.kernels import optimize, restore
from ldm.modules import seams
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import AttnProcessor, IPAttnProcessor, named_attentions

GOLDEN = Path(__file__).parents[1] / "golden"
V1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def unet():
    return fill(UNetModel(**UNET), "processors.")


@pytest.fixture
def inputs():
    x, context = keyed_input("processors.x", (3, 4, 8, 6)), keyed_input("processors.c", (3, 7, 24))
    return x, torch.tensor([0, 400, 999]), context


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_names_are_those_of_diffusers_in_its_order_for_v1():
    with torch.device("meta"):
        unet = UNetModel(**V1)
    recorded = json.loads((GOLDEN / "attn_processors.json").read_text())["attn_processors"]
    modules = dict(unet.named_modules())
    named = named_attentions(unet)
    assert list(unet.attn_processors) == [row["name"] for row in sorted(recorded, key=lambda r: r["index"])]
    for row in recorded:
        attn = named[row["name"].removesuffix(".processor")]
        assert attn is modules[row["compvis"].removeprefix("model.diffusion_model.")]
        wide = row["cross_attention_dim"]
        assert (attn.inner_dim, attn.heads) == (row["hidden_size"], row["heads"])
        assert attn.is_cross_attention == (wide is not None)
        assert attn.cross_attention_dim == (wide or row["hidden_size"])


def test_the_names_are_those_of_diffusers_where_levels_differ_in_depth():
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 96),
        layers_per_block=(2, 1, 3),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    changes = {"channel_mult": [1, 2, 3], "num_res_blocks": [2, 1, 3], "attention_resolutions": [1, 4]}
    assert list(UNetModel(**UNET | changes).attn_processors) == list(theirs.attn_processors)


def of_diffusers():
    from diffusers.models import attention_processor as theirs

    return {
        "plain": theirs.AttnProcessor(),
        "2.0": theirs.AttnProcessor2_0(),
        "sliced": theirs.SlicedAttnProcessor(2),
        "ours": AttnProcessor().__call__,  # as somebody else's, whom the attention has to ask
    }


@pytest.mark.parametrize("which", ["plain", "2.0", "sliced", "ours"])
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_processors_of_diffusers_give_our_numbers(unet, inputs, which, optimized):
    want = unet(*inputs)
    if optimized:
        optimize(unet)
    asked = []
    processor = of_diffusers()[which]

    def counted(attn, *args, **kwargs):
        asked.append(attn)
        return processor(attn, *args, **kwargs)

    unet.set_attn_processor(counted)
    got = unet(*inputs)
    assert len(asked) == len(set(asked)) == len(named_attentions(unet))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_the_plain_processor_leaves_an_attention_to_itself(unet, inputs):
    want, keys = unet(*inputs), list(unet.state_dict())
    unet.set_attn_processor(unet.attn_processors)
    attentions = named_attentions(unet).values()
    assert all(attn.processor is None and seams.on(attn) is seams.PLAIN for attn in attentions)
    assert torch.equal(unet(*inputs), want) and list(unet.state_dict()) == keys


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_a_processor_answers_where_it_was_set_and_comes_off_without_trace(unet, inputs, optimized):
    if optimized:
        optimize(unet)
    want = unet(*inputs)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
    unet.set_attn_processor({**unet.attn_processors, name: lambda attn, x, **_: torch.zeros_like(x)})
    attn = named_attentions(unet)[name.removesuffix(".processor")]
    changed = unet(*inputs)
    attn.to_out[0].weight.zero_(), attn.to_out[0].bias.zero_()  # a real answer of nothing gives the same
    unet.set_attn_processor(AttnProcessor())
    close(unet(*inputs), changed)
    fill(restore(unet), "processors.")
    if optimized:
        optimize(unet)
    assert torch.equal(unet(*inputs), want) and not torch.equal(changed, want)


def test_a_mask_is_added_to_the_scores_as_diffusers_adds_it():
    attn = fill(CrossAttention(6, 10, heads=3, dim_head=4), "processors.mask.")
    x, context = keyed_input("processors.tokens", (2, 5, 6)), keyed_input("processors.words", (2, 7, 10))
    seen = torch.arange(7).expand(2, 7) < torch.tensor([[4], [7]])
    want = attn(x, context, mask=seen)
    for processor in of_diffusers().values():
        attn.set_processor(processor)
        close(attn(x, context, mask=seen), want)


def test_a_short_mask_is_filled_up_with_tokens_that_may_be_seen():
    attn = CrossAttention(6, heads=3, dim_head=4)
    mask = torch.full((2, 1, 5), -9.0)
    for out_dim, shape in ((3, (6, 1, 7)), (4, (2, 3, 1, 7))):
        got = attn.prepare_attention_mask(mask, 7, 2, out_dim=out_dim)
        assert got.shape == shape and got[..., :5].eq(-9).all() and got[..., 5:].eq(0).all()
    assert attn.prepare_attention_mask(None, 7, 2) is None


def ip_attention():
    attn = fill(CrossAttention(32, 24, heads=4, dim_head=8), "ip.attn2.")
    x, text, image = (
        keyed_input(f"ip.{n}", s)
        for n, s in (("x", (2, 12, 32)), ("text", (2, 7, 24)), ("image", (2, 4, 24)))
    )
    return attn, x, torch.cat([text, image], dim=1), text


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_ip_adapter_gives_the_recorded_numbers(scale):
    golden = load_file(GOLDEN / "adapters_ip.safetensors")
    attn, x, context, text = ip_attention()
    attn.set_processor(fill(IPAttnProcessor(32, 24, scale=scale), "ip.proc."))
    close(attn(x, context), golden[f"ip.original.scale{scale}"])
    if scale == 0:
        attn.set_processor(None)
        close(attn(x, text), golden["ip.text_only"])
    if scale == 1:
        as_map = keyed_input("ip.x4", (2, 32, 3, 4))
        close(attn.processor(attn, as_map, context), golden["ip.original.4d"])


def test_ip_adapter_of_diffusers_runs_on_our_attention():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    golden = load_file(GOLDEN / "adapters_ip.safetensors")
    attn, x, context, text = ip_attention()
    ours = fill(IPAttnProcessor(32, 24), "ip.proc.")
    theirs = IPAdapterAttnProcessor2_0(32, 24, num_tokens=[4])
    theirs.to_k_ip[0].weight, theirs.to_v_ip[0].weight = ours.to_k_ip.weight, ours.to_v_ip.weight
    close(theirs(attn, x, (text, [context[:, None, 7:]])), golden["ip.original.scale1.0"])


def test_a_processor_that_is_a_module_is_a_part_of_its_attention(unet, inputs):
    before = list(unet.state_dict())
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    attn = named_attentions(unet)[name]
    processor = IPAttnProcessor(attn.inner_dim, 24, num_tokens=3)
    unet.set_attn_processor({**unet.attn_processors, f"{name}.processor": processor})
    new = set(unet.state_dict()) - set(before)
    assert {key.rpartition("processor.")[2] for key in new} == {"to_k_ip.weight", "to_v_ip.weight"}
    unet.double()
    assert processor.to_k_ip.weight.dtype == torch.float64
    unet.float().set_attn_processor(AttnProcessor())
    assert list(unet.state_dict()) == before and attn.processor is None
    assert seams.on(attn) is seams.PLAIN


BAD = {
    "31 of 32": (lambda given: given.pop(next(iter(given))), "one for each of 14 attentions, got 13"),
    "another name": (lambda given: given.update(other=given.popitem()[1]), "no attention 'other'"),
    "no callable": (lambda given: given.update({next(iter(given)): 5}), "should be callable, got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_dictionary_is_refused_and_nothing_is_set(unet, case):
    change, words = BAD[case]
    given = dict.fromkeys(unet.attn_processors, of_diffusers()["plain"])
    change(given)
    with pytest.raises(UsageError, match=words) as error:
        unet.set_attn_processor(given)
    assert error.value.exit_code == 2 and len(str(error.value)) <= 400
    assert all(attn.processor is None for attn in named_attentions(unet).values())
    with pytest.raises(UsageError, match="a processor or a dictionary of them, got 5"):
        unet.set_attn_processor(5)


def test_a_context_without_text_is_refused():
    attn, x, context, _ = ip_attention()
    attn.set_processor(IPAttnProcessor(32, 24, num_tokens=11))
    with pytest.raises(UsageError, match="num_tokens=11 wants a text and behind it"):
        attn(x, context)


def test_what_a_processor_reads_of_an_attention_is_there():
    from diffusers.models.attention_processor import Attention

    theirs = Attention(query_dim=6, cross_attention_dim=10, heads=3, dim_head=4)
    ours = CrossAttention(6, 10, heads=3, dim_head=4)
    names = (
        "heads scale spatial_norm group_norm norm_cross norm_q norm_k residual_connection rescale_output_factor "
        "upcast_attention upcast_softmax inner_dim inner_kv_dim query_dim cross_attention_dim is_cross_attention"
    )
    for name in names.split():
        assert (getattr(ours, name) or None) == (getattr(theirs, name) or None), name
    for name in ("to_q", "to_k", "to_v"):
        assert getattr(ours, name).weight.shape == getattr(theirs, name).weight.shape
    assert isinstance(ours.to_out[0], nn.Linear) and isinstance(ours.to_out[1], nn.Dropout)
    wide = keyed_input("processors.wide", (2, 5, 12))
    for out_dim in (3, 4):
        got, want = (a.head_to_batch_dim(wide, out_dim=out_dim) for a in (ours, theirs))
        assert torch.equal(got, want)
    heads = theirs.head_to_batch_dim(wide)
    assert torch.equal(ours.batch_to_head_dim(heads), theirs.batch_to_head_dim(heads))
    grouped = keyed_input("processors.grouped", (2, 3, 5, 12))
    assert torch.equal(ours.head_to_batch_dim(grouped), theirs.head_to_batch_dim(grouped))
    mask = keyed_input("processors.bias", (6, 5, 5))
    close(ours.get_attention_scores(heads, heads, mask), theirs.get_attention_scores(heads, heads, mask))
