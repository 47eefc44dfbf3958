"""edit.py as a user runs it: pictures, sheets, metadata that replays, exit codes, and nothing left where it fails."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from keyed import keyed_input
from lora_files import write_lora_for
from PIL import Image
from tiny import tiny_model, write_tiny
from tiny_adapters import write_control, write_look

import ldm
from ldm.adapters import LocalBlend
from ldm.adapters.controls import Hint
from ldm.adapters.preprocessors import preprocess
from ldm.checkpoints import save_safetensors
from ldm.cli import run
from ldm.cli.editing import editor_of, inversion_of
from ldm.cli.editing_options import OF_INVERSIONS, OF_METHODS, OF_PROMPT_TO_PROMPT, edit_parser, fill
from ldm.editing import DDS, EDITORS, DiffEdit
from ldm.models.diffusion.inversion import METHODS

ROOT = Path(__file__).parents[2]
SOURCE, EDIT, OTHER = "a red circle", "a blue circle", "a blue square"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint, config = write_tiny(tmp_path_factory.mktemp("model"))
    return ["--ckpt", str(checkpoint), "--config", str(config), "--device", "cpu"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(4)
    for name in ("photo", "other"):
        Image.fromarray(rng.integers(0, 255, (64, 72, 3), np.uint8)).save(f"{name}.png")
    Image.fromarray(np.uint8([[0] * 24 + [255] * 48] * 64)).save("mask.png")
    return tmp_path


@pytest.fixture
def end(capsys):
    """Run the script to its exit: (code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("edit_script", ROOT / "scripts" / "edit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def ending(*argv):
        with pytest.raises(SystemExit) as stop:
            run(module.main, [str(word) for word in argv])
        return (stop.value.code, *capsys.readouterr())

    return ending


PHOTO = ["--image", "photo.png", "--mask", "mask.png", "--outdir", "out"]
PROMPTS = ["--prompt", SOURCE, "--edit-prompt", EDIT]
FINE = [
    "--steps",
    1,
    "--start-step",
    0,
    "--scale",
    3,
    "--feather",
    4,
    "--weight",
    "blue=2",
    "--self-replace",
    0.6,
]


def test_edits_are_saved_beside_a_sheet_with_what_made_them(home, end, model):
    code, said, complaints = end(*PHOTO, *PROMPTS, "--edit-prompt", OTHER, *FINE, *model)
    assert code == 0 and not complaints and "the picture comes back at" in said
    assert sorted(path.name for path in Path("out").iterdir()) == ["00000.png", "00001.png", "sheet-0000.png"]
    assert Image.open("out/sheet-0000.png").width == 4 * 72
    told = ldm.read_metadata("out/00001.png")
    assert (told["mode"], told["prompt"]) == ("edit", OTHER) and told["edit"]["weight"] == ["blue=2"]
    assert told["edit"]["self_replace"] == 0.6 and told["edit"]["method"] == "prompt_to_prompt"
    first, source = (np.asarray(Image.open(path)) for path in ("out/00000.png", "photo.png"))
    assert np.array_equal(first[:, :16], source[:, :16]) and not np.array_equal(first[:, 40:], source[:, 40:])


@pytest.mark.slow
def test_an_edit_is_made_again_from_what_its_picture_says(home, end, model):
    assert end(*PHOTO, *PROMPTS, *FINE, *model)[0] == 0
    first = np.asarray(Image.open("out/00000.png"))
    code, *_ = end(*PHOTO[:4], "--outdir", "again", *model, "--like", "out/00000.png", "--no-sheet")
    assert code == 0 and [path.name for path in Path("again").iterdir()] == ["00000.png"]
    assert np.array_equal(np.asarray(Image.open("again/00000.png")), first)
    # What is given on the command line goes before what the picture says.
    code, *_ = end(
        *PHOTO, *model, "--like", "out/00000.png", "--edit-prompt", OTHER, "--no-sheet", "--weight", "blue=-1"
    )
    assert code == 0 and ldm.read_metadata("out/00001.png")["edit"]["weight"] == ["blue=-1"]


@pytest.mark.slow
def test_adapters_are_those_of_the_painting_scripts_and_an_edit_with_them_is_made_again(home, end, model):
    """A LoRA, an embedding that one prompt names, and a ControlNet whose hint is made of the picture itself."""
    write_lora_for("style.safetensors", tiny_model())
    save_safetensors("birb.safetensors", {"emb_params": keyed_input("birb", (3, 128))}, {})
    write_control("edges.safetensors")
    given = ["--lora", "style.safetensors:0.5", "--embedding", "birb.safetensors"]
    given += ["--control", "edges.safetensors", "--preprocess", "threshold:90", "--control-end", 0.5]
    how = ["--steps", 1, "--scale", 3, "--method", "swap", "--no-sheet", *model]
    prompts = ["--prompt", SOURCE, "--edit-prompt", "a birb circle"]
    code, said, complaints = end("--image", "photo.png", *prompts, *given, *how, "--outdir", "out")
    assert (code, complaints) == (0, "")
    told = ldm.read_metadata("out/00000.png")
    lora, control, birb = told["adapters"]
    assert (lora["kind"], lora["name"], lora["weight"]) == ("LoRA", "style", 0.5)
    assert (birb["kind"], birb["token"], birb["vectors"]) == ("Embedding", "birb", 3)
    assert control["hint"] == Hint([preprocess("photo.png", "threshold", level=90)]).hash
    assert (control["end"], told["device"], len(told["model_hash"])) == (0.5, "cpu", 10)
    like = ["--image", "photo.png", "--like", "out/00000.png", *how[4:]]
    code, said, _ = end(*like, *given, "--outdir", "again")
    assert code == 0 and "was painted with" not in said
    assert Path("again/00000.png").read_bytes() == Path("out/00000.png").read_bytes()
    code, said, complaints = end(*like, *given[4:], "--lora", "style.safetensors", "--outdir", "less")
    assert code == 0 and not complaints
    assert (
        "out/00000.png: was painted with LoRA 'style' at 0.5 " in said
        and "given at 1.0 (--lora FILE:0.5)" in said
    )
    assert "Embedding 'birb' (hash" in said and "ControlNet" not in said


@pytest.mark.slow
def test_an_edit_after_a_picture_is_made_again(home, end, model):
    write_look()
    given = "--ip-adapter look.safetensors --ip-image other.png --ip-scale 0.5 --image-encoder clip".split()
    how = ["--image", "photo.png", "--steps", 1, "--no-sheet", *model]
    assert end(*how, *PROMPTS, "--outdir", "plain")[0] == 0
    assert end(*how, *PROMPTS, *given, "--outdir", "out")[0] == 0
    code, said, _ = end("--like", "out/00000.png", *how, *given, "--outdir", "again")
    plain, out, again = (np.asarray(Image.open(f"{one}/00000.png")) for one in ("plain", "out", "again"))
    assert code == 0 and "was painted with" not in said
    assert np.array_equal(out, again) and not np.array_equal(out, plain)


def parsed(*argv):
    return edit_parser().parse_args(["--init_image", "photo.png", *map(str, argv)])


@pytest.mark.parametrize(
    ("argv", "made"),
    [
        (["--method", "diffedit", "--method-option", "threshold=0.3", "--method-option", "draws=4", "--seed", 7],
         DiffEdit(threshold=0.3, draws=4, seed=7)),
        (["--method", "DDS", "--method-option", "iterations=3"], DDS(3)),
        (["--method", "pnp", "--method-option", "feature-steps=[0.1,0.6]"], {"feature_steps": (0.1, 0.6)}),
        (["--method", "masactrl", "--method-option", "start_layer=null"], {"start_layer": None}),
        (["--method-option", "kind=refine", "--method-option", "self_cells=16", "--blend", "red"],
         {"kind": "refine", "self_cells": 16, "local_blend": LocalBlend("red")}),
        (["--method-option", 'cross_replace_steps={"default_": 0.4}', "--weight", "red=2"],
         {"cross_steps": (0.0, 0.4), "equalizer": {"red": 2.0}}),
    ],
)  # fmt: skip
def test_options_of_methods_make_the_editor(argv, made):
    args = parsed(*argv)
    fill(args, {})
    editor = editor_of(args)
    if isinstance(made, dict):
        assert {name: getattr(editor.control, name) for name in made} == made
    else:
        assert editor == made


@pytest.mark.parametrize(
    ("argv", "made"),
    [
        (["fixed_point", "tolerance=1e-3", "iterations=4"], {"tolerance": 1e-3, "iterations": 4}),
        (["proximal", "prox=l1", "quantile=1"], {"prox": "l1", "quantile": 1}),
        (["edit friendly", "eta=0.5"], {"eta": 0.5, "seed": 0}),
        (["dpmpp_2m", "solver_type=taylor"], {"own": {"solver_type": "taylor"}}),
    ],
)
def test_options_of_inversions_make_it(argv, made):
    args = parsed("--inversion", argv[0], *(word for one in argv[1:] for word in ("--inversion-option", one)))
    fill(args, {})
    inversion = inversion_of(args)
    assert {name: getattr(inversion, name) for name in made} == made


def test_all_options_of_methods_and_inversions_are_listed():
    """What has a flag of its own and what takes no number or text beside."""
    own = {"seed", "self", *OF_PROMPT_TO_PROMPT.values(), "mask"}
    for name, kind in EDITORS.items():
        known = inspect.signature(kind).parameters if isinstance(kind, type) else {}
        assert set(known) - own == set(OF_METHODS.get(name, ())), name
    listed = {one: names for whose, names in OF_INVERSIONS.items() for one in whose.split(", ")}
    for name, kind in METHODS.items():
        known = {one.name for one in dataclasses.fields(kind) if one.init}
        known -= {"seed"} | (set() if name == "edit_friendly" else {"eta"})
        assert known == set(listed.get(name, ())), name


def test_like_brings_options_along_to_the_same_method_only(capsys):
    said = {"method": "diffedit", "method_option": ["threshold=0.3", "draws=4"], "weight": ["a=2"],
            "inversion": "belm", "inversion_option": ["x=1"], "feather": 3.0}  # fmt: skip
    for argv, method, inversion, lost in (
        ([], ["threshold=0.3", "draws=4"], ["x=1"], ""),
        (["--method", "swap"], [], ["x=1"], "weight, method option left out: of its method"),
        (["--method", "DiffEdit", "--method-option", "draws=5"], ["threshold=0.3", "draws=5"], ["x=1"], ""),
        (
            ["--method", "dds", "--method-option", "rate=1"],
            ["rate=1"],
            ["x=1"],
            "its weight left out: of its method",
        ),
        (
            ["--inversion", "ddim"],
            ["threshold=0.3", "draws=4"],
            [],
            "its inversion option left out: of its inversion",
        ),
    ):
        args = parsed(*argv)
        fill(args, said)
        assert (args.method_option, args.inversion_option, args.feather) == (method, inversion, 3.0), argv
        out = capsys.readouterr().out
        assert lost in out and bool(lost) == bool(out), argv
    args = parsed("--method", "p2p")
    fill(args, {"weight": ["a=2"]})
    assert args.weight == ["a=2"] and not capsys.readouterr().out


def test_an_edit_is_a_swap_unless_something_of_prompt_to_prompt_is_asked_for():
    swapped, p2p = {"method": "swap"}, "prompt_to_prompt"
    for argv, said, method in (
        ([], {}, "swap"),
        (["--blend", "red"], {}, p2p),
        (["--method", "pnp"], {}, "pnp"),
        (["--self-replace", "0"], {}, p2p),
        ([], swapped, "swap"),
        (["--weight", "red=2"], swapped, p2p),
        (["--weight", "red=2"], {"method": "diffedit"}, "diffedit"),
    ):
        args = parsed(*argv)
        fill(args, said)
        assert (args.method, args.inversion) == (method, "edit_friendly"), (argv, said)


@pytest.mark.slow
def test_a_mask_is_given_to_what_had_none_and_not_left_out_where_there_was_one(home, end, model):
    assert (
        end("--image", "photo.png", *PROMPTS, "--steps", 1, "--no-sheet", "--outdir", "out", *model)[0] == 0
    )
    assert end(*PHOTO, "--like", "out/00000.png", "--no-sheet", *model)[0] == 0
    whole, part = (np.asarray(Image.open(f"out/0000{i}.png")) for i in range(2))
    assert np.array_equal(part[:, :24], np.asarray(Image.open("photo.png"))[:, :24])
    assert not np.array_equal(part[:, :24], whole[:, :24])
    code, _, complaints = end("--image", "photo.png", "--like", "out/00001.png", *model)
    assert code == 5 and "made of another mask" in complaints and "than --mask None" in complaints


@pytest.mark.slow
def test_ways_with_noise_draw_it_from_the_seed(home, end, model):
    """Of the method or of the inversion: another seed, another picture."""
    for i, way in enumerate((["diffedit"], ["add_noise"], ["swap", "--inversion", "edit_friendly"])):
        found = []
        for seed in (7, 8):
            how = ["--steps", 2, "--start-step", 0, "--seed", seed, "--outdir", f"{i}-{seed}", "--no-sheet"]
            code, _, complaints = end("--image", "photo.png", *PROMPTS, "--method", *way, *how, *model)
            assert code == 0 and not complaints, way
            found.append(np.asarray(Image.open(f"{i}-{seed}/00000.png")))
            assert ldm.read_metadata(f"{i}-{seed}/00000.png")["edit"]["seed"] == seed
        assert not np.array_equal(*found), way


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--edit-prompt", EDIT], 2, "an edit needs --prompt, what the picture shows, and got none"),
        (["--prompt", SOURCE], 2, "an edit needs --edit-prompt, what it is to show, and got none"),
        (["--method", "prompt2prompt"], 2, "editor must be one of swap, prompt_to_prompt"),
        (
            ["--method", "swap", "--weight", "blue=2"],
            2,
            "--weight is of prompt_to_prompt, and the method is 'swap'",
        ),
        (["--weight", "blue"], 2, "--weight should be such as snowy=2.5, got 'blue'"),
        (["--weight", "=2"], 2, "--weight should be such as snowy=2.5, got '=2'"),
        (["--weight", "green=2"], 2, "equalizer names 'green'"),
        (["--blend", "ball"], 2, "words of a LocalBlend names 'ball', which is not in 'a red circle'"),
        (["--steps", "4", "--start-step", "4"], 2, "start_step must be a whole number from 0 to 3, got 4"),
        (["--steps", "0"], 2, "--steps"),
        (["--inversion", "dim"], 2, "(did you mean ddim?)"),
        (
            ["--seed", "5", "--inversion", "ddim", "--method", "prompt_to_prompt"],
            2,
            "--seed is of noise, and neither the method 'prompt_to_prompt' nor the inversion 'ddim'",
        ),
        (["--feather", "4"], 2, "feather is of a mask"),
        (["--image", "none.png"], 9, "picture 'none.png' does not exist"),
        (
            ["--image", "mask.png", "--like", "photo.png"],
            3,
            "--like 'photo.png' does not say how it was edited",
        ),
        (["--nothing"], 2, "unknown option '--nothing'"),
        (["--method", "diffedit", "--method-option", "treshold=1"], 2,
         "the editor diffedit has no option treshold (did you mean threshold?); it has strength, draws, threshold"),
        (["--method", "diffedit", "--method-option", "threshold=2"], 2, "threshold must be"),
        (["--method", "diffedit", "--method-option", "threshold=NaN"], 2, "threshold must be"),
        (["--method", "diffedit", "--method-option", "draws=[[1]]"], 2, "draws must be a whole number"),
        (["--method", "swap", "--method-option", "draws=1"], 2, "the editor swap has no option draws; it has none"),
        (["--method-option", "threshold"], 2, "--method-option should be such as threshold=0.3, got 'threshold'"),
        (["--method-option", "=1"], 2, "--method-option should be such as threshold=0.3, got '=1'"),
        (["--method-option", "kind=replace", "--method-option", "kind=refine"], 2, "kind was given twice"),
        (["--method", "dds", "--method-option", "seed=3"], 2, "--method-option seed is given as --seed 3"),
        (["--blend", "red", "--method-option", "local_blend=red"], 2, "--method-option local_blend=... say the same"),
        (["--method", "p2p", "--method-option", "local_blend=red"], 2, "local_blend should be a LocalBlend"),
        (["--inversion-option", "tolerance=1"], 2, "the inversion edit_friendly has no option tolerance"),
        (["--inversion", "anderson", "--inversion-option", "tolerence=1"], 2, "(did you mean tolerance?)"),
        (["--inversion", "anderson", "--inversion-option", "history=eleven"], 2, "history of anderson must be"),
        (["--inversion", "dpmpp_2m", "--inversion-option", "orders=2"], 2, "orders"),
        (["--threshold", "0.3"], 2, "unknown option '--threshold'; write --method-option threshold=..."),
        (["--tolerance=0.3"], 2, "unknown option '--tolerance'; write --inversion-option tolerance=..."),
        (["--lora", "mask.pgn"], 9, "--lora 'mask.pgn' is not there; did you mean 'mask.png'?"),
        (["--embedding", "mask.pgn"], 9, "--embedding 'mask.pgn' is not there"),
        (["--hint", "mask.png"], 2, "--hint 'mask.png' is said of the --control or --t2i-adapter before it"),
        (["--control", "mask.png", "--hint", "photo.png", "--hint", "other.png"], 2,
         "--control 'mask.png' has 2 hints, and an edit is of one picture; give one --hint"),
        (["--control", "mask.png", "--preprocess", "inpaint"], 2, "--preprocess inpaint wants a mask: --mask of "),
        (["--control", "mask.png", "--preprocess", "cany"], 2, "canny"),
        (["--ip-adapter", "mask.png"], 2, "--ip-adapter 'mask.png' has no picture"),
        (["--vae", "none.pt"], 9, "--vae 'none.pt' is not there"),
        (["--ignore-keys", "x", "--lowvram", "--compile"], 2, "leave one of the two out"),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line_and_nothing_written(home, end, model, argv, code, message):
    given = [] if argv[0] in ("--prompt", "--edit-prompt") else ["--prompt", SOURCE, "--edit-prompt", EDIT]
    given += [] if "--image" in argv else ["--image", "photo.png"]
    before = {path.name for path in Path(".").rglob("*")}
    got, said, complaints = end(*given, *argv, *model)
    (line,) = complaints.splitlines()
    assert got == code and message in line and len(line) <= 415
    assert not [path for path in Path(".").rglob("*") if path.is_dir() and path.name not in before]


def test_another_picture_than_the_one_that_was_edited_is_refused(home, end, model):
    said = {
        "mode": "edit",
        "edit": {"prompt": SOURCE, "edit_prompt": [EDIT], "image_hash": "0" * 10, "steps": 2},
    }
    from ldm.metadata import png_info

    Image.open("photo.png").save("edited.png", pnginfo=png_info({"prompt": EDIT, **said}))
    code, _, complaints = end("--image", "photo.png", "--like", "edited.png", *model)
    assert code == 5 and re.search(
        r"made of another image \(hash '0+'\) than --image 'photo.png'", complaints
    )
    assert len(complaints.splitlines()) == 1
    broken = {"mode": "edit", "edit": {**said["edit"], "steps": {"a": 1}}}
    Image.open("photo.png").save("broken.png", pnginfo=png_info({"prompt": EDIT, **broken}))
    code, _, complaints = end("--image", "photo.png", "--like", "broken.png", *model)
    assert code == 3 and "says the steps" in complaints
