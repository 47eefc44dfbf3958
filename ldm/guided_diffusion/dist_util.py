"""What OpenAI's scripts need of torch.distributed: a process group, a device, files for all, equal weights."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.checkpoints import read_object, read_tensors
from ldm.errors import FormatError, UsageError

# Where MPI's starters write their number of processes.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def setup_dist() -> None:
    """Set up torch.distributed: the processes that torchrun started, or this one alone; once.

    Scripts read their rank from torch.distributed also where there is one process.

    Raises:
        UsageError: started by MPI, whose processes would not know of each other.
    """
    if dist.is_initialized():
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    by_mpi = max((int(os.environ.get(name, "1")) for name in MPI_SIZES), default=1)
    if count == 1 and by_mpi > 1:
        raise UsageError(
            f"{by_mpi} processes were started by MPI, which would each train alone; start them by "
            f"`torchrun --nproc_per_node {by_mpi} SCRIPT`"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if count > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def place() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) without setup_dist."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def dev() -> torch.device:
    """Return the device of this process: its GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_state_dict(path: str | os.PathLike, map_location: str | torch.device = "cpu", **options: Any) -> Any:
    """Read a state that torch.save wrote, or a safetensors file, by the readers that run no code.

    Every process reads it by itself.

    Args:
        map_location: the device its tensors go to.
        options: torch.load's further ones; weights_only may be named, for nothing else is read.

    Raises:
        As ldm.checkpoints.read_object; UsageError: another option.
    """
    if others := options.keys() - {"weights_only"}:
        raise UsageError(f"load_state_dict takes map_location, got {', '.join(sorted(others)):.80}")
    if Path(path).suffix == ".safetensors":
        state: Any = read_tensors(path)[0]
    else:
        state = read_object(path)
    if not isinstance(state, dict):
        raise FormatError(f"'{str(path):.120}' should hold a dict, got {type(state).__name__}")
    return _moved(state, torch.device(map_location))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return [_moved(one, device) for one in value] if type(value) is list else value


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if place()[1] > 1:
        for value in params:
            dist.broadcast(value, 0)
