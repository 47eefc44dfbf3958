"""An option is written once: from its one entry the command line, prompt files, pictures and keywords know it."""

import ast
import copy
import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_model

import ldm
from ldm import options
from ldm.adapters import PAG, SAG, AttentionSlicing, FreeU, SeamlessTiling, use
from ldm.cli import painting_parser, read_prompts
from ldm.errors import OptionError, UsageError
from ldm.metadata import from_infotext, to_infotext
from ldm.option_kinds import Number, Whole
from ldm.options import Option
from ldm.pipeline import StableDiffusion

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def test_a_new_option_needs_one_entry(sd, tmp_path, monkeypatch):
    toy = Option(
        "toy_share",
        0.25,
        Number(0, 1),
        "a toy",
        section="draw",
        flags=("--toy",),
        also=("plaything",),
        infotext="Toy",
    )
    monkeypatch.setattr(options, "TABLE", (*options.TABLE, toy))
    # the command line, with others' name for it and the nearest of a misspelt one
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    for words, value in (((), 0.25), (("--toy", "0.5"), 0.5), (("--plaything=1",), 1)):
        assert parser.parse_args(words).toy_share == value
    assert "a toy (default: 0.25)" in " ".join(parser.format_help().split())
    with pytest.raises(UsageError, match="argument --toy: wanted a number from 0 to 1, got '2'"):
        parser.parse_args(["--toy", "2"])
    with pytest.raises(UsageError, match="did you mean '--toy'"):
        parser.parse_args(["--toys", "2"])
    # prompt files
    (tmp_path / "p.txt").write_text("--prompt a --toy 0.5\n")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "toy-share": 0.5}))
    for name in ("p.txt", "p.jsonl"):
        assert read_prompts(str(tmp_path / name))[0].options == {"toy_share": 0.5}
    # keywords
    request = sd.plan(PROMPT, toy_share=1)
    assert (sd.plan(PROMPT).toy_share, request.toy_share, request.draw.toy_share) == (0.25, 1.0, 1.0)
    with pytest.raises(UsageError, match="toy_share must be a number from 0 to 1, got 'x'"):
        sd.plan(PROMPT, toy_share="x")
    with pytest.raises(OptionError, match="'toy_shar' .did you mean toy_share"):
        sd.txt2img(PROMPT, toy_shar=1)
    # pictures, there and back, and --like
    out = sd.txt2img(PROMPT, toy_share=0.75, steps=1, seed=3, progress=False)
    path = out.save(tmp_path)[0]
    assert out.parameters[0].toy_share == ldm.read_metadata(path)["toy_share"] == 0.75
    assert ", Toy: 0.75" in out.infotexts[0] and from_infotext(out.infotexts[0])["toy_share"] == 0.75
    assert "Toy" not in to_infotext({"prompt": "a", "steps": 1, "toy_share": 0.25})
    assert parser.parse_args(["--like", str(path)]).toy_share == 0.75
    assert parser.parse_args(["--like", str(path), "--toy", "0.5"]).toy_share == 0.5


def test_every_option_is_what_its_entry_says():
    names = [one.name for one in options.options()]
    assert len(set(names)) == len(names)
    for one in options.options():
        assert one.words and (one.keyword or one.flags) and one.section in options.SECTIONS, one.name
        assert set(one.beside) <= set(names), one.name
        assert "{" not in one.words.format(scale=1) and len(one.words) < 200, one.name
    keys = [entry.infotext for entry in options.TABLE if entry.infotext]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("guidance_interval", "0.2, 0.9", (0.2, 0.9)),
        ("rng", "GPU", "nv"),
        ("seed", " -1 ", None),
        ("batch_size", "auto", "auto"),
        ("fixed_code", "True", True),
        ("freeu", "1.5,1.6, 0.9 0.2", (1.5, 1.6, 0.9, 0.2)),
        ("tiling", "", True),
        ("steps", "7", 7),
        ("guidance_scale", "7", 7.0),
        ("prompt", "--x", "--x"),
    ],
)
def test_a_kind_reads_what_it_writes(name, text, value):
    (option,) = (one for one in options.options() if one.name == name)
    assert option.kind.parse(text) == value
    if value not in (None, "auto"):
        plain = option.kind.plain(value)
        assert option.kind.take(json.loads(json.dumps(plain))) == plain
        assert option.kind.read(option.kind.write(value)) == plain


# Where an option's name stands as a text beside its entry, and why.
ELSEWHERE = {
    "ldm/request.py": (
        "what needs the model or several options together",
        "cache_interval cache_depth merge_ratio merge_seed height width strength regions arithmetic outpaint",
    ),
    "ldm/checks/further.py": (
        "what becomes of hires fix and loops",
        "hires_scale hires_size hires_steps hires_strength hires_prompt hires_negative_prompt hires_sampler "
        "hires_spacing hires_upscaler hires_guidance_scale upscaler_dir loops loop_strength loop_curve sampler "
        "steps spacing eta arithmetic mask_rule mask_cells kept strength_rule height width guidance_scale strength",
    ),
    "ldm/checks/picture.py": (
        "sizes, and what needs a frame",
        "height width strength outpaint upscale_by loops",
    ),
    "ldm/checks/around.py": (
        "what goes together, and into frames and tiles",
        "color_match inpaint_fill inpaint_full_res inpaint_full_res_padding mask_blur mask_blur_x mask_blur_y "
        "mask_invert outpaint resize_mode strength strength_rule upscale_by upscale_overlap upscaler regions",
    ),
    "ldm/checks/prompts.py": (
        "one for each prompt; what goes with regions",
        "negative_prompt regions width height",
    ),
    "ldm/checks/sampling.py": (
        "what a sampler has, and the model's networks",
        "sampler steps spacing eta strength_rule cache_interval cache_depth merge_ratio merge_seed",
    ),
    "ldm/checks/seeds.py": (
        "what goes together",
        "variation_seed variation_strength seed_resize_from eta_noise_seed_delta rng fixed_code batch_size num_images",
    ),
    "ldm/passes.py": ("the fields of a pass", "guidance height width strength negative_prompt upscaler"),
    "ldm/generate.py": ("keywords of denoise", "mask_rule steps"),
    "ldm/finishing.py": ("how many there were in the batch", "batch_size"),
    "ldm/results.py": ("of the class Progress", "steps"),
    "ldm/pipeline.py": (
        "img2img's default, what no picture is given as, what upscale calls them",
        "strength output_type height width upscale_by upscale_overlap",
    ),
    "ldm/metadata.py": (
        "A1111's size, prompts and eta; kinds and strengths of adapters; what ComfyUI's graph has",
        "negative_prompt sampler width height strength eta control scale hires_scale hires_size hires_strength loras",
    ),
    "ldm/advice.py": ("kinds of advice", "steps strength sigma_min sigma_max"),
    "ldm/cli/painting.py": (
        "files are read, samplers resolved, pictures counted",
        "plms dpm_solver sampler spacing height width lora embedding guidance_scale negative_prompt batch_size "
        "n_iter variation_seed variation_strength rng",
    ),
    "ldm/cli/painting_options.py": (
        "what --like leaves out beside another sampler, or where nothing is masked",
        "sampler plms dpm_solver outpaint spacing eta rng hires_scale hires_size",
    ),
    "ldm/cli/prompts.py": ("two flags name samplers", "sampler plms dpm_solver"),
    "scripts/txt2img.py": ("", ""),
    "scripts/img2img.py": ("", ""),
    "scripts/inpaint.py": ("", ""),
}


@pytest.mark.parametrize("file", ELSEWHERE)
def test_no_other_file_spells_an_options_name(file):
    names = {name for one in options.options() for name in (*one.names, *one.flags)} - {
        "prompt",
        "seed",
        "denoise",
    }
    tree = ast.walk(ast.parse((ROOT / file).read_text()))
    found = {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert found & names == set(ELSEWHERE[file][1].split())


# Files that spell flags of options, or their keys of several words in A1111's text, and which.
SPELT = {
    "ldm/cli/adapters.py": "--control --embedding --ip-adapter --lora --t2i-adapter Lora_hashes TI_hashes",
    "ldm/cli/controls.py": "--control --hint --image-encoder --ip-adapter --ip-image --ip-mask --t2i-adapter",
    "ldm/metadata.py": "Lora_hashes TI_hashes",
    "ldm/sampler_names.py": "--dpm_solver --plms",
    # Programs of their own.
    "ldm/cli/guided.py": "--batch_size --seed",
    "ldm/cli/editing_options.py": "--negative-prompt --prompt --scale --seed --steps",
    "scripts/merge.py": "--lora",
    "scripts/sample_diffusion.py": "--eta --n_samples --prompt --scale",
    "scripts/train.py": "--seed",
}


def test_no_other_file_spells_an_options_flag_or_key():
    """In any file: a flag is added, and a key written or read, by its option's entry alone."""
    words = {flag for one in options.options() for flag in one.flags}
    words |= {entry.infotext for entry in options.TABLE if " " in (entry.infotext or "")}
    for path in [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        file = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        if file == "ldm/options.py" or not any(word in source for word in words):
            continue
        found = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        assert {str(one).replace(" ", "_") for one in found & words} <= set(SPELT.get(file, "").split()), file


FOR_ADAPTERS = {
    "freeu": (1.5, 1.6, 0.9, 0.2),
    "pag_scale": 3.0,
    "sag_scale": 0.75,
    "tiling": True,
    "attention_slicing": True,
}


def test_options_that_stand_for_adapters_paint_as_these_do(sd, tmp_path):
    """By keyword, by the script's flags, by a line of a prompt file, and by --like; off is what they are by default."""
    own = {one.name for one in options.options() if one.section == "network" and one.keyword}
    assert own == set(FOR_ADAPTERS) == set(use.OF_OPTIONS)
    how = {"steps": 1, "seed": 3, "progress": False}
    plain = sd.txt2img(PROMPT, **how)
    assert sd.plan(PROMPT).attachments == [] and "FreeU" not in plain.infotexts[0]
    given = [FreeU(1.5, 1.6, 0.9, 0.2), PAG(3), SAG(0.75), SeamlessTiling(), AttentionSlicing()]
    want, got = sd.txt2img(PROMPT, adapters=given, **how), sd.txt2img(PROMPT, **FOR_ADAPTERS, **how)
    assert (want[0].tobytes(), want.latents.tolist()) == (got[0].tobytes(), got.latents.tolist())
    assert got[0].tobytes() != plain[0].tobytes()
    text = got.infotexts[0]
    assert 'FreeU: "1.5, 1.6, 0.9, 0.2", PAG Scale: 3.0, SAG Guidance Scale: 0.75, Tiling: True' in text
    path = got.save(tmp_path)[0]
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    flags = ["--freeu", "1.5,1.6,0.9,0.2", "--pag", "3", "--sag", "0.75", "--tiling", "--attention-slicing"]
    (tmp_path / "p.txt").write_text(f"--prompt a {' '.join(flags)}\n")
    said = {name: value for name, value in FOR_ADAPTERS.items() if name != "attention_slicing"}
    for found, wanted in (
        (vars(parser.parse_args(flags)), FOR_ADAPTERS),
        (read_prompts(str(tmp_path / "p.txt"))[0].options, FOR_ADAPTERS),
        (vars(parser.parse_args(["--like", str(path)])), said | {"freeu": [1.5, 1.6, 0.9, 0.2]}),
        (from_infotext(text), said | {"freeu": [1.5, 1.6, 0.9, 0.2]}),
    ):
        assert {name: found[name] for name in wanted} == wanted


def test_refused_values_of_options_for_adapters(sd):
    for values, words in (
        ({"freeu": (1, 2, 3)}, "freeu must be 4 numbers from 0 to 10 each, got (1, 2, 3)"),
        ({"freeu": (1, 2, 3, float("nan"))}, "freeu must be 4 numbers"),
        ({"freeu": "1,2,3,4"}, "freeu must be 4 numbers from 0 to 10 each, got '1,2,3,4'"),
        ({"freeu": (1, 2, 3, 11)}, "freeu must be 4 numbers"),
        ({"pag_scale": -1}, "pag_scale must be a number from 0 to 100, got -1"),
        ({"sag_scale": "x"}, "sag_scale must be a number from 0 to 100, got 'x'"),
        ({"tiling": 1}, "tiling must be True or False, got 1"),
    ):
        with pytest.raises(UsageError) as caught:
            sd.plan(PROMPT, **values)
        assert words in str(caught.value), values
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    for words, message in (
        (["--freeu", "1,2,3"], "argument --freeu: wanted 4 numbers with commas between, got '1,2,3'"),
        (["--freeu", "1,2,3,x"], "argument --freeu: wanted a number from 0 to 10, got 'x'"),
        (["--pag", "strong"], "argument --pag/--pag-scale: wanted a number from 0 to 100"),
    ):
        with pytest.raises(UsageError) as caught:
            parser.parse_args(words)
        assert message in str(caught.value), words


def test_a_request_has_every_keyword_in_its_section(sd):
    """Those of a pass in each pass; and in short as attributes, which are the first pass's."""
    request = sd.plan(
        PROMPT, steps=3, hires_scale=1.5, hires_steps=2, hires_sampler="euler", hires_prompt="b"
    )
    first, second = request.passes
    assert (first.steps, second.steps, request.steps, request.guidance is first.guidance) == (3, 2, 3, True)
    assert (first.sampler, second.sampler, request.sampler, second.guidance_scale) == (
        "ddim",
        "euler",
        "ddim",
        7.5,
    )
    assert [one.images(request.images)[0].prompt for one in request.passes] == [PROMPT, "b"]
    assert (first.size, second.size, request.size) == ((64, 64), (96, 96), (96, 96))
    for one in options.options():
        if not one.keyword or one.section == "images":
            continue
        holders = {"size": request.passes}.get(one.section)
        if one.section in ("sampling", "guidance", "start"):
            holders = [getattr(pass_, one.section) for pass_ in request.passes]
        for holder in holders or [getattr(request, one.section)]:
            assert one.name in vars(holder), one.name
        assert getattr(request, one.name) == getattr(
            (holders or [getattr(request, one.section)])[0], one.name
        )


def test_what_is_frozen_stays_and_is_replaced(sd):
    request = sd.plan(PROMPT, steps=3)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        request.steps = 4
    assert (request.replace(steps=4).steps, request.steps) == (4, 3)
    other = request.replace(rng="nv", width=72, eta=0.5, num_images=2, tiling=True, adapters=(1,))
    assert (other.draw.rng, other.passes[0].width, other.passes[0].sampling.eta) == ("nv", 72, 0.5)
    assert (other.num_images, other.network.tiling, other.adapters, other.steps) == (2, True, (1,), 3)
    for frozen in (request.draw, request.passes[0], request.passes[0].start):
        with pytest.raises(AttributeError, match="frozen|cannot assign"):
            frozen.strength = 1
    with pytest.raises(AttributeError, match="Request has no stepps"):
        request.stepps  # noqa: B018
    assert copy.deepcopy(request.passes[0]).steps == 3
    with pytest.raises(TypeError, match="Request has no stepps"):
        request.replace(stepps=4)


def test_like_reads_a1111s_words_and_says_those_that_are_not_known(tmp_path, capsys):
    parser = painting_parser("txt2img.py", "", outdir="o", scale=7.5)
    for words, emphasis in {
        "Emphasis: None": "none",
        "Emphasis: No norm": "no norm",
        "Emphasis: Original": "original",
        "Emphasis: Loud": None,
    }.items():
        info = PngInfo()
        info.add_text("parameters", f"a (cat:1.2)\nSteps: 9, Seed: 5, Sampler: Euler a, {words}")
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
        found = parser.parse_args(["--like", str(tmp_path / "a.png")])
        assert (found.prompt_syntax, found.emphasis, found.steps) == ("a1111", emphasis, 9), words
        assert ("its Emphasis 'Loud' is not known here" in capsys.readouterr().out) == (emphasis is None)


def test_like_leaves_what_no_option_takes_as_it_is(tmp_path, capsys):
    """Anybody may have written a picture's text: each option with values of other kinds."""
    parser = painting_parser("txt2img.py", "", outdir="o", scale=7.5)
    common = vars(parser.parse_args(["--prompt", "a"]))
    for one in options.told():
        for value in ({"a": 1}, ["a", 2.5], [1, 2, 3], True, 2.5):
            if one.kind.take(value) is not None:
                continue
            told = {"prompt": "a", "seed": 42, one.name: value}
            info = PngInfo()
            info.add_text("ldm", json.dumps({"schema": 1, "parameters": told}))
            Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
            if one.name in common:
                found = vars(parser.parse_args(["--like", str(tmp_path / "a.png")]))
                wanted = None if one.name == "prompt" else common[one.name]
                assert found[one.name] == wanted, (one.name, value)
                assert "is not known here; left as it is" in capsys.readouterr().out, (one.name, value)


def fits(value, schema):
    """Tell whether a value is what a JSON Schema says, by those of its words that ours has."""
    kinds = {
        "string": str, "boolean": bool, "array": list, "null": type(None), "object": dict, "integer": int,
        "number": (int, float),
    }  # fmt: skip
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(
            value == one and type(value) is type(one) for one in schema.get("enum", [schema.get("const")])
        )
    if not isinstance(value, kinds[schema["type"]]) or (
        isinstance(value, bool) and schema["type"] != "boolean"
    ):
        return False
    if isinstance(value, list):
        items = [*schema.get("prefixItems", ()), *[schema.get("items")] * len(value)]
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) and all(
            fits(one, item) for one, item in zip(value, items, strict=False)
        )
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, dict):
        known = schema["properties"]
        return all(name in value for name in schema["required"]) and all(
            name in known and fits(one, known[name]) for name, one in value.items()
        )
    return value is None or schema.get("minimum", value) <= value <= schema.get("maximum", value)


VALUES = (
    None, True, False, -1, 0, 1, 2, 0.5, 9, 17, 1.5, 1001, 2**64, 1e9, "", "x", "random", "auto", "nv", "a1111",
    "latent", "original", "Latent", [], [0, 1], [0.2, 0.9], [64, 72], [1, 2, 3, 4], [2, 1, 0.0], ["a"],
    ["a", [0, 0, 1, 1]], [["a", [0, 0, 1, 1], 2]], [["a", [0, 0, 2, 1]]], {"a": 1},
)  # fmt: skip


def test_the_schema_says_what_the_options_take(monkeypatch):
    """Every keyword with its default; and it takes the values that the option's own check takes."""
    schema = options.schema()
    keywords = options.keywords()
    assert list(schema["properties"]) == ["prompt", *keywords]
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    checked_further = {"regions", "guidance_interval"}  # several numbers together
    for name, default in keywords.items():
        option, about = options.option(name), schema["properties"][name]
        assert (
            about["x-section"] == option.section and about["description"] and fits(about["default"], about)
        ), name
        assert about["default"] == (None if default is None else option.kind.plain(default)), name
        for value in VALUES if not option.each and name != "spacing" else ():
            try:
                taken = value is None and default is None
                taken = taken or option.kind.check(name, value) is not None
            except UsageError:
                taken = isinstance(option.kind, Whole) and value is not None and value == option.kind.word
            if not (name in checked_further and fits(value, about)):
                assert fits(value, about) == taken, (name, value)
    for value in (3, "random", -1, None, [1, -1]):
        assert fits(value, schema["properties"]["seed"]), value
    for value in (-2, [], "x", [2**64]):
        assert not fits(value, schema["properties"]["seed"]), value
    for value, fit in (("karras", True), ([9.0, 3.0, 0.0], True), (None, True), (3, False), (["a"], False)):
        assert fits(value, schema["properties"]["spacing"]) == fit, value
    assert fits({"prompt": ["a", "b"], "steps": 9, "hires_size": [96, 80], "freeu": None}, schema)
    assert not fits({"steps": 9}, schema) and not fits({"prompt": "a", "stepps": 9}, schema)
    toy = Option("toy_share", 0.25, Number(0, 1), "a toy", section="draw")
    monkeypatch.setattr(options, "TABLE", (*options.TABLE, toy))
    assert options.schema()["properties"]["toy_share"] == {
        "type": "number", "minimum": 0, "maximum": 1, "description": "a toy", "x-section": "draw", "x-group": "how",
        "default": 0.25,
    }  # fmt: skip
