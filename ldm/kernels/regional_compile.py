"""Regional compilation: torch.compile of the blocks that a network repeats; and its memory format, channels_last.

One compilation serves all blocks of a kind, so a UNet takes seconds to minutes instead of many minutes.
"""

import torch
from torch import nn

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules import model as vae
from ldm.modules.diffusionmodules import openaimodel as unet

REPEATED_BLOCKS = (unet.ResBlock, BasicTransformerBlock, vae.ResnetBlock, vae.AttnBlock)
_MARK = "_ldm_channels_last"


def compile_blocks(root: nn.Module) -> int:
    """Compile every residual and transformer block in place; return how many."""
    blocks = [module for module in root.modules() if isinstance(module, REPEATED_BLOCKS)]
    for block in blocks:
        block.compile()
    return len(blocks)


def put_channels_last(root: nn.Module) -> None:
    """Put the weights of 2-dimensional convolutions into channels_last, so that maps get that format, too."""
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
            setattr(module, _MARK, True)


def restore(root: nn.Module) -> int:
    """Undo both; return how many modules were restored."""
    changed = 0
    for module in root.modules():
        if isinstance(module, REPEATED_BLOCKS) and module._compiled_call_impl is not None:
            module._compiled_call_impl = None
            changed += 1
        if vars(module).pop(_MARK, False):
            module.to(memory_format=torch.contiguous_format)
            changed += 1
    return changed
