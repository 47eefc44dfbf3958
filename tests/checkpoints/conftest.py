"""A tiny v1 model's configuration and file, made once for all tests of this folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from make_synthetic import make_tensors, tiny_config
from torch import Tensor

from ldm.checkpoints import save_safetensors


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its folder, configuration, float32 tensors and the file that holds them."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path

    def save(self, folder: Path, tensors: dict[str, Tensor], name: str = "changed.safetensors") -> Path:
        """Write a changed copy of the tensors into a test's own folder."""
        save_safetensors(folder / name, tensors)
        return folder / name


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config(folder)
    tensors = make_tensors(config, dtype=torch.float32)
    save_safetensors(folder / "tiny.safetensors", tensors, {"format": "pt"})
    return Tiny(folder, config, tensors, folder / "tiny.safetensors")
