"""From the name of a CLIP text encoder to its configuration, weights and folder: on this machine, never downloaded."""

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.errors import AbsentError, FormatError, MismatchError, UsageError, refuse_elsewhere
from ldm.paths import shipped

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
_MOST_LAYERS, _MOST = 128, 1 << 20  # of layers, and of anything else that is counted


class Version(NamedTuple):
    """What a `version` stands for: CLIPTextConfig's fields, where its weights would be and its tokenizer."""

    fields: dict[str, Any]
    weights: Path | None
    beside: tuple[Path, ...]


def find_version(version: str | Path) -> Version:
    if not str(version):
        raise UsageError("FrozenCLIPEmbedder needs a version, got an empty string")
    folder = Path(version)
    if not os.path.isdir(folder):
        if version == CLIP_L:
            return Version(CLIP_L_FIELDS, in_hub_cache(CLIP_L, "model.safetensors"), ())
        refuse_elsewhere("text encoder", version, hub=False)
        folder = _shipped_or_cached(str(version))
    # A diffusers folder has its tokenizer beside text_encoder/.
    beside = (folder, folder.parent) if folder.name == "text_encoder" else (folder,)
    return Version(_read_config(folder / "config.json"), folder / "model.safetensors", beside)


def _shipped_or_cached(version: str) -> Path:
    try:
        return shipped(version)
    except OSError:  # absent, or no possible path
        config = in_hub_cache(version, "config.json")
    if config is None:
        raise AbsentError(
            f"no text encoder '{version}': give '{CLIP_L}', or a folder with config.json, vocab.json and merges.txt"
        )
    return config.parent


def in_hub_cache(name: str, file: str) -> Path | None:
    """Find a file of a hub repository in the local cache, without the network."""
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
            kinds = (type(CLIP_L_FIELDS.get(name, 0.0)), int)
            most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
            fits = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= most
        if not fits or (name.endswith(("_size", "_positions", "_embeddings")) and not value):
            raise FormatError(f"'{path}' describes no text encoder: {name} is {value!r:.60}")
    width, heads = fields.get("hidden_size", 512), fields.get("num_attention_heads", 8)  # transformers' own
    if not heads or width % heads:
        raise FormatError(f"'{path}' describes no text encoder: hidden_size {width} over {heads} heads")
    return fields


def read_weights(path: Path, transformer: nn.Module) -> dict[str, Tensor]:
    """Read the text encoder's tensors from a safetensors file; none may be missing or unknown.

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
