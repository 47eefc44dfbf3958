"""One set of made-up weights for both libraries: the geometries, and the networks that share the weights' memory.

Weights and inputs are numbers that float32, bfloat16 and float16 all hold exactly, so that one float32 answer is
the reference for every dtype, and the networks of a row differ in nothing but what they do.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.load import diffusers_config
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.configs import read_settings
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE, text_name, unet_to_diffusers, vae_to_diffusers
from ldm.paths import shipped

TRANSFORMER = f"{TEXT}transformer."  # what precedes transformers' own names
GEOMETRIES = ("v1", "shapes", "tiny")
LEVEL = 501  # of 1000: what the UNet is asked about


@dataclass(frozen=True)
class Geometry:
    """A model's sizes, as CompVis's configuration has them.

    Attributes:
        px: side of the pictures that it paints, in pixels.
        f: pixels a latent cell.
        tokens, width, words: of the text features, and how many words the text encoder knows.
    """

    name: str
    settings: dict[str, Any]

    @property
    def _params(self) -> dict[str, Any]:
        return self.settings["model"]["params"]

    @property
    def f(self) -> int:
        return 2 ** (len(self._params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)

    @property
    def px(self) -> int:
        return self._params["image_size"] * self.f

    @property
    def channels(self) -> int:
        return self._params["channels"]

    @property
    def tokens(self) -> int:
        return self._params["cond_stage_config"].get("params", {}).get("max_length", 77)

    @functools.cached_property
    def diffusers(self) -> dict[str, dict[str, Any]]:
        """The same model in diffusers' words."""
        return diffusers_config(self.settings)

    @property
    def width(self) -> int:
        return self.diffusers["text_encoder"]["hidden_size"]

    @property
    def words(self) -> int:
        return self.diffusers["text_encoder"]["vocab_size"]


def geometry(name: str) -> Geometry:
    """Find a geometry: v1 in full size, the model in the box (shapes), or one for tests (tiny)."""
    if name == "tiny":
        from tiny import tiny_config

        settings = tiny_config()
    else:
        settings = read_settings(
            shipped("configs/v1-inference.yaml" if name == "v1" else "model_data/shapes/config.yaml")
        )
    settings = copy.deepcopy(settings)
    # Neither library recomputes activations unless asked to; v1's configuration asks.
    settings["model"]["params"]["unet_config"]["params"]["use_checkpoint"] = False
    return Geometry(name, settings)


def exactly(values: Tensor) -> Tensor:
    """Round to numbers that float32, bfloat16 and float16 all hold; bfloat16.

    Rounding to bfloat16 leaves 8 digits; float16, which has more, loses some of them only below its smallest
    normal number, where it has fewer still.
    """
    return values.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16)


def make_weights(
    shape: Geometry, dtype: torch.dtype, device: torch.device, prefixes: Iterable[str] = (UNET, VAE, TEXT)
) -> dict[str, Tensor]:
    """Make up a model's weights under CompVis's names, the same in every dtype."""
    from make_synthetic import make_tensors

    made = make_tensors(shape.settings, dtype=torch.bfloat16)
    prefixes = tuple(prefixes)
    weights = {}
    for name in list(made):
        tensor = made.pop(name)  # so that no two sets of all weights are alive at once
        if name.startswith(prefixes):
            weights[name] = exactly(tensor).to(device=device, dtype=dtype)
    return weights


# --- the networks -------------------------------------------------------------------------------------


def build_ours(shape: Geometry, weights: dict[str, Tensor], device: torch.device) -> Any:
    """Build a LatentDiffusion upon these weights, without a copy; parts that they leave out are taken away."""
    model = build_empty(shape.settings)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected, unexpected
    for part, prefix in (("first_stage_model", VAE), ("cond_stage_model", TEXT)):
        if not any(name.startswith(prefix) for name in weights):
            setattr(model, part, None)
    assert not any(parameter.is_meta for parameter in model.parameters()), missing
    return model.to(device)


def _share(network: nn.Module, named: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Give a network these tensors as its weights, strictly and without a copy."""
    wanted = network.state_dict()
    # The VAE's attention has 1x1 convolutions at CompVis's and linear layers at diffusers'.
    state = {name: tensor.view(wanted[name].shape) for name, tensor in named.items()}
    network.load_state_dict(state, assign=True)
    return network.eval().to(device)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def build_their_unet(shape: Geometry, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Build diffusers' UNet2DConditionModel upon these weights."""
    ours = _part(weights, UNET)
    names = unet_to_diffusers(ours)
    return _share(empty_unet(shape), {names[name]: tensor for name, tensor in ours.items()}, device)


def build_their_vae(shape: Geometry, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Build diffusers' AutoencoderKL upon these weights."""
    ours = _part(weights, VAE)
    names = vae_to_diffusers(ours)
    return _share(empty_vae(shape), {names[name]: tensor for name, tensor in ours.items()}, device)


def build_their_text_encoder(shape: Geometry, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Build transformers' CLIPTextModel upon these weights."""
    ours = _part(weights, TRANSFORMER)
    network = empty_text_encoder(shape, torch.device("cpu"))
    return _share(network, {name: ours[text_name(name)] for name in network.state_dict()}, device)


def empty_unet(shape: Geometry) -> nn.Module:
    """Build diffusers' UNet on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(shape.diffusers["unet"])


def empty_vae(shape: Geometry) -> nn.Module:
    """Build diffusers' VAE on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(shape.diffusers["vae"])


def empty_text_encoder(shape: Geometry, device: torch.device) -> nn.Module:
    """Build transformers' text encoder; its table of positions has values only on a real device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with device:
        return CLIPTextModel(CLIPTextConfig(**shape.diffusers["text_encoder"]))


# --- inputs -------------------------------------------------------------------------------------------


def make_inputs(
    shape: Geometry, part: str, batch: int, dtype: torch.dtype, device: torch.device, px: int | None = None
) -> dict[str, Tensor]:
    """Make up what a part is asked about, the same for every dtype and contestant.

    An even batch of the UNet is a guided step: every latent twice, with another condition each time.

    Args:
        part: "clip", "unet", "vae-encode", "vae-decode" or "train".
        px: side of the pictures in pixels; None is the geometry's own.
    """
    px = px or shape.px
    cells = px // shape.f
    generator = torch.Generator().manual_seed(20220828)

    def normal(*sizes: int) -> Tensor:
        return exactly(torch.randn(*sizes, generator=generator)).to(device=device, dtype=dtype)

    if part == "clip":
        ids = torch.randint(1, shape.words, (batch, shape.tokens), generator=generator)
        return {"ids": ids.to(device)}
    if part == "vae-encode":
        pixels = exactly(torch.rand(batch, 3, px, px, generator=generator) * 2 - 1)
        return {"pixels": pixels.to(device=device, dtype=dtype)}
    x = normal(batch, shape.channels, cells, cells)
    if part == "vae-decode":
        return {"latents": x}
    t = torch.full((batch,), LEVEL, device=device)
    context = normal(batch, shape.tokens, shape.width)
    if part == "train":
        return {"x": x, "t": t, "context": context, "target": normal(*x.shape)}
    if batch % 2 == 0:
        x = torch.cat([x[: batch // 2]] * 2)
    return {"x": x, "t": t, "context": context}


# --- arithmetic ---------------------------------------------------------------------------------------


def _counted(call: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@functools.cache
def _count_part(shape_name: str, part: str, batch: int, px: int) -> int:
    shape, meta = geometry(shape_name), torch.device("meta")
    inputs = make_inputs(shape, part, batch, torch.float32, meta, px)
    if part == "train":
        unet = empty_unet(shape)
        return _counted(lambda: unet(inputs["x"], inputs["t"], inputs["context"]).sample.sum().backward())
    with torch.no_grad():
        if part == "clip":
            encoder = empty_text_encoder(shape, meta)
            return _counted(lambda: encoder(input_ids=inputs["ids"]))
        if part == "unet":
            unet = empty_unet(shape)
            return _counted(lambda: unet(inputs["x"], inputs["t"], inputs["context"]))
        vae = empty_vae(shape)
        if part == "vae-encode":
            return _counted(lambda: vae.encode(inputs["pixels"]))
        return _counted(lambda: vae.decode(inputs["latents"]))


def count_flop(shape: Geometry, part: str, batch: int, *, px: int | None = None, steps: int = 0) -> int:
    """Count the floating-point operations of diffusers' graph, two for each multiplication and addition.

    Only matrix products, convolutions and attention are counted. Savings do not lower the count, so that they
    show as efficiency.

    Args:
        part: of make_inputs, or "image": guided, that many steps, `batch` pictures of one prompt.
    """
    px = px or shape.px
    if part == "image":
        count = functools.partial(_count_part, shape.name, px=px)
        return count("clip", 2) + steps * count("unet", 2 * batch) + count("vae-decode", batch)
    return _count_part(shape.name, part, batch, px)


def count_saved(shape: Geometry, batch: int) -> int:
    """Count the bytes of float32 activations that diffusers' UNet keeps for its backward pass."""
    unet = empty_unet(shape)
    inputs = make_inputs(shape, "train", batch, torch.float32, torch.device("meta"))
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(inputs["x"], inputs["t"], inputs["context"])
    for parameter in unet.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())
