"""Samples and bounds of pixel and latent models: batches, progress, what pictures say, what is read and built."""

import os

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_pixels import CHAIN, CHAIN_WORDS, CLASSIFIER, LABELLED, MODEL, UPSAMPLER, script, write_network

from ldm import read_metadata
from ldm.batches import log as batches_log
from ldm.checkpoints.open_file import OpenFile
from ldm.errors import ResourceError
from ldm.guided_diffusion import likelihood, models, pixels, sampling
from ldm.guided_diffusion.models import Conditions, choose_conditions, open_model
from ldm.guided_diffusion.sampling import SamplingOptions
from ldm.models.diffusion.respace import SpacedDiffusion
from ldm.results import file_hash

FEW = {**CHAIN, "image_size": 16, "timestep_respacing": "3"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files by name, the latent one a .ckpt in a folder as CompVis has it."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "latent").mkdir()
    torch.save({"state_dict": tiny.tiny_model().state_dict()}, folder / "latent" / "model.ckpt")
    OmegaConf.save(OmegaConf.create(tiny.tiny_config()), folder / "latent" / "config.yaml")
    np.savez(folder / "base.npz", np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    networks = {"labelled": LABELLED, "plain": MODEL, "upsampler": UPSAMPLER, "classifier": CLASSIFIER}
    return {
        "latent": folder / "latent",
        "base": folder / "base.npz",
        **{name: write_network(folder / f"{name}.pt", **flags) for name, flags in networks.items()},
    }


@pytest.fixture
def labelled(files):
    return open_model(files["labelled"], flags=FEW)


@pytest.fixture(scope="module")
def latent(files):
    return open_model(files["latent"], flags={"timestep_respacing": "ddim2"})


def finished(model, conditions, options=None, *, seeds=range(5, 8), batch_size=2, **more):
    """(arrays of all pictures, every Progress)."""
    steps = list(
        sampling.sample(
            model, conditions, options or SamplingOptions(), seeds=seeds, batch_size=batch_size, **more
        )
    )
    results = [step.result for step in steps if step.result is not None]
    return np.stack([np.asarray(image) for result in results for image in result]), steps


# --- reading ---

PIXELS = [*CHAIN_WORDS, "--image_size", 16, "--timestep_respacing", 2]
SHORT = [*PIXELS, "-n", 1]


@pytest.mark.parametrize(
    ("name", "words", "read"),
    [
        ("sample_diffusion", ["-r", "{plain}", *SHORT, "--classifier_path", "{classifier}"],
         ["plain.pt", "classifier.pt"]),
        ("sample_diffusion", ["-r", "{latent}", "-n", 1, "-c", 2, "--prompt", "a ring"], ["model.ckpt"]),
        pytest.param("sample_diffusion", ["-r", "{upsampler}", *CHAIN_WORDS, "-c", 2, "--large_size", 24,
                     "--base_samples", "{base}"], ["upsampler.pt"], marks=pytest.mark.slow),
        ("image_nll", ["-r", "{labelled}", *PIXELS, "--shapes", 1, "--skip_plot"], ["labelled.pt"]),
        pytest.param("image_nll", ["-r", "{latent}", "--shapes", 1, "--timestep_respacing", 2, "--skip_plot"],
                     ["model.ckpt"], marks=pytest.mark.slow),
        ("inspect_checkpoint", ["{latent}/model.ckpt", "--config", "{latent}/config.yaml"], ["model.ckpt"]),
    ],
)  # fmt: skip
@pytest.mark.thinned(3)
def test_one_run_opens_every_weight_file_once(files, tmp_path, monkeypatch, name, words, read):
    opened, own = [], OpenFile.__init__

    def watched(self, path):
        own(self, path)
        opened.append(os.path.basename(path))

    monkeypatch.setattr(OpenFile, "__init__", watched)
    monkeypatch.chdir(tmp_path)
    script(name).main([str(word).format(**files) for word in words])
    assert opened == read


# --- batches ---


@pytest.fixture
def room(monkeypatch):
    """Give a model's network room for so many samples, as torch reports its end; list the batches that were tried."""

    def limit(model, most):
        network, tried = model.network, []

        def small(x, t, **kwargs):
            tried.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(x, t, **kwargs)

        monkeypatch.setattr(model, "network", small)
        return tried

    return limit


def test_a_batch_of_samples_that_does_not_fit_is_halved_and_they_stay_the_same(labelled, room, caplog):
    conditions = choose_conditions(labelled, range(5, 8), classes=[4, 1])
    alone, _ = finished(labelled, conditions, batch_size=1)
    tried = room(labelled, 1)
    halved, steps = finished(labelled, conditions, batch_size=3)
    assert (halved == alone).all() and len(np.unique(alone, axis=0)) == 3
    assert tried == [3, 2, *[1] * 6, 1, 1, 1]
    assert [record.message for record in caplog.records if record.name == batches_log.name] == [
        "out of memory with 3 images at once; trying 2",
        "out of memory with 2 images at once; trying 1",
    ]
    assert [(one.batch, one.batches) for one in steps if one.result] == [(0, 3), (1, 3), (2, 3)]


def test_a_batch_of_bounds_that_does_not_fit_is_halved_and_they_stay_the_same(labelled, room):
    scenes = likelihood.shapes_to_measure(labelled, 3)
    options = {"seeds": range(7, 10)}
    alone = likelihood.measure(labelled, scenes, batch_size=1, **options)
    room(labelled, 1)
    assert likelihood.measure(labelled, scenes, batch_size=3, **options) == alone
    assert len(set(alone["each"]["total_bpd"])) == 3


def test_a_single_sample_that_does_not_fit_is_an_error(labelled, room):
    room(labelled, 0)
    with pytest.raises(ResourceError, match="^out of memory with 1 samples of 3 x 16 x 16 at once; use a sm"):
        finished(labelled, choose_conditions(labelled, range(5, 8)))
    with pytest.raises(ResourceError, match="^out of memory with 1 pictures of 16 pixels at once; use a sm"):
        likelihood.measure(labelled, likelihood.shapes_to_measure(labelled, 2), seeds=[1, 2], batch_size=2)


@pytest.mark.thinned(2)
def test_the_chain_is_built_once_for_all_batches(latent, labelled, monkeypatch):
    built, own = [], SpacedDiffusion.__init__

    def watched(self, *args, **kwargs):
        built.append(self)
        own(self, *args, **kwargs)

    monkeypatch.setattr(SpacedDiffusion, "__init__", watched)
    finished(latent, Conditions(prompts=["a ring"] * 3, guidance_scale=2.0), batch_size=1)
    finished(labelled, choose_conditions(labelled, range(5, 8)), batch_size=1)
    assert built == []
    latent.respace("ddim2")
    assert built == [latent.diffusion]


def test_features_of_many_prompts_are_not_kept(latent):
    conditions = Conditions(prompts=[f"{n} rings" for n in range(5)], guidance_scale=3.0)
    for rows in (range(0, 2), range(2, 4), range(4, 5)):
        latent.condition(conditions, rows)
    assert latent._features.keys() == {"4 rings", ""}


def test_pictures_that_cannot_be_read_are_not_measured(labelled, tmp_path, caplog):
    for i, name in enumerate(("a_0", "b_1", "c_2", "d_3")):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    last = np.asarray(Image.open(tmp_path / "c_2.png"))
    (tmp_path / "b_1.png").write_bytes((tmp_path / "b_1.png").read_bytes()[:300])
    found = likelihood.folder_to_measure(labelled, tmp_path, 3)
    assert len(found) == 2 and found.labels.tolist() == [0, 2]
    assert (found.read(1).permute(1, 2, 0).numpy() == last.astype(np.float32) / 127.5 - 1).all()
    assert "1 of 3 pictures cannot be read and are left out" in caplog.text


# --- progress ---


def test_every_step_is_told_and_gradients_stay_on_outside(labelled):
    seen = []
    steps = sampling.sample(
        labelled, Conditions(labels=torch.tensor([3, 0, 5])), SamplingOptions(), seeds=[5, 6, 7], batch_size=2
    )
    for step in steps:
        assert torch.is_grad_enabled()
        seen.append((step.step, step.steps, step.batch, step.batches, tuple(step.x_t.shape), step.result))
    assert [one[:5] for one in seen if one[5] is None] == [
        *[(n, 3, 0, 2, (2, 3, 16, 16)) for n in (1, 2, 3)],
        *[(n, 3, 1, 2, (1, 3, 16, 16)) for n in (1, 2, 3)],
    ]
    results = [one[5] for one in seen if one[5] is not None]
    assert [result.seeds for result in results] == [[5, 6], [7]] and results[0].latents.shape == (
        2,
        3,
        16,
        16,
    )


def test_previews_are_pictures_of_what_is_to_come(labelled, latent):
    pictures, steps = finished(labelled, choose_conditions(labelled, range(5, 8)))
    last = [step for step in steps if step.step == 3 and step.result is None]
    assert (np.stack([np.asarray(one) for step in last for one in step.preview()]) == pictures).all()
    _, steps = finished(latent, Conditions(prompts=["a ring"]), seeds=[5])
    assert [one.size for one in steps[0].preview()] == [(64, 64)]


# --- what pictures say ---


def test_a_sample_says_how_it_was_made(files, labelled):
    options = SamplingOptions(use_ddim=True, eta=0.5)
    conditions = choose_conditions(labelled, range(5, 8), classes=[4, 1])
    _, steps = finished(labelled, conditions, options)
    said = [read_metadata(image) for step in steps if step.result for image in step.result]
    assert [(one["seed"], one["class_label"]) for one in said] == [(5, 4), (6, 1), (7, 4)]
    assert [(one["batch_index"], one["batch_size"]) for one in said] == [(0, 2), (1, 2), (0, 1)]
    assert said[0].items() >= {
        "source": "ldm", "sampler": "ddim", "steps": 3, "eta": 0.5, "timestep_respacing": "3",
        "model": "labelled", "model_hash": file_hash(files["labelled"]), "width": 16, "height": 16, "prompt": "",
        "guidance_scale": None, "classifier": None, "base_sample": None, "rng": "image", "device": "cpu",
        "dtype": "float32",
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-r {plain} -n 2 --timestep_respacing 2 --classifier_path {classifier} --class 2 --classifier_scale 1.5",
         {"sampler": "ddpm", "steps": 2, "eta": None, "class_label": 2, "classifier": "classifier",
          "classifier_scale": 1.5, "model": "plain", "seed": 42, "timestep_respacing": "2"}),
        ("-r {upsampler} --large_size 24 --base_samples {base} -c 2 --seed 9",
         {"sampler": "ddim", "eta": 0.0, "steps": 2, "base_sample": 0, "class_label": None, "width": 24, "seed": 9}),
        ("-r {latent} -n 1 -c 2 --prompt ring --scale 3",
         {"sampler": "ddim", "eta": 1.0, "steps": 2, "prompt": "ring", "guidance_scale": 3.0, "width": 64,
          "height": 64, "model": "model", "timestep_respacing": "ddim2"}),
    ],
)  # fmt: skip
@pytest.mark.thinned(2)
@pytest.mark.slow
def test_the_picture_that_is_saved_says_how_its_first_sample_was_made(
    files, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    words = words.format(**files).split()
    if str(files["latent"]) not in words:
        words += [str(word) for word in CHAIN_WORDS]
        words += [] if "--large_size" in words else ["--image_size", "16"]
    script("sample_diffusion").main(words)
    (picture,) = tmp_path.rglob("*.png")
    assert read_metadata(picture).items() >= said.items()


# --- names ---


def test_the_former_names_of_these_modules_are_the_very_objects():
    import ldm.pixels

    assert ldm.pixels is pixels and pixels.Recipe is SamplingOptions
    names = {name for name in vars(pixels) if not name.startswith("_")} - {"Recipe"}
    assert len(names) == 16
    for name in names:
        homes = [home for home in (models, sampling, likelihood) if hasattr(home, name)]
        assert homes and all(getattr(home, name) is getattr(pixels, name) for home in homes)
