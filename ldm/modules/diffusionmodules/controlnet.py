"""ControlNet (arXiv:2302.05543): a UNet's way down that reads a hint, and gives maps to add to that UNet's skips."""

from typing import Any

from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, zero_module

# Of the convolutions from a hint's pixels to latent cells: (channels, stride); one more gives the UNet's first width.
HINT_LAYERS = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))
HINT_FACTOR = 8  # pixels of the hint to a latent cell
# What a ControlNet has in common with its UNet, by the names of UNetModel's arguments.
_SHARED = (
    "dropout",
    "channel_mult",
    "conv_resample",
    "dims",
    "use_checkpoint",
    "num_heads",
    "num_head_channels",
    "use_scale_shift_norm",
    "resblock_updown",
    "transformer_depth",
    "context_dim",
    "legacy",
    "disable_self_attentions",
    "num_attention_blocks",
    "disable_middle_self_attn",
    "use_linear_in_transformer",
)


class ControlNetModel(UNetModel):
    """A UNet without its way up, and a 1x1 convolution behind each of its blocks, which are zero before training.

    Args:
        in_channels, model_channels: of the UNet that it is for.
        hint_channels: of the hint; 3 for a picture.
        num_res_blocks, attention_resolutions, options: as the UNet's, see UNetModel.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        hint_channels: int,
        num_res_blocks: int | list[int],
        attention_resolutions: Any,
        **options: Any,
    ):
        super().__init__(
            None,
            in_channels,
            model_channels,
            in_channels,
            num_res_blocks,
            attention_resolutions,
            use_spatial_transformer=True,
            **options,
        )
        del self.output_blocks, self.out
        self.hint_channels = hint_channels
        layers: list[nn.Module] = []
        before = hint_channels
        for channels, stride in HINT_LAYERS:
            layers += [conv_nd(2, before, channels, 3, padding=1, stride=stride), nn.SiLU()]
            before = channels
        last = zero_module(conv_nd(2, before, model_channels, 3, padding=1))
        self.input_hint_block = TimestepEmbedSequential(*layers, last)
        # The first layer of an input block is a convolution, a ResBlock or a Downsample.
        widths = [block[0].out_channels for block in self.input_blocks]
        self.zero_convs = nn.ModuleList(map(self._zero_conv, widths))
        self.middle_block_out = self._zero_conv(widths[-1])

    @classmethod
    def beside(
        cls, unet: UNetModel, in_channels: int | None = None, hint_channels: int = 3
    ) -> "ControlNetModel":
        """Build the ControlNet of a UNet; its weights are new: see `start_from` for the UNet's own.

        Args:
            in_channels: of the latents that it reads, the UNet's where nothing is given; one for a UNet of
                inpainting may read the four of the latents alone.
        """
        options = {name: getattr(unet, name) for name in _SHARED}
        return cls(
            unet.in_channels if in_channels is None else in_channels,
            unet.model_channels,
            hint_channels,
            unet.num_res_blocks,
            unet.attention_resolutions,
            **options,
        )

    def start_from(self, unet: UNetModel) -> "ControlNetModel":
        """Copy a UNet's way down and its middle, as a training begins; the zero convolutions stay zero."""
        own = self.state_dict()
        theirs = {name: x for name, x in unet.state_dict().items() if name in own}
        self.load_state_dict(theirs, strict=False)
        return self

    def _zero_conv(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(zero_module(conv_nd(2, channels, channels, 1)))

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Turn hints (n, hint_channels, 8 h, 8 w) in [0, 1] into maps (n, model_channels, h, w).

        They depend on the hint alone, so that one call serves all steps of a sampler.
        """
        h = hint.to(self.input_hint_block[0].weight.dtype)
        for layer in self.input_hint_block:
            h = layer(h)
        return h

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        hint: Tensor | None,
        timesteps: Tensor,
        context: Any,
        *,
        embedded: Tensor | None = None,
    ) -> list[Tensor]:
        """Compute the maps that a UNet's call with the same arguments takes as its `control`.

        Args:
            x: (b, in_channels, h, w).
            hint: (b or 1, hint_channels, 8 h, 8 w) in [0, 1].
            timesteps: (b,) levels.
            context: (b, n, context_dim).
            embedded: what embed_hint gave; the hint is not looked at then.

        Returns:
            one map for each input block, (b, c, *its space), and last one for the middle block.
        """
        emb = self._embed(x, timesteps, None)
        h = self._torso_input(x)
        maps = []
        for i, (block, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = block(h, emb, context)
            if i == 0:
                h = h + (self.embed_hint(hint) if embedded is None else embedded)
            maps.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        return [*maps, self.middle_block_out(h, emb, context)]


def soft_weights(maps: int) -> list[float]:
    """ControlNet's factors of its maps where the prompt is to be more important: 0.825 ** (maps - 1 - i)."""
    return [0.825 ** (maps - 1 - i) for i in range(maps)]
