"""T2I-Adapters: the originals' maps, where they are added, every layout of file, and nothing that stays."""

import json

import pytest
import torch
from keyed import fill, keyed_input, weight
from safetensors.torch import load_file
from tiny_networks import UNET, ddim_chain

from ldm.adapters import DeepCache, T2IAdapter
from ldm.adapters.t2i_adapter import T2IAdapterFile, assemble, places
from ldm.checkpoints import save_safetensors
from ldm.checkpoints.key_mapping import unet_to_diffusers
from ldm.errors import LdmError, MismatchError, UsageError
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import StepInfo, attached

HINT = (0.3 * keyed_input("t2i.img", (2, 3, 64, 64)) + 0.5).clamp(0, 1)
X, T, C = keyed_input("c.x", (2, 4, 8, 8)), torch.tensor([5, 700]), keyed_input("c.c", (2, 7, 24))


def close(got, want, rel=1e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


@pytest.fixture(scope="module")
def facts(request):
    return json.loads((request.path.parents[1] / "golden/t2i_adapter.json").read_text())


@pytest.fixture(scope="module")
def recorded(request):
    return load_file(request.path.parents[1] / "golden/t2i_adapter.safetensors")


def keyed(shapes, prefix):
    return {key: weight(prefix + key, tuple(shape)) for key, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["full", "light"])
@torch.no_grad()
def test_the_maps_are_the_recorded_ones(kind, facts, recorded):
    maps = assemble(keyed(facts[kind], f"t2i.{kind}."), 4)(HINT)
    for got, place in zip(maps, (9, 6, 3, 0), strict=True):
        close(got, recorded[f"t2i.{kind}.input.{place}"])
    shapes, prefix = facts[f"diffusers_{kind}"], f"t2i.diffusers.{kind}."
    levels = len({key.split(".")[2] for key in shapes if ".body." in key})
    maps = assemble(keyed(shapes, prefix), levels)(HINT)
    for i, got in enumerate(maps):
        close(got, recorded[f"{prefix}{i}"])
    assert f"{prefix}{levels}" not in recorded


def test_the_published_files_are_for_stable_diffusion_v1(facts):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in facts["sd1_full"].items()}
    network = assemble(tensors, 4)
    assert len(network.state_dict()) == len(tensors)
    with torch.device("meta"):
        unet = UNetModel(
            32, 4, 320, 4, 2, [4, 2, 1], channel_mult=(1, 2, 4, 4), num_heads=8, use_spatial_transformer=True,
            context_dim=768,
        )  # fmt: skip
        maps = network(torch.zeros(1, 3, 192, 320))
    assert places(unet) == [2, 5, 8, 11]
    assert [tuple(one.shape[1:]) for one in maps] == [
        (320, 24, 40), (640, 12, 20), (1280, 6, 10), (1280, 3, 5)
    ]  # fmt: skip


# --- in a UNet --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET | {"out_channels": 4}), "unet.")


def full_keys(widths, hint_channels=3, blocks=2):
    """Names and shapes of a full adapter for a UNet, as TencentARC has them."""
    shapes = {"conv_in.weight": (widths[0], 64 * hint_channels, 3, 3), "conv_in.bias": (widths[0],)}
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            name = f"body.{blocks * i + j}"
            if before != width:
                shapes |= {f"{name}.in_conv.weight": (width, before, 1, 1), f"{name}.in_conv.bias": (width,)}
            shapes |= {f"{name}.block1.weight": (width, width, 3, 3), f"{name}.block1.bias": (width,)}
            shapes |= {f"{name}.block2.weight": (width, width, 1, 1), f"{name}.block2.bias": (width,)}
            before = width
    return shapes


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("t2i") / "sketch.safetensors"
    save_safetensors(path, keyed(full_keys([32, 64]), "t2i."), {})
    return T2IAdapterFile(path)


def answer(unet, *adapters, step=None, x=X, t=T, c=C, **options):
    for one in adapters if step is not None else ():
        one.at(step)
    with torch.no_grad(), attached(unet, *adapters):
        return unet(x, t, context=c, **options)


@torch.no_grad()
def test_maps_go_into_the_next_block_and_into_the_skip(unet, file):
    """By hooks on the blocks themselves: what they give is what they gave and the map."""
    maps = file.network(unet)(HINT)
    assert places(unet) == [1, 3] and len(unet.input_blocks) == 4
    hooks = [
        unet.input_blocks[place].register_forward_hook(lambda m, given, out, one=one: out + 0.7 * one)
        for place, one in zip(places(unet), maps, strict=True)
    ]
    want = unet(X, T, context=C)
    for hook in hooks:
        hook.remove()
    close(answer(unet, T2IAdapter(file, HINT, 0.7)), want, 1e-6)
    assert (want - answer(unet)).abs().max() > 1e-2
    with pytest.raises(MismatchError, match=r"keyed by input blocks, 0 to 3, got \[4\]"):
        unet(X, T, context=C, features={4: maps[0]})


def identity(network):
    return {name: (id(p), p._version) for name, p in network.named_parameters()} | {
        name: sorted(vars(m)) for name, m in network.named_modules()
    }


def test_laws(unet, file):
    plain, before = answer(unet), identity(unet)
    for adapter, step in (
        (T2IAdapter(file, HINT, 0), None),
        (T2IAdapter(file, HINT, start=0.5), StepInfo(1, 4)),
        (T2IAdapter(file, HINT, end=0.5), StepInfo(2, 4)),
    ):
        assert torch.equal(answer(unet, adapter, step=step), plain)
    one, half = T2IAdapter(file, HINT), T2IAdapter(file, HINT, 0.5)
    want = answer(unet, one)
    close(answer(unet, half, half), want, 1e-6)
    close(answer(unet, one, DeepCache(2), step=StepInfo(0, 3)), want)
    # Row by row, through both halves of a guided batch.
    x, t, c = torch.cat([X, X]), torch.cat([T, T]), torch.cat([C.flip(0), C])
    got = answer(unet, one, x=x, t=t, c=c)
    for row in range(4):
        single = T2IAdapter(file, HINT[row % 2])
        close(got[row], answer(unet, single, x=x[row : row + 1], t=t[row : row + 1], c=c[row : row + 1])[0])
    with pytest.raises(UsageError, match="2 hints go round among the pictures .*, got 3 pictures"):
        answer(unet, one, x=x[:3], t=t[:3], c=c[:3])
    with pytest.raises(UsageError, match="2 hints go round among the pictures .*, got 1 picture;"):
        answer(unet, one, step=StepInfo(0, 1, unconditional=1, images=1))
    second = answer(
        unet, one.of_images([3]), x=x[1:2], t=t[1:2], c=c[1:2]
    )  # of a request's pictures the last
    close(second, got[1:2])
    assert torch.equal(answer(unet), plain) and identity(unet) == before


def test_with_fused_modules_the_numbers_are_the_same(unet, file):
    """In a guided batch of equal halves, whose first blocks run once, and with maps that differ between rows."""
    x, t, c = torch.cat([X, X]), torch.cat([T, T]), torch.cat([C.flip(0), C])
    adapters = [T2IAdapter(file, HINT), T2IAdapter(file, HINT[:1], 0.3)]
    want = [answer(unet, one, x=x, t=t, c=c) for one in adapters]
    try:
        optimize(unet)
        for one, wanted in zip(adapters, want, strict=True):
            with torch.inference_mode():
                close(answer(unet, one, x=x, t=t, c=c), wanted, 2e-5)
    finally:
        restore(unet)


def test_a_graph_of_the_unet_serves_all_steps(unet, file):
    made = []

    def capture(run, inputs):
        made.append(len(inputs))
        return run

    adapter = T2IAdapter(file, HINT)
    times = [torch.tensor([t, t + 3]) for t in (900, 700, 500, 300)]
    want = [answer(unet, adapter, t=t) for t in times]
    cuda_graphs.attach(unet, capture)
    try:
        for t, wanted in zip(times, want, strict=True):
            close(answer(unet, adapter, t=t), wanted)
    finally:
        restore(unet)
    assert made == [5]  # tensors


def in_diffusers(tensors):
    """Name the tensors of a full adapter with two blocks a level as diffusers does."""
    theirs = {}
    for name, values in tensors.items():
        head, number, rest = name.split(".", 2) if name.startswith("body") else (name, "0", "")
        place = f"{int(number) // 2}." + ("" if rest.startswith("in_conv") else f"resnets.{int(number) % 2}.")
        theirs[f"adapter.{f'{head}.{place}{rest}' if rest else name}"] = values
    return theirs


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_own_adapter_and_unet_give_the_same_forward_and_chain(unet, file):
    """Forward to 1e-5; 20 DDIM steps, all computed by diffusers, to 1e-4; plain and optimized."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip
    state = unet.state_dict()
    names = unet_to_diffusers(state)
    network.load_state_dict({names[key]: value for key, value in state.items()})
    adapter = diffusers.T2IAdapter(3, channels=[32, 64], num_res_blocks=2, downscale_factor=8).eval()
    adapter.load_state_dict(in_diffusers(file.tensors))
    maps = [0.7 * one for one in adapter(HINT)]

    def theirs(x, t):
        return network(x, t, C, down_intrablock_additional_residuals=list(maps), return_dict=False)[0]

    mine = T2IAdapter(file, HINT, 0.7)
    want, wanted = theirs(X, T), ddim_chain(X, theirs)
    for prepare in (lambda network: None, optimize):
        prepare(unet)
        try:
            with torch.inference_mode():
                close(answer(unet, mine), want)
                close(ddim_chain(X, lambda x, t: answer(unet, mine, x=x, t=t)), wanted, 1e-4)
        finally:
            restore(unet)


def test_layouts_containers_and_grey_hints(unet, tmp_path):
    shapes = full_keys([32, 64], hint_channels=1)
    tensors = keyed(shapes, "grey.")
    theirs = in_diffusers(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", theirs, {})
    grey = HINT[:, :1].expand(2, 3, 64, 64)
    one, other = (answer(unet, T2IAdapter(path, grey)) for path in (tmp_path / "a.pth", tmp_path))
    assert torch.equal(one, other) and (one - answer(unet)).abs().max() > 1e-2
    with torch.no_grad():
        for got, want in zip(
            T2IAdapter(tmp_path, grey).maps(unet, X).values(), assemble(tensors, 2)(HINT[:, :1]), strict=True
        ):
            close(got, want)


def test_pictures_follow_a_hint_and_say_so(painter, file):
    sd = painter
    options = {"seed": 3, "steps": 2, "output_type": "latent", "height": 64, "width": 64}
    before = identity(sd.model)
    plain = sd.txt2img("a circle", **options).latents
    got = sd.txt2img("a circle", adapters=[T2IAdapter(file, HINT[0], 0.5, end=0.5)], **options)
    assert not torch.allclose(got.latents, plain, atol=1e-3)
    said = got.parameters[0].adapters[0]
    assert (said["kind"], said["name"], said["scale"], said["end"]) == ("T2IAdapter", "sketch", 0.5, 0.5)
    assert torch.equal(sd.txt2img("a circle", **options).latents, plain) and identity(sd.model) == before


def test_what_is_no_adapter_of_this_model_is_refused_by_name(unet, tmp_path):
    good = keyed(full_keys([32, 64]), "t2i.")
    bad_bias, gap = dict(good), dict(good)
    bad_bias["body.1.block1.bias"] = torch.zeros(5)
    gap["body.1.block2.weight"] = torch.zeros(32, 7, 1, 1)
    cases = (
        ({"input_hint_block.0.weight": torch.zeros(2, 2)}, "this is a ControlNet"),
        ({"lora_unet_mid_block.lora_up.weight": torch.zeros(2, 2)}, "this is a LoRA"),
        ({"style_embedding": torch.zeros(1, 2, 3)}, r"one of style.* use StyleAdapter\(file, image=\.\.\.\)"),
        (keyed(full_keys([32, 64], 12), "xl."), "one for Stable Diffusion XL"),
        (keyed(full_keys([32, 96]), "wide."), r"one for a UNet \[32, 96\] wide; the model's is \[32, 64\] wide"),
        (keyed(full_keys([32, 64, 64, 64]), "deep."), "one for another UNet"),
        (bad_bias, "1 of its tensors differ"),
        (gap, "not those of 2 levels that follow one another"),
        ({k: v for k, v in good.items() if k != "body.1.block2.bias"}, "1 of its tensors differ .*resnets.1.block2"),
        ({**good, "body.9.skep.weight": torch.zeros(2, 2)}, "of its tensors differ|not those of"),
    )  # fmt: skip
    for i, (given, words) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_safetensors(path, given, {})
        with pytest.raises(MismatchError, match=words) as error:
            T2IAdapter(path, HINT).check(unet)
        assert "a T2I-Adapter was wanted" in str(error.value) and len(str(error.value)) <= 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hint": None}, "a hint should be a picture, .* got none"),
        ({"scale": float("nan")}, "scale should be a number"),
        ({"start": 1.0}, "start should be below end"),
        ({"fit": ""}, "fit should be one of crop, pad, stretch"),
    ],
)
def test_wrong_options_are_refused_in_one_line(file, options, words):
    with pytest.raises(LdmError, match=words):
        T2IAdapter(file, **{"hint": HINT, **options})
