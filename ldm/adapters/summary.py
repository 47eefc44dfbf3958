"""What an adapter's file holds: family, base model, rank, what it says of itself.

All of it comes from the names and shapes of its tensors. It reads no more than the single numbers of a file, so that
files for other base models are described, too.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.adapters import lora_weights
from ldm.adapters.embedding import CLIP_WIDTH, WIDTHS, Embedding
from ldm.adapters.lora import NUMBERS, LoraFile, has_own_role
from ldm.adapters.lora_keys import CONTEXT_WIDTHS, MAGNITUDE, Key, foreign_base, split_key, text_width
from ldm.adapters.lora_weights import Parts, UnfitError
from ldm.checkpoints import Weights, open_weights
from ldm.checkpoints.families import family_of
from ldm.errors import LdmError, escaped

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
    """What a file of LoRA or textual inversion holds.

    Attributes:
        kind: "LoRA" or "textual inversion".
        families: what people call the ways in which it changes weights -> how many modules.
        base: the base model that it is for, in words.
        ranks, alphas: those of its modules, sorted, without repeats.
        networks: in words -> how many modules.
        vectors: name -> (how many, width), of textual inversion.
        says: what the file says of itself.
        problem: why it would not load for Stable Diffusion v1.
    """

    kind: str
    families: Counter[str] = field(default_factory=Counter)
    base: str = ""
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    networks: dict[str, int] = field(default_factory=dict)
    vectors: dict[str, tuple[int, int]] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
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
        lines += [f"  {key:<14}{escaped(value, 200)}" for key, value in self.says.items()]
        option = (
            "--lora, or ldm.adapters.LoRA"
            if self.kind == "LoRA"
            else "--embedding, or ldm.adapters.Embedding"
        )
        done = f"load: use it with {option}"
        lines.append(f"  would not load: {self.problem}" if self.problem is not None else f"  would {done}")
        return "\n".join(lines)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items())


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}" if values else ""


def inspect_adapter(path: str | os.PathLike, ignore: str | Iterable[str] = ()) -> AdapterSummary | None:
    """Describe a file of LoRA and its kin, or of textual inversion; None if it is neither.

    Args:
        ignore: as for LoraFile.

    Raises:
        AbsentError, FormatError, UnsafeFileError: it cannot be read at all.
    """
    with contextlib.closing(open_weights(path)) as weights:
        kind = family_of(weights.infos)
        if kind == "textual inversion":
            return _of_embedding(path, weights)
        keys = {name: split_key(name) for name in weights.infos}
        if kind != "LoRA" and not (kind == "unknown" and any(map(has_own_role, keys))):
            return None
        summary = _of_lora(weights, keys)
    try:
        LoraFile(path, ignore)
    except LdmError as error:
        summary.problem = error
    return summary


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
    summary.base = _base_of_widths(widths)
    # Of a model with another text encoder than those of the known ones, as the model in the box.
    own = next(iter(widths)) if len(widths) == 1 and not widths & WIDTHS.keys() else CLIP_WIDTH
    try:
        summary.says |= {"in prompts": " or ".join(Embedding(path, width=own).names)}
    except LdmError as error:
        summary.problem = error
    return summary


def _base_of_widths(widths: Iterable[int]) -> str:
    widths = set(widths)
    if {768, 1280} <= widths:
        return "Stable Diffusion XL"
    return " and ".join(WIDTHS.get(width, f"a text encoder of width {width}") for width in sorted(widths))
