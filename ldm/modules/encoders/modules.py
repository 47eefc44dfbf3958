"""Conditioning: CLIP's text encoder, and CompVis's small encoders for classes and images."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError
from ldm.modules.encoders.tokenizer import WORD_END, find_tokenizer
from ldm.paths import shipped
from ldm.util import leaves_others_to_subclasses

logger = logging.getLogger(__name__)

# The text half of openai/clip-vit-large-patch14: 123,060,480 parameters. It pads with its end mark.
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_FIELDS = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
_CONFIG_FIELDS = (*CLIP_L_FIELDS, "attention_dropout", "initializer_range", "initializer_factor")
_OTHER_KEYS = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
_ACTIVATIONS = ("quick_gelu", "gelu")  # OpenAI's encoders, and those that OpenCLIP trained
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
        n_classes: numbers run from 0 to n_classes - 1.
        key: entry of the batch that holds them.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Embed batch[key], (b,) class numbers, as (b, 1, embed_dim)."""
        labels = batch[self.key if key is None else key]
        return self.embedding(labels[:, None])


class SpatialRescaler(nn.Module):
    """Resize an image condition n_stages times, and map its channels if asked.

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


class FrozenCLIPEmbedder(AbstractEncoder):
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

        found = _find_version(version)
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
            transformer.load_state_dict(_read_weights(weights, transformer), assign=True)
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
        """Put the transformer into evaluation mode and ask for no gradients."""
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

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Turn prompts into token numbers (b, max_length): start mark, words, end mark, padding.

        A prompt that is too long is cut before its end mark, and a logged warning names what was dropped.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts:
            raise UsageError(f"prompts must be a string or a list of strings, got {text!r:.80}")
        encoding = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_length,
            return_length=True,
            return_overflowing_tokens=False,
            padding="max_length",
            return_tensors="pt",
        )
        full = encoding["attention_mask"].bool().all(dim=1).tolist()  # only such a prompt can be too long
        for prompt in dict.fromkeys(prompt for prompt, is_full in zip(texts, full, strict=True) if is_full):
            if dropped := self.dropped_words(prompt):
                named = " ".join(dropped[:_NAMED_WORDS])
                more = f" and {len(dropped) - _NAMED_WORDS} more" if len(dropped) > _NAMED_WORDS else ""
                logger.warning(
                    "a prompt is longer than %d tokens, dropped: %s%s", self.max_length - 2, named, more
                )
        return encoding["input_ids"]

    def dropped_words(self, text: str) -> list[str]:
        """List the words of a prompt that do not fit whole into max_length, as the tokenizer reads them."""
        ids = self.tokenizer(text, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.max_length - 2
        if len(ids) <= start:
            return []
        tokens = self.tokenizer.convert_ids_to_tokens(ids[: start + 1])
        marks = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        while start > 0 and not tokens[start - 1].endswith((WORD_END, *marks)):
            start -= 1  # the cut is inside a word: what is left of it means something else
        return self.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False).split()


class _Version(NamedTuple):
    """What a `version` stands for: CLIPTextConfig's fields, where its weights would be and its tokenizer."""

    fields: dict[str, Any]
    weights: Path | None
    beside: tuple[Path, ...]


def _find_version(version: str | Path) -> _Version:
    if not str(version):
        raise UsageError("FrozenCLIPEmbedder needs a version, got an empty string")
    folder = Path(version)
    if not os.path.isdir(folder):
        if version == CLIP_L:
            return _Version(CLIP_L_FIELDS, _in_hub_cache(CLIP_L, "model.safetensors"), ())
        folder = _shipped_or_cached(str(version))
    # A diffusers folder has its tokenizer beside text_encoder/.
    beside = (folder, folder.parent) if folder.name == "text_encoder" else (folder,)
    return _Version(_read_config(folder / "config.json"), folder / "model.safetensors", beside)


def _shipped_or_cached(version: str) -> Path:
    try:
        return shipped(version)
    except OSError:  # absent, or no possible path
        config = _in_hub_cache(version, "config.json")
    if config is None:
        raise AbsentError(
            f"no text encoder '{version}': give '{CLIP_L}', or a folder with config.json, vocab.json and merges.txt"
        )
    return config.parent


def _in_hub_cache(name: str, file: str) -> Path | None:
    """Find a file of a hub repository in the local cache; the network is never asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, file)
    except HFValidationError:  # a path, not a name
        return None
    return Path(path) if isinstance(path, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AbsentError(
            f"no '{path}': a text encoder's folder needs config.json with the fields of CLIPTextConfig"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"'{path}' should hold JSON: {error}") from error
    if isinstance(config, dict):
        config = (
            config.get("text_config") or config
        )  # the file of a whole CLIP has an entry for the text half
    if not isinstance(config, dict):
        raise FormatError(f"'{path}' should hold a JSON object, the fields of CLIPTextConfig")
    fields = {name: config[name] for name in _CONFIG_FIELDS if name in config}
    if "hidden_size" not in fields and config.get("model_type") not in ("clip_text_model", "clip"):
        raise FormatError(f"'{path}' is not the configuration of a CLIP text encoder: it has no hidden_size")
    for name, value in fields.items():
        if name == "hidden_act":
            fits = value in _ACTIVATIONS
        else:
            fits = isinstance(value, (type(CLIP_L_FIELDS.get(name, 0.0)), int)) and value >= 0
        if not fits or (name.endswith("_size") and not value):
            raise FormatError(f"'{path}' describes no text encoder: {name} is {value!r}")
    width, heads = fields.get("hidden_size", 512), fields.get("num_attention_heads", 8)  # transformers' own
    if not heads or width % heads:
        raise FormatError(f"'{path}' describes no text encoder: hidden_size {width} over {heads} heads")
    return fields


def _read_weights(path: Path, transformer: CLIPTextTransformer) -> dict[str, Tensor]:
    """Read the text encoder's tensors from a safetensors file, each of them accounted for.

    Keys may begin with `text_model.` (transformers 4 and v1 checkpoints) or not (transformers 5.6 and later).
    The other half of a whole CLIP, the projections and the constant position_ids are left in the file.

    Raises:
        FormatError: not a safetensors file.
        MismatchError: a tensor is missing, unknown or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    wanted = transformer.state_dict()
    found, unknown, ignored = {}, [], []
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                name = "text_model." + key.removeprefix("text_model.")
                if name in wanted:
                    found[name] = file.get_tensor(key).to(wanted[name].dtype)
                elif key.startswith(_OTHER_KEYS) or name == "text_model.embeddings.position_ids":
                    ignored.append(key)
                else:
                    unknown.append(key)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"'{path}' cannot be read as safetensors: {error}") from error
    missing = sorted(wanted.keys() - found.keys())
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != wanted[name].shape
    ]
    wrong = [
        f"{kind} {len(names)} tensors ({', '.join(names[:3])})"
        for kind, names in (("lacks", missing), ("has unknown", unknown), ("has misshapen", misshapen))
        if names
    ]
    if wrong:
        raise MismatchError(f"'{path}' does not fit its config.json: it {', '.join(wrong)}")
    logger.info("text encoder: %d tensors of %s, %d others ignored", len(found), path, len(ignored))
    return found
