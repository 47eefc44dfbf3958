"""FreeU: the filter by its definition, diffusers' own UNet beside it, nothing at 1, and refusals."""

import copy

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET

from ldm.adapters import DeepCache, FreeU
from ldm.adapters.freeu import scale_low_frequencies, stages_of
from ldm.checkpoints.key_mapping import unet_to_diffusers
from ldm.errors import UsageError
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import StepInfo, attached

PAPER = (1.5, 1.6, 0.9, 0.2)
X, T, C = keyed_input("f.x", (2, 4, 12, 8)), torch.tensor([5, 700]), keyed_input("f.c", (2, 7, 24))


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET | {"out_channels": 4, "channel_mult": [1, 2, 2]}), "freeu.")


def ask(unet, *adapters, step=None):
    for one in adapters:
        if step is not None:
            one.at(step)
    with torch.no_grad(), attached(unet, *adapters):
        return unet(X, T, C)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 3), (2, 1)])
def test_the_four_lowest_frequencies_are_scaled_and_no_other(size):
    x = keyed_input("f.map", (2, 3, *size))
    middle = [one // 2 for one in size]
    mask = torch.ones(size)
    mask[max(middle[0] - 1, 0) : middle[0] + 1, max(middle[1] - 1, 0) : middle[1] + 1] = 0.3
    moved = torch.fft.fftshift(torch.fft.fftn(x, dim=(2, 3)), dim=(2, 3)) * mask
    want = torch.fft.ifftn(torch.fft.ifftshift(moved, dim=(2, 3)), dim=(2, 3)).real
    torch.testing.assert_close(scale_low_frequencies(x, 0.3), want, rtol=1e-5, atol=1e-6)
    half = scale_low_frequencies(x.bfloat16(), 0.3)
    assert half.dtype == torch.bfloat16 and (half - want).abs().max() < 0.05


def test_the_first_two_resolutions_on_the_way_up_are_changed(unet):
    assert stages_of(unet) == [0, 0, 1, 1, 2, 2]
    seen = {}
    handles = [
        block.register_forward_pre_hook(lambda m, given, i=i: seen.update({i: given[0]}))
        for i, block in enumerate(unet.output_blocks)
    ]
    ask(unet, FreeU(2, 3, 1, 0))
    changed = dict(seen)
    seen.clear()
    ask(unet)
    for handle in handles:
        handle.remove()
    half = 32  # of the backbone's 64 channels; what follows them is the skip
    assert torch.equal(changed[0][:, :half], 2 * seen[0][:, :half])
    assert torch.equal(changed[0][:, half:], seen[0][:, half:])
    assert torch.allclose(changed[2][:, 64:], scale_low_frequencies(seen[2][:, 64:], 0), atol=1e-5)
    assert torch.equal(changed[4][:, 64:], seen[4][:, 64:])  # the skips of the third resolution


def test_ones_and_steps_outside_change_nothing_bit_for_bit_and_no_trace_stays(unet):
    plain, before = ask(unet), {name: sorted(vars(m)) for name, m in unet.named_modules()}
    changed = ask(unet, FreeU(*PAPER))
    assert (changed - plain).abs().max() > 0.01
    for freeu, step, same in (
        (FreeU(1, 1, 1, 1), None, plain),
        (FreeU(*PAPER, start=0.5), StepInfo(1, 4), plain),
        (FreeU(*PAPER, end=0.5), StepInfo(2, 4), plain),
        (FreeU(*PAPER, end=0.5), StepInfo(1, 4), changed),
    ):
        assert torch.equal(ask(unet, freeu, step=step), same), (freeu, step)
    assert torch.equal(ask(unet), plain)
    assert {name: sorted(vars(m)) for name, m in unet.named_modules()} == before


def test_an_optimized_unet_and_one_with_cached_features_give_the_same(unet):
    want = ask(unet, FreeU(*PAPER))
    cache = DeepCache(2)
    for _ in range(2):  # whole, then with what is cached, of the same call
        torch.testing.assert_close(ask(unet, FreeU(*PAPER), cache), want, rtol=1e-5, atol=1e-5)
        cache.next_level()
    fast = optimize(copy.deepcopy(unet))
    torch.testing.assert_close(ask(fast, FreeU(*PAPER)), want, rtol=2e-5, atol=2e-5)
    restore(fast)


def test_a_captured_graph_is_kept_under_the_factors():
    unet, made = fill(UNetModel(**UNET | {"channel_mult": [1], "attention_resolutions": []}), "freeu.g."), []

    def capture(run, inputs):
        made.append(None)
        answer = run(inputs)
        return lambda tensors: answer

    factors = [(1, 1, 1, 1), PAPER, (1.5, 1.6, 0.9, 0.5)]
    want = [ask(unet, FreeU(*one)) for one in factors]
    cuda_graphs.attach(unet, capture)
    for _ in range(cuda_graphs.CALLS_TO_CAPTURE + 1):  # the last one is replayed
        for one, wanted in zip(factors, want, strict=True):
            torch.testing.assert_close(ask(unet, FreeU(*one)), wanted, rtol=1e-5, atol=1e-5)
    assert len(made) == 3


@pytest.mark.parametrize(
    "values, words",
    [
        ((1.5, 1.6, 0.9, "low"), "s2 should be a number"),
        ((float("nan"), 1, 1, 1), "b1 should be a number"),
        ((1, -0.5, 1, 1), "b2 should be a number from 0 to 10"),
        ((1, 1, 1, 1, 0.7, 0.2), "start should be below end, got start=0.7 and end=0.2"),
    ],
)
def test_numbers_out_of_range_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        FreeU(*values)


def test_networks_that_run_their_blocks_themselves_are_refused(unet):
    class Own(UNetModel):
        def forward(self, x, timesteps=None, context=None, **kwargs):
            return x

    with pytest.raises(UsageError, match="FreeU needs the UNet's own forward, but this Own has another one"):
        FreeU(*PAPER).check(Own(**UNET))
    with pytest.raises(UsageError, match="FreeU needs a UNetModel, got Linear"):
        FreeU(*PAPER).check(torch.nn.Linear(2, 3))


@pytest.mark.slow
def test_diffusers_own_unet_gives_the_same(unet):
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip
    state = unet.state_dict()
    names = unet_to_diffusers(state)
    theirs.load_state_dict({names[key]: value for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(ask(unet), theirs(X, T, C).sample, rtol=1e-5, atol=1e-5)
        for values in (PAPER, (1.2, 1, 0.5, 1)):
            theirs.enable_freeu(b1=values[0], b2=values[1], s1=values[2], s2=values[3])
            want = theirs(X, T, C).sample
            torch.testing.assert_close(ask(unet, FreeU(*values)), want, rtol=1e-5, atol=1e-5)
