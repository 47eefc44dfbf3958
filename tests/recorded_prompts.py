"""The recorded prompts, and our chunks written as they are."""

import functools
import json
from pathlib import Path

from ldm.modules.encoders.tokenizer import find_tokenizer
from ldm.prompt.chunks import END

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def tokenizer():
    return find_tokenizer()


def token_ids(text):
    return tokenizer()(text, verbose=False)["input_ids"][1:-1]


def runs(values):
    """[1.0, 1.0, 1.3] to [[1.0, 2], [1.3, 1]]."""
    found = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return found


def without_padding(chunk):
    """A chunk as it is recorded: without the end marks of weight 1 that close it."""
    length = len(chunk.ids)
    while chunk.ids[length - 1] == END and chunk.weights[length - 1] == 1.0:
        length -= 1
    return {"ids": list(chunk.ids[:length]), "mult": runs(chunk.weights[:length])}
