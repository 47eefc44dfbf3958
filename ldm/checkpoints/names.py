"""Names to names: CompVis's and diffusers' words for the same tensors, and the families a file can belong to."""

import re
from collections.abc import Iterable, Mapping

from ldm.checkpoints.account import TensorInfo

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


# Family -> what to say, or where such a file belongs.
REFUSED = {
    "SDXL": "Stable Diffusion XL",
    "SD3": "Stable Diffusion 3",
    "Flux": "Flux",
    "v2": "Stable Diffusion v2",
    "ControlNet": "a ControlNet",
    "LoRA": "a LoRA",
    "textual inversion": "a textual-inversion embedding",
    "IP-Adapter": "an IP-Adapter",
    "VAE": "a VAE only",
    "UNet": "a UNet only",
    "text encoder": "a text encoder only",
    "VAE (diffusers)": "a diffusers VAE only",
    "UNet (diffusers)": "a diffusers UNet only",
    "depth": "Stable Diffusion v2 depth (5-channel UNet)",
    "pix2pix": "InstructPix2Pix (8-channel UNet)",
    "unknown": "a layout that is not known here",
}
ADVICE = {
    "VAE": "give it as vae=, beside a full model",
    "VAE (diffusers)": "give it as vae=, beside a full model",
    "UNet": "give a full model; one of OpenAI's pixel models is for ldm.checkpoints.load_openai_model",
    "UNet (diffusers)": "give the diffusers folder that it belongs to",
}
LORA = re.compile(
    r"^lora_(unet|te\d?)_|\.lora_(down|up|A|B)\.|_lora\.(down|up)\.|\.lora_linear_layer\.|\.hada_w|\.lokr_w|\.oft_(blocks|diag)"
)


def family_of(infos: Mapping[str, TensorInfo]) -> str:
    """Name the family of model that a file belongs to, from its tensors' names and shapes.

    Returns:
        "v1" or "v1-inpainting" for a full model in the layout of Stable Diffusion v1, of any size; else a key
        of REFUSED.
    """

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in infos)

    def width(name: str, axis: int) -> int | None:
        shape = infos[name].shape if name in infos else ()
        return shape[axis] if len(shape) > axis else None

    if any(LORA.search(name) for name in infos):
        return "LoRA"
    if has("conditioner.embedders.", "conditioner.") or has(f"{UNET}label_emb.0.0.") and not has(TEXT):
        return "SDXL"
    if has(f"{UNET}joint_blocks.", "joint_blocks."):
        return "SD3"
    if has(f"{UNET}double_blocks.", "double_blocks."):
        return "Flux"
    if has("image_proj.", "ip_adapter."):
        return "IP-Adapter"
    if has("emb_params", "string_to_param.", "clip_l", "clip_g", "<"):
        return "textual inversion"
    if has(CONTROL, "input_hint_block.", "controlnet_cond_embedding."):
        return "ControlNet"
    if has(f"{TEXT}model."):
        return "v2"
    if has(UNET):
        channels = width(f"{UNET}input_blocks.0.0.weight", 1)
        if width(f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", 1) == 1024 and not has(
            TEXT
        ):
            return "v2"
        if not has(VAE, TEXT):
            return "UNet"
        return {9: "v1-inpainting", 5: "depth", 8: "pix2pix"}.get(channels, "v1")
    if has("down_blocks.", "mid_block.", "up_blocks."):
        return "UNet (diffusers)"
    if has("encoder.down_blocks.", "decoder.up_blocks."):
        return "VAE (diffusers)"
    if has(VAE, "encoder.down.", "decoder.up.", "quant_conv."):
        return "VAE"
    if has("input_blocks.", "middle_block.", "output_blocks."):
        return "UNet"
    if has(TEXT, "text_model.", "transformer.text_model.", "embeddings.", "encoder.layers."):
        return "text encoder"
    return "unknown"
