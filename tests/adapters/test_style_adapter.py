"""T2I-Adapter's style adapter: the original's tokens, where they go, and nothing that stays."""

import json

import pytest
import torch
from keyed import fill, keyed_input, weight
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import UNET

from ldm.adapters import StyleAdapter, T2IAdapter
from ldm.adapters.ip_adapter_images import clip_pixels
from ldm.adapters.style_adapter import StyleAdapterFile, assemble
from ldm.checkpoints import save_safetensors
from ldm.errors import LdmError, MismatchError, UsageError
from ldm.kernels import optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.seams import StepInfo, attached, wrap

X, T, C = keyed_input("c.x", (2, 4, 8, 8)), torch.tensor([5, 700]), keyed_input("c.c", (2, 7, 24))
STATES = keyed_input("t2i.style", (2, 10, 32))


def close(got, want, rel=1e-5):
    torch.testing.assert_close(got, want, rtol=rel, atol=rel)


@pytest.fixture(scope="module")
def tensors(request):
    shapes = json.loads((request.path.parents[1] / "golden/t2i_adapter.json").read_text())["style"]
    return {key: weight(f"t2i.style.{key}", tuple(shape)) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_safetensors(path, tensors, {})
    return StyleAdapterFile(path)


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**UNET | {"out_channels": 4}), "unet.")


def answer(unet, *adapters, step=None, x=X, t=T, c=C):
    for one in adapters if step is not None else ():
        one.at(step)
    with torch.no_grad(), attached(unet, *adapters):
        return unet(x, t, context=c)


def test_the_tokens_are_the_recorded_ones(tensors, request):
    recorded = load_file(request.path.parents[1] / "golden/t2i_adapter.safetensors")["t2i.style"]
    with torch.no_grad():
        close(assemble(tensors, heads=4)(STATES), recorded)


def test_the_published_file_is_for_clips_large_model_and_stable_diffusion_v1(tensors):
    def published(name, shape):
        sides = {1: (1,), 3: (8,), 32: (1024,), 24: (768,), 96: (3072,), 128: (4096,)}
        return torch.empty([sides[side][0] for side in shape], device="meta")

    shapes = {name: published(name, one.shape) for name, one in tensors.items()}
    network = assemble(shapes)
    assert (network.width, network.context_dim, network.num_tokens) == (1024, 768, 8)


def test_tokens_stand_behind_the_text_and_nothing_stays(unet, file):
    plain, style = answer(unet), StyleAdapter(file, STATES[:1])
    with torch.no_grad():
        tokens = file.network(STATES[:1])
    assert tokens.shape == (1, 3, 24)
    want = answer(unet, c=torch.cat([C, tokens.expand(2, -1, -1)], 1))
    close(answer(unet, style), want)
    close(
        answer(unet, StyleAdapter(file, STATES[:1], 0.4)),
        answer(unet, c=torch.cat([C, 0.4 * tokens.expand(2, -1, -1)], 1)),
    )
    assert (want - plain).abs().max() > 1e-3
    # Rows without the condition: their own last tokens once more, of a shorter context its last one.
    got = answer(unet, style, step=StepInfo(0, 1, unconditional=1))
    close(got[1], want[1])
    close(got[:1], answer(unet, x=X[:1], t=T[:1], c=torch.cat([C[:1], C[:1, -3:]], 1)))
    short = style.join(C[:, :2])[0]
    assert torch.equal(short[2:], C[0, [0, 0, 1]])
    for other, step in (
        (StyleAdapter(file, STATES[:1], 0), None),
        (StyleAdapter(file, STATES[:1], start=0.5), StepInfo(1, 4)),
        (StyleAdapter(file, STATES[:1], end=0.5), StepInfo(2, 4)),
    ):
        assert torch.equal(answer(unet, other, step=step), plain)
    try:
        optimize(unet)
        with torch.inference_mode():
            close(answer(unet, StyleAdapter(file, STATES[:1])), want, 2e-5)
    finally:
        restore(unet)
    assert torch.equal(answer(unet), plain)


def test_what_wraps_a_unet_with_its_residuals_sees_the_text_alone(unet, file):
    """In either order of attachments: a ControlNet reads the context that the UNet is called with."""

    class Watcher:
        rank = T2IAdapter.rank

        def attach(self, network):
            def look(proceed, x, t, context, **kwargs):
                seen.append(context.shape[1])
                return proceed(x, t, context, **kwargs)

            return wrap(network, look)

    seen = []
    style = StyleAdapter(file, STATES[:1])
    for order in ((style, Watcher()), (Watcher(), style)):
        with torch.no_grad(), attached(unet, *order):
            unet(X, T, C)
    assert seen == [7, 7]


def test_pictures_say_so(painter, tensors, tmp_path):
    wide = {
        name: weight(f"wide.{name}", (32, 128)) if name == "proj" else one for name, one in tensors.items()
    }
    save_safetensors(tmp_path / "look.safetensors", wide, {})
    options = {"seed": 3, "steps": 2, "output_type": "latent", "height": 64, "width": 64}
    plain = painter.txt2img("a circle", **options).latents
    style = StyleAdapter(tmp_path / "look.safetensors", STATES[1:], 0.5, end=0.5)
    got = painter.txt2img("a circle", adapters=[style], **options)
    assert not torch.allclose(got.latents, plain, atol=1e-4)
    said = got.parameters[0].adapters[0]
    assert (said["kind"], said["name"], said["scale"], said["end"]) == ("StyleAdapter", "look", 0.5, 0.5)
    assert torch.equal(painter.txt2img("a circle", **options).latents, plain)


def test_a_picture_gives_its_states_by_clips_vision_model(file):
    """And another vision model is refused with both numbers."""
    config = {"intermediate_size": 48, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    config |= {"num_attention_heads": 2, "projection_dim": 20}
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = fill(CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=32, **config)).eval(), "clip.")
    picture = Image.fromarray((keyed_input("look", (41, 33, 3)).clamp(-1, 1) * 127 + 128).byte().numpy())
    with torch.no_grad():
        states = encoder(clip_pixels(picture, 28)).last_hidden_state
    style = StyleAdapter(file, image=picture, image_encoder=encoder)
    close(style.states, states)
    assert torch.equal(style.tokens, StyleAdapter(file, style.states).tokens)
    wide = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=16, **config)).eval()
    with pytest.raises(MismatchError, match=r"shape \(1, tokens, 32\), got \(1, 5, 16\)"):
        StyleAdapter(file, image=picture, image_encoder=wide)


def test_what_is_no_style_adapter_of_this_model_is_refused_by_name(unet, tensors, tmp_path):
    def without(name):
        return {key: one for key, one in tensors.items() if key != name}

    cases = (
        ({"input_hint_block.0.weight": torch.zeros(2, 2)}, "this is a ControlNet"),
        (
            {"body.0.block1.weight": torch.zeros(2, 2), "conv_in.bias": torch.zeros(2)},
            r"reads a hint; use it as T2IAdapter\(file, hint\)",
        ),
        (without("proj"), "no style_embedding of three dimensions with a proj"),
        ({**tensors, "style_embedding": torch.zeros(2, 3)}, "no style_embedding of three dimensions"),
        (without("ln_pre.bias"), "1 of its tensors differ, 'ln_pre.bias'"),
        ({**tensors, "ln_post.bias": torch.zeros(7)}, "1 of its tensors differ, 'ln_post.bias'"),
        (
            {
                "style_embedding": torch.zeros(1, 3, 12),
                "proj": torch.zeros(12, 24),
                "transformer_layes.0.ln_1.bias": torch.zeros(12),
            },
            "width of 12 is no multiple of 8 heads",
        ),
        (
            {**tensors, "proj": torch.zeros(32, 1024)},
            "for a context of Stable Diffusion v2 1024 wide; the model's is 24 wide",
        ),
    )
    for i, (given, words) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_safetensors(path, given, {})
        with pytest.raises(MismatchError, match=words) as error:
            StyleAdapter(path, STATES[:1]).check(unet)
        assert "a T2I-Adapter of style was wanted" in str(error.value) and len(str(error.value)) <= 400
    with pytest.raises(UsageError, match="needs a UNet with spatial transformers"):
        StyleAdapter(path, STATES[:1]).check(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"states": None}, r"wants image= .* or states=, a tensor \(1, tokens, 32\), .* got neither"),
        ({"states": "look.png"}, "got states='look.png'"),
        ({"image": "look.png"}, "wants states= or image=, got both"),
        ({"states": None, "image": "look.png"}, "with image= wants image_encoder=, CLIP's vision model"),
        ({"states": STATES}, r"should be of shape \(1, tokens, 32\), got \(2, 10, 32\)"),
        ({"states": STATES[:1, :, :31]}, r"got \(1, 10, 31\)"),
        ({"states": STATES[:1, :0]}, r"got \(1, 0, 32\)"),
        ({"states": STATES[:1] * float("nan")}, "states should be finite"),
        ({"scale": float("inf")}, "scale should be a number"),
        ({"start": 0.5, "end": 0.5}, "start should be below end"),
    ],
)
def test_wrong_options_are_refused_in_one_line(file, options, words):
    with pytest.raises(LdmError, match=words) as error:
        StyleAdapter(file, **{"states": STATES[:1], **options})
    assert len(str(error.value)) <= 400
