"""Sequential CPU offload: the same pictures, few weights on the device at once, all back afterwards."""

import copy
import functools

import pytest
import torch
from keyed import fill, keyed_input
from tiny import tiny_config
from torch import nn

import ldm
from ldm.config import instantiate_from_config
from ldm.errors import UsageError
from ldm.kernels import offload, optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel

CPU = torch.device("cpu")


@functools.cache
def built():
    return fill(instantiate_from_config(tiny_config()["model"])).eval()


@pytest.fixture
def model():
    with torch.no_grad():
        yield copy.deepcopy(built())


def ask(model):
    """Let every part work: text encoder, UNet, encoder and decoder."""
    device = model.device
    c = model.get_learned_conditioning(["a red star", "a ring"])
    x, t = keyed_input("visits.x", (2, 4, 8, 8)).to(device), torch.tensor([10, 900], device=device)
    pixels = keyed_input("visits.pixels", (1, 3, 32, 24)).to(device)
    first = model.first_stage_model
    return [c, model.apply_model(x, t, c), model.decode_first_stage(x[:1]), first.encode(pixels).mean]


def sizes(sequential):
    return [sum(p.numel() * p.element_size() for p in part.weights) for part in sequential.parts]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_numbers_are_the_plain_ones(model, ahead):
    want = ask(model)
    sequential = offload.SequentialOffload(model, CPU, ahead)
    for _ in range(2):  # the second time it is known who follows
        for got, expected in zip(ask(model), want, strict=True):
            assert torch.equal(got, expected)
    sequential.end()
    assert torch.equal(ask(model)[1], want[1])


def test_every_weight_is_in_one_part(model):
    sequential = offload.SequentialOffload(model, CPU)
    weights = [p for part in sequential.parts for p in part.weights]
    assert len(weights) == len(set(weights)) and set(weights) == set(model.parameters())
    names = {name for name, module in model.named_modules() if module in {p.module for p in sequential.parts}}
    assert {"cond_stage_model", "first_stage_model.decoder", "first_stage_model.encoder"} <= names
    unet = "model.diffusion_model."
    assert {unet + "time_embed", unet + "input_blocks.0", unet + "middle_block", unet + "out"} <= names


@pytest.mark.parametrize(("ahead", "parts"), [(False, 1), (True, 2)])
def test_one_part_is_there_at_a_time_and_two_if_fetched_ahead(model, ahead, parts):
    unet = model.model.diffusion_model
    sequential, found = offload.SequentialOffload(model, CPU, ahead), []
    size = dict(zip(sequential.parts, sizes(sequential), strict=True))

    def look(*_):
        found.append([part for part in sequential.parts if part.copies is not None])

    for module in unet.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    c = model.get_learned_conditioning(["a red star"])
    for _ in range(2):
        found.clear()
        model.apply_model(keyed_input("visits.x", (1, 4, 8, 8)), torch.tensor([10]), c)
    assert {len(there) for there in found} == {parts}
    there = max(sum(size[part] for part in parts) for parts in found)
    assert there < sum(p.nbytes for p in unet.parameters()) / 2
    assert all(part.copies is None for part in sequential.parts) or ahead


def test_what_follows_is_fetched_before_it_is_called(model):
    unet = model.model.diffusion_model
    sequential = offload.SequentialOffload(model, CPU, True)
    ask(model)
    found = []
    first = next(part for part in sequential.parts if part.module is unet.input_blocks[0])
    second = next(part for part in sequential.parts if part.module is unet.input_blocks[1])
    unet.input_blocks[0][0].register_forward_hook(
        lambda *_: found.append((first.copies is not None, second.copies is not None))
    )
    ask(model)
    assert found == [(True, True)]


def test_a_wrong_guess_is_let_go(model):
    unet = model.model.diffusion_model
    sequential = offload.SequentialOffload(model, CPU, True)
    ask(model)
    emb = torch.zeros(1, unet.time_embed[0].out_features)
    unet.input_blocks[0](torch.zeros(1, 4, 8, 8), emb, None)  # and not the block after it
    model.first_stage_model.post_quant_conv(torch.zeros(1, 4, 8, 8))
    there = [part.module for part in sequential.parts if part.copies is not None]
    assert unet.input_blocks[1] not in there and len(there) <= 1


def test_weights_are_at_home_between_calls_and_after_errors(model):
    sequential = offload.SequentialOffload(model, CPU)
    home = {name: p.data_ptr() for name, p in model.named_parameters()}
    seen = []
    middle = model.model.diffusion_model.middle_block
    middle[0].register_forward_hook(lambda m, *_: seen.append(next(m.parameters()).data_ptr()))
    ask(model)
    assert seen[0] not in home.values()
    assert home == {name: p.data_ptr() for name, p in model.named_parameters()}
    handle = middle[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(model)
    assert home == {name: p.data_ptr() for name, p in model.named_parameters()}
    handle.remove()
    assert len(ask(model)) == 4
    assert not sequential._running


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.thinned(2)
def test_weights_written_or_replaced_between_calls_are_used(model, ahead):
    """All of them: those, too, that were fetched ahead at the end of the call before."""
    sequential = offload.SequentialOffload(model, CPU, ahead)
    unet = model.model.diffusion_model
    for _ in range(2):
        before = ask(model)[1]
    assert any(part.copies is not None for part in sequential.parts) is ahead
    unet.out[2].weight.mul_(2)
    unet.out[2].bias = nn.Parameter(unet.out[2].bias * 2)
    torch.testing.assert_close(ask(model)[1], 2 * before)
    for weight in model.parameters():
        weight.mul_(0.9)
    after = ask(model)
    sequential.end()
    for got, want in zip(after, ask(model), strict=True):
        torch.testing.assert_close(got, want)


def test_all_that_is_used_is_on_the_device(model):
    """Tensors of `meta` have no values, and operations refuse to mix them with others."""
    values = {name: x.clone() for name, x in model.state_dict().items()}
    offload.attach(model, torch.device("meta"))
    assert model.device.type == "meta"
    for _ in range(2):
        assert [x.device.type for x in ask(model)] == ["meta"] * 4
    assert all(p.device.type == "cpu" for p in model.parameters())
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in weights.items())


def test_a_weight_of_a_larger_module_s_own_moves_there_and_back():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.layer = nn.Linear(3, 5)

        def forward(self, x):
            return self.layer(x) * self.scale

    module = Scaled()
    sequential = offload.attach(module, torch.device("meta"))
    assert [part.module for part in sequential.parts] == [module.layer]
    assert module.scale.device.type == "meta" and module.layer.weight.device.type == "cpu"


def test_restoring_ends_the_offload(model):
    want = ask(model)
    optimize(model, low_vram=CPU)
    assert torch.equal(ask(model)[1], want[1])
    assert any(m._forward_pre_hooks for m in model.modules())
    restore(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not offload.detach(model) and torch.equal(ask(model)[1], want[1])


def test_an_average_stays_at_home():
    config = tiny_config()["model"]
    config["params"]["use_ema"] = True
    model = instantiate_from_config(config)
    offload.attach(model, torch.device("meta"))
    assert {x.device.type for x in model.model_ema.buffers()} == {"cpu"}


def test_offload_and_compiled_code_exclude_each_other():
    with pytest.raises(UsageError, match="low_vram moves weights that compiled code expects to stay"):
        optimize(nn.Sequential(nn.Linear(3, 5)), compile=True, low_vram=CPU)


@pytest.mark.parametrize("way", ["load", "optimize"])
def test_a_machine_without_a_gpu_is_told_so(way):
    with pytest.raises(
        UsageError, match="low_vram is for a GPU that a model does not fit on, got device cpu"
    ):
        if way == "load":
            ldm.StableDiffusion.default(low_vram=True)
        else:
            ldm.StableDiffusion.default().optimize(low_vram="cpu")


def test_a_unet_alone_has_its_blocks_as_parts():
    unet = UNetModel(
        image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1,
        attention_resolutions=[2], channel_mult=[1, 2], num_heads=2, num_classes=3,
    )  # fmt: skip
    sequential = offload.attach(fill(unet), CPU)
    kinds = [part.module for part in sequential.parts]
    assert unet.label_emb in kinds and len(kinds) == 4 + len(unet.input_blocks) + len(unet.output_blocks)
    x, y = keyed_input("visits.labels", (2, 4, 8, 8)), torch.tensor([2, 0])
    want = restore(unet)(x, torch.tensor([5, 6]), y=y)
    offload.attach(unet, CPU)
    assert torch.equal(unet(x, torch.tensor([5, 6]), y=y), want)
