"""CLIP's tokenizer: OpenAI's ids offline, found in the stated order, never silently empty."""

import copy
import gzip
import hashlib
import json
import logging
import pickle
import random
import re
import tempfile

import ftfy
import pytest

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.modules.encoders import tokenizer as tokenizer_module
from ldm.modules.encoders.tokenizer import (
    BOS,
    CLIP_VOCAB_SIZE,
    EOS,
    MAX_CHARACTERS,
    RAW_NAME,
    build_tokenizer,
    byte_of_symbol,
    check_tokenizer,
    clean,
    find_tokenizer,
    read_vocabulary,
    vocabulary,
    write_vocabulary,
)
from ldm.shapes.bpe import learn_bpe

CAT = [49406, 320, 1125, 539, 320, 2368, 49407]
MERGES = tokenizer_module.PACKAGE / "data" / "clip_merges.txt.gz"


@pytest.fixture(scope="module")
def clip():
    return find_tokenizer()


@pytest.fixture
def nothing_else(tmp_path, monkeypatch):
    """A machine on which no tokenizer lies anywhere: no checkout, no package data, an empty cache."""
    empty = tmp_path / "nothing"
    empty.mkdir()
    monkeypatch.setattr(tokenizer_module, "PACKAGE", empty)
    monkeypatch.setattr(tokenizer_module, "CHECKOUT", empty)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty))
    return empty


def small_folder(folder, words=("cat", "dog", "photo")):
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = learn_bpe(words)
    write_vocabulary(folder, vocab, merges)
    return len(vocab)


def padded(tokenizer, text):
    """CompVis's call, every keyword of it."""
    return tokenizer(
        text,
        truncation=True,
        max_length=77,
        return_length=True,
        return_overflowing_tokens=False,
        padding="max_length",
        return_tensors="pt",
    )["input_ids"]


# Against OpenAI's tokenizer


def test_the_recorded_ids_of_openai_come_out(clip, golden):
    records = json.loads((golden / "clip_token_vectors.json").read_text())
    assert len(records) == 23
    for record in records:
        wanted = record["ids"] + [49407] * (77 - len(record["ids"]))
        assert padded(clip, record["text"]).tolist() == [wanted], record["text"]


def test_a_batch_gives_what_its_texts_give_alone(clip):
    texts = ["a photo of a cat", "", "l’été “quoted”"]
    assert padded(clip, texts).tolist() == [padded(clip, text)[0].tolist() for text in texts]


def test_the_call_of_cldm_gives_lists_without_marks(clip):
    ids = clip(["a photo of a cat", ""], truncation=False, add_special_tokens=False)["input_ids"]
    assert ids == [CAT[1:-1], []]
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (49406, 49407, 49407)


def test_text_is_repaired_once_and_not_again_in_lower_case(clip):
    """In lower case these letters look like the mojibake of a Chinese one; ftfy must not see that."""
    ids = clip("Æ¢¨", add_special_tokens=False)["input_ids"]
    assert clip.decode(ids).replace(" ", "") == "æ¢¨"


def test_cleaning_is_what_the_original_did():
    assert clean("  Ｈello\r\n\t“W”  ﬁ\x00 Ã© ") == 'hello "w" fi é'


def test_text_that_skips_ftfy_is_what_ftfy_leaves_alone():
    """Every character below U+0100 alone, every entity-like text, and random lines of printable ASCII."""
    draw = random.Random(5)
    printable = [chr(code) for code in range(0x20, 0x7F)]
    texts = [f"a {chr(code)} B" for code in range(0x100)]
    texts += ["cats &amp; dogs", "1 &lt; 2", "AT&T", "&copy", "a\x1b[31mred", "a\r\nb", "<b>&quot;</b>"]
    texts += ["".join(draw.choices([*printable, "\n", "\t"], k=draw.randint(0, 60))) for _ in range(3000)]
    for text in texts:
        assert clean(text) == re.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower(), repr(text)


def test_encode_and_tokenize_clean_as_well(clip):
    assert clip.encode("l’Été") == clip("l'été")["input_ids"]
    assert clip.tokenize("“CAT”") == ['"</w>', "cat</w>", '"</w>']


# The package data


def test_the_merges_in_the_package_are_openais():
    text = gzip.decompress(MERGES.read_bytes())
    assert (
        hashlib.sha256(text).hexdigest() == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    )
    assert text.count(b"\n") == 48894
    assert MERGES.read_bytes()[4:8] == bytes(4)  # no time stamp: made again, the file is the same
    assert "Copyright (c) 2021 OpenAI" in MERGES.with_name("clip_merges.LICENSE.txt").read_text()


def test_the_numbering_is_clips():
    vocab, merges = read_vocabulary(MERGES)
    assert (len(vocab), len(merges)) == (CLIP_VOCAB_SIZE, 48894)
    assert (vocab["!"], vocab["!</w>"], vocab["in"], vocab[BOS], vocab[EOS]) == (0, 256, 512, 49406, 49407)
    assert vocabulary([])[BOS] == 512
    assert sorted(byte_of_symbol().values()) == list(range(256))


def test_building_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tokenizer = build_tokenizer(*learn_bpe(["cat"]))
    assert tokenizer("cat")["input_ids"] == [514, 513, 515]
    assert list(tmp_path.iterdir()) == []


# The tokenizer as an object


def test_copies_work_on_their_own(clip):
    for twin in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert twin("A photo of a cat")["input_ids"] == CAT
        assert twin.origin == clip.origin
        assert twin.decode(CAT, skip_special_tokens=True) == "a photo of a cat"
        assert len(twin) == CLIP_VOCAB_SIZE


def test_attributes_are_set_on_the_tokenizer_itself():
    tokenizer = build_tokenizer(*learn_bpe(["cat"]), max_length=9)
    assert tokenizer.model_max_length == 9
    tokenizer.pad_token = "!"
    assert tokenizer("cat", padding="max_length", max_length=5)["input_ids"] == [514, 513, 515, 0, 0]
    with pytest.raises(AttributeError):
        tokenizer.no_such_thing  # noqa: B018


# Bad and strange text


@pytest.mark.parametrize("text", ["", "   ", "\t\n", "\x00", "\ufeff", "\x1b\x07"])
def test_text_without_content_has_only_marks(clip, text):
    assert clip(text)["input_ids"] == [49406, 49407]


@pytest.mark.parametrize(
    "text",
    [
        "😀👩‍👩‍👧",
        "שלום עולם",
        "مرحبا",
        "e\u0301\u0323\u0301",
        "a\x00b",
        "a\r\nb",
        "\ufeffcat",
        "\ud83d",
        "a\udce9b",
        "\U0010ffff",
    ],
)
def test_strange_text_has_tokens_between_the_marks(clip, text):
    ids = padded(clip, text)[0].tolist()
    assert ids[0] == 49406 and ids[1] != 49407 and ids[-1] == 49407


def test_half_a_character_becomes_the_replacement_sign_and_a_pair_is_joined(clip):
    assert clip("\ud83d") == clip("\ufffd")
    assert clip("\ud83d\ude00") == clip("😀")


@pytest.mark.parametrize("text", ["a" * 10_000, "cat, " * 2_000, "(" * 16_000, "[" * 8_000 + "\\" * 8_000])
def test_long_text_is_cut(clip, text):
    ids = padded(clip, text)
    assert ids.shape == (1, 77)
    assert ids[0, -1] == 49407 and ids[0, -2] != 49407


def test_the_longest_text_is_read_and_one_more_character_is_refused(clip):
    assert padded(clip, "cat " * (MAX_CHARACTERS // 4))[0, 1:-1].tolist() == [2368] * 75
    with pytest.raises(UsageError, match="a prompt may have 100000 characters, got 100001; shorten it"):
        clip("a" * (MAX_CHARACTERS + 1))


@pytest.mark.parametrize("prompt, kind", [(None, "NoneType"), (b"cat", "bytes"), (3, "int")])
def test_what_is_no_text_is_named(clip, prompt, kind):
    with pytest.raises(UsageError, match=f"a prompt must be a string, got {kind}"):
        clip(prompt)
    with pytest.raises(UsageError, match=f"a prompt must be a string, got {kind}"):
        clip(["cat", prompt])


def test_marks_spelt_out_are_read_as_marks(clip):
    assert clip("cat <|endoftext|> dog")["input_ids"] == [49406, 2368, 49407, 1929, 49407]


# Where it is found


def test_the_package_data_is_the_default(clip):
    assert clip.origin == f"package data {MERGES}"


def test_the_argument_comes_before_everything(tmp_path, clip):
    size = small_folder(tmp_path / "mine")
    small_folder(tmp_path / "beside", words=("sun",))
    tokenizer = find_tokenizer(tmp_path / "mine", beside=[tmp_path / "beside"], vocab_size=size)
    assert tokenizer.origin == str(tmp_path / "mine")
    assert tokenizer.tokenize("dog") == ["dog</w>"]


@pytest.mark.parametrize("inner", ["", "tokenizer"])
@pytest.mark.thinned(2)
def test_a_folder_beside_the_checkpoint_comes_before_the_package(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write_vocabulary(tmp_path / inner, *read_vocabulary(MERGES))
    tokenizer = find_tokenizer(beside=[tmp_path])
    assert tokenizer.origin == f"{tmp_path / inner}/vocab.json"
    assert tokenizer("a photo of a cat")["input_ids"] == CAT


def test_openais_own_file_is_read_up_to_the_merges_that_clip_uses(tmp_path):
    lines = [
        '"bpe_simple_vocab_16e6.txt#version: 0.2',
        *gzip.decompress(MERGES.read_bytes()).decode().split("\n")[:-1],
    ]
    text = "\n".join([*lines, "more than", "clip uses"]) + "\n"
    (tmp_path / RAW_NAME).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    assert find_tokenizer(beside=[tmp_path]).origin == str(tmp_path / RAW_NAME)
    assert read_vocabulary(tmp_path / "plain.txt") == read_vocabulary(MERGES)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_tokenizer_json_is_read_in_both_forms(tmp_path, as_text):
    vocab, merges = learn_bpe(["cat", "photo"])
    listed = [" ".join(pair) if as_text else list(pair) for pair in merges]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": listed}}))
    assert read_vocabulary(tmp_path) == (vocab, merges) == read_vocabulary(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "CompVis/stable-diffusion-v1-4"])
@pytest.mark.thinned(2)
def test_the_hub_cache_is_read_without_a_network(nothing_else, name):
    repo = nothing_else / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123")
    folder = repo / "snapshots" / "0123" / ("tokenizer" if "CompVis" in name else "")
    folder.mkdir(parents=True)
    write_vocabulary(folder, *read_vocabulary(MERGES))
    tokenizer = find_tokenizer()
    assert tokenizer.origin == f"Hugging Face cache of {name}"
    assert tokenizer("a photo of a cat")["input_ids"] == CAT


@pytest.mark.parametrize("name", ["open_clip_torch", "clip_anytorch"])
@pytest.mark.thinned(2)
def test_the_file_of_an_installed_package_is_read_without_importing_it(
    nothing_else, tmp_path, monkeypatch, name
):
    inner = tmp_path / "site" / "inner"
    record = tmp_path / "site" / f"{name}-9.9.dist-info"
    inner.mkdir(parents=True)
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (record / "RECORD").write_text(f"inner/{RAW_NAME},,\ninner/__init__.py,,\n")
    (inner / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    _, merges = read_vocabulary(MERGES)
    (inner / RAW_NAME).write_bytes(gzip.compress(("#version\n" + "\n".join(map(" ".join, merges))).encode()))
    assert find_tokenizer().origin == f"installed {name.replace('clip_a', 'clip-a')}"


def test_an_absent_tokenizer_is_an_error_that_lists_where_it_was_looked_for(nothing_else, tmp_path):
    with pytest.raises(AbsentError) as raised:
        find_tokenizer(beside=[tmp_path / "models"])
    message = str(raised.value)
    assert raised.value.exit_code == 9
    assert message.startswith("no tokenizer with 49408 tokens; looked for ")
    assert message.endswith("give a folder with vocab.json and merges.txt as tokenizer=")
    places = [
        f"{tmp_path}/models/vocab.json",
        f"{tmp_path}/models/tokenizer/vocab.json",
        f"{tmp_path}/models/{RAW_NAME}",
        f"package data {nothing_else}/data/clip_merges.txt.gz",
        "Hugging Face cache of openai/clip-vit-large-patch14",
        "Hugging Face cache of runwayml/stable-diffusion-v1-5",
        "installed open_clip_torch",
        "installed clip-anytorch",
    ]
    assert [place for place in places if place not in message] == []
    assert "hub openai" not in message and "\n" not in message


def test_a_small_vocabulary_is_looked_for_only_beside_its_model(tmp_path):
    with pytest.raises(AbsentError) as raised:
        find_tokenizer(beside=[tmp_path], vocab_size=700)
    assert "package data" not in str(raised.value)
    assert "no tokenizer with 700 tokens" in str(raised.value)


def test_the_hub_is_asked_only_on_request_and_its_silence_is_no_crash(nothing_else, caplog):
    with pytest.raises(AbsentError, match="hub openai/clip-vit-large-patch14"):
        find_tokenizer(allow_download=True)
    assert "could not download the tokenizer of openai/clip-vit-large-patch14" in caplog.text


def test_a_misfit_beside_the_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    size = small_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        tokenizer = find_tokenizer(beside=[tmp_path])
    assert tokenizer.origin == f"package data {MERGES}"
    assert f"should have 49408 tokens, has {size}" in caplog.text


# What is refused


def test_a_tokenizer_that_found_no_files_is_never_taken():
    """transformers 5 makes this one, without a word, of a name that it cannot resolve."""
    empty = build_tokenizer({BOS: 0, EOS: 1}, [], origin="nowhere")
    with pytest.raises(MismatchError, match="the tokenizer of nowhere should have 49408 tokens, has 2"):
        check_tokenizer(empty, CLIP_VOCAB_SIZE)
    with pytest.raises(MismatchError, match="reads 'a photo of a cat' wrongly"):
        check_tokenizer(empty, 2)


def test_a_vocabulary_in_another_order_is_refused(tmp_path):
    vocab, merges = read_vocabulary(MERGES)
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    write_vocabulary(tmp_path, vocab, merges)
    with pytest.raises(MismatchError, match=r"wrongly, as \[49406, 320, 1125, 539, 320, 1929, 49407\]"):
        find_tokenizer(tmp_path)


def test_an_argument_that_is_not_there_says_what_to_give(tmp_path):
    with pytest.raises(AbsentError, match="give a folder with vocab.json and merges.txt"):
        find_tokenizer(tmp_path / "missing")
    with pytest.raises(AbsentError, match="no tokenizer at"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.json", b"<!DOCTYPE html><html>", "should hold JSON"),
        ("a.json", b"[1, 2]", "should hold a JSON object, got list"),
        ("a.json", b'{"a": 1}', "with model.vocab and model.merges; it has none"),
        ("a.json", b'{"model": {"vocab": {}, "merges": ["a b c"]}}', "merges of two tokens each"),
        ("a.json", b'{"model": {"vocab": [], "merges": []}}', "should map tokens to their numbers"),
        ("a.json", b'{"model": {"vocab": {"a": "0"}, "merges": []}}', "should map tokens to their numbers"),
        ("a.json", b'{"model": {"vocab": {"a": 0, "b": 2}, "merges": []}}', "0, 1, 2, ... without gaps"),
        ("a.json", b'{"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}', "lacks 512 tokens"),
        ("a.json", b"[" * 100_000, "should hold JSON"),
        ("a.json", b'{"model": ' * 100_000, "should hold JSON"),
        ("a.json", b'{"model": ' + b"9" * 100_000 + b"}", "should hold JSON: Exceeds the limit"),
        ("a.json", b"null", "should hold a JSON object, got NoneType"),
        ("a.json", b'{"model": []}', "with model.vocab and model.merges; it has none"),
        ("a.json", b'{"model": {"merges": {}}}', "with model.vocab and model.merges; it has none"),
        ("a.json", b'{"model": {"merges": []}}', "should map tokens to their numbers"),
        *(
            ("a.json", b'{"model": {"vocab": {}, "merges": [%s]}}' % merge, f"two tokens each, got {shown}")
            for merge, shown in {
                b"5": "5",
                b"null": "None",
                b"1.5": "1.5",
                b"true": "True",
                b"[]": "[]",
                b"{}": "{}",
                b'"ab"': "['ab']",
                b'""': "['']",
                b'["a"]': "['a']",
                b'["a", "b", "c"]': "['a', 'b', 'c']",
                b'["a", 1]': "['a', 1]",
                b'[["a"], ["b"]]': "[['a'], ['b']]",
                b'{"a": "b", "c": "d"}': "{'a': 'b', 'c': 'd'}",
                b'"a b", 5': "5",
            }.items()
        ),
        ("a.json", b'{"model": {"vocab": {}, "merges": ["' + b"a " * 9999 + b'"]}}', "two tokens each, got"),
        ("a.json", b'{"model": {"vocab": {}, "merges": [["a b", "c"]]}}', "tokens without spaces, got 'a b'"),
        (
            "a.json",
            b'{"model": {"vocab": {}, "merges": [["a", "b\\n"]]}}',
            "tokens without spaces, got 'b\\n'",
        ),
        ("a.json", b'{"model": {"vocab": {}, "merges": [" a"]}}', "tokens without spaces, got ''"),
        ("a.json", b'{"model": {"vocab": {"\\ud800": 0}, "merges": []}}', "a token with half a character"),
        *(
            (
                "a.json",
                b'{"model": {"vocab": %s, "merges": []}}' % vocab,
                "should map tokens to their numbers",
            )
            for vocab in (
                b"null",
                b"5",
                b'["a"]',
                b'{"a": null}',
                b'{"a": true}',
                b'{"a": 0.0}',
                b'{"a": [0]}',
            )
        ),
        *(
            ("a.json", b'{"model": {"vocab": %s, "merges": []}}' % vocab, "0, 1, 2, ... without gaps")
            for vocab in (b'{"a": 0, "b": 0}', b'{"a": -1}', b'{"a": 1}', b'{"a": %s}' % (b"9" * 4300))
        ),
        ("a.json", b'{"model": {"vocab": {"%s": 0}, "merges": []}}' % (b"a" * 99_999), "lacks 514 tokens"),
        ("a.txt", b"", "two tokens a line, got ''"),
        ("a.txt", b"a b\na b c\n", "two tokens a line, got 'a b c'"),
        ("a.txt", b"i n\n" + b"\0" * 99_999, "two tokens a line, got '\\x00\\x00"),
        ("a.txt.gz", gzip.compress(b"a b\n" * 3_000_000, mtime=0), "larger than any vocabulary"),
        ("a.txt.gz", b"version https://git-lfs.github.com/spec/v1", "cannot be read as a vocabulary"),
        ("a.txt.gz", gzip.compress(b"i n\nt h\n" * 99, mtime=0)[:-30], "cannot be read as a vocabulary"),
        ("a.txt", b"<html>\n<body class=x y>\n", "two tokens a line, got '<html>'"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as a vocabulary"),
    ],
)
def test_broken_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError) as raised:
        find_tokenizer(tmp_path / name)
    assert message in str(raised.value) and str(tmp_path / name) in str(raised.value)
    assert len(str(raised.value)) <= 400 and str(raised.value).isprintable()


def test_a_vocabulary_that_cannot_spell_a_letter_is_refused(tmp_path):
    vocab, merges = learn_bpe(["cat"])
    renumbered = {token: number for number, token in enumerate(token for token in vocab if token != "z</w>")}
    write_vocabulary(tmp_path, renumbered, merges)
    with pytest.raises(FormatError, match="lacks 1 tokens that CLIP's format needs, one is 'z</w>'"):
        read_vocabulary(tmp_path)


def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MAX_FILE_BYTES", 1000)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a b\n" * 300))
    with pytest.raises(FormatError, match="larger than any vocabulary"):
        read_vocabulary(tmp_path / "bomb.txt.gz")
