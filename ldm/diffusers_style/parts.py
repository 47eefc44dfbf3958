"""A model's networks as diffusers shows them: the same weights, called by its signatures, with a config beside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.adapters.use import begun, text_scope, unet_attachments
from ldm.checkpoints.key_mapping import unet_to_diffusers, vae_to_diffusers
from ldm.diffusers_style.scheduler import Config
from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.introspect import downsampling, dtype_of
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.seams import StepInfo, attached
from ldm.process.prediction import to_eps


class UNetOutput(NamedTuple):
    """The noise that a UNet predicts, (b, c, h, w)."""

    sample: Tensor


class EncoderOutput(NamedTuple):
    """What a VAE's encoder says about latents: sample(generator), mode(), mean, std; unscaled units."""

    latent_dist: DiagonalGaussianDistribution


class DecoderOutput(NamedTuple):
    """Pictures (b, 3, height, width), about [-1, 1]."""

    sample: Tensor


class Part(nn.Module):
    """A network of the model under another signature; moving, freezing and training it is doing so to the network."""

    config: Config
    to_diffusers: Callable[[Iterable[str]], dict[str, str]]

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.training = inner.training

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.inner)

    def names(self) -> dict[str, str]:
        """Our name -> diffusers' name of every tensor but those of a loss.

        Raises:
            MismatchError: a network that diffusers could not hold.
        """
        own = [name for name in self.inner.state_dict() if not name.startswith("loss.")]
        names = self.to_diffusers(own)
        if lacking := [name for name in own if name not in names]:
            raise MismatchError(
                f"diffusers has no place for {len(lacking)} of this network's tensors, one is '{lacking[0]}'"
            )
        return names

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the weights by diffusers' names, sharing memory.

        Raises:
            MismatchError: a network that diffusers could not hold.
        """
        own = self.inner.state_dict()
        return {theirs: as_linear(theirs, own[name]) for name, theirs in self.names().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, **kwargs: Any) -> Any:
        """Take weights by diffusers' names."""
        ours = {theirs: name for name, theirs in self.names().items()}
        own = self.inner.state_dict()
        given = {
            ours.get(name, name): tensor.reshape(own[ours[name]].shape) if name in ours else tensor
            for name, tensor in state_dict.items()
        }
        given |= {name: tensor for name, tensor in own.items() if name.startswith("loss.")}
        return self.inner.load_state_dict(given, strict=strict)


def as_linear(name: str, tensor: Tensor) -> Tensor:
    """Shape a 1 x 1 convolution of a VAE's attention as the linear layer that diffusers has in its place."""
    is_projection = ".mid_block.attentions." in name and ".to_" in name
    return tensor.flatten(1) if is_projection and tensor.dim() == 4 else tensor


class UNet(Part):
    """The UNet of a model by UNet2DConditionModel's signature.

    Its answer is the noise, whatever the network was trained to predict: diffusers' tutorials, which write their steps
    by hand, take it as that.
    """

    to_diffusers = staticmethod(unet_to_diffusers)

    def __init__(self, model: LatentDiffusion, adapters: Callable[[], Sequence[Any]] = tuple):
        super().__init__(model.model.diffusion_model)
        self._model = (model,)  # in a tuple it is no submodule
        self._adapters = adapters
        self._running: list[Any] | None = None
        unet = self.inner
        widths = [int(mult * unet.model_channels) for mult in unet.channel_mult]
        attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
        depths = unet.num_res_blocks  # as it was given: a number, or one a level
        depths = (depths,) * len(widths) if isinstance(depths, int) else tuple(map(int, depths))
        context = [m for name, m in unet.named_modules() if name.endswith("attn2.to_k")]
        heads = [width // unet.num_head_channels for width in widths]
        self.config = Config(
            _class_name="UNet2DConditionModel",
            sample_size=model.image_size,
            in_channels=unet.input_blocks[0][0].weight.shape[1],
            out_channels=unet.out_channels,
            block_out_channels=tuple(widths),
            down_block_types=tuple("CrossAttnDownBlock2D" if at else "DownBlock2D" for at in attends),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=tuple("CrossAttnUpBlock2D" if at else "UpBlock2D" for at in attends[::-1]),
            layers_per_block=depths[0] if len(set(depths)) == 1 else depths,
            cross_attention_dim=context[0].in_features if context else None,
            attention_head_dim=unet.num_heads if unet.num_head_channels == -1 else tuple(heads),
            time_cond_proj_dim=None,
        )

    @property
    def attn_processors(self) -> dict[str, Any]:
        """What answers in each attention, by diffusers' names; see ldm.modules.processors."""
        return self.inner.attn_processors

    def set_attn_processor(self, processor: Any) -> None:
        """Let an attention processor answer in all attentions, or one in each by the names of attn_processors.

        Raises:
            UsageError: a dictionary with another number of processors, or with a name that is none of those.
        """
        self.inner.set_attn_processor(processor)

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[StepInfo], None]]:
        """Begin a run of a sampler, whose adapters learn by the function that it gives at which step they are."""
        self._running = [begun(one) for one in unet_attachments(self._adapters())]
        try:
            yield lambda step: [one.at(step) for one in self._running]
        finally:
            self._running = None

    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> UNetOutput:
        """Predict the noise in latents.

        Args:
            sample: (b, c, h, w).
            timestep: one level for all, or (b,).
            encoder_hidden_states: (b, tokens, d) text features.
            return_dict: without effect, for the answer is a tuple whose entry has a name.
            others: diffusers' further inputs; only None can be given.

        Raises:
            UsageError: another input, or a level that is not whole where the model does not predict noise.
        """
        if wanted := [name for name, value in others.items() if value is not None]:
            raise UsageError(f"this UNet takes no {wanted[0]:.60}; it knows latents, levels and text alone")
        model = self._model[0]
        t = torch.as_tensor(timestep, device=sample.device)
        t = t.expand(len(sample)) if t.dim() == 0 else t
        dtype = self.dtype
        adapters = self._running if self._running is not None else unet_attachments(self._adapters())
        with attached(self.inner, *adapters):
            answer = self.inner(sample.to(dtype), t, context=encoder_hidden_states.to(dtype))
        answer = answer.to(sample.dtype)
        if model.parameterization == "eps":
            return UNetOutput(answer)
        if t.is_floating_point() and (t != t.round()).any():
            raise UsageError(
                f"the model predicts {model.parameterization}, which is noise at whole levels alone; got {t.tolist()}"
            )
        rows = t.long().reshape(-1, 1, 1, 1)
        levels = model.alphas_cumprod[rows], model.sqrt_one_minus_alphas_cumprod[rows]
        return UNetOutput(to_eps(model.parameterization, answer, sample, *levels).to(sample.dtype))


class VAE(Part):
    """The first stage of a model by AutoencoderKL's signature; latents are unscaled, as diffusers' are."""

    to_diffusers = staticmethod(vae_to_diffusers)

    def __init__(self, model: LatentDiffusion):
        super().__init__(model.first_stage_model)
        encoder, decoder = self.inner.encoder, self.inner.decoder
        levels = encoder.num_resolutions
        self.config = Config(
            _class_name="AutoencoderKL",
            in_channels=encoder.in_channels,
            out_channels=decoder.conv_out.out_channels,
            latent_channels=model.channels,
            sample_size=model.image_size * downsampling(model),
            layers_per_block=encoder.num_res_blocks,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(level.block[-1].out_channels for level in encoder.down),
            scaling_factor=float(model.scale_factor),
        )

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput:
        """Encode pictures (b, 3, height, width) in [-1, 1]; latent_dist.sample() is to be multiplied by the factor."""
        posterior = self.inner.encode(x.to(self.dtype))
        return EncoderOutput(type(posterior)(posterior.parameters.to(x.dtype)))

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput:
        """Decode latents (b, c, h, w) that were divided by the scaling factor."""
        return DecoderOutput(self.inner.decode(z.to(self.dtype)).to(z.dtype))


class TextEncoder(Part):
    """The text encoder by CLIPTextModel's signature; an answer's first entry is (b, tokens, d)."""

    def __init__(self, model: LatentDiffusion, adapters: Callable[[], Sequence[Any]] = tuple):
        super().__init__(model.cond_stage_model.transformer)
        self._model, self._adapters = (model,), adapters
        self.config = self.inner.config

    def names(self) -> dict[str, str]:
        return {name: name for name in self.inner.state_dict()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Encode token numbers (b, tokens)."""
        with text_scope(self._model[0], self._adapters()):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, **options)
