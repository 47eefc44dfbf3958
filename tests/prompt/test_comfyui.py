"""ComfyUI's prompts are read as ComfyUI reads them, and in time that grows with their length."""

import json
import math

import pytest
from recorded_prompts import GOLDEN, read, runs, token_ids, without_padding

from ldm.errors import UsageError
from ldm.prompt.chunks import CHUNK_LENGTH
from ldm.prompt.comfyui import chunk, parse_weights

ROWS = read("prompt_comfyui")["rows"]


def as_recorded(segments):
    return [[text, weight if math.isfinite(weight) else str(weight)] for text, weight in segments]


def test_341_recorded_prompts_have_the_recorded_weights():
    assert len(ROWS) == 341
    wrong = [row["prompt"] for row in ROWS if as_recorded(parse_weights(row["prompt"])) != row["segments"]]
    assert wrong == []


def test_recorded_prompts_have_the_recorded_chunks():
    wrong, compared = [], 0
    for row in ROWS:
        segments = parse_weights(row["prompt"])
        if "tokens" not in row or not all(math.isfinite(weight) for _, weight in segments):
            continue
        got = []
        for one in chunk(segments, token_ids):
            short = without_padding(one)
            got.append({**short, "words": runs(one.words[: len(short["ids"])])})
        compared += 1
        wrong += [] if got == row["tokens"] else [row["prompt"]]
    assert compared > 150 and wrong == []


INVERSION = json.loads((GOLDEN / "textual_inversion.json").read_text(encoding="utf-8"))
VECTORS = {}  # name -> numbers of its vectors, behind CLIP's vocabulary
for name, (count, _) in INVERSION["embeddings"].items():
    first = 50_000 + 100 * len(VECTORS)
    VECTORS[name] = list(range(first, first + count))


@pytest.mark.parametrize("row", INVERSION["comfyui"], ids=lambda row: row["prompt"][-24:])
def test_recorded_prompts_with_embeddings(row):
    def numbers(name):
        return VECTORS.get(name.removesuffix(".safetensors"))

    chunks = chunk(parse_weights(row["prompt"]), token_ids, embeddings=numbers)
    got = [["vec" if number >= 50_000 else number for number in one.ids] for one in chunks]
    assert got == row["chunks"]
    assert [sorted(set(one.weights)) for one in chunks] == [sorted(weights) for weights in row["weights"]]


def letters(text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("", [0]),
        ("a" * 75, [75]),
        ("a" * 76, [75, 1]),
        ("(" + "a" * 70 + ")" + "b" * 7, [70, 7]),  # fewer than 8 stay together
        ("(" + "a" * 70 + ")" + "b" * 8, [75, 3]),
        ("(" + "a" * 75 + ")" + "b" * 7, [75, 7]),
        ("a" * 230, [75, 75, 75, 5]),
    ],
)
def test_a_short_segment_is_not_split(text, used):
    chunks = chunk(parse_weights(text), letters)
    assert [one.used for one in chunks] == used
    assert all(len(one.ids) == len(one.weights) == len(one.words) == CHUNK_LENGTH + 2 for one in chunks)
    together = "".join(chr(number) for one in chunks for number in one.ids[1 : one.used + 1])
    assert together == text.replace("(", "").replace(")", "")


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("(((a))", [("(a", 1.1 * 1.1)]),  # each closing bracket at the end closes an outer one
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
        (")(a)", [(")(a)", 1.0)]),  # closed once too often: the next opening one makes up for it
        (")((a)", [(")(", 1.0), ("a", 1.1)]),
        ("(a:1:2)", [("a:1", 2.0)]),
        ("(a:(b):2)", [("a:", 2.0), ("b", 2.2)]),
        ("(a:(2))", [("a:", 1.1), ("2", 1.1 * 1.1)]),
    ],
)
def test_odd_brackets(text, segments):
    assert parse_weights(text) == segments


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("(" * 40_000 + "a" + ")" * 40_000, 1),
        ("(" * 14_000 + "a" + ":1.5)" * 14_000, 1),
        ("(" * 50_000 + ")" * 49_999, 1),
        ("(a:" * 30_000 + "1" + ")" * 2_000, 1),
        (")" * 50_000 + "(" * 50_000, 1),
        ("(a)" * 20_000, 20_000),
    ],
    ids=lambda value: str(value)[:6],
)
def test_long_and_deep_prompts_are_read(text, count):
    """Without recursion, and not in the square of the length."""
    assert len(parse_weights(text)) >= count


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"a", "a prompt must be a string, got bytes"), ("a" * 100_001, "a prompt may have 100000 characters")],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_prompt_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_weights(text)
