"""The learned small vocabulary: every given word one token, everything else spelt out, nothing unknown."""

import json
import random
import unicodedata

import pytest

from ldm.errors import UsageError
from ldm.modules.encoders.tokenizer import BOS, EOS, build_tokenizer, clean, find_tokenizer
from ldm.paths import shipped
from ldm.shapes.bpe import CAPTION_WORDS, learn_bpe, write_text_model
from ldm.shapes.scenes import VOCABULARY

TEXT = shipped("model_data/shapes/text")


@pytest.fixture(scope="module")
def small():
    vocab, merges = learn_bpe(CAPTION_WORDS)
    return build_tokenizer(vocab, merges, max_length=32)


def without_spaces(text):
    return "".join(unicodedata.normalize("NFC", text).split())


def test_every_caption_word_is_one_token_of_its_own(small):
    ids = [small(word, add_special_tokens=False)["input_ids"] for word in CAPTION_WORDS]
    assert [len(of_word) for of_word in ids] == [1] * len(CAPTION_WORDS)
    assert len({of_word[0] for of_word in ids}) == len(CAPTION_WORDS)


def test_the_vocabulary_knows_every_word_that_the_shapes_know():
    assert set(VOCABULARY) <= set(CAPTION_WORDS)


def test_a_caption_has_as_many_tokens_as_words(small):
    caption = "a large red circle above a small blue square on a white background, picture."
    assert len(small(caption)["input_ids"]) == 1 + 14 + 2 + 1  # marks, words, signs


def test_the_shipped_files_are_what_the_code_writes(tmp_path):
    write_text_model(tmp_path, CAPTION_WORDS)
    for name in ("vocab.json", "merges.txt", "config.json"):
        assert (tmp_path / name).read_bytes() == (TEXT / name).read_bytes()


def test_the_shipped_tokenizer_fits_its_configuration():
    config = json.loads((TEXT / "config.json").read_text())
    tokenizer = find_tokenizer(TEXT, vocab_size=config["vocab_size"], max_length=32)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]]
    assert ids == [705, 706, 706]
    assert config["max_position_embeddings"] == 32


def test_any_text_is_spelt_out_and_reads_back(small):
    """No character is lost or unknown, whichever script it is from."""
    # U+0345 is left out: OpenAI's pattern, ignoring case, matches it neither as a letter nor as a sign.
    # Characters newer than this Python's table are left out because the tokenizer may know their lower case.
    assigned = [
        chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs") and c != 0x345
    ]
    rng = random.Random(0)
    texts = ["".join(rng.choices(assigned, k=23)) for _ in range(300)]
    texts += ["".join(rng.choices(assigned[:400], k=23)) for _ in range(100)]
    for text in texts:
        ids = small(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = small.decode(ids, clean_up_tokenization_spaces=False)
        assert without_spaces(back) == without_spaces(clean(text)), ascii(text)


def test_any_byte_has_its_symbol_inside_and_at_the_end_of_a_word():
    vocab, merges = learn_bpe(["ab"])
    assert len(vocab) == 256 + 256 + 1 + 2 == 514 + len(merges)
    assert merges == [("a", "b</w>")]
    assert vocab["ab</w>"] == 512 and vocab[BOS] == 513 and vocab[EOS] == 514


def test_the_order_of_the_words_does_not_matter():
    words = ["star", "start", "art", "tart"]
    assert learn_bpe(words) == learn_bpe(words[::-1])


def test_frequent_pairs_merge_first():
    assert learn_bpe({"xy": 5, "ab": 2})[1][0] == ("x", "y</w>")
    assert learn_bpe({"xy": 2, "ab": 5})[1][0] == ("a", "b</w>")


def test_overlapping_repeats_still_become_one_token():
    words = ["aaa", "aaaa", "aaaaa", "baaa", "naïve", "日本", "!!", "7"]
    tokenizer = build_tokenizer(*learn_bpe(words))
    for word in words:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


@pytest.mark.parametrize("word", ["two words", "Red", "a1", "12", "don't", "", " "])
def test_words_that_clip_would_split_are_refused(word):
    with pytest.raises(UsageError, match=f"the word {word!r}, which CLIP's rules split"):
        learn_bpe(["red", word])


def test_no_words_are_refused():
    with pytest.raises(UsageError, match="at least one word, got none"):
        learn_bpe([])
