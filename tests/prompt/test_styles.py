"""Styles as A1111 writes them: read from a CSV, and put into prompts."""

import pytest

from ldm.cli import painting_parser
from ldm.cli.painting import lines_of
from ldm.errors import AbsentError, FormatError, UsageError
from ldm.prompt.styles import read_styles, with_styles

CSV = (
    '\ufeffname,prompt,negative_prompt\nink,"ink, drawing of {prompt}, fine",blurry\n'
    'tail,"4k, sharp",\nbare,x\n\ntail,"8k, sharp",fog\n'
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_bytes(CSV.encode())
    return path


@pytest.mark.parametrize(
    ("names", "prompt", "negative", "wanted"),
    [
        ((), "a cat", "n", ("a cat", "n")),
        (("ink",), "a cat", "", ("ink, drawing of a cat, fine", "blurry")),
        (("tail",), "a cat ", "n", ("a cat, 8k, sharp", "n, fog")),
        (("tail", "ink"), "a cat", "", ("ink, drawing of a cat, 8k, sharp, fine", "fog, blurry")),
        (("tail",), "", "", ("8k, sharp", "fog")),
        (("bare",), "a", "n", ("a, x", "n")),
    ],
)
def test_a_style_takes_the_prompt_in_or_follows_it(file, names, prompt, negative, wanted):
    assert with_styles(prompt, negative, names, read_styles(file)) == wanted


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, AbsentError, "are not there"),
        (b"name,prompt\n" * 1_000_000, FormatError, "it is larger than"),
        (b"", FormatError, "hold no rows under name,prompt,negative_prompt"),
        (b"a,b\n1,2\n", FormatError, "hold no rows"),
        (b"name,prompt\n\xff\xfe,x\n", FormatError, "in UTF-8"),
        (b"name,prompt\nx," + b'"' + b"a" * 200_000 + b'"\n', FormatError, "cannot read styles"),
    ],
)
def test_what_is_no_styles_file_is_refused_in_one_line(tmp_path, data, error, words):
    path = tmp_path / "s.csv"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(error) as found:
        read_styles(path)
    assert str(found.value).count(str(path)) == 1
    assert words in str(found.value) and len(str(found.value)) <= 400 and "\n" not in str(found.value)


def test_the_scripts_put_styles_into_every_line(file, tmp_path):
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    (tmp_path / "p.txt").write_text("a cat\n--prompt a dog --negative_prompt fog\n")
    argv = [
        "--from-file",
        str(tmp_path / "p.txt"),
        "--styles",
        str(file),
        "--style",
        "ink",
        "--negative_prompt",
        "dull",
    ]
    lines = lines_of(parser.parse_args(argv))
    assert [line.prompt for line in lines] == ["ink, drawing of a cat, fine", "ink, drawing of a dog, fine"]
    assert [line.options["negative_prompt"] for line in lines] == ["dull, blurry", "fog, blurry"]
    with pytest.raises(UsageError, match="no style goes by 'inc'; did you mean 'ink'"):
        lines_of(parser.parse_args([*argv, "--style", "inc"]))
    with pytest.raises(UsageError, match="--style ink needs --styles"):
        lines_of(parser.parse_args(["--style", "ink"]))
