"""Key mapping: CompVis's, diffusers' and other programs' names of the same tensors, and how to translate them."""

import re
from collections import Counter
from collections.abc import Iterable

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."
EMA = "model_ema."
CONTROL = "control_model."
PARTS = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT, "EMA": EMA, "ControlNet": CONTROL}
POSITION_IDS = "embeddings.position_ids"

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# What diffusers called the VAE's attention before release 0.15.
VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _module(key: str) -> tuple[str, str]:
    """Split "a.b.weight" into ("a.b", "weight")."""
    head, _, leaf = key.rpartition(".")
    return head, leaf


def unet_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a UNet's tensors as diffusers does.

    Args:
        keys: CompVis names without "model.diffusion_model."; all of them, for the number of ResBlocks per
            level is read from them.

    Returns:
        CompVis name -> diffusers name. Names that diffusers' UNet2DConditionModel has no place for are absent.
    """
    keys = list(keys)
    downsamplers = [int(m[1]) for key in keys if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))]
    blocks = [int(m[1]) for key in keys if (m := re.match(r"input_blocks\.(\d+)\.", key))]
    # Each level is n ResBlocks and a downsampler, so the first downsampler has index n + 1.
    per_level = min(downsamplers) if downsamplers else max(blocks, default=0) + 1

    def within(rest: str, position: int, tail: str) -> str | None:
        """Name the part of a ResBlock or SpatialTransformer inside its block."""
        module, leaf = _module(rest)
        if module in RESNET:
            return f"{tail}resnets.{position}.{RESNET[module]}.{leaf}"
        if module.split(".")[0] in ("norm", "proj_in", "proj_out", "transformer_blocks"):
            return f"{tail}attentions.{position}.{rest}"
        return None

    names: dict[str, str | None] = {}
    for key in keys:
        module, leaf = _module(key)
        if module in UNET_ENDS:
            names[key] = f"{UNET_ENDS[module]}.{leaf}"
        elif m := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.(\w+)", key):
            names[key] = f"down_blocks.{int(m[1]) // per_level - 1}.downsamplers.0.conv.{m[2]}"
        elif m := re.fullmatch(r"input_blocks\.(\d+)\.[01]\.(.+)", key):
            level, position = divmod(int(m[1]) - 1, per_level)
            names[key] = within(m[2], position, f"down_blocks.{level}.")
        elif m := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
            names[key] = within(m[2], int(m[1]) // 2, "mid_block.")
        elif m := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.conv\.(\w+)", key):
            names[key] = f"up_blocks.{int(m[1]) // per_level}.upsamplers.0.conv.{m[2]}"
        elif m := re.fullmatch(r"output_blocks\.(\d+)\.[01]\.(.+)", key):
            level, position = divmod(int(m[1]), per_level)
            names[key] = within(m[2], position, f"up_blocks.{level}.")
    return {key: name for key, name in names.items() if name is not None}


def control_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a ControlNet's tensors as diffusers does; CompVis names without "control_model." in."""
    keys = list(keys)
    names = unet_to_diffusers(keys)
    layers = [int(m[1]) for key in keys if (m := re.match(r"input_hint_block\.(\d+)\.", key))]
    ends = {0: "conv_in", max(layers, default=0): "conv_out"}
    for key in keys:
        module, leaf = _module(key)
        if m := re.fullmatch(r"input_hint_block\.(\d+)", module):
            layer = int(m[1])  # of two layers the second is an activation
            names[key] = f"controlnet_cond_embedding.{ends.get(layer, f'blocks.{layer // 2 - 1}')}.{leaf}"
        elif m := re.fullmatch(r"zero_convs\.(\d+)\.0", module):
            names[key] = f"controlnet_down_blocks.{m[1]}.{leaf}"
        elif module == "middle_block_out.0":
            names[key] = f"controlnet_mid_block.{leaf}"
    return names


def vae_to_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a VAE's tensors as diffusers does; CompVis names without "first_stage_model." in."""
    keys = list(keys)
    ups = [int(m[1]) for key in keys if (m := re.match(r"decoder\.up\.(\d+)\.", key))]
    last = max(ups, default=0)
    names: dict[str, str] = {}
    for key in keys:
        name = key.replace("nin_shortcut", "conv_shortcut").replace(".norm_out.", ".conv_norm_out.")
        if m := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(.+)", name):
            half, way, level, rest = m[1], m[2], int(m[3]), m[4]
            rest = rest.replace("block.", "resnets.", 1) if rest.startswith("block.") else rest
            rest = rest.replace("downsample.conv", "downsamplers.0.conv").replace(
                "upsample.conv", "upsamplers.0.conv"
            )
            level = (
                last - level if way == "up" else level
            )  # CompVis counts the decoder's levels from the finest
            name = f"{half}.{way}_blocks.{level}.{rest}"
        elif m := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name):
            name = f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3]}"
        elif m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(\w+)", name):
            name = f"{m[1]}.mid_block.attentions.0.{VAE_ATTENTION.get(m[2], m[2])}.{m[3]}"
        names[key] = name
    return names


def modern_vae_name(name: str) -> str:
    """Bring a diffusers VAE name from before release 0.15 up to date; others pass."""
    m = re.fullmatch(r"(.*\.attentions\.0\.)(\w+)\.(\w+)", name)
    if m and m[2] in VAE_OLD_ATTENTION:
        return f"{m[1]}{VAE_OLD_ATTENTION[m[2]]}.{m[3]}"
    return name


def text_name(name: str) -> str:
    """Give a text encoder's tensor the prefix "text_model." where a file left it out.

    Takes and returns what follows "cond_stage_model.transformer.", or a whole name in a text_encoder folder.
    """
    if name.split(".")[0] in ("embeddings", "encoder", "final_layer_norm"):
        return f"text_model.{name}"
    return name


def ema_name(key: str) -> str:
    """Name the moving average of a parameter "model.<path>" as LitEma does: without the dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


# --- from diffusers' names, without a model to look at --------------------------------------------------------------

_FROM_RESNET = {theirs: ours for ours, theirs in RESNET.items()}
_FROM_UNET_ENDS = {theirs: ours for ours, theirs in UNET_ENDS.items()}


def unet_from_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a UNet's tensors as CompVis does: `unet_to_diffusers` the other way round.

    Args:
        keys: diffusers names; all of them, for the number of ResBlocks per level is read from them.

    Returns:
        diffusers name -> CompVis name. Names that no UNet of CompVis's has are absent.
    """
    keys = list(keys)
    found = [int(m[1]) for key in keys if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", key))]
    per_level = max(found, default=0) + 2
    attends = {m[1] for key in keys if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}

    def within(kind: str, rest: str) -> str | None:
        if kind == "attentions":
            return rest
        module, leaf = _module(rest)
        return f"{_FROM_RESNET[module]}.{leaf}" if module in _FROM_RESNET else None

    names: dict[str, str] = {}
    for key in keys:
        module, leaf = _module(key)
        if module in _FROM_UNET_ENDS:
            names[key] = f"{_FROM_UNET_ENDS[module]}.{leaf}"
        elif m := re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", key):
            way, level, place, inner = m[1], int(m[2] or 0), int(m[4]), within(m[3], m[5])
            if inner is None:
                continue
            number = level * per_level + place
            second = int(m[3] == "attentions")
            if way == "mid":
                names[key] = f"middle_block.{2 * place + second}.{inner}"
            else:
                block = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
                names[key] = f"{block}.{second}.{inner}"
        elif m := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)", key):
            names[key] = f"input_blocks.{(int(m[1]) + 1) * per_level}.0.op.{m[2]}"
        elif m := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", key):
            last = (int(m[1]) + 1) * per_level - 1
            names[key] = f"output_blocks.{last}.{1 + (m[1] in attends)}.conv.{m[2]}"
    return names


def control_from_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a ControlNet's tensors as CompVis does, without "control_model."; diffusers names in."""
    keys = list(keys)
    names = unet_from_diffusers(keys)
    blocks = [
        int(m[1]) for key in keys if (m := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.", key))
    ]
    ends = {"conv_in": 0, "conv_out": 2 * max(blocks, default=-1) + 4}
    for key in keys:
        module, leaf = _module(key)
        if m := re.fullmatch(r"controlnet_cond_embedding\.(?:(conv_in|conv_out)|blocks\.(\d+))", module):
            names[key] = f"input_hint_block.{ends[m[1]] if m[1] else 2 * int(m[2]) + 2}.{leaf}"
        elif m := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
            names[key] = f"zero_convs.{m[1]}.0.{leaf}"
        elif module == "controlnet_mid_block":
            names[key] = f"middle_block_out.0.{leaf}"
    return names


def vae_from_diffusers(keys: Iterable[str]) -> dict[str, str]:
    """Name a VAE's tensors as CompVis does, without "first_stage_model."; diffusers names in, old and new."""
    keys = list(keys)
    ups = [int(m[1]) for key in keys if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key))]
    last = max(ups, default=0)
    names: dict[str, str] = {}
    for key in keys:
        name = modern_vae_name(key)
        if m := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            half, way, level, kind, place, rest = m[1], m[2], int(m[3]), m[4], m[5], m[6]
            level = last - level if way == "up" else level
            inner = f"block.{place}.{rest}" if kind == "resnets" else f"{kind.removesuffix('rs')}.{rest}"
            name = f"{half}.{way}.{level}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
        elif m := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", name):
            name = f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3]}"
        elif m := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
            name = f"{m[1]}.mid.attn_1.{_TO_COMPVIS_ATTENTION.get(m[2], m[2])}.{m[3]}"
        names[key] = name.replace(".conv_norm_out.", ".norm_out.")
    return names


# --- many prefixes, one name -----------------------------------------------------------------------------------------

COMPVIS_UNET = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|out|label_emb)\.")
DIFFUSERS_UNET = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding)\."
)
# ComfyUI writes "vae." and "text_encoders.clip_l.", diffusers' pipelines "unet." and "text_encoder.", forks "te.".
_UNET = re.compile(r"(?:model\.diffusion_model|diffusion_model|unet)[./](.+)")
_VAE = re.compile(r"(?:first_stage_model|vae)[./](.+)")
_CLIP = re.compile(
    r"(?:cond_stage_model\.|text_encoders?(?:\.clip_l)?[./]|te1?\.|clip_l\.|(conditioner)\.embedders\.0\.|(?=(?:transformer\.)?text_model\.))"
    r"(?:transformer\.|te\.)?(?:text_model\.)?"
    r"(?:((?:embeddings|encoder\.layers|final_layer_norm)\..+)|((?:vision_model|visual_projection|text_projection|logit_scale)(?:\..+)?))"
)
_VAE_ATTENTION_AS_DIFFUSERS = re.compile(
    r"((?:encoder|decoder)\.mid\.attn_1\.)(group_norm|to_out\.0|to_[qkv]|query|key|value|proj_attn)\.(\w+)"
)
_DIFFUSERS_VAE = re.compile(r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block|conv_norm_out)\.")
_TO_COMPVIS_ATTENTION = {theirs: ours for ours, theirs in VAE_ATTENTION.items()} | {
    old: next(ours for ours, theirs in VAE_ATTENTION.items() if theirs == new)
    for old, new in VAE_OLD_ATTENTION.items()
}
_WRAPPERS = ("module.", "state_dict.")  # of data-parallel training, and of a state that was flattened whole


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Bring the names of a file's tensors to one spelling, whoever wrote it; what is not known stays as it is.

    Returns:
        name in the file -> CompVis's full name ("model.diffusion_model.", "first_stage_model.",
        "cond_stage_model.transformer.text_model."); where the file has diffusers' name for a part of the UNet or the
        VAE, that name as it is in a folder ("unet/...", "vae/...").
    """
    names = list(names)
    wrapper = next((w for w in _WRAPPERS if names and all(name.startswith(w) for name in names)), "")
    bare = {name: name.removeprefix(wrapper).replace("_orig_mod.", "") for name in names}
    has_unet = any(_UNET.match(name) for name in bare.values())
    embedders = Counter(
        m[1] for name in bare.values() if (m := re.match(r"conditioner\.embedders\.(\d)\.", name))
    )
    return {
        name: _canonical(inner, has_unet, is_xl=embedders["1"] > embedders["0"])
        for name, inner in bare.items()
    }


def _canonical(name: str, has_unet: bool, is_xl: bool) -> str:
    if m := _UNET.fullmatch(name):
        if COMPVIS_UNET.match(m[1]):
            return UNET + m[1]
        return f"unet/{m[1]}" if DIFFUSERS_UNET.match(m[1]) else name
    if m := _VAE.fullmatch(name):
        if _DIFFUSERS_VAE.match(m[1]):
            return f"vae/{modern_vae_name(m[1])}"
        if a := _VAE_ATTENTION_AS_DIFFUSERS.fullmatch(m[1]):
            return f"{VAE}{a[1]}{_TO_COMPVIS_ATTENTION[a[2]]}.{a[3]}"
        return VAE + m[1]
    m = _CLIP.fullmatch(name)
    if m is None or (m[1] and is_xl) or (not has_unet and name.startswith(("text_model.", "transformer."))):
        return name
    return f"{TEXT}transformer.text_model.{m[2]}" if m[2] else f"{TEXT}transformer.{m[3]}"
