"""Weights from key names and inputs from input names, so that recorded results need no weight files.

The formula is stated in tests/golden/README.md.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn


def _generator(text: str) -> np.random.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """Make the float32 weight that belongs to this key and shape."""
    uniform = _generator(key).random(math.prod(shape), dtype=np.float32) * 2 - 1
    uniform = uniform.reshape(shape)
    if len(shape) >= 2:
        value = uniform * np.float32((3.0 / math.prod(shape[1:])) ** 0.5)
    elif key.endswith("weight"):
        value = 1 + np.float32(0.1) * uniform
    else:
        value = np.float32(0.1) * uniform
    return torch.from_numpy(np.ascontiguousarray(value))


def fill(module: nn.Module, prefix: str = "", only: tuple[str, ...] | None = None) -> nn.Module:
    """Overwrite float weights (not 0-d ones) with keyed ones; `only` keeps to keys that begin so. Strict."""
    state = {}
    for key, old in module.state_dict().items():
        chosen = old.is_floating_point() and old.dim() > 0 and (only is None or key.startswith(only))
        state[key] = weight(prefix + key, tuple(old.shape)) if chosen else old
    module.load_state_dict(state)
    return module.eval()


def keyed_input(name: str, shape: tuple[int, ...]) -> Tensor:
    """Make the float32 input of this name and shape, close to a standard normal."""
    total = _generator("public:" + name).random((12, *shape), dtype=np.float64).sum(0) - 6
    return torch.from_numpy(total.astype(np.float32))
