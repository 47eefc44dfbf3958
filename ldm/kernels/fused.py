"""Fused forwards of the modules of ldm.modules: norm with SiLU, sums within products, packed weights, shared work.

Each class computes what the module that FUSED names it for computes, by a backend, and gives None for a call that it
does not support. The mechanism is in fused_module.py.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.kernels.backend import Backend
from ldm.kernels.fused_module import (
    FusedModule,
    WeightCache,
    backend_of,
    fused_part,
    fused_parts,
    is_supported,
    is_unmodified,
)
from ldm.kernels.fused_text import FusedCLIPText
from ldm.kernels.upsample_conv import phase_weights
from ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from ldm.modules.diffusionmodules import model as vae
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.modules.encoders.modules import CLIPTextTransformer
from ldm.modules.seams import SLOTS, execution_of, own_forward, register, set_execution

# --- single layers --------------------------------------------------------------------------------


class FusedLinear(FusedModule):
    """A linear layer with a packed weight."""

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        self._packed = WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Compute (..., in) -> (..., out)."""
        return self.multiply(x, self.module.bias) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        """Whether `multiply` takes x (..., in)."""
        weight = self.module.weight
        return (
            is_supported(x)
            and weight.device == x.device
            and x.dtype == weight.dtype
            and x.dim() > 1
            and x.numel() > 0
        )

    def multiply(self, x: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
        """Compute x W^T + bias + add, (..., out)."""
        weight, backend = self.module.weight, backend_of(x)
        packed = self._packed.get(
            lambda: backend.pack_linear(weight.detach(), x.numel() // x.shape[-1]), weight
        )
        return backend.multiply(x, packed, bias, add)


class FusedConv(FusedModule):
    """A 2-dimensional convolution in channels_last, with a packed weight for each algorithm."""

    def __init__(self, module: nn.Conv2d):
        super().__init__(module)
        self._packed: defaultdict[str, WeightCache] = defaultdict(WeightCache)

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Compute (b, in, h, w) -> (b, out, h', w')."""
        return self.convolve(x) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        """Whether `convolve` takes x (b, in, h, w)."""
        m = self.module
        return (
            is_supported(x)
            and x.device == m.weight.device
            and x.dtype == m.weight.dtype
            and x.dim() == 4
            and x.numel() > 0
            and m.padding_mode == "zeros"
            and isinstance(m.padding, tuple)
        )

    def convolve(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve; `add` is a map of the result's shape to add."""
        x = x.contiguous(memory_format=torch.channels_last)
        return backend_of(x).convolve(self.module, x, self._packed, add)


class FusedGroupNorm(FusedModule):
    """A group norm of a map in channels_last; statistics and scaling in float32 or better."""

    def __init__(self, module: nn.GroupNorm):
        super().__init__(module)
        self._affine = WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Compute (b, c, h, w) -> the same."""
        return self.normalise(x) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        """Whether `normalise` takes x (b, c, h, w)."""
        m = self.module
        return (
            m.weight is not None
            and is_supported(x)
            and x.dim() == 4
            and backend_of(x).supports_norm(x, m.num_groups)
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias (c,) in float32."""
        m = self.module
        return self._affine.get(
            lambda: (m.weight.detach().float(), m.bias.detach().float()), m.weight, m.bias
        )

    def normalise(self, x: Tensor, *, silu: bool = False, **options: Any) -> Tensor:
        """Compute Backend.group_norm of x, with its options; `affine` replaces the module's own weight and bias."""
        weight, bias = options.pop("affine", None) or self.affine()
        return backend_of(x).group_norm(
            x, self.module.num_groups, weight, bias, self.module.eps, silu=silu, **options
        )


# --- residual blocks ------------------------------------------------------------------------------


def _norm_silu_conv(x: Tensor, norm: Any, conv: Any, norm_after: Any) -> tuple[Tensor, Tensor] | None:
    """Give x in channels_last, and conv(SiLU(norm(x))); None if a layer does not support its map."""
    x = x.contiguous(memory_format=torch.channels_last)
    if not (norm.supports(x) and conv.supports(x)):
        return None
    h = conv.convolve(norm.normalise(x, silu=True))
    return (x, h) if norm_after.supports(h) else None


class FusedResBlock(FusedModule):
    """The UNet's residual block: norm and SiLU in one pass, the sum within the last convolution."""

    def try_forward(self, x: Tensor, emb: Tensor, size: Any = None) -> Tensor | None:
        """Compute x (b, in, h, w) with emb (b, d) -> (b, out, h, w); not where the block resizes its map."""
        m = self.module
        if m.updown or not is_supported(x) or x.dim() != 4:
            return None
        parts = fused_parts(m.in_layers[0], m.in_layers[2], m.out_layers[0], m.out_layers[3])
        sequences = (m.in_layers, m.out_layers, m.emb_layers)
        if (
            parts is None
            or not all(map(is_unmodified, sequences))
            or not is_unmodified(m.in_layers[1])
            or not is_unmodified(m.out_layers[1])
        ):
            return None
        *first, norm_after, conv_after = parts
        first_half = _norm_silu_conv(x, *first, norm_after)
        if first_half is None:
            return None
        x, h = first_half
        projected = m.emb_layers(emb.type(m.emb_layers[1].weight.dtype)).float().contiguous()  # (b, c or 2c)
        if m.use_scale_shift_norm:
            weight, bias = norm_after.affine()
            scale, shift = projected.chunk(2, dim=1)
            options = {"affine": (weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale))}
        else:
            options = {"shift": projected}
        h = norm_after.normalise(h, silu=True, out=h, **options)
        return conv_after.convolve(h, add=m.skip_connection(x))


class FusedResnetBlock(FusedModule):
    """The autoencoder's residual block: norm and SiLU in one pass, the sum within the last convolution."""

    def try_forward(self, x: Tensor, temb: Tensor | None) -> Tensor | None:
        """Compute x (b, in, h, w), with temb (b, d) if there is one -> (b, out, h, w)."""
        m = self.module
        parts = fused_parts(m.norm1, m.conv1, m.norm2, m.conv2)
        if parts is None or not is_supported(x) or x.dim() != 4:
            return None
        *first, norm_after, conv_after = parts
        first_half = _norm_silu_conv(x, *first, norm_after)
        if first_half is None:
            return None
        x, h = first_half
        shift = None if temb is None else m.temb_proj(F.silu(temb)).float().contiguous()
        h = norm_after.normalise(h, silu=True, shift=shift, out=h)
        if m.in_channels != m.out_channels:
            x = m.conv_shortcut(x) if m.use_conv_shortcut else m.nin_shortcut(x)
        return conv_after.convolve(h, add=x)


class FusedDecoder(FusedModule):
    """The autoencoder's decoder: its last norm and SiLU in one pass over its largest map."""

    def try_forward(self, z: Tensor) -> Tensor | None:
        """Decode latents (b, z, h, w) -> (b, 3, 8 h, 8 w) for Stable Diffusion's."""
        m = self.module
        parts = fused_parts(m.norm_out, m.conv_out)
        if parts is None or m.give_pre_end:
            return None
        norm, conv = parts
        h = m.features(z)
        if not (norm.supports(h) and conv.supports(h)):
            return m.answer(h)
        h = conv.convolve(norm.normalise(h, silu=True))
        return torch.tanh(h) if m.tanh_out else h


class FusedUpsample(FusedModule):
    """Nearest-neighbour upsampling and a 3x3 convolution as four small 2x2 convolutions; see upsample_conv.py."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._packed = WeightCache()

    def try_forward(self, x: Tensor, size: Any = None) -> Tensor | None:
        """Compute (b, c, h, w) -> (b, c, 2 h, 2 w); not where `size` is another."""
        m = self.module
        if not getattr(m, "use_conv", getattr(m, "with_conv", False)) or not is_supported(x) or x.dim() != 4:
            return None
        conv = fused_part(m.conv)
        doubled = torch.Size(2 * side for side in x.shape[2:])
        if conv is None or not conv.supports(x) or (size is not None and torch.Size(size) != doubled):
            return None
        layer = m.conv
        if (layer.kernel_size, layer.padding, layer.stride, layer.groups) != ((3, 3), (1, 1), (1, 1), 1):
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        options = ((1, 1), (1, 1), (1, 1), 1)  # padding, stride, dilation, groups
        backend = backend_of(x)

        def pack() -> tuple[Tensor, Tensor | None]:
            bias = None if layer.bias is None else layer.bias.detach().repeat(4)
            return backend.pack_conv(phase_weights(layer.weight.detach()), *options, x.shape), bias

        packed, bias = self._packed.get(pack, layer.weight, layer.bias)
        phases = backend.run_conv(x, packed, bias, *options)  # (b, 4 c, h + 1, w + 1)
        return backend.interleave_phases(phases)


# --- attention --------------------------------------------------------------------------------------


class FusedCrossAttention(FusedModule):
    """Attention by the backend's kernel; keys and values of a context are cached while it stays the same."""

    def __init__(self, module: CrossAttention):
        super().__init__(module)
        self._context_cache, self._packed_qkv = WeightCache(), WeightCache()

    def try_forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor | None:
        """Attend from x (b, n, c) to context (b, m, d), None = x itself -> (b, n, c), plus `add` of that shape; without
        a mask."""
        m = self.module
        if m.processor is not None or mask is not None or not is_supported(x) or x.dim() != 3:
            return None
        q, k, v = self._self_qkv(x) if context is None else (m.to_q(x), *self._context_kv(context))
        if not backend_of(x).supports_attention(q, k, v, m.heads):
            return None
        out = backend_of(x).attention(q, k, v, m.heads, m.scale)
        last = fused_part(m.to_out[0])
        if (
            add is not None
            and last is not None
            and is_unmodified(m.to_out)
            and is_unmodified(m.to_out[1])
            and last.supports(out)
        ):
            return last.multiply(out, m.to_out[0].bias, add)
        out = m.to_out(out)
        return out if add is None else out + add

    def _self_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, in one product."""
        m = self.module
        layers, parts = (m.to_q, m.to_k, m.to_v), fused_parts(m.to_q, m.to_k, m.to_v)
        if parts is None or not all(
            part.supports(x) and layer.bias is None and layer.weight.shape == m.to_q.weight.shape
            for part, layer in zip(parts, layers, strict=True)
        ):
            return m.to_q(x), m.to_k(x), m.to_v(x)
        backend, weights = backend_of(x), [layer.weight for layer in layers]
        packed = self._packed_qkv.get(
            lambda: backend.pack_linear(torch.cat(weights).detach(), x.numel() // x.shape[-1]), *weights
        )
        return backend.multiply(x, packed, None).chunk(3, dim=2)

    def _context_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context; the cached ones if it equals the last, as it does from step to step."""
        m = self.module
        if fused_parts(m.to_k, m.to_v) is None or not backend_of(context).CACHES_CONTEXT:
            return m.to_k(context), m.to_v(context)
        cache = self._context_cache.get(dict, m.to_k.weight, m.to_v.weight)
        if not cache or cache["context"].shape != context.shape or not torch.equal(cache["context"], context):
            cache.update(context=context.clone(), kv=(m.to_k(context), m.to_v(context)))
        return cache["kv"]


class FusedFeedForward(FusedModule):
    """A GEGLU feed-forward in chunks of tokens; bias, GELU and gate in one pass."""

    def __init__(self, module: FeedForward):
        super().__init__(module)
        self._bias = WeightCache()

    def try_forward(self, x: Tensor, add: Tensor | None = None) -> Tensor | None:
        """Compute (..., c) -> the same, plus `add` of that shape."""
        m = self.module
        gate = m.net[0]
        if (
            not is_supported(x)
            or type(gate) is not GEGLU
            or not all(map(is_unmodified, (m.net, gate, m.net[1])))
        ):
            return None
        parts = fused_parts(gate.proj, m.net[2])
        if parts is None:
            return None
        project, out_layer = parts
        backend = backend_of(x)
        flat = x.reshape(-1, x.shape[-1])
        if (
            not project.supports(flat)
            or gate.proj.bias is None
            or not backend.supports_geglu(x, gate.proj.out_features)
        ):
            return None
        bias = self._bias.get(lambda: gate.proj.bias.detach().float(), gate.proj.bias)
        inner = x.new_empty((flat.shape[0], gate.proj.out_features // 2))
        for i in range(0, flat.shape[0], backend.FEED_FORWARD_ROWS):
            rows = slice(i, i + backend.FEED_FORWARD_ROWS)
            backend.geglu(project.multiply(flat[rows], None), bias, inner[rows])
        add = None if add is None else add.reshape(flat.shape[0], -1)
        return out_layer.multiply(inner, m.net[2].bias, add).view(*x.shape[:-1], -1)


class FusedTransformerBlock(FusedModule):
    """A transformer block: each of its three residual sums is computed within the product before it."""

    def try_forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | None:
        """Compute tokens (b, n, c), with context (b, m, d) -> (b, n, c)."""
        return (
            self.cross_attention_and_feed_forward(self.self_attention(x, context), context)
            if self.supports(x)
            else None
        )

    def supports(self, x: Tensor) -> bool:
        """Whether the block's parts take x (b, n, c)."""
        m = self.module
        return is_supported(x) and x.dim() == 3 and fused_parts(m.attn1, m.attn2, m.ff) is not None

    def self_attention(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Add self-attention."""
        m = self.module
        context = context if m.disable_self_attn else None
        if m.around is None:
            return self._add(m.attn1, m.norm1(x), x, context)
        before, behind = m.around(x)
        return behind(m.attn1(before(m.norm1(x)), context=context)) + x

    def cross_attention_and_feed_forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Add cross-attention and the feed-forward."""
        m = self.module
        x = self._add(m.attn2, m.norm2(x), x, context)
        return self._add(m.ff, m.norm3(x), x)

    @staticmethod
    def _add(part: nn.Module, normed: Tensor, x: Tensor, *context: Tensor | None) -> Tensor:
        out = vars(part)["forward"].try_forward(normed, *context, add=x)
        return part(normed, *context) + x if out is None else out


class FusedSpatialTransformer(FusedModule):
    """A SpatialTransformer. Of a guided batch whose halves are equal it also takes one half, and gives the whole."""

    def try_forward(self, x: Tensor, context: Any = None) -> Tensor | None:
        """Compute x (b, c, h, w), with context (b, m, d) -> (b, c, h, w); x may have b / 2 rows, equal halves of b."""
        m = self.module
        if m.use_linear or not is_supported(x) or x.dim() != 4 or not isinstance(context, Tensor):
            return None
        parts = fused_parts(m.norm, m.proj_in, m.proj_out, *m.transformer_blocks)
        if parts is None:
            return None
        norm, proj_in, proj_out, *blocks = parts
        x = x.contiguous(memory_format=torch.channels_last)
        if not (norm.supports(x) and proj_in.supports(x)):
            return None
        if m.entering is not None:
            m.entering(x)
        context = context.to(x.dtype)
        (b, _, h, w), batch = x.shape, context.shape[0]
        tokens = proj_in.convolve(norm.normalise(x)).permute(0, 2, 3, 1).reshape(b, h * w, -1)
        for block in blocks:
            if not block.supports(tokens):
                return None
            tokens = block.self_attention(tokens, context)
            if tokens.shape[0] != batch:  # from here on the halves differ, by their contexts
                tokens, x = torch.cat([tokens, tokens]), torch.cat([x, x])
            tokens = block.cross_attention_and_feed_forward(tokens, context)
        return proj_out.convolve(tokens.reshape(batch, h, w, -1).permute(0, 3, 1, 2), add=x)

    def supports_shared_prefix(self) -> bool:
        """Whether unmodified parts give for one of two equal halves what they would give for both."""
        m = self.module
        blocks = m.transformer_blocks
        return (
            not m.use_linear
            and not blocks[0].disable_self_attn
            # A processor may tell the rows of the halves apart.
            and blocks[0].attn1.processor is None
            # It cannot fall back once it has one half.
            and fused_parts(m.norm, m.proj_in, m.proj_out, *blocks) is not None
            and all(fused_parts(one.attn1, one.attn2, one.ff) is not None for one in blocks)
        )


class FusedAttnBlock(FusedModule):
    """The autoencoder's attention, one head as wide as the map is deep."""

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Compute (b, c, h, w) -> the same."""
        m = self.module
        parts = fused_parts(m.norm, m.q, m.k, m.v, m.proj_out)
        if parts is None or not is_supported(x) or x.dim() != 4:
            return None
        norm, *to_qkv, proj_out = parts
        x = x.contiguous(memory_format=torch.channels_last)
        if not (norm.supports(x) and to_qkv[0].supports(x)):
            return None
        (b, c, h, w) = x.shape
        normed = norm.normalise(x)
        q, k, v = (part.convolve(normed).permute(0, 2, 3, 1).reshape(b, h * w, c) for part in to_qkv)
        if not backend_of(x).supports_attention(q, k, v, 1):
            return None
        out = backend_of(x).attention(q, k, v, 1, c**-0.5)
        return proj_out.convolve(out.reshape(b, h, w, c).permute(0, 3, 1, 2), add=x)


class FusedAttentionBlock(FusedModule):
    """The attention of OpenAI's UNets. Weights with the heads outermost are packed in the order q, k, v."""

    def __init__(self, module: unet.AttentionBlock):
        super().__init__(module)
        self._packed_qkv, self._packed_out = WeightCache(), WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        """Compute (b, c, h, w) -> the same."""
        m = self.module
        norm = fused_part(m.norm)
        parts = (m.attention, m.qkv, m.proj_out)
        if norm is None or not is_supported(x) or x.dim() != 4 or not all(map(is_unmodified, parts)):
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        if not norm.supports(x) or x.dtype != m.qkv.weight.dtype:
            return None
        b, c, h, w = x.shape

        def tokens(y: Tensor) -> Tensor:
            return y.permute(0, 2, 3, 1).reshape(b, h * w, c)

        backend = backend_of(x)
        packed, bias = self._packed_qkv.get(
            lambda: self._packed_in_order(backend, b * h * w), m.qkv.weight, m.qkv.bias
        )
        qkv = backend.multiply(tokens(norm.normalise(x)), packed, bias)
        q, k, v = qkv.chunk(3, dim=2)
        if not backend.supports_attention(q, k, v, m.num_heads):
            return None
        out = backend.attention(q, k, v, m.num_heads, (c // m.num_heads) ** -0.5)
        proj_out = m.proj_out
        packed = self._packed_out.get(
            lambda: backend.pack_linear(proj_out.weight.detach().squeeze(2), b * h * w), proj_out.weight
        )
        out = backend.multiply(out, packed, proj_out.bias, tokens(x))
        return out.view(b, h, w, c).permute(0, 3, 1, 2)

    def _packed_in_order(self, backend: Backend, rows: int) -> tuple[Tensor, Tensor]:
        """Weight and bias that give q of all heads, then k, then v."""
        m = self.module
        weight, bias = m.qkv.weight.detach().squeeze(2), m.qkv.bias.detach()
        if isinstance(m.attention, unet.QKVAttentionLegacy):
            order = torch.arange(len(bias)).view(m.num_heads, 3, -1).transpose(0, 1).flatten()
            weight, bias = weight[order], bias[order]
        return backend.pack_linear(weight.contiguous(), rows), bias


# --- the UNet under guidance --------------------------------------------------------------------------


class FusedUNet(FusedModule):
    """The UNet. Where both halves of a guided batch are equal maps at equal levels, the blocks before the first
    cross-attention run for one half."""

    def try_forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Any = None,
        y: Any = None,
        *,
        control: Any = None,
        only_mid_control: bool = False,
        features: Mapping[int, Tensor] | None = None,
        depth: int = 0,
        deep: Tensor | None = None,
    ) -> Any:
        """Compute UNetModel.forward's x (b, c, h, w) -> (b, out, h, w), where both halves of x and timesteps are equal.

        Raises:
            UsageError: `control` or `features` do not fit, as UNetModel.forward.
        """
        m, half = self.module, x.shape[0] // 2
        first = self._first_context_block(m)
        if not (
            first
            and y is None
            and m.num_classes is None
            and deep is None
            and first < min(features or (len(m.input_blocks),))  # those may differ between the halves
            and 0 <= depth <= len(m.input_blocks)
            and isinstance(context, Tensor)
            and isinstance(timesteps, Tensor)
            and x.shape[0] == context.shape[0] == 2 * half > 0
            and is_supported(x)
            and backend_of(x).CACHES_CONTEXT
            and torch.equal(x[:half], x[half:])
            and torch.equal(timesteps[:half], timesteps[half:])
        ):
            return None
        control = m._control(control, only_mid_control)
        emb = m._embed(x, timesteps, None)
        skips: list[Tensor] = []
        h = m.run_blocks(m._torso_input(x[:half]), emb[:half], context, skips, control, stop=first + 1)
        skips = [skip if len(skip) == len(h) else torch.cat([skip, skip]) for skip in skips]
        return m._run_from(first + 1, h, emb, context, skips, control, depth, x.dtype, features)

    @staticmethod
    def _first_context_block(m: unet.UNetModel) -> int:
        """Index of the first input block with cross-attention, if it may be given halves; else 0."""
        for i, block in enumerate(m.input_blocks):
            found = [layer for layer in block if isinstance(layer, SpatialTransformer)]
            if found:
                own = vars(found[0]).get("forward")
                fine = (
                    found[0] is block[-1]
                    and isinstance(own, FusedSpatialTransformer)
                    and own.supports_shared_prefix()
                    # A hook is called with both halves.
                    and all(is_unmodified(part) for one in m.input_blocks[: i + 1] for part in _parts_of(one))
                )
                return i if fine else 0
        return 0


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its parts, but for attention processors, which the attentions answer for."""
    yield module
    for name, part in module._modules.items():
        if part is not None and name not in SLOTS:
            yield from _parts_of(part)


FUSED: dict[type[nn.Module], type[FusedModule]] = {
    nn.Linear: FusedLinear,
    nn.Conv2d: FusedConv,
    nn.GroupNorm: FusedGroupNorm,
    GroupNorm32: FusedGroupNorm,
    CrossAttention: FusedCrossAttention,
    FeedForward: FusedFeedForward,
    BasicTransformerBlock: FusedTransformerBlock,
    SpatialTransformer: FusedSpatialTransformer,
    unet.ResBlock: FusedResBlock,
    unet.AttentionBlock: FusedAttentionBlock,
    unet.Upsample: FusedUpsample,
    unet.UNetModel: FusedUNet,
    vae.ResnetBlock: FusedResnetBlock,
    vae.Upsample: FusedUpsample,
    vae.AttnBlock: FusedAttnBlock,
    vae.Decoder: FusedDecoder,
    CLIPTextTransformer: FusedCLIPText,
}
# Those, and the parts of modules whose work is done without calling them.
register(
    *FUSED,
    nn.SiLU,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
    nn.Sequential,
    nn.LayerNorm,
    nn.AvgPool2d,
    nn.Conv1d,
    GEGLU,
    unet.QKVAttention,
    unet.QKVAttentionLegacy,
    unet.Downsample,
    unet.TimestepEmbedSequential,
    vae.Encoder,
)


def attach(root: nn.Module) -> int:
    """Give every module of a tree its fused forward, if there is one; return how many.

    On a device without a backend they fall back. Parts of a module that has a FusedModule of another kind already, such
    as VAE tiling, which does their work itself, are left out.
    """
    count, taken = 0, set()
    for module in root.modules():
        if isinstance(execution_of(module), FusedModule):
            taken.update(module.modules())
    for module in root.modules():
        fused = FUSED.get(type(module))
        if fused is not None and module not in taken and own_forward(module) is None:
            set_execution(module, fused(module))
            count += 1
    return count


def detach(root: nn.Module) -> int:
    """Delete all fused forwards of a tree, of every kind; return how many there were."""
    count = 0
    for module in root.modules():
        if isinstance(execution_of(module), FusedModule):
            set_execution(module, None)
            count += 1
    return count
