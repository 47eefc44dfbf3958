"""ControlNets: the original's numbers, every layout of file, hints of every kind, and nothing that stays."""

import json

import numpy as np
import pytest
import torch
from keyed import fill, keyed_input, weight
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import UNET, ddim_chain

from ldm.adapters import ControlNet, DeepCache, LoRA, TokenMerging
from ldm.adapters.controlnet import ControlNetFile
from ldm.adapters.controls import Hint, is_within
from ldm.checkpoints import save_safetensors
from ldm.checkpoints.key_mapping import control_to_diffusers, unet_to_diffusers
from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UsageError
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.metadata import from_infotext, to_infotext
from ldm.modules.diffusionmodules.controlnet import ControlNetModel, soft_weights
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import StepInfo, attached, wrap

X, T, C = keyed_input("c.x", (2, 4, 8, 8)), torch.tensor([5, 700]), keyed_input("c.c", (2, 7, 24))
HINT_A, HINT_B = ((0.3 * keyed_input(f"c.hint_{one}", (2, 3, 64, 64)) + 0.5).clamp(0, 1) for one in "ab")


def close(got, want, rel=1e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


@pytest.fixture(scope="module")
def facts(request):
    return json.loads((request.path.parents[1] / "golden/controlnet.json").read_text())


@pytest.fixture(scope="module")
def recorded(request):
    return load_file(request.path.parents[1] / "golden/controlnet.safetensors")


@pytest.fixture(scope="module")
def unet(facts):
    return fill(UNetModel(**facts["config"]["unet"]), "model.diffusion_model.")


def weights_for(unet, prefix="control_model."):
    """Keyed weights of a ControlNet for a UNet, by the original's names."""
    width = next(m for name, m in unet.named_modules() if name.endswith("attn2")).to_k.in_features
    with torch.device("meta"):
        network = ControlNetModel(
            unet.in_channels,
            unet.model_channels,
            3,
            unet.num_res_blocks,
            unet.attention_resolutions,
            channel_mult=unet.channel_mult,
            num_heads=unet.num_heads,
            context_dim=width,
        )
    return {key: weight(prefix + key, tuple(x.shape)) for key, x in network.state_dict().items()}


@pytest.fixture(scope="module")
def tensors(unet):
    return weights_for(unet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def files(unet, tensors, folder):
    """Two ControlNets for the recorded UNet."""
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    save_safetensors(paths[0], tensors, {})
    save_safetensors(paths[1], weights_for(unet, "control_model_b."), {})
    return [ControlNetFile(path) for path in paths]


def answer(unet, *controls, step=None, x=X, t=T, c=C, **options):
    if step is not None:
        for one in controls:
            one.at(step)
    with torch.no_grad(), attached(unet, *controls):
        return unet(x, t, context=c, **options)


# --- numbers ----------------------------------------------------------------------------------------


def test_the_answers_are_the_recorded_ones(unet, files, recorded):
    a, b = files
    for name, controls, options in (
        ("none", [], {}),
        ("one", [ControlNet(a, HINT_A)], {}),
        ("strength1.5", [ControlNet(a, HINT_A, 1.5)], {}),
        ("guess", [ControlNet(a, HINT_A, guess=True)], {}),
        ("guess", [ControlNet(a, HINT_A, weights="soft")], {}),
        ("two_summed", [ControlNet(a, HINT_A), ControlNet(b, HINT_B)], {}),
        ("two_weighted", [ControlNet(b, HINT_B, 0.4), ControlNet(a, HINT_A, 0.7)], {}),
        ("only_mid", [ControlNet(a, HINT_A)], {"only_mid_control": True}),
        ("only_mid", [ControlNet(a, HINT_A, only_mid_control=True)], {}),
    ):
        close(answer(unet, *controls, **options), recorded[f"control.{name}"])
    with torch.no_grad():
        maps = a.network(unet)(X, HINT_A, T, C)
    for i in (0, 3, 6):
        close(maps[i], recorded[f"control.a.{i}"])


def test_the_factors_of_guess_mode_are_the_recorded_ones(facts):
    assert soft_weights(7) == pytest.approx(facts["guess_scales"], rel=1e-12)
    assert soft_weights(13) == pytest.approx(facts["cldm_guess_scales"], rel=1e-12)


def test_the_steps_that_are_controlled_are_the_recorded_ones(facts):
    for total, start, end, keep in facts["keep"]:
        assert [float(is_within(StepInfo(i, total), start, end)) for i in range(total)] == keep


def test_the_names_are_the_originals_and_diffusers_names_lead_there(facts):
    with torch.device("meta"):
        network = ControlNetModel(
            4, 320, 3, 2, [4, 2, 1], channel_mult=(1, 2, 4, 4), num_heads=8, context_dim=768
        )
    state = network.state_dict()
    assert len(state) == 340 and sum(x.numel() for x in state.values()) == 361_279_120
    assert {ours: theirs for theirs, ours in facts["diffusers_names"].items()} == control_to_diffusers(state)


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_own_network_gives_the_same_maps_and_the_same_chain(unet, tensors, files):
    """One and two of them: forward to 1e-5; 20 DDIM steps, all computed by diffusers, to 1e-4; plain and optimized."""
    pytest.importorskip("diffusers")
    from diffusers import ControlNetModel as Theirs
    from diffusers import MultiControlNetModel, UNet2DConditionModel

    shape = {
        "in_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 24,
        "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    }  # fmt: skip
    control, network = (
        Theirs(**shape).eval(),
        UNet2DConditionModel(out_channels=4, up_block_types=("CrossAttnUpBlock2D",) * 2, **shape).eval(),
    )
    names = control_to_diffusers(tensors)
    control.load_state_dict({names[key]: value for key, value in tensors.items()})
    state = unet.state_dict()
    names = unet_to_diffusers(state)
    network.load_state_dict({names[key]: value for key, value in state.items()})

    second = Theirs(**shape).eval()
    names = control_to_diffusers(tensors)
    second.load_state_dict(
        {names[key]: value for key, value in weights_for(unet, "control_model_b.").items()}
    )
    both = MultiControlNetModel([control, second])

    def theirs(x, t, several=False):
        if several:
            down, middle = both(x, t, C, [HINT_A, HINT_B], [0.8, 0.3], return_dict=False)
        else:
            down, middle = control(x, t, C, HINT_A, conditioning_scale=0.8, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return network(x, t, C, return_dict=False, **more)[0], [*down, middle]

    mine = ControlNet(files[0], HINT_A, 0.8)
    two = [mine, ControlNet(files[1], HINT_B, 0.3)]
    want, maps = theirs(X, T)
    close(answer(unet, mine), want)
    close(answer(unet, *two), theirs(X, T, several=True)[0])
    for got, one in zip(files[0].network(unet)(X, HINT_A, T, C), maps, strict=True):
        close(0.8 * got, one)

    wanted = ddim_chain(X, lambda x, t: theirs(x, t, several=True)[0])
    close(ddim_chain(X, lambda x, t: answer(unet, *two, x=x, t=t)), wanted, 1e-4)
    optimize(unet)
    try:
        with torch.inference_mode():
            close(answer(unet, *two), theirs(X, T, several=True)[0])
            close(ddim_chain(X, lambda x, t: answer(unet, *two, x=x, t=t)), wanted, 1e-4)
    finally:
        restore(unet)


# --- laws -------------------------------------------------------------------------------------------


def identity(network):
    return {
        name: (id(p), p._version) for name, p in (*network.named_parameters(), *network.named_buffers())
    } | {name: sorted(vars(m)) for name, m in network.named_modules()}


def test_scale_0_and_steps_outside_change_nothing_bit_for_bit(unet, files):
    plain, before = answer(unet), identity(unet)
    for control, step in (
        (ControlNet(files[0], HINT_A, 0), None),
        (ControlNet(files[0], HINT_A, start=0.5), StepInfo(1, 4)),
        (ControlNet(files[0], HINT_A, end=0.5), StepInfo(2, 4)),
        (ControlNet(files[0], HINT_A, guess=True), StepInfo(0, 1, unconditional=2)),
        (ControlNet(files[0], HINT_A, weights=[0] * 7), None),
    ):
        assert torch.equal(answer(unet, control, step=step), plain)
    assert not torch.equal(answer(unet, ControlNet(files[0], HINT_A, end=0.5), step=StepInfo(1, 4)), plain)
    assert torch.equal(answer(unet), plain) and identity(unet) == before


def test_controls_add_up_and_are_linear_in_scale_and_weights(unet, files):
    got = []

    def take(proceed, *args, control=None, **kwargs):
        got.append(control)
        return proceed(*args, control=control, **kwargs)

    def maps(*controls):
        unwrap = wrap(unet, take)
        try:
            answer(unet, *controls)
        finally:
            unwrap()
        return got.pop()

    a, b = (ControlNet(file, hint) for file, hint in zip(files, (HINT_A, HINT_B), strict=True))
    for both, one, other in zip(maps(a, b), maps(a), maps(b), strict=True):
        close(both, one + other, 1e-6)
    factors = [0.5, 0, 2, 1, 0.25, -1, 3]
    scaled = maps(ControlNet(files[0], HINT_A, 1.5, weights=factors))
    for got_one, one, factor in zip(scaled, maps(a), factors, strict=True):
        if factor == 0:
            assert got_one is None
        else:
            close(got_one, 1.5 * factor * one, 1e-6)
    with pytest.raises(
        UsageError, match="weights should be 7 numbers for this UNet"
    ):  # attached without check()
        answer(unet, ControlNet(files[0], HINT_A, weights=[1, 2]))
    pooled = maps(ControlNet(files[0], HINT_A, pooled=True))
    for got_one, one in zip(pooled, maps(a), strict=True):
        close(got_one, one.mean((2, 3), keepdim=True), 1e-6)


@pytest.mark.parametrize("options", [{"guess": True}, {"pooled": True}])
def test_rows_without_the_condition_are_left_alone(unet, files, options):
    control = ControlNet(files[0], HINT_A[:1], **options)
    x, t, c = torch.cat([X, X]), torch.cat([T, T]), torch.cat([C.flip(0), C])
    got = answer(unet, control, step=StepInfo(0, 1, unconditional=2), x=x, t=t, c=c)
    close(got[:2], answer(unet, c=C.flip(0)))
    close(got[2:], answer(unet, control, step=StepInfo(0, 1)))
    assert (got[2:] - answer(unet)).abs().max() > 1e-3


def test_a_batch_of_hints_goes_row_by_row_through_both_halves(unet, files):
    x, t, c = torch.cat([X, X]), torch.cat([T, T]), torch.cat([C.flip(0), C])
    got = answer(unet, ControlNet(files[0], [HINT_A[0], HINT_A[1]]), x=x, t=t, c=c)
    for row in range(4):
        one = ControlNet(files[0], HINT_A[row % 2])
        close(got[row], answer(unet, one, x=x[row : row + 1], t=t[row : row + 1], c=c[row : row + 1])[0])
    with pytest.raises(
        UsageError, match="2 hints go round among the pictures .*, got 3 pictures; give one hint"
    ):
        answer(unet, ControlNet(files[0], HINT_A), x=x[:3], t=t[:3], c=c[:3])
    # Two rows of one image are no two images.
    step = StepInfo(0, 1, unconditional=1, images=1)
    with pytest.raises(UsageError, match="2 hints go round .*, got 1 picture; give one"):
        answer(unet, ControlNet(files[0], HINT_A), step=step)


def test_other_attachments_work_beside_it(unet, files, tmp_path):
    control = ControlNet(files[0], HINT_A)
    want = answer(unet, control)
    cache = DeepCache(2)
    close(answer(unet, control, cache, step=StepInfo(0, 3)), want)
    # All inputs are as they were, so the features of the step before are those of this one.
    close(answer(unet, control, cache, step=StepInfo(1, 3)), want)
    with torch.no_grad():
        weight = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight
        before = weight.clone()
        up, down = keyed_input("up", (32, 2)), keyed_input("down", (2, 32))
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        save_safetensors(tmp_path / "lora.safetensors", tensors, {})
        got = answer(unet, LoRA(tmp_path / "lora.safetensors"), control)
        weight += up @ down
        close(got, answer(unet, control))
        weight.copy_(before)
    merged = answer(unet, control, TokenMerging(0.5))
    assert (merged - want).abs().max() > 1e-4 and (
        merged - answer(unet, TokenMerging(0.5))
    ).abs().max() > 1e-3


def test_a_network_without_gradients_is_fused_with_the_unet(unet, files):
    control = ControlNet(files[0], HINT_A)
    network = files[0].network(unet)
    want = answer(unet, control)
    try:
        optimize(unet)
        with torch.inference_mode():
            close(answer(unet, control), want, 2e-5)
        assert sum("forward" in vars(m) for m in network.modules()) > 50
    finally:
        restore(unet)
    assert torch.equal(answer(unet, control), want)
    assert not any("forward" in vars(m) for m in network.modules())


@pytest.mark.slow
def test_a_graph_of_the_unet_serves_all_steps(unet, files):
    made = []

    def capture(run, inputs):
        made.append(len(inputs))
        return run

    adapter = ControlNet(files[0], HINT_A)
    times = [torch.tensor([t, t + 3]) for t in (900, 700, 500, 300)]
    want = [answer(unet, adapter, t=t) for t in times]
    cuda_graphs.attach(unet, capture)
    try:
        for t, wanted in zip(times, want, strict=True):
            close(answer(unet, adapter, t=t), wanted)
    finally:
        restore(unet)
    assert made == [10]  # tensors


def test_an_inpainting_unet_is_controlled_by_its_latents_alone(facts, files):
    wide = fill(UNetModel(**facts["config"]["unet"] | {"in_channels": 9}), "wide.")
    x = torch.cat([X, keyed_input("masked", (2, 5, 8, 8))], dim=1)
    with torch.no_grad():
        want = wide(x, T, context=C, control=files[0].network(wide)(X, HINT_A, T, C))
    close(answer(wide, ControlNet(files[0], HINT_A), x=x), want)


# --- files ------------------------------------------------------------------------------------------


def control_to_diffusers_file(tensors):
    theirs = control_to_diffusers(tensors)
    return {theirs[name]: one for name, one in tensors.items()}


def full(tensors, prefix=""):
    return {f"{prefix}{name}": one.clone() for name, one in tensors.items()}


def layouts(tensors):
    beside = {"model.diffusion_model.time_embed.0.bias": torch.zeros(3), "betas": torch.zeros(5)}
    linear = {
        name: one[:, :, 0, 0] if name.endswith("proj_in.weight") else one for name, one in tensors.items()
    }
    return {
        "whole model": {**full(tensors, "control_model."), **beside},
        "diffusers": full(control_to_diffusers_file(tensors)),
        "linear": full(linear),
    }


@pytest.mark.parametrize("layout", ["whole model", "diffusers", "linear"])
@pytest.mark.thinned(3)
def test_each_layout_is_read(unet, files, tensors, tmp_path, layout):
    given = layouts(tensors)[layout]
    suffix = "safetensors" if layout == "diffusers" else "pth"
    path = tmp_path / f"one.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": given} if layout == "whole model" else given, path)
    else:
        save_safetensors(path, {name: one.contiguous() for name, one in given.items()}, {})
    file = ControlNetFile(path)
    assert len(file.ignored) == (2 if layout == "whole model" else 0)
    state = file.network(unet).state_dict()
    assert all(torch.equal(state[name], one) for name, one in tensors.items()) and len(state) == len(tensors)


@pytest.mark.slow
def test_a_diffusers_folder_and_half_precision_are_read(unet, tensors, files, tmp_path):
    name = "diffusion_pytorch_model.fp16.safetensors"
    theirs = control_to_diffusers_file(tensors)
    save_safetensors(tmp_path / name, {name: one.half() for name, one in theirs.items()}, {})
    got, want = (answer(unet, ControlNet(one, HINT_A)) for one in (tmp_path, files[0]))
    assert 0 < (got - want).abs().max() < 5e-3 * want.abs().max()
    with pytest.raises(AbsentError, match="no diffusion_pytorch_model.safetensors or .bin in"):
        ControlNet(tmp_path / "..", HINT_A)


def test_a_file_of_several_dtypes_computes_in_the_widest(unet, tensors, files, tmp_path):
    mixed = {name: one.half() if "norm" in name else one for name, one in tensors.items()}
    save_safetensors(tmp_path / "mixed.safetensors", mixed, {})
    close(
        answer(unet, ControlNet(tmp_path / "mixed.safetensors", HINT_A)),
        answer(unet, ControlNet(files[0], HINT_A)),
        5e-3,
    )


@pytest.fixture(scope="module")
def built_on(unet, tensors, folder):
    """The same network three times: as a Control-LoRA and a difference on the UNet's weights, and whole."""
    own, lora, difference, whole = (
        unet.state_dict(),
        {"lora_controlnet": torch.zeros(0)},
        {"difference": torch.zeros(0)},
        {},
    )
    for name, one in tensors.items():
        layer, _, kind = name.rpartition(".")
        if name not in own:
            lora[name] = difference[name] = whole[name] = one
        elif kind == "weight" and one.ndim > 1:
            up = 0.3 * keyed_input(f"{layer}.up", (len(one), 3, *[1] * (one.ndim - 2))).float()
            down = 0.3 * keyed_input(f"{layer}.down", (3, *one.shape[1:])).float()
            change = (up.flatten(1) @ down.flatten(1)).reshape(one.shape)
            lora |= {f"{layer}.up": up, f"{layer}.down": down}
            difference[name], whole[name] = change, own[name] + change
        elif "norm" in name:  # what a Control-LoRA leaves out is the UNet's
            difference[name], whole[name] = torch.zeros_like(one), own[name]
        else:
            lora[name] = whole[name] = one
            difference[name] = one - own[name]
    for name, given in (("lora", lora), ("difference", difference), ("whole", whole)):
        save_safetensors(
            folder / f"on_{name}.safetensors", {k: v.contiguous().clone() for k, v in given.items()}, {}
        )
    return {
        name: ControlNetFile(folder / f"on_{name}.safetensors") for name in ("lora", "difference", "whole")
    }


@pytest.mark.parametrize("kind", ["lora", "difference"])
def test_what_is_built_on_the_unets_weights_is_the_whole_network(unet, built_on, kind):
    file, before = built_on[kind], identity(unet)
    assert file.built_on == kind and built_on["whole"].built_on is None and len(file.ignored) == 1
    want = answer(unet, ControlNet(built_on["whole"], HINT_A))
    control = ControlNet(file, HINT_A)
    control.check(unet)
    close(answer(unet, control), want)
    assert file.network(unet) is file.network(unet, renew=True) and identity(unet) == before
    assert (want - answer(unet)).abs().max() > 1e-2
    # Of a UNet whose weights are others now, it is another network, from the next call on.
    weight = unet.time_embed[2].weight
    kept = weight.detach().clone()
    old = file.network(unet).time_embed[2].weight.clone()
    try:
        with torch.no_grad():
            weight += 0.01
        assert torch.equal(file.network(unet).time_embed[2].weight, old)
        answer(unet, control)
        close(file.network(unet).time_embed[2].weight, old + 0.01, 1e-6)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    answer(unet, control)
    assert torch.equal(file.network(unet).time_embed[2].weight, old)


@pytest.mark.parametrize("kind", ["lora", "difference"])
def test_a_lora_reaches_what_a_control_lora_takes_from_the_unet(unet, built_on, tmp_path, kind):
    """The same as of a UNet that the LoRA was merged into; built once for all calls with it."""
    weight = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight
    up, down = keyed_input("up", (32, 2)), keyed_input("down", (2, 32))
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    save_safetensors(tmp_path / "lora.safetensors", tensors, {})
    file, lora = built_on[kind], LoRA(tmp_path / "lora.safetensors")
    control = ControlNet(file, HINT_A)
    plain = answer(unet, control)
    got = answer(unet, control, lora)  # in any order
    network = file.network(unet)
    assert torch.equal(answer(unet, lora, control), got) and file.network(unet) is network
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight += up @ down
        close(got, answer(unet, ControlNet(file, HINT_A)))
        apart = answer(unet, ControlNet(built_on["whole"], HINT_A))  # whose copy stays without it
        assert (apart - got).abs().max() > 1e-4
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert torch.equal(answer(unet, control), plain)


def test_a_network_built_on_an_inpainting_unet_takes_its_latents(facts, unet, built_on):
    wide = fill(UNetModel(**facts["config"]["unet"] | {"in_channels": 9}), "wide.")
    x = torch.cat([X, keyed_input("masked", (2, 5, 8, 8))], dim=1)
    control = ControlNet(built_on["lora"], HINT_A)
    assert (answer(wide, control, x=x) - answer(wide, x=x)).abs().max() > 1e-2
    network = built_on["lora"].network(wide)
    change = network.input_blocks[0][0].weight - wide.input_blocks[0][0].weight[:, :4]
    lora = built_on["lora"].tensors
    product = lora["input_blocks.0.0.up"].flatten(1) @ lora["input_blocks.0.0.down"].flatten(1)
    close(change, product.reshape(change.shape), 1e-6)


def test_a_new_network_has_what_its_unet_has_and_changes_nothing():
    """Also of a UNet with every option that the original's ControlNets do not have."""
    options = {
        "use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 16, "num_heads": -1,
        "use_linear_in_transformer": True, "transformer_depth": 2, "num_attention_blocks": [0, 1],
    }  # fmt: skip
    network = fill(UNetModel(**UNET | options), "new.")
    control = ControlNetModel.beside(network).start_from(network)
    state = network.state_dict()
    copied = [name for name in control.state_dict() if name in state]
    assert copied == [name for name in state if not name.startswith(("output_blocks.", "out."))]
    assert all(torch.equal(control.state_dict()[name], state[name]) for name in copied)
    with torch.no_grad():
        maps = control(X, HINT_A, T, C)
        assert torch.equal(network(X, T, context=C, control=maps), network(X, T, context=C))
    assert all(not one.any() for one in maps) and len(maps) == len(network.input_blocks) + 1


def test_a_shuffle_file_is_pooled_by_its_name(files, tensors, folder):
    save_safetensors(folder / "control_v11e_sd15_shuffle.safetensors", tensors, {})
    file = ControlNetFile(folder / "control_v11e_sd15_shuffle.safetensors")
    assert ControlNet(file, HINT_A).pooled and not ControlNet(file, HINT_A, pooled=False).pooled
    assert not ControlNet(files[0], HINT_A).pooled


# --- hints ------------------------------------------------------------------------------------------


def test_hints_of_every_kind_are_the_same_numbers(tmp_path):
    pixels = (255 * keyed_input("pixels", (9, 14, 3)).clamp(0, 1)).numpy().astype(np.uint8)
    want = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "hint.png")
    alpha = Image.fromarray(np.dstack([pixels, np.full((9, 14), 255, np.uint8)]))
    hints = [
        Hint(one) for one in (picture, tmp_path / "hint.png", str(tmp_path / "hint.png"), want, [want], alpha)
    ]
    for hint in hints:
        assert torch.equal(hint.sized(9, 14), want[None]) and hint.hash == hints[0].hash
    clear = Image.new("RGBA", (14, 9), (0, 0, 0, 0))
    assert torch.equal(Hint(clear).sized(9, 14), torch.ones(1, 3, 9, 14))
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(Hint(grey).sized(9, 14), (want[:1]).expand(1, 3, 9, 14))
    assert Hint([picture, want]).sized(9, 14).shape == (2, 3, 9, 14)
    assert Hint(want.flip(1)).hash != hints[0].hash


def test_a_hint_is_cropped_in_its_middle_or_stretched(caplog):
    ramp = torch.linspace(0, 1, 40).expand(3, 20, 40)  # from left to right
    assert torch.equal(Hint(ramp).sized(20, 20), ramp[None, :, :, 10:30])
    assert "40 x 20 pixels has another aspect than the picture of 20 x 20: its middle, 20 x 20" in caplog.text
    caplog.clear()
    stretched = Hint(ramp, "stretch").sized(20, 20)
    assert stretched[0, 0, 0, 0] < 0.02 and stretched[0, 0, 0, -1] > 0.98
    assert Hint(ramp).sized(10, 20).shape == (1, 3, 10, 20) and not caplog.records
    padded = Hint(ramp, "pad").sized(40, 40)[0]
    close(padded[:, 10:30], ramp)
    assert (
        (padded[:, :10] == 0.5).logical_or((padded[:, :10] - 0.5).abs() < 0.05).all()
    )  # the border's median
    assert torch.equal(Hint(ramp, "pad").sized(20, 40)[0], ramp) and not caplog.records
    for size in ((64, 24), (24, 64), (8, 8)):
        for fit in ("crop", "pad", "stretch"):
            sized = Hint(HINT_A, fit).sized(*size)
            assert sized.shape == (2, 3, *size) and sized.min() >= 0 and sized.max() <= 1


def test_masked_pixels_stay_masked_whatever_the_size():
    """A pixel is to be made up (-1 in all channels, as diffusers and A1111 have it) or has values of its own."""
    masked = (0.2 + 0.5 * HINT_A[0]).clone()
    masked[:, 16:48, 8:40] = -1
    hint = Hint(masked)
    assert torch.equal(hint.sized(64, 64)[0], masked)
    for fit in ("crop", "pad", "stretch"):
        for size in ((32, 32), (96, 96), (40, 64)):
            sized = Hint(masked, fit).sized(*size)[0]
            holes = (sized == -1).all(0)
            assert torch.equal(holes, (sized == -1).any(0)) and (sized[:, ~holes] >= 0).all()
    half = (hint.sized(32, 32)[0] == -1).all(0)
    assert half[8:24, 4:20].all() and half.sum() == 16 * 16
    assert hint.hash != Hint(masked.clamp(min=0)).hash
    with pytest.raises(
        UsageError, match=r"from 0 to 1 \(-1 in all channels where it is masked\), got -1 to "
    ):
        Hint(torch.cat([masked[:2], masked[:1].abs()]))


# --- painting ---------------------------------------------------------------------------------------


@pytest.fixture
def sd(painter):
    return painter


@pytest.fixture(scope="module")
def control(painter, folder):
    path = folder / "paint.safetensors"
    save_safetensors(path, weights_for(painter.model.model.diffusion_model), {})
    return ControlNetFile(path)


def paint(sd, *adapters, **options):
    options = {"seed": 3, "steps": 2, "output_type": "latent", "height": 64, "width": 72, **options}
    return sd.txt2img("a large red circle", adapters=adapters, **options)


@pytest.mark.thinned(2)
def test_pictures_follow_a_hint_and_say_so(sd, control):
    before = identity(sd.model)
    plain = paint(sd).latents
    one = ControlNet(control, HINT_A[0], 0.5, end=0.5, guess=True, fit="stretch")
    got = paint(sd, one)
    assert not torch.allclose(got.latents, plain, atol=1e-3)
    assert torch.equal(paint(sd, one).latents, got.latents)
    assert torch.equal(paint(sd, ControlNet(control, HINT_A[0], 0)).latents, plain)
    said = got.parameters[0].adapters[0]
    assert said["sha256"].startswith(said["hash"]) and len(said["hash"]) == 10
    assert {name: said[name] for name in ("kind", "name", "scale", "end", "guess", "fit", "hint")} == {
        "kind": "ControlNet", "name": "paint", "scale": 0.5, "end": 0.5, "guess": True, "fit": "stretch",
        "hint": one.hint.hash,
    }  # fmt: skip
    assert torch.equal(paint(sd).latents, plain) and identity(sd.model) == before
    for count in (1, 3):  # refused before the first batch
        with pytest.raises(UsageError, match=f"2 hints go round .*, got {count} pictures?; give one hint"):
            next(sd.stream(["a"] * count, adapters=[ControlNet(control, HINT_A)], batch_size=2))


def test_a_picture_has_its_own_hint_whatever_its_batch(sd, control, monkeypatch):
    """Alone, in a batch that hints do not divide, and in one that was halved as it did not fit into memory."""
    hints, how = [*HINT_A, *HINT_B[:1]], {"width": 64, "steps": 1, "guidance_scale": 1.0}
    alone = [paint(sd, ControlNet(control, one), seed=3 + i, **how).latents for i, one in enumerate(hints)]
    whole = sd.model.apply_model
    for batch_size, at_once in ((1, 1), (2, 2), (3, 3), (3, 2)):

        def small(x, *args, at_once=at_once):
            if len(x) > at_once:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(x, *args)

        monkeypatch.setattr(sd.model, "apply_model", small)
        got = paint(sd, ControlNet(control, hints), num_images=3, batch_size=batch_size, **how).latents
        close(got, torch.cat(alone))
    again = [alone[0], paint(sd, ControlNet(control, hints[1]), seed=4, **how).latents]
    got = paint(sd, ControlNet(control, hints[:2]), num_images=4, batch_size=3, **how).latents
    close(got[:2], torch.cat(again))  # picture 2 has the first hint again
    close(got[2:3], paint(sd, ControlNet(control, hints[0]), seed=5, **how).latents)


def test_guess_mode_is_a_control_of_the_conditional_pass_alone(sd, control):
    """With guidance 1 there is no other pass; with 3 the law of guidance, step by step."""
    soft, guess = (ControlNet(control, HINT_A[0], **one) for one in ({"weights": "soft"}, {"guess": True}))
    fit = {"width": 64, "steps": 1}
    alone, none = (paint(sd, *one, guidance_scale=1.0, **fit).latents for one in ([guess], []))
    close(alone, paint(sd, soft, guidance_scale=1.0, **fit).latents)
    sides = [paint(sd, *one, guidance_scale=0.0, **fit).latents for one in ([guess], [])]
    close(*sides)  # the unconditional pass alone
    close(paint(sd, guess, guidance_scale=3.0, **fit).latents - sides[1], 3 * (alone - sides[1]), 1e-4)
    assert (alone - none).abs().max() > 1e-3


def test_the_first_step_knows_how_many_follow(sd, control):
    """A control of the first half of the steps works at the first one."""
    first, last = (
        ControlNet(control, HINT_A[0], start=a, end=b, fit="stretch") for a, b in ((0, 0.5), (0.5, 1))
    )
    plain, whole = paint(sd).latents, paint(sd, ControlNet(control, HINT_A[0], fit="stretch")).latents
    pictures = [plain, whole, paint(sd, first).latents, paint(sd, last).latents]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.slow
def test_two_streams_do_not_see_each_other(sd, control):
    sets = ([ControlNet(control, HINT_A[0])], [ControlNet(control, HINT_A[1], end=0.5)], [])
    alone = [paint(sd, *one, width=64).latents for one in sets]
    options = {"seed": 3, "steps": 2, "output_type": "latent", "height": 64, "width": 64}
    streams = [sd.stream("a large red circle", adapters=one, **options) for one in sets]
    ends = [None] * 3
    for _ in range(3):
        ends = [next(stream) for stream in streams]
    assert all(torch.equal(end.result.latents, want) for end, want in zip(ends, alone, strict=True))


def test_a1111s_text_has_a_unit_for_each_and_gives_it_back_as_it_stands():
    adapters = [
        {
            "kind": "ControlNet",
            "name": "canny",
            "scale": 0.8,
            "end": 0.5,
            "weights": "soft",
            "hash": "0123456789",
        },
        {"kind": "LoRA", "name": "style", "hash": "0123456789"},
        {"kind": "T2IAdapter", "name": "a, b", "scale": 1.0, "fit": "pad", "hash": "0123456789"},
    ]
    text = to_infotext({"prompt": "a", "steps": 2, "seed": 3, "adapters": adapters})
    first = (
        "Module: none, Model: canny, Weight: 0.8, Resize Mode: Crop and Resize, Guidance Start: 0.0, "
        "Guidance End: 0.5, Control Mode: My prompt is more important"
    )
    assert (
        f'ControlNet 0: "{first}", ControlNet 1: "Module: none, Model: a, b, Weight: 1.0, Resize Mode: Resize and'
        in text
    )
    assert "ControlNet 2" not in text and from_infotext(text)["extra"]["ControlNet 0"] == first
    assert "ControlNet" not in to_infotext({"prompt": "a", "steps": 2, "seed": 3, "adapters": adapters[1:2]})


# --- refusals ---------------------------------------------------------------------------------------


def test_what_is_no_controlnet_of_this_model_is_refused_by_name(sd, unet, tensors, tmp_path):
    def changed(**other):
        return {**tensors, **other}

    def lora(layer, *shapes):
        return changed(
            **{f"{layer}.{kind}": torch.zeros(s) for kind, s in zip(("up", "down"), shapes, strict=False)}
        )

    wide = {k: torch.zeros(len(v), 1024) if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else v
            for k, v in tensors.items()}  # fmt: skip
    short = {k: v for k, v in tensors.items() if not k.startswith("zero_convs.5.")}
    cases = (
        ({"body.0.block1.weight": torch.zeros(2, 2)}, "this is a T2I-Adapter"),
        ({"lora_unet_mid_block.lora_up.weight": torch.zeros(2, 2)}, "this is a LoRA"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)}, "this is an IP-Adapter"),
        (wide, "one for a context of Stable Diffusion v2 1024 wide; the model's is 24 wide"),
        (changed(**{"label_emb.0.0.weight": torch.zeros(2, 2)}), "this is one for Stable Diffusion XL"),
        ({**short, "difference": torch.zeros(1)}, "one for another UNet: 2 of the model's .* tensors missing"),
        (lora("middle_block.0.in_layers.2", (64, 2)), "'middle_block.0.in_layers.2' has no up and down"),
        (lora("nowhere", (64, 2), (2, 64)), "it changes 'nowhere.weight'"),
        (lora("time_embed.0", (128, 2), (2, 31)), "it changes 'time_embed.0.weight'"),
        (lora("time_embed.0", (128, 2), (3, 32)), "'time_embed.0' has no up and down that go together"),
        ({**control_to_diffusers_file(tensors), "lora_controlnet": torch.zeros(1)}, "by diffusers' names"),
        (short, "one for another UNet: 2 of the model's .* tensors missing"),
        (changed(**{"zero_convs.9.0.bias": torch.zeros(2)}), "one for another UNet: 1 of the file's"),
        (changed(**{"zero_convs.2.0.bias": torch.zeros(7)}), "one for another UNet: 1 of another shape"),
    )  # fmt: skip
    before = identity(unet)
    for i, (given, words) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_safetensors(path, {name: one.contiguous() for name, one in given.items()}, {})
        with pytest.raises(MismatchError, match=words) as error:
            ControlNet(path, HINT_A).check(unet)
        assert "a ControlNet was wanted" in str(error.value) and len(str(error.value)) <= 400
    assert identity(unet) == before
    with pytest.raises(MismatchError, match="context 24 wide; the model's is 128 wide"):
        path = tmp_path / "narrow.safetensors"
        save_safetensors(path, tensors, {})
        paint(sd, ControlNet(path, HINT_A))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError):
        ControlNet(tmp_path / "cut.safetensors", HINT_A)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hint": None}, "a hint should be a picture, .* got none"),
        ({"hint": 5}, "a hint should be a picture"),
        ({"hint": []}, "a list of hints should hold 1 to 64, got 0"),
        ({"hint": HINT_A * 255}, "a hint's values should be from 0 to 1 .*, got 0 to 2"),
        ({"hint": HINT_A - 0.5}, "a hint's values should be from 0 to 1 .*, got -0.5"),
        ({"hint": HINT_A * float("nan")}, "a hint's values should be from 0 to 1 .*, got nan"),
        ({"hint": HINT_A[:, :2]}, r"got float32 of shape \(2, 2, 64, 64\)"),
        ({"hint": (255 * HINT_A).byte()}, "got uint8 of shape"),
        ({"hint": "absent.png"}, "absent.png"),
        ({"fit": "fill"}, "fit should be one of crop, pad, stretch, got 'fill'"),
        ({"hint": Hint(HINT_A), "fit": "pad"}, r"that of the hint where it is a Hint \('crop'\), got 'pad'"),
        ({"only_mid_control": 1.5}, "only_mid_control should be true or false"),
        ({"scale": float("inf")}, "scale should be a number"),
        ({"start": 0.6, "end": 0.4}, "start should be below end, got start=0.6 and end=0.4"),
        ({"start": 0.5, "end": 0.5}, "start should be below end"),
        ({"end": 1.5}, "end should be a number from 0 to 1, got 1.5"),
        ({"guess": "yes"}, "guess should be true or false"),
        ({"weights": "hard"}, "weights should be numbers, 'soft' or None"),
        ({"weights": [1, 2]}, "weights should be 7 numbers for this UNet"),
    ],
)
def test_wrong_options_are_refused_in_one_line(unet, files, options, words):
    with pytest.raises(LdmError, match=words) as error:
        ControlNet(files[0], **{"hint": HINT_A, **options}).check(unet)
    assert len(str(error.value)) <= 400 and "\n" not in str(error.value) and error.value.exit_code > 1


def test_only_unets_take_one(files):
    with pytest.raises(UsageError, match="a ControlNet needs a UNetModel, got Linear"):
        ControlNet(files[0], HINT_A).check(torch.nn.Linear(2, 3))
    plain = UNetModel(8, 4, 32, 4, 1, [], channel_mult=(1, 2), num_heads=2)
    middle_only = ControlNet(files[0], HINT_A)
    with pytest.raises(UsageError, match="needs a UNet with spatial transformers"):
        middle_only.check(plain)
