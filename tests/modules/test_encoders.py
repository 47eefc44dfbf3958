"""The text encoder: v1 key names on any transformers, the layers' meanings, weights accounted for."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from keyed import fill, keyed_input, weight
from safetensors.torch import save_file
from torch import nn

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.modules.encoders import clip_folder
from ldm.modules.encoders.modules import (
    CLIP_L,
    AbstractEncoder,
    ClassEmbedder,
    CLIPTextTransformer,
    FrozenCLIPEmbedder,
    IdentityEncoder,
    SpatialRescaler,
)
from ldm.shapes.bpe import CAPTION_WORDS, write_text_model

PREFIX = "transformer.text_model."
POSITIONS = PREFIX + "embeddings.position_ids"
LAYERS, HEADS, WIDTH, LENGTH = 3, 2, 20, 11
LONG = "a red circle above a blue square on a white background"  # 11 tokens, 9 fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text encoder with no weights of its own."""
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder, CAPTION_WORDS, width=WIDTH, layers=LAYERS, heads=HEADS, max_length=LENGTH)
    return folder


@pytest.fixture
def build(folder):
    """Build an embedder of that folder with keyed weights."""

    def build(**options):
        return fill(
            FrozenCLIPEmbedder(folder, **{"max_length": LENGTH, **options}), prefix="cond_stage_model."
        )

    return build


@pytest.fixture
def with_weights(folder, tmp_path):
    """Copy the folder and give it a model.safetensors."""

    def copy(tensors):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        return tmp_path

    return copy


def clip_forward(state, ids):
    """CLIP's text transformer written out again: pre-norm, causal, quick GELU. Gives every hidden state."""

    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name):
        return nn.functional.layer_norm(
            x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps=1e-5
        )

    b, n = ids.shape
    x = state["embeddings.token_embedding.weight"][ids] + state["embeddings.position_embedding.weight"][:n]
    hidden = [x]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        y = norm(x, at + "layer_norm1")
        q, k, v = (
            linear(y, f"{at}self_attn.{name}_proj").reshape(b, n, HEADS, -1).transpose(1, 2) for name in "qkv"
        )  # each (b, heads, n, d / heads)
        scores = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).masked_fill(future, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, WIDTH)
        x = x + linear(y, at + "self_attn.out_proj")
        y = linear(norm(x, at + "layer_norm2"), at + "mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), at + "mlp.fc2")
        hidden.append(x)
    return hidden, norm(x, "final_layer_norm")


def plain_state(embedder):
    return {key.removeprefix(PREFIX): tensor for key, tensor in embedder.state_dict().items()}


# Names


def test_clip_l_has_the_names_and_sizes_of_v1_files():
    with torch.device("meta"):
        embedder = FrozenCLIPEmbedder()
    shapes = {key: tuple(tensor.shape) for key, tensor in embedder.state_dict().items()}
    layer = {
        **{f"self_attn.{name}_proj.weight": (768, 768) for name in ("k", "v", "q", "out")},
        **{f"self_attn.{name}_proj.bias": (768,) for name in ("k", "v", "q", "out")},
        **{f"layer_norm{i}.{part}": (768,) for i in (1, 2) for part in ("weight", "bias")},
        **{"mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,)},
        **{"mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,)},
    }
    wanted = {f"encoder.layers.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    wanted["embeddings.token_embedding.weight"] = (49408, 768)
    wanted["embeddings.position_embedding.weight"] = (77, 768)
    wanted["final_layer_norm.weight"] = wanted["final_layer_norm.bias"] = (768,)
    assert shapes == {PREFIX + name: shape for name, shape in wanted.items()}
    assert len(shapes) == 196
    assert sum(parameter.numel() for parameter in embedder.parameters()) == 123_060_480
    assert embedder.transformer.config.num_attention_heads == 12
    assert embedder.transformer.config.hidden_act == "quick_gelu"


def test_weights_load_strictly_and_come_back(build):
    embedder, other = build(), build()
    fill(other, prefix="other.")
    other.load_state_dict(embedder.state_dict())
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, weight("cond_stage_model." + key, tuple(tensor.shape))), key


def test_the_constant_of_old_files_is_accepted_and_nothing_else_is(build):
    embedder = build()
    state = embedder.state_dict()
    old = {**state, POSITIONS: torch.arange(LENGTH)[None]}
    embedder.load_state_dict(old)
    assert POSITIONS in old and POSITIONS not in embedder.state_dict()

    whole = nn.ModuleDict({"cond_stage_model": embedder})
    whole.load_state_dict({f"cond_stage_model.{key}": tensor for key, tensor in old.items()})

    with pytest.raises(RuntimeError, match="Unexpected key.*transformer.embeddings.position_ids"):
        embedder.load_state_dict({**state, "transformer.embeddings.position_ids": torch.zeros(1)})
    unprefixed = {key.replace("text_model.", ""): tensor for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        embedder.load_state_dict(unprefixed)


# What comes out


def test_the_forward_is_that_of_transformers(folder, build):
    from transformers import CLIPTextConfig, CLIPTextModel

    embedder = build()
    theirs = CLIPTextModel(CLIPTextConfig(**json.loads((folder / "config.json").read_text()))).eval()
    own_keys = list(theirs.state_dict())
    theirs.load_state_dict(
        {key: embedder.state_dict()[PREFIX + key.removeprefix("text_model.")] for key in own_keys}
    )
    prompts = ["a red circle", "", "a blue star, large"]
    with torch.no_grad():
        output = theirs(input_ids=embedder.tokenize(prompts), output_hidden_states=True)
        assert torch.equal(embedder.encode(prompts), output.last_hidden_state)
        assert torch.equal(build(layer="pooled")(prompts)[:, 0], output.pooler_output)
        for index in range(-LAYERS, LAYERS + 1):
            hidden = build(layer="hidden", layer_idx=index)(prompts)
            assert torch.equal(hidden, output.hidden_states[index]), index


def test_the_forward_is_clips_written_out(build):
    embedder = build()
    prompts = ["a red circle", "", LONG]
    ids = embedder.tokenize(prompts)
    hidden, last = clip_forward(plain_state(embedder), ids)
    torch.testing.assert_close(embedder(prompts), last, rtol=0, atol=1e-5)
    for index in range(LAYERS + 1):
        states = build(layer="hidden", layer_idx=index)(prompts)
        torch.testing.assert_close(states, hidden[index], rtol=0, atol=1e-5)
    assert embedder(prompts).shape == (3, LENGTH, WIDTH)


def test_last_is_normed_and_hidden_is_raw(build):
    last = build()(["a star"])
    raw = build(layer="hidden", layer_idx=LAYERS)(["a star"])
    norm = build().transformer.text_model.final_layer_norm
    assert torch.equal(last, norm(raw))
    assert (last - raw).abs().max() > 0.1


def test_pooled_is_the_state_of_the_first_end_mark(build):
    prompts = ["a red circle", "", "star"]
    last, pooled = build()(prompts), build(layer="pooled")(prompts)
    assert pooled.shape == (3, 1, WIDTH)
    assert torch.equal(pooled[:, 0], last[torch.arange(3), [4, 1, 2]])


def test_a_token_sees_only_what_stands_before_it(build):
    one, other = build()(["a red circle"]), build()(["a red star"])
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])


def test_one_prompt_is_a_batch_of_one(build):
    embedder = build()
    assert torch.equal(embedder("a star"), embedder(["a star"]))
    assert torch.equal(embedder(("a star", "red")), embedder(["a star", "red"]))


def test_the_output_offers_what_cldm_reads(build):
    """Its replaced forward joins three windows and skips layers by the attributes used here."""

    def forward(self, text):
        ids = self.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
        usable, mark, end = LENGTH - 2, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        windows = []
        for row in ids:
            for start in range(0, 3 * usable, usable):
                window = [mark, *row[start : start + usable], end]
                windows.append(window + [self.tokenizer.pad_token_id] * (LENGTH - len(window)))
        feed = torch.IntTensor(windows).to(self.device)
        if self.clip_skip == 1:
            states = self.transformer(input_ids=feed, output_hidden_states=False).last_hidden_state
        else:
            output = self.transformer(input_ids=feed, output_hidden_states=True)
            states = self.transformer.text_model.final_layer_norm(output.hidden_states[-self.clip_skip])
        return states.reshape(len(text), 3 * LENGTH, -1)

    words = LONG.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenCLIPEmbedder, "forward", forward)
        patch.setattr(FrozenCLIPEmbedder, "clip_skip", 2, raising=False)
        skipped = build().encode([LONG])
        patch.setattr(FrozenCLIPEmbedder, "clip_skip", 1)
        joined = build().encode([LONG])
    pieces = [" ".join(words[:9]), " ".join(words[9:]), ""]
    torch.testing.assert_close(
        joined, build().encode(pieces).reshape(1, 3 * LENGTH, WIDTH), rtol=0, atol=1e-6
    )
    raw = build(layer="hidden", layer_idx=-2)(pieces).reshape(1, 3 * LENGTH, WIDTH)
    normed = build().transformer.text_model.final_layer_norm(raw)
    torch.testing.assert_close(skipped, normed, rtol=0, atol=1e-6)


# Training and devices


def test_frozen_is_in_evaluation_mode_without_gradients(build):
    embedder = build()
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    assert not embedder.transformer.text_model.training
    assert not embedder(["a star"]).requires_grad


def test_not_frozen_every_parameter_learns(build):
    embedder = build(freeze=False)
    (embedder(["a red star"]) * keyed_input("grad", (1, LENGTH, WIDTH))).sum().backward()
    idle = [name for name, parameter in embedder.named_parameters() if parameter.grad is None]
    assert idle == []
    assert embedder.transformer.text_model.final_layer_norm.bias.grad.abs().max() > 0


def test_the_device_is_where_the_weights_are(build):
    embedder = build(device="cpu")
    assert embedder.device == torch.device("cpu")
    embedder.device = "meta"
    assert embedder.device.type == "meta"
    with pytest.raises(AttributeError):
        embedder.gpu  # noqa: B018


def test_half_precision_runs(build):
    states = build().to(torch.bfloat16)(["a star"])
    assert states.dtype == torch.bfloat16 and states.isfinite().all()


def test_built_on_meta_it_takes_assigned_weights_whole(folder, build, with_weights):
    wanted = build()
    broken = with_weights({"x": torch.zeros(1)})  # never read on meta
    with torch.device("meta"):
        embedder = FrozenCLIPEmbedder(broken, max_length=LENGTH, device="cpu")
    assert all(parameter.is_meta for parameter in embedder.parameters())
    embedder.load_state_dict(wanted.state_dict(), assign=True)
    embedder.to("cpu")
    assert torch.equal(embedder(["a red star"]), wanted(["a red star"]))


def test_the_parameters_are_listed_once(build):
    embedder = build()
    assert len(list(embedder.parameters())) == len(embedder.state_dict()) == 16 * LAYERS + 4


# Weights of a folder


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_folders_weights_are_loaded_whichever_transformers_wrote_them(build, with_weights, prefix):
    wanted = build()
    tensors = {prefix + name: tensor for name, tensor in plain_state(wanted).items()}
    tensors[prefix + "embeddings.position_ids"] = torch.arange(LENGTH)[None]
    embedder = FrozenCLIPEmbedder(with_weights(tensors), max_length=LENGTH)
    assert torch.equal(embedder(["a red star"]), wanted(["a red star"]))
    assert not any(parameter.requires_grad for parameter in embedder.parameters())


def test_of_a_whole_clip_the_text_half_is_taken(build, with_weights, caplog):
    wanted = build()
    tensors = {"text_model." + name: tensor.half() for name, tensor in plain_state(wanted).items()}
    others = ("vision_model.embeddings.class_embedding", "visual_projection.weight", "logit_scale")
    folder = with_weights(
        {**tensors, **{name: torch.ones(3) for name in (*others, "text_projection.weight")}}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": config}))
    with caplog.at_level(logging.INFO):
        embedder = FrozenCLIPEmbedder(folder, max_length=LENGTH)
    assert {parameter.dtype for parameter in embedder.parameters()} == {torch.float32}
    torch.testing.assert_close(embedder(["red"]), wanted(["red"]), rtol=0, atol=0.02)  # weights were rounded
    assert f"{16 * LAYERS + 4} tensors of {folder / 'model.safetensors'}, 4 others ignored" in caplog.text


def test_every_tensor_is_accounted_for(build, with_weights):
    whole = plain_state(build())
    name = "encoder.layers.1.mlp.fc1.bias"

    renamed = {key.replace("fc1.bias", "fc1.bia"): tensor for key, tensor in whole.items()}
    with pytest.raises(
        MismatchError,
        match=f"lacks {LAYERS} tensors .text_model.encoder.layers.0.mlp.fc1.bias, .* has unknown 3",
    ):
        FrozenCLIPEmbedder(with_weights(renamed), max_length=LENGTH)
    with pytest.raises(MismatchError, match="it has unknown 1 tensors .lora.down"):
        FrozenCLIPEmbedder(with_weights({**whole, "lora.down": torch.zeros(2)}), max_length=LENGTH)
    with pytest.raises(
        MismatchError, match=rf"it has misshapen 1 tensors .text_model.{name} \(7,\) instead of \(80,\)"
    ):
        FrozenCLIPEmbedder(with_weights({**whole, name: torch.zeros(7)}), max_length=LENGTH)


def test_weights_in_another_format_are_named(with_weights):
    folder = with_weights({"x": torch.zeros(1)})
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FormatError, match="cannot be read as safetensors"):
        FrozenCLIPEmbedder(folder, max_length=LENGTH)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(AbsentError, match="has pytorch_model.bin but no model.safetensors; convert it"):
        FrozenCLIPEmbedder(folder, max_length=LENGTH)


def test_a_diffusers_folder_has_its_tokenizer_next_door(folder, tmp_path):
    for name, files in {"text_encoder": ["config.json"], "tokenizer": ["vocab.json", "merges.txt"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((folder / file).read_bytes())
    embedder = FrozenCLIPEmbedder(tmp_path / "text_encoder", max_length=LENGTH)
    assert embedder.tokenizer.origin == f"{tmp_path / 'tokenizer'}/vocab.json"


# The version


@pytest.fixture
def tiny_clip_l(monkeypatch, tmp_path):
    """CLIP-L made narrow, with all of its vocabulary, and an empty Hugging Face cache."""
    narrow = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(clip_folder, "CLIP_L_FIELDS", {**clip_folder.CLIP_L_FIELDS, **narrow})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cache_folder(cache, name):
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123")
    (repo / "snapshots" / "0123").mkdir(parents=True)
    return repo / "snapshots" / "0123"


def test_without_weights_clip_l_is_random_and_says_so(tiny_clip_l, caplog):
    embedder = FrozenCLIPEmbedder(CLIP_L)
    assert f"'{CLIP_L}' is not in the local Hugging Face cache: its weights are random" in caplog.text
    assert embedder(["a photo of a cat"]).shape == (1, 77, 8)
    assert embedder.tokenize("a photo of a cat")[0, :8].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
        49407,
    ]


def test_the_weights_of_the_cache_are_taken(tiny_clip_l, caplog):
    wanted = fill(FrozenCLIPEmbedder(CLIP_L))
    caplog.clear()
    state = {"text_model." + name: tensor for name, tensor in plain_state(wanted).items()}
    save_file(state, cache_folder(tiny_clip_l, CLIP_L) / "model.safetensors")
    embedder = FrozenCLIPEmbedder(CLIP_L)
    assert torch.equal(embedder(["a cat"]), wanted(["a cat"]))
    assert caplog.text == ""


def test_a_folder_of_that_name_comes_before_the_built_in_one(tiny_clip_l, folder):
    (tiny_clip_l / CLIP_L).mkdir(parents=True)
    for file in folder.iterdir():
        (tiny_clip_l / CLIP_L / file.name).write_bytes(file.read_bytes())
    assert FrozenCLIPEmbedder(CLIP_L, max_length=LENGTH).transformer.config.hidden_size == WIDTH


def test_another_hub_name_is_taken_from_the_cache_or_not_at_all(tiny_clip_l, folder):
    with pytest.raises(
        AbsentError, match="no text encoder 'some/clip': give 'openai/clip-vit-large-patch14', or"
    ):
        FrozenCLIPEmbedder("some/clip")
    snapshot = cache_folder(tiny_clip_l, "some/clip")
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    assert FrozenCLIPEmbedder("some/clip", max_length=LENGTH).transformer.config.hidden_size == WIDTH


def test_the_shipped_text_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedder = FrozenCLIPEmbedder("model_data/shapes/text", max_length=32)
    assert embedder(["a large red circle on the left on a white background"]).shape == (1, 32, 128)


@pytest.mark.parametrize("version", ["no/such/folder", "../nothing", "a//b", "x" * 300, "\\"])
def test_an_unknown_version_says_what_to_give(version):
    with pytest.raises(AbsentError, match="or a folder with config.json, vocab.json and merges.txt"):
        FrozenCLIPEmbedder(version)


def test_no_version_is_no_folder():
    with pytest.raises(UsageError, match="needs a version, got an empty string"):
        FrozenCLIPEmbedder("")


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(AbsentError, match=r"no tokenizer with \d+ tokens; looked for .*vocab.json"):
        FrozenCLIPEmbedder(tmp_path, max_length=LENGTH)
    embedder = FrozenCLIPEmbedder(tmp_path, max_length=LENGTH, tokenizer=folder)
    assert embedder.tokenizer.origin == str(folder)


@pytest.mark.parametrize(
    "text, error, message",
    [
        (None, AbsentError, "needs config.json with the fields of CLIPTextConfig"),
        ("{", FormatError, "should hold JSON: "),
        ("[]", FormatError, "should hold a JSON object"),
        ('{"text_config": "tiny"}', FormatError, "should hold a JSON object"),
        ('{"sample_size": 64}', FormatError, "is not the configuration of a CLIP text encoder"),
        ('{"hidden_size": 30, "num_attention_heads": 4}', FormatError, "hidden_size 30 over 4 heads"),
        ('{"hidden_size": 30}', FormatError, "hidden_size 30 over 8 heads"),
        ('{"hidden_size": 30, "hidden_act": "sine"}', FormatError, "hidden_act is 'sine'"),
        ('{"hidden_size": 32, "layer_norm_eps": null}', FormatError, "layer_norm_eps is None"),
        ('{"hidden_size": 32, "num_attention_heads": 0}', FormatError, "over 0 heads"),
        ('{"hidden_size": "wide"}', FormatError, "hidden_size is 'wide'"),
        ('{"hidden_size": 0}', FormatError, "hidden_size is 0"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        FrozenCLIPEmbedder(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": "penultimate"}, "no layer 'penultimate'; choose one of last, pooled, hidden"),
        ({"layer": "hidden"}, "needs layer_idx 0 to 3, got None"),
        ({"layer": "hidden", "layer_idx": 4}, "needs layer_idx 0 to 3, got 4"),
        ({"layer": "hidden", "layer_idx": -4}, "needs layer_idx 0 to 3, got -4"),
        ({"max_length": 12}, "takes max_length 3 to 11, got 12"),
        ({"max_length": 2}, "takes max_length 3 to 11, got 2"),
    ],
)
def test_options_out_of_range_are_named(folder, options, message):
    with pytest.raises(UsageError, match=message):
        FrozenCLIPEmbedder(folder, **{"max_length": LENGTH, **options})


def test_clip_l_has_twelve_layers_to_choose_from():
    with pytest.raises(UsageError, match="needs layer_idx 0 to 12, got 13"):
        FrozenCLIPEmbedder(layer="hidden", layer_idx=13)


# Prompts that are too long


def test_the_words_that_do_not_fit_are_named(build, caplog):
    embedder = build()
    ids = embedder.tokenize([LONG])
    assert embedder.dropped_words(LONG) == ["white", "background"]
    assert "a prompt is longer than 9 tokens, dropped: white background" in caplog.text
    assert torch.equal(ids, embedder.tokenize(["a red circle above a blue square on a"]))


def test_a_prompt_that_just_fits_drops_nothing(build, caplog):
    embedder = build()
    embedder.encode(["a red circle above a blue square on a", "", "star <|endoftext|>"])
    assert embedder.dropped_words("a red circle above a blue square on a") == []
    assert caplog.text == ""


def test_a_word_that_is_cut_through_counts_as_dropped(build):
    """Nine tokens hold "a", "red" and seven of zebra's and the comet's letters."""
    embedder = build()
    tokens = embedder.tokenizer.tokenize("a red zebra comet")
    assert len(tokens) > 9 and not tokens[8].endswith("</w>")
    assert embedder.dropped_words("a red zebra Comet, star") == ["comet", ",", "star"]
    assert embedder.dropped_words("zebracometzebracomet star") == ["zebracometzebracomet", "star"]


def test_a_mark_in_the_prompt_hides_no_loss(build, caplog):
    embedder = build()
    prompt = "a red circle above a blue square on <|endoftext|> white star"
    embedder.tokenize([prompt])
    assert embedder.dropped_words(prompt) == ["white", "star"]
    assert "dropped: white star" in caplog.text


def test_a_repeated_prompt_is_named_once_and_many_words_are_counted(build, caplog):
    embedder = build()
    embedder.tokenize(["red " * 40] * 3)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().endswith("dropped: " + "red " * 20 + "and 11 more")


@pytest.mark.parametrize("prompts", [[], None, 3, {"a": 1}])
def test_what_is_no_prompt_is_named(build, prompts):
    with pytest.raises(UsageError, match="prompts must be a string or a list of strings, got"):
        build().tokenize(prompts)


def test_a_list_with_something_else_in_it_is_refused(build):
    with pytest.raises(UsageError, match="a prompt must be a string, got NoneType"):
        build().encode(["a star", None])


@pytest.mark.parametrize("prompt", ["", "  ", "\x00", "😀", "\ud83d", "שלום", "cat " * 2500, "(" * 10_000])
def test_strange_prompts_are_encoded_to_finite_states(build, prompt):
    states = build().encode([prompt])
    assert states.shape == (1, LENGTH, WIDTH) and states.isfinite().all()


# The other encoders


def test_identity_hands_on_what_it_gets():
    condition = {"c_concat": [1]}
    assert IdentityEncoder().encode(condition) is condition


def test_an_encoder_without_encode_says_so():
    with pytest.raises(NotImplementedError, match="AbstractEncoder must define encode"):
        AbstractEncoder().encode("a")


def test_classes_become_one_token():
    embedder = ClassEmbedder(5, n_classes=7, key="class_label")
    labels = torch.tensor([6, 0, 2])
    out = embedder({"class_label": labels})
    assert list(embedder.state_dict()) == ["embedding.weight"]
    assert torch.equal(out, embedder.embedding.weight[labels].reshape(3, 1, 5))
    assert torch.equal(embedder({"other": labels}, key="other"), out)


def test_the_last_class_stands_for_none():
    embedder = ClassEmbedder(5, n_classes=7, key="cls", ucg_rate=0.25)
    none = embedder.get_unconditional_conditioning(3)
    assert none["cls"].tolist() == [6, 6, 6] and none["cls"].device == embedder.embedding.weight.device
    assert embedder.get_unconditional_conditioning(2, "meta")["cls"].device.type == "meta"
    batch = {"cls": torch.zeros(4000, dtype=torch.long)}
    torch.manual_seed(0)
    last = embedder.embedding.weight[6]
    drawn = (embedder(batch)[:, 0] == last).all(1).float().mean()
    assert drawn.item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    for out in (
        embedder(batch, disable_dropout=True),
        embedder.eval()(batch),
        ClassEmbedder(5, 7, "cls")(batch),
    ):
        assert out.std(0).max() == 0  # nobody loses a class while sampling, or where it was not asked for
    with pytest.raises(UsageError, match="ucg_rate should be a number from 0 to 1, got 2"):
        ClassEmbedder(5, ucg_rate=2)


def test_the_rescaler_halves_as_often_as_asked():
    x = keyed_input("rescaler", (2, 3, 16, 24))
    assert torch.equal(SpatialRescaler(n_stages=0)(x), x)
    halved = x.reshape(2, 3, 8, 2, 12, 2).mean((3, 5))
    torch.testing.assert_close(SpatialRescaler(1)(x), halved, rtol=0, atol=1e-6)
    quartered = SpatialRescaler(2, method="area").encode(x)
    torch.testing.assert_close(quartered, x.reshape(2, 3, 4, 4, 6, 4).mean((3, 5)), rtol=0, atol=1e-6)
    assert SpatialRescaler(1, method="nearest", multiplier=2)(x).shape == (2, 3, 32, 48)


def test_the_rescaler_maps_channels():
    rescaler = fill(SpatialRescaler(1, in_channels=3, out_channels=5, bias=True))
    assert sorted(rescaler.state_dict()) == ["channel_mapper.bias", "channel_mapper.weight"]
    assert rescaler(keyed_input("rescaler", (2, 3, 16, 24))).shape == (2, 5, 8, 12)
    assert list(SpatialRescaler(1, out_channels=5).state_dict()) == ["channel_mapper.weight"]


def test_the_rescaler_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match="n_stages >= 0, got -1"):
        SpatialRescaler(-1)
    with pytest.raises(UsageError, match="no method 'lanczos'; choose one of nearest, linear, bilinear"):
        SpatialRescaler(1, method="lanczos")


# Imports


@pytest.mark.slow
def test_importing_the_module_and_cleaning_a_prompt_import_neither_transformers_nor_ftfy():
    code = (
        "import ldm.modules.encoders.modules, sys; from ldm.modules.encoders.tokenizer import clean; "
        "clean('A cat, (red:1.2) and a dog'); "
        "print([n for n in ('transformers', 'ftfy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_full_size_clip_l_encodes_a_prompt(full_size):
    embedder = FrozenCLIPEmbedder()
    states = embedder.encode(["a photo of a cat"])
    assert states.shape == (1, 77, 768) and states.isfinite().all()
    assert isinstance(embedder.transformer, CLIPTextTransformer)
