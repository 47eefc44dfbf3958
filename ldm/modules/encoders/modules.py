"""Conditioning: CLIP's and BERT's text encoders, and CompVis's small encoders for classes and images."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.helpers import leaves_others_to_subclasses
from ldm.modules.encoders.clip_folder import (
    CLIP_L,
    CLIP_L_FIELDS,  # noqa: F401  (where it was, for who imports it from here)
    find_version,
    in_hub_cache,
    read_weights,
)
from ldm.modules.encoders.extra_tokens import ExtraTokens
from ldm.modules.encoders.open_clip_text import CONTEXT, OpenCLIPText, sizes_of
from ldm.modules.encoders.tokenizer import WORD_END, find_tokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.paths import shipped
from ldm.values import SHARE, check_value

logger = logging.getLogger(__name__)

_NAMED_WORDS = 20  # dropped words spelt out in a warning; the rest are counted


class AbstractEncoder(nn.Module):
    """Base of everything that turns a batch's condition into features."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define encode")


class IdentityEncoder(AbstractEncoder):
    """Hands the condition on as it is."""

    def encode(self, x: Any) -> Any:
        return x


class ClassEmbedder(nn.Module):
    """Embed class numbers as a context of one token.

    Args:
        embed_dim: features of the token.
        n_classes: numbers run from 0 to n_classes - 1. For classifier-free guidance the last stands for "no class".
        key: entry of the batch that holds them.
        ucg_rate: share of the labels that training replaces by the last class. CompVis's later code has 0.1 here, and
            replaces while sampling, too; 0 is its first code, which leaves every class to be learned.

    Raises:
        UsageError: a ucg_rate outside 0..1.
    """

    def __init__(
        self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = check_value(ucg_rate, float, "ucg_rate", SHARE)
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(
        self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False
    ) -> Tensor:
        """Embed batch[key], (b,) class numbers, as (b, 1, embed_dim)."""
        labels = batch[self.key if key is None else key][:, None]
        if self.ucg_rate > 0 and self.training and not disable_dropout:
            dropped = torch.rand(labels.shape, device=labels.device) < self.ucg_rate
            labels = labels.masked_fill(dropped, self.n_classes - 1)
        return self.embedding(labels)

    def get_unconditional_conditioning(
        self, bs: int, device: str | torch.device | None = None
    ) -> dict[str, Tensor]:
        """Make a batch of bs times the last class, for `forward`; by default where the weights are."""
        device = self.embedding.weight.device if device is None else device
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device)}


class SpatialRescaler(nn.Module):
    """Resize an image condition n_stages times, and map its channels where out_channels is set.

    Args:
        n_stages: how often to resize; 0 leaves the size.
        method: a mode of torch.nn.functional.interpolate.
        multiplier: factor of each resizing.
        in_channels, out_channels, bias: of the 1 x 1 convolution; none when out_channels is None.
    """

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise UsageError(f"SpatialRescaler needs n_stages >= 0, got {n_stages}")
        if method not in self.METHODS:
            raise UsageError(
                f"SpatialRescaler has no method {method!r}; choose one of {', '.join(self.METHODS)}"
            )
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.remap_output = out_channels is not None
        if self.remap_output:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


class CLIPTextTransformer(nn.Module):
    """transformers' CLIPTextModel with the key names of v1 checkpoints, `text_model.*`, whatever its version.

    transformers 5.6 dropped that prefix from the state dict and the attribute; here both stay. A call takes
    what CLIPTextModel takes and returns its output: last_hidden_state (normed), hidden_states (raw), and
    pooler_output (the normed state at the first end mark).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import CLIPTextModel

        self.config = config
        model = CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)
        # Where the two differ, 5.0 to 5.4 collect hidden states only in the outer one, so that is what runs.
        # In a tuple it is no submodule, and its parameters are registered once.
        self._model = (model,)
        self.register_load_state_dict_pre_hook(_drop_position_ids)
        embeddings = self.text_model.embeddings
        if embeddings.position_ids.is_meta:
            # A constant that no checkpoint needs to hold: without this, loading would leave it on meta.
            positions = torch.arange(self.config.max_position_embeddings, device="cpu")[None]
            embeddings.register_buffer("position_ids", positions, persistent=False)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return self._model[0](input_ids=input_ids, **kwargs)


def _drop_position_ids(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Drop the one key of old files that is a constant: transformers saved it until 4.30."""
    state_dict.pop(prefix + "text_model.embeddings.position_ids", None)


class _ReadsPrompts:
    """How an encoder with CLIP's tokenizer turns prompts into token numbers.

    Attributes:
        extra_tokens: a slot (ldm.modules.seams): an ExtraTokens, whose numbers follow the vocabulary's; None = none.
    """

    tokenizer: Any
    max_length: int
    extra_tokens: ExtraTokens | None = None

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Turn prompts into token numbers (b, max_length): start mark, words, end mark, padding.

        A prompt that is too long is cut before its end mark, and a logged warning names what was dropped.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts:
            raise UsageError(f"prompts must be a string or a list of strings, got {text!r:.80}")
        if self.extra_tokens is None:
            encoding = self.tokenizer(
                list(texts),
                truncation=True,
                max_length=self.max_length,
                return_length=True,
                return_overflowing_tokens=False,
                padding="max_length",
                return_tensors="pt",
            )
            ids = encoding["input_ids"]
            full = encoding["attention_mask"].bool().all(dim=1).tolist()  # only such a prompt can be too long
        else:
            rows = [self.word_ids(one) for one in texts]
            ids = torch.tensor([self._with_marks(row) for row in rows])
            full = [len(row) > self.max_length - 2 for row in rows]
        for prompt in dict.fromkeys(prompt for prompt, is_full in zip(texts, full, strict=True) if is_full):
            if dropped := self.dropped_words(prompt):
                named = " ".join(dropped[:_NAMED_WORDS])
                more = f" and {len(dropped) - _NAMED_WORDS} more" if len(dropped) > _NAMED_WORDS else ""
                logger.warning(
                    "a prompt is longer than %d tokens, dropped: %s%s", self.max_length - 2, named, more
                )
        return ids

    def word_ids(self, text: str) -> list[int]:
        """Turn a prompt into the token numbers of its words, without marks and however many."""
        if self.extra_tokens is not None:
            text = self.extra_tokens.apart(text)
        ids = self.tokenizer(text, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if self.extra_tokens is None else self.extra_tokens.replace(ids)

    def _with_marks(self, ids: list[int]) -> list[int]:
        most, tokenizer = self.max_length - 2, self.tokenizer
        padding = [tokenizer.pad_token_id] * (most - len(ids))
        return [tokenizer.bos_token_id, *ids[:most], tokenizer.eos_token_id, *padding]

    def dropped_words(self, text: str) -> list[str]:
        """List the words of a prompt that do not fit whole into max_length, as the tokenizer reads them."""
        ids = self.word_ids(text)
        start = self.max_length - 2
        if len(ids) <= start:
            return []
        extra = (lambda number: None) if self.extra_tokens is None else self.extra_tokens.name_of
        if extra(ids[start]) is not None:
            while start > 0 and extra(ids[start - 1]) == extra(ids[start]):
                start -= 1  # the cut is inside an embedding
        else:
            while start > 0 and not self._ends_word(ids[start - 1]):
                start -= 1  # the cut is inside a word: what is left of it means something else
        words: list[str] = []
        for name, run in itertools.groupby(ids[start:], extra):
            decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
            words += decode(list(run)).split() if name is None else [name]
        return words

    def _ends_word(self, number: int) -> bool:
        if self.extra_tokens is not None and self.extra_tokens.name_of(number) is not None:
            return True
        marks = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        return self.tokenizer.convert_ids_to_tokens([number])[0].endswith((WORD_END, *marks))


class FrozenCLIPEmbedder(_ReadsPrompts, AbstractEncoder):
    """CLIP's text encoder with its tokenizer: prompts to context (b, max_length, d).

    Weights are those of `<version>/model.safetensors`, or of openai/clip-vit-large-patch14 if the local
    Hugging Face cache has it; otherwise they are random until a checkpoint is loaded. Nothing is downloaded.
    Built under torch.device("meta"), no weights are looked for.

    Args:
        version: "openai/clip-vit-large-patch14" (configuration built in), or a folder with config.json (the
            fields of CLIPTextConfig), vocab.json and merges.txt: absolute, relative to the working directory,
            one that ships with ldm ("model_data/shapes/text"), or a hub name in the local cache.
        device: where to put it; None leaves it on the default device.
        max_length: tokens of a prompt, the two marks included. Longer prompts are cut, with a warning.
        freeze: evaluation mode and no gradients.
        layer: "last" (final norm applied), "pooled" (the normed state of the end mark, (b, 1, d)), or "hidden"
            (the states before layer `layer_idx`, not normed).
        layer_idx: for "hidden": 0 = the embeddings, up to the number of layers; negative counts from the end.
        tokenizer: where the tokenizer is, if not in the folder or inside ldm (see `find_tokenizer`).

    Raises:
        UsageError: layer, layer_idx or max_length out of range.
        AbsentError: unknown version, or no tokenizer.
        FormatError, MismatchError: the folder's files are broken or do not fit together.
    """

    LAYERS = ("last", "pooled", "hidden")
    loaded: frozenset[str] = frozenset()  # names of the tensors that were read while it was built

    @leaves_others_to_subclasses
    def __init__(
        self,
        version: str | Path = CLIP_L,
        device: str | torch.device | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: Literal["last", "pooled", "hidden"] = "last",
        layer_idx: int | None = None,
        *,
        tokenizer: str | Path | None = None,
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig

        found = find_version(version)
        config = CLIPTextConfig(**found.fields)
        self._check_options(config, version, max_length, layer, layer_idx)
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = layer_idx
        self.tokenizer = find_tokenizer(
            tokenizer, beside=found.beside, vocab_size=config.vocab_size, max_length=max_length
        )
        if torch.empty(0).is_meta:
            self.transformer = CLIPTextTransformer(config)
        else:
            self.transformer = self._build_transformer(config, version, found.weights)
            if found.weights is not None and found.weights.is_file():
                self.loaded = frozenset(self.transformer.state_dict())
            self.to(device)
        if freeze:
            self.freeze()

    def _check_options(
        self, config: Any, version: str | Path, max_length: int, layer: str, layer_idx: int | None
    ) -> None:
        positions, layers = config.max_position_embeddings, config.num_hidden_layers
        if not 3 <= max_length <= positions:
            raise UsageError(f"'{version}' takes max_length 3 to {positions}, got {max_length}")
        if layer not in self.LAYERS:
            raise UsageError(
                f"FrozenCLIPEmbedder has no layer {layer!r}; choose one of {', '.join(self.LAYERS)}"
            )
        if layer == "hidden" and (layer_idx is None or abs(layer_idx) > layers):
            raise UsageError(f"layer='hidden' of '{version}' needs layer_idx 0 to {layers}, got {layer_idx}")

    @staticmethod
    def _build_transformer(config: Any, version: str | Path, weights: Path | None) -> CLIPTextTransformer:
        if weights is not None and weights.is_file():
            device = torch.empty(0).device
            with torch.device("meta"):  # no time for random weights that are about to be replaced
                transformer = CLIPTextTransformer(config)
            transformer.load_state_dict(read_weights(weights, transformer), assign=True)
            return transformer.to(device)
        if weights is None:
            logger.warning(
                "'%s' is not in the local Hugging Face cache: its weights are random until a checkpoint is loaded",
                version,
            )
        elif weights.with_name("pytorch_model.bin").is_file():
            raise AbsentError(
                f"'{weights.parent}' has pytorch_model.bin but no model.safetensors; convert it first"
            )
        return CLIPTextTransformer(config)

    def freeze(self) -> None:
        """Put the transformer into evaluation mode, without gradients."""
        self.transformer = self.transformer.eval()
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; setting it moves them (forks of CompVis's scripts assign it)."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.to(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts: (b, max_length, d), or (b, 1, d) for the pooled layer."""
        ids = self.tokenize(text).to(self.device)  # (b, n)
        outputs = self.transformer(input_ids=ids, output_hidden_states=self.layer == "hidden")
        if self.layer == "last":
            return outputs.last_hidden_state
        if self.layer == "pooled":
            return outputs.pooler_output[:, None, :]
        return outputs.hidden_states[self.layer_idx]

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts; LatentDiffusion calls this name, and cldm replaces `forward` beneath it."""
        return self(text)


class _OnWeights(AbstractEncoder):
    """An encoder whose device is where its weights are; setting it moves them."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        self.to(device)

    def freeze(self) -> None:
        """Put the encoder into evaluation mode, without gradients."""
        self.eval().requires_grad_(False)


class TransformerEmbedder(_OnWeights):
    """Token numbers to context by a transformer: (b, n) to (b, n, n_embed).

    Args:
        n_embed, n_layer: features and layers.
        vocab_size: numbers run from 0 to vocab_size - 1.
        max_seq_len: the most tokens of a sequence.
        device: where to put it; None leaves it on the default device.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | torch.device | None = None,
        *,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=max_seq_len,
            attn_layers=Encoder(dim=n_embed, depth=n_layer),
            emb_dropout=embedding_dropout,
        )
        if not torch.empty(0).is_meta:
            self.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.device), return_embeddings=True)

    def encode(self, x: Tensor) -> Tensor:
        return self(x)


class BERTTokenizer(AbstractEncoder):
    """Prompts to the token numbers of BERT's vocabulary: start mark, words, end mark, padding.

    The vocabulary is looked for when it is first needed, so that a model can be built and loaded without it.

    Args:
        device: where the numbers go; None is the CPU.
        vq_interface: `encode` gives them as a first stage would: (None, None, [None, None, numbers]).
        max_length: tokens of a prompt, the two marks included. Longer prompts are cut, with a warning.
        vocabulary: a folder with vocab.txt, one below model_data/, or a hub name in the local cache.

    Raises:
        AbsentError: (by a call) no such vocabulary; nothing is downloaded.
        FormatError: (by a call) a vocabulary without BERT's marks.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        vq_interface: bool = True,
        max_length: int = 77,
        *,
        vocabulary: str | Path = "bert-base-uncased",
    ) -> None:
        super().__init__()
        self.device, self.vq_interface, self.max_length = device, vq_interface, max_length
        self.vocabulary = vocabulary
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, read once."""
        if self._tokenizer is None:
            self._tokenizer = _read_bert_vocabulary(self.vocabulary)
        return self._tokenizer

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Turn prompts into token numbers (b, max_length)."""
        texts = [text] if isinstance(text, str) else list(text)
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        if too_long := sum(length > self.max_length for length in lengths):
            logger.warning("%d of %d prompts are cut to %d tokens", too_long, len(texts), self.max_length)
        options = {"truncation": True, "max_length": self.max_length, "padding": "max_length"}
        return self.tokenizer(texts, return_tensors="pt", **options)["input_ids"].to(self.device)

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Any:
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text: Any) -> Any:
        return text


class BERTEmbedder(TransformerEmbedder):
    """Prompts to context by BERT's vocabulary and a transformer that is trained along: latent-diffusion's txt2img.

    Args:
        n_embed, n_layer: features and layers.
        vocab_size: rows of the token embedding.
        max_seq_len: tokens of a prompt.
        device: where to put it; None leaves it on the default device.
        use_tokenizer: False takes token numbers (b, n) instead of prompts.
        embedding_dropout: on the embedded tokens.
        vocabulary: see BERTTokenizer.

    Raises:
        MismatchError: (by a call) the vocabulary has more words than vocab_size.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | torch.device | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        *,
        vocabulary: str | Path = "bert-base-uncased",
    ) -> None:
        super().__init__(
            n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout=embedding_dropout
        )
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, vocabulary=vocabulary)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Encode prompts, (b, max_seq_len, n_embed), or token numbers (b, n)."""
        if not self.use_tknz_fn:
            return super().forward(text)
        rows, words = self.transformer.num_tokens, len(self.tknz_fn.tokenizer)
        if words > rows:
            raise MismatchError(f"vocab_size is {rows}, but '{self.tknz_fn.vocabulary}' has {words} words")
        return super().forward(self.tknz_fn(text))


def _read_bert_vocabulary(name: str | Path) -> Any:
    from transformers import BertTokenizerFast

    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = shipped(f"model_data/{name}")
        except OSError:  # absent, or no possible path
            found = in_hub_cache(str(name), "vocab.txt")
            folder = None if found is None else found.parent
    if folder is None or not (folder / "vocab.txt").is_file():
        raise AbsentError(
            f"no vocabulary of BERT '{name}': put its vocab.txt into model_data/{Path(name).name}/, or give its "
            "folder as vocabulary; nothing is downloaded"
        )
    words = folder / "vocab.txt"
    try:
        # transformers would add marks that are not there, under numbers of its own.
        lacking = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - set(words.read_text(encoding="utf-8").splitlines())
        if lacking:
            raise FormatError(f"'{words}' lacks BERT's marks {', '.join(sorted(lacking))}")
        return BertTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"'{folder}' holds no vocabulary of BERT: {str(error):.200}") from error


class FrozenOpenCLIPEmbedder(_ReadsPrompts, _OnWeights):
    """OpenCLIP's text encoder with CLIP's tokenizer: prompts to context (b, 77, d), as Stable Diffusion 2 has it.

    Its weights are random until a checkpoint is loaded; nothing is downloaded.

    Args:
        arch: OpenCLIP's name of the model.
        version: of its weights; only "openai" matters, for its activation.
        device: where to put it; None leaves it on the default device.
        max_length: 77; kept for its callers.
        freeze: evaluation mode and no gradients.
        layer: "last", or "penultimate", which leaves the last block out; both are normed.

    Raises:
        UsageError: an unknown arch or layer.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | torch.device | None = None,
        max_length: int = CONTEXT,
        freeze: bool = True,
        layer: Literal["last", "penultimate"] = "last",
    ) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise UsageError(
                f"FrozenOpenCLIPEmbedder has no layer {layer!r}; choose {' or '.join(self.LAYERS)}"
            )
        quick = version == "openai" or arch.endswith("-quickgelu")
        self.model = OpenCLIPText(sizes_of(arch), quick_gelu=quick)
        self.tokenizer = find_tokenizer(max_length=CONTEXT)
        self.max_length = CONTEXT
        self.layer, self.layer_idx = layer, self.LAYERS.index(layer)
        if not torch.empty(0).is_meta:
            logger.warning("the weights of '%s' are random until a checkpoint is loaded", arch)
            self.to(device)
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts: (b, 77, d)."""
        ids = self.tokenize(text)
        is_end = ids == self.tokenizer.eos_token_id
        # OpenCLIP pads with 0 where CLIP's own tokenizer repeats the end mark.
        ids = ids.masked_fill(is_end & (is_end.cumsum(dim=1) > 1), 0)
        return self.encode_with_transformer(ids.to(self.device))

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Encode token numbers (b, 77)."""
        x = self.model.token_embedding(text) + self.model.positional_embedding
        x = self.text_transformer_forward(x.transpose(0, 1), attn_mask=self.model.attn_mask)  # (n, b, d)
        return self.model.ln_final(x.transpose(0, 1))

    def text_transformer_forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run the blocks that `layer` needs over x (n, b, d)."""
        return self.model.transformer(x, attn_mask=attn_mask, leave_out=self.layer_idx)

    def encode(self, text: str | Sequence[str]) -> Tensor:
        return self(text)


class FrozenCLIPTextEmbedder(_OnWeights):
    """A whole prompt as one point of the space that CLIP's texts and pictures share: (b, n_repeat, d).

    Needs OpenAI's package `clip`, and its weights on this machine.

    Args:
        version: a name of the package ("ViT-L/14"), whose file is in ~/.cache/clip, or a file.
        device: where to put it; None leaves it on the CPU.
        max_length: 77; kept for its callers.
        n_repeat: how often `encode` repeats the point.
        normalize: to length 1.

    Raises:
        AbsentError: the package or the weights are not there; nothing is downloaded.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | torch.device | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.model = _load_clip(version)
        self.max_length, self.n_repeat, self.normalize = max_length, n_repeat, normalize
        self.to(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts: (b, d)."""
        import clip

        z = self.model.encode_text(clip.tokenize(text).to(self.device))
        return F.normalize(z, dim=1) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Encode prompts: (b, n_repeat, d)."""
        return self(text)[:, None].expand(-1, self.n_repeat, -1)


class FrozenClipImageEmbedder(_OnWeights):
    """Pictures (b, 3, h, w) in [-1, 1] as points of CLIP's space: (b, d). Needs what FrozenCLIPTextEmbedder needs.

    Args:
        model: as FrozenCLIPTextEmbedder's version.
        jit: without effect.
        device: where to put it; None leaves it on the CPU.
        antialias: smooth before shrinking to 224 pixels a side, by torch's filter.
    """

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self,
        model: str,
        jit: bool = False,
        device: str | torch.device | None = None,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.model = _load_clip(model)
        self.antialias = antialias
        for name, values in (("mean", self.MEAN), ("std", self.STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.to(device)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize to 224 pixels a side, and to the spread that CLIP was trained on."""
        options = {"mode": "bicubic", "align_corners": True, "antialias": self.antialias}
        x = (F.interpolate(x, (224, 224), **options) + 1.0) / 2.0
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(x))


def _load_clip(version: str) -> nn.Module:
    """Load a model of OpenAI's package `clip` from this machine."""
    try:
        import clip
    except ImportError as error:
        raise AbsentError(
            "CLIP's embeddings of whole texts and pictures need OpenAI's package `clip`: pip install clip-anytorch"
        ) from error
    cached = Path.home() / ".cache" / "clip" / f"{version.replace('/', '-')}.pt"
    path = Path(version) if Path(version).is_file() else cached
    if not path.is_file():
        raise AbsentError(f"no weights of CLIP '{version}': put them into '{cached}'; nothing is downloaded")
    return clip.load(str(path), device="cpu", jit=False)[0]
