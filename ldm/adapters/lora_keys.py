"""The keys of a LoRA's file: which part of which module a tensor is, whatever program wrote the file.

A key is a prefix (which network), a module's name (CompVis's or diffusers', with dots or underscores) and a role (what
the tensor is to the change of the weight): `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`. Those of
kohya's sd-scripts, LyCORIS, ComfyUI, PEFT and of diffusers since 2023 differ in nothing else, and so do the products of
converters, which stack prefixes and mix dots and underscores.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ldm.checkpoints import TensorInfo
from ldm.checkpoints.key_mapping import COMPVIS_UNET, TEXT, UNET, unet_to_diffusers

Network = Literal["unet", "text"]
_TEXT_MODEL = re.compile(rf"({re.escape(TEXT)})?(transformer\.)?text_model\.")

# Words for a pair of factors -> the roles that the rest of the code knows.
_FACTORS = {"down": "lora_down", "up": "lora_up", "mid": "lora_mid", "A": "lora_down", "B": "lora_up"}
MAGNITUDE = "magnitude"  # PEFT's word for DoRA's lengths, which are those of rows whatever their shape
_PLAIN = (
    "alpha|dora_scale|scale|bias|diff|diff_b|w_norm|b_norm|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|hada_t1|hada_t2"
    "|lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b|lokr_t2|oft_blocks|oft_diag|rescale|on_input|weight"
)
_ROLE = re.compile(
    r"(?P<body>.+?)(?:"
    # diffusers' `_lora.down` and `.lora.down`, its text encoder's `.lora_linear_layer.down`, PEFT's `.lora_A.default`
    r"[._]lora[._](?:linear_layer[._])?(?P<factor>down|up|mid|A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|[._]lora[._]magnitude_vector(?:\.default(?:_\d+)?)?(?:\.weight)?"
    r"|\.(?P<glora>[ab][12])\.weight"
    rf"|(?:[._]lora)?\.(?P<plain>{_PLAIN}))"
)
_PREFIX = re.compile(
    r"base_model\.model\."
    r"|(?P<unet>(?:(?:lora|lycoris)_)?unet[._]|(?:lora_)?(?:model[._])?diffusion_model[._])"
    r"|(?P<text>(?:(?:lora|lycoris)_)?(?:te1?|text_encoders?)[._]|clip_l[._]|cond_stage_model[._]|text_model[._]"
    r"|transformer[._](?=text_model[._]))"
    r"|(?:lora|lycoris)_(?=[a-z])"
)
_TEXT_BODY = re.compile(r"(encoder_layers|embeddings|final_layer_norm)(_|$)")
_PROCESSOR = re.compile(r"_processor(?=_|$)")


@dataclass(frozen=True)
class Key:
    """A key taken apart.

    Attributes:
        network: "unet", "text", or None where the key does not say.
        body: the module's name with underscores throughout.
        role: what the tensor is: "lora_down", "alpha", "hada_w1_a", "a1" and so on.
        module: the key without its role, as the file has it.
    """

    network: Network | None
    body: str
    role: str
    module: str


def split_key(name: str) -> Key | None:
    """Take a key apart; None if it ends in no role that is known."""
    if (found := _ROLE.fullmatch(name)) is None:
        return None
    role = _FACTORS.get(found["factor"], found["glora"] or found["plain"])
    module = found["body"]
    network: Network | None = None
    body = module
    while prefix := _PREFIX.match(body):
        network = "unet" if prefix["unet"] else "text" if prefix["text"] else network
        body = body[prefix.end() :]
    body = _PROCESSOR.sub("", body.replace(".", "_"))
    if network is None and _TEXT_BODY.match(body):  # PEFT's prefix says nothing; no UNet has such a module
        network = "text"
    return Key(network, body, role or MAGNITUDE, module)


class ModuleNames:
    """The modules of a network by every name that files give them.

    Args:
        parameters: the names of its parameters, as CompVis has them: those of a whole model, whose UNet is
            `model.diffusion_model.` and whose text encoder `cond_stage_model.transformer.`; or those of a UNet, or a
            text encoder, alone. Others are of no use here and left aside.

    Attributes:
        has: the networks that are there.
    """

    def __init__(self, parameters: Iterable[str]):
        self._modules: dict[Network, dict[str, str]] = {"unet": {}, "text": {}}
        unet: dict[str, str] = {}
        for name in parameters:
            bare = name.removeprefix(UNET)
            if bare != name or COMPVIS_UNET.match(name):
                unet[bare] = name
                self._add("unet", bare, name)
            elif found := _TEXT_MODEL.match(name):
                self._add("text", name[found.end() :], name)
        for bare, theirs in unet_to_diffusers(unet).items():
            self._add("unet", theirs, unet[bare])
        self.has = {network for network, modules in self._modules.items() if modules}

    def _add(self, network: Network, theirs: str, ours: str) -> None:
        body = theirs.rpartition(".")[0].replace(".", "_")
        module = ours.rpartition(".")[0]
        self._modules[network][body] = module
        # diffusers' old names, and kohya's of some versions, have no place for the 0 of to_out.0.
        if body.endswith("_to_out_0"):
            self._modules[network].setdefault(body.removesuffix("_0"), module)

    def find(self, network: Network | None, body: str) -> tuple[Network, str] | None:
        """Give a module's network and its path, such as "model.diffusion_model.time_embed.0"; None if there is none."""
        where: tuple[Network, ...] = (network,) if network else ("unet", "text")
        return next(((one, self._modules[one][body]) for one in where if body in self._modules[one]), None)


@lru_cache(maxsize=4)
def module_names(parameters: tuple[str, ...]) -> ModuleNames:
    """ModuleNames, made once for a model that several files are for."""
    return ModuleNames(parameters)


# Base model -> how keys look that only its LoRAs have. The first that fits is named.
_FOREIGN = {
    base: re.compile(pattern)
    for base, pattern in {
        "Flux": r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]",
        "Stable Diffusion 3": r"(^|[._])joint_blocks[._]"
        r"|transformer_blocks[._]\d+[._](attn[._]|ff_context|norm1_context)",
        "Stable Diffusion XL": r"(^|[._])(te2|text_encoder_2|clip_g|add_embedding|label_emb)[._]"
        r"|transformer_blocks[._][1-9]\d*[._]attn[12]",
        "AnimateDiff's motion modules": r"(^|[._])(motion_modules|temporal_transformer)[._]",
        "Stable Diffusion v2": r"text_model[._]encoder[._]layers[._](1[2-9]|2\d)[._]",
    }.items()
}
# Width of the text that a UNet's second attentions read -> the base model that has it.
CONTEXT_WIDTHS = {
    1024: "Stable Diffusion v2",
    2048: "Stable Diffusion XL",
    1280: "Stable Diffusion XL's refiner",
}
_READS_TEXT = re.compile(r"attn2[._](?:processor[._])?to_[kv]$")
_INPUT_ROLES = ("lora_down", "hada_w1_b", "diff")


def foreign_base(infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """Name the base model of a LoRA that is not for Stable Diffusion v1, and what shows it; None if nothing does.

    Keys are looked at first, then the width of the text that the attentions read.
    """
    for base, pattern in _FOREIGN.items():
        for name in infos:
            if pattern.search(name):
                return base, name
    if (found := _read_text(infos)) and found[1] in CONTEXT_WIDTHS:
        name, width = found
        return CONTEXT_WIDTHS[width], f"{name} of width {width}"
    return None


def text_width(infos: Mapping[str, TensorInfo]) -> int | None:
    """Give the width of the text that the UNet of a LoRA reads; None where it changes nothing that reads text."""
    found = _read_text(infos)
    return found[1] if found else None


def _read_text(infos: Mapping[str, TensorInfo]) -> tuple[str, int] | None:
    """Find a tensor whose width is that of the text; one of another base model's goes before others."""
    found = None
    for name, info in infos.items():
        key = split_key(name)
        if key is None or not _READS_TEXT.search(key.body) or key.role not in _INPUT_ROLES:
            continue
        if len(info.shape) > 1 and (found is None or info.shape[1] in CONTEXT_WIDTHS):
            found = name, info.shape[1]
            if info.shape[1] in CONTEXT_WIDTHS:
                break
    return found
