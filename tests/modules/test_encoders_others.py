"""Text encoders of other models: latent-diffusion's BERT, OpenCLIP's, and CLIP's whole texts and pictures."""

import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from keyed import fill, keyed_input
from torch import nn
from transformers import CLIPTextConfig

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.modules.encoders import modules
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    BERTTokenizer,
    CLIPTextTransformer,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    TransformerEmbedder,
)
from ldm.modules.encoders.open_clip_text import SIZES, OpenCLIPText, Sizes, sizes_of
from ldm.modules.x_transformer import Attention, Decoder, Encoder, RMSNorm, ScaleNorm, TransformerWrapper

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", "blue", ",", "cafe"]


@pytest.fixture
def vocabulary(tmp_path):
    folder = tmp_path / "model_data" / "bert-base-uncased"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def attention_by_hand(layer, x, seen, closed=None):
    q, k, v = layer.to_q(x), layer.to_k(seen), layer.to_v(seen)
    q, k, v = (y.reshape(*y.shape[:2], layer.heads, -1) for y in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    if closed is not None:
        scores = scores.masked_fill(closed, -torch.finfo(scores.dtype).max)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
    return layer.to_out(out.flatten(2))


@torch.no_grad()
def test_attention_is_the_formula():
    layer = fill(Attention(24, dim_head=5, heads=3))
    x, seen = keyed_input("x", (2, 4, 24)), keyed_input("seen", (2, 7, 24))
    close(layer(x), attention_by_hand(layer, x, x))
    close(layer(x, context=seen), attention_by_hand(layer, x, seen))
    rows = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    columns = torch.tensor([[1] * 5 + [0] * 2, [0] + [1] * 6]).bool()
    closed = ~(rows[:, None, :, None] & columns[:, None, None, :])
    got = layer(x, context=seen, mask=rows, context_mask=columns)
    close(got, attention_by_hand(layer, x, seen, closed))  # a token that counts for nothing sees all alike
    close(
        layer(x, context=seen, context_mask=columns),
        attention_by_hand(layer, x, seen, ~columns[:, None, None]),
    )
    causal = fill(Attention(24, dim_head=5, heads=3, causal=True))
    close(causal(x), attention_by_hand(causal, x, x, torch.ones(4, 4).triu(1).bool()))
    both = ~(rows[:, None, :, None] & rows[:, None, None, :]) | torch.ones(4, 4).triu(1).bool()
    close(causal(x, mask=rows), attention_by_hand(causal, x, x, both))
    assert layer.half()(x.half(), mask=rows).isfinite().all()


def test_dropout_is_on_the_weights_and_only_in_training():
    torch.manual_seed(0)
    layer = fill(Attention(24, dim_head=5, heads=3, dropout=0.5))
    x = keyed_input("x", (2, 4, 24))
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.dropout.p = 1.0
    close(layer(x), layer.to_out.bias.expand(2, 4, 24))


@torch.no_grad()
def test_norms_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    close(RMSNorm(2)(x), x / 12.5**0.5)
    assert RMSNorm(2).g.shape == (2,) and ScaleNorm(2).g.shape == (1,)
    close(ScaleNorm(2)(x), x / 12.5**0.5)


def wrapper(kind=Encoder, **options):
    layers = kind(dim=24, depth=2, heads=3, attn_dim_head=5, **options)
    return fill(TransformerWrapper(num_tokens=11, max_seq_len=9, attn_layers=layers))


TOKENS = torch.tensor([[2, 5, 6, 3, 0], [2, 9, 10, 7, 3]])


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"pre_norm": False}, {"use_rmsnorm": True}, {"use_scalenorm": True, "ff_glu": True, "ff_mult": 2}],
)
def test_layers_are_norm_layer_sum(options):
    net = wrapper(**options)
    h = net.token_emb.weight[TOKENS] + net.pos_emb.emb.weight[:5]
    for i, (norm, layer, _) in enumerate(net.attn_layers.layers):
        given = norm(h) if options.get("pre_norm", True) else h
        gave = attention_by_hand(layer, given, given) if i % 2 == 0 else layer.net(given)
        h = gave + h
        if not options.get("pre_norm", True) and i < 3:
            h = norm(h)
    want = F.layer_norm(h, (24,), net.norm.weight, net.norm.bias)
    close(net(TOKENS, return_embeddings=True), want)
    close(net(TOKENS), want @ net.to_logits.weight.T + net.to_logits.bias)


@torch.no_grad()
def test_what_tokens_see():
    """A decoder's answers do not depend on later tokens, an encoder's do; masked tokens are as if they were not."""
    other = TOKENS.clone()
    other[:, 3:] = 1
    encoder, decoder = wrapper(), wrapper(Decoder)
    close(decoder(TOKENS)[:, :3], decoder(other)[:, :3])
    assert (encoder(TOKENS)[:, :3] - encoder(other)[:, :3]).abs().max() > 1e-3
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool().expand(2, 5)
    close(encoder(other, mask=mask)[:, :3], encoder(TOKENS[:, :3]))
    crossing = wrapper(cross_attend=True)
    context = keyed_input("seen", (2, 7, 24))
    assert crossing.attn_layers.layer_types == ("a", "c", "f") * 2
    assert wrapper(cross_attend=True, only_cross=True).attn_layers.layer_types == ("c", "f") * 2
    first = crossing(TOKENS, context=context)
    seen = torch.tensor([[1] * 6 + [0]]).bool().expand(2, 7)
    close(crossing(TOKENS, context=context, context_mask=seen), crossing(TOKENS, context=context[:, :6]))
    assert (first - crossing(TOKENS, context=context[:, :6])).abs().max() > 1e-3


@torch.no_grad()
def test_options_of_the_wrapper():
    layers = lambda: Encoder(dim=24, depth=1, heads=3, attn_dim_head=5)  # noqa: E731
    sizes = {"num_tokens": 11, "max_seq_len": 9}
    tied = fill(TransformerWrapper(**sizes, attn_layers=layers(), tie_embedding=True))
    close(tied(TOKENS), tied(TOKENS, return_embeddings=True) @ tied.token_emb.weight.T)
    assert "to_logits.weight" not in tied.state_dict()
    narrow = fill(TransformerWrapper(**sizes, attn_layers=layers(), emb_dim=10, use_pos_emb=False))
    assert narrow.token_emb.weight.shape == (11, 10) and narrow.project_emb.weight.shape == (24, 10)
    turned = TOKENS[:, [1, 0, 2, 3, 4]]
    close(narrow(turned), narrow(TOKENS)[:, [1, 0, 2, 3, 4]])  # without places, order is nothing
    remembering = fill(TransformerWrapper(**sizes, attn_layers=layers(), num_memory_tokens=2))
    assert remembering(TOKENS, mask=torch.ones(2, 5).bool()).shape == (2, 5, 11)
    for wrong, message in (
        (
            lambda: Encoder(dim=24, depth=1, rotary_pos_emb=True),
            "no option 'rotary_pos_emb'; beside the named ones",
        ),
        (lambda: Encoder(dim=24, depth=1, causal=True), "takes no 'causal'; take Decoder"),
        (lambda: Decoder(dim=24, depth=1, causal=False), "takes no 'causal'"),
        (
            lambda: TransformerWrapper(**sizes, attn_layers=nn.Identity()),
            "an Encoder or a Decoder, got Identity",
        ),
        (lambda: tied(TOKENS.repeat(1, 2)), "at most 9 tokens, got 10"),
    ):
        with pytest.raises(UsageError, match=message):
            wrong()


def as_ldm_bert(state):
    """Our keys as diffusers names them."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("transformer.")
        for old, new in (
            ("token_emb", "model.embed_tokens"),
            ("pos_emb.emb", "model.embed_positions"),
            ("norm.", "model.layer_norm."),
        ):
            if key.startswith(old):
                key = new + key[len(old) :]
        parts = key.split(".")
        if parts[:2] == ["attn_layers", "layers"]:
            number, place, rest = int(parts[2]), parts[3], ".".join(parts[4:])
            is_ff = number % 2
            if place == "0":
                name = ("final_layer_norm." if is_ff else "self_attn_layer_norm.") + rest
            else:
                pairs = {"net.0.0": "fc1", "net.2": "fc2", "to_out": "self_attn.out_proj"}
                pairs |= {f"to_{c}": f"self_attn.{c}_proj" for c in "qkv"}
                name = next(new + rest[len(old) :] for old, new in pairs.items() if rest.startswith(old))
            key = f"model.layers.{number // 2}.{name}"
        renamed[key] = value
    return renamed


@torch.no_grad()
def test_bert_is_diffusers_ldm_bert(vocabulary):
    """Another program's reading of the same weights."""
    ours = fill(BERTEmbedder(n_embed=32, n_layer=3, vocab_size=12, max_seq_len=9, vocabulary=vocabulary))
    config = LDMBertConfig(
        vocab_size=12, max_position_embeddings=9, encoder_layers=3, encoder_ffn_dim=128, d_model=32
    )
    theirs = LDMBertModel(config).eval()
    theirs.load_state_dict(as_ldm_bert(ours.state_dict()))
    prompts = ["a red circle", "Blue circles, a red café"]
    ids = ours.tknz_fn(prompts)
    assert ids.tolist() == [[2, 5, 6, 7, 3, 0, 0, 0, 0], [2, 9, 7, 8, 10, 5, 6, 11, 3]]
    close(ours.encode(prompts), theirs(ids)[0], atol=2e-5)
    assert ours(prompts).shape == (2, 9, 32)
    bare = BERTEmbedder(n_embed=32, n_layer=3, vocab_size=12, max_seq_len=9, use_tokenizer=False)
    bare.load_state_dict(ours.state_dict())
    assert torch.equal(bare(ids), ours(prompts))
    embedder = TransformerEmbedder(32, 3, 12, max_seq_len=9)
    embedder.load_state_dict(ours.state_dict())
    assert torch.equal(embedder.encode(ids), ours(prompts)) and embedder.device.type == "cpu"


def test_prompts_that_are_too_long_are_said(vocabulary, caplog):
    tokenizer = BERTTokenizer(max_length=5, vocabulary=vocabulary)
    with caplog.at_level(logging.WARNING):
        got = tokenizer.encode(["a red", "a red circle, blue"])
    assert got[:2] == (None, None) and got[2][2].tolist() == [[2, 5, 6, 3, 0], [2, 5, 6, 7, 3]]
    assert [r.getMessage() for r in caplog.records if r.name.startswith("ldm")] == [
        "1 of 2 prompts are cut to 5 tokens"
    ]
    assert BERTTokenizer(vq_interface=False, max_length=5, vocabulary=vocabulary).encode("a").tolist() == [
        [2, 5, 3, 0, 0]
    ]
    assert tokenizer.decode("as it is") == "as it is"


def test_a_vocabulary_is_looked_for_when_it_is_needed(vocabulary, tmp_path, monkeypatch):
    model = BERTEmbedder(n_embed=32, n_layer=1)
    with pytest.raises(
        AbsentError, match="'bert-base-uncased': put its vocab.txt into model_data/bert-base-uncased/"
    ):
        model(["a red circle"])
    monkeypatch.setattr(modules, "shipped", lambda relative: tmp_path / relative)
    assert model(["a red circle"]).shape == (1, 77, 32)
    small = BERTEmbedder(n_embed=32, n_layer=1, vocab_size=9)
    with pytest.raises(MismatchError, match="vocab_size is 9, but 'bert-base-uncased' has 12 words"):
        small(["a"])
    for wrong, message in (
        (b"a\nred\n[PAD]", r"lacks BERT's marks \[CLS\], \[SEP\], \[UNK\]"),
        (b"", "lacks BERT's marks"),
        (b"\xff\xfe[PAD]", "holds no vocabulary of BERT"),
    ):
        (vocabulary / "vocab.txt").write_bytes(wrong)
        with pytest.raises(FormatError, match=message):
            BERTTokenizer(vocabulary=vocabulary)("a")
    for name in ("no/such", "a\0b", ""):
        with pytest.raises(AbsentError, match="no vocabulary of BERT"):
            BERTTokenizer(vocabulary=name)("a")


@torch.no_grad()
def test_openclip_is_clip_with_other_names():
    """transformers' CLIP with the same weights: the last layers, and all but the last block."""
    sizes = Sizes(width=32, layers=3, heads=2, embed_dim=20)
    for quick in (False, True):
        ours = fill(OpenCLIPText(sizes, quick_gelu=quick, vocabulary=50, context=7))
        config = CLIPTextConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=7,
            hidden_act="quick_gelu" if quick else "gelu",
            bos_token_id=48,
            eos_token_id=49,
            pad_token_id=0,
        )
        theirs = CLIPTextTransformer(config).eval()
        own, state = ours.state_dict(), {}
        state["embeddings.token_embedding.weight"] = own["token_embedding.weight"]
        state["embeddings.position_embedding.weight"] = own["positional_embedding"]
        names = {
            "attn.out_proj": "self_attn.out_proj",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }
        for i in range(3):
            block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for old, new in names.items():
                    state[f"{layer}.{new}.{kind}"] = own[f"{block}.{old}.{kind}"]
                for part, value in zip("qkv", own[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    state[f"{layer}.self_attn.{part}_proj.{kind}"] = value
        state |= {f"final_layer_norm.{kind}": own[f"ln_final.{kind}"] for kind in ("weight", "bias")}
        theirs.load_state_dict({f"text_model.{name}": value for name, value in state.items()})
        ids = torch.tensor([[48, 3, 9, 49, 0, 0, 0], [48, 7, 8, 20, 21, 22, 49]])
        hidden = theirs(ids, output_hidden_states=True)
        embedder = FrozenOpenCLIPEmbedder.__new__(FrozenOpenCLIPEmbedder)
        nn.Module.__init__(embedder)
        embedder.model = ours
        for layer_idx, want in (
            (0, hidden.last_hidden_state),
            (1, theirs.text_model.final_layer_norm(hidden.hidden_states[-2])),
        ):
            embedder.layer_idx = layer_idx
            close(embedder.encode_with_transformer(ids), want, atol=2e-5)


def test_openclips_keys_and_prompts(monkeypatch, caplog):
    with torch.device("meta"):
        model = FrozenOpenCLIPEmbedder(layer="penultimate")
    keys = model.state_dict()
    assert len(keys) == 24 * 12 + 6 and all(key.startswith("model.") for key in keys)
    # Stable Diffusion 2 keeps 23 blocks, 340,387,840 numbers; here are the last one, projection and scale, too.
    assert sum(value.numel() for value in keys.values()) == 340_387_840 + 12_596_224 + 1024**2 + 1
    assert keys["model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    assert keys["model.positional_embedding"].shape == (77, 1024)
    assert not any(value.requires_grad for value in model.parameters())
    assert model.model.attn_mask[1].tolist()[:4] == [0, 0, -torch.inf, -torch.inf]
    seen = []
    monkeypatch.setattr(FrozenOpenCLIPEmbedder, "device", torch.device("cpu"))
    monkeypatch.setattr(model, "encode_with_transformer", seen.append)
    with caplog.at_level(logging.WARNING):
        model.encode(["a photo of a cat", "cat " * 80])
    assert seen[0].shape == (2, 77) and seen[0][0, :9].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
        0,
        0,
    ]
    assert seen[0][0, 7:].sum() == 0 and seen[0][1, -2:].tolist() == [2368, 49407]
    assert "longer than 75 tokens, dropped: cat cat cat cat cat" in caplog.text


@torch.no_grad()
def test_a_small_openclip_encodes_and_trains(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", Sizes(32, 2, 2, 16))
    model = fill(FrozenOpenCLIPEmbedder("tiny"))
    one = model(["a red circle", "a blue star"])
    assert one.shape == (2, 77, 32) and model.device.type == "cpu"
    model.model.transformer.grad_checkpointing = True
    model.requires_grad_(True)
    with torch.enable_grad():
        two = model(["a red circle", "a blue star"])
        two.square().mean().backward()
    close(two.detach(), one)
    assert model.model.transformer.resblocks[0].mlp.c_fc.weight.grad.abs().max() > 0
    state = {**model.state_dict(), "model.attn_mask": torch.zeros(77, 77)}
    assert model.load_state_dict(state).unexpected_keys == []


def test_names_of_openclip(monkeypatch):
    assert sizes_of("ViT-H-14") == (1024, 24, 16, 1024) and sizes_of("ViT-L-14-quickgelu") == (
        768,
        12,
        12,
        768,
    )
    for arch in ("ViT-X", "", "RN50"):
        with pytest.raises(
            UsageError, match=f"text encoder '{arch}' is unknown; there are ViT-B-32, .*open_clip_torch"
        ):
            sizes_of(arch)
    with pytest.raises(UsageError, match="no layer 'pooled'; choose last or penultimate"):
        FrozenOpenCLIPEmbedder(layer="pooled")
    package = types.ModuleType("open_clip")
    package.get_model_config = {
        "ViT-X": {"embed_dim": 9, "text_cfg": {"width": 6, "layers": 5, "heads": 3}},
        "roberta": {"embed_dim": 9, "text_cfg": {"hf_model_name": "roberta-base"}},
    }.get
    monkeypatch.setitem(sys.modules, "open_clip", package)
    assert sizes_of("ViT-X") == (6, 5, 3, 9)
    for arch in ("roberta", "ViT-Y"):
        with pytest.raises(UsageError, match="is unknown"):
            sizes_of(arch)


class Points(nn.Module):
    """What the package `clip` loads, as far as its users see."""

    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Embedding(50, 6), nn.Linear(3, 6)

    def encode_text(self, tokens):
        return self.text(tokens).sum(dim=1)

    def encode_image(self, x):
        return self.vision(x.mean(dim=(2, 3)))


@pytest.fixture
def clip_package(monkeypatch, tmp_path):
    """The package `clip` by its published signatures, and a home with a file of weights."""
    package = types.ModuleType("clip")
    package.loaded = []

    def load(name, device="cpu", jit=False):
        package.loaded.append(name)
        return fill(Points()), None

    package.load = load
    package.tokenize = lambda texts: torch.tensor(
        [[len(text), 1] for text in ([texts] if isinstance(texts, str) else texts)]
    )
    monkeypatch.setitem(sys.modules, "clip", package)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache/clip").mkdir(parents=True)
    (tmp_path / ".cache/clip/ViT-L-14.pt").write_bytes(b"weights")
    return package


@torch.no_grad()
def test_whole_texts_as_points(clip_package, tmp_path):
    model = FrozenCLIPTextEmbedder("ViT-L/14", n_repeat=3)
    assert clip_package.loaded == [str(tmp_path / ".cache/clip/ViT-L-14.pt")]
    prompts = ["a red circle", "blue"]
    raw = model.model.encode_text(clip_package.tokenize(prompts))
    close(model(prompts), raw / raw.square().sum(dim=1, keepdim=True).sqrt())
    close(model.encode(prompts), model(prompts)[:, None].repeat(1, 3, 1))
    assert torch.equal(FrozenCLIPTextEmbedder(normalize=False)(prompts), raw)
    model.freeze()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert next(iter(model.state_dict())).startswith("model.")


@torch.no_grad()
def test_pictures_as_points(clip_package, tmp_path):
    own = tmp_path / "own.pt"
    own.write_bytes(b"weights")
    model = FrozenClipImageEmbedder(model=str(own))
    assert clip_package.loaded == [str(own)]
    x = torch.linspace(-1, 1, 3)[None, :, None, None].expand(2, 3, 20, 30)
    plain = torch.tensor(
        [(c - m) / s for c, m, s in zip((0.0, 0.5, 1.0), model.MEAN, model.STD, strict=True)]
    )
    got = model.preprocess(x)
    assert got.shape == (2, 3, 224, 224)
    close(got, plain[None, :, None, None].expand_as(got))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.MEAN, model.STD))
    noise = keyed_input("picture", (2, 3, 20, 30))
    ends = model.preprocess(noise)[:, :, ::223, ::223]  # corners are aligned, so corners stay what they are
    close(ends, ((noise[:, :, ::19, ::29] + 1) / 2 - mean) / std)
    large = keyed_input("picture", (2, 3, 224, 224))
    close(model.preprocess(large), ((large + 1) / 2 - mean) / std)
    close(model(x), model.model.encode_image(got))
    assert set(model.state_dict()) == {"model.text.weight", "model.vision.weight", "model.vision.bias"}
    assert FrozenClipImageEmbedder(str(own), antialias=True).preprocess(noise[:1]).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("make", [FrozenCLIPTextEmbedder, FrozenClipImageEmbedder])
def test_what_is_not_there_is_one_line(make, clip_package, monkeypatch, tmp_path):
    with pytest.raises(
        AbsentError, match="no weights of CLIP 'ViT-B/32': put them into '.*/.cache/clip/ViT-B-32.pt'"
    ):
        make("ViT-B/32")
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(
        AbsentError, match="need OpenAI's package `clip`: pip install clip-anytorch"
    ) as caught:
        make("ViT-L/14")
    assert caught.value.exit_code == 9
