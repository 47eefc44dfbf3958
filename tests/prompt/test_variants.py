"""Templates: what is drawn follows the documented rule, from the seed alone, in every language."""

import random
from collections import Counter

import pytest
from tiny import tiny_model

import ldm
from ldm.advice import about_syntax
from ldm.checks.templates import draw_texts
from ldm.cli import painting_parser, read_prompts
from ldm.cli.painting import lay_out
from ldm.cli.prompts import Line
from ldm.errors import AbsentError, FormatError, LdmError, UsageError
from ldm.limits import MAX_PROMPT
from ldm.metadata import from_infotext
from ldm.pipeline import StableDiffusion
from ldm.prompt.variants import Wildcards, draw

NONE = Wildcards(None)
FILES = {
    "colours.txt": "# comment\n\nred\n  blue \n",
    "colours-cold.txt": "\ufeffcyan\nnavy\n",
    "dogs/small.txt": "pug\n{toy |}terrier\n9::dachshund\n",
    "pairs.txt": "__colours__ and __dogs/small__\n",
    "loop.txt": "a __loop__\n",
    "bomb0.txt": "__bomb1____bomb1__\n",
    **{f"bomb{i}.txt": f"__bomb{i % 40 + 1}__ __bomb{i % 40 + 1}__\n" for i in range(1, 41)},
    "unclosed.txt": "{a|b\n",
    "empty.txt": "# nothing\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wildcards")
    (root / "dogs").mkdir()
    for name, text in FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return root


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def drawn(template, wildcards=NONE, count=150):
    return Counter(draw(template, seed, wildcards) for seed in range(count))


def test_a_choice_is_the_documented_one():
    """One number of random.Random(seed) for each choice, those within a chosen text before those behind it."""
    for seed in range(40):
        numbers = random.Random(seed)
        first = int(3 * numbers.random())
        text = "abc"[first] if first else "xy"[int(2 * numbers.random())]
        weighed = "p" if numbers.random() * 1.25 < 0.25 else "q"
        pair = ["k", "l", "m"]
        pair = [pair.pop(int((3 - i) * numbers.random())) for i in range(2)]
        got = draw("{{x|y}|b|c} {0.25::p|q}, {2$$ and $$k|l|m}.", seed, NONE)
        assert got == f"{text} {weighed}, {' and '.join(pair)}.", seed


# A template, and all that is drawn of it.
DRAWN = [
    ("a cat", {"a cat"}),
    ("a {red|blue} cat", {"a red cat", "a blue cat"}),
    ("{a}{|}", {"a"}),
    ("{a|}", {"a", ""}),
    ("{ a | b }", {" a ", " b "}),
    ("{a|{b|{c|d}}}", {"a", "b", "c", "d"}),
    ("{2$$a|b|c}", {"a, b", "a, c", "b, a", "b, c", "c, a", "c, b"}),
    ("{1-2$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
    ("{-2$$a|b}", {"a", "b", "a, b", "b, a"}),
    ("{2-$$a|b}", {"a, b", "b, a"}),
    ("{9$$$$a|b}", {"ab", "ba"}),
    ("{0$$a|b}", {""}),
    ("{0::a|1::b|0.5::{c|d}}", {"b", "c", "d"}),
    ("{a::b|b}", {"a::b", "b"}),  # no number
    (r"\{a\|b\} {a\|b|\__c__}", {r"{a\|b} a|b", r"{a\|b} __c__"}),
    ("{[x|y]|z} {(a|b)}", {"[x|y] (a", "[x|y] b)", "z (a", "z b)"}),
    ("{[a|b|c}", {"[a", "b", "c"}),  # the bracket does not close
    ("snake_case a_ __ __init", {"snake_case a_ __ __init"}),
    # every language's marks pass through
    ("({red|blue}:1.3) [{a|b}:c:0.5]", {f"({x}:1.3) [{y}:c:0.5]" for x in ("red", "blue") for y in "ab"}),
    ("a AND {b:0.5|c}", {"a AND b:0.5", "a AND c"}),
    ("<lora:{ink|oil}:0.{4|8}>", {f"<lora:{x}:0.{y}>" for x in ("ink", "oil") for y in "48"}),
    (
        '("a {x|y}", "b").blend({1, 2|2, 1})',
        {f'("a {x}", "b").blend({y})' for x in "xy" for y in ("1, 2", "2, 1")},
    ),
    ("embedding:{a|b} {cat++|(dog)1.2}", {f"embedding:{x} {y}" for x in "ab" for y in ("cat++", "(dog)1.2")}),
]
OF_FILES = [
    ("__colours__", {"red", "blue"}),
    ("a __dogs/small__", {"a pug", "a toy terrier", "a terrier", "a dachshund"}),
    ("__colours*__", {"red", "blue", "cyan", "navy"}),
    ("{2$$__colours__}", {"red, blue", "blue, red"}),
    ("{__colours__|x}", {"red", "blue", "x"}),
    (
        "__pairs__",
        {f"{x} and {y}" for x in ("red", "blue") for y in ("pug", "toy terrier", "terrier", "dachshund")},
    ),
]


def test_all_that_a_template_may_give_and_nothing_else_is_drawn(folder):
    for template, wanted in DRAWN:
        assert set(drawn(template)) == wanted, template
    for template, wanted in OF_FILES:
        assert set(drawn(template, Wildcards(folder))) == wanted, template


def test_weights_are_shares():
    assert 0.85 < drawn("{9::a|b}", count=600)["a"] / 600 < 0.95
    assert 0.45 < drawn("{{a|b}|c}", count=600)["c"] / 600 < 0.55


# A template, and words of the one line that comes.
REFUSED = [
    ("a {b|c", UsageError, "a template has 1 { without } in 'a {b|c'; close it, or write \\{ for text"),
    ("{" * 10_001, UsageError, "may have 10000 braces open at once"),
    ("a} b", UsageError, "a template has a } without its { at character 2 of 'a} b'"),
    ("{-1::a|b}", UsageError, "a weight of a template's option should be a number from 0, got '-1'"),
    ("{" + "9" * 400 + "::a|b}", UsageError, "should be a number from 0"),
    ("{0::a|0::b}", UsageError, "no weight above 0"),
    ("{3-2$$a|b}", UsageError, "from 3 to 2 of its options; write the smaller number first"),
    ("${x=a}", UsageError, "variables of a template, '${x=a}', are not here"),
    ("__colors__", AbsentError, "no wildcard file goes by 'colors'; did you mean 'colours'?"),
    ("__../secret__", AbsentError, "no wildcard file goes by '../secret'"),
    ("__zzz__", AbsentError, "there are 49 in the folder"),
    ("__loop__", UsageError, "does not come to an end: its wildcard files lead back to themselves"),
    ("__bomb0__", UsageError, "does not come to an end"),
    ("__unclosed__", UsageError, "unclosed.txt': a template has 1 { without }"),
    ("__empty__", FormatError, "hold no text; write one a line"),
    ("__binary__", FormatError, "give text in UTF-8, one a line"),
    ("{a|b}" + "x" * MAX_PROMPT, UsageError, f"more than {MAX_PROMPT} characters"),
]


def test_what_is_no_template_is_refused_in_one_line(folder):
    for template, kind, words in REFUSED:
        with pytest.raises(kind) as found:
            draw(template, 1, Wildcards(folder))
            pytest.fail(f"{template[:40]} passed")
        told = str(found.value).replace(str(folder), "")
        assert words in told and len(told) <= 400 and "\n" not in told, template[:40]
    with pytest.raises(UsageError, match="give wildcards .--wildcards., the folder"):
        draw("__colours__", 1, NONE)
    with pytest.raises(AbsentError, match="wildcards 'nowhere' is no folder"):
        Wildcards("nowhere")


def test_time_is_in_proportion_to_the_text():
    for template in (
        "{" * 2999 + "a" + "}" * 2999,
        "{a|" * 2999 + "}" * 2999,
        "__" * 10_000,
        "[{|" * 2999 + "]}" * 2999,
    ):
        assert draw(template, 1, NONE) is not None


def test_each_image_draws_by_its_seed_alone(sd, folder):
    prompts = ["a {red|blue|green} circle", "__colours__ and {1|2|3|4}"]
    how = {"wildcards": folder, "negative_prompt": "{1|2|3|4}", "seed": 5}
    request = sd.plan(prompts, num_images=3, **how)
    found = [(one.prompt, one.negative_prompt, one.seed) for one in request.images]
    assert [seed for *_, seed in found] == [5, 6, 7, 8, 9, 10]
    for i, (*texts, seed) in enumerate(found):
        (alone,) = sd.plan(prompts[i // 3], **how | {"seed": seed}).images
        assert texts == [alone.prompt, alone.negative_prompt], i
    assert len({text for text, *_ in found}) > 2
    # The negative prompt has numbers of its own.
    both = sd.plan("{1|2}", negative_prompt="{1|2}", variants=True, num_images=40, seed=0)
    assert len({(one.prompt, one.negative_prompt) for one in both.images}) == 4
    variations = sd.plan("{1|2|3|4|5|6}", variants=True, num_images=4, seed=5, variation_strength=0.1)
    assert len({(one.prompt, one.seed) for one in variations.images}) == 1
    assert sd.plan("{a|b} __x__").images[0].prompt == "{a|b} __x__"  # off: text, as in CompVis, and said
    assert [line.split(": ")[-1].split(" (")[0] for line in about_syntax(["{a|b} __x__"]).values()] == [
        "give variants=True",
        "give wildcards=FOLDER",
    ]
    for given, words in (
        ({"variants": "yes"}, "variants must be True or False"),
        ({"wildcards": 3}, "wildcards must be a path, got 3"),
        ({"wildcards": ""}, "wildcards must be a path, got ''"),
        ({"variants": True, "hires_scale": 2, "hires_prompt": "{a|b}"}, "hires_prompt is one text for all"),
        (
            {"variants": True, "regions": [("{a|b}", (0, 0, 0.5, 1))]},
            r"the prompt of regions\[0\] is one text",
        ),
        ({"variants": True, "num_images": 0}, "num_images must be"),
        ({"variants": True, "prompt": "{a"}, "a template has 1 { without }"),
    ):
        with pytest.raises(LdmError, match=words):
            sd.plan(**{"prompt": "a", **given})


def test_the_picture_says_what_was_drawn_and_of_what(sd, tmp_path):
    template = "a ({red|blue}:1.2) circle"
    out = sd.txt2img(
        [template, "a ring"],
        negative_prompt="{x|y}",
        variants=True,
        prompt_syntax="a1111",
        seed=4,
        steps=1,
        progress=False,
    )
    path, other = out.save(tmp_path)
    told = ldm.read_metadata(path)
    assert (told["template"], told["negative_template"]) == (template, "{x|y}")
    assert told["prompt"] == draw(template, 4, NONE) != template
    assert ldm.read_metadata(other)["template"] is None
    assert (
        from_infotext(out.infotexts[0])["template"] == template
        and "Template" not in out.infotexts[1].split("Neg")[0]
    )
    # What was drawn is what --like paints again.
    again = painting_parser("txt2img.py", "", outdir="o", scale=7.5).parse_args(["--like", str(path)])
    assert again.prompt == told["prompt"] and not again.variants and again.negative_prompt in ("x", "y")


def test_the_scripts_know_what_will_be_drawn(folder, tmp_path):
    """Pictures whose drawn prompts name different LoRAs are requests of their own; seeds keep their order."""
    parser = painting_parser("txt2img.py", "", outdir="o", scale=7.5)
    args = parser.parse_args(["--syntax", "a1111", "--variants", "--seed", "5", "--n_iter", "2"])
    template = "a <lora:{ink|oil}:1>"
    groups = lay_out(args, [Line(template, {"batch_size": 4})], "ddim", ({},))
    found = [(seed, group.tags[0].name) for group in groups for seed in group.seeds]
    assert found == [(seed, draw("{ink|oil}", seed, NONE)) for seed in range(5, 13)]
    assert {text for group in groups for text in group.prompts} == {template} and len(groups) > 1
    (tmp_path / "p.txt").write_text(
        f"--prompt {{a|b}} --variants\n--prompt __colours__ --wildcards {folder}\n__x__\n"
    )
    lines = read_prompts(str(tmp_path / "p.txt"))
    assert [line.options for line in lines] == [{"variants": True}, {"wildcards": str(folder)}, {}]
    groups = lay_out(parser.parse_args([]), lines, "ddim", ({},))
    assert [len(group.drawn) for group in groups] == [1, 1, 0]
    with pytest.raises(UsageError, match="line 7: __x__ is a line of a file"):
        lay_out(args, [Line("__x__", {}, "line 7")], "ddim", ({},))
    with pytest.raises(AbsentError, match="no wildcard file goes by 'x'"):
        draw_texts(parser.parse_args(["--wildcards", str(folder)]), ["__x__"], [""], [1])
