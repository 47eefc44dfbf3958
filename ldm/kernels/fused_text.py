"""Fused forward of CLIP's text encoder on a CPU: joined projections, sums and activations within products, no mask.

The layers are transformers', of 4.57 and 5.x: their modules are known by their code as it was when the encoder was
optimized, and any that is hooked, patched or replaced sends the whole encoder back to its own code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.kernels import cpu, native
from ldm.kernels.fused_module import FusedModule, WeightCache, is_supported
from ldm.modules.seams import is_registered, on, register

# Activations of the feed-forward, by transformers' class.
ACTIVATIONS = {"QuickGELUActivation": "quick_gelu", "GELUActivation": "gelu"}


class FusedCLIPText(FusedModule):
    """CLIP's text encoder, ldm.modules.encoders.modules.CLIPTextTransformer."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        register(nn.Embedding, nn.ModuleList)
        for kind in {type(part) for part in module._model[0].modules()}:
            # A class that was patched before has another module's function, and stays unknown.
            if kind.__module__.startswith("transformers.") and kind.forward.__module__ == kind.__module__:
                register(kind)
        self._joined = [WeightCache() for _ in module.text_model.encoder.layers]
        self._packed = [
            {name: WeightCache() for name in ("out", "widen", "narrow")}
            for _ in module.text_model.encoder.layers
        ]

    def try_forward(
        self, input_ids: Any, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> Any | None:
        """Encode token numbers (b, n) into what CLIPTextTransformer gives, features (b, n, d); without a mask."""
        text, config = self.module.text_model, self.module.config
        plain_call = not kwargs and isinstance(input_ids, Tensor) and input_ids.dim() == 2
        if not plain_call or config.output_attentions or not self._is_known(text):
            return None
        x = text.embeddings(input_ids=input_ids)
        if not self._supports(x, text):
            return None
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        states = [x]
        for i, layer in enumerate(text.encoder.layers):
            states.append(self._layer(i, layer, states[-1]))
        last = _norm(states[-1], text.final_layer_norm)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[torch.arange(len(last)), _first_end(input_ids, config.eos_token_id)],
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _is_known(self, text: nn.Module) -> bool:
        """Whether everything computed here has known code; the embeddings are called as they are."""
        network = self.module._model[0]
        # transformers 4 wraps the encoder once more, where eval() does not reach.
        network.training = text.training
        parts = [network, *text.encoder.modules(), text.final_layer_norm]
        parts = parts if text is network else [*parts, text]
        return all(map(_is_plain, parts))

    def _supports(self, x: Any, text: nn.Module) -> bool:
        layers, width = text.encoder.layers, x.shape[-1]
        if not (is_supported(x) and x.device.type == "cpu" and x.numel() and native.library() is not None):
            return False
        heads, inner = layers[0].self_attn.num_heads, layers[0].mlp.fc1.out_features
        return (
            x.dim() == 3
            and width // heads <= native.MAX_FEATURES
            and width % 32 == inner % 32 == 0
            and all(type(layer.mlp.activation_fn).__name__ in ACTIVATIONS for layer in layers)
            and all(
                weight.dtype == x.dtype and weight.device == x.device for weight in text.encoder.parameters()
            )
        )

    def _layer(self, i: int, layer: nn.Module, x: Tensor) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = self._project(i, attention, _norm(x, layer.layer_norm1)).chunk(3, dim=2)
        seen = native.causal_attention(q, k, v, attention.num_heads, attention.scale)
        x = cpu.multiply(seen, self._weight(i, "out", attention.out_proj, x), attention.out_proj.bias, x)
        act = ACTIVATIONS[type(mlp.activation_fn).__name__]
        wide = cpu.multiply_act(
            _norm(x, layer.layer_norm2), self._weight(i, "widen", mlp.fc1, x), mlp.fc1.bias, act
        )
        return cpu.multiply(wide, self._weight(i, "narrow", mlp.fc2, x), mlp.fc2.bias, x)

    def _weight(self, i: int, name: str, layer: nn.Linear, x: Tensor) -> Any:
        rows = x.shape[0] * x.shape[1]
        return self._packed[i][name].get(lambda: cpu.pack_linear(layer.weight.detach(), rows), layer.weight)

    def _project(self, i: int, attention: nn.Module, x: Tensor) -> Tensor:
        """Compute queries, keys and values side by side."""
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        rows = x.shape[0] * x.shape[1]

        def join() -> tuple[Any, Tensor]:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            return cpu.pack_linear(weight, rows), torch.cat([layer.bias.detach() for layer in layers])

        packed, bias = self._joined[i].get(join, *(p for layer in layers for p in (layer.weight, layer.bias)))
        return cpu.multiply(x, packed, bias)


def _is_plain(part: nn.Module) -> bool:
    """Whether nothing is on a part, as ldm.modules.seams tells, but hooks of transformers' own."""
    if part.training:
        return False
    if part._forward_hooks and all(map(_collects_outputs, part._forward_hooks.values())):
        return not part._forward_pre_hooks and "forward" not in vars(part) and is_registered(type(part))
    return on(part).kind == "plain"


def _collects_outputs(hook: Any) -> bool:
    """Whether a hook is the one that transformers 5 leaves where hidden states were once asked for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _first_end(ids: Tensor, end: int) -> Tensor:
    """Find each prompt's first end mark as transformers does: by the largest number where `end` is its old default."""
    return (ids if end == 2 else (ids == end).int()).int().argmax(dim=-1)
