"""docs/prompts.md: every block is run as it stands, and prints what the page says."""

import contextlib
import io
import random
import re
import shlex
from pathlib import Path

import pytest

from ldm.cli import painting_parser
from ldm.prompt.variants import Wildcards, draw

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_explanations_of_the_page_are_what_is_printed():
    names, printed = {}, ""
    for language, text in BLOCKS[:4]:
        if language == "text":
            assert printed == text
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, "docs/prompts.md", "exec"), names)
        printed = out.getvalue()
    assert [language for language, _ in BLOCKS] == [
        "python",
        "text",
        "python",
        "text",
        "python",
        "bash",
        "bash",
    ]


@pytest.mark.slow
def test_the_picture_of_the_page_is_made():
    names = {}
    exec(compile(BLOCKS[4][1], "docs/prompts.md", "exec"), names)
    (told,) = names["out"].parameters
    assert told.prompt_syntax == "a1111" and len(names["out"].images) == 1


def test_the_commands_of_the_page_have_the_scripts_flags():
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    for command in BLOCKS[5][1].splitlines():
        assert parser.parse_args(shlex.split(command)[2:]).prompt_syntax == "a1111", command
    for command in BLOCKS[6][1].splitlines():
        args = parser.parse_args(shlex.split(command)[2:])
        assert args.variants or args.wildcards, command


def test_the_page_says_by_what_rule_templates_are_drawn():
    """The rule in words, in code: the first option at which the sum of weights exceeds the number's share."""
    for seed in range(30):
        numbers = random.Random(seed)
        text = "large" if numbers.random() < 0.5 else "small"
        colour = "red" if numbers.random() * 3 < 2 else "blue"
        assert (
            draw("a {large|small} {2::red|blue} circle", seed, Wildcards(None)) == f"a {text} {colour} circle"
        )


def test_files_that_the_page_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
