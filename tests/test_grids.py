"""Grids: each cell is the picture that its options paint alone, and stands where its labels say."""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora_for
from PIL import Image
from tiny import tiny_model, write_tiny

import ldm
from ldm import options
from ldm.adapters import LoRA
from ldm.axes import NO_AXIS, find_name, in_order, read_axis
from ldm.cli import run
from ldm.cli.grids import grid_parser, read_axes
from ldm.cli.grids import paint_grid as paint_by_script
from ldm.errors import LdmError, UsageError
from ldm.grids import matrix_prompts, plan_grid, plan_matrix
from ldm.option_kinds import Number
from ldm.options import Option
from ldm.pipeline import StableDiffusion

RED, BLUE = "a red circle", "a blue circle"
HOW = {"steps": 1, "seed": 3, "width": 72, "height": 64, "progress": False}
HOW_TO_PLAN = {name: value for name, value in HOW.items() if name != "progress"}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


@pytest.fixture(scope="module")
def grid(sd):
    return sd.grid(RED, ("steps", [1, 2]), "prompt_sr=red,blue", ("seed", "3-7 (+4)"), **HOW)


def pixels(image):
    return np.asarray(image.convert("RGB"))


# What is given, the values, and what stands beside them. The forms are those of A1111's X/Y/Z plot.
READ = [
    ("steps=10,20", (10, 20), ("Steps: 10", "Steps: 20")),
    (("steps", [10, "20"]), (10, 20), ("Steps: 10", "Steps: 20")),
    (("steps", {"few": 10, "many": 20}), (10, 20), ("few", "many")),
    ("steps=1-5", (1, 2, 3, 4, 5), None),
    ("steps=1-5 (+2)", (1, 3, 5), None),
    ("steps=10-5 (-3)", (10, 7), None),
    ("steps=10-8 (-1)", (10, 9, 8), None),  # the web UI leaves 8 out
    ("steps=1-10 [5]", (1, 3, 5, 7, 10), None),
    ("Steps = 7, 1-2 , 9", (7, 1, 2, 9), None),
    ("CFG Scale=0-1 (+0.25)", (0.0, 0.25, 0.5, 0.75, 1.0), None),
    ("guidance_scale=1-2 (+0.3)", (1.0, 1.3, 1.6, 1.9), None),  # the web UI goes on to 2.2
    ("eta=0-1 [3]", (0.0, 0.5, 1.0), ("Eta: 0", "Eta: 0.5", "Eta: 1")),
    ("cfg=0-0.3 (+0.1)", (0.0, 0.1, 0.2, 0.3), None),
    ("sampler=euler,DPM++ 2M Karras", ("euler", "DPM++ 2M Karras"), ("Euler", "DPM++ 2M Karras")),
    ('prompt_sr=red,"a, b", c,', ("red", "a, b", "c", ""), ("red", "a, b", "c", "")),
    ('Prompt S/R="say ""so""",1-5', ('say "so"', "1-5"), None),
    ("size=64x72,128x64", ((64, 72), (128, 64)), ("Size: 64x72", "Size: 128x64")),
    ("prompt_order=a,b", (("a", "b"), ("b", "a")), ("a, b", "b, a")),
    ('guidance_interval="0.2,0.9",0 1', ((0.2, 0.9), (0.0, 1.0)), None),
    ("tiling=true,false", (True, False), ("Tiling: True", "Tiling: False")),
    ("spacing=kl_optimal_open,beta_sigma", ("kl_optimal_open", "beta_sigma"), None),  # A1111 has other words
    (("adapters", [[], [3]]), ([], [3]), ("adapters 1", "adapters 2")),
    ('regions="0,0,0.5,1:a cat"', (((("a cat", (0.0, 0.0, 0.5, 1.0), 1.0),)),), None),
    ("seed=3,5-6", (3, 5, 6), ("Seed: 3", "Seed: 5", "Seed: 6")),
    ("Denoising=0.5", (0.5,), ("Denoising strength: 0.5",)),
    ("Var. strength=0.5", (0.5,), None),
    ("hires_upscaler=Latent (nearest)", ("latent nearest",), None),
    (("eta", [None, 0.5]), (None, 0.5), ("Eta: none", "Eta: 0.5")),
    ("hires_scale=none,1.5", (None, 1.5), ("Hires upscale: none", "Hires upscale: 1.5")),
    ('freeu=None,"1.5,1.6,0.9,0.2"', (None, (1.5, 1.6, 0.9, 0.2)), None),
    ("emphasis=none,ignore", ("none", "ignore"), None),  # a value of its own
    ("hires_prompt=none", ("none",), None),
    (("spacing", [[9.0, 1.0, 0.0]]), ([9.0, 1.0, 0.0],), ("Schedule type: 9.0, 1.0, 0.0",)),
]


def test_axes_are_read_as_the_web_ui_reads_them():
    for given, values, labels in READ:
        axis = read_axis("x", given)
        assert axis.values == values, given
        assert labels is None or axis.labels == labels, given
        if not isinstance(given, tuple):  # what the metadata say reads as the same again
            assert read_axis("x", (axis.name, axis.given)).values == values, given


def test_every_option_is_an_axis(monkeypatch):
    toy = Option(
        "toy_share", 0.25, Number(0, 1), "a toy", section="draw", flags=("--toy",), infotext="Toy part"
    )
    monkeypatch.setattr(options, "TABLE", (*options.TABLE, toy))
    for name in options.keywords().keys() - NO_AXIS.keys():
        assert find_name("x", name) == name
    for given in ("toy_share=0-1 [3]", "toy=0-1 [3]", "Toy part=0-1 [3]"):
        assert read_axis("x", given).values == (0.0, 0.5, 1.0), given


def test_words_change_places_as_in_the_web_ui():
    for prompt, words, wanted in (
        ("a red cat, b", ("cat", "red"), "a cat red, b"),
        ("1 2 3", ("3", "1", "2"), "3 1 2"),
        ("red red-hot", ("red-hot", "red"), "red-hot red"),  # one within another
    ):
        assert in_order(prompt, words) == wanted, prompt


def test_each_cell_is_what_its_options_paint_alone(sd, grid):
    options = list(itertools.product((3, 7), (RED, BLUE), (1, 2)))  # the first axis goes fastest
    for cell, (seed, prompt, steps) in zip(grid.cells, options, strict=True):
        told = cell.parameters
        assert (told.seed, told.prompt, told.steps) == (seed, prompt, steps)
    for i in (1, 2, 7):
        cell, (seed, prompt, steps) = grid.cells[i], options[i]
        alone = sd.txt2img(prompt, **HOW | {"seed": seed, "steps": steps})
        assert np.array_equal(pixels(cell.image), pixels(alone[0])), cell.at
        assert vars(cell.parameters).keys() == vars(alone.parameters[0]).keys()
    assert cell.at == {"x": "Steps: 2", "y": "blue", "z": "Seed: 7"} and len(grid) == 8


def test_each_picture_stands_where_its_labels_say(grid):
    sheet, (width, height) = pixels(grid.image), (72, 64)
    left = 54  # three quarters of a cell
    top = sheet.shape[0] - 2 * height
    assert sheet.shape[1] == 2 * (left + 2 * width)
    for i, cell in enumerate(grid.cells):
        z, (y, x) = i // 4, divmod(i % 4, 2)
        at = z * (left + 2 * width) + left + x * width
        assert np.array_equal(sheet[top + y * height :, at : at + width][:height], pixels(cell.image)), (
            cell.at
        )
    # Something is written above every column, beside every row and over both grids, and nothing in the corner.
    middle = top // 2
    for z in (0, 1):
        begin = z * (left + 2 * width)
        for place in (
            sheet[middle:top, begin + left : begin + left + width],
            sheet[middle:top, begin + left + width : begin + left + 2 * width],
            sheet[top : top + height, begin : begin + left],
            sheet[top + height :, begin : begin + left],
            sheet[:middle, begin : begin + left + 2 * width],
        ):
            assert place.min() < 100
    assert sheet[middle:top, :left].min() == 255


def test_the_grid_says_how_it_was_made(sd, grid, tmp_path):
    path = grid.save(tmp_path)
    told = ldm.read_metadata(path)
    wanted = {"script": "X/Y/Z plot", "x_type": "steps", "x_values": "1,2", "y_values": "red,blue"}
    assert wanted.items() <= told.items() and (told["seed"], told["prompt"]) == (3, RED)
    assert path.name == "grid-0000.png" and not any(name.startswith("fixed") for name in told)
    # Seeds that are left to chance are drawn once for the grid, and told.
    drawn = plan_grid(sd, RED, "steps=1,2", "seed=-1,5,random", **HOW_TO_PLAN | {"seed": None})
    seeds = [cell.request.images[0].seed for cell in drawn.cells]
    assert seeds[0] == seeds[1] and seeds[2:4] == [5, 5] and len(set(seeds)) == 3
    assert drawn.said["fixed_y_values"] == ", ".join(map(str, seeds[::2]))
    assert drawn.cells[0].at["y"] == f"Seed: {seeds[0]}"
    one = plan_grid(sd, RED, "steps=1,2", width=64, height=64)
    assert len({cell.request.images[0].seed for cell in one.cells}) == 1


def test_a_run_that_is_ended_keeps_what_is_painted(sd):
    grid = sd.grid(RED, "steps=1,2", callback=lambda step: step.result is None, **HOW)
    assert grid.interrupted and [image is None for image in grid.images] == [False, True]
    unpainted = plan_grid(sd, RED, "steps=1,2", **HOW_TO_PLAN)
    for what in ("image", "parameters"):
        with pytest.raises(UsageError, match="no cell of the grid was painted; let it run"):
            getattr(unpainted, what)
    assert grid.image.width == 2 * 72 and repr(grid) == "Grid(2 x 1 x 1 cells, 1 painted)"


def test_strengths_of_loras_are_axes(sd, tmp_path):
    file = tmp_path / "ink.safetensors"
    write_lora_for(file, sd.model)
    tags = {"prompt_syntax": "a1111", "lora_dir": tmp_path}
    for given in (
        {"x": f"lora={file}:0.25,{file}:1,none"},
        {"x": "lora_strength=0.25,1", "adapters": [LoRA(file, 9.0, 3.0)]},
        {"x": ("adapters", {"weak": [LoRA(file, 0.25)], "full": [LoRA(file)]})},
        {"x": "prompt_sr=ink:0.25,ink:1", "prompt": f"{RED}<lora:ink:0.25>", **tags},
        {"x": "lora_strength=0.25,1", "prompt": f"{RED}<lora:ink:7>", **tags},
    ):
        cells = plan_grid(sd, **{"prompt": RED, **HOW_TO_PLAN, **given}).cells
        (weak,), (full,), *others = (cell.request.adapters for cell in cells)
        assert (weak.weight, full.weight) == (0.25, 1.0) and weak.file is full.file, given
        assert [lora.text_weight for lora in (weak, full)] in ([None, None], [0.25, 1.0]), given
        assert all(not adapters for adapters in others)
    with pytest.raises(UsageError, match="lora_strength is of the LoRAs that are given"):
        plan_grid(sd, RED, "lora_strength=1")


def test_a_prompt_matrix_is_the_web_uis(sd):
    assert matrix_prompts("a|b, | c|d") == [
        "a",
        "a, b",
        "a, c",
        "a, b, c",
        "a, d",
        "a, b, d",
        "a, c, d",
        "a, b, c, d",
    ]
    assert matrix_prompts("a |b|c", at_start=True, delimiter=" ") == ["a ", "b a ", "c a ", "b c a "]
    plan = plan_matrix(sd, "a|b|c|d", **HOW_TO_PLAN)
    # Of three parts two go along the row: b and c, each struck through where it is left out.
    assert [[one.active for one in labels] for labels in plan.columns] == [
        [False, False],
        [True, False],
        [False, True],
        [True, True],
    ]
    assert [[(one.text, one.active) for one in labels] for labels in plan.rows] == [
        [("d", False)],
        [("d", True)],
    ]
    assert {cell.request.images[0].seed for cell in plan.cells} == {3}
    negative = plan_matrix(
        sd, RED, in_negative=True, negative_prompt="a|b", different_seeds=True, **HOW_TO_PLAN
    )
    assert [
        (one.prompt, one.negative_prompt, one.seed) for cell in negative.cells for one in cell.request.images
    ] == [
        (RED, "a", 3),
        (RED, "a, b", 4),
    ]
    for wrong in ({"delimiter": 3}, {"at_start": "x"}, {"in_negative": None}, {"different_seeds": 1}):
        with pytest.raises(UsageError, match=f"{[*wrong][0]} must be"):
            sd.prompt_matrix("a|b", **wrong)
    painted = sd.prompt_matrix(f"{RED}|{BLUE}", **HOW)
    alone = sd.txt2img(f"{RED}, {BLUE}", **HOW)
    assert np.array_equal(pixels(painted.cells[1].image), pixels(alone[0]))
    assert painted.parameters["script"] == "Prompt matrix" and painted.parameters["prompt"] == f"{RED}|{BLUE}"


# What is given to sd.grid, and words of the one line that comes.
REFUSED = [
    ({}, "a grid needs an axis, got none"),
    ({"x": "stepz=1"}, "x: a grid has no axis 'stepz'; did you mean steps?"),
    ({"x": "hint=a.png"}, "x: a grid has no axis 'hint'; see docs/grids.md"),
    ({"x": "steps"}, "wants an option and its values, as steps=10,20; got 'steps'"),
    ({"x": 3}, 'x must be an option and its values, as ("steps", [10, 20]), got 3'),
    ({"x": ("steps", 3)}, "x: the values of steps must be a list, got 3"),
    ({"x": ("steps", [])}, "x: steps has no values"),
    ({"y": "steps="}, "y: steps has no values"),
    ({"y": "steps=1,,2"}, "y: steps: wanted a whole number from 1 to 1000, got ''"),
    ({"x": "steps=0"}, "x: steps: wanted a whole number from 1 to 1000, got '0'"),
    ({"x": ("steps", [1.5])}, "x: steps must be a whole number from 1 to 1000, got 1.5"),
    ({"x": "steps=5-1"}, "the range '5-1' never comes to its end"),
    ({"x": "steps=1-5 (+0)"}, "the range '1-5 (+0)' never comes to its end"),
    ({"x": "steps=1-5 [0]"}, "the range '1-5 [0]' has no values"),
    ({"x": "steps=1-20000"}, "an axis has at most 10000 values, got 20000"),
    ({"x": "seed=1-" + "9" * 5000}, "a range of numbers too long"),
    ({"x": 'prompt_sr="red'}, "cannot read the values"),
    ({"x": ("prompt_sr", [3])}, "a value of prompt_sr must be a text, got 3"),
    ({"x": ("prompt", [None])}, "a value of prompt must be a text, got None"),
    ({"x": "prompt_sr=green,blue"}, "the grid replaces 'green', the first value of prompt_sr"),
    ({"x": "prompt_order=red,green"}, "'green' is not in 'a red circle'"),
    ({"x": "prompt_order=a,b,c,d,e,f,g,h"}, "prompt_order wants up to 7 texts"),
    ({"x": "num_images=1,2"}, "no axis of a grid goes along num_images: a cell is one picture"),
    ({"x": "steps=1", "y": "ddim_steps=2"}, "two axes of the grid go along steps"),
    ({"x": "steps=1-101", "y": "seed=1-100"}, "a grid has at most 10000 cells, got 101 x 100"),
    ({"x": "seed=1-60", "width": 2048, "height": 2048}, "at most 200 million pixels"),
    ({"x": "sampler=euler,eular"}, "in the grid's cell of 'sampler (eular)': the sampler must be"),
    ({"x": "eta=0.5", "num_images": 2}, "num_images of a grid is 1, got 2"),
    ({"x": "eta=0.5", "seed": [1, 2]}, 'a list of seeds is an axis of its own, as x=("seed", [1, 2])'),
    ({"x": "eta=0.5", "prompt": [RED]}, "prompt of a grid must be one text"),
    ({"x": "steps=1", "stepz": 2}, "did you mean steps"),
]


def test_a_bad_axis_is_refused_in_one_line_before_anything_is_painted(sd):
    for given, words in REFUSED:
        with pytest.raises(LdmError) as found:
            plan_grid(sd, **{"prompt": RED, **given})
            pytest.fail(f"{given} passed")
        assert words in str(found.value) and len(str(found.value)) <= 400 and "\n" not in str(found.value), (
            given
        )
    for text, words in (("a", "a prompt matrix is written"), ("a" + "|b" * 14, "at most 13 parts")):
        with pytest.raises(UsageError, match=words):
            plan_matrix(sd, text)


@pytest.fixture
def end(tmp_path, capsys):
    """Run the script to its exit on the tiny model: (code, what it said)."""
    checkpoint, config = write_tiny(tmp_path)
    model = ["--ckpt", str(checkpoint), "--config", str(config), "--device", "cpu", "--outdir", str(tmp_path)]

    def ending(*words):
        with pytest.raises(SystemExit) as stop:
            run(
                lambda argv: paint_by_script(grid_parser().parse_args(argv)),
                [*model, "--prompt", f"{RED}|{BLUE}", "--steps", "1", *words],
            )
        return stop.value.code, capsys.readouterr()

    return ending


def test_the_script_saves_each_cell_and_the_grid(end, tmp_path):
    code, said = end("--x", "seed=3-4", "--y", "prompt_sr=red,green")
    assert code == 0 and "00003.png (Seed: 4; green)" in said.out, said
    told = ldm.read_metadata(tmp_path / "grid-0000.png")
    assert (told["x_values"], told["y_type"], told["seed"]) == ("3,4", "prompt_sr", 3)
    assert ldm.read_metadata(tmp_path / "samples" / "00003.png")["prompt"] == f"a green circle|{BLUE}"
    for words, line in (
        (("--x", "stepz=1"), "x: a grid has no axis 'stepz'; did you mean steps?"),
        ((), "a grid needs an axis, as --x steps=10,20, or --matrix prompt; got none"),
        (("--x", "steps=1", "--matrix", "prompt"), "--x and --matrix name two kinds of grid"),
        (("--x", "steps=1", "--n_iter", "2"), "got 2 pictures a cell"),
    ):
        code, said = end(*words)
        assert code == 2 and said.err.startswith("ldm: error: ") and line in said.err, words
        assert said.err.count("\n") == 1, words
    assert len(list(tmp_path.rglob("*.png"))) == 5


@pytest.mark.slow
def test_the_script_explains_a_matrix_and_paints_nothing(end, tmp_path):
    code, said = end("--matrix", "prompt", "--matrix-seeds", "--matrix-join", "space", "--explain")
    assert code == 0 and f"plain: '{RED} {BLUE}'" in said.out and not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_the_script_begins_with_a_picture_where_one_is_given(end, tmp_path):
    Image.linear_gradient("L").resize((72, 64)).save(tmp_path / "a.png")
    code, said = end("--init-img", str(tmp_path / "a.png"), "--x", "strength=0,1", "--y", "seed=3")
    assert code == 0, said.err
    first, last = (Image.open(tmp_path / "samples" / f"0000{i}.png") for i in (0, 1))
    given = Image.open(tmp_path / "a.png").convert("RGB")
    assert np.array_equal(pixels(first), pixels(given)) and not np.array_equal(pixels(last), pixels(given))
    code, said = end("--mask", str(tmp_path / "a.png"), "--x", "strength=0,1")
    assert code == 2 and "--mask is of a picture; give it as --init-img" in said.err
    code, said = end("--x", "strength=0,1")
    assert code == 2 and "strength is for a picture to start from" in said.err


PAGE = (Path(__file__).parents[1] / "docs" / "grids.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_and_ranges_of_the_page_are_understood():
    assert [language for language, _ in BLOCKS] == ["python", "bash", "python"]
    for command in BLOCKS[1][1].splitlines():
        read_axes(grid_parser().parse_args(shlex.split(command)[2:]))
    for text, values in re.findall(r"^\| `([^`=]+)` \| ([\d, ]+)", PAGE, re.MULTILINE):
        assert ", ".join(map(str, read_axis("x", ("steps", text)).values)) == values.strip(), text


@pytest.mark.slow
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/grids.md", "exec"), {})
