"""docs/prompts.md: every block is run as it stands, and prints what the page says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from ldm.cli import painting_parser

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
    assert [language for language, _ in BLOCKS] == ["python", "text", "python", "text", "python", "bash"]


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


def test_files_that_the_page_links_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)):
        assert (ROOT / "docs" / target).exists(), target
