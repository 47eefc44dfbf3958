"""ComfyUI's graph of nodes, read for the few things that other programs have, too: prompts, seed, steps, size.

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

MAX_VISITS = 3000  # in one graph; the largest public workflows have some hundreds of nodes
MAX_INPUTS = 100  # of a node
MAX_HOPS = 40  # from a node to what it needs
MAX_CHARACTERS = 200_000  # of a text that is put together

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


def read_graph(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Take what a picture's graph says by our names; values are the graph's own, of whatever type.

    Of several samplers in a row (a first pass, then a larger one) the first speaks, as in A1111's texts.
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
        self.zeroed = {key for key, kind in classes.items() if isinstance(kind, str) and "ZeroOut" in kind}
        self.visits = 0

    def read(self) -> dict[str, Any]:
        """Start at the sampler."""
        own = self.sampler()
        found = {name: self.value(own, theirs) for name, theirs in _FIELDS.items()}
        first, steps = self.value(own, ("start_at_step",)), found["steps"]
        if isinstance(first, int) and isinstance(steps, int) and 0 < first < steps:
            found["strength"] = 1 - first / steps  # KSamplerAdvanced says how many steps a picture is spared
        for name, roles in (("prompt", ("positive", *_CONDITIONS)), ("negative_prompt", ("negative",))):
            link = next((own[role] for role in roles if role in own), None)
            found[name] = self.prompt(link, roles[0])
        found |= self.size(own.get("latent_image"))
        return {name: value for name, value in found.items() if value is not None}

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

    def sampler(self) -> dict[str, Any]:
        """Find the first sampler that works on no other sampler's latents; its inputs and those of its parts."""
        samplers = {
            key: inputs
            for key, inputs in self.nodes.items()
            if "latent_image" in inputs and ("positive" in inputs or "guider" in inputs)
        }
        for inputs in samplers.values():
            if not any(key in samplers for key in self.behind(inputs["latent_image"])):
                return self.with_parts(inputs)
        return self.with_parts(next(iter(samplers.values()), {}))

    def behind(self, link: Any) -> Iterator[str]:
        """Walk through the nodes that a picture or latents come from, nearest first, each once."""
        seen: set[str] = set()
        waiting = deque([link])
        while waiting and self.visits < MAX_VISITS:
            key = self.follow(waiting.popleft())
            if key is not None and key not in seen:
                seen.add(key)
                yield key
                waiting += [v for name, v in self.nodes[key].items() if name not in _NO_LATENTS]

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
                return value
        return None

    def text(self, value: Any, hops: int = 0) -> str | None:
        """Give the text that a value is, or is linked to; put pieces together."""
        if isinstance(value, str):
            return value if len(value) <= MAX_CHARACTERS else None
        key = self.follow(value) if hops < MAX_HOPS else None
        if key is None:
            return None
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
