"""Weighted prompts are encoded as the programs whose syntax they have encode them."""

import json
import math

import pytest
import torch
from keyed import fill, keyed_input
from recorded_prompts import GOLDEN
from recorded_prompts import read as recorded
from safetensors.torch import load_file
from torch import nn

from ldm import presets
from ldm.errors import UsageError
from ldm.modules.encoders.extra_tokens import ExtraTokens
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.prompt import a1111, read
from ldm.prompt.chunks import Chunk, Chunks
from ldm.prompt.encode import EMPHASES, at_step, encode, encode_chunks, guide, pad_pair
from ldm.shapes.bpe import CAPTION_WORDS, write_text_model

A1111, COMFYUI, COMPEL = (
    recorded("prompt_embeddings"),
    recorded("prompt_embeddings_comfyui"),
    recorded("prompt_compel"),
)
GUIDANCE, INVERSION = recorded("prompt_guidance"), recorded("textual_inversion")
NAMES = (
    "prompt_embeddings",
    "prompt_embeddings_comfyui",
    "prompt_compel",
    "prompt_guidance",
    "textual_inversion",
)
TENSORS = {
    name: tensor for file in NAMES for name, tensor in load_file(GOLDEN / f"{file}.safetensors").items()
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """CLIP's text model with four layers 16 wide, CLIP's vocabulary, and keyed weights."""
    folder = tmp_path_factory.mktemp("text")
    marks = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    (folder / "config.json").write_text(json.dumps({**A1111["text_model"], **marks}))
    encoder = FrozenCLIPEmbedder(folder)
    fill(encoder.transformer, "cond_stage_model.transformer.")
    return encoder


def close(found, wanted):
    assert found.shape == wanted.shape
    assert ((found - wanted).abs() <= 1e-5 + 1e-5 * wanted.abs()).all(), (found - wanted).abs().max()


def close_but_for_the_mean(found, wanted):
    """Emphasis "original" multiplies by the quotient of two means, which here are near 0.

    Where each value may be 1e-6 off, so may the means: the quotient is then 1e-6 / |mean| off in each of the two.
    """
    assert found.shape == wanted.shape
    room = 4e-6 / min(wanted.mean().abs().item(), 1)
    quotient = (found * wanted).sum() / (wanted * wanted).sum()
    assert abs(quotient - 1) <= room
    close(found / quotient, wanted)


@pytest.mark.parametrize("case", A1111["cases"], ids=lambda case: case["name"])
def test_recorded_of_a1111(encoder, case):
    name = case.get("emphasis", "Original").lower()
    texts = [[(text, 1.0)] if name == "none" else a1111.parse_emphasis(text) for text in case["texts"]]
    chunks = [a1111.chunk(text, encoder.word_ids) for text in texts]
    skip = case.get("CLIP_stop_at_last_layers", 1)
    found = encode_chunks(encoder, chunks, "ignore" if name == "none" else name, skip)
    wanted = TENSORS[case["name"]]
    if name != "original":
        close(found, wanted)
        return
    assert found.shape == wanted.shape
    for begin in range(0, wanted.shape[1], 77):  # each has a mean of its own
        close_but_for_the_mean(found[:, begin : begin + 77], wanted[:, begin : begin + 77])


def test_recorded_schedules_of_a1111(encoder):
    """AND, schedules and a long prompt in one batch: rows, their weights, and their padding at six steps."""
    batch = A1111["multicond"]
    prompts = [read(text, encoder=encoder, steps=batch["steps"]) for text in batch["prompts"]]
    conditionings = encode(encoder, prompts)
    for step, owners in batch["at"].items():
        found, own = at_step(conditionings, int(step))
        assert [[list(pair) for pair in pairs] for pairs in own] == owners
        wanted = TENSORS[f"multicond.{step}"]
        close(found[:, :: 1 if found.shape[1] == wanted.shape[1] else 11], wanted)
    (bad,) = A1111["uncond"]["prompts"]
    conditionings = encode(encoder, [read(bad, encoder=encoder, steps=batch["steps"])])
    for step in (0, 2, 3, 4):
        close(at_step(conditionings, step)[0][:, ::11], TENSORS[f"uncond.{step}"])


@pytest.mark.parametrize("case", COMFYUI["cases"], ids=lambda case: case["name"])
def test_recorded_of_comfyui(encoder, case):
    prompt = read(case["text"], "comfyui", encoder=encoder)
    found = encode(encoder, [prompt], clip_skip=-(case["layer"] or -1))
    close(at_step(found, 0)[0], TENSORS[case["name"]])


def test_presets_read_prompts_as_their_programs_recorded(encoder):
    """What ldm.presets says of prompts, followed to the recorded features: language, emphasis, clip skip."""
    cases = [case for case in COMFYUI["cases"] if case["layer"] is None]
    wanted = {"comfyui": {case["text"]: TENSORS[case["name"]] for case in cases[:4]}}
    (bad,) = A1111["uncond"]["prompts"]
    wanted["a1111"] = {bad: TENSORS["uncond.0"]}
    for preset, rows in wanted.items():
        told = presets.values(preset, "txt2img", "")
        how = {"emphasis": told.get("emphasis"), "clip_skip": told.get("clip_skip", 1)}
        for text, features in rows.items():
            prompt = read(text, told["prompt_syntax"], encoder=encoder, steps=A1111["multicond"]["steps"])
            found = at_step(encode(encoder, [prompt], **how), 0)[0]
            close(found[:, :: 1 if preset == "comfyui" else 11], features)


# compel's other ways to split long prompts and to lower weights are its options, not its syntax.
COMPEL_CASES = [
    case for case in COMPEL["cases"] if not {"downweight_mode", "split_long_text_mode"} & case.keys()
]


@pytest.mark.parametrize("case", COMPEL_CASES, ids=lambda case: case["name"])
def test_recorded_of_compel(encoder, case):
    prompt = read(case["texts"], "compel", encoder=encoder)
    found = encode(encoder, [prompt], clip_skip=2 if "penultimate" in case["name"] else 1)
    close(at_step(found, 0)[0], TENSORS[case["name"]])


@pytest.fixture
def inverted(encoder):
    """The encoder with the recorded embeddings behind its vocabulary."""
    table = encoder.transformer.text_model.embeddings.token_embedding
    before, names, vectors = table.weight, {}, []
    number = len(before)
    for place, (name, shape) in enumerate(INVERSION["embeddings"].items(), start=1):
        vectors.append(0.3 * keyed_input(f"ti.w{place}", tuple(shape)))
        names[tuple(INVERSION["embedding_ids"][name])] = (name, range(number, number + shape[0]))
        number += shape[0]
    table.weight = nn.Parameter(torch.cat([before, *vectors]), requires_grad=False)
    encoder.extra_tokens = ExtraTokens(names)
    yield encoder
    encoder.extra_tokens, table.weight = None, before


def test_recorded_prompts_with_embeddings(inverted):
    for row in INVERSION["prompts"]:
        segments = a1111.parse_emphasis(row["prompt"])
        chunks = a1111.chunk(segments, inverted.word_ids, vectors=inverted.extra_tokens.name_of)
        found = [[number if number < 49408 else 0 for number in one.ids] for one in chunks]
        assert (chunks.count, found) == (row["count"], [one["ids"] for one in row["chunks"]])
        weights = [sorted(set(one.weights)) for one in chunks]
        assert weights == [sorted(one["mult"]) for one in row["chunks"]]


@pytest.mark.parametrize("name", ["ti.emb.0", "ti.emb.1", "ti.emb.2"])
def test_recorded_embeddings_in_a_prompt(inverted, name):
    prompt = read(INVERSION[name], encoder=inverted)
    close_but_for_the_mean(at_step(encode(inverted, [prompt]), 0)[0], TENSORS[name])


# `pad_cond_uncond_v0` is the web UI's older rule, which cuts the negative prompt.
PADDED = [case for case in GUIDANCE["pad"] if case["function"] == "pad_cond_uncond"]


@pytest.mark.parametrize("case", PADDED, ids=lambda case: f"{case['cond']}, {case['uncond']}")
def test_recorded_padding(case):
    sizes = {"c": case["cond"], "n": case["uncond"]}
    pair = [keyed_input(f"cfg.{name}{case['i']}", (1, size, 8)) for name, size in sizes.items()]
    found = pad_pair(*pair, keyed_input("cfg.empty", (1, 77, 8)))
    assert [one.shape[1] for one in found] == case["to"]
    for name, one in zip(("cond", "uncond"), found, strict=True):
        assert torch.equal(one[:, ::7], TENSORS[f"cfg.pad_cond_uncond.{case['i']}.{name}"])


@pytest.mark.parametrize("place", range(len(GUIDANCE["combine"])))
def test_recorded_guidance(place):
    case = GUIDANCE["combine"][place]
    answers = keyed_input(case["x_out"], tuple(case["shape"]))
    rows = len(answers) - case["uncond_rows"]
    found = guide(answers[:rows], answers[rows:], case["conds_list"], case["cond_scale"])
    close(found, TENSORS[f"cfg.combine.{place}"])


def test_comfyui_names_embeddings_too(inverted):
    """By the name behind `embedding:`, as recorded for the words alone; one that is not there is left out."""
    ids = {
        text: read(text, "comfyui", encoder=inverted).parts[0].schedule[0].chunks[0].ids
        for text in ("a embedding:myword", "a myword", "a embedding:nothing", "a")
    }
    assert ids["a embedding:myword"] == ids["a myword"] != ids["a"]
    assert ids["a embedding:nothing"] == ids["a"]


def test_a_chunk_is_encoded_once(encoder):
    """A prompt that changes at every step asks for as many rows as it has distinct chunks."""
    rows = []
    handle = encoder.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    encode(encoder, [read("[cat|dog] BREAK a (hat:1.3)", encoder=encoder, steps=11)] * 2)
    handle.remove()
    assert sum(rows) == 3  # cat, dog, a hat


def test_weights_of_one_change_nothing(encoder):
    """Law: for all ways of emphasis the plain text's context."""
    plain = encoder("a cat in a red house")
    chunks = [a1111.chunk([("a cat in a red house", 1.0)], encoder.word_ids)]
    for emphasis in EMPHASES:
        torch.testing.assert_close(encode_chunks(encoder, chunks, emphasis), plain, rtol=1e-6, atol=1e-6)
    for syntax in ("plain", "compel"):
        prompt = read("a cat in a red house", syntax, encoder=encoder)
        found = at_step(encode(encoder, [prompt]), 0)[0]
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


def test_the_mean_is_restored(encoder):
    chunks = [a1111.chunk([("a cat", 1.3), ("in a house", 0.4)], encoder.word_ids)]
    before, after = (encode_chunks(encoder, chunks, emphasis).mean() for emphasis in ("ignore", "original"))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A text encoder of another vocabulary, with 9 tokens between its marks."""
    folder = tmp_path_factory.mktemp("small")
    write_text_model(folder, CAPTION_WORDS, width=20, layers=3, heads=2, max_length=11)
    return fill(FrozenCLIPEmbedder(folder, max_length=11), "cond_stage_model.")


def test_another_vocabulary_has_chunks_of_its_own_length(small):
    text = "a red circle above a blue square on a white background"
    prompt = read(text, encoder=small)
    assert [chunk.used for chunk in prompt.parts[0].schedule[0].chunks] == [9, 2]
    (found,), _ = at_step(encode(small, [prompt]), 0)
    words = text.split()
    close(found, torch.cat([small([" ".join(part)])[0] for part in (words[:9], words[9:])]))
    for other, length in ((read(text), 77), (read("(red)0.5", "compel"), 77)):
        with pytest.raises(
            UsageError, match=f"read for {length} tokens, and this encoder takes 11; read it with"
        ):
            encode(small, [other])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: encode(e, ["a"]), "prompts should be a list of what ldm.prompt.read gives, got 'a'"),
        (lambda e: encode(e, [read("a")], emphasis="loud"), "emphasis should be one of original, no norm"),
        (
            lambda e: encode(e, [read("a")], clip_skip=5),
            "clip_skip should be a whole number from 1 to 4, got 5",
        ),
        (
            lambda e: encode(e, [read("a")], clip_skip=0),
            "clip_skip should be a whole number from 1 to 4, got 0",
        ),
        (lambda e: encode(e, [read("a")], clip_skip=True), "from 1 to 4, got True"),
        (lambda e: encode(e, [read("(a:nan)", "comfyui")]), "a weight in the prompt is not a finite number"),
        (lambda e: pad_pair(torch.ones(1, 9, 3), torch.ones(1, 5, 3), torch.ones(1, 3, 3)), "multiple of 3"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_a_line(encoder, call, message):
    with pytest.raises(UsageError) as caught:
        call(encoder)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 400


def test_infinite_weights_are_refused_before_they_spread(encoder):
    chunk = Chunk((49406, *[49407] * 76), (math.inf, *[1.0] * 76), used=0)
    with pytest.raises(UsageError, match="not a finite number"):
        encode_chunks(encoder, [Chunks((chunk,), 0)])
