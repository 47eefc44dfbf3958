"""Cached latents: with the first stage frozen, each picture is encoded once instead of at every step.

What is kept is the posterior's moments, so that each use draws anew; in half precision, whose rounding is far
below the posterior's own width. Parts of 4,096 samples are written as they are done, so that a killed run loses
little, and named by what they were made from, so that another first stage never meets them.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.errors import UsageError
from ldm.training.data import Item, collate, naming_source
from ldm.training.objectives import pictures_of

logger = logging.getLogger(__name__)

PART = 4096  # samples in one file


class CachedLatents(Dataset):
    """Moments and captions in memory; an item is {"moments": (2c, h, w) float32, "caption", "txt"}."""

    def __init__(self, moments: Tensor, captions: list[str]):
        self.moments, self.captions = moments, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        caption = self.captions[index]
        return {"moments": self.moments[index].float(), "caption": caption, "txt": caption}


def fingerprint(first_stage: nn.Module, source: Any) -> str:
    """Name what latents are made from: the first stage's weights and the source's configuration."""
    digest = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode())
    for name, tensor in first_stage.state_dict().items():
        if not name.startswith("loss."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def cache_latents(
    model: nn.Module,
    source: Dataset,
    count: int,
    folder: Path,
    *,
    name: str,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    is_bf16: bool = False,
    report: Any = None,
) -> CachedLatents:
    """Encode the first `count` samples of a source, or read them where an earlier call has written them.

    Args:
        model: a LatentDiffusion, for its frozen first stage and its keys.
        source: of pictures with captions.
        count: how many; -1 for all.
        folder: where the parts lie.
        name: fingerprint of model and source.
        batch_size: pictures encoded at a time.
        device: where the first stage goes to encode; it comes back.
        is_bf16: encode under bfloat16 autocast, a quarter of the time on a CPU with such units. Its rounding was a
            fifteenth of the posterior's width in the model in the box.
        report: called with (done, count) after each part.

    Raises:
        UsageError: count is larger than the source, or its latents have no moments.
    """
    from ldm.checkpoints import read_tensors, save_safetensors

    count = len(source) if count == -1 else count
    if not 0 < count <= len(source):
        raise UsageError(f"cache_latents should be between 1 and {len(source)} (or -1 for all), got {count}")
    parts: list[Tensor] = []
    captions: list[str] = []
    for first in range(0, count, PART):
        path = folder / f"latents-{name}-{first:09d}.safetensors"
        length = min(PART, count - first)
        moments, texts = None, []
        if path.exists():
            tensors, metadata = read_tensors(path)
            moments, texts = tensors["moments"], json.loads(metadata["captions"])
        if moments is None or len(texts) < length:
            home = next(model.first_stage_model.parameters()).device
            model.first_stage_model.to(device, memory_format=torch.channels_last)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bf16):
                moments, texts = encode(model, source, range(first, first + length), batch_size)
            model.first_stage_model.to(home)
            save_safetensors(path, {"moments": moments}, {"captions": json.dumps(texts)})
        parts.append(moments[:length])
        captions += texts[:length]
        if report is not None:
            report(first + length, count)
    return CachedLatents(torch.cat(parts), captions)


def encode(model: nn.Module, source: Dataset, indices: range, batch_size: int) -> tuple[Tensor, list[str]]:
    """Encode some samples of a source: float16 moments (n, 2c, h, w) and captions."""
    moments, captions = [], []
    for start in range(0, len(indices), batch_size):
        taken = indices[start : start + batch_size]
        with naming_source(source, f"items {taken[0]} to {taken[-1]}"):
            batch = collate([source[i] for i in taken])
        image = pictures_of(batch, model.first_stage_key, model.first_stage_model)  # channels_last as it lies
        posterior = model.encode_first_stage(image.to(next(model.first_stage_model.parameters()).device))
        if not hasattr(posterior, "parameters"):
            raise UsageError(
                "cache_latents needs a first stage with a Gaussian posterior; set cache_latents: 0"
            )
        moments.append(posterior.parameters.float().cpu())
        captions += batch.get("caption", batch.get("txt", [""] * len(image)))
    joined = torch.cat(moments)
    limit = torch.finfo(torch.float16).max
    return joined.clamp(-limit, limit).half(), [str(text) for text in captions]
