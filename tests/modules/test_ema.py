"""The moving average against the recorded original, and where the original fails."""

import copy

import pytest
import torch
from keyed import keyed_input, weight
from safetensors.torch import load_file
from torch import nn

from ldm.errors import UsageError
from ldm.modules.ema import LitEma


def keyed_linear():
    linear = nn.Linear(3, 2)
    linear.load_state_dict({"weight": weight("e.weight", (2, 3)), "bias": weight("e.bias", (2,))})
    return linear


def test_average_is_the_recorded_one(golden):
    recorded = load_file(golden / "diffusion.safetensors")
    linear = keyed_linear()
    average = LitEma(linear, decay=0.99)
    for i in range(5):
        linear.weight.data += 0.1 * (i + 1)
        linear.bias.data -= 0.05
        average(linear)
    state = average.state_dict()
    assert {f"ema.{k}" for k in state} == {k for k in recorded if k.startswith("ema.")}
    for key, value in state.items():
        torch.testing.assert_close(value, recorded["ema." + key], rtol=1e-5, atol=1e-5)


def test_names_lose_their_dots_and_frozen_parameters_stay_away():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))
    model[0].bias.requires_grad_(False)
    assert set(LitEma(model).state_dict()) == {"decay", "num_updates", "0weight", "10weight", "10bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("converted_later", [False, True])
def test_average_of_a_half_precision_model_moves_like_the_exact_one(dtype, converted_later):
    model = nn.Linear(3, 2)
    if converted_later:
        average = LitEma(model, decay=0.9999)
        model.to(dtype)
        average.to(dtype)
    else:
        model.to(dtype)
        average = LitEma(model, decay=0.9999)
    exact = model.weight.detach().double() if not converted_later else average.weight.double()
    for n in range(1, 51):
        with torch.no_grad():
            model.weight.add_(0.01)
        average(model)
        decay = min(0.9999, (1 + n) / (10 + n))
        exact = decay * exact + (1 - decay) * model.weight.detach().double()
    assert average.weight.dtype == torch.float32
    torch.testing.assert_close(average.weight.double(), exact, rtol=0, atol=1e-5)
    assert average.num_updates.item() == 50


def test_store_copy_restore_and_reseed():
    linear = keyed_linear()
    average = LitEma(linear, decay=0.5, use_num_upates=False)
    with torch.no_grad():
        linear.weight.copy_(keyed_input("w", (2, 3)))
    present = linear.weight.detach().clone()
    average(linear)
    expected = (present + weight("e.weight", (2, 3))) / 2
    average.store(linear.parameters())
    average.copy_to(linear)
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=1e-6)
    average.restore(linear.parameters())
    assert torch.equal(linear.weight.detach(), present)
    average.copy_from(linear)
    assert torch.equal(average.weight, present)
    assert average.num_updates.item() == -1
    average.reset_num_updates()
    assert average.num_updates.item() == 0


def test_decay_outside_its_range_is_refused():
    with pytest.raises(UsageError, match=r"decay should lie in \[0, 1\], got 1.5"):
        LitEma(nn.Linear(3, 2), decay=1.5)


def test_within_its_scope_a_network_computes_with_the_average_and_gets_its_own_objects_back():
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    average = LitEma(network, use_num_upates=False)
    for p in network.parameters():
        p.data.add_(1.0)
    before = dict(network.named_parameters())
    for _ in range(2):
        with average.scope(network):
            for name, p in network.named_parameters():
                shadow = getattr(average, average.m_name2s_name[name])
                assert p.data_ptr() == shadow.data_ptr() and not p.requires_grad  # nothing is copied
            first = network[0].weight
        assert all(p is before[name] for name, p in network.named_parameters())
        with average.scope(network):
            assert network[0].weight is first  # so what was made of it serves again
        average(network)
    copied = copy.deepcopy(average)
    copied.get_buffer("0weight").zero_()
    with copied.scope(network):
        assert network[0].weight.abs().max() == 0
    network.half()
    with average.scope(network):
        assert network[0].weight.dtype == torch.float16
