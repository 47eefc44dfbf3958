"""Ways to edit an inverted picture (ldm.editing): what each keeps and changes, masks in pixels, and refusals."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image
from tiny import tiny_model

from ldm import editing
from ldm.adapters import PAG, LocalBlend, PromptToPrompt
from ldm.adapters.attention_control import AttentionControl
from ldm.edit import Edited, context_of, scene_of
from ldm.errors import UsageError
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers import sample_steps
from ldm.pipeline import StableDiffusion

SOURCE, EDIT, OTHER = "a red circle", "a blue circle", "a blue square"
HOW = {"steps": 3, "start_step": 0, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


@pytest.fixture(scope="module")
def picture():
    return (0.6 * keyed_input("editing.picture", (1, 3, 64, 72))).clamp(-1, 1)


@pytest.fixture(scope="module")
def scene(sd, picture):
    inversion = sd.invert(picture, SOURCE, steps=3, guidance_scale=1.0, measure=False)
    return scene_of(sd, inversion, SOURCE, [EDIT, OTHER], 0, 3.0)


def near(got, want, slack=2e-5):
    return (got - want).abs().max() <= slack * want.abs().max()


@pytest.fixture(scope="module")
def swapped(scene):
    return editing.swap(scene)


@pytest.mark.parametrize(
    "name",
    [
        "prompt_to_prompt",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("mutual_self_attention", "plug_and_play")),
    ],
)
def test_what_is_controlled_differs_from_a_swap_and_edits_do_not_depend_on_each_other(scene, swapped, name):
    editor = editing.resolve_editor(name)
    got = editor(scene)
    assert got.shape == swapped.shape == (2, *scene.inversion.x0.shape[1:])
    assert not near(got, swapped, 1e-3)
    one = editor(replace(scene, edits=[OTHER]))
    assert near(one[0], got[1], 1e-4)


def test_a_swap_is_the_inversion_sampled_under_the_edits(scene, swapped):
    want = scene.inversion.sample(scene.context([OTHER]))
    assert near(swapped[1:], want) and not near(swapped[0], swapped[1], 1e-3)


class Watching(AttentionControl):
    """A control that changes nothing, and keeps what the network is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _called(self, proceed, x, *args, **kwargs):
        self.asked.append(x)
        return super()._called(proceed, x, *args, **kwargs)


def test_the_source_goes_the_way_that_the_inversion_came(scene, swapped):
    """Its rows, with and without the condition, are the inversion's latents, whatever guidance would make of them."""
    watching = Watching()
    got = editing.resolve_editor(watching)(scene)
    assert near(got, swapped, 1e-4)  # which it does not change
    latents = scene.inversion.latents
    assert len(watching.asked) == 3
    for step, x in enumerate(watching.asked):
        assert len(x) == 6 and torch.equal(x[0], latents[-1 - step][0]) and torch.equal(x[3], x[0]), step


def test_so_it_does_by_every_inversion_and_what_is_kept_of_it_lies_there(sd, picture):
    """Also where a state is more than the latents: at each level edits outside of their region are the source's."""
    for method in ("belm", "edit_friendly", "dpmpp_2m"):
        inversion = sd.invert(picture, SOURCE, method=method, steps=2, guidance_scale=1.0, measure=False)
        nowhere = torch.zeros(1, 1, *inversion.x0.shape[2:])
        scene, watching = scene_of(sd, inversion, SOURCE, [EDIT], 0, 3.0), Watching()
        got = editing.resolve_editor(watching)(replace(scene, region=nowhere))
        assert torch.equal(got, inversion.x0), method
        for x in watching.asked[-1]:
            assert torch.equal(x, inversion[0][0]), method


def test_a_local_blend_of_an_edit_stays_the_picture_where_its_words_are_not(scene):
    """Up to the last bit, whatever the guidance of the source's own row would have made of it."""
    blend = LocalBlend("circle", threshold=1.0, start=0.0)
    got = editing.resolve_editor(PromptToPrompt(local_blend=blend))(replace(scene, edits=[EDIT]))
    assert torch.equal(got, scene.inversion.x0)


def test_outside_a_region_nothing_is_changed_and_in_all_of_it_everything(scene, swapped):
    scene, shape = replace(scene, edits=[EDIT], start_step=1), scene.inversion.x0.shape
    nowhere, everywhere = (torch.full((1, 1, *shape[2:]), value) for value in (0.0, 1.0))
    for name in editing.EDITORS:
        small = {"dds": editing.DDS(1), "diffedit": editing.DiffEdit(draws=1)}
        editor = small.get(name) or editing.resolve_editor(name)
        got = editor(replace(scene, region=nowhere))
        assert torch.equal(got, scene.inversion.x0.expand_as(got)), name
    scene = replace(scene, start_step=0)
    assert near(editing.swap(replace(scene, region=everywhere)), swapped[:1], 1e-4)


def test_diffedit_finds_the_cells_where_two_prompts_disagree(scene):
    scene, diffedit = replace(scene, edits=[OTHER], start_step=1), editing.DiffEdit(draws=2)
    assert not diffedit.region(scene, SOURCE).any()  # of equal prompts none
    region = diffedit.region(scene, OTHER)
    assert 0 < region.mean() < 1 and region.shape[2:] == scene.inversion.x0.shape[2:]
    assert diffedit.region(scene, OTHER).equal(region)  # drawn the same each time
    assert not editing.DiffEdit(draws=2, seed=1).region(scene, OTHER).equal(region)
    wider = editing.DiffEdit(draws=2, threshold=0.2).region(scene, OTHER)
    assert (wider >= region).all() and wider.sum() > region.sum()
    got = diffedit(scene)
    kept = (region == 0).expand_as(got)
    assert torch.equal(got[kept], scene.inversion.x0[kept]) and not near(got, scene.inversion.x0, 1e-3)


def test_delta_denoising_moves_by_what_two_prompts_differ_in(scene):
    dds = editing.DDS(iterations=1, rate=0.1)
    same, got = (dds(replace(scene, edits=[one])) for one in (SOURCE, OTHER))
    assert torch.equal(same, scene.inversion.x0)  # of its own prompt the picture is not moved
    assert not near(got, same, 1e-3)
    # One move by hand, at the level and with the noise that the seed draws.
    drawing = torch.Generator().manual_seed(0)
    t = int(torch.randint(50, 950, (), generator=drawing))
    noise = torch.randn((1, *same.shape[1:]), generator=drawing)
    level = Level(t, scene.model.alphas_cumprod.double()[t], 1, 1)
    x = level.alpha_bar.sqrt() * scene.inversion.x0 + (1 - level.alpha_bar).sqrt() * noise
    network, x = scene.network(), x.float()
    eps = [network(x, level, scene.context([prompt])) for prompt in (OTHER, SOURCE)]
    want = scene.inversion.x0 - 0.1 * (eps[0] - eps[1])
    assert near(got, want)


@torch.no_grad()
def test_added_noise_is_img2img_over_the_same_levels(scene):
    got = editing.AddNoise(seed=4)(replace(scene, edits=[EDIT], start_step=1))
    level, x0 = scene.inversion.levels[1], scene.inversion.x0
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    *_, last = sample_steps(
        "ddim",
        scene.model,
        (level.alpha_bar.sqrt() * x0 + (1 - level.alpha_bar).sqrt() * noise).float(),
        scene.context([EDIT]).conditioning,
        steps=3,
        run_last=2,
        guidance_scale=3.0,
        unconditional_conditioning=scene.context([EDIT]).unconditional,
    )
    assert near(got, last.x_t, 1e-4)


def test_a_contact_sheet_says_how_well_the_picture_comes_back():
    source, again, *images = (
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 72, 3), np.uint8)) for i in range(4)
    )
    done = Edited(images, source, again, 20.0, 30.0, None)
    sheet = done.sheet()
    assert sheet.size[0] == 4 * 72 and sheet.size[1] > 2 * 64
    last = np.asarray(sheet)[-64:, -72:]
    want = np.abs(np.asarray(done.images[1], int) - np.asarray(done.source, int))
    assert np.array_equal(last, want)


def test_a_mask_in_pixels_keeps_every_pixel_outside_and_fades_over_its_feather(sd, picture):
    mask = torch.zeros(1, 1, 64, 72)
    mask[..., 24:] = 1
    held = io.BytesIO()  # as bytes, a picture as well as a mask
    Image.fromarray((255 * mask[0, 0]).byte().numpy()).save(held, "PNG")
    hard = sd.edit(picture, SOURCE, OTHER, mask=held.getvalue(), **HOW | {"steps": 1})
    source, got = (np.asarray(one, int) for one in (hard.source, hard.images[0]))
    assert np.array_equal(source[:, :24], got[:, :24]) and np.abs(source - got)[:, 24:].mean() > 3
    soft = editing.feathered(mask, 8)
    row = soft[0, 0, 30]
    assert row[6] < 0.01 and 0.3 < row[23] < 0.5 < row[24] < 0.7 and row[42] > 0.99
    assert torch.equal(editing.feathered(mask, 0), mask) and (row.diff() >= -1e-6).all()
    cells = editing.region_of(soft, 8)
    assert cells.shape == (1, 1, 8, 9) and torch.allclose(cells.mean(), soft.mean(), atol=1e-6)


def test_edits_are_made_one_by_one_under_the_negative_prompt(sd, picture, scene):
    """So that each is the same, bit for bit, whichever others are asked for."""
    seen = []

    def editor(scene):
        seen.append((scene.edits, scene.context(scene.edits).unconditional))
        return scene.inversion.x0

    sd.edit(picture, SOURCE, [EDIT, OTHER], editor=editor, negative_prompt="a star", **HOW | {"steps": 1})
    assert [edits for edits, _ in seen] == [[EDIT], [OTHER]]
    want = context_of(sd, EDIT, 3.0, "a star").unconditional
    assert all(torch.equal(one, want) for _, one in seen)
    assert not torch.equal(want, scene.context([EDIT]).unconditional)


def test_the_way_up_is_unguided_where_guidance_spoils_the_noise(sd, picture):
    how = HOW | {"steps": 1}
    for method, given, want, options in (
        ("ddim", None, 1.0, {}),
        ("ddim", 3.0, 3.0, {}),
        ("belm", None, 1.0, {}),
        ("edit_friendly", None, 3.0, {}),
        ("null_text", None, 3.0, {"iterations": 1}),
    ):
        done = sd.edit(picture, SOURCE, EDIT, method=method, inversion_scale=given, **how, **options)
        assert done.inversion.context.guidance_scale == want, method


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("swap", "swap"), ("Prompt to Prompt", "Controlled"), ("p2p", "Controlled"), ("masactrl", "Controlled"),
        ("plug-and-play", "Controlled"), ("pnp", "Controlled"), ("DiffEdit", "DiffEdit"), ("SDEdit", "AddNoise"),
        ("img2img", "AddNoise"), ("delta denoising score", "DDS"),
        (PromptToPrompt(), "Controlled"), (editing.DiffEdit(draws=2), "DiffEdit"),
    ],
)  # fmt: skip
def test_ways_by_name(given, kind):
    editor = editing.resolve_editor(given)
    assert kind in (getattr(editor, "__name__", ""), type(editor).__name__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"editor": "prompt2prompt"}, "editor must be one of swap, prompt_to_prompt, "),
        ({"editor": "swop"}, "(did you mean swap?)"),
        ({"editor": None}, "got None"),
        ({"editor": editing.DiffEdit}, "editor must be one of swap"),
        ({"editor": lambda scene: None}, "latents must be a floating-point tensor (1, 4, h, w), got None"),
        ({"adapters": None}, "adapters must be a list such as [LoRA('style.safetensors')], got None"),
        ({"image_prompt": [SOURCE, EDIT]}, "image_prompt must be one text, of the one picture, got 2"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text, of the one picture, got 2"),
        ({"inversion_scale": -1}, "inversion_scale must be a number from 0 to 100, got -1"),
        ({"guidance_scale": "3"}, "guidance_scale must be a number from 0 to 100, got '3'"),
        ({"method": "ddim", "seed": 3}, "the inversion ddim has no option seed"),
        ({"method": "ddim", "measure": False}, "the inversion ddim has no option measure; it has eta"),
        ({"num_steps": 3}, "no option num_steps (here it is steps)"),
        ({"edit_prompts": OTHER}, "no option edit_prompts (did you mean edit_prompt?)"),
        ({"editors": "p2p"}, "no option editors (did you mean editor?)"),
        ({"mask_image": "m.png"}, "no option mask_image (here it is mask)"),
        (
            {"adapters": [PAG(2.0)], "method": "null_text"},
            "null_text guides by itself, by its scale alone; leave PAG",
        ),
        ({"adapters": [PAG(2.0)], "method": "proximal"}, "proximal guides by itself"),
        (
            {"editor": PromptToPrompt("replace"), "edit_prompt": "a very red circle"},
            "without a pair: 'very'",
        ),
        (
            {"editor": PromptToPrompt(local_blend=LocalBlend("ball"))},
            "names 'ball', which is not in 'a red circle'",
        ),
        ({"start_step": 3}, "start_step must be a whole number from 0 to 2, got 3"),
        ({"mask": torch.zeros(1, 1, 64, 72)}, "the mask marks nothing"),
        ({"mask": torch.ones(1, 1, 8, 8)}, "mask must have the picture's size (72, 64)"),
        ({"mask": torch.ones(1, 1, 64, 72), "feather": -1}, "feather must be"),
        ({"feather": 4.0}, "feather is of a mask"),
        ({"edit_prompt": ""}, None),
    ],
)
def test_what_is_refused_before_the_network_is_asked(sd, picture, options, message, monkeypatch):
    given = {"image_prompt": SOURCE, "edit_prompt": OTHER, **HOW, **options}
    if message is None:
        sd.edit(picture, **given | {"steps": 1})  # an empty prompt is one
        return
    if not callable(options.get("editor")):
        monkeypatch.setattr(type(sd.model), "apply_model", None)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        sd.edit(picture, **given)
    assert len(str(caught.value)) <= 400 and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (editing.DiffEdit, {"strength": 0}), (editing.DiffEdit, {"strength": 2}), (editing.DiffEdit, {"draws": 0}),
        (editing.DiffEdit, {"threshold": -0.1}), (editing.DDS, {"iterations": 0}), (editing.DDS, {"rate": "fast"}),
        (editing.DDS, {"seed": -1}), (editing.AddNoise, {"seed": 1.5}),
    ],
)  # fmt: skip
def test_what_ways_do_not_take(kind, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        kind(**options)


def test_pictures_of_every_kind_are_read(sd, tmp_path):
    """With alpha, and turned by EXIF: as for every other door."""
    path = tmp_path / "turned.png"
    image = Image.new("RGBA", (72, 64), (200, 30, 30, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    done = sd.edit(path, SOURCE, EDIT, **HOW | {"steps": 1})
    assert done.images[0].size == (64, 72) and done.source.mode == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["belm", "edit_friendly"])
def test_every_kind_of_inversion_is_edited(sd, picture, method):
    """One whose states are two samples in a finer dtype, and one with noise of its own in each step."""
    for editor in ("swap", "diffedit"):
        done = sd.edit(picture, SOURCE, EDIT, method=method, editor=editor, **HOW | {"steps": 2})
        assert np.asarray(done.images[0]).std() > 1, editor
    mask = torch.zeros(1, 1, 64, 72)
    mask[..., 24:] = 1
    done = sd.edit(picture, SOURCE, EDIT, method=method, mask=mask, editor="p2p", **HOW | {"steps": 2})
    assert np.array_equal(np.asarray(done.images[0])[:, :24], np.asarray(done.source)[:, :24])
