"""The fused text encoder against transformers' own code, and what sends it back to that code."""

import pytest
import torch
from keyed import keyed_input
from torch import nn
from transformers import CLIPTextConfig

from ldm.kernels import native, optimize, restore
from ldm.modules.encoders.modules import CLIPTextTransformer

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels cannot be built here")

FIELDS = {
    "vocab_size": 99,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 21,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}
IDS = torch.tensor([[97, 5, 17, 98, 98, 3, 98], [97, 60, 61, 62, 63, 98, 98]])


def encoder(dtype=torch.float32, **fields):
    model = CLIPTextTransformer(CLIPTextConfig(**FIELDS | fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.2 if "embedding" in name else weight.shape[-1] ** -0.5
            weight.copy_(
                ("norm" in name and name.endswith("weight")) + scale * keyed_input(name, weight.shape)
            )
    return model.to(dtype)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
def is_fused(model, *args, **kwargs):
    return model.forward.try_forward(*args, **kwargs) is not None


@pytest.mark.parametrize(
    "fields",
    [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"hidden_size": 64, "num_attention_heads": 1}],
    ids=["quick_gelu", "gelu", "old end mark", "one head"],
)
def test_it_gives_all_that_transformers_gives(fields):
    model = encoder(**fields)
    with torch.no_grad():
        want = model(IDS, output_hidden_states=True)
        optimize(model)
        assert is_fused(model, IDS)
        got, short = model(IDS, output_hidden_states=True), model(input_ids=IDS)
    assert type(got) is type(want) and list(got) == list(want) and list(short) == list(got)[:2]
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    pairs = zip((*got[:2], *got.hidden_states), (*want[:2], *want.hidden_states), strict=True)
    assert all(error(a, b) < 2e-6 for a, b in pairs)
    assert torch.equal(short.last_hidden_state, got.last_hidden_state)


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is():
    full, half = encoder(), encoder(torch.bfloat16)
    full.load_state_dict(half.state_dict())
    with torch.no_grad():
        want, plain = full(IDS).last_hidden_state, half(IDS).last_hidden_state
        got = optimize(half)(IDS).last_hidden_state
    assert got.dtype == torch.bfloat16 and 0 < error(got, want) < 1.1 * error(plain, want) < 0.1


def test_a_token_does_not_see_those_after_it():
    model = optimize(encoder())
    other = IDS.clone()
    other[:, 4:] = 7
    with torch.no_grad():
        a, b = model(IDS).last_hidden_state, model(other).last_hidden_state
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=1e-6, atol=1e-6)
    assert (a[:, 4:] - b[:, 4:]).abs().amax() > 0.01


def hook(model):
    model.text_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda module, given, out: 2 * out)


def replace_layer(model):
    class Louder(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    layer = model.text_model.encoder.layers[0].self_attn
    layer.v_proj.__class__ = Louder


def patch_forward(model):
    norm = model.text_model.final_layer_norm
    norm.forward = lambda x: x + 1


CHANGES = [hook, replace_layer, patch_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_part_that_someone_changed_is_obeyed(change):
    model, plain = optimize(encoder()), encoder()
    change(model)
    change(plain)
    with torch.no_grad():
        assert not is_fused(model, IDS)
        assert error(model(IDS)[0], plain(IDS)[0]) < 2e-6 < error(model(IDS)[0], encoder()(IDS)[0])


def test_a_class_that_someone_patched_is_obeyed(monkeypatch):
    model = optimize(encoder())
    layer = type(model.text_model.encoder.layers[0])
    before = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: before(self, *args, **kwargs))
    with torch.no_grad():
        assert not is_fused(model, IDS) and model(IDS)[0].isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        {"attention_mask": torch.ones_like(IDS)},
        {"position_ids": torch.arange(7)[None] + 2},
        {"output_attentions": True},
    ],
    ids=lambda call: next(iter(call)),
)
def test_calls_that_are_not_known_go_to_transformers(call):
    model = optimize(encoder())
    with torch.no_grad():
        assert not is_fused(model, IDS, **call)
        assert error(model(IDS, **call)[0], encoder()(IDS, **call)[0]) < 2e-6


def test_embeddings_are_called_as_they_are():
    """Textual inversion replaces them, and others hook them."""
    model, plain = optimize(encoder()), encoder()
    for one in (model, plain):
        one.text_model.embeddings.token_embedding.register_forward_hook(lambda module, given, out: out * 0.5)
    with torch.no_grad():
        assert is_fused(model, IDS) and error(model(IDS)[0], plain(IDS)[0]) < 2e-6


def test_weights_that_change_are_noticed():
    model, plain = optimize(encoder()), encoder()
    for _ in range(2):
        with torch.no_grad():
            assert error(model(IDS)[0], plain(IDS)[0]) < 2e-6
            for one in (model, plain):
                one.text_model.encoder.layers[1].self_attn.k_proj.bias.add_(1.0)
                one.text_model.encoder.layers[0].self_attn.q_proj.weight.mul_(3.0)
                one.text_model.encoder.layers[0].mlp.fc2.weight.mul_(2.0)


def test_gradients_and_restore_lead_back_to_transformers():
    model = optimize(encoder())
    model(IDS).last_hidden_state.square().mean().backward()
    assert model.text_model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert "forward" not in vars(restore(model))
