"""Native library: the C++ kernels in cpp/, compiled for this machine, and their calls on tensors by ctypes.

Where there is no compiler, or it fails, `library` gives None with a warning in the log, and fused modules fall back.
"""

import ctypes
import functools
import logging
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import ResourceError
from ldm.kernels.build import build

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LANES = 16  # of a vector register; channels and widths are a multiple of it, except in attention
MAX_FEATURES = 512  # of a head
LEVELS = ("none", "plain", "AVX512-BF16", "AMX")

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "ldm_level": (_int, []),
    "ldm_attention_bytes": (_size, [_int, *[_size] * 5, _int]),
    "ldm_attention": (None, [_int, *[_size] * 5, *[_pointer, _size] * 4, _float, _int, _pointer, _int]),
    "ldm_norm_bytes": (_size, [_size] * 3),
    "ldm_group_norm": (
        None,
        [_int, *[_size] * 4, *[_pointer] * 4, _size, _float, _int, _pointer, _pointer, _int],
    ),
    "ldm_geglu": (None, [_int, _size, _size, _pointer, _pointer, _pointer, _int]),
    "ldm_interleave_phases": (None, [_int, *[_size] * 4, *[_pointer] * 2, _int]),
    "ldm_product_dtypes": (_int, []),
    "ldm_linear": (
        None,
        [_int, *[_size] * 3, _pointer, _size, *[_pointer] * 3, _size, _int, _pointer, _size, _pointer, _int],
    ),
    "ldm_convolution": (None, [_int, *[_size] * 11, *[_pointer] * 6, _int]),
    "ldm_winograd_input": (None, [*[_size] * 5, _pointer, _pointer, _int]),
    "ldm_winograd_output": (None, [*[_size] * 5, *[_pointer] * 4, _int]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Build the library, or find it in the cache, and load it; None, with a warning in the log, where that fails."""
    try:
        # torch brings its own OpenMP, whose symbols are global in the process; a library linked without one resolves to
        # them, and both share a thread pool. Where that fails, one linked with the compiler's OpenMP is loaded.
        variants = {"": (), "-omp": ("-fopenmp",)}
        found = _load(build(SOURCES, FLAGS, variants))
    except ResourceError as error:
        log.warning("the CPU's own kernels are left out: %s", error)
        return None
    log.info("the CPU's kernels multiply bfloat16 by %s", LEVELS[found.ldm_level()])
    return found


def _load(paths: list[Path]) -> ctypes.CDLL:
    reasons = []
    for path in paths:
        try:
            found = ctypes.CDLL(str(path))
        except OSError as error:
            reasons.append(str(error))
            continue
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
        if not found.ldm_level():
            raise ResourceError("the system does not let this process use the processor's tiles")
        return found
    raise ResourceError("; ".join(reasons))


_local = threading.local()


def _workspace(size: int) -> int:
    """Give the address of so many bytes of scratch memory, aligned to 64, valid until this thread's next call."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size + 64:
        buffer = _local.buffer = torch.empty(size + 64, dtype=torch.uint8)
    return buffer.data_ptr() + -buffer.data_ptr() % 64


def _plain(*tensors: Tensor) -> bool:
    """Whether these are CPU tensors with storage, of one dtype that the kernels take."""
    dtype = tensors[0].dtype
    kinds = (Tensor, torch.nn.Parameter)
    fine = all(type(x) in kinds and x.device.type == "cpu" and x.dtype == dtype for x in tensors)
    return fine and dtype in DTYPES and library() is not None


def supports_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Whether `attention` takes these (b, tokens, heads * features) tensors."""
    return (
        _plain(q, k, v)
        and q.dim() == 3
        and k.shape == v.shape
        and q.shape[2] == k.shape[2]
        and q.shape[2] // heads <= MAX_FEATURES
        and min(q.numel(), k.numel()) > 0
        and all(x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) for x in (q, k, v))
    )


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Compute softmax(scale q k^T) v for each head; see `_attention`."""
    return _attention(q, k, v, heads, scale, causal=False)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Compute the same where token i sees tokens 0 to i alone, as in a text encoder; n and m are the same."""
    return _attention(q, k, v, heads, scale, causal=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, causal: bool) -> Tensor:
    """Attend by the kernel in cpp/attention.cpp.

    Args:
        q: (b, n, heads * features).
        k, v: (b, m, heads * features). Heads lie side by side, as a linear layer gives them.

    Returns:
        (b, n, heads * features), contiguous.
    """
    found, threads = library(), torch.get_num_threads()
    (b, n, width), m = q.shape, k.shape[1]
    out = torch.empty((b, n, width), dtype=q.dtype)
    shape = (DTYPES[q.dtype], b, heads, n, m, width // heads)
    space = _workspace(found.ldm_attention_bytes(*shape, threads))
    ends = (part for x in (q, k, v, out) for part in (x.data_ptr(), x.stride(1)))
    found.ldm_attention(*shape, *ends, scale, causal, space, threads)
    return out


def supports_norm(x: Tensor, groups: int) -> bool:
    """Whether `group_norm` takes this (b, c, h, w) map: in channels_last, its channels divided by groups and LANES."""
    return (
        _plain(x)
        and x.dim() == 4
        and x.numel() > 0
        and x.shape[1] % LANES == 0
        and x.shape[1] % groups == 0
        and x.is_contiguous(memory_format=torch.channels_last)
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
    """Normalise x + shift over groups of channels, scale it, and apply SiLU if `silu`.

    Args:
        x: (b, c, h, w), channels last.
        weight, bias: (c,) or (b, c) float32, contiguous.
        shift: (b, c) float32, contiguous, or None.
        out: of x's kind, may be x; None makes one.
    """
    found = library()
    b, c, h, w = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    space = _workspace(found.ldm_norm_bytes(b, h * w, c))
    found.ldm_group_norm(
        DTYPES[x.dtype],
        b,
        h * w,
        c,
        groups,
        x.data_ptr(),
        None if shift is None else shift.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        0 if weight.dim() == 1 else c,
        eps,
        silu,
        out.data_ptr(),
        space,
        torch.get_num_threads(),
    )
    return out


def interleave_phases(y: Tensor) -> Tensor:
    """Interleave the four phases of an upsampled map.

    Args:
        y: (b, 4 c, h + 1, w + 1), channels last; channels (2 i + j) c and on are the cells of rows i, i + 2, ... and
            columns j, j + 2, ..., from row i and column j of y on.

    Returns:
        (b, c, 2 h, 2 w), channels last.
    """
    b, c, h, w = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    out = torch.empty((b, c, 2 * h, 2 * w), dtype=y.dtype, memory_format=torch.channels_last)
    library().ldm_interleave_phases(
        DTYPES[y.dtype], b, h, w, c, y.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def supports_geglu(tokens: Tensor, doubled: int) -> bool:
    """Whether `geglu` takes (rows, doubled) of the tokens' dtype, which has to be one of DTYPES."""
    return doubled % (2 * LANES) == 0 and library() is not None


def geglu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Write first half * gelu(second half) of x + bias.

    Args:
        x: (rows, 2 width), contiguous.
        bias: (2 width,) float32.
        out: (rows, width) of x's dtype, contiguous.
    """
    rows, width = x.shape
    library().ldm_geglu(
        DTYPES[x.dtype],
        rows,
        width // 2,
        x.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


ACTIVATIONS = {None: 0, "quick_gelu": 1, "gelu": 2}
_STEP = {torch.float32: 1, torch.bfloat16: 2}  # of the reduction, in one multiplication


def has_product(dtype: torch.dtype) -> bool:
    """Whether this machine has `linear` and `convolution` in a dtype: AVX-512 for float32, AMX for bfloat16."""
    found = library()
    return found is not None and dtype in DTYPES and bool(found.ldm_product_dtypes() >> DTYPES[dtype] & 1)


class PackedProduct(NamedTuple):
    """A weight (out, k) laid out for `linear` or `convolution`: 16 rows side by side.

    Attributes:
        blocks: (out * k,), in the order of cpp/product.cpp.
        outs, k: of the weight, k with the zeros that a tile needs after it.
        kernel, stride, padding: of a convolution, whose k counts taps before channels.
    """

    blocks: Tensor
    outs: int
    k: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0


def pack_product(weight: Tensor, stride: int = 1, padding: int = 0) -> PackedProduct:
    """Lay a linear layer's weight (out, in) or a convolution's (out, in, side, side) out; 16 divides out."""
    kernel = weight.shape[-1] if weight.dim() == 4 else 1
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    outs, step = weight.shape[0], _STEP[weight.dtype]
    # A tile takes 32 numbers of bfloat16 at a time; of float32 any number will do.
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % (32 if step == 2 else 1)))
    k = weight.shape[1]
    if step == 1:  # up to four blocks side by side
        groups = [group.t().flatten() for group in weight.split(4 * LANES)]
        blocks = torch.cat(groups)
    else:
        blocks = weight.reshape(outs // LANES, LANES, k // step, step).transpose(1, 2).flatten()
    return PackedProduct(blocks, outs, k, kernel, stride, padding)


def linear(
    x: Tensor, weights: PackedProduct, bias: Tensor | None, add: Tensor | None = None, act: str | None = None
) -> Tensor:
    """Compute act(x W^T + bias) + add, of few rows.

    Args:
        x: (..., k), contiguous, k as the weight has it.
        bias: (out,) of x's dtype, or None.
        add: (..., out), contiguous, of x's dtype, or None.
        act: None, "quick_gelu" or "gelu" (the exact one).
    """
    dtype, outs, k = DTYPES[x.dtype], weights.outs, weights.k
    out = torch.empty((*x.shape[:-1], outs), dtype=x.dtype)
    library().ldm_linear(
        dtype,
        x.numel() // k,
        k,
        outs,
        x.data_ptr(),
        k,
        weights.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if add is None else add.data_ptr(),
        outs,
        ACTIVATIONS[act],
        out.data_ptr(),
        outs,
        _workspace(64 * k),
        torch.get_num_threads(),
    )
    return out


def convolution(x: Tensor, weights: PackedProduct, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Convolve a small map, zeros around it, and add a map if there is one.

    Args:
        x: (b, c, h, w), channels last.
        bias: (out,) of x's dtype, or None.
        add: of the result's shape and x's dtype, channels last, or None.
    """
    (b, c, h, w), side = x.shape, weights.kernel
    height, width = (1 + (n + 2 * weights.padding - side) // weights.stride for n in (h, w))
    out = torch.empty((b, weights.outs, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    library().ldm_convolution(
        DTYPES[x.dtype],
        b,
        h,
        w,
        c,
        side,
        weights.stride,
        weights.padding,
        height,
        width,
        weights.k,
        weights.outs,
        x.data_ptr(),
        weights.blocks.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if add is None else add.data_ptr(),
        out.data_ptr(),
        _workspace((16 + b * height * width) * weights.k * x.element_size()),
        torch.get_num_threads(),
    )
    return out


def winograd_input(x: Tensor, first: int, rows: int, out: Tensor) -> None:
    """Transform the 4x4 input tiles of 2x2 outputs (B^T d B).

    Args:
        x: (b, c, h, w) float32, channels last.
        first, rows: which rows of tiles, counted through the whole batch.
        out: (16, rows * tiles in a row, c), contiguous, to be written.
    """
    _, c, h, w = x.shape
    library().ldm_winograd_input(h, w, c, first, rows, x.data_ptr(), out.data_ptr(), torch.get_num_threads())


def winograd_output(
    products: list[Tensor], bias: Tensor | None, add: Tensor | None, out: Tensor, first: int, rows: int
) -> None:
    """Transform products into 2x2 outputs (A^T m A), plus bias and `add`.

    Args:
        products: 16 of (rows * tiles in a row, c), contiguous.
        bias: (c,) or None.
        add: of out's kind, or None.
        out: (b, c, h, w) float32, channels last; the rows of tiles from first on are written.
    """
    _, c, h, w = out.shape
    library().ldm_winograd_output(
        h,
        w,
        c,
        first,
        rows,
        (ctypes.c_void_p * 16)(*(part.data_ptr() for part in products)),
        None if bias is None else bias.data_ptr(),
        None if add is None else add.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
