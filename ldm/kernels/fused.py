"""What stands in for the forward of a module where no gradients are asked for.

A stand-in is an attribute `forward` of one module, so hooks fire, keys and classes stay, and taking the attribute off
restores the plain code. It hands a call on to the plain code whenever anything is not as it knows it: other dtypes or
devices, autocast, tracing, gradients, or a part of the module that someone has replaced, patched or hooked. What it
computes with is an backend, one for each kind of device: cpu.py or cuda.py.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ldm.kernels import cpu, cuda
from ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from ldm.modules.diffusionmodules import model as vae
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.modules.diffusionmodules.util import GroupNorm32, timestep_embedding

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


def cache_key(x: Tensor | None) -> tuple[Any, ...]:
    """What changes when a tensor is written to or replaced."""
    if x is None:
        return (None,)
    return (x.data_ptr(), x.device, x.shape, x.dtype, None if x.is_inference() else x._version)


def _nothing() -> None:
    return None


class WeightCache:
    """Something made of tensors and kept until one of them changes. Copies of a module begin with nothing.

    Attributes:
        kept: what was made last; None at first.
    """

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        # By reference, too, for another one may come to lie where one lay.
        self._tensors: list[Callable[[], Tensor | None]] = []
        self.value: Any = None

    def get(self, make: Callable[[], Any], *tensors: Tensor | None) -> Any:
        of = tuple(map(cache_key, tensors))
        same = of == self._of and all(ref() is x for ref, x in zip(self._tensors, tensors, strict=True))
        if not same:
            self._of, self.value = of, make()
            self._tensors = [_nothing if x is None else weakref.ref(x) for x in tensors]
        return self.value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _in_plain_inference() -> bool:
    """Whether this is a plain call: no gradients, no autocast, nobody who watches or traces operations."""
    return not (
        torch.is_grad_enabled()
        or any(map(torch.is_autocast_enabled, BACKENDS))
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
    )


def _backend(x: Tensor) -> ModuleType:
    return BACKENDS[x.device.type]


def _is_supported(x: Any) -> bool:
    return type(x) is Tensor and x.device.type in BACKENDS and x.dtype in _backend(x).DTYPES


def code_of(kind: type[nn.Module]) -> tuple[Any, Any]:
    """What a class computes with: CompVis's blocks call a `_forward`, which others patch or override, too."""
    return kind.forward, getattr(kind, "_forward", None)


def _has_original_code(kind: type[nn.Module]) -> bool:
    return ORIGINAL_CODE.get(kind) == code_of(kind)


def is_unmodified(module: nn.Module) -> bool:
    """Whether nobody hooked or patched a module, so that what it does may be done elsewhere."""
    own = vars(module).get("forward")
    return (
        (own is None or isinstance(own, FusedModule))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and _has_original_code(type(module))
        and not module.training
    )


class FusedModule:
    """A module's forward for plain inference; the module's own forward is the fallback."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not module.training and _has_original_code(type(module)) and _in_plain_inference():
            out = self.try_forward(*args, **kwargs)
            if out is not None:
                return out
        return self.fallback(*args, **kwargs)

    def try_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the module's forward takes and give what it gives, or None for a call that is not supported."""
        raise NotImplementedError

    def fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Compute by the module's own code."""
        return type(self.module).forward(self.module, *args, **kwargs)


class ForwardWrapper(FusedModule):
    """Wraps whatever else computes a module's forward.

    Args:
        module: whose forward it is.
        inner: the module's other forward, usually a FusedModule; None = the module's own code.
    """

    def __init__(self, module: nn.Module, inner: Any = None):
        super().__init__(module)
        self.inner = inner

    def fallback(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the module did before it was wrapped."""
        return super().fallback(*args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)


def _fused_part(module: nn.Module) -> "FusedModule | None":
    """The stand-in of a part that may be called around its module; None if that is not so."""
    own = vars(module).get("forward")
    return own if isinstance(own, FusedModule) and is_unmodified(module) else None


# --- single layers --------------------------------------------------------------------------------


class FusedLinear(FusedModule):
    """A linear layer, with its weight laid out beforehand."""

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        self._packed = WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        return self.multiply(x, self.module.bias) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        weight = self.module.weight
        return (
            _is_supported(x)
            and weight.device == x.device
            and x.dtype == weight.dtype
            and x.dim() > 1
            and x.numel() > 0
        )

    def multiply(self, x: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
        weight, backend = self.module.weight, _backend(x)
        packed = self._packed.get(
            lambda: backend.pack_linear(weight.detach(), x.numel() // x.shape[-1]), weight
        )
        return backend.multiply(x, packed, bias, add)


class FusedConv(FusedModule):
    """A 2-dimensional convolution, channels last, with its weight laid out beforehand."""

    def __init__(self, module: nn.Conv2d):
        super().__init__(module)
        self._packed: defaultdict[str, WeightCache] = defaultdict(WeightCache)

    def try_forward(self, x: Tensor) -> Tensor | None:
        return self.convolve(x) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        m = self.module
        return (
            _is_supported(x)
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
        return _backend(x).convolve(self.module, x, self._packed, add)


class FusedGroupNorm(FusedModule):
    """A group norm of a map with channels last; statistics and scaling in float32 or better."""

    def __init__(self, module: nn.GroupNorm):
        super().__init__(module)
        self._affine = WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        return self.normalise(x) if self.supports(x) else None

    def supports(self, x: Tensor) -> bool:
        m = self.module
        return (
            m.weight is not None
            and _is_supported(x)
            and x.dim() == 4
            and _backend(x).supports_norm(x, m.num_groups)
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias (c,) in float32."""
        m = self.module
        return self._affine.get(
            lambda: (m.weight.detach().float(), m.bias.detach().float()), m.weight, m.bias
        )

    def normalise(self, x: Tensor, *, silu: bool = False, **options: Any) -> Tensor:
        """See the backend's group_norm; `affine` replaces the module's own."""
        weight, bias = options.pop("affine", None) or self.affine()
        return _backend(x).group_norm(
            x, self.module.num_groups, weight, bias, self.module.eps, silu=silu, **options
        )


# --- residual blocks ------------------------------------------------------------------------------


def _fused_parts(*modules: nn.Module) -> list[Any] | None:
    parts = [_fused_part(module) for module in modules]
    return None if None in parts else parts


def _norm_silu_conv(x: Tensor, norm: Any, conv: Any, norm_after: Any) -> tuple[Tensor, Tensor] | None:
    """Give x with channels last and the first convolution of norm and SiLU; None if a layer does not serve its map."""
    x = x.contiguous(memory_format=torch.channels_last)
    if not (norm.supports(x) and conv.supports(x)):
        return None
    h = conv.convolve(norm.normalise(x, silu=True))
    return (x, h) if norm_after.supports(h) else None


class FusedResBlock(FusedModule):
    """The UNet's residual block: norm with SiLU in one pass, the sum as part of the last convolution."""

    def try_forward(self, x: Tensor, emb: Tensor, size: Any = None) -> Tensor | None:
        m = self.module
        if m.updown or not _is_supported(x) or x.dim() != 4:
            return None
        parts = _fused_parts(m.in_layers[0], m.in_layers[2], m.out_layers[0], m.out_layers[3])
        sequences = (m.in_layers, m.out_layers, m.emb_layers)
        if (
            parts is None
            or not all(map(is_unmodified, sequences))
            or not is_unmodified(m.in_layers[1])
            or not is_unmodified(m.out_layers[1])
        ):
            return None
        *first, norm_after, conv_after = parts
        begun = _norm_silu_conv(x, *first, norm_after)
        if begun is None:
            return None
        x, h = begun
        moved = m.emb_layers(emb.type(m.emb_layers[1].weight.dtype)).float().contiguous()  # (b, c or 2c)
        if m.use_scale_shift_norm:
            weight, bias = norm_after.affine()
            scale, shift = moved.chunk(2, dim=1)
            options = {"affine": (weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale))}
        else:
            options = {"shift": moved}
        h = norm_after.normalise(h, silu=True, out=h, **options)
        return conv_after.convolve(h, add=m.skip_connection(x))


class FusedResnetBlock(FusedModule):
    """The autoencoder's residual block, likewise."""

    def try_forward(self, x: Tensor, temb: Tensor | None) -> Tensor | None:
        m = self.module
        parts = _fused_parts(m.norm1, m.conv1, m.norm2, m.conv2)
        if parts is None or not _is_supported(x) or x.dim() != 4:
            return None
        *first, norm_after, conv_after = parts
        begun = _norm_silu_conv(x, *first, norm_after)
        if begun is None:
            return None
        x, h = begun
        shift = None if temb is None else m.temb_proj(F.silu(temb)).float().contiguous()
        h = norm_after.normalise(h, silu=True, shift=shift, out=h)
        if m.in_channels != m.out_channels:
            x = m.conv_shortcut(x) if m.use_conv_shortcut else m.nin_shortcut(x)
        return conv_after.convolve(h, add=x)


class FusedDecoder(FusedModule):
    """The autoencoder's decoder: its last norm with SiLU in one pass, over the largest map that there is."""

    def try_forward(self, z: Tensor) -> Tensor | None:
        m = self.module
        parts = _fused_parts(m.norm_out, m.conv_out)
        if parts is None or m.give_pre_end:
            return None
        norm, conv = parts
        h = m.features(z)
        if not (norm.supports(h) and conv.supports(h)):
            return m.answer(h)
        h = conv.convolve(norm.normalise(h, silu=True))
        return torch.tanh(h) if m.tanh_out else h


class FusedUpsample(FusedModule):
    """Repetition and a 3x3 convolution as four 2x2 convolutions of the small map: 4/9 of the products.

    Row 2i of the large map is made of rows i - 1 and i of the small one, row 2i + 1 of rows i and i + 1; taps that
    meet the same cell are added beforehand. The four results are then laid out as one map.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._packed = WeightCache()

    def try_forward(self, x: Tensor, size: Any = None) -> Tensor | None:
        m = self.module
        if not getattr(m, "use_conv", getattr(m, "with_conv", False)) or not _is_supported(x) or x.dim() != 4:
            return None
        conv = _fused_part(m.conv)
        doubled = torch.Size(2 * side for side in x.shape[2:])
        if conv is None or not conv.supports(x) or (size is not None and torch.Size(size) != doubled):
            return None
        own = m.conv
        if (own.kernel_size, own.padding, own.stride, own.groups) != ((3, 3), (1, 1), (1, 1), 1):
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        how = ((1, 1), (1, 1), (1, 1), 1)
        backend = _backend(x)
        packed, bias = self._packed.get(
            lambda: self._phases(backend, own, how, x.shape), own.weight, own.bias
        )
        return backend.interleave_phases(backend.run_conv(x, packed, bias, *how))  # of (b, 4 c, h + 1, w + 1)

    @staticmethod
    def _phases(backend: ModuleType, conv: nn.Conv2d, how: Any, size: Any) -> tuple[Tensor, Tensor | None]:
        weight = conv.weight.detach().float()
        first, middle, last = weight.unbind(dim=2)
        rows = (torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2))
        kernels = []
        for part in rows:  # (out, in, 2, 3)
            first, middle, last = part.unbind(dim=3)
            kernels.append(torch.stack([first, middle + last], 3))
            kernels.append(torch.stack([first + middle, last], 3))
        joined = torch.cat(kernels).to(conv.weight.dtype)  # (4 out, in, 2, 2)
        bias = None if conv.bias is None else conv.bias.detach().repeat(4)
        return backend.pack_conv(joined, *how, size), bias


# --- attention --------------------------------------------------------------------------------------


class FusedCrossAttention(FusedModule):
    """Attention by the backend's kernel; keys and values of a context that stays the same are kept."""

    def __init__(self, module: CrossAttention):
        super().__init__(module)
        self._context_cache, self._packed_qkv = WeightCache(), WeightCache()

    def try_forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor | None:
        m = self.module
        if mask is not None or not _is_supported(x) or x.dim() != 3:
            return None
        q, k, v = self._self_qkv(x) if context is None else (m.to_q(x), *self._context_kv(context))
        if not _backend(x).supports_attention(q, k, v, m.heads):
            return None
        out = _backend(x).attention(q, k, v, m.heads, m.scale)
        last = _fused_part(m.to_out[0])
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
        """Queries, keys and values of tokens among themselves, in one product."""
        m = self.module
        layers, parts = (m.to_q, m.to_k, m.to_v), _fused_parts(m.to_q, m.to_k, m.to_v)
        if parts is None or not all(
            part.supports(x) and layer.bias is None and layer.weight.shape == m.to_q.weight.shape
            for part, layer in zip(parts, layers, strict=True)
        ):
            return m.to_q(x), m.to_k(x), m.to_v(x)
        backend, weights = _backend(x), [layer.weight for layer in layers]
        packed = self._packed_qkv.get(
            lambda: backend.pack_linear(torch.cat(weights).detach(), x.numel() // x.shape[-1]), *weights
        )
        return backend.multiply(x, packed, None).chunk(3, dim=2)

    def _context_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context; those of the last one if it says the same, as it does at every step."""
        m = self.module
        if _fused_parts(m.to_k, m.to_v) is None or not _backend(context).CACHES_CONTEXT:
            return m.to_k(context), m.to_v(context)
        kept = self._context_cache.get(dict, m.to_k.weight, m.to_v.weight)
        if not kept or kept["context"].shape != context.shape or not torch.equal(kept["context"], context):
            kept.update(context=context.clone(), found=(m.to_k(context), m.to_v(context)))
        return kept["found"]


class FusedFeedForward(FusedModule):
    """A gated feed-forward in portions of tokens; bias, GELU and gate in one pass."""

    def __init__(self, module: FeedForward):
        super().__init__(module)
        self._bias = WeightCache()

    def try_forward(self, x: Tensor, add: Tensor | None = None) -> Tensor | None:
        m = self.module
        gate = m.net[0]
        if (
            not _is_supported(x)
            or type(gate) is not GEGLU
            or not all(map(is_unmodified, (m.net, gate, m.net[1])))
        ):
            return None
        parts = _fused_parts(gate.proj, m.net[2])
        if parts is None:
            return None
        widen, narrow = parts
        backend = _backend(x)
        flat = x.reshape(-1, x.shape[-1])
        if (
            not widen.supports(flat)
            or gate.proj.bias is None
            or not backend.supports_geglu(x, gate.proj.out_features)
        ):
            return None
        bias = self._bias.get(lambda: gate.proj.bias.detach().float(), gate.proj.bias)
        inner = x.new_empty((flat.shape[0], gate.proj.out_features // 2))
        for i in range(0, flat.shape[0], backend.FEED_FORWARD_ROWS):
            rows = slice(i, i + backend.FEED_FORWARD_ROWS)
            backend.geglu(widen.multiply(flat[rows], None), bias, inner[rows])
        beside = None if add is None else add.reshape(flat.shape[0], -1)
        return narrow.multiply(inner, m.net[2].bias, beside).view(*x.shape[:-1], -1)


class FusedTransformerBlock(FusedModule):
    """The three parts of a transformer block, each adding to its input as part of its last product."""

    def try_forward(self, x: Tensor, context: Tensor | None = None) -> Tensor | None:
        return (
            self.cross_attention_and_feed_forward(self.self_attention(x, context), context)
            if self.supports(x)
            else None
        )

    def supports(self, x: Tensor) -> bool:
        m = self.module
        return _is_supported(x) and x.dim() == 3 and _fused_parts(m.attn1, m.attn2, m.ff) is not None

    def self_attention(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Self-attention."""
        m = self.module
        return self._add(m.attn1, m.norm1(x), x, context if m.disable_self_attn else None)

    def cross_attention_and_feed_forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Attention to the context and feed-forward."""
        m = self.module
        x = self._add(m.attn2, m.norm2(x), x, context)
        return self._add(m.ff, m.norm3(x), x)

    @staticmethod
    def _add(part: nn.Module, normed: Tensor, x: Tensor, *context: Tensor | None) -> Tensor:
        out = vars(part)["forward"].try_forward(normed, *context, add=x)
        return part(normed, *context) + x if out is None else out


class FusedSpatialTransformer(FusedModule):
    """A SpatialTransformer; it also takes one half of a guided batch whose halves are alike, and gives both."""

    def try_forward(self, x: Tensor, context: Any = None) -> Tensor | None:
        m = self.module
        if m.use_linear or not _is_supported(x) or x.dim() != 4 or not isinstance(context, Tensor):
            return None
        parts = _fused_parts(m.norm, m.proj_in, m.proj_out, *m.transformer_blocks)
        if parts is None:
            return None
        norm, into, back, *blocks = parts
        x = x.contiguous(memory_format=torch.channels_last)
        if not (norm.supports(x) and into.supports(x)):
            return None
        context = context.to(x.dtype)
        (b, _, h, w), both = x.shape, context.shape[0]
        tokens = into.convolve(norm.normalise(x)).permute(0, 2, 3, 1).reshape(b, h * w, -1)
        for block in blocks:
            if not block.supports(tokens):
                return None
            tokens = block.self_attention(tokens, context)
            if tokens.shape[0] != both:  # from here on the halves differ: by what they are told
                tokens, x = torch.cat([tokens, tokens]), torch.cat([x, x])
            tokens = block.cross_attention_and_feed_forward(tokens, context)
        return back.convolve(tokens.reshape(both, h, w, -1).permute(0, 3, 1, 2), add=x)

    def supports_shared_prefix(self) -> bool:
        """Whether a call with half of the maps gives what one with all of them would."""
        m = self.module
        parts = (m.norm, m.proj_in, m.proj_out, *m.transformer_blocks)
        return (
            not m.use_linear
            and is_unmodified(m)
            and not m.transformer_blocks[0].disable_self_attn
            and all(map(is_unmodified, parts))
        )


class FusedAttnBlock(FusedModule):
    """The autoencoder's attention, one head as wide as the map is deep."""

    def try_forward(self, x: Tensor) -> Tensor | None:
        m = self.module
        parts = _fused_parts(m.norm, m.q, m.k, m.v, m.proj_out)
        if parts is None or not _is_supported(x) or x.dim() != 4:
            return None
        norm, *to, back = parts
        x = x.contiguous(memory_format=torch.channels_last)
        if not (norm.supports(x) and to[0].supports(x)):
            return None
        (b, c, h, w) = x.shape
        normed = norm.normalise(x)
        q, k, v = (part.convolve(normed).permute(0, 2, 3, 1).reshape(b, h * w, c) for part in to)
        if not _backend(x).supports_attention(q, k, v, 1):
            return None
        out = _backend(x).attention(q, k, v, 1, c**-0.5)
        return back.convolve(out.reshape(b, h, w, c).permute(0, 3, 1, 2), add=x)


class FusedAttentionBlock(FusedModule):
    """The attention of OpenAI's UNets. Where its weights have the heads outermost, they are sorted beforehand."""

    def __init__(self, module: unet.AttentionBlock):
        super().__init__(module)
        self._into, self._back = WeightCache(), WeightCache()

    def try_forward(self, x: Tensor) -> Tensor | None:
        m = self.module
        norm = _fused_part(m.norm)
        parts = (m.attention, m.qkv, m.proj_out)
        if norm is None or not _is_supported(x) or x.dim() != 4 or not all(map(is_unmodified, parts)):
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        if not norm.supports(x) or x.dtype != m.qkv.weight.dtype:
            return None
        b, c, h, w = x.shape

        def tokens(y: Tensor) -> Tensor:
            return y.permute(0, 2, 3, 1).reshape(b, h * w, c)

        backend = _backend(x)
        packed, bias = self._into.get(
            lambda: self._packed_in_order(backend, b * h * w), m.qkv.weight, m.qkv.bias
        )
        qkv = backend.multiply(tokens(norm.normalise(x)), packed, bias)
        q, k, v = qkv.chunk(3, dim=2)
        if not backend.supports_attention(q, k, v, m.num_heads):
            return None
        out = backend.attention(q, k, v, m.num_heads, (c // m.num_heads) ** -0.5)
        back = m.proj_out
        packed = self._back.get(
            lambda: backend.pack_linear(back.weight.detach().squeeze(2), b * h * w), back.weight
        )
        out = backend.multiply(out, packed, back.bias, tokens(x))
        return out.view(b, h, w, c).permute(0, 3, 1, 2)

    def _packed_in_order(self, backend: ModuleType, rows: int) -> tuple[Tensor, Tensor]:
        """Weight and bias that give q of all heads, then k, then v."""
        m = self.module
        weight, bias = m.qkv.weight.detach().squeeze(2), m.qkv.bias.detach()
        if isinstance(m.attention, unet.QKVAttentionLegacy):
            order = torch.arange(len(bias)).view(m.num_heads, 3, -1).transpose(0, 1).flatten()
            weight, bias = weight[order], bias[order]
        return backend.pack_linear(weight.contiguous(), rows), bias


# --- the UNet under guidance --------------------------------------------------------------------------


class FusedUNet(FusedModule):
    """The UNet; where both halves of a batch are the same maps at the same levels, what comes before the first
    attention to the context is done for one half."""

    def try_forward(
        self, x: Tensor, timesteps: Tensor | None = None, context: Any = None, y: Any = None, **kwargs: Any
    ) -> Tensor | None:
        m, half = self.module, x.shape[0] // 2
        alone = self._first_context_block(m)
        if not (
            alone
            and y is None
            and m.num_classes is None
            and isinstance(context, Tensor)
            and isinstance(timesteps, Tensor)
            and x.shape[0] == context.shape[0] == 2 * half > 0
            and _is_supported(x)
            and _backend(x).CACHES_CONTEXT
            and torch.equal(x[:half], x[half:])
            and torch.equal(timesteps[:half], timesteps[half:])
        ):
            return None
        emb = timestep_embedding(timesteps, m.model_channels)
        emb = m.time_embed(emb.to(m.time_embed[0].weight.dtype))
        h, level = m._torso_input(x[:half]), emb[:half]
        skips = []
        for i, block in enumerate(m.input_blocks):
            h = block(h, level if i <= alone else emb, context)
            skips.append(h)
        h = m.middle_block(h, emb, context)
        for block in m.output_blocks:
            skip = skips.pop()
            h = torch.cat([h, skip if skip.shape[0] == h.shape[0] else torch.cat([skip, skip])], dim=1)
            reach = skips[-1].shape[2:] if skips else h.shape[2:]
            uneven = any(r not in (s, 2 * s) for r, s in zip(reach, h.shape[2:], strict=True))
            h = block(h, emb, context, reach) if uneven else block(h, emb, context)
        return m._answer(m.id_predictor if m.predict_codebook_ids else m.out, h, x.dtype)

    @staticmethod
    def _first_context_block(m: unet.UNetModel) -> int:
        """Index of the first input block that looks at the context, if it may be given halves; else 0."""
        for i, block in enumerate(m.input_blocks):
            found = [layer for layer in block if isinstance(layer, SpatialTransformer)]
            if found:
                own = vars(found[0]).get("forward")
                fine = (
                    found[0] is block[-1]
                    and isinstance(own, FusedSpatialTransformer)
                    and own.supports_shared_prefix()
                )
                return i if fine and all(map(is_unmodified, m.input_blocks[: i + 1])) else 0
        return 0


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
}
# Their forwards as they are here, and those of what is done around them; a class that someone patches later is left to
# its patch.
ORIGINAL_CODE: dict[type[nn.Module], tuple[Any, Any]] = {
    kind: code_of(kind)
    for kind in (
        *FUSED,
        nn.SiLU,
        nn.Dropout,
        nn.Sequential,
        nn.LayerNorm,
        nn.Conv1d,
        GEGLU,
        unet.QKVAttention,
        unet.QKVAttentionLegacy,
        unet.TimestepEmbedSequential,
        vae.Encoder,
    )
}


def attach(root: nn.Module) -> int:
    """Give every module of a tree its stand-in, if there is one; return how many.

    On a device that has no backend they leave all work to the plain code.

    The parts of one that has a stand-in of another kind already, which does their work itself, stay plain.
    """
    count, taken = 0, set()
    for module in root.modules():
        if isinstance(vars(module).get("forward"), FusedModule):
            taken.update(module.modules())
    for module in root.modules():
        stand_in = FUSED.get(type(module))
        if stand_in is not None and module not in taken and "forward" not in vars(module):
            module.forward = stand_in(module)
            count += 1
    return count


def detach(root: nn.Module) -> int:
    """Take the stand-ins off again; return how many there were."""
    count = 0
    for module in root.modules():
        if isinstance(vars(module).get("forward"), FusedModule):
            with contextlib.suppress(AttributeError):
                del module.forward
            count += 1
    return count
