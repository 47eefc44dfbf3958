"""Words and tokens of prompts, and the tables of prompt-to-prompt: as the original computes them, and refusals."""

import json

import pytest
import torch

from ldm.errors import UsageError
from ldm.modules.encoders.extra_tokens import ExtraTokens
from ldm.modules.encoders.modules import _ReadsPrompts
from ldm.modules.encoders.tokenizer import find_tokenizer
from ldm.prompt import alignment as words


class Reader(_ReadsPrompts):
    """What reads prompts in an encoder with CLIP's own vocabulary, without its network."""

    def __init__(self, max_length=77):
        self.max_length = max_length
        self.tokenizer = find_tokenizer(None, beside=(), vocab_size=49408, max_length=max_length)


@pytest.fixture(scope="module")
def reader():
    return Reader()


@pytest.fixture(scope="module")
def recorded(request):
    return json.loads((request.path.parents[1] / "golden" / "editing.json").read_text())


def test_the_tables_of_the_original(reader, recorded):
    """Mappers of replaced and refined prompts, places of words, steps of tokens, and factors of words."""
    for row in recorded["replace"]:
        if "error" in row:
            with pytest.raises(UsageError):
                words.replacement(reader, *row["prompts"])
            continue
        want = torch.eye(77)
        want[row["zero_diagonal"], row["zero_diagonal"]] = 0
        for i, j, value in row["off_diagonal"]:
            want[i, j] = value
        assert torch.allclose(words.replacement(reader, *row["prompts"]), want, rtol=0, atol=1e-7), row
    for row in recorded["refine"]:
        mapper, has_pair = words.refinement(reader, *row["prompts"])
        want = torch.zeros(77, 77)
        for place, pair in enumerate(row["mapper"]):
            if pair >= 0:
                want[pair, place] = 1
        assert torch.equal(mapper, want) and has_pair.tolist() == row["alphas"], row
    for prompt, word, places in recorded["word_inds"]:
        whole = [p for one, own in words.tokens_of_words(reader, prompt) if one == word for p in own]
        assert (whole if isinstance(word, str) else words.tokens_of_word(reader, prompt, word)) == places
    for row in recorded["alpha"]:
        given = row["cross_replace_steps"]
        of_words = dict(given) if isinstance(given, dict) else {}
        share = of_words.pop("default_", 1.0) if isinstance(given, dict) else given
        table = words.replaced_steps(
            reader,
            row["prompts"][1:],
            words.check_share(share, "share"),
            {word: words.check_share(one, word) for word, one in of_words.items()},
            row["steps"],
        )
        assert table[:, 0].sum(1).tolist() == row["rows"] and table.sum() == row["sum"], row
        if row["ones"] is not None:
            assert [step[0].nonzero().flatten().tolist() for step in table] == row["ones"], row
    for prompt, chosen, factors, places in recorded["equalizer"]:
        chosen = [chosen] if isinstance(chosen, str) else chosen
        table = words.weights_of_words(reader, [prompt], dict(zip(chosen, factors, strict=True)))
        want = torch.ones(77)
        for place, factor in places:
            want[place] = factor
        assert torch.equal(table[0], want)


@pytest.mark.parametrize(
    ("prompt", "word", "places", "why"),
    [
        ("a cat, sitting", "cat", [2], "punctuation is a token of its own"),
        ("a cat, sitting", "cat,", [2, 3], "as it is written, with its punctuation"),
        ("a black cat and a black dog", "black", [2, 6], "wherever it stands"),
        ("a black cat", "black cat", [2, 3], "two words, by their tokens"),
        ("a Black cat", "black", [2], "CLIP does not tell capitals"),
        ("a  cat\non  it", "it", [4], "any space parts words"),
        ("a cat", "dog", [], "it is not there"),
        ("a cat", "", [], "no word is nowhere"),
        ("a cat", 1, [2], "by its number"),
        ("a cat", 2, [], "there is no third"),
        ("a cat", -1, [], "none before the first"),
        ("", "cat", [], "a prompt without words"),
    ],
)
def test_where_a_word_is(reader, prompt, word, places, why):
    assert words.tokens_of_word(reader, prompt, word) == places, why


def test_words_with_vectors_of_their_own_and_words_that_are_cut_off(reader):
    short = Reader(max_length=6)
    assert words.tokens_of_words(short, "one two three four five")[3:] == [("four", [4]), ("five", [])]
    named = Reader()
    ids = tuple(named.word_ids("my cat"))
    named.extra_tokens = ExtraTokens({ids: ("my cat", [50000, 50001, 50002])})
    assert words.tokens_of_words(named, "a my cat here") == [
        ("a", [1]), ("my", [2, 3, 4]), ("cat", [2, 3, 4]), ("here", [5])
    ]  # fmt: skip
    assert words.tokens_of_word(named, "a my cat here", "my cat") == [2, 3, 4]


@pytest.mark.parametrize(
    ("source", "edit", "unpaired"),
    [
        ("a b", "a b c", "'c'"),
        ("a red cat on a mat", "a cat on a mat", "'red'"),
        ("one two", "one big old two", "'big old'"),
        ("a cat", "a very big old ugly wet dog", "'very big old ugly ...'"),
        ("", "cat", "'cat'"),
    ],
)
def test_prompts_of_another_number_of_words_name_those_without_a_pair(reader, source, edit, unpaired):
    for pair in ((source, edit), (edit, source)):
        with pytest.raises(UsageError, match="as many words") as caught:
            words.replacement(reader, *pair)
        assert f"without a pair: {unpaired}" in str(caught.value) and len(str(caught.value)) <= 400


def test_a_word_that_is_not_there_is_refused_with_the_nearest(reader):
    with pytest.raises(UsageError, match=r"'kat', which is not in 'a cat'; did you mean 'cat'\?"):
        words.expect_word(reader, ["a cat"], "kat", "equalizer")
    with pytest.raises(UsageError, match="in none of 2 prompts"):
        words.expect_word(reader, ["a cat", "a dog"], "house", "equalizer")
    assert words.expect_word(reader, ["a cat", "a dog"], "dog", "equalizer") == [[], [2]]
    with pytest.raises(
        UsageError, match="'dog', which stands behind the 75 tokens of a prompt that the model reads"
    ):
        words.expect_word(reader, ["very " * 75 + "black dog", "a cat"], "dog", "equalizer")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (0.4, (0.0, 0.4)), ((0.2, 0.7), (0.2, 0.7)), (1, (0.0, 1.0)), (0, (0.0, 0.0)), ([0.5, 0.5], (0.5, 0.5)),
        (1.1, None), (-0.1, None), ((0.7, 0.2), None), ((0.1,), None), ("half", None), (float("nan"), None),
        ((0, 2), None), (None, None),
    ],
)  # fmt: skip
def test_a_part_of_the_steps(given, want):
    if want is None:
        with pytest.raises(UsageError, match="cross_replace_steps"):
            words.check_share(given, "cross_replace_steps")
    else:
        assert words.check_share(given, "cross_replace_steps") == want
