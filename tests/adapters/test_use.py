"""Adapters at the doors: what is painted with them, what pictures say of them, and that nothing of them stays."""

import json
import math

import numpy as np
import pytest
import torch
from keyed import keyed_input
from lora_files import write_lora_for
from tiny import tiny_model

import ldm
from ldm.adapters import AttentionSlicing, DeepCache, Embedding, LoRA, TokenMerging
from ldm.adapters.use import PromptWords, _Names, text_scope
from ldm.checkpoints import save_safetensors
from ldm.errors import MismatchError, UsageError
from ldm.kernels import cpu
from ldm.kernels.fused_module import WeightCache
from ldm.modules.encoders.extra_tokens import ExtraTokens
from ldm.modules.seams import execution_of
from ldm.pipeline import StableDiffusion

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


@pytest.fixture(scope="module")
def lora(sd, tmp_path_factory):
    return write_lora_for(tmp_path_factory.mktemp("lora") / "style.safetensors", sd.model)


@pytest.fixture(scope="module")
def embedding(sd, tmp_path_factory):
    width = table_of(sd).weight.shape[1]
    path = tmp_path_factory.mktemp("embedding") / "birb.safetensors"
    save_safetensors(path, {"emb_params": keyed_input("birb", (3, width))}, {})
    return Embedding(path, width=width)


def paint(sd, prompt=PROMPT, **options):
    return sd.txt2img(prompt, **{"seed": 3, "steps": 3, "output_type": "latent", **options})


def table_of(sd):
    """The layer of the text encoder that holds the vocabulary's vectors."""
    parts = sd.model.cond_stage_model.named_modules()
    return next(m for name, m in parts if name.endswith("token_embedding"))


def everything(model):
    return {name: (id(p), p.clone()) for name, p in model.named_parameters()}


def unchanged(model, before):
    now = dict(model.named_parameters())
    return all(id(now[name]) == i and torch.equal(now[name], p) for name, (i, p) in before.items())


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_a_lora_paints_what_its_weights_added_by_hand_paint_and_goes_again(lora, optimized):
    sd, by_hand = StableDiffusion(tiny_model()), StableDiffusion(tiny_model())
    before = everything(sd.model)
    if optimized:
        sd.optimize()
    plain = paint(sd).latents
    one = LoRA(lora, 0.7, text_weight=0.4)
    with torch.no_grad():
        for name, change in one.deltas(by_hand.model).items():
            p = by_hand.model.get_parameter(name)
            p.copy_(change(p))
    changed = paint(sd, adapters=[one]).latents
    want = paint(by_hand).latents
    assert (changed - want).abs().max() <= 2e-5 * want.abs().max()
    assert (changed - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(paint(sd, adapters=[LoRA(lora, 0.0)]).latents, plain)
    assert torch.equal(paint(sd).latents, plain) and unchanged(sd.model, before)
    assert torch.equal(paint(sd, adapters=[one]).latents, changed)


def test_a_lora_of_the_text_encoder_changes_the_context_alone(sd, tmp_path):
    text = LoRA(write_lora_for(tmp_path / "text.safetensors", sd.model, only="cond_stage_model"))
    plain = sd.model.get_learned_conditioning([PROMPT])
    with text_scope(sd.model, [text]):
        assert (sd.model.get_learned_conditioning([PROMPT]) - plain).abs().max() > 1e-2
    assert torch.equal(sd.model.get_learned_conditioning([PROMPT]), plain)
    assert not torch.equal(paint(sd, adapters=[text]).latents, paint(sd).latents)


@pytest.mark.slow
def test_a_lora_works_in_its_part_of_the_steps(sd, lora):
    whole, first, last = (
        paint(sd, steps=4, adapters=[LoRA(lora, 1.0, text_weight=0.0, start=a, end=b)]).latents
        for a, b in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
    )
    plain = paint(sd, steps=4).latents
    pictures = [plain, whole, first, last]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(pictures) for b in pictures[:i])
    # Up to the half way the second has done what the first did, and the third nothing.
    halfway = [
        next(p.x_t for p in sd.stream(PROMPT, seed=3, steps=4, adapters=adapters) if p.step == 2)
        for adapters in ([], [LoRA(lora, 1.0, text_weight=0.0, start=0.5)], [LoRA(lora, 1.0, text_weight=0.0)],
                         [LoRA(lora, 1.0, text_weight=0.0, end=0.5)])
    ]  # fmt: skip
    assert torch.equal(halfway[0], halfway[1]) and torch.equal(halfway[2], halfway[3])
    assert not torch.equal(halfway[0], halfway[2])


def test_two_streams_with_different_adapters_do_not_see_each_other(sd, lora):
    sets = ([LoRA(lora, 0.8)], [TokenMerging(0.5, 3)], [DeepCache(2)], [])
    alone = [paint(sd, adapters=one).latents for one in sets]
    streams = [sd.stream(PROMPT, seed=3, steps=3, output_type="latent", adapters=one) for one in sets]
    ends = [None] * len(sets)
    for _ in range(4):
        ends = [next(stream) for stream in streams]
    for end, want in zip(ends, alone, strict=True):
        assert torch.equal(end.result.latents, want)


def test_knobs_are_adapters_too(sd):
    for adapter, options in (
        (TokenMerging(0.5, 3), {"merge_ratio": 0.5, "merge_seed": 3}),
        (DeepCache(2, 2), {"cache_interval": 2, "cache_depth": 2}),
    ):
        got, want = paint(sd, adapters=[adapter]), paint(sd, **options)
        assert torch.equal(got.latents, want.latents)
        assert got.parameters[0].merge_ratio == want.parameters[0].merge_ratio
        assert got.parameters[0].cache_depth == want.parameters[0].cache_depth
        with pytest.raises(UsageError, match="is given twice, in adapters or as"):
            paint(sd, adapters=[adapter], **options)
        with pytest.raises(UsageError, match="is given twice"):
            paint(sd, adapters=[adapter, adapter])
    for adapters, options in (
        ([AttentionSlicing(2), AttentionSlicing("max")], {}),
        ([AttentionSlicing(2)], {"attention_slicing": True}),
    ):  # of which the first would answer alone
        with pytest.raises(UsageError, match="^AttentionSlicing is given twice, in adapters or as"):
            sd.plan(PROMPT, adapters=adapters, **options)


def test_load_lora_stays_until_it_is_taken_off(lora):
    sd = StableDiffusion(tiny_model())
    plain, once = paint(sd).latents, paint(sd, adapters=[LoRA(lora, 0.5)]).latents
    loaded = sd.load_lora(lora, 0.5)
    assert sd.adapters == [loaded] and torch.equal(paint(sd).latents, once)
    sd.adapters.clear()
    assert torch.equal(paint(sd).latents, plain)


# --- embeddings ---


def context_by_hand(sd, prompt, vectors_at):
    """What the encoder says when the vectors of tokens are replaced as they come out of its table."""
    table = table_of(sd)
    hook = table.register_forward_hook(lambda m, given, out: vectors_at(out.clone()))
    try:
        return sd.model.get_learned_conditioning([prompt])
    finally:
        hook.remove()


def test_the_name_in_a_prompt_stands_for_the_vectors(sd, embedding):
    def at(out):
        out[0, 2:5] = embedding.vectors  # behind the start mark and "a"
        return out

    want = context_by_hand(sd, "a x x x circle", at)
    for name in ("birb", "embedding:birb"):
        with text_scope(sd.model, [embedding]):
            got = sd.model.get_learned_conditioning([f"a {name} circle"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    table = table_of(sd)
    assert len(table.weight) == table.num_embeddings and sd.model.cond_stage_model.extra_tokens is None


def test_an_embedding_works_in_both_prompts_and_is_said_where_no_prompt_names_it(sd, embedding, caplog):
    plain = paint(sd, "a birb").latents
    positive = paint(sd, "a birb", adapters=[embedding]).latents
    negative = paint(sd, "a birb", negative_prompt="embedding:birb", adapters=[embedding]).latents
    assert not torch.equal(positive, plain) and not torch.equal(negative, positive)
    assert not any("no prompt names" in message for message in caplog.messages)
    assert torch.equal(paint(sd, PROMPT, adapters=[embedding]).latents, paint(sd, PROMPT).latents)
    assert [m for m in caplog.messages if "no prompt names the embedding" in m and "birb" in m]


def test_names_are_found_as_token_numbers_the_longest_first():
    extra = ExtraTokens({(5, 6): ("long", (100, 101)), (5,): ("short", (102,)), (7, 7): ("pair", (103,))})
    assert extra.replace([5, 6, 5, 1, 7, 7, 7]) == [100, 101, 102, 1, 103, 7]
    assert [extra.name_of(i) for i in (101, 102, 7)] == ["long", "short", None]


@pytest.mark.parametrize(
    ("text", "beside"),
    [
        ("a <c-t>, red", ("a", ", red")), ("(<c-t>)", ("(", ")")), ("<C-T>!?", ("", "!?")),
        ("red<c-t>red", ("red", "red")),
        ("a <c-t>", ("a", "")), ("<c-t><c-t>", ("", "<c-t>")), ("<<c-t>>", ("<", ">")),
    ],
)  # fmt: skip
def test_a_name_with_signs_is_found_beside_other_signs(sd, text, beside):
    """CLIP's tokenizer joins neighbouring signs: of "<c-t>," the ">" is another token than of "<c-t>"."""
    encoder = sd.model.cond_stage_model

    def plain(words):
        return encoder.tokenizer(words, add_special_tokens=False)["input_ids"]

    extra = ExtraTokens(
        {tuple(plain("<c-t>")): ("<c-t>", (9001, 9002)), tuple(plain("red blue")): ("red blue", (9003,))}
    )
    with ldm.modules.seams.attached(encoder, _Names(extra)):
        before, after = (encoder.word_ids(part) for part in beside)
        assert encoder.word_ids(text) == [*before, 9001, 9002, *after]
        assert encoder.word_ids("a red, red blue") == [*plain("a red,"), 9003]
    assert extra.apart("red blue, a") == "red blue, a"


def test_a_long_prompt_is_cut_where_it_is_cut_without_embeddings_and_names_what_is_dropped(sd, embedding):
    encoder = sd.model.cond_stage_model
    words = PromptWords.of(sd.model, [embedding])
    plain = encoder.tokenize("red " * 100)
    most = encoder.max_length - 2
    with ldm.modules.seams.attached(encoder, *words.attachments):
        assert torch.equal(encoder.tokenize("red " * 100), plain)
        assert encoder.dropped_words("red " * most + "birb blue") == ["birb", "blue"]
        assert encoder.dropped_words("red " * (most - 1) + "birb blue") == ["birb", "blue"]
        assert encoder.dropped_words("red " * (most - 3) + "birb") == []
        ids = encoder.tokenize(["red " * (most - 1) + "birb", "birb"])
    assert ids.shape == (2, encoder.max_length) and ids[0, -1] == encoder.tokenizer.eos_token_id
    first = len(table_of(sd).weight)
    assert ids[1, 1:4].tolist() == [first, first + 1, first + 2]


def test_the_vocabulary_is_joined_with_vectors_once_for_all_batches_of_a_request(sd, embedding):
    """Of Stable Diffusion v1 it is a table of 150 MB."""
    tables = []
    handle = table_of(sd).register_forward_pre_hook(lambda layer, args: tables.append(layer.weight))
    options = {"steps": 1, "batch_size": 1, "guidance_scale": 1.0, "adapters": [embedding]}
    paint(sd, ["a birb", "birb red", "two birb"], **options)
    handle.remove()
    assert len(tables) == 3 and all(table is tables[0] for table in tables)
    assert len(tables[0]) == len(table_of(sd).weight) + 3


# --- runs in turn ---


def test_streams_with_weights_of_their_own_are_packed_once_each_however_many_take_turns(lora, monkeypatch):
    sd = StableDiffusion(tiny_model()).optimize()
    packed, pack = [], cpu.pack_linear
    monkeypatch.setattr(cpu, "pack_linear", lambda *args: packed.append(1) or pack(*args))
    options = {"steps": 2, "num_images": 2, "batch_size": 1, "guidance_scale": 1.0, "output_type": "latent"}
    shared = LoRA(lora, 0.1, text_weight=0.0)  # the last to change a weight, in every stream
    sets = [[LoRA(lora, weight, text_weight=0.0), shared] for weight in (0.2, 0.3, 0.4, 0.5, 0.6)]
    streams = [sd.stream("a red star", seed=3, adapters=adapters, **options) for adapters in sets]
    for one in streams:
        next(one)
    once = len(packed)
    for _ in zip(*streams, strict=True):
        pass
    assert len(packed) == once > 0
    # When they have ended, only the last few are kept.
    del streams, one, _
    paint(sd, steps=1, adapters=[LoRA(lora, 0.7, text_weight=0.0)])
    layer = sd.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_out[0]
    assert len(execution_of(layer)._packed._entries) == WeightCache.MAX_ENTRIES


# --- what pictures say ---


def test_a_picture_says_which_adapters_it_was_painted_with(sd, lora, embedding, tmp_path):
    adapters = [LoRA(lora, 0.8), embedding]
    result = sd.txt2img("a birb", seed=3, steps=2, adapters=adapters)
    path = result.save(tmp_path)[0]
    told = ldm.read_metadata(path)
    assert [one["kind"] for one in told["adapters"]] == ["LoRA", "Embedding"]
    assert told["adapters"][0]["weight"] == 0.8 and told["adapters"][0]["name"] == "style"
    from PIL import Image

    text = Image.open(path).text
    line = text["parameters"].splitlines()[-1]
    assert f'Lora hashes: "style: {adapters[0].describe()["hash"]}"' in line
    assert f'TI hashes: "birb: {embedding.describe()["hash"]}"' in line
    assert json.loads(text["ldm"])["parameters"]["adapters"] == told["adapters"]
    plain = sd.txt2img("a birb", seed=3, steps=2)
    assert "hashes" not in plain.infotexts[0] and plain.parameters[0].adapters == []
    assert not np.array_equal(np.asarray(result[0]), np.asarray(plain[0]))


# --- refusals ---


def test_wrong_adapters_are_refused_in_one_line_and_nothing_is_painted(sd, lora, embedding, tmp_path):
    before = everything(sd.model)
    other = tmp_path / "other.safetensors"
    save_safetensors(other, {"emb_params": torch.ones(2, 7)}, {})
    twin = tmp_path / "birb.safetensors"
    save_safetensors(twin, {"emb_params": embedding.vectors.clone()}, {})
    wide = write_lora_for(tmp_path / "wide.safetensors", sd.model)
    from safetensors.torch import load_file

    tensors = load_file(wide)
    name = next(k for k in tensors if k.endswith("lora_down.weight"))
    tensors[name] = torch.ones(2, tensors[name].shape[1] + 3)
    save_safetensors(wide, tensors, {})
    width = embedding.vectors.shape[1]
    cases = (
        (str(lora), UsageError, "adapters must be a list such as"),
        (5, UsageError, "adapters must be a list such as"),
        ([str(lora)], UsageError, r"a file is LoRA\(file\) or Embedding\(file\)"),
        ([object()], UsageError, "must be those of ldm.adapters, or have a rank and attach or changes"),
        ([LoRA(lora)] * 101, UsageError, "at most 100 adapters work together, got 101"),
        ([LoRA(wide)], MismatchError, "does not fit"),
        (
            [Embedding(other, width=7)],
            MismatchError,
            f"vectors of width 7, the text encoder's have width {width}",
        ),
        ([embedding, Embedding(twin, width=width)], UsageError, "both go by 'birb' in a prompt"),
    )
    for adapters, kind, words in cases:
        with pytest.raises(kind, match=words) as error:
            paint(sd, adapters=adapters)
        assert len(str(error.value)) <= 400 and "\n" not in str(error.value)
        assert error.value.exit_code in (2, 3, 4, 5)
    with pytest.raises(UsageError, match="weight"):
        LoRA(lora, math.nan)
    assert unchanged(sd.model, before)
