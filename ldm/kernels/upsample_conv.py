"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, decomposed into four 2x2 convolutions of the small map.

Row 2i of the large map depends on rows i - 1 and i of the small one, row 2i + 1 on rows i and i + 1; columns likewise.
So each of the four phases (even or odd row, even or odd column) is a 2x2 convolution, in whose weight the taps that
meet the same cell are added: 4/9 of the products. The phases are then interleaved into one map.
"""

import torch
from torch import Tensor


def phase_weights(weight: Tensor) -> Tensor:
    """Turn the weight (out, in, 3, 3) of the convolution into that of its four phases, (4 out, in, 2, 2)."""
    first, middle, last = weight.float().unbind(dim=2)
    rows = (torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2))
    kernels = []
    for part in rows:  # (out, in, 2, 3)
        first, middle, last = part.unbind(dim=3)
        kernels.append(torch.stack([first, middle + last], 3))
        kernels.append(torch.stack([first + middle, last], 3))
    return torch.cat(kernels).to(weight.dtype)


def interleave_phases(y: Tensor) -> Tensor:
    """Interleave the four phases of an upsampled map, for backends without a kernel of their own for it.

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
