"""Pictures inverted, sampled back and edited: the tutorial's functions, the aligned ones, and what is refused."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_model

from ldm import edit as editing
from ldm.adapters import DeepCache, Embedding
from ldm.edit import Edited, context_of, encode_picture, load_image, network_of
from ldm.errors import FormatError, MismatchError, UsageError
from ldm.images import to_pil
from ldm.models.diffusion.inversion import METHODS, Inversion
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.modules.seams import Rank
from ldm.pipeline import StableDiffusion

PROMPT, OTHER, NEGATIVE = "a red circle", "a blue ring", "a green star"


def picture(width=72, height=64):
    pixels = (255 * (0.5 + 0.3 * keyed_input("edit", (height, width, 3))).clamp(0, 1)).byte().numpy()
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def z(sd):
    return encode_picture(sd, picture())[0]


def by_hand(sd, prompt, negative, scale):
    """What the tutorial writes out: guided noise, from the model alone."""
    model = sd.model
    with torch.no_grad():
        features = model.get_learned_conditioning([negative, prompt])

    def noise(x, t):
        with torch.no_grad():
            uncond, cond = model.apply_model(torch.cat([x, x]), torch.tensor([t, t]), features).chunk(2)
        return uncond + scale * (cond - uncond)

    return noise, model.alphas_cumprod


def inverted_by_hand(sd, start, n, scale=3.5, prompt=PROMPT, negative=""):
    noise, alphas = by_hand(sd, prompt, negative, scale)
    timesteps = [i * (1000 // n) + 1 for i in range(n)]
    x, kept = start, []
    for i in range(1, n):
        if i >= n - 1:
            continue
        t = timesteps[i]
        eps = noise(x, t)
        now, then = alphas[max(0, t - 1000 // n)], alphas[t]
        x = (x - (1 - now).sqrt() * eps) * (then.sqrt() / now.sqrt()) + (1 - then).sqrt() * eps
        kept.append(x)
    return torch.cat(kept)


def sampled_by_hand(sd, start, n, start_step, scale=3.5, prompt=PROMPT, negative=""):
    noise, alphas = by_hand(sd, prompt, negative, scale)
    timesteps = [i * (1000 // n) + 1 for i in range(n)][::-1]
    x = start
    for i in range(start_step, n):
        t = timesteps[i]
        eps = noise(x, t)
        now, then = alphas[t], alphas[max(1, t - 1000 // n)]
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
    with torch.no_grad():
        return to_pil(sd.model.decode_first_stage(x))[0]


def same(a, b, level=1):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= level


def test_the_tutorials_functions_do_what_it_writes_out(sd, z):
    """Count, order and values of the latents; the level that sampling begins at; the picture that is edited."""
    how = {"sd": sd, "method": "tutorial", "negative_prompt": NEGATIVE}
    n = 6  # does not divide 1000
    want = inverted_by_hand(sd, z, n, negative=NEGATIVE)
    got = editing.invert(z, PROMPT, num_inference_steps=n, **how | {"method": " Tutorial"})
    assert got.shape == (n - 2, *z.shape[1:]) == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    back = editing.sample(OTHER, 4, want[-1][None], num_inference_steps=n, **how)
    assert same(back[0], sampled_by_hand(sd, want[-1][None], n, 4, 3.5, OTHER, NEGATIVE))

    torch.manual_seed(3)
    got = editing.edit(picture(), PROMPT, OTHER, 5, 2, 2.0, sd=sd, method="tutorial")
    torch.manual_seed(3)
    start, _ = encode_picture(sd, picture(), draw=True)
    assert not torch.equal(start, z)
    inverted = inverted_by_hand(sd, start, 5)  # with guidance 3.5, whatever edit is told
    assert same(got, sampled_by_hand(sd, inverted[-3][None], 5, 2, 2.0, OTHER))


def test_the_tutorials_defaults_and_fifty_steps(sd, z):
    import inspect

    defaults = {
        name: [(p.name, p.default) for p in inspect.signature(getattr(editing, name)).parameters.values()]
        for name in ("sample", "invert", "edit")
    }
    none = inspect.Parameter.empty
    shared = [
        ("num_images_per_prompt", 1), ("do_classifier_free_guidance", True), ("negative_prompt", ""), ("device", None),
    ]  # fmt: skip
    assert defaults["sample"][:9] == [
        ("prompt", none), ("start_step", 0), ("start_latents", None), ("guidance_scale", 3.5),
        ("num_inference_steps", 30), *shared,
    ]  # fmt: skip
    assert defaults["invert"][:8] == [
        ("start_latents", none), ("prompt", none), ("guidance_scale", 3.5), ("num_inference_steps", 80), *shared,
    ]  # fmt: skip
    assert [default for _, default in defaults["edit"][:6]] == [none, none, none, 100, 30, 3.5]
    levels = editing._tutorial_levels(sd.model, 50)
    assert [levels[i].t for i in (0, 1, 49)] == [981, 961, 1] and len(levels) == 51
    assert levels[-1].alpha_bar == sd.model.alphas_cumprod[1].double() == levels[-2].alpha_bar


def test_the_aligned_form_begins_where_the_way_up_was(sd, z):
    """A walk down from inversion[-(s + 1)] is the inversion's own, from step s on."""
    inversion = editing.invert(z, PROMPT, 1.0, 4, sd=sd)
    assert isinstance(inversion, Inversion) and len(inversion) == 4 and inversion.error.shape == (1,)
    for start_step in (0, 2):
        how = {"start_step": start_step, "guidance_scale": 2.0, "num_inference_steps": 4, "sd": sd}
        whole = editing.sample(OTHER, start_latents=inversion, **how)
        for one in (inversion[-(start_step + 1)], inversion[-(start_step + 1)][None]):  # as tutorials index
            assert same(whole[0], editing.sample(OTHER, start_latents=one, **how)[0], 0)
    assert inversion.shape == inversion.latents.shape
    assert [level.t for level in inversion.levels] == [751, 501, 251, 1, 0]
    images = editing.sample([PROMPT, OTHER], 3, inversion, 2.0, sd=sd)
    assert len(images) == 2 and not same(*images)


def test_pictures_are_edited_with_a_word_on_how_well_they_come_back(sd, z):
    how = {"steps": 2, "guidance_scale": 2.0, "inversion_scale": 2.0, "negative_prompt": NEGATIVE}
    how["method"] = "ddim"
    edited = sd.edit(picture(), PROMPT, [OTHER, PROMPT], **how)
    assert isinstance(edited, Edited) and len(edited.images) == 2
    assert {image.size for image in (*edited.images, edited.source, edited.reconstruction)} == {(72, 64)}
    assert same(edited.source, picture(), 0)
    inversion = sd.invert(picture(), PROMPT, steps=2, guidance_scale=2.0, negative_prompt=NEGATIVE)
    torch.testing.assert_close(inversion.x0, z)
    torch.testing.assert_close(inversion.error, edited.inversion.error)
    with torch.no_grad():
        back, best = (
            to_pil(sd.model.decode_first_stage(x))[0] for x in (inversion.reconstruction, inversion.x0)
        )
    mse = np.square(np.asarray(back, float) - np.asarray(picture(), float)).mean()
    assert edited.psnr == pytest.approx(10 * np.log10(255**2 / mse), abs=0.05) and same(
        edited.reconstruction, back
    )
    assert edited.ceiling == pytest.approx(editing.psnr(best, picture()), abs=0.05)
    assert editing.psnr(best, best) == float("inf")
    assert same(sd.edit(picture(), PROMPT, OTHER, method="ddim", steps=1, guidance_scale=2.0).images[0],
                editing.edit(picture(), PROMPT, OTHER, 1, 0, 2.0, sd=sd), 0)  # fmt: skip


def test_a_model_is_inverted_by_any_method(sd, z):
    """The null-text one through the UNet's gradients; an exact one comes back at any guidance, two pictures under two
    prompts as well, and from any step."""
    both = torch.cat([z, z.flip(3)])
    for name in ("edict", "bdia", "BELM", "edit_friendly"):
        found = editing.invert(both, [PROMPT, OTHER], 7.5, 3, sd=sd, method=name)
        again = found.sample(start_step=2)
        assert found.error.max() < 1e-4 and (again - both).abs().max() < 1e-3, name
        assert found.calls == (12 if name == "edict" else 6), name
    options = {"iterations": 1, "learning_rate": 0.1}
    memory = sd.invert(picture(), PROMPT, method="null-text", steps=2, guidance_scale=7.5, **options).memory
    assert memory[0].shape == memory[1].shape == (1, 32, 128) and not torch.equal(*memory)
    assert all(p.grad is None for p in sd.model.parameters())


class Watch:
    """An attachment that writes down at which step it was asked."""

    rank = Rank.SHORTCUTS

    def __init__(self):
        self.seen = []

    def attach(self, unet):
        return lambda: None

    def at(self, step):
        self.seen.append((step.index, step.total, step.unconditional, step.images))


def test_what_is_attached_knows_the_step_on_the_way_up_and_down(sd, z):
    for method in ("ddim", "euler"):
        watch = Watch()
        editing.invert(z, PROMPT, 2.0, 3, sd=sd, adapters=[watch], method=method)
        assert watch.seen == [(i, 3, 1, 1) for i in (2, 1, 0, 0, 1, 2)], method


class Everywhere(Watch):
    """One that is for the autoencoder as well, and writes down what it was attached to."""

    is_for_vae = True

    def __init__(self):
        super().__init__()
        self.where = []

    def attach(self, module):
        self.where.append(type(module).__name__)
        return lambda: None


def test_adapters_of_the_pipeline_and_of_the_call_are_attached_to_every_part(sd, tmp_path):
    """To the picture's encoder, the text encoder, the UNet on each walk and the decoder; 3 in 10 steps are left out."""
    save_file({"emb_params": keyed_input("edit.word", (1, 128))}, tmp_path / "birb.safetensors")
    word, how = Embedding(tmp_path / "birb.safetensors", width=128), {"steps": 4, "guidance_scale": 1.0}
    image, found = picture(64, 72), []
    for of_pipeline in (True, False):
        watch = Everywhere()
        own = StableDiffusion(sd.model)
        own.adapters = [watch, word] if of_pipeline else []
        given = [] if of_pipeline else [watch, word]
        done = own.edit(image, PROMPT, "a birb ring", adapters=given, **how)
        # Both halves of the autoencoder are attached to where one of them works.
        assert [watch.where.count(one) for one in ("Encoder", "UNetModel", "Decoder")] == [2, 4 + 4 + 3, 2]
        assert [index for index, *_ in watch.seen] == [3, 2, 1, 0, 0, 1, 2, 3, 1, 2, 3]
        z, before = encode_picture(own, image, adapters=given)[0], len(watch.where)
        editing.sample("a birb ring", 3, z, 1.0, 4, sd=own, adapters=given)
        assert watch.where[before:] == ["UNetModel", "Encoder", "Decoder"]
        found.append(
            (np.asarray(done.images[0]), context_of(own, "a birb ring", adapters=given).conditioning)
        )
    for one, other in zip(*found, strict=True):
        assert (one == other).all()
    assert not torch.equal(found[0][1], context_of(sd, "a birb ring").conditioning)


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "arguments", "options", "words"),
    [
        ("invert", ("z", PROMPT), {"num_inference_steps": 0}, "num_inference_steps must be .* from 1 to 1000, got 0"),
        ("invert", ("z", PROMPT), {"num_inference_steps": 2, "method": "tutorial"}, "from 3 to 999, got 2"),
        ("invert", ("z", PROMPT), {"method": "Tutorial", "spacing": "trailing"}, "no options; leave spacing out"),
        ("sample", (PROMPT,), {"method": "tutorial", "eta": 0.0, "spacing": "t=1"}, "leave eta, spacing out"),
        ("invert", ("z", PROMPT), {"method": "ddim2"}, "did you mean ddim"),
        ("invert", ("z", PROMPT), {"method": "tutorail"}, r"'tutorail' \(did you mean tutorial\?\)"),
        ("sample", (PROMPT,), {"method": "tutoriel"}, r"'tutoriel' \(did you mean tutorial\?\)"),
        ("invert", ("z", PROMPT), {"step": 3}, "no option step; it has eta"),
        ("invert", ("z", PROMPT), {"steps": 3}, "invert takes the number of steps as num_inference_steps, got steps=3"),
        ("sample", (PROMPT,), {"steps": 3}, "sample takes the number of steps as num_inference_steps, got steps=3"),
        ("sample", (PROMPT,), {"start_steps": 3}, r"no option start_steps \(did you mean start_step\?\)"),
        ("invert", ("z", PROMPT, -1.0), {}, "guidance_scale must be a number from 0 to 100, got -1.0"),
        ("invert", ("z", PROMPT), {"negative_prompt": ["a", "b"]}, "negative_prompt must be one, or .* 1 prompts"),
        ("invert", ("z", PROMPT), {"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ("invert", ("z", PROMPT), {"num_images_per_prompt": 2}, r"tensor \(2, 4, h, w\), got \(1, 4, 8, 9\)"),
        ("invert", ("z", PROMPT), {"device": "cuda"}, "the model is on cpu, got device='cuda'; move it"),
        ("invert", ("z", PROMPT), {"device": "gpu"}, "device must be one such as 'cpu' or 'cuda', got 'gpu'"),
        ("invert", ("z", 5), {}, "prompt must be"),
        ("invert", (torch.zeros(1, 3, 8, 8), PROMPT), {}, r"\(1, 4, h, w\), got \(1, 3, 8, 8\)"),
        ("invert", (torch.zeros(4, 8, 8), PROMPT), {}, r"got \(4, 8, 8\)"),
        ("invert", (torch.zeros(1, 4, 8, 8, dtype=torch.long), PROMPT), {}, "floating-point"),
        ("invert", (torch.zeros(1, 4, 7, 8), PROMPT), {}, "height of the latents' picture must be .* 64 .* got 56"),
        ("sample", (PROMPT, 0, torch.zeros(1, 4, 8, 1)), {}, "width of the latents' picture must be .* 64 .* got 8"),
        ("sample", (PROMPT, 0, torch.zeros(2, 1, 4, 8, 8)), {}, r"\(1, 4, h, w\), got \(2, 1, 4, 8, 8\)"),
        ("invert", (torch.full((1, 4, 8, 8), float("nan")), PROMPT), {}, "latents must be finite"),
        ("invert", ("dog.png", PROMPT), {}, "got 'dog.png'; a picture becomes one by ldm.edit.encode_picture"),
        ("sample", (PROMPT,), {"generator": 5}, "generator must be a torch.Generator on the CPU, .* got 5 and"),
        ("sample", (PROMPT,), {"sd": "v1"}, r"sd must be a StableDiffusion \(of a .*: pipe.sd\), .* got 'v1'"),
        ("edit", ("p", PROMPT, [OTHER, PROMPT]), {}, "edit_prompt must be one text, of the one picture, got 2"),
        ("edit", ("p", PROMPT, OTHER), {"method": "tutorial", "mask": "m", "editor": "p2p"}, "leave editor, mask out"),
        ("edit", ("p", PROMPT, OTHER), {"method": "tutorial", "num_images_per_prompt": 2}, "num_images_per_prompt out"),
        ("edit", ("p", PROMPT, OTHER, 4, 1), {"method": "tutorial", "adapters": None}, "adapters must be a list"),
        ("sample", (PROMPT, 5), {"num_inference_steps": 5}, "start_step must be a whole number from 0 to 4, got 5"),
        ("sample", (PROMPT,), {"num_inference_steps": 1000, "method": "tutorial"}, "from 1 to 999, got 1000"),
        ("sample", (PROMPT, 0, torch.zeros(2, 4, 8, 8)), {}, r"\(1, 4, h, w\), got \(2, 4, 8, 8\)"),
        ("edit", ("p", PROMPT, OTHER, 10, 8), {"method": "tutorial"}, "start_step of 10 steps .* from 0 to 7, got 8"),
        ("edit", ("p", PROMPT, OTHER, 10, 10), {}, "start_step must be a whole number from 0 to 9, got 10"),
        ("edit", (None, PROMPT, OTHER, 10, 2), {}, "image must be a picture to invert, got None"),
        ("edit", (5, PROMPT, OTHER, 10, 2), {}, "image must be a PIL picture, a path or a tensor, got int"),
        ("edit", ("https://a.b/c.png", PROMPT, OTHER), {}, "nothing is downloaded here.*download it first"),
        ("edit", (picture(40, 64), PROMPT, OTHER), {}, "width of the picture must be .* from 64 to 2048, got 40"),
        ("edit", (picture(4000, 64), PROMPT, OTHER), {}, "width of the picture must be .* to 2048, got 4000"),
        ("edit", (picture(1, 1), PROMPT, OTHER), {}, "width of the picture must be .* from 64 to 2048, got 1$"),
        ("edit", (picture(72, 63), PROMPT, OTHER), {}, "height of the picture must be .* from 64 to 2048, got 63$"),
        ("edit", (picture(2061, 64), PROMPT, OTHER), {}, "width of the picture must be .* to 2048, got 2061$"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(sd, z, name, arguments, options, words):
    given = [{"z": z, "p": picture()}.get(one, one) if isinstance(one, str) else one for one in arguments]
    with pytest.raises(UsageError, match=words) as caught:
        getattr(editing, name)(*given, **{"sd": sd} | options)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_what_an_inversion_has_of_its_own_is_not_asked_for_twice(sd, z):
    inversion = editing.invert(z, PROMPT, 1.0, 2, sd=sd, method="belm", measure=False)
    how = {"start_latents": inversion, "sd": sd, "guidance_scale": 1.0}
    want = editing.sample(PROMPT, **how)[0]
    assert same(editing.sample(PROMPT, num_inference_steps=2, method="BELM", **how)[0], want, 0)
    for given, words in (
        ({"num_inference_steps": 5}, "the Inversion has 2 steps, got num_inference_steps=5; leave it out"),
        ({"method": "tutorial"}, "the Inversion is of belm, got 'tutorial'; leave it out"),
        ({"method": "edict"}, "the Inversion is of belm, got 'edict'"),
        ({"spacing": "trailing"}, "leave spacing and options out"),
        (
            {"generator": torch.Generator()},
            "generator must be a torch.Generator on the CPU, and draws the noise",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            editing.sample(PROMPT, **how, **given)
    with pytest.raises(UsageError, match="belm needs what its way up remembered: give start_latents the Inv"):
        editing.sample(PROMPT, 0, inversion[-1], method="belm", sd=sd)
    with pytest.raises(UsageError, match="edit takes the number of steps as num_steps, got steps=5"):
        editing.edit(picture(), PROMPT, OTHER, steps=5, sd=sd)


def test_what_a_picture_is_inverted_by_is_checked_before_any_work(sd):
    for given, words in (
        ({"num_inference_steps": 5}, r"no option num_inference_steps \(here it is steps\); it has eta"),
        ({"device": "cpu"}, "no option device"),
        ({"steps": 2.0}, "steps must be a whole number from 1 to 1000, got 2.0"),
        ({"prompt": [PROMPT, OTHER]}, "prompt must be one text, of the one picture, got 2"),
        ({"method": "null_text", "iterations": 0}, "iterations of null_text must be"),
        ({"method": "tutorial"}, "'tutorial' is a method of the functions in ldm.edit"),
    ):
        with pytest.raises(UsageError, match=words):
            sd.invert("no such picture", **{"prompt": PROMPT, **given})


def test_models_and_adapters_that_do_not_invert_are_refused(sd):
    with pytest.raises(MismatchError, match="got an inpainting model of 9 channels; take a plain one"):
        network_of(StableDiffusion(tiny_model(9)))
    with pytest.raises(UsageError, match="DeepCache keeps features from one step to the next"):
        network_of(sd, [DeepCache(2, 1)])
    assert context_of(sd, PROMPT).unconditional is None
    none, empty = (context_of(sd, PROMPT, 3.0, one).unconditional for one in (None, ""))
    assert torch.equal(none, empty)


def as_bytes(image, kind="PNG", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def test_pictures_are_read_upright_without_transparency_and_not_too_large(sd):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = as_bytes(picture(64, 80).transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert same(load_image(turned), picture(64, 80), 0)
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(load_image(as_bytes(clear))).min() == 255
    z, unit = encode_picture(sd, turned)
    assert z.shape == (1, 4, 10, 8) and unit.shape == (1, 3, 80, 64)
    _, unit = encode_picture(sd, picture(70, 69))
    assert unit.shape == (1, 3, 64, 64)  # down to whole cells
    for given in (None, picture()):
        with pytest.raises(UsageError, match="load_image reads a file, by its path or its bytes, got"):
            load_image(given)
    with pytest.raises(FormatError, match="too many pixels, 6001 x 6001"):
        load_image(as_bytes(Image.new("1", (6001, 6001))))


@pytest.mark.slow
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "inversion.md").read_text(encoding="utf-8")
    names, methods = {}, re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    listed = set(re.findall(r"`(\w+)`", " ".join(methods)))
    assert listed == {*METHODS, *(name for name, cls in SAMPLERS.items() if cls.inverts)}
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/inversion.md", "exec"), names)
    assert len(names["edited"].images) == 1 and names["edited"].psnr > 20
