"""LPIPS, the perceptual distance of arXiv:1801.03924: VGG-16 features, weighed per channel.

Its weights are not shipped. `LPIPS()` reads them from model_data/lpips/lpips_vgg16.safetensors, with the key names
of taming-transformers (`net.slice1.0.weight` ... `lin4.model.1.weight`).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import AbsentError, MismatchError
from ldm.paths import CHECKOUT

WEIGHTS = CHECKOUT / "model_data" / "lpips" / "lpips_vgg16.safetensors"
# VGG-16's convolutions in five slices, each ending at the activation that is compared; the numbers are those of
# torchvision's `features`, which the key names carry on. A slice after the first begins with a pooling layer.
SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
WIDTHS = (64, 128, 256, 512, 512)


class Vgg16(nn.Module):
    """The five compared activations of VGG-16."""

    def __init__(self) -> None:
        super().__init__()
        for number, convolutions in enumerate(SLICES, start=1):
            layers = nn.Sequential()
            if number > 1:
                layers.add_module(str(convolutions[0][0] - 1), nn.MaxPool2d(2, 2))
            for index, width_in, width_out in convolutions:
                layers.add_module(str(index), nn.Conv2d(width_in, width_out, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU())
            setattr(self, f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (b, 3, height, width) to five activations, each half as large as the one before."""
        activations = []
        for number in range(1, len(SLICES) + 1):
            x = getattr(self, f"slice{number}")(x)
            activations.append(x)
        return activations


class NetLinLayer(nn.Module):
    """One weight per channel; the dropout only numbers the key as the original does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))


class LPIPS(nn.Module):
    """Perceptual distance of two pictures.

    Args:
        weights: a safetensors file; None reads model_data/lpips/lpips_vgg16.safetensors.

    Raises:
        AbsentError: the file is not there; the message says where to put it.
        MismatchError: it holds other tensors.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.net = Vgg16()
        for number, width in enumerate(WIDTHS):
            setattr(self, f"lin{number}", NetLinLayer(width))
        # ImageNet's channel means and deviations, for pictures in [-1, 1].
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1), persistent=False
        )
        self.register_buffer(
            "scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1), persistent=False
        )
        self.load(WEIGHTS if weights is None else Path(weights))
        self.requires_grad_(False)

    def load(self, path: Path) -> None:
        """Read all weights from a safetensors file; see the class for the errors."""
        if not path.is_file():
            raise AbsentError(
                f"perceptual_weight > 0 needs the weights of LPIPS, but there is no file {path}; put them there "
                "(VGG-16's and the linear layers' as one safetensors file), or set perceptual_weight: 0"
            )
        from safetensors.torch import load_file

        tensors = load_file(path)
        wanted = self.state_dict()
        wrong = sorted(
            key
            for key in wanted.keys() | tensors.keys()
            if key not in wanted or key not in tensors or wanted[key].shape != tensors[key].shape
        )
        if wrong:
            raise MismatchError(
                f"{path} does not hold the weights of LPIPS: {len(wrong)} tensors differ, first '{wrong[0]}'; "
                "put taming-transformers' names and shapes there, or set perceptual_weight: 0"
            )
        self.load_state_dict(tensors)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compare (b, 3, height, width) pictures in [-1, 1]; returns (b, 1, 1, 1), 0 for equal ones."""
        first, second = (self.net((x - self.shift) / self.scale) for x in (input, target))
        total = torch.zeros(())
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            weigh = getattr(self, f"lin{number}").model[1]
            total = total + weigh((unit(a) - unit(b)).square()).mean(dim=(2, 3), keepdim=True)
        return total


def unit(activation: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale each pixel's channels to length 1."""
    return activation / (activation.square().sum(dim=1, keepdim=True).sqrt() + eps)
