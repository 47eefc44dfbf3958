"""Keywords of a UNet and of an autoencoder's halves that are small and have every kind of part."""

import torch
from torch import nn

from ldm.modules.diffusionmodules.controlnet import ControlNetModel

UNET = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "legacy": False,
}
VAE = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


def control_shapes(width: int = 32, attention=(1,), **options) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a ControlNet of cldm's with one ResBlock a level."""
    given = {"channel_mult": [1, 2], "num_heads": 8, "transformer_depth": 1, "context_dim": 24, **options}
    with torch.device("meta"):
        network = ControlNetModel(4, width, 3, 1, attention, **given)
    return {name: tuple(one.shape) for name, one in network.state_dict().items()}


def replace_weights_in_place(root: nn.Module, factor: float) -> None:
    """Put other weights where the old ones lay: same memory, shape and count of writes, times a factor."""
    for module in root.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                new = weight.data.mul_(factor).data
                for _ in range(weight._version):
                    new.mul_(1)
                setattr(module, name, nn.Parameter(new))


def ddim_chain(x, predict):
    """Take 20 DDIM steps from x with v1's levels; predict takes x and levels (b,), and gives eps."""
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    for t in range(951, 0, -50):
        eps = predict(x, torch.full((len(x),), t))
        now, after = alpha_bar[t], alpha_bar[max(t - 50, 0)]
        x = after.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
    return x
