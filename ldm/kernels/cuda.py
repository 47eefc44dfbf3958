"""CUDA backend: cuDNN's and cuBLAS's layers on unpacked weights, torch's fused attention, and the Triton kernels.

Each Triton kernel is tried once for each width and dtype; one that fails or gives wrong numbers is left out.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.kernels.upsample_conv import interleave_phases as interleave_phases
from ldm.modules.attention import attend

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CACHES_CONTEXT = False  # a comparison would wait for the GPU
FEED_FORWARD_ROWS = 1 << 62  # all at once
# Of kernels that are used, relative to the largest number: a few units in the last place of the dtype.
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MAX_CELLS = 1 << 13  # of a map at a trial: larger ones are divided into blocks in the same way


@functools.cache
def kernels() -> ModuleType | None:
    """Import triton_kernels; None, with a warning in the log, where there is no Triton."""
    try:
        from ldm.kernels import triton_kernels
    except ImportError as error:
        log.warning("the GPU's own kernels are left out, there is no Triton: %s", error)
        return None
    return triton_kernels


# --- trials: each kernel at each width and dtype, once in a process ------------------------------------

_trials: dict[Any, bool] = {}


def is_right(name: str, error: Callable[[], Tensor], like: Tensor, *width: int) -> bool:
    """Whether a kernel computes a small input correctly; tried once for each width, with a warning if it does not.

    Args:
        name: of the kernel.
        error: runs it, and gives its distance from the formula, relative to the largest number.
        like: has the dtype and device that the kernel is wanted for.
        width: what else it is compiled for.
    """
    key = (name, *width, like.dtype, like.device)
    if key not in _trials:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a capture must not wait for the result of a trial
        try:
            wrong = float(error())
            why = (
                "" if wrong < MAX_ERROR[like.dtype] else f"its numbers are off by {wrong:.2g}"
            )  # NaN is not less
        except Exception as failure:  # a compiler that is missing or fails says so in many ways
            why = "it cannot be used: " + (str(failure).strip() or type(failure).__name__).splitlines()[0]
        if why:
            log.warning(
                "the GPU's kernel %s is left out for %s of width %s: %s", name, like.dtype, width, why
            )
        _trials[key] = not why
    return _trials[key]


def _wave(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Give numbers from -1 to 1 that use all of a dtype's mantissa."""
    return torch.linspace(-2e3, 3e3, count, dtype=torch.float64, device=device).sin().to(dtype)


def _off(got: Tensor, want: Tensor) -> Tensor:
    return (got.double() - want).abs().max() / want.abs().max()


def norm_error(x: Tensor, groups: int) -> Tensor:
    """Measure the error of `group_norm` for maps with a map's channels and dtype, with and without its options."""
    module, c = kernels(), x.shape[1]
    cells = min(x.shape[2] * x.shape[3], MAX_CELLS)
    maps = _wave(cells * c, x.dtype, x.device).view(1, 1, cells, c).permute(0, 3, 1, 2)
    weight, bias, shift = (_wave(k * c, torch.float32, x.device)[-c:] for k in (2, 3, 4))
    errors = []
    plain = F.group_norm(maps.double(), groups, weight.double(), bias.double(), 1e-5)
    errors.append(_off(module.group_norm(maps, groups, weight, bias, 1e-5), plain))
    moved = maps.double() + shift.double()[None, :, None, None]
    activated = F.silu(F.group_norm(moved, groups, weight.double(), bias.double(), 1e-5))
    errors.append(
        _off(module.group_norm(maps, groups, weight, bias, 1e-5, shift=shift[None], silu=True), activated)
    )
    return torch.stack(errors).max()


def gate_error(tokens: Tensor, doubled: int) -> Tensor:
    """Measure the error of `geglu` for rows of a width, of the tokens' dtype."""
    x = _wave(9 * doubled, tokens.dtype, tokens.device).view(9, doubled)
    bias = _wave(2 * doubled, torch.float32, tokens.device)[-doubled:].contiguous()
    value, gate = (x.double() + bias).chunk(2, dim=1)
    got = kernels().geglu(x, bias, x.new_empty(9, doubled // 2))
    return _off(got, value * F.gelu(gate))


# --- the backend ---------------------------------------------------------------------------------------


def pack_linear(weight: Tensor, rows: int) -> Any:
    """Give a linear layer's weight (out, in) as it is."""
    return weight


def multiply(x: Tensor, packed: Any, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias + add; x is (..., in)."""
    out = F.linear(x, packed, bias)
    return out if add is None else out.add_(add)


def pack_conv(
    weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, size: Sequence[int]
) -> Tensor:
    """Give a convolution's weight in channels_last."""
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


def convolve(conv: nn.Conv2d, x: Tensor, caches: Mapping[str, Any], add: Tensor | None) -> Tensor:
    """Convolve a map (b, c, h, w) as a layer does, and add a map if there is one; no weight is packed."""
    options = (conv.padding, conv.stride, conv.dilation, conv.groups)
    return run_conv(x, conv.weight, conv.bias, *options, add=add)


def supports_norm(x: Tensor, groups: int) -> bool:
    """Whether `group_norm` takes this (b, c, h, w) map: in channels_last, its channels divided by groups."""
    return (
        x.numel() > 0
        and x.dtype in DTYPES
        and x.shape[1] % groups == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and kernels() is not None
        and is_right(
            "group_norm",
            lambda: norm_error(x, groups),
            x,
            x.shape[1],
            groups,
            min(x.shape[2] * x.shape[3], MAX_CELLS),
        )
    )


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise x + shift (b, c, h, w), then apply SiLU if `silu`; see Backend.group_norm."""
    return kernels().group_norm(x, groups, weight, bias, eps, shift=shift, silu=silu, out=out)


def supports_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Whether `attention` takes these (b, tokens, heads * features) tensors."""
    return k.shape == v.shape and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Compute softmax(scale q k^T) v for each head; see Backend.attention."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def supports_geglu(tokens: Tensor, doubled: int) -> bool:
    """Whether `geglu` takes (rows, doubled) of the tokens' dtype."""
    return (
        doubled % 2 == 0
        and kernels() is not None
        and is_right("geglu", lambda: gate_error(tokens, doubled), tokens, doubled)
    )


def geglu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Write first half * gelu(second half) of x + bias into out; see Backend.geglu."""
    return kernels().geglu(x, bias, out)
