"""Faster ways through the modules of ldm.modules, of the same numbers up to rounding; and two knobs that cost some
fidelity, deepcache.py and tome.py, which nothing here turns.

Nothing here has weights of its own or is needed: each way stands in for the plain code of a module, is tested against
it, and leaves to it whatever it does not serve.
"""

from torch import nn

from ldm.errors import UsageError

__all__ = ["optimize", "restore"]


def optimize(model: nn.Module, *, compile: bool = False, tiled_vae: bool = False) -> nn.Module:
    """Let a model, or any part of one, compute faster; its keys, weights and classes stay as they are.

    On a CPU, where no gradients are asked for and the numbers are float32 or bfloat16: convolutions and linear layers
    by oneDNN with weights laid out beforehand (a second copy of them), channels last, attention, norms and gates by
    kernels that are built for this machine at the first call, and, under guidance, what both halves of a batch share
    done once. What was freed is kept by the process for the next step instead of going back to the system.
    Elsewhere: channels last.

    Weights that change later are noticed, unless they are written through `.data`: call `restore` and `optimize` again.

    Args:
        compile: compile the residual and transformer blocks by torch.compile instead; the first calls take minutes.
        tiled_vae: let the autoencoder work in strips of rows (strips.py): a fraction of the memory, no seams, slower.

    Returns:
        the model.

    Raises:
        UsageError: tiled_vae for a model without an encoder or decoder of ours.
    """
    from ldm.kernels import memory, regions, stand_ins, strips

    restore(model)
    if tiled_vae and not strips.attach(model):
        raise UsageError(
            f"tiled_vae is for a model with an autoencoder, {type(model).__name__} has none; leave it out"
        )
    device = next(model.parameters()).device.type
    if compile:
        regions.compile_blocks(model)
    if device == "cpu":
        memory.keep(model)
        if not compile:
            stand_ins.attach(model)
    else:
        regions.put_channels_last(model)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: the plain code again, as it was.

    Returns:
        the model.
    """
    from ldm.kernels import memory, regions, stand_ins

    stand_ins.detach(model)
    regions.restore(model)
    memory.give_back(model)
    return model
