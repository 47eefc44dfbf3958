"""Keywords of a UNet and of an autoencoder's halves that are small and have every kind of part."""

from torch import nn

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


def replace_weights_in_place(root: nn.Module, factor: float) -> None:
    """Put other weights where the old ones lay: same memory, shape and count of writes, times a factor."""
    for module in root.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                new = weight.data.mul_(factor).data
                for _ in range(weight._version):
                    new.mul_(1)
                setattr(module, name, nn.Parameter(new))
