"""What a batch draws its noise from: a generator for each image, on the CPU or as an NVIDIA GPU has it, or one for all.

`begin` draws x_T, and a call what a step asks for.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.helpers import upload
from ldm.process.philox import cuda_normal


@dataclass(frozen=True)
class SeedOptions:
    """How an image's noise departs from what its seed alone gives; A1111's "Extra" seeds, by its formulas.

    Attributes:
        variation_seeds: one an image, of the noise that x_T is moved towards.
        variation_strength: how far: 0 = not at all, 1 = all the way.
        resize_from: (h, w) in latent cells: the middle of x_T is the noise that the seed gives for that size.
        seed_delta: added to the seed for all noise after x_T ("ENSD").
    """

    variation_seeds: Sequence[int] = ()
    variation_strength: float = 0.0
    resize_from: tuple[int, int] | None = None
    seed_delta: int = 0


class ImageNoise:
    """One CPU generator for each image, float32: what image i draws depends on its seed alone.

    Not on the batch it is in, nor on the device. (torch.randn of a batch has no such law: row i is not what
    seed + i gives, and row 0 only if the image holds a multiple of 16 numbers.)
    """

    def __init__(self, seeds: Sequence[int], options: SeedOptions | None = None):
        self.seeds = list(seeds)
        self.options = options or SeedOptions()
        self.generators = [self.generator(seed) for seed in self.seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of this shape, its first dimension being the images."""
        return self._upload([self.draw(generator, like.shape[1:]) for generator in self.generators], like)

    def begin(self, like: Tensor) -> Tensor:
        """Draw x_T, shaped like this (b, c, h, w), as the seeds' options say."""
        shape, options = tuple(like.shape[1:]), self.options
        small = shape if options.resize_from is None else (shape[0], *options.resize_from)
        drawn = []
        for i, (seed, generator) in enumerate(zip(self.seeds, self.generators, strict=True)):
            # Of another size it is what a fresh generator gives, and the seed's own one fills in what is around it.
            noise = self.draw(generator if small == shape else self.generator(seed), small)
            if options.variation_strength > 0:
                other = self.draw(self.generator(options.variation_seeds[i]), small)
                noise = slerp(options.variation_strength, noise, other)
            drawn.append(noise if small == shape else put_in_the_middle(noise, self.draw(generator, shape)))
        if options.seed_delta:
            self.generators = [self.generator((seed + options.seed_delta) % 2**64) for seed in self.seeds]
        return self._upload(drawn, like)

    @staticmethod
    def generator(seed: int) -> Any:
        """Make what an image's noise comes from."""
        return torch.Generator().manual_seed(seed)

    @staticmethod
    def draw(generator: Any, shape: Sequence[int]) -> Tensor:
        """Draw one image's noise, float32 on the CPU."""
        return torch.randn(tuple(shape), generator=generator)

    def _upload(self, drawn: Sequence[Tensor], like: Tensor) -> Tensor:
        return upload(torch.stack(list(drawn)).to(like.dtype), like.device)


class NvGenerator:
    """The generator of an NVIDIA GPU after a seed: all 64 bits of it count."""

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0


class NvNoise(ImageNoise):
    """The noise of an NVIDIA GPU, on any device: torch.randn there after each image's own seed (rng="nv").

    A1111's web UI has it as "NV", and without that word wherever it ran on such a GPU; see ldm.process.philox.
    """

    @staticmethod
    def generator(seed: int) -> NvGenerator:
        return NvGenerator(seed)

    @staticmethod
    def draw(generator: NvGenerator, shape: Sequence[int]) -> Tensor:
        noise = cuda_normal(generator.seed, generator.draws, math.prod(shape))
        generator.draws += 1
        return torch.from_numpy(noise).reshape(tuple(shape))


class CompVisNoise:
    """The global generator of the device, a whole batch at once, in the order in which CompVis's scripts draw."""

    def __call__(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of this shape."""
        return torch.randn(like.shape, device=like.device).to(like)

    begin = __call__


class CallNoise:
    """One CPU generator for all pictures of a call, which draws for all at once: diffusers' generator=.

    A batch takes its rows of every draw, so that a picture does not depend on how many are painted at once; it does on
    how many the call has, and on its place among them.

    Args:
        seed: of the call.
        count: how many pictures it has.
        places: those of the batch among them.
    """

    def __init__(self, seed: int, count: int, places: Sequence[int]):
        self.generator = torch.Generator().manual_seed(seed)
        self.count, self.places = count, list(places)

    def __call__(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of this shape, its first dimension being the images of the batch."""
        return self._rows(torch.randn(self.count, *like.shape[1:], generator=self.generator), like)

    begin = __call__

    def once(self, like: Tensor) -> Tensor:
        """Draw the noise of one image, and give it to all: a picture is encoded once for a call."""
        drawn = torch.randn(1, *like.shape[1:], generator=self.generator)
        return upload(drawn.to(like.dtype), like.device).expand_as(like)

    def _rows(self, drawn: Tensor, like: Tensor) -> Tensor:
        return upload(drawn[self.places].to(like.dtype), like.device)


class ComfyUINoise(CallNoise):
    """ComfyUI's, on an NVIDIA GPU: x_T of all pictures from the CPU's generator, and later noise from the GPU's."""

    def __init__(self, seed: int, count: int, places: Sequence[int]):
        super().__init__(seed, count, places)
        self.later = NvGenerator(seed)

    def __call__(self, like: Tensor) -> Tensor:
        return self._rows(NvNoise.draw(self.later, (self.count, *like.shape[1:])), like)


Source = ImageNoise | CompVisNoise | CallNoise


def noise_sources(
    rng: str,
    seeds: Sequence[int],
    options: SeedOptions | None = None,
    count: int = 1,
    places: Sequence[int] = (0,),
) -> tuple[Source, Callable[[Tensor], Tensor]]:
    """Make what a batch draws its noise from, and what the VAE's encoder does.

    They are the same with "image", "compvis" and "diffusers". With "nv" and "comfyui" the first draw must be x_T's also
    where a picture was encoded before.

    Args:
        count, places: see CallNoise.
    """
    if rng == "diffusers":
        noise = CallNoise(seeds[0], count, places)
        return noise, noise.once
    if rng == "comfyui":
        return ComfyUINoise(seeds[0], count, places), CallNoise(seeds[0], count, places).once
    if rng == "nv":
        return NvNoise(seeds, options), ImageNoise(seeds)
    noise = ImageNoise(seeds, options) if rng == "image" else CompVisNoise()
    return noise, noise


def seed_everything(seed: int) -> None:
    """Seed the global generators of random, numpy and torch, as CompVis's scripts do (rng="compvis")."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def slerp(share: float, low: Tensor, high: Tensor) -> Tensor:
    """Turn noise (c, h, w) towards another by a share of the angle between them: A1111's variations.

    As there, the angle is that of each column of each channel, h numbers; and where both are all but the same, each
    stands in the other's place, which is nothing that anybody could see.
    """
    dot = (low / low.norm(dim=1, keepdim=True) * (high / high.norm(dim=1, keepdim=True))).sum(1)
    if dot.mean() > 0.9995:
        return low * share + high * (1 - share)
    omega = dot.clamp(-1, 1).acos()
    parallel = (
        dot.abs() > 0.9995
    )  # few rows may leave no angle between two columns, where theirs is not a number
    start, end = (
        torch.where(parallel, part, (part * omega).sin() / omega.sin()) for part in (1 - share, share)
    )
    return start.unsqueeze(1) * low + end.unsqueeze(1) * high


def put_in_the_middle(noise: Tensor, around: Tensor) -> Tensor:
    """Put noise (c, h, w) into the middle of other noise (c, H, W); of what is larger its own middle: A1111's rule."""
    at, of = [], []
    for have, want in zip(noise.shape[1:], around.shape[1:], strict=True):
        gap = (want - have) // 2
        length = have if gap >= 0 else have + 2 * gap
        at.append(slice(max(gap, 0), max(gap, 0) + length))
        of.append(slice(max(-gap, 0), max(-gap, 0) + length))
    around = around.clone()
    around[:, at[0], at[1]] = noise[:, of[0], of[1]]
    return around
