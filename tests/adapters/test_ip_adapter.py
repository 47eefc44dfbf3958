"""IP-Adapters: the originals' projections, attentions in their order, files of every kind, and nothing that stays."""

import pytest
import torch
from keyed import fill, keyed_input, weight
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import UNET

from ldm.adapters import ControlNet, DeepCache, IPAdapter
from ldm.adapters.ip_adapter import IPAdapterFile, clip_pixels, encode_images, projection_of
from ldm.checkpoints import save_safetensors
from ldm.errors import AbsentError, LdmError, MismatchError, UsageError
from ldm.kernels import cuda_graphs, optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import AttnProcessor, IPAttnProcessor, named_attentions
from ldm.modules.seams import StepInfo, attached

X, T, C = keyed_input("c.x", (2, 4, 8, 6)), torch.tensor([5, 700]), keyed_input("c.c", (2, 7, 24))
EMBEDS, STATES = keyed_input("ip.embeds", (2, 20)), keyed_input("ip.hidden", (2, 10, 20))


def close(got, want, rel=1e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


def keyed(shapes, prefix):
    return {key: weight(prefix + key, tuple(shape)) for key, shape in shapes.items()}


def projection_shapes(kind, width=20, context=24, tokens=4, dim=24):
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
    shapes = {
        "latents": (1, tokens, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,),
        "proj_out.weight": (context, dim), "proj_out.bias": (context,), "norm_out.weight": (context,),
        "norm_out.bias": (context,),
    }  # fmt: skip
    for i in range(2):
        for norm in ("norm1", "norm2"):
            shapes |= {f"layers.{i}.0.{norm}.{one}": (dim,) for one in ("weight", "bias")}
        shapes |= {f"layers.{i}.0.to_q.weight": (dim, dim), f"layers.{i}.0.to_kv.weight": (2 * dim, dim)}
        shapes |= {f"layers.{i}.0.to_out.weight": (dim, dim), f"layers.{i}.1.0.weight": (dim,)}
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
    with pytest.raises(UsageError, match="has some already; take the others off"):
        answer(unet, one, strong)
    assert torch.equal(answer(unet), plain) and identity(unet) == before


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
    face = {**good, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}
    plus_face = {**good, "image_proj.perceiver_resampler.latents": torch.zeros(2, 2)}
    id_mlp = {name: one for name, one in good.items() if "image_proj.proj" not in name}
    id_mlp |= {
        "image_proj.proj.0.weight": torch.zeros(8, 512),
        "image_proj.proj.2.weight": torch.zeros(96, 8),
    }
    cases = (
        ({"input_hint_block.0.weight": torch.zeros(2, 2)}, "this is a ControlNet"),
        ({"body.0.block1.weight": torch.zeros(2, 2)}, "this is a T2I-Adapter"),
        (xl, "one for a context of Stable Diffusion XL 2048 wide; the model's is 24 wide"),
        (few, "one for another UNet: 1 of its tensors differ"),
        (face, "one of FaceID"),
        (plus_face, "one of FaceID"),
        (id_mlp, "one of FaceID"),
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
    for given, options, words in (
        (file, {}, r"wants image= \(with encoder=\) or embeds=, got neither"),
        (file, {"image": picture, "encoder": tmp_path, "embeds": EMBEDS}, "got both"),
        (file, {"image": picture}, "with image= wants encoder=, the folder of CLIP's vision model"),
        (file, {"image": picture, "encoder": tmp_path}, "there is no config.json in"),
        (file, {"image": [], "encoder": tmp_path}, "image should be 1 to 16 pictures, got 0"),
        (file, {"embeds": keyed_input("e", (1, 768))}, r"of shape \(n, 20\), got \(1, 768\)"),
        (file, {"embeds": STATES}, r"of shape \(n, 20\), got \(2, 10, 20\)"),
        (file, {"embeds": "face.pt"}, r"embeds should be a tensor \(n, 20\), got 'face.pt'"),
        (file, {"embeds": EMBEDS / 0}, "embeds should be finite"),
        (file, {"embeds": EMBEDS, "negative_embeds": EMBEDS}, r"of shape \(1, 20\), got \(2, 20\)"),
        (plus, {"embeds": STATES}, "wants negative_embeds= beside it"),
        (file, {"embeds": EMBEDS, "scale": float("inf")}, "scale should be a number"),
        (file, {"embeds": EMBEDS, "start": 0.5, "end": 0.5}, "start should be below end"),
    ):
        with pytest.raises(LdmError, match=words) as error:
            IPAdapter(given, **options)
        assert len(str(error.value)) <= 400 and "\n" not in str(error.value) and error.value.exit_code > 1
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
    one = IPAdapter(file, [pictures[0], tmp_path / "two.png"], encoder=folder)
    want = model(pixels, output_hidden_states=True)
    close(one.embeds, want.image_embeds)
    close(one.tokens, IPAdapter(file, embeds=want.image_embeds).tokens)
    states, none = encode_images(folder, pictures, "states")
    close(states, want.hidden_states[-2])
    close(none, model(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states[-2])
    wide = tmp_path / "wide.safetensors"
    save_safetensors(wide, tensors_for(unet, width=21), {})
    with pytest.raises(
        MismatchError, match=r"the encoder's features for .* should be of shape \(n, 21\), got \(2, 20\)"
    ):
        IPAdapter(wide, pictures, encoder=folder)
    with pytest.raises(AbsentError, match="no config.json"):
        IPAdapter(file, pictures, encoder=folder / "absent")


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
