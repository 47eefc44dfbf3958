"""AUTOMATIC1111's prompts are read as its program reads them, and in time that grows with their length."""

import math

import pytest
from recorded_prompts import read, token_ids, without_padding

from ldm.errors import UsageError
from ldm.prompt.a1111 import Tag, chunk, parse_emphasis, schedule, split_and, split_tags
from ldm.prompt.chunks import CHUNK_LENGTH, END, START

ROWS = read("prompt_a1111")["rows"]


def lists(pairs):
    return [list(pair) for pair in pairs]


def differences(got_and_wanted):
    """The first rows that differ, by prompt."""
    return [row for row in got_and_wanted if row[1] != row[2]][:5]


def test_325_recorded_prompts_have_the_recorded_weights():
    assert len(ROWS) == 325
    rows = [(row["prompt"], lists(parse_emphasis(row["prompt"])), row["attention"]) for row in ROWS]
    assert differences(rows) == []


@pytest.mark.parametrize(
    ("key", "steps", "options"),
    [
        ("schedule", 10, {}),
        ("schedule_2x", 20, {}),
        ("schedule_hires", 10, {"hires_steps": 15}),
        ("schedule_old", 10, {"old": True}),
    ],
)
def test_recorded_prompts_have_the_recorded_schedules(key, steps, options):
    """Where the rule of old makes no difference, it is recorded once."""
    rows = [
        (row["prompt"], lists(schedule(row["prompt"], steps, **options)), row.get(key, row["schedule"]))
        for row in ROWS
        if key in row or key == "schedule_old"
    ]
    assert len(rows) >= 300 and differences(rows) == []


def test_recorded_prompts_have_the_recorded_parts():
    rows = [(row["prompt"], lists(split_and(row["prompt"])), row["multicond"]) for row in ROWS]
    assert differences(rows) == []


@pytest.mark.parametrize(
    ("key", "options"),
    [("tokens", {}), ("tokens_backtrack0", {"backtrack": 0}), ("tokens_backtrack5", {"backtrack": 5})],
)
def test_recorded_prompts_have_the_recorded_chunks(key, options):
    rows = []
    for row in ROWS:
        if "tokens" not in row or (options and key not in row and len(row["tokens"]["chunks"]) == 1):
            continue
        chunks = chunk(parse_emphasis(row["prompt"]), token_ids, **options)
        got = {"count": chunks.count, "chunks": [without_padding(one) for one in chunks]}
        rows.append((row["prompt"], got, row.get(key, row["tokens"])))
    assert len(rows) > 20 and differences(rows) == []


def letters(text):
    """A tokenizer of one letter a token: "," is 44."""
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "options", "used"),
    [
        ("", {}, [0]),
        ("a" * 75, {}, [75]),
        ("a" * 76, {}, [75, 1]),
        ("a" * 60 + "," + "b" * 16, {}, [61, 16]),  # what stands behind the comma moves
        ("a" * 55 + "," + "b" * 21, {}, [56, 21]),  # 20 tokens, the comma counted
        ("a" * 54 + "," + "b" * 21, {}, [75, 1]),
        ("a" * 60 + "," + "b" * 16, {"backtrack": 0}, [75, 2]),
        ("a" * 70 + "," + "b" * 5, {"backtrack": 5}, [71, 5]),
        ("a" * 69 + "," + "b" * 6, {"backtrack": 5}, [75, 1]),
        ("a" * 60 + "," + "b" * 14 + ",", {}, [75, 1]),  # a comma itself moves nothing
        ("a" * 60 + "," + "b" * 16, {"comma": None}, [75, 2]),
    ],
)
def test_a_full_chunk_ends_behind_its_last_comma(text, options, used):
    chunks = chunk([(text, 1.0)], letters, **{"comma": 44, **options})
    assert [one.used for one in chunks] == used
    for one in chunks:
        assert len(one.ids) == len(one.weights) == CHUNK_LENGTH + 2
        assert one.ids[0] == START and one.ids[-1] == END
    together = [number for one in chunks for number in one.ids[1 : one.used + 1]]
    assert together == letters(text)


def test_break_ends_a_chunk_and_counts_it_whole():
    chunks = chunk(parse_emphasis("ab BREAK c BREAK BREAK"), letters, comma=44)
    assert [one.used for one in chunks] == [2, 1, 0] and chunks.count == 3 * CHUNK_LENGTH
    inside = chunk(parse_emphasis("(a BREAK b:1.3)"), letters)  # the word, as in the original
    assert [one.used for one in inside] == [7] and inside[0].weights[2] == -1.3


def test_an_embedding_stays_in_one_chunk():
    vectors = {number: "x" for number in range(900, 903)}
    together = chunk([("", 1.3)], lambda text: [5] * 74 + [900, 901, 902, 6], vectors=vectors.get)
    assert [one.used for one in together] == [74, 4]
    assert together[1].ids[1:5] == (900, 901, 902, 6) and together[1].weights[:6] == (
        1,
        1.3,
        1.3,
        1.3,
        1.3,
        1,
    )
    twice = chunk([("", 1.0)], lambda text: [5] * 71 + [900, 901, 902, 900, 901, 902], vectors=vectors.get)
    assert [one.used for one in twice] == [74, 3]
    alone = chunk([("", 1.0)], lambda text: [5] * 74 + [900, 901, 902, 6])
    assert [one.used for one in alone] == [75, 3]


def at(text, step, steps, **options):
    return next(part for end, part in schedule(text, steps, **options) if step <= end)


@pytest.mark.parametrize("text", [row["prompt"] for row in ROWS if len(row["schedule"]) > 1][::3])
def test_a_schedule_is_what_each_step_alone_would_give(text):
    """Laws: the ends go up to the last step; and a step's text does not change if it is scheduled again."""
    whole = schedule(text, 7)
    ends = [end for end, _ in whole]
    assert ends == sorted(set(ends)) and ends[-1] == 7 and ends[0] >= 1
    for _, part in whole:
        assert schedule(part, 7) == [(7, part)] or "[" in part


@pytest.mark.parametrize(
    ("text", "steps", "texts"),
    [
        ("[a:b:2]", 4, "aabb"),
        ("[a:b:0.5]", 4, "aabb"),
        ("[a|b]", 4, "abab"),
        ("[a|[b:c:2]]", 4, "abac"),
        ("[[a|b]:c:3]", 4, "abac"),
        ("[a:b:1e9]", 3, "aaa"),
        ("[a:b:1e999]", 3, "aaa"),
        ("[a:b:-1e999]", 3, "bbb"),
    ],
)
def test_schedules_by_step(text, steps, texts):
    assert "".join(at(text, step, steps) for step in range(1, steps + 1)) == texts


def test_hires_steps_count_on():
    assert schedule("[a:b:12]", 10, hires_steps=8) == [(2, "a"), (8, "b")]
    assert schedule("[a:b:1.5]", 10, hires_steps=8) == [(4, "a"), (8, "b")]
    assert schedule("[a:b:0.5]", 10, hires_steps=8, old=True) == [(5, "a"), (10, "b")]


@pytest.mark.parametrize(
    ("text", "left", "tags"),
    [
        ("a <lora:x:0.8> b", "a  b", [Tag("lora", ("x", "0.8"))]),
        ("<lora:x>", "", [Tag("lora", ("x",))]),
        (
            "<lora:x:0.8:0.5><hypernet:y:1>",
            "",
            [Tag("lora", ("x", "0.8", "0.5")), Tag("hypernet", ("y", "1"))],
        ),
        ("<lora:x:te=0.5:unet=0.7>", "", [Tag("lora", ("x",), {"te": "0.5", "unet": "0.7"})]),
        ("<lora:x", "<lora:x", []),
        ("<lora>", "<lora>", []),
        ("<:x>", "<:x>", []),
        ("a < b > c", "a < b > c", []),
        ("(<lora:x:1>:1.2)", "(:1.2)", [Tag("lora", ("x", "1"))]),
        ("<a:<b:c>", "", [Tag("a", ("<b", "c"))]),
    ],
)
def test_tags_are_taken_out(text, left, tags):
    assert split_tags(text) == (left, tags)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("<lora:x>", (1, 1)),
        ("<lora:x:0.8>", (0.8, 0.8)),
        ("<lora:x:0.8:0.5>", (0.8, 0.5)),
        ("<lora:x:te=0.5>", (0.5, 0.5)),
        ("<lora:x:0.8:unet=-1>", (0.8, -1)),
        ("<lora:x:>", (1, 1)),
    ],
)
def test_strengths_of_a_tag(text, weights):
    (tag,) = split_tags(text)[1]
    assert tag.name == "x" and tag.weights() == weights


LONG = 30_000


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000 + "a" + ")" * 9_999,  # as many as may be open
        "[" * 3_000 + "a" + ":b:3]" * 3_000,
        "[a|" * 3_000 + "b" + "]" * 3_000,
        "(" + ":" + " " * (LONG - 3) + "x",
        "BREAK" + " " * (LONG - 6) + "x",
        ":" * LONG,
        "\\(" * (LONG // 2),
        "<a:" * (LONG // 3),
        "[a:b:" + "1" * (LONG - 6) + "]",
        "AND " * (LONG // 4),
    ],
    ids=lambda text: text[:6],
)
def test_long_and_deep_prompts_are_read(text):
    """Without recursion, and in time in proportion: were it the square, this would take hours."""
    assert len(text) <= LONG
    assert all(not math.isnan(weight) for _, weight in parse_emphasis(text))
    assert schedule(text, 5)[-1][0] == 5
    assert len(split_and(text)) == text.count("AND ") + 1 and isinstance(split_tags(text)[0], str)


def deep_weight(depth):
    weight = 1.0
    for _ in range(depth):
        weight *= 1.1
    return weight


def test_deep_brackets_multiply_one_by_one():
    assert parse_emphasis("(" * 777 + "a") == [("a", deep_weight(777))]
    assert parse_emphasis("(" * 10_000 + "a") == [("a", math.inf)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_emphasis("(a:1.2.3)"), "the weight in ':1.2.3)' of the prompt should be a number"),
        (lambda: parse_emphasis("(a:.)"), "the weight in ':.)' of the prompt should be a number"),
        (lambda: parse_emphasis("(" * 10_001), "10000 brackets open at once"),
        (lambda: schedule("[" * 10_001, 5), "10000 brackets open at once"),
        (lambda: parse_emphasis("a" * 100_001), "a prompt may have 100000 characters, got 100001"),
        (lambda: schedule(5, 5), "a prompt must be a string, got int"),
        (lambda: schedule("a", 0), "steps of a schedule should be a whole number from 1, got 0"),
        (lambda: schedule("a", 5, hires_steps=2.5), "hires_steps of a schedule should be a whole number"),
        (lambda: schedule("a", True), "steps of a schedule should be a whole number from 1, got True"),
        (lambda: schedule("[a|b]" + "x" * 70_000, 1000), "changes at 1000 steps is too long"),
        (
            lambda: Tag("lora", ("x", "strong")).weights(),
            "the strength in <lora:x:strong> should be a number",
        ),
    ],
)
def test_wrong_prompts_are_refused_in_a_line(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert caught.value.exit_code == 2
