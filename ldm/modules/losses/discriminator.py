"""The patch discriminator of pix2pix (arXiv:1611.07004, Section 3.2.2), with taming-transformers' key names."""

import torch.nn.functional as F
from torch import Tensor, nn


class NLayerDiscriminator(nn.Module):
    """Judge overlapping patches of a picture as real (high) or made (low).

    Args:
        input_nc: channels of the picture.
        ndf: channels after the first layer; each further layer doubles them, up to 8 times.
        n_layers: layers of stride 2; a patch is 70 pixels wide with 3.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        width = ndf
        for n in range(1, n_layers + 1):
            previous, width = width, ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(previous, width, 4, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, True),
            ]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """Map (b, c, height, width) in [-1, 1] to (b, 1, patches, patches) logits."""
        return self.main(input)


def weights_init(module: nn.Module) -> None:
    """Draw a discriminator's weights from N(0, 0.02), its norms' from N(1, 0.02), as pix2pix does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Push real logits above 1 and made ones below -1: 1/2 (relu(1 - real) + relu(1 + fake))."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Binary cross-entropy of the original GAN: 1/2 (softplus(-real) + softplus(fake))."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return weight from step `threshold` on, `value` before."""
    return value if global_step < threshold else weight
