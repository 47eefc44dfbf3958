"""Adapters' files from one program's layout to another's: ControlNets, LoRAs, textual inversions; bits are kept.

Each function gives what is to be written; `ldm.converting` writes it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.adapters import lora_weights
from ldm.adapters.embedding import CLIP_WIDTH, Embedding
from ldm.adapters.lora import LoraFile, ModuleChange
from ldm.checkpoints import TensorInfo, Weights, open_weights
from ldm.checkpoints.families import family_of
from ldm.checkpoints.key_mapping import (
    COMPVIS_UNET,
    CONTROL,
    control_from_diffusers,
    control_to_diffusers,
    unet_to_diffusers,
)
from ldm.checkpoints.report import LoadReport, first_few
from ldm.errors import MismatchError, escaped
from ldm.modules.diffusionmodules.controlnet import ControlNetModel

BESIDE = "the model that it was saved with"
V1_HEADS = 8  # which no tensor says
Read = Callable[[str], Tensor]


class Layout(NamedTuple):
    """A file that is to be written: what it holds, tensor by tensor, and what became of the other file's tensors."""

    infos: dict[str, TensorInfo]
    read: Read
    metadata: dict[str, str]
    report: LoadReport
    config: dict[str, Any] | None = None  # config.json of diffusers, or adapter_config.json of PEFT


def _of_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], report: LoadReport) -> Layout:
    infos = {name: TensorInfo(tuple(one.shape), one.dtype) for name, one in tensors.items()}
    return Layout(infos, tensors.__getitem__, metadata, report)


# --- ControlNet -----------------------------------------------------------------------------------------------------


def convert_control(weights: Weights, to: str) -> Layout:
    """Rename a ControlNet's tensors.

    Args:
        weights: of cldm's or diffusers' layout, or a whole model of cldm's that holds one.
        to: "compvis", with "control_model." before each name; or "diffusers".

    Raises:
        MismatchError: no whole ControlNet, or one with tensors that the other layout has no place for.
    """
    path = escaped(weights.path)
    report = LoadReport(path, "ControlNet", notes=list(weights.notes))
    is_whole = any(name.startswith(CONTROL) for name in weights.infos)
    own = {
        name.removeprefix(CONTROL): name for name in weights.infos if name.startswith(CONTROL) or not is_whole
    }
    report.ignored = {name: BESIDE for name in weights.infos if is_whole and not name.startswith(CONTROL)}
    if any(re.search(r"^lora_controlnet$|\.(up|down)$|^difference$", name) for name in own):
        raise MismatchError(
            f"'{path}' is a Control-LoRA or a difference, which needs the model that it was made from; a whole "
            "ControlNet is wanted"
        )
    if any(name.startswith("controlnet_") for name in own):
        names = control_from_diffusers(own)
    else:
        names = {name: name for name in control_to_diffusers(own)}
    if odd := [name for name in own if name not in names or not name.endswith((".weight", ".bias"))]:
        raise MismatchError(
            f"'{path}': {len(odd)} of its {len(own)} tensors are none of a ControlNet of Stable Diffusion v1 "
            f"({first_few(odd, 2)})"
        )
    theirs = control_to_diffusers(names.values())
    try:
        config = control_config({theirs[one]: weights.infos[own[name]] for name, one in names.items()})
        lacking = [name for name in _names_of(config) if name not in theirs]
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:  # what says its sizes is not there
        raise MismatchError(f"'{path}' is no whole ControlNet: {escaped(error, 80)}") from None
    if lacking:
        raise MismatchError(
            f"'{path}' is no whole ControlNet: {len(lacking)} of its tensors are missing ({first_few(lacking, 2)})"
        )
    given = {(CONTROL + one if to == "compvis" else theirs[one]): own[name] for name, one in names.items()}
    report.assigned = {name: target for target, name in given.items()}
    infos = {target: weights.infos[name] for target, name in given.items()}
    return Layout(infos, lambda target: weights.read(given[target]), {"format": "pt"}, report, config)


def _names_of(config: Mapping[str, Any]) -> list[str]:
    """List the tensors of the ControlNet that diffusers' configuration describes, by CompVis's names."""
    widths = config["block_out_channels"]
    with torch.device("meta"):
        network = ControlNetModel(
            config["in_channels"],
            widths[0],
            config["conditioning_channels"],
            config["layers_per_block"],
            [2**n for n, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")],
            channel_mult=[width // widths[0] for width in widths],
            num_heads=config["attention_head_dim"],
            transformer_depth=1,
            context_dim=config["cross_attention_dim"],
        )
    return list(network.state_dict())


def control_config(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Describe a ControlNet by the shapes of its tensors, by diffusers' names, as ControlNetModel's config.json.

    The number of heads is Stable Diffusion v1's, for no tensor says it.
    """

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in infos if (m := re.match(pattern, name))), default=-1)

    levels = range(count(r"down_blocks\.(\d+)\."))
    attends = [any(name.startswith(f"down_blocks.{n}.attentions.") for name in infos) for n in levels]
    context = [info.shape[1] for name, info in infos.items() if name.endswith("attn2.to_k.weight")]
    hint = [infos["controlnet_cond_embedding.conv_in.weight"].shape[0]]
    blocks = count(r"controlnet_cond_embedding\.blocks\.(\d+)\.")
    hint += [infos[f"controlnet_cond_embedding.blocks.{n}.weight"].shape[0] for n in range(1, blocks, 2)]
    first = next((n for n in levels if attends[n]), None)
    projection = "" if first is None else f"down_blocks.{first}.attentions.0.proj_in.weight"
    return {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        "attention_head_dim": V1_HEADS,
        "block_out_channels": [infos[f"down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in levels],
        "conditioning_channels": infos["controlnet_cond_embedding.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": hint,
        "cross_attention_dim": context[0] if context else 1280,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": infos["conv_in.weight"].shape[1],
        "layers_per_block": count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "use_linear_projection": bool(projection) and len(infos[projection].shape) == 2,
    }


# --- LoRA -----------------------------------------------------------------------------------------------------------

# Parts of modules' names that have an underscore of their own, of diffusers, transformers and CompVis.
_COMPOUND = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj "
    "conv_shortcut time_embedding linear_1 linear_2 conv_in conv_out conv_norm_out self_attn q_proj k_proj v_proj "
    "out_proj layer_norm1 layer_norm2 token_embedding position_embedding final_layer_norm input_blocks middle_block "
    "output_blocks time_embed in_layers out_layers emb_layers skip_connection"
).split()
_SIMPLE = (
    "resnets attentions downsamplers upsamplers conv conv1 conv2 norm norm1 norm2 norm3 attn1 attn2 ff net proj "
    "encoder layers mlp fc1 fc2 embeddings op out"
).split()
_WORD = re.compile(rf"({'|'.join(sorted([*_COMPOUND, *_SIMPLE], key=len, reverse=True))}|\d+)(?:_|$)")
# Ends of keys of the roles whose tensors are weights of layers.
_ENDS = {role: f"{role}.weight" for role in ("lora_up", "lora_down", "lora_mid", "a1", "a2", "b1", "b2")}
_PEFT_PREFIX = "base_model.model."
_PEFT = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def with_dots(body: str) -> str | None:
    """Give the dots back to a module's name in underscores: "down_blocks_0_attentions_1_proj_in"; None if unknown."""
    parts, place = [], 0
    while place < len(body):
        found = _WORD.match(body, place)
        if found is None:
            return None
        parts.append(found[1])
        place = found.end()
    return ".".join(parts)


# The parts of v1's UNet, as diffusers names them.
V1_PARTS = re.compile(
    r"(?:conv_in|conv_norm_out|conv_out|time_embedding|mid_block\.(?:attentions\.0|resnets\.[01])"
    r"|down_blocks\.(?:[0-3]\.resnets\.[01]|[0-2]\.(?:attentions\.[01]|downsamplers\.0))"
    r"|up_blocks\.(?:[0-3]\.resnets\.[0-2]|[1-3]\.attentions\.[0-2]|[0-2]\.upsamplers\.0))\."
)


def _module_of(file: LoraFile, change: ModuleChange) -> tuple[str, str]:
    """Give a module's part ("unet", "text_encoder") and its name with dots, as diffusers has it.

    Raises:
        MismatchError: no module of Stable Diffusion v1.
    """
    body = change.body + "_0" if change.body.endswith("_to_out") else change.body
    name = with_dots(body)
    if change.network == "text":
        if name is not None and name.startswith(("encoder.", "embeddings.", "final_layer_norm")):
            return "text_encoder", f"text_model.{name}"
        name = None
    elif name is not None and COMPVIS_UNET.match(f"{name}."):
        # Two ResBlocks a level, as Stable Diffusion v1 has them, which the modules of a LoRA need not show.
        key = f"{name}.weight"
        name = unet_to_diffusers([key, "input_blocks.3.0.op.weight"]).get(key, "").removesuffix(".weight")
        name = name if V1_PARTS.match(f"{name}.") else None  # of another UNet the blocks would be misnumbered
    if not name:
        raise file.misfit(f"'{escaped(change.module)}' is no module of Stable Diffusion v1's layout")
    return "unet", name


def convert_lora(file: LoraFile, to: str) -> Layout:
    """Rename a LoRA's tensors.

    Args:
        to: "kohya", which holds every family; or "diffusers", PEFT's names below "unet." and "text_encoder.", and
            "peft", below "base_model.model.", which hold LoRA, LoCon and DoRA whose lengths are those of rows. Ranks
            and alphas are in the metadata for diffusers (lora_adapter_metadata), in the layout's `config` for PEFT.

    Raises:
        MismatchError: a family or module that the layout has no place for; for PEFT, modules of two networks.
    """
    report = LoadReport(escaped(file.path), "LoRA", ignored=dict(file.ignored), notes=list(file.notes))
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, tuple[int, float]]] = {}
    says_alpha = to == "peft" or any("alpha" in change.parts for change in file.modules)
    for change in file.modules:
        part, name = _module_of(file, change)
        if to != "kohya":
            _check_peft(file, change)
        for role, values in change.parts.items():
            key = change.keys.get(role, change.keys.get("magnitude") if role == "dora_scale" else None)
            if to == "kohya":
                prefix = "lora_unet_" if part == "unet" else "lora_te_"
                target = f"{prefix}{name.replace('.', '_')}.{_ENDS.get(role, role)}"
                values = _as_kohya(change, role, values)
            elif role == "alpha":
                if key is not None:
                    report.assigned[key] = f"its configuration, for {to}"
                continue
            else:
                where = (
                    f"{part}.{name}" if to == "diffusers" else _PEFT_PREFIX + name.removeprefix("text_model.")
                )
                target = f"{where}.{_PEFT[role]}"
                values = values.flatten() if role == "dora_scale" else values
            tensors[target] = values
            if key is not None:
                report.assigned[key] = target
        if to != "kohya" and says_alpha:
            rank = len(change.parts["lora_down"])
            alpha = float(change.parts["alpha"]) if "alpha" in change.parts else float(rank)
            configs.setdefault(part, {})[name] = (rank, alpha)
    metadata = {key: value for key, value in file.metadata.items() if key != "lora_adapter_metadata"}
    layout = _of_tensors(tensors, {**metadata, "format": "pt"}, report)
    has_lengths = any("dora_scale" in change.parts for change in file.modules)
    described = {part: _peft_config(modules, has_lengths) for part, modules in configs.items()}
    if to == "peft":
        if len(described) > 1:
            raise file.misfit(
                "it is for the UNet and the text encoder, PEFT's layout for one network; use diffusers'"
            )
        (config,) = described.values()
        return layout._replace(config={"peft_type": "LORA", "bias": "none", "inference_mode": True, **config})
    if described:
        flat = {f"{part}.{key}": one for part, config in described.items() for key, one in config.items()}
        layout.metadata["lora_adapter_metadata"] = json.dumps(flat, sort_keys=True)
    return layout


def _as_kohya(change: ModuleChange, role: str, values: Tensor) -> Tensor:
    """Bring alpha out of metadata into the factors' dtype if that holds it, and PEFT's lengths into LyCORIS's shape."""
    down = change.parts.get("lora_down")
    if role == "alpha" and role not in change.keys and down is not None:
        return lora_weights.alpha_in(down.dtype, values)
    if role == "dora_scale" and values.dim() == 1 and down is not None:
        return values.reshape(-1, *(1 for _ in down.shape[1:]))
    return values


def _check_peft(file: LoraFile, change: ModuleChange) -> None:
    odd = sorted(change.parts.keys() - {"lora_up", "lora_down", "alpha", "dora_scale"})
    lengths = change.parts.get("dora_scale")
    if change.family is not lora_weights.LORA or odd:
        what = f"{change.family.name} with {', '.join(odd)}"
        raise file.misfit(
            f"'{escaped(change.module)}' is {what}, which diffusers' layout has no place for; keep it in kohya's, or "
            "bake it into a model (scripts/merge.py --lora)"
        )
    if lengths is not None and lengths.numel() != len(change.parts["lora_up"]):
        raise file.misfit(
            f"'{escaped(change.module)}' has DoRA's lengths of columns, which diffusers' layout has no place for"
        )


def _peft_config(modules: Mapping[str, tuple[int, float]], has_lengths: bool) -> dict[str, Any]:
    """Describe ranks and alphas as PEFT's LoraConfig takes them."""
    # transformers 5 has no "text_model." in its modules' names; PEFT looks for names by their ends.
    named = {name.removeprefix("text_model."): values for name, values in modules.items()}
    rank, alpha = (Counter(values[i] for values in named.values()).most_common(1)[0][0] for i in (0, 1))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: one for name, (one, _) in named.items() if one != rank},
        "alpha_pattern": {name: one for name, (_, one) in named.items() if one != alpha},
        "target_modules": sorted(named),
        "use_dora": has_lengths,
    }


# --- textual inversion ----------------------------------------------------------------------------------------------


def read_embedding(path: str, token: str | None = None) -> Embedding:
    """Read an embedding of whatever width.

    Raises: as Embedding.
    """
    with closing(open_weights(path)) as weights:
        widths = {
            info.shape[-1]
            for info in weights.infos.values()
            if info.dtype.is_floating_point and info.numel and len(info.shape) in (1, 2)
        }
    width = next(iter(widths)) if len(widths) == 1 else CLIP_WIDTH
    return Embedding(path, token, width)


def embedding_state(embedding: Embedding, to: str) -> dict[str, Any]:
    """Give what a file of an embedding holds.

    Args:
        to: "a1111", for torch.save (.pt); "diffusers", {token: vectors}; or "kohya", {"emb_params": vectors}.
    """
    vectors = embedding.vectors.to(embedding.dtype)
    if to == "diffusers":
        return {embedding.token: vectors[0] if len(vectors) == 1 else vectors}
    if to == "kohya":
        return {"emb_params": vectors}
    return {
        "string_to_token": {"*": 265},  # the number of "*" in CLIP's vocabulary
        "string_to_param": {"*": vectors},
        "name": embedding.token,
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def kind_of(infos: Mapping[str, TensorInfo]) -> str:
    """Tell what a file is by its tensors: "ControlNet", "LoRA", "embedding"; else its family."""
    family = family_of(infos)
    return "embedding" if family in ("textual inversion", "aesthetic gradients") else family
