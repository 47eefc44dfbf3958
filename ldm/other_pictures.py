"""What other programs' pictures say of themselves in JSON, by the names of our options.

Everything here was written by strangers: no reader raises, whatever a text holds. A reader gives the options whose
values are sound, `model`, `model_hash`, `vae`, `vae_hash`, `mode` and `adapters` as our own pictures have them, and
under `extra` whatever else is said, as text, so that nothing is passed over in silence.

Sources: InvokeAI 2 to 5 (ldm/invoke/args.py; invokeai/app/invocations/metadata.py), NovelAI's Comment, SwarmUI's
sui_image_params, Draw Things' XMP comment, and the keywords of diffusers' pipelines, which small tools write.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ldm import options
from ldm.errors import shown
from ldm.option_kinds import Kind, Number, Prompt

MODES = ("txt2img", "img2img", "inpaint")
FACTS = ("model", "model_hash", "vae", "vae_hash", "init_image_hash", "version")
MOST_ADAPTERS = 100
MOST_EXTRA = 200  # things that are named; pictures have some dozens
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def clean(text: str) -> str:
    """Drop control characters except newline and tab, and what cannot be encoded."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127))
    return kept.encode("utf-8", "ignore").decode()


def parse(text: str) -> Any:
    """Parse JSON; None if it is not sound, or nested beyond reason.

    NaN, which Python and ComfyUI write, stands for every number that nobody can use: infinite, or longer than a seed.
    """

    def bounded(word: str) -> int | float:
        return int(word) if len(word) <= 21 else math.nan

    try:
        return json.loads(text, parse_int=bounded)
    except (ValueError, RecursionError):
        return None


def mapping(value: Any) -> dict[str, Any]:
    """Give a parsed object; {} for anything else."""
    return value if isinstance(value, dict) else {}


def bare(name: Any) -> str | None:
    """Give a file's name without folders and ending, as our pictures name models and LoRAs; None where it is none."""
    if not isinstance(name, str) or not name.strip():
        return None
    last = PurePosixPath(clean(name)[:1000].replace("\\", "/")).name
    ending = next((one for one in _ENDINGS if last.lower().endswith(one)), "")
    return last[: len(last) - len(ending)] or None


def sort_out(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Take the fields named {theirs: ours} whose values are sound; the others become text under `extra`.

    A value that is a text of a number or a choice is read as A1111's text is.
    """
    kinds, _ = _table(options.TABLE)
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in raw.items():
        ours = names.get(key) if isinstance(key, str) else None
        is_empty = value in ("", [], {}) and not isinstance(kinds.get(ours), Prompt)
        if value is None or is_empty or (value is False and ours is None):  # left out, or off
            continue
        if ours in kinds:
            taken = kinds[ours].take(value)
            if taken is None and isinstance(value, str):
                taken = kinds[ours].read(value)
            elif isinstance(taken, str):
                taken = kinds[ours].read(clean(taken))
        elif ours == "mode":
            taken = value if value in MODES else None
        elif ours in FACTS:
            taken = clean(value)[:1000] if isinstance(value, str) else None
        else:
            taken = None
        if taken is not None and ours not in found:
            found[ours] = taken
        elif len(extra) < MOST_EXTRA:
            extra[clean(str(key))[:100]] = clean(value) if isinstance(value, str) else shown(value, 200)
    return found | ({"extra": extra} if extra else {})


@functools.lru_cache(maxsize=4)
def _table(table: tuple[Any, ...]) -> tuple[dict[str, Kind], dict[str, str]]:
    """Give the kind of each option by its name, and every name of those that a picture may say with the option's."""
    found = [one for one in table if isinstance(one, options.Option)]
    return {one.name: one.kind for one in found}, {
        name: one.name for one in found if one.told for name in one.names
    }


def lora(name: Any, weight: Any, text_weight: Any = None) -> dict[str, Any] | None:
    """Describe a LoRA as our own pictures do; None where there is no name."""
    name, kind = bare(name), Number(-100, 100)
    weight, text_weight = kind.take(weight), kind.take(text_weight)
    if name is None:
        return None
    found: dict[str, Any] = {"kind": "LoRA", "name": name, "weight": 1.0 if weight is None else weight}
    return found if text_weight in (None, found["weight"]) else found | {"text_weight": text_weight}


def _with_adapters(found: dict[str, Any], adapters: list[dict[str, Any] | None]) -> dict[str, Any]:
    sound = [one for one in adapters[:MOST_ADAPTERS] if one is not None]
    return found | {"adapters": sound} if sound else found


# --- InvokeAI -------------------------------------------------------------------------------------

_INVOKEAI = {
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "steps",
    "scheduler": "sampler",
    "cfg_scale": "guidance_scale",
    "cfg_rescale_multiplier": "guidance_rescale",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "generation_mode": "mode",
}


def from_invokeai(text: str) -> dict[str, Any]:
    """Read invokeai_metadata, of InvokeAI 3 to 5."""
    raw = dict(mapping(parse(text)))
    model, vae = mapping(raw.pop("model", None)), mapping(raw.pop("vae", None))
    skip, device = raw.pop("clip_skip", None), raw.pop("rand_device", None)
    loras = raw.pop("loras", None)
    seamless = raw.get("seamless_x") is True and raw.get("seamless_y") is True
    ways = ("seamless_x", "seamless_y") if seamless else ()
    found = sort_out({name: value for name, value in raw.items() if name not in ways}, _INVOKEAI)
    # Version 3 says model_name, later ones name; a hash of another kind than SHA-256 names no file here.
    for ours, one in (("model", model), ("vae", vae)):
        if (name := bare(one.get("model_name", one.get("name")))) is not None:
            found[ours] = name
        if isinstance(digits := one.get("hash"), str) and digits.startswith("sha256:"):
            found[f"{ours}_hash"] = clean(digits[7:71])
    if seamless:
        found["tiling"] = True
    if isinstance(skip, int) and 0 <= skip < 12:
        found["clip_skip"] = 1 + int(skip)  # there 0 is the last layer
    if device in ("cpu", "cuda"):
        found["rng"] = "image" if device == "cpu" else "nv"
    own = [mapping(one) for one in loras] if isinstance(loras, list) else []
    named = [(mapping(one.get("lora") or one.get("model")), one.get("weight")) for one in own]
    return _with_adapters(found, [lora(one.get("model_name", one.get("name")), w) for one, w in named])


_OLD_INVOKEAI = {
    "cfg_scale": "guidance_scale",
    "steps": "steps",
    "sampler": "sampler",
    "seed": "seed",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "type": "mode",
    "model_weights": "model",
    "model_id": "model",
    "model_hash": "model_hash",
    "seamless": "tiling",
    "orig_hash": "init_image_hash",
}


def from_sd_metadata(text: str) -> dict[str, Any]:
    """Read sd-metadata, of InvokeAI 2: what is negative stands in brackets within the prompt."""
    raw = mapping(parse(text))
    image = dict(mapping(raw.get("image")))
    prompt = image.pop("prompt", None)
    if isinstance(prompt, list):
        texts = (mapping(one).get("prompt") for one in prompt[:MOST_ADAPTERS])
        prompt = " ".join(one for one in texts if isinstance(one, str))
    outer = {name: raw[name] for name in ("model_weights", "model_id", "model_hash") if name in raw}
    usual = {name for name in ("seamless", "hires_fix", "threshold", "perlin") if not image.get(name)}
    found = sort_out(outer | {name: image[name] for name in image if name not in usual}, _OLD_INVOKEAI)
    return (found | _split_prompt(prompt)) if isinstance(prompt, str) else found


_DREAM = {"-s": "steps", "-S": "seed", "-W": "width", "-H": "height", "-C": "cfg_scale", "-A": "sampler"}
_DREAM |= {"-f": "strength"}


def from_dream(text: str) -> dict[str, Any]:
    """Read Dream, the command line of InvokeAI 1 and 2: `"a cat [dog]" -s 50 -S 1 -W 512 -H 512 -C 7.5 -A k_lms`."""
    try:
        words = shlex.split(text[:20_000])
    except ValueError:  # a quote that is not closed
        words = text[:20_000].split()
    raw: dict[str, Any] = {}
    at = next((i for i, word in enumerate(words) if re.match(r"--?[A-Za-z]", word)), len(words))
    prompt = " ".join(words[:at])
    while at < len(words):
        # A flag's value may stand beside it, as in -s50, or be the next word.
        flag, value = words[at], True
        if flag[:2] in _DREAM and len(flag) > 2 and not flag.startswith("--"):
            flag, value = flag[:2], flag[2:]
        elif at + 1 < len(words) and not re.match(r"--?[A-Za-z]", words[at + 1]):
            at, value = at + 1, words[at + 1]
        raw[_DREAM.get(flag, flag)] = value
        at += 1
    if not raw:
        return {}
    return sort_out(raw, _OLD_INVOKEAI) | _split_prompt(prompt)


def _split_prompt(prompt: str) -> dict[str, str]:
    """Part what stands in brackets, which InvokeAI 2 keeps away from, from the rest of a prompt."""
    negative = re.findall(r"\[([^\[\]]*)\]", prompt)
    found = {"prompt": clean(re.sub(r"\s*\[[^\[\]]*\]", "", prompt)).strip()}
    return found | ({"negative_prompt": clean(" ".join(negative))} if negative else {})


# --- others ---------------------------------------------------------------------------------------

_NOVELAI = {"scale": "guidance_scale", "uc": "negative_prompt", "noise_schedule": "spacing"}
_NOVELAI |= {"cfg_rescale": "guidance_rescale"}
_NOVELAI |= {name: name for name in ("prompt", "steps", "sampler", "seed", "strength", "width", "height")}


def from_novelai(text: str) -> dict[str, Any]:
    """Read NovelAI's Comment; one of another program says nothing."""
    raw = mapping(parse(text))
    return sort_out(raw, _NOVELAI) if {"uc", "scale"} & raw.keys() and "steps" in raw else {}


_DRAW_THINGS = {"c": "prompt", "uc": "negative_prompt", "scale": "guidance_scale", "model": "model"}
_DRAW_THINGS |= {name: name for name in ("steps", "sampler", "seed", "strength")}


def from_draw_things(text: str) -> dict[str, Any]:
    """Read the comment in Draw Things' XMP."""
    raw = dict(mapping(parse(text)))
    if not isinstance(raw.get("c"), str):
        return {}
    size, loras = raw.pop("size", None), raw.pop("lora", None)
    raw.pop("v2", None)  # the same once more, by other names
    found = sort_out(raw, _DRAW_THINGS)
    if isinstance(size, str) and (sides := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size)):
        found |= {"width": int(sides[1]), "height": int(sides[2])}
    if "model" in found:
        found["model"] = bare(found["model"])
    own = [mapping(one) for one in loras] if isinstance(loras, list) else []
    return _with_adapters(found, [lora(one.get("model"), one.get("weight")) for one in own])


# SwarmUI's words, and what tools that call diffusers write beside its keywords.
_ALSO = {
    "negativeprompt": "negative_prompt",
    "cfgscale": "guidance_scale",
    "mode": "mode",
    "model": "model",
    "model_name": "model",
    "base_model": "model",
    "sd_model": "model",
    "sd_model_name": "model",
    "sd_model_hash": "model_hash",
    "base_model_hash": "model_hash",
    "model_hash": "model_hash",
    "vae": "vae",
    "vae_name": "vae",
    "vae_hash": "vae_hash",
}


def from_json(text: str) -> dict[str, Any]:
    """Read a flat object of keywords, by diffusers' names or any other that we understand for an option."""
    raw = mapping(parse(text))
    swarm = mapping(raw.get("sui_image_params"))
    raw = dict(swarm or raw)
    names = _table(options.TABLE)[1] | _ALSO
    if isinstance(raw.get("scheduler"), str) and "sampler" in raw:  # there a scheduler is a spacing
        names["scheduler"] = "spacing"
    loras = raw.pop("loras", None)
    weights = raw.pop("loraweights", None) if isinstance(loras, list) else None
    found = sort_out(raw, names)
    if not {"steps", "seed", "prompt"} & found.keys():
        return {}
    if "clip_skip" in found and not swarm and "num_inference_steps" in raw:
        found["clip_skip"] += 1  # in diffusers 0 is the last layer
    for name in ("model", "vae"):
        if name in found and (file := bare(found[name])):
            found[name] = file
    own = loras if isinstance(loras, list) else []
    pairs: list[tuple[Any, Any]] = []
    for i, one in enumerate(own[:MOST_ADAPTERS]):
        if isinstance(one, list) and len(one) > 1:
            pairs.append((one[0], one[1]))
        elif isinstance(one, dict):
            pairs.append((one.get("name", one.get("model")), one.get("weight")))
        else:
            said = weights[i] if isinstance(weights, list) and i < len(weights) else None
            pairs.append((one, Number(-100, 100).read(said) if isinstance(said, str) else said))
    return {"source": "swarmui" if swarm else "diffusers"} | _with_adapters(
        found, [lora(*pair) for pair in pairs]
    )
