"""compel's prompts are read as compel reads them."""

import pytest
from recorded_prompts import read

from ldm.errors import UsageError
from ldm.prompt.compel import Blend, Conjunction, Swap, parse

ROWS = read("prompt_compel")["rows"]


def as_recorded(part):
    if isinstance(part, Conjunction):
        whole = {"conjunction": [as_recorded(text) for text in part.texts], "weights": list(part.weights)}
        whole["type"] = "AND"
        return {**whole, "loras": [list(lora) for lora in part.loras]} if part.loras else whole
    if isinstance(part, Blend):
        texts = [as_recorded(text) for text in part.texts]
        return {"blend": texts, "weights": list(part.weights), "normalize": part.normalize}
    if isinstance(part, Swap):
        original, edited = as_recorded(part.original), as_recorded(part.edited)
        return {"swap": original, "to": edited, "options": part.options}
    return [list(one) if isinstance(one, tuple) else as_recorded(one) for one in part]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["prompt"][:20])
def test_recorded_prompts(row):
    assert as_recorded(parse(row["prompt"])) == row["parsed"]


def test_brackets_around_a_swap_weigh_both_of_its_sides():
    (swap,) = parse("(cat+.swap(dog))1.5").texts[0]
    assert swap.original == (("cat", 1.1 * 1.5),) and swap.edited == (("dog", 1.5),)


def test_there_are_84_of_them():
    assert len(ROWS) == 84


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("(a)+,(b)-", [("a", 1.1), (",", 1.0), ("b", 0.9)]),
        ("red-(cat)1.5", [("red", 0.9), ("cat", 1.5)]),
        ("(cat-dog)+", [("cat-dog", 1.1)]),
        ("((a+)+)+", [("a", 1.1 * 1.1 * 1.1)]),
        ("(a b", [("(a b", 1.0)]),
        ("()", [("", 1.0)]),
        ("()+ x", [("x", 1.0)]),
        ("a\\+ b\\- c+", [("a\\+ b\\-", 1.0), ("c", 1.1)]),
        ("+ -- x", [("+ -- x", 1.0)]),
        ('"a (b"+ c', [("a (b", 1.1), ("c", 1.0)]),
        ('a "b', [('a "b', 1.0)]),
        ('"a \\"b\\" c"- d', [('a "b" c', 0.9), ("d", 1.0)]),
        ("(a).5", [("a", 0.5)]),
        ("  ", [("", 1.0)]),
    ],
)
def test_neighbours_of_the_recorded_ones(text, segments):
    assert parse(text) == Conjunction((tuple(segments),), (1.0,))


@pytest.mark.parametrize(
    "text",
    [
        "(" * 40_000 + "a" + ")" * 40_000,
        "(" * 100_000,
        "a" + "+" * 5_000,
        '"' * 29_999,
        "a.swap(" * 14_000,
        '("' + '\\","' * 20_000,
    ],
    ids=lambda text: text[:6],
)
def test_long_and_deep_prompts_are_read(text):
    assert len(parse(text).texts) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('("a", "b").blend(1)', ".blend() should have a weight for each of its 2 texts, or none; got 1"),
        ('("a", "b").and(1, 2, 3)', ".and() should have a weight for each of its 2 texts, or none; got 3"),
        ('("a", "b").blend(1, big)', "a weight of .blend() in a prompt should be a number, got 'big'"),
        ('x ("a", "b").blend(1, 2)', "should be the whole prompt"),
        ('("a", "b").and() x', "should be the whole prompt"),
        ("withLora(x, strong) cat", "the strength of a LoRA in a prompt should be a number, got 'strong'"),
        ("a.swap(b.swap(c))", "a .swap() inside of another"),
        ("a" + "+" * 8_000, "8000 signs behind it"),
        (5, "a prompt must be a string, got int"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_prompts_are_refused_in_a_line(text, message):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 400
