"""docs/a1111.md: every flag, name and word that it promises is there, and is what it says."""

import importlib.util
import re
from pathlib import Path

import pytest

import ldm
from ldm import options
from ldm.cli.grids import grid_parser
from ldm.models.diffusion.samplers import SAMPLERS, split_sampler
from ldm.prompt import read
from ldm.prompt.a1111 import split_tags

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "a1111.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "---" not in line and "in the web UI" not in line
]


def row(beginning):
    (found,) = (cells for cells in ROWS if cells[0].startswith(beginning))
    return found


def test_each_line_says_works_differs_or_not_here():
    assert len(ROWS) > 40
    for cells in ROWS:
        assert len(cells) == 3 and cells[1] in ("works", "differs", "not here"), cells
        assert cells[2] or cells[1] == "not here", cells


def test_every_flag_script_and_page_that_is_named_is_there():
    parsers = (grid_parser(),)  # which has all options; what follows is of one script alone
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    known |= {f"--{name}" for parser in parsers for name in parser.also}
    known |= {flag.replace("_", "-") for flag in known}
    flags = set(re.findall(r"--[a-z][\w-]+", PAGE)) - {"--indir", "--models"}
    assert len(flags) > 40 and flags <= known, flags - known
    for script in re.findall(r"scripts/\w+\.py", PAGE):
        assert (ROOT / script).exists(), script
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"`(ldm(?:\.\w+)+)", PAGE):
        *module, last = name.split(".")
        if importlib.util.find_spec(name) is None if len(module) > 1 else not hasattr(ldm, last):
            assert hasattr(importlib.import_module(".".join(module)), last), name


def test_samplers_and_schedules_go_by_the_web_uis_words():
    samplers = re.search(r"ours: (.*?): \[", row("Sampling method")[2])[1].split(", ")
    assert len(samplers) == 20
    for word in samplers:
        name, spacing = split_sampler(word, None)
        assert name in SAMPLERS and spacing is None and options.SAMPLER_WORDS[name] == word, word
    told = row("Schedule type")[2]
    words = re.search(r"`: (.*?);", told)[1].split(", ")
    ours = {name: word for name, word in options.SPACING_WORDS.items()}
    for word in words:
        assert ours[split_sampler("euler", word)[1]] == word, word
    for word, name in re.findall(r"(Uniform is|KL Optimal|Beta) `(\w+)`", told):
        assert ours.get(name) == word or options.option("spacing").kind.read(word.split()[0]) == name, word
    assert len(words) == 9


@pytest.mark.parametrize("text", ["a <hypernet:x:1>", "a <lyco:x:1>", "a <lora:x:te=0.5:unet=0.8>"])
def test_tags_are_as_the_page_says(text):
    left, (tag,) = split_tags(text)
    assert left == "a " and (tag.kind == "hypernet" or tag.weights()) and read(text).tags == (tag,)
