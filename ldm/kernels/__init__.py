"""Faster ways through the modules of ldm.modules, of the same numbers up to rounding.

Nothing here has weights of its own or is needed: each way stands in for the plain code of a module, is tested against
it, and leaves to it whatever it does not serve.
"""

import torch
from torch import nn

from ldm.errors import UsageError

__all__ = ["optimize", "restore"]


def optimize(
    model: nn.Module,
    *,
    compile: bool = False,
    tiled_vae: bool = False,
    sliced_vae: bool = False,
    low_vram: torch.device | None = None,
    vae_graphs: bool = False,
) -> nn.Module:
    """Let a model, or any part of one, compute faster or in less memory; its keys, weights and classes stay.

    On a CPU, where no gradients are asked for and the numbers are float32 or bfloat16: convolutions and linear layers
    by oneDNN with weights laid out beforehand (a second copy of them), channels last, attention, norms and gates by
    kernels that are built for this machine at the first call, and, under guidance, what both halves of a batch share
    done once. What was freed is kept by the process for the next step instead of going back to the system.
    On CUDA, likewise without gradients: channels last, group norms with SiLU and gates by Triton kernels, sums and
    upsampling as above, and the UNet recorded as a CUDA graph for each of a few shapes. Elsewhere: channels last.

    Weights that change later are noticed, unless they are written through `.data`: call `restore` and `optimize` again.

    Args:
        compile: compile the residual and transformer blocks by torch.compile instead; the first calls take minutes.
        tiled_vae: let the autoencoder work in strips of rows: a fraction of the memory, no seams, slower.
        sliced_vae: let the autoencoder take the pictures of a batch one after the other.
        low_vram: a device that the weights, which stay where they are, visit part by part (offload.py): a fraction of
            the memory, much slower. The plain code does the work.
        vae_graphs: record the autoencoder's halves, too: on CUDA, where pictures are small and many. For 512 x 512 in
            float32 a recording keeps 2 to 3 GiB.

    Returns:
        the model.

    Raises:
        UsageError: tiled_vae, sliced_vae or vae_graphs for a model without an encoder or decoder of ours; low_vram and
            compile; vae_graphs elsewhere than on CUDA, or with low_vram or tiled_vae.
    """
    from ldm.kernels import cuda_graphs, fused, malloc, offload, regional_compile, vae_tiling

    restore(model)
    ways = {"tiled_vae": tiled_vae, "sliced_vae": sliced_vae, "vae_graphs": vae_graphs}
    for name, is_wanted in ways.items():
        if is_wanted and not vae_tiling.halves(model):
            raise UsageError(
                f"{name} is for a model with an autoencoder, {type(model).__name__} has none; leave it out"
            )
    if low_vram is not None and compile:
        raise UsageError(
            "low_vram moves weights that compiled code expects to stay; leave one of the two out"
        )
    device = next(model.parameters()).device.type if low_vram is None else low_vram.type
    if vae_graphs and (device != "cuda" or low_vram is not None or tiled_vae):
        instead = "low_vram" if low_vram is not None else "tiled_vae" if tiled_vae else f"a model on {device}"
        raise UsageError(
            f"vae_graphs is for whole autoencoders whose weights are on CUDA, got {instead}; leave it out"
        )
    if tiled_vae:
        vae_tiling.attach(model)
    if device == "cpu":
        malloc.keep(model)
    else:
        regional_compile.put_channels_last(model)
    if low_vram is not None:
        offload.attach(model, low_vram)
    elif compile:
        regional_compile.compile_blocks(model)
    else:
        fused.attach(model)
    if device == "cuda" and low_vram is None:
        cuda_graphs.attach(model, vae=vae_graphs)
    if sliced_vae:
        vae_tiling.attach_slicing(model)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: the plain code again, as it was.

    Returns:
        the model.
    """
    from ldm.kernels import fused, malloc, offload, regional_compile

    offload.detach(model)
    fused.detach(model)
    regional_compile.restore(model)
    malloc.give_back(model)
    return model
