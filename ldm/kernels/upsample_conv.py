"""Doubled maps from their four phases, for engines that have no kernel for that."""

import torch
from torch import Tensor


def interleave_phases(y: Tensor) -> Tensor:
    """Lay the four phases of doubled maps out as one; as native.interleave_phases.

    Args:
        y: (b, 4 c, h + 1, w + 1); channels (2 i + j) c and on are the cells of rows i, i + 2, ... and columns j,
            j + 2, ..., from row i and column j of y on.

    Returns:
        (b, c, 2 h, 2 w), channels last.
    """
    b, c, h, w = y.shape[0], y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    size = (b, c, 2 * h, 2 * w)
    out = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    for i in range(2):
        for j in range(2):
            first = (2 * i + j) * c
            out[:, :, i::2, j::2] = y[:, first : first + c, i : i + h, j : j + w]
    return out
