"""Prompts of every language come as one type, and are shown token by token."""

import re

import pytest

from ldm.errors import UsageError
from ldm.prompt import SYNTAXES, explain, read
from ldm.prompt.a1111 import Tag
from ldm.prompting import tags_of


@pytest.mark.parametrize(
    ("text", "syntax", "parts"),
    [
        ("a (cat:1.3)", "plain", [(1, [(8, {1.0})])]),
        ("a (cat:1.3)", "a1111", [(1, [(8, {1.0, 1.3})])]),
        ("a (cat:1.3)", "comfyui", [(1, [(8, {1.0, 1.3})])]),
        ("a (cat)1.3", "compel", [(1, [(8, {1.0, 1.3})])]),
        ("[a:(b):0.5] AND c:0.7", "a1111", [(1, [(4, {1.0}), (8, {1.0, 1.1})]), (0.7, [(8, {1.0})])]),
        ('("a", "b").blend(1, 0.5)', "compel", [(1, [(8, {1.0})]), (0.5, [(8, {1.0})])]),
        ('("a", "b+").and()', "compel", [(1, [(8, {1.0})]), (1, [(8, {1.0, 1.1})])]),
        ("a.swap(b+)", "compel", [(1, [(8, {1.0})])]),
    ],
)
def test_parts_and_schedules(text, syntax, parts):
    prompt = read(text, syntax, steps=8)
    found = []
    for part in prompt.parts:
        weights = [
            (one.end, {weight for chunk in one.chunks for weight in chunk.weights}) for one in part.schedule
        ]
        found.append((part.weight, weights))
    assert found == parts and prompt.syntax == syntax and prompt.text == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a cat # with (a hat:1.4)", "a cat "),
        ("# first\na cat#2\n a dog", "a cat\na dog"),
        ("a #<lora:x:1> [b:c:0.5]\n AND d", "a AND d"),
        ("#", ""),
    ],
)
def test_comments_are_no_part_of_a1111s_prompts(text, same):
    one, other = (read(prompt, "a1111") for prompt in (text, same))
    chunks = [[scheduled.chunks for scheduled in part.schedule] for part in one.parts]
    assert chunks == [[scheduled.chunks for scheduled in part.schedule] for part in other.parts]
    assert one.tags == () == tags_of(text, "a1111")
    assert read(text, "comfyui").parts[0].schedule[0].chunks != other.parts[0].schedule[0].chunks


def test_plain_prompts_are_cut_as_the_encoder_cuts_them():
    prompt = read("a " * 200, "plain")
    (chunk,) = prompt.parts[0].schedule[0].chunks
    assert chunk.used == 75 and prompt.parts[0].schedule[0].chunks.count == 75


def test_tags():
    assert read("a <lora:x:0.8>").tags == (Tag("lora", ("x", "0.8")),)
    assert read("withLora(x, 0.8) a", "compel").tags == (Tag("lora", ("x", "0.8")),)
    assert read("a <lora:x:0.8>", "comfyui").tags == ()


EXPLAINED = """\
a1111: 'a (cat:1.3) <lora:x:0.8> in [red:blue:0.5] AND fog:0.5'
  tag lora: x, 0.8
  part 1 of 2, weight 1
  steps 1 to 5: 'a (cat:1.3)  in red'
    4 of 75 tokens
      a cat*1.3 in red
  steps 6 to 10: 'a (cat:1.3)  in blue'
    4 of 75 tokens
      a cat*1.3 in blue
  part 2 of 2, weight 0.5
    1 of 75 tokens
      fog"""


def test_an_explanation_is_text():
    found = explain("a (cat:1.3) <lora:x:0.8> in [red:blue:0.5] AND fog:0.5", steps=10)
    assert str(found) == repr(found) == EXPLAINED


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_an_explanation_is_html_without_the_prompts_own_marks(syntax):
    page = explain("<script>& (cat:1.3), internationalization ü", syntax)._repr_html_()
    assert "<script" not in page and "&lt;script" in page
    opened, closed = re.findall(r"<(\w+)", page), re.findall(r"</(\w+)>", page)
    assert page.count("<") == len(opened) + len(closed)
    assert sorted(opened) == sorted(closed) and set(opened) == {"div", "span"}
    assert ('title="weight 1.3"' in page) == (syntax in ("a1111", "comfyui"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"syntax": "a111"},
            "one of plain, a1111, comfyui, compel, got 'a111'; did you mean 'a1111'?",
        ),
        ({"syntax": None}, "got None"),
        ({"syntax": ["a1111"]}, "got ['a1111']"),
        ({"steps": 0}, "steps of a schedule should be a whole number from 1, got 0"),
        ({"steps": 2.5, "syntax": "compel"}, "steps of a schedule should be a whole number from 1, got 2.5"),
    ],
)
def test_wrong_options_are_refused_in_a_line(options, message):
    with pytest.raises(UsageError) as caught:
        read("a", **options)
    assert message in str(caught.value)
