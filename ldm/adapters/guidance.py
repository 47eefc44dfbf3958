"""Guidance by what a UNet answers with worse attention: perturbed-attention and self-attention guidance.

    sd.txt2img("a house", adapters=[PAG(3.0)])
    sd.txt2img("a house", adapters=[SAG(0.75)])

Each adds a term to the guided answer and works beside guidance by the prompt or without it (guidance_scale=1), and so
do the two together.
"""

import re
from collections.abc import Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.controls import check_span, is_within, span_of
from ldm.adapters.deepcache import check_unet
from ldm.errors import UsageError, shown
from ldm.models.diffusion.denoiser import GuidedCall
from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.processors import AttnProcessor, named_attentions
from ldm.modules.seams import Rank, StepInfo, Undo, fill, undo_all
from ldm.process.prediction import to_eps, to_x0
from ldm.values import Range, check_value

SCALE = Range(-1000, 1000)
TRAINED_LEVELS = 1000  # that adaptive_scale counts in
# About a blurred sample: then no SAG of this run watches where the network looks.
_is_asking: ContextVar[bool] = ContextVar("_is_asking", default=False)


@dataclass(eq=False)
class _Term:
    """What both share: a scale, a part of the steps, and that a sampler asks for their term."""

    scale: float
    rank: ClassVar[Rank] = Rank.ATTENTION
    joins_batch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.scale = float(check_value(self.scale, float, "scale", SCALE))
        self.start, self.end = check_span(self.start, self.end)
        self.rows: slice | None = None
        self._is_begun, self._step = False, None

    def begin(self) -> Self:
        """Return one for one run of a sampler, which stands at a step of its own."""
        mine = replace(self)
        mine._is_begun = True
        return mine

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        self._step = step

    def guides(self, step: StepInfo) -> bool:
        """Tell whether it adds something at a step."""
        return self.scale != 0 and is_within(step, self.start, self.end)

    def _check_begun(self) -> None:
        if not self._is_begun:
            raise UsageError(
                f"{type(self).__name__} adds to guidance, which a UNet alone does not know; give it to adapters= of "
                "txt2img, img2img, inpaint or stream"
            )


# --- perturbed attention ----------------------------------------------------------------------------


@dataclass(eq=False)
class PAG(_Term):
    """Perturbed-attention guidance (arXiv:2403.17377): away from an answer whose self-attention sees nothing else.

    Each image has one row more in the batch. In it the chosen self-attentions take each token's value as it is (the
    attention map is the identity), and the answer moves by scale * (answer with the condition - that row's answer).

    Args:
        scale: 0 = none; the paper's is 3.
        layers: which self-attentions: a part of their names by diffusers, as "mid", "up", "down_blocks.1" or
            "up_blocks.2.attentions.0", or several of these.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.
        adaptive_scale: by how much the scale falls with each level t below 1000, to 0 at least; 0 = not.

    Raises:
        UsageError: a number out of range, or no layer; when attached, another network, a compiled one, or one
            without such layers.
    """

    scale: float = 3.0
    layers: str | Sequence[str] = "mid"
    start: float = 0.0
    end: float = 1.0
    adaptive_scale: float = 0.0
    joins_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        layers = tuple(check_value(layers, Sequence[str], "layers"))
        if not layers or not all(layers):
            raise UsageError(f"layers should name self-attentions, such as 'mid', got {shown(self.layers)}")
        self.layers = layers
        self.adaptive_scale = float(check_value(self.adaptive_scale, float, "adaptive_scale", Range(0, 1000)))

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata: scale, and layers, adaptive_scale, start, end where unusual."""
        found: dict[str, Any] = {"scale": self.scale}
        if self.layers != ("mid",):
            found["layers"] = list(self.layers)
        if self.adaptive_scale:
            found["adaptive_scale"] = self.adaptive_scale
        return found | span_of(self)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        self.attentions(unet)

    def attentions(self, unet: nn.Module) -> list[CrossAttention]:
        """List the self-attentions that its layers name.

        Raises:
            UsageError: another network or a compiled one, or a layer that names none.
        """
        check_unet(unet, "PAG")
        named = _self_attentions(unet)
        found: dict[str, CrossAttention] = {}
        for layer in self.layers:
            pattern = re.compile(rf"(^|[._]){re.escape(layer)}([._]|$)")
            fitting = {name: one for name, one in named.items() if pattern.search(name)}
            if not fitting:
                places = (
                    ", ".join(dict.fromkeys(name.partition(".attentions")[0] for name in named)) or "none"
                )
                raise UsageError(
                    f"there is no self-attention in layer {shown(layer)}; this UNet has {places}"
                )
            found |= fitting
        return list(found.values())

    def attach(self, network: nn.Module) -> Undo:
        """Let the chosen self-attentions be the identity in `rows` of the next call; with none, nothing."""
        self._check_begun()
        if self.rows is None:
            return lambda: None
        undo = [
            fill(one, "processor", _Identity(self.rows, one.processor)) for one in self.attentions(network)
        ]
        return undo_all(undo)

    def term(self, call: GuidedCall) -> Tensor:
        """Give scale * (the answer with the condition - the perturbed one)."""
        scale: float | Tensor = self.scale
        if self.adaptive_scale:
            fallen = self.scale - self.adaptive_scale * (TRAINED_LEVELS - call.t.float())
            scale = fallen.clamp(min=0).reshape(-1, *(1 for _ in call.cond.shape[1:]))
        return scale * (call.cond - call.own)


class _Identity:
    """Attention that is the identity in some rows, and what it was in the others."""

    def __init__(self, rows: slice, before: Any):
        self._rows, self._before = rows, AttnProcessor() if before is None else before
        self.takes_attending = getattr(self._before, "takes_attending", False)

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        out = self._before(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **options,
        )
        out = out.clone()
        out[self._rows] = attn.to_out(attn.to_v(hidden_states[self._rows]))
        return out

    def state(self) -> Hashable | None:
        """Say what a captured graph depends on: the rows, and what was there before."""
        before = getattr(self._before, "state", lambda: None)()
        return None if before is None else ("PAG", self._rows.start, self._rows.stop, before)


# --- self-attention guidance ------------------------------------------------------------------------


@dataclass(eq=False)
class SAG(_Term):
    """Self-attention guidance (arXiv:2210.00939): away from the answer to a sample that is blurred where it matters.

    Where the middle block's self-attention looks, the predicted clean sample is blurred, and noised again by the
    predicted noise. The network is called once more for it, without the condition where the prompt guides, and the
    answer moves by scale * (the answer to the sample itself - that to the blurred one).

    Args:
        scale: 0 = none; the paper's is about 0.75.
        blur_sigma: of the gaussian blur, in cells of the latents, above 0 and at most 8.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.

    Raises:
        UsageError: a number out of range; when attached, another network, a compiled one, or one whose middle block
            has no self-attention of tokens.
    """

    scale: float = 0.75
    blur_sigma: float = 1.0
    start: float = 0.0
    end: float = 1.0

    THRESHOLD: ClassVar[float] = 1.0  # attention that a token receives of all tokens together; its mean is 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blur_sigma = float(check_value(self.blur_sigma, float, "blur_sigma", Range(0.05, 8)))
        self.received: Tensor | None = None  # attention, (b, n), when the middle block ran last

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata: scale, blur_sigma, and start, end where unusual."""
        return {"scale": self.scale, "blur_sigma": self.blur_sigma, **span_of(self)}

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError if it cannot be attached to a network."""
        self._attention(unet)

    def _attention(self, unet: nn.Module) -> CrossAttention:
        check_unet(unet, "SAG")
        for part in unet.middle_block:
            if isinstance(part, SpatialTransformer) and not part.transformer_blocks[0].disable_self_attn:
                return part.transformer_blocks[0].attn1
        raise UsageError(
            "SAG is for a UNet whose middle block attends to itself by a transformer, and this one's does not"
        )

    def attach(self, network: nn.Module) -> Undo:
        """Let the middle block's self-attention tell what it looks at; while a blurred sample is asked about, not.

        It tells before `start`, too: a step whose deep features are cached goes by the last whole call.
        """
        self._check_begun()
        if self.scale == 0 or _is_asking.get() or not is_within(self._step, 0.0, self.end):
            return lambda: None
        attention = self._attention(network)
        return fill(attention, "processor", _Watched(self, attention.processor))

    def term(self, call: GuidedCall) -> Tensor:
        """Give scale * (the answer to the sample - the answer to the blurred one)."""
        x0 = to_x0(call.kind, call.base, call.x, call.alpha_bar)
        eps = to_eps(call.kind, call.base, call.x, call.alpha_bar)
        mask = attention_mask(self.received[: len(call.x)] > self.THRESHOLD, x0)
        blurred = torch.where(mask, gaussian_blur(x0, self.blur_sigma), x0)
        alpha_bar = torch.as_tensor(call.alpha_bar)
        noised = alpha_bar.sqrt() * blurred + (1 - alpha_bar).sqrt() * eps
        token = _is_asking.set(True)
        try:
            degraded = call.predict(noised.to(call.x.dtype), call.t, call.base_conditioning)
        finally:
            _is_asking.reset(token)
        return self.scale * (call.base - degraded)


class _Watched:
    """An attention that also tells how much of it each token receives."""

    def __init__(self, sag: SAG, before: Any):
        self._sag, self._before = sag, AttnProcessor() if before is None else before
        self.takes_attending = getattr(self._before, "takes_attending", False)

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        q, k = (attn.head_to_batch_dim(layer(hidden_states), out_dim=4) for layer in (attn.to_q, attn.to_k))
        scores = (q @ k.transpose(-1, -2)).float() * attn.scale
        self._sag.received = scores.softmax(dim=-1).mean(1).sum(1)
        return self._before(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **options,
        )

    def state(self) -> None:
        """Say that no captured graph serves: its replay would not tell."""


def attention_mask(looked_at: Tensor, latents: Tensor) -> Tensor:
    """Enlarge a mask of a UNet's tokens (b, n) to its latents (b, c, h, w): (b, 1, h, w), by the nearest token.

    Raises:
        UsageError: the tokens are not those of the latents after some halvings.
    """
    h, w = latents.shape[2:]
    while h * w > looked_at.shape[1]:
        h, w = -(-h // 2), -(-w // 2)  # a convolution that halves odd sides rounds up
    if h * w != looked_at.shape[1]:
        raise UsageError(
            f"SAG needs the middle block's tokens one by one, and got {looked_at.shape[1]} of latents "
            f"{latents.shape[2]} x {latents.shape[3]}; merge no tokens there"
        )
    mask = looked_at.to(latents.dtype).reshape(-1, 1, h, w)
    return F.interpolate(mask, size=latents.shape[2:]) > 0.5


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur maps (b, c, h, w) by a gaussian of 4 sigma to each side, mirrored at the edges, less on small maps."""
    for axis in (2, 3):
        reach = min(max(1, round(4 * sigma)), x.shape[axis] - 1)
        if reach < 1:
            continue
        places = torch.arange(-reach, reach + 1, device=x.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (places / sigma) ** 2)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        kernel = (weights / weights.sum()).to(x.dtype).reshape(shape).expand(x.shape[1], -1, -1, -1)
        beside = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        x = F.conv2d(F.pad(x, beside, mode="reflect"), kernel, groups=x.shape[1])
    return x


def _self_attentions(unet: nn.Module) -> dict[str, CrossAttention]:
    """List the attentions of a UNet's tokens to themselves by diffusers' names."""
    named = named_attentions(unet)
    if not named:
        raise UsageError("PAG is for a UNet with spatial transformers, and this one has none")
    selfish = {
        id(block.attn1)
        for part in unet.modules()
        if isinstance(part, SpatialTransformer)
        for block in part.transformer_blocks
        if not block.disable_self_attn
    }
    return {name: one for name, one in named.items() if id(one) in selfish}
