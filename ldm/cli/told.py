"""What a picture's metadata ask for, in the values of our options: for --like and for replay.py."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any

from ldm import options
from ldm.errors import shown
from ldm.option_kinds import Choice

NO_VAE = ("none", "automatic", "baked in")  # names of no file
# How the programs that wrote a picture read its prompt: its brackets are meant.
SYNTAXES = {"a1111": "a1111", "comfyui": "comfyui", "invokeai": "compel"}


def asked_for(
    parameters: Mapping[str, Any], has_files: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the values of our options that a picture's metadata say, and for each that none is a line; anybody may
    have written them.

    Args:
        parameters: of ldm.read_parameters.
        has_files: there is a folder in which an upscaler of a file is looked for.
    """
    said = dict(parameters)
    if parameters.get("source") in SYNTAXES and not by_us(parameters):
        said.setdefault(options.SYNTAX, SYNTAXES[parameters["source"]])
    values, lines = {}, {}
    for option in options.told():
        value = said.get(option.name)
        if value is None:
            continue
        taken = option.kind.take(value)
        if taken is not None and isinstance(option.kind, Choice):
            word, taken = taken, None
            with contextlib.suppress(argparse.ArgumentTypeError):  # another program's word
                parsed = option.kind.parse(word)
                taken = parsed if parsed in option.kind.words or has_files else None
        if taken is None:
            lines[option.name] = f"its {option.infotext or option.name} {shown(value)} is not known here"
        else:
            values[option.name] = taken
    return values, lines


def by_us(parameters: Mapping[str, Any]) -> bool:
    """Tell whether a picture is one of ours, whatever text says so."""
    return parameters.get("source") == "ldm" or str(parameters.get("version", "")).startswith("ldm ")
