"""A model's networks digit by digit as diffusers computes them: see the option `arithmetic`.

The operations are the same but for two things. The autoencoder's attention projects by 1 x 1 convolutions here, as in
CompVis's, and by linear layers there, whose sums run in another order. And layout in memory differs behind attentions,
by which torch chooses in which order a convolution sums: maps whose channels lie together (channels last) come of
pictures, and of attentions over cells.
"""

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all


class AsDiffusers:
    """Transformers of a UNet that give maps row by row, and attentions of an autoencoder in linear layers."""

    rank: ClassVar[Rank] = Rank.ATTENTION
    is_for_vae: ClassVar[bool] = True

    def at(self, step: StepInfo) -> None:
        """Do nothing: it is so at every step."""

    def attach(self, network: nn.Module) -> Undo:
        """Let the attentions of a UNet, an Encoder or a Decoder compute as diffusers'."""
        is_half = isinstance(network, Encoder | Decoder)
        kind, forward = (AttnBlock, _in_linear_layers) if is_half else (SpatialTransformer, _row_by_row)
        blocks = [part for part in network.modules() if isinstance(part, kind)]
        return undo_all([fill(block, "forward", forward(block)) for block in blocks])

    def state(self) -> Hashable:
        """Say what a captured graph depends on."""
        return ()


def _row_by_row(transformer: SpatialTransformer) -> Callable[..., Tensor]:
    before = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return before(*args, **kwargs).contiguous()

    return forward


def _in_linear_layers(block: AttnBlock) -> Callable[[Tensor], Tensor]:
    def project(layer: nn.Conv2d, cells: Tensor) -> Tensor:
        return F.linear(cells, layer.weight[:, :, 0, 0], layer.bias)

    def forward(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        cells = block.norm(x.reshape(b, c, h * w)).transpose(1, 2)  # (b, h*w, c)
        q, k, v = (project(layer, cells)[:, None] for layer in (block.q, block.k, block.v))
        out = project(block.proj_out, attend(q, k, v)[:, 0])  # (b, h*w, c)
        return out.transpose(1, 2).reshape(b, c, h, w) + x  # in the layout of the first

    return forward
