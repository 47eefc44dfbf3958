"""ComfyUI's graph of nodes, read for what other programs have, too: prompts, seed, steps, size, files, a second pass.

A graph is {id: {"class_type": name, "inputs": {name: value or [id, slot]}}}; a pair is a link to the output of another
node. Hundreds of packages add nodes of their own, so links are followed by what inputs are called, not by class. Every
walk is bounded: graphs come from strangers, with loops, and with more paths than nodes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ldm.errors import shown

MAX_VISITS = 3000  # in one graph; the largest public workflows have some hundreds of nodes
MAX_INPUTS = 100  # of a node
MAX_HOPS = 40  # from a node to what it needs
MAX_CHARACTERS = 200_000  # of a text that is put together
MAX_NAMED = 20  # nodes that are named as not read

# Our names, and what the inputs that hold them are called.
_FIELDS = {
    "seed": ("seed", "noise_seed"),
    "steps": ("steps",),
    "guidance_scale": ("cfg",),
    "sampler": ("sampler_name",),
    "spacing": ("scheduler",),
    "strength": ("denoise",),
}
# Nodes in which the SamplerCustom family keeps what KSampler has itself.
_PARTS = ("noise", "guider", "sampler", "sigmas")
# Inputs of nodes that hold one value, or one text, and of those that make or change conditioning.
_VALUES = ("value", "int", "float", "number")
_TEXTS = ("text", "prompt", "string", "value", "text_g", "t5xxl", "populated_text", "wildcard_text")
_CONDITIONS = (
    "conditioning",
    "conditioning_1",
    "conditioning_2",
    "conditioning_to",
    "conditioning_from",
    "cond1",
)
_NO_LATENTS = ("model", "clip", "vae", "control_net", "positive", "negative")
_PIECE = re.compile(r"(?:text|string|str|prompt)[_ ]?(?:[a-z]|\d{1,3})")
_DELIMITERS = ("delimiter", "separator")
# Classes whose whole effect is in what is read, wherever they stand; all others that the picture depends on are named.
_READ = {
    *(
        "KSampler",
        "KSamplerAdvanced",
        "KSamplerSelect",
        "SamplerCustom",
        "SamplerCustomAdvanced",
        "RandomNoise",
    ),
    *(
        "BasicScheduler",
        "BasicGuider",
        "CFGGuider",
        "CheckpointLoaderSimple",
        "CheckpointLoader",
        "VAELoader",
    ),
    *(
        "LoraLoader",
        "LoraLoaderModelOnly",
        "CLIPSetLastLayer",
        "CLIPTextEncode",
        "EmptyLatentImage",
        "VAEDecode",
    ),
    *("VAEEncode", "SetLatentNoiseMask", "LoadImage", "LoadImageMask", "SaveImage"),
    *(
        "PreviewImage",
        "Reroute",
        "PrimitiveNode",
        "Note",
        "MarkdownNote",
        "VAEDecodeTiled",
    ),
}
# Inputs of nodes in _READ that change the picture, and the value with which they do not; no option of ours says them.
_OF_READ = {"batch_size": 1, "add_noise": "enable", "return_with_leftover_noise": "disable"}
# Ways to enlarge latents and pictures between two samplers: ComfyUI's -> ours.
_LATENT_UPSCALERS = {
    "nearest-exact": "latent nearest-exact",
    "bilinear": "latent",
    "bicubic": "latent bicubic",
}
_PICTURE_UPSCALERS = {"lanczos": "lanczos", "nearest-exact": "nearest"}
_SECOND = {name: f"hires_{name}" for name in ("steps", "strength", "sampler", "spacing")}


def read_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Take what a picture's graph says by our names; values are the graph's own, of whatever type.

    Of two samplers in a row, the second on the enlarged latents or picture of the first, the second is the second pass
    of hires fix; of several others the first speaks, as in A1111's texts.

    Returns:
        values of our options; model, vae and image (files' names); mode, where a picture is begun with; loras, a list
        of (file name, weight, weight in the text encoder); and nodes: those that the picture depends on and whose
        effect is not in the rest, "class (id)" each.
    """
    return _Graph(graph).read()


class _Graph:
    """A graph, and how often its nodes were visited."""

    def __init__(self, graph: Mapping[str, Any]):
        nodes = {key: node for key, node in graph.items() if isinstance(node, dict)}
        self.nodes = {
            key: dict(islice(node["inputs"].items(), MAX_INPUTS))
            for key, node in nodes.items()
            if isinstance(node.get("inputs"), dict)
        }
        classes = {key: node.get("class_type") for key, node in nodes.items()}
        self.kinds = {key: kind for key, kind in classes.items() if isinstance(kind, str)}
        self.zeroed = {key for key, kind in self.kinds.items() if "ZeroOut" in kind}
        self.used: set[str] = set()  # nodes that a value or a text was taken through
        self.visits = 0

    def read(self) -> dict[str, Any]:
        """Start at the sampler."""
        first = self.sampler()
        own = {} if first is None else self.with_parts(self.nodes[first])
        found = self.sampling(own)
        for name, roles in (("prompt", ("positive", *_CONDITIONS)), ("negative_prompt", ("negative",))):
            link = next((own[role] for role in roles if role in own), None)
            found[name] = self.prompt(link, roles[0])
        found |= self.size(own.get("latent_image"))
        found |= self.start(own.get("latent_image")) | self.files(own)
        if "mode" not in found and found["strength"] == 1:
            del found["strength"]  # of no picture
        second, notes = self.second(first, found)
        found |= second | {"nodes": [*notes, *self.unread()] or None}
        return {name: value for name, value in found.items() if value is not None}

    def sampling(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Take what a sampler says of itself."""
        found = {name: self.value(own, theirs) for name, theirs in _FIELDS.items()}
        if found["guidance_scale"] is None and "conditioning" in own:
            found["guidance_scale"] = 1.0  # a guider of one prompt
        first, steps = self.value(own, ("start_at_step",)), found["steps"]
        if isinstance(first, int) and isinstance(steps, int) and 0 < first < steps:
            found["strength"] = 1 - first / steps  # KSamplerAdvanced says how many steps a picture is spared
        return found

    def start(self, link: Any) -> dict[str, Any]:
        """Tell whether latents are those of a picture, and of which file."""
        behind = list(self.behind(link))
        image = next((key for key in behind if self.kinds.get(key) == "LoadImage"), None)
        if image is None:
            return {}
        is_masked = any(
            self.kinds.get(key) in ("VAEEncodeForInpaint", "SetLatentNoiseMask") for key in behind
        )
        name = self.nodes[image].get("image")
        mode = "inpaint" if is_masked else "img2img"
        return {"mode": mode, "image": name if isinstance(name, str) else None}

    def files(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Take the checkpoint, the LoRAs, the text encoder's layer and the VAE of a sampler's picture."""
        found: dict[str, Any] = {}
        loras: list[tuple[Any, Any, Any]] = []
        link, hops = own.get("model"), 0
        while hops < MAX_HOPS and (key := self.follow(link)) is not None:
            hops, inputs = hops + 1, self.nodes[key]
            if isinstance(inputs.get("lora_name"), str):
                on_text = "strength_clip" if "strength_clip" in inputs else ""
                weights = [self.value(inputs, (name,)) for name in ("strength_model", on_text)]
                loras.append((inputs["lora_name"], weights[0], weights[1] if on_text else 0))
                self.used.add(key)
            if isinstance(inputs.get("ckpt_name"), str):
                found["model"] = inputs["ckpt_name"]
                break
            link = next(iter(self.onward(inputs, ("model",))), None)
        found["loras"] = loras[::-1] or None  # in the order in which they are attached
        encoders = self.behind(own.get("positive", own.get("conditioning")), ("model", "vae", "control_net"))
        layers = (self.nodes[key].get("stop_at_clip_layer") for key in encoders)
        found["clip_skip"] = next((-one for one in layers if type(one) is int and one < 0), None)
        decoders = (key for key, kind in self.kinds.items() if kind in ("VAEDecode", "VAEDecodeTiled"))
        loaders = (self.follow(self.nodes[key].get("vae")) for key in decoders if key in self.nodes)
        names = (self.nodes[key].get("vae_name") for key in loaders if key is not None)
        found["vae"] = next((name for name in names if isinstance(name, str)), None)
        return found

    def second(self, first: str | None, found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Take the one sampler beside the first as the second pass of hires fix, if it works on that one's, enlarged.

        Returns:
            options of the second pass, and what it has otherwise than the first and no option of ours says.
        """
        others = [key for key in self.samplers() if key != first]
        if len(others) != 1:
            return {}, [self.label(key) for key in others[:MAX_NAMED]]
        (second,) = others
        own, ways, is_picture = self.with_parts(self.nodes[second]), [], False
        for key in self.behind(own.get("latent_image")):
            if key == first:
                break
            is_picture = is_picture or self.kinds.get(key) in ("VAEEncode", "VAEDecode")
            ways += [key] if isinstance(self.nodes[key].get("upscale_method"), str) else []
        else:
            return {}, [self.label(second)]
        if len(ways) != 1:
            return {}, [self.label(second)]
        way = self.nodes[ways[0]]
        upscaler = (_PICTURE_UPSCALERS if is_picture else _LATENT_UPSCALERS).get(way["upscale_method"])
        if upscaler is None:
            return {}, [self.label(second)]
        self.used.add(ways[0])
        said = self.sampling(own)
        mine = {ours: said[name] for name, ours in _SECOND.items() if said[name] is not None}
        if (factor := self.value(way, ("scale_by",))) is not None:
            mine["hires_scale"] = factor
        else:
            mine["hires_size"] = [self.value(way, (name,)) for name in ("width", "height")]
        alike = ("seed", "guidance_scale")
        notes = [
            f"{self.label(second)}: its {name} is {shown(said[name], 40)}"
            for name in alike
            if said[name] not in (None, found.get(name))
        ]
        return mine | {"hires_upscaler": upscaler}, notes

    def unread(self) -> list[str]:
        """Name the nodes that the picture depends on and whose effect was not taken, or not wholly."""
        ends = [key for key, kind in self.kinds.items() if kind in ("SaveImage", "PreviewImage")]
        needed = dict.fromkeys(
            key
            for end in [key for key in ends if key in self.nodes] or self.samplers()
            for key in (end, *self.behind([end, 0], ()))
        )
        labels = [
            self.label(key) for key in needed if self.kinds.get(key) not in _READ and key not in self.used
        ]
        labels += [line for key in needed for line in self.beside(key)]
        if len(labels) > MAX_NAMED:
            labels = [*labels[:MAX_NAMED], f"{len(labels) - MAX_NAMED} more"]
        return labels + (["the rest of a graph of too many links"] if self.visits >= MAX_VISITS else [])

    def beside(self, key: str) -> Iterator[str]:
        """Say what a node that is read does besides what is read of it."""
        inputs = self.nodes[key] if self.kinds.get(key) in _READ else {}
        for name, usual in _OF_READ.items():
            if (value := self.value(inputs, (name,))) not in (None, usual, usual == "enable"):
                yield f"{self.label(key)}: its {name} is {shown(value, 40)}"
        last, steps = (self.value(inputs, (name,)) for name in ("end_at_step", "steps"))
        if isinstance(last, int) and isinstance(steps, int) and last < steps:
            yield f"{self.label(key)}: its end_at_step is {last}"

    def label(self, key: str) -> str:
        """Name a node by its class."""
        return f"{self.kinds.get(key, 'a node without a class')[:60]} ({key[:20]})"

    def follow(self, link: Any) -> str | None:
        """Give the node that a link names; None if it names none, or there were visits enough."""
        if not isinstance(link, list) or len(link) != 2 or not isinstance(link[0], str | int):
            return None
        self.visits += 1
        key = str(link[0])
        return key if key in self.nodes and self.visits <= MAX_VISITS else None

    def onward(self, inputs: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
        """List the links under these names; a node with nothing but one link is a reroute, whatever it is called."""
        links = [inputs[name] for name in names if isinstance(inputs.get(name), list)]
        return links or [value for value in inputs.values() if len(inputs) == 1 and isinstance(value, list)]

    def samplers(self) -> list[str]:
        """List the samplers."""
        return [
            key
            for key, inputs in self.nodes.items()
            if "latent_image" in inputs and ("positive" in inputs or "guider" in inputs)
        ]

    def sampler(self) -> str | None:
        """Find the first sampler that works on no other sampler's latents."""
        samplers = self.samplers()
        known = set(samplers)
        for one in samplers:
            if not any(key in known for key in self.behind(self.nodes[one]["latent_image"])):
                return one
        return next(iter(samplers), None)

    def behind(self, link: Any, without: Sequence[str] = _NO_LATENTS) -> Iterator[str]:
        """Walk through the nodes that something comes from, nearest first, each once.

        Args:
            without: inputs that are not followed; by default those by which no picture and no latents come.
        """
        seen: set[str] = set()
        waiting = deque([link])
        while waiting and self.visits < MAX_VISITS:
            key = self.follow(waiting.popleft())
            if key is not None and key not in seen:
                seen.add(key)
                yield key
                waiting += [v for name, v in self.nodes[key].items() if name not in without]

    def size(self, link: Any) -> dict[str, Any]:
        """Find the nearest node behind latents that has a width and a height."""
        for key in self.behind(link):
            inputs = self.nodes[key]
            if "width" in inputs and "height" in inputs:
                return {name: self.value(inputs, (name,)) for name in ("width", "height")}
        return {}

    def with_parts(self, inputs: Mapping[str, Any], hops: int = 0) -> dict[str, Any]:
        """Join a sampler's inputs with those of the nodes that noise, guidance and schedule come from."""
        joined = dict(inputs)
        for link in self.onward(inputs, _PARTS):
            if hops < MAX_HOPS and (key := self.follow(link)) is not None:
                joined = self.with_parts(self.nodes[key], hops + 1) | joined
        return joined

    def value(self, inputs: Mapping[str, Any], names: Sequence[str], hops: int = 0) -> Any:
        """Give the number or word that one of these inputs is, or is linked to."""
        here = (*names, *_VALUES) if hops else names
        for name in here:
            if isinstance(inputs.get(name), int | float | str):
                return inputs[name]
        for link in self.onward(inputs, here):
            key = self.follow(link) if hops < MAX_HOPS else None
            value = None if key is None else self.value(self.nodes[key], names, hops + 1)
            if value is not None:
                self.used.add(key)
                return value
        return None

    def text(self, value: Any, hops: int = 0) -> str | None:
        """Give the text that a value is, or is linked to; put pieces together."""
        if isinstance(value, str):
            return value if len(value) <= MAX_CHARACTERS else None
        key = self.follow(value) if hops < MAX_HOPS else None
        if key is None:
            return None
        self.used.add(key)
        inputs = self.nodes[key]
        pieces = sorted(
            (name for name in inputs if _PIECE.fullmatch(name)), key=lambda name: (len(name), name)
        )
        if len(pieces) > 1:
            between = next((inputs[name] for name in _DELIMITERS if isinstance(inputs.get(name), str)), "")
            return _joined([self.text(inputs[name], hops + 1) for name in pieces], between)
        for one in [*(inputs.get(name) for name in _TEXTS), *self.onward(inputs, ())]:
            if (text := self.text(one, hops + 1)) is not None:
                return text
        return None

    def prompt(self, link: Any, role: str, hops: int = 0) -> str | None:
        """Give the text behind conditioning, which may come by way of nodes that add to it.

        Args:
            role: "positive" or "negative": which way to go at a node that both pass through.
        """
        key = self.follow(link) if hops < MAX_HOPS else None
        if key is None:
            return None
        if key in self.zeroed:
            return ""
        inputs = self.nodes[key]
        own = inputs.get(role)  # loaders that are text encoders, too, have the text itself there
        for value in (*(inputs.get(name) for name in _TEXTS), own if isinstance(own, str) else None):
            if (text := self.text(value, hops + 1)) is not None:
                return text
        links = self.onward(inputs, (role,) if role in inputs else _CONDITIONS)
        return _joined([self.prompt(one, role, hops + 1) for one in links], ", ")


def _joined(texts: Iterable[str | None], between: str) -> str | None:
    """Join the texts that were found; None if there is none, or too much."""
    found = [text for text in texts if text is not None]
    length = sum(map(len, found)) + len(between) * len(found)
    return between.join(found) if found and length <= MAX_CHARACTERS else None
