"""What scripts/edit.py does: read its options, invert the picture, edit it, save the edits and a contact sheet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli.painting import load_model
from ldm.cli.painting_options import _add_model
from ldm.cli.parser import Parser, integer, number
from ldm.cli.running import printable, say
from ldm.errors import FormatError, MismatchError, UsageError, shown

KEY = "ldm edit"  # of the text in a PNG that says how it was made
TOLD = (
    "prompt", "edit_prompt", "method", "inversion", "steps", "start_step", "scale", "negative_prompt", "seed",
    "cross_replace", "self_replace", "weight", "keep_but", "feather",
)  # fmt: skip
DEFAULTS = {
    "prompt": None, "edit_prompt": [], "method": "prompt_to_prompt", "inversion": "ddim", "steps": 50,
    "start_step": None, "scale": None, "negative_prompt": "", "seed": 0, "cross_replace": None, "self_replace": None,
    "weight": [], "keep_but": None, "feather": 0.0,
}  # fmt: skip
