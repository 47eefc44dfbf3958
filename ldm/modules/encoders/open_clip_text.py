"""The text half of OpenCLIP's models, with its key names: what Stable Diffusion 2 reads its prompts with.

The same network as OpenAI's (arXiv:2103.00020) but for its sizes and its activation.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UsageError

VOCABULARY, CONTEXT = 49408, 77


class Sizes(NamedTuple):
    """Of a text half."""

    width: int
    layers: int
    heads: int
    embed_dim: int  # of the space that texts and pictures share


SIZES = {
    "ViT-B-32": Sizes(512, 12, 8, 512),
    "ViT-B-16": Sizes(512, 12, 8, 512),
    "ViT-L-14": Sizes(768, 12, 12, 768),
    "ViT-H-14": Sizes(1024, 24, 16, 1024),
    "ViT-g-14": Sizes(1024, 24, 16, 1024),
    "ViT-bigG-14": Sizes(1280, 32, 20, 1280),
}


def sizes_of(arch: str) -> Sizes:
    """Look an architecture up by OpenCLIP's name; those not in SIZES, in the package where it is installed.

    Raises:
        UsageError: an unknown name.
    """
    name = arch.removesuffix("-quickgelu")
    if name in SIZES:
        return SIZES[name]
    try:
        from open_clip import get_model_config
    except ImportError:
        config = None
    else:
        config = get_model_config(arch)
    text = (config or {}).get("text_cfg", {})
    if not {"width", "layers", "heads"} <= text.keys():
        raise UsageError(
            f"OpenCLIP's text encoder '{arch}' is unknown; there are {', '.join(SIZES)}, and with open_clip_torch "
            "installed those that it names, if they have CLIP's own text half"
        )
    return Sizes(text["width"], text["layers"], text["heads"], config["embed_dim"])


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), what OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Attention and a perceptron, each normed before and added to its input; x is (n, b, width)."""

    def __init__(self, width: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=activation(), c_proj=nn.Linear(4 * width, width)
            )
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        h = self.ln_1(x)
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; `grad_checkpointing` recomputes them in the backward pass."""

    def __init__(self, width: int, layers: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation) for _ in range(layers)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, leave_out: int = 0) -> Tensor:
        """Run all blocks but the last `leave_out`."""
        for block in self.resblocks[: len(self.resblocks) - leave_out]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class OpenCLIPText(nn.Module):
    """OpenCLIP's model without its pictures' half: the names that its checkpoints have.

    `text_projection` and `logit_scale` are of no use to a prompt, but in the checkpoints.
    """

    def __init__(
        self, sizes: Sizes, *, quick_gelu: bool = False, vocabulary: int = VOCABULARY, context: int = CONTEXT
    ):
        super().__init__()
        activation = QuickGELU if quick_gelu else nn.GELU
        self.transformer = Transformer(sizes.width, sizes.layers, sizes.heads, activation)
        self.token_embedding = nn.Embedding(vocabulary, sizes.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, sizes.width))
        self.ln_final = nn.LayerNorm(sizes.width)
        self.text_projection = nn.Parameter(sizes.width**-0.5 * torch.randn(sizes.width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.full((), 2.6593))  # log(1 / 0.07)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # A constant: made for real even on the meta device, and read by no loader.
        later = torch.full((context, context), -torch.inf, device="cpu").triu(1)
        self.register_buffer("attn_mask", later, persistent=False)
        self.register_load_state_dict_pre_hook(_drop_constants)


def _drop_constants(module: nn.Module, state_dict: dict, prefix: str, *args: object) -> None:
    state_dict.pop(f"{prefix}attn_mask", None)
