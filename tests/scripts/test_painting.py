"""txt2img, img2img and inpaint as a user runs them: options, files, exit codes, and nothing left half done."""

import importlib.util
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_lora_for
from PIL import Image, PngImagePlugin
from tiny import tiny_model, write_tiny

import ldm
from ldm.cli import Line, painting_parser, read_prompts, run
from ldm.errors import AbsentError, FormatError, UsageError
from ldm.options import line_names

ROOT = Path(__file__).parents[2]
LAST = 2**64 - 1  # of the seeds
SLOW = partial(pytest.param, marks=pytest.mark.slow)  # one more row of a law that quick rows show


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint, config = write_tiny(tmp_path_factory.mktemp("model"))
    return ["--ckpt", str(checkpoint), "--config", str(config), "--device", "cpu"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def end(capsys):
    """Run a script to its exit: (code, stdout, stderr)."""

    def ending(name, *argv):
        with pytest.raises(SystemExit) as stop:
            run(script(name), [str(word) for word in argv])
        return (stop.value.code, *capsys.readouterr())

    return ending


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def picture(path, size=(72, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, box=(40, 0, 72, 64), size=(72, 64)):
    image = Image.new("L", size)
    image.paste(255, box)
    image.save(path)


# --- txt2img ---


def test_names_numbers_and_metadata_are_as_promised(model, home, end):
    argv = [
        "--prompt",
        'a "red" circle',
        "--negative_prompt",
        "blue",
        "--steps",
        2,
        "--n_samples",
        2,
        "--n_iter",
        2,
    ]
    code, out, err = end("txt2img", *model, *argv, "--outdir", "o")
    assert (code, err) == (0, "")
    assert files("o") == ["grid-0000.png", *(f"samples/{i:05}.png" for i in range(4))]
    assert "00003.png (seed 45)" in out and out.splitlines()[-1].endswith("waiting for you here: o")
    told = [ldm.read_metadata(f"o/samples/{i:05}.png") for i in range(4)]
    assert [one["seed"] for one in told] == [42, 43, 44, 45]
    assert {one["prompt"] for one in told} == {'a "red" circle'} and told[0]["guidance_scale"] == 7.5
    assert len(told[0]["model_hash"]) == 10 and told[0]["model"] == "tiny"
    assert Image.open("o/grid-0000.png").size == (2 * 66 + 2, 2 * 66 + 2)
    assert ldm.read_metadata("o/grid-0000.png")["seed"] == 42
    assert (
        Image.open("o/samples/00000.png")
        .info["parameters"]
        .startswith('a "red" circle\nNegative prompt: blue\n')
    )
    assert end("txt2img", *model, *argv, "--outdir", "o")[0] == 0
    assert len(files("o")) == 10  # nothing was overwritten


@pytest.mark.slow
def test_skips_rows_and_silence_about_the_making(model, home, end):
    base = ["--prompt", "x", "--ddim_steps", 1, "--n_samples", 3, "--outdir"]
    assert end("txt2img", *model, *base, "a", "--skip_grid")[0] == 0
    assert end("txt2img", *model, *base, "b", "--skip_save", "--n_rows", 1)[0] == 0
    assert end("txt2img", *model, *base, "c", "--skip_save", "--skip_grid", "--no_metadata")[0] == 0
    assert end("txt2img", *model, *base, "d", "--no_metadata")[0] == 0
    assert [len(files(f)) for f in "abcd"] == [3, 1, 0, 4]
    assert Image.open("b/grid-0000.png").size == (68, 3 * 66 + 2)
    for silent in ("d/samples/00000.png", "d/grid-0000.png"):
        assert Image.open(silent).info == {} == ldm.read_metadata(silent)


@pytest.mark.parametrize(
    ("flags", "sampler"),
    [
        ([], "ddim"),
        (["--plms"], "plms"),
        SLOW(["--plms", "--dpm_solver"], "dpm_solver"),
        (["--sampler", "DPM++ 2M"], "dpmpp_2m"),
        SLOW(["--sampler", "PNDMScheduler"], "plms"),
    ],
)
@pytest.mark.thinned(5)
def test_samplers_by_flag_and_by_name(model, home, end, flags, sampler):
    assert end("txt2img", *model, "--prompt", "x", "--steps", 2, "--skip_grid", *flags)[0] == 0
    told = ldm.read_metadata("outputs/txt2img-samples/samples/00000.png")
    assert told["sampler"] == sampler and told["steps"] == 2


def test_every_option_reaches_the_picture(model, home, end):
    argv = [
        "--prompt",
        "x",
        "--H",
        80,
        "--width",
        88,
        "--cfg-scale",
        3,
        "--ddim_eta",
        0.5,
        "--seed",
        7,
        "--C",
        4,
    ]
    argv += ["--f", 8, "--steps", 2, "--n_samples", 2, "--n_iter", 2, "--fixed_code", "--rng", "compvis"]
    assert end("txt2img", *model, *argv, "--precision", "bfloat16", "--outdir", "o")[0] == 0
    told = ldm.read_metadata("o/samples/00003.png")
    want = {
        "width": 88,
        "height": 80,
        "guidance_scale": 3.0,
        "eta": 0.5,
        "rng": "compvis",
        "dtype": "bfloat16",
    }
    assert want.items() <= told.items() and told["batch_index"] == 1 and told["seed"] == 7
    assert Image.open("o/samples/00003.png").size == (88, 80)


@pytest.mark.slow
def test_knobs_reach_the_picture(model, home, end):
    argv = ["--guidance_interval", 0.2, 0.8, "--cache_interval", 2, "--cache_depth", 3, "--merge_ratio", 0.4]
    argv += ["--merge_seed", 11, "--prompt", "x", "--steps", 4, "--skip_grid", "--outdir", "o"]
    assert end("txt2img", *model, *argv)[0] == 0
    assert end("txt2img", *model, *argv[-7:])[0] == 0
    told, plain = (ldm.read_metadata(f"o/samples/0000{i}.png") for i in (0, 1))
    names = ("guidance_interval", "cache_interval", "cache_depth", "merge_ratio", "merge_seed")
    assert [told[name] for name in names] == [[0.2, 0.8], 2, 3, 0.4, 11]
    assert [plain[name] for name in names] == [[0.0, 1.0], 1, 1, 0.0, None]
    a, b = (np.asarray(Image.open(f"o/samples/0000{i}.png")) for i in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance_interval", 0.8, 0.2], "with 0 <= low <= high <= 1, got [0.8, 0.2]"),
        (["--guidance_interval", 0, 1.5], "wanted a number from 0 to 1, got '1.5'"),
        (["--guidance_interval", 0.5], "expected 2 arguments"),
        (["--cache_interval", 0], "wanted a whole number from 1 to 1000, got '0'"),
        (["--cache_depth", 9], "cache_depth must be a whole number from 1 to 4, got 9"),
        (["--merge_ratio", 0.8], "wanted a number from 0 to 0.75, got '0.8'"),
        (["--merge_seed", "random"], "wanted a whole number from 0 to 18446744073709551615, got 'random'"),
    ],
)
def test_knobs_out_of_range_are_refused(model, home, end, flags, words):
    code, out, err = end("txt2img", *model, "--prompt", "x", "--steps", 2, *flags)
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(Path().rglob("*.png"))


@pytest.mark.slow
def test_a_random_seed_is_told(model, home, end):
    for folder in "ab":
        assert (
            end("txt2img", *model, "--prompt", "x", "--steps", 1, "--seed", "random", "--outdir", folder)[0]
            == 0
        )
    seeds = [ldm.read_metadata(f"{folder}/samples/00000.png")["seed"] for folder in "ab"]
    assert seeds[0] != seeds[1]


@pytest.mark.slow
def test_the_same_command_gives_the_same_pixels(model, home, end):
    for folder in "ab":
        assert end("txt2img", *model, "--prompt", "x", "--steps", 2, "--outdir", folder)[0] == 0
    a, b = (np.asarray(Image.open(f"{folder}/samples/00000.png")) for folder in "ab")
    assert np.array_equal(a, b)
    assert ldm.read_metadata("a/samples/00000.png") == ldm.read_metadata("b/samples/00000.png")


# --- prompts from a file ---


@pytest.mark.parametrize("batch", [SLOW(2), 3, SLOW(7)])
def test_five_prompts_make_five_pictures_a_round(model, home, end, batch):
    Path("p.txt").write_text("\ufeffa cat\n\r\n  a dog \n--H 9 is text\na: b, c\nlast", encoding="utf-8")
    argv = [
        "--from-file",
        "p.txt",
        "--steps",
        1,
        "--n_samples",
        batch,
        "--n_iter",
        2,
        "--skip_grid",
        "--outdir",
        "o",
    ]
    assert end("txt2img", *model, *argv)[0] == 0
    told = [ldm.read_metadata(f"o/samples/{i:05}.png") for i in range(10)]
    prompts = ["a cat", "a dog", "--H 9 is text", "a: b, c", "last"]
    assert [one["prompt"] for one in told] == prompts * 2
    assert [one["seed"] for one in told] == list(range(42, 52)) and len(files("o")) == 10


def test_lines_with_the_same_options_share_a_batch_that_is_chosen(model, home, end):
    Path("p.txt").write_text("a cat\n--prompt a dog --seed 7\nb\n--prompt c --width 72\nd\n")
    argv = ["--from-file", "p.txt", "--steps", 1, "--batch_size", "auto", "--n_iter", 2, "--outdir", "o"]
    assert end("txt2img", *model, *argv)[0] == 0
    told = [ldm.read_metadata(f"o/samples/{i:05}.png") for i in range(10)]
    assert [one["seed"] for one in told] == [42, 7, 43, 44, 45, 46, 8, 47, 48, 49]
    assert [one["batch_size"] for one in told] == [3, 3, 3, 1, 4, 4, 4, 4, 1, 1]
    assert Image.open("o/grid-0000.png").size == (8 * 74 + 2, 2 * 66 + 2)
    assert end("txt2img", *model, "--n_samples", "many", "--outdir", "o")[0] == 2


def test_option_lines_and_json_lines_say_the_same(model, home, end):
    Path("p.txt").write_text(
        '--prompt "a cat" --negative_prompt "no \\"dogs\\"" --steps 2 --seed 5 --width 72 --cfg_scale 3 '
        "--sampler_name 'Euler a' \n".replace("Euler a", "PLMS")
        + "--prompt plain --n_iter 2\nb\n"
    )
    Path("p.jsonl").write_text(
        '{"prompt": "a cat", "negative_prompt": "no \\"dogs\\"", "steps": 2, "seed": 5, "width": 72, '
        '"guidance_scale": 3, "sampler": "plms"}\n{"prompt": "plain", "n_iter": 2}\n{"prompt": "b"}\n'
    )
    told = []
    for name in ("p.txt", "p.jsonl"):
        out = Path(name).suffix
        assert (
            end("txt2img", *model, "--from-file", name, "--steps", 1, "--skip_grid", "--outdir", out)[0] == 0
        )
        told.append([ldm.read_metadata(f"{out}/samples/{i:05}.png") for i in range(4)])
    assert told[0] == told[1]
    first = told[0][0]
    assert (first["prompt"], first["negative_prompt"], first["seed"], first["width"]) == (
        "a cat",
        'no "dogs"',
        5,
        72,
    )
    assert (first["steps"], first["sampler"], first["guidance_scale"]) == (2, "plms", 3.0)
    assert [(one["prompt"], one["seed"]) for one in told[0][1:]] == [("plain", 42), ("plain", 43), ("b", 44)]


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("p.txt", b"", FormatError, "holds no prompt; write one a line"),
        ("p.txt", b"\n  \n", FormatError, "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", FormatError, "as UTF-16: truncated data in line 1; save it as UTF-8"),
        ("p.txt", b"a\nb\nc\xe9", FormatError, "as UTF-8: unexpected end of data in line 3"),
        (
            "p.txt",
            "ok\nso".encode("utf-16-le"),
            FormatError,
            "holds a NUL character in line 1; save it as UTF-8",
        ),
        ("p.txt", b"a\0b", FormatError, "no list of prompts"),
        ("p.txt", b"a\n" * 100_001, FormatError, "has 100001 lines, at most 100000 are read"),
        (
            "p.txt",
            b"# one\n  # two\n\n",
            FormatError,
            "holds no prompt; write one a line (lines that begin with #",
        ),
        ("p.txt", b"x" * (10 * 2**20 + 1), FormatError, "at most 10485760 bytes"),
        (
            "p.txt",
            b"ok\n--prompt x --hypertile 1",
            UsageError,
            "line 2 of 'p.txt': unknown option 'hypertile'; there are",
        ),
        (
            "p.txt",
            b"--prompt x --steps 0",
            UsageError,
            "line 1 of 'p.txt': steps: wanted a whole number from 1",
        ),
        (
            "p.txt",
            b"a\n\n--prompt x --seed",
            UsageError,
            "line 3 of 'p.txt': wanted a value after --seed, got none",
        ),
        ("p.txt", b"--prompt --steps 20", UsageError, "wanted a value after --prompt, got none"),
        ("p.txt", b"--prompt x --prompt y", UsageError, "option --prompt was given twice"),
        ("p.txt", b"--prompt x --cfg_scale 2 --guidance-scale 3", UsageError, "given twice, by two names"),
        (
            "p.txt",
            b"--prompt x --steps 20 30",
            UsageError,
            "steps: wanted a whole number from 1 to 1000, got '20 30'",
        ),
        ("p.txt", b"--prompt x --steps nan", UsageError, "got 'nan'"),
        (
            "p.txt",
            b"--prompt x --cfg_scale nan",
            UsageError,
            "cfg_scale: wanted a number from 0 to 100, got 'nan'",
        ),
        ("p.txt", b"--prompt x --cfg_scale 1e999", UsageError, "got '1e999'"),
        ("p.txt", b"--prompt x --seed -2", UsageError, "-1 or 'random' to draw one, got '-2'"),
        (
            "p.txt",
            b"--prompt x --steps " + b"9" * 5000,
            UsageError,
            "line 1 of 'p.txt': steps: wanted a whole",
        ),
        ("p.txt", b"--promt a cat", UsageError, "unknown option 'promt'; did you mean 'prompt'?"),
        ("p.txt", b"--prompt x --step 3", UsageError, "unknown option 'step'; did you mean 'steps'?"),
        ("p.txt", b"--steps 3", UsageError, "no prompt"),
        (
            "p.txt",
            b"x" * 100_001,
            UsageError,
            "line 1 of 'p.txt': wanted at most 100000 characters, got 100001",
        ),
        ("p.jsonl", b"{", UsageError, "line 1 of 'p.jsonl': wanted a JSON object"),
        ("p.jsonl", b"[1]", UsageError, "wanted a JSON object with a prompt, got [1]"),
        ("p.jsonl", b'{"prompt": "x"}\n"y"', UsageError, "line 2 of 'p.jsonl': wanted a JSON object"),
        ("p.jsonl", b'{"prompt": "x"}\r\n\r\nx', UsageError, "line 3 of 'p.jsonl': wanted a JSON object"),
        ("p.jsonl", b"[" * 100_000, UsageError, "line 1 of 'p.jsonl': wanted a JSON object"),
        ("p.jsonl", b'{"a":' * 100_000, UsageError, "line 1 of 'p.jsonl': wanted a JSON object"),
        ("p.jsonl", b'{"prompt": ["x"]}', UsageError, "prompt: wanted a text, got ['x']"),
        ("p.jsonl", b'{"prompt": 5}', UsageError, "prompt: wanted a text, got 5"),
        ("p.jsonl", b'{"prompt": "x", "negative_prompt": true}', UsageError, "wanted a text, got True"),
        ("p.jsonl", b'{"prompt": null}', UsageError, "no prompt"),
        ("p.jsonl", b'{"steps": 3}', UsageError, "no prompt"),
        ("p.jsonl", b'{"prompt": "x", "seed": 1.5}', UsageError, "seed: wanted a seed"),
        ("p.jsonl", b'{"prompt": "x", "steps": 20.5}', UsageError, "steps: wanted a whole number"),
        (
            "p.jsonl",
            b'{"prompt": "x", "steps": true}',
            UsageError,
            "steps: wanted a text or a number, got True",
        ),
        ("p.jsonl", b'{"prompt": "x", "steps": {}}', UsageError, "steps: wanted a text or a number, got {}"),
        ("p.jsonl", b'{"prompt": "x", "cfg_scale": NaN}', UsageError, "wanted a number, got NaN"),
        ("p.jsonl", b'{"prompt": "x", "cfg_scale": -Infinity}', UsageError, "wanted a number, got -Infinity"),
        (
            "p.jsonl",
            b'{"prompt": "x", "cfg_scale": 1e999}',
            UsageError,
            "cfg_scale: wanted a number from 0 to 100",
        ),
        (
            "p.jsonl",
            b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
            UsageError,
            "of at most 100 digits, got 5000",
        ),
        ("p.jsonl", b'{"prompt": "x", "prompt": "y"}', UsageError, "'prompt' was given twice"),
        ("p.jsonl", b'{"prompt": "a\\ud800b"}', UsageError, "characters that are none (lone surrogates)"),
        (
            "p.jsonl",
            b'{"prompt": "x", "hypertile": 1}',
            UsageError,
            "unknown option 'hypertile'; there are prompt,",
        ),
        ("p.JSONL", b"a cat", UsageError, "line 1 of 'p.JSONL': wanted a JSON object"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else "",
)
def test_bad_prompt_files_are_named_with_their_line(home, name, data, error, words):
    Path(name).write_bytes(data)
    with pytest.raises(error) as caught:
        read_prompts(name)
    assert words in str(caught.value) and len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        # A prompt as it stands.
        ("p.txt", "it's a cat\n'tis a dog\n\"quoted\" bird", ["it's a cat", "'tis a dog", '"quoted" bird']),
        ("p.txt", "one\r\n\r\n two\t\r\n", ["one", "two"]),
        ("p.txt", "a\u2028b\nc\x85d\x0be\x1cf", ["a\u2028b", "c\x85d\x0be\x1cf"]),
        ("p.txt", "a # b\n# a comment\n  #x\n--prompt #1 fan", ["a # b", "#1 fan"]),
        ("p.txt", "--H 9 is text\n-- a dash\n-5 degrees", ["--H 9 is text", "-- a dash", "-5 degrees"]),
        ("p.txt", "a cat --steps 20", ["a cat --steps 20"]),
        # A1111's lines.
        ("p.txt", "--prompt a cat --steps 20", [("a cat", {"steps": 20})]),
        ("p.txt", "--steps 20 --prompt a cat", [("a cat", {"steps": 20})]),
        ("p.txt", "--prompt it's a cat --seed 5", [("it's a cat", {"seed": 5})]),
        ("p.txt", "--prompt 'it's a cat' --seed 5", [("it's a cat", {"seed": 5})]),
        ("p.txt", "--prompt the cats' bowl, dogs' too", ["the cats' bowl, dogs' too"]),
        ("p.txt", "--prompt 'x", ["'x"]),
        ("p.txt", '--prompt a 6" nail --steps 3', [('a 6" nail', {"steps": 3})]),
        ("p.txt", '--prompt "a cat"', ["a cat"]),
        ("p.txt", '--prompt "a --steps 9 cat" --steps 3', [("a --steps 9 cat", {"steps": 3})]),
        ("p.txt", '--prompt "say \\"hi\\" \\\\" --steps 3', [('say "hi" \\', {"steps": 3})]),
        ("p.txt", "--prompt a \\(b\\) c", ["a \\(b\\) c"]),
        ("p.txt", '--prompt ""', [""]),
        ("p.txt", "--prompt=a cat --steps=20", [("a cat", {"steps": 20})]),
        ("p.txt", "--prompt  a\t cat\t--steps\t20", [("a cat", {"steps": 20})]),
        ("p.txt", "--prompt a -- b - c --steps 20", [("a -- b - c", {"steps": 20})]),
        ("p.txt", "--prompt x --cfg-scale 3 --negative-prompt no 'dogs' please", [
            ("x", {"guidance_scale": 3.0, "negative_prompt": "no dogs please"})]),
        ("p.txt", "--prompt x --seed -1\n--prompt x --seed random", [("x", {"seed": None})] * 2),
        # JSON.
        ("p.jsonl", '{"prompt": "a\u2028b\x85c"}\n# note\n{"prompt": "d"}', ["a\u2028b\x85c", "d"]),
        ("p.jsonl", '\ufeff{"prompt": "x", "steps": 20.0, "seed": 5.0}\r\n', [("x", {"steps": 20, "seed": 5})]),
        ("p.jsonl", '{"prompt": "x", "steps": null, "seed": -1}', [("x", {"seed": None})]),
        ("p.jsonl", '{"prompt": "x", "seed": "random", "steps": "7"}', [("x", {"seed": None, "steps": 7})]),
        ("p.jsonl", '{"prompt": "x", "cfg-scale": 3, "negative-prompt": ""}', [
            ("x", {"guidance_scale": 3.0, "negative_prompt": ""})]),
        ("p.jsonl", '{"prompt": "--steps 5 # \\n x"}', ["--steps 5 # \n x"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_sound_prompt_files_are_read(home, name, text, lines, encoding):
    Path(name).write_bytes(text.encode(encoding))
    assert read_prompts(name) == [Line(one) if isinstance(one, str) else Line(*one) for one in lines]


def test_comments_are_counted_aloud(home, capsys):
    Path("p.txt").write_text("# red things\na cat\n#\n")
    read_prompts("p.txt")
    assert capsys.readouterr().out == "p.txt: 1 prompts; 2 lines that begin with # are comments\n"


def test_what_only_the_model_can_refuse_names_its_line_too(model, home, end):
    Path("p.txt").write_text("a cat\n\n--prompt a dog --width 70\n")
    code, _, err = end("txt2img", *model, "--from-file", "p.txt", "--steps", 1)
    assert code == 2 and "line 3 of 'p.txt': width must be a multiple of 8, got 70" in err
    Path("p.txt").write_text("a cat\n--prompt a dog --sampler magic\n")
    code, _, err = end("txt2img", *model, "--from-file", "p.txt", "--steps", 1)
    assert code == 2 and "line 2 of 'p.txt': the sampler must be one of" in err
    code, _, err = end("txt2img", *model, "--from-file", "p.txt", "--steps", 1, "--H", 70)
    assert code == 2 and err.startswith("ldm: error: height must be") and files("outputs") == []


HOSTILE_LINES = {
    "quotes": "--prompt " + "'a " * 300_000,
    "double quotes": "--prompt " + '"a ' * 300_000,
    "backslashes": '--prompt "' + "\\" * 900_001,
    "options": "--prompt x " + "--y" * 300_000,
    "dashes": "--prompt " + "- " * 450_000,
    "keys": "{" + ",".join(f'"{i}":1' for i in range(90_000)) + "}",
    "brackets": "[" * 900_000,
}


@pytest.mark.parametrize("kind", HOSTILE_LINES)
@pytest.mark.thinned(3)
def test_a_hostile_line_costs_no_more_than_its_length(home, kind):
    """Under 1 MB, in a process with two seconds of processor time."""
    name = "p.jsonl" if kind in ("keys", "brackets") else "p.txt"
    Path(name).write_text(HOSTILE_LINES[kind])
    pid = os.fork()  # a child's processor time begins at zero
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
            read_prompts(name)
        except UsageError as error:
            os._exit(0 if str(error).startswith("line 1 of ") else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_prompt_files_that_are_no_files(home):
    with pytest.raises(AbsentError, match="prompt file 'none.txt' does not exist"):
        read_prompts("none.txt")
    with pytest.raises(FormatError, match="'.' is a folder; name the file in it"):
        read_prompts(".")


def test_seed_minus_one_in_a_line_is_random(home):
    Path("p.txt").write_text("--prompt x --seed -1")
    assert read_prompts("p.txt") == [Line("x", {"seed": None})]


# --- img2img ---


def test_img2img_repaints_and_strength_zero_returns_the_picture(model, home, end):
    picture("in.png", (77, 66))
    argv = ["--init-img", "in.png", "--prompt", "x", "--steps", 4, "--outdir", "o"]
    assert end("img2img", *model, *argv, "--strength", 0.5, "--plms")[0] == 0
    assert end("img2img", *model, *argv, "--strength", 0, "--H", 64, "--W", 72)[0] == 0
    assert files("o") == ["samples/00000.png", "samples/00001.png"]  # a grid of one would be a twin
    told = ldm.read_metadata("o/samples/00000.png")
    assert (told["mode"], told["strength"], told["guidance_scale"], told["sampler"]) == (
        "img2img",
        0.5,
        5.0,
        "plms",
    )
    assert (told["width"], told["height"]) == (72, 64) and len(told["init_image_hash"]) == 10
    resized = Image.open("in.png").resize((72, 64), Image.Resampling.LANCZOS)
    back = np.asarray(Image.open("o/samples/00001.png")).astype(int)
    assert abs(back - np.asarray(resized)).max() <= 1


# --- inpaint ---


def test_inpaint_keeps_what_is_black(model, home, end):
    picture("in.png")
    mask("m.png")
    argv = ["--init-img", "in.png", "--mask", "m.png", "--prompt", "x", "--steps", 2, "--outdir", "o"]
    assert end("inpaint", *model, *argv, "--n_samples", 2)[0] == 0
    assert files("o") == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    before, after = (np.asarray(Image.open(p)).astype(int) for p in ("in.png", "o/samples/00001.png"))
    assert abs(before - after)[:, :40].max() <= 1 and abs(before - after)[:, 40:].max() > 20
    assert ldm.read_metadata("o/samples/00001.png")["mode"] == "inpaint"


@pytest.mark.slow
def test_inpaint_takes_a_folder_of_pairs_and_keeps_their_names(model, home, end):
    Path("in").mkdir()
    for i, name in enumerate("ab"):
        picture(f"in/{name}.png", seed=i)
        mask(f"in/{name}_mask.png")
    for _ in range(2):
        assert end("inpaint", *model, "--indir", "in", "--outdir", "o", "--steps", 2)[0] == 0
    assert files("o") == ["a-1.png", "a.png", "b-1.png", "b.png"]
    assert ldm.read_metadata("o/b.png")["prompt"] == ""
    before, after = (np.asarray(Image.open(p)).astype(int) for p in ("in/b.png", "o/b.png"))
    assert abs(before - after)[:, :40].max() <= 1


# --- bad input: one line, its exit code, nothing written ---


BAD = [
    (
        "txt2img",
        ["--W", "500"],
        2,
        "width must be a multiple of 8, got 500; the nearest two that work are 496 and 504",
    ),
    ("txt2img", ["--H", "-8"], 2, "--H"),
    ("txt2img", ["--steps", "0"], 2, "wanted a whole number from 1 to 1000, got '0'"),
    ("txt2img", ["--scale", "nan"], 2, "got 'nan'"),
    ("txt2img", ["--n_samples", "0"], 2, "got '0'"),
    ("txt2img", ["--sampler", "magic"], 2, "the sampler must be one of ddim, plms"),
    ("txt2img", ["--sampler", "ddim", "--plms"], 2, "name two samplers"),
    ("txt2img", ["--plms", "--ddim_eta", "0.5"], 2, "eta of plms must be 0"),
    ("txt2img", ["--spacing", "karas"], 2, "the spacing must be one of uniform, "),
    ("txt2img", ["--sampler", "LMS Karras", "--spacing", "simple"], 2, "name two spacings; give one"),
    ("txt2img", ["--precision", "int4"], 2, "invalid choice: 'int4'"),
    ("txt2img", ["--vae_precision", "autocast"], 2, "invalid choice: 'autocast'"),
    ("txt2img", ["--lowvram"], 2, "low_vram is for a GPU that a model does not fit on, got device cpu"),
    ("txt2img", ["--device", "cuda:99"], 2, "device 'cuda:99' is not available; have:"),
    ("txt2img", ["--f", "4"], 2, "--f 4 does not fit this model, whose f is 8"),
    ("txt2img", ["--C", "3"], 2, "--C 3 does not fit this model, whose C is 4"),
    ("txt2img", ["--from-file", "empty.txt"], 3, "prompt file 'empty.txt' holds no prompt"),
    ("txt2img", ["--from-file", "none.txt"], 9, "prompt file 'none.txt' does not exist"),
    ("txt2img", ["--from-file", "empty.txt", "--prompt", "x"], 2, "two sources of prompts"),
    ("txt2img", ["--outdir", "empty.txt"], 7, "cannot write to folder 'empty.txt'"),
    ("txt2img", ["--outdir", ""], 7, "cannot write to folder ''"),
    ("txt2img", ["--outdir", "/proc/x"], 7, "cannot write to folder '/proc/x'"),
    ("txt2img", ["--ckpt", "none.ckpt"], 9, "none.ckpt"),
    ("txt2img", ["--ckpt", "empty.txt"], 3, "empty.txt"),
    ("txt2img", ["--config", "none.yaml"], 9, "configuration 'none.yaml' does not exist"),
    ("txt2img", ["--laion400m"], 9, "txt2img-1p4B-eval.yaml' does not exist"),
    ("txt2img", ["--ddim_stepz", "5"], 2, "did you mean '--ddim_steps'?"),
    ("txt2img", ["red", "circle"], 2, "unexpected word"),
    ("img2img", ["--init-img", "in.png", "--strength", "1.5"], 2, "wanted a number from 0 to 1, got '1.5'"),
    ("img2img", [], 2, "--init-img"),
    ("img2img", ["--init-img", "none.png"], 9, "picture 'none.png' does not exist"),
    ("img2img", ["--init-img", "empty.txt"], 3, "picture 'empty.txt' has 0 bytes"),
    ("img2img", ["--init-img", "http://a/b.png"], 2, "got the URL"),
    ("img2img", ["--init-img", "thin.png"], 2, "must be a multiple of 8 from 64 to 2048, got 16"),
    ("inpaint", [], 2, "give --init-img and --mask, or --indir"),
    ("inpaint", ["--init-img", "in.png"], 2, "give --init-img and --mask"),
    ("inpaint", ["--init-img", "in.png", "--mask", "black.png"], 2, "the mask marks nothing"),
    ("inpaint", ["--indir", "none"], 9, "--indir 'none' is no folder"),
    ("inpaint", ["--indir", "."], 9, "holds no *_mask.png"),
    # Folders for files, files for folders, options without their value, words that begin with a dash.
    ("txt2img", ["--from-file", "."], 3, "prompt file '.' is a folder"),
    ("txt2img", ["--from-file", ""], 9, "prompt file '' does not exist"),
    ("txt2img", ["--prompt"], 2, "argument --prompt: expected one argument"),
    (
        "txt2img",
        ["--prompt", "--steps", "3"],
        2,
        "expected one argument, or one that begins with a dash, as --name=",
    ),
    (
        "txt2img",
        ["--prompt", "-red"],
        2,
        "expected one argument, or one that begins with a dash, as --name=-value",
    ),
    ("txt2img", ["--prompt", "a\udcffb"], 2, "--prompt: wanted text, got characters that are none"),
    ("txt2img", ["--negative_prompt", "a\udcffb"], 2, "wanted text, got characters that are none"),
    ("txt2img", ["--prompt", "x" * 100_001], 2, "--prompt: wanted at most 100000 characters, got 100001"),
    ("txt2img", ["--seed"], 2, "argument --seed: expected one argument"),
    ("txt2img", ["--seed", "-2"], 2, "or -1 or 'random' to draw one, got '-2'"),
    ("txt2img", ["--seed", "1.5"], 2, "got '1.5'"),
    ("txt2img", ["--seed", ""], 2, "got ''"),
    ("txt2img", ["--seed", "9" * 5000], 2, "wanted a seed from 0 to 2^64-1"),
    ("txt2img", ["--steps", "9" * 5000], 2, "wanted a whole number from 1 to 1000, got '999"),
    ("txt2img", ["--steps", "NaN"], 2, "got 'NaN'"),
    ("txt2img", ["--steps", "20.0"], 2, "got '20.0'"),
    ("txt2img", ["--scale", "NaN"], 2, "wanted a number from 0 to 100, got 'NaN'"),
    ("txt2img", ["--scale", "1e400"], 2, "got '1e400'"),
    ("txt2img", ["--H", "999999999"], 2, "wanted a whole number from 1 to 1000000, got '999999999'"),
    ("txt2img", ["--W", "1000000"], 2, "width must be a multiple of 8 from 64 to 2048, got 1000000"),
    ("txt2img", ["--n_samples", "0"], 2, "wanted a whole number from 1 to 1024, got '0'"),
    ("txt2img", ["--n_iter", "1e3"], 2, "got '1e3'"),
    ("txt2img", ["--n_rows", "-1"], 2, "got '-1'"),
    ("txt2img", ["--sampler", ""], 2, "the sampler must be one of"),
    ("txt2img", ["--device", ""], 2, "device '' is not available"),
    ("txt2img", ["--precision", "int8"], 2, "invalid choice: 'int8'"),
    ("txt2img", ["--outdir", "in.png"], 7, "cannot write to folder 'in.png'"),
    ("txt2img", ["--outdir", "in.png/x"], 7, "cannot write to folder 'in.png/x'"),
    ("txt2img", ["--ckpt", "."], 3, "'.' is a folder"),
    ("txt2img", ["--ckpt", ""], 3, "'.' is a folder"),
    ("txt2img", ["--config", "."], 9, "configuration '.' is not a file"),
    ("txt2img", ["--config", "in.png"], 3, "in.png"),
    ("txt2img", ["--vae", "."], 3, "'.' is a folder"),
    ("txt2img", ["--vae", "in.png"], 3, "in.png"),
    ("txt2img", ["--tokenizer", "none"], 9, "none"),
    ("txt2img", ["--tokenizer", "in.png"], 3, "in.png"),
    ("img2img", ["--init-img", "."], 3, "picture '.'"),
    ("img2img", ["--init-img", ""], 9, "picture ''"),
    ("img2img", ["--init-img"], 2, "expected one argument"),
    ("img2img", ["--init-img", "in.png", "--strength", "nan"], 2, "wanted a number from 0 to 1, got 'nan'"),
    ("img2img", ["--init-img", "in.png", "--H", "65"], 2, "must be a multiple of 8, got 65"),
    ("inpaint", ["--init-img", ".", "--mask", "black.png"], 3, "picture '.'"),
    ("inpaint", ["--init-img", "in.png", "--mask", "."], 3, "picture '.'"),
    ("inpaint", ["--init-img", "in.png", "--mask", "none.png"], 9, "none.png"),
    ("inpaint", ["--indir", "in.png"], 9, "--indir 'in.png' is no folder"),
    ("inpaint", ["--indir", ""], 9, "--indir '' holds no *_mask.png"),
]


@pytest.mark.parametrize(
    ("name", "argv", "code", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
@pytest.mark.thinned(6)
def test_bad_input_is_one_line_with_its_code_and_leaves_nothing(model, home, end, name, argv, code, words):
    Path("empty.txt").touch()
    picture("in.png")
    picture("thin.png", (16, 200))
    Image.new("L", (72, 64)).save("black.png")
    before = files(home)
    given = {word for word in argv if word.startswith("--")}
    common = model[:2] if "--config" in given else [] if given & {"--ckpt", "--laion400m"} else model
    if "--device" in given:
        common = [word for word in model if word not in ("--device", "cpu")]
    got, out, err = end(name, *common, *argv)
    assert got == code, err
    assert words in err and err.startswith("ldm: error: ") and err.count("\n") == 1 and len(err) <= 401
    assert "Traceback" not in err and files(home) == before


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        (
            "txt2img",
            ["--seed", LAST, "--n_samples", 2],
            f"picture i has seed + i, at most {LAST}, and after 1",
        ),
        (
            "txt2img",
            ["--seed", LAST - 1, "--n_iter", 3],
            f"after 2 none is left; take a smaller seed, got {LAST - 1}",
        ),
        (
            "txt2img",
            ["--from-file", "p.txt", "--seed", LAST, "--batch_size", "auto"],
            "line 3 of 'p.txt': picture i",
        ),
        (
            "txt2img",
            ["--from-file", "own.txt", "--n_iter", 2],
            "line 2 of 'own.txt': picture i has seed + i",
        ),
        (
            "txt2img",
            ["--variation_strength", 0.5, "--variation_seed", LAST, "--n_samples", 2],
            "picture i has variation_seed + i",
        ),
        ("sample_diffusion", ["--seed", LAST, "--num_samples", 2], "after 1 none is left"),
        SLOW("image_nll", ["--seed", LAST - 1, "--shapes", 3], "after 2 none is left"),
        # Their neighbours, which come as far as the file that is no model.
        SLOW("txt2img", ["--seed", LAST], None),
        ("txt2img", ["--seed", LAST - 1, "--n_samples", 2], None),
        ("txt2img", ["--seed", LAST, "--variation_strength", 0.5, "--n_samples", 2], None),
        SLOW("txt2img", ["--seed", "random", "--n_samples", 2], None),
        SLOW("sample_diffusion", ["--seed", LAST - 1, "--num_samples", 2], None),
        SLOW("image_nll", ["--seed", LAST, "--shapes", 1], None),
    ],
)
def test_more_pictures_than_seeds_are_refused_before_a_model_is_read(home, end, name, argv, words):
    Path("no.ckpt").touch()
    Path("p.txt").write_text("a\n\nb")
    Path("own.txt").write_text(f"a\n--prompt b --seed {LAST}\nc")
    model = ["--ckpt" if name == "txt2img" else "--model_path", "no.ckpt"]
    code, out, err = end(name, *model, *argv)
    assert err.count("\n") == 1 and len(err) <= 401
    assert (code == 3 and "no.ckpt" in err) if words is None else (code == 2 and words in err)


def test_a_config_needs_its_weights(home, end):
    code, _, err = end("txt2img", "--config", "a.yaml")
    assert code == 2 and err == "ldm: error: --config a.yaml needs --ckpt, the file with the weights\n"


def test_keys_to_leave_out_need_weights_to_leave_them_out_of(home, end):
    code, _, err = end("txt2img", "--ignore-keys", "loss.*")
    assert code == 2 and "--ignore-keys ['loss.*'] needs --ckpt" in err


@pytest.mark.slow
def test_a_yaml_beside_the_weights_is_enough_and_foreign_keys_can_be_left_out(home, end):
    from ldm.checkpoints import read_tensors, save_safetensors

    checkpoint, _ = write_tiny(home)
    tensors, _ = read_tensors(checkpoint)
    save_safetensors(
        checkpoint, {**tensors, "a.b": tensors["logvar"], "a.c": tensors["logvar"], "d": tensors["logvar"]}
    )
    words = ["txt2img", "--ckpt", checkpoint, "--prompt", "x", "--steps", 1, "--outdir", "o", "--skip_grid"]
    code, _, err = end(*words, "--ignore-keys", "a.")
    assert (
        code == 5
        and "1 of the file's" in err
        and "('d'); leave it out with ignore= (--ignore-keys PATTERN)" in err
    )
    code, _, err = end(*words, "--ignore-keys", "a.", "--ignore_keys", "d")
    assert (code, err) == (0, "") and files("o") == ["samples/00000.png"]


def test_nan_from_a_model_file_ends_with_8_and_no_picture(home, end):
    """Weights that are finite but overflow to NaN; NaN weights are refused when the file is read."""
    checkpoint, config = write_tiny(home, poison="model.diffusion_model.out.2.bias")
    code, _, err = end("txt2img", "--ckpt", checkpoint, "--config", config, "--prompt", "x", "--outdir", "o")
    assert code == 8 and "finite" in err and files("o") == []


@pytest.mark.slow
def test_overflow_in_the_unet_names_stage_step_and_dtype(home, end):
    checkpoint, config = write_tiny(home, poison="model.diffusion_model.out.2.bias", value=3e38)
    argv = ["--ckpt", checkpoint, "--config", config, "--prompt", "x", "--steps", 5, "--outdir", "o"]
    code, _, err = end("txt2img", *argv)
    assert code == 8 and files("o") == []
    assert "the UNet gave values that are not finite at step 1 of 5, in float32; nothing was saved" in err


# --- real processes ---


def start(name, *argv, **options):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, argv)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # A shell's background job, as which these tests may run, hands an ignored Ctrl-C on to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        SLOW("txt2img", []),  # tests/test_readme.py starts it, too
        pytest.param("img2img", ["--init-img", "in.png"], marks=pytest.mark.slow),
        pytest.param("inpaint", ["--init-img", "in.png", "--mask", "m.png"], marks=pytest.mark.slow),
    ],
)
def test_scripts_run_from_any_folder_without_installation(model, home, name, more):
    picture("in.png")
    mask("m.png")
    process = start(name, *model, "--prompt", "x", "--steps", 2, *more, cwd=home)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "waiting for you here" in out and "Traceback" not in err and "it/s" not in err
    assert files("outputs") == [f"{name}-samples/samples/00000.png"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished(model, home, number, code):
    argv = [*model, "--prompt", "x", "--steps", 3, "--n_iter", 1000, "--outdir", "o"]
    process = start("txt2img", *argv, cwd=home)
    assert process.stdout.readline().startswith("loading ")
    for _ in range(2):
        assert "(seed" in process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "finished images" in err.splitlines()[-1] and "Traceback" not in err
    saved = files("o")
    assert len(saved) == 2 + out.count("(seed") and all(name.startswith("samples/") for name in saved)
    for name in saved:
        Image.open(f"o/{name}").load()


# --- what the model says about itself ---

CAPTION = "a large red circle above a small blue square on a white background"


@pytest.mark.slow
def test_the_box_paints_by_its_own_advice_in_every_script(home, end):
    """Guidance 3, 20 steps, 128 pixels: nobody says so; a strength of one step keeps it short."""
    picture("in.png", (128, 128))
    mask("m.png", (64, 0, 128, 128), (128, 128))
    box = ["--device", "cpu", "--prompt", CAPTION, "--skip_grid", "--outdir", "o"]
    short = ["--init-img", "in.png", "--strength", 0.05]
    assert end("txt2img", *box)[::2] == (0, "")
    assert end("img2img", *box, *short)[::2] == (0, "")
    assert end("inpaint", *box, *short, "--mask", "m.png")[::2] == (0, "")
    assert end("img2img", *box, *short, "--scale", 7.5, "--steps", 40)[::2] == (0, "")
    told = [ldm.read_metadata(f"o/samples/{i:05}.png") for i in range(4)]
    kept = ("guidance_scale", "steps", "width", "height")
    assert [[one[name] for name in kept] for one in told] == [[3.0, 20, 128, 128]] * 3 + [[7.5, 40, 128, 128]]


@pytest.mark.slow
def test_scripts_have_compvis_guidance_and_steps_for_models_that_say_nothing(model, home, end):
    picture("in.png")
    mask("m.png")
    argv = [*model, "--prompt", "x", "--skip_grid", "--outdir", "o"]
    assert end("txt2img", *argv)[0] == 0
    assert end("img2img", *argv, "--init-img", "in.png", "--strength", 0.02)[0] == 0
    assert end("inpaint", *argv, "--init-img", "in.png", "--mask", "m.png", "--strength", 0.02)[0] == 0
    told = [ldm.read_metadata(f"o/samples/{i:05}.png") for i in range(3)]
    assert [(one["guidance_scale"], one["steps"]) for one in told] == [(7.5, 50), (5.0, 50), (7.5, 50)]


TROUBLE = [
    SLOW("txt2img", ["--prompt", "a photograph of an astronaut"], ["for them: photograph, an, astronaut; it knows: a"]),
    SLOW("txt2img", ["--prompt", CAPTION, "--negative_prompt", "blurry"], ["for them: blurry; it knows"]),
    SLOW("txt2img", ["--prompt", CAPTION, "--H", 64, "--W", 64], ["128 x 128 pixels only; at 64 x 64 expect noise"]),
    SLOW("txt2img", ["--prompt", CAPTION, "--plms", "--steps", 5], ["or more, or ddim, which paints well with 5"]),
    SLOW("txt2img", ["--prompt", CAPTION, "--seed", 2**32 + 5], ["seed 4294967301 paints what seed 5 paints"]),
    ("txt2img", ["--prompt", "a ((red)) circle AND a blue square"],
     ["for them: and; it knows", "'((red)' is emphasis by doubled brackets", "'AND' is a joint between prompts"]),
    SLOW("txt2img", ["--from-file", "p.txt"], ["for them: cat, dog; it knows", "'(red:1.3)' is a weight"]),
    ("img2img", ["--prompt", "a dog", "--init-img", "in.png", "--strength", 0.01],
     ["for them: dog", "at 72 x 64", "strength 0.01 of 20 steps is less than one step"]),
    SLOW("inpaint", ["--init-img", "in.png", "--mask", "m.png", "--strength", 0.01], ["at 72 x 64", "strength 0.01"]),
    SLOW("sample_diffusion", ["--prompt", "a red dog", "-n", 1, "-c", 5], ["for them: dog"]),
    ("sample_diffusion", ["-n", 1, "-c", 4, "--image_size", 64, "--seed", 2**32],
     ["seed 4294967296 paints what seed 0 paints", "at 64 x 64", "ddim with 4 steps paints badly"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argv", "words"), TROUBLE, ids=lambda v: " ".join(map(str, v))[:50] if isinstance(v, list) else v
)
@pytest.mark.thinned(2)
def test_trouble_that_is_known_is_one_line_each_on_stderr(home, end, name, argv, words):
    Path("p.txt").write_text(
        "a (red:1.3) cat\n--prompt a dog --steps 5\n--prompt a (blue:1.3) dog --steps 6\n"
    )
    picture("in.png")
    mask("m.png")
    if name == "txt2img" and "--steps" not in argv:
        argv = [*argv, "--steps", 5]
    code, _, err = end(name, *argv, "--device", "cpu", "--outdir", "o")
    assert code == 0 and len(err.splitlines()) == len(words), err
    for line, wanted in zip(err.splitlines(), words, strict=True):
        assert line.startswith("ldm: warning: ") and wanted in line and len(line) <= 400


@pytest.mark.slow
def test_sample_diffusion_takes_guidance_and_steps_from_the_box(home, end, monkeypatch):
    from ldm.guided_diffusion import sampling

    seen = []
    sample = sampling.sample

    def watch(model, conditions, *args, **options):
        seen.extend((model.respacing, (conditions.prompts, conditions.guidance_scale)))
        return sample(model, conditions, *args, **options)

    monkeypatch.setattr(sampling, "sample", watch)
    base = ["-n", 1, "--device", "cpu", "--outdir", "o"]
    for more in (["--prompt", CAPTION], [], ["--prompt", CAPTION, "--scale", 1, "-c", 5]):
        assert end("sample_diffusion", *base, *more)[0] == 0
    assert seen == ["ddim20", ([CAPTION], 3.0), "ddim20", ([""], 1.0), "ddim5", ([CAPTION], 1.0)]


# --- other programs' habits ---


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--cfg", "3"], ["--scale", "3"]),
        (["--cfg_scale=3"], ["--scale", "3"]),
        (["--guidance-scale", "3"], ["--scale", "3"]),
        (["--num_images", "2"], ["--n_iter", "2"]),
        (["--num-images=2"], ["--n_iter", "2"]),
        (["--batch-count", "2"], ["--n_iter", "2"]),
        (["--num_inference_steps", "5"], ["--ddim_steps", "5"]),
        (["--num-inference-steps", "5"], ["--steps", "5"]),
        (["--sampler-name", "plms"], ["--sampler", "plms"]),
        (["--negative", "fog"], ["--negative_prompt", "fog"]),
        (["--model", "x.safetensors"], ["--ckpt", "x.safetensors"]),
        (["--skip-grid"], ["--skip_grid"]),
        (["--cache-interval", "3"], ["--cache_interval", "3"]),
        (["--prompt", "--", "--cfg"][:1] + ["x", "--output-dir", "o"], ["--prompt", "x", "--outdir", "o"]),
    ],
)
def test_other_programs_names_of_options_are_ours(theirs, ours):
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    assert vars(parser.parse_args(theirs)) == vars(parser.parse_args(ours))
    assert parser.given(theirs) == parser.given(ours)


def test_two_names_of_one_option_are_it_twice_and_a_misspelt_one_is_answered():
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    with pytest.raises(UsageError, match="option --scale was given twice"):
        parser.parse_args(["--cfg", "3", "--scale", "4"])
    with pytest.raises(UsageError, match="unknown option '--cfgs'"):
        parser.parse_args(["--cfgs", "3"])


@pytest.mark.parametrize("name", ["txt2img", "img2img", "inpaint"])
def test_usage_is_two_lines_with_an_example(name, capsys, end):
    code, out, _ = end(name, "--help")
    usage = out.split("\n\n")[0].splitlines()
    assert code == 0 and len(usage) == 2 and usage[1].strip().startswith(f"{name}.py")
    assert "--prompt 'a red circle' --steps 20" in usage[1]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--W", 100], 2, "width must be a multiple of 8, got 100"),
        (["--H", 8], 2, "height must be a multiple of 8 from 64 to 2048"),
        (["--sampler", "eulerr"], 2, "the sampler must be one of"),
        (["--plms", "--eta", 0.5], 2, "eta of plms must be 0"),
        (["--guidance_interval", 0.9, 0.2], 2, "guidance_interval must be (low, high)"),
        (["--ckpt", "nowhere.safetensors"], 9, "--ckpt 'nowhere.safetensors' is not there"),
        (["--ckpt", "in.pngg"], 9, "did you mean 'in.png'?"),
        (["--vae", "nowhere.safetensors"], 9, "--vae 'nowhere.safetensors' is not there"),
        (["--tokenizer", "nowhere"], 9, "--tokenizer 'nowhere' is not there"),
        (["--config", "nowhere.yaml", "--ckpt", "in.png"], 9, "configuration 'nowhere.yaml' does not exist"),
        (["--ckpt", "https://host/v1-5.safetensors"], 2, "is an address: nothing is downloaded here"),
        (["--vae", "s3://bucket/vae.pt"], 2, "is an address: nothing is downloaded here"),
        (["--from-file", "http://host/prompts.txt"], 2, "is an address: nothing is downloaded here"),
        (["--ckpt", "runwayml/stable-diffusion-v1-5"], 9, "nothing is downloaded here"),
        (["--lowvram", "--compile"], 2, "leave one of the two out"),
    ],
)
def test_a_wrong_option_is_told_before_a_model_is_loaded(home, end, argv, code, words):
    picture("in.png")
    got, out, err = end("txt2img", "--prompt", "x", "--device", "cpu", *argv)
    assert (got, err.count("\n")) == (code, 1) and words in err and len(err) <= 420
    assert "loading" not in out and not Path("outputs").exists()


@pytest.mark.parametrize(
    ("kind", "suffix"), [("png", "png"), ("jpg", "jpg"), SLOW("jpeg", "jpg"), ("webp", "webp")]
)
@pytest.mark.slow
def test_the_format_is_what_was_asked_for_and_tells_of_its_making(model, home, end, kind, suffix):
    argv = [*model, "--prompt", "a red circle", "--steps", 1, "--n_samples", 2, "--format", kind]
    code, out, err = end("txt2img", *argv, "--outdir", "o")
    assert (code, err) == (0, "") and f"loading {model[1]} ..." in out.splitlines()[0]
    assert files("o") == [f"grid-0000.{suffix}", f"samples/00000.{suffix}", f"samples/00001.{suffix}"]
    for path, seed in ((f"o/samples/00001.{suffix}", 43), (f"o/grid-0000.{suffix}", 42)):
        assert Image.open(path).format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
        told = ldm.read_metadata(path)
        assert (told["prompt"], told["seed"]) == ("a red circle", seed)
    assert end("txt2img", *argv, "--outdir", "p", "--no_metadata")[0] == 0
    assert ldm.read_metadata(f"p/samples/00000.{suffix}") == {}


def test_bar_and_paths_have_lines_of_their_own(model, home, end, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    argv = ["--prompt", "x", "--steps", 2, "--n_iter", 3, "--outdir", "o"]
    assert end("txt2img", *model, *argv)[0] == 0
    # What stands on the screen: each line as it was last written from its beginning on.
    shown = [line.split("\r")[-1].rstrip() for line in screen.getvalue().split("\n")]
    assert [line for line in shown if "samples/0" in line] == [
        f"o/samples/{i:05}.png (seed {42 + i})" for i in range(3)
    ]
    assert any("6/6" in line for line in shown)


# --- once more, with changes ---


@pytest.fixture(scope="module")
def repeatable(model, tmp_path_factory):
    """A picture to repeat, painted with many options."""
    folder = tmp_path_factory.mktemp("repeatable")
    argv = [
        "--prompt",
        "a red circle",
        "--negative_prompt",
        "fog",
        "--seed",
        7,
        "--steps",
        3,
        "--plms",
        "--cfg",
        4,
    ]
    argv += ["--W", 80, "--cache_interval", 2, "--guidance_interval", 0.1, 0.8]
    with pytest.raises(SystemExit) as stop:
        run(script("txt2img"), [str(word) for word in [*model, *argv, "--outdir", folder]])
    assert stop.value.code == 0
    return folder / "samples" / "00000.png"


@pytest.fixture
def first(repeatable, home):
    """The picture, in the folder that the test works in."""
    return shutil.copy(repeatable, "first.png")


def pixels(path):
    return np.asarray(Image.open(path)).tolist()


def test_like_repeats_a_picture_to_the_bit(model, first, end):
    code, _, err = end("txt2img", *model, "--like", first, "--outdir", "again")
    assert (code, err) == (0, "")
    assert pixels(first) == pixels("again/samples/00000.png")
    assert ldm.read_metadata(first) == ldm.read_metadata("again/samples/00000.png")


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["--seed", 8], {"seed": 8}),
        SLOW(["--prompt", "a blue square"], {"prompt": "a blue square"}),
        SLOW(["--negative_prompt", ""], {"negative_prompt": ""}),
        (["--steps", 2], {"steps": 2}),
        SLOW(["--cfg", 1], {"guidance_scale": 1.0}),
        (["--sampler", "ddim"], {"sampler": "ddim"}),
        SLOW(["--dpm_solver"], {"sampler": "dpm_solver"}),
        (["--W", 64, "--height", 72], {"width": 64, "height": 72}),
        SLOW(["--cache_interval", 1], {"cache_interval": 1}),
        SLOW(["--guidance_interval", 0, 1], {"guidance_interval": [0.0, 1.0]}),
    ],
)
@pytest.mark.thinned(2)
def test_what_the_command_line_says_goes_before_what_the_picture_says(model, first, end, argv, changed):
    code, _, err = end("txt2img", *model, "--like", first, *argv, "--outdir", "again")
    assert (code, err) == (0, "")
    assert ldm.read_metadata("again/samples/00000.png") == ldm.read_metadata(first) | changed


@pytest.mark.slow
def test_like_takes_what_no_option_says_and_what_a_jpeg_tells(model, home, end):
    sd = ldm.StableDiffusion.from_single_file(model[1], config=model[3], device="cpu")
    done = sd.txt2img("x", steps=2, seed=5, spacing="linspace", guidance_rescale=0.5)
    done.save("own")
    assert end("txt2img", *model, "--like", "own/00000.png", "--outdir", "again")[0] == 0
    assert pixels("own/00000.png") == pixels("again/samples/00000.png")
    sd.txt2img("x", steps=2, seed=5).save("own", "{:05}.jpg")
    assert end("txt2img", *model, "--like", "own/00000.jpg", "--outdir", "jpeg")[0] == 0
    assert ldm.read_metadata("jpeg/samples/00000.png")["seed"] == 5


# (A1111's words of before and since 1.9, options beside --like, what is painted with)
SAMPLED = [
    ("Sampler: DPM++ 2M Karras", [], ("dpmpp_2m", "karras", 0.0)),
    ("Sampler: DPM++ 2M, Schedule type: Karras", [], ("dpmpp_2m", "karras", 0.0)),
    ("Sampler: Euler a, Schedule type: Automatic", [], ("euler_a", None, 1.0)),
    (
        "Sampler: Euler a, Schedule type: Karras, Eta: 0.5",
        ["--spacing", "simple"],
        ("euler_a", "simple", 0.5),
    ),
    ("Sampler: Euler a, Schedule type: Karras, Eta: 0.5", ["--sampler", "plms"], ("plms", None, 0.0)),
]


@pytest.mark.parametrize(("said", "argv", "want"), SAMPLED)
@pytest.mark.thinned(6)
def test_like_takes_the_sampler_with_its_spacing(model, home, end, said, argv, want):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"x\nSteps: 2, {said}, Seed: 5, Size: 64x64, Version: v1.10.1")
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    code, _, err = end("txt2img", *model, "--like", "theirs.png", *argv, "--outdir", "again")
    assert (code, err) == (0, "")
    told = ldm.read_metadata("again/samples/00000.png")
    assert (told["sampler"], told["spacing"], told["eta"]) == want


# (what A1111's text says of its generator, where ours draws then)
SAID = [("NV", "nv"), ("GPU", "nv"), ("CPU", "image"), ("Quantum", "image")]


@pytest.mark.parametrize(("said", "rng"), SAID)
@pytest.mark.thinned(4)
def test_like_draws_where_the_other_program_drew(model, home, end, said, rng):
    text = f"x\nSteps: 1, Sampler: DDIM, Seed: 5, Size: 64x64, RNG: {said}, VAE: warm.pt, Version: v1.10.1"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    code, out, _ = end("txt2img", *model, "--like", "theirs.png", "--outdir", "again")
    assert code == 0 and "was painted with the VAE 'warm', which is not given (--vae FILE)" in out
    told = ldm.read_metadata("again/samples/00000.png")
    assert (told["rng"], told["seed"], told["prompt_syntax"]) == (rng, 5, "a1111")  # its brackets are meant


def test_a_language_of_prompts_is_explained_painted_and_repeated(model, home, end):
    write_lora_for("ink.safetensors", tiny_model())
    lines = "a (red:1.4) circle\na [red:blue:0.5] <lora:ink:0.5>\n--prompt a (red:1.4) --syntax plain\n"
    Path("p.txt").write_text(lines)
    argv = ["--from-file", "p.txt", "--syntax", "a1111", "--lora-dir", ".", "--steps", 2]
    code, out, _ = end("txt2img", *model, *argv, "--explain", "--outdir", "none")
    assert code == 0 and not Path("none").exists()
    assert "a red*1.4 circle" in out and "step 1: 'a red'" in out and "step 2: 'a blue'" in out
    assert "plain: 'a (red:1.4)'" in out and "tag lora: ink, 0.5" in out
    assert end("txt2img", *model, *argv, "--outdir", "a")[0] == 0
    told = [ldm.read_metadata(f"a/samples/0000{i}.png") for i in range(3)]
    assert [one["prompt_syntax"] for one in told] == ["a1111", "a1111", "plain"]
    assert [[own["name"] for own in one["adapters"]] for one in told] == [[], ["ink"], []]
    for i in (0, 1):
        again = ["--like", f"a/samples/0000{i}.png", "--lora-dir", ".", "--outdir", f"b{i}"]
        code, out, _ = end("txt2img", *model, *again)
        assert code == 0 and "was painted with" not in out
        assert Path(f"b{i}/samples/00000.png").read_bytes() == Path(f"a/samples/0000{i}.png").read_bytes()


@pytest.mark.slow
def test_like_repeats_img2img_with_its_strength(model, home, end):
    picture("in.png")
    argv = ["--prompt", "x", "--steps", 4, "--strength", 0.5, "--init-img", "in.png"]
    assert end("img2img", *model, *argv, "--outdir", "a")[0] == 0
    assert (
        end("img2img", *model, "--like", "a/samples/00000.png", "--image", "in.png", "--outdir", "b")[0] == 0
    )
    assert pixels("a/samples/00000.png") == pixels("b/samples/00000.png")
    code, _, err = end("txt2img", *model, "--like", "a/samples/00000.png", "--outdir", "c")
    assert code == 2 and "use img2img.py and give that one as --init-img" in err and not Path("c").exists()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nowhere.png", 9, "nowhere.png"),
        ("plain.png", 3, "does not say how it was painted"),
        ("text.png", 3, "text.png"),
        ("https://host/a.png", 2, "URL"),
    ],
)
def test_a_picture_that_says_nothing_cannot_be_repeated(home, end, name, code, words):
    picture("plain.png")
    Path("text.png").write_text("no picture")
    got, _, err = end("txt2img", "--device", "cpu", "--like", name)
    assert (got, err.count("\n")) == (code, 1) and words in err and not Path("outputs").exists()


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        (("steps", "ddim_steps", "num_inference_steps", "num-steps"), "steps", 5),
        (("scale", "cfg", "cfg_scale", "cfg-scale", "guidance_scale", "guidance"), "guidance_scale", 4),
        (("W", "width"), "width", 72),
        (("H", "height"), "height", 72),
        (("n_samples", "batch_size"), "batch_size", 3),
        (("n_iter", "num_images", "num-images", "batch_count"), "n_iter", 2),
        (("sampler", "sampler_name", "scheduler"), "sampler", "plms"),
        (("eta", "ddim_eta"), "eta", 0.5),
        (("strength", "denoising_strength"), "strength", 0.5),
        (("negative_prompt", "negative-prompt", "negative"), "negative_prompt", "fog"),
        (("cache_interval",), "cache_interval", 3),
        (("cache_depth",), "cache_depth", 2),
        (("merge_ratio",), "merge_ratio", 0.25),
        (("merge_seed",), "merge_seed", 9),
        (("rng",), "rng", "compvis"),
        (("rng",), "rng", "nv"),
        (("spacing", "schedule_type"), "spacing", "karras"),
    ],
)
def test_a_prompt_files_keys_are_the_flags(home, flags, option, value):
    for flag in flags:
        other_way = (
            f"--{flag} {value} --prompt a cat" if len(flag) > 1 else f"--prompt=a cat --{flag}={value}"
        )
        Path("p.txt").write_text(f"--prompt a cat --{flag} {value}\n{other_way}\n")
        Path("p.jsonl").write_text(json.dumps({"prompt": "a cat", flag: value}))
        wanted = Line("a cat", {option: value})
        assert read_prompts("p.txt") == [wanted, wanted] and read_prompts("p.jsonl") == [wanted], flag
        if flag != option:
            Path("p.txt").write_text(f"--prompt a --{flag} {value} --{option} {value}\n")
            with pytest.raises(UsageError, match="given twice"):
                read_prompts("p.txt")


# The painting flags that no line of a prompt file has, and why.
OF_THE_RUN = {
    "where prompts come from, and what they say": "from_file like explain style styles",
    "one model paints the whole file": """
        ckpt config ignore_keys vae tokenizer device precision optimize compile tiled_vae sliced_vae lowvram
        vae_precision C f""",
    "one folder holds all": "outdir format skip_grid skip_save n_rows no_metadata",
    "of the script": "help debug",
}


def test_every_painting_flag_is_a_key_of_a_prompt_file():
    of_the_run = {name for names in OF_THE_RUN.values() for name in names.split()}
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    for action in parser._actions:
        names = {name.lstrip("-").replace("-", "_") for name in action.option_strings}
        names |= {other for other, ours in parser.also.items() if f"--{ours}" in action.option_strings}
        assert names - line_names().keys() == (names if action.dest in of_the_run else set()), action.dest
    assert of_the_run <= {action.dest for action in parser._actions}


@pytest.mark.parametrize(
    ("words", "json_", "options"),
    [
        ("--plms", {"plms": True}, {"sampler": "plms"}),
        ("--dpm_solver --steps 5", {"dpm-solver": True, "steps": 5}, {"sampler": "dpm_solver", "steps": 5}),
        ("--plms --dpm-solver", {"plms": True, "dpm_solver": True}, {"sampler": "dpm_solver"}),
        ("--plms false --sampler ddim", {"plms": False, "sampler": "ddim"}, {"sampler": "ddim"}),
        ("--fixed_code", {"fixed_code": True}, {"fixed_code": True}),
        ("--fixed-code=true --rng compvis", {"fixed_code": "true", "rng": "compvis"},
            {"fixed_code": True, "rng": "compvis"}),
        ("--fixed_code False", {"fixed_code": False}, {"fixed_code": False}),
    ],
)  # fmt: skip
def test_switches_are_keys_too(home, words, json_, options):
    Path("p.txt").write_text(f"--prompt a cat {words}\n{words} --prompt a cat\n")
    Path("p.jsonl").write_text(json.dumps({"prompt": "a cat", **json_}))
    wanted = Line("a cat", options)
    assert read_prompts("p.txt") == [wanted, wanted] and read_prompts("p.jsonl") == [wanted]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--plms a cat --prompt b", "plms: wanted nothing, true or false after it, got 'a cat'"),
        ("--prompt a --plms --sampler ddim", "sampler and plms name two samplers; give one"),
        ("--prompt a --rng a1111", "rng: wanted one of image, nv, compvis, diffusers, comfyui; got 'a1111'"),
        ("--prompt a --rng", "wanted a value after --rng, got none"),
        ("--plms --fixed_code", "no prompt"),
    ],
)
def test_switches_of_a_line_are_held_to_what_they_take(home, line, words):
    Path("p.txt").write_text(line)
    with pytest.raises(UsageError, match=re.escape(f"line 1 of 'p.txt': {words}")):
        read_prompts("p.txt")


def test_a_line_sets_what_a_picture_needs(model, home, end):
    picture("in.png")
    lines = [
        {"prompt": "a", "guidance_interval": [0.2, 0.9], "strength": 0.5, "cache_interval": 2},
        {"prompt": "b", "plms": True, "rng": "compvis"},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--from-file", "p.jsonl", "--steps", 4, "--init-img", "in.png", "--outdir", "o"]
    assert end("img2img", *model, *argv)[0] == 0
    told = [ldm.read_metadata(f"o/samples/0000{i}.png") for i in range(2)]
    assert [one["strength"] for one in told] == [0.5, 0.75]
    assert [one["guidance_interval"] for one in told] == [[0.2, 0.9], [0.0, 1.0]]
    assert [one["cache_interval"] for one in told] == [2, 1]
    assert [one["sampler"] for one in told] == ["ddim", "plms"]
    assert [one["rng"] for one in told] == ["image", "compvis"]


@pytest.mark.parametrize("value", ["0.5", "0.1 0.2 0.3", "a b", "0.1 2"])
def test_an_interval_of_a_line_is_two_numbers(home, value):
    Path("p.txt").write_text(f"--prompt a --guidance_interval {value}\n")
    with pytest.raises(UsageError, match="line 1 of 'p.txt': guidance_interval: wanted"):
        read_prompts("p.txt")
