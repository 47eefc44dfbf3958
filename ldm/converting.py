"""Files from one program's layout to another's: every value keeps its bits, and has a place or is refused.

convert("folder", "v1-5.safetensors", to="diffusers")          # and back: convert("v1-5.safetensors", "folder")
convert("canny", "control_v11p_sd15_canny.pth")                # a ControlNet, for diffusers
convert("peft.safetensors", "style.safetensors", to="diffusers")
convert("birb.pt", "learned_embeds.bin", to="a1111")
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ldm.adapters.converting import (
    convert_control,
    convert_lora,
    embedding_state,
    kind_of,
    read_embedding,
)
from ldm.adapters.lora import LoraFile
from ldm.checkpoints import LoadReport, TensorInfo, open_weights, save_object, save_safetensors
from ldm.checkpoints.build import follow_hub, match_file
from ldm.checkpoints.compvis import CompVisWeights, refuse_existing, refuse_input, sha256_of
from ldm.checkpoints.folders import is_diffusers_folder, weight_files
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE
from ldm.checkpoints.tensors import check_finite
from ldm.checkpoints.write import stream_safetensors
from ldm.diffusers_style.parts import Part, as_linear
from ldm.errors import AbsentError, MismatchError, UsageError, escaped, refuse_elsewhere, shown
from ldm.merging import DTYPES, merge
from ldm.saving import fill_folder, whole_folder, write_json
from ldm.values import check_value

# Kind of file -> the layouts that it may get.
LAYOUTS = {
    "model": ("compvis", "diffusers"),
    "ControlNet": ("compvis", "diffusers"),
    "LoRA": ("kohya", "diffusers", "peft"),
    "embedding": ("a1111", "diffusers", "kohya"),
}
MODELS = ("v1", "v1-inpainting")
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": f"{TEXT}transformer."}
STEM = "diffusion_pytorch_model"  # of a ControlNet's weights in a folder
LORA_FILE = "adapter_model"  # of PEFT's, in a folder


def convert(
    output: str | os.PathLike,
    path: str | os.PathLike,
    to: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> LoadReport:
    """Write a model, ControlNet, LoRA or textual inversion in another program's layout.

    Args:
        output: name.safetensors, or a folder for models and ControlNets in diffusers' layout; an embedding's file
            may be .pt or .bin, which is written by torch.save.
        path: a file, or a folder of diffusers or PEFT.
        to: "compvis" or "diffusers" for a model or ControlNet (None: by the output's name); "kohya", "diffusers" or
            "peft" (a folder) for a LoRA; "a1111", "diffusers" or "kohya" for an embedding.
        dtype: of a model's weights: float32, float16 or bfloat16; None = as they are.
        token: the embedding's name in prompts, which diffusers' files say; None = the file's own.
        overwrite: whether a file that has the output's name may be replaced; a folder never is.

    Returns:
        what became of every tensor.

    Raises:
        UsageError: an unknown layout, or an option of another kind of file.
        AbsentError, FormatError, UnsafeFileError: it cannot be read.
        MismatchError: it is of no known kind, not whole, or has what the layout cannot hold.
        OutputError: it cannot be written.
    """
    for one in (output, path):
        check_value(one, str | os.PathLike, "a file")
    refuse_elsewhere("file", path)
    source, target = follow_hub(Path(path)), Path(output)
    kind, file = _find(source)
    if to is None and kind in ("model", "ControlNet"):
        to = "compvis" if target.suffix.lower() == ".safetensors" else "diffusers"
    if to not in LAYOUTS[kind]:
        raise UsageError(
            f"to (--to) should be one of {', '.join(LAYOUTS[kind])} for a {kind}, got {shown(to)}"
        )
    if dtype is not None and (kind != "model" or dtype not in DTYPES.values()):
        raise UsageError(f"dtype is for models, one of {', '.join(DTYPES)}; got {shown(dtype)} for a {kind}")
    if token is not None and kind != "embedding":
        raise UsageError(f"token (--token) is for embeddings, and '{escaped(path)}' is a {kind}")
    refuse_input(target, [source, file])
    is_folder = to == "peft" or (to == "diffusers" and kind in ("model", "ControlNet"))
    _check_name(target, kind, to, is_folder)
    if not is_folder:
        refuse_existing(target, overwrite)
    if kind == "model":
        if is_folder:
            return _model_folder(target, source, dtype)
        return merge(target, source, dtype=dtype, overwrite=overwrite)[0]
    if kind == "embedding":
        return _embedding(target, file, to, token)
    if kind == "LoRA":
        layout = convert_lora(LoraFile(file), to)
        metadata = layout.metadata | _recipe([file], to)
        if not is_folder:
            stream_safetensors(target, layout.infos, layout.read, metadata)
            return layout.report
        with whole_folder(target) as folder:
            write_json(folder / "adapter_config.json", layout.config)
            stream_safetensors(folder / f"{LORA_FILE}.safetensors", layout.infos, layout.read, metadata)
        return layout.report
    with contextlib.closing(open_weights(file)) as weights:
        layout = convert_control(weights, to)
        metadata = layout.metadata | _recipe([file], to)
        if not is_folder:
            stream_safetensors(target, layout.infos, layout.read, metadata, weights.close)
            return layout.report
        with whole_folder(target) as folder:
            write_json(folder / "config.json", layout.config)
            file = folder / f"{STEM}.safetensors"
            stream_safetensors(file, layout.infos, layout.read, metadata, weights.close)
        return layout.report


def _recipe(files: Iterable[str | os.PathLike], to: str) -> dict[str, str]:
    """Say from what a file was made and how."""
    sources = [{"name": Path(file).name, "sha256": sha256_of(file)} for file in files]
    return {"ldm_recipe": json.dumps({"type": "converted", "to": to, "from": sources})}


def _find(path: Path) -> tuple[str, Path]:
    """Tell the kind of a file or folder, and which file holds its weights (of a model's folder: the folder)."""
    if is_diffusers_folder(path):
        return "model", path
    if path.is_dir():
        for stem in (STEM, LORA_FILE):
            with contextlib.suppress(AbsentError):
                first, *more = weight_files(path, stem)
                if more:
                    raise MismatchError(
                        f"'{escaped(path)}' holds its weights in {len(more) + 1} files; join them first"
                    )
                path = first
                break
        else:
            raise AbsentError(
                f"'{escaped(path)}' holds no model_index.json, {STEM}.* or {LORA_FILE}.*; name a file in it"
            )
    with contextlib.closing(open_weights(path)) as weights:
        found = kind_of(weights.infos)
    kind = "model" if found in MODELS else found
    if kind == "unknown":
        kind = "LoRA"  # which says what is wrong with it
    if kind not in LAYOUTS:
        raise MismatchError(
            f"'{escaped(path)}' is of the kind '{found}'; a Stable Diffusion v1 model, a ControlNet, a LoRA or an "
            "embedding can be converted"
        )
    return kind, path


def _check_name(target: Path, kind: str, to: str, is_folder: bool) -> None:
    suffixes = (".safetensors", ".pt", ".bin") if kind == "embedding" else (".safetensors",)
    suffix = target.suffix.lower()
    if is_folder and suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise UsageError(
            f"the layout '{to}' of a {kind} is a folder, got the name of a file, '{escaped(target)}'"
        )
    if not is_folder and suffix not in suffixes:
        raise UsageError(f"the output should be name{' or name'.join(suffixes)}, got '{escaped(target)}'")


def _model_folder(target: Path, source: Path, dtype: torch.dtype | None) -> LoadReport:
    """Write a model as diffusers has it, tensor by tensor."""
    with contextlib.ExitStack() as opened:
        weights = opened.enter_context(CompVisWeights(source))
        model, report, _ = match_file(source.resolve(), None, opened)
        metadata = {"format": "pt", **_recipe(weights.files, "diffusers")}
        shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}

        def write(file: Path, name: str, part: Part) -> None:
            own = {theirs: PREFIXES[name] + ours for ours, theirs in part.names().items()}
            if lacking := [one for one in own.values() if one not in weights.infos]:
                raise MismatchError(
                    f"'{escaped(source)}' lacks {len(lacking)} tensors, '{lacking[0]}' among them"
                )

            def read(theirs: str) -> torch.Tensor:
                values = as_linear(theirs, weights.read(own[theirs]).reshape(shapes[own[theirs]]))
                check_finite(str(source), own[theirs], values, dtype)
                return values.to(infos[theirs].dtype)

            infos = {}
            for theirs, ours in own.items():
                shape = as_linear(theirs, torch.empty(shapes[ours], device="meta")).shape
                infos[theirs] = TensorInfo(tuple(shape), dtype or weights.infos[ours].dtype)
            stream_safetensors(file, infos, read, metadata)

        with whole_folder(target) as folder:
            fill_folder(model, folder, write)
            weights.close()  # says if a file changed meanwhile
    return report


def _embedding(target: Path, file: Path, to: str, token: str | None) -> LoadReport:
    suffix = target.suffix.lower()
    if (to == "a1111") != (suffix == ".pt") or (to == "kohya" and suffix != ".safetensors"):
        wanted = {
            "a1111": "name.pt",
            "kohya": "name.safetensors",
            "diffusers": "name.bin or name.safetensors",
        }[to]
        raise UsageError(f"an embedding in the layout {to} is {wanted}, got '{escaped(target)}'")
    embedding = read_embedding(str(file), token)
    state = embedding_state(embedding, to)
    if suffix == ".safetensors":
        save_safetensors(target, state, {"format": "pt"})
    else:
        save_object(target, state)
    report = LoadReport(str(file), "textual inversion")
    name = next((key for key, one in state.items() if isinstance(one, torch.Tensor)), "string_to_param.*")
    report.assigned[embedding.token] = name
    return report
