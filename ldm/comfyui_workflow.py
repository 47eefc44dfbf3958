"""ComfyUI's workflow, the graph as its page draws it, made into the graph that ran (see ldm.comfyui).

Nodes list their values without names, in the order of their widgets: those of the usual nodes are written down here,
for others the names that newer pages put beside their inputs are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

MOST_NODES = 3000
MOST_HOPS = 40  # through nodes that are switched off
_AFTER = "control_after_generate"  # stands behind a seed, and is no input
_MUTED, _BYPASSED = 2, 4

WIDGETS: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", _AFTER, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", _AFTER, "steps", "cfg", "sampler_name", "scheduler", "start_at_step"),
        *("end_at_step", "return_with_leftover_noise"),
    ),
    "SamplerCustom": ("add_noise", "noise_seed", _AFTER, "cfg"),
    "RandomNoise": ("noise_seed", _AFTER),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "CFGGuider": ("cfg",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CheckpointLoader": ("config_name", "ckpt_name"),
    "VAELoader": ("vae_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "ImageScale": ("upscale_method", "width", "height", "crop"),
    "ImageScaleBy": ("upscale_method", "scale_by"),
    "LoadImage": ("image", "upload"),
    "LoadImageMask": ("image", "channel", "upload"),
    "VAEEncodeForInpaint": ("grow_mask_by",),
    "ControlNetLoader": ("control_net_name",),
    "ControlNetApply": ("strength",),
    "ControlNetApplyAdvanced": ("strength", "start_percent", "end_percent"),
    "ConditioningAverage": ("conditioning_to_strength",),
    "ConditioningSetArea": ("width", "height", "x", "y", "strength"),
    "ConditioningSetTimestepRange": ("start", "end"),
    "PrimitiveNode": ("value", _AFTER),
}


def to_graph(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Make {id: {"class_type", "inputs"}} of a workflow; what is muted is left out, what is bypassed passed through."""
    listed = workflow.get("nodes")
    nodes = {
        str(node["id"]): node
        for node in (islice(listed, MOST_NODES) if isinstance(listed, list) else ())
        if isinstance(node, dict) and isinstance(node.get("id"), int | str)
    }
    origins = _origins(workflow.get("links"))

    def origin(link: Any) -> list[Any] | None:
        for _ in range(MOST_HOPS):
            node, slot = origins.get(link if isinstance(link, int) else None, (None, 0))
            if node not in nodes or nodes[node].get("mode") == _MUTED:
                return None
            if nodes[node].get("mode") != _BYPASSED:
                return [node, slot]
            link = _passed(nodes[node], slot)
        return None

    graph = {}
    for key, node in nodes.items():
        if node.get("mode") in (_MUTED, _BYPASSED):
            continue
        inputs = _widgets(node)
        for one in _dicts(node.get("inputs")):
            if isinstance(one.get("name"), str) and (source := origin(one.get("link"))) is not None:
                inputs[one["name"]] = source
        graph[key] = {"class_type": node.get("type"), "inputs": inputs}
    return graph


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in islice(value, 200) if isinstance(one, dict)] if isinstance(value, list) else []


def _origins(links: Any) -> dict[int, tuple[str, Any]]:
    """Tell of each link from which node and slot it comes; links are lists, or objects in newer files."""
    found = {}
    for one in islice(links, 10 * MOST_NODES) if isinstance(links, list) else ():
        if isinstance(one, dict):
            one = [one.get("id"), one.get("origin_id"), one.get("origin_slot")]
        if isinstance(one, list) and len(one) >= 3 and isinstance(one[0], int):
            found[one[0]] = (str(one[1]), one[2]) if isinstance(one[1], int | str) else (None, 0)
    return found


def _passed(node: Mapping[str, Any], slot: Any) -> Any:
    """Give the link that a bypassed node hands on at an output: its first input of the same type."""
    outputs = _dicts(node.get("outputs"))
    wanted = outputs[slot].get("type") if type(slot) is int and 0 <= slot < len(outputs) else None
    return next((one.get("link") for one in _dicts(node.get("inputs")) if one.get("type") == wanted), None)


def _widgets(node: Mapping[str, Any]) -> dict[str, Any]:
    """Name the values of a node."""
    values, kind = node.get("widgets_values"), node.get("type")
    if isinstance(values, dict):
        return dict(islice(values.items(), 100))
    if not isinstance(values, list):
        return {}
    names = WIDGETS.get(kind) if isinstance(kind, str) else None
    if names is None:
        names = []
        for one in _dicts(node.get("inputs")):
            if isinstance(one.get("name"), str) and isinstance(one.get("widget"), dict):
                names += [one["name"], *([_AFTER] if one["name"] in ("seed", "noise_seed") else [])]
    found = dict(zip(names, values, strict=False))
    found.pop(_AFTER, None)
    return found
