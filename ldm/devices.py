"""Which device and which number format a model computes on: what a caller names, held against what is there."""

import logging

import torch

from ldm.errors import UsageError, shown

log = logging.getLogger(__name__)


def pick_device(device: str | torch.device | None = None, *, or_meta: bool = False) -> torch.device:
    """Choose a device by name, or the best there is for None and "auto": cuda, then mps, then cpu.

    Args:
        or_meta: take torch's "meta" as well, whose tensors have a shape and no values.

    Raises:
        UsageError: a device that this machine or this torch does not have.
    """
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have[:0] = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device is None or device == "auto":
        return torch.device(have[0])
    try:  # whatever else it may be, torch takes some of it for the current device
        wanted = torch.device(device) if isinstance(device, str | int | torch.device) else None
    except RuntimeError:
        wanted = None
    if or_meta and wanted == torch.device("meta"):
        return wanted
    if wanted is None or str(wanted) not in {*have, *(name.split(":")[0] for name in have)}:
        raise UsageError(f"device {shown(str(device))} is not available; have: {', '.join(have)}")
    return wanted


def check_low_vram(device: torch.device) -> torch.device:
    """Return a device that weights may be offloaded from, to CPU memory.

    Raises:
        UsageError: it is the CPU, whose memory the weights are in anyway.
    """
    if device.type == "cpu":
        raise UsageError("low_vram is for a GPU that a model does not fit on, got device cpu; leave it out")
    return device


def pick_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """Choose what the UNet computes in: float16 on CUDA, else float32; float16 on a CPU is refused gently."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {shown(dtype)}")
    if dtype == torch.float16 and device.type == "cpu":
        log.warning("float16 is slow and overflows on a CPU; float32 is used instead (bfloat16 works)")
        return torch.float32
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype for people: "float16"."""
    return str(dtype).removeprefix("torch.")
