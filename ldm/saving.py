"""Writing a model as others read it: one file with CompVis's keys, or a folder in diffusers' layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.checkpoints import save_safetensors
from ldm.checkpoints.build import build_empty, collector_paused
from ldm.checkpoints.configs import CONFIGS, V1_WIDTH, read_settings
from ldm.checkpoints.folders import PREDICTIONS, STEMS, folder_settings
from ldm.checkpoints.sampling import SamplingDefaults, read_sampling
from ldm.checkpoints.write import replacing
from ldm.errors import LdmError, MismatchError, OutputError, UsageError, escaped
from ldm.models.introspect import is_inpainting
from ldm.paths import shipped
from ldm.training.export import plain_weights

if TYPE_CHECKING:
    from ldm.diffusers_style.parts import Part
    from ldm.models.diffusion.ddpm import LatentDiffusion

# Whose class each part of a folder is, for model_index.json.
INDEX = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def save(model: LatentDiffusion, path: str | os.PathLike, advice: SamplingDefaults) -> list[Path]:
    """Write a model, with what its makers advise; see StableDiffusion.save."""
    text = os.fspath(path)
    path, is_folder = Path(text), text.endswith(("/", os.sep))
    if path.suffix.lower() == ".safetensors" and not is_folder and not path.is_dir():
        return _save_file(model, path, advice)
    if path.suffix and not is_folder and not path.is_dir():
        raise UsageError(
            f"save writes 'name.safetensors' or a folder, got '{escaped(path)}'; end a folder's name with /"
        )
    return [_save_folder(model, path)]


# --- one file ---


def _save_file(model: LatentDiffusion, path: Path, advice: SamplingDefaults) -> list[Path]:
    weights = plain_weights(model.state_dict())
    beside = path.with_suffix(".yaml")
    # An older YAML file of that name would be read as this one's.
    settings = as_yaml(_settings(model, advice)) if beside.exists() else settings_beside(model, advice)
    if settings is None:
        save_safetensors(path, weights, {"format": "pt"})
        return [path]
    with replacing(beside) as file:
        file.write(settings.encode())
    save_safetensors(path, weights, {"format": "pt"})
    return [path, beside]


def settings_beside(model: LatentDiffusion, advice: SamplingDefaults) -> str | None:
    """Write down a model's configuration as YAML; None where a reader of its weights needs none."""
    return None if _is_plain_v1(model, advice) else as_yaml(_settings(model, advice))


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Write a configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(settings)))


def _settings(model: LatentDiffusion, advice: SamplingDefaults) -> dict[str, Any]:
    """Write down the configuration that builds this model, and its advice for painting."""
    params = {name: _plain(value) for name, value in model.built_from.items()}
    for name in ("ckpt_path", "ignore_keys", "load_only_unet", "reset_ema", "reset_num_ema_updates"):
        params.pop(name, None)  # said where its weights came from
    params["use_ema"] = False  # the average is written in the network's place
    if "finetune_keys" in params:
        params["finetune_keys"] = None
    target = f"{type(model).__module__}.{type(model).__qualname__}"
    advice = {name: value for name, value in asdict(advice).items() if value not in (None, frozenset(), {})}
    if "known_words" in advice:
        advice["known_words"] = " ".join(sorted(advice["known_words"]))
    settings = {"sampling": _plain(advice)} if advice else {}
    return {**settings, "model": {"target": target, "params": params}}


def _plain(value: Any) -> Any:
    """Turn a value of a configuration into one that a YAML file holds."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UsageError(f"the model was built from a {type(value).__name__}, which no YAML file can hold")


def _is_plain_v1(model: LatentDiffusion, advice: SamplingDefaults) -> bool:
    """Tell whether a reader who is given no configuration builds the same model."""
    if model.model.diffusion_model.input_blocks[0][0].weight.shape[0] != V1_WIDTH:
        return False
    settings = read_settings(shipped(CONFIGS["v1-inpainting" if is_inpainting(model) else "v1"]))
    if advice not in (SamplingDefaults(), read_sampling(settings.get("sampling"))):
        return False
    return _difference(model, settings) is None


def _difference(model: LatentDiffusion, settings: Mapping[str, Any]) -> str | None:
    """Say in what the model that settings build differs from this one, weights apart; None in nothing."""
    with collector_paused():
        other = build_empty(settings)
    shapes = [
        {name: tuple(t.shape) for name, t in plain_weights(m.state_dict()).items()} for m in (model, other)
    ]
    for name in shapes[0].keys() | shapes[1].keys():
        # A measured scale_factor lies in the file, a fixed one in the configuration; it is compared below.
        if name != "scale_factor" and shapes[0].get(name) != shapes[1].get(name):
            return f"'{name}' is {shapes[0].get(name)} here, {shapes[1].get(name)} there"
    modules = dict(other.named_modules())
    for name, here in model.named_modules():
        there = modules.get(name, here)  # a moving average's own module is in one of them only
        for what in ("num_groups", "eps", "heads", "num_heads"):
            if getattr(here, what, None) != getattr(there, what, None):
                return f"{what} of '{name}' is {getattr(here, what, None)}"
    pairs = [
        (m.cond_stage_model.max_length, m.cond_stage_model.layer, m.parameterization) for m in (model, other)
    ]
    if pairs[0] != pairs[1] or float(model.scale_factor) != float(other.scale_factor):
        return f"max_length, layer, parameterization and scale_factor are {(*pairs[0], float(model.scale_factor))}"
    tables = [m.alphas_cumprod.cpu().float() for m in (model, other)]
    if tables[0].shape != tables[1].shape or not torch.allclose(*tables, rtol=1e-5):
        return "its noise schedule is another"
    return None


# --- a folder ---


def _save_folder(model: LatentDiffusion, path: Path) -> Path:
    with whole_folder(path) as part:
        fill_folder(model, part, _write_state)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, beside the name, which takes the name at the end: whole or not at all.

    Raises:
        OutputError: something is there already, or the disk does not take it.
    """
    path = Path(os.path.abspath(path))
    if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"cannot save into '{escaped(path)}': it holds something already; give another name"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write '{escaped(path)}': {error.strerror or error}; choose another folder"
        ) from error
    try:
        yield part
        os.chmod(part, 0o755)
        os.replace(part, path)
    except OutputError:
        raise
    except OSError as error:
        if isinstance(error, LdmError):  # of a file that is read meanwhile
            raise
        raise OutputError(
            f"cannot write '{escaped(path)}': {error.strerror or error}; free some space"
        ) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(part)


def _write_state(file: Path, name: str, part: Part) -> None:
    weights = {key: value for key, value in part.state_dict().items() if not key.startswith("loss.")}
    save_safetensors(file, weights, {"format": "pt"})


def fill_folder(model: LatentDiffusion, folder: Path, write: Callable[[Path, str, Part], None]) -> None:
    """Write a model in diffusers' layout into a folder.

    Args:
        write: (file, "unet", "vae" or "text_encoder", that part of the model) -> nothing; writes the part's weights.

    Raises:
        UsageError: the layout cannot describe the model.
    """
    from ldm.diffusers_style.parts import VAE, TextEncoder, UNet
    from ldm.diffusers_style.scheduler import schedule_config

    with model.ema_scope():  # what paints
        try:
            parts: dict[str, Part] = {
                "unet": UNet(model),
                "vae": VAE(model),
                "text_encoder": TextEncoder(model),
            }
            prediction = next(
                theirs for theirs, ours in PREDICTIONS.items() if ours == model.parameterization
            )
            scheduler = {
                "_class_name": "DDIMScheduler",
                **schedule_config(model),
                "prediction_type": prediction,
            }
            configs = {name: _config_of(part) for name, part in parts.items()}
            for part in parts.values():
                part.names()  # all of them have one
        except (LdmError, AttributeError, TypeError) as error:
            raise _no_words(str(error)) from error
        for name, part in parts.items():
            (folder / name).mkdir()
            write_json(folder / name / "config.json", configs[name])
            write(folder / name / f"{STEMS[name]}.safetensors", name, part)
    _save_tokenizer(model.cond_stage_model.tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    kind = "StableDiffusionInpaintPipeline" if is_inpainting(model) else "StableDiffusionPipeline"
    write_json(folder / "model_index.json", {"_class_name": kind, "requires_safety_checker": False, **INDEX})
    try:
        difference = _difference(model, folder_settings(folder)[1])
    except MismatchError as error:
        difference = str(error).replace(f"{folder}{os.sep}", "")  # a name that is gone in a moment
    if difference is not None:
        raise _no_words(difference)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    # transformers 5 writes one file; its earlier releases' CLIPTokenizer reads these two.
    whole = folder / "tokenizer.json"
    if whole.is_file() and not (folder / "vocab.json").is_file():
        tables = json.loads(whole.read_text(encoding="utf-8"))["model"]
        (folder / "vocab.json").write_text(json.dumps(tables["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = [one if isinstance(one, str) else " ".join(one) for one in tables["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _no_words(reason: str) -> UsageError:
    return UsageError(
        f"a folder in diffusers' layout cannot describe this model ({escaped(reason, 200)}); save 'name.safetensors'"
    )


def _config_of(part: Any) -> dict[str, Any]:
    config = part.config
    return (
        dict(config)
        if isinstance(config, Mapping)
        else config.to_dict() | {"architectures": ["CLIPTextModel"]}
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file of a diffusers folder."""
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
