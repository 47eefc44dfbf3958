"""The house's picture: imports point down only, heavy packages are imported late, functions are short,
and a wheel holds every room."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
# Rooms from the floor up; a module may import rooms before its own, and its own. Rooms of one line stand side by side
# and do not know each other.
ROOMS = (
    ("errors",),
    ("limits", "values"),
    ("config_text",),
    (
        "batches",
        "config",
        "devices",
        "helpers",
        "improved_calls",
        "paths",
        "lr_scheduler",
        "containers",
        "comfyui",
        "other_words",
    ),
    ("process",),
    ("checkpoints", "modules"),
    ("kernels", "util"),
    ("models",),
    ("adapters", "images", "prompt"),
