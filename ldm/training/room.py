"""Whether a run fits into memory: what it needs at least, and what a device has free."""

import os
from pathlib import Path

import torch
from torch import nn

from ldm.errors import ResourceError
from ldm.training.resumption import wanted_moments

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def held_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and buffers, averages among them."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def added_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Count the bytes that training adds: gradients, and what the optimizers remember in the parameters' shapes."""
    total = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            copies = 1 + sum((wanted_moments(optimizer, group) or {}).values())
            total += copies * sum(p.numel() * p.element_size() for p in group["params"])
    return total


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Say how many bytes this process can still have of Linux's memory, its control groups' limits included.

    None where the system does not say.
    """
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        rooms = [int(fields["MemAvailable"].split()[0]) * 1024]
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except (OSError, LookupError, ValueError):
        return None
    for number, controllers, path in groups:
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = cgroups if number == "0" else cgroups / "memory"
        own = root / path.strip("/")  # inside a container it may not be visible, but its parents are
        rooms += [
            room
            for folder in (own, *own.parents)
            if folder.is_relative_to(root)
            if (room := _room_of(folder, is_second=number == "0")) is not None
        ]
    return max(0, min(rooms))


def _room_of(folder: Path, is_second: bool) -> int | None:
    """Say what a control group has left, of version 2 or 1; None without a limit. Pages of files can be given back."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not is_second:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        limit, used = ((folder / name).read_text().strip() for name in names[:2])
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(stat.get(names[2], 0))
    except (OSError, ValueError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Say how many bytes a device has left; None where it does not say."""
    if device.type == "cpu":
        return available_memory()
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if ask is None else ask(device)[0]


def training_device(accelerator: str) -> torch.device:
    """Say which device Lightning gives this process for an `accelerator`."""
    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))


def check_room(needed: int, free: int | None, device: torch.device) -> None:
    """Refuse a run that cannot fit.

    Args:
        needed: bytes that it will take on the device at least.
        free: bytes that the device has left; None for unknown, which refuses nothing.

    Raises:
        ResourceError: it needs more than there is.
    """
    if free is None or needed <= free:
        return
    raise ResourceError(
        f"training this model takes at least {needed / 2**30:.1f} GiB more on {device} (weights, gradients, the "
        f"optimizer's moments, averages), and {free / 2**30:.1f} GiB are free; no smaller batch or precision helps: "
        "train fewer parts (cond_stage_trainable=false), leave the average out (model.params.use_ema=false), take "
        "a smaller model, or another device"
    )


def check_fits(model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
    """Refuse a model whose training cannot fit on the device, before it is moved there; see `check_room`."""
    needed = added_bytes(optimizers) + (0 if device.type == "cpu" else held_bytes(model))
    check_room(needed, free_memory(device), device)
