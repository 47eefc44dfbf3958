"""What an adapter's file holds: family, base model, rank, what it says of itself.

All of it comes from the names and shapes of its tensors. It reads no more than the single numbers of a file, so that
files for other base models are described, too.
"""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.adapters import lora_weights
from ldm.adapters.controlnet import ControlNetFile
from ldm.adapters.controls import CONTEXTS
from ldm.adapters.embedding import CLIP_WIDTH, WIDTHS, Embedding
from ldm.adapters.ip_adapter_file import PROJECTION, IPAdapterFile
from ldm.adapters.lora import NUMBERS, LoraFile, has_own_role
from ldm.adapters.lora_keys import CONTEXT_WIDTHS, MAGNITUDE, Key, foreign_base, split_key, text_width
from ldm.adapters.lora_weights import Parts, UnfitError
from ldm.adapters.style_adapter import MARK, StyleAdapterFile
from ldm.adapters.t2i_adapter import STYLE, T2IAdapterFile
from ldm.checkpoints import TensorInfo, Weights, open_weights
from ldm.checkpoints.families import family_of
from ldm.checkpoints.key_mapping import CONTROL
from ldm.errors import LdmError, MismatchError, escaped
from ldm.modules.diffusionmodules.t2i_adapter import HINT_FACTOR

MOST_TAGS = 8
# What a file says of itself -> our word; the first that is there counts.
SAYS = {
    "name": ("ss_output_name", "modelspec.title"),
    "made for": ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"),
    "made with": ("ss_network_module", "modelspec.implementation"),
    "network_dim": ("ss_network_dim",),
    "network_alpha": ("ss_network_alpha",),
    "trigger words": ("modelspec.trigger_phrase", "trigger_phrase", "ss_trigger_words"),
}
NETWORKS = {"unet": "UNet", "text": "text encoder", None: "network not said"}


@dataclass
class AdapterSummary:
    """What a file of LoRA, textual inversion, ControlNet, T2I-Adapter or IP-Adapter holds.

    Attributes:
        kind: "LoRA", "textual inversion", or which ControlNet, T2I-Adapter or IP-Adapter, in words.
        families: what people call the ways in which it changes weights -> how many modules.
        base: the base model that it is for, in words.
        ranks, alphas: those of its modules, sorted, without repeats.
        networks: in words -> how many modules.
        vectors: name -> (how many, width), of textual inversion.
        sizes: further rows, of what its tensors' names and shapes say.
        says: what the file says of itself.
        use: how it is used.
        problem: why it would not load for Stable Diffusion v1.
    """

    kind: str
    families: Counter[str] = field(default_factory=Counter)
    base: str = ""
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    networks: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    use: str = "--lora, or ldm.adapters.LoRA"
    problem: LdmError | None = None

    def __str__(self) -> str:
        lines = [f"  adapter   {_counted(self.families) or self.kind}"]
        lines.append(f"  for       {self.base}")
        if self.ranks:
            lines.append(f"  rank      {_range(self.ranks)}; alpha {_range(self.alphas) or 'not said'}")
        if self.networks:
            lines.append(f"  modules   {_counted(self.networks)}")
        for name, (count, width) in self.vectors.items():
            lines.append(f"  vectors   {escaped(name, 60)}: {count} of width {width}")
        lines += [f"  {key:<9} {value}" for key, value in self.sizes.items()]
        lines += [f"  {key:<14}{escaped(value, 200)}" for key, value in self.says.items()]
        done = f"  would load: use it with {self.use}"
        lines.append(done if self.problem is None else f"  would not load: {self.problem}")
        return "\n".join(lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}" if values else ""


def inspect_adapter(path: str | os.PathLike, ignore: str | Iterable[str] = ()) -> AdapterSummary | None:
    """Describe an adapter's file; None if it is none of those that AdapterSummary describes.

    Args:
        ignore: as for LoraFile.

    Raises:
        AbsentError, FormatError, UnsafeFileError: it cannot be read at all.
    """
    with contextlib.closing(open_weights(path)) as weights:
        kind = family_of(weights.infos)
        if kind == "textual inversion":
            return _of_embedding(path, weights)
        if kind in NETWORKS_BESIDE:
            describe, reader = NETWORKS_BESIDE[kind]
            summary = describe(weights.infos)
            summary.says = says_of(weights.metadata)
            with _problem_of(summary):
                reader(weights.infos)(path)
            return summary
        keys = {name: split_key(name) for name in weights.infos}
        if kind != "LoRA" and not (kind == "unknown" and any(map(has_own_role, keys))):
            return None
        summary = _of_lora(weights, keys)
    with _problem_of(summary):
        LoraFile(path, ignore)
    return summary


@contextlib.contextmanager
def _problem_of(summary: AdapterSummary) -> Iterator[None]:
    """Write down why an adapter does not load."""
    try:
        yield
    except LdmError as error:
        summary.problem = summary.problem or error


def _of_lora(weights: Weights, keys: Mapping[str, Key | None]) -> AdapterSummary:
    summary = AdapterSummary("LoRA", base=base_of(weights), says=says_of(weights.metadata))
    modules: dict[tuple[Any, str], dict[str, torch.Tensor]] = {}
    ranks, alphas, networks = set(), set(), Counter()
    for name, key in keys.items():
        if key is not None:
            parts = modules.setdefault((key.network, key.body), {})
            info = weights.infos[name]
            role = "dora_scale" if key.role == MAGNITUDE else key.role
            is_number = role in NUMBERS and info.numel == 1
            parts[role] = weights.read(name) if is_number else torch.empty(info.shape, device="meta")
    for (network, _), parts in modules.items():
        summary.families[family_name(parts)] += 1
        networks[network] += 1
        if (rank := _rank_of(parts)) is not None:
            ranks.add(rank)
        if "alpha" in parts and parts["alpha"].device.type != "meta":
            alphas.add(float(parts["alpha"]))
    summary.networks = {words: networks[one] for one, words in NETWORKS.items() if networks[one]}
    summary.ranks, summary.alphas = sorted(ranks), sorted(alphas)
    return summary


def family_name(parts: Parts) -> str:
    """Say what people call the way in which a module's tensors change its weight.

    LoRA of a convolution with a kernel is LoCon; what has lengths besides is DoRA.
    """
    try:
        family = lora_weights.family_of(parts)
    except UnfitError:
        return "unknown"
    name = family.name
    down = parts.get("lora_down")
    has_kernel = "lora_mid" in parts or (down is not None and down.dim() == 4 and down[0, 0].numel() > 1)
    if family is lora_weights.LORA and has_kernel:
        name = "LoCon"
    if "dora_scale" in parts:
        name = "DoRA" if name == "LoRA" else f"{name} with DoRA"
    return name


def _rank_of(parts: Parts) -> int | None:
    try:
        return lora_weights.family_of(parts).rank(parts)
    except UnfitError:
        return None


def base_of(weights: Weights) -> str:
    """Say which base model a LoRA is for: by names that only one has, or the width of the text that its UNet reads."""
    if found := foreign_base(weights.infos):
        return found[0]
    width = text_width(weights.infos)
    if width in (None, 768):
        return "Stable Diffusion v1" + ("" if width else ", as far as its names say")
    return CONTEXT_WIDTHS.get(width, f"a model of Stable Diffusion v1's layout whose text has width {width}")


def says_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Pick what a file says of itself; trigger words are those it names, else the tags it was trained on most."""
    says = {
        word: next((metadata[key] for key in keys if metadata.get(key)), "") for word, keys in SAYS.items()
    }
    if not says["trigger words"] and (tags := _tags(metadata.get("ss_tag_frequency", ""))):
        says["most tags"] = ", ".join(tags)
    return {word: value for word, value in says.items() if value}


def _tags(text: str) -> list[str]:
    """List the tags of most pictures in kohya's {folder: {tag: count}}; [] if it is no such text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in found.values() if isinstance(found, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(MOST_TAGS)]


def _of_embedding(path: str | os.PathLike, weights: Weights) -> AdapterSummary:
    vectors = {
        name.removeprefix("string_to_param."): (info.numel // info.shape[-1], info.shape[-1])
        for name, info in weights.infos.items()
        if info.dtype.is_floating_point and info.numel and len(info.shape) in (1, 2)
    }
    widths = {width for _, width in vectors.values()}
    summary = AdapterSummary("textual inversion", says=says_of(weights.metadata), vectors=vectors)
    summary.use = "--embedding, or ldm.adapters.Embedding"
    summary.base = _base_of_widths(widths)
    # Of a model with another text encoder than those of the known ones, as the model in the box.
    own = next(iter(widths)) if len(widths) == 1 and not widths & WIDTHS.keys() else CLIP_WIDTH
    with _problem_of(summary):
        summary.says |= {"in prompts": " or ".join(Embedding(path, width=own).names)}
    return summary


def _base_of_widths(widths: Iterable[int]) -> str:
    widths = set(widths)
    if {768, 1280} <= widths:
        return "Stable Diffusion XL"
    return " and ".join(WIDTHS.get(width, f"a text encoder of width {width}") for width in sorted(widths))


# --- networks beside the UNet ---------------------------------------------------------------------------------------

Infos = Mapping[str, TensorInfo]


def _base_of_context(width: int | None) -> str:
    if width is None:
        return "a UNet that reads no text"
    return CONTEXTS.get(width, f"a model of Stable Diffusion v1's layout whose text has width {width}")


def _refuse_other_bases(summary: AdapterSummary) -> AdapterSummary:
    if summary.base in CONTEXTS.values() and summary.base != CONTEXTS[CLIP_WIDTH]:
        summary.problem = MismatchError(f"it is for {summary.base}; one for Stable Diffusion v1 is wanted")
    return summary


def _of_control(infos: Infos) -> AdapterSummary:
    beside = sum(not name.startswith(CONTROL) for name in infos)
    prefix = CONTROL if beside < len(infos) else ""
    own = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    downs = [info.shape for name, info in own.items() if name.endswith(".down") and info.shape]
    kind = "ControlNet"
    if downs or "lora_controlnet" in own:
        kind = "Control-LoRA, put together with the UNet's weights"
    elif "difference" in own:
        kind = "ControlNet as a difference, put together with the UNet's weights"
    is_diffusers = any(name.startswith("controlnet_") for name in own)
    layout = "diffusers' names" if is_diffusers else "cldm's names"
    if prefix:
        layout += f", {prefix}*"
    sizes = {"layout": layout, "tensors": f"{len(own)}"}
    if prefix and beside:
        sizes["tensors"] += f", beside {beside} of a whole model that are not used"
    if downs:
        sizes["rank"] = _range(sorted({shape[0] for shape in downs}))
    stem = own.get("controlnet_cond_embedding.conv_in.weight", own.get("input_hint_block.0.weight"))
    if stem is not None and len(stem.shape) > 1:
        sizes["hint"] = f"a picture of {stem.shape[1]} channels"
    reads = re.compile(r"attn2\.to_k\.(weight|down)$")
    widths = [info.shape[1] for name, info in own.items() if reads.search(name) and len(info.shape) > 1]
    base = _base_of_context(max(widths, default=None))
    if any(re.search(r"(^|\.)(add_embedding|label_emb)\.", name) for name in own):
        base = "Stable Diffusion XL"
    summary = AdapterSummary(
        kind, base=base, sizes=sizes, use="--control and --hint, or ldm.adapters.ControlNet"
    )
    return _refuse_other_bases(summary)


def _of_t2i(infos: Infos) -> AdapterSummary:
    own = {name.removeprefix("adapter."): info for name, info in infos.items()}
    if any(name.startswith(STYLE) for name in own):
        shape = own[MARK].shape if MARK in own else ()
        sizes = {"tokens": f"{shape[1]}, of CLIP's states of width {shape[2]}"} if len(shape) == 3 else {}
        return AdapterSummary(
            "T2I-Adapter of style",
            base=_base_of_context(
                own["proj"].shape[1] if "proj" in own and len(own["proj"].shape) > 1 else None
            ),
            sizes=sizes,
            use="ldm.adapters.StyleAdapter with a picture and CLIP's vision model",
        )
    kind = "light" if any(re.match(r"body\.\d+\.out_conv\.", name) for name in own) else "full"
    first = own.get("conv_in.weight", own.get("body.0.in_conv.weight"))
    channels = first.shape[1] // HINT_FACTOR**2 if first is not None and len(first.shape) > 1 else 0
    sizes = {"hint": f"a picture of {channels} channels"} if channels in (1, 3) else {}
    base = CONTEXTS[CLIP_WIDTH] if channels in (1, 3) else "Stable Diffusion XL"
    summary = AdapterSummary(
        f"T2I-Adapter, {kind}",
        base=base,
        sizes=sizes,
        use="--t2i-adapter and --hint, or ldm.adapters.T2IAdapter",
    )
    return _refuse_other_bases(summary)


# Tensors of an IP-Adapter's projection that only one kind has -> kind; the first that is there counts.
_IP_KINDS = {
    "perceiver_resampler.proj_in.weight": "FaceID plus",
    "latents": "plus",
    "proj.3.weight": "full-face",
    "proj.2.weight": "FaceID",
    "proj.weight": "plain",
}


def _of_ip(infos: Infos) -> AdapterSummary:
    given = {n.removeprefix(PROJECTION): one.shape for n, one in infos.items() if n.startswith(PROJECTION)}
    own = next((sign for sign in _IP_KINDS if sign in given), "")
    kind = _IP_KINDS.get(own, "of an unknown kind")
    layers = [
        info.shape for name, info in infos.items() if name.endswith("_ip.weight") and len(info.shape) == 2
    ]
    width = layers[0][1] if layers else None
    sizes: dict[str, str] = {"layers": f"{len(layers) // 2} attentions"}
    if kind == "plain" and width:
        sizes["tokens"] = f"{given[own][0] // width}, of CLIP's embeddings of width {given[own][1]}"
    elif kind == "full-face":
        sizes["tokens"] = f"one for each of CLIP's states, of width {given['proj.0.weight'][1]}"
    elif kind == "plus" and "proj_in.weight" in given:
        sizes["tokens"] = f"{given[own][1]}, of CLIP's states of width {given['proj_in.weight'][1]}"
    elif kind.startswith("FaceID") and "proj.0.weight" in given and width:
        face = f"a face's embedding of width {given['proj.0.weight'][1]}"
        also = f" and CLIP's states of width {given[own][1]}" if kind == "FaceID plus" else ""
        sizes["tokens"] = f"{given['proj.2.weight'][0] // given['norm.weight'][0]}, of {face}{also}"
    ranks = {
        info.shape[0] for name, info in infos.items() if name.endswith("_lora.down.weight") and info.shape
    }
    if ranks:
        sizes["LoRA"] = f"rank {_range(sorted(ranks))}, comes along"
    summary = AdapterSummary(
        f"IP-Adapter, {kind}",
        base=_base_of_context(width),
        sizes=sizes,
        use="--ip-adapter and --ip-image, or ldm.adapters.IPAdapter",
    )
    return _refuse_other_bases(summary)


def _reads_style(infos: Infos) -> bool:
    return any(name.startswith(STYLE) for name in infos)


# Family -> (how it is described, what reads it).
NETWORKS_BESIDE: dict[str, tuple[Callable[[Infos], AdapterSummary], Callable[[Infos], type]]] = {
    "ControlNet": (_of_control, lambda infos: ControlNetFile),
    "T2I-Adapter": (_of_t2i, lambda infos: StyleAdapterFile if _reads_style(infos) else T2IAdapterFile),
    "IP-Adapter": (_of_ip, lambda infos: IPAdapterFile),
}
