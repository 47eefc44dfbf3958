"""Families of weight files: what a file is, judged by the whole of it, and what else may lie in it."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ldm.checkpoints.key_mapping import (
    COMPVIS_UNET,
    DIFFUSERS_UNET,
    EMA,
    TEXT,
    UNET,
    VAE,
    canonical,
    ema_name,
)
from ldm.checkpoints.report import TensorInfo

ALONE = "a_tensor_alone"  # the name of a tensor that is all of a pickle
COMPUTED = "computed from the configuration"
PROFILED = "a profiler's count of operations"  # thop leaves such buffers in every module

# Family -> what to say.
REFUSED = {
    "SDXL": "Stable Diffusion XL",
    "SD3": "Stable Diffusion 3",
    "Flux": "Flux",
    "v2": "Stable Diffusion v2",
    "depth": "Stable Diffusion v2 depth (5-channel UNet)",
    "pix2pix": "InstructPix2Pix (8-channel UNet)",
    "ControlNet": "a ControlNet",
    "LoRA": "a LoRA",
    "textual inversion": "a textual-inversion embedding",
    "IP-Adapter": "an IP-Adapter",
    "T2I-Adapter": "a T2I-Adapter",
    "motion module": "a motion module (AnimateDiff)",
    "hypernetwork": "a hypernetwork",
    "aesthetic gradients": "an embedding of aesthetic gradients",
    "optimizer": "the state of an optimizer",
    "safety checker": "a safety checker",
    "CLIP vision": "CLIP's vision encoder",
    "T5": "a T5 text encoder",
    "upscaler": "an upscaler or face restorer (ESRGAN, GFPGAN or their kin)",
    "detector": "an object detector (YOLO)",
    "TAESD": "a tiny VAE (TAESD)",
    "no UNet": "a VAE and a text encoder without a UNet",
    "VAE": "a VAE only",
    "UNet": "a UNet only",
    "text encoder": "a text encoder only",
    "VAE (diffusers)": "a diffusers VAE only",
    "UNet (diffusers)": "a diffusers UNet only",
    "unknown": "a layout that is not known here",
}
_OTHER_BASE = "only Stable Diffusion v1 and models of its layout are loaded here"
_ATTACHED = "it is added to a model and is none itself; give the full model that it was made for"
_BESIDE = "programs use it beside a model; a full Stable Diffusion v1 model is needed here"
_AS_VAE = "give it as vae=, beside a full model"
# Family -> what to do.
ADVICE = {
    **dict.fromkeys(("SDXL", "SD3", "Flux", "v2", "depth", "pix2pix"), _OTHER_BASE),
    **dict.fromkeys(
        (
            "motion module",
            "hypernetwork",
            "aesthetic gradients",
        ),
        _ATTACHED,
    ),
    **dict.fromkeys(
        ("safety checker", "CLIP vision", "T5", "upscaler", "detector", "text encoder"),
        _BESIDE,
    ),
    "ControlNet": f"{_ATTACHED}, and this file as --control, in Python as an ldm.adapters.ControlNet",
    "T2I-Adapter": f"{_ATTACHED}, and this file as --t2i-adapter, in Python as an ldm.adapters.T2IAdapter",
    "IP-Adapter": f"{_ATTACHED}, and this file as --ip-adapter, in Python as an ldm.adapters.IPAdapter",
    "LoRA": f"{_ATTACHED}, and this file as --lora, in Python as an ldm.adapters.LoRA",
    "textual inversion": f"{_ATTACHED}, and this file as --embedding, in Python as an ldm.adapters.Embedding",
    "optimizer": "a training goes on from it, with the model that was saved beside it; give that",
    "TAESD": "it makes previews and is no VAE of Stable Diffusion; leave it out, or give a KL autoencoder as vae=",
    "no UNet": _AS_VAE,
    "VAE": _AS_VAE,
    "VAE (diffusers)": _AS_VAE,
    "UNet": "give a full model; one of OpenAI's pixel models is for ldm.checkpoints.load_openai_model",
    "UNet (diffusers)": "give the diffusers folder that it belongs to",
    "unknown": "a full Stable Diffusion v1 model is needed here",
}

# Family -> how its tensors are named. The first that fits takes the tensor; the file is what most of them are.
_MARKS = {
    family: re.compile(pattern)
    for family, pattern in {
        "IP-Adapter": r"^(image_proj(_model)?|ip_adapter|adapter_modules)\.|\.to_[kv]_ip\.",
        "ControlNet": r"^(control_model|input_hint_block|zero_convs|middle_block_out)\."
        r"|^(controlnet_(cond_embedding|down_blocks|mid_block))\.|^lora_controlnet$|^controlnet\.",
        "LoRA": r"^(lora|lycoris)_|^lora\."
        r"|[._]lora[._](down|up|mid|A|B|linear_layer|magnitude_vector|embedding_[AB])([._]|$)"
        r"|\.(hada_[wt]|lokr_[wt]|oft_(blocks|diag)|boft_|dora_scale$)",
        "motion module": r"(^|\.)motion_modules\.|\.temporal_transformer\.",
        "T2I-Adapter": r"^(adapter\.)?body\.\d+\.(block\d|in_conv|body|resnets)\.|^adapter\.conv_in\."
        r"|^transformer_layes\.|^style_embedding$",
        "hypernetwork": r"^(320|640|768|1024|1280)\.",
        "textual inversion": r"^(emb_params|clip_[lg]|<.*>)$|^string_to_(param|token)\.",
        "aesthetic gradients": rf"^{re.escape(ALONE)}$",
        "optimizer": r"(^|\.)(state\.)?\d+\.(step|exp_avg(_sq)?|max_exp_avg_sq|momentum_buffer|square_avg|sum)$",
        "safety checker": r"^((special_care|concept)_embeds(_weights)?$|vision_model\.vision_model\.)",
        "CLIP vision": r"^(clip_vision_model\.|image_encoder\.)?(vision_model|visual|visual_projection)\.",
        "T5": r"^(encoder|decoder)\.block\.\d+\.layer\.",
        "detector": r"^model\.(model\.)?\d+\.(conv|cv\d|m|dfl|bn|attn)\.",
        "upscaler": r"^params(_ema)?\.|^model\.\d+\.(sub\.|weight$|bias$)|^(stylegan_decoder|fuse_convs_dict)\."
        r"|^(conv_first|RRDB_trunk|trunk_conv|body\.\d+\.rdb\d|upconv\d|HRconv|conv_(up\d|hr|body|after_body))\."
        r"|^layers\.\d+\.residual_group\.",
        "TAESD": r"^((taesd_)?(encoder|decoder)\.(layers\.)?)?\d+\.((conv|skip)\.(\d+\.)?)?(weight|bias)$",
        "SD3": r"^(model\.diffusion_model\.)?joint_blocks\.",
        "Flux": r"^(model\.diffusion_model\.)?(double|single)_blocks\.",
        "model": r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.|^(unet|vae)/"
        r"|^model_ema\.diffusion_model",
        "VAE (diffusers)": r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\.",
        "UNet (diffusers)": rf"^{DIFFUSERS_UNET.pattern}",
        "VAE": r"^(encoder|decoder)\.(down|up|mid|conv_in|conv_out|norm_out)\.|^(post_)?quant_conv\.|^quantize\."
        r"|^model_ema\.((en|de)coder|(post_)?quant_conv)",
        "UNet": rf"^{COMPVIS_UNET.pattern}",
        "text encoder": r"^(transformer\.)?(text_model\.)?(embeddings|encoder\.layers|final_layer_norm)\.",
    }.items()
}
OTHER_BASES = ("SD3", "Flux")
UNETS = (UNET, "unet/", f"{EMA}diffusion_model")  # how canonical names of a UNet begin

# What trainings and readers leave in files beside a model, by its canonical name -> why it is not used.
_TEXT_HALF = "not used by the text encoder of v1"
_REMAINS = {
    re.compile(pattern): reason
    for reason, pattern in {
        _TEXT_HALF: r"(cond_stage_model\.(transformer\.)?)?(logit_scale|text_projection(\.weight)?)",
        f"CLIP's vision half, {_TEXT_HALF}": r"(cond_stage_model\.(transformer\.)?)?"
        r"(vision_model|visual_projection)\..*",
        COMPUTED: r"lvlb_weights|alphas|(denoiser\.)?(log_)?sigmas",
        "bookkeeping of a moving average that this model does not keep": r"model_ema\.(decay|num_updates)",
        "the VAE's training loss": r"(first_stage_model\.)?(loss|discriminator|perceptual_loss)\..*",
        "a moving average of the VAE": r"first_stage_model\.model_ema\..*",
        "a moving average of the text encoder": r"cond_stage_model\.model_ema\..*",
        "training state of textual inversion": r"embedding_manager\..*",
        "training state": r"(optimizers?(_states?)?|lr_schedulers?|callbacks|loops|(grad_)?scaler|hyper_parameters"
        r"|native_amp_scaling_state)(\..*)?|(global_)?steps?|epochs?|iterations?|num_updates",
        "a safety checker, which is not run": r"safety_checker\..*",
        "a marker": r"v_pred|ztsnr|(.*\.)?scaled_fp8",
        "for computing in 8 bits, which is not done here": r".*\.(scale_input|input_scale|comfy_quant)",
        PROFILED: r"(.*\.)?total_(ops|params)",
    }.items()
}
_ANY_REMAINS = re.compile("|".join(pattern.pattern for pattern in _REMAINS))


def why_unused(name: str) -> str | None:
    """Say why a tensor with this canonical name is of no use to a model; None if nothing is known of it."""
    if not _ANY_REMAINS.fullmatch(name):  # most names of a file, at once
        return None
    return next(reason for pattern, reason in _REMAINS.items() if pattern.fullmatch(name))


def canonical_infos(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """List what a file holds by its tensors' canonical names."""
    spelling = canonical(infos)
    return {spelling[name]: info for name, info in infos.items()}


def _mark_of(name: str) -> str:
    return next((family for family, pattern in _MARKS.items() if pattern.search(name)), "unknown")


def family_of(infos: Mapping[str, TensorInfo]) -> str:
    """Name the family of model that a file belongs to, by what most of its tensors are: names and shapes.

    A few foreign tensors do not change it; which they are, the account of a load says.

    Returns:
        "v1" or "v1-inpainting" for a full model in the layout of Stable Diffusion v1, of any size; else a key
        of REFUSED.
    """
    found = canonical_infos(infos)
    mark = {name: _mark_of(name) for name in found}
    if "model" in mark.values():  # what remains of a training beside it may look like something else
        found = {name: info for name, info in found.items() if not why_unused(name)}
    marks = Counter(mark[name] for name in found)
    # A ControlNet is a copy of half a UNet, or comes with a whole model, and only some of its tensors are its own.
    if marks["ControlNet"] * 20 > marks.total():
        return "ControlNet"
    unets = sum(name.startswith(UNETS) for name in found)
    base = max(OTHER_BASES, key=marks.__getitem__)  # with text encoders of more tensors than its own
    if marks[base] > unets / 2 and marks[base] * 4 > marks.total():
        return base
    family = max(_MARKS, key=marks.__getitem__)
    if family == "aesthetic gradients" and not _are_vectors(found):
        return "unknown"
    if marks["unknown"] >= marks[family]:
        return "textual inversion" if found and _are_vectors(found) else "unknown"
    return _family_of_model(found, infos) if family == "model" else family


def _family_of_model(infos: Mapping[str, TensorInfo], spelled: Iterable[str]) -> str:
    """Tell v1 from its relatives, whose UNets have the same names: by the text encoder and its width.

    Args:
        infos: by canonical names.
        spelled: the names as the file has them.
    """

    def count(*prefixes: str) -> int:
        return sum(name.startswith(prefixes) for name in infos)

    unets, vaes = count(*UNETS), count(VAE, "vae/")
    texts = {"v2": count(f"{TEXT}model."), "SDXL": count("conditioner.")}
    texts["v1"] = count(TEXT) - texts["v2"]
    text = max(texts, key=texts.__getitem__) if any(texts.values()) else None
    if not unets:
        return "text encoder" if not vaes else "VAE" if text is None else "no UNet"
    widths = Counter(
        info.shape[1]
        for name, info in infos.items()
        if re.search(r"attn2(\.to_k\.|to_k)weight$", name) and len(info.shape) > 1
    )
    width = max(widths, key=widths.__getitem__, default=None)
    # SDXL's UNets take labels; its refiner's text is 1280 wide.
    labelled = count(f"{UNET}label_emb.") > 0 and width in (None, 1280)
    unsure = text is None or any(name.startswith("conditioner.") for name in spelled)
    if text == "SDXL" or (unsure and (width == 2048 or labelled)):
        return "SDXL"
    if text == "v2" or (text is None and width == 1024):
        return "v2"
    if not vaes and text is None:
        return "UNet"
    return {(9,): "v1-inpainting", (5,): "depth", (8,): "pix2pix"}.get(first_shape(infos)[1:2], "v1")


def first_shape(infos: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Give the shape of a UNet's first convolution, (width, channels, 3, 3), by its canonical name; () if absent."""
    first = f"{UNET}input_blocks.0.0.weight"
    for name in (first, "unet/conv_in.weight", ema_name(first)):
        if name in infos:
            return infos[name].shape
    return ()


def _are_vectors(infos: Mapping[str, TensorInfo]) -> bool:
    """Tell whether all tensors are vectors as wide as a text encoder under plain words: a token's embedding."""
    return all(
        "." not in name and 1 <= len(info.shape) <= 2 and info.shape[-1] in (768, 1024, 1280)
        for name, info in infos.items()
    )
