"""Optimisation: the modules of ldm.modules computed faster or in less memory, with the same numbers up to rounding.

Nothing here has weights of its own or is needed. Each fused forward, graph and tile is tested against the module's own
code, which is the fallback for whatever is not supported.
"""

import torch
from torch import nn

from ldm.errors import UsageError
from ldm.modules.seams import forget_said

__all__ = ["optimize", "restore", "ways_of"]

_WAYS = "optimized_by"  # the attribute of a module that says how it is optimised


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

    On a CPU, without gradients and in float32 or bfloat16: convolutions and linear layers by oneDNN with packed weights
    (a second copy of them), channels_last, attention, norms and gates by C++ kernels that are compiled for this machine
    at the first call, and, under guidance, the blocks that both halves of a batch share run once. Freed memory stays
    with the process for the next step.
    On CUDA, likewise without gradients: channels_last, group norms with SiLU and gates by Triton kernels, sums and
    upsampling as above, and the UNet captured as a CUDA graph for each of a few shapes. Elsewhere: channels_last.

    Weights that change later are noticed, unless they are written through `.data`: call `restore` and `optimize` again.

    Args:
        compile: compile the residual and transformer blocks by torch.compile instead; the first calls take minutes.
        tiled_vae: VAE tiling, exact and without seams: a fraction of the memory, slower.
        sliced_vae: VAE slicing: the images of a batch go through the autoencoder one after the other.
        low_vram: sequential CPU offload: a device that parts of the model are copied to in turn, while the weights stay
            in CPU memory: a fraction of the memory, much slower. Nothing is fused.
        vae_graphs: capture the autoencoder's halves, too: on CUDA, for many small images. For 512 x 512 in float32 a
            graph keeps 2 to 3 GiB.

    Returns:
        the model.

    Raises:
        UsageError: tiled_vae, sliced_vae or vae_graphs for a model without an encoder or decoder of ours; low_vram and
            compile; vae_graphs elsewhere than on CUDA, or with low_vram or tiled_vae.
    """
    from ldm.kernels import cuda_graphs, fused, malloc, offload, regional_compile, vae_tiling

    restore(model)
    forget_said()
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
        malloc.keep_freed(model)
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
    how = "low_vram" if low_vram is not None else "compile" if compile else "fused"
    setattr(model, _WAYS, (how, *filter(ways.get, ways)))
    return model


def ways_of(model: nn.Module) -> list[str]:
    """List how a model or its parts are optimised: "fused", "compile" or "low_vram", and the VAE's ways; [] = plain."""
    return sorted({way for part in model.modules() for way in vars(part).get(_WAYS, ())})


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: the plain code again, as it was.

    Returns:
        the model.
    """
    from ldm.kernels import fused, malloc, offload, regional_compile

    offload.detach(model)
    fused.detach(model)
    regional_compile.restore(model)
    malloc.restore_defaults(model)
    for part in model.modules():
        vars(part).pop(_WAYS, None)
    return model
