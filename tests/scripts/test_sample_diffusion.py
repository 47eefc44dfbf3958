"""sample_diffusion.py as a user runs it: the chains' own samples whatever the batch size, files, exit codes."""

import re
import shlex

import numpy as np
import pytest
import tiny
import torch
from keyed import fill
from PIL import Image
from tiny_pixels import (
    CHAIN,
    CHAIN_WORDS,
    CLASSIFIER,
    LABELLED,
    MODEL,
    ROOT,
    UPSAMPLER,
    script,
    write_network,
)

from ldm.checkpoints import load_latent_diffusion
from ldm.cli import run
from ldm.errors import FormatError
from ldm.guided_diffusion import sampling
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.gaussian_bridge import as_gaussian_diffusion
from ldm.guided_diffusion.models import choose_labels
from ldm.guided_diffusion.script_util import diffusion_from_flags
from ldm.images import to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny networks by name, and broken files."""
    folder = tmp_path_factory.mktemp("pixels")
    made = {
        "labelled": write_network(folder / "labelled.pt", **LABELLED),
        "plain": write_network(folder / "plain.pt", **MODEL),
        "upsampler": write_network(folder / "upsampler.pt", **UPSAMPLER),
        "classifier": write_network(folder / "classifier.pt", **CLASSIFIER),
        "other": write_network(folder / "other.pt", **{**CLASSIFIER, "num_classes": 7}),
        "cut": folder / "cut.pt",
        "base": folder / "base.npz",
        "cut_base": folder / "cut.npz",
        "absent": folder / "absent.pt",
    }
    made["cut"].write_bytes(made["plain"].read_bytes()[:3000])
    small = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.savez(made["base"], small)
    made["cut_base"].write_bytes(made["base"].read_bytes()[:200])
    return made


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """Run the script to its exit in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def ending(*argv, name="sample_diffusion"):
        with pytest.raises(SystemExit) as stop:
            run(script(name).main, [str(word) for word in argv])
        return (stop.value.code, *capsys.readouterr())

    return ending


def written(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def read(path):
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]


def same(got, want):
    """Equal pictures but for rounding at the edge between two values: 1 of 255, in 1 of 1000 numbers."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.uint8
    apart = np.abs(got.astype(int) - want)
    assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3


def alone(path, seed, loop, *, label=None, respacing="", low_res=None, **options):
    """One sample of OpenAI's own loop, from the global generator with this seed."""
    model, flags, _ = load_openai_model(path, **CHAIN, **options.pop("flags", {}))
    diffusion = diffusion_from_flags({**flags, "timestep_respacing": respacing})
    kwargs = {} if label is None else {"y": torch.tensor([label])}
    kwargs |= {} if low_res is None else {"low_res": low_res}
    side = flags.get("large_size", flags.get("image_size"))
    torch.manual_seed(seed)
    with torch.no_grad():
        x = getattr(diffusion, loop)(model, (1, 3, side, side), model_kwargs=kwargs, **options)
    return to_uint8(x)[0]


@pytest.mark.slow
def test_samples_are_the_chain_s_own_and_the_batch_size_changes_nothing(files, end, tmp_path):
    words = [
        "--model_path",
        files["labelled"],
        *CHAIN_WORDS,
        "--image_size",
        16,
        "--num_samples",
        5,
        "--outdir",
        "o",
    ]
    code, out, err = end(*words, "--batch_size", 2)
    assert (code, err) == (0, "")
    assert "4 of 5 samples" in out and out.endswith("o/samples_5x16x16x3.npz\no/samples_5x16x16x3.png\n")
    pictures, labels = read("o/samples_5x16x16x3.npz")
    drawn = choose_labels(6, [], range(42, 47)).numpy()
    assert (labels == drawn).all() and len(set(labels.tolist())) > 1 and 0 <= labels.min() <= labels.max() < 6
    same(
        pictures[3], alone(files["labelled"], 45, "p_sample_loop", label=labels[3], flags={"image_size": 16})
    )
    assert np.abs(pictures[3].astype(int) - pictures[2]).mean() > 1
    # Pictures of 16 pixels with borders of 2, three in a row.
    shown = np.asarray(Image.open("o/samples_5x16x16x3.png"))
    assert shown.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    assert (shown[20:36, 2:18] == pictures[3]).all()

    before = (tmp_path / "o/samples_5x16x16x3.npz").read_bytes()
    assert end(*words, "--batch_size", 5)[0] == 0
    assert (tmp_path / "o/samples_5x16x16x3.npz").read_bytes() == before  # nothing is overwritten
    again, labels_again = read("o/samples_5x16x16x3-1.npz")
    same(again, pictures)
    assert (labels_again == labels).all()
    assert len(written(tmp_path)) == 4


@pytest.mark.parametrize(
    ("words", "loop", "options"),
    [
        pytest.param("-c 4", "ddim_sample_loop", {"respacing": "ddim4"}, marks=pytest.mark.slow),
        (
            "--use_ddim true --timestep_respacing ddim4 --eta 0.5",
            "ddim_sample_loop",
            {"respacing": "ddim4", "eta": 0.5},
        ),
        ("--timestep_respacing 2,3", "p_sample_loop", {"respacing": "2,3"}),
        pytest.param(
            "-v --clip_denoised False", "p_sample_loop", {"clip_denoised": False}, marks=pytest.mark.slow
        ),
    ],
)
def test_steps_are_those_that_the_options_name(files, end, words, loop, options):
    code, _, err = end(
        "-r", files["labelled"], *CHAIN_WORDS, "--image_size", 16, "-n", 2, "--class", 4, 1, *words.split()
    )
    assert (code, err) == (0, "")
    pictures, labels = read("outputs/samples/samples_2x16x16x3.npz")
    assert labels.tolist() == [4, 1]
    same(pictures[1], alone(files["labelled"], 43, loop, label=1, flags={"image_size": 16}, **options))


@pytest.mark.slow
def test_a_classifier_moves_samples_towards_its_classes(files, end):
    """The classifier itself finds them likelier with its guidance than without, and less likely against it."""
    words = ["-r", files["plain"], *CHAIN_WORDS, "--image_size", 16, "-n", 4, "--timestep_respacing", 6]
    classifier, _, _ = load_openai_model(files["classifier"], image_size=16)

    def likeness(folder, *more):
        assert end(*words, "--outdir", folder, *more)[0] == 0
        pictures, *labels = read(f"{folder}/samples_4x16x16x3.npz")
        assert labels == [] or labels[0].tolist() == [2, 2, 2, 2]
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            return classifier(x, torch.zeros(4)).log_softmax(dim=-1)[:, 2].mean().item()

    guided = ["--classifier_path", files["classifier"], "--class", 2, "--classifier_scale"]
    without, along, against = likeness("a"), likeness("b", *guided, 20), likeness("c", *guided, -20)
    assert against < without < along


def test_an_upsampler_enlarges_base_samples(files, end):
    words = ["-r", files["upsampler"], *CHAIN_WORDS, "--large_size", 24, "--base_samples", files["base"]]
    code, _, err = end(*words, "-c", 3)
    assert (code, err) == (0, "")
    (pictures,) = read("outputs/samples/samples_2x24x24x3.npz")
    (base,) = read(files["base"])
    low = torch.from_numpy(base[1:]).permute(0, 3, 1, 2) / 127.5 - 1
    options = {"respacing": "ddim3", "low_res": low, "flags": {"large_size": 24}}
    same(pictures[1], alone(files["upsampler"], 43, "ddim_sample_loop", **options))


@torch.no_grad()
@pytest.mark.slow
def test_a_latent_model_paints_a_prompt_through_the_bridge(end, tmp_path):
    checkpoint, config = tiny.write_tiny(tmp_path)
    code, _, err = end(
        "--ckpt", checkpoint, "--config", config, "-n", 2, "-c", 2, "--prompt", "a ring", "--scale", 3
    )
    assert (code, err) == (0, "")
    (pictures,) = read("outputs/samples/samples_2x64x64x3.npz")
    model, _ = load_latent_diffusion(checkpoint, config=config)
    c, uc = model.get_learned_conditioning(["a ring"]), model.get_learned_conditioning([""])
    network, diffusion = as_gaussian_diffusion(
        model, c, unconditional_conditioning=uc, guidance_scale=3.0, timestep_respacing="ddim2"
    )
    torch.manual_seed(43)
    x = diffusion.ddim_sample_loop(network, (1, 4, 8, 8), eta=1.0)
    same(pictures[1], to_uint8(model.decode_first_stage(x))[0])


@torch.no_grad()
@pytest.mark.slow
def test_compvis_s_folders_of_unconditional_models_are_sampled(end, tmp_path):
    from omegaconf import OmegaConf

    settings = tiny.tiny_config()
    params = settings["model"]["params"]
    params |= {"cond_stage_config": "__is_unconditional__", "conditioning_key": None}
    params["unet_config"]["params"] |= {"use_spatial_transformer": False, "context_dim": None}
    model = fill(LatentDiffusion(**params), only=("model.", "first_stage_model.")).eval()
    folder = tmp_path / "models" / "shapes"
    folder.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, folder / "model.ckpt")
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    code, _, err = end("-r", folder, "-l", "logs", "-n", 1, "-c", 2, "-e", 0.3, "--batch_size", 3)
    assert (code, err) == (0, "")
    (pictures,) = read("logs/samples_1x64x64x3.npz")
    network, diffusion = as_gaussian_diffusion(model, timestep_respacing="ddim2")
    torch.manual_seed(42)
    x = diffusion.ddim_sample_loop(network, (1, 4, 8, 8), eta=0.3)
    same(pictures, to_uint8(model.decode_first_stage(x)))

    code, _, err = end("-r", folder, "-l", "none", "--prompt", "x")
    assert code == 2 and "this model is unconditional; leave --prompt and --scale out" in err
    code, _, err = end("-r", folder, "-l", "none", "--class", 1)
    assert code == 2 and "--class is for OpenAI's pixel models, the model is a latent one" in err
    assert written(tmp_path / "none") == []


def test_base_samples_that_would_fill_the_memory_are_not_unpacked(files, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_BASE_BYTES", 500)
    with pytest.raises(FormatError, match=r"base.npz' cannot be read \(512 bytes unpacked, at most 500"):
        sampling.read_samples(files["base"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("-r {absent}", 9, "absent.pt"),
        ("-r {cut}", 3, "cut.pt"),
        ("-r {labelled} --class 3 6", 2, "labels must be from 0 to 5, got [3, 6]"),
        ("-r {plain} --class 3", 2, "--class 3 needs a model with classes or a classifier, got neither"),
        ("-r {plain} -n 0", 2, "wanted a whole number from 1 to 1000000, got '0'"),
        ("-r {plain} --classifier_path {plain}", 5, "plain.pt' is no classifier but a OpenAI pixel model"),
        ("-r {classifier}", 5, "classifier.pt' is a classifier, which paints nothing"),
        ("-r {labelled} --classifier_path {other}", 5, "the classifier has 7 classes, the model has 6"),
        ("-r {plain} --classifier_scale 2", 2, "--classifier_scale 2.0 needs --classifier_path"),
        ("-r {plain} --base_samples {base}", 2, "--base_samples is for models that enlarge pictures"),
        ("-r {plain} --base_samples {cut_base}", 3, "cut.npz' cannot be read"),
        ("-r {plain} --base_samples {plain}", 3, "wanted an .npz with arr_0, pictures (n, h, w, 3)"),
        ("-r {plain} --prompt x", 2, "--prompt and --scale are for latent models"),
        ("-r {plain} -v -c 3", 2, "-v is DDPM over all levels; leave -c"),
        ("-r {plain} -c 3 --use_ddim no", 2, "-c 3 is short for --use_ddim True"),
        ("-r {plain} --eta 0.5", 2, "--eta 0.5 is DDIM's"),
        ("-r {plain} --timestep_respacing 13", 2, "12 of 12 levels"),
        ("-r {plain} --num_channels 64", 5, "num_channels is 32 there, not 64"),
        ("-r {plain} --config x.yaml", 2, "is no latent model; leave --config out"),
        ("-r {plain} --outdir {base}", 7, "cannot write to folder"),
        ("--num_channels 64", 2, "--num_channels is for OpenAI's pixel models"),
    ],
)
@pytest.mark.thinned(3)
def test_bad_input_is_one_line_and_leaves_nothing(files, end, tmp_path, words, code, message):
    argv = shlex.split(words.format(**files))
    if "{plain}" in words or "{labelled}" in words or "{classifier}" in words:
        argv += [*CHAIN_WORDS[:4], "--image_size", "16"]
    got, out, err = end(*argv)
    assert (got, err.count("\n")) == (code, 1), err
    assert err.startswith("ldm: error: ") and message in err
    assert written(tmp_path) == []


def test_an_upsampler_needs_base_samples(files, end, tmp_path):
    code, _, err = end("-r", files["upsampler"], "--large_size", 24)
    assert code == 2 and "this model enlarges pictures; give them as --base_samples" in err
    assert written(tmp_path) == []


# The page, with tiny files under the names of the published ones

TEXT = (ROOT / "docs" / "pixel-scripts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", "").splitlines()
    if line
]
# Fewer steps and samples than the page asks for.
STAND_INS = {
    "--timestep_respacing 250": "--timestep_respacing 2",
    "-c 20": "-c 2",
    "-n 16": "-n 2",
    "--shapes 16": "--shapes 2",
    "samples_16x": "samples_2x",
}


def stand_in(text):
    for wanted, given in STAND_INS.items():
        text = text.replace(wanted, given)
    return text


@pytest.mark.slow
def test_the_commands_of_the_page_run(end, tmp_path):
    """In their order, for one reads what another wrote."""
    usual = {
        "num_channels": 32,
        "num_res_blocks": 1,
        "image_size": 64,
        "learn_sigma": True,
        "class_cond": True,
    }
    write_network(tmp_path / "64x64_diffusion.pt", **usual, attention_resolutions="8")
    write_network(
        tmp_path / "64x64_classifier.pt",
        classifier_width=64,
        classifier_depth=1,
        classifier_attention_resolutions="8",
    )
    upsampler = {**usual, "large_size": 256, "small_size": 64, "attention_resolutions": "8"}
    write_network(tmp_path / "64_256_upsampler.pt", **upsampler)
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (70, 66, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{'ab'[i]}_{i}.png")
    assert {language for language, _ in BLOCKS} == {"bash", "python"} and len(COMMANDS) >= 6
    for command in COMMANDS:
        command = stand_in(command)
        program, path, *argv = shlex.split(command)
        assert program == "python" and (ROOT / path).is_file()
        code, _, err = end(*argv, name=path.removeprefix("scripts/").removesuffix(".py"))
        # The page's 20 steps are 2 here, which the model in the box warns of.
        assert code == 0 and all("with 2 steps paints badly" in line for line in err.splitlines()), command
    names: dict = {}
    for code in (code for language, code in BLOCKS if language == "python"):
        exec(compile(stand_in(code), "docs/pixel-scripts.md", "exec"), names)
    assert names["pictures"].shape == (2, 64, 64, 3) and names["labels"].tolist() == [207, 207]
    made = {"source": "ldm", "seed": 42, "steps": 2, "class_label": 207, "model": "64x64_diffusion"}
    assert names["made"].items() >= made.items()
    assert names["bits"] == pytest.approx(names["terms"]["prior_bpd"] + sum(names["terms"]["vb"]), rel=1e-5)
