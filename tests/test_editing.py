"""Ways to edit an inverted picture (ldm.editing): what each keeps and changes, masks in pixels, and refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from keyed import keyed_input
from PIL import Image
from tiny import tiny_model

from ldm import editing
from ldm.adapters import LocalBlend, PromptToPrompt
from ldm.adapters.attention_control import AttentionControl
from ldm.edit import scene_of
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


def test_a_swap_is_the_inversion_sampled_under_the_edits(sd, scene):
    got = editing.swap(scene)
    context = scene.context([OTHER])
    assert near(got[1:], scene.inversion.sample(context)) and not near(got[0], got[1], 1e-3)


@pytest.mark.parametrize("name", ["prompt_to_prompt", "mutual_self_attention", "plug_and_play"])
def test_what_is_controlled_differs_from_a_swap_and_edits_do_not_depend_on_each_other(scene, name):
    editor = editing.resolve_editor(name)
    got = editor(scene)
    assert got.shape == (2, *scene.inversion.x0.shape[1:])
    assert not near(got, editing.swap(scene), 1e-3)
    one = editor(replace(scene, edits=[OTHER]))
    assert near(one[0], got[1], 1e-4)


class Watching(AttentionControl):
    """A control that changes nothing, and keeps what the network is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _called(self, proceed, x, *args, **kwargs):
        self.asked.append(x)
        return super()._called(proceed, x, *args, **kwargs)


def test_the_source_goes_the_way_that_the_inversion_came(scene):
    """Its rows, with and without the condition, are the inversion's latents, whatever guidance would make of them."""
    watching = Watching()
    got = editing.resolve_editor(watching)(scene)
    assert near(got, editing.swap(scene), 1e-4)  # which it does not change
    latents = scene.inversion.latents
    assert len(watching.asked) == 3
    for step, x in enumerate(watching.asked):
        assert len(x) == 6 and torch.equal(x[0], latents[-1 - step][0]) and torch.equal(x[3], x[0]), step


def test_outside_a_region_nothing_is_changed_and_in_all_of_it_everything(scene):
    shape = scene.inversion.x0.shape
    nowhere, everywhere = (torch.full((1, 1, *shape[2:]), value) for value in (0.0, 1.0))
    for name in editing.EDITORS:
        editor = editing.DDS(2) if name == "dds" else editing.resolve_editor(name)
        got = editor(replace(scene, region=nowhere))
        assert torch.equal(got, scene.inversion.x0.expand_as(got)), name
    assert near(editing.swap(replace(scene, region=everywhere)), editing.swap(scene), 1e-4)


def test_diffedit_finds_the_cells_where_two_prompts_disagree(scene):
    diffedit = editing.DiffEdit(draws=3)
    assert not diffedit.region(scene, SOURCE).any()  # of equal prompts none
    region = diffedit.region(scene, OTHER)
    assert 0 < region.mean() < 1 and region.shape[2:] == scene.inversion.x0.shape[2:]
    assert diffedit.region(replace(scene), OTHER).equal(region)  # drawn the same each time
    wider = editing.DiffEdit(draws=3, threshold=0.2).region(scene, OTHER)
    assert (wider >= region).all() and wider.sum() > region.sum()
    got = diffedit(scene)
    for row, edit in enumerate(scene.edits):
        kept = (diffedit.region(scene, edit) == 0).expand_as(got[row : row + 1])
        assert torch.equal(got[row : row + 1][kept], scene.inversion.x0[kept])


def test_delta_denoising_moves_by_what_two_prompts_differ_in(scene):
    dds = editing.DDS(iterations=3, rate=0.1)
    same = dds(replace(scene, edits=[SOURCE]))
    assert torch.equal(same, scene.inversion.x0)  # of its own prompt the picture is not moved
    got = dds(scene)
    assert got.shape == (2, *same.shape[1:]) and not near(got[0], got[1], 1e-3)
    # One move by hand, at the level and with the noise that the seed draws.
    drawing = torch.Generator().manual_seed(0)
    t = int(torch.randint(50, 950, (), generator=drawing))
    noise = torch.randn((1, *same.shape[1:]), generator=drawing)
    level = Level(t, scene.model.alphas_cumprod.double()[t], 1, 1)
    x = level.alpha_bar.sqrt() * scene.inversion.x0 + (1 - level.alpha_bar).sqrt() * noise
    network, x = scene.network(), x.float()
    eps = [network(x, level, scene.context([prompt])) for prompt in (OTHER, SOURCE)]
    want = scene.inversion.x0 - 0.1 * (eps[0] - eps[1])
    assert near(editing.DDS(iterations=1, rate=0.1)(replace(scene, edits=[OTHER])), want)


@torch.no_grad()
def test_added_noise_is_img2img_over_the_same_levels(scene):
    got = editing.AddNoise(seed=4)(replace(scene, start_step=1))
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
    assert near(got[:1], last.x_t, 1e-4)


def test_a_contact_sheet_says_how_well_the_picture_comes_back(sd, picture):
    done = sd.edit(picture, SOURCE, [EDIT, OTHER], **HOW)
    sheet = done.sheet()
    assert sheet.size[0] == 4 * 72 and sheet.size[1] > 2 * 64
    last = np.asarray(sheet)[-64:, -72:]
    want = np.abs(np.asarray(done.images[1], int) - np.asarray(done.source, int))
    assert np.array_equal(last, want)


def test_a_mask_in_pixels_keeps_every_pixel_outside_and_fades_over_its_feather(sd, picture):
    mask = torch.zeros(1, 1, 64, 72)
    mask[..., 24:] = 1
    hard = sd.edit(picture, SOURCE, OTHER, mask=mask, **HOW)
    source, got = (np.asarray(one, int) for one in (hard.source, hard.images[0]))
    assert np.array_equal(source[:, :24], got[:, :24]) and np.abs(source - got)[:, 24:].mean() > 3
    soft = editing.feathered(mask, 8)
    row = soft[0, 0, 30]
    assert row[6] < 0.01 and 0.3 < row[23] < 0.5 < row[24] < 0.7 and row[42] > 0.99
    assert torch.equal(editing.feathered(mask, 0), mask) and (row.diff() >= -1e-6).all()
    cells = editing.region_of(soft, 8)
    assert cells.shape == (1, 1, 8, 9) and torch.allclose(cells.mean(), soft.mean(), atol=1e-6)


def test_the_way_up_is_unguided_where_latents_are_all_that_is_kept_of_it(sd, picture):
    how = HOW | {"steps": 1}
    for method, given, want in (
        ("ddim", None, 1.0),
        ("ddim", 3.0, 3.0),
        ("belm", None, 3.0),
        ("null_text", None, 3.0),
    ):
        done = sd.edit(picture, SOURCE, EDIT, method=method, inversion_scale=given, **how)
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
    given = {"edit_prompt": OTHER, **HOW, **options}
    if message is None:
        sd.edit(picture, SOURCE, **given | {"steps": 1})  # an empty prompt is one
        return
    monkeypatch.setattr(type(sd.model), "apply_model", None)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        sd.edit(picture, SOURCE, **given)
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
