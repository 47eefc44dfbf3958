"""What the stand-ins compute with on a GPU: cuDNN's and cuBLAS's products on weights as they lie, torch's fused
attention, and the kernels of triton_kernels.py. An engine, as cpu.py is.
"""

import contextlib
import functools
import logging
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.kernels.phases import spread
from ldm.modules.attention import attend

__all__ = [
    "DTYPES",
    "FEED_ROWS",
    "KEEPS_CONTEXT",
    "attention",
    "convolve",
    "geglu",
    "group_norm",
    "multiply",
    "pack_conv",
    "pack_linear",
    "run_conv",
    "serves_attention",
    "serves_geglu",
    "serves_norm",
    "spread",
]

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEEPS_CONTEXT = False  # to compare values would be to wait for the GPU
FEED_ROWS = 1 << 62  # all at once
MOST_WRONG = 1e-4  # of kernels that are used


@functools.cache
def kernels() -> ModuleType | None:
    """Import triton_kernels and try them; None, with a warning in the log, where they cannot be had or are wrong."""
    try:
        from ldm.kernels import triton_kernels
    except ImportError as error:
        log.warning("the GPU's own kernels are left out, there is no Triton: %s", error)
        return None
    try:
        wrong = error_of(triton_kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # a compiler that is missing or fails says so in many ways
        log.warning("the GPU's own kernels are left out, they cannot be built: %s", str(error).split("\n")[0])
        return None
    if not wrong < MOST_WRONG:
        log.warning("the GPU's own kernels are left out, their numbers are off by %.2g", wrong)
        return None
    return triton_kernels


def error_of(module: ModuleType, device: torch.device) -> float:
    """Say how far the kernels' answers to a small question are from the formulas', relative to the largest number."""
    x = (
        torch.linspace(-2e3, 3e3, 2 * 40 * 5 * 7, dtype=torch.float64, device=device)
        .sin()
        .reshape(2, 40, 5, 7)
    )
    one, zero = torch.ones(40, device=device), torch.zeros(40, device=device)
    maps = x.float().contiguous(memory_format=torch.channels_last)
    got = module.group_norm(maps, 8, one, zero, 1e-6, silu=True)
    norm = (got - F.silu(F.group_norm(x, 8, eps=1e-6))).abs().max()
    tokens = maps.permute(0, 2, 3, 1).reshape(-1, 40)
    gated = module.geglu(tokens, zero, torch.empty_like(tokens[:, :20]).contiguous())
    value, gate = tokens.double().chunk(2, dim=1)
    return float(torch.stack([norm, (gated - value * F.gelu(gate)).abs().max()]).max())  # NaN if one is


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """Give a linear layer's weight as it is."""
    return weight


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias + add; x is (..., in)."""
    out = F.linear(x, packed, bias)
    return out if add is None else out.add_(add)


def pack_conv(weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Any) -> Tensor:
    """Give a convolution's weight with its channels last."""
    return weight.contiguous(memory_format=torch.channels_last)


def run_conv(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    add: Tensor | None = None,
) -> Tensor:
    """Convolve a map, and add a map if there is one."""
    out = F.conv2d(x, packed, bias, stride, padding, dilation, groups)
    return out if add is None else out.add_(add)


def convolve(conv: nn.Conv2d, x: Tensor, kept: Any, add: Tensor | None) -> Tensor:
    """Convolve a map as a layer does, and add a map if there is one; nothing is kept."""
    how = (conv.padding, conv.stride, conv.dilation, conv.groups)
    return run_conv(x, conv.weight, conv.bias, *how, add=add)


def serves_norm(x: Tensor, groups: int) -> bool:
    """Whether `group_norm` takes this (b, c, h, w) map: channels last, groups dividing them."""
    return (
        x.numel() > 0
        and x.dtype in DTYPES
        and x.shape[1] % groups == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and kernels() is not None
    )


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, **options: Any) -> Tensor:
    """See triton_kernels.group_norm."""
    return kernels().group_norm(x, groups, weight, bias, eps, **options)


def serves_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Whether `attention` takes these (b, tokens, heads * features) tensors."""
    return k.shape == v.shape and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Attend: softmax(scale q k^T) v for each head; see native.attention."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with _switches:
        backend = backend_for(q, k, v, scale)
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = attend(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)


# --- which of torch's attentions ------------------------------------------------------------------

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# How much less than torch's own choice another one has to take: below that it is chance, and pictures should not be.
MUCH_FASTER = 0.9
ROUNDS = 5
_choices: dict[Any, SDPBackend | None] = {}
_switches = threading.RLock()  # torch's switches of backends are those of the whole process


def backend_for(q: Tensor, k: Tensor, v: Tensor, scale: float) -> SDPBackend | None:
    """Choose one of torch's attentions for these shapes, once in a process, by trying; None = torch's own choice."""
    key = (q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device)
    if key not in _choices:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # no time can be taken here
        ask = functools.partial(attend, q, k, v, scale=scale)
        _choices[key] = fastest(lambda: seconds_of(ask, q.device), BACKENDS)
    return _choices[key]


def fastest(
    seconds: Callable[[], float],
    backends: Sequence[Any],
    within: Callable[[Any], contextlib.AbstractContextManager] = sdpa_kernel,
) -> Any:
    """Say which backend takes much less than torch's own choice does; None if none does.

    Args:
        seconds: takes the time of a question.
        backends: to try.
        within: makes a context in which a backend answers, or raises RuntimeError if it does not.
    """
    best, least = None, MUCH_FASTER * seconds()
    for backend in backends:
        try:
            with warnings.catch_warnings(), within(backend):
                warnings.simplefilter("ignore")  # torch tells at length why one does not serve
                taken = seconds()
        except RuntimeError:
            continue
        if taken < least:
            best, least = backend, taken
    return best


def seconds_of(ask: Callable[[], Tensor], device: torch.device) -> float:
    """Median time of a question, after one to warm up."""
    ask()
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        ask()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def serves_geglu(doubled: int) -> bool:
    """Whether `geglu` takes tensors (rows, doubled)."""
    return doubled % 2 == 0 and kernels() is not None


def geglu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """See triton_kernels.geglu."""
    return kernels().geglu(x, bias, out)
