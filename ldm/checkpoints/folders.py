"""diffusers folders: their JSON files become a CompVis configuration, their weight files one source of tensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.files import Weights, open_weights
from ldm.checkpoints.report import TensorInfo
from ldm.errors import AbsentError, FormatError, MismatchError, UnsafeFileError, escaped

MAX_JSON = 16 << 20
MAX_SIZE = 1 << 16  # of any width, count or number of steps
MAX_LEVELS = 16  # and blocks at each of them
GROUPS = 32  # of every GroupNorm
DEFAULT_SCALING = 0.18215  # of Stable Diffusion v1; old folders do not state it
PIPELINES = ("StableDiffusion", "LatentDiffusion")  # beginnings of class names that are v1's
FOREIGN_PIPELINES = {"StableDiffusionXL": "Stable Diffusion XL", "StableDiffusion3": "Stable Diffusion 3"}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
OLD_TEXT_STEM = "pytorch_model"  # what transformers calls its .bin files
# diffusers' words for schedules and predictions -> CompVis's. "linear" is CompVis's word for linear in sqrt(beta).
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What CompVis's UNet and VAE have built in; a folder that asks for something else cannot be built.
UNET_FIXED = {
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "class_embed_type": None,
    "addition_embed_type": None,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
}
VAE_FIXED = {
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
}


def is_diffusers_folder(path: Path) -> bool:
    """Tell whether a folder holds a diffusers model."""
    return path.is_dir() and ((path / "model_index.json").is_file() or (path / "unet").is_dir())


class FolderWeights:
    """The weight files of a diffusers folder as one source; names begin with "unet/", "vae/", "text_encoder/"."""

    kind = "diffusers folder"

    def __init__(self, path: Path, parts: tuple[str, ...] = ("unet", "vae", "text_encoder")):
        self.path = str(path)
        self.notes: list[str] = []
        self.metadata: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.nbytes = 0
        self._where: dict[str, tuple[Weights, str]] = {}
        self._open: list[Weights] = []
        try:
            for part in parts:
                folder = path / part
                if not folder.is_dir():
                    raise AbsentError(
                        f"'{escaped(path)}' has no folder '{part}'; a diffusers model needs one"
                    )
                self._add(f"{part}/", folder, STEMS[part])
        except BaseException:
            self.close()
            raise

    def _add(self, prefix: str, folder: Path, stem: str) -> None:
        for file in weight_files(folder, stem):
            weights = open_weights(file)
            self._open.append(weights)
            self.nbytes += os.path.getsize(file)
            for name, info in weights.infos.items():
                if prefix + name in self.infos:
                    raise FormatError(f"'{escaped(folder)}': '{escaped(name)}' is in two files")
                self.infos[prefix + name] = info
                self._where[prefix + name] = (weights, name)

    @property
    def files(self) -> list[str]:
        """The paths of the weight files."""
        return [weights.path for weights in self._open]

    def read(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """Read one tensor into memory of its own, or into the scratch buffer given, until the next read into it."""
        weights, inner = self._where[name]
        return weights.read(inner, scratch)

    def close(self) -> None:
        """Close every file."""
        for weights in self._open:
            weights.close()


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Find the weight files of one part: whole before sharded, safetensors before pickle, full before fp16.

    Raises:
        AbsentError: there are none.
        UnsafeFileError: a sharded index names a file outside the folder.
    """
    for variant in ("", ".fp16", ".bf16", ".non_ema"):
        for suffix, name in ((".safetensors", stem), (".bin", OLD_TEXT_STEM if stem == "model" else stem)):
            whole = folder / f"{name}{variant}{suffix}"
            if whole.is_file():
                return [whole]
            # transformers writes model.safetensors.index.fp16.json, with the variant last.
            index = folder / f"{name}{suffix}.index{variant}.json"
            if index.is_file():
                return _shards(index)
    raise AbsentError(f"'{escaped(folder)}' has no {stem}.safetensors or .bin; download the folder again")


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(n, str) for n in mapping.values()):
        raise FormatError(f"'{escaped(index)}' should map tensors to files under 'weight_map'")
    names = sorted(set(mapping.values()))
    for name in names:
        if (
            name in (".", "..")
            or name != os.path.basename(name)
            or "\\" in name
            or ":" in name
            or "\0" in name
        ):
            raise UnsafeFileError(f"'{escaped(index)}' names '{escaped(name)}', outside its folder; refused")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AbsentError: no such file. FormatError: not a JSON object.
    """
    if not path.is_file():
        raise AbsentError(f"'{escaped(path)}' is not there; a diffusers folder needs it")
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"'{escaped(path)}' has {path.stat().st_size} bytes; at most {MAX_JSON} are read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no UTF-8, no JSON, a number without end
        raise FormatError(f"'{escaped(path)}' is not JSON: {escaped(error, 80)}") from error
    if not isinstance(found, dict):
        raise FormatError(f"'{escaped(path)}' should be a JSON object")
    return found


def _hold(path: Path, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise MismatchError where a configuration asks for what CompVis's networks do not have."""
    for key, value in fixed.items():
        if key in config and config[key] != value:
            raise MismatchError(
                f"'{escaped(path)}': {key} is {escaped(config[key], 40)}, but Stable Diffusion v1 networks have {value}"
            )


def _wrong(path: Path, key: str, wanted: str, value: Any) -> FormatError:
    return FormatError(f"'{escaped(path)}': {key} should be {wanted}, got {escaped(json.dumps(value), 40)}")


def _count(
    path: Path, config: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_SIZE
) -> int:
    """Read a number of things; null is an entry that is not there, as diffusers has it."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise _wrong(path, key, f"a whole number from 1 to {most}", value)
    return value


def _number(path: Path, config: Mapping[str, Any], key: str, default: float, most: int = MAX_SIZE) -> float:
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value <= most:
        raise _wrong(path, key, f"a number above 0 and up to {most}", value)
    return float(value)


def _flag(path: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise _wrong(path, key, "true or false", value)
    return bool(value)


def _list(path: Path, config: Mapping[str, Any], key: str, kind: type, most: int = MAX_LEVELS) -> list[Any]:
    value = config.get(key)
    words = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise _wrong(path, key, f"a list of 1 to {most} {words}", value)
    for part in value:
        if type(part) is not kind and not (kind is float and type(part) is int):
            raise _wrong(path, key, f"a list of {words}", value)
    return value


def _word(path: Path, config: Mapping[str, Any], key: str, default: str) -> str:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _wrong(path, key, "a text", value)
    return value


def _multipliers(path: Path, config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Split block_out_channels into CompVis's model width and its multiple at each level."""
    channels = _list(path, config, "block_out_channels", int)
    if not all(0 < c <= MAX_SIZE for c in channels):
        raise _wrong(path, "block_out_channels", f"a list of whole numbers from 1 to {MAX_SIZE}", channels)
    if any(c % channels[0] for c in channels):
        raise MismatchError(
            f"'{escaped(path)}': block_out_channels {escaped(channels)} are no multiples of the first"
        )
    if channels[0] % GROUPS:
        raise MismatchError(
            f"'{escaped(path)}': block_out_channels {escaped(channels)} are no multiples of {GROUPS}, the "
            "groups of a norm"
        )
    return channels[0], [c // channels[0] for c in channels]


def unet_params(path: Path) -> dict[str, Any]:
    """Translate unet/config.json into UNetModel's parameters."""
    config = read_json(path)
    _hold(path, config, UNET_FIXED)
    # diffusers took heads for their width and had to keep the name.
    name = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    if isinstance(config.get(name), list):
        raise MismatchError(
            f"'{escaped(path)}': heads per level {escaped(config[name], 40)} belong to Stable Diffusion v2 or "
            "XL, not v1"
        )
    heads = _count(path, config, name, default=8)
    width, multipliers = _multipliers(path, config)
    if width % heads:
        raise MismatchError(f"'{escaped(path)}': {name} {heads} does not divide the {width} channels")
    kinds = _list(path, config, "down_block_types", str)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if len(kinds) != len(multipliers) or not set(kinds) <= set(known):
        raise MismatchError(
            f"'{escaped(path)}': down_block_types {escaped(kinds)} are not those of Stable Diffusion v1"
        )
    return {
        "image_size": _count(path, config, "sample_size", default=64),
        "in_channels": _count(path, config, "in_channels"),
        "out_channels": _count(path, config, "out_channels"),
        "model_channels": width,
        "attention_resolutions": [2**level for level, kind in enumerate(kinds) if known[kind]],
        "num_res_blocks": _count(path, config, "layers_per_block", most=MAX_LEVELS),
        "channel_mult": multipliers,
        "num_heads": heads,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": _flag(path, config, "use_linear_projection"),
        "transformer_depth": _count(path, config, "transformer_layers_per_block", default=1, most=MAX_LEVELS),
        "context_dim": _count(path, config, "cross_attention_dim"),
        "use_checkpoint": False,
        "legacy": False,
    }


def vae_params(path: Path) -> tuple[dict[str, Any], float]:
    """Translate vae/config.json into AutoencoderKL's parameters and the scale of its latents."""
    config = read_json(path)
    _hold(path, config, VAE_FIXED)
    width, multipliers = _multipliers(path, config)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = _list(path, config, key, str)
        if kinds != [kind] * len(multipliers):
            raise MismatchError(
                f"'{escaped(path)}': {key} {escaped(kinds)} are not those of a KL autoencoder of "
                f"{len(multipliers)} levels"
            )
    latent = _count(path, config, "latent_channels")
    scale = _number(path, config, "scaling_factor", DEFAULT_SCALING)
    params = {
        "embed_dim": latent,
        "ddconfig": {
            "double_z": True,
            "z_channels": latent,
            "resolution": _count(path, config, "sample_size", default=256),
            "in_channels": _count(path, config, "in_channels"),
            "out_ch": _count(path, config, "out_channels"),
            "ch": width,
            "ch_mult": multipliers,
            "num_res_blocks": _count(path, config, "layers_per_block", most=MAX_LEVELS),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return params, scale


def scheduler_params(path: Path) -> dict[str, Any]:
    """Translate scheduler/scheduler_config.json; v1's schedule where a folder has none."""
    config = read_json(path) if path.is_file() else {}
    prediction = _word(path, config, "prediction_type", "epsilon")
    schedule = _word(path, config, "beta_schedule", "scaled_linear")
    if prediction not in PREDICTIONS or schedule not in SCHEDULES:
        raise MismatchError(
            f"'{escaped(path)}': prediction_type {escaped(prediction, 30)} with beta_schedule {escaped(schedule, 30)}; "
            f"known are {', '.join(PREDICTIONS)} and {', '.join(SCHEDULES)}"
        )
    params = {
        "linear_start": _number(path, config, "beta_start", 0.00085, most=1),
        "linear_end": _number(path, config, "beta_end", 0.012, most=1),
        "timesteps": _count(path, config, "num_train_timesteps", default=1000),
        "beta_schedule": SCHEDULES[schedule],
        "parameterization": PREDICTIONS[prediction],
    }
    if _flag(path, config, "rescale_betas_zero_snr"):
        params["rescale_betas_zero_snr"] = True
    if config.get("trained_betas") is not None:
        betas = _list(path, config, "trained_betas", float, most=MAX_SIZE)
        if len(betas) != params["timesteps"] or not all(0 < beta < 1 for beta in betas):
            raise _wrong(path, "trained_betas", f"{params['timesteps']} numbers between 0 and 1", betas)
        params["given_betas"] = betas
    return params


def folder_settings(path: Path) -> tuple[str, dict[str, Any]]:
    """Translate a diffusers folder's JSON files into (family, CompVis configuration).

    Raises:
        AbsentError, FormatError: a JSON file is missing or broken.
        MismatchError: another family, or an option that CompVis's networks do not have; it is named.
    """
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = _word(path / "model_index.json", index, "_class_name", "StableDiffusionPipeline")
    for beginning, words in FOREIGN_PIPELINES.items():
        if pipeline.startswith(beginning):
            raise MismatchError(
                f"'{escaped(path)}' is {words} ({escaped(pipeline, 60)}), not Stable Diffusion v1"
            )
    if not pipeline.startswith(PIPELINES):
        raise MismatchError(
            f"'{escaped(path)}' is a {escaped(pipeline, 60)}, not a Stable Diffusion v1 pipeline"
        )

    unet = unet_params(path / "unet" / "config.json")
    vae, scale = vae_params(path / "vae" / "config.json")
    text_path = path / "text_encoder" / "config.json"
    text = read_json(text_path)
    width = _count(text_path, text, "hidden_size", default=768)
    if unet["context_dim"] != width:
        raise MismatchError(
            f"'{escaped(path)}': the UNet wants text of width {unet['context_dim']}, the text encoder gives {width}"
        )
    if unet["in_channels"] not in (4, 9) and unet["in_channels"] != vae["embed_dim"]:
        raise MismatchError(f"'{escaped(path)}': a UNet of {unet['in_channels']} input channels is not v1's")
    inpainting = unet["in_channels"] == 2 * vae["embed_dim"] + 1
    params = {
        **scheduler_params(path / "scheduler" / "scheduler_config.json"),
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["image_size"],
        "channels": vae["embed_dim"],
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if inpainting else "crossattn",
        "scale_factor": scale,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": vae},
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {
                "version": str(path / "text_encoder"),
                "max_length": _count(text_path, text, "max_position_embeddings", default=77),
            },
        },
    }
    name = "LatentInpaintDiffusion" if inpainting else "LatentDiffusion"
    if inpainting:
        params["concat_keys"] = ["mask", "masked_image"]
        params["masked_image_key"] = "masked_image"
        params["finetune_keys"] = None
    family = "v1-inpainting" if inpainting else "v1"
    return family, {"model": {"target": f"ldm.models.diffusion.ddpm.{name}", "params": params}}
