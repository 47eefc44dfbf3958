"""image_nll.py as a user runs it: the bound of calc_bpd_loop, picture by picture, in pixels and in latents."""

import json
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny_pixels import CHAIN, CHAIN_WORDS, LABELLED, MODEL, UPSAMPLER, script, write_network

from ldm.checkpoints import load_latent_diffusion
from ldm.cli import run
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.gaussian_bridge import as_gaussian_diffusion
from ldm.guided_diffusion.likelihood import SHAPES_SEED
from ldm.guided_diffusion.script_util import diffusion_from_flags
from ldm.images import open_image, to_tensor
from ldm.shapes.scenes import SHAPES, ShapesDataset

WORDS = [*CHAIN_WORDS, "--image_size", 16]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    return {
        "labelled": write_network(folder / "labelled.pt", **LABELLED),
        "five": write_network(folder / "five.pt", **{**LABELLED, "num_classes": 5}),
        "plain": write_network(folder / "plain.pt", **MODEL),
        "upsampler": write_network(folder / "upsampler.pt", **UPSAMPLER),
    }


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """Run the script to its exit in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def ending(*argv):
        with pytest.raises(SystemExit) as stop:
            run(script("image_nll").main, [str(word) for word in argv])
        return (stop.value.code, *capsys.readouterr())

    return ending


@pytest.fixture
def pictures(tmp_path):
    """A folder of 3 pictures of 16 pixels in classes b, a, c by their names, one with a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("b_0", "a_1", "c_2")):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "b_0.txt").write_text("a ring")
    return folder


def bound_of(path, x, seed, label=None, respacing=""):
    """OpenAI's own loop over one picture (1, 3, h, w), from the global generator with this seed."""
    model, flags, _ = load_openai_model(path, **CHAIN, image_size=16, timestep_respacing=respacing)
    kwargs = {} if label is None else {"y": torch.tensor([label])}
    x = x.contiguous()  # torch.randn_like draws in the order of memory
    torch.manual_seed(seed)
    return diffusion_from_flags(flags).calc_bpd_loop(model, x, model_kwargs=kwargs)


def agree(result, bounds):
    """The file's means are those of single bounds."""
    for name in ("total_bpd", "prior_bpd", "vb", "mse", "xstart_mse"):
        want = torch.cat([bound[name] for bound in bounds]).double()
        got = torch.tensor(result[name], dtype=torch.float64)
        torch.testing.assert_close(got, want.mean(dim=0), rtol=1e-5, atol=1e-6)
        if name in result["each"]:
            each = torch.tensor(result["each"][name], dtype=torch.float64)
            torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-6)
    totals = torch.tensor(result["each"]["total_bpd"])
    assert result["total_bpd_error"] == pytest.approx(totals.std().item() / math.sqrt(len(bounds)), rel=1e-4)


@pytest.mark.slow
def test_shapes_that_nobody_saw_are_measured_by_the_loop_s_own_bound(files, end):
    words = ["--model_path", files["labelled"], *WORDS, "--shapes", 3, "--outdir", "o"]
    code, out, err = end(*words, "--batch_size", 1)
    assert (code, err) == (0, "")
    result = json.loads(open("o/nll.json").read())
    scenes = ShapesDataset(size=16, length=3, seed=SHAPES_SEED, split="train")
    bounds = []
    for i in range(3):
        x = torch.from_numpy(scenes[i]["image"]).permute(2, 0, 1)[None]
        label = SHAPES.index(scenes.scene(i).items[0].shape)
        bounds.append(bound_of(files["labelled"], x, 42 + i, label))
    agree(result, bounds)
    assert result["levels"] == list(range(11, -1, -1)) and len(result["vb"]) == 12
    assert result["total_bpd"] == pytest.approx(result["prior_bpd"] + sum(result["vb"]), rel=1e-5)
    assert (
        result["unit"].startswith("bits per dimension of pictures in 8 bits") and result["dimensions"] == 768
    )
    assert f"total {result['total_bpd']:.4f}, of them prior" in out and "o/nll.png" in out
    assert Image.open("o/nll.png").size == (800, 700)

    # Another batch size changes the rounding alone.
    assert end(*words, "--batch_size", 2, "--skip_plot")[0] == 0
    again = json.loads(open("o/nll-1.json").read())
    for name in ("vb", "mse", "xstart_mse", "prior_bpd"):
        assert again[name] == pytest.approx(result[name], rel=1e-4), name


@pytest.mark.slow
def test_optimizing_changes_the_rounding_alone(files, end):
    words = ["--model_path", files["labelled"], *WORDS, "--shapes", 2, "--skip_plot", "--outdir", "o"]
    assert end(*words)[0] == 0 and end(*words, "--optimize")[0] == 0
    plain, fast = (json.loads(open(f"o/{name}.json").read()) for name in ("nll", "nll-1"))
    for name in ("vb", "mse", "xstart_mse", "prior_bpd"):
        assert fast[name] == pytest.approx(plain[name], rel=1e-3), name


@pytest.mark.slow
def test_a_folder_is_measured_with_the_classes_of_its_names_and_nothing_is_overwritten(files, end, pictures):
    words = [
        "-r",
        files["labelled"],
        *WORDS,
        "--data_dir",
        pictures,
        "--timestep_respacing",
        "2,3",
        "--seed",
        7,
    ]
    code, _, err = end(*words, "--num_samples", 2, "--batch_size", 1)
    assert (code, err) == (0, "")
    result = json.loads(open("outputs/nll/nll.json").read())
    bounds = [  # by name: a_1 is class 0, b_0 class 1
        bound_of(files["labelled"], to_tensor(open_image(pictures / f"{name}.png")), 7 + i, i, "2,3")
        for i, name in enumerate(("a_1", "b_0"))
    ]
    agree(result, bounds)
    assert result["levels"] == [11, 8, 6, 5, 0] and result["pictures"] == 2 and result["seed"] == 7
    before = open("outputs/nll/nll.json").read()
    assert end(*words, "--num_samples", 1, "--skip_plot")[0] == 0
    assert open("outputs/nll/nll.json").read() == before
    alone = json.loads(open("outputs/nll/nll-1.json").read())
    assert alone["total_bpd_error"] is None
    assert alone["each"]["total_bpd"] == pytest.approx(result["each"]["total_bpd"][:1], rel=1e-6)


@torch.no_grad()
@pytest.mark.slow
def test_latents_are_measured_with_their_captions_and_said_to_be_no_pixels(end, pictures, tmp_path):
    checkpoint, config = tiny.write_tiny(tmp_path)
    words = ["-r", checkpoint, "--config", config, "--data_dir", pictures, "--timestep_respacing", 3]
    code, out, err = end(*words, "--num_samples", 2, "--batch_size", 1)
    assert (code, err) == (0, "")
    assert "no bits of pixels" in out
    result = json.loads(open("outputs/nll/nll.json").read())
    model, _ = load_latent_diffusion(checkpoint, config=config)
    bounds = []
    for i, (name, caption) in enumerate((("a_1", ""), ("b_0", "a ring"))):
        picture = open_image(pictures / f"{name}.png").resize((64, 64), 3)
        posterior = model.encode_first_stage(to_tensor(picture))
        torch.manual_seed(42 + i)
        latents = model.scale_factor * (posterior.mean + posterior.std * torch.randn(1, 4, 8, 8))
        c = model.get_learned_conditioning([caption])
        network, diffusion = as_gaussian_diffusion(model, c, timestep_respacing="3")
        bounds.append(diffusion.calc_bpd_loop(network, latents))
    agree(result, bounds)
    assert result["dimensions"] == 256 and "a density: no bits of pixels" in result["unit"]
    assert result["total_bpd_unscaled"] == pytest.approx(result["total_bpd"] - math.log2(0.18215))


def test_without_matplotlib_the_plot_is_refused_before_the_work(files, end, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["-r", files["plain"], *WORDS, "--shapes", 1, "--timestep_respacing", 2]
    code, out, err = end(*words)
    assert code == 2 and out == ""
    assert err == (
        "ldm: error: the plot needs matplotlib: pip install faithful-ldm[train], or leave it out by --skip_plot\n"
    )
    assert end(*words, "--skip_plot")[0] == 0
    assert [path.name for path in (tmp_path / "outputs/nll").iterdir()] == ["nll.json"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("-r {plain}", 2, "--data_dir FOLDER or from --shapes N; give one of the two"),
        ("-r {plain} --shapes 2 --data_dir {pictures}", 2, "give one of the two"),
        ("-r {plain} --shapes 0", 2, "wanted a whole number from 1 to 1000000, got '0'"),
        ("-r {plain} --data_dir {tmp}/none", 9, "none' does not exist; check --data_dir"),
        ("-r {plain} --data_dir {empty}", 9, "holds no pictures"),
        ("-r {plain} --data_dir {damaged}", 3, "no picture in"),
        ("-r {labelled} --data_dir {seven}", 5, "holds 7 classes by the names up to '_', the model has 6"),
        ("-r {five} --shapes 2", 2, "the model has 5 classes; shapes have 6 or 8"),
        ("-r {plain} --shapes 2 --outdir {plain}", 7, "cannot write to folder"),
        ("-r {tmp}/none.pt --shapes 2", 9, "none.pt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, end, pictures, tmp_path, words, code, message):
    folders = {name: tmp_path / name for name in ("empty", "damaged", "seven")}
    for folder in folders.values():
        folder.mkdir()
    whole = (pictures / "a_1.png").read_bytes()
    (folders["damaged"] / "a.png").write_bytes(whole[:300])
    for i in range(7):
        (folders["seven"] / f"{i}_0.png").write_bytes(whole)
    argv = words.format(pictures=pictures, tmp=tmp_path, **folders, **files).split()
    got, _, err = end(*argv, *WORDS)
    lines = [line for line in err.splitlines() if line.startswith("ldm: error: ")]
    assert (got, len(lines)) == (code, 1), err
    assert message in lines[0] and "Traceback" not in err
    assert not any((tmp_path / "outputs").rglob("*.*"))


def test_an_upsampler_has_no_bound_of_its_own(files, end):
    code, _, err = end("-r", files["upsampler"], *CHAIN_WORDS, "--large_size", 24, "--shapes", 2)
    assert code == 5 and "an upsampler judges large pictures by small ones" in err
