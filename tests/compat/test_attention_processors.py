"""IP-Adapter's training script sets its processors on our UNet as it is printed, and its weights load by position."""

import copy

import pytest
import torch
from keyed import fill, keyed_input
from tiny import tiny_model

import ldm
from ldm.diffusers_style import StableDiffusionPipeline
from ldm.modules.processors import AttnProcessor, IPAttnProcessor


@pytest.fixture
def unet():
    pipe = StableDiffusionPipeline(ldm.StableDiffusion(tiny_model()))
    fill(pipe.unet.inner, "ip.unet.")
    return pipe.unet


def set_ip_processors(unet, **options):
    """The loop of tutorial_train.py, word for word but for the options."""
    attn_procs = {}
    unet_sd = unet.state_dict()
    for name in unet.attn_processors.keys():
        cross_attention_dim = None if name.endswith("attn1.processor") else unet.config.cross_attention_dim
        if name.startswith("mid_block"):
            hidden_size = unet.config.block_out_channels[-1]
        elif name.startswith("up_blocks"):
            block_id = int(name[len("up_blocks.")])
            hidden_size = list(reversed(unet.config.block_out_channels))[block_id]
        elif name.startswith("down_blocks"):
            block_id = int(name[len("down_blocks.")])
            hidden_size = unet.config.block_out_channels[block_id]
        if cross_attention_dim is None:
            attn_procs[name] = AttnProcessor()
        else:
            layer_name = name.split(".processor")[0]
            weights = {
                "to_k_ip.weight": unet_sd[layer_name + ".to_k.weight"],
                "to_v_ip.weight": unet_sd[layer_name + ".to_v.weight"],
            }
            attn_procs[name] = IPAttnProcessor(
                hidden_size=hidden_size, cross_attention_dim=cross_attention_dim, **options
            )
            attn_procs[name].load_state_dict(weights)
    unet.set_attn_processor(attn_procs)
    return torch.nn.ModuleList(unet.attn_processors.values())


def asked(unet, tokens):
    x, context = keyed_input("ip.tiny.x", (2, 4, 8, 6)), keyed_input("ip.tiny.c", (2, 11, tokens))
    return unet(x, torch.tensor([3, 800]), encoder_hidden_states=context).sample


def test_the_loop_runs_as_printed(unet):
    width = unet.config.cross_attention_dim
    plain = copy.deepcopy(unet)
    adapter_modules = set_ip_processors(unet, num_tokens=4, scale=0.0)
    processors = list(unet.attn_processors.values())
    assert [type(p) for p in processors] == [AttnProcessor, IPAttnProcessor] * (len(processors) // 2)
    x, context = keyed_input("ip.tiny.x", (2, 4, 8, 6)), keyed_input("ip.tiny.c", (2, 11, width))
    levels = torch.tensor([3, 800])
    with torch.no_grad():  # without the image's share: as if its tokens were not there
        want = plain(x, levels, encoder_hidden_states=context[:, :7]).sample
        torch.testing.assert_close(asked(unet, width), want, rtol=1e-5, atol=1e-5)
    assert all(name.split(".")[0].isdigit() for name in adapter_modules.state_dict())
    assert {name.split(".")[0] for name in adapter_modules.state_dict()} == {
        str(i) for i in range(1, len(processors), 2)
    }


def test_processors_are_trained_with_the_rest_frozen(unet):
    unet.requires_grad_(False)
    adapter_modules = set_ip_processors(unet, num_tokens=4).requires_grad_(True)
    asked(unet, unet.config.cross_attention_dim).square().mean().backward()
    gradients = [p.grad for p in adapter_modules.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    assert {name for name, p in unet.inner.named_parameters() if p.grad is not None} == {
        name for name, _ in unet.inner.named_parameters() if ".processor." in name
    }


def test_processors_weights_are_in_the_keys_by_diffusers_names(unet):
    before = set(unet.state_dict())
    set_ip_processors(unet)
    new = set(unet.state_dict()) - before
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    assert new == {f"{name}.{key}" for name in names for key in ("to_k_ip.weight", "to_v_ip.weight")}
    unet.load_state_dict(unet.state_dict())
    unet.set_attn_processor(AttnProcessor())
    assert set(unet.state_dict()) == before
