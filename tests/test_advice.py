"""What is said of a wish before it is painted: what it is said of, and above all of what it is not."""

import subprocess
import sys

import pytest

from ldm.advice import (
    FOREIGN_SYNTAX,
    about_ends,
    about_size,
    about_steps,
    about_syntax,
    about_words,
    foreign_syntax,
    unseen_words,
    without_names,
)

WEIGHT, DOUBLED, CHANGE, PARTS = (
    "a weight",
    "emphasis by doubled brackets",
    "a change of the prompt while painting",
    "a joint between prompts",
)
COMPEL, NETWORK, EMBEDDING, OPTION = (
    "a weight in compel's manner",
    "a network to load",
    "an embedding",
    "an option",
)

FOREIGN = [
    ("a (red:1.3) circle", WEIGHT, "(red:1.3)"),
    ("a (red:2)", WEIGHT, "(red:2)"),
    ("(red: 1.3)", WEIGHT, "(red: 1.3)"),
    ("(red:1.3 )", WEIGHT, "(red:1.3 )"),
    ("(red:.5)", WEIGHT, "(red:.5)"),
    ("(red:-1)", WEIGHT, "(red:-1)"),
    ("(red circle, small\nblue square:0.8)", WEIGHT, None),
    ("a (b (c:1.2) d)", WEIGHT, "(c:1.2)"),
    ("(a (b):1.2)", WEIGHT, None),
    ("(style3:1.2)", WEIGHT, "(style3:1.2)"),
    ("(rot:1,5) and (x:1.1)", WEIGHT, "(x:1.1)"),
    ("((red)) circle", DOUBLED, "((red)"),
    ("(((red circle)))", DOUBLED, None),
    ("((a (b)))", DOUBLED, None),
    ("[[red]] circle", DOUBLED, None),
    ("{{red}} circle", DOUBLED, None),
    ("[red:blue:0.5] circle", CHANGE, "[red:blue:0.5]"),
    ("[red:blue:12]", CHANGE, None),
    ("[red : blue : 12]", CHANGE, None),
    ("[red::0.5]", CHANGE, None),
    ("[red::12]", CHANGE, None),
    ("[:red:.5]", CHANGE, None),
    ("[red:0.5]", CHANGE, None),
    ("[red:12]", CHANGE, None),
    ("a [red|blue] circle", "alternatives", "[red|blue]"),
    ("a {red|blue|green} circle", "a choice of texts", None),
    ("{2$$red|blue}", "a choice of texts", None),
    ("a red circle AND a blue square", PARTS, "AND"),
    ("a cat :1.2 AND a dog :0.8", PARTS, "AND"),
    ("a cat\nBREAK\na dog", PARTS, "BREAK"),
    ("a cat, BREAK a dog", PARTS, "BREAK"),
    ("一只猫 AND 一只狗", PARTS, "AND"),
    ("a cat <lora:style:1>", NETWORK, "<lora:style:1>"),
    ("<LoRA:my style v2:0.7:0.5>", NETWORK, None),
    ("<lyco:x:1>", NETWORK, None),
    ("<hypernet:x:1>", NETWORK, None),
    ("bad hands, embedding:EasyNegative, x", EMBEDDING, "embedding:EasyNegative"),
    ("a <cat-toy> on a beach", EMBEDDING, "<cat-toy>"),
    ("a __colour__ circle", "a wildcard", "__colour__"),
    ("__animals/cats*__", "a wildcard", None),
    ("a red++ circle", COMPEL, None),
    ("a (red circle)+", COMPEL, None),
    ("a (red circle)-- here", COMPEL, None),
    ("fog--, rain", COMPEL, None),
    ("a (red circle)1.3", COMPEL, None),
    ('("a cat", "a dog").blend(0.7, 0.3)', COMPEL, ").blend(0.7, 0.3)"),
    ("a cat.swap", None, None),
    ("a cat --ar 16:9", OPTION, "--ar 16:9"),
    ("a cat --steps 20", OPTION, "--steps 20"),
    ("hot::2 dog", OPTION, "::2"),
    (r"saber \(fate\)", "an escaped bracket", r"\("),
]


@pytest.mark.parametrize(("text", "kind", "piece"), FOREIGN)
def test_syntax_of_other_programs_is_found_and_named(text, kind, piece):
    found = foreign_syntax(text)
    assert list(found) == ([] if kind is None else [kind])
    assert kind is None or kind in FOREIGN_SYNTAX
    if piece is not None:
        assert found[kind] == piece


PLAIN = [
    "",
    "a large red circle above a small blue square on a white background",
    "a cat (on the left) and a dog [on the right]",
    "a cat (a big one (very big)) sleeps",
    "rock and roll, salt and pepper, And then",
    "AND",
    "BREAK",
    "ROCK AND ROLL",
    "A CAT AND A DOG ON A BEACH",
    "CATS AND DOGS, BREAKING NEWS",
    "a poster that says ROCK AND ROLL",
    "a poster that says CATS, AND DOGS",
    "a breakfast, a break, a band",
    "(aspect ratio 16:9)",
    "(16:9)",
    "(ratio 2.39:1)",
    "(1:1.85)",
    "(Genesis 1:3)",
    "[John 3:16]",
    "at 10:30 (or 12:45)",
    "[12:30:45]",
    "[00:01:02.5]",
    "(born: 1990)",
    "(born:1990)",
    "(price: 2.50)",
    "a sign: open",
    "a book titled: [sic]",
    "[note: see chapter 5]",
    "a list [1, 2, 3] and {a, b}",
    "he said: (hello)",
    "happy :) (smiling :3) :( and <3 and >_<",
    "sad :((",
    "a smile ((:",
    "C++ and F# code, C++17",
    "Disney+ and LGBTQ+ parade, age 18+",
    "an A+ grade",
    "a dash--like this--in a sentence",
    "a dash -- with spaces",
    "one-way, twenty-one (well-known)-ish",
    "f(x) = 2(x + 1)",
    "figure (a)-(b)",
    "see (note).",
    "a < b > c",
    "1 < 2 and 3 > 2",
    "snake_case and _emphasis_ and __init",
    "a|b",
    "50% off, $5 | #1",
    "std::vector",
    "¯\\_(ツ)_/¯",
    "a path C:\\temp",
    "“quoted” — with dashes… and ‘more’",
    "embedding: a technique",
    "an embedding of words",
    "<|endoftext|>",
    "tom & jerry &amp; friends",
    "一只猫(红色)和一只狗[蓝色]",
    "🐱 (🐶)",
]


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_left_alone(text):
    assert foreign_syntax(text) == {}


def test_each_kind_is_told_once_and_in_one_short_line():
    lines = about_syntax(
        ["a (red:1.3) cat", "a (blue:1.3) cat", "x " + "<lora:" + "y" * 5000 + ":1>", "[a|b]"]
    )
    assert list(lines) == [WEIGHT, NETWORK, "alternatives"]
    assert (
        lines[WEIGHT] == "'(red:1.3)' is a weight to other programs; here it is read as plain text: "
        "ldm.prompt reads it, give prompt_syntax='a1111' (--syntax a1111)"
    )
    assert all(len(line) <= 400 for line in lines.values())


HOSTILE = ["(", "[", "{", "((", "[a:", "(a:", "[|", "(a:1", "<a", "__a/", "a::", ")-", "++", "a+", "--", "\\", " AND",
           "embedding:", "[a:1:", "(a: ", ":.1 ", "[:", "{a|", ") : "]  # fmt: skip


@pytest.mark.slow
def test_no_text_takes_longer_than_its_length():
    """In a process that may use ten seconds of processor time for 2 x 24 texts of 100,000 characters."""
    code = (
        "import resource, sys; from ldm.advice import foreign_syntax, unseen_words\n"
        "spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (spent + 10, spent + 10))\n"
        f"for piece in {HOSTILE!r}:\n"
        "    for text in ((piece * 100_000)[:100_000], piece + 'a' * 100_000 + ' 1' * 9):\n"
        "        foreign_syntax(text); unseen_words(frozenset('a'), [text])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]


KNOWN = frozenset("a red circle above the it's".split())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A Red CIRCLE, above the circle.", []),
        ("", []),
        ("  ", []),
        ("a photograph of an astronaut", ["photograph", "of", "an", "astronaut"]),
        ("red-circle; (red) [circle] 'red' \"red\" red_circle", []),
        ("“red” — circle… ‘red’", []),
        ("it's a circle's", ["circle's"]),
        ("2 circles", ["2", "circles"]),
        ("ｒｅｄ circle", []),  # full-width letters are letters
        ("a <|startoftext|> red<|endoftext|> circle", []),
        ("一只猫 red", ["一只猫"]),
        ("a 🐱", ["🐱"]),
        ("cat Cat cat", ["cat"]),
        ("a + b = $", ["b"]),
        # The words of other programs' syntax are words; its figures and names are told as syntax.
        ("a (red:1.3) circle", []),
        ("a (dog:1.3) circle", ["dog"]),
        ("a (red: 0.5 ) and (2 dogs:1.1)", ["and", "2", "dogs"]),
        ("a (a (red):1.2)", []),
        ("((red circle))", []),
        ("[red:blue:0.5] [red:12] [red::0.25] [:cat:.5]", ["blue", "cat"]),
        ("([red:blue:0.5]:1.3)", ["blue"]),
        ("a [red|dog] {2$$red|cat} {1-3$$a|b} {0.5::red|2::fog}", ["dog", "cat", "b", "fog"]),
        ("a red <lora:style_v2:0.8> circle <hypernet:x:1>", []),
        ("a <cat-toy>, embedding:EasyNegative red", []),
        ("a __colour__ circle __animals/cats*__", []),
        ("a red++ (circle)1.3 (dog)+ (the)--", ["dog"]),
        ('("a red circle", "a dog").blend(0.7, 0.3)', ["dog"]),
        ('a ("red").swap("dog")', ["dog"]),
        ("a red circle --ar 16:9 --v 5 --no dog", ["dog"]),
        ("red::2 circle::-1", []),
        ("a red :1.2 AND a circle :0.8", ["and"]),
        (r"red \(circle\)", []),
        ("(Genesis 1:3) at 10:30", ["genesis", "1", "3", "at", "10", "30"]),
    ],
)
def test_words_that_a_model_has_never_seen(text, want):
    assert unseen_words(KNOWN, [text]) == want


def test_the_line_about_words_is_short_and_says_what_is_known():
    line = about_words(KNOWN, ["a red circle", " ".join(f"word{i}" for i in range(20))])
    assert "for them: word0, word1, " in line and line.endswith(
        "word11 and 8 more; it knows: a above circle it's red the"
    )
    assert about_words(frozenset(), ["anything"]) is None and about_words(KNOWN, ["a red circle"]) is None
    many = frozenset(f"w{i}" for i in range(100))
    assert about_words(many, ["x" * 9000]).endswith("for them: " + "x" * 40)


@pytest.mark.parametrize(
    ("known", "width", "height", "words"),
    [
        (None, 64, 2048, None),
        ((128, 128), 128, 128, None),
        ((128, 128), 128, 136, "pictures of 128 x 128 pixels only; at 128 x 136"),
        ((384, 1024), 512, 512, None),
        ((384, 1024), 384, 1024, None),
        ((384, 1024), 376, 512, "sides from 384 to 1024 pixels; at 376 x 512"),
        ((384, 1024), 512, 1032, "at 512 x 1032"),
    ],
)
def test_sizes_that_a_model_does_not_know(known, width, height, words):
    line = about_size(known, width, height)
    assert line is None if words is None else words in line


@pytest.mark.parametrize(
    ("sampler", "steps", "end"),
    [
        ("plms", 30, None),
        ("plms", 29, "give it 30 or more, or ddim, which paints well with 29"),
        ("plms", 3, "give it 30 or more"),
        ("ddpm", 9, "give it 10 or more, or ddim, which paints well with 9"),
        ("ddim", 4, "give it 5 or more"),
        ("dpmpp_2m", 1, None),  # nothing is said of it
    ],
)
def test_steps_that_are_too_few_for_a_sampler(sampler, steps, end):
    line = about_steps({"plms": 30, "ddpm": 10, "ddim": 5}, sampler, steps)
    assert line is None if end is None else line.endswith(end)


@pytest.mark.parametrize(
    ("sampler", "spacing", "ends", "says"),
    [
        (
            "euler",
            "simple",
            {"sigma_min": 0.1, "sigma_max": None},
            "sigma_min does nothing to the spacing simple",
        ),
        (
            "lcm",
            None,
            {"sigma_min": 0.1, "sigma_max": 9.0},
            "sigma_min and sigma_max do nothing to the spacing lcm",
        ),
        ("euler", "karras", {"sigma_min": 0.1, "sigma_max": 9.0}, None),
        ("euler", "simple", {"sigma_min": None, "sigma_max": None}, None),
        ("euler", [3.0, 0.0], {"sigma_min": None, "sigma_max": None}, None),
    ],
)
def test_ends_that_a_spacing_pays_no_attention_to(sampler, spacing, ends, says):
    line = about_ends(sampler, spacing, ends)
    assert line is says is None or line.startswith(says)


def test_names_of_embeddings_that_are_given_are_no_foreign_words():
    class Given:
        names = ("<b-c>", "birb", "embedding:birb")

    texts = ["a Birb, <b-c> and embedding:birb, embedding:other", "birbs", ""]
    assert without_names(texts, [Given(), object()]) == ["a  ,   and  , embedding:other", "birbs", ""]
    assert without_names(texts, []) == texts
    for text, instead in (("<lora:x:1>", "--lora FILE:weight, in Python adapters=[LoRA(file, weight)]"),
                          ("embedding:x", "--embedding FILE, in Python adapters=[Embedding(file)]")):  # fmt: skip
        (line,) = about_syntax([text]).values()
        assert line.endswith(f"here it is read as plain text: give {instead} of ldm.adapters")
