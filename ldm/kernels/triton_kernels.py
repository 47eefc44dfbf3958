"""Triton kernels: group norm with SiLU, and the gate of GEGLU, for maps in channels_last on a GPU.

torch's group norm gives a contiguous map whatever it gets, so that each of a UNet's 61 norms would convert the memory
format. Triton comes with torch for CUDA; cuda.py falls back where it is missing. With TRITON_INTERPRET=1 the same code
runs on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CELLS, BLOCK_CHANNELS = 32, 128  # of a map, in one step of a program
MIN_CELLS, MAX_CHUNKS = 64, 128  # as in cpp/norm.cpp: the chunks of a map's partial sums
BLOCK_ROWS, BLOCK_WIDTH = 8, 256  # of gated tokens


@triton.jit
def _add_up(
    x, partial, cells, channels, size, chunks, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    # Sums, over a chunk of cells, of each channel's distance from its first cell's value, and of the distance's square.
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = c < channels
    picture = x + b * cells * channels
    pivot = tl.load(picture + c, mask=known, other=0).to(tl.float32)
    s = tl.zeros([BLOCK_CHANNELS], tl.float32)
    q = tl.zeros([BLOCK_CHANNELS], tl.float32)
    first = chunk * size
    last = tl.minimum(first + size, cells)
    for start in range(first, last, BLOCK_CELLS):
        i = start + tl.arange(0, BLOCK_CELLS)
        inside = (i < last)[:, None] & known[None, :]
        at = picture + i.to(tl.int64)[:, None] * channels + c[None, :]
        d = tl.where(inside, tl.load(at, mask=inside, other=0).to(tl.float32) - pivot[None, :], 0.0)
        s += tl.sum(d, axis=0)
        q += tl.sum(d * d, axis=0)
    to = partial + (b * chunks + chunk) * 2 * channels + c
    tl.store(to, s, mask=known)
    tl.store(to + channels, q, mask=known)


@triton.jit
def _join(
    x,
    partial,
    shift,
    weight,
    bias,
    affine,
    cells,
    channels,
    chunks,
    share,
    affine_stride,
    eps,
    HAS_SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    SHARE: tl.constexpr,
):
    # Means and squares of single channels are combined into the group's; the result is a factor and an offset each.
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j, k = tl.arange(0, SHARE), tl.arange(0, CHUNKS)
    known = j < share
    c = g * share + j
    wanted = (k < chunks)[:, None] & known[None, :]
    at = partial + (b * chunks + k)[:, None] * 2 * channels + c[None, :]
    s = tl.sum(tl.load(at, mask=wanted, other=0), axis=0)
    q = tl.sum(tl.load(at + channels, mask=wanted, other=0), axis=0)
    shifted = tl.zeros([SHARE], tl.float32)
    if HAS_SHIFT:
        shifted = tl.load(shift + b * channels + c, mask=known, other=0)
    pivot = tl.load(x + b * cells * channels + c, mask=known, other=0).to(tl.float32) + shifted
    means = tl.where(known, pivot + s / cells, 0.0)
    mean = tl.sum(means, axis=0) / share
    apart = tl.where(known, means - mean, 0.0)
    within = tl.where(known, q - s * s / cells, 0.0)
    variance = tl.sum(within, axis=0) / cells / share + tl.sum(apart * apart, axis=0) / share
    factor = tl.load(weight + b * affine_stride + c, mask=known, other=0) / tl.sqrt(variance + eps)
    offset = tl.load(bias + b * affine_stride + c, mask=known, other=0) + factor * (shifted - mean)
    tl.store(affine + b * 2 * channels + c, factor, mask=known)
    tl.store(affine + (b * 2 + 1) * channels + c, offset, mask=known)


@triton.jit
def _apply(
    x,
    affine,
    out,
    cells,
    channels,
    size,
    SILU: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = c < channels
    factor = tl.load(affine + b * 2 * channels + c, mask=known, other=0)[None, :]
    offset = tl.load(affine + (b * 2 + 1) * channels + c, mask=known, other=0)[None, :]
    first = chunk * size
    last = tl.minimum(first + size, cells)
    for start in range(first, last, BLOCK_CELLS):
        i = start + tl.arange(0, BLOCK_CELLS)
        inside = (i < last)[:, None] & known[None, :]
        at = (b * cells + i.to(tl.int64)[:, None]) * channels + c[None, :]
        y = tl.load(x + at, mask=inside, other=0).to(tl.float32) * factor + offset
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(x, bias, out, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64))[:, None]
    c = (tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH))[None, :]
    inside = (row < rows) & (c < width)
    value = tl.load(x + row * 2 * width + c, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x + (row * 2 + 1) * width + c, mask=inside, other=0).to(tl.float32)
    value += tl.load(bias + c, mask=c < width, other=0)
    gate += tl.load(bias + width + c, mask=c < width, other=0)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * width + c, (value * gelu).to(out.dtype.element_ty), mask=inside)


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
    """Normalise x + shift over groups of channels, scale it, and apply SiLU if `silu`; see Backend.group_norm.

    Args:
        x: (b, c, h, w), channels last.
        weight, bias: (c,) or (b, c) float32, contiguous.
        shift: (b, c) float32, contiguous, or None.
        out: of x's kind, may be x; None makes one.
    """
    b, c, h, w = x.shape
    cells, share = h * w, c // groups
    out = torch.empty_like(x, memory_format=torch.channels_last) if out is None else out
    size = max(MIN_CELLS, -(-cells // MAX_CHUNKS))
    chunks = -(-cells // size)
    partial = torch.empty((b, chunks, 2, c), dtype=torch.float32, device=x.device)
    affine = torch.empty((b, 2, c), dtype=torch.float32, device=x.device)
    blocks = {"BLOCK_CELLS": BLOCK_CELLS, "BLOCK_CHANNELS": min(BLOCK_CHANNELS, triton.next_power_of_2(c))}
    grid = (chunks, b, triton.cdiv(c, blocks["BLOCK_CHANNELS"]))
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _add_up[grid](x, partial, cells, c, size, chunks, **blocks)
        _join[(groups, b)](
            x,
            partial,
            weight if shift is None else shift,
            weight,
            bias,
            affine,
            cells,
            c,
            chunks,
            share,
            0 if weight.dim() == 1 else c,
            eps,
            HAS_SHIFT=shift is not None,
            CHUNKS=triton.next_power_of_2(chunks),
            SHARE=triton.next_power_of_2(share),
        )
        _apply[grid](x, affine, out, cells, c, size, SILU=silu, **blocks)
    return out


def geglu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Write first half * gelu(second half) of x + bias into out; see Backend.geglu.

    Args:
        x: (rows, 2 width), contiguous.
        bias: (2 width,) float32.
        out: (rows, width) of x's dtype, contiguous.
    """
    rows, width = out.shape
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(width, BLOCK_WIDTH))
    with torch.cuda.device_of(x):
        _gate[grid](x, bias, out, rows, width, BLOCK_ROWS=BLOCK_ROWS, BLOCK_WIDTH=BLOCK_WIDTH)
    return out
