"""IP-Adapters: the originals' projections, attentions in their order, files of every kind, and nothing that stays."""

import pytest
import torch
from keyed import fill, keyed_input, weight
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import UNET

from ldm.adapters import AttentionSlicing, ControlNet, DeepCache, IPAdapter
from ldm.adapters.ip_adapter_attention import (
    ImageAttention,
    ImagePart,
    Painted,
    check_scale,
    scale_at,
    scales_of,
)
from ldm.adapters.ip_adapter_file import IPAdapterFile, projection_of
from ldm.adapters.ip_adapter_images import RegionMask, clip_pixels, encode_images, load_encoder
from ldm.checkpoints import save_safetensors
from ldm.errors import AbsentError, LdmError, MismatchError, UsageError
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import AttnProcessor, IPAttnProcessor, named_attentions
from ldm.modules.seams import Rank, StepInfo, attached, wrap

X, T, C = keyed_input("c.x", (2, 4, 8, 6)), torch.tensor([5, 700]), keyed_input("c.c", (2, 7, 24))
EMBEDS, STATES = keyed_input("ip.embeds", (2, 20)), keyed_input("ip.hidden", (2, 10, 20))
IDS = keyed_input("ip.ids", (2, 6))  # of two faces
STYLE = keyed_input("ip.style", (2, 3, 24))


def close(got, want, rel=1e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


def keyed(shapes, prefix):
    return {key: weight(prefix + key, tuple(shape)) for key, shape in shapes.items()}


def projection_shapes(kind, width=20, context=24, tokens=4, dim=24, inner=None, depth=2, ids=6):
    """Names and shapes of an image projection as IP-Adapter's files have them."""
    if kind == "base":
        return {
            "proj.weight": (tokens * context, width), "proj.bias": (tokens * context,),
            "norm.weight": (context,), "norm.bias": (context,),
        }  # fmt: skip
    if kind == "full":
        return {
            "proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (context, width),
            "proj.2.bias": (context,), "proj.3.weight": (context,), "proj.3.bias": (context,),
        }  # fmt: skip
    if kind.startswith("faceid"):
        own = context if kind == "faceid" else dim
        shapes = {
            "proj.0.weight": (2 * ids, ids), "proj.0.bias": (2 * ids,), "proj.2.weight": (tokens * own, 2 * ids),
            "proj.2.bias": (tokens * own,), "norm.weight": (own,), "norm.bias": (own,),
        }  # fmt: skip
        if kind == "faceid":
            return shapes
        plus = projection_shapes("plus", width, context, tokens, dim, inner, depth)
        return shapes | {f"perceiver_resampler.{name}": s for name, s in plus.items() if name != "latents"}
    inner = inner or dim
    shapes = {
        "latents": (1, tokens, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,),
        "proj_out.weight": (context, dim), "proj_out.bias": (context,), "norm_out.weight": (context,),
        "norm_out.bias": (context,),
    }  # fmt: skip
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"layers.{i}.0.{norm}.{one}": (dim,) for one in ("weight", "bias")}
        shapes |= {f"layers.{i}.0.to_q.weight": (inner, dim), f"layers.{i}.0.to_kv.weight": (2 * inner, dim)}
        shapes |= {f"layers.{i}.0.to_out.weight": (dim, inner), f"layers.{i}.1.0.weight": (dim,)}
        shapes |= {f"layers.{i}.1.0.bias": (dim,), f"layers.{i}.1.1.weight": (4 * dim, dim)}
        shapes |= {f"layers.{i}.1.3.weight": (dim, 4 * dim)}
    return shapes


@torch.no_grad()
def test_projections_and_pixels_are_the_recorded_ones(request):
    recorded = load_file(request.path.parents[1] / "golden/adapters_ip.safetensors")
    base = projection_of(keyed(projection_shapes("base"), "image_proj."), 24)
    close(base(EMBEDS), recorded["ip.proj.base"])
    close(base(torch.zeros(2, 20)), recorded["ip.proj.base.uncond"])
    full = projection_of(keyed(projection_shapes("full"), "image_proj_full."), 24)
    close(full(STATES), recorded["ip.proj.full"])
    plus = projection_of(keyed(projection_shapes("plus", tokens=5), "image_proj_plus."), 24, head=8)
    close(plus(STATES), recorded["ip.proj.plus"])
    pixels = (keyed_input("clip.img", (24, 30, 3)) * 40 + 128).clip(0, 255).byte().numpy()
    close(clip_pixels(Image.fromarray(pixels), 16), recorded["clip.pixels16"])


@torch.no_grad()
def test_faces_become_tokens_and_read_the_picture_as_learned_latents_do():
    shapes = projection_shapes("faceid-plus", dim=32)
    tensors = keyed(shapes, "face.")
    face, plus = (
        projection_of(
            {name: x for name, x in tensors.items() if ("perceiver" in name) <= is_plus}, 32 - 8 * is_plus, 8
        )
        for is_plus in (False, True)
    )
    first, last = tensors["proj.0.weight"], tensors["proj.2.weight"]
    ids = torch.nn.functional.gelu(IDS @ first.T + tensors["proj.0.bias"]) @ last.T + tensors["proj.2.bias"]
    ids = torch.nn.functional.layer_norm(
        ids.reshape(2, 4, 32), (32,), tensors["norm.weight"], tensors["norm.bias"]
    )
    close(face(IDS), ids)
    # With the face's tokens for its latents, the plus kind's resampler.
    body = {
        n.removeprefix("perceiver_resampler."): x for n, x in tensors.items() if n.startswith("perceiver")
    }
    want = torch.cat(
        [projection_of(body | {"latents": ids[i : i + 1]}, 24, 8)(STATES[i : i + 1]) for i in (0, 1)]
    )
    close(plus(IDS, STATES), want)
    wide = projection_of(keyed(projection_shapes("faceid-plus", context=32, dim=32), "face."), 32, 8)
    close(wide(IDS, STATES, 0.7), ids + 0.7 * wide(IDS, STATES))


PUBLISHED = {  # of the files for v1: kind, options of projection_shapes -> what is read, how wide, how many tokens
    "base, light": ("base", {"width": 1024}, ("embeds", 1024, 4)),
    "vit-G": ("base", {"width": 1280}, ("embeds", 1280, 4)),
    "plus, plus-face": ("plus", {"width": 1280, "dim": 768, "depth": 4, "tokens": 16}, ("states", 1280, 16)),
    "full-face": ("full", {"width": 1280}, ("states", 1280, None)),
    "faceid": ("faceid", {"ids": 512}, (None, None, 4)),
    "faceid-portrait": ("faceid", {"ids": 512, "tokens": 16}, (None, None, 16)),
    "faceid-plus": ("faceid-plus", {"width": 1280, "dim": 768, "depth": 4, "ids": 512}, ("states", 1280, 4)),
}


@torch.no_grad()
def test_published_projections_are_told_by_names_and_shapes():
    for name, (kind, options, (reads, width, tokens)) in PUBLISHED.items():
        shapes = projection_shapes(kind, context=768, **options)
        made = projection_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, 768)
        got = (made.reads, getattr(made, "width", None), getattr(made, "num_tokens", None))
        assert got == (reads, width, tokens), name


@torch.no_grad()
def test_two_adapters_and_masks_give_the_recorded_numbers(request):
    recorded = load_file(request.path.parents[1] / "golden/adapters_ip.safetensors")
    attn = fill(CrossAttention(32, 24, 4, 8), "ip.attn2.")
    shapes = {"x": (2, 12, 32), "text": (2, 7, 24), "image": (2, 4, 24), "image2": (2, 3, 24)}
    x, text, *pictures = (keyed_input(f"ip.{name}", shape) for name, shape in shapes.items())
    painted, parts = Painted(), []
    painted.size = (3, 4)
    for i in (0, 1):
        layers = IPAttnProcessor(32, 24)
        for part in "kv":
            getattr(layers, f"to_{part}_ip").weight.copy_(
                weight(f"ip.proc.to_{part}_ip.{i}.weight", (32, 24))
            )
        mask = RegionMask(keyed_input(f"ip.mask{i + 1}", (1, 1, 24, 32)) > 0)
        parts.append((layers, (0.6, 0.9)[i], pictures[i].shape[1], mask))
    for name, count, masked in (
        ("one", 1, False),
        ("mask", 1, True),
        ("two", 2, False),
        ("two_masks", 2, True),
    ):
        made = [ImagePart(*part, (mask,) * masked, painted) for *part, mask in parts[:count]]
        context = torch.cat([text, *reversed(pictures[:count])], dim=1)
        close(ImageAttention(tuple(made))(attn, x, context), recorded[f"ip.diffusers.{name}"])


# --- in a UNet --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET | {"out_channels": 4}), "unet.")


def layers_for(unet):
    """The layers of an adapter for a UNet, by their numbers in diffusers' order."""
    return {
        f"ip_adapter.{i}.to_{part}_ip.weight": weight(f"ip.{i}.{part}", tuple(one.to_k.weight.shape))
        for i, one in enumerate(named_attentions(unet).values())
        if i % 2
        for part in "kv"
    }


def tensors_for(unet, kind="base", **options):
    shapes = projection_shapes(kind, **options)
    return keyed({f"image_proj.{key}": shape for key, shape in shapes.items()}, "") | layers_for(unet)


@pytest.fixture(scope="module")
def file(unet, tmp_path_factory):
    path = tmp_path_factory.mktemp("ip") / "look.safetensors"
    save_safetensors(path, tensors_for(unet), {})
    return IPAdapterFile(path)


def answer(unet, *adapters, step=None, x=X, t=T, c=C):
    for one in adapters if step is not None else ():
        one.at(step)
    with torch.no_grad(), attached(unet, *adapters):
        return unet(x, t, context=c)


@torch.no_grad()
def test_it_answers_as_processors_set_by_hand_and_a_longer_context(unet, file):
    """With the layers of IP-Adapter's own loop over attn_processors, and the tokens of its projection."""
    tensors = tensors_for(unet)
    own = {}
    for i, (name, one) in enumerate(named_attentions(unet).items()):
        own[f"{name}.processor"] = AttnProcessor()
        if i % 2:
            mine = IPAttnProcessor(one.to_k.out_features, 24, scale=0.6, num_tokens=8)
            state = {f"to_{part}_ip.weight": tensors[f"ip_adapter.{i}.to_{part}_ip.weight"] for part in "kv"}
            mine.load_state_dict(state)
            own[f"{name}.processor"] = mine
    tokens = file.projection(EMBEDS).flatten(0, 1)
    none = file.projection(torch.zeros(2, 20)).flatten(0, 1)
    context = torch.cat([C, torch.stack([none, tokens])], dim=1)
    unet.set_attn_processor(own)
    try:
        want = unet(X, T, context=context)
    finally:
        unet.set_attn_processor(AttnProcessor())
    one = IPAdapter(file, embeds=EMBEDS, scale=0.6)
    close(answer(unet, one, step=StepInfo(0, 1, unconditional=1)), want)
    assert (want - answer(unet)).abs().max() > 1e-2
    assert (want - answer(unet, one, step=StepInfo(0, 1))).abs().max() > 1e-3


def identity(network):
    return {name: (id(p), p._version) for name, p in network.named_parameters()} | {
        name: sorted(vars(m)) for name, m in network.named_modules()
    }


def test_laws(unet, file):
    plain, before = answer(unet), identity(unet)
    for adapter, step in (
        (IPAdapter(file, embeds=EMBEDS, scale=0), None),
        (IPAdapter(file, embeds=EMBEDS, start=0.5), StepInfo(1, 4)),
        (IPAdapter(file, embeds=EMBEDS, end=0.5), StepInfo(2, 4)),
    ):
        assert torch.equal(answer(unet, adapter, step=step), plain)
    one, strong = IPAdapter(file, embeds=EMBEDS), IPAdapter(file, embeds=EMBEDS, scale=2.0)
    want, other = answer(unet, one), answer(unet, strong)
    assert (want - other).abs().max() > 1e-3 and torch.equal(answer(unet, one), want)
    close(answer(unet, one, DeepCache(2), step=StepInfo(0, 3)), want)
    # Several pictures: attention knows no order of tokens, and a picture given twice is that picture.
    close(answer(unet, IPAdapter(file, embeds=EMBEDS.flip(0))), want)
    close(
        answer(unet, IPAdapter(file, embeds=EMBEDS[[0, 0]])), answer(unet, IPAdapter(file, embeds=EMBEDS[:1]))
    )
    # Two at once: each answers beside the text, in any order; of the same tokens, scales add up.
    other = IPAdapter(file, embeds=EMBEDS[:1] + 1, scale=0.4)
    close(answer(unet, one, other), answer(unet, other, one))
    assert (answer(unet, one, other) - want).abs().max() > 1e-3
    halves = IPAdapter(file, embeds=EMBEDS, scale=0.3), IPAdapter(file, embeds=EMBEDS, scale=0.7)
    close(answer(unet, *halves), want)
    close(
        answer(unet, IPAdapter(file, embeds=EMBEDS, combine="average")),
        answer(unet, IPAdapter(file, embeds=EMBEDS.mean(0, keepdim=True))),
    )
    assert torch.equal(answer(unet), plain) and identity(unet) == before


def test_masks_say_where_a_picture_has_a_say(unet, file, tmp_path):
    one = IPAdapter(file, embeds=EMBEDS[:1])
    want, plain = answer(unet, one), answer(unet)
    left = torch.zeros(64, 48)
    left[:, :20] = 1
    sides = [IPAdapter(file, embeds=EMBEDS[:1], mask=mask) for mask in (left, 1 - left[None])]
    close(answer(unet, *sides), want)
    assert all((answer(unet, side) - rest).abs().max() > 1e-3 for side in sides for rest in (want, plain))
    close(answer(unet, IPAdapter(file, embeds=EMBEDS[:1], mask=torch.ones(64, 48))), want)
    close(answer(unet, IPAdapter(file, embeds=EMBEDS[:1], mask=0.0 * left)), plain)
    # One mask for two pictures, which answer together; two, and each answers by itself.
    both = IPAdapter(file, embeds=EMBEDS)
    close(answer(unet, IPAdapter(file, embeds=EMBEDS, mask=torch.ones(8, 6))), answer(unet, both))
    alone = [IPAdapter(file, embeds=EMBEDS[i : i + 1], mask=mask) for i, mask in enumerate((left, 1 - left))]
    close(answer(unet, IPAdapter(file, embeds=EMBEDS, mask=[left, 1 - left])), answer(unet, *alone))
    picture = Image.fromarray((left * 200).byte().numpy())
    picture.save(tmp_path / "left.png")
    for given in (picture, tmp_path / "left.png", left > 0):
        assert torch.equal(RegionMask(given).values, left)
    for size, cells in (((8, 6), 48), ((8, 6), 12), ((9, 7), 20), ((9, 7), 6)):
        assert RegionMask(left).at(size, cells, left).shape == (1, 1, cells, 1)


def test_scales_of_steps_and_blocks(unet, file):
    plain, want = answer(unet), {s: answer(unet, IPAdapter(file, embeds=EMBEDS, scale=s)) for s in (0.5, 1.0)}
    steps = [StepInfo(i, 4) for i in range(4)]
    for scale, wanted in (
        ([1.0, 0.5], (want[1.0], want[1.0], want[0.5], want[0.5])),
        ([1, 0.5, 0.0, 0.0], (want[1.0], want[0.5], plain, plain)),
        (lambda way: {0.0: 1.0, 0.25: 0.5}.get(way, 0.0), (want[1.0], want[0.5], plain, plain)),
    ):
        for step, one in zip(steps, wanted, strict=True):
            close(answer(unet, IPAdapter(file, embeds=EMBEDS, scale=scale), step=step), one)
    for total in (29, 100, 1000):  # one for each step
        assert [scale_at(list(range(total)), i / total) for i in range(total)] == list(range(total))
    every = {"down": 0.5, "mid": 0.5, "up": {"block_0": [0.5, 0.5], "block_1": 0.5}}
    close(answer(unet, IPAdapter(file, embeds=EMBEDS, scale=every)), want[0.5])
    only = answer(unet, IPAdapter(file, embeds=EMBEDS, scale={"up": {"block_1": [0, 0.5]}}))
    assert min((only - one).abs().max() for one in (plain, want[0.5])) > 1e-4
    close(answer(unet, IPAdapter(file, embeds=EMBEDS, scale={"mid": 0.0})), plain)
    names = [place.name for place in file.places(unet)]  # down 0, 1; up 0: 2, up 1: 2; middle
    got = scales_of(
        check_scale({"down": {"block_1": 2}, "mid": [3], "up": {"block_0": [4], "block_1": [5, 6]}}), names
    )
    assert got == [0, 2, 4, 4, 5, 6, 3]


def test_what_stands_for_no_picture_is_seen_by_the_rows_without_the_condition(unet, file):
    """The same as that picture's own adapter in these rows."""
    against = IPAdapter(file, embeds=EMBEDS[:1], negative_embeds=EMBEDS[1:])
    got = answer(unet, against, step=StepInfo(0, 1, unconditional=1))
    close(got[1:], answer(unet, IPAdapter(file, embeds=EMBEDS[:1]))[1:])
    close(got[:1], answer(unet, IPAdapter(file, embeds=EMBEDS[1:]))[:1])
    assert (
        "negative_image" in against.describe()
        and "negative_image" not in IPAdapter(file, embeds=EMBEDS).describe()
    )


def face_tensors(unet, kind="faceid", **options):
    """A FaceID file, with a LoRA of rank 3 on every attention."""
    tensors = tensors_for(unet, kind, **options)
    for i, one in enumerate(named_attentions(unet).values()):
        for part, layer in (("q", one.to_q), ("k", one.to_k), ("v", one.to_v), ("out", one.to_out[0])):
            for half, shape in (("down", (3, layer.in_features)), ("up", (layer.out_features, 3))):
                name = f"ip_adapter.{i}.to_{part}_lora.{half}.weight"
                tensors[name] = 0.3 * keyed_input(name, shape)
    return tensors


@torch.no_grad()
def test_faceid_brings_its_lora_along(unet, tmp_path):
    tensors = face_tensors(unet)
    save_safetensors(tmp_path / "face.safetensors", tensors, {})
    bare = {name: x for name, x in tensors.items() if "_lora" not in name}
    save_safetensors(tmp_path / "bare.safetensors", bare, {})
    file, bare = IPAdapterFile(tmp_path / "face.safetensors"), IPAdapterFile(tmp_path / "bare.safetensors")
    assert file.reads is None and file.reads_face and file.projection.embed_dim == 6
    plain, before = answer(unet), identity(unet)
    merged = fill(UNetModel(**UNET | {"out_channels": 4}), "unet.")
    for i, one in enumerate(named_attentions(merged).values()):
        for part, layer in (("q", one.to_q), ("k", one.to_k), ("v", one.to_v), ("out", one.to_out[0])):
            up, down = (tensors[f"ip_adapter.{i}.to_{part}_lora.{half}.weight"] for half in ("up", "down"))
            layer.weight += 0.8 * up @ down
    step = StepInfo(0, 2, unconditional=1)
    face = IPAdapter(file, id_embeds=IDS, scale=0.7, lora_scale=0.8, end=0.5)
    got = answer(unet, face, step=step)
    close(got, answer(merged, IPAdapter(bare, id_embeds=IDS.numpy(), scale=0.7), step=step))
    without = answer(unet, IPAdapter(file, id_embeds=IDS, scale=0.7, lora_scale=0), step=step)
    close(without, answer(unet, IPAdapter(bare, id_embeds=IDS, scale=0.7), step=step))
    assert (got - without).abs().max() > 1e-2
    assert torch.equal(answer(unet, face, step=StepInfo(1, 2)), plain)
    assert torch.equal(answer(unet, IPAdapter(file, id_embeds=IDS[0], scale=0)), plain)
    assert torch.equal(answer(unet), plain) and identity(unet) == before
    assert face.describe()["lora_scale"] == 0.8
    optimize(unet)
    try:
        close(answer(unet, face, step=step), got, 2e-5)
    finally:
        restore(unet)


def test_faceid_plus_reads_the_picture_of_the_face_as_well(unet, tmp_path):
    tensors = face_tensors(unet, "faceid-plus", dim=64, tokens=3)
    wide = face_tensors(unet, "faceid-plus", dim=24, inner=64)
    given = {"id_embeds": IDS, "embeds": STATES, "negative_embeds": STATES[:1] * 0}
    save_safetensors(tmp_path / "plus.safetensors", tensors, {})
    one = IPAdapter(tmp_path / "plus.safetensors", **given)
    assert one.tokens.shape == (1, 6, 24) and one.shortcut == 0 and one.file.reads == "states"
    for name in ("a_plusv2_x", "a_plus"):
        save_safetensors(tmp_path / f"{name}.safetensors", wide, {})
    second, first = (
        IPAdapter(tmp_path / f"{name}.safetensors", **given) for name in ("a_plusv2_x", "a_plus")
    )
    forced = IPAdapter(first.file, **given, shortcut=True)
    assert second.shortcut == 1 and torch.equal(second.tokens, forced.tokens)
    assert not torch.equal(second.tokens, first.tokens)
    close(IPAdapter(first.file, **given, shortcut=2.0).tokens - forced.tokens, first.tokens)
    assert (answer(unet, second) - answer(unet, first)).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_own_unet_gives_the_same_numbers_and_the_same_chain(unet, tmp_path):
    """Forward to 1e-5 and chains of 20 DDIM steps to 1e-4, plain and optimized."""
    pytest.importorskip("diffusers")
    from types import SimpleNamespace

    from diffusers import UNet2DConditionModel
    from diffusers.image_processor import IPAdapterMaskProcessor
    from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin

    from ldm.checkpoints.key_mapping import unet_to_diffusers

    kinds = {
        "base": tensors_for(unet), "other": {n: 0.7 * x.flip(0) for n, x in tensors_for(unet).items()},
        "plus": tensors_for(unet, "plus", dim=32, inner=64, depth=4), "full": tensors_for(unet, "full"),
        "faceid": face_tensors(unet),
        "faceid-plus": face_tensors(unet, "faceid-plus", dim=24, inner=64, depth=4),
    }  # fmt: skip
    files = {}
    for name, tensors in kinds.items():
        save_safetensors(tmp_path / f"{name}.safetensors", tensors, {})
        files[name] = IPAdapterFile(tmp_path / f"{name}.safetensors")

    def nested(name):
        both = {"image_proj": {}, "ip_adapter": {}}
        for key, x in kinds[name].items():
            both[key.split(".")[0]][key.partition(".")[2]] = x.clone()
        return both

    def theirs(*names):
        network = UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        ).eval()  # fmt: skip
        state = unet.state_dict()
        keys = unet_to_diffusers(state)
        network.load_state_dict({keys[key]: value for key, value in state.items()})
        network._load_ip_adapter_weights([nested(name) for name in names], low_cpu_mem_usage=False)
        for i, lora in network._load_ip_adapter_loras([nested(name) for name in names]).items():
            loaded, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(lora)
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(
                loaded, alphas, network, adapter_name=f"faceid_{i}"
            )
        return network

    left = torch.zeros(64, 48)
    left[:, :20] = 1
    masks = [left, 1 - left]
    ready = IPAdapterMaskProcessor().preprocess(masks, height=64, width=48)
    blocks = {"down": {"block_1": [0.4]}, "up": {"block_0": [0.0, 1.0], "block_1": 0.3}}
    zeros = torch.zeros_like
    plus = {"embeds": STATES[:1], "negative_embeds": STATES[1:]}
    pair = torch.stack  # of what stands for none, and what is wanted: (2, pictures, ...)
    rows = {
        "one": ([IPAdapter(files["base"], embeds=EMBEDS[:1], scale=0.6)], [0.6], [EMBEDS[:1]], None),
        "two pictures": ([IPAdapter(files["base"], embeds=EMBEDS)], [1.0], [EMBEDS], None),
        "full-face": (
            [IPAdapter(files["full"], embeds=STATES, negative_embeds=STATES[:1] * 0)], [1.0], [STATES], None,
        ),
        "blocks": ([IPAdapter(files["base"], embeds=EMBEDS[:1], scale=blocks)], [blocks], [EMBEDS[:1]], None),
        "two adapters": (
            [IPAdapter(files["base"], embeds=EMBEDS[:1], scale=0.8), IPAdapter(files["plus"], scale=0.5, **plus)],
            [0.8, 0.5], [EMBEDS[:1], pair([STATES[1:], STATES[:1]])], None,
        ),
        "masks of adapters": (
            [IPAdapter(files[n], embeds=EMBEDS[i : i + 1], mask=masks[i]) for i, n in enumerate(("base", "other"))],
            [1.0, 1.0], [EMBEDS[:1], EMBEDS[1:]], [ready[:1][:, :1], ready[1:][:, :1]],
        ),
        "masks of pictures": (
            [IPAdapter(files["base"], embeds=EMBEDS, mask=masks, scale=0.9)], [0.9], [EMBEDS], [ready.transpose(0, 1)],
        ),
        "faceid": ([IPAdapter(files["faceid"], id_embeds=IDS[:1], scale=0.7)], [0.7], [IDS[:1]], None),
        "faceid-plus": (
            [IPAdapter(files["faceid-plus"], id_embeds=IDS[:1], shortcut=True, **plus)], [1.0], [IDS[:1]], None,
        ),
    }  # fmt: skip
    networks = {}
    for name, (mine, scales, embeds, regions) in rows.items():
        used = tuple(one.file.name for one in mine)
        network = networks.setdefault(used, None) or theirs(*used)
        networks[used] = network
        IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=network), scales)
        images = [x if len(x) == 2 and x.dim() == 4 else pair([zeros(x), x]) for x in embeds]
        if name == "faceid-plus":
            face = network.encoder_hid_proj.image_projection_layers[0]
            face.shortcut, face.clip_embeds = True, pair([STATES[1:], STATES[:1]])
        more = {"added_cond_kwargs": {"image_embeds": images}}
        if regions is not None:
            more["cross_attention_kwargs"] = {"ip_adapter_masks": regions}

        def predict(x, t, network=network, more=more):
            return network(x, t, C, return_dict=False, **more)[0]

        def ours(x, t, mine=mine):
            return answer(unet, *mine, x=x, t=t, step=StepInfo(0, 1, unconditional=1))

        want = predict(X, T)
        close(ours(X, T), want)
        is_chain = name in ("two adapters", "masks of pictures", "faceid")
        far = chain(predict) if is_chain else None
        if is_chain:
            close(chain(ours), far, 1e-4)
        optimize(unet)
        try:
            close(ours(X, T), want)
            if is_chain:
                close(chain(ours), far, 1e-4)
        finally:
            restore(unet)


def chain(predict):
    """Twenty steps of DDIM."""
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    x = X
    for t in range(951, 0, -50):
        eps = predict(x, torch.tensor([t, t]))
        now, after = alpha_bar[t], alpha_bar[max(t - 50, 0)]
        x = after.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
    return x


def test_a_controlnet_sees_the_text_alone(unet, file, monkeypatch, tmp_path):
    from ldm.modules.diffusionmodules.controlnet import ControlNetModel

    with torch.device("meta"):
        network = ControlNetModel(
            4, 32, 3, 1, [1, 2], channel_mult=(1, 2), num_heads=2, context_dim=24
        )  # the UNet's way down
    tensors = keyed({key: x.shape for key, x in network.state_dict().items()}, "control_model.")
    save_safetensors(tmp_path / "control.safetensors", tensors, {})
    control = ControlNet(tmp_path / "control.safetensors", torch.full((3, 64, 48), 0.5))
    seen = []
    take = ControlNetModel.forward
    monkeypatch.setattr(
        ControlNetModel,
        "forward",
        lambda self, x, hint, t, context, **more: (
            seen.append(context) or take(self, x, hint, t, context, **more)
        ),
    )
    one = IPAdapter(file, embeds=EMBEDS)
    for order in ((one, control), (control, one)):
        both = answer(unet, *order)
        assert torch.equal(seen.pop(), C)
        assert (both - answer(unet, one)).abs().max() > 1e-3
        seen.clear()


def test_a_style_is_a_part_of_the_text_and_slices_are_the_same(unet, file):
    """In any order of adapters; an IP-Adapter's own tokens are the last ones."""

    class Style:
        rank = Rank.TOKENS
        at = check = staticmethod(lambda given: None)

        def attach(self, network):
            return wrap(
                network, lambda proceed, x, t, context: proceed(x, t, torch.cat([context, STYLE], dim=1))
            )

    one = IPAdapter(file, embeds=EMBEDS)
    for order in ((one, AttentionSlicing(1)), (AttentionSlicing(1), one)):
        close(answer(unet, *order), answer(unet, one))
    want = answer(unet, one, c=torch.cat([C, STYLE], dim=1))
    for order in ((one, Style()), (Style(), one)):
        close(answer(unet, *order), want)


def test_with_fused_modules_the_numbers_are_the_same(unet, file):
    one = IPAdapter(file, embeds=EMBEDS)
    want = answer(unet, one)
    try:
        optimize(unet)
        with torch.inference_mode():
            close(answer(unet, one), want, 2e-5)
    finally:
        restore(unet)


def test_a_graph_of_the_unet_serves_all_steps(unet, file):
    made = []

    def capture(run, inputs):
        made.append(len(inputs))
        return run

    adapter = IPAdapter(file, embeds=EMBEDS)
    times = [torch.tensor([t, t + 3]) for t in (900, 700, 500, 300)]
    want = [answer(unet, adapter, t=t) for t in times]
    cuda_graphs.attach(unet, capture)
    try:
        for t, wanted in zip(times, want, strict=True):
            close(answer(unet, adapter, t=t), wanted)
    finally:
        restore(unet)
    assert made == [3]  # tensors


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "full", "plus"])
def test_each_kind_and_container_is_read(unet, kind, tmp_path):
    tensors = tensors_for(unet, kind, tokens=3, dim=128)
    nested = {"image_proj": {}, "ip_adapter": {}}
    for name, values in tensors.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = values
    torch.save(nested, tmp_path / "a.bin")
    save_safetensors(tmp_path / "a.safetensors", tensors, {})
    given = {"embeds": EMBEDS} if kind == "base" else {"embeds": STATES, "negative_embeds": STATES[:1] * 0}
    one, other = (IPAdapter(tmp_path / f"a.{suffix}", **given) for suffix in ("bin", "safetensors"))
    assert torch.equal(answer(unet, one), answer(unet, other))
    assert one.tokens.shape == (1, {"base": 6, "full": 20, "plus": 6}[kind], 24)
    assert (
        one.describe()["image"] == other.describe()["image"]
        and one.describe()["hash"] != other.describe()["hash"]
    )


def test_what_is_no_ip_adapter_of_this_model_is_refused_by_name(unet, tmp_path):
    good = tensors_for(unet)
    xl = {name: torch.zeros(len(one), 2048) if "_ip." in name else one for name, one in good.items()}
    xl |= keyed({f"image_proj.{key}": s for key, s in projection_shapes("base", context=2048).items()}, "")
    few = {name: one for name, one in good.items() if ".1.to_k" not in name}
    flux = {name: torch.zeros(len(one), 4096) if "_ip." in name else one for name, one in good.items()}
    half = {**good, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 32)}
    face = {**half, "ip_adapter.0.to_q_lora.up.weight": torch.zeros(31, 2)}
    stray = {**half, "ip_adapter.77.to_q_lora.down.weight": torch.zeros(2, 3)}
    stray |= {name.replace("down", "up"): torch.zeros(32, 2) for name in stray if "_lora" in name}
    resampler = {**good, "image_proj.perceiver_resampler.latents": torch.zeros(2, 2)}
    cases = (
        ({"input_hint_block.0.weight": torch.zeros(2, 2)}, "this is a ControlNet"),
        ({"body.0.block1.weight": torch.zeros(2, 2)}, "this is a T2I-Adapter"),
        (xl, r"one for Stable Diffusion XL \(or Kolors\): its context is 2048 wide"),
        (flux, "one for Flux or Stable Diffusion 3: its context is 4096 wide"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(2, 2)}, "Flux"),
        ({"unet.a.lora.up.weight": torch.zeros(2, 2)}, "this is a LoRA"),
        (few, "one for another UNet: 1 of its tensors differ"),
        (half, "one whose LoRA has no two factors that fit at 0.to_q_lora"),
        (face, "one for another UNet: 1 of its tensors differ"),
        (stray, "one for another UNet: 1 of its tensors differ"),
        (resampler, "one whose image projection is not known"),
        ({**good, "image_proj.gate": torch.zeros(2)}, "one whose image projection is not known"),
        ({**good, "ip_adapter.1.to_q_ip.weight": torch.zeros(2, 2)}, "one with other layers"),
        ({**good, "extra.weight": torch.zeros(2)}, "one with other names"),
    )
    for i, (given, words) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_safetensors(path, given, {})
        with pytest.raises(MismatchError, match=words) as error:
            IPAdapter(path, embeds=EMBEDS).check(unet)
        assert "an IP-Adapter was wanted" in str(error.value) and len(str(error.value)) <= 400


def test_wrong_options_are_refused_in_one_line(unet, file, tmp_path):
    plus = tmp_path / "plus.safetensors"
    save_safetensors(plus, tensors_for(unet, "plus", dim=128), {})
    picture = Image.new("RGB", (9, 8))
    face, both = tmp_path / "face.safetensors", tmp_path / "both.safetensors"
    save_safetensors(face, tensors_for(unet, "faceid"), {})
    save_safetensors(both, tensors_for(unet, "faceid-plus", dim=64), {})
    face, both, plus = (IPAdapterFile(one) for one in (face, both, plus))
    encoded = {"image": picture, "image_encoder": tmp_path}
    clip = {"embeds": STATES, "negative_embeds": STATES[:1]}
    mask = torch.ones(8, 6)
    for given, options, words in (
        (file, {}, r"wants image= \(with image_encoder=\) or embeds=, got neither"),
        (file, encoded | {"embeds": EMBEDS}, "got both"),
        (file, {"image": picture}, "wants image_encoder=, CLIP's vision model"),
        (file, {"embeds": EMBEDS, "negative_image": picture}, "wants image_encoder=, CLIP's vision model"),
        (file, encoded, "there is no config.json in"),
        (file, encoded | {"encoder": tmp_path}, "image_encoder is given twice, also as encoder"),
        (
            file,
            encoded | {"image_encoder": tmp_path / "none.safetensors"},
            "there is no '.*none.safetensors'",
        ),
        (
            file,
            encoded | {"image_encoder": plus.path},
            "is no vision model of CLIP under transformers' names",
        ),
        (file, encoded | {"image_encoder": torch.nn.Linear(2, 3)}, "or the model itself, got a Linear"),
        (file, encoded | {"image_encoder": 5}, "or the model itself, got 5"),
        (
            file,
            encoded | {"image": 5},
            "image should be a picture, the path of one, or a list of these, got 5",
        ),
        (
            file,
            encoded | {"negative_image": picture, "negative_embeds": EMBEDS},
            "negative_embeds=, got both",
        ),
        (file, {"image": [], "encoder": tmp_path}, "image should be 1 to 16 pictures, got 0"),
        (file, {"embeds": keyed_input("e", (1, 768))}, r"of shape \(n, 20\), got \(1, 768\)"),
        (file, {"embeds": STATES}, r"of shape \(n, 20\), got \(2, 10, 20\)"),
        (file, {"embeds": "face.pt"}, r"embeds should be a tensor \(n, 20\), got 'face.pt'"),
        (file, {"embeds": EMBEDS / 0}, "embeds should be finite"),
        (
            file,
            {"embeds": EMBEDS[:1], "negative_embeds": EMBEDS},
            r"should be 1 or 1 of shape \(20,\), got 2 of",
        ),
        (plus, clip | {"negative_embeds": STATES[:1, :9]}, r"1 or 2 of shape \(10, 20\), got 1 of \(9, 20\)"),
        (plus, {"embeds": STATES}, "wants negative_embeds= beside it"),
        (file, {"embeds": EMBEDS, "scale": float("inf")}, "scale should be a number"),
        (file, {"embeds": EMBEDS, "start": 0.5, "end": 0.5}, "start should be below end"),
        (file, {"embeds": EMBEDS, "scale": float("nan")}, "scale should be a number"),
        (file, {"embeds": EMBEDS, "scale": "strong"}, "scale should be a number"),
        (file, {"embeds": EMBEDS, "scale": []}, "a list of scales should hold 1 to 1000"),
        (file, {"embeds": EMBEDS, "scale": {"left": 1}}, "blocks should be down, mid and up.*got 'left'"),
        (file, {"embeds": EMBEDS, "scale": {"up": {"block_x": 1}}}, "got 'block_x'"),
        (
            file,
            {"embeds": EMBEDS, "scale": {"up": {"block_1": float("nan")}}},
            "scale of up block_1 should be a",
        ),
        (file, {"embeds": EMBEDS, "scale": {"mid": {"block_0": 1}}}, "scale of mid should be a number"),
        (file, {"embeds": EMBEDS, "combine": "sum"}, "combine should be one of concat, average, got 'sum'"),
        (file, {"embeds": EMBEDS, "lora_scale": float("nan")}, "lora_scale should be a number"),
        (file, {"embeds": EMBEDS, "shortcut": True}, "shortcut= is for FaceID-plus"),
        (file, {"embeds": EMBEDS, "id_embeds": IDS}, "id_embeds= is for FaceID"),
        (file, {"embeds": EMBEDS, "mask": [mask] * 3}, "a list of one for each of 2 pictures, got 3"),
        (file, {"embeds": EMBEDS, "combine": "average", "mask": [mask] * 2}, "for each of 1 pictures, got 2"),
        (file, {"embeds": EMBEDS, "mask": 5}, "mask should be a picture, the path of one"),
        (
            file,
            {"embeds": EMBEDS, "mask": torch.ones(3, 8, 6)},
            "a mask's tensor should be floating point or bool",
        ),
        (
            file,
            {"embeds": EMBEDS, "mask": mask * 255},
            "a mask's values should be from 0 to 1, got 255 to 255",
        ),
        (
            file,
            {"embeds": EMBEDS, "mask": mask / 0 - 1e999},
            "a mask's values should be from 0 to 1, got nan",
        ),
        (face, {}, r"is one of FaceID, which wants id_embeds=, embeddings \(n, 6\)"),
        (face, {"embeds": EMBEDS}, "is one of FaceID, which wants id_embeds="),
        (face, {"id_embeds": IDS, "embeds": EMBEDS}, "reads id_embeds= alone; leave embeds= out"),
        (face, {"id_embeds": torch.zeros(2, 512)}, r"should be of shape \(n, 6\), got \(2, 512\)"),
        (face, {"id_embeds": IDS.int().numpy()}, "should be a tensor or array"),
        (face, {"id_embeds": IDS / 0}, "id_embeds should be finite"),
        (both, clip, "which wants id_embeds="),
        (both, {"id_embeds": IDS}, r"wants image= \(with image_encoder=\) or embeds=, got neither"),
        (both, clip | {"id_embeds": IDS[:1]}, "wants as many pictures as faces, got 2 and 1"),
    ):
        with pytest.raises(LdmError, match=words) as error:
            IPAdapter(given, **options)
        assert len(str(error.value)) <= 400 and "\n" not in str(error.value) and error.value.exit_code > 1
    for scale, words in (
        ({"up": {"block_7": 1}}, "scale names up block_7, which has no attention in this UNet"),
        (
            {"up": {"block_1": [1, 2, 3]}},
            "scale should have 2 numbers for up block_1, one for each attention, got 3",
        ),
        ([1, {"mid": [1, 2]}], "scale should have 1 numbers for mid block_0"),
    ):
        with pytest.raises(UsageError, match=words):
            IPAdapter(file, embeds=EMBEDS, scale=scale).check(unet)
    with pytest.raises(UsageError, match="scale should be a number"):
        answer(unet, IPAdapter(file, embeds=EMBEDS, scale=lambda way: float("nan")))
    with pytest.raises(
        MismatchError, match="aspect of what is painted, latents of 6 x 8, got a mask of 8 x 8"
    ):
        answer(unet, IPAdapter(file, embeds=EMBEDS, mask=torch.ones(8, 8)))
    unet.set_attn_processor(IPAttnProcessor(32, 24))
    try:
        with pytest.raises(UsageError, match="has some already"):
            IPAdapter(file, embeds=EMBEDS).check(unet)
    finally:
        unet.set_attn_processor(AttnProcessor())
    with pytest.raises(UsageError, match="an IP-Adapter needs a UNetModel"):
        IPAdapter(file, embeds=EMBEDS).check(torch.nn.Linear(2, 3))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny vision model of CLIP, 20 wide, in transformers' folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=36, projection_dim=20, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = fill(CLIPVisionModelWithProjection(config), "clip.")
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_pictures_are_encoded_by_a_local_vision_model(unet, file, encoder, tmp_path):
    folder, model = encoder
    pictures = [Image.new("RGB", (40, 24), "red"), Image.radial_gradient("L")]
    pictures[1].save(tmp_path / "two.png")
    pixels = torch.cat([clip_pixels(one, 16) for one in pictures])
    one = IPAdapter(
        file, [pictures[0], tmp_path / "two.png"], image_encoder=folder, negative_image=pictures[0]
    )
    want = model(pixels, output_hidden_states=True)
    close(one.embeds, want.image_embeds)
    close(one.tokens, IPAdapter(file, embeds=want.image_embeds).tokens)
    close(one.negative_embeds, want.image_embeds[:1])
    close(IPAdapter(file, pictures, encoder=model).embeds, want.image_embeds)
    states, none = encode_images(folder, pictures, "states")
    close(states, want.hidden_states[-2])
    close(none, model(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states[-2])
    wide = tmp_path / "wide.safetensors"
    save_safetensors(wide, tensors_for(unet, width=21), {})
    with pytest.raises(
        MismatchError, match=r"the encoder's features for .* should be of shape \(n, 21\), got \(2, 20\)"
    ):
        IPAdapter(wide, pictures, image_encoder=folder)
    with pytest.raises(AbsentError, match="there is no '.*absent'"):
        IPAdapter(file, pictures, image_encoder=folder / "absent")


@torch.no_grad()
def test_an_encoder_is_one_file_as_well(encoder, tmp_path, capfd):
    """With its configuration beside it, or of a published width; of a whole CLIP the half that sees."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder, model = encoder
    picture = Image.radial_gradient("L")
    want, _ = encode_images(model, [picture], "embeds")
    close(encode_images(folder / "model.safetensors", [picture], "embeds")[0], want)
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(MismatchError, match="is no published vision model of CLIP"):
        save_safetensors(tmp_path / "alone.safetensors", tensors, {})
        load_encoder(tmp_path / "alone.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    few = {name: x for name, x in tensors.items() if "layers.2.mlp.fc1.bias" not in name}
    save_safetensors(tmp_path / "few.safetensors", few, {})
    with pytest.raises(MismatchError, match=r"no tensors for 1 of CLIP's vision model \(.*fc1.bias'\)"):
        load_encoder(tmp_path / "few.safetensors")
    whole = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(2, 3),
        "logit_scale": torch.tensor(1.0),
    }
    whole |= {name: x.half() for name, x in tensors.items()}
    whole["vision_model.embeddings.position_ids"] = torch.zeros(1, 5).long()
    torch.save(whole, tmp_path / "whole.bin")
    got, _ = encode_images(tmp_path / "whole.bin", [picture], "embeds")
    close(got, want, 1e-2)
    (tmp_path / "config.json").unlink()
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=40, projection_dim=20, num_hidden_layers=1, num_attention_heads=12,
        image_size=24, patch_size=8, hidden_act="quick_gelu",
    )  # fmt: skip
    wide = fill(CLIPVisionModelWithProjection(config).eval(), "wide.")
    save_safetensors(tmp_path / "wide.safetensors", wide.state_dict(), {})
    for reads in ("embeds", "states"):
        pair = zip(
            *(encode_images(one, [picture], reads) for one in (tmp_path / "wide.safetensors", wide)),
            strict=True,
        )
        for got, want in pair:
            close(got, want)
    assert capfd.readouterr().err == ""


def test_pictures_are_painted_with_one_and_say_so(painter, tmp_path):
    sd = painter
    unet = sd.model.model.diffusion_model
    path = tmp_path / "look.safetensors"
    save_safetensors(path, tensors_for(unet, context=128), {})
    options = {"seed": 3, "steps": 2, "output_type": "latent", "height": 64, "width": 64}
    before = identity(sd.model)
    plain = sd.txt2img("a circle", **options).latents
    one = IPAdapter(path, embeds=EMBEDS[:1], scale=0.5, end=0.5)
    got = sd.txt2img("a circle", adapters=[one], **options)
    assert not torch.allclose(got.latents, plain, atol=1e-3)
    said = got.parameters[0].adapters[0]
    assert (said["kind"], said["name"], said["scale"], said["end"]) == ("IPAdapter", "look", 0.5, 0.5)
    assert torch.equal(sd.txt2img("a circle", **options).latents, plain) and identity(sd.model) == before
